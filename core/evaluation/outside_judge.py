"""Are drawn faces well-formed, different from each other, and nobody's portrait, by eyes that no one here tuned?

Others trained the networks (`core/evaluation/outside_networks.py`), in an environment of their own; here their
answers become figures. An image is well-formed by how usual its face is among real held-out ones of like pose: do
detectors see it, do landmarkers that know nothing of each other agree, are its mirror image and both its halves the
same person, do eyes and mouth look to dlib's middle layers as real ones do. The five groups make one quantile;
below `WELL_FORMED` are the worst 5 % of photographs, so photographs have 0.95. The statistics of real faces that
this needs (no images) are in models/outside/reference.npz. For measuring only: never a loss, never alone the
choice of weights.

Blind spots, measured on photographs:
- Softness is rewarded: the softest images may score above photographs. Compare at fine detail 0.9 to 1.1 of
  photographs' only; the table says where that does not hold.
- Averaged faces pass; only the spread of identities and a distance between distributions hear them.
- Warps of up to 4 pixels and a single shifted eye nearly pass (0.94, 0.85 of 0.96).
- Glasses (0.82) and hats (0.88) lower photographs too: compare sets of the same captions.
- The signals were chosen while looking at images of this project's models: expect some optimism.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from scipy.special import ndtr, ndtri

from core.evaluation.generation import Generator, Sampling, generate_images, reconstruct
from core.evaluation.metrics import euclidean_distances, mean_pairwise_distance
from core.evaluation.outside_setup import HOME, ROOT, need
from core.evaluation.report import plain
from core.imaging import spectrum
from core.imaging.spectrum import Pictures
from core.nn.checkpoint import write_atomically
from core.process import Problem, clean_env, venv_python

if TYPE_CHECKING:
    from dataset import FaceStore

REFERENCE = ROOT / "models" / "outside" / "reference.npz"
WELL_FORMED = 0.05  # the quantile among real faces below which a face is not
FOUND = 0.5  # BlazeFace's score from which on a face is found
SAME_PERSON = 0.50  # distance of identities below which two images show one person (0.1 % of other pairs do)
MATCHED = (0.9, 1.1)  # fine detail over photographs' between which shares may be compared
GROUPS = {
    "there": ("blaze", "mesh_flag", "hog"),
    "points": ("conv_mesh", "five_mesh", "five_conv", "tree_mesh", "flip", "shape", "off_shape"),
    "identity": ("mirror", "halves", "length"),
    "eyes": ("eyes17", "eyes8"),
    "mouth": ("mouth17", "mouth8"),
}
AREAS = {"eyes": (0.25, 0.50, 0.2, 0.8), "mouth": (0.58, 0.82, 0.3, 0.7)}  # of a face chip: top, bottom, left, right
INNER = slice(17, None)  # the landmarks without the jaw
COLUMNS = (  # (figure, heading)
    ("n", "n"), ("fine_detail", "fine detail"), ("well_formed", "well-formed"),
    ("well_formed_over_photographs", "over photographs'"), ("standard_error", "s.e."),
    ("spread", "spread of identities"),
    ("nearest_median", "nearest training person"), ("nearest_least", "the nearest of all"),
    ("nearest_same_person", "nearer than 0.5 to one"), ("found", "faces found"),
    ("blaze", "BlazeFace"), ("hog", "HOG"), ("mtcnn", "MTCNN"),
)  # fmt: skip
Seen = Mapping[str, np.ndarray]


# ------------------------------------------------------------------------------------------------- asking the networks


def look(pictures: Pictures, cache: Path, what: str = "measure", home: Path = HOME) -> dict[str, np.ndarray]:
    """What the networks see in uint8 images [N, S, S, 3] (`core.evaluation.outside_networks.measure`, or "identify"
    alone), kept below `cache` by the images' hash. Raises Problem when they are not installed or fail."""
    need(home)
    key = hashlib.sha256(f"{what} {pictures.shape} ".encode() + np.ascontiguousarray(pictures).tobytes()).hexdigest()
    kept = cache / f"{what}-{key[:24]}.npz"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as aside:
            given, made = Path(aside) / "pictures.npy", Path(aside) / "seen.npz"
            np.save(given, pictures)
            command = [str(venv_python(home)), "-m", "core.evaluation.outside_networks", what, str(given), str(made)]
            threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
            done = subprocess.run(command, cwd=ROOT, env=clean_env(**threads), capture_output=True, text=True)
            if done.returncode:
                raise Problem(f"the judge from outside failed: {(done.stderr.strip() or '?').splitlines()[-1]}")
            made.replace(kept)
    with np.load(kept, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def read_pictures(path: Path) -> Pictures:
    """Images of a .npy file (uint8 [N, S, S, 3]) or of a folder of image files, all made 128 x 128.

    Raises ValueError when there are fewer than two or they are something else.
    """
    if path.is_dir():
        kinds = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in kinds)
        found = [np.asarray(_square(Image.open(file).convert("RGB"))) for file in files]
        pictures = np.stack(found) if found else np.zeros((0, 128, 128, 3), np.uint8)
    else:
        pictures = np.load(path, allow_pickle=False)
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
            raise ValueError(f"{path}: uint8 [N, height, width, 3] is needed, not {pictures.dtype} {pictures.shape}")
        if pictures.shape[1:3] != (128, 128):
            pictures = np.stack([np.asarray(_square(Image.fromarray(picture))) for picture in pictures])
    if len(pictures) < 2:
        raise ValueError(f"{path}: at least two images are needed, there are {len(pictures)}")
    return pictures


