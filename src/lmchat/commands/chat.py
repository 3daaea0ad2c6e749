"""``lmchat chat``: talk to a model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lmchat.types import Message, Part, UserError

if TYPE_CHECKING:
    from lmchat.checkpoint.load import Checkpoint
    from lmchat.generation.engine import Engine, Piece

HELP = "/reset begins anew, /system TEXT too, with a system prompt or without TEXT none, /quit (or Ctrl-D) leaves"


def chat(
    checkpoint: Path | None = None,
    tokenizer: Path | None = None,
    prompt: str | None = None,
    system: str | None = None,
    temperature: float = 0.6,
    top_k: int | None = 50,
    max_new_tokens: int = 256,
    seed: int = 42,
) -> None:
    """Talk to a model; answers appear as they are written, calculator calls and their results in brackets.

    Args:
        checkpoint: folder or file of a checkpoint; by default the newest of the furthest stage that there is.
        tokenizer: folder of its tokenizer; by default the one beside the folders of checkpoints, or else
            $LMCHAT_BASE_DIR/tokenizer.
        prompt: answer this one message and leave.
        system: a system prompt.
        temperature: 0 for the likeliest answer.
        top_k: sample from the k likeliest tokens; null is all.
        max_new_tokens: longest answer.
        seed: of the sampling; each answer of a conversation draws anew.
    """
    found = _find(checkpoint)
    engine = load_engine(found, tokenizer)
    print(f"{found.stage} {found.meta['tag']}, step {found.step}: {found.paths.meta}", file=sys.stderr)
    stream = partial(engine.stream, temperature=temperature, top_k=top_k, max_new_tokens=max_new_tokens)
    talk = _begin(system)
    if prompt is not None:
        answer(engine, talk, prompt, partial(stream, seed=seed))
        return
    print(HELP, file=sys.stderr)
    for turn, line in enumerate(_lines()):
        match line.split(maxsplit=1):
            case ["/quit" | "/exit"]:
                return
            case ["/reset"]:
                talk = _begin(system)
            case ["/system", *text]:
                system = text[0] if text else None
                talk = _begin(system)
            case [word, *_] if word.startswith("/"):
                print(f"unknown command {word}: {HELP}", file=sys.stderr)
            case [_, *_]:
                try:
                    answer(engine, talk, line, partial(stream, seed=seed + turn))
                except UserError as error:
                    print(f"{error}; this message is left out, /reset begins anew", file=sys.stderr)


COMMANDS = chat
SHORT_OPTIONS = {"-p": "--prompt"}


def _find(path: Path | None) -> Checkpoint:
    from lmchat.checkpoint.load import find_checkpoint
    from lmchat.paths import base_dir
    from lmchat.stage_table import STAGES

    if path is not None:
        return find_checkpoint(path)
    for folder in reversed([stage.checkpoints for stage in STAGES.values()]):  # the furthest stage first
        metas = base_dir().glob(f"{folder}/*/meta_*.json")
        if newest := max(metas, key=lambda meta: meta.stat().st_mtime, default=None):
            return find_checkpoint(newest.parent)
    raise UserError(f"there is no model in {base_dir()}; train one first with `lmchat fit`, or name one: --checkpoint")


def load_engine(checkpoint: Checkpoint, tokenizer_folder: Path | None = None) -> Engine:
    """The checkpoint's model with its tokenizer, on the GPU if there is one.

    Raises:
        UserError: the tokenizer is missing, or not the one that the model was trained with.
    """
    import torch

    from lmchat.checkpoint.load import load_model
    from lmchat.generation.engine import Engine
    from lmchat.paths import tokenizer_dir
    from lmchat.tokenizer.bpe import Tokenizer

    # A pipeline's tokenizer lies beside its checkpoints.
    beside = checkpoint.paths.directory.parent.parent / "tokenizer"
    folder = tokenizer_folder or (beside if beside.is_dir() else tokenizer_dir())
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint != checkpoint.meta["tokenizer_fingerprint"]:
        raise UserError(
            f"{checkpoint.paths.meta} was trained with another tokenizer than the one in {folder}; give the folder of "
            "its own with --tokenizer"
        )
    return Engine(load_model(checkpoint, "cuda" if torch.cuda.is_available() else "cpu"), tokenizer)


def _begin(system: str | None) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


def _lines() -> Iterator[str]:
    while True:
        try:
            yield input("\n> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def answer(engine: Engine, talk: list[Message], question: str, stream: Callable[[list[int]], Iterator[Piece]]) -> str:
    """Prints the answer to ``question`` as it comes, adds both to ``talk``, and returns the answer's text.

    Raises:
        UserError: the conversation has become longer than the model's limit; ``talk`` is as it was.
    """
    from lmchat.tokenizer.render import render_for_completion

    asked: Message = {"role": "user", "content": question}
    prompt = render_for_completion(engine.tokenizer, {"messages": [*talk, asked]})
    parts: list[Part] = []
    for piece in stream(prompt):
        if not piece.text:
            continue
        if not parts or parts[-1]["type"] != piece.role:
            print(_mark(parts[-1]["type"] if parts else "text", piece.role), end="")
            parts.append({"type": piece.role, "text": ""})
        parts[-1]["text"] += piece.text
        print(piece.text, end="", flush=True)
    print(_mark(parts[-1]["type"], "text") if parts else "", flush=True)
    # An empty answer cannot be rendered again; the question goes with it.
    if parts:
        talk += [asked, {"role": "assistant", "content": parts}]
    return "".join(part["text"] for part in parts)


def _mark(before: str, after: str) -> str:
    """What stands between two parts of an answer: a calculator call is shown as ``[call = result]``."""
    closing = "]" if before != "text" and after == "text" else ""
    return closing + {"python": "[", "python_output": " = "}.get(after, "")
