"""What the plan says a job takes, against what the manifests give it: memory, disk, and the hours of the README."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import pytest

from moe_compress.plan import Plan, make_plan
from moe_compress.plan.machine import machine_of
from moe_compress.recipe import Recipe, load_recipe
from tests.k8s.render import K8S, Document, in_bytes, of_kind, ray_cluster, ray_templates, render
from tests.k8s.test_documents import README
from tests.k8s.test_manifests import OBJECT_STORE, number
from tests.plan.published_models import FOLDER

PARAMETERS = {"Mixtral-8x7B-v0.1": 46.7e9, "Qwen3-30B-A3B": 30.5e9, "OLMoE-1B-7B-0924": 6.9e9}
"""Of the overlays' models, as their makers say."""

GPU = "h100"


@dataclass(frozen=True)
class Sized:
    """The job of an overlay: its recipe, a pod of its workers, how many of them there are, and its plan."""

    name: str
    recipe: Recipe
    template: Document
    num_pods: int
    plan: Plan

    def limit(self, resource: str) -> float:
        return in_bytes(self.template["spec"]["containers"][0]["resources"]["limits"][resource])


@pytest.fixture(scope="module", params=["cpu", "gpu", "object-storage", "distill"])
def job(request: pytest.FixtureRequest) -> Sized:
    name = str(request.param)
    (group,) = ray_cluster(render(K8S / "overlays" / name))["workerGroupSpecs"]
    template, num_pods = group["template"], group["replicas"]
    path = K8S / "overlays" / name / "recipe.yaml"
    recipe = load_recipe(path)
    planned = load_recipe(path, [f"model={FOLDER / Path(recipe.model).name}"])
    if gpus := number(template, "nvidia.com/gpu"):  # a pod is what the plan calls a node
        plan = make_plan(planned, machine_of(GPU, gpus * num_pods, [f"node_gpus={gpus}"]))
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "cpu_count", lambda: number(template, "cpu") * num_pods)
            plan = make_plan(planned)
    return Sized(name, recipe, template, num_pods, plan)


def test_models_have_their_size(job: Sized) -> None:
    published = PARAMETERS[Path(job.recipe.model).name]
    assert sum(part.parameters for part in job.plan.parts) == pytest.approx(published, rel=0.01)


def test_gpus_are_asked_for_whether_their_pods_are_up_or_not(job: Sized) -> None:
    assert job.recipe.cluster.device == ("cuda" if number(job.template, "nvidia.com/gpu") else "auto")


def test_processes_fit_their_pod(job: Sized) -> None:
    """Beside Ray's object store; on GPUs what lies in the memory of the node, and all else on the GPU."""
    memory = job.limit("memory")
    room, gpus = (1 - OBJECT_STORE) * memory, number(job.template, "nvidia.com/gpu")
    assert job.plan.problems == []
    if job.plan.cluster is None:
        slots = number(job.template, "cpu") // job.recipe.cluster.threads
        of_workers = {process: parts for process, parts in job.plan.memory_bytes.items() if process != "driver"}
        assert slots * max(sum(parts.values()) for parts in of_workers.values()) <= room
        return
    assert gpus * job.num_pods == job.plan.cluster.num_gpus
    assert job.plan.cluster.warnings == []
    assert job.plan.cluster.node_bytes <= room
    assert job.plan.cluster.store_bytes <= OBJECT_STORE * memory
    if (training := job.plan.training) is not None:
        processes = ceil(training.num_processes / job.num_pods)
        assert processes == gpus
        assert processes * training.host_bytes + training.first_process_bytes <= room
        assert training.warnings == []


def test_the_volume_has_room_for_any_of_the_jobs(job: Sized) -> None:
    (claim,) = of_kind(render(K8S / "setup"), "PersistentVolumeClaim")
    left = sum(job.plan.disk_bytes.values())
    if job.plan.training is not None:
        left += sum(job.plan.training.disk_bytes.values())
    if not job.recipe.model.startswith("/bucket/"):
        left += sum(part.num_bytes for part in job.plan.parts)
    assert left <= in_bytes(claim["spec"]["resources"]["requests"]["storage"])


def test_the_cache_leaves_half_of_the_disk_to_what_ray_spills(documents: list[Document]) -> None:
    for template in ray_templates(documents):
        container = template["spec"]["containers"][0]
        (cache,) = (entry["value"] for entry in container["env"] if entry["name"] == "MOE_COMPRESS_CACHE_GB")
        assert 0 < float(cache) * 1e9 <= in_bytes(container["resources"]["limits"]["ephemeral-storage"]) / 2


def test_the_hours_of_the_readme() -> None:
    """Those of the command that stands there."""
    found = re.search(
        r"plan (k8s/\S+) --gpus (\d+) --gpu (\w+)`.*?: for this job (\S+) h and (\S+) GPU-hours", README, re.S
    )
    assert found is not None
    path, num_gpus, gpu, hours, gpu_hours = found.groups()
    recipe = load_recipe(K8S.parent / path)
    planned = load_recipe(K8S.parent / path, [f"model={FOLDER / Path(recipe.model).name}"])
    cluster = make_plan(planned, machine_of(gpu, int(num_gpus))).cluster
    assert cluster is not None
    assert (f"{cluster.hours:.1f}", f"{cluster.gpu_hours:.1f}") == (hours, gpu_hours)
    assert next(stage.seconds for stage in cluster.stages if stage.name == "evaluate") > cluster.hours * 3600 / 2
