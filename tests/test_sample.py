"""sample.py: what is sampled does not depend on how it is batched, and its log-probs are the model's."""

import pytest
import torch
from conftest import assert_refused, make_checkpoint, run_script

import grpo
import model
import sample
import tinylora
from configurator import UserError

PROMPTS = ["Tom has 3 apples.", "How many?", "Ann has 12 coins. Ann finds 7 more. Then the number doubles.", "x"]


def test_greedy_equals_transformers(net, tokenizer, checkpoint):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    reference = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for prompt, [ours] in zip(PROMPTS, sample.generate(net, tokenizer, PROMPTS, max_new_tokens=40, temperature=0)):
        ids = torch.tensor([tokenizer.encode(prompt)])
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        assert ours.ids == out[0, ids.shape[1] :].tolist()


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


def test_a_row_stops_at_the_end_of_the_context(tokenizer, tmp_path):
    net = model.load_model(make_checkpoint(tmp_path / "short", max_position_embeddings=24), device="cpu")
    groups = sample.generate(net, tokenizer, [[5] * 10, [5] * 22], n=20, max_new_tokens=50)
    assert max(len(c.ids) for c in groups[0]) == 14 and max(len(c.ids) for c in groups[1]) == 2
    with pytest.raises(UserError, match="prompt 0 has 24 tokens"):
        sample.generate(net, tokenizer, [[5] * 24], max_new_tokens=1)


def test_odd_requests(net, tokenizer):
    assert sample.generate(net, tokenizer, []) == []
    for bad in (dict(n=0), dict(max_new_tokens=0), dict(temperature=-1.0)):
        with pytest.raises(UserError):
            sample.generate(net, tokenizer, ["x"], **bad)
    with pytest.raises(UserError, match="prompt 0 has 0 tokens"):
        sample.generate(net, tokenizer, [""])


def test_the_script_prints_completions_and_refuses_a_missing_model(checkpoint):
    done = run_script("sample.py", f"--model={checkpoint}", "--prompt=a=b", "--n=2", "--max_new_tokens=5")
    assert done.returncode == 0 and done.stdout.count("---") == 2, done.stderr
    assert_refused(run_script("sample.py", "--model=nowhere"), "no model directory at 'nowhere'")
