"""A fake CUDA device: tensors with a shape, dtype and device, but no values.

Operators compute shapes only. Mixed devices raise, as do operators that read a value, such as `item`. Works with a
CPU-only build of torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class _WithoutDriver(TorchFunctionMode):
    """Replaces operations that need a driver even for fake tensors: indexing, copies, and attention of a Mac."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return _index(*args)
        if func is Tensor.__setitem__:
            target, index, value = args
            if isinstance(value, Tensor):
                value.expand_as(_index(target, index))
            return None
        if func is Tensor.__invert__:
            return torch.ops.aten.bitwise_not.default(*args)
        if func is scaled_dot_product_attention and args[0].device.type == "mps":
            return torch.ops.aten._scaled_dot_product_attention_math.default(*args, **(kwargs or {}))[0]
        if func is Tensor.copy_:
            args[1].expand_as(args[0])
            return args[0]
        return func(*args, **(kwargs or {}))


def _index(x: Tensor, index: Any) -> Tensor:
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [item for item in items if not isinstance(item, Tensor)]:
        where = next(i for i, item in enumerate(items) if item is Ellipsis)
        consumed = sum(item is not None for item in items) - 1
        items[where : where + 1] = [slice(None)] * (x.dim() - consumed)
    dim, tensors = 0, []
    for item in items:
        if item is None:
            x = torch.ops.aten.unsqueeze.default(x, dim)
        elif isinstance(item, int):
            x, dim = torch.ops.aten.select.int(x, dim, item), dim - 1
        elif isinstance(item, slice):
            if item != slice(None):
                start, stop, step = item.indices(x.size(dim))
                x = torch.ops.aten.slice.Tensor(x, dim, start, stop, step)
        else:
            tensors += [None] * (dim - len(tensors)) + [torch.as_tensor(item)]
        dim += 1
    return torch.ops.aten.index.Tensor(x, tensors) if tensors else x


class WaitsForTheDevice(TorchDispatchMode):
    """Counts the copies from the device that the CPU waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        source = args[0] if args else None
        if func is torch.ops.aten._to_copy.default and isinstance(source, Tensor):
            kwargs = kwargs or {}
            self.count += source.is_cuda and not out.is_cuda and not kwargs.get("non_blocking")
        return out


@contextmanager
def fake_cuda() -> Iterator[WaitsForTheDevice]:
    """Context manager in which ``device="cuda"`` exists; yields a counter of blocking copies to the CPU."""
    with FakeTensorMode(), WaitsForTheDevice() as waits, _WithoutDriver():
        yield waits
