"""The landscape that thirteen numbers live in: reward and accuracy over two planes through v = 0.

    python -m lab.landscape       # trains the toy by GRPO and by ES, then tries a grid of vectors
    python -m lab.plot landscape  # the figure

In each plane v = 0 is the point (0, 0), and the v that GRPO has found is (1, 0). The second axis is
at right angles to the first and of the same scale: in one plane a random direction, in the other
one the direction in which ES's v lies. All vectors of a plane answer the same problems, in one call
of generate() for greedy and one for sampled answers.
"""

import csv
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import torch

import grpo
from configurator import at_least, configure
from lab import es, study
from model import load_tokenizer
from support import whole_file
from support.parallel import Ranks
from tinylora import fingerprint, load_adapted, read_for

COLUMNS = ("plane", "x", "y", "kind", "reward", "accuracy")
RUNS = {"GRPO": "grpo.py", "ES": "-m lab.es"}


@dataclass
class Settings:
    landscape: str = study.LANDSCAPE  # the table: a line for each vector
    out_dir: str = "out/landscape"  # the runs by GRPO and ES, which are made if they are missing
    points: int = 25  # on each axis of a grid: x from -1 to 2, y from -1.5 to 1.5
    problems: int = 40  # held-out problems that every vector is asked
    seed: int = 0  # of the random direction


def train_missing(out_dir):
    """The out_dirs of `python grpo.py` and `python -m lab.es`, {name: directory}."""
    found = {name: f"{out_dir}/{name}" for name in RUNS}
    for name, directory in found.items():
        if not os.path.exists(f"{directory}/adapter.safetensors"):
            options = [f"--out_dir={directory}", "--eval_interval=0"]
            subprocess.run([sys.executable, *RUNS[name].split(), *options], check=True)
    return found


def coordinates(v, x_axis, y_axis):
    """Where v, or what of it lies in the plane of two directions at right angles, is."""
    return [(v * axis).sum().item() / axis.square().sum().item() for axis in (x_axis, y_axis)]


@torch.no_grad()
def survey(cfg):
    """Yield the lines of the table."""
    runs = train_missing(cfg.out_dir)
    run = configure(grpo.Settings, grpo.reward, grpo.problems, argv=[])
    net = load_adapted(run.model, runs["GRPO"])
    by_grpo = net.adapter.v.clone()  # [1, 13]
    by_es = read_for(net, runs["ES"], fingerprint(net)).v
    generator = torch.Generator().manual_seed(cfg.seed)
    tokenizer, ranks = load_tokenizer(run.model), Ranks()
    rows = run.problems(run, "test")[: cfg.problems]
    grpo.prepare(net, tokenizer, rows, run)
    xs = np.linspace(-1, 2, cfg.points).round(4).tolist()
    ys = np.linspace(-1.5, 1.5, cfg.points).round(4).tolist()
    for plane, direction in (("random", torch.randn(by_es.shape, generator=generator)), ("ES", by_es)):
        across = direction - by_grpo * coordinates(direction, by_grpo, by_grpo)[0]
        across *= by_grpo.norm() / across.norm()
        points = [("grid", x, y) for y in ys for x in xs]
        points += [("GRPO", 1, 0), ("ES", *coordinates(by_es, by_grpo, across))]
        vectors = torch.stack([x * by_grpo + y * across for _, x, y in points])
        vectors[-1] = by_es  # which lies outside of the random plane
        figures = []
        for run.temperature in (1.0, 0.0):
            answers = es.ask(net, tokenizer, vectors, list(enumerate(rows)), run, ranks)
            figures.append([reward for reward, _, _ in answers])
        for (kind, x, y), reward, accuracy in zip(points, *figures):
            yield [plane, f"{x:.4g}", f"{y:.4g}", kind, f"{reward:.4g}", f"{accuracy:.4g}"]


def main():
    cfg = configure(Settings)
    at_least(cfg, 2, "points")
    at_least(cfg, 1, "problems")
    with whole_file(cfg.landscape) as aside, open(aside, "w", encoding="utf-8", newline="") as f:
        table = csv.writer(f, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(survey(cfg))
    print(f"wrote {cfg.landscape}; python -m lab.plot landscape draws it")


if __name__ == "__main__":
    main()