def _square(picture: Image.Image) -> Image.Image:
    """The middle square at 128 x 128; images of that size stay as they are."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    if picture.size == (128, 128):
        return picture
    return picture.resize((128, 128), Image.Resampling.LANCZOS, (left, top, left + side, top + side))


# --------------------------------------------------------------------------------------------------- well-formed or not


@cache
def reference() -> dict[str, np.ndarray]:
    """Statistics of real faces, in float64; the inverse covariances as full matrices."""
    with np.load(REFERENCE, allow_pickle=False) as file:
        found = {name: file[name].astype(np.float64) for name in file.files}
    for cells in ("17", "8"):
        half = found[f"inverse{cells}"]
        size = int((np.sqrt(8 * half.shape[1] + 1) - 1) / 2)
        rows, columns = np.triu_indices(size)
        full = np.zeros((len(half), size, size))
        full[:, rows, columns] = full[:, columns, rows] = half
        found[f"inverse{cells}"] = full
    return found


def to_face(points: np.ndarray, eyes: np.ndarray) -> np.ndarray:
    """Points [N, P, 2] in the face's own frame: the middle of the eyes [N, 2, 2] is 0, they are level and 1 apart."""
    across = eyes[:, 1] - eyes[:, 0]
    length = np.linalg.norm(across, axis=1, keepdims=True).clip(1)
    right = across / length
    down = np.stack([-right[:, 1], right[:, 0]], 1)
    off = (points - eyes.mean(1)[:, None]) / length[:, None]
    return np.stack([(off * right[:, None]).sum(-1), (off * down[:, None]).sum(-1)], -1)


def pose(seen: Seen) -> np.ndarray:
    """How a head is turned, nods and tilts, for what is to be expected of a real face in that pose: [N, 7]."""
    five = seen["mesh_five"]
    face = to_face(five, five[:, :2])
    x, y, mouth = face[:, 2, 0], face[:, 2, 1], face[:, 3:, 1].mean(1)
    across = five[:, 1] - five[:, 0]
    tilt = np.abs(np.arctan2(across[:, 1], across[:, 0]))
    return np.stack([np.ones_like(x), x, x**2, np.abs(x), y, mouth, tilt], 1)


