"""How does news of a worker's jobs reach its server, also when Redis is away for a while?

One thread writes to the streams, in the order in which things happened. While Redis does not answer, news waits here;
of progress that nobody has seen only the newest is kept, and above `MOST_WAITING` entries previews are dropped, never
an image or an end. It does not know what the news means.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

import redis

from core.workers import messages
from core.workers.broker import Broker
from core.workers.messages import News

log = logging.getLogger(__name__)
AT_ONCE = 64  # entries of one round trip
MOST_WAITING = 1_000
RETRY_S = 0.2


class Publisher:
    """Writes news to the streams of servers."""

    def __init__(self, broker: Broker) -> None:
        self._redis = broker.connect()
        self._waiting: deque[tuple[str, News]] = deque()  # session, news
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="news", daemon=True)
        self._thread.start()

    def put(self, session: str, news: News) -> None:
        """Send this as soon as it can be."""
        with self._changed:
            self._waiting.append((session, news))
            if len(self._waiting) > MOST_WAITING:
                droppable = [one for one in self._waiting if one[1].kind in (messages.PROGRESS, messages.KEEP)]
                for one in droppable[: len(droppable) // 2]:
                    self._waiting.remove(one)
            self._changed.notify_all()

    @property
    def unsent_ends(self) -> set[str]:
        """Attempts that are over, which their servers do not know yet."""
        with self._changed:
            return {news.attempt for _, news in self._waiting if news.kind in (messages.END, messages.RETURNED)}

    def close(self, timeout_s: float) -> bool:
        """Send what waits, for up to `timeout_s`; whether all of it was sent."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, max(0.0, deadline - time.monotonic()))
            self._closed = True
            self._changed.notify_all()
            return not self._waiting

    def _run(self) -> None:
        told = False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                batch = list(self._waiting)[:AT_ONCE]
            try:
                self._send(batch)
                told = False
            except redis.RedisError as error:
                if not told:
                    log.warning("news waits here until Redis answers: %s", error)
                told = True
                time.sleep(RETRY_S)
                continue
            with self._changed:
                for one in batch:  # some may have been dropped meanwhile
                    if self._waiting and self._waiting[0] is one:
                        self._waiting.popleft()
                    elif one in self._waiting:
                        self._waiting.remove(one)
                self._changed.notify_all()

    def _send(self, batch: list[tuple[str, News]]) -> None:
        """Write entries; of progress of one attempt in a row the last. Raises RedisError, after some were written
        perhaps: their numbers tell the server."""
        pipe = self._redis.pipeline(transaction=False)
        for i, (session, news) in enumerate(batch):
            if len(batch) == AT_ONCE and news.kind == messages.PROGRESS:  # much has been waiting
                later = next((other for _, other in batch[i + 1:] if other.attempt == news.attempt), None)
                if later is not None and later.kind == messages.PROGRESS:
                    continue
            key = messages.events_key(session)
            pipe.xadd(key, news.fields(), maxlen=messages.MOST_NEWS, approximate=True)  # type: ignore[arg-type]
            if news.kind == messages.END:
                pipe.expire(key, messages.NEWS_S)
        pipe.execute()
