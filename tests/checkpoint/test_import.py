"""Imports: round trips of exports, models of transformers and of nanochat, and files that are refused."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401  (its log handler keeps the stderr of its import: not that of one test)
import numpy as np
import pytest
import tiktoken
import torch
from safetensors.torch import load_file, save_file

from lmchat.__main__ import main
from lmchat.checkpoint.load import Checkpoint, find_checkpoint, load_model, load_model_state, load_tokenizer
from lmchat.checkpoint.nanochat import read_pickled_tokenizer
from lmchat.model.config import GPTConfig
from lmchat.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer
from lmchat.types import UserError
from random_checkpoint import NATIVE, SHAPE, random_state, save_random_checkpoint
from rank_file import write_ranks

VOCAB_SIZE = 512
TRAINING = {"learning_rates", "global_batch_tokens", "micro_batch_size"}


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer.load(tiny_base / "tokenizer")


@pytest.fixture(scope="module")
def odd_tokenizer() -> Tokenizer:
    """A tokenizer whose models have padding rows in their token tables."""
    from pydoc_data.topics import topics

    return Tokenizer.train([text for _, text in sorted(topics.items())], 300)


def imported(base: Path, *options: str) -> Checkpoint:
    """Runs ``lmchat import`` with a separate base folder and opens the checkpoint."""
    assert main(["import", *options]) == 0
    (meta,) = base.glob("*_checkpoints/*/meta_000000.json")
    return find_checkpoint(meta)


def equal(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return state.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and tensor.equal(other[name]) for name, tensor in state.items()
    )


# transformers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("stage", ["pretrain", "rl"])
def test_export_and_import_round_trip(
    native: bool, stage: str, odd_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path / name))
        if name == "first":
            odd_tokenizer.save(tmp_path / "first" / "tokenizer")
            paths = save_random_checkpoint(odd_tokenizer, stage=stage, tag="mine", **(NATIVE if native else {}))
            options = ["--output", str(tmp_path / "out"), "--check", "false"]
            assert main(["export", "hf", str(paths.directory), *options]) == 0
    assert (tmp_path / "out" / "modeling_lmchat.py").exists() is not native
    before, after = find_checkpoint(paths.directory), imported(tmp_path / "second", "hf", str(tmp_path / "out"))
    assert equal(load_model_state(before), load_model_state(after))
    kept = {"stage", "tag", "model", "tokenizer_fingerprint", *TRAINING}
    assert {key: after.meta[key] for key in kept} == {key: before.meta[key] for key in kept}
    assert after.weights_only and not before.weights_only
    assert load_tokenizer(after).fingerprint == odd_tokenizer.fingerprint
    again = ["--output", str(tmp_path / "again"), "--check", "false"]
    assert main(["export", "hf", "last", *again]) == 0
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_model_that_transformers_saved(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In several files, in bf16, with a tokenizer that transformers converted from tiktoken."""
    from transformers import NanoChatConfig, NanoChatForCausalLM, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    folder = tmp_path / "their_model"
    config = NanoChatConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, rms_norm_eps=2.0**-23, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = NanoChatForCausalLM(config).to(torch.bfloat16).eval()
    theirs.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    converter = TikTokenConverter(
        vocab_file=str(write_ranks(tmp_path / "ranks.tiktoken", tokenizer)),
        pattern=tokenizer.pattern,
        extra_special_tokens=list(SPECIAL_TOKENS),
    )
    PreTrainedTokenizerFast(tokenizer_object=converter.converted()).save_pretrained(folder)
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path / "base"))
    checkpoint = imported(tmp_path / "base", "hf", str(folder))
    printed = capsys.readouterr().out
    assert "imported as a pretrained model" in printed and "note" not in printed
    assert (checkpoint.stage, checkpoint.meta["tag"]) == ("pretrain", "their_model")
    assert load_tokenizer(checkpoint).fingerprint == tokenizer.fingerprint
    ids = torch.randint(VOCAB_SIZE, (2, 64), generator=torch.Generator().manual_seed(0))
    net = load_model(checkpoint)
    net.compute_dtype = torch.float32
    with torch.inference_mode():
        torch.testing.assert_close(net(ids), theirs.float()(ids).logits, rtol=0, atol=1e-5)


