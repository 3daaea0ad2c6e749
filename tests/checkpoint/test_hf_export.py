"""Exports loaded with transformers, compared with lmchat."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmchat.__main__ import main
from lmchat.checkpoint.hf import format as form
from lmchat.checkpoint.hf.check import CONVERSATIONS
from lmchat.checkpoint.load import find_checkpoint, load_model_state
from lmchat.checkpoint.meta_schema import REQUIRED
from lmchat.checkpoint.writer import write_checkpoint
from lmchat.generation.engine import Engine
from lmchat.generation.sampling import SamplingParams
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer
from lmchat.tokenizer.render import render_conversation, render_for_completion
from lmchat.types import UserError
from random_checkpoint import NATIVE, save_random_checkpoint

SHAPES = {
    "native": NATIVE,
    "native, one key head": {**NATIVE, "n_kv_head": 1, "n_layer": 1},
    "full": {},
    "full, odd": {"sequence_len": 27, "n_layer": 4, "n_kv_head": 4, "window_pattern": "SSL"},
    "value embeddings alone": {"residual_mix": False, "window_pattern": "L"},
    "short windows alone": {**NATIVE, "window_pattern": "S"},
}
# 300 tokens in tables of 320 rows: padding must have no effect.
VOCAB_SIZE = 300


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    from pydoc_data.topics import topics

    return Tokenizer.train([text for _, text in sorted(topics.items())], VOCAB_SIZE)


@pytest.fixture(scope="module")
def exported(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, GPT]]:
    """Folder of an export, written and checked once, and lmchat's model with the same weights."""
    made: dict[str, tuple[Path, GPT]] = {}

    def export(name: str) -> tuple[Path, GPT]:
        if name not in made:
            base = tmp_path_factory.mktemp("base")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LMCHAT_BASE_DIR", str(base))
                tokenizer.save(base / "tokenizer")
                paths = save_random_checkpoint(tokenizer, **SHAPES[name])
                assert main(["export", "hf", str(paths.directory), "--output", str(base / "out")]) == 0
                checkpoint = find_checkpoint(paths.directory)
            net = GPT(GPTConfig(**checkpoint.meta["model"]))
            net.load_state_dict(load_model_state(checkpoint))
            made[name] = base / "out", net.eval()
        return made[name]

    return export


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    native = json.loads((folder / "config.json").read_text())["model_type"] == "nanochat"
    options = {"dtype": torch.float32, **({} if native else {"trust_remote_code": True}), **options}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def random_ids(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(1))


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_lmchat(name: str, exported: Callable[[str], tuple[Path, GPT]]) -> None:
    folder, net = exported(name)
    model = load(folder)
    assert type(model).__name__ == ("NanoChatForCausalLM" if name.startswith("native") else "LMChatForCausalLM")
    # A native model has no windows, which makes a difference only beyond the training context.
    length = net.config.sequence_len + (20 if net.config.native_obstacles else 0)
    ids = random_ids(length)
    with torch.inference_mode():
        expected, found = net(ids), model(ids).logits
    assert found.shape == (2, length, VOCAB_SIZE)
    assert expected.std() > 1, "logits that differ by little would prove little"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["native", "full"])
def test_logits_in_bf16(name: str, exported: Callable[[str], tuple[Path, GPT]]) -> None:
    folder, net = exported(name)
    model = load(folder, dtype=torch.bfloat16)
    low = GPT(net.config, compute_dtype=torch.bfloat16)
    low.load_state_dict(net.state_dict())
    ids = random_ids(net.config.sequence_len)
    with torch.inference_mode():
        exact, expected, found = net(ids), low(ids), model(ids).logits.float()
    # transformers' own model rounds the logits to bf16 too.
    assert (found - expected).abs().max() < (0.1 if name == "native" else 1e-3)
    assert (found - exact).abs().mean() < 2 * (expected - exact).abs().mean()


