"""Why are decoded images soft, and what makes them as sharp as real images?

What a decoder cannot know it leaves out, so its images have the coarse power of real images and a part of the fine.
Scaling every spatial frequency by the root of the ratio of the two powers mends that: of all linear filters it moves
the images least among those that end with the spectrum of real images (it is the optimal transport between two
stationary Gaussian processes, and what makes a mean-square estimate perceptually perfect in the Gaussian case:
https://arxiv.org/abs/2107.02555). It is fitted in closed form to images, cut to a small kernel, and becomes the last
layer of the decoder. It does not know what generated the images.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 11  # of the kernel, in pixels: as wide as the filter is worth keeping (training log)
COARSE = 0.1  # of Nyquist: periods of 20 pixels and more, which any decoder gets right
GAINS = (0.5, 4.0)  # of any frequency: beyond these it would be noise or compression that is amplified


class Sharpen(nn.Module):
    """Images [B, 3, H, W] -> the same, filtered, borders mirrored; H and W above half the kernel's side."""

    kernel: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise ValueError(f"the kernel needs an odd side, got {size}")
        kernel = torch.zeros(size, size)
        kernel[size // 2, size // 2] = 1.0  # until it is fitted it changes nothing
        self.register_buffer("kernel", kernel)

    def forward(self, images: Tensor) -> Tensor:
        edge = self.kernel.shape[0] // 2
        colours = images.shape[1]
        kernels = torch.stack([self.kernel] * colours)[:, None]  # the same for all; OpenVINO folds no other way
        return F.conv2d(F.pad(images, (edge,) * 4, mode="reflect"), kernels, groups=colours)


def fit_kernel(soft: np.ndarray, sharp: np.ndarray, size: int = SIZE) -> Tensor:
    """The filter [size, size] that gives the first images the radial spectrum of the second; it sums to 1.

    Shapes: uint8 [N, S, S, 3], any two N, the same S >= ``size``. Raises ValueError for other shapes.
    """
    from core.imaging.spectrum import radial_power

    if soft.shape[1:] != sharp.shape[1:] or soft.ndim != 4 or min(len(soft), len(sharp)) < 1 or soft.shape[1] < size:
        raise ValueError(f"two sets of images of one size, {size} or more, got {soft.shape} and {sharp.shape}")
    side = soft.shape[1]
    (frequency, have), (_, want) = radial_power(soft), radial_power(sharp)
    coarse = frequency < COARSE  # as much of it as there is: contrast is not sharpness
    ratio = want / max(want[coarse].sum(), 1e-12) / np.maximum(have / max(have[coarse].sum(), 1e-12), 1e-12)
    gain = np.sqrt(ratio).clip(*GAINS)
    radius = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None, :]) / 0.5  # as a share of Nyquist
    response = np.fft.fftshift(np.fft.ifft2(np.interp(radius, frequency, gain)).real)
    middle, edge = side // 2, size // 2
    kernel = response[middle - edge : middle + edge + 1, middle - edge : middle + edge + 1]
    return torch.from_numpy(kernel / kernel.sum()).float()
