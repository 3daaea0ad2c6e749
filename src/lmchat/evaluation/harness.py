"""lmchat's models as models of lm-evaluation-harness (lm-eval 0.4.12), which this module imports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lmchat.evaluation.core import Example, cut_example
from lmchat.evaluation.core_scoring import score_in_batches
from lmchat.generation.policy import Policy
from lmchat.generation.sampling import SamplingParams
from lmchat.tokenizer.bpe import SPECIAL_TOKENS
from lmchat.tokenizer.render import render_conversation, render_for_completion
from lmchat.types import Conversation, UserError

DEFAULT_MAX_NEW_TOKENS = 256
_SPECIAL = re.compile(f"({'|'.join(map(re.escape, SPECIAL_TOKENS))})")


class HarnessModel(LM):
    """A policy as a model of the harness.

    Contexts begin with ``<|bos|>``. Contexts longer than the model's limit are cut at the beginning. Rolling
    log-likelihoods use windows of the length of training rows.

    Args:
        chat: whether contexts are rendered by the chat template, so that special tokens are parsed.
    """

    def __init__(self, policy: Policy, chat: bool = False) -> None:
        super().__init__()
        self.policy = policy
        self.chat = chat
        self._device = policy.net.device

    @property
    def tokenizer_name(self) -> str:
        """Identifies tokenizer and chat template."""
        return str(self.policy.tokenizer.fingerprint)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders a conversation; without ``add_generation_prompt`` its last message is to be continued."""
        tokenizer = self.policy.tokenizer
        conversation: Conversation = {"messages": chat_history}  # type: ignore[typeddict-item]
        if add_generation_prompt:
            return tokenizer.decode(render_for_completion(tokenizer, conversation))
        ids, _ = render_conversation(tokenizer, conversation, max_tokens=self.policy.context_limit)
        return tokenizer.decode(ids[:-1])

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, starting with ``<|bos|>``."""
        tokenizer = self.policy.tokenizer
        ids: list[int] = []
        for part in _SPECIAL.split(text) if self.chat else [text]:
            ids += [tokenizer.special(part[2:-2])] if self.chat and part in SPECIAL_TOKENS else tokenizer.encode(part)
        return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Sum of the log-probabilities of each continuation, and whether it is decoded greedily."""
        by_context: dict[str, list[int]] = {}
        pairs = [_with_spaces_moved(*request.args) for request in requests]
        for index, (context, _) in enumerate(pairs):
            by_context.setdefault(context, []).append(index)
        examples = []
        for context, indices in by_context.items():
            start = len(self.encode(context))
            options = [self.encode(context + pairs[index][1]) for index in indices]
            examples.append(self._example(options, [start] * len(options)))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for indices, example, scores in zip(
            by_context.values(), examples, score_in_batches(self.policy.net, examples), strict=True
        ):
            for index, (start, end), each in zip(indices, example.spans, scores, strict=True):
                results[index] = (-each.loss * (end - start), each.greedy)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihood of each text as a whole."""
        bos, length = self.policy.tokenizer.bos_id, self.policy.net.config.sequence_len
        totals = [0.0] * len(requests)
        examples, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.policy.tokenizer.encode(request.args[0])
            for window in get_rolling_token_windows(tokens, bos, max_seq_len=length, context_len=1):
                context, predicted = make_disjoint_window(window)
                examples.append(self._example([[*context, *predicted]], [len(context)]))
                owners.append(number)
        for number, example, (each,) in zip(owners, examples, score_in_batches(self.policy.net, examples), strict=True):
            ((start, end),) = example.spans
            totals[number] -= each.loss * (end - start)
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Generates a continuation of each context up to the first of its ``until`` strings, in one batch."""
        engine = self.policy.engine
        texts = [""] * len(requests)
        running: dict[int, tuple[int, list[int], list[str]]] = {}
        for index, request in enumerate(requests):
            context, options = request.args
            until = options.get("until") or []
            new_tokens = int(options.get("max_gen_toks", DEFAULT_MAX_NEW_TOKENS))
            temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
            prompt = self.encode(context)[-(self.policy.context_limit - new_tokens) :]
            number = engine.add_request(prompt, SamplingParams(temperature=temperature, max_new_tokens=new_tokens))
            running[number] = (index, [], [until] if isinstance(until, str) else list(until))
        try:
            while running:
                for event in engine.step():
                    if event.request not in running:
                        continue
                    index, ids, until = running[event.request]
                    if event.finish_reason != "stop":
                        ids.append(event.token)
                    text = self.policy.tokenizer.decode(ids)
                    texts[index] = min((text.partition(each)[0] for each in until if each), key=len, default=text)
                    if event.finish_reason or texts[index] != text:
                        engine.cancel(event.request)
                        del running[event.request]
        finally:
            for number in running:
                engine.cancel(number)
        return texts

    def _example(self, options: list[list[int]], starts: list[int]) -> Example:
        """Options scored from ``starts`` on; those that are too long are cut at the beginning."""
        spans = [(min(start, len(option) - 1), len(option)) for option, start in zip(options, starts, strict=True)]
        return cut_example(options, spans, 0, self.policy.context_limit)


def _with_spaces_moved(context: str, continuation: str) -> tuple[str, str]:
    """Moves spaces at the end of a context to the continuation, whose first token includes them."""
    kept = context.rstrip()
    return (kept, context[len(kept) :] + continuation) if kept else (context, continuation)


def evaluate_harness(
    policy: Policy,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
) -> dict[str, Any]:
    """Evaluates tasks or groups of the harness, by default with their own ``num_fewshot``.

    ``include_path`` is a folder with additional tasks, ``limit`` the maximum number of documents per task. Returns the
    result of `lm_eval.simple_evaluate`.

    Raises:
        UserError: there is no such task.
    """
    manager = _task_manager(tasks, include_path)
    results = simple_evaluate(
        HarnessModel(policy, chat=chat_template),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=chat_template,
    )
    assert results is not None  # it is None only on ranks other than 0
    return dict(results)


def _task_manager(tasks: Sequence[str], include_path: Path | None) -> TaskManager:
    """Indexes the tasks of ``include_path``, and the harness's own only if needed, which takes 10 s."""
    missing = list(tasks)
    for include_defaults in (False, True) if include_path is not None else (True,):
        folder = None if include_path is None else str(include_path)
        manager = TaskManager(include_path=folder, include_defaults=include_defaults)
        missing = [name for name in tasks if not manager.match_tasks([name])]
        if not missing:
            return manager
    raise UserError(f"the harness has no task {missing[0]!r}; `lm-eval ls tasks` lists them")
