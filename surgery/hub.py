"""Converted models on the Hugging Face Hub: push and pull.

All files of a push are one commit, so a repository holds all of them or is as it was. Large files are uploaded before it
under their hash; a push that was cut off finds them again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from surgery import consent
from surgery.cards import PLOT, card, rates_plot
from surgery.checkpoints import check_files, write
from surgery.configs import CONFIG, NATIVE_CONFIG, is_checkpoint, read_config
from surgery.directories import written_directory
from surgery.errors import HubError
from surgery.repositories import FILE, client_errors, files_of, is_repository, named

CARD = "README.md"
TAGS = ("bypass-surgery", "conditional-computation")


def push_to_hub(
    gated: nn.Module,
    repository: str,
    *,
    base: bool = False,
    native: bool = False,
    private: bool | None = None,
    message: str = "Upload a converted model",
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    tags: Iterable[str] = (),
    spec: str | None = None,
) -> str:
    """Publish a gated model with a card made from its measurements.

    Args:
        gated: A gated model.
        repository: `user/name`; it is created where it does not exist.
        base: Publish the dense model in the same repository, as `save(..., base=True)` does.
        native: Publish one transformers checkpoint with gates inside, as `save(..., native=True)` does.
        private: Of a repository that is created; None leaves it to the account's default.
        message: Of the commit.
        revision: Branch to commit to; it is created where it does not exist.
        create_pr: Open a pull request instead of committing.
        token: None takes `HF_TOKEN` or the one that `hf auth login` stored.
        tags: Further tags of the card.
        spec: `MODEL` string of the base, as in `save`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        NotConverted, CheckpointError: As `save` does.
        HubError: If the Hub refuses or the connection breaks; nothing is published then.
    """
    with tempfile.TemporaryDirectory() as temporary:
        write(gated, Path(temporary), base=base, native=native, spec=spec)
        options: dict[str, Any] = {"private": private, "revision": revision, "create_pr": create_pr, "token": token}
        return push(temporary, repository, message=message, tags=tags, **options)


def push(
    directory: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    message: str = "Upload a converted model",
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    tags: Iterable[str] = (),
) -> str:
    """Publish a directory that `save` wrote.

    A `README.md` in the directory is published as it is; otherwise a card is written from the measurements.

    Args:
        directory: What `save` wrote.
        repository: `user/name`; it is created where it does not exist.
        private: Of a repository that is created; None leaves it to the account's default.
        message: Of the commit.
        revision: Branch to commit to; it is created where it does not exist.
        create_pr: Open a pull request instead of committing.
        token: None takes `HF_TOKEN` or the one that `hf auth login` stored.
        tags: Further tags of the card.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        CheckpointError: If the directory holds no conversion, or a damaged one.
        HubError: If the Hub refuses or the connection breaks; nothing is published then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not is_repository(repository):
        raise HubError(f"{repository!r} is no name of a repository; expected user/name")
    place = Path(directory).expanduser()
    config = read_config(place)
    content = _published(place)
    check_files(place)
    if not (place / CARD).is_file():
        plot = rates_plot(config)
        if plot is not None:
            content[PLOT] = plot
        content[CARD] = card(
            config, repository, (*TAGS, *tags), _metadata(config, token), plotted=plot is not None
        ).encode()
    operations = [
        CommitOperationAdd(name, data if isinstance(data, bytes) else str(data))
        for name, data in sorted(content.items())
    ]
    api = HfApi(token=token, library_name="bypass-surgery")
    with named(repository, "nothing was published; run it again, what was uploaded is kept"):
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repository, branch=revision, exist_ok=True)
        done = api.create_commit(repository, operations, commit_message=message, revision=revision, create_pr=create_pr)
    return str(done.pr_url or done.commit_url)


def pull(
    repository: str,
    directory: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    overwrite: bool = False,
) -> Path:
    """Fetch a published conversion into a directory, which appears in full or not at all.

    Args:
        repository: `user/name`.
        directory: Where to.
        revision: Branch, tag or commit.
        token: For private repositories.
        overwrite: Replace an older conversion there.

    Returns:
        The directory.

    Raises:
        HubError: If the repository cannot be read.
        CheckpointError: If it holds no conversion, a damaged one, or files with hostile names.
        OutputExists: If the directory exists and may not be replaced.
    """
    from huggingface_hub import hf_hub_download

    if not is_repository(repository):
        raise HubError(f"{repository!r} is no name of a repository; expected user/name")
    with written_directory(directory, marker=is_checkpoint, overwrite=overwrite) as temporary:
        names, commit = files_of(repository, revision, token)
        with named(repository, "nothing was written"):
            for name in names:
                hf_hub_download(repository, name, revision=commit, token=token, local_dir=temporary)
        shutil.rmtree(temporary / ".cache", ignore_errors=True)
        check_files(temporary)
    return Path(directory).expanduser()


def _published(place: Path) -> dict[str, Path | bytes]:
    """What is uploaded: every file of the directory, without paths of this machine in the configuration."""
    content: dict[str, Path | bytes] = {
        file.name: file for file in sorted(place.iterdir()) if file.is_file() and FILE.fullmatch(file.name)
    }
    name = CONFIG if (place / CONFIG).is_file() else NATIVE_CONFIG
    config = json.loads((place / name).read_text(encoding="utf-8"))
    base = (config if name == CONFIG else config["quantization_config"])["base"]
    if _is_local(str(base.get("spec") or "")):
        base["spec"], base["revision"] = "", ""
        content[name] = (json.dumps(config, indent=1) + "\n").encode()
    return content


def _is_local(spec: str) -> bool:
    """Whether a `MODEL` string means something on this machine only."""
    prefix, _, rest = spec.partition(":")
    local = Path(rest.partition("?")[0]).expanduser()
    return (
        consent.runs_code(spec)
        or "checkpoint=" in spec
        or prefix not in ("timm", "hf", "huggingface")
        or local.exists()
    )


def _metadata(config: Mapping[str, Any], token: str | bool | None) -> dict[str, Any]:
    """Licence and name of the base's repository, where they are known."""
    from huggingface_hub import HfApi

    known: Mapping[str, Any] = config.get("architecture", {}).get("pretrained_cfg") or {}
    name = str(known.get("hf_hub_id") or "")
    if name == "timm/":
        name += f"{config['architecture'].get('architecture')}.{known.get('tag')}"
    prefix, _, rest = str(config["base"].get("spec") or "").partition(":")
    if prefix in ("hf", "huggingface") and is_repository(rest.partition("?")[0]):
        name = rest.partition("?")[0]
    found = {"license": known.get("license"), "base_model": name or None}
    if name:
        try:
            data = HfApi(token=token).model_info(name, revision=config["base"].get("revision") or None).card_data
        except client_errors():  # the base may be private, gone or out of reach: then what is known must do
            data = None
        found["license"] = getattr(data, "license", None) or found["license"]
    return {key: value for key, value in found.items() if value}
