"""Does the judge from outside count as it says, and say what it needs where its networks are not installed?

The networks themselves run only where `python evaluate.py outside --setup` was run: they are 350 MB to fetch, so the
check of every change does without them and tests what is ours.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
from core.evaluation import outside_judge, outside_networks, outside_setup
from core.evaluation.outside_weights import read_tensors
from core.process import Problem
from launcher.environment import pins


def imagined(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """What the networks might say of `count` faces: landmarks about a usual shape, small random cells."""
    rng = np.random.default_rng(seed)
    five = np.tile(np.array([[48.0, 56], [79, 56], [64, 75], [53, 91], [75, 91]]), (count, 1, 1))
    shape = np.random.default_rng(1).uniform(40, 90, (68, 2))
    points = {name: shape + rng.normal(0, 1, (count, 68, 2)) for name in ("mesh", "conv", "tree", "conv_flipped")}
    known = {name: rng.normal(0, 0.05, (count, 128)) for name in
             ("identity", "identity_flipped", "identity_left", "identity_right")}  # fmt: skip
    cells = {f"cells{side}": rng.normal(0, 1, (count, side, side, channels)).astype(np.float16)
             for side, channels in ((17, 64), (8, 128))}  # fmt: skip
    return {"blaze": np.full(count, 0.9), "mesh_flag": np.full(count, 20.0), "hog": np.ones(count),
            "mtcnn": np.full(count, 0.99), "five": five + rng.normal(0, 1, five.shape), "mesh_five": five,
            "faceres_length": np.full(count, 20.0), **points, **known, **cells}  # fmt: skip


def pictures(count: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 128, 128, 3), dtype=np.uint8)


def test_normal_scores_are_quantiles_and_fall_on_below_the_worst() -> None:
    real = np.linspace(-2.0, 2.0, 1001)
    scores = outside_judge.normal_score(np.array([0.0, 2.0, -2.0, -4.0, -99.0]), real)
    assert scores[0] == pytest.approx(0, abs=1e-6)
    assert scores[1] > 3 and scores[2] < -3
    assert scores[3] < scores[2] - 1 and scores[4] == pytest.approx(scores[3] - 3 + 2 / real.std(), abs=0.01)


def test_the_frame_of_a_face_does_not_depend_on_where_it_is() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 128, (3, 9, 2))
    turn = np.array([[np.cos(0.4), np.sin(0.4)], [-np.sin(0.4), np.cos(0.4)]])
    moved = 1.7 * points @ turn + [5, -8]
    expected = outside_judge.to_face(points, points[:, :2])
    assert np.allclose(outside_judge.to_face(moved, moved[:, :2]), expected)
    assert np.allclose(expected[:, :2], [[-0.5, 0], [0.5, 0]])


def test_faces_that_go_against_the_signals_are_worse_formed() -> None:
    usual = imagined(6)
    assert set(outside_judge.signals(usual)) == {name for names in outside_judge.GROUPS.values() for name in names}
    strange = {**usual, "identity_flipped": usual["identity_flipped"] + 0.3, "blaze": np.full(6, 0.1)}
    for key, names in (("identity", ("mirror",)), ("there", ("blaze",))):
        for name in names:
            better, worse = (outside_judge.signals(seen)[name] for seen in (usual, strange))
            assert (worse < better).all(), key
    quality = outside_judge.well_formed(usual)
    assert quality.shape == (6,) and ((0 <= quality) & (quality <= 1)).all()
    assert (outside_judge.well_formed(strange) <= quality).all()


def test_the_reference_knows_every_signal_and_holds_no_picture() -> None:
    known = outside_judge.reference()
    for names in outside_judge.GROUPS.values():
        for name in names:
            assert known[f"pose_{name}"].shape == (7,)
            assert (np.diff(known[f"real_{name}"]) >= 0).all()
    for side in ("17", "8"):
        matrix = known[f"inverse{side}"]
        assert np.array_equal(matrix, matrix.swapaxes(1, 2))
        assert np.linalg.eigvalsh(matrix).min() > 0
    assert outside_judge.REFERENCE.stat().st_size < 1_100_000


def test_rows_are_set_against_photographs_and_softness_is_told(tmp_path: Path) -> None:
    from core.evaluation.metrics import resample

    sharp = pictures(6)
    bank = imagined(9, seed=5)["identity"]
    rows = outside_judge.set_against({
        "photographs": outside_judge.figures(sharp, imagined(6), bank),
        "drawn": outside_judge.figures(resample(sharp, 64), imagined(6, seed=2), bank),
    })
    assert rows["photographs"]["fine_detail"] == 1 and rows["drawn"]["fine_detail"] < 0.9
    told = outside_judge.write(rows, {"seed": 0}, tmp_path)
    assert "drawn: softer than photographs" in told and "photographs: softer" not in told
    assert "nearest training person" in told and "spread of identities" in told
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"]["drawn"]["n"] == 6 and report["settings"] == {"seed": 0}
    assert report["rows"]["drawn"]["nearest_least"] > 0
    for heading in ("BlazeFace", "HOG", "MTCNN", "well-formed", "over photographs'", "fine detail"):
        assert f"| {heading} |" in (tmp_path / "table.md").read_text()


def test_pictures_are_read_from_arrays_and_folders(tmp_path: Path) -> None:
    given = pictures(3)
    np.save(tmp_path / "given.npy", given)
    assert np.array_equal(outside_judge.read_pictures(tmp_path / "given.npy"), given)
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, picture in enumerate(given):
        Image.fromarray(picture).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no image")
    assert np.array_equal(outside_judge.read_pictures(folder), given)
    Image.fromarray(pictures(1)[0]).resize((300, 256)).save(folder / "wide.png")
    assert outside_judge.read_pictures(folder).shape == (4, 128, 128, 3)
    np.save(tmp_path / "floats.npy", given / 255)
    with pytest.raises(ValueError, match="uint8"):
        outside_judge.read_pictures(tmp_path / "floats.npy")
    np.save(tmp_path / "one.npy", given[:1])
    with pytest.raises(ValueError, match="two images"):
        outside_judge.read_pictures(tmp_path / "one.npy")


def test_cutting_and_putting_back_are_inverse() -> None:
    box, angle = np.array([20.0, 30, 100, 110]), 0.3
    spots = np.array([[50.0, 60], [80, 70]])
    picture = np.zeros((128, 128, 3), np.uint8)
    picture[58:63, 48:53] = 255  # about the first spot
    seen = outside_networks.cut(picture, box, 160, angle)[..., 0].astype(float)
    y, x = (float((seen * grid).sum() / seen.sum()) for grid in np.mgrid[:160, :160])
    assert outside_networks.put_back(np.array([[x + 0.5, y + 0.5]]), box, 160, angle)[0] == pytest.approx(
        spots[0] + 0.5, abs=0.2)  # fmt: skip


def test_mirrored_landmarks_mirror_back() -> None:
    assert np.array_equal(outside_networks.MIRROR[outside_networks.MIRROR], np.arange(68))
    assert outside_networks.MESH.shape == (68,)


def test_tensors_of_a_manifest_are_read_and_checked(tmp_path: Path) -> None:
    small, whole = np.array([0, 128, 255], np.uint8), np.array([[1.5, -2.0]], np.float32)
    (tmp_path / "a.bin").write_bytes(small.tobytes() + whole.tobytes()[:3])
    (tmp_path / "b.bin").write_bytes(whole.tobytes()[3:])
    weights = [{"name": "small", "shape": [3], "dtype": "float32",
                "quantization": {"dtype": "uint8", "scale": 0.5, "min": -1.0}},
               {"name": "whole", "shape": [1, 2], "dtype": "float32"}]  # fmt: skip
    found = read_tensors([{"paths": ["a.bin", "b.bin"], "weights": weights}], tmp_path)
    assert found["small"].tolist() == [-1.0, 63.0, 126.5] and np.array_equal(found["whole"], whole)
    with pytest.raises(ValueError, match="8 bytes that no tensor claims"):
        read_tensors([{"paths": ["a.bin", "b.bin"], "weights": weights[:1]}], tmp_path)
    with pytest.raises(ValueError, match="ends behind"):
        read_tensors([{"paths": ["a.bin"], "weights": weights}], tmp_path)


def test_without_the_networks_one_sentence_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Problem, match="evaluate.py outside --setup"):
        outside_judge.look(pictures(2), tmp_path, home=tmp_path / "nowhere")
    monkeypatch.setattr(outside_setup, "missing", lambda home: [".venv/bin/python"])
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["outside", "--data", str(tmp_path)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "the judge from outside is not installed" in said and "Traceback" not in said


def test_setup_without_npm_says_where_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Problem, match="npm is needed"):
        outside_setup.set_up(tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_package_is_pinned() -> None:
    lines = outside_setup.REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    assert len(pins(outside_setup.REQUIREMENTS)) == len(names)


@pytest.mark.skipif(bool(outside_setup.missing()), reason="the networks are not installed: evaluate.py outside --setup")
def test_the_real_networks_look_at_pictures(tmp_path: Path) -> None:
    """No face anywhere: every row is filled all the same, and none is well-formed. Asked again, the cache answers."""
    seen = outside_judge.look(pictures(3), tmp_path / "cache")
    assert seen["identity"].shape == (3, 128) and seen["cells17"].shape == (3, 17, 17, 64)
    assert (seen["blaze"] < outside_judge.FOUND).all() and np.isfinite(seen["tree"]).all()
    assert (outside_judge.well_formed(seen) < outside_judge.WELL_FORMED).all()
    (kept,) = (tmp_path / "cache").iterdir()
    before = kept.stat().st_mtime_ns
    outside_judge.look(pictures(3), tmp_path / "cache")
    assert kept.stat().st_mtime_ns == before
