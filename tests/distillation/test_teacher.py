"""The teacher's cache against the whole model, and as an artifact that is made in pieces and read in any order."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from moe_compress.calibration.text import IGNORED, TokenBatch
from moe_compress.distillation import teacher
from moe_compress.distillation.examples import Examples
from moe_compress.distillation.losses import CachedTargets, FullTargets, token_loss
from moe_compress.distillation.teacher import TeacherCache, TeacherSetup, shard_ranges, write_teacher_shards
from moe_compress.errors import CalibrationError, RecipeError
from moe_compress.executor import InProcess
from moe_compress.progress import Reporter
from moe_compress.stages.teach import teach
from tests.conftest import Checkpoint
from tests.switch_models import random_switch
from tests.tiny_models import token_ids

NUM_SEQUENCES, LENGTH = 7, 10
SMALL_SHARD_BYTES = 2 * LENGTH * (6 * 8 + 4)

Taught = tuple[TeacherSetup, Examples, list[Tensor]]
"""How a cache is made, what of, and the (C, V) logits by the whole model of each example's tokens that count."""


@torch.no_grad()
def of_mixtral(folder: Path, checkpoint: Path) -> Taught:
    """Text with padding, and one sequence in which nothing counts."""
    ids = token_ids(NUM_SEQUENCES, LENGTH)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2, 6:] = mask[4, 1:] = False
    examples = Examples.of_text(TokenBatch(ids, mask))
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    logits = [model(input_ids=row[None]).logits[0, :-1][kept[1:]] for row, kept in zip(ids, mask, strict=True)]
    return setup_of(folder, checkpoint, examples), examples, logits


