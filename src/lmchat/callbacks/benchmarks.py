"""CORE and ChatCORE during training."""

from abc import abstractmethod
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lmchat.callbacks.checkpoint import StepCheckpoint
from lmchat.evaluation.benchmark import Benchmark, summary
from lmchat.evaluation.chat_core import ChatCoreEvaluator, make_tasks
from lmchat.evaluation.core import read_bundle
from lmchat.evaluation.core_evaluator import CoreEvaluator
from lmchat.evaluation.results import read_results, results_file
from lmchat.evaluation.sandbox import Sandbox
from lmchat.files import write_json
from lmchat.model.gpt import ROTARY_ROWS
from lmchat.option_checks import check_count
from lmchat.paths import eval_bundle_dir, expand_user
from lmchat.types import UserError


class BenchmarkCallback(Callback):
    """Adds a benchmark to the evaluators, and writes its results to ``eval_STEP.json`` beside the checkpoints."""

    enabled: bool
    _evaluator: Benchmark | None = None

    @abstractmethod
    def evaluator(self, trainer: L.Trainer) -> Benchmark:
        """Creates the evaluator. Raises UserError if its data is not there."""

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if self.enabled:
            self._evaluator = self.evaluator(trainer)
            trainer.datamodule.evaluators.append(self._evaluator)  # type: ignore[attr-defined]

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        evaluator = self._evaluator
        if evaluator is None or not evaluator.results or trainer.state.fn != TrainerFn.FITTING:
            return
        results, evaluator.results = evaluator.results, {}
        if not trainer.is_global_zero:
            return
        try:
            (checkpoints,) = (each for each in trainer.checkpoint_callbacks if isinstance(each, StepCheckpoint))
            path = results_file(checkpoints.directory, trainer.global_step)
            settings = {name: evaluator.settings(number) for number, name in enumerate(evaluator.task_names)}
            mean = summary(results)
            written = {name: settings[name] | results[name] for name in results}
            write_json(path, read_results(path) | written | ({evaluator.mean_name: mean} if mean else {}))
        except (UserError, OSError, MemoryError) as error:
            rank_zero_warn(f"the results of {evaluator.mean_name} are only in the logs: {error}")


class Core(BenchmarkCallback):
    """CORE every ``every_n_steps`` optimizer steps and at the end, after the checkpoint of that step.

    Off unless ``bundle`` or ``every_n_steps`` is given. Logged as ``val/core`` and ``val/core/TASK``, and written to
    ``eval_STEP.json`` in the folder of the checkpoints.

    Args:
        bundle: folder or zip file of the evaluation bundle; null is ``$LMCHAT_BASE_DIR/eval_bundle``, where
            ``lmchat data download --eval_bundle true`` puts it.
        every_n_steps: optimizer steps between evaluations; null evaluates at the end only.
        max_per_task: maximum number of examples of a task; null is all of them.
    """

    def __init__(
        self, bundle: str | None = None, every_n_steps: int | None = None, max_per_task: int | None = 500
    ) -> None:
        check_count("core", 1, every_n_steps=every_n_steps, max_per_task=max_per_task)
        self.enabled = bundle is not None or every_n_steps is not None
        self.bundle = bundle
        self.every_n_steps = every_n_steps
        self.max_per_task = max_per_task

    def evaluator(self, trainer: L.Trainer) -> CoreEvaluator:
        spec = trainer.datamodule.spec  # type: ignore[attr-defined]
        return CoreEvaluator(
            read_bundle(expand_user(self.bundle) if self.bundle else eval_bundle_dir()),
            spec.tokenizer,
            max_tokens=ROTARY_ROWS * spec.sequence_len,
            max_per_task=self.max_per_task,
            every_n_steps=self.every_n_steps or 0,
            device=trainer.strategy.root_device,
        )


class ChatCore(BenchmarkCallback):
    """ChatCORE every ``every_n_steps`` optimizer steps and at the end, after the checkpoint of that step.

    Off unless ``tasks`` or ``every_n_steps`` is given. Logged as ``val/chat_core`` and ``val/chat_core/TASK``, and
    written to ``eval_STEP.json`` in the folder of the checkpoints.

    Args:
        tasks: as in ``lmchat eval``: NAME, or NAME=PATH with a local copy of the data; null is ARC-Easy, ARC-Challenge,
            MMLU, GSM8K, HumanEval and SpellingBee. The mean is over these tasks.
        every_n_steps: optimizer steps between evaluations; null evaluates at the end only.
        max_per_task: maximum number of questions of a task; null is all of them.
        batch_size: number of multiple-choice questions per batch.
        max_new_tokens: maximum number of new tokens of an answer.
        allow_weak: run the programs of HumanEval even if this kernel refuses a protection.
    """

    def __init__(
        self,
        tasks: list[str] | None = None,
        every_n_steps: int | None = None,
        max_per_task: int | None = 128,
        batch_size: int = 32,
        max_new_tokens: int = 256,
        allow_weak: bool = False,
    ) -> None:
        self.sizes = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
        check_count("chat_core", 1, every_n_steps=every_n_steps, max_per_task=max_per_task, **self.sizes)
        self.enabled = tasks is not None or every_n_steps is not None
        self.tasks = tasks
        self.every_n_steps = every_n_steps
        self.max_per_task = max_per_task
        self.sandbox = Sandbox(allow_weak, option="--chat_core.allow_weak")

    def evaluator(self, trainer: L.Trainer) -> ChatCoreEvaluator:
        tasks = make_tasks(self.tasks, self.max_per_task, self.sandbox)
        for name, task in tasks.items():
            if not len(task):
                raise UserError(f"--chat_core.tasks: {name} has no questions; leave it out, or give another file")
        return ChatCoreEvaluator(
            tasks,
            sandbox=self.sandbox,
            every_n_steps=self.every_n_steps or 0,
            device=trainer.strategy.root_device,
            **self.sizes,
        )
