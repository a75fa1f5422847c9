"""Claims about answers that are programs: who passes, and what a hostile one can neither forge nor harm."""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import hostile_programs
import psutil
import pytest
import yaml
from toy import gone, wait_for

from flywheel.errors import UserError
from flywheel.problems import code, judge
from flywheel.problems.code import passes_tests, read_gold
from flywheel.problems.extract import find
from flywheel.problems.pool import CheckerPool
from flywheel.problems.sources import load
from flywheel.recipe import ProblemSpec
from flywheel.records import Problem, Question, Split

ROOT = Path(__file__).parents[2]
CHECK = json.dumps({"test": "def check(candidate):\n    assert candidate(2) == 3\n", "entry_point": "f"})
RIGHT = "def f(x): return x + 1"


@pytest.fixture(scope="module", autouse=True)
def isolated():
    try:
        code.warm_up()
    except UserError as error:
        pytest.skip(str(error))


def processes(of: int | None = None) -> set[int]:
    """The judges and programs that run on this machine, or below the process `of` alone."""
    candidates = psutil.process_iter() if of is None else psutil.Process(of).children(recursive=True)
    found = set()
    for process in candidates:
        with suppress(psutil.NoSuchProcess):
            if "problems.judge" in " ".join(process.cmdline()):
                found.add(process.pid)
    return found


def gold(*tests: str, **more) -> str:
    return json.dumps({"test_list": tests, **more})


PAIR = "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\ndef f(p): return p.a + p.b"
NODE = "class Node:\n    def __init__(self, v): self.v, self.left = v, None\n"
HELPER = "import math\ndef half(x):\n    return x / 2\ndef f(x):\n    '''Twice.'''\n"


@pytest.mark.parametrize(
    ("tests", "program", "passes"),
    [
        (CHECK, RIGHT, True),
        (CHECK, "def f(x): return x", False),
        (CHECK, "def g(x): return x + 1", False),
        (gold("try:\n    f()\nexcept KeyError:\n    pass\nelse:\n    assert False"), "def g(): pass", False),
        (CHECK, f"So:\n```python\n{RIGHT}\n```\nIt prints\n```\n3\n```", True),
        (gold("assert f(1) == 2", "assert f(2) == 3"), RIGHT, True),
        (gold("assert f(1) == 2", "assert f(2) == 4"), RIGHT, False),
        (gold("assert f(a) == 2", test_setup_code="a = 1"), RIGHT, True),
        (gold("assert f() == (1, [2.5, None], {3}, {'a': b'x', 2: True}, 1j)"),
         "def f(): return (1, [2.5, None], {3}, {'a': b'x', 2: True}, 1j)", True),
        (gold("assert f() == [1]"), "def f(): return (1,)", False),
        (gold("assert f() == float('inf')"), "def f(): return 1e999", True),
        (gold("assert f() == f()"), "def f(): return float('nan')", False),
        (gold("assert f(['a', 'a']) == {'a': 2}"), "import collections\nf = collections.Counter", True),
        (gold("assert list(f()) == [0, 1]"), "def f(): yield from range(2)", True),
        (gold("assert f(x=2) == 2 ** 20000"), "def f(*, x): return x ** 20000", True),
        (gold("assert math.isclose(f(), 1 / 3)"), "def f(): return 1 / 3", True),
        (gold("assert math.isclose(f(), 1 / 3)"),
         "class math: isclose = lambda *a: True\ndef f(): return 0", False),
        (gold("assert f(Pair(1, 2)) == 3 and f(Pair(b=1, a=1)) == 2"), PAIR, True),
        (gold("assert root.left.v == 2 and f(root) is None", test_setup_code="root = Node(1)\nroot.left = Node(2)"),
         NODE + "def f(n): return n.left.left", True),
        (gold("try:\n    f()\nexcept KeyError:\n    pass\nelse:\n    assert False"), "def f(): return {}[1]", True),
        (gold("try:\n    f()\nexcept KeyError:\n    pass\nelse:\n    assert False"), "def f(): return 1 / 0", False),
        (gold("try:\n    f()\nexcept:\n    pass\nelse:\n    assert False"), "import os\ndef f(): os._exit(0)", False),
        (gold("for got in map(f, [1]):\n    assert got == 2"), "def f(x): raise StopIteration", False),
        (gold("assert half(f(2)) == 2", prompt=HELPER, entry_point="f"), "    y = 2\n    return x * y".strip(), True),
        (gold("assert half(f(2)) == 2", prompt=HELPER, entry_point="f"), "def f(x): return math.floor(x) * 2", True),
        (gold("assert half(f(2)) == 2", prompt=HELPER, entry_point="f"),
         "def half(x): return 2\ndef f(x): return 0", False),
        (gold("assert f(2) == 4", prompt='def f(x):\n    """Squared."""', entry_point="f"),
         "```python\n    y = x\n    return x * y\n```", True),
        (gold("try:\n    f()\nexcept ValueError:\n    pass\nelse:\n    assert False"),
         "import json\ndef f(): json.loads('{')", True),
        (gold("try:\n    f()\nexcept ValueError:\n    pass\nelse:\n    assert False"),
         "def f(): b'\\xff'.decode()", True),
        (gold("assert sum(10, 15) == 6"), "def sum(a, b): return 6", True),
        (gold("assert sum(10, 15) == 6"), "def f(a, b): return 6", False),
        (gold("assert sum(f(1)) == 3"), "def sum(x): return 3\ndef f(x): return [x]", False),
        (gold("assert f(1) == 2"), f"def f(x): return 10 ** {judge.DIGITS + 9}", False),
    ],
)  # fmt: skip
def test_a_program_passes_if_its_functions_return_what_the_tests_ask_for(tests, program, passes):
    assert passes_tests(tests, program) is passes


