"""Text generation with a KV cache: many prompts at once, greedy or sampled, with log-probs.

    python sample.py --prompt="Tom has 3 apples. Tom finds 4 more. How many apples are there now?"
    python sample.py --prompt_file=questions.txt --temperature=0
    python sample.py --adapter=,out/a,out/b --n=3    # without and with adapters, in one batch
    python sample.py --model=Qwen/Qwen2.5-7B-Instruct --adapter=out/qwen7b_u13 --prompt=-   # a chat

Training and evaluation call generate(). KVCache holds keys and values; Sampler.run is the loop.
"""

import functools
import math
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from configurator import configure
from model import load_tokenizer
from support import UserError, foreign_file
from support.device import free_memory
from support.fused import sampling_form
from support.packing import attention
from support.parallel import Ranks, in_step, is_chief, print0
from tinylora import detach, load_adapted, load_adapters, mix_vectors

PREFILL_TOKENS = 8192  # prefilled at a time, which bounds the memory of the activations


@dataclass
class Settings:
    model: str = "toy/base"  # checkpoint directory or hub name
    adapter: str = ""  # file, out_dir of a run, or text (hex:...); several: separated by commas
    prompt: str = "Tom has 3 apples. Tom finds 4 more. How many apples are there now?"  # -: a chat
    prompt_file: str = ""  # a file with one prompt a line, instead of prompt
    system_prompt: str = ""  # system message; empty: the chat template's own, if it has one
    chat: bool = True  # wrap the prompt in the checkpoint's chat template, if it has one
    n: int = 1  # completions of every prompt
    max_new_tokens: int = 1024  # a completion is cut off after this many tokens
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # sample from the k likeliest tokens only; 0: from all
    top_p: float = 1.0  # sample from the likeliest tokens of this total probability; 1: from all
    seed: int = 0  # of the sampling
    shard: int = 1  # processes that hold one copy of the weights between them (support/parallel.py)
    compile: bool = False  # torch.compile for the decode step: pays for small models on a CPU
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...


@dataclass
class Completion:
    ids: list  # sampled token ids, the stop token included
    logprobs: list  # log-prob of each of them under the distribution it was sampled from
    text: str  # decoded, without special tokens
    truncated: bool  # there was no stop token within the limit


# ------------------------------------------------------------------------------------ the KV cache

class KVCache:
    """Keys and values [layers, rows, kv_heads, length, head_dim] of rows, each at its own position.
    What stands beyond a row's position is masked. The memory starts as zeros, because the weight 0
    of a masked NaN would still give NaN."""

    def __init__(self, config, rows, length, like):
        if like.is_cuda:
            length += -length % 128  # attention kernels take the keys in whole blocks
        self.length = length
        heads, head_dim = config.num_key_value_heads, config.head_dim
        self.keys = like.new_zeros(config.num_hidden_layers, rows, heads, length, head_dim)
        self.values = torch.zeros_like(self.keys)
        self.columns = torch.arange(length, device=like.device)
        self.layers = torch.arange(config.num_hidden_layers, device=like.device)[:, None]
        self.positions = None  # [B] of the tokens of rows 0 .. B-1 in this pass; None: of prompts

    def copy_row(self, row, source, line, T):
        """Make the first T tokens of a row those of a line of another cache, or of this one."""
        self.keys[:, row, :, :T] = source.keys[:, line, :, :T]
        self.values[:, row, :, :T] = source.values[:, line, :, :T]

    def advance(self, positions, columns):
        """In the next pass rows 0 .. B-1 have a token each, at `positions` [B], and attend to what
        stands up to there. columns: 0 .. end-1, with an end above all positions; a tensor, because
        compiled code would be made anew for every number."""
        self.positions, self.end = positions, len(columns)
        self.rows = torch.arange(len(positions), device=positions.device)
        masked = (columns > positions[:, None])[:, None, None]  # [B, 1, 1, end]
        self.mask = self.keys.new_zeros(masked.shape).masked_fill_(masked, -math.inf)

    def attend(self, layer, q, k, v):
        """Store k and v [B, kv_heads, T, hd], and attend with q [B, heads, T, hd] to what each row
        has so far: whole prompts padded on the right, or one token a row. For model.Attention."""
        B, heads, T, hd = q.shape
        if self.positions is None:
            self.keys[layer, :, :, :T] = k
            self.values[layer, :, :, :T] = v
            return attention(q, k, v)
        # Indices that are all tensors, since compiled code would copy the cache to write to a view.
        place = self.layers[layer], self.rows, slice(None), self.positions
        self.keys[place] = k[:, :, 0]
        self.values[place] = v[:, :, 0]
        keys = self.keys[layer, :B, :, : self.end]
        values = self.values[layer, :B, :, : self.end]
        # The heads that share a key head become its queries, so keys and values are not copied.
        q = q.view(B, keys.shape[1], -1, hd)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask)
        return y.reshape(B, heads, 1, hd)


