"""A manifest becomes recipes: what jobs share, what each says itself, and everything that is wrong, told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_compress.batch_recipe import Entry, _merged, expand, parse_batch
from moe_compress.errors import RecipeError

FOLDER = Path("/batches/may")
DEFAULTS = {
    "calibration": {"text": "a.txt", "num_sequences": 4},
    "method": {"name": "d2moe", "damping": 0.5},
    "cluster": {"local": True},
}


def entries(*jobs: dict[str, Any], **batch: Any) -> dict[str, Entry]:
    """The jobs by name; nothing may be wrong."""
    found, problems = expand(parse_batch({"defaults": DEFAULTS, "jobs": list(jobs)} | batch), FOLDER)
    assert problems == []
    return {entry.name: entry for entry in found}


def problems(*jobs: dict[str, Any], **batch: Any) -> list[str]:
    return expand(parse_batch({"defaults": DEFAULTS, "jobs": list(jobs), **batch}), FOLDER)[1]


def job(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "model": "org/mixtral", "method": {"ratio": 0.4}} | more


def test_a_job_a_ratio_with_one_job_folder() -> None:
    found = entries({"name": "mixtral", "model": "org/mixtral", "ratios": [0.4, 0.65]})
    assert list(found) == ["mixtral-0.4", "mixtral-0.65"]
    recipes = [entry.recipe for entry in found.values()]
    assert [recipe.method.ratio for recipe in recipes] == [0.4, 0.65]
    assert [recipe.output for recipe in recipes] == [f"{FOLDER}/mixtral-0.4", f"{FOLDER}/mixtral-0.65"]
    assert len({recipe.job_path for recipe in recipes}) == 1
    assert recipes[0].job_path.parent == FOLDER
    assert {recipe.method.damping for recipe in recipes} == {0.5}


def test_job_folders_are_shared_by_model_and_calibration_alone() -> None:
    found = entries(
        job("a"),
        job("merged", method={"name": "msmoe", "ratio": 0.5}),
        job("other-text", calibration={"text": "b.txt"}),
        job("other-model", model="org/qwen"),
        job("same-name", model="other/mixtral"),
        job("own", job_dir="/elsewhere"),
    )
    folder = {name: entry.recipe.job_path for name, entry in found.items()}
    assert folder["a"] == folder["merged"]
    assert len(set(folder.values())) == 5
    assert folder["own"] == Path("/elsewhere")
    assert found["other-text"].recipe.calibration.num_sequences == 4


def test_another_method_keeps_nothing_of_the_default_one() -> None:
    found = entries(job("merged", method={"name": "msmoe", "ratio": 0.5}))
    assert found["merged"].recipe.method.name == "msmoe"  # which knows no damping
    method = {"name": "d2moe", "ratio": 0.4}
    found = entries(job("a", method=method), defaults=DEFAULTS | {"method": {"damping": 0.25}})
    assert found["a"].recipe.method.damping == 0.25


def test_outputs_by_template() -> None:
    found = entries(job("a", output="{folder}/out/{name}-x"), job("b", output="/o/{name}"))
    assert [entry.recipe.output for entry in found.values()] == [f"{FOLDER}/out/a-x", "/o/b"]


def test_everything_wrong_is_told_at_once() -> None:
    told = problems(
        job("a", method={"ratio": 1.5}),
        job("b", banana=1),
        job("c"),
        job("c", output="/o/c"),
        job("d", output="/o/d"),
        job("e", output="/o/d"),
    )
    assert [line.split(";")[0] for line in told] == [
        "job a: method.ratio: 1.5 is not valid",
        "job b: banana: unknown key",
        "job c: is there 2 times",
        "output: /o/d is that of 2 jobs",
    ]


def test_a_job_does_not_work_in_the_folder_of_its_batch() -> None:
    (line,) = problems(job("a", job_dir=str(FOLDER)))
    assert line.startswith(f"job a: job_dir: {FOLDER} is the batch's own folder")


def test_jobs_side_by_side_on_a_cluster_say_their_share() -> None:
    shared = {"cluster": {"local": False}}
    (line,) = problems(job("a", **shared), max_parallel=2)
    assert line.startswith("job a: cluster.layer_workers: missing")
    assert problems(job("a", **shared), max_parallel=1) == []
    assert problems(job("a", cluster={"local": False, "layer_workers": 1}), max_parallel=2) == []


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"jobs": []}, "jobs: [] is not valid"),
        ({}, "jobs: missing"),
        ({"jobs": [{"model": "m"}]}, "jobs.0.name: missing"),
        ({"jobs": [{"name": "a/b"}]}, "jobs.0.name: 'a/b'"),
        ({"jobs": [{"name": "a", "ratios": []}]}, "jobs.0.ratios: []"),
        ({"jobs": [{"name": "a"}], "parallel": 2}, "parallel: unknown key"),
        ({"jobs": [{"name": "a"}], "max_parallel": 0}, "max_parallel: 0"),
        ({"jobs": [{"name": "a"}], "folder": ""}, "folder: '' is not valid; names nothing"),
        *(
            ({"jobs": [{"name": "a"}], "folder": folder}, f"folder: '{folder}' is not valid; names no folder of a disk")
            for folder in ("s3://bucket", "s3://bucket/may", "gs://bucket/may", "file:///may")
        ),
    ],
)
def test_a_manifest_that_is_none(data: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_batch(data)
    assert str(refused.value).startswith(said)


KEYS = st.sampled_from("abc")
PLAIN = st.integers(0, 3) | st.dictionaries(KEYS, st.integers(0, 3) | st.dictionaries(KEYS, st.integers(0, 3)))


@given(st.dictionaries(KEYS, PLAIN), st.dictionaries(KEYS, PLAIN))
def test_what_is_said_above_counts(below: dict[str, Any], above: dict[str, Any]) -> None:
    found = _merged(below, above)
    assert _merged(found, above) == found
    assert _merged(below, {}) == below
    assert _merged({}, above) == above
    assert found.keys() == below.keys() | above.keys()
    for key, value in above.items():
        assert found[key] == value or (isinstance(value, dict) and _merged(found[key], value) == found[key])


def test_the_digest_is_of_the_whole_recipe() -> None:
    digests = {
        next(iter(entries(job("a", **more)).values())).digest
        for more in ({}, {"evaluation": {"text": "b.txt"}}, {"method": {"ratio": 0.5}}, {"output": "/elsewhere"})
    }
    assert len(digests) == 4
