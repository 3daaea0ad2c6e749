"""``lmchat serve``: the chat page and an OpenAI-compatible API."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from lmchat.cli.lean_imports import importing
from lmchat.types import UserError


def serve(
    checkpoint: Path | None = None,
    tokenizer: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    max_running: int = 64,
    max_queued: int = 256,
    max_prompt_tokens: int | None = None,
    max_new_tokens: int | None = None,
    max_body_bytes: int = 1_000_000,
    max_seconds: float = 300,
) -> None:
    """Serve a model: a chat page at / and OpenAI's API at /v1. Ctrl-C ends it.

    Args:
        checkpoint: folder or file of a checkpoint; default is the newest of the last stage that has one.
        tokenizer: folder of its tokenizer; default is the one beside the checkpoint folders, or else
            $LMCHAT_BASE_DIR/tokenizer.
        host: address to listen on; 0.0.0.0 is all networks of this machine, which needs an API key.
        port: port to listen on; 0 is any free port.
        api_key: bearer token that requests must have; default is $LMCHAT_API_KEY, which other users of this machine
            cannot see. Without either, no token is needed.
        max_running: maximum number of completions generated together.
        max_queued: maximum number of waiting completions; further requests get status 429.
        max_prompt_tokens: maximum length of a prompt; null is the model's limit.
        max_new_tokens: maximum length of an answer; null is the model's limit.
        max_body_bytes: maximum size of a request.
        max_seconds: time limit of a request, including waiting.
    """
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise UserError(f"lmchat serve needs {', '.join(missing)}; install them with pip install 'lmchat[serve]'")
    with importing():
        from lmchat.checkpoint.load import find_model
        from lmchat.serve.app import Server
        from lmchat.serve.http_server import open_socket, run_server
        from lmchat.serve.limits import Limits
        from lmchat.serve.load import load_engine, model_card
        from lmchat.serve.security import check_api_key, is_loopback

        limits = Limits(max_running, max_queued, max_prompt_tokens, max_new_tokens, max_body_bytes, max_seconds)
        key = (os.environ.get("LMCHAT_API_KEY") or None) if api_key is None else api_key
        api_key = key if key is None else check_api_key(key)
        loopback = is_loopback(host)
        listener = open_socket(host, port)
        if not loopback and api_key is None:
            listener.close()
            raise UserError(f"--host {host} is open to the network; set LMCHAT_API_KEY to a secret token")
        found = find_model(checkpoint)
        engine = load_engine(found, tokenizer, max_rows=max_running)
        server = Server(engine, model_card(found, engine), limits, api_key=api_key, loopback=loopback)
    print(f"{found.stage} {found.meta['tag']}, step {found.step}: {found.paths.meta}", file=sys.stderr)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    print(f"Chat: {address}/   API: {address}/v1   Ctrl-C ends the server", file=sys.stderr, flush=True)
    run_server(server, listener)


COMMANDS = serve
