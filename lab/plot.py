"""Curves of runs, and the papers' figures from what lab.study has run.

    python -m lab.plot out/toy out/other       # one PNG from the log.jsonl of one or more runs
    python -m lab.plot params                  # a study's figure: accuracy against trained numbers, RL and SFT
    python -m lab.plot                         # the figures of all studies
"""

import json
import os
import re
import sys
from statistics import mean

from configurator import UserError, configure, run
from lab import study

results = study.results  # the table that lab.study writes
figures = "lab/results"  # folder of the studies' figures
out = "curves.png"  # file of the runs' curves

FIGURES = {  # of a study: the horizontal axis, the column that is drawn, the title
    "params": ("trained numbers", "accuracy", "Accuracy against trained numbers (toy; lowest to highest of 3 seeds)"),
    "rates": ("learning rate", "accuracy", "Learning rates by trained numbers (toy, one seed)"),
    "tying": ("trained numbers", "accuracy", "Who shares a number (toy, RL; 3 seeds)"),
    "rank": ("frozen rank r", "accuracy", "Rank of the frozen directions (toy, RL; 3 seeds)"),
    "precision": ("", "accuracy", "13 numbers stored, and a frozen model, in 32 or 16 bits (toy, RL; 3 seeds)"),
    "lora": ("learning rate", "loss", "Learning rates of LoRA and full fine-tuning (toy, SFT; 2 seeds)"),
    "batch": ("batch size", "loss", "Batch size, the better of two learning rates (toy, SFT; 2 seeds)"),
    "layers": ("learning rate", "loss", "LoRAs of as many numbers on a part of the linears (toy, SFT; 3 seeds)"),
    "lora_rl": ("learning rate", "accuracy", "LoRA's rank in RL (toy; 2 seeds)"),
    "gsm8k_sizes": ("trained numbers", "accuracy", "GSM8K, Qwen2.5-7B, the best learning rate of each size"),
    "gsm8k_models": ("trained numbers", "accuracy", "GSM8K by RL, the best learning rate of each size"),
    "math_sizes": ("trained numbers", "accuracy", "MATH by RL, the best learning rate of each size"),
    "ablations": ("frozen rank r, or trained numbers", "accuracy", "GSM8K by RL, Qwen2.5-3B"),
    "regret_rates": ("learning rate", "loss", "Learning rates of LoRA and full fine-tuning (Llama-3.1-8B, SFT)"),
    "regret_batch": ("batch size", "loss", "Batch size (Llama-3.1-8B, SFT)"),
    "regret_layers": ("trained numbers", "loss", "LoRAs on a part of the linears (Llama-3.1-8B, SFT)"),
    "regret_rl": ("learning rate", "accuracy", "LoRA's rank in RL (Llama-3.1-8B, MATH)"),
}
STUDIES = study.STUDIES | study.PAPERS
LABELS = {"accuracy": "greedy accuracy, held-out problems", "loss": "held-out loss, nats a token",
          "training loss": "loss of the last 5 steps, nats a token"}


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("lab.plot draws with matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")  # files, no window
    import matplotlib.pyplot as plt

    plt.rcParams |= {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
                     "legend.frameon": False, "legend.fontsize": 9}
    return plt


def points(name, rows):
    """{series: {x: [values, one a run]}} of the runs of a study that are in the table `rows`."""
    column, curves = FIGURES[name][1], {}
    several = name == "batch" or name in study.PAPERS  # learning rates at a point: the best counts
    for series, x, command in STUDIES[name]():
        row = rows.get(command)
        if row and row[column] != "":
            x = int(row["numbers"]) if x == "numbers" else x
            settings = re.sub(r" --seed=\S+", "", command) if several else ""  # those of a point's seeds
            curves.setdefault(series, {}).setdefault(x, {}).setdefault(settings, []).append(float(row[column]))
    best = max if column == "accuracy" else min
    return {series: {x: best(runs.values(), key=mean) for x, runs in by_x.items()} for series, by_x in curves.items()}


