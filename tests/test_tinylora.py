"""tinylora.py: the update is the paper's, tied as the paper says, and a file of v alone brings it back."""

import json
import subprocess
import sys
from base64 import b64decode
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, make_checkpoint
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import model
import sample
import tinylora
from support import UserError, adapter_file, fused
from support.checkpoint import DTYPES
from support.svd import top_svd

IDS = torch.arange(24).view(2, 12) * 7
TYINGS = [dict(u=13, n_tie=0), dict(u=1, n_tie=3), dict(u=2, n_tie=1), dict(u=3, n_tie=2, tie="structured"),
          dict(u=2, n_tie=0, targets="attention/mlp"), dict(u=3, n_tie=2, targets="q_proj,down_proj"),
          dict(method="lora_xs")]
METHODS = [*TYINGS, dict(method="lora", rank=3), dict(method="lora", alpha=7, targets="mlp,q_proj")]


def logits(net):
    with torch.no_grad():
        return net(IDS)


def filled(adapter, seed=1):
    """The adapter with random numbers large enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.1 if hasattr(adapter, "A") else 0.3))
    return adapter


def text_of(checkpoint, **settings):
    net = model.load_model(checkpoint, device="cpu")
    return tinylora.adapter_text(filled(tinylora.add_adapter(net, **settings)))


# ------------------------------------------------------------------------------------------ the update


def dense(net, adapter):
    """The same model with W + U S R V^T in float64, from numpy's SVD: what the unmerged layers must amount to."""
    meta, state = adapter.meta, {k: v.double() for k, v in net.state_dict().items()}
    names = [n for n in tinylora.all_linears(net) if meta["targets"] == "all" or n.endswith(meta["targets"])]
    for i, name in enumerate(names):
        W, rank = state[f"{name}.weight"], meta["rank"]
        if meta["method"] == "lora":
            update = adapter.B[i].detach().double() @ adapter.A[i].detach().double() * meta["alpha"] / rank
            state[f"{name}.weight"] = W + update
            continue
        U, S, Vt = np.linalg.svd(W.numpy())
        U, S, Vt = U[:, :rank], S[:rank], Vt[:rank]
        sign = np.sign(U[np.abs(U).argmax(0), np.arange(rank)])
        if meta["method"] == "lora_xs":
            R = adapter.v.detach()[i].view(rank, rank).double().numpy()
        else:
            P = tinylora.random_projection(meta["seed"], name, meta["u"], rank).double().numpy()
            group = tinylora.tying_groups(len(names), meta["n_tie"], meta["tie"])[i]
            R = sum(v * p for v, p in zip(adapter.v.detach()[group].double().numpy(), P))
        state[f"{name}.weight"] = W + torch.from_numpy((U * sign * S) @ R @ (Vt * sign[:, None]))
    other = model.Transformer(net.config).double()
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("settings", [
    dict(u=13, n_tie=0), dict(u=1, n_tie=4), dict(u=3, n_tie=1, rank=3), dict(u=2, n_tie=1, tie="structured"),
    dict(u=2, n_tie=0, targets="v_proj"), dict(method="lora_xs", rank=2),
    dict(method="lora", rank=3, alpha=8, targets="all"), dict(method="lora", rank=2, targets="down_proj")], ids=str)
def test_update_equals_the_dense_formula(net, settings):
    before = logits(net)
    adapter = tinylora.add_adapter(net, seed=7, **settings)
    assert (logits(net) - before).abs().max() < 1e-5  # v = 0
    exact = logits(dense(net, filled(adapter)))
    assert (logits(net) - exact).abs().max() < 1e-4 * exact.abs().max()
    assert (exact - before).abs().max() > 0.1  # the update is there to be seen
    assert (logits(tinylora.merge(net)) - exact).abs().max() < 1e-4 * exact.abs().max()
    tinylora.add_adapter(net)  # the old one is gone


def test_merging_into_16_bits_rounds_once(net):
    net = net.bfloat16()
    adapter = filled(tinylora.add_adapter(net, u=3, n_tie=5))
    adapter.refresh()
    expected = [(m.weight.float() + m.US.float() @ m.R @ m.Vt.float()).bfloat16() for m in adapter.linears.values()]
    linears = list(adapter.linears.values())
    tinylora.merge(net)
    assert all(torch.equal(m.weight, W) for m, W in zip(linears, expected))


