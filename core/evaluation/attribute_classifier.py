"""Which attributes and features does a network find in an image that no generator was trained against?

The attribute classifier predicts the 40 attributes and the resolution of the source; distances between sets of images
are taken in its features. It is trained once on real images and frozen, and its hash names it in every report: numbers
of different attribute classifiers cannot be compared. This module knows images and labels, nothing of generators,
models or reports.

ResNet: https://arxiv.org/abs/1512.03385. One-cycle learning rate: https://arxiv.org/abs/1708.07120.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from core.command import SettingError
from core.imaging.spectrum import Pictures
from core.nn.checkpoint import ModelFolderError, build, component_hash, load_component, save_component
from core.nn.layers import to_images
from core.text.lexicon import ATTRIBUTES

log = logging.getLogger(__name__)


class Pool(Protocol):
    """What the attribute classifier needs of a prepared store: rows of uint8 images with their labels."""

    @property
    def images(self) -> np.ndarray: ...
    @property
    def image_id(self) -> np.ndarray: ...
    @property
    def px(self) -> np.ndarray: ...
    @property
    def attributes(self) -> np.ndarray: ...


@dataclass(frozen=True)
class AttributeClassifierConfig:
    """A ResNet-10 of about 5 million parameters: what two CPU cores train in minutes."""

    blocks: tuple[int, int, int, int] = (1, 1, 1, 1)
    num_attributes: int = len(ATTRIBUTES)
    px_classes: tuple[int, ...] = (58, 80, 128)


@dataclass(frozen=True)
class ClassifierOutput:
    """What the attribute classifier predicts for a batch, still as tensors that carry gradients."""

    logits: Tensor  # [B, 40]
    px_logits: Tensor  # [B, 3]
    features: Tensor  # [B, 512]


class Block(nn.Module):
    """Two convolutions and a way around them. Shapes: [B, a, H, W] -> [B, b, H / stride, W / stride]."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(a, b, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(b)
        self.conv2 = nn.Conv2d(b, b, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(b)
        around = [nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b)] if (a, stride) != (b, 1) else []
        self.downsample = nn.Sequential(*around)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(h)) + self.downsample(x))


