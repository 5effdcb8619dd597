"""Log-probs of many sequences in one forward pass: no padding, and never all logits in memory."""

import inspect
import math
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

TOKENS_A_CALL = 256  # of completions in one attention call: many calls and large masks cost time
LOGITS_A_CHUNK = 2**26  # 256 MB in float32: 441 tokens at a vocabulary of 152k


@dataclass
class Rollout:
    """A prompt and what follows it: a sampled completion, or a solution to be learnt."""

    prompt: list  # token ids
    ids: list  # token ids of the completion, as they were sampled: never encoded again from text
    logprobs: list | None = None  # of ids, under the policy that sampled them
    advantage: float = 0.0
    old_logprobs: torch.Tensor | None = None  # [len(ids)], under the policy before the first pass
    loss_mask: list | None = None  # which of ids are trained; None: all

    def __post_init__(self):
        self.loss_mask = self.loss_mask or [True] * len(self.ids)


def micro_batches(rollouts, max_tokens):
    """Cut rollouts into batches of at most max_tokens tokens, where a prompt counts once. A rollout
    that is longer than that has a batch of its own."""
    batch, tokens = [], 0
    for rollout in sorted(rollouts, key=lambda rollout: rollout.prompt):
        alone = len(rollout.prompt) + len(rollout.ids)
        shares_prompt = batch and batch[-1].prompt == rollout.prompt
        added = len(rollout.ids) if shares_prompt else alone
        if batch and tokens + added > max_tokens:
            yield batch
            batch, tokens, added = [], 0, alone
        batch.append(rollout)
        tokens += added
    if batch:
        yield batch


def completion_logprobs(net, batch, temperature=1.0):
    """Log-probs and entropies of a batch of Rollouts, 0 where a token is not trained, and the loss
    mask: three tensors [B, T], where T is the longest completion."""
    packed = Packed(batch, net.device)
    hidden = net.model(packed.ids, packed.positions, packed)[0]  # [total, D]
    masks = [torch.tensor(rollout.loss_mask) for rollout in batch]
    tokens = [token for rollout in batch for token in rollout.ids]
    pairs = torch.tensor([packed.before, tokens])[:, torch.cat(masks)]  # [2, n], the trained ones
    places, targets = pairs.to(net.device)
    # Not hidden[places]: several rollouts share the last token of their prompt, and the backward
    # pass of indexing adds up their gradients in a nondeterministic order.
    logprobs, entropy = token_logprobs(F.embedding(places, hidden), net.head, targets, temperature)
    loss_mask = pad_sequence(masks, batch_first=True).to(net.device)
    zeros = logprobs.new_zeros(loss_mask.shape)
    logprobs = zeros.masked_scatter(loss_mask, logprobs)
    return logprobs, zeros.masked_scatter(loss_mask, entropy), loss_mask


# -------------------------------------------------------------------------------------- attention

def attention(q, k, v, mask=None):
    """q [B, heads, T, hd], k and v [B, kv_heads, S, hd] -> [B, heads, T, hd]. Causal unless there
    is a mask, [T, S] or [B, 1, T, S]."""
    # In float32 on a GPU, the only kernel that does not store all scores cannot group heads.
    grouped = not (q.is_cuda and q.dtype == torch.float32)
    if not grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)


class Packed:
    """Rollouts in one row: every prompt once, followed by the completions to it. A token attends to
    its prompt and to its own completion, up to itself. A completion's last token is left out, since
    nothing follows it. Passed to the model in the place of a cache.

    ids, positions [1, total]: the row. before: for every token of every completion, the place in
    the row of the token it follows. calls: what one call of attention() covers, a prompt or some
    completions to it, as a list of spans: the places of a prompt and of what follows it. The first
    of them are empty for the prompt itself.
    """

    def __init__(self, batch, device):
        ids, positions = [], []
        self.before = []
        self.calls = []
        for prompt, group in groupby(batch, key=lambda rollout: rollout.prompt):
            of_prompt = range(len(ids), len(ids) + len(prompt))
            ids += prompt
            positions += range(len(prompt))
            self.calls += [[(range(0), of_prompt)], []]
            tokens = 0
            for rollout in group:
                own = range(len(ids), len(ids) + len(rollout.ids) - 1)
                self.before += [of_prompt[-1], *own]
                ids += rollout.ids[:-1]
                positions += range(len(prompt), len(prompt) + len(own))
                tokens += len(own)
                if tokens > TOKENS_A_CALL and self.calls[-1]:
                    self.calls.append([])
                    tokens = len(own)
                self.calls[-1].append((of_prompt, own))
        self.ids = torch.tensor([ids], device=device)
        self.positions = torch.tensor([positions], device=device)
        self.masks = None  # made by the first layer for all layers, as are the kernel's arguments
        self.kernel_arguments = None

    def attend(self, layer, q, k, v):
        """q [1, heads, total, hd], k and v [1, kv_heads, total, hd] -> [1, heads, total, hd]."""
        if q.is_cuda and q.dtype.itemsize == 2 and torch.cuda.get_device_capability() >= (8, 0):
            return self.attend_in_one_call(q, k, v)
        if self.masks is None:
            self.masks = [mask_of(spans, q) for spans in self.calls]
        sizes = [sum(len(own) for _, own in spans) for spans in self.calls]
        # split() and not slices: the backward pass of every slice would zero-fill the whole row.
        pieces = zip(*(x.split(sizes, dim=2) for x in (q, k, v)))
        out = []
        for mask, (queries, keys, values) in zip(self.masks, pieces):
            if mask is None:  # a prompt; completions to it follow
                prompt_keys, prompt_values = keys, values
            else:
                keys = torch.cat((prompt_keys, keys), dim=2)
                values = torch.cat((prompt_values, values), dim=2)
            out.append(attention(queries, keys, values, mask))
        return torch.cat(out, dim=2)

    def attend_in_one_call(self, q, k, v):
        """The same by one kernel for 16 bits on a GPU, which wants the keys of every completion,
        its prompt's included, one after another."""
        from torch.nn.attention.varlen import varlen_attn

        if self.kernel_arguments is None:
            spans = [span for spans in self.calls for span in spans]
            places = torch.tensor([i for prompt, own in spans for i in (*prompt, *own)])
            queries = torch.tensor([0] + [len(own) for _, own in spans])
            keys = torch.tensor([0] + [len(prompt) + len(own) for prompt, own in spans])
            ends = [n.cumsum(0, dtype=torch.int32).to(q.device) for n in (queries, keys)]
            longest = queries.max().item(), keys.max().item()
            self.kernel_arguments = places.to(q.device), *ends, *longest
        places, *arguments = self.kernel_arguments
        k = k[0].transpose(0, 1).index_select(0, places)  # [keys, kv_heads, hd]
        v = v[0].transpose(0, 1).index_select(0, places)
        options = {"window_size": (-1, 0)}  # causal
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.11 always groups
            options["enable_gqa"] = True
        return varlen_attn(q[0].transpose(0, 1), k, v, *arguments, **options).transpose(0, 1)[None]


