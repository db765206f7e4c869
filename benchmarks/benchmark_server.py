"""What does the server cost, and does it keep its promises at full size?

    python benchmarks/benchmark_server.py                  everything, about ten minutes on two idle cores
    python benchmarks/benchmark_server.py cost             one section: cost, crash, soak or clients
    python benchmarks/benchmark_server.py all --record     also writes the tables into docs/benchmarks.md

The bundled model, the real server process, real HTTP. What is compared is measured in turn, A B A B, on the same
machine in the same run. The exit status is 1 when a promise is broken. It is a command, not a test: timings want an
otherwise idle machine; the same promises without timings are in `test_server.py`.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the modules of the root

from core.evaluation.benchmark_tables import Row, Section, machine, record, timed, told
from tests.support.server import LOST, ROOT, Comparison, Refused, Server, ServerEvent, draw_alone, mixed_jobs, pixels_of

if TYPE_CHECKING:
    from generator import FaceGenerator

DOCUMENT = ROOT / "docs" / "benchmarks.md"
MODEL = ROOT / "models" / "celeba128"
FLAGS = ("--device", "cpu")
PROMPT = "a smiling young woman with wavy blond hair"
KIB = 1024
T = TypeVar("T")


def agreement(wanted: str, comparison: Comparison) -> list[Row]:
    """How near the images are to those that they must be."""
    return [
        Row(f"difference from the pictures {wanted}, grey levels (worst)", [max(comparison.all)], at_most=1),
        Row(f"pictures equal to those in every pixel, of {len(comparison.all)}", [comparison.all.count(0)]),
    ]


def load_faces() -> FaceGenerator:
    from generator import FaceGenerator

    return FaceGenerator.load(MODEL, device="cpu")


# ---- cost ------------------------------------------------------------------------------------------------------------


class BareLoop:
    """The denoising loop and nothing around it, in a process of its own: in its main thread or in a background one."""

    def __init__(self, in_background: bool) -> None:
        context = get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=serve_bare_loop, args=(theirs, in_background), daemon=True)
        self._process.start()

    def __call__(self, body: Mapping[str, Any]) -> tuple[float, list[bytes]]:
        """Seconds, measured over there, and the PNGs."""
        self._ours.send(dict(body))
        return self._ours.recv()

    def close(self) -> None:
        self._ours.send(None)
        self._process.join()


def serve_bare_loop(pipe: Connection, in_background: bool) -> None:
    """The other side of `BareLoop`. Load and loop share one thread, as in the server."""

    def work() -> None:
        faces = load_faces()
        while (body := pipe.recv()) is not None:
            pipe.send(timed(draw_bare, faces, body))

    if in_background:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    else:
        work()


def draw_bare(faces: FaceGenerator, body: Mapping[str, Any]) -> list[bytes]:
    """Text, noise, `core.diffusion.sampling.sample`, decoder, PNG: what no server could leave out."""
    import torch

    from core.diffusion.sampling import sample
    from core.diffusion.schedule import schedule_from_config
    from core.diffusion.schedulers import make_scheduler
    from core.diffusion.unet import encode_prompts
    from core.engine import usual_sampler
    from core.imaging.png_metadata import encode_png
    from core.imaging.watermark import VERSION, mark
    from core.nn.layers import to_pixels

    info, count = faces.info, body["n_images"]
    sampler = usual_sampler(info, body["n_inf_steps"])
    asked = {**body, "n_images": 1, "negative_prompt": "", "sampler": sampler,
             "guidance_scale": info.default_guidance_scale}
    generators = [torch.Generator().manual_seed(body["seed"] + i) for i in range(count)]
    with torch.inference_mode():
        condition = encode_prompts(faces.clip, faces.tokenizer, [body["prompt"]], px=info.image_size).repeat(count)
        z = sample(
            faces.denoise,
            condition,
            make_scheduler(sampler, faces.scheduler_config),
            torch.stack([torch.randn(info.latent_shape, generator=one) for one in generators]),
            body["n_inf_steps"],
            info.default_guidance_scale,
            schedule=schedule_from_config(faces.scheduler_config),
            generators=generators,
            guidance_range=faces.guidance_range(),
        )
        pixels = to_pixels(faces.decode_latents(z))
    return [encode_png(mark(one), {**asked, "seed": body["seed"] + i}, info, VERSION) for i, one in enumerate(pixels)]


def draw(server: Server, body: Mapping[str, Any]) -> list[bytes]:
    """One job as a client has it: POST, listen, fetch the PNGs."""
    job_id = server.submit(body)
    server.wait(job_id)
    return server.pictures(job_id)


def draw_in_turn(server: Server, bodies: Sequence[Mapping[str, Any]]) -> None:
    for body in bodies:
        server.wait(server.submit(body))


def draw_together(server: Server, bodies: Sequence[Mapping[str, Any]]) -> None:
    for job_id in [server.submit(body) for body in bodies]:
        server.wait(job_id)


def cost(folder: Path) -> Section:
    """The server against the bare loop, jobs together against the same in turn, a short job behind a long one."""
    with Server(folder / "cost", *FLAGS) as server:
        rows = [*against_bare_loop(server), *against_in_turn(server), *behind_long(server)]
    return Section("cost", rows, [
        "Ratios are medians over pairs that were measured one right after the other.",
        "Server: from POST, with an SSE reader and the default `stream_freq`, to the last PNG in the client's hands. "
        "Bare loop: text encoding, `core.diffusion.sampling.sample`, decoder, PNG in another process, in its main or "
        "in a background thread; the baseline is the one with the faster median.",
        "1 behind 8: nothing is promised, because every step then draws nine images instead of one.",
    ])


def against_bare_loop(server: Server, repeats: int = 7) -> list[Row]:
    bare = {"main thread": BareLoop(in_background=False), "background thread": BareLoop(in_background=True)}
    ways: dict[str, Callable[[Mapping[str, Any]], tuple[float, list[bytes]]]]
    ways = {"server": lambda body: timed(draw, server, body), **bare}
    times: dict[str, list[float]] = {name: [] for name in ways}
    comparison = Comparison()
    try:
        for repeat in range(repeats + 1):
            steps = 100 if repeat else 5  # the first round warms up
            body = {"prompt": PROMPT, "n_images": 4, "n_inf_steps": steps, "seed": 1000 + repeat}
            turn = repeat % len(ways)  # nobody is always the first
            results = {name: ways[name](body) for name in [*ways][turn:] + [*ways][:turn]}
            for where in bare:
                comparison.add(where, results["server"][1], [pixels_of(png) for png in results[where][1]])
            if repeat:
                for name, (took_s, _) in results.items():
                    times[name].append(took_s)
                told(f"cost: {repeat}/{repeats}: " + ", ".join(f"{name} {times[name][-1]:.2f} s" for name in ways))
    finally:
        for loop in bare.values():
            loop.close()
    fastest = min(bare, key=lambda where: statistics.median(times[where]))
    ratios = [one / other for one, other in zip(times["server"], times[fastest], strict=True)]
    return [
        *(Row(f"4 images x 100 steps, bare loop, {where}", times[where], "s") for where in bare),
        Row("4 images x 100 steps, server", times["server"], "s"),
        Row(f"server over bare loop ({fastest})", ratios, at_most=1.05),
        Row("difference between their pictures, grey levels (worst)", [max(comparison.all)], at_most=1),
    ]


def against_in_turn(server: Server, repeats: int = 3) -> list[Row]:
    rows = []
    for images, steps in ((1, 25), (4, 10)):
        bodies = [{"prompt": PROMPT, "n_images": images, "n_inf_steps": steps, "seed": i} for i in range(8)]
        draw_together(server, bodies)  # warms up
        together, in_turn = [], []
        for repeat in range(repeats):
            both = [(together, draw_together), (in_turn, draw_in_turn)]
            for times, way in both if repeat % 2 else both[::-1]:
                times.append(timed(way, server, bodies)[0])
            told(f"cost: 8 x {images} images: {together[-1]:.2f} s together, {in_turn[-1]:.2f} s in turn")
        what = f"8 jobs of {images} image{'s' * (images > 1)} x {steps} steps"
        ratios = [one / other for one, other in zip(together, in_turn, strict=True)]
        rows += [Row(f"{what}, in turn", in_turn, "s"), Row(f"{what}, together", together, "s"),
                 Row(f"{what}, together over in turn", ratios, at_most=1.02)]
    return rows


def behind_long(server: Server, repeats: int = 5) -> list[Row]:
    rows = []
    for images, others, bound in ((1, 1, 3.0), (4, 4, 3.0), (1, 8, None)):
        short = {"prompt": PROMPT, "n_images": images, "n_inf_steps": 20, "seed": 3}
        long = {"prompt": PROMPT, "n_images": others, "n_inf_steps": 500, "seed": 4}
        ratios = []
        for _ in range(repeats):
            alone, _ = timed(draw_in_turn, server, [short])
            in_front = server.submit(long)
            next(event for event in server.events(in_front) if event.kind == "progress" and event.data["t"] >= 3)
            behind, _ = timed(draw_in_turn, server, [short])
            assert not server.state(in_front)["finished"], "the long job was too short to be waited for"
            server.cancel(in_front)
            server.wait(in_front)
            ratios.append(behind / alone)
            told(f"cost: 20 steps, {images} behind {others}: {alone:.2f} s alone, {behind:.2f} s behind 500 steps")
        what = f"20 steps behind 500 steps over the same alone, {images} behind {others} image{'s' * (others > 1)}"
        rows.append(Row(what, ratios, at_most=bound))
    return rows


# ---- crash -----------------------------------------------------------------------------------------------------------


def crash(folder: Path, kills: int = 20, kills_at_start: int = 5, seed: int = 20) -> Section:
    """Kill -9 at seeded random moments of a busy server; every accepted job must end with its undisturbed images."""
    rng = random.Random(seed)
    faces = load_faces()
    bodies = mixed_jobs(30 * kills, faces.info.samplers, seed=seed, steps=(5, 25))
    ids: list[str] = []
    kept: dict[str, list[bytes]] = {}  # images that were seen before a kill
    received: dict[str, list[ServerEvent]] = {}
    server = Server(folder / "crash", *FLAGS)

    def unfinished() -> int:
        jobs = server.request("GET", "/ready").json()["jobs"]
        return jobs["waiting"] + jobs["running"]

    def submit_next() -> None:
        ids.append(server.submit(bodies[len(ids)], key=f"job-{len(ids)}"))

    def draw_four() -> None:
        for _ in range(4):
            submit_next()
        for job_id in ids:
            server.wait(job_id)

    def feed() -> None:
        """Keep the server busy until it is gone. What it had no time to answer is sent again, with the same key."""
        with suppress(*LOST):
            while True:
                if unfinished() < 4:
                    submit_next()
                else:
                    time.sleep(0.05)

    def remember_finished() -> None:
        for job_id in ids:
            if job_id not in kept and server.state(job_id)["status"] == "succeeded":
                kept[job_id] = server.pictures(job_id)

    def listen(job_id: str) -> None:
        with suppress(*LOST):
            for event in server.events(job_id):
                received.setdefault(job_id, []).append(event)

    try:
        server.start()
        life_s = 1.5 * timed(draw_four)[0]  # a fresh process, as all that follow: some jobs will end, some will not
        busy = 0
        for kill in range(kills):
            remember_finished()
            with ThreadPoolExecutor(2) as pool:
                not_received = [job_id for job_id in ids if job_id not in kept][:1]
                at_work = [pool.submit(feed), *(pool.submit(listen, job_id) for job_id in not_received)]
                time.sleep(rng.uniform(0.1, life_s))
                server.kill()
            for future in at_work:
                future.result()  # whatever went wrong there, but for the lost connection
            if kill % (kills // kills_at_start) == 0:
                server.spawn()
                time.sleep(rng.uniform(0.0, 3.0))
                server.kill()
            server.start()
            busy += unfinished() > 0  # what the kill left behind
            told(f"crash: kill {kill + 1}/{kills}, {len(ids)} jobs accepted, {len(kept)} seen to be finished")
        remember_finished()
        pngs, restarts, untrue = {}, [], 0
        for job_id in ids:
            if server.wait(job_id)["status"] == "succeeded":
                pngs[job_id] = server.pictures(job_id)
            replayed = {event.id: event for event in server.events(job_id)}
            restarts.append(sum("restarted" in event.data for event in replayed.values()))
            untrue += sum(replayed.get(event.id) != event for event in received.get(job_id,
                                                                                    ()) if event.kind != "preview")
        known = server.request("GET", "/ready").json()["jobs"]["finished"]
        traces = server.output().count("Traceback")
    finally:
        server.stop()
    told(f"crash: drawing {len(ids)} jobs undisturbed")
    comparison = Comparison()
    for job_id, body in zip(ids, bodies, strict=False):
        if job_id in pngs:
            comparison.add(body["sampler"], pngs[job_id], draw_alone(faces, body))
    return Section("crash", [
        Row("kills -9", [kills], at_least=20),
        Row("of them with unfinished jobs in the server", [busy], at_least=kills),
        Row("further kills -9 while it was starting again", [kills_at_start]),
        Row("accepted jobs", [len(ids)]),
        Row("jobs that had to be begun again", [sum(count > 0 for count in restarts)]),
        Row("most kills that one of them survived", [max(restarts)]),
        Row("accepted jobs that did not succeed", [len(ids) - len(pngs)], at_most=0),
        Row("jobs that nobody asked for (a POST sent again with its key)", [known - len(ids)], at_most=0),
        Row("jobs seen to be finished before a kill", [len(kept)]),
        Row("of them changed afterwards", [sum(pngs.get(job_id) != seen for job_id, seen in kept.items())], at_most=0),
        Row("events that were received and are no longer true", [untrue], at_most=0),
        Row("tracebacks in the server's log", [traces], at_most=0),
        *agreement("of an undisturbed run", comparison),
    ], [f"Seed {seed}; moments uniform between 0.1 and {life_s:.1f} s after the model is loaded, four jobs unfinished "
        "all the time; while it starts, uniform in the first 3 s.",
        f"Equal in every pixel, by sampler: {comparison.exact}."])


# ---- soak ------------------------------------------------------------------------------------------------------------


def soak(folder: Path, jobs: int = 300, settled: int = 100) -> Section:
    """Job after job, alone and in small groups: memory, threads and open files after the first hundred."""
    with Server(folder / "soak", *FLAGS) as server:
        process = psutil.Process(server.pid)
        samplers = server.request("GET", "/options").json()["samplers"]
        bodies = mixed_jobs(jobs, samplers, seed=30, steps=(2, 6))
        samples: list[tuple[int, int, int]] = []
        groups = [1, 1, 2, 3]
        while len(samples) < jobs:
            size = groups[len(samples) % len(groups)]
            ids = [server.submit(body) for body in bodies[len(samples) : len(samples) + size]]
            for job_id in ids:
                server.wait(job_id)
                server.pictures(job_id)
                samples.append((process.memory_info().rss, process.num_threads(), process.num_fds()))
            if len(samples) // 50 > (len(samples) - len(ids)) // 50:
                told(f"soak: {len(samples)} jobs, {samples[-1][0] / KIB**2:.1f} MiB, {samples[-1][1:]}")
        assert server.request("GET", "/ready").json()["jobs"]["finished"] == jobs
    rss, threads, files = (np.array(column) for column in zip(*samples[settled:], strict=True))
    slope = float(np.polyfit(np.arange(len(rss)), rss, 1)[0]) / KIB
    return Section("soak", [
        Row("resident memory after each of the last 200 jobs", (rss / KIB**2).tolist(), "MiB"),
        Row("the same, its slope", [slope], "KiB a job", at_most=32),
        Row("the same, largest minus smallest", [float(np.ptp(rss)) / KIB**2], "MiB", at_most=24),
        Row("threads, largest minus smallest", [int(np.ptp(threads))], at_most=1),
        Row("open files, largest minus smallest", [int(np.ptp(files))], at_most=4),
    ], [f"{jobs} jobs in groups of {groups}, 1-2 images, 2-6 steps, all samplers, each with an SSE reader; the first "
        f"{settled} settle caches. Keeping the pictures and latents of the jobs would be a slope of more than 70 KiB."])


# ---- clients ---------------------------------------------------------------------------------------------------------


def clients(folder: Path, count: int = 64, jobs_each: int = 2) -> Section:
    """Everybody at once, more than the queue holds: who is refused comes again when told to."""
    from core.text.captions import surprise

    faces = load_faces()
    bodies = mixed_jobs(count * jobs_each, faces.info.samplers, seed=40, steps=(6, 10), most_images=1)
    bodies = [{**body, "prompt": surprise(random.Random(i)), "seed": 10_000 + i} for i, body in enumerate(bodies)]
    told(f"clients: drawing {len(bodies)} jobs alone")
    wanted = [draw_alone(faces, body) for body in bodies]
    ready = threading.Barrier(count)
    refusals: list[str | None] = []
    latency: list[float] = []
    answers: dict[int, tuple[dict[str, Any], list[bytes]]] = {}

    with Server(folder / "clients", *FLAGS) as server:

        def client(number: int) -> None:
            mine = range(number * jobs_each, (number + 1) * jobs_each)
            ready.wait()
            began, ids = time.monotonic(), {}
            for index in mine:
                while index not in ids:
                    try:
                        ids[index] = server.submit(bodies[index], client=f"client-{number}")
                    except Refused as refused:
                        if refused.answer.status != 429:
                            raise
                        refusals.append(refused.answer.headers["Retry-After"])
                        time.sleep(float(refusals[-1] or 1))
            for index, job_id in ids.items():
                while not (state := server.state(job_id))["finished"]:
                    time.sleep(0.5)
                answers[index] = state, server.pictures(job_id)
            latency.append(time.monotonic() - began)

        with ThreadPoolExecutor(count) as pool:
            for future in [pool.submit(client, number) for number in range(count)]:
                future.result()
        listed = server.request("GET", "/jobs/?limit=200").json()["jobs"]
        traces = server.output().count("Traceback")
    comparison = Comparison()
    mixed = 0
    for index, (state, pngs) in answers.items():
        mixed += any(state["parameters"][name] != value for name, value in bodies[index].items())
        comparison.add(bodies[index]["sampler"], pngs, wanted[index])
    return Section("clients", [
        Row("clients that submit at once", [count], at_least=64),
        Row("jobs", [len(bodies)]),
        Row("refused with 429 because the queue was full", [len(refusals)], at_least=1),
        Row("of them without Retry-After", [sum(one is None for one in refusals)], at_most=0),
        Row("jobs that were lost or doubled", [abs(len(listed) - len(bodies)) + len(bodies) - len(answers)], at_most=0),
        Row("jobs with somebody else's parameters", [mixed], at_most=0),
        *agreement("drawn alone", comparison),
        Row("from the first POST of a client to its last picture", latency, "s"),
        Row("tracebacks in the server's log", [traces], at_most=0),
    ], [f"Equal in every pixel, by sampler: {comparison.exact}."])


# ---- the command -----------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Path], Section]] = {"cost": cost, "crash": crash, "soak": soak, "clients": clients}


def torch_line() -> str:
    """Which torch, with how many threads."""
    import torch

    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and with --record write down; 1 when a promise is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("section", nargs="?", choices=(*SECTIONS, "all"), default="all")
    parser.add_argument("--record", action="store_true", help=f"write the tables into {DOCUMENT.relative_to(ROOT)}")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else a server would be left behind
    circumstances = machine(torch_line())
    told(circumstances)
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        told("This machine is busy with something else: the timings will not be worth much.")
    kept = True
    for name in SECTIONS if arguments.section == "all" else (arguments.section,):
        with tempfile.TemporaryDirectory(prefix="faces-benchmark-") as folder:
            began = time.monotonic()
            section = SECTIONS[name](Path(folder))
        print(f"\n## {name} ({time.monotonic() - began:.0f} s)\n\n{section.text()}", flush=True)
        kept = kept and section.kept
        if arguments.record:
            record(DOCUMENT, section, circumstances, f"python benchmarks/benchmark_server.py {name} --record")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
