"""grpo.py: the objective against numbers worked out by hand, the gradient for any split, and whole runs."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_refused, run_script
from safetensors.torch import load_file

import eval_math
import grpo
import model
import sample
import tinylora
from configurator import UserError, configure

# ------------------------------------------------------------------------------------------------------ the objective


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    std = math.sqrt(4 * 0.25 / 3)  # over G - 1
    expected = torch.tensor([[0.5 / std, -0.5 / std, -0.5 / std, 0.5 / std], [0.0] * 4, [-0.5, -0.5, -0.5, 1.5]])
    assert torch.allclose(grpo.group_advantages(rewards), expected, atol=1e-5)  # the third group's std is 1/2
    assert torch.allclose(grpo.group_advantages(rewards, "dr_grpo")[0], torch.tensor([0.5, -0.5, -0.5, 0.5]))


def test_token_weights_by_hand():
    """Two rows of 2 and 4 tokens, of a batch of 8 rows and 30 tokens."""

    def weights(objective):
        return grpo.token_weights([2, 4], objective, max_new_tokens=10, num_rows=8, num_tokens=30).tolist()

    assert weights("grpo") == weights("gspo") == pytest.approx([1 / 16, 1 / 32])
    assert weights("dr_grpo") == pytest.approx([1 / 80, 1 / 80])
    assert weights("dapo") == pytest.approx([1 / 30, 1 / 30])


@pytest.mark.parametrize(
    "advantage, ratio, value, slope, clipped",
    [
        (2.0, 1.0, 2.0, 2.0, 0),  # on policy
        (2.0, 1.1, 2.2, 2.2, 0),
        (2.0, 1.5, 2.6, 0.0, 1),  # clipped above: 1.3 * 2
        (2.0, 0.5, 1.0, 1.0, 0),  # a good answer that became rare is not clipped
        (-2.0, 0.5, -1.6, 0.0, 1),  # clipped below: 0.8 * -2
        (-2.0, 1.5, -3.0, -3.0, 0),  # a bad answer that became frequent is not clipped
    ],
)
def test_clipped_surrogate_by_hand(advantage, ratio, value, slope, clipped):
    """One token of weight 1/2: the value of the objective, and its slope in the log-prob."""
    logp = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    loss, count = grpo.policy_loss(logp, torch.tensor([[-1.0]]), torch.tensor([advantage]), torch.tensor([0.5]),
                                   torch.ones(1, 1), clip_low=0.2, clip_high=0.3)
    loss.backward()
    assert loss.item() == pytest.approx(-value / 2, abs=1e-6)
    assert logp.grad.item() == pytest.approx(-slope / 2, abs=1e-6)
    assert count == clipped


def test_gspo_uses_the_sequence_ratio():
    """Log-ratios 0.3 and -0.1 over two tokens: the ratio of both is exp(0.1)."""
    logp = torch.tensor([[-0.7, -1.1, 9.0]], requires_grad=True)  # the third is padding
    mask = torch.tensor([[True, True, False]])
    old_logp, advantages, weights = torch.tensor([[-1.0, -1.0, 0.0]]), torch.tensor([1.0]), torch.tensor([1 / 2])
    loss, _ = grpo.policy_loss(logp, old_logp, advantages, weights, mask, "gspo")
    loss.backward()
    assert loss.item() == pytest.approx(-math.exp(0.1), abs=1e-6)
    assert logp.grad[0].tolist() == pytest.approx([-math.exp(0.1) / 2, -math.exp(0.1) / 2, 0.0], abs=1e-6)


def test_k3_by_hand():
    assert grpo.k3(torch.tensor(-1.0), torch.tensor(-1.5)).item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)
    assert grpo.k3(torch.tensor(-2.0), torch.tensor(-2.0)) == 0


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_chunked_logprobs_equal_the_full_softmax(chunk):
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(23, 8).double(), torch.randn(50, 8).double(), torch.randint(0, 50, (23,))
    weights = torch.randn(23)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    logp, entropy = grpo.token_logprobs(ours, head, targets, 0.7, chunk)
    exact = torch.log_softmax(theirs @ head.T / 0.7, -1)
    (logp * weights).sum().backward()
    (exact[range(23), targets] * weights).sum().backward()
    assert torch.allclose(logp.double(), exact[range(23), targets], atol=1e-5)
    assert torch.allclose(entropy.double(), -(exact.exp() * exact).sum(-1), atol=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- the gradient


def settings(**changes):
    cfg = SimpleNamespace(objective="grpo", temperature=1.0, micro_batch_tokens=10**6, max_new_tokens=12, tis_cap=0.0,
                          clip_low=0.0,
                          clip_high=0.0, kl_coef=0.0)
    return SimpleNamespace(**vars(cfg) | changes)


def random_rows(count=9, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def ids(low, high):
        return torch.randint(5, 200, (int(torch.randint(low, high, (1,), generator=rng)),), generator=rng).tolist()

    rows = [grpo.Row(ids(3, 9), ids(1, 12), [], float(torch.randn(1, generator=rng))) for _ in range(count)]
    for row in rows:
        row.sampler_logprobs = [-1.0] * len(row.ids)
    return rows


def gradient(net, tokenizer, rows, cfg, parts=None):
    """The gradient of v over rows, given all at once or in parts as if by several ranks."""
    for row in rows:
        row.old_logprobs = None if cfg.objective == "grpo" else torch.full((len(row.ids),), -5.0, dtype=net.head.dtype)
    net.adapter.zero_grad()
    total = sum(len(row.ids) for row in rows)
    for part in parts or [rows]:
        grpo.accumulate_gradient(net, tokenizer, part, cfg, len(rows), total)
    return net.adapter.v.grad.clone()


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_gradient_is_the_same_for_any_split(net, tokenizer, objective):
    tinylora.add_adapter(net, u=3, n_tie=4)
    torch.nn.init.normal_(net.adapter.v, std=0.2)
    rows = random_rows()
    cfg = settings(objective=objective, kl_coef=0.1)
    whole = gradient(net, tokenizer, rows, cfg)
    splits = [settings(**vars(cfg) | {"micro_batch_tokens": tokens}) for tokens in (1, 30, 60)]
    splits = [gradient(net, tokenizer, rows, split) for split in splits]
    ranks = gradient(net, tokenizer, rows, cfg, [rows[0::3], rows[1::3], rows[2::3]])
    assert whole.norm() > 0
    for other in [*splits, ranks]:
        assert (other - whole).norm() <= 1e-5 * whole.norm()


def plain_logprobs(net, row):
    """Log-probs of a row's tokens, one row at a time through the plain forward pass."""
    logits = net(torch.tensor([row.prompt + row.ids]))[0, len(row.prompt) - 1 : -1]
    return torch.log_softmax(logits, -1)[range(len(row.ids)), row.ids]


