"""The experiments of both papers on the toy: lists of commands, run one after another.

    python -m lab.study               # all of them
    python -m lab.study params        # one: a name in STUDIES
    python -m lab.plot params         # its figure

A run is a command of grpo.py or sft.py. What came out of it is its line in lab/results/toy.csv; a command that has its
line is not run again, so a study that was stopped goes on, and a deleted line is run anew.
"""

import csv
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections import namedtuple
from contextlib import redirect_stderr, redirect_stdout

import torch
from tqdm import tqdm

import eval_math
import grpo
import sft
import tinylora
from configurator import UserError, configure, run
from model import load_model, load_tokenizer

results = "lab/results/toy.csv"  # a line a run
workers = 2  # runs at a time, each on a core of its own

COLUMNS = ("command", "numbers", "before", "accuracy", "stderr", "reward", "loss", "seconds", "commit")
Run = namedtuple("Run", "series x command")  # a point of a figure: its curve, its place on the axis, how it is made
RL, SFT = "grpo.py config/toy_rl.py", "sft.py config/toy_sft.py"

# The sizes of the papers' figures: name, settings, and the learning rates that won in `rates`, of RL and of SFT.
SIZES = [
    ("1", "--n_tie=21", 0.05, 0.05),
    ("2", "--n_tie=11", 0.05, 0.05),
    ("4", "--n_tie=6", 0.05, 0.05),
    ("7", "--n_tie=3", 0.05, 0.05),
    ("11", "--n_tie=2", 0.02, 0.02),
    ("13", "--n_tie=0 --rank=1 --u=13", 0.005, 0.005),
    ("21", "--n_tie=1", 0.02, 0.02),
    ("84", "--u=4", 0.005, 0.005),
    ("336", "--method=lora_xs --rank=4", 0.005, 0.005),
    ("1344", "--method=lora_xs --rank=8", 0.005, 0.005),
    ("LoRA 1", "--method=lora --rank=1", 0.005, 0.01),
    ("LoRA 8", "--method=lora --rank=8", 0.005, 0.01),
    ("full", "--method=full", 0.0005, 0.002),
]
SEEDS = (1, 2, 3)


def rates():
    """Learning rates beside the best, for every size: one seed."""
    for name, settings, rl_rate, sft_rate in SIZES:
        for kind, script, best in (("RL", RL, rl_rate), ("SFT", SFT, sft_rate)):
            for rate in beside(best):
                yield Run(f"{kind}: {name}", rate, f"{script} {settings} --lr={rate:g} --seed=1")


def beside(rate, steps=(-1, 0, 1)):
    """Rates on the grid 1, 2, 5, 10, ... around one of them."""
    grid = [float(f"{digit}e{power}") for power in range(-6, 1) for digit in (1, 2, 5)]
    return [grid[grid.index(rate) + step] for step in steps]


def params():
    """Accuracy against trained numbers (Learning to Reason in 13 Parameters, Figures 1 and 2)."""
    for _, settings, rl_rate, sft_rate in SIZES:
        for seed in SEEDS:
            yield Run("RL", "numbers", f"{RL} {settings} --lr={rl_rate:g} --seed={seed}")
            yield Run("SFT", "numbers", f"{SFT} {settings} --lr={sft_rate:g} --seed={seed}")


def tying():
    """Who shares a number: neighbours, linears of a type, or all, with more numbers in their place (section 6.5)."""
    for seed in SEEDS:
        for n_tie, rate in ((1, 0.02), (2, 0.02), (3, 0.05)):
            for tie in ("tiled", "structured"):
                yield Run(tie, "numbers", f"{RL} --n_tie={n_tie}{' --tie=structured' * (tie != 'tiled' and n_tie > 1)} "
                                          f"--lr={rate:g} --seed={seed}")
        for u, rate in ((4, 0.05), (7, 0.02), (13, 0.01), (21, 0.01)):
            yield Run("one group", "numbers", f"{RL} --n_tie=0 --u={u} --lr={rate:g} --seed={seed}")
        yield Run("attention/mlp", "numbers", f"{RL} --n_tie=0 --u=13 --targets=attention/mlp --lr=0.01 --seed={seed}")


def rank():
    """The frozen rank r, with 13 numbers for all linears and with one for each (section 6.5, Figure 7)."""
    for seed in SEEDS:
        for r in (1, 2, 4, 8):
            yield Run("u = 13, one group", r, f"{RL} --n_tie=0 --rank={r} --u=13 --lr=0.005 --seed={seed}")
            yield Run("u = 1, untied", r, f"{RL} --rank={r} --lr=0.02 --seed={seed}")


def precision():
    """Numbers stored in 32 or 16 bits (Figure 4), and a frozen model in 16."""
    run = f"{RL} --n_tie=0 --rank=1 --u=13 --lr=0.005"
    for seed in SEEDS:
        yield Run("stored", "float32", f"{run} --seed={seed}")
        yield Run("stored", "bfloat16", f"{run} --save_dtype=bfloat16 --seed={seed}")
        yield Run("stored", "float16", f"{run} --save_dtype=float16 --seed={seed}")
        yield Run("model", "bfloat16", f"{run} --dtype=bfloat16 --seed={seed}")


