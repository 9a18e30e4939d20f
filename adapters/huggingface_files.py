"""Which files a transformers model comes with, on the Hub, in its cache or in a local directory."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any


def file_of(source: str, names: Sequence[str], revision: str | None, *, offline: bool = False) -> str | None:
    """Path of the first of `names` that the model has, or None.

    Args:
        source: Local directory or Hub id.
        names: File names, likeliest first.
        revision: On the Hub.
        offline: Look at local directories and the Hub's cache only.
    """
    if Path(source).is_dir():
        return next((str(Path(source) / name) for name in names if (Path(source) / name).is_file()), None)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

    for name in names:
        try:
            return str(hf_hub_download(source, name, revision=revision, local_files_only=offline))
        except EntryNotFoundError:
            continue
        except (HFValidationError, RepositoryNotFoundError):
            return None
    return None


PROCESSORS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "preprocessor_config.json",
    "processor_config.json",
)
"""What `save_pretrained` of tokenizers and processors writes."""


def copy_processors(source: str, directory: Path, revision: str | None = None) -> None:
    """Put tokenizer and processors of a model beside it; those that are on this machine.

    Args:
        source: Local directory or Hub id; "" has none.
        directory: Where to.
        revision: On the Hub.
    """
    for name in PROCESSORS if source else ():
        file = file_of(source, (name,), revision, offline=True)
        if file is not None:
            shutil.copyfile(file, directory / name)


@lru_cache(maxsize=4)
def local_tokenizer(source: str) -> Any:
    """The tokenizer of a local directory or of the Hub's cache, or None."""
    import transformers

    if not source or file_of(source, ("tokenizer.json", "tokenizer_config.json"), None, offline=True) is None:
        return None
    return transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)


@lru_cache(maxsize=4)
def local_image_processor(source: str) -> Any:
    """The image processor of a local directory or of the Hub's cache, or None."""
    import transformers

    if not source or file_of(source, ("preprocessor_config.json",), None, offline=True) is None:
        return None
    return transformers.AutoImageProcessor.from_pretrained(source, local_files_only=True)
