"""GRPO on a frozen model with an adapter of a few numbers (or with LoRA, or on all weights).

    python grpo.py                                         # the embedded toy, half a minute on a laptop's CPU
    python grpo.py config/qwen7b_u13.py                    # 13 numbers on Qwen2.5-7B, one GPU
    python grpo.py --model=DIR --dataset=FILE.jsonl        # any checkpoint and problems you have
    torchrun --nproc_per_node=8 grpo.py config/qwen7b_u13.py
    torchrun --nproc_per_node=8 grpo.py --shard=8 ...      # one copy of the weights on eight GPUs

One step: sample a group of answers to each of some problems, reward the right ones, push the policy towards the
answers that beat their group's mean. What is not here: a critic, a reward model, a second copy of the weights (the
reference policy is the same model with v = 0), a merged or quantised engine that samples from another policy.
"""

import glob
import hashlib
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import chain, compress

from configurator import UserError, configure, prepare_out_dir, run, whole_file  # isort: skip (first: it says what is missing)

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # torch does that later anyway, and then it holds the default group for good
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

import eval_math
import tinylora
from model import attention, compile_model, free_memory, load_model, load_tokenizer, save_model
from sample import check_template, fitting_rows, generate
from support.parallel import is_chief, leave_ranks, own_part, say, shard_model, start_ranks, whole, whole_size

# what to train: the defaults train the embedded toy; the paper's values are in config/
model = "toy/base"  # checkpoint directory or hub name
dataset = "toy/train.jsonl"  # problems: a .jsonl file, a folder with train.jsonl, or a name (eval_math.py lists them)
eval_dataset = "toy/test.jsonl"  # held-out problems, greedy accuracy
system_prompt = ""  # system message; empty: what the chat template puts there, if anything
prompt_template = "{question}"  # the user's message
answer_format = "hash"  # what the prompt asks for and the reward reads: hash (#### 42), boxed (\boxed{42}) or any
out_dir = "out/toy"  # log, checkpoints, adapter
init_from = "scratch"  # scratch, or resume: go on from the checkpoint in out_dir
# what is trained (tinylora.py)
method = "tinylora"  # tinylora, lora_xs, lora, or full: all weights, which leaves rank to save_dtype unread
rank = 1  # r of the frozen SVD, paper: 2; or of LoRA
u = 13  # tinylora: trained numbers per group
n_tie = 0  # tinylora: linears that share a group; 0: all. The paper's 13 numbers are u = 1, n_tie = 16 on 196 linears
tie = "tiled"  # tinylora: tiled (neighbours share) or structured (same type in neighbouring layers)
targets = "all"  # all, attention, mlp, or linears such as q_proj,v_proj; attention/mlp: a vector for each
alpha = 32.0  # lora: its update is scaled by alpha / rank
save_dtype = "float32"  # of the numbers in adapter.safetensors: float32, bfloat16, float16; trained in float32
seed = 1337  # of the random projections, the data order and the sampling
# optimisation
lr = 0.005  # Adam, constant, no weight decay; paper at 7B: 1e-7 ... 2e-4. 0 with lora or full: LoRA Without Regret's
max_steps = 60  # optimiser steps
batch_size = 16  # problems a step, over all ranks; paper: 64
group_size = 8  # answers a problem; paper: 4 on GSM8K, 8 on MATH
max_new_tokens = 64  # an answer is cut off after so many, and earns nothing; paper: 4096
temperature = 1.0  # of the sampling; the trainer divides its logits by it too
top_p = 1.0  # only 1.0: the policy ratio is biased when sampling from a cut distribution
top_k = 0  # only 0, likewise
objective = "dapo"  # grpo, dr_grpo, dapo (mean over tokens, the default of VERL, in which the paper trained), gspo
clip_low = 0.0  # the policy ratio is clipped below at 1 - clip_low; 0: the objective's own, in CLIP below
clip_high = 0.0  # and above at 1 + clip_high; 0: likewise. Clipping acts from the second pass on
kl_coef = 0.0  # k3 penalty towards the base model (not with full); paper: 0 on GSM8K, 0.001 on MATH
num_passes = 1  # optimiser passes over each batch; 1 is exactly on policy
tis_cap = 0.0  # truncated importance sampling: weight tokens by min(trainer's / sampler's probability, this); 0: off
resample = 0  # rounds of new problems in place of groups whose answers all earned the same (DAPO); 0: none
overlong_tokens = 0  # the last so many tokens before max_new_tokens cost reward, up to 1 (DAPO); 0: none
grad_clip = 1.0  # bound on the gradient's norm; 0: none
micro_batch_tokens = 4096  # tokens, padding too, in one forward and backward pass: bounds memory, not the gradient
packing = True  # rows end to end without padding, a prompt once for its group; False: padded, a prompt for each
shard = 1  # processes of torchrun that hold one copy of the weights between them: for models beyond one GPU
recompute = False  # keep only the layers' inputs and compute the rest again in the backward pass: less memory, slower
compile = False  # torch.compile for the decode step and, if packing = False, training's blocks; GPU: not measured
# bookkeeping
eval_interval = 20  # steps between evaluations; 0: only before and after
eval_size = 0  # problems in an evaluation; 0: all
save_interval = 20  # steps between checkpoints; 0: only after
wandb_log = False  # metrics go to Weights & Biases too, project tinylora, as a run with out_dir's name
tensorboard = False  # and to TensorBoard, in out_dir
dtype = "auto"  # auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16
device = "auto"  # auto, cpu, cuda, cuda:1 ...


CLIP = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}  # their papers' bounds

# ------------------------------------------------------------------------------------------ the objective, in pieces


@dataclass
class Row:
    """One sampled answer."""

    prompt: list  # token ids
    ids: list  # the sampled token ids, never re-encoded from text; the stop token is trained like any other
    sampler_logprobs: list
    advantage: float
    old_logprobs: torch.Tensor | None = None  # [len(ids)], under the policy that the first pass started from
    trained: list | None = None  # which of ids count, where the prompt's turns and the model's alternate; None: all


