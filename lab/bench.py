"""Measurements, as ratios taken side by side in one run.

    python -m lab.bench load                                   # a random checkpoint against reading its bytes
    python -m lab.bench tokenize --model=DIR --dataset=FILE    # our tokenizer against transformers' batch call
    python -m lab.bench grade --dataset=FILE                   # our answer checker against math-verify
    python -m lab.bench svd --shape=qwen0.5b                   # top 2 singular triplets against the full SVD; the cache
    python -m lab.bench adapters                               # decoding: no adapter, one for all rows, one a row
    python -m lab.bench compare --shape=toy                    # generate, ours against transformers'
    python -m lab.bench compare_grpo --shape=toy --rows=128 --limit=64    # a GRPO step, ours against TRL's and PEFT's
    python -m lab.bench logprobs --shape=qwen0.5b              # their memory, in chunks against all logits at once
    python -m lab.bench decode --shape=qwen7b --rows=64 --context=512     # as a share of what the device can do
    python -m lab.bench train --shape=qwen7b --rows=16 --context=512

Each ends with one line of JSON; where there is another, `ratio` is its time over ours. A --shape has random weights:
no download.
"""

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from statistics import median_high
from types import SimpleNamespace
from unittest import mock

from configurator import UserError, configure, run  # isort: skip (first: it says what is missing)

import numpy as np
import torch
import torch.nn.functional as F

import eval_math
import grpo
import model as model_file
import sample
import tinylora

model = "toy/base"  # tokenize, adapters: checkpoint directory; adapters takes "" for random weights of the 0.5B shape
dataset = "toy/train.jsonl"  # tokenize, grade: problems; grade also takes responses as eval_math.py writes them
layers = 32  # load, adapters: of the Qwen2.5-0.5B shape (it has 24); 32 make about 2 GB in float32
size = 3584  # svd: side of the matrix; logprobs: tokens
rows = 512  # adapters, compare, compare_grpo, decode, train: in all
tokens = 32  # adapters: decoded a row; decode: twice as many, so that a row stands at context + tokens on average
repeats = 5  # of a measurement; the median counts
shape = "toy"  # compare, compare_grpo, logprobs, decode, train, svd: a name in SHAPES
context = 512  # decode, train: tokens before the decoded ones; tokens in a trained row
group = 8  # compare, compare_grpo: rows that share a prompt
slots = 512  # compare: rows at a time, ours and theirs
their_rows = 0  # compare_grpo: rows that TRL takes in one forward and backward pass; 0: all; try which is quickest
limit = 256  # compare, compare_grpo: most tokens a row; their number is geometric with a quarter of it as its mean
compile = False  # compare, compare_grpo, decode, train: ours through torch.compile
dtype = "auto"  # where a shape is: auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16, float16
device = "auto"  # logprobs, decode, train, svd: auto, cpu, cuda, cuda:1 ...

SHAPES = {  # vocabulary, hidden, intermediate, layers, heads, key-value heads, tied; as published
    "toy": (512, 128, 384, 3, 4, 2, True),
    "qwen0.5b": (151936, 896, 4864, 24, 14, 2, True),
    "qwen1.5b": (151936, 1536, 8960, 28, 12, 2, True),
    "qwen3b": (151936, 2048, 11008, 36, 16, 2, True),
    "qwen7b": (152064, 3584, 18944, 28, 28, 4, False),
    "llama1b": (128256, 2048, 8192, 16, 32, 8, True),
    "llama3b": (128256, 3072, 8192, 28, 24, 8, True),
    "llama8b": (128256, 4096, 14336, 32, 32, 8, False),
}


def median_seconds(function, device=None, repeats=None):
    """Median seconds of a call, the device's work included."""
    seconds = []
    for _ in range(repeats or SETTINGS.repeats):
        began = time.perf_counter()
        function()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return median_high(seconds)


def seconds_of(function, device, repeats=None):
    """The same after a call to warm up."""
    function()
    wait(device)
    return median_seconds(function, device, repeats)


def wait(device):
    if device and device.type == "cuda":
        torch.cuda.synchronize(device)


def config_of(raw):
    """The Config of what a config.json would hold."""
    with tempfile.TemporaryDirectory() as path:
        with open(os.path.join(path, "config.json"), "w") as f:
            json.dump(raw, f)
        return model_file.load_config(path)


def random_model():
    """A model of the Qwen2.5-0.5B shape with a small vocabulary and random weights."""
    raw = {"model_type": "qwen2", "vocab_size": 8192, "hidden_size": 896, "intermediate_size": 4864,
           "num_hidden_layers": SETTINGS.layers, "num_attention_heads": 14, "num_key_value_heads": 2}
    net = model_file.Transformer(config_of(raw))
    model_file.init_weights(net, seed=0)
    return net.requires_grad_(False)


