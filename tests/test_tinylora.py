"""tinylora.py: the update is the paper's, tied as the paper says, and a file of v alone brings it back."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, assert_refused, make_checkpoint
from forks import fork_script
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import grpo
import model
import sample
import sft
import tinylora
from configurator import UserError, configure


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "svd-cache"))
    return tmp_path / "svd-cache"


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small gain nothing from more, and wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def filled(adapter, seed=1, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.1 if hasattr(adapter, "A") else scale))
    return adapter


def dense(net, adapter):
    """The same model with W + U S R V^T in float64, from numpy's SVD: what the unmerged layers must amount to."""
    meta, state = adapter.meta, {k: v.double() for k, v in net.state_dict().items()}
    names = [n for n in tinylora.adapted_linears(net) if meta["targets"] == "all" or n.endswith(meta["targets"])]
    for i, name in enumerate(names):
        W = state[f"{name}.weight"]
        if meta["method"] == "lora":
            update = adapter.B[i].detach().double() @ adapter.A[i].detach().double() * meta["alpha"] / meta["rank"]
            state[f"{name}.weight"] = W + update
            continue
        U, S, Vt = np.linalg.svd(W.numpy())
        U, S, Vt = U[:, : meta["rank"]], S[: meta["rank"]], Vt[: meta["rank"]]
        sign = np.sign(U[np.abs(U).argmax(0), np.arange(meta["rank"])])
        if meta["method"] == "lora_xs":
            R = adapter.v.detach()[i].view(meta["rank"], meta["rank"]).double().numpy()
        else:
            P = tinylora.random_projection(meta["seed"], name, meta["u"], meta["rank"]).double().numpy()
            group = tinylora.tying_groups(len(names), meta["n_tie"], meta["tie"])[i]
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
        dict(u=2, n_tie=0, targets="v_proj"),
        dict(method="lora_xs", rank=2),
        dict(method="lora", rank=3, alpha=8, targets="all"),
        dict(method="lora", rank=2, targets="down_proj"),
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


def test_merging_into_16_bits_rounds_once(net):
    net = net.bfloat16()
    adapter = filled(tinylora.add_adapter(net, u=3, n_tie=5))
    adapter.refresh()
    expected = [(m.weight.float() + m.US.float() @ m.R @ m.Vt.float()).bfloat16().clone() for m in adapter.linears]
    linears = list(adapter.linears)
    tinylora.merge(net)
    assert all(torch.equal(m.weight, W) for m, W in zip(linears, expected))


def test_a_detached_adapter_leaves_nothing(net):
    before = [{*vars(module)} for module in net.modules()]
    tinylora.add_adapter(net, u=3)
    net(IDS)
    tinylora.detach(net)
    net(IDS)
    assert [{*vars(module)} for module in net.modules()] == before and not net.model._forward_pre_hooks
    assert not any(isinstance(module, tinylora.AdaptedLinear) for module in net.modules())


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
    tinylora.AdaptedLinear.adapt(linear, 0, (U * S).bfloat16(), Vt.bfloat16())
    linear.R = R[0]
    assert surviving(merged) < 0.3
    assert abs(surviving(linear(x)) - 1) < 0.05


def test_only_v_is_trained_and_its_gradient_at_zero_is_not_zero(net):
    adapter = tinylora.add_adapter(net, u=13)
    net(torch.randint(0, 200, (1, 9))).square().mean().backward()
    assert adapter.v.dtype == torch.float32 and adapter.v.grad.abs().min() > 0
    assert all(p.grad is None for p in net.parameters()) and [*adapter.parameters()] == [adapter.v]
    assert "adapter.v" not in net.state_dict()  # the model's names stay the checkpoint's


SHAPES = {  # layers, hidden, intermediate, heads, kv_heads
    "0.5B": (24, 896, 4864, 14, 2), "1.5B": (28, 1536, 8960, 12, 2), "3B": (36, 2048, 11008, 16, 2),
    "7B": (28, 3584, 18944, 28, 4), "8B": (32, 4096, 14336, 32, 8)}


