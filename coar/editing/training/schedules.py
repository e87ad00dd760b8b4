"""How a learning rate changes during training."""

from __future__ import annotations

import math


def warm_up_cosine(step: int, warm_up: int, steps: int) -> float:
    """Returns the factor of the learning rate at a step, counted from 0: it rises in a line, then falls as a cosine.

    `(step + 1) / warm_up` while step < warm_up, then `(1 + cos(pi (step - warm_up) / (steps - warm_up))) / 2`.

    Source: mlfoundations/patching, src/models/utils.py, `cosine_lr`.
    """
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))