LOAD_IN_A_PROCESS = """
import sys, time, torch, model
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before, began = peak(), time.perf_counter()
net = model.load_model(sys.argv[1], dtype="float32", device="cpu")
print(time.perf_counter() - began, peak() - before)
"""


def bench_load():
    """Load a random float32 checkpoint, finiteness check included, against reading its bytes from the page cache."""
    with tempfile.TemporaryDirectory() as path:
        net = random_model()
        model_file.save_model(net, path)
        file = os.path.join(path, "model.safetensors")
        size = os.path.getsize(file)
        del net
        buffer = bytearray(1 << 24)

        def read():
            with open(file, "rb", buffering=0) as f:
                while f.readinto(buffer):
                    pass

        reading = median_seconds(read)
        loads = []
        for _ in range(SETTINGS.repeats):  # each in its own process, for its peak memory
            command = [sys.executable, "-c", LOAD_IN_A_PROCESS, path]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            loads.append([float(x) for x in out.split()])
        seconds, peak = median_high(loads)
    print(f"reading {size / 1e9:.2f} GB: {reading:.2f} s; loading: {seconds:.2f} s; peak memory {peak / 1e9:.2f} GB")
    return {"gigabytes": size / 1e9, "read_seconds": reading, "load_seconds": seconds, "ratio": reading / seconds,
            "peak_over_size": peak / size}


