"""The kernels for CPUs: against formulas in fp64, and how they are compiled."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from live_server import tiny_engine
from lmchat.generation import cpu_kernels
from lmchat.generation.cached_attention import DecodeCache, Groups
from lmchat.generation.cpu_kernels import add_and_norm, attend, has_kernels
from lmchat.generation.engine import Engine
from lmchat.generation.kv_pool import KVPool, SlotLayout
from lmchat.generation.packed import can_pack
from lmchat.generation.sampling import SamplingParams
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import norm, rotate

compiled = pytest.mark.skipif(not has_kernels(torch.float32), reason="no C compiler on this machine")


@compiled
@pytest.mark.parametrize("width", [1, 5, 16, 33, 256])
@pytest.mark.parametrize("scale", [0, 1e-6, 1e-3, 1, 1e6])
def test_sum_and_its_norm(width: int, scale: float) -> None:
    torch.manual_seed(width)
    x, added = torch.randn(7, 1, width) * scale, torch.randn(7, 1, width) * scale
    total, normed = add_and_norm(x, added, 0.75, -1.5)
    expected = 0.75 * x.double() - 1.5 * added.double()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(normed, norm(expected.float()), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(add_and_norm(x[i : i + 1], added[i : i + 1], 0.75, -1.5)[1][0], normed[i]) for i in range(7))


@dataclass
class Case:
    """Rows with contexts of different lengths; the first half of them share two prompts."""

    config: GPTConfig
    contexts: list[tuple[Tensor, Tensor]]
    """Keys and values of each row's earlier tokens, (length, kv heads, head_dim)."""
    shared: list[int]
    """Tokens of each row's shared prompt."""
    prompts: list[int]
    """Slot of each row's shared prompt."""
    projected: Tensor
    value_embedding: Tensor | None
    rotary: tuple[Tensor, Tensor]

    @torch.inference_mode()
    def run(self, rows: list[int], sharing: bool = True) -> tuple[Tensor, KVPool]:
        """The kernel's attention for these rows, from pools filled column by column."""
        layout = SlotLayout(self.config, torch.float32)
        pool, prompts = KVPool(layout, torch.device("cpu")), KVPool(layout, torch.device("cpu"))
        pool.resize(len(rows), 300)
        prompts.resize(2, 300)
        bases = [self.shared[row] if sharing else 0 for row in rows]
        for slot, (row, base) in enumerate(zip(rows, bases, strict=True)):
            for token, (key, value) in enumerate(zip(*self.contexts[row], strict=True)):
                to, place, number = (pool, slot, token - base) if token >= base else (prompts, self.prompts[row], token)
                column = number % to.keys[0].size(2)
                to.keys[0][place, :, column], to.values[0][place, :, column] = key, value
        picked = torch.tensor(rows)
        positions = torch.tensor([len(self.contexts[row][0]) for row in rows])
        slots = torch.tensor([self.prompts[row] for row in rows])
        kv_heads = self.config.n_kv_head
        groups = Groups(torch.zeros(2, kv_heads, 1), slots.repeat_interleave(kv_heads) * kv_heads, 300)
        cache = DecodeCache(pool, prompts, positions, torch.tensor(bases), 300, groups if any(bases) else None)
        embedding = None if self.value_embedding is None else self.value_embedding[picked]
        cos, sin = self.rotary
        window = self.config.window_sizes[0]
        return attend(cache, 0, window, self.projected[picked], embedding, (cos[picked], sin[picked])), pool

    def expected(self, row: int) -> Tensor:
        """(heads, head_dim) fp64, by the definition."""
        config = self.config
        per_head = config.n_head // config.n_kv_head
        sizes = [config.n_embd, *[config.n_kv_head * config.head_dim] * 2]
        projected = self.projected[row].double()
        q, k, v = (
            part.view(1, 1, -1, config.head_dim) for part in projected[..., : sum(sizes)].split_with_sizes(sizes, -1)
        )
        cos, sin = (table[row : row + 1].double() for table in self.rotary)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        if self.value_embedding is not None:
            gate = 2 * projected[0, sum(sizes) :].sigmoid()
            v = v + gate[:, None] * self.value_embedding[row].double().view_as(v)
        keys, values = (
            torch.cat((held.double(), new[0]))[-config.window_sizes[0] - 1 :].repeat_interleave(per_head, dim=1)
            for held, new in zip(self.contexts[row], (k, v), strict=True)
        )
        weights = torch.einsum("hd,thd->ht", q[0, 0], keys).div(config.head_dim**0.5).softmax(-1)
        return torch.einsum("ht,thd->hd", weights, values)


