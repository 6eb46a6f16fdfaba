"""The matrices that the projections of a layer are factorised as."""

from __future__ import annotations

from dataclasses import dataclass

from ..method_options import D2MoE
from ..model.discovery import MoELayer
from ..model.expert_bank import Group


@dataclass(frozen=True, slots=True)
class Slot:
    """One factorised projection of a layer.

    Attributes:
        name: slot name of model/experts.py.
        rows: which rows of the group's matrix it covers.
        num_columns: N.
    """

    name: str
    rows: slice
    num_columns: int

    @property
    def num_rows(self) -> int:
        """M."""
        return self.rows.stop - self.rows.start


def slots(layer: MoELayer, group: Group, options: D2MoE) -> list[Slot]:
    """The slots that a group of projections is factorised as."""
    if group == "down":
        return [Slot("down", slice(0, layer.hidden_size), layer.intermediate_size)]
    inner, hidden = layer.intermediate_size, layer.hidden_size
    if not layer.has_gate:
        return [Slot("up", slice(0, inner), hidden)]
    if options.gate_up == "joint":
        return [Slot("gate_up", slice(0, 2 * inner), hidden)]
    return [Slot("gate", slice(0, inner), hidden), Slot("up", slice(inner, 2 * inner), hidden)]
