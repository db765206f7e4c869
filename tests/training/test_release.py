"""Does a first try leave every trained model as it is, and does a run end where it was told?"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import conditional_ldm
import dataset
import evaluate
import train_clip
import vae
from core.nn.checkpoint import ModelFolderError, component_hash, read_index, save_component, update_index
from core.training.release import BUNDLED, check_release
from tests.support.tiny_model import build_tiny_model
from vae import VAEConfig

pytestmark = pytest.mark.usefixtures("quick_grids")
COMMANDS = (("clip", train_clip.main), ("vae", vae.main), ("unet", conditional_ldm.main))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with a bundled model, where every path of a command is the usual one."""
    monkeypatch.chdir(tmp_path)
    build_tiny_model(tmp_path / BUNDLED)
    dataset.synthetic_store(tmp_path / "archive" / "tiny", count=64)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_command_of_the_tiny_preset_runs_in_seconds_and_leaves_the_bundled_model(home: Path) -> None:
    """As README prints them: nothing but the preset, the data and a folder for the result."""
    before = contents(home / BUNDLED)
    for component, main in COMMANDS:
        assert main(["--train", "--preset", "tiny", "--data", "archive/tiny", "--model", "models/mine"]) == 0
        training = json.loads((home / "models" / "mine" / component / "config.json").read_text())["training"]
        assert training["steps"] <= 20 and training["batch_size"] <= 16
    for kind in ("guidance", "consistency"):
        assert conditional_ldm.main(["--distill", kind, "--preset", "tiny", "--data", "archive/tiny", "--model",
                                     "models/mine", "--replace"]) == 0
    assert set(read_index(home / "models" / "mine")["components"]) == {"clip", "vae", "preview", "unet", "turbo"}
    assert contents(home / BUNDLED) == before
    assert not (home / "runs" / "latents").exists()  # nor is a cache of real images made anew
    for runs, big in ((train_clip.RUNS, 4000), (vae.RUNS, 20000), (conditional_ldm.RUNS, 50000)):
        assert runs["celeba128"]["steps"] == big  # the promise of a real run stays


