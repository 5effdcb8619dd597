"""sample.py: what is sampled does not depend on how it is batched, and its log-probs are the model's."""

import re
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_refused, make_checkpoint
from forks import fork_script

import grpo
import model
import sample
import tinylora
from configurator import UserError

RAGGED = ["Tom has 3 apples. " * (1 + i % 5) + "How many?" * (i % 3) + chr(97 + i % 26) for i in range(32)]
PROMPTS = ["Tom has 3 apples.", "How many?", "Ann has 12 coins. Ann finds 7 more. Then the number doubles.", "x"]


def test_greedy_equals_transformers(net, tokenizer, checkpoint):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    reference = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for prompt, [ours] in zip(RAGGED, sample.generate(net, tokenizer, RAGGED, max_new_tokens=40, temperature=0)):
        ids = torch.tensor([tokenizer.encode(prompt)])
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        assert ours.ids == out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def toy():
    return model.load_model(ROOT / "toy/base", device="cpu"), model.load_tokenizer(ROOT / "toy/base")


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_a_batch_equals_one_by_one(net, tokenizer, temperature):
    options = dict(n=3, max_new_tokens=30, temperature=temperature, seed=11)
    together = sample.generate(net, tokenizer, PROMPTS, **options)
    for i, prompt in enumerate(PROMPTS):
        [alone] = sample.generate(net, tokenizer, [prompt], prompt_ids=[i], **options)
        assert [c.ids for c in alone] == [c.ids for c in together[i]]
    if temperature:
        assert len({tuple(c.ids) for group in together for c in group}) == 12  # samples differ
    else:
        assert all(a.ids == b.ids for a, b, _ in together)


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_refilled_slots_give_the_same_tokens_as_one_slot_a_row(net, tokenizer, monkeypatch, slots):
    monkeypatch.setattr(tokenizer, "stop_ids", set(range(0, 512, 16)))
    options = dict(n=5, max_new_tokens=30, seed=4)
    once = sample.generate(net, tokenizer, PROMPTS, **options)
    assert len({len(c.ids) for group in once for c in group}) > 3  # ragged lengths: slots free at different times
    monkeypatch.setattr(sample, "fitting_rows", lambda *_: slots)
    refilled = sample.generate(net, tokenizer, PROMPTS, **options)
    assert [[c.ids for c in group] for group in refilled] == [[c.ids for c in group] for group in once]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("adapted", [False, True])
def test_sampler_logprobs_are_the_trainers(net, tokenizer, temperature, adapted):
    if adapted:
        tinylora.add_adapter(net, u=5, n_tie=0)
        torch.nn.init.normal_(net.adapter.v, std=0.3)
    prompts = [tokenizer.encode(p) for p in PROMPTS]
    groups = sample.generate(net, tokenizer, prompts, n=4, max_new_tokens=40, temperature=temperature)
    rows = [grpo.Row(p, c.ids, c.logprobs, 0.0) for p, group in zip(prompts, groups) for c in group]
    with torch.no_grad():
        logp, _, mask = grpo.completion_logprobs(net, tokenizer, rows, temperature)
    for row, line in zip(rows, logp):
        assert (line[: len(row.ids)] - torch.tensor(row.sampler_logprobs)).abs().max() <= 1e-5
    assert mask.sum() == sum(len(row.ids) for row in rows)


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


def test_a_prompt_is_done_once_when_all_of_its_rows_are(net, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "stop_ids", set(range(0, 512, 16)))
    done = []
    groups = sample.generate(net, tokenizer, PROMPTS, 5, 30, seed=4, on_done=lambda *pair: done.append(pair))
    assert sorted(done, key=lambda pair: pair[0]) == list(enumerate(groups))
    assert any(len(c.ids) > len(group[-1].ids) for group in groups for c in group)  # the last to start ends before


def test_raw_text_begins_with_the_checkpoints_bos(net, tokenizer, monkeypatch):
    options = dict(max_new_tokens=5, temperature=0)
    expected = sample.generate(net, tokenizer, [[9, *tokenizer.encode("Tom has")]], **options)
    monkeypatch.setattr(tokenizer, "bos_ids", [9])
    assert sample.generate(net, tokenizer, ["Tom has"], **options) == expected
    assert sample.encode_prompt(tokenizer, "Tom has", chat=False) == [9, *tokenizer.encode("Tom has")]
    assert sample.encode_prompt(tokenizer, "Tom has") == tokenizer.encode_chat([dict(role="user", content="Tom has")])


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


