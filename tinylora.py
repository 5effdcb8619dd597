"""TinyLoRA, LoRA-XS and LoRA: adapters on the linears of a frozen model.

    tinylora    W' = W + U S R V^T,   R = sum_i v_i P_i
    lora_xs     W' = W + U S R V^T,   R itself is trained
    lora        W' = W + (alpha / r) B A

U S V^T is the truncated SVD of the frozen W, of rank r. The P_i [r, r] are fixed random matrices,
and v [u] is all that TinyLoRA trains. Linears may share one v (tying). W is never changed, because
in 16 bits an update this small would be rounded away. A layer computes

    y = W x + b + (U S) R (V^T x)

and a LoRA layer the same with B, (alpha / r) 1 and A in the three places.

TinyLoRA: "Learning to Reason in 13 Parameters" (Morris et al. 2026), section 4. LoRA-XS: Balazy et
al. 2024. LoRA as in "LoRA Without Regret" (Schulman et al. 2025).
"""

import hashlib
import json
import math
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from model import Linear, load_model, save_model
from support import UserError, foreign_file, whole_file
from support.adapter_file import ANY_BASE, FORMAT, read_adapter, same_base
from support.checkpoint import DTYPES
from support.fused import LowRankLinear
from support.parallel import full_tensor, is_chief, print0, shard_model
from support.svd import svd_factors

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {"all": LINEARS, "attention": LINEARS[:4], "mlp": LINEARS[4:]}
METHODS = {"tinylora": ("rank", "u", "n_tie", "tie", "seed", "targets"),
           "lora_xs": ("rank", "targets"),
           "lora": ("rank", "alpha", "seed", "targets")}  # the settings that each method reads

# ------------------------------------------------------------------------------------ the adapter

def add_adapter(model, method="tinylora", rank=2, u=13, n_tie=0, tie="tiled", seed=0, targets="all",
                alpha=32.0):
    """Attach an adapter that does not change anything yet to a frozen model. Returns the Adapter.

    method: 'tinylora', 'lora_xs' (u = rank^2, no tying) or 'lora'.
    rank: r of the truncated SVD (2 in the paper), or of A and B.
    u: trained numbers in a group of linears that share them.
    n_tie, tie: 'tiled' shares v among n_tie consecutive linears of the flat list (layer by layer,
        q k v o gate up down), 'structured' among the linears of one type in n_tie layers. With
        n_tie = 0 all linears are one group (section 4).
    targets: 'all', 'attention', 'mlp', or linears such as 'q_proj,v_proj'. Parts separated by '/'
        are tied each on its own: 'attention/mlp' with n_tie = 0 has one v for each of the two.
    seed: of P, or of A.
    alpha: of lora, whose update is scaled by alpha / rank: one lr suits nearly every rank.
    Raises UserError, and leaves the model as it was, if the settings do not fit.
    """
    settings = dict(method=method, rank=rank, u=u, n_tie=n_tie, tie=tie, seed=seed,
                    targets=targets, alpha=float(alpha))
    adapter = Adapter(model, settings)
    adapter.meta["base"] = fingerprint(model)
    return install(model, adapter)


def install(model, adapter):
    """Attach an Adapter that was made for this model. Returns it."""
    if model.adapter:
        raise UserError("this model has an adapter already; merge or detach it first")
    if adapter.meta["method"] == "lora":
        factors = zip(adapter.B, adapter.A)
    else:
        weights = {name: linear.weight for name, linear in adapter.linears.items()}
        factors = svd_factors(weights, adapter.meta["rank"], model.device)
        factors = [(US.to(model.dtype), Vt.to(model.dtype)) for US, Vt in factors]
    for index, (linear, (US, Vt)) in enumerate(zip(adapter.linears.values(), factors)):
        linear.__class__ = AdaptedLinear  # in place: weight and bias keep the checkpoint's names
        vars(linear).update(index=index, US=US, Vt=Vt, R=None)
    vars(model)["adapter"] = adapter  # not as a submodule, which would change the state dict
    adapter.hook = model.model.register_forward_pre_hook(adapter.refresh)
    return adapter