def test_a_program_sees_nothing_but_python_and_an_empty_folder():
    program = """
import os, resource
def f(): return os.listdir("/tmp"), sorted(os.listdir("/dev")), os.getcwd(), set(os.listdir("/")), list(os.environ)
def g(): return {n: list(resource.getrlimit(getattr(resource, "RLIMIT_" + n))) for n in LIMITS}
"""
    limits = {name: [limit, limit] for name, limit in judge.PROGRAM.items()}
    tests = gold(
        "files, devices, here, root, names = f()",
        "assert files == [] and devices == ['null', 'urandom'] and here == '/tmp'",
        "assert root - {'usr', 'lib', 'lib64', 'dev', 'tmp'} <= {" + repr(Path(sys.base_prefix).parts[1]) + "}, root",
        "assert set(names) <= {'LC_CTYPE'}",
        f"assert g() == {limits}",
    )
    assert passes_tests(tests, program.replace("LIMITS", repr(list(limits))))


@pytest.fixture
def aims(tmp_path, monkeypatch):
    """A file, a port and a local socket that programs aim at; it fails if one was reached or a process is left."""
    before, canary, name = processes(), tmp_path / "canary", f"\0flywheel-{os.getpid()}"
    canary.write_text("untouched")
    tmp_path.chmod(0o777), canary.chmod(0o666)
    add_key = {"x86_64": 248}.get(os.uname().machine, 217)  # into this session's keyring, where the kernel has one
    ctypes.CDLL(None).syscall(ctypes.c_long(add_key), b"user", b"flywheel-canary", b"x", 1, ctypes.c_long(-3))
    monkeypatch.setenv("FLYWHEEL_SECRET", "secret")
    with socket.create_server(("127.0.0.1", 0)) as port, socket.socket(socket.AF_UNIX) as local:
        local.bind(name)
        local.listen()
        number = port.getsockname()[1]
        yield lambda table: hostile_programs.programs(table, str(canary), number, name)
        for listener in (port, local):
            listener.settimeout(0)
            with pytest.raises(BlockingIOError):  # nobody connected
                listener.accept()
    assert canary.read_text() == "untouched" and os.listdir(tmp_path) == ["canary"]
    wait_for(lambda: processes() <= before)
    marked = f"600.{number}"
    assert not any(marked in " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))


@pytest.mark.parametrize("table", ["FORGERIES", "HARMS"])
def test_no_hostile_program_passes_or_does_harm(aims, table):
    programs = aims(getattr(hostile_programs, table))
    assert {what for what, program in programs.items() if passes_tests(CHECK, program) is not False} == set()
    assert passes_tests(CHECK, hostile_programs.HEAD + "def f(x): return 3")  # as one would whose attack worked


def test_a_program_that_does_not_end_is_undecided_and_ends_with_its_check(aims):
    programs = aims(hostile_programs.HANGS)
    with closing(CheckerPool("flywheel.problems.code:passes_tests", 1.5, 2)) as pool:
        verdicts = list(pool.check((CHECK, program) for program in programs.values()))
    assert {same for same, _ in verdicts} <= {None, False}
    assert verdicts[0] == (None, "the checker: no reply within 1.5 s (exit code -9)") or "died" in verdicts[0][1]


CHECKS_UNTIL_KILLED = """
import sys
from flywheel.problems.pool import CheckerPool
pool = CheckerPool("flywheel.problems.code:passes_tests", 20, 1)  # seconds: until a worker looks up
list(pool.check([(sys.argv[1], "import time\\ntime.sleep(600)")]))
"""


@pytest.mark.parametrize("worker_too", [pytest.param(False, marks=pytest.mark.slow), True])
def test_no_program_outlives_a_parent_that_was_killed(worker_too):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *sys.path]))}
    with subprocess.Popen([sys.executable, "-c", CHECKS_UNTIL_KILLED, CHECK], env=env) as parent:
        wait_for(lambda: len(processes(parent.pid)) >= 3, 60)  # the one that waits, judge, program
        started = processes(parent.pid)
        [worker] = psutil.Process(parent.pid).children()
        forks = worker.children()
        parent.kill()
        if worker_too:
            worker.kill()
            forks[0].send_signal(signal.SIGKILL)
    wait_for(lambda: all(gone(pid) for pid in started | {worker.pid, *(fork.pid for fork in forks)}), 60)


