"""The model card of an export, from the run's meta."""

from __future__ import annotations

from typing import Any

from lmchat.model.config import GPTConfig
from lmchat.scaling import flops_per_token, parameter_counts

_STAGES = {
    "pretrain": "pretrained on text; it continues documents and has not been taught to converse",
    "sft": "fine-tuned on conversations",
    "rl": "fine-tuned on conversations and trained further by reinforcement learning",
}


def model_card(meta: dict[str, Any], config: GPTConfig, native: bool, dtype: str) -> str:
    """Markdown with the front matter for the Hugging Face Hub."""
    tags = ["lmchat", "nanochat", *([] if native else ["custom_code"])]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags:",
            *(f"- {tag}" for tag in tags),
            "---",
            "",
            f"# {meta['tag']} ({meta['stage']})",
            "",
            f"A small language model of nanochat's architecture, trained with lmchat: {_STAGES[meta['stage']]}.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in _facts(meta, config, dtype).items()),
            "",
            "## Use",
            "",
            "```python",
            *_example(native, chat=meta["stage"] != "pretrain"),
            "```",
            "",
            _limits(config, native),
            "",
        ]
    )


def _facts(meta: dict[str, Any], config: GPTConfig, dtype: str) -> dict[str, str]:
    counts = parameter_counts(config)
    facts = {
        "parameters": f"{counts.total:,} ({counts.scaling:,} of them in matrices, the rest in token tables)",
        "layers × width": f"{config.n_layer} × {config.n_embd}",
        "heads": f"{config.n_head} for queries, {config.n_kv_head} for keys and values",
        "vocabulary": f"{config.vocab_size:,}",
        "training context": f"{config.sequence_len:,} tokens",
        "attention windows": ", ".join(map(str, config.window_sizes)),
        **_history(meta),
    }
    batch = meta.get("global_batch_tokens")
    if meta["stage"] == "pretrain" and batch:
        tokens = meta["step"] * batch
        facts["tokens"] = f"{tokens:,} ({batch:,} a step)"
        facts["training FLOPs"] = f"{tokens * flops_per_token(config):.3g}"
    facts["stored in"] = dtype
    facts["tokenizer"] = f"byte-level BPE, fingerprint {meta['tokenizer_fingerprint'][:16]}"
    facts["lmchat"] = meta.get("lmchat_version", "unknown")
    return facts


def _history(meta: dict[str, Any]) -> dict[str, str]:
    if imported := meta.get("imported"):
        return {"imported from": f"{imported['kind']}, step {imported['step'] or 'unknown'}"}
    return {
        "optimizer steps": f"{meta['step']:,}" + (f" of {meta['total_steps']:,}" if meta.get("total_steps") else "")
    }


def _example(native: bool, chat: bool) -> list[str]:
    remote = "" if native else ", trust_remote_code=True"
    prompt = (
        'prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Why is the sky blue?"}], '
        'add_generation_prompt=True, return_dict=True, return_tensors="pt")'
        if chat
        else 'prompt = tokenizer("The sky is", return_tensors="pt")'
    )
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # or this repository\'s name on the Hub',
        f"tokenizer = AutoTokenizer.from_pretrained(folder{remote})",
        f"model = AutoModelForCausalLM.from_pretrained(folder{remote})",
        prompt,
        "out = model.generate(**prompt, max_new_tokens=100, do_sample=True, temperature=0.6, top_k=50)",
        'print(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _limits(config: GPTConfig, native: bool) -> str:
    context = (
        f"Contexts beyond {config.sequence_len:,} tokens were not trained on."
        if native
        else f"Attention windows slide beyond {config.sequence_len:,} tokens; the limit is ten times that."
    )
    return (
        f"{context} The model may call a calculator (`<|python_start|>` expression `<|python_end|>`) and expects its "
        "answer after `<|output_start|>`; transformers does not give it, `lmchat chat` does."
    )
