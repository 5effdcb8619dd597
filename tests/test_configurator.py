"""configurator.py: every setting is known, typed, printed and saved; nothing is dropped in silence."""

from types import SimpleNamespace

import pytest
from conftest import assert_refused
from forks import fork_script

import configurator
from configurator import UserError, configure

SCRIPT = '''"""A script.

    python script.py
"""
import os

# what it does
name = "toy"  # a name
steps = 10  # how many
rate = 0.5  # how fast
loud = False  # whether it shouts
CONSTANT = 3

def main():
    inner = 1
'''


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    namespace = {"__file__": str(path)}
    exec(compile(SCRIPT, str(path), "exec"), namespace)
    return namespace


def config_file(tmp_path, text):
    path = tmp_path / "config.py"
    path.write_text(text)
    return str(path)


def test_defaults_are_the_block(script):
    assert vars(configure(script, [])) == dict(name="toy", steps=10, rate=0.5, loud=False)


def test_overrides_apply_from_left_to_right_and_are_printed(script, tmp_path, capsys):
    file = config_file(tmp_path, "steps = 5\nrate = 2\n_private = 1\n")
    cfg = configure(script, ["--steps=7", file, "--loud=true", "--name=a=b --c"])
    assert vars(cfg) == dict(name="a=b --c", steps=5, rate=2.0, loud=True) and type(cfg.rate) is float
    out = capsys.readouterr().out
    assert f"steps = 5 (was 7; {file})" in out and "name = 'a=b --c' (was 'toy'; command line)" in out


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--stepps=3", "unknown setting 'stepps' in the command line; did you mean 'steps'?"),
        ("--CONSTANT=3", "unknown setting 'CONSTANT'"),
        ("--inner=3", "unknown setting 'inner'"),
        ("--zzz=3", "--help lists the settings"),
        ("--steps", "write --steps=..."),
        ("--steps=1.5", "--steps wants an int, got '1.5'"),
        ("--steps=", "--steps wants an int, got ''"),
        ("--rate=fast", "--rate wants a number, got 'fast'"),
        ("--rate=nan", "finite"),
        ("--loud=maybe", "--loud wants True or False, got 'maybe'"),
        ("config/nowhere.py", "no config file at 'config/nowhere.py'"),
        ("steps=3", "Did you mean --steps=3?"),
        ("-steps=3", "Did you mean --steps=3?"),
        ("--rate=1e300", "below 1e18"),
        ("--steps=99999999999999999999", "below 1e18"),
    ],
)
def test_a_wrong_argument_is_refused_with_the_cure(script, argument, words):
    with pytest.raises(UserError) as error:
        configure(script, [argument])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("stepz = 3", "did you mean 'steps'?"),
        ("steps = '3'", "wants int, got '3'"),
        ("steps = True", "wants int, got True"),
        ("1 / 0", "failed: ZeroDivisionError"),
        ("steps = (", "failed: SyntaxError"),
    ],
)
def test_a_wrong_config_file_is_refused(script, tmp_path, text, words):
    with pytest.raises(UserError, match="config.py") as error:
        configure(script, [config_file(tmp_path, text)])
    assert words in str(error.value)


def test_a_config_file_may_import_and_is_named_by_its_last_line(script, tmp_path):
    assert configure(script, [config_file(tmp_path, "import math\nrate = math.pi\n")]).rate > 3
    with pytest.raises(UserError, match=r"config\.py, line 3 wants int"):
        configure(script, [config_file(tmp_path, "steps = 3\n\nsteps = '3'\n")])


def test_what_is_not_changed_is_not_printed_and_one_rank_speaks(script, monkeypatch, capsys):
    assert configure(script, ["--steps=10", "--rate=0.5"]).steps == 10 and capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "1")
    assert configure(script, ["--steps=11"]).steps == 11 and capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert configure(script, ["--steps=11"]) and capsys.readouterr().out == "steps = 11 (was 10; command line)\n"


def test_saved_settings_are_a_config_file(script, tmp_path):
    cfg = configure(script, ["--name=it's\\n", "--rate=1e-7"])
    configurator.save_settings(cfg, tmp_path / "saved.py")
    assert configure(script, [str(tmp_path / "saved.py")]) == cfg


def test_an_earlier_run_is_moved_aside_and_every_place_is_locked(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.chdir(tmp_path)
    settings = SimpleNamespace(out_dir="run/", init_from="scratch", seed=3)
    for number in range(3):
        configurator.prepare_out_dir(settings, "log.jsonl")
        assert not (tmp_path / "run" / "log.jsonl").exists()
        (tmp_path / "run" / "log.jsonl").write_text(str(number))
        with open(tmp_path / "run" / ".lock", "w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert [(tmp_path / name / "log.jsonl").read_text() for name in ("run.1", "run.2", "run")] == ["0", "1", "2"]
    assert "moved the earlier run in run/ to run.2" in capsys.readouterr().out
    settings.init_from = "resume"
    configurator.prepare_out_dir(settings, "log.jsonl")
    assert (tmp_path / "run" / "log.jsonl").exists()  # it goes on here
    assert (tmp_path / "run" / "settings.py").read_text() == "out_dir = 'run/'\ninit_from = 'scratch'\nseed = 3\n"


def test_text_on_the_command_line_is_never_executed(script):
    assert configure(script, ["--name=__import__('os').getcwd()"]).name == "__import__('os').getcwd()"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_too_little_memory_ends_in_one_line(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        configurator.run(main)
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: out of memory (")


@pytest.mark.parametrize("name", ["grpo.py", "sft.py", "sample.py", "eval_math.py"])
def test_help_prints_the_block_with_its_comments(name):
    done = fork_script(name, "--help")
    assert done.returncode == 0 and "seed = " in done.stdout and '# checkpoint directory or hub name' in done.stdout
    assert_refused(fork_script(name, "--sead=3"), "did you mean 'seed'?")
