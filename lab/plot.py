"""Curves of runs, and the figures of the studies that lab.study has run.

    python -m lab.plot out/toy out/other   # one picture of the log.jsonl of one or more runs
    python -m lab.plot params              # a study's figure: accuracy against trained numbers
    python -m lab.plot controls            # what other rewards leave, as lab.controls found
    python -m lab.plot curves              # loss by rank, step by step, as lab.curves found
    python -m lab.plot landscape           # reward and accuracy around v, as lab.landscape found
    python -m lab.plot                     # all figures of the toy
"""

import csv
import json
import os
import re
import sys
from dataclasses import dataclass
from statistics import mean

from configurator import configure
from lab import capacity, controls, curves, landscape, study
from support import UserError, foreign_file, one_line_errors


@dataclass
class Settings:
    results: str = study.Settings.results  # the table that lab.study writes
    figures: str = "lab/results"  # directory of the studies' figures
    controls: str = controls.Settings.controls  # the table that lab.controls writes
    curves: str = curves.Settings.curves  # the table that lab.curves writes
    landscape: str = landscape.Settings.landscape  # the table that lab.landscape writes
    out: str = "curves.png"  # file of the runs' curves


FIGURES = {  # of each study: what the horizontal axis is, and the column that is drawn
    "params": ("trained numbers (lines: up to 84 at rank 2)", "accuracy"),
    "rates": ("learning rate", "accuracy"),
    "tying": ("trained numbers", "accuracy"),
    "rank": ("frozen rank r", "accuracy"),
    "precision": ("", "accuracy"),
    "bases": ("trained numbers", "accuracy"),
    "widths": ("trained numbers", "accuracy"),
    "lora": ("learning rate", "loss"),
    "steps": ("learning rate", "loss"),
    "batch": ("batch size", "loss"),
    "layers": ("learning rate", "loss"),
    "lora_rl": ("learning rate", "accuracy"),
    "layers_rl": ("learning rate", "accuracy"),
    "capacity": ("passes over the digits", "bits"),
    "es_rates": ("sigma", "accuracy"),
    "es": ("sampled answers", "accuracy"),
    "gsm8k_sizes": ("trained numbers", "accuracy"),
    "gsm8k_models": ("trained numbers", "accuracy"),
    "math_sizes": ("trained numbers", "accuracy"),
    "ablations": ("frozen rank r, or trained numbers", "accuracy"),
    "regret_rates": ("learning rate", "loss"),
    "regret_batch": ("batch size", "loss"),
    "regret_layers": ("learning rate", "loss"),
    "regret_rl": ("learning rate", "accuracy"),
}
STUDIES = study.STUDIES | study.PAPERS
LABELS = {"accuracy": "greedy accuracy, held-out (bars: seeds)",
          "loss": "held-out loss, nats per token (bars: seeds)",
          "bits": "memorised bits a trained number (bars: seeds)",
          "training loss": "loss of the last 5 steps, nats per token"}
CONTROLS = {"accuracy": "right\n(greedy)", "worked": "worked out\n(greedy)",
            "sampled_accuracy": "right\n(T = 1)", "sampled_worked": "worked out\n(T = 1)",
            "sampled_right_if_worked": "right, if\nworked out\n(T = 1)",
            "pass_at_8": "one of 8\nis right\n(T = 1)"}
LANDSCAPES = {"accuracy": "greedy accuracy", "reward": "reward (T = 1)"}


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("lab.plot draws with matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")  # files, no window
    import matplotlib.pyplot as plt

    plt.rcParams |= {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
                     "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9}
    return plt


def save(figure, path):
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110)
    except (ValueError, OSError) as error:  # ValueError: no format has this ending
        raise UserError(f"'{path}' cannot be written: {error}") from None
    print(f"wrote {path}")


# ------------------------------------------------------------------------------ figures of studies

