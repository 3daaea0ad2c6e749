"""The oracle of the engine's tests: a batch decoded from start to end, its rows leaving it as they finish.

Generation: many prompts and many samples of each in one batch over a KV cache, with the calculator at hand.

A prompt is read once for all its samples. Rows hold prompts of different lengths, draw random numbers of their own, and
leave the batch when they end. After `<|python_start|>` a row collects an expression; at `<|python_end|>` the calculator
answers, and `<|output_start|>`, the answer and `<|output_end|>` are forced on the row in place of what it would sample.
"""

from __future__ import annotations

import codecs
import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lmchat.generation.calculator import calculate
from lmchat.model.attention import attend_banded, attention, window_mask
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT, ROTARY_ROWS, Linear
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import UserError

Role = Literal["text", "python", "python_output"]


@dataclass
class Completion:
    """What was generated after a prompt.

    ids: the tokens, the stop token included where one was sampled.
    mask: per token 1 if the model sampled it, 0 if it was forced (the calculator's output).
    finished: a stop token ended it and is its last id; otherwise it was cut at `max_new_tokens`.
    logprobs: per token, its log-probability under the model's full distribution, before temperature and top-k (what a
        training pass computes); 0 where forced. Empty unless asked for.
    """

    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    finished: bool = False
    logprobs: list[float] = field(default_factory=list)

    @property
    def content(self) -> list[int]:
        """The tokens without the stop token."""
        return self.ids[:-1] if self.finished else self.ids


@dataclass(frozen=True)
class StreamedToken:
    """One token of a stream.

    text: what it adds to the text; empty for special tokens and inside a character of several tokens.
    role: prose, calculator call or calculator output; the special tokens around the latter two belong to them.
    """

    id: int
    text: str
    role: Role