def bench_tokenize():
    """All questions one by one with ours, in one batch call with transformers' fast tokenizer."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError("tokenize compares with transformers: pip install -r requirements-dev.txt") from None
    texts = [p["question"] for p in eval_math.load_problems(SETTINGS.dataset)]
    loading = median_seconds(lambda: model_file.load_tokenizer(SETTINGS.model))
    ours, reference = model_file.load_tokenizer(SETTINGS.model), AutoTokenizer.from_pretrained(SETTINGS.model)
    assert [ours.encode(t) for t in texts] == reference(texts, add_special_tokens=False)["input_ids"]
    seconds = median_seconds(lambda: [ours.encode(t) for t in texts])
    theirs = median_seconds(lambda: reference(texts, add_special_tokens=False))
    print(f"{len(texts)} texts: {seconds:.3f} s, transformers {theirs:.3f} s; loading the tokenizer {loading:.2f} s")
    return {"texts": len(texts), "seconds": seconds, "theirs": theirs, "ratio": theirs / seconds,
            "load_seconds": loading}


def bench_grade():
    """Extract and compare, ours and math-verify's, on one core. Of problems without responses the solutions are graded.
    Both verdicts go into the result: where they differ, somebody is wrong."""
    try:
        import math_verify
    except ImportError:
        raise UserError("grade compares with math-verify: pip install -r requirements-dev.txt") from None
    def pair(place, row):
        if "response" in row:
            return row["response"], row.get("reference") or row["answer"]
        problem = eval_math.as_problem(place, row)
        return problem["solution"], problem["answer"]

    rows = eval_math.load_problems(SETTINGS.dataset, read_row=lambda place, row: (place, row))
    pairs = [pair(place, row) for place, row in rows if "settings" not in row]

    def theirs(response, reference):
        return bool(math_verify.verify(math_verify.parse(rf"\boxed{{{reference}}}"), math_verify.parse(response)))

    verdicts = {}

    def ours():
        eval_math._value.cache_clear()  # of the repeat before
        verdicts["ours"] = [eval_math.is_correct(*pair) for pair in pairs]

    seconds = median_seconds(ours)
    began = time.perf_counter()
    verdicts["theirs"] = [theirs(*pair) for pair in pairs]  # once: it is slow
    their_seconds = time.perf_counter() - began
    counts = Counter(zip(verdicts["ours"], verdicts["theirs"]))
    print(f"{len(pairs)} pairs: {seconds:.2f} s, math-verify {their_seconds:.2f} s; both right {counts[True, True]}, "
          f"ours alone {counts[True, False]}, math-verify alone {counts[False, True]}")
    return {"pairs": len(pairs), "seconds": seconds, "theirs": their_seconds, "ratio": their_seconds / seconds,
            "accepted": sum(verdicts["ours"]), "theirs_accepted": sum(verdicts["theirs"])}


def trained_like(m, n, spikes=32):
    """A Gaussian matrix with singular values of 1.1 to 5 times its largest on top, as trained weights have them."""
    bulk = m**0.5 + n**0.5
    U, V = torch.randn(m, spikes) / m**0.5, torch.randn(spikes, n) / n**0.5
    return 0.02 * (torch.randn(m, n) + (U * bulk * (1 + 4 / torch.arange(1, spikes + 1))) @ V)


def bench_svd():
    """The top 2 singular triplets of one matrix, trained-like and Gaussian, against the full SVD in float32; then those
    of all linears of a trained-like model of --shape, without and with the cache. `ratio` is the full SVD's time over
    ours for the trained-like matrix; a Gaussian one, whose values crowd at the edge, takes more rounds. Errors are
    differences from the full SVD, its own included."""
    device = model_file.pick_device(SETTINGS.device)
    torch.manual_seed(0)
    n, out = SETTINGS.size, {}
    for name, W in (("trained_like", trained_like(n, n)), ("gaussian", torch.randn(n, n))):
        W = W.to(device)
        seconds = median_seconds(lambda W=W: tinylora.top_svd(W, 2), device)
        U, S, Vt = tinylora.top_svd(W, 2)
        began = time.perf_counter()
        U0, S0, Vt0 = torch.linalg.svd(W)
        wait(device)
        full = time.perf_counter() - began
        error = ((S - S0[:2]) / S0[:2]).abs().max().item()
        angle = (U - U0[:, :2] @ (U0[:, :2].T @ U)).norm(dim=0).max().item()
        print(f"{n} x {n}, {name}: {seconds:.2f} s, full {full:.1f} s: {full / seconds:.0f} times; relative error "
              f"of the values {error:.1e}, of the subspace {angle:.1e}")
        out |= {name: {"seconds": seconds, "full_seconds": full, "ratio": full / seconds, "value_error": error,
                       "subspace_error": angle}}
    weights = {name: linear.weight for name, linear in tinylora.adapted_linears(shaped_model(device)).items()}
    with torch.device(device):
        for W in weights.values():
            W.copy_(trained_like(*W.shape))
    starts = []
    with tempfile.TemporaryDirectory() as path, mock.patch.object(tinylora, "CACHE_FROM", 0):
        os.environ["TINYLORA_CACHE"] = path
        for _ in range(1 + SETTINGS.repeats):
            began = time.perf_counter()
            tinylora.svd_factors(weights, 2)
            wait(device)
            starts.append(time.perf_counter() - began)
    first, second = starts[0], median_high(starts[1:])
    print(f"{len(weights)} linears of {SETTINGS.shape}: {first:.2f} s, from the cache {second:.2f} s")
    return {**out, "linears": len(weights), "first_seconds": first, "cached_seconds": second,
            "cache_ratio": first / second, "ratio": out["trained_like"]["ratio"]}


def bench_adapters():
    """Tokens a second of generate, prefill and set-up included: without adapter, with one for all rows, and with one of
    its own for every row. `ratio` is the speed of the last over that of one for all."""
    tokenizer = model_file.load_tokenizer("toy/base")
    net = model_file.load_model(SETTINGS.model, "float32", "cpu") if SETTINGS.model else random_model()
    prompts = [tokenizer.encode(p["question"]) for p in eval_math.load_problems("toy/train.jsonl")[: SETTINGS.rows]]
    os.environ["TINYLORA_CACHE"] = os.path.join(tempfile.gettempdir(), "tinylora-bench")

    def speed(**options):
        def once():
            out = sample.generate(net, tokenizer, prompts, max_new_tokens=SETTINGS.tokens, **options)
            return sum(len(c.ids) for [c] in out)

        return once() / median_seconds(once)

    off = speed()
    adapter, texts = tinylora.add_adapter(net), []
    for v in torch.randn(len(prompts), *adapter.v.shape, generator=torch.Generator().manual_seed(0)) * 1e-3:
        with torch.no_grad():
            adapter.v.copy_(v)
        texts.append(tinylora.adapter_text(adapter))
    one = speed()
    each = speed(adapters=texts)
    print(f"{len(prompts)} rows, tokens a second: {off:.0f} without adapter, {one:.0f} with one for all, {each:.0f} "
          "with one a row")
    name = SETTINGS.model or f"random 0.5B shape, {SETTINGS.layers} layers"
    return {"model": name, "rows": len(prompts), "tokens": SETTINGS.tokens, "off": off, "shared": one,
            "one_a_row": each, "ratio": each / one, "shared_over_off": one / off}


# --- the speed of generation and training -----------------------------------------------------------------------------

NO_TEXT = SimpleNamespace(stop_ids=set(), pad_id=0, bos_ids=[], decode=lambda *_, **__: "")  # a tokenizer's place


def shaped_model(device):
    """A model of SETTINGS.shape with random weights, made on the device."""
    if SETTINGS.shape not in SHAPES:
        raise UserError(f"shape must be one of {', '.join(SHAPES)}")
    vocab, hidden, intermediate, layers, heads, kv_heads, tied = SHAPES[SETTINGS.shape]
    raw = {"model_type": "llama" if SETTINGS.shape.startswith("llama") else "qwen2", "vocab_size": vocab,
           "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
           "num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    dtypes = tinylora.DTYPES | {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32}
    with torch.device("meta"):
        net = model_file.Transformer(config_of(raw)).to(dtypes[SETTINGS.dtype])
    net = net.to_empty(device=device).requires_grad_(False).eval()
    torch.manual_seed(0)
    for name, p in net.named_parameters():
        torch.nn.init.ones_(p) if name.endswith("norm.weight") else torch.nn.init.normal_(p, 0.0, 0.02)
    if SETTINGS.compile:
        model_file.compile_model(net)
    return net


def add_random_adapter(net):
    """TinyLoRA with u = 13 over random factors: speed does not care which, and the SVD of 7B takes a while."""
    def factors(weights, rank, shard=None):
        return [(torch.randn(W.shape[0], rank, device=W.device) * 1e-3,
                 torch.randn(rank, W.shape[1], device=W.device) * 1e-3) for W in weights.values()]

    with mock.patch.object(tinylora, "svd_factors", factors):
        adapter = tinylora.add_adapter(net)
    torch.nn.init.normal_(adapter.v, std=1e-3)
    return adapter


def device_limits(device, dtype):
    """What this device can do, measured: bytes a second of a copy (read and write counted), operations a second of a
    matrix product in dtype."""
    n = 2**30 if device.type == "cuda" else 2**27
    a, b = torch.ones(n, dtype=torch.uint8, device=device), torch.empty(n, dtype=torch.uint8, device=device)
    bandwidth = 2 * n / seconds_of(lambda: b.copy_(a), device)
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    return bandwidth, 2 * n**3 / seconds_of(lambda: a @ b, device)


def decode_step_seconds(net, rows, context, steps, R=None):
    """Seconds of one decode step over `rows` rows that have `context` tokens behind them."""
    draw = partial(sample.sample_tokens, temperature=1.0)
    prompt = torch.randint(0, net.config.vocab_size, (context,)).tolist()
    with torch.inference_mode(), tinylora.sampling_form(net, per_row=R is not None):
        sampler = sample.Sampler(net, NO_TEXT, rows, context + 2 * steps, 2 * steps, draw, R)
        for _ in range(2):  # the first round records the graphs, if any
            sampler.rows, sampler.reached = [], []
            sampler.fill(deque((0, j) for j in range(rows)), [prompt], rows, lambda i, j: 2 * steps,
                         lambda i, j: sample.row_uniforms(0, i, j, 2 * steps))
            wait(net.device)
            began = time.perf_counter()
            for _ in range(2 * steps):
                sampler.advance()
            wait(net.device)
        return (time.perf_counter() - began) / (2 * steps)


def bench_decode():
    """One decode step over --rows rows with --context tokens behind each, as a share of the measured limits: the time
    to read all weights and the rows' keys and values once, or to do the products, whichever is longer."""
    device = model_file.pick_device(SETTINGS.device)
    net = shaped_model(device)
    bandwidth, rate = device_limits(device, net.head.dtype)
    rows, steps, c = SETTINGS.rows, SETTINGS.tokens, net.config
    numbers = sum(p.numel() for p in net.model.layers.parameters()) + net.head.numel()
    entry = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    size = net.head.element_size() * (numbers + rows * entry * (SETTINGS.context + steps))
    floor = max(size / bandwidth, 2 * numbers * rows / rate)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = decode_step_seconds(net, rows, SETTINGS.context, steps)
    prompt = [torch.randint(0, c.vocab_size, (SETTINGS.context,)).tolist()]
    first = seconds_of(lambda: sample.generate(net, NO_TEXT, prompt, max_new_tokens=1), device)
    adapter = add_random_adapter(net)
    shared = decode_step_seconds(net, rows, SETTINGS.context, steps)
    N, r = len(adapter.groups), adapter.P.shape[-1]
    own = decode_step_seconds(net, rows, SETTINGS.context, steps,
                              torch.randn(N, 1, r, r, device=device) * 1e-3)
    print(f"limits: copy {bandwidth / 1e9:.0f} GB/s, matrix product {rate / 1e12:.2f} TFLOP/s\n"
          f"{SETTINGS.shape}, {rows} rows, {SETTINGS.context} tokens behind each: {seconds * 1e3:.2f} ms a step, "
          f"{rows / seconds:.0f} tokens/s, {size / seconds / 1e9:.0f} GB/s, {floor / seconds:.0%} of the limit\n"
          f"with one adapter {shared / seconds - 1:+.1%}, with one a row {own / seconds - 1:+.1%}"
          f"{' (not compiled)' if SETTINGS.compile else ''}; first token after {first * 1e3:.0f} ms;"
          f" peak {grpo.peak_gb(device):.1f} GB")
    return {"shape": SETTINGS.shape, "rows": rows, "context": SETTINGS.context, "dtype": str(net.head.dtype),
            "device": str(device), "ms_a_step": seconds * 1e3, "tokens_per_second": rows / seconds,
            "gb_per_second": size / seconds / 1e9, "copy_gb_per_second": bandwidth / 1e9, "tflops_limit": rate / 1e12,
            "share_of_limit": floor / seconds, "adapter_ratio": shared / seconds, "adapter_a_row_ratio": own / seconds,
            "first_token_ms": first * 1e3, "peak_gb": grpo.peak_gb(device)}