@pytest.mark.parametrize("size", SHAPES)
def test_group_counts_are_the_papers(size):
    """Without weights: the model is on the meta device, and plan is all of add_adapter but the SVD."""
    layers, hidden, intermediate, heads, kv_heads = SHAPES[size]
    raw = dict(model_type="qwen2", vocab_size=100, hidden_size=hidden, intermediate_size=intermediate,
               num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads)
    config = model.Config(**{k: v for k, v in raw.items() if k != "model_type"}, head_dim=hidden // heads, raw=raw,
                          rms_norm_eps=1e-6, max_position_embeddings=100, rope_theta=1e4, rope_scaling=None,
                          tie_word_embeddings=True, qkv_bias=True)
    with torch.device("meta"):
        net = model.Transformer(config)
    N = 7 * layers
    for n_tie in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        settings = dict(method="tinylora", rank=2, u=1, n_tie=n_tie, seed=0, targets="all")
        tiled, structured = (tinylora.plan(net, settings | {"tie": tie})[1] for tie in ("tiled", "structured"))
        assert len(tiled) == N and sorted(set(tiled)) == list(range(-(-N // n_tie)))
        assert all(tiled.count(g) == n_tie for g in range(N // n_tie))
        assert sorted(set(structured)) == list(range(7 * -(-layers // n_tie)))
        assert len({i % 7 for i, g in enumerate(structured) if g == 3}) == 1  # one type to a group
    assert set(tinylora.plan(net, settings | {"tie": "tiled", "n_tie": 0})[1]) == {0}


def test_targets_choose_linears_and_may_have_vectors_of_their_own(net):
    def groups(targets, n_tie, tie="tiled"):
        settings = dict(method="tinylora", rank=1, u=1, n_tie=n_tie, tie=tie, seed=0, targets=targets)
        modules, groups, _ = tinylora.plan(net, settings)
        return [name.split(".")[-1][0] + name.split(".")[2] for name in modules], groups

    assert groups("attention", 0) == (["q0", "k0", "v0", "o0", "q1", "k1", "v1", "o1"], [0] * 8)
    assert groups("up_proj,q_proj", 1) == (["q0", "u0", "q1", "u1"], [0, 1, 2, 3])  # in forward order
    assert groups("attention/mlp", 0)[1] == [0, 0, 0, 0, 1, 1, 1] * 2
    assert groups("mlp/attention", 5)[1] == [2, 2, 2, 2, 0, 0, 0, 2, 3, 3, 3, 0, 0, 1]  # each part tiled on its own
    assert groups("mlp/q_proj", 2, "structured")[1] == [3, 0, 1, 2] * 2
    for bad in ("", "head", "all,q_proj", "attention/q_proj", "mlp//attention"):
        with pytest.raises(UserError, match="targets must name"):
            groups(bad, 0)


def test_thirteen_numbers_on_qwen_7b():
    assert max(tinylora.tying_groups(196, 16)) + 1 == 13


@pytest.mark.parametrize("u, n_tie, tie", [(13, 0, "tiled"), (70, 0, "tiled"), (9, 2, "tiled"), (5, 1, "tiled"),
                                           (7, 2, "structured"), (1, 3, "tiled")])
def test_tied_numbers_keep_their_dimensions(net, u, n_tie, tie):
    """The map from a group's v to its linears' stacked updates has rank min(u, r^2 g); with one P it would be 4."""
    adapter = tinylora.add_adapter(net, rank=2, u=u, n_tie=n_tie, tie=tie)
    linears, columns = list(tinylora.adapted_linears(net).values()), []
    for i in range(u):
        with torch.no_grad():
            adapter.v.copy_(torch.eye(u)[i].expand_as(adapter.v))
        adapter.refresh()
        columns.append([m.US.double() @ adapter.R[m.index].double() @ m.Vt.double() for m in linears])
    for group in range(len(adapter.v)):
        mine = [j for j, g in enumerate(adapter.groups.tolist()) if g == group]
        stacked = torch.stack([torch.cat([column[j].flatten() for j in mine]) for column in columns])
        assert torch.linalg.matrix_rank(stacked) == min(u, 4 * len(mine))


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


def test_the_numbers_behind_a_seed_are_the_same_for_ever():
    """Adapters, data orders and samples that people have are made of these: another number is another format."""
    name = "model.layers.0.self_attn.q_proj"
    P = tinylora.random_projection(1337, name, 2, 2)
    assert P.flatten().tolist() == pytest.approx([0.0922771, 0.03799395, -0.31146783, 0.19029599,
                                                  -0.64399171, 0.41659591, -0.01957908, 0.74302101], abs=1e-6)
    [(_, A)] = tinylora.lora_init({name: nn.Linear(4, 3)}, 2, 1337)
    assert A.flatten().tolist() == pytest.approx([-0.19383518, 0.49861515, 0.18941867, 0.46004704,
                                                  0.24388088, -0.39917314, 0.2023723, -0.31283572], abs=1e-6)
    assert grpo.epoch_order(1337, 1, 8).tolist() == [0, 3, 1, 4, 7, 5, 2, 6]
    assert sample.row_uniforms(1337, 5, 2, 4).tolist() == pytest.approx([0.16683972, 0.12831873, 0.25323653,
                                                                         0.33500743], abs=1e-7)


def test_an_adapter_saved_by_the_first_version_is_read():
    net = model.load_model(ROOT / "toy/base", device="cpu")
    adapter = tinylora.load_adapter(net, "hex:3c23d70abf000000:tinylora-2:method=tinylora:rank=2:u=2:n_tie=0:tie=tiled:"
                                    "seed=7:targets=all:base=b613b668bb51295a3c353af3bb91c032:dtype=float32")
    assert adapter.v.tolist() == [[np.float32(0.01), -0.5]] and adapter.meta["seed"] == 7


@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_go_the_other_way_round_to_the_same_result(monkeypatch, bias):
    linear, others = nn.Linear(30, 20, bias=bias), []
    monkeypatch.setattr(tinylora, "LARGE", 20 * 30 - 1)
    monkeypatch.setattr(nn.functional, "linear", lambda *a, real=nn.functional.linear: (others.append(1), real(*a))[1])
    for rows in (1, 7, 8, 32, 33):
        x = torch.randn(rows, 1, 30)
        assert torch.allclose(tinylora.few_rows_linear(x, linear.weight, linear.bias), linear(x), atol=1e-5)
    assert len(others) == 5 + 3


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


def spectrum_of(kind, n):
    i = torch.arange(1, n + 1).double()
    spiked = 1 + 3 / i.sqrt() * (i < 40)
    return {"decaying": 1 / i, "spiked": spiked, "one value towers": 1 / i + 1e4 * (i == 1),
            "one value towers over spikes": spiked + 1e4 * (i == 1)}[kind]


@pytest.mark.parametrize("shape", [(900, 600), (560, 1000)])
@pytest.mark.parametrize("kind", ["flat", "decaying", "spiked", "one value towers", "one value towers over spikes"])
def test_large_matrices_need_no_full_svd(shape, kind, monkeypatch, capsys):
    """To 1e-5 in the singular values and 1e-4 in the subspace; flat is Gaussian: neighbours 1 % apart."""
    torch.manual_seed(0)
    W = torch.randn(shape, dtype=torch.float64)
    if kind != "flat":
        U, _, Vt = torch.linalg.svd(W, full_matrices=False)
        W = U * spectrum_of(kind, min(shape)) @ Vt
    W = W.float()
    U0, S0, Vt0 = (t[..., :2, :] if t is not None and i == 2 else t[..., :2] for i, t in
                   enumerate(torch.linalg.svd(W.double(), full_matrices=False)))
    eigh, largest = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "svd", None)
    monkeypatch.setattr(torch.linalg, "eigh", lambda T: largest.append(len(T)) or eigh(T))
    U, S, Vt = tinylora.top_svd(W, 2)
    assert max(largest) < 500  # of 600 and 560: the Krylov space did not fill everything
    assert torch.allclose(S.double(), S0, rtol=1e-5)
    for ours, exact in ((U.double(), U0), (Vt.T.double(), Vt0.T)):
        assert (ours - exact @ (exact.T @ ours)).norm(dim=0).max() <= 1e-4  # the subspace
        assert ((ours * exact).sum(0).abs() - 1).abs().max() <= 1e-4  # and each vector
    assert capsys.readouterr().out == ""


def test_the_svd_says_so_where_vectors_are_open_or_it_does_not_converge(capsys):
    U, S, Vt = tinylora.top_svd(torch.eye(600), 2, "model.x")
    assert torch.allclose(S, torch.ones(2)) and torch.allclose(U.T @ U, torch.eye(2), atol=1e-5)
    assert "note: model.x: singular values 1, 1, 1 nearly coincide" in capsys.readouterr().out
    U, S, Vt = tinylora.top_svd(torch.eye(600), 20, "model.x")  # more than a block of them
    assert torch.allclose(S, torch.ones(20)) and torch.allclose(U.T @ U, torch.eye(20), atol=1e-5)
    assert "nearly coincide" in capsys.readouterr().out
    U, S, Vt = tinylora.top_svd(torch.eye(60), 2)
    assert "nearly coincide" in capsys.readouterr().out
    torch.manual_seed(0)
    with pytest.raises(UserError, match="of model.y has not converged with 32 vectors"):
        tinylora._lanczos(torch.randn(600, 600).double(), 2, 1e-6, 8, "model.y", limit=32)
    slow = torch.diag((1 - (torch.arange(600) / 600) ** 3).sqrt())  # takes the whole space, which is looked at, too
    assert torch.allclose(tinylora.top_svd(slow, 2)[1], slow.diag()[:2])
    US, Vt = tinylora.svd_factors({"zero": torch.zeros(30, 20)}, 2)[0]
    assert not US.any() and torch.isfinite(Vt).all()


@pytest.mark.parametrize("shape", [(20, 30), (600, 700)])
def test_signs_inside_the_svd_change_nothing(monkeypatch, shape):
    torch.manual_seed(0)
    W, eigh, qr = torch.randn(shape), torch.linalg.eigh, torch.linalg.qr
    expected = tinylora.top_svd(W, 2)

    def flipped_eigh(T):
        values, vectors = eigh(T)
        return values, -vectors

    def flipped_qr(Z):
        Q, R = qr(Z)
        return SimpleNamespace(Q=-Q) if len(W) == 20 else torch.return_types.linalg_qr((-Q, -R))

    monkeypatch.setattr(torch.linalg, "eigh", flipped_eigh)
    monkeypatch.setattr(torch.linalg, "qr", flipped_qr)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, tinylora.top_svd(W, 2)))


WEIGHTS = {"a": torch.randn(40, 30, generator=torch.Generator().manual_seed(0)), "b": torch.eye(7) + 0.1}


def test_the_svd_is_cached_and_a_damaged_cache_is_made_again(cache_dir, monkeypatch, capsys):
    monkeypatch.setattr(tinylora, "CACHE_FROM", 0)
    top_svd, calls = tinylora.top_svd, []
    monkeypatch.setattr(tinylora, "top_svd", lambda W, rank, name: calls.append(name) or top_svd(W, rank, name))

    def factors(weights=WEIGHTS, rank=1):
        calls.clear()
        return [t for pair in tinylora.svd_factors(weights, rank) for t in pair]

    first = factors()
    assert calls == ["a", "b"]
    assert all(map(torch.equal, first, factors())) and calls == []
    [file] = cache_dir.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:100] + b"?" + whole[101:], whole + b"x", b"", b"?" + whole[1:]):
        file.write_bytes(damaged)
        capsys.readouterr()
        assert all(map(torch.equal, first, factors())) and calls == ["a", "b"]
        assert "damaged" in capsys.readouterr().out and file.read_bytes() == whole
    factors(rank=2)
    assert calls == ["a", "b"] and len(list(cache_dir.iterdir())) == 2
    [other] = [f for f in cache_dir.iterdir() if f != file]
    file.write_bytes(other.read_bytes())  # a whole file under another's name
    assert all(map(torch.equal, first, factors())) and calls == ["a", "b"]
    for change in ({"a": WEIGHTS["a"].clone().index_put_((torch.tensor([39]), torch.tensor([29])), torch.tensor(0.5))},
                   {"a": WEIGHTS["a"].flip(0)}, {"a": WEIGHTS["a"].bfloat16()}, {"b": WEIGHTS["b"].roll(1, 1)}):
        factors(WEIGHTS | change)
        assert calls == ["a", "b"]  # nothing of other weights is taken


def test_the_cache_is_where_the_environment_says(monkeypatch):
    for name, value, folder in (("HOME", "/h", "/h/.cache/tinylora/"), ("XDG_CACHE_HOME", "/x", "/x/tinylora/"),
                                ("TINYLORA_CACHE", "/t", "/t/")):
        monkeypatch.delenv("TINYLORA_CACHE", raising=False)
        monkeypatch.setenv(name, value)
        path = tinylora.cache_path(WEIGHTS, 1)
        assert path.startswith(folder) and "/" not in path[len(folder) :]


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tinylora, "CACHE_FROM", 0)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "file"))
    assert len(tinylora.svd_factors(WEIGHTS, 2)) == 2
    assert "could not be cached" in capsys.readouterr().out
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "full"))

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(tinylora.os, "replace", full)
    assert len(tinylora.svd_factors(WEIGHTS, 2)) == 2
    assert "No space left" in capsys.readouterr().out and not list((tmp_path / "full").iterdir())


