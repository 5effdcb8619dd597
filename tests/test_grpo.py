"""grpo.py: the objectives against numbers and formulas by hand, one batch, and the whole script."""

import math
from collections import Counter

import pytest
import test_run
import torch
from conftest import assert_refused, run_script
from forks import fork_script
from test_packing import entropy_of, of_ids, one_thread, plain_logprobs, random_rollouts  # noqa: F401

import grpo
import model
import sample
import tinylora
from configurator import UserError
from support import packing
from support.packing import Rollout, micro_batches, token_logprobs
from support.parallel import Ranks, reduce_gradients

runs = test_run.runs  # the fixture

# --------------------------------------------------------------------------------------------------- the objective


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.7] * 4, [0.0, 0.0, 0.0, 1.0]])
    spread = torch.tensor([[math.sqrt(4 * 0.25 / 3)], [1.0], [0.5]])  # over G - 1
    centred = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.0] * 4, [-0.25, -0.25, -0.25, 0.75]])
    for objective in grpo.CLIP:
        expected = centred if objective == "dr_grpo" else centred / spread
        assert torch.allclose(grpo.group_advantages(rewards, objective), expected, atol=1e-5)
        equal = torch.full((1, 7), 0.7)
        assert equal.mean() != equal[0, 0]  # rounding must not be taken for a difference
        assert not grpo.group_advantages(equal, objective).any()


def test_completions_near_their_limit_pay():
    lengths, limits = torch.tensor([[10, 60, 70, 79, 80], [10, 40, 50, 55, 60]]), torch.tensor([[80], [60]])
    expected = torch.tensor([[0, 0, 0.5, 0.95, 1], [0, 0, 0.5, 0.75, 1]])
    assert torch.allclose(grpo.overlong_penalty(lengths, limits, 20), expected)
    assert not grpo.overlong_penalty(lengths, limits, 0).any()


@pytest.mark.parametrize("bounds, advantage, ratio, value, slope", [
    ((0.2, 0.3), 2.0, 1.0, 2.0, 2.0),  # on policy
    ((0.2, 0.3), 2.0, 1.5, 2.6, 0.0),  # clipped above: 1.3 * 2
    ((0.2, 0.3), 2.0, 0.5, 1.0, 1.0),  # a good token that became rare is not clipped
    ((0.2, 0.3), -2.0, 0.5, -1.6, 0.0),  # clipped below: 0.8 * -2
    ((0.2, 0.3), -2.0, 1.5, -3.0, -3.0),  # a bad token that became frequent is not clipped
    ((0.0, 0.1), 1.0, 1.5, 1.1, 0.0),  # 0: the objective's own bound, here 0.2
    ((0.0, 0.1), -1.0, 0.5, -0.8, 0.0),
    ((0.1, 0.0), -1.0, 0.5, -0.9, 0.0),
    ((0.1, 0.0), 1.0, 1.5, 1.2, 0.0),
])
def test_the_surrogate_of_a_token_by_hand(bounds, advantage, ratio, value, slope):
    log_ratio = torch.tensor([[math.log(ratio)]], requires_grad=True)
    cfg = grpo.Settings(objective="grpo", clip_low=bounds[0], clip_high=bounds[1])
    surrogate, clipped = grpo.clipped_surrogate(log_ratio, torch.tensor([[advantage]]), torch.ones(1, 1), cfg)
    surrogate.sum().backward()
    assert surrogate.item() == pytest.approx(value) and log_ratio.grad.item() == pytest.approx(slope)
    assert clipped.item() == (slope == 0)


