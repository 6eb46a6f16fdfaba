"""Renders the manifests as `kubectl apply -k` would, and finds what is in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"

Document = dict[str, Any]


def tool(name: str) -> str:
    """A program beside this Python or on the PATH; the test is skipped where there is none."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip(f"no {name} here")
    return found


def render(folder: Path) -> list[Document]:
    """The documents of a kustomization, in the order of their kinds and names."""
    done = subprocess.run([tool("kubectl"), "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    documents: list[Document] = list(yaml.safe_load_all(done.stdout))
    return sorted(documents, key=lambda document: (document["kind"], document["metadata"]["name"]))


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    return [document for document in documents if document["kind"] in kinds]


def ray_cluster(documents: list[Document]) -> Document:
    """Spec of the cluster, its own or a job's."""
    (found,) = of_kind(documents, "RayCluster", "RayJob")
    spec: Document = found["spec"]
    return spec["rayClusterSpec"] if found["kind"] == "RayJob" else spec


def ray_templates(documents: list[Document]) -> list[Document]:
    """Pod templates of the head and of each group of workers."""
    cluster = ray_cluster(documents)
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def pods(documents: list[Document]) -> Iterator[Document]:
    """Every pod there will be, the operator's autoscaler among the containers of the head."""
    templates = ray_templates(documents)
    (found,) = of_kind(documents, "RayCluster", "RayJob")
    if found["kind"] == "RayJob":
        templates.append(found["spec"]["submitterPodTemplate"])
    autoscaler = ray_cluster(documents).get("autoscalerOptions")
    for index, template in enumerate(templates):
        containers = list(template["spec"]["containers"])
        if index == 0 and autoscaler is not None:
            options = {key: value for key, value in autoscaler.items() if key in _OF_A_CONTAINER}
            containers.append({"name": "autoscaler", "image": containers[0]["image"], **options})
        yield {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"pod-{index}", **template["metadata"]},
            "spec": {**template["spec"], "containers": containers},
        }


_OF_A_CONTAINER = ("resources", "securityContext", "env", "envFrom", "volumeMounts")


def in_bytes(quantity: str) -> float:
    """Bytes of a Kubernetes quantity such as 16Gi."""
    exponents = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40}
    return float(quantity[:-2]) * 2 ** exponents[quantity[-2:]]
