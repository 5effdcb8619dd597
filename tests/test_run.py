"""support/run.py: what a run leaves in its out_dir, how it stops, and that it resumes to the same numbers."""

import json
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
import tqdm
from conftest import assert_refused
from forks import fork_ranks, fork_script, start_script
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import grpo
import sft
from configurator import UserError, configure
from support.adapter_file import same_base

# Random weights can earn this, so that there is something to learn.
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
        config = self.place / "config.py"
        config.write_text(code)
        settings = self.settings | {"out_dir": self.place / name} | changes
        return [str(config), *(f"--{key}={value}" for key, value in settings.items())]

    def cfg(self, name, **changes):
        return configure(grpo.Settings, grpo.reward, grpo.problems, argv=self.args(name, **changes))

    def train(self, name, **changes):
        """In this process, with one thread as in the scripts that forks.py starts: more would round otherwise."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            grpo.train(self.cfg(name, **changes))
        finally:
            torch.set_num_threads(threads)

    def fork(self, name, setup="", **changes):
        return fork_script("grpo.py", *self.args(name, **changes), setup=setup)

    def log(self, name):
        """The lines of log.jsonl, without the times."""
        lines = (self.place / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]

    def steps(self, name):
        return [line for line in self.log(name) if "reward" in line]

    def v(self, name):
        return load_file(self.place / name / "adapter.safetensors")["v"]

    def saved(self, name):
        """The tensors and the information in the checkpoint, without the times and the length of the log."""
        with safe_open(self.place / name / "checkpoint.safetensors", "pt") as f:
            info = {key: json.loads(value) for key, value in f.metadata().items()}
            tensors = {key: f.get_tensor(key) for key in f.keys()}
        info["history"].pop("seconds"), info["history"].pop("log_bytes")
        return tensors, info

    def assert_same(self, first, second):
        assert self.log(first) == self.log(second)
        (tensors, info), (others, other_info) = self.saved(first), self.saved(second)
        assert info == other_info and tensors.keys() == others.keys()
        assert all(torch.equal(tensors[key], others[key]) for key in tensors)
        assert torch.equal(self.v(first), self.v(second)) and self.v(first).any()
        files, others = ({path.name for path in (self.place / name).iterdir()} for name in (first, second))
        assert files == others


@pytest.fixture
def runs(checkpoint, problems, tmp_path):
    return Runs(checkpoint, problems, tmp_path)


def wait_for(path, text):
    deadline = time.time() + 60
    while not (path.exists() and text in path.read_text()):
        assert time.time() < deadline
        time.sleep(0.002)


# ------------------------------------------------------------------------------------------------- stop and resume


@pytest.mark.parametrize("settings", [{}, dict(resample=2, batch_size=6), dict(method="lora", n_tie=0, u=13),
                                      dict(method="full", n_tie=0, u=13, rank=1, lr=1e-4)])
def test_a_resumed_run_equals_an_uninterrupted_one(runs, settings):
    settings = dict(eval_interval=2) | settings
    runs.train("whole", max_steps=4, **settings)
    runs.train("parts", max_steps=2, **settings)
    runs.train("parts", max_steps=4, init_from="resume", **settings)
    assert runs.log("whole") == runs.log("parts")
    (whole, _), (parts, _) = runs.saved("whole"), runs.saved("parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    assert ("resample" in settings) == any(line["groups"] > 6 for line in runs.steps("whole"))


STOP = """
import signal
import {module}
real, calls = {module}.{name}, []
def stopping(*arguments, **options):
    result = real(*arguments, **options)
    calls.append(1)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.{signal})
    return result
{module}.{name} = stopping
"""
SETTINGS = dict(max_steps=5, eval_interval=2, save_interval=2, num_passes=2, kl_coef=0.1)


@pytest.fixture(scope="module")
def whole(checkpoint, problems, tmp_path_factory):
    """The directory of a run with SETTINGS that nothing has interrupted."""
    place = tmp_path_factory.mktemp("runs")
    Runs(checkpoint, problems, place).train("whole", **SETTINGS)
    return place / "whole"


MOMENTS = {  # what sends a signal, in which of its calls: after which step the run stops
    "the first evaluation": ("support.run", "Run.log_evaluation", 1, 1),
    "sampling": ("sample", "Sampler.step", 12, 1),
    "an update": ("torch", "optim.Adam.step", 3, 2),
    "a later evaluation": ("support.run", "Run.log_evaluation", 2, 3),
    "a save": ("support.run", "save_file", 2, 3),
    "a rename": ("os", "replace", 4, 3),
    "the last step": ("torch", "optim.Adam.step", 10, 5),
}


@pytest.mark.parametrize("moment, name, code", [*((moment, "SIGINT", 130) for moment in MOMENTS),
                                                ("an update", "SIGTERM", 143)])
def test_a_signal_at_any_moment_stops_the_run_between_steps_and_loses_nothing(runs, whole, moment, name, code):
    module, function, call, step = MOMENTS[moment]
    setup = STOP.format(module=module, name=function, call=call, signal=name)
    stopped = runs.fork("parts", setup=setup, **SETTINGS)
    assert stopped.returncode == code and "Traceback" not in stopped.stderr, stopped.stderr
    assert f"stopped: go on with --out_dir={runs.place}/parts --init_from=resume" in stopped.stdout
    assert "stopping after this step" in stopped.stderr
    assert runs.saved("parts")[1]["step"] == step == len(runs.steps("parts"))
    runs.train("parts", init_from="resume", **SETTINGS)
    runs.assert_same(whole, "parts")


def test_ctrl_c_from_the_terminal(runs):
    process = start_script("grpo.py", *runs.args("run", max_steps=10**6, eval_interval=0))
    wait_for(runs.place / "run" / "log.jsonl", '"step": 2')
    os.kill(process.pid, signal.SIGINT)
    done = process.wait()
    saved = runs.saved("run")[1]["step"]
    assert done.returncode == 130 and saved >= 2 and "Traceback" not in done.stderr, done.stderr
    runs.train("run", max_steps=saved + 1, init_from="resume", eval_interval=0)
    assert [line["step"] for line in runs.steps("run")] == list(range(1, saved + 2))


TWICE = """
import signal, time
from types import SimpleNamespace
import sample, support.run
clock = [100.0]
support.run.time = SimpleNamespace(time=lambda: clock[0])
real = sample.generate
def generate(*arguments, **options):
    if arguments[4] == 8 and options["progress"] == "sampling":
        for _ in range(2):
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


