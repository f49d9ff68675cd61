"""Learning rate as a function of the step."""

from __future__ import annotations

import math

from slotmamba.config.schema import OptimConfig


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step ``step``, counted from 0, in a run of ``total_steps`` steps.

    Step ``s < warmup`` has ``lr * (s + 1) / warmup``; step ``warmup`` has the peak ``lr``, and so has the first step of
    a run without warm-up. From there the rate falls to ``lr * min_lr_ratio``, which the last step, ``total_steps - 1``,
    has exactly and every later step keeps; only a warm-up that fills the whole run ends at the peak. ``cosine`` falls
    as half a period of a cosine (Loshchilov and Hutter, 2017, without restarts), ``linear`` in a straight line, ``wsd``
    (warm-up, stable, decay; Hu et al., 2024) stays at the peak and falls linearly over the last ``decay`` share of the
    run, or less where the warm-up reaches into it.
    """
    assert step >= 0 and 0 <= optim.warmup <= total_steps, (step, optim.warmup, total_steps)
    peak = optim.lr
    end = peak * optim.min_lr_ratio
    last = total_steps - 1
    if step < optim.warmup:
        return peak * (step + 1) / optim.warmup
    # Step 0 before the last step: a run of one step would otherwise train at the end rate, which may be 0.
    if step == 0:
        return peak
    if step >= last:
        return end
    start = max(optim.warmup, (1 - optim.decay) * last) if optim.schedule == "wsd" else optim.warmup
    if step <= start:
        return peak
    fraction = (step - start) / (last - start)
    if optim.schedule == "cosine":
        fraction = (1 - math.cos(math.pi * fraction)) / 2
    return peak + (end - peak) * fraction
