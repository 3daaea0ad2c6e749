"""``lmchat eval``: accuracy of a checkpoint on chat benchmarks or on CORE."""

from __future__ import annotations

from pathlib import Path


def evaluate(
    checkpoint: Path | None = None,
    tasks: list[str] | None = None,
    limit: int | None = None,
    core: Path | None = None,
    max_tokens: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 256,
    tokenizer: Path | None = None,
    output: Path | None = None,
) -> None:
    """Evaluate a checkpoint on chat benchmarks (ARC, MMLU, GSM8K, spelling) or on CORE.

    Multiple choice is scored by the most likely letter, the other tasks by greedy answers. Results are written task by
    task; the same command continues an interrupted evaluation.

    Args:
        checkpoint: folder or file of a checkpoint; default is the newest of the last stage that has one.
        tasks: names from ARC-Easy, ARC-Challenge, MMLU, GSM8K, SpellingBee, SimpleSpelling, each also as NAME=PATH with
            a local copy of its data (of the spelling tasks: a word list), as in [GSM8K=test.jsonl,MMLU]; default is
            the first five.
        limit: maximum number of questions per task.
        core: folder or zip file of the evaluation bundle; evaluates its 22 tasks in place of the chat benchmarks, or
            those of them that --tasks names.
        max_tokens: longest prompt of CORE, of which the end is kept; default is the model's limit.
        batch_size: questions answered together.
        max_new_tokens: maximum number of tokens of an answer.
        tokenizer: folder of its tokenizer; default is the one beside the folders of checkpoints, or else
            $LMCHAT_BASE_DIR/tokenizer.
        output: file of the results; default is eval_STEP.json beside the checkpoint.
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from lmchat.checkpoint.load import find_model, load_model, load_tokenizer
    from lmchat.evaluation.core import choose, read_bundle
    from lmchat.evaluation.named import TASKS, centered_mean, evaluate_core, evaluate_tasks, make_task
    from lmchat.evaluation.results import results_file
    from lmchat.generation.policy import Policy
    from lmchat.option_checks import check_count

    check_count("eval", 1, batch_size=batch_size, max_new_tokens=max_new_tokens, **({"limit": limit} if limit else {}))
    core_tasks = choose(read_bundle(core), tasks) if core else []
    chosen = {} if core else {spec.partition("=")[0]: make_task(spec, limit) for spec in tasks or list(TASKS)[:5]}
    found = find_model(checkpoint)
    net = load_model(found, "cuda" if torch.cuda.is_available() else "cpu")
    policy = Policy(net, load_tokenizer(found, tokenizer))
    path = output or results_file(found.paths.directory, found.step)
    console, results = Console(), {}
    console.print(f"{found.stage} {found.meta['tag']}, step {found.step}", highlight=False)
    options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    running = (
        evaluate_core(policy, core_tasks, path, max_per_task=limit, max_tokens=max_tokens)
        if core
        else evaluate_tasks(policy, chosen, path, **options)
    )
    for name, result in running:
        results[name] = result
        shown = f"{result['accuracy']:.1%}" if "accuracy" in result else f"failed: {result['error']}"
        console.print(f"  {name}: {shown}", highlight=False, soft_wrap=True)
    table = Table("task", "questions", "accuracy", "95 % interval", "seconds")
    for name, result in results.items():
        if "accuracy" in result:
            low, high = result["interval_95"]
            interval = f"{low:.1%} … {high:.1%}"
            table.add_row(name, str(result["questions"]), f"{result['accuracy']:.1%}", interval, str(result["seconds"]))
    mean = centered_mean(results, list(results))
    if mean is not None:
        table.add_section()
        table.add_row("CORE" if core and tasks is None else "centered mean", "", f"{mean:.3f}", "", "")
    console.print(table)
    console.print(f"Results are in {path}", soft_wrap=True, highlight=False)


COMMANDS = evaluate
