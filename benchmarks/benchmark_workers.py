"""What does it cost that workers generate, how far do they scale, and is anything lost when they die?

    python benchmarks/benchmark_workers.py                 everything, about ten minutes on two idle cores
    python benchmarks/benchmark_workers.py scale           one section: scale, overhead, server, bytes, endure
    python benchmarks/benchmark_workers.py all --record    also writes the tables into docs/scaling.md

A real Redis, real worker processes. `scale` and `endure` generate with the tests' stand-in, which sleeps as long as an
accelerator of its own would compute; `overhead` and `bytes` with the bundled model. What is compared is measured in
turn, A B A B, in the same run. The exit status is 1 when a promise is broken.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the modules of the root

from core.evaluation.benchmark_tables import Row, Section, machine, record, timed, told
from core.jobs.batching import to_generation_request
from core.jobs.job import Job
from tests.support.drawing import DrawingEngine
from tests.support.elsewhere import Served, served
from tests.support.redis_server import RedisServer
from tests.support.server import ROOT, Comparison, Server, pixels_of
from tests.support.worker_process import WorkerProcess, until

DOCUMENT = ROOT / "docs" / "scaling.md"
FLAGS = ("--device", "cpu")
PROMPT = "a smiling young woman with wavy blond hair"
PATIENCE_S = 600.0
STEPS = 20  # of the jobs of `scale`


def drawing_workers(stack: ExitStack, folder: Path, url: str, count: int, *flags: str) -> list[WorkerProcess]:
    """So many workers with the stand-in, which end with the stack."""
    return [stack.enter_context(WorkerProcess.drawing(folder / f"worker-{i}.log", url, *flags)) for i in range(count)]


# ---- how far does it scale? ------------------------------------------------------------------------------------------


def scale(folder: Path, jobs: int = 48, ms_per_image: float = 24.0) -> Section:
    """Jobs a second with 1, 2 and 4 workers that each take the same time for an image of a step."""
    seconds: dict[int, list[float]] = {1: [], 2: [], 4: []}
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer(folder / "redis"))
        site = stack.enter_context(served(redis.url, folder / "data", max_waiting=10 * jobs))
        for count in (1, 2, 4, 1, 2, 4):
            with ExitStack() as few:
                drawing_workers(few, folder, redis.url, count, "--ms-per-image", str(ms_per_image))
                site.wait_for_workers(count)
                site.wait(*[site.submit(n_images=4, n_inf_steps=5) for _ in range(2 * count)])
                took, _ = timed(run_jobs, site, jobs)
                seconds[count].append(took)
                told(f"{count} workers: {jobs / took:.2f} jobs a second")
            until(lambda: not site.workers.link.workers)
    rate = {count: [jobs / one for one in found] for count, found in seconds.items()}
    ratio = {count: [many / one for many, one in zip(rate[count], rate[1], strict=True)] for count in (2, 4)}
    return Section("scale", [
        *(Row(f"jobs a second with {count} worker{'s' * (count > 1)}", rate[count]) for count in rate),
        Row("2 workers over 1", ratio[2], at_least=1.9),
        Row("4 workers over 1", ratio[4], at_least=3.6),
    ], [f"{jobs} jobs of 4 images and {STEPS} steps; an image of a step takes {ms_per_image:g} ms of sleep, as on an "
        "accelerator of the worker's own. All processes share this machine's cores."])


def run_jobs(site: Served, jobs: int) -> None:
    ids = [site.submit(n_images=4, n_inf_steps=STEPS, stream_freq=100, seed=i) for i in range(jobs)]
    site.wait(*ids, timeout_s=PATIENCE_S)


# ---- what does it cost? ----------------------------------------------------------------------------------------------


def overhead(folder: Path, pairs: int = 5, jobs: int = 2) -> Section:
    """The same jobs by a server that generates itself and by one whose single worker does, in turn."""
    single: dict[str, list[float]] = {"here": [], "there": []}
    many: dict[str, list[float]] = {"here": [], "there": []}
    comparison = Comparison()
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer(folder / "redis"))
        stack.enter_context(WorkerProcess.real(folder / "worker.log", redis.url, *FLAGS))
        servers = {"here": stack.enter_context(Server(folder / "here", *FLAGS)),
                   "there": stack.enter_context(Server(folder / "there", *FLAGS, "--broker", redis.url))}
        until(lambda: servers["there"].request("GET", "/ready").json().get("workers"), PATIENCE_S)
        for server in servers.values():
            four_of_fifty(server, 2)
        for turn in range(pairs):
            for name, server in servers.items():
                single[name] += [timed(one_of_four, server, 10 * turn + i)[0] for i in range(5)]
        for turn in range(pairs):
            found = {}
            for name in sorted(servers, reverse=bool(turn % 2)):
                took, found[name] = timed(four_of_fifty, servers[name], jobs)
                many[name].append(took)
            for here, there in zip(found["here"], found["there"], strict=True):
                comparison.add("", servers["there"].pictures(there),
                               [pixels_of(png) for png in servers["here"].pictures(here)])
            told(f"pair {turn + 1}: {many['here'][-1]:.2f} s here, {many['there'][-1]:.2f} s there")
    later_ms = [1000 * (b - a) for a, b in zip(single["here"], single["there"], strict=True)]
    lost = [100 * (1 - a / b) for a, b in zip(many["here"], many["there"], strict=True)]
    return Section("overhead", [
        Row("one job of 1 image and 4 steps, on the spot", single["here"], "s"),
        Row("one job of 1 image and 4 steps, by a worker", single["there"], "s"),
        Row("what that takes longer", later_ms, "ms", at_most=30),
        Row(f"{jobs} jobs of 4 images and 50 steps, on the spot", many["here"], "s"),
        Row(f"{jobs} jobs of 4 images and 50 steps, by a worker", many["there"], "s"),
        Row("throughput lost", lost, "%", at_most=5),
        Row("difference of their pictures, grey levels (worst)", [max(comparison.all)], at_most=1),
    ], ["Server, Redis and worker share the cores on which the server alone computes in the other case."])


def one_of_four(server: Server, seed: int) -> None:
    server.wait(server.submit({"prompt": PROMPT, "n_images": 1, "n_inf_steps": 4, "seed": seed}))


def four_of_fifty(server: Server, jobs: int) -> list[str]:
    ids = [server.submit({"prompt": PROMPT, "n_images": 4, "n_inf_steps": 50, "seed": 100 * i}) for i in range(jobs)]
    for one in ids:
        server.wait(one)
    return ids


def bytes_(folder: Path, jobs: int = 5) -> Section:
    """What a job moves through Redis, and what it leaves there and on the server's disk."""
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer(folder / "redis"))
        stack.enter_context(WorkerProcess.real(folder / "worker.log", redis.url, *FLAGS))
        server = stack.enter_context(Server(folder / "data", *FLAGS, "--broker", redis.url))
        until(lambda: server.request("GET", "/ready").json().get("workers"), PATIENCE_S)
        four_of_fifty(server, 1)
        client = redis.client()
        time.sleep(2)
        before, began = client.info(), time.monotonic()
        time.sleep(5)
        quiet, idle_s = client.info(), time.monotonic() - began
        began = time.monotonic()
        four_of_fifty(server, jobs)
        after, took = client.info(), time.monotonic() - began
        stored = sum(path.stat().st_size for path in (folder / "data" / "jobs").rglob("*") if path.is_file())
        rows = []
        for name, field in (("into Redis", "total_net_input_bytes"), ("out of Redis", "total_net_output_bytes")):
            idle = (quiet[field] - before[field]) / idle_s
            rows.append(Row(f"kB {name} for a job", [(after[field] - quiet[field] - idle * took) / jobs / 1000]))
            rows.append(Row(f"bytes a second {name} without jobs", [idle]))
        commands = (after["total_commands_processed"] - quiet["total_commands_processed"]) / jobs
        return Section("bytes", [
            *rows, Row("commands of Redis for a job", [commands]),
            Row("kB of Redis' memory after all", [after["used_memory_dataset"] / 1000]),
            Row("kB of files that a job leaves with the server", [stored / (jobs + 1) / 1000]),
        ], ["Jobs of 4 images and 50 steps of the bundled model, with the previews that the page asks for by default."])


