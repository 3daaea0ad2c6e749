"""Converts records of the common conversation formats to lmchat's conversations.

    messages           {"messages": [{"role": "user", "content": "…"}, …]}, as in OpenAI's interface, or the bare list
    sharegpt           {"conversations": [{"from": "human", "value": "…"}, …]}
    alpaca             {"instruction": "…", "input": "…", "output": "…"}, or Dolly's context and response
    prompt_completion  {"prompt": "…", "completion": "…"}, texts or lists of messages

Content without an exact counterpart is mapped, with a note for each kind of mapping; what cannot be mapped is an error.
"""

import contextlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from lmchat.messages import check_messages
from lmchat.tasks.base import exchange
from lmchat.tasks.row_files import MalformedRow, checked_text
from lmchat.types import Conversation, Message, Part, UserError

Format = Literal["messages", "sharegpt", "alpaca", "prompt_completion"]
FORMATS: tuple[Format, ...] = get_args(Format)

_MESSAGE_LISTS = ("messages", "conversations", "conversation")
_PROMPTS = ("prompt", "question", "query", "input")
_COMPLETIONS = ("completion", "response", "answer", "output")
_CONTEXTS = ("input", "context")
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
_MEANINGS = {"tool": "a tool's result", "call": "a call of the calculator"}
_OWN_ROLES = ("user", "assistant", "system")
_TEXT_PARTS = ("text", "input_text", "output_text")
_TOOL_PARTS = ("python", "python_output")
_KNOWN_FIELDS = {
    *("role", "from", "content", "value", "text", "weight", "train"),
    *("tool_calls", "function_call", "tool_call_id"),
}
_CONVERSIONS = {
    ("chosen", "rejected"): "preference pairs; save each prompt and chosen answer as prompt and completion",
    ("custom_id", "body"): "a request of OpenAI's batch interface; save what its body contains",
    ("custom_id", "response"): "a response of OpenAI's batch interface; add its message to those of the request",
    ("contents",): "Gemini's format; save contents as messages, parts as content and the role model as assistant",
    ("mapping",): "an export of ChatGPT's conversations; save the messages in each mapping as messages",
    ("data",): "records inside a field; save what is in data as the file",
}
"""Fields of formats that are not read, and how to convert them."""
_EXPRESSIONS = ("expression", "code", "python")
"""Names of the tool call argument that holds the calculator's expression."""


@dataclass
class Converted:
    """A converted record: assistant messages without loss have weight 0; ``notes`` say what was mapped or left out."""

    conversation: Conversation
    format: Format
    notes: set[str] = field(default_factory=set)


def convert(row: Any, format: Format | None = None) -> Converted:
    """Converts a parsed row of a file to a conversation; its format is detected, or must be ``format``.

    Raises:
        MalformedRow: it has another format, or cannot be mapped.
    """
    found, messages, notes = _recognize(row)
    if format not in (None, found):
        raise MalformedRow(f"the record has the format {found}, not {format}")
    builder = _Builder(notes)
    for index, message in enumerate(messages):
        builder.add(message, f"message {index}")
    return Converted(builder.finish(), found, builder.notes)


def _recognize(row: Any) -> tuple[Format, list[Any], set[str]]:
    """Returns the format of a record, its messages, and notes on fields that are not used."""
    if isinstance(row, list):
        return "messages", row, set()
    if not isinstance(row, dict):
        raise MalformedRow(f"the row is {type(row).__name__}, not an object or a list of messages")
    row = {name: value for name, value in row.items() if value is not None}
    for reader in (_from_message_list, _from_alpaca, _from_prompt):
        if (read := reader(row)) is not None:
            return read
    for fields, advice in _CONVERSIONS.items():
        if row.keys() >= set(fields):
            raise MalformedRow(f"this is {advice}")
    raise MalformedRow(
        f"no known format has the fields {', '.join(map(str, row)) or '(none)'}; use messages (OpenAI), conversations "
        "(ShareGPT), instruction and output (Alpaca), or prompt and completion"
    )


def _from_message_list(row: dict[str, Any]) -> tuple[Format, list[Any], set[str]] | None:
    name = next((name for name in _MESSAGE_LISTS if name in row), None)
    if name is None:
        return None
    messages = row[name]
    if isinstance(messages, str):  # a column of JSON
        with contextlib.suppress(ValueError, RecursionError):
            messages = json.loads(messages)
    if not isinstance(messages, list):
        raise MalformedRow(f"field {name!r} is {type(messages).__name__}, not a list of messages")
    messages = list(messages)
    is_sharegpt = any(isinstance(message, dict) and "from" in message for message in messages)
    used = {name}
    if isinstance(system := row.get("system"), str):
        used.add("system")
        messages[:0] = [{"role": "system", "content": system}] if system else []
    return "sharegpt" if is_sharegpt else "messages", messages, _unused(row, used)


