"""What does a latent look like, roughly and at once?

While an image is generated, people watch the clean latent that the network predicts. Decoding it costs as much as
several denoising steps; one linear 3x3 convolution, fitted in closed form to latents and their images, shows nearly the
same for a 270th of that. It does not know which autoencoder made the latents, only the hash of the encoder it belongs
to.

Linear previews of latents: https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.nn.checkpoint import build, git_commit, load_component, read_index, save_component

FACTOR = 8  # pixels a latent place stands for, along each side


class PreviewDecoder(nn.Module):
    """Normalized latents [B, C, h, w] -> images [B, 3, 8h, 8w] around [-1, 1]: one linear 3x3 convolution."""

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(latent_channels, 3 * FACTOR * FACTOR, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.patches(x), FACTOR)

    def levels(self, x: Tensor) -> Tensor:
        """The same as floats [B, 8h, 8w, 3] in [0, 255], whose whole parts are the nearest grey levels."""
        levels = (self.patches(x) * 127.5 + 128.0).clamp(0, 255)
        return F.pixel_shuffle(levels, FACTOR).permute(0, 2, 3, 1).contiguous()


@torch.inference_mode()
def fit_preview(pairs: Iterable[tuple[Tensor, Tensor]], ridge: float = 1e-3) -> PreviewDecoder:
    """The preview decoder nearest to the images in mean square: ridge regression on 3x3 latent neighbourhoods.

    Shapes: pairs of normalized latents [B, C, h, w] and their images [B, 3, 8h, 8w]. The normal equations are summed in
    float64, so neither batch size nor order matters. Raises ValueError without any pair.
    """
    gram = moment = torch.zeros(0)
    channels = count = 0
    for x, images in pairs:
        channels = x.shape[1]
        near = F.unfold(x.float(), 3, padding=1).transpose(1, 2).flatten(0, 1)  # [B h w, 9 C]
        near = torch.cat([near, torch.ones_like(near[:, :1])], dim=1).cpu().double()
        patches = F.pixel_unshuffle(images.float(), FACTOR).permute(0, 2, 3, 1).flatten(0, 2).cpu().double()
        gram = near.T @ near + (gram if count else 0.0)  # [9 C + 1, 9 C + 1]
        moment = near.T @ patches + (moment if count else 0.0)  # [9 C + 1, 192]
        count += len(near)
    if not count:
        raise ValueError("no images were given to fit a preview decoder to")
    solution = torch.linalg.solve(gram + ridge * count * torch.eye(len(gram), dtype=torch.float64), moment).T.float()
    preview = PreviewDecoder(channels)
    preview.load_state_dict({"patches.weight": solution[:, :-1].unflatten(1, (channels, 3, 3)),
                             "patches.bias": solution[:, -1]})
    return preview.eval().requires_grad_(False)


def save_preview(preview: PreviewDecoder, folder: str | Path, encoder_sha256: str) -> None:
    """Write it into a model folder as the component ``preview`` of the encoder with this hash."""
    config = {"latent_channels": preview.patches.in_channels, "encoder_sha256": encoder_sha256}
    save_component(folder, "preview", preview.state_dict(), config, extra={"commit": git_commit(Path(__file__).parent)})


def load_preview(folder: str | Path, encoder_sha256: str, device: torch.device | str = "cpu") -> PreviewDecoder | None:
    """The preview decoder of a model folder; None when it has none, or one that was fitted to another encoder."""
    if "preview" not in read_index(folder)["components"]:
        return None
    config, state = load_component(folder, "preview")
    if config["encoder_sha256"] != encoder_sha256:
        return None
    preview = build(lambda: PreviewDecoder(config["latent_channels"]), state, "the preview decoder")
    return preview.eval().requires_grad_(False).to(device)
