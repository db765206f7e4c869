"""How does a machine generate for a server elsewhere?

    ./start.py worker --broker redis://host:6379

is this program in an environment of its own; `python worker.py --broker redis://host:6379` is it alone. It needs the
server's model folder and nothing else of it: jobs come by Celery, images go back through Redis. Any number of workers
may run, on one machine or many, and each may end in any way at any moment: `docs/scaling.md`.

What a worker does is in `core/workers/serve.py`; this file joins it with the models.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from core.process import end_with_parent
from core.quiet import keep_quiet
from model_loading import add_model_flags, at_least_one, models_of


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ends the process with a sentence when it cannot be followed."""
    parser = argparse.ArgumentParser(prog="worker.py", description="Generate for a server on another machine.")
    add = parser.add_argument
    add("--broker", default=os.environ.get("FACES_BROKER"), metavar="URL",
        help="where the server leaves its jobs: redis://, rediss:// or sentinel:// (or set FACES_BROKER)")
    add("--sentinel-master", default="mymaster", help="what Sentinel calls the Redis (%(default)s)")
    add_model_flags(parser)
    add("--job-seconds", type=at_least_one, default=3600, help="longest time for one job (%(default)s)")
    add("--drain-seconds", type=float, default=10.0, help="time for running jobs after SIGTERM (%(default)s)")
    add("--check", action="store_true", help="say whether a worker of this machine is at work, and end")
    add("--log-format", choices=("text", "json"), default="text", help="how the log is written (%(default)s)")
    arguments = parser.parse_args(argv)
    if not arguments.broker:
        parser.error("--broker URL is needed, such as --broker redis://host:6379")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Generate until Ctrl-C or SIGTERM; returns the process's exit status."""
    keep_quiet()
    end_with_parent()
    arguments = parse_arguments(argv)
    try:
        from core.workers.broker import Broker
        from core.workers.serve import Worker, WorkerOptions, is_at_work
    except ImportError as error:
        print(f"worker.py needs packages that are not installed ({error}): "
              "python -m pip install -r requirements-workers.txt", file=sys.stderr)
        return 1
    from core.web.monitoring import configure_logging

    configure_logging(arguments.log_format)
    try:
        broker = Broker.parse(arguments.broker, arguments.sentinel_master)
        if arguments.check:
            return 0 if is_at_work(broker) else 1
        options = WorkerOptions(arguments.max_batch, arguments.job_seconds, arguments.drain_seconds)
        worker = Worker(broker, models_of(arguments), options)
    except Exception as error:  # a model folder that is damaged, an address that is none
        print(f"worker.py: {error}", file=sys.stderr)
        return 1
    worker.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
