"""Reinforcement learning on questions with gradable answers: on-policy samples, advantages within each group."""

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch.utils.data import DataLoader

import lmchat.tasks  # noqa: F401  (makes every task known by its short class name)
from lmchat.data.mixture import Mixture, MixturePart, conversation_checksums, fingerprint
from lmchat.evaluation.pass_at_k import PassAtKEvaluator
from lmchat.generation.sampling import SamplingParams
from lmchat.option_checks import check_count, check_range
from lmchat.rl.group_row import GroupRow
from lmchat.rl.rollouts import Rollouts
from lmchat.run_plan import RunPlan, groups_per_rank
from lmchat.schedules import linear_decay
from lmchat.stages.base import Schedule
from lmchat.stages.chat import ChatDataModule, ChatModule
from lmchat.strategies.zero2_muon import Zero2MuonStrategy, reduce_numbers
from lmchat.tasks.base import Task, graded
from lmchat.types import IGNORE_INDEX, Rollout, UserError


class GRPOModule(ChatModule):
    """Policy gradient on groups of samples: −Σ log p · advantage, without ratio, clipping or KL term.

    GRPO (arXiv:2402.03300) simplified as in nanochat. Each step draws new samples, so it is on-policy: exactly at
    temperature 1 and without top-k.

    Args:
        normalization: divisor of the sum. "step": sampled tokens of the optimizer step (DAPO, arXiv:2503.14476).
            "group": sampled tokens of each group, then the mean over groups, as in nanochat if one pass holds a group
            (nanochat normalizes each pass by itself).
        momentum: momentum of Muon, without a ramp.
        embedding_lr: AdamW learning rate of the token and value embeddings, whatever the checkpoint's.

    The network reads the prompt of a group once. Blocks are not compiled, since shapes differ from step to step.

    The metric ``logprob_gap`` is the mean absolute difference between the engine's log-probabilities of the sampled
    tokens and those of the training pass, in nats: how far from on-policy a step is.
    """

    stage: ClassVar[str] = "rl"
    packed_rows: ClassVar[bool] = False
    samples_in_training: ClassVar[bool] = True

    def __init__(
        self,
        normalization: Literal["step", "group"] = "step",
        momentum: float = 0.95,
        *,
        embedding_lr: float = 0.2,
        init_lr_fraction: float = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(embedding_lr=embedding_lr, init_lr_fraction=init_lr_fraction, **kwargs)
        self.normalization = normalization
        check_range("model", 1, momentum=momentum)
        self.momentum = momentum
        self._gap: torch.Tensor | None = None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.trainer.world_size > 1 and not isinstance(self.trainer.strategy, Zero2MuonStrategy):
            raise UserError(
                "RL on several processes needs --trainer.strategy zero2_muon: where no sample of a process has a "
                "gradient, the others would wait for it; use that strategy, or --trainer.devices 1"
            )

    def schedule(self, step: int) -> Schedule:
        return Schedule(linear_decay(step, self.trainer.max_steps), self.momentum, self.plan.weight_decay)

    def training_step(self, batch: Rollout, batch_idx: int) -> torch.Tensor:
        if not batch["inputs"].numel():
            # No gradients, so that a step without samples changes no optimizer state.
            loss = self.net.lm_head.weight.new_zeros((), requires_grad=True)
        elif self.normalization == "group":
            loss = self._policy_loss(batch) / batch["group_tokens"]
        else:
            loss = self.share_of_step(self._policy_loss(batch), batch["loss_tokens"])
        self.track_loss(loss)
        return loss

    def _policy_loss(self, batch: Rollout) -> torch.Tensor:
        """−Σ log p(token) · advantage over the sampled tokens."""
        targets, advantages = batch["targets"], batch["advantages"]
        row = GroupRow(batch["prompt_tokens"], batch["sample_tokens"], targets.device)
        losses = torch.zeros_like(batch["logprobs"])
        loss = self.net.loss(batch["inputs"], targets, "sum", advantages, token_losses=losses, kv_cache=row)
        sampled = targets != IGNORE_INDEX
        gap = torch.where(sampled, losses / advantages + batch["logprobs"], 0.0)
        sums = torch.stack([gap.abs().sum(), sampled.sum()])
        self._gap = sums if self._gap is None else self._gap + sums
        return loss

    def pop_step_metrics(self) -> dict[str, torch.Tensor]:
        gap, tokens = torch.zeros(2, device=self.device) if self._gap is None else self._gap
        self._gap = None
        return {"logprob_gap": gap / tokens.clamp(min=1)}


class RolloutDataModule(ChatDataModule):
    """Samples answers to questions from the current policy and grades them.

    A micro-batch is the samples of one question.

    Args:
        train: tasks to train on, each with its number of epochs; ``trainer.max_steps`` may end training earlier.
        eval_task: held-out questions of the same kind, answered by sampling.
        eval_tasks: other tasks, to detect forgetting; answered greedily.
        questions_per_step: questions per optimizer step over all ranks.
        num_samples: samples per question, at least 2, since advantages are relative to the group.
        max_new_tokens: maximum number of new tokens of a sample.
        temperature: sampling temperature.
        top_k: sample from the k most likely tokens; null is all.
        eval_num_samples: samples per held-out question, for pass@1 … pass@k.
        eval_temperature: temperature in evaluation; 0 is greedy decoding.
        eval_batch_size: held-out questions answered together.
        seed: seed of the questions' order and of the samples.
    """

    def __init__(
        self,
        train: list[MixturePart],
        eval_task: Task,
        eval_tasks: list[Task] | None = None,
        questions_per_step: int = 16,
        num_samples: int = 16,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = 50,
        eval_num_samples: int = 8,
        eval_temperature: float = 1.0,
        eval_batch_size: int = 16,
        seed: int = 42,
    ) -> None:
        check_count("data", 1, questions_per_step=questions_per_step, max_new_tokens=max_new_tokens)
        check_count("data", 1, eval_num_samples=eval_num_samples, top_k=top_k)
        check_count("data", 0, seed=seed)
        check_range("data", temperature=temperature, eval_temperature=eval_temperature)
        check_count("data", 2, num_samples=num_samples)  # a group of one has zero advantage
        graded(eval_task)
        super().__init__(num_samples, eval_tasks, eval_batch_size, max_new_tokens)
        self.mixtures = {"train": Mixture(train, seed)}
        self.eval_task = eval_task
        self.questions_per_step = questions_per_step
        self.sampling = SamplingParams(num_samples, max_new_tokens, temperature, top_k)
        self.eval_sampling = replace(self.sampling, num_samples=eval_num_samples, temperature=eval_temperature)
        self.seed = seed
        self.metrics: dict[str, float] = {}

    def setup(self, stage: str) -> None:
        pass_at_k = PassAtKEvaluator(self.eval_task, self.eval_sampling, self.eval_batch_size)
        self.evaluators = [pass_at_k, *self.task_evaluators()]
        if stage != "fit":
            return
        questions = len(self.mixtures["train"])
        self.max_steps = questions // self.questions_per_step
        if self.max_steps < 1:
            raise UserError(
                f"{questions} questions are fewer than one step of "
                f"--data.questions_per_step {self.questions_per_step}; lower it, or add questions"
            )

    def micro_batches_per_step(self, global_batch_tokens: int | None, world_size: int) -> int:
        return groups_per_rank(self.questions_per_step, world_size)

    def describe_step(self, plan: RunPlan, world_size: int) -> str:
        return f"{self.questions_per_step} questions × {self.sampling.num_samples} samples"

    def step_tokens(self, plan: RunPlan) -> int:
        return int(self.metrics["sampled_tokens"]) if self.metrics else 0

    def train_dataloader(self) -> DataLoader:
        trainer, mixture = self.trainer, self.mixtures["train"]
        self.rollouts = Rollouts(
            mixture,
            lambda: self.spec.policy().engine,
            self.sampling,
            questions_per_step=self.questions_per_step,
            steps=trainer.max_steps,
            seed=self.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            all_reduce=partial(reduce_numbers, trainer),
            fingerprint=fingerprint(
                mixture, conversation_checksums(mixture), **{"questions per step": self.questions_per_step}
            ),
            state=self.position,
        )
        return self.loader(self.rollouts)

    def progress(self) -> Mapping[str, float]:
        """Metrics of the step's samples, and the seconds of training on them; call it when the step has ended."""
        if not self.metrics:
            return {}
        return {**self.metrics, "training_seconds": time.perf_counter() - self.rollouts.sampled_at}

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if isinstance(batch, dict):
            self.metrics = batch.pop("metrics", self.metrics)
        return batch
