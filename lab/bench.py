"""Measurements. Each compares two ways of doing the same work in one run, or our way with what the
device can do. It prints its figures (times in seconds), and at the end all figures and settings as
a line of JSON. `ratio` is the other side's time divided by ours.

    python -m lab.bench compare                              # generation, against transformers
    python -m lab.bench compare_grpo --rows=128 --limit=64   # a GRPO step, against TRL and PEFT
    python -m lab.bench decode --shape=qwen7b --rows=64      # a decode step, against the device
    python -m lab.bench train --shape=qwen7b --rows=16       # log-probs and gradient, likewise
    python -m lab.bench logprobs --shape=qwen0.5b            # in chunks, against all logits at once
    python -m lab.bench adapters                             # decoding with an adapter for each row
    python -m lab.bench svd --shape=qwen0.5b                 # top 2 triplets, against the full SVD
    python -m lab.bench load --shape=qwen0.5b                # a checkpoint, against its bytes
    python -m lab.bench tokenize --model=DIR --dataset=FILE  # against transformers
    python -m lab.bench grade --dataset=FILE                 # the checker, against math-verify

A model of some --shape has random weights, so nothing is downloaded. --model=DIR measures a real
checkpoint in its place.
"""

import ctypes
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import time
import zlib
from collections import Counter, deque
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Literal
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import grpo
import sample
import tinylora
from configurator import at_least, configure
from eval_math import as_problem, load_problems
from model import Transformer, load_config, load_model, load_tokenizer, save_model
from sample import Row, Sampler, generate, row_uniforms
from support import UserError, one_line_errors, svd
from support.answers import is_correct
from support.checkpoint import DTYPES
from support.device import peak_gb, pick_device
from support.fused import sampling_form
from support.packing import Packed, Rollout, completion_logprobs, micro_batches, token_logprobs

SHAPES = {  # vocabulary, hidden, intermediate, layers, heads, key heads, tied: as published
    "toy": (512, 128, 384, 3, 4, 2, True),
    "qwen0.5b": (151936, 896, 4864, 24, 14, 2, True),
    "qwen1.5b": (151936, 1536, 8960, 28, 12, 2, True),
    "qwen3b": (151936, 2048, 11008, 36, 16, 2, True),
    "qwen7b": (152064, 3584, 18944, 28, 28, 4, False),
    "llama1b": (128256, 2048, 8192, 16, 32, 8, True),
    "llama3b": (128256, 3072, 8192, 28, 24, 8, True),
    "llama8b": (128256, 4096, 14336, 32, 32, 8, False),
}


@dataclass
class Settings:
    shape: Literal[*SHAPES] = "toy"  # of a random model: a name in SHAPES
    model: str = ""  # directory of a checkpoint, instead of a random model
    rows: int = 512  # completions (adapters, compare, compare_grpo, decode, train)
    group: int = 8  # completions to a prompt (compare, compare_grpo, train)
    limit: int = 256  # most tokens of a completion; the mean is a quarter (compare, compare_grpo)
    slots: int = 512  # rows at a time, on both sides (compare)
    their_rows: int = 0  # rows that TRL takes in one pass; 0: all (compare_grpo)
    context: int = 512  # tokens before those decoded (decode); prompt and completion (train)
    tokens: int = 32  # decoded in a row (adapters); decode: twice as many, so this is their mean
    micro_batch_tokens: int = 4096  # in one forward and backward pass (train)
    size: int = 3584  # side of the matrix (svd); tokens (logprobs)
    dataset: str = "toy/train.jsonl"  # problems; grade also takes responses of eval_math.py
    repeats: int = 5  # of a measurement; the median counts
    compile: bool = False  # torch.compile for our decode step (compare, compare_grpo, decode)
    dtype: Literal["auto", *DTYPES] = "auto"  # of the model; auto: bfloat16 on a GPU
    device: str = "auto"  # auto, cpu, cuda ... (adapters, decode, train, logprobs, svd)


def flatten(figures, prefix=""):
    """{name: number} of figures; {outer/name: number} of figures inside them."""
    numbers = {}
    for key, value in figures.items():
        if isinstance(value, dict):
            numbers |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            numbers[prefix + key] = value
    return numbers