def _from_alpaca(row: dict[str, Any]) -> tuple[Format, list[Any], set[str]] | None:
    answer = next((name for name in _COMPLETIONS if name in row), None)
    if "instruction" not in row or answer is None:
        return None
    question = checked_text(row["instruction"], "field 'instruction'")
    context = next((name for name in _CONTEXTS if row.get(name)), "input")
    if extra := row.get(context):
        question = "\n\n".join(filter(None, [question, checked_text(extra, f"field {context!r}")]))
    messages: list[Any] = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    history = row.get("history", [])
    if not isinstance(history, list) or any(not isinstance(turn, list) or len(turn) != 2 for turn in history):
        raise MalformedRow("field 'history' is not a list of pairs of question and answer")
    for turn in history:
        messages += exchange(*turn)["messages"]
    messages += exchange(question, row[answer])["messages"]
    return "alpaca", messages, _unused(row, {"instruction", context, answer, "system", "history"})


def _from_prompt(row: dict[str, Any]) -> tuple[Format, list[Any], set[str]] | None:
    prompt = next((name for name in _PROMPTS if name in row), None)
    completion = next((name for name in _COMPLETIONS if name in row), None)
    if prompt is None or completion is None:
        return None
    messages: list[Any] = []
    for role, value in (("user", row[prompt]), ("assistant", row[completion])):
        messages += value if isinstance(value, list) else [{"role": role, "content": value}]
    used = {prompt, completion}
    if isinstance(label := row.get("label"), bool):  # KTO's format: false marks a bad completion
        used.add("label")
        messages = [{**m, "weight": 0} if isinstance(m, dict) and not label else m for m in messages]
    return "prompt_completion", messages, _unused(row, used)


def _unused(row: dict[str, Any], used: set[str]) -> set[str]:
    return {f"field {name} of the record not used" for name in row if name not in used}


