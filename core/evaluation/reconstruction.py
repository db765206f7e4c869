"""How near are an autoencoder's copies to their originals?

PSNR, SSIM and MS-SSIM, by torchmetrics. An autoencoder is whatever encodes images to a posterior with ``mean`` and
decodes latents; nothing else is known of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core.evaluation.metrics import multiscale_ssim
from core.nn.layers import to_images


@torch.inference_mode()
def reconstruction_metrics(
    model: Any, pixels: Tensor, batch_size: int = 32, decode: Callable[[Tensor], Tensor] | None = None
) -> dict[str, float]:
    """PSNR (dB), SSIM and MS-SSIM of reconstructions of uint8 images [N, 128, 128, 3]; data range 1 for [0, 1].

    ``decode`` takes the place of the model's own decoder: raw latents -> images.
    """
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

    metrics: dict[str, Any] = {"psnr_db": PeakSignalNoiseRatio(data_range=1.0),
                               "ssim": StructuralSimilarityIndexMeasure(data_range=1.0), "ms_ssim": multiscale_ssim()}
    for start in range(0, len(pixels), batch_size):
        images = to_images(pixels[start : start + batch_size])
        recon = (decode or model.decode)(model.encode(images).mean).clamp(-1, 1)
        for metric in metrics.values():
            metric.update((recon.cpu() + 1) / 2, (images.cpu() + 1) / 2)
    return {name: float(metric.compute()) for name, metric in metrics.items()} | {"n": len(pixels)}
