"""How does a Stable Diffusion 1.x of other people generate behind the engine's contract?

`PretrainedEngine` keeps what `core.engine.Engine` promises: many requests of different prompts, steps, samplers and
guidance share each call of the UNet, one denoising step at a time; image i depends on seed + i alone, whose noise is
generated on the CPU; a run that fails does not disturb the others; where memory is short the call is made in halves.

    engine = PretrainedEngine.load("v1-5-pruned-emaonly.safetensors")  # with vocab.json and merges.txt beside it
    for picture in engine.generate(GenerationRequest("a portrait of an old man", num_images=2, seed=7)):
        Path(f"{picture.seed}.png").write_bytes(picture.png)

What needs our own text encoder and classifier (attribute sliders, balance, the best of many) it has not, and says so in
`info.lacks`. It does not know HTTP, queues or files beyond `core/pretrained/loading.py`.

Latent diffusion: https://arxiv.org/abs/2112.10752.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.diffusion.generated_image import GeneratedImage, latent_bytes
from core.diffusion.inversion import Inversion, RunningInversion
from core.diffusion.run import check, find_start, guided_steps, not_finite
from core.diffusion.sampling import NotFiniteError
from core.engine import GenerationRequest, JobError
from core.imaging.generation_parameters import assessment, generation_parameters
from core.imaging.png_metadata import encode_png
from core.imaging.watermark import VERSION, mark
from core.nn.device import pick_device, pick_dtype
from core.nn.layers import to_images, to_pixels
from core.nn.memory import all_pieces, in_pieces, out_of_memory
from core.nn.preview_decoder import PreviewDecoder, fit_preview
from core.pretrained.batch import PretrainedRun, RowBatch, text_weights
from core.pretrained.denoising import SchedulerRun, make_scheduler
from core.pretrained.loading import Parts, PretrainedInfo, describe, load
from core.pretrained.recognition import recognise

log = logging.getLogger(__name__)
NUM_TEXTS = 64  # prompts that are remembered as they were read
CELLS_AT_ONCE = {"cpu": 4 * 64 * 64, "cuda": 32 * 64 * 64, "mps": 8 * 64 * 64}  # latent places in one call of the UNet
INVERSION_STEPS, INVERSION_ROUNDS = 50, 3
PREVIEW_SIZE, NUM_PREVIEW_PICTURES = 64, 8  # of what the map of previews is fitted to


class PretrainedEngine:
    """The networks of one model on one device, ready to generate.

    `dtype` is what the networks compute in; schedulers, noise and guidance stay on the CPU in fp32.
    """

    def __init__(self, parts: Parts, info: PretrainedInfo, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype, self._parts = torch.device(info.device), dtype, parts
        for network in (parts.text_encoder, parts.vae, parts.unet, parts.safety_checker):
            if network is not None:
                network.to(self.device, dtype)
        self._scale = float(parts.vae.config.scaling_factor)
        self.info = replace(info, encoded_length=self.encoded_length,
                            prompt_rewriting=info.prompt_rewriting.within(self.encoded_length))
        self._rows_at_once = max(1, CELLS_AT_ONCE.get(self.device.type, 4096) // int(np.prod(info.latent_shape[1:])))
        self._is_sliced = False
        self._encoded_prompts: dict[str, Tensor] = {}
        self._batch: RowBatch | None = None
        self._preview = self._fit_preview()

    @classmethod
    def load(cls, path: str | Path, device: str = "auto", precision: str = "fp32", image_size: int | None = None,
             name: str | None = None) -> PretrainedEngine:
        """Load a diffusers folder or a single file. An accelerator computes in fp16; a CPU in fp32, or in bf16 where it
        has that and `precision` asks for it. `image_size` None is the model's own.

        Raises PretrainedError for what cannot generate here, ValueError for a device or precision that is not there.
        """
        files = recognise(path)
        info = cls.describe(path, device, precision, image_size, name)
        return cls(load(files, info), info, dtype_for(torch.device(info.device), precision))

    @staticmethod
    def describe(path: str | Path, device: str = "auto", precision: str = "fp32", image_size: int | None = None,
                 name: str | None = None) -> PretrainedInfo:
        """What the engine of these arguments would say of itself, without loading it. Raises as `load`."""
        chosen = pick_device(device)
        short = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype_for(chosen, precision)]
        return describe(recognise(path), str(chosen), f"torch {torch.__version__} {short}", image_size, name)

    def warm_up(self) -> None:
        """Do a step for nobody: a first call prepares what no request has to wait for then."""
        self.step([self.start(GenerationRequest("a face", num_inference_steps=2))])

    # ---- many requests, one step at a time

    @torch.inference_mode()
    def start(self, request: GenerationRequest) -> PretrainedRun:
        """Everything before the first step. Raises ValueError for what this model cannot do or a value out of range,
        JobError (`out_of_memory`) when the text does not fit."""
        if wrong := [name for name in sorted(self.info.lacks) if getattr(request, name, None)]:
            raise ValueError(f"{self.info.name} cannot follow {' and '.join(wrong)}")
        request = check(request, self.info)
        scheduler = make_scheduler(str(request.sampler), self._parts.scheduler_config)
        start = find_start(request, self.info.latent_shape, self.encode)
        noise, scale = start.noise, float(request.guidance_scale or 0.0)
        target = None if request.interpolate_to is None else request.interpolate_to.prompt
        guided = [text_weights(request.prompt, request.negative_prompt, scale, target, share)
                  for share in noise.weights]
        unguided = [text_weights(request.prompt, "", 1.0, target, share) for share in noise.weights]
        interval = guided_steps(request)
        used = guided if request.guidance_interval is None else [*guided, *unguided]
        for text in {text for one in used for text in one}:
            self._encode_prompt(text)  # now: what does not fit into memory fails this request alone
        trajectory = SchedulerRun(scheduler, noise.noise, request.num_inference_steps, noise.generators, start.skipped,
                                  start.z)
        parameters = generation_parameters(request, [request.prompt] * request.num_images, noise.seeds, noise.weights)
        return PretrainedRun(noise.seeds, guided, unguided, interval, parameters, trajectory, start.inpainting,
                             request.watermark, [0] * len(guided))

    @torch.inference_mode()
    def step(self, runs: Sequence[PretrainedRun]) -> None:
        """Take every unfinished run one step further, with one call of the UNet for all of them, or as few as memory
        allows. A run that fails gets its `error` and is finished; the others do not notice."""
        active = [run for run in runs if not run.finished]
        if not active:
            return
        if self._batch is None or not self._batch.is_of(active):
            texts = {text for run in active for one in run.texts for text in one}
            self._batch = RowBatch(active, {text: self._encode_prompt(text) for text in texts})
        inputs = [run.trajectory.model_input() for run in active]
        levels = [level for run, (_, level) in zip(active, inputs, strict=True) for _ in run.seeds]
        guided, lost = self._predict(self._batch, torch.cat([x for x, _ in inputs]), torch.tensor(levels))
        first = 0
        for run, part in zip(active, guided.split([run.num_images for run in active]), strict=True):
            if lost.isdisjoint(range(first, first + run.num_images)):
                self._advance(run, part)
            else:
                run.error = out_of_memory()
            first += run.num_images
        if any(run.finished for run in active):
            self._batch = None

    def _predict(self, batch: RowBatch, x: Tensor, levels: Tensor) -> tuple[Tensor, set[int]]:
        """The guided prediction for every image, on the CPU, and those that got none because memory was short."""
        given = x, levels
        x, levels, texts = batch.inputs(x, levels)

        def network(rows: slice) -> Tensor:
            row = (x[rows].to(self.device, self.dtype), levels[rows].to(self.device),
                   texts[rows].to(self.device, self.dtype))
            return self._parts.unet(*row, return_dict=False)[0].float().cpu()

        answers, lost = [], set()
        for rows, answer in in_pieces(network, len(x), self._rows_at_once, self.device):
            if answer is None:
                lost.add(batch.images[rows.start])
                answer = torch.full_like(x[rows], float("nan"))
            answers.append(answer)
        if len(answers) * self._rows_at_once >= len(x) + self._rows_at_once:  # some were halved: so from now on
            self._rows_at_once = max(map(len, answers))
        if lost and not self._is_sliced:  # a head of attention after the other takes less room, and more time
            self._is_sliced = True
            self._parts.unet.set_attention_slice("max")
            return self._predict(batch, *given)
        return batch.combine(torch.cat(answers)), lost

    def _advance(self, run: PretrainedRun, prediction: Tensor) -> None:
        try:
            run.num_evaluations = [n + len(texts) for n, texts in zip(run.num_evaluations, run.texts, strict=True)]
            if run.inpainting is not None:
                v = run.trajectory.to_v(prediction)
                constrained = run.inpainting.constrain(run.trajectory, v)  # type: ignore[arg-type]
                prediction = run.trajectory.from_v(constrained)
            run.trajectory.advance(prediction)
        except NotFiniteError as error:
            run.error = not_finite(error)
        except Exception as error:  # whatever it was, it is this run's alone
            log.exception("a run failed at step %d of %d", run.done + 1, run.total)
            run.error = JobError.of(error)

    @torch.inference_mode()
    def previews(self, run: PretrainedRun) -> list[GeneratedImage]:
        """The images as predicted now, by a linear map from latents to pixels that costs next to nothing."""
        z = run.trajectory.denoised()
        pixels = self._preview.levels(z).numpy().astype(np.uint8)
        pixels = pixels if run.inpainting is None else run.inpainting.composite(pixels)
        return [GeneratedImage(i, run.seeds[i], pixels[i], encode_png(pixels[i]),
                               latent_bytes(one)) for i, one in enumerate(z)]

    @torch.inference_mode()
    def pictures(self, run: PretrainedRun) -> list[GeneratedImage]:
        """The images of a finished run. Raises its error, or JobError (`not_finite`, `out_of_memory`)."""
        if run.error is not None:
            raise run.error
        if not run.finished:
            raise ValueError(f"the run is at step {run.done} of {run.total}: it has previews, but no images yet")
        z = run.trajectory.x
        if not bool(torch.isfinite(z).all()):
            raise not_finite(NotFiniteError("the finished latents hold NaN or infinity"))
        pixels = self._decode(z)
        unsafe = self._unsafe(pixels)
        pixels = pixels if run.inpainting is None else run.inpainting.composite(pixels)
        region = None if run.inpainting is None else run.inpainting.mask
        found = []
        for i, one in enumerate(pixels):
            shown = mark(one, region) if run.watermark else one
            about = assessment(None, None, run.num_evaluations[i], None) | ({"unsafe": unsafe[i]} if unsafe else {})
            png = encode_png(shown, run.parameters[i], self.info, VERSION if run.watermark else None)
            found.append(GeneratedImage(i, run.seeds[i], shown, png, latent_bytes(z[i]), about))
        return found

    def _unsafe(self, pixels: np.ndarray) -> list[bool]:
        """What the model's own safety checker says of each image; empty where it has none. No image is changed."""
        checker, extractor = self._parts.safety_checker, self._parts.feature_extractor
        if checker is None:
            return []
        given = extractor(images=list(pixels), return_tensors="pt").pixel_values.to(self.device, self.dtype)
        _, verdicts = checker(images=pixels.copy(), clip_input=given)  # it blackens the images that it is given
        return [bool(one) for one in verdicts]

    # ---- texts, images and latents

    def _encode_prompt(self, text: str) -> Tensor:
        """What the text encoder says of a text, [77, width]; the last texts are remembered."""
        found = self._encoded_prompts.pop(text, None)
        if found is None:
            tokenizer = self._parts.tokenizer
            length = self._parts.text_encoder.config.max_position_embeddings
            ids = tokenizer([text], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            given = ids.input_ids.to(self.device)
            found = all_pieces(lambda _: self._parts.text_encoder(given)[0][0].float().cpu(), 1, self.device)[0]
        self._encoded_prompts[text] = found  # to the end: the one that was not asked for longest goes first
        if len(self._encoded_prompts) > NUM_TEXTS:
            del self._encoded_prompts[next(iter(self._encoded_prompts))]
        return found

    def encoded_length(self, text: str) -> int:
        """How many characters of a text the text encoder reads."""
        length = int(self._parts.text_encoder.config.max_position_embeddings) - 2  # beside the start and the end
        offsets = self._parts.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True,
                                        verbose=False)["offset_mapping"]
        return len(text) if len(offsets) <= length else int(offsets[length - 1][1])

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """An image as the latent that `decode` turns back into nearly the same image: the mean of the VAE's
        posterior, scaled to a deviation of about 1.

        Shapes: uint8 [H, W, 3], H = W = `info.image_size` -> float32 [C, h, w].
        Raises ValueError for another shape or type, JobError (`out_of_memory`).
        """
        shape = (self.info.image_size, self.info.image_size, 3)
        if pixels.shape != shape or pixels.dtype != np.uint8:
            raise ValueError(f"pixels must be uint8 {list(shape)}, got {pixels.dtype} {list(pixels.shape)}")
        images = to_images(torch.tensor(pixels)[None])
        z = all_pieces(lambda _: self._encode(images), 1, self.device)[0][0]
        return np.ascontiguousarray(z.numpy())  # convolutions round by the order of what they are given

    def _encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w] on the CPU."""
        posterior = self._parts.vae.encode(images.to(self.device, self.dtype)).latent_dist
        return (posterior.mean * self._scale).float().cpu()

    @torch.inference_mode()
    def decode(self, latent: np.ndarray) -> np.ndarray:
        """The image of a latent. Shapes: float32 [C, h, w] -> uint8 [H, W, 3].

        Raises ValueError for another shape, NaN or infinity, JobError (`out_of_memory`).
        """
        if latent.shape != self.info.latent_shape or not np.isfinite(latent).all():
            raise ValueError(f"latent must be finite numbers {list(self.info.latent_shape)}, got {list(latent.shape)}")
        return self._decode(torch.tensor(latent, dtype=torch.float32)[None])[0]

    def _decode(self, z: Tensor) -> np.ndarray:
        """Latents [B, C, h, w] -> uint8 [B, H, W, 3]. One at a time: decoding is what needs most memory."""

        def decoded(rows: slice) -> np.ndarray:
            given = (z[rows] / self._scale).to(self.device, self.dtype)
            return to_pixels(self._parts.vae.decode(given, return_dict=False)[0])

        return np.concatenate(all_pieces(decoded, len(z), self.device, at_once=1))

    @torch.inference_mode()
    def inversion(self, pixels: np.ndarray, prompt: str = "") -> RunningInversion:
        """Begin to look for the noise that generates this image with DDIM, 50 steps and guidance 1; its `advance` goes
        on, `latent` is the noise when it is `finished`. Shapes and errors: as `encode`."""
        z = torch.from_numpy(self.encode(pixels))[None]
        request = GenerationRequest(prompt, 1, INVERSION_STEPS, guidance_scale=1.0, sampler="DDIM")
        run = self.start(request)
        levels = _Levels(self._parts.scheduler_config)
        batch = RowBatch([run], {prompt: self._encode_prompt(prompt)})
        trajectory = Inversion(z, levels, levels.timesteps(INVERSION_STEPS), INVERSION_ROUNDS)  # type: ignore[arg-type]

        def predict(x: Tensor, level: float) -> Tensor:
            prediction, lost = self._predict(batch, x, torch.tensor([level]))
            if lost:
                raise out_of_memory()
            return levels.to_v(prediction, x, level)

        return RunningInversion(trajectory, predict)

    def on_idle(self) -> bool:
        """Nothing gets readier while nobody waits."""
        return False

    # ---- previews

    @torch.inference_mode()
    def _fit_preview(self) -> PreviewDecoder:
        """The linear map nearest to this VAE on smooth fields of colour; no image is needed for it."""
        return fit_preview(((self._encode(images), images) for images in smooth_fields()), ridge=1e-6)

    # ---- one request from beginning to end

    def generate(self, request: GenerationRequest) -> list[GeneratedImage]:
        """Generate one request. Raises as `begin` and `pictures` do."""
        run = self.start(request)
        while not run.finished:
            self.step([run])
        return self.pictures(run)


def smooth_fields() -> Iterator[Tensor]:
    """Images [1, 3, H, W] in [-1, 1] of random colours that run into each other, coarse ones first."""
    generator = torch.Generator().manual_seed(0)
    for i in range(NUM_PREVIEW_PICTURES):
        coarse = torch.randn(1, 3, 2 + i, 2 + i, generator=generator) * 0.6
        yield F.interpolate(coarse, PREVIEW_SIZE, mode="bicubic").clamp(-1, 1)


def dtype_for(device: torch.device, precision: str) -> torch.dtype:
    """What networks compute in: fp16 on an accelerator, else what `precision` says. Raises ValueError."""
    return pick_dtype(precision, device) if device.type == "cpu" else torch.float16


class _Levels:
    """alpha and sigma at the timesteps of a model's DDIM, as `core.diffusion.inversion` asks for them."""

    kind = "cosine"  # variance preserving

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._scheduler = make_scheduler("DDIM", config)
        self._is_v = self._scheduler.config.prediction_type == "v_prediction"

    def timesteps(self, num_inference_steps: int) -> Tensor:
        self._scheduler.set_timesteps(num_inference_steps)
        return self._scheduler.timesteps

    def coefficients(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), each as long as `levels`."""
        bar = self._scheduler.alphas_cumprod[levels.long()]
        return bar.sqrt(), (1.0 - bar).sqrt()

    def to_v(self, prediction: Tensor, x: Tensor, level: float) -> Tensor:
        """The prediction for `x` as v."""
        alpha, sigma = self.coefficients(torch.tensor([level]))
        return prediction if self._is_v else (prediction - sigma * x) / alpha
