"""What the fork server imports for its children, see `forked`."""

from lmchat.cli.lean_imports import lean_imports

with lean_imports():
    import lmchat.cli.fit  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401  (by `torch.compile` when it is called, in the optimizer for example)