@pytest.mark.parametrize(
    ("weaker", "said"),
    [
        ("namespaces.NEW_NET = 1 << 30 | 1 << 3", "refused: .*unshare: Invalid argument"),
        ("namespaces.VISIBLE = ()", "refused: .*/dev/null"),
        ("namespaces.NEW_NET = 0", "failed: AssertionError"),
        ("judge.PROGRAM['NPROC'] = 100", "failed: AssertionError"),
    ],
)
def test_what_cannot_be_isolated_is_refused_before_a_run(monkeypatch, weaker, said):
    start = f"import sys; sys.path.append(sys.argv[1]); from flywheel.problems import judge, namespaces; {weaker};"
    monkeypatch.setattr(code, "START", f"{start} sys.path.pop(); judge.main(int(sys.argv[2]))")
    with pytest.raises(UserError, match=f"^problems.checker: programs cannot be isolated here, .*{said}") as error:
        code.preflight([])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("42", "must be a JSON object with test or test_list, got '42'"),
        ("{", "must be a JSON object"),
        ('{"tests": "assert 1"}', "tests: unknown; known: test, test_list"),
        ('{"test": 3}', "test: text or a list of texts wanted"),
        ('{"test": "assert f("}', "test is not Python"),
        ('{"test": "f(1) == 2"}', "no assert in it"),
        ('{"test": ""}', "no assert in it"),
        ('{"test": "def check(c):\\n assert c(1)"}', "entry_point: missing"),
        ('{"test": "assert f(1)", "entry_point": "f("}', "no name of a function"),
        ('{"test": "assert f(1)", "prompt": "def f("}', "prompt is not Python"),
    ],
)
def test_a_faulty_gold_answer_is_named_before_a_run(text, fault):
    with pytest.raises(ValueError, match=re.escape(fault)):
        passes_tests(text, RIGHT)
    with pytest.raises(UserError, match=f"^question q7: problems.checker: the gold answer.*{re.escape(fault)}"):
        code.preflight([Problem(Question("q7", "?"), text, Split.TRAIN)])
    code.preflight([Problem(Question("q7", "?"), CHECK, Split.TRAIN)])


def test_an_argument_that_cannot_be_sent_leaves_the_answer_undecided():
    with pytest.raises(RuntimeError, match="gold: a test hands the program a function"):
        passes_tests(gold("assert f(lambda: 1) == 1"), "def f(g): return g()")


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("No.\n```python\nx = 1\n```\nBetter:\n```python\ndef f():\n    return 1\n```\nDone", "def f():\n    return 1"),
        ("1. So\n   ```py\n   if x:\n       y\n   ```", "if x:\n    y"),
        ("```\na\n```\n```\nb\n```", "b"),
        ("```Python\na\n```\n```text\nb\n```", "a"),
        ("```python\na", None),
        ("the answer is 3", None),
        ("```python\n\n```", None),
    ],
)
def test_the_rule_code_finds_the_last_program(text, program):
    assert find(text, ["code"]) == program


def test_the_documented_sets_become_tests_of_several_columns(tmp_path):
    blocks = re.findall(r"^    problems: # (\S+).*\n((?:      .*\n)+)", (ROOT / "docs/recipes.md").read_text(), re.M)
    rows = {
        "HumanEval": [
            {
                "task_id": f"HumanEval/{i}",
                "prompt": f'def f(x):\n    """Add {i}."""\n',
                "canonical_solution": f"    return x + {i}\n",
                "test": f"METADATA = {{}}\ndef check(candidate):\n    assert candidate(1) == 1 + {i}\n",
                "entry_point": "f",
            }
            for i in range(12)
        ],
        "MBPP": [
            {
                "task_id": i,
                "text": f"Write a function that adds {i}.",
                "code": f"def f(x):\n    return x + {i}",
                "test_list": [f"assert f(1) == {i + 1}", f"assert f(2) == {i + 2}"],
                "test_setup_code": "",
                "challenge_test_list": [],
            }
            for i in range(12)
        ],
    }
    for name, table in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
        keys = yaml.safe_load(dict(blocks)[name])
        changes = {"format": "jsonl", "path": str(tmp_path / f"{name}.jsonl"), "config": None}
        spec = ProblemSpec.model_validate({**keys, **changes})
        problems = [problem for found in load(spec).values() for problem in found]
        assert len(problems) == 12
        code.preflight(problems)
        row, problem = table[3], next(p for p in problems if "3." in p.question.text)
        solution = row.get("code") or row["prompt"] + row["canonical_solution"].rstrip()
        assert passes_tests(problem.answer, solution) and not passes_tests(problem.answer, solution + "-1")
        assert "assert f(2)" not in problem.question.text and read_gold(problem.answer)["tests"]


def test_a_list_of_columns_is_the_answers_alone(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"q": "?", "t": ["a"]}\n')
    for fields, fault in (
        ({"question": ["q"], "answer": "t"}, "problems.fields.question: one column wanted"),
        ({"question": "q", "answer": ["t", "u"]}, "no field 'u'"),
        ({"question": "{q} {t[1]}", "answer": ["t"]}, "t: a list of more than 1 items wanted"),
    ):
        with pytest.raises(UserError, match=re.escape(fault)):
            load(ProblemSpec(path=str(path), fields=fields))
