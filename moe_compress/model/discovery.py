"""Finds the MoE layers of a model by the experts contract of transformers 5: no list of model classes.

The contract is a module decorated with `use_experts_implementation`, called as
`experts(hidden_states (T, D), top_k_index (T, k), top_k_weights (T, k)) -> (T, D)`, that stores its experts as
3-D parameters `gate_up_proj` (or `up_proj` where there is no gate) and `down_proj`, and tells the layout by flags
on the instance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import CheckpointError


@dataclass(frozen=True, slots=True)
class MoELayer:
    """Where the routed experts of one layer live, and their layout.

    Attributes:
        path: name of the experts module inside the model, e.g. `model.layers.3.mlp.experts`.
        num_experts: E, the routed experts.
        hidden_size: D, width of the experts' input and output.
        intermediate_size: F, width between the projections.
        has_gate: the first projection is `[gate; up]` rather than `up` alone.
        has_bias: the projections carry biases (which no method changes).
        is_transposed: stored (E, in, out) rather than (E, out, in).
        is_concatenated: gate and up rows lie one block after the other rather than interleaved.
        always_mapped: the layer carries an `expert_map` once it is compressed, even if all its experts stay.
    """

    path: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    always_mapped: bool = False

    @property
    def up_name(self) -> str:
        """Stock name of the first projection's parameter."""
        return "gate_up_proj" if self.has_gate else "up_proj"

    @property
    def owned(self) -> tuple[str, str]:
        """In-memory names of the parameters a method replaces."""
        return f"{self.path}.{self.up_name}", f"{self.path}.down_proj"

    @property
    def up_shape(self) -> tuple[int, int]:
        """(rows, columns) of one expert's first projection, gate and up together."""
        return self.intermediate_size * (2 if self.has_gate else 1), self.hidden_size

    @property
    def down_shape(self) -> tuple[int, int]:
        """(rows, columns) of one expert's down projection."""
        return self.hidden_size, self.intermediate_size

    @property
    def num_parameters(self) -> int:
        """Parameters of all routed experts of the layer, biases not counted."""
        return self.num_experts * 3 * self.hidden_size * self.intermediate_size - (
            0 if self.has_gate else self.num_experts * self.hidden_size * self.intermediate_size
        )


def follows_contract(module: nn.Module) -> bool:
    """True for an experts module of the contract, of whatever model class."""
    down = getattr(module, "down_proj", None)
    is_fused = isinstance(down, nn.Parameter) and down.dim() == 3
    return is_fused and hasattr(module, "_apply_gate") and hasattr(module, "has_gate")


def always_mapped(module: nn.Module) -> bool:
    """Whether stock code only stops at this module's compressed form because of its map (see switch.py)."""
    return hasattr(module, "guard")


def describe_experts(path: str, module: Any) -> MoELayer:
    """Reads the layout of one experts module.

    Raises:
        CheckpointError: the parameters do not have the shapes that the module's flags promise.
    """
    down_shape = tuple(module.down_proj.shape)
    transposed = bool(module.is_transposed)
    num_experts = down_shape[0]
    hidden, inner = down_shape[1:] if not transposed else down_shape[:0:-1]
    layer = MoELayer(
        path=path,
        num_experts=num_experts,
        hidden_size=hidden,
        intermediate_size=inner,
        has_gate=bool(module.has_gate),
        has_bias=bool(module.has_bias),
        is_transposed=transposed,
        is_concatenated=bool(module.is_concatenated),
        always_mapped=always_mapped(module),
    )
    rows, columns = layer.up_shape
    expected = (num_experts, columns, rows) if transposed else (num_experts, rows, columns)
    up = getattr(module, layer.up_name, None)
    if up is None or tuple(up.shape) != expected:
        raise CheckpointError(
            f"{path}.{layer.up_name}: shape {None if up is None else tuple(up.shape)} is not the"
            f" {expected} its down_proj and flags promise; this experts layout is not supported"
        )
    return layer


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """All MoE layers of `model`, in module order.

    Raises:
        CheckpointError: there is none.
    """
    layers = [describe_experts(path, module) for path, module in model.named_modules() if follows_contract(module)]
    if not layers:
        raise CheckpointError(
            f"model type '{getattr(getattr(model, 'config', None), 'model_type', '?')}': no module"
            " follows the experts contract of transformers (fused experts with a router beside them);"
            " give a Mixture-of-Experts checkpoint"
        )
    return layers
