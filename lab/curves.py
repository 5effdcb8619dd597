"""The loss of supervised LoRAs against the logarithm of the steps, and the norms of their A and B.

    python -m lab.curves       # the runs
    python -m lab.plot curves  # the figure

Each run is one epoch, so that no step has seen its rows before. Runs of one seed take the same rows
in the same order, so that their losses may be compared step by step.

A line of the table is a run: its mean loss over the steps up to each of ENDS from the one before,
and for a LoRA the mean spectral norm of its A and of its B after the last step. A run that has its
line is not made again.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise, repeat
from multiprocessing import get_context
from statistics import fmean

import torch
from safetensors.torch import load_file

from configurator import configure
from lab import study
from support import UserError

EPOCH = 250  # steps of 8 rows
ENDS = sorted({round(EPOCH ** (i / 16)) for i in range(17)})
COLUMNS = ("arm", "command", "A", "B", *map(str, ENDS), "commit")
RUNS = [(arm, f"{study.SFT} {settings} --lr={0.0005 if 'full' in arm else 0.002} --batch_size=8 "
         f"--max_steps={EPOCH} --eval_dataset= --seed={seed}")
        for arm, settings in study.LORA.items() if arm != "full, every weight"
        for seed in study.SEEDS]


@dataclass
class Settings:
    curves: str = "lab/results/curves.csv"  # the table: a line for each run
    out_dir: str = "out/curves"  # a directory for each run
    workers: int = 2  # runs at a time, of one thread each


def measure(run, out_dir):
    """Make a run. Returns its line of the table."""
    arm, command = run
    row = study.execute(command, out_dir)
    if row["error"]:
        raise UserError(f"{command}: {row['error']}")
    directory = os.path.join(out_dir, study.directory_name(command, row["commit"]))
    with open(f"{directory}/log.jsonl", encoding="utf-8") as f:
        losses = [json.loads(line)["loss"] for line in f]
    figures = {str(end): fmean(losses[begin:end]) for begin, end in pairwise([0, *ENDS])}
    if "full" not in arm:
        tensors = load_file(f"{directory}/adapter.safetensors")
        for factor in "AB":
            norms = [torch.linalg.matrix_norm(tensor, 2).item()
                     for name, tensor in tensors.items() if name.startswith(factor)]
            figures[factor] = fmean(norms)
    figures = {column: f"{figure:.4g}" for column, figure in figures.items()}
    return {"arm": arm, "command": command, "commit": row["commit"]} | figures


def leaves(losses, line):
    """The step at which a curve is 10 % above a line and stays there; None if it never is. Both are
    {step: loss}."""
    left = None
    for step, loss in losses.items():
        if loss <= 1.1 * line[step]:
            left = None
        elif left is None:
            left = step
    return left


def main():
    cfg = configure(Settings)
    lines = study.read_results(cfg.curves, COLUMNS)
    missing = [run for run in RUNS if run[1] not in lines]
    spawn = get_context("spawn")
    with ProcessPoolExecutor(cfg.workers, spawn, study.start_worker, (1,)) as pool:
        for line in pool.map(measure, missing, repeat(cfg.out_dir)):
            lines[line["command"]] = line
            done = [lines[command] for _, command in RUNS if command in lines]
            study.write_results(cfg.curves, done, COLUMNS)
    print(f"{cfg.curves} has all {len(RUNS)} runs; python -m lab.plot curves draws it")


if __name__ == "__main__":
    main()
