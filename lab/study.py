"""The experiments of both papers: lists of commands, run one after another.

    python -m lab.study                 # what the papers claim, on the toy: two hours on two cores
    python -m lab.study rates           # how the learning rates were chosen: ten minutes
    python -m lab.study es_rates es     # evolution strategies: half an hour
    python -m lab.study params          # one of them: a name in STUDIES
    python -m lab.plot params           # its figure
    python -m lab.study gsm8k_sizes --workers=1 --results=models.csv     # one in PAPERS: for a GPU
    python -m lab.study controls        # rewards that know less than the answer: lab/controls.py
    python -m lab.study curves          # the loss step by step, and norms: lab/curves.py
    python -m lab.study landscape       # no table of runs, but what is around v: lab/landscape.py

A run is a command of grpo.py or sft.py, and a line of the table `results` says what came out. A
command that has its line is not run again, so a study that was stopped goes on where it was. To
repeat a run, delete its line.
"""

import csv
import fcntl
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from statistics import mean

import torch
from tqdm import tqdm

import grpo
import lab.capacity
import lab.es
import lab.precision
import sft
from configurator import at_least, configure
from lab.make_bases import BASES, make_missing
from model import load_tokenizer
from support import UserError, one_line_errors, whole_file
from support.parallel import Ranks
from tinylora import load_adapted


@dataclass
class Settings:
    results: str = "lab/results/toy.csv"  # the table: a line for each run
    out_dir: str = "out/study"  # a directory for each run: its log, its adapter, its checkpoint
    workers: int = 2  # runs at a time, which share the cores


LANDSCAPE = "lab/results/landscape.csv"
COLUMNS = ("command", "numbers", "before", "accuracy", "stderr", "reward", "loss", "seconds",
           "commit", "error")
Point = namedtuple("Point", "series x command")  # of a figure: the curve, the place, the run
RL, SFT = "grpo.py config/toy_rl.py", "sft.py config/toy_sft.py"
OWN_WORDS = f"{SFT} --dataset=toy/train.jsonl --eval_dataset=toy/test.jsonl"  # solutions in them

# The sizes of the papers' figures: a name, the settings, and for RL and for SFT a learning rate at
# or next to the best one of rates().
SIZES = [
    ("1", "--n_tie=21", 0.05, 0.01),
    ("4", "--n_tie=6", 0.05, 0.01),
    ("7", "--n_tie=3", 0.02, 0.01),
    ("13", "--n_tie=0 --rank=1 --u=13", 0.005, 0.002),
    ("21", "--n_tie=1", 0.05, 0.005),
    ("84", "--u=4", 0.01, 0.01),
    ("1344", "--method=lora_xs --rank=8", 0.005, 0.02),
    ("LoRA 1", "--method=lora --rank=1", 0.001, 0.002),
    ("LoRA 16", "--method=lora --rank=16", 0.001, 0.002),
    ("full", "--method=full", 0.0001, 0.0005),
]
LORA = {"LoRA 1": "--method=lora --rank=1", "LoRA 4": "--method=lora --rank=4",
        "LoRA 16": "--method=lora --rank=16", "LoRA 128": "--method=lora --rank=128",
        "full, linears": "--method=full --targets=attention,mlp",  # what a LoRA can change
        "full, every weight": "--method=full"}
SEEDS = (1, 2, 3)


# --------------------------------------------------------------------------- the studies of the toy

def beside(rate, steps=(-1, 0, 1)):
    """Rates on the grid 1, 2, 5, 10 ... around one of them."""
    grid = [float(f"{digit}e{power}") for power in range(-6, 1) for digit in (1, 2, 5)]
    return [grid[grid.index(rate) + step] for step in steps]


def rates():
    """Learning rates beside the best one, for every size (one seed)."""
    for name, settings, rl_rate, sft_rate in SIZES:
        for rate in beside(rl_rate):
            yield Point(f"RL: {name}", rate, f"{RL} {settings} --lr={rate:g} --seed=1")
        for rate in beside(sft_rate):
            yield Point(f"SFT: {name}", rate, f"{SFT} {settings} --lr={rate:g} --seed=1")


