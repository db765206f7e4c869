"""What does this model get wrong in all its images alike, by how much, and what corrects it?

Two corrections are fitted to what the model itself generates for captions of training images, against those images:
the filter at the end of the decoder (`core/nn/sharpening.py`) and the latent distribution correction
(`core/diffusion/latent_correction.py`). The generator is given with that part off, or the fit would correct itself. It
does not know how the networks are loaded, nor where the result is released.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.diffusion.latent_correction import LatentCorrection, fit_correction
from core.evaluation.generation import Generator, Sampling, generate_images, generate_latents
from core.imaging.spectrum import Pictures, fine_detail_share
from core.nn.layers import to_images, to_pixels
from core.nn.sharpening import Sharpen, fit_kernel

MOST_REAL = 2048  # training images that the latents are compared with


def fit_sharpness(
    unfiltered: Generator, prompts: Sequence[str], sampling: Sampling, real: Pictures
) -> tuple[Tensor, dict[str, Any]]:
    """The filter that gives generated images the radial spectrum of real ones, and what it does to fine detail.

    ``unfiltered`` decodes without a filter. ``real`` are the training images that the prompts describe. Returns the
    kernel and the share of power above half Nyquist over that of real images, before and after it.
    """
    generated = generate_images(unfiltered, sampling.requests(prompts))
    kernel = fit_kernel(generated, real)
    sharpen = Sharpen(len(kernel))
    sharpen.kernel.copy_(kernel)
    with torch.inference_mode():
        filtered = to_pixels(sharpen(to_images(generated)))
    wanted, scale = fine_detail_share(real), sampling.guidance_scale
    return kernel, {
        "n": len(prompts), "steps": sampling.num_inference_steps,
        "guidance": unfiltered.info.default_guidance_scale if scale is None else scale,
        "fine_detail_before": fine_detail_share(generated) / wanted,
        "fine_detail_after": fine_detail_share(filtered) / wanted,
    }  # fmt: skip


def measure_correction(
    uncorrected: Generator, prompts: Sequence[str], sampling: Sampling, counts: Sequence[int], real: Pictures
) -> tuple[LatentCorrection, dict[str, Any]]:
    """What these numbers of steps get wrong, at no guidance (scale 1), that of ``sampling`` and twice as much.

    ``uncorrected`` generates without a latent correction; ``real`` are training images, of which the first 2,048 are
    encoded. Returns the correction, and by guidance scale and number of steps the deviation of the generated latents,
    the strongest gain and the size of the shift.
    """
    own = uncorrected.info.default_guidance_scale if sampling.guidance_scale is None else sampling.guidance_scale
    generated: dict[float, dict[int, Tensor]] = {}
    for scale, count in itertools.product(sorted({1.0, own, 2 * own}), sorted(set(counts))):
        requests = replace(sampling, num_inference_steps=count, guidance_scale=scale).requests(prompts)
        generated.setdefault(scale, {})[count] = torch.from_numpy(generate_latents(uncorrected, requests))
    correction = fit_correction(generated, encode_sampled(uncorrected.vae, real[:MOST_REAL], sampling.seed))
    figures: dict[str, dict[int, dict[str, float]]] = {}
    for scale, count in itertools.product(correction.scales, correction.steps):
        transport, shift = correction.at(count, scale)
        figures.setdefault(f"{scale:g}", {})[count] = {
            "spread": float(generated[scale][count].float().var(0).mean().sqrt()),
            "strongest": float(torch.linalg.svdvals(transport).max()),
            "shift_rms": float(shift.square().mean().sqrt()),
        }
    return correction, {"n": len(prompts), "guidance_scales": figures}


@torch.inference_mode()
def encode_sampled(vae: Any, pictures: Pictures, seed: int, batch: int = 64) -> Tensor:
    """Normalized latents of images, drawn from their posteriors. Shapes: uint8 [N, H, W, 3] -> [N, C, h, w]."""
    device = next(vae.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    chunks = np.array_split(np.arange(len(pictures)), -(-len(pictures) // batch))
    posteriors = (vae.encode(to_images(np.asarray(pictures[chunk])).to(device)) for chunk in chunks)
    return torch.cat([vae.normalize(posterior.sample(generator)).cpu() for posterior in posteriors])