@pytest.fixture
def export(base: Path, odd_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An unchecked native export; sets a new base folder."""
    odd_tokenizer.save(base / "own")
    paths = save_random_checkpoint(odd_tokenizer, **NATIVE)
    options = ["--tokenizer", str(base / "own"), "--output", str(base / "out"), "--check", "false"]
    assert main(["export", "hf", str(paths.directory), *options]) == 0
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(base / "new"))
    return base / "out"


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["import", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensor(folder: Path, name: str, value: float) -> None:
    """Sets one element."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "there is no config.json in"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (
            lambda f: (f / "config.json").write_text("[]"),
            "config.json is damaged (it is of type list, not a JSON object)",
        ),
        (lambda f: (f / "config.json").write_text('{"model_type": "nanochat"}'), "has no valid"),
        (lambda f: change_json(f / "config.json", model_type="llama"), "its model_type is 'llama'"),
        (lambda f: change_json(f / "config.json", attention_bias=True), "its attention_bias is True"),
        (lambda f: change_json(f / "config.json", num_hidden_layers=2), "does not have; copy or download it again"),
        (lambda f: change_json(f / "config.json", num_hidden_layers=4), "lacks model.layers.3"),
        (
            lambda f: change_json(f / "config.json", num_key_value_heads=4),
            "config requires (64, 64), so they are not of the same model; copy or",
        ),
        (lambda f: change_json(f / "config.json", num_hidden_layers=1.5), "n_layer is 1.5; it must be a whole number"),
        (lambda f: change_json(f / "config.json", max_position_embeddings=None), "sequence_len is None"),
        (lambda f: change_json(f / "config.json", rms_norm_eps="x"), "has no valid"),
        (lambda f: change_json(f / "config.json", rope_parameters=[1]), "has no valid"),
        (lambda f: change_json(f / "config.json", num_attention_heads=0, head_dim=None), "has no valid"),
        (lambda f: change_json(f / "config.json", vocab_size=299), "but its config requires (299, 64)"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors is damaged"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-10]),
            "model.safetensors is damaged",
        ),
        (
            lambda f: save_file({"lm_head.weight": torch.ones(3, 3)}, f / "padding.safetensors"),
            "padding.safetensors lacks transformer.wte.weight, so it is incomplete",
        ),
        (lambda f: change_tensor(f, "lm_head.weight", math.nan), "contains infinities or NaN in lm_head.weight"),
        (lambda f: change_tensor(f, "lm_head.weight", -math.inf), "contains infinities or NaN in lm_head.weight"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json is damaged, or not the tokenizer"),
        (lambda f: change_json(f / "tokenizer.json", normalizer={"type": "NFC"}), "its normalizer changes text"),
        (lambda f: change_json(f / "lmchat_meta.json", tokenizer_fingerprint="0"), "is not the tokenizer that"),
    ],
)
def test_damaged_exports_are_refused(
    damage: Callable[[Path], Any], message: str, export: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(export)
    assert message in refused(["hf", str(export)], capsys)
    assert not list((base / "new").rglob("meta_*"))


def test_an_index_cannot_point_outside_its_folder(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (export / "model.safetensors").rename(export.parent / "model.safetensors")
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (export / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names ../model.safetensors, outside its folder" in refused(["hf", str(export)], capsys)


def test_existing_tags_and_other_tokenizers_are_refused(
    export: Path, tokenizer: Tokenizer, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["import", "hf", str(export)]) == 0
    assert "already contains a run; choose another name with --tag" in refused(["hf", str(export)], capsys)
    assert main(["import", "hf", str(export), "--tag", "other", "--stage", "pretrain"]) == 0
    assert (base / "new" / "base_checkpoints" / "other" / "meta_000000.json").exists()
    tokenizer.save(base / "third" / "tokenizer")
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(base / "third"))
    assert "contains a tokenizer that differs from the model's; set" in refused(["hf", str(export)], capsys)


def test_another_eps_is_reported(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_json(export / "config.json", rms_norm_eps=1e-6)
    assert main(["import", "hf", str(export)]) == 0
    assert "note: its norms have eps 1e-06, lmchat's 1.19e-07: outputs differ a little" in capsys.readouterr().out


# nanochat -------------------------------------------------------------------------------------------------------------


def encoding_of(tokenizer: Tokenizer, **changes: Any) -> tiktoken.Encoding:
    special = {name: len(tokenizer.ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    arguments = {"pat_str": tokenizer.pattern, "mergeable_ranks": tokenizer.ranks, "special_tokens": special}
    return tiktoken.Encoding("rustbpe", **{**arguments, **changes})


def save_nanochat(
    base: Path,
    tokenizer: Tokenizer,
    state: dict[str, torch.Tensor],
    config: dict[str, Any],
    folder: str = "base_checkpoints",
) -> Path:
    """Saves a checkpoint and a tokenizer as nanochat does: compiled, with token tables in bf16."""
    checkpoints = base / folder / "d3"
    checkpoints.mkdir(parents=True)
    stored = {
        f"_orig_mod.{name}": tensor.bfloat16() if "wte" in name or "value_embeds" in name else tensor
        for name, tensor in state.items()
    }
    for step in (20, 1000):
        torch.save(
            {name: tensor * (step == 1000) for name, tensor in stored.items()}, checkpoints / f"model_{step:06d}.pt"
        )
        meta = {
            "step": step,
            "val_bpb": 1.0,
            "model_config": config,
            "user_config": {"matrix_lr": 0.015, "total_batch_size": 2048, "run": "dummy", "embedding_lr": "?"},
            "device_batch_size": 4,
        }
        (checkpoints / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    (checkpoints / "optim_001000_rank0.pt").touch()
    (base / "tokenizer").mkdir()
    with (base / "tokenizer" / "tokenizer.pkl").open("wb") as file:
        pickle.dump(encoding_of(tokenizer), file)
    return checkpoints


CONFIG = {**SHAPE, "vocab_size": VOCAB_SIZE}


@pytest.fixture
def nanochat(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path / "base"))
    return save_nanochat(tmp_path / "nanochat", tokenizer, random_state(GPTConfig(**CONFIG)), CONFIG)


def test_nanochats_last_checkpoint_is_imported(nanochat: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    checkpoint = imported(tmp_path / "base", "nanochat", str(nanochat))
    expected = random_state(GPTConfig(**CONFIG))
    expected = {
        name: tensor.bfloat16().float() if "wte" in name or "value_embeds" in name else tensor
        for name, tensor in expected.items()
    }
    assert equal(load_model_state(checkpoint), expected)
    assert (checkpoint.stage, checkpoint.meta["tag"], checkpoint.step) == ("pretrain", "d3", 0)
    assert checkpoint.meta["imported"] == {"kind": "nanochat", "from": str(nanochat / "model_001000.pt"), "step": 1000}
    assert checkpoint.meta["global_batch_tokens"] == 2048
    assert checkpoint.meta["micro_batch_size"] == 4
    assert checkpoint.meta["learning_rates"] == {
        "embedding_lr": 0.3, "unembedding_lr": 0.004, "matrix_lr": 0.015, "scalar_lr": 0.5
    }  # fmt: skip
    assert load_tokenizer(checkpoint).fingerprint == tokenizer.fingerprint


def test_an_imported_model_computes_what_nanochat_does(
    oracles: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((oracles / "c05_gpt.json").read_text())["kv2"]["config"]
    with np.load(oracles / "c05_gpt_kv2.npz") as arrays:
        recorded = {key: torch.from_numpy(arrays[key]) for key in arrays}
    state = {key[2:]: value for key, value in recorded.items() if key.startswith("w/")}
    folder = save_nanochat(tmp_path / "nanochat", tokenizer, {}, config)
    torch.save(state, folder / "model_001000.pt")
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path / "base"))
    net = load_model(imported(tmp_path / "base", "nanochat", str(folder)))
    net.compute_dtype = torch.float32
    with torch.inference_mode():
        torch.testing.assert_close(net(recorded["ids"]), recorded["logits"], rtol=0, atol=2e-5)


def test_an_older_nanochat_is_the_native_variant(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nanochat of October 2025: no windows, value embeddings or residual mix; all files in one folder."""
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path / "base"))
    config = {name: value for name, value in CONFIG.items() if name != "window_pattern"}
    state = random_state(GPTConfig(**{**CONFIG, **NATIVE}))
    folder = save_nanochat(tmp_path / "nanochat", tokenizer, state, config)
    shutil.move(tmp_path / "nanochat" / "tokenizer" / "tokenizer.pkl", folder)
    flat = shutil.move(folder, tmp_path / "nanochat-d3")
    checkpoint = imported(tmp_path / "base", "nanochat", str(flat), "--tag", "old", "--stage", "sft")
    assert checkpoint.stage == "sft" and checkpoint.meta["tag"] == "old"
    assert not GPTConfig(**checkpoint.meta["model"]).native_obstacles
    assert main(["export", "hf", "last", "--output", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("folder", "stage", "next_config"),
    [
        ("mid_checkpoints", "pretrain", "sft.yaml"),
        ("chatsft_checkpoints", "sft", "grpo.yaml"),
        ("chatrl_checkpoints", "rl", None),
    ],
)
def test_the_stage_and_the_next_one_follow_from_nanochats_folder(
    folder: str,
    stage: str,
    next_config: str | None,
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path / "base"))
    path = save_nanochat(tmp_path / "nanochat", tokenizer, random_state(GPTConfig(**CONFIG)), CONFIG, folder)
    assert imported(tmp_path / "base", "nanochat", str(path / "model_001000.pt")).stage == stage
    assert re.findall(r"--config configs/(\S+)", capsys.readouterr().out) == ([next_config] if next_config else [])


@pytest.mark.parametrize("name", ["tokenizer.pkl", "optim_001000_rank0.pt", "meta_001000.json"])
def test_a_file_that_is_no_model_is_no_nanochat_checkpoint(
    name: str, nanochat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (nanochat / "model_001000.pt").unlink()
    (nanochat / name).touch()
    assert main(["import", "nanochat", str(nanochat / name)]) == 2
    assert "there is no nanochat checkpoint in" in capsys.readouterr().err


def quantize(path: Path) -> None:
    torch.save({name: tensor.to(torch.int8) for name, tensor in torch.load(path).items()}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "there is no nanochat checkpoint in"),
        (lambda f: (f / "meta_001000.json").unlink(), "meta_001000.json is missing"),
        (lambda f: (f / "meta_001000.json").write_text("{"), "meta_001000.json is damaged"),
        (lambda f: (f / "meta_001000.json").write_text("{}"), "has no model_config"),
        (lambda f: (f / "meta_001000.json").write_text('{"meta_sha256": 1}'), "is an lmchat checkpoint"),
        (lambda f: change_json(f / "meta_001000.json", model_config={"n_layer": 3}), "sequence_len is missing"),
        (lambda f: change_json(f / "meta_001000.json", model_config={**CONFIG, "moe": 8}), "'moe' is unknown"),
        (lambda f: change_json(f / "meta_001000.json", model_config={**CONFIG, "n_layer": 5}), "lacks transformer.h.3"),
        (
            lambda f: change_json(f / "meta_001000.json", model_config={**CONFIG, "n_head": "4"}),
            "n_head is '4'",
        ),
        (lambda f: (f / "model_001000.pt").write_bytes(b"x"), "model_001000.pt is not a file of torch.save"),
        (lambda f: torch.save({"model": 3}, f / "model_001000.pt"), "contains model, which this"),
        (lambda f: torch.save({0: torch.ones(3)}, f / "model_001000.pt"), "contains 0, which this"),
        (lambda f: quantize(f / "model_001000.pt"), "of type torch.int8"),
        (lambda f: torch.save({"smear_gate": torch.ones(3)}, f / "model_001000.pt"), "contains smear_gate"),
        (lambda f: (f.parent.parent / "tokenizer" / "tokenizer.pkl").unlink(), "no tokenizer.pkl in"),
    ],
)
def test_damaged_checkpoints_of_nanochat_are_refused(
    damage: Callable[[Path], Any], message: str, nanochat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(nanochat)
    assert message in refused(["nanochat", str(nanochat)], capsys)
    assert not list((tmp_path / "base").rglob("meta_*"))


def test_a_tokenizer_of_another_size_is_refused(
    nanochat: Path, odd_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "other.pkl").open("wb") as file:
        pickle.dump(encoding_of(odd_tokenizer), file)
    error = refused(["nanochat", str(nanochat), "--tokenizer", str(tmp_path / "other.pkl")], capsys)
    assert "has 300 tokens and its model 512" in error


class Runs:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_cannot_run_code(protocol: int, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, proof = tmp_path / "tokenizer.pkl", tmp_path / "proof"
    hidden = encoding_of(tokenizer)
    hidden._pat_str = Runs(proof)  # type: ignore[assignment]
    for value in (Runs(proof), hidden, {"a": [Runs(proof)]}):
        path.write_bytes(pickle.dumps(value, protocol=protocol))
        with pytest.raises(UserError, match="is not a nanochat tokenizer"):
            read_pickled_tokenizer(path)
        assert not proof.exists()
    pickle.loads(pickle.dumps(Runs(proof), protocol=protocol))
    assert proof.exists(), "it does run where it is unpickled without care"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x" * 100,
        pickle.dumps({"pat_str": "a"}),
        pickle.dumps(tiktoken.Encoding)[:-3],
        b"ctiktoken.load\nload_tiktoken_bpe\n(V/etc/passwd\ntR.",
        b"ctiktoken.core\nEncoding\n(V/etc/passwd\ntR.",
        b"cbuiltins\neval\n(V1\ntR.",
        b"ctiktoken.core\nEncoding.__init__.__globals__\n.",
        b"ctiktoken.core\nEncoding\n)R}(Vpat_str\nV((\nVmergeable_ranks\n}Vspecial_tokens\n}ub.",
    ],
)
def test_hostile_and_damaged_pickles_give_one_message(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.pkl").write_bytes(content)
    with pytest.raises(UserError, match="is not a nanochat tokenizer"):
        read_pickled_tokenizer(tmp_path / "tokenizer.pkl")


def test_an_encoding_with_other_special_tokens_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(encoding_of(tokenizer, special_tokens={"<|endoftext|>": len(tokenizer.ranks)})))
    with pytest.raises(UserError, match="has the special tokens"):
        read_pickled_tokenizer(path)


# Training on ----------------------------------------------------------------------------------------------------------

STANDING_STILL = "{embedding_lr: 0, unembedding_lr: 0, matrix_lr: 0, scalar_lr: 0"
FITS = {
    "pretrain": f"""
trainer: {{accelerator: cpu, devices: 1, max_steps: 1}}
model:
  class_path: PretrainModule
  init_args: {STANDING_STILL}, depth: 3, aspect_ratio: 32, sequence_len: 256, head_dim: 32, n_kv_head: 3,
    window_pattern: SL, global_batch_tokens: 512, weight_decay: 0}}
data: {{class_path: FineWebDataModule, init_args: {{micro_batch_size: 2, eval_tokens: 512}}}}
eval: {{every_n_steps: 0}}
samples: {{max_new_tokens: 0}}
""",
    "sft": f"""
trainer: {{accelerator: cpu, devices: 1, max_steps: 1}}
model: {{class_path: SFTModule, init_args: {STANDING_STILL}, global_batch_tokens: 512}}}}
data:
  class_path: SFTDataModule
  init_args:
    micro_batch_size: 2
    eval_tokens: 512
    train: [{{task: {{class_path: Identity, init_args: {{split: train, size: 8}}}}}}]
    val: [{{task: {{class_path: Identity, init_args: {{split: test, size: 4}}}}}}]
eval: {{every_n_steps: 0}}
samples: {{max_new_tokens: 0}}
""",
    "rl": f"""
trainer: {{accelerator: cpu, devices: 1, max_steps: 1}}
model: {{class_path: GRPOModule, init_args: {STANDING_STILL}}}}}
data:
  class_path: RolloutDataModule
  init_args:
    train: [{{task: {{class_path: SimpleSpelling, init_args: {{split: train, size: 8}}}}}}]
    eval_task: {{class_path: SimpleSpelling, init_args: {{split: test, size: 2}}}}
    questions_per_step: 1
    num_samples: 2
    eval_num_samples: 1
    max_new_tokens: 4
