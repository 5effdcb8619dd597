"""What a newcomer meets when something is missing, full, closed, old or broken: one line that names the cure, exit code
2, and nothing half-written. More of this stands beside each script's own tests."""

import ast
import json
import os
import shutil
import signal
import time

import pytest
from conftest import ROOT, assert_refused, run_script
from forks import fork_script, start_script

import eval_math
import model
import sample
import tinylora
from configurator import configure

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the scripts are run as forks")
LITTLE = ["--max_steps=2", "--save_interval=1", "--batch_size=2", "--max_new_tokens=3", "--device=cpu"]
GRPO = ["grpo.py", "--group_size=2", "--eval_dataset=", "--u=2", *LITTLE]
NO_SPACE = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"  # a file grows no further
NO_OUTPUT = "os.dup2(os.open('/dev/null', os.O_WRONLY), 1);"
FULL_OUTPUT = "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
READ_ONLY = """
import ctypes
os.mkdir(job["cwd"] + "/locked", 0o555)  # which root may write to, unless it gives its capabilities up
ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
"""
OLD_PYTHON = "sys.version_info = (3, 10, 0); del sys.modules['configurator']"
OLD_TORCH = "import torch; torch.__version__ = '2.10.0+cpu'; del sys.modules['model']"
MEMORY = "import model; model.free_memory = lambda device: {}"
ROW_MEMORY = "import sample; sample.free_memory = lambda device: 20_000"
NO_HUB = dict(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0", HF_HOME="hub")

FAULTS = {  # name: (arguments, what happens before, environment, what the line says)
    "hub unreachable": (["sample.py", "--model=owner/name"], "", NO_HUB,
                        "'owner/name' is no local directory and could not be downloaded", "give its directory"),
    "data set offline": (["eval_math.py", "--dataset=gsm8k"], "", dict(HF_HUB_OFFLINE="1", HF_HOME="hub"),
                         "data set 'gsm8k' (openai/gsm8k, test) could not be loaded", "give a .jsonl file"),
    "no GPU, said before the download": (["sample.py", "--device=cuda", "--model=owner/name"], "",
                                         NO_HUB | dict(CUDA_VISIBLE_DEVICES=""), "device 'cuda' is not available here",
                                         "--device=auto"),
    "device that holds nothing": (["sample.py", "--device=meta"], "", {}, "device 'meta' is not available"),
    "dtype, said before the download": (["sample.py", "--dtype=bf16", "--model=owner/name"], "", NO_HUB,
                                        "dtype must be auto, float32"),
    "memory for the weights": ([*GRPO], MEMORY.format(10_000), {}, "the weights take",
                               "use a smaller model or --dtype=bfloat16"),
    "memory for one row": ([*GRPO], ROW_MEMORY, {}, "GB for keys and values", "lower max_new_tokens"),
    "memory for the optimiser": ([*GRPO, "--method=full"], MEMORY.format(300_000), {},
                                 "Adam's two moments of 32,032 numbers", "use tinylora"),
    "output to a full disk": ([*GRPO], FULL_OUTPUT, {}, "No space left on device; make room"),
    "responses to a full disk": (["eval_math.py", "--dataset=DATA", "--max_new_tokens=3"], NO_SPACE.format(3000), {},
                                 "File too large; make room, then go on with --init_from=resume"),
    "settings to a full disk": ([*GRPO], NO_OUTPUT + NO_SPACE.format(500), {}, "settings.py cannot be written",
                                "make room"),
    "export to a full disk": (["tinylora.py", "export", "--model=MODEL", f"--adapter=hex:{'00' * 4}", "--to=hf",
                               "--out_dir=run"], NO_SPACE.format(50_000), {}, "model.safetensors cannot be written"),
    "read-only out_dir": ([*GRPO, "--out_dir=locked"], READ_ONLY, {}, "out_dir 'locked' cannot be written",
                          "Permission denied"),
    "read-only parent": ([*GRPO, "--out_dir=locked/run"], READ_ONLY, {}, "out_dir 'locked/run' cannot be written"),
    "out_dir is a file": ([*GRPO, "--out_dir=DATA"], "", {}, "cannot be written", "File exists"),
    "out_dir below a file": (["eval_math.py", "--out_dir=DATA/run", "--dataset=DATA"], "", {}, "Not a directory"),
    "old Python": ([*GRPO], OLD_PYTHON, {}, "Python 3.11 or newer is needed"),
    "old torch": (["sample.py"], OLD_TORCH, {}, "torch 2.11 or newer is needed, this is 2.10.0+cpu: pip install -r"),
    "settings of an older version": (["grpo.py", "old.py"], "", {},
                                     "unknown setting 'learning_rates' in old.py, line 3",
                                     "Delete the line if another version wrote it"),
    "adapter of another model": (["sample.py", "--model=toy/base", "--adapter=adapter"], "", {},
                                 "was trained on another base model"),
    "invalid JSON": (["sft.py", "--dataset=broken.jsonl", "--model=MODEL"], "", {}, "broken.jsonl, line 2: no JSON"),
    "empty data": ([*GRPO, "--dataset=empty.jsonl"], "", {}, "empty.jsonl holds no problems"),
    "data that is no text": ([*GRPO, "--dataset=adapter/adapter.safetensors"], "", {}, "adapter.safetensors"),
    "standard input in another encoding": (["sample.py", "--prompt=-", "--model=MODEL"],
                                           "sys.stdin.reconfigure(encoding='ascii')", dict(stdin="Zoë"),
                                           "the terminal's text is not ascii: set PYTHONUTF8=1"),
}


@pytest.fixture
def place(checkpoint, problems, tmp_path):
    """A directory to work in, with some files."""
    os.symlink(ROOT / "toy", tmp_path / "toy")
    (tmp_path / "old.py").write_text("# settings.py of long ago\nseed = 3\nlearning_rates = 0.1\n")
    (tmp_path / "broken.jsonl").write_text('{"question": "?", "answer": "1"}\n{"question": \n')
    (tmp_path / "empty.jsonl").write_text("\n")
    net = model.load_model(checkpoint, device="cpu")
    tinylora.add_adapter(net, u=2, n_tie=0)
    tinylora.save_adapter(net.adapter, str(tmp_path / "adapter" / "adapter.safetensors"))
    return tmp_path


def arguments(args, checkpoint, problems):
    """Of a script in ROOT, with its own model and data unless it names others."""
    script, *rest = args[1:] if args[0] == "-m" else [str(ROOT / args[0]), *args[1:]]
    if args[0] in ("grpo.py", "sft.py"):
        rest = [f"--model={checkpoint}", f"--dataset={problems}", "--out_dir=run", *rest]
    rest = [a.replace("MODEL", checkpoint).replace("DATA", problems) for a in rest]
    return [*args[: args[0] == "-m"], script, *rest]


def files(path):
    return {f.relative_to(path) for f in path.rglob("*")} if path.exists() else set()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_gets_one_line_and_leaves_nothing_half_written(place, checkpoint, problems, name):
    args, setup, env, *words = FAULTS[name]
    before = files(place)
    done = fork_script(*arguments(args, checkpoint, problems), setup=setup, cwd=place, **env)
    done.stderr = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("Generating"))
    assert_refused(done, *words)
    left = {f for f in files(place) - before if f.parts[0] != "hub"}
    assert not [f for f in left if ".tmp" in str(f) or f.suffix == ".safetensors"], left
    assert not any("step" in line.split() for line in done.stdout.splitlines())
    assert name != "memory for one row" or "made ready" not in done.stdout  # before the SVD


