"""Does everything work for images with a person's own captions, which state none of CelebA's attributes?"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

import conditional_ldm
import dataset
import evaluate
import train_clip
import vae
from core.evaluation import prompt_sheets
from core.evaluation.prompts import training_captions
from core.nn.checkpoint import ModelFolderError
from core.training.caption_cache import count_cut
from core.training.data_sources import DataError
from dataset import FaceStore, synthetic_store
from tests.support.training import make_workplace
from train_clip import load_clip

COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (30, 170, 60), "yellow": (230, 220, 40)}


def draw_shapes(folder: Path, count: int = 72) -> Path:
    """Circles and squares of four colours with two captions each, the last 24 of them for the test."""
    folder.mkdir()
    rng, labels, partition = random.Random(0), {}, []
    for number in range(count):
        colour, shape = list(COLOURS)[number % 4], ("circle", "square")[number // 4 % 2]
        image = Image.new("RGB", (128, 128), "gray")
        x, y, r = rng.randrange(48, 80), rng.randrange(48, 80), rng.randrange(28, 44)
        pen = ImageDraw.Draw(image)
        (pen.ellipse if shape == "circle" else pen.rectangle)((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
        image.save(folder / f"{number:03}.png")
        labels[f"{number:03}.png"] = [f"a {colour} {shape}", f"{shape} painted in {colour}"]
        partition.append(f"{number:03}.png {0 if number < count - 24 else 2}")
    (folder / "text_labels.json").write_text(json.dumps(labels))
    (folder / "list_eval_partition.txt").write_text("\n".join(partition))
    return folder


def prepare(source: Path, out: Path, *more: str) -> Path:
    assert dataset.main(["--prepare", "--source", str(source), "--out", str(out), "--workers", "1", *more]) == 0
    return out


def train(store: Path, root: Path, *more: object) -> Path:
    words = ["--train", "--preset", "tiny", "--data", store, "--model", root / "model", "--run", root / "run",
             "--device", "cpu", "--precision", "no", "--log-every", 1, "--captions-per-image", 2, *more]
    assert train_clip.main([str(word) for word in words]) == 0
    return root / "model"


def measure(store: Path, model: Path, run: Path) -> dict:
    assert train_clip.main(["--eval", "--data", str(store), "--model", str(model), "--run", str(run),
                            "--device", "cpu"]) == 0
    return json.loads((run / "metrics.json").read_text())


def test_a_text_encoder_learns_from_own_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two different captions are told apart, retrieval is better than chance, and the vocabulary is the captions'."""
    store = prepare(draw_shapes(tmp_path / "shapes"), tmp_path / "store")
    model = train(store, tmp_path, "--steps", 40, "--batch-size", 16, "--warmup-steps", 4, "--learning-rate", 4e-3)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert logged[0]["excess"] > 0.3  # the targets differ: there is something to learn
    clip, tokenizer = load_clip(model)
    red, blue, other = clip.embed_text(*tokenizer(["a red circle", "a blue square", "circle painted in red"]))
    assert float(red @ blue) < 0.7 and float(red @ blue) < float(red @ other)
    found = measure(store, model, tmp_path / "eval")
    assert found["captions"] == "own" and found["n"] == 24
    for name in ("text_to_image", "image_to_text"):
        chance = found["chance_at_1" if name == "text_to_image" else "image_to_text_chance_at_1"]
        assert chance == 0.125 and found[f"{name}_precision_at_1"] > 2 * chance, found
    assert "zero_shot_auc_mean" not in found  # these captions state no attributes
    assert "no better than chance" not in capsys.readouterr().err
    words = json.loads((model / "vocabulary.json").read_text())
    assert set(words) == {"a", "in", "painted", "circle", "square", *COLOURS} and set(words.values()) == {"known"}
    examples = json.loads((model / "examples.json").read_text())
    assert len(examples) == 16 and "a red circle" in examples


