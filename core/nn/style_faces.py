"""How do prompts become faces through a style: text encoder, generator, decoder, one call of each?

`StyleFaces` holds the three networks of a model folder. Styles can be truncated, mixed, interpolated and moved between
the steps, and a seed gives the same face alone or among others. It does not know how any of them was trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.imaging.png_metadata import machine_png
from core.imaging.watermark import mark
from core.nn.autoencoder import VAE, encoder_hash, load_vae
from core.nn.checkpoint import ModelFolderError, component_hash
from core.nn.clip import CLIP, load_clip
from core.nn.layers import to_pixels
from core.nn.openvino_backend import Compiler, Composed
from core.nn.style_networks import StyleGenerator, load_style_generator, truncated
from core.nn.tokenizer import Tokenizer

PX = (58, 80, 128)  # resolutions of sources that a condition tells apart; the last is asked for
PX_WEIGHT = 4.0  # of the number that says which: one among the hundreds of a pooled text would hardly be seen
PSI = 0.7  # how far from the mean style faces are generated, unless another is asked for


def condition_of(pooled: Tensor, px: Tensor | None = None) -> Tensor:
    """What the networks are told: the pooled text, and which of `PX` the source had (None: the sharpest).

    Shapes: pooled [B, E], px [B] -> [B, E + 3].
    """
    classes = torch.tensor(PX, device=pooled.device)
    px = torch.full((len(pooled),), PX[-1], device=pooled.device) if px is None else px
    nearest = (px[:, None] - classes).abs().argmin(1)
    return torch.cat([pooled.float(), PX_WEIGHT * torch.eye(len(PX), device=pooled.device)[nearest]], 1)


@dataclass(frozen=True)
class StyleFaces:
    """The networks that generate, on one device. ``config`` is the generator's config.json."""

    clip: CLIP
    tokenizer: Tokenizer
    vae: VAE
    generator: StyleGenerator
    config: dict[str, Any]
    decode: Callable[[Tensor], Tensor] | None = None  # normalized latents -> images, where that was compiled

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> StyleFaces:
        """Those of a model folder. Raises ModelFolderError where one is missing or damaged, or where the generator was
        trained with another VAE or CLIP."""
        generator, config = load_style_generator(folder, device=device)
        vae = load_vae(folder, device)
        found = {"vae": encoder_hash(vae), "clip": component_hash(folder, "clip")}
        if wrong := [name for name, value in found.items() if config["parents"][name] != value]:
            raise ModelFolderError(f"the style generator in {folder} was trained with another {' and '.join(wrong)}; "
                                   "run `python stylegan.py --train` again or restore the folder")
        return cls(*load_clip(folder, device), vae, generator, config)

    @torch.inference_mode()
    def conditions(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> [B, n]: what each asks for, as sharp as the sharpest real images."""
        ids, mask = (one.to(self.clip.log_temperature.device) for one in self.tokenizer(list(prompts)))
        return condition_of(self.clip.encode_text(ids, mask).pooled)

    @torch.inference_mode()
    def styles(self, prompts: Sequence[str], seeds: Sequence[int], psi: float = PSI) -> Tensor:
        """One w a prompt and seed, truncated towards the mean of its prompt: [B, w_dim].

        ``psi`` 0 is that mean, 1 is not truncated. Raises ValueError where there are not as many seeds as prompts.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
        different = list(dict.fromkeys(prompts))
        told = self.conditions(different)
        rows = torch.tensor([different.index(prompt) for prompt in prompts], device=told.device)
        z = torch.stack([torch.randn(self.generator.config.z_dim, generator=torch.Generator().manual_seed(seed))
                         for seed in seeds]).to(told.device)
        w = self.generator.mapping(z, told[rows])
        return w if psi == 1.0 else truncated(w, self.generator.centre(told)[rows], psi)

    @torch.inference_mode()
    def latents(self, styles: Tensor) -> Tensor:
        """w [B, w_dim], or one for each layer [B, layers, w_dim] -> normalized latents [B, C, h, w]."""
        return self.generator.synthesis(self.generator.broadcast(styles) if styles.ndim == 2 else styles)

    @torch.inference_mode()
    def pixels(self, latents: Tensor, batch_size: int = 32) -> np.ndarray:
        """Normalized latents -> uint8 [B, H, W, 3]."""
        decode = self.decode or self._decode_with_torch
        return np.concatenate([to_pixels(decode(part)) for part in latents.split(batch_size)])

    def _decode_with_torch(self, latents: Tensor) -> Tensor:
        return self.vae.decode(self.vae.denormalize(latents.contiguous(memory_format=torch.channels_last)))

    def compiled(self, cache: Path | None) -> StyleFaces:
        """The same on a CPU, with the decoder, which costs most, compiled by OpenVINO and kept in the folder ``cache``
        (None: nowhere). Raises CompileError where that is not installed or does not work."""
        config = self.generator.config
        example = torch.randn(2, config.output_channels, config.size, config.size,
                              generator=torch.Generator().manual_seed(0))
        decoder = Composed(self.vae, self.vae.denormalize, self.vae.decode)
        weights = hashlib.sha256(b"".join(value.detach().cpu().numpy().tobytes()
                                          for value in self.vae.state_dict().values())).hexdigest()
        compiler = Compiler(cache, torch.get_num_threads())
        return replace(self, decode=compiler.compile("decoder", decoder, (example,), weights))

    def generate(self, prompt: str, seeds: Sequence[int], psi: float = PSI) -> np.ndarray:
        """One face a seed: uint8 [B, H, W, 3]."""
        return self.pixels(self.latents(self.styles([prompt] * len(seeds), seeds, psi)))

    def png(self, prompt: str, seed: int, psi: float = PSI) -> bytes:
        """One face as a PNG that carries the invisible mark and says that a machine made it."""
        return machine_png(mark(self.generate(prompt, [seed], psi)[0]), prompt)