def test_a_detached_adapter_leaves_nothing(net):
    before = [(type(module), {*vars(module)}) for module in net.modules()]
    tinylora.add_adapter(net, u=3)
    net(IDS)
    tinylora.detach(net)
    assert [(type(module), {*vars(module)}) for module in net.modules()] == before
    assert not net.model._forward_pre_hooks and net.adapter is None


def test_a_small_update_survives_in_bfloat16_though_merged_into_the_weights_it_is_rounded_away():
    """How much of the exact update is in the outputs of a bf16 layer, over 4,096 random inputs."""
    torch.manual_seed(0)
    linear = nn.Linear(512, 512, bias=False).bfloat16().requires_grad_(False)
    U, S, Vt = top_svd(linear.weight, 2)
    R = torch.full((2, 2), 1e-3)
    update = (U * S) @ R @ Vt
    x = torch.randn(4096, 512).bfloat16()
    exact, base = x.float() @ update.T, linear(x).float()

    def surviving(y):
        return (((y.float() - base) * exact).sum() / exact.square().sum()).item()

    merged = nn.functional.linear(x, (linear.weight.float() + update).bfloat16())
    adapted = fused.LowRankLinear.apply(x, linear.weight, (U * S).bfloat16(), Vt.bfloat16(), R)
    assert surviving(merged) < 0.3
    assert abs(surviving(adapted) - 1) < 0.05


def test_only_v_is_trained_and_its_gradient_at_zero_is_not_zero(net):
    adapter = tinylora.add_adapter(net, u=13)
    net(IDS).square().mean().backward()
    assert adapter.v.dtype == torch.float32 and adapter.v.grad.abs().min() > 0
    assert all(p.grad is None for p in net.parameters()) and [*adapter.parameters()] == [adapter.v]
    assert "adapter.v" not in net.state_dict()  # the model's names stay the checkpoint's


def test_the_gradient_by_hand_is_that_of_finite_differences():
    """Of x and R, and of both factors where they are trained (LoRA)."""
    generator = torch.Generator().manual_seed(0)
    x, W, US, Vt, R = (torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()
                       for shape in [(2, 3, 5), (7, 5), (7, 2), (2, 5), (2, 2)])
    W.requires_grad_(False)
    y = fused.LowRankLinear.apply(x, W, US, Vt, R)
    assert torch.allclose(y, x @ (W + US @ R @ Vt).T)
    assert torch.autograd.gradcheck(fused.LowRankLinear.apply, (x, W, US, Vt, R))


def test_a_lora_starts_as_the_model_with_a_uniform_seeded_a(net):
    before = logits(net)
    adapter = tinylora.add_adapter(net, "lora", rank=8, seed=3)
    assert torch.equal(logits(net), before)
    for linear, A, B in zip(tinylora.all_linears(net).values(), adapter.A, adapter.B):
        bound = linear.in_features**-0.5
        assert not B.any() and A.abs().max() <= bound and A.abs().max() > 0.95 * bound
        assert abs(A.mean()) < 0.2 * bound and A.dtype == torch.float32
    assert not torch.equal(adapter.A[0], adapter.A[1])
    net(IDS).square().mean().backward()
    assert all(B.grad.any() for B in adapter.B) and all(p.grad is None for p in net.parameters())


# -------------------------------------------------------------------------------------- tying and targets

SHAPES = {  # layers, hidden, intermediate, heads, kv_heads
    "0.5B": (24, 896, 4864, 14, 2), "1.5B": (28, 1536, 8960, 12, 2), "3B": (36, 2048, 11008, 16, 2),
    "7B": (28, 3584, 18944, 28, 4), "8B": (32, 4096, 14336, 32, 8)}


