"""Text generation with a KV cache: batched, ragged prompts, greedy or sampled, with the log-prob of every token.

    python sample.py --prompt="Tom has 3 apples. Tom finds 4 more. How many apples are there now?"
    python sample.py --model=Qwen/Qwen2.5-7B-Instruct --adapter=out/qwen7b_u13 --prompt="What is 17 * 23?"
    python sample.py --adapter=out/a,out/b,hex:3c23d70a    # several adapters side by side, in one batch
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import tinylora
from configurator import UserError, configure, run
from model import load_model, load_tokenizer

model = "toy/base"  # checkpoint directory or hub name
adapter = ""  # adapter file, the out_dir of a run, or text (hex:...); none if empty. Several: separated by commas
prompt = "Tom has 3 apples. Tom finds 4 more. Then the number doubles. How many apples are there now?"
system_prompt = ""  # system message of the chat; empty: what the chat template puts there, if anything
chat = True  # wrap the prompt in the checkpoint's chat template, if it has one
num_samples = 3  # completions to show
max_new_tokens = 256  # a completion is cut off after so many
temperature = 1.0  # 0: greedy
seed = 0  # of the sampling
dtype = "auto"  # auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16, float16
device = "auto"  # auto, cpu, cuda, cuda:1 ...


@dataclass
class Completion:
    ids: list  # sampled token ids, the stop token included
    logprobs: list  # log-prob of each of them under the distribution it was sampled from
    text: str  # decoded, without special tokens
    truncated: bool  # no stop token within the limit


class KVCache:
    """Keys and values of B rows, each at its own position: [layers, B, kv_heads, T, head_dim].

    Prompts are right-padded. A row's entries past its own length are never attended to: they are overwritten as the
    row grows.
    """

    def __init__(self, config, rows, length, like):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, length, config.head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)  # masked entries count 0 times: must be finite
        self.positions = None  # [B] where each row's next token stands; None while prompts are prefilled

    def attend(self, layer, q, k, v):
        """Store k, v [B, kv_heads, T, hd] and attend with q [B, heads, T, hd]: what model.Attention calls."""
        if self.positions is None:
            T = k.shape[2]
            self.k[layer, :, :, :T], self.v[layer, :, :, :T] = k, v
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        B, heads, _, hd = q.shape
        rows = torch.arange(B, device=q.device)
        self.k[layer, rows, :, self.positions] = k[:, :, 0]
        self.v[layer, rows, :, self.positions] = v[:, :, 0]
        keys, values = self.k[layer, :, :, : self.end], self.v[layer, :, :, : self.end]
        q = q.view(B, keys.shape[1], -1, hd)  # the heads that share a key head become its queries: no copy of k, v
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask).view(B, heads, 1, hd)

    def at(self, positions):
        """Set where the next token of every row stands."""
        self.positions = positions
        self.end = int(positions.max()) + 1
        self.mask = (torch.arange(self.end, device=positions.device) <= positions[:, None])[:, None, None]
        return self

    def select(self, rows):
        self.k, self.v = self.k[:, rows], self.v[:, rows]


def sample_tokens(logits, temperature, uniforms):
    """Draw one token a row by inverse CDF. logits [B, V], uniforms [B] in [0, 1) -> ids [B], logprobs [B].

    Temperature divides the logits here exactly as in the trainer. Greedy (temperature 0) reports log-probs at 1.
    """
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        ids = logprobs.argmax(-1)
    else:
        cdf = logprobs.exp().cumsum(-1)
        ids = torch.searchsorted(cdf, (uniforms[:, None] * cdf[:, -1:]), right=True).squeeze(1)
        ids = ids.clamp(max=logits.shape[1] - 1)  # NaN would point past the end; the trainer reports it
    return ids, logprobs.gather(1, ids[:, None]).squeeze(1)


def row_uniforms(seed, prompt_id, sample_id, count):
    """The uniforms of one row, one a position: they depend on (seed, prompt, sample), not on the batch it is in."""
    key = np.random.SeedSequence([seed, prompt_id, sample_id])
    return np.random.Generator(np.random.Philox(key)).random(count, dtype=np.float32)


@torch.inference_mode()
def generate(model, tokenizer, prompts, n=1, max_new_tokens=256, temperature=1.0, seed=0, prompt_ids=None,
             progress=None, adapters=None):
    """Sample n completions of every prompt.

    prompts: a list of token-id lists, or of strings (encoded as raw text, with the BOS the checkpoint asks for).
    prompt_ids: integers that name the prompts for the random numbers (default: their place in the list).
    progress: label of a progress bar, or None.
    adapters: one per prompt (files, out_dirs or texts of adapters over the same linears, "" for none): every row of
        the batch runs with its own vector on one set of weights (tinylora.load_adapters says which may be mixed).
    Returns a list (per prompt) of lists of n Completions. A prompt is prefilled once for its n rows. Raises UserError
    for an empty prompt or one that leaves no room in the model's context.
    """
    prompts = [tokenizer.bos_ids + tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
    context = model.config.max_position_embeddings
    if n < 1 or max_new_tokens < 1 or temperature < 0:
        raise UserError(f"n and max_new_tokens must be at least 1 and temperature 0 or more; got n={n}, "
                        f"max_new_tokens={max_new_tokens}, temperature={temperature}")
    for i, p in enumerate(prompts):
        if not 0 < len(p) < context:
            raise UserError(f"prompt {i} has {len(p)} tokens; the model's context holds 1 to {context - 1} of them")
    if adapters is not None and len(adapters) != len(prompts):
        raise UserError(f"adapters must be one per prompt: {len(adapters)} for {len(prompts)} prompts")
    R = tinylora.load_adapters(model, adapters) if adapters else None  # [N, prompts, r, r]
    prompt_ids = range(len(prompts)) if prompt_ids is None else prompt_ids
    wave = max(1, max_rows(model, max(map(len, prompts), default=0) + max_new_tokens) // n)
    bar = tqdm(total=len(prompts) * n, desc=progress, unit="row", leave=False, disable=None if progress else True)
    out = []
    try:
        for start in range(0, len(prompts), wave):  # as many prompts at a time as fit in memory
            part = slice(start, start + wave)
            out += _generate_wave(model, tokenizer, prompts[part], n, max_new_tokens, temperature, seed,
                                  prompt_ids[part], bar, None if R is None else R[:, part])
    finally:
        bar.close()
        _use_rows(model, None)
    return out


def _use_rows(model, R, rows=...):
    """Give each line of the batches to come its own R, those of `rows` in R [N, prompts, r, r]; None: back to v."""
    if hasattr(model, "adapter"):
        model.adapter.rows = None if R is None else R[:, rows]


def max_rows(model, length, limit=1024):
    """How many rows of this length the KV cache may hold: a third of the free memory (dropping rows copies it)."""
    c = model.config
    row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * length * model.head.element_size()
    return max(1, min(limit, free_memory(model.device) // 3 // row))


def free_memory(device):
    """Bytes that can still be allocated on the GPU, or on the host (where the system does not say: 4 GB)."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 * 10**9


