"""A prompt goes in, PNGs come out: how?

`FaceGenerator` loads a model folder and draws. It needs no server:

    from generator import FaceGenerator

    faces = FaceGenerator.load("models/celeba128")
    for picture in faces.generate("a smiling woman with long blond hair", num_images=4, seed=7):
        Path(f"face-{picture.seed}.png").write_bytes(picture.png)

Image i is drawn from seed + i by its own noise generator on the CPU, at every random step, so the same seed gives the
same picture alone or among others, whatever the device. One `FaceGenerator` serves one thread at a time. This file does
not know HTTP, queues or training.

PNG text chunks: https://www.w3.org/TR/png-3/#11textinfo. Digital source type: https://cv.iptc.org/newscodes/digitalsourcetype/
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn

from conditional_ldm import encode_prompts, load_unet
from core.checkpoint import component_hash, read_index
from core.diffusion import Condition, NotFiniteError, make_scheduler, sample, schedule_from_config
from core.jobs import JobCancelled, JobError
from train_clip import load_clip
from vae import load_vae

NUM_SEEDS = 2**53  # seeds stay exact in JavaScript; the one after the last is 0
REQUEST_CHUNK = "text_to_image"  # PNG text chunk that holds the request as JSON
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    "</rdf:RDF></x:xmpmeta>"
)


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
    """One image, preview or result: uint8 pixels [H, W, 3], the same as PNG, its whitened latent as float32 bytes."""

    index: int
    seed: int
    pixels: np.ndarray
    png: bytes
    latent: bytes


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


def parameters_text(request: Mapping[str, Any], info: ModelInfo) -> str:
    """The request in the wording that image viewers know from A1111's web UI (chunk `parameters`)."""
    negative = f"\nNegative prompt: {request['negative_prompt']}" if request["negative_prompt"] else ""
    return (
        f"{request['prompt']}{negative}\nSteps: {request['n_inf_steps']}, Sampler: {request['sampler']}, "
        f"CFG scale: {request['guidance_scale']:g}, Seed: {request['seed']}, "
        f"Size: {info.image_size}x{info.image_size}, Model hash: {info.model_hash[:10]}, Model: {info.name}"
    )


def encode_png(pixels: np.ndarray, request: Mapping[str, Any] | None = None, info: ModelInfo | None = None) -> bytes:
    """PNG bytes; with a request, also the text chunks that say how the picture came about and that a machine drew it.

    Shapes: pixels uint8 [H, W, 3].
    """
    chunks = PngImagePlugin.PngInfo()
    if request is not None and info is not None:
        chunks.add_itxt("parameters", parameters_text(request, info))
        chunks.add_itxt(REQUEST_CHUNK, json.dumps({"request": request, "model_hash": info.model_hash}), zip=True)
        chunks.add_itxt("XML:com.adobe.xmp", XMP)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=chunks, compress_level=6 if request else 1)
    return buffer.getvalue()