class Engine:
    """Generates with a model and its tokenizer.

    The model is used as it is at each call, in eval mode and without gradients, and left as it was.

    max_rows: samples decoded together; more are decoded in turn. Bounds the memory of the KV cache.

    Raises `UserError` if the model and the tokenizer differ in vocabulary size.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, *, max_rows: int = 128) -> None:
        if tokenizer.vocab_size != model.config.vocab_size:
            raise UserError(
                f"the model has {model.config.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}; "
                "use the tokenizer the model was trained with"
            )
        if max_rows < 1:
            raise UserError(f"max_rows is {max_rows}; it must be at least 1")
        self.model = model
        self.tokenizer = tokenizer
        self.max_rows = max_rows

    @property
    def context_limit(self) -> int:
        """Tokens a prompt and its completion may have together; attention windows slide within it."""
        return ROTARY_ROWS * self.model.config.sequence_len

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = 50,
        seed: int | Sequence[int] = 42,
        stop_tokens: Collection[int] | None = None,
        calculator: bool = True,
        logprobs: bool = False,
    ) -> list[list[Completion]]:
        """`num_samples` completions of each prompt, in the order of the prompts.

        A completion depends on its prompt, the prompt's seed and its number among the samples, not on the rest of the
        batch (up to the last bits of matrix products, whose order of summation may change with the number of rows).

        Args:
            prompts: token ids, each prompt non-empty.
            max_new_tokens: per sample, forced tokens included.
            temperature: 0 for greedy decoding.
            top_k: sample from the k likeliest tokens; None for the whole vocabulary.
            seed: one for all prompts, or one per prompt. With one for all, samples of equal number draw equal random
                numbers after every prompt.
            stop_tokens: ids that end a sample; default `<|assistant_end|>` and `<|bos|>`.
            calculator: answer tool calls.
            logprobs: fill `Completion.logprobs`.

        Raises:
            UserError: an option is out of its range, a prompt is empty, holds ids outside the vocabulary or leaves no
                room for `max_new_tokens`, or the model's logits are not finite.
        """
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one for all, or one per prompt")
        if num_samples < 1:
            raise UserError(f"num_samples is {num_samples}; it must be at least 1")
        sampler = Sampler(temperature, top_k)
        rows = [
            self._row(prompt, seed, sample, max_new_tokens, stop_tokens, calculator)
            for prompt, seed in zip(self._checked(prompts, max_new_tokens), seeds, strict=True)
            for sample in range(num_samples)
        ]
        with _for_inference(self.model):
            for start in range(0, len(rows), self.max_rows):
                for _ in self._decode(rows[start : start + self.max_rows], sampler, logprobs):
                    pass
        completions = [row.completion for row in rows]
        return [completions[start : start + num_samples] for start in range(0, len(rows), num_samples)]

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = 50,
        seed: int = 42,
        stop_tokens: Collection[int] | None = None,
        calculator: bool = True,
    ) -> Iterator[StreamedToken]:
        """The first sample that `generate` gives for the prompt, token by token, its stop token included.

        Arguments and errors as in `generate`; the errors come with the call, not with the first token. The model is
        held for inference until the iterator ends or is closed.
        """
        [checked] = self._checked([prompt], max_new_tokens)
        row = self._row(checked, seed, 0, max_new_tokens, stop_tokens, calculator)
        return self._pieces(row, Sampler(temperature, top_k))

    def next_logits(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """fp32 logits (prompts, vocab_size) of the token after each prompt, before temperature and top-k.

        Raises:
            UserError: a prompt is empty, holds ids outside the vocabulary or is longer than the context limit.
        """
        checked = self._checked(prompts, max_new_tokens=1)
        batches = [checked[start : start + self.max_rows] for start in range(0, len(checked), self.max_rows)]
        with _for_inference(self.model):
            return torch.cat([self._read(batch)[1] for batch in batches])

    def _pieces(self, row: _Row, sampler: Sampler) -> Iterator[StreamedToken]:
        tokenizer = self.tokenizer
        call_start, call_end = tokenizer.special("python_start"), tokenizer.special("python_end")
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        in_call = False
        with _for_inference(self.model):
            for _ in self._decode([row], sampler, logprobs=False):
                token, forced = row.completion.ids[-1], row.completion.mask[-1] == 0
                in_call = token == call_start or (in_call and token != call_end)
                role: Role = "python_output" if forced else "python" if in_call or token == call_end else "text"
                is_special = bool(tokenizer.token_bytes[token] == 0)
                # A special token, like the end of the row, ends a character that is still incomplete.
                bytes_ = b"" if is_special else tokenizer.decode_bytes([token])
                yield StreamedToken(token, decoder.decode(bytes_, final=is_special or row.done), role)

    def _checked(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[tuple[int, ...]]:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        vocab_size, limit = self.model.config.vocab_size, self.context_limit
        checked = [tuple(map(int, prompt)) for prompt in prompts]
        for index, prompt in enumerate(checked):
            if not prompt:
                raise UserError(f"prompt {index} is empty; begin it with <|bos|>")
            if min(prompt) < 0 or max(prompt) >= vocab_size:
                raise UserError(
                    f"prompt {index} has ids {min(prompt)} to {max(prompt)}, the model's are 0 to {vocab_size - 1}; "
                    "encode it with the model's tokenizer"
                )
            if len(prompt) + max_new_tokens > limit:
                raise UserError(
                    f"prompt {index} has {len(prompt)} tokens, which with max_new_tokens {max_new_tokens} passes the "
                    f"model's limit of {limit}; shorten one of them"
                )
        return checked

    def _row(
        self,
        prompt: tuple[int, ...],
        seed: int,
        sample: int,
        max_new_tokens: int,
        stop_tokens: Collection[int] | None,
        calculator: bool,
    ) -> _Row:
        if seed < 0:
            raise UserError(f"seed is {seed}; it must not be negative")
        if stop_tokens is None:
            stop_tokens = (self.tokenizer.special("assistant_end"), self.tokenizer.bos_id)
        return _Row(
            prompt,
            sample_uniforms(seed, sample, max_new_tokens),
            frozenset(stop_tokens),
            _ToolUse(self.tokenizer) if calculator else None,
        )

    def _decode(self, rows: list[_Row], sampler: Sampler, logprobs: bool) -> Iterator[None]:
        """Complete all rows together, pausing after each new token of every row that is not done."""
        cache, logits = self._prefill(rows)
        while True:
            ids, scores = _sample(logits, rows, sampler, logprobs)
            for row, token, score in zip(rows, ids, scores, strict=True):
                row.append(token, score)
            yield
            rows = self._drop_done(cache, rows)
            if not rows:
                return
            logits = self._step(cache, rows)

    # Inference mode is per call and not around the loop: a paused generator would leave its caller in it.
    @torch.inference_mode()
    def _prefill(self, rows: list[_Row]) -> tuple[KVCache, Tensor]:
        """A cache of each row's prompt and the logits (rows, vocab) after it; each distinct prompt is read once."""
        index = {prompt: i for i, prompt in enumerate(dict.fromkeys(row.prompt for row in rows))}
        cache, logits = self._read(list(index))
        selected = torch.tensor([index[row.prompt] for row in rows])
        max_len = max(len(row.prompt) + len(row.uniforms) for row in rows)
        return cache.select(selected, max_len), logits[selected]

    @torch.inference_mode()
    def _read(self, prompts: Sequence[tuple[int, ...]]) -> tuple[KVCache, Tensor]:
        """A cache of the prompts and the logits (prompts, vocab) after each."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
        for ids, prompt in zip(padded, prompts, strict=True):
            ids[: len(prompt)] = torch.tensor(prompt)
        model = self.model
        cache = KVCache(model.config, padded.size(0), padded.size(1), model.compute_dtype, model.device)
        hidden = model.hidden(padded.to(model.device), cache.expect(padded.size(1)))
        cache.lengths = lengths
        return cache, model.logits(hidden[torch.arange(len(prompts)), lengths - 1])

    @torch.inference_mode()
    def _drop_done(self, cache: KVCache, rows: list[_Row]) -> list[_Row]:
        """The rows that go on, in the order the cache then holds them."""
        done = [index for index, row in enumerate(rows) if row.done]
        return [rows[index] for index in cache.drop(done)] if done else rows

    @torch.inference_mode()
    def _step(self, cache: KVCache, rows: list[_Row]) -> Tensor:
        """Logits (rows, vocab) after each row's newest token."""
        tokens = torch.tensor([row.completion.ids[-1] for row in rows]).to(cache.keys.device, non_blocking=True)
        return self.model(tokens[:, None], cache.expect(1))[:, -1]


