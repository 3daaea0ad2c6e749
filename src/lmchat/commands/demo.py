"""``lmchat demo``: the whole pipeline at small scale, offline, on text found on this machine."""

from pathlib import Path


def demo(text: Path | None = None, output: Path = Path("runs/demo"), minutes: float = 15) -> None:
    """Make a small chat model on this machine, offline: tokenizer, pretraining, fine-tuning, reinforcement learning.

    Run again after an interruption to continue.

    Args:
        text: folder of your own text, in the formats of ``lmchat data import``, a few MB or more; by default the
            documentation of Python and its packages on this machine.
        output: folder for data, tokenizer, checkpoints, logs, report.html and summary.json.
        minutes: time budget; on a slow machine pretraining and reinforcement learning take fewer steps.
            Fine-tuning always runs its full epoch, 5 minutes on two cores.
    """
    from lmchat.demo.pipeline import run_stages

    run_stages(output, text, minutes)


COMMANDS = demo
