"""Levels: one factorised checkpoint, of which a user reads as much as he likes.

An expert's factors lie strongest direction first, so at a higher ratio it is a prefix of them. On disk the packed
factors of a slot (`gate_up_u`, `gate_up_v` ...; rows by expert) are therefore in pieces: the smallest level's rows of
all experts under the usual name, and the rows that each larger level adds as a tensor of their own, `gate_up_u_level1`
and on. A level reads its pieces and those of the smaller ones; in memory they are in the order of the experts again.
Whole matrices, bases and everything else belong to all levels.

`quantization_config` names the levels by their ratios, the largest first: `levels: ["0.2", "0.3"]`. A slot's `ranks`
are those of the first, and `levels: {"0.3": [...]}` holds those of each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps

from ..checkpoint.shard import TensorEntry
from ..errors import CheckpointError

Pieces = list[list[int]]
"""Rows that each piece of a packed tensor holds of each expert, the smallest level's piece first."""

_PIECE = re.compile(r"_[uv]_level(\d+)$")


def level_names(config: dict[str, Any]) -> list[str]:
    """The levels that a checkpoint with this config.json has, the largest first."""
    names: list[str] = (config.get("quantization_config") or {}).get("levels", [])
    return names


def levels_read(names: list[str], wanted: str) -> list[str]:
    """The level `wanted` and the smaller ones: those whose pieces it reads.

    Raises:
        CheckpointError: there is no such level.
    """
    if wanted not in names:
        there = f"it has {', '.join(names)}" if names else "it has none, so leave it out"
        raise CheckpointError(f"level '{wanted}': the checkpoint has no such level; {there}")
    return names[names.index(wanted) :]


def spec_at(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """The specification of a layer at one level, without a word of others."""
    return {key: _slot_at(value, name) if isinstance(value, dict) else value for key, value in spec.items()}


def _slot_at(slot: dict[str, Any], name: str) -> dict[str, Any]:
    levels = slot.get("levels", {})
    rest = {key: value for key, value in slot.items() if key != "levels"}
    return rest | {"ranks": levels.get(name, slot["ranks"])}


def pieces_of(ranks: Iterable[list[int]]) -> Pieces:
    """The pieces that the factors of a slot lie in.

    Args:
        ranks: of the experts at each level, the largest first.
    """
    rows = [[max(rank, 0) for rank in of_level] for of_level in ranks]
    rows.append([0] * len(rows[0]))
    return [[more - less for more, less in zip(*pair, strict=True)] for pair in pairwise(rows)][::-1]


def factor_names(slot: str) -> tuple[str, str]:
    """Names of the packed tensors of a slot, which lie in pieces."""
    return f"{slot}_u", f"{slot}_v"


def piece_names(name: str, num_pieces: int) -> list[str]:
    """Names of the pieces of the packed tensor `name`; the first has the tensor's own."""
    return [name, *(f"{name}_level{position}" for position in range(1, num_pieces))]


def piece_position(name: str) -> int:
    """Which piece of a packed tensor the tensor `name` is; 0 for what all levels read."""
    found = _PIECE.search(name)
    return int(found[1]) if found else 0


def later_pieces(num_read: int, num_pieces: int) -> str:
    """Matches the names of the pieces that a level of `num_read` pieces leaves out, where there are any."""
    return rf"_[uv]_level(?:{'|'.join(map(str, range(num_read, num_pieces)))})$"


def entries_read(entries: Iterable[TensorEntry], num_read: int) -> list[TensorEntry]:
    """The tensors of a checkpoint that a level of `num_read` pieces reads."""
    return [entry for entry in entries if piece_position(entry.name) < num_read]


def split_rows(packed: Tensor, pieces: Pieces) -> list[Tensor]:
    """The pieces of a packed tensor (R, ...), whose rows are in the order of the experts."""
    parts = packed.split([rows for of_expert in zip(*pieces, strict=True) for rows in of_expert])
    return [torch.cat(parts[position :: len(pieces)]) for position in range(len(pieces))]


def join_rows(parts: list[Tensor], pieces: Pieces) -> Tensor:
    """Undoes `split_rows`; also of the first few pieces."""
    by_piece = [part.split(rows) for part, rows in zip(parts, pieces, strict=True)]
    return torch.cat([rows for of_expert in zip(*by_piece, strict=True) for rows in of_expert])


class JoinPieces(ConversionOps):
    """Loading: the pieces of one packed tensor become that tensor. Holds it twice, as `Concatenate` does.

    Args:
        pieces: of each packed tensor, by its name in the model.
    """

    def __init__(self, pieces: dict[str, Pieces]) -> None:
        self.pieces = pieces

    def __deepcopy__(self, memo: dict[int, Any]) -> JoinPieces:
        """Itself: transformers copies the operations for every tensor, and this one changes nothing of its own."""
        return self

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        **_: Any,
    ) -> dict[str, Tensor]:
        """The packed tensor under its own name."""
        parts = [input_dict.pop(name)[0] for name in source_patterns]
        return {target_patterns[0]: join_rows(parts, self.pieces[full_layer_name])}

    @property
    def reverse_op(self) -> ConversionOps:
        """Saving writes an ordinary checkpoint of the level that was loaded."""
        return _InOnePiece()


class _InOnePiece(ConversionOps):
    def convert(
        self, input_dict: dict[str, list[Tensor]], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Tensor]:
        return {target_patterns[0]: input_dict.pop(source_patterns[0])[0]}