def test_a_toy_leaves_no_cache(net, cache_dir):
    tinylora.add_adapter(net)
    assert not cache_dir.exists()


# ------------------------------------------------------------------------------------------- files and text

TYINGS = [dict(u=13, n_tie=0), dict(u=1, n_tie=3), dict(u=2, n_tie=1), dict(u=3, n_tie=2, tie="structured"),
          dict(u=2, n_tie=0, targets="attention/mlp"), dict(u=3, n_tie=2, targets="q_proj,down_proj"),
          dict(method="lora_xs")]
METHODS = [*TYINGS, dict(method="lora", rank=3), dict(method="lora", alpha=7, targets="mlp,q_proj")]
IDS = torch.arange(24).view(2, 12) * 7


def logits(net):
    with torch.no_grad():
        return net(IDS)


@pytest.mark.parametrize("settings", METHODS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_file_brings_the_adapter_back(net, checkpoint, tmp_path, settings, dtype):
    path = tmp_path / "deep" / "adapter.safetensors"
    adapter = filled(tinylora.add_adapter(net, seed=5, **settings))
    tinylora.save_adapter(adapter, str(path), dtype)
    tensors = load_file(path)
    assert {t.dtype for t in tensors.values()} == {tinylora.DTYPES[dtype]}
    if "v" in tensors:
        assert list(tensors) == ["v"]
    else:
        assert list(tensors) and all(name[:2] in ("A.", "B.") for name in tensors)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(p.to(tinylora.DTYPES[dtype]).float())
    other = model.load_model(checkpoint, device="cpu")
    tinylora.load_adapter(other, str(tmp_path / "deep"))
    assert torch.equal(logits(other), logits(net)) and all(p.dtype == torch.float32 for p in other.adapter.parameters())
    assert other.adapter.meta == adapter.meta


@pytest.mark.parametrize("settings", TYINGS, ids=str)
def test_a_text_brings_the_adapter_back(net, checkpoint, settings):
    adapter = filled(tinylora.add_adapter(net, seed=5, **settings))
    text = tinylora.adapter_text(adapter)
    other = model.load_model(checkpoint, device="cpu")
    tinylora.load_adapter(other, text)
    assert torch.equal(logits(other), logits(net)) and "," not in text and " " not in text
    half = tinylora.adapter_text(adapter, "bfloat16")
    assert len(half.split(":")[1]) == 4 * adapter.v.numel()  # 13 numbers are 26 bytes
    other = model.load_model(checkpoint, device="cpu")
    assert torch.equal(tinylora.load_adapter(other, half).v, adapter.v.bfloat16().float())


def test_numbers_alone_are_one_vector_with_the_defaults(net, capsys):
    tinylora.note.cache_clear()
    adapter = tinylora.load_adapter(net, "hex:3c 23 d7 0a\n bf 80 00 00")
    assert "2 numbers alone: read with rank 2 and seed 0, for any base model" in capsys.readouterr().out
    assert adapter.v.tolist() == [[np.float32(0.01), -1.0]]
    assert adapter.meta | {"base": ""} == dict(method="tinylora", rank=2, u=2, n_tie=0, tie="tiled", seed=0,
                                               targets="all", base="")


def test_a_text_means_the_same_with_another_backend_and_dtype_of_the_stored_weights(tmp_path, monkeypatch):
    """A bf16 checkpoint and an fp32 one of the same numbers; eigenvectors from numpy, with signs of its own; and the
    iteration in another process with another number of threads (next test)."""
    path = make_checkpoint(tmp_path / "wide", hidden_size=64, num_attention_heads=4, intermediate_size=96)
    net = model.load_model(path, dtype="bfloat16", device="cpu")
    model.save_model(net, str(tmp_path / "bf16"), tokenizer_from=path)
    model.save_model(net.float(), str(tmp_path / "fp32"), tokenizer_from=path)
    a = model.load_model(str(tmp_path / "fp32"), device="cpu")
    text = tinylora.adapter_text(filled(tinylora.add_adapter(a, u=13)))
    monkeypatch.setattr(torch.linalg, "eigh", lambda T: tuple(
        torch.from_numpy(x * (-1) ** np.arange(len(T)) if x.ndim > 1 else x) for x in np.linalg.eigh(T.numpy())))
    b = model.load_model(str(tmp_path / "bf16"), dtype="float32", device="cpu")
    tinylora.load_adapter(b, text)
    assert (logits(a) - logits(b)).abs().max() <= 1e-4
    c = model.load_model(str(tmp_path / "fp32"), dtype="float16", device="cpu")
    tinylora.load_adapter(c, text)  # the same base in another dtype: not refused


def test_factors_are_the_same_for_any_thread_count():
    code = ("import sys, torch; sys.path.insert(0, '.'); import tinylora; torch.set_num_threads({});"
            "W = torch.randn(700, 600, generator=torch.Generator().manual_seed(0));"
            "print([t.tolist() for t in tinylora.top_svd(W, 2)])")
    one, four = (json.loads(subprocess.check_output([sys.executable, "-c", code.format(n)], cwd=ROOT)) for n in (1, 4))
    for a, b in zip(one, four):
        assert np.abs(np.array(a) - np.array(b)).max() <= 1e-6 * np.abs(np.array(a)).max()


def test_a_text_is_one_word_for_a_shell(net):
    text = tinylora.adapter_text(tinylora.add_adapter(net, targets="q_proj, v_proj"))
    assert " " not in text and tinylora.detach(net) and len(tinylora.load_adapter(net, text).linears) == 4


def test_an_adapter_of_another_base_is_refused(net, tmp_path):
    path = str(tmp_path / "adapter.safetensors")
    text = tinylora.adapter_text(tinylora.add_adapter(net))
    tinylora.save_adapter(net.adapter, path)
    for name, changes in (("other", dict(seed=1)), ("deeper", dict(num_hidden_layers=3))):
        other = model.load_model(make_checkpoint(tmp_path / name, **changes), device="cpu")
        for where in (path, text):
            with pytest.raises(UserError, match="trained on another base model"):
                tinylora.load_adapter(other, where)
        assert not hasattr(other, "adapter")


def test_the_fingerprint_survives_a_dtype_and_not_a_fine_tuning(net):
    before = tinylora.fingerprint(net)
    for dtype in (torch.bfloat16, torch.float16):
        net_in = model.Transformer(net.config).to(dtype)
        net_in.load_state_dict(net.state_dict())
        assert tinylora.same_base(before, tinylora.fingerprint(net_in))
    with torch.no_grad():
        for linear in tinylora.adapted_linears(net).values():
            linear.weight += 0.02 * linear.weight.std() * torch.randn_like(linear.weight)
    assert not tinylora.same_base(before, tinylora.fingerprint(net))
    for other in ("", "x" * 32, None, [1.5], before[:8], "7e00" * 8):
        assert not tinylora.same_base(before, other)


def test_wrong_settings_are_refused(net):
    for settings in (dict(method="dora"), dict(rank=0), dict(rank=99), dict(u=0), dict(n_tie=-1), dict(tie="random"),
                     dict(method="lora", alpha=0.0), dict(method="lora", rank=99), dict(targets="lm_head")):
        with pytest.raises(UserError):
            tinylora.add_adapter(net, **settings)
        assert not hasattr(net, "adapter")


GOOD = dict(method="tinylora", rank=2, u=13, n_tie=0, tie="tiled", seed=0, targets="all", dtype="float32")  # and base
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3))


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from([*GOOD, "base", "alpha", "x", None]), value=JSON,
       shape=st.lists(st.integers(0, 14), max_size=3), name=st.sampled_from(["v", "v", "v", "A.0"]))
