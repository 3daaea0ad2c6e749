"""lm-evaluation-harness on tasks with local data, compared with lmchat's own scores and engine."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'lmchat[harness]'")

from lm_eval.tasks import TaskManager

from lmchat.__main__ import main
from lmchat.checkpoint.load import find_checkpoint, load_model
from lmchat.evaluation import harness
from lmchat.evaluation.core import Example
from lmchat.evaluation.harness import HarnessModel
from lmchat.generation.policy import Policy
from lmchat.generation.sampling import SamplingParams
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.tokenizer.render import render_for_completion
from lmchat.types import UserError
from random_checkpoint import save_random_checkpoint
from reference_core import score_plainly

QUESTIONS = [
    {"question": f"What is {n} and {n + 1}?", "choices": [f"{2 * n}", f"{2 * n + 1} it is", "none"], "gold": n % 3}
    for n in range(7)
]
TEXTS = [{"text": "The quick brown fox jumps. " * n} for n in range(1, 5)]


def write_task(folder: Path, name: str, rows: Sequence[dict[str, Any]], **settings: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "num_fewshot": 0,
        **settings,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))


@pytest.fixture
def policy(base: Path, monkeypatch: pytest.MonkeyPatch) -> Policy:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(base / "datasets"))
    tokenizer = Tokenizer.load(base / "tokenizer")
    paths = save_random_checkpoint(tokenizer, sequence_len=64)
    return Policy(load_model(find_checkpoint(paths.directory)), tokenizer)


def results(base: Path, *options: str) -> dict[str, Any]:
    assert main(["eval", "--include_path", str(base / "tasks"), *options]) == 0
    (path,) = base.rglob("eval_000007.json")
    return json.loads(path.read_text())


def plainly(policy: Policy, context: str, continuation: str) -> tuple[float, bool]:
    """Log-probability of a continuation, token by token."""
    before, whole = ([policy.tokenizer.bos_id, *policy.tokenizer.encode(t)] for t in (context, context + continuation))
    ((found,),) = score_plainly(policy.net, [Example([whole], [(len(before), len(whole))], 0)])
    return -found.loss * (len(whole) - len(before)), found.greedy


def test_choices_equal_our_own_scores(base: Path, policy: Policy) -> None:
    write_task(
        base / "tasks",
        "tiny_choices",
        QUESTIONS,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{gold}}",
        metric_list=[{"metric": "acc"}],
    )
    found = results(base, "--harness", "tiny_choices")["harness/tiny_choices"]
    best = []
    for row in QUESTIONS:
        losses = [-plainly(policy, row["question"], f" {choice}")[0] for choice in row["choices"]]
        best.append(losses.index(min(losses)) == row["gold"])
    assert found["acc,none"] == pytest.approx(sum(best) / len(best))


def test_rolling_likelihoods_equal_bits_per_byte(base: Path, policy: Policy) -> None:
    write_task(
        base / "tasks",
        "tiny_text",
        TEXTS,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    found = results(base, "--harness", "tiny_text", "--limit", "2")["harness/tiny_text"]
    nats = -sum(plainly(policy, "", row["text"])[0] for row in TEXTS[:2])
    assert found["bits_per_byte,none"] == pytest.approx(
        nats / math.log(2) / sum(len(row["text"].encode()) for row in TEXTS[:2])
    )


def test_long_texts_are_read_in_windows(policy: Policy) -> None:
    text = "A text that is longer than the rows of training are. " * 12
    tokens = policy.tokenizer.encode(text)
    assert len(tokens) > 2 * policy.net.config.sequence_len
    request = type("Request", (), {"args": (text,)})
    (found,) = HarnessModel(policy).loglikelihood_rolling([request])
    total, length, bos = 0.0, policy.net.config.sequence_len, policy.tokenizer.bos_id
    for start in range(0, len(tokens), length):
        predicted = tokens[start : start + length]
        end = start + len(predicted)
        context = tokens[max(0, end - length - 1) : start] or [bos]
        logits = policy.net(torch.tensor([[*context, *predicted[:-1]]]))[0].log_softmax(-1)
        rows = logits[len(context) - 1 :]
        total += float(rows[torch.arange(len(predicted)), torch.tensor(predicted)].sum())
    assert found == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("chat", [False, True])
def test_answers_equal_the_engine(chat: bool, base: Path, policy: Policy) -> None:
    tokenizer, params = policy.tokenizer, SamplingParams(temperature=0, max_new_tokens=12)
    rows = []
    for row in QUESTIONS:
        question = row["question"]
        prompt = [tokenizer.bos_id, *tokenizer.encode(question)]
        if chat:
            prompt = render_for_completion(tokenizer, {"messages": [{"role": "user", "content": question}]})
        ((answer,),) = policy.engine.generate([prompt], params)
        text = tokenizer.decode(answer.content)
        rows.append({"question": question, "answer": text.partition("e")[0]})
    write_task(
        base / "tasks",
        "tiny_answers",
        rows,
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["e"], "max_gen_toks": 12},
        metric_list=[{"metric": "exact_match"}],
    )
    options = ["--harness", "tiny_answers", "--chat_template", str(chat).lower()]
    assert results(base, *options)["harness/tiny_answers"]["exact_match,none"] == 1.0


def test_the_chat_template_parses_to_the_same_conversation(policy: Policy) -> None:
    model = HarnessModel(policy, chat=True)
    history = [{"role": "user", "content": "Hi <there>"}, {"role": "assistant", "content": "Yes"}]
    history.append({"role": "user", "content": "And?"})
    ids = render_for_completion(policy.tokenizer, {"messages": history})  # type: ignore[typeddict-item]
    assert model.encode(model.apply_chat_template(history)) == ids
    unfinished = model.encode(model.apply_chat_template(history[:2], add_generation_prompt=False))
    assert unfinished[-1] == policy.tokenizer.encode("Yes")[-1]


def test_unknown_tasks_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def without_index(include_path: str | None, include_defaults: bool) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(harness, "TaskManager", without_index)
    write_task(tmp_path / "tasks", "tiny", QUESTIONS, output_type="multiple_choice")
    with pytest.raises(UserError, match="the harness has no task 'nonsense_task'"):
        harness.evaluate_harness(None, ["tiny", "nonsense_task"], include_path=tmp_path / "tasks")  # type: ignore[arg-type]