def in_float64(net):
    net.double().adapter.double()
    for linear in tinylora.adapted_linears(net).values():
        linear.US, linear.Vt = linear.US.double(), linear.Vt.double()


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_gradient_is_that_of_the_textbook_formula(net, tokenizer, checkpoint, kl_coef):
    """On policy: -A mean(log p) a row, plus kl_coef times the mean of k3 against the model without adapter."""
    rows, base = random_rows(5), model.load_model(checkpoint, device="cpu").double()
    torch.nn.init.normal_(tinylora.add_adapter(net, u=3, n_tie=4).v, std=0.2)
    ours = gradient(net, tokenizer, rows, settings(kl_coef=kl_coef))
    in_float64(net)
    net.adapter.zero_grad()
    loss = 0
    for row in rows:
        logp, ref = plain_logprobs(net, row), plain_logprobs(base, row)
        kl = (ref - logp).exp() - (ref - logp) - 1
        loss = loss + (-row.advantage * logp.mean() + kl_coef * kl.mean()) / len(rows)
    loss.backward()
    assert (ours - net.adapter.v.grad).norm() <= 1e-4 * ours.norm()


def test_later_passes_keep_the_ratio_to_the_policy_of_the_first(net, tokenizer):
    rows = random_rows(6)
    adapter, cfg = tinylora.add_adapter(net, u=3, n_tie=4), settings(clip_low=0.1, clip_high=0.1)
    gradient(net, tokenizer, rows, cfg)  # the first pass notes the old log-probs
    with torch.no_grad():
        old = [plain_logprobs(net, row) for row in rows]
        adapter.v += 0.1
    adapter.zero_grad()
    sums = grpo.accumulate_gradient(net, tokenizer, rows, cfg, 6, sum(len(row.ids) for row in rows))
    ours = adapter.v.grad.clone()
    adapter.zero_grad()
    loss, clipped = 0, 0
    for row, old_logp in zip(rows, old):
        ratio = (plain_logprobs(net, row) - old_logp).exp()
        terms = torch.stack((ratio * row.advantage, ratio.clamp(0.9, 1.1) * row.advantage))
        loss = loss - terms.min(0).values.mean() / 6
        clipped += int((terms[1] < terms[0]).sum())
    loss.backward()
    assert 0 < clipped == sums["clipped"] < sum(len(row.ids) for row in rows)  # some are clipped, not all
    assert (ours - adapter.v.grad).norm() <= 1e-4 * ours.norm()


