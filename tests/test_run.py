"""support/run.py: what a run leaves in its out_dir, how it stops, and that it resumes to the same numbers."""

import json
import os
import random
import re
import signal
import sys
import time
from types import ModuleType

import pytest
import torch
from conftest import assert_refused, make_checkpoint
from forks import fork_ranks, fork_script, start_script
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_packing import one_thread  # noqa: F401

import grpo
import sft
from configurator import UserError, configure
from support.adapter_file import same_base

# Random weights can earn this, so there is something to learn.
EVEN_LENGTH = "def reward(problem, completion):\n    return len(completion.text) % 2 == 0\n"


class Runs:
    """Runs of grpo.py on a tiny model, each in a directory of `place`."""

    def __init__(self, checkpoint, problems, place):
        self.place = place
        self.settings = dict(model=checkpoint, dataset=problems, eval_dataset=problems, max_steps=3, batch_size=3,
                             group_size=4, max_new_tokens=8, eval_size=5, answer_format="any", device="cpu", rank=2,
                             u=1, n_tie=1, objective="grpo", lr=0.02)

    def args(self, name, code=EVEN_LENGTH, **changes):
        """The command line. code: a config file's, which may define the reward and the problems."""
        (self.place / "config.py").write_text(code)
        settings = self.settings | {"out_dir": self.place / name} | changes
        return [f"{self.place}/config.py", *(f"--{key}={value}" for key, value in settings.items())]

    def cfg(self, name, **changes):
        return configure(grpo.Settings, grpo.reward, grpo.problems, argv=self.args(name, **changes))

    def train(self, name, **changes):
        """In this process."""
        grpo.train(self.cfg(name, **changes))

    def fork(self, name, setup="", **changes):
        return fork_script("grpo.py", *self.args(name, **changes), setup=setup)

    def log(self, name):
        """The lines of log.jsonl, without the times."""
        lines = map(json.loads, (self.place / name / "log.jsonl").read_text().splitlines())
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]

    def steps(self, name):
        return [line for line in self.log(name) if "reward" in line]

    def v(self, name):
        return load_file(self.place / name / "adapter.safetensors")["v"]

    def saved(self, name):
        """The tensors and the information in the checkpoint."""
        with safe_open(self.place / name / "checkpoint.safetensors", "pt") as f:
            info = {key: json.loads(value) for key, value in f.metadata().items()}
            return {key: f.get_tensor(key) for key in f.keys()}, info

    def assert_same(self, first, second):
        (tensors, info), (others, other_info) = self.saved(first), self.saved(second)
        for key in ("seconds", "log_bytes"):
            info["history"].pop(key), other_info["history"].pop(key)
        assert self.log(first) == self.log(second) and info == other_info and tensors.keys() == others.keys()
        assert all(torch.equal(tensors[key], others[key]) for key in tensors)
        files, others = (sorted(f.name for f in (self.place / name).iterdir()) for name in (first, second))
        assert files == others


@pytest.fixture
def runs(checkpoint, problems, tmp_path):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Runs(checkpoint, problems, tmp_path)
    for number, handler in handlers.items():  # a run that fails leaves its own
        signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------- stop and resume


@pytest.mark.parametrize("settings", [{}, dict(resample=2, batch_size=6), dict(method="lora"),
                                      dict(method="full", lr=1e-4), dict(method="full", lr=1e-4, targets="mlp")],
                         ids=str)
def test_a_resumed_run_equals_an_uninterrupted_one(runs, settings):
    runs.train("whole", max_steps=4, save_interval=3, eval_interval=3, **settings)
    runs.train("parts", max_steps=3, save_interval=3, eval_interval=3, **settings)
    seconds = runs.saved("parts")[1]["history"]["seconds"]
    runs.train("parts", max_steps=4, save_interval=3, eval_interval=3, init_from="resume", **settings)
    assert runs.saved("parts")[1]["history"]["seconds"] > seconds  # of both parts
    runs.assert_same("whole", "parts")
    assert ("resample" in settings) == any(line["groups"] > 6 for line in runs.steps("whole"))


SETTINGS = dict(max_steps=5, eval_interval=2, save_interval=2, num_passes=2, kl_coef=0.1)


@pytest.fixture(scope="module")
def whole(checkpoint, problems, tmp_path_factory):
    """The directory of a run with SETTINGS that nothing has interrupted."""
    place = tmp_path_factory.mktemp("runs")
    Runs(checkpoint, problems, place).train("whole", **SETTINGS)
    return place / "whole"


