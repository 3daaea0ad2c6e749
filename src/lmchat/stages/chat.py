"""Base classes of fine-tuning and reinforcement learning: start from a checkpoint, evaluate on questions."""

from typing import Any, Literal, cast

import torch

from lmchat.checkpoint.load import Checkpoint, load_rank_state
from lmchat.data.mixture import Mixture
from lmchat.evaluation.chat_tasks import ChatTaskEvaluator
from lmchat.evaluation.evaluator import Evaluator
from lmchat.model.config import GPTConfig
from lmchat.optim.muon_adamw import MuonAdamW
from lmchat.optim.param_groups import LEARNING_RATES
from lmchat.option_checks import check_count, check_range
from lmchat.stage_table import STAGES
from lmchat.stages.base import StageModule
from lmchat.stages.data_module import StageDataModule
from lmchat.tasks.base import Task, graded
from lmchat.types import UserError


class ChatModule(StageModule):
    """A stage that takes its network, and settings that are null, from a checkpoint of this or an earlier stage.

    Args:
        init_lr_fraction: factor on every learning rate.
        embedding_lr: AdamW learning rate of the token and value embeddings at width 768. Where the stage has no
            default, null takes the checkpoint's, as for the other learning rates. None of them scales with the batch.
        unembedding_lr: AdamW learning rate of the output head, likewise.
        matrix_lr: Muon learning rate of the blocks' matrices.
        scalar_lr: AdamW learning rate of the residual scalars.
        warm_start_optimizer: start with the optimizer moments of the earlier stage instead of zeros. Learning rates,
            momentum and weight decay are those of this stage in either case.
    """

    def __init__(
        self,
        *,
        init_lr_fraction: float = 1.0,
        weight_decay: float = 0.0,
        embedding_lr: float | None = None,
        unembedding_lr: float | None = None,
        matrix_lr: float | None = None,
        scalar_lr: float | None = None,
        warm_start_optimizer: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(weight_decay=weight_decay, **kwargs)
        self.lr_scale = init_lr_fraction
        given = zip(LEARNING_RATES, (embedding_lr, unembedding_lr, matrix_lr, scalar_lr), strict=True)
        self._given_learning_rates = {name: lr for name, lr in given if lr is not None}
        check_range("model", init_lr_fraction=init_lr_fraction, **self._given_learning_rates)
        self.warm_start_optimizer = warm_start_optimizer
        self.default_tag = self.stage

    def checkpoint_missing(self) -> UserError:
        """The error for a run without a checkpoint to start from."""
        return UserError(
            f"{self.stage} starts from a checkpoint; give one of stage {' or '.join(STAGES[self.stage].predecessors)} "
            "with --ckpt_path, e.g. its folder"
        )

    def configure_model(self) -> None:
        if not hasattr(self, "config"):
            raise self.checkpoint_missing()
        super().configure_model()

    def load_from(self, checkpoint: Checkpoint) -> None:
        super().load_from(checkpoint)
        self.config = GPTConfig(**checkpoint.meta["model"])
        self.sequence_len = self.config.sequence_len
        self.default_tag = checkpoint.meta["tag"]
        self.learning_rates = {**checkpoint.meta["learning_rates"], **self._given_learning_rates}
        if self.global_batch_tokens is None:
            self.global_batch_tokens = checkpoint.meta["global_batch_tokens"]
        if checkpoint.weights_only and self.warm_start_optimizer:
            raise UserError(
                f"{checkpoint.paths.meta} was imported and has no optimizer state; leave out "
                "--model.warm_start_optimizer true"
            )

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self._start is not None and self.warm_start_optimizer:
            # Hyperparameters stay as they are.
            (optimizer,), ranks = self.trainer.optimizers, range(self._start.meta["world_size"])
            states = [load_rank_state(self._start, rank)["optimizer_states"] for rank in ranks]
            cast(MuonAdamW, optimizer).load_state_dict([state for (state,) in states])
        self._start = None

    def share_of_step(self, loss_sum: torch.Tensor, loss_tokens: int) -> torch.Tensor:
        """A micro-batch's share of the optimizer step's mean loss over ``loss_tokens`` tokens.

        Compensates the trainer's division by the number of micro-batches and the strategy's mean over ranks, so that
        every token of the step has the same weight.
        """
        return loss_sum * (self.trainer.accumulate_grad_batches * self.trainer.world_size / loss_tokens)


class ChatDataModule(StageDataModule):
    """Data of a stage that is evaluated by answers to questions; for the arguments see `SFTDataModule`."""

    mixtures: dict[str, Mixture]
    """Mixtures of conversations by split."""

    def __init__(
        self,
        micro_batch_size: int | Literal["auto"] | None,
        eval_tasks: list[Task] | None,
        eval_batch_size: int,
        eval_max_new_tokens: int,
    ) -> None:
        super().__init__(micro_batch_size)
        check_count("data", 1, eval_batch_size=eval_batch_size, eval_max_new_tokens=eval_max_new_tokens)
        self.eval_tasks = eval_tasks or []
        for task in self.eval_tasks:
            graded(task)
        names = [task.name for task in self.eval_tasks]
        if len(set(names)) < len(names):
            raise UserError(f"--data.eval_tasks are {', '.join(names)}: names must differ; leave one of them out")
        self.eval_batch_size = eval_batch_size
        self.eval_max_new_tokens = eval_max_new_tokens

    def task_evaluators(self) -> list[Evaluator]:
        """One evaluator per task of ``eval_tasks``."""
        return [ChatTaskEvaluator(task, self.eval_batch_size, self.eval_max_new_tokens) for task in self.eval_tasks]
