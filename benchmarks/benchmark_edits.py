"""What do edits cost, and how well do they do what they say?

    python benchmarks/benchmark_edits.py                   prints the tables
    python benchmarks/benchmark_edits.py edit-cost         one section: edit-cost, smoothness or inversion
    python benchmarks/benchmark_edits.py all --record      also writes the tables into docs/benchmarks.md
    python benchmarks/benchmark_edits.py strip             only draws the picture of the README again

`--pictures DIR` takes the photographs in DIR to noise and back, instead of drawings.

The bundled model, without a server. What is compared is measured in turn, A B A B, in the same run. The exit status is
1 when a promise is broken. It is a command, not a test; mechanisms are tested in `tests/diffusion/test_inpainting.py`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the modules of the root

from benchmarks.benchmark_server import DOCUMENT, PROMPT, load_faces, torch_line
from core.evaluation.benchmark_tables import Row, Section, machine, record, timed, told
from tests.support.server import ROOT

if TYPE_CHECKING:
    from generator import FaceGenerator

STRIP = ROOT / "docs" / "edits.png"
OLD_MAN, DARK = "an old man with grey hair and glasses", "a serious woman with black hair"


def far(one: np.ndarray, other: np.ndarray) -> float:
    """Mean distance of pixels in grey levels."""
    return float(np.abs(one.astype(float) - other).mean())


def drawn(faces: FaceGenerator, prompt: str, **options: Any) -> list[np.ndarray]:
    return [picture.pixels for picture in faces.generate(prompt, **options)]


def part(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    """A mask that is true in a rectangle."""
    mask = np.zeros((128, 128), bool)
    mask[top:bottom, left:right] = True
    return mask


# ---- cost ------------------------------------------------------------------------------------------------------------


def cost(faces: FaceGenerator, repeats: int = 3) -> Section:
    """Edits against plain drawings of as many evaluations: of one image, where what is done once weighs most."""
    (photo,) = drawn(faces, PROMPT, seed=7, num_inference_steps=20)  # warms up, too
    plain = {"num_inference_steps": 20}
    edits: dict[str, dict[str, Any]] = {
        "image to image, 20 of 50 steps": {"init_image": photo, "strength": 0.4, "num_inference_steps": 50},
        "inpainting of a mouth, 20 steps": {"init_image": photo, "mask": part(72, 108, 32, 96), **plain},
        "inpainting of all but the edge, 20 steps": {"init_image": photo, "mask": part(4, 124, 4, 124), **plain},
        "variation, 20 steps": {"variation_strength": 0.3, **plain},
    }
    rows = []
    for name, edit in edits.items():
        ratios = []
        for repeat in range(repeats):
            both = [("edit", edit), ("plain", plain)]
            took = {key: cpu_seconds(partial(drawn, faces, OLD_MAN, seed=repeat, **options))
                    for key, options in (both if repeat % 2 else both[::-1])}
            ratios.append(took["edit"] / took["plain"])
        told(f"cost: {name}: {[round(ratio, 3) for ratio in ratios]}")
        rows.append(Row(f"{name}, over a plain generating of as many evaluations", ratios, at_most=1.1))
    return Section("edit-cost", rows, [
        "One image. Ratios of CPU time of pairs measured one right after the other: that varies less than the clock on "
        "a machine with other work."])


def cpu_seconds(do: Callable[[], Any]) -> float:
    """What it took of all cores together."""
    began = time.process_time()
    do()
    return time.process_time() - began


# ---- noise of an image ----------------------------------------------------------------------------------------------


def photographs(faces: FaceGenerator, folder: Path | None, count: int = 4) -> list[np.ndarray]:
    """The first images of a folder, or drawings with glasses and hats and beards."""
    from core.imaging.image_io import crop_square, read_image

    if folder is None:
        prompts = (PROMPT, OLD_MAN, DARK, "a young man with a beard, wearing a hat")
        return [picture for i, prompt in enumerate(prompts)
                for picture in drawn(faces, prompt, num_images=count // 4, seed=100 * i, num_inference_steps=30)]
    files = (path for path in sorted(folder.iterdir()) if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    return [crop_square(read_image(path.read_bytes()), faces.info.image_size) for path in islice(files, count)]


def inversion(faces: FaceGenerator, pictures: Sequence[np.ndarray]) -> Section:
    """To the noise and back: how far from the VAE's copy, which is the best that any latent can give."""
    samplers = ("DDIM", "DPM++ 2M")
    errors: dict[str, list[float]] = {name: [] for name in samplers}
    copies, seconds, stds = [], [], []
    for number, photo in enumerate(pictures):
        copy = faces.decode(faces.encode(photo))
        copies.append(far(copy, photo))
        took, noise = timed(noise_of, faces, photo)
        seconds.append(took)
        stds.append(float(noise.std()))
        for name in samplers:
            (again,) = drawn(faces, "", latents=noise[None], guidance_scale=1.0, num_inference_steps=50, sampler=name)
            errors[name].append(far(again, copy))
        told(f"inversion: {number + 1}/{len(pictures)}: {took:.1f} s, {errors}")
    return Section("inversion", [
        Row("the VAE's copy from the picture, grey levels (mean of all pixels)", copies),
        *(Row(f"redrawn from its noise by {name}, from the VAE's copy, grey levels", errors[name],
              at_most=3.0 if name == "DDIM" else None) for name in samplers),
        Row("standard deviation of the noise (1 is Gaussian)", stds),
        Row("one inversion", seconds, "s"),
    ], ["50 steps, 3 evaluations each, no prompt."])