def params():
    """Accuracy against trained numbers (Learning to Reason in 13 Parameters, Figures 1 and 2)."""
    def points(series, run, settings, rate):
        for seed in SEEDS:
            yield Point(series, "numbers", f"{run} {settings} --lr={rate:g} --seed={seed}")

    for name, settings, rl_rate, sft_rate in SIZES:
        mark = " (13 for all, rank 1)" if name == "13" else ""  # other TinyLoRAs have rank 2
        yield from points(f"RL{mark}", RL, settings, rl_rate)
        yield from points(f"SFT, other words{mark}", SFT, settings, sft_rate)
        if name in ("1", "13", "21", "LoRA 1", "full"):
            yield from points(f"SFT, own words{mark}", OWN_WORDS, settings, sft_rate)
    yield from points("RL (13 for all, rank 2)", RL, "--n_tie=0 --u=13", 0.01)
    yield from points("RL", RL, "--n_tie=2", 0.05)


def tying():
    """Who shares a number: neighbours, linears of one type, or all linears, which then have several
    numbers (section 6.5)."""
    def point(series, settings, rate, seed):
        return Point(series, "numbers", f"{RL} {settings} --lr={rate:g} --seed={seed}")

    for seed in SEEDS:
        yield point("tiled", "--n_tie=1", 0.05, seed)
        yield point("structured", "--n_tie=1", 0.05, seed)  # the same run: nothing is shared
        for n_tie, rate in ((2, 0.05), (3, 0.02)):
            yield point("tiled", f"--n_tie={n_tie}", rate, seed)
            yield point("structured", f"--n_tie={n_tie} --tie=structured", rate, seed)
        for u, rate in ((4, 0.05), (7, 0.02), (13, 0.01), (21, 0.01)):
            yield point("one group", f"--n_tie=0 --u={u}", rate, seed)
        yield point("attention/mlp", "--n_tie=0 --u=13 --targets=attention/mlp", 0.01, seed)


def rank():
    """The frozen rank r, with 13 numbers for all linears and with one for each (section 6.5, Figure
    7)."""
    for seed in SEEDS:
        for r in (1, 2, 4, 8):
            yield Point("u = 13, one group", r,
                        f"{RL} --n_tie=0 --rank={r} --u=13 --lr=0.01 --seed={seed}")
            yield Point("u = 1, untied", r, f"{RL} --rank={r} --lr=0.05 --seed={seed}")


def precision():
    """Numbers that are stored, or trained as well, in 16 bits (Figure 4), and a frozen model in 16
    bits."""
    for name, settings, rate, _ in SIZES:
        if name not in ("4", "13", "84"):
            continue
        run = f"config/toy_rl.py {settings} --lr={rate:g}"
        for seed in SEEDS:
            yield Point(f"{name} numbers: stored", "float32", f"grpo.py {run} --seed={seed}")
            for dtype in ("bfloat16", "float16"):
                rounded = f"{run} --save_dtype={dtype} --seed={seed}"
                yield Point(f"{name} numbers: stored", dtype, f"grpo.py {rounded}")
                yield Point(f"{name} numbers: trained", dtype, f"-m lab.precision {rounded}")
            if name == "13":
                yield Point("13 numbers: model", "bfloat16",
                            f"grpo.py {run} --dtype=bfloat16 --seed={seed}")


def some_sizes(series, model, names):
    """Accuracy of a base model by some of SIZES."""
    for name, settings, rate, _ in SIZES:
        if name in names:
            for seed in SEEDS:
                run = f"{RL} {settings} --lr={rate:g} --seed={seed}"
                other = f" --model={model}" if model != "toy/base" else ""
                yield Point(series, "numbers", run + other)


def bases():
    """Bases that work 10, 20 or 40 of 100 answers out (does the paper's Llama need more numbers
    than its Qwen because of what the base does already?)."""
    for share, model in ((10, BASES["worked10"]), (20, BASES["worked20"]), (40, "toy/base")):
        yield from some_sizes(f"{share} %", model, ("1", "13", "84", "1344", "LoRA 1"))


def widths():
    """Models of three widths (Figures 3 and 6, where a larger model needs fewer numbers)."""
    for width, model in ((80, BASES["width80"]), (96, BASES["width96"]), (128, "toy/base")):
        yield from some_sizes(f"width {width}", model, ("1", "4", "13", "84", "LoRA 1"))