@pytest.mark.parametrize("objective, value, slopes, num_clipped", [
    ("grpo", 1.7 / 6 - 0.8 / 3 + 1.2 / 3, [0.0, 0.5 / 6, 0.0, 0.0], 3),
    ("dr_grpo", (1.7 - 0.8 + 1.2) / 12, [0.0, 0.5 / 12, 0.0, 0.0], 3),
    ("dapo", (1.78 - 0.8 + 1.28) / 4, [0.0, 0.5 / 4, 0.0, 0.0], 3),  # its bound above is higher
    ("gspo", 0.75**0.5 / 3 - 0.9997 / 3 + 1.0004 / 3, [0.75**0.5 / 6, 0.75**0.5 / 6, 0.0, 0.0], 2),
])
def test_every_objective_by_hand(objective, value, slopes, num_clipped):
    """A later pass: a good completion of tokens with ratios 1.5 and 0.5, a bad one with 0.5, a good one with 2."""
    ratios, mask = torch.tensor([[1.5, 0.5], [0.5, 1.0], [2.0, 1.0]]), torch.tensor([[1, 1], [1, 0], [1, 0]]).bool()
    log_ratio = ratios.log().requires_grad_()
    cfg = grpo.Settings(objective=objective, max_new_tokens=4)
    batch = [Rollout([5], [6] * length) for length in (2, 1, 1)]
    weights = grpo.token_weights(batch, {"batch_rollouts": 3, "batch_tokens": 4}, cfg)[:, None] * mask
    surrogate, clipped = grpo.clipped_surrogate(log_ratio, torch.tensor([[1.0], [-1.0], [1.0]]), mask, cfg)
    (surrogate * weights).sum().backward()
    assert (surrogate * weights).sum().item() == pytest.approx(value, abs=1e-6)
    assert log_ratio.grad[mask].tolist() == pytest.approx(slopes, abs=1e-6)
    assert (clipped & mask).sum() == num_clipped


def of_a_pass(net, rollouts, cfg, processes=1):
    """The gradient of v over a pass, and the figures: what the loop of train() does, in turn for some processes."""
    totals = {"batch_rollouts": len(rollouts), "batch_tokens": sum(len(r.ids) for r in rollouts)}
    sums, max_diffs = Counter(), []
    net.adapter.zero_grad()
    for rank in range(processes):
        for batch in micro_batches(rollouts[rank::processes], cfg.micro_batch_tokens):
            loss, figures, max_diff = grpo.batch_loss(net, batch, totals, cfg)
            loss.backward()
            sums.update(figures)
            max_diffs.append(max_diff)
    return net.adapter.v.grad.clone(), sums | {"max_diff": max(max_diffs)}


def by_definition(net, base, rollouts, old_logprobs, cfg):
    """The same as the papers define it, from one plain forward pass for each rollout."""
    sums = Counter()
    net.adapter.zero_grad()
    low, high = cfg.clip_low, cfg.clip_high
    for rollout, old in zip(rollouts, old_logprobs):
        all_logprobs = plain_logprobs(net, rollout, cfg.temperature)
        logprobs, sampled = of_ids(all_logprobs, rollout), torch.tensor(rollout.logprobs)
        ratio = (logprobs - old).exp()
        if cfg.objective == "gspo":
            ratio = ratio.prod().pow(1 / len(ratio)).expand(len(ratio))
        pairs = torch.stack([ratio * rollout.advantage, ratio.clamp(1 - low, 1 + high) * rollout.advantage])
        terms = pairs.min(0).values
        if cfg.tis_cap:
            terms = terms * (old - sampled).exp().clamp(max=cfg.tis_cap)
        if cfg.kl_coef:
            log_ratio = of_ids(plain_logprobs(base, rollout, cfg.temperature), rollout) - logprobs
            kl = log_ratio.exp() - log_ratio - 1
            terms = terms - cfg.kl_coef * kl
            sums["kl"] += kl.sum().item()
        count = {"dr_grpo": cfg.max_new_tokens * len(rollouts), "dapo": sum(len(r.ids) for r in rollouts)}
        loss = -terms.sum() / count.get(cfg.objective, len(ratio) * len(rollouts))
        loss.backward()
        diff = (logprobs.detach() - sampled).abs()
        sums.update(loss=loss.item(), tokens=len(ratio), clipped=(pairs[1] < pairs[0]).sum().item(),
                    entropy=entropy_of(all_logprobs).sum().item(), diff=diff.sum().item())
        sums["max_diff"] = max(sums["max_diff"], diff.max().item())
    return net.adapter.v.grad.clone(), sums


SPLITS = [(10**6, 1, 256, 10**6, False), (1, 1, 256, 10**6, False), (30, 1, 1, 7, True), (45, 3, 12, 1, False),
          (60, 2, 256, 40, True), (100, 10, 1, 10**6, False)]  # 10 processes: one has no rollout


