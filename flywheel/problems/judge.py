"""Run a program against its tests, apart from everything else; `code.py` starts `main` in a fresh interpreter.

Stdin: JSON {program, prompt, setup, tests, entry_point}. Stdout: `passed`, or `failed:`, `gold:`, `refused:` and why.
It imports nothing of flywheel but `namespaces.py`, and has an empty environment. Three processes:

- this one enters new namespaces (network, mounts, processes, IPC; users unless it is root) and waits;
- the judge, process 1 in there, makes a root of its own with nothing in it but Python, read-only, and an empty /tmp,
  and runs the tests; when it ends, the kernel ends whatever else runs in there;
- the program, in a process namespace below, so that it can name no other process, with limits and no privilege.

The judge calls the program's functions over a socket, by values (`pack`): what comes back is plain data, whatever the
program is. So the program sees neither tests nor verdict, and an early exit, a patched builtin or an object that equals
everything wins nothing. If the kernel refuses any part of this, the program is not run (`refused:`).
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import select
import signal
import socket
import sys
import textwrap
import types
from contextlib import suppress

from flywheel.problems.namespaces import DUMPABLE, NEW_PIDS, PARENT_DEATH, confine, kernel, leave, new_root, silence

MIB = 1 << 20
LINE = 16 * MIB  # bytes of a reply: more is none
DIGITS = 20_000  # of a whole number in it: reading more takes the judge's time
# of each process of the program (`RLIMIT_...`); the judge forks nothing and computes what the tests say
PROGRAM = {"CPU": 3, "AS": 512 * MIB, "NPROC": 8, "FSIZE": 16 * MIB, "NOFILE": 64, "CORE": 0, "MEMLOCK": 0}
JUDGE = {**PROGRAM, "CPU": 10, "AS": 1024 * MIB, "NPROC": 1}
NEEDS_MORE = (UnicodeDecodeError, UnicodeEncodeError, UnicodeTranslateError, BaseExceptionGroup)  # than a text
BOXES = {kind.__name__: kind for kind in (list, tuple, set, frozenset)}


def finish(out: int, verdict: str) -> None:
    """The one way out of the judge: no test can catch it."""
    os.write(out, verdict.encode(errors="replace"))
    os._exit(0)


# ---- values between program and judge ----


def pack(value: object, keep) -> object:
    """JSON for `value`: plain data by value, subclasses as their base; any other object as the number `keep` gives."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    for name, kind in BOXES.items():
        if isinstance(value, kind):
            return [name, *(pack(item, keep) for item in value)]
    if isinstance(value, dict):
        return ["dict", *([pack(key, keep), pack(item, keep)] for key, item in value.items())]
    if isinstance(value, bytes | bytearray):
        return ["bytes", value.hex()]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    return ["object", keep(value)]


def unpack(value: object, find) -> object:
    if not isinstance(value, list):
        return value
    kind, *items = value
    match kind:
        case "object":
            return find(items[0])
        case "bytes":
            return bytes.fromhex(items[0])
        case "complex":
            return complex(*items)
        case "dict":
            return {unpack(key, find): unpack(item, find) for key, item in items}
    return BOXES[kind](unpack(item, find) for item in items)


def send(stream, message: object) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


# ---- the program's process ----


def serve(pipe: socket.socket, root: bool) -> None:
    """Confine this process, run the program, answer calls. What happens here is the program's to decide."""
    os.dup2(pipe.detach(), 3)
    os.closerange(4, 1 << 20)
    stream = socket.socket(fileno=3).makefile("rwb")
    try:
        silence(0, 1, 2)
        confine(root, PROGRAM)
    except OSError as error:
        return send(stream, str(error))
    send(stream, "ready")
    module, kept = types.ModuleType("program"), []
    sys.modules["program"] = module

    def find(name: int | str) -> object:
        if isinstance(name, str) and name not in vars(module):
            raise NameError(name)
        return kept[name] if isinstance(name, int) else vars(module)[name]

    def keep(value: object) -> int:
        kept.append(value)
        return len(kept) - 1

    for line in stream:
        try:
            verb, *items = json.loads(line)
            reply = ["value", pack(act(module, verb, *(unpack(item, find) for item in items)), keep)]
        except BaseException as error:  # SystemExit among them: the tests go on and see an error
            reply = ["error", builtin_name(type(error))]
        send(stream, reply)


def builtin_name(kind: type[BaseException]) -> str:
    """Of the nearest builtin class that can be raised with a text alone: a JSONDecodeError is a ValueError."""
    known = (k for k in kind.__mro__ if getattr(builtins, k.__name__, None) is k and not issubclass(k, NEEDS_MORE))
    return next(known).__name__


