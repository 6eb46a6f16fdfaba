"""Every kustomization of the repository, and one that puts all components together, rendered once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.k8s.render import K8S, Document, render

TOGETHER = ("gpu", "spot", "autoscaling", "object-storage", "egress", "../base/rayjob", "kueue")
"""Components side by side, in the order their files ask for."""

OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))


@pytest.fixture(scope="session", params=["shared", "together", *OVERLAYS])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def documents(name: str, tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    if name == "shared":
        return render(K8S / "base" / "raycluster")
    if name == "together":
        return render(_together(tmp_path_factory.mktemp("together")))
    return render(K8S / "overlays" / name)


def _together(folder: Path) -> Path:
    (folder / "recipe.yaml").write_text((K8S / "overlays" / "cpu" / "recipe.yaml").read_text())
    here = os.path.relpath(K8S.resolve(), folder.resolve())
    components = "".join(f"- {here}/components/{component}\n" for component in TOGETHER)
    (folder / "kustomization.yaml").write_text(
        f"namespace: moe-compress\nresources: [{here}/base/raycluster]\ncomponents:\n{components}"
        "configMapGenerator: [{name: recipe, files: [recipe.yaml]}]\n"
    )
    return folder
