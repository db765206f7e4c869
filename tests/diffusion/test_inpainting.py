"""Does an image change as much as it was asked to, and no more: image to image, inpainting, variations, interpolation?

Mechanisms run on a tiny model of untrained networks; what is true of images is asked of the bundled model.
"""

from __future__ import annotations

import random
from typing import Any, Literal

import numpy as np
import pytest
import torch

from core.diffusion.initial_noise import slerp, starting_noise
from core.diffusion.inpainting import FEATHER, Inpainting, feather, latent_mask, membrane
from core.diffusion.inversion import Inversion
from core.diffusion.sampling import Denoising
from core.diffusion.schedule import NoiseSchedule
from core.diffusion.schedulers import SAMPLERS, make_scheduler, scheduler_config, set_timesteps
from core.engine import GenerationRequest, Interpolation
from core.imaging.png_metadata import read_request
from core.imaging.watermark import mark
from core.jobs.batching import to_generation_request
from core.text.prompt_parser import read
from core.training.synthetic_faces import draw_face, random_attributes
from core.web.parameters import filled_in
from core.web.requests import TextToImage
from generator import FaceGenerator, GeneratedImage, Run

PROMPT, OTHER = "a smiling woman with blond hair", "an old man with glasses"


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    rng = random.Random(1)
    return draw_face(random_attributes(rng), rng)


@pytest.fixture(scope="module")
def mask() -> np.ndarray:
    """A mouth, at no edge of a latent cell."""
    found = np.zeros((128, 128), bool)
    found[75:101, 37:90] = True
    return found


def draw(faces: FaceGenerator, prompt: str = PROMPT, **options: Any) -> list[GeneratedImage]:
    given = {"num_inference_steps": 6, "seed": 3, "guidance_scale": 3.0, **options}
    return faces.generate(prompt, **given)


def far(one: np.ndarray, other: np.ndarray) -> float:
    """Mean distance in grey levels."""
    return float(np.abs(one.astype(float) - other).mean())


def restored(faces: FaceGenerator, png: bytes) -> GenerationRequest:
    """The request in a PNG, through the schemas of the API, as the server would generate it."""
    found = read_request(png)
    body = found["request"]
    wanted = TextToImage.model_validate(body, context=faces.info)
    target = wanted.interpolate_to and wanted.interpolate_to.model_dump()
    pictures = {name: body[name] for name in ("init_image", "mask") if name in body}
    given = {"latent": wanted.latent, "interpolate_to": target, "model_hash": faces.info.model_hash,
             "watermark": found["watermark"] is not None, **pictures}
    return to_generation_request({**filled_in(wanted, faces.info), **given}, faces.info)


def finish(faces: FaceGenerator, runs: list[Run]) -> list[list[GeneratedImage]]:
    while any(not run.finished for run in runs):
        faces.step(runs)
    return [faces.pictures(run) for run in runs]


# ---- noise -----------------------------------------------------------------------------------------------------------


