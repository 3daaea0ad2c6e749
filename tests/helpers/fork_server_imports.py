"""Modules that the fork server imports for its children, see `forked`."""

from lmchat.cli.lean_imports import lean_imports

with lean_imports():
    import lmchat.cli.fit  # noqa: F401
import torch._inductor.compile_fx
import torch.utils.tensorboard  # noqa: F401  (by the logger)
