"""``lmchat chat``: talk to a model in the terminal."""

import sys
from pathlib import Path

from lmchat.cli.lean_imports import importing


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
    """Chat with a model. Answers are streamed, with calculator calls and results in brackets.

    Args:
        checkpoint: folder or file of a checkpoint; default is the newest of the last stage that has one.
        tokenizer: folder of its tokenizer; default is the one beside the checkpoint folders, or else
            $LMCHAT_BASE_DIR/tokenizer.
        prompt: answer this message and exit; also -p.
        system: system prompt.
        temperature: sampling temperature; 0 is greedy decoding.
        top_k: sample from the k most likely tokens; null is all.
        max_new_tokens: maximum number of tokens of an answer.
        seed: seed of the sampling; each answer of a conversation uses other random numbers.
    """
    with importing():
        from lmchat.checkpoint.load import find_model
        from lmchat.generation.sampling import SamplingParams
        from lmchat.serve.load import load_engine
        from lmchat.serve.terminal import TerminalChat

        found = find_model(checkpoint)
        engine = load_engine(found, tokenizer)
    print(f"{found.stage} {found.meta['tag']}, step {found.step}: {found.paths.meta}", file=sys.stderr)
    params = SamplingParams(temperature=temperature, top_k=top_k, max_new_tokens=max_new_tokens, seed=seed)
    terminal = TerminalChat(engine, params, system)
    if prompt is not None:
        terminal.ask(prompt)
    else:
        terminal.run()


COMMANDS = chat
SHORT_OPTIONS = {"-p": "--prompt"}