@pytest.mark.parametrize("options", [{}, dict(kl_coef=0.3, tis_cap=1.2, temperature=0.7)], ids=["plain", "kl and tis"])
@pytest.mark.parametrize("objective", grpo.CLIP)
def test_the_gradient_is_that_of_the_definition_however_the_batch_is_cut(net, checkpoint, monkeypatch, objective,
                                                                          options):
    """On policy and in a later pass, in float64. The cuts: micro-batches, processes, attention calls, chunks of
    logits, recomputation."""
    base = model.load_model(checkpoint, device="cpu").double()
    adapter = tinylora.add_adapter(net, u=3, n_tie=4)
    torch.nn.init.normal_(adapter.v, std=0.2, generator=torch.Generator().manual_seed(0))
    net.double(), adapter.double()
    for linear in adapter.linears.values():
        linear.US, linear.Vt = linear.US.double(), linear.Vt.double()
    adapter.P = adapter.P.double()
    rollouts = random_rollouts(9)
    bound = 0.01 if objective == "gspo" else 0.1  # a mean over tokens moves less
    cfg = dict(objective=objective, clip_low=bound, clip_high=bound, max_new_tokens=12, **options)
    with torch.no_grad():
        old = [of_ids(plain_logprobs(net, r, options.get("temperature", 1.0)), r) for r in rollouts]
        for i, rollout in enumerate(rollouts):
            rollout.logprobs = (old[i] + torch.linspace(-0.5, 0.5 + i % 2, len(old[i]))).tolist()
    for later_pass in (False, True):
        if later_pass:
            with torch.no_grad():
                adapter.v += 0.1
        expected, figures = by_definition(net, base, rollouts, old, grpo.Settings(**cfg))
        assert not later_pass or 0 < figures["clipped"] < figures["tokens"]
        first = None
        for tokens, processes, tokens_a_call, chunk, recompute in SPLITS:
            monkeypatch.setattr(packing, "TOKENS_A_CALL", tokens_a_call)
            monkeypatch.setattr(packing, "token_logprobs", lambda *a, chunk=chunk: token_logprobs(*a, chunk))
            net.model.recompute = recompute
            for rollout in rollouts:
                rollout.old_logprobs = rollout.old_logprobs if later_pass else None
            cut = grpo.Settings(micro_batch_tokens=tokens, **cfg)
            gradient, sums = of_a_pass(net, rollouts, cut, processes)
            first = gradient if first is None else first
            assert (gradient - first).norm() <= 1e-10 * first.norm()
            assert (gradient - expected).norm() <= 1e-5 * expected.norm()  # advantages and weights are float32
            assert sums == pytest.approx(figures, rel=1e-5, abs=1e-7)


def test_the_stop_token_is_trained(net, tokenizer):
    """A gradient step on a completion that is a stop token alone makes stopping there likelier."""
    adapter = tinylora.add_adapter(net, u=2, n_tie=1)
    rollout = Rollout([7, 8, 9], [*tokenizer.stop_ids], [-1.0], advantage=1.0)
    gradient, _ = of_a_pass(net, [rollout], grpo.Settings())
    with torch.no_grad():
        before = of_ids(plain_logprobs(net, rollout), rollout)
        adapter.v -= 1e-3 * gradient / gradient.norm()
        assert of_ids(plain_logprobs(net, rollout), rollout) > before


# ---------------------------------------------------------------------------------------- the batch, the log, advice


def test_every_epoch_and_every_order_of_replacements_visits_every_problem_once():
    seen = [index for step in range(20) for _, index in grpo.batch_positions(step, 5, 20, seed=3)]
    assert all(sorted(seen[20 * epoch : 20 * epoch + 20]) == list(range(20)) for epoch in range(5))
    assert seen[:20] != seen[20:40]
    cfg = grpo.Settings(resample=4, batch_size=5, seed=3)
    rounds = [grpo.replacement_positions(step, attempt, 20, cfg) for step in (0, 1) for attempt in (1, 2, 3, 4)]
    positions, others = zip(*sum(rounds, []))
    assert sorted(others[:20]) == sorted(others[20:]) == list(range(20)) and list(others[:20]) != seen[:20]
    assert len(set(positions)) == 40 and min(positions) > 10**9  # they seed the sampling


def has_gradient(group):
    return any(rollout.advantage for rollout in group)


