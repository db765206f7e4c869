"""Does the measure of speed measure: a baseline of the right size, a table that lands in its place, a real server?"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import benchmark_baseline
from core.diffusion.conditioning import Condition
from core.diffusion.schedule import NoiseSchedule
from core.evaluation import benchmark
from core.evaluation.benchmark_tables import Row, Section, record
from core.nn.openvino_backend import installed_version
from generator import FaceGenerator
from tests.support.training import make_workplace

ROOT = Path(__file__).resolve().parents[2]


def test_a_row_keeps_or_breaks_its_promise() -> None:
    assert Row("a", [3.0, 1.0, 2.0], at_most=2).kept and not Row("a", [3.0, 1.0, 2.0], at_most=1.9).kept
    assert Row("a", [5.0], at_least=4).kept and not Row("a", [5.0], at_least=6).kept
    broken = Section("s", [Row("slow", [5.0, 7.0], "s", at_most=1)], ["a note"])
    assert not broken.kept
    assert "| slow | 2 | 6 s | 5 to 7 | at most 1 | **BROKEN** |" in broken.text() and "- a note" in broken.text()


def test_a_table_goes_between_its_marks_again_and_again(tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    document.write_text("above\\n<!-- one: written by x -->\\nold\\n<!-- /one -->\\nbelow\\n".replace("\\n", "\n"))
    for value in (1.0, 2.0):
        record(document, Section("one", [Row("it", [value])], []), "here and now", "python x.py")
    text = document.read_text()
    assert text.startswith("above\n<!-- one: written by x -->\n") and text.endswith("<!-- /one -->\nbelow\n")
    assert "old" not in text and "| it |  | 2 |" in text and "| it |  | 1 |" not in text
    assert "here and now. `python x.py`" in text
    with pytest.raises(SystemExit, match="lacks the marks"):
        record(document, Section("two", [], []), "", "")


@pytest.mark.parametrize("wanted", [3_000_000, 9_400_000, 20_600_000])
def test_the_baseline_is_about_as_large(wanted: int) -> None:
    unet = benchmark.diffusers_unet(wanted, 16, 192)
    assert 0.7 < benchmark.count_parameters(unet) / wanted < 1.45
    x = torch.zeros(1, 16, 16, 16)
    assert benchmark.count_gflop(lambda: unet(x, torch.zeros(1), encoder_hidden_states=torch.zeros(1, 5, 192))) > 0.05


def test_the_baseline_makes_as_many_evaluations_as_it_says(faces: FaceGenerator) -> None:
    unet = benchmark.diffusers_unet(1, faces.info.latent_shape[0], faces.unet.config.text_width)
    rows: list[int] = []
    with unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0]))):
        x = benchmark.draw_by_diffusers(unet, faces.info.latent_shape, benchmark.text_tokens(faces), images=3, steps=7)
    assert rows == [6] * 7 and list(x.shape) == [3, *faces.info.latent_shape] and bool(torch.isfinite(x).all())


def test_engines_are_compared_row_by_row(faces: FaceGenerator) -> None:
    """Each engine that is there, here torch alone twice: the same numbers, and no difference in the images."""
    (section,) = benchmark.run(lambda engine, precision: faces, [], steps=2, repeats=1, only="engines")
    assert section.name == "engines"
    told = {row.what: row.values for row in section.rows}
    assert all(told[f"UNet, {rows} row{'s' * (rows > 1)}, torch fp32"][0] > 0 for rows in benchmark.ROWS)
    assert told["alone against in a batch of 8, grey levels, torch fp32"][0] <= 1 and section.kept
    other = told.get("against torch fp32, grey levels, openvino fp32")
    assert other is None or other == [0.0]


def test_the_client_meets_a_real_server(tiny_folder: Path) -> None:
    serve = [sys.executable, str(ROOT / "api.py"), "--device", "cpu", "--model", str(tiny_folder), "--engine", "torch"]
    with benchmark.served(serve) as client:
        client.wait_ready()
        png = client.draw(n_images=1, n_inf_steps=2)
        assert png.startswith(b"\x89PNG") and (client.memory_mb is None or client.memory_mb > 50)
        with pytest.raises(RuntimeError, match="answered 422"):
            client.draw(n_images=99)
    with pytest.raises(RuntimeError, match="did not say where it is"), benchmark.served([sys.executable, "-c", "pass"]):
        pass


def test_the_baseline_learns_from_the_same_lessons(tmp_path: Path) -> None:
    """A step, stopped and resumed; its noise prediction means the same as ours of v."""
    place = make_workplace(tmp_path, count=12)
    command = ["train", "--model", str(place.model), "--data", str(place.store), "--run", str(tmp_path / "run"),
               "--cache", str(tmp_path / "latents"), "--steps", "2", "--batch-size", "2", "--log-every", "1",
               "--device", "cpu", "--precision", "no"]
    assert benchmark_baseline.main([*command, "--stop-at", "1"]) == 0 and benchmark_baseline.main(command) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["images_seen"] for line in lines] == [2, 4] and all(0.5 < line["loss"] < 2 for line in lines)
    schedule, z, noise = NoiseSchedule(), torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    t = torch.tensor([100.0, 700.0])

    predict = benchmark_baseline.Baseline.velocity(lambda *_: noise, schedule)
    assert torch.allclose(predict(schedule.add_noise(z, noise, t), t, None), schedule.target(z, noise, t), atol=1e-4)


def test_the_baseline_is_measured_by_what_computes_fastest() -> None:
    """And that gives what torch gives, for any number of rows, with the learned null or without."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = benchmark_baseline.Baseline(4, 32).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    condition = Condition(torch.randn(5, 7, 32, generator=generator),
                          torch.arange(7).expand(5, 7) < 1 + torch.arange(5)[:, None],
                          torch.randn(5, 32, generator=generator), torch.full((5,), 128.0), torch.arange(5) % 2 == 1)
    x, level = torch.randn(5, 4, 16, 16, generator=generator), torch.linspace(0, 999, 5)
    fast = benchmark_baseline.quick(network, condition[:2], (4, 16, 16))
    assert (fast is network) == (installed_version() is None)
    for rows in (slice(1), slice(5)):
        wanted, found = network(x[rows], level[rows], condition[rows]), fast(x[rows], level[rows], condition[rows])
        assert torch.allclose(found, wanted, atol=1e-3 * float(wanted.abs().max()))
