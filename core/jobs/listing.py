"""Which jobs does a list show, and where does the next page begin?

Pages count by the numbers of jobs, so those that come or go do not shift them. It does not know how a job is told to a
client (`core/web/serializers.py`).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence

from core.jobs.job import Job, Summary, facts
from core.jobs.life_cycle import LifeCycle
from core.jobs.store import Store

LAST_EVENTS = 16  # of a job, those of its results among them: they come last


def page_of(
    store: Store,
    jobs: LifeCycle,
    *,
    limit: int,
    cursor: str | None,
    states: Sequence[str] | None,
    text: str,
    favourites: bool,
) -> tuple[list[Summary], str | None]:
    """Up to `limit` jobs, newest first, and the cursor of the next page: see `JobQueue.list`.

    Raises ValueError for a cursor that no page gave.
    """
    below = None if cursor is None else _from_cursor(cursor)
    records = store.page(limit + 1, below=below, states=states, text=text, favourites=favourites)
    marks = store.marks([record.number for record in records[:limit]])
    names = store.lasting_names([record.number for record in records[:limit]])
    finals = {
        number: tuple(store.last_data(number, "image", LAST_EVENTS)) if kept else ()
        for number, kept in names.items()
    }
    page = []
    with jobs.changed:
        for record in records[:limit]:
            now = jobs.live.get(record.id, record)  # the store does not follow every step
            position = now.queue_position if isinstance(now, Job) else None
            page.append(Summary(**facts(now), queue_position=position, files=names[record.number],
                                finals=finals[record.number], marks=marks[record.number]))
    return page, _to_cursor(records[limit - 1].number) if len(records) > limit else None


def _to_cursor(number: int) -> str:
    return base64.urlsafe_b64encode(number.to_bytes(9, "big")).decode()


def _from_cursor(cursor: str) -> int:
    known = re.fullmatch(r"[A-Za-z0-9_-]{12}", cursor)
    number = int.from_bytes(base64.urlsafe_b64decode(cursor), "big") if known else 2**63
    if number >= 2**63:  # more than the store can count
        raise ValueError("the cursor must be one that the page before gave")
    return number
