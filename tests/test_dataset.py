"""Does preparation turn every shape of source into one true store, lose no work, and tell what is broken?"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import dataset
from core.text.lexicon import ATTRIBUTES
from core.training.data_preparation import prepare
from core.training.data_sources import drawn_split, keep_people_together, read_pairs
from core.training.source_files import scan
from core.training.synthetic_faces import draw_face, random_attributes
from dataset import DataError, FaceStore, load_text_labels, main, synthetic_store

REPO = Path(__file__).resolve().parents[1]
COUNT = 24
Attributes = dict[str, bool]


def encode(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.fixture(scope="session")
def people() -> dict[str, tuple[bytes, Attributes]]:
    """image id -> (JPEG of 178x218 with a drawn face in CelebA's window, attributes)."""
    made = {}
    for number in range(1, COUNT + 1):
        rng = random.Random(number)
        attributes = random_attributes(rng)
        aligned = Image.new("RGB", (178, 218), "gray")
        aligned.paste(Image.fromarray(draw_face(attributes, rng)).resize((160, 160)), (9, 44))
        made[f"{number:06d}.jpg"] = (encode(aligned, quality=90), attributes)
    return made


def partition_of(image_id: str) -> int:
    return (0, 0, 0, 1, 2, 0)[int(image_id[:6]) % 6]


def kaggle_lists(attributes: Mapping[str, Attributes]) -> dict[str, str]:
    rows = [",".join([one, *("1" if has[name] else "-1" for name in ATTRIBUTES)]) for one, has in attributes.items()]
    return {
        "list_attr_celeba.csv": "\r\n".join([",".join(["image_id", *ATTRIBUTES]), *rows]) + "\r\n",
        "list_eval_partition.csv": "image_id,partition\r\n" + "".join(f"{i},{partition_of(i)}\r\n" for i in attributes),
    }


def official_lists(attributes: Mapping[str, Attributes], identity: Callable[[str], int]) -> dict[str, str]:
    rows = [" ".join([one, *(" 1" if has[name] else "-1" for name in ATTRIBUTES)]) for one, has in attributes.items()]
    return {
        "list_attr_celeba.txt": "\n".join([str(len(rows)), " ".join(ATTRIBUTES) + " ", *rows]) + "\n",
        "list_eval_partition.txt": "".join(f"{i} {partition_of(i)}\n" for i in attributes),
        "identity_CelebA.txt": "".join(f"{i} {identity(i)}\n" for i in attributes),
    }


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def kaggle_files(people: Mapping[str, tuple[bytes, Attributes]]) -> dict[str, str | bytes]:
    pictures = {f"img_align_celeba/img_align_celeba/{one}": jpeg for one, (jpeg, _) in people.items()}
    return {**kaggle_lists({one: has for one, (_, has) in people.items()}), **pictures}


def zip_files(path: Path, files: Mapping[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def kaggle(tmp_path: Path, people: dict) -> Path:
    return write_files(tmp_path / "kaggle", kaggle_files(people))


def examples(manifest: Mapping, problem: str) -> list[str]:
    return manifest["problems"].get(problem, {"examples": []})["examples"]


# Sources


def test_kaggle_folder_becomes_a_store(kaggle: Path, tmp_path: Path, people: dict) -> None:
    report = prepare([kaggle], tmp_path / "out")
    store = FaceStore.open(tmp_path / "out")
    assert report.rebuilt and report.resumed == 0 and not report.manifest["problems"]
    assert store.images.shape == (COUNT, 128, 128, 3) and store.images.dtype == np.uint8
    assert isinstance(store.images, np.memmap)
    assert store.image_id.tolist() == sorted(people)
    assert store.split.tolist() == [("train", "val", "test")[partition_of(one)] for one in store.image_id]
    expected = [[people[one][1][name] for name in ATTRIBUTES] for one in store.image_id]
    assert store.attributes.tolist() == expected and store.attributes.dtype == bool
    assert set(store.px.tolist()) == {128} and set(store.identity.tolist()) == {-1}
    assert (store.identity.dtype, store.px.dtype) == (np.int64, np.int16)
    assert not list((tmp_path / "out").glob("*partial*")) and not list((tmp_path / "out").glob("progress*"))
    with Image.open(io.BytesIO(people["000003.jpg"][0])) as image:
        face = np.asarray(image.crop((9, 44, 169, 204)).resize((128, 128), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(store.images[2].astype(int) - face)[2:-2, 2:-2].max() <= 1  # at the rim the filter sees beyond it


def test_the_sample_of_the_real_archive(tmp_path: Path, kaggle: Path) -> None:
    """The 500 files of a real download where they are at hand, drawn ones of the same layout where they are not."""
    given = Path(os.environ.get("CELEBA_DIR", REPO.parent / "shared" / "celeba")) / "kaggle-sample"
    source = given if given.is_dir() else kaggle
    table = pd.read_csv(source / "list_attr_celeba.csv")
    report = prepare([source], tmp_path / "out", workers=1)
    store = FaceStore.open(tmp_path / "out")
    assert len(store) == len(table) == len(list(source.rglob("*.jpg"))) and not report.manifest["problems"]
    assert np.array_equal(store.attributes, (table.sort_values("image_id")[list(ATTRIBUTES)] == 1).to_numpy())
    assert all(len(store.select(split)) for split in ("train", "val", "test"))
    assert "whole of CelebA has 202,599" in report.text()
    contrast = store.images[::7].reshape(len(store.images[::7]), -1).std(axis=1)
    assert contrast.min() > 5  # no black or empty image


def test_zip_gives_the_same_store_as_the_folder(kaggle: Path, tmp_path: Path, people: dict) -> None:
    archive = zip_files(tmp_path / "archive.zip", {**kaggle_files(people), "__MACOSX/._000001.jpg": b"twin"})
    prepare([kaggle], tmp_path / "a")
    prepare([archive], tmp_path / "b")
    a, b = FaceStore.open(tmp_path / "a"), FaceStore.open(tmp_path / "b")
    assert np.array_equal(a.images, b.images) and np.array_equal(a.attributes, b.attributes)
    moved = prepare([kaggle], tmp_path / "b")  # one source, wherever and however it lies
    assert not moved.rebuilt and "nothing to do" in moved.text()


def spoil(path: Path, member: str, how: str) -> None:
    """Make one member of a zip unreadable: encrypted, of an unknown method, with another checksum or another name."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        local = archive.getinfo(member).header_offset
    name = member.encode()
    central = data.rindex(name) - 46
    assert data[central : central + 4] == b"PK\x01\x02"
    if how == "password":
        data[local + 6] |= 1
        data[central + 8] |= 1
    elif how == "method":  # 99: what WinZip calls AES
        data[local + 8] = data[central + 10] = 99
    elif how == "checksum":
        data[local + 30 + len(name) + 9] ^= 0xFF
    else:
        data[local + 30] = ord("x")
    path.write_bytes(data)


@pytest.mark.parametrize(("how", "reason"), [
    ("password", "it is encrypted; unpack the zip"), ("method", "compression method is not supported"),
    ("checksum", "Bad CRC-32"), ("name", "differ"),
])  # fmt: skip
def test_a_member_that_cannot_be_read_is_one_sentence_that_names_it(
    how: str, reason: str, tmp_path: Path, people: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    """The attribute list, without which there is nothing to learn, and an image, without which there is one less."""
    archive = zip_files(tmp_path / "celeba.zip", kaggle_files(people))
    spoil(archive, "list_attr_celeba.csv", how)
    assert main(["--prepare", "--source", str(archive), "--out", str(tmp_path / "none")]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in said if line.startswith("error: ")]) == 1 and "Traceback" not in "".join(said)
    assert "celeba.zip: the member list_attr_celeba.csv cannot be read: " in said[-1]
    assert reason in said[-1]
    picture = "img_align_celeba/img_align_celeba/000003.jpg"
    archive = zip_files(tmp_path / "other.zip", kaggle_files(people))
    spoil(archive, picture, how)
    report = prepare([archive], tmp_path / "out", workers=1)
    found = examples(report.manifest, "undecodable")
    assert len(found) == 1 and picture in found[0] and reason in found[0] and report.manifest["count"] == COUNT - 1


def test_a_zip_with_an_unreadable_directory_is_named(tmp_path: Path, people: dict) -> None:
    archive = zip_files(tmp_path / "celeba.zip", kaggle_files(people))
    data = bytearray(archive.read_bytes())
    central = data.rindex(b"PK\x01\x02")
    data[central + 6] = 99  # needs version 9.9 of the format to be extracted
    archive.write_bytes(data)
    with pytest.raises(DataError, match="celeba.zip: zip file version 9.9"):
        prepare([archive], tmp_path / "out")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_with_backslashes_are_paths(kind: str, tmp_path: Path, people: dict, kaggle: Path) -> None:
    """Some programs for Windows write them into archives; the store is that of the folder."""
    files = kaggle_files(people)
    if kind == "zip":
        archive = zip_files(tmp_path / "celeba.zip", {f"celeba\\{name}".replace("/", "\\"): content
                                                      for name, content in files.items()})
    else:
        archive = tmp_path / "celeba.tar"
        with tarfile.open(archive, "w") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(f"celeba\\{name}".replace("/", "\\"))
                data = content.encode() if isinstance(content, str) else content
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    report = prepare([archive], tmp_path / "out", workers=1)
    plain = prepare([kaggle], tmp_path / "plain", workers=1)
    assert report.manifest["fingerprint"] == plain.manifest["fingerprint"] and not report.manifest["problems"]


def test_image_ids_with_backslashes_are_paths(tmp_path: Path, people: dict) -> None:
    jpeg = people["000001.jpg"][0]
    labels = json.dumps({"red\\a.jpg": "red", "blue\\a.jpg": "blue"})
    folder = write_files(tmp_path / "own", {"red/a.jpg": jpeg, "blue/a.jpg": jpeg, "text_labels.json": labels})
    report = prepare([folder], tmp_path / "out", workers=1)
    assert report.manifest["count"] == 2 and not report.manifest["problems"]


def test_official_lists_with_a_zip_of_pictures_and_identities(tmp_path: Path, people: dict) -> None:
    attributes = {one: has for one, (_, has) in people.items()}
    files = official_lists(attributes, lambda one: 100 + (int(one[:6]) - 1) // 6)  # six images a person, all splits
    source = write_files(tmp_path / "celeba", files)
    pictures = {f"img_align_celeba/{one}": jpeg for one, (jpeg, _) in people.items()}
    zip_files(source / "img_align_celeba.zip", pictures)
    report = prepare([source], tmp_path / "out")
    store = FaceStore.open(tmp_path / "out")
    assert report.manifest["sources"]["kind"] == "official" and len(store) == COUNT
    assert store.identity.tolist() == [100 + row // 6 for row in range(COUNT)]
    assert set(store.split.tolist()) == {"train"}  # four of each person's six images were there
    assert any(note.startswith("4 people were in several splits") for note in report.manifest["notes"])
    assert store.attributes.tolist() == [[attributes[one][name] for name in ATTRIBUTES] for one in sorted(attributes)]


def shard_files(folder: Path) -> pd.DataFrame:
    """Two tars of WebP images, 128, 80 and 58 px, with their metadata.csv."""
    rows = []
    members: dict[str, dict[str, bytes]] = {"train-soft.tar": {}, "test-128px.tar": {}}
    for number, (px, split) in enumerate([(128, "test"), (80, "train"), (58, "train"), (128, "test")] * 3, start=1):
        attributes = random_attributes(random.Random(number))
        face = Image.fromarray(draw_face(attributes, random.Random(number))).resize((px, px))
        shard = "train-soft.tar" if split == "train" else "test-128px.tar"
        members[shard][f"{number:06d}.webp"] = encode(face, "WEBP", quality=92)
        values = {name: int(has) for name, has in attributes.items()}
        name = f"{number:06d}.jpg"
        rows.append({"image_id": name, "split": split, "identity": number, "px": px, "shard": shard, **values})
    folder.mkdir()
    for shard, pictures in members.items():
        with tarfile.open(folder / shard, "w") as tar:
            for name, content in reversed(pictures.items()):  # members lie in any order
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    table = pd.DataFrame(rows)
    table.to_csv(folder / "metadata.csv", index=False)
    return table


def test_shards_keep_px_split_and_identity(tmp_path: Path, kaggle: Path) -> None:
    table = shard_files(tmp_path / "shards")
    kaggle.rename(tmp_path / "shards" / "kaggle-sample")  # another layout lies within: the shards' own list rules
    report = prepare([tmp_path / "shards"], tmp_path / "out")
    store = FaceStore.open(tmp_path / "out")
    assert not report.manifest["problems"] and report.manifest["sources"]["kind"] == "shards"
    assert store.image_id.tolist() == table["image_id"].tolist()
    assert store.px.tolist() == table["px"].tolist() and store.identity.tolist() == table["identity"].tolist()
    with tarfile.open(tmp_path / "shards" / "test-128px.tar") as tar:
        member = tar.extractfile("000001.webp")
        assert member is not None
        with Image.open(member) as image:
            assert np.array_equal(store.images[0], np.asarray(image.convert("RGB")))  # 128 px: as it is
    for row in store.select("train"):
        drawn = draw_face(dict(zip(ATTRIBUTES, store.attributes[row], strict=True)), random.Random(int(row) + 1))
        assert np.abs(store.images[row].astype(int) - drawn).mean() < 16  # enlarged, and the right face
    (tmp_path / "shards" / "train-soft.tar").unlink()
    report = prepare([tmp_path / "shards"], tmp_path / "less")
    assert examples(report.manifest, "missing shard") == ["train-soft.tar"]
    assert report.manifest["problems"]["row without image"]["count"] == 6 and report.manifest["count"] == 6


def test_window_is_cut_at_the_known_place(tmp_path: Path) -> None:
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[:, :] = (255, 0, 0)  # red outside the window
    pixels[44:204, 9:169] = 0
    pixels[119:129, 84:94] = (0, 255, 0)  # centred on (89, 124)
    pixels[44:54, 9:19] = (0, 0, 255)  # the window's first corner
    pixels[194:204, 159:169] = (255, 255, 255)  # and its last
    png = encode(Image.fromarray(pixels), "PNG")
    lists = kaggle_lists({"000007.jpg": random_attributes(random.Random(0))})
    prepare([write_files(tmp_path / "in", {**lists, "images/000007.png": png})], tmp_path / "out")
    cut = FaceStore.open(tmp_path / "out").images[0]
    for place, colour in ((64, (0, 255, 0)), (2, (0, 0, 255)), (125, (255, 255, 255))):
        assert np.abs(cut[place, place].astype(int) - colour).max() < 12
    rows, columns = np.nonzero(cut[..., 1] > 127)
    inner = (rows < 100) & (columns < 100)
    assert (rows[inner].mean(), columns[inner].mean()) == (63.5, 63.5)  # 128 / 160 of a square around the centre
    assert not ((cut[..., 0] > 40) & (cut[..., 1] < 40)).any()  # nothing red came in, or next to nothing at the rim


# Interruption


def many(people: dict, count: int = 200) -> dict[str, tuple[bytes, Attributes]]:
    source = list(people.values())
    return {f"{number:06d}.jpg": source[number % COUNT] for number in range(1, count + 1)}


def test_a_killed_run_continues(tmp_path: Path, people: dict, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_files(tmp_path / "in", kaggle_files(many(people))), tmp_path / "out"
    code = (
        "import os, signal, sys\n"
        "from core.training.data_preparation import prepare\n"
        "def kill(done, total):\n"
        "    if done >= 64: os.kill(os.getpid(), signal.SIGKILL)\n"
        "if __name__ == '__main__': prepare([sys.argv[1]], sys.argv[2], workers=2, on_progress=kill)\n"
    )
    script = write_files(tmp_path, {"killed.py": code}) / "killed.py"
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    killed = subprocess.run([sys.executable, script, source, out], env=environment, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(DataError, match="no complete prepared store.*--prepare"):
        FaceStore.open(out)
    assert main(["--prepare", "--source", str(source), "--out", str(out), "--workers", "1"]) == 0
    assert "continued an earlier run: 64 had been decoded before" in capsys.readouterr().out
    prepare([source], tmp_path / "whole")
    continued, whole = FaceStore.open(out), FaceStore.open(tmp_path / "whole")
    assert np.array_equal(continued.images, whole.images) and len(whole) == 200


def test_interrupted_work_of_another_source_is_not_continued(tmp_path: Path, people: dict) -> None:
    out = tmp_path / "out"

    def interrupt(done: int, total: int) -> None:
        assert total == 200
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([write_files(tmp_path / "a", kaggle_files(many(people)))], out, on_progress=interrupt)
    assert (out / "progress.npz").is_file()
    other = dict(list(many(people).items())[:150])
    report = prepare([write_files(tmp_path / "b", kaggle_files(other))], out)
    assert report.resumed == 0 and report.manifest["count"] == 150


def test_a_damaged_progress_file_begins_again(tmp_path: Path, kaggle: Path) -> None:
    write_files(tmp_path / "out", {"progress.npz": b"PK\x03\x04 half", "images.partial.npy": b"half"})
    report = prepare([kaggle], tmp_path / "out")
    assert report.resumed == 0 and len(FaceStore.open(tmp_path / "out")) == COUNT


def test_several_processes_give_what_one_gives(tmp_path: Path, people: dict) -> None:
    source = zip_files(tmp_path / "in.zip", kaggle_files(many(people, 130)))
    prepare([source], tmp_path / "one", workers=1)
    seen: list[tuple[int, int]] = []
    prepare([source], tmp_path / "two", workers=2, on_progress=lambda done, total: seen.append((done, total)))
    assert np.array_equal(FaceStore.open(tmp_path / "one").images, FaceStore.open(tmp_path / "two").images)
    assert seen[-1] == (130, 130) and len(seen) == 3


def test_a_changed_source_is_prepared_anew(kaggle: Path, tmp_path: Path) -> None:
    assert prepare([kaggle], tmp_path / "out").rebuilt
    assert not prepare([kaggle], tmp_path / "out").rebuilt
    (tmp_path / "out" / "images.npy").write_bytes(b"cut short")
    assert prepare([kaggle], tmp_path / "out").rebuilt  # a damaged store is not taken for a complete one
    (kaggle / "img_align_celeba/img_align_celeba/000002.jpg").unlink()
    report = prepare([kaggle], tmp_path / "out")
    assert report.rebuilt and len(FaceStore.open(tmp_path / "out")) == COUNT - 1
    assert examples(report.manifest, "row without image") == ["000002.jpg"]
    again = prepare([kaggle], tmp_path / "out")
    assert not again.rebuilt and "row without image: 1 (000002.jpg)" in again.text()


# What is broken


def test_broken_pictures_are_reported_and_the_rest_stay_with_their_labels(
    kaggle: Path, tmp_path: Path, people: dict
) -> None:
    folder = kaggle / "img_align_celeba" / "img_align_celeba"
    (folder / "000001.jpg").write_bytes(people["000001.jpg"][0][:2000])
    (folder / "000005.jpg").write_bytes(b"<html>404</html>")
    (folder / "000006.jpg").write_bytes(b"")
    (folder / "000009.jpg").write_bytes(encode(Image.new("RGB", (178, 180))))
    (folder / "000011.jpg").unlink()
    (folder / "999999.jpg").write_bytes(people["000001.jpg"][0])
    report = prepare([kaggle], tmp_path / "out")
    problems = {name: found["count"] for name, found in report.manifest["problems"].items()}
    assert problems == {"row without image": 1, "image without row": 1, "undecodable": 3, "wrong size": 1}
    text = report.text()
    assert "000011.jpg" in text and "999999.jpg" in text and "000009.jpg: wrong size 178x180, expected 178x218" in text
    store = FaceStore.open(tmp_path / "out")
    bad = {"000001.jpg", "000005.jpg", "000006.jpg", "000009.jpg", "000011.jpg"}
    assert store.image_id.tolist() == [one for one in sorted(people) if one not in bad]
    for row, image_id in enumerate(store.image_id):
        with Image.open(io.BytesIO(people[str(image_id)][0])) as image:
            expected = np.asarray(image.resize((128, 128), Image.Resampling.LANCZOS, box=(9, 44, 169, 204)))
        assert np.array_equal(store.images[row], expected)
        assert store.attributes[row].tolist() == [people[str(image_id)][1][name] for name in ATTRIBUTES]


def test_every_mode_and_orientation_is_decoded(tmp_path: Path) -> None:
    colour = Image.new("RGB", (178, 218), (200, 40, 40))
    grey = np.full((218, 178), 128, np.uint8)
    upright = np.zeros((218, 178, 3), np.uint8)
    upright[:109] = 255  # light above, dark below
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    lying = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    glass = Image.new("RGBA", (178, 218), (0, 0, 0, 0))
    pictures = {
        "000001.jpg": encode(colour.convert("CMYK")),
        "000002.jpg": encode(Image.fromarray(grey)),
        "000003.jpg": encode(lying, exif=exif.tobytes(), quality=95),
        "000004.png": encode(glass, "PNG"),
        "000005.png": encode(Image.fromarray(grey.astype(np.uint16) << 8), "PNG"),
        "000006.png": encode(colour.convert("P"), "PNG", transparency=b"\xff" * 8),
    }
    lists = kaggle_lists({f"00000{number}.jpg": random_attributes(random.Random(number)) for number in range(1, 7)})
    report = prepare([write_files(tmp_path / "in", {**lists, **pictures})], tmp_path / "out")
    assert not report.manifest["problems"]
    images = FaceStore.open(tmp_path / "out").images.astype(int)
    middle = images[:, 64, 64]
    assert np.abs(middle[0] - (200, 40, 40)).max() < 12 and np.abs(middle[1] - 128).max() < 3
    assert images[2, :40].mean() > 250 and images[2, 70:].mean() < 5
    assert middle[3].tolist() == [255, 255, 255] and np.abs(middle[4] - 128).max() <= 1
    assert middle[5][0] > 150 and middle[5][1] < 80


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("list_attr_celeba.csv", "image_id,Male\n000001.jpg,1\n", "lacks the columns 5_o_Clock_Shadow"),
        ("list_attr_celeba.csv", "", "cannot be read as a table"),
        ("list_eval_partition.csv", "image_id,partition\n000001.jpg,7\n", "partition 7; expected 0, 1 or 2"),
        ("list_eval_partition.csv", "image_id,partition\n000001.jpg,0\n000002.jpg\n", "line 3 is '000002.jpg'"),
    ],
)
def test_a_bad_list_is_refused_by_name(kaggle: Path, tmp_path: Path, name: str, content: str, says: str) -> None:
    (kaggle / name).write_text(content)
    with pytest.raises(DataError, match=says):
        prepare([kaggle], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_attribute_values_are_checked(kaggle: Path, tmp_path: Path) -> None:
    text = (kaggle / "list_attr_celeba.csv").read_text()
    (kaggle / "list_attr_celeba.csv").write_text(text.replace(",1", ",3"))
    with pytest.raises(DataError, match="other than -1, 0 and 1"):
        prepare([kaggle], tmp_path / "out")


def test_half_a_download_is_named(tmp_path: Path, people: dict) -> None:
    archive = zip_files(tmp_path / "archive.zip", kaggle_files(people))
    archive.write_bytes(archive.read_bytes()[:-3000])
    with pytest.raises(DataError, match="archive.zip.*cut short, download it again"):
        prepare([archive], tmp_path / "out")


def test_a_tar_cut_short_gives_what_it_has(tmp_path: Path) -> None:
    shard_files(tmp_path / "shards")
    shard = tmp_path / "shards" / "test-128px.tar"
    with tarfile.open(shard) as tar:
        third = tar.getmembers()[2]
    shard.write_bytes(shard.read_bytes()[: third.offset_data + 100])
    report = prepare([tmp_path / "shards"], tmp_path / "out")
    assert "test-128px.tar: unexpected end of data" in examples(report.manifest, "unreadable archive")
    assert report.manifest["count"] == 6 + 2  # all of the other shard, two of this


def test_only_broken_pictures_make_no_store(tmp_path: Path) -> None:
    lists = kaggle_lists({"000001.jpg": random_attributes(random.Random(0))})
    source = write_files(tmp_path / "in", {**lists, "000001.jpg": b"no image"})
    with pytest.raises(DataError, match="none of the 1 images could be used; the first: 000001.jpg"):
        prepare([source], tmp_path / "out")
    with pytest.raises(DataError, match="no complete prepared store"):
        FaceStore.open(tmp_path / "out")


def test_damaged_stores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no complete prepared store.*python dataset.py --prepare"):
        FaceStore.open(tmp_path / "nowhere")
    store = synthetic_store(tmp_path / "a", 8)
    lines = (store.folder / "index.csv").read_text().splitlines(keepends=True)
    (store.folder / "index.csv").write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match="damaged.*index.csv 7 rows"):
        FaceStore.open(store.folder)
    (store.folder / "index.csv").write_text("".join(lines))
    assert len(FaceStore.open(store.folder)) == 8
    (store.folder / "images.npy").write_bytes((store.folder / "images.npy").read_bytes()[:5000])
    with pytest.raises(DataError, match="damaged"):
        FaceStore.open(store.folder)
    manifest = json.loads((store.folder / "manifest.json").read_text())
    (store.folder / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    with pytest.raises(DataError, match="no complete prepared store"):
        FaceStore.open(store.folder)


# Splits and people


def test_people_stay_together_in_the_split_of_most_of_their_pictures() -> None:
    split = np.array(["train", "train", "val", "test", "test", "val", "val", "test"])
    identity = np.array([1, 1, 1, 2, 2, 3, -1, -1])
    together, crossing = keep_people_together(split, identity)
    assert together.tolist() == ["train", "train", "train", "test", "test", "val", "val", "test"] and crossing == 1
    unknown, none = keep_people_together(split, np.full(8, -1))
    assert unknown.tolist() == split.tolist() and none == 0


def test_without_partition_splits_are_drawn_the_same_each_time(kaggle: Path, tmp_path: Path) -> None:
    (kaggle / "list_eval_partition.csv").unlink()
    report = prepare([kaggle], tmp_path / "out")
    store = FaceStore.open(tmp_path / "out")
    assert store.split.tolist() == [drawn_split(one) for one in store.image_id.tolist()]
    assert any("drawn 90/5/5 %" in note for note in report.manifest["notes"])
    shares = pd.Series([drawn_split(f"{number:06d}.jpg") for number in range(4000)]).value_counts(normalize=True)
    assert shares["train"] == pytest.approx(0.9, abs=0.02) and shares["val"] == pytest.approx(0.05, abs=0.015)


def test_scan_reads_pairs_with_and_without_header(tmp_path: Path) -> None:
    write_files(tmp_path, {"identity_CelebA.txt": "000001.jpg 2880\n000002.jpg 2937\n", ".hidden/000001.jpg": b""})
    entries, unreadable = scan(tmp_path, tmp_path / "out")
    assert [entry.name for entry in entries] == ["identity_CelebA.txt"] and not unreadable
    assert read_pairs(entries[0]) == {"000001.jpg": 2880, "000002.jpg": 2937} and read_pairs(None) == {}


def test_select(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "store", 64)
    assert store.select(None).tolist() == list(range(64)) and store.select().dtype == np.int64
    parts = [store.select(split) for split in ("train", "val", "test")]
    assert sorted(np.concatenate(parts).tolist()) == list(range(64)) and all(len(part) for part in parts)
    for px in (128, 80, 58):
        rows = store.select("train", px)
        assert len(rows) and set(store.px[rows].tolist()) == {px} and set(store.split[rows].tolist()) == {"train"}
    assert not len(store.select("val", 58))
    with pytest.raises(ValueError, match="'dev'; it must be train, val, test or None"):
        store.select("dev")


# A person's own captions


def test_own_captions_stand_instead_of_attributes(tmp_path: Path, people: dict) -> None:
    big = Image.new("RGB", (300, 200), "black")
    big.paste((255, 255, 255), (50, 0, 250, 200))  # the central square
    small = Image.new("RGB", (64, 64), "blue")
    labels = {
        "holiday/ann.png": ["a woman on a beach", "Ann"],
        "bob": "a man",
        "000001.jpg": ["a face"],
        "gone.jpg": ["nobody"],
    }
    files: dict[str, str | bytes] = {
        "text_labels.json": json.dumps(labels),
        "holiday/ann.png": encode(big, "PNG"),
        "other/ann.png": encode(small, "PNG"),
        "bob.webp": encode(small, "WEBP"),
        "000001.jpg": people["000001.jpg"][0],
    }
    report = prepare([write_files(tmp_path / "in", files)], tmp_path / "out")
    store = FaceStore.open(tmp_path / "out")
    assert report.manifest["attributes"] is False and not store.attributes.any()
    assert store.image_id.tolist() == ["000001.jpg", "bob", "holiday/ann.png"] and store.px.tolist() == [128, 64, 128]
    assert store.images[2][:, 2:-2].min() >= 250 and store.images[1][..., 2].min() > 240
    assert store.text_labels == {key: [value] if isinstance(value, str) else value for key, value in labels.items()
                                 if key != "gone.jpg"}  # fmt: skip
    assert {store.caption(2, random.Random(seed)) for seed in range(20)} == set(labels["holiday/ann.png"])
    assert store.caption(2, random.Random(0), empty_share=1.0) == ""
    assert examples(report.manifest, "row without image") == ["gone.jpg"]
    assert examples(report.manifest, "image without row") == ["other/ann.png"]
    summary = dataset.describe(store)
    assert "attributes: unknown" in dataset.report(summary)
    assert {path.name for path in dataset.plot(store, summary, tmp_path / "plots")} == {
        "examples.png", "pixel_histogram.png", "describe.json"}  # fmt: skip


def test_own_captions_replace_attributes_where_asked(kaggle: Path, tmp_path: Path) -> None:
    labels = write_files(tmp_path, {"mine.json": '{"000004.jpg": "a face", "000002": "another"}'}) / "mine.json"
    arguments = ["--prepare", "--source", str(kaggle), "--out", str(tmp_path / "out"), "--text-labels", str(labels)]
    assert main(arguments) == 0
    store = FaceStore.open(tmp_path / "out")
    assert store.image_id.tolist() == ["000002", "000004.jpg"] and store.caption(0, random.Random(0)) == "another"
    assert store.split.tolist()[1] == ("train", "val", "test")[partition_of("000004.jpg")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "holds list"),
        ("{}", "holds no entry"),
        ('{"a.jpg": 3}', "'a.jpg' has 3"),
        ('{"a.jpg": []}', r"'a.jpg' has \[\]"),
        ('{"a.jpg": ["fine", " "]}', "'a.jpg' has the caption ' '"),
        ('{"a.jpg": ["fine", null]}', "'a.jpg' has the caption None"),
        ('{"a.jpg": "one", "a.jpg": "two"}', "'a.jpg' appears twice"),
    ],
)
def test_malformed_captions_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = write_files(tmp_path, {"text_labels.json": text}) / "text_labels.json"
    with pytest.raises(DataError, match=f"text_labels.json.*{says}"):
        load_text_labels(path)


def test_unreadable_captions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        load_text_labels(tmp_path / "absent.json")
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        load_text_labels(write_files(tmp_path, {"latin.json": b'{"a": "caf\xe9"}'}) / "latin.json")


def test_written_captions_are_a_file_that_is_accepted(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "store", 16)
    out, path = str(store.folder), tmp_path / "deep" / "text_labels.json"
    arguments = ["--out", out, "--captions-per-image", "3", "--write-text-labels"]
    assert main([*arguments, str(path)]) == 0
    labels = load_text_labels(path)
    assert list(labels) == store.image_id.tolist() and {len(captions) for captions in labels.values()} == {3}
    assert len({caption for captions in labels.values() for caption in captions}) > 40
    assert main([*arguments, str(tmp_path / "again.json")]) == 0
    assert load_text_labels(tmp_path / "again.json") == labels  # the seed decides
    assert main([*arguments, str(tmp_path / "other.json"), "--seed", "1"]) == 0
    assert load_text_labels(tmp_path / "other.json") != labels
    assert main([*arguments, str(path)]) == 1  # never over what may be a person's own work
    assert load_text_labels(path) == labels


# The drawn stand-in, description, command line


def test_synthetic_store_is_complete_and_the_same_each_time(tmp_path: Path) -> None:
    a, b = synthetic_store(tmp_path / "a", 32, seed=3), synthetic_store(tmp_path / "b", 32, seed=3)
    assert np.array_equal(a.images, b.images) and np.array_equal(a.attributes, b.attributes)
    assert not np.array_equal(a.images, synthetic_store(tmp_path / "b", 32, seed=4).images)
    smallest = synthetic_store(tmp_path / "c", 8)
    assert set(smallest.split.tolist()) == {"train", "val", "test"} and set(smallest.px.tolist()) == {128, 80, 58}
    split_of = {person: set(a.split[a.identity == person].tolist()) for person in a.identity.tolist()}
    assert all(len(splits) == 1 for splits in split_of.values())
    with pytest.raises(ValueError, match="count is 7; at least 8"):
        synthetic_store(tmp_path / "d", 7)


@pytest.mark.parametrize("name", [name for name in ATTRIBUTES if name not in ("Attractive", "Straight_Hair")])
def test_each_attribute_is_seen_in_the_drawn_face(name: str) -> None:
    """Beauty is not drawn, and straight hair is what is neither wavy nor gone."""
    plain = dict.fromkeys(ATTRIBUTES, False) | {"Black_Hair": True, "No_Beard": True, "Young": True, "Smiling": True}
    if name == "5_o_Clock_Shadow":
        plain["No_Beard"] = False
    elif name in ("Blond_Hair", "Brown_Hair", "Gray_Hair"):
        plain["Black_Hair"] = False
    drawn = [draw_face({**plain, name: has}, random.Random(0)).astype(int) for has in (False, True)]
    assert (np.abs(drawn[0] - drawn[1]).max(axis=-1) > 24).sum() >= 20


def test_drawn_faces_never_replace_real_ones(kaggle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare([kaggle], tmp_path / "out")
    assert main(["--synthetic", "16", "--out", str(tmp_path / "out")]) == 1
    assert "real images" in capsys.readouterr().err and len(FaceStore.open(tmp_path / "out")) == COUNT


def test_describe_measures_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plots = str(tmp_path / "out"), tmp_path / "plots"
    assert main(["--synthetic", "40", "--out", out, "--describe", "--plots", str(plots)]) == 0
    text = capsys.readouterr().out
    assert "40 images of 128x128" in text and "people: 20, 2.0 images each, 0 in more than one split" in text
    for name in ("attribute_rates", "correlations", "examples", "pixel_histogram"):
        with Image.open(plots / f"{name}.png") as image:
            assert min(image.size) > 300 and len(image.convert("L").getcolors() or ()) > 20
    store, summary = FaceStore.open(out), json.loads((plots / "describe.json").read_text())
    train = store.attributes[store.split == "train"]
    for column, name in enumerate(ATTRIBUTES):
        assert summary["rates"][name]["train"] == pytest.approx(train[:, column].mean(), abs=1e-4)
    pixels = store.images[store.select("train", 128)] / 127.5 - 1
    assert summary["pixels"]["mean"] == pytest.approx(pixels.mean(axis=(0, 1, 2)).tolist(), abs=1e-3)
    assert summary["pixels"]["std"] == pytest.approx(pixels.std(axis=(0, 1, 2)).tolist(), abs=1e-3)
    assert summary["splits"] == {split: int((store.split == split).sum()) for split in ("train", "val", "test")}


def test_correlations_by_known_answer() -> None:
    attributes = np.array([[1, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]], bool)
    attributes = np.concatenate([attributes, np.ones((4, 1), bool)], axis=1)  # the last never varies
    matrix = dataset.correlations(attributes)
    assert matrix[0, 1] == pytest.approx(1) and matrix[0, 2] == pytest.approx(-1)
    assert matrix[0, 3] == pytest.approx(1 / np.sqrt(3)) and not matrix[4].any()


def run(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_line_finds_what_lies_in_archive(
    tmp_path: Path, people: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = run(["--prepare"], capsys)
    assert code == 1 and "no images with labels in archive" in error
    archive = tmp_path / "archive"
    archive.mkdir()
    (archive / "a-broken.zip").write_bytes(b"half")
    code, _, error = run(["--prepare"], capsys)
    assert code == 1 and "a-broken.zip" in error
    zip_files(archive / "celeba.zip", kaggle_files(people))
    code, text, _ = run(["--prepare"], capsys)
    assert code == 0 and "archive/prepared: 24 images, complete" in text.replace(os.sep, "/")
    assert "nothing missing, nothing broken" in text
    code, text, _ = run(["--prepare", "--describe"], capsys)
    assert code == 0 and "nothing to do" in text and (tmp_path / "runs" / "describe" / "examples.png").is_file()
    assert run(["--write-text-labels"], capsys)[0] == 0 and len(load_text_labels(archive / "text_labels.json")) == COUNT


def test_pictures_and_lists_lying_directly_in_archive(
    tmp_path: Path, people: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "archive", kaggle_files(people))
    synthetic_store(tmp_path / "archive" / "drawn", 8)  # a store beside it is no source
    assert main(["--prepare"]) == 0
    assert len(FaceStore.open(tmp_path / "archive" / "prepared")) == COUNT


def test_command_line_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(["--prepare", "--source", str(tmp_path / "nowhere")], capsys)
    assert code == 1 and "nowhere does not exist" in error
    code, _, error = run(["--describe", "--out", str(tmp_path / "nowhere")], capsys)
    assert code == 1 and "no complete prepared store" in error
    store = synthetic_store(tmp_path / "store", 8)
    arguments = ["--out", str(store.folder), "--write-text-labels", str(tmp_path / "l.json")]
    code, _, error = run([*arguments, "--captions-per-image", "0"], capsys)
    assert code == 1 and "--captions-per-image is 0" in error
    for arguments, says in (([], "nothing to do"), (["--prepare", "--workers", "0"], "--workers is 0")):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2 and says in capsys.readouterr().err
