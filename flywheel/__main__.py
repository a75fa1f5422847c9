"""The command line: `flywheel COMMAND ...`, or `python -m flywheel COMMAND ...`."""

from __future__ import annotations

import argparse
import importlib
import sys

from flywheel import __version__

COMMANDS = {
    "try": "sample a few questions by a recipe's base, and show what was read",
    "iterate": "train a run up to a round, or continue it",
    "solve": "answer questions with what a run has learned",
    "serve": "the same behind an OpenAI-compatible API",
    "summary": "print the figures of every round and what they cost",
    "report": "write a run as one HTML page",
    "verify": "check a run's files and say what would have to be redone",
    "export": "write a run's models, its harvest and a model card to a directory",
    "push": "upload an export to the Hugging Face Hub",
    "gguf": "turn a GGUF file into a model directory",
    "config": "print the path of an accelerate config that ships with flywheel",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code. Only that command's module is imported."""
    parser = argparse.ArgumentParser(
        prog="flywheel",
        usage="flywheel COMMAND ...",
        description="commands:\n" + "\n".join(f"  {name:9s} {what}" for name, what in COMMANDS.items()),
        epilog="`flywheel COMMAND --help` lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flywheel {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("arguments", metavar="ARGUMENT", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.command == "config":
        return config(args.arguments)
    # `try` is a word of Python, and `flywheel.report` a package
    module = {"try": "tryout", "report": "page"}.get(args.command, args.command)
    return importlib.import_module(f"flywheel.{module}").main(args.arguments)


def config(argv: list[str]) -> int:
    from flywheel.iterate import shipped

    paths = shipped("accelerate_configs")
    parser = argparse.ArgumentParser(
        prog="flywheel config",
        description="Print the path of an accelerate config that ships with flywheel, as in "
        "`accelerate launch --config_file $(flywheel config ddp) -m flywheel.iterate --round 3`.",
    )
    parser.add_argument("name", metavar="NAME", choices=paths, help=", ".join(paths))
    print(paths[parser.parse_args(argv).name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
