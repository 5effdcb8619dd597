"""config/, lab/study.py and lab/plot.py: every config trains, every study is runs that exist, every figure draws."""

import json
import re
import threading
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import pytest
from conftest import ROOT, assert_refused
from forks import fork_script

import grpo
import sft
from configurator import UserError, configure
from lab import plot, study

CONFIGS = sorted((ROOT / "config").glob("*.py"))
SMALL = ["--max_steps=2", "--eval_size=2", "--max_new_tokens=4", "--batch_size=2", "--eval_interval=0",
         "--micro_batch_tokens=256", "--rank=2", "--dtype=float32", "--device=cpu"]


def script_of(config):
    return grpo if "group_size" in config.read_text() or config.stem == "toy_rl" else sft


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_trains(config, checkpoint, problems, tmp_path):
    """Two steps with a tiny model and short answers; what is overridden is size and source alone."""
    module = script_of(config)
    data = [f"--model={checkpoint}", f"--dataset={problems}", f"--eval_dataset={problems}", f"--out_dir={tmp_path}/out"]
    group = ["--group_size=2"] if module is grpo else ["--warmup_steps=0", "--max_length=0"]
    cfg = configure(vars(module), [str(config), *data, *SMALL, *group])
    module.train(cfg)
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "eval" not in line] == [1, 2]


def test_studies_are_runs_that_the_scripts_accept():
    """Every command parses, names an existing config and passes the script's own check of its settings."""
    for name in [*study.STUDIES, *study.PAPERS]:
        commands = {point.command for point in (study.STUDIES | study.PAPERS)[name]()}
        assert len(commands) > 3 and all(re.search(" --lr=[0-9.e-]+| config/", command) for command in commands)
        for command in {re.sub(r" --(lr|seed)=\S+", "", command) for command in commands}:  # a sweep's are alike
            script, *arguments = command.split()
            module = {"grpo.py": grpo, "sft.py": sft}[script]
            module.check_settings(configure(vars(module), arguments))


@pytest.fixture
def table(tmp_path):
    """A table with a line for every run of every study."""
    path, commands = tmp_path / "toy.csv", [p.command for runs in plot.STUDIES.values() for p in runs()]
    study.write_results(path, {
        command: {"command": command, "numbers": 1 + i % 50, "before": 0.2, "accuracy": i % 10 / 10, "stderr": 0.01,
                  "reward": "", "loss": 1.5, "seconds": 1, "commit": "abc"} for i, command in enumerate(commands)})
    return path


def test_every_study_has_its_figure(table, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="lab.plot draws with matplotlib")
    assert list(plot.FIGURES) == list(plot.STUDIES)
    rows = study.read_results(table)
    assert all(plot.points(name, rows) for name in plot.FIGURES)
    drawn = ["params", "rates", "precision", "batch", "ablations"]  # a kind each
    monkeypatch.setattr("sys.argv", ["plot", *drawn, f"--results={table}", f"--figures={tmp_path}"])
    plot.main()
    for name in drawn:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_of_several_learning_rates_the_best_counts():
    def row(command, accuracy="", loss=""):
        return {"command": command, "numbers": "13", "accuracy": accuracy, "loss": loss}

    points = [p for p in study.gsm8k_sizes() if p.series == "RL"][:6]  # two rates of three seeds
    rows = {p.command: row(p.command, accuracy=a) for p, a in zip(points, "1 2 3 3 4 5".split())}
    assert plot.points("gsm8k_sizes", rows) == {"RL": {13: [3, 4, 5]}}
    rows = {p.command: row(p.command, loss=p.command[-1]) for p in study.batch()}
    assert all(values == [1, 2] for by_x in plot.points("batch", rows).values() for values in by_x.values())


def test_methods_with_equally_many_numbers_are_not_taken_for_seeds():
    """64 numbers in each of 196 linears, and LoRA-XS of rank 8."""
    runs = [p for p in study.gsm8k_sizes() if p.series == "RL" and ("--u=64 --n_tie=1 " in p.command + " "
                                                                   or "--method=lora_xs --rank=8 " in p.command + " ")]
    assert len({re.sub("--(seed|lr)=.*", "", p.command) for p in runs}) == 2
    rows = {p.command: {"numbers": "12544", "accuracy": "0.9" if "lora_xs" in p.command else "0.5"} for p in runs}
    [values] = plot.points("gsm8k_sizes", rows)["RL"].values()
    assert set(values) == {0.9}


def test_two_studies_wait_for_each_other_at_their_table(tmp_path):
    entered = threading.Event()

    def other():
        with study.alone_in(tmp_path):
            entered.set()

    thread = threading.Thread(target=other)
    with study.alone_in(tmp_path):
        thread.start()
        assert not entered.wait(0.3)
    thread.join(10)
    assert entered.is_set()


