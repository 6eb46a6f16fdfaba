"""Compress: the shards of the output, written side by side into the job folder."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from ..executor import Executor, Ref
from ..job import Job
from ..model.expert_bank import GROUPS
from ..model.experts import slots_of
from ..progress import Reporter
from .allocate import Ranks
from .prepare import Prepared
from .units import Workplace, copy_tensors, factorise_group


def compress_layers(
    job: Job,
    prepared: Prepared,
    place: Workplace,
    ranks: Ranks,
    executor: Executor,
    reporter: Reporter,
) -> list[Path]:
    """Writes every shard of the output into the job folder: one a group of a layer, and the untouched rest."""
    skeleton, reader = prepared.skeleton, prepared.reader
    based = prepared.recipe.method.base != "none"
    folder = job.place("shards", place.spectra.name, sorted((p, g, r) for (p, g), r in ranks.items()))
    owned = {s for layer in prepared.layers for name in layer.owned for s in skeleton.targets[name]}
    rest: dict[Path, list[str]] = defaultdict(list)
    for name, entry in reader.entries.items():
        if name not in owned:
            rest[entry.file].append(name)
    total = len(ranks) + len(rest)
    targets = [folder / f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    refs: list[Ref] = []
    for target, names in zip(targets, rest.values(), strict=False):
        refs.append(executor.submit(copy_tensors, reader.folder, names, target))
    left = iter(targets[len(rest) :])
    for layer in prepared.layers:
        for group in GROUPS:
            chosen = ranks[layer.path, group]
            spec = {slot: {"ranks": r, "base": based} for slot, r in chosen.items()}
            parameters = [n for slot in slots_of(spec, layer.up_shape[0], *layer.down_shape) for n in slot.shapes()]
            on_disk = skeleton.disk_names(layer, parameters)
            refs.append(executor.submit(factorise_group, place, layer.path, group, chosen, on_disk, next(left)))
    with reporter.stage("compress", len(refs)) as stage:
        for _ in executor.results(refs):
            stage.advance()
    return targets