def test_slerp_keeps_the_length_and_the_ends() -> None:
    a, b = (torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(slerp(a, b, 0.0), a) and torch.equal(slerp(a, b, 1.0), b)
    lengths = [float(slerp(a, b, weight).norm()) for weight in np.linspace(0, 1, 11)]
    assert max(lengths) / min(lengths) < 1.02  # half of a straight line would be 1.41 times too short
    angles = [float((slerp(a, b, weight) * a).sum() / a.norm() ** 2) for weight in (0.25, 0.5, 0.75)]
    assert angles == sorted(angles, reverse=True) and abs(angles[1] - 0.5**0.5) < 0.02
    assert torch.allclose(slerp(a, a, 0.3), a) and bool(torch.isfinite(slerp(a, -a, 0.5)).all())


def test_every_image_of_a_plain_request_has_its_own_seed() -> None:
    start = starting_noise(GenerationRequest("", 3, seed=2**53 - 2), (4, 2, 2))
    assert start.seeds == [2**53 - 2, 2**53 - 1, 0] and start.weights == [0.0] * 3
    again = starting_noise(GenerationRequest("", 1, seed=2**53 - 1), (4, 2, 2))
    assert torch.equal(start.noise[1], again.noise[0])


def test_an_interpolation_needs_two_images_or_a_weight() -> None:
    for count, target in ((1, Interpolation(seed=1)), (2, Interpolation(seed=1, weight=0.5))):
        with pytest.raises(ValueError, match="several images, or for one at a weight"):
            starting_noise(GenerationRequest("", count, interpolate_to=target), (4, 2, 2))


# ---- image to image --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [PROMPT, ""])
def test_strength_0_is_the_copy_and_1_ignores_the_picture(
    faces: FaceGenerator, photo: np.ndarray, prompt: str
) -> None:
    copy = mark(faces.decode(faces.encode(photo))).astype(int)
    for count, apart in ((1, 0), (2, 1)):  # two at once may round otherwise than one
        run = faces.start(GenerationRequest(prompt, count, 6, seed=3, init_image=photo, strength=0.0))
        assert run.finished and (run.done, run.total) == (6, 6)
        pictures = faces.pictures(run)
        assert len(pictures) == count and all(np.abs(one.pixels - copy).max() <= apart for one in pictures)
    free, ignored = draw(faces, prompt, num_images=2), draw(faces, prompt, num_images=2, init_image=photo, strength=1.0)
    assert all(np.array_equal(one.pixels, other.pixels) for one, other in zip(free, ignored, strict=True))


@pytest.mark.parametrize(("strength", "steps", "left"), [(0.6, 50, 30), (0.9, 50, 45), (0.1, 10, 1), (0.01, 10, 1),
                                                         (0.3, 10, 3), (0.7, 1000, 700), (0.5, 1, 1)])
def test_strength_is_the_share_of_the_steps_that_are_taken(
    faces: FaceGenerator, photo: np.ndarray, strength: float, steps: int, left: int
) -> None:
    """Skipped steps count as done, so every job ends at t == total_t; at least one step is taken above 0."""
    run = faces.start(GenerationRequest(PROMPT, 1, steps, init_image=photo, strength=strength))
    assert (run.total - run.done, run.total) == (left, steps)


def test_the_distance_to_the_picture_grows_with_the_strength(bundled: FaceGenerator, photo: np.ndarray) -> None:
    for prompt in (OTHER, ""):
        distances = []
        for strength in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
            drawn = draw(bundled, prompt, num_images=4, num_inference_steps=10, init_image=photo, strength=strength)
            distances.append(np.mean([far(picture.pixels, photo) for picture in drawn]))
        assert distances == sorted(distances) and distances[-1] > 2 * distances[0], (prompt, distances)


def test_a_picture_of_the_wrong_size_is_refused(faces: FaceGenerator, photo: np.ndarray) -> None:
    with pytest.raises(ValueError, match="pixels must be uint8"):
        faces.start(GenerationRequest(PROMPT, init_image=photo[:64]))
    for wrong in ({"strength": 1.5}, {"latents": np.zeros((1, 4, 16, 16), np.float32)}):
        with pytest.raises(ValueError, match="and that a strength from 0 to 1"):
            faces.start(GenerationRequest(PROMPT, init_image=photo, **wrong))
    with pytest.raises(ValueError, match="a mask needs an init_image"):
        faces.start(GenerationRequest(PROMPT, mask=np.ones((128, 128), bool)))
    with pytest.raises(ValueError, match="mask must be bool"):
        faces.start(GenerationRequest(PROMPT, init_image=photo, mask=np.zeros((128, 128), bool)))


# ---- inpainting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_protected_pixels_come_back_byte_for_byte(
    faces: FaceGenerator, photo: np.ndarray, mask: np.ndarray, sampler: str
) -> None:
    (drawn,) = draw(faces, init_image=photo, mask=mask, sampler=sampler)
    assert np.array_equal(drawn.pixels[~mask], photo[~mask])
    assert far(drawn.pixels[mask], photo[mask]) > 5
    (plain,) = draw(faces, init_image=photo, mask=mask, sampler=sampler, watermark=False)
    assert np.array_equal(drawn.pixels, mark(plain.pixels, mask)) and not np.array_equal(drawn.pixels, plain.pixels)


def test_previews_show_the_composite_too(faces: FaceGenerator, photo: np.ndarray, mask: np.ndarray) -> None:
    run = faces.start(GenerationRequest(PROMPT, 1, 4, init_image=photo, mask=mask))
    for _ in range(3):
        faces.step([run])
        (preview,) = faces.previews(run)
        assert np.array_equal(preview.pixels[~mask], photo[~mask])


