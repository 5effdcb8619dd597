"""config/, lab/study.py and lab/plot.py: every config trains, every study consists of runs that the scripts accept, and
every figure is drawn."""

import csv
import json
import math
import re
import threading
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_refused
from forks import fork_script
from safetensors.torch import load_file
from test_run import EVEN_LENGTH

import eval_math
import model
from configurator import configure
from lab import bench, capacity, controls, curves, make_bases, plot, study
from support import UserError
from support.data import read_file

CONFIGS = sorted((ROOT / "config").glob("*.py"))
SMALL = ["--max_steps=2", "--eval_size=2", "--max_new_tokens=4", "--batch_size=2", "--eval_interval=0",
         "--micro_batch_tokens=256", "--rank=2", "--dtype=float32", "--device=cpu"]
STUDIES = study.STUDIES | study.PAPERS


def configured(script, arguments):
    module, functions = study.SCRIPTS[script]
    return module, configure(module.Settings, *functions, argv=arguments)


def read_log(out_dir):
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------ config/

def script_of(config):
    return "grpo.py" if "grpo.py" in config.read_text() else "sft.py"


def kinds():
    """A config of each kind: those of a kind differ in the model, the directory and the memory alone."""
    found = {}
    for config in CONFIGS:
        lines = re.sub("(?m)^(#|model|out_dir|micro_batch_tokens).*\n", "", config.read_text())
        found.setdefault(lines, config)
    return list(found.values())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_accepted_and_says_how_it_is_run(config):
    script = script_of(config)
    module, cfg = configured(script, [str(config)])
    module.check(cfg)
    assert f"python {script} config/{config.name}" in config.read_text() or config.stem == "toy_pretrain"
    assert cfg.out_dir.startswith("out/")


@pytest.mark.parametrize("config", kinds(), ids=lambda path: path.stem)
def test_every_kind_of_config_trains(config, checkpoint, problems, tmp_path):
    """Two steps of a tiny model with short completions. Only sizes and sources are overridden."""
    script = script_of(config)
    data = [f"--model={checkpoint}", f"--dataset={problems}", f"--eval_dataset={problems}", f"--out_dir={tmp_path}/out"]
    sizes = ["--group_size=2"] if script == "grpo.py" else ["--warmup_steps=0", "--max_length=0"]
    module, cfg = configured(script, [str(config), *data, *SMALL, *sizes])
    module.train(cfg)
    assert [line["step"] for line in read_log(tmp_path / "out") if "eval" not in line] == [1, 2]


def test_toy_format_is_a_task_of_its_own_that_a_resumed_run_goes_on_with(tmp_path):
    config = str(ROOT / "config" / "toy_format.py")
    small = ["--batch_size=2", "--eval_size=4", "--max_new_tokens=48", f"--out_dir={tmp_path}/out", "--device=cpu"]
    module, cfg = configured("grpo.py", [config, *small, "--max_steps=2"])
    for text, earned in (("3+4=7. 7-2=6. #### 6", 1), ("3+4=7. #### 7", 0), ("3+4=7. 7-2=6.", 0), ("#### 6", 0),
                         ("So 3+4=7. 7-2=6. #### 6", 0)):
        assert cfg.reward({"changes": 2}, SimpleNamespace(text=text)) == earned
    rows = cfg.problems(cfg, "train")
    assert rows == cfg.problems(cfg, "train") and len(rows) == 1000 and "answer" not in rows[0]
    module.train(cfg)
    module, cfg = configured("grpo.py", [f"{tmp_path}/out/settings.py", "--init_from=resume", "--max_steps=3"])
    module.train(cfg)
    log = read_log(tmp_path / "out")
    assert [line["step"] for line in log if "eval" not in line] == [1, 2, 3]
    assert all("lenient" not in line and "lenient" not in line.get("eval", {}) for line in log)


def test_the_rewards_of_the_controls_do_not_know_the_answer():
    working, guess = (SimpleNamespace(text=text, truncated=False) for text in ("2+2=5. #### 5", "#### 4"))
    cut = SimpleNamespace(text="2+2=5. 5+", truncated=True)
    _, cfg = configured("grpo.py", [str(ROOT / "config" / "toy_control_format.py")])
    assert [cfg.reward({}, completion) for completion in (working, guess, cut)] == [1, 0, 0]
    _, cfg = configured("grpo.py", [str(ROOT / "config" / "toy_control_random.py")])
    coins = [cfg.reward({"question": str(i)}, guess) for i in range(400)]
    assert coins == [cfg.reward({"question": str(i)}, guess) for i in range(400)]
    assert set(coins) == {0, 1} and 150 < sum(coins) < 250


