"""README says what is so: its commands run (at a smaller size, with the toy in the place of models and data from the
hub), and the files, settings and names it mentions exist."""

import json
import os
import re
import shlex
import shutil

import pytest
from conftest import ROOT
from forks import fork_script

import eval_math
import grpo
import model
import sample
import sft
import tinylora
from configurator import configure
from lab import bench, plot, study

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"grpo.py": grpo, "sft.py": sft, "sample.py": sample, "eval_math.py": eval_math, "tinylora.py": tinylora,
           "lab.bench": bench, "lab.study": study, "lab.plot": plot}
COMMANDS = [part for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()
            for part in re.split(r"\s*&&\s*", line) if part.strip()]
SKIPPED = {  # the start of a command, and why it is not run here
    "python3 -m venv": "makes an environment",
    ".venv/bin/pip install": "downloads packages",
    ".venv/bin/python -m pytest": "this is it",
    "torchrun": "needs GPUs; test_grpo.py and test_shard.py run several processes with every script",
    "python sft.py config/tulu3_lora.py": "streams from the hub; test_lab.py runs it on a file",
    "python -m lab.study gsm8k_sizes": "needs a GPU for weeks; test_lab.py trains its config for two steps",
}
SMALLER = {
    "grpo.py": ["--max_steps=1", "--batch_size=2", "--group_size=2", "--eval_size=2", "--max_new_tokens=4"],
    "sft.py": ["--max_steps=1", "--batch_size=2", "--eval_size=2", "--max_new_tokens=4"],
    "eval_math.py": ["--num_problems=2", "--max_new_tokens=4"],
    "sample.py": ["--max_new_tokens=4"],
    "tinylora.py": [],
    "lab.study": [],  # every run is in the table that it finds: nothing is left to do
    "lab.plot": ["--figures=."],
}


def skipped(command):
    return next((start for start in SKIPPED if command.startswith(start)), None)


@pytest.fixture(scope="module")
def place(tmp_path_factory, problems):
    """A clone as README takes it to be, after its runs, with the toy under every name that stands for a model."""
    place = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "lab" / "results", place / "lab" / "results")
    for name in ("toy", "config"):
        os.symlink(ROOT / name, place / name)
    for name in ("DIR", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"):
        (place / name).parent.mkdir(exist_ok=True)
        os.symlink(ROOT / "toy" / "base", place / name)
    for name in ("gsm8k", "math", "math500", "aime24", "data/math500"):
        (place / name).mkdir(parents=True)
        for split in ("train", "test"):
            shutil.copy(problems, place / name / f"{split}.jsonl")
    for name in ("FILE.jsonl", "mine.jsonl"):
        shutil.copy(problems, place / name)
    (place / "questions.txt").write_text("How many?\n")
    (place / "out").mkdir()
    net = model.load_model(str(ROOT / "toy" / "base"), device="cpu")
    tinylora.add_adapter(net, rank=1)
    for name in ("toy", "qwen7b_u13"):
        tinylora.save_adapter(net.adapter, str(place / "out" / name / "adapter.safetensors"))
    (place / "out" / "qwen7b_u13" / "settings.py").touch()
    for name in ("toy", "other"):
        (place / "out" / name).mkdir(exist_ok=True)
        lines = [{"step": 0, "eval": {"strict": 0.2}}, {"step": 1, "reward": 0.5, "seconds": {"generate": 1.0}}]
        (place / "out" / name / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tinylora.export_peft(net, str(place / "PEFT_LORA"))
    return place


@pytest.mark.parametrize("command", [c.split("  #")[0].strip() for c in COMMANDS if not skipped(c)])
def test_a_command_runs(place, command):
    program, script, *rest = shlex.split(command, comments=True)
    assert program in ("python", ".venv/bin/python"), "neither run nor in SKIPPED"
    for left in ("DIR2", "out/eval"):  # of another command: which ran before is the scheduler's choice
        shutil.rmtree(place / left, ignore_errors=True)
    if "--regrade" in command:
        (place / "out" / "eval").mkdir()
        (place / "out" / "eval" / "gsm8k.jsonl").write_text(json.dumps({"response": "#### 4", "answer": "4"}) + "\n")
    if script == "-m":
        start, rest = ["-m", rest[0]], [*rest[1:], *SMALLER[rest[0]]]
    else:
        start, rest = [ROOT / script], [*rest, *SMALLER[script], "--device=cpu"]
    done = fork_script(*start, *rest, cwd=place, stdin="How many?\n")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr


def test_what_is_skipped_is_there():
    assert {skipped(command) for command in COMMANDS} - {None} == set(SKIPPED)


def commands_everywhere():
    """(script, {setting}) of the commands in blocks and in tables."""
    for text in [*COMMANDS, *re.findall("`(python [^`]+)`", README)]:
        words = shlex.split(text, comments=True)
        script = next((word for word in words if word in SCRIPTS), None)
        if script:
            yield script, {re.match(r"--(\w+)", word)[1] for word in words if word.startswith("--") and word != "--"}


def test_every_setting_in_a_command_is_the_scripts_own():
    seen = {}
    for script, settings in commands_everywhere():
        known = set(vars(configure(vars(SCRIPTS[script]), [])))
        assert settings - {"nproc_per_node"} <= known, script
        seen.setdefault(script, set()).update(settings)
    assert len(seen) >= 6 and sum(map(len, seen.values())) > 30  # the text is still read


def test_every_setting_in_the_text_is_some_scripts():
    known = set().union(*(vars(configure(vars(module), [])) for module in SCRIPTS.values()))
    named = set(re.findall(r"(?<![\w-])--(\w+)", README)) - {"nproc_per_node", "help", "key"}
    assert named <= known and len(named) > 30


def test_every_file_and_every_name_exists():
    code = [path for pattern in ("*.py", "lab/*.py", "toy/*.py", "config/*.py") for path in ROOT.glob(pattern)]
    words = set(re.findall(r"\w+", "\n".join(path.read_text(encoding="utf-8") for path in code)))
    spans = re.findall(r"`([^`\n]+)`", re.sub("```.*?```", "", README, flags=re.S))
    files = {span for span in spans if re.fullmatch(r"[\w./-]+\.py|[\w.-]+/|(?:toy|lab|tests|config)/[\w./]+", span)}
    files |= {name for name in re.findall(r"[\w./]+\.py\b", "\n".join(COMMANDS))}
    files -= {"settings.py", *(span for span in files if "out" in span.split("/"))}
    assert len(files) > 15
    assert [f for f in sorted(files) if not (ROOT / f).exists() and not (ROOT / "tests" / f).exists()] == []
    names = {span for span in spans if re.fullmatch(r"[a-z]\w*_\w+|[A-Z_]{4,}", span)} - {"max_lora_rank"}  # vLLM's
    assert len(names) > 15 and names <= words, names - words


def test_every_measurement_is_in_the_list():
    [line] = [line for line in README.splitlines() if line.startswith("| `lab/`")]
    assert set(re.findall(r"`(\w+)`", line)) == set(bench.BENCHES)
    assert set(re.findall(r"python -m lab\.bench (\w+)", README)) <= set(bench.BENCHES)
