"""The units of work of methods that keep fewer experts: similarity, alignment, merged shards with their diagnostics."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from ..calibration.statistics import SAMPLED, LayerStatistics
from ..calibration.worker import pick_device, statistics_path
from ..checkpoint.shard import load_tensors
from ..checkpoint.writer import ShardInfo, describe_shard, write_shard
from ..linalg.alignment import apply_permutation, channel_features
from ..linalg.similarity import cosine, gram_cosine, linear_cka, sum_of_grams
from ..linalg.stable_rank import stable_rank
from ..method_options import Merge
from ..methods.merge import Grouping, align_activations, align_expert, expert_weights, merge_weights, shares
from ..methods.router_repair import fit_rows
from ..model.discovery import MoELayer
from ..model.expert_bank import GROUPS, bias_name, hidden_activations, stock_name, to_canonical, to_stock
from ..model.routing import router_weight
from .units import open_checkpoint, write_table

WEIGHT_FREE = ("router_logits", "input_features", "random")
"""Similarities that need no weights: the driver has them from the statistics."""

_SHARED_TOKENS = 256
"""Calibration tokens that all experts of a layer are compared on."""


@dataclass(frozen=True, slots=True)
class MergePlace:
    """Where the units find their inputs and leave their files.

    Attributes:
        checkpoint: folder of the original.
        statistics, similarity, alignment, diagnostics: folders of those artifacts.
        options: how to merge.
        device: torch device, or `auto`.
    """

    checkpoint: Path
    statistics: Path
    similarity: Path
    alignment: Path
    diagnostics: Path
    options: Merge
    device: str


@dataclass(frozen=True, slots=True)
class RouterChange:
    """What becomes of a layer's router.

    Attributes:
        kept: experts whose rows stay, ascending; empty where the router stays as it is.
        axes: the router's tensors by name in memory, and the axis of each that counts experts.
        map_name: name on disk of the map from router id to stored expert; empty where there is none.
    """

    kept: list[int] = field(default_factory=list)
    axes: dict[str, int] = field(default_factory=dict)
    map_name: str = ""


def similarity_path(folder: Path, path: str) -> Path:
    """File of the similarity of one layer's experts."""
    return folder / f"{path}.safetensors"


def order_path(folder: Path, path: str, expert: int, leader: int) -> Path:
    """File of the channel order that aligns one expert with another."""
    return folder / f"{path}.{expert}-to-{leader}.safetensors"


def diagnostics_path(folder: Path, path: str) -> Path:
    """File of what became of the merged experts of one layer."""
    return folder / f"{path}.parquet"


