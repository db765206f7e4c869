"""Would the image be whole, and would its containers start? What can be said without Docker.

The Dockerfile is read by hadolint and here; what it copies is copied into an empty folder, where the real server then
runs as the image's command says, and the image's own health check asks it. compose.yaml and the Kubernetes example are
read as YAML; each command of theirs is read by the program that it is for.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import api
import worker
from core.process import clean_env, tied

ROOT = Path(__file__).resolve().parent.parent
KNOWN = {"ARG", "FROM", "ENV", "WORKDIR", "RUN", "COPY", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "CMD"}


def steps() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, each with all its lines."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines if line.strip()]


def arguments_of(kind: str) -> list[str]:
    return [rest for name, rest in steps() if name == kind]


def copied() -> list[tuple[Path, Path]]:
    """What the image gets: a file or folder of the repository, and where it lies below /app."""
    found = []
    for words in (rest.split() for rest in arguments_of("COPY")):
        assert not words[0].startswith("--"), "only plain copies"
        *sources, target = words
        into = Path(target)
        found += [(ROOT / one, into / one if target.endswith("/") else into) for one in sources]
    return found


def is_sent(path: Path) -> bool:
    """Whether .dockerignore lets a path at the top of the repository reach the builder; its last word counts."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        if pattern and not line.startswith("#") and fnmatch.fnmatch(path.name, pattern):
            sent = line.startswith("!")
    return sent


def read_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The flags of a container's command, as its program reads them."""
    assert words[0] == "python" and (ROOT / words[1]) in [source for source, _ in copied()], words
    monkeypatch.setenv("FACES_API_KEY", "key")
    return {"api.py": api, "worker.py": worker}[words[1]].parse_arguments(words[2:])


# ---- the image -------------------------------------------------------------------------------------------------------