def test_signals_mean_what_they_meant_before_once_a_run_has_ended(runs):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    runs.train("run", max_steps=1, eval_dataset="")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


KILL = """
import signal
import support.run
real = support.run.Run.{name}
def killing(run, step, *arguments):
    result = real(run, step, *arguments)
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
support.run.Run.{name} = killing
"""


@pytest.mark.parametrize("name, step", [("evaluation_due", 0), ("log", 1), ("log", 3), ("log_evaluation", 4),
                                        ("save", 4)])
def test_a_run_that_was_killed_resumes_to_the_same_numbers_and_the_same_log(runs, whole, name, step):
    """Before the first checkpoint, between two of them, and between evaluation, checkpoint and adapter."""
    killed = runs.fork("parts", setup=KILL.format(name=name, step=step), **SETTINGS)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    runs.train("parts", init_from="resume", **SETTINGS)
    runs.assert_same(whole, "parts")


def train_quietly(cfg_arguments):
    """A run as the target of a process of its own."""
    torch.set_num_threads(1)
    tqdm.tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves behind
    sys.stdout = open(os.devnull, "w")
    grpo.train(configure(grpo.Settings, grpo.reward, grpo.problems, argv=cfg_arguments))


@pytest.mark.slow
def test_a_run_killed_twenty_times_at_random_equals_an_uninterrupted_one(runs, monkeypatch):
    """A server that has imported everything forks the runs: their own work, and no import, is killed."""
    context, rng = multiprocessing.get_context("forkserver"), random.Random(0)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server's
    context.set_forkserver_preload(["test_run", "torch._dynamo"])  # the second: torch's optimisers import it late
    settings = dict(max_steps=60, save_interval=1, eval_interval=4, eval_size=3, num_passes=2, kl_coef=0.1)

    def started(name):
        resumes = (runs.place / name / "settings.py").exists()
        arguments = runs.args(name, init_from="resume" if resumes else "scratch", **settings)
        process = context.Process(target=train_quietly, args=(arguments,))
        process.start()
        return process

    def last_step(name):
        path = runs.place / name / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=-1)

    for name in ("first", "whole"):  # the first waits for the server's imports
        began = time.time()
        process = started(name)
        while last_step(name) < 0:
            time.sleep(0.001)
        ready = time.time() - began
        process.join()
        assert process.exitcode == 0
    of_a_step, reached = (time.time() - began - ready) / 60, []
    for _ in range(20):
        process, before, more = started("parts"), last_step("parts"), rng.choice([0, 0, 1, 2, 3])
        while more and last_step("parts") < before + more:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, of_a_step if more else ready))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        for path in (runs.place / "parts").glob("*.safetensors"):
            load_file(path)  # none of them is half written
        assert last_step("parts") >= before - 1, "the log has lost lines of steps that the checkpoint holds"
        reached.append(last_step("parts"))
    process = started("parts")
    process.join()
    assert process.exitcode == 0 and len(set(reached)) > 8
    runs.assert_same("whole", "parts")