def test_a_malformed_file_is_refused_in_one_line(net, tmp_path, key, value, shape, name):
    """Whatever one setting is replaced by and whatever shape v has: one line, or an adapter that fits."""
    settings = json.dumps(value if key is None else GOOD | {"base": tinylora.fingerprint(net), key: value})
    path = str(tmp_path / "adapter.safetensors")
    save_file({name: torch.ones(shape)}, path, metadata={"format": tinylora.FORMAT, "settings": settings})
    try:
        adapter = tinylora.load_adapter(net, path)
        assert name == "v" and adapter.v.numel() == torch.ones(shape).numel() and (adapter.v == 1).all()
        tinylora.merge(net)
    except UserError as error:
        assert "\n" not in str(error) and not hasattr(net, "adapter")


@pytest.mark.parametrize("metadata, tensor, words", [
    (None, torch.ones(1, 13), "format 'None'"),
    ({"format": "tinylora-9", "settings": "{}"}, torch.ones(1, 13), "format 'tinylora-9', this version reads"),
    ({"format": tinylora.FORMAT, "settings": "[" * 100000}, torch.ones(1, 13), "cannot be read"),
    ({"format": tinylora.FORMAT, "settings": json.dumps(GOOD | {"rank": 10**9})}, torch.ones(1, 13), "rank must be"),
    ({"format": tinylora.FORMAT, "settings": json.dumps(GOOD | {"u": 10**12})}, torch.ones(1, 13), "its settings and"),
    ({"format": tinylora.FORMAT, "settings": json.dumps(GOOD)}, torch.full((1, 13), float("nan")), "not finite"),
    ({"format": tinylora.FORMAT, "settings": json.dumps(GOOD)}, torch.ones(1, 13).half(), "in float32"),
    ({"format": tinylora.FORMAT, "settings": json.dumps(GOOD)}, torch.ones(12), "v has shape"),
    ({"format": tinylora.FORMAT, "settings": json.dumps(GOOD | {"base": ""})}, torch.ones(1, 13), "not those of an"),
])
def test_files_that_do_not_fit_are_refused(net, tmp_path, metadata, tensor, words):
    if metadata and metadata["settings"].endswith("}"):
        settings = {"base": tinylora.fingerprint(net)} | json.loads(metadata["settings"])
        metadata = metadata | {"settings": json.dumps(settings)}
    save_file({"v": tensor}, tmp_path / "adapter.safetensors", metadata=metadata)
    with pytest.raises(UserError, match=words):
        tinylora.load_adapter(net, str(tmp_path))
    assert not hasattr(net, "adapter")


