"""The short help of ``lmchat fit`` and ``lmchat validate``, without building their parser, which takes 3 seconds.

``--help_all`` prints all options from the parser. A test compares the names here with the parser.
"""

import textwrap

FULL_HELP = "--help_all"

EXAMPLES = {
    "fit": """
Train a stage: pretraining, supervised fine-tuning or reinforcement learning.

  lmchat fit --config configs/d12_pretrain.yaml
  lmchat fit --config configs/d12_pretrain.yaml --model.depth 8 --model.tag small
  lmchat fit --config configs/d12_pretrain.yaml --ckpt_path last              resume the run's newest checkpoint
  lmchat fit --config configs/sft.yaml --ckpt_path ~/.cache/lmchat/base_checkpoints/d12    fine-tune that model
""",
    "validate": """
Evaluate a checkpoint of a stage on the validation data of its config.

  lmchat validate --config configs/d12_pretrain.yaml --ckpt_path last
""",
}

OPTIONS = {
    "--config FILE": "YAML with options; may be given several times, later files override earlier ones.",
    "--ckpt_path WHERE": "checkpoint to start from: last (the run's newest), auto (last, else the newest of the "
    "previous stage, else none), a folder or a file.",
    "--seed_everything N": "seed of all random numbers.",
    "--weights_only true": "not needed: lmchat never unpickles arbitrary objects.",
    "--print_config": "print the options in effect and exit.",
}
"""Options outside of groups, with a placeholder for their value."""

GROUPS = {
    "model": "the stage and its model, e.g. --model.depth 12, --model.tag NAME.",
    "data": "text or conversations, e.g. --data.data_dir FOLDER, --data.micro_batch_size 8.",
    "trainer": "Lightning's Trainer, e.g. --trainer.max_steps 1000, --trainer.devices 8.",
    "scaling_laws": "length of the run and scaling of the learning rates, e.g. --scaling_laws.tokens_per_parameter 10.",
    "eval": "when to evaluate, e.g. --eval.every_n_steps 250.",
    "core": "CORE during training, e.g. --core.bundle eval_bundle.zip --core.every_n_steps 2000.",
    "chat_core": "chat benchmarks during training, e.g. --chat_core.every_n_steps 200 --chat_core.max_per_task 64.",
    "checkpoint": "when to save checkpoints and how many to keep, e.g. --checkpoint.every_n_steps 500.",
    "monitor": "loss, speed and memory during training, e.g. --monitor.every_n_steps 10.",
    "samples": "texts that the model completes after each evaluation, e.g. --samples.max_new_tokens 32.",
    "fp8": "FP8 matrix products on GPUs, e.g. --fp8.enabled false.",
    "non_finite_guard": "what to do when the loss is NaN or infinite, e.g. --non_finite_guard.action skip.",
    "gc_freeze": "Python's garbage collection, e.g. --gc_freeze.every_n_steps 5000.",
}
"""Option groups, with an example of their options."""

CLASSES = {
    "model": ("PretrainModule", "SFTModule", "GRPOModule"),
    "data": ("FineWebDataModule", "SFTDataModule", "OwnConversationsDataModule", "RolloutDataModule"),
}
"""Classes that the options of a group depend on."""

_WIDTH = 118
_INDENT = 32


def listing(command: str) -> str:
    """The command that lists all options of ``command``, as in ``lmchat fit --help_all``."""
    return f"lmchat {command} {FULL_HELP if command in EXAMPLES else '--help'}"


def overview(command: str) -> str:
    """The short help of ``lmchat fit`` or ``lmchat validate``."""
    lines = [f"usage: lmchat {command} --config FILE [--OPTION VALUE ...]", EXAMPLES[command], "options:"]
    lines += [_row(option, text) for option, text in OPTIONS.items()]
    lines += ["", "option groups (in a config: a mapping, as in trainer: {max_steps: 100}):"]
    lines += [_row(f"--{group}.OPTION", text) for group, text in GROUPS.items()]
    lines += ["", "all options of a group that depends on a class:"]
    lines += [f"  lmchat {command} --{group}.help {name}" for group, names in CLASSES.items() for name in names]
    lines += [
        "",
        f"`{listing(command)}` lists every option with its default. Options may also be set by environment",
        f"variables, for example LMCHAT_{command.upper()}__TRAINER__MAX_STEPS.",
        "The folder configs is in lmchat's repository; pip does not install it.",
    ]
    return "\n".join(lines)


def _row(option: str, text: str) -> str:
    first, *rest = textwrap.wrap(text, _WIDTH - _INDENT)
    return "\n".join([f"  {option:<{_INDENT - 2}}{first}", *(" " * _INDENT + line for line in rest)])
