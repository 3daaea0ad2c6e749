"""Base class of the stages' LightningModules: network, training step, optimizer and schedules."""

import time
from abc import abstractmethod
from dataclasses import asdict, dataclass
from functools import cache, cached_property, reduce
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lmchat.checkpoint.load import Checkpoint, load_network_state
from lmchat.checkpoint.tensors import check_tensors, empty_state
from lmchat.evaluation.evaluator import EvalBatch, update_within_memory
from lmchat.generation.policy import Policy
from lmchat.model.allocator import tune_malloc
from lmchat.model.attention_timing import choose_by_timing, use_backends
from lmchat.model.compile import compile_blocks
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT, default_compute_dtype
from lmchat.optim.muon_adamw import MuonAdamW
from lmchat.optim.param_groups import LEARNING_RATES, build_param_groups
from lmchat.option_checks import check_count, check_range
from lmchat.paths import base_dir, check_folder_name, expand_user
from lmchat.paths import tokenizer_dir as default_tokenizer_dir
from lmchat.run_plan import RunPlan
from lmchat.scaling import flops_per_token
from lmchat.stage_table import STAGES
from lmchat.stages.device_memory import needs_recomputing
from lmchat.stages.spec import StageSpec
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.training_memory import no_room
from lmchat.types import UserError, reason

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


COMPILE_FLOPS_ON_CPU = 1e13
"""Minimum FLOPs of a run to compile on a CPU: compilation takes 1 to 2 minutes and speeds training up 1.2 times."""


@dataclass(frozen=True)
class Schedule:
    """Learning-rate multiplier, and Muon's momentum and weight decay, at one optimizer step."""

    lr_multiplier: float
    momentum: float
    weight_decay: float


