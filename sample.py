"""Text generation with a KV cache: batched, ragged prompts, greedy or sampled, with the log-prob of every token.

    python sample.py --prompt="Tom has 3 apples. Tom finds 4 more. How many apples are there now?"
    python sample.py --model=Qwen/Qwen2.5-7B-Instruct --adapter=out/qwen7b_u13 --prompt=-    # a talk in the terminal
    python sample.py --adapter=,out/a,out/b --n=3    # without and with adapters, several samples, in one batch
    python sample.py --prompt_file=questions.txt --temperature=0
"""

import math
import os
import sys
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import tinylora
from configurator import configure
from model import load_tokenizer
from support import UserError
from support.device import free_memory
from support.fused import few_rows_linear, sampling_form
from support.packing import attention
from support.parallel import Ranks, in_step, is_chief


@dataclass
class Settings:
    model: str = "toy/base"  # checkpoint directory or hub name
    adapter: str = ""  # adapter file, the out_dir of a run, or text (hex:...); none if empty. Several: separated by commas
    prompt: str = "Tom has 3 apples. Tom finds 4 more. Then the number doubles. How many apples are there now?"  # -: a talk
    prompt_file: str = ""  # a file with a prompt a line, instead of prompt
    system_prompt: str = ""  # system message of the chat; empty: what the chat template puts there, if anything
    chat: bool = True  # wrap the prompt in the checkpoint's chat template, if it has one
    n: int = 1  # completions of every prompt; a single one is printed as it is written
    max_new_tokens: int = 1024  # a completion is cut off after so many
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # sample from the k likeliest tokens only; 0: from all
    top_p: float = 1.0  # sample from the likeliest tokens of this total probability only; 1: from all
    seed: int = 0  # of the sampling
    shard: int = 1  # processes of torchrun that hold one copy of the weights between them: for models beyond one GPU
    compile: bool = False  # torch.compile for the decode step: for small models on a CPU; on a GPU not measured
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16, float16
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...


@dataclass
class Completion:
    ids: list  # sampled token ids, the stop token included
    logprobs: list  # log-prob of each of them under the distribution it was sampled from
    text: str  # decoded, without special tokens
    truncated: bool  # no stop token within the limit


class KVCache:
    """Keys and values of `rows` rows, each at its own position.

    Prompts are right-padded. A row's entries past its own position are masked, and overwritten as the row grows. They
    must be finite, as even a weight of 0 times NaN is NaN: clear() sets them to 0 before rows reach them, so memory
    that no row grows into is never touched.
    """

    def __init__(self, config, rows, length, like):
        self.layers, self.heads = config.num_hidden_layers, config.num_key_value_heads
        shape = self.layers, rows, self.heads
        self.flat = [like.new_empty(math.prod(shape) * length, config.head_dim) for _ in "kv"]
        starts = torch.arange(math.prod(shape), device=like.device).view(shape) * length
        self.starts = starts.transpose(0, 1).contiguous()  # [rows, layers, kv_heads] first lines in self.flat
        self.columns = torch.arange(length, device=like.device)
        self.cleared = 0  # positions before this one hold finite numbers
        self.positions = None  # [B] where each row's next token stands; None while prompts are prefilled

    @property
    def entries(self):
        """Keys and values, each [layers, rows, kv_heads, length, head_dim]."""
        length, hd = len(self.columns), self.flat[0].shape[1]
        return [entries.view(self.layers, -1, self.heads, length, hd) for entries in self.flat]

    def at(self, positions, starts, columns):
        """Rows 0 .. B-1 store their next token at `positions` [B] and attend to those up to there. starts, columns: the
        first B and the first few of self.starts and self.columns, which the positions of all rows in use are among."""
        self.positions, self.end = positions, len(columns)
        self.places = (starts + positions[:, None, None]).transpose(0, 1).flatten(1)  # [layers, B * kv_heads]
        mask = self.flat[0].new_zeros(len(positions), 1, 1, self.end)
        self.mask = mask.masked_fill_((columns > positions[:, None])[:, None, None], -math.inf)
        return self

    def clear(self, end):
        if end > self.cleared:
            for entries in self.entries:
                entries[:, :, :, self.cleared : end + 64] = 0
            self.cleared = end + 64

    def attend(self, layer, q, k, v):
        """Store k, v [B, kv_heads, T, hd] and attend with q [B, heads, T, hd]: what model.Attention calls."""
        if self.positions is None:
            T = k.shape[2]
            for entries, new in zip(self.entries, (k, v)):
                entries[layer, :, :, :T] = new
            return attention(q, k, v)
        B, heads, _, hd = q.shape
        for entries, new in zip(self.flat, (k, v)):
            entries.index_copy_(0, self.places[layer], new.reshape(-1, hd))
        keys, values = (entries[layer, :B, :, : self.end] for entries in self.entries)
        q = q.view(B, keys.shape[1], -1, hd)  # the heads that share a key head become its queries: no copy of k, v
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask)
        return y.reshape(B, heads, 1, hd)  # no view: some kernels put the queries before the heads in memory


