"""Load test of `lmchat serve`: clients stream answers, some disconnect, and all answers are compared with the engine's.

    python benchmarks/serve_load.py --seconds 120

Without --checkpoint the model is a small untrained one. Clients and server share the machine, so latencies include the
clients' own work. Prints percentiles; ends with status 1 if an answer is lost, mixed up or refused, or memory grows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

# fp32, in which answers do not depend on the batch, also on CPUs with bf16 units; the server inherits this.
os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"

import numpy as np
import torch

from lmchat.checkpoint.layout import CheckpointPaths
from lmchat.checkpoint.load import find_checkpoint
from lmchat.checkpoint.writer import write_checkpoint
from lmchat.generation.sampling import SamplingParams
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.serve.load import load_engine
from lmchat.tokenizer.bpe import Tokenizer

SHAPE = {"sequence_len": 256, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "window_pattern": "SL"}
LEAVING = 0.15
"""Share of requests whose client leaves before the end."""
MAX_GROWTH_MB = 30
"""In the last quarter. At first memory grows: oneDNN keeps code for the shapes of products that it meets."""


def small_checkpoint(base: Path) -> Path:
    """Writes an untrained model whose answers vary in length."""
    tokenizer = Tokenizer({bytes([byte]): byte for byte in range(256)})
    tokenizer.save(base / "tokenizer")
    config = GPTConfig(vocab_size=tokenizer.vocab_size, **SHAPE)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(weight.shape, generator=generator) * (1.0 if weight.dim() == 1 or "wte" in name else 0.12)
        for name, weight in GPT(config).state_dict().items()
    }
    paths = CheckpointPaths(base / "chatsft_checkpoints" / "small", 1)
    paths.directory.mkdir(parents=True)
    rates = {"embedding_lr": 0.3, "unembedding_lr": 0.004, "matrix_lr": 0.02, "scalar_lr": 0.5}
    meta = {
        "stage": "sft", "tag": "small", "model": asdict(config), "tokenizer_fingerprint": tokenizer.fingerprint,
        "global_batch_tokens": 512, "micro_batch_size": 2, "total_steps": 1, "learning_rates": rates,
    }  # fmt: skip
    write_checkpoint(paths, model=state, rank_state={}, meta=meta)
    return paths.directory


@dataclass(frozen=True)
class Question:
    """A request and the engine's own answer to it."""

    body: dict[str, Any]
    expected: str


def questions(checkpoint: Path, count: int) -> list[Question]:
    """Different prompts, lengths and sampling parameters."""
    engine, rng = load_engine(find_checkpoint(checkpoint)), random.Random(0)
    found = []
    for seed in range(count):
        prompt = "Some text. " * rng.randint(0, 20) + str(seed)
        options = {"temperature": rng.choice([0.5, 0.8, 1.0]), "top_p": rng.choice([None, 0.9])}
        max_tokens, top_k = rng.choice([10, 40, 40, 160]), rng.choice([10, 50])
        params = SamplingParams(max_new_tokens=max_tokens, top_k=top_k, seed=seed, calculator=False, **options)
        [[completion]] = engine.generate([[engine.tokenizer.bos_id, *engine.tokenizer.encode(prompt)]], params)
        # Special tokens have no text and end an incomplete character.
        is_text = engine.tokenizer.token_bytes > 0
        runs = groupby(completion.content, key=lambda token: bool(is_text[token]))
        text = "".join(engine.tokenizer.decode(list(tokens)) for has_text, tokens in runs if has_text)
        body = {"prompt": prompt, "max_tokens": max_tokens, "top_k": top_k, "seed": seed, "stream": True, **options}
        found.append(Question(body, text))
    return found


@dataclass
class Record:
    """Measurements of the clients."""

    outcomes: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    events: int = 0


