"""Kernels of decode steps on a CPU, in C: compiled at their first use, and called through ctypes.

`torch.utils.cpp_extension` would need ninja and import setuptools, which takes longer than this compilation.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import subprocess
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from lmchat.generation.cached_attention import DecodeCache
from lmchat.generation.kv_pool import KVPool
from lmchat.model.gpt import EPS

logger = logging.getLogger(__name__)

FLAGS = ("-O3", "-shared", "-fPIC")
VARIANTS = (("-march=native", "-fopenmp"), ("-march=native", "-fopenmp-simd"), ("-mcpu=native", "-fopenmp-simd"))
"""Flags to try in turn: Apple's compiler has no OpenMP but its vector loops, and may know a CPU only as ``-mcpu``.

libgomp resolves to torch's copy where that has been loaded under this name, so that both share their threads.
"""

COMPILE_SECONDS = 120
"""Seconds after which a compiler is taken to hang."""


class _Slots(ctypes.Structure):
    """``Slots`` of `cpu_kernels.c`."""

    _fields_ = [("keys", ctypes.c_void_p), ("values", ctypes.c_void_p), ("columns", ctypes.c_int64)]

    @classmethod
    def of(cls, pool: KVPool, layer: int) -> _Slots:
        if not pool.num_slots:
            return cls()
        keys, values = pool.keys[layer], pool.values[layer]
        return cls(_address(keys), _address(values), keys.size(2))


class _Step(ctypes.Structure):
    """``Step`` of `cpu_kernels.c`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "heads", "kv_heads", "head_dim", "window", "stride")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("projected", "value_embedding", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("positions", "bases", "prompt_slots", "order")),
        ("own", _Slots),
        ("prompts", _Slots),
        ("out", ctypes.c_void_p),
    ]


def has_kernels(dtype: torch.dtype) -> bool:
    """Whether there are kernels for a compute dtype. Compiles them at the first call, and warns if that fails."""
    return dtype == torch.float32 and _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = _load()
        sizes, number, pointers = [ctypes.c_int64] * 2, ctypes.c_float, [ctypes.c_void_p] * 2
        library.attend.argtypes = [ctypes.POINTER(_Step), ctypes.c_int]
        library.add_and_norm.argtypes = [*sizes, number, *pointers, number, number, *pointers, ctypes.c_int]
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None)
        logger.warning(
            "generation on this CPU is slower than it could be, since its kernels cannot be compiled or loaded; "
            "install a C compiler, or name one in CC: %.500s",
            output.decode(errors="replace").strip() if output else error,
        )
        return None
    return library


def _load() -> ctypes.CDLL:
    source = resources.files("lmchat.generation").joinpath("cpu_kernels.c").read_bytes()
    compiler, errors = shlex.split(os.environ.get("CC") or "cc"), []
    for variant in VARIANTS:
        try:
            return _load_compiled([*compiler, *FLAGS, *variant], source)
        except (OSError, subprocess.CalledProcessError) as error:
            errors.append(error)
    raise errors[0]


def _load_compiled(command: list[str], source: bytes) -> ctypes.CDLL:
    # The macros tell the compiler and the instructions of this CPU: machines can share a home.
    macros = _run([*command, "-dM", "-E", "-x", "c", os.devnull])
    key = _digest(source, macros, " ".join(command).encode())
    try:
        return _load_from(_cache_folder(), key, command, source)
    except (OSError, RuntimeError):  # no home, permission or room, or a file system that is mounted noexec
        with tempfile.TemporaryDirectory() as folder:
            return _load_from(Path(folder), key, command, source)


def _cache_folder() -> Path:
    """A folder that only this user can write to, for compiled kernels."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (given if given.is_absolute() else Path.home() / ".cache") / "lmchat" / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder


def _load_from(folder: Path, key: str, command: list[str], source: bytes) -> ctypes.CDLL:
    """Loads the kernels from a file of the folder, named by its contents so that a damaged one is compiled again."""
    for path in folder.glob(f"{key}-*.so"):
        if path.is_file() and path.stem == f"{key}-{_digest(path.read_bytes())}":
            return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / "kernels.so"
        _run([*command, "-x", "c", "-", "-o", str(built), "-lm"], source)
        library = ctypes.CDLL(str(built))
        built.replace(folder / f"{key}-{_digest(built.read_bytes())}.so")
    return library


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _run(command: list[str], source: bytes | None = None) -> bytes:
    return subprocess.run(command, input=source, capture_output=True, check=True, timeout=COMPILE_SECONDS).stdout


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_cpu and tensor.is_contiguous() and tensor.dtype in (torch.float32, torch.int64)
    return tensor.data_ptr()


def _kernels() -> ctypes.CDLL:
    library = _library()
    assert library is not None
    return library


def add_and_norm(x: Tensor, added: Tensor, factor: float = 1.0, added_factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """factor · x + added_factor · added, (..., width) fp32 each, and its norm."""
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _kernels().add_and_norm(
        x.numel() // x.size(-1), x.size(-1), EPS, _address(x), _address(added), factor, added_factor,
        _address(total), _address(normed), torch.get_num_threads(),
    )  # fmt: skip
    return total, normed


def attend(
    cache: DecodeCache,
    layer: int,
    window: int,
    projected: Tensor,
    value_embedding: Tensor | None,
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    """Stores keys and values of new tokens in a layer, and attends from each to the ``window`` before it and itself.

    Args:
        cache: the rows and their pools.
        layer: index of the layer.
        window: number of tokens.
        projected: (rows, 1, n) fp32 queries, keys and values of all heads before rotation and norm, and with
            ``value_embedding`` the logits of its gates.
        value_embedding: (rows, 1, kv heads · head_dim) fp32, added to the values through the gates.
        rotary: cos and sin, (rows, 1, 1, head_dim / 2) fp32.

    Returns:
        (rows, 1, heads · head_dim) fp32.
    """
    config = cache.pool.layout.config
    rows = len(projected)
    shared = (None, None) if cache.groups is None else cache.groups.by_row
    out = projected.new_empty(rows, 1, config.n_head * config.head_dim)
    step = _Step(
        rows, config.n_head, config.n_kv_head, config.head_dim, window, projected.size(-1), EPS,
        _address(projected), _address(value_embedding), *map(_address, rotary),
        _address(cache.positions), _address(cache.base), *map(_address, shared),
        _Slots.of(cache.pool, layer), _Slots.of(cache.prompts, layer), _address(out),
    )  # fmt: skip
    _kernels().attend(step, torch.get_num_threads())
    return out