def test_no_file_or_a_mistyped_text_is_refused(net, tmp_path):
    (tmp_path / "adapter.safetensors").write_bytes(b"nonsense")
    for where in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no adapter can be read"):
            tinylora.load_adapter(net, str(where))
    text = tinylora.adapter_text(tinylora.add_adapter(net, u=3))
    tinylora.merge(net)
    for bad in ("hex:", "hex:3c23", "hex:3c23d7zz", text[:-30], text.replace("tinylora-2", "tinylora-3"),
                text.replace("rank=2", "rank=2.5"), text.replace("u=3", "u=4"), text.replace("hex:", "hex:00"),
                text.replace("rank=2", "rank=" + "9" * 5000), text.replace("method=tinylora", "method=lora"),
                text.replace("seed=0:", ""), "hex:7fc00000"):
        with pytest.raises(UserError) as error:
            tinylora.load_adapter(net, bad)
        assert len(str(error.value)) < 300 and not hasattr(net, "adapter")


# -------------------------------------------------------------------------------------------- PEFT, transformers


def peft_logits(checkpoint, path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(base, path)(IDS).logits


IN_PARTS = [dict(n_tie=1, targets="mlp/attention"), dict(method="lora_xs", targets="q_proj/v_proj,gate_proj")]


@pytest.mark.parametrize("settings", [*METHODS, *IN_PARTS], ids=str)  # groups in parts are not in modules' order
@pytest.mark.parametrize("kind", ["peft", "peft-tinylora"])
@pytest.mark.filterwarnings("ignore")  # theirs
def test_peft_loads_our_export_with_equal_logits(net, checkpoint, tmp_path, settings, kind):
    filled(tinylora.add_adapter(net, seed=5, **settings))
    path = str(tmp_path / "peft")
    if settings.get("method") == "lora" and kind == "peft-tinylora":
        with pytest.raises(UserError, match="a lora adapter cannot be written as 'peft-tinylora'"):
            tinylora.export_peft(net, path, checkpoint, kind)
        return
    base = logits(model.load_model(checkpoint, device="cpu"))
    tinylora.export_peft(net, path, checkpoint, kind)
    theirs = peft_logits(checkpoint, path)
    assert (theirs - logits(net)).abs().max() <= 1e-4 and (theirs - base).abs().max() > 0.1
    if kind == "peft-tinylora":  # as many trained numbers as ours: the tying is PEFT's, too
        tensors = load_file(f"{path}/adapter_model.safetensors")
        assert sum(t.numel() for name, t in tensors.items() if "tinylora_v" in name) == net.adapter.v.numel()


def test_a_tying_too_large_to_be_spelled_out_is_refused(net, tmp_path, monkeypatch):
    monkeypatch.setattr(tinylora, "PEFT_LIMIT", 14 * 5 * 60 * 4 - 1)
    filled(tinylora.add_adapter(net, u=60, n_tie=3))
    with pytest.raises(UserError, match="PEFT has no tying such as n_tie=3"):
        tinylora.export_peft(net, str(tmp_path / "peft"), kind="peft-tinylora")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("options", [{}, dict(use_rslora=True), dict(target_modules=["v_proj", "up_proj"])], ids=str)
@pytest.mark.filterwarnings("ignore")  # theirs
def test_a_peft_lora_is_imported_with_equal_logits(checkpoint, tmp_path, options):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = peft.LoraConfig(**dict(r=3, lora_alpha=5, target_modules=list(tinylora.LINEARS),
                                    init_lora_weights=False) | options)
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path / "theirs")
    process = fork_script("tinylora.py", "import", f"--source={tmp_path}/theirs", f"--model={checkpoint}",
                         f"--out_dir={tmp_path}/ours", "--device=cpu")
    assert process.returncode == 0, process.stderr
    net = model.load_model(checkpoint, device="cpu")
    before = logits(net)
    tinylora.load_adapter(net, str(tmp_path / "ours"))
    with torch.no_grad():
        assert (theirs(IDS).logits - logits(net)).abs().max() <= 1e-4
    assert (before - logits(net)).abs().max() > 0.1


