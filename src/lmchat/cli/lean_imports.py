"""Imports quickly and interruptibly: without the garbage collector and packages that Lightning hardly uses.

``import torchmetrics`` imports SciPy, transformers, torchvision and Matplotlib, if installed, for metrics and plots:
1.3 CPU seconds or more in every process. Lightning needs none of these. Of ``torch._dynamo``, another 1.4 CPU seconds,
it uses one class, to recognize compiled modules, and one decorator.
"""

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_LEFT_OUT = ("scipy", "transformers", "matplotlib", "scienceplots", "torchvision", "torch-fidelity", "torch_fidelity")
_DYNAMO = "torch._dynamo"


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


def import_lightning() -> None:
    """Imports Lightning without SciPy, transformers, Matplotlib, torchvision and ``torch._dynamo``.

    Its metrics treat the packages as not installed. Where an installed package needs what is left out, nothing is.
    """
    try:
        with _leaving_out():
            import lightning
    except ImportError:
        import lightning  # noqa: F401


@contextmanager
def _leaving_out() -> Iterator[None]:
    from lightning_utilities.core import imports

    is_available, is_met = imports.package_available, imports.RequirementCache.__bool__

    def met(requirement: imports.RequirementCache) -> bool:
        if str(requirement.requirement).startswith(_LEFT_OUT):
            requirement.available, requirement.message = False, f"{requirement.requirement} was not imported"
        return is_met(requirement)

    with _without_dynamo():
        imports.package_available = lambda name: name not in _LEFT_OUT and is_available(name)  # type: ignore[assignment]
        imports.RequirementCache.__bool__ = met  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            imports.package_available = is_available
            imports.RequirementCache.__bool__ = is_met  # type: ignore[method-assign]


class _CompiledModules(type):
    """Instances of its classes are those of ``torch._dynamo.OptimizedModule``: none until that is imported."""

    def __instancecheck__(cls, instance: Any) -> bool:
        compiled = getattr(sys.modules.get(_DYNAMO), "OptimizedModule", cls)
        return compiled is not cls and isinstance(instance, compiled)


@contextmanager
def _without_dynamo() -> Iterator[None]:
    """Gives importers of ``torch._dynamo`` what Lightning uses of it."""
    from torch._compile import _disable_dynamo  # imports torch._dynamo when the decorated function is called

    if _DYNAMO in sys.modules:
        yield
        return
    substitute: Any = ModuleType(_DYNAMO)
    substitute.OptimizedModule = _CompiledModules("OptimizedModule", (), {})
    substitute.disable = lambda function, recursive, reason: _disable_dynamo(function, recursive)
    sys.modules[_DYNAMO] = substitute
    try:
        yield
    finally:
        del sys.modules[_DYNAMO]