def server(folder: Path, jobs: int = 24) -> Section:
    """The server's own CPU time for a job, by the number of steps that it is told of."""
    cpu_ms: dict[int, list[float]] = {5: [], 50: []}
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer(folder / "redis"))
        site = stack.enter_context(served(redis.url, folder / "data", max_waiting=10 * jobs))
        drawing_workers(stack, folder, redis.url, 1, "--ms-per-image", "0.5")
        site.wait_for_workers(1)
        for steps in (5, 50) * 4:
            busy = time.process_time()
            for seed in range(jobs):
                site.submit(seed=seed, n_images=4, n_inf_steps=steps, stream_freq=100)
            until(lambda: site.service.queue.counts()["running"] + site.service.queue.counts()["waiting"] == 0,
                  PATIENCE_S, every_s=0.2)
            cpu_ms[steps].append(1000 * (time.process_time() - busy) / jobs)
    step = [(many - few) / 45 for few, many in zip(cpu_ms[5], cpu_ms[50], strict=True)]
    return Section("server", [
        *(Row(f"CPU time for a job of 4 images and {steps} steps", found, "ms") for steps, found in cpu_ms.items()),
        Row("of it for each step that is told", step, "ms"),
    ], ["From the request to the last image on the disk, without previews, in the process of the server alone."])


