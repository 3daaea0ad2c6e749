"""Modules that the fork server imports for its children, and the parser that it builds for them, see `forked`."""

import contextlib
import io

from lmchat.cli.lean_imports import import_lightning, importing

with importing():
    import_lightning()
    import lmchat.cli.fit
import torch._dynamo  # by the optimizer
import torch.utils.tensorboard  # noqa: F401  (by the logger)

import float64  # noqa: F401  (by tests of several ranks)
import forked  # noqa: F401  (by every child, with pytest)
from built_parsers import keep_parsers

keep_parsers()
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    lmchat.cli.fit.main(["fit", "--model", "PretrainModule", "--data", "FineWebDataModule", "--print_config"])
