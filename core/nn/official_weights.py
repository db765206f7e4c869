"""How do the weights of NVIDIA's released StyleGAN2 networks become those of ours?

Reads the exponential average of the generator ("G_ema") out of a file of https://github.com/NVlabs/stylegan2-ada-pytorch
and gives every tensor the name that `core.nn.style_networks` has for it. What that network would compute otherwise (no
skip outputs, another filter, no noise) is refused. The files and their licence are the user's. It knows no sampling.

Source: https://github.com/NVlabs/stylegan2-ada-pytorch/blob/main/training/networks.py
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.nn.checkpoint import load_strictly
from core.nn.pickle_reader import PickleRefused, read_pickle
from core.nn.style_networks import StyleConfig, StyleGenerator

FILTER = torch.tensor([1.0, 3.0, 3.0, 1.0])


def read_official(path: str | Path) -> StyleGenerator:
    """The generator of a released pickle, frozen. Raises PickleRefused where the file is none of these."""
    found = read_pickle(path)
    network = found.get("G_ema") if isinstance(found, dict) else None
    if not isinstance(network, dict) or "state" not in network:
        raise PickleRefused(f"{path} has no 'G_ema', the averaged generator of stylegan2-ada-pytorch; convert older "
                            "files with legacy.py of that project first")
    tensors, facts = _flattened(network["state"], "")
    try:
        config, state = renamed(tensors, facts)
    except (KeyError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise PickleRefused(f"{path} holds another network than StyleGAN2's generator: {error} is missing") from error
    generator = StyleGenerator(config)
    load_strictly(generator, state, str(path))
    return generator.eval().requires_grad_(False)


def renamed(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> tuple[StyleConfig, dict[str, Tensor]]:
    """The configuration and our names of the tensors; ``facts`` are the attributes of the modules that are no tensors.

    Raises PickleRefused for a network that computes something else, KeyError where something is missing.
    """
    grows = [re.fullmatch(r"synthesis\.b(\d+)\.conv1\.weight", name) for name in tensors]
    sizes = sorted(int(found[1]) for found in grows if found)
    if sizes != [4 << level for level in range(len(sizes))] or not sizes:
        raise PickleRefused(f"the network grows through {sizes}; 4, 8, 16, ... are needed")
    layers = sum(bool(re.fullmatch(r"mapping\.fc\d+\.weight", name)) for name in tensors)
    condition = int(facts.get("mapping.c_dim", 0) or 0)
    first = tensors["mapping.fc0.weight"]
    config = StyleConfig(
        output_channels=len(tensors[f"synthesis.b{sizes[-1]}.torgb.weight"]),
        channels=tuple(len(tensors[f"synthesis.b{size}.conv1.weight"]) for size in sizes),
        z_dim=int(facts["z_dim"]), w_dim=int(facts["w_dim"]), condition=condition, mapping_layers=layers,
        clamp=None if facts["synthesis.b4.conv1.conv_clamp"] is None else float(facts["synthesis.b4.conv1.conv_clamp"]))
    rate = facts.get("mapping.fc0.weight_gain", 0.01 / math.sqrt(first.shape[1])) * math.sqrt(first.shape[1])
    for said, is_so in (
        ("has no skip outputs", all(f"synthesis.b{size}.torgb.weight" in tensors for size in sizes)),
        ("takes no noise", facts["synthesis.b4.conv1.use_noise"]),
        (f"learns its mapping at {rate:.3g} of the rate", abs(rate - 0.01) < 1e-4),
        ("ends in another activation", facts["synthesis.b4.conv1.activation"] == "lrelu"),
    ):
        if not is_so:
            raise PickleRefused(f"the network {said}, which ours does not")
    state: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith("resample_filter"):
            row = value.float().sum(0) if value.ndim == 2 else value.float()
            if row.shape != FILTER.shape or not torch.allclose(row / row.sum(), FILTER / 8, atol=1e-4):
                raise PickleRefused("the network filters by another row than [1, 3, 3, 1], which ours cannot")
            continue
        state[new_name(name)] = value.float()
    return config, state


def new_name(name: str) -> str:
    """Our name of one of their tensors. Raises PickleRefused for one that is not StyleGAN2's."""
    if name == "synthesis.b4.const":
        return "synthesis.const"
    if found := re.fullmatch(r"mapping\.(?:fc(\d+)|embed)\.(weight|bias)", name):
        return f"mapping.embed.{found[2]}" if found[1] is None else f"mapping.layers.{found[1]}.{found[2]}"
    if name == "mapping.w_avg":
        return "mapping.w_mean"
    parts = r"weight|bias|noise_const|noise_strength|affine\.weight|affine\.bias"
    if found := re.fullmatch(rf"synthesis\.b(\d+)\.(conv0|conv1|torgb)\.({parts})", name):
        level, part = int(found[1]).bit_length() - 3, found[3].replace("noise_const", "noise")
        place = f"outputs.{level}" if found[2] == "torgb" else f"convs.{2 * level - (found[2] == 'conv0')}"
        return f"synthesis.{place}.{part}"
    raise PickleRefused(f"the network has a tensor {name[:80]!r}, which StyleGAN2's generator has not")


def _flattened(state: Mapping[str, Any], prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and other attributes of a module and of those within it, by dotted names."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {f"{prefix}{name}": value for name, value in state.items()
                             if isinstance(value, (int, float, str, bool, type(None)))}
    for kind in ("_parameters", "_buffers"):
        tensors |= {f"{prefix}{name}": value for name, value in state.get(kind, {}).items()
                    if isinstance(value, Tensor)}
    for name, module in state.get("_modules", {}).items():
        if not isinstance(module, dict) or "state" not in module:
            raise PickleRefused(f"the module {prefix}{name} is none of StyleGAN2's")
        inner = _flattened(module["state"], f"{prefix}{name}.")
        tensors, facts = tensors | inner[0], facts | inner[1]
    return tensors, facts