@pytest.mark.parametrize("sampler", ["UniPC", "DPM++ 2M", "Euler a", "DDPM"])
def test_the_protected_part_is_noised_picture_at_every_level(
    faces: FaceGenerator, photo: np.ndarray, mask: np.ndarray, sampler: str
) -> None:
    """Also under samplers with noise of their own and with a memory: the prediction there is the image."""
    run = faces.start(GenerationRequest(PROMPT, 1, 5, init_image=photo, mask=mask, sampler=sampler))
    z, kept = torch.from_numpy(faces.encode(photo)), latent_mask(mask, 16) == 0
    assert 0.3 < float(kept.float().mean()) < 0.9
    while not run.finished:
        faces.step([run])
        apart = (run.denoising.denoised()[0] - z)[:, kept].abs().max()
        assert float(apart) < 1e-3
    assert float((run.denoising.x[0] - z)[:, kept].abs().max()) < 0.02


def test_everything_masked_is_a_plain_drawing(faces: FaceGenerator, photo: np.ndarray) -> None:
    (free,), (masked,) = draw(faces), draw(faces, init_image=photo, mask=np.ones((128, 128), bool))
    assert np.abs(free.pixels.astype(int) - masked.pixels).max() <= 1


def test_one_pixel_is_a_mask(faces: FaceGenerator, photo: np.ndarray) -> None:
    for at in ((0, 0), (64, 64), (127, 5)):
        mask = np.zeros((128, 128), bool)
        mask[at] = True
        (drawn,) = draw(faces, "", init_image=photo, mask=mask)
        assert np.array_equal(drawn.pixels[~mask], photo[~mask])


def test_the_drawn_part_meets_the_picture_at_the_seam(photo: np.ndarray, mask: np.ndarray) -> None:
    """A generated image that is the image, only brighter by 40, must vanish into it: that is what the membrane is
    for."""
    dark = photo // 2
    (found,) = Inpainting(dark, mask, torch.zeros(4, 16, 16)).composite((dark + 40)[None])
    assert np.abs(found.astype(int) - dark).max() <= 1  # without it: 40


def test_the_membrane_is_flat_in_flat_surroundings_and_harmonic_elsewhere(mask: np.ndarray) -> None:
    solve = membrane(mask)
    flat = solve(np.full((128, 128, 3), 7.0, np.float32))
    assert np.allclose(flat[mask], 7, atol=1e-4) and not flat[~mask].any()
    slope = np.broadcast_to(np.arange(128, dtype=np.float32)[:, None, None], (128, 128, 3))
    assert np.allclose(solve(slope)[mask], slope[mask], atol=1e-3)  # a plane is its own mean
    assert not membrane(np.ones((128, 128), bool))(slope).any()


def test_the_feather_stays_inside(mask: np.ndarray) -> None:
    weight = feather(mask, FEATHER)
    assert not weight[~mask].any() and (weight[mask] > 0).all() and weight.max() == 1
    assert (weight[75 + FEATHER : 101 - FEATHER, 37 + FEATHER : 90 - FEATHER] == 1).all()
    thin = np.zeros((128, 128), bool)
    thin[50] = True
    assert feather(thin, FEATHER)[50].min() == 1  # a stroke too thin to fade in is generated all the same


def test_the_latent_mask_covers_what_it_touches_and_loosens_what_is_near() -> None:
    mask = np.zeros((128, 128), bool)
    mask[64, 64] = True
    free = latent_mask(mask, 16)
    assert free[8, 8] == 1 and (free == 1).sum() == 1 and (free == 0.5).sum() == 8


def test_edits_share_steps_with_other_jobs(faces: FaceGenerator, photo: np.ndarray, mask: np.ndarray) -> None:
    """Continuous batching: whatever is generated together is what it is alone."""
    asked = [
        GenerationRequest(PROMPT, 2, 5, seed=1, init_image=photo, strength=0.6, sampler="DDPM"),
        GenerationRequest("", 2, 4, seed=2, init_image=photo, mask=mask, sampler="Euler a"),
        GenerationRequest(OTHER, 1, 6, seed=3),
        GenerationRequest(PROMPT, 3, 6, seed=4, variation_strength=0.4, variation_seed=9, sampler="DPM++ 2M SDE"),
        GenerationRequest(PROMPT, 4, 5, seed=5, interpolate_to=Interpolation(OTHER, 8), guidance_scale=3.0),
        GenerationRequest(PROMPT, 3, 5, seed=5, interpolate_to=Interpolation(OTHER), guidance_scale=1.0),
        GenerationRequest(PROMPT, 2, 3, seed=6, init_image=photo, strength=0.0),
    ]
    alone = [finish(faces, [faces.start(request)])[0] for request in asked]
    together = finish(faces, [faces.start(request) for request in asked])
    for one, other in zip(alone, together, strict=True):
        assert [picture.seed for picture in one] == [picture.seed for picture in other]
        assert all(np.abs(a.pixels.astype(int) - b.pixels).max() <= 1 for a, b in zip(one, other, strict=True))