def group_advantages(rewards, objective="grpo", eps=1e-6):
    """Advantages within groups. rewards [P, G] -> [P, G] (DeepSeekMath 2024, eq. 3; std over G - 1)."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    centred[(rewards == rewards[:, :1]).all(dim=1)] = 0.0  # not what is left of rounding, which the std would blow up
    if objective == "dr_grpo":  # Dr. GRPO (Liu et al. 2025): the std would weigh easy and hard problems up
        return centred
    return centred / (rewards.std(dim=1, keepdim=True) + eps)


def overlong_penalty(lengths, max_new_tokens, overlong_tokens):
    """What answers close to the limit pay, 0 to 1 (DAPO, Yu et al. 2025, eq. 13): lengths [P, G] -> [P, G].
    max_new_tokens: a number, or one a prompt [P, 1]."""
    if not overlong_tokens:
        return torch.zeros(lengths.shape)
    return ((lengths - (max_new_tokens - overlong_tokens)) / overlong_tokens).clamp(0, 1)


def token_weights(lengths, objective, max_new_tokens, num_rows, num_tokens):
    """Weight of every token of rows with these lengths [B] in the loss -> [B]. num_rows and num_tokens count the whole
    global batch, fixed before it is cut into micro-batches: the gradient is the same for any cut."""
    lengths = torch.as_tensor(lengths, dtype=torch.float32)
    if objective == "dr_grpo":  # a constant normaliser: long wrong answers are not favoured
        return torch.full_like(lengths, 1 / (max_new_tokens * num_rows))
    if objective == "dapo":  # DAPO (Yu et al. 2025): every token of the batch counts the same
        return torch.full_like(lengths, 1 / num_tokens)
    return 1 / (lengths * num_rows)  # grpo, gspo: mean over an answer's tokens, then over answers


def policy_loss(logp, old_logp, advantages, weights, mask, objective="grpo", clip_low=0.2, clip_high=0.2, mismatch=1):
    """Clipped surrogate, summed. logp, old_logp, mask, mismatch [B, T]; advantages, weights [B] -> loss, number of
    clipped tokens. mismatch: a factor of every token, without gradient.

    On policy the ratio is 1 and the value is that of the advantages alone: it is the gradient that matters.
    """
    log_ratio = (logp - old_logp) * mask
    if objective == "gspo":  # GSPO (Zheng et al. 2025): one ratio a sequence, the geometric mean of its tokens'
        log_ratio = (log_ratio.sum(1) / mask.sum(1)).unsqueeze(1).expand_as(logp)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    advantages = advantages.unsqueeze(1)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)  # pessimistic: PPO (Schulman et al. 2017)
    clip_count = ((clipped * advantages < ratio * advantages) * mask).sum()
    return -(surrogate * mismatch * mask * weights.unsqueeze(1)).sum(), clip_count


def k3(logp, ref_logp):
    """Schulman's low-variance estimate of KL(policy || reference) per token, never negative."""
    return (ref_logp - logp).exp() - (ref_logp - logp) - 1


