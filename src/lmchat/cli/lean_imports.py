"""Imports quickly and interruptibly: without the garbage collector and optional packages of torchmetrics.

``import torchmetrics`` imports SciPy, transformers and Matplotlib, if installed, for audio and text metrics and plots,
which takes 1.3 CPU seconds in every process. Lightning needs none of these.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

_FLAGS = "torchmetrics.utilities.imports"
_LEFT_OUT = ("SCIPY", "SCIPI", "TRANSFORMERS", "MATPLOTLIB", "SCIENCEPLOT")


@contextmanager
def importing() -> Iterator[None]:
    """Context manager for imports: no garbage collection, and Ctrl-C ends the process at once with status 130.

    Imports free little memory; the objects created are frozen. A KeyboardInterrupt could be lost in the callbacks of
    weak references that importlib runs for every module.
    """
    collects = gc.isenabled()
    gc.disable()
    interruptible = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if interruptible:
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    try:
        yield
    finally:
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if collects:
            gc.freeze()
            gc.enable()


@contextmanager
def lean_imports() -> Iterator[None]:
    """Context manager for importing Lightning and torchmetrics without SciPy, transformers and Matplotlib.

    These stay importable, but in this process torchmetrics treats them as not installed: import a metric that needs
    one before. Includes `importing`.
    """
    with importing():
        if "torchmetrics" in sys.modules:
            yield
        else:
            _preload_flags()
            with _without_scipy_signal():
                yield


def _preload_flags() -> None:
    """Loads torchmetrics' table of installed packages before torchmetrics and marks the packages as missing."""
    package = find_spec("torchmetrics")
    path = Path(package.origin).parent / "utilities" / "imports.py" if package and package.origin else None
    spec = spec_from_file_location(_FLAGS, path) if path and path.is_file() else None
    if spec is None or spec.loader is None:  # another layout: do a slow, complete import
        return
    flags = module_from_spec(spec)
    spec.loader.exec_module(flags)
    for name in vars(flags):
        if name.startswith(tuple(f"_{package}_" for package in _LEFT_OUT)):
            setattr(flags, name, False)
    sys.modules[_FLAGS] = flags


@contextmanager
def _without_scipy_signal() -> Iterator[None]:
    """Replaces scipy.signal, which torchmetrics imports only to add a function that SciPy has removed."""
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