def lora():
    """The learning rates of LoRA and of full fine-tuning, supervised (LoRA Without Regret, Figure
    2)."""
    for name, settings in LORA.items():
        rates = beside(0.001, (-2, -1, 0, 1)) if "full" in name else beside(0.002)
        for rate in rates:
            for seed in SEEDS[:2]:
                yield Point(name, rate, f"{SFT} {settings} --lr={rate:g} --seed={seed}")


def steps():
    """The learning rates of LoRA and of full fine-tuning by the steps of a run (LoRA Without
    Regret: 15 times as high under 100 steps, then 10 times)."""
    for name, rates in (("LoRA 16", (0.001, 0.002, 0.005, 0.01, 0.02)),
                        ("full, linears", (0.0002, 0.0005, 0.001, 0.002, 0.005))):
        for count in (25, 100, 400):
            for rate in rates[:-1] if count == 400 else rates[1:]:
                for seed in SEEDS:
                    yield Point(f"{count} steps: {name}", rate, f"{SFT} {LORA[name]} "
                                f"--batch_size=8 --max_steps={count} --lr={rate:g} --seed={seed}")


def batch():
    """The same rows in batches of several sizes, two learning rates each (Figure 3)."""
    for name in ("LoRA 16", "full, linears"):
        for size in (8, 32, 128):
            steps = (0, 1) if size > 32 else (-1, 0)
            for rate in beside(0.001 if "full" in name else 0.002, steps):
                for seed in SEEDS[:2]:
                    yield Point(name, size, f"{SFT} {LORA[name]} --batch_size={size} "
                                f"--max_steps={3200 // size} --lr={rate:g} --seed={seed}")


def layers():
    """LoRAs with equally many numbers on attention, on the MLPs, and on both (Figure 4)."""
    for targets, r, best in (("attention", 16, 0.005), ("mlp", 9, 0.005), ("all", 6, 0.002)):
        for rate in beside(best):
            for seed in SEEDS:
                yield Point(targets, rate, f"{SFT} --method=lora --rank={r} --targets={targets} "
                            f"--lr={rate:g} --seed={seed}")


def layers_rl():
    """RL with equally many numbers on attention, on the MLPs, and on both."""
    thirteen = "--n_tie=0 --rank=1 --u=13"
    for targets, r in (("attention", 16), ("mlp", 9), ("all", 6)):
        own = "" if targets == "all" else f" --targets={targets}"
        for name, settings, best in (("13 numbers", thirteen, 0.005),
                                     ("LoRA, 43,000 numbers", f"--method=lora --rank={r}", 0.0005)):
            for rate in beside(best):
                for seed in SEEDS:
                    yield Point(f"{name}: {targets}", rate,
                                f"{RL} {settings} --lr={rate:g} --seed={seed}{own}")


def lora_rl():
    """RL with LoRA of rank 1 and 16, and with all weights (LoRA Without Regret, Figure 6)."""
    for name in ("LoRA 1", "LoRA 16", "full, linears", "full, every weight"):
        for rate in beside(0.0001 if "full" in name else 0.001, (-2, -1, 0, 1, 2)):
            for seed in SEEDS[:2]:
                yield Point(name, rate, f"{RL} {LORA[name]} --lr={rate:g} --seed={seed}")


def capacity():
    """Bits of random digits that a trained number holds (LoRA Without Regret: some 2)."""
    for name, settings, rate, answers in (
            ("13 numbers (53 bits to learn)", "--n_tie=0 --rank=1 --u=13", 0.1, 2),
            ("84 numbers (345 bits)", "--n_tie=1 --rank=2 --u=4", 0.05, 13),
            ("336, LoRA-XS 4 (1,355 bits)", "--method=lora_xs --rank=4", 0.1, 51),
            ("7,296, LoRA 1 (1,701 bits)", "--method=lora --rank=1", 0.005, 64)):
        for passes in (100, 300, 1000) if answers < 50 else (100, 300):
            for seed in SEEDS:
                yield Point(name, passes, f"-m lab.capacity {settings} --batch_size={answers} "
                            f"--max_steps={passes} --lr={rate:g} --seed={seed}")