def test_groups_of_equal_rewards_are_replaced(net, tokenizer, runs):
    """A quarter of the completions is right, so in every third group all are wrong."""
    code = "import zlib\ndef reward(problem, completion):\n    return zlib.crc32(completion.text.encode()) % 4 == 0\n"
    cfg, ranks = runs.cfg("unused", code=code, batch_size=8), Ranks()
    train_set = cfg.problems(cfg, "train")
    grpo.prepare(net, tokenizer, train_set, cfg)
    sampled = []
    for cfg.resample, ranks.dp_rank, ranks.dp_size in [(0, 0, 1), (6, 0, 1), (6, 0, 3), (6, 1, 3), (6, 2, 3)]:
        rollouts, counts = grpo.sample_batch(net, tokenizer, train_set, cfg, 2, ranks)
        sampled.append([rollouts[i : i + 4] for i in range(0, len(rollouts), 4)])
        assert counts["batch_rollouts"] == len(rollouts) and counts["batch_tokens"] == sum(len(r.ids) for r in rollouts)
        assert counts["rollouts"] > len(rollouts) if cfg.resample else counts["rollouts"] == 32 > counts["equal"] > 0
    plain, replaced, *parts = sampled
    assert [group == old for group, old in zip(replaced, plain)] == [has_gradient(old) for old in plain]
    assert [len(groups) for groups in sampled] == [8, 8, 3, 3, 2]
    assert all(has_gradient(group) for groups in (replaced, *parts) for group in groups)


def test_one_replacement_is_asked_for_each_group_of_equal_rewards_while_rounds_are_left(monkeypatch):
    asked, advantages = [], iter([[0.0, 1.0, 0.0], [0.0, 1.0], [0.0]])

    def sample_groups(net, tokenizer, pairs, cfg):
        asked.append(len(pairs))
        return [[Rollout([5], [6], [-1.0], a)] for a in next(advantages)], Counter(rollouts=len(pairs))

    monkeypatch.setattr(grpo, "sample_groups", sample_groups)
    cfg = grpo.Settings(batch_size=3, seed=1, resample=2)
    rollouts, counts = grpo.sample_batch(None, None, [None] * 9, cfg, 0, Ranks())
    assert asked == [3, 2, 1] and [rollout.advantage for rollout in rollouts] == [1.0, 1.0, 0.0]
    assert counts == dict(rollouts=6, batch_rollouts=3, batch_tokens=3)


def completions(*texts, cut=()):
    """Completions of as many tokens as they have characters; those in `cut` are cut off."""
    return [sample.Completion([5] * len(text), [-1.0] * len(text), text, text in cut) for text in texts]


@pytest.mark.parametrize("objective", ["dapo", "dr_grpo"])
def test_groups_are_asked_and_rewarded_as_the_settings_say(monkeypatch, objective):
    """Right, in another format, cut off, and right but long; then a group of wrong ones, one of them long. The second
    problem's limit is lower, since its prompt leaves no more room in the context."""
    cfg = grpo.Settings(answer_format="hash", overlong_tokens=4, seed=3, max_new_tokens=12, temperature=0.7,
                        objective=objective, group_size=4)
    cfg.reward = grpo.reward
    asked, rows = [], [{"answer": "7", "prompt_tokens": [5, 6], "limit": 12, "answer_format": "hash"},
                       {"answer": "8", "prompt_tokens": [9], "limit": 8, "answer_format": "hash"}]
    groups = [completions("#### 7", r"\boxed{7}", "so #### 7", "#### 7   ", cut=["so #### 7"]),
              completions("1", "2", "3", "12345")]

    def generate(net, tokenizer, *arguments, prompt_ids, progress):
        asked.append((*arguments, prompt_ids))
        return groups

    monkeypatch.setattr(grpo, "generate", generate)
    rollouts, counts = grpo.sample_groups(None, None, [(40, rows[0]), (2**40 + 1, rows[1])], cfg)
    assert asked == [([[5, 6], [9]], 4, 12, 0.7, 3, [40, 2**40 + 1])]
    earned = torch.tensor([[1.0, -0.25, -0.25, 0.75], [0.0, 0.0, 0.0, -0.25]])  # less (length - limit + 4) / 4
    expected = earned - earned.mean(1, keepdim=True)
    if objective == "dapo":
        expected /= earned.std(1, keepdim=True)
    advantages = torch.tensor([[rollout.advantage for rollout in group] for group in rollouts])
    assert torch.allclose(advantages, expected, atol=1e-4)
    assert counts == dict(rollouts=8, tokens=6 + 9 + 9 + 9 + 1 + 1 + 1 + 5, reward=2, lenient=4, equal=0, truncated=1)
    assert [(r.prompt, r.ids, r.logprobs) for r in rollouts[0]] == [([5, 6], c.ids, c.logprobs) for c in groups[0]]