def token_logprobs(hidden, head, targets, temperature, chunk=0):
    """Log-prob of targets and entropy under softmax(hidden head^T / T). hidden [n, D], targets [n] -> [n], [n], in
    fp32 or in fp64 where hidden is.

    Works through chunks of tokens: with a vocabulary of 152k the logits of one chunk, not of the batch, are alive at a
    time. chunk: tokens; 0: as many as have 256 MB of logits.
    """
    chunk = chunk or max(1, 2**26 // len(head))
    if not head.requires_grad:
        return FrozenHead.apply(hidden, head, targets, temperature, chunk)
    parts = [checkpoint(lambda *x: chunk_logprobs(*x)[:2], hidden[i : i + chunk], head, targets[i : i + chunk],
                        temperature, use_reentrant=False, preserve_rng_state=False)  # nothing here is random
             for i in range(0, len(targets), chunk)]
    return tuple(map(torch.cat, zip(*parts)))


def chunk_logprobs(hidden, head, targets, temperature):
    """Log-probs and entropies of a chunk, and the probabilities of all words [chunk, V]."""
    logits = F.linear(hidden, head).to(torch.promote_types(head.dtype, torch.float32))  # fp64 stays what it is
    logprobs = torch.log_softmax(logits.div_(temperature), dim=-1)
    logp = logprobs.gather(1, targets[:, None]).squeeze(1)
    with torch.no_grad():
        p = torch.exp(logprobs, out=logits)  # takes the place of what is not needed any more
        entropy = -(p * logprobs if logp.requires_grad else logprobs.mul_(p)).sum(-1)  # in place: one copy less
    return logp, entropy, p


class FrozenHead(torch.autograd.Function):
    """token_logprobs where the head is not trained. The gradient is made on the way, of the probabilities at hand:
    d log p / d hidden = (head[target] - sum_w p_w head[w]) / T. To compute the logits again would be a third product.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, temperature, chunk):
        scores, slope = [], torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for i in range(0, len(targets), chunk):
            at = targets[i : i + chunk]
            logp, entropy, p = chunk_logprobs(hidden[i : i + chunk], head, at, temperature)
            scores.append((logp, entropy))
            if slope is not None:  # 1 - p of the target before it is rounded to 16 bits: it may be small
                p.scatter_add_(1, at[:, None], p.new_full((len(at), 1), -1.0))
                slope[i : i + chunk] = (p.to(head.dtype) @ head).div_(-temperature)
        ctx.slope = slope
        logp, entropy = map(torch.cat, zip(*scores))
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad, _):
        return (ctx.slope * grad[:, None]).to(ctx.slope.dtype), None, None, None, None


class Packed:
    """Rows in one line without padding: every prompt once, and behind it the answers to it. A token attends to its
    prompt and to its own answer, up to itself, so the rows of a group share the work for their prompt. Stands where a
    cache stands in the model's forward pass.

    ids, positions [1, total]: the line. before: for every row the places of the tokens that its ids follow.
    """

    def __init__(self, rows, device, most=256):
        """most: tokens of answers that attend in one call; more calls than needed cost time, and so do long masks."""
        groups = {}  # prompt: its rows
        for i, row in enumerate(rows):
            groups.setdefault(tuple(row.prompt), []).append(i)
        ids, positions, self.before = [], [], [None] * len(rows)
        self.pieces = []  # of the line: (the prompt's piece, lengths of answers); a prompt is (None, [its length])

        def add(tokens, position):
            ids.extend(tokens)
            positions.extend(range(position, position + len(tokens)))
            return range(len(ids) - len(tokens), len(ids))

        for prompt, members in groups.items():
            number, last = len(self.pieces), add(prompt, 0)[-1]
            self.pieces.append((None, [len(prompt)]))
            for i in members:
                answer = rows[i].ids[:-1]  # its last token precedes nothing
                self.before[i] = [last, *add(answer, len(prompt))]
                if self.pieces[-1][0] is None or sum(self.pieces[-1][1]) + len(answer) > most:
                    self.pieces.append((number, []))
                self.pieces[-1][1].append(len(answer))
        self.ids, self.positions = (torch.tensor([x], device=device) for x in (ids, positions))
        self.masks = self.spans = None  # made by the first layer for all

    def attend(self, layer, q, k, v):
        """q [1, heads, total, hd], k and v [1, kv_heads, total, hd] -> [1, heads, total, hd]: what Attention calls."""
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability() >= (8, 0):
            return self.attend_at_once(q, k, v)
        self.masks = self.masks or [self.mask(q, *piece) for piece in self.pieces]
        sizes = [sum(lengths) for _, lengths in self.pieces]
        q, k, v = (x.transpose(1, 2).split(sizes, dim=1) for x in (q, k, v))  # by tokens, as they lie in memory
        out = []
        for i, ((prompt, _), mask) in enumerate(zip(self.pieces, self.masks)):
            keys, values = (x[i] if prompt is None else torch.cat((x[prompt], x[i]), dim=1) for x in (k, v))
            y = attention(*(x.transpose(1, 2) for x in (q[i], keys, values)), mask)
            out.append(y.transpose(1, 2))
        return torch.cat(out, dim=1).transpose(1, 2)

    def mask(self, like, prompt, lengths):
        """[T, P + T] of answers of these lengths, to be added to their scores: 0 for all of the prompt, and for the own
        answer up to itself. None: causal."""
        if prompt is None:
            return None
        answer = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(like.device)
        before = self.pieces[prompt][1][0]
        mask = like.new_zeros(len(answer), before + len(answer))
        mask[:, before:].masked_fill_((answer[:, None] == answer).tril().logical_not_(), -math.inf)
        return mask

    def attend_at_once(self, q, k, v):
        """The same with every answer's keys gathered, for the one kernel that does all (16 bits on a GPU)."""
        from torch.nn.attention.varlen import varlen_attn

        if self.spans is None:
            lengths = [length for _, lengths in self.pieces for length in lengths]
            tokens, keys, prompt = iter(torch.arange(q.shape[2]).split(lengths)), [], None
            for number, pieces in self.pieces:
                if number is None:
                    prompt = next(tokens)
                    keys.append(prompt)
                else:
                    keys += [torch.cat((prompt, next(tokens))) for _ in pieces]
            sizes = [len(piece) for piece in keys]
            ends = (torch.tensor([0, *x]).cumsum(0, dtype=torch.int32).to(q.device) for x in (lengths, sizes))
            self.spans = torch.cat(keys).to(q.device), *ends, max(lengths), max(sizes)
        keys, *spans = self.spans
        k, v = (x[0].transpose(0, 1).index_select(0, keys) for x in (k, v))  # [keys, kv_heads, hd]
        options = {"enable_gqa": True}
        if "enable_gqa" not in inspect.signature(varlen_attn).parameters:  # in older torch
            options, k, v = {}, *(x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        y = varlen_attn(q[0].transpose(0, 1), k, v, *spans, window_size=(-1, 0), **options)  # causal
        return y.transpose(0, 1)[None]


def completion_logprobs(net, tokenizer, rows, temperature, packing=False):
    """Log-probs and entropies of the rows' trained tokens, and their mask: three [B, T], T the longest completion."""
    if packing:
        packed = Packed(rows, net.device)
        hidden, before = net.model(packed.ids, packed.positions, packed), packed.before
    else:
        full = [torch.tensor(row.prompt + row.ids) for row in rows]
        ids = pad_sequence(full, batch_first=True, padding_value=tokenizer.pad_id).to(net.device)  # [B, longest]
        hidden = net.model(ids)
        starts = [i * ids.shape[1] + len(row.prompt) - 1 for i, row in enumerate(rows)]
        before = [range(start, start + len(row.ids)) for start, row in zip(starts, rows)]
    trained = [row.trained or [True] * len(row.ids) for row in rows]
    mask = pad_sequence(list(map(torch.tensor, trained)), batch_first=True).to(net.device)  # [B, T]
    places, targets = (torch.tensor([*chain(*map(compress, lines, trained))], device=net.device)
                       for lines in (before, [row.ids for row in rows]))
    # No index: its gradient adds up what rows share, a prompt's last token, in an order that varies with the threads.
    hidden = F.embedding(places, hidden.flatten(0, 1))
    logp, entropy = token_logprobs(hidden, net.head, targets, temperature)
    spread = logp.new_zeros(mask.shape)
    return spread.masked_scatter(mask, logp), spread.masked_scatter(mask, entropy), mask


def micro_batches(rows, max_tokens, packing=False):
    """Cut rows into batches of at most max_tokens tokens as they will lie: padded, the longest first, or in one line
    with every prompt once. A longer row goes alone."""
    def length(row):
        return len(row.prompt) + len(row.ids)

    batch, tokens = [], 0
    for row in sorted(rows, key=lambda row: row.prompt) if packing else sorted(rows, key=length, reverse=True):
        if packing:
            grown = tokens + (len(row.ids) if batch and batch[-1].prompt == row.prompt else length(row))
        else:
            grown = (len(batch) + 1) * length(batch[0] if batch else row)
        if batch and grown > max_tokens:
            yield batch
            batch, grown = [], length(row)
        batch.append(row)
        tokens = grown
    if batch:
        yield batch


def accumulate_gradient(net, tokenizer, rows, cfg, num_rows, num_tokens):
    """Add the gradient of the objective over `rows` to what is trained; num_rows and num_tokens are those of the whole
    global batch. Returns {loss, sums over tokens: clipped, kl, entropy, diff, their number: tokens, diff_max}."""
    sums = dict(loss=0.0, clipped=0.0, kl=0.0, entropy=0.0, diff=0.0, diff_max=0.0, tokens=0)
    clip_low, clip_high = (own or default for own, default in zip((cfg.clip_low, cfg.clip_high), CLIP[cfg.objective]))
    for batch in micro_batches(rows, cfg.micro_batch_tokens, cfg.packing):
        if cfg.kl_coef:  # first: between a forward pass and its backward pass it would change what is recomputed
            net.adapter.enabled = False  # v = 0 is the reference policy
            try:
                with torch.no_grad():
                    ref_logp, _, _ = completion_logprobs(net, tokenizer, batch, cfg.temperature, cfg.packing)
            finally:
                net.adapter.enabled = True
        logp, entropy, mask = completion_logprobs(net, tokenizer, batch, cfg.temperature, cfg.packing)
        for row, row_logp in zip(batch, logp.detach()):
            if row.old_logprobs is None:
                row.old_logprobs = row_logp[: len(row.ids)]
        old_logp = pad_sequence([row.old_logprobs for row in batch], batch_first=True)  # [B, T], padded with 0
        advantages = torch.tensor([row.advantage for row in batch], device=logp.device)
        lengths = [len(row.ids) for row in batch]
        weights = token_weights(lengths, cfg.objective, cfg.max_new_tokens, num_rows, num_tokens).to(logp.device)
        sampler_logp = pad_sequence([torch.tensor(row.sampler_logprobs) for row in batch], batch_first=True).to(logp)
        check_finite(logp, mask, batch, cfg)
        mismatch = (old_logp - sampler_logp).exp().clamp(max=cfg.tis_cap) if cfg.tis_cap else 1  # Yao et al. 2025
        loss, clipped = policy_loss(logp, old_logp, advantages, weights, mask, cfg.objective, clip_low, clip_high,
                                    mismatch)
        if cfg.kl_coef:
            kl = k3(logp, ref_logp) * mask
            loss = loss + cfg.kl_coef * (kl * weights[:, None]).sum()
            sums["kl"] += kl.sum().item()
        loss.backward()
        diff = (logp.detach() - sampler_logp).abs() * mask
        sums["loss"] += loss.item()
        sums["clipped"] += clipped.item()
        sums["entropy"] += entropy.sum().item()
        sums["diff"] += diff.sum().item()
        sums["diff_max"] = max(sums["diff_max"], diff.max().item())
        sums["tokens"] += int(mask.sum())
    return sums


def check_finite(logp, mask, batch, cfg):
    """Stop at the first row with a NaN or infinite log-prob, and write it down for whoever looks into it."""
    bad = (~logp.isfinite() & mask).any(1).nonzero()
    if len(bad):
        path = os.path.join(cfg.out_dir, "not_finite.json")
        with open(path, "w", encoding="utf-8") as f:
            row = batch[int(bad[0])]
            json.dump(vars(row) | {"old_logprobs": None, "trainer_logprobs": logp[int(bad[0])].tolist()}, f)
        raise UserError(f"a log-prob is not finite; its row is in {path}, and this pass changed nothing. Lower lr, or "
                        "use --dtype=float32")


# ---------------------------------------------------------------------------------------------------------- the run


def batch_positions(step, batch_size, num_problems, seed):
    """Which problems step `step` takes: (position, index) pairs. Every epoch is a fresh permutation, a function of
    (seed, epoch) alone, so that a resumed run goes on in the same order without any saved state."""
    return [(position, int(epoch_order(seed, position // num_problems, num_problems)[position % num_problems]))
            for position in range(step * batch_size, (step + 1) * batch_size)]


def further_positions(step, attempt, cfg, num_problems):
    """Which problems may replace those of a step in attempt 1, 2 ... cfg.resample. They walk a second order of all
    problems, so that the first still visits each once an epoch, and a resumed run still needs no saved state."""
    turn = step * cfg.resample + attempt - 1
    return [(2**40 + position, index)  # a name for the random numbers that no position of the first order has
            for position, index in batch_positions(turn, cfg.batch_size, num_problems, cfg.seed + 1)]


@lru_cache(maxsize=4)
def epoch_order(seed, epoch, num_problems):
    return np.random.RandomState([seed, epoch]).permutation(num_problems)


def check_settings(cfg):
    """Refuse what cannot work before anything is loaded."""
    refuse([
        *shared_rules(cfg),
        (cfg.method == "full" and cfg.kl_coef > 0, "kl_coef must be 0 with method = full: the reference policy would "
         "be a second copy of the weights"),
        (cfg.group_size < 2, "group_size must be at least 2: the advantage is relative to the group's mean"),
        (cfg.top_p != 1.0 or cfg.top_k != 0, "top_p and top_k must stay 1.0 and 0 in training: sampling from a cut "
         "distribution biases the policy ratio (use temperature)"),
        (cfg.temperature <= 0, "temperature must be above 0 in training: greedy groups are all alike"),
        (cfg.objective not in CLIP, f"objective must be one of {', '.join(CLIP)}"),
        (min(cfg.batch_size, cfg.max_new_tokens, cfg.num_passes, cfg.micro_batch_tokens) < 1 or cfg.max_steps < 0,
         "batch_size, max_new_tokens, num_passes and micro_batch_tokens must be at least 1, max_steps at least 0"),
        (min(cfg.lr, cfg.clip_low, cfg.clip_high, cfg.kl_coef, cfg.grad_clip, cfg.seed, cfg.eval_size, cfg.resample)
         < 0, "lr, clip_low, clip_high, kl_coef, grad_clip, seed, eval_size and resample must not be negative"),
        (not 0 <= cfg.overlong_tokens < cfg.max_new_tokens or cfg.tis_cap < 0, "overlong_tokens must be 0 or more and "
         "below max_new_tokens, tis_cap 0 or more"),
    ])


def refuse(rules):
    """UserError with the message of the first of the (is_broken, message) that is."""
    for is_broken, message in rules:
        if is_broken:
            raise UserError(message)


def shared_rules(cfg):
    """What check_settings refuses of the settings that grpo.py and sft.py share."""
    methods = [*tinylora.SETTINGS, "full"]
    return [
        (cfg.method not in methods, f"method '{cfg.method}' is unknown; {', '.join(methods)} are known"),
        (cfg.save_dtype not in tinylora.DTYPES, f"save_dtype must be one of {', '.join(tinylora.DTYPES)}"),
        (cfg.method == "full" and cfg.dtype not in ("auto", "float32"), "method = full trains float32 weights: small "
         "steps are rounded away in 16 bits"),
        (cfg.lr == 0 and cfg.method not in ("lora", "full"), "lr must be above 0: there is a rule for lora and full "
         "alone"),
        (cfg.wandb_log and find_spec("wandb") is None, "wandb_log = True needs wandb: pip install wandb"),
        (cfg.tensorboard and find_spec("tensorboard") is None,
         "tensorboard = True needs tensorboard: pip install tensorboard"),
        (cfg.dtype == "float16", "dtype = float16 has too short a range for gradients: train in bfloat16 or float32"),
        (cfg.answer_format not in ("hash", "boxed", "any"), "answer_format must be hash, boxed or any"),
        (cfg.init_from not in ("scratch", "resume"), "init_from must be scratch or resume"),
        (cfg.init_from == "resume" and not os.path.isdir(cfg.out_dir), f"cannot resume: {cfg.out_dir} holds no whole "
         "checkpoint; leave out init_from to start"),
        (os.path.isfile(cfg.out_dir), f"out_dir '{cfg.out_dir}' cannot be written: File exists; name another"),
        (min(cfg.eval_interval, cfg.save_interval) < 0, "eval_interval and save_interval must not be negative"),
        (cfg.seed >= 2**32 - 1, "seed must be below 4294967295"),
    ]


def trained_parameters(net, cfg):
    """What is trained, {name: parameter}, and the settings without which it means something else. Attaches the
    adapter, and cuts the weights where ranks share them; with lr = 0, puts the rule's in its place."""
    if cfg.lr == 0:
        cfg.lr = tinylora.learning_rate_rule(net.config, cfg.method, cfg.max_steps)
        say(f"lr = {cfg.lr:.3g} (learning_rate_rule in tinylora.py)")
    unread = [key for key in ("rank", "u", "n_tie", "tie", "targets", "alpha")
              if key not in tinylora.SETTINGS.get(cfg.method, ()) and getattr(cfg, key) != globals()[key]]
    if unread:
        say(f"method = {cfg.method} does not read {', '.join(unread)}")
    if cfg.method == "full":
        identity = {"method": "full", "base": tinylora.fingerprint(net)}
        if net.shard:
            shard_model(net)
        parameters = dict(net.requires_grad_(True).named_parameters())
        for p in parameters.values():
            if net.shard and not hasattr(p, "cut"):  # each rank knows its gradient whole, and adds its share of it
                p.register_hook(lambda gradient: gradient / net.shard.size)
        return parameters, identity
    adapter = tinylora.add_adapter(net, cfg.method, cfg.rank, cfg.u, cfg.n_tie, cfg.tie, cfg.seed, cfg.targets,
                                   cfg.alpha)
    if net.shard:
        shard_model(net)
    return dict(adapter.named_parameters()), adapter.meta


def save_trained(net, cfg, best=False):
    """Write what a run is for: the adapter, or with method = full the model; the last, or the best evaluated so far."""
    if cfg.method == "full":
        name = "best" if best else "model"
        save_model(net, os.path.join(cfg.out_dir, name), tokenizer_from=cfg.model)
    else:
        name = "best.safetensors" if best else "adapter.safetensors"
        tinylora.save_adapter(net.adapter, os.path.join(cfg.out_dir, name), cfg.save_dtype)


def all_reduce(values, net, op="sum"):
    """Sum over the ranks that work on different rows (or maximum over all) of a list of numbers; the list itself
    without torchrun."""
    if not dist.is_initialized():
        return values
    t = torch.tensor(values, dtype=torch.float64, device=net.device)
    if op == "max":
        dist.all_reduce(t, dist.ReduceOp.MAX)
    else:
        dist.all_reduce(t, group=net.shard.peers if net.shard else None)
    return t.tolist()


class Interrupt:
    """Ctrl-C or SIGTERM raises KeyboardInterrupt at once while answers are sampled, when nothing has changed since the
    last step; from hold() on, when the update begins, it waits for release(), when step count, weights and log agree
    again. Ranks that share the weights can only leave together: there it always waits for release(), and what one of
    them was asked, all do."""

    def __init__(self, net=None):
        self.net = net if net and net.shard else None

    def __enter__(self):
        self.held, self.requested = bool(self.net), False
        self.exit_code = 130
        self.previous = {name: signal.signal(name, self.handle) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for name, handler in self.previous.items():
            signal.signal(name, handler)

    def handle(self, number, _):
        self.requested, self.exit_code = True, 128 + number
        if not self.held:
            raise KeyboardInterrupt

    def hold(self):
        self.held = True

    def release(self):
        self.held, requested = bool(self.net), self.requested
        if self.net:  # what is asked of this rank meanwhile stands until the next time
            [requested] = all_reduce([requested], self.net, "max")
        if requested:
            raise KeyboardInterrupt


def save_checkpoint(path, parameters, optimizer, step, history, identity):
    """Parameters, Adam's moments, step, `history` (what the last line of the run reports), `identity` (what the
    parameters mean) and the code's revision in one safetensors file with a checksum. It is written aside and renamed,
    and the one before is kept: a run killed at any moment, or a damaged file, costs some save_interval steps. Where
    ranks hold parts of the parameters, all of them call this; the file is the same as that of one process."""
    tensors = {f"param.{name}": whole(p) for name, p in parameters.items()}
    for (i, state), p in zip(sorted(optimizer.state_dict()["state"].items()), parameters.values()):
        tensors |= {f"optimizer.{i}.{key}": whole(p, value) for key, value in state.items()}
    if not is_chief():
        return
    info = {"step": step, "history": history, "identity": identity, "revision": revision()}
    info = {key: json.dumps(value) for key, value in info.items()}
    with whole_file(path) as aside:
        save_file(tensors, aside, metadata=info | {"sha256": checksum(tensors, info)})
        if os.path.exists(path):
            os.replace(path, previous(path))


def previous(path):
    return path.removesuffix(".safetensors") + ".previous.safetensors"


def checksum(tensors, info):
    digest = hashlib.sha256(json.dumps(info, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@lru_cache
def revision():
    """The commit that this code is at, with a + if files differ from it; empty where git cannot tell."""
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def read_checkpoint(path):
    """(tensors, info) of a checkpoint whose checksum is right; OSError otherwise."""
    try:
        with safe_open(path, framework="pt") as f:
            info, tensors = f.metadata() or {}, {name: f.get_tensor(name) for name in f.keys()}
    except SafetensorError as error:
        raise OSError(str(error)) from None
    if info.pop("sha256", None) != checksum(tensors, info):
        raise OSError("its checksum is wrong")
    return tensors, {key: json.loads(value) for key, value in info.items()}


def load_checkpoint(path, parameters, optimizer, identity):
    """Restore what save_checkpoint wrote, the one before where the last is damaged; returns step, history and the file
    that was read. Raises UserError where there is none, or one of other settings."""
    for file in (path, previous(path)):
        try:
            tensors, info = read_checkpoint(file)
            break
        except OSError as error:
            print(f"{file} cannot be used: {error}")
    else:
        raise UserError(f"cannot resume: {os.path.dirname(path)} holds no whole checkpoint; leave out "
                        "init_from to start")
    before = {"script": identity.get("script")} | info["identity"]  # earlier versions did not write it
    different = [key for key in identity if before.get(key) != identity[key]
                 and not (key == "base" and tinylora.same_base(before.get(key, ""), identity[key]))]
    if different:
        raise UserError(f"cannot resume: {file} was made with another {', '.join(different)}")
    state, in_order = {}, list(parameters.values())
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "param":
            parameters[name].data.copy_(own_part(parameters[name], tensor))
        else:
            i, _, field = name.partition(".")
            state.setdefault(int(i), {})[field] = own_part(in_order[int(i)], tensor)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return info["step"], info["history"], file


def open_log(path, step):
    """Open log.jsonl for appending, without the lines of steps that a resumed run is going to repeat."""
    lines = []
    if step and os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as f:
                lines = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} holds a line that no run wrote ({error}); remove it and resume again") from None
    with whole_file(path) as aside, open(aside, "w", encoding="utf-8") as log:  # a run killed here keeps the log it had
        log.writelines(lines)
    return open(path, "a", encoding="utf-8")


def open_reports(cfg, step):
    """Where else a line of the log goes: report(record), and close()."""
    sinks, closing = [], []  # a sink takes (step, {name: number})
    if cfg.wandb_log:
        import wandb
        wandb_run = wandb.init(project="tinylora", name=os.path.basename(os.path.normpath(cfg.out_dir)),
                               dir=cfg.out_dir, config=vars(cfg))
        sinks.append(lambda step, numbers: wandb_run.log(numbers, step=step))
        closing.append(wandb_run.finish)
    if cfg.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(cfg.out_dir, purge_step=step + 1)  # what a resumed run repeats
        sinks.append(lambda step, numbers: [writer.add_scalar(name, x, step) for name, x in numbers.items()])
        closing.append(writer.close)

    def report(record):
        parts = [(key, value if isinstance(value, dict) else {"": value}) for key, value in record.items()]
        numbers = {f"{key}/{name}".rstrip("/"): x for key, part in parts for name, x in part.items()
                   if isinstance(x, (int, float)) and key != "step"}
        for sink in sinks:
            sink(record["step"], numbers)

    return report, lambda: [close() for close in closing]


def training_loop(cfg, net, tokenizer, parameters, optimizer, identity, share, shares, take_step, eval_problems,
                  held_out=None):
    """The loop of grpo.py and sft.py: resume, evaluate, take steps, log, save, and give way to Ctrl-C.

    parameters, identity: of trained_parameters. share, shares: of start_ranks, which rows are this process's.
    take_step(step, interrupt=...) calls interrupt.hold() before it changes them; it returns a dict of metrics for the
    log and a line for the screen. The loop releases when step, weights and log agree again.
    eval_problems: what an evaluation asks, eval_size of them. held_out(): the loss on held-out rows, over all ranks.
    """
    numbers, need = sum(map(whole_size, parameters.values())), 12 * sum(p.numel() for p in parameters.values())
    if need > free_memory(net.device):
        raise UserError(f"gradient and Adam's two moments of {numbers:,} numbers take {need / 1e9:.1f} GB, "
                        f"{free_memory(net.device) / 1e9:.1f} GB are free; use tinylora, a lower rank or fewer targets")
    check_template(cfg, tokenizer)
    chief = is_chief()
    eval_problems = eval_problems[: cfg.eval_size or None]
    checkpoint_file = os.path.join(cfg.out_dir, "checkpoint.safetensors")
    step, read_from = 0, ""
    history = dict.fromkeys(("base", "accuracy", "evaluated", "best", "base_loss", "loss")) | {
        "seconds": 0.0, "eval_set": [cfg.eval_dataset, cfg.eval_size]}
    if cfg.init_from == "resume" and os.path.exists(os.path.join(cfg.out_dir, "settings.py")) and not (
            os.path.exists(checkpoint_file) or os.path.exists(previous(checkpoint_file))):
        print(f"{cfg.out_dir} has no checkpoint yet: this starts at step 0")
    elif cfg.init_from == "resume":
        step, saved, read_from = load_checkpoint(checkpoint_file, parameters, optimizer, identity)
        if saved.get("eval_set", history["eval_set"]) != history["eval_set"]:  # what was measured is of other problems
            saved = {"seconds": saved["seconds"]}
        history |= saved
    if chief:
        prepare_out_dir(cfg, "log.jsonl")
        if read_from == previous(checkpoint_file) and os.path.exists(checkpoint_file):
            os.remove(checkpoint_file)  # damaged: the next to be saved must not put it in the place of the whole one
        for place in (os.path.join(cfg.out_dir, name) for name in ("", "model", "best")):
            for left in glob.glob(".tmp*", root_dir=place):  # safetensors' own, which a killed run may leave
                os.remove(os.path.join(place, left))
    log = open_log(os.path.join(cfg.out_dir, "log.jsonl"), step) if chief else None
    report, close_reports = open_reports(cfg, step) if chief else (None, None)
    began = time.time() - history["seconds"]

    def write(record):
        if chief:
            log.write(json.dumps(record) + "\n")
            log.flush()
            report(record)

    def save():
        if chief or net.shard:
            history["seconds"] = time.time() - began
            save_checkpoint(checkpoint_file, parameters, optimizer, step, history, identity)
            save_trained(net, cfg)

    def evaluate():
        if not eval_problems and not held_out:
            return
        result = {}
        if eval_problems:
            mine = list(range(share, len(eval_problems), shares))
            result = eval_math.evaluate(net, tokenizer, [eval_problems[i] for i in mine], cfg, indices=mine)
            if shares > 1:
                gathered = [None] * shares
                dist.all_gather_object(gathered, result["rows"], group=net.shard.peers if net.shard else None)
                rows = sorted((row for part in gathered for row in part), key=lambda row: row["index"])
                result = eval_math.summarise([[row] for row in rows]) | {"rows": rows}
        if held_out:
            result["loss"] = held_out()
        interrupt.hold()  # history, log and the best adapter change together
        history.update(accuracy=result.get("strict"), loss=result.get("loss"), evaluated=step)
        write({"step": step, "eval": {k: v for k, v in result.items() if k != "rows"}})
        say_evaluation(step, result)
        score = result["strict"] if eval_problems else -result["loss"]
        if history["best"] is None or score > history["best"]:
            history["best"] = score
            if step and (chief or net.shard):
                save_trained(net, cfg, best=True)
        interrupt.release()

    try:
        with Interrupt(net) as interrupt:
            try:
                if step == 0:
                    evaluate()
                    history.update(base=history["accuracy"], base_loss=history["loss"])
                elif cfg.eval_interval and step % cfg.eval_interval == 0 and history["evaluated"] != step:
                    evaluate()  # what an interruption cut short
                while step < cfg.max_steps:
                    record, line = take_step(step, interrupt=interrupt)
                    step += 1
                    write({"step": step, **record})
                    say(f"step {step:4d} | {line}")
                    interrupt.release()
                    if cfg.eval_interval and step % cfg.eval_interval == 0:
                        evaluate()
                    if cfg.save_interval and step % cfg.save_interval == 0:
                        save()
                if history["evaluated"] != step:
                    evaluate()
                save()
            except KeyboardInterrupt:
                interrupt.hold()  # an impatient second Ctrl-C does not cut the saving short
                save()
                say(f"\ninterrupted: {step} steps are saved in {cfg.out_dir}; go on with --init_from=resume")
                leave_ranks(net)
                raise SystemExit(interrupt.exit_code) from None
            except UserError:  # a data stream that broke off, say
                if step and not interrupt.held:  # so nothing has changed since the last step
                    save()
                raise
    finally:
        if chief:
            log.close()
            close_reports()
    if "v" in parameters and numbers <= 1000:
        say(f"the same in a message: --adapter={tinylora.adapter_text(net.adapter, cfg.save_dtype)}")
    say_result(cfg, history, f"{numbers} numbers in {time.time() - began:.0f} s")
    leave_ranks(net)


def say_result(cfg, history, cost):
    """The last line of a run: what it began and ended with, if that was measured."""
    name = os.path.basename(os.path.normpath(cfg.out_dir))
    for what, base, last, form in (("greedy accuracy", "base", "accuracy", ".3f"),
                                   ("held-out loss", "base_loss", "loss", ".4f")):
        if history[last] is not None:
            before = "" if history[base] is None else f"{history[base]:{form}} -> "
            return say(f"{name}: {what} {before}{history[last]:{form}} with {cost}")


def say_evaluation(step, result):
    if "loss" in result:
        say(f"--- step {step}: held-out loss {result['loss']:.4f}")
    if "rows" not in result:
        return
    rows = result["rows"]
    example = rows[step % len(rows)]
    say(f"--- step {step}: greedy accuracy {result['strict']:.3f} +- {result['stderr']:.3f} on {len(rows)} problems "
        f"(by the last number {result['lenient']:.3f}), {result['length']:.0f} tokens an answer, "
        f"{result['truncated']:.1%} cut off. For example:\n    {example['question']}\n    -> {example['response']} "
        f"(right: {example['answer']})")


def train(cfg):
    check_settings(cfg)
    share, shares, device = start_ranks(cfg)
    problems = eval_math.load_problems(cfg.dataset, "train")
    eval_problems = eval_math.load_problems(cfg.eval_dataset, "test") if cfg.eval_dataset else []
    net = load_model(cfg.model, "float32" if cfg.method == "full" else cfg.dtype, device, cfg.shard)
    tokenizer = load_tokenizer(cfg.model)
    prepare_problems(net, tokenizer, problems, cfg)
    eval_math.checked_prompts(net, tokenizer, eval_problems[: cfg.eval_size or None], cfg, cfg.eval_dataset)
    began, size = time.time(), sum(p.numel() for p in net.parameters())
    net.model.recompute = cfg.recompute
    if cfg.compile:
        compile_model(net)
    parameters, identity = trained_parameters(net, cfg)
    context, longest = net.config.max_position_embeddings, max(len(problem["prompt"]) for problem in problems)
    fitting_rows(net, min(longest + cfg.max_new_tokens, context), 1)  # refuses where not even one fits
    if longest + cfg.max_new_tokens > context:
        say(f"warning: behind the longest prompt the model's context of {context} has room for {context - longest} new "
            f"tokens, not for max_new_tokens = {cfg.max_new_tokens}")
    optimizer = torch.optim.Adam(parameters.values(), lr=cfg.lr)
    shape = f" ({net.adapter.v.shape[0]} groups of u = {net.adapter.v.shape[1]})" if "v" in parameters else ""
    say(f"{cfg.model}: {size / 1e6:.1f}M parameters; {cfg.method} trains {sum(map(whole_size, parameters.values()))} "
        f"numbers{shape}, made ready in {time.time() - began:.1f} s; {len(problems)} problems; {net.head.dtype} on "
        f"{net.device}, {shares * cfg.shard} process(es)")

    take_step = partial(training_step, net, tokenizer, optimizer, problems, cfg, share=share, shares=shares)
    training_loop(cfg, net, tokenizer, parameters, optimizer, identity | {"script": "grpo.py"}, share, shares,
                  take_step, eval_problems)


def prepare_problems(net, tokenizer, problems, cfg):
    """Encode every problem's prompt once."""
    for problem, prompt in zip(problems, eval_math.checked_prompts(net, tokenizer, problems, cfg, cfg.dataset)):
        problem["prompt"] = prompt


def sample_groups(net, tokenizer, problems, mine, cfg, progress):
    """Sample a group of answers to each problem of `mine`, (position, index) pairs, and reward them. Returns the groups
    as lists of rows, and sums over them: rows, tokens, right, lenient, equal (rows in groups without a winner),
    truncated."""
    batch, prompts = [problems[index] for _, index in mine], [problems[index]["prompt"] for _, index in mine]
    groups = generate(net, tokenizer, prompts, cfg.group_size, cfg.max_new_tokens, cfg.temperature, cfg.seed,
                      prompt_ids=[position for position, _ in mine], progress=progress)
    scores = [[eval_math.score(c.text, c.truncated, problem["answer"], cfg.answer_format) for c in group]
              for problem, group in zip(batch, groups)]
    rewards = torch.tensor([[float(s["strict"]) for s in group] for group in scores]).view(-1, cfg.group_size)  # [P, G]
    lengths = torch.tensor([[len(c.ids) for c in group] for group in groups]).view(-1, cfg.group_size)
    context = net.config.max_position_embeddings
    limits = torch.tensor([[min(cfg.max_new_tokens, context - len(prompt))] for prompt in prompts]).view(-1, 1)
    shaped = rewards - overlong_penalty(lengths, limits, cfg.overlong_tokens)
    advantages = group_advantages(shaped, cfg.objective)
    rows = [[Row(prompt, c.ids, c.logprobs, advantages[i, j].item()) for j, c in enumerate(group)]
            for i, (prompt, group) in enumerate(zip(prompts, groups))]
    return rows, dict(rows=rewards.numel(), tokens=int(lengths.sum()), right=rewards.sum().item(),
                      lenient=sum(s["lenient"] for group in scores for s in group),
                      equal=int((shaped == shaped[:, :1]).all(dim=1).sum()) * cfg.group_size,
                      truncated=sum(c.truncated for group in groups for c in group))


def rollout(net, tokenizer, problems, cfg, step, share, shares):
    """The batch of a step: a group of rewarded answers to each problem of this rank's share. Of groups that teach
    nothing, as all answers earned the same, each makes room for one of another problem that does, if cfg.resample
    rounds find one (dynamic sampling: DAPO, Yu et al. 2025, section 3.2); else it stays, without a gradient.

    Returns the batch's rows and sums over all ranks: batch_rows and batch_tokens of the batch, those of sample_groups
    of all that was sampled; and the most rounds of any rank."""
    mine = batch_positions(step, cfg.batch_size, len(problems), cfg.seed)[share::shares]
    groups, counts = sample_groups(net, tokenizer, problems, mine, cfg, f"step {step + 1}")
    rounds = 1
    while rounds <= cfg.resample:
        equal = [i for i, group in enumerate(groups) if not any(row.advantage for row in group)]
        if not equal:
            break
        mine = further_positions(step, rounds, cfg, len(problems))[share::shares][: len(equal)]
        new, more = sample_groups(net, tokenizer, problems, mine, cfg, f"step {step + 1}")
        for i, group in zip(equal, [group for group in new if any(row.advantage for row in group)]):
            groups[i] = group
        counts, rounds = {key: counts[key] + more[key] for key in counts}, rounds + 1
    rows = [row for group in groups for row in group]
    counts = counts | {"batch_rows": len(rows), "batch_tokens": sum(len(row.ids) for row in rows)}
    [rounds] = all_reduce([rounds], net, "max")
    return rows, dict(zip(counts, all_reduce(list(counts.values()), net))) | {"rounds": int(rounds)}


def training_step(net, tokenizer, optimizer, problems, cfg, step, share, shares, interrupt):
    """Sample, reward, update. Returns the metrics of the step over all ranks, and a line that sums them up."""
    t0 = time.time()
    rows, counts = rollout(net, tokenizer, problems, cfg, step, share, shares)
    t1 = time.time()
    interrupt.hold()
    if not cfg.kl_coef:
        rows = [row for row in rows if row.advantage]  # the others have no gradient
    passes, parameters = [], optimizer.param_groups[0]["params"]
    for _ in range(cfg.num_passes):
        optimizer.zero_grad(set_to_none=False)
        passes.append(accumulate_gradient(net, tokenizer, rows, cfg, counts["batch_rows"], counts["batch_tokens"]))
        grad_norm = update(optimizer, parameters, cfg.grad_clip)
    t2 = time.time()
    # Clipping, like grad_norm, is of the last pass; the rest of the first, which scores with the weights that sampled.
    sums = passes[0] | {"clipped": passes[-1]["clipped"]}
    v_max = max(p.detach().abs().max().item() for p in parameters)
    diff_max, v_max = all_reduce([sums.pop("diff_max"), v_max], net, "max")
    sums = dict(zip(sums, all_reduce(list(sums.values()), net)))
    # Reward, length and the shares are of all groups sampled, the replaced ones too: what is left of those tells less.
    sampled = counts["rows"]
    record = {"reward": counts["right"] / sampled, "reward_lenient": counts["lenient"] / sampled,
              "equal_groups": counts["equal"] / sampled, "length": counts["tokens"] / sampled,
              "truncated": counts["truncated"] / sampled, "groups": int(sampled) // cfg.group_size,
              "rounds": counts["rounds"], "loss": sums.pop("loss"), "grad_norm": grad_norm,
              "v_norm": total_norm([p.detach() for p in parameters], parameters).item(), "v_max": v_max}
    scored = sums.pop("tokens")  # of the rows that have a gradient; over them go the means of the rest
    if not cfg.kl_coef:
        sums["kl"] = None  # not measured: that would take one more forward pass
    record |= {key: total / scored if scored and total is not None else None for key, total in sums.items()}
    record["diff_max"] = diff_max
    record["seconds"] = {"generate": t1 - t0, "update": t2 - t1, "tokens_per_second": counts["tokens"] / (t1 - t0),
                         "peak_gb": peak_gb(net.device)}
    return record, summary(record, cfg, net.head.dtype)


def summary(r, cfg, dtype):
    """The line of a step on the screen."""
    line = (f"reward {r['reward']:.3f} (last number {r['reward_lenient']:.3f}) | length {r['length']:.0f} | |v| "
            f"{r['v_norm']:.3f} | grad {r['grad_norm']:.3f} | equal groups {r['equal_groups']:.2f} | ")
    if r["entropy"] is None:
        line += "no gradient: in every group all answers earned the same | "
    else:
        line += f"entropy {r['entropy']:.2f} | sampler-trainer {r['diff']:.0e} | "
    line += f"{r['seconds']['generate']:.1f} + {r['seconds']['update']:.1f} s"
    return "\n".join([line, *(f"warning: {text}" for text in warnings_of(r, cfg, dtype))])


def warnings_of(r, cfg, dtype):
    """What in a step's metrics calls for a hand."""
    mismatch = 1e-3 if dtype == torch.float32 else 0.05
    entropy, diff = r["entropy"], r["diff"] or 0.0  # None in a step without a gradient
    signs = [
        (r["truncated"] > 0.2, f"{r['truncated']:.0%} of the answers were cut off and earned nothing; raise "
         f"max_new_tokens (now {cfg.max_new_tokens})"),
        (r["equal_groups"] > 0.9, f"in {r['equal_groups']:.0%} of the groups all answers earned the same and teach "
         "nothing; take harder or easier problems, or a larger group_size"),
        (entropy is not None and entropy < 0.005, "the entropy is nearly 0: all answers of a group are the "
         "same; lower lr"),
        (diff > mismatch, f"sampler and trainer disagree by {diff:.3f} on average; "
         "set tis_cap to 2, or use float32"),
        (cfg.method in ("tinylora", "lora_xs") and r["v_max"] > 1, f"a number of v has grown to {r['v_max']:.1f}: the "
         "update outweighs the weights it is made of; lower lr"),
    ]
    return [text for is_so, text in signs if is_so]


def update(optimizer, parameters, grad_clip):
    """Sum the gradient over ranks, clip its norm, step. Returns the norm."""
    parameters = list(parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # a rank whose rows all dropped out has none
        if dist.is_initialized():  # of what is cut, a rank has the gradient of its part; of all else, a share
            dist.all_reduce(p.grad, group=p.cut[0].peers if hasattr(p, "cut") else None)
    norm = total_norm([p.grad for p in parameters], parameters)
    torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip or math.inf, norm)
    norm = norm.item()
    if not math.isfinite(norm):
        raise UserError("the gradient is not finite; nothing was changed by this pass. Lower lr, or use "
                        "--dtype=float32")
    optimizer.step()
    return norm


def total_norm(tensors, parameters):
    """Norm of all tensors, each laid out like its parameter; of those that are cut, of the parts on all ranks."""
    cut = [t for t, p in zip(tensors, parameters) if hasattr(p, "cut")]
    norm = torch.nn.utils.get_total_norm([t for t, p in zip(tensors, parameters) if not hasattr(p, "cut")])
    if cut:
        square = torch.nn.utils.get_total_norm(cut) ** 2
        dist.all_reduce(square, group=next(p.cut[0].group for p in parameters if hasattr(p, "cut")))
        norm = (norm.to(square) ** 2 + square).sqrt()
    return norm


def peak_gb(device):
    """Peak memory of this process so far, in GB: of the GPU, or of the host without one (None if it does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main():
    train(configure(globals()))


if __name__ == "__main__":
    run(main)