def test_every_token_of_a_row_is_drawn_with_a_uniform_of_its_own(net, tokenizer, monkeypatch):
    """The plain forward pass and the uniforms of (seed, prompt, sample), a position after the other."""
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


def test_logits_in_16_bits_are_drawn_from_in_32():
    torch.manual_seed(0)
    logits, uniforms = torch.randn(40, 1000).bfloat16(), torch.rand(40)
    ids, logprobs = sample.sample_tokens(logits, uniforms, 0.7)
    exact_ids, exact = sample.sample_tokens(logits.float(), uniforms, 0.7)
    assert torch.equal(ids, exact_ids) and torch.equal(logprobs, exact) and logprobs.dtype == torch.float32


def test_what_rounding_leaves_of_the_total_goes_to_no_token():
    """A thousand probabilities add up to a little less than 1, and behind them stand tokens that cannot be."""
    torch.manual_seed(0)
    logits = torch.cat((torch.randn(200, 1000), torch.full((200, 9), -torch.inf)), 1)
    u = torch.full((200,), 1 - 2**-24)
    assert (torch.softmax(logits, -1).cumsum(-1)[:, -1] < u).any()
    ids, logprobs = sample.sample_tokens(logits, u)
    assert (ids < 1000).all() and logprobs.isfinite().all()
    ids, _ = sample.sample_tokens(torch.full((2, 5), torch.nan), torch.tensor([0.1, 0.9]))
    assert (ids < 5).all()  # the trainer reports it


def test_greedy_log_probs_are_those_of_the_whole_distribution():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    ids, logprobs = sample.sample_tokens(logits, torch.zeros(1), 0.0, top_k=1, top_p=0.5)
    assert ids.tolist() == [1] and torch.allclose(logprobs, logits.log_softmax(-1)[:, 1])


def test_ranks_that_share_the_weights_take_the_first_ones_tokens(net, tokenizer):
    net.shard = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, least=lambda budget: budget,
                                follow=lambda token, logprob: (token.fill_(7), logprob.fill_(-0.5)))
    [[c]] = sample.generate(net, tokenizer, [[5, 6]], max_new_tokens=4)
    assert c.ids == [7] * 4 and c.logprobs == [-0.5] * 4


def test_prompts_are_prefilled_in_batches_that_memory_bears_and_forgotten_after(net, tokenizer, monkeypatch):
    sizes, samplers, forward, init = [], [], net.model.forward, sample.Sampler.__init__

    def counting(ids, positions=None, cache=None):
        if positions is None:
            sizes.append(ids.numel())
        return forward(ids, positions, cache)

    monkeypatch.setattr(net.model, "forward", counting)
    monkeypatch.setattr(sample.Sampler, "__init__", lambda self, *a: (samplers.append(self), init(self, *a))[1])
    sample.generate(net, tokenizer, [[5] * 501] * 40, n=2, max_new_tokens=2)
    assert sizes == [16 * 500, 16 * 500, 8 * 500]  # at most 8,192
    assert not samplers[0].prefilled
    sizes.clear()
    monkeypatch.setattr(sample, "fitting_rows", lambda *_: 4)
    sample.generate(net, tokenizer, [[5] * 11] * 9, n=2, max_new_tokens=2)
    assert max(sizes) <= 3 * 10  # no more than the slots may soon need


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


def test_a_decode_step_never_waits_for_the_device(net, tokenizer):
    """On fake tensors, which have no numbers, any look at one raises: so the step can be recorded as a CUDA graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        draw = partial(sample.sample_tokens, temperature=0.7, top_k=9, top_p=0.9)
        sampler = sample.Sampler(net, tokenizer, 4, 30, 20, draw)
        sampler.step(4, 16)
        with pytest.raises(RuntimeError):
            sampler.state.logprobs.sum().item()  # such a look


def test_the_rows_of_a_group_share_one_prefill_and_short_rows_are_replaced_at_once(net, tokenizer, monkeypatch):
    """40 rows of 5 prompts in 8 slots: 5 prefilled lines, and as many steps as full slots need, plus the last rows'."""
    monkeypatch.setattr(sample, "fitting_rows", lambda *_: 8)
    monkeypatch.setattr(tokenizer, "stop_ids", set(range(0, 512, 16)))
    lines, steps = [], []
    forward, step = net.model.forward, sample.Sampler.step

    def counting(ids, positions=None, cache=None):
        if positions is None:
            lines.append(len(ids))
        return forward(ids, positions, cache)

    monkeypatch.setattr(net.model, "forward", counting)
    monkeypatch.setattr(sample.Sampler, "step", lambda self, B, end: (steps.append(B), step(self, B, end)))
    groups = sample.generate(net, tokenizer, ["Tom has.", "x y", "How many?", "a b c d", "so"], n=8, max_new_tokens=60)
    lengths = [len(c.ids) for group in groups for c in group]
    assert sum(lines) == 5
    assert sum(steps) == sum(lengths)  # no step computes a row that has stopped
    assert len(steps) <= sum(lengths) / 8 + max(lengths)
    assert steps == sorted(steps, reverse=True)


