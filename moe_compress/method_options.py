"""The options of the methods, as a recipe's `method` part takes them."""

from __future__ import annotations

from itertools import pairwise
from math import floor
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Similarity = Literal[
    "router_logits", "router_weights", "expert_weights", "expert_outputs", "input_features", "cka", "random"
]
Counts = Literal["adaptive", "uniform"] | list[int]


class Part(BaseModel):
    """A part of a recipe: unknown keys are refused, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _check_ratio(value: Any) -> Any:
    if value is None:
        raise ValueError("missing; give the fraction of expert parameters to remove, such as 0.4")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError("must be a number between 0 and 1, exclusive, such as 0.4")
    return value


Ratio = Annotated[float, BeforeValidator(_check_ratio)]
"""A fraction of the routed-expert parameters to remove."""

OptionalRatio = Annotated[float | None, BeforeValidator(lambda value: value if value is None else _check_ratio(value))]

Start = Annotated[
    float | Literal["residual"] | None,
    BeforeValidator(lambda value: value if value in (None, "residual") else _check_ratio(value)),
]

Base = Literal["none", "mean", "frequency", "fisher", "fisher_columns", "fisher_frequency", "closed_form"]

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2502.17298, section 3: Fisher-weighted base, deltas whitened by the input covariance, one rank for all.
    "paper": {"base": "fisher", "weighting": "input", "ranks": "uniform", "gate_up": "separate"},
}


class D2MoE(Part):
    """D2-MoE: every expert is a shared base plus a low-rank delta.

    The defaults are what measures best, not the paper's; `preset: paper` gives the paper's.

    Attributes:
        ratio: fraction of the routed-expert parameters to remove.
        levels: higher ratios, rising, that the same checkpoint can be loaded at; then less of it is read.
        base: what the experts of a layer share. With `none` the experts themselves are factorised.
        num_bases: bases of a layer's projections, each of a cluster of experts; `budget` lets the byte budget choose
            none, one or several for each.
        share: right factors of a layer's projections, each shared by a cluster of experts; `none` gives each expert
            its own, `budget` lets the byte budget choose.
        cluster_by: what makes experts alike, their weights or how the router scores them.
        base_sparsity: fraction of the bases' columns to do without.
        base_dynamic: share of those that stay in the file and are chosen anew in every call, by its inputs; the others
            are gone for good.
        base_metric: columns that are gone have the least norm times norm of their inputs (`norm`, the paper's), or do
            least harm once the others make up for them (`error`).
        alternate: rounds, at most, of fitting bases to what the deltas leave and deltas to the bases.
        weighting: covariance the truncation minimises the error under: `loss` weighs each token by the squared
            gradient at the projection's output, `two_sided` weighs inputs and outputs by the covariances of both,
            `input` takes all tokens alike, `none` is plain SVD.
        ranks: `allocated` spends one byte budget over layers, experts and projections by error reduction a byte;
            `uniform` gives the same rank to all; `frequency` ranks that go with frequency^alpha * Fisher^beta in each
            layer; `full` keeps every direction (takes no ratio).
        alpha, beta: exponents of `ranks: frequency`.
        gate_up: factorise gate and up as one matrix with a shared right factor, or apart.
        align: permute each expert's channels towards the layer's most used expert before the base is taken.
        damping: relative to the mean of a covariance's diagonal, where it is inverted.
        min_tokens: experts that saw fewer shrink towards the mean covariance of their layer.
        sequential: compress twice, the second time from what each layer sees above the compressed ones of the first.
    """

    name: Literal["d2moe"]
    preset: Literal["default", "paper"] = "default"
    ratio: OptionalRatio = None
    levels: list[Ratio] = []
    base: Base = "none"
    num_bases: Annotated[int, Field(ge=1)] | Literal["budget"] = 1
    share: Annotated[int, Field(ge=1)] | Literal["none", "budget"] = "none"
    cluster_by: Literal["weights", "routing"] = "weights"
    alternate: int = Field(0, ge=0, le=100)
    base_sparsity: float = Field(0, ge=0, lt=1)
    base_dynamic: float = Field(0.5, ge=0, le=1)
    base_metric: Literal["norm", "error"] = "error"
    weighting: Literal["loss", "two_sided", "input", "none"] = "loss"
    ranks: Literal["allocated", "uniform", "frequency", "full"] = "allocated"
    alpha: float = Field(0.5, ge=0, le=10)
    beta: float = Field(0.5, ge=0, le=10)
    gate_up: Literal["joint", "separate"] = "joint"
    align: bool = False
    damping: float = Field(1e-5, ge=0, le=1)
    min_tokens: int = Field(64, ge=0)
    sequential: bool = False

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("preset") in PRESETS:
            return {**PRESETS[data["preset"]], **data}
        return data

    @model_validator(mode="after")
    def _ratio_fits(self) -> D2MoE:
        if self.ranks == "full":
            if self.ratio is not None:
                raise ValueError("ratio: ranks: full keeps everything; leave ratio out")
        elif self.ratio is None:
            raise ValueError("ratio: missing; give the fraction of expert parameters to remove, such as 0.4")
        return self

    @model_validator(mode="after")
    def _options_go_together(self) -> D2MoE:
        if self.base == "none" and self.num_bases != 1:
            raise ValueError("num_bases: base: none has none; name a kind of base, such as fisher")
        if "budget" in (self.num_bases, self.share) and self.ranks != "allocated":
            raise ValueError(
                f"ranks: {self.ranks} spends no budget; set num_bases and share to numbers, or ranks: allocated"
            )
        if self.alternate and (self.base == "none" or self.share != "none" or self.weighting == "two_sided"):
            raise ValueError("alternate: needs a base, share: none and another weighting than two_sided")
        if self.base_sparsity and (self.base == "none" or self.alternate):
            raise ValueError(f"base_sparsity: {self.base_sparsity} needs a base, and alternate: 0")
        if self.share != "none" and self.ranks in ("frequency", "full"):
            raise ValueError(
                f"ranks: {self.ranks} gives each expert a rank of its own; set share: none, or ranks: uniform"
            )
        if self.levels and self.share != "none":
            raise ValueError(f"levels: {self.levels} are prefixes of each expert's own factors; set share: none")
        return self

    @model_validator(mode="after")
    def _levels_rise(self) -> D2MoE:
        if self.levels and self.ratio is None:
            raise ValueError(f"levels: {self.levels} are prefixes of what a ratio keeps; leave out ranks: full")
        ratios = [ratio for ratio in (self.ratio, *self.levels) if ratio is not None]
        if any(later <= earlier for earlier, later in pairwise(ratios)):
            raise ValueError(
                f"levels: {self.levels} must rise, all above ratio {self.ratio}, such as ratio: 0.2, levels: [0.3, 0.4]"
            )
        return self

    @property
    def at_levels(self) -> list[D2MoE]:
        """The method at each ratio it is loaded at, that of the whole checkpoint first."""
        return [self.model_copy(update={"ratio": ratio, "levels": []}) for ratio in (self.ratio, *self.levels)]

    def num_base_columns(self, num_columns: int) -> int:
        """Columns of a base that are stored, of `num_columns`."""
        return num_columns - floor(self.base_sparsity * (1 - self.base_dynamic) * num_columns)

    def base_skip(self, num_columns: int) -> float:
        """Fraction of the stored columns that every call leaves out."""
        dynamic = floor(self.base_sparsity * self.base_dynamic * num_columns)
        return dynamic / self.num_base_columns(num_columns)

    @property
    def has_fixed_bases(self) -> bool:
        """Whether bases are there whatever the budget."""
        return self.base != "none" and self.num_bases != "budget"

    @property
    def needs_full_covariance(self) -> bool:
        """Deltas and shared factors are weighed by the inputs' covariance; that of outputs is of the experts alone."""
        return (self.has_fixed_bases or not isinstance(self.share, str)) and self.weighting != "none"


class Fewer(Part):
    """What all methods that keep fewer experts share.

    Attributes:
        counts: experts each layer keeps: `adaptive` spends one quota over all layers by how often experts are
            chosen, `uniform` keeps the same fraction everywhere, a list gives the number of each MoE layer.
        exclude_layers: MoE layers (0 is the first) that keep all their experts.
        router: `keep` leaves the router as it is and leads its choices to the experts there are; `shrink` writes a
            stock checkpoint of fewer experts; `slice` gives each layer a router as short as its list of experts.
        seed: of random choices.
    """

    counts: Counts = "adaptive"
    exclude_layers: list[int] = []
    router: Literal["keep", "shrink", "slice"] = "keep"
    seed: int = Field(0, ge=0)

    @property
    def needs_full_covariance(self) -> bool:
        """What merging and pruning read is always there."""
        return False

    @property
    def sequential(self) -> bool:
        """Experts that are left whole are chosen once."""
        return False

    @property
    def expert_ratio(self) -> float:
        """Fraction of the routed experts to remove."""
        return float(self.ratio)  # type: ignore[attr-defined]

    @model_validator(mode="after")
    def _shrinks_evenly(self) -> Fewer:
        if self.router == "shrink" and (self.counts == "adaptive" or self.exclude_layers):
            raise ValueError(
                "router: shrink writes a stock checkpoint, whose layers all have the same number of experts;"
                " set counts: uniform and exclude no layer, or router: keep or slice"
            )
        if isinstance(self.counts, list) and (min(self.counts, default=0) < 1 or self.exclude_layers):
            raise ValueError("counts: a list holds a number of at least 1 for each MoE layer, and excludes none")
        return self


class Merge(Fewer):
    """How experts are merged.

    Attributes:
        similarity: what makes experts alike: the cosine of their weights, of the router's rows or of its logits on the
            calibration text, of mean inputs or mean outputs, CKA of their outputs, or chance.
        grouping: `dominant` experts by frequency, each other joins the one it is most alike; `salient` the same by
            saliency, few large groups; `hierarchical` average linkage.
        max_group: experts a group holds at most.
        align: permute the channels of each expert towards its dominant one first, by `weights` or by `activations`
            on shared tokens.
        weights: of the experts in the mean.
        repair: rows of a shorter router: those of the `dominant` experts, or fitted to the `logsumexp` of the group's.
    """

    similarity: Similarity = "expert_weights"
    grouping: Literal["dominant", "salient", "hierarchical"] = "dominant"
    max_group: int | None = Field(None, ge=1)
    align: Literal["weights", "activations", "none"] = "weights"
    weights: Literal["frequency", "uniform", "fisher", "saliency"] = "frequency"
    repair: Literal["dominant", "logsumexp"] = "dominant"

    @model_validator(mode="after")
    def _clusters_freely(self) -> Merge:
        if self.grouping == "hierarchical" and (self.max_group is not None or self.router == "shrink"):
            raise ValueError(
                "grouping: hierarchical makes clusters of any size, wherever their experts stand; leave max_group out"
                " and router: keep, or set grouping: dominant"
            )
        return self


class MSMoE(Merge):
    """M-SMoE (arXiv 2310.01334): experts are merged by what the router does.

    Attributes:
        ratio: fraction of the routed experts to remove.
    """

    name: Literal["msmoe"]
    ratio: Ratio


class MCSMoE(Merge):
    """MC-SMoE (arXiv 2310.01334): merged, then each matrix low rank + sparse columns.

    Attributes:
        ratio: fraction of the routed-expert parameters to remove in all.
        merge_ratio: fraction of the routed experts that merging removes; 0 merges none.
        sparse_share: fraction of the parameters left that go to sparse columns instead of ranks.
        start: for training that prunes columns until `ratio` is reached (distillation.sparsity): what is removed
            before, a lower ratio, or `residual` to keep all columns, as the paper does; ranks are those of `ratio`.
        importance: of a sparse column: `gradient` |s dL/ds| by the gradients of the calibration text, `energy`
            |s| alone.
        damping, min_tokens: as for d2moe.
    """

    name: Literal["mcsmoe"]
    ratio: Ratio
    merge_ratio: float = Field(0.25, ge=0, lt=1)
    sparse_share: float = Field(0.05, ge=0, lt=1)
    start: Start = None
    importance: Literal["gradient", "energy"] = "gradient"
    damping: float = Field(1e-5, ge=0, le=1)
    min_tokens: int = Field(64, ge=0)

    @property
    def expert_ratio(self) -> float:
        """Fraction of the routed experts that merging removes."""
        return self.merge_ratio

    @model_validator(mode="after")
    def _merges_less(self) -> MCSMoE:
        if self.merge_ratio >= self.ratio:
            raise ValueError(f"merge_ratio: {self.merge_ratio} is not below ratio, {self.ratio}; lower it")
        if isinstance(self.start, float) and self.start >= self.ratio:
            raise ValueError(f"start: {self.start} leaves nothing to prune until ratio, {self.ratio}; lower it")
        if self.router == "shrink":
            raise ValueError("router: no stock checkpoint holds factors; set router: keep or slice")
        return self


class Prune(Fewer):
    """Whole experts are left out.

    Attributes:
        ratio: fraction of the routed experts to remove.
        saliency: what decides: `reap` (arXiv 2510.13999), the mean over routed tokens of router weight times output
            norm; `taylor`, the squared first-order change of the loss; `frequency`; or `random`.
        keep: MoE layer -> experts that must stay (super experts).
    """

    name: Literal["prune"]
    ratio: Ratio
    counts: Counts = "uniform"
    router: Literal["shrink", "slice"] = "shrink"
    saliency: Literal["reap", "taylor", "frequency", "random"] = "reap"
    keep: dict[int, list[int]] = {}


METHODS: dict[str, type[Part]] = {"d2moe": D2MoE, "msmoe": MSMoE, "mcsmoe": MCSMoE, "prune": Prune}

Method = Annotated[D2MoE | MSMoE | MCSMoE | Prune, Field(discriminator="name")]