def points(name, rows):
    """{series: {x: [a value for each seed]}} of the runs of a study that are in the table. In some
    studies a point has several learning rates, and the best one counts."""
    column = FIGURES[name][1]
    is_sweep = name == "batch" or name in study.PAPERS
    found = {}  # (series, x) -> {settings without the seed: [a value for each seed]}
    for series, x, command in STUDIES[name]():
        row = rows.get(command)
        if not row or row["loss" if column == "bits" else column] == "":
            continue
        x = int(row["numbers"]) if x == "numbers" else x
        settings = re.sub(r" --seed=\S+", "", command) if is_sweep else ""
        values = found.setdefault((series, x), {}).setdefault(settings, [])
        values.append(capacity.bits(row) if column == "bits" else float(row[column]))
    best = max if column == "accuracy" else min
    curves = {}
    for (series, x), runs in found.items():
        curves.setdefault(series, {})[x] = best(runs.values(), key=mean)
    return curves


def draw_curve(ax, by_x, xs, **style):
    """The means over seeds, with bars from the lowest to the highest."""
    means = [mean(by_x[x]) for x in xs]
    below = [middle - min(by_x[x]) for x, middle in zip(xs, means)]
    above = [max(by_x[x]) - middle for x, middle in zip(xs, means)]
    ax.errorbar(xs, means, yerr=[below, above], capsize=3, **style)


def draw_study(name, rows, cfg, plt):
    """The figure of a study, whose title is the study's docstring up to its sources. Series named
    "RL: ..." and "SFT: ..." get a panel for each kind. A series "RL (...)" has the colour of "RL",
    and marks of its own."""
    xlabel, column = FIGURES[name]
    title = " ".join(STUDIES[name].__doc__.split()).partition(" (")[0].rstrip(".")
    if name in study.STUDIES:
        title += " (the toy)"
    curves = points(name, rows)
    if not curves:
        return print(f"{name}: no run of it is in {cfg.results}; another table is --results=FILE, "
                     f"and python -m lab.study {name} runs it")
    panels = {}
    for series, by_x in curves.items():
        panel, _, label = series.rpartition(": ")
        panels.setdefault(panel, {})[label] = by_x
    width = 7 if len(panels) == 1 and name != "params" else max(11, 3 * len(panels))
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 4.3), squeeze=False, sharey=True)
    for ax, (panel, own) in zip(axes[0], panels.items()):
        families = {}
        for label in own:
            families.setdefault(label.partition(" (")[0], []).append(label)
        for i, labels in enumerate(families.values()):
            ordered = plt.get_cmap("viridis")(i / len(own))  # where many follow one another
            for label, mark in zip(labels, ("o-" if xlabel else "o", "*", "D")):
                by_x = own[label]
                draw_curve(ax, by_x, sorted(by_x) if xlabel else list(by_x), label=label, fmt=mark,
                           markersize=12 if mark == "*" else 6,
                           color=ordered if len(families) > 6 else f"C{i}")
        if column == "accuracy":
            draw_untrained(ax, name, rows)
            ax.set_ylim(-0.02, 1.02)
        if xlabel:
            scale_x(ax, sorted({x for by_x in own.values() for x in by_x}))
        ax.set_xlabel(xlabel)
        ax.set_title(panel or title)
        if len(families) < len(own):
            ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        else:
            ax.legend(ncols=2 if len(own) > 6 else 1)
    is_training_loss = name.startswith("regret") and column == "loss"
    axes[0, 0].set_ylabel(LABELS["training loss" if is_training_loss else column])
    if len(panels) > 1:
        figure.suptitle(title)
    save(figure, os.path.join(cfg.figures, f"{name}.png"))


def draw_untrained(ax, name, rows):
    """A line at the accuracy before training, if the study has one model."""
    runs = [rows[point.command] for point in STUDIES[name]() if point.command in rows]
    before = [float(row["before"]) for row in runs if row["before"] != ""]
    if max(before) - min(before) < 0.02:
        ax.axhline(mean(before), color="gray", linestyle=":", label="untrained")


