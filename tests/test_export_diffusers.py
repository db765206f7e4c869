"""Does an exported model draw in a process that has diffusers, transformers and torch, and nothing of this project?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import conditional_ldm
from core.command import UserError
from core.nn.source_bundle import BundleError, bundle
from export_diffusers import ROOT, export
from generator import FaceGenerator
from model_loading import DEFAULT_MODEL

Asked = tuple[str, str, bool, str]  # prompt, negative prompt, whether it is marked, sampler or ""
DRAW = """
import json, sys
from pathlib import Path
import numpy as np, torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerFast
torch.set_num_threads(1)
folder, out, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
assert isinstance(pipeline.tokenizer, PreTrainedTokenizerFast)
drawn = [np.stack([np.asarray(image) for image in pipeline(
    prompt, negative_prompt=away, num_inference_steps=steps, num_images_per_prompt=2, sampler=sampler or None,
    watermark=marked, generator=torch.Generator().manual_seed(7)).images])
    for prompt, away, marked, sampler in json.loads(sys.argv[4])]
np.save(out, np.stack(drawn))
ours = [name for name in sys.modules if name.split(".")[0] in ("core", "generator", "vae", "train_clip", "api")]
assert not ours, ours
"""


def draw_elsewhere(folder: Path, place: Path, steps: int, asked: list[Asked]) -> np.ndarray:
    """What the exported pipeline draws in a process of its own; uint8 [prompts, 2, H, W, 3]."""
    place.mkdir()
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**kept, "HF_HOME": str(place / "hub"), "HF_MODULES_CACHE": str(place / "modules"),
                   "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-I", "-c", DRAW, str(folder), str(place / "drawn.npy"), str(steps),
             json.dumps(asked)]
    done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found: np.ndarray = np.load(place / "drawn.npy")
    return found


def apart(drawn: np.ndarray, faces: FaceGenerator, steps: int, asked: list[Asked]) -> int:
    """The largest difference to what `FaceGenerator` draws, in grey levels."""
    ours = [np.stack([one.pixels for one in faces.generate(
        prompt, negative_prompt=away, num_inference_steps=steps, num_images=2, sampler=sampler or None, seed=7,
        watermark=marked)]) for prompt, away, marked, sampler in asked]
    return int(np.abs(np.stack(ours).astype(int) - drawn).max())


def test_a_tiny_model_draws_the_same_elsewhere(tiny_folder: Path, faces: FaceGenerator, tmp_path: Path) -> None:
    asked = [(*words, sampler) for sampler in ("", "DPM++ 2M SDE", "Euler a")
             for words in (("a smiling woman with no glasses", "a beard", True), ("", "", False))]
    folder = export(tiny_folder, tmp_path / "exported")
    drawn = draw_elsewhere(folder, tmp_path / "elsewhere", 5, asked)
    assert apart(drawn, faces, 5, asked) <= 1


def test_the_bundled_model_draws_the_same_elsewhere(tmp_path: Path) -> None:
    """With its correction and its rewriting of prompts, by the command that README prints."""
    assert conditional_ldm.main(["--export-diffusers", str(tmp_path / "exported"), "--model", str(DEFAULT_MODEL)]) == 0
    asked = [("a smiling woman with no glasses", "", False, ""), ("an old man, wearing a hat", "", True, "")]
    drawn = draw_elsewhere(tmp_path / "exported", tmp_path / "elsewhere", 4, asked)
    faces = FaceGenerator.load(DEFAULT_MODEL, device="cpu", engine="torch")
    assert apart(drawn, faces, 4, asked) <= 1


def test_the_card_is_as_the_hub_wants_it(tiny_folder: Path, tmp_path: Path) -> None:
    text = (export(tiny_folder, tmp_path / "exported") / "README.md").read_text(encoding="utf-8")
    told = yaml.safe_load(text.split("---")[1])
    assert (told["library_name"], told["pipeline_tag"], told["license"]) == ("diffusers", "text-to-image", "other")
    assert "](../" not in text
    code = (tmp_path / "exported" / "networks" / "networks.py").read_text(encoding="utf-8")
    assert "from core" not in code and "import core" not in code


def test_a_folder_of_something_else_stays(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match="holds something else"):
        export(tiny_folder, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").is_file()
    again = export(tiny_folder, export(tiny_folder, tmp_path / "exported"))
    assert (again / "pipeline.py").is_file() and not (tmp_path / "exported.writing").exists()


def test_a_bundle_tells_apart_what_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bundled_a.py").write_text(
        "from bundled_b import twice as double\nimport math\nN = 3\n\ndef area(r):\n    return double(N) * math.pi\n",
        encoding="utf-8")
    (tmp_path / "bundled_b.py").write_text("N = 5\nLATER = [N]\n\ndef twice(x):\n    return 2 * x + LATER[0]\n",
                                           encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    import bundled_a  # type: ignore[import-not-found]

    text = bundle([bundled_a.area], tmp_path, "Why.")
    (tmp_path / "bundled_alone.py").write_text(text, encoding="utf-8")
    import bundled_alone  # type: ignore[import-not-found]

    assert bundled_alone.area(1) == bundled_a.area(1) == 11 * np.pi
    assert "bundled_b import" not in text and "N_of_" in text
    assert issubclass(BundleError, ValueError) and ROOT.is_dir()