class StageModule(L.LightningModule):
    """A GPT trained by MuonAdamW with stateless schedules. Subclasses define `schedule`, and `training_step` if needed.

    Args:
        tokenizer_dir: folder of the tokenizer; null is ``$LMCHAT_BASE_DIR/tokenizer``.
        tag: name of the run's folder of checkpoints and logs; null uses the depth, e.g. ``d26``.
        global_batch_tokens: tokens per optimizer step over all ranks; null takes the scaling laws' value.
        embedding_lr: AdamW learning rate of the token and value embeddings at width 768 and batch 2¹⁹.
        unembedding_lr: AdamW learning rate of the output head, likewise.
        matrix_lr: Muon learning rate of the blocks' matrices.
        scalar_lr: AdamW learning rate of the residual scalars.
        weight_decay: Muon's weight decay before the scaling laws scale it.
        compute_dtype: dtype of activations and matrix products; "auto" is bf16 where the device multiplies it fast,
            else fp32. Master weights are always fp32.
        attention: name of the attention backend; "auto" tries the candidates and takes the fastest correct one.
        compile: use torch.compile for the blocks, and on a GPU for the optimizer. "auto" is true where it works and
            pays: for the blocks on a GPU, and on a CPU for runs of `COMPILE_FLOPS_ON_CPU` or more; false where shapes
            change from batch to batch.
        checkpoint_blocks: keep only each block's input for the backward pass and run the block again there: a fraction
            of the memory for about a third more time.
    """

    stage: ClassVar[str]
    scales_with_depth: ClassVar[bool] = False
    packed_rows: ClassVar[bool] = True
    """All micro-batches have the same shape and loss at every token."""
    samples_in_training: ClassVar[bool] = False
    """The engine is used in every step, not only in evaluations."""
    net: GPT
    config: GPTConfig
    sequence_len: int
    default_tag: str
    """Name of the run if ``tag`` is null."""
    plan: RunPlan
    """Plan of the run; set in training by `TrainingPlan`."""
    evaluated_at: float = 0.0
    """End of the last evaluation, by `time.perf_counter`."""

    def __init__(
        self,
        *,
        tokenizer_dir: str | None = None,
        tag: str | None = None,
        global_batch_tokens: int | None = None,
        embedding_lr: float = LEARNING_RATES["embedding_lr"],
        unembedding_lr: float = LEARNING_RATES["unembedding_lr"],
        matrix_lr: float = LEARNING_RATES["matrix_lr"],
        scalar_lr: float = LEARNING_RATES["scalar_lr"],
        weight_decay: float = 0.2,
        compute_dtype: Literal["auto", "bf16", "fp32"] = "auto",
        attention: str = "auto",
        compile: bool | Literal["auto"] = "auto",
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        if tag:
            check_folder_name("--model.tag", tag)
        self.tokenizer_path = expand_user(tokenizer_dir) if tokenizer_dir else default_tokenizer_dir()
        self.global_batch_tokens = global_batch_tokens
        given = (embedding_lr, unembedding_lr, matrix_lr, scalar_lr)
        self.learning_rates = dict(zip(LEARNING_RATES, given, strict=True))
        self.weight_decay = weight_decay
        check_range("model", weight_decay=weight_decay, **self.learning_rates)
        check_count("model", 1, global_batch_tokens=global_batch_tokens)
        self.lr_scale = 1.0
        self.compute_dtype = compute_dtype
        self.polar_dtype = "auto"
        self.attention = attention
        self.compile_mode = compile
        self.checkpoint_blocks = checkpoint_blocks
        self.resumed_micro_batch_size: int | None = None
        self.parent_meta: dict[str, Any] = {}
        self._start: Checkpoint | None = None
        self._tag = tag
        self._losses: list[torch.Tensor] = []

    @abstractmethod
    def schedule(self, step: int) -> Schedule:
        """The optimizer's settings for optimizer step ``step``, counted from 0."""

    @property
    def tag(self) -> str:
        """Name of the run: its folder under the stage's checkpoints and logs."""
        return self._tag or self.default_tag

    def load_from(self, checkpoint: Checkpoint) -> None:
        """Prepares to start from ``checkpoint``; called before the network is built.

        The trainer resumes a checkpoint of this stage; of another stage, or imported, only the weights are taken. On
        resume the saved dtypes are kept for options set to "auto"; a new probe might choose others.

        Raises:
            UserError: this stage, as configured, cannot start from it.
        """
        meta, known = checkpoint.meta, (self.stage, *STAGES[self.stage].predecessors)
        if checkpoint.stage not in known:
            raise UserError(
                f"{checkpoint.paths.meta} is a checkpoint of {checkpoint.stage}; {self.stage} starts from "
                f"{' or '.join(known)}; give such a checkpoint with --ckpt_path"
            )
        if meta["tokenizer_fingerprint"] != self.tokenizer.fingerprint:
            raise UserError(
                f"{checkpoint.paths.meta} was trained with a different tokenizer from the one in "
                f"{self.tokenizer_path}; give its own with --model.tokenizer_dir"
            )
        self.parent_meta = meta
        if checkpoint.stage == self.stage:
            self.polar_dtype = meta.get("polar_dtype", "auto")
        if checkpoint.stage != self.stage or checkpoint.weights_only:
            self._start = checkpoint
            return
        self.resumed_micro_batch_size = meta.get("micro_batch_size")
        if self.compute_dtype == "auto":
            self.compute_dtype = meta.get("compute_dtype", "auto")

    def spec(self) -> StageSpec:
        """Settings for the DataModule; call it after `load_from`, if there is a checkpoint."""
        return StageSpec(
            tag=self.tag,
            tokenizer=self.tokenizer,
            sequence_len=self.sequence_len,
            global_batch_tokens=self.global_batch_tokens,
            micro_batch_size=self.parent_meta.get("micro_batch_size"),
            policy=lambda: self.policy,
        )

    @cached_property
    def policy(self) -> Policy:
        """The network with its current weights, for evaluation and sampling."""
        return Policy(self.net, self.tokenizer)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer_path)

    def setup(self, stage: str) -> None:
        check_precision(self.trainer.precision)

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        device = self.trainer.strategy.root_device
        if device.type == "cpu":
            tune_malloc()
        try:
            with torch.device("meta"):
                net = GPT(self.config, compute_dtype=self.network_dtype(device), attention=self.attention)
            net.to_empty(device=device)
        except (RuntimeError, MemoryError) as error:
            raise no_room(self.config, device, reason(error)) from error
        net.checkpoint_blocks = self.checkpoint_blocks
        net.init_weights()
        if self._start is not None:
            net.load_state_dict(load_network_state(self._start))
        self.net = net

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights = {name.removeprefix("net."): tensor for name, tensor in checkpoint["state_dict"].items()}
        where = f"the model file of step {checkpoint['global_step']}"
        check_tensors(weights, empty_state(self.config), where, "use an older checkpoint")

    def network_dtype(self, device: torch.device) -> torch.dtype:
        """The compute dtype on ``device``."""
        return default_compute_dtype(device) if self.compute_dtype == "auto" else COMPUTE_DTYPES[self.compute_dtype]

    def on_fit_start(self) -> None:
        if self.compiles_blocks():
            self._time_attention()
            compile_blocks(self.net, recompute=needs_recomputing(self, self.plan.micro_batch_size))

    def _time_attention(self) -> None:
        """On a GPU, rank 0 times the attention backends for the fixed shapes of training, for all ranks."""
        if self.attention != "auto" or self.net.device.type != "cuda":
            return
        chosen: dict[int, str] = {}
        if self.trainer.global_rank == 0:
            file = base_dir() / "attention_backends.json"
            chosen = choose_by_timing(self.net, self.plan.micro_batch_size, self.plan.mask_documents, file)
        use_backends(self.net, self.trainer.strategy.broadcast(chosen))

    def compiles_blocks(self) -> bool:
        """Whether the blocks are compiled in training; never where every micro-batch has another shape."""
        return self.packed_rows and self._compiles(pays=self._compiling_pays())

    def _compiles(self, pays: bool) -> bool:
        """Whether to compile; ``pays`` is the answer for "auto" if the compiler works."""
        if self.compile_mode == "auto":
            return pays and compiler_works(self.net.device.type)
        return self.compile_mode

    def _compiling_pays(self) -> bool:
        device = self.net.device  # the module's own is still a CPU when a micro-batch is chosen
        if device.type != "cpu":
            return device.type == "cuda"
        assert self.plan.global_batch_tokens is not None
        tokens = self.trainer.max_steps * self.plan.global_batch_tokens
        return tokens * flops_per_token(self.config) >= COMPILE_FLOPS_ON_CPU

    def configure_optimizers(self) -> MuonAdamW:
        groups = build_param_groups(
            self.net.named_parameters(),
            n_embd=self.config.n_embd,
            lr_scale=self.plan.lr_scale,
            learning_rates=self.learning_rates,
            weight_decay=self.plan.weight_decay,
        )
        on_gpu = self.net.device.type == "cuda"  # on a CPU Muon's matrix products dominate
        return MuonAdamW(groups, polar_dtype=self.muon_dtype(), compile=on_gpu and self._compiles(pays=True))

    def muon_dtype(self) -> torch.dtype:
        """The dtype of Muon's orthogonalisation: the one saved, or bf16 where the device multiplies it fast."""
        weights = self.net.lm_head.weight
        automatic = default_compute_dtype(weights.device) if weights.dtype == torch.float32 else weights.dtype
        return COMPUTE_DTYPES.get(self.polar_dtype, automatic)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Mean cross-entropy of the next token in a `Batch`; stages with another loss override it."""
        loss = self.net.loss(batch["inputs"], batch["targets"], document_starts=batch.get("document_starts"))
        self.track_loss(loss)
        return loss

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        now = self.schedule(self.trainer.global_step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * now.lr_multiplier
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = now.momentum, now.weight_decay
        optimizer.step(closure=optimizer_closure)
        # Lightning zeroes them after the next forward pass, so gradients and activations would be in memory together.
        optimizer.zero_grad(set_to_none=True)

    def validation_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        update_within_memory(batch.evaluator, self.policy, batch.data)

    def on_validation_end(self) -> None:
        if self.net.device.type == "cuda" and not self.samples_in_training:
            self.policy.release_memory()  # training, whose micro-batch may be as large as fits, needs it
        # Runs after all callbacks; training time resumes.
        self.evaluated_at = time.perf_counter()

    def track_loss(self, loss: torch.Tensor) -> None:
        """Adds a micro-batch's loss to the loss of the step, without a device sync."""
        self._losses.append(loss.detach())

    def pop_step_loss(self) -> torch.Tensor:
        """Mean loss of the micro-batches since the last call, a 0-dim tensor on the device."""
        losses, self._losses = self._losses, []
        return reduce(torch.add, losses) / len(losses)

    def pop_step_metrics(self) -> dict[str, torch.Tensor]:
        """Further metrics of the step, 0-dim tensors by name; the monitor logs their mean over the ranks."""
        return {}

    def checkpoint_meta(self) -> dict[str, Any]:
        """Metadata of a checkpoint; JSON values only."""
        names = {dtype: name for name, dtype in COMPUTE_DTYPES.items()}
        return {
            "stage": self.stage,
            "tag": self.tag,
            "model": asdict(self.config),
            "compute_dtype": names[self.net.compute_dtype],
            "polar_dtype": names[self.muon_dtype()],
            "attention": self.net.attention_backend,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "global_batch_tokens": self.plan.global_batch_tokens,
            "micro_batch_size": self.plan.micro_batch_size,
            "total_steps": self.trainer.max_steps,
            "learning_rates": self.learning_rates,
            "lr_scale": self.plan.lr_scale,
            "weight_decay": self.plan.weight_decay,
        }


def check_precision(precision: str | int | None) -> None:
    """Raises UserError unless the trainer's ``precision`` leaves the fp32 master weights as they are."""
    if precision not in (None, 32, "32", "32-true"):
        raise UserError(
            f"--trainer.precision is {precision}, which would cast or autocast the fp32 master weights; leave it at "
            "32-true and choose the compute type with --model.compute_dtype bf16"
        )


@cache
def compiler_works(device_type: str) -> bool:
    """Whether torch.compile works here, tested by using it: it needs a C++ compiler and Python's headers."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device_type))
    except Exception as error:  # Any failure means: train without it.
        rank_zero_warn(f"torch.compile does not work here, training without it ({str(error).splitlines()[0]})")
        return False
    return True