def test_a_run_releases_into_a_folder_of_its_own_name(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(home / BUNDLED)
    command = ["--train", "--preset", "tiny", "--data", "archive/tiny", "--steps", "1", "--device", "cpu"]
    assert train_clip.main([*command, "--run", "runs/first"]) == 0
    assert "released to models/first/clip" in capsys.readouterr().out
    assert vae.main([*command, "--run", "runs/first-vae", "--perceptual-weight", "0"]) == 0
    assert set(read_index("models/first-vae")["components"]) == {"vae", "preview"}
    with pytest.raises(ModelFolderError, match="models/vae is not a model folder"):  # CLIP is read from there
        vae.main(command)
    assert contents(home / BUNDLED) == before


def test_a_trained_component_is_replaced_only_when_told(home: Path) -> None:
    """By no run but the one that made it; and the sentence says what depends on it."""
    for component, main in COMMANDS:
        command = ["--train", "--preset", "tiny", "--data", "archive/tiny", "--steps", "1", "--device", "cpu"]
        before = contents(home / BUNDLED)
        with pytest.raises(ModelFolderError, match=f"holds a trained {component}.*--model, or .*--replace"):
            main([*command, "--model", BUNDLED])
        assert contents(home / BUNDLED) == before and not (home / "runs" / component / "checkpoints").exists()
        folder = Path(shutil.copytree(home / BUNDLED, home / f"models/other-{component}"))
        mine = [*command, "--model", str(folder), "--run", "runs/mine"]
        assert main([*mine, "--replace"]) == 0
        digest = component_hash(folder, component)
        assert main(mine) == 0 and component_hash(folder, component) == digest  # its own: nothing is lost
        with pytest.raises(ModelFolderError, match="holds a trained"):
            main([*command, "--model", str(folder), "--run", "runs/another"])
        shutil.rmtree("runs/mine")
    with pytest.raises(ModelFolderError, match="clip, on which its unet depends: name"):
        check_release(BUNDLED, "clip", replace=False)


def test_a_run_of_no_steps_releases_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _, main in COMMANDS:
        for flag in ("--steps", "--batch-size"):
            with pytest.raises(SystemExit):
                main(["--train", "--preset", "tiny", "--data", "archive/tiny", flag, "0"])
            assert f"{flag} is 0; it must be at least 1" in capsys.readouterr().err
    assert not list((home / "models").glob("[!c]*"))


def test_what_changes_a_trained_model_must_be_told_which(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(home / BUNDLED)
    commands = [(vae.main, ["--fit-preview"]),
                (conditional_ldm.main, ["--distill", "guidance"]), (conditional_ldm.main, ["--distill", "consistency"]),
                *((evaluate.main, [flag]) for flag in ("--fit-sharpness", "--fit-correction", "--build-nearest")),
                (evaluate.main, ["--fit-emphasis", "--split", "val"])]
    for main, words in commands:
        with pytest.raises(SystemExit):
            main([*words, "--data", "archive/tiny"])
        assert re.search(r"changes a trained model: say which, with --model FOLDER", capsys.readouterr().err)
    save_component(BUNDLED, "preview", {}, {})
    with pytest.raises(ModelFolderError, match="trained preview"):
        vae.main(["--fit-preview", "--data", "archive/tiny", "--model", BUNDLED])
    with pytest.raises(ModelFolderError, match="trained unet"):
        conditional_ldm.main(["--distill", "guidance", "--data", "archive/tiny", "--model", BUNDLED])
    for part, command in (("correction", "fit-correction"), ("nearest", "index-training-images"),
                          ("emphasis", "fit-prompt-rewriting"), ("vae", "fit-sharpness")):
        if part != "vae":
            save_component(BUNDLED, part, {}, {})
        with pytest.raises(ModelFolderError, match=f"holds a trained {part}"):
            evaluate.main([command, "--model", BUNDLED, "--data", "archive/tiny"])
    assert contents(home / BUNDLED)["unet/model.safetensors"] == before["unet/model.safetensors"]
    assert contents(home / BUNDLED)["vae/model.safetensors"] == before["vae/model.safetensors"]


def test_widths_of_the_parents_are_checked_first(home: Path) -> None:
    """In one sentence, before images are encoded; as with a tiny UNet for the bundled VAE of 16 channels."""
    wide = Path(shutil.copytree(home / BUNDLED, home / "models" / "wide"))
    config = json.loads((wide / "vae" / "config.json").read_text())
    config["network"]["latent_channels"] = VAEConfig().latent_channels
    (wide / "vae" / "config.json").write_text(json.dumps(config))
    command = ["--train", "--preset", "tiny", "--data", "archive/tiny", "--device", "cpu"]
    with pytest.raises(ModelFolderError, match="a UNet for latent_channels 4, and the vae in .*wide has 16"):
        conditional_ldm.main([*command, "--model", str(wide)])
    made = [path for path in (home / "runs").rglob("*") if path.suffix in (".npy", ".npz", ".json", ".jsonl")]
    assert not made  # nothing but the lock of the run
    for preset, width in (("celeba128", 16), ("small", 16)):
        with pytest.raises(ModelFolderError, match=f"--preset {preset} makes a UNet for latent_channels {width}"):
            conditional_ldm.main([*command, "--preset", preset, "--model", BUNDLED])
    config = json.loads((home / BUNDLED / "clip" / "config.json").read_text())
    config["network"]["text_width"] = 192
    (home / BUNDLED / "clip" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match="for text_width 32, and the clip in .* has 192"):
        conditional_ldm.main([*command, "--model", BUNDLED])
    for words in (["--decoder-only", "--model", str(wide)], ["--init", str(wide), "--model", BUNDLED]):
        with pytest.raises(ModelFolderError, match="the VAE in .*wide has latent_channels 16, and --preset tiny 4"):
            vae.main([*command, *words])
    update_index("models/empty", name="empty")
    with pytest.raises(ModelFolderError, match="models/empty has no component 'clip'"):
        vae.main([*command, "--model", "models/empty"])
