"""What a model says: generated targets of an encoder-decoder model beside the given ones, and answers to questions.

    exact match    the words are the same
    token F1       2 |common words| / (|generated words| + |given words|), repetitions counted; 1 where both have none

Words are what white space separates, in lower case. Decoding is greedy, by the model's own `generate`, and stops at
its end-of-sequence token or at the length of the longest given target. Targets are generated with the layers streamed:
every step reads each layer of the decoder once. Answers to questions, of any model, with all layers in memory.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from ..calibration.text import TokenBatch
from ..calibration.worker import pick_device
from ..checkpoint.reader import CheckpointReader
from ..model.architecture import tokenizer_of
from ..model.grouped import use_tiled_products
from ..model.skeleton import Skeleton
from ..model.streamer import LayerStreamer, model_inputs
from ..storage import local_folder

_CONFIG_NAME = "generation_config.json"


def score_generated(
    checkpoint: Path, tokens: Path, batch_size: int, dtype: str, device: str, count: int, level: str | None = None
) -> list[tuple[float, float]]:
    """(exact match, token F1) of the first `count` pairs of a tokenised text, or of all, at a level."""
    skeleton = _speaker(checkpoint, dtype, device, level)
    tokenizer = tokenizer_of(checkpoint)
    found = TokenBatch.load(tokens)
    assert found.labels is not None
    first = TokenBatch(found.input_ids[:count], found.attention_mask[:count], found.labels[:count])
    length = max(map(len, first.predicted))
    batches = list(first.batches(batch_size))
    streamer = LayerStreamer(skeleton, model_inputs(batches[0].input_ids, batches[0].attention_mask, batches[0].labels))
    scores = []
    for batch in batches:
        ids = streamer.generate(
            model_inputs(batch.input_ids, batch.attention_mask), do_sample=False, num_beams=1, max_new_tokens=length
        )
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        given = tokenizer.batch_decode(batch.predicted, skip_special_tokens=True)
        scores += [compare(*pair) for pair in zip(texts, given, strict=True)]
    return scores


def _speaker(checkpoint: Path, dtype: str, device: str, level: str | None) -> Skeleton:
    """The skeleton of a checkpoint, with its own settings of generation."""
    chosen = None if dtype == "auto" else getattr(torch, dtype)
    skeleton = Skeleton(CheckpointReader(checkpoint), chosen, pick_device(device), level)
    if (checkpoint / _CONFIG_NAME).exists():
        with local_folder(checkpoint) as here:
            skeleton.model.generation_config = GenerationConfig.from_pretrained(here)
    return skeleton


@torch.no_grad()
def generate_answers(
    batches: list[list[list[int]]], checkpoint: Path, dtype: str, device: str, level: str | None, longest: int
) -> list[list[str]]:
    """What the model says after each prompt of each micro-batch, at most `longest` tokens; a decoder one line of it.

    Args:
        batches: token ids of the prompts.
        checkpoint, dtype, device, level: the model; all of it is held in memory.
        longest: tokens.
    """
    skeleton = _speaker(checkpoint, dtype, device, level)
    skeleton.load_root()
    for name in skeleton.layers:
        skeleton.load(name)
    model: Any = skeleton.model
    use_tiled_products(model)
    tokenizer = tokenizer_of(checkpoint)
    is_decoder = not model.config.is_encoder_decoder
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    if is_decoder:
        ends |= {token for token in range(len(tokenizer)) if "\n" in tokenizer.decode([token])}
    pad = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": longest, "pad_token_id": pad}
    found = []
    for batch in batches:
        side = "left" if is_decoder else "right"
        prompts = [torch.tensor(ids) for ids in batch]
        inputs = {
            "input_ids": pad_sequence(prompts, True, pad, side),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in prompts], True, 0, side),
        }
        on_device = {name: tensor.to(skeleton.device) for name, tensor in inputs.items()}
        ids = model.generate(**on_device, eos_token_id=sorted(ends) or None, **options)
        said = ids[:, inputs["input_ids"].shape[1] :] if is_decoder else ids
        texts = tokenizer.batch_decode(said, skip_special_tokens=True)
        found.append([text.partition("\n")[0] if is_decoder else text for text in texts])
    return found


def compare(generated: str, given: str) -> tuple[float, float]:
    """(exact match, token F1) of one text."""
    ours, theirs = generated.lower().split(), given.lower().split()
    if not ours and not theirs:
        return 1.0, 1.0
    common = (Counter(ours) & Counter(theirs)).total()
    return float(ours == theirs), 2 * common / (len(ours) + len(theirs))