SIGNAL = """
import signal
import {module}
real, calls = {module}.{name}, []
def signalling(*arguments, **options):
    result = real(*arguments, **options)
    calls.append(1)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.{signal})
    return result
{module}.{name} = signalling
"""


@pytest.mark.parametrize("name, module, function, call, step", [
    # Ctrl-C stops the run after the step that it falls into, or the one that comes next
    ("SIGINT", "support.run", "Run.log_evaluation", 1, 1), ("SIGINT", "sample", "Sampler.step", 12, 1),
    ("SIGINT", "torch", "optim.Adam.step", 3, 2), ("SIGTERM", "torch", "optim.Adam.step", 3, 2),
    ("SIGINT", "support.run", "Run.log_evaluation", 2, 3), ("SIGINT", "support.run", "save_file", 2, 3),
    ("SIGINT", "os", "replace", 4, 3), ("SIGINT", "torch", "optim.Adam.step", 10, 5),
    # before the first checkpoint, between two of them, and between evaluation, checkpoint and adapter
    ("SIGKILL", "support.run", "Run.evaluation_due", 1, None), ("SIGKILL", "torch", "optim.Adam.step", 3, 0),
    ("SIGKILL", "support.run", "Run.log", 5, 2), ("SIGKILL", "support.run", "Run.log_evaluation", 3, 2),
    ("SIGKILL", "support.run", "save_file", 3, 2), ("SIGKILL", "support.run", "Run.save", 3, 4),
])
def test_a_run_that_is_stopped_or_killed_at_any_moment_resumes_to_the_same_numbers(runs, whole, name, module, function,
                                                                                   call, step):
    setup = SIGNAL.format(module=module, name=function, call=call, signal=name)
    stopped = runs.fork("parts", setup=setup, **SETTINGS)
    assert stopped.returncode == {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}[name], stopped.stderr
    assert "Traceback" not in stopped.stderr
    told = f"stopped: go on with --out_dir={runs.place}/parts --init_from=resume" in stopped.stdout
    assert told == ("stopping after this step" in stopped.stderr) == (name != "SIGKILL")
    assert step is None or runs.saved("parts")[1]["step"] == step
    runs.train("parts", init_from="resume", **SETTINGS)
    runs.assert_same(whole, "parts")


TWICE = """
import signal
from types import SimpleNamespace
import sample, support.run
clock, real = [100.0], sample.generate
support.run.time = SimpleNamespace(time=lambda: clock[0])
def generate(*arguments, **options):
    for _ in range(2 * (options["progress"] == "sampling")):
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += {seconds}
    return real(*arguments, **options)
sample.generate = generate
"""


@pytest.mark.parametrize("seconds, step", [(0.5, 1), (1.5, 0)])
def test_a_second_signal_ends_the_run_at_once_unless_it_is_an_echo_of_the_first(runs, seconds, step):
    """torchrun passes a signal on to processes that have had it from the terminal."""
    done = runs.fork("run", setup=TWICE.format(seconds=seconds))
    assert done.returncode == 130 and runs.saved("run")[1]["step"] == step, done.stderr
    assert ("stopped: go on with" in done.stdout) == (step == 1)


@pytest.mark.slow
def test_a_run_killed_many_times_at_random_equals_an_uninterrupted_one(runs):
    settings = dict(max_steps=120, save_interval=1, eval_interval=4, eval_size=3, num_passes=2, kl_coef=0.1)
    began, rng, reached = time.time(), random.Random(0), set()
    assert runs.fork("whole", **settings).returncode == 0
    of_a_step = (time.time() - began) / 120

    def last_step():
        path = runs.place / "parts" / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=-1)

    kills, code = 0, None
    while code != 0:  # until a run has ended before it could be killed
        resumes, before = (runs.place / "parts" / "settings.py").exists(), last_step()
        init_from = "resume" if resumes else "scratch"
        process, more = start_script("grpo.py", *runs.args("parts", init_from=init_from, **settings)), rng.randint(0, 3)
        deadline = time.time() + 60  # if it fails, the code below says so
        while more and last_step() < min(before + more, 120) and time.time() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, of_a_step if more else 1))
        os.kill(process.pid, signal.SIGKILL)
        code = process.wait().returncode
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        for path in (runs.place / "parts").glob("*.safetensors"):
            load_file(path)  # none of them is half written
        assert last_step() >= before - 1, "the log has lost lines of steps that the checkpoint holds"
        reached.add(last_step())
    assert kills >= 8
    assert len(reached) > 8
    runs.assert_same("whole", "parts")