def test_text_labels_that_were_written_can_be_trained_on(tmp_path: Path) -> None:
    """`--write-text-labels` and back: captions of the project's own grammar, as if a person had written them."""
    place = make_workplace(tmp_path, count=40)
    labels = tmp_path / "labels.json"
    assert dataset.main(["--write-text-labels", str(labels), "--out", str(place.store)]) == 0
    faces = dataset.FaceStore.open(place.store)
    (tmp_path / "faces").mkdir()
    for image_id, pixels in zip(faces.image_id, faces.images, strict=True):
        Image.fromarray(pixels).save(tmp_path / "faces" / f"{Path(image_id).stem}.png")
    parts = [f"{image_id} {dataset.SPLITS.index(split)}" for image_id, split in
             zip(faces.image_id, faces.split, strict=True)]
    (tmp_path / "faces" / "list_eval_partition.txt").write_text("\n".join(parts))
    own = prepare(tmp_path / "faces", tmp_path / "own", "--text-labels", str(labels))
    model = train(own, tmp_path / "mine", "--steps", 3, "--batch-size", 8, "--warmup-steps", 1)
    first = json.loads((tmp_path / "mine" / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] > 1 and first["excess"] > 0.5  # two to the eighth part of a batch is true of each caption
    assert "smiling" in json.loads((model / "vocabulary.json").read_text())
    assert measure(own, model, tmp_path / "eval")["chance_at_1"] < 0.6


def test_captions_that_tell_nothing_apart_are_refused(tmp_path: Path) -> None:
    source = draw_shapes(tmp_path / "shapes", count=32)
    labels = {name: "An  image" if int(name[:3]) % 2 else "an image"
              for name in json.loads((source / "text_labels.json").read_text())}
    (source / "text_labels.json").write_text(json.dumps(labels))
    store = prepare(source, tmp_path / "store")
    with pytest.raises(DataError, match="all 8 training images .* have the same caption"):
        train(store, tmp_path, "--steps", 1)
    torch.manual_seed(0)
    with pytest.raises(DataError, match="cannot tell a trained model from chance"):
        measure(store, make_workplace(tmp_path / "place").model, tmp_path / "eval")


def test_small_pictures_without_captions_or_held_out_ones_are_learned_from(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], quick_grids: None) -> None:
    """Nothing is said of eleven small pictures, and none is kept back: VAE and UNet learn, the text encoder cannot."""
    (tmp_path / "in").mkdir()
    for number in range(11):
        Image.new("RGB", (40, 30), (20 * number, 90, 200)).save(tmp_path / "in" / f"{number:02}.png")
    (tmp_path / "in" / "list_eval_partition.txt").write_text("".join(f"{n:02}.png 0\n" for n in range(11)))
    store = prepare(tmp_path / "in", tmp_path / "store")
    faces = FaceStore.open(store)
    assert faces.says_nothing and len(faces.sharp("train")) == 11 and not len(faces.sharp("val"))
    model = train(store, tmp_path, "--steps", 9)
    assert "the text encoder is released as it begins" in capsys.readouterr().out
    config = json.loads((model / "clip" / "config.json").read_text())
    assert config["training"]["steps"] == 0
    assert json.loads((model / "vocabulary.json").read_text()) == {"a": "known", "picture": "known"}
    common = ["--train", "--preset", "tiny", "--data", str(store), "--model", str(model), "--device", "cpu",
              "--precision", "no", "--steps", "2", "--batch-size", "4"]
    assert vae.main([*common, "--run", str(tmp_path / "vae"), "--squared-weight", "1"]) == 0
    said = capsys.readouterr().out
    assert "the image encoder of" in said and "is not asked" in said
    logged = [json.loads(line) for line in (tmp_path / "vae" / "metrics.jsonl").read_text().splitlines()]
    assert "perceptual" not in logged[-1] and logged[-1]["squared"] > 0
    command = [*common, "--run", str(tmp_path / "unet"), "--cache", str(tmp_path / "latents")]
    assert conditional_ldm.main(command) == 0
    assert "unknown, no image is held out for validation" in capsys.readouterr().out
    training = json.loads((model / "unet" / "config.json").read_text())["training"]
    assert training["ema"] == "ema_long" and training["validation_loss"] == {}
    with pytest.raises(DataError, match="has no test images"):
        vae.main(["--eval", "--data", str(store), "--model", str(model), "--run", str(tmp_path), "--device", "cpu"])
    with pytest.raises(DataError, match="0 images in its split 'test', and at least 2"):
        evaluate.main(["--model", str(model), "--data", str(store), "--out", str(tmp_path / "report")])


def test_captions_that_are_cut_are_counted() -> None:
    tokenizer = train_clip.train_tokenizer(["a red circle", "a blue square"], 300, max_length=8)
    assert count_cut(["a red", "a red circle on a blue square, and then more"], tokenizer) == 1


def test_grids_of_a_run_show_own_captions(tmp_path: Path) -> None:
    store = FaceStore.open(prepare(draw_shapes(tmp_path / "shapes", count=32), tmp_path / "store"))
    prompts = prompt_sheets.grid_prompts(store)
    assert len(prompts) == len(prompt_sheets.GRID_PROMPTS) and prompts[0] == "" and len(set(prompts)) == len(prompts)
    assert set(prompts[1:]) <= {text for captions in store.text_labels.values() for text in captions}
    assert prompts == prompt_sheets.grid_prompts(store)
    drawn = synthetic_store(tmp_path / "drawn", 8)
    assert prompt_sheets.grid_prompts(drawn) == prompt_sheets.GRID_PROMPTS


def test_what_needs_attributes_says_so(tmp_path: Path) -> None:
    """All are stored as false: to favour some would favour none, and every figure would measure nothing."""
    place = make_workplace(tmp_path / "place")
    store = prepare(draw_shapes(tmp_path / "shapes", count=32), tmp_path / "store")
    with pytest.raises(DataError, match="own captions and no attributes"):
        evaluate.main(["fit-prompt-rewriting", "--model", str(place.model), "--data", str(store)])
    command = place.train("unet", "favour", "--steps", 1, "--favour", "Eyeglasses")
    command[command.index("--data") + 1] = str(store)
    with pytest.raises(DataError, match="--favour Eyeglasses"):
        conditional_ldm.main(command)
    texts = training_captions(FaceStore.open(store), samples=8, seed=0)[1]
    assert set(texts) <= {text for captions in FaceStore.open(store).text_labels.values() for text in captions}
    (place.model / "vocabulary.json").write_text('{"red": "known"}')
    with pytest.raises(ModelFolderError, match="no words for these sliders"):
        evaluate.main(["sliders", "Smiling", "--model", str(place.model)])
