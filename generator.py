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

What there is can be changed, varied and led on; `core/diffusion/inpainting.py` says how, and `DrawRequest` what can be
asked:

    (face,) = faces.generate("a smiling woman", seed=7)
    faces.generate("an old man", init_image=face.pixels, strength=0.6)  # 0 gives the VAE's copy, 1 ignores it
    faces.generate("a woman with glasses", init_image=face.pixels, mask=eyes)  # bool [H, W]: the rest stays as it is
    faces.generate("a smiling woman", seed=7, variation_strength=0.3, variation_seed=1)
    faces.generate("a smiling woman", num_images=8, seed=7, interpolate_to=Interpolation("an old man", seed=8))
    faces.generate("a man", num_images=2, candidates=8, attributes={"Smiling": 1.5})  # the best of eight, with a slider
    face.about  # what the judge sees in it, how well it fits, how near it is to a training picture
    search = faces.inversion(photo)  # `advance` until it is finished: `latent` is the noise that draws this photograph

Finished pictures carry an invisible mark (`core/imaging/watermark.py`) unless `watermark=False`. `notebooks/tour.ipynb`
shows all of this. One `FaceGenerator` serves one thread at a time. This file does not know HTTP, queues or training.

Long because all that a model can be asked (draw, preview, judge, encode, invert, decode) shares one way to call it that
survives a shortage of memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from core.diffusion.conditioning import Condition, Flat, join_conditions
from core.diffusion.guidance import START, Guidance, GuidedBatch, pushes
from core.diffusion.initial_noise import starting_noise
from core.diffusion.inpainting import Redraw
from core.diffusion.inversion import Inversion, Inverting
from core.diffusion.latent_correction import COMPONENT as CORRECTION
from core.diffusion.latent_correction import Correction, load_correction
from core.diffusion.sampling import Denoising, NotFiniteError
from core.diffusion.schedule import NoiseSchedule, schedule_from_config
from core.diffusion.schedulers import TURBO, TURBO_STEPS, make_scheduler, set_timesteps
from core.diffusion.unet import encode_prompts, load_turbo, load_unet, read_schedule
from core.engine import DrawRequest, Interpolation, JobError, usual_sampler, usual_strength
from core.evaluation.attribute_classifier import Judge, best, find_judge
from core.evaluation.image_assessment import compare, find_index, hear
from core.evaluation.memorization_index import Index
from core.imaging.generation_parameters import findings, receipts, wanted
from core.imaging.png_metadata import encode_png, quick_png
from core.imaging.watermark import VERSION, mark
from core.nn.checkpoint import folder_hash, read_index
from core.nn.device import is_out_of_memory, pick_device, pick_dtype
from core.nn.layers import to_images, to_pixels
from core.nn.openvino_backend import Compiled, CompileError, Compiler, Composed
from core.nn.preview_decoder import PreviewDecoder, load_preview
from core.nn.rewriting_rules import load_emphasis
from core.text.attribute_sliders import moved
from core.text.prompt_balancing import balanced
from core.text.prompt_rewriting import Emphasis
from train_clip import load_clip
from vae import VAE, encoder_hash, load_vae

T = TypeVar("T")
log = logging.getLogger(__name__)
TEXTS = 64  # descriptions that are remembered as they were read
CACHE = Path(__file__).resolve().parent / ".cache"  # networks compiled for this machine; may be deleted at any time
INVERSION_STEPS, INVERSION_ROUNDS = 50, 3


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
    long_sampler: str  # of more than `core.engine.MANY_STEPS` steps
    default_guidance_scale: float
    one_pass: tuple[float, float] | None = None  # guidance scales that cost no second pass, if it learned any
    engine: str = f"torch {torch.__version__} f32"  # what computes the networks, and how precisely
    sliders: Mapping[str, Any] = field(default_factory=dict)  # what each was measured to do, if it was
    few_steps: Mapping[str, int] = field(default_factory=dict)  # samplers made for few steps -> how many
    step_curve: tuple[Mapping[str, Any], ...] = ()  # what more steps buy, if that was measured
    emphasis: Emphasis = field(default_factory=Emphasis)  # in which words a description is heard
    read_to: Callable[[str], int] = field(default=len, compare=False, repr=False)  # so many characters of it