class FaceGenerator:
    """The networks of one model folder on one device, ready to draw."""

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable[[list[str]], tuple[Tensor, Tensor]],
        vae: nn.Module,
        unet: nn.Module,
        scheduler_config: Mapping[str, Any],
        info: ModelInfo,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.clip, self.tokenizer, self.vae, self.unet = clip, tokenizer, vae, unet
        self.scheduler_config, self.info = scheduler_config, info
        self.device, self.dtype = torch.device(info.device), dtype

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
            model_hash=component_hash(folder, "unet"),
            device=str(chosen),
            image_size=index["image_size"],
            latent_shape=tuple(index["latent_shape"]),
            samplers=tuple(scheduler_config["samplers"]),
            default_sampler=index["defaults"]["sampler"],
            default_guidance_scale=float(index["defaults"]["guidance_scale"]),
        )
        make_scheduler(info.default_sampler, scheduler_config)  # imports diffusers now, not in the first job
        return cls(clip.to(chosen), tokenizer, vae.to(chosen), unet.to(chosen), scheduler_config, info, dtype)

    @torch.inference_mode()
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
        on_step: Callable[[Step], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Picture]:
        """Draw `num_images` pictures of `prompt`, the i-th from `seed + i`.

        An empty prompt draws without a condition. `guidance_scale` 1 is off, 0 ignores the prompt. `latents` replace
        the starting noise or, when `start` > 0, are the pictures to start from: that share of the steps is skipped and
        noise of the level reached there is added. `on_step` is called after every step.

        Shapes: latents [num_images, C, h, w], whitened, as in `Picture.latent`.
        Raises ValueError for arguments out of range, JobCancelled as soon as `should_stop()` is true, JobError
        (`not_finite`, `out_of_memory`) when the model or the machine fails.
        """
        if num_images < 1 or num_inference_steps < 1 or not 0 <= start <= 1:
            raise ValueError(
                "num_images and num_inference_steps must be at least 1 and start from 0 to 1; "
                f"got {num_images}, {num_inference_steps}, {start}"
            )
        if start > 0 and latents is None:
            raise ValueError(f"start = {start} needs latents to start from")
        guidance_scale = self.info.default_guidance_scale if guidance_scale is None else float(guidance_scale)
        sampler = self.info.default_sampler if sampler is None else sampler
        scheduler = make_scheduler(sampler, self.scheduler_config)
        schedule = schedule_from_config(self.scheduler_config)
        seeds = [(seed + i) % NUM_SEEDS for i in range(num_images)]
        generators = [torch.Generator().manual_seed(one) for one in seeds]
        noise = torch.stack([torch.randn(self.info.latent_shape, generator=one) for one in generators])  # [B, C, h, w]
        given = None if latents is None else torch.as_tensor(np.array(latents), dtype=torch.float32)
        if given is not None and given.shape != noise.shape:
            raise ValueError(f"latents must have shape {list(noise.shape)}, got {list(given.shape)}")
        if given is not None and start == 0:
            noise = given

        def encode(text: str) -> Condition:
            """One row an image; px asks for pictures as sharp as the best photographs."""
            return encode_prompts(self.clip, self.tokenizer, [text], px=self.info.image_size).repeat(num_images)

        def denoiser(x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
            with self.autocast():  # around the network alone: the sampler's arithmetic stays in fp32
                return self.unet(x, timestep, condition)

        def requests() -> list[dict[str, Any]]:
            """What each picture alone would be asked for with: the body of POST /text_to_image."""
            common = {"prompt": prompt, "n_images": 1, "n_inf_steps": num_inference_steps, "sampler": sampler,
                      "guidance_scale": guidance_scale, "negative_prompt": negative_prompt, "start_timestep": start}
            rows = [{**common, "seed": one} for one in seeds]
            if given is not None:
                texts = [base64.b64encode(_float32(z)).decode() for z in given]
                rows = [{**row, "latent": text} for row, text in zip(rows, texts, strict=True)]
            return rows

        def pictures(z: Tensor, final: bool) -> list[Picture]:
            asked = requests() if final else [None] * num_images
            with self.autocast():
                pixels = to_pixels(self.vae.decode(self.vae.unwhiten(z)))
            return [
                Picture(i, seeds[i], pixels[i], encode_png(pixels[i], asked[i], self.info), _float32(z[i]))
                for i in range(num_images)
            ]

        def stop_or_tell(done: int, total: int, denoised: Tensor) -> None:
            if on_step is not None:
                on_step(Step(done, total, lambda: pictures(denoised, final=False)))
            stop_if_asked()

        def stop_if_asked() -> None:
            if should_stop is not None and should_stop():
                raise JobCancelled

        try:
            stop_if_asked()
            z = sample(
                denoiser,
                encode(prompt),
                scheduler,
                noise.to(self.device),
                num_inference_steps,
                guidance_scale,
                schedule=schedule,
                negative=encode(negative_prompt) if negative_prompt.strip() else None,
                generators=generators,
                start=start,
                z=None if given is None else given.to(self.device),
                on_step=stop_or_tell,
            )
            if not bool(torch.isfinite(z).all()):
                raise NotFiniteError("the finished latents hold NaN or infinity")
            return pictures(z, final=True)
        except NotFiniteError as error:
            hint = "Try a lower guidance scale, another sampler or --device cpu."
            raise JobError("not_finite", f"No picture came out: {error}.", hint) from error
        except torch.OutOfMemoryError as error:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # the next job gets a clean device
            raise JobError("out_of_memory", "The device has too little memory.", "Ask for fewer images.") from error

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def _float32(z: Tensor) -> bytes:
    return z.detach().cpu().contiguous().numpy().astype("<f4").tobytes()