def test_what_import_cannot_express_is_refused(net, tmp_path):
    tinylora.export_peft(filled(tinylora.add_adapter(net, "lora", rank=2)) and net, str(tmp_path / "x"))
    tinylora.merge(net)
    file = tmp_path / "x/adapter_model.safetensors"
    config = json.loads((tmp_path / "x/adapter_config.json").read_text())
    tensors = load_file(file)
    key = next(name for name in tensors if "layers.1.mlp.up_proj.lora_A" in name)
    keys = dict(use_dora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 4}, modules_to_save=["lm_head"],
                lora_bias=True, layer_replication=[[0, 1]], trainable_token_indices=[1], target_parameters=["x"],
                alora_invocation_tokens=[3, 4])
    cases = [*((config | {name: value}, tensors, f"{name} is not supported") for name, value in keys.items()),
             *((config | {"init_lora_weights": name}, tensors, "changes the base model's weights")
               for name in ("pissa_niter_4", "corda", "olora", "loftq", "lora_ga")),
             (config | {"r": 0}, tensors, "only a PEFT adapter of type LORA"),
             (config | {"peft_type": "LOHA"}, tensors, "only a PEFT adapter of type LORA"),
             (config | {"r": 3}, tensors, "not of shape"), ([], tensors, "only a PEFT adapter"),
             (config, {k: v for k, v in tensors.items() if k != key}, "is missing, not finite"),
             (config, tensors | {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 2)}, "lm_head"),
             (config, tensors | {key.replace("layers.1", "layers.7"): tensors[key].clone()},
              "layers that this model does not"),
             (config, tensors | {key: tensors[key] * float("inf")}, "not finite")]
    for config, tensors, words in cases:
        (tmp_path / "x/adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, file)
        with pytest.raises(UserError, match=words):
            tinylora.import_peft(net, str(tmp_path / "x"))
        assert not hasattr(net, "adapter")
    file.unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors cannot be read"):
        tinylora.import_peft(net, str(tmp_path / "x"))


@pytest.mark.filterwarnings("ignore")  # theirs
def test_a_merged_export_loads_in_transformers_and_is_rounded_once(net, checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    text = tinylora.adapter_text(filled(tinylora.add_adapter(net, u=2, n_tie=4)))
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        source = tmp_path / f"source-{name}"
        model.save_model(model.load_model(checkpoint, dtype, "cpu"), str(source), tokenizer_from=checkpoint)
        export = ["tinylora.py", "export", f"--model={source}", f"--adapter={text}", "--to=hf", "--device=cpu",
                  f"--out_dir={tmp_path}/{name}"]
        process = fork_script(*export)
        assert process.returncode == 0, process.stderr
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto")
        assert theirs.dtype == dtype
        exact = model.load_model(str(source), "float32", "cpu")
        tinylora.load_adapter(exact, text)
        if name == "float32":
            with torch.no_grad():
                assert (theirs(IDS).logits - logits(exact)).abs().max() <= 1e-4
        for key, W in tinylora.merge(exact).state_dict().items():
            assert (theirs.state_dict()[key] == W.to(dtype)).float().mean() > 0.999  # ties of rounding may differ
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / name).encode("Tom") == (
            model.load_tokenizer(checkpoint).encode("Tom"))
    assert_refused(fork_script(*export), "out_dir must name a new or empty directory")


def test_an_empty_directory_behind_a_link_is_written(net, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    tinylora.export_peft(filled(tinylora.add_adapter(net)) and net, str(tmp_path / "link"))
    assert (tmp_path / "disk/adapter_model.safetensors").is_file() and (tmp_path / "link").is_symlink()


def test_the_command_line_refuses_in_one_line(checkpoint, tmp_path, monkeypatch):
    base = [f"--model={checkpoint}", f"--out_dir={tmp_path}/x", "--device=cpu"]
    shutil.copytree(checkpoint, tmp_path / "full" / "model")  # as a run of grpo.py with method = full leaves it
    for arguments, words in [
        ([], "say what to do"), (["export", *base], "export needs --adapter"),
        (["import", *base, "--adapter=hex:3c23d70a"], "import --source"),
        (["export", *base, "--adapter=hex:3c23d70a", "--to=gguf"], "to must be"),
        (["import", *base, "--source=somewhere", "--to=hf"], "--to is for export"),
        (["import", *base, f"--source={tmp_path}"], "holds no PEFT adapter"),
        (["export", f"--model={checkpoint}", "--adapter=hex:3c23d70a"], "out_dir must name"),
        (["export", *base, f"--adapter={tmp_path}/full", "--to=hf"], "trained all weights: use --model=.*full/model,"),
        (["export", *base, "--adapter=nowhere"], "no adapter can be read"),
    ]:
        monkeypatch.setattr(sys, "argv", ["tinylora.py", *arguments])
        with pytest.raises(UserError, match=words):
            tinylora.main()
    assert_refused(fork_script("tinylora.py", *arguments), words)
    assert list(tmp_path.iterdir()) == [tmp_path / "full"]


# -------------------------------------------------------------------------------------- many at once, and training


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_256_rows_with_256_vectors_give_the_tokens_of_256_runs(net, checkpoint, tokenizer, temperature):
    vectors = torch.randn(256, 5, generator=torch.Generator().manual_seed(0)) * 0.3
    vectors[7] = 0
    adapter, texts = tinylora.add_adapter(net, u=5), []
    prompts = [tokenizer.encode(p) for p in ("Tom has 3 apples.", "Ann", "Then the number doubles. How many")]
    prompts = [prompts[i % 3] for i in range(256)]
    options = dict(max_new_tokens=6, temperature=temperature, seed=3)
    alone = []
    for i, vector in enumerate(vectors):
        with torch.no_grad():
            adapter.v.copy_(vector)
        texts.append(tinylora.adapter_text(adapter) if i != 7 else "")
        alone += sample.generate(net, tokenizer, prompts[i : i + 1], prompt_ids=[i], **options)
    together = sample.generate(net, tokenizer, prompts, prompt_ids=range(256), adapters=texts, **options)
    assert [c.ids for [c] in together] == [c.ids for [c] in alone]
    assert max(abs(a - b) for [c], [d] in zip(together, alone) for a, b in zip(c.logprobs, d.logprobs)) <= 1e-4
    if temperature == 0:
        assert len({tuple(c.ids) for [c] in together}) > 50  # the vectors matter
    assert torch.equal(adapter.v[0], vectors[-1]) and adapter.rows is None  # the model is as it was
    fresh = model.load_model(checkpoint, device="cpu")
    [again] = sample.generate(fresh, tokenizer, prompts[:1], prompt_ids=[0], adapters=texts[:1], **options)
    assert again[0].ids == together[0][0].ids


def test_adapters_of_other_sizes_tyings_and_seeds_share_a_batch(net, checkpoint, tokenizer, monkeypatch):
    texts = []
    for settings in (dict(u=13), dict(u=1, n_tie=3, seed=4), dict(u=2, n_tie=1, tie="structured"),
                     dict(method="lora_xs"), dict(u=2, targets="attention/mlp")):
        other = model.load_model(checkpoint, device="cpu")
        texts.append(tinylora.adapter_text(filled(tinylora.add_adapter(other, **settings))))
    prompt, options = tokenizer.encode("Tom has"), dict(n=2, max_new_tokens=12, seed=3)
    alone = []
    for text in texts:
        other = model.load_model(checkpoint, device="cpu")
        tinylora.load_adapter(other, text)
        alone += sample.generate(other, tokenizer, [prompt], **options)
    monkeypatch.setattr(sample, "fitting_rows", lambda *_: 4)  # so that slots pass from one adapter to another
    together = sample.generate(net, tokenizer, [prompt] * 5, prompt_ids=[0] * 5, adapters=texts, **options)
    assert [[c.ids for c in group] for group in together] == [[c.ids for c in group] for group in alone]


def test_adapters_of_a_batch_leave_a_plain_model_plain(net, tokenizer):
    before = logits(net)
    for adapters in (["hex:3c23d70a", "hex:zz"], ["hex:3c23d70a", ""]):
        try:
            sample.generate(net, tokenizer, ["x", "y"], max_new_tokens=3, adapters=adapters)
        except UserError as error:
            assert "mistyped" in str(error)
        assert not hasattr(net, "adapter") and torch.equal(logits(net), before)
    adapter = tinylora.add_adapter(net)
    net(torch.tensor([[1, 2]])).sum().backward()  # nothing of it was made for inference only
    assert adapter.v.grad.abs().sum() > 0


def test_adapters_that_cannot_share_a_batch_are_refused(net, checkpoint, tokenizer, tmp_path):
    texts = []
    for settings in (dict(), dict(rank=1), dict(targets="mlp")):
        other = model.load_model(checkpoint, device="cpu")
        texts.append(tinylora.adapter_text(tinylora.add_adapter(other, **settings)))
    tinylora.save_adapter(tinylora.add_adapter(model.load_model(checkpoint, device="cpu"), "lora"),
                          str(tmp_path / "adapter.safetensors"))
    for other, words in ((texts[1], "rank and targets must be the same"), (texts[2], "rank and targets must be"),
                         (str(tmp_path), "a LoRA has its own factors")):
        with pytest.raises(UserError, match=words):
            sample.generate(net, tokenizer, ["Tom", "Tom"], adapters=[texts[0], other])
    with pytest.raises(UserError, match="one per prompt"):
        sample.generate(net, tokenizer, ["Tom", "Tom"], adapters=texts[:1])
    with pytest.raises(UserError, match="at least one must be given"):
        sample.generate(net, tokenizer, ["Tom", "Tom"], adapters=["", ""])
    filled(tinylora.add_adapter(net, "lora", rank=2))  # as many factors, but not those of the SVD
    with pytest.raises(UserError, match="rank and targets must be the same"):
        sample.generate(net, tokenizer, ["Tom", "Tom"], adapters=[texts[0], ""])


def test_an_export_touches_no_directory_but_its_own(checkpoint, net, tmp_path):
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "precious").write_text("x")
    tinylora.add_adapter(net)
    tinylora.export_peft(net, str(tmp_path / "out"), str(checkpoint))
    assert (tmp_path / "out.tmp" / "precious").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.tmp"]


def test_sample_shows_adapters_side_by_side(checkpoint, net):
    text = tinylora.adapter_text(filled(tinylora.add_adapter(net)))
    common = ["sample.py", f"--model={checkpoint}", "--n=1", "--max_new_tokens=8", "--device=cpu"]
    process = fork_script(*common, f"--adapter={text},,hex:3c23d70a")
    assert process.returncode == 0, process.stderr
    shown = process.stdout.split("=== ")[1:]
    assert [part.splitlines()[0] for part in shown] == [text, "no adapter", "hex:3c23d70a"]
    for part, adapter in zip(shown, (text, "")):
        answer = part.split("\n", 1)[1].split("---")[0]
        assert answer in fork_script(*common, f"--adapter={adapter}").stdout


def test_the_learning_rate_rule_gives_the_published_rates():
    """tinker-cookbook's figures for LoRA; a tenth for all weights, half as much again in short runs."""
    for kind, hidden, lr in [("qwen2", 2048, 5.0e-4), ("qwen2", 3584, 4.8e-4), ("llama", 2048, 4.9e-4),
                             ("llama", 3072, 3.6e-4), ("llama", 4096, 2.9e-4)]:
        config = SimpleNamespace(hidden_size=hidden, raw={"model_type": kind})
        assert abs(tinylora.learning_rate_rule(config, "lora", 100) / lr - 1) < 0.02
        assert abs(tinylora.learning_rate_rule(config, "full", 5) * 10 / lr - 1) < 0.02
        assert abs(tinylora.learning_rate_rule(config, "lora", 99) / lr - 1.5) < 0.03


def test_lora_starts_as_the_model_with_a_uniform_seeded_a(net):
    before = logits(net)
    adapter = tinylora.add_adapter(net, "lora", rank=8, seed=3)
    assert torch.equal(logits(net), before)
    for linear, A, B in zip(tinylora.adapted_linears(net).values(), adapter.A, adapter.B):
        bound = linear.in_features**-0.5
        assert not B.any() and A.abs().max() <= bound and A.abs().max() > 0.95 * bound
        assert abs(A.mean()) < 0.2 * bound and A.dtype == torch.float32
    assert not torch.equal(adapter.A[0], adapter.A[1])
    net(IDS).square().mean().backward()
    assert all(B.grad.any() for B in adapter.B) and all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("script", [grpo, sft])
@pytest.mark.parametrize("method", ["lora", "lora_xs", "full"])
def test_every_method_trains_resumes_and_is_saved(script, method, checkpoint, problems, tmp_path, capsys, monkeypatch):
    if script is grpo:  # rewards that differ within a group, whatever is sampled
        monkeypatch.setattr(grpo.eval_math, "score",
                            lambda text, *_: dict(strict=len(text) % 2 == 0, lenient=False, answer=None))

    def train(out_dir, **changes):
        options = dict(model=checkpoint, dataset=problems, eval_dataset=problems, out_dir=tmp_path / out_dir,
                       max_steps=2, batch_size=4, max_new_tokens=4, eval_size=4, device="cpu", method=method, rank=2,
                       lr=0 if method != "lora_xs" else 0.01, targets="all" if method == "full" else "mlp") | changes
        script.train(configure(vars(script), [f"--{key}={value}" for key, value in options.items()]))
        file = "model/model.safetensors" if method == "full" else "adapter.safetensors"
        return load_file(tmp_path / out_dir / file)

    whole = train("whole", max_steps=2)
    rule = tinylora.learning_rate_rule(model.load_config(checkpoint), method, 2) if method != "lora_xs" else None
    assert rule is None or f"lr = {rule:.3g}" in capsys.readouterr().out
    train("parts", max_steps=1)
    parts = train("parts", init_from="resume")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    start = load_file(checkpoint + "/model.safetensors")
    moved = {k: not torch.equal(v, start[k]) if method == "full" else bool(v.any()) for k, v in whole.items()}
    assert sum(moved.values()) > 0.9 * len(moved)
    if method == "lora":
        with pytest.raises(UserError, match="made with another rank, alpha|made with another alpha"):
            train("parts", init_from="resume", alpha=16)


def test_settings_that_cannot_work_with_a_method_are_refused(checkpoint):
    for changes, words in ((["--method=full", "--kl_coef=0.1"], "kl_coef must be 0 with method = full"),
                           (["--method=full", "--dtype=bfloat16"], "method = full trains float32 weights"),
                           (["--lr=0"], "lr must be above 0"), (["--save_dtype=int8"], "save_dtype must be one of")):
        with pytest.raises(UserError, match=words):
            grpo.check_settings(configure(vars(grpo), changes))


def test_training_ends_with_a_text_that_is_the_file(checkpoint, problems, tmp_path, net, capsys):
    sft.train(configure(vars(sft), [f"--model={checkpoint}", f"--dataset={problems}", "--eval_dataset=", "--lr=0.1",
                                    f"--out_dir={tmp_path}/run", "--max_steps=2", "--batch_size=4", "--device=cpu",
                                    "--save_dtype=bfloat16"]))
    [text] = [line.split("--adapter=")[1] for line in capsys.readouterr().out.splitlines() if "--adapter=" in line]
    assert len(text.split(":")[1]) == 2 * 26
    v = load_file(tmp_path / "run/adapter.safetensors")["v"]
    assert v.dtype == torch.bfloat16 and torch.equal(tinylora.load_adapter(net, text).v, v.float()) and v.all()


def test_the_gradient_by_hand_is_that_of_finite_differences():
    """Of x and R, of both factors where they are trained (LoRA), and of W for whoever unfreezes it."""
    generator = torch.Generator().manual_seed(0)
    x, W, US, Vt, R = (torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()
                       for shape in [(2, 3, 5), (7, 5), (7, 2), (2, 5), (2, 2)])
    y = tinylora.LowRankUpdate.apply(x, W, US, Vt, R)
    assert torch.allclose(y, x @ (W + US @ R @ Vt).T)
    assert torch.autograd.gradcheck(tinylora.LowRankUpdate.apply, (x, W, US, Vt, R))