def noise_of(faces: FaceGenerator, photo: np.ndarray) -> np.ndarray:
    search = faces.inversion(photo)
    while not search.finished:
        search.advance(10)
    return search.latent


# ---- smoothness ------------------------------------------------------------------------------------------------------


def smoothness(faces: FaceGenerator) -> Section:
    """The longest step of a way over its mean step, and over the distance of two images of different seeds."""
    from core.engine import Interpolation

    options: dict[str, Any] = {"num_images": 8, "num_inference_steps": 20}
    plain = drawn(faces, PROMPT, seed=500, **options)
    apart = float(np.mean([far(one, other) for i, one in enumerate(plain) for other in plain[:i]]))
    ways: dict[str, list[tuple[str, int, Interpolation]]] = {
        "between two seeds": [(PROMPT, seed, Interpolation(seed=seed + 50)) for seed in (1, 2)],
        "between two prompts": [(PROMPT, seed, Interpolation(OLD_MAN)) for seed in (1, 2)],
        "between both": [(PROMPT, seed, Interpolation(OLD_MAN, seed + 50)) for seed in (1, 2)],
    }
    rows = []
    for name, targets in ways.items():
        steps = []
        for prompt, seed, target in targets:
            row = drawn(faces, prompt, seed=seed, interpolate_to=target, **options)
            steps.append([far(one, other) for one, other in zip(row, row[1:], strict=False)])
            told(f"smoothness: {name}: {[round(step, 1) for step in steps[-1]]}")
        rows += [Row(f"{name}: longest over mean step", [max(one) / float(np.mean(one)) for one in steps], at_most=3.0),
                 Row(f"{name}: longest step over the distance of two seeds", [max(one) / apart for one in steps],
                     at_most=1.0)]
    return Section("smoothness", rows, [
        f"8 pictures a way, 2 ways each; two pictures of one prompt and different seeds are {apart:.1f} grey levels "
        "apart (28 pairs)."])


# ---- the image of the README ---------------------------------------------------------------------------------------


def strip(faces: FaceGenerator, steps: int = 30) -> None:
    """One row an edit, the image that it begins with first. All of it is generated together, step by step."""
    from core.engine import GenerationRequest, Interpolation

    (photo,) = drawn(faces, PROMPT, num_inference_steps=steps, seed=7)
    mouth, eyes, hair = part(76, 108, 36, 92), part(42, 66, 28, 100), ~part(34, 128, 30, 98)
    plain = GenerationRequest(PROMPT, 1, steps, seed=7)
    edit = replace(plain, init_image=photo, seed=3)
    redrawn = ((mouth, "a man with a beard"), (mouth, "a serious woman"), (mouth, ""), (eyes, "a woman with glasses"),
               (eyes, "a woman with closed eyes"), (hair, DARK), (hair, "a woman wearing a hat"))
    rows = [
        [replace(edit, prompt=OLD_MAN, strength=s) for s in (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)],
        [replace(edit, prompt=prompt, mask=mask) for mask, prompt in redrawn],
        [replace(plain, variation_strength=s, variation_seed=2) for s in (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)],
        [replace(plain, num_images=8, interpolate_to=Interpolation(OLD_MAN, 8))],
    ]
    runs = [[faces.start(request) for request in row] for row in rows]
    waiting = [run for row in runs for run in row]
    while waiting:
        faces.step(waiting)
        waiting = [run for run in waiting if not run.finished]
        told(f"strip: {len(waiting)} requests left")
    canvas = np.full((len(rows) * 132 - 4, 8 * 132 - 4, 3), 255, np.uint8)
    for y, row in enumerate(runs):
        pictures = [picture.pixels for run in row for picture in faces.pictures(run)]
        for x, pixels in enumerate([photo, *pictures][-8:]):
            canvas[y * 132 : y * 132 + 128, x * 132 : x * 132 + 128] = pixels
    Image.fromarray(canvas).save(STRIP, optimize=True)
    told(f"drawn: {STRIP}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and with --record write down; 1 when a promise is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    names = ("edit-cost", "smoothness", "inversion")
    parser.add_argument("section", nargs="?", choices=(*names, "strip", "all"), default="all")
    parser.add_argument("--record", action="store_true", help=f"write the tables into {DOCUMENT.relative_to(ROOT)}")
    parser.add_argument("--pictures", type=Path, help="a folder of photographs for the inversion")
    arguments = parser.parse_args(argv)
    faces, circumstances, kept = load_faces(), machine(torch_line()), True
    if arguments.section == "strip":
        strip(faces)
        return 0
    measures: dict[str, Callable[[], Section]] = {
        "edit-cost": lambda: cost(faces), "smoothness": lambda: smoothness(faces),
        "inversion": lambda: inversion(faces, photographs(faces, arguments.pictures)),
    }
    for name in names if arguments.section == "all" else (arguments.section,):
        section = measures[name]()
        print(f"\n## {section.name}\n\n{section.text()}", flush=True)
        kept = kept and section.kept
        if arguments.record:
            record(DOCUMENT, section, circumstances, f"python benchmarks/benchmark_edits.py {section.name} --record")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