# ---- variations and interpolation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["UniPC", "DPM++ 2M", "DDPM"])
def test_variations_lead_from_the_seed_to_the_other_seed(faces: FaceGenerator, sampler: str) -> None:
    base, other = (draw(faces, sampler=sampler, seed=seed, num_images=2) for seed in (3, 50))
    options = {"sampler": sampler, "num_images": 2, "variation_seed": 50}
    none = draw(faces, variation_strength=0.0, **options)
    assert [one.seed for one in none] == [3, 4]
    assert all(np.array_equal(one.pixels, wanted.pixels) for one, wanted in zip(none, base, strict=True))
    whole = draw(faces, variation_strength=1.0, **options)
    assert [one.seed for one in whole] == [3, 3]
    for one, wanted in zip(whole, other, strict=True):
        assert np.abs(one.pixels.astype(int) - wanted.pixels).max() <= 1


def test_a_stronger_variation_is_farther_away(bundled: FaceGenerator) -> None:
    (base,) = draw(bundled, num_inference_steps=8)
    distances = []
    for strength in (0.05, 0.2, 0.4, 0.8):
        drawn = draw(bundled, num_inference_steps=8, num_images=4, variation_strength=strength, variation_seed=100)
        distances.append(np.mean([far(one.pixels, base.pixels) for one in drawn]))
    assert distances == sorted(distances) and distances[-1] > 3 * distances[0], distances


@pytest.mark.parametrize("scale", [1.0, 3.0, 0.0])
def test_an_interpolation_ends_where_it_should(faces: FaceGenerator, scale: float) -> None:
    row = draw(faces, num_images=4, guidance_scale=scale, interpolate_to=Interpolation(OTHER, 8))
    first, last = draw(faces, guidance_scale=scale)[0], draw(faces, OTHER, seed=8, guidance_scale=scale)[0]
    for one, wanted in ((row[0], first), (row[-1], last)):
        assert np.abs(one.pixels.astype(int) - wanted.pixels).max() <= 1
    assert [one.seed for one in row] == [3] * 4
    between = draw(faces, guidance_scale=scale, interpolate_to=Interpolation(OTHER, 8, weight=1 / 3))
    assert np.abs(between[0].pixels.astype(int) - row[1].pixels).max() <= 1


def test_between_two_prompts_a_picture_is_judged_by_the_nearer_one(bundled: FaceGenerator) -> None:
    row = draw(bundled, num_images=4, num_inference_steps=3, interpolate_to=Interpolation(OTHER))
    stated = [set(one.assessment["agreement"]) for one in row]
    assert stated == [set(dict(read(prompt, {}).attributes)) for prompt in (PROMPT, PROMPT, OTHER, OTHER)]
    (same,) = draw(bundled, num_inference_steps=3, interpolate_to=Interpolation(seed=8, weight=1.0))
    assert set(same.assessment["agreement"]) == stated[0]


def test_only_what_stands_between_two_prompts_needs_a_pass_more(faces: FaceGenerator) -> None:
    run = faces.start(GenerationRequest(PROMPT, 4, 2, guidance_scale=3.0, interpolate_to=Interpolation(OTHER)))
    rows: list[int] = []
    with faces.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0]))):
        finish(faces, [run])
    assert rows == [4 + 4 + 2] * 2


def test_an_interpolation_is_smooth(bundled: FaceGenerator) -> None:
    """No step along the way is a leap: each is far below the distance of two images that have nothing in common."""
    for target in (Interpolation(seed=8), Interpolation(OTHER)):
        row = draw(bundled, num_images=8, num_inference_steps=8, interpolate_to=target)
        steps = [far(one.pixels, other.pixels) for one, other in zip(row, row[1:], strict=False)]
        apart = far(row[0].pixels, row[-1].pixels)
        assert max(steps) < 0.6 * apart and max(steps) < 4 * np.mean(steps), (target, steps, apart)


