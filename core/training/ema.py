"""Which average of the weights does a run keep?

Power-function averages after "Analyzing and Improving the Training Dynamics of Diffusion Models"
(https://arxiv.org/abs/2312.02696): the averaged span grows with the run, so that no half-life has to be guessed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


def power_exponent(relative_std: float) -> float:
    """Exponent gamma of the power-function EMA whose profile has this standard deviation relative to its length.

    The positive root of sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1, a cubic in gamma
    (https://arxiv.org/abs/2312.02696). ``relative_std`` must lie in (0, 0.28]; raises ValueError otherwise.
    """
    if not 0.0 < relative_std <= 0.28:
        raise ValueError(f"relative_std must be in (0, 0.28], got {relative_std}")
    inverse = relative_std**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


class PowerEMA:
    """Exponential moving average of every parameter and buffer with a decay that follows the run's own length.

    beta_t = (1 - 1/t)^(gamma + 1): the average always covers the same *share* of the run, so one setting serves a
    ten-minute run and a week. Floating-point buffers are averaged too; integer buffers are copied.
    """

    def __init__(self, model: nn.Module, relative_std: float) -> None:
        self.relative_std = relative_std
        self.gamma = power_exponent(relative_std)
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._source: tuple[nn.Module, dict[str, Tensor]] | None = None

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Fold in the weights after optimiser step number ``step`` (first step = 1)."""
        beta = (1.0 - 1.0 / step) ** (self.gamma + 1.0)
        if self._source is None or self._source[0] is not model:  # to list what a model has takes longer than to add it
            self._source = model, model.state_dict(keep_vars=True)
        floats, sources = [], []
        for name, value in self._source[1].items():
            if value.is_floating_point():
                floats.append(self.state[name])
                sources.append(value)
            else:
                self.state[name].copy_(value)
        torch._foreach_lerp_(floats, sources, 1.0 - beta)
