"""Which device will compute, and is there one that lies idle?

The standard library alone, and the answers of a probe that runs in the environment (`launcher/environment.py`): it does
not know torch.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from launcher import environment


def device_problem(torch: dict, version: str | None, wanted: str) -> str | None:
    """The sentence for an accelerator that is present and unused, or wanted and absent; `torch` is the probe's."""
    if not torch["cuda"] and environment.nvidia_gpus():
        if torch["cuda_build"] is None:
            index = environment.TORCH_INDEX + "cu130"
            mend = f"delete the folder .venv and run ./start.py --torch-index {index}"
            return f"There is an NVIDIA GPU, but torch {version} is a CPU-only build: {mend}, or use --device cpu."
        built = f"CUDA {torch['cuda_build']}, for which torch {version} was built"
        return f"There is an NVIDIA GPU, but its driver is older than {built}: update the driver, or use --device cpu."
    kind, _, index = wanted.partition(":")
    if kind in ("cuda", "mps") and not torch[kind]:
        return f"--device {wanted} was asked for and torch {version} finds no such device: use --device auto."
    if kind == "cuda" and int(index or 0) >= len(torch["cuda"]):
        return f"--device {wanted} was asked for and the last GPU is cuda:{len(torch['cuda']) - 1}: use --device cuda."
    return None


def quick_device_problem(root: Path, wanted: str) -> str | None:
    """The same without importing torch, which takes seconds, unless there seems to be something wrong."""
    built, version = environment.torch_cuda_build(root), environment.installed(root).get("torch")
    if wanted == "cpu" or wanted == "auto" and (built or not version):
        return None
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    facts = {"cuda_build": built, "cuda": environment.nvidia_gpus() if built else [], "mps": apple}
    guess = device_problem(facts, version, wanted)
    if guess is None or wanted == "auto":
        return guess
    found = environment.probe(root)
    broken = environment.import_problems(root, found)
    return device_problem(found["torch"], version, wanted) if found["torch"] else (broken[0] if broken else guess)


def engine_text(found: dict, device: str) -> str:
    """What will compute the networks on the device that was asked for."""
    if device != "cpu" and (device != "auto" or found["cuda"] or found["mps"]):
        return "torch"
    return found.get("openvino") or f"torch; OpenVINO would be faster on a CPU ({found['openvino_error']})"
