"""Writes down what a Python process asks of the network and of the disk; `tests/auditing.py` puts it before everything.

Python imports a module of this name before any other of the program. https://docs.python.org/3/library/audit_events.html
"""

import os
import sys

REPORT = os.environ.get("AUDIT_REPORT")
HOSTS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.connect", "socket.sendto")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")


def watch(report: int) -> None:
    """From now on each event becomes a line of the file `report`: its name, then the host or the path."""

    def tell(event: str, what: object) -> None:
        os.write(report, f"{event}\t{what!r}\n".encode())

    def hook(event: str, values: tuple) -> None:
        if event in HOSTS:
            tell(event, values[1] if event in ("socket.connect", "socket.sendto") else values[0])
        elif event in CHANGES:
            tell(event, os.path.abspath(os.fsdecode(values[1 if event == "os.rename" else 0])))
        elif event == "open" and isinstance(values[0], (str, bytes, os.PathLike)):
            if (values[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                tell(event, os.path.abspath(os.fsdecode(values[0])))
        elif event == "sqlite3.connect":
            tell(event, os.path.abspath(os.fsdecode(values[0])))

    sys.addaudithook(hook)


if REPORT:
    watch(os.open(REPORT, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
