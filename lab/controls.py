"""Controls for the toy's headline: what is left of it if the reward knows less than the answer.

    python -m lab.controls        # the runs, and the figures of each
    python -m lab.plot controls   # the figure

13 numbers are trained with a reward for right answers, for worked answers be they right or wrong,
and by a coin. Each run is then examined on all held-out problems, and so is the base model, a run
of no steps: is an answer right (whatever the run was rewarded for), and is it worked out, so that
it contains a calculation? Answers are greedy, or 8 to a problem at temperature 1. The bases of the
studies `bases` and `widths` are examined, too.

A line of the table is a run. A run that has its line is not made again.
"""

import os
import shlex
from dataclasses import dataclass
from statistics import fmean

import torch

import grpo
from configurator import configure
from lab import study
from lab.make_bases import BASES, make_missing
from model import load_tokenizer
from sample import generate
from tinylora import load_adapted

COLUMNS = ("rewarded", "command", "accuracy", "worked", "right_if_worked", "sampled_accuracy",
           "sampled_worked", "sampled_right_if_worked", "pass_at_8", "lead", "commit")
BASE = "grpo.py config/toy_rl.py --max_steps=0"
RUNS = [("nothing", BASE),
        ("nothing, asked to think", f"{BASE} --system_prompt='Think step by step.'")]
RUNS += [(rewarded, f"grpo.py config/{settings} --seed={seed}")
         for rewarded, settings in (("right", "toy_rl.py --n_tie=0 --rank=1 --u=13 --lr=0.005"),
                                    ("worked", "toy_control_format.py"),
                                    ("coin", "toy_control_random.py"))
         for seed in study.SEEDS]
RUNS += [(f"nothing, base {name}", f"{BASE} --model={path}") for name, path in BASES.items()]


@dataclass
class Settings:
    controls: str = "lab/results/controls.csv"  # the table: a line for each run
    out_dir: str = "out/controls"  # a directory for each run


def trained(command, out_dir):
    """Run a command of grpo.py, or go on with it. Returns its settings and the trained model."""
    _, *arguments = shlex.split(command)
    cfg = configure(grpo.Settings, grpo.reward, grpo.problems,
                    argv=[*arguments, f"--out_dir={out_dir}"])
    if os.path.exists(f"{out_dir}/checkpoint.safetensors"):
        cfg.init_from = "resume"
    grpo.train(cfg)
    return cfg, load_adapted(cfg.model, out_dir)


def shares(groups):
    """Of the (is right, is worked out) of each answer: the share of right and of worked answers,
    and of the worked ones the share that is right."""
    answers = [answer for group in groups for answer in group]
    right_if_worked = [right for right, worked in answers if worked]
    return (fmean(right for right, _ in answers), fmean(worked for _, worked in answers),
            fmean(right_if_worked) if right_if_worked else float("nan"))


@torch.no_grad()
def examine(net, cfg):
    """The figures of a model, in the order of COLUMNS."""
    tokenizer = load_tokenizer(cfg.model)
    rows = cfg.problems(cfg, "test")
    grpo.prepare(net, tokenizer, rows, cfg)
    prompts = [row["prompt_tokens"] for row in rows]
    figures = []
    for count, temperature in ((1, 0.0), (8, 1.0)):
        groups = generate(net, tokenizer, prompts, count, cfg.max_new_tokens, temperature,
                          progress="examining")
        groups = [[(grpo.reward(row, completion), "=" in completion.text) for completion in group]
                  for row, group in zip(rows, groups)]
        figures += shares(groups)
    pass_at_8 = fmean(any(right for right, _ in group) for group in groups)
    return *figures, pass_at_8, fmean(guess_leads(net, tokenizer, prompt) for prompt in prompts)


def guess_leads(net, tokenizer, prompt):
    """By how many nats the first token of a guess, "#### 42", leads the best other first token."""
    logits = net(torch.tensor([prompt], device=net.device))[0, -1].float()
    guess = tokenizer.encode("####")[0]
    others = logits.clone()
    others[guess] = -torch.inf
    return (logits[guess] - others.max()).item()


def main():
    cfg = configure(Settings)
    lines = study.read_results(cfg.controls, COLUMNS)
    for rewarded, command in RUNS:
        if command in lines:
            continue
        make_missing([command])
        commit = study.revision()
        directory = os.path.join(cfg.out_dir, study.directory_name(command, commit))
        run, net = trained(command, directory)
        figures = [f"{figure:.4g}" for figure in examine(net, run)]
        lines[command] = dict(zip(COLUMNS, [rewarded, command, *figures, commit]))
        done = [lines[command] for _, command in RUNS if command in lines]
        study.write_results(cfg.controls, done, COLUMNS)
    print(f"{cfg.controls} has all {len(RUNS)} runs; python -m lab.plot controls draws it")


if __name__ == "__main__":
    main()