# ---------------------------------------------------------------------------- sampling one token

def sample_tokens(logits, uniforms, temperature=1.0, top_k=0, top_p=1.0):
    """Draw one token a row by inverse CDF. logits [B, V], uniforms [B] in [0, 1) -> ids [B] and
    logprobs [B]. Temperature divides the logits exactly as in the trainer; greedy decoding
    (temperature 0) reports log-probs at temperature 1. top_k keeps the k likeliest tokens, and
    top_p of these the likeliest, up to a total probability of top_p or just above."""
    if temperature not in (0, 1):  # copies of [B, V] are a tenth of a step with a large vocabulary
        logits = logits.float() / temperature
    if temperature and (top_k or top_p < 1):
        logits = keep_likeliest(logits.float(), top_k, top_p)
    p = torch.softmax(logits, dim=-1, dtype=torch.float32)
    if temperature == 0:
        ids = p.argmax(-1, keepdim=True)
    else:
        cdf = p.cumsum(-1)
        # Scaled by the total, which rounding leaves a little off 1.
        ids = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)
        ids = ids.clamp(max=logits.shape[1] - 1)  # NaN would point beyond; the trainer reports it
    return ids.squeeze(1), p.gather(1, ids).log().squeeze(1)


def keep_likeliest(logits, top_k, top_p):
    """Logits with -inf for the tokens that top_k and top_p exclude (Holtzman et al. 2020)."""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        before = p.cumsum(-1) - p  # total probability of the likelier tokens
        excluded = (before >= top_p) & (before > 0)  # the likeliest always stays
        logits = logits.scatter(1, order, ordered.masked_fill(excluded, -math.inf))
    return logits


def row_uniforms(seed, prompt_id, sample_id, count):
    """The random numbers of one row, one for each token. They depend on seed, prompt and sample
    alone, so a row gets the same tokens in every batch, slot and process."""
    key = np.random.SeedSequence([seed, prompt_id, sample_id])
    return np.random.Generator(np.random.Philox(key)).random(count, dtype=np.float32)


# ------------------------------------------------------------------------------ the sampling loop

@dataclass
class Row:  # a completion that is being sampled
    prompt: int  # the place of its prompt in the list
    sample: int  # which of the n completions of that prompt
    ids: list  # the prompt and what has been sampled; the last one is the next input
    uniforms: np.ndarray  # a random number for each token that may be sampled
    logprobs: list = field(default_factory=list)  # of each token that has been sampled


def decode(model, cache, tokens, positions, columns):
    """The logits [B, V] that follow tokens [B] at `positions` [B]; columns: see KVCache.advance."""
    cache.advance(positions, columns)
    hidden = model.model(tokens[:, None], positions[:, None], cache)[:, 0]
    return model.logits(hidden)


compiled = functools.cache(torch.compile)  # a function is compiled once in a process


def compiled_decode(model, cache, *inputs):
    """decode() under torch.compile. One compiled step serves all sizes above 1."""
    for t in inputs:
        torch._dynamo.maybe_mark_dynamic(t, 0)
    for t in (cache.keys, cache.values):
        torch._dynamo.maybe_mark_dynamic(t, (1, 3))
    try:
        return compiled(decode)(model, cache, *inputs)
    except torch._dynamo.exc.ShortenTraceback as error:  # as without a C++ compiler or Triton
        reason = str(getattr(error, "inner_exception", error)).splitlines()[0]
        raise UserError(f"torch.compile failed ({reason}); use --compile=False") from None