def test_the_stop_token_is_trained(net, tokenizer):
    """A gradient step on an answer that ends with the stop token makes stopping there likelier."""
    [stop] = tokenizer.stop_ids
    adapter = tinylora.add_adapter(net, u=2, n_tie=1)
    row = grpo.Row([7, 8, 9], [stop], [-1.0], advantage=1.0)

    def stop_logprob():
        with torch.no_grad():
            return torch.log_softmax(net(torch.tensor([[7, 8, 9]]))[0, -1], -1)[stop].item()

    before = stop_logprob()
    grpo.accumulate_gradient(net, tokenizer, [row], settings(), 1, 1)
    with torch.no_grad():
        adapter.v -= 1e-3 * adapter.v.grad / adapter.v.grad.norm()
    assert stop_logprob() > before


def test_micro_batches_keep_all_rows_within_the_bound():
    rows = random_rows(50)
    batches = list(grpo.micro_batches(rows, 40))
    assert sorted(id(r) for b in batches for r in b) == sorted(map(id, rows))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(r.prompt) + len(r.ids) for r in batch) <= 40
    assert list(grpo.micro_batches([], 40)) == []


def test_every_epoch_visits_every_problem_once():
    seen = [index for step in range(20) for _, index in grpo.batch_positions(step, 5, 20, seed=3)]
    for epoch in range(5):
        assert sorted(seen[20 * epoch : 20 * epoch + 20]) == list(range(20))
    assert seen[:20] != seen[20:40]
    assert grpo.batch_positions(7, 5, 20, seed=3) == grpo.batch_positions(7, 5, 20, seed=3)


# ---------------------------------------------------------------------------------------------------------- whole runs


def args(checkpoint, problems, out_dir, **changes):
    options = dict(model=checkpoint, dataset=problems, eval_dataset=problems, out_dir=out_dir, max_steps=3,
                   batch_size=3, group_size=4, max_new_tokens=8, eval_size=5, answer_format="any", device="cpu", rank=2,
                   u=1, n_tie=1, objective="grpo", lr=0.02)
    options |= changes
    return [f"--{key}={value}" for key, value in options.items()]


@pytest.fixture
def lucky(monkeypatch):
    """A reward that random weights can earn, so that there is something to learn: an even number of characters."""
    def score(response, truncated, reference, answer_format):
        right = len(response) % 2 == 0
        return {"strict": right, "lenient": right}

    monkeypatch.setattr(eval_math, "score", score)


def run(*arguments):
    grpo.train(configure(vars(grpo), list(arguments)))


def log_of(out_dir):
    lines = [json.loads(line) for line in open_text(Path(out_dir) / "log.jsonl").splitlines()]
    for line in lines:
        line.pop("seconds", None)
    return lines


def open_text(path):
    return path.read_text(encoding="utf-8")


def test_a_run_writes_log_adapter_and_checkpoint_and_repeats_itself(checkpoint, problems, tmp_path, lucky, capsys):
    for name in ("a", "b"):
        run(*args(checkpoint, problems, tmp_path / name, kl_coef=0.1, num_passes=2))
    out = capsys.readouterr().out
    assert re.search(r"^b: greedy accuracy [01]\.\d{3} -> [01]\.\d{3} with 14 numbers in \d+ s$", out, re.M)
    assert "for example" in out.lower()
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")
    steps = [line for line in log_of(tmp_path / "a") if "reward" in line]
    assert [line["step"] for line in steps] == [1, 2, 3] and all(line["diff_max"] < 1e-4 for line in steps)
    assert all(0 <= line["kl"] < 1 for line in steps) and steps[-1]["kl"] > 0
    v = load_file(tmp_path / "a" / "adapter.safetensors")["v"]
    assert v.shape == (14, 1) and v.abs().sum() > 0
    assert torch.equal(v, load_file(tmp_path / "b" / "adapter.safetensors")["v"])


