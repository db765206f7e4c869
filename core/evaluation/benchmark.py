"""How fast is it, beside what others would use? Everything compared is measured in turn, in one run, on one machine.

The baseline is diffusers' own parts as a pipeline runs them: a `UNet2DConditionModel` of about as many parameters, its
DPM++ 2M scheduler, eager float32, guidance by doubled rows; its text encoder, decoder and PNGs are not even counted,
ours are. Its weights are random: they cost the same time. The rest looks at our server as a client does, and at the
engines alone.

It does not know what a model is: `load` gives something that looks like `generator.FaceGenerator`, `serve` is the
command line of a server.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from core.diffusion.guidance import GuidedBatch
from core.evaluation.benchmark_tables import Row, Section, timed, told
from core.evaluation.metrics import largest_difference
from core.nn.device import pick_dtype
from core.nn.openvino_backend import installed_version
from core.process import tied

PROMPT = "a smiling young woman with wavy blond hair"
ROWS = (1, 2, 8, 16)  # of one call of the network: an image with guidance is two
SECTIONS = ("engines", "against-diffusers", "speed")
Load = Callable[[str, str], Any]  # (engine, precision) -> a FaceGenerator


# ---- diffusers' own parts --------------------------------------------------------------------------------------------


def diffusers_unet(parameters: int, latent_channels: int, text_width: int) -> nn.Module:
    """The `UNet2DConditionModel` nearest to a number of parameters: three levels, attention at the lower two."""
    from diffusers import UNet2DConditionModel

    def build(width: int) -> nn.Module:
        return UNet2DConditionModel(
            sample_size=16, in_channels=latent_channels, out_channels=latent_channels, layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(width, 2 * width, 2 * width), cross_attention_dim=text_width, norm_num_groups=16,
            attention_head_dim=8,
        )  # fmt: skip

    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = [build(width) for width in range(32, 129, 16)]
    nearest = min(found, key=lambda unet: abs(count_parameters(unet) - parameters))
    return nearest.eval().requires_grad_(False)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_gflop(call: Callable[[], object]) -> float:
    """GFLOP of a call, a multiplication with its addition counted as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / 1e9