class Sampler:
    """Samples rows, as many at a time as there are slots.

    self.rows[s] has slot s of the KV cache until it stops. Then the last row moves into the slot,
    and a waiting row starts behind the others, so short rows do not wait for long ones. A prompt is
    prefilled once for all of its rows. The first input of a row is the last token of its prompt.
    """

    def __init__(self, model, slots, length, R=None):
        """length: tokens of the longest row, its prompt included. R [N, prompts, r, r]: every
        prompt's own adapter (tinylora.load_adapters), or None."""
        self.model, self.slots, self.R = model, slots, R
        self.cache = KVCache(model.config, slots, length, like=model.head)
        # What a step reads: for each slot token, position and prompt, and a random number. A CUDA
        # graph needs them in the same memory every time.
        self.inputs = torch.zeros(3, slots, dtype=torch.long, device=model.device)
        self.uniforms = torch.zeros(slots, device=model.device)
        is_compiled = model.compile_decode and not model.is_sharded and R is None
        self.decode = compiled_decode if is_compiled else decode
        self.graphs = {}  # size and options of a step -> its CUDA graph, and its outputs
        self.on_gpu = model.device.type == "cuda"
        self.has_graphs = self.on_gpu and not model.is_sharded
        if self.has_graphs:
            self.graph_memory = torch.cuda.graph_pool_handle()
            # Graphs of two Samplers must not share a stream: with the graphs of one of them, cuBLAS
            # frees its memory for the stream, which the others read, too (pytorch issue 193402).
            self.stream = torch.cuda.Stream()

    def run(self, rows, prompts, options, stop_ids, on_token=None):
        """Sample rows that are in the order of their prompts, lists of token ids. Yields each of
        them when it stops. options: temperature, top_k, top_p. on_token(prompt, sample, id) is
        called for every token."""
        self.prompts, self.options = prompts, options
        self.rows = []
        prefilled = {}  # place of a prompt that rows still wait for -> a cache, a line in it
        waiting = iter(rows)
        while True:
            for row in islice(waiting, self.slots - len(self.rows)):
                if row.prompt not in prefilled:
                    prefilled = self.prefill(row.prompt)
                source, line = prefilled[row.prompt]
                self.cache.copy_row(len(self.rows), source, line, len(row.ids) - 1)
                self.rows.append(row)
            if not self.rows:
                return
            for row, token, logprob in zip(self.rows, *self.step()):
                row.ids.append(token)
                row.logprobs.append(logprob)
                if on_token:
                    on_token(row.prompt, row.sample, token)
            for slot in reversed(range(len(self.rows))):  # the last row, which may move, goes first
                row = self.rows[slot]
                if row.ids[-1] in stop_ids or len(row.logprobs) == len(row.uniforms):
                    last = self.rows.pop()
                    if last is not row:
                        self.cache.copy_row(slot, self.cache, len(self.rows), len(last.ids) - 1)
                        self.rows[slot] = last
                    yield row

    def prefill(self, first):
        """Compute the keys and values of prompt `first` and of some after it, in a single pass."""
        fits = self.slots * self.cache.length // 8  # tokens, for an eighth of the memory
        count = max(1, min(PREFILL_TOKENS, fits) // max(map(len, self.prompts)))
        chosen = [torch.tensor(prompt) for prompt in self.prompts[first : first + count]]
        ids = pad_sequence(chosen, batch_first=True).to(self.model.device)  # on the right, with 0
        cache = KVCache(self.model.config, *ids.shape, like=self.model.head)
        if self.R is not None:
            self.model.adapter.rows = self.R[:, first : first + count]  # [N, B, r, r]
        self.model.model(ids, cache=cache)
        return {first + line: (cache, line) for line in range(len(chosen))}

    def step(self):
        """Sample a token for every row. Returns their ids and log-probs, as lists."""
        B, end = len(self.rows), max(len(row.ids) for row in self.rows)
        inputs = [(row.ids[-1], len(row.ids) - 1, row.prompt) for row in self.rows]
        self.inputs[:, :B] = torch.tensor(inputs).T
        uniforms = [row.uniforms.item(len(row.logprobs)) for row in self.rows]
        self.uniforms[:B] = torch.tensor(uniforms)
        if self.on_gpu:
            B, end = self.padded(B, end)
        ids, logprobs = self.replay(B, end) if self.has_graphs else self.compute(B, end)
        return ids.tolist(), logprobs.tolist()

    def compute(self, B, end):
        """Ids [B] and log-probs [B] of slots 0 .. B-1, which stand before `end`. Nothing here waits
        for the device, so that a CUDA graph can record it."""
        tokens, positions, prompts = self.inputs[:, :B]
        if self.R is not None:
            self.model.adapter.rows = self.R[:, prompts]
        logits = self.decode(self.model, self.cache, tokens, positions, self.cache.columns[:end])
        return sample_tokens(logits, self.uniforms[:B], *self.options)

    def replay(self, B, end):
        """compute() as a CUDA graph, which launches all of its kernels at once."""
        key = B, end, self.options
        if key not in self.graphs:
            self.compute(B, end)  # initialises the libraries
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self.graph_memory, self.stream):  # computes nothing
                outputs = self.compute(B, end)
            self.graphs[key] = graph, outputs
        graph, outputs = self.graphs[key]
        graph.replay()
        return outputs

    def padded(self, B, end):
        """One of few sizes. Slots beyond the rows compute what nobody reads."""
        return min(self.slots, 2 ** math.ceil(math.log2(B))), end + -end % 128

    def record_all(self, rows, length, options):
        """Record the steps of up to `rows` rows of up to `length` tokens, the largest first, since
        the others then use its memory."""
        self.options = options
        sizes = {self.padded(B, end) for B in range(1, rows + 1)
                 for end in range(128, length + 128, 128)}
        for size in sorted(sizes, reverse=True):
            if (*size, options) not in self.graphs:
                self.replay(*size)


