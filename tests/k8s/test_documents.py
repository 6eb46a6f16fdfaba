"""What the documents tell a reader to apply and build is there, and what they name has the right version."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.k8s.render import K8S, ROOT
from tests.k8s.test_manifests import RAY, VERSION

README = (ROOT / "README.md").read_text()
NOTES = (K8S / "README.md").read_text()


@pytest.mark.parametrize("text", [README, NOTES], ids=["README", "notes"])
def test_what_is_applied_is_there(text: str) -> None:
    paths = re.findall(r"-[kf] (k8s/\S+?)`?(?=\s|$)", text)
    assert paths
    for path in paths:
        assert (ROOT / path).is_file() or (ROOT / path / "kustomization.yaml").exists(), path


def test_folders_of_the_notes() -> None:
    table = re.findall(r"^\| `([^`]+)` \|(.*)\|$", NOTES, re.MULTILINE)
    for path, _ in table:
        assert (K8S / path).exists(), path
    for folder in ("components", "overlays"):
        named = set(re.findall(r"`([\w-]+)`", dict(table)[f"{folder}/"]))
        assert named == {path.name for path in (K8S / folder).iterdir()}


def test_versions_in_the_documents() -> None:
    for path in (ROOT / "README.md", K8S / "README.md", K8S / "image" / "Dockerfile"):
        assert {f"{VERSION}-ray{RAY}"} >= set(re.findall(r"[\d.]+-ray[\d.]+\d", path.read_text())), path


def test_the_overlay_of_the_notes_names_what_is_there() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", NOTES, re.MULTILINE | re.DOTALL)
    overlay = yaml.safe_load(block)
    for path in (*overlay["resources"], *overlay["components"]):
        assert (K8S / "overlays" / "gpu" / path / "kustomization.yaml").exists(), path
