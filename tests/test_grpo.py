"""grpo.py: the objective against numbers worked out by hand, the gradient for any split, and whole runs."""

import contextlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import tqdm
from conftest import ROOT, assert_refused
from forks import fork_ranks, fork_script
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.attention import varlen

import eval_math
import grpo
import model
import sample
import sft
import tinylora
from configurator import UserError, configure

token_logprobs = grpo.token_logprobs  # some tests put another in its place

# ------------------------------------------------------------------------------------------------------ the objective


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    std = math.sqrt(4 * 0.25 / 3)  # over G - 1
    expected = torch.tensor([[0.5 / std, -0.5 / std, -0.5 / std, 0.5 / std], [0.0] * 4, [-0.5, -0.5, -0.5, 1.5]])
    assert torch.allclose(grpo.group_advantages(rewards), expected, atol=1e-5)  # the third group's std is 1/2
    assert torch.allclose(grpo.group_advantages(rewards, "dr_grpo")[0], torch.tensor([0.5, -0.5, -0.5, 0.5]))


def test_all_objectives_but_dr_grpo_divide_by_the_spread():
    std = math.sqrt(4 * 0.25 / 3)
    for objective in grpo.CLIP:
        expected = 0.5 if objective == "dr_grpo" else 0.5 / std
        advantages = grpo.group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), objective)
        assert advantages[0].tolist() == pytest.approx([expected, -expected, -expected, expected], abs=1e-5)


def test_equal_rewards_whose_mean_is_rounded_teach_nothing():
    rewards = torch.full((1, 7), 0.7)
    assert rewards.mean() != rewards[0, 0]
    assert all(not grpo.group_advantages(rewards, objective).any() for objective in grpo.CLIP)


def test_token_weights_by_hand():
    """Two rows of 2 and 4 tokens, of a batch of 8 rows and 30 tokens."""

    def weights(objective):
        return grpo.token_weights([2, 4], objective, max_new_tokens=10, num_rows=8, num_tokens=30).tolist()

    assert weights("grpo") == weights("gspo") == pytest.approx([1 / 16, 1 / 32])
    assert weights("dr_grpo") == pytest.approx([1 / 80, 1 / 80])
    assert weights("dapo") == pytest.approx([1 / 30, 1 / 30])


@pytest.mark.parametrize(
    "advantage, ratio, value, slope, clipped",
    [
        (2.0, 1.0, 2.0, 2.0, 0),  # on policy
        (2.0, 1.1, 2.2, 2.2, 0),
        (2.0, 1.5, 2.6, 0.0, 1),  # clipped above: 1.3 * 2
        (2.0, 0.5, 1.0, 1.0, 0),  # a good answer that became rare is not clipped
        (-2.0, 0.5, -1.6, 0.0, 1),  # clipped below: 0.8 * -2
        (-2.0, 1.5, -3.0, -3.0, 0),  # a bad answer that became frequent is not clipped
    ],
)
def test_clipped_surrogate_by_hand(advantage, ratio, value, slope, clipped):
    """One token of weight 1/2: the value of the objective, and its slope in the log-prob."""
    logp = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    loss, count = grpo.policy_loss(logp, torch.tensor([[-1.0]]), torch.tensor([advantage]), torch.tensor([0.5]),
                                   torch.ones(1, 1), clip_low=0.2, clip_high=0.3)
    loss.backward()
    assert loss.item() == pytest.approx(-value / 2, abs=1e-6)
    assert logp.grad.item() == pytest.approx(-slope / 2, abs=1e-6)
    assert count == clipped


def test_gspo_uses_the_sequence_ratio():
    """Log-ratios 0.3 and -0.1 over two tokens: the ratio of both is exp(0.1)."""
    logp = torch.tensor([[-0.7, -1.1, 9.0]], requires_grad=True)  # the third is padding
    mask = torch.tensor([[True, True, False]])
    old_logp, advantages, weights = torch.tensor([[-1.0, -1.0, 0.0]]), torch.tensor([1.0]), torch.tensor([1 / 2])
    loss, _ = grpo.policy_loss(logp, old_logp, advantages, weights, mask, "gspo")
    loss.backward()
    assert loss.item() == pytest.approx(-math.exp(0.1), abs=1e-6)
    assert logp.grad[0].tolist() == pytest.approx([-math.exp(0.1) / 2, -math.exp(0.1) / 2, 0.0], abs=1e-6)


@pytest.mark.parametrize("objective, value, slopes, clipped", [
    ("grpo", 1.7 / 6 - 0.8 / 3 + 1.2 / 3, [0.0, 0.5 / 6, 0.0, 0.0], 3),
    ("dr_grpo", (1.7 - 0.8 + 1.2) / 12, [0.0, 0.5 / 12, 0.0, 0.0], 3),
    ("dapo", (1.78 - 0.8 + 1.28) / 4, [0.0, 0.5 / 4, 0.0, 0.0], 3),  # clipped higher above
    ("gspo", 0.75**0.5 / 3 - 0.9997 / 3 + 1.0004 / 3, [0.75**0.5 / 6, 0.75**0.5 / 6, 0.0, 0.0], 2),
])
def test_every_objective_by_hand_clipped_on_both_sides(objective, value, slopes, clipped):
    """A later pass: a good answer of tokens with the ratios 1.5 and 0.5, a bad one with 0.5, a good one with 2."""
    ratios, mask = torch.tensor([[1.5, 0.5], [0.5, 1.0], [2.0, 1.0]]), torch.tensor([[1, 1], [1, 0], [1, 0]]).bool()
    logp = (ratios.log() - 1.0).requires_grad_()
    weights = grpo.token_weights([2, 1, 1], objective, max_new_tokens=4, num_rows=3, num_tokens=4)
    loss, count = grpo.policy_loss(logp, torch.full((3, 2), -1.0), torch.tensor([1.0, -1.0, 1.0]), weights, mask,
                                   objective, *grpo.CLIP[objective])
    loss.backward()
    assert loss.item() == pytest.approx(-value, abs=1e-6) and count == clipped
    assert (-logp.grad[mask]).tolist() == pytest.approx(slopes, abs=1e-6)


