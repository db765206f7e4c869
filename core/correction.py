"""What does a sampler get wrong in every picture alike, and what mends it?

A solver of few steps ends too near to the mean of what the network could have said: latents that spread too little
around a mean that is not that of photographs. Of many steps a little of that is left. These errors are the same for all
pictures of one number of steps, so they are measured once and taken back. Drawn latents and those of photographs are
taken for stationary Gaussian fields with means of their own; what carries one into the other with the least change is
linear, and at each spatial frequency a matrix of its own mixes the channels:

    x' = mean of photographs + A * (x - mean of drawn),  A = S^1/2 (S^1/2 D S^1/2)^-1/2 S^1/2

for the cross-spectra D of drawn latents and S of photographs'. Between two measured numbers of steps the correction is
interpolated, beyond the last it stays. It knows neither networks nor solvers.

Optimal transport between Gaussians: Dowson and Landau, 1982, https://doi.org/10.1016/0047-259X(82)90077-X; frequency by
frequency between stationary fields: Xia, Ferradans, Peyre and Aujol, "Synthesizing and Mixing Stationary Gaussian
Texture Models", SIAM J. Imaging Sciences, 2014. Exposure bias, which makes samplers drift, and scaling against it:
https://arxiv.org/abs/2308.15321. Here it is taken back once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core.checkpoint import component_hash, git_commit, load_component, read_index, save_component

COMPONENT = "correction"
FAINTEST = 1e-3  # power that is not told from none, where photographs' latents have about 1


@dataclass(frozen=True)
class Correction:
    """For each of k measured numbers of steps, ascending, of whitened latents [B, C, h, w]:

    transport [k, h, w // 2 + 1, C, C], complex, a Hermitian matrix for each spatial frequency, and shift [k, C, h, w].
    """

    steps: tuple[int, ...]
    transport: Tensor
    shift: Tensor

    def __call__(self, x: Tensor, num_inference_steps: int) -> Tensor:
        """The same for clean latents [B, C, h, w] that so many steps ended with, corrected; on any device."""
        transport, shift = self.at(num_inference_steps)
        spectrum = torch.fft.rfft2(x.float().cpu())
        mended = torch.einsum("uvcd,nduv->ncuv", transport, spectrum)
        return (torch.fft.irfft2(mended, s=x.shape[-2:]) + shift).to(x)

    def at(self, num_inference_steps: int) -> tuple[Tensor, Tensor]:
        """(transport, shift) for a number of steps, linear in its logarithm; those of the nearest end outside."""
        count = min(max(num_inference_steps, self.steps[0]), self.steps[-1])
        i = max(i for i, knot in enumerate(self.steps) if knot <= count)
        if self.steps[i] == count:
            return self.transport[i], self.shift[i]
        share = math.log(count / self.steps[i]) / math.log(self.steps[i + 1] / self.steps[i])
        a, b = self.transport[i : i + 2]
        return a + share * (b - a), torch.lerp(self.shift[i], self.shift[i + 1], share)


def fit_correction(drawn: Mapping[int, Tensor], photographs: Tensor) -> Correction:
    """From whitened latents that each number of steps drew, and those of photographs, each [N, C, h, w].

    The captions of the drawn ones have to be those of photographs, or it would mend what was asked for.
    """
    if not drawn or min(drawn) < 1 or min(len(photographs), *map(len, drawn.values())) < 2:
        raise ValueError("at least two latents of photographs and of one number of steps are needed")
    wanted, root = photographs.double().mean(0), _power(cross_spectrum(photographs), 0.5)
    transports, shifts = [], []
    for _, latents in sorted(drawn.items()):
        transport = root @ _power(root @ cross_spectrum(latents) @ root, -0.5) @ root
        mean = torch.fft.rfft2(latents.double().mean(0))
        moved = torch.fft.irfft2(torch.einsum("uvcd,duv->cuv", transport, mean), s=wanted.shape[-2:])
        transports.append(transport.to(torch.complex64))
        shifts.append((wanted - moved).float())
    return Correction(tuple(sorted(drawn)), torch.stack(transports), torch.stack(shifts))


def cross_spectrum(latents: Tensor) -> Tensor:
    """Power of the deviations from the mean at each frequency, channel by channel, complex128, unbiased.

    Shapes: [N, C, h, w] -> [h, w // 2 + 1, C, C]. Uncorrelated latents of variance 1 have the unit matrix everywhere.
    """
    x = latents.double()
    spectrum = torch.fft.rfft2(x - x.mean(0), norm="ortho")
    power = torch.einsum("ncuv,nduv->uvcd", spectrum, spectrum.conj()) / (len(x) - 1)
    return power + FAINTEST * torch.eye(power.shape[-1])


def _power(matrices: Tensor, exponent: float) -> Tensor:
    """Hermitian positive matrices [..., C, C] to a real power."""
    values, vectors = torch.linalg.eigh(matrices)
    return (vectors * values.clamp_min(FAINTEST**2)[..., None, :] ** exponent) @ vectors.mH


def save_correction(correction: Correction, folder: str | Path) -> None:
    """Write it into a model folder as the component ``correction`` of the UNet there."""
    state = {"transport": torch.view_as_real(correction.transport), "shift": correction.shift}
    save_component(folder, COMPONENT, state,
                   {"steps": list(correction.steps), "unet": component_hash(folder, "unet")},
                   extra={"commit": git_commit(Path(__file__).parent)})


def load_correction(folder: str | Path) -> Correction | None:
    """The correction of a model folder; None when it has none, or one that was measured on another UNet."""
    if COMPONENT not in read_index(folder)["components"]:
        return None
    config, state = load_component(folder, COMPONENT)
    if config["unet"] != component_hash(folder, "unet") or "transport" not in state:
        return None
    return Correction(tuple(config["steps"]), torch.view_as_complex(state["transport"].float()), state["shift"].float())