def generate(model, tokenizer, prompts, n=1, max_new_tokens=256, temperature=1.0, seed=0, top_k=0,
             top_p=1.0, prompt_ids=None, progress=None, adapters=None, on_done=None, on_token=None):
    """Sample n completions of every prompt. Returns a list of n Completions for each of them.

    prompts: lists of token ids, or strings (raw text, after the BOS token that the model expects).
    temperature, top_k, top_p: see sample_tokens. Training must leave top_k and top_p off (0, 1).
    prompt_ids: integers that stand for the prompts in row_uniforms (default: 0, 1, ...).
    progress: label of a progress bar, or None.
    adapters: K of them on one set of weights, each for the next 1/K of the prompts: files, out_dirs
        or texts, "" for none (tinylora.load_adapters says which can be mixed), or vectors in
        the place of v, as a tensor [K, groups, u] or a list of tensors.
    on_done(i, completions) is called when all completions of prompt i are complete, and
    on_token(i, j, id) for every token of completion j of prompt i.
    Where several processes hold the weights between them, all must call this, even without prompts.
    UserError: a prompt is empty or fills the context, or not even one row fits into the memory.
    """
    prompts = [encode_prompt(tokenizer, prompt, chat=False) if isinstance(prompt, str) else prompt
               for prompt in prompts]
    check_sampling(n, max_new_tokens, temperature, top_k, top_p, seed)
    prompt_ids = range(len(prompts)) if prompt_ids is None else prompt_ids
    context = model.config.max_position_embeddings
    limits = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise UserError(f"prompt {i} has {len(prompt)} tokens; the model's context holds 1 to "
                            f"{context - 1} of them")
    rows = (Row(i, j, [*prompts[i]], row_uniforms(seed, prompt_ids[i], j, limits[i]))
            for i in range(len(prompts)) for j in range(n))
    groups = [[None] * n for _ in prompts]
    bar = tqdm(total=len(prompts) * n, desc=progress, unit="row", leave=False,
               disable=None if progress and is_chief() else True)
    # Weights that were gathered in inference mode could not be trained later.
    mode = torch.no_grad() if model.is_sharded else torch.inference_mode()
    with mode, bar, in_step(model), own_adapters(model, prompts, adapters) as R:
        if not prompts:
            return groups
        length = max(len(prompt) + limit for prompt, limit in zip(prompts, limits))
        length = max(length, model.longest)
        slots = len(prompts) * n
        if model.sampler:  # not two Samplers in turn: one that is large enough for either
            length = max(length, model.sampler.cache.length)
            slots = max(slots, model.sampler.slots)
        slots = fitting_rows(model, length, slots)
        with nullcontext() if model.is_sharded else sampling_form(model, R is not None) as fused:
            sampler = ready_sampler(model, fused, slots, length, R)
            options = temperature, top_k, top_p
            if model.longest and sampler.has_graphs:
                sampler.record_all(min(slots, len(prompts) * n), length, options)
            for row in sampler.run(rows, prompts, options, tokenizer.stop_ids, on_token):
                ids = row.ids[-len(row.logprobs) :]
                stopped = ids[-1] in tokenizer.stop_ids
                text = tokenizer.decode(ids[:-1] if stopped else ids, skip_special=True)
                groups[row.prompt][row.sample] = Completion(ids, row.logprobs, text, not stopped)
                bar.update()
                if on_done and None not in groups[row.prompt]:
                    on_done(row.prompt, groups[row.prompt])
        sampler.model = None  # so that a kept Sampler is freed together with the model
    return groups


