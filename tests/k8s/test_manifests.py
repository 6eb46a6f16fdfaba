"""Every overlay against the schemas of KubeRay and Kubernetes, the operator's own rules, and ours."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from moe_compress.recipe import parse_recipe
from tests.k8s.render import K8S, ROOT, Document, in_bytes, of_kind, pods, ray_cluster, ray_templates, render

SCHEMAS = Path(os.environ.get("KUBERAY_SCHEMAS", ROOT.parent / "shared" / "kuberay-schemas"))
OBJECT_STORE = 0.3
"""Ray's share of a container's memory."""

LEAST_PRIORITY = -10
"""Of pods for which Cluster Autoscaler adds nodes: its --expendable-pods-priority-cutoff, unless it is told another."""

RAY = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


FILES = yaml.safe_load((K8S / "files.yaml").read_text())
"""The pod that holds the volume."""


@pytest.fixture(scope="module")
def setup() -> list[Document]:
    return render(K8S / "setup")


def the_job(documents: list[Document]) -> Document:
    """The RayJob; the test is skipped for clusters that stay."""
    if not of_kind(documents, "RayJob"):
        pytest.skip("a cluster without a job")
    (job,) = of_kind(documents, "RayJob")
    return job


def the_recipe(documents: list[Document]) -> dict[str, Any]:
    (config,) = of_kind(documents, "ConfigMap")
    recipe: dict[str, Any] = yaml.safe_load(config["data"]["recipe.yaml"])
    return recipe


def number(template: Document, resource: str) -> int:
    return int(template["spec"]["containers"][0]["resources"]["limits"].get(resource, 0))


# --- schemas ---------------------------------------------------------------------------------------------------------


def test_kuberay_knows_every_field(documents: list[Document]) -> None:
    if not SCHEMAS.is_dir():
        pytest.skip("KUBERAY_SCHEMAS names no folder of schemas")
    (found,) = of_kind(documents, "RayCluster", "RayJob")
    schema = json.loads((SCHEMAS / f"{found['kind'].lower()}.v1.schema.json").read_text())
    errors = [f"{error.json_path}: {error.message[:200]}" for error in Draft202012Validator(schema).iter_errors(found)]
    assert not errors


def test_kubernetes_knows_every_field(documents: list[Document], setup: list[Document]) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    rest = [document for document in documents if document["kind"] not in ("RayCluster", "RayJob")]
    for document in (*rest, *setup, FILES, *pods(documents)):
        validate.validate(document, validate.latest_version(), strict=True)


# --- rules of the operator that are not in its schemas ---------------------------------------------------------------


def test_names(documents: list[Document]) -> None:
    (found,) = of_kind(documents, "RayCluster", "RayJob")
    name = found["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= {"RayJob": 47, "RayCluster": 53}[found["kind"]]


def test_jobs(documents: list[Document]) -> None:
    spec = the_job(documents)["spec"]
    assert ("rayClusterSpec" in spec) != ("clusterSelector" in spec)
    assert spec["submissionMode"] == "K8sJobMode"  # the one with a submitter whose security is ours to set
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] >= 0
    assert spec["backoffLimit"] > 0
    assert spec["submitterConfig"]["backoffLimit"] > 0
    assert 0 < spec["preRunningDeadlineSeconds"] < 24 * 3600  # GPUs are held while others are missing


def test_workers(documents: list[Document]) -> None:
    for group in ray_cluster(documents)["workerGroupSpecs"]:
        assert 0 < group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_head_runs_the_driver_alone(documents: list[Document]) -> None:
    parameters = ray_cluster(documents)["headGroupSpec"]["rayStartParams"]
    assert (parameters["num-cpus"], parameters["num-gpus"]) == ("0", "0")


def test_nodes_are_added_for_workers_of_low_priority(name: str, documents: list[Document]) -> None:
    classes = {each["metadata"]["name"]: each["value"] for each in of_kind(documents, "PriorityClass")}
    assert bool(classes) == (name == "together")
    assert all(LEAST_PRIORITY <= value < 0 for value in classes.values())
    for template in ray_templates(documents):
        assert template["spec"].get("priorityClassName") in (None, *classes)


def test_no_pod_is_used_again_for_another_node_of_the_autoscaler(documents: list[Document]) -> None:
    cluster = ray_cluster(documents)
    if not cluster.get("enableInTreeAutoscaling"):
        assert "autoscalerOptions" not in cluster
        return
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert all(template["spec"].get("restartPolicy", "Never") == "Never" for template in ray_templates(documents))


# --- versions --------------------------------------------------------------------------------------------------------


def test_one_image_with_the_ray_that_is_pinned(documents: list[Document]) -> None:
    cluster = ray_cluster(documents)
    (image,) = {container["image"] for pod in pods(documents) for container in pod["spec"]["containers"]}
    has_gpus = any(number(template, "nvidia.com/gpu") for template in ray_templates(documents))
    assert cluster["rayVersion"] == RAY
    assert image == f"moe-compress:{VERSION}-ray{RAY}-{'cuda' if has_gpus else 'cpu'}"


def test_the_token_of_ray_is_asked_for(documents: list[Document]) -> None:
    assert ray_cluster(documents)["authOptions"]["mode"] == "token"
    assert tuple(int(part) for part in RAY.split(".")) >= (2, 52, 0)


# --- pods ------------------------------------------------------------------------------------------------------------


def test_pods_have_no_rights(documents: list[Document], setup: list[Document]) -> None:
    (namespace,) = of_kind(setup, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in (FILES, *pods(documents)):
        spec = pod["spec"]
        context = spec["securityContext"]
        assert context["runAsNonRoot"]
        assert context["runAsUser"] == context["runAsGroup"] == 1000
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_accounts_have_no_rights(documents: list[Document]) -> None:
    (account,) = of_kind(documents, "ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    assert not of_kind(documents, "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
    autoscaled = bool(ray_cluster(documents).get("enableInTreeAutoscaling"))
    for index, pod in enumerate(pods(documents)):
        # the account of the head is what the operator gives the autoscaler's role to
        expected = None if autoscaled and index == 0 else account["metadata"]["name"]
        assert pod["spec"].get("serviceAccountName") == expected


def test_only_the_autoscaler_sees_a_token_of_kubernetes(documents: list[Document]) -> None:
    for pod in pods(documents):
        tokens = {volume["name"] for volume in pod["spec"]["volumes"] if "projected" in volume}
        for container in pod["spec"]["containers"]:
            mounted = {mount["name"] for mount in container["volumeMounts"]} & tokens
            assert bool(mounted) == (container["name"] == "autoscaler")


def test_requests_are_limits(documents: list[Document]) -> None:
    for pod in pods(documents):
        for container in pod["spec"]["containers"]:
            resources = container["resources"]
            assert resources["requests"] == resources["limits"]
            assert {"cpu", "memory"} <= resources["limits"].keys()


def test_probes(documents: list[Document]) -> None:
    for template in ray_templates(documents):
        container = template["spec"]["containers"][0]
        for probe in ("livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}


def test_what_is_written_to_is_a_volume(documents: list[Document]) -> None:
    for pod in pods(documents):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for container in pod["spec"]["containers"]:
            mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
            home = {entry["name"]: entry["value"] for entry in container["env"]}["HOME"]
            assert mounts[home]["emptyDir"] == {}
            assert "/tmp" in mounts


def test_the_object_store_fits_its_memory(documents: list[Document]) -> None:
    for template in ray_templates(documents):
        container = template["spec"]["containers"][0]
        (name,) = {mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"}
        (volume,) = (volume["emptyDir"] for volume in template["spec"]["volumes"] if volume["name"] == name)
        memory = in_bytes(container["resources"]["limits"]["memory"])
        assert volume["medium"] == "Memory"
        assert OBJECT_STORE * memory <= in_bytes(volume["sizeLimit"]) < memory / 2


def test_gpus_are_tolerated_where_they_are_asked_for(documents: list[Document]) -> None:
    for template in ray_templates(documents):
        tolerated = {toleration["key"] for toleration in template["spec"]["tolerations"]}
        assert ("nvidia.com/gpu" in tolerated) == bool(number(template, "nvidia.com/gpu"))


def test_no_secret_is_written_down(documents: list[Document], setup: list[Document]) -> None:
    assert not of_kind([*documents, *setup], "Secret")
    for pod in pods(documents):
        for container in pod["spec"]["containers"]:
            for entry in container["env"]:
                assert "value" not in entry or not re.search("TOKEN|KEY|SECRET|PASSWORD", entry["name"])


def test_claims_outlive_what_is_deleted_with_an_overlay(documents: list[Document], setup: list[Document]) -> None:
    assert not of_kind(documents, "PersistentVolumeClaim", "Namespace")
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in pods(documents)
        for volume in pod["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    (claim,) = of_kind(setup, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["metadata"]["name"] in claims <= {claim["metadata"]["name"], "moe-compress-bucket"}


# --- network ---------------------------------------------------------------------------------------------------------


def selects(policy: Document, labels: dict[str, str]) -> bool:
    return policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


def test_every_pod_is_behind_the_policy(documents: list[Document]) -> None:
    (policy,) = (each for each in of_kind(documents, "NetworkPolicy") if each["metadata"]["name"] == "moe-compress")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert all(selects(policy, pod["metadata"]["labels"]) for pod in pods(documents))
    assert "ipBlock" not in json.dumps(policy)


def test_ways_out_are_explicit(name: str, documents: list[Document]) -> None:
    ways = {policy["metadata"]["name"] for policy in of_kind(documents, "NetworkPolicy")} - {"moe-compress"}
    expected = {
        "gpu": {"moe-compress-egress"},
        "kueue": {"moe-compress-egress"},
        "autoscaling": {"moe-compress-autoscaler"},
        "together": {"moe-compress-egress", "moe-compress-autoscaler"},
    }
    assert ways == expected.get(name, set())


def test_the_way_to_the_api_is_the_heads(documents: list[Document]) -> None:
    for policy in of_kind(documents, "NetworkPolicy"):
        if policy["metadata"]["name"] == "moe-compress-autoscaler":
            labels = next(pods(documents))["metadata"]["labels"]
            assert selects(policy, labels | {"ray.io/node-type": "head"})
            assert not selects(policy, labels | {"ray.io/node-type": "worker"})


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_the_recipe_runs_where_the_job_runs(documents: list[Document]) -> None:
    job = the_job(documents)
    recipe = parse_recipe(the_recipe(documents))
    (group,) = ray_cluster(documents)["workerGroupSpecs"]
    gpus = group["replicas"] * number(group["template"], "nvidia.com/gpu")
    assert recipe.cluster.address == "auto"
    assert recipe.cluster.layer_workers in (gpus, None)
    mounts = [
        {mount["mountPath"] for mount in template["spec"]["containers"][0]["volumeMounts"]}
        for template in ray_templates(documents)
    ]
    texts = [path for part in (recipe.calibration, recipe.evaluation) if part for path in part.text]
    for path in (recipe.output, recipe.model, *map(str, texts)):
        if path.startswith("/"):
            assert all(f"/{path.split('/')[1]}" in each for each in mounts), path
    module, file = re.fullmatch(r"python -m (\S+) (\S+)", job["spec"]["entrypoint"]).groups()
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists()
    assert str(Path(file).parent) in mounts[0]


def test_the_head_reads_the_recipe_that_is_applied(documents: list[Document]) -> None:
    the_job(documents)
    (config,) = of_kind(documents, "ConfigMap")
    head = ray_templates(documents)[0]["spec"]
    (mounted,) = (volume["configMap"]["name"] for volume in head["volumes"] if "configMap" in volume)
    assert mounted == config["metadata"]["name"] != "recipe"


def test_jobs_wait_in_a_queue_where_they_are_told_to(name: str, documents: list[Document]) -> None:
    (found,) = of_kind(documents, "RayCluster", "RayJob")
    queued = "kueue.x-k8s.io/queue-name" in found["metadata"].get("labels", {})
    assert queued == (name in ("kueue", "together"))


def test_no_manifest_suspends(documents: list[Document]) -> None:
    """Kueue does when a job is made, and lets it go: applied again, a manifest that says so stops the job."""
    (found,) = of_kind(documents, "RayCluster", "RayJob")
    assert "suspend" not in found["spec"]
    assert "suspend" not in ray_cluster(documents)
