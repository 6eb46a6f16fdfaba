"""The `moe-compress` command. Exit codes: 0 done, 2 the user's input is wrong, 1 anything else."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

app = typer.Typer(
    name="moe-compress",
    help="Makes Mixture-of-Experts checkpoints smaller and keeps what they know.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_INTERRUPTED = 130
"""What typer returns after Ctrl-C; older ones raise Abort."""

RecipePath = Annotated[Path, typer.Argument(help="A recipe, YAML.", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Overrides a key of the recipe, such as method.ratio=0.4.", metavar="KEY=VALUE"),
]
Level = Annotated[str | None, typer.Option("--level", help="Which of its levels, such as 0.5; else the largest.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from moe_compress import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version)] = False,
) -> None:
    pass


@app.command()
def compress(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Runs or resumes a job."""
    from moe_compress.recipe import load_recipe

    from .run import run

    run(load_recipe(recipe, overrides or []), Console())


@app.command()
def distill(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Trains a compressed checkpoint to answer as the original does; without a teacher, any checkpoint on a text."""
    from moe_compress.recipe import load_training

    from .train import distill as run_training

    run_training(*load_training(recipe, overrides or []), Console())


@app.command()
def submit(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe, YAML.", metavar="RECIPE")] = None,
    overrides: Overrides = None,
    address: Annotated[
        str,
        typer.Option(help="URL of the cluster's dashboard.", envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"]),
    ] = "http://127.0.0.1:8265",
    command: Annotated[str, typer.Option(help="compress, distill, or batch for a manifest.")] = "compress",
    submission_id: Annotated[str | None, typer.Option(help="Name of the job; else made from the recipe.")] = None,
    working_dir: Annotated[Path | None, typer.Option(help="A folder to send along, for texts.")] = None,
    runtime_env: Annotated[Path | None, typer.Option(help="Ray's runtime environment, YAML.")] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not follow the job.")] = False,
    followed: Annotated[str | None, typer.Option("--follow", help="Follow this job.", metavar="ID")] = None,
    stopped: Annotated[str | None, typer.Option("--stop", help="Stop this job.", metavar="ID")] = None,
) -> None:
    """Runs a recipe on a Ray cluster elsewhere and follows it; the exit code is the job's."""
    from moe_compress.errors import RecipeError

    from . import submit as submission

    if sum(each is not None for each in (recipe, followed, stopped)) != 1:
        raise RecipeError("submit: neither or several of RECIPE, --follow and --stop are given; give one of them")
    if recipe is not None:
        sent = (submission_id, working_dir, runtime_env, not no_wait)
        submission.submit(recipe, overrides or [], address, Console(), command, *sent)
        return
    server = submission.connect(address)
    if stopped is not None:
        submission.stop(stopped, server, Console())
    else:
        submission.follow(str(server.find(str(followed)).submission_id), server, Console())


@app.command()
def batch(
    manifest: Annotated[Path, typer.Argument(help="Many checkpoints and ratios, YAML.", metavar="MANIFEST")],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Runs or resumes many jobs; one that fails does not stop the others."""
    from .batch import run_batch

    run_batch(manifest, overrides or [], Console(), as_json)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    gpus: Annotated[int | None, typer.Option(min=1, help="Plan for a cluster of so many GPUs.")] = None,
    gpu: Annotated[str, typer.Option(help="Which: a100, h100, h200, b200, l40s, l4, or measured.")] = "h100",
    assume: Annotated[
        list[str] | None, typer.Option(help="Of the cluster, such as storage=5e9.", metavar="NAME=VALUE")
    ] = None,
) -> None:
    """Says what a recipe would do, from config and index alone, here or on a cluster."""
    from moe_compress.errors import RecipeError
    from moe_compress.plan import make_plan
    from moe_compress.plan.machine import machine_of
    from moe_compress.recipe import load_recipe

    machine = None if gpus is None else machine_of(gpu, gpus, assume or [])
    result = make_plan(load_recipe(recipe, overrides or []), machine)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    else:
        result.show(Console())
    if result.problems:
        raise RecipeError(result.problems[0])


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint, compressed or not.")],
    text: Annotated[
        list[str] | None, typer.Option(help="Text files, or '{dataset: ..., config: ..., split: ...}'.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task such as sst2, or any name and a file of its questions, boolq=FILE.", metavar="TASK"),
    ] = None,
    against: Annotated[str | None, typer.Option(help="The original, to compare with.")] = None,
    level: Level = None,
    sequence_length: Annotated[int, typer.Option(min=2)] = 2048,
    max_windows: Annotated[int | None, typer.Option(min=1)] = None,
    max_examples: Annotated[int | None, typer.Option(min=1, help="The first so many of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the scores here.")] = None,
    parquet_out: Annotated[Path | None, typer.Option("--parquet", help="Write a row for each window here.")] = None,
) -> None:
    """Perplexity of a checkpoint, its agreement with the original, and its scores on tasks."""
    import yaml

    from moe_compress.errors import RecipeError

    from .run import run_evaluation_only

    for option, file in (("--json", json_out), ("--parquet", parquet_out)):
        if file is not None and not (file.absolute().parent.is_dir() and not file.is_dir()):
            raise RecipeError(f"{option} {file}: not a file in a folder that exists; give another path")
    if not text and not task:
        raise RecipeError("evaluate: neither --text nor --task says what on; give one of both")
    if parquet_out is not None and not text:
        raise RecipeError(f"--parquet {parquet_out}: holds the windows of a text; give --text, or leave it out")
    settings = {
        "text": yaml.safe_load(text[0]) if text and text[0].startswith("{") else text or None,
        "tasks": [_task(each) for each in task or []],
        "max_examples": max_examples,
        "sequence_length": sequence_length,
        "max_windows": max_windows,
        "batch_size": batch_size,
        "dtype": dtype,
    }
    scores = run_evaluation_only(checkpoint, against, settings, Console(stderr=True), parquet_out, level)
    text_out = json.dumps(scores, indent=2)
    if json_out is not None:
        json_out.write_text(text_out + "\n")
    typer.echo(text_out)


def _task(value: str) -> dict[str, object]:
    """A task of the command line, NAME or NAME=FILE."""
    name, separator, file = value.partition("=")
    return {"name": name, "test": [file]} if separator else {"name": name}


@app.command()
def inspect(checkpoint: Annotated[str, typer.Argument(help="A checkpoint, compressed or not.")]) -> None:
    """Shows the structure of a checkpoint: MoE layers, experts, ranks, bytes."""
    from moe_compress.report.tables import inspect_checkpoint

    inspect_checkpoint(checkpoint, Console())


@app.command()
def materialize(
    checkpoint: Annotated[str, typer.Argument(help="A compressed checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Folder for the dense stock checkpoint.")],
    level: Level = None,
) -> None:
    """Writes a dense stock checkpoint out of a compressed one. It is not smaller than the original."""
    from moe_compress.materialize import materialize_checkpoint

    materialize_checkpoint(checkpoint, output, level)
    typer.echo(f"{output}: dense, as large as the original; load it anywhere")


@app.command()
def report(job_dir: Annotated[Path, typer.Argument(help="A job folder.")]) -> None:
    """Prints what a finished job did, and what a training did that follows it or stands alone."""
    from moe_compress.report.layers import show_layers
    from moe_compress.report.tables import show_job, show_training
    from moe_compress.stages.summary import SUMMARY_NAME, TRAINING_NAME
    from moe_compress.storage import as_path

    job_dir = as_path(job_dir)
    has_trained = (job_dir / TRAINING_NAME).is_file()
    if not has_trained or (job_dir / SUMMARY_NAME).is_file():
        show_job(job_dir, Console())
        show_layers(job_dir, Console())
    if has_trained:
        show_training(job_dir, Console())


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="The folder of a job or a batch.", metavar="JOB_DIR")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on as long as it runs.")] = False,
) -> None:
    """Says how a job goes or went, whether it runs, is done, failed or was killed."""
    from moe_compress.storage import as_path

    from .status import show

    show(as_path(folder), Console(), as_json, watch)


def main(*command: str) -> None:
    """Entry point: turns errors into one readable line and an exit code.

    Args:
        command: what stands before the arguments of the process, for modules that are one of the commands.
    """
    debug = "--debug" in sys.argv[1:]
    arguments = [*command, *(argument for argument in sys.argv[1:] if argument != "--debug")]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from moe_compress.errors import MoECompressError, one_line

    try:
        if app(arguments, standalone_mode=False) == _INTERRUPTED:
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; run the same command again to go on", 1)
    except Exception as error:
        if debug:
            traceback.print_exc()
        reason = one_line(error)
        if isinstance(error, MoECompressError):
            _fail(reason, error.exit_code)
        if hasattr(error, "format_message"):  # typer's own: the command line is wrong, or asked for nothing but help
            _fail(f"{error.format_message().rstrip('.')}; try --help" if reason else "", 2)
        _fail(f"{type(error).__name__}: {reason[:300]} (--debug shows the traceback)", 1)


def _fail(line: str, exit_code: int) -> NoReturn:
    if line:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
