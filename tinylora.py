"""TinyLoRA, LoRA-XS and LoRA: adapters over the linears of a frozen model ("Learning to Reason in 13 Parameters",
Morris et al. 2026, section 4; LoRA-XS: Balazy et al. 2024; LoRA as in "LoRA Without Regret", Schulman et al. 2025).

    tinylora    W' = W + U S R V^T,   R = sum_i v_i P_i
    lora_xs     W' = W + U S R V^T,   R itself trained
    lora        W' = W + (alpha / r) B A

U S V^T is the truncated SVD of the frozen W (rank r), the P_i [r, r] are fixed random matrices, and v [u] is all that
TinyLoRA trains. Modules may share one v (tying), so a model can have as few as one trained number. W stays as it is,
and in 16 bits not even a copy of it takes in an update this small: it would be rounded away. A layer computes

    y = W x + b + (U S) R (V^T x)

and a LoRA layer the same with B, (alpha / r) 1 and A in the three places.
"""

import hashlib
import json
import math
import os
import re

import numpy as np
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from model import load_model
from support import UserError, whole_file
from support.checkpoint import DTYPES
from support.fused import sum_of_products, thin_product
from support.parallel import full_tensor, is_chief, print0_once, shard_model
from support.svd import svd_factors

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # forward order in a block
TARGETS = {"all": LINEARS, "attention": LINEARS[:4], "mlp": LINEARS[4:]}
SETTINGS = {"tinylora": ("rank", "u", "n_tie", "tie", "seed", "targets"), "lora_xs": ("rank", "targets"),
            "lora": ("rank", "alpha", "seed", "targets")}  # what each method reads; the others it leaves unread
KINDS = {"method": str, "rank": int, "u": int, "n_tie": int, "tie": str, "seed": int, "targets": str, "alpha": float,
         "base": str, "dtype": str}
FORMAT = "tinylora-2"

# ------------------------------------------------------------------------------------------------------ the adapter


class AdaptedLinear(nn.Linear):
    """A frozen linear whose output gets the low-rank update. Its weight and bias keep the checkpoint's names."""

    @classmethod
    def adapt(cls, linear, index, US, Vt):
        linear.__class__ = cls  # in place: same parameters, same names, one more term in forward
        # Past nn.Module: neither submodule nor parameters, so that the model's state dict stays the checkpoint's.
        linear.__dict__.update(index=index, US=US, Vt=Vt, R=None)

    def forward(self, x):
        y = LowRankUpdate.apply(x, self.weight, self.US, self.Vt, self.R)
        return y if self.bias is None else y + self.bias

    def merged(self):
        """W + U S R V^T in fp32, which holds so small an update."""
        return self.weight.float() + self.US.float() @ self.R @ self.Vt.float()