class AdaptedLinear(Linear):
    """A frozen linear with the update, in training. While sampling, support/fused.FusedLinear takes
    its place and must compute the same. US [m, r], Vt [r, n] and R [r, r] are plain attributes, so
    the state dict stays the checkpoint's."""

    def forward(self, x):
        y = LowRankLinear.apply(x, self.weight, self.US, self.Vt, self.R)
        return y if self.bias is None else y + self.bias

    def merged(self):
        """W + U S R V^T in float32."""
        return self.weight.float() + self.US.float() @ self.R @ self.Vt.float()


class Adapter(nn.Module):
    """The trained numbers in float32, v [groups, u] or LoRA's A [r, n] and B [m, r], and what is
    fixed: P [N, u, r, r] and the group of each of the N linears. `linears` are {name: module}, and
    `meta` holds the settings that rebuild all of it, and the fingerprint of the base model."""

    def __init__(self, model, settings):
        super().__init__()
        self.linears, groups, self.meta = plan(model, settings)
        rank, device = self.meta["rank"], model.device
        if self.meta["method"] == "lora":
            self.A, self.B = nn.ParameterList(), nn.ParameterList()
            for name, linear in self.linears.items():
                m, n = linear.weight.shape
                self.A.append(random_lora(self.meta["seed"], name, rank, n).to(device))
                self.B.append(torch.zeros(m, rank, device=device))
            scale = torch.eye(rank, device=device) * (self.meta["alpha"] / rank)
            self.scale = scale.expand(len(groups), -1, -1)  # takes the place of R
        else:
            self.P = projections(self.meta, self.linears).to(device)
            self.groups = torch.tensor(groups, device=device)
            self.v = nn.Parameter(torch.zeros(max(groups) + 1, self.P.shape[1], device=device))
        self.R = None  # [N, r, r], or of every row of a batch [N, B, r, r]
        self.rows = None  # [N, B, r, r]: the R that rows of a batch have from adapters of their own
        self.enabled = True  # if not, R is 0, and the model is the base model
        self.frozen = False  # while the sampler has taken R, refresh leaves it alone

    def refresh(self, *_):
        """Set R of all linears. It runs before every forward pass, so it sees every change of v."""
        if self.frozen:
            return
        if self.rows is not None:
            self.R = self.rows
        elif self.meta["method"] == "lora":
            self.R = self.scale
        else:
            self.R = mix(self.v, self.groups, self.P)
        if not self.enabled:
            self.R = torch.zeros_like(self.R)
        for linear, R in zip(self.linears.values(), self.R):
            linear.R = R


def mix(v, groups, P):
    """R [N, r, r] = sum_i v_i P_i of every linear, from v [groups, u] and P [N, u, r, r]."""
    # F.embedding is v[groups] with a deterministic gradient.
    return torch.einsum("nu,nuij->nij", F.embedding(groups, v), P)


@torch.no_grad()
def merge(model):
    """Fold the adapter into the weights, with one rounding, and remove it. Returns the model. For
    export only: in 16 bits most of a small update is lost."""
    model.adapter.refresh()
    for linear in model.adapter.linears.values():
        linear.weight.copy_(linear.merged())
    return detach(model)


def detach(model):
    """Remove the adapter, so that the model is as it was loaded. Returns the model."""
    for linear in model.adapter.linears.values():
        linear.__class__ = Linear
        del linear.index, linear.US, linear.Vt, linear.R
    model.adapter.hook.remove()
    del model.adapter
    return model


# --------------------------------------------------------------------- which linears, which groups