def test_a_step_that_fails_in_a_later_pass_is_not_saved(runs, monkeypatch):
    """The first pass has moved v by then. The checkpoint must stay that of the step before."""
    real, calls = grpo.reduce_gradients, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise UserError("the gradient is not finite")
        return real(*arguments)

    monkeypatch.setattr(grpo, "reduce_gradients", failing)
    with pytest.raises(UserError, match="not finite"):
        runs.train("run", num_passes=2, save_interval=1)
    tensors, info = runs.saved("run")
    assert info["step"] == 1 and tensors["step/v"] == 2


# --------------------------------------------------------------------------------------- what a resume refuses


REFUSED_RESUMES = {  # what changes, and what the message says
    "projections": (dict(seed=7), "made with another seed"),
    "tying": (dict(tie="structured"), "made with another tie"),
    "number of numbers": (dict(u=2), "made with another u"),
    "method": (dict(method="lora_xs"), "made with another method"),
    "reward": (dict(code=""), "made with another code of the config"),
    "reward of another config": (dict(code=EVEN_LENGTH + "    # not\n"), "made with another code of the config"),
}


def test_a_checkpoint_is_refused_where_its_numbers_would_mean_something_else(runs, checkpoint, tmp_path):
    runs.train("run", max_steps=1, eval_dataset="")
    for changes, message in REFUSED_RESUMES.values():
        with pytest.raises(UserError, match=f"cannot resume: .*{message}; repeat its settings with .*run/settings.py"):
            runs.train("run", init_from="resume", eval_dataset="", **changes)
    weights = load_file(Path(checkpoint, "model.safetensors"))
    other = tmp_path / "other"
    other.mkdir()
    for path in Path(checkpoint).iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    save_file({name: t * -1.0 if "q_proj.weight" in name else t for name, t in weights.items()},
              other / "model.safetensors")
    with pytest.raises(UserError, match="made with another base;"):
        runs.train("run", init_from="resume", eval_dataset="", model=other)
    known = vars(sft.Settings)
    shared = [a for a in runs.args("run", init_from="resume", code="") if a[2:].partition("=")[0] in known]
    with pytest.raises(UserError, match="made with another .*script"):
        sft.train(configure(sft.Settings, grpo.reward, argv=shared))
    for damage in (b"", b"nonsense", (runs.place / "run" / "checkpoint.safetensors").read_bytes()[:-9]):
        (runs.place / "run" / "checkpoint.safetensors").write_bytes(damage)
        with pytest.raises(UserError, match="cannot resume from .*checkpoint.safetensors: .*leave out init_from"):
            runs.train("run", init_from="resume", eval_dataset="")


def test_a_setting_that_a_resume_changes_is_named(runs, capsys):
    runs.train("run", max_steps=1)
    runs.train("run", max_steps=2, init_from="resume", lr=0.01, batch_size=4)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == ["note: the run goes on with another lr, batch_size"]
    assert runs.steps("run")[1]["groups"] == 4


