"""Serve a run's models behind an OpenAI-compatible API: flywheel serve RUN --port 8000

Every request is answered by a search, as `flywheel solve` does, and its `usage` holds all tokens of it. Beside OpenAI's
keys a body takes `budget` (generations), `max_total_tokens`, and `strategy` (auto, greedy, or KIND:N[:OPTION...]).
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from pathlib import Path

from flywheel.errors import UserError, exit_code
from flywheel.runs.isolate import THREADS


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="flywheel serve", description=__doc__.partition("\n\n")[2])
    p.add_argument("run", type=Path, help="a run directory, e.g. runs/chain, or an export of one")
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    p.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    p.add_argument("--round", type=int, metavar="R", help="the models after this round (default: the last)")
    p.add_argument(
        "--budget", type=int, metavar="N", help="generations, for the plan or until sure (default: evaluate.budget)"
    )
    p.add_argument("--queue", type=int, default=256, metavar="N", help="requests under way at most; more get 429")
    p.add_argument("--api-key", metavar="KEY", default=os.environ.get("FLYWHEEL_API_KEY"), help="or FLYWHEEL_API_KEY")
    p.add_argument("--calibrate", action="store_true", help="make the plan for these models first, if there is none")
    return p


def bound(host: str, port: int) -> socket.socket:
    """A socket with that address, not yet listening; port 0 is any free one. Raises UserError if it cannot be had."""
    door = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: {error}; name another") from None
    return door


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code. SIGTERM and SIGINT finish what is under way, then end it."""
    args = parser().parse_args(argv)
    for option in ("budget", "queue"):
        if (value := getattr(args, option)) is not None and value < 1:
            parser().error(f"--{option}: 1 or more")
    return exit_code(lambda: served_until_stopped(args))


def served_until_stopped(args: argparse.Namespace) -> int:
    from flywheel.runs.processes import environment, threads_alone
    from flywheel.runs.ranks import Ranks
    from flywheel.runs.run import Run

    try:
        run, ranks = Run(args.run), Ranks()
        # like a stage's process, and before torch is imported
        changed = environment(ranks, False, 0, run.recipe.engine.tensor_parallel)
        for key, value in (changed | {THREADS: str(threads_alone(ranks, run.recipe))}).items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})
        import uvicorn

        from flywheel.serving.batch import opened
        from flywheel.serving.server import Service, app
        from flywheel.serving.system import calibrate, system

        door = bound(args.host, args.port)  # before minutes are spent on opening engines
        served = (calibrate if args.calibrate else system)(run, args.round)
        with opened(served, run.recipe.seed) as (kit, solver):
            name = f"{run.recipe.name}-{served.round}"
            service = Service(solver, name, args.budget or run.recipe.evaluate.budget, args.queue, args.api_key)
            how = "by its plan" if served.plan else "until the vote is decided: no plan is made for these models"
            host = f"[{args.host}]" if ":" in args.host else args.host
            print(f"{name} at http://{host}:{door.getsockname()[1]}/v1, answering {how}", flush=True)
            config = uvicorn.Config(app(service), log_level="warning", lifespan="off")
            for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn handles both, then raises them again at its end
                signal.signal(number, signal.SIG_IGN)
            kit.backend.serve(uvicorn.Server(config).serve(sockets=[door]))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