def _agreement(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How near two sets of points are, larger is nearer. Shapes: [N, P, 2] twice -> [N]."""
    return -np.log(np.sqrt(np.square(points - others).sum(-1).mean(-1)) + 1e-4)


def signals(seen: Seen) -> dict[str, np.ndarray]:
    """The single measures [N], larger is better, before they are set against real faces."""
    known, count = reference(), len(seen["blaze"])
    eyes = seen["mesh_five"][:, :2]
    face = {name: to_face(seen[name], eyes) for name in ("mesh", "conv", "tree", "five", "conv_flipped")}

    def told(source: str, target: str) -> np.ndarray:
        """Where one landmarker's points say that another's are."""
        flat = np.c_[face[source].reshape(count, -1), np.ones(count)]
        return (flat @ known[f"{source}_to_{target}"]).reshape(face[target].shape)

    sure = seen["blaze"].clip(1e-7, 1 - 1e-7)
    flat = face["conv"].reshape(count, -1) - known["shape_mean"]
    inside = flat @ known["shape_axes"].T

    def apart(one: str, other: str) -> np.ndarray:
        return np.linalg.norm(seen[one] - seen[other], axis=1)

    found = {
        "blaze": np.log(sure / (1 - sure)), "mesh_flag": np.minimum(seen["mesh_flag"], 30), "hog": seen["hog"],
        "conv_mesh": _agreement(face["conv"][:, INNER], told("mesh", "conv")[:, INNER]),
        "tree_mesh": _agreement(face["tree"][:, INNER], told("mesh", "tree")[:, INNER]),
        "five_mesh": _agreement(face["five"], told("mesh", "five")),
        "five_conv": _agreement(face["five"], told("conv", "five")),
        "flip": _agreement(face["conv"][:, INNER], face["conv_flipped"][:, INNER]),
        "shape": -np.log(np.square(inside / known["shape_sd"]).mean(1)),
        "off_shape": -np.log(np.linalg.norm(flat - inside @ known["shape_axes"], axis=1)),
        "mirror": -apart("identity", "identity_flipped"), "halves": -apart("identity_left", "identity_right"),
        "length": np.log(seen["faceres_length"]),  # a network that is sure of a face gives long vectors
    }  # fmt: skip
    for side in (17, 8):
        strange = _strangeness(seen[f"cells{side}"], pose(seen), str(side))
        for part in AREAS:
            found[f"{part}{side}"] = -np.log(strange[:, _inside(side, part)] + 1e-6).mean(1)
    return found


def _strangeness(cells: np.ndarray, posed: np.ndarray, side: str) -> np.ndarray:
    """Mahalanobis distance of each cell from real faces of that pose. Shapes: [N, h, h, C], [N, 7] -> [N, h * h]."""
    known = reference()
    reduced = (cells.astype(np.float64) - known[f"mean{side}"]) @ known[f"axes{side}"]
    off = (reduced.reshape(len(cells), -1) - posed @ known[f"pose{side}"]).reshape(len(cells), -1, reduced.shape[-1])
    weighed = np.matmul(off.swapaxes(0, 1), known[f"inverse{side}"]).swapaxes(0, 1)
    return (weighed * off).mean(-1)


def _inside(side: int, part: str) -> np.ndarray:
    """Which cells of a face chip show a part of the face: bool [side * side]."""
    top, bottom, left, right = AREAS[part]
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    return ((y > top) & (y < bottom) & (x > left) & (x < right)).reshape(-1)


def normal_score(values: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Normal scores of values among sorted real ones: 0 is middling, -1.64 as bad as the worst 5 %; values below all
    real ones fall on, by up to 3 deviations."""
    rank = (np.searchsorted(real, values, "left") + np.searchsorted(real, values, "right")) / 2
    edge = 0.5 / (len(real) + 1)
    beyond = np.clip((real[0] - values) / real.std(), 0, 3)
    return ndtri(np.clip((rank + 0.5) / (len(real) + 1), edge, 1 - edge)) - beyond


def well_formed(seen: Seen) -> np.ndarray:
    """How well-formed each face is, as a quantile among real held-out faces [N]: 0.05 is as bad as the worst 5 %."""
    known, found, posed = reference(), signals(seen), pose(seen)
    scores = []
    for group, names in GROUPS.items():
        mean = np.mean([normal_score(found[n] - posed @ known[f"pose_{n}"], known[f"real_{n}"]) for n in names], 0)
        centre, deviation = known[f"group_{group}"]
        scores.append((mean - centre) / deviation)
    badness = np.sqrt(np.square(np.minimum(scores, 0)).sum(0))
    return ndtr(normal_score(-badness, known["real_all"]))


# ----------------------------------------------------------------------------------------------------- sets of images


def figures(pictures: Pictures, seen: Seen, training: np.ndarray | None = None) -> dict[str, Any]:
    """One row of the report, before it is set against photographs. Shapes: training [M, 128], identities."""
    quality = well_formed(seen)
    share = float((quality > WELL_FORMED).mean())
    found: dict[str, Any] = {
        "n": len(pictures), "fine_detail_share": spectrum.fine_detail_share(pictures), "well_formed": share,
        "standard_error": float(np.sqrt(share * (1 - share) / len(pictures))), "mean_quantile": float(quality.mean()),
        "spread": mean_pairwise_distance(seen["identity"]), "found": float((seen["blaze"] >= FOUND).mean()),
        **{name: float(seen[name].mean()) for name in ("blaze", "hog", "mtcnn")},
    }  # fmt: skip
    if training is not None:
        nearest = euclidean_distances(seen["identity"], training).min(1)
        found |= {"nearest_median": float(np.median(nearest)), "nearest_least": float(nearest.min()),
                  "nearest_same_person": float((nearest < SAME_PERSON).mean())}  # fmt: skip
    return found


def set_against(rows: Mapping[str, dict[str, Any]], photographs: str = "photographs") -> dict[str, dict[str, Any]]:
    """Every row with its fine detail and well-formed share over those of photographs."""
    base = rows[photographs]
    return {
        name: {
            **row, "fine_detail": row["fine_detail_share"] / max(base["fine_detail_share"], 1e-12),
            "well_formed_over_photographs": row["well_formed"] / max(base["well_formed"], 1e-12),
        }
        for name, row in rows.items()
    }  # fmt: skip


def judge(sets: Mapping[str, Pictures], cache: Path, training: Pictures | None = None) -> dict[str, dict[str, Any]]:
    """The rows of a report for sets of images by name, "photographs" among them."""
    bank = None if training is None else look(training, cache, "identify")["identity"]
    return set_against({name: figures(pictures, look(pictures, cache), bank) for name, pictures in sets.items()})


def notes(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader of the table must know: which rows may not be compared, who looks like a training image."""
    told = []
    for name, row in rows.items():
        detail = row["fine_detail"]
        if not MATCHED[0] <= detail <= MATCHED[1]:
            how, bias = ("softer", "too good") if detail < 1 else ("sharper or noisier", "too bad")
            told.append(f"{name}: {how} than photographs (fine detail {detail:.2f}), so its well-formed share is "
                        f"likely {bias}; compare at {MATCHED[0]} to {MATCHED[1]}.")  # fmt: skip
        near = row.get("nearest_same_person", 0)
        if near > rows["photographs"].get("nearest_same_person", 0):  # unseen people have doubles, too
            told.append(f"{name}: {near:.1%} are nearer than {SAME_PERSON} to a training "
                        "image, more than of photographs of people never seen.")  # fmt: skip
    return [*told, "Softness is rewarded, averaged faces and warps up to 4 pixels pass: see docs/outside.md."]


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as a Markdown table, a column a set of images."""

    def shown(value: Any) -> str:
        return "" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"

    lines = [["", *rows], ["---"] * (len(rows) + 1)]
    lines += [[heading, *(shown(row.get(key)) for row in rows.values())] for key, heading in COLUMNS
              if any(key in row for row in rows.values())]  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(rows: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any], out: Path) -> str:
    """Write report.json and table.md below `out`; returns what table.md says."""
    told = notes(rows)
    text = table(rows) + "\n\n" + "\n".join(f"- {note}" for note in told)
    report = {"settings": settings, "rows": rows, "notes": told}
    report["reference"] = hashlib.sha256(REFERENCE.read_bytes()).hexdigest()
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "report.json", json.dumps(plain(report), indent=2).encode())
    write_atomically(out / "table.md", (text + "\n").encode())
    return text


