"""A prompt goes in, PNGs come out: how?

`FaceGenerator` loads a model folder and draws. It needs no server:

    from generator import DrawRequest, FaceGenerator

    faces = FaceGenerator.load("models/celeba128")
    for picture in faces.generate("a smiling woman with long blond hair", num_images=4, seed=7):
        Path(f"face-{picture.seed}.png").write_bytes(picture.png)

Image i is drawn from seed + i by its own noise generator on the CPU, at every random step, so the same seed gives the
same picture alone or among others, whatever the device. Many requests are drawn together, one denoising step at a time:

    runs = [faces.begin(DrawRequest("an old man")), faces.begin(DrawRequest("a woman", num_inference_steps=500))]
    while runs:
        faces.step(runs)  # one call of the network for all of them; others may join and leave between two steps
        for run in [run for run in runs if run.finished]:
            show(faces.pictures(run))
            runs.remove(run)

One `FaceGenerator` serves one thread at a time. This file does not know HTTP, queues or training.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from conditional_ldm import encode_prompts, load_unet
from core.checkpoint import folder_hash, read_index
from core.diffusion import (
    Condition,
    Denoising,
    Guidance,
    GuidedBatch,
    NotFiniteError,
    make_scheduler,
    schedule_from_config,
)
from core.editing import NUM_SEEDS, Redraw, Start, starting_noise
from core.engine import DrawRequest, Interpolation
from core.jobs import JobError
from core.pictures import as_text, encode_png, mask_picture
from core.preview import PreviewDecoder, load_preview
from core.watermark import VERSION, mark
from train_clip import load_clip
from vae import VAE, encoder_hash, load_vae, to_images

T = TypeVar("T")

log = logging.getLogger(__name__)


class JobCancelled(Exception):
    """Raised by `FaceGenerator.generate` as soon as its `should_stop` says so."""


@dataclass(frozen=True)
class ModelInfo:
    """What a loaded model says about itself."""

    name: str
    model_hash: str
    device: str
    image_size: int
    latent_shape: tuple[int, int, int]
    samplers: tuple[str, ...]
    default_sampler: str
    default_guidance_scale: float


@dataclass(frozen=True)
class Picture:
    """One image, preview or result: uint8 pixels [H, W, 3], the same as PNG, its whitened latent as float32 bytes.

    The pixels of a result carry the invisible watermark unless the request says no; the latent is that of the picture
    before it was marked.
    """

    index: int
    seed: int
    pixels: np.ndarray
    png: bytes
    latent: bytes


@dataclass(eq=False)
class Run:
    """A request being drawn: its place on the way and what is its own alone, from the scheduler to the random numbers.

    `error` says why it failed; then it is finished too. `asked` is what each of its pictures says about how it came
    about. `redraw` is there when only part of a picture is drawn.
    """

    seeds: list[int]
    asked: list[dict[str, Any]]
    guidance: Guidance
    denoising: Denoising
    watermark: bool
    redraw: Redraw | None = None
    error: JobError | None = None

    @property
    def num_images(self) -> int:
        return len(self.seeds)

    @property
    def done(self) -> int:
        """Steps behind it; those that `start` skipped count as done."""
        return self.denoising.done

    @property
    def total(self) -> int:
        return self.denoising.total

    @property
    def finished(self) -> bool:
        return self.error is not None or self.denoising.finished


@dataclass
class Company:
    """The runs that share the network's calls, and what need not be made again while they are the same ones."""

    runs: list[Run]
    batch: GuidedBatch
    rows_at_once: int  # fewer than all once they did not fit into memory


@dataclass(frozen=True)
class Step:
    """`done` of `total` steps are behind us. `previews()` decodes the images as predicted now, which costs a little."""

    done: int
    total: int
    previews: Callable[[], list[Picture]]