def mask_of(spans, like):
    """What is added to the scores [T, P + T] of completions to one prompt: 0 for the prompt and for
    a token's own completion up to itself, else -inf. None for a prompt, which is plainly causal."""
    P = len(spans[0][0])
    if P == 0:
        return None
    lengths = torch.tensor([len(own) for _, own in spans])
    owner = torch.arange(len(spans)).repeat_interleave(lengths).to(like.device)  # [T]
    visible = (owner[:, None] == owner).tril()
    mask = like.new_zeros(len(owner), P + len(owner))
    mask[:, P:].masked_fill_(~visible, -math.inf)
    return mask


# --------------------------------------------------------------------------------------- log-probs

def token_logprobs(hidden, head, targets, temperature, chunk=0):
    """Log-probs of targets [n] and entropies [n] under softmax(hidden head^T / T), hidden [n, D].
    They are float32, or float64 if hidden is. Only the logits of one chunk of tokens exist at a
    time. chunk: tokens, 0 for as many as have 256 MB of logits."""
    chunk = chunk or max(1, LOGITS_A_CHUNK // len(head))
    if not head.requires_grad:
        return FrozenHead.apply(hidden, head, targets, temperature, chunk)

    def recomputed(h, t):  # in the backward pass; returns no probabilities, which would be kept
        return chunk_logprobs(h, head, t, temperature)[:2]

    parts = [checkpoint(recomputed, h, t, use_reentrant=False)
             for h, t in zip(hidden.split(chunk), targets.split(chunk))]
    logprobs, entropies = zip(*parts)
    return torch.cat(logprobs), torch.cat(entropies)


def logits_of(hidden, head):
    """hidden [n, D] head^T -> [n, vocab]. On a GPU in float32, which costs nothing there: half of
    what sampler and trainer disagree about in 16 bits would be the rounding of logits ("The Art of
    Scaling Reinforcement Learning Compute", 2025)."""
    if hidden.is_cuda and hidden.dtype.itemsize == 2:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    return F.linear(hidden, head)


def chunk_logprobs(hidden, head, targets, temperature):
    """Log-probs and entropies of a chunk of tokens, and the probabilities [chunk, vocab]."""
    logits = logits_of(hidden, head).to(torch.promote_types(head.dtype, torch.float32))
    all_logprobs = torch.log_softmax(logits.div_(temperature), dim=-1)
    logprobs = all_logprobs.gather(1, targets[:, None]).squeeze(1)
    with torch.no_grad():
        p = torch.exp(all_logprobs, out=logits)  # reuses the memory of the logits
        if logprobs.requires_grad:
            entropy = -(p * all_logprobs).sum(-1)
        else:
            entropy = -all_logprobs.mul_(p).sum(-1)  # in place: one copy less
    return logprobs, entropy, p


class FrozenHead(torch.autograd.Function):
    """token_logprobs for a head that is not trained. The gradient is computed in the forward pass,
    while the probabilities are in memory; computing the logits again would be a third product.
    d log p / d hidden = (head[target] - sum_w p_w head[w]) / T."""

    @staticmethod
    def forward(ctx, hidden, head, targets, temperature, chunk):
        logprobs, entropies, slopes = [], [], []
        for h, t in zip(hidden.split(chunk), targets.split(chunk)):
            logprob, entropy, p = chunk_logprobs(h, head, t, temperature)
            logprobs.append(logprob)
            entropies.append(entropy)
            if ctx.needs_input_grad[0]:
                # Subtract 1 before rounding to 16 bits: 1 - p of the target may be small.
                p.scatter_add_(1, t[:, None], p.new_full((len(t), 1), -1.0))
                slopes.append((p.to(head.dtype) @ head).div_(-temperature))
        if slopes:
            ctx.slope = torch.cat(slopes)
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx, grad, _):
        return (ctx.slope * grad[:, None]).to(ctx.slope.dtype), None, None, None, None
