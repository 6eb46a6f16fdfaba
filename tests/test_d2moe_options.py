"""Jobs with every kind of D2-MoE option: what comes out loads, spends its budget and is what its factors say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_compress.checkpoint.manifest import MANIFEST_NAME
from moe_compress.materialize import materialize_checkpoint
from moe_compress.model.experts import skip_base_columns
from tests.conftest import Compress
from tests.tiny_models import token_ids

OPTIONS: dict[str, dict[str, Any]] = {
    "two-sided": {"weighting": "two_sided"},
    "column-wise Fisher base, two-sided": {"base": "fisher_columns", "weighting": "two_sided"},
    "bases by budget": {"base": "closed_form", "num_bases": "budget"},
    "two bases": {"base": "fisher", "num_bases": 2, "cluster_by": "routing"},
    "shared": {"share": 2, "gate_up": "separate"},
    "shared by budget": {"share": "budget", "base": "mean"},
    "alternating": {"base": "mean", "alternate": 4},
    "ranks by frequency": {"ranks": "frequency", "base": "mean"},
    "static columns": {"base": "mean", "base_sparsity": 0.5, "base_dynamic": 0},
    "semi-dynamic": {"base": "fisher", "base_sparsity": 0.5, "base_metric": "norm"},
}


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_compressed_with(name: str, compressed: Compress, tmp_path: Path) -> None:
    folder = compressed("mixtral", ratio=0.4, **OPTIONS[name])
    counts = json.loads((folder / MANIFEST_NAME).read_text())["parameters"]
    kept = counts["experts_compressed"] / counts["experts_original"]
    assert kept <= 0.6 + 1e-9
    assert kept > 0.6 - 0.12  # tiny matrices: a direction is much

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    skip_base_columns(model, False)
    ids = token_ids()
    logits = model(input_ids=ids).logits
    materialize_checkpoint(folder, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(logits, dense(input_ids=ids).logits, rtol=1e-3, atol=1e-4)
    skip_base_columns(model, True)
    skipped = model(input_ids=ids).logits
    assert torch.equal(skipped, logits) == ("dynamic" not in name)
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (ids.shape[0], ids.shape[1] + 3)


def test_an_option_without_effect_remakes_no_spectra(compressed: Compress) -> None:
    def spectra(**options: Any) -> set[Path]:
        folder = compressed("mixtral", ratio=0.4, base="mean", damping=0.003, **options)  # a damping of no other test
        return set(folder.with_name("mixtral.job").glob("spectra-*"))

    before = spectra(share=1)
    assert spectra(share=1, cluster_by="routing", base_dynamic=0.25, base_metric="norm") == before
    for without, option in (
        ({"base_sparsity": 0.5}, {"base_metric": "norm"}),
        ({"base_sparsity": 0.5}, {"base_dynamic": 0.25}),
        ({"num_bases": 2}, {"cluster_by": "routing"}),
        ({"share": 3}, {"cluster_by": "routing"}),
    ):
        before = spectra(**without)
        assert spectra(**without, **option) > before
