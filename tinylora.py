"""TinyLoRA and LoRA-XS: adapters of a handful of numbers over a frozen model ("Learning to Reason in 13 Parameters",
Morris et al. 2026, section 4; LoRA-XS: Balazy et al. 2024).

    W' = W + U S R V^T,   R = sum_i v_i P_i

U S V^T is the truncated SVD of the frozen W (rank r), the P_i [r, r] are fixed random matrices, and v [u] is all that
is trained. Modules may share one v (tying), so a model can have as few as one trained number. Nothing is ever merged
into W while training or sampling: an update this small would be rounded away in bf16. A layer computes

    y = W x + b + (U S) R (V^T x)
"""

import hashlib
import json
import math
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configurator import UserError

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # forward order in a block
FORMAT = "tinylora-1"


class AdaptedLinear(nn.Linear):
    """A frozen linear whose output gets the low-rank update. Its weight and bias keep the checkpoint's names."""

    @classmethod
    def adapt(cls, linear, adapter, index, US, Vt):
        linear.__class__ = cls  # in place: same parameters, same names, one more term in forward
        linear.index, linear.US, linear.Vt = index, US, Vt
        object.__setattr__(linear, "adapter", adapter)  # not a submodule: the model's state dict stays the checkpoint's

    def forward(self, x):
        R = self.adapter.R[self.index]
        h = F.linear(x, self.Vt).to(R.dtype) @ R.T  # [..., r], in fp32 so that v is not rounded
        update = F.linear(h.to(x.dtype), self.US)
        # One addmm, so that W x + update is rounded once: added to an output that is already bf16, an update below
        # half a unit in its last place would be lost for every token alike.
        y = torch.addmm(update.flatten(0, -2), x.flatten(0, -2), self.weight.T).view_as(update)
        return y if self.bias is None else y + self.bias


class Adapter(nn.Module):
    """The trained numbers of a model, v [groups, u] in fp32, and what is fixed: P [N, u, r, r] and the group of each
    of the N adapted linears. `meta` holds the settings that rebuild all of it."""

    def __init__(self, P, groups, meta):
        super().__init__()
        self.v = nn.Parameter(torch.zeros(int(groups.max()) + 1, P.shape[1], device=P.device))  # v = 0: W' = W
        self.register_buffer("P", P, persistent=False)
        self.register_buffer("groups", groups, persistent=False)
        self.meta = meta
        self.R = None
        self.enabled = True

    def refresh(self, *_):
        """Compute all R [N, r, r] from v; runs before every forward pass, so an update of v is never missed."""
        v = self.v if self.enabled else torch.zeros_like(self.v)
        self.R = torch.einsum("nu,nuij->nij", v[self.groups], self.P)


def add_adapter(model, method="tinylora", rank=2, u=13, n_tie=0, tie="tiled", seed=0):
    """Attach an adapter to all seven linears of every block of a frozen model; returns the Adapter, with v = 0.

    method: 'tinylora', or 'lora_xs' (R itself is trained: u = rank^2, P_i = matrix units, no tying).
    rank: r of the frozen SVD (paper: 2). u: numbers per group.
    n_tie, tie: 'tiled' shares v among n_tie consecutive linears of the flat list (layer by layer, q k v o gate up
        down); 'structured' among n_tie layers' linears of the same type; n_tie = 0: one group for all (section 4).
    seed: of P. P depends on the seed and the module's name alone.
    """
    if hasattr(model, "adapter"):
        raise UserError("this model has an adapter already")
    modules = adapted_linears(model)
    if method == "lora_xs":
        u, n_tie, tie = rank * rank, 1, "tiled"
    elif method != "tinylora":
        raise UserError(f"method '{method}' is unknown; tinylora and lora_xs are known")
    smallest = min(min(m.weight.shape) for m in modules.values())
    if not 1 <= rank <= smallest or u < 1:
        raise UserError(f"rank must be 1 to {smallest} and u at least 1, got rank={rank}, u={u}")
    groups = torch.tensor(tying_groups(len(modules), n_tie, tie))
    if method == "lora_xs":
        P = torch.eye(u).view(u, rank, rank).expand(len(modules), u, rank, rank)
    else:
        P = torch.stack([random_projection(seed, name, u, rank) for name in modules])
    meta = dict(method=method, rank=rank, u=u, n_tie=n_tie, tie=tie, seed=seed, linears=len(modules),
                base=[])  # the largest singular value of every linear: a fingerprint of the base model
    adapter = Adapter(P.to(model.device), groups.to(model.device), meta)
    for index, linear in enumerate(modules.values()):
        U, S, Vt = top_svd(linear.weight, rank)
        meta["base"].append(round(S[0].item(), 4))
        dtype = linear.weight.dtype
        AdaptedLinear.adapt(linear, adapter, index, (U * S).to(dtype).contiguous(), Vt.to(dtype).contiguous())
    object.__setattr__(model, "adapter", adapter)
    adapter.hook = model.model.register_forward_pre_hook(adapter.refresh)
    return adapter


def adapted_linears(model):
    """The flat list of linears in forward order, {name: module}."""
    return {f"model.layers.{i}.{part}.{name}": getattr(getattr(block, part), name)
            for i, block in enumerate(model.model.layers) for name in LINEARS
            for part in [("self_attn" if name in LINEARS[:4] else "mlp")]}


