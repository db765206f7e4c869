"""What does this machine offer: memory, disk, a free port, a browser?

Each check answers with None, or with one sentence that says what is wrong and how to mend it. It does not know what
will be served. Standard library only and no syntax newer than Python 3.7, as in `launcher/environment.py`.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import re
import shutil
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

from core import disk
from core.addresses import ANYWHERE, address_of, is_local, lan_address, listener

GIB = 1024**3
MEMORY_NEEDED = 1.5 * GIB  # measured: 0.9 GiB after all imports; the rest is the model and eight images
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")


# ---- memory ----------------------------------------------------------------------------------------------------------


def free_memory() -> int | None:
    """Bytes that a new process may use, as the system or the container says; None where nobody says."""
    if sys.platform == "win32":
        return windows_free_memory()
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():  # macOS frees caches and compresses when asked: its total is the honest number
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError):
            return None
    available = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"), flags=re.MULTILINE)
    allowed = container_memory(Path("/sys/fs/cgroup"))
    known = [int(available.group(1)) * 1024] if available else []
    return min(known + ([allowed] if allowed is not None else []), default=None)


def container_memory(group: Path) -> int | None:
    """What a container's limit (cgroup v2) leaves over; None without a limit."""
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))  # the word "max" means no limit
        used = int((group / "memory.current").read_text(encoding="ascii"))
        statistics = (group / "memory.stat").read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    cache = re.search(r"^inactive_file (\d+)", statistics, flags=re.MULTILINE)  # given back when somebody needs it
    return max(0, limit - used + (int(cache.group(1)) if cache else 0))


def windows_free_memory() -> int | None:
    """Available physical memory by GlobalMemoryStatusEx; MEMORYSTATUSEX: two 32-bit fields, then seven of 64 bits."""
    import ctypes

    status = (ctypes.c_uint64 * 8)(64)  # the first field is the structure's own length, 8 x 8 bytes
    windows = getattr(ctypes, "windll")  # noqa: B009 - the name exists on Windows alone, mypy runs elsewhere too
    return int(status[2]) if windows.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else None


def memory_problem(free: int | None) -> str | None:
    """The sentence for a machine that would swap, or kill the server, while the model loads."""
    if free is None or free >= MEMORY_NEEDED:
        return None
    short = f"Only {free / GIB:.1f} GiB of memory are free and {MEMORY_NEEDED / GIB:.1f} GiB are needed"
    return f"{short}: close other programs and start again."


# ---- disk ------------------------------------------------------------------------------------------------------------


def nearest_folder(path: Path) -> Path:
    """`path`, or the closest of its parents that exists."""
    return next((folder for folder in (path, *path.parents) if os.path.exists(str(folder))), path)


def folder_problem(path: Path, needed: int, flag: str) -> str | None:
    """The sentence for a folder, made yet or not, that cannot take `needed` bytes; `flag` chooses another one."""
    there = nearest_folder(path)
    if os.path.isfile(str(there)):
        return f"{there} is no folder, so nothing can be kept in {path}: choose another one with {flag}."
    refused = disk.probe(there)
    if refused:
        return disk.sentence(*refused, path, flag)
    free = shutil.disk_usage(str(there)).free
    if free < needed:
        short = f"Only {free / 1e6:.0f} MB are free on the disk of {path} and {needed / 1e6:.0f} MB are needed"
        return f"{short}: free some space, or choose a folder on another disk with {flag}."
    return None


def folder_size(path: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    sizes = 0
    for folder, _, names in os.walk(str(path)):
        for name in names:
            with contextlib.suppress(OSError):  # gone meanwhile
                sizes += os.path.getsize(os.path.join(folder, name))
    return sizes


def outside_address(host: str, port: int) -> str | None:
    """The URL that reaches, from another machine, a server bound to `host` that is running; None: there is none."""
    if host not in ANYWHERE:
        return None if is_local(host) else address_of(host, port)
    lan = lan_address()
    if host == "::" and not (lan and answers(lan, port)):  # it takes IPv4 only where the system can do that
        lan = lan_address(socket.AF_INET6)
    return address_of(lan, port) if lan else None


def ask(host: str, port: int, path: str, key: str = "") -> tuple[int, bytes] | None:
    """Status and body of GET `path` there, whatever the status; None when nobody answers HTTP."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach our loopback
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        request = urllib.request.Request(address_of(host, port) + path, headers=headers)
        with direct.open(request, timeout=2) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except (OSError, ValueError, http.client.HTTPException):  # URLError is an OSError; ValueError: not HTTP at all
        return None


def answers(host: str, port: int) -> bool:
    """Whether GET /health answers 200 there."""
    answer = ask(host, port, "health")
    return answer is not None and answer[0] == 200


def listen_once(host: str, port: int) -> None:
    """Take the address and let it go again; raises OSError as the server would."""
    listener(host, port).close()


def free_port(host: str, start: int) -> int | None:
    """The first port from `start` on that can be taken now, None after fifty tries."""
    for port in range(start, min(start + 50, 65536)):
        with contextlib.suppress(OSError):
            listen_once(host, port)
            return port
    return None


def port_problem(host: str, port: int) -> str | None:
    """The sentence for an address that the server could not take; None for a free one."""
    try:
        listen_once(host, port)
        return None
    except OSError as error:
        other = f"start with --port {free_port(host, max(port + 1, 1025)) or 'and another number'}"
        if error.errno in (errno.EADDRINUSE, 10048):  # 10048: the same on Windows
            if answers(host, port):
                there = address_of(host, port)
                return f"Port {port} is already taken, and a server answers: open {there}, or {other}."
            return f"Port {port} is already taken by another program: end that one, or {other}."
        if error.errno in (errno.EACCES, 10013):
            return f"Port {port} is not allowed for this user: {other}."
        reason = str(error.strerror or error).partition(" (while")[0]  # then comes what the sentence says already
        usual = "0.0.0.0" if host == "::" else "127.0.0.1"
        return f"--host {host} is no address of this machine ({reason}): start with --host {usual}."


# ---- browser ---------------------------------------------------------------------------------------------------------


def can_show_pages() -> bool:
    """Whether a graphical browser would open for this person (where none is, a text browser may take the terminal)."""
    if os.environ.get("CI") or os.environ.get("SSH_CONNECTION"):
        return False
    graphical = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return sys.platform in ("win32", "darwin") or bool(graphical)


def find_browser() -> str | None:
    """A browser of the Chromium family for tests of the page: on PATH, in the usual folders, in Playwright's store."""
    on_path = (shutil.which(name) for name in BROWSERS)
    store = "ms-playwright/chromium-*/"
    places = (
        (Path("/Applications"), "Google Chrome.app/Contents/MacOS/Google Chrome"),
        (Path.home() / ".cache", store + "chrome-linux*/chrome"),
        (Path.home() / "Library/Caches", store + "chrome-mac*/*.app/Contents/MacOS/*"),
        (Path(os.environ.get("LOCALAPPDATA", "/nowhere")), store + "chrome-win*/chrome.exe"),
        (Path(os.environ.get("PROGRAMFILES", "/nowhere")), "Google/Chrome/Application/chrome.exe"),
    )
    elsewhere = (str(path) for folder, pattern in places for path in sorted(folder.glob(pattern), reverse=True))
    return next((path for path in (*on_path, *elsewhere) if path), None)