# ---- is anything lost? -----------------------------------------------------------------------------------------------


def endure(folder: Path, jobs: int = 200, workers: int = 3, kills: int = 10, restarts: int = 2) -> Section:
    """Workers are killed at random moments, Redis is killed and started again on its data; some jobs are cancelled."""
    rng = random.Random(0)
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer(folder / "redis"))
        them = drawing_workers(stack, folder, redis.url, workers, "--ms-per-image", "5")
        site = stack.enter_context(served(redis.url, folder / "data", max_waiting=10 * jobs))
        site.wait_for_workers(workers)
        ids = [site.submit(n_images=rng.randint(1, 4), n_inf_steps=rng.randint(20, 60), stream_freq=20, seed=i)
               for i in range(jobs)]
        unwanted = set(rng.sample(ids, jobs // 10))
        acts = ["kill"] * kills + ["restart"] * restarts + ["cancel"] * len(unwanted)
        rng.shuffle(acts)
        waiting, began = list(unwanted), time.monotonic()
        for act in acts:
            time.sleep(rng.uniform(0.2, 1.2))
            if act == "kill":
                worker = rng.choice(them)
                worker.kill()
                worker.start()
            elif act == "restart":
                redis.stop(kill=True)
                time.sleep(1)
                redis.start()
            else:
                site.client.post(f"/jobs/{waiting.pop()}/cancel")
        site.wait(*ids, timeout_s=PATIENCE_S)
        took = time.monotonic() - began
        found = [site.job(one) for one in ids]
        apart = Comparison()
        for job in found:
            if job.state == "succeeded":
                apart.add("", site.pngs(job.id), [pixels_of(png) for png in undisturbed(job)])
        wrong = [job for job in found if job.state != ("cancelled" if job.id in unwanted else "succeeded")
                 and not (job.id in unwanted and job.state == "succeeded")]
        return Section("endure", [
            Row("jobs", [jobs]),
            Row("workers killed with SIGKILL", [kills]),
            Row("Redis killed and started", [restarts]),
            Row("jobs cancelled, waiting and running", [sum(job.state == "cancelled" for job in found)]),
            Row("jobs lost or failed", [len(wrong)], at_most=0),
            Row("jobs that ended twice", [sum(count(job, "done") != 1 for job in found)], at_most=0),
            Row("images told twice or not at all", [sum(job.state == "succeeded" and repeated(job) for job in found)],
                at_most=0),
            Row("jobs that began again", [sum(any(event.data.get("restarted") for event in job.events)
                                              for job in found)]),
            Row("difference from an undisturbed run, grey levels (worst)", [max(apart.all)], at_most=1),
            Row("from the first to the last", [took], "s"),
        ], ["The stand-in's images, 1 to 4 of 20 to 60 steps; a cancelled job that was over already counts as done."])


def undisturbed(job: Job) -> list[bytes]:
    """The files that the stand-in makes of a job alone."""
    engine = DrawingEngine()
    run = engine.start(to_generation_request(job.request, engine.info))
    while not run.finished:
        engine.step([run])
    return [drawing.png for drawing in engine.pictures(run)]


def count(job: Job, kind: str) -> int:
    return sum(event.kind == kind for event in job.events)


def repeated(job: Job) -> bool:
    """Whether the run that counts tells of another number of images than were asked for."""
    told_of = [event.data["index"] for event in job.snapshot().events_of_this_run if event.kind == "image"]
    return sorted(told_of) != list(range(job.request["n_images"]))


# ---- the command -----------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Path], Section]] = {
    "scale": scale, "overhead": overhead, "server": server, "bytes": bytes_, "endure": endure}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and with --record write down; 1 when a promise is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("section", nargs="?", choices=(*SECTIONS, "all"), default="all")
    parser.add_argument("--record", action="store_true", help=f"write the tables into {DOCUMENT.relative_to(ROOT)}")
    arguments = parser.parse_args(argv)
    kept = True
    for name in SECTIONS if arguments.section == "all" else (arguments.section,):
        circumstances = machine("Celery and Redis as pinned")
        told(circumstances)
        with tempfile.TemporaryDirectory(prefix="faces-benchmark-") as folder:
            section = SECTIONS[name](Path(folder))
        print(f"\n## {name}\n\n{section.text()}", flush=True)
        kept = kept and section.kept
        if arguments.record:
            record(DOCUMENT, section, circumstances, f"python benchmarks/benchmark_workers.py {name} --record")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
