"""Does the page say why jobs wait, when workers generate and none is there?"""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Page, expect

from core.workers.broker import Broker
from core.workers.remote import Workers
from core.workers.remote_engine import remote_models
from tests.support.browsing import Site, generate, visit, write_prompt
from tests.support.drawing import DrawingInfo
from tests.support.redis_server import RedisServer, needs_redis
from tests.support.worker_process import WorkerProcess, until


@needs_redis
def test_the_page_says_why_jobs_wait(page: Page, tmp_path: Path) -> None:
    """It asks every fifteen seconds; a job that is accepted meanwhile is done when a worker comes."""
    page.clock.install()
    with RedisServer(tmp_path / "redis") as redis:
        workers = Workers(Broker.parse(redis.url))
        with Site(remote_models(workers.link, [("", DrawingInfo)]), workers=workers) as site:
            site.wait_until_ready()
            until(lambda: "No worker" in workers.notice)
            visit(page, site.address)
            expect(page.locator("#banner")).to_contain_text("No worker is there")
            write_prompt(page, "a smiling woman")
            generate(page)
            redis.stop()
            until(lambda: "Redis" in workers.notice)
            page.clock.fast_forward(16_000)
            expect(page.locator("#banner")).to_contain_text("Redis")
            redis.start()
            with WorkerProcess.drawing(tmp_path / "worker.log", redis.url):
                until(lambda: not workers.notice)
                page.clock.fast_forward(16_000)
                expect(page.locator("#banner")).to_be_hidden()
                expect(page.locator(".job[data-state=succeeded]")).to_be_visible(timeout=20_000)
