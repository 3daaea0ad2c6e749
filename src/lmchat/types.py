"""Shared value types: conversations, batches, and exceptions for user errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = -1
"""Target id that losses and metrics ignore."""

CHUNK_TOKENS = {"cpu": 512, "cuda": 4096}
"""Tokens per chunk of the loss by device type. On a CPU the logits of a chunk should fit into the cache; a GPU needs
large matrix products. The CUDA figure is an estimate, not a measurement."""


class UserError(ValueError):
    """An error that the user can fix: a bad option, config, data file, checkpoint or request.

    The message names the thing, the value and the remedy. The command line prints it without a traceback.
    """


def reason(error: BaseException) -> str:
    """Why something failed: the first line of the message, with the kind of error if that is not for people."""
    text, kind = getattr(error, "strerror", None) or str(error).strip(), type(error).__name__
    if not text or isinstance(error, LookupError | TypeError | AttributeError):
        return f"{kind}: {text}"[:500] if text else kind
    return text.splitlines()[0][:500]


@contextlib.contextmanager
def user_errors(problem: str, remedy: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raises an error of these kinds as `UserError`: the problem, the reason and the remedy.

    A `UserError` passes, and so does a MemoryError (pyarrow's is an ArrowException) unless it is one of the kinds.
    """
    try:
        yield
    except kinds as error:
        if isinstance(error, UserError) or (isinstance(error, MemoryError) and MemoryError not in kinds):
            raise
        raise UserError(f"{problem} ({reason(error)}); {remedy}") from error


class RankFailure(RuntimeError):
    """Another rank failed; that rank reports the cause. The command line prints the message without a traceback."""


class Part(TypedDict):
    """One part of an assistant message: text, a calculator call ("python"), or the calculator's result."""

    type: Literal["text", "python", "python_output"]
    text: str


class Message(TypedDict):
    """One message of a conversation. Only the assistant's may have parts; with ``weight`` 0 they have no loss."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]
    weight: NotRequired[int]


class Conversation(TypedDict):
    """An optional system message, then alternating user and assistant messages."""

    messages: list[Message]


class Batch(TypedDict):
    """A micro-batch.

    Attributes:
        inputs: (rows, sequence_len) int64.
        targets: (rows, sequence_len) int64, `IGNORE_INDEX` where no loss is computed.
        state: state of the loader after this batch; absent in evaluation. It is part of the batch because loaders
            prefetch, and a checkpoint needs the position of the last batch that was trained on.
        loss_tokens: targets with loss in the whole optimizer step, over all micro-batches and ranks; absent if all
            micro-batches have equally many.
        document_starts: (n + 1,) int32, where documents start in the flattened ``inputs``, in ascending order and
            including each row's start; padded with rows · sequence_len. Absent if attention may cross documents.
    """

    inputs: Tensor
    targets: Tensor
    state: NotRequired[dict[str, Any]]
    loss_tokens: NotRequired[int]
    document_starts: NotRequired[Tensor]


class Rollout(TypedDict):
    """A micro-batch of reinforcement learning: a row of a prompt and its samples, or an empty row.

    Attributes:
        inputs: (1, N) int64, the prompt without its last token; for each sample that token and the sample's tokens but
            the last.
        targets: (1, N) int64, the next token of the same sample; `IGNORE_INDEX` except at sampled tokens.
        advantages: (1, N) float32, of each token's sample; 0 in the prompt.
        logprobs: (1, N) float32, log p of the targets in the engine, before temperature and top-k.
        prompt_tokens: number of tokens before the first sample.
        sample_tokens: number of tokens of each sample.
        group_tokens: number of sampled tokens of the group, with those of samples without advantage.
        loss_tokens, state: as in `Batch`.
        metrics: metrics of all samples of the step, see `lmchat.rl.rollouts.rollout_metrics`.
    """

    inputs: Tensor
    targets: Tensor
    advantages: Tensor
    logprobs: Tensor
    prompt_tokens: int
    sample_tokens: list[int]
    group_tokens: int
    loss_tokens: NotRequired[int]
    state: NotRequired[dict[str, Any]]
    metrics: NotRequired[dict[str, float]]
