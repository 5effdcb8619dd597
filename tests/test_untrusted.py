"""Checkpoints, adapters, data and templates of strangers: refused in one line or read as data, never executed, and
nothing is written outside out_dir. What code may not call at all is in test_structure.py."""

import copy
import json
import shutil

import pytest
from conftest import make_checkpoint
from forks import fork_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eval_math
import model
import sample
from configurator import UserError

ODD = [None, True, -1, 0, 10**30, 10**400, 2**40, 1.5, float("nan"), float("inf"), "x", "", "../x", [], [1], {},
       {"a": 1}]


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("victim"))


def nodes(data, path=()):
    """Paths to what is in a JSON value; of long lists and tables to the first few."""
    yield path
    items = list(data.items()) if isinstance(data, dict) else list(enumerate(data)) if isinstance(data, list) else []
    for key, value in items[:12]:
        yield from nodes(value, (*path, key))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_checkpoint_with_anything_anywhere(victim, checkpoint, data):
    """One value of one file replaced by something odd: the model runs, or one line says what is wrong."""
    name = data.draw(st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json",
                                      "generation_config.json"]))
    with open(f"{checkpoint}/{name}", encoding="utf-8") as f:
        whole = json.load(f)
    *path, last = data.draw(st.sampled_from([p for p in nodes(whole) if p]))
    place = changed = copy.deepcopy(whole)
    for key in path:
        place = place[key]
    place[last] = data.draw(st.sampled_from(ODD))
    with open(f"{victim}/{name}", "w", encoding="utf-8") as f:
        json.dump(changed, f)
    try:
        net, tokenizer = model.load_model(victim, device="cpu"), model.load_tokenizer(victim)
        ids = tokenizer.encode_chat([{"role": "user", "content": "How many?"}]) if tokenizer.template else [5]
        sample.generate(net, tokenizer, [ids or [5]], max_new_tokens=2)
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        shutil.copy(f"{checkpoint}/{name}", victim)


@pytest.mark.parametrize("file, text", [
    ("config.json", "[" * 100_000),
    ("model.safetensors.index.json", '{"weight_map": {"a": ["../../etc/passwd"]}}'),
    ("model.safetensors.index.json", '{"weight_map": {"a": "../../../etc/passwd"}}'),
    ("model.safetensors.index.json", '{"weight_map": {"a": "/etc/passwd"}}'),
    ("model.safetensors.index.json", '{"weight_map": {"a": ".."}}'),
    ("model.safetensors.index.json", '{"weight_map": {"a": 5}}'),
])
def test_files_that_reach_elsewhere_or_too_deep(victim, checkpoint, file, text):
    try:
        with open(f"{victim}/{file}", "w") as f:
            f.write(text)
        with pytest.raises(UserError, match=f"{file}|is missing"):
            model.load_model(victim, device="cpu")
            model.load_tokenizer(victim)
    finally:
        shutil.rmtree(victim)
        shutil.copytree(checkpoint, victim)


def test_data_cannot_name_a_place_outside_out_dir(checkpoint, problems, tmp_path):
    """Nor can the names of data sets, which become names of files."""
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    shutil.copy(problems, tmp_path / "p.jsonl")
    row = {"question": "?", "answer": "1", "out_dir": "/x", "index": "../../x", "id": "../x", "solution": "../x"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    before = sorted(tmp_path.iterdir())
    done = fork_script(eval_math.__file__, f"--model={checkpoint}", "--dataset=../../p.jsonl,../../q.jsonl",
                       "--device=cpu", "--num_problems=1", "--max_new_tokens=2", "--out_dir=out", cwd=inside)
    assert done.returncode == 0 and sorted(tmp_path.iterdir()) == before, done.stderr
    assert [p.name for p in inside.iterdir()] == ["out"] and (inside / "out" / "p.jsonl").exists()


def test_a_name_on_the_hub_is_asked_for_only_if_the_user_gave_it(checkpoint, tmp_path, monkeypatch):
    """A checkpoint's own names (of its base, its code, its data) are never followed."""
    path = shutil.copytree(checkpoint, tmp_path / "model")
    for name in ("config.json", "tokenizer_config.json"):
        raw = json.loads((path / name).read_text())
        raw |= {"_name_or_path": "owner/other", "auto_map": {"AutoModel": "owner/code--model.Model"},
                "name_or_path": "owner/other"}
        (path / name).write_text(json.dumps(raw))
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)  # an import would fail
    monkeypatch.setattr("socket.socket.connect", None)
    assert model.load_model(str(path), device="cpu") and model.load_tokenizer(str(path))
