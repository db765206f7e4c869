"""Is every form in which a person keeps pictures and captions read as it is meant, and is nothing lost in silence?"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core.training.cropping import EYES, WINDOW, cut, face_window
from core.training.data_preparation import Report, prepare
from core.training.data_sources import How, with_every_split
from core.training.own_pictures import ALONE
from dataset import DataError, FaceStore, main

NUMBER_OF_PICTURES = 12


def png(number: int, size: tuple[int, int] = (128, 128)) -> bytes:
    """A picture of one colour, another for each number."""
    file = io.BytesIO()
    Image.new("RGB", size, (20 * number, 255 - 20 * number, 90)).save(file, "PNG")
    return file.getvalue()


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def pictures(*folders: str) -> dict[str, str | bytes]:
    """Twelve pictures, spread over some folders."""
    return {f"{folders[n % len(folders)]}{n:02}.png": png(n) for n in range(NUMBER_OF_PICTURES)}


def ready(source: Path, tmp_path: Path, **how: Any) -> tuple[FaceStore, Report]:
    report = prepare([source], tmp_path / "out", workers=1, how=How(**how))
    return FaceStore.open(tmp_path / "out"), report


def test_the_imagefolder_form_with_csv_and_jsonl(tmp_path: Path) -> None:
    """`file_name` is relative to its table, a folder names the split, and what has no caption is told."""
    files = pictures("train/", "train/", "train/", "test/")
    rows = [f"{n:02}.png,thing number {n},1" for n in range(11) if n % 4 != 3]
    files["train/metadata.csv"] = "\n".join(["file_name,text,label", *rows, "gone.png,nothing,0", "08.png,,0"])
    files["test/metadata.jsonl"] = "\n".join(
        json.dumps({"file_name": f"{n:02}.png", "text": [f"thing {n}", f"number {n}"]}) for n in (3, 7, 11))
    store, report = ready(write(tmp_path / "in", files), tmp_path)
    assert report.manifest["form"] == "imagefolder" and report.manifest["attributes"] is False
    assert store.text_labels == {
        **{f"train/{n:02}.png": [f"thing number {n}"] for n in range(11) if n % 4 != 3},
        **{f"test/{n:02}.png": [f"thing {n}", f"number {n}"] for n in (3, 7, 11)}}
    assert dict(zip(store.image_id.tolist(), store.split.tolist(), strict=True)) == {
        one: one.split("/")[0] for one in store.text_labels}
    assert report.manifest["problems"]["row without image"]["examples"] == ["train/gone.png"]
    assert "1 rows of train/metadata.csv have no caption" in report.text()


def test_a_table_with_columns_of_captions(tmp_path: Path) -> None:
    """Any name of the table, `;` between cells, several captions; `split` is read; columns can be named."""
    rows = [f"{n:02}.png;one {n};two {n};{'valid' if n < 2 else 'training'};noted {n}" for n in range(12)]
    files = pictures("") | {"list.csv": "\n".join(["Image;caption_1;caption_2;split;remark", *rows])}
    source = write(tmp_path / "in", files)
    store, report = ready(source, tmp_path)
    assert report.manifest["form"] == "table" and store.text_labels["03.png"] == ["one 3", "two 3"]
    assert store.split.tolist() == ["val", "val", *["train"] * 10]
    other = tmp_path / "other"
    assert main(["--prepare", "--source", str(source), "--out", str(other), "--caption-columns", "remark"]) == 0
    assert FaceStore.open(other).text_labels["03.png"] == ["noted 3"]
    with pytest.raises(DataError, match="--caption-columns colour: no table has .* list.csv has Image, caption_1"):
        ready(source, tmp_path / "third", caption_columns=("colour",))


def test_text_beside_each_picture(tmp_path: Path) -> None:
    files = pictures("a/", "b/") | {f"{'ab'[n % 2]}/{n:02}.txt": f"thing {n}\n\n number  {n} \n" for n in range(11)}
    store, report = ready(write(tmp_path / "in", files), tmp_path)
    assert report.manifest["form"] == "sidecars" and len(store) == 11
    assert store.text_labels["b/03.png"] == ["thing 3", "number 3"]
    assert report.manifest["problems"]["image without row"]["examples"] == ["b/11.png"]


def test_tar_shards_of_webdataset(tmp_path: Path) -> None:
    """Two shards count from 0 both: nothing of one takes the place of the other's. A plain zip works the same way."""
    (tmp_path / "in").mkdir()
    for shard, name in enumerate(("train-000", "val-000")):
        with tarfile.open(tmp_path / "in" / f"{name}.tar", "w") as tar:
            for n in range(6):
                said = json.dumps({"caption": f"thing {6 * shard + n}"})
                members = {"png": png(6 * shard + n), "json": said.encode()}
                for suffix, content in members.items():
                    info = tarfile.TarInfo(f"{n:04}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    store, report = ready(tmp_path / "in", tmp_path)
    assert report.manifest["form"] == "webdataset" and not report.manifest["problems"] and len(store) == 12
    assert store.text_labels["val-000/0003.png"] == ["thing 9"] and store.split.tolist() == ["train"] * 6 + ["val"] * 6
    assert (store.images[9] == np.array((180, 75, 90))).all()
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name, content in (pictures("x/") | {f"x/{n:02}.txt": f"thing {n}" for n in range(12)}).items():
            archive.writestr(name, content)
    zipped, _ = ready(tmp_path / "all.zip", tmp_path / "zipped")
    assert zipped.text_labels["x/09.png"] == ["thing 9"] and (zipped.images[9] == np.array((180, 75, 90))).all()


def test_folders_and_pictures_alone(tmp_path: Path) -> None:
    store, report = ready(write(tmp_path / "sorted", pictures("train/red_cat/", "test/dog/")), tmp_path / "a")
    assert report.manifest["form"] == "folders" and set(store.split) == {"train", "test"}
    assert store.text_labels["train/red_cat/02.png"] == ["red cat"] and store.text_labels["test/dog/03.png"] == ["dog"]
    store, report = ready(write(tmp_path / "alone", pictures("")), tmp_path / "b")
    assert report.manifest["form"] == "pictures alone" and store.text_labels["02.png"] == [ALONE]
    assert "nothing is said of these pictures" in report.text()
    assert [int((store.split == name).sum()) for name in ("val", "test")] == [2, 2]  # chance alone would leave none


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    for name, content, says in (
        ("train.parquet", b"PAR1", "train.parquet is parquet, .* `datasets` and `pyarrow`"),
        ("metadata.jsonl", '{"file_name": "00.png", "text": "a"}\n{"file', "metadata.jsonl line 2 is .* not JSON"),
        ("metadata.jsonl", "[1]\n", r"metadata.jsonl line 1 is '\[1\]'; expected a JSON object"),
        ("00.json", "{", "00.json is not JSON"),
        ("00.txt", b"\xff\xfe", "00.txt is not UTF-8 text"),
    ):
        source = write(tmp_path / f"{name}-{len(content)}", pictures("") | {name: content})
        with pytest.raises(DataError, match=says):
            ready(source, tmp_path / "out")
    with pytest.raises(DataError, match="--crop is 'oval'; it must be one of center"):
        ready(source, tmp_path / "out", crop="oval")
    with pytest.raises(DataError, match="--crop face needs the places of the eyes"):
        ready(write(tmp_path / "blind", pictures("")), tmp_path / "out", crop="face")
    unread = write(tmp_path / "unread", {**pictures(""), "photo.heic": b"ftypheic"})
    assert "photo.heic" in ready(unread, tmp_path / "heic")[1].manifest["problems"]["undecodable"]["examples"][0]


def test_small_pictures_are_trained_on(tmp_path: Path) -> None:
    """Where most are smaller than the model's, none would be left of those that count as sharp."""
    store, report = ready(write(tmp_path / "in", {f"{n:02}.png": png(n, (64, 48)) for n in range(12)}), tmp_path)
    assert len(store.select("train", 128)) + len(store.select("val", 128)) + len(store.select("test", 128)) == 12
    assert "12 of 12 images are smaller than 128 px: they were enlarged and count as sharp" in report.text()


def test_the_same_picture_twice_stays_in_one_split(tmp_path: Path) -> None:
    copies = {f"copy-{n:02}.png": png(n) for n in range(12)}
    store, report = ready(write(tmp_path / "in", pictures("") | copies), tmp_path)
    assert "12 images show what an earlier one shows (copy-00.png and 00.png; " in report.text()
    split = dict(zip(store.image_id.tolist(), store.split.tolist(), strict=True))
    assert all(split[f"{n:02}.png"] == split[f"copy-{n:02}.png"] for n in range(12)) and len(set(split.values())) == 3


def test_every_split_has_pictures() -> None:
    keys = [f"{n}.png" for n in range(400)]
    split = with_every_split(np.array(["train"] * 400), keys)
    assert {name: int((split == name).sum()) for name in ("val", "test")} == {"val": 10, "test": 10}
    same = np.array(["train"] * 9)
    assert (with_every_split(same, keys[:9]) == same).all()  # too few to keep any back


def test_crops(tmp_path: Path) -> None:
    """What is kept of a tall image with a light band at the top, a middle and a dark end."""
    tall = np.full((384, 128, 3), 128, np.uint8)
    tall[:128], tall[256:] = 255, 0
    image = Image.fromarray(tall)
    assert cut(image, "captions", 0, "center")[0].mean() == pytest.approx(128, abs=2)
    assert cut(image, "captions", 0, "top")[0].mean() > 253
    padded, px = cut(image, "captions", 0, "pad")
    assert px == 128 and padded[64, :40].min() == 255 and padded[64, 64, 0] == pytest.approx(128, abs=2)
    assert padded[120, 64].max() < 5


def test_the_face_window_has_the_eyes_where_celeba_has_them(tmp_path: Path) -> None:
    x, y = (WINDOW[0] + WINDOW[2]) / 2, WINDOW[1] + 0.42 * 160
    assert face_window((x - EYES / 2, y), (x + EYES / 2, y)) == pytest.approx(WINDOW)
    photo = Image.new("RGB", (600, 400), "gray")
    for eye in (90, 150):  # near the border: what lies beyond it repeats it
        photo.paste((255, 0, 0), (eye - 6, 94, eye + 6, 106))
    file = io.BytesIO()
    photo.save(file, "PNG")
    rows = "image_id,lefteye_x,lefteye_y,righteye_x,righteye_y\n00.png,90,100,150,100\n"
    source = write(tmp_path / "in", {"00.png": file.getvalue(), "01.png": png(1), "00.txt": "ann", "01.txt": "bob",
                                     "list_landmarks.csv": rows})
    store, report = ready(source, tmp_path, crop="face")
    found = np.argwhere(store.images[0][..., 0].astype(int) - store.images[0][..., 1] > 100)
    assert found[:, 0].mean() == pytest.approx(0.42 * 128, abs=2) and found[:, 1].mean() == pytest.approx(63.5, abs=2)
    assert "1 of 2 images are cut around the eyes" in report.text() and report.manifest["crop"] == "face"
    again, other = ready(source, tmp_path, crop="center")  # another crop is another store
    assert other.rebuilt and not np.array_equal(again.images[0], store.images[0])