@pytest.mark.parametrize("script", ["grpo.py", "sft.py", "sample.py", "tinylora.py", "-m lab.bench"])
def test_what_can_happen_while_packages_are_imported(tmp_path, script):
    for name in ("numpy", "torch"):
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError(f'No module named {__name__!r}')")
    done = run_script(*script.split(), PYTHONPATH=f"{tmp_path}")
    assert_refused(done, "error: No module named", "pip install -r requirements.txt, into the Python of")
    for name in ("numpy", "torch"):
        (tmp_path / f"{name}.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = run_script(*script.split(), PYTHONPATH=f"{tmp_path}")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_what_checks_the_python_can_be_read_by_an_old_one():
    ast.parse((ROOT / "configurator.py").read_text(), feature_version=(3, 8))
    for script in ROOT.glob("*.py"):  # down to its import of configurator
        ast.parse(script.read_text(), feature_version=(3, 10))


def test_a_disk_that_fills_up_costs_no_checkpoint(place, checkpoint, problems):
    run = arguments([*GRPO, "--method=full"], checkpoint, problems)
    assert fork_script(*run, "--max_steps=1", cwd=place).returncode == 0
    before = {f: f.read_bytes() for f in place.glob("run/**/*.safetensors")}
    assert len(before) == 3  # the checkpoint, the one before, and the model
    done = fork_script(*run, "--init_from=resume", cwd=place, setup=NO_SPACE.format(100_000))
    assert_refused(done, "checkpoint.safetensors cannot be written", "make room")
    assert before == {f: f.read_bytes() for f in place.glob("run/**/*") if f in before or "tensors" in f.name}
    done = fork_script(*run, "--init_from=resume", cwd=place)
    assert done.returncode == 0 and "step    2" in done.stdout and "step    1" not in done.stdout


@pytest.mark.parametrize("fault", ["safetensors", "system"])
def test_a_save_that_fails_leaves_the_old_file(net, tmp_path, monkeypatch, fault):
    adapter, path = tinylora.add_adapter(net, u=2), tmp_path / "adapter.safetensors"
    tinylora.save_adapter(adapter, str(path))
    before = path.read_bytes()

    def full(tensors, file, metadata):
        with open(file, "wb") as f:
            f.write(b"half")
        raise OSError(28, "No space left on device") if fault == "system" else tinylora.SafetensorError("full")

    monkeypatch.setattr(tinylora.safetensors.torch, "save_file", full)
    with pytest.raises(tinylora.UserError, match="adapter.safetensors cannot be written: .*; make room"):
        tinylora.save_adapter(adapter, str(path))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


STOP = """
import signal
def stop(module, name):
    real = getattr(module, name)
    def stopping(*arguments, **options):
        result = real(*arguments, **options)
        os.kill(os.getpid(), signal.SIGINT)
        return result
    setattr(module, name, stopping)
"""
MOMENTS = {
    "reading problems": "import eval_math; stop(eval_math, '_read_jsonl')",
    "loading": "import model; stop(model, '_read_weights')",
    "the adapter": "import tinylora; stop(tinylora, 'add_adapter')",
    "settings, and every save": "stop(os, 'replace')",
    "saving": "import safetensors.torch; stop(safetensors.torch, 'save_file')",
    "evaluation": "import eval_math; stop(eval_math, 'evaluate')",
    "sampling": "import sample; stop(sample.Sampler, 'step')",
    "update": "import torch; stop(torch.optim.Adam, 'step')",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_at_any_moment(place, checkpoint, problems, moment):
    run = arguments([*GRPO, "--eval_size=2", f"--eval_dataset={problems}"], checkpoint, problems)
    done = fork_script(*run, setup=STOP + MOMENTS[moment], cwd=place)
    assert done.returncode == 130 and "Traceback" not in done.stdout + done.stderr, done.stderr
    assert "interrupted" in done.stdout + done.stderr
    assert not [f for f in files(place) if ".tmp" in str(f)]


@pytest.mark.parametrize("args, moment", [
    (["sample.py", "--model=MODEL", "--max_new_tokens=9"], "import tinylora; stop(tinylora, 'sampling_form')"),
    (["eval_math.py", "--model=MODEL", "--dataset=DATA"], "import tinylora; stop(tinylora, 'sampling_form')"),
    (["tinylora.py", "export", "--model=MODEL", "--adapter=adapter", "--out_dir=exported"], MOMENTS["saving"]),
])
def test_ctrl_c_in_the_other_scripts(place, checkpoint, problems, args, moment):
    done = fork_script(*arguments(args, checkpoint, problems), setup=STOP + moment, cwd=place)
    assert done.returncode == 130 and "interrupted" in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert not (place / "exported").exists() and not [f for f in files(place) if ".tmp" in str(f)]


def test_two_runs_in_one_place_and_one_that_was_killed(place, checkpoint, problems):
    run = arguments(GRPO, checkpoint, problems)
    first = start_script(*run, "--max_steps=1000000", cwd=place)
    try:
        deadline = time.time() + 60
        while not (place / "run" / "checkpoint.safetensors").exists() and time.time() < deadline:
            time.sleep(0.02)
        for how in ("scratch", "resume"):
            done = fork_script(*run, f"--init_from={how}", "--max_steps=1000000", cwd=place)
            assert_refused(done, "another run is writing to out_dir 'run'; wait for it, or choose another")
        assert not (place / "run.1").exists()
    finally:
        os.kill(first.pid, signal.SIGKILL)
    assert first.wait().returncode == -signal.SIGKILL
    done = fork_script(*run, cwd=place)
    assert done.returncode == 0 and "moved the earlier run in run to run.1" in done.stdout, done.stderr


def test_nobody_reads_the_output(place, checkpoint, problems):
    setup = "r, w = os.pipe(); os.close(r); os.dup2(w, 1)"  # `| head` that has gone
    for args in (["sample.py", "--help"], [*GRPO], ["eval_math.py", "--dataset=DATA", "--max_new_tokens=2"]):
        done = fork_script(*arguments(args, checkpoint, problems), setup=setup, cwd=place)
        assert done.returncode == 141 and done.stderr == ""


@pytest.mark.parametrize("stdin", ["", None])
def test_a_talk_with_nobody_ends(place, checkpoint, stdin):
    done = fork_script(ROOT / "sample.py", f"--model={checkpoint}", "--prompt=-", stdin=stdin, cwd=place)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_stream(place, checkpoint, stream):
    setup = f"os.close({1 if stream == 'stdout' else 2}); sys.{stream} = None"
    done = fork_script(ROOT / "sample.py", f"--model={checkpoint}", "--n=2", "--max_new_tokens=2", setup=setup,
                       cwd=place)
    assert done.returncode == 0 and "Traceback" not in done.stderr + done.stdout, done.stderr


def test_text_that_the_terminal_cannot_show(place, checkpoint):
    data = place / "zoë.jsonl"
    data.write_text(json.dumps({"question": "Zoë → ∞ \ud800?", "answer": "1"}) + "\n")
    done = run_script("eval_math.py", f"--model={checkpoint}", f"--dataset={data}", "--max_new_tokens=2",
                      f"--out_dir={place}/run", "--device=cpu", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0",
                      PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and r"Zo\xeb \u2192 \u221e \ud800?" in done.stdout, done.stderr


def test_a_terminal_one_column_wide(place, checkpoint, problems):
    setup = """
import fcntl, pty, struct, termios, threading
ours, terminal = pty.openpty()
fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 1, 1, 0, 0))
seen = os.open("seen", os.O_CREAT | os.O_WRONLY)
def copy():
    while True:
        os.write(seen, os.read(ours, 1000))
threading.Thread(target=copy, daemon=True).start()
os.dup2(terminal, 1), os.dup2(terminal, 2)
"""
    run = arguments([*GRPO, "--eval_size=2", f"--eval_dataset={problems}"], checkpoint, problems)
    assert fork_script(*run, setup=setup, cwd=place, COLUMNS="1", LINES="0").returncode == 0
    assert b"Traceback" not in (place / "seen").read_bytes() and (place / "seen").stat().st_size > 100


def test_windows_files(place, checkpoint, problems):
    """A byte order mark and \\r\\n change nothing: in problems, in prompts, in settings, in a checkpoint's JSON."""
    def windows(source, target):
        text = source.read_text(encoding="utf-8").replace("\n", "\r\n")
        target.write_bytes(b"\xef\xbb\xbf" + text.encode())
        return str(target)

    rows = eval_math.load_problems(problems)
    assert eval_math.load_problems(windows(ROOT.__class__(problems), place / "problems.jsonl")) == rows
    (place / "plain.py").write_text("seed = 3\nprompt = 'Zoë'\n", encoding="utf-8")
    cfg = configure(vars(sample), [windows(place / "plain.py", place / "windows.py")])
    assert (cfg.seed, cfg.prompt) == (3, "Zoë")
    (place / "prompts").write_text("How many?\nWho?\n")
    shutil.copytree(checkpoint, place / "copy")
    for file in (place / "copy").glob("*.json"):
        windows(file, file)
    done = fork_script(ROOT / "sample.py", f"--model={place}/copy", "--max_new_tokens=3", "--temperature=0",
                       f"--prompt_file={windows(place / 'prompts', place / 'prompts.txt')}", cwd=place)
    assert [line for line in done.stdout.splitlines() if "###" in line] == ["### How many?", "### Who?"], done.stderr