def plan(model, settings):
    """The adapted linears {name: module} in forward order, the group of each, and the settings that
    the method reads. UserError if a setting is wrong."""
    method = settings["method"]
    if method not in METHODS:
        raise UserError(f"method '{method}' is unknown; use {', '.join(METHODS)}")
    meta = {"method": method} | {key: settings[key] for key in METHODS[method]}
    parts = parse_targets(meta["targets"])
    linears = {name: linear for name, linear in all_linears(model).items()
               if name.endswith(sum(parts, ()))}
    rank, u, alpha = meta["rank"], meta.get("u", 1), meta.get("alpha", 1.0)
    n_tie, tie = meta.get("n_tie", 1), meta.get("tie", "tiled")
    side = max if method == "lora" else min
    limit = min(side(linear.weight.shape) for linear in linears.values())
    size = u * rank**2 * len(linears)
    for holds, message in [
        (1 <= rank <= limit, f"rank must be 1 to {limit} here, got {rank}"),
        (0 < alpha < math.inf, f"alpha must be above 0, got {alpha}"),
        (u >= 1, f"u must be at least 1, got {u}"),
        (size <= 10**9, f"u = {u} takes {size:,} numbers of P, which is too many; lower u"),
        (n_tie >= 0, f"n_tie must be 0 (one group) or more, got {n_tie}"),
        (tie in ("tiled", "structured"), f"tie must be tiled or structured, got '{tie}'"),
    ]:
        if not holds:
            raise UserError(message)
    groups, count = {}, 0
    for part in parts:
        names = [name for name in linears if name.endswith(part)]
        for name, group in zip(names, tying_groups(len(names), n_tie, tie, len(part))):
            groups[name] = count + group
        count = max(groups.values()) + 1
    return linears, [groups[name] for name in linears], meta


def all_linears(model):
    """The flat list of all linears in forward order, {name: module}."""
    return {name: module for name, module in model.named_modules() if name.endswith(LINEARS)}


def parse_targets(text):
    """'attention/up_proj,down_proj' -> [LINEARS[:4], ("up_proj", "down_proj")]."""
    parts = []
    for part in text.split("/"):
        words = [word.strip() for word in part.split(",")]
        parts.append([kind for word in words for kind in TARGETS.get(word, (word,))])
    kinds = sum(parts, [])
    if not set(kinds) <= set(LINEARS) or len(set(kinds)) < len(kinds):
        raise UserError(f"targets must name {', '.join(TARGETS)} or some of {', '.join(LINEARS)}, "
                        f"each once, with commas or slashes between them; got '{text}'")
    return [tuple(kind for kind in LINEARS if kind in part) for part in parts]


