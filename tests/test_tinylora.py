"""tinylora.py: the update is the paper's, tied as the paper says, and a file of v alone brings it back."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, make_checkpoint
from safetensors.torch import load_file

import model
import tinylora
from configurator import UserError


def filled(adapter, seed=1, scale=0.3):
    with torch.no_grad():
        adapter.v.copy_(torch.randn(adapter.v.shape, generator=torch.Generator().manual_seed(seed)) * scale)
    return adapter


def dense(net, adapter):
    """The same model with W + U S R V^T in float64, from numpy's SVD: what the unmerged layers must amount to."""
    meta, state = adapter.meta, {k: v.double() for k, v in net.state_dict().items()}
    for i, name in enumerate(tinylora.adapted_linears(net)):
        W = state[f"{name}.weight"]
        U, S, Vt = np.linalg.svd(W.numpy())
        U, S, Vt = U[:, : meta["rank"]], S[: meta["rank"]], Vt[: meta["rank"]]
        sign = np.sign(U[np.abs(U).argmax(0), np.arange(meta["rank"])])
        if meta["method"] == "lora_xs":
            R = adapter.v.detach()[i].view(meta["rank"], meta["rank"]).double().numpy()
        else:
            P = tinylora.random_projection(meta["seed"], name, meta["u"], meta["rank"]).double().numpy()
            group = tinylora.tying_groups(len(adapter.groups), meta["n_tie"], meta["tie"])[i]
            R = sum(v * p for v, p in zip(adapter.v.detach()[group].double().numpy(), P))
        state[f"{name}.weight"] = W + torch.from_numpy((U * sign * S) @ R @ (Vt * sign[:, None]))
    other = model.Transformer(net.config).double()
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize(
    "settings",
    [
        dict(u=13, n_tie=0),
        dict(u=1, n_tie=4),
        dict(u=3, n_tie=1, rank=3),
        dict(u=2, n_tie=1, tie="structured"),
        dict(method="lora_xs", rank=2),
    ],
)
def test_update_equals_the_dense_formula(net, settings):
    ids = torch.randint(0, 200, (2, 12))
    with torch.no_grad():
        before = net(ids)
        adapter = tinylora.add_adapter(net, seed=7, **settings)
        assert (net(ids) - before).abs().max() < 1e-5  # v = 0
        exact = dense(net, filled(adapter))(ids)
        assert (net(ids) - exact).abs().max() < 1e-4 * exact.abs().max()
        assert (exact - before).abs().max() > 0.1  # the update is there to be seen


def test_merge_equals_unmerged(net):
    tinylora.add_adapter(net, u=3, n_tie=5)
    filled(net.adapter)
    ids = torch.randint(0, 200, (2, 12))
    with torch.no_grad():
        unmerged = net(ids)
        assert (tinylora.merge(net)(ids) - unmerged).abs().max() < 1e-4 * unmerged.abs().max()
    tinylora.add_adapter(net)  # the old one is gone


def test_a_small_update_survives_in_bfloat16_though_merged_into_the_weights_it_is_rounded_away():
    """How much of the exact update is in the outputs of a bf16 layer, over 4,096 random inputs."""
    torch.manual_seed(0)
    linear = nn.Linear(512, 512, bias=False).bfloat16().requires_grad_(False)
    U, S, Vt = tinylora.top_svd(linear.weight, 2)
    R = torch.full((1, 2, 2), 1e-3)
    update = (U * S) @ R[0] @ Vt
    x = torch.randn(4096, 512).bfloat16()
    exact, base = x.float() @ update.T, linear(x).float()

    def surviving(y):
        return (((y.float() - base) * exact).sum() / exact.square().sum()).item()

    merged = torch.nn.functional.linear(x, (linear.weight.float() + update).bfloat16())
    tinylora.AdaptedLinear.adapt(linear, SimpleNamespace(R=R), 0, (U * S).bfloat16(), Vt.bfloat16())
    assert surviving(merged) < 0.3
    assert abs(surviving(linear(x)) - 1) < 0.05


def test_only_v_is_trained_and_its_gradient_at_zero_is_not_zero(net):
    adapter = tinylora.add_adapter(net, u=13)
    net(torch.randint(0, 200, (1, 9))).square().mean().backward()
    assert adapter.v.dtype == torch.float32 and adapter.v.grad.abs().min() > 0
    assert all(p.grad is None for p in net.parameters()) and [*adapter.parameters()] == [adapter.v]
    assert "adapter.v" not in net.state_dict()  # the model's names stay the checkpoint's