def bench_train():
    """Log-probs and the gradient of v for --rows rows of --context tokens, as a share of the measured matrix product:
    4 operations a parameter and token (forward, and backward to the activations alone)."""
    device = model_file.pick_device(SETTINGS.device)
    net = shaped_model(device)
    _, rate = device_limits(device, net.head.dtype)
    adapter = add_random_adapter(net)
    half = max(1, SETTINGS.context // 2)
    rows = [grpo.Row(*(torch.randint(0, net.config.vocab_size, (half,)).tolist() for _ in range(2)), [0.0] * half, 1.0)
            for _ in range(SETTINGS.rows)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def step():
        logp, _, _ = grpo.completion_logprobs(net, NO_TEXT, rows, 1.0)
        logp.sum().backward()

    seconds = seconds_of(step, device)
    tokens = 2 * half * SETTINGS.rows
    numbers = sum(p.numel() for p in net.model.layers.parameters())
    work = 4 * numbers * tokens + 4 * net.head.numel() * tokens / 2  # logits of completions alone
    print(f"{SETTINGS.shape}, {SETTINGS.rows} x {SETTINGS.context} tokens: {seconds:.3f} s, {tokens / seconds:.0f} "
          f"tokens/s, {work / seconds / 1e12:.2f} of {rate / 1e12:.2f} TFLOP/s; peak {grpo.peak_gb(device):.1f} GB")
    assert adapter.v.grad.isfinite().all()
    return {"shape": SETTINGS.shape, "rows": SETTINGS.rows, "context": SETTINGS.context, "dtype": str(net.head.dtype),
            "device": str(device), "seconds": seconds, "tokens_per_second": tokens / seconds,
            "tflops": work / seconds / 1e12, "tflops_limit": rate / 1e12, "share_of_limit": work / seconds / rate,
            "peak_gb": grpo.peak_gb(device)}


def resident(key):
    """Bytes of this process as Linux counts them: VmRSS is what it holds now, VmHWM the most it held."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))


def peak_memory(function):
    """Bytes that this process holds at most while it calls function, beyond what it holds before (Linux)."""
    if model_file.LIBC:
        model_file.LIBC.malloc_trim(0)  # what others freed must not count as nothing
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the peak starts anew
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def in_a_process(function, *arguments):
    """function(*arguments), called in a fresh process: its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def in_turn(functions, rounds, *arguments):
    """Call each function(turn, *arguments) in a fresh process, where it takes `rounds` steps: for each it waits for
    turn.recv(), and sends what came of it; at last its peak memory. They step in turn, to share the machine's noise.
    Returns for each its steps and that peak."""
    context, turns = multiprocessing.get_context("spawn"), []
    for function in functions:
        turn, other_end = context.Pipe()
        context.Process(target=function, args=(other_end, *arguments), daemon=True).start()
        other_end.close()
        turns.append(turn)
    steps = [[] for _ in functions]
    try:
        for _ in range(rounds):
            for turn, taken in zip(turns, steps):
                turn.send("go")
                taken.append(turn.recv())
        return [(taken, turn.recv()) for turn, taken in zip(turns, steps)]
    except (EOFError, OSError):
        raise UserError("a measured process ended early; what it wrote above says why") from None


def malloc_as_it_comes():
    """Undo what pick_device("cpu") asks of glibc, for code that knows nothing of it: its limits for what it gives back,
    as they settle in a program with large blocks."""
    if model_file.LIBC:
        model_file.LIBC.mallopt(-1, 2**26)  # M_TRIM_THRESHOLD
        model_file.LIBC.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        model_file.LIBC.malloc_trim(0)


def bench_compare():
    """--rows completions of given lengths, --group to a prompt, --slots rows at a time: ours, which refills the slots,
    and transformers' generate, batch after batch, each of which lasts as long as its longest row. Same weights."""
    try:
        import transformers
    except ImportError:
        raise UserError("compare needs transformers: pip install -r requirements-dev.txt") from None
    device = model_file.pick_device("cpu")
    net, random = shaped_model(device), np.random.default_rng(0)
    rows, group, slots, limit = SETTINGS.rows, SETTINGS.group, SETTINGS.slots, SETTINGS.limit
    if rows % group or rows % slots:
        raise UserError(f"rows={rows} must be whole groups of {group} and whole batches of {slots}")
    lengths = np.minimum(random.geometric(min(1, 4 / limit), size=rows), limit).tolist()
    prompts = [random.integers(0, net.config.vocab_size, n).tolist() for n in random.integers(20, 60, rows // group)]
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**net.config.raw))
    theirs.load_state_dict(dict(net.state_dict()), assign=True, strict=False)
    theirs.eval().tie_weights()
    theirs.model.rotary_emb, counted = type(theirs.model.rotary_emb)(theirs.config), []

    @torch.inference_mode()
    def ours(prompts=prompts):
        model_file.pick_device("cpu")
        counted.clear()
        longest = max(map(len, prompts)) + limit
        sampler = sample.Sampler(net, NO_TEXT, slots, longest, limit, partial(sample.sample_tokens, temperature=1.0))
        with tinylora.sampling_form(net):
            sampler.run(prompts, group, lambda i, j: lengths[i * group + j],
                        lambda i, j: sample.row_uniforms(0, i, j, limit), lambda i, j, ids, _: counted.append(len(ids)))
        assert sorted(counted) == sorted(lengths[: len(prompts) * group])

    @torch.inference_mode()
    def reference():
        malloc_as_it_comes()
        for start in range(0, rows, slots):
            batch = [prompts[i // group] for i in range(start, start + slots)]
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in batch])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
            ends = longest + torch.tensor(lengths[start : start + slots])
            stop = transformers.StoppingCriteriaList([lambda ids, _, ends=ends, **__: ids.shape[1] >= ends])
            out = theirs.generate(ids, attention_mask=mask, max_new_tokens=limit, do_sample=True, top_k=0,
                                  pad_token_id=0, eos_token_id=None, stopping_criteria=stop)
            assert out.shape[1] == ends.max()

    reference()  # loads what it loads late
    reference_peak = peak_memory(reference)  # first: what ours keeps would serve it for good
    if SETTINGS.compile:
        ours(prompts[:1])  # compiles for all sizes, outside the measurement
    our_peak = peak_memory(ours)
    times = [(seconds_of(ours, device, 1), seconds_of(reference, device, 1)) for _ in range(SETTINGS.repeats)]
    seconds, their_seconds = (median_high(column) for column in zip(*times))  # in turn: to share the noise
    print(f"{SETTINGS.shape}, {rows} completions of {sum(lengths) / rows:.0f} tokens on average: "
          f"{sum(lengths) / seconds:.0f} tokens/s, transformers {sum(lengths) / their_seconds:.0f}: "
          f"{their_seconds / seconds:.1f} times; memory {our_peak / 1e6:.0f} and {reference_peak / 1e6:.0f} MB")
    return {"shape": SETTINGS.shape, "rows": rows, "group": group, "slots": slots, "limit": limit,
            "tokens_per_second": sum(lengths) / seconds, "theirs": sum(lengths) / their_seconds,
            "ratio": their_seconds / seconds, "peak_mb": our_peak / 1e6, "their_peak_mb": reference_peak / 1e6}


def full_logprobs(hidden, head, targets, temperature):
    """What grpo.token_logprobs returns, by way of the logits of all tokens at once."""
    logprobs = torch.log_softmax(F.linear(hidden, head).float().div_(temperature), dim=-1)  # [n, V]
    with torch.no_grad():
        entropy = -logprobs.exp().mul_(logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), entropy


def logprobs_cost(function, settings):
    """Seconds and peak bytes of function's log-probs and their gradient, over settings.size tokens; its results."""
    device = model_file.pick_device(settings.device)
    vocab, width, *_ = SHAPES[settings.shape]
    dtype = (tinylora.DTYPES | {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32})[settings.dtype]
    torch.manual_seed(0)
    hidden = torch.randn(settings.size, width).to(device, dtype).requires_grad_()
    head = (torch.randn(vocab, width) * 0.02).to(device, dtype)
    targets = torch.randint(0, vocab, (settings.size,)).to(device)

    def once():
        hidden.grad = None
        logp, _ = function(hidden, head, targets, 0.9)
        logp.sum().backward()

    if device.type == "cuda":
        once()  # readies the libraries, whose workspace is not the logits'
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        once()
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        peak = peak_memory(once)
    return seconds_of(once, device, settings.repeats), peak, str(dtype), hidden.grad.float().norm().item()


def bench_logprobs():
    """Log-probs, entropies and the gradient to the hidden states of --size tokens at the vocabulary of --shape: in
    chunks as grpo.token_logprobs does, against the logits of all tokens at once, each in its own process. memory_ratio
    is the peak memory of the second over the first's, beyond what is held before."""
    if SETTINGS.shape not in SHAPES:
        raise UserError(f"shape must be one of {', '.join(SHAPES)}")
    seconds, peak, dtype, norm = in_a_process(logprobs_cost, grpo.token_logprobs, SETTINGS)
    full_seconds, full_peak, _, full_norm = in_a_process(logprobs_cost, full_logprobs, SETTINGS)
    assert abs(norm - full_norm) <= 1e-2 * full_norm  # the same gradient
    print(f"{SETTINGS.size} tokens at a vocabulary of {SHAPES[SETTINGS.shape][0]}, {dtype}: {seconds:.2f} s and "
          f"{peak / 1e6:.0f} MB in chunks, {full_seconds:.2f} s and {full_peak / 1e6:.0f} MB at once: "
          f"{full_peak / peak:.1f} times the memory")
    return {"shape": SETTINGS.shape, "tokens": SETTINGS.size, "dtype": dtype, "seconds": seconds,
            "full_seconds": full_seconds, "peak_mb": peak / 1e6, "full_peak_mb": full_peak / 1e6,
            "memory_ratio": full_peak / peak, "ratio": full_seconds / seconds}


# --- a GRPO step, ours against TRL's ----------------------------------------------------------------------------------


def coin(text):
    """A reward for an answer that says nothing: 0 or 1, by its hash, the same on both sides."""
    return float(zlib.crc32(text.encode()) % 2)


def our_grpo_steps(turn, settings, path, prompts, lengths):
    """Steps of grpo.py on the checkpoint at path, for in_turn: seconds {total, generate, update}; bytes {beyond, total}
    at last."""
    net, group, order = model_file.load_model(path, "float32", "cpu"), settings.group, list(map(tuple, prompts))
    adapter = add_random_adapter(net)
    if settings.compile:
        model_file.compile_model(net)
        sample.generate(net, NO_TEXT, prompts[:1], 2, 2)  # compiles for all sizes, outside the measurement
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-6)
    cfg = configure(vars(grpo), [f"--batch_size={len(prompts)}", f"--group_size={group}", "--objective=dapo",
                                 f"--max_new_tokens={settings.limit}", "--answer_format=any"])
    tokenizer = SimpleNamespace(**vars(NO_TEXT) | {"decode": lambda ids, **_: " ".join(map(str, ids))})
    problems, run_rows = [{"prompt": prompt, "answer": ""} for prompt in prompts], sample.Sampler.run

    def with_lengths(sampler, batch, n, limits, uniforms, finished, on_token=None):
        def given(i, j):
            return lengths[order.index(tuple(batch[i])) * group + j]

        def checked(i, j, ids, logprobs):
            assert len(ids) == given(i, j)
            finished(i, j, ids, logprobs)

        run_rows(sampler, batch, n, given, uniforms, checked, on_token)

    def run_steps():
        for step in range(1 + settings.repeats):
            turn.recv()
            began = time.perf_counter()
            record, _ = grpo.training_step(net, tokenizer, optimizer, problems, cfg, step, 0, 1, grpo.Interrupt())
            parts = {key: record["seconds"][key] for key in ("generate", "update")}
            turn.send({"total": time.perf_counter() - began} | parts)

    def score(text, *_):
        return {"strict": coin(text), "lenient": 0}

    with mock.patch.object(sample.Sampler, "run", with_lengths), mock.patch.object(eval_math, "score", score):
        beyond = peak_memory(run_steps)
    turn.send({"beyond": beyond, "total": resident("VmHWM")})


def trl_model(path, prompts, lengths):
    """transformers' model, whose answers end where `lengths` say, and a tokenizer that writes ids as numbers."""
    import tokenizers
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    vocab = theirs.config.vocab_size  # its last id is the stop token: given lengths end with it, as sampled ones would
    names = ["<pad>", *map(str, range(1, vocab - 1)), "<stop>"]
    words = tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>")
    words = tokenizers.Tokenizer(words)
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<stop>", pad_token="<pad>")
    ends, longest = torch.tensor(lengths), max(map(len, prompts))

    def stop_where_given(ids, scores):
        scores[:, -1] = -torch.inf
        ending = ids.shape[1] - longest + 1 == ends
        scores[ending] = -torch.inf
        scores[ending, -1] = 0.0
        return scores

    stopping = transformers.LogitsProcessorList([stop_where_given])
    theirs.generate = partial(theirs.generate, logits_processor=stopping)
    return theirs, words


def trl_grpo_steps(turn, settings, path, prompts, lengths):
    """The same with TRL's GRPOTrainer and PEFT's TinyLoRA."""
    import peft
    import transformers
    import trl
    from datasets import Dataset

    micro, spent = settings.their_rows or len(lengths), Counter()
    theirs, words = trl_model(path, prompts, lengths)

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            turn.recv()
            spent.clear()
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            turn.send({"total": time.perf_counter() - self.began, "generate": spent["_generate"],
                       "update": spent["training_step"] - spent["_generate"]})

    def timed(owner, name):
        function = getattr(owner, name)

        def timer(*arguments, **options):
            began = time.perf_counter()
            result = function(*arguments, **options)
            spent[name] += time.perf_counter() - began
            if name == "_generate":
                assert [len(ids) for ids in result[1]] == lengths
            return result

        setattr(owner, name, timer)

    quick = mock.patch.object(torch.linalg, "svd", lambda W, full_matrices: tinylora.top_svd(W, 2))  # of 168 linears
    with tempfile.TemporaryDirectory() as out_dir, quick:
        # one optimiser step from one batch of samples; nothing logged, saved, evaluated; no reference model
        options = trl.GRPOConfig(
            out_dir, use_cpu=True, bf16=False, gradient_checkpointing=False, beta=0.0, loss_type="dapo",
            learning_rate=1e-6, lr_scheduler_type="constant", max_grad_norm=1.0, num_generations=settings.group,
            max_completion_length=settings.limit, per_device_train_batch_size=micro,
            gradient_accumulation_steps=len(lengths) // micro, max_steps=1 + settings.repeats,
            shuffle_dataset=False, save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True)
        data = Dataset.from_list([{"prompt": " ".join(map(str, prompt))} for prompt in prompts])
        trainer = trl.GRPOTrainer(
            theirs, lambda completions, **_: [coin(text) for text in completions], options, data,
            processing_class=words, callbacks=[Clock()],
            peft_config=peft.TinyLoraConfig(r=2, u=13, weight_tying=1.0, target_modules="all-linear"))
        trainer.remove_callback(transformers.PrinterCallback)
        assert sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) == 13
        timed(trainer, "_generate")
        timed(trainer, "training_step")
        beyond = peak_memory(trainer.train)
    turn.send({"beyond": beyond, "total": resident("VmHWM")})