def tying_groups(N, n_tie, tie="tiled", types=7):
    """The group of each of N linears in the flat list, `types` of them in a layer."""
    if n_tie == 0:
        return [0] * N
    if tie == "tiled":
        return [i // n_tie for i in range(N)]
    return [i // types // n_tie * types + i % types for i in range(N)]  # i // types: its layer


# ------------------------------------------------------------------- random numbers, learning rate

def random_state(seed, name):
    """A generator seeded by (seed, name), so its numbers do not depend on machine or order. The
    stream of numpy's RandomState is frozen for good (NEP 19)."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))


def random_projection(seed, name, u, rank):
    """P [u, r, r] ~ N(0, 1/r), different in every linear. If all had the same P, a tied model would
    have at most r^2 effective numbers, whatever u is."""
    P = random_state(seed, name).standard_normal((u, rank, rank)) / math.sqrt(rank)
    return torch.from_numpy(P).float()


def projections(meta, names):
    """P [N, u, r, r] of the linears: random, or the matrix units for lora_xs."""
    rank = meta["rank"]
    if meta["method"] == "lora_xs":
        return torch.eye(rank * rank).view(-1, rank, rank).expand(len(names), -1, -1, -1)
    return torch.stack([random_projection(meta["seed"], name, meta["u"], rank) for name in names])


def random_lora(seed, name, rank, n):
    """A [r, n] ~ U(-1/sqrt(n), 1/sqrt(n)) (LoRA Without Regret)."""
    A = random_state(seed, name).uniform(-1, 1, (rank, n)) / math.sqrt(n)
    return torch.from_numpy(A).float()


def learning_rate_rule(config, method, steps):
    """A first learning rate for 'full' or for 'lora' of any rank with alpha = 32 (LoRA Without
    Regret; tinker-cookbook fitted the powers to supervised runs of 14 models). The factors for
    LoRA hold for RL, too, but the base rate does not: there its authors use 2e-5 to 8e-5."""
    power = 0.781 if config.raw["model_type"] == "llama" else 0.0775
    rate = 5e-5 * (2000 / config.hidden_size) ** power
    of_lora = 10 if steps >= 100 else 15
    return rate if method == "full" else rate * of_lora


# -------------------------------------------------------------------------- for grpo.py and sft.py

def attach(net, cfg, shard=1):
    """Make ready what cfg.method trains, and spread the weights over `shard` processes. Returns
    the trained {name: parameter}, and the settings that they depend on; of these 'base' is to be
    compared with same_base. lr = 0 is replaced by learning_rate_rule."""
    if cfg.lr == 0:
        if cfg.method not in ("lora", "full"):
            raise UserError("lr must be above 0: the rule for lr = 0 knows lora and full alone")
        cfg.lr = learning_rate_rule(net.config, cfg.method, cfg.max_steps)
        print0(f"lr = {cfg.lr:.3g} (learning_rate_rule in tinylora.py)")
    ignored = [key for key in ("rank", "u", "n_tie", "tie", "targets", "alpha")
               if key not in METHODS.get(cfg.method, ("targets",))
               and getattr(cfg, key) != getattr(type(cfg), key)]  # the default
    if ignored:
        print0(f"note: method = {cfg.method} ignores {', '.join(ignored)}")
    if cfg.method == "full":
        identity = {"method": "full", "base": fingerprint(net), "targets": cfg.targets}
        kinds = sum(parse_targets(cfg.targets), ())
        trained = net.requires_grad_(cfg.targets == "all")
        for name, linear in all_linears(net).items():
            linear.weight.requires_grad_(name.endswith(kinds))
    else:
        trained = add_adapter(net, cfg.method, cfg.rank, cfg.u, cfg.n_tie, cfg.tie, cfg.seed,
                              cfg.targets, cfg.alpha)
        identity = trained.meta
    if shard > 1:
        shard_model(net, shard)
    return {name: p for name, p in trained.named_parameters() if p.requires_grad}, identity


def save(net, cfg, best=False):
    """Write what a run is for: the adapter, or the model if method = full."""
    kind = "model" if cfg.method == "full" else "adapter"
    path = os.path.join(cfg.out_dir, "best" if best else kind)
    if kind == "model":
        save_model(net, path, tokenizer_from=cfg.model)
    else:
        save_adapter(net.adapter, f"{path}.safetensors", cfg.save_dtype)


# --------------------------------------------------------------------------------- files and texts

def fingerprint(model):
    """32 hex digits that tell base models apart in any dtype: eight random projections a^T W b,
    each summed over all linears scaled to norm 1, so about N(0, 1). Rounding to bfloat16 moves
    them by some 0.001, and a fine-tuning that changes the weights by one per cent by 0.01."""
    linears = all_linears(model)
    total = 0
    for name, linear in linears.items():
        state = random_state("fingerprint", name)
        a, b = (torch.from_numpy(state.standard_normal((size, 8))).float().to(model.device)
                for size in linear.weight.shape)
        W = linear.weight.detach().to(model.device).float()
        total = total + (a * (W @ b)).sum(0) / W.norm().clamp(min=1e-30)
    total = total / math.sqrt(len(linears))
    return total.cpu().numpy().astype(">f2").tobytes().hex()


def save_adapter(adapter, path, dtype="float32"):
    """Write the trained numbers in `dtype` and the settings that rebuild the rest. All processes
    must call this."""
    tensors = {name: full_tensor(p.to(DTYPES[dtype])) for name, p in adapter.named_parameters()}
    settings = json.dumps(adapter.meta | {"dtype": dtype})
    if is_chief():
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with whole_file(path) as aside:
            save_file(tensors, aside, metadata={"format": FORMAT, "settings": settings})


def adapter_text(adapter, dtype="float32"):
    """An adapter with a v as one line, hex:NUMBERS:FORMAT:SETTINGS, which can be given as
    --adapter. The numbers are big-endian, v [groups, u] row by row."""
    v = adapter.v.detach().cpu().to(DTYPES[dtype])
    numbers = v.view(torch.uint8).view(-1, v.itemsize).flip(1).numpy().tobytes().hex()
    settings = adapter.meta | {"dtype": dtype}
    pairs = ":".join(f"{key}={value}" for key, value in settings.items())
    return f"hex:{numbers}:{FORMAT}:{pairs.replace(',', '+').replace(' ', '')}"


def read_for(model, where, base):
    """The Adapter, not yet attached, that a file or text holds. base: the model's fingerprint."""
    name, settings, tensors = read_adapter(where)
    with foreign_file(name):
        adapter = Adapter(model, settings)
    trained_on = settings.get("base")
    if trained_on != ANY_BASE and not same_base(trained_on, base):
        raise UserError(f"{name} was trained on another base model: its fingerprint differs")
    adapter.meta["base"] = base
    if "v" in tensors and hasattr(adapter, "v") and tensors["v"].numel() == adapter.v.numel():
        tensors["v"] = tensors["v"].view_as(adapter.v)  # a text has all numbers in one row
    set_numbers(adapter, tensors, name)
    return adapter


@torch.no_grad()
def set_numbers(adapter, tensors, where):
    """Copy the tensors from `where` into the adapter. UserError if they do not fit."""
    if not all(t.isfinite().all() for t in tensors.values()):
        raise UserError(f"{where} holds numbers that are not finite")
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    needed = {name: tuple(p.shape) for name, p in adapter.named_parameters()}
    if found != needed:
        name = min(set(found.items()) ^ set(needed.items()))[0]
        raise UserError(f"{where}: {name} has shape {found.get(name)}, but its settings and this "
                        f"model need {needed.get(name)}")
    for name, p in adapter.named_parameters():
        p.copy_(tensors[name])


def load_adapter(model, where):
    """Attach an adapter to its base model: a file, the out_dir of a run, or a text. Returns the
    Adapter. UserError, with the model as it was, if it cannot be read or has another base."""
    return install(model, read_for(model, where, fingerprint(model)))


def load_adapted(path, where="", dtype=None, device=None, shard=1):
    """load_model, then load_adapter if one is named, spread over `shard` processes."""
    net = load_model(path, dtype, device, shard)
    if where:
        load_adapter(net, where)
    if shard > 1:
        shard_model(net, shard)
    return net


@torch.no_grad()
def load_adapters(model, adapters):
    """R [N, K, r, r] in float32 of K adapters for sample.generate: files, directories, texts, or ""
    for none. They must adapt the same linears with the same rank, because they share the factors of
    the model's adapter. A model without one gets the first of these, if none is refused."""
    base, shared, R = fingerprint(model), model.adapter, {}
    for where in dict.fromkeys(filter(None, adapters)):  # each once
        adapter = read_for(model, where, base)
        shared = shared or adapter
        if "lora" in (adapter.meta["method"], shared.meta["method"]):
            raise UserError(f"{where[:80]}: a LoRA cannot share a batch; load it alone")
        if (adapter.meta["rank"], adapter.linears) != (shared.meta["rank"], shared.linears):
            raise UserError(f"{where[:80]}: rank and targets must be those of the others")
        R[where] = mix(adapter.v, adapter.groups, adapter.P)
    if not R:
        raise UserError("of several adapters at least one must be given")
    if not model.adapter:
        install(model, shared)
    none = torch.zeros_like(R[next(iter(R))])
    return torch.stack([R.get(where, none) for where in adapters], dim=1)


@torch.no_grad()
def mix_vectors(model, vectors):
    """R [N, K, r, r] of K vectors [groups, u], a list or a tensor of them, each in the place of the
    v of the model's adapter. UserError if they do not fit it."""
    adapter = model.adapter
    if adapter is None or adapter.meta["method"] == "lora":
        raise UserError("vectors as adapters need a model with a tinylora or lora_xs adapter")
    for v in vectors:
        if v.shape != adapter.v.shape:
            raise UserError(f"a vector has shape {tuple(v.shape)}, and the v of the model's adapter "
                            f"has {tuple(adapter.v.shape)}")
    of_linears = torch.stack(list(vectors)).to(adapter.v)[:, adapter.groups]  # [K, N, u]
    return torch.einsum("knu,nuij->nkij", of_linears, adapter.P)