# ----------------------------------------------------------------------------- time, memory, turns

CPU = torch.device("cpu")


def timed(function, device=CPU):
    """Seconds of a call, with the work that it leaves to the device."""
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def seconds_of(function, repeats=1, device=CPU):
    """The median of several calls, after one to warm up."""
    function()
    return median(timed(function, device) for _ in range(repeats))


def resident(key):
    """Bytes of this process, as Linux counts them: VmRSS now, VmHWM at most since reset_peak."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))


def reset_peak():
    """Let VmHWM start again. Returns the bytes that are held now."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that glibc kept could be used again without being counted
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    return resident("VmRSS")


def peak_bytes(function, device=CPU):
    """The bytes that a call holds at most, beyond those that are held before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    before = reset_peak()
    function()
    return resident("VmHWM") - before


class Turn:
    """What a side of in_turn() waits for, and reports to."""

    def __init__(self, pipe):
        self.pipe, self.rounds = pipe, 0

    def begin(self):
        self.pipe.recv()
        if self.rounds <= 1:  # again after the first round, which loads and compiles
            self.before = reset_peak()
        self.began = time.perf_counter()

    def end(self, **parts):
        """Report the seconds since begin(), those of the parts, and the memory that was added."""
        seconds = time.perf_counter() - self.began
        peak_mb = (resident("VmHWM") - self.before) / 1e6
        self.pipe.send({"seconds": seconds} | parts | {"peak_mb": peak_mb})
        self.rounds += 1


def in_turn(sides, rounds, *arguments):
    """Call each side(turn, *arguments) in a fresh process, where it works `rounds` times between
    turn.begin() and turn.end(). They work in turn, so that noise of the machine meets both. Returns
    for each side its report with the median time, the first round left out, which warms up."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for side in sides:
        pipe, far_end = spawn.Pipe()
        process = spawn.Process(target=side, args=(Turn(far_end), *arguments), daemon=True)
        process.start()
        far_end.close()
        pipes.append(pipe)
        processes.append(process)
    reports = [[] for _ in sides]
    try:
        for _ in range(rounds):
            for pipe, reported in zip(pipes, reports):
                pipe.send("go")
                reported.append(pipe.recv())
    except (EOFError, OSError):
        raise UserError("a measured process ended early; what it printed above says why") from None
    finally:
        for pipe, process in zip(pipes, processes):
            pipe.close()
            process.join(timeout=20)  # one that still waits for its turn never ends
            process.kill()
    by_time = [sorted(reported[1:], key=lambda report: report["seconds"]) for reported in reports]
    return [reported[len(reported) // 2] for reported in by_time]


# ---------------------------------------------------------------- random models, adapters and rows

def dtype_for(cfg, device):
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES.get(cfg.dtype, auto)


def model_of(cfg, device=CPU):
    """The model cfg.model, or else one of cfg.shape with random weights, on the device."""
    if cfg.model:
        net = load_model(cfg.model, dtype_for(cfg, device), device)
        net.compile_decode = cfg.compile
        return net
    vocab, hidden, intermediate, layers, heads, key_heads, tied = SHAPES[cfg.shape]
    raw = {"model_type": "llama" if cfg.shape.startswith("llama") else "qwen2",
           "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": intermediate,
           "num_hidden_layers": layers, "num_attention_heads": heads,
           "num_key_value_heads": key_heads, "tie_word_embeddings": tied,
           "max_position_embeddings": 131072}
    with tempfile.TemporaryDirectory() as path:
        with open(os.path.join(path, "config.json"), "w") as f:
            json.dump(raw, f)
        config = load_config(path)
    with torch.device("meta"):
        net = Transformer(config).to(dtype_for(cfg, device))
    net = net.to_empty(device=device).requires_grad_(False).eval()
    torch.manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.02)
    net.compile_decode = cfg.compile
    return net


def add_random_adapter(net):
    """A TinyLoRA with random factors in the place of the SVD's, which takes long. u = 13."""
    def factors(weights, rank, device):
        return [(torch.randn(len(W), rank, device=device) * 1e-3,
                 torch.randn(rank, W.shape[1], device=device) * 1e-3) for W in weights.values()]

    with mock.patch.object(tinylora, "svd_factors", factors):
        adapter = tinylora.add_adapter(net)
    torch.nn.init.normal_(adapter.v, std=1e-3)
    return adapter


class NumberTokenizer:
    """Writes ids as decimal numbers. No id ends a completion."""

    stop_ids, bos_ids, template = frozenset(), [], None

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids, skip_special=False):
        return " ".join(map(str, ids))


