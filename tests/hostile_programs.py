"""Programs that want to pass a test they do not solve, or to do harm. {canary}, {port}, {name}: what they aim at.

The test is `check(f)`: f(2) must be 3. A program returns 3 only if its attack worked, so none may pass.
"""

HEAD = "import builtins, ctypes, gc, os, resource, signal, socket, sys, threading, time\n"

FORGERIES = {
    "exits before the tests": "os._exit(0)",
    "sys.exit before the tests": "sys.exit(0)",
    "exits in the function": "def f(x): os._exit(0)",
    "SystemExit in the function": "def f(x): raise SystemExit(0)",
    "exits at the end": "import atexit\natexit.register(os._exit, 0)\ndef f(x): sys.exit(0)",
    "exits in __del__": "class D:\n    def __del__(self): os._exit(0)\ndef f(x): return D() and 0",
    "prints what a pass prints": """
def f(x):
    for fd in range(64):
        try: os.write(fd, b"passed")
        except OSError: pass
""",
    "answers unasked": """
def f(x):
    for fd in range(3, 64):
        try: os.write(fd, b'"ready"\\n["value", true]\\n["value", null]\\n"passed"\\n')
        except OSError: pass
""",
    "sends what is no value": "def f(x): os.write(3, b'[\"dict\", 1]\\n')",
    "sends a line without end": "def f(x): os.write(3, b'[' * (1 << 20)); os._exit(0)",
    "patches builtins": """
for name in ("AssertionError", "Exception", "BaseException", "__build_class__", "compile", "exec", "isinstance"):
    setattr(builtins, name, lambda *a, **k: True)
def f(x): return 0
""",
    "patches the library": """
import json
json.dumps = lambda *a: '["value", 3'
def f(x): return 0
""",
    "patches the judge": """
for module in list(sys.modules.values()):
    for name in ("finish", "run_tests", "judge", "hear", "unpack", "pack"):
        if hasattr(module, name): setattr(module, name, lambda *a: "passed")
def f(x): return 0
""",
    "defines check": "def check(candidate): pass\ndef f(x): return 0",
    "equals everything": """
class Equal:
    __eq__ = __le__ = __ge__ = __bool__ = lambda *a: True
    __ne__ = __lt__ = __gt__ = lambda *a: False
    __hash__ = lambda self: 3
def f(x): return Equal()
""",
    "an int that equals everything": "class E(int):\n    __eq__ = lambda a, b: True\ndef f(x): return E(0)",
    "a class that equals everything": """
class Meta(type):
    __eq__ = lambda a, b: True
class E(metaclass=Meta): pass
def f(x): return E
""",
    "looks for the tests in its memory": """
def f(x):
    frame, sought, seen = sys._getframe(), "".join(["candidate", "(2)"]), list(gc.get_objects())
    while frame: seen += [frame.f_locals, frame.f_globals]; frame = frame.f_back
    values = [value for found in seen if type(found) is dict for value in list(found.values())]
    return 3 if any(sought in str(v) for v in values if type(v) in (str, bytes) and v is not sought) else 0
""",
    "reads other processes": """
def f(x):
    for pid in os.listdir("/proc"): open("/proc/" + pid + "/mem", "rb").read(1)
    return 3
""",
    "traces other processes": """
def f(x):
    trace = ctypes.CDLL(None).ptrace
    return 3 if any(trace(16, pid, 0, 0) == 0 for pid in [os.getppid(), *range(2, 100)] if pid) else 0
""",
    "recurses for ever": "def f(x): return f(x)",
    "recurses for ever in C": "x = []\nfor _ in range(200000): x = [x]\ndef f(_): return x",
    "crashes": "def f(x): ctypes.string_at(0)",
    "aborts": "def f(x): os.abort()",
    "is no Python": "def f(x) return",
    "is a null byte": "\0",
    "is nested deeply": "x = " + "(" * 20000,
    "is no function": "f = 3",
    "has no function": "g = 3",
    "raises what tests may catch": "def f(x): raise AssertionError",
    "ends the loop of the tests": "def f(x): raise StopIteration",
    "waits for input": "f = lambda x: input()",
}

