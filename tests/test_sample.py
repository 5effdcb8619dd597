"""sample.py: what is sampled does not depend on how it is batched, and its log-probs are the model's."""

import io
import json
import re
import shutil
import sys
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_refused, make_checkpoint, run_script

import model
import sample
import tinylora
from support import UserError, fused
from support.fused import sampling_form

RAGGED = ["Tom has 3 apples. " * (1 + i % 5) + "How many?" * (i % 3) + chr(97 + i % 26) for i in range(32)]
PROMPTS = ["Tom has 3 apples.", "How many?", "Ann has 12 coins. Ann finds 7 more. Then the number doubles.", "x"]
OFTEN = frozenset(range(0, 512, 16))  # stop tokens with which rows of many lengths come out


def ids_of(groups):
    return [[c.ids for c in group] for group in groups]


def with_slots(monkeypatch, slots):
    monkeypatch.setattr(sample, "fitting_rows", lambda *_: slots)


# ---------------------------------------------------------------------------------------- the tokens are the model's


def test_greedy_equals_transformers(net, tokenizer, checkpoint):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    reference = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for prompt, [ours] in zip(RAGGED, sample.generate(net, tokenizer, RAGGED, max_new_tokens=40, temperature=0)):
        ids = torch.tensor([tokenizer.encode(prompt)])
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        assert ours.ids == out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("settings", [None, dict(u=5), dict(u=3, targets="q_proj,up_proj"), dict(method="lora")])
def test_logprobs_are_those_of_a_fresh_forward_pass(net, tokenizer, temperature, settings):
    if settings:
        for p in tinylora.add_adapter(net, **settings).parameters():
            torch.nn.init.normal_(p, std=0.1)
    prompts = [tokenizer.encode(p) for p in PROMPTS]
    groups = sample.generate(net, tokenizer, prompts, n=4, max_new_tokens=40, temperature=temperature)
    for prompt, group in zip(prompts, groups):
        for c in group:
            with torch.no_grad():
                logits = net(torch.tensor([prompt + c.ids]))[0, len(prompt) - 1 : -1]
            expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(c.ids)[:, None])[:, 0]
            assert (expected - torch.tensor(c.logprobs)).abs().max() <= 1e-5


def test_every_token_of_a_row_is_drawn_with_a_random_number_of_its_own(net, tokenizer, monkeypatch):
    """Plain forward passes and the numbers of (seed, prompt, sample), one position after the other."""
    monkeypatch.setattr(tokenizer, "stop_ids", {511})
    [group] = sample.generate(net, tokenizer, [[7, 8, 9]], 3, 12, 0.8, 5, prompt_ids=[40])
    for j, c in enumerate(group):
        uniforms, ids = torch.from_numpy(sample.row_uniforms(5, 40, j, 12)), [7, 8, 9]
        for token, u in zip(c.ids, uniforms):
            with torch.no_grad():
                [drawn], _ = sample.sample_tokens(net(torch.tensor([ids]))[:, -1], u[None], 0.8)
            assert token == drawn
            ids.append(token)
    assert len({u for j in range(3) for u in sample.row_uniforms(5, 40, j, 12).tolist()}) == 36
    others = [sample.row_uniforms(*key, 12).tolist() for key in ((6, 40, 0), (5, 41, 0), (5, 39, 1), (40, 5, 0))]
    assert sample.row_uniforms(5, 40, 0, 12).tolist() not in others


