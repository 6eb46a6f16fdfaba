"""Statistics against brute force, and against themselves in other batches, workers and dtypes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_compress.calibration import worker
from moe_compress.calibration.schedule import Schedule, Value
from moe_compress.calibration.statistics import SAMPLED, LayerStatistics, is_gram
from moe_compress.calibration.text import TokenBatch
from moe_compress.calibration.worker import CalibrationSetup, LayerWorker, statistics_path
from moe_compress.errors import CalibrationError
from moe_compress.model.discovery import MoELayer
from moe_compress.model.driven import Inputs, LossFunction
from moe_compress.model.grouped import RowLayout
from moe_compress.model.observer import RoutedTokens
from tests.calibration.brute_force import Sums, brute_force
from tests.tiny_models import save_tiny, token_ids

MODEL_TYPES = ["mixtral", "gpt_oss", "nemotron_h"]  # plain; biased, transposed, interleaved; without gate
LENGTH, PADDING = 10, 4


@pytest.fixture(scope="module", params=MODEL_TYPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def padded_tokens(num_sequences: int = 5) -> TokenBatch:
    """The last sequence ends in padding."""
    ids = token_ids(num_sequences, LENGTH)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[-1, LENGTH - PADDING :] = False
    return TokenBatch(ids * mask, mask)


def make_setup(checkpoint: Path, folder: Path, tokens: TokenBatch, **changes: Any) -> CalibrationSetup:
    folder.mkdir(parents=True, exist_ok=True)
    tokens.save(folder / "tokens.safetensors")
    setup = CalibrationSetup(
        checkpoint=checkpoint,
        tokens=folder / "tokens.safetensors",
        statistics=folder / "statistics",
        scratch=folder / "scratch",
        batch_size=2,
        dtype=None,
        device="cpu",
        activation_bytes=2**20,
        full_grams=True,
        sampled_seed=None,
        chunk_layers=1,
        num_workers=1,
    )
    setup.statistics.mkdir()
    return replace(setup, **changes)


class ListeningWorker(LayerWorker):
    """Remembers the loss of each micro-batch."""

    def __init__(self, setup: CalibrationSetup) -> None:
        super().__init__(setup)
        self.losses: list[float] = []

    def _loss_function(self, batch: int) -> LossFunction:
        function = super()._loss_function(batch)

        def loss(logits: Tensor, inputs: Inputs) -> Tensor:
            total = function(logits, inputs)
            self.losses.append(total.item())
            return total

        return loss


def calibrate(setup: CalibrationSetup) -> tuple[float, Sums]:
    """The steps of the schedule, in an order that it allows; the summed loss, and the statistics from their files."""
    workers = [ListeningWorker(setup) for _ in range(setup.num_workers)]
    model = workers[0].describe()
    assert model.chained
    schedule = Schedule(len(model.chunks), [1] * len(workers[0].batches), setup.num_workers, setup.num_groups)
    for index in range(setup.num_workers):
        schedule.join(index)
    values: dict[Value, Tensor] = {}
    found: Sums = {}
    while not schedule.is_finished:
        schedule.next()
        index = next(index for index, steps in schedule.running.items() if steps)
        step = schedule.running[index][0]
        made, paths = workers[index].run(step, [values[value] for value in schedule.needs(step)])
        if (value := schedule.makes(step)) is not None and made is not None:
            values[value] = made
        for value in schedule.done(index, step):
            del values[value]
        for path in paths:
            layer = workers[index].moe[path]
            found[path] = unpacked(LayerStatistics.load(layer, statistics_path(setup.statistics, path)))
    return sum(sum(worker.losses) for worker in workers), found


def unpacked(statistics: LayerStatistics) -> dict[str, Tensor]:
    """All sums, Grams as whole matrices."""
    return {name: statistics.gram(name) if is_gram(name) else sums for name, sums in statistics.tensors.items()}


def assert_same(found: Sums, expected: Sums, relative: float) -> None:
    assert found.keys() == expected.keys()
    for path, tensors in found.items():
        for name, tensor in tensors.items():
            reference = torch.as_tensor(expected[path][name]).double()
            error = (tensor.double() - reference).abs().max() / reference.abs().max()
            assert error < relative, f"{path} {name}: off by {error:.1e}"


def assert_equal(found: Sums, expected: Sums) -> None:
    assert found.keys() == expected.keys()
    for path, tensors in found.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[path][name]), f"{path} {name}"


def test_every_statistic_equals_brute_force(checkpoint: Path, tmp_path: Path) -> None:
    tokens = padded_tokens()
    loss, found = calibrate(make_setup(checkpoint, tmp_path, tokens))
    model_type = checkpoint.name.rstrip("0123456789")
    expected_loss, expected = brute_force(checkpoint, model_type, tokens)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same(found, expected, 1e-5)
    for tensors in found.values():
        for name in tensors:
            if name.endswith("_gram"):
                assert torch.equal(tensors[name], tensors[name].mT), name


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_batch_size_changes_nothing(checkpoint: Path, tmp_path: Path, batch_size: int) -> None:
    tokens = padded_tokens()
    _, pairs = calibrate(make_setup(checkpoint, tmp_path / "pairs", tokens))
    _, other = calibrate(make_setup(checkpoint, tmp_path / "other", tokens, batch_size=batch_size))
    assert_same(other, pairs, 1e-5)


def test_more_padding_changes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    tokens = padded_tokens()
    wider = TokenBatch(*(nn.functional.pad(t, (0, 3)) for t in (tokens.input_ids, tokens.attention_mask)))
    _, found = calibrate(make_setup(checkpoint, tmp_path / "narrow", tokens))
    _, padded = calibrate(make_setup(checkpoint, tmp_path / "wide", wider))
    assert_same(padded, found, 1e-5)


@pytest.mark.parametrize(("chunk_layers", "dtype"), [(1, None), (2, None), (1, torch.bfloat16)])
def test_two_workers_give_the_bytes_of_one(
    checkpoint: Path, tmp_path: Path, chunk_layers: int, dtype: torch.dtype | None
) -> None:
    tokens = padded_tokens()
    _, one = calibrate(make_setup(checkpoint, tmp_path / "one", tokens, dtype=dtype))
    changes: dict[str, Any] = {"dtype": dtype, "chunk_layers": chunk_layers, "num_workers": 2}
    _, two = calibrate(make_setup(checkpoint, tmp_path / "two", tokens, **changes))
    assert_equal(two, one)


def test_spilled_activations_change_nothing(mixtral: Path, tmp_path: Path) -> None:
    tokens = padded_tokens()
    _, kept = calibrate(make_setup(mixtral, tmp_path / "kept", tokens))
    _, spilled = calibrate(make_setup(mixtral, tmp_path / "spilled", tokens, activation_bytes=0))
    assert_equal(spilled, kept)


def test_sampled_labels_are_drawn_from_the_model_and_reproducible(mixtral: Path, tmp_path: Path) -> None:
    tokens = padded_tokens()
    loss, text = calibrate(make_setup(mixtral, tmp_path / "text", tokens))
    runs = [calibrate(make_setup(mixtral, tmp_path / str(i), tokens, sampled_seed=s)) for i, s in enumerate((0, 0, 1))]
    assert len({loss, runs[0][0], runs[2][0]}) == 3
    assert_equal(runs[1][1], runs[0][1])
    for path, tensors in text.items():
        assert torch.equal(runs[0][1][path]["up_input_gram"], tensors["up_input_gram"])
        assert not torch.allclose(runs[0][1][path]["up_fisher"], tensors["up_fisher"])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_every_third_real_token_is_sampled(
    mixtral: Path, tmp_path: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = padded_tokens()
    _, every = calibrate(make_setup(mixtral, tmp_path / "every", tokens))
    monkeypatch.setattr(worker, "SAMPLE_TOKENS", -(-tokens.num_tokens // 3))
    _, third = calibrate(make_setup(mixtral, tmp_path / "third", tokens, batch_size=batch_size))
    for path, tensors in third.items():
        for name in SAMPLED:
            torch.testing.assert_close(tensors[name], every[path][name][::3])


def test_merged_halves_equal_the_whole(mixtral: Path, tmp_path: Path) -> None:
    tokens = padded_tokens(4)
    halves = [TokenBatch(tokens.input_ids[i : i + 2], tokens.attention_mask[i : i + 2]) for i in (0, 2)]
    setups = [make_setup(mixtral, tmp_path / str(i), half) for i, half in enumerate(halves)]
    for setup in setups:
        calibrate(setup)
    _, whole = calibrate(make_setup(mixtral, tmp_path / "whole", tokens))
    merged: Sums = {}
    for layer in LayerWorker(setups[0]).moe.values():
        first, second = (LayerStatistics.load(layer, statistics_path(s.statistics, layer.path)) for s in setups)
        first.merge(second)
        merged[layer.path] = unpacked(first)
    assert_same(merged, whole, 1e-6)


def test_an_expert_nobody_routes_to_gives_zeros(mixtral: Path, tmp_path: Path) -> None:
    ids = torch.full((1, 3), 7)
    _, found = calibrate(make_setup(mixtral, tmp_path, TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool))))
    idle = {path: tensors["num_tokens"] == 0 for path, tensors in found.items()}
    assert any(bool(unused.any()) for unused in idle.values())
    for path, tensors in found.items():
        for name, tensor in tensors.items():
            assert tensor.isfinite().all(), name
            if name not in ("router_gram", "num_sequences", *SAMPLED):
                assert not tensor[idle[path]].any(), name


# --- synthetic layers ----------------------------------------------------------------------------------------

WIDE = MoELayer("experts", 3, 300, 280, True, False, False, True)
NUM_SEQUENCES, SEQUENCE_LENGTH = 2, 400


def routed(dtype: torch.dtype) -> RoutedTokens:
    """Expert 1 sees nothing, expert 2 no token of sequence 0; filler after the rows of each expert."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = NUM_SEQUENCES * SEQUENCE_LENGTH
    first = torch.arange(num_tokens)[torch.rand(num_tokens, generator=generator) < 0.5]
    third = torch.arange(SEQUENCE_LENGTH + 1, num_tokens, 2)
    layout = RowLayout.of(torch.tensor([0] * len(first) + [2] * len(third)), 3, True)

    def rows(*shape: int) -> Tensor:
        values = torch.randn(len(layout.source_S), *shape, generator=generator).to(dtype)
        return values.index_fill_(0, layout.filler, 0)

    D, F = WIDE.hidden_size, WIDE.intermediate_size
    return RoutedTokens(
        counts=layout.counts,
        sizes=layout.sizes,
        token_S=torch.cat([first, third])[layout.source_S].index_fill_(0, layout.filler, 0),
        weight_S=rows().float().abs(),
        x_SD=rows(D),
        up_SM=rows(2 * F),
        h_SF=rows(F),
        y_SD=rows(D),
        d_up_SM=rows(2 * F),
        d_y_SD=rows(D),
        output_norm_S=rows().float().abs(),
        hidden_TD=torch.zeros(num_tokens, D),
        index_TK=torch.zeros(num_tokens, 1, dtype=torch.int64),
        weights_TK=torch.zeros(num_tokens, 1),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wide_grams_and_fisher_are_exact_in_every_dtype(dtype: torch.dtype) -> None:
    seen = routed(dtype)
    statistics = LayerStatistics(WIDE, full=True)
    statistics.update(seen, NUM_SEQUENCES, SEQUENCE_LENGTH)
    for name, z_SN, out_SM, d_SM in (
        ("up", seen.x_SD, seen.up_SM, seen.d_up_SM),
        ("down", seen.h_SF, seen.y_SD, seen.d_y_SD),
    ):
        parts = [t.double().split(seen.sizes) for t in (z_SN, out_SM, d_SM)]
        sequences = (seen.token_S // SEQUENCE_LENGTH).split(seen.sizes)
        for e, (z, out, d) in enumerate(zip(*parts, strict=True)):
            power = d.square().sum(1, keepdim=True)
            grads = [d[sequences[e] == s].T @ z[sequences[e] == s] for s in range(NUM_SEQUENCES)]
            columns = torch.stack(grads).square().sum((0, 1))
            expected = {
                "input_gram": z.T @ z,
                "input_loss_gram": (z * power).T @ z,
                "output_gram": out.T @ out,
                "output_loss_gram": (out * power).T @ out,
                "grad_gram": d.T @ d,
                "grad_diagonal": d.square().sum(0),
                "fisher": columns.sum(),
                "fisher_columns": columns,
            }
            for key, value in expected.items():
                if f"{name}_{key}" in statistics:
                    found = unpacked(statistics)[f"{name}_{key}"][e].double()
                    assert (found - value).abs().max() <= 2e-6 * value.abs().max(), (name, key, e)


def test_gradients_that_are_not_finite_are_refused() -> None:
    seen = routed(torch.float32)
    seen.d_up_SM[5, 7] = torch.inf
    with pytest.raises(CalibrationError, match=r"experts: .*NaN or Inf.*calibration.dtype: float32"):
        LayerStatistics(WIDE, full=False).update(seen, NUM_SEQUENCES, SEQUENCE_LENGTH)