@pytest.mark.slow
def test_toy_format_is_learnt(tmp_path):
    config = str(ROOT / "config" / "toy_format.py")
    module, cfg = configured("grpo.py", [config, f"--out_dir={tmp_path}/out", "--device=cpu"])
    module.train(cfg)
    rewards = [line["eval"]["reward"] for line in read_log(tmp_path / "out") if "eval" in line]
    assert rewards[0] < 0.1 and rewards[-1] > 0.9


# ------------------------------------------------------------------------------------------------------- studies: runs

def test_studies_are_runs_that_the_scripts_accept():
    for name, runs in STUDIES.items():
        commands = {point.command for point in runs()}
        assert len(commands) > 3 and all(re.search(" --lr=[0-9.e-]+| config/", command) for command in commands), name
        for command in {re.sub(r" --(lr|seed)=\S+", "", command) for command in commands}:  # of a sweep, one is enough
            script, *arguments = command.removeprefix("-m ").split()
            module, cfg = configured(script, arguments)
            module.check(cfg)
            shape = re.search(f"config/({'|'.join(bench.SHAPES)})_", command)
            if shape and cfg.method in ("tinylora", "lora_xs"):
                _, hidden, _, layers, heads, key_heads, _ = bench.SHAPES[shape[1]]
                assert cfg.rank <= hidden // heads * key_heads  # the shortest side of a linear
                assert cfg.u * cfg.rank**2 * 7 * layers <= 10**9  # as in tinylora.plan


def test_the_benchmarks_of_table_2_have_names():
    arguments = study.math_sizes.__doc__.partition("eval_math.py")[2].partition("\n\n")[0].split()
    names = configure(eval_math.Settings, argv=arguments).dataset.split(",")
    assert len(names) == 6 and set(names) <= set(eval_math.DATASETS)


def test_numbers_of_16_bits_have_them_after_every_step(checkpoint, problems, tmp_path):
    (tmp_path / "config.py").write_text(EVEN_LENGTH)
    arguments = [f"{tmp_path}/config.py", f"--model={checkpoint}", f"--dataset={problems}", "--eval_dataset=", *SMALL,
                 "--save_dtype=bfloat16", "--max_new_tokens=8", "--batch_size=4", "--group_size=4"]
    for script, rounded in (("lab.precision", True), ("grpo.py", False)):
        module, cfg = configured(script, [*arguments, f"--out_dir={tmp_path}/{script}"])
        module.train(cfg)
        v = load_file(tmp_path / script / "checkpoint.safetensors")["weights/v"]
        assert v.any() and v.equal(v.bfloat16().float()) == rounded


def test_the_shipped_table_holds_all_runs_of_the_toy():
    rows = study.read_results(ROOT / "lab" / "results" / "toy.csv")
    assert {point.command for runs in study.STUDIES.values() for point in runs()} <= set(rows)


def spread(values, digits):
    """As RESULTS.md writes it: mean (lowest to highest)."""
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def test_every_spread_in_results_is_that_of_runs_in_the_tables():
    tables = {name: ROOT / "lab" / "results" / f"{name}.csv" for name in ("toy", "controls", "curves")}
    rows = study.read_results(tables["toy"])
    groups = {}  # the rows of each run, whatever the seed
    for command in {point.command for runs in study.STUDIES.values() for point in runs()}:
        bits = capacity.bits(rows[command]) if "lab.capacity" in command else ""
        groups.setdefault(re.sub(r" --seed=\S+", "", command), []).append(rows[command] | {"bits": bits})
    for name, key in (("controls", "rewarded"), ("curves", "arm")):
        with open(tables[name], newline="") as f:
            for row in csv.DictReader(f):
                groups.setdefault(row[key], []).append(row)
    known = set()
    for runs in groups.values():
        for column in runs[0].keys() - {"command", "commit", "error", "arm", "rewarded"}:
            values = [float(row[column]) for row in runs if row[column] != ""]
            if values:
                known |= {spread(values, digits) for digits in (2, 3)}
    written = re.findall(r"-?\d\.\d+ \(-?\d\.\d+ to -?\d\.\d+\)", (ROOT / "lab" / "RESULTS.md").read_text())
    assert len(written) > 200 and set(written) - known == set()


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