def test_an_evaluation_by_hand(monkeypatch, capsys):
    texts = ["#### 7", "7", "#### 9", "#### 7"]
    rows = [{"question": f"{i}?", "answer": "7", "prompt_tokens": [i], "answer_format": "hash"} for i in range(4)]
    monkeypatch.setattr(grpo, "generate", lambda *_, **__: [completions(text, cut=["#### 9"]) for text in texts])
    cfg = grpo.Settings()
    cfg.reward = grpo.reward
    figures = grpo.evaluate(None, None, rows, cfg, Ranks())
    assert figures == dict(reward=0.5, stderr=0.25, problems=4, length=19 / 4, truncated=0.25, lenient=0.75)
    assert "greedy accuracy 0.500 +- 0.250 (read leniently 0.750) on 4 problems" in capsys.readouterr().out
    cfg.reward = lambda problem, completion: torch.tensor(len(completion.text))
    figures = grpo.evaluate(None, None, rows, cfg, Ranks())
    assert figures["reward"] == 19 / 4 and "lenient" not in figures
    assert "greedy reward 4.750" in capsys.readouterr().out


def test_the_record_of_a_step_by_hand():
    """Reward and length are of all that was sampled, the means of the tokens that are trained."""
    totals = Counter(rollouts=24, tokens=300, reward=6.0, lenient=9, equal=8, truncated=3)
    passes = [Counter(loss=0.5, clipped=0.0, kl=2.0, entropy=4.0, diff=0.2, tokens=20),
              Counter(loss=0.7, clipped=5.0, kl=3.0, entropy=6.0, diff=0.4, tokens=20)]
    cfg = grpo.Settings(kl_coef=0.1, group_size=4)
    cfg.reward = grpo.reward
    record = dict(reward=0.25, lenient=0.375, equal_groups=1 / 3, length=12.5, truncated=0.125, groups=6, loss=0.5,
                  clipped=0.25, kl=0.1, entropy=0.2, diff=0.01)
    assert grpo.means(totals, passes, cfg) == pytest.approx(record)
    none = grpo.means(totals, [Counter()], cfg)  # all rewards were equal in every group
    assert [none[key] for key in ("loss", "entropy", "diff", "kl", "clipped")] == [0, None, None, None, None]
    cfg.kl_coef, cfg.reward = 0.0, len  # any function that is not grpo's
    assert not {"kl", "lenient"} & grpo.means(totals, passes, cfg).keys()


def test_advice_begins_at_its_bounds_and_names_the_cure():
    for dtype, changes, word in [
        (torch.float32, dict(), ""),
        (torch.float32, dict(truncated=0.19), ""), (torch.float32, dict(truncated=0.21), "max_new_tokens, which is 64"),
        (torch.float32, dict(equal_groups=0.89), ""), (torch.float32, dict(equal_groups=0.91), "or resample"),
        (torch.float32, dict(entropy=0.006), ""), (torch.float32, dict(entropy=0.004), "lower lr"),
        (torch.float32, dict(diff=0.9e-3), ""), (torch.float32, dict(diff=1.1e-3), "which is a bug"),
        (torch.bfloat16, dict(diff=0.049), ""), (torch.bfloat16, dict(diff=0.051), "tis_cap = 2"),
        (torch.float32, dict(reward=0.0, lenient=0.0), ""), (torch.float32, dict(reward=0.0), "in the format 'hash'"),
        (torch.float32, dict(entropy=None, diff=None), ""),  # no group has a gradient
    ]:
        calm = dict(reward=0.5, truncated=0.0, equal_groups=0.5, entropy=0.5, diff=1e-7, lenient=0.5)
        advice = list(grpo.advice_on(calm | changes, grpo.Settings(), dtype))
        assert len(advice) == bool(word) and all(word in line for line in advice)


@pytest.mark.parametrize("grad_clip, norm", [(0.5, 0.5), (5.0, 5.0), (20.0, 10.0), (0.0, 10.0)])
def test_the_gradient_is_clipped_and_its_norm_before_is_returned(grad_clip, norm):
    a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    a.grad = torch.tensor([6.0, 8.0])  # b has none, as in a process without rollouts
    assert reduce_gradients([a, b], grad_clip) == pytest.approx(10.0)
    assert a.grad.tolist() == pytest.approx([0.6 * norm, 0.8 * norm], abs=1e-4) and not b.grad.any()
    a.grad[0] = math.nan
    with pytest.raises(UserError, match="gradient is not finite"):
        reduce_gradients([a, b], grad_clip)


