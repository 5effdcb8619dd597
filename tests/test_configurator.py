"""configurator.py: every setting is known, typed, printed and saved, and nothing is dropped in silence; how a script
ends that meets a mistake of the user's (support/__init__.py)."""

from dataclasses import asdict, dataclass
from typing import Literal

import pytest
from conftest import ROOT, refusal, run_script
from forks import fork_script

import configurator
import grpo
import sft
from configurator import VALUES_BEGIN, configure, save_settings


@dataclass
class Settings:
    name: str = "toy"  # a name
    steps: int = 10  # how many
    rate: float = 0.5  # how fast
    loud: bool = False  # whether it shouts
    taste: Literal["sweet", "sour"] = "sweet"  # one of two
    lr: float = 0.1  # a name that TRL and VERL spell out
    init_from: Literal["scratch", "resume"] = "scratch"  # where to begin


def reward(problem, completion):
    """What a completion earns."""
    return 1.0


def config_file(path, text, encoding="utf-8", newline=None):
    path.write_text(text, encoding=encoding, newline=newline)
    return str(path)


def test_without_arguments_the_defaults_hold(capsys):
    cfg = configure(Settings, reward, argv=[])
    assert asdict(cfg) == asdict(Settings()) and cfg.reward is reward and capsys.readouterr().out == ""


def test_overrides_apply_from_left_to_right_and_are_printed(tmp_path, capsys):
    file = config_file(tmp_path / "c.py", "import math\nsteps = 5\nrate = 2\nlr = math.pi\n_private = 1\n")
    cfg = configure(Settings, argv=["--steps=7", file, "--loud=true", "--name=a=b --c", "--taste=sour"])
    assert (cfg.name, cfg.steps, cfg.rate, cfg.loud, cfg.taste) == ("a=b --c", 5, 2.0, True, "sour")
    assert type(cfg.rate) is float and 3.1 < cfg.lr < 3.2
    out = capsys.readouterr().out
    assert f"steps = 5 (was 7; {file})\n" in out and "name = 'a=b --c' (was 'toy'; command line)\n" in out


def test_what_is_not_changed_is_not_printed_and_one_process_speaks(monkeypatch, capsys):
    for rank, argument, printed in (("0", "--steps=10", ""), ("1", "--steps=11", ""),
                                    ("0", "--steps=11", "steps = 11 (was 10; command line)\n")):
        monkeypatch.setenv("RANK", rank)
        configure(Settings, argv=[argument])
        assert capsys.readouterr().out == printed


@pytest.mark.parametrize("argument, words", [
    ("--stepps=3", "unknown setting 'stepps' in the command line; did you mean 'steps'?"),
    ("--zzz=3", "unknown setting 'zzz' in the command line; --help lists the settings"),
    ("--code=3", "unknown setting 'code'"),
    ("--learning_rate=1", "did you mean 'lr'?"),
    ("--top_p=1.0", "'top_p' in the command line is no setting any more: training samples from all tokens; delete"),
    ("--packing=True", "'packing' in the command line is no setting any more: rows are always packed; delete"),
    ("--steps", "--steps needs a value: write --steps=..."),
    ("--steps=1.5", "steps in command line wants a value of type int, got '1.5'"),
    ("--steps=", "wants a value of type int, got ''"),
    ("--rate=fast", "wants a value of type finite float, got 'fast'"),
    ("--rate=nan", "rate in command line wants a value of type finite float, got nan"),
    ("--loud=maybe", "wants a value of type bool, got 'maybe'"),
    ("--taste=bitter", "taste in command line must be one of sweet, sour, got 'bitter'"),
    ("--reward=3", "reward in command line wants a value of type function"),
    ("config/nowhere.py", "no config file at 'config/nowhere.py'"),
    ("steps=3", "no config file at 'steps=3'; did you mean --steps=3?"),
    ("-steps=3", "did you mean --steps=3?"),
])
def test_a_wrong_argument_is_refused_with_the_cure(argument, words):
    assert words in refusal(configure, Settings, reward, argv=[argument])


@pytest.mark.parametrize("text, words", [
    ("stepz = 3", "unknown setting 'stepz' in {}; did you mean 'steps'?"),
    ("top_k = 0", "'top_k' in {} is no setting any more: training samples from all tokens; delete it"),
    ("steps = '3'", "steps in {} wants a value of type int, got '3'"),
    ("steps = True", "wants a value of type int, got True"),
    ("rate = float('inf')", "wants a value of type finite float, got inf"),
    ("taste = 'bitter'", "taste in {} must be one of sweet, sour, got 'bitter'"),
    ("reward = 1.0", "reward in {} wants a value of type function, got 1.0"),
    ("def steps(): pass", "steps in {} wants a value of type int, got <function steps"),
    ("def helper(): pass", "unknown setting 'helper' in {}"),
    ("1 / 0", "config file '{}' failed: ZeroDivisionError"),
    ("steps = (", "config file '{}' failed: SyntaxError"),
    ("raise SystemExit", "config file '{}' failed: SystemExit"),
])
def test_a_wrong_config_file_is_refused(tmp_path, text, words):
    file = config_file(tmp_path / "c.py", text)
    assert words.format(file) in refusal(configure, Settings, reward, argv=[file])


