"""README says what is so: its commands run (at a smaller size, with the toy in the place of models and data from the
hub), the changes that it shows work, and the files, settings and names that it mentions exist."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_checkpoint, run_script
from forks import fork_script

import eval_math
import export
import grpo
import model
import sample
import sft
import tinylora
from configurator import configure

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"grpo.py": grpo, "sft.py": sft, "sample.py": sample, "eval_math.py": eval_math, "export.py": export}
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
COMMANDS = [part.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()
            for part in re.split(r"\s*&&\s*", line)]
SKIPPED = {  # the start of a command, and why it is not run here
    "python3 -m venv": "makes an environment",
    ".venv/bin/pip install": "downloads packages",
    ".venv/bin/python -m pytest": "this is it",
    "torchrun": "needs GPUs; test_run.py and test_shard.py run several processes with every script",
}
SMALLER = {
    "grpo.py": ["--max_steps=1", "--batch_size=2", "--group_size=2", "--eval_size=2", "--max_new_tokens=4"],
    "sft.py": ["--max_steps=1", "--batch_size=2", "--eval_size=2", "--max_new_tokens=4"],
    "eval_math.py": ["--num_problems=2", "--max_new_tokens=4"],
    "sample.py": ["--max_new_tokens=4"],
    "export.py": [],
}


def skipped(command):
    return next((start for start in SKIPPED if command.startswith(start)), None)


@pytest.fixture(scope="module")
def place(tmp_path_factory, problems):
    """A clone after its runs, with the toy under every name that stands for a model."""
    place = tmp_path_factory.mktemp("clone")
    for name in ("toy", "config"):
        os.symlink(ROOT / name, place / name)
    for name in ("DIR", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"):
        (place / name).parent.mkdir(exist_ok=True)
        os.symlink(ROOT / "toy" / "base", place / name)
    for name in ("gsm8k", "math500", "aime24"):
        (place / name).mkdir(parents=True)
        for split in ("train", "test"):
            shutil.copy(problems, place / name / f"{split}.jsonl")
    shutil.copy(problems, place / "FILE.jsonl")
    net = model.load_model(str(ROOT / "toy" / "base"), device="cpu")
    tinylora.add_adapter(net, rank=1)
    for name in ("toy", "qwen7b_u13"):
        tinylora.save_adapter(net.adapter, str(place / "out" / name / "adapter.safetensors"))
    (place / "out" / "qwen7b_u13" / "settings.py").touch()
    export.export_peft(net, str(place / "PEFT_LORA"))
    return place


@pytest.mark.parametrize("command", [command for command in COMMANDS if not skipped(command)])
def test_a_command_runs(place, command):
    program, script, *rest = shlex.split(command, comments=True)
    assert program in ("python", ".venv/bin/python"), "neither run nor in SKIPPED"
    for left in ("DIR2", "out/eval"):  # by another command: which one ran before is the scheduler's choice
        shutil.rmtree(place / left, ignore_errors=True)
    done = fork_script(ROOT / script, *rest, *SMALLER[script], "--device=cpu", cwd=place, stdin="How many?\n")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr


def test_what_is_skipped_is_there():
    assert {skipped(command) for command in COMMANDS} - {None} == set(SKIPPED)


def test_every_setting_is_some_scripts_own():
    settings = {script: vars(configure(module.Settings, argv=[])) for script, module in SCRIPTS.items()}
    for text in [*COMMANDS, *re.findall("`(python [^`]+)`", README)]:
        script = next((word for word in shlex.split(text) if word in SCRIPTS), None)
        if script:
            assert set(re.findall(r" --(\w+)", text)) - {"nproc_per_node"} <= set(settings[script]), text
    named = set(re.findall(r"(?<![\w-])--(\w+)", README)) - {"nproc_per_node", "help", "key"}
    assert named <= set().union(*settings.values()) and len(named) > 10


def test_every_file_and_every_name_exists():
    code = [path for pattern in ("*.py", "support/*.py", "config/*.py") for path in ROOT.glob(pattern)]
    words = set(re.findall(r"\w+", "\n".join(path.read_text(encoding="utf-8") for path in code)))
    spans = re.findall(r"`([^`\n]+)`", re.sub("```.*?```", "", README, flags=re.S))
    files = {span for span in spans if re.fullmatch(r"[\w./-]+\.py|[\w.-]+/", span)}
    files |= {name for name in re.findall(r"[\w./]+\.py\b", "\n".join(COMMANDS))} - {"settings.py"}
    assert [f for f in sorted(files - {"settings.py"}) if not (ROOT / f).exists()] == [] and len(files) > 15
    method = re.search(r"```python\nU, S, Vt(.*?)```", README, re.S)[1]
    names = {span for span in spans if re.fullmatch(r"[a-z]\w*_\w+", span)} | set(re.findall(r"\w+_\w+", method))
    assert names <= words, names - words


def test_the_lines_of_the_files_are_about_right_and_readme_is_short():
    assert len(README.encode()) <= 10_240
    table = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M)
    assert {name for name, _ in table} == {path.name for path in ROOT.glob("*.py")}
    for name, lines in table:
        assert int(lines) == pytest.approx(len((ROOT / name).read_text().splitlines()), rel=0.1), name


# ---------------------------------------------------------------------------------------------------- changing things


def copy_of_the_code(tmp_path):
    place = tmp_path / "code"
    place.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, place)
    for name in ("support", "toy"):
        os.symlink(ROOT / name, place / name)
    return place


def apply(diff, place):
    """Apply a diff of README, in which - lines are replaced by the + lines that follow."""
    added = 0
    for file, body in re.findall(r"--- (\S+)\n((?:[-+](?!--).*\n)+)", diff):
        text = (place / file).read_text()
        for old, new in re.findall(r"((?:-.*\n)+)((?:\+.*\n)+)", body):
            old, new = ("\n".join(line[1:] for line in part.splitlines()) for part in (old, new))
            assert text.count(old) == 1, old
            text = text.replace(old, new)
            added += len(new.splitlines()) - sum(line in old for line in new.splitlines())
        (place / file).write_text(text)
    assert 0 < added <= 5


def changes():
    text = README.partition("## Changing things")[2].partition("\n## ")[0]
    return dict(re.findall(r"\*\*The ([\w ]+)\*\*.*?\n\n```\w+\n(.*?)```", text, re.S))


TINY = ["--max_steps=2", "--batch_size=2", "--group_size=4", "--eval_size=4", "--eval_interval=0", "--out_dir=run"]


def run_changed(place, *arguments):
    done = run_script("grpo.py", *TINY, *arguments, cwd=place)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (place / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [0, 1, 2, 2]
    return log


@pytest.mark.parametrize("name", ["reward", "task"])
def test_a_change_in_a_config_file_works(tmp_path, name):
    place = copy_of_the_code(tmp_path)
    lines = changes()[name]
    assert len([line for line in lines.splitlines() if line]) <= 7
    (place / "mine.py").write_text(lines)
    log = run_changed(place, "mine.py")
    rewards = [log[0]["eval"]["reward"], log[1]["reward"]]
    if name == "reward":
        assert any(reward * 400 % 1 or reward < 0 for reward in rewards)  # no share of right answers
        assert "len(completion.ids) / 100" in (place / "run" / "settings.py").read_text()
    else:
        assert log[0]["eval"]["problems"] == 4


def test_another_objective_works(tmp_path):
    place = copy_of_the_code(tmp_path)
    apply(changes()["objective"], place)
    code = ("import torch, grpo; rewards = torch.tensor([[1.0, 0, 0, 0]]);"
            "print(*grpo.group_advantages(rewards, 'rloo')[0].tolist())")
    done = run_script("-c", code, cwd=place)
    assert list(map(float, done.stdout.split())) == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    run_changed(place, "--objective=rloo")


def test_another_adapter_works(tmp_path):
    place = copy_of_the_code(tmp_path)
    apply(changes()["adapter"], place)
    run_changed(place, "--method=svft", "--rank=3")
    code = ("import torch, model, tinylora; net = model.load_model('toy/base', device='cpu');"
            "adapter = tinylora.load_adapter(net, 'run'); adapter.refresh();"
            "assert adapter.v.shape == (21, 3) and adapter.v.abs().sum() > 0;"
            "assert torch.equal(adapter.R, adapter.v.diag_embed())")
    done = run_script("-c", code, cwd=place)
    assert done.returncode == 0, done.stderr


def test_another_model_family_works(tmp_path):
    transformers = pytest.importorskip("transformers")
    place = copy_of_the_code(tmp_path)
    directory = Path(make_checkpoint(tmp_path / "base", model_type="llama"))
    raw = json.loads((directory / "config.json").read_text())
    raw |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    (directory / "config.json").write_text(json.dumps(raw))
    apply(changes()["model family"], place)
    code = (f"import torch, model; ids = torch.arange(20)[None]; net = model.load_model({str(directory)!r});"
            "torch.save(net(ids), 'logits.pt')")
    done = run_script("-c", code, cwd=place)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)(torch.arange(20)[None]).logits
    torch.testing.assert_close(torch.load(place / "logits.pt"), theirs, atol=1e-4, rtol=1e-4)
    assert "mistral" not in model.FAMILIES and sys.modules["model"] is model
