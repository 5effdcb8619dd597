"""sample.py, grpo.py and sft.py on a CUDA device that is only pretended (fake_gpu.py), against the CPU; and that the
pretended device fails where a GPU would."""

from contextlib import nullcontext
from functools import partial

import pytest
import test_run
import torch
from fake_gpu import fake_gpu
from test_packing import random_rollouts
from test_sample import OFTEN, PROMPTS, ids_of, with_slots

import grpo
import model
import sample
import sft
import tinylora
from configurator import configure
from lab import bench, gpu_check
from support.fused import sampling_form
from support.packing import completion_logprobs
from support.run import Run

runs = test_run.runs  # the fixture

LONG = "Tom has 3 apples. Tom finds 4 more. " * 7  # so that some rows grow beyond 128 tokens


def adapted(checkpoint, device, dtype="float32"):
    net = model.load_model(checkpoint, dtype, device)
    adapter = tinylora.add_adapter(net, u=3, n_tie=4)
    with torch.no_grad():
        adapter.v.copy_(torch.linspace(-0.3, 0.3, adapter.v.numel()).view_as(adapter.v))
    return net


# -------------------------------------------------------------------------------------------------------- generation

WAYS = {"sampled": dict(temperature=0.7), "greedy": dict(temperature=0), "top_k and top_p": dict(top_k=20, top_p=0.9),
        "fewer slots than rows": dict(slots=6), "adapters": {}, "vectors and fewer slots": dict(slots=6)}


@pytest.fixture(params=WAYS)
def generate(request, checkpoint, tokenizer, monkeypatch):
    """A function that samples from a model in one of the ways."""
    options = dict(n=5, max_new_tokens=60, seed=4) | WAYS[request.param]
    monkeypatch.setattr(tokenizer, "stop_ids", OFTEN)
    if "slots" in options:
        with_slots(monkeypatch, options.pop("slots"))
    if request.param == "adapters":
        texts = [tinylora.adapter_text(adapted(checkpoint, "cpu").adapter), "hex:3c23d70a3c23d70a", ""]
        options["adapters"] = [texts[i % 3] for i in range(len(PROMPTS) + 1)]
    if request.param == "vectors and fewer slots":
        options["adapters"] = torch.randn(len(PROMPTS) + 1, 4, 3) * 0.2
    return partial(sample.generate, tokenizer=tokenizer, prompts=[*PROMPTS, LONG], **options)


def numbers_of(groups):
    return [(c.ids, c.logprobs) for group in groups for c in group]


def test_the_device_samples_what_the_cpu_samples(generate, checkpoint):
    expected = generate(adapted(checkpoint, "cpu"))
    with fake_gpu() as gpu:
        groups = generate(adapted(checkpoint, "cuda"))
    assert gpu.counts["replays"] > 10 and ids_of(groups) == ids_of(expected)
    for (_, ours), (_, theirs) in zip(numbers_of(groups), numbers_of(expected)):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_replayed_graphs_equal_eager_steps_to_the_bit(generate, checkpoint, monkeypatch):
    """In bfloat16, and again when v has changed."""
    results = {}
    with fake_gpu() as gpu:
        net = adapted(checkpoint, "cuda", "bfloat16")
        for step in ("replayed", "eager"):
            if step == "eager":
                monkeypatch.setattr(sample.Sampler, "replay", sample.Sampler.compute)
            first = generate(net)
            with torch.no_grad():
                net.adapter.v.mul_(-2)
            results[step] = numbers_of(first), numbers_of(generate(net))
            with torch.no_grad():
                net.adapter.v.mul_(-0.5)
    assert gpu.counts["replays"] > 20 and results["replayed"] == results["eager"]
    assert (results["eager"][0] == results["eager"][1]) == ("adapters" in generate.keywords)  # which replace v


