"""The image: clean, without root, of the versions that the tests run with, and built from what it needs."""

from __future__ import annotations

import re
import subprocess

from tests.k8s.render import K8S, ROOT, tool

DOCKERFILE = (K8S / "image" / "Dockerfile").read_text()


def test_hadolint() -> None:
    done = subprocess.run([tool("hadolint"), str(K8S / "image" / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_versions_come_from_the_constraints() -> None:
    installs = re.findall(r"pip install (.*)", DOCKERFILE)
    assert len(installs) == 3
    for arguments in installs:
        assert "--no-cache-dir --constraint /src/constraints.txt" in arguments
        assert "==" not in arguments
    assert re.search(r"^ARG BASE=python:3\.11\.\d+-slim-\w+$", DOCKERFILE, re.MULTILINE)


def test_it_runs_as_the_user_of_the_pods() -> None:
    cluster = (K8S / "base" / "raycluster" / "raycluster.yaml").read_text()
    (user,) = re.findall(r"runAsUser: (\d+)", cluster)
    (group,) = re.findall(r"runAsGroup: (\d+)", cluster)
    assert re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE) == [f"{user}:{group}"]
    assert f"--uid {user}" in DOCKERFILE


def test_it_sees_the_gpus_that_it_is_given() -> None:
    assert "NVIDIA_VISIBLE_DEVICES" not in DOCKERFILE  # pods that ask for none would see all of a node


def test_the_build_sees_what_it_needs() -> None:
    lines = (K8S / "image" / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert lines[1] == "*"
    assert all((ROOT / path).exists() for path in allowed)
    packages = re.search(r"include = \[(.*)\]", (ROOT / "pyproject.toml").read_text())[1]
    assert allowed == {
        *re.findall(r'"(\w+)\*"', packages),
        *("pyproject.toml", "constraints.txt", "README.md", "LICENSE"),
    }
