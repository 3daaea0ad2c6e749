"""Shared value types: conversations, batches, and exceptions for user errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = -1
"""Target id that losses and metrics ignore."""


class UserError(ValueError):
    """A mistake of the user's: bad config, data, checkpoint or request.

    The message names the thing, the value and the remedy. The command line prints it without a traceback.
    """


class RankFailure(RuntimeError):
    """Another rank has failed, which says why itself. The command line prints the message without a traceback."""


class Part(TypedDict):
    """One part of an assistant message: prose, a calculator call, or the calculator's answer."""

    type: Literal["text", "python", "python_output"]
    text: str


class Message(TypedDict):
    """One turn. ``content`` is a string, or for the assistant a list of parts.

    weight: 0 takes no loss on an assistant message; 1, the default, does.
    """

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]
    weight: NotRequired[int]


class Conversation(TypedDict):
    """An optional system message, then user and assistant in turn."""

    messages: list[Message]


class Batch(TypedDict):
    """A micro-batch of token rows.

    inputs: (rows, sequence_len) int64. targets: (rows, sequence_len) int64, `IGNORE_INDEX` where no loss is taken.
    state: the loader's state after this batch, absent in evaluation. It travels with the batch because loaders
    are read ahead of the training step: a checkpoint must hold the position of what was trained on.
    loss_tokens: targets that the whole optimizer step takes a loss on, over all its micro-batches and ranks; absent
    where every micro-batch has as many.
    """

    inputs: Tensor
    targets: Tensor
    state: NotRequired[dict[str, Any]]
    loss_tokens: NotRequired[int]


class Rollout(TypedDict):
    """Sampled answers, a micro-batch of reinforcement learning; it may have no rows.

    inputs: (rows, tokens) int64. targets: (rows, tokens) int64, `IGNORE_INDEX` except where a token was sampled.
    advantages: (rows,) float32, none of them 0. group_tokens: (rows,) int64, sampled tokens of each row's group.
    logprobs: (rows, tokens) float32, log p of the targets as the engine sampled them, before temperature and top-k.
    loss_tokens, state: as in `Batch`. metrics: of all samples of the step, see `lmchat.rl.rollouts.rollout_metrics`.
    """

    inputs: Tensor
    targets: Tensor
    advantages: Tensor
    group_tokens: Tensor
    logprobs: Tensor
    loss_tokens: NotRequired[int]
    state: NotRequired[dict[str, Any]]
    metrics: NotRequired[dict[str, float]]
