"""Does OpenVINO generate what torch generates, and does everything still work when it, its cache or the memory fails?

A tiny model of real networks; the seconds it takes to compile are paid once. Skipped where OpenVINO is not installed,
but for what must hold there.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info
from torch import Tensor, nn

from core.diffusion.conditioning import Condition, Flat
from core.engine import GenerationRequest
from core.evaluation.attribute_classifier import AttributeClassifier, AttributeClassifierConfig, extract_features
from core.nn.checkpoint import save_component
from core.nn.openvino_backend import (
    KEPT,
    MAGIC,
    Compiled,
    CompileError,
    Compiler,
    Composed,
    installed_version,
    keep,
    read_checked,
)
from core.nn.preview_decoder import PreviewDecoder, save_preview
from generator import FaceGenerator, GeneratedImage, Run
from vae import encoder_hash, load_vae

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a smiling woman with blond hair"
needs_openvino = pytest.mark.skipif(installed_version() is None, reason="OpenVINO is not installed")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> FaceGenerator:
    return FaceGenerator.load(tiny_folder, device="cpu", engine="torch")


@pytest.fixture(scope="module")
def faces(tiny_folder: Path, cache: Path) -> FaceGenerator:
    if installed_version() is None:
        pytest.skip("OpenVINO is not installed")
    return FaceGenerator.load(tiny_folder, device="cpu", engine="openvino", cache=cache)


def difference(pictures: list[GeneratedImage], others: list[GeneratedImage]) -> int:
    """The largest difference in grey levels."""
    pairs = zip(pictures, others, strict=True)
    return max(int(np.abs(one.pixels.astype(int) - other.pixels).max()) for one, other in pairs)


def finish(faces: FaceGenerator, runs: list[Run]) -> list[list[GeneratedImage]]:
    while any(not run.finished for run in runs):
        faces.step(runs)
    return [faces.pictures(run) for run in runs]


# ---- the same images -----------------------------------------------------------------------------------------------


def test_both_say_who_they_are(faces: FaceGenerator, plain: FaceGenerator) -> None:
    assert faces.info.engine == f"OpenVINO {installed_version()} f32"
    assert plain.info.engine == f"torch {torch.__version__} f32"
    assert faces.info.model_hash == plain.info.model_hash


def test_numpy_keeps_its_threads_off_the_cores_that_draw(faces: FaceGenerator) -> None:
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    assert all(pool["num_threads"] == 1 for pool in pools), pools
    assert pools or sys.platform == "darwin"  # Apple's own has no such pool


def test_both_give_the_same_numbers(faces: FaceGenerator, plain: FaceGenerator) -> None:
    """For one row or many, short texts or long, any level, the learned null or not."""
    generator = torch.Generator().manual_seed(0)
    width = plain.unet.config.text_width
    for count, length in ((1, 1), (2, 9), (5, 40), (16, 3)):
        x = torch.randn(count, *plain.info.latent_shape, generator=generator)
        condition = Condition(
            torch.randn(count, length, width, generator=generator),
            torch.arange(length).expand(count, length) < 1 + torch.arange(count)[:, None],
            torch.randn(count, width, generator=generator),
            torch.linspace(58, 128, count),
            torch.arange(count) % 3 == 1,
        )
        level = torch.linspace(0, 999, count)
        with torch.inference_mode():
            wanted, found = plain.denoise(x, level, condition), faces.denoise(x, level, condition)
            assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
            wanted, found = plain.decode_latents(x), faces.decode_latents(x)
            assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("sampler", ["UniPC", "Euler a", "DDPM"])
def test_both_draw_the_same_pictures(faces: FaceGenerator, plain: FaceGenerator, sampler: str) -> None:
    """To within two grey levels; what one engine generates itself must agree to within one."""
    options = {"num_images": 3, "num_inference_steps": 6, "seed": 4, "sampler": sampler}
    # type: ignore[arg-type]
    assert difference(faces.generate(PROMPT, **options), plain.generate(PROMPT, **options)) <= 2


def test_both_show_the_same_previews(tiny_folder: Path, cache: Path, tmp_path: Path) -> None:
    """The preview decoder is compiled with the rest; what lies on the edge of two grey levels may fall either way."""
    if installed_version() is None:
        pytest.skip("OpenVINO is not installed")
    folder = shutil.copytree(tiny_folder, tmp_path / "with-preview")
    vae = load_vae(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_preview(PreviewDecoder(vae.config.latent_channels), folder, encoder_hash(vae))
    torch_shows, shows = (FaceGenerator.load(folder, device="cpu", engine=engine, cache=cache)
                          for engine in ("torch", "openvino"))
    assert isinstance(shows.decode_preview, Compiled) and not isinstance(torch_shows.decode_preview, Compiled)
    run = torch_shows.start(GenerationRequest(PROMPT, num_images=3, num_inference_steps=4))
    while not run.finished:
        torch_shows.step([run])
        wanted, found = torch_shows.previews(run), shows.previews(run)
        assert difference(found, wanted) <= 1 and found[0].pixels.std() > 1
        assert np.mean([np.abs(a.pixels.astype(int) - b.pixels) for a, b in zip(found, wanted, strict=True)]) < 1e-3


@needs_openvino
def test_both_judge_alike(tiny_folder: Path, cache: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        save_component(tmp_path / "judge", "judge", AttributeClassifier(AttributeClassifierConfig()).state_dict(),
                       asdict(AttributeClassifierConfig()))
    both = [FaceGenerator.load(folder, device="cpu", engine=engine, cache=cache) for engine in ("torch", "openvino")]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), np.uint8)
    classifiers = [faces.classifier for faces in both]
    assert classifiers[0] is not None and classifiers[1] is not None
    assert classifiers[0].faster is None and classifiers[1].faster is not None
    plain, fast = extract_features(classifiers[0], pixels), extract_features(classifiers[1], pixels)
    assert np.allclose(plain.features, fast.features, rtol=1e-3, atol=1e-3)
    assert np.allclose(plain.logits, fast.logits, rtol=1e-3, atol=1e-3)


def test_a_seed_is_its_picture_in_any_company(faces: FaceGenerator) -> None:
    """Alone, in batches of every size up to eight, and beside other people's jobs that join and leave."""
    alone = [faces.generate(PROMPT, num_inference_steps=5, seed=seed)[0] for seed in range(8)]
    for count in range(2, 9):
        together = faces.generate(PROMPT, num_images=count, num_inference_steps=5)
        assert difference(together, alone[:count]) <= 1
    asked = [GenerationRequest(PROMPT, 2, 5, seed=0), GenerationRequest("an old man with a hat", 3, 7,
                                                                        sampler="Euler a"),
             GenerationRequest("", 1, 3, guidance_scale=1.0), GenerationRequest(PROMPT, 1, 5, seed=2,
                                                                                negative_prompt="")]
    runs = [faces.start(request) for request in asked]
    faces.step(runs[1:2])
    found = finish(faces, runs)
    assert difference(found[0], alone[:2]) <= 1 and difference(found[3], alone[2:3]) <= 1
    once, twice = (faces.generate(PROMPT, num_images=2, num_inference_steps=5) for _ in range(2))
    assert [one.png for one in once] == [one.png for one in twice]


