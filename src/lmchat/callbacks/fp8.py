"""FP8 matrix products in training."""

from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lmchat.model.fp8 import MIN_WIDTH, MULTIPLE, Recipe, convert_linears, missing_hardware
from lmchat.types import UserError

AUTO_DEPTH = 20
"""For smaller matrices the casts cost as much as FP8 products save."""


class FP8(Callback):
    """Trains the blocks' linear layers with FP8 products, by torchao (``pip install 'lmchat[gpu]'``).

    Evaluation and sampling run in eval mode and use the compute dtype. The weights stay fp32, so checkpoints do not
    depend on this setting. Never run on a GPU so far.

    Args:
        enabled: "auto" is true in pretraining from depth 20 with a compiled model, on GPUs whose FP8 products are
            verified correct (Ada, Hopper and newer). Without compilation the casts cost more than FP8 saves.
        recipe: "tensorwise" has one scale per tensor and is fastest; "rowwise" has one per row and is more accurate.
        lm_head: convert the output head too.
        emulate: round operands to FP8 but multiply in fp32: slow, works on any device, shows how FP8 affects a run.
    """

    def __init__(
        self,
        enabled: bool | Literal["auto"] = "auto",
        recipe: Recipe = "tensorwise",
        lm_head: bool = False,
        emulate: bool = False,
    ) -> None:
        if emulate and enabled == "auto":
            raise UserError("--fp8.emulate is true, but --fp8.enabled auto emulates nothing; use --fp8.enabled true")
        self.enabled = enabled
        self.recipe = recipe
        self.lm_head = lm_head
        self.emulate = emulate

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        # Called before the module's own hook, which compiles the blocks.
        if not self._is_on(pl_module):
            return
        pad = not pl_module.packed_rows or pl_module.sequence_len % MULTIPLE != 0
        conversion = convert_linears(pl_module.net, self.recipe, lm_head=self.lm_head, pad=pad, emulate=self.emulate)
        if not conversion.converted:
            raise UserError(
                f"--fp8.enabled is true, but no layer can be converted ({conversion.describe()}); "
                f"use --fp8.enabled false, or a width that is a multiple of {MULTIPLE} and at least {MIN_WIDTH}"
            )
        rank_zero_info(f"FP8 {self.recipe}{' (emulated)' if self.emulate else ''}: {conversion.describe()}")

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        pl_module.train()  # Lightning leaves the module in eval mode, without FP8, if an evaluation fails.

    def _is_on(self, module: Any) -> bool:
        if self.enabled is False:
            return False
        if self.enabled == "auto":
            fits = module.scales_with_depth and module.config.n_layer >= AUTO_DEPTH and module.compile_mode is not False
            return fits and missing_hardware(module.device, self.recipe) is None
        reason = None if self.emulate else missing_hardware(module.device, self.recipe)
        if reason is not None:
            raise UserError(
                f"--fp8.enabled is true, but {module.device} cannot train in FP8: {reason}; "
                "use --fp8.enabled auto, or --fp8.emulate true, which is slow"
            )
        return True
