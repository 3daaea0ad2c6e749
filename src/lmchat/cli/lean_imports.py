"""Imports quickly and interruptibly: without the garbage collector and optional packages of torchmetrics.

``import torchmetrics`` imports SciPy, transformers and Matplotlib, if installed, for audio and text metrics and plots,
which takes 1.3 CPU seconds in every process. Lightning needs none of these.
"""

import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LEFT_OUT = ("scipy", "transformers", "matplotlib", "scienceplots")


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

    Metrics imported in it treat these packages as not installed. Includes `importing`.
    """
    from lightning_utilities.core import imports

    is_available, is_met = imports.package_available, imports.RequirementCache.__bool__

    def met(requirement: imports.RequirementCache) -> bool:
        if str(requirement.requirement).startswith(_LEFT_OUT):
            requirement.available, requirement.message = False, f"{requirement.requirement} was not imported"
        return is_met(requirement)

    with importing():
        imports.package_available = lambda name: name not in _LEFT_OUT and is_available(name)  # type: ignore[assignment]
        imports.RequirementCache.__bool__ = met  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            imports.package_available = is_available
            imports.RequirementCache.__bool__ = is_met  # type: ignore[method-assign]
