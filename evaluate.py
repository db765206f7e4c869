"""How good is it? Every measured number about a trained model: one command, one JSON report, plots.

The judge is an attribute network that no loss ever sees. It is trained once on real pictures, frozen, and named by its
hash in each report; distances in its features are comparable only between reports with one hash. They are not FID.
It hears sharpness first and faces out of shape little, so there is a second distance, `shape`, in the features of the
model's own image tower, which hears no blur and shape better (https://arxiv.org/abs/2401.09603 compares in CLIP's too);
it is comparable only between models with one CLIP.
This file does not know how anything is trained or served: it loads a model folder and looks at what comes out. The
metrics and their papers are in core/evaluation/metrics.py, the judge is in core/evaluation/attribute_classifier.py.

Long because every measurement of the model is a command here; how each is computed stands in core/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from core.command import check_numbers, run_command, run_lock
from core.evaluation import report as reporting
from core.evaluation import slider_response, watermark_robustness
from core.evaluation.attribute_classifier import Seen, has_judge, load_judge, look, look_at_store, train_judge
from core.evaluation.benchmark import SECTIONS
from core.evaluation.metrics import (
    BLURS,
    LADDER,
    NEIGHBOURS,
    balanced_accuracy,
    degrade,
    frechet_distance,
    memorisation,
    polynomial_mmd,
    precision_and_recall,
    prompt_fidelity,
    reconstruction_figures,
    thumbnails,
)
from core.imaging.spectrum import Pictures, fine_detail_share, radial_power
from core.nn.checkpoint import ModelFolderError, read_index, update_index
from core.nn.device import has_bf16, pick_device, pick_dtype
from core.nn.layers import to_images, to_pixels
from core.quiet import keep_quiet
from core.text.attribute_sliders import sliders
from core.text.captions import draw_caption
from core.text.lexicon import ATTRIBUTES
from core.text.prompt_parser import spoken_attributes
from core.training.caption_cache import draw_texts
from core.training.release import check_release

if TYPE_CHECKING:
    from dataset import FaceStore

PLACES = ("model", "data", "judge", "out", "cache", "inception", "replace")  # settings that say where things are
HELD_OUT = ("test", "val")  # splits of people the model never saw
PARTS = ("ladder", "vae", "samples", "crowd", "memorisation", "curve")
HEADLINE = ("Smiling", "Male", "Blond_Hair", "Black_Hair", "Eyeglasses")
# What anybody can see in a 128 px face, two thirds of it rare enough to be ignored by a lazy model.
VISIBLE = (
    *HEADLINE, "Brown_Hair", "Gray_Hair", "Bald", "Bangs", "Wavy_Hair", "Receding_Hairline", "Young", "Wearing_Hat",
    "Mouth_Slightly_Open", "No_Beard", "Goatee", "Mustache", "5_o_Clock_Shadow", "Heavy_Makeup", "Wearing_Lipstick",
)  # fmt: skip
# Facts that people ask for with "no ..." or "without ...": (words, attribute, the value they ask for).
NEGATIONS = (
    ("without glasses", "Eyeglasses", False),
    ("no beard", "No_Beard", True),
    ("not smiling", "Smiling", False),
)
NEGATIONS_AIM = 0.9  # how often they should be obeyed, whatever the judge says of photographs

# ------------------------------------------------------------------------------------------------------- model outputs


def generate_images(
    folder: str | Path, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, **options: Any
) -> Pictures:
    """Faces for prompts, each from its own seed: N prompts -> uint8 [N, 128, 128, 3].

    Options: `sampler` and `begin` (`core.diffusion.schedule.NoiseSchedule`), the model's own where None; `px`,
    `device`, `batch`; `emphasised`: in the words that the model follows (`core.text.prompt_rewriting`); `precision`:
    "fp32", as is served on a CPU, or "bf16" for machines with more pictures than time.
    """
    return np.concatenate(list(_drawn(folder, prompts, seeds, steps, guidance, decode=True, **options)))


def draw_latents(
    folder: str | Path, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, **options: Any
) -> np.ndarray:
    """What `generate_images` decodes: whitened latents, float16 [N, C, h, w]; not `corrected`: as the solver ends."""
    return np.concatenate(list(_drawn(folder, prompts, seeds, steps, guidance, decode=False, **options)))


@torch.inference_mode()
def _drawn(
    folder: str | Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    *,
    decode: bool,
    corrected: bool = True,
    emphasised: bool = True,
    px: int = 128,
    sampler: str | None = None,
    begin: Sequence[float] | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    batch: int = 32,
) -> Iterator[np.ndarray]:
    from tqdm import tqdm

    from core.diffusion.sampling import sample
    from core.diffusion.schedule import schedule_from_config
    from core.diffusion.schedulers import TURBO, make_scheduler
    from core.diffusion.unet import encode_prompts
    from core.engine import usual_sampler
    from generator import FaceGenerator

    engine = FaceGenerator.load(folder, device)
    sampler = sampler or usual_sampler(engine.info, steps)
    config = engine.scheduler_config | ({} if begin is None else {"begin": list(begin)})
    schedule = schedule_from_config(config)
    turbo = sampler == TURBO
    if turbo and engine.turbo is None:
        raise ValueError(f"sampler {sampler!r}: {folder} has no turbo/")
    fast = engine.denoise_fast if turbo else None

    def denoise(x: Tensor, timestep: Tensor, condition: Any) -> Tensor:
        if precision == "fp32":
            return fast(x, timestep, condition) if fast is not None else engine.denoise(x, timestep, condition)
        with torch.autocast(engine.device.type, torch.bfloat16):
            network = engine.turbo if fast is not None else engine.unet
            return network(x, timestep, condition).float()  # the solver's sums stay in fp32

    for start in tqdm(range(0, len(prompts), batch), desc=f"{steps} steps", unit="batch"):
        told = prompts[start : start + batch]
        heard = [engine.info.emphasis(prompt) for prompt in told] if emphasised else told
        condition = encode_prompts(engine.clip, engine.tokenizer, heard, px=float(px))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
        noise = torch.stack([torch.randn(engine.info.latent_shape, generator=g) for g in generators])
        latents = sample(
            denoise, condition, make_scheduler(sampler, config), noise.to(engine.device),
            steps, guidance, schedule=schedule, generators=generators, known=engine.known(turbo),
            correction=engine.correction if corrected else None,
        )  # fmt: skip
        yield to_pixels(engine.draw(latents)) if decode else latents.half().cpu().numpy()


@torch.inference_mode()
def reconstruct(folder: str | Path, pictures: Pictures, device: str = "cpu", batch: int = 32) -> Pictures:
    """Pictures through the VAE and back, by the mean of the posterior. Shapes: uint8 [N, 128, 128, 3] -> the same."""
    from vae import load_vae

    vae = load_vae(folder, device)
    copies = []
    for start in range(0, len(pictures), batch):
        images = to_images(pictures[start : start + batch]).to(device, memory_format=torch.channels_last)
        copies.append(to_pixels(vae.decode(vae.encode(images).mean)))
    return np.concatenate(copies)


@torch.inference_mode()
def shape_features(clip: Any, pictures: Pictures, batch: int = 64) -> np.ndarray:
    """What the image tower sees in pictures: uint8 [N, 128, 128, 3] -> unit vectors [N, D]."""
    device = next(clip.parameters()).device
    return np.concatenate([
        clip.encode_image(to_images(pictures[start : start + batch]).to(device)).float().cpu().numpy()
        for start in range(0, len(pictures), batch)
    ])


# ----------------------------------------------------------------------------------------------------------- the parts


@dataclass(frozen=True)
class Settings:
    """What to measure and how long to spend on it; everything lands in the report."""

    model: str = "models/celeba128"
    data: str = "archive/prepared"
    judge: str = "models/judge"
    out: str = "runs/evaluate"
    cache: str = "runs/judge-cache"
    parts: tuple[str, ...] = PARTS
    split: str = "test"  # the people never seen; "val" for choices, so that "test" can be believed
    samples: int = 1000
    steps: int = 50
    guidance: float | None = None  # None: the model's own
    sampler: str | None = None  # None: the model's own
    begin: tuple[float, float] | None = None  # where the way from noise begins; None: the model's own
    seed: int = 0
    pool: int | None = None  # training pictures searched for copies; None: all sharp ones
    crowd_n: int = 256
    curve_n: int = 256
    curve_steps: tuple[int, ...] = (2, 4, 8, 16, 30, 50, 100, 250, 500)
    inception: str | None = None
    replace: bool = False  # may a fit replace what the model folder has
    device: str = "auto"
    precision: str = "fp32"


FOR_SHARPNESS = Settings(samples=256, steps=20)
FOR_FINISHING = Settings(samples=1536, steps=16)
FOR_CORRECTION = Settings(samples=1024)
FOR_EMPHASIS = Settings(split="val", samples=64, steps=8, out="runs/emphasis")
FOR_SLIDERS = Settings(samples=12, steps=10, out="docs")
QUICK = Settings(samples=256, pool=2048, crowd_n=64, curve_n=64, curve_steps=(2, 8, 30))


@dataclass(frozen=True)
class Prompts:
    """Prompts drawn for held-out pictures: what each asserts (1 yes, 0 no, -1 silent) and which picture it is of."""

    texts: list[str]
    asserted: np.ndarray  # [N, 40] int8
    source: np.ndarray  # [N] positions in the held-out rows


def draw_prompts(attributes: np.ndarray, count: int, seed: int) -> Prompts:
    """One caption a picture, in order and round again. Shapes: attributes [M, 40] bool."""
    rng = random.Random(seed)
    source = np.arange(count) % len(attributes)
    captions = [draw_caption(attributes[row].tolist(), rng) for row in source]
    asserted = np.full((count, len(ATTRIBUTES)), -1, np.int8)
    for place, caption in enumerate(captions):
        for name, value in caption.facts.items():
            asserted[place, ATTRIBUTES.index(name)] = int(value)
    return Prompts([caption.text for caption in captions], asserted, source)


class Evaluation:
    """One evaluation under way: what is measured so far, and the pictures that several parts look at.

    The reference of every distance is the same n sharp training pictures. Held-out real pictures (the floor), their VAE
    copies, their degradations and the generated pictures are all compared with it at that n, so all numbers share one
    bias and their ratios to the floor mean something.
    """

    def __init__(self, settings: Settings, store: FaceStore) -> None:
        from core.nn.device import pick_device
        from generator import model_hash
        from train_clip import load_clip

        model = read_index(settings.model) if set(settings.parts) - {"ladder"} else None
        own = (model or {}).get("defaults", {}).get("guidance_scale", 1.0)
        self.guidance = float(own if settings.guidance is None else settings.guidance)
        self.settings, self.store = replace(settings, guidance=self.guidance), store
        self.out = Path(settings.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.device = str(pick_device(settings.device))
        self.judge, self.digest = load_judge(settings.judge, self.device)
        rng = np.random.default_rng(settings.seed)
        shuffled = {split: rng.permutation(store.select(split, px=128)) for split in ("train", *HELD_OUT)}
        train, unseen = shuffled["train"], shuffled[settings.split]
        if min(len(train), len(unseen)) < 4:
            raise ValueError(f"{settings.data} has {len(train)} sharp training and {len(unseen)} sharp "
                             f"{settings.split} pictures; at least 4 of each are needed")  # fmt: skip
        self.train_rows, self.unseen_rows = train[: settings.pool], unseen
        self.held_rows = np.concatenate([shuffled[split] for split in HELD_OUT])[: len(self.train_rows)]
        self.n = min(settings.samples, len(self.train_rows), len(unseen))
        self.reference, self.held = self.real(self.train_rows[: self.n]), self.real(unseen)
        self.report: dict[str, Any] = {
            "settings": asdict(self.settings), "model": model, "distances": {}, "checks": {}, "seconds": {},
            "model_hash": model and model_hash(settings.model),
            "machine": {"torch": torch.__version__, "device": self.device, "threads": torch.get_num_threads()},
        }  # fmt: skip
        self.curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.prompts = draw_prompts(store.attributes[unseen], settings.samples, settings.seed)
        self.samples: Pictures | None = None
        self.floors: dict[tuple[str, int], float] = {}
        self.clip = None if model is None else load_clip(settings.model, self.device)[0]

    def real(self, rows: np.ndarray) -> Seen:
        return look_at_store(self.judge, self.digest, self.store, rows, Path(self.settings.cache))

    def generate(self, prompts: Sequence[str], steps: int, guidance: float | None = None) -> Pictures:
        """One face a prompt, from consecutive seeds."""
        guidance = self.guidance if guidance is None else guidance
        seeds = range(self.settings.seed, self.settings.seed + len(prompts))
        own = self.settings
        return generate_images(own.model, prompts, seeds, steps, guidance, sampler=own.sampler, begin=own.begin,
                               device=self.device, precision=own.precision)

    def distance(self, seen: Seen, pictures: Pictures, n: int | None = None) -> dict[str, float]:
        """The distances to the reference at n, the Frechet distances over those of held-out real pictures at n, and
        precision and recall by what hears shapes."""
        n = min(len(seen), n or self.n)
        reference, held = self.reference.features[:n], self.held.features[:n]
        found = {"n": n, **self._over_floor("frechet", seen.features[:n], held, reference)}
        if self.clip is not None:
            mine = self.shapes[1][:n] if seen is self.held else shape_features(self.clip, pictures[:n])
            found |= self._over_floor("shape", mine, self.shapes[1][:n], self.shapes[0][:n])
            if n > NEIGHBOURS:
                both = precision_and_recall(mine, self.shapes[0][:n])
                found |= dict(zip(("precision", "recall"), both, strict=True))
        return found | {"mmd": polynomial_mmd(seen.features[:n], reference)}

    def _over_floor(self, name: str, features: np.ndarray, held: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        key = (name, len(reference))
        if key not in self.floors:
            self.floors[key] = max(frechet_distance(held, reference), 1e-9)
        value = frechet_distance(features, reference)
        return {name: value, f"{name}_over_floor": value / self.floors[key]}

    @cached_property
    def shapes(self) -> tuple[np.ndarray, np.ndarray]:
        """What the image tower sees in the reference and in held-out real pictures, n of each."""
        rows = (self.train_rows[: self.n], self.unseen_rows[: self.n])
        reference, held = (shape_features(self.clip, self.store.images[some]) for some in rows)
        return reference, held

    def detail(self, name: str, pictures: Pictures) -> None:
        """Note the radial spectrum and its share above half Nyquist."""
        frequency, power = self.curves[name] = radial_power(pictures)
        spectrum = self.report.setdefault("spectrum", {"n": len(pictures)})
        spectrum[name] = float(power[frequency > 0.5].sum())
        if name != "real":
            spectrum[f"{name}_over_real"] = spectrum[name] / max(spectrum["real"], 1e-12)

    # ------------------------------------------------------------------------------------------------------ the parts

    def part_judge(self) -> None:
        """What the judge and the floor are worth: always measured."""
        truth, seen = self.store.attributes[self.unseen_rows], self.held
        table = {
            name: {
                "accuracy": float(((seen.logits[:, i] > 0) == truth[:, i]).mean()),
                "balanced_accuracy": balanced_accuracy(seen.verdicts[:, i], truth[:, i]),
                "rate": float(truth[:, i].mean()),
            }
            for i, name in enumerate(ATTRIBUTES)
        }
        means = {key: float(np.mean([row[key] for row in table.values()])) for key in ("accuracy", "balanced_accuracy")}
        self.report["judge"] = {"hash": self.digest, "n": len(truth), **means, "attributes": table}
        pictures = self.store.images[self.unseen_rows[: self.n]]
        self.report["distances"]["floor"] = self.distance(self.held, pictures)
        self.detail("real", pictures)

    def part_ladder(self) -> None:
        """Does the distance rise when pictures get worse? If not, it measures nothing."""
        pictures = self.store.images[self.unseen_rows[: self.n]]
        mean_face = self.store.images[self.train_rows[: self.n]].mean(0)
        rungs = {}
        for kind in LADDER:
            worse = degrade(pictures, kind, mean_face=mean_face, seed=self.settings.seed)
            seen = look(self.judge, worse)
            sharp = float((seen.px == len(self.judge.config.px_classes) - 1).mean())
            detail = fine_detail_share(worse)
            rungs[kind] = {**self.distance(seen, worse), "called_sharp": sharp, "fine_detail": detail}
        floor = self.report["distances"]["floor"]["frechet"]
        self.report["ladder"] = {"n": self.n, "floor": floor, "rungs": rungs}
        series = [floor, *(rungs[kind]["frechet"] for kind in BLURS)]
        self.report["checks"] |= {
            "blur_ladder_rises": all(a < b for a, b in zip(series, series[1:], strict=False)),
            "blur_64_at_least_twice_floor": rungs["blur_64"]["frechet"] >= 2.0 * floor,
            "all_rungs_above_floor": all(rung["frechet"] > floor for rung in rungs.values()),
        }

    def part_vae(self) -> None:
        """The ceiling: held-out pictures through the VAE and back."""
        pictures = self.store.images[self.unseen_rows[: self.n]]
        copies = reconstruct(self.settings.model, pictures, self.device)
        self.report["vae"] = {"n": self.n, **reconstruction_figures(pictures, copies)}
        self.report["distances"]["vae"] = self.distance(look(self.judge, copies), copies)
        self.detail("vae", copies)
        reporting.save_pairs(pictures[:16], copies[:16], self.out / "vae.png")

    def part_samples(self) -> None:
        """Distances, detail and prompt fidelity of pictures drawn for held-out captions."""
        settings, prompts = self.settings, self.prompts
        self.samples = self.generate(prompts.texts, settings.steps)
        seen = look(self.judge, self.samples)
        self.report["distances"]["generated"] = self.distance(seen, self.samples)
        self.detail("generated", self.samples[: self.n])
        reporting.mosaic(self.samples[:100], 10).save(self.out / "samples.png")
        real = self.held.verdicts[prompts.source]
        truth = self.store.attributes[self.unseen_rows][prompts.source]
        agreements = prompt_fidelity(prompts.asserted, truth, seen.verdicts, real)
        scores = dict(zip(ATTRIBUTES, agreements, strict=True))
        ratios = [score.ratio for name in VISIBLE if (score := scores[name]) is not None]
        self.report["fidelity"] = {
            "n": len(seen), "headline": list(HEADLINE), "num_visible": len(ratios),
            "mean_visible": float(np.mean(ratios)) if ratios else None,
            "worst_visible": min(ratios, default=None), "attributes": scores,
        }  # fmt: skip
        negations: dict[str, Any] = {}
        for words, name, wanted in NEGATIONS:
            column = ATTRIBUTES.index(name)
            rows = prompts.asserted[:, column] == int(wanted)
            if rows.any():
                obeyed, on_real = (v[rows, column] == wanted for v in (seen.verdicts, real))
                negations[words] = {"n": int(rows.sum()), "obeyed": obeyed.mean(), "on_real": on_real.mean()}
        mean = float(np.mean([entry["obeyed"] for entry in negations.values()])) if negations else None
        self.report["negations"] = {"mean": mean, **negations}
        self.report["prompts"] = prompts.texts[:100]

    def part_crowd(self) -> None:
        """Does the empty prompt draw people as they are in the training set? Rates by the judge's probabilities."""
        count = self.settings.crowd_n
        crowd = self.generate([""] * count, self.settings.steps, guidance=1.0)  # nothing to be guided towards
        ours, theirs = (torch.from_numpy(s.logits).sigmoid().mean(0) for s in (look(self.judge, crowd), self.reference))
        gap = (ours - theirs).tolist()
        worst = int(np.abs(gap).argmax())
        self.report["crowd"] = {
            "n": count, "largest_rate_difference": abs(gap[worst]), "largest_at": ATTRIBUTES[worst],
            "rate_differences": dict(zip(ATTRIBUTES, gap, strict=True)),
        }  # fmt: skip
        reporting.mosaic(crowd[:100], 10).save(self.out / "crowd.png")

    def part_memorisation(self) -> None:
        """Are generated pictures nearer to training pictures than to pictures of people never seen?"""
        if self.samples is None:
            raise ValueError("--parts memorisation needs the part samples in the same run")
        mirrored = self.samples[:, :, ::-1]  # training saw both mirror images
        pools = (self.train_rows, self.held_rows)
        # Every whole picture of the pools at once would not fit in memory; their thumbnails do.
        parts = [np.array_split(rows, -(-len(rows) // 1024)) for rows in pools]
        small = [np.concatenate([thumbnails(self.store.images[p]) for p in pool]) for pool in parts]
        both = (self.samples, mirrored)
        spaces: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {
            "features": ([look(self.judge, view).features for view in both], [self.real(r).features for r in pools]),
            "pixels": ([thumbnails(view) for view in both], small),
        }
        self.report["memorisation"] = {"n": len(self.samples)}
        for name, (views, (train, held)) in spaces.items():
            found = memorisation(views, train, held)
            lowest = found.ratios.min(0)
            closest = lowest.argsort()[:12]
            self.report["memorisation"][name] = {
                "pool": len(held), "pools": len(found.ratios),
                "ratio_percentiles": {str(q): np.percentile(found.ratios, q) for q in (1, 5, 50)},
                "chance_percentiles": {str(q): np.percentile(found.chance, q) for q in (1, 5, 50)},
                "share_below_half": (lowest < 0.5).mean(),
                "closest": [
                    {"sample": i, "image_id": str(self.store.image_id[self.train_rows[found.index[i]]]),
                     "ratio": lowest[i]} for i in closest.tolist()
                ],
            }  # fmt: skip
            theirs = self.store.images[self.train_rows[found.index[closest]]]
            reporting.save_pairs(self.samples[closest], theirs, self.out / f"closest_{name}.png")

    def part_curve(self) -> None:
        """What do more steps buy?"""
        n = min(self.settings.curve_n, self.n)
        points = []
        for steps in self.settings.curve_steps:
            started = time.perf_counter()
            if self.samples is not None and steps == self.settings.steps:
                pictures, taken = self.samples[:n], None
            else:
                pictures = self.generate(self.prompts.texts[:n], steps)
                taken = (time.perf_counter() - started) / n
            detail = fine_detail_share(pictures) / max(self.report["spectrum"]["real"], 1e-12)
            measured = self.distance(look(self.judge, pictures), pictures, n)
            points.append({"steps": steps, **measured, "fine_detail_over_real": detail, "image_s": taken})
        self.report["curve"] = {"n": n, "floor": self.distance(self.held, self.store.images[self.unseen_rows[:n]], n),
                                "points": points}

    def part_fid(self) -> None:
        """True FID by a network the user brings (TorchScript, uint8 [B, 3, H, W] -> the 2048 pooled features)."""
        if self.samples is None:
            raise ValueError("--inception needs the part samples in the same run")
        with warnings.catch_warnings():
            # torch would rather have torch.export, but the Inception files that people have are TorchScript
            warnings.simplefilter("ignore", FutureWarning)
            network = torch.jit.load(self.settings.inception, map_location=self.device).eval()

        @torch.inference_mode()
        def features(pictures: Pictures) -> np.ndarray:
            batches = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).split(64)
            found = torch.cat([network(batch.to(self.device)).float().cpu() for batch in batches])
            if found.ndim != 2 or found.shape[1] != 2048:
                raise ValueError(f"--inception gave {tuple(found.shape)}; FID needs its 2048 pooled features a picture")
            return found.numpy()

        real, held = (features(self.store.images[rows[: self.n]]) for rows in (self.train_rows, self.unseen_rows))
        generated = frechet_distance(features(self.samples[: self.n]), real)
        self.report["fid"] = {"n": self.n, "generated": generated, "floor": frechet_distance(held, real)}

    def run(self) -> dict[str, Any]:
        """Measure the parts asked for and write the report."""
        wanted = ["judge", *(part for part in PARTS if part in self.settings.parts)]
        for part in [*wanted, *(["fid"] if self.settings.inception else [])]:
            print(f"{part} ...", flush=True)
            started = time.perf_counter()
            getattr(self, f"part_{part}")()
            self.report["seconds"][part] = time.perf_counter() - started
        return reporting.write(self.report, self.curves, self.out)


# ------------------------------------------------------------------------------------------------------ the watermark


def measure_watermark(settings: Settings) -> dict[str, Any]:
    """What the invisible mark survives on test pictures and on their copies by the VAE, which are as smooth as drawn
    ones; and how often it is seen in real pictures without it: sharp ones (`pool` of the training pictures), and soft
    ones, a quarter as many.

    Writes ``watermark.json`` and ``watermark.md`` into the folder of the report.
    """
    from tqdm import tqdm

    from core.nn.device import pick_device
    from dataset import FaceStore

    store = FaceStore.open(settings.data)
    rng = np.random.default_rng(settings.seed)
    train = rng.permutation(store.select("train", px=128))
    soft = rng.permutation(np.setdiff1d(store.select("train"), train))
    sharp = np.concatenate([store.select("test", px=128), store.select("val", px=128), train[: settings.pool]])
    chosen = rng.permutation(store.select("test", px=128))[: settings.samples]
    pictures = store.images[chosen]
    copies = reconstruct(settings.model, pictures, str(pick_device(settings.device)))
    report: dict[str, Any] = {"marked": {"photographs": watermark_robustness.endure(pictures, seed=settings.seed),
                                         "decoded": watermark_robustness.endure(copies, seed=settings.seed)}}
    crowds = {"sharp photographs": sharp, "soft photographs": soft[: len(sharp) // 4]}
    report["unmarked"] = {
        name: watermark_robustness.stumble(store.images[row] for row in tqdm(rows, desc=name))
        for name, rows in crowds.items()
    }
    report["unmarked"]["decoded"] = watermark_robustness.stumble(copies)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "watermark.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    told = f"{watermark_robustness.table(report['marked'])}\n\n{watermark_robustness.strangers(report['unmarked'])}\n"
    (out / "watermark.md").write_text(told, encoding="utf-8")
    print(told)
    return report


# ------------------------------------------------------------------------------------------- nearest training pictures


def build_nearest(settings: Settings) -> dict[str, Any]:
    """Build the index of the training pictures that the server compares finished ones with, into the model folder.

    Of all training pictures; calibrated on the val pictures and checked on the test pictures, whose people it has not
    seen, and on copies of training pictures by the VAE, as they are and mirrored, which it must find. Writes
    ``nearest.json`` into the folder of the report.
    """
    from core.evaluation import memorization_index
    from core.nn.device import pick_device
    from dataset import FaceStore

    check_release(settings.model, "nearest", replace=settings.replace)
    store = FaceStore.open(settings.data)
    rng = np.random.default_rng(settings.seed)
    train = store.select("train")
    parts = [
        memorization_index.thumbnails(store.images[chunk]) for chunk in np.array_split(train, -(-len(train) // 1024))
    ]
    held = {split: store.images[store.select(split, px=128)] for split in ("val", "test")}
    index = memorization_index.build(np.concatenate(parts), memorization_index.views(held["val"]))
    chosen = np.sort(rng.permutation(len(train))[: settings.samples])
    copies = reconstruct(settings.model, store.images[train[chosen]], str(pick_device(settings.device)))
    copied, which = index.search(memorization_index.views(np.ascontiguousarray(copies[:, :, ::-1])))
    drawn = {name: float(np.mean([one.too_close for one in index.nearest(pictures)]))
             for name, pictures in (("copies", copies), ("unseen", held["test"]))}
    report = {
        "n": len(train), "bytes": index.codes.nbytes, "too_close_below": index.threshold,
        "copies": {"n": len(chosen), "called_too_close": drawn["copies"],
                   "mirrored_called_too_close": float((copied < index.threshold).mean()),
                   "mirrored_and_the_right_one": float((which == chosen).mean())},
        "unseen": {"n": len(held["test"]), "called_too_close": drawn["unseen"]},
    }
    memorization_index.save(index, settings.model, measured=report)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "nearest.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))
    return report


# ------------------------------------------------------------------------------------------------ fits to what is drawn


def training_captions(settings: Settings) -> tuple[FaceStore, np.ndarray, list[str], float]:
    """What the fits below draw: the store, its sharp training rows in random order, captions of the first `samples` of
    them, and the guidance scale, the model's own unless told."""
    from dataset import FaceStore

    store = FaceStore.open(settings.data)
    rows = np.random.default_rng(settings.seed).permutation(store.select("train", px=128))
    count = min(settings.samples, len(rows))
    if store.text_labels is None:
        texts = draw_prompts(store.attributes[rows[:count]], count, settings.seed).texts
    else:
        texts = draw_texts(store, rows[:count], 1, settings.seed, 0.0)[0]
    own = read_index(settings.model)["defaults"]["guidance_scale"]
    return store, rows, texts, float(own if settings.guidance is None else settings.guidance)


def fit_sharpness(settings: Settings) -> dict[str, float]:
    """Fit the filter at the end of the decoder to pictures that this model draws, and release the VAE with it.

    `samples` pictures are drawn without a filter for captions of as many sharp training pictures, whose radial spectrum
    they are given. Training fits it to copies instead, which are sharper than what is drawn. Returns the share of the
    power above half Nyquist over that of the training pictures, without and with the filter.
    """
    from core.nn.checkpoint import load_component
    from core.nn.sharpening import fit_kernel
    from vae import load_vae, release, with_kernel

    check_release(settings.model, "vae", replace=settings.replace)
    store, rows, prompts, guidance = training_captions(settings)
    rows = rows[: len(prompts)]
    config, _ = load_component(settings.model, "vae")
    vae = load_vae(settings.model)
    with tempfile.TemporaryDirectory() as aside:  # a run that ends early leaves the model as it was
        soft_model = shutil.copytree(settings.model, Path(aside) / "model")
        release(with_kernel(vae, None), soft_model, config.get("training", {}))
        drawn = generate_images(str(soft_model), prompts, range(len(rows)), settings.steps, guidance,
                                sampler=settings.sampler, begin=settings.begin, device=settings.device,
                                precision=settings.precision)
    real = store.images[np.sort(rows)]
    sharp = with_kernel(vae, fit_kernel(drawn, real))
    with torch.inference_mode():
        filtered = to_pixels(sharp.decoder.sharpen(to_images(drawn)))
    found = {name: fine_detail_share(pictures) / fine_detail_share(real)
             for name, pictures in (("fine_detail_before", drawn), ("fine_detail_after", filtered))}
    release(sharp, Path(settings.model), config.get("training", {}))
    print(json.dumps({"n": len(rows), "steps": settings.steps, "guidance": guidance, **found}, indent=2))
    return found


def measure_correction(settings: Settings, counts: Sequence[int]) -> dict[str, Any]:
    """Measure what these numbers of steps get wrong in all pictures alike, and release what mends it with the model.

    `samples` latents each are drawn for captions of as many sharp training pictures, whose own latents (up to 2,048)
    they are compared with, without guidance (scale 1), with it, and with twice as much.
    """
    from core.diffusion.latent_correction import fit_correction, save_correction
    from core.nn.layers import to_images
    from vae import load_vae

    check_release(settings.model, "correction", replace=settings.replace)
    store, rows, texts, guidance = training_captions(settings)
    drawn: dict[float, dict[int, Tensor]] = {}
    for scale, count in itertools.product(sorted({1.0, guidance, 2 * guidance}), sorted(set(counts))):
        seeds = range(settings.seed, settings.seed + len(texts))
        latents = draw_latents(settings.model, texts, seeds, count, scale, corrected=False,
                               begin=settings.begin, device=settings.device, precision=settings.precision)
        drawn.setdefault(scale, {})[count] = torch.from_numpy(latents)
    vae, generator = load_vae(settings.model), torch.Generator().manual_seed(settings.seed)
    with torch.inference_mode():
        posteriors = (vae.encode(to_images(torch.from_numpy(store.images[np.sort(chunk)])))
                      for chunk in np.array_split(rows[:2048], -(-len(rows[:2048]) // 64)))
        photographs = torch.cat([vae.whiten(posterior.sample(generator)) for posterior in posteriors])
    correction = fit_correction(drawn, photographs)
    save_correction(correction, settings.model)
    figures: dict[str, dict[int, dict[str, float]]] = {}
    for scale, count in itertools.product(correction.scales, correction.steps):
        transport, shift = correction.at(count, scale)
        figures.setdefault(f"{scale:g}", {})[count] = {
            "spread": float(drawn[scale][count].float().var(0).mean().sqrt()),
            "strongest": float(torch.linalg.svdvals(transport).max()),
            "shift_rms": float(shift.square().mean().sqrt()),
        }
    report = {"n": len(texts), "guidance_scales": figures}
    print(json.dumps(report, indent=2))
    return report


def fit_emphasis(settings: Settings) -> dict[str, Any]:
    """Measure in which words the model follows descriptions better, on people it never saw, and release the table.

    `samples` captions of held-out pictures (`split`) each for every fact and every change of words that may serve it,
    out of 32 times as many.
    """
    from core.evaluation.prompt_rewrite_search import Trial, chosen, outcome, trials
    from core.nn.device import pick_device
    from core.nn.rewriting_rules import save_emphasis
    from dataset import FaceStore

    check_release(settings.model, "emphasis", replace=settings.replace)
    store = FaceStore.open(settings.data)
    need_attributes(store)
    judge, _ = load_judge(settings.judge, pick_device(settings.device))
    rows = np.random.default_rng(settings.seed).permutation(store.select(settings.split, px=128))
    prompts = draw_prompts(store.attributes[rows], 32 * settings.samples, settings.seed)
    stated = [{name: bool(say) for name, say in zip(ATTRIBUTES, says, strict=True) if say >= 0}
              for says in prompts.asserted]
    own = read_index(settings.model)["defaults"]["guidance_scale"]

    def verdicts(places: Sequence[int], texts: Sequence[str]) -> dict[int, Any]:
        drawn = generate_images(settings.model, texts, [settings.seed + place for place in places], settings.steps,
                                float(own if settings.guidance is None else settings.guidance), emphasised=False,
                                device=settings.device, precision=settings.precision)
        return dict(zip(places, look(judge, drawn).verdicts, strict=True))

    shares = store.attributes[store.select("train")].mean(axis=0)
    found = trials(stated, prompts.texts, dict(zip(ATTRIBUTES, map(float, shares), strict=True)), settings.samples)
    everybody = sorted({place for trial in found for place in trial.places})
    plain = verdicts(everybody, [prompts.texts[place] for place in everybody])
    real = dict(zip(everybody, look(judge, store.images[rows[prompts.source[everybody]]]).verdicts, strict=True))
    asked = {(name, value): NEGATIONS_AIM for _, name, value in NEGATIONS}

    def shows(seen: Mapping[int, Any], trial: Trial) -> list[bool]:
        name, value = trial.fact
        return [bool(seen[place][ATTRIBUTES.index(name)]) == value for place in trial.places]

    outcomes = []
    for trial in found:
        wanted = max(float(np.mean(shows(real, trial))), asked.get(trial.fact, 0.0))
        if np.mean(shows(plain, trial)) < wanted:  # nothing is said in other words that is followed as it is
            changed = verdicts(trial.places, [trial.emphasis(prompts.texts[place]) for place in trial.places])
            outcomes.append(outcome(trial, wanted, shows(plain, trial), shows(changed, trial)))
    emphasis = chosen(outcomes)
    save_emphasis(emphasis, settings.model)
    report = {"steps": settings.steps, "tried": [
        {"fact": f"{'' if one.trial.fact[1] else 'not '}{one.trial.fact[0]}", "words": one.trial.words,
         "n": len(one.trial.places), "wanted": one.wanted, "plain": one.plain, "changed": one.changed,
         "error": one.error, "kept": one.worth} for one in outcomes],
        "left_out": list(emphasis.left_out), "said_again": dict(emphasis.said_again)}
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "emphasis.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    return report


def draw_for_finishing(settings: Settings, path: Path) -> None:
    """Write whitened latents [N, C, h, w] that this model draws, for captions of N sharp training pictures, as a .npy.

    `vae.py --finish` learns from them. Fewer than N where there are fewer pictures.
    """
    _, _, texts, guidance = training_captions(settings)
    latents = draw_latents(settings.model, texts, range(settings.seed, settings.seed + len(texts)), settings.steps,
                           guidance, sampler=settings.sampler, begin=settings.begin, device=settings.device,
                           precision=settings.precision)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, latents)
    print(f"{len(latents)} latents in {path}")


# -------------------------------------------------------------------------------------------------------- the sliders


def measure_sliders(settings: Settings, names: Sequence[str], record: bool = False) -> dict[str, Any]:
    """The response, the entanglement and the cost in identity of sliders, on the same people at five positions.

    Writes ``sliders.json``, ``sliders.md`` and the picture ``sliders.png`` into the folder of the report. ``record``
    keeps the figures in the model folder, from where the page shows them beside each slider.
    """
    from tqdm import tqdm

    from core.engine import DrawRequest
    from generator import FaceGenerator

    spoken = spoken_attributes(captions_words(settings.model))
    if not (names := [name for name in names if name in spoken]):
        raise ModelFolderError(f"{settings.model} was trained on captions that have no words for these sliders")
    faces = FaceGenerator.load(settings.model, settings.device, precision=settings.precision)
    judge, digest = load_judge(settings.judge, faces.device)
    each = -(-settings.samples // len(slider_response.PROMPTS))
    progress = tqdm(total=1 + 4 * len(names), desc="sliders", unit="position")

    def look_at(attributes: Mapping[str, float]) -> Seen:
        runs = [
            faces.begin(DrawRequest(prompt, each, settings.steps, settings.seed, settings.guidance, watermark=False,
                                    attributes=attributes))
            for prompt in slider_response.PROMPTS
        ]
        while any(not run.finished for run in runs):
            faces.step(runs)
        progress.update()
        return look(judge, np.stack([picture.pixels for run in runs for picture in faces.pictures(run)]))

    found = slider_response.measure(look_at, names, each, judge.log_odds.cpu().numpy())
    progress.close()
    report: dict[str, Any] = reporting.plain({
        "model_hash": faces.info.model_hash, "judge_hash": digest, "people": each * len(slider_response.PROMPTS),
        "steps": settings.steps, "precision": settings.precision, "positions": slider_response.POSITIONS,
        "summary": slider_response.summary(found), "sliders": {name: one.to_dict() for name, one in found.items()},
    })
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "sliders.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "sliders.md").write_text(slider_response.page(found, report), encoding="utf-8")
    rows = [
        faces.generate(prompt, num_inference_steps=25, seed=settings.seed, attributes={name: x}, watermark=False)[0]
        for name, prompt in slider_response.STRIP.items() for x in slider_response.POSITIONS
    ]
    reporting.mosaic(np.stack([one.pixels for one in rows]), len(slider_response.POSITIONS)).save(out / "sliders.png")
    print(slider_response.page(found, report))
    if record:
        update_index(settings.model, sliders={key: report[key] for key in ("model_hash", "positions", "sliders")})
    return report


def captions_words(model: str | Path) -> Mapping[str, str]:
    """The vocabulary of the captions that a model was trained on; empty where its folder does not say."""
    path = Path(model) / "vocabulary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# -------------------------------------------------------------------------------------------------------- command line


def evaluate(settings: Settings) -> dict[str, Any]:
    """Measure one model folder; trains the judge first when there is none. Returns the report as written."""
    from dataset import FaceStore

    store = FaceStore.open(settings.data)
    need_attributes(store)
    if not has_judge(settings.judge):
        train_judge(store, store.select("train"), settings.judge, device=settings.device)
    return Evaluation(settings, store).run()


def need_attributes(store: FaceStore) -> None:
    """Raises DataError for pictures with a person's own captions: every figure here is about attributes, and against
    attributes that are all stored as false each of them would be a number without meaning."""
    from dataset import DataError

    if store.text_labels is not None:
        raise DataError(f"{store.folder} has its user's own captions and no attributes, which this measures; measure "
                        "with `train_clip.py --eval` and `vae.py --eval`")


def kept_figures(report: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What a model folder keeps of a report: beside what was measured before, if that was of these weights and by this
    judge, so that the parts may be measured one after the other."""
    whose = {path: reporting.lookup(report, path) for path in ("model_hash", "judge.hash")}
    found = dict(before) if whose.items() <= before.items() else dict(whose)
    report = {**report, "settings": {name: value for name, value in report["settings"].items() if name not in PLACES}}
    of_parts = {"samples": ("settings", "distances", "fidelity", "negations", "spectrum"), "vae": ("vae",),
                "crowd": ("crowd",), "memorisation": ("memorisation",), "curve": ("curve",)}
    for part in report["settings"]["parts"]:
        found |= {name: report[name] for name in of_parts.get(part, ())}
    return found


def measure_speed(settings: Settings, only: str, steps: int, repeats: int, record: bool) -> int:
    """How fast is it beside diffusers' own parts, as a server, and by each engine? 1 when a promise is not kept."""
    import sys

    from core.evaluation import benchmark
    from core.evaluation import benchmark_tables as figures
    from generator import FaceGenerator

    root = Path(__file__).resolve().parent
    serve = [sys.executable, str(root / "api.py"), "--device", "cpu", "--model", str(Path(settings.model).resolve())]
    waiting = f", OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}" if "OMP_WAIT_POLICY" in os.environ else ""
    circumstances = figures.machine(f"torch {torch.__version__}, {torch.get_num_threads()} threads{waiting}")
    section_asked = "" if only == "all" else f" {only}"
    command = f"python evaluate.py --bench{section_asked} --bench-steps {steps} --repeats {repeats} --record"
    kept = True
    for section in benchmark.run(
        lambda engine, precision: FaceGenerator.load(settings.model, "cpu", precision=precision, engine=engine),
        serve, steps, repeats, only,
    ):  # fmt: skip
        print(f"\n## {section.name}\n\n{section.text()}", flush=True)
        kept = kept and section.kept
        if record:
            figures.record(root / "docs" / "benchmarks.md", section, circumstances, command)
    return 0 if kept else 1


def draw_as_users_do(folder: str, texts: Sequence[str], steps: int, seed: int, at_once: int = 8) -> Pictures:
    """A face a text, the i-th from `seed + i`, by the generator with all its own settings, watermark and all, as it is
    served; uint8 [N, 128, 128, 3]."""
    import io

    from PIL import Image

    from core.engine import DrawRequest
    from generator import FaceGenerator

    engine, drawn = FaceGenerator.load(folder, "cpu"), []
    for start in range(0, len(texts), at_once):
        runs = [engine.begin(DrawRequest(text, 1, steps, seed + start + i))
                for i, text in enumerate(texts[start : start + at_once])]  # fmt: skip
        while waiting := [run for run in runs if not run.finished]:
            engine.step(waiting)
        for run in runs:
            drawn += [np.asarray(Image.open(io.BytesIO(one.png)).convert("RGB")) for one in engine.pictures(run)]
    return np.stack(drawn)


def outside(arguments: Sequence[str]) -> int:
    """`python evaluate.py outside`: the judge from outside (core/evaluation/outside_judge.py) on photographs, their
    copies by the VAE and pictures drawn for their captions, side by side."""
    from core.evaluation import outside_judge, outside_setup
    from core.process import Problem
    from dataset import FaceStore
    from generator import model_hash

    parser, options = outside_judge.parse(arguments)
    try:
        if options.setup:
            outside_setup.set_up()
            print("the judge from outside is installed")
            return 0
        outside_setup.need()
        store = FaceStore.open(options.data)
        shuffle = np.random.default_rng(options.seed).permutation
        rows = shuffle(store.select(options.split, px=128))[: options.n]
        if len(rows) < 2:
            raise ValueError(f"{options.data} has {len(rows)} sharp {options.split} pictures; 2 are needed")
        sets: dict[str, Pictures] = {"photographs": np.asarray(store.images[rows])}
        if options.pictures:
            names = outside_judge.names_of(options.pictures)
            sets |= zip(names, map(outside_judge.read_pictures, options.pictures), strict=True)
        else:
            texts = draw_prompts(store.attributes[rows], len(rows), options.seed).texts
            sets["photographs through this VAE"] = reconstruct(options.model, sets["photographs"])
            for steps in options.steps:
                sets[f"drawn, {steps} steps"] = draw_as_users_do(options.model, texts, steps, options.seed)
        pool = np.sort(shuffle(store.select("train", px=128))[: options.pool])
        found = outside_judge.judge(sets, Path(options.cache), np.asarray(store.images[pool]) if len(pool) else None)
    except (Problem, ValueError, OSError) as error:
        parser.error(str(error))
    whose = None if options.pictures else model_hash(options.model)
    print(outside_judge.write(found, vars(options) | {"model_hash": whose}, Path(options.out)))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see ``python evaluate.py --help`` and ``python evaluate.py outside --help``."""
    keep_quiet()
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "outside":
        return outside(arguments[1:])
    base = Settings()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", help=f"model folder (default {base.model})")
    parser.add_argument("--data", help=f"prepared store, see dataset.py --prepare (default {base.data})")
    parser.add_argument("--judge", help=f"folder of the frozen judge (default {base.judge})")
    parser.add_argument("--out", help=f"where report.json, table.md and the pictures go (default {base.out})")
    parser.add_argument("--cache", help=f"the judge's view of real pictures, kept (default {base.cache})")
    parser.add_argument("--parts", help=f"comma-separated choice of {','.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer pictures and steps: minutes on two cores")
    parser.add_argument("--split", choices=HELD_OUT, help=f"held-out people; val for choices (default {base.split})")
    parser.add_argument("--samples", type=int, help=f"pictures drawn from held-out captions (default {base.samples})")
    parser.add_argument("--steps", type=int, help=f"denoising steps (default {base.steps})")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 = off (default: the model's own)")
    parser.add_argument("--sampler", help="as at /options (default: the model's own)")
    parser.add_argument("--begin", type=float, nargs=2, metavar=("A", "B"),
                        help="n steps begin at timestep A - B / (n + 2) of 1000 (default: the model's own)")
    parser.add_argument("--seed", type=int, help=f"of prompts, noise and choices (default {base.seed})")
    parser.add_argument("--pool", type=int, help="training pictures searched for copies or marks (default: all sharp)")
    parser.add_argument("--crowd-n", type=int, help=f"pictures for the empty prompt (default {base.crowd_n})")
    parser.add_argument("--curve-n", type=int, help=f"pictures a point of the step curve (default {base.curve_n})")
    parser.add_argument("--curve-steps", help="comma-separated step counts of the curve")
    parser.add_argument("--inception", help="TorchScript file of the Inception features, for true FID")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--precision", choices=("fp32", "bf16"), help=f"of the UNet (default {base.precision})")
    parser.add_argument("--replace", action="store_true", default=None, help="a fit may replace what --model has")
    parser.add_argument("--compare", help="an earlier report.json: print what changed")
    parser.add_argument("--record", action="store_true", help="keep the figures in the model folder's index")
    parser.add_argument("--watermark", action="store_true", help="measure the invisible watermark, then stop")
    parser.add_argument("--bench", nargs="?", const="all", choices=("all", *SECTIONS), metavar="SECTION",
                        help=f"measure speed, or one of {', '.join(SECTIONS)}, then stop")
    parser.add_argument("--bench-steps", type=int, default=500, help="of the long comparison (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of each comparison of --bench (default %(default)s)")
    parser.add_argument("--build-nearest", action="store_true", help="index the training pictures, then stop")
    parser.add_argument("--fit-sharpness", action="store_true", help="fit the decoder's last filter to pictures drawn "
                        f"for training captions (default: {FOR_SHARPNESS.samples}, {FOR_SHARPNESS.steps} steps), "
                        "then stop")
    parser.add_argument("--fit-correction", nargs="?", const="2,4,8,16,50", metavar="STEPS",
                        help="measure what so many steps get wrong in all pictures alike, release what mends it, "
                        f"then stop (default: %(const)s; {FOR_CORRECTION.samples} pictures each)")
    parser.add_argument("--fit-emphasis", action="store_true", help="measure in which words descriptions are followed "
                        f"better, {FOR_EMPHASIS.samples} of each kind, release the table, then stop")
    parser.add_argument("--draw-latents", type=Path, metavar="FILE", help="draw latents for training captions, for "
                        f"vae.py --finish (default: {FOR_FINISHING.samples}, {FOR_FINISHING.steps} steps), then stop")
    parser.add_argument("--sliders", nargs="?", const=",".join(sliders()), metavar="NAMES",
                        help="measure all attribute sliders, or these (Smiling,Young), then stop (defaults: "
                        f"{FOR_SLIDERS.samples} people, "
                        f"{FOR_SLIDERS.steps} steps, into {FOR_SLIDERS.out}/)")
    parser.add_argument("--train-judge", action="store_true", help="train and freeze the judge, then stop")
    parser.add_argument("--epochs", type=float, default=2.5, help="the judge's passes over the training pictures")
    parser.add_argument("--batch-size", type=int, default=128, help="the judge's batch")
    parser.add_argument("--run", "--run-folder", default="runs/judge",
                        help="folder of the judge's training; the same command resumes from it")
    options = parser.parse_args(arguments)
    check_numbers(parser, options)
    given: dict[str, Any] = {
        item.name: getattr(options, item.name) for item in fields(Settings) if getattr(options, item.name) is not None
    }
    try:
        if options.parts is not None:
            given["parts"] = tuple(part for part in options.parts.split(",") if part)
            if unknown := set(given["parts"]) - set(PARTS):
                raise ValueError(f"--parts {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
        if options.curve_steps is not None:
            given["curve_steps"] = tuple(int(steps) for steps in options.curve_steps.split(","))
        counts = [int(count) for count in options.fit_correction.split(",")] if options.fit_correction else []
        names = options.sliders.split(",") if options.sliders else []
        if unknown := set(names) - set(sliders()):
            raise ValueError(f"--sliders {', '.join(sorted(unknown))}: choose from {', '.join(sliders())}")
        settings = replace(FOR_SLIDERS if options.sliders else FOR_SHARPNESS if options.fit_sharpness
                           else FOR_EMPHASIS if options.fit_emphasis
                           else FOR_FINISHING if options.draw_latents else FOR_CORRECTION if options.fit_correction
                           else QUICK if options.quick else base, **given)
        if min(settings.samples, settings.crowd_n, settings.curve_n) < 2:
            raise ValueError("--samples, --crowd-n and --curve-n must be at least 2")
        if options.record and settings.split != base.split:
            raise ValueError(f"--record keeps figures of {base.split}; --split {settings.split} is for choices")
        if options.fit_emphasis and settings.split == base.split:
            raise ValueError(f"--fit-emphasis is a choice: --split {settings.split} would spoil the report")
        for flag in ("fit_sharpness", "fit_emphasis", "fit_correction", "build_nearest"):
            if getattr(options, flag) and options.model is None:
                raise ValueError(f"--{flag.replace('_', '-')} changes a trained model: say which, with --model FOLDER")
        device = pick_device(settings.device)
        if options.sliders:
            pick_dtype(settings.precision, device)  # the generator itself draws them, and it does not imitate
    except ValueError as error:
        parser.error(str(error))
    if settings.precision == "bf16" and not has_bf16(device):
        print(f"--precision bf16: this {device.type} has no bfloat16 and only imitates it, many times slower than fp32",
              file=sys.stderr)
    if options.bench:
        steps, repeats = max(2, options.bench_steps), max(1, options.repeats)
        return measure_speed(settings, options.bench, steps, repeats, options.record)
    if options.sliders:
        measure_sliders(settings, names, record=options.record)
        return 0
    if options.watermark:
        measure_watermark(settings)
        return 0
    if options.fit_emphasis:
        fit_emphasis(settings)
        return 0
    if options.fit_sharpness:
        try:
            fit_sharpness(settings)
        except ValueError as error:  # a decoder that has been finished
            parser.error(str(error))
        return 0
    if counts:
        measure_correction(settings, counts)
        return 0
    if options.draw_latents:
        draw_for_finishing(settings, options.draw_latents)
        return 0
    if options.build_nearest:
        build_nearest(settings)
        return 0
    if options.train_judge:
        from dataset import FaceStore

        store = FaceStore.open(settings.data)
        with run_lock(options.run):
            train_judge(
                store, store.select("train"), settings.judge, epochs=options.epochs, batch_size=options.batch_size,
                seed=settings.seed, device=settings.device, run=options.run,
            )  # fmt: skip
        return 0
    report = evaluate(settings)
    if options.record:
        update_index(settings.model, metrics=kept_figures(report, read_index(settings.model).get("metrics", {})))
    if options.compare:
        print("\n".join(reporting.compare(json.loads(Path(options.compare).read_text()), report)))
    print(reporting.table(report))
    print(reporting.verdict(report))
    print(f"everything: {Path(settings.out) / 'report.json'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