def scale_x(ax, xs):
    """A logarithmic axis. Over few decades it shows the values themselves, not powers of ten."""
    ax.set_xscale("log")
    if xs[-1] < 1000 * xs[0]:
        ax.minorticks_off()
        ax.set_xticks(xs, [f"{x:g}" for x in xs], fontsize=8)


# --------------------------------------------------------- the controls, the curves, the landscape

def draw_controls(path, out, plt):
    """What each reward has left of right and of worked answers, as lab.controls has found."""
    with foreign_file(path), open(path, encoding="utf-8", newline="") as f:
        of_rewards = {}
        for row in csv.DictReader(f):
            if "base" not in row["rewarded"]:
                of_rewards.setdefault(row["rewarded"], []).append(row)
    figure, ax = plt.subplots(figsize=(10, 4.3))
    for i, (rewarded, rows) in enumerate(of_rewards.items()):
        shares = {x + 0.13 * (i - 2): [float(row[column]) for row in rows]
                  for x, column in enumerate(CONTROLS)}
        draw_curve(ax, shares, list(shares), label=f"rewarded: {rewarded}", fmt="o")
    ax.set_xticks(range(len(CONTROLS)), CONTROLS.values())
    ax.set_ylim(-0.02, 1.02)
    ax.set_ylabel("share of answers (bars: seeds)")
    ax.set_title("13 numbers trained with three rewards (the toy)")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, out)


def draw_curves(path, out, plt):
    """The loss of each arm by step, and where it leaves the lowest LoRA of the same seed."""
    by_arm = {}
    with foreign_file(path), open(path, encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f):
            losses = {step: float(row[str(step)]) for step in curves.ENDS}
            by_arm.setdefault(row["arm"], []).append(losses)
    loras = [runs for arm, runs in by_arm.items() if "full" not in arm]
    lines = [{step: min(losses[step] for losses in of_seed) for step in curves.ENDS}
             for of_seed in zip(*loras)]
    figure, ax = plt.subplots(figsize=(8, 5))
    for arm, runs in by_arm.items():
        left = [curves.leaves(losses, line) for losses, line in zip(runs, lines)]
        steps = ", ".join(str(step) for step in left if step)
        by_step = {step: [losses[step] for losses in runs] for step in curves.ENDS}
        draw_curve(ax, by_step, curves.ENDS, fmt="o-", markersize=4,
                   label=f"{arm}: leaves at step {steps}" if steps else arm)
    scale_x(ax, curves.ENDS)
    ax.set(xlabel="step (8 new rows each)", ylabel="loss, nats per token (bars: seeds)",
           title="Supervised loss by rank of the LoRA, one epoch (the toy)")
    ax.legend()
    save(figure, out)


def draw_landscape(path, out, plt):
    """Accuracy and reward over the planes that lab.landscape has tried."""
    with foreign_file(path), open(path, encoding="utf-8", newline="") as f:
        numbers = ("x", "y", "reward", "accuracy")
        rows = [row | {key: float(row[key]) for key in numbers} for row in csv.DictReader(f)]
        planes = list(dict.fromkeys(row["plane"] for row in rows))
    figure, axes = plt.subplots(2, len(planes), figsize=(11, 8), sharex=True, sharey=True)
    levels = [i / 20 for i in range(22)]  # beyond 1, which would stay white
    for column, plane in enumerate(planes):
        own = [row for row in rows if row["plane"] == plane]
        grid = [row for row in own if row["kind"] == "grid"]
        marks = {"v = 0": (0, 0)}
        for row in own:
            if row["kind"] == "GRPO" or row["kind"] == plane:  # ES lies in its own plane
                marks[row["kind"]] = row["x"], row["y"]
        for ax, figures in zip(axes[:, column], ("accuracy", "reward")):
            x, y, z = zip(*((row["x"], row["y"], row[figures]) for row in grid))
            shades = ax.tricontourf(x, y, z, levels)
            figure.colorbar(shades, label=LANDSCAPES[figures])
            for label, at in marks.items():
                ax.plot(*at, "w*", markersize=12, markeredgecolor="k")
                ax.annotate(label, at, (7, 7), textcoords="offset points", color="w",
                            backgroundcolor="#00000060", fontsize=9)
        axes[0, column].set_title(f"second direction: {plane}")
        axes[1, column].set_xlabel("along GRPO's v (in lengths of it)")
    save(figure, out)