def ready_sampler(model, linears, slots, length, R):
    """A Sampler of this size. On a GPU it is the one of an earlier call, with its CUDA graphs, if
    that is large enough and all that the graphs read (linears: FusedLinears) lies where it lay."""
    if model.device.type != "cuda" or model.is_sharded:
        return Sampler(model, slots, length, R)
    tensors = list(model.parameters())
    for linear in linears:
        tensors += [t for t in vars(linear).values() if isinstance(t, torch.Tensor)]
    memory = [(t.data_ptr(), t.shape) for t in tensors]
    memory += [None if R is None else R.shape, model.compile_decode]
    kept = model.sampler
    if kept and kept.memory == memory and kept.slots >= slots and kept.cache.length >= length:
        kept.model = model
        kept.cache.keys.zero_()  # a NaN would outlive the adapter that made it
        kept.cache.values.zero_()
        if R is not None:
            kept.R.copy_(R)
        return kept
    model.sampler = kept = None  # frees its memory before more is taken
    model.sampler = Sampler(model, slots, length, R)
    model.sampler.memory = memory
    return model.sampler


def check_sampling(n, max_new_tokens, temperature, top_k, top_p, seed):
    if n < 1 or max_new_tokens < 1:
        raise UserError("n and max_new_tokens must be at least 1")
    if temperature != 0 and not 1e-6 <= temperature < math.inf:  # below, logits overflow
        raise UserError("temperature must be 0 (greedy) or at least 1e-6")
    if top_k < 0 or seed < 0 or not 0 < top_p <= 1:
        raise UserError("top_k and seed must not be negative, and top_p must be in (0, 1]")


@contextmanager
def own_adapters(model, prompts, adapters):
    """R [N, prompts, r, r], or None without adapters. In the end the model is as it was before."""
    had_adapter = model.adapter
    R = None
    if adapters is not None and len(adapters):
        each, rest = divmod(len(prompts), len(adapters))
        if model.is_sharded or rest:
            raise UserError("adapters must be one per prompt or group of prompts, with shard = 1")
        load = mix_vectors if isinstance(adapters[0], torch.Tensor) else load_adapters
        R = load(model, adapters).repeat_interleave(each, dim=1)
    try:
        yield R
    finally:
        if model.adapter and not had_adapter:
            detach(model)


def fitting_rows(model, length, rows):
    """How many of `rows` rows of `length` tokens to sample at a time: as many as half of the free
    memory holds, and at most 512. Raises UserError where that is not even one."""
    c = model.config
    token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.dtype.itemsize
    logits = 16 * c.vocab_size  # bytes, with their copies in float32
    free = free_memory(model.device)
    if model.sampler:
        free += 2 * model.sampler.cache.keys.nbytes  # to be used again, or freed
    budget = free / 2  # on a GPU the cache is kept, and training needs memory, too
    row = token * length + logits
    if row > budget:
        most = max(0, int((budget - logits) / token))
        raise UserError(f"a row of {length} tokens takes {row / 1e9:.2f} GB of memory, and at most "
                        f"{most} tokens fit into {budget / 1e9:.2f} GB; lower max_new_tokens")
    return min(rows, 512, int(budget / row))


# ------------------------------------------------------------------------------------- the script