def tying_groups(N, n_tie, tie="tiled"):
    """The group of each of N linears in the flat list (paper section 4: tiled and structured sharing)."""
    if n_tie < 0 or tie not in ("tiled", "structured"):
        raise UserError(f"n_tie must be 0 (one group) or more and tie tiled or structured; got {n_tie}, '{tie}'")
    if n_tie == 0:
        return [0] * N
    if tie == "tiled":
        return [i // n_tie for i in range(N)]
    return [i // 7 // n_tie * 7 + i % 7 for i in range(N)]


def random_projection(seed, name, u, rank):
    """P [u, r, r] ~ N(0, 1/r), another in every module: with one P for all, a tied model would have r^2 = 4 effective
    numbers, whatever u is. From numpy's RandomState, whose stream is frozen for good (NEP 19), seeded by a hash of
    (seed, name): the same on every machine, in any order of modules."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    state = np.random.RandomState(np.frombuffer(digest, dtype="<u4"))
    return torch.from_numpy(state.standard_normal((u, rank, rank)) / math.sqrt(rank)).float()


@torch.no_grad()
def top_svd(W, rank, tol=1e-6, block=8, max_rounds=60):
    """Top singular triplets of W [m, n]: U [m, r], S [r], Vt [r, n] in fp32, with canonical signs.

    Block Lanczos with full reorthogonalisation (Golub, Luk & Overton 1981): the basis grows by W^T W applied to its
    last block until the residual |W^T W v - s^2 v| / s^2 of every wanted pair is below tol. A full SVD of a 7B model
    takes half an hour; this takes seconds, and on flat spectra merely more rounds.
    Signs: (u, v) and (-u, -v) are both right but give different updates, so the entry of u that is largest in
    magnitude is made positive (the first, if several are).
    """
    W = W.detach().double()  # W^T W squares the spread of the spectrum: too much for fp32 where one value towers
    U, S, Vt = _lanczos(W, rank, tol, block, max_rounds) or torch.linalg.svd(W, full_matrices=False)
    U, S, Vt = U[:, :rank], S[:rank], Vt[:rank]
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()  # [1, r]
    return (U * sign).float(), S.float(), (Vt * sign.T).float()


def _lanczos(W, rank, tol, block, max_rounds):
    """U, S, Vt of the top `rank` triplets, or None where the basis fills the space or max_rounds do not suffice."""
    generator = torch.Generator().manual_seed(0)  # the start decides the rounds needed, not the result
    X = torch.randn(W.shape[1], max(block, rank + 4), generator=generator).to(W)
    if min(W.shape) < 2 * X.shape[1]:
        return None
    X = torch.linalg.qr(X).Q
    basis, images = X, W @ X  # V-side basis [n, k] and its image under W [m, k]
    for _ in range(max_rounds):
        values, vectors = torch.linalg.eigh(images.T @ images)  # Rayleigh-Ritz, ascending
        top = vectors[:, -rank:].flip(-1)
        V, WV, S2 = basis @ top, images @ top, values[-rank:].flip(-1)
        residual = (W.T @ WV - V * S2).norm(dim=0) / S2
        if residual.max() < tol:
            S = WV.norm(dim=0)
            return WV / S, S, V.T
        if basis.shape[1] + X.shape[1] > min(W.shape):
            return None
        X = W.T @ images[:, -X.shape[1] :]
        for _ in range(2):  # orthogonalising twice is enough (Kahan)
            X = X - basis @ (basis.T @ X)
        X = torch.linalg.qr(X).Q
        basis, images = torch.cat((basis, X), 1), torch.cat((images, W @ X), 1)
    return None


@torch.no_grad()
def merge(model):
    """Fold the adapter into the weights, in fp32 with one rounding, and remove it. For export only."""
    adapter = model.adapter
    adapter.refresh()
    for linear in adapted_linears(model).values():
        update = linear.US.float() @ adapter.R[linear.index] @ linear.Vt.float()
        linear.weight.copy_((linear.weight.float() + update).to(linear.weight.dtype))
        linear.__class__ = nn.Linear
        del linear.adapter, linear.index, linear.US, linear.Vt
    adapter.hook.remove()
    del model.adapter
    return model


def save_adapter(adapter, path):
    """Write v and the settings that rebuild the rest, 13 numbers and a line of JSON, as one safetensors file."""
    if os.path.dirname(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    meta = {"format": FORMAT, "settings": json.dumps(adapter.meta)}
    save_file({"v": adapter.v.detach().float().cpu().contiguous()}, path + ".tmp", metadata=meta)
    os.replace(path + ".tmp", path)


def load_adapter(model, path):
    """Rebuild the adapter of a file on its base model. Another base is refused by its singular values."""
    path = os.path.join(path, "adapter.safetensors") if os.path.isdir(path) else path
    try:
        with safe_open(path, framework="pt") as f:
            info, v = f.metadata() or {}, f.get_tensor("v")
    except (SafetensorError, OSError) as error:
        raise UserError(f"no adapter can be read from '{path}': {error}") from None
    if info.get("format") != FORMAT:
        raise UserError(f"{path}: format {info.get('format')!r}, this version reads {FORMAT!r}")
    try:
        meta = json.loads(info["settings"])
        linears, base = meta.pop("linears"), meta.pop("base")
    except (KeyError, ValueError, AttributeError):
        raise UserError(f"{path}: the settings in its metadata cannot be read") from None
    if linears != len(adapted_linears(model)):
        raise UserError(f"{path} is for a model of {linears} linears, this one has {len(adapted_linears(model))}")
    adapter = add_adapter(model, **meta)
    if not np.allclose(base, adapter.meta["base"], rtol=1e-3):
        raise UserError(f"{path} was trained on another base model: its singular values differ")
    if v.shape != adapter.v.shape:
        raise UserError(f"{path}: v has shape {list(v.shape)}, its settings say {list(adapter.v.shape)}")
    with torch.no_grad():
        adapter.v.copy_(v)
    return adapter