NUMBERS = NumberTokenizer()


def random_prompts(vocab, count):
    """Prompts of 20 to 59 ids, none of them the first or the last of the vocabulary."""
    random = np.random.default_rng(0)
    return [random.integers(1, vocab - 1, n).tolist() for n in random.integers(20, 60, count)]


def random_lengths(cfg):
    """Lengths of cfg.rows completions: geometric with a mean of cfg.limit / 4, then cut off."""
    lengths = np.random.default_rng(0).geometric(min(1, 4 / cfg.limit), size=cfg.rows)
    return np.minimum(lengths, cfg.limit).tolist()


@contextmanager
def fixed_lengths(lengths, group):
    """While this is open, generate() samples completions of these lengths, `group` to a prompt: a
    row ends when its random numbers are used up."""
    def uniforms(seed, prompt, number, limit):
        length = lengths[(prompt * group + number) % len(lengths)]
        return row_uniforms(seed, prompt, number, length)

    with mock.patch.object(sample, "row_uniforms", uniforms):
        yield


# ------------------------------------------------------------ loading, tokenizing, grading, the SVD

def bench_load(cfg):
    """Load a float32 checkpoint, with the check that its numbers are finite. The other side only
    reads the bytes, which are in the page cache."""
    with tempfile.TemporaryDirectory() as path:
        save_model(model_of(cfg).float(), path)
        file = os.path.join(path, "model.safetensors")
        buffer = bytearray(2**24)

        def read():
            with open(file, "rb", buffering=0) as f:
                while f.readinto(buffer):
                    pass

        def load():
            load_model(path, "float32", "cpu")

        size = os.path.getsize(file)
        reading = seconds_of(read, cfg.repeats)
        loading = seconds_of(load, cfg.repeats)
        peak = peak_bytes(load)
    return {"gigabytes": size / 1e9, "read_seconds": reading, "load_seconds": loading,
            "peak_over_size": peak / size, "ratio": reading / loading}


def bench_tokenize(cfg):
    """Encode all questions: ours one by one, transformers' fast tokenizer in one call."""
    from transformers import AutoTokenizer

    texts = [problem["question"] for problem in load_problems(cfg.dataset)]
    path = cfg.model or "toy/base"
    loading = seconds_of(lambda: load_tokenizer(path), cfg.repeats)
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    ids = theirs(texts, add_special_tokens=False)["input_ids"]
    assert [ours.encode(text) for text in texts] == ids
    seconds = seconds_of(lambda: [ours.encode(text) for text in texts], cfg.repeats)
    their_seconds = seconds_of(lambda: theirs(texts, add_special_tokens=False), cfg.repeats)
    return {"texts": len(texts), "load_seconds": loading, "seconds": seconds,
            "theirs": their_seconds, "ratio": their_seconds / seconds}


def response_and_reference(place, row):
    """What to grade in a line of eval_math.py's responses; None for its settings. In a problem, the
    worked solution is graded."""
    if "settings" in row:
        return None
    if "response" in row:
        return row["response"], row.get("reference") or row["answer"]
    problem = as_problem(place, row)
    return problem["solution"], problem["answer"]


def bench_grade(cfg):
    """Extract and compare answers on one core. The verdicts of both are counted: where they differ,
    one of the two checkers is wrong."""
    from math_verify import parse, verify

    pairs = list(filter(None, load_problems(cfg.dataset, read_row=response_and_reference)))
    verdicts = []

    def grade_ours():
        verdicts.append([is_correct(*pair) for pair in pairs])

    def grade_theirs():
        verdicts.append([bool(verify(parse(rf"\boxed{{{reference}}}"), parse(response)))
                         for response, reference in pairs])

    seconds, their_seconds = timed(grade_ours), timed(grade_theirs)
    ours, theirs = verdicts
    counts = Counter(zip(ours, theirs))
    return {"pairs": len(pairs), "accepted": sum(ours), "theirs_accepted": sum(theirs),
            "accepted_by_ours_alone": counts[True, False],
            "accepted_by_theirs_alone": counts[False, True],
            "seconds": seconds, "theirs": their_seconds, "ratio": their_seconds / seconds}


