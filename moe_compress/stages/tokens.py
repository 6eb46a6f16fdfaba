"""The texts of a recipe as cached token files of the job folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..calibration.text import (
    TokenBatch,
    calibration_sequences,
    dataset_documents,
    evaluation_windows,
    read_documents,
)
from ..errors import CheckpointError, RecipeError
from ..job import digest_of
from ..recipe import Calibration, DatasetText, Evaluation, Recipe, Text


def check_texts(recipe: Recipe) -> None:
    """Refuses text that cannot be read, as far as that shows without reading it.

    Raises:
        RecipeError: names the field and the file.
    """
    for field, part in (("calibration.text", recipe.calibration), ("evaluation.text", recipe.evaluation)):
        if part is None or isinstance(part.text, DatasetText):
            continue
        with _naming(field):
            read_documents(part.text)  # looks at the names now, at the files when iterated
            for path in part.text:
                if not Path(path).stat().st_size:
                    raise RecipeError(f"{path}: is empty; give another file")
    if recipe.evaluation is not None and isinstance(recipe.evaluation.text, DatasetText):
        raise RecipeError("evaluation.text: a dataset is not supported here yet; give text files")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: the folder has none that loads.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parsers do
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder}: the tokenizer does not load ({reason}); copy the original's tokenizer files there"
        ) from error


def calibration_tokens(settings: Calibration, checkpoint: Path, folder: Path) -> Path:
    """File of the packed calibration text, named by what it was made from."""
    shape = (settings.num_sequences, settings.sequence_length, settings.seed)
    with _naming("calibration.text"):
        made_from = digest_of("calibration", _identity(settings.text), _tokenizer_digest(checkpoint), shape)
        target = folder / f"{made_from}.safetensors"
        if not target.exists():
            documents = _documents(settings.text)
            _save(calibration_sequences(documents, load_tokenizer(checkpoint), *shape), target)
    return target


def evaluation_tokens(settings: Evaluation, checkpoint: Path, folder: Path) -> Path:
    """File of the evaluation windows, named by what it was made from."""
    shape = (settings.sequence_length, settings.max_windows)
    assert not isinstance(settings.text, DatasetText)  # refused by check_texts
    with _naming("evaluation.text"):
        made_from = digest_of("evaluation", _identity(settings.text), _tokenizer_digest(checkpoint), shape)
        target = folder / f"{made_from}.safetensors"
        if not target.exists():
            _save(evaluation_windows(settings.text, load_tokenizer(checkpoint), *shape), target)
    return target


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """Puts the field of the recipe before what is wrong with its text."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{field}: {error}") from error


def _save(tokens: TokenBatch, target: Path) -> None:
    partial = target.with_suffix(".partial")
    tokens.save(partial)
    partial.replace(target)


def _documents(text: Text) -> Iterator[str]:
    if isinstance(text, DatasetText):
        return dataset_documents(text.dataset, text.config, text.split)
    return read_documents(text)


def _identity(text: Text) -> Any:
    """What a text is, whatever it is called: the digests of its files, or the name of its dataset."""
    if isinstance(text, DatasetText):
        return text.model_dump()
    return [_file_digest(Path(path)) for path in text]


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); give an existing text file") from error


def _tokenizer_digest(checkpoint: Path) -> list[str]:
    return [_file_digest(path) for path in sorted(checkpoint.glob("tokenizer*")) if path.is_file()]
