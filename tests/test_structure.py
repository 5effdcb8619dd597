"""The house rules that a reader relies on: which file imports which, what is imported where, how long a function is,
what is never done with the text of strangers, and that every setting is read and can be given."""

import ast
import importlib
import os
import subprocess
import sys
from collections import defaultdict
from functools import cache

import pytest
from conftest import ROOT

from configurator import configure

CODE = {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
        for folder in (".", "lab", "toy") for path in (ROOT / folder).glob("*.py")}
ORDER = ["configurator", "model", "tinylora", "sample", "eval_math", "grpo", "sft"]  # each may import those before it
SCRIPTS = ["tinylora", "sample", "eval_math", "grpo", "sft", "lab.bench"]


def imports(node):
    """{(module, line)} of a tree or a part of it; of `from x import y` x, or x.y where that is a module of ours."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            found |= {(alias.name, part.lineno) for alias in part.names}
        elif isinstance(part, ast.ImportFrom):
            names = {f"{part.module}.{alias.name}" for alias in part.names} & set(CODE)
            found |= {(name, part.lineno) for name in names or {part.module}}
    return found


@cache
def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


# ------------------------------------------------------------------------------------------------------------- arrows


@pytest.mark.parametrize("name", CODE)
def test_no_module_imports_one_above_it(name):
    allowed = set(ORDER[: ORDER.index(name)]) if name in ORDER else set(ORDER)
    if name == "eval_math":
        assert not allowed & {module for module, _ in imports_at_top(name)} - {"configurator"}  # the rest, when it asks
    if name.startswith("lab."):
        allowed |= {other for other in CODE if other.startswith("lab.")}
    ours = {(module, line) for module, line in imports(CODE[name]) if module in CODE}
    assert {(module, line) for module, line in ours if module not in allowed} == set()


def imports_at_top(name):
    return {pair for node in CODE[name].body for pair in imports(node) if not isinstance(node, ast.FunctionDef)}


def test_the_scripts_are_all_there_is():
    assert {name for name in CODE if "." not in name} == set(ORDER)


def test_the_checker_imports_without_torch():
    code = ("import sys; sys.modules.update(torch=None, numpy=None, sympy=None)\n"
            "from eval_math import extract_answer, is_correct\n"
            "assert extract_answer('#### 4') == '4' and is_correct(r'\\boxed{1/2}', '0.5')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


COMPARED = {"lab.bench": ("bench_", "trl_")}  # functions of these names
RARE = {  # top-level packages, and where alone they may be imported: {file: beginnings of functions' names}
    "matplotlib": {"lab.plot": ("pyplot",)}, "datasets": {"eval_math": ("load_hub",)} | COMPARED,
    "huggingface_hub": {"model": ("checkpoint_dir",)}, "transformers": COMPARED, "math_verify": COMPARED,
    "peft": COMPARED, "trl": COMPARED, "vllm": {}, "accelerate": {}, "pickle": {}, "sympy": {},
}


@pytest.mark.parametrize("name", CODE)
def test_rare_packages_are_imported_where_they_are_needed_alone(name):
    inside = {pair for f in functions(CODE[name]) for package, places in RARE.items()
              if f.name.startswith(places.get(name, "-")) for pair in imports(f) if pair[0].split(".")[0] == package}
    assert {pair for pair in imports(CODE[name]) - inside if pair[0].split(".")[0] in RARE} == set()


def test_the_configurator_needs_the_standard_library_alone():
    assert {module.split(".")[0] for module, _ in imports(CODE["configurator"])} <= sys.stdlib_module_names


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_import_the_configurator_before_any_package(name):
    """It says in one line which package is missing."""
    order = sorted(imports_at_top(name), key=lambda pair: pair[1])
    modules = [module.split(".")[0] for module, _ in order]
    assert set(modules[: modules.index("configurator")]) <= sys.stdlib_module_names


# ------------------------------------------------------------------------------------------------------------- length


@pytest.mark.parametrize("name", CODE)
def test_no_function_is_longer_than_sixty_lines(name):
    long = {f.name for f in functions(CODE[name]) if f.end_lineno - f.lineno + 1 > 60}
    assert long <= {"training_loop"}  # the main loop reads from top to bottom


# --------------------------------------------------------------------------------------------------------- no surprise


def called(node):
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


FORBIDDEN = {"eval", "exec", "compile", "__import__", "input().eval", "os.system", "os.popen", "pickle.load",
             "pickle.loads", "marshal.loads", "yaml.load", "torch.jit.load", "runpy.run_path", "runpy.run_module",
             "importlib.import_module", "np.load", "numpy.load", "tempfile.mktemp", "torch.hub.load"}
ALLOWED = {"configurator": {"runpy.run_path"}}  # config files are Python, as README says


@pytest.mark.parametrize("name", CODE)
def test_nothing_that_others_wrote_is_executed(name):
    for node in ast.walk(CODE[name]):
        line = f"{name}, line {getattr(node, 'lineno', 0)}"
        assert called(node) not in FORBIDDEN - ALLOWED.get(name, set()), line
        if isinstance(node, ast.Call):
            options = {key.arg: ast.unparse(key.value) for key in node.keywords}
            assert options.get("shell", "False") == "False", line
            assert options.get("trust_remote_code", "False") == "False", line
            assert called(node) != "torch.load" or options.get("weights_only") == "True", line


def test_templates_are_rendered_in_the_sandbox_alone():
    names = {ast.unparse(node) for tree in CODE.values() for node in ast.walk(tree) if isinstance(node, ast.Call)
             for node in [node.func] if "Environment" in ast.unparse(node) or "Template" in ast.unparse(node)}
    assert names == {"ImmutableSandboxedEnvironment"}


# ----------------------------------------------------------------------------------------------------------- settings


def settings_of(name):
    module = importlib.import_module(name)
    return vars(configure(vars(module), []))


@cache
def uses(node):
    """(names that occur in it, settings it reads)."""
    parts = list(ast.walk(node))
    named = {part.id for part in parts if isinstance(part, ast.Name)}
    attributes = [part for part in parts if isinstance(part, ast.Attribute)]
    read = {part.attr for part in attributes if ast.unparse(part.value) in ("cfg", "settings", "SETTINGS")}
    return named | {part.attr for part in attributes}, read


def reachable_settings(name):
    """Settings that main() of a script reads, or a function it names, or one that these name, and so on. A setting in a
    branch that is never taken would count; one that is only checked, saved or printed as part of all does not."""
    def definitions(tree):
        tables = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
        found = defaultdict(list)
        for key, node in [(f.name, f) for f in functions(tree)] + [(node.targets[0].id, node.value) for node in tables]:
            found[key].append(node)
        return found

    graph = defaultdict(list)
    for tree in CODE.values():
        for key, nodes in definitions(tree).items():
            graph[key] += nodes
    graph |= definitions(CODE[name])  # its own main, train, check_settings, not another script's
    seen, todo, read = set(), {"main"}, set()
    while todo:
        seen |= todo
        found = [uses(node) for key in todo for node in graph[key]]
        read |= {setting for _, settings in found for setting in settings}
        todo = {key for keys, _ in found for key in keys if key in graph} - seen
    return read


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_setting_is_read(name):
    assert set(settings_of(name)) - reachable_settings(name) == set()


VALUES = {bool: ["True", "false"], int: ["7", "-3"], float: ["0.25", "3"], str: ["a=b c", ""]}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_setting_can_be_given_with_its_type(name, capsys):
    module = importlib.import_module(name)
    defaults = settings_of(name)
    for turn in (0, 1):
        texts = {key: VALUES[type(default)][turn] for key, default in defaults.items()}
        cfg = configure(vars(module), [f"--{key}={text}" for key, text in texts.items()])
        for key, default in defaults.items():
            value = getattr(cfg, key)
            assert type(value) is type(default) and str(value).lower().removesuffix(".0") == texts[key].lower(), key


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_setting_has_a_line_and_nearly_all_a_comment(name):
    lines = (ROOT / (name.replace(".", os.sep) + ".py")).read_text(encoding="utf-8").splitlines()
    places = [next(line for line in lines if line.startswith(f"{key} = ")) for key in settings_of(name)]
    assert [line for line in places if "  # " not in line] in ([], ["weight_decay = 0.0"])  # which says it all