# Sigma and learning rate of evolution strategies: those tried for each size, and those of es().
ES = "-m lab.es config/toy_rl.py"
ES_RATES = {
    "1": ((0.02, 0.05, 0.1), (0.02, 0.05)),
    "4": ((0.01, 0.02, 0.05, 0.1), (0.01, 0.02, 0.05)),
    "13": ((0.01, 0.02, 0.03, 0.05), (0.005, 0.01, 0.02)),
    "84": ((0.002, 0.005, 0.01, 0.02), (0.005, 0.01, 0.02)),
    "1344": ((0.001, 0.002, 0.005, 0.01), (0.0005, 0.001, 0.002)),
}
ES_BEST = {"1": (0.1, 0.02), "4": (0.1, 0.01), "13": (0.03, 0.01), "84": (0.005, 0.01),
           "1344": (0.002, 0.0005)}


def es_rates():
    """Evolution strategies: sigma and learning rate for every size, 7,680 answers (one seed)."""
    for name, settings, _, _ in SIZES:
        sigmas, rates = ES_RATES.get(name, ((), ()))
        for rate in rates:
            for sigma in sigmas:
                run = f"{ES} {settings} --sigma={sigma:g} --lr={rate:g} --seed=1"
                yield Point(f"trained: {name}: lr = {rate:g}", sigma, run)
                if name == "13" and rate > 0.005:
                    yield Point(f"trained: 13: lr = {rate:g}, sampled", sigma,
                                f"{run} --temperature=1")


def es():
    """GRPO and evolution strategies at equal numbers of sampled answers (Qiu et al. 2025)."""
    for name, settings, rl_rate, _ in SIZES:
        if name not in ES_BEST:
            continue
        sigma, rate = ES_BEST[name]
        for answers in (1920, 3840, 7680):
            steps = "" if answers == 3840 else f" --max_steps={answers // 128}"
            generations = "" if answers == 7680 else f" --max_steps={answers // 256}"
            for seed in SEEDS:
                yield Point(f"trained: {name}: GRPO", answers,
                            f"{RL} {settings} --lr={rl_rate:g} --seed={seed}{steps}")
                yield Point(f"trained: {name}: ES", answers, f"{ES} {settings} --sigma={sigma:g} "
                            f"--lr={rate:g} --seed={seed}{generations}")


# ----------------------- the papers' own experiments, as far as their settings are known: for a GPU

# All weights take 16 bytes a number: 122 GB for the 7B. Where that does not fit, run the command by
# hand, under torchrun and with --shard=8.
FULL = "--method=full --recompute=True"
PAPER_RATES = (1e-7, 5e-7, 1e-6, 5e-6, 1e-5, 1e-4, 2e-4)  # the paper's sweep (section 5.1)
PAPER_SIZES = [f"--u=1 --n_tie={n}" for n in (256, 128, 64, 32, 16, 8, 4, 2, 1)]  # 256: all
PAPER_SIZES += [f"--u=64 --n_tie={n}" for n in (256, 8, 1)]  # of the 7B: 64, 1,600, 12,544 numbers
# Figure 1 also has a tied LoRA-XS, and r = 512. Here it is not tied, and its P take r^4 numbers.
PAPER_SIZES += [f"--method=lora_xs --rank={r}" for r in (1, 4, 8, 16, 64)]
PAPER_SIZES += [f"--method=lora --rank={r}" for r in (1, 2, 8, 32, 64, 128, 256)]
PAPER_SIZES += [FULL]
MODELS = ("qwen7b", "qwen3b", "qwen1.5b", "qwen0.5b", "llama3b", "llama8b")


def swept(series, x, run):
    """A point of a figure: the run at every rate of the paper's sweep, three seeds each."""
    for rate in PAPER_RATES:
        for seed in SEEDS:
            yield Point(series, x, f"{run} --lr={rate:g} --seed={seed}")


def gsm8k_sizes():
    """RL and SFT of Qwen2.5-7B on GSM8K over sizes (Figures 1 and 2)."""
    for settings in PAPER_SIZES:
        yield from swept("RL", "numbers", f"grpo.py config/qwen7b_u13.py {settings}")
        yield from swept("SFT", "numbers", f"sft.py config/qwen7b_sft.py {settings}")