def test_k3_by_hand():
    assert grpo.k3(torch.tensor(-1.0), torch.tensor(-1.5)).item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)
    assert grpo.k3(torch.tensor(-2.0), torch.tensor(-2.0)) == 0


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_chunked_logprobs_equal_the_full_softmax(chunk, trained):
    torch.manual_seed(0)
    inputs, targets = [torch.randn(23, 8).double(), torch.randn(50, 8).double()], torch.randint(0, 50, (23,))
    weights = torch.randn(23)
    ours, theirs = ([x.clone().requires_grad_(wanted) for x, wanted in zip(inputs, (True, trained))] for _ in range(2))
    logp, entropy = grpo.token_logprobs(*ours, targets, 0.7, chunk)
    exact = torch.log_softmax(theirs[0] @ theirs[1].T / 0.7, -1)
    (logp * weights).sum().backward()
    (exact[range(23), targets] * weights).sum().backward()
    assert torch.allclose(logp, exact[range(23), targets], atol=1e-12) and not entropy.requires_grad
    assert torch.allclose(entropy, -(exact.exp() * exact).sum(-1), atol=1e-12)
    assert torch.allclose(ours[0].grad, theirs[0].grad, atol=1e-12)
    assert not trained or torch.allclose(ours[1].grad, theirs[1].grad, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(grpo.token_logprobs(*ours, targets, 0.7, chunk)[0], logp)


def test_the_gradient_of_a_nearly_certain_token_survives_16_bits():
    """Of a token of probability 0.9999 it is a difference of two near numbers; it is taken before rounding."""
    hidden = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    head = torch.tensor([[9.25, 0, 0], [0, 1, 0], [0, 0, 1.0]], dtype=torch.bfloat16)
    logp, _ = grpo.token_logprobs(hidden, head, torch.tensor([0]), 1.0)
    logp.sum().backward()
    p = torch.softmax(head[:, 0].double(), 0)
    exact = head[0].double() - p @ head.double()
    assert (hidden.grad.double() - exact).norm() <= 0.02 * exact.norm()


def peak_of_logprobs(tokens, chunk, trained, vocab=5000):
    """Bytes allocated at most in the forward and backward pass, as torch's profiler counts them."""
    hidden, head = torch.randn(tokens, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=trained)
    targets = torch.randint(0, vocab, (tokens,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        logp, _ = grpo.token_logprobs(hidden, head, targets, 0.7, chunk)
        logp.sum().backward()
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_no_more_than_one_chunk_of_logits_is_alive(trained):
    """A few copies of a chunk's (log-probs, their gradient, the logits'), whatever the number of tokens."""
    bound = 4.5 * 8 * 5000 * 4
    assert peak_of_logprobs(40, 8, trained) < bound and peak_of_logprobs(200, 8, trained) < bound
    assert peak_of_logprobs(200, 200, trained) > 5 * bound


@pytest.mark.parametrize("vocab, sizes", [(2**16, [1024, 1024, 452]), (2**10, [2500]), (2**17 + 1, [511] * 4 + [456])])
def test_a_chunk_has_at_most_256_mb_of_logits(vocab, sizes, monkeypatch):
    seen = []
    monkeypatch.setattr(grpo, "chunk_logprobs", lambda hidden, head, at, _: (seen.append(len(hidden)), at, at, 0)[1:])
    grpo.token_logprobs(torch.zeros(2500, 1), torch.zeros(vocab, 1), torch.zeros(2500), 1.0)
    assert seen == sizes


# ------------------------------------------------------------------------------------------------------- the gradient


def settings(**changes):
    cfg = SimpleNamespace(objective="grpo", temperature=1.0, micro_batch_tokens=10**6, max_new_tokens=12, tis_cap=0.0,
                          packing=False, clip_low=0.0, clip_high=0.0, kl_coef=0.0)
    return SimpleNamespace(**vars(cfg) | changes)


def random_rows(count=9, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def ids(low, high):
        return torch.randint(5, 200, (int(torch.randint(low, high, (1,), generator=rng)),), generator=rng).tolist()

    rows = [grpo.Row(ids(3, 9), ids(1, 12), [], float(torch.randn(1, generator=rng))) for _ in range(count)]
    for i, row in enumerate(rows):
        row.prompt = rows[i - i % 3].prompt  # groups of three
        row.sampler_logprobs = [-1.0] * len(row.ids)
    return rows


def gradient(net, tokenizer, rows, cfg, parts=None):
    """The gradient of v over rows, given all at once or in parts as if by several ranks."""
    for row in rows:
        row.old_logprobs = None if cfg.objective == "grpo" else torch.full((len(row.ids),), -5.0, dtype=net.head.dtype)
    net.adapter.zero_grad()
    total = sum(len(row.ids) for row in rows)
    for part in parts or [rows]:
        grpo.accumulate_gradient(net, tokenizer, part, cfg, len(rows), total)
    return net.adapter.v.grad.clone()


@pytest.mark.parametrize("bits, tolerance", [(32, 1e-5), (64, 1e-10)])
@pytest.mark.parametrize("objective", grpo.CLIP)
def test_gradient_is_the_same_for_any_split(net, tokenizer, monkeypatch, objective, bits, tolerance):
    """Micro-batches, ranks (one of which may have no rows), chunks of logits, and recomputation."""
    tinylora.add_adapter(net, u=3, n_tie=4)
    torch.nn.init.normal_(net.adapter.v, std=0.2)
    if bits == 64:
        in_float64(net)
    rows, cfg = random_rows(), settings(objective=objective, kl_coef=0.1)
    whole = gradient(net, tokenizer, rows, cfg)
    others = [gradient(net, tokenizer, rows, settings(**vars(cfg) | {"micro_batch_tokens": tokens}))
              for tokens in (1, 20, 30, 45, 60, 100)]
    others += [gradient(net, tokenizer, rows, cfg, [rows[rank::world] for rank in range(world)])
               for world in (2, 3, 10)]
    net.model.recompute = True
    others.append(gradient(net, tokenizer, rows, cfg))
    net.model.recompute = False
    for chunk in (1, 7, 40):
        monkeypatch.setattr(grpo, "token_logprobs", partial(token_logprobs, chunk=chunk))
        others.append(gradient(net, tokenizer, rows, cfg))
    assert whole.norm() > 0 and whole.dtype == (torch.float64 if bits == 64 else torch.float32)
    for other in others:
        assert (other - whole).norm() <= tolerance * whole.norm()


@pytest.mark.parametrize("objective", ["grpo", "gspo"])
def test_gradient_in_float64_is_the_same_for_any_layout(net, tokenizer, objective, monkeypatch):
    """Splits, ranks, rows padded or end to end, chunks of logits, recomputation: to 1e-10, with one row's gradient at
    a time through the plain forward pass as the reference (of grpo: on policy, its loss is -A mean(log p))."""
    torch.nn.init.normal_(tinylora.add_adapter(net, u=3, n_tie=4).v, std=0.2)
    in_float64(net)
    rows, scored = random_rows(), grpo.token_logprobs
    whole = gradient(net, tokenizer, rows, settings(objective=objective))
    if objective == "grpo":
        net.adapter.zero_grad()
        sum(-row.advantage * plain_logprobs(net, row).mean() / len(rows) for row in rows).backward()
        assert (net.adapter.v.grad - whole).norm() <= 1e-6 * whole.norm()  # advantages and weights are float32
    for packing, tokens, chunk, recompute, ranks in [
            (True, 10**6, 2048, False, 1), (True, 30, 7, True, 1), (True, 1, 1, False, 2), (True, 60, 2048, True, 3),
            (False, 30, 7, True, 1), (False, 1, 2048, False, 3), (False, 60, 1, True, 2)]:
        monkeypatch.setattr(grpo, "token_logprobs", lambda *a, chunk=chunk: scored(*a, chunk))
        net.model.recompute = recompute
        cfg = settings(objective=objective, packing=packing, micro_batch_tokens=tokens)
        other = gradient(net, tokenizer, rows, cfg, [rows[i::ranks] for i in range(ranks)])
        assert (other - whole).norm() <= 1e-10 * whole.norm(), (packing, tokens, chunk, recompute, ranks)


@pytest.mark.parametrize("packing", [False, True])
def test_a_rows_log_probs_do_not_depend_on_its_neighbours(net, tokenizer, packing):
    """Each row alone through the plain forward pass, among two sets of neighbours, first and last of the line."""
    net.double()
    rows, others = random_rows(4), random_rows(5, seed=1)
    with torch.no_grad():
        expected = [plain_logprobs(net, row) for row in rows]
        for batch in (rows, others + rows, rows[::-1] + others):
            logp, entropy, mask = grpo.completion_logprobs(net, tokenizer, batch, 1.0, packing)
            for row, exact in zip(rows, expected):
                line = next(i for i, r in enumerate(batch) if r is row)
                assert mask[line].tolist() == [i < len(row.ids) for i in range(mask.shape[1])]
                assert (logp[line][mask[line]] - exact).abs().max() <= 1e-12 * exact.abs().max()
                assert not logp[line][~mask[line]].any() and not entropy[line][~mask[line]].any()


def test_only_the_marked_tokens_of_a_row_are_scored(net, tokenizer):
    [row], trained = random_rows(1), [True, False, False, True, True]
    row.ids = [7, 8, 9, 10, 11]
    with torch.no_grad():
        exact = plain_logprobs(net, row)
        row.trained = trained
        for packing in (False, True):
            logp, _, mask = grpo.completion_logprobs(net, tokenizer, [row, *random_rows(2)], 1.0, packing)
            assert mask[0, :5].tolist() == trained and not mask[0, 5:].any()
            assert torch.allclose(logp[0, :5], exact * torch.tensor(trained), atol=1e-5)


def test_on_a_gpu_rows_end_to_end_go_to_one_kernel(monkeypatch):
    """The kernel's arguments, on a stand-in that cuts the pieces apart by them, the last query at the last key; the
    signature is the real one's."""
    signature = inspect.signature(varlen.varlen_attn)

    def kernel(*arguments, **options):
        a = SimpleNamespace(**signature.bind(*arguments, **options).arguments)
        assert a.window_size == (-1, 0) and a.cu_seq_q.dtype == a.cu_seq_k.dtype == torch.int32
        assert a.query.shape[1:] == a.key.shape[1:] == a.value.shape[1:] and len(a.key) == a.cu_seq_k[-1]
        assert (a.max_q, a.max_k) == (a.cu_seq_q.diff().max(), a.cu_seq_k.diff().max())
        out = []
        for (i, j), (m, n) in zip(*(itertools.pairwise(ends.tolist()) for ends in (a.cu_seq_q, a.cu_seq_k))):
            q, k, v = (x.transpose(0, 1) for x in (a.query[i:j], a.key[m:n], a.value[m:n]))
            past = torch.ones(j - i, n - m, dtype=torch.bool).tril(n - m - (j - i))
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~past, -math.inf)
            out.append((scores.softmax(-1) @ v).transpose(0, 1))
        return torch.cat(out)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    rows = random_rows()
    rows[4].ids = rows[4].ids[:1]  # an answer of one token has no input of its own
    total = sum(len(r.prompt) for r in rows[::3]) + sum(len(r.ids) - 1 for r in rows)
    q, k, v = (torch.randn(1, heads, total, 8, dtype=torch.float64) for heads in (4, 2, 2))
    for most in (1, 12, 256):  # an answer a call, some, all of a group
        packed = grpo.Packed(rows, "cpu", most)
        assert packed.ids.shape == packed.positions.shape == (1, total)
        assert torch.allclose(packed.attend_at_once(q, k, v), packed.attend(0, q, k, v), atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_end_to_end_on_a_gpu(checkpoint, tokenizer):
    """The kernel for rows end to end against padded rows, in bfloat16: log-probs, and the gradient of v."""
    net, rows = model.load_model(checkpoint, device="cuda"), random_rows()
    torch.nn.init.normal_(tinylora.add_adapter(net, u=3, n_tie=4).v, std=0.2)
    gradients = []
    for packing in (False, True):
        net.adapter.zero_grad()
        logp, _, _ = grpo.completion_logprobs(net, tokenizer, rows, 1.0, packing)
        logp.mean().backward()
        gradients.append((logp.detach(), net.adapter.v.grad.clone()))
    (padded, expected), (packed, ours) = gradients
    assert (padded - packed).abs().mean() <= 0.05 and (ours - expected).norm() <= 0.1 * expected.norm()


def plain_logprobs(net, row, temperature=1.0):
    """Log-probs of a row's tokens, one row at a time through the plain forward pass."""
    logits = net(torch.tensor([row.prompt + row.ids]))[0, len(row.prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1)[range(len(row.ids)), row.ids]


def in_float64(net):
    net.double().adapter.double()
    for linear in tinylora.adapted_linears(net).values():
        linear.US, linear.Vt = linear.US.double(), linear.Vt.double()


@pytest.mark.parametrize("kl_coef, temperature", [(0.0, 1.0), (0.3, 1.0), (0.3, 0.5)])
def test_gradient_is_that_of_the_textbook_formula(net, tokenizer, checkpoint, kl_coef, temperature):
    """On policy: -A mean(log p) a row, plus kl_coef times the mean of k3 against the model without adapter."""
    rows, base = random_rows(5), model.load_model(checkpoint, device="cpu").double()
    torch.nn.init.normal_(tinylora.add_adapter(net, u=3, n_tie=4).v, std=0.2)
    ours = gradient(net, tokenizer, rows, settings(kl_coef=kl_coef, temperature=temperature))
    in_float64(net)
    net.adapter.zero_grad()
    loss = 0
    for row in rows:
        logp, ref = plain_logprobs(net, row, temperature), plain_logprobs(base, row, temperature)
        kl = (ref - logp).exp() - (ref - logp) - 1
        loss = loss + (-row.advantage * logp.mean() + kl_coef * kl.mean()) / len(rows)
    loss.backward()
    assert (ours - net.adapter.v.grad).norm() <= 1e-4 * ours.norm()


@pytest.mark.parametrize("objective", grpo.CLIP)
def test_later_passes_keep_the_ratio_to_the_policy_of_the_first(net, tokenizer, objective):
    rows = random_rows(20)
    bound = 0.01 if objective == "gspo" else 0.1  # a mean over tokens moves less
    cfg = settings(objective=objective, clip_low=bound, clip_high=bound)
    adapter = tinylora.add_adapter(net, u=3, n_tie=4)
    num_tokens = sum(len(row.ids) for row in rows)
    grpo.accumulate_gradient(net, tokenizer, rows, cfg, 20, num_tokens)  # the first pass notes the old log-probs
    with torch.no_grad():
        old = [plain_logprobs(net, row) for row in rows]
        adapter.v += 0.1
    adapter.zero_grad()
    sums = grpo.accumulate_gradient(net, tokenizer, rows, cfg, 20, num_tokens)
    ours = adapter.v.grad.clone()
    adapter.zero_grad()
    loss, above, below = 0, 0, 0
    for row, old_logp in zip(rows, old):
        log_ratio = plain_logprobs(net, row) - old_logp
        ratio = (log_ratio.mean().expand_as(log_ratio) if objective == "gspo" else log_ratio).exp()
        terms = torch.stack((ratio * row.advantage, ratio.clamp(1 - bound, 1 + bound) * row.advantage))
        count = {"dr_grpo": cfg.max_new_tokens * 20, "dapo": num_tokens}.get(objective, len(row.ids) * 20)
        loss = loss - terms.min(0).values.sum() / count
        above += int(((terms[1] < terms[0]) & (ratio > 1 + bound)).sum())
        below += int(((terms[1] < terms[0]) & (ratio < 1 - bound)).sum())
    loss.backward()
    assert above and below and above + below == sums["clipped"] < num_tokens  # some are clipped on each side, not all
    assert (ours - adapter.v.grad).norm() <= 1e-4 * ours.norm()


@pytest.mark.parametrize("objective", grpo.CLIP)
def test_the_bounds_of_the_ratio_are_the_objectives_unless_they_are_given(net, tokenizer, monkeypatch, objective):
    seen, real = [], grpo.policy_loss
    monkeypatch.setattr(grpo, "policy_loss", lambda *a: (seen.append(a[6:8]), real(*a))[1])
    tinylora.add_adapter(net, u=1)
    for changes in ({}, dict(clip_low=0.1), dict(clip_high=0.4), dict(clip_low=0.1, clip_high=0.4)):
        grpo.accumulate_gradient(net, tokenizer, random_rows(2), settings(objective=objective, **changes), 2, 9)
    low, high = grpo.CLIP[objective]
    assert seen == [(low, high), (0.1, high), (low, 0.4), (0.1, 0.4)]


@pytest.mark.parametrize("packing", [False, True])
def test_the_mismatch_with_the_sampler_weights_the_gradient_in_every_pass(net, tokenizer, packing):
    """min(policy of the first pass / sampler, cap) a token, in the second pass too, where v has moved."""
    adapter, rows, cap = tinylora.add_adapter(net, u=3, n_tie=4), random_rows(), 1.5
    with torch.no_grad():
        old = [plain_logprobs(net, row) for row in rows]
    for i, (row, logp) in enumerate(zip(rows, old)):
        row.sampler_logprobs = (logp - torch.linspace(-1, 1 + i % 2, len(logp))).tolist()
    for moved in (0.0, 0.02):
        with torch.no_grad():
            adapter.v += moved
        adapter.zero_grad()
        grpo.accumulate_gradient(net, tokenizer, rows, settings(tis_cap=cap, packing=packing, clip_low=0.9,
                                                                clip_high=9.0, micro_batch_tokens=40), len(rows), 99)
        ours = adapter.v.grad.clone()
        adapter.zero_grad()
        loss, weights = 0, []
        for row, old_logp in zip(rows, old):
            weights.append((old_logp - torch.tensor(row.sampler_logprobs)).exp().clamp(max=cap))
            ratio = (plain_logprobs(net, row) - old_logp).exp()
            loss = loss - row.advantage * (ratio * weights[-1]).mean() / len(rows)
        loss.backward()
        assert (ours - adapter.v.grad).norm() <= 1e-4 * ours.norm() and ours.norm() > 0
    weights = torch.cat(weights)
    assert 0 < (weights == cap).sum() < len(weights)


@pytest.mark.parametrize("packing", [False, True])
def test_the_metrics_of_a_pass_are_sums_over_its_tokens(net, tokenizer, checkpoint, packing):
    """Over several micro-batches, against one row at a time through the plain forward pass."""
    torch.nn.init.normal_(tinylora.add_adapter(net, u=3, n_tie=4).v, std=0.2)
    base, rows = model.load_model(checkpoint, device="cpu"), random_rows()
    cfg = settings(objective="dapo", kl_coef=0.3, micro_batch_tokens=40, packing=packing)
    count = sum(len(row.ids) for row in rows)
    sums = grpo.accumulate_gradient(net, tokenizer, rows, cfg, len(rows), count)
    expected = dict.fromkeys(("loss", "kl", "entropy", "diff", "diff_max"), 0.0)
    with torch.no_grad():
        for row in rows:
            logp, ref = plain_logprobs(net, row), plain_logprobs(base, row)
            logits = net(torch.tensor([row.prompt + row.ids]))[0, len(row.prompt) - 1 : -1]
            kl, diff = grpo.k3(logp, ref).sum().item(), (logp - torch.tensor(row.sampler_logprobs)).abs()
            expected["loss"] += (-row.advantage * len(row.ids) + 0.3 * kl) / count
            expected["kl"] += kl
            expected["entropy"] += torch.distributions.Categorical(logits=logits).entropy().sum().item()
            expected["diff"] += diff.sum().item()
            expected["diff_max"] = max(expected["diff_max"], diff.max().item())
    assert sums == pytest.approx(expected | {"clipped": 0, "tokens": count}, rel=1e-4)


def test_the_stop_token_is_trained(net, tokenizer):
    """A gradient step on an answer that ends with the stop token makes stopping there likelier."""
    [stop] = tokenizer.stop_ids
    adapter = tinylora.add_adapter(net, u=2, n_tie=1)
    row = grpo.Row([7, 8, 9], [stop], [-1.0], advantage=1.0)

    def stop_logprob():
        with torch.no_grad():
            return torch.log_softmax(net(torch.tensor([[7, 8, 9]]))[0, -1], -1)[stop].item()

    before = stop_logprob()
    grpo.accumulate_gradient(net, tokenizer, [row], settings(), 1, 1)
    with torch.no_grad():
        adapter.v -= 1e-3 * adapter.v.grad / adapter.v.grad.norm()
    assert stop_logprob() > before


def test_micro_batches_keep_all_rows_within_the_bound():
    rows = random_rows(50)
    batches = list(grpo.micro_batches(rows, 40))
    assert sorted(id(r) for b in batches for r in b) == sorted(map(id, rows))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(r.prompt) + len(r.ids) for r in batch) <= 40
    assert list(grpo.micro_batches([], 40)) == []
    packed = list(grpo.micro_batches(rows, 40, packing=True))
    assert sorted(id(r) for b in packed for r in b) == sorted(map(id, rows)) and len(packed) <= len(batches)
    for batch, after in itertools.pairwise(packed):  # as full as the next row allows
        sizes = [sum(map(len, {tuple(r.prompt) for r in rows})) + sum(len(r.ids) for r in rows)
                 for rows in (batch, batch + after[:1])]
        assert (sizes[0] <= 40 or len(batch) == 1) and sizes[1] > 40


def test_every_epoch_visits_every_problem_once():
    seen = [index for step in range(20) for _, index in grpo.batch_positions(step, 5, 20, seed=3)]
    for epoch in range(5):
        assert sorted(seen[20 * epoch : 20 * epoch + 20]) == list(range(20))
    assert seen[:20] != seen[20:40]
    assert grpo.batch_positions(7, 5, 20, seed=3) == grpo.batch_positions(7, 5, 20, seed=3)


def test_further_problems_walk_an_order_of_their_own():
    """4 rounds of 5 for each of 2 steps over 20 problems: two epochs, each a permutation, under names of their own."""
    cfg = SimpleNamespace(resample=4, batch_size=5, seed=3)
    rounds = [grpo.further_positions(step, attempt, cfg, 20) for step in (0, 1) for attempt in (1, 2, 3, 4)]
    names, seen = zip(*(pair for round in rounds for pair in round))
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20)) and len(set(names)) == 40
    first = [pair for step in range(8) for pair in grpo.batch_positions(step, 5, 20, seed=3)]
    assert not set(names) & {name for name, _ in first} and seen[:20] != tuple(index for _, index in first[:20])


def rolled_out(net, tokenizer, checkpoint, problems, rank=0, world=1, **changes):
    """The groups of a step's batch, and what rollout counts."""
    cfg = configure(vars(grpo), args(checkpoint, problems, "unused", batch_size=8, **changes))
    rows = eval_math.load_problems(problems)
    grpo.prepare_problems(net, tokenizer, rows, cfg)
    rows, counts = grpo.rollout(net, tokenizer, rows, cfg, 2, rank, world)
    return [rows[i : i + 4] for i in range(0, len(rows), 4)], counts


def teaches(group):
    return any(row.advantage for row in group)


def test_groups_that_teach_nothing_make_room_for_others(net, tokenizer, checkpoint, problems, monkeypatch):
    """A quarter of the answers is right: in every third group all are wrong."""
    def score(response, *_):
        return {"strict": zlib.crc32(response.encode()) % 4 == 0, "lenient": False}

    monkeypatch.setattr(eval_math, "score", score)
    plain, plain_counts = rolled_out(net, tokenizer, checkpoint, problems)
    groups, counts = rolled_out(net, tokenizer, checkpoint, problems, resample=6)
    equal = sum(not teaches(group) for group in plain)
    assert 0 < equal == plain_counts["equal"] / 4 and plain_counts["rounds"] == 1
    assert len(groups) == 8 and all(map(teaches, groups)) and 1 < counts["rounds"] <= 7
    assert [group == old for group, old in zip(groups, plain)] == [teaches(old) for old in plain]  # others stay
    assert counts["batch_rows"] == 32 and counts["batch_tokens"] == sum(len(row.ids) for g in groups for row in g)
    assert counts["rows"] >= 32 + 4 * equal and counts["equal"] >= plain_counts["equal"]  # of all that was sampled
    shares = [rolled_out(net, tokenizer, checkpoint, problems, rank, 3, resample=6)[0] for rank in range(3)]
    assert [len(share) for share in shares] == [3, 3, 2] and all(teaches(group) for share in shares for group in share)


def test_groups_stay_when_the_rounds_are_used_up(net, tokenizer, checkpoint, problems, monkeypatch):
    monkeypatch.setattr(eval_math, "score", lambda *_: {"strict": False, "lenient": False})
    plain, _ = rolled_out(net, tokenizer, checkpoint, problems)
    groups, counts = rolled_out(net, tokenizer, checkpoint, problems, resample=2)
    assert groups == plain and counts["rounds"] == 3
    assert counts["rows"] == counts["equal"] == 3 * 32 and counts["batch_rows"] == 32


def answers(*texts, cut=""):
    """Completions of these texts, of as many tokens as characters; those in `cut` are cut off."""
    return [sample.Completion([5] * len(text), [-1.0] * len(text), text, text in cut) for text in texts]


@pytest.mark.parametrize("objective", ["dapo", "dr_grpo"])
def test_groups_are_asked_and_rewarded_as_the_settings_say(net, tokenizer, checkpoint, problems, monkeypatch,
                                                           objective):
    """Right, wrong in form, cut off and right but long; and a group of which all are wrong, and one of these long."""
    cfg = configure(vars(grpo), args(checkpoint, problems, "unused", answer_format="hash", overlong_tokens=4, seed=3,
                                     max_new_tokens=12, temperature=0.7, objective=objective))
    rows, asked = [{"answer": "7", "prompt": [5, 6]}, {"answer": "8", "prompt": [9]}], []
    texts = [answers("#### 7", r"\boxed{7}", "so #### 7", "#### 7   ", cut=["so #### 7"]),
             answers("1", "2", "3", "123456789")]

    def generate(*arguments, **options):
        asked.append((*arguments[2:], options["prompt_ids"]))
        return texts

    monkeypatch.setattr(grpo, "generate", generate)
    groups, counts = grpo.sample_groups(net, tokenizer, rows, [(40, 0), (2**40 + 1, 1)], cfg, None)
    assert asked == [([[5, 6], [9]], 4, 12, 0.7, 3, [40, 2**40 + 1])]
    earned = torch.tensor([[1.0, -0.25, -0.25, 0.75], [0.0, 0.0, 0.0, -0.25]])  # less (length - 8) / 4
    expected = earned - earned.mean(1, keepdim=True)
    expected = expected if objective == "dr_grpo" else expected / earned.std(1, keepdim=True)
    assert [[row.advantage for row in group] for group in groups] == [
        pytest.approx(line, abs=1e-4) for line in expected.tolist()]
    assert counts == dict(rows=8, tokens=6 + 9 + 9 + 9 + 1 + 1 + 1 + 9, right=2.0, lenient=4, equal=0, truncated=1)
    assert [row.ids for row in groups[0]] == [c.ids for c in texts[0]] and groups[1][0].prompt == [9]


def test_a_replacement_is_asked_for_each_group_that_teaches_nothing_and_no_more(net, tokenizer, monkeypatch):
    """In round 0 two of three groups are equal, in round 1 one of the two new ones, in round 2 the last teaches."""
    asked, teaching = [], iter([[0.0, 1.0, 0.0], [0.0, 1.0], [1.0]])
    monkeypatch.setattr(grpo, "sample_groups", lambda net, tok, problems, mine, *_: (
        asked.append(len(mine)), ([[grpo.Row([5], [6], [-1.0], a)] for a in next(teaching)], {"rows": len(mine)}))[1])
    cfg = SimpleNamespace(batch_size=3, seed=1, resample=2)
    rows, counts = grpo.rollout(net, tokenizer, [None] * 9, cfg, 0, 0, 1)
    assert asked == [3, 2, 1] and [row.advantage for row in rows] == [1.0] * 3
    assert counts == dict(rows=6, batch_rows=3, batch_tokens=3, rounds=3)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_the_record_of_a_step_by_hand(net, tokenizer, checkpoint, problems, monkeypatch, kl_coef):
    """Two passes. Reward and length are of all that was sampled, the loss of the batch, the means of its tokens."""
    counts = dict(rows=24, tokens=300, right=6.0, lenient=9, equal=8, truncated=3, batch_rows=16, batch_tokens=200,
                  rounds=2)
    rows, seen = [grpo.Row([5], [6], [-1.0], advantage) for advantage in (0.5, 0.0, -0.5)], []
    passes = [dict(loss=0.5, clipped=0.0, kl=2.0, entropy=4.0, diff=0.2, diff_max=0.1, tokens=20),
              dict(loss=0.7, clipped=5.0, kl=3.0, entropy=6.0, diff=0.4, diff_max=0.3, tokens=20)]
    monkeypatch.setattr(grpo, "rollout", lambda *_: (rows, counts))
    monkeypatch.setattr(grpo, "accumulate_gradient", lambda net, tok, *a: (
        seen.append(a), dict(passes[len(seen) - 1]))[1])
    monkeypatch.setattr(grpo, "update", lambda *_: 3.0 + len(seen))
    adapter = tinylora.add_adapter(net, u=2, targets="attention/mlp")
    with torch.no_grad():
        adapter.v.copy_(torch.tensor([[0.0, 3.0], [-4.0, 0.0]]))
    cfg = configure(vars(grpo), args(checkpoint, problems, "unused", num_passes=2, kl_coef=kl_coef))
    optimizer, interrupt = torch.optim.Adam(adapter.parameters()), grpo.Interrupt()
    record, line = grpo.training_step(net, tokenizer, optimizer, [], cfg, 0, 0, 1, interrupt)
    assert interrupt.held
    assert [(len(a[0]), *a[2:]) for a in seen] == [(3 if kl_coef else 2, 16, 200)] * 2
    assert record.pop("seconds").keys() == {"generate", "update", "tokens_per_second", "peak_gb"}
    assert record == pytest.approx(dict(
        reward=0.25, reward_lenient=0.375, equal_groups=1 / 3, length=12.5, truncated=0.125, groups=6, rounds=2,
        loss=0.5, grad_norm=5.0, v_norm=5.0, v_max=4.0, clipped=0.25, kl=0.1 if kl_coef else None, entropy=0.2,
        diff=0.01, diff_max=0.1))
    assert "reward 0.250 (last number 0.375)" in line and "warning: a number of v has grown to 4.0" in line


# ---------------------------------------------------------------------------------------------------------- whole runs


def args(checkpoint, problems, out_dir, **changes):
    options = dict(model=checkpoint, dataset=problems, eval_dataset=problems, out_dir=out_dir, max_steps=3,
                   batch_size=3, group_size=4, max_new_tokens=8, eval_size=5, answer_format="any", device="cpu", rank=2,
                   u=1, n_tie=1, objective="grpo", lr=0.02)
    options |= changes
    return [f"--{key}={value}" for key, value in options.items()]


def even_score(response, truncated, reference, answer_format):
    """A reward that random weights can earn, so that there is something to learn: an even number of characters."""
    right = len(response) % 2 == 0
    return {"strict": right, "lenient": right}


@pytest.fixture
def lucky(monkeypatch):
    monkeypatch.setattr(eval_math, "score", even_score)


def run(*arguments):
    grpo.train(configure(vars(grpo), list(arguments)))


def log_of(out_dir):
    lines = [json.loads(line) for line in open_text(Path(out_dir) / "log.jsonl").splitlines()]
    for line in lines:
        line.pop("seconds", None)
    return lines


def open_text(path):
    return path.read_text(encoding="utf-8")


def test_a_run_writes_log_adapter_and_checkpoint_and_repeats_itself(checkpoint, problems, tmp_path, lucky, capsys):
    for name in ("a", "b"):
        run(*args(checkpoint, problems, tmp_path / name, kl_coef=0.1, num_passes=2))
    out = capsys.readouterr().out
    assert re.search(r"^b: greedy accuracy [01]\.\d{3} -> [01]\.\d{3} with 14 numbers in \d+ s$", out, re.M)
    assert "for example" in out.lower()
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")
    steps = [line for line in log_of(tmp_path / "a") if "reward" in line]
    assert [line["step"] for line in steps] == [1, 2, 3] and all(line["diff_max"] < 1e-4 for line in steps)
    assert all(0 <= line["kl"] < 1 for line in steps) and steps[-1]["kl"] > 0
    run(*args(checkpoint, problems, tmp_path / "c", max_steps=1))
    assert log_of(tmp_path / "c")[1]["kl"] is None  # not 0: it was not measured
    v = load_file(tmp_path / "a" / "adapter.safetensors")["v"]
    assert v.shape == (14, 1) and v.abs().sum() > 0
    assert torch.equal(v, load_file(tmp_path / "b" / "adapter.safetensors")["v"])


@pytest.mark.parametrize("resample", [0, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(checkpoint, problems, tmp_path, lucky, resample):
    options = dict(resample=resample, batch_size=6)
    run(*args(checkpoint, problems, tmp_path / "whole", max_steps=4, **options))
    run(*args(checkpoint, problems, tmp_path / "parts", max_steps=2, **options))
    run(*args(checkpoint, problems, tmp_path / "parts", max_steps=4, init_from="resume", **options))
    assert torch.equal(*(load_file(tmp_path / d / "adapter.safetensors")["v"] for d in ("whole", "parts")))
    steps = [[line for line in log_of(tmp_path / d) if "reward" in line] for d in ("whole", "parts")]
    assert steps[0] == steps[1]
    assert any(line["rounds"] > 1 and line["groups"] > 6 for line in steps[0]) == bool(resample)


def test_ctrl_c_saves_and_exits_cleanly(checkpoint, problems, tmp_path):
    process = subprocess.Popen([sys.executable, "-u", "grpo.py", *args(checkpoint, problems, tmp_path / "run",
        max_steps=10000, eval_interval=0)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.time() + 120
    while not (log.exists() and '"step": 2' in log.read_text()) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "steps are saved" in out and "Traceback" not in err, err
    saved = int(re.search(r"interrupted: (\d+) steps", out)[1])
    assert saved >= 2
    more = dict(max_steps=saved + 1, init_from="resume")
    done = fork_script("grpo.py", *args(checkpoint, problems, tmp_path / "run", **more))
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in log_of(tmp_path / "run") if "reward" in line] == list(range(1, saved + 2))


@pytest.mark.parametrize("kill_at", ['"step": 1,', pytest.param("", marks=pytest.mark.slow),
                                     pytest.param('"step": 3,', marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_resumes_to_the_same_numbers_and_the_same_log(checkpoint, problems, tmp_path,
                                                                                 kill_at):
    """SIGKILL before the first step, before the first checkpoint, and between checkpoints."""
    options = dict(max_steps=5, save_interval=2, eval_interval=2, eval_size=3, lr=0.5)
    done = fork_script("grpo.py", *args(checkpoint, problems, tmp_path / "whole", **options))
    assert done.returncode == 0, done.stderr
    log = tmp_path / "parts" / "log.jsonl"
    process = subprocess.Popen([sys.executable, "grpo.py", *args(checkpoint, problems, tmp_path / "parts", **options)],
                               cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (log.exists() and kill_at in log.read_text()) and time.time() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    done = fork_script("grpo.py", *args(checkpoint, problems, tmp_path / "parts", init_from="resume", **options))
    assert done.returncode == 0, done.stderr
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    assert torch.equal(*(load_file(tmp_path / d / "adapter.safetensors")["v"] for d in ("whole", "parts")))


def lucky_run(arguments):
    """A run as the target of a process of its own."""
    torch.set_num_threads(1)
    tqdm.tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves behind
    eval_math.score = even_score
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        run(*arguments)


@pytest.mark.slow
def test_a_run_killed_twenty_times_at_random_equals_an_uninterrupted_one(checkpoint, problems, tmp_path, monkeypatch):
    """The runs are forked from a server that has imported everything: their own work, not the imports, is killed."""
    context, rng, parts = multiprocessing.get_context("forkserver"), random.Random(0), tmp_path / "parts"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server's
    context.set_forkserver_preload(["test_grpo", "torch._dynamo"])  # the second: torch's optimisers import it late
    options = dict(max_steps=60, save_interval=1, eval_interval=4, eval_size=3, num_passes=2, kl_coef=0.1)

    def started(name):
        init_from = "resume" if (tmp_path / name / "settings.py").exists() else "scratch"
        arguments = args(checkpoint, problems, tmp_path / name, **options, init_from=init_from)
        process = context.Process(target=lucky_run, args=(arguments,))
        process.start()
        return process

    def last_step(name):
        path = tmp_path / name / "log.jsonl"
        lines = open_text(path).splitlines(keepends=True) if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=-1)

    for name in ("first", "whole"):  # the first waits for the server's imports
        began = time.time()
        process = started(name)
        while last_step(name) < 0:
            time.sleep(0.001)
        ready = time.time() - began
        process.join()
        assert process.exitcode == 0
    of_a_step, reached = (time.time() - began - ready) / 60, []
    for _ in range(20):
        process, before, more = started("parts"), last_step("parts"), rng.choice([0, 0, 1, 2, 3])
        while more and last_step("parts") < before + more:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, of_a_step if more else ready))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        for path in parts.glob("*.safetensors"):
            load_file(path)  # whole, or not there
        assert last_step("parts") >= before - 1, "the log has lost lines of steps that a checkpoint holds"
        reached.append(last_step("parts"))
    process = started("parts")
    process.join()
    assert process.exitcode == 0 and len(set(reached)) > 8
    assert log_of(tmp_path / "whole") == log_of(parts)
    (tensors, info), (whole, whole_info) = (grpo.read_checkpoint(str(d / "checkpoint.safetensors"))
                                            for d in (parts, tmp_path / "whole"))
    assert tensors.keys() == whole.keys() and all(torch.equal(tensors[key], whole[key]) for key in whole)
    assert info["history"].pop("seconds") and whole_info["history"].pop("seconds") and info == whole_info
    assert {path.name for path in parts.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
    first, second = (safe_open(str(d / "adapter.safetensors"), "pt") for d in (parts, tmp_path / "whole"))
    assert torch.equal(first.get_tensor("v"), second.get_tensor("v")) and first.metadata() == second.metadata()
    assert whole["param.v"].abs().min() > 0


def test_sigterm_saves_and_exits(checkpoint, problems, tmp_path, lucky, monkeypatch):
    generate, calls = grpo.generate, []

    def terminated(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(*arguments, **options)

    monkeypatch.setattr(grpo, "generate", terminated)
    with pytest.raises(SystemExit) as stopped:
        run(*args(checkpoint, problems, tmp_path / "run", max_steps=9, eval_dataset=""))
    assert stopped.value.code == 143
    assert grpo.read_checkpoint(str(tmp_path / "run" / "checkpoint.safetensors"))[1]["step"] == 2


def test_the_best_evaluated_adapter_is_kept_beside_the_last(checkpoint, problems, tmp_path, monkeypatch):
    """Accuracies 0.1, 0.5, 0.3 after 0, 1 and 2 steps: the best is the one after step 1."""
    accuracies = iter([0.1, 0.5, 0.3])
    monkeypatch.setattr(eval_math, "evaluate", lambda *_, **__: {
        "strict": next(accuracies), "lenient": 0.0, "stderr": 0.0, "length": 1.0, "truncated": 0.0,
        "rows": [{"question": "?", "response": "", "answer": "1"}]})
    seen, save = {}, grpo.tinylora.save_adapter
    monkeypatch.setattr(grpo.tinylora, "save_adapter", lambda adapter, path, dtype: (
        seen.setdefault(os.path.basename(path), []).append(adapter.v.detach().clone()), save(adapter, path, dtype)))
    run(*args(checkpoint, problems, tmp_path / "run", max_steps=2, eval_interval=1, save_interval=1))
    assert len(seen["best.safetensors"]) == 1
    assert torch.equal(seen["best.safetensors"][0], seen["adapter.safetensors"][0])


def test_ctrl_c_while_the_best_is_written_loses_nothing(checkpoint, problems, tmp_path, monkeypatch):
    save = grpo.save_trained

    def interrupted(net, cfg, best=False):
        if best:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # where the signal would strike
        save(net, cfg, best)

    monkeypatch.setattr(grpo, "save_trained", interrupted)
    accuracies = iter([0.1, 0.5])
    monkeypatch.setattr(eval_math, "evaluate", lambda *_, **__: {
        "strict": next(accuracies), "lenient": 0.0, "stderr": 0.0, "length": 1.0, "truncated": 0.0,
        "rows": [{"question": "?", "response": "", "answer": "1"}]})
    with pytest.raises(SystemExit):
        run(*args(checkpoint, problems, tmp_path / "run", max_steps=2, eval_interval=1))
    assert (tmp_path / "run" / "best.safetensors").exists()
    assert [line["eval"]["strict"] for line in log_of(tmp_path / "run") if "eval" in line] == [0.1, 0.5]
    _, info = grpo.read_checkpoint(str(tmp_path / "run" / "checkpoint.safetensors"))
    assert info["history"]["best"] == 0.5 and info["step"] == 1


def test_only_what_safetensors_left_in_a_runs_own_folders_is_removed(checkpoint, problems, tmp_path):
    out = tmp_path / "out[a]"
    for place in (out, out / "model", out / "other", tmp_path / "outa"):
        place.mkdir(parents=True)
        (place / ".tmpx").write_text("")
    (out / "notes.safetensors").mkdir()
    run(*args(checkpoint, problems, out, max_steps=1, eval_dataset=""))
    left = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob(".tmpx")]
    assert sorted(left) == ["out[a]/other/.tmpx", "outa/.tmpx"]
    assert grpo.previous("a.safetensors/checkpoint.safetensors") == "a.safetensors/checkpoint.previous.safetensors"


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(checkpoint, problems, tmp_path, lucky, capsys,
                                                                    monkeypatch, damage):
    options = dict(max_steps=3, save_interval=1, eval_dataset="")
    run(*args(checkpoint, problems, tmp_path / "run", **options))
    path = tmp_path / "run" / "checkpoint.safetensors"
    v, data = load_file(tmp_path / "run" / "adapter.safetensors")["v"], path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(data[:-9] if damage == "cut" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    save = grpo.save_checkpoint

    def saving(path, *arguments):
        save(path, *arguments)
        grpo.read_checkpoint(grpo.previous(path))  # the damaged file has not taken its place

    monkeypatch.setattr(grpo, "save_checkpoint", saving)
    run(*args(checkpoint, problems, tmp_path / "run", init_from="resume", **options))
    assert "checkpoint.safetensors cannot be used" in capsys.readouterr().out
    assert torch.equal(load_file(tmp_path / "run" / "adapter.safetensors")["v"], v)
    for file in ("checkpoint.safetensors", "checkpoint.previous.safetensors"):
        (tmp_path / "run" / file).write_bytes(b"nonsense")
    with pytest.raises(UserError, match="no whole checkpoint"):
        run(*args(checkpoint, problems, tmp_path / "run", init_from="resume", **options))


def test_answers_near_the_limit_pay():
    lengths = torch.tensor([[10, 60, 70, 79, 80]])
    assert grpo.overlong_penalty(lengths, 80, 20).tolist() == [[0, 0, 0.5, pytest.approx(0.95), 1]]
    assert not grpo.overlong_penalty(lengths, 80, 0).any()


def test_where_the_context_ends_an_answer_its_end_is_the_limit(net, tokenizer, checkpoint, problems, tmp_path, capsys):
    context = net.config.max_position_embeddings
    options = dict(prompt_template="{question} " + "x " * 200, max_new_tokens=context, overlong_tokens=context // 8,
                   group_size=2, batch_size=2, max_steps=1, eval_dataset="")
    run(*args(checkpoint, problems, tmp_path / "run", **options))
    assert f"behind the longest prompt the model's context of {context} has room for" in capsys.readouterr().out
    cfg = configure(vars(grpo), args(checkpoint, problems, tmp_path / "none", **options, objective="dr_grpo"))
    rows = eval_math.load_problems(problems)[:1]
    grpo.prepare_problems(net, tokenizer, rows, cfg)
    room = context - len(rows[0]["prompt"])
    [group], counts = grpo.sample_groups(net, tokenizer, rows, [(0, 0), (1, 0)][:1], cfg, None)
    paid = grpo.overlong_penalty(torch.tensor([[len(row.ids) for row in group]]), room, cfg.overlong_tokens)[0]
    expected = (paid.mean() - paid).tolist()
    assert room < cfg.max_new_tokens and [row.advantage for row in group] == pytest.approx(expected, abs=1e-6)


def test_truncated_importance_sampling_weights_tokens_by_the_mismatch():
    """Two tokens, on policy: the gradient of each is the advantage times min(trainer's / sampler's share, cap)."""
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    mismatch = (logp.detach() - torch.tensor([[-1.2, -5.0]])).exp().clamp(max=2.0)
    loss, _ = grpo.policy_loss(logp, logp.detach(), torch.tensor([0.5]), torch.tensor([1.0]), torch.ones(1, 2),
                               mismatch=mismatch)
    loss.backward()
    assert torch.allclose(logp.grad, -0.5 * torch.tensor([[math.exp(0.2), 2.0]]))


def test_the_cap_recomputation_and_packing_change_nothing_where_both_sides_agree(checkpoint, problems, tmp_path, lucky):
    for name, options in dict(plain={}, tis=dict(tis_cap=2.0), recompute=dict(recompute=True),
                              padded=dict(packing=False)).items():
        run(*args(checkpoint, problems, tmp_path / name, eval_dataset="", **options))
    v = {name: load_file(tmp_path / name / "adapter.safetensors")["v"]
         for name in ("plain", "tis", "recompute", "padded")}
    assert torch.allclose(v["plain"], v["padded"], atol=1e-4)
    assert torch.equal(v["plain"], v["recompute"]) and torch.allclose(v["plain"], v["tis"], atol=1e-4)


def test_recomputation_goes_with_the_kl_term(net, tokenizer):
    """In its backward pass the blocks run again, after the reference policy has had its turn."""
    adapter, gradients = tinylora.add_adapter(net, u=3, n_tie=4), []
    torch.nn.init.normal_(adapter.v, std=0.1, generator=torch.Generator().manual_seed(0))
    for net.model.recompute in (False, True):
        adapter.zero_grad()
        grpo.accumulate_gradient(net, tokenizer, random_rows(), settings(kl_coef=0.3, micro_batch_tokens=60), 9, 99)
        gradients.append(adapter.v.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-7) and gradients[0].norm() > 0


def test_a_log_prob_that_is_not_finite_is_written_down(checkpoint, problems, tmp_path, lucky, monkeypatch):
    scored = grpo.completion_logprobs

    def broken(*arguments):
        logp, *rest = scored(*arguments)
        logp = logp.clone()
        logp[1, 0] = math.nan
        return logp, *rest

    monkeypatch.setattr(grpo, "completion_logprobs", broken)
    with pytest.raises(UserError, match="not_finite.json"):
        run(*args(checkpoint, problems, tmp_path / "run", eval_dataset=""))
    row = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert len(row["ids"]) == len(row["sampler_logprobs"]) and math.isnan(row["trainer_logprobs"][0])


def test_warnings_name_the_cure():
    calm = dict(truncated=0.0, equal_groups=0.5, entropy=0.5, diff=1e-7, v_max=0.1)
    cfg = SimpleNamespace(max_new_tokens=64, dtype="auto", method="tinylora")
    assert grpo.warnings_of(calm, cfg, torch.float32) == []
    off = calm | {"diff": 0.01}  # much for 32 bits, not for 16
    assert grpo.warnings_of(off, cfg, torch.bfloat16) == [] and len(grpo.warnings_of(off, cfg, torch.float32)) == 1
    for key, value, word in [("truncated", 0.5, "max_new_tokens"), ("equal_groups", 1.0, "problems"),
                             ("entropy", 0.0, "lr"), ("diff", 0.2, "tis_cap"), ("v_max", 3.0, "lr")]:
        [text] = grpo.warnings_of(calm | {key: value}, cfg, torch.float32)
        assert word in text


@pytest.mark.parametrize("key, dtype, bound", [("truncated", torch.float32, 0.2), ("equal_groups", torch.float32, 0.9),
                                               ("v_max", torch.float32, 1.0), ("diff", torch.float32, 1e-3),
                                               ("diff", torch.bfloat16, 0.05)])
def test_warnings_begin_at_their_bounds(key, dtype, bound):
    calm = dict(truncated=0.0, equal_groups=0.5, entropy=0.006, diff=1e-7, v_max=0.1)
    cfg = SimpleNamespace(max_new_tokens=64, dtype="auto", method="tinylora")
    assert [len(grpo.warnings_of(calm | {key: bound * share}, cfg, dtype)) for share in (0.98, 1.02)] == [0, 1]
    assert len(grpo.warnings_of(calm | {"entropy": 0.004}, cfg, dtype)) == 1
    none = calm | {"entropy": None, "diff": None, "v_max": 9.0}  # a step without a gradient; weights may be large
    assert grpo.warnings_of(none, SimpleNamespace(**vars(cfg) | {"method": "full"}), dtype) == []


def test_a_second_run_moves_the_first_aside(checkpoint, problems, tmp_path):
    for _ in range(2):
        run(*args(checkpoint, problems, tmp_path / "run", max_steps=1, eval_dataset=""))
    assert (tmp_path / "run.1" / "log.jsonl").exists() and (tmp_path / "run" / "log.jsonl").exists()


def test_two_processes_learn_what_one_does(checkpoint, problems, tmp_path, net):
    """2 ranks over gloo, from a v with a KL gradient: the same samples, and the same gradient moments."""
    adapter = tinylora.add_adapter(net, rank=2, u=1, n_tie=1, seed=1337)
    torch.nn.init.normal_(adapter.v, std=0.2, generator=torch.Generator().manual_seed(0))
    parameters, optimizer = dict(adapter.named_parameters()), torch.optim.Adam(adapter.parameters())
    history = {"seconds": 0.0, "base": 0.0, "accuracy": None, "evaluated": None, "best": 0.0}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        grpo.save_checkpoint(str(tmp_path / name / "checkpoint.safetensors"), parameters, optimizer, 0, history,
                             adapter.meta)
    options = dict(max_steps=2, batch_size=4, eval_size=5, kl_coef=0.5, init_from="resume")
    run(*args(checkpoint, problems, tmp_path / "one", **options))
    for done in fork_ranks(2, "grpo.py", *args(checkpoint, problems, tmp_path / "two", **options)):
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / d / "checkpoint.safetensors") for d in ("one", "two"))
    moment = one["optimizer.0.exp_avg"]
    assert (two["optimizer.0.exp_avg"] - moment).norm() < 1e-4 * moment.norm() and moment.norm() > 0
    one, two = (log_of(tmp_path / d) for d in ("one", "two"))
    assert [line.get("length") for line in one] == [line.get("length") for line in two]
    assert one[-1]["eval"]["problems"] == 5 and one[-1] == two[-1]  # each rank asked its share


def test_a_step_follows_the_policy_gradient_of_its_samples(net, tokenizer, checkpoint, problems, lucky, monkeypatch):
    """The whole of training_step against rewards, advantages and gradient computed here from what was sampled."""
    adapter = tinylora.add_adapter(net, u=3, n_tie=4)
    cfg = configure(vars(grpo), args(checkpoint, problems, "unused", batch_size=5, micro_batch_tokens=100))
    rows = eval_math.load_problems(problems)
    grpo.prepare_problems(net, tokenizer, rows, cfg)
    seen = {}

    def sampling(net, tokenizer, prompts, *arguments, **options):
        seen["prompts"], seen["groups"] = prompts, sample.generate(net, tokenizer, prompts, *arguments, **options)
        return seen["groups"]

    def updating(optimizer, parameters, grad_clip):
        seen["gradient"] = adapter.v.grad.clone()
        return 0.0

    monkeypatch.setattr(grpo, "generate", sampling)
    monkeypatch.setattr(grpo, "update", updating)
    optimizer = torch.optim.Adam(adapter.parameters())
    record, _ = grpo.training_step(net, tokenizer, optimizer, rows, cfg, 0, 0, 1, grpo.Interrupt())
    rewards = torch.tensor([[float(len(c.text) % 2 == 0) for c in group] for group in seen["groups"]])
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    loss = 0
    for prompt, group, group_advantages in zip(seen["prompts"], seen["groups"], advantages):
        for c, advantage in zip(group, group_advantages):
            loss = loss - advantage * plain_logprobs(net, grpo.Row(prompt, c.ids, [], 0.0)).mean() / rewards.numel()
    adapter.zero_grad()
    loss.backward()
    assert (seen["gradient"] - adapter.v.grad).norm() <= 1e-4 * adapter.v.grad.norm() and adapter.v.grad.norm() > 0
    assert record["reward"] == pytest.approx(rewards.mean().item())
    assert record["equal_groups"] == pytest.approx((rewards.std(1) == 0).float().mean().item())


def test_ctrl_c_during_an_update_neither_loses_nor_repeats_it(checkpoint, problems, tmp_path, lucky, monkeypatch):
    run(*args(checkpoint, problems, tmp_path / "whole", max_steps=4))
    step, calls = torch.optim.Adam.step, []

    def interrupted(optimizer, *arguments, **options):
        result = step(optimizer, *arguments, **options)
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(torch.optim.Adam, "step", interrupted)
        run(*args(checkpoint, problems, tmp_path / "parts", max_steps=4))
    assert stopped.value.code == 130 and len(calls) == 2
    run(*args(checkpoint, problems, tmp_path / "parts", max_steps=4, init_from="resume"))
    assert torch.equal(*(load_file(tmp_path / d / "adapter.safetensors")["v"] for d in ("whole", "parts")))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


def test_resuming_a_finished_run_reports_the_same_line(checkpoint, problems, tmp_path, lucky, capsys):
    run(*args(checkpoint, problems, tmp_path / "run"))
    first = capsys.readouterr().out.splitlines()[-1]
    run(*args(checkpoint, problems, tmp_path / "run", init_from="resume"))
    assert capsys.readouterr().out.splitlines()[-1].rpartition(" in ")[0] == first.rpartition(" in ")[0]


def test_a_checkpoint_of_another_adapter_is_refused(checkpoint, problems, tmp_path):
    run(*args(checkpoint, problems, tmp_path / "run", max_steps=1, eval_dataset=""))
    for changes in (dict(seed=7), dict(tie="structured"), dict(u=2)):
        options = dict(eval_dataset="", init_from="resume") | changes
        with pytest.raises(UserError, match=f"made with another .*{next(iter(changes))}"):
            run(*args(checkpoint, problems, tmp_path / "run", **options))
    mine = [a for a in args(checkpoint, problems, tmp_path / "run", eval_dataset="", init_from="resume")
            if a[2:].partition("=")[0] in vars(sft)]
    with pytest.raises(UserError, match="made with another script"):
        sft.train(configure(vars(sft), mine))


def test_the_log_goes_on_behind_the_steps_that_are_saved(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "x": 1}) + "\n" for step in (0, 1, 2, 2, 3, 4)]
    path.write_text("".join(lines) + '{"step": 5, "re')  # killed here
    with grpo.open_log(str(path), 2) as log:
        log.write("more\n")
    assert path.read_text() == "".join(lines[:4]) + "more\n"
    with grpo.open_log(str(path), 0):
        assert path.read_text() == ""


def test_a_checkpoint_with_any_byte_changed_is_not_read(tmp_path):
    v, path = torch.nn.Parameter(torch.arange(40.0)), tmp_path / "checkpoint.safetensors"
    optimizer = torch.optim.Adam([v])
    v.grad = torch.ones(40)
    optimizer.step()
    grpo.save_checkpoint(str(path), {"v": v}, optimizer, 12, {"best": 0.5}, {"method": "tinylora"})
    whole = path.read_bytes()
    assert grpo.read_checkpoint(str(path))[1]["step"] == 12
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(OSError):
            grpo.read_checkpoint(str(path))


def test_a_run_goes_on_where_the_weights_are_held_in_another_dtype(checkpoint, problems, tmp_path):
    """The fingerprint of the base differs in its last digits, as it does from one machine to another."""
    options = dict(eval_dataset="", dtype="bfloat16")
    run(*args(checkpoint, problems, tmp_path / "run", max_steps=1, **options))
    before = grpo.read_checkpoint(str(tmp_path / "run" / "checkpoint.safetensors"))[1]["identity"]["base"]
    options |= dict(dtype="float32", init_from="resume")
    run(*args(checkpoint, problems, tmp_path / "run", max_steps=2, **options))
    after = grpo.read_checkpoint(str(tmp_path / "run" / "checkpoint.safetensors"))[1]
    assert after["step"] == 2 and after["identity"]["base"] != before


def test_the_time_of_a_resumed_run_is_that_of_both_parts(checkpoint, problems, tmp_path, monkeypatch, capsys):
    options = dict(eval_dataset="", eval_size=0)
    run(*args(checkpoint, problems, tmp_path / "run", max_steps=1, **options))
    path = str(tmp_path / "run" / "checkpoint.safetensors")
    assert 0 < grpo.read_checkpoint(path)[1]["history"]["seconds"] < 600
    real = grpo.load_checkpoint

    def long_ago(*arguments):
        step, history, file = real(*arguments)
        return step, history | {"seconds": 5000.0}, file

    monkeypatch.setattr(grpo, "load_checkpoint", long_ago)
    run(*args(checkpoint, problems, tmp_path / "run", max_steps=2, init_from="resume", **options))
    assert 5000 < grpo.read_checkpoint(path)[1]["history"]["seconds"] < 5600


def test_an_update_that_fails_in_a_later_pass_is_not_saved(checkpoint, problems, tmp_path, lucky, monkeypatch):
    """Its first pass has moved v already: the checkpoint is to stay that of the step before."""
    real, calls = grpo.update, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise UserError("the gradient is not finite")
        return real(*arguments)

    monkeypatch.setattr(grpo, "update", failing)
    with pytest.raises(UserError, match="not finite"):
        run(*args(checkpoint, problems, tmp_path / "run", eval_dataset="", num_passes=2, save_interval=1))
    tensors, info = grpo.read_checkpoint(str(tmp_path / "run" / "checkpoint.safetensors"))
    assert info["step"] == 1 and tensors["optimizer.0.step"] == 2


def test_the_optimiser_is_adam_as_the_paper_has_it(checkpoint, problems, tmp_path, lucky, monkeypatch):
    seen, real = [], grpo.update
    monkeypatch.setattr(grpo, "update", lambda optimizer, *a: (seen.append(optimizer), real(optimizer, *a))[1])
    run(*args(checkpoint, problems, tmp_path / "run", eval_dataset="", max_steps=1, lr=0.03))
    [group] = seen[0].param_groups
    assert type(seen[0]) is torch.optim.Adam
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.03, (0.9, 0.999), 0)
    v = load_file(tmp_path / "run" / "adapter.safetensors")["v"]
    assert v.abs().max().item() == pytest.approx(0.03, rel=1e-3)  # Adam's first step


@pytest.mark.parametrize("grad_clip, norm", [(0.5, 0.5), (5.0, 5.0), (20.0, 10.0), (0.0, 10.0)])
def test_the_gradient_is_clipped_to_the_bound_and_its_norm_told_before(grad_clip, norm):
    a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    a.grad, b.grad = torch.tensor([6.0, 0.0]), torch.tensor([0.0, 8.0])
    assert grpo.update(torch.optim.SGD([a, b], lr=1.0), [a, b], grad_clip) == pytest.approx(10.0)
    assert torch.cat((a, b)).tolist() == pytest.approx([-0.6 * norm, 0, 0, -0.8 * norm], abs=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stops_the_pass_before_the_step(value):
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([1.0, value])
    with pytest.raises(UserError, match="gradient is not finite"):
        grpo.update(torch.optim.Adam([p]), [p], 1.0)
    assert not p.any()


def test_a_log_prob_of_minus_infinity_is_not_finite(tmp_path):
    rows, mask = random_rows(2), torch.tensor([[True, True], [True, False]])
    logp = torch.tensor([[-1.0, -2.0], [-math.inf, 0.0]])
    with pytest.raises(UserError, match="not finite"):
        grpo.check_finite(logp, mask, rows, SimpleNamespace(out_dir=str(tmp_path)))
    assert json.loads((tmp_path / "not_finite.json").read_text())["ids"] == rows[1].ids


def test_signals_mean_what_they_meant_before_once_a_run_has_ended():
    before = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]
    with grpo.Interrupt():
        assert all(signal.getsignal(name) not in before for name in (signal.SIGINT, signal.SIGTERM))
    assert [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)] == before


def test_settings_that_a_method_does_not_read_are_named(net, checkpoint, problems, capsys):
    cfg = configure(vars(grpo), args(checkpoint, problems, "unused", method="lora", n_tie=4, alpha=8))
    grpo.trained_parameters(net, cfg)
    assert "method = lora does not read u, n_tie\n" in capsys.readouterr().out


def test_a_log_line_that_no_run_wrote_is_named(checkpoint, problems, tmp_path):
    options = dict(max_steps=1, eval_dataset="", init_from="resume")
    run(*args(checkpoint, problems, tmp_path / "run", max_steps=1, eval_dataset=""))
    for line in ("junk", "[1]", "{}"):
        with open(tmp_path / "run" / "log.jsonl", "a") as f:
            f.write(line + "\n")
        with pytest.raises(UserError, match=r"log.jsonl holds a line that no run wrote"):
            run(*args(checkpoint, problems, tmp_path / "run", **options))


def test_a_signal_during_a_reduction_is_heard_at_the_next(monkeypatch):
    """Ranks that share weights ask one another at every release; one that is told to stop meanwhile does so next."""
    interrupt = grpo.Interrupt(SimpleNamespace(shard=True))

    def reduction(values, *_):
        interrupt.handle(signal.SIGTERM, None)  # after this rank has said that nothing was asked of it
        return values

    with interrupt:
        monkeypatch.setattr(grpo, "all_reduce", reduction)
        interrupt.release()
        with pytest.raises(KeyboardInterrupt):
            interrupt.release()
    assert interrupt.exit_code == 143


def test_a_gradient_that_is_not_finite_is_never_saved(checkpoint, problems, tmp_path, lucky, monkeypatch):
    scored = grpo.completion_logprobs
    monkeypatch.setattr(grpo, "completion_logprobs", lambda *a: (scored(*a)[0] * math.nan, *scored(*a)[1:]))
    with pytest.raises(UserError, match="not finite"):
        run(*args(checkpoint, problems, tmp_path / "run", eval_dataset=""))
    assert not (tmp_path / "run" / "adapter.safetensors").exists()


class Recorder:
    """Takes any call, and notes it."""

    def __init__(self, calls):
        self.calls = calls

    def __getattr__(self, name):
        return lambda *arguments, **options: (self.calls.append((name, arguments, options)), self)[1]


def stand_in(monkeypatch, name, **members):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # it looks installed
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def test_metrics_go_to_wandb_and_tensorboard_too(checkpoint, problems, tmp_path, lucky, monkeypatch):
    calls, points = [], []
    stand_in(monkeypatch, "wandb", init=Recorder(calls).init)
    stand_in(monkeypatch, "tensorboard")
    stand_in(monkeypatch, "torch.utils.tensorboard", SummaryWriter=Recorder(points).SummaryWriter)
    run(*args(checkpoint, problems, tmp_path / "run", max_steps=2, wandb_log=True, tensorboard=True))
    (first, _, options), *logged, (last, _, _) = calls
    assert first == "init" and last == "finish" and options["name"] == "run" and options["config"]["max_steps"] == 2
    lines = [json.loads(line) for line in open_text(tmp_path / "run" / "log.jsonl").splitlines()]
    assert [options["step"] for _, _, options in logged] == [line["step"] for line in lines] == [0, 1, 2, 2]
    (first,), (second,) = (arguments for _, arguments, _ in logged[:2])
    assert second["reward"] == lines[1]["reward"] and first["eval/strict"] == lines[0]["eval"]["strict"]
    assert points[0] == ("SummaryWriter", (str(tmp_path / "run"),), {"purge_step": 1}) and points[-1][0] == "close"
    assert ("add_scalar", ("seconds/update", lines[2]["seconds"]["update"], 2), {}) in points
    assert len(points) - 2 == sum(len(arguments[0]) for _, arguments, _ in logged)


@pytest.mark.parametrize("setting, package", [("wandb_log", "wandb"), ("tensorboard", "tensorboard")])
def test_a_missing_package_is_named_before_any_work(checkpoint, problems, tmp_path, monkeypatch, setting, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        run(*args(checkpoint, problems, tmp_path / "run", **{setting: True}))
    assert not (tmp_path / "run").exists()


REFUSED = {
    "missing model directory": (dict(model="nowhere"), "no model directory at 'nowhere'"),
    "unknown data set": (dict(dataset="gsm9k"), "'gsm9k'"),
    "missing data file": (dict(dataset="nowhere.jsonl"), "nowhere.jsonl"),
    "group of one": (dict(group_size=1), "group_size must be at least 2"),
    "top_p in training": (dict(top_p=0.9), "top_p"),
    "greedy training": (dict(temperature=0.0), "temperature must be above 0"),
    "unknown objective": (dict(objective="ppo"), "objective must be"),
    "unknown method": (dict(method="dora"), "method 'dora' is unknown"),
    "wrong type": (dict(max_steps="many"), "--max_steps wants an int"),
    "unknown key": (dict(learning_rate=1), "learning_rate"),
    "nothing to resume": (dict(init_from="resume"), "holds no whole checkpoint"),
    "negative interval": (dict(eval_interval=-1), "eval_interval and save_interval must not be negative"),
    "seed beyond numpy's": (dict(seed=2**32 - 1), "seed must be below"),
    "no tokens": (dict(max_new_tokens=0), "max_new_tokens, num_passes"),
    "no passes": (dict(num_passes=0), "max_new_tokens, num_passes"),
    "negative kl_coef": (dict(kl_coef=-0.1), "must not be negative"),
    "negative cap": (dict(tis_cap=-1.0), "tis_cap 0 or more"),
    "top_k in training": (dict(top_k=5), "top_p and top_k must stay"),
    "16 bits with a short range": (dict(dtype="float16"), "dtype = float16 has too short a range"),
    "misspelt answer_format": (dict(answer_format="boxd"), "answer_format must be"),
    "misspelt init_from": (dict(init_from="resum"), "init_from must be scratch or resume"),
    "overlong_tokens beyond the limit": (dict(overlong_tokens=10**6), "overlong_tokens must be"),
    "prompt longer than the context": (
        dict(prompt_template="{question}" * 40),
        "longer than the model's context of 512",
    ),
    "more P than memory": (dict(u=10**9, n_tie=0), "too many; use fewer"),
    "number beyond float32": (dict(tis_cap="1e300"), "wants a finite number below 1e18"),
    "number beyond int64": (dict(batch_size=10**20), "wants a finite number below 1e18"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_gets_one_line_and_exit_code_2(checkpoint, problems, tmp_path, name):
    changes, words = REFUSED[name]
    assert_refused(fork_script("grpo.py", *args(checkpoint, problems, tmp_path / "run", **changes)), words)
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("packing", [True, False])
def test_the_gradient_is_the_same_every_time(net, tokenizer, packing):
    """To the bit, with threads, where 600 rows share the last token of their prompt."""
    adapter = tinylora.add_adapter(net, rank=2, u=3)
    torch.nn.init.constant_(adapter.v, 0.1)
    random, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    rows = [grpo.Row([5, 6, 7], torch.randint(5, 200, (2,), generator=random).tolist(), [-1.0] * 2, (-1.0) ** i / 3)
            for i in range(600)]
    seen = set()
    try:
        torch.set_num_threads(4)
        for _ in range(20):
            adapter.v.grad = None
            logp, _, _ = grpo.completion_logprobs(net, tokenizer, rows, 1.0, packing)
            (logp * torch.linspace(-1, 1, 1200).view(600, 2)).sum().backward()
            seen.add(adapter.v.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1
