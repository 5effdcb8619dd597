"""Evolution strategies: the few numbers that grpo.py trains, without a gradient of the model.

    python -m lab.es                              # the embedded toy, a minute on a CPU
    python -m lab.es config/toy_format.py         # a config of grpo.py: its task, its reward
    torchrun --nproc_per_node=8 -m lab.es ...     # processes share the members of a generation

Each row of a batch can have an adapter of its own, so one call of generate() tries a whole
population of vectors. A generation perturbs v in random directions, asks every member the same
problems, and moves v towards the members that earned more. Nothing is differentiated, so training
takes the memory of sampling, and any reward will do. What a run writes is what grpo.py writes.

Salimans et al. 2017, "Evolution Strategies as a Scalable Alternative to Reinforcement Learning";
for language models Qiu et al. 2025, "Evolution Strategies at Scale".
"""

import time
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np
import torch

import grpo
import tinylora
from configurator import at_least, configure, save_settings
from model import load_model, load_tokenizer
from sample import generate
from support import UserError
from support.device import peak_gb
from support.parallel import Ranks, is_chief, print0
from support.run import Run


@dataclass
class Settings(grpo.Settings):  # these, and those of grpo.py that GRPO_ONLY does not name
    out_dir: str = "out/es"  # log, checkpoint, adapter
    method: Literal["tinylora", "lora_xs"] = "tinylora"  # what has a v
    population: int = 32  # members of a generation, in pairs v + sigma e and v - sigma e
    batch_size: int = 8  # problems of a generation; every member answers each of them once
    sigma: float = 0.03  # standard deviation of the perturbations
    lr: float = 0.01  # Adam, constant
    max_steps: int = 30  # generations
    temperature: float = 0.0  # of the members' answers; 0: greedy, as in the evaluation


GRPO_ONLY = ("group_size", "objective", "clip_low", "clip_high", "kl_coef", "num_passes", "tis_cap",
             "resample", "overlong_tokens", "grad_clip", "micro_batch_tokens", "recompute")


def check(cfg):
    at_least(cfg, 1, "batch_size", "max_new_tokens")
    at_least(cfg, 0, "max_steps", "temperature", "eval_size", "eval_interval", "save_interval")
    for holds, message in [
        (cfg.population > 0 and cfg.population % 2 == 0, "population must be even and above 0"),
        (cfg.sigma > 0, "sigma must be above 0"),
        (0 <= cfg.seed < 2**32, f"seed must be 0 to {2**32 - 1}"),
        (cfg.shard == 1, "shard must be 1: rows with adapters of their own need whole weights"),
    ]:
        if not holds:
            raise UserError(message)
    ignored = [name for name in GRPO_ONLY if getattr(cfg, name) != getattr(Settings, name)]
    if ignored:
        print0(f"note: evolution strategies ignore {', '.join(ignored)}")


def directions(step, shape, cfg):
    """The e ~ N(0, 1) of a generation [population / 2, groups, u], alike in all processes."""
    state = np.random.RandomState([cfg.seed, step])
    return torch.from_numpy(state.standard_normal((cfg.population // 2, *shape))).float()


def ask(net, tokenizer, members, asked, cfg, ranks):
    """Have the members [population, groups, u] answer the same (position, problem) pairs, with the
    same random numbers. Returns for each of them the mean reward, tokens, and truncated answers."""
    mine = ranks.mine(members)
    prompts = [problem["prompt_tokens"] for _, problem in asked] * len(mine)
    positions = [position for position, _ in asked] * len(mine)
    groups = generate(net, tokenizer, prompts, 1, cfg.max_new_tokens, cfg.temperature, cfg.seed,
                      prompt_ids=positions, progress="sampling", adapters=mine)
    answers = iter(completion for [completion] in groups)
    results = []
    for _ in mine:
        own = [(problem, next(answers)) for _, problem in asked]
        results.append((fmean(float(cfg.reward(*pair)) for pair in own),
                        fmean(len(completion.ids) for _, completion in own),
                        fmean(completion.truncated for _, completion in own)))
    return ranks.gather(results)


def train(cfg):
    check(cfg)
    ranks = Ranks(cfg.device)
    train_set = cfg.problems(cfg, "train")
    test_set = cfg.problems(cfg, "test")[: cfg.eval_size or None]
    tokenizer = load_tokenizer(cfg.model)
    net = load_model(cfg.model, cfg.dtype, ranks.device)
    net.compile_decode = cfg.compile
    grpo.prepare(net, tokenizer, train_set + test_set, cfg)
    net.longest = 0  # evaluations take another Sampler, so recording ahead would be done anew
    parameters, identity = tinylora.attach(net, cfg)
    v = parameters["v"]  # [groups, u]
    optimizer = torch.optim.Adam([v], lr=cfg.lr, foreach=False)
    run = Run(cfg, ranks, parameters, optimizer, identity | {"script": "lab/es.py"})
    if is_chief():
        save_settings(cfg, f"{cfg.out_dir}/settings.py")
    print0(f"{cfg.method} evolves {v.numel():,} numbers of {cfg.model} on {len(train_set):,} "
           f"problems ({net.dtype}, {net.device}, {ranks.dp_size} processes)")

    step = run.step
    while True:
        # Between two generations: evaluate, save, and stop if that was asked for.
        stop = run.stop_asked()
        if test_set and run.evaluation_due(step) and not stop:
            figures = grpo.evaluate(net, tokenizer, test_set, cfg, ranks)
            if run.log_evaluation(step, figures, figures["reward"]):
                tinylora.save(net, cfg, best=True)
        if run.save_due(step) or stop:
            run.save(step)
            tinylora.save(net, cfg)
        if step >= cfg.max_steps or stop:
            break

        # Antithetic pairs: what both members of a pair have in common cancels out.
        began = time.time()
        e = directions(step, v.shape, cfg).to(v.device)
        members = v.detach() + cfg.sigma * torch.cat([e, -e])
        positions = grpo.batch_positions(step, cfg.batch_size, len(train_set), cfg.seed)
        asked = [(position, train_set[index]) for position, index in positions]
        rewards, lengths, truncated = zip(*ask(net, tokenizer, members, asked, cfg, ranks))

        # Shaped rewards: every generation has the same weight, however hard its problems are.
        rewards = torch.tensor(rewards)
        shaped = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        plus, minus = shaped.to(v.device).chunk(2)
        # The gradient of the mean shaped reward over N(v, sigma^2), which Adam ascends.
        v.grad = -torch.einsum("p,pgu->gu", plus - minus, e) / (cfg.population * cfg.sigma)
        optimizer.step()
        step += 1

        record = {"reward": rewards.mean().item(), "best": rewards.max().item(),
                  "spread": rewards.std().item(), "length": fmean(lengths),
                  "truncated": fmean(truncated), "v_norm": v.detach().norm().item(),
                  "grad_norm": v.grad.norm().item()}
        record["seconds"] = {"generate": time.time() - began, "peak_gb": peak_gb(net.device)}
        run.log(step, record)
        print0(f"step {step:4d} | reward {record['reward']:.3f} | best {record['best']:.3f} | "
               f"length {record['length']:.0f} | |v| {record['v_norm']:.3f} | "
               f"{record['seconds']['generate']:.1f} s")
    if v.numel() <= 1000:
        text = tinylora.adapter_text(net.adapter, cfg.save_dtype)
        print0(f"the adapter as text: --adapter={text}")
    run.close(f"greedy {grpo.label_of(cfg)}", f"{v.numel():,} numbers")


if __name__ == "__main__":
    train(configure(Settings, grpo.reward, grpo.problems))
