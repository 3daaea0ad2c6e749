"""The server's routes: OpenAI's API on the engine, health and metrics, and the chat page."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import KW_ONLY, InitVar, dataclass
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route

from lmchat.generation.engine import Engine
from lmchat.serve.engine_worker import EngineWorker
from lmchat.serve.errors import APIError
from lmchat.serve.http_io import GeneratedResponse, read_body
from lmchat.serve.limits import Admission, Limits
from lmchat.serve.load import ModelCard
from lmchat.serve.metrics import Metrics
from lmchat.serve.openai_responses import ChatResponses, CompletionResponses, Responses
from lmchat.serve.openai_schema import (
    DEFAULT_CHAT_TOKENS,
    DEFAULT_COMPLETION_TOKENS,
    MAX_LOGPROBS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
    messages_of,
    parse,
)
from lmchat.serve.run import Plan
from lmchat.serve.security import Gate
from lmchat.tokenizer.bpe import SPECIAL_TOKENS
from lmchat.tokenizer.render import render_for_completion
from lmchat.types import Conversation

ANY_MODEL = "lmchat"
"""Name that requests may use instead of the model's."""

PAGE = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    **{f"{name}.js": "text/javascript; charset=utf-8" for name in ("app", "api", "markdown", "store")},
}
"""Files of the page with their types."""