def test_a_run_goes_on_in_another_dtype(runs):
    """Rounding moves the base model's fingerprint a little."""
    runs.train("run", max_steps=1, eval_dataset="", dtype="bfloat16")
    before = runs.saved("run")[1]["identity"]["base"]
    runs.train("run", max_steps=2, eval_dataset="", init_from="resume")
    after = runs.saved("run")[1]
    assert after["step"] == 2 and after["identity"]["base"] != before and same_base(before, after["identity"]["base"])


def test_a_resume_with_other_held_out_problems_forgets_what_was_measured(runs, capsys):
    runs.train("run", max_steps=1)
    for changes in (dict(eval_size=3), dict(eval_size=3, max_steps=2)):
        runs.train("run", init_from="resume", **changes | {"max_steps": 2})
        history = runs.saved("run")[1]["history"]
        assert history["test set"][1] == 3 and history["evaluated"] == 2
        assert history["first"]["problems"] == history["last"]["problems"] == 3


def test_a_finished_run_has_nothing_left_to_do(runs, capsys):
    """It reports the same line again, also where max_steps is below the step that it has reached."""
    runs.train("run", eval_interval=1)
    [first] = re.findall(r"^run: greedy reward .* numbers", capsys.readouterr().out, re.M)
    before = runs.log("run")
    for max_steps in (3, 2):
        runs.train("run", eval_interval=1, max_steps=max_steps, init_from="resume")
        assert first in capsys.readouterr().out and runs.log("run") == before


def test_the_time_of_a_resumed_run_is_that_of_both_parts(runs):
    runs.train("run", max_steps=1, eval_dataset="")
    path = runs.place / "run" / "checkpoint.safetensors"

    def seconds():
        with safe_open(path, "pt") as f:
            info = f.metadata()
        return info, json.loads(info["history"])

    info, history = seconds()
    assert 0 < history["seconds"] < 600
    save_file(load_file(path), path, info | {"history": json.dumps(history | {"seconds": 5000.0})})
    runs.train("run", max_steps=2, eval_dataset="", init_from="resume")
    assert 5000 < seconds()[1]["seconds"] < 5600


# ------------------------------------------------------------------------------------------ the directory of a run


def test_the_best_adapter_is_kept_beside_the_last(runs, monkeypatch):
    """Rewards of 0.5, 0.1, 0.7 and 0.6 after 0, 1, 2 and 3 steps."""
    rewards = iter([0.5, 0.1, 0.7, 0.6])
    monkeypatch.setattr(grpo, "evaluate", lambda *_: {"reward": next(rewards)})
    runs.train("best", max_steps=2, save_interval=1)
    rewards = iter([0.5, 0.1, 0.7, 0.6])
    runs.train("run", eval_interval=1, save_interval=1)
    best = load_file(runs.place / "run" / "best.safetensors")["v"]
    assert torch.equal(best, runs.v("best")) and not torch.equal(best, runs.v("run"))
    assert not (runs.place / "best" / "best.safetensors").exists()  # it did not beat the first evaluation


def test_a_second_run_moves_the_first_aside_and_two_at_a_time_are_refused(runs, capsys):
    for out_dir in ("run", "run/", "run"):
        runs.train(out_dir, max_steps=1, eval_dataset="")
    assert f"moved the earlier run in {runs.place}/run to {runs.place}/run.2" in capsys.readouterr().out
    assert all((runs.place / name / "adapter.safetensors").exists() for name in ("run", "run.1", "run.2"))
    process = start_script("grpo.py", *runs.args("busy", max_steps=10**6))
    try:
        wait_for(runs.place / "busy" / "log.jsonl", '"step": 1')
        for init_from in ("scratch", "resume"):
            with pytest.raises(UserError, match="another run is writing to out_dir .*; wait for it, or choose"):
                runs.train("busy", init_from=init_from)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (runs.place / "busy.1").exists()
    runs.train("busy", max_steps=1, eval_dataset="")  # a killed run holds nothing


def test_only_what_a_killed_run_was_writing_is_removed(runs):
    out, kept = runs.place / "out[a]", ["out[a]/notes.tmpl", "out[a]/other/.tmpx", "outa/.tmpx", "outa/a.tmp"]
    for name in kept + ["out[a]/.tmpx", "out[a]/model/.tmpx", "out[a]/best/config.json.tmp", "out[a]/settings.py.tmp"]:
        (runs.place / name).parent.mkdir(parents=True, exist_ok=True)
        (runs.place / name).write_text("")
    runs.train(out.name, max_steps=1, eval_dataset="")
    assert sorted(str(path.relative_to(runs.place)) for path in runs.place.rglob("*.tmp*")) == kept


