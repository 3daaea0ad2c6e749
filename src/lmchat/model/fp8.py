"""FP8 matrix products in training, by torchao: converts layers, and checks whether the device supports FP8.

Operands are scaled dynamically to the range of their FP8 type: e4m3 for inputs and weights and e5m2 for gradients
("tensorwise", one scale per tensor), or e4m3 for all ("rowwise", one scale per row, more accurate and slower). Products
accumulate in higher precision; master weights stay fp32. Never run on a GPU so far.
"""

import logging
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lmchat.model.gpt import GPT, Linear

Recipe = Literal["tensorwise", "rowwise"]

MULTIPLE = 16
"""Dimensions of an FP8 product must be multiples of this."""
MIN_WIDTH = 128
"""Narrower matrices are not converted: casting costs more than the product saves."""
MIN_CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0)}
"""CUDA compute capability with the kernels of a recipe: Ada and Hopper."""
TOLERANCE = 0.1
"""Relative error (of norms) of an FP8 product against fp32; emulated, 0.06 (tensorwise) and 0.04 (rowwise)."""


@dataclass(frozen=True)
class Conversion:
    """Result of `convert_linears`.

    Attributes:
        converted: names of converted layers.
        left: reason for each layer that was not converted, by name.
    """

    converted: list[str]
    left: dict[str, str]

    def describe(self) -> str:
        """One-line description; layers with equal name and reason are counted."""
        groups = Counter(f"{name.rpartition('.')[2]} ({reason})" for name, reason in self.left.items())
        left = ", ".join(f"{count} × {key}" if count > 1 else key for key, count in groups.items())
        return f"{len(self.converted)} linear layers in FP8" + (f"; not converted: {left}" if left else "")


def convert_linears(
    net: GPT, recipe: Recipe = "tensorwise", *, lm_head: bool = False, pad: bool = False, emulate: bool = False
) -> Conversion:
    """Makes the model's linear layers compute in FP8 in training mode, and as before in eval mode.

    Parameters keep their identity and names. Must be called before the blocks are compiled; a second call replaces the
    first.

    Args:
        recipe: scaling of the operands, see the module.
        lm_head: convert the output head too.
        pad: pad token counts to a multiple of 16, which the product for weight gradients needs; for batches whose
            shape varies.
        emulate: round operands to FP8 and multiply in fp32. Slow, for tests on any device.
    """
    layers = {name: module for name, module in net.named_modules() if isinstance(module, Linear)}
    reasons = {name: why_not(name, layer, lm_head) for name, layer in layers.items()}
    chosen = {name: layers[name] for name, reason in reasons.items() if reason is None}
    for name, twin in _fp8_twins(chosen, recipe, pad, emulate).items():
        chosen[name].fp8 = (twin,)  # in a tuple, so that torch does not register it as a submodule
    return Conversion(list(chosen), {name: reason for name, reason in reasons.items() if reason is not None})


def why_not(name: str, layer: Linear, lm_head: bool) -> str | None:
    """Why a layer stays in the compute dtype, or None."""
    if name == "lm_head" and not lm_head:
        return "--fp8.lm_head false"
    if name.endswith("ve_gate"):
        return "a gate"
    rows, columns = layer.weight.shape
    if rows % MULTIPLE or columns % MULTIPLE:
        return f"{rows} x {columns} is not divisible by {MULTIPLE}"
    if min(rows, columns) < MIN_WIDTH:
        return f"{rows} x {columns} is narrower than {MIN_WIDTH}"
    return None


def _fp8_twins(layers: dict[str, Linear], recipe: Recipe, pad: bool, emulate: bool) -> dict[str, nn.Linear]:
    """torchao's layers on the same parameters, by name."""
    float8 = _import_torchao_float8()
    config = replace(float8.Float8LinearConfig.from_recipe_name(recipe), pad_inner_dim=pad, emulate=emulate)
    holder = nn.ModuleDict({name.replace(".", "/"): layer for name, layer in layers.items()})
    float8.convert_to_float8_training(holder, config=config)
    return {name: cast(nn.Linear, holder[name.replace(".", "/")]) for name in layers}


@cache
def _import_torchao_float8() -> Any:
    """Imports torchao.float8, which takes seconds, without its warnings about libraries for other devices."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import torchao.float8
    finally:
        logging.disable(disabled)
    return torchao.float8


@cache
def missing_hardware(device: torch.device, recipe: Recipe) -> str | None:
    """Why the device cannot compute in FP8, or None; compares forward and backward of a product with fp32."""
    if device.type != "cuda":
        return f"{device.type} has no FP8 products"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY[recipe]:
        major, minor = MIN_CAPABILITY[recipe]
        return f"its compute capability {capability[0]}.{capability[1]} is below {major}.{minor}"
    try:
        error = product_error(device, recipe)
    except ImportError:
        return "torchao is not installed (pip install 'lmchat[gpu]')"
    except Exception as failure:  # Any failure means: train in bf16.
        return f"{type(failure).__name__}: {str(failure)[:100]}"
    return None if error <= TOLERANCE else f"a product is off by {error:.2g}"


def product_error(device: torch.device, recipe: Recipe, emulate: bool = False) -> float:
    """The largest relative error, by norm, of an FP8 layer's output and gradients against fp32's."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(256, 256, generator=generator, device="cpu") for _ in range(3))
    layer = Linear(256, 256).to(device)
    layer.weight.data.copy_(weight)
    [twin] = _fp8_twins({"layer": layer}, recipe, pad=False, emulate=emulate).values()
    actual = _product(twin, x.to(device, torch.bfloat16), grad.to(device, torch.bfloat16))
    expected = _product(layer, x.to(device), grad.to(device))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(actual, expected, strict=True))


def _product(layer: nn.Linear, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, input gradient and weight gradient, in fp32."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = layer(x)
        gradients = torch.autograd.grad(out, [x, layer.weight], grad)
    return [result.detach().float() for result in (out, *gradients)]