# ----------------------------------------------------------------------------------- curves of runs

def evaluated(line):
    figures = line.get("eval", {})
    return figures.get("reward", figures.get("strict"))  # strict: in logs of version 1


PANELS = {  # of the log of a run: a title, and what is drawn of a line
    "reward (T = 1)": lambda line: line.get("reward"),
    "loss (of sft.py; in RL no sign of progress)": lambda line: line.get("loss"),
    "greedy reward, held-out": evaluated,
    "tokens of a completion": lambda line: line.get("length"),
    "|v|": lambda line: line.get("v_norm"),
    "gradient norm": lambda line: line.get("grad_norm"),
}


def draw_runs(directories, path, plt):
    """One or more runs, step by step, and how the time of each divides."""
    figure, axes = plt.subplots(2, 4, figsize=(15, 6.5))
    *panels, time_panel, legend = axes.flat
    for number, directory in enumerate(directories):
        log = read_log(directory)
        for ax, (title, value_of) in zip(panels, PANELS.items()):
            drawn = [line for line in log if value_of(line) is not None]
            ax.plot([line["step"] for line in drawn], [value_of(line) for line in drawn],
                    ".-" if len(drawn) < 30 else "-", label=directory)
            ax.set(title=title, xlabel="step")
        spent = [line["seconds"] for line in log if "seconds" in line]
        below = 0.0
        for kind, hatch in (("generate", ""), ("update", "//"), ("step", "")):
            seconds = sum(parts.get(kind, 0.0) for parts in spent)
            time_panel.bar(number, seconds, bottom=below, hatch=hatch, color=f"C{number}",
                           edgecolor="white")
            below += seconds
    time_panel.set(title="seconds: generation, update (hatched)", xticks=[])
    legend.axis("off")
    legend.legend(*panels[0].get_legend_handles_labels(), loc="center")
    save(figure, path)


def read_log(directory):
    """The lines of a run's log.jsonl. `directory` may be the file itself."""
    path = directory if directory.endswith(".jsonl") else os.path.join(directory, "log.jsonl")
    try:
        with open(path, encoding="utf-8") as f:
            lines = [json.loads(line) for line in f]
        if not any(line["step"] for line in lines):
            raise ValueError("it has no steps")
        return lines
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"no log of a run at '{path}' ({error}), and no study with a figure is "
                        f"called '{directory}': they are {', '.join(FIGURES)}") from None


def main():
    names = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    cfg = configure(Settings, argv=[arg for arg in sys.argv[1:] if arg.startswith("-")])
    plt = pyplot()
    drawn = {"controls": draw_controls, "curves": draw_curves, "landscape": draw_landscape}
    if any(name not in [*FIGURES, *drawn] for name in names):
        if not os.path.basename(cfg.out):
            raise UserError(f"out must be the name of a file, not '{cfg.out}'")
        return draw_runs(names, cfg.out, plt)
    rows = study.read_results(cfg.results)
    for name in names or [*study.STUDIES, *drawn]:
        if name in drawn:
            drawn[name](getattr(cfg, name), f"{cfg.figures}/{name}.png", plt)
        else:
            draw_study(name, rows, cfg, plt)


if __name__ == "__main__":
    one_line_errors()
    main()
