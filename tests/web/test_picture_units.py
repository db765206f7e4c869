"""Is an image a unit? Deleted and restored alone, a favourite for every browser, kept when its job is deleted."""

from __future__ import annotations

import sqlite3
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from playwright.sync_api import Browser, Page, expect

from core.jobs.image_decisions import RESTORABLE_S
from core.jobs.records import Marks
from core.jobs.retention import Retention
from core.jobs.store import Store
from tests.support.asking import make_app, post, problem, run, service_of, stream_of, work
from tests.support.browsing import Site, chromium, visit, watched_page
from tests.support.drawing import DrawingEngine


@pytest.fixture
def app() -> Flask:
    return make_app(DrawingEngine())


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


def indices(client: FlaskClient, job_id: str) -> list[int]:
    return [entry["index"] for entry in client.get(f"/jobs/{job_id}/").get_json()["response"]]


def listed(client: FlaskClient, job_id: str, query: str = "") -> list[dict[str, Any]] | None:
    """The images of a job in the list; None when it is not there."""
    jobs = {job["job_id"]: job["images"] for job in client.get(f"/jobs/{query}").get_json()["jobs"]}
    return jobs.get(job_id)


def test_one_picture_is_deleted_and_comes_back(app: Flask, client: FlaskClient) -> None:
    """Delete used to take the whole job."""
    job_id = run(app, n_images=3, seed=5)
    tag = client.get(f"/jobs/{job_id}/").headers["ETag"]
    before = client.get(f"/jobs/{job_id}/images/1.png").data
    assert client.delete(f"/jobs/{job_id}/images/1").status_code == 204
    assert indices(client, job_id) == [0, 2]
    assert [one["index"] for one in listed(client, job_id) or []] == [0, 2]
    for path in ("images/1.png", "images/1.webp", "images/1.png?t=2"):
        problem(client.get(f"/jobs/{job_id}/{path}"), 410)
    problem(client.get(f"/jobs/{job_id}/latents/1"), 404)
    with zipfile.ZipFile(BytesIO(client.get(f"/jobs/{job_id}/archive.zip").data)) as archive:
        assert archive.namelist() == ["face-5.png", "face-7.png", "job.json"]
    assert {one["index"] for one in client.get(f"/jobs/{job_id}/steps").get_json()["steps"]} == {0, 2}
    events = stream_of(client.get(f"/jobs/{job_id}/events"))
    assert {data["index"] for _, kind, data in events if kind in ("preview", "image")} == {0, 2}
    assert client.get(f"/jobs/{job_id}/", headers={"If-None-Match": tag}).status_code == 200
    problem(client.delete(f"/jobs/{job_id}/images/1"), 410)
    assert client.post(f"/jobs/{job_id}/images/1/restore").status_code == 204
    assert indices(client, job_id) == [0, 1, 2]
    assert client.get(f"/jobs/{job_id}/images/1.png").data == before
    assert client.post(f"/jobs/{job_id}/images/1/restore").status_code == 204  # it is there


def test_what_is_made_of_all_pictures_is_made_anew(app: Flask, client: FlaskClient) -> None:
    job_id = run(app, n_images=3)
    for name in ("archive.zip", "collage.png", "animation.webp"):
        first = client.get(f"/jobs/{job_id}/{name}")
        client.delete(f"/jobs/{job_id}/images/0")
        second = client.get(f"/jobs/{job_id}/{name}", headers={"If-None-Match": first.headers["ETag"]})
        assert second.status_code == 200 and second.data != first.data
        assert "immutable" not in second.headers["Cache-Control"]  # it may come back
        client.post(f"/jobs/{job_id}/images/0/restore")


def test_favourites_are_seen_by_everybody_and_survive_a_restart(tmp_path: Path) -> None:
    app = make_app(DrawingEngine(), data_dir=tmp_path)
    client = app.test_client()
    job_id, other = run(app, n_images=2), run(app, n_images=1)
    path = f"/images/{job_id}/1/favourite"
    assert [client.put(path).status_code, client.put(path).status_code] == [204, 204]
    service_of(app).close()
    app = make_app(DrawingEngine(), data_dir=tmp_path)
    client = app.test_client()
    assert [one.get("favourite") for one in listed(client, job_id) or []] == [None, True]
    assert [one.get("favourite") for one in client.get(f"/jobs/{job_id}/").get_json()["response"]] == [None, True]
    assert listed(client, job_id, "?favourites=only") is not None
    assert listed(client, other, "?favourites=only") is None
    tag = client.get(f"/jobs/{job_id}/").headers["ETag"]
    assert client.delete(path).status_code == 204
    assert client.get(f"/jobs/{job_id}/", headers={"If-None-Match": tag}).status_code == 200
    assert listed(client, job_id, "?favourites=only") is None
    assert client.delete(path).status_code == 204
    service_of(app).close()


