"""Which parts make the report about a trained model, and what does each measure?

One `Evaluation` measures one loaded model on people that no training saw; `core/evaluation/report.py` writes down what
it found. The attribute classifier ("judge") is a network that no loss ever sees: trained once on real images, frozen,
and named by its hash in each report. Distances in its features are comparable only between reports with one hash. They
are not FID. It responds to sharpness first and to misshapen faces little, so there is a second distance, `shape`, in
the features of the model's own image encoder, which ignores blur and responds to shape more
(https://arxiv.org/abs/2401.09603 compares in CLIP's, too); it is comparable only between models with one CLIP.

It does not know how anything is trained, loaded or served: it is given a generator and a store of real images.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from core.evaluation import report as reporting
from core.evaluation.attribute_classifier import (
    Features,
    extract_features,
    extract_store_features,
    load_attribute_classifier,
)
from core.evaluation.generation import Generator, Sampling, generate_images, image_features, reconstruct
from core.evaluation.metrics import (
    BLURS,
    LADDER,
    NEIGHBOURS,
    balanced_accuracy,
    degrade,
    frechet_distance,
    inception_features,
    memorisation,
    polynomial_mmd,
    precision_and_recall,
    prompt_fidelity,
    reconstruction_figures,
    thumbnails,
)
from core.evaluation.prompts import HEADLINE, NEGATIONS, VISIBLE, draw_prompts
from core.evaluation.sample_grids import image_grid, save_pairs
from core.imaging.spectrum import Pictures, fine_detail_share, radial_power
from core.nn.checkpoint import read_index
from core.nn.device import pick_device
from core.text.lexicon import ATTRIBUTES

if TYPE_CHECKING:
    from dataset import FaceStore

PLACES = ("model", "data", "judge", "out", "cache", "inception")  # settings that say where things are
HELD_OUT = ("test", "val")  # splits of people the model never saw
PARTS = ("ladder", "vae", "samples", "crowd", "memorisation", "curve")


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
    begin: tuple[float, float] | None = None  # of the noise schedule the model was loaded with; None: its own
    seed: int = 0
    pool: int | None = None  # training images searched for copies; None: all sharp ones
    crowd_n: int = 256
    curve_n: int = 256
    curve_steps: tuple[int, ...] = (2, 4, 8, 16, 30, 50, 100, 250, 500)
    inception: str | None = None
    device: str = "auto"
    precision: str = "fp32"

    @property
    def needs_model(self) -> bool:
        """Only the ladder measures nothing but real images."""
        return bool(set(self.parts) - {"ladder"})


QUICK = Settings(samples=256, pool=2048, crowd_n=64, curve_n=64, curve_steps=(2, 8, 30))


class Evaluation:
    """One evaluation under way: what is measured so far, and the images that several parts look at.

    The reference of every distance is the same n sharp training images. Held-out real images (the floor), their VAE
    copies, their degradations and the generated images are all compared with it at that n, so all numbers share one
    bias and their ratios to the floor mean something.
    """

    def __init__(self, settings: Settings, store: FaceStore, generator: Generator | None = None) -> None:
        if settings.needs_model and generator is None:
            raise ValueError(f"the parts {', '.join(settings.parts)} need a generator; only the ladder needs none")
        self.generator = generator if settings.needs_model else None
        own = 1.0 if self.generator is None else self.generator.info.default_guidance_scale
        self.guidance = float(own if settings.guidance is None else settings.guidance)
        self.settings, self.store = replace(settings, guidance=self.guidance), store
        self.out = Path(settings.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.device = str(pick_device(settings.device))
        self.judge, self.digest = load_attribute_classifier(settings.judge, self.device)
        rng = np.random.default_rng(settings.seed)
        shuffled = {split: rng.permutation(store.sharp(split)) for split in ("train", *HELD_OUT)}
        train, unseen = shuffled["train"], shuffled[settings.split]
        if min(len(train), len(unseen)) < 4:
            raise ValueError(f"{settings.data} has {len(train)} sharp training and {len(unseen)} sharp "
                             f"{settings.split} images; at least 4 of each are needed")  # fmt: skip
        self.train_rows, self.unseen_rows = train[: settings.pool], unseen
        self.held_rows = np.concatenate([shuffled[split] for split in HELD_OUT])[: len(self.train_rows)]
        self.n = min(settings.samples, len(self.train_rows), len(unseen))
        self.reference, self.held = self.real(self.train_rows[: self.n]), self.real(unseen)
        self.report: dict[str, Any] = {
            "settings": asdict(self.settings), "distances": {}, "checks": {}, "seconds": {},
            "model": self.generator and read_index(settings.model),
            "model_hash": self.generator and self.generator.info.model_hash,
            "machine": {"torch": torch.__version__, "device": self.device, "threads": torch.get_num_threads()},
        }  # fmt: skip
        self.curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.prompts = draw_prompts(store.attributes[unseen], settings.samples, settings.seed)
        self.samples: Pictures | None = None
        self.floors: dict[tuple[str, int], float] = {}

    def real(self, rows: np.ndarray) -> Features:
        return extract_store_features(self.judge, self.digest, self.store, rows, Path(self.settings.cache))

    @property
    def model(self) -> Generator:
        """The generator, in a part that needs one."""
        if self.generator is None:
            raise ValueError("this part needs a generator")
        return self.generator

    def generate(self, prompts: Sequence[str], steps: int, guidance: float | None = None) -> Pictures:
        """One face a prompt, from consecutive seeds."""
        scale = self.guidance if guidance is None else guidance
        sampling = Sampling(steps, scale, self.settings.sampler, self.settings.seed)
        return generate_images(self.model, sampling.requests(prompts))

    def distance(self, seen: Features, pictures: Pictures, n: int | None = None) -> dict[str, float]:
        """The distances to the reference at n, the Frechet distances over those of held-out real images at n, and
        precision and recall by what hears shapes."""
        n = min(len(seen), n or self.n)
        reference, held = self.reference.features[:n], self.held.features[:n]
        found = {"n": n, **self._over_floor("frechet", seen.features[:n], held, reference)}
        if self.generator is not None:
            mine = self.shapes[1][:n] if seen is self.held else image_features(self.generator.clip, pictures[:n])
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
        """What the image encoder makes of the reference and of held-out real images, n of each."""
        rows = (self.train_rows[: self.n], self.unseen_rows[: self.n])
        reference, held = (image_features(self.model.clip, self.store.images[some]) for some in rows)
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
        """What the attribute classifier and the floor are worth: always measured."""
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
        """Does the distance rise when images get worse? If not, it measures nothing."""
        pictures = self.store.images[self.unseen_rows[: self.n]]
        mean_face = self.store.images[self.train_rows[: self.n]].mean(0)
        rungs = {}
        for kind in LADDER:
            worse = degrade(pictures, kind, mean_face=mean_face, seed=self.settings.seed)
            seen = extract_features(self.judge, worse)
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
        """The ceiling: held-out images through the VAE and back."""
        pictures = self.store.images[self.unseen_rows[: self.n]]
        copies = reconstruct(self.model.vae, pictures)
        self.report["vae"] = {"n": self.n, **reconstruction_figures(pictures, copies)}
        self.report["distances"]["vae"] = self.distance(extract_features(self.judge, copies), copies)
        self.detail("vae", copies)
        save_pairs(pictures[:16], copies[:16], self.out / "vae.png")

    def part_samples(self) -> None:
        """Distances, detail and prompt fidelity of images generated for held-out captions."""
        settings, prompts = self.settings, self.prompts
        self.samples = self.generate(prompts.texts, settings.steps)
        seen = extract_features(self.judge, self.samples)
        self.report["distances"]["generated"] = self.distance(seen, self.samples)
        self.detail("generated", self.samples[: self.n])
        image_grid(self.samples[:100], 10).save(self.out / "samples.png")
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
        """Does the empty prompt generate people as they are in the training set? Rates by the attribute classifier's
        probabilities."""
        count = self.settings.crowd_n
        crowd = self.generate([""] * count, self.settings.steps, guidance=1.0)  # nothing to be guided towards
        ours, theirs = (torch.from_numpy(s.logits).sigmoid().mean(0) for s in (extract_features(self.judge, crowd),
                                                                               self.reference))
        gap = (ours - theirs).tolist()
        worst = int(np.abs(gap).argmax())
        self.report["crowd"] = {
            "n": count, "largest_rate_difference": abs(gap[worst]), "largest_at": ATTRIBUTES[worst],
            "rate_differences": dict(zip(ATTRIBUTES, gap, strict=True)),
        }  # fmt: skip
        image_grid(crowd[:100], 10).save(self.out / "crowd.png")

    def part_memorisation(self) -> None:
        """Are generated images nearer to training images than to images of people never seen?"""
        if self.samples is None:
            raise ValueError("--parts memorisation needs the part samples in the same run")
        mirrored = self.samples[:, :, ::-1]  # training saw both mirror images
        pools = (self.train_rows, self.held_rows)
        # Every whole image of the pools at once would not fit in memory; their thumbnails do.
        parts = [np.array_split(rows, -(-len(rows) // 1024)) for rows in pools]
        small = [np.concatenate([thumbnails(self.store.images[p]) for p in pool]) for pool in parts]
        both = (self.samples, mirrored)
        spaces: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {
            "features": ([extract_features(self.judge, view).features for view in both],
                         [self.real(r).features for r in pools]),
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
            save_pairs(self.samples[closest], theirs, self.out / f"closest_{name}.png")

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
            measured = self.distance(extract_features(self.judge, pictures), pictures, n)
            points.append({"steps": steps, **measured, "fine_detail_over_real": detail, "image_s": taken})
        self.report["curve"] = {"n": n, "floor": self.distance(self.held, self.store.images[self.unseen_rows[:n]], n),
                                "points": points}

    def part_fid(self) -> None:
        """True FID by a network the user brings (TorchScript, uint8 [B, 3, H, W] -> the 2048 pooled features)."""
        if self.samples is None:
            raise ValueError("--inception needs the part samples in the same run")
        features = inception_features(str(self.settings.inception), self.device)
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