def test_a_studys_points_are_the_runs_values(table):
    rows = study.read_results(table)
    curves = plot.points("params", rows)
    own = [p for p in study.STUDIES["params"]() if p.series == "RL"]
    assert sum(len(values) for values in curves["RL"].values()) == len(own)
    for point in own:
        row = rows[point.command]
        assert float(row["accuracy"]) in curves["RL"][int(row["numbers"])]


def test_curves_of_runs(checkpoint, problems, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="lab.plot draws with matplotlib")
    for module, name in ((grpo, "rl"), (sft, "sft")):
        module.train(configure(vars(module), [
            f"--model={checkpoint}", f"--dataset={problems}", f"--eval_dataset={problems}",
            f"--out_dir={tmp_path}/{name}", *SMALL]))
    monkeypatch.setattr("sys.argv", ["plot", f"{tmp_path}/rl", f"{tmp_path}/sft", f"--out={tmp_path}/curves.png"])
    plot.main()
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="no log of a run"):
        plot.read_log(str(tmp_path / "nothing"))
    for text in ("", "[1]\n", '{"question": "?"}\n'):
        (tmp_path / "other.jsonl").write_text(text)
        with pytest.raises(UserError, match="no log of a run"):
            plot.read_log(str(tmp_path / "other.jsonl"))
    with pytest.raises(UserError, match="no table of runs"):
        study.read_results(str(tmp_path / "other.jsonl"))
    for out, words in (("curves.xyz", "curves.xyz"), ("", "out must be the name of a file")):
        monkeypatch.setattr("sys.argv", ["plot", f"{tmp_path}/rl", f"--out={tmp_path}/{out}"])
        with pytest.raises(UserError, match=words):
            plot.main()


class Here:
    """Stands for a pool of processes, which take longer to start than a run takes."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except BrokenProcessPool as error:
            future.set_exception(error)
        return future


def test_a_worker_that_is_killed_ends_the_study(tmp_path, monkeypatch):
    def killed(command, runs):
        raise BrokenProcessPool

    monkeypatch.setattr(study, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(study, "execute", killed)
    monkeypatch.setattr("sys.argv", ["study", "layers", f"--results={tmp_path}/some.csv"])
    with pytest.raises(UserError, match="a worker was killed.*the same command goes on"):
        study.main()


def test_a_study_skips_what_is_done_and_keeps_its_lines(checkpoint, problems, tmp_path, monkeypatch, capsys):
    """Of three runs two are in the table: the third alone is run, and nothing is the second time."""
    run = f"grpo.py --model={checkpoint} --dataset={problems} --eval_dataset={problems} --group_size=2 "
    commands = [run + " ".join(SMALL) + f" --save_dtype=bfloat16 --seed={seed}" for seed in range(3)]
    monkeypatch.setitem(study.STUDIES, "some", lambda: [study.Run("RL", "numbers", command) for command in commands])
    monkeypatch.setattr(study, "ProcessPoolExecutor", Here)
    results = tmp_path / "some.csv"
    done = [dict.fromkeys(study.COLUMNS, "") | {"command": command, "accuracy": "0.5"} for command in commands[:2]]
    study.write_results(results, {row["command"]: row for row in done})
    monkeypatch.setattr("sys.argv", ["study", "some", f"--results={results}", f"--out_dir={tmp_path}/runs"])
    for ran, error in ((1, ""), (0, ""), (1, "OSError: disk full"), (0, "UserError: a log-prob is not finite")):
        if error:
            rows = study.read_results(results)
            rows[commands[2]]["error"] = error
            study.write_results(results, rows)
        study.main()
        assert f"{ran} runs done, {3 - ran} were in" in capsys.readouterr().out
        first, second, third = study.read_results(results).values()
        assert [first, second] == done and third["command"] == commands[2]
        assert third["numbers"] == "13" and 0 <= float(third["accuracy"]) <= 1 and 0 <= float(third["reward"]) <= 1


def test_a_run_that_fails_is_noted_and_the_others_go_on(checkpoint, problems, tmp_path):
    run = f"sft.py --model={checkpoint} --dataset={problems} {' '.join(SMALL)} --eval_dataset="
    failed = study.execute(run + " --lr=-1", str(tmp_path))
    assert "must not be negative" in failed["error"] and failed["accuracy"] == failed["loss"] == ""
    trained = study.execute(run, str(tmp_path))  # and without an evaluation there is the training loss
    assert trained["error"] == trained["accuracy"] == "" and float(trained["loss"]) > 0 and trained["numbers"] == "13"
    assert not study.unfinished(next(path for path in tmp_path.iterdir() if (path / "log.jsonl").exists()), 2)


def test_an_unknown_study_is_refused():
    assert_refused(fork_script("-m", "lab.study", "parms"), "parms", "params")
