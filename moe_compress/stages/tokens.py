"""The texts of a recipe as cached token files of the job folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..calibration.pairs import calibration_pairs, dataset_pairs, evaluation_pairs, read_pairs
from ..calibration.text import (
    TokenBatch,
    calibration_sequences,
    dataset_documents,
    evaluation_windows,
    read_documents,
    read_texts,
)
from ..checkpoint.reader import CheckpointReader
from ..distillation.examples import Examples
from ..distillation.task_examples import task_examples
from ..distillation_options import Distillation
from ..errors import CheckpointError, RecipeError, one_line
from ..evaluation.tasks.reading import rows_of
from ..job import digest_of
from ..model.architecture import load_config, tokenizer_of
from ..progress import Reporter
from ..recipe import Calibration, Evaluation
from ..recipe_fields import DatasetText, TaskSource, Text, TextPairs
from ..storage import as_path, files_in


def check_texts(parts: Mapping[str, Calibration | Evaluation | Distillation | None], of_pairs: bool) -> None:
    """Refuses text that cannot be read, as far as that shows without reading it.

    Args:
        parts: what holds a text, by the text's field.
        of_pairs: the model is an encoder-decoder one.

    Raises:
        RecipeError: names the field and the file.
    """
    for field, part in parts.items():
        if part is None or not isinstance(part.text, list):
            continue
        with naming(field):
            # looks at the names now, at the files when iterated
            _pairs(part.text, part) if of_pairs else read_documents(part.text)
            for path in part.text:
                if not as_path(path).stat().st_size:
                    raise RecipeError(f"{path}: is empty; give another file")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: the folder has none that loads.
    """
    try:
        return tokenizer_of(folder)
    except Exception as error:  # transformers raises whatever its parsers do
        reason = one_line(error, 200)
        raise CheckpointError(
            f"{folder}: the tokenizer does not load ({reason}); copy the original's tokenizer files there"
        ) from error


def calibration_tokens(settings: Calibration, checkpoint: Path, folder: Path) -> Path:
    """File of the packed calibration text, named by what it was made from.

    Raises:
        RecipeError: the text cannot be read, or fills no sequence.
    """
    shape = (settings.num_sequences, settings.sequence_length, settings.seed)
    return _packed("calibration", settings, settings.text, shape, checkpoint, folder)


def evaluation_tokens(settings: Evaluation, checkpoint: Path, folder: Path) -> Path | None:
    """File of the evaluation windows, named by what it was made from; None where there are tasks alone.

    Raises:
        RecipeError: the text cannot be read, or fills no window.
    """
    text, shape = settings.text, (settings.sequence_length, settings.max_windows)
    if text is None:
        return None
    if reads_pairs(checkpoint):
        return _cached_pairs("evaluation", settings, text, shape, checkpoint, folder, evaluation_pairs)

    def make() -> TokenBatch:
        return evaluation_windows(_documents(text, read_texts), load_tokenizer(checkpoint), *shape)

    return _cached("evaluation", text, shape, checkpoint, folder, make)


def training_tokens(settings: Distillation, checkpoint: Path, folder: Path, reporter: Reporter) -> Path:
    """File of the sequences to train on, those held out first, named by what it was made from.

    Args:
        settings: the text or the task.
        checkpoint: its tokenizer is used.
        folder: of the file.
        reporter: told of examples that did not fit whole.

    Raises:
        RecipeError: the text cannot be read, or fills no sequence.
    """
    shape = (settings.num_sequences + settings.validation_sequences, settings.sequence_length, settings.seed)
    if settings.task is not None:
        return _task_tokens(settings.task, shape, checkpoint, folder, reporter)
    assert settings.text is not None
    packed = _packed("distillation", settings, settings.text, shape, checkpoint, folder)
    target = folder / f"{packed.stem}-examples.safetensors"
    if not target.exists():
        Examples.of_text(TokenBatch.load(packed)).save(target)
    return target