@torch.inference_mode()
def draw_by_diffusers(unet: Any, latent_shape: Sequence[int], tokens: Tensor, images: int, steps: int) -> Tensor:
    """The denoising loop of a diffusers pipeline with guidance. Shapes: tokens [1, L, E] -> latents [images, ...]."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(steps)
    x = torch.randn(images, *latent_shape, generator=torch.Generator().manual_seed(0))
    text = torch.cat([torch.zeros_like(tokens), tokens]).repeat_interleave(images, dim=0)
    for t in scheduler.timesteps:
        unwanted, wanted = unet(torch.cat([x, x]), t, encoder_hidden_states=text).sample.chunk(2)
        x = scheduler.step(unwanted + 3.0 * (wanted - unwanted), t, x).prev_sample
    return x


def against_diffusers(load: Load, steps: int, repeats: int) -> Section:
    """The same number of evaluations, in turn: theirs without text, decoder and PNG; ours with."""
    faces = load("auto", "fp32")
    tokens = text_tokens(faces)
    unet = diffusers_unet(count_parameters(faces.unet), faces.info.latent_shape[0], tokens.shape[-1])
    rows = []
    for images, count, bound in ((4, steps, 4.0), (1, min(steps, 100), None)):
        theirs: list[float] = []
        ours: list[float] = []
        for repeat in range(repeats + 1):  # the first round warms up
            n = count if repeat else 4
            options = {"num_images": images, "num_inference_steps": n, "guidance_scale": 3.0}
            ways: list[tuple[list[float], Callable[[], Any]]] = [
                (theirs, partial(draw_by_diffusers, unet, faces.info.latent_shape, tokens, images, n)),
                (ours, partial(faces.generate, PROMPT, **options)),
            ]
            for times, way in ways if repeat % 2 else ways[::-1]:
                seconds, _ = timed(way)
                if repeat:
                    times.append(seconds)
            if repeat:
                told(f"{images} x {count}: diffusers {theirs[-1]:.2f} s, ours {ours[-1]:.2f} s")
        what = f"{images} image{'s' * (images > 1)} x {count} evaluations"
        rows += [
            Row(f"{what}, diffusers' parts", theirs, "s"),
            Row(f"{what}, ours, from prompt to PNG", ours, "s"),
            Row(f"{what}, diffusers over ours", [a / b for a, b in zip(theirs, ours, strict=True)], at_least=bound),
        ]
    x = torch.zeros(1, *faces.info.latent_shape)
    flops = (
        count_gflop(lambda: faces.unet(x, torch.zeros(1), condition_of(faces, 1))),
        count_gflop(lambda: unet(x, torch.zeros(1), encoder_hidden_states=tokens)),
    )
    return Section("against-diffusers", rows, [
        f"Ours: {count_parameters(faces.unet) / 1e6:.1f} M parameters, {flops[0]:.2f} GFLOP a row and evaluation, "
        f"{faces.info.engine}. Theirs: {count_parameters(unet) / 1e6:.1f} M, {flops[1]:.2f} GFLOP, eager float32, "
        f"random weights; two rows a picture in {'theirs, one in ours' if faces.guidance_range() else 'both'}.",
        f"Evaluations: 4 images were measured with {steps}; each is a true evaluation of the network.",
    ])


def text_tokens(faces: Any) -> Tensor:
    """What the text encoder makes of the prompt. Shapes: [1, L, E]."""
    return condition_of(faces, 1).tokens


def condition_of(faces: Any, images: int) -> Any:
    """The condition of a request, one row an image."""
    from core.engine import GenerationRequest

    return faces.start(GenerationRequest(PROMPT, images, 2)).guidance.condition


# ---- the engines -----------------------------------------------------------------------------------------------------


def compare_engines(load: Load, repeats: int) -> Section:
    """Milliseconds of one call of the UNet, and how far each engine's images are from torch's in float32."""
    ways = [("torch", "fp32"), ("torch", "bf16")]
    ways += [("openvino", "fp32"), ("openvino", "bf16")] if installed_version() else []
    loaded, missing = {}, []
    for engine, precision in ways:
        try:
            pick_dtype(precision, torch.device("cpu"))
        except ValueError:
            missing.append(f"{engine} {precision}")
            continue
        loaded[f"{engine} {precision}"] = load(engine, precision)
    rows: list[Row] = []
    for count in ROWS:
        times: dict[str, list[float]] = {name: [] for name in loaded}
        calls = {name: denoiser_call(faces, count) for name, faces in loaded.items()}
        for repeat in range(repeats + 2):
            turn = repeat % len(calls)
            for name in [*calls][turn:] + [*calls][:turn]:
                seconds, _ = timed(calls[name])
                if repeat >= 2:
                    times[name].append(1000 * seconds)
        rows += [Row(f"UNet, {count} row{'s' * (count > 1)}, {name}", values, "ms") for name, values in times.items()]
        told(f"{count} rows: " + ", ".join(f"{name} {statistics.median(v):.1f} ms" for name, v in times.items()))
    drawn = {name: pixels_of(faces, 8, 0) for name, faces in loaded.items()}
    for name, faces in loaded.items():
        alone = np.concatenate([pixels_of(faces, 1, seed) for seed in (0, 3, 7)])
        off = largest_difference(alone, drawn[name][[0, 3, 7]])
        rows.append(Row(f"alone against in a batch of 8, grey levels, {name}", [off],
                        at_most=1 if name.endswith("fp32") else None))  # fmt: skip
        if name != "torch fp32":
            off = largest_difference(drawn[name], drawn["torch fp32"])
            rows.append(Row(f"against torch fp32, grey levels, {name}", [off]))
    absent = f" Not on this CPU: {', '.join(missing)}." if missing else ""
    return Section("engines", rows, [f"{', '.join(f.info.engine for f in loaded.values())}.{absent}"])


def denoiser_call(faces: Any, rows: int) -> Callable[[], Any]:
    """One evaluation of the network, with as many rows."""
    from core.engine import GenerationRequest

    run = faces.start(GenerationRequest(PROMPT, rows, 2, guidance_scale=1.0))
    latents, level = run.denoising.model_input()
    inputs = GuidedBatch([run.guidance]).inputs(latents, torch.full((rows,), float(level)))

    def call() -> Any:
        with torch.inference_mode():
            return faces.denoise(*inputs)

    return call


def pixels_of(faces: Any, images: int, seed: int) -> np.ndarray:
    """Uint8 [images, H, W, 3] after a few steps."""
    return np.stack([p.pixels for p in faces.generate(PROMPT, num_images=images, num_inference_steps=12, seed=seed)])


# ---- the server, as a client sees it ---------------------------------------------------------------------------------


class Client:
    """A server in a process of its own, and requests to it. `memory_mb` is the most it ever held, None if unknown."""

    def __init__(self, serve: Sequence[str], folder: Path) -> None:
        command = [*serve, "--port", "0", "--data-dir", str(folder)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **tied(os.environ))
        try:
            assert self._process.stdout is not None
            line = next((line for line in self._process.stdout if line.startswith("Open ")), "")
            found = re.search(r":(\d+)/", line)
            if found is None:
                raise RuntimeError(f"the server did not say where it is: {line!r}")
            self._port = int(found[1])
        except BaseException:
            self.close()
            raise

    def wait_ready(self) -> None:
        """Until the model is loaded. Raises RuntimeError when it cannot be."""
        while True:
            answer = json.loads(self._ask("GET", "/ready"))
            if answer["state"] == "READY":
                return
            if answer["state"] == "FAILED" or self._process.poll() is not None:
                raise RuntimeError(f"the server does not become ready: {answer}")
            time.sleep(0.02)

    def draw(self, **body: Any) -> bytes:
        """POST, listen to the events until the job has ended, fetch the first PNG."""
        job_id = json.loads(self._ask("POST", "/text_to_image", {"prompt": PROMPT, **body}))["job_id"]
        events = self._ask("GET", f"/jobs/{job_id}/events").decode()
        if "succeeded" not in events.rpartition("event: done")[2]:
            raise RuntimeError(f"the job ended otherwise: {events[-300:]}")
        return self._ask("GET", f"/jobs/{job_id}/images/0.png")

    @property
    def memory_mb(self) -> float | None:
        status = Path(f"/proc/{self._process.pid}/status")
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.is_file() else None
        return int(found[1]) / 1000 if found else None

    def close(self) -> None:
        """Ask it to stop, and wait until it has."""
        with self._process as process:  # closes its pipe
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()

    def _ask(self, method: str, path: str, body: Any = None) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"} if text else {})
            answer = connection.getresponse()
            data = answer.read()
            if answer.status >= 400 and path != "/ready":
                raise RuntimeError(f"{method} {path} answered {answer.status}: {data[:300]!r}")
            return data
        finally:
            connection.close()


@contextmanager
def served(serve: Sequence[str]) -> Iterator[Client]:
    """A fresh server on an empty data folder."""
    with tempfile.TemporaryDirectory(prefix="faces-bench-") as folder:
        client = Client(serve, Path(folder))
        try:
            yield client
        finally:
            client.close()


def first_faces(serve: Sequence[str], repeats: int) -> tuple[list[Row], list[float]]:
    """From the start of the process to the model and to a first face of few and of many steps; the memory of each."""
    times: dict[str, list[float]] = {}
    memory = []
    for repeat in range(repeats + 1):
        for steps in (8, 50):
            began = time.perf_counter()
            with served(serve) as client:
                client.wait_ready()
                ready = time.perf_counter() - began
                client.draw(n_images=1, n_inf_steps=steps)
                face = time.perf_counter() - began
                memory += [value for value in [client.memory_mb] if value is not None]
            told(f"start: ready after {ready:.2f} s, first face after {face:.2f} s ({steps} evaluations)")
            if repeat:  # the first starts compile, where the cache is empty, and read the files from the disk
                times.setdefault("ready", []).append(ready)
                times.setdefault(f"first face ({steps} evaluations)", []).append(face)
    return [Row(f"process start to {what}", values, "s", at_most=None if what == "ready" else 5.0)
            for what, values in times.items()], memory


def as_a_client(serve: Sequence[str], repeats: int) -> Section:
    """From the start of the process to the first face, short requests, and what previews at every step cost."""
    rows, memory = first_faces(serve, max(3, repeats // 2))
    with served(serve) as client:
        client.wait_ready()
        times: dict[str, list[float]] = {}
        short = [(f"{steps} evaluations{words}", {"n_images": 1, "n_inf_steps": steps, **more})
                 for steps in (2, 4, 8)
                 for words, more in ((" with guidance", {}), (", guidance off", {"guidance_scale": 1}))]
        for repeat in range(4 * repeats + 2):
            for name, body in short:
                seconds, _ = timed(partial(client.draw, **body, seed=repeat))
                if repeat >= 2:
                    times.setdefault(name, []).append(1000 * seconds)
        promised = {"4 evaluations with guidance": 100.0}  # the fewest that are within a quarter of many
        rows += [Row(f"POST to PNG, 1 image, {name}", values, "ms", at_most=promised.get(name))
                 for name, values in times.items()]
        told(", ".join(f"{name} {statistics.median(values):.0f} ms" for name, values in times.items()))
        ratios = []
        for repeat in range(repeats + 1):
            job = {"n_images": 4, "n_inf_steps": 50, "seed": repeat}
            both = [timed(partial(client.draw, **job, stream_freq=freq))[0]
                    for freq in ((1, 1000) if repeat % 2 else (1000, 1))]
            if repeat:
                ratios.append(both[0] / both[1] if repeat % 2 else both[1] / both[0])
        rows.append(Row("4 images x 50, previews at every step over none", ratios, at_most=1.05))
        memory += [value for value in [client.memory_mb] if value is not None]
    rows.append(Row("most memory of the server's process", memory or [float("nan")], "MB", at_most=1500))
    return Section("speed", rows, [
        "A real server process over HTTP on this machine, an empty data folder each time; PNGs fetched over HTTP.",
        "Previews go through files and events, as for the page. The first start, which may compile, is not counted.",
    ])


def run(load: Load, serve: Sequence[str], steps: int, repeats: int, only: str = "all") -> list[Section]:
    """All sections, one after the other, or the one of `SECTIONS` that is asked for."""
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        told("This machine is busy with something else: read the ratios, not the seconds.")
    ways: list[Callable[[], Section]] = [
        lambda: compare_engines(load, 4 * repeats), lambda: against_diffusers(load, steps, repeats),
        lambda: as_a_client(serve, repeats),
    ]  # fmt: skip
    return [measure() for name, measure in zip(SECTIONS, ways, strict=True) if only in ("all", name)]