def test_one_broken_run_fails_alone(faces: FaceGenerator) -> None:
    latents = np.full((1, *faces.info.latent_shape), 3e38, np.float32)
    runs = [faces.start(GenerationRequest(PROMPT, 1, 6, latents=latents)), faces.start(GenerationRequest(PROMPT, 2, 4,
                                                                                                         seed=3))]
    while not runs[1].finished:
        faces.step(runs)
    assert runs[0].error is not None and runs[0].error.code == "not_finite"
    assert difference(faces.pictures(runs[1]), faces.generate(PROMPT, num_images=2, num_inference_steps=4, seed=3)) <= 1


@needs_openvino
def test_bf16_is_near(tiny_folder: Path, plain: FaceGenerator, cache: Path) -> None:
    """Where the CPU has it, on average within three grey levels; where it would be emulated it is refused."""
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        with pytest.raises(ValueError, match="bf16 on a device that has it"):
            FaceGenerator.load(tiny_folder, device="cpu", precision="bf16", engine="openvino", cache=cache)
        return
    fast = FaceGenerator.load(tiny_folder, device="cpu", precision="bf16", engine="openvino", cache=cache)
    assert fast.info.engine.endswith(" bf16")
    pictures, exact = (one.generate(PROMPT, num_images=2, num_inference_steps=4, seed=3) for one in (fast, plain))
    assert 0 < np.mean([np.abs(a.pixels.astype(float) - b.pixels) for a, b in zip(pictures, exact, strict=True)]) < 3


