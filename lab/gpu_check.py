"""The first run on a GPU, in one process of 6 to 8 minutes: is everything right, and how fast is it?

    python -m lab.gpu_check | tee gpu.jsonl    # a GPU, torch 2.11 or newer; nothing is downloaded
    python -m lab.gpu_check --device=cpu       # the same in toy sizes: does the check itself run?

Each row is printed as a line of JSON as soon as it is measured, the most valuable first, so a check
that is cut off has not been in vain. A row that fails holds its error, and the next ones go on. The
exit code is 1 if any has failed.
"""

import contextlib
import io
import json
import platform
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace

import torch
from torch.profiler import ProfilerActivity, profile

import grpo
from configurator import configure
from lab import bench
from sample import generate
from support import UserError
from support.device import peak_gb, pick_device
from support.packing import Rollout, completion_logprobs
from support.svd import top_svd


@dataclass
class Settings:
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    only: str = ""  # the rows to measure, with commas between; all if empty


def versions(device, shape):
    """What this is measured on, and its limits."""
    is_gpu = device.type == "cuda"
    bandwidth, rate = bench.device_limits(device, torch.bfloat16 if is_gpu else torch.float32)
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0],
            "device": torch.cuda.get_device_name(device) if is_gpu else platform.processor(),
            "copy_gb_per_second": bandwidth / 1e9, "tflops": rate / 1e12}


class Outcomes:
    """A plugin of pytest that keeps {outcome: [tests]}."""

    def __init__(self):
        self.tests = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid if report.passed else f"{report.nodeid}: {report.longreprtext}"
            self.tests.setdefault(report.outcome, []).append(name[-2000:])


def tests(device, shape):
    """The tests that are marked gpu; on a CPU they are skipped."""
    import pytest

    outcomes, printed, threads = Outcomes(), io.StringIO(), torch.get_num_threads()
    files = ["tests/test_gpu.py", "tests/test_packing.py"]
    with contextlib.redirect_stdout(printed):
        code = pytest.main(["-m", "gpu", "-q", "-p", "no:cacheprovider", *files], plugins=[outcomes])
    torch.set_num_threads(threads)  # tests/conftest.py takes fewer
    if code:
        failed = "\n".join(outcomes.tests.get("failed", []))
        raise AssertionError(failed or printed.getvalue()[-2000:])
    return {outcome: len(names) for outcome, names in outcomes.tests.items()}


def decode(device, shape, rows):
    """A decode step of a random model: without an adapter, with one, and with one for each row."""
    return bench.bench_decode(settings(device, shape, rows=rows, context=512, tokens=16))


def kernels(device, shape):
    """The 15 costliest kernels of one decode step and of one training step."""
    cfg = settings(device, shape, rows=16, context=64, tokens=4)
    net = bench.model_of(cfg, device)
    bench.add_random_adapter(net)
    batch = [Rollout([1] * 64, [2] * 192) for _ in range(cfg.rows)]

    def decoding():
        generate(net, bench.NUMBERS, [[1] * 64], cfg.rows, 8)

    def training():
        logprobs, _, _ = completion_logprobs(net, batch)
        logprobs.sum().backward()

    return {"decode": costliest(decoding, device), "train": costliest(training, device)}


def costliest(function, device):
    """{kernel: milliseconds of a call} of the 15 that take the most time, after a call to warm up."""
    function()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        bench.timed(function, device)
    total = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, total))
    return {event.key[:100]: getattr(event, total) / 1e3 for event in events[:15]}


def train(device, shape):
    """Log-probs and gradient, packed, as a share of the matrix product."""
    return bench.bench_train(settings(device, shape, rows=32, context=512, repeats=2))