def draw_study(name, rows, table, path, plt):
    """The figure of a study: means, with bars from the lowest to the highest seed; a panel a kind of training."""
    xlabel, column, title = FIGURES[name]
    curves = points(name, rows)
    if not curves:
        return print(f"{name}: no run of it is in {table}; another table is --results=FILE, and python -m lab.study "
                     f"{name} runs it")
    panels = list(dict.fromkeys(series.rpartition(": ")[0] for series in curves))
    figure, axes = plt.subplots(1, len(panels), figsize=(7 if len(panels) == 1 else 11, 4.3), squeeze=False,
                                sharey=True)
    for panel, ax in zip(panels, axes[0]):
        own = {s.rpartition(": ")[2]: by_x for s, by_x in curves.items() if s.rpartition(": ")[0] == panel}
        for i, (label, by_x) in enumerate(own.items()):
            xs = list(by_x) if xlabel == "" else sorted(by_x)
            middle = [mean(by_x[x]) for x in xs]
            bars = [[m - min(by_x[x]) for x, m in zip(xs, middle)], [max(by_x[x]) - m for x, m in zip(xs, middle)]]
            color = plt.get_cmap("viridis")(i / len(own)) if len(own) > 6 else None  # many: in order
            ax.errorbar(xs, middle, yerr=bars, fmt="o-" if xlabel else "o", capsize=3, label=label, color=color)
        if column == "accuracy":
            runs = (rows.get(point.command) for point in STUDIES[name]())
            before = [float(row["before"]) for row in runs if row and row["before"] != ""]
            if max(before) - min(before) < 0.02:  # one model
                ax.axhline(mean(before), color="gray", linestyle=":", label="untrained")
            ax.set_ylim(-0.02, 1.02)
        if name == "params":
            for i, label in enumerate(own):
                commands = [p.command for p in study.params() if p.series == label and "--method=full" in p.command]
                full = [float(rows[c]["accuracy"]) for c in commands if c in rows and rows[c]["accuracy"] != ""]
                if full:
                    ax.axhline(mean(full), color=f"C{i}", linestyle="--", alpha=0.5, label=f"{label}, all weights")
        if xlabel:
            ax.set_xscale("log")
            ticks = sorted({x for by_x in own.values() for x in by_x})
            if ticks[-1] < 1000 * ticks[0]:  # over few decades the values themselves say more than powers of ten
                ax.minorticks_off()
                ax.set_xticks(ticks, [f"{x:g}" for x in ticks], fontsize=8)
        ax.set_xlabel(xlabel)
        ax.set_title(panel or title)
        ax.legend(ncols=2 if len(own) > 6 else 1)
    axes[0, 0].set_ylabel(LABELS["training loss" if name.startswith("regret") and column == "loss" else column])
    if panels != [""]:
        figure.suptitle(title)
    save(figure, path)


PANELS = {  # of a run's log: title and what is drawn
    "reward (T = 1)": lambda line: line.get("reward"),
    "loss (of sft.py; in RL no sign of progress)": lambda line: line.get("loss"),
    "greedy accuracy, held-out": lambda line: (line.get("eval") or {}).get("strict"),
    "tokens an answer": lambda line: line.get("length"),
    "|v|": lambda line: line.get("v_norm"),
    "gradient norm": lambda line: line.get("grad_norm"),
}


def draw_runs(directories, path, plt):
    """The course of one or more runs, step by step, and where the time of each went."""
    figure, axes = plt.subplots(2, 4, figsize=(15, 6.5))
    for number, directory in enumerate(directories):
        log = read_log(directory)
        for ax, (title, value) in zip(axes.flat, PANELS.items()):
            drawn = [(line["step"], value(line)) for line in log if value(line) is not None]
            ax.plot(*zip(*drawn) if drawn else ([], []), ".-" if len(drawn) < 30 else "-", label=directory)
            ax.set(title=title, xlabel="step")
        spent = [line["seconds"] for line in log if "seconds" in line]
        below = 0.0
        for kind, hatch in (("generate", ""), ("update", "//"), ("step", "")):
            seconds = sum(s.get(kind, 0.0) for s in spent)
            axes.flat[6].bar(number, seconds, bottom=below, hatch=hatch, color=f"C{number}", edgecolor="white")
            below += seconds
    axes.flat[6].set(title="seconds: generation, update (hatched)", xticks=[])
    axes.flat[7].axis("off")
    axes.flat[7].legend(*axes.flat[0].get_legend_handles_labels(), loc="center")
    save(figure, path)


def read_log(directory):
    """The lines of a run's log.jsonl; `directory` may be the file itself."""
    path = directory if directory.endswith(".jsonl") else os.path.join(directory, "log.jsonl")
    try:
        with open(path, encoding="utf-8") as f:
            lines = [json.loads(line) for line in f]
        if not any(line["step"] for line in lines):
            raise ValueError("it has no steps")
        return lines
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"no log of a run at '{path}', and no study with a figure is called '{directory}' "
                        f"({', '.join(FIGURES)}): {error}") from None


def save(figure, path):
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110)
    except ValueError as error:  # an ending that stands for no format
        raise UserError(f"{path}: {error}") from None
    print(f"wrote {path}")


def main():
    names = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    cfg, plt = configure(globals(), [arg for arg in sys.argv[1:] if arg.startswith("-")]), pyplot()
    if any(name not in FIGURES for name in names):
        if not os.path.basename(cfg.out):
            raise UserError(f"out must be the name of a file, not '{cfg.out}'")
        return draw_runs(names, cfg.out, plt)
    rows = study.read_results(cfg.results)
    for name in names or study.STUDIES:
        draw_study(name, rows, cfg.results, os.path.join(cfg.figures, f"{name}.png"), plt)


if __name__ == "__main__":
    run(main)
