"""Jobs in a store, made without a queue."""

from __future__ import annotations

from typing import Any

from core.jobs.records import Change, Event, Record, StoredFile
from core.jobs.store import Store


def add(store: Store, name: str = "a face", request: dict[str, Any] | None = None, **facts: Any) -> Record:
    """A new job, with its first event."""
    number = store.next_number()
    record = Record(**{"number": number, "id": f"a-face-{number:032x}", "client": "me", "name": name, "parameters": {},
                       "warnings": (), "created_at": float(number), **facts})
    store.add(record, request or {}, [Change(number, {}, [Event(1, "status", 0.0, {})])])
    return record


def finish(store: Store, record: Record, at: float | None = None, content: bytes = b"") -> None:
    """End a job, with one image."""
    store.write_files(record.id, {"0.png": content}, durable=True)
    columns = {"state": "succeeded", "finished_at": float(record.number) if at is None else at}
    store.save([Change(record.number, columns, files=[StoredFile("0.png", len(content))])], durable=True)