def grpo_steps(device, shape):
    """Two GRPO steps of 64 problems with 4 completions of at most 256 tokens: seconds of each."""
    cfg = settings(device, shape, rows=256, group=4, limit=256)
    if is_small(device):
        cfg = replace(cfg, rows=8, limit=16)
    net, lengths = bench.model_of(cfg, device), bench.random_lengths(cfg)
    prompts = bench.random_prompts(net.config.vocab_size, cfg.rows // cfg.group)
    net.longest = max(map(len, prompts)) + cfg.limit
    bench.add_random_adapter(net)
    optimizer = torch.optim.Adam([net.adapter.v], lr=1e-4)
    options = configured(device, max_new_tokens=cfg.limit, group_size=cfg.group)
    options.reward = lambda problem, completion: bench.coin(completion.text)
    asked = [(i, {"prompt_tokens": ids, "limit": cfg.limit}) for i, ids in enumerate(prompts)]
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        with bench.fixed_lengths(lengths, cfg.group):
            groups, totals = grpo.sample_groups(net, bench.NUMBERS, asked, options)
        sampled = time.perf_counter()
        rollouts = [rollout for group in groups for rollout in group if rollout.advantage]
        totals.update(batch_rollouts=cfg.rows, batch_tokens=totals["tokens"])
        optimizer.zero_grad()
        difference = 0.0
        for batch in grpo.micro_batches(rollouts, options.micro_batch_tokens):
            loss, _, most = grpo.batch_loss(net, batch, totals, options)
            loss.backward()
            difference = max(difference, most)
        norm = net.adapter.v.grad.norm().item()  # waits for the device
        optimizer.step()
        seconds.append({"generate": sampled - began, "update": time.perf_counter() - sampled})
    return {"steps": seconds, "tokens": totals["tokens"], "completions": cfg.rows,
            "completions_per_second": cfg.rows / sum(seconds[-1].values()),
            "max_logprob_difference": difference, "grad_norm": norm, "peak_gb": peak_gb(device)}


def svd(device, shape):
    """The top 2 singular triplets of one matrix."""
    side = 256 if is_small(device) else 3584
    W = bench.trained_like(side, side).to(device)
    return {"side": side, "seconds": bench.seconds_of(lambda: top_svd(W, 2, "check"), 3, device)}


def toy(device, shape):
    """Twenty steps of `python grpo.py`, and its accuracy before and after."""
    steps, size = (2, 20) if is_small(device) else (20, 0)
    with tempfile.TemporaryDirectory() as out_dir, contextlib.redirect_stdout(io.StringIO()) as out:
        grpo.train(configured(device, out_dir=f"{out_dir}/toy", max_steps=steps, eval_size=size))
    return {"last line": out.getvalue().strip().splitlines()[-1]}


def compiled(device, shape):
    """A decode step under torch.compile, last, as compiling takes long."""
    cfg = settings(device, shape, rows=64, context=512, tokens=16, compile=True)
    net = bench.model_of(cfg, device)
    return {"ms_a_step": 1e3 * bench.decode_step_seconds(net, cfg)}


def is_small(device):
    """Are toy sizes enough, because only the check itself is tried?"""
    return device.type == "cpu"


def settings(device, shape, **changes):
    """Of lab.bench, for this device; on a CPU with at most 8 rows and 64 tokens of context."""
    if is_small(device):
        for name, most in (("rows", 8), ("context", 64), ("tokens", 4)):
            if name in changes:
                changes[name] = min(changes[name], most)
    return bench.Settings(shape=shape, device=str(device), **changes)


def configured(device, **changes):
    """Of grpo.py, for this device, with the default reward and problems."""
    arguments = [f"--{name}={value}" for name, value in changes.items()]
    with contextlib.redirect_stdout(io.StringIO()):
        return configure(grpo.Settings, grpo.reward, grpo.problems,
                         argv=[f"--device={device}", *arguments])


ROWS = {"versions": versions, "tests": tests,
        "decode 1": lambda *where: decode(*where, 1), "decode 64": lambda *where: decode(*where, 64),
        "decode 256": lambda *where: decode(*where, 256), "train": train, "grpo": grpo_steps,
        "kernels": kernels, "svd": svd, "toy": toy, "compiled": compiled}


def main():
    cfg = configure(Settings)
    device = pick_device(cfg.device)
    shape = "qwen7b" if device.type == "cuda" else "toy"
    wanted = [name.strip() for name in cfg.only.split(",")] if cfg.only else list(ROWS)
    if unknown := set(wanted) - set(ROWS):
        raise UserError(f"only names rows among {', '.join(ROWS)}; got {', '.join(unknown)}")
    failed = False
    for name in wanted:
        began = time.perf_counter()
        try:
            figures = ROWS[name](device, shape)
        except Exception as error:  # also of CUDA: the rows after it are still worth trying
            figures = {"error": f"{type(error).__name__}: {error}", "at": traceback.format_exc()[-2000:]}
            failed = True
        figures |= {"row": name, "shape": shape, "took": time.perf_counter() - began}
        print(json.dumps(figures), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
