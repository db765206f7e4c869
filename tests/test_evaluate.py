"""Do the metrics give the known answers, does the attribute classifier learn, and does one command make a whole
report?"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from core.evaluation import metrics, report, suite
from core.evaluation.attribute_classifier import (
    ResNet,
    augment,
    extract_features,
    extract_store_features,
    load_attribute_classifier,
    train_attribute_classifier,
)
from core.evaluation.generation import Sampling, generate_images
from core.evaluation.prompts import VISIBLE, draw_prompts
from core.imaging import spectrum
from core.nn import layers
from core.nn.checkpoint import ModelFolderError, read_index, update_index
from core.text.lexicon import ATTRIBUTES
from dataset import FaceStore, synthetic_store
from generator import FaceGenerator

SIZE = 128


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FaceStore:
    return synthetic_store(tmp_path_factory.mktemp("store"), count=64, seed=1)


@pytest.fixture(scope="module")
def judge_folder(store: FaceStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "judge"
    train_attribute_classifier(store, store.select("train"), folder, epochs=12, batch_size=8, device="cpu")
    return folder


@pytest.fixture(scope="module")
def model_folder(store: FaceStore, quick_grids: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three networks, trained for two steps each by their own commands."""
    import conditional_ldm
    import train_clip
    import vae

    home = tmp_path_factory.mktemp("trained")
    for command, extra in ((train_clip, []), (vae, []), (conditional_ldm, ["--cache", str(home / "latents")])):
        flags = ["--train", "--data", str(store.folder), "--model", str(home / "tiny"), "--preset", "tiny",
                 "--run", str(home / command.__name__), "--steps", "2", "--batch-size", "4",
                 "--device", "cpu"]  # fmt: skip
        assert command.main([*flags, *extra]) == 0
    return home / "tiny"


class Pooled(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)


def noise_pictures(count: int, seed: int = 0) -> np.ndarray:
    """Images with detail at every frequency: white noise over a smooth gradient."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(60, 190, SIZE)[None, :, None, None]
    return np.clip(ramp + 30 * rng.standard_normal((count, SIZE, SIZE, 3)), 0, 255).astype(np.uint8)


def stripes(period: float, count: int = 2) -> np.ndarray:
    wave = 127 + 100 * np.sin(2 * np.pi * np.arange(SIZE) / period)
    return np.broadcast_to(wave[None, None, :, None], (count, SIZE, SIZE, 3)).astype(np.uint8)


# --------------------------------------------------------------------------------------------------- distances


def features_of(mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Rows whose mean and covariance are exactly these. Shapes: [D], [D, D] -> [2 D, D]."""
    factor = np.linalg.cholesky(covariance).T
    return mean + math.sqrt(len(factor) - 0.5) * np.concatenate([factor, -factor])


def test_frechet_of_known_gaussians() -> None:
    """Commuting covariances have a closed form: |dm|^2 + sum (sqrt a - sqrt b)^2; a rotation changes nothing."""
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.1, 4, 6), rng.uniform(0.1, 4, 6)
    gap = rng.standard_normal(6)
    expected = gap @ gap + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    basis, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    rotated = [(basis * values) @ basis.T for values in (a, b)]
    got = metrics.frechet_distance(features_of(np.zeros(6), rotated[0]), features_of(basis @ gap, rotated[1]))
    assert got == pytest.approx(expected, rel=1e-9)


def test_frechet_of_covariances_that_do_not_commute() -> None:
    """Two by two: tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB))."""
    a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    expected = np.trace(a) + np.trace(b) - 2 * root
    found = metrics.frechet_distance(*(features_of(np.zeros(2), covariance) for covariance in (a, b)))
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_of_samples_approaches_the_gaussians_distance() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((20000, 3)), 2.0 * rng.standard_normal((20000, 3)) + 1.0
    assert metrics.frechet_distance(a, b) == pytest.approx(3 * 1.0 + 3 * 1.0, rel=0.05)