def gsm8k_models():
    """RL on GSM8K over sizes for every model (Figures 3 and 6)."""
    for model in MODELS:
        for settings in PAPER_SIZES:
            yield from swept(model, "numbers", f"grpo.py config/{model}_u13.py {settings}")


def math_sizes():
    """RL on MATH over sizes (Table 2). These are its benchmarks; how the paper samples is unknown:

        python eval_math.py --model=MODEL --adapter=out/study/RUN --prompt_template=boxed
            --max_new_tokens=3072 --dataset=gsm8k,math500,minerva,olympiad,aime24,amc23

    A run of all weights has no KL penalty here, and is --model=out/study/RUN/model; the table's are
    SimpleRL's. The paper does not say at which rank u is 512: here at 32.
    """
    for model in ("qwen3b", "qwen7b", "qwenmath7b"):
        for settings in ("--n_tie=16", "--n_tie=4", "--n_tie=1", "--n_tie=1 --u=2",
                         "--n_tie=1 --u=32", "--n_tie=1 --u=512 --rank=32", f"{FULL} --kl_coef=0"):
            yield from swept(model, "numbers", f"grpo.py config/{model}_math.py {settings}")


def ablations():
    """Frozen rank, u and tying of two models, precision of the 3B (Figures 4, 7, 8 and 9)."""
    for model in ("qwen3b", "llama3b"):
        for u in (1, 4, 16, 64):
            run = f"grpo.py config/{model}_u13.py --u={u}"
            for r in (1, 2, 4, 16, 64):
                yield from swept(f"{model}, frozen rank: u = {u}", r, f"{run} --rank={r} --n_tie=1")
            for n_tie in (1, 8, 64, 512):
                yield from swept(f"{model}, tying: n_tie = {n_tie}", "numbers",
                                 f"{run} --n_tie={n_tie}")
    for n_tie in (32, 16, 8, 4, 2, 1):
        for tie in ("tiled", "structured"):
            for dtype in ("float32", "bfloat16", "float16"):
                run = f"-m lab.precision config/qwen3b_u13.py --u=1 --n_tie={n_tie} --tie={tie}"
                yield from swept(f"qwen3b, precision: {tie}, {dtype}", "numbers",
                                 f"{run} --save_dtype={dtype}")


# LoRA Without Regret names no seeds and no rates, and for RL no rank but 1.
THOUGHTS = "sft.py config/llama8b_openthoughts_lora.py"


def regret_rates():
    """Learning rates of LoRA by rank, and of full fine-tuning (LoRA Without Regret, Figures 1 and
    2)."""
    for data, run in (("Tulu3", "sft.py config/tulu3_lora.py"), ("OpenThoughts3", THOUGHTS)):
        for r in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
            for rate in (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3):
                yield Point(f"{data}: LoRA {r}", rate, f"{run} --rank={r} --lr={rate:g}")
        for rate in (5e-6, 1e-5, 2e-5, 5e-5, 1e-4):
            yield Point(f"{data}: full", rate, f"{run} {FULL} --lr={rate:g}")


def regret_batch():
    """The same 10,000 rows in batches of several sizes, three learning rates each (Figure 3)."""
    for size in (32, 64, 128, 256):
        for name, settings, rates in (("LoRA 128", "--rank=128", (2e-4, 5e-4, 1e-3)),
                                      ("full", FULL, (2e-5, 5e-5, 1e-4))):
            for rate in rates:
                yield Point(name, size, f"{THOUGHTS} {settings} --batch_size={size} "
                            f"--max_steps={10000 // size} --lr={rate:g}")


def regret_layers():
    """LoRA on attention, on the MLPs, and on both (Figures 4 and 5)."""
    for targets, r in (("attention", 256), ("mlp", 256), ("mlp", 128), ("all", 256)):
        for rate in (5e-5, 1e-4, 2e-4, 5e-4, 1e-3):
            yield Point(f"{targets} {r}", rate,
                        f"{THOUGHTS} --targets={targets} --rank={r} --lr={rate:g}")