class _Builder:
    """Builds a conversation from messages of any format. Contents are lists of parts until `finish`."""

    def __init__(self, notes: set[str]) -> None:
        self.notes = notes
        self.turns: list[dict[str, Any]] = []
        self._system: list[str] = []
        self._after_tool = False

    def add(self, message: Any, what: str) -> None:
        """Appends a message, or joins it to the previous one."""
        if not isinstance(message, dict):
            raise MalformedRow(f"{what} must be an object with role and content, not {message!r:.100}")
        message = {name: value for name, value in message.items() if value is not None}
        given = message.get("role", message.get("from"))
        given = given.strip() if isinstance(given, str) else given
        role = _ROLES.get(str(given).lower())
        if role is None:
            raise MalformedRow(f"{what} has unknown role {given!r}: use user, assistant, system or tool")
        if given not in _OWN_ROLES:
            self.notes.add(f"role {given} read as {_MEANINGS.get(role, role)}")
        self.notes.update(f"field {name} of a message not used" for name in message if name not in _KNOWN_FIELDS)
        parts = _content(message, what, is_call=role == "call")
        if role in ("assistant", "call"):
            self._add_assistant([*parts, *self._calls(message, what)], _weight(message, what), what)
        elif any(part["type"] != "text" for part in parts):
            raise MalformedRow(f"{what} has tool parts, which only the assistant's messages may have")
        else:
            text = "\n".join(part["text"] for part in parts)
            if role == "system":
                self._add_system(text)
            elif role == "user":
                self._add_user(text)
            else:
                self._add_tool_output(text, what)
        self._after_tool = role in ("tool", "call")

    def _append(self, role: str, parts: list[Part]) -> None:
        """Appends a turn, or continues the last one if it has the same role."""
        if not self.turns or self.turns[-1]["role"] != role:
            self.turns.append({"role": role, "content": parts})
            return
        before = self.turns[-1]["content"]
        if before and parts and not self._after_tool:
            self.notes.add(f"{role} messages in a row joined")
            if before[-1]["type"] == parts[0]["type"] == "text":
                parts = [_text_part(f"{before.pop()['text']}\n\n{parts[0]['text']}"), *parts[1:]]
        before += parts

    def _add_system(self, text: str) -> None:
        if not text:
            self.notes.add("an empty system message left out")
            return
        if self.turns:
            self.notes.add("a system message in the middle joined to the next user message")
        self._system.append(text)

    def _add_user(self, text: str) -> None:
        if self._system and not self.turns:
            self._append("system", [_text_part("\n\n".join(self._system))])
            self._system = []
        self._append("user", [_text_part("\n\n".join([*self._system, text]))])
        self._system = []

    def _add_assistant(self, parts: list[Part], weight: int, what: str) -> None:
        if self.turns and self._system:
            raise MalformedRow(f"{what} follows a system message in the middle, where a user message is expected")
        last = self.turns[-1] if self.turns else {}
        if last.get("role") == "assistant" and last.get("weight", 1) != weight:
            raise MalformedRow(f"{what} continues an assistant message of another weight")
        self._append("assistant", parts)
        if weight == 0:
            self.turns[-1]["weight"] = 0
            self.notes.add("an assistant message of weight 0 read without loss")

    def _add_tool_output(self, text: str, what: str) -> None:
        if not self.turns or self.turns[-1]["role"] != "assistant":
            raise MalformedRow(f"{what} is a tool's, without an assistant message before it")
        self.notes.add("a tool's result read as the calculator's output")
        self.turns[-1]["content"].append(Part(type="python_output", text=text))

    def _calls(self, message: dict[str, Any], what: str) -> list[Part]:
        calls = message.get("tool_calls", [])
        if not isinstance(calls, list):
            raise MalformedRow(f"{what} has tool_calls of type {type(calls).__name__}: it must be a list")
        if "function_call" in message:
            calls = [*calls, message["function_call"]]
        if calls:
            self.notes.add("a tool call read as a call of the calculator")
        return [Part(type="python", text=_call_text(call, what)) for call in calls]

    def finish(self) -> Conversation:
        if self._system and self.turns:
            self.notes.add("a system message at the end left out")
        for turn in self.turns:
            parts = turn["content"]
            if len(parts) == 1 and parts[0]["type"] == "text":
                turn["content"] = parts[0]["text"]
        try:
            check_messages(self.turns)
        except UserError as error:
            raise MalformedRow(str(error)) from None
        if not any(turn["role"] == "assistant" for turn in self.turns):
            raise MalformedRow("there is no assistant message to learn from")
        if self.turns[-1]["role"] == "user":
            self.notes.add("a last user message without an answer receives no loss")
        return {"messages": cast(list[Message], self.turns)}


def _content(message: dict[str, Any], what: str, is_call: bool = False) -> list[Part]:
    content = message.get("content", message.get("value", message.get("text")))
    if content is None and (message.keys() & {"tool_calls", "function_call"}):
        return []
    if is_call:
        return [Part(type="python", text=_call_text(content, what))]
    if isinstance(content, str):
        return [_text_part(checked_text(content, what))]
    if not isinstance(content, list):
        raise MalformedRow(
            f"{what} has content of type {type(content).__name__}: it must be a string or a list of parts"
        )
    return [_part(part, what) for part in content]


def _part(part: Any, what: str) -> Part:
    if isinstance(part, str):
        return _text_part(checked_text(part, what))
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind not in (*_TEXT_PARTS, *_TOOL_PARTS):
        raise MalformedRow(f"{what} has a part of type {kind}, and lmchat's models read text only")
    text = checked_text(part.get("text"), what)
    return _text_part(text) if kind in _TEXT_PARTS else cast(Part, {"type": kind, "text": text})


def _text_part(text: str) -> Part:
    return {"type": "text", "text": text}


def _weight(message: dict[str, Any], what: str) -> int:
    """1, or 0 for a message without loss: OpenAI's ``weight``, axolotl's ``train``."""
    weight = message.get("weight", message.get("train", 1))
    if weight not in (0, 1):
        raise MalformedRow(f"{what} has weight {weight!r}; use 1, or 0 for no loss on it")
    return int(weight)


def _call_text(call: Any, what: str) -> str:
    """Input of the calculator: the call's expression, or the whole call if it has none."""
    if isinstance(call, str):
        return checked_text(call, what)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise MalformedRow(f"{what} has a tool call without a name: {call!r:.100}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return checked_text(arguments, what)
    if isinstance(arguments, dict):
        for name in _EXPRESSIONS:
            if isinstance(expression := arguments.get(name), str):
                return checked_text(expression, what)
    return checked_text(f"{function['name']}({json.dumps(arguments, ensure_ascii=False)})", what)
