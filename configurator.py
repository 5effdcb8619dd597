"""Settings, the nanoGPT way: a block of globals on top of each script is the default, and any of them can be
overridden by a config file and by --key=value, from left to right:

    python grpo.py config/qwen7b_u13.py --lr=1e-4 --out_dir=out/seven

A config file is a Python file and is executed: run only those you have read. Nothing else is ever executed: values
on the command line are read as the type that the default has. An unknown name is an error, so that no setting is
dropped in silence, and every override is printed.
"""

import ast
import difflib
import errno
import os
import re
import runpy
import sys
from itertools import count
from types import ModuleType, SimpleNamespace

from support import UserError, whole_file

# The scripts import this file before any package, so that what stops a newcomer first is one line, too.
if sys.version_info < (3, 11):  # noqa: UP036 (that nobody reads requires-python is the point)
    print("error: Python 3.11 or newer is needed, this is " + sys.version.split()[0], file=sys.stderr)
    raise SystemExit(2)


def configure(script_globals, argv=None):
    """Read the settings block of a script, apply config files and --key=value, return a namespace of settings.

    script_globals: the script's globals(); its settings are the lower-case names that are assigned at top level
        above its first function and hold a bool, int, float or str.
    argv: the arguments (default: the command line's). `--help` prints the block with its comments and exits.
    Raises UserError for an unknown name (with the nearest known one), a wrong type, or a missing config file.
    """
    argv = sys.argv[1:] if argv is None else argv
    settings, block = _settings_block(script_globals)
    if "--help" in argv or "-h" in argv:
        print(f"{script_globals['__doc__'].strip()}\n\nSettings, with their defaults:\n\n{block}")
        raise SystemExit(0)
    for arg in argv:
        if arg.startswith("--"):
            name, equals, text = arg[2:].partition("=")  # the first '=' splits: values may contain '='
            default = _lookup(settings, name, "the command line")
            if not equals:
                raise UserError(f"--{name} needs a value: write --{name}=...")
            value = _parse(name, text, default)
            _override(settings, name, value, "command line")
        else:
            for name, value in _read_config(arg).items():
                place = _place(arg, name)
                default = _lookup(settings, name, place)
                _override(settings, name, _check(name, value, default, place), arg)
    return SimpleNamespace(**settings)


def save_settings(settings, path):
    """Write settings as a config file: `python grpo.py out/toy/settings.py` repeats the run."""
    with whole_file(path) as aside, open(aside, "w", encoding="utf-8") as f:
        f.writelines(f"{name} = {value!r}\n" for name, value in vars(settings).items())


def prepare_out_dir(settings, evidence):
    """Make settings.out_dir and save the settings there. A fresh run (init_from 'scratch') moves a directory that
    holds the file `evidence` of an earlier run aside: nothing is overwritten."""
    out_dir = settings.out_dir
    try:
        os.makedirs(out_dir, exist_ok=True)
        _lock(out_dir)
        if settings.init_from == "scratch" and os.path.exists(os.path.join(out_dir, evidence)):
            names = (f"{os.path.abspath(out_dir)}.{n}" for n in count(1))
            aside = next(name for name in names if not os.path.exists(name))
            os.rename(out_dir, aside)
            print(f"moved the earlier run in {out_dir} to {os.path.relpath(aside)}")
            os.makedirs(out_dir)
            _lock(out_dir)
        repeat = SimpleNamespace(**vars(settings) | {"init_from": "scratch"})
        save_settings(repeat, os.path.join(out_dir, "settings.py"))
    except OSError as error:
        raise UserError(f"out_dir '{out_dir}' cannot be written: {error}") from None


_locked = None  # file descriptor


