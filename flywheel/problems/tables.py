"""Tables that the library `datasets` reads: from the Hub, saved by it, CSV, parquet and JSON files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from flywheel.errors import UserError
from flywheel.recipe import ProblemSpec

KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

Read = tuple[str, str | None, str | None, dict]  # (place for messages, name of its split, id, row)


def rows(spec: ProblemSpec) -> Iterator[Read]:
    """The rows of what `datasets` reads: a name on the Hub, a folder, or a file of the kind that its name says."""
    for name, table in _load_dataset(spec).items():
        # one local file has no split of its own: the library calls it train
        split = None if Path(spec.path).is_file() or name == "all" else str(name)
        for number, row in enumerate(table):
            yield f"{spec.path}, {name} row {number}", split, f"{name}-{number}", row


def _load_dataset(spec: ProblemSpec) -> dict[str, Iterable[dict]]:
    import datasets

    datasets.disable_progress_bars()
    path = Path(spec.path)
    try:
        if (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(spec.path)
        if (path / "state.json").is_file():
            return {"all": datasets.load_from_disk(spec.path)}
        if path.is_file():
            kind = next((kind for suffix in path.suffixes[::-1] if (kind := KINDS.get(suffix.lower()))), None)
            if kind is None:
                raise UserError(f"{path}: of no kind that problems.format datasets reads: {', '.join(KINDS)}")
            return datasets.load_dataset(kind, data_files=spec.path)
        if path.exists():
            known = datasets.get_dataset_config_names(spec.path)  # of a plain folder only "default"
            return datasets.load_dataset(spec.path, spec.config if spec.config in known else None)
        _reach_the_hub(spec.path)
        return datasets.load_dataset(spec.path, spec.config, revision=spec.revision)
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds of its own, of other libraries and of the network
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(f"{spec.path}: cannot be read as a data set: {reason}") from error


def _reach_the_hub(name: str) -> None:
    """Raises UserError at once if the Hub cannot be reached; the library would try for minutes."""
    from huggingface_hub import HfApi, constants

    if name.count("/") > 1 or name.startswith((".", "/")):
        raise UserError(f"{name}: no such file or folder (problems.path)")
    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().dataset_info(name, timeout=10)
    except OSError as error:
        raise UserError(f"problems.path: {name}: {' '.join(str(error).split())[:200]}") from None
    except Exception as error:
        mend = "give a local file or folder, or set HF_HUB_OFFLINE=1 to use what was downloaded before"
        raise UserError(f"problems.path: {name} is not here and the Hub cannot be reached ({error}); {mend}") from None