@pytest.mark.parametrize("name", ["full", "full, odd", "native"])
def test_cached_generation_equals_lmchat(
    name: str, exported: Callable[[str], tuple[Path, GPT]], tokenizer: Tokenizer
) -> None:
    """Greedy decoding beyond all windows, of a batch of prompts of two lengths."""
    folder, net = exported(name)
    context = net.config.sequence_len
    length = context - 3 if net.config.native_obstacles else context // 2
    new_tokens = 25 if net.config.native_obstacles else context // 2
    prompts = [row.tolist() for row in random_ids(length)]
    prompts[1] = prompts[1][5:]
    engine = Engine(net, tokenizer)
    params = SamplingParams(max_new_tokens=new_tokens, temperature=0, stop_tokens=(), calculator=False)
    completions = engine.generate(prompts, params)
    padded = load_tokenizer(folder).pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    options = {**padded, "max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
    for caching in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        found = load(folder).generate(**options, **caching)
        assert [row.ids for (row,) in completions] == found[:, length:].tolist(), caching


def test_a_pipeline_generates(exported: Callable[[str], tuple[Path, GPT]], tokenizer: Tokenizer) -> None:
    from transformers import pipeline

    folder, net = exported("full")
    chat = [{"role": "user", "content": "Hello!"}]
    prompt = render_for_completion(tokenizer, {"messages": chat})  # type: ignore[typeddict-item]
    params = SamplingParams(max_new_tokens=30, temperature=0, calculator=False)
    ((expected,),) = Engine(net, tokenizer).generate([prompt], params)
    generate = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    (answer,) = generate(chat, max_new_tokens=30, do_sample=False)
    assert answer["generated_text"][0] == chat[0]
    assert answer["generated_text"][1]["role"] == "assistant"
    spoken = [token for token in expected.ids if token < VOCAB_SIZE - len(SPECIAL_TOKENS)]
    assert answer["generated_text"][1]["content"] == tokenizer.decode(spoken)

    in_bf16 = pipeline("text-generation", model=str(folder), trust_remote_code=True, dtype=torch.bfloat16)
    (document,) = in_bf16("The", max_new_tokens=5, do_sample=False)
    assert document["generated_text"].startswith("The")


def test_a_context_beyond_lmchats_limit_is_refused(exported: Callable[[str], tuple[Path, GPT]]) -> None:
    folder, _ = exported("full")
    with pytest.raises(ValueError, match="a context of 321 tokens is longer than the model's limit of 320"):
        load(folder)(random_ids(321, rows=1))


def test_the_modelling_file_trains(exported: Callable[[str], tuple[Path, GPT]]) -> None:
    """Loss and gradients with ``labels`` equal those of lmchat."""
    folder, net = exported("full")
    ids = random_ids(20)
    model = load(folder).train()
    loss = model(ids, labels=ids).loss
    loss.backward()
    expected = net.loss(ids[:, :-1], ids[:, 1:])
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    expected_gradients = {name: weight.grad for name, weight in net.named_parameters()}
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected_gradients[name], rtol=1e-3, atol=1e-5)
    net.zero_grad(set_to_none=True)


# Tokenizer and chat template ------------------------------------------------------------------------------------------

# Text that a template could misread: whole and partial special tokens, the template's escapes, white space.
SPECIAL_LOOKING = [*SPECIAL_TOKENS, "<|user_end|", "<|", "|>", "<", "|", "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"]
ORDINARY = [
    "the ",
    "s",
    "'s",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "12",
    "345",
    "{{ x }}",
    "{% if %}",
    "\xa0",
    "日本",
    "é",
    "😀",
]
PIECES = st.sampled_from([*SPECIAL_LOOKING, *ORDINARY])
TEXT = st.lists(PIECES | st.text(max_size=5), min_size=1, max_size=6).map("".join).filter(bool)
PART = st.fixed_dictionaries({"type": st.sampled_from(["text", "python", "python_output"]), "text": TEXT | st.just("")})
ANSWER = TEXT | st.lists(PART, min_size=1, max_size=5).filter(lambda parts: any(part["text"] for part in parts))


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": "user", "content": draw(TEXT)}, {"role": "assistant", "content": draw(ANSWER)}]
    return messages[: -1 if draw(st.booleans()) else None]


@pytest.fixture(scope="module")
def exported_tokenizer(exported: Callable[[str], tuple[Path, GPT]]) -> Any:
    return load_tokenizer(exported("native")[0])


@settings(max_examples=150, deadline=None)
@given(conversations())
def test_the_chat_template_renders_lmchats_ids(
    exported_tokenizer: Any, tokenizer: Tokenizer, messages: list[dict[str, Any]]
) -> None:
    rendered = exported_tokenizer.apply_chat_template(messages, return_dict=True)
    assert list(rendered["input_ids"]) == render_conversation(tokenizer, {"messages": messages}, 10**9)[0]  # type: ignore[typeddict-item]
    if messages[-1]["role"] == "user":
        prompt = exported_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert list(prompt["input_ids"]) == render_for_completion(tokenizer, {"messages": messages})  # type: ignore[typeddict-item]


