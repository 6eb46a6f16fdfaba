"""Assemble after training: the student's checkpoint with the trained weights in it, in the same form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import __version__
from ..checkpoint.manifest import MANIFEST_NAME, Manifest, Source, file_records
from ..checkpoint.reader import CheckpointReader
from ..checkpoint.shard import TensorEntry
from ..checkpoint.writer import (
    INDEX_NAME,
    ShardInfo,
    copy_side_files,
    fresh_staging,
    publish,
    save_index,
    write_shard,
)
from ..distillation.snapshots import BEST_NAME, LAYERS_NAME
from ..distillation.student import load_model
from ..errors import RecipeError
from ..model.experts import FactorisedExperts
from ..progress import Reporter


def publish_trained(
    student: Path, trained: Path, output: Path, provenance: dict[str, Any], outcome: dict[str, Any], reporter: Reporter
) -> None:
    """Publishes the trained checkpoint under its name, all of it at once.

    Tensors that transformers does not load (those of heads for speculative decoding, for instance) are copied from the
    student as they are.

    Args:
        student: the checkpoint that was trained.
        trained: folder of the best weights.
        output: where the trained checkpoint appears.
        provenance: what decided the weights.
        outcome: what the training says of itself.
        reporter: told of the stage.

    Raises:
        RecipeError: another checkpoint of ours stands there already.
    """
    reader = CheckpointReader(student)
    training = provenance | {key: outcome[key] for key in ("steps", "best_step")}
    with reporter.stage("assemble", 1) as stage:
        staging = fresh_staging(output)
        _write_model(reader, trained, staging)
        shards = _restore_untrained(reader, staging)
        save_index(staging, shards)
        copy_side_files(student, staging)
        manifest = _manifest(student, provenance, training, staging, shards)
        manifest.save(staging)
        if (output / MANIFEST_NAME).exists():
            if Manifest.load(output).text() != manifest.text():
                shutil.rmtree(staging)
                raise RecipeError(
                    f"output: {output} holds a checkpoint of another job; choose another folder or remove it"
                )
            shutil.rmtree(staging)
        else:
            publish(staging, output)
        stage.advance()


def _write_model(reader: CheckpointReader, trained: Path, staging: Path) -> None:
    """The whole model as transformers writes it."""
    model = load_model(reader.folder, "auto")
    weights = load_file(trained / BEST_NAME)
    layers = json.loads((trained / LAYERS_NAME).read_text())
    if layers is not None:
        model.config.quantization_config.layers = layers
        for experts in (module for module in model.modules() if isinstance(module, FactorisedExperts)):
            experts.forget_columns()
    with torch.no_grad():
        for name, weight in weights.items():
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            own = getattr(owner, leaf, None)
            if own is not None:
                own.copy_(weight)
            elif weight.is_floating_point():
                owner.register_parameter(leaf, nn.Parameter(weight.to(model.dtype)))
            else:
                owner.register_buffer(leaf, weight)
    model.save_pretrained(staging)
    (staging / INDEX_NAME).unlink(missing_ok=True)


def _restore_untrained(reader: CheckpointReader, staging: Path) -> list[ShardInfo]:
    """Puts the student's own bytes where nothing was trained, whatever transformers made of them."""
    shards: list[ShardInfo] = []
    written: set[str] = set()
    for path in sorted(staging.glob("*.safetensors")):
        tensors: dict[str, Tensor | TensorEntry] = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor, entry = file.get_tensor(name), reader.entries.get(name)
                tensors[name] = tensor
                if entry is not None:
                    is_same = torch.equal(entry.read().to(tensor.dtype), tensor)
                    tensors[name] = entry if is_same else tensor.to(entry.torch_dtype)
        written |= tensors.keys()
        shards.append(write_shard(path, tensors))
    rest = {name: entry for name, entry in reader.entries.items() if name not in written}
    return [*shards, write_shard(staging / "model-untrained.safetensors", rest)] if rest else shards


def _manifest(
    student: Path, provenance: dict[str, Any], training: dict[str, Any], staging: Path, shards: list[ShardInfo]
) -> Manifest:
    files = file_records(staging, shards)
    if (student / MANIFEST_NAME).exists():
        return Manifest.load(student).model_copy(update={"files": files, "training": training, "levels": {}})
    return Manifest(
        tool_version=__version__,
        source=Source(name=student.resolve().name, digest=provenance["student_digest"]),
        recipe={},
        layers={},
        parameters={},
        files=files,
        training=training,
    )