def test_a_resumed_run_equals_an_uninterrupted_one(checkpoint, problems, tmp_path, lucky):
    run(*args(checkpoint, problems, tmp_path / "whole", max_steps=4))
    run(*args(checkpoint, problems, tmp_path / "parts", max_steps=2))
    run(*args(checkpoint, problems, tmp_path / "parts", max_steps=4, init_from="resume"))
    assert torch.equal(*(load_file(tmp_path / d / "adapter.safetensors")["v"] for d in ("whole", "parts")))
    steps = [[line for line in log_of(tmp_path / d) if "reward" in line] for d in ("whole", "parts")]
    assert steps[0] == steps[1]


def test_ctrl_c_saves_and_exits_cleanly(checkpoint, problems, tmp_path):
    process = subprocess.Popen([sys.executable, "-u", "grpo.py", *args(checkpoint, problems, tmp_path / "run",
        max_steps=10000, eval_interval=0)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.time() + 120
    while not (log.exists() and '"step": 2' in log.read_text()) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "steps are saved" in out and "Traceback" not in err, err
    saved = int(re.search(r"interrupted: (\d+) steps", out)[1])
    assert saved >= 2
    done = run_script("grpo.py", *args(checkpoint, problems, tmp_path / "run", max_steps=saved + 1, init_from="resume"))
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in log_of(tmp_path / "run") if "reward" in line] == list(range(1, saved + 2))


@pytest.mark.parametrize("kill_at", ["", '"step": 1,', '"step": 3,'])
def test_a_run_killed_at_any_moment_resumes_to_the_same_numbers_and_the_same_log(checkpoint, problems, tmp_path,
                                                                                 kill_at):
    """SIGKILL before the first step, before the first checkpoint, and between checkpoints."""
    options = dict(max_steps=5, save_interval=2, eval_interval=2, eval_size=3, lr=0.5)
    done = run_script("grpo.py", *args(checkpoint, problems, tmp_path / "whole", **options))
    assert done.returncode == 0, done.stderr
    log = tmp_path / "parts" / "log.jsonl"
    process = subprocess.Popen([sys.executable, "grpo.py", *args(checkpoint, problems, tmp_path / "parts", **options)],
                               cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (log.exists() and kill_at in log.read_text()) and time.time() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    done = run_script("grpo.py", *args(checkpoint, problems, tmp_path / "parts", init_from="resume", **options))
    assert done.returncode == 0, done.stderr
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    assert torch.equal(*(load_file(tmp_path / d / "adapter.safetensors")["v"] for d in ("whole", "parts")))


def test_sigterm_saves_and_exits(checkpoint, problems, tmp_path, lucky, monkeypatch):
    generate, calls = grpo.generate, []

    def terminated(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(*arguments, **options)

    monkeypatch.setattr(grpo, "generate", terminated)
    with pytest.raises(SystemExit) as stopped:
        run(*args(checkpoint, problems, tmp_path / "run", max_steps=9, eval_dataset=""))
    assert stopped.value.code == 143
    assert grpo.read_checkpoint(str(tmp_path / "run" / "checkpoint.safetensors"))[1]["step"] == 2


def test_the_best_evaluated_adapter_is_kept_beside_the_last(checkpoint, problems, tmp_path, monkeypatch):
    """Accuracies 0.1, 0.5, 0.3 after 0, 1 and 2 steps: the best is the one after step 1."""
    accuracies = iter([0.1, 0.5, 0.3])
    monkeypatch.setattr(eval_math, "evaluate", lambda *_, **__: {
        "strict": next(accuracies), "lenient": 0.0, "stderr": 0.0, "length": 1.0, "truncated": 0.0,
        "rows": [{"question": "?", "response": "", "answer": "1"}]})
    seen, save = {}, grpo.tinylora.save_adapter
    monkeypatch.setattr(grpo.tinylora, "save_adapter", lambda adapter, path, dtype: (
        seen.setdefault(os.path.basename(path), []).append(adapter.v.detach().clone()), save(adapter, path, dtype)))
    run(*args(checkpoint, problems, tmp_path / "run", max_steps=2, eval_interval=1, save_interval=1))
    assert len(seen["best.safetensors"]) == 1
    assert torch.equal(seen["best.safetensors"][0], seen["adapter.safetensors"][0])


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(checkpoint, problems, tmp_path, lucky, capsys,
                                                                    damage):
    options = dict(max_steps=3, save_interval=1, eval_dataset="")
    run(*args(checkpoint, problems, tmp_path / "run", **options))
    path = tmp_path / "run" / "checkpoint.safetensors"
    v, data = load_file(tmp_path / "run" / "adapter.safetensors")["v"], path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(data[:-9] if damage == "cut" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    run(*args(checkpoint, problems, tmp_path / "run", init_from="resume", **options))
    assert "checkpoint.safetensors cannot be used" in capsys.readouterr().out
    assert torch.equal(load_file(tmp_path / "run" / "adapter.safetensors")["v"], v)
    for file in ("checkpoint.safetensors", "checkpoint.previous.safetensors"):
        (tmp_path / "run" / file).write_bytes(b"nonsense")
    with pytest.raises(UserError, match="no whole checkpoint"):
        run(*args(checkpoint, problems, tmp_path / "run", init_from="resume", **options))


def test_answers_near_the_limit_pay():
    lengths = torch.tensor([[10, 60, 70, 79, 80]])
    assert grpo.overlong_penalty(lengths, 80, 20).tolist() == [[0, 0, 0.5, pytest.approx(0.95), 1]]
    assert not grpo.overlong_penalty(lengths, 80, 0).any()


def test_truncated_importance_sampling_weights_tokens_by_the_mismatch():
    """Two tokens, on policy: the gradient of each is the advantage times min(trainer's / sampler's share, cap)."""
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    mismatch = (logp.detach() - torch.tensor([[-1.2, -5.0]])).exp().clamp(max=2.0)
    loss, _ = grpo.policy_loss(logp, logp.detach(), torch.tensor([0.5]), torch.tensor([1.0]), torch.ones(1, 2),
                               mismatch=mismatch)
    loss.backward()
    assert torch.allclose(logp.grad, -0.5 * torch.tensor([[math.exp(0.2), 2.0]]))


def test_the_cap_and_recomputation_change_nothing_where_both_sides_agree(checkpoint, problems, tmp_path, lucky):
    for name, options in dict(plain={}, tis=dict(tis_cap=2.0), recompute=dict(recompute=True)).items():
        run(*args(checkpoint, problems, tmp_path / name, eval_dataset="", **options))
    v = {name: load_file(tmp_path / name / "adapter.safetensors")["v"] for name in ("plain", "tis", "recompute")}
    assert torch.equal(v["plain"], v["recompute"]) and torch.allclose(v["plain"], v["tis"], atol=1e-4)


def test_recomputation_goes_with_the_kl_term(net, tokenizer):
    """In its backward pass the blocks run again, after the reference policy has had its turn."""
    adapter, gradients = tinylora.add_adapter(net, u=3, n_tie=4), []
    torch.nn.init.normal_(adapter.v, std=0.1, generator=torch.Generator().manual_seed(0))
    for net.model.recompute in (False, True):
        adapter.zero_grad()
        grpo.accumulate_gradient(net, tokenizer, random_rows(), settings(kl_coef=0.3, micro_batch_tokens=60), 9, 99)
        gradients.append(adapter.v.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-7) and gradients[0].norm() > 0


def test_a_log_prob_that_is_not_finite_is_written_down(checkpoint, problems, tmp_path, lucky, monkeypatch):
    scored = grpo.completion_logprobs

    def broken(*arguments):
        logp, *rest = scored(*arguments)
        logp = logp.clone()
        logp[1, 0] = math.nan
        return logp, *rest

    monkeypatch.setattr(grpo, "completion_logprobs", broken)
    with pytest.raises(UserError, match="not_finite.json"):
        run(*args(checkpoint, problems, tmp_path / "run", eval_dataset=""))
    row = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert len(row["ids"]) == len(row["sampler_logprobs"]) and math.isnan(row["trainer_logprobs"][0])


def test_warnings_name_the_cure():
    calm = dict(truncated=0.0, equal_groups=0.5, entropy=0.5, diff=1e-7, v_max=0.1)
    cfg = SimpleNamespace(max_new_tokens=64, dtype="auto", method="tinylora")
    assert grpo.warnings_of(calm, cfg) == []
    for key, value, word in [("truncated", 0.5, "max_new_tokens"), ("equal_groups", 1.0, "problems"),
                             ("entropy", 0.0, "lr"), ("diff", 0.2, "tis_cap"), ("v_max", 3.0, "lr")]:
        [text] = grpo.warnings_of(calm | {key: value}, cfg)
        assert word in text


def test_a_second_run_moves_the_first_aside(checkpoint, problems, tmp_path):
    for _ in range(2):
        run(*args(checkpoint, problems, tmp_path / "run", max_steps=1, eval_dataset=""))
    assert (tmp_path / "run.1" / "log.jsonl").exists() and (tmp_path / "run" / "log.jsonl").exists()


def test_two_processes_learn_what_one_does(checkpoint, problems, tmp_path, net):
    """torchrun with 2 ranks over gloo, from a v with a KL gradient: the same samples, and the same gradient moments."""
    adapter = tinylora.add_adapter(net, rank=2, u=1, n_tie=1, seed=1337)
    torch.nn.init.normal_(adapter.v, std=0.2, generator=torch.Generator().manual_seed(0))
    parameters, optimizer = dict(adapter.named_parameters()), torch.optim.Adam(adapter.parameters())
    history = {"seconds": 0.0, "base": 0.0, "accuracy": None, "evaluated": None, "best": 0.0}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        grpo.save_checkpoint(str(tmp_path / name / "checkpoint.safetensors"), parameters, optimizer, 0, history,
                             adapter.meta)
    options = dict(max_steps=2, batch_size=4, eval_size=5, kl_coef=0.5, init_from="resume")
    run(*args(checkpoint, problems, tmp_path / "one", **options))
    done = run_script("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "grpo.py",
                      *args(checkpoint, problems, tmp_path / "two", **options))
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / d / "checkpoint.safetensors") for d in ("one", "two"))
    moment = one["optimizer.0.exp_avg"]
    assert (two["optimizer.0.exp_avg"] - moment).norm() < 1e-4 * moment.norm() and moment.norm() > 0
    one, two = (log_of(tmp_path / d) for d in ("one", "two"))
    assert [line.get("length") for line in one] == [line.get("length") for line in two]
    assert one[-1]["eval"]["problems"] == 5 and one[-1] == two[-1]  # each rank asked its share


def test_a_step_follows_the_policy_gradient_of_its_samples(net, tokenizer, checkpoint, problems, lucky, monkeypatch):
    """The whole of training_step against rewards, advantages and gradient computed here from what was sampled."""
    adapter = tinylora.add_adapter(net, u=3, n_tie=4)
    cfg = configure(vars(grpo), args(checkpoint, problems, "unused", batch_size=5, micro_batch_tokens=100))
    rows = eval_math.load_problems(problems)
    grpo.prepare_problems(net, tokenizer, rows, cfg)
    seen = {}

    def sampling(net, tokenizer, prompts, *arguments, **options):
        seen["prompts"], seen["groups"] = prompts, sample.generate(net, tokenizer, prompts, *arguments, **options)
        return seen["groups"]

    def updating(optimizer, parameters, grad_clip):
        seen["gradient"] = adapter.v.grad.clone()
        return 0.0

    monkeypatch.setattr(grpo, "generate", sampling)
    monkeypatch.setattr(grpo, "update", updating)
    optimizer = torch.optim.Adam(adapter.parameters())
    record, _ = grpo.training_step(net, tokenizer, optimizer, rows, cfg, 0, 0, 1, grpo.Interrupt())
    rewards = torch.tensor([[float(len(c.text) % 2 == 0) for c in group] for group in seen["groups"]])
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    loss = 0
    for prompt, group, group_advantages in zip(seen["prompts"], seen["groups"], advantages):
        for c, advantage in zip(group, group_advantages):
            loss = loss - advantage * plain_logprobs(net, grpo.Row(prompt, c.ids, [], 0.0)).mean() / rewards.numel()
    adapter.zero_grad()
    loss.backward()
    assert (seen["gradient"] - adapter.v.grad).norm() <= 1e-4 * adapter.v.grad.norm() and adapter.v.grad.norm() > 0
    assert record["reward"] == pytest.approx(rewards.mean().item())
    assert record["equal_groups"] == pytest.approx((rewards.std(1) == 0).float().mean().item())


def test_ctrl_c_during_an_update_neither_loses_nor_repeats_it(checkpoint, problems, tmp_path, lucky, monkeypatch):
    run(*args(checkpoint, problems, tmp_path / "whole", max_steps=4))
    step, calls = torch.optim.Adam.step, []

    def interrupted(optimizer, *arguments, **options):
        result = step(optimizer, *arguments, **options)
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(torch.optim.Adam, "step", interrupted)
        run(*args(checkpoint, problems, tmp_path / "parts", max_steps=4))
    assert stopped.value.code == 130 and len(calls) == 2
    run(*args(checkpoint, problems, tmp_path / "parts", max_steps=4, init_from="resume"))
    assert torch.equal(*(load_file(tmp_path / d / "adapter.safetensors")["v"] for d in ("whole", "parts")))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


def test_resuming_a_finished_run_reports_the_same_line(checkpoint, problems, tmp_path, lucky, capsys):
    run(*args(checkpoint, problems, tmp_path / "run"))
    first = capsys.readouterr().out.splitlines()[-1]
    run(*args(checkpoint, problems, tmp_path / "run", init_from="resume"))
    assert capsys.readouterr().out.splitlines()[-1].rpartition(" in ")[0] == first.rpartition(" in ")[0]


def test_a_checkpoint_of_another_adapter_is_refused(checkpoint, problems, tmp_path):
    run(*args(checkpoint, problems, tmp_path / "run", max_steps=1, eval_dataset=""))
    for changes in (dict(seed=7), dict(tie="structured"), dict(u=2)):
        options = dict(eval_dataset="", init_from="resume") | changes
        with pytest.raises(UserError, match=f"made with another .*{next(iter(changes))}"):
            run(*args(checkpoint, problems, tmp_path / "run", **options))


def test_a_gradient_that_is_not_finite_is_never_saved(checkpoint, problems, tmp_path, lucky, monkeypatch):
    scored = grpo.completion_logprobs
    monkeypatch.setattr(grpo, "completion_logprobs", lambda *a: (scored(*a)[0] * math.nan, *scored(*a)[1:]))
    with pytest.raises(UserError, match="not finite"):
        run(*args(checkpoint, problems, tmp_path / "run", eval_dataset=""))
    assert not (tmp_path / "run" / "adapter.safetensors").exists()


REFUSED = {
    "missing model directory": (dict(model="nowhere"), "no model directory at 'nowhere'"),
    "unknown data set": (dict(dataset="gsm9k"), "'gsm9k'"),
    "missing data file": (dict(dataset="nowhere.jsonl"), "nowhere.jsonl"),
    "group of one": (dict(group_size=1), "group_size must be at least 2"),
    "top_p in training": (dict(top_p=0.9), "top_p"),
    "greedy training": (dict(temperature=0.0), "temperature must be above 0"),
    "unknown objective": (dict(objective="ppo"), "objective must be"),
    "unknown method": (dict(method="dora"), "method 'dora' is unknown"),
    "wrong type": (dict(max_steps="many"), "--max_steps wants an int"),
    "unknown key": (dict(learning_rate=1), "learning_rate"),
    "nothing to resume": (dict(init_from="resume"), "holds no whole checkpoint"),
    "overlong_tokens beyond the limit": (dict(overlong_tokens=10**6), "overlong_tokens must be"),
    "prompt longer than the context": (
        dict(prompt_template="{question}" * 40),
        "longer than the model's context of 512",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_gets_one_line_and_exit_code_2(checkpoint, problems, tmp_path, name):
    changes, words = REFUSED[name]
    assert_refused(run_script("grpo.py", *args(checkpoint, problems, tmp_path / "run", **changes)), words)
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()
