"""``--data.mask_documents`` through the real command: trained and evaluated with it, resumed exactly, recorded."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmchat.__main__ import main
from lmchat.checkpoint.load import find_checkpoint, load_model_state
from tiny_fit import config_options, same

RUN = """
trainer: {max_steps: 4}
model: {init_args: {window_pattern: L, sequence_len: 64, compile: false}}
checkpoint: {every_n_steps: 2}
"""


@pytest.fixture
def short_documents(base: Path) -> Path:
    """Replaces the text, whose documents fill whole rows, by short documents."""
    texts = base / "base_data"
    shards = sorted(texts.glob("*.parquet"))
    documents = [[text[:60] for text in pq.read_table(path)["text"].to_pylist()] * 8 for path in shards]
    texts.unlink()  # a link to a folder of other tests
    texts.mkdir()
    for path, shard in zip(shards, documents, strict=True):
        pq.write_table(pa.table({"text": shard}), path)
    return base


def fit(base: Path, tag: str, *options: str) -> dict[str, object]:
    assert main(["fit", *config_options(base, RUN), "--model.tag", tag, *options]) == 0
    checkpoint = find_checkpoint(base / "base_checkpoints" / tag)
    return {**load_model_state(checkpoint), "mask_documents": checkpoint.meta["mask_documents"]}


def test_a_run_masks_documents(
    short_documents: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    base, on = short_documents, ["--data.mask_documents", "true"]
    masked = fit(base, "masked", *on)
    assert masked["mask_documents"] is True
    start = ["--ckpt_path", str(base / "base_checkpoints" / "masked" / "meta_000002.json")]
    assert same(fit(base, "resumed", *on, *start), masked)
    changed = fit(base, "changed", *start)
    assert changed["mask_documents"] is False
    assert not same({**changed, "mask_documents": True}, masked)
    options = ["--model.checkpoint_blocks", "true", "--trainer.strategy", "zero2_muon"]
    assert same(fit(base, "options", *on, *options), masked)
    assert not any("sync_dist" in str(warning.message) for warning in recwarn), "a distributed run logs reduced metrics"
    capsys.readouterr()
    validated = []
    for option in ("false", "true"):
        run = ["--ckpt_path", str(base / "base_checkpoints" / "masked"), "--data.mask_documents", option]
        assert main(["validate", *config_options(base, RUN), *run]) == 0
        validated.append(next(line for line in capsys.readouterr().out.splitlines() if "bpb" in line))
    assert validated[0] != validated[1]
