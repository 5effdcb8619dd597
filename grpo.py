"""GRPO on a frozen language model with an adapter of a few numbers (or LoRA, or all weights).

    python grpo.py                                      # the embedded toy, half a minute on a CPU
    python grpo.py config/qwen7b_u13.py                 # 13 numbers on Qwen2.5-7B, one GPU
    python grpo.py --model=DIR --dataset=FILE.jsonl     # any checkpoint and problems you have
    python grpo.py config/toy_format.py                 # another task: its reward is in the config
    torchrun --nproc_per_node=8 grpo.py config/qwen7b_u13.py

One step: sample a group of completions for each of some problems, reward them, and push the policy
towards those that beat the mean of their group. There is no critic, no second copy of the weights
(the reference policy is the same model with the adapter off), and no second engine that samples.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, pstdev
from typing import Literal

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import tinylora
from configurator import at_least, configure, save_settings
from eval_math import encode_problems, load_problems, score
from model import load_model, load_tokenizer
from sample import generate
from support import UserError
from support.device import peak_gb
from support.packing import Rollout, completion_logprobs, micro_batches
from support.parallel import Ranks, is_chief, keep_pace, norm_of, print0, reduce_gradients
from support.run import Run


@dataclass
class Settings:
    # what to train: the defaults train the embedded toy; the paper's values are in config/
    model: str = "toy/base"  # checkpoint directory or hub name
    dataset: str = "toy/train.jsonl"  # a file, a folder with train.jsonl, or a name in eval_math.py
    eval_dataset: str = "toy/test.jsonl"  # held-out problems; none if empty
    system_prompt: str = ""  # system message; empty: the chat template's own, if it has one
    prompt_template: str = "{question}"  # the user's message
    answer_format: Literal["hash", "boxed", "tags", "any"] = "hash"  # #### 42, \boxed{42}, <answer>
    out_dir: str = "out/toy"  # log, checkpoint, adapter
    init_from: Literal["scratch", "resume"] = "scratch"  # resume: from the checkpoint in out_dir
    # what is trained (tinylora.py)
    method: Literal["tinylora", "lora_xs", "lora", "full"] = "tinylora"  # full: the weights
    rank: int = 1  # r of the frozen SVD (paper: 2), or of LoRA
    u: int = 13  # tinylora: trained numbers per group of linears
    n_tie: int = 0  # tinylora: linears that share a group; 0: all of them
    tie: Literal["tiled", "structured"] = "tiled"  # share with neighbours, or with the same type
    # full: "all" is every weight, embedding and norms too; other targets are these linears' weights
    targets: str = "all"  # all, attention, mlp, or q_proj,v_proj ...; attention/mlp: a vector each
    alpha: float = 32.0  # lora: the update is scaled by alpha / rank
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of adapter.safetensors
    seed: int = 1337  # of the random projections, the data order and the sampling
    # one step
    lr: float = 0.005  # Adam, constant; paper: 1e-7 to 2e-4. 0 with lora or full: by a rule
    max_steps: int = 60  # optimiser steps
    batch_size: int = 16  # problems per step, over all processes; paper: 64
    group_size: int = 8  # completions per problem; paper: 4 on GSM8K, 8 on MATH
    max_new_tokens: int = 64  # longer completions are cut off and earn nothing; paper: 4096
    temperature: float = 1.0  # divides the logits in the sampler and in the trainer
    objective: Literal["grpo", "dr_grpo", "dapo", "gspo"] = "dapo"  # the paper used VERL's: dapo
    clip_low: float = 0.0  # the ratio is clipped below 1 - clip_low; 0: the objective's, see CLIP
    clip_high: float = 0.0  # and above 1 + clip_high; both matter from the second pass on
    kl_coef: float = 0.0  # k3 penalty towards the base model; paper: 0 on GSM8K, 0.001 on MATH
    num_passes: int = 1  # optimiser passes over a batch; 1 is exactly on policy
    tis_cap: float = 0.0  # weight tokens by min(trainer's / sampler's probability, cap); 0: off
    resample: int = 0  # rounds of new problems for groups without a winner (DAPO); 0: none
    overlong_tokens: int = 0  # the last tokens before the limit that cost reward (DAPO); 0: none
    grad_clip: float = 1.0  # bound on the gradient's norm; 0: none
    # the machine
    micro_batch_tokens: int = 4096  # in one forward and backward pass; changes memory, not results
    shard: int = 1  # processes that hold one copy of the weights between them (support/parallel.py)
    recompute: bool = False  # store only the layers' inputs for the backward pass: slower, smaller
    compile: bool = False  # torch.compile for the decode step
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    # the run
    eval_interval: int = 20  # steps between evaluations; 0: only before and after
    eval_size: int = 0  # problems in an evaluation; 0: all
    save_interval: int = 20  # steps between checkpoints; 0: only after
    wandb_log: bool = False  # log to Weights & Biases, too, project tinylora


# ---------------------------------------- the task: a config file may define its reward and problems

def reward(problem, completion):
    """What a completion earns: 1 if it ended and states the right answer in the format that the
    prompt asked for, else 0. problem: a row of the data, with "answer_format" added. completion:
    has text, ids, logprobs and truncated (was it cut off at max_new_tokens?)."""
    return float(verdicts(problem, completion)["strict"])


def verdicts(problem, completion):
    return score(completion.text, completion.truncated, problem["answer"], problem["answer_format"])


def problems(cfg, split):
    """The rows to train on (split "train") or to evaluate on ("test"): dicts with a "question", and
    whatever else reward() reads."""
    if split == "train":
        return load_problems(cfg.dataset, split)
    return load_problems(cfg.eval_dataset, split) if cfg.eval_dataset else []


# ------------------------------------------------------------------------------------ the objective

CLIP = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}


def group_advantages(rewards, objective):
    """Rewards relative to their group. rewards [P, G] -> [P, G] (DeepSeekMath, eq. 3)."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(dim=1)
    centred[equal] = 0.0  # exactly zero: a tiny std would amplify rounding noise
    if objective == "dr_grpo":  # Liu et al. 2025: the std favours very easy and very hard problems
        return centred
    std = centred.norm(dim=1, keepdim=True) / math.sqrt(rewards.shape[1] - 1)
    return centred / (std + 1e-6)


