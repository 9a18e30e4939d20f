"""`surgery push DIR REPO`: a converted model on the Hugging Face Hub, with a card made from its measurements."""

from __future__ import annotations

from typing import Annotated

import typer

from surgery.scripts import options
from surgery.scripts.bars import waiting
from surgery.scripts.running import command, note, show_json


@command
def push(
    directory: options.DirectoryArgument,
    repository: options.RepositoryArgument,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Of a repository that is created; by default the account's."),
    ] = None,
    message: Annotated[str, typer.Option("--message", help="Of the commit.")] = "Upload a converted model",
    revision: Annotated[str | None, typer.Option("--revision", help="Branch; created where it does not exist.")] = None,
    pull_request: Annotated[bool, typer.Option("--pr", help="Open a pull request instead of committing.")] = False,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="Further tag of the card; repeatable.")] = None,
    token: options.Token = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Publish DIR as REPO (user/name), in one commit. An upload that was cut off goes on where it was."""
    from surgery.hub import push as publish

    with waiting("uploading"):
        address = publish(
            directory,
            repository,
            private=private,
            message=message,
            revision=revision,
            create_pr=pull_request,
            tags=tag or (),
            token=token,
        )
    if as_json:
        show_json({"directory": str(directory), "repository": repository, "address": address})
    else:
        note(f"published: {address}")
