"""ARC: grade-school science questions (Clark et al. 2018, arXiv:1803.05457)."""

from __future__ import annotations

from typing import Any, Literal

from lmchat.tasks.multiple_choice import MultipleChoiceConversation, MultipleChoiceTask
from lmchat.tasks.rows import HubDataset, field


class ARC(MultipleChoiceTask):
    """The easy or the challenge questions. Questions keep their own letters, which may be digits.

    Args:
        subset: which questions.
        split: part of the dataset.
        options: see `RowTask`.
    """

    def __init__(
        self,
        subset: Literal["ARC-Easy", "ARC-Challenge"] = "ARC-Easy",
        split: Literal["train", "validation", "test"] = "test",
        **options: Any,
    ) -> None:
        super().__init__(hub=HubDataset("allenai/ai2_arc", subset, split), **options)
        self.subset = subset

    @property
    def name(self) -> str:
        return super().name.replace("ARC", self.subset)

    def conversation(self, row: Any) -> MultipleChoiceConversation:
        choices = field(row, "choices", dict)
        return self.question(
            field(row, "question", str),
            field(choices, "label", list),
            field(choices, "text", list),
            field(row, "answerKey", str),
        )
