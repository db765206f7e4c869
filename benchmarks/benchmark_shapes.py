"""Does a model that was trained on 256 captioned shapes for some minutes generate the shape and the colour asked for?

    python benchmarks/benchmark_shapes.py                      draw shapes, train on them, count what is generated
    python benchmarks/benchmark_shapes.py --draw FOLDER        only draw the shapes, with a metadata.jsonl

Eight kinds of shapes (circle or square, in four colours) with one caption each, learned by `train.py --preset tiny`.
Colour and shape of what is generated are read from its pixels, by the code below. The exit status is 1 where less than
90 % show both. It is a command, not a test: `tests/test_train.py` does the same with a shorter training.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the modules of the root

from core.command import run_command

COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (30, 170, 60), "yellow": (230, 220, 40)}
SHAPES = ("circle", "square")
PROMISED = 0.9
FAR = 90  # levels in a channel by which a pixel of a shape differs from the white around it
ROUND = 0.9  # a circle fills 0.79 of the box around it, a square all


def draw_shapes(folder: Path, count: int, colours: Sequence[str] = tuple(COLOURS), seed: int = 0) -> Path:
    """Draw shapes at random places and sizes, and write the captions beside them in the imagefolder form."""
    folder.mkdir(parents=True)
    rng, rows = random.Random(seed), []
    for number in range(count):
        colour, shape = colours[number % len(colours)], SHAPES[number // len(colours) % 2]
        image = Image.new("RGB", (128, 128), "white")
        x, y, r = rng.randrange(52, 77), rng.randrange(52, 77), rng.randrange(30, 45)
        pen = ImageDraw.Draw(image)
        (pen.ellipse if shape == "circle" else pen.rectangle)((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
        image.save(folder / f"{number:04}.png")
        rows.append(json.dumps({"file_name": f"{number:04}.png", "text": f"a {colour} {shape}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def what_is_shown(pixels: np.ndarray) -> tuple[str, str]:
    """(colour, shape) of what stands out from white, by the nearest colour of its median pixel and by how much of the
    box around it it fills; ("nothing", "nothing") where less than 200 pixels do. Shapes: uint8 [128, 128, 3]."""
    image = pixels.astype(float)
    shown = np.abs(image - 255).max(axis=2) > FAR
    if shown.sum() < 200:
        return "nothing", "nothing"
    median = np.median(image[shown], axis=0)
    colour = min(COLOURS, key=lambda name: float(np.abs(median - COLOURS[name]).sum()))
    (top, bottom), (left, right) = (np.percentile(places, (1, 99)) for places in shown.nonzero())
    return colour, SHAPES[int(shown.sum() / ((bottom - top + 1) * (right - left + 1)) >= ROUND)]


def count_right(faces: Any, prompts: Sequence[tuple[str, str]], each: int, steps: int, seed: int = 1000
                ) -> dict[str, tuple[float, float]]:
    """Prompt -> the share of ``each`` images that show its colour, and the share that show its colour and its shape."""
    found = {}
    for colour, shape in prompts:
        pictures = faces.generate(f"a {colour} {shape}", num_images=each, seed=seed, num_inference_steps=steps)
        seen = [what_is_shown(picture.pixels) for picture in pictures]
        found[f"a {colour} {shape}"] = (float(np.mean([one == colour for one, _ in seen])),
                                        float(np.mean([one == (colour, shape) for one in seen])))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="only draw the shapes")
    parser.add_argument("--count", type=int, default=256, help="shapes to learn from (256)")
    parser.add_argument("--each", type=int, default=16, help="images generated for each of the eight prompts (16)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (20)")
    parser.add_argument("--length", default="1", help="of the training, as of train.py")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where shapes, runs and model stay")
    args = parser.parse_args(argv)
    if args.draw is not None:
        print(f"{args.count} shapes: {draw_shapes(args.draw, args.count)}")
        return 0
    import train
    from generator import FaceGenerator

    with tempfile.TemporaryDirectory() as place:
        root = args.keep or Path(place)
        source, began = draw_shapes(root / "shapes", args.count), time.monotonic()
        words = ["--preset", "tiny", "--data", str(source), "--name", "shapes", "--length", args.length,
                 "--device", "cpu", "--precision", "no"]
        for folder in ("models", "runs", "archive"):
            words += [f"--{folder}", str(root / folder)]
        if (code := train.main(words)) != 0:
            return code
        minutes = (time.monotonic() - began) / 60
        faces = FaceGenerator.load(root / "models" / "shapes", "cpu", engine="torch")
        found = count_right(faces, [(colour, shape) for colour in COLOURS for shape in SHAPES], args.each, args.steps)
    print(f"\ntrained in {minutes:.1f} minutes\n\n| prompt | colour | colour and shape |\n| --- | --- | --- |")
    for prompt, (colour, both) in found.items():
        print(f"| {prompt} | {colour:.0%} | {both:.0%} |")
    total = float(np.mean([both for _, both in found.values()]))
    print(f"| all {len(found) * args.each} | {np.mean([one for one, _ in found.values()]):.0%} | {total:.0%} |")
    return 0 if total >= PROMISED else 1


if __name__ == "__main__":
    raise SystemExit(run_command(main))
