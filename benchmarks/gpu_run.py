"""The GPU benchmark: eight minutes on one card, without a network (`make bench-gpu`). Never run on a GPU so far.

    python benchmarks/gpu_run.py [--toy] [--output runs/gpu] [--parts attention d12 ...]

Each part is a process with a time limit, which appends each result to OUTPUT/results.jsonl; the table OUTPUT/results.md
is written after each part. After a failure or a timeout the next part starts, and earlier results are kept. --toy tests
the same code on a CPU with small shapes.

Needs a torch image with lightning, numpy, pyarrow, tiktoken and tokenizers, and the wheels that `make gpu-wheels`
unpacks; one cache folder of the compiler serves all parts.
"""

from __future__ import annotations

import argparse
import csv
import functools
import gc
import itertools
import json
import os
import random
import re
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
LIMITS = {
    "environment": 30,
    "cudnn": 20,
    "attention": 66,
    "tests": 66,
    "d12": 110,
    "memory": 70,
    "fp8": 65,
    "decode": 40,
    "fit": 100,
}
"""Seconds per part, including its start, in the order of the parts: the most important first."""

SLOWER_CPU = 6
"""Factor on the limits with ``--toy``, where compilation takes longest."""

Report = Callable[..., None]


class Shapes:
    """Shapes to measure: d12, d20 and d26 on a GPU, tiny ones with ``--toy``."""

    def __init__(self, toy: bool) -> None:
        self.toy = toy
        self.device = "cpu" if toy else "cuda"
        self.attention = {"d4": (2, 128, 2, 32)} if toy else {"d26": (8, 2048, 13, 128), "d12": (32, 2048, 6, 128)}
        self.backends = ("banded",) if toy else ("flash", "cudnn", "flex", "banded")
        self.d12 = (2, 64, 2) if toy else (12, 2048, 32)  # depth, tokens per row, rows
        self.memory = [(26, 2048, 8, False), (26, 2048, 16, True), (20, 2048, 16, False)]
        if toy:
            self.memory = [(2, 64, 2, False)]  # depth, tokens per row, rows, recompute
        self.fp8 = (2, 64, 2) if toy else (26, 2048, 8)  # depth, tokens per row, rows
        self.decode = (2, 64, 4, 8) if toy else (20, 2048, 256, 64)  # depth, tokens per row, rows, new tokens
        self.vocab_size = 320 if toy else 32768

    def config(self, depth: int, length: int) -> Any:
        from lmchat.scaling import config_for_depth

        return config_for_depth(depth, self.vocab_size, length, head_dim=32 if self.toy else 128)

    def network(self, depth: int, length: int) -> Any:
        import torch

        from lmchat.model.gpt import GPT

        with torch.device("meta"):
            net = GPT(self.config(depth, length), compute_dtype=torch.float32 if self.toy else torch.bfloat16)
        net.to_empty(device=self.device)
        net.init_weights()
        return net


def synchronize() -> None:
    """Waits for the device, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """Median duration of ``run``, after a warmup call."""
    run()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def environment(shapes: Shapes, report: Report) -> None:
    """Versions, the card, what can be imported, and whether FP8 products work."""
    import importlib.util

    import torch

    names = ["lightning", "jsonargparse", "torchao", "datasets", "transformers", "triton", "pytest", "fastapi"]
    found = [name for name in names if importlib.util.find_spec(name)]
    report(torch=torch.__version__, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), packages=found)
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        report(card=card.name, memory_gb=round(card.total_memory / 1e9, 1), sms=card.multi_processor_count)
    a = torch.randn(1024 if shapes.toy else 8192, 256 if shapes.toy else 8192, device=shapes.device)
    a = a.to(torch.bfloat16)
    product_ms = milliseconds(lambda: a @ a.T, 3)
    report(bf16_product_tflops=round(2 * a.size(0) ** 2 * a.size(1) / product_ms / 1e9, 1))
    from lmchat.model.fp8 import missing_hardware

    report(fp8=missing_hardware(torch.device(shapes.device), "tensorwise") or "works")


def cudnn(shapes: Shapes, report: Report) -> None:
    """First call of attention at new key lengths, as in decoding, with cuDNN's kernels and without."""
    import torch

    from lmchat.model.attention import attention, exclude_cudnn

    rows, heads, width = (2, 2, 32) if shapes.toy else (256, 10, 128)
    dtype = torch.float32 if shapes.toy else torch.bfloat16
    for excluded in (False, True):
        times = []
        for length in range(200, 209):
            k = torch.randn(rows, length, heads, width, device=shapes.device, dtype=dtype)
            mask = torch.ones(rows, 1, 1, length, dtype=torch.bool, device=shapes.device)
            synchronize()
            start = time.perf_counter()
            if excluded:
                with exclude_cudnn():
                    attention(k[:, :1], k, k, mask)
            else:
                attention(k[:, :1], k, k, mask)
            synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        report(cudnn="excluded" if excluded else "allowed", new_shape_ms=round(statistics.median(times[1:]), 2))


