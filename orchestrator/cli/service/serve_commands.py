"""Commands `serve` and `token`: the service of this machine's runs folder, and the people who may use it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from orchestrator.cli.options import JSON, print_json
from orchestrator.folders import runs_folder
from orchestrator.service import DEFAULT_HOST, DEFAULT_PORT, LARGEST_MODEL_GB
from orchestrator.service.access_tokens import AccessTokens, Role
from orchestrator.terminal_streams import wrapped

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False, resolve_path=True)
_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True)
_ROLES = [role.name.lower() for role in Role]


@click.command()
@click.option("--host", default=DEFAULT_HOST, show_default=True, help="Address to listen on; 0.0.0.0: all of them.")
@click.option("--port", type=click.IntRange(0, 65535), default=DEFAULT_PORT, show_default=True, help="0: a free port.")
@click.option(
    "--name", "names", multiple=True, metavar="HOST", help="Name under which browsers reach the service; repeatable."
)
@click.option("--ssl-certfile", type=_FILE, help="Certificate chain (PEM): the service speaks HTTPS.")
@click.option("--ssl-keyfile", type=_FILE, help="Its private key, if that is in another file.")
@click.option("--behind-proxy", is_flag=True, help="A reverse proxy on this machine speaks HTTPS for the service.")
@click.option(
    "--data-folder",
    "data_folders",
    type=_FOLDER,
    multiple=True,
    help="Folder that submitted sweeps may read; repeatable.",
)
@click.option("--at-once", type=click.IntRange(1), help="Sweeps that run at a time; by default one for each GPU.")
@click.option(
    "--largest-model",
    type=click.FloatRange(min=0),
    metavar="GB",
    default=LARGEST_MODEL_GB,
    show_default=True,
    help="Largest model that a person may send with a sweep; 0: none.",
)
@click.option("--mlflow-url", default="", metavar="URL", help="Your own MLflow as browsers reach it, to link to.")
@click.option("--mlflow-edits", is_flag=True, help="Operators may rename, tag and delete runs in MLflow.")
@click.option(
    "--queue",
    metavar="URL",
    help="Keep the queue in PostgreSQL (postgresql+psycopg://USER@HOST/DATABASE), or in the runs folder again "
    "(sqlite). Its sweeps are moved there, and later starts find them. By default SQLite in the runs folder.",
)
@click.option("--print-unit", is_flag=True, help="Print a systemd unit with these options, and start nothing.")
@click.option("--print-compose", is_flag=True, help="Print a Compose file with these options, and start nothing.")
@click.option("--image", help="With --print-compose: container image with prefsweep.")
def serve(
    host: str,
    port: int,
    names: Sequence[str],
    ssl_certfile: Path | None,
    ssl_keyfile: Path | None,
    behind_proxy: bool,
    data_folders: Sequence[Path],
    at_once: int | None,
    largest_model: float,
    mlflow_url: str,
    mlflow_edits: bool,
    queue: str | None,
    print_unit: bool,
    print_compose: bool,
    image: str | None,
) -> None:
    """Serve the runs folder: a queue of sweeps, an API, pages.

    Prints a URL that logs one browser in, once. Other people need a token of their own (`orchestrate token create`).
    Ctrl-C ends the service; the sweeps that run continue, and the next `serve` finds them.
    """
    if (image is not None) is not print_compose:
        raise click.UsageError("--print-compose and --image require each other")
    if print_unit and print_compose:
        raise click.UsageError("give --print-unit or --print-compose")
    from orchestrator.service.hosting.mlflow_server import MlflowOptions
    from orchestrator.service.hosting.web_server import ServeOptions

    options = ServeOptions(
        host,
        port,
        tuple(names),
        ssl_certfile,
        ssl_keyfile,
        behind_proxy,
        tuple(data_folders),
        at_once,
        largest_model,
        MlflowOptions(mlflow_url, mlflow_edits),
        queue,
    )
    root = runs_folder()
    if print_unit or print_compose:
        if port == 0:
            raise click.UsageError("--port 0 is another one at each start; give one")
        _print_file(options, root, image)
        return
    from orchestrator.service.hosting.web_server import check_options
    from orchestrator.service.hosting.web_server import serve as serve_until_signal

    for warning in check_options(root, options):
        click.echo(wrapped(warning), err=True)

    def show(url: str, remarks: Sequence[str]) -> None:
        click.echo(url)
        sys.stdout.flush()
        for remark in remarks:
            click.echo(wrapped(remark), err=True)

    running = serve_until_signal(root, options, show)
    continues = f"; {', '.join(running)} continue{'s' if len(running) == 1 else ''}" if running else ""
    click.echo(wrapped(f"the service has ended{continues}"), err=True)


def _print_file(options: object, root: Path, image: str | None) -> None:
    import getpass

    from orchestrator.service.hosting.deployment_files import render_compose, render_unit
    from orchestrator.service.hosting.web_server import ServeOptions

    assert isinstance(options, ServeOptions)
    if image is not None:
        click.echo(render_compose(options, root, image), nl=False)
        return
    program = Path(sys.executable).with_name("orchestrate")
    click.echo(render_unit(options, root, program, getpass.getuser()), nl=False)


@click.group()
def token() -> None:
    """Tokens of the people who use the service (`orchestrate serve`)."""


@token.command()
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(_ROLES),
    required=True,
    help="viewer: look; operator: also submit and change sweeps; admin: also name databases and servers, delete.",
)
def create(name: str, role: str) -> None:
    """Create a person's token and print it; it is shown once."""
    value = _tokens().create(name, Role[role.upper()])
    click.echo(value)
    click.echo(wrapped(f"the token of {name} ({role}); it is shown once, and only its digest is stored"), err=True)
    click.echo(wrapped(f"it is for the service of {runs_folder()}, which knows it from now on"), err=True)


@token.command("list")
@JSON
def list_tokens(as_json: bool) -> None:
    """List the people who have a token."""
    import time

    people = _tokens().people()
    if as_json:
        listed = [{"name": each.name, "role": each.role, "created": each.created} for each in people]
        print_json({"people": listed})
        return
    if not people:
        click.echo("no person has a token; `orchestrate token create NAME --role viewer` creates one", err=True)
    width = max((len(each.name) for each in people), default=0)
    for each in people:
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.created))
        click.echo(f"{each.name:{width}}  {each.role:8}  since {created}")


@token.command()
@click.argument("name")
def revoke(name: str) -> None:
    """End a person's token and logins, at once."""
    _tokens().revoke(name)
    click.echo(f"{name} has no token any more", err=True)


def _tokens() -> AccessTokens:
    from orchestrator.service.driver_supervisor import SERVICE_FOLDER

    return AccessTokens(runs_folder() / SERVICE_FOLDER)