def test_frechet_with_fewer_samples_than_features() -> None:
    """Rank-deficient covariances are no special case: equal sets have distance 0, a shift adds its square."""
    x = np.random.default_rng(2).standard_normal((10, 64))
    assert metrics.frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)
    assert metrics.frechet_distance(x, x + 0.5) == pytest.approx(64 * 0.25, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(50, 60), (50, 6), (6, 50), (4, 6)])  # more and fewer than the 12 features
def test_frechet_equals_its_definition(n: int, m: int) -> None:
    """With the root of the product of the covariances, by its eigenvalues: they are real and not negative."""
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((n, 12)) @ rng.standard_normal((12, 12)), rng.standard_normal((m, 12)) + 0.3
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.clip(np.linalg.eigvals(ca @ cb).real, 0, None)).sum()
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(ca) + np.trace(cb) - 2 * root
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_is_biased_in_n_and_the_mmd_is_not() -> None:
    rng = np.random.default_rng(3)
    frechet, mmd = [], []
    for n in (40, 400):
        sets = [(rng.standard_normal((n, 16)), rng.standard_normal((n, 16))) for _ in range(20)]
        frechet.append(np.mean([metrics.frechet_distance(a, b) for a, b in sets]))
        values = [metrics.polynomial_mmd(a, b) for a, b in sets]
        mmd.append((np.mean(values), np.std(values) / math.sqrt(len(values))))
    assert frechet[0] > 4 * frechet[1]
    assert all(abs(mean) < 4 * error for mean, error in mmd)


