"""support/packing.py: log-probs of packed rollouts, in chunks of logits, against the plain forward pass."""

import inspect
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import varlen

import model
import tinylora
from support import packing
from support.packing import Packed, Rollout, completion_logprobs, micro_batches, token_logprobs


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in the scripts that forks.py starts: more threads round in another way, and wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_rollouts(count=9, seed=0):
    """Completions of 1 to 11 tokens, in groups of three to one prompt, with what training needs."""
    rng = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=rng))
        return torch.randint(5, 200, (length,), generator=rng).tolist()

    prompts = [ids(3, 9) for _ in range(math.ceil(count / 3))]
    completions = [[7], *(ids(1, 12) for _ in range(count - 1))]  # one of a single token, which is no input
    return [Rollout(prompts[i // 3], completion, [-1.0] * len(completion), float(torch.randn(1, generator=rng)))
            for i, completion in enumerate(completions)]


def plain_logprobs(net, rollout, temperature=1.0):
    """All log-probs [len(ids), vocab] at the completion's places, by a forward pass of this rollout alone."""
    logits = net(torch.tensor([rollout.prompt + rollout.ids]))[0, len(rollout.prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1)


def of_ids(logprobs, rollout):
    return logprobs[range(len(rollout.ids)), rollout.ids]


def entropy_of(logprobs):
    return -(logprobs.exp() * logprobs).sum(-1)


# ------------------------------------------------------------------------------------------------- chunks of logits


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_chunked_logprobs_equal_the_full_softmax(chunk, trained):
    torch.manual_seed(0)
    inputs = [torch.randn(23, 8).double(), torch.randn(50, 8).double()]
    targets, weights = torch.randint(0, 50, (23,)), torch.randn(23)
    ours, theirs = ([x.clone().requires_grad_(wanted) for x, wanted in zip(inputs, (True, trained))] for _ in range(2))
    logprobs, entropy = token_logprobs(*ours, targets, 0.7, chunk)
    exact = torch.log_softmax(theirs[0] @ theirs[1].T / 0.7, -1)
    (logprobs * weights).sum().backward()
    (exact[range(23), targets] * weights).sum().backward()
    assert torch.allclose(logprobs, exact[range(23), targets], atol=1e-12) and not entropy.requires_grad
    assert torch.allclose(entropy, entropy_of(exact), atol=1e-12)
    assert torch.allclose(ours[0].grad, theirs[0].grad, atol=1e-12)
    assert not trained or torch.allclose(ours[1].grad, theirs[1].grad, atol=1e-12)
    with torch.no_grad():
        again = token_logprobs(*ours, targets, 0.7, chunk)
    assert torch.equal(again[0], logprobs) and torch.allclose(again[1], entropy, atol=1e-12)


def test_the_gradient_of_a_nearly_certain_token_survives_16_bits():
    """At a probability of 0.9999 it is a small difference of large numbers, which must be taken before rounding."""
    hidden = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    head = torch.tensor([[9.25, 0, 0], [0, 1, 0], [0, 0, 1.0]], dtype=torch.bfloat16)
    logprobs, _ = token_logprobs(hidden, head, torch.tensor([0]), 1.0)
    logprobs.sum().backward()
    p = torch.softmax(head[:, 0].double(), 0)
    exact = head[0].double() - p @ head.double()
    assert (hidden.grad.double() - exact).norm() <= 0.02 * exact.norm()


def peak_bytes(tokens, chunk, trained, vocab=5000):
    """The most that is allocated at a time in the forward and backward pass, by torch's profiler."""
    hidden = torch.randn(tokens, 4, requires_grad=True)
    head = torch.randn(vocab, 4, requires_grad=trained)
    targets = torch.randint(0, vocab, (tokens,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        logprobs, _ = token_logprobs(hidden, head, targets, 0.7, chunk)
        logprobs.sum().backward()
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_no_more_than_one_chunk_of_logits_is_alive(trained):
    """Some copies of one chunk (logits, log-probs, gradients), whatever the number of tokens is."""
    bound = 4.5 * 8 * 5000 * 4
    assert peak_bytes(40, 8, trained) < bound and peak_bytes(200, 8, trained) < bound
    assert peak_bytes(200, 200, trained) > 5 * bound


def test_a_chunk_has_at_most_256_mb_of_logits(monkeypatch):
    for vocab, expected in [(2**10, [2500]), (2**16, [1024, 1024, 452]), (2**17 + 1, [511] * 4 + [456])]:
        sizes = []
        monkeypatch.setattr(packing, "chunk_logprobs", lambda h, _, t, __, to=sizes: (to.append(len(h)), t, t, 0)[1:])
        token_logprobs(torch.zeros(2500, 1), torch.zeros(vocab, 1), torch.zeros(2500), 1.0)
        assert sizes == expected


# ------------------------------------------------------------------------------------------------------ packed rows


@pytest.mark.parametrize("tokens_a_call", [1, 12, 256])  # a completion in a call, some, and all to a prompt
@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "some tokens"])
def test_logprobs_depend_neither_on_neighbours_nor_on_the_layout(net, monkeypatch, tokens_a_call, masked):
    monkeypatch.setattr(packing, "TOKENS_A_CALL", tokens_a_call)
    net.double()
    rollouts, others = random_rollouts(), random_rollouts(5, seed=1)
    for i, rollout in enumerate(rollouts):
        if masked and len(rollout.ids) > 1:
            rollout.loss_mask = [(i + t) % 3 > 0 for t in range(len(rollout.ids))]
    with torch.no_grad():
        exact = [plain_logprobs(net, rollout, 0.7) for rollout in rollouts]
        for batch in (rollouts, others + rollouts, rollouts[::-1] + others):
            logprobs, entropy, mask = completion_logprobs(net, batch, 0.7)
            assert logprobs.shape == entropy.shape == mask.shape == (len(batch), max(len(r.ids) for r in batch))
            for rollout, alone in zip(rollouts, exact):
                line = next(i for i, other in enumerate(batch) if other is rollout)
                length = len(rollout.ids)
                loss_mask = torch.tensor(rollout.loss_mask)
                assert torch.equal(mask[line, :length], loss_mask) and not mask[line, length:].any()
                assert torch.allclose(logprobs[line, :length], of_ids(alone, rollout) * loss_mask, rtol=1e-12)
                assert torch.allclose(entropy[line, :length], entropy_of(alone) * loss_mask, rtol=1e-12)
                assert not logprobs[line, length:].any() and not entropy[line, length:].any()


def test_on_a_gpu_packed_rows_go_to_one_kernel(monkeypatch):
    """A stand-in with the real signature cuts the spans apart, and aligns the last query with the last key."""
    signature = inspect.signature(varlen.varlen_attn)

    def kernel(*arguments, **options):
        a = SimpleNamespace(**signature.bind(*arguments, **options).arguments)
        assert a.window_size == (-1, 0) and a.cu_seq_q.dtype == a.cu_seq_k.dtype == torch.int32
        assert a.query.shape[1:] == (4, 8) and a.key.shape[1:] == a.value.shape[1:] == (2, 8)
        assert (a.max_q, a.max_k) == (a.cu_seq_q.diff().max(), a.cu_seq_k.diff().max())
        assert len(a.key) == a.cu_seq_k[-1]
        out = []
        for (i, j), (m, n) in zip(*(itertools.pairwise(ends.tolist()) for ends in (a.cu_seq_q, a.cu_seq_k))):
            q = a.query[i:j].transpose(0, 1)
            k, v = (x[m:n].transpose(0, 1).repeat_interleave(2, dim=0) for x in (a.key, a.value))
            past = torch.ones(j - i, n - m, dtype=torch.bool).tril(n - m - (j - i))
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~past, -math.inf)
            out.append((scores.softmax(-1) @ v).transpose(0, 1))
        return torch.cat(out)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    rollouts = random_rollouts()
    total = sum(len(r.prompt) for r in rollouts[::3]) + sum(len(r.ids) - 1 for r in rollouts)
    q, k, v = (torch.randn(1, heads, total, 8, dtype=torch.float64) for heads in (4, 2, 2))
    packed = Packed(rollouts, "cpu")
    assert packed.ids.shape == packed.positions.shape == (1, total)
    assert torch.allclose(packed.attend_in_one_call(q, k, v), packed.attend(0, q, k, v), atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_packed_rows_on_a_gpu(checkpoint):
    """Log-probs, and the gradient of v: the kernel in bfloat16 against plain passes in float32 on the CPU."""
    results = []
    for device in ("cpu", "cuda"):
        net, rollouts = model.load_model(checkpoint, device=device), random_rollouts()
        adapter = tinylora.add_adapter(net, u=3, n_tie=4)
        torch.nn.init.constant_(adapter.v, 0.1)
        logprobs, _, mask = completion_logprobs(net, rollouts)
        logprobs.mean().backward()
        results.append((logprobs.detach().cpu(), adapter.v.grad.cpu()))
    (exact, gradient), (ours, our_gradient) = results
    assert (ours - exact).abs().mean() <= 0.05
    assert (our_gradient - gradient).norm() <= 0.1 * gradient.norm()


def test_the_gradient_is_the_same_to_the_bit_every_time(net):
    """With threads, and where 600 rollouts share the last token of their prompt."""
    adapter = tinylora.add_adapter(net, rank=2, u=3)
    torch.nn.init.constant_(adapter.v, 0.1)
    rng = torch.Generator().manual_seed(0)
    rollouts = [Rollout([5, 6, 7], torch.randint(5, 200, (2,), generator=rng).tolist()) for _ in range(600)]
    seen = set()
    torch.set_num_threads(4)
    try:
        for _ in range(10):
            adapter.v.grad = None
            logprobs, _, _ = completion_logprobs(net, rollouts)
            (logprobs * torch.linspace(-1, 1, 1200).view(600, 2)).sum().backward()
            seen.add(adapter.v.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(1)
    assert len(seen) == 1


# ---------------------------------------------------------------------------------------------------- micro-batches


def packed_tokens(rollouts):
    return sum(map(len, {tuple(r.prompt) for r in rollouts})) + sum(len(r.ids) for r in rollouts)


@pytest.mark.parametrize("bound", [1, 15, 40, 10**6])
def test_micro_batches_hold_all_rollouts_and_are_as_full_as_the_bound_allows(bound):
    rollouts = random_rollouts(50)
    batches = list(micro_batches(rollouts, bound))
    assert sorted(id(r) for batch in batches for r in batch) == sorted(map(id, rollouts))
    assert all(packed_tokens(batch) <= bound or len(batch) == 1 for batch in batches)
    for batch, after in itertools.pairwise(batches):
        assert packed_tokens(batch + after[:1]) > bound
    assert len(batches) == {1: 50, 10**6: 1}.get(bound, len(batches))
    assert list(micro_batches([], bound)) == []
