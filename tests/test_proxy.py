"""Does the page say what is wrong behind a proxy that rewrites Host, and does it work with the flags that it names?

A proxy of some lines, as nginx is without `proxy_set_header Host`; the page is a real browser's.
"""

from __future__ import annotations

import http.client
import http.server
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from browsing import Site, generate, visit, write_prompt
from drawing import DrawingEngine
from playwright.sync_api import Page, expect


class Proxy(http.server.BaseHTTPRequestHandler):
    """Passes requests on to `target`, with `host` as their Host."""

    target, host = "", ""

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name not in ("Host", "Connection")}
        connection = http.client.HTTPConnection(self.target, timeout=20)
        connection.request(self.command, self.path, body or None, {**headers, "Host": self.host})
        answer = connection.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name not in ("Connection", "Transfer-Encoding", "Server", "Date"):
                self.send_header(name, value)
        self.end_headers()
        while self.command != "HEAD" and (piece := answer.read1(65536)):
            self.wfile.write(piece)
        connection.close()

    do_GET = do_POST = do_DELETE = pass_on

    def log_message(self, *words: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the browser went away
            pass


@pytest.fixture
def proxy() -> Iterator[tuple[type[Proxy], str]]:
    """A proxy without a target, and its address."""
    handler = type("Rewriting", (Proxy,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_page_tells_which_host_is_missing(
    page: Page, proxy: tuple[type[Proxy], str], engine: DrawingEngine
) -> None:
    handler, address = proxy
    with Site(lambda: engine) as site:
        site.wait_until_ready()
        handler.target, handler.host = urlsplit(site.address).netloc, "backend:8080"
        page.goto(address)
        expect(page.locator("#banner")).to_contain_text("--allow-host backend")
        expect(page.locator("#model-text")).not_to_have_text("Connecting …")


def test_the_page_tells_which_origin_is_missing(
    page: Page, proxy: tuple[type[Proxy], str], engine: DrawingEngine
) -> None:
    handler, address = proxy
    with Site(lambda: engine) as site:
        site.wait_until_ready()
        handler.target = handler.host = urlsplit(site.address).netloc
        visit(page, address)
        write_prompt(page, "a smiling woman")
        generate(page)
        expect(page.locator("body")).to_contain_text("--cors-origin")


def test_with_both_flags_it_draws(page: Page, proxy: tuple[type[Proxy], str], engine: DrawingEngine) -> None:
    handler, address = proxy
    with Site(lambda: engine, hosts=["backend"], cors_origins=[address]) as site:
        site.wait_until_ready()
        handler.target, handler.host = urlsplit(site.address).netloc, "backend"
        visit(page, address)
        write_prompt(page, "a smiling woman")
        generate(page)
        expect(page.locator(".job[data-state=succeeded]")).to_be_visible()