def test_names_of_trl_and_verl_lead_to_ours():
    for theirs, ours in configurator.TRL_AND_VERL.items():
        scripts = [script for script in (grpo, sft) if hasattr(script.Settings, ours)]
        assert scripts, f"no script has a setting {ours}"
        for script in scripts:
            assert f"did you mean '{ours}'?" in refusal(configure, script.Settings, argv=[f"--{theirs}=1"])


def test_text_on_the_command_line_is_never_executed():
    assert configure(Settings, argv=["--name=__import__('os').getcwd()"]).name == "__import__('os').getcwd()"


CODE = """import math
from statistics import fmean

_HALF = 0.5


def reward(problem, completion):
    return fmean([0, problem]) + math.floor(_HALF)
"""


def test_a_config_file_may_define_functions_which_are_saved_as_source(tmp_path, capsys):
    first = config_file(tmp_path / "c.py", f"steps = 3\n{CODE}".rstrip(), "utf-8-sig", "\r\n")  # as on Windows
    cfg = configure(Settings, reward, argv=[first, "--lr=7", "--init_from=resume"])
    assert cfg.reward(3, None) == 1.5 and cfg.steps == 3
    assert "reward = a function\n" in capsys.readouterr().out
    texts = []
    for file in ("one.py", "two.py"):  # what is saved is a config file, and does not grow when it is used
        save_settings(cfg, tmp_path / file)
        cfg = configure(Settings, reward, argv=[str(tmp_path / file)])
        assert cfg.reward(3, None) == 1.5 and (cfg.steps, cfg.lr, cfg.init_from) == (3, 7.0, "scratch")
        texts.append((tmp_path / file).read_text())
    assert texts[0] == texts[1] and texts[0].startswith(f"steps = 3\n{CODE}{VALUES_BEGIN}")


def test_settings_without_functions_are_saved_without_source(tmp_path):
    first = config_file(tmp_path / "c.py", "steps = 3")
    cfg = configure(Settings, reward, argv=["--name=it's\\n", "--rate=1e-7", first])
    save_settings(cfg, tmp_path / "saved.py")
    assert vars(configure(Settings, reward, argv=[str(tmp_path / "saved.py")])) == vars(cfg) and cfg.code == ""


@pytest.mark.parametrize("name", ["grpo.py", "sft.py", "sample.py", "eval_math.py", "export.py"])
def test_help_prints_the_settings_with_their_comments_and_the_functions(name):
    done = fork_script(name, "--help")
    assert done.returncode == 0 and '    model: str = "toy/base"  # checkpoint directory or hub name' in done.stdout
    functions = {"grpo.py": ["reward(problem, completion)", "problems(cfg, split)"], "sft.py": ["reward(problem, "]}
    assert all(f"A config file may define {function}" in done.stdout for function in functions.get(name, []))


SCRIPT = r"""
import os, signal
from dataclasses import dataclass
from configurator import configure
from support import UserError

class OutOfMemoryError(RuntimeError):  # torch's is known by its name
    pass

@dataclass
class Settings:
    seed: int = 0

configure(Settings)
print("\u03c0 \ud800")
"""
MEMORY = "use fewer rows or tokens at a time\n"


@pytest.mark.parametrize("line, code, printed", [
    ("pass", 0, ""),
    ("raise UserError('no such thing; take another')", 2, "error: no such thing; take another\n"),
    ("os.kill(os.getpid(), signal.SIGINT)", 130, "interrupted\n"),
    ("raise OutOfMemoryError('of CUDA\\nmore')", 2, f"error: out of memory (of CUDA); {MEMORY}"),
    ("raise RuntimeError('can\\'t allocate memory')", 2, f"error: out of memory (can't allocate memory); {MEMORY}"),
    ("1 / 0", 1, "Traceback (most recent call last):"),
])
def test_how_a_script_ends(tmp_path, line, code, printed):
    (tmp_path / "script.py").write_text(SCRIPT + line)
    done = run_script(tmp_path / "script.py", PYTHONPATH=ROOT, PYTHONIOENCODING="ascii")
    assert done.returncode == code and (done.stderr == printed or code == 1 and done.stderr.startswith(printed))
    assert done.stdout == "\\u03c0 \\ud800\n"  # any terminal can show any text