def attention(shapes: Shapes, report: Report) -> None:
    """Backends at training's shapes, S and L, with and without documents; forward and backward, against fp32."""
    import torch

    from lmchat.model.attention import BACKENDS, attend_masked, exclude_cudnn

    torch._dynamo.config.recompile_limit = 64  # one variant of FlexAttention per shape; 8 by default

    def gradients(attend: Any, inputs: list[Any], window: int, starts: Any) -> list[Any]:
        with exclude_cudnn():  # as in the model
            out = attend(*inputs, window, starts)
        return [out.detach(), *torch.autograd.grad(out.float().sum(), inputs)]

    for model, shape in shapes.attention.items():
        rows, length = shape[:2]
        four = torch.arange(4 * rows + 1, dtype=torch.int32, device=shapes.device) * (length // 4)
        for window, starts in itertools.product((length // 2, length), (None, four)):
            dtype = torch.float32 if shapes.toy else torch.bfloat16
            inputs = [torch.randn(shape, device=shapes.device, dtype=dtype, requires_grad=True) for _ in range(3)]
            exact = [x[:1].detach().float().requires_grad_() for x in inputs]
            expected = gradients(attend_masked, exact, window, None if starts is None else starts[:5])
            for name in shapes.backends:
                place = {"model": model, "window": "L" if window == length else "S", "backend": name}
                place["documents"] = 1 if starts is None else 4
                try:
                    step = functools.partial(gradients, BACKENDS[name], inputs, window, starts)
                    pairs = [(a[:1].float(), b) for a, b in zip(step(), expected, strict=True)]
                    off = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
                    ms = milliseconds(step, 5)
                    report(**place, ms=round(ms, 3), off=round(off, 4))
                except Exception as error:
                    report(**place, error=f"{type(error).__name__}: {error}"[:200])


def tests(shapes: Shapes, report: Report) -> None:
    """The GPU tests; skipped with ``--toy``."""
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-o", "addopts=--import-mode=importlib", "-m", "gpu"]
    done = subprocess.run([*command, "tests/test_gpu.py"], cwd=REPOSITORY, capture_output=True, text=True)
    print(done.stdout[-4000:], done.stderr[-2000:])
    lines = done.stdout.splitlines()
    report(
        result=lines[-1] if lines else done.stderr[-200:], failed=[line for line in lines if line.startswith("FAILED")]
    )


def _micro_batches(net: Any, rows: int, count: int) -> list[float]:
    """Milliseconds of each of ``count`` forward and backward passes."""
    import torch

    times = []
    for _ in range(count):
        ids = torch.randint(net.config.vocab_size, (rows, net.config.sequence_len), device=net.device)
        synchronize()
        start = time.perf_counter()
        net.loss(ids, ids).backward()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def d12(shapes: Shapes, report: Report) -> None:
    """Compilation, micro-batches, optimizer steps, slowest kernels; attention chosen by timing, and flash only."""
    import torch

    from lmchat.hardware import peak_flops, peak_memory_bytes
    from lmchat.model.attention_timing import choose_by_timing, use_backends
    from lmchat.model.compile import compile_blocks
    from lmchat.optim.muon_adamw import MuonAdamW
    from lmchat.optim.param_groups import build_param_groups
    from lmchat.precision import default_compute_dtype
    from lmchat.scaling import flops_per_token

    depth, length, rows = shapes.d12
    net, device = shapes.network(depth, length), torch.device(shapes.device)
    if not shapes.toy:
        use_backends(net, choose_by_timing(net, rows, False, Path(tempfile.mkdtemp()) / "choices.json"))
    report(attention=net.attention_backend)
    compile_blocks(net)
    (compiling,) = _micro_batches(net, rows, 1)
    report(first_micro_batch_s=round(compiling / 1e3, 1))
    ms = statistics.median(_micro_batches(net, rows, 6))
    rate, peak = 1e3 * rows * length / ms, peak_flops(device)
    report(micro_batch_ms=round(ms, 1), tokens_per_second=round(rate))
    if peak:
        report(mfu_without_optimizer=round(rate * flops_per_token(net.config) / peak, 3))
    groups = build_param_groups(net.named_parameters(), n_embd=net.config.n_embd)
    optimizer = MuonAdamW(groups, polar_dtype=default_compute_dtype(device), compile=not shapes.toy)
    report(optimizer_ms=round(milliseconds(optimizer.step, 2), 1))
    report(memory_gb=round(peak_memory_bytes(device) / 1e9, 2))
    kinds = [torch.profiler.ProfilerActivity.CPU if shapes.toy else torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        _micro_batches(net, rows, 1)
    key = "self_cpu_time_total" if shapes.toy else "self_device_time_total"
    for event in sorted(profile.key_averages(), key=lambda event: -getattr(event, key))[:12]:
        report(kernel=event.key[:80], calls=event.count, ms=round(getattr(event, key) / 1e3, 2))
    use_backends(net, dict.fromkeys(net.config.window_sizes, shapes.backends[0]))
    report(all_flash_ms=round(statistics.median(_micro_batches(net, rows, 4)), 1))


def free_memory() -> None:
    """Frees compiled networks, which contain reference cycles, and their memory; resets the peak."""
    import torch

    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(shapes: Shapes, report: Report) -> None:
    """Peak memory and time of micro-batches, without the optimizer, against the memory model."""
    import torch

    from lmchat.hardware import is_out_of_memory, peak_memory_bytes
    from lmchat.model.compile import compile_blocks
    from lmchat.training_memory import training_memory

    for depth, length, rows, recompute in shapes.memory:
        place = {"depth": depth, "rows": rows, "recompute": recompute}
        mode: Any = "recomputing" if recompute else "compiled"
        expected = training_memory(shapes.config(depth, length), rows, mode=mode)
        free_memory()
        try:
            net = shapes.network(depth, length)
            compile_blocks(net, recompute=recompute)
            ms = min(_micro_batches(net, rows, 3))
            gb = peak_memory_bytes(torch.device(shapes.device)) / 1e9
            weights = 8 * sum(weight.numel() for weight in net.parameters())  # and gradients
            model_gb = (weights + expected.activations + expected.workspace) / 1e9
            report(**place, micro_batch_ms=round(ms, 1), gb=round(gb, 2), model_gb=round(model_gb, 2))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            report(**place, error="out of memory", model_gb=round(expected.total / 1e9, 2))
        net = None


def fp8(shapes: Shapes, report: Report) -> None:
    """Micro-batches of d26 in bf16, with the compiled blocks of the previous part, and with FP8 products."""
    from lmchat.model.compile import compile_blocks
    from lmchat.model.fp8 import convert_linears

    depth, length, rows = shapes.fp8
    for recipe in (None, "tensorwise", "rowwise"):
        net = None
        free_memory()
        net = shapes.network(depth, length)
        if recipe is not None:
            report(layers=convert_linears(net, recipe, emulate=shapes.toy).describe())
        compile_blocks(net)
        report(products=recipe or "bf16", micro_batch_ms=round(min(_micro_batches(net, rows, 4)), 1))


def decode(shapes: Shapes, report: Report) -> None:
    """Tokens per second of the engine, short prompts, all rows to the same length."""
    from lmchat.generation.engine import Engine
    from lmchat.generation.sampling import SamplingParams
    from lmchat.tokenizer.bpe import Tokenizer

    depth, length, rows, new = shapes.decode
    tokenizer = Tokenizer.train([" ".join(random_words())], shapes.vocab_size)
    engine = Engine(shapes.network(depth, length).eval(), tokenizer, max_rows=rows)
    for run in ("first", "second"):
        synchronize()
        start = time.perf_counter()
        params = SamplingParams(num_samples=rows, max_new_tokens=new, temperature=1.0, stop_tokens=())
        (completions,) = engine.generate([list(range(1, 17))], params)
        tokens = sum(len(completion.ids) for completion in completions)
        report(run=run, rows=rows, tokens_per_second=round(tokens / (time.perf_counter() - start)))


def random_words() -> list[str]:
    """20,000 words of 2 to 8 letters."""
    letters = random.Random(0)
    return ["".join(letters.choices(string.ascii_lowercase, k=letters.randint(2, 8))) for _ in range(20_000)]


def write_random_text(folder: Path, shards: int, documents: int) -> None:
    """Words drawn at random, in documents of web-like lengths."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    generator, words = np.random.default_rng(0), np.array(random_words())
    for shard in range(shards):
        lengths = generator.lognormal(6, 1, documents).astype(int) + 10
        texts = [" ".join(generator.choice(words, length)) for length in lengths]
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{shard:05d}.parquet")


def fit(shapes: Shapes, report: Report) -> None:
    """Twenty steps of d12 with ``lmchat fit``: tokens/s, MFU, memory, losses."""
    steps = "4" if shapes.toy else "20"
    small = "--model.depth 2 --model.sequence_len 64 --model.head_dim 32 --model.global_batch_tokens 512 "
    small += "--data.micro_batch_size 2 --data.eval_tokens 512 --model.compile false --trainer.accelerator cpu "
    options = f"fit --config {REPOSITORY}/configs/d12_pretrain.yaml --trainer.max_steps {steps} --trainer.devices 1 "
    options += "--monitor.every_n_steps 1 --samples.max_new_tokens 0 --eval.every_n_steps 0 "
    options += small if shapes.toy else "--data.eval_tokens 524288"
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        write_random_text(base / "base_data", 3, 100 if shapes.toy else 1500)
        variables = {**os.environ, "LMCHAT_BASE_DIR": str(base), "HF_HUB_OFFLINE": "1"}
        for command in (f"tokenizer train --vocab_size {512 if shapes.toy else 32768}", options):
            run = [sys.executable, "-m", "lmchat", *command.split()]
            subprocess.run(run, env=variables, check=True)
        (metrics,) = base.rglob("metrics.csv")
        with metrics.open() as file:
            rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    steady = rows[len(rows) // 2 :]
    for name in ("tokens_per_second", "mfu"):
        values = [float(row[f"train/{name}"]) for row in steady if row.get(f"train/{name}")]
        if values:
            report(**{name: round(statistics.median(values), 4)})
    report(memory_gb=max(float(row["train/memory_gb"]) for row in rows))
    report(losses=[round(float(row["train/loss"]), 4) for row in rows])


PARTS: dict[str, Callable[[Shapes, Report], None]] = {
    each.__name__: each for each in (environment, cudnn, attention, tests, d12, memory, fp8, decode, fit)
}


def run_part(name: str, output: Path, toy: bool) -> None:
    """Runs one part in this process; appends and flushes each result."""

    def report(**values: Any) -> None:
        with (output / "results.jsonl").open("a") as file:
            file.write(json.dumps({"part": name, **values}) + "\n")
        print(name, values, flush=True)

    PARTS[name](Shapes(toy), report)


def start_part(name: str, output: Path, toy: bool) -> dict[str, Any]:
    """Runs one part in a subprocess with its time limit; returns how it ended."""
    variables = dict(os.environ)
    variables.setdefault("TORCHINDUCTOR_CACHE_DIR", str(output / "kernels"))
    command = [sys.executable, __file__, "--part", name, "--output", str(output), *(["--toy"] if toy else [])]
    start, log = time.monotonic(), output / f"{name}.log"
    limit = LIMITS[name] * (SLOWER_CPU if toy else 1)
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = f"exit status {code}" if (code := process.wait(limit)) else "ok"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            status = f"stopped after {limit} s"
    ended = {"part": name, "status": status, "seconds": round(time.monotonic() - start, 1)}
    if status != "ok":
        ended["end_of_log"] = re.sub(r"\s+", " ", log.read_text(errors="replace")[-300:])
    return ended


def table(results: Path) -> Iterator[str]:
    """The results as a table in Markdown."""
    yield "| part | results |\n|---|---|"
    for line in results.read_text().splitlines():
        values = json.loads(line)
        results = ", ".join(f"{name} {value}" for name, value in values.items() if name != "part")
        yield f"| {values['part']} | {results.replace('|', '/')} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a rehearsal on the CPU")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "gpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        run_part(args.part, args.output, args.toy)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    results = args.output / "results.jsonl"
    results.write_text("")
    for name in args.parts:
        ended = start_part(name, args.output.resolve(), args.toy)
        with results.open("a") as file:
            file.write(json.dumps(ended) + "\n")
        (args.output / "results.md").write_text("\n".join(table(results)) + "\n")
        print(ended, flush=True)
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
