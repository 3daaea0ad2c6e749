"""The engine compared with recorded runs of the reference and full forward passes, and with a scripted model."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lmchat.generation import weights
from lmchat.generation.cached_attention import Chunk, DecodeCache, PrefillCache
from lmchat.generation.engine import Engine
from lmchat.generation.packed import PackedLinear, can_pack
from lmchat.generation.sampling import SamplingParams
from lmchat.generation.sequence import Completion, StreamedToken
from lmchat.generation.weights import InferenceWeights
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import UserError
from random_weights import with_random_weights

TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)})
"""Single bytes, then the special tokens from 256 on."""

BOS, ASSISTANT_END, PYTHON_START, PYTHON_END, OUTPUT_START, OUTPUT_END = (
    TOKENIZER.special(name)
    for name in ("bos", "assistant_end", "python_start", "python_end", "output_start", "output_end")
)


def _model(compute_dtype: torch.dtype = torch.float64, seed: int = 0) -> GPT:
    """A model with random, non-zero weights and short windows, in float64 to avoid ties by rounding."""
    config = GPTConfig(
        sequence_len=32,
        vocab_size=TOKENIZER.vocab_size,
        n_layer=3,
        n_head=4,
        n_kv_head=2,
        n_embd=64,
        window_pattern="SL",
    )
    return with_random_weights(GPT(config, compute_dtype=compute_dtype), 0.15, embeddings=1.0, vectors=1.0, seed=seed)


def _prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[BOS, *rng.integers(0, 256, length - 1).tolist()] for length in lengths]


def _generate(engine: Engine, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[Completion]]:
    """`Engine.generate` with sampling parameters by name; a list of seeds gives one to each prompt."""
    seeds = options.pop("seed", 42)
    if isinstance(seeds, int):
        return engine.generate(prompts, SamplingParams(seed=seeds, **options))
    return engine.generate(prompts, [SamplingParams(seed=seed, **options) for seed in seeds])


def _stream(engine: Engine, prompt: Sequence[int], **options: Any) -> Iterator[StreamedToken]:
    return engine.stream(prompt, SamplingParams(**options))


def _greedy_without_cache(model: GPT, prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


# ---------------------------------------------------------------------------------------------------------------------
# Cached decoding equals the full forward pass


def test_greedy_equals_the_full_forward_pass() -> None:
    """Prompts of many lengths in one batch, far beyond the windows."""
    model = _model()
    prompts = _prompts(1, 7, 32, 33, 90)
    completions = _generate(
        Engine(model, TOKENIZER), prompts, max_new_tokens=40, temperature=0, stop_tokens=(), calculator=False
    )
    for prompt, [completion] in zip(prompts, completions, strict=True):
        assert completion.ids == _greedy_without_cache(model, prompt, 40)
        assert completion.mask == [1] * 40
        assert not completion.finished


@pytest.mark.parametrize(("compute_dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_logprobs_equal_the_full_forward_pass(compute_dtype: torch.dtype, tolerance: float) -> None:
    model = _model(compute_dtype)
    prompts = _prompts(3, 40)
    completions = _generate(
        Engine(model, TOKENIZER),
        prompts,
        num_samples=3,
        max_new_tokens=50,
        temperature=1.3,
        top_k=None,
        stop_tokens=(),
        logprobs=True,
    )
    for prompt, samples in zip(prompts, completions, strict=True):
        for sample in samples:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + sample.ids]))[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(sample.ids)[:, None]).squeeze(-1)
            sampled = torch.tensor(sample.mask) == 1
            assert sampled.any()
            assert torch.allclose(
                torch.tensor(sample.logprobs).to(expected)[sampled], expected[sampled], atol=tolerance
            )
            assert not torch.tensor(sample.logprobs)[~sampled].any()


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_casting_weights_once_changes_nothing(compute_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inference copy compared with a model that casts at every use; packed products sum in another order."""
    model, [prompt] = _model(compute_dtype), _prompts(50)
    ids, cache = torch.tensor([prompt]), PrefillCache([Chunk(None, 0, 0, 50)], model.device)
    with torch.no_grad():
        expected = model(ids)
        packed = InferenceWeights(model).net(ids, cache)
        monkeypatch.setattr(weights, "can_pack", lambda *_: False)
        plain = InferenceWeights(model).net(ids, cache)
    assert torch.equal(plain, expected)
    assert torch.allclose(packed, expected, atol=1e-4 if compute_dtype == torch.float32 else 0.5)


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="no packed products on this machine")
def test_a_row_of_a_matrix_product_does_not_depend_on_other_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    for width in (32, 96, 256):
        layer = PackedLinear(torch.float32)
        layer.pack(torch.randn(321, width, generator=generator))
        x = torch.randn(200, width, generator=generator)
        with torch.inference_mode():
            together = layer(x)
            for start, count in ((0, 1), (7, 1), (3, 2), (50, 5), (9, 16), (1, 33), (72, 128)):
                assert torch.equal(layer(x[start : start + count]), together[start : start + count])


