"""Opens a model to be planned: as a job would, and where a job could not, as far as its config.json goes.

A plan is wanted before anything is downloaded, and of checkpoints that must be converted first. So a folder of nothing
but config.json will do, with every tensor that the model class has; and of a quantised checkpoint, or one whose type
transformers knows by another name, the plan is that of the stock bf16 checkpoint it would be converted to. What a job
would refuse is told as a problem.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from ..checkpoint.reader import CONFIG_NAME, CheckpointReader, resolve_checkpoint
from ..checkpoint.writer import INDEX_NAME
from ..model.architecture import load_config, model_class_of
from ..model.plugin import METHOD

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}


@contextmanager
def open_layout(model: str) -> Iterator[tuple[CheckpointReader, list[str], int]]:
    """Opens the layout of a checkpoint; its folder may be a temporary one that goes with the context.

    Yields:
        (the checkpoint, what a job would refuse about it, layers for the prediction of further tokens that its config
        names and nothing else tells the size of).

    Raises:
        CheckpointError: it cannot even be planned.
    """
    folder = resolve_checkpoint(model, layout_only=True)
    config, problems = _stock(_read(folder / CONFIG_NAME))
    has_files = any(path.name == INDEX_NAME or path.suffix in _WEIGHTS for path in folder.iterdir())
    if not config or (has_files and not problems):
        yield CheckpointReader(folder, allow_missing_shards=True), [], 0
        return
    with TemporaryDirectory() as place:
        (Path(place) / CONFIG_NAME).write_text(json.dumps(config))
        _write_index(Path(place))
        yield CheckpointReader(place, allow_missing_shards=True), problems, config.get("num_nextn_predict_layers") or 0


def _read(path: Path) -> dict[str, Any]:
    """What config.json holds; nothing where opening the folder will say what is wrong with it."""
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _stock(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The config of the stock checkpoint in bf16, and what differs."""
    stock, problems = dict(config), []
    quantised = (stock.get("quantization_config") or {}).get("quant_method")
    if quantised not in (None, METHOD):
        blocks = stock.pop("quantization_config").get("weight_block_size")
        in_blocks = f" with scales of blocks of {' x '.join(map(str, blocks))}" if blocks else ""
        problems.append(
            f"quantization_config.quant_method: '{quantised}'{in_blocks} is not read; give the bf16 checkpoint it was"
            " made from, or convert it; the plan is of that"
        )
    kind = stock.get("model_type")
    if kind not in CONFIG_MAPPING and (known := _type_of_class(stock)) is not None:
        stock["model_type"] = known
        stock.pop("auto_map", None)
        problems.append(
            f"model_type: '{kind}' is not one of transformers' and remote code is not run; its architecture"
            f" {stock['architectures'][0]} is: set model_type: {known} in config.json and remove auto_map"
        )
    return stock, problems


def _type_of_class(config: dict[str, Any]) -> str | None:
    """The model type whose class `architectures` names."""
    import transformers

    names = config.get("architectures") or [""]
    found = getattr(getattr(transformers, names[0], None), "config_class", None)
    return None if found is None else str(found.model_type)


def _write_index(folder: Path) -> None:
    """An index of what the model class holds, under the names that the tensors have in memory."""
    _index(folder, {"unknown": 0})
    config = load_config(CheckpointReader(folder, allow_missing_shards=True))
    width = (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32).itemsize
    with torch.device("meta"):
        model = model_class_of(config)(config)
    tied = model.all_tied_weights_keys
    _index(folder, {name: t.numel() * width for name, t in model.state_dict().items() if name not in tied})


def _index(folder: Path, num_bytes: dict[str, int]) -> None:
    weight_map = dict.fromkeys(num_bytes, "model-00001-of-00001.safetensors")
    index = {"metadata": {"total_size": sum(num_bytes.values())}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index))