def sample_tokens(logits, uniforms, temperature=1.0, top_k=0, top_p=1.0):
    """Draw one token a row by inverse CDF. logits [B, V], uniforms [B] in [0, 1) -> ids [B], logprobs [B].

    Temperature divides the logits here exactly as in the trainer. Greedy (temperature 0) reports log-probs at 1.
    top_k keeps the k likeliest tokens; top_p, of these, the likeliest up to a total probability of top_p or just over.
    """
    logits = logits.float() / (temperature or 1.0)
    if temperature and (top_k or top_p < 1):
        logits = keep_likeliest(logits, top_k, top_p)
    p = torch.softmax(logits, dim=-1)
    if temperature == 0:
        ids = p.argmax(-1, keepdim=True)
    else:
        cdf = p.cumsum(-1)
        ids = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)
        ids = ids.clamp(max=logits.shape[1] - 1)  # NaN would point past the end; the trainer reports it
    return ids.squeeze(1), p.gather(1, ids).log().squeeze(1)


def keep_likeliest(logits, top_k, top_p):
    """Logits with -inf for the tokens that top_k and top_p leave out (Holtzman et al. 2020)."""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        enough = max(top_p, 1e-30)  # not what float32 rounds to 0: the likeliest always stays
        ordered = ordered.masked_fill(p.cumsum(-1) - p >= enough, -math.inf)  # of those before it
        logits = logits.scatter(1, order, ordered)
    return logits


def row_uniforms(seed, prompt_id, sample_id, count):
    """The uniforms of one row, one a position: they depend on (seed, prompt, sample), not on the batch it is in."""
    key = np.random.SeedSequence([seed, prompt_id, sample_id])
    return np.random.Generator(np.random.Philox(key)).random(count, dtype=np.float32)


def decode(model, cache, ids, positions, starts, columns):
    """Logits [B, V] after ids [B, 1], which stand at `positions` [B]; starts, columns: see KVCache.at. What is compiled
    of a step, unless ranks talk to each other in it or rows have adapters of their own."""
    hidden = model.model(ids, positions[:, None], cache.at(positions, starts, columns))[:, 0]
    return few_rows_linear(hidden, model.head)


def mark_sizes(*tensors):
    """Have compiled code serve all sizes above 1 of their first dimension."""
    for t in tensors:
        torch._dynamo.maybe_mark_dynamic(t, 0)


