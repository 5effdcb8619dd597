"""Settings are the fields of a dataclass on top of each script. Config files and --key=value change
them, from left to right:

    python grpo.py config/qwen7b_u13.py --lr=1e-4 --out_dir=out/seven

A config file is Python and is executed: run only those you have read. It sets fields, and it may
define functions that the script lets it replace (in grpo.py: reward and problems). Helpers of its
own begin with an underscore. An unknown name is an error, so no setting is ignored silently.
"""

import difflib
import inspect
import math
import os
import runpy
import sys
from dataclasses import fields
from types import ModuleType
from typing import get_args, get_type_hints

from support import UserError, one_line_errors, whole_file

VALUES_BEGIN = "# ---- all settings of the run ----\n"  # in settings.py, below the code of configs
TRL_AND_VERL = {  # what people type who know these
    "learning_rate": "lr", "num_generations": "group_size", "rollout_n": "group_size",
    "max_completion_length": "max_new_tokens", "max_response_length": "max_new_tokens",
    "train_batch_size": "batch_size", "beta": "kl_coef", "num_iterations": "num_passes",
    "max_grad_norm": "grad_clip", "loss_type": "objective", "output_dir": "out_dir",
    "lora_rank": "rank", "lora_alpha": "alpha", "model_name_or_path": "model",
    "gradient_checkpointing": "recompute", "target_modules": "targets"}
GONE = {  # settings of earlier versions
    "packing": "rows are always packed", "shuffle_buffer": "rows are taken by index",
    "tensorboard": "use wandb_log", "top_p": "training samples from all tokens",
    "top_k": "training samples from all tokens"}


def configure(Settings, *functions, argv=None):
    """Return an instance of Settings with the changes that the arguments make. The functions become
    attributes: cfg.reward is the `reward` of a config file that defines one, or the script's."""
    if argv is None:
        argv = sys.argv[1:]
        one_line_errors()
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    if "--help" in argv or "-h" in argv:
        show_help(Settings, functions)
        raise SystemExit
    script = sys.modules[Settings.__module__]
    name = os.path.splitext(os.path.basename(script.__file__))[0]
    sys.modules.setdefault(name, script)  # so that `from grpo import reward` is not a second grpo
    cfg = Settings()
    cfg.code = ""  # the source of config files that define functions
    for function in functions:
        setattr(cfg, function.__name__, function)
    for arg in argv:
        if not arg.startswith("--"):
            read_config(arg, cfg)
            continue
        name, equals, text = arg[2:].partition("=")  # only the first '=' separates
        check_name(cfg, name, "the command line")
        if not equals:
            raise UserError(f"--{name} needs a value: write --{name}=...")
        override(cfg, name, from_text(text, getattr(cfg, name)), "command line")
    return cfg


def save_settings(cfg, path):
    """Write a config file that repeats the run: `python grpo.py out/toy/settings.py`."""
    values = {field.name: getattr(cfg, field.name) for field in fields(cfg)}
    values.pop("init_from", None)  # repeating a run means starting from scratch
    with whole_file(path) as aside, open(aside, "w", encoding="utf-8") as f:
        f.write(cfg.code + VALUES_BEGIN)
        f.writelines(f"{name} = {value!r}\n" for name, value in values.items())


def at_least(cfg, bound, *names):
    """Refuse settings below the bound."""
    for name in names:
        if getattr(cfg, name) < bound:
            raise UserError(f"{name} must be at least {bound}, got {getattr(cfg, name)}")


def show_help(Settings, functions):
    print(sys.modules[Settings.__module__].__doc__)
    for part in reversed(Settings.__mro__[:-1]):  # lab/es.py adds to the settings of grpo.py
        print(inspect.getsource(part))
    for function in functions:
        print(f"A config file may define {function.__name__}{inspect.signature(function)}:")
        print(f"    {inspect.getdoc(function)}\n")


def read_config(path, cfg):
    """Apply what a config file sets. The functions that it defines are kept as source, too."""
    if not os.path.isfile(path):
        hint = f"; did you mean --{path.lstrip('-')}?" if "=" in path else ""
        raise UserError(f"no config file at '{path}'{hint}")
    try:
        defined = runpy.run_path(path, run_name=path)  # run_name: the __module__ of its functions
    except (Exception, SystemExit) as error:
        raise UserError(f"config file '{path}' failed: {type(error).__name__}: {error}") from None
    defines_function = False
    for name, value in defined.items():
        is_imported = isinstance(value, ModuleType) or getattr(value, "__module__", path) != path
        if name.startswith("_") or is_imported and not hasattr(cfg, name):
            continue
        check_name(cfg, name, path)
        override(cfg, name, value, path)
        defines_function |= callable(value)
    if defines_function:
        with open(path, encoding="utf-8-sig") as f:
            code = f.read().partition(VALUES_BEGIN)[0]  # the file may be an earlier settings.py
        cfg.code += code.rstrip() + "\n"


def check_name(cfg, name, where):
    known = [known for known in vars(cfg) if known != "code"]
    if name in known:
        return
    if name in GONE:
        raise UserError(f"'{name}' in {where} is no setting any more: {GONE[name]}; delete it")
    theirs = TRL_AND_VERL.get(name)
    near = [theirs] if theirs in known else difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else "--help lists the settings"
    raise UserError(f"unknown setting '{name}' in {where}; {hint}")


def from_text(text, default):
    """Text as the type of default. What cannot be converted stays text, which override refuses."""
    if isinstance(default, bool):
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    try:
        return type(default)(text)
    except (ValueError, TypeError):
        return text


def override(cfg, name, value, where):
    """Set a field or a function, and print the change. An int will do for a float."""
    before = getattr(cfg, name)
    if isinstance(before, float) and type(value) is int:
        value = float(value)
    kind = "function" if callable(before) else type(before).__name__
    fits = callable(value) if callable(before) else type(value) is type(before)
    if kind == "float":
        kind, fits = "finite float", fits and math.isfinite(value)
    if not fits:
        raise UserError(f"{name} in {where} wants a value of type {kind}, got {value!r}")
    choices = get_args(get_type_hints(type(cfg)).get(name))  # those of a Literal
    if choices and value not in choices:
        raise UserError(f"{name} in {where} must be one of {', '.join(choices)}, got '{value}'")
    if value != before and os.environ.get("RANK", "0") == "0":  # under torchrun one process prints
        change = "a function" if callable(value) else f"{value!r} (was {before!r}; {where})"
        print(f"{name} = {change}")
    setattr(cfg, name, value)