def test_settings_py_repeats_a_run(runs):
    runs.train("run", lr=0.03, prompt_template="It's {question}\\n")
    grpo.train(configure(grpo.Settings, grpo.reward, grpo.problems,
                         argv=[f"{runs.place}/run/settings.py", f"--out_dir={runs.place}/again"]))
    assert runs.log("run") == runs.log("again") and torch.equal(runs.v("run"), runs.v("again"))


# -------------------------------------------------------------------------------------------- wandb and tensorboard


class Recorder:
    """It takes any call, and notes it."""

    def __init__(self, calls):
        self.calls = calls

    def __getattr__(self, name):
        return lambda *arguments, **options: (self.calls.append((name, arguments, options)), self)[1]


def stand_in(monkeypatch, name, **members):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def test_numbers_go_to_wandb_and_tensorboard_too(runs, monkeypatch):
    calls, points = [], []
    stand_in(monkeypatch, "wandb", init=Recorder(calls).init)
    stand_in(monkeypatch, "torch.utils.tensorboard", SummaryWriter=Recorder(points).SummaryWriter)
    runs.train("run", max_steps=2, wandb_log=True, tensorboard=True)
    (name, _, options), *logged = calls
    assert (name, options["name"], options["config"]["max_steps"]) == ("init", "run", 2)
    lines = [json.loads(line) for line in (runs.place / "run" / "log.jsonl").read_text().splitlines()]
    assert [options["step"] for _, _, options in logged] == [line["step"] for line in lines] == [0, 1, 2, 2]
    (first,), (second,) = (arguments for _, arguments, _ in logged[:2])
    assert second["reward"] == lines[1]["reward"] and first["eval/reward"] == lines[0]["eval"]["reward"]
    assert points[0] == ("SummaryWriter", (str(runs.place / "run"),), {"purge_step": 1})
    assert ("add_scalar", ("seconds/update", lines[2]["seconds"]["update"], 2), {}) in points
    scalars = [call for call in points if call[0] == "add_scalar"]
    assert len(scalars) == sum(len(arguments[0]) for _, arguments, _ in logged) and points[-1][0] == "flush"


@pytest.mark.parametrize("setting, package", [("wandb_log", "wandb"), ("tensorboard", "tensorboard")])
def test_a_missing_package_is_named(runs, setting, package):
    done = runs.fork("run", setup=f"sys.modules['{package}'] = None", **{setting: True})
    assert_refused(done, f"pip install {package}")


# ------------------------------------------------------------------------------------------------- several processes


STOP_ONE = """
import os, runpy, signal, sys
import support.run
real = support.run.Run.log
def log(run, step, record):
    real(run, step, record)
    if step == 1 and "eval" not in record and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
support.run.Run.log = log
sys.argv[0] = "grpo.py"
runpy.run_path("grpo.py", run_name="__main__")
"""


def test_two_processes_learn_what_one_does_and_stop_and_resume_together(runs):
    settings = dict(batch_size=5, kl_coef=0.5, num_passes=2, eval_interval=2)
    runs.train("one", **settings)
    (runs.place / "stop_one.py").write_text(STOP_ONE)
    stopped = fork_ranks(2, runs.place / "stop_one.py", *runs.args("two", **settings))
    assert [done.returncode for done in stopped] == [130, 143], stopped
    assert runs.saved("two")[1]["step"] == 1
    for done in fork_ranks(2, "grpo.py", *runs.args("two", init_from="resume", **settings)):
        assert done.returncode == 0, done.stderr
    (one, _), (two, _) = runs.saved("one"), runs.saved("two")
    for name, tensor in one.items():
        assert (two[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    for line, other in zip(runs.log("one"), runs.log("two"), strict=True):
        exact = ("step", "length", "reward", "equal_groups", "groups", "truncated", "eval")
        assert {key: line.get(key) for key in exact} == {key: other.get(key) for key in exact}
