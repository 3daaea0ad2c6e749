"""The stages of training: one name each, the folders of their files, and the stages they may start from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: name in configs, checkpoints and messages.
        checkpoints: folder of its runs' checkpoints, below the base folder.
        logs: folder of its runs' logs, below ``logs``.
        predecessors: names of the stages whose checkpoints it may start from, nearest first.
        former_names: its names in older checkpoints.
    """

    name: str
    checkpoints: str
    logs: str
    predecessors: tuple[str, ...] = ()
    former_names: tuple[str, ...] = ()


STAGES = {
    stage.name: stage
    for stage in (
        Stage("pretrain", "base_checkpoints", logs="pretrain"),
        Stage("sft", "chatsft_checkpoints", logs="sft", predecessors=("pretrain",)),
        Stage("rl", "chatrl_checkpoints", logs="grpo", predecessors=("sft", "pretrain"), former_names=("grpo",)),
    )
}
"""All stages by name, in the order of the pipeline."""


def current_stage_name(name: str) -> str:
    """The current name of a stage, given its current or a former name.

    Raises:
        KeyError: there is no such stage.
    """
    by_name = {known: stage.name for stage in STAGES.values() for known in (stage.name, *stage.former_names)}
    return by_name[name]
