"""Impossible sizes are refused within a second, before torch is imported."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmchat.cli.early_checks import check_config_files, check_sizes, read_options
from lmchat.model.config import GPTConfig
from lmchat.scaling import config_for_depth
from lmchat.types import UserError

TINY = """
trainer: {accelerator: cpu}
model: {class_path: PretrainModule, init_args: {depth: 2, sequence_len: 32, head_dim: 32}}
data: {class_path: FineWebDataModule}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    return ["--config", "tiny.yaml"]


TOO_LARGE = {
    "--model.depth 1000000000": "depth 1000000000 for 32 tokens has about 4.9e+22 billion parameters",
    "--model.depth=5000": "does not fit on cpu (2.5e+07 GB of weights",
    "--model.init_args.depth 100000": "choose a smaller --model.depth",
    "--model.aspect_ratio 100000000": "choose a smaller --model.depth",
    "--model.sequence_len 1000000000": "--model.sequence_len is 1000000000; it must be at most 131072",
    "--model.sequence_len 131072 --model.depth 40": "training needs about",
    "--trainer.accelerator gpu --model.depth 100000": "does not fit on any device",
    "--trainer.max_steps 1180591620717411303424": "--trainer.max_steps is 1180591620717411303424; it must be at most",
    "--model.global_batch_tokens 99999999999999": "--model.global_batch_tokens is 99999999999999; it must be at most",
    "--data.micro_batch_size 100000000": "--data.micro_batch_size is 100000000; training with micro-batches of",
}


@pytest.mark.parametrize("options", TOO_LARGE)
def test_sizes_that_no_machine_has_are_refused(options: str, config: list[str]) -> None:
    with pytest.raises(UserError) as error:
        check_sizes(["fit", *config, *options.split()])
    assert TOO_LARGE[options] in str(error.value)


def test_config_files_are_checked_without_torch(config: list[str]) -> None:
    Path("large.yaml").write_text("model: {init_args: {depth: 100000}}\ntrainer: {max_steps: 1}")
    code = (
        "import sys; from lmchat.__main__ import main; status = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "fit", *config, "--config", "large.yaml"], capture_output=True, text=True
    )
    assert run.returncode == 2 and "a model of depth 100000 for 32 tokens has about" in run.stderr


LEFT_TO_THE_PARSER = [
    "--model.depth 12",
    "--model.depth 1000000 --model.depth 2",
    "--model.depth 1000000 --config tiny.yaml",
    "--model.depth 1000000 --model SFTModule",
    "--model.depth 1000000 --model SFTModule --model PretrainModule",
    "--model.depth 1000000 --model my.PretrainModule",
    "--model.depth 1000000 --print_config",
    "--model.depth 1000000 --model.sequence_len many",
    "--model.depth 1000000 --model.sequence_len null",
    "--model.depth 1000000 --model.n_kv_head 3",
    "--model.depth 1000000 --config nowhere.yaml",
    "--model.depth 1000000 --config broken.yaml",
    "--model.depth many",
    "--trainer.max_steps 1e400",
    "--trainer.max_steps",
    "--model",
    "--model [1]",
    "-1",
]


@pytest.mark.parametrize("options", LEFT_TO_THE_PARSER)
def test_uncertain_values_are_left_to_the_parser(options: str, config: list[str]) -> None:
    Path("broken.yaml").write_text("model: [")
    check_sizes(["fit", *config, *options.split()])


def test_options_by_environment_are_left_to_the_parser(config: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCHAT_FIT__MODEL__DEPTH", "2")
    check_sizes(["fit", *config, "--model.depth", "1000000"])


# Compared with `lmchat fit --print_config`, for different forms of "depth: 3" that override `TINY`.
FORMS = [
    "model: {init_args: {depth: 3}}",
    "model: {depth: 3}",
    "model.depth: 3",
    "model.init_args.depth: 3",
    "model: {class_path: PretrainModule, init_args: {depth: 3}}",
    "base: &base {depth: 3}\nmodel: {init_args: *base}",
]


@pytest.mark.parametrize("text", FORMS)
def test_forms_of_an_option_in_a_config(text: str, config: list[str]) -> None:
    Path("own.yaml").write_text(text)
    model = read_options(["fit", *config, "--config=own.yaml"])["model"]
    assert (model["depth"], model["sequence_len"]) == (3, 32)


def test_a_config_that_cannot_be_read_again_or_is_endless_is_refused(config: list[str]) -> None:
    os.mkfifo("pipe.yaml")
    with Path("sparse.yaml").open("wb") as file:
        file.truncate(10 * 2**30)
    refused = {
        "pipe.yaml": "is a pipe or a device",
        "/dev/zero": "is a pipe or a device",
        "sparse.yaml": "is a file of 10,737,418,240 bytes",
    }
    for path, message in refused.items():
        for check in (check_sizes, check_config_files):
            with pytest.raises(UserError, match=f"^--config {path} {message}.*give the path of a YAML file"):
                check(["fit", *config, f"--config={path}"])
    inline = "--config={trainer: {max_steps: 3}, optimizer: " + "x" * 300 + "}"
    for check in (check_sizes, check_config_files):
        check(["fit", *config, inline])


def test_defaults_are_those_of_the_model() -> None:
    from lmchat.stages.pretrain import PretrainModule

    module, options, fields = (
        inspect.signature(each).parameters for each in (PretrainModule, config_for_depth, GPTConfig)
    )
    shape = {**fields, **options}
    shared = shape.keys() & module.keys() - {"depth", "sequence_len"}
    assert len(shared) == 6 and all(shape[name].default == module[name].default for name in shared)