@torch.no_grad()
def of_switch(folder: Path) -> Taught:
    """Pairs of different lengths."""
    random_switch().save_pretrained(folder / "switch")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "switch").eval()
    generator = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(2, 22, (2, NUM_SEQUENCES, LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.tensor([[10], [5], [8], [10], [3], [10], [7]])
    targets[torch.arange(LENGTH) >= torch.tensor([[4], [9], [1], [6], [2], [9], [9]])] = IGNORED
    logits = [
        model(input_ids=row[kept][None], labels=target[target != IGNORED][None]).logits[0]
        for row, kept, target in zip(ids, mask, targets, strict=True)
    ]
    examples = Examples(ids, mask, targets)
    return setup_of(folder, folder / "switch", examples), examples, logits


def setup_of(folder: Path, checkpoint: Path, examples: Examples) -> TeacherSetup:
    examples.save(folder / "examples")
    return TeacherSetup(checkpoint, folder / "examples", folder / "cache", 8, 2.0, 2, "float32", "cpu")


@pytest.fixture(scope="module", params=["mixtral", "switch"])
def taught(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Checkpoint) -> Taught:
    folder = tmp_path_factory.mktemp(request.param)
    return of_switch(folder) if request.param == "switch" else of_mixtral(folder, tiny("mixtral"))


def changed(setup: TeacherSetup, folder: Path, top_k: int = 8) -> TeacherSetup:
    """The same in another folder, perhaps with more tokens."""
    folder.mkdir()
    return replace(setup, folder=folder, top_k=top_k)


def run(setup: TeacherSetup, num_slots: int = 1) -> TeacherCache:
    executor = InProcess(1)
    executor.num_slots = num_slots
    return teach(setup, executor, Reporter(None, Console(quiet=True)), SMALL_SHARD_BYTES)


@pytest.mark.parametrize("group_bytes", [1, 1000], ids=["a sequence a row group", "several"])
def test_answers_are_those_of_the_whole_model(
    group_bytes: int, taught: Taught, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "_GROUP_BYTES", group_bytes)
    setup, examples, logits = taught
    cache = run(changed(setup, tmp_path / "cache"))
    order = torch.tensor([5, 0, 2, 4, 3, 6, 1, 5])
    found = cache.targets(order)
    z = torch.cat([logits[n] for n in order])
    assert len(found.ids) == int(examples.num_counted[order].sum())
    top, ids = z.topk(8, -1)
    assert torch.equal(found.ids.long(), ids)
    torch.testing.assert_close(found.logits.float(), top - top[:, :1], rtol=2**-10, atol=1e-5)
    tail = (z.scatter(1, ids, -torch.inf) / 2.0).logsumexp(-1) - top[:, 0] / 2.0
    torch.testing.assert_close(found.log_tail, tail, rtol=1e-5, atol=1e-5)


def test_the_divergence_from_a_cache_grows_with_its_tokens_to_the_full_one(taught: Taught, tmp_path: Path) -> None:
    setup, examples, logits = taught
    full = torch.cat(logits)
    student = full + torch.randn(full.shape, generator=torch.Generator().manual_seed(0))
    targets = examples.targets[examples.targets != IGNORED]

    def divergence(answer: CachedTargets | FullTargets) -> float:
        return float(token_loss(student, targets, answer, 1.0, 1.0, 2.0).kl)

    bounds = []
    for top_k in (1, 4, 16, 1000):
        cache = run(changed(setup, tmp_path / str(top_k), top_k))
        bounds.append(divergence(cache.targets(torch.arange(NUM_SEQUENCES))))
    assert bounds == sorted(bounds)
    assert bounds[0] < 0.9 * bounds[-1]
    assert bounds[-1] == pytest.approx(divergence(FullTargets(full)), rel=1e-3)


def test_pieces_are_the_same_bytes_however_they_are_made(taught: Taught, tmp_path: Path) -> None:
    whole, killed, shared = (changed(taught[0], tmp_path / name) for name in ("whole", "killed", "shared"))
    run(whole)
    expected = {path.name: path.read_bytes() for path in whole.folder.iterdir()}
    assert len(expected) >= 3
    shards = list(shard_ranges(taught[1].num_counted, 8, SMALL_SHARD_BYTES))
    assert write_teacher_shards(killed, shards[1:2]) == int(taught[1].num_counted[slice(*shards[1])].sum())
    before = killed.shard(shards[1]).stat().st_mtime_ns
    run(killed)
    assert killed.shard(shards[1]).stat().st_mtime_ns == before
    run(shared, num_slots=3)
    for setup in (killed, shared):
        assert {path.name: path.read_bytes() for path in setup.folder.iterdir()} == expected
    assert write_teacher_shards(killed, shards) == 0


def test_a_cache_of_something_else_is_refused(taught: Taught, tmp_path: Path) -> None:
    setup, examples, _ = taught
    cache, counted = run(changed(setup, tmp_path / "cache")), examples.num_counted
    other = counted.roll(1)
    for temperature, top_k, num_counted, match in (
        (1.0, 8, counted, r"temperature 2.0, must be 1.0; remove the folder"),
        (2.0, 9, counted, r"top_k 8, must be 9"),
        (2.0, 8, other, r"num_tokens \d+, must be \d+"),
        (2.0, 8, counted[:-1], r"sequences .*, must be 0 to 6 without a gap"),
    ):
        with pytest.raises(RecipeError, match=match):
            cache.check(temperature, top_k, num_counted)
    with pytest.raises(RecipeError, match="temperature"):
        run(replace(setup, folder=cache.folder, temperature=1.0))
    next(iter(sorted(cache.folder.iterdir()))).unlink()
    for folder in (cache.folder, tmp_path):
        with pytest.raises(RecipeError, match="without a gap"):
            TeacherCache(folder).check(2.0, 8, counted)


def answers(monkeypatch: pytest.MonkeyPatch, setup: TeacherSetup, logits: Tensor) -> CachedTargets:
    """What a cache makes of the logits (N, S, V) of a teacher."""
    monkeypatch.setattr(teacher, "streamed_logits", lambda *_: iter(logits))
    write_teacher_shards(setup, [(0, len(logits))])
    return TeacherCache(setup.folder).targets(torch.arange(len(logits)))


def test_large_vocabularies_and_what_half_precision_costs(
    tmp_path: Path, tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab, length = 70_000, 4
    generator = torch.Generator().manual_seed(0)
    z = 6 * torch.randn(2, length, vocab, generator=generator) + 40
    examples = Examples.of_text(TokenBatch(token_ids(2, length), torch.ones(2, length, dtype=torch.bool)))
    setup = changed(setup_of(tmp_path, tiny("mixtral"), examples), tmp_path / "cache", 512)
    found = answers(monkeypatch, setup, z)
    rows = z[:, :-1].flatten(0, 1)
    top, ids = rows.topk(512, -1)
    assert torch.equal(found.ids.long(), ids)
    exact = CachedTargets(ids, top, (rows.scatter(1, ids, -torch.inf) / 2).logsumexp(-1))
    student = rows + torch.randn(rows.shape, generator=generator)
    targets = torch.zeros(len(rows), dtype=torch.int64)
    kl, expected = (float(token_loss(student, targets, each, 0.0, 1.0, 2.0).kl) for each in (found, exact))
    assert abs(kl - expected) / len(rows) < 1e-4


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_teacher_that_overflows_is_refused(
    value: float, taught: Taught, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = changed(taught[0], tmp_path / "cache")
    logits = torch.zeros(NUM_SEQUENCES, LENGTH, 32)
    logits[0, 0, 5] = value
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        answers(monkeypatch, setup, logits)
    assert not list(setup.folder.iterdir())


@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=30),
    top_k=st.integers(1, 9),
    shard_bytes=st.integers(1, 2000),
)
def test_shards_follow_each_other_and_are_about_as_large_as_asked(
    counts: list[int], top_k: int, shard_bytes: int
) -> None:
    shards = list(shard_ranges(torch.tensor(counts), top_k, shard_bytes))
    assert [n for shard in shards for n in range(*shard)] == list(range(len(counts)))
    sizes = [[count * (6 * top_k + 4) for count in counts[start:stop]] for start, stop in shards]
    assert all(sum(size[1:]) <= shard_bytes for size in sizes)
    assert all(sum(size) + sum(following) >= shard_bytes for size, following in itertools.pairwise(sizes))
