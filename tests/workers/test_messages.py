"""Is what server and worker say to each other understood, and what is kept while Redis does not answer?"""

from __future__ import annotations

import numpy as np
import pytest

from core.workers import messages, publisher
from core.workers.arrays import from_json, to_json
from core.workers.broker import Broker
from core.workers.messages import News, WorkerState, catalogue_of
from core.workers.publisher import Publisher
from tests.support.redis_server import free_port


def test_news_is_read_as_it_was_written() -> None:
    about = ["image", {"index": 0, "seed": 2**53 - 1}]
    told = News("attempt", 3, messages.EMIT, about, {"0.png": b"\x89\0", "0.f32": b""})
    assert News.read(told.fields()) == told
    with pytest.raises(ValueError):
        News.read({**told.fields(), b"n": b"three"})


def test_a_workers_state_is_read_as_it_was_written() -> None:
    state = WorkerState("w", "c", "cpu", "OpenVINO", 16, {"celeba128": "ab"}, ["a"], 4, 2.5, 7, [[4, 0.1]], 0.02, None)
    assert WorkerState.read(state.to_json()) == state
    with pytest.raises(TypeError):
        WorkerState.read(b'{"name": "of another version"}')


def test_a_queue_is_named_after_all_weights_in_their_order() -> None:
    names = {catalogue_of(hashes) for hashes in (["a"], ["b"], ["a", "b"], ["b", "a"])}
    assert len(names) == 4 and all(len(name) == 16 for name in names)
    assert catalogue_of(["a", "b"]) == catalogue_of(["a", "b"])


@pytest.mark.parametrize("array", [np.zeros((2, 3), np.uint8), np.linspace(-1, 1, 8, dtype="<f4").reshape(2, 2, 2)])
def test_an_array_travels(array: np.ndarray) -> None:
    found = from_json(to_json(array[::-1]))
    assert found.dtype == array.dtype and np.array_equal(found, array[::-1])


def test_while_redis_is_away_previews_may_go_and_ends_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is bounded, and what counts is not dropped."""
    monkeypatch.setattr(publisher, "MOST_WAITING", 20)
    waiting = Publisher(Broker.parse(f"redis://127.0.0.1:{free_port()}"))
    for number in range(1, 100):
        waiting.put("session", News("attempt", number, messages.PROGRESS if number % 3 else messages.KEEP))
        if number % 10 == 0:
            waiting.put("session", News(f"attempt {number}", 1, messages.END))
    assert waiting.unsent_ends == {f"attempt {number}" for number in range(10, 100, 10)}
    assert len(waiting._waiting) <= 20
    assert not waiting.close(0.1), "it could not be sent, and says so"