@pytest.mark.parametrize("layers, modules", [(24, 168), (28, 196), (36, 252), (32, 224)])
@pytest.mark.parametrize("n_tie", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_group_counts_are_the_papers(layers, modules, n_tie):
    tiled, structured = (tinylora.tying_groups(modules, n_tie, tie) for tie in ("tiled", "structured"))
    assert sorted(set(tiled)) == list(range(-(-modules // n_tie)))
    assert sorted(set(structured)) == list(range(7 * -(-layers // n_tie)))
    assert len({i % 7 for i, g in enumerate(structured) if g == 3}) == 1  # structured: one type to a group
    assert tinylora.tying_groups(modules, 0) == [0] * modules


def test_thirteen_numbers_on_qwen_7b():
    assert max(tinylora.tying_groups(196, 16)) + 1 == 13


def test_tied_numbers_keep_their_dimensions(net):
    """One P for all modules would leave r^2 = 4 of 13 (the map v -> stacked R has rank min(u, r^2 N))."""
    adapter = tinylora.add_adapter(net, u=13, n_tie=0)
    assert torch.linalg.matrix_rank(adapter.P.transpose(0, 1).flatten(1)) == 13


def test_projection_is_the_same_in_another_process_and_for_any_thread_count():
    code = (
        "import sys, torch; sys.path.insert(0, '.'); import tinylora; torch.set_num_threads({});"
        "print(tinylora.random_projection(3, 'model.layers.5.mlp.up_proj', 13, 2).numpy().tobytes().hex())"
    )
    outs = {subprocess.check_output([sys.executable, "-c", code.format(n)], cwd=ROOT) for n in (1, 4)}
    here = tinylora.random_projection(3, "model.layers.5.mlp.up_proj", 13, 2)
    assert outs == {here.numpy().tobytes().hex().encode() + b"\n"}
    assert not torch.equal(here, tinylora.random_projection(3, "model.layers.6.mlp.up_proj", 13, 2))
    big = tinylora.random_projection(0, "x", 5000, 2)
    assert abs(big.mean()) < 0.02 and abs(big.var() - 0.5) < 0.02  # N(0, 1/r)


@pytest.mark.parametrize("shape", [(300, 200), (150, 400), (40, 30), (64, 64)])
@pytest.mark.parametrize("spectrum", ["flat", "decaying", "one value towers"])
def test_top_svd_equals_the_full_one(shape, spectrum):
    torch.manual_seed(0)
    W = torch.randn(shape)
    if spectrum != "flat":
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        W = U * (1 / torch.arange(1, len(S) + 1) if spectrum == "decaying" else S + 1000 * (S == S[0])) @ Vt
    U, S, Vt = tinylora.top_svd(W, 3)
    U0, S0, Vt0 = torch.linalg.svd(W.double(), full_matrices=False)
    assert torch.allclose(S.double(), S0[:3], rtol=1e-5)
    assert ((U0[:, :3] * U).sum(0).abs() > 1 - 1e-6).all() and ((Vt0[:3] * Vt).sum(1).abs() > 1 - 1e-6).all()
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


def test_large_matrices_do_not_fall_back_to_the_full_svd():
    torch.manual_seed(0)
    for W in (torch.randn(300, 500), torch.randn(500, 300) + 30 * torch.randn(500, 1) @ torch.randn(1, 300)):
        U, S, Vt = tinylora._lanczos(W.double(), 2, tol=1e-6, block=8, max_rounds=60)
        assert torch.allclose(S, torch.linalg.svdvals(W.double())[:2], rtol=1e-9)


def test_signs_inside_the_svd_change_nothing(monkeypatch):
    torch.manual_seed(0)
    W, svd = torch.randn(20, 30), torch.linalg.svd
    expected = tinylora.top_svd(W, 2)

    def flipped(*args, **kwargs):
        U, S, Vt = svd(*args, **kwargs)
        return -U, S, -Vt

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    assert all(torch.equal(a, b) for a, b in zip(expected, tinylora.top_svd(W, 2)))


def test_file_holds_v_alone_and_gives_the_same_logits(net, checkpoint, tmp_path):
    path = str(tmp_path / "deep" / "adapter.safetensors")
    tinylora.save_adapter(filled(tinylora.add_adapter(net, u=13, n_tie=0, seed=5)), path)
    assert {k: v.shape for k, v in load_file(path).items()} == {"v": (1, 13)}
    other = model.load_model(checkpoint, device="cpu")
    tinylora.load_adapter(other, str(tmp_path / "deep"))
    ids = torch.randint(0, 200, (2, 12))
    with torch.no_grad():
        assert torch.equal(other(ids), net(ids))


def test_an_adapter_of_another_base_is_refused(net, tmp_path):
    path = str(tmp_path / "adapter.safetensors")
    tinylora.save_adapter(tinylora.add_adapter(net), path)
    other = model.load_model(make_checkpoint(tmp_path / "other", seed=1), device="cpu")
    with pytest.raises(UserError, match="another base model"):
        tinylora.load_adapter(other, path)
    deeper = model.load_model(make_checkpoint(tmp_path / "deeper", num_hidden_layers=3), device="cpu")
    with pytest.raises(UserError, match="14 linears, this one has 21"):
        tinylora.load_adapter(deeper, path)


def test_wrong_settings_and_files_are_refused(net, tmp_path):
    for settings in (dict(method="dora"), dict(rank=0), dict(rank=99), dict(u=0), dict(n_tie=-1), dict(tie="random")):
        with pytest.raises(UserError):
            tinylora.add_adapter(net, **settings)
    (tmp_path / "adapter.safetensors").write_bytes(b"nonsense")
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no adapter can be read"):
            tinylora.load_adapter(net, str(path))
