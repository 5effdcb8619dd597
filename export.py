"""Adapters and models to and from other programs:

    python export.py --model=DIR --adapter=out/toy --to=peft --out_dir=DIR       # a LoRA for PEFT and vLLM
    python export.py --model=DIR --adapter=hex:3c23d70a --to=hf --out_dir=DIR    # a merged checkpoint
    python export.py --model=DIR --source=PEFT_LORA_DIR --out_dir=DIR            # a PEFT LoRA as ours
"""

import json
import math
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import safetensors.torch
import torch
from safetensors import SafetensorError

from configurator import configure
from model import DTYPES, load_model, save_model
from support import UserError, read_json
from tinylora import LINEARS, AdaptedLinear, adapted_linears, add_adapter, load_adapter, merge, plan, save_adapter


@dataclass
class Settings:
    model: str = "toy/base"  # checkpoint directory or hub name: the base of the adapter
    adapter: str = ""  # export: adapter file, the out_dir of a run, or text (hex:...)
    to: Literal["peft", "peft-tinylora", "hf"] = "peft"  # export: peft (a LoRA of rank r), peft-tinylora (PEFT's own TinyLoRA), hf (a merged checkpoint)
    source: str = ""  # import: directory of a PEFT LoRA
    out_dir: str = ""  # where to write; must not exist, or be empty
    device: str = "auto"  # of the SVD: auto, cpu, cuda, cuda:1 ...


PEFT_LIMIT = 2**28  # numbers of P in a peft-tinylora file


@contextmanager
def new_directory(path):
    """A directory that has its name only when all of it is written; one that holds files is refused."""
    if not path or os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise UserError(f"out_dir must name a new or empty directory, not '{path}'")
    path = os.path.realpath(path)  # where a link leads: aside and in place are then on one disk
    parent, name = os.path.split(path)
    try:
        os.makedirs(parent, exist_ok=True)
        aside = tempfile.mkdtemp(prefix=f".{name}.", dir=parent)
        os.chmod(aside, 0o755)  # mkdtemp's is for its owner alone
        try:
            yield aside
            os.replace(aside, path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"out_dir '{path}' cannot be written: {error}") from None


@torch.no_grad()
def export_peft(model, path, base="", kind="peft"):
    """Write the model's adapter as a directory that PEFT loads (float32).

    base: the base model's name or directory, for PEFT's config.
    kind: 'peft', a LoRA of rank r (B = U S R, A = V^T; vLLM loads it, too), or 'peft-tinylora', PEFT's own TinyLoRA
        with our factors and projections in the place of its own, which can be trained on. PEFT ties modules evenly or
        not at all, so any other tying becomes one vector of all groups' numbers, with zeros in P for the others'.
    """
    adapter, meta = model.adapter, model.adapter.meta
    adapter.refresh()
    linears = {f"base_model.model.{name}": m for name, m in adapted_linears(model).items()
               if isinstance(m, AdaptedLinear)}
    factors = {name: (m.US.float(), m.Vt.float(), adapter.R[m.index].float()) for name, m in linears.items()}
    config = {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", "r": meta["rank"], "inference_mode": True,
              "target_modules": sorted({name.split(".")[-1] for name in linears}), "bias": "none"}
    if kind == "peft":
        config |= {"peft_type": "LORA", "lora_alpha": meta["rank"], "lora_dropout": 0.0}
        tensors = {f"{name}.lora_A.weight": Vt for name, (_, Vt, _) in factors.items()}
        tensors |= {f"{name}.lora_B.weight": US @ R for name, (US, _, R) in factors.items()}
    elif kind != "peft-tinylora" or meta["method"] == "lora":
        raise UserError(f"a {meta['method']} adapter cannot be written as '{kind}'; peft takes any")
    else:
        groups, N = len(adapter.v), len(linears)
        tied = groups < N
        size = adapter.P.numel() * (groups if tied else 1)
        if size > PEFT_LIMIT:
            raise UserError(f"PEFT has no tying such as n_tie={meta.get('n_tie', 1)}, tie={meta.get('tie', 'tiled')}, "
                            f"targets={meta['targets']}; spelled out it takes {size * 4 / 1e9:.1f} GB: use --to=peft")
        P = adapter.P.new_zeros(N, groups if tied else 1, *adapter.P.shape[1:])
        P[torch.arange(N), adapter.groups if tied else 0] = adapter.P
        v = adapter.v.reshape(1, -1) if tied else adapter.v[adapter.groups]  # [PEFT's groups, PEFT's u]
        config |= {"peft_type": "TINYLORA", "u": v.shape[1], "weight_tying": float(tied), "save_projection": True,
                   "projection_seed": meta.get("seed", 0), "init_weights": True}
        tensors = {f"base_model.tinylora_v.{i}": line for i, line in enumerate(v)}
        for i, (name, (US, Vt, _)) in enumerate(factors.items()):
            tensors |= {f"{name}.tinylora_A": Vt, f"{name}.tinylora_B": US, f"{name}.tinylora_P": P[i].flatten(0, 1)}
    with new_directory(path) as aside:
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        safetensors.torch.save_file(tensors, os.path.join(aside, "adapter_model.safetensors"), {"format": "pt"})
        with open(os.path.join(aside, "adapter_config.json"), "w", encoding="utf-8") as f:
            json.dump(config, f, indent=2)


