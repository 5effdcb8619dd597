"""lab/bench.py: every measurement that needs no download runs at a small size and ends with a line of JSON."""

import json
import re
import sys

import pytest
from conftest import assert_refused
from forks import fork_script

from lab import bench
from support import UserError

SMALL = {
    "compare": "--rows=16 --group=4 --slots=8 --limit=8",
    "compare_grpo": "--rows=8 --group=4 --limit=8 --their_rows=4",
    "decode": "--rows=3 --context=20 --tokens=2",
    "train": "--rows=5 --group=2 --context=16 --micro_batch_tokens=40",
    "logprobs": "--size=40",
    "adapters": "--rows=4 --tokens=3",
    "svd": "--size=64",
    "load": "",
    "tokenize": "",
    "grade": "--dataset={problems}",
}


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    bench.main()


@pytest.mark.parametrize("name", bench.BENCHES)
def test_a_measurement_ends_with_its_figures(name, problems, monkeypatch, capsys):
    for package in bench.PEERS.get(name, []):
        pytest.importorskip(package, reason=f"{package} is what {name} compares with")
    run(monkeypatch, name, "--repeats=1", *SMALL[name].format(problems=problems).split())
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["bench"] == name and result["threads"] > 0 and result["repeats"] == 1
    assert ("ratio" in result) == (name not in ("decode", "train"))
    figures = [value for value in result.values() if isinstance(value, float)]
    assert figures and all(value == value and value > -1 for value in figures)
    if name == "train":  # 3 prompts of 8 tokens, each read once, and 5 completions without their last token
        assert result["packed_tokens"] == 3 * 8 + 5 * 7 and result["passes"] == 2


def test_responses_are_graded_and_settings_skipped(tmp_path, monkeypatch, capsys):
    pytest.importorskip("math_verify", reason="math_verify is what grade compares with")
    rows = [{"settings": {}}, {"response": "#### 4", "answer": "4"}, {"response": "#### 5", "answer": "4"}]
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(monkeypatch, "grade", f"--dataset={path}")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["pairs"], result["accepted"]) == (2, 1)


@pytest.mark.parametrize("arguments, words", [
    (["nothing"], "name a measurement"),
    ([], "name a measurement"),
    (["decode", "--shape=qwen8b"], "shape in command line must be one of toy, qwen0.5b"),
    (["decode", "--dtype=bf16"], "dtype in command line must be one of auto"),
    (["compare", "--group=0"], "group must be at least 1"),
    (["compare", "--rows=10", "--group=4"], "whole groups"),
    (["compare_grpo", "--rows=12", "--group=4", "--their_rows=5"], "whole micro-batches of their_rows=5"),
    (["grade", "--dataset=nowhere.jsonl"], "nowhere.jsonl"),
])
def test_odd_requests_are_refused(arguments, words, monkeypatch):
    monkeypatch.setattr(bench, "PEERS", {})
    with pytest.raises(UserError, match=re.escape(words)):
        run(monkeypatch, *arguments)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(bench, "PEERS", {"compare": ["no_such_package"]})
    with pytest.raises(UserError, match="compare needs no_such_package: pip install"):
        run(monkeypatch, "compare")


def test_a_process_that_ends_early_is_no_hang():
    with pytest.raises(UserError, match="ended early"):
        bench.in_turn([sys.exit], 1)


def test_the_check_of_a_gpu_runs_on_a_cpu_row_by_row():
    """All rows but compiling, and the tests, which are part of this suite."""
    names = "versions,decode 1,train,grpo,kernels,svd,toy"
    done = fork_script("-m", "lab.gpu_check", "--device=cpu", f"--only={names}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and [row["row"] for row in rows] == names.split(","), done.stdout + done.stderr
    by_name = {row["row"]: row for row in rows}
    assert not any("error" in row for row in rows) and len(by_name["grpo"]["steps"]) == 2
    assert by_name["grpo"]["max_logprob_difference"] < 1e-4 and "aten::mm" in by_name["kernels"]["decode"]
    assert by_name["toy"]["last line"].startswith("toy: greedy accuracy")


def test_a_row_that_fails_does_not_stop_the_next():
    setup = "import lab.bench\nlab.bench.bench_train = lambda cfg: 1 / 0"
    done = fork_script("-m", "lab.gpu_check", "--device=cpu", "--only=train,svd", setup=setup)
    first, second = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert done.returncode == 1 and "ZeroDivisionError" in first["error"] and second["seconds"] > 0
    assert_refused(fork_script("-m", "lab.gpu_check", "--device=cpu", "--only=speed"), "speed", "decode 64")
