"""Adapters and models to and from other programs:

    python export.py --model=DIR --adapter=out/toy --to=peft --out_dir=DIR2  # a LoRA: PEFT, vLLM
    python export.py --model=DIR --adapter=out/toy --to=hf --out_dir=DIR2  # a merged checkpoint
    python export.py --model=DIR --source=PEFT_LORA --out_dir=DIR2  # a PEFT LoRA as an adapter
"""

import json
import math
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

import tinylora
from configurator import configure
from model import load_model, save_model
from support import UserError, foreign_file, read_json, whole_file
from support.checkpoint import DTYPES


@dataclass
class Settings:
    model: str = "toy/base"  # checkpoint directory or hub name: the base model of the adapter
    adapter: str = ""  # to export: adapter file, the out_dir of a run, or text (hex:...)
    to: Literal["peft", "hf"] = "peft"  # a LoRA for PEFT and vLLM, or the merged model
    source: str = ""  # to import: directory of a PEFT LoRA
    out_dir: str = ""  # where to write: a new or empty directory
    device: str = "auto"  # computes the SVD: auto, cpu, cuda, cuda:1 ...


PEFT_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
UNSUPPORTED = (
    "use_dora rank_pattern alpha_pattern layers_to_transform modules_to_save lora_bias "
    "layer_replication trainable_token_indices target_parameters alora_invocation_tokens "
    "use_qalora use_bdlora arrow_config kasa_config monteclora_config").split()
CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # values of init_lora_weights


def main():
    cfg = configure(Settings)
    if bool(cfg.adapter) == bool(cfg.source) or cfg.source and cfg.to != "peft":
        raise UserError("give --adapter=... to export an adapter, or --source=... without --to to "
                        "import one")
    with new_directory(cfg.out_dir) as aside:
        net = load_model(cfg.model, "float32", cfg.device)
        if cfg.source:
            adapter = import_peft(net, cfg.source)
            tinylora.save_adapter(adapter, os.path.join(aside, "adapter.safetensors"))
        else:
            tinylora.load_adapter(net, cfg.adapter)
            export = export_merged if cfg.to == "hf" else export_peft
            export(net, aside, cfg.model)
    print(f"written to {cfg.out_dir}")


@contextmanager
def new_directory(path):
    """A directory that gets its name when all of it is written. One that holds files is refused."""
    if not path or os.path.isfile(path) or os.path.isdir(path) and os.listdir(path):
        raise UserError(f"out_dir must name a new or empty directory, not '{path}'")
    path = os.path.realpath(path)  # the target of a link
    aside = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(aside)
    except OSError as error:
        raise UserError(f"out_dir '{path}' cannot be written: {error}") from None
    try:
        yield aside
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@torch.no_grad()
def export_merged(model, path, source):
    """Write a float32 model with its adapter merged, in the dtype of its checkpoint `source`. In 16
    bits this prints the share of the update D that the rounded change D' of the weights keeps: its
    projection on D, sum(D' D) / sum(D D)."""
    name = model.config.raw.get("dtype") or model.config.raw.get("torch_dtype")
    dtype = DTYPES.get(name, torch.float32)
    kept = wanted = 0.0
    model.adapter.refresh()
    for linear in model.adapter.linears.values():
        merged = linear.merged()
        change = (merged - linear.weight).double()
        kept += (change * (merged.to(dtype).float() - linear.weight)).sum().item()
        wanted += change.square().sum().item()
    share = kept / wanted if wanted else 1.0
    if dtype.itemsize == 2:
        print(f"{share:.1%} of the update is left after rounding the merged weights to {name}")
    if share < 0.95:
        print("warning: the merged model is not the one that was trained; use --to=peft instead")
    save_model(tinylora.merge(model).to(dtype), path, tokenizer_from=source)


@torch.no_grad()
def export_peft(model, path, base=""):
    """Write the model's adapter to a directory that PEFT and vLLM load, in float32: as a LoRA with
    B = U S R and A = V^T. base: the base model's name."""
    adapter = model.adapter
    adapter.refresh()
    tensors = {}
    for name, linear in adapter.linears.items():
        A = linear.Vt.float().contiguous().clone()  # it may share its memory with other linears'
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.cpu()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (linear.US.float() @ linear.R).cpu()
    rank = adapter.meta["rank"]
    targets = sorted({name.rpartition(".")[2] for name in adapter.linears})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
              "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none",
              "target_modules": targets, "inference_mode": True}
    os.makedirs(path, exist_ok=True)
    with whole_file(os.path.join(path, "adapter_model.safetensors")) as file:
        save_file(tensors, file, {"format": "pt"})
    with whole_file(os.path.join(path, "adapter_config.json")) as file, open(file, "w") as f:
        json.dump(config, f, indent=2)


def import_peft(model, path):
    """Attach the PEFT LoRA in directory `path` to its base model, as method 'lora'. Returns the
    Adapter. Raises UserError for a LoRA that this project cannot express."""
    with foreign_file(path):
        settings, factors = read_peft(path)
        adapter = tinylora.Adapter(model, settings)
    index = {name: i for i, name in enumerate(adapter.linears)}
    tensors = {f"{part}.{index.get(name, name)}": t for (name, part), t in factors.items()}
    tinylora.set_numbers(adapter, tensors, path)
    adapter.meta["base"] = tinylora.fingerprint(model)
    return tinylora.install(model, adapter)


def read_peft(path):
    """The settings of the Adapter, and {(linear, "A" or "B"): tensor}, of a PEFT LoRA."""
    config = read_json(os.path.join(path, "adapter_config.json"))
    file = os.path.join(path, "adapter_model.safetensors")
    unsupported = [key for key in UNSUPPORTED if config.get(key)]
    initialisation = str(config.get("init_lora_weights")).lower()
    for holds, message in [
        (os.path.exists(file), f"{file} is missing; an adapter_model.bin is a pickle and not read"),
        (config.get("peft_type") == "LORA", "only a PEFT adapter of type LORA can be read"),
        (not unsupported, f"{', '.join(unsupported)} is not supported"),
        (not initialisation.startswith(CHANGES_BASE),
         f"init_lora_weights = {initialisation} changes the base model and is not supported"),
    ]:
        if not holds:
            raise UserError(f"{path}: {message}")
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    if config.get("use_rslora"):
        alpha *= math.sqrt(rank)  # rank-stabilised: the update is scaled by alpha / sqrt(r)
    factors = {}
    for name, t in load_file(file).items():
        match = PEFT_NAME.fullmatch(name)
        if not match:
            raise UserError(f"{file}: {name} is neither the A nor the B of a linear")
        factors[match.groups()] = t.float()
    targets = [kind for kind in tinylora.LINEARS if any(name.endswith(kind) for name, _ in factors)]
    return dict(method="lora", rank=rank, alpha=alpha, targets=",".join(targets), seed=0), factors


if __name__ == "__main__":
    main()