def test_the_chat_template_masks_assistant_tokens(exported_tokenizer: Any, tokenizer: Tokenizer) -> None:
    for conversation in CONVERSATIONS:
        rendered = exported_tokenizer.apply_chat_template(
            conversation["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        assert list(rendered["assistant_masks"]) == render_conversation(tokenizer, conversation)[1]


def test_text_is_encoded_as_a_document(exported_tokenizer: Any, tokenizer: Tokenizer) -> None:
    text = "It's 1234 o'clock,\n\n  日本語 "
    assert exported_tokenizer(text).input_ids == [tokenizer.bos_id, *tokenizer.encode(text)]
    assert exported_tokenizer(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    assert exported_tokenizer.decode(ids, skip_special_tokens=True) == text
    assert exported_tokenizer.decode(ids[:1]) == "<|bos|>"


def test_content_may_be_a_list_of_texts(exported_tokenizer: Any) -> None:
    """Content in the form that OpenAI-compatible servers send."""
    plain = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    lists = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in plain]
    render = exported_tokenizer.apply_chat_template
    assert render(plain, tokenize=False) == render(lists, tokenize=False)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "system", "content": "a"}], "at least one user message"),
        ([{"role": "assistant", "content": "a"}], "role assistant where user is expected"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "role user where assistant is expected"),
        ([{"role": "user", "content": ""}], "user message is empty"),
        ([{"role": "user", "content": [{"type": "image", "text": ""}]}], "contain text, not image"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "tool", "text": "b"}]}],
            "unknown type tool",
        ),
    ],
)
def test_the_chat_template_refuses_the_same_conversations(
    exported_tokenizer: Any, messages: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        exported_tokenizer.apply_chat_template(messages, tokenize=False)


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["native", "full"])
def test_an_exported_folder_is_complete(
    name: str, exported: Callable[[str], tuple[Path, GPT]], tokenizer: Tokenizer
) -> None:
    folder, _ = exported(name)
    read = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    end = tokenizer.special("assistant_end")
    assert read["generation_config.json"] == {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": [end, tokenizer.bos_id],
        "pad_token_id": tokenizer.bos_id,
    }
    assert read["config.json"]["rms_norm_eps"] == 2.0**-23
    assert ("auto_map" in read["config.json"]) is (folder / "modeling_lmchat.py").exists() is (name == "full")
    assert (folder / "padding.safetensors").exists() is (name == "native")
    assert read["lmchat_meta.json"]["tag"] == "tiny"
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# tiny (sft)" in card and "| optimizer steps | 7 of 7 |" in card
    assert ("trust_remote_code=True" in card) is (name == "full")