@pytest.mark.parametrize("slots", [3, 8, 20])
def test_recorded_steps_give_the_same_tokens(net, tokenizer, monkeypatch, slots):
    """The schedule of a GPU, with stand-ins for its graphs: shapes rounded up, four steps between looks, and a step
    that is being recorded computes nothing."""
    monkeypatch.setattr(tokenizer, "stop_ids", set(range(0, 512, 16)))
    options = dict(n=5, max_new_tokens=150, seed=4)
    expected = sample.generate(net, tokenizer, PROMPTS, **options)
    recording, graphs, step, init = [], [], sample.Sampler.step, sample.Sampler.__init__

    class Graph:
        def replay(self):
            step(*self.recorded)

    @contextmanager
    def record(graph, pool):
        recording.append(graph)
        yield
        graphs.append(recording.pop())

    def stepping(self, B, end):
        if recording:
            recording[-1].recorded = self, B, end
        else:
            step(self, B, end)

    def starting(self, *arguments):
        init(self, *arguments)
        self.pool = "of a GPU"

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(sample.Sampler, "step", stepping)
    monkeypatch.setattr(sample.Sampler, "__init__", starting)
    monkeypatch.setattr(sample, "fitting_rows", lambda *_: slots)
    replayed = sample.generate(net, tokenizer, PROMPTS, **options)
    assert [[c.ids for c in group] for group in replayed] == [[c.ids for c in group] for group in expected]
    for a, b in zip(replayed, expected):
        assert torch.allclose(torch.tensor(a[0].logprobs), torch.tensor(b[0].logprobs), atol=1e-5)
    assert 1 < len(graphs) < 12
    shown = {}
    sample.generate(net, tokenizer, PROMPTS, **options, on_token=lambda i, j, t: shown.setdefault((i, j), []).append(t))
    assert shown == {(i, j): c.ids for i, group in enumerate(expected) for j, c in enumerate(group)}


def test_an_interruption_leaves_the_model_as_it_was(net, tokenizer):
    tinylora.add_adapter(net, u=5)
    before = {name: set(vars(module)) for name, module in net.named_modules()}

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample.generate(net, tokenizer, PROMPTS, max_new_tokens=5, on_token=interrupt)
    assert {name: set(vars(module)) for name, module in net.named_modules()} == before
    [[a]] = sample.generate(net, tokenizer, ["x"], max_new_tokens=5, temperature=0)
    torch.nn.init.normal_(net.adapter.v, std=0.5)  # a change of v is seen by the next call
    [[b]] = sample.generate(net, tokenizer, ["x"], max_new_tokens=5, temperature=0)
    assert a.logprobs != b.logprobs


