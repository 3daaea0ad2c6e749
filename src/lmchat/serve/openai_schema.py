"""Schema of requests of OpenAI's API, and their conversion."""

import secrets
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmchat.generation.sampling import SamplingParams
from lmchat.messages import PART_TYPES, check_messages
from lmchat.serve.errors import APIError
from lmchat.types import Message, Part, UserError

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 200
MAX_TOP_LOGPROBS = 20
MAX_LOGPROBS = 1_000_000
"""Log-probabilities of a whole response, which take 0.4 KB each while it is written."""

DEFAULT_COMPLETION_TOKENS = 16
"""Default ``max_tokens`` of text completions, as in OpenAI's API."""

DEFAULT_CHAT_TOKENS = 1024
"""Length of a chat answer whose request names none. Memory for an answer is taken at once."""

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "suffix": ("",),
    "modalities": (["text"],),
}
"""Options of OpenAI's API that lmchat does not support, with the values that have no effect and are accepted."""

_WITHOUT_EFFECT = {
    "user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention",
}  # fmt: skip
"""Options of OpenAI's API that do not affect answers, and are ignored."""

_CHOICES = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of lists of token ids",
    "stop": f"a text of 1 to {MAX_STOP_CHARACTERS} characters, or a list of at most {MAX_STOPS} of these",
}
"""What fields of several types may be; pydantic's messages name the first type only."""

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Tokens = Annotated[list[int], Field(fail_fast=True)]
"""Lists of any length fail at their first invalid item; reports of all of them would take seconds."""


class StreamOptions(BaseModel):
    """Options of streams. Padding against guesses from the lengths of events (obfuscation) is not sent."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(BaseModel):
    """Options of both kinds of completions. ``top_k`` and ``calculator`` are lmchat's."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    model: str | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    n: int | None = Field(default=None, ge=1)
    best_of: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    calculator: bool | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def samples(self) -> int:
        """Number of completions per prompt."""
        return self.n or 1

    def sampling(self, max_new_tokens: int, *, calculator: bool, top_logprobs: int | None) -> SamplingParams:
        """Sampling parameters; missing options have OpenAI's defaults, a missing seed is random.

        ``calculator`` counts if the request does not say; for ``top_logprobs`` see `lmchat.serve.run.Plan`.
        """
        return SamplingParams(
            num_samples=self.samples,
            max_new_tokens=max_new_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k if self.top_k and self.top_k > 0 else None,
            top_p=self.top_p,
            seed=secrets.randbits(63) if self.seed is None else self.seed % 2**64,
            calculator=calculator if self.calculator is None else self.calculator,
            logprobs=top_logprobs is not None,
            top_logprobs=top_logprobs or 0,
        )


class ChatRequest(GenerationRequest):
    """The body of ``/v1/chat/completions``."""

    messages: list[Any] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)


class CompletionRequest(GenerationRequest):
    """The body of ``/v1/completions``."""

    prompt: str | Tokens | Annotated[list[str], Field(fail_fast=True)] | Annotated[list[Tokens], Field(fail_fast=True)]
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, as texts or as token ids.

        Raises:
            APIError: there is none.
        """
        prompt: Any = self.prompt
        if prompt and (isinstance(prompt, str) or isinstance(prompt[0], int)):
            return [prompt]
        if not prompt:
            raise APIError("the prompt is empty; give a text, or token ids", param="prompt")
        return list(prompt)


class TokenizeRequest(BaseModel):
    """The body of ``/tokenize``; special tokens are never added."""

    model_config = ConfigDict(strict=True)
    prompt: str


class DetokenizeRequest(BaseModel):
    """The body of ``/detokenize``."""

    model_config = ConfigDict(strict=True)
    tokens: Tokens


Request = TypeVar("Request", bound=BaseModel)


def parse(kind: type[Request], body: bytes) -> Request:
    """Parses a JSON body.

    Raises:
        APIError: it is not JSON, a value is of the wrong type or out of range, or an option is unknown or unsupported.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = next((str(part) for part in first["loc"]), None)
        place = ".".join(map(str, first["loc"])) or "the body"
        message = f"{place}: {first['msg']}"
        if param in _CHOICES and len(first["loc"]) > 1:
            message = f"{param} must be {_CHOICES[param]}"
        raise APIError(message[:500], param=param) from error
    for name, value in (request.model_extra or {}).items():
        if value is None or name in _WITHOUT_EFFECT:
            continue
        if name not in _UNSUPPORTED:
            raise APIError(f"unknown option {name[:100]!r}; leave it out", param=name[:100], code="unknown_parameter")
        if value not in _UNSUPPORTED[name]:
            raise APIError(f"{name} is not supported; leave it out", param=name, code="unsupported_parameter")
    return request


def messages_of(request: ChatRequest) -> list[Message]:
    """The conversation.

    Raises:
        APIError: the messages are not a conversation that ends with the user's turn.
    """
    try:
        messages = [_message(index, message) for index, message in enumerate(request.messages)]
        check_messages(messages)
    except UserError as error:
        raise APIError(str(error)[:500], param="messages") from error
    if messages[-1]["role"] != "user":
        raise APIError("the last message must be the user's", param="messages")
    return messages


def _message(index: int, message: Any) -> Message:
    """Converts a message: lists become a string, or for the assistant a list of parts. The rest is checked later."""
    if not isinstance(message, dict):
        return message
    role, content = message.get("role"), message.get("content")
    if any(message.get(name) for name in ("tool_calls", "function_call", "audio")):
        raise UserError(f"message {index} has tool calls or audio, which this server does not support; leave them out")
    if isinstance(content, list):
        kinds = PART_TYPES if role == "assistant" else ("text",)
        for part in content:
            if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
                raise UserError(f"message {index} has a part other than {{'type': {' or '.join(kinds)}, 'text': ...}}")
        parts: list[Part] = [{"type": part["type"], "text": part["text"]} for part in content]
        plain = all(part["type"] == "text" for part in parts)
        content = "".join(part["text"] for part in parts) if plain else parts
    return {"role": "system" if role == "developer" else role, "content": content}  # type: ignore[typeddict-item]
