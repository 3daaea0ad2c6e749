"""Sample completions during training."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lmchat.callbacks.save_config import run_log_dir
from lmchat.generation.sampling import SamplingParams
from lmchat.hardware import is_out_of_memory
from lmchat.option_checks import check_count
from lmchat.progress import print_line
from lmchat.stages.base import StageModule

PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "This function returns",
)

SAMPLES_FILE = "samples.jsonl"


class Samples(Callback):
    """Completes fixed prompts greedily after every evaluation.

    Prints them and writes them to TensorBoard and, in the folder of the logs, to ``samples.jsonl``.

    Args:
        prompts: texts to complete.
        max_new_tokens: maximum number of tokens of a completion; 0 turns samples off.
    """

    def __init__(self, prompts: Sequence[str] = PROMPTS, max_new_tokens: int = 16) -> None:
        check_count("samples", 0, max_new_tokens=max_new_tokens)
        self.prompts = list(prompts)
        self.max_new_tokens = max_new_tokens

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.is_global_zero or not self.max_new_tokens or not any(map(data.is_due, data.evaluators)):
            return
        try:
            completions = self._complete(pl_module)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            rank_zero_warn(f"no samples: {error}")
            return
        record = {"step": trainer.global_step, "samples": dict(zip(self.prompts, completions, strict=True))}
        with (run_log_dir(trainer, pl_module) / SAMPLES_FILE).open("a") as file:
            file.write(json.dumps(record) + "\n")
        for prompt, text in zip(self.prompts, completions, strict=True):
            visible = "".join(character if character.isprintable() else "\ufffd" for character in text)
            print_line(f"  {prompt}\033[1m{visible}\033[0m" if sys.stdout.isatty() else f"  {prompt} ▸{visible}")
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text(f"samples/{prompt}", prompt + text, trainer.global_step)

    def _complete(self, module: StageModule) -> list[str]:
        tokenizer = module.tokenizer
        prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in self.prompts]
        params = SamplingParams(max_new_tokens=self.max_new_tokens, temperature=0)
        results = module.policy.engine.generate(prompts, params)
        return [tokenizer.decode(samples[0].content).replace("\n", "⏎") for samples in results]