@torch.no_grad()
def import_peft(model, path):
    """Attach the PEFT LoRA in directory `path` to its base model, as method 'lora'. Returns the Adapter."""
    if not os.path.exists(os.path.join(path, "adapter_config.json")):
        raise UserError(f"{path} holds no PEFT adapter (adapter_config.json)")
    config = read_json(os.path.join(path, "adapter_config.json"))
    file = os.path.join(path, "adapter_model.safetensors")
    config = config if isinstance(config, dict) else {}
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if config.get("peft_type") != "LORA" or type(rank) is not int or not isinstance(alpha, (int, float)) or rank < 1:
        raise UserError(f"{path}: only a PEFT adapter of type LORA can be read")
    if str(config.get("init_lora_weights")).lower().startswith(("pissa", "corda", "olora", "loftq", "lora_ga")):
        raise UserError(f"{path}: init_lora_weights = {config['init_lora_weights']} changes the base model's weights "
                        "and is not supported")
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "layer_replication",
                "trainable_token_indices", "target_parameters", "alora_invocation_tokens"):
        if config.get(key):
            raise UserError(f"{path}: {key} is not supported")
    try:
        tensors = safetensors.torch.load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    pattern = re.compile(r"base_model\.model\.(model\.layers\.\d+\.(?:self_attn|mlp)\.(\w+))\.lora_([AB])\.weight")
    found = {name: pattern.fullmatch(name) for name in tensors}
    odd = [name for name, m in found.items() if m is None or m[2] not in LINEARS]
    if odd or not tensors:
        raise UserError(f"{file}: {odd[0] if odd else 'nothing'} is not the A or B of a linear in a block")
    named = {(m[1], m[3]): tensors[name].float() for name, m in found.items()}
    targets = ",".join(name for name in LINEARS if any(m[2] == name for m in found.values()))
    modules, _, _ = plan(model, dict(method="lora", rank=rank, alpha=float(alpha), seed=0, targets=targets))
    for name, linear in modules.items():
        m, n = linear.weight.shape
        for part, shape in (("A", (rank, n)), ("B", (m, rank))):
            t = named.get((name, part))
            if t is None or tuple(t.shape) != shape or not torch.isfinite(t).all():
                raise UserError(f"{file}: {part} of {name} is missing, not finite or not of shape {list(shape)}")
    if len(named) > 2 * len(modules):
        raise UserError(f"{file} holds layers that this model does not have")
    scale = math.sqrt(rank) if config.get("use_rslora") else 1.0  # rank-stabilised: alpha / sqrt(r)
    adapter = add_adapter(model, "lora", rank, seed=0, targets=targets, alpha=alpha * scale)
    for name, A, B in zip(modules, adapter.A, adapter.B):
        A.copy_(named[name, "A"])
        B.copy_(named[name, "B"])
    return adapter


def main():
    cfg = configure(Settings)
    command = "import" if cfg.source else "export"
    if command == "import" and cfg.to != "peft":
        raise UserError("import writes an adapter of this project; --to is for export")
    given, unread = (cfg.adapter, cfg.source) if command == "export" else (cfg.source, cfg.adapter)
    if not given or unread:
        raise UserError("export needs --adapter=..., import --source=..., and neither takes the other")
    with new_directory(cfg.out_dir) as aside:
        net = load_model(cfg.model, "float32", cfg.device)
        if command == "import":
            save_adapter(import_peft(net, cfg.source), os.path.join(aside, "adapter.safetensors"))
        else:
            load_adapter(net, cfg.adapter)
            if cfg.to == "hf":
                own = net.config.raw.get("dtype") or net.config.raw.get("torch_dtype")
                net = merge(net).to(DTYPES.get(own, torch.float32))  # the one rounding: to the checkpoint's own dtype
                save_model(net, aside, tokenizer_from=cfg.model)
            else:
                export_peft(net, aside, cfg.model, cfg.to)
    print(f"written to {cfg.out_dir}")


if __name__ == "__main__":
    main()
