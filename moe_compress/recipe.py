"""The recipe: the one description of a job, YAML in and out.

Everything that can be refused without reading a tensor is refused here, in one line that names field, value, rule
and fix.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import RecipeError

Base = Literal["none", "mean", "frequency", "fisher", "fisher_frequency", "closed_form"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Part = TypeVar("Part", bound=_Part)


class DatasetText(_Part):
    """Text of a `datasets` name."""

    dataset: str
    config: str | None = None
    split: str = "train"


Text = list[str] | DatasetText


def _as_list(value: Any) -> Any:
    if not value:
        raise ValueError("names no text; give a file, a list of files or a dataset")
    return [value] if isinstance(value, str) else value


class Calibration(_Part):
    """The text whose statistics every method lives on.

    Attributes:
        text: files (.txt, .jsonl, .parquet, each also .gz) or a dataset.
        num_sequences, sequence_length: how much of it, in tokens.
        batch_size: sequences a micro-batch; bounds the memory of activations, changes no statistic but by rounding.
        seed: of the order of documents and of sampled labels.
        dtype: to compute in; `auto` is the checkpoint's own.
        labels: `text` gives the empirical Fisher information, `sampled` the true one.
        full_covariance: also keep input covariances on the larger side of a projection, which bases other than
            none need; `auto` keeps them where the method asks for them.
        activation_memory_gb: activations each worker keeps in memory before it spills to the job folder.
    """

    text: Annotated[Text, Field(union_mode="left_to_right")]
    num_sequences: int = Field(128, ge=1)
    sequence_length: int = Field(2048, ge=2)
    batch_size: int = Field(8, ge=1)
    seed: int = Field(0, ge=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    labels: Literal["text", "sampled"] = "text"
    full_covariance: Literal["auto", "always"] = "auto"
    activation_memory_gb: float = Field(0.25, ge=0)

    _listed = field_validator("text", mode="before")(_as_list)


PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2502.17298, section 3: Fisher-weighted base, deltas whitened by the input covariance, one rank for all.
    "paper": {"base": "fisher", "weighting": "input", "ranks": "uniform", "gate_up": "separate"},
}


class D2MoE(_Part):
    """D2-MoE: every expert is a shared base plus a low-rank delta.

    The defaults are what measures best, not the paper's; `preset: paper` gives the paper's.

    Attributes:
        ratio: fraction of the routed-expert parameters to remove.
        base: what the experts of a layer share. With `none` the experts themselves are factorised.
        weighting: covariance the truncation minimises the error under: `loss` weighs each token by the squared
            gradient at the projection's output, `input` takes all tokens alike, `none` is plain SVD.
        ranks: `allocated` spends one byte budget over layers, experts and projections by error reduction a byte;
            `uniform` gives the same rank to all; `full` keeps every direction (takes no ratio).
        gate_up: factorise gate and up as one matrix with a shared right factor, or apart.
        align: permute each expert's channels towards the layer's most used expert before the base is taken.
        damping: relative to the mean of a covariance's diagonal, where it is inverted.
        min_tokens: experts that saw fewer shrink towards the mean covariance of their layer.
    """

    name: Literal["d2moe"]
    preset: Literal["default", "paper"] = "default"
    ratio: float | None = None
    base: Base = "none"
    weighting: Literal["loss", "input", "none"] = "loss"
    ranks: Literal["allocated", "uniform", "full"] = "allocated"
    gate_up: Literal["joint", "separate"] = "joint"
    align: bool = False
    damping: float = Field(1e-5, ge=0, le=1)
    min_tokens: int = Field(64, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("preset") in PRESETS:
            return {**PRESETS[data["preset"]], **data}
        return data

    @field_validator("ratio", mode="before")
    @classmethod
    def _is_number(cls, value: Any) -> Any:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError("must be a number between 0 and 1, exclusive, such as 0.4")
        return value

    @model_validator(mode="after")
    def _ratio_fits(self) -> D2MoE:
        if self.ranks == "full":
            if self.ratio is not None:
                raise ValueError("ratio: ranks: full keeps everything; leave ratio out")
        elif self.ratio is None:
            raise ValueError("ratio: missing; give the fraction of expert parameters to remove, such as 0.4")
        elif not 0 < self.ratio < 1:
            raise ValueError(f"ratio: {self.ratio} is not between 0 and 1, exclusive; give a fraction such as 0.4")
        return self

    @property
    def needs_full_covariance(self) -> bool:
        """A base makes deltas, whose output covariance can only be had from the input's."""
        return self.base != "none" or self.weighting == "none"