def test_a_step_is_a_replay_and_two_copies_each_way_and_its_sizes_are_few(checkpoint, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "stop_ids", OFTEN)
    with_slots(monkeypatch, 11)
    step, sizes, samplers = sample.Sampler.step, [], set()

    def counting(self):
        before = gpu.counts.copy()
        rows, end = len(self.rows), max(len(row.ids) for row in self.rows)
        sizes.append((min(11, 1 << (rows - 1).bit_length()), -(-end // 128) * 128))
        samplers.add(self)
        result = step(self)
        new = gpu.counts - before
        assert new.pop("captures", 0) == (sizes[-1] not in sizes[:-1])
        assert new == {"replays": 1, "to device": 2, "to host": 2}
        return result

    monkeypatch.setattr(sample.Sampler, "step", counting)
    with fake_gpu() as gpu:
        net = adapted(checkpoint, "cuda")
        sample.generate(net, tokenizer, [*PROMPTS, LONG], n=9, max_new_tokens=60, seed=4)
    [sampler] = samplers
    assert {key[:2] for key in sampler.graphs} == set(sizes) and gpu.counts["captures"] == len(set(sizes))
    assert {rows for rows, _ in sizes} >= {2, 4, 8, 11} and {end for _, end in sizes} == {128, 256}


def test_a_sampler_is_kept_until_what_its_graphs_read_has_moved(checkpoint, tokenizer):
    """One model, with an adapter, with another v, greedy, with none, with another adapter: as on the CPU each time."""

    def answers(device):
        net = adapted(checkpoint, device)
        options = dict(n=3, max_new_tokens=40, seed=4)

        def say(**changes):
            before = gpu.counts["captures"]
            texts = ids_of(sample.generate(net, tokenizer, PROMPTS, **options | changes))
            return texts, gpu.counts["captures"] - before

        yield say()
        with torch.no_grad():
            net.adapter.v.mul_(-1)
        yield say()
        yield say(temperature=0)
        yield say()
        yield say(max_new_tokens=200)
        tinylora.detach(net)
        yield say()
        torch.nn.init.constant_(tinylora.add_adapter(net, "lora", rank=4).B[0], 0.1)
        yield say()
        net.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(net.model.layers[1].mlp.up_proj.weight * 2)
        yield say()

    with fake_gpu() as gpu:
        ours = list(answers("cuda"))
        theirs = list(answers("cpu"))
    assert [texts for texts, _ in ours] == [texts for texts, _ in theirs]
    kept = [captures == 0 for _, captures in ours]
    assert kept == [False, True, False, True, False, False, False, True]


def test_the_joined_weights_take_no_memory_and_are_the_models(checkpoint, tokenizer, tmp_path):
    with fake_gpu():
        net = adapted(checkpoint, "cuda")
        before = {name: p.cpu() for name, p in net.state_dict().items()}
        sample.generate(net, tokenizer, PROMPTS, max_new_tokens=3)
        places = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in net.parameters()}
        fused = [module.fused.weight for module in net.modules() if hasattr(module, "fused")]
        assert {weight.untyped_storage().data_ptr() for weight in fused} < set(places) and len(fused) == 4 * 2
        room = 16 * 4 * sum(len(weight) for weight in fused)  # for the adapter, 16 columns
        assert sum(places.values()) == sum(p.nbytes for p in net.parameters()) + room
        assert all(torch.equal(p.cpu(), before[name]) for name, p in net.state_dict().items())
        model.save_model(tinylora.merge(net), tmp_path, checkpoint)
        assert ids_of(sample.generate(net, tokenizer, PROMPTS)) == ids_of(
            sample.generate(model.load_model(tmp_path, device="cpu"), tokenizer, PROMPTS))


def test_a_layer_of_a_decode_step_is_24_kernels(checkpoint, monkeypatch):
    """In 16 bits and with an adapter: 3 for each of four products, 2 norms, 3 to rotate q and k, 2 to store k and v,
    attention, 2 for silu, and 2 sums."""
    monkeypatch.setattr(model.RMSNorm, "forward", lambda self, x: x * self.weight)  # a single kernel on a GPU
    with fake_gpu() as gpu, torch.inference_mode():
        net = adapted(checkpoint, "cuda", "bfloat16")
        with sampling_form(net):
            sampler = sample.Sampler(net, 4, 30)
            sampler.options = 1.0, 0, 1.0
            sampler.compute(4, 16)  # prepares what is made once
            counts = []
            for layers in (2, 1):
                net.model.layers = net.model.layers[:layers]
                before = gpu.kernels
                sampler.compute(4, 16)
                counts.append(gpu.kernels - before)
    assert counts[0] - counts[1] == 24


# ---------------------------------------------------------------------------------------------------------- training


def assert_learnt_the_same(runs):
    ours, theirs = (runs.saved(name)[0] for name in ("cuda", "cpu"))
    assert ours.keys() == theirs.keys()
    for key, t in theirs.items():
        assert (ours[key] - t).norm() <= 1e-4 * t.norm()


@pytest.mark.parametrize("settings", [dict(kl_coef=0.1, num_passes=2, tis_cap=2), dict(recompute=True, kl_coef=0.1),
                                      dict(method="lora_xs", objective="gspo", resample=1), dict(method="lora"),
                                      dict(method="full", lr=1e-4), dict(resumes=True)], ids=str)
def test_grpo_learns_on_the_device_what_it_learns_on_the_cpu(runs, settings):
    settings = dict(max_steps=2, dtype="float32") | settings
    resumes = settings.pop("resumes", False)
    runs.train("cpu", **settings)
    with fake_gpu() as gpu:
        if resumes:
            runs.train("cuda", device="cuda", **settings | dict(max_steps=1))
        runs.train("cuda", device="cuda", **settings, init_from="resume" if resumes else "scratch")
    assert gpu.counts["replays"] > 10
    assert_learnt_the_same(runs)


@pytest.mark.parametrize("method", ["tinylora", "lora"])
def test_sft_learns_on_the_device_what_it_learns_on_the_cpu(runs, method):
    keys = "model", "dataset", "eval_dataset", "max_new_tokens", "eval_size", "n_tie"
    same = {key: runs.settings[key] for key in keys} | dict(method=method, max_steps=2, batch_size=6, dtype="float32")
    for device in ("cpu", "cuda"):
        settings = same | dict(device=device, out_dir=runs.place / device)
        with fake_gpu() if device == "cuda" else nullcontext():
            sft.train(configure(sft.Settings, grpo.reward, argv=[f"--{key}={v}" for key, v in settings.items()]))
    assert_learnt_the_same(runs)


def test_later_calls_record_only_sizes_that_are_new(checkpoint, tokenizer, monkeypatch):
    """Completions of other lengths each time: a graph is recorded when its size first occurs in a run."""
    monkeypatch.setattr(tokenizer, "stop_ids", OFTEN)
    captures, samplers = [], set()
    with fake_gpu() as gpu:
        net = adapted(checkpoint, "cuda")
        for seed in range(4):
            sample.generate(net, tokenizer, [*PROMPTS, LONG], n=9, max_new_tokens=60, seed=seed)
            captures.append(gpu.counts["captures"])
            samplers.add(net.sampler)
    assert captures[-1] == len(net.sampler.graphs) < 1.5 * captures[0] and len(samplers) == 1


def test_a_sampler_grows_until_it_serves_short_and_many_rows_as_well_as_long_and_few(checkpoint, tokenizer):
    captures = []
    with fake_gpu() as gpu:
        net = adapted(checkpoint, "cuda")
        for _ in range(3):
            for n, max_new_tokens in ((9, 3), (2, 200)):
                sample.generate(net, tokenizer, PROMPTS, n, max_new_tokens)
                captures.append(gpu.counts["captures"])
    assert captures[2] == captures[-1] and net.sampler.slots == 9 * len(PROMPTS)


def test_a_run_records_graphs_in_its_first_step_and_evaluation_alone(runs, tokenizer, monkeypatch):
    """Although the completions have other lengths in each of them, and the prompts, too."""
    monkeypatch.setattr(tokenizer, "stop_ids", OFTEN)
    monkeypatch.setattr(grpo, "load_tokenizer", lambda path: tokenizer)
    captures, log = [], Run.log
    monkeypatch.setattr(Run, "log", lambda *arguments: (captures.append(gpu.counts["captures"]), log(*arguments)))
    template = "{question} " + LONG[:130]  # so that some rows grow beyond 128 tokens, and others do not
    with fake_gpu() as gpu:
        runs.train("cuda", device="cuda", max_steps=6, eval_interval=3, max_new_tokens=40, prompt_template=template)
    evaluated, *steps = captures
    assert steps[0] > evaluated and steps[0] == steps[2]  # in the larger Sampler of the steps
    assert steps[3] > steps[2] and steps[3] == steps[-1]  # the second evaluation, in that Sampler
    assert len({line["length"] for line in runs.steps("cuda")}) == 6


def test_grpo_in_16_bits(runs):
    with fake_gpu() as gpu:
        runs.train("cuda", device="cuda", max_steps=2, kl_coef=0.1, recompute=True)
    assert gpu.counts["varlen_attn"] > 10
    assert all(0 < line["diff"] < 0.02 for line in runs.steps("cuda"))  # between sampler and trainer


def test_packed_rows_in_16_bits(checkpoint):
    """Log-probs and the gradient of v: the kernel for packed rows against plain attention in float32 on the CPU."""
    results = []
    for device in ("cpu", "cuda"):
        with fake_gpu() if device == "cuda" else nullcontext():
            net = adapted(checkpoint, device, "bfloat16" if device == "cuda" else "float32")
            logprobs, _, _ = completion_logprobs(net, random_rollouts())
            logprobs.mean().backward()
            results.append((logprobs.detach().cpu(), net.adapter.v.grad.cpu()))
    (exact, gradient), (ours, our_gradient) = results
    assert 0 < (ours - exact).abs().mean() <= 0.05
    assert (our_gradient - gradient).norm() <= 0.1 * gradient.norm()


# ----------------------------------------------------------------------------------------- what a GPU would not do


def test_what_mixes_devices_fails():
    with fake_gpu():
        here, there = torch.ones(3, device="cuda"), torch.ones(3)
        assert here.is_cuda and str(here.device) == "cuda:0" and not there.is_cuda and str(there.device) == "cpu"
        for mixing in (lambda: here + there, lambda: there.add_(here), lambda: torch.cat([here, there]),
                       lambda: there[here.long()], lambda: here.scatter_add(0, torch.zeros(3).long(), here)):
            with pytest.raises(RuntimeError, match="same device"):
                mixing()
        with pytest.raises(TypeError):
            here.numpy()
        assert (here + torch.tensor(1.0)).is_cuda and here.to(there).tolist() == (here.cpu() + 0).tolist() == [1] * 3


WAITING = {"to device": [lambda t: t.copy_(torch.ones(3)), lambda t: torch.tensor(1, device="cuda"),
                         lambda t: torch.ones(3).to(t), lambda t: t[torch.tensor([0])]],
           "to host": [lambda t: t.tolist(), lambda t: t.cpu(), lambda t: torch.ones(3).copy_(t)],
           "numbers": [lambda t: t.sum().item(), lambda t: bool(t[0]), lambda t: t.nonzero(), lambda t: t[t > 0]]}


@pytest.mark.parametrize("reason", WAITING)
def test_what_waits_is_counted_and_fails_in_a_recording(reason):
    with fake_gpu() as gpu:
        t = torch.ones(3, device="cuda") * 2
        assert not gpu.counts
        for number, wait in enumerate(WAITING[reason], 1):
            wait(t)
            assert gpu.counts == {reason: number}
        for wait in WAITING[reason]:
            with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
                wait(t)


def test_a_recording_computes_nothing_and_a_replay_reads_the_same_memory():
    with fake_gpu():
        graph, total, one = torch.cuda.CUDAGraph(), torch.zeros(2, device="cuda"), torch.ones(2, device="cuda")
        with torch.cuda.graph(graph):
            total += one
            double = (total + 0) * 2
        assert total.tolist() == [0, 0] and double.isnan().all()
        for count in (1, 2):
            graph.replay()
            assert total.tolist() == [count] * 2 and double.tolist() == [2 * count] * 2
        one.fill_(5)
        graph.replay()
        assert total.tolist() == [7, 7] and double.tolist() == [14, 14]
        one = torch.ones(2, device="cuda")
        with pytest.raises(RuntimeError, match="freed"):
            graph.replay()
        assert torch.empty(2, device="cuda").isnan().all()


# ------------------------------------------------------------------------------------------ the check of a real GPU

@pytest.mark.parametrize("row", ["decode 1", "train", "grpo", "svd", "toy"])
def test_rows_of_the_check_run_on_the_device(row, monkeypatch):
    """In the sizes for a CPU. Limits, kernels and compiling are left out: a pretended device has none."""
    monkeypatch.setattr(bench, "device_limits", lambda device, dtype: (1e12, 1e15))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(gpu_check, "is_small", lambda device: True)
    with fake_gpu() as gpu:
        figures = gpu_check.ROWS[row](torch.device("cuda", 0), "toy")
    assert figures and (row in ("train", "svd") or gpu.counts["replays"] > 0)
