"""compile_model: the same gradient from few compiled blocks, the same tokens from one compiled decode step."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.exc import TritonMissing

import eval_math
import grpo
import model
import sample
import sft
import tinylora
from configurator import UserError, configure

# torch.compile itself looks at such gradients, and makes an object of a Function
TORCHS_OWN = "ignore:The .grad attribute of a Tensor", "ignore:.*should not be instantiated"


def rows_of_many_lengths(batches=8):
    """Micro-batches of 1 to 6 rows, no two of the same length."""
    rng = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(5, 200, (length,), generator=rng).tolist()

    return [[grpo.Row(ids(4 + i), ids(3 * b + i + 1), [-1.0] * (3 * b + i + 1), 0.5 - i % 2)
             for i in range((1, 3, 1, 2, 4, 6, 2, 1)[b])] for b in range(batches)]


def gradients(net, tokenizer, parameters, cfg):
    out = []
    for rows in rows_of_many_lengths():
        for p in parameters:
            p.grad = None
        grpo.accumulate_gradient(net, tokenizer, rows, cfg, 9, 100)
        out.append(torch.cat([p.grad.flatten() for p in parameters]))
    return torch.stack(out)


@pytest.mark.filterwarnings(*TORCHS_OWN)
@pytest.mark.parametrize("method, most", [("tinylora", 6), ("full", 2)])
def test_few_blocks_are_compiled_and_give_the_same_gradient(net, tokenizer, method, most):
    """tinylora: one row or more, the first layer or another, and without gradients for the reference of the KL term."""
    cfg = SimpleNamespace(objective="grpo", temperature=1.0, micro_batch_tokens=10**6, max_new_tokens=40, tis_cap=0.0,
                          clip_low=0.0, clip_high=0.0, kl_coef=0.1 if method == "tinylora" else 0.0, packing=False)
    if method == "tinylora":
        parameters = list(tinylora.add_adapter(net, rank=2, u=3, n_tie=2).parameters())
        torch.nn.init.normal_(parameters[0], std=0.1, generator=torch.Generator().manual_seed(0))
    else:
        parameters = list(net.requires_grad_(True).parameters())
    plain, compiled = gradients(net, tokenizer, parameters, cfg), []

    def backend(graph, inputs):
        compiled.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    model.compile_model(net, backend)
    assert torch.allclose(gradients(net, tokenizer, parameters, cfg), plain, rtol=1e-5, atol=1e-6)
    assert 0 < len(compiled) <= most and plain.norm() > 0


def test_one_decode_step_is_compiled_and_gives_the_same_tokens(net, tokenizer, monkeypatch):
    """One for every number of rows down to the last, every length, slots that refill, greedy or not, another v."""
    adapter, compiled = tinylora.add_adapter(net, rank=2, u=3), []
    monkeypatch.setattr(tinylora, "LARGE", 0)  # then 8 to 32 rows take another way where nothing is compiled
    monkeypatch.setattr(tokenizer, "stop_ids", set(range(0, 512, 32)))

    def samples():
        out = []
        for prompts, n, tokens, temperature, slots, v in (
                ([[7, 8, 9], [5] * 20], 3, 30, 1.0, 512, 0.0), ([[5]], 2, 9, 1.0, 512, 0.1),
                ([[6] * 9, [4, 5], [7] * 30], 5, 50, 0.0, 4, 0.1), ([[8, 9]] * 7, 1, 20, 0.5, 3, 0.2)):
            torch.nn.init.constant_(adapter.v, v)
            monkeypatch.setattr(sample, "fitting_rows", lambda model, length, rows, slots=slots: min(rows, slots))
            out += sum(sample.generate(net, tokenizer, prompts, n, tokens, temperature), [])
        return out

    def backend(graph, inputs):
        compiled.append(graph)
        return aot_eager(graph, inputs)

    plain = samples()
    torch._dynamo.reset()
    model.compile_model(net, backend)
    fused = samples()
    assert [c.ids for c in fused] == [c.ids for c in plain] and len(compiled) == 1
    for a, b in zip(fused, plain):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    assert len({len(c.ids) for c in plain}) > 9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_the_real_compiler_gives_the_same_tokens(net, tokenizer):
    tinylora.add_adapter(net, rank=2, u=3)
    plain = sample.generate(net, tokenizer, [[7, 8, 9], [5] * 20], 3, 30)
    torch._dynamo.reset()
    model.compile_model(net)
    fused = sample.generate(net, tokenizer, [[7, 8, 9], [5] * 20], 3, 30)
    assert [[c.ids for c in group] for group in fused] == [[c.ids for c in group] for group in plain]


@pytest.mark.filterwarnings(*TORCHS_OWN)
@pytest.mark.parametrize("script, packing", [(grpo, False), (grpo, True), (sft, False), (sft, True)])
def test_a_run_with_compile_learns_what_one_without_does(checkpoint, problems, tmp_path, script, packing, monkeypatch):
    calls = []
    monkeypatch.setattr(eval_math, "score", lambda text, *_: {"strict": len(text) % 2 == 0, "lenient": False})
    monkeypatch.setattr(script, "compile_model", lambda net: (calls.append(net), model.compile_model(net, "eager")))
    options = dict(model=checkpoint, dataset=problems, eval_dataset="", max_steps=1, batch_size=3, device="cpu",
                   max_new_tokens=5, rank=2, recompute=True, group_size=4)
    vectors = []
    for compile in (False, True):
        torch._dynamo.reset()
        known = vars(script).keys() & options.keys()
        script.train(configure(vars(script), [f"--{key}={options[key]}" for key in known] + [
            f"--compile={compile}", f"--packing={packing}", f"--out_dir={tmp_path / str(compile)}"]))
        vectors.append(load_file(tmp_path / str(compile) / "adapter.safetensors")["v"])
    assert torch.allclose(*vectors, rtol=1e-4, atol=1e-6) and vectors[0].any() and len(calls) == 1


@pytest.mark.parametrize("error, reason", [(OSError("no compiler here"), "no compiler here"),
                                           (TritonMissing(None), "Cannot find a working triton")])
def test_a_compiler_that_fails_is_named(net, tokenizer, error, reason):
    def backend(graph, inputs):
        raise error

    torch._dynamo.reset()
    model.compile_model(net, backend)
    with pytest.raises(UserError, match=f"{reason}.*--compile=False"):
        net(torch.tensor([[5, 6, 7], [8, 9, 10]]))
    with pytest.raises(UserError, match=f"{reason}.*--compile=False"):
        sample.generate(net, tokenizer, [[5, 6, 7]], 2, 4)
