"""Imports Lightning in two thirds of the time: torchmetrics leaves out the optional packages that it would import.

Where SciPy, transformers and Matplotlib are installed, ``import torchmetrics`` loads them for its audio and text
metrics and its plots, which costs 1.3 CPU seconds in every process of a run. Lightning needs none of these.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

_FLAGS = "torchmetrics.utilities.imports"
_LEFT_OUT = ("SCIPY", "SCIPI", "TRANSFORMERS", "MATPLOTLIB", "SCIENCEPLOT")


@contextmanager
def paused_gc() -> Iterator[None]:
    """Within it, the garbage collector pauses, and never looks at what was made again: imports free little."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.freeze()
            gc.enable()


@contextmanager
def lean_imports() -> Iterator[None]:
    """Within it, Lightning and torchmetrics are imported without these packages, which stay importable on their own.

    In a process that has imported Lightning so, torchmetrics reports them as not installed: a metric that needs one
    has to be imported before. The garbage collector pauses.
    """
    with paused_gc():
        if "torchmetrics" in sys.modules:
            yield
        else:
            _preload_flags()
            with _without_scipy_signal():
                yield


def _preload_flags() -> None:
    """Loads torchmetrics' table of installed packages before torchmetrics, with those above marked as missing."""
    package = find_spec("torchmetrics")
    path = Path(package.origin).parent / "utilities" / "imports.py" if package and package.origin else None
    spec = spec_from_file_location(_FLAGS, path) if path and path.is_file() else None
    if spec is None or spec.loader is None:  # another layout: the import is slow, and complete
        return
    flags = module_from_spec(spec)
    spec.loader.exec_module(flags)
    for name in vars(flags):
        if name.startswith(tuple(f"_{package}_" for package in _LEFT_OUT)):
            setattr(flags, name, False)
    sys.modules[_FLAGS] = flags


@contextmanager
def _without_scipy_signal() -> Iterator[None]:
    """torchmetrics imports scipy.signal only to add a function to it that SciPy has removed."""
    name = "scipy.signal"
    if name in sys.modules:
        yield
        return
    stand_in = ModuleType(name)
    stand_in.hamming = None  # type: ignore[attr-defined]
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