# --------------------------------------------------------------------------- what a resume refuses, and what it says


def test_a_checkpoint_is_refused_where_its_numbers_would_mean_something_else(runs, tmp_path):
    runs.train("run", max_steps=1, eval_dataset="")
    other = make_checkpoint(tmp_path / "other", seed=1)
    for changes, what in [(dict(seed=7), "seed"), (dict(tie="structured"), "tie"), (dict(u=2), "u"),
                          (dict(method="lora_xs"), "method"), (dict(code=""), "code of the config"),
                          (dict(code=EVEN_LENGTH + "#"), "code of the config"), (dict(model=other), "base")]:
        message = f"cannot resume: .* was made with another {what}; repeat its settings with .*run/settings.py"
        with pytest.raises(UserError, match=message):
            runs.train("run", init_from="resume", eval_dataset="", **changes)
    known = [arg for arg in runs.args("run", code="") if arg[2:].partition("=")[0] in vars(sft.Settings)]
    with pytest.raises(UserError, match="was made with another .*script"):
        sft.train(configure(sft.Settings, grpo.reward, argv=[*known, "--init_from=resume"]))
    path = runs.place / "run" / "checkpoint.safetensors"
    for damaged in (path.read_bytes()[:-9], b"nonsense", b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"cannot resume from {path}: .*leave out init_from to start anew"):
            runs.train("run", init_from="resume", eval_dataset="")


def test_a_full_checkpoint_from_before_there_were_targets_is_of_all_weights(runs):
    settings = dict(method="full", lr=1e-4)
    runs.train("run", max_steps=1, **settings)
    tensors, info = runs.saved("run")
    del info["identity"]["targets"]
    path = runs.place / "run" / "checkpoint.safetensors"
    save_file(tensors, path, {key: json.dumps(value) for key, value in info.items()})
    with pytest.raises(UserError, match="was made with another targets"):
        runs.train("run", init_from="resume", targets="mlp", **settings)
    runs.train("run", init_from="resume", max_steps=2, **settings)
    assert len(runs.steps("run")) == 2


def test_a_run_goes_on_with_other_settings_and_names_them(runs, capsys):
    """Another dtype moves the base's fingerprint a little. With other held-out problems, what was measured is void."""
    runs.train("run", max_steps=1, dtype="bfloat16")
    before = runs.saved("run")[1]["identity"]["base"]
    runs.train("run", max_steps=2, init_from="resume", lr=0.01, batch_size=4, eval_size=3)
    assert "note: the run goes on with another lr, batch_size, dtype, eval_size\n" in capsys.readouterr().out
    info = runs.saved("run")[1]
    assert runs.steps("run")[1]["groups"] == 4 and info["settings"]["lr"] == 0.01
    assert before != info["identity"]["base"] and same_base(before, info["identity"]["base"])
    assert info["history"]["first"]["problems"] == info["history"]["last"]["problems"] == 3


