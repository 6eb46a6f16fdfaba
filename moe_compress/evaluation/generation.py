"""Generated targets of an encoder-decoder model beside the given ones.

    exact match    the words are the same
    token F1       2 |common words| / (|generated words| + |given words|), repetitions counted; 1 where both have none

Words are what white space separates, in lower case. Decoding is greedy, by the model's own `generate`, and stops at
its end-of-sequence token or at the length of the longest given target. The layers are streamed: every step reads each
layer of the decoder once.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig

from ..calibration.text import TokenBatch
from ..calibration.worker import pick_device
from ..checkpoint.reader import CheckpointReader
from ..model.skeleton import Skeleton
from ..model.streamer import LayerStreamer, model_inputs

_CONFIG_NAME = "generation_config.json"


def score_generated(
    checkpoint: Path, tokens: Path, batch_size: int, dtype: str, device: str, count: int, level: str | None = None
) -> list[tuple[float, float]]:
    """(exact match, token F1) of the first `count` pairs of a tokenised text, or of all, at a level."""
    chosen = None if dtype == "auto" else getattr(torch, dtype)
    skeleton = Skeleton(CheckpointReader(checkpoint), chosen, pick_device(device), level)
    if (checkpoint / _CONFIG_NAME).exists():
        skeleton.model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
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


def compare(generated: str, given: str) -> tuple[float, float]:
    """(exact match, token F1) of one text."""
    ours, theirs = generated.lower().split(), given.lower().split()
    if not ours and not theirs:
        return 1.0, 1.0
    common = (Counter(ours) & Counter(theirs)).total()
    return float(ours == theirs), 2 * common / (len(ours) + len(theirs))
