"""lab/landscape.py: the planes, and the vectors in them."""

import csv

import pytest
import torch
from conftest import assert_refused
from forks import fork_script

import grpo
import tinylora
from configurator import configure
from eval_math import score
from lab import landscape, plot
from model import load_model, load_tokenizer
from sample import generate


def test_coordinates_are_those_of_the_plane():
    x_axis, y_axis = torch.tensor([[3.0, 0, 4]]), torch.tensor([[0.0, 5, 0]])
    assert landscape.coordinates(2 * x_axis - y_axis + torch.tensor([[4.0, 0, -3]]), x_axis, y_axis) == [2, -1]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The lines of a small survey, with the two runs it goes through."""
    place = tmp_path_factory.mktemp("landscape")
    numbers = {"GRPO": [0.3, -0.1] + [0.05] * 11, "ES": [0.2, 0.2] + [-0.05] * 11}
    for name, v in numbers.items():
        net = load_model("toy/base")
        adapter = tinylora.add_adapter(net, rank=1, u=13, seed=1337)
        adapter.v.data.copy_(torch.tensor([v]))
        tinylora.save_adapter(adapter, f"{place}/runs/{name}/adapter.safetensors")
    small = [f"--out_dir={place}/runs", f"--landscape={place}/table.csv", "--points=3", "--problems=6"]
    found = fork_script("-m", "lab.landscape", *small)
    assert found.returncode == 0, found.stderr
    with open(place / "table.csv", newline="") as f:
        return place, list(csv.DictReader(f)), numbers


def test_each_point_has_the_accuracy_of_its_vector(table):
    _, rows, numbers = table
    assert [row["plane"] for row in rows] == ["random"] * 11 + ["ES"] * 11
    places = {(x, y) for x in ("-1", "0.5", "2") for y in ("-1.5", "0", "1.5")}
    assert {(row["x"], row["y"]) for row in rows[:9]} == places
    by_grpo, by_es = (torch.tensor([v]) for v in numbers.values())
    [at] = [row for row in rows if row["plane"] == row["kind"] == "ES"]
    across = by_es - by_grpo * (by_es * by_grpo).sum() / by_grpo.square().sum()
    across *= by_grpo.norm() / across.norm()
    assert float(at["x"]) * by_grpo + float(at["y"]) * across == pytest.approx(by_es, abs=1e-3)

    cfg = configure(grpo.Settings, grpo.reward, grpo.problems, argv=[])
    net, tokenizer = load_model("toy/base"), load_tokenizer("toy/base")
    problems = cfg.problems(cfg, "test")[:6]
    grpo.prepare(net, tokenizer, problems, cfg)
    adapter = tinylora.add_adapter(net, rank=1, u=13, seed=1337)
    for row in [rows[10], rows[20], rows[12], at]:
        v = by_es if row["kind"] == "ES" else float(row["x"]) * by_grpo + float(row["y"]) * across
        adapter.v.data.copy_(v)
        answers = generate(net, tokenizer, [p["prompt_tokens"] for p in problems], 1, 64, temperature=0)
        right = [score(a.text, a.truncated, p["answer"], "hash")["strict"] for p, [a] in zip(problems, answers)]
        assert float(row["accuracy"]) == pytest.approx(sum(right) / 6, abs=1e-3)


def test_both_planes_share_their_first_axis(table):
    _, rows, _ = table
    halves = [[row for row in rows if row["plane"] == plane and row["y"] == "0"] for plane in ("random", "ES")]
    first, second = [[(r["x"], r["reward"], r["accuracy"]) for r in half if r["kind"] != "ES"] for half in halves]
    assert first == second and len(first) == 4
    assert len({row["accuracy"] for row in rows}) > 1


def test_the_figure_is_drawn(table, monkeypatch):
    pytest.importorskip("matplotlib", reason="lab.plot draws with matplotlib")
    place, _, _ = table
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["plot", "landscape", f"--landscape={place}/table.csv", f"--figures={place}"])
        plot.main()
        drawn = (place / "landscape.png").read_bytes()
        (place / "landscape.png").unlink()
    assert drawn.startswith(b"\x89PNG") and len(drawn) > 10_000


def test_what_cannot_work_is_refused(tmp_path):
    for wrong, word in (("points=1", "points"), ("problems=0", "problems")):
        assert_refused(fork_script("-m", "lab.landscape", f"--{wrong}", cwd=tmp_path), word)
    missing = fork_script("-m", "lab.plot", "landscape", f"--landscape={tmp_path}/none.csv")
    assert_refused(missing, "none.csv")
