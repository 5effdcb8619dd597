"""The house rules that a reader relies on: which file imports which, what is imported where, how long functions and
lines are, what is never done with the text of strangers, and that every setting is read and can be given."""

import ast
import importlib
import subprocess
import sys
from functools import cache
from typing import get_args

import pytest
from conftest import ROOT, refusal

from configurator import configure

FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
         for folder in (".", "support", "lab", "toy") for path in sorted((ROOT / folder).glob("*.py"))}
CODE = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
# Each script may import those before it, and support.
SCRIPTS = ["configurator", "model", "tinylora", "sample", "eval_math", "grpo", "sft", "export"]
SUPPORT = [name for name in CODE if name.partition(".")[0] == "support"]
WITH_SETTINGS = ["sample", "eval_math", "grpo", "sft", "export"]


def imports(node):
    """The modules that a tree or a part of it imports; of `from x import y` x, or x.y where that is a file of ours."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            found |= {alias.name for alias in part.names}
        elif isinstance(part, ast.ImportFrom):
            found |= {f"{part.module}.{alias.name}" for alias in part.names} & set(CODE) or {part.module}
    return found


@cache
def functions(name):
    kinds = ast.FunctionDef, ast.AsyncFunctionDef
    return [node for node in ast.walk(CODE[name]) if isinstance(node, kinds)]


# ------------------------------------------------------------------------------------------------------------- arrows


@pytest.mark.parametrize("name", CODE)
def test_every_import_points_down_or_to_the_left(name):
    allowed = set(SUPPORT) | set(SCRIPTS)
    if name in SUPPORT:
        allowed = set(SUPPORT)
    elif name in SCRIPTS:
        allowed -= set(SCRIPTS[SCRIPTS.index(name):])
    elif name.startswith("lab"):
        allowed = set(CODE)
    assert imports(CODE[name]) & set(CODE) <= allowed


def test_support_has_no_cycles():
    left = {name: imports(CODE[name]) & set(SUPPORT) for name in SUPPORT}
    while free := {name for name, needs in left.items() if not needs & set(left)}:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left


def test_the_top_level_holds_the_scripts_and_the_folders_and_nothing_else():
    if not (ROOT / ".git").exists():
        pytest.skip("git says which files belong to the project")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    files = {"README.md", "LICENSE", "requirements.txt", "requirements-dev.txt", "pyproject.toml", ".gitignore"}
    folders = {"support", "config", "toy", "lab", "tests", ".ci"}
    assert {path.partition("/")[0] for path in listed} == files | folders | {f"{script}.py" for script in SCRIPTS}


RARE = {  # packages, and the only places that may import them: {file: beginnings of functions' names}
    "matplotlib": {"lab.plot": ""}, "datasets": {"support.data": "load_hub", "lab.bench": ("bench_", "trl_")},
    "pyarrow": {"support.data": "read_rows"}, "huggingface_hub": {"support.checkpoint": "checkpoint_dir"},
    "wandb": {"support.run": "open_wandb"},
    "jinja2": {"support.tokenizer": None}, "tiktoken": {"support.tokenizer": None},
    **{oracle: {"lab.bench": ("bench_", "trl_")} for oracle in ("transformers", "math_verify", "peft", "trl")},
    **{never: {} for never in ("vllm", "accelerate", "pickle", "sympy", "pandas")},
}


@pytest.mark.parametrize("name", CODE)
def test_rare_packages_are_imported_only_where_they_are_needed(name):
    for package, places in RARE.items():
        def of_package(node, package=package):
            return {module for module in imports(node) if package in module.split(".")}

        found = of_package(CODE[name])
        beginning = places.get(name, "nowhere") or ""
        inside = [node for node in functions(name) if node.name.startswith(beginning)]
        allowed = found if places.get(name, "") is None else set().union(*map(of_package, inside))
        assert found <= allowed


@pytest.mark.parametrize("name", ["configurator", "support", "support.answers", "support.notation"])
def test_what_needs_the_standard_library_alone_imports_without_packages(name):
    code = ("import sys; sys.modules.update(dict.fromkeys(['torch', 'numpy', 'safetensors', 'sympy']))\n"
            f"import {name}\nassert not any('site-packages' in str(m) for m in sys.modules.values())")
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------------- length


@pytest.mark.parametrize("name", CODE)
def test_functions_have_at_most_60_lines(name):
    long = {node.name for node in functions(name) if node.end_lineno - node.lineno >= 60}
    assert long <= {"train"}  # the main loop reads from top to bottom


@pytest.mark.parametrize("name", SCRIPTS + SUPPORT)
def test_lines_have_at_most_100_columns_with_a_handful_of_exceptions(name):
    lines = FILES[name].read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if len(line) > 100]) <= 5


# --------------------------------------------------------------------------------------------------------- no surprise

FORBIDDEN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads",
             "marshal.loads", "yaml.load", "torch.jit.load", "torch.hub.load", "runpy.run_path", "runpy.run_module",
             "importlib.import_module", "np.load", "numpy.load", "tempfile.mktemp"}
ALLOWED = {"configurator": {"runpy.run_path"}}  # config files are Python, as README says
OPTIONS = {"shell": "False", "trust_remote_code": "False", "allow_pickle": "False", "weights_only": "True"}


@pytest.mark.parametrize("name", CODE)
def test_nothing_that_others_wrote_is_executed(name):
    for node in ast.walk(CODE[name]):
        if isinstance(node, ast.Call):
            line, function = f"{name}, line {node.lineno}", ast.unparse(node.func)
            options = {key.arg: ast.unparse(key.value) for key in node.keywords}
            assert function not in FORBIDDEN - ALLOWED.get(name, set()), line
            assert all(options.get(key, value) == value for key, value in OPTIONS.items()), line
            assert function != "torch.load" or "weights_only" in options, line
            assert "Environment" not in function or function == "ImmutableSandboxedEnvironment", line


# ----------------------------------------------------------------------------------------------------------- settings


def settings_of(name):
    """{name: (type, default)}"""
    Settings = importlib.import_module(name).Settings
    return {key: (kind, getattr(Settings, key)) for key, kind in Settings.__annotations__.items()}


def definitions(name):
    return {node.name: node for node in CODE[name].body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def settings_read(script):
    """What the script reads of cfg: cfg.name in it, or in a function that it names, or that such a function names, and
    so on; and the strings in those that call getattr. What is only checked (at_least) or saved does not count."""
    own = {key: node for key, node in definitions(script).items() if key != "Settings"}
    others = {key: node for name in SCRIPTS + SUPPORT for key, node in definitions(name).items() if key not in own}
    left, seen, read = list(own), set(), set()
    while left:
        key = left.pop()
        if key in seen or key == "at_least":
            continue
        seen.add(key)
        parts = list(ast.walk((own | others)[key]))
        of_cfg = [part.attr for part in parts if isinstance(part, ast.Attribute)
                  and ast.unparse(part.value).split(".")[-1] in ("cfg", "s")]
        names = {part.id for part in parts if isinstance(part, ast.Name)} | {
            part.attr for part in parts if isinstance(part, ast.Attribute)}
        texts = [part.value for part in parts if isinstance(part, ast.Constant)] if "getattr" in names else []
        read |= {*of_cfg, *texts}
        left += names & set(own | others)
    return read


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_every_setting_is_read_and_has_a_comment(name):
    assert set(settings_of(name)) - settings_read(name) == set()
    lines = FILES[name].read_text(encoding="utf-8").splitlines()
    for key in settings_of(name):
        [number] = [i for i, line in enumerate(lines) if line.startswith(f"    {key}: ") and " = " in line]
        assert "  # " in lines[number] or lines[number - 1].startswith("    # "), key


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_every_setting_can_be_given_and_keeps_its_type(name):
    Settings = importlib.import_module(name).Settings
    texts = {bool: ["True", "false"], int: ["7", "-3"], float: ["0.25", "3.0"], str: ["a=b c", ""]}
    for key, (kind, default) in settings_of(name).items():
        for text in get_args(kind) or texts[kind]:
            value = getattr(configure(Settings, argv=[f"--{key}={text}"]), key)
            assert type(value) is type(default) and str(value).lower() == text.lower()
        if get_args(kind):
            assert "must be one of" in refusal(configure, Settings, argv=[f"--{key}=other"])
