"""lab/bench.py: every measurement that needs no download runs at a small size and ends with its line of JSON."""

import json
import re
import sys

import pytest

from configurator import UserError
from lab import bench

SMALL = {
    "load": ["--layers=1", "--repeats=1"],
    "tokenize": ["--repeats=1"],
    "grade": ["--repeats=1", "--dataset={problems}"],
    "svd": ["--size=64", "--repeats=1"],
    "adapters": ["--rows=4", "--tokens=3", "--repeats=1"],
    "compare": ["--rows=16", "--group=4", "--slots=8", "--limit=8", "--repeats=1"],
    "compare_grpo": ["--rows=8", "--group=4", "--limit=8", "--their_rows=4", "--repeats=1"],
    "logprobs": ["--size=40", "--repeats=1"],
    "decode": ["--rows=3", "--context=20", "--tokens=2", "--repeats=1"],
    "train": ["--rows=2", "--context=16", "--repeats=1"],
}


@pytest.mark.parametrize("name", bench.BENCHES)
def test_a_measurement_ends_with_its_figures(name, problems, monkeypatch, capsys, tmp_path):
    modules = {"tokenize": "transformers", "compare": "transformers", "compare_grpo": "trl", "grade": "math_verify"}
    if name in modules:
        pytest.importorskip(modules[name], reason=f"{modules[name]} is what {name} compares with")
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path))
    arguments = [argument.format(problems=problems) for argument in SMALL[name]]
    monkeypatch.setattr(sys, "argv", ["bench", name, *arguments])
    bench.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["bench"] == name and result["threads"] > 0
    figures = [value for value in result.values() if isinstance(value, float)]
    assert figures and all(value == value and value > -1 for value in figures)


@pytest.mark.parametrize("arguments, words", [
    (["nothing"], "name a measurement"),
    (["decode", "--shape=qwen8b"], "shape must be one of toy, qwen0.5b"),
    (["logprobs", "--shape=gpt2"], "shape must be one of toy, qwen0.5b"),
    (["decode", "--dtype=bf16"], "dtype auto or one of"),
    (["compare", "--group=0"], "must be at least 1"),
    (["compare", "--rows=10", "--group=4"], "whole groups"),
    (["compare_grpo", "--rows=12", "--group=4", "--their_rows=5"], "whole micro-batches of their_rows=5"),
    (["grade", "--dataset=nowhere"], "no file at 'nowhere'"),
])
def test_odd_requests_are_refused(arguments, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(UserError, match=re.escape(words)):
        bench.main()


def test_a_process_that_ends_early_is_no_hang():
    with pytest.raises(UserError, match="ended early"):
        bench.in_turn([sys.exit], 1)
