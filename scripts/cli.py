"""`surgery`: assembles the commands, one page each."""

from __future__ import annotations

from typing import Annotated

import typer

from surgery.scripts import (
    audit,
    benchmark,
    calibrate,
    compare,
    convert,
    coverage,
    demo,
    doctor,
    explore,
    export,
    heal,
    pull,
    push,
    record,
    replay,
    report,
    score,
    show,
    sites,
)

app = typer.Typer(
    name="surgery",
    help="Turn a pretrained torch network into one that decides per input what it can skip.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

for page in (
    sites.sites,
    show.show,
    convert.convert,
    heal.heal,
    calibrate.calibrate,
    score.score,
    benchmark.benchmark,
    compare.compare,
    export.export,
    record.record,
    audit.audit,
    report.report,
    explore.app,
    replay.replay,
    push.push,
    pull.pull,
    doctor.doctor,
    demo.demo,
    coverage.coverage,
):
    app.command()(page)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("bypass-surgery"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Turn a pretrained torch network into one that decides per input what it can skip."""


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