def test_the_example_of_the_model_card_runs(
    exported: Callable[[str], tuple[Path, GPT]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = exported("full")
    monkeypatch.chdir(folder)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_weights_in_bf16_halve_the_file(base: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {dtype: base / dtype for dtype in ("fp32", "bf16")}
    tokenizer.save(base / "own")
    paths = save_random_checkpoint(tokenizer)
    for dtype, folder in folders.items():
        options = ["--dtype", dtype, "--tokenizer", str(base / "own"), "--output", str(folder)]
        assert main(["export", "hf", str(paths.model), *options]) == 0
    sizes = [(folder / "model.safetensors").stat().st_size for folder in folders.values()]
    assert sizes[1] < 0.52 * sizes[0]
    assert len({path.stat().st_mode for folder in folders.values() for path in folder.iterdir()}) == 1
    assert "parameters in bf16" in capsys.readouterr().out
    loaded = load(folders["bf16"], dtype="auto")
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert loaded.resid_lambdas.dtype == torch.float32


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(base: Path, tokenizer: Tokenizer) -> Path:
    """A native checkpoint in a base folder with its tokenizer."""
    (base / "tokenizer").unlink()
    tokenizer.save(base / "tokenizer")
    return save_random_checkpoint(tokenizer, **NATIVE).meta


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["export", "hf", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_last_is_the_newest_checkpoint(checkpoint: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "hf", "last", "--output", str(base / "out"), "--check", "false"]) == 0
    printed = capsys.readouterr().out
    assert "NanoChatForCausalLM, 20 tensors" in printed
    assert "not checked: whether transformers loads it, its logits, greedy decoding and chat template" in printed


def test_weights_on_a_full_disk_are_reported(checkpoint: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        error = refused([str(checkpoint), "--check", "false", "--output", str(base / "out")], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write" in error and "model.safetensors" in error and "make room" in error
    assert not list(base.glob("out*"))


def test_an_export_with_a_modelling_file_can_be_asked_for(checkpoint: Path, base: Path) -> None:
    options = ["--native", "false", "--check", "false", "--output", str(base / "out")]
    assert main(["export", "hf", str(checkpoint), *options]) == 0
    assert (base / "out" / "modeling_lmchat.py").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.update({"transformer.h.0.attn.bias": torch.zeros(3)}),
            "contains transformer.h.0.attn.bias",
        ),
        (lambda state: state.pop("transformer.h.1.mlp.c_fc.weight"), "lacks transformer.h.1.mlp.c_fc.weight"),
        (lambda state: state.update({"lm_head.weight": torch.zeros(64, 64)}), "of shape (64, 64)"),
    ],
)
@pytest.mark.parametrize("native", ["true", "false"])
def test_every_tensor_is_accounted_for(
    native: str,
    change: Callable[[dict], Any],
    message: str,
    checkpoint: Path,
    base: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = find_checkpoint(checkpoint)
    state = dict(load_model_state(found))
    change(state)
    meta = {key: found.meta[key] for key in REQUIRED.keys() - {"step", "world_size", "files"}}
    write_checkpoint(found.paths, model=state, rank_state={}, meta=meta)
    error = refused([str(checkpoint), "--native", native, "--output", str(base / "out"), "--check", "false"], capsys)
    assert f"the checkpoint {message}" in error or message in error
    assert not (base / "out").exists()


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["nowhere"], ["there is no checkpoint in nowhere"]),
        (["model.safetensors"], ["model.safetensors is not an lmchat checkpoint"]),
        (["CHECKPOINT", "--output", "TAKEN"], ["is not empty", "--output"]),
        (["CHECKPOINT", "--tokenizer", "nowhere"], ["no tokenizer in nowhere"]),
        (["CHECKPOINT", "--tokenizer", "OTHER"], ["trained with a different tokenizer", "--tokenizer"]),
        (["FULL", "--native", "true"], ["cannot express value embeddings (--model.value_embeddings false)"]),
        (["CHECKPOINT", "--dtype", "fp8"], ["dtype"]),
    ],
)
def test_mistakes_give_one_message(
    options: list[str],
    messages: list[str],
    checkpoint: Path,
    base: Path,
    tokenizer: Tokenizer,
    new_base: Callable[[], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (base / "taken").mkdir()
    (base / "taken" / "file").touch()
    full = save_random_checkpoint(tokenizer, tag="full").directory
    names = {"CHECKPOINT": checkpoint, "FULL": full, "TAKEN": base / "taken", "OTHER": new_base() / "tokenizer"}
    arguments = [str(names.get(option, option)) for option in options]
    if "--output" not in arguments:
        arguments += ["--output", str(base / "out")]
    error = refused(arguments, capsys)
    for message in messages:
        assert message in error
    assert not (base / "out").exists() and not list(base.glob("*.partial"))


@pytest.mark.parametrize(
    ("package", "purpose"), [("transformers", "the check of an export"), ("safetensors", "an export")]
)
def test_a_missing_package_is_reported_with_the_remedy(
    package: str,
    purpose: str,
    checkpoint: Path,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    error = refused([str(checkpoint), "--output", str(base / "out")], capsys)
    assert f"{purpose}" in error and f"needs {package}" in error and "pip install 'lmchat[hf]'" in error
    assert not (base / "out").exists()


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("config.json", {"rms_norm_eps": 0.05}, "logits differ from lmchat's by"),
        ("config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": 9000.0}}, "logits differ"),
        ("config.json", {"vocab_size": 299}, "does not load the export"),
        ("tokenizer.json", {"normalizer": None}, "the chat template of the export renders"),
    ],
)
def test_the_check_finds_a_wrong_export(
    name: str,
    wrong: dict[str, Any],
    message: str,
    checkpoint: Path,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lmchat.checkpoint.hf import export

    write = export.write_export

    def write_wrongly(*arguments: Any, **options: Any) -> Any:
        written = write(*arguments, **options)
        path = arguments[2] / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))
        return written

    monkeypatch.setattr(export, "write_export", write_wrongly)
    error = refused([str(checkpoint), "--output", str(base / "out")], capsys)
    assert message in error
    assert not (base / "out").exists()


def test_conversations_of_the_check_cover_every_part() -> None:
    contents = [message["content"] for conversation in CONVERSATIONS for message in conversation["messages"]]
    parts = [part["type"] for content in contents if not isinstance(content, str) for part in content]
    assert set(parts) == {"text", "python", "python_output"}


def test_a_config_of_another_architecture_is_refused() -> None:
    with pytest.raises(UserError, match="its model_type is 'llama'"):
        form.from_config({"model_type": "llama"})
