"""The experiments of both papers: lists of commands, run one after another.

    python -m lab.study                       # all studies of the toy
    python -m lab.study params                # one of them: a name in STUDIES
    python -m lab.plot params                 # its figure
    python -m lab.study gsm8k_sizes --workers=1 --results=lab/results/models.csv     # a name in PAPERS: on a GPU

A run is a command of grpo.py or sft.py. What came out of it is a line of the table `results`; a command that has its
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
import threading
import time
import zlib
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from statistics import mean

import torch
from tqdm import tqdm

import eval_math
import grpo
import sft
import tinylora
from configurator import UserError, configure, run, whole_file
from model import load_model, load_tokenizer

results = "lab/results/toy.csv"  # a line a run
out_dir = "out/study"  # a folder a run: its log and adapter; a run that was stopped goes on from its checkpoint
workers = 2  # runs at a time, which share the cores

COLUMNS = ("command", "numbers", "before", "accuracy", "stderr", "reward", "loss", "seconds", "commit", "error")
Run = namedtuple("Run", "series x command")  # a point of a figure: its curve, its place on the axis, how it is made
RL, SFT = "grpo.py config/toy_rl.py", "sft.py config/toy_sft.py"

# The sizes of the papers' figures: name, settings, and learning rates at or next to the best of `rates`, RL and SFT.
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
        for n_tie, rate in ((1, 0.05), (2, 0.05), (3, 0.02)):
            for tie in ("tiled", "structured"):
                option = " --tie=structured" if tie == "structured" and n_tie > 1 else ""  # n_tie = 1: the same run
                yield Run(tie, "numbers", f"{RL} --n_tie={n_tie}{option} --lr={rate:g} --seed={seed}")
        for u, rate in ((4, 0.05), (7, 0.02), (13, 0.01), (21, 0.01)):
            yield Run("one group", "numbers", f"{RL} --n_tie=0 --u={u} --lr={rate:g} --seed={seed}")
        yield Run("attention/mlp", "numbers", f"{RL} --n_tie=0 --u=13 --targets=attention/mlp --lr=0.01 --seed={seed}")


def rank():
    """The frozen rank r, with 13 numbers for all linears and with one for each (section 6.5, Figure 7)."""
    for seed in SEEDS:
        for r in (1, 2, 4, 8):
            yield Run("u = 13, one group", r, f"{RL} --n_tie=0 --rank={r} --u=13 --lr=0.01 --seed={seed}")
            yield Run("u = 1, untied", r, f"{RL} --rank={r} --lr=0.05 --seed={seed}")


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
        for rate in beside(0.001 if name == "full" else 0.002, (-2, -1, 0, 1)):
            for seed in SEEDS[:2]:
                yield Run(name, rate, f"{SFT} {settings} --lr={rate:g} --seed={seed}")


def batch():
    """The same rows in batches of several sizes, the better of two learning rates each (Figure 3)."""
    for name, settings in (LORA[2], LORA[3]):
        for size in (8, 32, 128):
            for rate in beside(0.001 if name == "full" else 0.002, (0, 1) if size > 32 else (-1, 0)):
                for seed in SEEDS[:2]:
                    yield Run(name, size, f"{SFT} {settings} --batch_size={size} --max_steps={3200 // size} "
                                          f"--lr={rate:g} --seed={seed}")


def layers():
    """Attention alone, the MLPs alone, all: LoRAs of as many numbers (Figure 4)."""
    for targets, r in (("attention", 16), ("mlp", 9), ("all", 6)):
        for rate in beside(0.002):
            for seed in SEEDS:
                yield Run(targets, rate, f"{SFT} --method=lora --rank={r} --targets={targets} --lr={rate:g} "
                                         f"--seed={seed}")


def lora_rl():
    """RL at rank 1 and above, and on all weights (LoRA Without Regret, Figure 6)."""
    for name, settings in (LORA[0], LORA[2], LORA[3]):
        for rate in beside(0.0001 if name == "full" else 0.001, (-2, -1, 0, 1, 2)):
            for seed in SEEDS[:2]:
                yield Run(name, rate, f"{RL} {settings} --lr={rate:g} --seed={seed}")


# The same for the real models, as far as the papers publish their settings: for a GPU.
PAPER_RATES = (1e-7, 5e-7, 1e-6, 5e-6, 1e-5, 1e-4, 2e-4)  # the paper's sweep (section 5.1)
PAPER_SIZES = [*(f"--u=1 --n_tie={n}" for n in (256, 128, 64, 32, 16, 8, 4, 2, 1)), "--u=64 --n_tie=1",
               *(f"--method=lora_xs --rank={r}" for r in (4, 8, 64)),
               *(f"--method=lora --rank={r}" for r in (1, 8, 64, 256)), "--method=full"]
MODELS = ("qwen7b", "qwen3b", "qwen1.5b", "qwen0.5b", "llama3b", "llama8b")


def gsm8k_sizes():
    """RL and SFT on GSM8K over sizes, the best of the learning rates, three seeds (Figures 1 and 2): Qwen2.5-7B."""
    for settings in PAPER_SIZES:
        for rate in PAPER_RATES:
            for seed in SEEDS:
                yield Run("RL", "numbers", f"grpo.py config/qwen7b_u13.py {settings} --lr={rate:g} --seed={seed}")
                yield Run("SFT", "numbers", f"sft.py config/qwen7b_sft.py {settings} --lr={rate:g} --seed={seed}")


def gsm8k_models():
    """RL on GSM8K over sizes for every model (Figures 3 and 6)."""
    for model in MODELS:
        for settings in PAPER_SIZES:
            for rate in PAPER_RATES:
                yield Run(model, "numbers", f"grpo.py config/{model}_u13.py {settings} --lr={rate:g} --seed=1")


def math_sizes():
    """RL on MATH over sizes (Table 2); `eval_math.py --dataset=gsm8k,math500,minerva,...` grades the adapters."""
    for model in ("qwen3b", "qwen7b", "qwenmath7b"):
        for settings in ("--n_tie=16", "--n_tie=4", "--n_tie=1", "--n_tie=1 --u=2", "--n_tie=1 --u=32",
                         "--n_tie=1 --u=512 --rank=32", "--method=full --kl_coef=0"):
            for rate in PAPER_RATES:
                yield Run(model, "numbers", f"grpo.py config/{model}_math.py {settings} --lr={rate:g}")


def ablations():
    """Frozen rank, u, tying, and storage on the 3B (Figures 4, 7, 8)."""
    run = "grpo.py config/qwen3b_u13.py"
    for r in (1, 2, 4, 16, 64):
        for u in (1, 4, 16, 64):
            yield Run(f"frozen rank: u = {u}", r, f"{run} --rank={r} --u={u} --n_tie=1")
    for n_tie in (1, 8, 64, 512):
        for u in (1, 4, 16, 64):
            yield Run(f"numbers, by tying: n_tie = {n_tie}", "numbers", f"{run} --u={u} --n_tie={n_tie}")
    for n_tie in (32, 16, 8, 4, 2, 1):
        for tie in ("tiled", "structured"):
            for stored in ("float32", "bfloat16", "float16"):
                yield Run(f"numbers, by storage: {tie}, {stored}", "numbers",
                          f"{run} --u=1 --n_tie={n_tie} --tie={tie} --save_dtype={stored}")


CHAT = "sft.py config/llama8b_openthoughts_lora.py"


def regret_rates():
    """Learning rates of LoRA by rank, and of full fine-tuning (LoRA Without Regret, Figure 2)."""
    for r in (1, 4, 16, 64, 256, 512):
        for rate in (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3):
            yield Run(f"LoRA {r}", rate, f"{CHAT} --rank={r} --lr={rate:g}")
    for rate in (5e-6, 1e-5, 2e-5, 5e-5, 1e-4):
        yield Run("full", rate, f"{CHAT} --method=full --lr={rate:g}")


def regret_batch():
    """The same rows in batches of several sizes, the best of three learning rates each (Figure 3)."""
    for size in (32, 64, 128, 256):
        for name, settings, rates in (("LoRA 128", "--rank=128", (2e-4, 5e-4, 1e-3)),
                                      ("full", "--method=full", (2e-5, 5e-5, 1e-4))):
            for rate in rates:
                yield Run(name, size, f"{CHAT} {settings} --batch_size={size} --max_steps={32000 // size} "
                                      f"--lr={rate:g}")


def regret_layers():
    """Attention alone, the MLPs alone, all, the best of three learning rates each (Figures 4 and 5)."""
    for targets, r in (("attention", 256), ("mlp", 128), ("all", 128)):
        for rate in (1e-4, 2e-4, 5e-4):
            yield Run(targets, "numbers", f"{CHAT} --targets={targets} --rank={r} --lr={rate:g}")


def regret_rl():
    """RL at rank 1 and above, and on all weights (Figure 6)."""
    for name, settings, rates in (("LoRA 1", "--rank=1", (1e-5, 3e-5, 1e-4, 3e-4)),
                                  ("LoRA 64", "--rank=64", (1e-5, 3e-5, 1e-4, 3e-4)),
                                  ("full", "--method=full", (1e-6, 3e-6, 1e-5, 3e-5))):
        for rate in rates:
            yield Run(name, rate, f"grpo.py config/llama8b_math_lora.py {settings} --lr={rate:g}")


PAPERS = {f.__name__: f for f in (gsm8k_sizes, gsm8k_models, math_sizes, ablations, regret_rates, regret_batch,
                                  regret_layers, regret_rl)}
STUDIES = {f.__name__: f for f in (params, rates, tying, rank, precision, lora, batch, layers, lora_rl)}


def read_results(path):
    """{command: its line of the table}."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8", newline="") as f:
        table = csv.DictReader(f)
        if tuple(table.fieldnames or ()) != COLUMNS:
            raise UserError(f"{path} is no table of runs: its columns are not {', '.join(COLUMNS)}")
        return {row["command"]: row for row in table}


