"""What a newcomer meets when something is missing, full, locked, old or interrupted: one line that names the cure, an
exit code, and nothing half-written. More of this stands beside each file's own tests."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import safetensors
from conftest import ROOT, assert_refused, changed, refusal
from forks import start_script

from support import whole_file

LITTLE = ["--max_steps=2", "--save_interval=1", "--batch_size=2", "--max_new_tokens=3", "--device=cpu"]
GRPO = ["grpo.py", "--model=MODEL", "--dataset=DATA", "--out_dir=run", "--group_size=2", "--eval_dataset=", "--u=2",
        *LITTLE]
EXPORT = ["export.py", "--model=MODEL", f"--adapter=hex:{'00' * 4}", "--to=hf", "--out_dir=run"]
NO_SPACE = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"  # a file grows no further
NO_OUTPUT = "os.dup2(os.open('/dev/null', os.O_WRONLY), 1);"
READ_ONLY = """
import ctypes
os.mkdir(job["cwd"] + "/locked", 0o555)  # which root may write to, unless it gives its capabilities up
ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
"""
NO_HUB = dict(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0", HF_HOME="hub")

FAULTS = {  # name: (arguments, what happens before, environment, what the line says)
    "hub unreachable": (["sample.py", "--model=owner/name"], "", NO_HUB,
                        "'owner/name' is no local directory and could not be downloaded", "give its directory"),
    "data set offline": (["eval_math.py", "--dataset=gsm8k"], "", dict(HF_HUB_OFFLINE="1", HF_HOME="hub"),
                         "data set 'gsm8k' (openai/gsm8k, test) could not be loaded", "give a .jsonl file"),
    "no GPU, said before the download": (["sample.py", "--device=cuda", "--model=owner/name"], "",
                                         NO_HUB | dict(CUDA_VISIBLE_DEVICES=""),
                                         "device 'cuda' is not available here; use --device=auto"),
    "dtype, said before the download": (["sample.py", "--dtype=bf16", "--model=owner/name"], "", NO_HUB,
                                        "dtype in command line must be one of auto, float32, bfloat16"),
    "memory for the weights": (GRPO, "import model; model.free_memory = lambda device: 10_000", {},
                               "the weights take 0.0 GB in float32", "use a smaller model, --dtype=bfloat16"),
    "memory for one row": (["sample.py", "--model=MODEL"], "import support.device as d; d.free_memory = lambda _: 1e5",
                           {}, "GB of memory, and at most", "lower max_new_tokens"),
    "responses to a full disk": (["eval_math.py", "--model=MODEL", "--dataset=DATA", "--max_new_tokens=3"],
                                 NO_SPACE.format(3000), {},
                                 "problems.jsonl cannot be written", "make room, then go on with --init_from=resume"),
    "settings to a full disk": (GRPO, NO_OUTPUT + NO_SPACE.format(500), {}, "run/settings.py cannot be written",
                                "make room, or choose another place"),
    "export to a full disk": (EXPORT, NO_SPACE.format(50_000), {}, "model.safetensors cannot be written"),
    "read-only out_dir": ([*GRPO, "--out_dir=locked"], READ_ONLY, {}, "out_dir 'locked' cannot be written",
                          "Permission denied"),
    "read-only parent": ([*GRPO, "--out_dir=locked/run"], READ_ONLY, {}, "out_dir 'locked/run' cannot be written"),
    "read-only place of an export": ([*EXPORT, "--out_dir=locked/run"], READ_ONLY, {}, "locked/run' cannot be written"),
    "out_dir is a file": ([*GRPO, "--out_dir=DATA"], "", {}, "cannot be written", "File exists"),
    "out_dir below a file": (["eval_math.py", "--model=MODEL", "--out_dir=DATA/run", "--dataset=DATA"], "", {},
                             "cannot be written", "Not a directory"),
    "old torch": (["sample.py"], "import torch; torch.__version__ = '2.10.0+cpu'; del sys.modules['support.device']",
                  {}, "torch 2.11 or newer is needed, and this is 2.10.0+cpu: pip install -r requirements.txt"),
    "a setting as TRL calls it": (["grpo.py", "--learning_rate=1e-4"], "", {}, "did you mean 'lr'?"),
    "another setting as TRL calls it": (["grpo.py", "--num_generations=8"], "", {}, "did you mean 'group_size'?"),
    "a classifier": (["sample.py", "--model=classifier"], "", {}, "Qwen2ForSequenceClassification is not a language"),
    "merges out of order": (["sample.py", "--model=unordered"], "", {}, "unordered/tokenizer.json", "merges"),
    "a prompt as messages": (["eval_math.py", "--model=MODEL", "--dataset=messages.jsonl"], "", {},
                             "messages.jsonl, line 1: needs a question", "'role'"),
    "a bool as the answer": (["eval_math.py", "--model=MODEL", "--dataset=bool.jsonl"], "", {},
                             "bool.jsonl, line 1", "number or list named", "True"),
    "a compressed file": (["eval_math.py", "--model=MODEL", "--dataset=x.jsonl.gz"], "", {}, "unpack it"),
    "a LoRA of some layers": ([*EXPORT[:2], "--source=some_layers", "--out_dir=run"], "", {},
                              "layers_to_transform is not supported"),
    "a LoRA in a pickle": ([*EXPORT[:2], "--source=pickled", "--out_dir=run"], "", {}, "pickle"),
}


@pytest.fixture
def start(checkpoint, problems, tmp_path):
    """A function that starts a script in a directory of its own, with our model and data for MODEL and DATA."""
    os.symlink(ROOT / "toy", tmp_path / "toy")
    changed(checkpoint, tmp_path / "classifier", {
        "config.json": {"architectures": ["Qwen2ForSequenceClassification"]}})
    bpe = json.loads(Path(checkpoint, "tokenizer.json").read_text())["model"]
    changed(checkpoint, tmp_path / "unordered", {
        "tokenizer.json": {"model": bpe | {"merges": bpe["merges"][::-1], "ignore_merges": True}}})
    rows = {"bool": {"question": "?", "answer": True},
            "messages": {"prompt": [{"role": "user", "content": "?"}], "solution": "4"}}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "x.jsonl.gz").write_bytes(b"\x1f\x8b")
    for name, file in (("some_layers", "adapter_model.safetensors"), ("pickled", "adapter_model.bin")):
        (tmp_path / name).mkdir()
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
        if name == "some_layers":
            config["layers_to_transform"] = [1]
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        (tmp_path / name / file).write_bytes(b"")

    def start(args, **options):
        args = [arg.replace("MODEL", checkpoint).replace("DATA", problems) for arg in args]
        return start_script(ROOT / args[0], *args[1:], cwd=tmp_path, **options)

    return start


def files(path):
    return {str(file.relative_to(path)) for file in path.rglob("*")}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_gets_one_line_and_leaves_nothing_half_written(start, tmp_path, name):
    args, setup, env, *words = FAULTS[name]
    before = files(tmp_path)
    done = start(args, setup=setup, **env).wait()
    assert_refused(done, *words)
    left = files(tmp_path) - before
    assert not [file for file in left if not file.startswith("hub") and (".tmp" in file or "tensors" in file)]
    assert "step    1" not in done.stdout


def test_a_disk_that_fills_up_costs_no_checkpoint(start, tmp_path):
    run = [*GRPO, "--method=full"]
    assert start([*run, "--max_steps=1"]).wait().returncode == 0
    before = {file: file.read_bytes() for file in tmp_path.glob("run/**/*.safetensors")}
    assert len(before) == 2  # the checkpoint and the model
    done = start([*run, "--init_from=resume"], setup=NO_SPACE.format(100_000)).wait()
    assert_refused(done, "checkpoint.safetensors cannot be written", "make room")
    assert before == {file: file.read_bytes() for file in tmp_path.glob("run/**/*tensors*")}
    done = start([*run, "--init_from=resume"]).wait()
    assert done.returncode == 0 and "step    2" in done.stdout and "step    1" not in done.stdout


@pytest.mark.parametrize("error", [safetensors.SafetensorError("full"), OSError(28, "No space left on device"),
                                   KeyboardInterrupt(), ValueError("a mistake of ours")])
def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def write():
        with whole_file(path) as aside:
            with open(aside, "w") as f:
                f.write("half")
            raise error

    if isinstance(error, (KeyboardInterrupt, ValueError)):
        with pytest.raises(type(error)):
            write()
    else:
        assert f"{path} cannot be written: {error}; make room" in refusal(write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# -------------------------------------------------------------------------------------------------------- interruptions

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
    "reading problems": "import eval_math; stop(eval_math, 'read_file')",
    "loading": "import model; stop(model, 'read_weights')",
    "the adapter": "import tinylora; stop(tinylora, 'add_adapter')",
    "settings, and every save": "stop(os, 'replace')",
    "a checkpoint": "import support.run; stop(support.run, 'save_file')",
    "an adapter's file": "import tinylora; stop(tinylora, 'save_file')",
    "an evaluation": "import sample; stop(sample, 'generate')",
    "sampling": "import sample; stop(sample.Sampler, 'step')",
    "an update": "import torch; stop(torch.optim.Adam, 'step')",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_at_any_moment_of_a_run_which_then_goes_on(start, tmp_path, moment):
    run = [*GRPO, "--eval_size=2", "--eval_dataset=DATA"]
    done = start(run, setup=STOP + MOMENTS[moment]).wait()
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    assert "interrupted" in done.stderr or "stopped: go on with --out_dir=run --init_from=resume" in done.stdout
    assert not [file for file in files(tmp_path) if ".tmp" in file]
    how = "resume" if (tmp_path / "run" / "settings.py").exists() else "scratch"
    done = start([*run, f"--init_from={how}"]).wait()
    assert done.returncode == 0 and "step    2" in done.stdout, done.stderr


@pytest.mark.parametrize("args, moment", [
    (["sample.py", "--model=MODEL", "--max_new_tokens=9"], "import model; stop(model.Trunk, 'forward')"),
    (EXPORT, "import support.checkpoint; stop(support.checkpoint, 'save_file')"),
])
def test_ctrl_c_in_the_other_scripts(start, tmp_path, args, moment):
    before = files(tmp_path)
    done = start(args, setup=STOP + moment).wait()
    assert (done.returncode, done.stderr) == (130, "interrupted\n") and files(tmp_path) == before


def test_two_runs_in_one_place_and_one_that_was_killed(start, tmp_path):
    endless = [*GRPO, "--max_steps=1000000"]
    first = start(endless)
    try:
        deadline = time.time() + 60
        while not (tmp_path / "run" / "checkpoint.safetensors").exists() and time.time() < deadline:
            time.sleep(0.02)
        for how in ("scratch", "resume"):
            done = start([*endless, f"--init_from={how}"]).wait()
            assert_refused(done, "another run is writing to out_dir 'run'; wait for it, or choose another")
        assert not (tmp_path / "run.1").exists()
    finally:
        os.kill(first.pid, signal.SIGKILL)
        assert first.wait().returncode == -signal.SIGKILL
    (tmp_path / "run" / "checkpoint.safetensors.tmp").touch()  # as if it had been killed while it wrote
    for number in (1, 2):
        done = start(GRPO).wait()
        assert done.returncode == 0 and f"moved the earlier run in run to run.{number}" in done.stdout, done.stderr
    assert not [file for file in files(tmp_path) if ".tmp" in file]


# ---------------------------------------------------------------------------------------------- terminals and platforms


def test_a_chat_with_nobody_ends(start):
    done = start(["sample.py", "--model=MODEL", "--prompt=-"], stdin="").wait()
    assert (done.returncode, done.stderr) == (0, "")


def test_windows_files(start, checkpoint, tmp_path):
    """A byte order mark and \\r\\n change nothing in settings, in prompts, and in a checkpoint's JSON."""
    (tmp_path / "prompts.txt").write_text("How many?\nZoë?\n", encoding="utf-8")
    (tmp_path / "settings.py").write_text("max_new_tokens = 3\ntemperature = 0.0\nprompt_file = 'prompts.txt'\n")
    shutil.copytree(checkpoint, tmp_path / "copy")
    for file in [tmp_path / "prompts.txt", tmp_path / "settings.py", *tmp_path.glob("copy/*.json")]:
        file.write_text("\ufeff" + file.read_text(encoding="utf-8"), encoding="utf-8", newline="\r\n")
    done = start(["sample.py", "settings.py", "--model=copy"]).wait()
    assert [line for line in done.stdout.splitlines() if "###" in line] == ["### How many?", "### Zoë?"], done.stderr
