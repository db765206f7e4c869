"""How does an autoencoder begin from the weights of another that is not quite of its shape?

With fewer residual blocks in the decoder, or with fewer latent channels, which are then the other's first principal
components. It does not know how they are trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from core.nn.autoencoder import VAE, VAEConfig, load_vae
from core.nn.checkpoint import ModelFolderError, load_component, load_strictly, read_component_config
from core.nn.equivariance import principal_components
from core.nn.layers import to_images

SHAPE = ("latent_channels", "encoder_channels", "encoder_blocks", "decoder_channels", "decoder_blocks")


def check_shapes(wanted: VAEConfig, preset: str, folder: str | Path) -> None:
    """Can ``wanted``, that of ``preset``, begin from the VAE of a model folder? Before anything is loaded.

    Raises ModelFolderError naming what has another shape.
    """
    found, ours = read_component_config(folder, "vae")["network"], asdict(wanted)
    components = ours["deterministic"] and not found.get("deterministic", False)  # starts from some of them
    for name in SHAPE:
        asked = ours[name] if isinstance(ours[name], int) else list(ours[name])
        fewer = name == "latent_channels" and components and asked <= found[name]
        fewer |= name == "decoder_blocks" and all(a <= b for a, b in zip(asked, found[name], strict=True))
        if found[name] != asked and not fewer:
            raise ModelFolderError(f"the VAE in {folder} has {name} {found[name]}, and --preset {preset} {asked}: name "
                                   "the --preset that it was trained with")


def started_from(model: VAE, folder: str | Path, pixels: Tensor, *, keep_statistics: bool) -> VAE:
    """``model`` with the weights of the VAE of a model folder, or with its first components where that one has more
    channels, measured on ``pixels`` (uint8 [N, H, W, 3]).

    ``keep_statistics``: mean and deviation of latents too, because the encoder will not learn. Raises ModelFolderError.
    """
    config, state = load_component(folder, "vae")
    if model.config.deterministic and not config["network"].get("deterministic", False):
        return from_components(model, load_vae(folder, pixels.device), pixels).cpu()
    start = fewer_blocks(without_filter(state), config["network"]["decoder_blocks"], model.config.decoder_blocks)
    if not keep_statistics:  # they are measured again at the end
        start |= {name: value for name, value in model.state_dict().items()
                  if name.startswith("latent_") and start[name].shape != value.shape}
    load_strictly(model, start, "the VAE to start from")
    return model


def without_filter(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that training changes: without the filter, and the refinement stage that earlier versions had."""
    return {name: value for name, value in state.items()
            if not name.startswith(("decoder.sharpen.", "decoder.refinement."))}


def fewer_blocks(state: Mapping[str, Tensor], had: Sequence[int], has: Sequence[int]) -> dict[str, Tensor]:
    """Weights for a decoder that has fewer residual blocks at each level than the other had: the first ones stay."""
    places, own, found = 1, 1, {0: 0}  # of a stage there -> here
    for before, after in zip(had, has, strict=True):
        found |= {places + i: own + i for i in range(min(before, after))}
        places, own = places + before, own + after
        found[places] = own  # the step up, or the last normalisation
        places, own = places + 1, own + 1
    result = {}
    for name, value in state.items():
        if name.startswith("decoder.stages."):
            place, rest = name.removeprefix("decoder.stages.").split(".", 1)
            if int(place) not in found:
                continue
            name = f"decoder.stages.{found[int(place)]}.{rest}"
        result[name] = value
    return result


@torch.inference_mode()
def from_components(model: VAE, other: VAE, pixels: Tensor) -> VAE:
    """``model`` with the weights of ``other`` whose latents are its first principal components, normalised.

    The projection is folded into the encoder's last and the decoder's first layer, so that nothing is lost but the
    components left out. Other layers must have the same shapes. pixels: uint8 [N, H, W, 3] to measure them on.
    """
    z = torch.cat([other.encode(to_images(part)).mean.cpu() for part in pixels.split(64)])
    projection, inverse, mean = principal_components(z, model.config.latent_channels)
    source, own = other.cpu().state_dict(), model.state_dict()
    for name, value in without_filter(source).items():
        if name in own and own[name].shape == value.shape and not name.startswith("latent_"):
            own[name].copy_(value)
    channels = len(mean)
    weight, bias = source["encoder.conv_out.weight"][:channels], source["encoder.conv_out.bias"][:channels]
    own["encoder.conv_out.weight"].copy_(torch.einsum("ck,kihw->cihw", projection, weight))
    own["encoder.conv_out.bias"].copy_(projection @ (bias - mean))
    weight, bias = source["decoder.stages.0.weight"], source["decoder.stages.0.bias"]
    own["decoder.stages.0.weight"].copy_(torch.einsum("okhw,kc->ochw", weight, inverse))
    own["decoder.stages.0.bias"].copy_(bias + torch.einsum("okhw,k->o", weight, mean))
    return model