class _Layer:
    """A layer's experts, loaded: the module, and its tensors in canonical layout."""

    def __init__(self, checkpoint: Path, path: str, device: str) -> None:
        skeleton, layers = open_checkpoint(checkpoint)
        self.layer: MoELayer = layers[path]
        self.module: Any = deepcopy(skeleton.model.get_submodule(path))  # on the meta device: costs nothing
        self.tensors: dict[str, Tensor] = {}
        for name, _ in list(self.module.named_parameters()):
            tensor = skeleton.take(f"{path}.{name}").to(pick_device(device))
            parent, _, leaf = name.rpartition(".")
            setattr(self.module.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
        for group in GROUPS:
            self.tensors[group] = to_canonical(self.layer, group, getattr(self.module, stock_name(self.layer, group)))
            if self.layer.has_bias:
                bias = getattr(self.module, bias_name(self.layer, group))
                self.tensors[f"{group}_bias"] = to_canonical(self.layer, group, bias)

    @torch.no_grad()
    def outputs(self, hidden_TD: Tensor) -> Tensor:
        """(E, T, D) what every expert makes of the same tokens."""
        ones = torch.ones(len(hidden_TD), 1, dtype=hidden_TD.dtype, device=hidden_TD.device)
        ids = ones.long()
        return torch.stack([self.module(hidden_TD, ids * e, ones) for e in range(self.layer.num_experts)])


def measure_similarity(place: MergePlace, path: str) -> None:
    """Writes how alike a layer's experts are, for the kinds that need their weights."""
    target = similarity_path(place.similarity, path)
    if target.exists():
        return
    kind = place.options.similarity
    if kind == "router_weights":
        skeleton, layers = open_checkpoint(place.checkpoint)
        similarity = cosine(skeleton.take(router_weight(skeleton.model, layers[path])).float())
    else:
        loaded = _Layer(place.checkpoint, path, place.device)
        if kind == "expert_weights":
            similarity = gram_cosine(sum_of_grams([loaded.tensors[group].flatten(1) for group in GROUPS]))
        else:
            statistics = LayerStatistics.load(loaded.layer, statistics_path(place.statistics, path), SAMPLED)
            outputs_ETD = loaded.outputs(_shared_tokens(statistics, loaded))
            similarity = linear_cka(outputs_ETD) if kind == "cka" else cosine(outputs_ETD.float().mean(1))
    write_shard(target, {"similarity": similarity.cpu()})


def _shared_tokens(statistics: LayerStatistics, loaded: _Layer) -> Tensor:
    hidden_TD = statistics["sample_hidden"][:_SHARED_TOKENS]
    return hidden_TD.to(loaded.tensors["up"].device, loaded.tensors["up"].dtype)


def align_members(place: MergePlace, path: str, pairs: list[tuple[int, int]]) -> None:
    """Writes the channel order of each expert that brings it closest to the leader of its group.

    Args:
        place: inputs.
        path: experts module.
        pairs: (expert, leader).
    """
    targets = {pair: order_path(place.alignment, path, *pair) for pair in pairs}
    if all(target.exists() for target in targets.values()):
        return
    loaded = _Layer(place.checkpoint, path, place.device)
    if place.options.align == "activations":
        statistics = LayerStatistics.load(loaded.layer, statistics_path(place.statistics, path), SAMPLED)
        hidden_TD = _shared_tokens(statistics, loaded)
    for (expert, leader), target in targets.items():
        if place.options.align == "activations":
            order = align_activations(
                hidden_activations(loaded.layer, loaded.module, expert, hidden_TD),
                hidden_activations(loaded.layer, loaded.module, leader, hidden_TD),
            )
        else:
            order = align_expert(loaded.layer, loaded.tensors, expert, leader)
        write_shard(target, {"order": order})


def read_orders(place: MergePlace, path: str, grouping: Grouping) -> dict[int, Tensor]:
    """Expert -> its channel order, of those that are merged."""
    if place.options.align == "none":
        return {}
    return {
        expert: load_tensors(order_path(place.alignment, path, expert, grouping.leader_of[expert]))["order"]
        for expert in grouping.merged
    }


def merge_layer(place: MergePlace, path: str, grouping: Grouping, router: RouterChange, target: Path) -> ShardInfo:
    """Writes a layer's merged experts, and its router where that changes, as a shard of the output."""
    report = diagnostics_path(place.diagnostics, path)
    if target.exists() and report.exists():
        return describe_shard(target)
    skeleton, _ = open_checkpoint(place.checkpoint)
    loaded = _Layer(place.checkpoint, path, place.device)
    layer = loaded.layer
    used = ("num_tokens", "saliency_sum", "up_fisher", "down_fisher", *SAMPLED)
    statistics = LayerStatistics.load(layer, statistics_path(place.statistics, path), used)
    orders = read_orders(place, path, grouping)
    stock: dict[str, Tensor] = {}
    merged: dict[str, Tensor] = {}
    for group in GROUPS:
        share_E = shares(statistics, place.options.weights, group)
        for key, name in ((group, stock_name(layer, group)), (f"{group}_bias", bias_name(layer, group))):
            if key in loaded.tensors:
                merged[key] = merge_weights(layer, group, loaded.tensors[key], grouping, share_E, orders)
                stock[name] = to_stock(layer, group, merged[key])
    write_table(report, _diagnose(loaded, statistics, grouping, orders, merged, stock))
    tensors = skeleton.on_disk({f"{path}.{name}": tensor.cpu() for name, tensor in stock.items()})
    fitted = _fitted_rows(place, path, statistics, grouping) if router.axes else {}
    tensors |= change_router(place.checkpoint, grouping, router, fitted)
    return write_shard(target, tensors)


def _fitted_rows(place: MergePlace, path: str, statistics: LayerStatistics, grouping: Grouping) -> dict[str, Tensor]:
    """The router's weight fitted to the groups, by name in memory; empty where the leaders' rows are to stay."""
    if place.options.repair != "logsumexp" or "sample_logits" not in statistics:
        return {}
    skeleton, layers = open_checkpoint(place.checkpoint)
    name = router_weight(skeleton.model, layers[path])
    weight_ED = skeleton.take(name)
    rows = fit_rows(weight_ED, statistics["sample_hidden"], statistics["sample_logits"], grouping)
    return {} if rows is None else {name: rows.to(weight_ED.dtype)}


def prune_layer(checkpoint: Path, path: str, grouping: Grouping, router: RouterChange, target: Path) -> ShardInfo:
    """Writes the experts of a layer that stay, and its router, as a shard of the output."""
    if target.exists():
        return describe_shard(target)
    skeleton, layers = open_checkpoint(checkpoint)
    layer, rows = layers[path], torch.tensor(grouping.leaders)
    names = [stock_name(layer, group) for group in GROUPS]
    if layer.has_bias:
        names += [bias_name(layer, group) for group in GROUPS]
    kept = {f"{path}.{name}": skeleton.take(f"{path}.{name}").index_select(0, rows) for name in names}
    return write_shard(target, skeleton.on_disk(kept) | change_router(checkpoint, grouping, router))


def change_router(
    checkpoint: Path, grouping: Grouping, router: RouterChange, fitted: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The router's tensors that change, by name on disk; `fitted` ones instead of the leaders' rows."""
    skeleton, _ = open_checkpoint(checkpoint)
    found: dict[str, Tensor] = {}
    if router.map_name:
        found[router.map_name] = torch.tensor(grouping.expert_map)
    if router.axes:
        rows = torch.tensor(router.kept)
        shorter = {name: skeleton.take(name).index_select(axis, rows) for name, axis in router.axes.items()}
        found |= skeleton.on_disk(shorter | (fitted or {}))
    return found


def _diagnose(
    loaded: _Layer,
    statistics: LayerStatistics,
    grouping: Grouping,
    orders: dict[int, Tensor],
    merged: dict[str, Tensor],
    stock: dict[str, Tensor],
) -> pa.Table:
    """One row a merged expert: how alike it was to its leader, what alignment gained, stable rank before and after.

    `merge_error` is the layer's: squared error of the routed experts' output over its square, on calibration tokens.
    """
    layer, experts = loaded.layer, grouping.merged
    cka = linear_cka(loaded.outputs(_shared_tokens(statistics, loaded)))
    ranks = {group: stable_rank(loaded.tensors[group]) for group in GROUPS}
    ranks_after = {group: stable_rank(merged[group]) for group in GROUPS}
    place, leader_of = grouping.expert_map, grouping.leader_of
    rows: dict[str, list[Any]] = {
        "layer": [layer.path] * len(experts),
        "expert": experts,
        "leader": [leader_of[e] for e in experts],
        "cka": [float(cka[e, leader_of[e]]) for e in experts],
    }
    for name, own_orders in (("distance_before", {}), ("distance_after", orders)):
        rows[name] = [_distance(loaded, e, leader_of[e], own_orders.get(e)) for e in experts]
    for group in GROUPS:
        rows[f"{group}_stable_rank"] = [float(ranks[group][e]) for e in experts]
        rows[f"{group}_stable_rank_change"] = [float(ranks_after[group][place[e]] / ranks[group][e]) for e in experts]
    rows["merge_error"] = [_merge_error(loaded, statistics, grouping, stock)] * len(experts)  # takes the module over
    return pa.table(rows)


def _distance(loaded: _Layer, expert: int, leader: int, order_F: Tensor | None) -> float:
    """Frobenius distance of an expert's weights to its leader's, over the leader's norm."""
    own = expert_weights(loaded.layer, expert, loaded.tensors)
    if order_F is not None:
        own = apply_permutation(own, order_F.to(own.up_FD.device))
    reference = channel_features(expert_weights(loaded.layer, leader, loaded.tensors))
    return float((channel_features(own) - reference).norm() / reference.norm())


@torch.no_grad()
def _merge_error(loaded: _Layer, statistics: LayerStatistics, grouping: Grouping, stock: dict[str, Tensor]) -> float:
    device, dtype = loaded.tensors["up"].device, loaded.tensors["up"].dtype
    hidden = statistics["sample_hidden"].to(device, dtype)
    index = statistics["sample_index"].to(device, torch.int64)
    weights = statistics["sample_weights"].to(device, dtype)
    module = loaded.module
    before = module(hidden, index, weights)
    for name, tensor in stock.items():
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    module.num_experts = len(grouping.leaders)
    after = module(hidden, torch.tensor(grouping.expert_map, device=device)[index], weights)
    return float((after - before).float().square().sum() / before.float().square().sum().clamp_min(1e-30))
