r"""Learning rates as a function of the step alone, so that a checkpoint has none to keep.

With :math:`e` the epochs done so far, fractions of an epoch included, :math:`w` those of warm-up
and :math:`E` all of them, the learning rate is multiplied by

.. math::
    \min\left(1, \frac{e + 1/n}{w}\right) \cdot \begin{cases}
        1 & \text{constant} \\
        \frac{1}{2} \left(1 + \cos \pi \frac{e - w}{E - w}\right)
            & \text{cosine, from } w \text{ on} \\
        f^{\lfloor e / s \rfloor} & \text{step, by } f \text{ every } s \text{ epochs}
    \end{cases}

where :math:`n` is the number of steps in an epoch.
"""

from __future__ import annotations

import math

from convnn_geo.train.config import Config


def learning_rate(config: Config, step: int, steps: int) -> float:
    """The learning rate of an optimizer step.

    Args:
        config: has the schedule, its warm-up and the highest rate.
        step: from 0 on, over all epochs.
        steps: in an epoch.

    Example:
        >>> config = Config(epochs=4, warmup_epochs=1, learning_rate=0.1)
        >>> [learning_rate(config, step, steps=2) for step in range(8)]
        [0.05, 0.1, 0.1, 0.093..., 0.075..., 0.05, 0.025, 0.0067]
    """
    epoch = step / steps
    rate = config.learning_rate
    if config.warmup_epochs > 0:
        rate *= min(1.0, (epoch + 1 / steps) / config.warmup_epochs)
    if config.schedule == "step":
        between = config.epochs / 3 if config.step_epochs is None else config.step_epochs
        drops = math.floor(epoch / between + 1e-9)  # a quotient may fall just short of a whole
        return rate * config.step_factor**drops
    if config.schedule == "cosine" and epoch > config.warmup_epochs:
        done = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
        return rate * 0.5 * (1 + math.cos(math.pi * done))
    return rate