class _AnyTokenizer:
    """Mock tokenizer of an oracle model, whose vocabulary has no special tokens."""

    bos_id = -3

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def special(self, name: str) -> int:
        return -3


@pytest.mark.parametrize("name", ["kv2", "l5"])
def test_reference_continuations(oracles: Path, name: str) -> None:
    config = GPTConfig(**json.loads((oracles / "c05_gpt.json").read_text())[name]["config"])
    arrays = np.load(oracles / f"c05_gpt_{name}.npz")
    model = GPT(config)
    model.load_state_dict({key[2:]: torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith("w/")})
    runs = json.loads((oracles / "c11_engine.json").read_text())
    runs = {key: run for key, run in runs.items() if key.startswith(f"{name}_")}
    prompts = [arrays["ids"][0, : run["prompt_length"]].tolist() for run in runs.values()]

    completions = _generate(
        Engine(model, cast(Tokenizer, _AnyTokenizer(config.vocab_size))),
        prompts,
        num_samples=2,
        max_new_tokens=64,
        temperature=0,
        stop_tokens=(),
        calculator=False,
        logprobs=True,
    )

    for (key, run), prompt, samples in zip(runs.items(), prompts, completions, strict=True):
        logits = torch.from_numpy(np.load(oracles / f"c11_logits_{key}.npz")["logits_after_prompt_and_8_decodes"])
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(run["generated"][:9])[:, None]).squeeze(-1)
        for sample in samples:
            assert sample.ids == run["generated"]
            assert [0] * len(prompt) + sample.mask == run["mask"]
            assert torch.allclose(torch.tensor(sample.logprobs[:9]), expected, atol=2e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Samples do not depend on the rest of the batch


def test_a_sample_does_not_depend_on_the_batch() -> None:
    model = _model()
    prompts = _prompts(4, 21, 11, 60, 5)
    seeds = [3, 1, 4, 1, 5]
    options: dict[str, Any] = {"max_new_tokens": 20, "top_k": 20, "stop_tokens": range(12)}
    engine = Engine(model, TOKENIZER)
    together = _generate(engine, prompts, num_samples=4, seed=seeds, **options)
    assert len({len(sample.ids) for samples in together for sample in samples}) > 4, "rows should end at many lengths"

    reverse = _generate(engine, prompts[::-1], num_samples=4, seed=seeds[::-1], **options)
    assert reverse[::-1] == together
    in_turn = _generate(Engine(model, TOKENIZER, max_rows=3), prompts, num_samples=4, seed=seeds, **options)
    assert in_turn == together
    for prompt, seed, samples in zip(prompts, seeds, together, strict=True):
        assert _generate(engine, [prompt], num_samples=2, seed=seed, **options) == [samples[:2]]


def test_a_larger_token_limit_only_extends_a_sample() -> None:
    engine, prompts = Engine(_model(), TOKENIZER), _prompts(8)
    [[short]] = _generate(engine, prompts, max_new_tokens=10, stop_tokens=())
    [[long]] = _generate(engine, prompts, max_new_tokens=30, stop_tokens=())
    assert long.ids[:10] == short.ids


def test_seeds_and_samples_differ() -> None:
    engine, [prompt] = Engine(_model(), TOKENIZER), _prompts(8)
    first, second = (_generate(engine, [prompt], num_samples=8, max_new_tokens=12, seed=seed)[0] for seed in (0, 1))
    assert len({tuple(sample.ids) for sample in first + second}) == 16


def test_first_tokens_follow_the_model() -> None:
    model, [prompt] = _model(), _prompts(8)
    [samples] = _generate(
        Engine(model, TOKENIZER, max_rows=4000),
        [prompt],
        num_samples=4000,
        max_new_tokens=1,
        top_k=4,
        temperature=2.0,
        stop_tokens=(),
        calculator=False,
    )
    with torch.no_grad():
        values, ids = model(torch.tensor([prompt]))[0, -1].topk(4)
    observed = np.bincount([sample.ids[0] for sample in samples], minlength=265)[ids] / 4000
    assert observed.sum() == 1
    assert np.abs(observed - (values / 2).softmax(-1).numpy()).max() < 0.03


# ---------------------------------------------------------------------------------------------------------------------
# Tool use, with a model that follows a script


class _ScriptedModel(nn.Module):
    """Generates ``scripts[i][step]`` after a prompt that ends in i, then stops; records the rows of each decode step.

    The number of the script is stored in the KV pool, so a row that moves must move its slot too.
    """

    def __init__(self, scripts: Sequence[Sequence[int]], prompt_length: int) -> None:
        super().__init__()
        self.config = GPTConfig(
            sequence_len=64, vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=32
        )
        self.scripts, self.prompt_length = scripts, prompt_length
        self.prefilled: list[int] = []
        self.decoded: list[int] = []

    def hidden(self, ids: Tensor, kv_cache: PrefillCache | DecodeCache) -> Tensor:
        if isinstance(kv_cache, PrefillCache):
            self.prefilled.append(ids.size(1))
            return ids
        self.decoded.append(len(ids))
        held = kv_cache.pool.keys[0][: len(ids), 0, 0, 0]
        steps = kv_cache.positions[:, 0] - (self.prompt_length - 1)
        held.copy_(torch.where(steps == 0, ids[:, 0].float(), held))
        return torch.stack((held.long(), steps), dim=-1)[:, None]

    def lm_head(self, hidden: Tensor) -> Tensor:
        says = [(*self.scripts[n], *[ASSISTANT_END] * 99)[step] for n, step in hidden.tolist()]
        return nn.functional.one_hot(torch.tensor(says), self.config.padded_vocab_size) * 10.0


def _scripted_engine(model: _ScriptedModel) -> Engine:
    """An engine whose runner runs the scripted model."""
    engine = Engine(GPT(model.config), TOKENIZER)
    engine.runner.net = cast(GPT, model)
    return engine


def _run_scripts(scripts: Sequence[Sequence[int]], **options: Any) -> tuple[list[Completion], _ScriptedModel]:
    model = _ScriptedModel(scripts, prompt_length=3)
    prompts = [[BOS, 65, number] for number in range(len(scripts))]
    engine = _scripted_engine(model)
    return [samples[0] for samples in _generate(engine, prompts, temperature=0, **options)], model


def _tool_cases(fixtures: Path) -> dict[str, Any]:
    return json.loads((fixtures / "engine.json").read_text())["tool_use"]


def test_tool_use_as_the_reference(fixtures: Path) -> None:
    """Each recorded case, its rows in one batch; lmchat also returns the stop token."""
    for name, case in _tool_cases(fixtures).items():
        scripts = list(zip(*case["sampled_by_step"], strict=True))
        completions, _ = _run_scripts(scripts, max_new_tokens=case["max_tokens"])
        for row, completion in enumerate(completions):
            ids, mask = case["batch_tokens"][row][3:], case["batch_masks"][row][3:]
            assert completion.content == ids, name
            assert completion.mask[: len(ids)] == mask, name
            columns = [column[row] for column in case["columns"]]
            assert completion.ids == columns[: len(completion.ids)], name
            assert completion.mask == [column[row] for column in case["column_masks"]][: len(completion.ids)], name
            assert completion.finished == (len(completion.ids) > len(ids)) == (name != "max_tokens_cut_in_forced")
            if completion.finished:
                assert completion.ids[-1] in (ASSISTANT_END, BOS)
                assert completion.mask[-1] == 1


def test_tool_use_of_all_cases_in_one_batch(fixtures: Path) -> None:
    cases = [case for case in _tool_cases(fixtures).values() if case["max_tokens"] >= 20]
    scripts = [script for case in cases for script in zip(*case["sampled_by_step"], strict=True)]
    expected = [tokens[3:] for case in cases for tokens in case["batch_tokens"]]
    completions, model = _run_scripts(scripts, max_new_tokens=60)
    assert [completion.content for completion in completions] == expected
    # Every row is decoded until it ends, after one prefill of all prompts without their last tokens.
    assert model.prefilled == [2 * len(scripts)]
    lengths = [len(completion.ids) for completion in completions]
    assert model.decoded == [sum(n > step for n in lengths) for step in range(max(lengths))]


def _script(text: str) -> list[int]:
    marks = {"<": PYTHON_START, ">": PYTHON_END, "[": OUTPUT_START, "]": OUTPUT_END, "|": ASSISTANT_END}
    return [marks.get(character, ord(character)) for character in text]


@pytest.mark.parametrize(
    ("says", "becomes"),
    [
        ("<2*3>.....ok|", "<2*3>[6]..ok|"),
        ("<1,000*2>......|", "<1,000*2>[2000]|"),
        ("<1/0>ok|", "<1/0>ok|"),
        ("<()>ok|", "<()>ok|"),
        ("<>ok|", "<>ok|"),
        ("<9*9>....<1+1>...|", "<9*9>[81]<1+1>[2]|"),
        ("[7]<1+1>...|", "[7]<1+1>[2]|"),  # output tokens that the model samples itself
        ("<'a,b'.count(',')>...|", "<'a,b'.count(',')>[1]|"),
    ],
)
def test_calculator_calls_and_results(says: str, becomes: str) -> None:
    [completion], _ = _run_scripts([_script(says)], max_new_tokens=60)
    # A forced token replaces the script's token of that step.
    assert completion.ids == _script(becomes)
    forced = [token for token, sampled in zip(completion.ids, completion.mask, strict=True) if not sampled]
    assert len(forced) == sum(a != b for a, b in zip(says, becomes, strict=True))


def test_without_the_calculator_no_token_is_forced() -> None:
    [completion], _ = _run_scripts([_script("<2*3>ok|")], max_new_tokens=20, calculator=False)
    assert completion.ids == _script("<2*3>ok|")
    assert completion.mask == [1] * 8


def test_custom_stop_tokens() -> None:
    [completion], _ = _run_scripts([_script("ab.cd|")], max_new_tokens=20, stop_tokens=[ord(".")])
    assert (completion.ids, completion.finished) == (_script("ab."), True)
    [completion], _ = _run_scripts([_script("ab|")], max_new_tokens=5, stop_tokens=[])
    assert (completion.ids, completion.finished) == (_script("ab|||"), False)


def test_each_prompt_is_prefilled_once() -> None:
    model = _ScriptedModel([_script("abc|"), _script("de|")], prompt_length=3)
    engine = _scripted_engine(model)
    [first, second, again] = _generate(
        engine, [[BOS, 65, 0], [BOS, 65, 1], [BOS, 65, 0]], num_samples=5, max_new_tokens=9, temperature=0
    )
    assert model.prefilled == [2 + 2]
    assert model.decoded == [15, 15, 15, 10]
    assert [sample.ids for sample in first + again] == [_script("abc|")] * 10
    assert [sample.ids for sample in second] == [_script("de|")] * 5


# ---------------------------------------------------------------------------------------------------------------------
# Streaming


def test_stream_equals_generate() -> None:
    engine, [prompt] = Engine(_model(), TOKENIZER), _prompts(12)
    options: dict[str, Any] = {"max_new_tokens": 60, "top_k": 30, "seed": 9}
    [[completion]] = _generate(engine, [prompt], **options)
    pieces = list(_stream(engine, prompt, **options))
    assert [piece.id for piece in pieces] == completion.ids
    ordinary = [token for token in completion.ids if token < 256]
    if len(ordinary) == len(completion.ids):
        assert "".join(piece.text for piece in pieces) == TOKENIZER.decode(ordinary)


def _stream_script(script: list[int], **options: Any) -> list[tuple[str, str]]:
    """(role, text) of each run of tokens with the same role."""
    model = _ScriptedModel([script], prompt_length=3)
    stream = _stream(_scripted_engine(model), [BOS, 65, 0], temperature=0, max_new_tokens=80, **options)
    return [
        (role, "".join(piece.text for piece in pieces))
        for role, pieces in groupby(stream, key=lambda piece: piece.role)
    ]


def test_stream_roles() -> None:
    assert _stream_script(_script("so <2*3>... it is 6|")) == [
        ("text", "so "),
        ("python", "2*3"),
        ("python_output", "6"),
        ("text", " it is 6"),
    ]
    assert _stream_script(_script("<2*3>|"), calculator=False) == [("python", "2*3"), ("text", "")]


def test_stream_text_waits_for_whole_characters() -> None:
    text = "né 🙂!"
    model = _ScriptedModel([[*text.encode(), ASSISTANT_END]], prompt_length=3)
    pieces = list(_stream(_scripted_engine(model), [BOS, 65, 0], temperature=0))
    assert [piece.text for piece in pieces] == ["n", "", "é", " ", "", "", "", "🙂", "!", ""]


@pytest.mark.parametrize("limit", [3, 80])
def test_stream_ends_within_a_character(limit: int) -> None:
    model = _ScriptedModel([[ord("a"), *"🙂".encode()[:2], ASSISTANT_END]], prompt_length=3)
    pieces = _stream(_scripted_engine(model), [BOS, 65, 0], temperature=0, max_new_tokens=limit)
    assert "".join(piece.text for piece in pieces) == "a\ufffd"


# ---------------------------------------------------------------------------------------------------------------------
# The model is not modified


@pytest.mark.parametrize("training", [True, False])
def test_model_is_restored(training: bool) -> None:
    model = _model(torch.bfloat16).train(training)
    before = {name: (id(weight), weight.clone()) for name, weight in model.named_parameters()}
    engine = Engine(model, TOKENIZER)
    _generate(engine, _prompts(5), max_new_tokens=4)
    stream = _stream(engine, _prompts(5)[0], max_new_tokens=4)
    next(stream)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    del stream
    gc.collect()
    assert all(module.training is training for module in model.modules())
    for name, weight in model.named_parameters():
        assert id(weight) == before[name][0]
        assert torch.equal(weight, before[name][1])


def test_training_continues_after_generation() -> None:
    """No inference-mode tensor may remain in the model."""
    model = _model(torch.float32)
    _generate(Engine(model, TOKENIZER), _prompts(5, 40), max_new_tokens=4)
    ids = torch.tensor([_prompts(33)[0]])
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_refresh_copies_new_weights_in_place(compute_dtype: torch.dtype) -> None:
    model, other, prompts = _model(compute_dtype), _model(compute_dtype, seed=5), _prompts(5, 12)
    engine, options = Engine(model, TOKENIZER), {"max_new_tokens": 12, "temperature": 0, "stop_tokens": ()}
    before, expected = _generate(engine, prompts, **options), _generate(Engine(other, TOKENIZER), prompts, **options)
    addresses = [weight.data_ptr() for weight in engine.runner.net.parameters()]
    with torch.no_grad():
        for weight, new in zip(model.parameters(), other.parameters(), strict=True):
            weight.copy_(new)
    engine.refresh()
    assert before != expected
    assert _generate(engine, prompts, **options) == expected
    assert [weight.data_ptr() for weight in engine.runner.net.parameters()] == addresses
    for weight, new in zip(model.parameters(), _model(compute_dtype).parameters(), strict=True):
        weight.data = new.data  # like an optimizer with all weights in one buffer
    engine.refresh()
    assert _generate(engine, prompts, **options) == before


def test_a_stream_tells_that_another_one_has_failed() -> None:
    model = _model()
    engine = Engine(model, TOKENIZER)
    params = SamplingParams(max_new_tokens=20, stop_tokens=[], calculator=False)
    first, second = engine.stream([1, 2], params), engine.stream([3], params)
    next(first), next(second)
    with torch.no_grad():
        model.transformer.wte.weight.fill_(float("nan"))
    engine.runner.weights.refill()
    with pytest.raises(UserError, match="not finite"):
        list(first)
    with pytest.raises(UserError, match="cancelled"):
        list(second)


def test_model_is_restored_after_an_error() -> None:
    model = _model(torch.bfloat16)
    masters = [id(weight) for weight in model.parameters()]
    with torch.no_grad():
        model.transformer.wte.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        _generate(Engine(model, TOKENIZER), _prompts(5), max_new_tokens=4)
    assert [id(weight) for weight in model.parameters()] == masters
    assert model.training


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[BOS], []]}, "prompt 1 is empty"),
        ({"prompts": [[BOS, 265]]}, "ids 256 to 265"),
        ({"prompts": [[-1]]}, "ids -1"),
        ({"prompts": [[BOS] * 320]}, "limit of 320"),
        ({"max_new_tokens": 320}, "limit of 320"),
        ({"max_new_tokens": 10**12}, "limit of 320"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_samples": 0}, "num_samples"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"seed": [1, 2]}, "2 sampling parameters for 1 prompts"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _generate(Engine(_model(), TOKENIZER), **{"prompts": [[BOS]], "max_new_tokens": 4, **options})


def test_stream_arguments_are_checked_at_the_call() -> None:
    engine = Engine(_model(), TOKENIZER)
    for prompt, options in (([], {}), ([BOS], {"top_k": 0}), ([BOS], {"max_new_tokens": 0}), ([BOS], {"seed": -1})):
        with pytest.raises(UserError):
            _stream(engine, prompt, **options)


def test_the_context_can_be_filled_to_the_limit() -> None:
    [prompt] = _prompts(310)
    [[completion]] = _generate(Engine(_model(), TOKENIZER), [prompt], max_new_tokens=10, stop_tokens=(), temperature=0)
    assert len(completion.ids) == 10


def test_no_prompts() -> None:
    assert _generate(Engine(_model(), TOKENIZER), []) == []


def test_tokenizer_of_another_model() -> None:
    with pytest.raises(UserError, match="the model has 265 tokens, the tokenizer 300"):
        Engine(_model(), cast(Tokenizer, _AnyTokenizer(300)))
    with pytest.raises(UserError, match="max_rows"):
        Engine(_model(), TOKENIZER, max_rows=0)