def overlong_penalty(lengths, limits, overlong_tokens):
    """What completions close to their limit pay, 0 to 1 (DAPO, Yu et al. 2025, eq. 13)."""
    if overlong_tokens == 0:
        return torch.zeros(lengths.shape)
    return ((lengths - (limits - overlong_tokens)) / overlong_tokens).clamp(0, 1)


def token_weights(batch, totals, cfg):
    """The weight of each rollout's tokens in the loss -> [B]. The normaliser is that of the batch
    of all processes, so the gradient does not depend on how the batch is cut."""
    lengths = torch.tensor([float(len(rollout.ids)) for rollout in batch])
    if cfg.objective == "dr_grpo":  # a constant normaliser does not favour long wrong completions
        return torch.full_like(lengths, 1 / (cfg.max_new_tokens * totals["batch_rollouts"]))
    if cfg.objective == "dapo":  # every token of the batch counts the same
        return torch.full_like(lengths, 1 / totals["batch_tokens"])
    return 1 / (lengths * totals["batch_rollouts"])  # mean over tokens, then over completions


def clipped_surrogate(log_ratio, advantages, loss_mask, cfg):
    """PPO's pessimistic objective of every token (Schulman et al. 2017), and whether it is clipped.
    log_ratio, loss_mask [B, T]; advantages [B, 1]. On policy the ratio is 1: only its gradient
    matters."""
    low, high = CLIP[cfg.objective]
    if cfg.objective == "gspo":  # Zheng et al. 2025: one ratio per sequence, the geometric mean
        lengths = loss_mask.sum(1).clamp(min=1)  # 0 in what keep_pace adds
        log_ratio = (log_ratio.sum(1) / lengths)[:, None].expand_as(log_ratio)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - (cfg.clip_low or low), 1 + (cfg.clip_high or high))
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    return surrogate, clipped * advantages < ratio * advantages


