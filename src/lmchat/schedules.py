"""Learning rate, momentum and weight decay as pure functions of the step (counted from 0) or of progress (0 to 1).

Multipliers apply to the initial value of a parameter group.
"""


def linear_warmdown(
    step: int,
    steps: int,
    warmup_ratio: float = 0.0,
    warmdown_ratio: float = 0.5,
    final_lr_fraction: float = 0.0,
) -> float:
    """Pretraining learning rate: linear warmup, constant, then linear to `final_lr_fraction`.

    `final_lr_fraction` is reached at step `steps`, one after the last update.
    """
    warmup_steps = round(warmup_ratio * steps)
    warmdown_steps = round(warmdown_ratio * steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step <= steps - warmdown_steps:
        return 1.0
    remaining = (steps - step) / warmdown_steps
    return final_lr_fraction + remaining * (1 - final_lr_fraction)


def muon_momentum(step: int, *, start: float = 0.85, end: float = 0.95, ramp_steps: int = 300) -> float:
    """Momentum of Muon, which rises linearly over the first `ramp_steps` steps."""
    done = min(step / ramp_steps, 1.0)
    return (1 - done) * start + done * end


def linear_decay(step: int, steps: int) -> float:
    """Weight decay of pretraining and learning rate of reinforcement learning: linear to 0 at step `steps`."""
    return 1 - step / steps


def sft_lr_multiplier(progress: float, constant_until: float = 0.8) -> float:
    """Fine-tuning learning rate, by progress through the epoch: constant, then linear to 0."""
    return 1.0 if progress < constant_until else 1 - (progress - constant_until) / (1 - constant_until)
