"""Chat in the terminal: streams answers, keeps the conversation, handles commands."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace

from lmchat.generation.engine import Engine
from lmchat.generation.sampling import SamplingParams
from lmchat.paths import base_dir
from lmchat.serve.answers import append_part
from lmchat.tokenizer.render import render_for_completion
from lmchat.types import Message, Part, UserError

HELP = (
    "/reset: new conversation. /system [TEXT]: new conversation, with an optional system prompt. "
    "/quit or Ctrl-D: leave. Ctrl-C: stop an answer."
)
HISTORY_LINES = 1000
CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"} | {ord("\r"): ""}
"""How control characters are printed: an answer must not move the cursor, retitle the window or set the clipboard."""


class TerminalChat:
    """One chat with a model.

    Args:
        engine: the model and its tokenizer.
        params: sampling parameters of the first answer; each further one adds 1 to the seed.
        system: system prompt.

    Raises:
        UserError: the context has no room for a question, or the system prompt cannot be used.
    """

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None = None) -> None:
        self.engine = engine
        self.params = params
        self.reset(system)

    def reset(self, system: str | None) -> None:
        """Starts a new conversation, unless the system prompt leaves no room for a question (UserError)."""
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._check_room(messages)
        self.system, self.messages = system, messages
        self._first_turn = len(messages)

    def _check_room(self, messages: list[Message], question: str | None = None) -> None:
        """Raises UserError if ``question``, by default the shortest, and its answer exceed the context.

        ``messages`` are those that are never forgotten: the system prompt, if there is one.
        """
        asked: Message = {"role": "user", "content": question or "?"}
        prompt = len(render_for_completion(self.engine.tokenizer, {"messages": [*messages, asked]}))
        limit, wanted = self.engine.context_limit, self.params.max_new_tokens
        if prompt + wanted <= limit:
            return
        what = "this message" if question else "the shortest message"
        what += " with this system prompt" if messages else ""
        remedies = [f"lower --max_new_tokens to at most {limit - prompt}"] if limit > prompt else []
        if question or messages:
            remedies.append(f"shorten the {'message' if question else 'system prompt'}")
        raise UserError(
            f"{what} has {prompt} tokens and --max_new_tokens is {wanted}, together more than the model's context of "
            f"{limit}; {' or '.join(remedies) or 'use a model with a longer context'}"
        )

    def run(self) -> None:
        """Reads lines from standard input until it ends or the user leaves."""
        print(HELP, file=sys.stderr)
        for line in _lines():
            try:
                if self._handle(line):
                    return
            except UserError as error:
                is_command = line.lstrip().startswith("/")
                rest = "the conversation goes on as before" if is_command else "this message is ignored"
                print(f"{error}; {rest}", file=sys.stderr)
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                print("\n(stopped; this message and its answer are ignored)", file=sys.stderr)

    def _handle(self, line: str) -> bool:
        """Runs a command or answers a question; returns whether the user leaves."""
        match line.split(maxsplit=1):
            case ["/quit" | "/exit"]:
                return True
            case ["/reset"]:
                self.reset(self.system)
            case ["/system", *text]:
                self.reset(text[0] if text else None)
            case ["/help" | "/?"]:
                print(HELP, file=sys.stderr)
            case [word, *_] if word.startswith("/"):
                print(f"unknown command {word}. {HELP}", file=sys.stderr)
            case [_, *_] if self._make_room(line):
                self.ask(line)
        return False

    def ask(self, question: str) -> str:
        """Prints the answer to ``question`` as it is generated and returns its text.

        Calculator calls and their results are shown in brackets.

        Raises:
            UserError: the question does not fit into the model's context; the conversation is unchanged.
        """
        self._check_room(self.messages[: self._first_turn], question)
        asked: Message = {"role": "user", "content": question}
        prompt = render_for_completion(self.engine.tokenizer, {"messages": [*self.messages, asked]})
        params, self.params = self.params, replace(self.params, seed=self.params.seed + 1)
        parts: list[Part] = []
        for token in self.engine.stream(prompt, params):
            if token.text:
                print(_mark(parts, token.role) + token.text.translate(CONTROLS), end="", flush=True)
                append_part(parts, {"type": token.role, "text": token.text})
        print(_mark(parts, "text"), flush=True)
        # An empty answer cannot be rendered in the next prompt, so question and answer are left out.
        if parts:
            self.messages += [asked, {"role": "assistant", "content": parts}]
        return "".join(part["text"] for part in parts)

    def _make_room(self, question: str) -> bool:
        """Removes the oldest turns if the conversation exceeds the context; False if the user declines."""
        turns = self.turns_to_forget(question)
        if not turns:
            return True
        notice = f"the conversation exceeds the model's context of {self.engine.context_limit} tokens"
        oldest = f"the oldest {turns} turn" + ("s" if turns > 1 else "")
        if sys.stdin.isatty():
            reply = _input(f"({notice}; forget {oldest} and continue? [Y/n] ")
            if reply is None or reply.strip().lower() not in ("", "y", "yes"):
                print("(this message is ignored; /reset starts a new conversation)", file=sys.stderr)
                return False
        del self.messages[self._first_turn : self._first_turn + 2 * turns]
        print(f"({notice}; {oldest} forgotten)", file=sys.stderr)
        return True

    def turns_to_forget(self, question: str) -> int:
        """Number of oldest turns (question and answer) to remove, so that the context has room for an answer.

        The system prompt is kept. Returns 0 if the question alone does not fit.
        """
        limit, first = self.engine.context_limit - self.params.max_new_tokens, self._first_turn
        asked: Message = {"role": "user", "content": question}
        for turns in range((len(self.messages) - first) // 2 + 1):
            kept = [*self.messages[:first], *self.messages[first + 2 * turns :], asked]
            if len(render_for_completion(self.engine.tokenizer, {"messages": kept})) <= limit:
                return turns
        return 0


def _mark(parts: list[Part], after: str) -> str:
    """Text printed before a further part of an answer; a calculator call is shown as ``[call = result]``."""
    if (before := parts[-1]["type"] if parts else "text") == after:
        return ""
    closing = "]" if before != "text" and after == "text" else ""
    return closing + {"python": "[", "python_output": " = "}.get(after, "")


def _lines() -> Iterator[str]:
    """Yields the user's lines; in a terminal with line editing and a history."""
    if not sys.stdin.isatty():
        yield from iter(lambda: _input(""), None)
        return
    with _line_editing():
        while True:
            try:
                line = _input("\n> ")
            except KeyboardInterrupt:
                print("\n(/quit or Ctrl-D leaves)", file=sys.stderr)
                continue
            if line is None:
                return
            yield line


def _input(prompt: str) -> str | None:
    """Reads a line; None at the end of input. If the output is not a terminal, the prompt is printed to stderr."""
    try:
        if prompt and not sys.stdout.isatty():
            print(prompt, end="", file=sys.stderr, flush=True)
            prompt = ""
        return input(prompt)
    except EOFError:
        return None


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Context manager with line editing and a history in ``$LMCHAT_BASE_DIR/chat_history`` for `input`."""
    try:
        import readline
    except ImportError:  # Python was built without readline
        yield
        return
    path = base_dir() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)