def groups_of(net, **settings):
    """The groups that plan gives the linears, and the linears."""
    defaults = dict(method="tinylora", rank=1, u=1, n_tie=0, tie="tiled", seed=0, targets="all")
    linears, groups, _ = tinylora.plan(net, defaults | settings)
    return groups, list(linears)


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
        tiled, _ = groups_of(net, n_tie=n_tie)
        structured, _ = groups_of(net, n_tie=n_tie, tie="structured")
        assert len(tiled) == N and sorted(set(tiled)) == list(range(-(-N // n_tie)))
        assert all(tiled.count(g) == n_tie for g in range(N // n_tie))
        assert sorted(set(structured)) == list(range(7 * -(-layers // n_tie)))
        assert len({i % 7 for i, g in enumerate(structured) if g == 3}) == 1  # one type to a group
    assert set(groups_of(net, n_tie=0)[0]) == {0}
    if size == "7B":  # Figure 1 of the paper: 13 numbers
        assert (N, max(groups_of(net, n_tie=16)[0]) + 1) == (196, 13)


def test_targets_choose_linears_and_may_have_vectors_of_their_own(net):
    def short(targets, n_tie, tie="tiled"):
        groups, names = groups_of(net, targets=targets, n_tie=n_tie, tie=tie)
        return [name.split(".")[-1][0] + name.split(".")[2] for name in names], groups

    assert short("attention", 0) == (["q0", "k0", "v0", "o0", "q1", "k1", "v1", "o1"], [0] * 8)
    assert short("up_proj,q_proj", 1) == (["q0", "u0", "q1", "u1"], [0, 1, 2, 3])  # in forward order
    assert short("attention/mlp", 0)[1] == [0, 0, 0, 0, 1, 1, 1] * 2
    assert short("mlp/attention", 5)[1] == [2, 2, 2, 2, 0, 0, 0, 2, 3, 3, 3, 0, 0, 1]  # each part tiled on its own
    assert short("mlp/q_proj", 2, "structured")[1] == [3, 0, 1, 2] * 2


@pytest.mark.parametrize("u, n_tie, tie", [(13, 0, "tiled"), (70, 0, "tiled"), (9, 2, "tiled"), (5, 1, "tiled"),
                                           (7, 2, "structured"), (1, 3, "tiled")])
def test_tied_numbers_keep_their_dimensions(net, u, n_tie, tie):
    """The map from a group's v to its linears' stacked updates has rank min(u, r^2 g); with one P it would be 4."""
    adapter = tinylora.add_adapter(net, rank=2, u=u, n_tie=n_tie, tie=tie)
    columns = []
    for i in range(u):
        with torch.no_grad():
            adapter.v.copy_(torch.eye(u)[i].expand_as(adapter.v))
        adapter.refresh()
        columns.append([m.US.double() @ m.R.double() @ m.Vt.double() for m in adapter.linears.values()])
    for group in range(len(adapter.v)):
        mine = [j for j, g in enumerate(adapter.groups.tolist()) if g == group]
        stacked = torch.stack([torch.cat([column[j].flatten() for j in mine]) for column in columns])
        assert torch.linalg.matrix_rank(stacked) == min(u, 4 * len(mine))


@pytest.mark.parametrize("settings, words", [
    (dict(method="dora"), "method 'dora' is unknown"), (dict(rank=0), "rank must be 1 to 16 here"),
    (dict(rank=99), "rank must be 1 to 16 here"), (dict(u=0), "u must be at least 1"),
    (dict(u=10**8), "numbers of P, which is too many"), (dict(n_tie=-1), "n_tie must be 0"),
    (dict(tie="random"), "tie must be tiled or structured"), (dict(method="lora", alpha=0.0), "alpha must be above 0"),
    (dict(method="lora", alpha=float("nan")), "alpha must be above 0"), (dict(method="lora", rank=99), "rank must be"),
    *((dict(targets=targets), "targets must name") for targets in
      ("", "head", "lm_head", "all,q_proj", "attention/q_proj", "mlp//attention"))], ids=str)
def test_wrong_settings_are_refused(net, settings, words):
    with pytest.raises(UserError, match=words):
        tinylora.add_adapter(net, **settings)
    assert net.adapter is None


def test_a_second_adapter_is_refused(net):
    adapter = tinylora.add_adapter(net)
    with pytest.raises(UserError, match="has an adapter already"):
        tinylora.add_adapter(net)
    assert net.adapter is adapter


# ------------------------------------------------------------------ numbers that are the same for ever


def test_the_numbers_behind_a_seed_are_the_same_for_ever():
    """Adapters that people have are made of these: other numbers are another format."""
    name = "model.layers.0.self_attn.q_proj"
    P = tinylora.random_projection(1337, name, 2, 2)
    assert P.flatten().tolist() == pytest.approx([0.0922771, 0.03799395, -0.31146783, 0.19029599,
                                                  -0.64399171, 0.41659591, -0.01957908, 0.74302101], abs=1e-6)
    A = tinylora.random_lora(1337, name, 2, 4)
    assert A.flatten().tolist() == pytest.approx([-0.19383518, 0.49861515, 0.18941867, 0.46004704,
                                                  0.24388088, -0.39917314, 0.2023723, -0.31283572], abs=1e-6)


def test_projections_are_the_same_in_another_process_and_differ_between_linears():
    code = ("import sys, torch; sys.path.insert(0, '.'); import tinylora; torch.set_num_threads(4);"
            "print(tinylora.random_projection(3, 'model.layers.5.mlp.up_proj', 13, 2).numpy().tobytes().hex())")
    here = tinylora.random_projection(3, "model.layers.5.mlp.up_proj", 13, 2)
    there = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert there.strip() == here.numpy().tobytes().hex()
    assert not torch.equal(here, tinylora.random_projection(3, "model.layers.6.mlp.up_proj", 13, 2))
    big = tinylora.random_projection(0, "x", 5000, 2)
    assert abs(big.mean()) < 0.02 and abs(big.var() - 0.5) < 0.02  # N(0, 1/r)


BASE = "base=b613b668bb51295a3c353af3bb91c032"  # of toy/base
VERSION_1 = [  # texts that version 1 wrote, and its log-probs of five tokens with them
    (f"hex:3e25fb1bbdffae3ebe981017:tinylora-2:method=tinylora:rank=2:u=3:n_tie=0:tie=tiled:seed=0:targets=all:{BASE}:"
     "dtype=float32", [-22.013273, -21.878901, -21.834368, -21.794481, -21.841055]),
    ("hex:3e26be00be98be493dae3e933e68bd33be8cbe813aae3e82:tinylora-2:method=tinylora:rank=2:u=2:n_tie=4:tie=tiled:"
     f"seed=5:targets=all:{BASE}:dtype=bfloat16", [-19.730747, -19.713776, -19.720346, -19.605204, -19.70751]),
    ("hex:3130affdb4c1b2462d72349c333da996b460b4071570340d:tinylora-2:method=tinylora:rank=2:u=1:n_tie=2:"
     f"tie=structured:seed=9:targets=attention/up_proj+gate_proj:{BASE}:dtype=float16",
     [-20.46953, -20.380022, -20.387846, -20.303196, -20.376257]),
    (f"hex:3e25fb1bbdffae3ebe981017:tinylora-2:method=lora_xs:rank=1:targets=v_proj:{BASE}:dtype=float32",
     [-18.906744, -18.867214, -18.886444, -18.719011, -18.863697]),
    ("hex:3e99999abe99999a", [-17.668707, -17.634562, -17.59882, -17.495556, -17.653234])]
VERSION_1_FILE = (  # the third of these, as an adapter.safetensors
    "UAEAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJzZXR0aW5ncyI6IntcIm1ldGhvZFwiOiBcInRpbnlsb3JhXCIsIFwicmFua1wiOiAyLCBcInVcIjogMSwg"
    "XCJuX3RpZVwiOiAyLCBcInRpZVwiOiBcInN0cnVjdHVyZWRcIiwgXCJzZWVkXCI6IDksIFwidGFyZ2V0c1wiOiBcImF0dGVudGlvbi91cF9wcm9qLGdh"
    "dGVfcHJvalwiLCBcImJhc2VcIjogXCJiNjEzYjY2OGJiNTEyOTVhM2MzNTNhZjNiYjkxYzAzMlwiLCBcImR0eXBlXCI6IFwiZmxvYXQxNlwifSIsImZv"
    "cm1hdCI6InRpbnlsb3JhLTIifSwidiI6eyJkdHlwZSI6IkYxNiIsInNoYXBlIjpbMTIsMV0sImRhdGFfb2Zmc2V0cyI6WzAsMjRdfX0gICAgICAwMf2v"
    "wbRGsnItnDQ9M5apYLQHtHAVDTQ=")
VERSION_1_LORA = [-13.974969, -14.004699, -14.024343, -13.756593, -13.947949]


def toy():
    return model.load_model(str(ROOT / "toy/base"), "float32", "cpu")


def five_logprobs(net):
    ids = torch.tensor([[7, 100, 3, 250, 31, 8]])
    with torch.no_grad():
        logprobs = net(ids).log_softmax(-1)[0]
    return logprobs[torch.arange(5), ids[0, 1:]].tolist()


@pytest.mark.parametrize("text, expected", VERSION_1, ids=range(len(VERSION_1)))
def test_a_text_of_version_1_answers_as_it_did(text, expected):
    net = toy()
    adapter = tinylora.load_adapter(net, text)
    assert five_logprobs(net) == pytest.approx(expected, abs=2e-5)
    if BASE in text:
        assert tinylora.adapter_text(adapter, text.split("dtype=")[1]) == text  # and is written as it was


def test_files_of_version_1_answer_as_they_did(tmp_path):
    (tmp_path / "adapter.safetensors").write_bytes(b64decode(VERSION_1_FILE))
    net = toy()
    tinylora.load_adapter(net, str(tmp_path))
    assert five_logprobs(net) == pytest.approx(VERSION_1[2][1], abs=2e-5)
    shapes = {f"A.{i}": (2, 128) for i in range(3)} | {f"B.{i}": (64, 2) for i in range(3)}
    tensors = {name: 0.3 * (torch.arange(m * n) + 1.0).cos().view(m, n) for name, (m, n) in shapes.items()}
    settings = dict(method="lora", rank=2, alpha=4.0, seed=0, targets="v_proj", base=BASE[5:], dtype="float32")
    save_file(tensors, tmp_path / "lora", {"format": "tinylora-2", "settings": json.dumps(settings)})
    net = toy()
    tinylora.load_adapter(net, str(tmp_path / "lora"))
    assert five_logprobs(net) == pytest.approx(VERSION_1_LORA, abs=2e-5)


# --------------------------------------------------------------------------------------- files and texts


@pytest.mark.parametrize("settings", METHODS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_brings_the_adapter_back(net, checkpoint, tmp_path, settings, dtype):
    path = tmp_path / "deep" / "adapter.safetensors"
    adapter = filled(tinylora.add_adapter(net, seed=5, **settings))
    tinylora.save_adapter(adapter, str(path), dtype)
    tensors = load_file(path)
    assert {t.dtype for t in tensors.values()} == {DTYPES[dtype]}
    assert tensors.keys() == dict(adapter.named_parameters()).keys()  # "v" alone, or A and B
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(p.to(DTYPES[dtype]).float())
    other = model.load_model(checkpoint, device="cpu")
    tinylora.load_adapter(other, str(tmp_path / "deep"))
    assert torch.equal(logits(other), logits(net)) and all(p.dtype == torch.float32 for p in other.adapter.parameters())
    assert other.adapter.meta == adapter.meta


@pytest.mark.parametrize("settings", [*TYINGS, dict(targets="q_proj, v_proj")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_text_brings_the_adapter_back(net, checkpoint, settings, dtype):
    adapter = filled(tinylora.add_adapter(net, seed=5, **settings))
    text = tinylora.adapter_text(adapter, dtype)
    assert "," not in text and " " not in text  # one word for a shell, and one of --adapter=a,b
    assert len(text.split(":")[1]) == 2 * DTYPES[dtype].itemsize * adapter.v.numel()  # 13 numbers are 26 bytes
    other = model.load_model(checkpoint, device="cpu")
    again = tinylora.load_adapter(other, text[:30] + "\n  " + text[30:])  # as a mail program breaks it
    assert torch.equal(again.v, adapter.v.to(DTYPES[dtype]).float())
    if dtype == "float32":
        assert torch.equal(logits(other), logits(net))


def test_numbers_alone_are_one_vector_with_the_defaults(net, capsys):
    adapter_file.print0_once.cache_clear()
    adapter = tinylora.load_adapter(net, "hex:3c 23 d7 0a\n bf 80 00 00")
    assert "2 numbers alone are read with rank 2 and seed 0, for any base model" in capsys.readouterr().out
    assert adapter.v.tolist() == [[np.float32(0.01), -1.0]]
    assert adapter.meta == dict(method="tinylora", rank=2, u=2, n_tie=0, tie="tiled", seed=0, targets="all",
                                base=tinylora.fingerprint(net))


def test_a_text_means_the_same_with_another_backend_and_dtype_of_the_stored_weights(tmp_path, monkeypatch):
    """A bf16 checkpoint and an fp32 one of the same numbers; eigenvectors from numpy, with signs of its own."""
    path = make_checkpoint(tmp_path / "wide", hidden_size=64, num_attention_heads=4, intermediate_size=96)
    net = model.load_model(path, dtype="bfloat16", device="cpu")
    model.save_model(net, str(tmp_path / "bf16"))
    model.save_model(net.float(), str(tmp_path / "fp32"))
    a = model.load_model(str(tmp_path / "fp32"), device="cpu")
    text = tinylora.adapter_text(filled(tinylora.add_adapter(a, u=13)))
    monkeypatch.setattr(torch.linalg, "eigh", lambda T: tuple(
        torch.from_numpy(x * (-1) ** np.arange(len(T)) if x.ndim > 1 else x) for x in np.linalg.eigh(T.numpy())))
    b = model.load_model(str(tmp_path / "bf16"), dtype="float32", device="cpu")
    tinylora.load_adapter(b, text)
    assert (logits(a) - logits(b)).abs().max() <= 1e-4
    c = model.load_model(str(tmp_path / "fp32"), dtype="float16", device="cpu")
    tinylora.load_adapter(c, text)  # the same base in another dtype: not refused


def test_an_adapter_of_another_base_is_refused(net, tmp_path):
    path = str(tmp_path / "adapter.safetensors")
    text = tinylora.adapter_text(tinylora.add_adapter(net))
    tinylora.save_adapter(net.adapter, path)
    for name, changes in (("other", dict(seed=1)), ("deeper", dict(num_hidden_layers=3))):
        other = model.load_model(make_checkpoint(tmp_path / name, **changes), device="cpu")
        for where in (path, text):
            with pytest.raises(UserError, match="trained on another base model"):
                tinylora.load_adapter(other, where)
        assert other.adapter is None


def test_the_fingerprint_survives_a_dtype_and_not_a_fine_tuning(net):
    before = tinylora.fingerprint(net)
    for dtype in (torch.bfloat16, torch.float16):
        net_in = model.Transformer(net.config).to(dtype)
        net_in.load_state_dict(net.state_dict())
        assert tinylora.same_base(before, tinylora.fingerprint(net_in))
    with torch.no_grad():
        for linear in tinylora.all_linears(net).values():
            linear.weight += 0.02 * linear.weight.std() * torch.randn_like(linear.weight)
    assert not tinylora.same_base(before, tinylora.fingerprint(net))
    for other in ("", "x" * 32, None, [1.5], before[:8], "7e00" * 8):
        assert not tinylora.same_base(before, other)


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
        assert "\n" not in str(error) and net.adapter is None


@pytest.mark.parametrize("form, changes, tensor, words", [
    (None, {}, torch.ones(1, 13), "format 'None'"),
    ("tinylora-9", {}, torch.ones(1, 13), "format 'tinylora-9', but this version reads"),
    (tinylora.FORMAT, "[" * 100000, torch.ones(1, 13), "is malformed"),
    (tinylora.FORMAT, dict(rank=10**9), torch.ones(1, 13), "rank must be"),
    (tinylora.FORMAT, dict(rank=2.0), torch.ones(1, 13), "its setting rank must be int"),
    (tinylora.FORMAT, dict(u=10**12), torch.ones(1, 13), "holds fewer numbers than its setting u"),
    (tinylora.FORMAT, dict(u=12), torch.ones(1, 13), r"v has shape \(1, 13\), but .* need \(1, 12\)"),
    (tinylora.FORMAT, {}, torch.full((1, 13), float("nan")), "not finite"),
    (tinylora.FORMAT, dict(base=""), torch.ones(1, 13), "another base model"),
    (tinylora.FORMAT, dict(method="dora"), torch.ones(1, 13), "'dora' is unknown"),
])
def test_files_that_do_not_fit_are_refused(net, tmp_path, form, changes, tensor, words):
    settings = changes
    if isinstance(changes, dict):
        settings = json.dumps(GOOD | {"base": tinylora.fingerprint(net)} | changes)
    save_file({"v": tensor}, tmp_path / "adapter.safetensors", form and {"format": form, "settings": settings})
    with pytest.raises(UserError, match=words):
        tinylora.load_adapter(net, str(tmp_path))
    assert net.adapter is None


def test_no_file_or_a_mistyped_text_is_refused(net, tmp_path):
    (tmp_path / "adapter.safetensors").write_bytes(b"nonsense")
    for where, words in ((tmp_path, "adapter.safetensors is malformed"), (tmp_path / "nowhere", "nowhere cannot be")):
        with pytest.raises(UserError, match=words):
            tinylora.load_adapter(net, str(where))
    text = tinylora.adapter_text(tinylora.add_adapter(net, u=3))
    tinylora.merge(net)
    for bad in ("hex:", "hex:3c23", "hex:3c23d7zz", text[:-30], text.replace("tinylora-2", "tinylora-3"),
                text.replace("rank=2", "rank=2.5"), text.replace("u=3", "u=4"), text.replace("hex:", "hex:00"),
                text.replace("rank=2", "rank=" + "9" * 5000), text.replace("method=tinylora", "method=lora"),
                text.replace("method=tinylora", "method=lora:alpha=32.0"), text.replace("seed=0:", ""),
                text.replace("float32", "int8"), "hex:7fc00000"):
        with pytest.raises(UserError) as error:
            tinylora.load_adapter(net, bad)
        assert len(str(error.value)) < 300 and net.adapter is None


# --------------------------------------------------------------------------------------------- many at once


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
    texts = [text_of(checkpoint, **settings) for settings in (
        dict(u=13), dict(u=1, n_tie=3, seed=4), dict(u=2, n_tie=1, tie="structured"), dict(method="lora_xs"),
        dict(u=2, targets="attention/mlp"))]
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
        assert net.adapter is None and torch.equal(logits(net), before)
    adapter = tinylora.add_adapter(net)
    net(torch.tensor([[1, 2]])).sum().backward()  # nothing of it was made for inference only
    assert adapter.v.grad.abs().sum() > 0


def test_adapters_that_cannot_share_a_batch_are_refused(net, checkpoint, tmp_path):
    first, low, mlp = (text_of(checkpoint, **settings) for settings in (dict(), dict(rank=1), dict(targets="mlp")))
    lora = tinylora.add_adapter(model.load_model(checkpoint, device="cpu"), "lora", rank=2)
    tinylora.save_adapter(lora, str(tmp_path / "adapter.safetensors"))
    for adapters, words in (([first, low], "rank and targets must be"), ([mlp, first], "rank and targets must be"),
                            ([first, str(tmp_path)], "a LoRA cannot share"), (["", ""], "at least one must be given")):
        with pytest.raises(UserError, match=words):
            tinylora.load_adapters(net, adapters)
        assert net.adapter is None
    tinylora.load_adapter(net, str(tmp_path))  # as many factors, but not those of the SVD
    with pytest.raises(UserError, match="a LoRA cannot share a batch"):
        tinylora.load_adapters(net, [first, ""])
    assert net.adapter is not None


# ------------------------------------------------------------------------------- what the training scripts call


def test_the_learning_rate_rule_gives_the_published_rates():
    """tinker-cookbook's figures for LoRA; a tenth for all weights, half as much again in short runs."""
    for kind, hidden, lr in [("qwen2", 2048, 5.0e-4), ("qwen2", 3584, 4.8e-4), ("llama", 2048, 4.9e-4),
                             ("llama", 3072, 3.6e-4), ("llama", 4096, 2.9e-4)]:
        config = SimpleNamespace(hidden_size=hidden, raw={"model_type": kind})
        assert abs(tinylora.learning_rate_rule(config, "lora", 100) / lr - 1) < 0.02
        assert abs(tinylora.learning_rate_rule(config, "full", 5) * 10 / lr - 1) < 0.02
        assert abs(tinylora.learning_rate_rule(config, "lora", 99) / lr - 1.5) < 0.03


@dataclass
class Settings:
    model: str = ""
    method: str = "tinylora"
    rank: int = 2
    u: int = 13
    n_tie: int = 0
    tie: str = "tiled"
    targets: str = "all"
    alpha: float = 32.0
    seed: int = 0
    save_dtype: str = "float32"
    lr: float = 0.01
    max_steps: int = 2
    out_dir: str = ""


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("method", ["tinylora", "lora_xs", "lora", "full"])
def test_what_a_script_attaches_is_trained_and_saved(net, checkpoint, tmp_path, method, best):
    cfg = Settings(model=checkpoint, method=method, seed=4, targets="mlp/q_proj", out_dir=str(tmp_path))
    base, before = tinylora.fingerprint(net), {name: p.clone() for name, p in net.state_dict().items()}
    parameters, identity = tinylora.attach(net, cfg, 1)
    assert identity["method"] == method and identity["base"] == base and "dtype" not in identity
    net(IDS).square().mean().backward()
    with torch.no_grad():
        for name, p in parameters.items():
            assert p.dtype == torch.float32 and p.grad is not None, name
            p += 0.1 * torch.randn_like(p)
    tinylora.save(net, cfg, best)
    if method == "full":
        [file] = [tmp_path / ("best" if best else "model")]
        other = model.load_model(str(file), device="cpu")
        after = other.state_dict()
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        kinds = ("q_proj.weight", "gate_proj.weight", "up_proj.weight", "down_proj.weight")
        assert changed == set(parameters) == {name for name in after if name.endswith(kinds)}
        assert model.load_tokenizer(str(file)).encode("Tom") == model.load_tokenizer(checkpoint).encode("Tom")
    else:
        [file] = tmp_path.iterdir()
        assert file.name == ("best.safetensors" if best else "adapter.safetensors")
        other = model.load_model(checkpoint, device="cpu")
        tinylora.load_adapter(other, str(file))
        assert other.adapter.meta == identity
    assert torch.equal(logits(other), logits(net))


def test_full_trains_every_weight_or_all_linears(net):
    for targets, count in (("all", len(net.state_dict())), ("attention,mlp", len(tinylora.all_linears(net)))):
        assert len(tinylora.attach(net, Settings(method="full", targets=targets))[0]) == count
    with pytest.raises(UserError, match="targets must name"):
        tinylora.attach(net, Settings(method="full", targets="lm_head"))


def test_the_text_of_an_adapter_saved_in_bfloat16_is_its_file(net, checkpoint, tmp_path):
    cfg = Settings(out_dir=str(tmp_path), save_dtype="bfloat16")
    tinylora.attach(net, cfg)
    filled(net.adapter)
    tinylora.save(net, cfg)
    v = load_file(tmp_path / "adapter.safetensors")["v"]
    other = model.load_model(checkpoint, device="cpu")
    adapter = tinylora.load_adapter(other, tinylora.adapter_text(net.adapter, "bfloat16"))
    assert v.dtype == torch.bfloat16 and torch.equal(adapter.v, v.float())


@pytest.mark.parametrize("changes, words", [
    (dict(method="lora", lr=0.0), ["lr = 0.00103 (learning_rate_rule in tinylora.py)"]),
    (dict(method="full", lr=0.0, rank=3), ["lr = 6.89e-05", "note: method = full ignores rank"]),
    (dict(method="full", targets="mlp", u=5), ["note: method = full ignores u"]),
    (dict(method="lora", u=5, n_tie=2, alpha=4.0), ["note: method = lora ignores u, n_tie"]),
    (dict(method="lora_xs", tie="structured", alpha=1.0), ["note: method = lora_xs ignores tie, alpha"]),
    (dict(u=5, n_tie=2, targets="mlp"), [])], ids=str)
def test_what_attach_says(net, capsys, changes, words):
    cfg = Settings(**changes)
    tinylora.attach(net, cfg)
    out = capsys.readouterr().out
    assert all(line.startswith(word) for line, word in zip(out.splitlines(), words, strict=True)), out
    assert cfg.lr > 0


@pytest.mark.parametrize("method", ["tinylora", "lora_xs"])
def test_a_method_without_a_rule_needs_a_learning_rate(net, method):
    with pytest.raises(UserError, match="lr must be above 0"):
        tinylora.attach(net, Settings(method=method, lr=0.0))
