"""Reading adapters that others made: a file, or a text that came in a message. What they hold is
read as data and checked; what it means to a model is tinylora.py's business."""

import json
import os
import re

import numpy as np
import torch
from safetensors import safe_open

from support import UserError, foreign_file
from support.checkpoint import DTYPES
from support.parallel import print0_once

FORMAT = "tinylora-2"
ANY_BASE = "any"  # in the place of a fingerprint: fits every base model
KINDS = {"method": str, "rank": int, "u": int, "n_tie": int, "tie": str, "seed": int,
         "targets": str, "alpha": float, "base": str, "dtype": str}


def read_adapter(where):
    """A name for messages, the settings, and the tensors in float32 of an adapter: a file, a
    directory that holds adapter.safetensors, or a text. UserError if it cannot be read."""
    if where.startswith("hex:"):
        name = f"the adapter '{where[:20]}...'"
        try:
            form, settings, tensors = read_text("".join(where.split()))  # mail may break lines
        except (ValueError, KeyError):
            raise UserError(f"{name} is mistyped or cut off; copy it again") from None
    else:
        if os.path.isfile(os.path.join(where, "model", "config.json")):
            raise UserError(f"{where} is a run that trained all weights: use --model={where}/model")
        name = os.path.join(where, "adapter.safetensors") if os.path.isdir(where) else where
        with foreign_file(name), safe_open(name, framework="pt") as f:
            info = f.metadata() or {}
            form, settings = info.get("format"), json.loads(info.get("settings", "{}"))
            tensors = {key: f.get_tensor(key).float() for key in f.keys()}
    if form != FORMAT:
        raise UserError(f"{name} has format {str(form)[:40]!r}, but this version reads {FORMAT!r}")
    with foreign_file(name):
        for key, value in settings.items():
            if key in KINDS and type(value) is not KINDS[key]:
                raise UserError(f"{name}: its setting {key} must be {KINDS[key].__name__}")
    if settings.get("u", 0) > sum(t.numel() for t in tensors.values()):  # before P is made
        raise UserError(f"{name} holds fewer numbers than its setting u says")
    return name, settings, tensors


def read_text(text):
    """The format, the settings, and {"v": all numbers in one row} of a text by adapter_text.
    Numbers alone, 'hex:3c23d70a', are float32, and one v of all linears for any base model."""
    _, numbers, *rest = text.split(":")
    if not rest:
        u = len(numbers) // 8
        print0_once(f"note: {u} numbers alone are read with rank 2 and seed 0, for any base model")
        rest = [FORMAT, "method=tinylora", "rank=2", f"u={u}", "n_tie=0", "tie=tiled", "seed=0",
                "targets=all", f"base={ANY_BASE}", "dtype=float32"]
    pairs = dict(pair.split("=", 1) for pair in rest[1:])
    settings = {key: KINDS[key](value.replace("+", ",")) for key, value in pairs.items()}
    reverse = bytearray.fromhex(numbers)[::-1]  # so the big-endian numbers are little-endian
    v = torch.frombuffer(reverse, dtype=DTYPES[settings["dtype"]]).flip(0)
    return rest[0], settings, {"v": v.float()}


def same_base(a, b):
    """Are these fingerprints (tinylora.fingerprint) of one base model, in whatever dtype?"""
    if not all(re.fullmatch("[0-9a-f]{32}", str(x)) for x in (a, b)):
        return False
    a, b = (np.frombuffer(bytes.fromhex(x), dtype=">f2").astype(float) for x in (a, b))
    return bool(np.sqrt(np.mean((a - b) ** 2)) <= 0.004)
