"""Which error of a sampler is the same in all images, and how is it corrected?

A solver of few steps ends too near to the mean of what the network could have said: latents that spread too little
around a mean that is not that of real images. Of many steps a little of that is left. These errors are the same for all
images of one number of steps, so they are measured once and taken back. Generated latents and those of real images are
taken for stationary Gaussian fields with means of their own; what carries one into the other with the least change is
linear, and at each spatial frequency a matrix of its own mixes the channels:

    x' = mean of real latents + A * (x - mean of generated latents),  A = S^1/2 (S^1/2 D S^1/2)^-1/2 S^1/2

for the cross-spectra D of generated latents and S of real images'. Guidance errs in its own way, so this is measured
with and without it. Between two measured numbers of steps and between two guidance scales the correction is
interpolated, beyond the last it stays. It knows neither networks nor solvers.

Optimal transport between Gaussians: Dowson and Landau, 1982, https://doi.org/10.1016/0047-259X(82)90077-X; frequency by
frequency between stationary fields: Xia, Ferradans, Peyre and Aujol, "Synthesizing and Mixing Stationary Gaussian
Texture Models", SIAM J. Imaging Sciences, 2014. Exposure bias, which makes samplers drift, and scaling against it:
https://arxiv.org/abs/2308.15321. Here it is taken back once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core.nn.checkpoint import component_hash, git_commit, load_component, read_index, save_component

COMPONENT = "correction"
FAINTEST = 1e-3  # power that is not told from none, where real images' latents have about 1


@dataclass(frozen=True)
class LatentCorrection:
    """For each of s guidance scales and k numbers of steps, ascending, of normalized latents [B, C, h, w]:

    transport [s, k, h, w // 2 + 1, C, C], complex, a Hermitian matrix for each spatial frequency, and shift
    [s, k, C, h, w].
    """

    scales: tuple[float, ...]
    steps: tuple[int, ...]
    transport: Tensor
    shift: Tensor

    def __call__(self, x: Tensor, num_inference_steps: int, scales: Sequence[float]) -> Tensor:
        """The same for clean latents [B, C, h, w] that so many steps at these B guidance scales ended with, corrected;
        on any device."""
        spectrum, corrected = torch.fft.rfft2(x.float().cpu()), torch.empty(x.shape)
        for scale in set(scales):
            transport, shift = self.at(num_inference_steps, scale)
            rows = [row for row, own in enumerate(scales) if own == scale]
            moved = torch.einsum("uvcd,nduv->ncuv", transport, spectrum[rows])
            corrected[rows] = torch.fft.irfft2(moved, s=x.shape[-2:]) + shift
        return corrected.to(x)

    def at(self, num_inference_steps: int, scale: float) -> tuple[Tensor, Tensor]:
        """(transport, shift) for a number of steps, linear in its logarithm, and a guidance scale; those of the nearest
        end outside."""
        logarithms = [math.log(count) for count in self.steps]
        (s, between), (k, along) = _place(self.scales, scale), _place(logarithms, math.log(num_inference_steps))

        def inside(knots: Tensor) -> Tensor:
            for share in (between, along):  # the first axis left is the next one to go
                knots = knots[0] if share == 0 else knots[0] + share * (knots[1] - knots[0])
            return knots

        return inside(self.transport[s : s + 2, k : k + 2]), inside(self.shift[s : s + 2, k : k + 2])


def _place(knots: Sequence[float], value: float) -> tuple[int, float]:
    """The last of ascending knots that is not above a value, and the share of the way from there to the next."""
    inside = min(max(value, knots[0]), knots[-1])
    i = max(i for i, knot in enumerate(knots) if knot <= inside)
    return i, 0.0 if knots[i] == inside else (inside - knots[i]) / (knots[i + 1] - knots[i])


def fit_correction(generated: Mapping[float, Mapping[int, Tensor]], real: Tensor) -> LatentCorrection:
    """From normalized latents that each guidance scale and number of steps generated, and those of real images, each
    [N, C, h, w]. The captions of the generated ones have to be those of real images, or it would correct what was asked
    for.
    """
    counts, ways = sorted({count for ways in generated.values() for count in ways}), sorted(generated)
    every = [latents for scale in ways for _, latents in sorted(generated[scale].items())]
    if not counts or counts[0] < 1 or min(len(real), *map(len, every)) < 2:
        raise ValueError("at least two latents of real images and of one number of steps are needed")
    if len(every) != len(ways) * len(counts):
        raise ValueError("every guidance scale needs the same numbers of steps")
    wanted, root = real.double().mean(0), _power(cross_spectrum(real), 0.5)
    transports, shifts = [], []
    for latents in every:
        transport = root @ _power(root @ cross_spectrum(latents) @ root, -0.5) @ root
        mean = torch.fft.rfft2(latents.double().mean(0))
        moved = torch.fft.irfft2(torch.einsum("uvcd,duv->cuv", transport, mean), s=wanted.shape[-2:])
        transports.append(transport.to(torch.complex64))
        shifts.append((wanted - moved).float())
    found = (torch.stack(each).unflatten(0, (len(ways), len(counts))) for each in (transports, shifts))
    return LatentCorrection(tuple(ways), tuple(counts), *found)


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


def save_correction(correction: LatentCorrection, folder: str | Path) -> None:
    """Write it into a model folder as the component ``correction`` of the UNet there."""
    state = {"transport": torch.view_as_real(correction.transport), "shift": correction.shift}
    save_component(folder, COMPONENT, state,
                   {"guidance_scales": list(correction.scales), "steps": list(correction.steps),
                    "unet": component_hash(folder, "unet")},
                   extra={"commit": git_commit(Path(__file__).parent)})


def load_correction(folder: str | Path) -> LatentCorrection | None:
    """The correction of a model folder; None when it has none, or one that was measured on another UNet."""
    if COMPONENT not in read_index(folder)["components"]:
        return None
    config, state = load_component(folder, COMPONENT)
    if config["unet"] != component_hash(folder, "unet") or "guidance_scales" not in config:
        return None
    return LatentCorrection(tuple(config["guidance_scales"]), tuple(config["steps"]),
                            torch.view_as_complex(state["transport"].float()), state["shift"].float())
