"""Commands `init`, `doctor` and `schema`, which need no existing sweep."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from orchestrator.cli.options import JSON, SET, print_json, read_spec
from orchestrator.errors import ExitCode
from orchestrator.folders import runs_folder
from orchestrator.terminal_streams import wrapped


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), default=Path("sweep.yaml"), required=False)
@click.option("--model", help="Hub name or folder of the initial model.")
@click.option(
    "--data", help="A hub data set, or a JSONL, JSON, Parquet or CSV file of pairs, for kto also of labelled responses."
)
@click.option("--gpus", help="Number of GPUs; one trial runs on each.")
@click.option("--objective", help="Loss: simpo, dpo, orpo, cpo, simper or kto.")
@click.option("--lora", is_flag=True, help="Train LoRA adapters instead of all weights.")
def init(
    file: Path, model: str | None, data: str | None, gpus: str | None, objective: str | None, lora: bool
) -> ExitCode:
    """Write a sweep file from four answers, sized for model and data. Never overwrites a file.

    Prompts on a terminal for missing options, else uses defaults. Reads a model folder and a file of pairs; with both,
    counts the tokens of the rows, which takes seconds.
    """
    if file.exists():
        raise click.UsageError(f"{file} exists already and is not overwritten; name another FILE")
    from orchestrator.commands import init_file
    from orchestrator.gpus import visible_gpus

    questions = {
        "model": (model, "Initial model, hub name or folder", init_file.DEFAULT_MODEL),
        "data": (data, "Pairs, hub data set or file", init_file.DEFAULT_DATA),
        "gpus": (gpus, "GPUs", str(visible_gpus())),
        "objective": (objective, f"Objective ({', '.join(init_file.LOSSES)})", "simpo"),
    }
    found: dict[str, str] = {}
    errors: list[str] = []
    for question, (given, label, default) in questions.items():
        interactive = given is None and sys.stdin.isatty()
        found[question] = click.prompt(label, default, err=True) if interactive else default if given is None else given
        while (problem := init_file.check_answer(question, found[question])) is not None and interactive:
            click.echo(f"{question}: {problem}", err=True)
            found[question] = click.prompt(label, default, err=True)
        if problem is not None:
            errors.append(f"--{question}: {problem}")
    if errors:
        raise click.UsageError("\n".join(errors))
    kind = init_file.LOSSES[found["objective"]]
    answers = init_file.InitAnswers(found["model"], found["data"], int(found["gpus"]), kind, lora)
    facts = init_file.find_facts(answers)
    if facts.apply_template:
        message = "the rows are plain text and the tokenizer has a chat template"
        if sys.stdin.isatty():
            question = "plain text, and the tokenizer has a chat template; apply it?"
            apply = click.confirm(question, default=True, err=True)
            facts = replace(facts, apply_template=apply)
        else:
            click.echo(wrapped(f"{message}: the template is applied (data.apply_template: true)"), err=True)
    for notice in facts.notices:
        click.echo(wrapped(notice), err=True)
    text = init_file.write_sweep_file(file.stem, answers, facts)
    from orchestrator.spec.loading.loader import load_spec_text

    load_spec_text(text, file.resolve().parent, source=str(file))
    with file.open("x", encoding="utf-8") as out:
        out.write(text)
    for notice in read_spec(file, (), None, False)[1]:  # such as a mistyped folder, which is a name on the hub
        click.echo(wrapped(notice), err=True)
    click.echo(str(file))
    click.echo(f"next: orchestrate plan {file}", err=True)
    return ExitCode.DONE


@click.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@SET
@JSON
def doctor(file: Path | None, overrides: Sequence[str], as_json: bool) -> ExitCode:
    """Check this machine's installation, GPUs and disks.

    Each problem has its fix. With a sweep FILE: also check access to its models, data sets, tracking server and
    database.
    """
    from dashboards.terminal.command_output import print_checks
    from orchestrator.commands.doctor import is_healthy, run_checks

    spec, notices = (None, ()) if file is None else read_spec(file, overrides, None, False)
    for notice in notices:
        click.echo(wrapped(notice), err=True)
    checks = run_checks(runs_folder(), spec)
    if as_json:
        counts = Counter(check.level.value for check in checks)
        listed = [check.as_json() for check in checks]
        print_json({"healthy": is_healthy(checks), "counts": dict(counts), "checks": listed})
    else:
        print_checks(checks)
    return ExitCode.DONE if is_healthy(checks) else ExitCode.USER


@click.command()
def schema() -> None:
    """Print the JSON Schema of sweep files, for editors."""
    from orchestrator.spec.loading.serialization import schema as json_schema

    print_json(json_schema())