def regret_rl():
    """RL with LoRA, and with all weights (Figures 6 to 8)."""
    for data, config in (("MATH", "llama8b_math_lora"), ("GSM8K", "llama8b_gsm8k_lora"),
                         ("DeepMath", "qwen3-8b_deepmath_lora")):
        for name, settings, rates in (("LoRA 1", "--rank=1", (1e-5, 3e-5, 1e-4, 3e-4)),
                                      ("LoRA 64", "--rank=64", (1e-5, 3e-5, 1e-4, 3e-4)),
                                      ("full", FULL, (1e-6, 3e-6, 1e-5, 3e-5))):
            for rate in rates:
                yield Point(f"{data}: {name}", rate,
                            f"grpo.py config/{config}.py {settings} --lr={rate:g}")


STUDIES = {study.__name__: study for study in (
    params, rates, tying, rank, precision, bases, widths, lora, steps, batch, layers, lora_rl,
    layers_rl, capacity, es_rates, es)}
ON_DEMAND = ("rates", "es_rates", "es")  # run by name only: sweeps, and another paper's method
PAPERS = {study.__name__: study for study in (gsm8k_sizes, gsm8k_models, math_sizes, ablations,
                                              regret_rates, regret_batch, regret_layers, regret_rl)}


# ---------------------------------------------------------------------------------------- the table