def test_a_study_runs_what_is_missing_or_failed_and_keeps_all_other_lines(checkpoint, problems, tmp_path, monkeypatch,
                                                                          capsys):
    run = f"grpo.py --model={checkpoint} --dataset={problems} --eval_dataset={problems} --group_size=2 "
    commands = [run + " ".join(SMALL) + f" --save_dtype=bfloat16 --seed={seed}" for seed in range(3)]
    monkeypatch.setitem(study.STUDIES, "some", lambda: [study.Point("RL", "numbers", command) for command in commands])
    monkeypatch.setattr(study, "ProcessPoolExecutor", Here)
    results = tmp_path / "some.csv"
    done = [dict.fromkeys(study.COLUMNS, "") | {"command": command, "accuracy": "0.5"} for command in commands[:2]]
    study.write_results(results, done)
    monkeypatch.setattr("sys.argv", ["study", "some", f"--results={results}", f"--out_dir={tmp_path}/runs"])
    for ran, error in ((1, ""), (0, ""), (1, "OSError: disk full"), (0, "UserError: the gradient is not finite")):
        if error:
            rows = study.read_results(results)
            rows[commands[2]]["error"] = error
            study.write_results(results, rows.values())
        study.main()
        assert f"{ran} runs done, {3 - ran} were in" in capsys.readouterr().out
        first, second, third = study.read_results(results).values()
        assert [first, second] == done and third["command"] == commands[2] and third["numbers"] == "13"
        assert all(0 <= float(third[column]) <= 1 for column in ("before", "accuracy", "stderr", "reward"))


def test_a_line_holds_what_the_log_says_and_a_stopped_run_goes_on(checkpoint, problems, tmp_path):
    command = f"sft.py --model={checkpoint} --dataset={problems} --eval_dataset={problems} {' '.join(SMALL)}"
    out_dir = tmp_path / study.directory_name(command, study.revision())
    module, cfg = configured("sft.py", [*command.split()[1:], "--max_steps=1", f"--out_dir={out_dir}"])
    module.train(cfg)  # leaves a checkpoint, as a run that is stopped after this step does
    row = study.execute(command, str(tmp_path))
    assert row["error"] == row["reward"] == "" and not (out_dir / "checkpoint.safetensors").exists()
    log = read_log(out_dir)
    assert [line["step"] for line in log if "eval" not in line] == [1, 2]
    first, *_, last = [line["eval"] for line in log if "eval" in line]
    for column, value in (("before", first["reward"]), ("accuracy", last["reward"]), ("stderr", last["stderr"]),
                          ("loss", last["loss"])):
        assert row[column] == f"{value:.4g}"


def test_a_run_that_fails_is_noted_and_the_others_go_on(checkpoint, problems, tmp_path):
    run = f"sft.py --model={checkpoint} --dataset={problems} {' '.join(SMALL)} --eval_dataset="
    failed = study.execute(run + " --lr=-1", str(tmp_path))
    assert "lr must be at least 0" in failed["error"] and failed["accuracy"] == failed["loss"] == ""
    trained = study.execute(run, str(tmp_path))  # without an evaluation there is still the training loss
    assert trained["error"] == trained["accuracy"] == "" and float(trained["loss"]) > 0 and trained["numbers"] == "13"


def test_two_studies_wait_for_each_other_at_their_table(tmp_path):
    entered = threading.Event()

    def other():
        with study.lock(tmp_path):
            entered.set()

    thread = threading.Thread(target=other)
    with study.lock(tmp_path):
        thread.start()
        assert not entered.wait(0.3)
    thread.join(10)
    assert entered.is_set()


def test_an_unknown_study_is_refused():
    assert_refused(fork_script("-m", "lab.study", "parms"), "parms", "params")


