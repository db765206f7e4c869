"""How is a worker run, or a server whose workers generate?

`./start.py worker --broker URL` prepares the environment with the packages that workers need, then runs `worker.py` in
it until it is asked to stop. It does not know what a worker does.

Standard library only and no syntax newer than Python 3.7, as in `launcher/environment.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from core.process import Problem, clean_env, venv_python
from launcher import environment, host
from launcher.device_check import quick_device_problem
from launcher.model_check import model_folder
from launcher.pretrained_check import any_model_problem
from launcher.process import Child

CLOSING_MESSAGE = "Stopping: what is being drawn gets a few seconds, the rest goes to other workers."


def model_words(root: Path, options: argparse.Namespace) -> list[str]:
    """The flags about models, as api.py and worker.py both take them."""
    words = ["--device", options.device]
    words += [word for name in options.model for word in ("--model", str(model_folder(root, name)))]
    words += ["--image-size", str(options.image_size)] if options.image_size else []
    return words + (["--threads", str(options.threads)] if options.threads else [])


def broker_env(options: argparse.Namespace) -> dict[str, str]:
    """The broker's address may hold a password, and every user of a machine can read command lines."""
    return {"FACES_BROKER": options.broker} if options.broker else {}


def run_worker(root: Path, options: argparse.Namespace) -> int:
    """Check, prepare, run worker.py until it is asked to stop; returns the exit status. Raises Problem."""
    if not options.broker:
        raise Problem("A worker needs the address of its broker: ./start.py worker --broker redis://host:6379.")
    for problem in (*(any_model_problem(root, name) for name in options.model),
                    host.memory_problem(host.free_memory())):
        if problem:
            raise Problem(problem)
    environment.prepare(root, workers=True, offline=options.offline, torch_index=options.torch_index)
    device = quick_device_problem(root, options.device)
    if device and options.device != "auto":
        raise Problem(device)
    env = clean_env(HF_HUB_OFFLINE="1", **broker_env(options))
    command = [str(venv_python(root)), str(root / "worker.py"), *model_words(root, options),
               "--sentinel-master", options.sentinel_master]
    print("Starting the worker ... (Ctrl+C stops)", flush=True)
    with Child(command, cwd=root, env=env, closing_message=CLOSING_MESSAGE) as worker:
        worker.release()
        status = worker.wait()
    if worker.asked:
        return 0 if worker.asked == 1 else 130
    if status:
        raise Problem(f"The worker ended by itself with status {status} (see above).")
    return 0
