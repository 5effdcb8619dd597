"""Measurements, as ratios taken side by side in one run.

    python -m lab.bench load                                   # a random checkpoint against reading its bytes
    python -m lab.bench tokenize --model=DIR --dataset=FILE    # our tokenizer against transformers' batch call
    python -m lab.bench grade --dataset=FILE                   # our answer checker against math-verify
    python -m lab.bench svd                                    # top 2 singular triplets against the full SVD; the cache
    python -m lab.bench adapters                               # decoding: no adapter, one for all rows, one a row

Each ends with one line of JSON; `ratio` is the other's time over ours.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter

import torch

import eval_math
import model as model_file
import sample
import tinylora
from configurator import UserError, configure, run

model = "toy/base"  # tokenize, adapters: checkpoint directory; adapters takes "" for random weights of the 0.5B shape
dataset = "toy/train.jsonl"  # tokenize, grade: problems; grade also takes responses as eval_math.py writes them
layers = 32  # load, svd, adapters: of the Qwen2.5-0.5B shape (it has 24); 32 make about 2 GB in float32
size = 3584  # svd: side of the matrix
rows = 256  # adapters: in the batch
tokens = 32  # adapters: a row
repeats = 5  # of each measurement; the median counts


def median_seconds(function):
    seconds = []
    for _ in range(SETTINGS.repeats):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[len(seconds) // 2]


def random_model(path):
    """A model of the Qwen2.5-0.5B shape with a small vocabulary and random weights; config.json goes to `path`."""
    raw = {"model_type": "qwen2", "vocab_size": 8192, "hidden_size": 896, "intermediate_size": 4864,
           "num_hidden_layers": SETTINGS.layers, "num_attention_heads": 14, "num_key_value_heads": 2}
    with open(os.path.join(path, "config.json"), "w") as f:
        json.dump(raw, f)
    net = model_file.Transformer(model_file.load_config(path))
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
        net = random_model(path)
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
        seconds, peak = sorted(loads)[len(loads) // 2]
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
    with open(SETTINGS.dataset, encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    rows = [row for row in rows if "settings" not in row]
    pairs = [(row.get("response") or row.get("solution") or row["answer"], row.get("reference") or row["answer"])
             for row in rows]

    def theirs(response, reference):
        return bool(math_verify.verify(math_verify.parse(rf"\boxed{{{reference}}}"), math_verify.parse(response)))

    verdicts = {}
    seconds = median_seconds(lambda: verdicts.update(ours=[eval_math.is_correct(*pair) for pair in pairs]))
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
    of all linears of a trained-like model, without and with the cache. `ratio` is the full SVD's time over ours for the
    trained-like matrix; a Gaussian one, whose values crowd at the edge, takes more rounds. Errors are differences from
    the full SVD, its own included."""
    torch.manual_seed(0)
    n, out = SETTINGS.size, {}
    for name, W in (("trained_like", trained_like(n, n)), ("gaussian", torch.randn(n, n))):
        seconds = median_seconds(lambda W=W: tinylora.top_svd(W, 2))
        U, S, Vt = tinylora.top_svd(W, 2)
        began = time.perf_counter()
        U0, S0, Vt0 = torch.linalg.svd(W)
        full = time.perf_counter() - began
        error = ((S - S0[:2]) / S0[:2]).abs().max().item()
        angle = (U - U0[:, :2] @ (U0[:, :2].T @ U)).norm(dim=0).max().item()
        print(f"{n} x {n}, {name}: {seconds:.2f} s, full {full:.1f} s: {full / seconds:.0f} times; relative error "
              f"of the values {error:.1e}, of the subspace {angle:.1e}")
        out |= {name: {"seconds": seconds, "full_seconds": full, "ratio": full / seconds, "value_error": error,
                       "subspace_error": angle}}
    shapes = [(896, 896), (128, 896), (128, 896), (896, 896), (4864, 896), (4864, 896), (896, 4864)]
    weights = {f"{i}.{j}": trained_like(*shape) for i in range(SETTINGS.layers) for j, shape in enumerate(shapes)}
    starts = []
    with tempfile.TemporaryDirectory() as path:
        os.environ["TINYLORA_CACHE"] = path
        for _ in range(1 + SETTINGS.repeats):
            began = time.perf_counter()
            tinylora.svd_factors(weights, 2)
            starts.append(time.perf_counter() - began)
    first, second = starts[0], sorted(starts[1:])[SETTINGS.repeats // 2]
    print(f"{len(weights)} linears of the 0.5B shape: {first:.2f} s, from the cache {second:.2f} s")
    return {**out, "linears": len(weights), "first_seconds": first, "cached_seconds": second,
            "cache_ratio": first / second, "ratio": out["trained_like"]["ratio"]}


def bench_adapters():
    """Tokens a second of generate, prefill and set-up included: without adapter, with one for all rows, and with one of
    its own for every row. `ratio` is the speed of the last over that of one for all."""
    tokenizer = model_file.load_tokenizer("toy/base")
    with tempfile.TemporaryDirectory() as path:
        net = model_file.load_model(SETTINGS.model, "float32", "cpu") if SETTINGS.model else random_model(path)
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


BENCHES = {"load": bench_load, "tokenize": bench_tokenize, "grade": bench_grade,
           "svd": bench_svd, "adapters": bench_adapters}


def main():
    global SETTINGS
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in BENCHES and name not in ("--help", "-h"):
        raise UserError(f"name a measurement: {', '.join(BENCHES)}")
    SETTINGS = configure(globals(), sys.argv[2:] if name in BENCHES else sys.argv[1:])
    result = BENCHES[name]()
    print(json.dumps({"bench": name, "torch": torch.__version__, "threads": torch.get_num_threads(), **result}))


if __name__ == "__main__":
    run(main)
