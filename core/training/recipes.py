"""How long is each component of a model trained, in a model for a first look, a small one and a full one?

The options that `train.py` gives to the commands of the components, and nothing else: it knows no network and runs
nothing. What is not said here is the default of the command.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Length:
    """How one component is trained: the preset of its script, steps, images a step, and its other options."""

    preset: str
    steps: int
    batch_size: int
    more: tuple[str, ...] = ()

    def words(self, times: float) -> list[str]:
        """As its command line says it, ``times`` as long."""
        return ["--preset", self.preset, "--steps", str(self.times(times)), "--batch-size", str(self.batch_size),
                *self.more]

    def times(self, factor: float) -> int:
        """Steps, where the whole is to be ``factor`` times as long; at least one."""
        return max(1, round(self.steps * factor))

    @property
    def is_without_adversary(self) -> bool:
        """Whether this is a VAE whose decoder never meets one."""
        return "--gan-start" in self.more and self.more[self.more.index("--gan-start") + 1] == "1"


@dataclass(frozen=True)
class Recipe:
    """How all of a model is trained, and how its fits and its report are made."""

    clip: Length
    vae: Length
    unet: Length
    guidance: Length
    correction: tuple[str, ...]
    report: tuple[str, ...]


RECIPES = {
    "tiny": Recipe(
        Length("tiny", 200, 16, ("--learning-rate", "4e-3", "--warmup-steps", "5", "--captions-per-image", "4")),
        Length("tiny", 400, 4, ("--learning-rate", "4e-3", "--warmup-steps", "20", "--decay-share", "0.5",
                                "--squared-weight", "2", "--gan-start", "1", "--perceptual-weight", "0")),
        Length("tiny", 1500, 16, ("--learning-rate", "4e-3", "--warmup-steps", "20", "--decay-share", "0.5",
                                 "--captions-per-image", "4")),
        Length("tiny", 50, 16, ("--warmup-steps", "5", "--captions-per-image", "4")),
        ("20", "--samples", "64"), ("--quick", "--samples", "32", "--steps", "20")),
    "small": Recipe(
        Length("celeba128", 1500, 128), Length("celeba128", 6000, 16),
        Length("small", 15000, 64, ("--optimizer", "muon")), Length("small", 1500, 32),
        ("4,20,50", "--samples", "512"), ("--quick",)),
    "celeba128": Recipe(
        Length("celeba128", 4000, 256), Length("celeba128", 20000, 16), Length("celeba128", 50000, 64),
        Length("celeba128", 5000, 64, ("--self-guidance", "0.6")), ("2,4,8,16,50",), ()),
}