def bench_compare_grpo():
    """A GRPO step with TinyLoRA of 13 numbers on --rows answers of given lengths, --group to a prompt: ours, and TRL's
    GRPOTrainer with PEFT's TinyLoRA, step by step in turn, each in its own process, in float32 on the CPU. Same
    weights, prompts, lengths (geometric, as in compare) and rewards (0 or 1, by the answer's hash). The first step
    warms up; the median of --repeats counts. Ours leaves out the backward pass of groups whose answers all earned the
    same: few at group 8."""
    for name in ("transformers", "peft", "trl"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"compare_grpo needs {name}: pip install -r requirements-dev.txt")
    rows, group, limit, random = SETTINGS.rows, SETTINGS.group, SETTINGS.limit, np.random.default_rng(0)
    if rows % group or rows % (SETTINGS.their_rows or rows) or group < 2:
        raise UserError(f"rows={rows} must be whole groups of at least 2 (group={group}) and whole micro-batches of "
                        f"their_rows={SETTINGS.their_rows}")
    lengths = np.minimum(random.geometric(min(1, 4 / limit), size=rows), limit).tolist()
    net, sides = shaped_model(torch.device("cpu")).float(), {}
    vocab = net.config.vocab_size
    prompts = [random.integers(1, vocab - 1, n).tolist() for n in random.integers(20, 60, rows // group)]
    with tempfile.TemporaryDirectory() as path:
        model_file.save_model(net, path)
        del net
        measured = in_turn((our_grpo_steps, trl_grpo_steps), 1 + SETTINGS.repeats, SETTINGS, path, prompts, lengths)
        for name, (steps, peak) in zip(("ours", "trl"), measured):
            step = sorted(steps[1:], key=lambda step: step["total"])[SETTINGS.repeats // 2]
            step["rest"] = step["total"] - step["generate"] - step["update"]
            sides[name] = step | {f"peak_mb_{key}": size / 1e6 for key, size in peak.items()}
            print(f"{name:4}: {step['total']:.3f} s a step: {step['generate']:.3f} generation, {step['update']:.3f} "
                  f"log-probs and update, {step['rest']:.3f} rest; memory {peak['beyond'] / 1e6:.0f} MB beyond what it "
                  f"holds before the steps, {peak['total'] / 1e6:.0f} MB in total")
    ours, theirs = sides["ours"], sides["trl"]
    print(f"{SETTINGS.shape}, {rows} answers of {sum(lengths) / rows:.0f} tokens on average: "
          f"{theirs['total'] / ours['total']:.1f} times")
    return {"shape": SETTINGS.shape, "rows": rows, "group": group, "limit": limit, "their_rows": SETTINGS.their_rows,
            **sides, "ratio": theirs["total"] / ours["total"]}


BENCHES = {"load": bench_load, "tokenize": bench_tokenize, "grade": bench_grade, "svd": bench_svd,
           "adapters": bench_adapters, "compare": bench_compare, "compare_grpo": bench_compare_grpo,
           "logprobs": bench_logprobs, "decode": bench_decode, "train": bench_train}


def main():
    global SETTINGS
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in BENCHES and name not in ("--help", "-h"):
        raise UserError(f"name a measurement: {', '.join(BENCHES)}")
    SETTINGS = configure(globals(), sys.argv[2:] if name in BENCHES else sys.argv[1:])
    sizes = ("layers", "size", "rows", "tokens", "repeats", "context", "group", "slots", "limit")
    if min(getattr(SETTINGS, key) for key in sizes) < 1 or SETTINGS.dtype not in ("auto", *tinylora.DTYPES):
        raise UserError(f"{', '.join(sizes)} must be at least 1, dtype auto or one of {', '.join(tinylora.DTYPES)}")
    if name in ("tokenize", "grade") and not os.path.isfile(SETTINGS.dataset):
        raise UserError(f"no file at '{SETTINGS.dataset}'")
    result = BENCHES[name]()
    print(json.dumps({"bench": name, "torch": torch.__version__, "threads": torch.get_num_threads(),
                      "compile": SETTINGS.compile, **result}))


if __name__ == "__main__":
    run(main)