@torch.inference_mode()
def _sample(
    logits: Tensor, rows: list[_Row], sampler: Sampler, logprobs: bool
) -> tuple[list[int], list[float] | list[None]]:
    """A token for each row, and its log-probability if asked for."""
    uniforms = torch.tensor([row.uniform for row in rows], dtype=torch.float64)
    chosen = sampler(logits, uniforms.to(logits.device, non_blocking=True))
    ids = chosen.tolist()
    if min(ids) < 0:
        raise UserError("the model's logits are not finite; its training diverged or its checkpoint is damaged")
    if not logprobs:
        return ids, [None] * len(ids)
    return ids, logits.log_softmax(dim=-1).gather(-1, chosen[:, None]).squeeze(-1).tolist()


class _ToolUse:
    """Follows one row's sampled tokens, and holds those that are forced on it next."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.start = tokenizer.special("python_start")
        self.end = tokenizer.special("python_end")
        self.call: list[int] | None = None
        self.forced: deque[int] = deque()

    def next_forced(self) -> int | None:
        """The token to take in place of the sampled one, if any."""
        return self.forced.popleft() if self.forced else None

    def observe(self, token: int) -> None:
        """A start within a call begins the call anew; a call without a value is left without an answer."""
        if token == self.start:
            self.call = []
        elif self.call is not None and token == self.end:
            self._answer(self.call)
            self.call = None
        elif self.call is not None:
            self.call.append(token)

    def _answer(self, call: list[int]) -> None:
        result = calculate(self.tokenizer.decode(call))
        if result is not None:
            special, encode = self.tokenizer.special, self.tokenizer.encode
            self.forced.extend((special("output_start"), *encode(result), special("output_end")))


@dataclass(eq=False)
class _Row:
    """One sample on its way."""

    prompt: tuple[int, ...]
    uniforms: npt.NDArray[np.float64]
    """One random number per token it may have."""
    stop_tokens: frozenset[int]
    tool: _ToolUse | None
    completion: Completion = field(default_factory=Completion)

    @property
    def uniform(self) -> float:
        """The random number of the next token."""
        return self.uniforms[len(self.completion.ids)]

    @property
    def done(self) -> bool:
        """Stopped, or out of tokens."""
        return self.completion.finished or len(self.completion.ids) == len(self.uniforms)

    def append(self, sampled: int, logprob: float | None) -> None:
        """Take the sampled token, or the one that is forced in its place."""
        completion = self.completion
        forced = self.tool.next_forced() if self.tool else None
        completion.ids.append(sampled if forced is None else forced)
        completion.mask.append(1 if forced is None else 0)
        if forced is None:
            completion.finished = sampled in self.stop_tokens
            if self.tool:
                self.tool.observe(sampled)
        if logprob is not None:
            completion.logprobs.append(logprob if forced is None else 0.0)


@contextmanager
def _for_inference(model: GPT) -> Iterator[None]:
    """The model in eval mode with its matrices cast to the compute dtype once; after it, as it was."""
    training = model.training
    linears = [m for m in model.modules() if isinstance(m, Linear) and m.weight.dtype != model.compute_dtype]
    masters = [linear.weight for linear in linears]
    try:
        model.eval()
        for linear, master in zip(linears, masters, strict=True):
            linear.weight = nn.Parameter(master.detach().to(model.compute_dtype), requires_grad=False)
        yield
    finally:
        for linear, master in zip(linears, masters, strict=True):
            linear.weight = master
        model.train(training)


def sample_uniforms(seed: int, sample: int, count: int) -> npt.NDArray[np.float64]:
    """(count,) random numbers in [0, 1), one per token of sample number `sample` of a prompt with this seed.

    They depend on nothing else, and a larger count only adds to their end: whoever shares the batch and however long it
    runs, the same sample draws the same numbers. Each (seed, sample) has its own PCG64 stream.
    """
    return np.random.Generator(np.random.PCG64((seed, sample))).random(count)


@dataclass(frozen=True)
class Sampler:
    """Temperature and top-k sampling by inversion of the cumulative distribution.

    temperature: divides the logits; 0 takes the likeliest token.
    top_k: the softmax runs over the k largest logits only; None for all.

    Raises `UserError` for a negative or non-finite temperature and for top_k below 1.
    """

    temperature: float = 1.0
    top_k: int | None = 50

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}; give 0 for the likeliest token, or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; give at least 1, or null to sample from the whole vocabulary")

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Token ids (B,) for logits (B, vocab) and one number in [0, 1) per row (B,); -1 where logits are not finite.

        In float64, so that the tail of a large vocabulary keeps its share.
        """
        if self.temperature == 0 or self.top_k == 1:
            best, ids = logits.max(dim=-1)
            return ids.masked_fill(~best.isfinite(), -1)
        candidates: Tensor | None = None
        if self.top_k is not None and self.top_k < logits.size(-1):
            logits, candidates = logits.topk(self.top_k, dim=-1)
        best = logits.amax(dim=-1, keepdim=True).double()
        cumulative = ((logits - best) / self.temperature).exp().cumsum(dim=-1)
        threshold = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
        # Rounding may carry a threshold next to the total up to it.
        choice = (cumulative <= threshold).sum(dim=-1, keepdim=True).clamp(max=logits.size(-1) - 1)
        chosen = choice if candidates is None else candidates.gather(-1, choice)
        return chosen.masked_fill(~best.isfinite(), -1).squeeze(-1)


