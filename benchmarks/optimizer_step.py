"""One optimizer step of MuonAdamW compared with a plain implementation that updates one parameter at a time.

    python benchmarks/optimizer_step.py [--depth 4] [--vocab-size 8192] [--threads 1] [--rounds 7] [--compile]

The plain implementation follows the papers' formulas, with a temporary for every operation. Both use the same dtypes
and run in turn, so that other load affects them equally; the minimum CPU time of each is reported (on a GPU, elapsed
time). The lower bound is the time of Polar Express's matrix products.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lmchat.model.gpt import GPT
from lmchat.optim.muon_adamw import POLAR_EXPRESS_COEFFICIENTS, MuonAdamW, second_moment_shape
from lmchat.optim.param_groups import build_param_groups
from lmchat.precision import default_compute_dtype
from lmchat.scaling import config_for_depth


class Plain:
    """The same update rules without stacking, fusing or compiling."""

    def __init__(self, groups: list[dict[str, Any]], polar_dtype: torch.dtype) -> None:
        self.groups, self.polar_dtype = groups, polar_dtype
        self.state: dict[Tensor, dict[str, Any]] = {}

    @torch.no_grad()
    def step(self, kind: str) -> None:
        for group in self.groups:
            for param in group["params"] if group["kind"] == kind else ():
                (self._muon if kind == "muon" else self._adamw)(param, group)

    def _adamw(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state.setdefault(p, {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "t": 0})
        (beta1, beta2), lr, g = group["betas"], group["lr"], p.grad
        assert g is not None
        state["t"] += 1
        state["m"] = beta1 * state["m"] + (1 - beta1) * g
        state["v"] = beta2 * state["v"] + (1 - beta2) * g * g
        denominator = (state["v"] / (1 - beta2 ** state["t"])).sqrt() + group["eps"]
        p.copy_(p * (1 - lr * group["weight_decay"]) - lr / (1 - beta1 ** state["t"]) * state["m"] / denominator)

    def _muon(self, p: Tensor, group: dict[str, Any]) -> None:
        rows, cols = p.shape
        v = torch.zeros(second_moment_shape(rows, cols), device=p.device)
        state = self.state.setdefault(p, {"buffer": torch.zeros_like(p), "v": v})
        assert p.grad is not None
        state["buffer"] = group["momentum"] * state["buffer"] + (1 - group["momentum"]) * p.grad
        x = (1 - group["momentum"]) * p.grad + group["momentum"] * state["buffer"]
        x = (x / (1.02 * x.norm() + 1e-6)).to(self.polar_dtype)
        for a, b, c in POLAR_EXPRESS_COEFFICIENTS:
            gram = x.T @ x if rows > cols else x @ x.T
            polynomial = b * gram + c * (gram @ gram)
            x = a * x + (x @ polynomial if rows > cols else polynomial @ x)
        update = x.float()
        mean_square = update.square().mean(-1 if rows >= cols else -2, keepdim=True)
        state["v"] = group["beta2"] * state["v"] + (1 - group["beta2"]) * mean_square
        scaled = update / state["v"].clamp_min(1e-10).sqrt()
        update = scaled * update.norm() / scaled.norm()
        decay = group["weight_decay"] * p * (update * p >= 0)
        p.copy_(p - group["lr"] * max(1, rows / cols) ** 0.5 * (update + decay))


def products_only(groups: list[dict[str, Any]], dtype: torch.dtype) -> Callable[[], None]:
    """The matrix products of one step only, stacked, into preallocated memory."""
    stacks = []
    for group in groups:
        if group["kind"] == "muon":
            short, long = sorted(group["params"][0].shape)
            x = torch.randn(len(group["params"]), short, long).to(group["params"][0].device, dtype)
            stacks.append((x, x.new_empty(len(x), short, short), torch.empty_like(x)))

    def run() -> None:
        for x, gram, out in stacks:
            for _ in POLAR_EXPRESS_COEFFICIENTS:
                torch.bmm(x, x.mT, out=gram)
                torch.bmm(gram, gram)
                torch.bmm(gram, x, out=out)

    return run


def min_seconds(runs: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, float]:
    """Minimum time of each function, called in turn after a warmup round."""
    fastest = dict.fromkeys(runs, float("inf"))
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            clock = time.perf_counter if device.type == "cuda" else time.process_time
            start = clock()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_number:
                fastest[name] = min(fastest[name], clock() - start)
    return fastest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="compile Muon's update on a CPU too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = GPT(config_for_depth(args.depth, vocab_size=args.vocab_size, sequence_len=512)).to(device)
    net.init_weights()
    for param in net.parameters():
        param.grad = torch.randn_like(param)
    groups = build_param_groups(net.named_parameters(), n_embd=net.config.n_embd)
    polar_dtype, compiling = default_compute_dtype(device), args.compile or device.type == "cuda"
    plain = Plain(groups, polar_dtype)
    kinds = {"muon": "Muon, matrices", "adamw": "AdamW, tables"}

    def step_of(kind: str) -> Callable[[], None]:
        own = [group for group in groups if group["kind"] == kind]
        part = MuonAdamW(own, polar_dtype=polar_dtype, compile=compiling)
        return lambda: part.step()

    runs: dict[str, Callable[[], None]] = {"floor": products_only(groups, polar_dtype)}
    for kind in kinds:
        runs[f"ours {kind}"] = step_of(kind)
        runs[f"plain {kind}"] = lambda kind=kind: plain.step(kind)
    seconds = min_seconds(runs, args.rounds, device)

    table = Table(title=f"optimizer step, depth {args.depth}, {device.type}, {args.threads} thread(s), {polar_dtype}")
    for column in ("part", "parameters", "ours ms", "plain ms", "plain / ours"):
        table.add_column(column, justify="left" if column == "part" else "right")
    totals = [0.0, 0.0]
    for kind, title in kinds.items():
        count = sum(param.numel() for group in groups if group["kind"] == kind for param in group["params"])
        pair = seconds[f"ours {kind}"], seconds[f"plain {kind}"]
        totals = [total + value for total, value in zip(totals, pair, strict=True)]
        table.add_row(title, f"{count:,}", *(f"{1e3 * x:.1f}" for x in pair), f"{pair[1] / pair[0]:.2f}")
    table.add_row("all", "", *(f"{1e3 * x:.1f}" for x in totals), f"{totals[1] / totals[0]:.2f}")
    Console().print(table)
    print(f"matrix products of Polar Express alone: {1e3 * seconds['floor']:.1f} ms")


if __name__ == "__main__":
    main()