@pytest.mark.parametrize("name", make_bases.BASES)
def test_bases_of_other_widths_and_habits(name, tmp_path, monkeypatch):
    documents = []

    def run(command, check):
        [dataset] = [arg.partition("=")[2] for arg in command if arg.startswith("--dataset")]
        documents.extend(row for _, row in read_file(dataset))
        short = ["--max_steps=1", "--batch_size=2", "--warmup_steps=0", "--eval_interval=0", "--save_interval=0"]
        done = fork_script(*command[1:], *short)
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr(make_bases.subprocess, "run", run)
    monkeypatch.setattr(make_bases.make, "NUM_DOCUMENTS", 5000)
    monkeypatch.setitem(make_bases.BASES, name, f"{tmp_path}/bases/{name}")
    monkeypatch.setattr("sys.argv", ["make_bases", name])
    monkeypatch.chdir(ROOT)
    make_bases.main()
    kind, number = name[:-2], int(name[-2:])
    net = model.load_model(f"{tmp_path}/bases/{name}", device="cpu")
    assert net.config.hidden_size == (number if kind == "width" else 128) and net.dtype == torch.float32
    tokenizers = [model.load_tokenizer(path) for path in (f"{tmp_path}/bases/{name}", "toy/base")]
    assert len({tuple(t.encode_chat([{"role": "user", "content": "Tom has 3 eggs."}])) for t in tokenizers}) == 1
    plain = ["=" in row["solution"] for row in documents if "system" not in row]
    assert sum(plain) / len(plain) == pytest.approx(0.4 if kind == "width" else number / 100, abs=0.04)
    assert not {row["question"] for row in documents} & {row["question"] for _, row in read_file("toy/test.jsonl")}


def test_the_shipped_bases_are_of_their_widths():
    for width in (80, 96):
        net = model.load_model(str(ROOT / make_bases.BASES[f"width{width}"]), device="cpu")
        assert net.config.hidden_size == width
    assert_refused(fork_script("-m", "lab.make_bases", "width32"), "width80", "worked10")