class KVCache:
    """Keys and values of every layer for a batch of rows, each row at its own position.

    Prefill by calling the model on (B, T) ids, then decode by calling it on (B, 1). Prompts of different lengths are
    padded on the right and prefilled together; setting `lengths` to the true ones afterwards makes the next tokens
    overwrite the padding. `select` repeats, drops or reorders rows: a prompt is prefilled once for all its samples.

    lengths: (B,) int64 on the host, tokens held per row; on the host so that no step waits for the device.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.n_layer, batch_size, config.n_kv_head, max_len, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64)
        self._incoming: _Incoming | None = None

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.keys.size(1)

    @property
    def max_len(self) -> int:
        """Tokens a row can hold."""
        return self.keys.size(3)

    @property
    def longest(self) -> int:
        """Tokens in the fullest row."""
        return int(self.lengths.max())

    @property
    def positions(self) -> Tensor:
        """(B, T) positions of the expected tokens of each row, on the cache's device."""
        assert self._incoming is not None
        return self._incoming.positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Add the new tokens' k and v (B, T, kv heads, head_dim), return q's attention over all that is held."""
        incoming = self._incoming
        assert incoming is not None
        if layer == len(self.keys) - 1:
            self.lengths, self._incoming = self.lengths + q.size(1), None
        self.keys[layer][incoming.rows, :, incoming.positions] = k
        self.values[layer][incoming.rows, :, incoming.positions] = v
        if incoming.end == q.size(1):
            return attend_banded(q, k, v, window)
        start, mask = incoming.visible(window)
        keys = self.keys[layer, :, :, start : incoming.end].transpose(1, 2)
        values = self.values[layer, :, :, start : incoming.end].transpose(1, 2)
        return attention(q, keys, values, mask)

    def expect(self, length: int) -> KVCache:
        """The cache, for a model call with `length` more tokens in every row."""
        if (end := self.longest + length) > self.max_len:
            raise UserError(f"{end} tokens do not fit a KV cache of {self.max_len}; make max_len larger")
        self._incoming = _Incoming(self.lengths, length, self.keys.device)
        return self

    def select(self, rows: Sequence[int] | Tensor, max_len: int | None = None) -> KVCache:
        """A new cache of the given rows, in that order, repeats allowed, with room for `max_len` tokens."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        selected = object.__new__(KVCache)
        selected.lengths = self.lengths[rows.cpu()]
        selected._incoming = None
        selected.keys = _select(self.keys, rows, selected.longest, max_len or self.max_len)
        selected.values = _select(self.values, rows, selected.longest, max_len or self.max_len)
        return selected

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Remove the given rows in place; the last rows move into their places, so that the cost is that of the gaps.

        Returns, for each row now held, the index it had.
        """
        dropped = set(rows)
        kept = self.batch_size - len(dropped)
        order = list(range(kept))
        gaps = [row for row in order if row in dropped]
        moved = [row for row in range(kept, self.batch_size) if row not in dropped]
        if moved:
            length = self.longest
            for held in (self.keys, self.values):
                held[:, gaps, :, :length] = held[:, moved, :, :length]
            self.lengths[gaps] = self.lengths[moved]
        for gap, row in zip(gaps, moved, strict=True):
            order[gap] = row
        self.keys, self.values, self.lengths = self.keys[:, :kept], self.values[:, :kept], self.lengths[:kept]
        return order


class _Incoming:
    """Where the tokens of one model call go and what they see, which all layers share.

    positions: (B, T). rows: (B, 1), to index with positions. end: positions held once they are in.
    """

    def __init__(self, lengths: Tensor, length: int, device: torch.device) -> None:
        self.positions = (lengths[:, None] + torch.arange(length)).to(device, non_blocking=True)
        self.rows = torch.arange(len(lengths), device=device)[:, None]
        self.first = int(lengths.min())
        self.end = int(lengths.max()) + length
        self._visible: dict[int, tuple[int, Tensor]] = {}

    def visible(self, window: int) -> tuple[int, Tensor]:
        """The first position any row sees, and which from there to `end` each token sees: (B, 1, T, positions)."""
        if window not in self._visible:
            start = max(0, self.first - window)
            held = torch.arange(start, self.end, device=self.positions.device)
            self._visible[window] = start, window_mask(self.positions, held, window)[:, None]
        return self._visible[window]


def _select(held: Tensor, rows: Tensor, length: int, max_len: int) -> Tensor:
    layers, _, heads, _, head_dim = held.shape
    out = held.new_zeros(layers, len(rows), heads, max_len, head_dim)
    out[:, :, :, :length] = held[:, rows.to(held.device), :, :length]
    return out