def rows_of(store: FaceStore, split: str, n: int, pool: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the store: ``n`` sharp images of unseen people, and ``pool`` sharp training images, ascending.

    Raises ValueError when there are fewer than two of the first.
    """
    shuffle = np.random.default_rng(seed).permutation
    rows = shuffle(store.sharp(split))[:n]
    if len(rows) < 2:
        raise ValueError(f"{store.folder} has {len(rows)} sharp {split} images; 2 are needed")
    return rows, np.sort(shuffle(store.sharp("train"))[:pool])


def generate_sets(
    faces: Generator, photographs: Pictures, prompts: Sequence[str], steps: Sequence[int], seed: int
) -> dict[str, Pictures]:
    """What is set against photographs: their copies by the VAE, and faces generated for their captions, by name.

    The faces are as users get them, with all the model's own settings and the invisible mark.
    """
    sets = {"photographs through this VAE": reconstruct(faces.vae, photographs)}
    for count in steps:
        requests = Sampling(count, seed=seed).requests(prompts, watermark=True)
        sets[f"drawn, {count} steps"] = generate_images(faces, requests)
    return sets


def read_sets(paths: Sequence[Path]) -> dict[str, Pictures]:
    """Images of files and folders by their names. Raises as `read_pictures`."""
    return dict(zip(names_of(paths), map(read_pictures, paths), strict=True))


def names_of(paths: Sequence[Path]) -> list[str]:
    """A name for each file or folder, no two alike."""
    return [path.stem if [p.stem for p in paths].count(path.stem) == 1 else path.as_posix() for path in paths]