@pytest.mark.parametrize("adapted", ["none", "q_proj,up_proj", "all"])
@pytest.mark.parametrize("join_below", [0, 10**9])
def test_the_sampling_form_computes_what_the_model_computes(net, adapted, join_below):
    if adapted != "none":
        tinylora.add_adapter(net, u=3, n_tie=2, targets=adapted)
        torch.nn.init.normal_(net.adapter.v, std=0.3)
    ids = torch.randint(0, 500, (3, 9))
    with torch.no_grad():
        expected = net(ids)
        with tinylora.sampling_form(net, join_below=join_below):
            assert (net(ids) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert torch.equal(net(ids), expected)


@pytest.mark.parametrize("settings", [None, dict(u=3), dict(u=3, targets="mlp"), dict(method="lora", rank=4)])
def test_the_sampling_form_rounds_as_the_trainer_does_in_bfloat16(net, settings):
    net = net.bfloat16()
    if settings:
        for p in tinylora.add_adapter(net, **settings).parameters():
            torch.nn.init.normal_(p, std=0.3)
    ids = torch.randint(0, 500, (3, 9))
    with torch.no_grad():
        expected = net(ids)
        with tinylora.sampling_form(net):
            assert torch.equal(net(ids), expected)


def test_a_failure_while_the_sampling_form_is_made_leaves_nothing(net, monkeypatch):
    tinylora.add_adapter(net)
    before = {name: set(vars(module)) for name, module in net.named_modules()}
    made, real = [], tinylora.Product.take

    def failing(product, *arguments):
        real(product, *arguments)
        made.append(product)
        if len(made) == 5:
            raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(tinylora.Product, "take", failing)
    with pytest.raises(torch.OutOfMemoryError):
        sample.generate(net, SimpleNamespace(stop_ids={1}, pad_id=0), [[5]], max_new_tokens=2)
    assert {name: set(vars(module)) for name, module in net.named_modules()} == before and not net.adapter.frozen
    assert len(made) == 5 and not any(map(vars, made))  # no second copy of the weights


def test_attention_may_lie_in_memory_as_a_gpu_lays_it(net, tokenizer, monkeypatch):
    """The kernels that take a mask put the queries before the heads."""
    expected = sample.generate(net, tokenizer, [[7, 8, 9], [5] * 9], 3, 9)
    kernel = torch.nn.functional.scaled_dot_product_attention

    def as_on_a_gpu(*arguments, **options):
        return kernel(*arguments, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", as_on_a_gpu)
    assert sample.generate(net, tokenizer, [[7, 8, 9], [5] * 9], 3, 9) == expected


def test_the_limit_is_no_larger_than_the_context(net, tokenizer):
    [[c]] = sample.generate(net, tokenizer, [[5] * 500], max_new_tokens=10**8, temperature=0)  # would be gigabytes
    assert len(c.ids) <= 12


def test_too_little_memory_for_one_row_is_refused_with_what_fits(net, tokenizer, monkeypatch):
    monkeypatch.setattr(sample, "free_memory", lambda _: 50_000)
    with pytest.raises(UserError, match=r"needs .* GB .* at most \d+ tokens"):
        sample.generate(net, tokenizer, ["x"], max_new_tokens=200)
    with pytest.raises(UserError, match="needs .* GB"):
        sample.generate(net, tokenizer, ["x"], max_new_tokens=200, adapters=["hex:3c23d70a"])
    assert not hasattr(net, "adapter")
    monkeypatch.setattr(sample, "free_memory", lambda _: 400_000)  # enough for a few rows: slots, not failure
    assert len(sample.generate(net, tokenizer, ["x"], n=9, max_new_tokens=20)[0]) == 9


def test_a_row_stops_at_the_end_of_the_context(tokenizer, tmp_path):
    net = model.load_model(make_checkpoint(tmp_path / "short", max_position_embeddings=24), device="cpu")
    groups = sample.generate(net, tokenizer, [[5] * 10, [5] * 22], n=20, max_new_tokens=50)
    assert max(len(c.ids) for c in groups[0]) == 14 and max(len(c.ids) for c in groups[1]) == 2
    with pytest.raises(UserError, match="prompt 0 has 24 tokens"):
        sample.generate(net, tokenizer, [[5] * 24], max_new_tokens=1)


def test_odd_requests(net, tokenizer):
    assert sample.generate(net, tokenizer, []) == []
    for bad in (dict(n=0), dict(max_new_tokens=0), dict(temperature=-1.0), dict(temperature=1e-40),
                dict(temperature=float("nan"))):
        with pytest.raises(UserError):
            sample.generate(net, tokenizer, ["x"], **bad)
    with pytest.raises(UserError, match="prompt 0 has 0 tokens"):
        sample.generate(net, tokenizer, [""])
    for bad in (dict(seed=-1), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.1), dict(adapters=["", ""])):
        with pytest.raises(UserError):
            sample.generate(net, tokenizer, ["x"], **bad)


def test_the_script_prints_completions_and_refuses_a_missing_model(checkpoint, tmp_path):
    done = fork_script("sample.py", f"--model={checkpoint}", "--prompt=a=b", "--n=2", "--max_new_tokens=5")
    assert done.returncode == 0 and done.stdout.count(" [cut off]\n---") == 2, done.stderr
    assert re.search(r"\d+ tokens, \d+\.\d a second", done.stdout)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("How many?\n\nWho?\n")
    done = fork_script("sample.py", f"--model={checkpoint}", f"--prompt_file={prompts}", "--max_new_tokens=5")
    assert re.findall("### (.*)", done.stdout) == ["How many?", "Who?"], done.stderr
    assert_refused(fork_script("sample.py", "--model=nowhere"), "no model directory at 'nowhere'")
    assert_refused(fork_script("sample.py", f"--model={checkpoint}", "--prompt_file=nowhere"), "prompt_file cannot be")
    assert_refused(fork_script("sample.py", "--prompt=-", "--n=2"), "a talk")
    assert_refused(fork_script("sample.py", "--prompt=-", "--chat=False"), "need the chat template")
    assert_refused(fork_script("sample.py", "--top_p=2", "--model=nowhere"), "top_p in (0, 1]")  # before it is loaded
    prompts.write_text("\n")
    assert_refused(fork_script("sample.py", f"--model={checkpoint}", f"--prompt_file={prompts}"), "holds no prompt")
    assert_refused(fork_script("sample.py", "--adapter=hex:00"), "mistyped or cut off")


def test_a_single_completion_is_streamed_and_equals_the_whole(net, tokenizer, capsys):
    printer = sample.Printer(tokenizer)
    [[c]] = sample.generate(net, tokenizer, ["Zoë"], max_new_tokens=60, seed=3, on_token=printer)
    shown = capsys.readouterr().out
    assert c.text.startswith(shown) and c.text[len(shown) :].strip("\ufffd") == "" and len(shown) > 20


def test_a_character_of_several_tokens_is_shown_when_it_is_whole(tokenizer, capsys):
    text, printer = "Zo\u00eb \u65e5\u672c \U0001f642!", sample.Printer(tokenizer)
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    for token in ids:
        printer(0, 0, token)
    assert capsys.readouterr().out == text


def test_ctrl_c_ends_an_answer_and_not_the_talk(toy, monkeypatch, capsys):
    lines, asked = iter(["How many?", "Why?", ""]), []

    def interrupted(net, tokenizer, prompts, *arguments, prompt_ids, on_token):
        asked.append((tokenizer.decode(prompts[0]), arguments, prompt_ids))
        for token in tokenizer.encode("It is 7"):
            on_token(0, 0, token)
        if len(asked) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(sample, "generate", interrupted)
    cfg = SimpleNamespace(model="toy", system_prompt="", max_new_tokens=20, temperature=0.7, seed=3, top_k=9, top_p=0.9)
    sample.converse(*toy, cfg)
    assert [a[1] for a in asked] == [(1, 20, 0.7, 3, 9, 0.9)] * 2 and asked[0][2] != asked[1][2]
    assert "It is 7" in asked[1][0] and "Why?" in asked[1][0] and "How many?" in asked[1][0]


def test_a_system_prompt_without_a_template_is_refused():
    plain, cfg = SimpleNamespace(template=None), SimpleNamespace(model="base", system_prompt="Be brief.")
    with pytest.raises(UserError, match="base has no chat template, where a system_prompt could stand"):
        sample.check_template(cfg, plain)
    sample.check_template(SimpleNamespace(system_prompt=""), plain)


def test_no_more_than_512_rows_are_sampled_at_a_time(net):
    assert sample.fitting_rows(net, 10, 511) == 511 and sample.fitting_rows(net, 10, 5000) == 512


def test_a_talk_remembers_what_was_said(toy, monkeypatch, capsys):
    lines, asked = iter(["Tom has 3 apples. Tom finds 4 more. How many apples are there now?", "Why?", ""]), []
    generate = sample.generate
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(sample, "generate", lambda net, tok, prompts, *a, **k: (
        asked.append(tok.decode(prompts[0])), generate(net, tok, prompts, *a, **k)))
    cfg = SimpleNamespace(model="toy", system_prompt="Answer at once.", max_new_tokens=20, temperature=0.0, seed=0,
                          top_k=0, top_p=1.0)
    sample.converse(*toy, cfg)
    assert asked[1].startswith(asked[0]) and "Why?" in asked[1] and "####" in asked[1][len(asked[0]) :]
    assert "tokens" in capsys.readouterr().out