KEYS = """
def f(x):
    libc = ctypes.CDLL(None, use_errno=True)
    keyctl = {{"x86_64": 250}}.get(os.uname().machine, 219)
    found = libc.syscall(ctypes.c_long(keyctl), 10, ctypes.c_long(-3), b"user", b"flywheel-canary", 0)
    return 3 if found > 0 else 0
"""
HARMS = {
    "kills its parent": "def f(x): os.kill(os.getppid(), 9)",
    "kills its group": "def f(x): os.kill(0, 9)",
    "kills everything": "def f(x): os.kill(-1, 9)",
    "kills by number": """
def f(x):
    for pid in range(2, 5000):
        try: os.kill(pid, 9); return 3
        except OSError: pass
""",
    "writes outside": "def f(x): open({canary!r}, 'w').write('x'); return 3",
    "reads outside": "def f(x): open({canary!r}).read(); return 3",
    "removes": "def f(x): os.remove({canary!r}); return 3",
    "writes by a link": "def f(x): os.symlink({canary!r}, 'l'); open('l', 'a').write('x'); return 3",
    "writes beside its library": "def f(x): open(os.path.dirname(os.__file__) + '/canary', 'w'); return 3",
    "writes in the root": "def f(x): os.mkdir('/canary'); return 3",
    "makes its root writable": """
def f(x):
    libc = ctypes.CDLL(None)
    libc.unshare(0x10020000)
    for flags in (4096 | 32, 32):
        if libc.mount(None, b"/", None, flags, None) == 0: return 3
    os.mkdir("/canary")
    return 3
""",
    "mounts the machine's disks": """
def f(x):
    libc = ctypes.CDLL(None)
    libc.unshare(0x10020000)
    return 3 if libc.mount(b"devtmpfs", b"/tmp", b"devtmpfs", 0, None) == 0 else 0
""",
    "leaves its root": """
def f(x):
    here = os.open("/", 0)
    os.mkdir("d"); os.chroot("d"); os.fchdir(here)
    for _ in range(20): os.chdir("..")
    open("." + {canary!r}); return 3
""",
    "becomes root": "def f(x): os.setuid(0); return 3",
    "reads the environment": "def f(x): return 3 if 'FLYWHEEL_SECRET' in os.environ else 0",
    "reads the session's keys": KEYS,
    "reads its parent's environment": "def f(x): open('/proc/1/environ').read(); return 3",
    "connects to this machine": "def f(x): socket.create_connection(('127.0.0.1', {port}), 2); return 3",
    "connects by a name": "def f(x): s = socket.socket(socket.AF_UNIX); s.connect({name!r}); return 3",
    "connects outside": "def f(x): socket.create_connection(('192.0.2.1', 80), 2); return 3",
    "sends outside": "def f(x): socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53)); return 3",
    "looks up a name": "def f(x): socket.getaddrinfo('example.com', 80); return 3",
    "lifts its limits": "def f(x): resource.setrlimit(resource.RLIMIT_NPROC, (999, 999)); return 3",
    "eats memory": "def f(x): bytearray(4 << 30); return 3",
    "fills a file": "def f(x): open('big', 'wb').write(bytes(32 << 20)); return 3",
    "fills its folder": """
def f(x):
    for i in range(10): open(str(i), "wb").write(bytes(10 << 20))
    return 3
""",
    "makes files": "def f(x):\n    for i in range(9999): open(str(i), 'w').close()\n    return 3",
    "opens files": "def f(x): return len([open('/dev/null') for _ in range(999)]) and 3",
    "floods its output": "def f(x): [sys.stdout.write('x' * 10**6) for _ in range(100)]",
    "floods the judge": "def f(x): return 'x' * (40 << 20)",
    "floods the judge with items": "def f(x): return [[]] * 10**5",
    "forks": """
def f(x):
    for _ in range(50): os.fork() or time.sleep(600)
    return 3
""",
    "starts threads": """
def f(x):
    for _ in range(50): threading.Thread(target=time.sleep, args=(600,)).start()
    return 3
""",
    "leaves threads": "threading.Thread(target=time.sleep, args=(600,)).start()\ndef f(x): return 0",
    "leaves a process": """
def f(x):
    if not os.fork():
        os.setsid()
        os.fork() or os.execv("/usr/bin/sleep", ["sleep", "600.{port}"])
    time.sleep(0.1)
""",
    "ignores signals": "for n in range(1, 64):\n    if n not in (9, 19, 32, 33): signal.signal(n, lambda *a: None)\n"
    "def f(x): return 0",
}

HANGS = {
    "sleeps": "def f(x): time.sleep(600)",
    "computes": "def f(x): return 10 ** (10 ** 9)",
    "loops before the tests": "while True: pass",
    "forks for ever": """
while True:
    try: os.fork()
    except OSError: pass
""",
    "forks and exits": """
while True:
    try:
        if os.fork(): os._exit(0)
    except OSError: pass
""",
    "stops itself": "def f(x): os.kill(os.getpid(), signal.SIGSTOP); time.sleep(600)",
    "sends without end": """
def f(x):
    while True: os.write(3, b"x" * 4096)
""",
}


def programs(table: dict[str, str], canary: str, port: int, name: str) -> dict[str, str]:
    """The programs of `table` by what they do, aimed at a file, a port, and the name of a local socket."""
    aims = {"{canary!r}": repr(canary), "{port}": str(port), "{name!r}": repr(name)}
    found = {}
    for what, text in table.items():
        for aim, at in aims.items():
            text = text.replace(aim, at)
        found[what] = HEAD + text
    return found