@pytest.mark.parametrize("name", ["controls", "curves", "landscape"])
def test_studies_with_tables_of_their_own_are_made_by_their_names(name, tmp_path, monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(study.subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr("sys.argv", ["study", name, f"--out_dir={tmp_path}", f"--results={tmp_path}/table.csv"])
    study.main()
    [command] = commands
    assert command[1:3] == ["-m", f"lab.{name}"] and f"--out_dir={tmp_path}/{name}" in command
    assert "0 runs done" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ controls

def test_controls_count_right_and_worked_answers():
    right, wrong, lucky = (1.0, True), (0.0, True), (1.0, False)
    assert controls.shares([[right, wrong], [lucky, lucky]]) == (0.75, 0.5, 0.5)
    accuracy, worked, right_if_worked = controls.shares([[lucky]])
    assert (accuracy, worked) == (1, 0) and math.isnan(right_if_worked)


def test_controls_examine_what_was_trained_by_the_true_reward_and_once(tmp_path, monkeypatch):
    test = ROOT / "toy" / "test.jsonl"
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(test.read_text().splitlines()[:20]))
    small = f"--eval_dataset={few} --max_steps=0"
    runs = [("coin", f"grpo.py config/toy_control_random.py {small}"),
            ("base", f"grpo.py config/toy_rl.py {small}"),
            ("asked", f"grpo.py config/toy_rl.py {small} --system_prompt='Think step by step.'")]
    monkeypatch.setattr(controls, "RUNS", runs)
    table = tmp_path / "table.csv"
    monkeypatch.setattr("sys.argv", ["controls", f"--controls={table}", f"--out_dir={tmp_path}/runs"])
    controls.main()
    coin, base, asked = csv.DictReader(table.read_text().splitlines())
    assert all(coin[figure] == base[figure] for figure in controls.COLUMNS[2:-1])  # neither was trained, nor is a coin
    assert float(coin["accuracy"]) < 0.5 and float(coin["worked"]) < 0.1 and float(coin["lead"]) > 0
    assert float(coin["pass_at_8"]) > 0.8 and 0.2 < float(coin["sampled_worked"]) < 0.7
    assert asked["accuracy"] == asked["worked"] == asked["right_if_worked"] == "1" and float(asked["lead"]) < 0
    before = table.read_bytes()
    monkeypatch.setattr(controls, "trained", lambda *_: pytest.fail("a run that has its line is made again"))
    controls.main()
    assert table.read_bytes() == before


def test_the_shipped_controls_are_those_that_the_study_makes():
    with open(ROOT / "lab" / "results" / "controls.csv", newline="") as f:
        assert [(line["rewarded"], line["command"]) for line in csv.DictReader(f)] == controls.RUNS


# ------------------------------------------------------------------------------------------------- curves and capacity

def test_a_curve_leaves_a_line_where_it_stays_above():
    line = {1: 10.0, 2: 5.0, 3: 2.0, 4: 1.0}
    assert curves.leaves({1: 12.0, 2: 5.4, 3: 2.3, 4: 1.2}, line) == 3
    assert curves.leaves({1: 12.0, 2: 6.0, 3: 2.3, 4: 1.1}, line) is None


def test_a_line_of_the_curves_has_mean_losses_and_spectral_norms(checkpoint, problems, tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "ENDS", [1, 3])
    command = (f"sft.py --model={checkpoint} --dataset={problems} --eval_dataset= --method=lora {' '.join(SMALL)} "
               "--max_steps=3")
    line = curves.measure(("LoRA 2", command), str(tmp_path))
    [log] = tmp_path.glob("*/log.jsonl")
    first, *others = [step["loss"] for step in read_log(log.parent)]
    assert (line["1"], line["3"]) == (f"{first:.4g}", f"{sum(others) / 2:.4g}")
    factors = load_file(log.parent / "adapter.safetensors")
    for factor in "AB":
        norms = [t.norm().item() for name, t in factors.items() if name.startswith(factor)]  # of Frobenius: a bit above
        assert 0.7 < float(line[factor]) / (sum(norms) / len(norms)) < 0.98
    with pytest.raises(UserError, match="lr must be at least 0"):
        curves.measure(("LoRA 2", f"{command} --lr=-1"), str(tmp_path))


def test_the_shipped_curves_are_those_that_the_study_makes():
    with open(ROOT / "lab" / "results" / "curves.csv", newline="") as f:
        assert [(line["arm"], line["command"]) for line in csv.DictReader(f)] == curves.RUNS


def test_bits_are_counted_from_chance():
    line = {"command": "-m lab.capacity --batch_size=13 --lr=0.1", "numbers": "84"}
    assert capacity.bits(line | {"loss": "0"}) == pytest.approx(13 * 8 * math.log2(10) / 84)
    assert capacity.bits(line | {"loss": str(math.log(20))}) == pytest.approx(-13 * 8 / 84)


def test_random_digits_are_learnt_by_heart(tmp_path):
    command = f"-m lab.capacity --model={ROOT}/toy/base --method=lora --rank=4 --batch_size=1"
    learnt = study.execute(f"{command} --max_steps=40 --lr=0.005 --seed=1", str(tmp_path))
    assert learnt["error"] == "" and float(learnt["loss"]) < 0.1
    guessed = [study.execute(f"{command} --max_steps=1 --lr=1e-9 --seed={seed}", str(tmp_path)) for seed in (1, 2)]
    assert 1 < float(guessed[0]["loss"]) != float(guessed[1]["loss"]) > 1  # each seed has digits of its own


# ------------------------------------------------------------------------------------------------------------- figures

def row(command="", accuracy="", loss=""):
    return {"command": command, "numbers": "13", "accuracy": accuracy, "loss": loss}


def test_every_study_has_its_figure_of_its_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="lab.plot draws with matplotlib")
    assert set(plot.FIGURES) == set(STUDIES)
    commands = [point.command for runs in STUDIES.values() for point in runs()]
    table = tmp_path / "toy.csv"
    study.write_results(table, [
        {"command": command, "numbers": 1 + i % 50, "before": 0.2, "accuracy": i % 10 / 10, "stderr": 0.01,
         "reward": "", "loss": 1.5, "seconds": 1, "commit": "abc"} for i, command in enumerate(commands)])
    rows = study.read_results(table)
    assert all(plot.points(name, rows) for name in plot.FIGURES)
    curve = plot.points("params", rows)["RL"]
    own = [point for point in study.params() if point.series == "RL"]
    assert sum(len(values) for values in curve.values()) == len(own)
    assert all(float(rows[p.command]["accuracy"]) in curve[int(rows[p.command]["numbers"])] for p in own)
    drawn = ["params", "rates", "precision", "batch", "ablations", "controls", "curves", "capacity"]  # one of each kind
    monkeypatch.setattr("sys.argv", ["plot", *drawn, f"--results={table}", f"--figures={tmp_path}"])
    plot.main()
    for name in drawn:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_shipped_figures_show_the_shipped_tables(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib", reason="lab.plot draws with matplotlib")
    from matplotlib.image import imread

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["plot", f"--figures={tmp_path}"])
    plot.main()
    plot.pyplot().close("all")
    drawn = sorted(tmp_path.glob("*.png"))
    assert [path.stem for path in drawn] == sorted([*study.STUDIES, "controls", "curves", "landscape"])
    for path in drawn:
        shipped = ROOT / "lab" / "results" / path.name
        if f"version{matplotlib.__version__}," not in shipped.read_bytes().decode("latin1"):
            pytest.skip(f"{path.name} was drawn with another version of matplotlib")
        assert (imread(path) == imread(shipped)).all(), path.name