def test_a_finished_run_has_nothing_left_to_do(runs, capsys):
    """It prints the same last line, also where max_steps is below the step that it has reached."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    runs.train("run", eval_interval=1)
    [line] = re.findall(r"^run: greedy reward .* numbers", capsys.readouterr().out, re.M)
    before = runs.log("run")
    for max_steps in (3, 2):
        runs.train("run", eval_interval=1, max_steps=max_steps, init_from="resume")
        assert line in capsys.readouterr().out and runs.log("run") == before
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


# ------------------------------------------------------------------------------------------ the directory of a run


def test_the_best_adapter_is_kept_beside_the_last(runs, monkeypatch):
    """Rewards of 0.5, 0.1, 0.7 and 0.6 after 0, 1, 2 and 3 steps; the first evaluation is to be beaten."""
    for name, steps in [("two", 2), ("one", 1), ("run", 3)]:
        rewards = iter([0.5, 0.1, 0.7, 0.6])
        monkeypatch.setattr(grpo, "evaluate", lambda *_, rewards=rewards: {"reward": next(rewards)})
        runs.train(name, max_steps=steps, eval_interval=1, save_interval=1)
    best = load_file(runs.place / "run" / "best.safetensors")["v"]
    assert torch.equal(best, runs.v("two")) and not torch.equal(best, runs.v("run"))
    assert not (runs.place / "one" / "best.safetensors").exists()


def test_a_second_run_moves_the_first_aside_and_two_at_a_time_are_refused(runs, capsys):
    for out_dir in ("run", "run/", "run"):
        runs.train(out_dir, max_steps=1, eval_dataset="")
    assert f"moved the earlier run in {runs.place}/run to {runs.place}/run.2" in capsys.readouterr().out
    assert all(runs.v(name).any() for name in ("run", "run.1", "run.2"))
    process, log = start_script("grpo.py", *runs.args("busy", max_steps=10**6)), runs.place / "busy" / "log.jsonl"
    while not log.exists() or '"step": 1' not in log.read_text():
        time.sleep(0.01)
    for init_from in ("scratch", "resume"):
        with pytest.raises(UserError, match="another run is writing to out_dir .*; wait for it, or choose another"):
            runs.train("busy", init_from=init_from)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL and not (runs.place / "busy.1").exists()
    runs.train("busy", max_steps=1, eval_dataset="")  # a killed run holds nothing


def test_only_what_a_killed_run_was_writing_is_removed(runs):
    kept = ["out[a]/notes.tmpl", "out[a]/other/.tmpx", "outa/.tmpx", "outa/a.tmp"]
    for name in kept + ["out[a]/.tmpx", "out[a]/model/.tmpx", "out[a]/best/config.json.tmp", "out[a]/settings.py.tmp"]:
        (runs.place / name).parent.mkdir(parents=True, exist_ok=True)
        (runs.place / name).write_text("")
    runs.train("out[a]", max_steps=1, eval_dataset="")
    assert sorted(str(path.relative_to(runs.place)) for path in runs.place.rglob("*.tmp*")) == kept


class Recorder:
    """It takes any call, notes it in `calls`, and returns itself."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments, **options: (self.calls.append((name, arguments, options)), self)[1]


def test_numbers_go_to_wandb_too(runs, monkeypatch):
    wandb, module = Recorder(), ModuleType("wandb")
    module.init = wandb.init
    monkeypatch.setitem(sys.modules, "wandb", module)
    runs.train("run", max_steps=2, wandb_log=True)
    (name, _, options), *logged = wandb.calls
    assert (name, options["name"], options["config"]["max_steps"]) == ("init", "run", 2)
    lines = [json.loads(line) for line in (runs.place / "run" / "log.jsonl").read_text().splitlines()]
    assert [options["step"] for _, _, options in logged] == [line.pop("step") for line in lines] == [0, 1, 2, 2]
    assert [record for _, (record,), _ in logged] == lines


def test_a_missing_package_is_named(runs):
    done = runs.fork("run", setup="sys.modules['wandb'] = None", wandb_log=True)
    assert_refused(done, "pip install wandb")


# ------------------------------------------------------------------------------------------------- several processes

TO_ONE = SIGNAL.format(module="support.run", name="Run.log", call="2 * int(os.environ['RANK'])", signal="SIGTERM")
STOP_ONE = f"import os, runpy, sys\n{TO_ONE}\nsys.argv[0] = 'grpo.py'\nrunpy.run_path('grpo.py', {{}}, '__main__')\n"


def test_two_processes_learn_what_one_does_and_stop_and_resume_together(runs):
    """The second one alone has a signal in the first step."""
    settings = dict(batch_size=5, kl_coef=0.5, num_passes=2, eval_interval=2)
    runs.train("one", **settings)
    (runs.place / "stop_one.py").write_text(STOP_ONE)
    stopped = fork_ranks(2, runs.place / "stop_one.py", *runs.args("two", **settings))
    assert [done.returncode for done in stopped] == [130, 143] and runs.saved("two")[1]["step"] == 1
    for done in fork_ranks(2, "grpo.py", *runs.args("two", init_from="resume", **settings)):
        assert done.returncode == 0, done.stderr
    (one, _), (two, _) = runs.saved("one"), runs.saved("two")
    assert all((two[name] - tensor).norm() <= 1e-3 * tensor.norm() for name, tensor in one.items())
    for line, other in zip(runs.log("one"), runs.log("two"), strict=True):
        for key in ("step", "length", "reward", "equal_groups", "groups", "truncated", "eval"):
            assert line.get(key) == other.get(key)