@dataclass(frozen=True)
class Picture:
    """One image, preview or result: uint8 pixels [H, W, 3], the same as PNG, its whitened latent as float32 bytes.

    The pixels of a result carry the invisible watermark unless the request says no; the latent is that of the picture
    before it was marked. `about` is what else is known of a result: what the judge sees in it, how often the network
    was asked for it.
    """

    index: int
    seed: int
    pixels: np.ndarray
    png: bytes
    latent: bytes
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Run:
    """A request being drawn: its place on the way and what is its own alone, from the scheduler to the random numbers.

    `error` says why it failed; then it is finished too. `asked` is what each of its pictures says about how it came
    about, with prompts of their own where they are `balanced`. The best `kept` are the result. `redraw` is there when
    only part of a picture is drawn. `steered` is the guidance from step `steer_from` on, `plain` that before.
    """

    seeds: list[int]
    kept: int
    balanced: bool
    asked: list[dict[str, Any]]
    plain: Guidance
    steered: Guidance
    steer_from: int
    denoising: Denoising
    redraw: Redraw | None
    turbo: bool  # drawn by the network of few steps
    watermark: bool
    evaluations: list[int]  # of the network, for each picture
    error: JobError | None = None

    @property
    def guidance(self) -> Guidance:
        """That of the next step."""
        return self.plain if self.done < self.steer_from else self.steered

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

    guidances: list[Guidance]
    batch: GuidedBatch
    rows_at_once: int  # fewer than all once they did not fit into memory