class ResNet(nn.Module):
    """torchvision's ResNet of basic blocks, without its last layer, and with its names of the weights.

    Written down again because importing torchvision takes longer than loading all networks.
    Shapes: [B, 3, H, W] -> [B, 512].
    """

    def __init__(self, blocks: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        widths = (64, 64, 128, 256, 512)
        layers = [
            nn.Sequential(*(Block(b if i else a, b, 1 if i or a == b else 2) for i in range(count)))
            for a, b, count in zip(widths[:-1], widths[1:], blocks, strict=True)
        ]
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return functional.adaptive_avg_pool2d(x, 1).flatten(1)


class AttributeClassifier(nn.Module):
    """Images -> attribute logits, the resolution of the source, and the features all distances are measured in.

    The second task is there because an attribute classifier trained to ignore blur cannot see that a generator blurs.
    """

    log_odds: Tensor
    digest = ""  # of the weights that were loaded
    faster: Callable[[Tensor], Tensor] | None = None  # what computes the trunk, where that was compiled

    def __init__(self, config: AttributeClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = ResNet(config.blocks)
        self.attributes = nn.Linear(512, config.num_attributes)
        self.px = nn.Linear(512, len(config.px_classes))
        # The log-odds of each attribute in the training set are the cut that balances both recalls of a calibrated
        # classifier; a cut at 0 would call hardly anybody bald.
        self.register_buffer("log_odds", torch.zeros(config.num_attributes))

    def forward(self, images: Tensor) -> ClassifierOutput:
        """Shapes: images [B, 3, 128, 128] in [-1, 1]."""
        features = self.trunk(images) if self.faster is None else self.faster(images)  # [B, 512]
        return ClassifierOutput(self.attributes(features), self.px(features), features)


def augment(pictures: Pictures, generator: torch.Generator, shift: int = 4) -> Tensor:
    """Mirror, shift by whole pixels, jitter the colours: [B, S, S, 3] uint8 -> [B, 3, S, S] in [-1, 1].

    Nothing here resamples or blurs, or the features would learn to overlook it.
    """
    count, size = len(pictures), pictures.shape[1]
    padded = np.pad(pictures, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="reflect")
    corners = torch.randint(0, 2 * shift + 1, (count, 2), generator=generator).tolist()
    moved = np.stack([p[y : y + size, x : x + size] for p, (y, x) in zip(padded, corners, strict=True)])
    images = to_images(moved)
    flip = torch.rand(count, generator=generator) < 0.5
    images[flip] = images[flip].flip(-1)
    gain = 1.0 + 0.2 * (torch.rand(count, 3, 1, 1, generator=generator) - 0.5)
    return images * gain + 0.2 * (torch.rand(count, 1, 1, 1, generator=generator) - 0.5)


def train_attribute_classifier(
    store: Pool,
    rows: np.ndarray,
    folder: str | Path,
    *,
    epochs: float = 2.5,
    batch_size: int = 128,
    peak: float = 2e-3,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    run: str | Path | None = None,
    save_every: int = 200,
) -> str:
    """Train the attribute classifier on these rows of the store and freeze it into ``folder``; returns the hash of its
    weights.

    One short run (AdamW, one-cycle learning rate), the same for the same seed and machine. Ctrl-C and SIGTERM save it
    in the folder ``run``, and the same call continues. Where that is None, it lies in ``folder`` until it has ended.
    """
    from types import SimpleNamespace

    from core.training.accelerator import make_accelerator
    from core.training.randomness import EpochSampler, step_generator
    from core.training.run_folder import RunFolder

    if has_attribute_classifier(folder):
        raise ModelFolderError(
            f"{folder} already holds an attribute classifier, and it is frozen; remove that folder to train another"
        )
    if not store.attributes[rows].any():
        raise SettingError(
            "the store has no attribute labels (own captions only); the attribute classifier learns from attributes"
        )
    config = AttributeClassifierConfig()
    labels = torch.from_numpy(np.ascontiguousarray(store.attributes[rows])).float()
    px = torch.from_numpy(np.abs(store.px[rows].astype(int)[:, None] - np.array(config.px_classes)).argmin(1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the ResNet draws its first weights from the global generator, put back on leaving
        classifier = AttributeClassifier(config)
    rate = (labels.sum(0) + 1.0) / (len(rows) + 2.0)
    classifier.log_odds.copy_(torch.log(rate / (1.0 - rate)))
    accelerator = make_accelerator(device, precision)
    target = accelerator.device
    classifier = classifier.to(target).to(memory_format=torch.channels_last).train()
    steps = max(round(epochs * len(rows) / batch_size), 1)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=peak, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps + 1, pct_start=0.2)
    sampler = EpochSampler(len(rows), batch_size, seed)
    digest = hashlib.sha256("\n".join(store.image_id[rows].tolist()).encode() + store.attributes[rows].tobytes())
    settings = {"component": "judge", "seed": seed, "batch_size": batch_size, "peak": peak, "steps": steps,
                "data": digest.hexdigest(), "network": {**asdict(config), "blocks": list(config.blocks),
                                                        "px_classes": list(config.px_classes)}}
    kept = RunFolder(Path(run or Path(folder) / "training"), settings, {"judge": classifier, "optimizer": optimizer},
                     steps,
                     decay_share=0.0)
    first = kept.resume()
    if first:  # the rate is a function of the step alone
        schedule.load_state_dict(schedule.state_dict() | {"last_epoch": first - 1, "_step_count": first + 1})
        schedule.step()
    smooth: dict[str, float] = dict(kept.extra.get("loss", {}))
    whole = SimpleNamespace(stop_at=None, stop_after=None)
    for step, show in kept.steps(first, whole, accelerator, f"judge, {len(rows)} pictures"):
        chosen = sampler.batch(step)
        pictures = store.images[rows[chosen.numpy()]]  # memory-mapped: the page cache holds the uint8 images
        images = augment(pictures, step_generator(seed, step)).to(target, memory_format=torch.channels_last)
        with accelerator.autocast():
            output = classifier(images)
        attribute_loss = functional.binary_cross_entropy_with_logits(output.logits.float(), labels[chosen].to(target))
        px_loss = functional.cross_entropy(output.px_logits.float(), px[chosen].to(target))
        loss = attribute_loss + 0.5 * px_loss
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"the attribute classifier's loss is {float(loss)} at step {step}; lower the peak rate {peak}"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        for name, value in (("attributes", attribute_loss), ("px", px_loss)):
            smooth[name] = 0.95 * smooth.get(name, value.item()) + 0.05 * value.item()
        show(", ".join(f"{name} {value:.3f}" for name, value in smooth.items()))
        if show.last or (step + 1) % save_every == 0:
            kept.save(step + 1, {"loss": smooth})
    kept.finish()
    # the attribute classifier is frozen, so nothing is to continue
    shutil.rmtree(kept.folder / "checkpoints" if run else kept.folder, ignore_errors=True)
    extra = {"epochs": epochs, "seed": seed, "num_train": len(rows), "batch_size": batch_size, "loss": smooth}
    return save_component(folder, "judge", classifier.state_dict(), asdict(config), extra=extra)


def has_attribute_classifier(folder: str | Path) -> bool:
    """Whether a frozen attribute classifier lies in this folder."""
    return (Path(folder) / "judge" / "model.safetensors").exists()


def load_attribute_classifier(folder: str | Path,
                              device: torch.device | str = "cpu") -> tuple[AttributeClassifier, str]:
    """The frozen attribute classifier (eval mode, fp32) and the hash that names it."""
    config, state = load_component(folder, "judge")
    settings = AttributeClassifierConfig(tuple(config["blocks"]), config["num_attributes"], tuple(config["px_classes"]))
    classifier = build(lambda: AttributeClassifier(settings), state, "the attribute classifier")
    classifier = classifier.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    classifier.digest = component_hash(folder, "judge")
    return classifier, classifier.digest


def find_attribute_classifier(folder: str | Path, device: torch.device | str = "cpu") -> AttributeClassifier | None:
    """The attribute classifier in this folder, or None where there is none that can be used: images are generated
    without it too."""
    if not has_attribute_classifier(folder):
        return None
    try:
        return load_attribute_classifier(folder, device)[0]
    except (ModelFolderError, OSError, ValueError, RuntimeError) as error:
        log.warning("the attribute classifier in %s cannot be used, so no image is classified: %s", folder, error)
        return None


@dataclass(frozen=True)
class Features:
    """What the attribute classifier made of N images: features [N, 512], logits and the balancing cut [N, 40], px class
    [N]."""

    features: np.ndarray
    logits: np.ndarray
    verdicts: np.ndarray
    px: np.ndarray

    def __getitem__(self, rows: Any) -> Features:
        return Features(self.features[rows], self.logits[rows], self.verdicts[rows], self.px[rows])

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Prediction:
    """What the attribute classifier predicts for one image: how probable each attribute is, and how far it agrees with
    a prompt.

    `agreement` has the attributes that the prompt states; for it each is taken to be as likely as not before the
    attribute classifier looks, because a prompt that says "bald" has made bald people likely.
    """

    attributes: dict[str, float]
    agreement: dict[str, float]

    @property
    def prompt_alignment(self) -> float | None:
        """Mean agreement; None where the prompt states nothing."""
        return round(sum(self.agreement.values()) / len(self.agreement), 4) if self.agreement else None


def predict(classifier: AttributeClassifier, seen: Features, stated: Sequence[Mapping[str, bool]]) -> list[Prediction]:
    """What the attribute classifier predicts for N images whose prompts state these attributes; in four digits, as
    machines agree on.

    Raises ValueError when the attribute classifier does not know CelebA's attributes.
    """
    if seen.logits.shape[1] != len(ATTRIBUTES):
        raise ValueError(
            f"the attribute classifier knows {seen.logits.shape[1]} attributes; {len(ATTRIBUTES)} are needed"
        )
    logits = torch.from_numpy(seen.logits).double()
    probable, weighed = logits.sigmoid().tolist(), (logits - classifier.log_odds.cpu().double()).sigmoid().tolist()
    found = []
    for row, even, wanted in zip(probable, weighed, stated, strict=True):
        fair = dict(zip(ATTRIBUTES, even, strict=True))
        agreement = {name: round(fair[name] if value else 1 - fair[name], 4) for name, value in wanted.items()}
        found.append(Prediction({name: round(p, 4) for name, p in zip(ATTRIBUTES, row, strict=True)}, agreement))
    return found


def best(found: Sequence[Prediction | None], count: int, places: int = 1) -> list[int]:
    """The positions of the `count` images with the highest prompt alignment, the best first.

    Of `places` places, that image i stands for place i modulo `places`, and one of each place is taken. Images of
    one prompt alignment, and those that nobody could judge, keep their order; so do all when there are no more than
    `count`.
    """
    ranked = list(range(len(found)))
    if len(ranked) > count:
        scores = [-1.0 if one is None or one.prompt_alignment is None else one.prompt_alignment for one in found]
        ranked.sort(key=lambda i: -scores[i])
        if places > 1:
            leaders = {i % places: i for i in reversed(ranked)}
            ranked = [i for i in ranked if leaders[i % places] == i]
    return ranked[:count]


@torch.inference_mode()
def extract_features(classifier: AttributeClassifier, pictures: Pictures, batch: int = 128) -> Features:
    """The attribute classifier's view of uint8 images [N, S, S, 3], in fp32 so that machines agree."""
    device = classifier.log_odds.device
    parts = []
    for start in range(0, len(pictures), batch):
        images = to_images(pictures[start : start + batch])
        output = classifier(images.to(device, memory_format=torch.channels_last))
        found = (output.features, output.logits, output.logits > classifier.log_odds, output.px_logits.argmax(1))
        parts.append([tensor.cpu().numpy() for tensor in found])
    return Features(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def extract_store_features(classifier: AttributeClassifier, digest: str, store: Pool, rows: np.ndarray,
                           cache: Path) -> Features:
    """`extract_features` at rows of the store, kept under ``cache`` by the attribute classifier's hash and the rows'
    identity."""
    key = hashlib.sha256(f"{digest} {store.images.shape}".encode())
    key.update("\n".join(store.image_id[rows].tolist()).encode() + store.images[rows[0]].tobytes())
    path = cache / f"{digest[:12]}-{key.hexdigest()[:16]}.npz"
    try:
        with np.load(path, allow_pickle=False) as kept:
            return Features(kept["features"], kept["logits"], kept["verdicts"], kept["px"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        log.warning("%s is damaged; the images are looked at again", path)
    # Chunks: the rows may be more images than fit in memory.
    parts = [extract_features(classifier, store.images[chunk]) for chunk in np.array_split(rows, -(-len(rows) // 1024))]
    names = ("features", "logits", "verdicts", "px")
    seen = Features(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
    cache.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".writing.npz")
    np.savez(aside, **{name: getattr(seen, name) for name in names})
    aside.replace(path)
    return seen