def _generate_wave(model, tokenizer, prompts, n, max_new_tokens, temperature, seed, prompt_ids, bar,
                   R=None):
    """Sample the rows of one wave in lock step; rows that have stopped are dropped from the batch."""
    device, config = model.device, model.config
    rows = [(i, j) for i in range(len(prompts)) for j in range(n)]  # row r is sample j of prompt i
    uniforms = torch.from_numpy(np.stack([row_uniforms(seed, prompt_ids[i], j, max_new_tokens) for i, j in rows]))
    uniforms = uniforms.to(device)  # [B, max_new_tokens]
    lengths = torch.tensor([len(p) for p in prompts]).repeat_interleave(n).to(device)  # [B] tokens so far
    room = torch.tensor([config.max_position_embeddings - len(p) for p in prompts]).repeat_interleave(n)
    limits = room.clamp(max=max_new_tokens).to(device)
    hidden, cache = prefill(model, tokenizer, prompts, n, max_new_tokens, R=R)
    _use_rows(model, R, torch.arange(len(rows)) // n)
    stops = torch.tensor(sorted(tokenizer.stop_ids), device=device)
    alive = torch.arange(len(rows), device=device)  # which row each line of the batch is
    ids = torch.zeros(len(rows), max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(rows), max_new_tokens, device=device)
    counts = torch.zeros(len(rows), dtype=torch.long, device=device)
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)  # per line of the batch
    stopped = torch.zeros(len(rows), dtype=torch.bool, device=device)  # per row: ended with a stop token
    for t in range(max_new_tokens):
        token, logprob = sample_tokens(F.linear(hidden, model.head), temperature, uniforms[alive, t])
        live = alive[~done]
        ids[live, t], logprobs[live, t], counts[live] = token[~done], logprob[~done], t + 1
        at_stop = torch.isin(token, stops)
        stopped[live] = at_stop[~done]
        ended = ~done & (at_stop | (t + 1 >= limits[alive]))
        done |= ended
        bar.update(int(ended.sum()))
        keep = (~done).nonzero().squeeze(1)
        if len(keep) == 0:
            break
        if len(keep) <= 0.75 * len(alive):  # drop finished rows, not at each step: it copies the cache
            alive, token, done = alive[keep], token[keep], done[keep]
            cache.select(keep)
            _use_rows(model, R, alive // n)
        positions = (lengths[alive] + t).clamp(max=config.max_position_embeddings - 1)
        hidden = model.model(token[:, None], positions[:, None], cache.at(positions))[:, 0]  # [B, D]
    out = [[] for _ in prompts]
    results = zip(rows, ids.tolist(), logprobs.tolist(), counts.tolist(), stopped.tolist())
    for (i, _), row, logps, count, stop in results:
        text = tokenizer.decode(row[: count - stop], skip_special=True)
        out[i].append(Completion(row[:count], logps[:count], text, not stop))
    return out


def prefill(model, tokenizer, prompts, n, max_new_tokens, max_tokens=8192, R=None):
    """Run each prompt once and share its cache with its n rows. Returns the hidden state at each row's last prompt
    token [B, D] and the filled KVCache."""
    longest = max(map(len, prompts))
    cache = KVCache(model.config, len(prompts) * n, longest + max_new_tokens, model.head)
    hidden = []
    step = max(1, max_tokens // longest)  # prompts at a time, to bound the memory of the activations
    for start in range(0, len(prompts), step):
        part = prompts[start : start + step]
        padded = [p + [tokenizer.pad_id] * (longest - len(p)) for p in part]
        part_cache = KVCache(model.config, len(part), longest, model.head)
        _use_rows(model, R, slice(start, start + step))
        h = model.model(torch.tensor(padded, device=model.device), cache=part_cache)  # [P, T, D]
        hidden.append(h[torch.arange(len(part)), [len(p) - 1 for p in part]])
        rows = slice(start * n, (start + len(part)) * n)
        cache.k[:, rows, :, :longest] = part_cache.k.repeat_interleave(n, dim=1)
        cache.v[:, rows, :, :longest] = part_cache.v.repeat_interleave(n, dim=1)
    return torch.cat(hidden).repeat_interleave(n, dim=0), cache


def encode_prompt(tokenizer, text, system_prompt="", chat=True):
    """Ids of a user's text: in the chat template with an optional system message, or raw where there is none."""
    if not chat or tokenizer.template is None:
        return tokenizer.bos_ids + tokenizer.encode(text)
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return tokenizer.encode_chat([*system, {"role": "user", "content": text}])


def main():
    cfg = configure(globals())
    net, tokenizer = load_model(cfg.model, cfg.dtype, cfg.device), load_tokenizer(cfg.model)
    adapters = cfg.adapter.split(",")  # "" is the base model
    if adapters != [""] and len(adapters) == 1:
        tinylora.load_adapter(net, cfg.adapter)
    ids = encode_prompt(tokenizer, cfg.prompt, cfg.system_prompt, cfg.chat)
    # The same prompt_ids: every adapter draws the same random numbers, so differences are the adapters'.
    answers = generate(net, tokenizer, [ids] * len(adapters), cfg.num_samples, cfg.max_new_tokens, cfg.temperature,
                       cfg.seed, [0] * len(adapters), "sampling", adapters if len(adapters) > 1 else None)
    for name, completions in zip(adapters, answers):
        if len(adapters) > 1:
            print(f"=== {name or 'no adapter'}")
        for c in completions:
            print(f"{c.text}{' [cut off]' if c.truncated else ''}\n---")


if __name__ == "__main__":
    run(main)
