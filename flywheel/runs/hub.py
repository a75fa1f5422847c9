"""A base model on the Hugging Face Hub: downloaded once, then used like any directory.

A run's recipe holds the snapshot's path. Its last part is the commit, so a run keeps to one version of a model, and
its fingerprints hold the contents of the files.
"""

from __future__ import annotations

import re
from pathlib import Path

from flywheel.errors import UserError, first_line

# of a model, what is downloaded and fingerprinted: nothing pickled, no code
SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja", ".bpe", ".spm", ".tiktoken", ".vocab")
SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[0-9a-f]{40}/?$")


def snapshot(name: str, revision: str | None, download: bool = True, key: str = "model.base") -> str:
    """The directory of the model `name` (owner/name) in the Hub's cache, at `revision` (default: its main branch).

    Without `download` it is `name` itself if the cache does not hold it. Raises UserError, naming the recipe's `key`,
    if the Hub does not give it.
    """
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = [f"*{suffix}" for suffix in SUFFIXES]
        return snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=not download)
    except LocalEntryNotFoundError as error:
        if not download:
            return name
        raise UserError(
            f"{key}: {name} is no folder here and not in the Hub's cache, and the Hub cannot be reached:"
            f" {first_line(error)}"
        ) from None
    except (HfHubHTTPError, HFValidationError, HTTPError) as error:
        raise UserError(f"{key}: {name} is no folder here, and the Hub does not give it: {first_line(error)}") from None


def name_of(base: str) -> str:
    """owner/name of a snapshot's path; any other `base` as it is."""
    match = SNAPSHOT.search(base)
    return "/".join(match.groups()) if match else base


def is_name(base: str) -> bool:
    """Whether `base` can only be a name on the Hub."""
    return base.count("/") == 1 and not Path(base).is_absolute() and not Path(base).exists()