def batch_loss(net, batch, totals, cfg):
    """The loss of a micro-batch, and sums over its tokens for the log. The losses of all
    micro-batches add up to that of the whole batch, which `totals` counts."""
    if cfg.kl_coef:
        # The reference is the base model, that is, the adapter is off. It runs before the policy:
        # the backward pass, with recompute, repeats the policy's forward pass as the adapter is.
        net.adapter.enabled = False
        with torch.no_grad():
            reference, _, _ = completion_logprobs(net, batch, cfg.temperature)
        net.adapter.enabled = True
    logprobs, entropy, loss_mask = completion_logprobs(net, batch, cfg.temperature)
    for rollout, new in zip(batch, logprobs.detach()):
        if rollout.old_logprobs is None:  # in the first pass
            rollout.old_logprobs = new[: len(rollout.ids)]
    old = pad_sequence([rollout.old_logprobs for rollout in batch], batch_first=True)  # [B, T]
    sampled = [torch.tensor(rollout.logprobs) for rollout in batch]
    sampled = pad_sequence(sampled, batch_first=True).to(logprobs)
    advantages = torch.tensor([[rollout.advantage] for rollout in batch], device=logprobs.device)
    weights = token_weights(batch, totals, cfg).to(logprobs.device)[:, None] * loss_mask

    log_ratio = (logprobs - old) * loss_mask
    surrogate, clipped = clipped_surrogate(log_ratio, advantages, loss_mask, cfg)
    if cfg.tis_cap:  # truncated importance sampling (Yao et al. 2025)
        surrogate = surrogate * (old - sampled).exp().clamp(max=cfg.tis_cap)
    loss = -(surrogate * weights).sum()
    difference = (logprobs.detach() - sampled).abs() * loss_mask
    sums = {"tokens": loss_mask.sum(), "clipped": (clipped * loss_mask).sum(),
            "entropy": entropy.sum(), "diff": difference.sum()}
    if cfg.kl_coef:
        log_ratio = reference - logprobs
        kl = log_ratio.exp() - log_ratio - 1  # k3 (Schulman 2020): unbiased, never negative
        loss = loss + cfg.kl_coef * (kl * weights).sum()
        sums["kl"] = (kl * loss_mask).sum()
    sums = {name: total.item() for name, total in sums.items()}
    return loss, sums | {"loss": loss.item()}, difference.max().item()


# --------------------------------------------------------------------------- sampling and rewarding

@lru_cache(maxsize=4)
def epoch_order(seed, epoch, count):
    return np.random.RandomState([seed, epoch]).permutation(count).tolist()