def pick_device(wanted: str = "auto") -> torch.device:
    """The device to compute on: CUDA, else MPS, else the CPU; or exactly the one that was named.

    Raises ValueError for a device that this machine or this build of torch does not have.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, mps, cuda or cuda:N; got {wanted!r}") from error
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(device.type) or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {wanted!r} is not available here (torch {torch.__version__}); use auto")
    return device


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type to compute in: fp32, or bf16 where the device does it natively (elsewhere it would only be slow).

    Raises ValueError for another word, or for bf16 where it is emulated.
    """
    if precision == "fp32":
        return torch.float32
    native = {
        "cpu": torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        "cuda": device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False),
    }
    if precision != "bf16" or not native.get(device.type, False):
        raise ValueError(f"precision must be fp32, or bf16 on a device that has it; got {precision!r} on {device}")
    return torch.bfloat16


def to_pixels(images: Tensor) -> np.ndarray:
    """Images [B, 3, H, W] around [-1, 1] -> uint8 [B, H, W, 3]. Clamped before the cast: a cast alone wraps around."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Only CUDA has an exception of its own for it; MPS and the CPU say it in words."""
    told = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in told or "can't allocate memory" in told


class FaceGenerator:
    """The networks of one model folder on one device, ready to draw."""

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable[[list[str]], tuple[Tensor, Tensor]],
        vae: VAE,
        unet: nn.Module,
        scheduler_config: Mapping[str, Any],
        info: ModelInfo,
        dtype: torch.dtype = torch.float32,
        preview: PreviewDecoder | None = None,
    ) -> None:
        self.clip, self.tokenizer, self.vae, self.unet, self.preview = clip, tokenizer, vae, unet, preview
        self.scheduler_config, self.info = scheduler_config, info
        self.device, self.dtype = torch.device(info.device), dtype
        self._company: Company | None = None

    @classmethod
    def load(
        cls, folder: str | Path, device: str = "auto", threads: int | None = None, precision: str = "fp32"
    ) -> FaceGenerator:
        """Load a model folder. `threads` sets torch's CPU threads for the whole process.

        `precision` "bf16" computes the networks in bfloat16: up to 1.8 times as fast on a CPU that has it, but then a
        seed's picture is no longer quite the same on every machine, so it has to be asked for.

        Raises ModelFolderError when the folder is missing or damaged, ValueError for a device or a precision that is
        not there.
        """
        folder, chosen = Path(folder), pick_device(device)
        dtype = pick_dtype(precision, chosen)
        if threads is not None:
            torch.set_num_threads(threads)
        index = read_index(folder)
        clip, tokenizer = load_clip(folder, "cpu")  # on the CPU first: no device ever reads a file
        vae, unet = load_vae(folder, "cpu"), load_unet(folder, "cpu")
        scheduler_config = json.loads((folder / "scheduler" / "config.json").read_text(encoding="utf-8"))
        info = ModelInfo(
            name=index["name"],
            model_hash=folder_hash(folder, ("clip", "vae", "unet")),  # all three decide what a seed looks like
            device=str(chosen),
            image_size=index["image_size"],
            latent_shape=tuple(index["latent_shape"]),
            samplers=tuple(scheduler_config["samplers"]),
            default_sampler=index["defaults"]["sampler"],
            default_guidance_scale=float(index["defaults"]["guidance_scale"]),
        )
        make_scheduler(info.default_sampler, scheduler_config)  # imports diffusers now, not in the first job
        preview = load_preview(folder, encoder_hash(vae), chosen)
        return cls(clip.to(chosen), tokenizer, vae.to(chosen), unet.to(chosen), scheduler_config, info, dtype, preview)

    # ---- many requests, one step at a time

    @torch.inference_mode()
    def begin(self, request: DrawRequest) -> Run:
        """Everything before the first step: the text, the noise and a scheduler of the request's own.

        Raises ValueError for a value out of range, JobError (`out_of_memory`) when the text does not fit.
        """
        count, steps, start = request.num_images, request.num_inference_steps, request.start
        if count < 1 or steps < 1 or not 0 <= start <= 1:
            raise ValueError(
                "num_images and num_inference_steps must be at least 1 and start from 0 to 1; "
                f"got {count}, {steps}, {start}"
            )
        if start > 0 and request.latents is None:
            raise ValueError(f"start = {start} needs latents to start from")
        scale = self.info.default_guidance_scale if request.guidance_scale is None else float(request.guidance_scale)
        sampler = self.info.default_sampler if request.sampler is None else request.sampler
        scheduler = make_scheduler(sampler, self.scheduler_config)
        shape = [count, *self.info.latent_shape]
        z = None if request.latents is None else torch.as_tensor(np.array(request.latents), dtype=torch.float32)
        if z is not None and list(z.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {list(z.shape)}")
        noise = starting_noise(request, self.info.latent_shape)
        redraw = None
        if request.init_image is not None:
            z, start = torch.from_numpy(self.encode(request.init_image)).expand(shape), 1 - request.strength
            redraw = None if request.mask is None else Redraw(request.init_image, request.mask, z[0])

        def encode(text: str) -> Condition:
            """One row an image; px asks for pictures as sharp as the best photographs."""
            px = self.info.image_size
            (one,) = self._fit(lambda _: encode_prompts(self.clip, self.tokenizer, [text], px=px), 1)
            return one.repeat(count)

        # The sampler's arithmetic stays on the CPU: dozens of operations on a few kilobytes, the same on every device
        denoising = Denoising(
            scheduler,
            noise.noise,
            steps,
            schedule=schedule_from_config(self.scheduler_config),
            generators=noise.generators,
            start=start,
            z=z,
        )
        target, negative = request.interpolate_to, request.negative_prompt
        goal = None if target is None or target.prompt is None else encode(target.prompt)
        guidance = Guidance(encode(request.prompt), scale, encode(negative) if negative.strip() else None,
                            goal, noise.weights if goal is not None else ())
        asked = receipts(request, noise, sampler, scale)
        return Run(noise.seeds, asked, guidance, denoising, request.watermark, redraw)

    @torch.inference_mode()
    def step(self, runs: Sequence[Run]) -> None:
        """Take every unfinished run one step further, with one call of the network for the images of all of them.

        A run that fails (`not_finite`, `out_of_memory`) gets its `error` and is finished; the others do not notice.
        Where memory is short the call is made in halves, down to single rows.
        """
        active = [run for run in runs if not run.finished]
        if not active:
            return
        if self._company is None or self._company.runs != active:
            batch = GuidedBatch([run.guidance for run in active])
            self._company = Company(active, batch, len(batch.pictures))
        company, batch = self._company, self._company.batch
        inputs = [run.denoising.model_input() for run in active]
        levels = [level for run, (_, level) in zip(active, inputs, strict=True) for _ in run.seeds]
        x = torch.cat([latents for latents, _ in inputs]).to(self.device)
        prediction, lost = self._predict(company, x, torch.tensor(levels, device=self.device))
        parts = batch.combine(prediction).cpu().split([run.num_images for run in active])
        first = 0
        for run, part in zip(active, parts, strict=True):
            if lost and not lost.isdisjoint(range(first, first + run.num_images)):
                run.error = out_of_memory()
            else:
                self._advance(run, part)
            first += run.num_images
        if any(run.finished for run in active):
            self._company = None

    def _predict(self, company: Company, latents: Tensor, levels: Tensor) -> tuple[Tensor, set[int]]:
        """The network's answer to every row, and the pictures that got none because memory was short."""
        x, timestep, condition = company.batch.inputs(latents, levels)

        def network(rows: slice) -> Tensor:
            with self.autocast():  # around the network alone: the sampler's arithmetic stays in fp32
                return self.unet(x[rows], timestep[rows], condition[rows])

        answers, lost = [], set()
        for rows, answer in self._in_pieces(network, len(x), company.rows_at_once):
            if answer is None:
                lost.add(company.batch.pictures[rows.start])
                answer = torch.full_like(x[rows], float("nan"))
            answers.append(answer)
        company.rows_at_once = max(map(len, answers))
        return answers[0] if len(answers) == 1 else torch.cat(answers), lost

    def _advance(self, run: Run, prediction: Tensor) -> None:
        try:
            if run.redraw is not None:
                prediction = run.redraw.constrain(run.denoising, prediction)
            run.denoising.advance(prediction)
        except NotFiniteError as error:
            run.error = not_finite(error)
        except Exception as error:  # whatever it was, it is this run's alone
            log.exception("a run failed at step %d of %d", run.done + 1, run.total)
            message = f"{type(error).__name__}: {error}"[:300]
            run.error = JobError("internal", message, "This is a fault of the server: see its log.")

    @torch.inference_mode()
    def previews(self, run: Run) -> list[Picture]:
        """The images as predicted now: through the model's preview decoder, which costs next to nothing, or without one
        through the whole decoder, in one call. Raises JobError (`out_of_memory`).
        """
        z = run.denoising.denoised()
        pixels = self._decode(z) if self.preview is None else to_pixels(self.preview(z.float().to(self.device)))
        return self._pictures(run, z, pixels, None)

    @torch.inference_mode()
    def pictures(self, run: Run) -> list[Picture]:
        """The images of a finished run. Raises its error, or JobError (`not_finite`, `out_of_memory`)."""
        if run.error is not None:
            raise run.error
        if not run.finished:
            raise ValueError(f"the run is at step {run.done} of {run.total}: it has previews, but no pictures yet")
        z = run.denoising.x
        if not bool(torch.isfinite(z).all()):
            raise not_finite(NotFiniteError("the finished latents hold NaN or infinity"))
        return self._pictures(run, z, self._decode(z), run.asked)

    def _pictures(
        self, run: Run, z: Tensor, pixels: np.ndarray, asked: Sequence[Mapping[str, Any]] | None
    ) -> list[Picture]:
        if run.redraw is not None:
            pixels = run.redraw.composite(pixels)
        version = VERSION if run.watermark and asked else None
        if version is not None:
            region = None if run.redraw is None else run.redraw.mask
            pixels = np.stack([mark(one, region) for one in pixels])
        return [
            Picture(i, seed, pixels[i], encode_png(pixels[i], asked and asked[i], self.info, version), _float32(z[i]))
            for i, seed in enumerate(run.seeds)
        ]

    # ---- pictures and latents

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """A picture as the whitened latent that `decode` turns back into nearly the same picture.

        Shapes: uint8 [H, W, 3], H = W = `info.image_size` -> float32 [C, h, w].
        Raises ValueError for another shape or type, JobError (`out_of_memory`).
        """
        shape = (self.info.image_size, self.info.image_size, 3)
        if pixels.shape != shape or pixels.dtype != np.uint8:
            raise ValueError(f"pixels must be uint8 {list(shape)}, got {pixels.dtype} {list(pixels.shape)}")
        images = to_images(torch.tensor(pixels, device=self.device)[None])

        def whitened(rows: slice) -> Tensor:
            with self.autocast():
                return self.vae.whiten(self.vae.encode(images[rows]).mean)

        return torch.cat(self._fit(whitened, 1))[0].float().cpu().numpy()

    @torch.inference_mode()
    def decode(self, latent: np.ndarray) -> np.ndarray:
        """The picture of a whitened latent. Shapes: float32 [C, h, w] -> uint8 [H, W, 3].

        Raises ValueError for another shape, NaN or infinity, JobError (`out_of_memory`).
        """
        if latent.shape != self.info.latent_shape or not np.isfinite(latent).all():
            raise ValueError(f"latent must be finite numbers {list(self.info.latent_shape)}, got {list(latent.shape)}")
        return self._decode(torch.tensor(latent, dtype=torch.float32)[None])[0]

    def _decode(self, z: Tensor) -> np.ndarray:
        """Whitened latents [B, C, h, w] -> uint8 [B, H, W, 3]."""

        def pixels(rows: slice) -> np.ndarray:
            with self.autocast():
                return to_pixels(self.vae.decode(self.vae.unwhiten(z[rows].to(self.device))))

        return np.concatenate(self._fit(pixels, len(z)))

    # ---- memory

    def _in_pieces(
        self, compute: Callable[[slice], T], count: int, at_once: int
    ) -> Iterator[tuple[slice, T | None]]:
        """`compute` over `count` rows, `at_once` or, where memory is short, fewer; None: not even that row alone."""
        waiting = [slice(first, min(first + at_once, count)) for first in range(0, count, at_once)][::-1]
        while waiting:
            rows, result = waiting.pop(), None
            try:
                result = compute(rows)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            if result is None:  # past the except clause: the error would keep the failed call's memory alive
                if self.device.type != "cpu":
                    torch.get_device_module(self.device).empty_cache()
                if rows.stop - rows.start > 1:
                    middle = (rows.start + rows.stop) // 2
                    waiting += [slice(middle, rows.stop), slice(rows.start, middle)]
                    continue
            yield rows, result

    def _fit(self, compute: Callable[[slice], T], count: int) -> list[T]:
        """The results of `compute` over `count` rows, in as few pieces as memory allows. Raises JobError."""
        found = []
        for _, result in self._in_pieces(compute, count, count):
            if result is None:
                raise out_of_memory()
            found.append(result)
        return found

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    # ---- one request from beginning to end

    def generate(
        self,
        prompt: str,
        *,
        num_images: int = 1,
        num_inference_steps: int = 50,
        seed: int = 0,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
        sampler: str | None = None,
        latents: np.ndarray | Tensor | None = None,
        start: float = 0.0,
        init_image: np.ndarray | None = None,
        strength: float = 1.0,
        mask: np.ndarray | None = None,
        variation_strength: float = 0.0,
        variation_seed: int = 0,
        interpolate_to: Interpolation | None = None,
        watermark: bool = True,
        on_step: Callable[[Step], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Picture]:
        """Draw `num_images` pictures of `prompt`, the i-th from `seed + i`; the arguments are those of `DrawRequest`.

        `on_step` is called after every step.
        Raises ValueError for arguments out of range, JobCancelled as soon as `should_stop()` is true, JobError
        (`not_finite`, `out_of_memory`) when the model or the machine fails.
        """

        def stop_if_asked() -> None:
            if should_stop is not None and should_stop():
                raise JobCancelled

        run = self.begin(
            DrawRequest(prompt, num_images, num_inference_steps, seed, guidance_scale, negative_prompt, sampler,
                        latents, start, init_image, strength, mask, variation_strength, variation_seed, interpolate_to,
                        watermark)
        )
        stop_if_asked()
        while not run.finished:
            self.step([run])
            if on_step is not None and run.error is None:
                on_step(Step(run.done, run.total, lambda: self.previews(run)))
            stop_if_asked()
        return self.pictures(run)


def receipts(request: DrawRequest, noise: Start, sampler: str, scale: float) -> list[dict[str, Any]]:
    """For every image the request that draws it alone: the body of POST /text_to_image with every default filled in."""
    common: dict[str, Any] = {
        "prompt": request.prompt, "n_images": 1, "n_inf_steps": request.num_inference_steps, "sampler": sampler,
        "guidance_scale": scale, "negative_prompt": request.negative_prompt, "start_timestep": request.start,
    }
    if request.init_image is not None:
        common |= {"init_image": as_text(request.init_image), "strength": request.strength}
        common |= {} if request.mask is None else {"mask": as_text(mask_picture(request.mask))}
    found = [{**common, "seed": seed} for seed in noise.seeds]
    for i, row in enumerate(found):
        if request.latents is not None:
            row["latent"] = _text(request.latents[i])
        if request.variation_strength > 0:
            row["variation_strength"] = request.variation_strength
            row["variation_seed"] = (request.variation_seed + i) % NUM_SEEDS
        if (target := request.interpolate_to) is not None:
            goal = {"prompt": target.prompt, "seed": target.seed,
                    "latent": None if target.latent is None else _text(target.latent), "weight": noise.weights[i]}
            row["interpolate_to"] = {name: value for name, value in goal.items() if value is not None}
    return found


def out_of_memory() -> JobError:
    return JobError("out_of_memory", "The device has too little memory for even one image.",
                    "Close other programs that use it, or start with --device cpu.")


def not_finite(error: NotFiniteError) -> JobError:
    return JobError("not_finite", f"No picture came out: {error}.",
                    "Try a lower guidance scale, another sampler or --device cpu.")


def _text(latent: Any) -> str:
    """A latent as a request carries it: base64 of little-endian float32."""
    return base64.b64encode(np.asarray(latent, "<f4").tobytes()).decode()


def _float32(z: Tensor) -> bytes:
    return z.detach().cpu().contiguous().numpy().astype("<f4").tobytes()
