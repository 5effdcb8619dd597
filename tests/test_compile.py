"""compile = True: one compiled decode step for nearly all sizes, and the same tokens."""

from functools import cache, partial

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.exc import TritonMissing

import sample
import tinylora
from support import UserError

REQUESTS = [  # prompts, n, max_new_tokens, temperature, slots, v of the adapter
    ([[7, 8, 9], [5] * 20], 3, 30, 1.0, 512, 0.0), ([[5]], 2, 9, 1.0, 512, 0.1),
    ([[6] * 9, [4, 5], [7] * 30], 5, 50, 0.0, 4, 0.1), ([[8, 9]] * 7, 1, 20, 0.5, 3, 0.2),
]


@pytest.fixture
def compile_with(net, monkeypatch):
    """Have the decode step of `net` compiled by a backend of torch.compile."""
    def start(backend):
        torch._dynamo.reset()
        monkeypatch.setattr(sample, "compiled", cache(partial(torch.compile, backend=backend)))
        net.compile_decode = True

    return start


def samples(net, tokenizer, monkeypatch):
    out = []
    for prompts, n, tokens, temperature, slots, v in REQUESTS:
        torch.nn.init.constant_(net.adapter.v, v)
        monkeypatch.setattr(sample, "fitting_rows", lambda model, length, rows, slots=slots: min(rows, slots))
        out += sum(sample.generate(net, tokenizer, prompts, n, tokens, temperature), [])
    return out


def test_one_decode_step_serves_all_sizes_and_gives_the_same_tokens(net, tokenizer, monkeypatch, compile_with):
    """Every number of rows, every length, slots that refill, greedy or not, another v. Two more are compiled: for a
    single row, and for a single position."""
    tinylora.add_adapter(net, rank=2, u=3)
    monkeypatch.setattr(tokenizer, "stop_ids", set(range(0, 512, 32)))
    plain, sizes = samples(net, tokenizer, monkeypatch), []

    def backend(graph, inputs):
        sizes.append(len(inputs))
        return aot_eager(graph, inputs)

    compile_with(backend)
    fused = samples(net, tokenizer, monkeypatch)
    assert [c.ids for c in fused] == [c.ids for c in plain] and 1 <= len(sizes) <= 3
    for a, b in zip(fused, plain):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    assert len({len(c.ids) for c in plain}) > 9
    compiled = len(sizes)
    sample.generate(net, tokenizer, [[7, 8]], 2, 3, adapters=["hex:3c23d70a"])  # rows with adapters of their own
    assert len(sizes) == compiled


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_the_real_compiler_gives_the_same_tokens(net, tokenizer, monkeypatch, compile_with):
    tinylora.add_adapter(net, rank=2, u=3)
    plain = samples(net, tokenizer, monkeypatch)
    compile_with("inductor")
    fused = samples(net, tokenizer, monkeypatch)
    assert [c.ids for c in fused] == [c.ids for c in plain]


@pytest.mark.parametrize("error, reason", [(OSError("no compiler here"), "no compiler here"),
                                           (TritonMissing(None), "Cannot find a working triton")])
def test_a_compiler_that_fails_is_named(net, tokenizer, compile_with, error, reason):
    def backend(graph, inputs):
        raise error

    compile_with(backend)
    with pytest.raises(UserError, match=f"{reason}.*--compile=False"):
        sample.generate(net, tokenizer, [[5, 6, 7]], 2, 4)