# --------------------------------------------------------------------------------------------------- the whole script


def test_a_run_learns_and_repeats_itself(runs, capsys):
    for name, code in [("a", ""), ("b", ""), ("even", test_run.EVEN_LENGTH)]:
        runs.train(name, code=code, kl_coef=0.1, num_passes=2, eval_interval=2)
        steps = runs.steps(name)
        assert [line["step"] for line in steps] == [1, 2, 3]
        assert [line["step"] for line in runs.log(name) if "eval" in line] == [0, 2, 3]
        assert all(line["max_diff"] < 1e-4 and 0 <= line["kl"] < 1 for line in steps)  # the sampler is the trainer
    out = capsys.readouterr().out
    assert "b: greedy accuracy 0.000 -> 0.000 with 14 numbers in " in out and "Example:" in out
    assert "even: greedy reward 0.800 -> " in out and steps[-1]["kl"] > 0 and runs.v("even").shape == (14, 1)
    assert runs.log("a") == runs.log("b") and torch.equal(runs.v("a"), runs.v("b"))


def test_a_step_follows_the_policy_gradient_of_its_samples(runs, net, monkeypatch):
    """One step of the script against rewards, advantages, gradient and Adam computed here from what was sampled."""
    seen, generate = {}, grpo.generate

    def generating(model, tokenizer, prompts, *arguments, **options):
        seen["prompts"], seen["groups"] = prompts, generate(model, tokenizer, prompts, *arguments, **options)
        return seen["groups"]

    def reducing(parameters, grad_clip):
        [v] = parameters
        seen["gradient"], seen["grad_clip"] = v.grad.clone(), grad_clip
        return reduce_gradients(parameters, grad_clip)

    monkeypatch.setattr(grpo, "generate", generating)
    monkeypatch.setattr(grpo, "reduce_gradients", reducing)
    runs.train("run", max_steps=1, batch_size=5, lr=0.03, micro_batch_tokens=100, recompute=True, tis_cap=2.0,
               temperature=0.7, grad_clip=0.3, eval_dataset="")
    rewards = torch.tensor([[float(len(c.text) % 2 == 0) for c in group] for group in seen["groups"]])
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    adapter, loss = tinylora.add_adapter(net, rank=2, u=1, n_tie=1, seed=1337), 0
    for prompt, group, of_group in zip(seen["prompts"], seen["groups"], advantages):
        for completion, advantage in zip(group, of_group):
            rollout = Rollout(prompt, completion.ids)
            loss = loss - advantage * of_ids(plain_logprobs(net, rollout, 0.7), rollout).mean() / rewards.numel()
    loss.backward()
    assert seen["grad_clip"] == 0.3
    assert (seen["gradient"] - adapter.v.grad).norm() <= 1e-4 * adapter.v.grad.norm() and adapter.v.grad.norm() > 0
    torch.optim.Adam(adapter.parameters(), lr=0.03).step()
    assert torch.allclose(runs.v("run"), adapter.v, atol=1e-5)
    [record] = runs.steps("run")
    assert record["reward"] == pytest.approx(rewards.mean().item()) and 0 < record["reward"] < 1
    assert record["equal_groups"] == pytest.approx((rewards.std(1) == 0).float().mean().item())
    assert record["v_norm"] == pytest.approx(runs.v("run").norm().item())


OWN_TASK = '''
def _goal(split):
    return 0 if split == "train" else 3

def problems(cfg, split):
    return [{"question": f"{split} {i}?", "goal": _goal(split)} for i in range(7)]

def reward(problem, completion):
    assert problem["question"].endswith("?") and problem["answer_format"] == "any" and problem["prompt_tokens"]
    assert len(completion.ids) == len(completion.logprobs) and completion.truncated in (True, False)
    return problem["goal"] or len(completion.text) % 2
'''