def test_a_job_with_favourites_is_not_deleted_unasked(app: Flask, client: FlaskClient) -> None:
    job_id = run(app, n_images=4)
    for index in (0, 2):
        client.put(f"/images/{job_id}/{index}/favourite")
    assert "2 favourites" in problem(client.delete(f"/jobs/{job_id}/"), 409)["detail"]
    assert indices(client, job_id) == [0, 1, 2, 3]
    assert client.delete(f"/jobs/{job_id}/?favourites=keep").status_code == 204
    assert indices(client, job_id) == [0, 2]
    assert client.post(f"/jobs/{job_id}/images/3/restore").status_code == 204
    assert client.delete(f"/jobs/{job_id}/?favourites=delete").status_code == 204
    problem(client.get(f"/jobs/{job_id}/"), 410)
    plain = run(app, n_images=2)
    assert client.delete(f"/jobs/{plain}/?favourites=keep").status_code == 204
    problem(client.get(f"/jobs/{plain}/"), 410)
    lost = run(app, n_images=1)  # a favourite that was deleted itself holds nothing back
    client.put(f"/images/{lost}/0/favourite")
    client.delete(f"/jobs/{lost}/images/0")
    assert client.delete(f"/jobs/{lost}/").status_code == 204


@pytest.mark.parametrize(("method", "path"), [
    ("put", "/images/{}/{}/favourite"), ("delete", "/images/{}/{}/favourite"), ("delete", "/jobs/{}/images/{}"),
    ("post", "/jobs/{}/images/{}/restore"),
])
def test_pictures_that_are_not_there(app: Flask, client: FlaskClient, method: str, path: str) -> None:
    ask = getattr(client, method)
    job_id = run(app, n_images=2)
    problem(ask(path.format(job_id, 2)), 404)
    problem(ask(path.format("never-existed-" + 32 * "0", 0)), 404)
    client.delete(f"/jobs/{job_id}/")
    problem(ask(path.format(job_id, 0)), 410)
    waiting = post(client, n_images=2)["job_id"]
    problem(ask(path.format(waiting, 0)), 409)
    work(app)