def encode_prompt(tokenizer, text, system_prompt="", chat=True):
    """Token ids of a user's message in the chat template, after a system message if there is one;
    of the raw text with chat = False, or where the checkpoint has no template."""
    if not chat or tokenizer.template is None:
        return tokenizer.bos_ids + tokenizer.encode(text)
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return tokenizer.encode_chat([*system, {"role": "user", "content": text}])


def converse(net, tokenizer, system_prompt, options):
    """A chat in the terminal, until an empty line or the end of the input."""
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    while True:
        print("> ", end="", flush=True)
        text = sys.stdin.readline().strip()  # empty at the end of the input
        if not text:
            return print()
        messages.append({"role": "user", "content": text})
        answer = reply(net, tokenizer, messages, options)
        messages.append({"role": "assistant", "content": answer})


def reply(net, tokenizer, messages, options):
    """Print the next turn of a chat while it is sampled, and return its text. Ctrl-C ends it."""
    ids, text = [], ""

    def on_token(i, j, token):
        nonlocal text
        ids.append(token)
        printed = len(text)
        # A character of several tokens is U+FFFD until the last of them.
        text = tokenizer.decode(ids, skip_special=True).rstrip("\ufffd")
        print(text[printed:], end="", flush=True)

    began = time.time()
    with suppress(KeyboardInterrupt):
        generate(net, tokenizer, [tokenizer.encode_chat(messages)], prompt_ids=[len(messages)],
                 on_token=on_token, **options)
    print(f"\n[{len(ids)} tokens, {len(ids) / (time.time() - began):.1f} a second]")
    return text


def answer(net, tokenizer, cfg, ranks, texts, adapters, options):
    """Print the completions of every text by every adapter."""
    mine = [(i, name) for i in ranks.mine(range(len(texts))) for name in adapters]
    prompts = [encode_prompt(tokenizer, texts[i], cfg.system_prompt, cfg.chat) for i, _ in mine]
    began = time.time()
    # Every adapter gets the same random numbers for a text, so differences are the adapters'.
    groups = generate(net, tokenizer, prompts, cfg.n, prompt_ids=[i for i, _ in mine],
                      adapters=[name for _, name in mine] if len(adapters) > 1 else None,
                      progress="sampling", **options)
    groups = ranks.gather(list(zip(mine, groups)))
    for (i, name), completions in groups:
        print0(f"### {texts[i]}")
        if len(adapters) > 1:
            print0(f"=== {name or 'no adapter'}")
        for c in completions:
            print0(f"{c.text}{' [cut off]' if c.truncated else ''}\n---")
    tokens = sum(len(c.ids) for _, completions in groups for c in completions)
    print0(f"{tokens} tokens, {tokens / (time.time() - began):.1f} a second")


def main():
    cfg = configure(Settings)
    names = "max_new_tokens", "temperature", "seed", "top_k", "top_p"
    options = {name: getattr(cfg, name) for name in names}
    check_sampling(cfg.n, **options)
    adapters = [name.strip() for name in cfg.adapter.split(",")]  # "" is the base model
    texts = [cfg.prompt]
    if cfg.prompt_file:
        with foreign_file(cfg.prompt_file), open(cfg.prompt_file, encoding="utf-8-sig") as f:
            texts = [line.strip() for line in f if line.strip()]
    is_chat = texts == ["-"]
    ranks = Ranks(cfg.device, cfg.shard)
    if is_chat and (len(adapters) > 1 or cfg.n > 1):
        raise UserError("a chat (prompt=-) takes one adapter and n = 1")
    if (is_chat or len(adapters) > 1) and ranks.dp_size > 1:
        raise UserError("a chat (prompt=-) and several adapters take a single process, no torchrun")
    tokenizer = load_tokenizer(cfg.model)
    if (is_chat or cfg.system_prompt) and not (cfg.chat and tokenizer.template):
        raise UserError("a chat (prompt=-) and a system_prompt need a chat template: leave out "
                        f"--chat=False, or choose another model than {cfg.model}")
    adapter = adapters[0] if len(adapters) == 1 else ""
    net = load_adapted(cfg.model, adapter, cfg.dtype, ranks.device, cfg.shard)
    net.compile_decode = cfg.compile
    if is_chat:
        converse(net, tokenizer, cfg.system_prompt, options)
    else:
        answer(net, tokenizer, cfg, ranks, texts, adapters, options)
    ranks.leave()


if __name__ == "__main__":
    main()
