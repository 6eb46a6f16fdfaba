"""Recipes submitted to a cluster on loopback that asks for a token."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.authentication_test_utils import reset_auth_token_state
from transformers import PreTrainedTokenizerFast

from cluster.submission import JobServer
from jobs import cli
from jobs import submit as jobs_submit
from jobs.submit import resolve, resolve_batch
from moe_compress.batch_recipe import expand, parse_batch
from moe_compress.errors import RecipeError
from moe_compress.recipe import load_recipe, parse_recipe
from moe_compress.report.status import read_status
from tests.cluster_cases import ROOT, finish, hashes, start, write_model, write_recipe
from tests.loopback import Loopback, loopback_cluster

TIMEOUT_S = 240


@pytest.fixture(scope="module")
def cluster() -> Iterator[Loopback]:
    with loopback_cluster() as found:
        yield found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), tokenizer)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory, model: Path, text_file: Path) -> dict[str, str]:
    """Hashes of the output of a job in-process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, errors = finish(start(write_recipe(folder / "r.yaml", model, text_file, folder / "out", {"local": True})))
    assert code == 0, errors
    return hashes(folder / "out")


def begin(cluster: Loopback, *arguments: str) -> subprocess.Popen[str]:
    """`moe-compress submit ARGUMENTS` as somebody whose shell knows the cluster's token and no more."""
    main = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from jobs.cli import main; main()"
    return subprocess.Popen(  # whoever runs the tests in the background has Ctrl-C ignored by all below
        [sys.executable, "-c", main, "submit", "--address", cluster.dashboard, *arguments],
        cwd=ROOT,
        env={key: value for key, value in cluster.environment.items() if key != "RAY_AUTH_MODE"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """(exit code, standard output, the last line of standard error)."""
    out, errors = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out, (errors.splitlines() or [""])[-1]


@pytest.fixture
def call(
    cluster: Loopback, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """The same in this process, which takes less time; the token is the cluster's unless another is given."""

    def run(*arguments: str, token: str = cluster.token) -> tuple[int, str, str]:
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        reset_auth_token_state()
        monkeypatch.setattr(sys, "argv", ["moe-compress", "submit", "--address", cluster.dashboard, *arguments])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        out, errors = capfd.readouterr()
        return code, out, (errors.splitlines() or [""])[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_API_SERVER_ADDRESS", "")  # which submitting sets
        yield run
    monkeypatch.undo()
    reset_auth_token_state()


Call = Callable[..., tuple[int, str, str]]


def wait_for(event: str, folder: Path) -> None:
    """Until a job has left an event."""
    deadline = time.monotonic() + TIMEOUT_S
    events = folder / "events.jsonl"
    while not (events.exists() and f'"{event}"' in events.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_stopped_and_submitted_again_it_goes_on_with_the_same_bytes(
    cluster: Loopback, call: Call, tmp_path: Path, model: Path, text_file: Path, wanted: dict[str, str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", model, text_file, tmp_path / "out", {"layer_workers": 1})
    job = begin(cluster, str(recipe))
    wait_for("stage_end", tmp_path / "out.job")
    code, out, error = call(str(recipe), "--no-wait")
    name = out.split(":")[0]
    assert (code, out.splitlines()[0]) == (0, f"{name}: runs already")
    assert name.startswith("out-")
    assert call("--stop", name)[:2] == (0, f"{name}: stopped\n")
    code, out, error = end(job)
    assert (code, error) == (1, f"error: job {name}: was stopped; submit the same recipe again to go on")
    assert out.startswith(f"{name}: submitted\n")
    assert "calibrate: " in out
    assert read_status(tmp_path / "out.job").state == "stopped"
    assert call("--stop", name)[:2] == (0, f"{name}: had ended before\n")

    code, out, error = call(str(recipe))
    assert code == 0, error
    assert out.startswith(f"{name}.2: submitted\n")
    assert "perplexity" in out
    assert hashes(tmp_path / "out") == wanted
    lines = [json.loads(line) for line in (tmp_path / "out.job" / "events.jsonl").read_text().splitlines()]
    calibrated = [line for line in lines if line["event"] == "stage_end" and line["stage"] == "calibrate"]
    assert len(calibrated) == 1
    assert read_status(tmp_path / "out.job").state == "done"


@pytest.mark.slow
def test_a_job_that_fails_there_gives_its_code_and_its_reason(call: Call, tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", model, tmp_path / "no.txt", tmp_path / "out", {})
    code, out, _ = call(str(recipe), "--submission-id", "fails", "--no-wait")
    assert code == 0
    assert out.startswith("fails: submitted\nFollow it: moe-compress submit --address http://127.0.0.1")
    code, out, error = call("--follow", "fails")
    reason = f"calibration.text: {tmp_path}/no.txt: no such text file"
    assert code == 2
    assert error.startswith(f"error: job fails: {reason}")
    assert f"error: {reason}" in out
    assert not (tmp_path / "out.job").exists()


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_alone(cluster: Loopback, call: Call, tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text("import time\nprint('begins', flush=True)\ntime.sleep(600)\n")
    call("--follow", "nothing")  # leaves the token of the cluster with Ray
    JobServer(cluster.dashboard).submit("sleeps", f"python {job}", {})
    follower = begin(cluster, "--follow", "sleeps")
    assert follower.stdout is not None
    assert any(line == "begins\n" for line in follower.stdout)
    follower.send_signal(signal.SIGINT)
    code, _, error = end(follower)
    assert code == 1
    assert error.startswith("error: detached, the job goes on. Follow it: ")
    assert f"--address {cluster.dashboard} --stop sleeps" in error
    assert call("--stop", "sleeps")[1] == "sleeps: stopped\n"


@pytest.mark.slow
def test_who_is_refused(call: Call, tmp_path: Path, model: Path, text_file: Path) -> None:
    recipe = str(write_recipe(tmp_path / "recipe.yaml", model, text_file, tmp_path / "out", {}))
    for token, said in (("0" * 64, "Authentication failed"), (" ", "Token authentication is enabled but ")):
        code, out, error = call(recipe, token=token)
        assert (code, out) == (2, "")
        assert f"refused ({said}" in error
        assert error.endswith("set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to its token")
    code, out, error = call("--follow", "nothing")
    assert (code, out) == (2, "")
    assert "nothing: http://127.0.0.1" in error
    assert "knows no job of this name" in error


@pytest.mark.slow
def test_a_name_goes_on_from_attempt_to_attempt(cluster: Loopback, call: Call) -> None:
    call("--follow", "nothing")
    server = JobServer(cluster.dashboard)
    assert server.submit("three", "echo error: none && exit 3", {}) == ("three", True)
    job, reason = server.follow("three", lambda text: None)
    assert (job.status, job.driver_exit_code, reason) == ("FAILED", 3, "none")
    assert call("--follow", "three")[0] == 1  # 3 is none of our codes
    assert server.submit("three", "true", {}) == ("three.2", True)
    assert server.submit("thre", "true", {}) == ("thre", True)
    assert server.find("three").submission_id == "three.2"
    assert server.follow("three.2", lambda text: None)[0].status == "SUCCEEDED"
    assert call("--follow", "three")[0] == 0
    with pytest.raises(RecipeError, match="--runtime-env: cannot be sent"):
        server.submit("other", "true", {"working_dir": "/no/such/folder"})


def fail(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs `moe-compress submit` here, which must be refused in one line before it asks anybody; the line."""
    monkeypatch.setattr(sys, "argv", ["moe-compress", "submit", *arguments])
    monkeypatch.setattr("jobs.submit.connect", lambda address: pytest.fail("it was to be sent"))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert ";" in line
    return line


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.ratio=1.5", "method.ratio: 1.5"),
        ("method={name: d2moe, ratio: 0.99, ranks: uniform}", "method.ratio: 0.99"),
        ("output=small", "output: 'small' is relative"),
        ("job_dir=small.job", "job_dir: 'small.job' is relative"),
        ("calibration.text=a.txt", "calibration.text: 'a.txt' is relative, and nothing is sent along"),
        ("evaluation.text=a.txt", "evaluation.text: 'a.txt' is relative"),
        ("evaluation.tasks=[{name: quiz, test: a.jsonl}]", "evaluation.tasks.test: 'a.jsonl' is relative"),
        ("model=model", "model: 'model' is relative"),
    ],
)
def test_recipes_are_refused_here(
    override: str,
    said: str,
    tmp_path: Path,
    model: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", model, text_file, tmp_path / "out", {})
    (tmp_path / "model").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    assert fail(monkeypatch, capfd, str(recipe), "--set", override).startswith(f"error: {said}")


def test_arguments_are_refused(
    tmp_path: Path, model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(tmp_path / "recipe.yaml", model, text_file, tmp_path / "out", {}))
    bad = tmp_path / "bad.yaml"
    bad.write_text("- a")
    assert "--command explode" in fail(monkeypatch, capfd, recipe, "--command", "explode")
    assert "--working-dir /no" in fail(monkeypatch, capfd, recipe, "--working-dir", "/no")
    assert "--runtime-env /no.yaml" in fail(monkeypatch, capfd, recipe, "--runtime-env", "/no.yaml")
    assert f"--runtime-env {bad}" in fail(monkeypatch, capfd, recipe, "--runtime-env", str(bad))
    assert "give one of them" in fail(monkeypatch, capfd, recipe, "--stop", "name")
    assert "give one of them" in fail(monkeypatch, capfd)


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "127.0.0.1:6379", "auto", "http://127.0.0.1:port"])
def test_no_server(
    address: str,
    tmp_path: Path,
    model: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe = str(write_recipe(tmp_path / "recipe.yaml", model, text_file, tmp_path / "out", {}))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setattr(sys, "argv", ["moe-compress", "submit", recipe, "--address", address])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: --address {address}: no ")


def test_what_is_sent_is_the_recipe_for_the_running_cluster(tmp_path: Path, model: Path, text_file: Path) -> None:
    sent_along = tmp_path / "along"
    sent_along.mkdir()
    (sent_along / "a.txt").write_text("")
    path = write_recipe(tmp_path / "recipe.yaml", model, text_file, tmp_path / "out", {"local": True, "threads": 3})
    sent = resolve("compress", path, ["calibration.text=a.txt", "method.preset=paper"], sent_along)
    assert (sent.cluster.local, sent.cluster.address, sent.cluster.threads) == (False, "auto", 3)
    there = parse_recipe(yaml.safe_load(sent.to_yaml()))
    assert there == sent
    here = load_recipe(path, ["calibration.text=a.txt", "method.preset=paper"])
    assert there.model_copy(update={"cluster": here.cluster}) == here
    with pytest.raises(RecipeError, match="is not there"):
        resolve("compress", path, ["calibration.text=b.txt"], sent_along)


def test_trainings_are_sent_with_what_makes_their_student(tmp_path: Path, model: Path, text_file: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", model, text_file, tmp_path / "out", {})
    sent: Any = resolve("distill", path, [f"distillation.text={text_file}"], None)
    assert sent.method.name == "d2moe"
    with pytest.raises(RecipeError, match=r"distillation\.text: 'a\.txt' is relative"):
        resolve("distill", path, ["distillation.text=a.txt"], None)
    with pytest.raises(RecipeError, match=r"distillation\.output: 'x' is relative"):
        resolve("distill", path, [f"distillation.text={text_file}", "distillation.output=x"], None)
    alone = ["method=null", "calibration=null", f"distillation={{text: {text_file}}}", "teacher=org/teacher"]
    sent = resolve("distill", path, alone, None)
    assert (sent.teacher, sent.cluster.address) == ("org/teacher", "auto")
    os.makedirs(tmp_path / "org" / "teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(RecipeError, match="teacher: 'org/teacher' is relative"):
            resolve("distill", path, alone, None)


def test_batches_of_many_jobs_fit_into_a_command_or_are_refused(
    tmp_path: Path, model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest: dict[str, Any] = {
        "folder": str(tmp_path / "many"),
        "defaults": {"calibration": {"text": str(text_file)}, "method": {"name": "d2moe"}},
        "jobs": [{"name": f"a{number}", "model": str(model), "method": {"ratio": 0.5}} for number in range(150)],
    }
    path = tmp_path / "many.yaml"
    path.write_text(yaml.safe_dump(manifest))
    _, text = resolve_batch(path, [], None)
    assert len(f"true - <<'END'\n{text}END") < jobs_submit._COMMAND_BYTES
    assert subprocess.run(["sh", "-c", f"true - <<'END'\n{text}END"]).returncode == 0

    manifest["defaults"]["calibration"]["text"] = [str(text_file)] * 20
    path.write_text(yaml.safe_dump(manifest))
    line = fail(monkeypatch, capfd, str(path), "--command", "batch")
    assert re.match(rf"error: {path}: takes [\d,]+ bytes as it is sent, and a job can be sent 128,000; split it", line)


def test_batches_are_sent_with_every_recipe_written_out(tmp_path: Path, model: Path, text_file: Path) -> None:
    method = {"name": "d2moe", "preset": "paper", "weighting": "loss"}  # which is the default, but not of the preset
    manifest: dict[str, Any] = {
        "folder": str(tmp_path / "many"),
        "defaults": {"calibration": {"text": str(text_file)}, "cluster": {"local": True, "layer_workers": 1}},
        "jobs": [{"name": "a", "model": str(model), "method": method, "ratios": [0.4, 0.6]}],
    }
    path = tmp_path / "many.yaml"
    path.write_text(yaml.safe_dump(manifest))
    folder, text = resolve_batch(path, ["max_parallel=2"], None)
    here, _ = expand(parse_batch(manifest), tmp_path / "many")
    sent, problems = expand(parse_batch(yaml.safe_load(text)), Path(folder))
    assert problems == []
    assert [entry.name for entry in sent] == ["a-0.4", "a-0.6"]
    for mine, its in zip(here, sent, strict=True):
        assert its.recipe.cluster.address == "auto"
        assert not its.recipe.cluster.local
        assert its.recipe.model_copy(update={"cluster": mine.recipe.cluster}) == mine.recipe
    for override, said in (
        ("folder=many", "folder: many is no path from the root"),
        ("jobs.0=x", "--set"),
        ("defaults.calibration.text=a.txt", "job a-0.4: calibration.text: 'a.txt' is relative"),
        ("defaults.method.ranks=3", "job a-0.4: method.ranks"),
    ):
        with pytest.raises(RecipeError) as refused:
            resolve_batch(path, [override], None)
        assert str(refused.value).startswith(said)
