"""Shared pieces of the tests: tiny checkpoints with random weights, and the scripts run as a user runs them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]

import make  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import model  # noqa: E402
from support import UserError  # noqa: E402

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def make_checkpoint(path, seed=0, **changes):
    """A checkpoint directory like the toy's, with random weights large enough to tell right from wrong."""
    path.mkdir(parents=True, exist_ok=True)
    words = [make.make_problem(make.random.Random(i))["question"] for i in range(50)] + ["user assistant system"] * 9
    ids = make.write_tokenizer(str(path), words)
    make.write_config(str(path), ids)
    raw = json.loads((path / "config.json").read_text()) | dict(hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, torch_dtype="float32") | changes
    (path / "config.json").write_text(json.dumps(raw))
    net = model.Transformer(model.load_config(str(path)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() == 2 else 0.5))
    model.save_model(net, str(path))
    return str(path)


def changed(source, path, files):
    """A copy of a checkpoint's directory. files: for each name the new text or bytes; or an object (of tensors where
    the name says so) whose keys replace those of the file, with None for a tensor to drop; or a function of the old
    bytes; or None for a file to delete."""
    shutil.copytree(source, path)
    for name, change in files.items():
        file = path / name
        if change is None:
            file.unlink()
        elif callable(change):
            file.write_bytes(change(file.read_bytes()))
        elif isinstance(change, dict) and file.suffix == ".safetensors":
            tensors = load_file(file) | change
            save_file({key: t for key, t in tensors.items() if t is not None}, file)
        elif isinstance(change, dict):
            file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | change), encoding="utf-8")
        else:
            file.write_bytes(change.encode() if isinstance(change, str) else change)
    return str(path)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(autouse=True)
def seed():
    """A test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def net(checkpoint):
    return model.load_model(checkpoint, device="cpu")


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    return model.load_tokenizer(checkpoint)


@pytest.fixture(scope="session")
def problems(tmp_path_factory):
    """A file of problems."""
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    rng = make.random.Random(5)
    make.write_jsonl(path, [make.make_problem(rng) for _ in range(40)])
    return str(path)


def refusal(function, *arguments, **options):
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def run_script(*args, cwd=ROOT, **env):
    """Run a script as a user would. Returns the finished process with its output as text."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"} | env
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=environment, capture_output=True, text=True,
                          timeout=600)


def assert_refused(process, *words):
    """One clear line, exit code 2, no traceback."""
    assert process.returncode == 2, process.stdout + process.stderr
    [line] = [line for line in process.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    for word in words:
        assert word in line, line
