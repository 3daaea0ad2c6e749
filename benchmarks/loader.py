"""Speed of the data path on one core: packing on lengths, and the whole loader from token files to tensors.

    python benchmarks/loader.py [--documents 60000] [--batches 300] [--spread 1.0]

The plain loader has token lists in memory and searches its whole buffer. Both are checked to yield the same rows, and
run in turn, so that other load affects them equally. CPU time of this process is measured. Documents have lognormal
lengths with a mean of 1,000 tokens and the given spread.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lmchat.data.packed_batches import PackedBatches
from lmchat.data.packing import BestFitPacker
from lmchat.data.token_shards import TokenShards
from lmchat.data.tokenize import prepare_token_shards

SEQUENCE_LEN, ROWS, BUFFER, REFILL = 2048, 32, 1000, 128
MEAN_TOKENS = 1000


class ByteTokenizer:
    """A tokenizer whose ids are bytes."""

    fingerprint, vocab_size, bos_id = "bytes", 257, 256

    def encode_to_numpy(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)


def web_like_lengths(documents: int, spread: float) -> np.ndarray:
    """Document lengths in tokens, including BOS."""
    lengths = np.random.default_rng(0).lognormal(np.log(MEAN_TOKENS) - spread**2 / 2, spread, documents)
    return np.maximum(2, lengths.astype(np.int64))


def write_corpus(folder: Path, lengths: np.ndarray) -> list[list[int]]:
    """Writes two shards with documents of these lengths; returns the token lists of the training shard."""
    letters = np.random.default_rng(1).integers(97, 123, lengths.max(), dtype=np.uint8).tobytes().decode()
    texts = [letters[: length - 1] for length in lengths]
    pq.write_table(pa.table({"text": texts}), folder / "shard_00000.parquet")
    pq.write_table(pa.table({"text": texts[:1]}), folder / "shard_00001.parquet")
    return [[ByteTokenizer.bos_id, *text.encode()] for text in texts]


def plain_batches(documents: list[list[int]]) -> Iterator[torch.Tensor]:
    """Plain best-fit packing of token lists into rows of SEQUENCE_LEN + 1 tokens."""
    stream = itertools.cycle(documents)
    buffer: list[list[int]] = []
    while True:
        rows: list[list[int]] = []
        while len(rows) < ROWS:
            row: list[int] = []
            while (room := SEQUENCE_LEN + 1 - len(row)) > 0:
                while len(buffer) < BUFFER:
                    buffer += itertools.islice(stream, REFILL)
                best, best_length = -1, 0
                for i, document in enumerate(buffer):
                    if best_length < len(document) <= room:
                        best, best_length = i, len(document)
                if best < 0:
                    best = min(range(len(buffer)), key=lambda i: len(buffer[i]))
                row += buffer.pop(best)[:room]
            rows.append(row)
        yield torch.tensor(rows)


def cpu_seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def measure(documents: int, batches: int, spread: float) -> None:
    torch.set_num_threads(1)
    lengths = web_like_lengths(documents, spread)
    with tempfile.TemporaryDirectory() as name:
        token_lists = write_corpus(Path(name), lengths)
        prepare_token_shards(Path(name), ByteTokenizer())
        train, _ = TokenShards.open_split(Path(name), ByteTokenizer())
        packer = BestFitPacker(lengths, row_tokens=SEQUENCE_LEN + 1, buffer_size=BUFFER, refill=REFILL)
        ours = iter(PackedBatches(train, sequence_len=SEQUENCE_LEN, micro_batch_size=ROWS, buffer_size=BUFFER))
        plain = plain_batches(token_lists)

        for _ in range(3):
            batch, rows = next(ours), next(plain)
            assert torch.equal(batch["inputs"], rows[:, :-1])
            assert torch.equal(batch["targets"], rows[:, 1:])

        rounds, seconds = 10, {"packer": 0.0, "loader": 0.0, "plain loader": 0.0}
        take = batches // rounds
        for _ in range(rounds):
            seconds["packer"] += cpu_seconds(lambda: list(itertools.islice(packer, take * ROWS)))
            seconds["loader"] += cpu_seconds(lambda: [None for _ in itertools.islice(ours, take)])
            seconds["plain loader"] += cpu_seconds(lambda: [None for _ in itertools.islice(plain, take)])

    tokens = take * rounds * ROWS * SEQUENCE_LEN
    print(f"{documents:,} documents, {lengths.mean():.0f} tokens on average, B {ROWS}, T {SEQUENCE_LEN}")
    for part, value in seconds.items():
        ratio = seconds["plain loader"] / value
        print(f"{part:>12}: {tokens / value / 1e6:7.1f} M tokens/s of CPU time, {ratio:6.1f} x the plain loader")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=60_000)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--spread", type=float, default=1.0, help="standard deviation of the logarithm of the length")
    measure(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