# ---- an image's noise -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cosine", "flow"])
def test_inversion_finds_the_noise_that_the_sampler_takes_back(kind: Literal["cosine", "flow"]) -> None:
    """For Gaussian data the best prediction is known, so nothing is trained here: the fixed point is exact."""
    schedule, spread = NoiseSchedule(kind), 0.7
    config = scheduler_config(schedule)
    z = spread * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def model(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (one.view(-1, 1, 1, 1) for one in schedule.coefficients(level))
        clean = alpha * spread**2 * x / (alpha**2 * spread**2 + sigma**2)
        eps = (x - alpha * clean) / sigma
        return eps - clean if kind == "flow" else alpha * eps - sigma * clean

    def there_and_back(steps: int, rounds: int) -> float:
        name = "DDIM" if kind == "cosine" else "Flow Euler"
        inversion = Inversion(z, schedule, set_timesteps(make_scheduler(name, config), steps), rounds)
        evaluations = 0
        while not inversion.finished:
            x, level = inversion.model_input()
            inversion.advance(model(x, torch.full((len(x),), level)))
            evaluations += 1
        assert evaluations == steps * rounds and 0.6 < float(inversion.x.std()) < 1.3
        back = Denoising(make_scheduler(name, config), inversion.x, steps, schedule=schedule)
        while not back.finished:
            x, level = back.model_input()
            back.advance(model(x, torch.full((len(x),), level)))
        return float((back.x - z).square().mean().sqrt())

    errors = [there_and_back(25, rounds) for rounds in (1, 3, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 2e-3 < errors[0], errors


def test_a_photograph_becomes_noise_and_that_noise_the_photograph(bundled: FaceGenerator, photo: np.ndarray) -> None:
    search = bundled.inversion(photo, steps=25)  # half of what the server takes; with 12 the last rounds do not settle
    evaluations = 0
    while not search.finished:
        search.advance(7)
        evaluations += 7
    assert evaluations >= 25 * 3 and search.latent.shape == bundled.info.latent_shape
    copy = bundled.decode(bundled.encode(photo))
    options = {"num_inference_steps": 25, "sampler": "DDIM", "guidance_scale": 1.0}
    (again,), (other,) = draw(bundled, "", latents=search.latent[None], **options), draw(bundled, "", **options)
    assert far(again.pixels, copy) < 0.25 * far(other.pixels, copy)


def test_the_prompt_of_an_inversion_matters(faces: FaceGenerator, photo: np.ndarray) -> None:
    found = []
    for prompt in ("", PROMPT):
        search = faces.inversion(photo, prompt, steps=4)
        search.advance(100)
        found.append(search.latent)
    assert np.isfinite(found).all() and np.abs(found[0] - found[1]).max() > 1e-4


# ---- what an image says of itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["picture", "mask", "variation", "interpolation", "latents", "variation of a latent"])
def test_every_picture_restores_its_own_request(
    faces: FaceGenerator, photo: np.ndarray, mask: np.ndarray, name: str
) -> None:
    z = np.random.default_rng(0).standard_normal((3, *faces.info.latent_shape)).astype(np.float32)
    options: dict[str, Any] = {
        "picture": {"init_image": photo, "strength": 0.37, "sampler": "DDPM"},
        "mask": {"init_image": photo, "mask": mask, "strength": 0.9},
        "variation": {"variation_strength": 0.3, "variation_seed": 2**53 - 1, "sampler": "Euler a"},
        "interpolation": {"interpolate_to": Interpolation(OTHER, 8)},
        "latents": {"latents": np.stack([z[0]] * 3), "interpolate_to": Interpolation(latent=z[1])},
        "variation of a latent": {"latents": z, "variation_strength": 0.5, "variation_seed": 4},
    }[name]
    for picture in draw(faces, num_images=3, **options):
        request = restored(faces, picture.png)
        assert request.num_images == 1
        ((again,),) = finish(faces, [faces.start(request)])
        assert again.seed == picture.seed
        assert np.abs(again.pixels.astype(int) - picture.pixels).max() <= 1
        assert read_request(again.png) == read_request(picture.png)