@dataclass(eq=False)
class Server:
    """The server as an ASGI application, ``app``.

    Args:
        engine: the engine; must not be used otherwise while the application runs.
        api_key: bearer token that requests must have; None for none.
        loopback: whether the Host header must be this machine.

    Attributes:
        admission: set ``draining`` to refuse new requests.
    """

    engine: Engine
    card: ModelCard
    limits: Limits
    _: KW_ONLY
    api_key: InitVar[str | None] = None
    loopback: InitVar[bool] = True

    def __post_init__(self, api_key: str | None, loopback: bool) -> None:
        engine, limits = self.engine, self.limits
        self.worker = EngineWorker(engine)
        self.admission = Admission(limits)
        self.metrics = Metrics(lambda: len(engine.scheduler.running), lambda: engine.scheduler.num_waiting)
        self.max_prompt_tokens = min(limits.max_prompt_tokens or engine.context_limit, engine.context_limit - 1)
        self.max_new_tokens = min(limits.max_new_tokens or engine.context_limit, engine.context_limit - 1)
        self._longest_token = int(engine.tokenizer.token_bytes.max())
        pages = {"/", *(f"/{name}" for name in PAGE), "/health"}
        self.app = Gate(
            app=self._routes(),
            metrics=self.metrics,
            public=frozenset(pages),
            counted=frozenset(pages | {"/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics"}),
            api_key=api_key,
            loopback=loopback,
        )

    def _routes(self) -> FastAPI:
        app = FastAPI(title="lmchat", docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._lifespan)
        app.post("/v1/chat/completions")(self.chat)
        app.post("/v1/completions")(self.complete)
        app.post("/tokenize")(self.tokenize)
        app.post("/detokenize")(self.detokenize)
        get = partial(app.api_route, methods=["GET", "HEAD"])
        get("/tokenizer_info")(self.tokenizer_info)
        get("/v1/models")(self.models)
        get("/v1/models/{name:path}")(self.model)
        get("/health")(self.health)
        get("/metrics")(self.metrics_text)
        for name, kind in PAGE.items():
            content = (files("lmchat.serve") / "page" / name).read_bytes()
            path = "/" if name == "index.html" else f"/{name}"
            page = Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})
            app.routes.append(Route(path, page, methods=["GET", "HEAD"]))
        app.add_exception_handler(APIError, _on_error)
        app.add_exception_handler(HTTPException, _on_error)
        return app

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.worker.close)

    # -----------------------------------------------------------------------------------------------------------------
    # Routes

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        wanted = parse(ChatRequest, await read_body(request, self.limits.max_body_bytes))
        self._check(wanted)
        conversation: Conversation = {"messages": messages_of(wanted)}
        self._check_size(*(str(message["content"]) for message in conversation["messages"]), param="messages")
        tokenizer = self.engine.tokenizer
        prompt = await asyncio.to_thread(render_for_completion, tokenizer, conversation)
        if wanted.top_logprobs and not wanted.logprobs:
            raise APIError("top_logprobs needs logprobs: true", param="top_logprobs")
        if len({wanted.max_tokens, wanted.max_completion_tokens} - {None}) > 1:
            raise APIError("max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
        max_tokens = self._max_tokens([prompt], wanted.max_completion_tokens or wanted.max_tokens, "messages")
        top_logprobs = (wanted.top_logprobs or 0) if wanted.logprobs else None
        plan = Plan(
            prompts=[prompt],
            params=wanted.sampling(max_tokens, calculator=True, top_logprobs=top_logprobs),
            num_samples=wanted.samples,
            stops=wanted.stops,
            chat=True,
            top_logprobs=top_logprobs,
        )
        return self._generated(wanted, plan, max_tokens, ChatResponses(tokenizer, self.card.name))

    async def complete(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        wanted = parse(CompletionRequest, await read_body(request, self.limits.max_body_bytes))
        self._check(wanted)
        self.admission.check(len(wanted.prompts) * wanted.samples)
        sent = [await self._tokens(prompt) if isinstance(prompt, str) else prompt for prompt in wanted.prompts]
        size = self.engine.config.vocab_size
        if any(not 0 <= token < size for ids in sent for token in ids):
            raise APIError(f"the prompt must have token ids from 0 to {size - 1}", param="prompt")
        bos = self.engine.tokenizer.bos_id
        prompts = [ids if ids[:1] == [bos] else [bos, *ids] for ids in sent]  # as in training
        max_tokens = DEFAULT_COMPLETION_TOKENS if wanted.max_tokens is None else wanted.max_tokens
        self._max_tokens(prompts, max_tokens or 1, "prompt")
        top_logprobs = wanted.logprobs
        plan = Plan(
            prompts=prompts,
            params=wanted.sampling(max_tokens, calculator=False, top_logprobs=top_logprobs) if max_tokens else None,
            num_samples=wanted.samples,
            stops=wanted.stops,
            echo=sent if wanted.echo else None,
            top_logprobs=top_logprobs,
        )
        return self._generated(wanted, plan, max_tokens, CompletionResponses(self.engine.tokenizer, self.card.name))

    async def tokenize(self, request: Request) -> Response:
        """``POST /tokenize``, as of vLLM. A text that is the name of a special token is that token."""
        wanted = parse(TokenizeRequest, await read_body(request, self.limits.max_body_bytes))
        name = wanted.prompt.removeprefix("<|").removesuffix("|>")
        is_special = wanted.prompt in SPECIAL_TOKENS
        tokens = [self.engine.tokenizer.special(name)] if is_special else await self._tokens(wanted.prompt)
        return JSONResponse({"count": len(tokens), "max_model_len": self.engine.context_limit, "tokens": tokens})

    async def detokenize(self, request: Request) -> Response:
        """``POST /detokenize``, as of vLLM."""
        wanted = parse(DetokenizeRequest, await read_body(request, self.limits.max_body_bytes))
        if any(not 0 <= token < self.engine.config.vocab_size for token in wanted.tokens):
            raise APIError(f"tokens must be from 0 to {self.engine.config.vocab_size - 1}", param="tokens")
        return JSONResponse({"prompt": self.engine.tokenizer.decode(wanted.tokens)})

    async def tokenizer_info(self) -> Response:
        """``GET /tokenizer_info``, as of vLLM: how lm-eval finds out that it can tokenize here."""
        return JSONResponse({"bos_token": "<|bos|>", "eos_token": "<|bos|>"})

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        self._check_model(name)
        return JSONResponse(self._model())

    async def health(self) -> Response:
        """``GET /health``: 200 while the server answers requests."""
        state = "failed" if self.worker.failed else "shutting down" if self.admission.draining else "ok"
        content = {
            "status": state,
            "model": self.card.name,
            "running": len(self.engine.scheduler.running),
            "waiting": self.engine.scheduler.num_waiting,
        }
        return JSONResponse(content, status_code=200 if state == "ok" else 503)

    async def metrics_text(self) -> Response:
        """``GET /metrics``, in Prometheus' text format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    # -----------------------------------------------------------------------------------------------------------------

    def _generated(self, wanted: GenerationRequest, plan: Plan, max_tokens: int, responses: Responses) -> Response:
        """The response to a request; one that would take too much memory is refused."""
        stream, options = bool(wanted.stream), wanted.stream_options
        if plan.top_logprobs is not None and not stream:
            echoed = sum(map(len, plan.echo or ()))
            tokens = plan.num_samples * (echoed + len(plan.prompts) * max_tokens)
            if (count := tokens * (1 + plan.top_logprobs)) > MAX_LOGPROBS:
                message = f"{count} log-probabilities exceed {MAX_LOGPROBS}; ask for fewer, or for a stream"
                raise APIError(message, param="logprobs")
        usage = bool(options and options.include_usage)
        return GeneratedResponse(self.worker, self.admission, self.metrics, plan, responses, stream, usage)

    def _check(self, wanted: GenerationRequest) -> None:
        if wanted.model is not None:
            self._check_model(wanted.model)
        if wanted.samples > self.limits.max_running:
            raise APIError(f"n is {wanted.samples}; it must be at most {self.limits.max_running}", param="n")
        if wanted.best_of not in (None, wanted.samples):
            message = "best_of other than n is not supported; leave it out"
            raise APIError(message, param="best_of", code="unsupported_parameter")
        if wanted.stream_options and not wanted.stream:
            raise APIError("stream_options needs stream: true", param="stream_options")

    def _check_model(self, name: str) -> None:
        if name not in (self.card.name, ANY_MODEL):
            message = f"there is no model {name[:100]!r} here; this server has {self.card.name!r}"
            raise APIError(message, status=404, code="model_not_found", param="model")

    def _check_size(self, *texts: str, param: str) -> None:
        """Refuses texts that certainly have too many tokens, before they are encoded."""
        size = sum(len(text.encode(errors="replace")) for text in texts)
        if size > self.max_prompt_tokens * self._longest_token:
            raise APIError(
                f"the prompt has {size} bytes; this server reads at most {self.max_prompt_tokens} tokens; shorten it",
                code="context_length_exceeded",
                param=param,
            )

    async def _tokens(self, text: str) -> list[int]:
        self._check_size(text, param="prompt")
        return await asyncio.to_thread(self.engine.tokenizer.encode, text)

    def _max_tokens(self, prompts: Sequence[Sequence[int]], wanted: int | None, param: str) -> int:
        """Maximum number of tokens to generate; ``param`` is the field with the prompts.

        Raises:
            APIError: prompt or completion is too long.
        """
        longest, limit = max(map(len, prompts)), self.engine.context_limit
        if longest > self.max_prompt_tokens:
            message = f"the prompt has {longest} tokens; this server reads at most {self.max_prompt_tokens}; shorten it"
            raise APIError(message, code="context_length_exceeded", param=param)
        if wanted is None:
            return min(DEFAULT_CHAT_TOKENS, self.max_new_tokens, limit - longest)
        if wanted > self.max_new_tokens:
            message = f"max_tokens is {wanted}; it must be at most {self.max_new_tokens}"
            raise APIError(message, param="max_tokens")
        if longest + wanted > limit:
            message = (
                f"the prompt has {longest} tokens, which with max_tokens {wanted} exceeds the model's {limit}; "
                "shorten one of them"
            )
            raise APIError(message, code="context_length_exceeded", param="max_tokens")
        return wanted

    def _model(self) -> dict[str, Any]:
        details = {**self.card.details, "max_new_tokens": self.max_new_tokens}
        return {
            "id": self.card.name,
            "object": "model",
            "created": self.card.created,
            "owned_by": "lmchat",
            "max_model_len": self.engine.context_limit,
            "details": details,
        }


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, APIError):
        return error.response
    assert isinstance(error, HTTPException)
    message = f"{request.method[:20]} {request.url.path[:100]}: {error.detail}"
    response = APIError(message, status=error.status_code).response
    response.headers.update(error.headers or {})
    return response