def _case(head_dim: int, heads: int, kv_heads: int, pattern: str, gated: bool) -> Case:
    generator = torch.Generator().manual_seed(head_dim + heads)
    config = GPTConfig(
        sequence_len=128, vocab_size=64, n_layer=2, n_head=heads, n_kv_head=kv_heads, n_embd=heads * head_dim,
        window_pattern=pattern,
    )  # fmt: skip

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    lengths, shared, prompts = (
        [150, 90, 200, 31, 0, 1, 260, 64, 63],
        [90, 90, 30, 30, 0, 0, 0, 0, 0],
        [0, 0, 1, 1] + [0] * 5,
    )
    common = [(numbers(length, kv_heads, head_dim), numbers(length, kv_heads, head_dim)) for length in (90, 30)]
    contexts = []
    for length, base, prompt in zip(lengths, shared, prompts, strict=True):
        own = numbers(length - base, kv_heads, head_dim), numbers(length - base, kv_heads, head_dim)
        contexts.append((torch.cat((common[prompt][0][:base], own[0])), torch.cat((common[prompt][1][:base], own[1]))))
    rows, kv_width = len(lengths), kv_heads * head_dim
    angles = numbers(rows, 1, 1, head_dim // 2)
    return Case(
        config, contexts, shared, prompts, numbers(rows, 1, config.n_embd + 2 * kv_width + gated * kv_heads),
        numbers(rows, 1, kv_width) if gated else None, (angles.cos(), angles.sin()),
    )  # fmt: skip


@compiled
@pytest.mark.parametrize("pattern", ["S", "L"])
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "gated"), [(32, 2, 2, True), (10, 4, 2, False), (128, 3, 1, True)]
)
def test_attention_is_its_definition(head_dim: int, heads: int, kv_heads: int, gated: bool, pattern: str) -> None:
    case = _case(head_dim, heads, kv_heads, pattern, gated)
    every = list(range(len(case.contexts)))
    out, pool = case.run(every)
    for row in every:
        torch.testing.assert_close(out[row].view(heads, -1).double(), case.expected(row), rtol=1e-4, atol=1e-5)
    # The new key and value are where the next token looks for them.
    place = (len(case.contexts[6][0])) % pool.keys[0].size(2)
    assert pool.keys[0][6, :, place].square().mean().item() == pytest.approx(1, rel=1e-3)


@compiled
def test_a_row_does_not_depend_on_others_threads_or_sharing() -> None:
    case = _case(32, 2, 1, "S", True)
    every = list(range(len(case.contexts)))
    out, _ = case.run(every)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(case.run(every)[0], out)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(case.run(every[::-1])[0], out.flip(0))
    assert torch.equal(case.run(every, sharing=False)[0], out)
    for row in every:
        assert torch.equal(case.run([row])[0][0], out[row])


# ---------------------------------------------------------------------------------------------------------------------
# Compilation


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a process that has not loaded the kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_kernels._library.cache_clear()
    yield tmp_path / "lmchat" / "kernels"
    cpu_kernels._library.cache_clear()


@compiled
def test_kernels_are_compiled_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_kernels(torch.float32) and not has_kernels(torch.bfloat16)
    [library] = fresh.iterdir()
    before = library.stat().st_mtime_ns
    commands: list[list[str]] = []
    run = cpu_kernels._run
    monkeypatch.setattr(cpu_kernels, "_run", lambda command, *rest: commands.append(command) or run(command, *rest))
    cpu_kernels._library.cache_clear()
    assert has_kernels(torch.float32)
    assert library.stat().st_mtime_ns == before and ["-E" in command for command in commands] == [True]


@compiled
def test_kernels_work_without_a_cache(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh.parent.write_text("a file where the folder would be")
    assert has_kernels(torch.float32)
    cpu_kernels._library.cache_clear()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", _no_home)
    assert has_kernels(torch.float32)


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@compiled
@pytest.mark.parametrize("damage", ["empty", "truncated", "folder"])
def test_damaged_kernels_are_compiled_again(fresh: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    assert has_kernels(torch.float32)
    [library] = fresh.iterdir()
    content = library.read_bytes()
    library.unlink()
    if damage == "folder":
        library.mkdir()
    else:
        library.write_bytes(content[: 0 if damage == "empty" else len(content) // 2])
    cpu_kernels._library.cache_clear()
    assert has_kernels(torch.float32) and not caplog.messages
    assert damage == "folder" or library.read_bytes() == content


@compiled
def test_the_compiler_can_have_arguments(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{os.environ.get('CC') or 'cc'} -O1")
    assert has_kernels(torch.float32)


@compiled
def test_a_compiler_without_openmp(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Apple's compiler refuses ``-fopenmp``: the kernels then run on one thread, with the same results."""
    x, added = torch.randn(2, 9, 96).unbind()
    expected = cpu_kernels.add_and_norm(x, added)
    compiler = tmp_path / "apple-cc"
    refusal = "echo \"unsupported option '-fopenmp'\" >&2; exit 1"
    usual = os.environ.get("CC") or "cc"
    compiler.write_text(f'#!/bin/sh\nfor flag; do [ "$flag" != -fopenmp ] || {{ {refusal}; }}; done\n{usual} "$@"\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(compiler))
    cpu_kernels._library.cache_clear()
    for actual, wanted in zip(cpu_kernels.add_and_norm(x, added), expected, strict=True):
        assert torch.equal(actual, wanted)
    assert not all(b"GOMP" in library.read_bytes() for library in fresh.iterdir())


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    engine = tiny_engine()
    params = SamplingParams(max_new_tokens=20, stop_tokens=())
    expected = engine.generate([[1, 2, 3]], params)
    torch.set_default_dtype(dtype)
    try:
        assert engine.generate([[1, 2, 3]], params) == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="kernels are used with packed products")
def test_without_a_compiler_a_warning_and_equal_answers(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    params = SamplingParams(num_samples=3, max_new_tokens=40, stop_tokens=())
    prompts = [[1, 2, 3], [1, 2, 3, 4, 5, 6]]

    def answers() -> list[list[list[int]]]:
        engine: Engine = tiny_engine()
        return [[sample.ids for sample in samples] for samples in engine.generate(prompts, params)]

    expected = answers()
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such instruction >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    for compiler, told in ((tmp_path / "missing", "No such file"), (broken, "no such instruction")):
        monkeypatch.setenv("CC", str(compiler))
        cpu_kernels._library.cache_clear()
        with caplog.at_level(logging.WARNING):
            assert answers() == expected
        assert sum("install a C compiler" in message and told in message for message in caplog.messages) == 1
        caplog.clear()