def test_of_several_learning_rates_the_best_counts():
    own = [point for point in study.gsm8k_sizes() if point.series == "RL"][:6]  # two rates with three seeds each
    rows = {point.command: row(accuracy=a) for point, a in zip(own, "1 2 3 3 4 5".split())}
    assert plot.points("gsm8k_sizes", rows) == {"RL": {13: [3, 4, 5]}}
    rows = {point.command: row(loss=point.command[-1]) for point in study.batch()}
    assert all(values == [1, 2] for by_x in plot.points("batch", rows).values() for values in by_x.values())


def test_methods_with_equally_many_numbers_are_not_taken_for_seeds():
    """64 numbers in each of 196 linears, and LoRA-XS of rank 8."""
    alike = ("--u=64 --n_tie=1 ", "--method=lora_xs --rank=8 ")
    own = [p for p in study.gsm8k_sizes() if p.series == "RL" and any(settings in p.command for settings in alike)]
    rows = {p.command: row(accuracy="0.9" if "lora_xs" in p.command else "0.5") for p in own}
    assert plot.points("gsm8k_sizes", rows) == {"RL": {13: [0.9] * len(study.SEEDS)}}


def test_curves_of_runs(checkpoint, problems, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="lab.plot draws with matplotlib")
    for script in ("grpo.py", "sft.py"):
        data = [f"--model={checkpoint}", f"--dataset={problems}", f"--eval_dataset={problems}"]
        module, cfg = configured(script, [*data, f"--out_dir={tmp_path}/{script}", *SMALL])
        module.train(cfg)
    old = tmp_path / "version1.jsonl"  # where an evaluation had other keys
    old.write_text('{"step": 0, "eval": {"strict": 0.2}}\n{"step": 1, "reward": 0.5, "seconds": {"generate": 1.0}}\n')
    assert [plot.evaluated(line) for line in plot.read_log(str(old))] == [0.2, None]
    assert plot.evaluated({"eval": {"reward": 0.0, "strict": 1.0}}) == 0.0
    curves = tmp_path / "curves.png"
    monkeypatch.setattr("sys.argv", ["plot", f"{tmp_path}/grpo.py", f"{tmp_path}/sft.py", str(old), f"--out={curves}"])
    plot.main()
    assert curves.stat().st_size > 10_000
    for out, words in (("curves.xyz", "curves.xyz"), ("", "out must be the name of a file"), ("no/c.png", "no/c.png")):
        monkeypatch.setattr("sys.argv", ["plot", f"{tmp_path}/grpo.py", f"--out={tmp_path}/{out}"])
        with pytest.raises(UserError, match=words):
            plot.main()


@pytest.mark.parametrize("text", ["", "[1]\n", '{"question": "?"}\n', '{"step": 0}\n', None])
def test_what_is_no_log_and_no_table_is_refused(text, tmp_path):
    path = tmp_path / "other.jsonl"
    if text is not None:
        path.write_text(text)
        with pytest.raises(UserError, match="no table of runs"):
            study.read_results(path)
    with pytest.raises(UserError, match="no log of a run"):
        plot.read_log(str(path))
