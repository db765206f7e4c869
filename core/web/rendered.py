"""Which answers need not be made again?

A finished job, its images, the options and the files of the page are asked for far more often than they change. Each is
rendered once and kept as bytes, with the ETag that names it, until something that it was made from changes: the caller
puts that into the key. The least recently asked for make room for newer ones, so memory is bounded. It does not know
routes, nor what changes what.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from flask import Response, request

MAX_BYTES = 32 << 20  # some 900 images of 128 pixels
LARGEST_SHARE = 0.125  # of all that is kept: a larger answer is made anew each time
OVERHEAD_BYTES = 1 << 10  # of an entry beside its content


@dataclass(frozen=True)
class Rendered:
    """An answer that may be given to anybody who asks for the same: its content, type, ETag and other headers."""

    body: bytes
    kind: str
    tag: str
    headers: Mapping[str, str] = field(default_factory=lambda: {"Cache-Control": "no-cache"})

    def response(self) -> Response:
        """The answer to the request at hand: 304 without content for who has it already."""
        known = request.if_none_match.contains_weak(self.tag)
        made = Response(b"" if known else self.body, 304 if known else 200, self.headers, content_type=self.kind)
        made.headers["ETag"] = f'"{self.tag}"'
        return made


def digest(body: bytes) -> str:
    """The ETag of a content that nothing else names."""
    return hashlib.sha256(body).hexdigest()[:32]


class RenderedAnswers:
    """The latest answers, `max_bytes` of them at most; for any number of threads."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._kept: OrderedDict[Hashable, Rendered] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """What is kept now."""
        return self._bytes

    def find(self, key: Hashable) -> Rendered | None:
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def keep(self, key: Hashable, answer: Rendered) -> Rendered:
        """Keep an answer, unless it is so large that it would push out too many others; returns it."""
        cost = len(answer.body) + OVERHEAD_BYTES
        if cost > LARGEST_SHARE * self._max_bytes:
            return answer
        with self._lock:
            before = self._kept.pop(key, None)
            self._bytes += cost - (0 if before is None else len(before.body) + OVERHEAD_BYTES)
            self._kept[key] = answer
            while self._bytes > self._max_bytes:
                _, gone = self._kept.popitem(last=False)
                self._bytes -= len(gone.body) + OVERHEAD_BYTES
        return answer

    def get(self, key: Hashable, make: Callable[[], Rendered]) -> Rendered:
        """The answer of this key; made, outside the lock, where it is not kept."""
        return self.find(key) or self.keep(key, make())
