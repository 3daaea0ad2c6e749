"""The cache's rows against a brute-force twin that keeps each row in a list."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmchat.model.attention import attend_banded
from lmchat.model.config import GPTConfig
from lmchat.model.kv_cache import KVCache
from lmchat.types import UserError

CONFIG = GPTConfig(sequence_len=8, vocab_size=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
MAX_LEN = 40


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _tokens(rows: int, length: int, generator: torch.Generator) -> list[torch.Tensor]:
    """q, k, v of some new tokens, in float64."""
    shapes = [(rows, length, heads, CONFIG.head_dim) for heads in (CONFIG.n_head, CONFIG.n_kv_head, CONFIG.n_kv_head)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


class _Twin:
    """Every row's keys and values, layer by layer, (1, tokens, kv heads, head_dim) each."""

    def __init__(self, rows: int) -> None:
        empty = torch.zeros(1, 0, CONFIG.n_kv_head, CONFIG.head_dim, dtype=torch.float64)
        self.rows = [[(empty, empty)] * CONFIG.n_layer for _ in range(rows)]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        out = []
        for row, held in enumerate(self.rows):
            keys = torch.cat((held[layer][0], k[row : row + 1]), dim=1)
            values = torch.cat((held[layer][1], v[row : row + 1]), dim=1)
            held[layer] = keys, values
            queries = torch.zeros(1, keys.size(1), *q.shape[2:], dtype=q.dtype)
            queries[:, -q.size(1) :] = q[row]
            out.append(attend_banded(queries, keys, values, window)[:, -q.size(1) :])
        return torch.cat(out)

    def cut(self, lengths: list[int]) -> None:
        for held, length in zip(self.rows, lengths, strict=True):
            held[:] = [(keys[:, :length], values[:, :length]) for keys, values in held]


def _add(cache: KVCache, twin: _Twin, length: int, generator: torch.Generator) -> None:
    """The same new tokens to both, whose attention must agree in every layer."""
    for layer, window in enumerate((3, 8)):
        q, k, v = _tokens(cache.batch_size, length, generator)
        assert torch.allclose(cache.attend(layer, q, k, v, window), twin.attend(layer, q, k, v, window), atol=1e-12)
    cache.advance(length)


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_rows_of_different_lengths(data: st.DataObject) -> None:
    """Padded prompts, then decode steps and chunks in any order."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    lengths = data.draw(st.lists(st.integers(1, 10), min_size=1, max_size=4))
    cache, twin = KVCache(CONFIG, len(lengths), MAX_LEN, torch.float64), _Twin(len(lengths))
    _add(cache, twin, max(lengths), generator)
    cache.lengths = torch.tensor(lengths)
    twin.cut(lengths)
    for length in data.draw(st.lists(st.sampled_from([1, 3]), max_size=6)):
        _add(cache, twin, length, generator)
        assert cache.lengths.tolist() == [held[0][0].size(1) for held in twin.rows]
    _add(cache, twin, 1, generator)


def test_a_full_cache_is_reported() -> None:
    cache = KVCache(CONFIG, 1, 4, torch.float64)
    with pytest.raises(UserError, match="5 tokens do not fit a KV cache of 4"):
        cache.attend(0, *_tokens(1, 5, torch.Generator()), 8)