# ---- the cache -------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """A network small enough to compile often."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


class Counting(Compiler):
    """How often it had to compile."""

    compiled = 0

    def compile(self, *arguments: object) -> Compiled:
        original = self._core.compile_model

        class Core:
            import_model = self._core.import_model

            @staticmethod
            def compile_model(*more: object) -> object:
                Counting.compiled += 1
                return original(*more)

        kept, self._core = self._core, Core()
        try:
            return super().compile(*arguments)  # type: ignore[arg-type]
        finally:
            self._core = kept


@pytest.fixture
def pair() -> Pair:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Pair().eval()


@needs_openvino
def test_what_is_compiled_once_is_read_back(pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Until it is damaged, or anything that decides it is different."""
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    Counting.compiled = 0

    def compiled(weights: str = "a", threads: int = 1) -> int:
        found = Counting(tmp_path, threads).compile("pair", pair, (x[:2],), weights)
        assert torch.allclose(found(x[:1]), pair(x[:1]), atol=1e-6)
        return Counting.compiled

    assert [compiled(), compiled(), compiled()] == [1, 1, 1]
    (path,) = tmp_path.iterdir()  # nothing was left aside
    whole = path.read_bytes()
    for count, damaged in enumerate((whole[:-1], b"", whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]), start=2):
        path.write_bytes(damaged)
        caplog.clear()
        assert compiled() == count and "damaged: it is made anew" in caplog.text
        assert compiled() == count and path.read_bytes() != damaged
    assert compiled(weights="b") == 5 and compiled(threads=2) == 6 and compiled() == 6
    sound = b"not a model at all"
    path.write_bytes(MAGIC + hashlib.sha256(sound).digest() + sound)  # whole, but another version's, say
    assert compiled() == 7 and "cannot be used" in caplog.text


@needs_openvino
def test_the_cache_does_not_grow_for_ever(pair: Pair, tmp_path: Path) -> None:
    for number in range(KEPT + 3):
        Compiler(tmp_path, 1).compile("pair", pair, (torch.zeros(2, 8),), str(number))
    assert len(list(tmp_path.iterdir())) == KEPT


def test_a_clock_that_was_ahead_drops_no_network_that_was_just_compiled(tmp_path: Path) -> None:
    """Without OpenVINO: the files are all that matters."""
    class Model:
        def export_model(self) -> bytes:
            return b"compiled"

    for number in range(KEPT):
        keep(tmp_path / f"{number}.compiled", Model())
        os.utime(tmp_path / f"{number}.compiled", (2**32 + number, 2**32 + number))
    assert read_checked(tmp_path / "0.compiled") == b"compiled"  # used again: 1 is the longest unused now
    for name in ("new", "newer"):
        keep(tmp_path / f"{name}.compiled", Model())
    assert {path.stem for path in tmp_path.iterdir()} == {"0", "new", "newer", *map(str, range(3, KEPT))}


@needs_openvino
@pytest.mark.parametrize("trouble", ["a file is in the way", "read-only"])
def test_a_folder_that_cannot_be_written_costs_time_alone(
    pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    place = tmp_path / "cache"
    if trouble == "read-only":
        place.mkdir(mode=0o500)
        if os.access(place, os.W_OK):
            pytest.skip("this user may write everywhere")
    else:
        place.write_text("")
    x = torch.ones(2, 8)
    assert torch.allclose(Compiler(place, 1).compile("pair", pair, (x,), "a")(x), pair(x), atol=1e-6)
    assert "the next start compiles again" in caplog.text


@needs_openvino
def test_two_processes_may_fill_the_same_cache(
    tiny_folder: Path, cache: Path, tmp_path: Path, faces: FaceGenerator
) -> None:
    code = ("import sys; from generator import FaceGenerator; "
            "faces = FaceGenerator.load(sys.argv[1], device='cpu', threads=1, engine='openvino', cache=sys.argv[2]); "
            "print(faces.generate('a man', num_inference_steps=2)[0].pixels.sum(), faces.info.engine)")
    command = [sys.executable, "-c", code, str(tiny_folder), str(tmp_path)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=240)[0] for process in both]
    assert answers[0] == answers[1] and "OpenVINO" in answers[0]
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["decoder", "unet", "unet"]
    while faces.on_idle():  # another test may have had it made
        pass
    assert all(not compiled.prepare() for compiled in faces._compiled) and not faces.on_idle()
    assert {path.name for path in tmp_path.iterdir()} <= {path.name for path in cache.iterdir()}  # the same keys here


@needs_openvino
@pytest.mark.parametrize("threads", [1, 2])
def test_every_number_of_rows_is_computed(
    pair: Pair, tmp_path: Path, threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Alone or in pairs, on one stream or two; what computes pairs is made once, when it is first of use, or before,
    and read back from then on."""
    caplog.set_level(logging.INFO)
    compiled = Compiler(tmp_path, threads).compile("pair", pair, (torch.zeros(2, 8),), "a", pairs=True)
    generator, made = torch.Generator().manual_seed(1), []
    for count in (1, 1, 2, 3, 4, 5, 6, 7, 8, 33, 1):
        x = torch.randn(8, count + 1, generator=generator).T[1:]  # neither contiguous nor from the beginning
        found = compiled(x)
        assert found.shape == (count, 4) and torch.allclose(found, pair(x), atol=1e-6)
        made.append(len(list(tmp_path.iterdir())))
    assert made == [1, 1, *[2] * 9]
    assert not compiled.prepare() and caplog.text.count("compiled the pair") == 2
    again = Compiler(tmp_path, threads).compile("pair", pair, (torch.zeros(2, 8),), "a", pairs=True)
    assert again.prepare() and torch.allclose(again(x), pair(x), atol=1e-6)
    assert caplog.text.count("compiled the pair") == 2
    other = Compiler(tmp_path, threads).compile("pair", pair, (torch.zeros(2, 8),), "b", pairs=True)
    assert len(list(tmp_path.iterdir())) == 3
    lone = Compiler(tmp_path, threads).compile("pair", pair, (torch.zeros(2, 8),), "a")
    assert torch.allclose(lone(x), pair(x), atol=1e-6) and not lone.prepare() and len(list(tmp_path.iterdir())) == 3
    assert other.prepare() and len(list(tmp_path.iterdir())) == 4 and not other.prepare()


@needs_openvino
def test_without_pairs_rows_are_computed_one_by_one(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = Compiler(None, 1)
    compiled = compiler.compile("pair", pair, (torch.zeros(2, 8),), "a", pairs=True)

    class Core:
        @staticmethod
        def compile_model(*_: object) -> object:
            raise RuntimeError("no pairs today")

    monkeypatch.setattr(compiler, "_core", Core())
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(compiled(x), pair(x), atol=1e-6) and torch.allclose(compiled(x), pair(x), atol=1e-6)
    assert caplog.text.count("rows are computed one by one: pair: RuntimeError: no pairs today") == 1


@needs_openvino
def test_a_network_that_comes_out_wrong_is_refused(tmp_path: Path) -> None:
    class Fickle(nn.Module):
        """The trace takes the number of rows for a constant."""

        def forward(self, x: Tensor) -> Tensor:
            return x * float(len(x))

    with pytest.raises(CompileError, match="fickle: ValueError: compiled it differs from torch"):
        Compiler(tmp_path, 1).compile("fickle", Fickle(), (torch.ones(2, 8),), "a")
    assert not list(tmp_path.iterdir())


# ---- without it ------------------------------------------------------------------------------------------------------


def test_without_openvino_torch_draws_and_says_so(tiny_folder: Path, plain: FaceGenerator) -> None:
    """In a process that cannot import it."""
    code = """
import importlib.util, json, logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "openvino":
            raise ImportError(name)
original = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "openvino" else original(name, package)
sys.meta_path.insert(0, Absent())
from generator import FaceGenerator
faces = FaceGenerator.load(sys.argv[1], device="cpu", threads=1)
picture = faces.generate("a man", num_inference_steps=2, seed=5)[0]
try:
    FaceGenerator.load(sys.argv[1], device="cpu", engine="openvino")
except ValueError as error:
    print(json.dumps([faces.info.engine, int(picture.pixels.sum()), str(error)]))
"""
    wanted = int(plain.generate("a man", num_inference_steps=2, seed=5)[0].pixels.sum())
    done = subprocess.run([sys.executable, "-c", code, str(tiny_folder)], cwd=ROOT,
                          capture_output=True, text=True, timeout=240)
    engine, total, error = json.loads(done.stdout)
    assert engine == plain.info.engine and abs(total - wanted) < 500
    assert error == "engine openvino does not work here: OpenVINO is not installed; use auto or torch"
    assert "WARNING torch generates, which is slower than OpenVINO would be: OpenVINO is not installed" in done.stderr
    assert f"INFO {plain.info.engine} generates, with 1 threads" in done.stderr


def test_a_package_that_does_not_load_counts_as_absent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)  # importing it raises ImportError
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert installed_version() is None and "does not load" in caplog.text


def test_engines_are_checked(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="engine must be auto, torch, or openvino on the CPU; got 'onnx' on cpu"):
        FaceGenerator.load(tiny_folder, device="cpu", engine="onnx")


# ---- memory ----------------------------------------------------------------------------------------------------------


@needs_openvino
def test_short_memory_halves_the_call(faces: FaceGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What OpenVINO says when there is no memory, in both of its ways, becomes torch's exception; halves then fit."""
    rows: list[int] = []
    failures: list[int] = []
    request = GenerationRequest(PROMPT, 3, 4, seed=7)
    wanted = finish(faces, [faces.start(request)])[0]
    compiled: Compiled = faces.denoise.__self__  # type: ignore[attr-defined]
    pairs = compiled._pairs
    assert pairs is not None

    class Short:
        """The real request of the first stream, on a machine with memory for no pair; it says so in both ways."""

        def __init__(self, request: object) -> None:
            self.request = request

        def infer(self, arrays: list[np.ndarray], **options: object) -> object:
            failures.append(len(arrays[0]))
            raise MemoryError() if len(failures) % 2 else RuntimeError("Exception from request.cpp: bad_alloc")

    real, make = compiled.__class__.__call__, pairs._make

    def counted(self: Compiled, *inputs: Tensor) -> Tensor:
        if self is compiled:
            rows.append(len(inputs[0]))
        return real(self, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(pairs, "_make", lambda: [Short(request) for request in make()[:1]] + make()[1:])
        patch.setattr(pairs, "_requests", pairs._make())
        patch.setattr(Compiled, "__call__", counted)
        found = finish(faces, [faces.start(request)])[0]
    assert failures == [2] * 5
    assert rows[:11] == [6, 3, 1, 2, 1, 1, 3, 1, 2, 1, 1] and max(rows[11:]) == 1  # halved until it fits, remembered
    assert difference(found, wanted) <= 1
    assert difference(finish(faces, [faces.start(request)])[0], wanted) == 0


# ---- manners ---------------------------------------------------------------------------------------------------------


@needs_openvino
def test_nothing_is_reported_to_anybody(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package that OpenVINO's own converter reports through cannot be imported, whether it is installed or not.

    `test_readme.py` watches a whole process.
    """
    monkeypatch.delitem(sys.modules, "openvino_telemetry", raising=False)
    Compiler(None, 1).compile("pair", pair, (torch.zeros(2, 8),), "a")
    with pytest.raises(ImportError):
        importlib.import_module("openvino_telemetry")


@needs_openvino
def test_a_log_line_says_what_was_compiled(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    composed = Composed(pair, pair, torch.neg)
    assert float(Compiler(None, 1).compile("pair", composed, (torch.ones(2, 8),), "a")(torch.ones(1, 8)).max()) <= 0
    assert "compiled the pair for this CPU (rows at once: 1) in" in caplog.text
    assert isinstance(Flat(pair), nn.Module)


@needs_openvino
def test_a_signal_finds_its_stack_when_compilers_come_and_go() -> None:
    """In a process of its own, which the signal would end with SIGSEGV."""
    code = """
import os, signal, time
import torch
from core.nn.openvino_backend import Compiler

layer, example = torch.nn.Linear(8, 4), (torch.zeros(2, 8),)
older = Compiler(None, 1)
newer = Compiler(None, 2)
for compiler in (older, newer):
    compiler.compile("layer", layer, example, "a", pairs=True)(torch.zeros(5, 8))
del compiler, older
newer.compile("layer", layer, example, "a")
del newer
for _ in range(3):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    except KeyboardInterrupt:
        print("caught", flush=True)
"""
    restored = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          **(restored if sys.platform != "win32" else {}))
    assert (done.returncode, done.stdout.split()) == (0, ["caught"] * 3), done.stderr[-2000:]
