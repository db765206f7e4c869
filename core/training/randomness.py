"""Which random numbers does step `n` of a run use, whatever happened before it?

Generators from (seed, step, purpose), and an endless order of samples that any step can be asked for. No state is kept,
so that a resumed run draws what the unbroken run would have drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.command import SettingError

MASK_63 = (1 << 63) - 1


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several integers (SplitMix64 finaliser over each part in turn)."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & ((1 << 64) - 1))) * 0xBF58476D1CE4E5B9 & ((1 << 64) - 1)
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & ((1 << 64) - 1)
        state ^= state >> 31
    return state & MASK_63


def step_generator(seed: int, step: int, stream: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one training step; the same (seed, step, stream) always gives the same numbers."""
    return torch.Generator(device=device).manual_seed(mix_seed(seed, step, stream))


class EpochSampler:
    """Indices of the images of each step: every epoch is one seeded permutation, and nothing else is remembered.

    ``batch(step)`` is a pure function of (seed, step), so a resumed run sees what an undisturbed one would have seen.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        if count < 1:
            raise SettingError("the selection of training images is empty; check the prepared store and the px filter")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._order = torch.randperm(self.count, generator=step_generator(self.seed, epoch, stream=7))
            self._epoch = epoch
        return self._order

    def batch(self, step: int) -> Tensor:
        """Positions [batch_size] in [0, count) for this step, counted from 0."""
        first, parts, missing = step * self.batch_size, [], self.batch_size
        while missing:
            epoch, offset = divmod(first, self.count)
            part = self._permutation(epoch)[offset : offset + missing]
            parts.append(part)
            first, missing = first + len(part), missing - len(part)
        return torch.cat(parts)