def trained_like(m, n, spikes=32):
    """A Gaussian matrix [m, n] with singular values of 1.1 to 5 times its largest on top of it, as
    trained weights have them."""
    largest = m**0.5 + n**0.5
    factors = largest * (1 + 4 / torch.arange(1, spikes + 1))
    U = torch.randn(m, spikes) / m**0.5
    V = torch.randn(spikes, n) / n**0.5
    return 0.02 * (torch.randn(m, n) + (U * factors) @ V)


def compare_svd(W, repeats):
    """The top 2 triplets of a matrix against its full SVD in float32, whose own errors are part of
    the differences."""
    seconds = seconds_of(lambda: svd.top_svd(W, 2), repeats, W.device)
    full_seconds = timed(lambda: torch.linalg.svd(W), W.device)
    U, S, _ = svd.top_svd(W, 2)
    full_U, full_S, _ = torch.linalg.svd(W)
    top = full_U[:, :2]
    return {"seconds": seconds, "full_seconds": full_seconds, "ratio": full_seconds / seconds,
            "value_error": ((S - full_S[:2]) / full_S[:2]).abs().max().item(),
            "subspace_error": (U - top @ (top.T @ U)).norm(dim=0).max().item()}


def bench_svd(cfg):
    """The top 2 singular triplets of one matrix: of a trained or trained-like one, whose `ratio`
    counts, and of a Gaussian one, which takes more rounds because its singular values crowd at the
    edge. Then those of all linears of the model, computed and read from the cache."""
    device = pick_device(cfg.device)
    torch.manual_seed(0)
    linears = tinylora.all_linears(model_of(cfg, device))
    weights = {name: linear.weight for name, linear in linears.items()}
    if cfg.model:
        W = weights[list(weights)[-1]].float()  # the last block's down_proj
    else:
        W = trained_like(cfg.size, cfg.size).to(device)
        for random in weights.values():
            random.copy_(trained_like(*random.shape))
    trained = compare_svd(W, cfg.repeats)
    gaussian = compare_svd(torch.randn(cfg.size, cfg.size).to(device), cfg.repeats)

    def factors():
        svd.svd_factors(weights, 2, device)

    with tempfile.TemporaryDirectory() as cache, mock.patch.object(svd, "CACHE_FROM", 0), \
            mock.patch.dict(os.environ, TINYLORA_CACHE=cache):
        first = timed(factors, device)
        cached = seconds_of(factors, cfg.repeats, device)
    return {"trained": trained, "gaussian": gaussian, "linears": len(weights),
            "first_seconds": first, "cached_seconds": cached, "cache_ratio": first / cached,
            "ratio": trained["ratio"]}


# --------------------------------------------------------------- decoding, log-probs and gradients

def bench_adapters(cfg):
    """Tokens a second of generate(), with its set-up: without an adapter, with one for all rows,
    and with one for each row. `ratio` is the speed of the last over that of the second."""
    device = pick_device(cfg.device)
    net = model_of(cfg, device)
    prompts = random_prompts(net.config.vocab_size, cfg.rows)

    def speed(adapters=None):
        def once():
            generate(net, NUMBERS, prompts, max_new_tokens=cfg.tokens, adapters=adapters)

        return cfg.rows * cfg.tokens / seconds_of(once, cfg.repeats, device)

    off = speed()
    adapter = add_random_adapter(net)
    texts = []
    for _ in prompts:
        torch.nn.init.normal_(adapter.v, std=1e-3)
        texts.append(tinylora.adapter_text(adapter))
    shared, one_a_row = speed(), speed(texts)
    return {"off": off, "shared": shared, "one_a_row": one_a_row, "shared_over_off": shared / off,
            "ratio": one_a_row / shared}


