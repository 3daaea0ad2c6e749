"""CORE compared with the oracle's prompts, tokens and spans, and with scoring one option at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from core_bundle import write_bundle
from forked import exit_statuses, lmchat, start_ranks
from lmchat.checkpoint.load import find_checkpoint, load_model
from lmchat.commands.eval import evaluate
from lmchat.evaluation.benchmark import centered
from lmchat.evaluation.core import (
    CoreTask,
    Example,
    choose,
    examples,
    fewshot_indices,
    make_example,
    read_bundle,
    render_prompts,
)
from lmchat.evaluation.core_scoring import OptionScore, batches_by_length, is_correct, score
from lmchat.evaluation.prompt_trees import PromptTree
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import UserError
from random_checkpoint import save_random_checkpoint
from random_weights import with_random_weights
from reference_core import score_plainly

BYTES = Tokenizer({bytes([byte]): byte for byte in range(256)})


@pytest.fixture(scope="module")
def net() -> GPT:
    config = GPTConfig(
        sequence_len=64, vocab_size=BYTES.vocab_size, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL"
    )
    return with_random_weights(GPT(config), 0.3, seed=3)


def test_prompts_tokens_and_spans_match_the_oracle(oracles: Path) -> None:
    oracle = json.loads((oracles / "c13_core.json").read_text())
    tokenizer = Tokenizer.import_file(oracles / oracle["tokenizer"])
    for case in oracle["cases"]:
        items = oracle["data"][case["kind"]]
        chosen = fewshot_indices(case["idx"], len(items), case["num_fewshot"])
        assert chosen == case["fewshot_indices"]
        item = items[case["idx"]]
        prompts = render_prompts(case["kind"], item, [items[index] for index in chosen], case["delimiter"])
        assert prompts == case["prompts"]
        example = make_example(case["kind"], prompts, 0, tokenizer)
        assert example.options == case["tokens"][-len(example.options) :]
        assert example.spans == list(zip(case["start"], case["end"], strict=True))
    for name, expected in oracle["fewshot_examples"].items():
        num_items, index, count = (int(part.strip("nkidx")) for part in name.split("_"))
        assert fewshot_indices(index, num_items, count) == expected


def test_items_are_shuffled_as_in_the_reference(oracles: Path, tmp_path: Path) -> None:
    expected = json.loads((oracles / "c13_core.json").read_text())["shuffle_1337_of_range30"]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(map(str, range(30))))
    task = CoreTask("numbers", "schema", path, 0, " ", 0.5)
    assert task.items() == expected
    assert task.items(max_items=7) == expected[:7]


def many_examples() -> list[tuple[str, Example]]:
    found = []
    for number in range(9):
        context = "why? " * (1 + 7 * number)
        found.append(
            ("multiple_choice", make_example("multiple_choice", [context + c for c in ("ab", "b", "abc")], 1, BYTES))
        )
        found.append(("schema", make_example("schema", [f"{context} {c} was big" for c in ("it", "that")], 0, BYTES)))
        found.append(("language_modeling", make_example("language_modeling", [context, context + "a"], 0, BYTES)))
    return found


@pytest.mark.parametrize("max_batch_tokens", [1, 300, 100_000])
def test_batched_scores_equal_scores_one_by_one(net: GPT, max_batch_tokens: int) -> None:
    kinds, all_examples = zip(*many_examples(), strict=True)
    plain, found = score_plainly(net, all_examples), {}
    for batch in batches_by_length(all_examples, max_batch_tokens):
        assert len(batch) == 1 or sum(PromptTree.of(all_examples[i]).num_tokens for i in batch) <= max_batch_tokens
        found |= dict(zip(batch, score(net, [all_examples[index] for index in batch]), strict=True))
    batched = [found[index] for index in range(len(all_examples))]
    for kind, example, expected, scores in zip(kinds, all_examples, plain, batched, strict=True):
        assert [each.loss for each in scores] == pytest.approx([each.loss for each in expected], rel=1e-5)
        assert [each.greedy for each in scores] == [each.greedy for each in expected]
        assert is_correct(kind, example, scores) == is_correct(kind, example, expected)


def test_equal_options_tie_and_the_first_wins(net: GPT) -> None:
    example = make_example("multiple_choice", ["a long question? " + c for c in ("x", "yy", "yy")], 1, BYTES)
    (scores,) = score(net, [example])
    assert scores[1] == scores[2]
    assert is_correct("multiple_choice", example, [OptionScore(2, False), OptionScore(1, False), OptionScore(1, False)])


def test_long_prompts_are_truncated_on_the_left_and_cut_answers_counted() -> None:
    whole = make_example("multiple_choice", ["question: " + c for c in ("aa", "bbbb")], 0, BYTES)
    short = make_example("multiple_choice", ["question: " + c for c in ("aa", "bbbb")], 0, BYTES, max_tokens=6)
    assert not whole.cut and not short.cut
    for option, span, long, long_span in zip(short.options, short.spans, whole.options, whole.spans, strict=True):
        assert option == long[-6:]
        assert option[slice(*span)] == long[slice(*long_span)]
    cut = make_example("multiple_choice", ["question: " + c for c in ("aa", "bbbb")], 0, BYTES, max_tokens=4)
    assert cut.cut
    assert [option[slice(*span)] for option, span in zip(cut.options, cut.spans, strict=True)] == [
        BYTES.encode("aa"), BYTES.encode("bbb"),
    ]  # fmt: skip


def test_ranks_share_the_items_and_bad_items_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    items = [{"context": f"number {index} is", "continuation": str(index)} for index in range(11)]
    path.write_text("\n".join(map(json.dumps, items)))
    task = CoreTask("numbers", "language_modeling", path, 2, " ", 0.0)
    whole = list(examples(task, BYTES, max_items=9))
    shares = [list(examples(task, BYTES, max_items=9, rank=rank, world_size=2)) for rank in range(2)]
    assert (whole[::2], whole[1::2]) == tuple(shares)
    path.write_text('{"context": "a"}\n' * 3)
    with pytest.raises(UserError, match="an item is not valid for a language_modeling task"):
        list(examples(task, BYTES))


def test_the_command_evaluates_a_checkpoint_on_a_bundle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bundle(tmp_path / "eval_bundle")
    shutil.make_archive(str(tmp_path / "bundle"), "zip", tmp_path, "eval_bundle")
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path / "base"))
    BYTES.save(tmp_path / "base" / "tokenizer")
    paths = save_random_checkpoint(BYTES)
    with pytest.raises(UserError, match="1 of 3 tasks failed; the same command repeats broken"):
        evaluate(core=str(tmp_path / "bundle.zip"))
    results = json.loads((paths.directory / "eval_000007.json").read_text())
    assert results["broken"].keys() == {"limit", "max_tokens", "data", "weights", "error", "seconds"}
    net = load_model(find_checkpoint(paths.directory), "cpu")
    for task in read_bundle(tmp_path / "eval_bundle")[:2]:
        found = list(examples(task, BYTES))
        correct = sum(is_correct(task.kind, *pair) for pair in zip(found, score_plainly(net, found), strict=True))
        assert results[task.name]["accuracy"] == correct / 5
        assert results[task.name]["centered"] == centered(correct / 5, task.baseline)
        assert results[task.name]["cut"] == 0
    evaluate(core=str(tmp_path / "eval_bundle"), tasks=["sums"], limit=3)
    assert json.loads((paths.directory / "eval_000007.json").read_text())["sums"]["questions"] == 3
    assert "CORE" not in capsys.readouterr().out.splitlines()[-1]  # one task failed: there is no mean


def test_two_processes_share_the_examples_and_get_the_same_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_bundle(tmp_path / "eval_bundle")
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path / "base"))
    BYTES.save(tmp_path / "base" / "tokenizer")
    save_random_checkpoint(BYTES, sequence_len=256)
    questions = [{"question": f"{i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(3)]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, questions)))
    choices = {"text": ["x", "y"], "label": ["A", "B"]}
    rows = [{"question": f"{i}?", "choices": choices, "answerKey": "AB"[i % 2]} for i in range(9)]
    (tmp_path / "arc.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chat = f"--tasks=[ARC-Easy={tmp_path}/arc.jsonl,GSM8K={tmp_path}/gsm8k.jsonl]"
    for number, options in enumerate(([f"--core={tmp_path}/eval_bundle"], [chat, "--max_new_tokens=4"])):
        results = []
        for world_size in (1, 2):
            output = tmp_path / f"{number}_{world_size}.json"
            ranks = start_ranks(world_size, lmchat, "eval", *options, f"--output={output}", folder=tmp_path)
            status = 2 if number == 0 else 0  # the task broken fails
            assert exit_statuses(ranks) == [status] * world_size, (tmp_path / "output_rank0.txt").read_text()
            results.append({
                name: {key: value for key, value in result.items() if key != "seconds"}
                for name, result in json.loads(output.read_text()).items()
            })  # fmt: skip
        assert results[0] == results[1] and len(results[0]) >= 2
        assert any(0 < result.get("accuracy", 0) < 1 for result in results[0].values())
    other_rank = (tmp_path / "output_rank1.txt").read_text()
    assert "accuracy" not in other_rank and "tasks failed" not in other_rank
    harness = start_ranks(2, lmchat, "eval", "--harness", "arc_easy", folder=tmp_path)
    assert exit_statuses(harness) == [2, 2]
    assert "--harness evaluates in one process" in (tmp_path / "output_rank0.txt").read_text()


@pytest.mark.parametrize("baseline", ["100", "nan", "-1", "x"])
def test_an_impossible_baseline_is_refused(baseline: str, tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", broken=False)
    (tmp_path / "bundle" / "eval_meta_data.csv").write_text(f"Eval Task,Random baseline\ncapitals,0\nsums,{baseline}\n")
    with pytest.raises(UserError, match="is not an evaluation bundle"):
        read_bundle(tmp_path / "bundle")


def test_an_invalid_bundle_is_reported(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_text("no zip")
    for path in (tmp_path, tmp_path / "x.zip"):
        with pytest.raises(UserError, match="is not an evaluation bundle"):
            read_bundle(path)
    with pytest.raises(UserError, match=r"there is no evaluation bundle at .*missing; get it with"):
        read_bundle(tmp_path / "missing")
    with pytest.raises(UserError, match="no CORE task 'hellaswagg'; choose from hellaswag"):
        choose([CoreTask("hellaswag", "schema", tmp_path, 0, " ", 0.5)], ["hellaswagg"])


def test_chance_is_centered_at_zero() -> None:
    assert centered(0.25, 0.25) == 0
    assert centered(1.0, 0.25) == 1
    assert centered(0.4, 0.2) == pytest.approx(0.25)
