"""Repositories on the Hugging Face Hub: their names, their files, the copies in its cache, and its errors in our words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.configs import CONFIG, NATIVE_CONFIG, TENSORS, read_config
from surgery.errors import CheckpointError, HubError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
FILE = re.compile(r"[A-Za-z0-9_][\w.-]{0,200}")
"""Names that files of a conversion may have."""
_MOST_FILES = 1_000


def is_repository(source: str) -> bool:
    """Whether a text reads like `user/name`."""
    return _REPOSITORY.fullmatch(source) is not None and ".." not in source


def cached(repository: str, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The local copy of a published conversion; only what `load` needs is fetched.

    Raises:
        HubError: If the repository cannot be read.
        CheckpointError: If it holds no conversion.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(repository, name, revision=revision, token=token))

    with named(repository, "see that its name is right, that you may read it, and that the Hub is reached"):
        try:
            place = fetch(CONFIG).parent
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            place = fetch(NATIVE_CONFIG).parent
        if (place / CONFIG).is_file():
            fetch(TENSORS)
        config = read_config(place)
        if (place / CONFIG).is_file() and not config.get("base", {}).get("included"):
            return place
    names, commit = files_of(repository, revision, token)
    with named(repository, "run it again, what was fetched is kept"):
        for name in names:
            place = Path(hf_hub_download(repository, name, revision=commit, token=token)).parent
    return place


def files_of(repository: str, revision: str | None, token: str | bool | None) -> tuple[list[str], str | None]:
    """Names of a repository's files, and the commit at which they have these names."""
    from huggingface_hub import HfApi

    with named(repository, "see that its name is right, that you may read it, and that the Hub is reached"):
        info = HfApi(token=token).model_info(repository, revision=revision)
    names = [one.rfilename for one in info.siblings or ()]
    kept = [name for name in names if not name.startswith(".")]
    hostile = [name for name in names if not name.startswith(".git") and not FILE.fullmatch(name)]
    if hostile or len(names) > _MOST_FILES:
        what = repr(hostile[0])[:80] if hostile else f"{len(names)} files"
        raise CheckpointError(f"{repository} holds {what}, which no conversion has; nothing was fetched")
    return kept, info.sha


@contextmanager
def named(repository: str, then: str) -> Iterator[None]:
    """The client's errors by a name of ours."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except (CheckpointError, HubError):
        raise
    except client_errors() as error:
        cause = _cause(error, HfHubHTTPError)
        response = getattr(cause, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(cause, OfflineModeIsEnabled):
            what = "the Hub was not asked, since HF_HUB_OFFLINE is set"
        elif status == 401:
            what = "the Hub refuses the token (401); log in with `hf auth login`, or set HF_TOKEN"
        elif status == 403:
            what = "this token has no permission here (403); take one with write access to it"
        elif isinstance(cause, RevisionNotFoundError):
            what = "it has no such revision"
        elif isinstance(cause, RepositoryNotFoundError):
            what = "there is no such repository, or this token may not see it"
        elif isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            raise CheckpointError(
                f"{repository} holds no {CONFIG}; expected what surgery.push_to_hub published"
            ) from error
        elif status is not None:
            what = f"the Hub answered {status}: {str(cause).splitlines()[0][:200]}"
        else:
            what = f"the connection broke: {type(cause).__name__}: {str(cause)[:200]}"
        raise HubError(f"{repository}: {what}; {then}") from error


def _cause(error: BaseException, wanted: type[BaseException]) -> BaseException:
    """The client's own error, where it wrapped it in another."""
    one: BaseException | None = error
    while one is not None:
        if isinstance(one, wanted):
            return one
        one = one.__cause__
    return error


def client_errors() -> tuple[type[Exception], ...]:
    """What the client raises: its own errors, and those of the HTTP library that it uses."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import get_session

    library = __import__(type(get_session()).__module__.partition(".")[0])
    return (HfHubHTTPError, library.HTTPError, OSError, RuntimeError, ValueError)