@pytest.mark.parametrize("form", ["joined", "packed", "short of memory"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [None, dict(u=3), dict(u=3, n_tie=2, targets="mlp"),
                                      dict(method="lora", rank=4)])
def test_the_sampling_form_computes_what_the_model_computes(checkpoint, monkeypatch, form, dtype, settings):
    """In bfloat16 to the bit, as it rounds where the trainer rounds."""
    if form == "short of memory":
        monkeypatch.setattr(fused, "free_memory", lambda device: 0)
    net = model.load_model(checkpoint, dtype, "cpu")
    if settings:
        for p in tinylora.add_adapter(net, **settings).parameters():
            torch.nn.init.normal_(p, std=0.3)
    ids = torch.randint(0, 500, (3, 9))
    with torch.no_grad():
        expected = net(ids)
        with sampling_form(net, join_below=10**9 if form == "joined" else 0):
            assert net.model.layers[0].mlp.down_proj.fused.weight.is_mkldnn == (form == "packed")
            error = (net.logits(net.model(ids)) - expected).abs().max()
        assert error < 1e-5 * expected.abs().max() if dtype == "float32" else error == 0
        assert torch.equal(net(ids), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("one_a_row", [False, True])
def test_packed_weights_sample_what_plain_ones_sample(checkpoint, tokenizer, monkeypatch, dtype, one_a_row):
    net, packed = model.load_model(checkpoint, dtype, "cpu"), []
    vectors = tinylora.add_adapter(net, u=3).v.new_tensor([[[0.0] * 3], [[2.0, -3.0, 1.0]]]) if one_a_row else None
    monkeypatch.setattr(fused, "pack", lambda weight, real=fused.pack: (packed.append(1), real(weight))[1])

    def sampled(join_below):
        monkeypatch.setattr(sample, "sampling_form", partial(sampling_form, join_below=join_below))
        groups = sample.generate(net, tokenizer, PROMPTS, 3, 30, adapters=vectors)
        return [c.ids for group in groups for c in group], [x for group in groups for c in group for x in c.logprobs]

    plain_ids, plain = sampled(10**9)
    assert not packed
    ids, logprobs = sampled(0)
    assert len(packed) == 4 * net.config.num_hidden_layers + 1  # the head
    assert ids == plain_ids
    assert logprobs == pytest.approx(plain, abs=1e-5)


def test_attention_may_lie_in_memory_as_a_gpu_lays_it(net, tokenizer, monkeypatch):
    """The kernels that take a mask put the queries before the heads."""
    expected = sample.generate(net, tokenizer, [[7, 8, 9], [5] * 9], 3, 9)
    kernel = torch.nn.functional.scaled_dot_product_attention

    def as_on_a_gpu(*arguments, **options):
        return kernel(*arguments, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", as_on_a_gpu)
    assert sample.generate(net, tokenizer, [[7, 8, 9], [5] * 9], 3, 9) == expected


# ------------------------------------------------------------------------------- batches, slots, processes, adapters


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_a_batch_equals_one_by_one(net, tokenizer, temperature):
    options = dict(n=3, max_new_tokens=30, temperature=temperature, seed=11)
    together = ids_of(sample.generate(net, tokenizer, PROMPTS, **options))
    for i, prompt in enumerate(PROMPTS):
        assert ids_of(sample.generate(net, tokenizer, [prompt], prompt_ids=[i], **options)) == [together[i]]
    different = len({tuple(ids) for group in together for ids in group})
    assert different == (12 if temperature else 4)


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_refilled_slots_give_the_same_tokens_as_one_slot_a_row(net, tokenizer, monkeypatch, slots):
    monkeypatch.setattr(tokenizer, "stop_ids", OFTEN)
    options = dict(n=5, max_new_tokens=30, seed=4)
    once = ids_of(sample.generate(net, tokenizer, PROMPTS, **options))
    assert len({len(ids) for group in once for ids in group}) > 3  # slots become free at different times
    with_slots(monkeypatch, slots)
    assert ids_of(sample.generate(net, tokenizer, PROMPTS, **options)) == once


def test_a_decode_step_never_waits_for_the_device(net):
    """On fake tensors, which have no numbers, any look at one raises: so the step can be recorded as a CUDA graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        sampler = sample.Sampler(net, 4, 30)
        sampler.options = 0.7, 9, 0.9
        ids, _ = sampler.compute(4, 16)
        assert ids.shape == (4,)
        with pytest.raises(RuntimeError):
            ids.sum().item()  # such a look


@pytest.fixture
def passes(net, monkeypatch):
    """The shapes of the ids in the forward passes of `net`: of prompts, and of decode steps."""
    prefills, steps, forward = [], [], net.model.forward

    def counting(ids, positions=None, cache=None):
        (prefills if positions is None else steps).append(tuple(ids.shape))
        return forward(ids, positions, cache)

    monkeypatch.setattr(net.model, "forward", counting)
    return prefills, steps


def test_a_prompt_is_prefilled_once_and_no_step_computes_a_row_that_has_stopped(net, tokenizer, monkeypatch, passes):
    """40 rows of 5 prompts in 8 slots."""
    monkeypatch.setattr(tokenizer, "stop_ids", OFTEN)
    with_slots(monkeypatch, 8)
    groups = sample.generate(net, tokenizer, ["Tom has.", "x y", "How many?", "a b c d", "so"], n=8, max_new_tokens=60)
    lengths = [len(c.ids) for group in groups for c in group]
    prefills, steps = ([rows for rows, _ in shapes] for shapes in passes)
    assert sum(prefills) == 5 and sum(steps) == sum(lengths)
    assert len(steps) <= sum(lengths) / 8 + max(lengths) and steps == sorted(steps, reverse=True)


def test_prompts_are_prefilled_in_batches_that_the_memory_bears(net, tokenizer, monkeypatch, passes):
    sample.generate(net, tokenizer, [[5] * 500] * 40, n=4, max_new_tokens=2)
    assert passes[0] == [(16, 500), (16, 500), (8, 500)]  # at most 8,192 tokens
    with_slots(monkeypatch, 4)
    sample.generate(net, tokenizer, [[5] * 11] * 9, n=2, max_new_tokens=2)
    assert passes[0][3:] == [(1, 11)] * 9  # at most an eighth of the cache


def test_every_row_can_run_with_an_adapter_of_its_own(net, checkpoint, tokenizer, monkeypatch):
    texts, alone, options = ["hex:3c23d70a"], [], dict(n=2, max_new_tokens=12, seed=3)
    for v in (0.1, 0.3):
        other = model.load_model(checkpoint, device="cpu")
        torch.nn.init.constant_(tinylora.add_adapter(other, u=2, n_tie=3).v, v)
        texts.append(tinylora.adapter_text(other.adapter))
    for text in (*texts, ""):
        other = model.load_model(checkpoint, device="cpu")
        if text:
            tinylora.load_adapter(other, text)
        alone += ids_of(sample.generate(other, tokenizer, ["Tom has"], **options))
    with_slots(monkeypatch, 3)  # so that slots pass from one adapter to another
    groups = sample.generate(net, tokenizer, ["Tom has"] * 4, prompt_ids=[0] * 4, adapters=[*texts, ""], **options)
    assert ids_of(groups) == alone and len({str(group) for group in alone}) > 1
    assert net.adapter is None
    adapter = tinylora.add_adapter(net)
    net(torch.tensor([[1, 2]])).sum().backward()  # nothing of it was made for inference only
    assert adapter.v.grad.abs().sum() > 0


@pytest.mark.parametrize("count", [1, 3])
def test_two_processes_that_share_the_weights_answer_as_one(checkpoint, tmp_path, count):
    """With one prompt the second process has nothing to do but empty passes; with three, the first has more."""
    (tmp_path / "prompts").write_text("".join(f"{prompt}\n" for prompt in PROMPTS[:count]))
    script = ["sample.py", f"--model={checkpoint}", f"--prompt_file={tmp_path}/prompts", "--n=2", "--max_new_tokens=9"]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--"]
    answers = []
    for done in (run_script(*script), run_script(*torchrun, *script, "--shard=2", "--device=cpu")):
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if "; command line)" not in line]
        answers.append(lines[:-1])  # without the speed
    assert answers[0] == answers[1] and answers[0].count("---") == 2 * count


def test_a_model_that_processes_share_is_sampled_as_it_is(net, tokenizer, monkeypatch):
    """No second form of its weights, no compiled step, all processes in step, and no adapter for each row."""
    expected, entered = sample.generate(net, tokenizer, ["x"], 2, 9), []

    @contextmanager
    def entering(model):
        entered.append(model)
        yield

    monkeypatch.setattr(sample, "in_step", entering)
    monkeypatch.setattr(sample, "sampling_form", None)
    monkeypatch.setattr(sample, "compiled_decode", None)
    net.is_sharded = net.compile_decode = True
    assert ids_of(sample.generate(net, tokenizer, ["x"], 2, 9)) == ids_of(expected)
    assert sample.generate(net, tokenizer, []) == [] and entered == [net, net]
    with pytest.raises(UserError, match="shard = 1"):
        sample.generate(net, tokenizer, ["x", "y"], adapters=["hex:3c23d70a", ""])


# ---------------------------------------------------------------------------------------------------- one token


def test_tokens_follow_the_distribution():
    """Inverse CDF over 20,000 uniforms against the softmax itself: chi-square with 9 degrees of freedom."""
    torch.manual_seed(0)
    logits = torch.randn(1, 10).expand(20000, 10)
    ids, logprobs = sample.sample_tokens(logits, torch.rand(20000), 0.5)
    p = torch.softmax(logits[0] / 0.5, 0)
    counts = torch.bincount(ids, minlength=10)
    assert ((counts - 20000 * p) ** 2 / (20000 * p)).sum() < 27.9  # p = 0.001
    assert torch.allclose(logprobs, p[ids].log(), atol=1e-5)


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).expand(3, 5)
    ids, _ = sample.sample_tokens(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert ids.tolist() == [1, 3, 3]
    torch.manual_seed(0)  # a thousand probabilities add up to a little less than 1
    logits = torch.cat((torch.randn(200, 1000), torch.full((200, 9), -torch.inf)), 1)
    u = torch.full((200,), 1 - 2**-24)
    assert (torch.softmax(logits, -1).cumsum(-1)[:, -1] < u).any()
    ids, logprobs = sample.sample_tokens(logits, u)
    assert (ids < 1000).all() and logprobs.isfinite().all()
    ids, _ = sample.sample_tokens(torch.full((2, 5), torch.nan), torch.tensor([0.1, 0.9]))
    assert (ids < 5).all()  # the trainer reports it


def test_log_probs_are_in_32_bits_and_of_the_whole_distribution_where_greedy():
    torch.manual_seed(0)
    logits, uniforms = torch.randn(40, 1000).bfloat16(), torch.rand(40)
    (ids, logprobs), exact = (sample.sample_tokens(x, uniforms, 0.7) for x in (logits, logits.float()))
    assert torch.equal(ids, exact[0]) and torch.equal(logprobs, exact[1]) and logprobs.dtype == torch.float32
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    ids, logprobs = sample.sample_tokens(logits, torch.zeros(1), 0.0, top_k=1, top_p=0.5)
    assert ids.tolist() == [1] and torch.allclose(logprobs, logits.log_softmax(-1)[:, 1])


@pytest.mark.parametrize("top_k, top_p", [(1, 1.0), (5, 1.0), (0, 0.6), (20, 0.9), (600, 0.999), (0, 1e-50)])
def test_top_k_and_top_p_leave_the_tokens_that_transformers_leaves(top_k, top_p):
    warpers = pytest.importorskip("transformers", reason="transformers is the oracle here").generation
    torch.manual_seed(0)
    logits = torch.randn(50, 512) * 3
    expected = logits
    if top_k:
        expected = warpers.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = warpers.TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(sample.keep_likeliest(logits, top_k, top_p), expected)
    ids, logprobs = sample.sample_tokens(logits, torch.rand(50), 1.0, top_k, top_p)
    assert torch.allclose(logprobs, expected.log_softmax(-1).gather(1, ids[:, None])[:, 0], atol=1e-5)


# ------------------------------------------------------------------------------------------- what a completion is


def test_a_row_ends_with_the_stop_token_or_is_marked_as_truncated(net, tokenizer):
    [group] = sample.generate(net, tokenizer, ["Tom has"], n=200, max_new_tokens=60, temperature=2.0)
    [stop] = tokenizer.stop_ids
    assert 0 < sum(c.truncated for c in group) < 200  # both kinds occur
    for c in group:
        assert c.ids.count(stop) == (not c.truncated) and (c.truncated or c.ids[-1] == stop)
        assert len(c.ids) == len(c.logprobs) <= 60 and (not c.truncated or len(c.ids) == 60)
        assert "<|im_end|>" not in c.text


@pytest.mark.parametrize("special", [True, False], ids=["stop token special", "stop token plain"])
def test_the_text_is_all_but_the_stop_token_and_special_tokens(net, tokenizer, monkeypatch, special):
    [stop], other, [a, b] = tokenizer.stop_ids, tokenizer.added["<|im_start|>"], tokenizer.encode("a") + [66]
    monkeypatch.setattr(tokenizer, "special_ids", {other, stop} if special else {other})
    for ids, n, text, truncated in [([a, b, a], 3, [a, b, a], True), ([a, b, stop], 3, [a, b], False),
                                    ([a, other, b, stop], 9, [a, b], False), ([stop], 9, [], False)]:
        script = iter(ids)
        monkeypatch.setattr(sample, "sample_tokens", lambda logits, *_, script=script, **__: (
            torch.tensor([next(script)]), torch.zeros(1)))
        [[c]] = sample.generate(net, tokenizer, [[5]], max_new_tokens=n)
        assert (c.ids, c.text, c.truncated) == (ids, tokenizer.decode(text), truncated)


def test_what_is_reported_while_sampling_is_what_is_returned(net, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "stop_ids", OFTEN)
    done, shown = [], {}
    groups = sample.generate(net, tokenizer, PROMPTS, 5, 30, seed=4, on_done=lambda *pair: done.append(pair),
                             on_token=lambda i, j, token: shown.setdefault((i, j), []).append(token))
    assert sorted(done, key=lambda pair: pair[0]) == list(enumerate(groups))  # each prompt once, and complete
    assert shown == {(i, j): c.ids for i, group in enumerate(groups) for j, c in enumerate(group)}


def test_raw_text_begins_with_the_checkpoints_bos(net, tokenizer, monkeypatch):
    options = dict(max_new_tokens=5, temperature=0)
    expected = sample.generate(net, tokenizer, [[9, *tokenizer.encode("Tom has")]], **options)
    monkeypatch.setattr(tokenizer, "bos_ids", [9])
    assert sample.generate(net, tokenizer, ["Tom has"], **options) == expected
    assert sample.encode_prompt(tokenizer, "Tom has", chat=False) == [9, *tokenizer.encode("Tom has")]
    asked = [dict(role="system", content="Be brief."), dict(role="user", content="Tom has")]
    assert sample.encode_prompt(tokenizer, "Tom has") == tokenizer.encode_chat(asked[1:])
    assert sample.encode_prompt(tokenizer, "Tom has", "Be brief.") == tokenizer.encode_chat(asked)


# ------------------------------------------------------------------------------------------------ limits and errors


def test_a_row_stops_at_the_end_of_the_context(net, tokenizer, tmp_path):
    short = model.load_model(make_checkpoint(tmp_path / "short", max_position_embeddings=24), device="cpu")
    groups = sample.generate(short, tokenizer, [[5] * 10, [5] * 22, [5] * 23], n=20, max_new_tokens=50)
    assert [max(len(c.ids) for c in group) for group in groups] == [14, 2, 1]
    [[c]] = sample.generate(net, tokenizer, [[5] * 500], max_new_tokens=10**8, temperature=0)  # would be gigabytes
    assert len(c.ids) <= 12


@pytest.mark.parametrize("prompts, options, words", [
    ([""], {}, "prompt 0 has 0 tokens"), ([[5], [5] * 512], {}, "prompt 1 has 512 tokens.* 1 to 511"),
    (["x"], dict(n=0), "n and max_new_tokens"), (["x"], dict(max_new_tokens=0), "n and max_new_tokens"),
    (["x"], dict(temperature=-1.0), "temperature"), (["x"], dict(temperature=1e-40), "temperature"),
    (["x"], dict(temperature=float("nan")), "temperature"), (["x"], dict(temperature=float("inf")), "temperature"),
    (["x"], dict(seed=-1), "seed"), (["x"], dict(top_k=-1), "top_k"), (["x"], dict(top_p=0.0), "top_p"),
    (["x"], dict(top_p=1.1), "top_p"), (["x"], dict(adapters=["", ""]), "one per prompt"),
])
def test_requests_that_cannot_work(net, tokenizer, prompts, options, words):
    with pytest.raises(UserError, match=words):
        sample.generate(net, tokenizer, prompts, **options)
    assert sample.generate(net, tokenizer, []) == []


def test_the_number_of_slots_follows_the_memory(net, tokenizer, monkeypatch):
    assert sample.fitting_rows(net, 10, 511) == 511 and sample.fitting_rows(net, 10, 5000) == 512
    monkeypatch.setattr(sample, "free_memory", lambda _: 400_000)  # holds a few rows
    assert len(sample.generate(net, tokenizer, ["x"], n=9, max_new_tokens=20)[0]) == 9
    monkeypatch.setattr(sample, "free_memory", lambda _: 50_000)
    for adapters in (None, ["hex:3c23d70a"]):
        with pytest.raises(UserError, match=r"takes .* GB .* at most \d+ tokens .* lower max_new_tokens"):
            sample.generate(net, tokenizer, ["x"], max_new_tokens=200, adapters=adapters)
        assert net.adapter is None


def test_an_interruption_leaves_the_model_as_it_was(net, tokenizer):
    tinylora.add_adapter(net, u=5)
    before = {name: vars(module).keys() | {"fused"} for name, module in net.named_modules()}

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample.generate(net, tokenizer, PROMPTS, max_new_tokens=5, on_token=interrupt)
    after = {name: vars(module) for name, module in net.named_modules()}
    assert {name: module.keys() | {"fused"} for name, module in after.items()} == before
    assert not any(vars(module["fused"]) for module in after.values() if "fused" in module)  # it is kept, but empty
    [[a]] = sample.generate(net, tokenizer, ["x"], max_new_tokens=5, temperature=0)
    torch.nn.init.normal_(net.adapter.v, std=0.5)  # a change of v is seen by the next call
    [[b]] = sample.generate(net, tokenizer, ["x"], max_new_tokens=5, temperature=0)
    assert a.logprobs != b.logprobs


# -------------------------------------------------------------------------------------------------------- the script


@pytest.fixture
def run(monkeypatch, capsys, checkpoint):
    """Run the script in this process: arguments -> what it prints."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which it replaces

    def main(*args):
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--model={checkpoint}", "--device=cpu", *args])
        sample.main()
        return capsys.readouterr().out

    return main


def test_the_script_prints_completions(run, tmp_path):
    out = run("--prompt=a=b", "--n=2", "--max_new_tokens=5")
    assert out.count(" [cut off]\n---\n") == 2 and re.search(r"\n10 tokens, \d+\.\d a second\n$", out)
    (tmp_path / "prompts").write_bytes("\ufeffHow many?\r\n\r\nWho?\r\n".encode())
    out = run(f"--prompt_file={tmp_path}/prompts", "--max_new_tokens=5")
    assert re.findall("### (.*)\n", out) == ["How many?", "Who?"]
    asked = "--prompt=Who?", "--n=2", "--max_new_tokens=5"
    out = run("--adapter=,hex:3c23d70a", *asked)
    assert re.findall("=== (.*)\n", out) == ["no adapter", "hex:3c23d70a"]
    alone = run(*asked).partition("### Who?\n")[2].rpartition("---")[0]
    assert f"=== no adapter\n{alone}" in out


@pytest.mark.parametrize("args, words", [
    (["--prompt_file=nowhere"], "nowhere cannot be read"),
    (["--prompt=-", "--n=2"], "a chat"), (["--prompt=-", "--adapter=,a"], "a chat"),
    (["--prompt=-", "--chat=False"], "chat template"), (["--system_prompt=Hi", "--chat=False"], "chat template"),
    (["--prompt=-", "--model=PLAIN"], "chat template"), (["--system_prompt=Hi", "--model=PLAIN"], "chat template"),
    (["--top_p=2", "--model=nowhere"], "top_p"),  # is noticed before the model is loaded
    (["--adapter=hex:00"], "mistyped or cut off"),
])
def test_settings_that_the_script_refuses(run, checkpoint, tmp_path, args, words):
    plain = tmp_path / "PLAIN"  # without a chat template
    shutil.copytree(checkpoint, plain)
    file = plain / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "chat_template"}))
    args = [arg.replace("PLAIN", str(plain)) for arg in args]
    with pytest.raises(UserError, match=words):
        run(*args)