def test_a_config_may_bring_its_own_reward_and_problems(runs, capsys):
    runs.train("run", code=OWN_TASK, eval_interval=2)
    assert "run: greedy reward 3.000 -> 3.000" in capsys.readouterr().out
    evals = [line["eval"] for line in runs.log("run") if "eval" in line]
    assert all(e["reward"] == 3 and e["problems"] == 5 for e in evals) and len(evals) == 3
    assert all(0 < line["reward"] < 1 and "lenient" not in line for line in runs.steps("run"))
    with pytest.raises(UserError, match="another code of the config"):
        runs.train("run", code="", init_from="resume", eval_interval=2)
    again = fork_script("grpo.py", runs.place / "run" / "settings.py", f"--out_dir={runs.place}/again")
    assert again.returncode == 0 and runs.log("again") == runs.log("run") and runs.v("run").any(), again.stderr
    saved = (runs.place / "run" / "settings.py").read_text()
    runs.train("run", code=saved, init_from="resume", eval_interval=2, max_steps=4)
    assert saved.startswith(OWN_TASK) and len(runs.steps("run")) == 4


def test_a_config_that_imports_the_reward_gets_the_scripts_own(tmp_path):
    (tmp_path / "mine.py").write_text("from grpo import reward\nmax_steps = 0\neval_size = 5\n")
    done = run_script("grpo.py", tmp_path / "mine.py", f"--out_dir={tmp_path}/run")
    assert done.returncode == 0 and "reward =" not in done.stdout and "run: greedy accuracy" in done.stdout, done.stderr


def test_a_task_without_answers_needs_a_reward_of_its_own(runs):
    code = "def problems(cfg, split):\n    return [{'question': '1?'}]\n"
    with pytest.raises(UserError, match="""there is none in {'question': '1\\?'}; define a reward"""):
        runs.train("run", code=code)


def test_an_answer_ends_where_the_context_does(runs, net, tokenizer):
    context = net.config.max_position_embeddings
    cfg = runs.cfg("unused", prompt_template="{question} " + "x " * 200, max_new_tokens=context)
    rows = cfg.problems(cfg, "train")[:2]
    grpo.prepare(net, tokenizer, rows, cfg)
    assert [row["limit"] for row in rows] == [context - len(row["prompt_tokens"]) for row in rows]
    [[group, _], _] = grpo.sample_groups(net, tokenizer, list(enumerate(rows)), cfg)
    assert max(len(rollout.ids) for rollout in group) == rows[0]["limit"] < context - 200


def test_a_step_that_fails_in_a_later_pass_is_not_saved(runs, monkeypatch):
    """The first pass has moved v by then. The checkpoint stays that of the step before."""
    real, calls = grpo.completion_logprobs, []

    def scoring(*arguments):
        calls.append(1)
        logprobs, *others = real(*arguments)
        return logprobs * (math.nan if len(calls) == 4 else 1.0), *others

    monkeypatch.setattr(grpo, "completion_logprobs", scoring)
    with pytest.raises(UserError, match="the gradient is not finite, so this step changes nothing"):
        runs.train("run", num_passes=2, save_interval=1, eval_dataset="")
    tensors, info = runs.saved("run")
    assert info["step"] == 1 and tensors["step/v"] == 2 and tensors["weights/v"].isfinite().all()


REFUSED = [
    (dict(model="nowhere"), "no model directory at 'nowhere'"),
    (dict(dataset=""), "'' is neither a file, nor a hub name"),
    (dict(group_size=1), "group_size must be at least 2, got 1"),
    (dict(temperature=0.0), "temperature must be above 0"),
    (dict(objective="ppo"), "objective in command line must be one of grpo, dr_grpo, dapo, gspo, got 'ppo'"),
    (dict(init_from="resume"), "cannot resume from .*leave out init_from"),
    (dict(eval_interval=-1), "eval_interval must be at least 0"),
    (dict(seed=2**32 - 1), "seed must be below 4294967295"),
    (dict(num_passes=0), "num_passes must be at least 1"),
    (dict(kl_coef=-0.1), "kl_coef must be at least 0"),
    (dict(method="full", kl_coef=0.1), "kl_coef must be 0 with method = full"),
    (dict(overlong_tokens=8), "overlong_tokens must be below max_new_tokens"),
    (dict(prompt_template="{question}" * 40), "fills the model's context of "),
]


def test_bad_settings_are_refused_before_anything_is_written(runs):
    for changes, message in REFUSED:
        with pytest.raises(UserError, match=message):
            runs.train("run", **changes)
    assert not (runs.place / "run").exists()
    assert_refused(runs.fork("run", group_size=1), "group_size must be at least 2, got 1")