def test_deleted_files_go_after_an_hour_and_with_the_last_picture_the_job(
    app: Flask, client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, now = service_of(app).queue, [1e9]
    for clock in ("_clock", "_elapsed"):  # what is old goes by the first, how often it is looked for by the second
        monkeypatch.setattr(queue, clock, lambda: now[0])
    monkeypatch.setattr(queue.images, "_clock", lambda: now[0])
    job_id = run(app, n_images=2, n_inf_steps=4, stream_freq=2)
    folder = service_of(app)._store.folder / "jobs" / job_id[-32:]
    assert {path.name for path in folder.glob("0*")} == {"0.png", "0.f32", "0-2.png", "0-2.f32"}
    client.delete(f"/jobs/{job_id}/images/0")
    for seconds, kept in ((60.0, True), (RESTORABLE_S, False)):
        now[0] += seconds
        queue._prune_sometimes()
        assert bool(list(folder.glob("0*"))) is kept
    problem(client.post(f"/jobs/{job_id}/images/0/restore"), 410)
    assert indices(client, job_id) == [1] and len(list(folder.glob("1*"))) == 4
    client.delete(f"/jobs/{job_id}/images/1")
    now[0] += RESTORABLE_S + 61
    queue._prune_sometimes()
    problem(client.get(f"/jobs/{job_id}/"), 410)
    assert not folder.exists()


def test_a_favourite_never_makes_room(tmp_path: Path) -> None:
    app = make_app(DrawingEngine(), data_dir=tmp_path, keep=Retention(max_jobs=1))
    client = app.test_client()
    loved = run(app, n_images=1)
    client.put(f"/images/{loved}/0/favourite")
    jobs = [run(app, n_images=1) for _ in range(3)]
    found = {job["job_id"] for job in client.get("/jobs/").get_json()["jobs"]}
    assert found == {loved, jobs[-1]}
    service_of(app).close()


def test_a_folder_of_the_first_schema_is_taken_over(tmp_path: Path) -> None:
    app = make_app(DrawingEngine(), data_dir=tmp_path)
    job_id = run(app, n_images=2)
    picture = app.test_client().get(f"/jobs/{job_id}/images/0.png").data
    service_of(app).close()
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as old:  # as the version before wrote it
        old.execute("DROP TABLE marks")
        old.execute("PRAGMA user_version = 1")
    old.close()
    store = Store(tmp_path)
    assert store._read("PRAGMA user_version") == [(2,)] and store.marks([1]) == {1: Marks()}
    store.close()
    client = make_app(DrawingEngine(), data_dir=tmp_path).test_client()
    assert client.get(f"/jobs/{job_id}/images/0.png").data == picture
    assert client.put(f"/images/{job_id}/0/favourite").status_code == 204
    assert [one.get("favourite") for one in listed(client, job_id) or []] == [True, None]
    service_of(client.application).close()


# ---- on the page -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def site() -> Iterator[Site]:
    with Site(DrawingEngine) as made:
        made.wait_until_ready()
        yield made


def gallery(page: Page, site: Site, count: int) -> None:
    page.goto(f"{site.address}?view=gallery")
    page.wait_for_selector("body[data-resumed]")
    expect(page.locator("#days .tile:not([hidden])")).to_have_count(count)


def test_another_browser_sees_favourites(browser: Browser, site: Site) -> None:
    site.wait(site.submit("an old man", n_images=3))
    with watched_page(browser) as page:
        gallery(page, site, 3)
        page.locator("#days .tile-open").nth(1).press("f")
        expect(page.locator("#days .heart[aria-pressed=true]")).to_have_count(1)
    with watched_page(browser) as page:
        gallery(page, site, 3)
        expect(page.locator("#days .heart[aria-pressed=true]")).to_have_count(1)
        page.get_by_text("Favourites", exact=True).click()
        expect(page.locator("#days .tile")).to_have_count(1)


def test_favourites_of_an_older_page_become_everybodys(browser: Browser, site: Site) -> None:
    job_id = site.submit("an old man", n_images=2)
    site.wait(job_id)
    with watched_page(browser) as page:
        page.goto(site.address)
        kept = [{"key": f"{job_id}/1", "index": 1, "job": {"id": job_id}},
                {"key": "gone/0", "index": 0, "job": {"id": f"gone-{32 * '0'}"}}]
        prefix = page.evaluate("Object.keys(localStorage).find(key => key.endsWith('client')).replace(/client$/, '')")
        page.evaluate("([key, kept]) => localStorage.setItem(key, JSON.stringify(kept))", [f"{prefix}favourites", kept])
        with page.expect_response(lambda answer: answer.request.method == "PUT" and job_id in answer.url):
            page.reload()
    assert [one.get("favourite") for one in listed(site.app.test_client(), job_id) or []] == [None, True]


def test_one_of_four_is_deleted_in_the_viewer_and_comes_back(browser: Browser, site: Site) -> None:
    job_id = site.submit("an old man", n_images=4)
    site.wait(job_id)
    client = site.app.test_client()
    with watched_page(browser) as page:
        gallery(page, site, 4)
        page.locator("#days .tile-open").nth(1).click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_role("button", name="Delete", exact=True).click()
        expect(page.locator("#days .tile:not([hidden])")).to_have_count(3)
        expect(dialog).to_be_visible()  # on the next one
        expect(page.locator(".toast")).to_contain_text("Image deleted.")
        assert indices(client, job_id) == [0, 2, 3]
        page.get_by_role("button", name="Undo").click()
        expect(page.locator("#days .tile:not([hidden])")).to_have_count(4)
        assert indices(client, job_id) == [0, 1, 2, 3]
        page.keyboard.press("Delete")
        page.keyboard.press("Escape")
        page.reload()
        expect(page.locator("#days .tile")).to_have_count(3)


def test_deleting_a_job_keeps_its_favourites(browser: Browser, site: Site) -> None:
    job_id = site.submit("an old man", n_images=3)
    site.wait(job_id)
    client = site.app.test_client()
    client.put(f"/images/{job_id}/2/favourite")
    with watched_page(browser) as page:
        visit(page, f"{site.address}?job={job_id}")
        card = page.locator(".job")
        expect(card.locator(".tile:not([hidden])")).to_have_count(3)
        card.get_by_role("button", name="Delete", exact=True).click()
        expect(page.locator(".toast")).to_contain_text("2 images deleted, 1 favourite kept.")
        expect(card.locator(".tile:not([hidden])")).to_have_count(1)
        page.reload()
        expect(card.locator(".tile:not([hidden])")).to_have_count(1)
        assert indices(client, job_id) == [2]