@pytest.mark.parametrize("arg", ["--prompt=-", "--adapter=,a"])
def test_a_chat_and_several_adapters_take_a_single_process(run, monkeypatch, arg):
    monkeypatch.setattr(sample, "Ranks", lambda *_: SimpleNamespace(dp_size=2))
    with pytest.raises(UserError, match="a single process"):
        run(arg)


def test_an_error_is_one_line(tmp_path):
    assert_refused(run_script(ROOT / "sample.py", "--model=nowhere", cwd=tmp_path), "no model directory at 'nowhere'")


def test_a_reply_is_printed_as_it_grows(net, tokenizer, monkeypatch, capsys):
    """A character of several tokens appears when it is complete."""
    text = "Zo\u00eb \u65e5\u672c \U0001f642!"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    shown = []

    def generate(*_, on_token, **__):
        for token in ids:
            on_token(0, 0, token)
            shown.append(capsys.readouterr().out)

    monkeypatch.setattr(sample, "generate", generate)
    assert sample.reply(net, tokenizer, [{"role": "user", "content": "?"}], {}) == text
    assert "".join(shown) == text and len([part for part in shown if part]) > 5


@pytest.fixture(scope="module")
def toy():
    return model.load_model(ROOT / "toy/base", device="cpu"), model.load_tokenizer(ROOT / "toy/base")


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_chat_remembers_what_was_said(toy, monkeypatch, capsys, interrupted):
    """Ctrl-C ends an answer and not the chat: what was sampled so far is remembered, too."""
    lines, asked = "Tom has 3 apples. Tom finds 4 more. How many apples are there now?\nWhy?\n\n", []
    generate, answers = sample.generate, []

    def asking(net, tokenizer, prompts, prompt_ids, on_token, **options):
        def counting(i, j, token):
            on_token(i, j, token)
            answers[-1].append(token)
            if interrupted and len(answers) == 1 and len(answers[0]) == 4:
                raise KeyboardInterrupt

        answers.append([])
        asked.append((tokenizer.decode(prompts[0]), prompt_ids))
        return generate(net, tokenizer, prompts, prompt_ids=prompt_ids, on_token=counting, **options)

    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    monkeypatch.setattr(sample, "generate", asking)
    sample.converse(*toy, "Answer at once.", dict(max_new_tokens=20, temperature=0.0, seed=3, top_k=9, top_p=0.9))
    [(first, a), (second, b)] = asked
    said = toy[1].decode(answers[0], skip_special=True)
    assert second.startswith(first) and said and said in second[len(first) :] and "Why?" in second and a != b
    assert "Answer at once." in first and (len(answers[0]) == 4) == interrupted
    assert re.search(r"\[\d+ tokens, \d+\.\d a second\]", capsys.readouterr().out)
