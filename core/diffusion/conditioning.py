"""What is a denoiser told beside the noisy latent and its timestep?

`Condition` holds the encoded prompts of a batch; its parts are joined, repeated and cut here. A learned null condition
is a condition like any other. It does not know guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

Model = Callable[[Tensor, Tensor, "Condition"], Tensor]


@dataclass(frozen=True)
class Condition:
    """What a batch of images is asked to be. ``null`` marks rows that use the learned null instead of their text.

    ``guidance`` is a scale that a distilled network answers at, in one pass; 1, as when it is not said, is none, which
    is all that other networks know.

    Shapes: tokens [B, L, E], mask [B, L] bool (True = a real token), pooled [B, E], px [B] source resolution in pixels,
    null [B] bool, guidance [B].
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    px: Tensor
    null: Tensor
    guidance: Tensor = None  # type: ignore[assignment]  # never None once made

    def __post_init__(self) -> None:
        if self.guidance is None:
            object.__setattr__(self, "guidance", torch.ones_like(self.px))

    def __len__(self) -> int:
        return len(self.px)

    def __getitem__(self, rows: slice | Tensor) -> Condition:
        return Condition(*(getattr(self, f.name)[rows] for f in fields(self)))

    def nulled(self) -> Condition:
        """The same batch without its text and guidance (unconditional; px stays)."""
        return Condition(self.tokens, self.mask, self.pooled, self.px, torch.ones_like(self.null))

    def at_scale(self, scale: float | Tensor) -> Condition:
        """The same batch, to be answered in one pass at these guidance scales; without text there is none (1)."""
        return replace(self, guidance=torch.where(self.null, 1.0, torch.ones_like(self.px) * scale))

    def to(self, device: torch.device | str) -> Condition:
        """Every tensor on ``device``."""
        return Condition(*(getattr(self, f.name).to(device) for f in fields(self)))

    def repeat(self, count: int) -> Condition:
        """Every row ``count`` times, in order: a, a, b, b, ..."""
        return Condition(*(getattr(self, f.name).repeat_interleave(count, dim=0) for f in fields(self)))


def join_conditions(parts: Sequence[Condition]) -> Condition:
    """Concatenate batches; token axes are padded to the longest (padding is masked, so it changes nothing)."""
    longest = max(part.tokens.shape[1] for part in parts)

    def padded(part: Condition) -> Condition:
        missing = longest - part.tokens.shape[1]
        tokens = torch.nn.functional.pad(part.tokens, (0, 0, 0, missing))
        return replace(part, tokens=tokens, mask=torch.nn.functional.pad(part.mask, (0, missing)))

    whole = [padded(part) for part in parts]
    return Condition(*(torch.cat([getattr(part, f.name) for part in whole]) for f in fields(Condition)))


class Flat(nn.Module):
    """A denoiser of (x, timestep, condition) that takes the fields of the condition one after the other."""

    open_axes = ((2, 1), (3, 1))  # tokens and mask are as long as the text

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, timestep: Tensor, *parts: Tensor) -> Tensor:
        return self.denoiser(x, timestep, Condition(*parts))

    @staticmethod
    def inputs(x: Tensor, timestep: Tensor, condition: Condition) -> list[Tensor]:
        """What `forward` takes."""
        return [x, timestep, *(getattr(condition, field.name) for field in fields(condition))]
