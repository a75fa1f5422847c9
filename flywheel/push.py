"""Upload a run's export to the Hugging Face Hub: `flywheel push RUN REPO`"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from flywheel.errors import UserError, first_line, one_line

if TYPE_CHECKING:
    from flywheel.runs.run import Run


def push(run: Run, repo: str, private: bool = False, round: int | None = None) -> str:
    """Export the models after `round` and upload them to the model repository `repo`; returns its address.

    The repository is made, if it is not there, before the export: without a valid name, token or network nothing is
    exported. Raises UserError.
    """
    from httpx2 import HTTPError  # what huggingface_hub speaks through
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    from flywheel.export import export

    api = HfApi()
    try:
        api.whoami()  # asks for a token, which create_repo does only of the server
        address = str(api.create_repo(repo, private=private, exist_ok=True))
        with tempfile.TemporaryDirectory() as scratch:
            out = export(run, Path(scratch) / "export", round)
            api.upload_folder(repo_id=repo, folder_path=out, commit_message=f"flywheel: {run.root.resolve().name}")
    except LocalTokenNotFoundError:
        raise UserError(f"{repo}: no token for the Hub: run `hf auth login` or set HF_TOKEN") from None
    except HFValidationError as error:
        raise UserError(f"{repo}: not a name of a repository: {error}") from None
    except HfHubHTTPError as error:
        raise UserError(f"{repo}: the Hub refused: {first_line(error)}") from None
    except (OfflineModeIsEnabled, HTTPError) as error:
        raise UserError(f"{repo}: the Hub cannot be reached: {first_line(error)}") from None
    return address


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="flywheel push", description="Upload a run's models, its harvest and a model card to the Hugging Face Hub."
    )
    parser.add_argument("run", type=Path, help="a run directory, e.g. runs/chain")
    parser.add_argument("repo", help="a model repository, e.g. me/my-model; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is made")
    parser.add_argument("--round", type=int, help="the models after this round (default: the last finished one)")
    args = parser.parse_args(argv)

    def work() -> str:
        from flywheel.runs.run import Run  # imported late to keep --help fast

        return f"uploaded to {push(Run(args.run), args.repo, args.private, args.round)}"

    return one_line(work)


if __name__ == "__main__":
    sys.exit(main())
