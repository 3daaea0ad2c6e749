"""CORE of a Hugging Face model, a tiny random GPT-2, compared with a direct implementation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from core_bundle import write_bundle
from lmchat.__main__ import main
from lmchat.evaluation.core import examples, read_bundle
from lmchat.evaluation.core_scoring import is_correct
from lmchat.evaluation.hf_model import HFModel


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = tmp_path_factory.mktemp("gpt2")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=257, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    net = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    net.save_pretrained(path)
    return path


def directly(model: HFModel, option: list[int], start: int, end: int) -> tuple[float, bool]:
    """Mean loss of the tokens from ``start`` to ``end``, and whether each is the most likely one."""
    logits = model.net(torch.tensor([option])).logits[0]
    losses = [-float(logits[place - 1].log_softmax(0)[option[place]]) for place in range(start, end)]
    greedy = [int(logits[place - 1].argmax()) == option[place] for place in range(start, end)]
    return sum(losses) / len(losses), all(greedy)


def test_scores_equal_a_direct_implementation(gpt2: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "eval_bundle", broken=False)
    model = HFModel(gpt2)
    assert model.bos_id == 256 and model.context_limit == 32
    output = tmp_path / "results.json"
    command = ["eval", "--model", f"hf:{gpt2}", "--core", str(tmp_path / "eval_bundle"), "--output", str(output)]
    assert main(command) == 0
    results = json.loads(output.read_text())
    for task in read_bundle(tmp_path / "eval_bundle"):
        found = list(examples(task, model, max_tokens=32))
        scores = model.score(found)
        with torch.no_grad():
            for example, options in zip(found, scores, strict=True):
                for score, option, span in zip(options, example.options, example.spans, strict=True):
                    loss, greedy = directly(model, option, *span)
                    assert (score.loss, score.greedy) == (pytest.approx(loss, rel=1e-5), greedy)
        correct = sum(is_correct(task.kind, *pair) for pair in zip(found, scores, strict=True))
        assert results[task.name]["accuracy"] == correct / len(found)
    assert {"CORE", "sums", "capitals"} == results.keys()


def test_an_invalid_model_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(tmp_path / "eval_bundle")
    core = ["--core", str(tmp_path / "eval_bundle")]
    for model, options, message in (
        (f"hf:{tmp_path}", core, "has no causal language model"),
        ("gpt2", core, "give hf:PATH"),
        (f"hf:{tmp_path}", [], "are evaluated on CORE"),
    ):
        assert main(["eval", "--model", model, *options]) == 2
        assert message in capsys.readouterr().err
