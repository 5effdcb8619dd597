"""What only a GPU can show, marked gpu: python -m pytest -m gpu. test_fake_gpu.py has what a CPU can show of it."""

import gc
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import grpo
import sample
import tinylora
from configurator import configure
from model import load_model, load_tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def toy(device, dtype="float32"):
    net = load_model("toy/base", dtype, device)
    adapter = tinylora.add_adapter(net, rank=1, u=13)
    torch.nn.init.constant_(adapter.v, 0.05)
    return net


def answers(net, **options):
    prompts = [f"Tom has {n} apples. Tom finds 4 more. How many apples are there now?" for n in range(24)]
    groups = sample.generate(net, load_tokenizer("toy/base"), prompts, n=2, max_new_tokens=48, seed=3, **options)
    return [(completion.ids, completion.logprobs) for group in groups for completion in group]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_those_of_the_cpu(temperature):
    ours, theirs = (answers(toy(device), temperature=temperature) for device in ("cuda", "cpu"))
    same = [ids == other for (ids, _), (other, _) in zip(ours, theirs)]
    assert sum(same) >= 0.95 * len(same)  # a random number may fall between two sums
    for (ids, logprobs), (other, others) in zip(ours, theirs):
        if ids == other:
            assert logprobs == pytest.approx(others, abs=1e-3)


@pytest.mark.parametrize("options", [{}, dict(top_k=20, top_p=0.9)], ids=str)
def test_replayed_graphs_equal_eager_steps(monkeypatch, options):
    net = toy("cuda", "bfloat16")
    replayed = answers(net, **options)
    monkeypatch.setattr(sample.Sampler, "replay", sample.Sampler.compute)
    assert replayed == answers(net, **options)
    net.adapter.v.data.add_(0.1)
    changed = answers(net, **options)
    monkeypatch.undo()
    assert changed == answers(net, **options) and changed != replayed


def test_rounds_of_evaluation_and_training_keep_the_memory_stable(tmp_path):
    held = []
    for number in range(3):
        arguments = ["--device=cuda", f"--out_dir={tmp_path}/{number}", "--max_steps=2", "--eval_size=64"]
        grpo.train(configure(grpo.Settings, grpo.reward, grpo.problems, argv=arguments))
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # torch 2.11 keeps one for each stream
        held.append(torch.cuda.memory_allocated())
    assert held[2] - held[1] <= 2**20


def test_torchrun_with_one_process(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "grpo.py",
               "--max_steps=1", "--eval_size=16", f"--out_dir={tmp_path}/out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "out: greedy accuracy" in done.stdout, done.stderr
