"""Checkpoints, data and templates of strangers: refused in one line or read as data, never executed, and nothing is
written outside out_dir. What code may not call at all is in test_structure.py."""

import copy
import json
import shutil
import sys

from conftest import ROOT, changed, make_checkpoint
from forks import fork_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import model
import sample
from support import UserError

ODD = [None, True, -1, 0, 10**30, 10**400, 2**40, 1.5, float("nan"), float("inf"), "x", "", "../x", [], [1], {},
       {"a": 1}]


def nodes(data, path=()):
    """Paths to what is in a JSON value; of long lists and tables to the first few."""
    yield path
    items = list(data.items()) if isinstance(data, dict) else list(enumerate(data)) if isinstance(data, list) else []
    for key, value in items[:12]:
        yield from nodes(value, (*path, key))


def test_a_checkpoint_with_anything_anywhere(checkpoint, net, tmp_path):
    """One value of one file replaced by something odd: the model runs, or one line says what is wrong."""
    files = {}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        with open(f"{checkpoint}/{name}", encoding="utf-8") as f:
            files[name] = json.load(f)
    files["config.json"] |= {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention"], "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}
    places = [(name, path) for name, data in files.items() for path in nodes(data) if path]

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.sampled_from(places), st.sampled_from(ODD))
    def check(place, odd):
        name, (*path, last) = place
        data = inner = copy.deepcopy(files[name])
        for key in path:
            inner = inner[key]
        inner[last] = odd
        victim = changed(checkpoint, tmp_path / "victim", {name: json.dumps(data)})
        try:
            loaded = model.load_model(victim, device="cpu") if name == "config.json" else net
            tokenizer = model.load_tokenizer(victim)
            ids = tokenizer.encode_chat([{"role": "user", "content": "How many?"}]) if tokenizer.template else [5]
            sample.generate(loaded, tokenizer, [ids or [5]], max_new_tokens=2)
        except UserError as error:
            assert "\n" not in str(error)
        finally:
            shutil.rmtree(victim)

    check()


def test_data_cannot_name_a_place_outside_out_dir(checkpoint, problems, tmp_path):
    """Nor can the names of data sets, which become names of files."""
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    shutil.copy(problems, tmp_path / "p.jsonl")
    row = {"question": "?", "answer": "1", "out_dir": "/x", "index": "../../x", "id": "../x", "solution": "../x"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    before = sorted(tmp_path.iterdir())
    done = fork_script(ROOT / "eval_math.py", f"--model={checkpoint}", "--dataset=../../p.jsonl,../../q.jsonl",
                       "--device=cpu", "--num_problems=1", "--max_new_tokens=2", "--out_dir=out", cwd=inside)
    assert done.returncode == 0 and sorted(tmp_path.iterdir()) == before, done.stderr
    assert [p.name for p in inside.iterdir()] == ["out"] and (inside / "out" / "p.jsonl").exists()


def test_a_name_on_the_hub_is_asked_for_only_if_the_user_gave_it(tmp_path, monkeypatch):
    """A checkpoint's own names (of its base, its code, its data) are never followed."""
    path = make_checkpoint(tmp_path / "model", _name_or_path="owner/other", name_or_path="owner/other",
                           auto_map={"AutoModel": "owner/code--model.Model"})
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # an import would fail
    monkeypatch.setattr("socket.socket.connect", None)
    assert model.load_model(path, device="cpu") and model.load_tokenizer(path)