class Evaluation(_Part):
    """What perplexity and agreement with the original are measured on.

    Attributes:
        text: files (tokenised as one string) or a dataset.
        sequence_length: tokens a window; windows do not overlap.
        max_windows: only the first so many windows; None for the whole text.
    """

    text: Annotated[Text, Field(union_mode="left_to_right")]
    sequence_length: int = Field(2048, ge=2)
    max_windows: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"

    _listed = field_validator("text", mode="before")(_as_list)


class Cluster(_Part):
    """Where the job runs.

    Attributes:
        local: in this process, without Ray; for debugging. The bytes are the same.
        address: a running Ray cluster; None starts one on this machine and stops it at the end.
        layer_workers: actors that share the layers during calibration; None for one a GPU, or one a core up to two.
        threads: numerical threads of every worker and task. One number for all of them, because the order of
            floating-point sums, and so the bytes of the result, may depend on it.
        resident_layers: consecutive layers a worker holds at a time.
        device: torch device of workers and tasks; `auto` is CUDA where there is one.
    """

    local: bool = False
    address: str | None = None
    layer_workers: int | None = Field(None, ge=1)
    threads: int = Field(1, ge=1)
    resident_layers: int = Field(1, ge=1)
    device: str = "auto"


class Recipe(_Part):
    """A job: which checkpoint, how small, where to."""

    model: str
    output: str
    job_dir: str | None = None
    calibration: Calibration
    method: D2MoE
    evaluation: Evaluation | None = None
    cluster: Cluster = Cluster()

    @property
    def output_path(self) -> Path:
        """Folder the compressed checkpoint appears at."""
        return Path(self.output).expanduser().absolute()

    @property
    def job_path(self) -> Path:
        """The workspace; `<output>.job` unless given."""
        if self.job_dir is not None:
            return Path(self.job_dir).expanduser().absolute()
        return self.output_path.with_name(self.output_path.name + ".job")

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies `--set a.b=value` overrides.

    Args:
        path: a YAML file. Relative paths inside it are relative to the current directory.
        overrides: `dotted.key=value`, the value read as YAML.

    Raises:
        RecipeError: anything in it cannot be run.
    """
    try:
        data = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise RecipeError(f"recipe {path}: {error.strerror}; give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: not YAML ({_one_line(str(error))}); see recipes/") from error
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {path}: holds {type(data).__name__}, not a mapping of keys; see recipes/")
    for override in overrides:
        _override(data, override)
    return parse_recipe(data)


def parse_recipe(data: dict[str, Any]) -> Recipe:
    """Validates plain data as a recipe.

    Raises:
        RecipeError: field, value, rule and fix of the first thing that is wrong.
    """
    method = data.get("method")
    if isinstance(method, dict) and method.get("name") not in (None, "d2moe"):
        raise RecipeError(f"method.name: '{method['name']}' is not a method; the methods are: d2moe")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_explain(error)) from None


def parse_part(kind: type[Part], data: dict[str, Any]) -> Part:
    """Validates one part of a recipe by itself.

    Raises:
        RecipeError: as `parse_recipe`.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_explain(error)) from None


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set '{override}': not of the form key.subkey=value; write it like method.ratio=0.4")
    *parents, leaf = key.split(".")
    here = data
    for parent in parents:
        here = here.setdefault(parent, {})
        if not isinstance(here, dict):
            raise RecipeError(f"--set '{override}': '{parent}' is a value and holds no keys; see recipes/")
    try:
        here[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set '{override}': value is not YAML ({_one_line(str(error))}); quote it") from error


def _explain(error: ValidationError) -> str:
    # A union reports every branch; the shortest path with a real complaint is the one a person meant.
    first = min(error.errors(), key=lambda e: (e["type"] == "missing", len(e["loc"])))
    parts = [str(part) for part in first["loc"] if part not in ("list[str]", "DatasetText")]
    where = ".".join(parts)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = sorted(_fields(first["loc"][:-1]))
        return f"{where}: unknown key; known here: {', '.join(known)}"
    if first["type"] == "missing":
        return f"{where}: missing; this key is required"
    if first["type"] == "value_error" and message.startswith("ratio:"):
        return f"{where}.{message}"
    return f"{where}: {first['input']!r} is not valid; {_one_line(message[:1].lower() + message[1:])}"


def _fields(location: tuple[int | str, ...]) -> set[str]:
    model: Any = Recipe
    for part in location:
        if part == "DatasetText":
            return set(DatasetText.model_fields)
        annotation = getattr(model, "model_fields", {}).get(part)
        if annotation is None:
            continue
        model = next(
            (
                a
                for a in (annotation.annotation, *getattr(annotation.annotation, "__args__", ()))
                if isinstance(a, type) and issubclass(a, BaseModel)
            ),
            model,
        )
    return set(model.model_fields)


def _one_line(text: str) -> str:
    return " ".join(text.split())