def device_limits(device, dtype):
    """What the device can do, measured: bytes a second of a copy, where reading and writing both
    count, and operations a second of a matrix product in dtype."""
    size = 2**30 if device.type == "cuda" else 2**27
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    bandwidth = 2 * size / seconds_of(lambda: b.copy_(a), 5, device)
    n = 8192 if device.type == "cuda" else 2048
    x, y = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return bandwidth, 2 * n**3 / seconds_of(lambda: x @ y, 5, device)


def decode_step_seconds(net, cfg, R=None):
    """Seconds of a step that decodes a token for each of cfg.rows rows, which stand at cfg.context
    first and at cfg.context + 2 * cfg.tokens last. R [N, 1, r, r]: what every row takes as an
    adapter of its own, or None."""
    count = 2 * cfg.tokens
    prompt = torch.randint(0, net.config.vocab_size, (cfg.context,)).tolist()
    options = 1.0, 0, 1.0  # temperature, top_k, top_p
    times = []  # when the first row got each of its tokens

    def on_token(prompt, number, token):
        if number == 0:
            times.append(time.perf_counter())

    with torch.inference_mode(), sampling_form(net, per_row=R is not None):
        sampler = Sampler(net, cfg.rows, cfg.context + count, R)
        for _ in range(2):  # the first round records the CUDA graphs
            times.clear()
            rows = [Row(0, i, [*prompt], row_uniforms(0, 0, i, count)) for i in range(cfg.rows)]
            deque(sampler.run(rows, [prompt], options, NUMBERS.stop_ids, on_token), maxlen=0)
    return (times[-1] - times[0]) / (count - 1)


def bench_decode(cfg):
    """A decode step as a share of the limits of the device: the time to read the weights and all
    keys and values once, or to do the products, whichever is longer. Then the step with an adapter,
    and with one for each row (never compiled), over that without, and the first token of a row."""
    device = pick_device(cfg.device)
    bandwidth, rate = device_limits(device, dtype_for(cfg, device))
    net = model_of(cfg, device)
    dtype, config = net.dtype, net.config
    numbers = sum(p.numel() for p in net.model.layers.parameters()) + net.head.numel()
    entry = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    cached = cfg.rows * entry * (cfg.context + cfg.tokens)
    size = dtype.itemsize * (numbers + cached)
    limit = max(size / bandwidth, 2 * numbers * cfg.rows / rate)
    seconds = decode_step_seconds(net, cfg)
    prompt = torch.randint(0, config.vocab_size, (cfg.context,)).tolist()
    first = seconds_of(lambda: generate(net, NUMBERS, [prompt], max_new_tokens=1), 1, device)
    adapter = add_random_adapter(net)
    shared = decode_step_seconds(net, cfg)
    N, _, rank, _ = adapter.P.shape
    one_a_row = decode_step_seconds(net, cfg, torch.randn(N, 1, rank, rank, device=device) * 1e-3)
    return {"dtype": str(dtype), "device": str(device), "copy_gb_per_second": bandwidth / 1e9,
            "tflops_limit": rate / 1e12, "ms_a_step": seconds * 1e3,
            "tokens_per_second": cfg.rows / seconds, "gb_per_second": size / seconds / 1e9,
            "share_of_limit": limit / seconds, "adapter_ratio": shared / seconds,
            "adapter_a_row_ratio": one_a_row / seconds, "first_token_ms": first * 1e3,
            "peak_gb": peak_gb(device)}


