"""``lmchat eval``: a checkpoint on chat benchmarks or on CORE."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path


@dataclass(frozen=True)
class SandboxOptions:
    """How generated programs are run (HumanEval).

    Args:
        allow_weak: run them even if this kernel refuses a protection.
        seconds: time limit of a program.
    """

    allow_weak: bool = False
    seconds: float = 5.0


STRICT = SandboxOptions()


def evaluate(
    checkpoint: Path | None = None,
    model: str | None = None,
    tasks: list[str] | None = None,
    limit: int | None = None,
    core: str | None = None,
    max_tokens: int | None = None,
    harness: str | None = None,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    batch_size: int = 32,
    max_new_tokens: int = 512,
    tokenizer: Path | None = None,
    output: Path | None = None,
    sandbox: SandboxOptions = STRICT,
) -> None:
    """Evaluate a checkpoint on chat benchmarks (ARC, MMLU, GSM8K, HumanEval, spelling), on CORE or with lm-eval.

    Multiple choice is scored by the most likely letter, other tasks by greedy answers. Results are saved after each
    task; the same command continues an interrupted evaluation. Several devices share the questions:
    torchrun --nproc_per_node 8 -m lmchat eval ...

    Args:
        checkpoint: folder or file of a checkpoint; default is the newest of the last stage that has one.
        model: hf:PATH for a local model of the transformers library in place of a checkpoint, with --core.
        tasks: names from ARC-Easy, ARC-Challenge, MMLU, GSM8K, HumanEval, SpellingBee, SimpleSpelling, each also as
            NAME=PATH with a local copy of its data (of the spelling tasks: a word list), as in [GSM8K=test.jsonl,MMLU];
            default is the first six, whose mean is ChatCORE.
        limit: maximum number of questions per task.
        core: folder or zip file of the evaluation bundle, or default for $LMCHAT_BASE_DIR/eval_bundle; evaluates its 22
            tasks in place of the chat benchmarks, or those of them that --tasks names.
        max_tokens: maximum prompt length for CORE; longer prompts keep their end. Default is the model's limit.
        harness: tasks of lm-evaluation-harness, as in arc_easy,hellaswag, in place of the chat benchmarks.
        include_path: folder with further tasks of the harness.
        num_fewshot: solved examples before each question of a harness task; default is the task's.
        chat_template: render the prompts of harness tasks with the chat template.
        batch_size: number of multiple-choice questions per batch.
        max_new_tokens: maximum number of tokens of an answer.
        tokenizer: folder of its tokenizer; default is the one beside the checkpoint folders, or else
            $LMCHAT_BASE_DIR/tokenizer.
        output: file of the results; default is eval_STEP.json beside the checkpoint.
        sandbox: how generated programs are run.
    """
    from lmchat.commands import evaluations
    from lmchat.evaluation.chat_core import make_tasks
    from lmchat.evaluation.sandbox import Limits, Sandbox
    from lmchat.option_checks import check_count
    from lmchat.types import UserError

    if model and (harness or not core):
        raise UserError(
            f"--model is {model}; Hugging Face models are evaluated on CORE only: add --core eval_bundle.zip"
        )
    check_count("", 1, batch_size=batch_size, max_new_tokens=max_new_tokens, limit=limit, max_tokens=max_tokens)
    load = partial(evaluations.load_subject, checkpoint, tokenizer, output)
    if model:
        load = partial(evaluations.load_hf_subject, model, output)
    if harness:
        evaluations.require_harness()
    with evaluations.joined_processes():
        if harness:
            options = {"limit": limit, "num_fewshot": num_fewshot, "chat_template": chat_template}
            evaluations.run_harness(load(), harness.split(","), include_path, options)
        elif core:
            evaluations.run_core(core, tasks, load, limit, max_tokens)
        else:
            isolation = Sandbox(sandbox.allow_weak, Limits(seconds=sandbox.seconds))
            questions = make_tasks(tasks, limit, isolation)
            evaluations.run_chat(
                load(), questions, batch_size=batch_size, max_new_tokens=max_new_tokens, sandbox=isolation
            )


COMMANDS = evaluate
