"""Scripts run as a user runs them, in a fraction of the time: each is the fork of one process that has torch imported.

A fork starts with no autograd threads and no OpenMP pool, which forks of pytest's own process would miss. What is read
when Python starts (PYTHONUTF8, OMP_NUM_THREADS) or when a module is imported stays the server's: conftest.run_script
is for that.
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
PRELOADED = ("torch._dynamo", "model", "tinylora", "sample", "eval_math", "grpo", "sft", "export")
_server = None


def start_script(*args, setup="", cwd=ROOT, stdin="", **env):
    """Start `python *args` in a fork. setup: Python that runs in it before the script. stdin: text; None: closed.
    Returns a process with .pid and .wait() -> .returncode, .stdout, .stderr."""
    global _server
    if _server is None:
        quiet = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
        _server = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=quiet, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        atexit.register(_server.communicate)
    folder = tempfile.TemporaryDirectory()
    Path(folder.name, "0").write_text(stdin or "")
    job = {"args": [str(a) for a in args], "setup": setup, "cwd": str(cwd), "folder": folder.name,
           "closed": stdin is None, "env": dict(os.environ) | env}
    pid = _ask(job)

    def wait():
        code = _ask({"wait": pid})
        with folder:
            out, err = (Path(folder.name, n).read_text(encoding="utf-8", errors="replace") for n in "12")
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return SimpleNamespace(pid=pid, wait=wait)


def fork_script(*args, **options):
    return start_script(*args, **options).wait()


def start_ranks(count, *args, **options):
    """Start `python *args` as torchrun would, in a process a rank. Returns them in order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = dict(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_RUN_ID="forks")
    return [start_script(*args, RANK=str(rank), LOCAL_RANK=str(rank), **group, **options) for rank in range(count)]


def fork_ranks(count, *args, **options):
    return [rank.wait() for rank in start_ranks(count, *args, **options)]


def _ask(job):
    print(json.dumps(job), file=_server.stdin, flush=True)
    return json.loads(_server.stdout.readline())


def serve():
    """Read jobs, fork. Returns, in the fork, the job."""
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
        elif (pid := os.fork()) == 0:
            return job
        else:
            print(pid, flush=True)
    raise SystemExit


if __name__ == "__main__":
    import importlib
    import runpy

    sys.path[:1] = [str(ROOT), str(ROOT / "tests")]
    for module in PRELOADED:
        importlib.import_module(module)
    job = serve()
    signal.alarm(120)  # nothing hangs for longer
    for number in range(3):
        flags = os.O_RDWR | os.O_CREAT
        os.dup2(os.open(os.path.join(job["folder"], str(number)), flags), number)
    sys.stdin = None if job["closed"] else open(0, encoding="utf-8", closefd=False)
    if job["closed"]:
        os.close(0)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    exec(job["setup"])
    sys.argv = job["args"]
    code = 0
    try:
        try:
            if sys.argv[0] == "-m":
                runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
        except (Exception, KeyboardInterrupt) as error:
            code = 1
            sys.excepthook(type(error), error, error.__traceback__)
    except SystemExit as stopped:
        code = stopped.code or 0
    sys.stdout.flush()
    os._exit(code)  # to take torch down properly takes longer than most of the scripts