def act(module: types.ModuleType, verb: str, thing, *more) -> object:
    match verb, more:
        case "run", [prompt]:
            try:
                parts = [prompt, compile(thing, "program", "exec", dont_inherit=True)]
            except SyntaxError:  # it continues the prompt's last function; its first line may have lost its indentation
                parts = [f"{prompt}\n{textwrap.indent(textwrap.dedent(thing), '    ')}"]
                try:
                    compile(parts[0], "program", "exec")
                except SyntaxError:
                    parts = [f"{prompt}\n    {thing}"]
            for part in parts:
                exec(part, vars(module))
        case "call", [args, named]:
            return thing(*args, **named)
        case "get", [name]:
            return getattr(thing, name)
        case "set", [name, value]:
            setattr(thing, name, value)
        case "list", []:
            return list(thing)


# ---- the judge's process ----


def judge(out: int, alive: int, root: bool) -> None:
    """Run the tests against the program, and say how it went. `alive`: a pipe that closes when the parent dies."""
    new_root()
    ours, theirs = socket.socketpair()
    kernel("unshare", NEW_PIDS)  # of the next child
    if not os.fork():
        try:
            serve(theirs, root)
        finally:
            os._exit(1)
    theirs.close()
    confine(root, JUDGE)
    kernel("prctl", DUMPABLE, 0, 0, 0, 0)
    kernel("prctl", PARENT_DEATH, signal.SIGKILL, 0, 0, 0)
    if select.select([alive], [], [], 0)[0]:  # it died before
        return
    asked = json.loads(sys.stdin.buffer.read())
    silence(0, 1, 2)
    stream = ours.makefile("rwb")

    def hear() -> object:
        with suppress(Exception):
            line = stream.readline(LINE)
            if line.endswith(b"\n"):
                return json.loads(line, parse_int=whole)
        finish(out, "failed: the program's process ended")

    def whole(digits: str) -> int:
        return int(digits) if len(digits) <= DIGITS else finish(out, f"failed: a number of {len(digits):,} digits")

    class Remote:
        """An object of the program. Equal to itself alone."""

        def __init__(self, name: int | str):
            object.__setattr__(self, "_name", name)

        def __call__(self, *args, **named):
            return ask("call", self, args, named)

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return ask("get", self, name)

        def __setattr__(self, name, value):
            ask("set", self, name, value)

        def __iter__(self):
            return iter(ask("list", self))

    def keep(value: object) -> int | str:
        if isinstance(value, Remote):
            return value._name
        finish(out, f"gold: a test hands the program a {type(value).__name__}, which cannot be sent")

    def ask(verb: str, *items: object) -> object:
        with suppress(OSError):  # it is seen as no reply
            send(stream, [verb, *(pack(item, keep) for item in items)])
        reply = hear()
        try:
            kind, value = reply
            value = unpack(value, Remote)
        except Exception:
            finish(out, "failed: the program's process sent no value")
        if kind == "value":
            return value
        error = getattr(builtins, str(value), None)
        known = isinstance(error, type) and issubclass(error, Exception) and not error.__name__.startswith("Stop")
        raise (error if known else RuntimeError)(value)  # a StopIteration would end a test's loop early

    if (ready := hear()) != "ready":
        finish(out, f"refused: {ready}")
    try:
        ask("run", asked["program"], asked["prompt"])
        run_tests(asked, Remote)
    except BaseException as error:
        finish(out, f"failed: {type(error).__name__}: {str(error)[:100]}")
    finish(out, "passed")


def run_tests(asked: dict[str, str], remote) -> None:
    """Names that the tests use and do not define are modules of the library, or the program's."""
    entry, nodes = asked["entry_point"], list(ast.walk(ast.parse("\n".join((asked["setup"], asked["tests"])))))
    used = {node.id for node in nodes if isinstance(node, ast.Name)} - vars(builtins).keys()
    dotted = {node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    space = {"__name__": "tests"}
    for name in used:
        space[name] = __import__(name) if name in dotted & sys.stdlib_module_names else remote(name)
    exec(asked["prompt"], space)  # its helpers are then not the program's
    exec(asked["setup"], space)
    if entry:
        space[entry] = remote(entry)
    exec(asked["tests"], space)


def main(parent: int) -> None:
    out, root = os.dup(1), os.getuid() == 0
    sys.set_int_max_str_digits(0)
    try:
        leave(root)
        kernel("prctl", PARENT_DEATH, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            return
        alive, ours = os.pipe()
        if child := os.fork():
            os.close(alive)
            os.waitpid(child, 0)
            return
        os.close(ours)
        judge(out, alive, root)
    except Exception as error:
        finish(out, f"refused: {error}")
