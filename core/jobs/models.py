"""Which of several models is loaded, and when does one make room for another?

A server may be given several models; each job names one. `Models` loads a model when its first job comes, keeps those
that fit into memory together, and otherwise unloads the one that nobody uses. How much a model takes is measured when
it is loaded; before that, twice the size of its files is assumed. A model that cannot be loaded leaves the others
as they are. Everything but the descriptions is called by the engine's thread alone.

It does not know what a model is made of, nor jobs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from core.engine import Engine, EngineInfo, JobError

log = logging.getLogger(__name__)
SPARE = 2  # times what the weights take must be free: a step needs room, too


@dataclass(frozen=True)
class ModelSource:
    """A model that may be asked for, under any `name` of its own.

    `load` makes its engine, `describe` says without that what the engine would say of itself, or None where it has to
    be loaded to know; both are called in the engine's thread. `num_bytes` is the size of its weights on disk.
    """

    name: str
    load: Callable[[], Engine]
    describe: Callable[[], EngineInfo | None] = lambda: None
    num_bytes: Callable[[], int] = lambda: 0


class Models:
    """The models of a server, of which the first is the one that requests mean when they name none.

    `free_bytes` says how much memory is left for models (None: unknown, so that one at a time is loaded), `release`
    returns what an unloaded one had to the system.
    """

    def __init__(
        self,
        sources: Sequence[ModelSource],
        free_bytes: Callable[[], int | None] = lambda: None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self._sources = {source.name: source for source in sources}
        self._free_bytes, self._release = free_bytes, release
        self._lock = threading.Lock()
        self._loaded: dict[str, Engine] = {}  # the one that was not asked for longest comes first
        self._infos: dict[str, EngineInfo] = {}  # of those that are not loaded
        self._failures: dict[str, str] = {}
        self._measured: dict[str, int] = {}  # bytes that each took when it was loaded
        self._loading: str | None = None

    # ---- what any thread may ask

    @property
    def first(self) -> str:
        """The model that is meant where none is named."""
        return next(iter(self._sources))

    @property
    def names(self) -> tuple[str, ...]:
        """What the models call themselves, in their order."""
        return tuple(self.shown(name) for name in self._sources)

    def shown(self, name: str) -> str:
        """What a model calls itself."""
        info = self.info(name)
        return name if info is None else info.name

    def find(self, shown: str | None) -> str | None:
        """A model by what it calls itself, whatever the case; the first for None; None where there is no such model."""
        if shown is None:
            return self.first
        return next((name for name in self._sources if self.shown(name).lower() == shown.lower()), None)

    @property
    def loading(self) -> str | None:
        """What the model that is being loaded now calls itself."""
        loading = self._loading
        return None if loading is None else self.shown(loading)

    def is_loaded(self, name: str) -> bool:
        with self._lock:
            return name in self._loaded

    def failure(self, name: str) -> str | None:
        """Why a model could not be loaded when that was last tried."""
        with self._lock:
            return self._failures.get(name)

    def info(self, name: str) -> EngineInfo | None:
        """What a model says of itself; None before that is known."""
        with self._lock:
            engine = self._loaded.get(name)
            return engine.info if engine is not None else self._infos.get(name)

    @property
    def infos(self) -> list[EngineInfo]:
        """What all models say of themselves, as far as it is known."""
        return [info for name in self._sources if (info := self.info(name)) is not None]

    @property
    def failed(self) -> dict[str, str]:
        """Models of which nothing is known but why they could not be loaded."""
        with self._lock:
            return {name: why for name, why in self._failures.items() if name not in self._infos}

    # ---- the engine's thread

    def describe(self) -> None:
        """Find out what every model says of itself; what cannot be found out is a failure of that model alone."""
        for source in self._sources.values():
            if self.info(source.name) is not None:
                continue
            try:
                info = source.describe() or self.engine(source.name).info
            except Exception as error:
                if not isinstance(error, JobError):  # that one is in the log already
                    log.error("model %s cannot be used: %s", source.name, error)
                with self._lock:
                    self._failures.setdefault(source.name, str(error))
            else:
                with self._lock:
                    self._infos[source.name] = info

    def has_room_for(self, name: str, in_use: Collection[str]) -> bool:
        """Whether a model is loaded, or could be without unloading one that is in use."""
        return name in self._loaded or not set(in_use) - {name} or self._fits(name)

    def engine(self, name: str, in_use: Collection[str] = ()) -> Engine:
        """The engine of a model, which is loaded now if it is not; others make room for it where they have to.

        Raises JobError: `unknown_model`, `model_busy` when one in use would have to go, `model_failed`.
        """
        source = self._sources.get(name)
        if source is None:
            raise JobError("unknown_model", f"This server has no model {name!r}.", "See models at /options.")
        if name not in self._loaded:
            if not self.has_room_for(name, in_use):
                busy = " and ".join(self.shown(other) for other in sorted(set(in_use) - {name}))
                raise JobError("model_busy", f"{self.shown(name)} does not fit into memory beside {busy}, in use now.",
                               "Try again when its jobs are finished.")
            self._load(source, in_use)
        with self._lock:
            engine = self._loaded.pop(name)
            self._loaded[name] = engine
        return engine

    def _load(self, source: ModelSource, in_use: Collection[str]) -> None:
        self._loading = source.name
        try:
            for other in [other for other in self._loaded if other not in in_use]:
                if self._fits(source.name):
                    break
                self._unload(other)
            before = self._free_bytes()
            engine = source.load()
            after = self._free_bytes()
        except Exception as error:
            log.exception("model %s could not be loaded", source.name)
            with self._lock:
                self._failures[source.name] = str(error)
            raise JobError("model_failed", f"The model {self.shown(source.name)} could not be loaded: {error}",
                           "Choose another model, or mend its files.") from error
        finally:
            self._loading = None
        if before is not None and after is not None and before > after:
            self._measured[source.name] = before - after
        with self._lock:
            self._loaded[source.name] = engine
            self._failures.pop(source.name, None)
            self._infos.setdefault(source.name, engine.info)
        log.info("model %s is loaded on %s by %s", source.name, engine.info.device, engine.info.engine)

    def _unload(self, name: str) -> None:
        with self._lock:
            self._loaded.pop(name, None)  # and with it the last reference
        self._release()
        log.info("model %s made room", name)

    def _fits(self, name: str) -> bool:
        """Whether there is memory for a model beside those that are loaded."""
        if not self._loaded:
            return True
        free = self._free_bytes()
        return free is not None and free >= SPARE * self._measured.get(name, 2 * self._sources[name].num_bytes())

    def on_idle(self) -> bool:
        """Let a loaded model use that nobody waits; False: nothing is left to do."""
        return any(engine.on_idle() for engine in tuple(self._loaded.values()))