eval: {{every_n_steps: 0}}
samples: {{max_new_tokens: 0}}
""",
}


@pytest.fixture
def trainable(base: Path, tokenizer: Tokenizer, tmp_path: Path) -> Checkpoint:
    """A pretrained model of nanochat, imported into a base folder with data."""
    config = {**CONFIG, "sequence_len": 256, "n_head": 3, "n_kv_head": 3, "n_embd": 96}
    folder = save_nanochat(tmp_path / "nanochat", tokenizer, random_state(GPTConfig(**config)), config)
    return imported(base, "nanochat", str(folder))


@pytest.mark.parametrize("stage", FITS)
def test_an_imported_model_trains_on(stage: str, trainable: Checkpoint, base: Path) -> None:
    """With learning rates of 0, a step does not change the imported weights."""
    if stage == "rl":
        (base / "words.txt").write_text("\n".join("abcdefghijklmnop"))
    (base / "fit.yaml").write_text(FITS[stage])
    own = ["--model.tag", "on", "--ckpt_path", str(trainable.paths.directory)]
    assert main(["fit", "--config", str(base / "fit.yaml"), *own]) == 0
    (meta,) = base.glob("*/on/meta_000001.json")
    trained = find_checkpoint(meta)
    assert trained.stage == stage and not trained.weights_only
    assert equal(load_model_state(trained), load_model_state(trainable))
    if stage == "pretrain":  # it can be resumed
        assert main(["fit", "--config", str(base / "fit.yaml"), *own[:2], "--ckpt_path", "auto"]) == 0


def test_a_missing_optimizer_state_of_an_import_is_reported(
    trainable: Checkpoint, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (base / "fit.yaml").write_text(FITS["sft"])
    options = ["--model.warm_start_optimizer", "true", "--ckpt_path", str(trainable.paths.directory)]
    assert main(["fit", "--config", str(base / "fit.yaml"), *options]) == 2
    assert "was imported and has no optimizer state" in capsys.readouterr().err