def test_mmd_equals_its_definition() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((5, 3)), rng.standard_normal((7, 3)) + 1

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 3 + 1) ** 3)

    xx = np.mean([kernel(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
    yy = np.mean([kernel(y[i], y[j]) for i in range(7) for j in range(7) if i != j])
    xy = np.mean([kernel(a, b) for a in x for b in y])
    assert metrics.polynomial_mmd(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)


def test_precision_and_recall_tell_worse_pictures_from_fewer_kinds() -> None:
    """By their definition, point by point; and on a crowd of two kinds, one of which is missing, or all is off."""
    rng = np.random.default_rng(5)
    made, real = rng.standard_normal((30, 4)) * 0.8, rng.standard_normal((40, 4))

    def share(points: np.ndarray, others: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(others - one, axis=1))[3] for one in others]
        inside = [any(np.linalg.norm(point - one) <= radius for one, radius in zip(others, radii, strict=True))
                  for point in points]
        return float(np.mean(inside))

    assert metrics.precision_and_recall(made, real) == pytest.approx((share(made, real), share(real, made)))
    kinds = [rng.standard_normal((100, 4)) + shift for shift in (0.0, 20.0)]
    everybody, others = np.concatenate(kinds), np.concatenate([rng.standard_normal((100, 4)) + s for s in (0.0, 20.0)])
    whole, half, off = (metrics.precision_and_recall(one, everybody) for one in (others, others[:100], others + 7.0))
    assert min(whole) > 0.8 and half[0] > 0.8 and half[1] < 0.55 and max(off) < 0.1
    with pytest.raises(ValueError, match="more than 3 points"):
        metrics.precision_and_recall(made[:3], real)


def test_distances_between_points_and_their_mean() -> None:
    corners = np.array([[0.0, 0], [3, 0], [0, 4]])
    assert metrics.mean_pairwise_distance(corners) == pytest.approx((3 + 4 + 5) / 3)
    assert metrics.euclidean_distances(corners, np.array([[3.0, 4]])).ravel() == pytest.approx([5, 4, 3])
    assert metrics.largest_difference(np.array([[0, 250]], np.uint8), np.array([[3, 5]], np.uint8)) == 245


@pytest.mark.parametrize("function", [metrics.frechet_distance, metrics.polynomial_mmd, metrics.precision_and_recall])
def test_distances_refuse_what_they_cannot_compare(function) -> None:
    good = np.ones((3, 4))
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(3, 5\)"):
        function(good, np.ones((3, 5)))
    with pytest.raises(ValueError, match="not finite"):
        function(good, np.full((3, 4), np.nan))


# --------------------------------------------------------------------------------------------- detail and ladder


def test_fine_detail_of_known_pictures() -> None:
    assert spectrum.fine_detail_share(stripes(3.0)) > 0.99  # period under 4 pixels: above half Nyquist
    assert spectrum.fine_detail_share(stripes(16.0)) < 0.01
    white = np.random.default_rng(0).integers(0, 256, (8, SIZE, SIZE, 3), dtype=np.uint8)
    disc = math.pi / 16  # radius half Nyquist in a square of side two Nyquist
    assert spectrum.fine_detail_share(white) == pytest.approx(1 - disc, abs=0.01)


def test_radial_power_finds_the_frequency() -> None:
    frequency, power = spectrum.radial_power(stripes(8.0))
    assert power.sum() == pytest.approx(1.0)
    assert frequency[power.argmax()] == pytest.approx(0.25, abs=0.02)  # period 8 of Nyquist's 2


def test_blur_lowers_fine_detail_step_by_step(store: FaceStore) -> None:
    pictures = noise_pictures(3)
    shares = [spectrum.fine_detail_share(p) for p in (pictures, *(metrics.degrade(pictures, k) for k in metrics.BLURS))]
    assert shares == sorted(shares, reverse=True)
    assert shares[2] < 0.2 * shares[0]


@pytest.mark.parametrize("kind", metrics.LADDER)
def test_every_rung_changes_the_picture_and_keeps_its_form(kind: str) -> None:
    pictures = noise_pictures(2)
    worse = metrics.degrade(pictures, kind)
    assert worse.shape == pictures.shape and worse.dtype == np.uint8
    difference = np.abs(worse.astype(int) - pictures).mean()
    assert 1.0 < difference < 60.0
    assert abs(worse.mean() - pictures.mean()) < 2.0  # none of them changes the brightness
    assert np.array_equal(worse, metrics.degrade(pictures, kind))


def test_a_warp_moves_smoothly_and_keeps_what_is_even() -> None:
    ramp = np.broadcast_to(np.linspace(50, 200, 64)[None, None, :, None], (8, 64, 64, 3)).round().astype(np.uint8)
    moved = (metrics.warp(ramp, 2.0).astype(float) - ramp)[:, 8:-8, 8:-8] / (150 / 63)  # in pixels
    assert 1.0 < moved.std() < 2.0  # smooth in between, where it is a mean of neighbouring knots
    assert np.abs(np.diff(moved, axis=1)).max() < 1.5 and abs(moved.mean()) < 0.5
    even = np.full((2, 64, 64, 3), 99, np.uint8)
    assert np.array_equal(metrics.warp(even, 5.0), even)


def test_an_unknown_rung_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'swirl'.*blur_96"):
        metrics.degrade(noise_pictures(1), "swirl")


def test_pictures_survive_the_round_trip_and_overshoot_is_clamped() -> None:
    pictures = noise_pictures(2)
    assert np.array_equal(layers.to_pixels(layers.to_images(pictures)), pictures)
    overshoot = torch.tensor([1.7, -1.7]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    assert layers.to_pixels(overshoot)[:, 0, 0, 0].tolist() == [255, 0]


def test_reconstruction_figures_of_known_errors() -> None:
    pictures = np.clip(noise_pictures(2), 20, 235)
    same = metrics.reconstruction_figures(pictures, pictures.copy() + np.uint8(1))
    assert same["psnr_db"] == pytest.approx(20 * math.log10(255), abs=1e-3)
    assert same["mse"] == pytest.approx((2 / 255) ** 2, rel=1e-4)
    assert same["ssim"] > 0.999 and same["ms_ssim"] > 0.999
    blurred = metrics.reconstruction_figures(pictures, metrics.degrade(pictures, "blur_32"))
    assert blurred["ssim"] < blurred["ms_ssim"] < 0.99  # the coarse scales are right, the fine ones lost


def test_multiscale_ssim_of_plain_greys_is_their_luminance_at_the_coarsest_scale() -> None:
    """Where nothing varies, contrast and structure agree at every scale; the last of the four weights is left."""
    greys = torch.full((2, 3, SIZE, SIZE), 0.5), torch.full((2, 3, SIZE, SIZE), 0.6)
    luminance = (2 * 0.5 * 0.6 + 0.01**2) / (0.5**2 + 0.6**2 + 0.01**2)
    found = metrics.multiscale_ssim(reduction="none")(*greys)
    assert found.tolist() == pytest.approx([luminance**0.2726] * 2, abs=1e-5)
    assert sum(metrics.MS_SSIM_WEIGHTS) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="larger than 54"):
        metrics.multiscale_ssim()(greys[0][..., :50, :50], greys[1][..., :50, :50])


# -------------------------------------------------------------------------------------------------- agreement


def test_balanced_accuracy_is_the_mean_of_both_recalls() -> None:
    truth = np.array([True] * 8 + [False] * 2)
    assert metrics.balanced_accuracy(np.ones(10, bool), truth) == 0.5
    assert metrics.balanced_accuracy(truth, truth) == 1.0
    assert math.isnan(metrics.balanced_accuracy(truth[:0], truth[:0]))


def test_prompt_fidelity_counts_only_what_was_asserted() -> None:
    rows = 40
    truth = np.arange(rows)[:, None] % 2 == 0
    asserted = np.where(truth, 1, 0).astype(np.int8)
    asserted[20:] = -1
    obeyed = truth.copy()
    obeyed[20:] = ~truth[20:]  # wrong only where the prompt was silent
    full = metrics.prompt_fidelity(asserted, truth, obeyed, truth)[0]
    assert full is not None and (full.generated, full.ratio, full.negatives) == (1.0, 1.0, "asserted")
    assert (full.num_true, full.num_false) == (10, 10)
    ignored = metrics.prompt_fidelity(asserted, truth, np.ones_like(truth), truth)[0]
    assert ignored is not None and ignored.ratio == 0.5
    never_denied = np.where(asserted == 0, -1, asserted).astype(np.int8)
    fallback = metrics.prompt_fidelity(never_denied, truth, obeyed, truth)[0]
    assert fallback is not None and fallback.negatives == "unmentioned" and fallback.num_false == 20
    assert metrics.prompt_fidelity(asserted[:6], truth[:6], obeyed[:6], truth[:6]) == [None]


# ------------------------------------------------------------------------------------------------ memorisation


def test_nearest_is_exact_for_copies() -> None:
    pool = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32) * 100
    distance, index = metrics.nearest(pool[[7, 31]], pool)
    assert index.tolist() == [7, 31] and distance.tolist() == [0.0, 0.0]


def test_planted_copies_are_found_in_any_training_pool() -> None:
    rng = np.random.default_rng(1)
    train, held, fresh = (rng.standard_normal((n, 16)) for n in (250, 100, 80))
    clean = metrics.memorisation([fresh], train, held)
    assert clean.ratios.shape == (3, 80) and np.median(clean.ratios) == pytest.approx(1.0, abs=0.05)
    assert np.percentile(clean.ratios, 1) == pytest.approx(np.percentile(clean.chance, 1), abs=0.1)
    planted = fresh.copy()
    planted[3], planted[40] = train[5] + 1e-3, train[249]
    found = metrics.memorisation([planted], train, held)
    assert found.index[[3, 40]].tolist() == [5, 249]
    lowest = found.ratios.min(0)
    assert set(lowest.argsort()[:2].tolist()) == {3, 40} and lowest[[3, 40]].max() < 0.01
    mirrored = metrics.memorisation([fresh, planted], train, held)  # a copy in either view counts
    assert mirrored.ratios.min(0)[[3, 40]].max() < 0.01


def test_memorisation_refuses_unequal_chances() -> None:
    with pytest.raises(ValueError, match="held-out pool of 9 and training pool of 5"):
        metrics.memorisation([np.zeros((2, 3))], np.zeros((5, 3)), np.zeros((9, 3)))


# --------------------------------------------------------------------------------------------------- the attribute
# classifier


def test_augmentation_moves_pixels_without_mixing_them() -> None:
    """Whole-pixel shifts keep fine detail: an attribute classifier must not learn that blur means nothing."""
    pictures = noise_pictures(6)
    images = augment(pictures, torch.Generator().manual_seed(0))
    assert images.shape == (6, 3, SIZE, SIZE)
    rebuilt = layers.to_pixels(images / images.abs().amax((1, 2, 3), keepdim=True))
    ratio = spectrum.fine_detail_share(rebuilt) / spectrum.fine_detail_share(pictures)
    assert ratio == pytest.approx(1.0, abs=0.1)
    assert torch.equal(images, augment(pictures, torch.Generator().manual_seed(0)))


def test_the_judge_learns_from_the_store(store: FaceStore, judge_folder: Path) -> None:
    judge, digest = load_attribute_classifier(judge_folder)
    assert re.fullmatch(r"[0-9a-f]{64}", digest)
    assert sum(p.numel() for p in judge.parameters()) < 6_000_000
    rows = store.select("train")
    seen = extract_features(judge, store.images[rows])
    assert seen.features.shape == (len(rows), 512) and seen.logits.shape == (len(rows), len(ATTRIBUTES))
    truth = store.attributes[rows]
    scores = [metrics.balanced_accuracy(seen.verdicts[:, i], truth[:, i]) for i in range(len(ATTRIBUTES))]
    assert np.mean(scores) > 0.6  # 0.5 is chance
    classes = np.array(judge.config.px_classes)
    assert (classes[seen.px] == store.px[rows]).mean() > 0.6


def test_the_judge_is_frozen_and_its_training_repeatable(store: FaceStore, judge_folder: Path, tmp_path: Path) -> None:
    rows = store.select("train")
    with pytest.raises(ModelFolderError, match="frozen"):
        train_attribute_classifier(store, rows, judge_folder, epochs=1)
    before = torch.random.get_rng_state()
    digests = [train_attribute_classifier(store, rows[:16], tmp_path / name, epochs=1, batch_size=8,
                                          device="cpu") for name in "ab"]
    assert digests[0] == digests[1]
    assert torch.equal(before, torch.random.get_rng_state())


def test_views_of_real_pictures_are_kept(store: FaceStore, judge_folder: Path, tmp_path: Path) -> None:
    judge, digest = load_attribute_classifier(judge_folder)
    rows = store.select("train")[:5]
    first = extract_store_features(judge, digest, store, rows, tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 1 and digest[:12] in files[0].name
    again = extract_store_features(judge, digest, store, rows, tmp_path)
    assert np.array_equal(first.features, again.features) and sorted(tmp_path.iterdir()) == files
    extract_store_features(judge, digest, store, rows[::-1], tmp_path)
    extract_store_features(judge, "0" * 64, store, rows, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_store_without_attributes_cannot_train_a_judge(store: FaceStore, tmp_path: Path) -> None:
    blank = dataclasses.replace(store, attributes=np.zeros_like(store.attributes))
    with pytest.raises(ValueError, match="no attribute labels"):
        train_attribute_classifier(blank, blank.select("train"), tmp_path / "judge")


# -------------------------------------------------------------------------------------------------- the report


def test_report_is_plain_json_and_targets_are_judged() -> None:
    raw = {"vae": {"psnr_db": np.float32(30.00004), "ms_ssim": float("nan")}, "crowd": None, 3: (np.int64(1),)}
    value = report.plain(raw)
    assert value == {"vae": {"psnr_db": 30.0, "ms_ssim": None}, "crowd": None, "3": [1]}
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert report.judged_targets(value) == [{"figure": "vae.psnr_db", "value": 30.0, "min": 28.0, "met": True}]


def test_comparison_lists_changes_and_refuses_another_judge() -> None:
    before = {"judge": {"hash": "a"}, "vae": {"psnr_db": 25.0, "ssim": 0.9}, "seconds": {"vae": 3.0}}
    after = {"judge": {"hash": "a"}, "vae": {"psnr_db": 26.0, "ssim": 0.9}, "seconds": {"vae": 4.0}}
    assert report.compare(before, after) == ["vae.psnr_db: 25 -> 26 (+1)"]
    with pytest.raises(ValueError, match="different attribute classifiers"):
        report.compare(before, {**after, "judge": {"hash": "b"}})


def test_prompts_assert_the_facts_of_held_out_pictures(store: FaceStore) -> None:
    attributes = store.attributes[store.select("test")]
    prompts = draw_prompts(attributes, 20, seed=3)
    truth = attributes[prompts.source]
    said = prompts.asserted >= 0
    assert said.any(1).all() and (truth[said] == (prompts.asserted[said] == 1)).all()
    assert prompts.texts == draw_prompts(attributes, 20, seed=3).texts
    assert len(set(VISIBLE)) == 20 and set(VISIBLE) <= set(ATTRIBUTES)


@pytest.mark.parametrize("flags", [["--parts", "nonsense"], ["--curve-steps", "two"], ["--samples", "1"]])
def test_bad_flags_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        evaluate.main(flags)
    assert leaving.value.code == 2
    assert flags[0] in capsys.readouterr().err or flags[1] in capsys.readouterr().err


def test_judge_and_ladder_make_a_report(store: FaceStore, judge_folder: Path, tmp_path: Path, capsys) -> None:
    """The part that needs no model: main() end to end on generated faces."""
    command = ["--data", str(store.folder), "--judge", str(judge_folder), "--out", str(tmp_path / "out"),
               "--cache", str(tmp_path / "cache"), "--parts", "ladder", "--device", "cpu"]  # fmt: skip
    assert evaluate.main(command) == 0
    made = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(made) >= {"settings", "judge", "distances", "ladder", "spectrum", "checks", "targets", "seconds"}
    assert set(made["checks"]) == {"blur_ladder_rises", "blur_64_at_least_twice_floor", "all_rungs_above_floor"}
    assert made["distances"]["floor"]["frechet_over_floor"] == 1.0
    assert tuple(made["ladder"]["rungs"]) == metrics.LADDER
    assert made["ladder"]["n"] == made["distances"]["floor"]["n"] == 8
    assert len(made["judge"]["attributes"]) == len(ATTRIBUTES)
    detail = [made["spectrum"]["real"], *(made["ladder"]["rungs"][kind]["fine_detail"] for kind in metrics.BLURS)]
    assert detail == sorted(detail, reverse=True)
    assert {"ladder.png", "spectrum.png", "table.md", "report.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert made["judge"]["hash"][:12] in (tmp_path / "out" / "table.md").read_text()
    capsys.readouterr()
    assert evaluate.main([*command, "--compare", str(tmp_path / "out" / "report.json")]) == 0
    again = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {**again, "seconds": None} == {**made, "seconds": None}  # the second look comes from the cache, unchanged


def test_choices_are_made_on_other_people_than_the_report(
    store: FaceStore, judge_folder: Path, tmp_path: Path, capsys
) -> None:
    command = ["--data", str(store.folder), "--judge", str(judge_folder), "--cache", str(tmp_path / "cache"),
               "--parts", "ladder", "--device", "cpu", "--out", str(tmp_path / "out")]  # fmt: skip
    settings = suite.Settings(data=str(store.folder), judge=str(judge_folder), cache=str(tmp_path / "cache"),
                              out=str(tmp_path / "out"), parts=("ladder",), device="cpu")  # fmt: skip
    report, choice = (suite.Evaluation(dataclasses.replace(settings, split=one), store) for one in suite.HELD_OUT)
    assert set(report.unseen_rows) == set(store.select("test", px=128))
    assert set(choice.unseen_rows) == set(store.select("val", px=128))
    assert set(choice.train_rows) == set(report.train_rows)
    assert choice.prompts.texts != report.prompts.texts
    assert evaluate.main([*command, "--split", "val"]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["settings"]["split"] == "val"
    with pytest.raises(SystemExit):
        evaluate.main([*command, "--split", "val", "--record"])
    assert "--split val is for choices" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main(["fit-prompt-rewriting", "--model", "models/none", "--split", "test"])
    assert "--split test would spoil the report" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["report"], ["sliders", "Smiling"], ["fit-sharpness"]])
def test_bf16_is_refused_where_it_would_be_imitated(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("core.nn.device.has_bf16", lambda device: False)
    with pytest.raises(SystemExit):
        evaluate.main([*command, "--precision", "bf16", "--device", "cpu", "--model", "models/none"])
    assert "bf16 on a device that has it" in capsys.readouterr().err


def test_the_judges_trunk_is_torchvisions_resnet() -> None:
    """The same names, the same shapes and the same numbers, also while it learns."""
    from torchvision.models.resnet import BasicBlock
    from torchvision.models.resnet import ResNet as Theirs

    for blocks in ((1, 1, 1, 1), (2, 1, 3, 1)):
        theirs, ours = Theirs(BasicBlock, list(blocks)), ResNet(blocks)
        theirs.fc = torch.nn.Identity()
        ours.load_state_dict(theirs.state_dict())
        images = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        for training in (True, False):  # the first changes the running statistics
            found, expected = ours.train(training)(images), theirs.train(training)(images)
            assert found.shape == (3, 512) and torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))
    fresh = ResNet((1, 1, 1, 1)).layer4[0].conv2.weight.detach()
    assert float(fresh.std()) == pytest.approx(math.sqrt(2 / (9 * 512)), rel=0.01)


def test_a_whole_report_of_a_trained_model(
    store: FaceStore, judge_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    """main() over every part, on networks trained for two steps: the numbers are poor, but all are there."""
    inception = tmp_path / "inception.pt"
    projection = torch.nn.Sequential(Pooled(), torch.nn.Linear(3 * 16, 2048))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is what users' Inception files are made of
        torch.jit.trace(projection, torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)).save(str(inception))
    command = ["--data", str(store.folder), "--judge", str(judge_folder), "--model", str(model_folder),
               "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--samples", "12", "--steps", "2",
               "--crowd-n", "3", "--curve-n", "4", "--curve-steps", "1,2", "--inception", str(inception),
               "--device", "cpu", "--record"]  # fmt: skip
    assert evaluate.main(command) == 0
    made = json.loads((tmp_path / "out" / "report.json").read_text())
    kept = json.loads((model_folder / "model_index.json").read_text())["metrics"]
    assert kept["distances"] == made["distances"] and kept["judge.hash"] == made["judge"]["hash"]
    assert set(made["distances"]) == {"floor", "vae", "generated"}
    assert {entry["n"] for entry in made["distances"].values()} == {8}  # as many as there are test images
    assert made["distances"]["generated"]["frechet_over_floor"] > 0
    shapes = {name: entry["shape_over_floor"] for name, entry in made["distances"].items()}
    assert shapes["floor"] == made["curve"]["floor"]["shape_over_floor"] == 1.0 != shapes["generated"]
    assert all(point["shape"] > 0 for point in made["curve"]["points"])
    assert set(made["fidelity"]["attributes"]) == set(ATTRIBUTES) and made["fidelity"]["n"] == 12
    assert made["memorisation"]["features"]["pool"] == made["memorisation"]["pixels"]["pool"] == 16
    assert made["memorisation"]["n"] == 12 and len(made["memorisation"]["pixels"]["closest"]) == 12
    assert [point["steps"] for point in made["curve"]["points"]] == [1, 2]
    assert made["curve"]["n"] == made["curve"]["floor"]["n"] == 4
    assert made["curve"]["points"][1]["image_s"] is None  # generated once already
    curve = FaceGenerator.load(model_folder, "cpu").info.step_curve  # what /options says of these weights alone
    told = [(point["steps"], point["frechet_over_floor"]) for point in made["curve"]["points"]]
    assert [(point["steps"], point["frechet_over_floor"]) for point in curve] == told
    index = read_index(model_folder)
    update_index(model_folder, metrics=index["metrics"] | {"model_hash": "0" * 64})
    assert FaceGenerator.load(model_folder, "cpu").info.step_curve == ()
    update_index(model_folder, metrics=index["metrics"])
    assert made["crowd"]["n"] == 3 and 0 <= made["crowd"]["largest_rate_difference"] <= 1
    assert made["fid"]["n"] == 8 and made["fid"]["generated"] > 0
    assert made["vae"]["psnr_db"] < 30 and made["spectrum"]["vae"] > 0
    assert set(made["seconds"]) == {"judge", *suite.PARTS, "fid"}
    assert set(made["model"]["components"]) == {"clip", "vae", "preview", "unet"}
    plots = {"curve", "fidelity", "ladder", "spectrum"}
    pictures = {"samples", "crowd", "vae", "closest_features", "closest_pixels"}
    assert {p.stem for p in (tmp_path / "out").glob("*.png")} == plots | pictures
    assert "| Frechet |" in (tmp_path / "out" / "table.md").read_text()


def test_parts_are_recorded_one_after_the_other_for_the_same_weights() -> None:
    first = {"model_hash": "m", "judge": {"hash": "j"}, "distances": 1,
             "fidelity": 2, "negations": 3, "spectrum": 4, "vae": 5,
             "settings": {"parts": ["samples", "vae"], "data": "a folder of one machine"}}
    curve = {"model_hash": "m", "judge": {"hash": "j"}, "settings": {"parts": ["curve"]}, "distances": 6, "curve": 7}
    before = suite.kept_figures(first, {"model_hash": "of other weights", "crowd": 8})
    assert before == {"model_hash": "m", "judge.hash": "j", "settings": {"parts": ["samples", "vae"]}, "distances": 1,
                      "fidelity": 2, "negations": 3, "spectrum": 4, "vae": 5}
    assert suite.kept_figures(curve, before) == before | {"curve": 7}
    assert suite.kept_figures(curve | {"judge": {"hash": "another"}}, before) == {
        "model_hash": "m", "judge.hash": "another", "curve": 7}


def test_each_face_comes_from_its_own_seed_and_prompt(model_folder: Path) -> None:
    prompts = ["a smiling woman", "", "a bald man with glasses"]
    faces, sampling = FaceGenerator.load(model_folder, "cpu"), Sampling(2, 2.0, seed=5)
    together = generate_images(faces, sampling.requests(prompts))
    assert together.shape == (3, SIZE, SIZE, 3) and together.dtype == np.uint8
    for place, prompt in enumerate(prompts):
        alone = generate_images(faces, sampling.requests([prompt], [5 + place]))
        assert np.abs(alone[0].astype(int) - together[place]).max() <= 1
    assert np.abs(together[0].astype(int) - together[1]).max() > 5


def test_parts_that_need_others_say_so(
    store: FaceStore, judge_folder: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = suite.Settings(str(model_folder), str(store.folder), str(judge_folder), str(tmp_path / "out"),
                              str(tmp_path / "cache"), ("memorisation",), samples=4, device="cpu")  # fmt: skip
    with pytest.raises(ValueError, match="needs the part samples"):
        evaluate.measure(settings)
    with pytest.raises(ValueError, match="memorisation need a generator"):
        suite.Evaluation(settings, store)
    with pytest.raises(ModelFolderError, match="not a model folder"):
        evaluate.measure(dataclasses.replace(settings, model=str(tmp_path / "nothing")))
    for flags in (["--parts", "memorisation"], ["--parts", "vae", "--inception", "file.pt"]):
        with pytest.raises(SystemExit):
            evaluate.main(flags)
        assert "needs the part samples" in capsys.readouterr().err