def bench_train(cfg):
    """Log-probs of completions and the gradient of v, packed as in grpo.py, as a share of the
    measured matrix product. Four operations are counted for a parameter and token: two forward, and
    two backward to the activations, as the weights are frozen. Attention is not counted."""
    device = pick_device(cfg.device)
    _, rate = device_limits(device, dtype_for(cfg, device))
    net = model_of(cfg, device)
    adapter = add_random_adapter(net)
    half = max(1, cfg.context // 2)  # of the tokens are the prompt

    def random_ids():
        return torch.randint(0, net.config.vocab_size, (half,)).tolist()

    prompts = [random_ids() for _ in range(0, cfg.rows, cfg.group)]
    rollouts = [Rollout(prompts[i // cfg.group], random_ids()) for i in range(cfg.rows)]
    batches = list(micro_batches(rollouts, cfg.micro_batch_tokens))
    tokens = sum(Packed(batch, CPU).ids.numel() for batch in batches)

    def step():
        for batch in batches:
            logprobs, _, _ = completion_logprobs(net, batch)
            logprobs.sum().backward()

    seconds = seconds_of(step, cfg.repeats, device)
    assert adapter.v.grad.isfinite().all()
    numbers = sum(p.numel() for p in net.model.layers.parameters())
    work = 4 * numbers * tokens + 4 * net.head.numel() * cfg.rows * half  # logits of completions
    return {"dtype": str(net.dtype), "device": str(device), "tflops_limit": rate / 1e12,
            "passes": len(batches), "packed_tokens": tokens, "seconds": seconds,
            "tokens_per_second": tokens / seconds, "tflops": work / seconds / 1e12,
            "share_of_limit": work / seconds / rate, "peak_gb": peak_gb(device)}


def full_logprobs(hidden, head, targets, temperature):
    """What token_logprobs returns, from the logits of all tokens at once."""
    logits = F.linear(hidden, head).float().div_(temperature)  # [n, vocab]
    logprobs = torch.log_softmax(logits, dim=-1)
    with torch.no_grad():
        entropy = -logprobs.exp().mul_(logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), entropy


def bench_logprobs(cfg):
    """Log-probs, entropies and the gradient of the hidden states of cfg.size tokens: in chunks, and
    from all logits at once."""
    device = pick_device(cfg.device)
    head = model_of(cfg, device).head
    vocab, width = head.shape
    hidden = torch.randn(cfg.size, width).to(head).requires_grad_()
    targets = torch.randint(0, vocab, (cfg.size,)).to(device)

    def cost(function):
        def once():
            hidden.grad = None
            logprobs, _ = function(hidden, head, targets, 0.9)
            logprobs.sum().backward()

        once()  # allocates what the libraries keep
        peak = peak_bytes(once, device)
        return seconds_of(once, cfg.repeats, device), peak, hidden.grad.float().norm().item()

    seconds, peak, norm = cost(token_logprobs)
    full_seconds, full_peak, full_norm = cost(full_logprobs)
    assert abs(norm - full_norm) <= 1e-2 * full_norm
    return {"dtype": str(head.dtype), "device": str(device), "peak_mb": peak / 1e6,
            "full_peak_mb": full_peak / 1e6, "memory_ratio": full_peak / peak,
            "seconds": seconds, "full_seconds": full_seconds, "ratio": full_seconds / seconds}


# ---------------------------------------------------------------- generation, against transformers

def our_completions(turn, cfg, path, prompts, lengths):
    def fitting_rows(model, length, rows):
        return cfg.slots

    net = load_model(path, cfg.dtype, "cpu")
    net.compile_decode = cfg.compile
    with fixed_lengths(lengths, cfg.group), mock.patch.object(sample, "fitting_rows", fitting_rows):
        for _ in range(1 + cfg.repeats):
            turn.begin()
            groups = generate(net, NUMBERS, prompts, cfg.group, cfg.limit)
            turn.end()
            assert [len(c.ids) for group in groups for c in group] == lengths


def hf_completions(turn, cfg, path, prompts, lengths):
    """The same by transformers, in batches that last as long as their longest completion."""
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype_for(cfg, CPU))

    def complete(start):
        batch = [prompts[i // cfg.group] for i in range(start, start + cfg.slots)]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        ends = width + torch.tensor(lengths[start : start + cfg.slots])
        stop = transformers.StoppingCriteriaList([lambda ids, _, **__: ids.shape[1] >= ends])
        out = net.generate(ids, attention_mask=mask, max_new_tokens=cfg.limit, do_sample=True,
                           top_k=0, pad_token_id=0, eos_token_id=None, stopping_criteria=stop)
        assert out.shape[1] == ends.max()

    for _ in range(1 + cfg.repeats):
        turn.begin()
        for start in range(0, cfg.rows, cfg.slots):
            complete(start)
        turn.end()


def bench_compare(cfg):
    """Completions of given lengths by the same weights, on a CPU: ours, where a waiting row takes
    the place of one that has stopped, and transformers', batch after batch."""
    if cfg.rows % cfg.group or cfg.rows % cfg.slots:
        raise UserError(f"rows={cfg.rows} must be whole groups of {cfg.group} and whole batches of "
                        f"slots={cfg.slots}")
    net, lengths = model_of(cfg), random_lengths(cfg)
    prompts = random_prompts(net.config.vocab_size, cfg.rows // cfg.group)
    with tempfile.TemporaryDirectory() as path:
        save_model(net, path)
        ours, theirs = in_turn((our_completions, hf_completions), 1 + cfg.repeats, cfg, path,
                               prompts, lengths)
    return {"mean_length": sum(lengths) / cfg.rows,
            "tokens_per_second": sum(lengths) / ours["seconds"],
            "theirs": sum(lengths) / theirs["seconds"], "peak_mb": ours["peak_mb"],
            "their_peak_mb": theirs["peak_mb"], "ratio": theirs["seconds"] / ours["seconds"]}


# ----------------------------------------------------------------------- a GRPO step, against TRL's

def coin(text):
    """A reward of 0 or 1 for a text that says nothing: by its hash, the same on both sides."""
    return float(zlib.crc32(text.encode()) % 2)


def our_grpo_steps(turn, cfg, path, prompts, lengths):
    """Steps of grpo.train. Patches wait for the turn, keep the order of the prompts, and report."""
    def problems(settings, split):
        return [{"question": NUMBERS.decode(p)} for p in prompts] if split == "train" else []

    def reward(problem, completion):
        return coin(completion.text)

    def sample_batch(*arguments, original=grpo.sample_batch):
        turn.begin()
        rollouts, totals = original(*arguments)
        turn.generation = time.perf_counter() - turn.began
        assert totals["tokens"] == sum(lengths)
        return rollouts, totals

    def log(run, step, record):
        turn.end(generation=turn.generation)

    arguments = [f"--model={path}", f"--out_dir={path}/out", "--device=cpu", "--rank=2",
                 "--lr=1e-6", f"--max_steps={1 + cfg.repeats}", "--save_interval=0",
                 f"--batch_size={len(prompts)}", f"--group_size={cfg.group}",
                 f"--max_new_tokens={cfg.limit}", f"--compile={cfg.compile}"]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), \
            fixed_lengths(lengths, cfg.group), mock.patch.object(grpo.Run, "log", log), \
            mock.patch.multiple(grpo, sample_batch=sample_batch,
                                load_tokenizer=lambda path: NUMBERS,
                                epoch_order=lambda seed, epoch, count: range(count)):
        grpo.train(configure(grpo.Settings, reward, problems, argv=arguments))


def trl_model(path, prompts, lengths):
    """transformers' model, whose completions end where `lengths` say, and a tokenizer that writes
    ids as numbers. The last id of the vocabulary is the stop token."""
    import tokenizers
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    words = ["<pad>", *map(str, range(1, net.config.vocab_size - 1)), "<stop>"]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer,
                                                     eos_token="<stop>", pad_token="<pad>")
    ends = torch.tensor(lengths)
    width = max(map(len, prompts))
    own_stops = net.generation_config.eos_token_id or []  # of a real checkpoint

    def stop_at_length(ids, scores):
        scores[:, -1] = -torch.inf
        scores[:, own_stops] = -torch.inf
        is_last = ids.shape[1] - width + 1 == ends
        scores[is_last] = -torch.inf
        scores[is_last, -1] = 0.0
        return scores

    processors = transformers.LogitsProcessorList([stop_at_length])
    net.generate = partial(net.generate, logits_processor=processors)
    return net, tokenizer


def trl_grpo_steps(turn, cfg, path, prompts, lengths):
    """The same by TRL's GRPOTrainer and PEFT's TinyLoRA."""
    import peft
    import transformers
    import trl
    from datasets import Dataset

    class Trainer(trl.GRPOTrainer):
        def _generate(self, *arguments):
            began = time.perf_counter()
            result = super()._generate(*arguments)
            turn.generation = time.perf_counter() - began
            found = [len(ids) for ids in result[1]]
            assert found == lengths, f"lengths {found}, wanted {lengths}"
            return result

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            turn.begin()

        def on_step_end(self, *_, **__):
            turn.end(generation=turn.generation)

    def rewards(completions, **_):
        return [coin(text) for text in completions]

    def quick_svd(W, full_matrices):
        return svd.top_svd(W, 2)  # PEFT's full SVD would take minutes

    net, tokenizer = trl_model(path, prompts, lengths)
    micro_batch = cfg.their_rows or cfg.rows
    options = trl.GRPOConfig(
        f"{path}/trl", use_cpu=True, bf16=False, gradient_checkpointing=False, beta=0.0,
        loss_type="dapo", learning_rate=1e-6, max_grad_norm=1.0, max_steps=1 + cfg.repeats,
        num_generations=cfg.group, max_completion_length=cfg.limit, shuffle_dataset=False,
        per_device_train_batch_size=micro_batch, save_strategy="no", logging_strategy="no",
        gradient_accumulation_steps=cfg.rows // micro_batch, report_to="none", disable_tqdm=True)
    data = Dataset.from_list([{"prompt": NUMBERS.decode(prompt)} for prompt in prompts])
    lora = peft.TinyLoraConfig(r=2, u=13, weight_tying=1.0, target_modules="all-linear")
    with mock.patch.object(torch.linalg, "svd", quick_svd):
        trainer = Trainer(net, rewards, options, data, processing_class=tokenizer,
                          callbacks=[Clock()], peft_config=lora)
    trainer.remove_callback(transformers.PrinterCallback)
    assert sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) == 13
    trainer.train()


def bench_compare_grpo(cfg):
    """A GRPO step that trains 13 numbers, in float32 on a CPU, ours and TRL's: the same weights,
    prompts, lengths and rewards. Ours leaves out groups in which all completions earned the same,
    which are few with 8 in a group."""
    if cfg.group < 2 or cfg.rows % cfg.group or cfg.rows % (cfg.their_rows or cfg.rows):
        raise UserError(f"rows={cfg.rows} must be whole groups of at least 2 (group={cfg.group}) "
                        f"and whole micro-batches of their_rows={cfg.their_rows}")
    net, lengths = model_of(cfg).float(), random_lengths(cfg)
    prompts = random_prompts(net.config.vocab_size, cfg.rows // cfg.group)
    with tempfile.TemporaryDirectory() as path:
        save_model(net, path)
        ours, theirs = in_turn((our_grpo_steps, trl_grpo_steps), 1 + cfg.repeats, cfg, path,
                               prompts, lengths)
    return {"mean_length": sum(lengths) / cfg.rows, "ours": ours, "trl": theirs,
            "ratio": theirs["seconds"] / ours["seconds"]}


BENCHES = {"compare": bench_compare, "compare_grpo": bench_compare_grpo, "decode": bench_decode,
           "train": bench_train, "logprobs": bench_logprobs, "adapters": bench_adapters,
           "svd": bench_svd, "load": bench_load, "tokenize": bench_tokenize, "grade": bench_grade}
PEERS = {"compare": ["transformers"], "compare_grpo": ["transformers", "peft", "trl"],
         "tokenize": ["transformers"], "grade": ["math_verify"]}


def main():
    name, *argv = sys.argv[1:] or [""]
    cfg = configure(Settings, argv=sys.argv[1:] if name in ("-h", "--help") else argv)
    if name not in BENCHES:
        raise UserError(f"name a measurement: {', '.join(BENCHES)}")
    for package in PEERS.get(name, []):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{name} needs {package}: pip install -r requirements-dev.txt")
    at_least(cfg, 1, "rows", "group", "limit", "slots", "context", "tokens", "micro_batch_tokens",
             "size", "repeats")
    at_least(cfg, 0, "their_rows")
    figures = BENCHES[name](cfg)
    for key, number in flatten(figures).items():
        print(f"{key:28} {number:.4g}")
    settings = asdict(cfg) | {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"bench": name} | settings | figures))


if __name__ == "__main__":
    one_line_errors()
    main()
