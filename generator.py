"""A prompt goes in, PNGs come out: how?

`FaceGenerator` loads a model folder and generates. It needs no server:

    from generator import GenerationRequest, FaceGenerator

    faces = FaceGenerator.load("models/celeba128")
    for picture in faces.generate("a smiling woman with long blond hair", num_images=4, seed=7):
        Path(f"face-{picture.seed}.png").write_bytes(picture.png)

Image i is drawn from seed + i by its own noise generator on the CPU, at every random step, so the same seed gives the
same image alone or among others, whatever the device. Many requests are generated together, one denoising step at a
time:

    runs = [faces.start(GenerationRequest("an old man")), faces.start(GenerationRequest("a woman",
            num_inference_steps=500))]
    while runs:
        faces.step(runs)  # one call of the network for all of them; others may join and leave between two steps
        for run in [run for run in runs if run.finished]:
            show(faces.pictures(run))
            runs.remove(run)

What there is can be changed, varied and led on; `core/diffusion/inpainting.py` says how, and `GenerationRequest` what
can be asked:

    (face,) = faces.generate("a smiling woman", seed=7)
    faces.generate("an old man", init_image=face.pixels, strength=0.6)  # 0 gives the VAE's copy, 1 ignores it
    faces.generate("a woman with glasses", init_image=face.pixels, mask=eyes)  # bool [H, W]: the rest stays as it is
    faces.generate("a smiling woman", seed=7, variation_strength=0.3, variation_seed=1)
    faces.generate("a smiling woman", num_images=8, seed=7, interpolate_to=Interpolation("an old man", seed=8))
    faces.generate("a man", num_images=2, candidates=8, attributes={"Smiling": 1.5})  # the best of eight, with a slider
    # what the attribute classifier predicts for it, how well it fits, how near it is to a training image
    face.assessment
    search = faces.inversion(photo)  # `advance` until it is finished: `latent` is the noise that generates this image

Finished images carry an invisible mark (`core/imaging/watermark.py`) unless `watermark=False`. `notebooks/tour.ipynb`
shows all of this. One `FaceGenerator` serves one thread at a time. This file does not know HTTP, queues or training;
`core/diffusion/run.py` has how one request begins.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.diffusion.conditioning import Condition, Flat, Model
from core.diffusion.generated_image import GeneratedImage, latent_bytes
from core.diffusion.inversion import Inversion, RunningInversion, inverting
from core.diffusion.latent_correction import LatentCorrection, load_correction
from core.diffusion.model_info import ModelInfo, model_hash, read_info, read_scheduler_config
from core.diffusion.run import Run, check, encode_texts, find_start, new_run, not_finite, plan_guidance
from core.diffusion.run_batch import RunBatch, step_together
from core.diffusion.sampling import NotFiniteError
from core.diffusion.schedule import schedule_from_config
from core.diffusion.schedulers import TURBO, make_scheduler, set_timesteps
from core.diffusion.unet import encode_prompts, load_few_step_unet, load_unet, read_config
from core.engine import GenerationRequest, Interpolation, JobError
from core.evaluation.attribute_classifier import AttributeClassifier, best, find_attribute_classifier
from core.evaluation.image_assessment import assess, find_index, nearest_training_images
from core.evaluation.memorization_index import Index
from core.imaging.generation_parameters import assessment, target_prompt
from core.imaging.png_metadata import encode_png, quick_png
from core.imaging.watermark import VERSION, mark
from core.nn.checkpoint import read_index
from core.nn.device import pick_device, pick_dtype
from core.nn.layers import to_images, to_pixels
from core.nn.memory import all_pieces
from core.nn.openvino_backend import Compiled, CompileError, Compiler, Composed
from core.nn.preview_decoder import PreviewDecoder, load_preview
from core.nn.tokenizer import Tokenizer
from train_clip import load_clip
from vae import VAE, encoder_hash, load_vae

__all__ = ["GenerationRequest", "FaceGenerator", "Interpolation", "JobCancelled", "ModelInfo", "GeneratedImage", "Run",
           "Step",
           "model_hash"]
log = logging.getLogger(__name__)
MAX_ENCODED_PROMPTS = 64  # descriptions that are remembered as they were read
CACHE = Path(__file__).resolve().parent / ".cache"  # networks compiled for this machine; may be deleted at any time
INVERSION_STEPS, INVERSION_ROUNDS = 50, 3


class JobCancelled(Exception):
    """Raised by `FaceGenerator.generate` as soon as its `should_stop` says so."""


@dataclass(frozen=True)
class Step:
    """`done` of `total` steps are behind us. `previews()` decodes the images as predicted now, which costs a little."""

    done: int
    total: int
    previews: Callable[[], list[GeneratedImage]]


class FaceGenerator:
    """The networks of one model folder on one device, ready to generate."""

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
        classifier: AttributeClassifier | None = None,
        index: Index | None = None,
        few_step: nn.Module | None = None,
        correction: LatentCorrection | None = None,
    ) -> None:
        self.correction = correction
        self.clip, self.tokenizer, self.vae, self.unet, self.preview = clip, tokenizer, vae, unet, preview
        self.classifier, self.index = classifier, index
        self.scheduler_config, self.info = scheduler_config, info
        self.device, self.dtype = torch.device(info.device), dtype
        self.few_step = few_step  # the network of the sampler "Turbo", if the folder has one
        # what computes: noisy latents, levels and conditions -> predictions; normalized latents -> images
        self.denoise: Model = self._denoise_with_torch(unet)
        self.denoise_few_step: Model | None = few_step and self._denoise_with_torch(few_step)
        self.decode_latents: Callable[[Tensor], Tensor] = self._decode_with_torch
        # normalized latents -> previews [B, H, W, 3] in [0, 255]; None: the folder has no preview decoder
        self.decode_preview: Callable[[Tensor], Tensor] | None = preview and preview.levels
        self._compiled: list[Compiled] = []  # those that `rest` prepares
        self._encoded_prompts: dict[str, Condition] = {}  # as they were read, the last ones last
        # of runs that are generated by the few-step model, and of those that are not
        self._batches: dict[bool, RunBatch | None] = {}

    def guidance_range(self, few_step: bool = False) -> tuple[float, float] | None:
        """The guidance scales that one pass of a network answers, from the first to the last; None: it knows none."""
        return getattr(self.few_step if few_step else self.unet, "guidance_range", None)

    @classmethod
    def load(
        cls, folder: str | Path, device: str = "auto", threads: int | None = None, precision: str = "fp32",
        engine: str = "auto", cache: str | Path | None = CACHE,
    ) -> FaceGenerator:
        """Load a model folder, and the attribute classifier beside it if there is one. `threads` sets torch's CPU
        threads for the whole process.

        `precision` "bf16" computes the networks in bfloat16: up to 1.8 times as fast on a CPU that has it, but then a
        seed's image is no longer quite the same on every machine, so it has to be asked for.

        `engine` "openvino" compiles the networks that generate for this CPU and keeps the result in the folder `cache`
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
        few_step = load_few_step_unet(folder, "cpu")
        clip, tokenizer = load_clip(folder, "cpu")  # on the CPU first: no device ever reads a file
        vae = load_vae(folder, "cpu")
        unet = load_unet(folder, "cpu", vae)
        scheduler_config = read_scheduler_config(folder)
        info = read_info(folder, chosen, precision, encoded_length=tokenizer.encoded_length,
                         guidance_range=unet.guidance_range,
                         has_turbo=few_step is not None)
        make_scheduler(info.default_sampler, scheduler_config)  # what it imports is imported now, not in the first job
        preview = load_preview(folder, encoder_hash(vae), chosen)
        faces = cls(
            clip.to(chosen), tokenizer, vae.to(chosen), unet.to(chosen), scheduler_config, info, dtype,
            preview=preview,
            classifier=None if info.lacks else find_attribute_classifier(folder.parent / "judge", chosen),
            index=find_index(folder),
            few_step=few_step and few_step.to(chosen),
            correction=load_correction(folder),
        )
        if engine == "openvino" or (engine == "auto" and chosen.type == "cpu"):
            try:
                faces.compile(None if cache is None else Path(cache))
            except CompileError as error:
                if engine == "openvino":
                    raise ValueError(f"engine openvino does not work here: {error}; use auto or torch") from error
                log.warning("torch generates, which is slower than OpenVINO would be: %s", error)
        log.info("%s generates, with %d threads", faces.info.engine, torch.get_num_threads())
        return faces

    @classmethod
    def describe(cls, folder: str | Path) -> ModelInfo:
        """What a model folder would say of itself on a CPU, without loading its networks. Raises ModelFolderError."""
        folder = Path(folder)
        clip = json.loads((folder / "clip" / "config.json").read_text(encoding="utf-8"))
        unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer.load(folder / "clip" / "tokenizer.json", clip["network"]["max_length"])
        return read_info(folder, torch.device("cpu"), "fp32", encoded_length=tokenizer.encoded_length,
                         guidance_range=read_config(unet).guidance_range,
                         has_turbo="turbo" in read_index(folder)["components"])

    def compile(self, cache: Path | None) -> None:
        """Let OpenVINO draw from now on, with the weights as they are now. Raises CompileError."""
        from threadpoolctl import threadpool_limits  # here, because it changes the environment

        compiler = Compiler(cache, torch.get_num_threads(), self.dtype)
        with torch.inference_mode():
            condition = encode_prompts(self.clip, self.tokenizer, ["a face", ""])
        latents = torch.randn(2, *self.info.latent_shape, generator=torch.Generator().manual_seed(0))
        example = Flat.inputs(latents, torch.tensor([900.0, 100.0]), condition)
        unet = compiler.compile("unet", Flat(self.unet), example, self.info.model_hash, pairs=True)
        decoder = Composed(self.vae, self.vae.denormalize, self.vae.decode)
        self.decode_latents = compiler.compile("decoder", decoder, (latents,), self.info.model_hash)
        if self.preview is not None:  # two pools of threads in one step wait for each other: so this one, too
            decode_preview = Composed(self.preview, self.preview.levels)
            self.decode_preview = compiler.compile("preview", decode_preview, (latents,), self.info.model_hash)
        if self.classifier is not None and self.dtype == torch.float32:  # its predictions are never those of 16 bits
            pictures = torch.zeros(2, 3, self.info.image_size, self.info.image_size)
            pictures[1] += torch.linspace(-1, 1, self.info.image_size)
            self.classifier.faster = compiler.compile("judge", self.classifier.trunk, (pictures,),
                                                      self.classifier.digest)
        if self.few_step is not None:
            few_step = compiler.compile("turbo", Flat(self.few_step), example, self.info.model_hash, pairs=True)
            self.denoise_few_step = few_step.denoise
            self._compiled.append(few_step)
        self._compiled.append(unet)
        self.denoise, self.info = unet.denoise, replace(self.info, engine=compiler.name)
        # numpy's threads wait for their next product at full speed: the image after it took half as long again
        threadpool_limits(1, user_api="blas")

    def warm_up(self) -> None:
        """Generate one image for nobody: a first call prepares kernels and tables, which no job has to wait for
        then."""
        try:
            self.generate("a face", num_inference_steps=1)
        except JobError as error:
            log.warning("the first image, generated for nobody, failed: %s", error)

    def on_idle(self) -> bool:
        """Nobody waits: prepare one of the networks for several images at once, which the first job of several would
        do otherwise. False: nothing is left to do."""
        return any(compiled.prepare() for compiled in self._compiled)

    # ---- many requests, one step at a time

    @torch.inference_mode()
    def start(self, request: GenerationRequest) -> Run:
        """Everything before the first step: the text, the noise and a scheduler of the request's own.

        Raises ValueError for a value out of range, JobError (`out_of_memory`) when the text does not fit.
        """
        request = check(request, self.info)
        start = find_start(request, self.info.latent_shape, self.encode)
        texts = encode_texts(request, self.info, self._encode_prompt)
        phases = plan_guidance(request, texts, start.noise.weights, self.guidance_range(request.sampler == TURBO))
        return new_run(request, start, texts, phases, self.scheduler_config, self.correction)

    def _encode_prompt(self, text: str) -> Condition:
        """One row; px asks for images as sharp as the best images. Raises JobError (`out_of_memory`).

        The last texts are remembered: the same words come again with another seed.
        """
        found = self._encoded_prompts.pop(text, None)
        if found is None:
            px = self.info.image_size
            (found,) = all_pieces(lambda _: encode_prompts(self.clip, self.tokenizer, [text], px=px), 1, self.device)
        self._encoded_prompts[text] = found  # to the end: the one that was not asked for longest goes first
        if len(self._encoded_prompts) > MAX_ENCODED_PROMPTS:
            del self._encoded_prompts[next(iter(self._encoded_prompts))]
        return found

    @torch.inference_mode()
    def step(self, runs: Sequence[Run]) -> None:
        """Take every unfinished run one step further, with one call of the network for the images of all of them (one
        of each network, where some are generated by the few-step model).

        A run that fails (`not_finite`, `out_of_memory`) gets its `error` and is finished; the others do not notice.
        Where memory is short the call is made in halves, down to single rows.
        """
        for few_step in (False, True):
            active = [run for run in runs if not run.finished and run.few_step == few_step]
            if active:
                denoise = self.denoise_few_step if few_step and self.denoise_few_step is not None else self.denoise
                self._batches[few_step] = step_together(active, denoise, self.device, self._batches.get(few_step))

    @torch.inference_mode()
    def previews(self, run: Run) -> list[GeneratedImage]:
        """The images as predicted now: through the model's preview decoder, which costs next to nothing, or without one
        through the whole decoder, in one call. Raises JobError (`out_of_memory`).
        """
        # of candidates the first: which are the best is not known yet
        z, quick = run.denoising.denoised()[: run.request.num_images], self.decode_preview
        pixels = self._decode(z) if quick is None else quick(z.float().to(self.device)).cpu().numpy().astype(np.uint8)
        pixels = run.composite(pixels)
        return [
            GeneratedImage(i, run.seeds[i], pixels[i], quick_png(pixels[i]), latent_bytes(one))
            for i, one in enumerate(z)
        ]

    @torch.inference_mode()
    def pictures(self, run: Run) -> list[GeneratedImage]:
        """The images of a finished run. Raises its error, or JobError (`not_finite`, `out_of_memory`)."""
        if run.error is not None:
            raise run.error
        if not run.finished:
            raise ValueError(f"the run is at step {run.done} of {run.total}: it has previews, but no images yet")
        z = run.denoising.x
        if not bool(torch.isfinite(z).all()):
            raise not_finite(NotFiniteError("the finished latents hold NaN or infinity"))
        parameters, pixels = run.request, run.composite(self._decode(z))
        found = assess(self.classifier, pixels, [target_prompt(row) for row in run.parameters])
        kept = best(found, parameters.num_images, places=parameters.num_images if parameters.balance else 1)
        near = nearest_training_images(self.index, pixels[kept])
        version, region = (
            VERSION if parameters.watermark else None,
            None if run.inpainting is None else run.inpainting.mask,
        )
        shown = [mark(pixels[i], region) if parameters.watermark else pixels[i] for i in kept]
        return [
            GeneratedImage(index, run.seeds[i], shown[index],
                           encode_png(shown[index], run.parameters[i], self.info, version),
                           latent_bytes(z[i]),
                           assessment(found[i], near[index], run.evaluations[i],
                                      run.parameters[i]["prompt"] if parameters.balance else None))
            for index, i in enumerate(kept)
        ]

    # ---- images and latents

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """An image as the normalized latent that `decode` turns back into nearly the same image.

        Shapes: uint8 [H, W, 3], H = W = `info.image_size` -> float32 [C, h, w].
        Raises ValueError for another shape or type, JobError (`out_of_memory`).
        """
        shape = (self.info.image_size, self.info.image_size, 3)
        if pixels.shape != shape or pixels.dtype != np.uint8:
            raise ValueError(f"pixels must be uint8 {list(shape)}, got {pixels.dtype} {list(pixels.shape)}")
        images = to_images(torch.tensor(pixels, device=self.device)[None])

        def normalized(rows: slice) -> Tensor:
            with self.autocast():
                return self.vae.normalize(self.vae.encode(images[rows]).mean)

        return all_pieces(normalized, 1, self.device)[0][0].float().cpu().numpy()

    @torch.inference_mode()
    def inversion(self, pixels: np.ndarray, prompt: str = "", steps: int = INVERSION_STEPS) -> RunningInversion:
        """Begin to look for the noise that generates this image with DDIM, `steps` steps and guidance 1 (any guidance
        where the prompt is empty). Its `advance` goes on, `latent` is the noise when it is `finished`.

        Shapes and errors: as `encode`.
        """
        z, schedule = torch.from_numpy(self.encode(pixels))[None], schedule_from_config(self.scheduler_config)
        sampler = "DDIM" if "DDIM" in self.info.samplers else self.info.default_sampler  # whose steps are taken back
        timesteps = set_timesteps(make_scheduler(sampler, self.scheduler_config), steps)
        condition = self._encode_prompt(self.info.prompt_rewriting(prompt))
        return inverting(Inversion(z, schedule, timesteps, INVERSION_ROUNDS), condition, self.denoise, self.device)

    @torch.inference_mode()
    def decode(self, latent: np.ndarray) -> np.ndarray:
        """The image of a normalized latent. Shapes: float32 [C, h, w] -> uint8 [H, W, 3].

        Raises ValueError for another shape, NaN or infinity, JobError (`out_of_memory`).
        """
        if latent.shape != self.info.latent_shape or not np.isfinite(latent).all():
            raise ValueError(f"latent must be finite numbers {list(self.info.latent_shape)}, got {list(latent.shape)}")
        return self._decode(torch.tensor(latent, dtype=torch.float32)[None])[0]

    def _decode(self, z: Tensor) -> np.ndarray:
        """Normalized latents [B, C, h, w] -> uint8 [B, H, W, 3]."""
        parts = all_pieces(lambda rows: to_pixels(self.decode_latents(z[rows].to(self.device))), len(z), self.device)
        return np.concatenate(parts)

    def _denoise_with_torch(self, network: nn.Module) -> Model:
        def denoise(x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
            with self.autocast():  # around the network alone: the sampler's arithmetic stays in fp32
                return network(x, timestep, condition)

        return denoise

    def _decode_with_torch(self, x: Tensor) -> Tensor:
        with self.autocast():
            return self.vae.decode(self.vae.denormalize(x))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    # ---- one request from beginning to end

    def generate(
        self,
        prompt: str,
        *,
        on_step: Callable[[Step], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        **fields: Any,
    ) -> list[GeneratedImage]:
        """Generate the images of one `GenerationRequest` of this prompt, with these of its `fields`, such as `seed`.

        `on_step` is called after every step.
        Raises ValueError for fields out of range, TypeError for unknown ones, JobCancelled as soon as `should_stop()`
        is true, JobError (`not_finite`, `out_of_memory`) when the model or the machine fails.
        """

        def stop_if_asked() -> None:
            if should_stop is not None and should_stop():
                raise JobCancelled

        run = self.start(GenerationRequest(prompt, **fields))
        stop_if_asked()
        while not run.finished:
            self.step([run])
            if on_step is not None and run.error is None:
                on_step(Step(run.done, run.total, lambda: self.previews(run)))
            stop_if_asked()
        return self.pictures(run)