def _task_tokens(
    task: TaskSource, shape: tuple[int, int, int], checkpoint: Path, folder: Path, reporter: Reporter
) -> Path:
    """File of a task's examples; `shape` is how many, their length, and the seed."""
    count, length, seed = shape
    of_pairs = reads_pairs(checkpoint)
    with naming("distillation.task"):
        rows = text_identity(rows_of(task, "train"))
        made_from = digest_of("distillation.task", task.name, rows, tokenizer_digest(checkpoint), shape, of_pairs)
        target = folder / f"{made_from}-examples.safetensors"
        if not target.exists():
            examples, num_cut = task_examples(task, load_tokenizer(checkpoint), length, count, seed, of_pairs)
            examples.save(target)
            if num_cut:
                reporter.say(
                    f"distillation.sequence_length: {num_cut} of {len(examples.input_ids)} examples lost the front of"
                    f" their context to fit into {length} tokens"
                )
    return target


def check_vocabulary(checkpoint: Path, num_ids: int, *files: Path) -> None:
    """Every id in the token files must have a row in the model's embedding.

    Raises:
        CheckpointError: the tokenizer does not belong to the model.
    """
    highest = max(int(ids.max()) for file in files for ids in _all_ids(TokenBatch.load(file)))
    if highest >= num_ids:
        raise CheckpointError(
            f"{checkpoint}: the tokenizer gives id {highest} and the embedding ends at {num_ids - 1}; copy the"
            " original's tokenizer files there"
        )


def _all_ids(batch: TokenBatch) -> list[Tensor]:
    return [batch.input_ids] if batch.labels is None else [batch.input_ids, batch.labels]


def reads_pairs(checkpoint: Path) -> bool:
    """Whether the texts of a checkpoint are pairs: it is an encoder-decoder model."""
    return bool(load_config(CheckpointReader(checkpoint, allow_missing_shards=True)).is_encoder_decoder)


def _pairs(text: Text, settings: TextPairs) -> Iterator[tuple[str, str]]:
    fields = (settings.source_field, settings.target_field)
    if isinstance(text, DatasetText):
        return dataset_pairs(text.dataset, text.config, text.split, fields)
    return read_pairs(text, fields)


def _packed(
    part: str, settings: TextPairs, text: Text, shape: tuple[int, int, int], checkpoint: Path, folder: Path
) -> Path:
    """File of sequences packed with text, or of pairs; `shape` is how many, their length, and the seed."""
    if reads_pairs(checkpoint):
        return _cached_pairs(part, settings, text, shape, checkpoint, folder, calibration_pairs)

    def make() -> TokenBatch:
        return calibration_sequences(_documents(text, read_documents), load_tokenizer(checkpoint), *shape)

    return _cached(part, text, shape, checkpoint, folder, make)


def _cached_pairs(
    part: str,
    settings: TextPairs,
    text: Text,
    shape: tuple[Any, ...],
    checkpoint: Path,
    folder: Path,
    tokenise: Callable[..., TokenBatch],
) -> Path:
    def make() -> TokenBatch:
        return tokenise(_pairs(text, settings), load_tokenizer(checkpoint), *shape)

    how = (*shape, settings.source_field, settings.target_field)
    return _cached(part, text, how, checkpoint, folder, make)


def _cached(
    part: str, text: Text, shape: tuple[Any, ...], checkpoint: Path, folder: Path, make: Callable[[], TokenBatch]
) -> Path:
    with naming(f"{part}.text"):
        made_from = digest_of(part, text_identity(text), tokenizer_digest(checkpoint), shape)
        target = folder / f"{made_from}.safetensors"
        if not target.exists():
            make().save(target)
    return target


def _documents(text: Text, read: Callable[[Sequence[str]], Iterator[str]]) -> Iterator[str]:
    if isinstance(text, DatasetText):
        return dataset_documents(text.dataset, text.config, text.split)
    return read(text)


@contextmanager
def naming(field: str) -> Iterator[None]:
    """Puts the field of the recipe before what is wrong with its text."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{field}: {error}") from error


def text_identity(text: Text) -> Any:
    """What a text is, whatever it is called: the digests of its files, or the name of its dataset."""
    if isinstance(text, DatasetText):
        return text.model_dump()
    return [_file_digest(as_path(path)) for path in text]


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); give an existing text file") from error


def tokenizer_digest(checkpoint: Path) -> list[str]:
    """What the files of a checkpoint's tokenizer hold."""
    return [_file_digest(checkpoint / name) for name in sorted(files_in(checkpoint)) if name.startswith("tokenizer")]
