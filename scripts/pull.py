"""`surgery pull REPO --out DIR`: a converted model from the Hugging Face Hub."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from surgery.scripts import options, outputs
from surgery.scripts.bars import waiting
from surgery.scripts.running import command, note, program, show_json


@command
def pull(
    repository: options.RepositoryArgument,
    out: Annotated[Path, typer.Option("--out", help="Directory to write.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit.")] = None,
    force: options.Force = False,
    token: options.Token = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Fetch the converted model REPO (user/name) into --out, which appears in full or not at all."""
    from surgery.hub import pull as fetch

    outputs.check_conversion("--out", out, force=force)
    with waiting("downloading"):
        fetch(repository, out, revision=revision, token=token, overwrite=force)
    if as_json:
        show_json({"repository": repository, "out": str(out)})
    else:
        note(f"written to {out}; next: {program()} score {shlex.quote(str(out))} --data …")
