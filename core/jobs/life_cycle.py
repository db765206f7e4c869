"""When does the state of a job change?

`queued -> running -> succeeded | failed | cancelled` and nothing else; only a stop of the server puts a running one
back into the queue. Every one of these changes is made here, committed before it is shown (`core/jobs/job.py`), so
`kill -9` takes nothing back: `restore` queues every unfinished job of the store again.

It does not know who asks for a change, nor what a job computes (`core/jobs/queue.py`), nor whose turn it is
(`core/jobs/admission.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from core.engine import JobError
from core.jobs.admission import Admission
from core.jobs.clock import Ended
from core.jobs.job import EventLog, Job, JobUpdate, State, disk_refused, facts
from core.jobs.records import Change, Record
from core.jobs.storage_errors import StoreError
from core.jobs.store import Store

log = logging.getLogger(__name__)


class LifeCycle:
    """The unfinished jobs, in the memory as in the store. `clock` gives the times that people see, `elapsed` measures.

    `changed` is the one lock of all jobs: hold it to look at several members at once.
    """

    def __init__(
        self, store: Store, admission: Admission, clock: Callable[[], float], elapsed: Callable[[], float]
    ) -> None:
        self._store, self._admission, self._clock, self._elapsed = store, admission, clock, elapsed
        self._event_log = EventLog(store, clock)
        self.changed = self._event_log.changed
        self.live: dict[str, Job] = {}  # waiting and running; the others are in the store alone
        self.waiting: Sequence[Job] = ()  # in the order of submission; replaced as a whole, never changed
        self.running: dict[str, Job] = {}
        self.ended = Ended(elapsed)
        self._began: dict[str, float] = {}  # when the running ones did, by `elapsed`
        self._last_duration_s = 10.0

    @property
    def retry_after_s(self) -> int:
        """Seconds until a place in the queue may be free, by how long the last job took."""
        return max(1, round(self._last_duration_s / max(1, len(self.running))))

    # ---- into the queue

    def enter(self, record: Record, request: Mapping[str, Any], save: Callable[[Sequence[Change]], None]) -> Job:
        """A new job waits; `save` writes it down, together with what its coming changes."""
        with self.changed:
            job = Job(**facts(record), request=dict(request), event_log=self._event_log)
            waiting = [*self.waiting, job]
            self._event_log.write(self._moved(waiting), save=save)
            self.waiting, self.live[job.id] = waiting, job
            return job

    def restore(self) -> None:
        """Queue every unfinished job of the store again, beyond any bound; what its client gave up is over."""
        again = []
        for record in self._store.unfinished():
            job = self.read_back(record)
            assert job is not None, "nobody else uses the store yet"
            if job.delete_requested:
                self._store.delete(job)
            elif job.cancel_requested:
                self._event_log.write([self._ending(job, _cancelled("while it ran"))], durable=True)
            else:
                again.append(job)
                self.live[job.id] = job
        if again:
            self._queue_again(again)

    def read_back(self, record: Record) -> Job | None:
        """The job as it was; None when it has been deleted."""
        events, files = self._store.events(record.number), self._store.files(record.number)
        request = self._store.request(record.number)
        if request is None:  # read last: what a deleted job had may be half gone
            return None
        return Job(**facts(record), request=request, event_log=self._event_log, events=events,
                   stored={file.name: file for file in files}, marks=self._store.marks([record.number])[record.number])

    # ---- what a client asked for

    def cancel(self, job: Job) -> None:
        """Cancel a waiting job, note it of a running one; the others stay as they are."""
        with self.changed:
            if job.state == "queued":
                others = [other for other in self.waiting if other is not job]
                ending = self._ending(job, _cancelled("before it started"))
                self._event_log.write([ending, *self._moved(others)], durable=True)
                self.waiting = others
                del self.live[job.id]
            elif job.state == "running" and not job.cancel_requested:
                self._event_log.write([JobUpdate(job, {"cancel_requested": True})], durable=True)

    def request_deletion(self, job: Job) -> None:
        """Note that a running job is to be removed when it ends."""
        self._event_log.write([JobUpdate(job, {"delete_requested": True})], durable=True)

    # ---- running, and the end

    def begin(self, job: Job) -> None:
        """A waiting job runs from now on."""
        with self.changed:
            columns = {"state": "running", "started_at": self._clock()}
            status = ("status", {"status": "running", "error": None})
            self._event_log.write([JobUpdate(job, columns, {"queue_position": None}, [status])])
            self.waiting = [other for other in self.waiting if other is not job]
            self.running[job.id], self._began[job.id] = job, self._elapsed()
            self._admission.take_turn(job.client)

    def move_up(self) -> None:
        """Tell every waiting job whose place is another now."""
        with self.changed:
            self._event_log.write(self._moved(self.waiting))

    def end(self, job: Job, error: JobError | None) -> None:
        """Finish a running job; an accepted cancel is kept, even at the last step."""
        if job.cancel_requested:
            error = _cancelled("while it ran")
        with self.changed:
            try:
                if job.delete_requested:  # gone from the store; those who hold the job still see its end
                    self._event_log.write([self._ending(job, error)], save=lambda _: self._store.delete(job))
                else:
                    self._event_log.write([self._ending(job, error)], durable=True)
                del self.live[job.id]
            except StoreError as refused:  # stays in the memory: in the store it is unfinished and will run again
                log.error("job %s ended, which cannot be written down: %s", job.id, refused)
                lost = disk_refused(refused)
                self._event_log.show([self._ending(job, error or lost)])
            del self.running[job.id]
            self._last_duration_s = self._elapsed() - self._began.pop(job.id)
            self.ended.add(job.number)

    def begin_again(self, job: Job) -> None:
        """A running job waits again, in its old place; one of which the disk cannot say so ends."""
        with self.changed:
            try:
                self._queue_again([job])
            except StoreError as refused:
                self.end(job, disk_refused(refused))
                return
            del self.running[job.id], self._began[job.id]

    def put_back(self) -> None:
        """What runs waits again, from its beginning."""
        with self.changed:
            try:
                self._queue_again(tuple(self.running.values()))
            except StoreError as refused:
                log.error("running jobs cannot be put back (the next start will do it): %s", refused)
            self.running.clear()
            self._began.clear()

    # ---- within

    def _ending(self, job: Job, error: JobError | None) -> JobUpdate:
        state: State = "succeeded" if error is None else "cancelled" if error.code == "cancelled" else "failed"
        told = None if error is None else error.to_dict()
        status = {"status": state, "error": told}
        done = {**status, "t": job.done, "total_t": job.total}
        columns = {"state": state, "finished_at": self._clock(), "error": told, "done": job.done, "total": job.total}
        if state == "cancelled":
            columns["cancel_requested"] = True
        return JobUpdate(job, columns, {"queue_position": None}, [("status", status), ("done", done)])

    def _moved(self, waiting: Sequence[Job]) -> Sequence[JobUpdate]:
        order = enumerate(self._admission.order(waiting), start=1)
        return [_placed(job, position) for position, job in order if job.queue_position != position]

    def _queue_again(self, jobs: Sequence[Job]) -> None:
        """Put jobs back in their old places, without the previews of what will be done again."""
        waiting = sorted((*self.waiting, *jobs), key=lambda job: job.number)
        updates = []
        for position, job in enumerate(self._admission.order(waiting), start=1):
            if job in jobs:
                status = {"status": "queued", "queue_position": position, "error": None, "restarted": True}
                columns = {"state": "queued", "started_at": None}
                shown = {"done": 0, "total": 0, "queue_position": position}
                previews = [file.name for file in job.stored.values() if file.moment is not None]
                updates.append(JobUpdate(job, columns, shown, [("status", status)], dropped=previews))
            elif job.queue_position != position:
                updates.append(_placed(job, position))
        self._event_log.write(updates, durable=True)
        self.waiting = waiting
        for item in updates:
            self._store.remove_files(item.job.id, item.dropped)


def _placed(job: Job, position: int) -> JobUpdate:
    status = {"status": "queued", "queue_position": position, "error": None}
    return JobUpdate(job, shown={"queue_position": position}, events=[("status", status)])


def _cancelled(when: str) -> JobError:
    return JobError("cancelled", f"The job was cancelled {when}.")
