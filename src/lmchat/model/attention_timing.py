"""Chooses the attention backends of fixed shapes by timing them on the GPU. Never run on a GPU so far."""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lmchat.files import json_object, write_json
from lmchat.model.attention import BACKENDS, exclude_cudnn, probe
from lmchat.model.gpt import GPT

logger = logging.getLogger(__name__)

REPEATS = 10


@dataclass(frozen=True)
class AttentionShape:
    """Attention of a layer: sizes of its tensors, window, and whether it stays within documents."""

    rows: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    documents: bool
    dtype: torch.dtype

    @property
    def candidates(self) -> tuple[str, ...]:
        """Backends to time; cuDNN's kernel has neither windows nor documents."""
        full = self.window >= self.length - 1
        return ("flash", "cudnn", "flex") if full and not self.documents else ("flash", "flex")


def choose_by_timing(net: GPT, rows: int, documents: bool, file: Path) -> dict[int, str]:
    """The fastest correct backend for each window of the model.

    Args:
        net: the network, on a GPU.
        rows: rows per micro-batch.
        documents: whether batches have ``document_starts``.
        file: JSON file that remembers the choices per card, versions and shape.
    """
    config = net.config
    sizes = rows, config.sequence_len, config.n_head, config.n_kv_head, config.head_dim
    shapes = {window: AttentionShape(*sizes, window, documents, net.compute_dtype) for window in config.window_sizes}
    remembered: dict[str, str] = {}
    with suppress(OSError, ValueError):  # absent or damaged
        remembered = json_object(file.read_bytes())
    versions = [torch.cuda.get_device_name(net.device), torch.__version__, torch.backends.cudnn.version()]
    keys = {window: " ".join(map(str, [*versions, *astuple(shape)])) for window, shape in shapes.items()}
    missing = [window for window, shape in shapes.items() if remembered.get(keys[window]) not in shape.candidates]
    for window in missing:
        remembered[keys[window]] = fastest(shapes[window], net.device) or net.attention_backend
    try:
        if missing:
            write_json(file, remembered)
    except OSError as error:
        logger.warning("cannot remember the fastest attention (%s); the next run times it again", error)
    return {window: remembered[key] for window, key in keys.items()}


def use_backends(net: GPT, names: dict[int, str]) -> None:
    """Sets the backend of every layer by its window."""
    for block in net.blocks:
        block.attn.attend = BACKENDS[names[block.attn.window]]
    distinct = dict.fromkeys(names[window] for window in sorted(names))
    net.attention_backend = ", ".join(distinct)


def fastest(shape: AttentionShape, device: torch.device) -> str | None:
    """The fastest of the correct candidates, or None if no candidate works."""
    times = {}
    for name in shape.candidates:
        failure = probe(
            name, device, shape.dtype, shape.head_dim, shape.heads != shape.kv_heads, documents=shape.documents
        )
        if failure is None:
            try:
                times[name] = milliseconds(_step(name, shape, device))
            except RuntimeError as error:  # Any failure means: another backend.
                failure = str(error).splitlines()[0]
        if failure is not None:
            logger.warning("attention %s does not work for %s: %s", name, shape, failure)
    logger.info("attention of %s, ms: %s", shape, times)
    return min(times, key=lambda name: times[name], default=None)


def milliseconds(step: Callable[[], object]) -> float:
    """Mean duration of ``step`` on the GPU, after two calls that compile and warm up."""
    from torch.utils.benchmark import Timer  # Imports setuptools, 0.3 s.

    return 1e3 * Timer("step()", globals={"step": step}).timeit(REPEATS).mean


def _step(name: str, shape: AttentionShape, device: torch.device) -> Callable[[], object]:
    """A function that runs attention forward and backward; with documents, a row has four of equal length."""
    attend = BACKENDS[name]
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int) -> Tensor:
        size = shape.rows, shape.length, heads, shape.head_dim
        return torch.randn(size, generator=generator, device=device, dtype=shape.dtype).requires_grad_()

    q, k, v = random(shape.heads), random(shape.kv_heads), random(shape.kv_heads)
    grad, tokens, starts = random(shape.heads).detach(), shape.rows * shape.length, None
    if shape.documents:
        starts = torch.arange(4 * shape.rows + 1, device=device, dtype=torch.int32) * (shape.length // 4)
        starts[-1] = tokens

    def step() -> object:
        with exclude_cudnn():  # as in the model
            out = attend(q, k, v, shape.window, starts)
        return torch.autograd.grad(out, (q, k, v), grad)

    return step