class LowRankUpdate(torch.autograd.Function):
    """x (W + US R V^T)^T: x [..., n], W [m, n], US [m, r], Vt [r, n], R [r, r] -> [..., m].

    The gradient is written by hand, as every pass over the tokens costs: that of x is one product added to another in
    place, and of x itself nothing is kept but V^T x [..., r], unless W or V^T is trained.
    """

    @staticmethod
    def forward(ctx, x, W, US, Vt, R):
        h = thin_product(x, Vt.to(x.dtype))  # [..., r]
        ctx.save_for_backward(W, US, Vt, R, h, x if ctx.needs_input_grad[1] or ctx.needs_input_grad[3] else None)
        return sum_of_products(x, W, h, (US.to(R.dtype) @ R).to(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        W, US, Vt, R, h, x = ctx.saved_tensors
        needs, shape = ctx.needs_input_grad, dy.shape[:-1]
        h, dy = h.flatten(0, -2), dy.flatten(0, -2)
        d_out = thin_product(dy, US.T.to(dy.dtype)).to(R.dtype)  # [tokens, r], of R h
        d_in = (d_out @ R).to(dy.dtype)  # of h
        dx = (dy @ W).addmm_(d_in, Vt.to(dy.dtype)).view(*shape, -1) if needs[0] else None
        dW = dy.T @ x.flatten(0, -2) if needs[1] else None
        dUS = ((h.to(R.dtype) @ R.mT).to(dy.dtype).T @ dy).T.to(US.dtype) if needs[2] else None
        dVt = (d_in.T @ x.flatten(0, -2)).to(Vt.dtype) if needs[3] else None
        dR = d_out.T @ h.to(R.dtype) if needs[4] else None
        return dx, dW, dUS, dVt, dR


class Adapter(nn.Module):
    """The trained numbers, in fp32: v [groups, u] over fixed P [N, u, r, r] and the group of each of the N adapted
    linears; for LoRA A [r, n] and B [m, r] of each. `meta` holds the settings that rebuild all of it, and `base`, the
    fingerprint of the model."""

    def __init__(self, meta, P=None, groups=None, A=(), B=()):
        super().__init__()
        if meta["method"] == "lora":
            self.A, self.B = nn.ParameterList(A), nn.ParameterList(B)
            scale = torch.eye(meta["rank"], device=A[0].device) * (meta["alpha"] / meta["rank"])
            self.register_buffer("scale", scale.expand(len(A), -1, -1), persistent=False)  # stands where R stands
        else:
            self.v = nn.Parameter(torch.zeros(int(groups.max()) + 1, P.shape[1], device=P.device))  # v = 0: W' = W
            self.register_buffer("P", P, persistent=False)
            self.register_buffer("groups", groups, persistent=False)
        self.meta = meta
        self.linears = []  # that it adapts; in a list, nn.Module takes no notice: their weights are not the adapter's
        self.R = None
        self.rows = None  # [N, B, r, r] from load_adapters: every row of a batch its own R; None: all the one of v
        self.enabled = True
        self.frozen = False  # refresh leaves R as it is: sampling_form has taken it, for as long as v stands still

    def refresh(self, *_):
        """Set all R [N, r, r]; runs before every forward pass, so an update of v is never missed."""
        if self.frozen:
            return
        if self.rows is not None:
            self.R = self.rows
        else:
            self.R = self.scale if self.meta["method"] == "lora" else mix(self.v, self.groups, self.P)
        if not self.enabled:
            self.R = torch.zeros_like(self.R)
        for linear, R in zip(self.linears, self.R):  # each has its own at hand: layers that torch.compile makes alike
            linear.R = R


def mix(v, groups, P):
    """R [N, r, r] = sum_i v_i P_i of every linear."""
    return torch.einsum("nu,nuij->nij", F.embedding(groups, v), P)  # v[groups], with a gradient the same every time


def add_adapter(model, method="tinylora", rank=2, u=13, n_tie=0, tie="tiled", seed=0, targets="all", alpha=32.0):
    """Attach an adapter that changes nothing yet to a frozen model; returns the Adapter.

    method: 'tinylora'; 'lora_xs' (R itself is trained: u = rank^2, P_i = matrix units, no tying); 'lora' (B A).
    rank: r of the frozen SVD (paper: 2), or of A and B. u: numbers per group.
    n_tie, tie: 'tiled' shares v among n_tie consecutive linears of the flat list (layer by layer, q k v o gate up
        down); 'structured' among n_tie layers' linears of the same type; n_tie = 0: one group for all (section 4).
    targets: 'all', 'attention', 'mlp', or linears such as 'q_proj,v_proj'. Parts separated by '/' are tied each on
        its own: 'attention/mlp' with n_tie = 0 has one vector for the attention and one for the MLPs.
    seed: of P, or of A. They depend on the seed and the module's name alone.
    alpha: lora only; its update is scaled by alpha / rank, which makes the best lr nearly independent of the rank.
    Raises UserError, with the model as it was, for settings that do not fit.
    """
    if model.adapter:
        raise UserError("this model has an adapter already")
    modules, groups, meta = plan(model, dict(method=method, rank=rank, u=u, n_tie=n_tie, tie=tie, seed=seed,
                                             targets=targets, alpha=float(alpha)))
    size = u * rank * rank * len(modules)
    if method == "tinylora" and size > 10**9:
        raise UserError(f"u = {u} takes P_i of {size:,} numbers in {len(modules)} linears, too many; use fewer")
    meta["base"] = fingerprint(model)
    if method == "lora":
        factors = lora_init(modules, rank, seed, model.device)
        adapter = Adapter(meta, A=[A for _, A in factors], B=[B for B, _ in factors])
        factors = list(zip(adapter.B, adapter.A))
    else:
        factors = svd_factors({name: linear.weight for name, linear in modules.items()}, rank, model.device)
        adapter = Adapter(meta, projections(meta, modules, model.device), torch.tensor(groups).to(model.device))
        factors = [(US.to(model.dtype), Vt.to(model.dtype)) for US, Vt in factors]
    for index, (linear, (US, Vt)) in enumerate(zip(modules.values(), factors)):
        AdaptedLinear.adapt(linear, index, US, Vt)
    adapter.linears = list(modules.values())
    object.__setattr__(model, "adapter", adapter)  # not a submodule, see AdaptedLinear.adapt
    adapter.hook = model.model.register_forward_pre_hook(adapter.refresh)
    return adapter


def plan(model, settings):
    """What add_adapter is going to do: the adapted linears {name: module} in forward order, the group of each, and
    the settings that the method reads. Cheap, and raises UserError for all that can be wrong with settings."""
    method, rank = settings["method"], settings["rank"]
    if method not in SETTINGS:
        raise UserError(f"method '{method}' is unknown; {', '.join(SETTINGS)} are known")
    meta = {"method": method} | {key: settings[key] for key in SETTINGS[method]}
    parts = parse_targets(meta["targets"])
    chosen = [name for part in parts for name in part]
    modules = {name: m for name, m in adapted_linears(model).items() if name.split(".")[-1] in chosen}
    limit = min((max if method == "lora" else min)(m.weight.shape) for m in modules.values())
    if not 1 <= rank <= limit:
        raise UserError(f"rank must be 1 to {limit} here, got {rank}")
    if method == "lora" and not 0 < meta["alpha"] < math.inf:
        raise UserError(f"alpha must be above 0, got {meta['alpha']}")
    if method == "tinylora" and meta["u"] < 1:
        raise UserError(f"u must be at least 1, got {meta['u']}")
    n_tie, tie = (meta["n_tie"], meta["tie"]) if method == "tinylora" else (1, "tiled")
    groups, count = {}, 0
    for part in parts:
        names = [name for name in modules if name.split(".")[-1] in part]
        of_part = tying_groups(len(names), n_tie, tie, types=len(part))
        groups |= {name: count + group for name, group in zip(names, of_part)}
        count += max(of_part) + 1
    return modules, [groups[name] for name in modules], meta


def adapted_linears(model):
    """The flat list of all linears in forward order, {name: module}."""
    parts = {name: "self_attn" if name in LINEARS[:4] else "mlp" for name in LINEARS}
    return {f"model.layers.{i}.{part}.{name}": getattr(getattr(block, part), name)
            for i, block in enumerate(model.model.layers) for name, part in parts.items()}


def parse_targets(text):
    """'attention/up_proj,down_proj' -> [(q_proj, k_proj, v_proj, o_proj), (up_proj, down_proj)]."""
    parts = [[name for word in part.split(",") for name in TARGETS.get(word.strip(), (word.strip(),))]
             for part in text.split("/")]
    names = [name for part in parts for name in part]
    if set(names) - set(LINEARS) or len(set(names)) < len(names):
        raise UserError(f"targets must name {', '.join(TARGETS)} or some of {', '.join(LINEARS)}, each once, separated "
                        f"by commas (one group) or slashes (separate vectors); got '{text}'")
    return [tuple(name for name in LINEARS if name in part) for part in parts]


def tying_groups(N, n_tie, tie="tiled", types=7):
    """The group of each of N linears in the flat list, `types` of them in a layer (paper section 4)."""
    if n_tie < 0 or tie not in ("tiled", "structured"):
        raise UserError(f"n_tie must be 0 (one group) or more and tie tiled or structured; got {n_tie}, '{tie}'")
    if n_tie == 0:
        return [0] * N
    if tie == "tiled":
        return [i // n_tie for i in range(N)]
    return [i // types // n_tie * types + i % types for i in range(N)]


def random_state(seed, name):
    """numpy's RandomState, whose stream is frozen for good (NEP 19), seeded by a hash of (seed, name): the same
    numbers on every machine, in any order of modules."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))


def random_projection(seed, name, u, rank):
    """P [u, r, r] ~ N(0, 1/r), another in every module: with one P for all, a tied model would have r^2 = 4 effective
    numbers, whatever u is."""
    return torch.from_numpy(random_state(seed, name).standard_normal((u, rank, rank)) / math.sqrt(rank)).float()


def projections(meta, names, device="cpu"):
    """P [N, u, r, r] of the settings: random, or for lora_xs the matrix units."""
    rank = meta["rank"]
    if meta["method"] == "lora_xs":
        return torch.eye(rank * rank, device=device).view(-1, rank, rank).expand(len(names), -1, -1, -1)
    return torch.stack([random_projection(meta["seed"], name, meta["u"], rank) for name in names]).to(device)


def lora_init(modules, rank, seed, device):
    """[(B, A)]: A [r, n] ~ U(-1/sqrt(n), 1/sqrt(n)), B [m, r] = 0 (LoRA Without Regret; the same as PEFT's)."""
    out = []
    for name, linear in modules.items():
        m, n = linear.weight.shape
        A = torch.from_numpy(random_state(seed, name).uniform(-1, 1, (rank, n)) / math.sqrt(n)).float()
        out.append((torch.zeros(m, rank, device=device), A.to(device)))
    return out


def learning_rate_rule(config, method, steps):
    """A first learning rate for 'full' or 'lora' (LoRA Without Regret; the constants are tinker-cookbook's, fitted to
    supervised runs of 14 Llama and Qwen models): 5e-5 (2000 / hidden)^p for all weights, p = 0.781 for Llama and
    0.0775 for Qwen; LoRA of any rank at alpha = 32 wants 10 times as much, and 15 times in runs of under 100 steps.
    The factors hold for RL, too; the base rate does not: its authors' RL recipes use 2e-5 to 8e-5 for LoRA.
    """
    power = {"llama": 0.781, "qwen2": 0.0775}[config.raw["model_type"]]
    return 5e-5 * (2000 / config.hidden_size) ** power * (1 if method == "full" else 10 if steps >= 100 else 15)


@torch.no_grad()
def merge(model):
    """Fold the adapter into the weights, in fp32 with one rounding, and remove it. For export only."""
    adapter = model.adapter
    adapter.refresh()
    for linear in adapter.linears:
        linear.weight.copy_(linear.merged())
    return detach(model)


def detach(model):
    """Remove the adapter: the model is again as it was loaded."""
    for linear in model.adapter.linears:
        linear.__class__ = nn.Linear
        del linear.index, linear.US, linear.Vt, linear.R
    model.adapter.hook.remove()
    object.__setattr__(model, "adapter", None)
    return model


def fingerprint(model):
    """32 hex digits that tell base models apart and do not depend on the dtype the weights are held in (a hash of the
    bits would): eight random projections a^T W b, each summed over all linears of unit norm, about N(0, 1). Rounding to
    bf16 moves them by some 0.001; a fine-tuning by its share in the weights, 0.01 for one per cent: safely refused."""
    sums = 0
    for name, linear in adapted_linears(model).items():
        (m, n), state = linear.weight.shape, random_state("fingerprint", name)
        a, b = (torch.from_numpy(state.standard_normal((size, 8))).float().to(model.device) for size in (m, n))
        W = linear.weight.detach().to(model.device).float()
        sums = sums + (a * (W @ b)).sum(0) / W.norm().clamp(min=1e-30)
    return (sums / math.sqrt(7 * len(model.model.layers))).cpu().numpy().astype(">f2").tobytes().hex()


def same_base(a, b, tol=0.004):
    """Whether two fingerprints are of the same model; anything else is none's."""
    if not all(re.fullmatch("[0-9a-f]{32}", str(x)) for x in (a, b)):
        return False
    a, b = (np.frombuffer(bytes.fromhex(x), dtype=">f2").astype(float) for x in (a, b))
    return bool(np.sqrt(np.mean((a - b) ** 2)) <= tol)


# ---------------------------------------------------------------------------------------- files, text, many at once


def save_adapter(adapter, path, dtype="float32"):
    """Write the trained numbers and the settings that rebuild the rest: 13 numbers and a line of JSON, as safetensors.
    dtype: of the numbers in the file, float32, bfloat16 or float16. Of the ranks of a Shard all call this."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    tensors = {name: full_tensor(p.to(DTYPES[dtype])) for name, p in adapter.named_parameters()}
    if not is_chief():
        return
    meta = {"format": FORMAT, "settings": json.dumps(adapter.meta | {"dtype": dtype})}
    with whole_file(path) as aside:
        safetensors.torch.save_file(tensors, aside, metadata=meta)


def adapter_text(adapter, dtype="float32"):
    """The adapter as one line, hex:NUMBERS:SETTINGS, to be sent in a message; --adapter takes it. The numbers are
    big-endian, v [groups, u] row by row: two bytes each in bfloat16 or float16, four in float32."""
    raw = adapter.v.detach().to(DTYPES[dtype]).cpu().contiguous().view(torch.uint8).numpy()
    numbers = raw.reshape(-1, DTYPES[dtype].itemsize)[:, ::-1].tobytes().hex()
    settings = ":".join(f"{key}={value}" for key, value in (adapter.meta | {"dtype": dtype}).items())
    return f"hex:{numbers}:{FORMAT}:{settings.replace(',', '+').replace(' ', '')}"


def read_adapter(where):
    """Settings and tensors of an adapter file, the directory of one, or text. Numbers alone, 'hex:3c23d70a', are
    float32 and stand for one vector over all linears with add_adapter's defaults and no check of the base model."""
    tensors, alone = None, False
    if where.startswith("hex:"):
        _, numbers, *rest = "".join(where.split()).split(":")  # a mail program may have broken the line
        alone, u = not rest, len(numbers) // 8
        if alone:
            print0_once(f"an adapter of {u} numbers alone: read with rank 2 and seed 0, for any base model")
            rest = [FORMAT, "method=tinylora", "rank=2", f"u={u}", "n_tie=0", "tie=tiled", "seed=0", "targets=all",
                    "base=", "dtype=float32"]
        where = f"the adapter '{where[:20]}...'"
        try:
            form, pairs = rest[0], [pair.partition("=") for pair in rest[1:]]
            settings = {key: KINDS.get(key, str)(value.replace("+", ",")) for key, _, value in pairs}
            data = bytes.fromhex(numbers)
        except ValueError:
            raise UserError(f"{where} is mistyped or cut off: its numbers or settings cannot be read") from None
    else:
        if os.path.isfile(os.path.join(where, "model", "config.json")):
            raise UserError(f"{where} is a run that trained all weights: use --model={where}/model, and no adapter")
        where = os.path.join(where, "adapter.safetensors") if os.path.isdir(where) else where
        try:
            with safe_open(where, framework="pt") as f:
                info, tensors = f.metadata() or {}, {name: f.get_tensor(name) for name in f.keys()}
            form = info.get("format")
            settings = json.loads(info.get("settings", "{}"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"no adapter can be read from '{where}': {error}") from None
        except (ValueError, RecursionError):
            raise UserError(f"{where}: the settings in its metadata cannot be read") from None
    if form != FORMAT:
        raise UserError(f"{where}: format {str(form)[:40]!r}, this version reads {FORMAT!r}")
    method = settings.get("method") if isinstance(settings, dict) else None
    wanted = {"method", "base", "dtype", *SETTINGS.get(method if isinstance(method, str) else None, ())}
    if method not in list(SETTINGS) or set(settings) != wanted or any(
            type(settings[key]) is not KINDS[key] for key in wanted) or settings["dtype"] not in DTYPES or not (
            alone or re.fullmatch("[0-9a-f]{32}", settings["base"])):
        raise UserError(f"{where}: its settings are not those of an adapter")
    dtype = DTYPES[settings["dtype"]]
    if tensors is None:
        size = dtype.itemsize
        if not data or len(data) % size or method == "lora":
            raise UserError(f"{where} is mistyped or cut off: {len(data)} bytes are not whole {settings['dtype']} "
                            "numbers of a vector")
        swapped = np.frombuffer(data, dtype=np.uint8).reshape(-1, size)[:, ::-1].copy()
        tensors = {"v": torch.from_numpy(swapped).view(dtype).flatten()}
    if any(t.dtype != dtype or not torch.isfinite(t).all() for t in tensors.values()):
        raise UserError(f"{where}: its numbers are not finite numbers in {settings['dtype']}")
    return where, settings, {name: t.float() for name, t in tensors.items()}


def read_for(model, where):
    """read_adapter, checked against the model: what plan returns, and the tensors in their shapes."""
    where, settings, tensors = read_adapter(where)
    base, _ = settings.pop("base"), settings.pop("dtype")
    modules, groups, meta = plan(model, settings)
    here = model.adapter.meta["base"] if model.adapter else fingerprint(model)
    if base and not same_base(base, here):
        raise UserError(f"{where} was trained on another base model: the fingerprint of this one's weights differs")
    rank, shapes = meta["rank"], {}
    if meta["method"] == "lora":
        for i, linear in enumerate(modules.values()):
            shapes |= {f"A.{i}": (rank, linear.weight.shape[1]), f"B.{i}": (linear.weight.shape[0], rank)}
    else:
        shapes["v"] = (max(groups) + 1, meta.get("u", rank * rank))
        if "v" in tensors and tensors["v"].numel() == math.prod(shapes["v"]):  # a text has them in one row
            tensors["v"] = tensors["v"].view(shapes["v"])
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found != shapes:
        name = min(set(found.items()) ^ set(shapes.items()))[0]
        raise UserError(f"{where}: {name} has shape {found.get(name)}, its settings and this model say "
                        f"{shapes.get(name)}")
    return modules, groups, meta, tensors


def load_adapter(model, where):
    """Attach the adapter of a file, of the out_dir of a run, or of a text to its base model; another base is refused.
    Raises UserError, with the model as it was, for what cannot be read or does not fit."""
    _, _, meta, tensors = read_for(model, where)
    adapter = add_adapter(model, **meta)
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            p.copy_(tensors[name])
    return adapter


def load_adapted(path, where="", dtype=None, device=None, shard=1):
    """The model of load_model with the adapter of load_adapter, if one is named; of a shard this rank's part."""
    net = load_model(path, dtype, device, shard)
    if where:
        load_adapter(net, where)
    if shard > 1:
        shard_model(net, shard)
    return net


def load_adapters(model, adapters):
    """R [N, K, r, r] in fp32 of K adapters over the same linears with the same rank, for sample.generate: files,
    directories, texts, or "" for none. They may differ in u, tying and seed. The factors of the SVD are shared: those
    of the model's adapter, or of the first of these, which is then attached; where one is refused, nothing is.
    """
    if not any(adapters):
        raise UserError("of several adapters at least one must be given")
    out, cache, attached = [None] * len(adapters), {}, None
    try:
        for k, where in enumerate(adapters):
            if where:
                modules, groups, meta, tensors = read_for(model, where)
                if meta["method"] == "lora":
                    raise UserError(f"{where[:80]}: a LoRA has its own factors and cannot share a batch; load it alone")
                key = json.dumps(meta, sort_keys=True)
                if key not in cache:
                    cache[key] = projections(meta, modules)
                if not model.adapter:
                    attached = load_adapter(model, where)
                shared = model.adapter.meta
                if shared["method"] == "lora" or meta["rank"] != shared["rank"] or (
                        model.adapter.linears != list(modules.values())):
                    raise UserError(f"{where[:80]}: rank and targets must be the same for all adapters of a batch")
                out[k] = mix(tensors["v"], torch.tensor(groups), cache[key])
    except UserError:
        if attached:
            detach(model)
        raise
    none = torch.zeros_like(next(R for R in out if R is not None))
    return torch.stack([none if R is None else R for R in out], dim=1).to(model.device)


def attach(net, cfg):
    if cfg.lr == 0:
        cfg.lr = learning_rate_rule(net.config, cfg.method, cfg.max_steps)
    if cfg.method == "full":
        identity = {"method": "full", "base": fingerprint(net)}
    else:
        adapter = add_adapter(net, cfg.method, cfg.rank, cfg.u, cfg.n_tie, cfg.tie, cfg.seed, cfg.targets, cfg.alpha)
        identity = adapter.meta
    if cfg.shard > 1:
        shard_model(net, cfg.shard)
    if cfg.method == "full":
        return dict(net.requires_grad_(True).named_parameters()), identity
    return dict(adapter.named_parameters()), identity


def save(net, cfg, best=False):
    if cfg.method == "full":
        from support.checkpoint import save_model
        save_model(net, os.path.join(cfg.out_dir, "best" if best else "model"), cfg.model)
    else:
        save_adapter(net.adapter, os.path.join(cfg.out_dir, "best.safetensors" if best else "adapter.safetensors"), cfg.save_dtype)
