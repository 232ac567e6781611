"""init.

doctor, schema: what needs no sweep.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from orchestrator.cli.options import JSON, SET, print_json, read_spec
from orchestrator.errors import ExitCode
from orchestrator.folders import home


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), default=Path("sweep.yaml"), required=False)
@click.option("--model", help="Hub name or folder of the start model.")
@click.option("--data", help="A hub data set, or a JSONL, JSON, Parquet or CSV file of preference pairs.")
@click.option("--gpus", help="How many GPUs; a trial on each.")
@click.option("--objective", help="simpo, dpo, orpo or cpo.")
@click.option("--lora", is_flag=True, help="Adapters instead of all weights.")
def init(
    file: Path, model: str | None, data: str | None, gpus: str | None, objective: str | None, lora: bool
) -> ExitCode:
    """Write a first sweep file from four answers, sized for the model and the data. Never overwrites.

    On a terminal it asks for what no option says; elsewhere the defaults are taken. A model's folder and a file of
    pairs are looked at; with both, the rows' lengths in tokens are read, which takes seconds.
    """
    if file.exists():
        raise click.UsageError(f"{file} exists already; give another FILE")
    from orchestrator.commands import init_file as room
    from orchestrator.execution.local_cluster import visible_gpus

    asked = {
        "model": (model, "Start model, a hub name or a folder", room.DEFAULT_MODEL),
        "data": (data, "Preference pairs, a hub data set or a file", room.DEFAULT_DATA),
        "gpus": (gpus, "GPUs", str(visible_gpus())),
        "objective": (objective, f"Objective ({', '.join(room.OBJECTIVES)})", "simpo"),
    }
    found: dict[str, str] = {}
    wrong: list[str] = []
    for question, (given, words, default) in asked.items():
        ask = given is None and sys.stdin.isatty()
        found[question] = click.prompt(words, default, err=True) if ask else default if given is None else given
        while (problem := room.check(question, found[question])) is not None and ask:
            click.echo(f"{question}: {problem}", err=True)
            found[question] = click.prompt(words, default, err=True)
        if problem is not None:
            wrong.append(f"--{question}: {problem}")
    if wrong:
        raise click.UsageError("\n".join(wrong))
    kind = room.OBJECTIVES[found["objective"]]
    answers = room.Answers(found["model"], found["data"], int(found["gpus"]), kind, lora)
    facts = room.find_facts(answers)
    for notice in facts.notices:
        click.echo(notice, err=True)
    text = room.write(file.stem, answers, facts)
    from orchestrator.spec.loading.loader import loads

    loads(text, file.resolve().parent, source=str(file))
    with file.open("x", encoding="utf-8") as out:
        out.write(text)
    click.echo(str(file))
    click.echo(f"next: orchestrate plan {file}", err=True)
    return ExitCode.DONE


@click.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@SET
@JSON
def doctor(file: Path | None, sets: Sequence[str], as_json: bool) -> ExitCode:
    """What this machine offers, what is missing, and the fix for each.

    With a sweep's FILE: also whether its models, data sets, tracking server and database can be reached.
    """
    from dashboards.terminal.command_output import print_checks
    from orchestrator.commands.doctor import examine, healthy

    spec = None if file is None else read_spec(file, sets, None, False)[0]
    checks = examine(home(), spec)
    if as_json:
        print_json({"healthy": healthy(checks), "checks": [check.as_json() for check in checks]})
    else:
        print_checks(checks)
    return ExitCode.DONE if healthy(checks) else ExitCode.USER


@click.command()
def schema() -> None:
    """The JSON Schema of a sweep's file, for editors."""
    from orchestrator.spec.loading.serialization import schema as made

    print_json(made())