@dataclass(frozen=True)
class Step:
    """`done` of `total` steps are behind us. `previews()` decodes the images as predicted now, which costs a little."""

    done: int
    total: int
    previews: Callable[[], list[Picture]]


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
        judge: Judge | None = None,
        index: Index | None = None,
        turbo: nn.Module | None = None,
        correction: Correction | None = None,
    ) -> None:
        self.correction = correction
        self.clip, self.tokenizer, self.vae, self.unet, self.preview = clip, tokenizer, vae, unet, preview
        self.judge, self.index = judge, index
        self.scheduler_config, self.info = scheduler_config, info
        self.device, self.dtype = torch.device(info.device), dtype
        self.turbo = turbo  # the network of the sampler "Turbo", if the folder has one
        # what computes: noisy latents, levels and conditions -> predictions; whitened latents -> images
        self.denoise: Callable[[Tensor, Tensor, Condition], Tensor] = self._by_torch(unet)
        self.denoise_fast: Callable[[Tensor, Tensor, Condition], Tensor] | None = turbo and self._by_torch(turbo)
        self.draw: Callable[[Tensor], Tensor] = self._draw_by_torch
        # whitened latents -> previews [B, H, W, 3] in [0, 255]; None: the folder has no preview decoder
        self.sketch: Callable[[Tensor], Tensor] | None = preview and preview.levels
        self._compiled: list[Compiled] = []  # those that `rest` prepares
        self._texts: dict[str, Condition] = {}  # as they were read, the last ones last
        self._companies: dict[bool, Company] = {}  # of runs that are drawn by turbo, and of those that are not

    def known(self, turbo: bool = False) -> tuple[float, float] | None:
        """The guidance scales that one pass of a network answers, from the first to the last; None: it knows none."""
        return getattr(self.turbo if turbo else self.unet, "guidance_range", None)

    @classmethod
    def load(
        cls, folder: str | Path, device: str = "auto", threads: int | None = None, precision: str = "fp32",
        engine: str = "auto", cache: str | Path | None = CACHE,
    ) -> FaceGenerator:
        """Load a model folder, and the judge beside it if there is one. `threads` sets torch's CPU threads for the
        whole process.

        `precision` "bf16" computes the networks in bfloat16: up to 1.8 times as fast on a CPU that has it, but then a
        seed's picture is no longer quite the same on every machine, so it has to be asked for.

        `engine` "openvino" compiles the networks that draw for this CPU and keeps the result in the folder `cache`
        (None: nowhere), "torch" does not; "auto" takes OpenVINO where it is installed, the device is the CPU and it
        works; then numpy's matrix products get one thread in the whole process.

        Raises ModelFolderError when the folder is missing or damaged, ValueError for a device, a precision or an engine
        that is not there.
        """
        folder, chosen = Path(folder), pick_device(device)
        dtype = pick_dtype(precision, chosen)
        if engine not in ("auto", "openvino", "torch") or (engine == "openvino" and chosen.type != "cpu"):
            raise ValueError(f"engine must be auto, torch, or openvino on the CPU; got {engine!r} on {chosen}")
        if threads is not None:
            torch.set_num_threads(threads)
        index, turbo = read_index(folder), load_turbo(folder, "cpu")
        clip, tokenizer = load_clip(folder, "cpu")  # on the CPU first: no device ever reads a file
        vae = load_vae(folder, "cpu")
        unet = load_unet(folder, "cpu", vae)
        scheduler_config = json.loads((folder / "scheduler" / "config.json").read_text(encoding="utf-8"))
        digest = model_hash(folder)
        measured, quality = index.get("sliders", {}), index.get("metrics", {})
        points = (quality.get("curve") or {}).get("points", ()) if quality.get("model_hash") == digest else ()
        info = ModelInfo(
            name=index["name"],
            model_hash=digest,
            device=str(chosen),
            image_size=index["image_size"],
            latent_shape=tuple(index["latent_shape"]),
            samplers=(*scheduler_config["samplers"], *([] if turbo is None else [TURBO])),
            default_sampler=index["defaults"]["sampler"],
            long_sampler=index["defaults"].get("long_sampler", index["defaults"]["sampler"]),
            default_guidance_scale=float(index["defaults"]["guidance_scale"]),
            one_pass=unet.guidance_range,
            engine=f"torch {torch.__version__} {precision.replace('fp', 'f')}",
            sliders=measured["sliders"] if measured.get("model_hash") == digest else {},
            few_steps={} if turbo is None else {TURBO: TURBO_STEPS},
            step_curve=tuple({name: point[name] for name in ("steps", "frechet_over_floor")} for point in points),
            emphasis=load_emphasis(folder).within(tokenizer.read_to),
            read_to=tokenizer.read_to,
        )
        make_scheduler(info.default_sampler, scheduler_config)  # what it imports is imported now, not in the first job
        preview = load_preview(folder, encoder_hash(vae), chosen)
        judge = find_judge(folder.parent / "judge", chosen)
        vae, unet, turbo = vae.to(chosen), unet.to(chosen), turbo and turbo.to(chosen)
        known = find_index(folder)
        faces = cls(clip.to(chosen), tokenizer, vae, unet, scheduler_config, info, dtype, preview, judge, known, turbo,
                    load_correction(folder))
        if engine == "openvino" or (engine == "auto" and chosen.type == "cpu"):
            try:
                faces.compile(None if cache is None else Path(cache))
            except CompileError as error:
                if engine == "openvino":
                    raise ValueError(f"engine openvino does not work here: {error}; use auto or torch") from error
                log.warning("torch draws, which is slower than OpenVINO would be: %s", error)
        log.info("%s draws, with %d threads", faces.info.engine, torch.get_num_threads())
        return faces

    def compile(self, cache: Path | None) -> None:
        """Let OpenVINO draw from now on, with the weights as they are now. Raises CompileError."""
        from threadpoolctl import threadpool_limits  # here, because it changes the environment

        compiler = Compiler(cache, torch.get_num_threads(), self.dtype)
        with torch.inference_mode():
            condition = encode_prompts(self.clip, self.tokenizer, ["a face", ""])
        latents = torch.randn(2, *self.info.latent_shape, generator=torch.Generator().manual_seed(0))
        example = Flat.inputs(latents, torch.tensor([900.0, 100.0]), condition)
        unet = compiler.compile("unet", Flat(self.unet), example, self.info.model_hash, pairs=True)
        decoder = Composed(self.vae, self.vae.unwhiten, self.vae.decode)
        self.draw = compiler.compile("decoder", decoder, (latents,), self.info.model_hash)
        if self.preview is not None:  # two pools of threads in one step wait for each other: so this one, too
            sketch = Composed(self.preview, self.preview.levels)
            self.sketch = compiler.compile("preview", sketch, (latents,), self.info.model_hash)
        if self.judge is not None and self.dtype == torch.float32:  # its opinions are never those of 16 bits
            pictures = torch.zeros(2, 3, self.info.image_size, self.info.image_size)
            pictures[1] += torch.linspace(-1, 1, self.info.image_size)
            self.judge.faster = compiler.compile("judge", self.judge.trunk, (pictures,), self.judge.digest)
        if self.turbo is not None:
            turbo = compiler.compile("turbo", Flat(self.turbo), example, self.info.model_hash, pairs=True)
            self.denoise_fast = turbo.denoise
            self._compiled.append(turbo)
        self._compiled.append(unet)
        self.denoise, self.info = unet.denoise, replace(self.info, engine=compiler.name)
        # numpy's threads wait for their next product at full speed: the picture after it took half as long again
        threadpool_limits(1, user_api="blas")

    def warm_up(self) -> None:
        """Draw one picture for nobody: a first call prepares kernels and tables, which no job has to wait for then."""
        try:
            self.generate("a face", num_inference_steps=1)
        except JobError as error:
            log.warning("the first picture, drawn for nobody, failed: %s", error)

    def rest(self) -> bool:
        """Nobody waits: prepare one of the networks for several pictures at once, which the first job of several would
        do otherwise. False: nothing is left to do."""
        return any(compiled.prepare() for compiled in self._compiled)

    # ---- many requests, one step at a time

    @torch.inference_mode()
    def begin(self, request: DrawRequest) -> Run:
        """Everything before the first step: the text, the noise and a scheduler of the request's own.

        Raises ValueError for a value out of range, JobError (`out_of_memory`) when the text does not fit.
        """
        kept, steps, start = request.num_images, request.num_inference_steps, request.start
        if kept < 1 or steps < 1 or not 0 <= start <= 1:
            raise ValueError(
                "num_images and num_inference_steps must be at least 1 and start from 0 to 1; "
                f"got {kept}, {steps}, {start}"
            )
        count = kept if request.candidates is None else request.candidates
        if count < kept:
            raise ValueError(f"candidates must be at least num_images = {kept}, got {count}")
        if start > 0 and request.latents is None:
            raise ValueError(f"start = {start} needs latents to start from")
        scale = self.info.default_guidance_scale if request.guidance_scale is None else float(request.guidance_scale)
        sampler = usual_sampler(self.info, steps) if request.sampler is None else request.sampler
        if sampler == TURBO and self.turbo is None:
            raise ValueError(f"sampler {TURBO!r} is not there: the model has no turbo/")
        scheduler = make_scheduler(sampler, self.scheduler_config)
        shape = [count, *self.info.latent_shape]
        z = None if request.latents is None else torch.as_tensor(np.array(request.latents), dtype=torch.float32)
        if z is not None and list(z.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {list(z.shape)}")
        noise = starting_noise(replace(request, num_images=count), self.info.latent_shape)
        redraw = None
        unsound = request.latents is not None or not 0 <= request.strength <= 1
        if request.mask is not None if request.init_image is None else unsound:
            raise ValueError("a mask needs an init_image, and that a strength from 0 to 1, and cannot have latents; "
                             f"got strength {request.strength}")
        if request.init_image is not None:
            z, start = torch.from_numpy(self.encode(request.init_image)).expand(shape), 1 - request.strength
            redraw = None if request.mask is None else Redraw(request.init_image, request.mask, z[0])

        known: dict[str, Condition] = {}

        def encode(texts: Sequence[str]) -> Condition:
            """One row an image. Each text is read alone, so that no row depends on the others."""
            for text in dict.fromkeys(texts):
                if text not in known:
                    known[text] = self._read(text)
            if len(set(texts)) == 1:
                return known[texts[0]].repeat(count)
            return join_conditions([known[text] for text in texts])

        prompts = [request.prompt] * count
        if request.balance:  # candidate j is another try at image j modulo kept
            prompts = [balanced(request.prompt, request.seed + j % kept) for j in range(count)]
        target, negative, in_words = request.interpolate_to, request.negative_prompt, self.info.emphasis
        goal = None if target is None or target.prompt is None else encode([in_words(target.prompt)] * count)
        away = encode([negative] * count) if negative.strip() else None
        heard = {prompt: in_words(prompt) for prompt in dict.fromkeys(prompts)}
        plain = Guidance(encode([heard[prompt] for prompt in prompts]), scale, away,
                         goal, noise.weights if goal is not None else (), known=self.known(sampler == TURBO))
        # The sampler's arithmetic stays on the CPU: dozens of operations on a few kilobytes, the same on every device
        denoising = Denoising(
            scheduler,
            noise.noise,
            steps,
            schedule=schedule_from_config(self.scheduler_config),
            generators=noise.generators,
            start=start,
            z=z,  # what stays of a photograph needs no mending
            correction=None if redraw else self.correction and partial(self.correction, scales=plain.scales),
        )
        sliders = moved(request.attributes)
        steered = replace(plain, pushes=pushes(prompts, sliders, encode, self.info.read_to)) if sliders else plain
        asked = receipts(replace(request, attributes=sliders), prompts, noise.seeds, noise.weights, sampler, scale)
        return Run(noise.seeds, kept, request.balance, asked, plain, steered, int(START * denoising.total), denoising,
                   redraw, sampler == TURBO, request.watermark, [0] * count)

    def _read(self, text: str) -> Condition:
        """One row; px asks for pictures as sharp as the best photographs. Raises JobError (`out_of_memory`).

        The last texts are remembered: the same words come again with another seed.
        """
        found = self._texts.pop(text, None)
        if found is None:
            px = self.info.image_size
            found = self._fit(lambda _: encode_prompts(self.clip, self.tokenizer, [text], px=px), 1)[0]
        self._texts[text] = found  # to the end: the one that was not asked for longest goes first
        if len(self._texts) > TEXTS:
            del self._texts[next(iter(self._texts))]
        return found

    @torch.inference_mode()
    def step(self, runs: Sequence[Run]) -> None:
        """Take every unfinished run one step further, with one call of the network for the images of all of them (one
        of each network, where some are drawn by turbo).

        A run that fails (`not_finite`, `out_of_memory`) gets its `error` and is finished; the others do not notice.
        Where memory is short the call is made in halves, down to single rows.
        """
        for turbo in (False, True):
            active = [run for run in runs if not run.finished and run.turbo == turbo]
            if active:
                self._step(active, turbo)

    def _step(self, active: Sequence[Run], turbo: bool) -> None:
        guidances = [run.guidance for run in active]  # a run's own, so that the same ones are those of the same runs
        company = self._companies.get(turbo)
        if company is None or not same(company.guidances, guidances):
            batch = GuidedBatch(guidances)
            company = self._companies[turbo] = Company(guidances, batch, len(batch.pictures))
        inputs = [run.denoising.model_input() for run in active]
        levels = [level for run, (_, level) in zip(active, inputs, strict=True) for _ in run.seeds]
        x = torch.cat([latents for latents, _ in inputs]).to(self.device)
        prediction, lost = self._predict(company, x, torch.tensor(levels, device=self.device), turbo)
        parts = company.batch.combine(prediction).cpu().split([run.num_images for run in active])
        first = 0
        for run, part in zip(active, parts, strict=True):
            if lost and not lost.isdisjoint(range(first, first + run.num_images)):
                run.error = out_of_memory()
            else:
                self._advance(run, part)
            first += run.num_images
        if any(run.finished for run in active):
            del self._companies[turbo]

    def _predict(
        self, company: Company, latents: Tensor, levels: Tensor, turbo: bool = False
    ) -> tuple[Tensor, set[int]]:
        """The network's answer to every row, and the pictures that got none because memory was short."""
        x, timestep, condition = company.batch.inputs(latents, levels)
        denoise = self.denoise_fast if turbo and self.denoise_fast is not None else self.denoise

        def network(rows: slice) -> Tensor:
            return denoise(x[rows], timestep[rows], condition[rows])

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
            passes = run.guidance.num_passes
            run.evaluations = [before + more for before, more in zip(run.evaluations, passes, strict=True)]
            if run.redraw is not None:
                prediction = run.redraw.constrain(run.denoising, prediction)
            run.denoising.advance(prediction)
        except NotFiniteError as error:
            run.error = not_finite(error)
        except Exception as error:  # whatever it was, it is this run's alone
            log.exception("a run failed at step %d of %d", run.done + 1, run.total)
            run.error = JobError.of(error)

    @torch.inference_mode()
    def previews(self, run: Run) -> list[Picture]:
        """The images as predicted now: through the model's preview decoder, which costs next to nothing, or without one
        through the whole decoder, in one call. Raises JobError (`out_of_memory`).
        """
        z = run.denoising.denoised()[: run.kept]  # of candidates the first: which are the best is not known yet
        quick = self.sketch
        pixels = self._decode(z) if quick is None else quick(z.float().to(self.device)).cpu().numpy().astype(np.uint8)
        pixels = pixels if run.redraw is None else run.redraw.composite(pixels)
        return [
            Picture(i, run.seeds[i], pixels[i], quick_png(pixels[i]), _float32(one)) for i, one in enumerate(z)
        ]

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
        pixels = self._decode(z)
        pixels = pixels if run.redraw is None else run.redraw.composite(pixels)
        found = hear(self.judge, pixels, [wanted(row) for row in run.asked])
        kept = best(found, run.kept, places=run.kept if run.balanced else 1)
        near = compare(self.index, pixels[kept])
        version, region = VERSION if run.watermark else None, None if run.redraw is None else run.redraw.mask
        shown = [mark(pixels[i], region) if run.watermark else pixels[i] for i in kept]
        return [
            Picture(index, run.seeds[i], shown[index], encode_png(shown[index], run.asked[i], self.info, version),
                    _float32(z[i]),
                    findings(found[i], near[index], run.evaluations[i],
                             run.asked[i]["prompt"] if run.balanced else None))
            for index, i in enumerate(kept)
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
    def inversion(self, pixels: np.ndarray, prompt: str = "", steps: int = INVERSION_STEPS) -> Inverting:
        """Begin to look for the noise that draws this picture with DDIM, `steps` steps and guidance 1 (any guidance
        where the prompt is empty). Its `advance` goes on, `latent` is the noise when it is `finished`.

        Shapes and errors: as `encode`.
        """
        z = torch.from_numpy(self.encode(pixels))[None]
        batch = GuidedBatch([Guidance(self._read(self.info.emphasis(prompt)))])
        timesteps = set_timesteps(make_scheduler(inverse_sampler(self.info), self.scheduler_config), steps)
        way = Inversion(z, schedule_from_config(self.scheduler_config), timesteps, INVERSION_ROUNDS)

        def predict(x: Tensor, level: float) -> Tensor:
            prediction, lost = self._predict(Company([], batch, 1), x.to(self.device),
                                             torch.tensor([level], device=self.device))
            if lost:
                raise out_of_memory()
            if not bool(torch.isfinite(prediction).all()):
                raise not_finite(NotFiniteError(f"NaN or infinity on the way back, at step {way.done + 1}"))
            return batch.combine(prediction).cpu()

        return Inverting(way, predict)

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

        return np.concatenate(self._fit(lambda rows: to_pixels(self.draw(z[rows].to(self.device))), len(z)))

    def _by_torch(self, network: nn.Module) -> Callable[[Tensor, Tensor, Condition], Tensor]:
        def denoise(x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
            with self.autocast():  # around the network alone: the sampler's arithmetic stays in fp32
                return network(x, timestep, condition)

        return denoise

    def _draw_by_torch(self, x: Tensor) -> Tensor:
        with self.autocast():
            return self.vae.decode(self.vae.unwhiten(x))

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
        strength: float | None = None,
        mask: np.ndarray | None = None,
        variation_strength: float = 0.0,
        variation_seed: int = 0,
        interpolate_to: Interpolation | None = None,
        watermark: bool = True,
        attributes: Mapping[str, float] | None = None,
        candidates: int | None = None,
        balance: bool = False,
        on_step: Callable[[Step], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Picture]:
        """Draw `num_images` pictures of `prompt`, the i-th from `seed + i`; the arguments are those of `DrawRequest`.

        `strength` None is 0.6, or 1 with a mask. `on_step` is called after every step.
        Raises ValueError for arguments out of range, JobCancelled as soon as `should_stop()` is true, JobError
        (`not_finite`, `out_of_memory`) when the model or the machine fails.
        """

        def stop_if_asked() -> None:
            if should_stop is not None and should_stop():
                raise JobCancelled

        if strength is None:
            strength = usual_strength(mask is not None)
        run = self.begin(
            DrawRequest(prompt, num_images, num_inference_steps, seed, guidance_scale, negative_prompt, sampler,
                        latents, start, init_image, strength, mask, variation_strength, variation_seed, interpolate_to,
                        watermark, attributes or {}, candidates, balance)
        )
        stop_if_asked()
        while not run.finished:
            self.step([run])
            if on_step is not None and run.error is None:
                on_step(Step(run.done, run.total, lambda: self.previews(run)))
            stop_if_asked()
        return self.pictures(run)


def model_hash(folder: str | Path) -> str:
    """The hash of all that decides what a seed looks like: the weights, where the way from noise begins, what mends
    its end, and in which words a description is heard."""
    more = [name for name in ("turbo", CORRECTION) if name in read_index(folder)["components"]]
    weights = folder_hash(folder, ["clip", "vae", "unet", *more])
    begin, emphasis = read_schedule(folder).begin, load_emphasis(folder)
    rest = [str(list(begin))] if begin != NoiseSchedule.begin else []
    rest += [emphasis.to_json()] if emphasis != Emphasis() else []
    return hashlib.sha256(" ".join([weights, *rest]).encode()).hexdigest() if rest else weights


def same(some: Sequence[object], others: Sequence[object]) -> bool:
    """Are these the same objects in the same order?"""
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def inverse_sampler(info: ModelInfo) -> str:
    """The sampler whose steps an inversion takes back."""
    return "DDIM" if "DDIM" in info.samplers else info.default_sampler


def out_of_memory() -> JobError:
    return JobError("out_of_memory", "The device has too little memory for even one image.",
                    "Close other programs that use it, or start with --device cpu.")


def not_finite(error: NotFiniteError) -> JobError:
    return JobError("not_finite", f"No picture came out: {error}.",
                    "Try a lower guidance scale, another sampler or --device cpu.")


def _float32(z: Tensor) -> bytes:
    return z.detach().cpu().contiguous().numpy().astype("<f4").tobytes()