def test_a_linter_finds_nothing() -> None:
    program = Path(sys.executable).with_name("hadolint")
    if not program.is_file():
        pytest.skip("there is no hadolint for this machine")
    found = subprocess.run([program, "--format", "json", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert json.loads(found.stdout) == []


def test_the_image_is_pinned_small_and_not_roots() -> None:
    names = [name for name, _ in steps()]
    assert set(names) <= KNOWN and names[0] == "ARG", names
    assert arguments_of("FROM") == ["python:${PYTHON}-slim"] and re.fullmatch(r"PYTHON=3\.\d+", arguments_of("ARG")[0])
    assert int(arguments_of("USER")[-1]) > 0 and names.index("USER") < names.index("CMD")
    assert "USER" not in names[names.index("CMD"):], "who runs the command is not root"
    for command in arguments_of("RUN"):
        checked = subprocess.run(["sh", "-n", "-c", command], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


def test_the_packages_are_those_of_the_requirements(tmp_path: Path) -> None:
    """The first line of the installation finds torch and torchvision, the second takes the files as they are."""
    (install,) = [command for command in arguments_of("RUN") if "pip" in command]
    assert "--index-url \"${TORCH_INDEX}\" -r torch.txt" in install
    assert "-r requirements.txt -r requirements-workers.txt" in install
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    subprocess.run(["sh", "-c", install.split("&&")[0]], cwd=tmp_path, check=True)
    found = (tmp_path / "torch.txt").read_text(encoding="utf-8").split()
    assert [pin.split("==")[0] for pin in found] == ["torch", "torchvision"]
    assert all(pin in (ROOT / "requirements.txt").read_text(encoding="utf-8") for pin in found)


def test_what_is_copied_is_there_and_sent_to_the_builder() -> None:
    for source, _ in copied():
        assert source.exists(), f"{source} is not there"
        assert is_sent(source), f".dockerignore keeps {source.name} back"
    assert not is_sent(ROOT / "tests") and not is_sent(ROOT / "data") and not is_sent(ROOT / ".git")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what the image has in /app, and nothing else of the repository."""
    folder = tmp_path_factory.mktemp("image") / "app"
    folder.mkdir()
    for source, target in copied():
        if source.is_dir():
            shutil.copytree(source, folder / target, ignore=shutil.ignore_patterns("__pycache__", "outside"))
        else:
            shutil.copy(source, folder / target)
    yield folder
    shutil.rmtree(folder)


def test_the_command_serves_and_the_health_check_sees_it(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container: this folder, this command, a key; the port and the data folder are this test's."""
    (words,) = [json.loads(rest) for rest in arguments_of("CMD")]
    given = read_command(words, monkeypatch)
    assert given.host == "0.0.0.0" and str(given.data_dir) == "/data" == arguments_of("VOLUME")[0]
    assert arguments_of("EXPOSE") == [str(given.port)]
    check = json.loads(arguments_of("HEALTHCHECK")[0].partition("CMD ")[2])
    command = [sys.executable, *words[1:], "--port", "0", "--data-dir", str(image.parent / "data"), "--engine", "torch"]
    env = clean_env(FACES_API_KEY="key", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    log = image.parent / "log"
    with log.open("wb") as output, subprocess.Popen(
            command, cwd=image, stdout=output, stderr=output, **tied(env)) as process:
        try:
            deadline = time.monotonic() + 120
            while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/", log.read_text())) or "ready:" not in (
                    log.read_text()):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.1)
            asking = [sys.executable, *(word.replace(":5001", f":{found[1]}") for word in check[1:])]
            assert subprocess.run(asking, cwd=image, timeout=30).returncode == 0
        finally:
            process.terminate()
    assert subprocess.run(asking, cwd=image, capture_output=True, timeout=30).returncode != 0, "nobody is there"


def test_the_worker_is_whole(image: Path) -> None:
    """All that it imports is in the image; without a Redis its check says no."""
    command = [sys.executable, "worker.py", "--broker", "redis://127.0.0.1:1", "--check"]
    done = subprocess.run(command, cwd=image, capture_output=True, text=True, env=clean_env(), timeout=60)
    assert done.returncode == 1 and "worker.py: " in done.stderr and "Traceback" not in done.stderr, done.stderr


# ---- several containers ----------------------------------------------------------------------------------------------


def test_compose_starts_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert set(services) == {"redis", "api", "worker"}
    assert services["redis"]["command"][1:3] == ["--appendonly", "yes"]
    for name in ("api", "worker"):
        given = read_command(services[name]["command"], monkeypatch)
        assert given.broker == "redis://redis:6379/0"
    assert read_command(services["worker"]["healthcheck"]["test"][1:], monkeypatch).check
    assert services["worker"]["image"] == services["api"]["image"] and services["api"]["build"] == "."
    assert services["api"]["environment"]["FACES_API_KEY"].startswith("${FACES_API_KEY:?"), "no key, no start"


def test_kubernetes_runs_the_same_and_scales_by_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "deploy" / "kubernetes.yaml").read_text(encoding="utf-8")
    found = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(text)}
    for (kind, _), one in found.items():
        assert one["apiVersion"] == {"Deployment": "apps/v1", "StatefulSet": "apps/v1",
                                     "HorizontalPodAutoscaler": "autoscaling/v2"}.get(kind, "v1")
        if kind in ("Deployment", "StatefulSet"):
            spec = one["spec"]["template"]
            assert one["spec"]["selector"]["matchLabels"] == spec["metadata"]["labels"]
            claimed = {volume["name"] for volume in spec["spec"].get("volumes", ())}
            claimed |= {claim["metadata"]["name"] for claim in one["spec"].get("volumeClaimTemplates", ())}
            (container,) = spec["spec"]["containers"]
            assert {mount["name"] for mount in container.get("volumeMounts", ())} <= claimed
    server, redis = found["Deployment", "faces"]["spec"], found["Service", "faces-redis"]
    assert server["replicas"] == 1 and server["strategy"] == {"type": "Recreate"}
    for name in ("faces", "faces-worker"):
        pod = found["Deployment", name]["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsUser"] == int(arguments_of("USER")[-1])
        given = read_command(pod["containers"][0]["args"], monkeypatch)
        assert given.broker == f"redis://{redis['metadata']['name']}:{redis['spec']['ports'][0]['port']}/0"
    pod = found["Deployment", "faces-worker"]["spec"]["template"]["spec"]
    assert read_command(pod["containers"][0]["readinessProbe"]["exec"]["command"], monkeypatch).check
    scaler = found["HorizontalPodAutoscaler", "faces-worker"]["spec"]
    assert ("Deployment", scaler["scaleTargetRef"]["name"]) in found
    (metric,) = scaler["metrics"]
    assert metric["external"]["metric"]["name"] == "faces_queue_length"
    monitoring = (ROOT / "core" / "web" / "monitoring.py").read_text(encoding="utf-8")
    assert '"faces_queue_length"' in monitoring, "the server tells this number"