def batch_positions(step, batch_size, count, seed):
    """Which of `count` problems a step takes: a list of (position, index). Every epoch is a
    permutation that depends on (seed, epoch) alone, so a resumed run needs no saved state."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [(position, epoch_order(seed, position // count, count)[position % count])
            for position in positions]


def replacement_positions(step, attempt, count, cfg):
    """Which problems may replace those of a step in attempt 1, 2, ..., cfg.resample. They follow an
    order of their own, and their positions are beyond all others, as these seed the sampling."""
    turn = step * cfg.resample + attempt - 1
    positions = batch_positions(turn, cfg.batch_size, count, cfg.seed + 1)
    return [(2**40 + position, index) for position, index in positions]


def sample_groups(net, tokenizer, asked, cfg):
    """A group of rewarded rollouts for each of the (position, problem) pairs, and counts over all
    of them."""
    prompts = [problem["prompt_tokens"] for _, problem in asked]
    groups = generate(net, tokenizer, prompts, cfg.group_size, cfg.max_new_tokens, cfg.temperature,
                      cfg.seed, prompt_ids=[position for position, _ in asked], progress="sampling")
    pairs = [(problem, completion) for (_, problem), group in zip(asked, groups)
             for completion in group]
    shape = len(asked), cfg.group_size
    rewards = torch.tensor([float(cfg.reward(*pair)) for pair in pairs]).view(shape)
    lengths = torch.tensor([len(completion.ids) for _, completion in pairs]).view(shape)
    limits = torch.tensor([problem["limit"] for _, problem in asked]).view(-1, 1)
    shaped = rewards - overlong_penalty(lengths, limits, cfg.overlong_tokens)
    advantages = group_advantages(shaped, cfg.objective).tolist()
    rollouts = [[Rollout(prompt, completion.ids, completion.logprobs, advantage)
                 for completion, advantage in zip(group, of_group)]
                for prompt, group, of_group in zip(prompts, groups, advantages)]
    equal = (shaped == shaped[:, :1]).all(dim=1).sum().item()
    counts = Counter(rollouts=len(pairs), tokens=lengths.sum().item(), reward=rewards.sum().item(),
                     equal=equal * cfg.group_size,
                     truncated=sum(completion.truncated for _, completion in pairs))
    if cfg.reward is reward:
        counts["lenient"] = sum(verdicts(*pair)["lenient"] for pair in pairs)
    return rollouts, counts


def sample_batch(net, tokenizer, train_set, cfg, step, ranks):
    """This process's rollouts of a step, and counts over all processes: of all that was sampled,
    and as batch_* of the rollouts that are left, by which the loss is divided.

    A group in which all completions earned the same has no gradient. Such a group is replaced by
    one of another problem if cfg.resample rounds find one (DAPO, Yu et al. 2025, section 3.2)."""
    def sample(positions):
        asked = [(position, train_set[index]) for position, index in positions]
        return sample_groups(net, tokenizer, asked, cfg)

    count = len(train_set)
    groups, counts = sample(ranks.mine(batch_positions(step, cfg.batch_size, count, cfg.seed)))
    for attempt in range(1, cfg.resample + 1):
        equal = [i for i, group in enumerate(groups) if not any(r.advantage for r in group)]
        if ranks.max(len(equal)) == 0:
            break
        positions = ranks.mine(replacement_positions(step, attempt, count, cfg))
        others, more = sample(positions[: len(equal)])
        counts.update(more)
        useful = [group for group in others if any(r.advantage for r in group)]
        for i, group in zip(equal, useful):
            groups[i] = group
    rollouts = [rollout for group in groups for rollout in group]
    counts.update(batch_rollouts=len(rollouts), batch_tokens=sum(len(r.ids) for r in rollouts))
    return rollouts, ranks.sum(counts)


def evaluate(net, tokenizer, test_set, cfg, ranks):
    """Rewards of greedy completions of held-out problems. Prints and returns figures over all."""
    mine = ranks.mine(test_set)
    prompts = [problem["prompt_tokens"] for problem in mine]
    groups = generate(net, tokenizer, prompts, 1, cfg.max_new_tokens, temperature=0,
                      progress="evaluating")
    rows = []
    for problem, [completion] in zip(mine, groups):
        lenient = verdicts(problem, completion)["lenient"] if cfg.reward is reward else None
        rows.append((float(cfg.reward(problem, completion)), lenient, len(completion.ids),
                     completion.truncated, problem["question"], completion.text))
    rewards, lenient, lengths, truncated, questions, texts = zip(*ranks.gather(rows))
    figures = {"reward": fmean(rewards), "stderr": pstdev(rewards) / math.sqrt(len(rewards)),
               "problems": len(rewards), "length": fmean(lengths), "truncated": fmean(truncated)}
    by_last_number = ""
    if cfg.reward is reward:
        figures["lenient"] = fmean(lenient)
        by_last_number = f" (read leniently {figures['lenient']:.3f})"
    print0(f"--- greedy {label_of(cfg)} {figures['reward']:.3f} +- {figures['stderr']:.3f}"
           f"{by_last_number} on {len(rewards)} problems, {figures['length']:.0f} tokens each, "
           f"{figures['truncated']:.1%} cut off. Example:\n    {questions[0]}\n    -> {texts[0]}")
    return figures


def label_of(cfg):
    return "accuracy" if cfg.reward is reward else "reward"


# ------------------------------------------------------------------------------------------ the run

def check(cfg):
    """Refuse settings that cannot work before anything is loaded."""
    at_least(cfg, 2, "group_size")  # the advantage is relative to the group's mean
    at_least(cfg, 1, "batch_size", "max_new_tokens", "num_passes", "micro_batch_tokens")
    at_least(cfg, 0, "max_steps", "lr", "clip_low", "clip_high", "kl_coef", "tis_cap", "grad_clip",
             "resample", "overlong_tokens", "eval_size", "eval_interval", "save_interval", "seed")
    if cfg.seed >= 2**32 - 1:  # RandomState, which orders the data, takes 32 bits of seed + 1
        raise UserError(f"seed must be below {2**32 - 1}, got {cfg.seed}")
    if cfg.temperature <= 0:
        raise UserError("temperature must be above 0 in training: greedy groups are all alike")
    if cfg.overlong_tokens >= cfg.max_new_tokens:
        raise UserError("overlong_tokens must be below max_new_tokens")
    if cfg.method == "full" and cfg.kl_coef:
        raise UserError("kl_coef must be 0 with method = full: the reference policy would be a "
                        "second copy of the weights")


def prepare(net, tokenizer, rows, cfg):
    """Add to every problem its prompt in token ids, and the limit and format of its answer. The
    model learns how long a row can become."""
    context = net.config.max_position_embeddings
    prompts = encode_problems(tokenizer, rows, cfg.system_prompt, cfg.prompt_template, context)
    for row, prompt in zip(rows, prompts):
        if cfg.reward is reward and "answer" not in row:
            raise UserError("the default reward compares with a problem's \"answer\", and there is "
                            f"none in {row}; define a reward in the config file, too")
        row["prompt_tokens"] = prompt
        row["limit"] = min(cfg.max_new_tokens, context - len(prompt))
        net.longest = max(net.longest, len(prompt) + row["limit"])
        row["answer_format"] = cfg.answer_format


def train(cfg):
    check(cfg)
    ranks = Ranks(cfg.device, cfg.shard)
    train_set = cfg.problems(cfg, "train")
    test_set = cfg.problems(cfg, "test")[: cfg.eval_size or None]
    tokenizer = load_tokenizer(cfg.model)
    dtype = "float32" if cfg.method == "full" else cfg.dtype  # 16 bits would round small steps away
    net = load_model(cfg.model, dtype, ranks.device, cfg.shard)
    net.model.recompute = cfg.recompute
    net.compile_decode = cfg.compile
    prepare(net, tokenizer, train_set + test_set, cfg)
    parameters, identity = tinylora.attach(net, cfg, cfg.shard)
    optimizer = torch.optim.Adam(parameters.values(), lr=cfg.lr, foreach=False)
    run = Run(cfg, ranks, parameters, optimizer, identity | {"script": "grpo.py"})
    if is_chief():
        save_settings(cfg, f"{cfg.out_dir}/settings.py")
    numbers = sum(p.numel() for p in parameters.values())
    print0(f"{cfg.method} trains {numbers:,} numbers of {cfg.model} on {len(train_set):,} problems "
           f"({net.dtype}, {net.device}, {ranks.dp_size} processes)")

    step = run.step
    while True:
        # Between two steps: evaluate, save, and stop if that was asked for.
        stop = run.stop_asked()
        if test_set and run.evaluation_due(step) and not stop:
            figures = evaluate(net, tokenizer, test_set, cfg, ranks)
            if run.log_evaluation(step, figures, figures["reward"]):
                tinylora.save(net, cfg, best=True)
        if run.save_due(step) or stop:
            run.save(step)
            tinylora.save(net, cfg)
        if step >= cfg.max_steps or stop:
            break

        # Sample a group of completions for each problem, reward them, compute advantages.
        began = time.time()
        rollouts, totals = sample_batch(net, tokenizer, train_set, cfg, step, ranks)
        sampled = time.time()

        # Push the policy towards the completions that beat their group's mean.
        if not cfg.kl_coef:
            rollouts = [r for r in rollouts if r.advantage]  # the others have no gradient
        passes = []
        max_diff = 0.0
        for _ in range(cfg.num_passes):
            sums = Counter()
            optimizer.zero_grad()
            for batch in keep_pace(net, micro_batches(rollouts, cfg.micro_batch_tokens)):
                loss, figures, diff = batch_loss(net, batch, totals, cfg)
                loss.backward()
                sums.update(figures)
                if not passes:  # the first pass has the weights that sampled
                    max_diff = max(max_diff, diff)
            grad_norm = reduce_gradients(parameters.values(), cfg.grad_clip)
            optimizer.step()
            passes.append(ranks.sum(sums))
        step += 1

        record = means(totals, passes, cfg)
        record |= {"max_diff": ranks.max(max_diff), "grad_norm": grad_norm,
                   "v_norm": norm_of([p.detach() for p in parameters.values()])}
        record["seconds"] = {"generate": sampled - began, "update": time.time() - sampled,
                             "tokens_per_second": totals["tokens"] / (sampled - began),
                             "peak_gb": peak_gb(net.device)}
        run.log(step, record)
        print0(f"step {step:4d} | {summary(record)}")
        for advice in advice_on(record, cfg, net.dtype):
            print0(f"warning: {advice}")
    if "v" in parameters and numbers <= 1000:
        text = tinylora.adapter_text(net.adapter, cfg.save_dtype)
        print0(f"the adapter as text: --adapter={text}")
    run.close(f"greedy {label_of(cfg)}", f"{numbers:,} numbers")


def means(totals, passes, cfg):
    """The record of a step: means over all sampled completions, then over trained tokens."""
    count = totals["rollouts"]
    first, last = passes[0], passes[-1]
    record = {"reward": totals["reward"] / count, "truncated": totals["truncated"] / count,
              "length": totals["tokens"] / count, "equal_groups": totals["equal"] / count,
              "groups": count // cfg.group_size, "loss": first["loss"]}
    if cfg.reward is reward:
        record["lenient"] = totals["lenient"] / count
    # The first pass scores with the weights that sampled. Clipping begins with the second pass.
    sums = {"entropy": first["entropy"], "diff": first["diff"], "clipped": last["clipped"]}
    if cfg.kl_coef:
        sums["kl"] = first["kl"]
    for name, total in sums.items():
        record[name] = total / first["tokens"] if first["tokens"] else None
    return record


def summary(record):
    """The line of a step on the screen."""
    seconds = record["seconds"]
    parts = [f"reward {record['reward']:.3f}", f"length {record['length']:.0f}",
             f"|v| {record['v_norm']:.3f}", f"grad {record['grad_norm']:.3f}"]
    if record["entropy"] is None:
        parts.append("no gradient: in every group all completions earned the same")
    else:
        parts += [f"entropy {record['entropy']:.2f}", f"sampler-trainer {record['diff']:.0e}"]
    return " | ".join([*parts, f"{seconds['generate']:.1f} + {seconds['update']:.1f} s"])


def advice_on(record, cfg, dtype):
    """What in a step's record calls for a change of settings."""
    if record["truncated"] > 0.2:
        yield (f"{record['truncated']:.0%} of the completions were cut off before their end; "
               f"raise max_new_tokens, which is {cfg.max_new_tokens}")
    if record["reward"] == 0 and record.get("lenient"):
        yield (f"{record['lenient']:.0%} of the completions hold the right number, but not in the "
               f"format '{cfg.answer_format}'; change prompt_template or answer_format")
    if record["equal_groups"] > 0.9:
        yield ("in nearly all groups all completions earned the same, which teaches nothing; take "
               "harder or easier problems, a larger group_size, or resample")
    if record["entropy"] is not None and record["entropy"] < 0.005:
        yield "the entropy is nearly 0, so all completions of a group are the same; lower lr"
    if dtype == torch.float32 and record["diff"] and record["diff"] > 1e-3:
        yield (f"sampler and trainer disagree by {record['diff']:.3f} on average, which is a bug: "
               "do AdaptedLinear (tinylora.py) and FusedLinear (support/fused.py) still agree?")
    elif record["diff"] and record["diff"] > 0.05:
        yield (f"sampler and trainer disagree by {record['diff']:.3f} on average; set tis_cap = 2 "
               "or use float32")


if __name__ == "__main__":
    train(configure(Settings, reward, problems))