class Sampler:
    """Rows in `slots`: a row starts in a slot, with its prompt's keys and values, and decodes until it stops; then the
    next row takes the slot over. So short rows never wait for long ones, and every step is over as many rows as there
    are slots. When no row waits any more, the last row in use moves into the free slot, and the steps get smaller.

    A row begins with the last token of its prompt as its first input: the decode step is all there is, and what was
    prefilled of a prompt (the rest) is shared by its group.
    """

    def __init__(self, model, tokenizer, slots, length, max_new_tokens, draw, R=None):
        """length: positions of the longest row. draw(logits [B, V], uniforms [B]) -> ids [B], logprobs [B].
        R [N, prompts, r, r]: of each prompt's own adapter (tinylora.load_adapters); None: all run with the model's."""
        self.model, self.tokenizer, self.draw, self.R = model, tokenizer, draw, R
        device = model.device
        if device.type == "cuda":
            length += -length % 128  # attention's kernels take keys in whole blocks
        self.cache = KVCache(model.config, slots, length, model.head)
        self.stops = torch.tensor(sorted(tokenizer.stop_ids), device=device, dtype=torch.long)
        integers = dict(dtype=torch.long, device=device)
        columns = max_new_tokens + 1  # the last is where a row that has stopped writes, see step
        self.state = SimpleNamespace(  # a line a slot
            prompt=torch.zeros(slots, **integers),  # which of the prompts it answers
            token=torch.zeros(slots, **integers),  # the next input
            position=torch.zeros(slots, **integers),  # where it stands
            count=torch.zeros(slots, **integers),  # tokens sampled so far
            limit=torch.zeros(slots, **integers),  # at most so many
            done=torch.ones(slots, dtype=torch.bool, device=device),
            uniforms=torch.zeros(slots, columns, device=device),
            ids=torch.zeros(slots, columns, **integers),
            logprobs=torch.zeros(slots, columns, device=device))
        self.slots, self.length = slots, length
        self.compiled = model.compile_decode and not model.is_sharded and R is None
        self.decode = torch.compile(decode) if self.compiled else decode
        if self.compiled:
            mark_sizes(self.cache.columns, *self.cache.flat)
        self.rows = []  # what occupies slots 0 .. len(rows) - 1: (prompt, sample), or None for a row that has stopped
        self.reached = []  # the position of each, known without asking the device (of stopped rows, too high)
        self.prefilled = {}  # prompt: its keys and values [layers, kv_heads, T - 1, hd], until its last row is placed
        self.graphs = {}  # (B, end): the decode step as a CUDA graph
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None  # memory that all graphs share

    def step(self, B, end):
        """One token for the slots 0 .. B-1, whose rows in use stand before `end`. Nothing here waits for the device: it
        can be captured as a graph. A row that has stopped goes on sampling, into a column that nobody reads, until the
        host notices."""
        s = self.state
        position, count = s.position[:B], s.count[:B]
        self.use_adapters_of(s.prompt[:B])
        inputs = s.token[:B, None], position, self.cache.starts[:B], self.cache.columns[:end]
        if self.compiled:
            mark_sizes(*inputs)
        logits = self.decode(self.model, self.cache, *inputs)  # [B, V]
        at = count[:, None]
        token, logprob = self.draw(logits, s.uniforms[:B].gather(1, at).squeeze(1))
        s.ids[:B].scatter_(1, at, token[:, None])
        s.logprobs[:B].scatter_(1, at, logprob[:, None])
        going = ~s.done[:B]
        count += going
        position += going
        s.done[:B] |= (token[:, None] == self.stops).any(1) | (count >= s.limit[:B])
        s.token[:B] = token

    def run(self, prompts, n, limits, uniforms, finished, on_token=None):
        """Sample n rows of every prompt (a list of ids), row j of prompt i at most limits(i, j) tokens with the random
        numbers uniforms(i, j) [max_new_tokens].
        finished(i, j, ids, logprobs) is called as they stop, on_token(i, j, id) at every token."""
        steps = 4 if self.pool and not on_token else 1  # to look at what has stopped makes a GPU wait
        waiting = deque((i, j) for i in range(len(prompts)) for j in range(n))
        while self.fill(waiting, prompts, n, limits, uniforms):
            for _ in range(steps):
                self.advance()
            if on_token:
                for (i, j), token in zip(self.rows, self.state.token.tolist()):
                    on_token(i, j, token)
            self.retire(finished)

    def use_adapters_of(self, prompts):
        """Every line of the next forward pass runs with the adapter of its prompt."""
        if self.R is not None:
            self.model.adapter.rows = self.R[:, prompts]  # [N, B, r, r]

    def fill(self, waiting, prompts, n, limits, uniforms):
        """Put waiting rows into free slots; with none left, close the gaps. Returns the number of rows in use."""
        self.rows += [None] * min(len(waiting), self.slots - len(self.rows))
        self.reached += [0] * (len(self.rows) - len(self.reached))
        free = [slot for slot, row in enumerate(self.rows) if row is None]
        new = [(slot, *waiting.popleft()) for slot in free[: len(waiting)]]
        for slot, i, j in new:
            if i not in self.prefilled:
                self.prefill(range(i, len(prompts)), prompts, n)
            k, v = self.prefilled[i]
            self.cache.clear(k.shape[2])
            for entries, of_prompt in zip(self.cache.entries, (k, v)):
                entries[:, slot, :, : k.shape[2]] = of_prompt
            self.rows[slot], self.reached[slot] = (i, j), k.shape[2]
            if j == n - 1:
                del self.prefilled[i]
        if new:
            s, device = self.state, self.model.device
            at = torch.tensor([slot for slot, _, _ in new], device=device)
            columns = torch.tensor([[i, prompts[i][-1], len(prompts[i]) - 1, 0, limits(i, j)] for _, i, j in new])
            s.prompt[at], s.token[at], s.position[at], s.count[at], s.limit[at] = columns.to(device).T
            s.done[at] = False
            s.uniforms[at, :-1] = torch.from_numpy(np.stack([uniforms(i, j) for _, i, j in new])).to(device)
        self.close_gaps(free[len(new) :])
        return len(self.rows)

    def close_gaps(self, free):
        """Move the last rows in use into the slots that are free."""
        size = len(self.rows) - len(free)
        gaps = [slot for slot in free if slot < size]
        last = [slot for slot in range(size, len(self.rows)) if self.rows[slot]]
        for gap, slot in zip(gaps, last):
            self.rows[gap], self.reached[gap] = self.rows[slot], self.reached[slot]
            for entries in self.cache.entries:
                entries[:, gap, :, : self.reached[slot]] = entries[:, slot, :, : self.reached[slot]]
        if gaps:
            to, source = torch.tensor([gaps, last], device=self.model.device)
            for lines in vars(self.state).values():
                lines.index_copy_(0, to, lines[source])
            self.state.done[source] = True
        del self.rows[size:], self.reached[size:]

    def prefill(self, upcoming, prompts, n, max_tokens=8192):
        """Run the next prompts that wait, without their last tokens, as many as the slots may soon need."""
        chosen, longest = [], 0
        for i in upcoming:
            longer = max(longest, len(prompts[i]) - 1)
            if chosen and (len(chosen) > self.slots // n or (len(chosen) + 1) * longer > max_tokens):
                break  # max_tokens bounds the memory of the activations
            chosen, longest = [*chosen, i], longer
        cache = KVCache(self.model.config, len(chosen), max(longest, 1), self.model.head)
        if longest:
            padded = [prompts[i][:-1] + [self.tokenizer.pad_id] * (longest - len(prompts[i]) + 1) for i in chosen]
            self.use_adapters_of(torch.tensor(chosen))
            self.model.model(torch.tensor(padded, device=self.model.device), cache=cache)
        for line, i in enumerate(chosen):
            T = len(prompts[i]) - 1
            self.prefilled[i] = [entries[:, line, :, :T] for entries in cache.entries]

    def advance(self):
        """One step for the rows in use; on a GPU a recorded graph, which launches all its kernels at once."""
        B, end = len(self.rows), min(self.length, max(self.reached) + 1)
        self.reached = [position + 1 for position in self.reached]
        if self.compiled:  # a size of 1 would be compiled apart
            B, end = max(B, min(2, self.slots)), max(end, 2)
        if not self.pool:
            self.cache.clear(end)
            return self.step(B, end)
        # A graph serves one shape: round both up, to few shapes. The slots beyond the rows in use compute nothing new.
        B = min(self.slots, next(b for b in (1, 2, 4, 8, 16, 32, 64, 128, 256, self.slots) if b >= B))
        end = min(self.length, -(-end // 128) * 128)
        self.cache.clear(end)
        if (B, end) in self.graphs:
            return self.graphs[B, end].replay()
        self.step(B, end)  # the first of its shape runs as it is, and readies the libraries
        self.graphs[B, end] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graphs[B, end], pool=self.pool):  # records, and computes nothing
            self.step(B, end)

    def retire(self, finished):
        """Hand over the rows that have stopped and free their slots."""
        done = [slot for slot, stopped in enumerate(self.state.done[: len(self.rows)].tolist()) if stopped]
        if not done:
            return
        counts = self.state.count[done].tolist()
        ids, logprobs = (t[done, : max(counts)].tolist() for t in (self.state.ids, self.state.logprobs))
        for slot, count, row_ids, row_logprobs in zip(done, counts, ids, logprobs):
            (i, j), self.rows[slot] = self.rows[slot], None
            finished(i, j, row_ids[:count], row_logprobs[:count])


@torch.no_grad()
def generate(model, tokenizer, prompts, n=1, max_new_tokens=256, temperature=1.0, seed=0, top_k=0, top_p=1.0,
             prompt_ids=None, progress=None, adapters=None, on_done=None, on_token=None):
    """Sample n completions of every prompt.

    prompts: a list of token-id lists, or of strings (encoded as raw text, with the BOS the checkpoint asks for).
    temperature: 0 is greedy. top_k (0: off), top_p (1: off): sample from the likeliest tokens only. Not for training.
    prompt_ids: integers that name the prompts for the random numbers (default: their place in the list).
    adapters: one per prompt (files, out_dirs or texts of adapters over the same linears, "" for none): every row of
        the batch runs with its own vector on one set of weights (tinylora.load_adapters says which may be mixed).
    progress: label of a progress bar, or None. Of several ranks one shows it.
    on_done(i, completions) is called when all n rows of prompt i are done, on_token(i, j, id) for every token of row j.
    Returns a list (per prompt) of lists of n Completions. A prompt is prefilled once for its n rows. Raises UserError
    for an empty prompt, one that leaves no room in the model's context, and too little memory for a single row.
    """
    prompts = [tokenizer.bos_ids + tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
    context = model.config.max_position_embeddings
    check_sampling(n, max_new_tokens, temperature, top_k, top_p, seed)
    for i, p in enumerate(prompts):
        if not 0 < len(p) < context:
            raise UserError(f"prompt {i} has {len(p)} tokens; the model's context holds 1 to {context - 1} of them")
    if adapters is not None and len(adapters) != len(prompts):
        raise UserError(f"adapters must be one per prompt: {len(adapters)} for {len(prompts)} prompts")
    if not prompts:
        with in_step(model):
            return []
    plain = not model.adapter
    if True:  # what is attached may be trained later
        R = tinylora.load_adapters(model, adapters) if adapters else None  # [N, prompts, r, r]
    prompt_ids = range(len(prompts)) if prompt_ids is None else prompt_ids
    max_new_tokens = min(max_new_tokens, context - min(map(len, prompts)))  # nothing is sized for more than there is
    length = max(min(len(p) + max_new_tokens, context) for p in prompts)
    draw = partial(sample_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    out = [[None] * n for _ in prompts]
    bar = tqdm(total=len(prompts) * n, desc=progress, unit="row", leave=False,
               disable=None if progress and is_chief() else True)

    def finished(i, j, ids, logprobs):
        stopped = ids[-1] in tokenizer.stop_ids
        text = tokenizer.decode(ids[: len(ids) - stopped], skip_special=True)
        out[i][j] = Completion(ids, logprobs, text, not stopped)
        bar.update()
        if on_done and None not in out[i]:
            on_done(i, out[i])

    def uniforms(i, j):
        return row_uniforms(seed, prompt_ids[i], j, max_new_tokens)

    try:
        slots = fitting_rows(model, length, len(prompts) * n)
        sampler = Sampler(model, tokenizer, slots, length, max_new_tokens, draw, R)
        with bar, sampling_form(model, per_row=R is not None), in_step(model):
            sampler.run(prompts, n, lambda i, _: min(max_new_tokens, context - len(prompts[i])), uniforms, finished,
                        on_token)
    finally:
        if R is not None and plain:
            tinylora.detach(model)
    return out


def check_sampling(n, max_new_tokens, temperature, top_k, top_p, seed):
    possible = temperature == 0 or 1e-6 <= temperature < math.inf  # below, logits overflow
    if n < 1 or max_new_tokens < 1 or not possible or min(top_k, seed) < 0 or not 0 < top_p <= 1:
        raise UserError("n and max_new_tokens must be at least 1; temperature 0, or from 1e-6 on; top_k and seed 0 or "
                        f"more; top_p in (0, 1]; got n={n}, max_new_tokens={max_new_tokens}, "
                        f"temperature={temperature}, top_k={top_k}, seed={seed}, top_p={top_p}")


def check_template(cfg, tokenizer):
    if cfg.system_prompt and tokenizer.template is None:
        raise UserError(f"{cfg.model} has no chat template, where a system_prompt could stand")


def fitting_rows(model, length, rows):
    """How many of `rows` rows of `length` tokens to sample at a time: what 60 % of the free memory holds, at most 512.
    UserError where not even one fits."""
    c = model.config
    entry = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.head.element_size()  # bytes a token
    extra = 16 * c.vocab_size  # logits and their copies in fp32
    row = entry * length + extra
    budget = 0.6 * free_memory(model.device)
    if budget < row:
        raise UserError(f"a row of {length} tokens needs {row / 1e9:.2f} GB for keys and values, "
                        f"and {budget / 1e9:.2f} GB can be used: at most {max(0, int((budget - extra) / entry))} "
                        "tokens; lower max_new_tokens")
    return min(rows, 512, int(budget // row))


def encode_prompt(tokenizer, text, system_prompt="", chat=True):
    """Ids of a user's text: in the chat template with an optional system message, or raw where there is none."""
    if not chat or tokenizer.template is None:
        return tokenizer.bos_ids + tokenizer.encode(text)
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return tokenizer.encode_chat([*system, {"role": "user", "content": text}])


class Printer:
    """Prints a completion as it grows. A character of several tokens appears when it is whole."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], 0

    def __call__(self, i, j, token):
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special=True).rstrip("\ufffd")
        print(text[self.shown :], end="", flush=True)
        self.shown = max(self.shown, len(text))


def converse(net, tokenizer, cfg):
    """Turns in the terminal, until an empty line or the end of the input. Ctrl-C ends an answer, not the talk."""
    if tokenizer.template is None:
        raise UserError(f"{cfg.model} has no chat template to talk in; give it a --prompt to go on with")
    messages = [{"role": "system", "content": cfg.system_prompt}] if cfg.system_prompt else []
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, RuntimeError):  # the latter where stdin is closed
            text = ""
        except UnicodeDecodeError as error:
            raise UserError(f"the terminal's text is not {error.encoding}: set PYTHONUTF8=1") from None
        if not text:
            return print()
        messages.append({"role": "user", "content": text})
        printer, began = Printer(tokenizer), time.time()
        try:
            generate(net, tokenizer, [tokenizer.encode_chat(messages)], 1, cfg.max_new_tokens, cfg.temperature,
                     cfg.seed, cfg.top_k, cfg.top_p, prompt_ids=[len(messages)], on_token=printer)
        except KeyboardInterrupt:
            pass
        seconds = time.time() - began
        print(f"\n[{len(printer.ids)} tokens, {len(printer.ids) / seconds:.1f} a second]")
        messages.append({"role": "assistant", "content": tokenizer.decode(printer.ids, skip_special=True)})


def main():
    cfg = configure(Settings)
    adapters = [name.strip() for name in cfg.adapter.split(",")]  # "" is the base model
    if cfg.prompt == "-" and (len(adapters) > 1 or cfg.n > 1 or cfg.prompt_file or cfg.shard > 1):
        raise UserError("a talk (prompt=-) takes one adapter, n=1, no prompt_file and no shard")
    if not cfg.chat and (cfg.prompt == "-" or cfg.system_prompt):
        raise UserError("a talk (prompt=-) and a system_prompt need the chat template: leave out --chat=False")
    check_sampling(cfg.n, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, cfg.seed)
    if cfg.shard > 1 and len(adapters) > 1:
        raise UserError("several adapters in one batch need shard = 1: give them one after another")
    texts = [cfg.prompt]
    if cfg.prompt_file:
        try:
            with open(cfg.prompt_file, encoding="utf-8-sig") as f:
                texts = [line.strip() for line in f if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompt_file cannot be read: {error}") from None
        if not texts:
            raise UserError(f"prompt_file {cfg.prompt_file} holds no prompt")
    ranks = Ranks(cfg.device, cfg.shard)
    net = tinylora.load_adapted(cfg.model, adapters[0] if len(adapters) == 1 else "", cfg.dtype, ranks.device, cfg.shard)
    tokenizer = load_tokenizer(cfg.model)
    check_template(cfg, tokenizer)
    net.compile_decode = cfg.compile
    if not is_chief():
        sys.stdout = open(os.devnull, "w")  # all ranks have the same to say
    if cfg.prompt == "-":
        return converse(net, tokenizer, cfg)
    asked = [(p, name) for p in range(len(texts)) for name in adapters]
    prompts = [encode_prompt(tokenizer, text, cfg.system_prompt, cfg.chat) for text in texts]
    single, began = len(asked) * cfg.n == 1, time.time()
    # prompt_ids: every adapter draws the same random numbers, so differences are the adapters'.
    answers = generate(net, tokenizer, [prompts[p] for p, _ in asked], cfg.n, cfg.max_new_tokens, cfg.temperature,
                       cfg.seed, cfg.top_k, cfg.top_p, [p for p, _ in asked], None if single else "sampling",
                       adapters=[name for _, name in asked] if len(adapters) > 1 else None,
                       on_token=Printer(tokenizer) if single else None)
    seconds = time.time() - began
    for (p, name), completions in zip(asked, answers):
        if len(texts) > 1 and name == adapters[0]:
            print(f"### {texts[p]}")
        if len(adapters) > 1:
            print(f"=== {name or 'no adapter'}")
        for c in completions:
            print(f"{'' if single else c.text}{' [cut off]' if c.truncated else ''}\n---")
    tokens = sum(len(c.ids) for completions in answers for c in completions)
    print(f"{tokens} tokens, {tokens / seconds:.1f} a second")
    ranks.leave()


if __name__ == "__main__":
    main()