async def stream(port: int, body: dict[str, Any]) -> AsyncIterator[str]:
    """The pieces of an answer. Leaving the iterator closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json"
    writer.write(f"{head}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    try:
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(status.decode() + (await reader.read()).decode())
        while (line := await reader.readline()) != b"data: [DONE]\n":
            if not line:
                raise RuntimeError("the stream ended early")
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                yield event["choices"][0]["text"]
    finally:
        writer.close()


async def client(number: int, port: int, asked: list[Question], end: float, record: Record) -> None:
    """Asks one question after the other until the time is over."""
    rng = random.Random(number)
    while time.monotonic() < end:
        question = rng.choice(asked)
        leaves_after = rng.randint(0, 20) if rng.random() < LEAVING else None
        started = last = time.perf_counter()
        text, events = "", 0
        try:
            pieces = stream(port, question.body)
            async for piece in pieces:
                now = time.perf_counter()
                (record.gaps if events else record.first).append(now - last)
                last, text, events = now, text + piece, events + 1
                if leaves_after is not None and events > leaves_after:
                    break
            else:
                leaves_after = None
            await pieces.aclose()
        except (OSError, RuntimeError) as error:
            record.outcomes[f"failed: {error}"] += 1
            continue
        record.events += events
        if leaves_after is not None:
            record.outcomes["left" if question.expected.startswith(text) else "wrong"] += 1
        else:
            record.whole.append(time.perf_counter() - started)
            record.outcomes["right" if question.expected == text else "wrong"] += 1


def memory_mb(process: int) -> float:
    """Resident memory of a process."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def get(port: int, path: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    return answer.partition("\r\n\r\n")[2]


async def load(
    port: int, process: int, asked: list[Question], clients: int, seconds: float
) -> tuple[Record, list[float]]:
    """Runs the clients; returns what they saw, and the server's memory at each quarter of the time."""
    record, memory = Record(), []
    end = time.monotonic() + seconds
    running = [asyncio.create_task(client(number, port, asked, end, record)) for number in range(clients)]
    for _ in range(4):
        await asyncio.sleep(seconds / 4)
        memory.append(memory_mb(process))
    await asyncio.gather(*running)
    for _ in range(100):
        health = json.loads(await get(port, "/health"))
        if health["running"] == health["waiting"] == 0:
            return record, memory
        await asyncio.sleep(0.05)
    record.outcomes["failed: places are not free at the end"] += 1
    return record, memory


def report(record: Record, memory: list[float], seconds: float, cpu: float) -> bool:
    """Prints the results; returns whether there were no errors."""
    print(f"requests: {sum(record.outcomes.values())} in {seconds:g} s: {dict(record.outcomes)}")
    print(f"events: {record.events / seconds:,.0f} per second; server: {cpu / seconds:.2f} CPU cores")
    print("seconds          p50     p90     p99     max")
    for name, values in (
        ("first token", record.first),
        ("between events", record.gaps),
        ("whole answer", record.whole),
    ):
        print(f"{name:<14}" + "".join(f"{value:8.3f}" for value in np.percentile(values, [50, 90, 99, 100])))
    print("server's memory at each quarter, MB: " + ", ".join(f"{value:.0f}" for value in memory))
    bad = [outcome for outcome in record.outcomes if outcome not in ("right", "left")]
    return not bad and record.outcomes["right"] > 0 and memory[-1] - memory[-2] < MAX_GROWTH_MB


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as base:
        checkpoint = options.checkpoint or small_checkpoint(Path(base))
        asked = questions(checkpoint, 60)
        command = [sys.executable, "-m", "lmchat", "serve", "--checkpoint", str(checkpoint), "--port", "0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            assert server.stderr is not None
            try:
                address = next(line for line in server.stderr if line.startswith("Chat: "))
                port = int(address.split("/")[2].split(":")[1])
                before = cpu_seconds(server.pid)
                record, memory = asyncio.run(load(port, server.pid, asked, options.clients, options.seconds))
                well = report(record, memory, options.seconds, cpu_seconds(server.pid) - before)
            finally:
                server.terminate()
            return 0 if server.wait(timeout=60) == 0 and well else 1


if __name__ == "__main__":
    sys.exit(main())