LORA = [("LoRA 1", "--method=lora --rank=1"), ("LoRA 4", "--method=lora --rank=4"),
        ("LoRA 16", "--method=lora --rank=16"), ("full", "--method=full")]


def lora():
    """The learning rates of LoRA and of full fine-tuning, supervised (LoRA Without Regret, Figure 2)."""
    for name, settings in LORA:
        for rate in beside(0.002 if name == "full" else 0.02, (-3, -2, -1, 0, 1)):
            for seed in SEEDS[:2]:
                yield Run(name, rate, f"{SFT} {settings} --lr={rate:g} --seed={seed}")


def batch():
    """The same rows in batches of several sizes, the best of three learning rates each (Figure 3)."""
    for name, settings in (LORA[2], LORA[3]):
        for size in (8, 32, 128):
            for rate in beside(0.002 if name == "full" else 0.02):
                yield Run(name, size, f"{SFT} {settings} --batch_size={size} --max_steps={1920 // size} --lr={rate:g} "
                                      "--seed=1")


def layers():
    """Attention alone, the MLPs alone, all: LoRAs of as many numbers (Figure 4)."""
    for targets, r in (("attention", 16), ("mlp", 9), ("all", 6)):
        for rate in beside(0.02):
            for seed in SEEDS[:2]:
                yield Run(targets, rate, f"{SFT} --method=lora --rank={r} --targets={targets} --lr={rate:g} "
                                         f"--seed={seed}")


def lora_rl():
    """RL at rank 1 and above, and on all weights (LoRA Without Regret, Figure 6)."""
    for name, settings in (LORA[0], LORA[2], LORA[3]):
        for rate in beside(0.0005 if name == "full" else 0.005):
            for seed in SEEDS[:2]:
                yield Run(name, rate, f"{RL} {settings} --lr={rate:g} --seed={seed}")


STUDIES = {f.__name__: f for f in (params, rates, tying, rank, precision, lora, batch, layers, lora_rl)}


def read_results(path):
    """{command: its line of the table}."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8", newline="") as f:
        return {row["command"]: row for row in csv.DictReader(f)}


def write_results(path, rows):
    with open(path + ".tmp", "w", encoding="utf-8", newline="") as f:
        table = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows[command] for command in sorted(rows))
    os.replace(path + ".tmp", path)


def execute(command):
    """Run a command in this process, without its output -> its line of the table."""
    script, *arguments = command.split()
    module, began, output = {"grpo.py": grpo, "sft.py": sft}[script], time.time(), io.StringIO()
    with tempfile.TemporaryDirectory() as work, redirect_stdout(output), redirect_stderr(output):
        cfg = configure(vars(module), [*arguments, f"--out_dir={work}/run"])
        module.train(cfg)
        with open(os.path.join(cfg.out_dir, "log.jsonl"), encoding="utf-8") as f:
            log = [json.loads(line) for line in f]
        first, *_, result = [line["eval"] for line in log if "eval" in line]
        if cfg.save_dtype != "float32":
            result |= evaluate_stored(cfg)
    rewards = [line["reward"] for line in log if "reward" in line][-5:]  # at temperature 1, of the last steps
    [numbers] = re.findall(r" with (\d+) numbers in ", output.getvalue())
    row = {"command": command, "numbers": numbers, "before": first["strict"], "accuracy": result["strict"],
           "stderr": result["stderr"],
           "reward": sum(rewards) / len(rewards) if rewards else "", "loss": result.get("loss", ""),
           "seconds": time.time() - began, "commit": grpo.revision()}
    return {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}


def evaluate_stored(cfg):
    """Greedy accuracy with the numbers as they were rounded for storage."""
    net = load_model(cfg.model, cfg.dtype, "cpu")
    tinylora.load_adapter(net, cfg.out_dir)
    return eval_math.evaluate(net, load_tokenizer(cfg.model), eval_math.load_problems(cfg.eval_dataset, "test"), cfg)


def start_worker():
    """One core for each, and Ctrl-C is the parent's."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main():
    names = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    cfg = configure(globals(), [arg for arg in sys.argv[1:] if arg.startswith("-")])
    unknown = [name for name in names if name not in STUDIES]
    if unknown or cfg.workers < 1:
        raise UserError(f"no study '{unknown[0]}'; there are {', '.join(STUDIES)}" if unknown else
                        f"workers must be at least 1, got {cfg.workers}")
    rows = read_results(cfg.results)
    commands = [point.command for name in names or STUDIES for point in STUDIES[name]()]
    missing = [command for command in dict.fromkeys(commands) if command not in rows]
    with multiprocessing.get_context("spawn").Pool(cfg.workers, start_worker) as pool:
        for row in tqdm(pool.imap_unordered(execute, missing), total=len(missing), unit="run"):
            rows[row["command"]] = row
            write_results(cfg.results, rows)
            tqdm.write(" ".join(f"{key}={row[key]}" for key in ("accuracy", "reward", "loss")) + f" {row['command']}")
    print(f"{len(missing)} runs done, {len(set(commands)) - len(missing)} were there; python -m lab.plot draws them")


if __name__ == "__main__":
    run(main)