def read_results(path, columns=COLUMNS):
    """{command: its line of the table}."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8", newline="") as f:
        table = csv.DictReader(f)
        if tuple(table.fieldnames or ()) != columns:
            raise UserError(f"{path} is no table of runs: its columns are not {', '.join(columns)}")
        return {row["command"]: row for row in table}


def write_results(path, rows, columns=COLUMNS):
    with whole_file(path) as aside, open(aside, "w", encoding="utf-8", newline="") as f:
        table = csv.DictWriter(f, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


@contextmanager
def lock(directory):
    """Wait until no other study holds this lock, since two of them may write to one table."""
    held = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


# ----------------------------------------------------------------------------------------- the runs

SCRIPTS = {"grpo.py": (grpo, [grpo.reward, grpo.problems]), "sft.py": (sft, [grpo.reward]),
           "lab.capacity": (lab.capacity, [grpo.reward]),
           "lab.es": (lab.es, [grpo.reward, grpo.problems]),
           "lab.precision": (lab.precision, [grpo.reward, grpo.problems])}


def execute(command, runs):
    """Run a command in this process, without its output, in a directory of its own below `runs`.
    Returns its line of the table. An error is noted there, and the other runs go on: for example, a
    learning rate may be too high."""
    script, *arguments = command.removeprefix("-m ").split()
    module, functions = SCRIPTS[script]
    commit, began, output = revision(), time.time(), io.StringIO()
    out_dir = os.path.join(runs, directory_name(command, commit))
    checkpoint = os.path.join(out_dir, "checkpoint.safetensors")
    row = dict.fromkeys(COLUMNS, "") | {"command": command, "commit": commit}
    try:
        with redirect_stdout(output), redirect_stderr(output):
            arguments.append(f"--out_dir={out_dir}")
            cfg = configure(module.Settings, *functions, argv=arguments)
            if os.path.exists(checkpoint):  # only a run that was stopped leaves one
                cfg.init_from = "resume"
            module.train(cfg)
            row |= outcome(cfg, output.getvalue())
            os.remove(checkpoint)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
    row["seconds"] = time.time() - began
    for key, value in row.items():
        row[key] = f"{value:.4g}" if isinstance(value, float) else value
    return row


def revision():
    """The commit of this code, with a + if files differ from it other than in lab/results; empty if
    git cannot tell."""
    def git(*arguments):
        command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("diff", "--name-only", "HEAD", "--", ":/", ":(top,exclude)lab/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except OSError:
        return ""


def directory_name(command, commit):
    """Readable, and different for every command and every version of the code."""
    words = command.replace("config/", "").replace("--", "")
    digest = zlib.crc32(f"{command} {commit}".encode())
    return f"{re.sub(r'[^a-zA-Z0-9_.=]+', '_', words)[:150]}_{digest:08x}"


def outcome(cfg, printed):
    """What a finished run fills into its line: from its log, and from what it printed."""
    with open(os.path.join(cfg.out_dir, "log.jsonl"), encoding="utf-8") as f:
        log = [json.loads(line) for line in f]
    evaluations = [line["eval"] for line in log if "eval" in line] or [{}]
    steps = [line for line in log if "eval" not in line][-5:]
    first, last = evaluations[0], evaluations[-1]
    if cfg.save_dtype != "float32":
        last = evaluate_stored(cfg)
    numbers = re.search("(?:trains|evolves) ([0-9,]+) numbers", printed)[1].replace(",", "")
    found = {"numbers": numbers, "before": first.get("reward", ""),
             "accuracy": last.get("reward", ""), "stderr": last.get("stderr", "")}
    if "reward" in steps[0]:  # at temperature 1
        return found | {"reward": mean(line["reward"] for line in steps)}
    return found | {"loss": last.get("loss", mean(line["loss"] for line in steps))}


def evaluate_stored(cfg):
    """The last evaluation again, with the numbers as they were rounded for storage."""
    net = load_adapted(cfg.model, cfg.out_dir, cfg.dtype, cfg.device)
    tokenizer = load_tokenizer(cfg.model)
    test_set = cfg.problems(cfg, "test")[: cfg.eval_size or None]
    grpo.prepare(net, tokenizer, test_set, cfg)
    return grpo.evaluate(net, tokenizer, test_set, cfg, Ranks(cfg.device))


def start_worker(threads):
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    parent = multiprocessing.parent_process()

    def end_with_parent():
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def execute_all(commands, cfg):
    """Run the commands in cfg.workers processes, and write each line when it is there. Returns how
    many runs have failed."""
    directory = os.path.dirname(cfg.results) or "."
    os.makedirs(directory, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // cfg.workers)
    spawn = multiprocessing.get_context("spawn")
    failed = 0
    with ProcessPoolExecutor(cfg.workers, spawn, start_worker, (threads,)) as pool:
        try:
            runs = [pool.submit(execute, command, cfg.out_dir) for command in commands]
            for run in tqdm(as_completed(runs), total=len(runs), unit="run", disable=None):
                row = run.result()
                with lock(directory):
                    rows = read_results(cfg.results) | {row["command"]: row}
                    write_results(cfg.results, [rows[command] for command in sorted(rows)])
                failed += row["error"] != ""
                shown = [f"{key} {row[key]}" for key in ("accuracy", "reward", "loss", "error")
                         if row[key] != ""]
                tqdm.write("  ".join([*shown, row["command"]]))
        except BrokenProcessPool:
            raise UserError("a worker was killed, perhaps because memory ran out: use fewer "
                            f"--workers. What is done is in {cfg.results}; the same command goes "
                            "on from there") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.kill()  # after SIGTERM it would save its run and begin the next one
            raise
    return failed


def main():
    names = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    cfg = configure(Settings, argv=[arg for arg in sys.argv[1:] if arg.startswith("-")])
    at_least(cfg, 1, "workers")
    studies = STUDIES | PAPERS
    for name in names:
        if name not in [*studies, "controls", "curves", "landscape"]:
            raise UserError(f"no study '{name}'; there are {', '.join(STUDIES)}, controls, curves, "
                            f"landscape, and for a GPU {', '.join(PAPERS)}")
    for name in ("controls", "curves"):
        if name in names or not names:
            command = [sys.executable, "-m", f"lab.{name}", f"--out_dir={cfg.out_dir}/{name}"]
            subprocess.run(command, check=True)
    if "landscape" in names or not names and not os.path.exists(LANDSCAPE):
        command = [sys.executable, "-m", "lab.landscape", f"--landscape={LANDSCAPE}",
                   f"--out_dir={cfg.out_dir}/landscape"]
        subprocess.run(command, check=True)
    chosen = names or [name for name in STUDIES if name not in ON_DEMAND]
    points = [point for name in chosen if name in studies for point in studies[name]()]
    commands = list(dict.fromkeys(point.command for point in points))
    errors = {command: row["error"] for command, row in read_results(cfg.results).items()}
    # A run that failed may have lacked memory or disk, and is repeated. One that diverged would
    # diverge again.
    done = [command for command, error in errors.items() if not error or "not finite" in error]
    missing = [command for command in commands if command not in done]
    make_missing(missing)
    failed = execute_all(missing, cfg)
    print(f"{len(missing)} runs done, {len(commands) - len(missing)} were in {cfg.results}"
          + (f"; {failed} failed, for reasons that stand there" if failed else ""))


if __name__ == "__main__":
    one_line_errors()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the workers, as Ctrl-C does
    main()
