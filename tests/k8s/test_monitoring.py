"""What Prometheus is sent to ask and Grafana is given to show is what jobs tell."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest

from cluster.metrics import COUNTERS, GAUGES, exported_names
from tests.k8s.render import K8S, Document, of_kind, pods, ray_templates, render

METRICS_PORT = 8080
"""Of KubeRay; Ray serves its metrics there in pods."""


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    """A job with a cluster of its own that is watched."""
    folder = tmp_path_factory.mktemp("monitored")
    (folder / "recipe.yaml").write_text((K8S / "overlays" / "cpu" / "recipe.yaml").read_text())
    here = os.path.relpath(K8S.resolve(), folder.resolve())
    (folder / "kustomization.yaml").write_text(
        f"namespace: moe-compress\nresources: [{here}/base/raycluster]\n"
        f"components: [{here}/components/monitoring, {here}/base/rayjob]\n"
        "configMapGenerator: [{name: recipe, files: [recipe.yaml]}]\n"
    )
    return render(folder)


@pytest.fixture(scope="module")
def dashboard(documents: list[Document]) -> dict[str, Any]:
    (config,) = (each for each in of_kind(documents, "ConfigMap") if each["metadata"]["name"].endswith("dashboard"))
    assert config["metadata"]["labels"] == {"grafana_dashboard": "1"}
    found: dict[str, Any] = json.loads(config["data"]["dashboard.json"])
    return found


def queries(dashboard: dict[str, Any]) -> list[str]:
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return asked + [each["query"] for each in dashboard["templating"]["list"]]


def test_the_dashboard_shows_every_metric_and_no_other(dashboard: dict[str, Any]) -> None:
    named = {name for query in queries(dashboard) for name in re.findall(r"\bray_moe_compress\w+", query)}
    assert named == exported_names()


def test_the_dashboard_asks_by_labels_that_are_there(dashboard: dict[str, Any]) -> None:
    tags = {f"ray_{name}_total": tags for name, (_, tags) in COUNTERS.items()}
    tags |= {f"ray_{name}": tags for name, (_, tags) in GAUGES.items()}
    for query in queries(dashboard):
        used = {label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")}
        used |= set(re.findall(r"(\w+)=~", query)) | set(re.findall(r", (\w+)\)$", query))
        for name in re.findall(r"\bray_moe_compress\w+", query):
            assert used - {"ray_io_cluster"} <= set(tags[name]), query
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard))) <= variables


def test_counters_are_shown_as_rates_and_panels_side_by_side(dashboard: dict[str, Any]) -> None:
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            assert ("_total" in target["expr"]) == ("rate(" in target["expr"])
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in dashboard["panels"]})


def test_prometheus_finds_and_reaches_every_node(documents: list[Document]) -> None:
    (monitor,) = of_kind(documents, "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"
    (policy,) = (each for each in of_kind(documents, "NetworkPolicy") if "metrics" in each["metadata"]["name"])
    (rule,) = policy["spec"]["ingress"]
    assert rule["ports"] == [{"port": METRICS_PORT, "protocol": "TCP"}]
    for chosen in (monitor["spec"]["selector"], policy["spec"]["podSelector"]):
        assert all(
            chosen["matchLabels"].items() <= template["metadata"]["labels"].items()
            for template in ray_templates(documents)
        )


def test_kubernetes_knows_every_field(documents: list[Document]) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    known = [each for each in documents if each["kind"] not in ("RayJob", "PodMonitor")]
    for document in (*known, *pods(documents)):
        validate.validate(document, validate.latest_version(), strict=True)


def test_ports_are_left_to_kuberay(documents: list[Document]) -> None:
    """It adds those that nobody names, the one called metrics among them."""
    for template in ray_templates(documents):
        assert "ports" not in template["spec"]["containers"][0]
