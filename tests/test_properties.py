"""What holds for any input: tying, and advantages."""

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo
import tinylora


@settings(max_examples=60, deadline=None)
@given(layers=st.integers(1, 40), n_tie=st.integers(0, 300), tie=st.sampled_from(["tiled", "structured"]))
def test_tying(layers, n_tie, tie):
    """Every linear has a group, groups are numbered without a gap, none has more than n_tie members, and few less."""
    N = 7 * layers
    groups = tinylora.tying_groups(N, n_tie, tie)
    sizes = Counter(groups)
    assert len(groups) == N and set(groups) == set(range(max(groups) + 1))
    if n_tie == 0:
        assert len(sizes) == 1
    elif tie == "tiled":
        assert len(sizes) == -(-N // n_tie) and groups == sorted(groups)
        assert all(sizes[group] == n_tie for group in range(len(sizes) - 1))
    else:
        assert len(sizes) == 7 * -(-layers // n_tie) and max(sizes.values()) <= n_tie
        types = {(group, i % 7) for i, group in enumerate(groups)}
        assert len(types) == len(sizes)  # a group has linears of one type alone


REWARDS = st.integers(2, 9).flatmap(lambda size: st.lists(
    st.lists(st.floats(-2, 2, width=16), min_size=size, max_size=size), min_size=1, max_size=5))


@settings(max_examples=60, deadline=None)
@given(rewards=REWARDS, objective=st.sampled_from(["grpo", "dr_grpo", "dapo", "gspo"]),
       shift=st.sampled_from([-1.0, 2.0]))
def test_advantages(rewards, objective, shift):
    """They add up to nothing in a group, do not see a shift, favour the better answer; 0 where all are equal."""
    rewards = torch.tensor(rewards)
    advantages = grpo.group_advantages(rewards, objective)
    assert advantages.isfinite().all() and advantages.sum(1).abs().max() < 1e-3
    if (rewards.std(1) > 0.01).all():  # the eps beside a smaller std is felt
        assert torch.allclose(grpo.group_advantages(rewards + shift, objective), advantages, atol=1e-2)
    order = rewards.argsort(1)
    assert (advantages.gather(1, order).diff(dim=1) >= -1e-5).all()
    equal = torch.full((2, 4), shift)
    assert not grpo.group_advantages(equal, objective).any()
    flipped = grpo.group_advantages(rewards.flip(1), objective).flip(1)
    assert torch.allclose(flipped, advantages, atol=1e-4)