def write_results(path, rows):
    with whole_file(path) as aside, open(aside, "w", encoding="utf-8", newline="") as f:
        table = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows[command] for command in sorted(rows))


@contextmanager
def alone_in(folder):
    """Wait until no other study is in this `with` of the folder: two may write to one table."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def execute(command, runs):
    """Run a command in this process, without its output, in a folder of its own in `runs` -> its line of the table."""
    script, *arguments = command.split()
    module, began, output = {"grpo.py": grpo, "sft.py": sft}[script], time.time(), io.StringIO()
    name = re.sub(r"[^\w.=]+", "_", command.replace("config/", "").replace("--", ""))[:150]
    place = os.path.join(runs, f"{name}_{zlib.crc32(command.encode()):08x}")
    row = dict.fromkeys(COLUMNS, "") | {"command": command, "commit": grpo.revision()}
    try:
        with redirect_stdout(output), redirect_stderr(output):
            cfg = configure(vars(module), [*arguments, f"--out_dir={place}"])
            cfg.init_from = "resume" if unfinished(place, cfg.max_steps) else "scratch"
            module.train(cfg)
            with open(os.path.join(place, "log.jsonl"), encoding="utf-8") as f:
                log = [json.loads(line) for line in f]
            results = [line["eval"] for line in log if "eval" in line] or [{}]
            last = results[-1] | (evaluate_stored(cfg) if cfg.save_dtype != "float32" else {})
        numbers = re.search(r" train(?:s|ing) (\d+) numbers", output.getvalue())[1]
        tail = [line for line in log if "eval" not in line][-5:]  # rewards are at temperature 1
        found = {"numbers": numbers, "before": results[0].get("strict", ""), "accuracy": last.get("strict", ""),
                 "stderr": last.get("stderr", ""), "seconds": time.time() - began}
        if script == "grpo.py":
            found["reward"] = mean(line["reward"] for line in tail)
        else:
            found["loss"] = last.get("loss", mean(line["loss"] for line in tail))
    except Exception as error:  # a learning rate may be too high: the others go on
        return row | {"error": f"{type(error).__name__}: {error}", "seconds": f"{time.time() - began:.4g}"}
    return {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in (row | found).items()}


def unfinished(place, max_steps):
    """Was this run, of this code, stopped on its way?"""
    try:
        _, info = grpo.read_checkpoint(os.path.join(place, "checkpoint.safetensors"))
    except OSError:
        return False
    return info["step"] < max_steps and info["revision"] == grpo.revision()


def evaluate_stored(cfg):
    """Greedy accuracy with the numbers as they were rounded for storage."""
    net, problems = load_model(cfg.model, cfg.dtype, cfg.device), eval_math.load_problems(cfg.eval_dataset, "test")
    tinylora.load_adapter(net, cfg.out_dir)
    return eval_math.evaluate(net, load_tokenizer(cfg.model), problems[: cfg.eval_size or None], cfg)


def start_worker(threads):
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # killed, it takes workers along
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's (and, while it trains, grpo.Interrupt's)


def main():
    names = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    cfg = configure(globals(), [arg for arg in sys.argv[1:] if arg.startswith("-")])
    studies = STUDIES | PAPERS
    for name in names:
        if name not in studies:
            raise UserError(f"no study '{name}'; there are {', '.join(STUDIES)}; and for a GPU {', '.join(PAPERS)}")
    if cfg.workers < 1:
        raise UserError(f"workers must be at least 1, got {cfg.workers}")
    rows = read_results(cfg.results)
    commands = list(dict.fromkeys(point.command for name in names or STUDIES for point in studies[name]()))
    # What failed may have done so for want of memory or disk, and is tried again; what diverged would do it again.
    missing = [command for command in commands if command not in rows or (
        rows[command]["error"] and "not finite" not in rows[command]["error"])]
    threads = max(1, (os.cpu_count() or 1) // cfg.workers)
    place, failed = os.path.dirname(cfg.results) or ".", 0
    os.makedirs(place, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cfg.workers, spawn, start_worker, (threads,)) as pool:
        try:
            runs = [pool.submit(execute, command, cfg.out_dir) for command in missing]
            for run in tqdm(as_completed(runs), total=len(runs), unit="run", disable=None):
                row = run.result()
                with alone_in(place):
                    write_results(cfg.results, read_results(cfg.results) | {row["command"]: row})
                failed += row["error"] != ""
                shown = [f"{key} {row[key]}" for key in ("accuracy", "reward", "loss", "error") if row[key] != ""]
                tqdm.write("  ".join([*shown, row["command"]]))
        except BrokenProcessPool:
            raise UserError("a worker was killed, perhaps for memory: use fewer --workers. What is done is in "
                            f"{cfg.results}; the same command goes on") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.kill()  # SIGTERM would end one run, and the next begin
            raise
    print(f"{len(missing)} runs done, {len(commands) - len(missing)} were in {cfg.results}"
          + (f"; {failed} failed, for reasons that stand there" if failed else ""))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does, it takes the workers along
    run(main)
