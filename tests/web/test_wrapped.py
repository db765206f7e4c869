"""May base64 come as `base64` prints it, wherever it comes in: in lines, with a final newline, with what a shell makes
of them? It must do what the same text in one piece does."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flask import Flask
from flask.testing import FlaskClient
from PIL import Image

from core.imaging.file_sanitizer import MAX_PICTURE_BYTES
from core.web.values import decode_base64
from tests.support.asking import LATENT, latent_of, run, service_of, tick, work

WRAPS: dict[str, Callable[[str], str]] = {
    "a final newline": lambda text: text + "\n",
    "lines of 76, as base64 prints them": lambda text: "\n".join(textwrap.wrap(text, 76)) + "\n",
    "lines of 64 as OpenSSL and Windows write them": lambda text: "\r\n".join(textwrap.wrap(text, 64)) + "\r\n",
    "lines that a shell made words of": lambda text: " ".join(textwrap.wrap(text, 76)),
    "indented": lambda text: "\n\t" + "\n\t".join(textwrap.wrap(text, 76)),
}


def png(seed: int, size: int = 32) -> str:
    rng, buffer = np.random.default_rng(seed), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


PHOTO, MASK = png(1), png(2)
DRAW: dict[str, tuple[dict[str, Any], str]] = {  # what is asked for, and where in it the base64 is
    "init_image": ({"init_image": PHOTO}, "init_image"),
    "mask": ({"init_image": PHOTO, "mask": MASK}, "mask"),
    "latent": ({"latent": LATENT, "n_images": 1}, "latent"),
    "latents": ({"latent": [LATENT, latent_of(0.5)], "n_images": 2}, "latent"),
    "interpolate_to": ({"interpolate_to": {"latent": LATENT}, "n_images": 2}, "interpolate_to"),
}


def rewritten(value: Any, wrap: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {name: rewritten(part, wrap) for name, part in value.items()}
    return [wrap(part) for part in value] if isinstance(value, list) else wrap(value)


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=list(WRAPS))
@pytest.mark.parametrize(("body", "field"), DRAW.values(), ids=list(DRAW))
def test_a_wrapped_request_is_the_same_request(
    client: FlaskClient, body: dict[str, Any], field: str, wrap: Callable[[str], str]
) -> None:
    whole = {"prompt": "a man", "n_inf_steps": 1, "seed": 7, **body}
    key = {"Idempotency-Key": "once"}
    first = client.post("/text_to_image", json=whole, headers=key)
    again = client.post("/text_to_image", json={**whole, field: rewritten(whole[field], wrap)}, headers=key)
    assert (first.status_code, again.status_code) == (200, 200), again.text
    assert again.get_json()["job_id"] == first.get_json()["job_id"]  # another request would be refused with this key


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=list(WRAPS))
def test_every_other_route_takes_it(app: Flask, client: FlaskClient, wrap: Callable[[str], str]) -> None:
    drawn = client.get(f"/jobs/{run(app, n_images=1)}/images/0.png").data
    picture = base64.b64encode(drawn).decode()
    whole, wrapped = (client.post("/inspect", json={"image": one}) for one in (picture, wrap(picture)))
    assert (whole.status_code, wrapped.status_code) == (200, 200), wrapped.text
    assert whole.get_json() == wrapped.get_json()
    service = service_of(app)
    service.queue.start(lambda: service.batch)  # the other routes wait for the engine
    try:
        for route, name, text in (("/encode", "image", PHOTO), ("/decode", "latent", LATENT)):
            whole, wrapped = (client.post(route, json={name: one}) for one in (text, wrap(text)))
            assert (whole.status_code, wrapped.status_code) == (200, 200), wrapped.text
            assert whole.data == wrapped.data
        verified = [client.post("/verify", json={"image": one}) for one in (picture, wrap(picture))]
        assert [answer.status_code for answer in verified] == [200, 200]
        assert verified[0].get_json()["job_id"] == verified[1].get_json()["job_id"]
    finally:
        service.queue.close()
        assert service.queue.join(10)


def test_the_largest_picture_fits_in_lines(client: FlaskClient) -> None:
    """Its size counts without line breaks; JSON writes each of those as four characters."""
    large = base64.b64encode(bytes(MAX_PICTURE_BYTES)).decode()
    lines = "\r\n".join(large[i : i + 64] for i in range(0, len(large), 64)) + "\r\n"
    for route, body in (("/encode", {"image": lines}), ("/text_to_image", {"prompt": "a", "init_image": lines})):
        answer = client.post(route, json=body)
        assert answer.status_code == 422 and "base64" not in answer.get_json()["detail"], answer.text  # looked at
    answer = client.post("/text_to_image", json={"prompt": "a", "init_image": lines + "AAAA"})
    assert answer.status_code == 422 and "of 0 to 11184812 characters" in answer.get_json()["detail"]


def test_what_a_shell_pastes_into_json_is_told(client: FlaskClient) -> None:
    """`-d "{...$(base64 photo.jpg)...}"` puts line breaks into a text, which JSON forbids."""
    body = '{"prompt": "a", "init_image": "' + "\n".join(textwrap.wrap(PHOTO, 76)) + '"}'
    answer = client.post("/text_to_image", data=body, content_type="application/json")
    assert answer.status_code == 400 and r"tr -d '\n'" in answer.get_json()["detail"]


@pytest.mark.parametrize(("text", "cause"), [
    ("data:image/png;base64,iVBORw0KGgo=", "leave out everything up to the comma"),
    ("https://example.org/a.png", "addresses are not followed"), ("iVBORw0KGgo", "its end is missing"),
    ("ab-_", "write + for -"), ("ab_-", "write / for _"), ("iVBÖ", 'character 4 is'), ("QQ==QQ==", "follows its end"),
])
def test_the_message_says_what_is_wrong(text: str, cause: str) -> None:
    with pytest.raises(Exception, match="must be base64; got") as raised:
        decode_base64(text, "image")
    assert cause in str(raised.value)


def test_it_is_kept_in_one_piece(app: Flask, client: FlaskClient) -> None:
    """A job that runs again after a restart reads what was kept."""
    wrapped = WRAPS["lines of 76, as base64 prints them"]
    body = {"prompt": "a", "n_images": 1, "n_inf_steps": 2, "latent": wrapped(LATENT)}
    job = service_of(app).queue.get(client.post("/text_to_image", json=body).get_json()["job_id"])
    assert job.request["latent"] == LATENT
    tick(app)
    work(app)
    assert job.state == "succeeded"