def _lock(out_dir):
    """Keep other runs out of out_dir until this process ends, however it ends: the kernel drops the lock with it."""
    global _locked
    try:
        import fcntl  # not on Windows
    except ImportError:
        return
    if _locked is not None:
        os.close(_locked)
        _locked = None
    _locked = os.open(os.path.join(out_dir, ".lock"), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        fcntl.flock(_locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is writing to out_dir '{out_dir}'; wait for it, or choose another") from None
    except OSError:
        pass  # a file system without locks


def run(main):
    """Call main(), and turn what the user can mend into one line on stderr and exit code 2: a UserError, too little
    memory, a full disk, a missing package. Ctrl-C exits with 130; where nobody reads the output any more, with 141."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, "w"))
    # A log in a file or a pipe is as fresh as one on the screen, and any terminal can show any text.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    code, line = 2, ""
    try:
        return main()
    except KeyboardInterrupt:
        code, line = 130, "interrupted"
    except UserError as error:
        line = f"error: {error}"
    except ModuleNotFoundError as error:
        line = f"error: {error}: pip install -r requirements.txt, into the Python of {sys.prefix}"
    except BrokenPipeError:
        code = 141  # `| head` has what it wanted
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        line = f"error: {error}" + "; make room, then go on with --init_from=resume if this was a run" * full
    except Exception as error:
        if "RANK" in os.environ and re.search("(closed|reset) by peer", str(error)):
            raise SystemExit(2) from None  # torchrun's other processes have ended: theirs is the line to read
        # torch's and Python's, by name: nothing is imported here; torch's CPU allocator raises a bare RuntimeError
        named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
        if not named and "can't allocate memory" not in str(error):
            raise
        reason = (str(error).splitlines() or ["of the host"])[0]
        line = f"error: out of memory ({reason}); lower the number of rows or tokens at a time"
    if line:
        print(line, file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # what cannot be written would be tried again, and reported, on the way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(code)


def _stopped_early(kind, error, trace):
    """run() for what stops a script of ours before its main(): a missing package, an old torch, Ctrl-C."""
    def again():
        raise error

    if issubclass(kind, (UserError, KeyboardInterrupt, ModuleNotFoundError)):
        run(again)
    sys.__excepthook__(kind, error, trace)


if os.path.abspath(sys.argv[0]).startswith(os.path.dirname(os.path.abspath(__file__)) + os.sep):
    sys.excepthook = _stopped_early


def _settings_block(script_globals):
    """The settings of a script as a dict in source order, and the source text of their block."""
    with open(script_globals["__file__"], encoding="utf-8") as f:
        source = f.read()
    settings, first, last = {}, None, None
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            break
        name = node.targets[0].id if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) else ""
        value = script_globals.get(name)
        if name.islower() and not name.startswith("_") and isinstance(value, (bool, int, float, str)):
            settings[name] = value
            first, last = first or node.lineno, node.end_lineno
    lines = source.splitlines()
    while lines[first - 2].startswith("#"):  # the heading comment above the first setting
        first -= 1
    return settings, "\n".join(lines[first - 1 : last])


def _read_config(path):
    if not os.path.isfile(path):
        hint = f" Did you mean --{path.lstrip('-')}?" if "=" in path else ""
        raise UserError(f"no config file at '{path}'.{hint}")
    try:
        values = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        raise UserError(f"config file '{path}' failed: {type(error).__name__}: {error}") from None
    return {k: v for k, v in values.items() if not k.startswith("_") and not isinstance(v, ModuleType)}


def _place(path, name):
    """Where a config file sets a name."""
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        lines = [i for i, line in enumerate(f, 1) if re.match(rf"\s*{name}\b.*=", line)]
    return f"{path}, line {lines[-1]}" if lines else path


def _lookup(settings, name, where):
    if name in settings:
        return settings[name]
    near = difflib.get_close_matches(name, settings, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else "--help lists the settings."
    hint += " Delete the line if another version wrote it." if ", line " in where else ""
    raise UserError(f"unknown setting '{name}' in {where}; {hint}")


def _override(settings, name, value, where):
    if value != settings[name] and os.environ.get("RANK", "0") == "0":  # under torchrun one process speaks
        print(f"{name} = {value!r} (was {settings[name]!r}; {where})")
    settings[name] = value


def _parse(name, text, default):
    """Read text as the type of default."""
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return _check(name, kind(text), default, "the command line")
    except (ValueError, KeyError):
        wanted = {bool: "True or False", int: "an int", float: "a number"}[kind]
        raise UserError(f"--{name} wants {wanted}, got '{text}'") from None


def _check(name, value, default, where):
    """Value as the type of default (an int will do for a float), or UserError."""
    kind = type(default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"setting '{name}' in {where} wants {kind.__name__}, got {value!r}")
    if kind in (int, float) and not abs(value) < 1e18:  # nor is NaN; float32 and int64 hold it
        raise UserError(f"setting '{name}' in {where} wants a finite number below 1e18, got {value!r}")
    return value
