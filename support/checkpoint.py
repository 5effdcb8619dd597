"""The files of a checkpoint directory: downloading, reading and checking weights, writing them."""

import json
import os
import re
import shutil
from glob import glob

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support import UserError, foreign_file, read_json, whole_file
from support.parallel import full_tensor, is_chief

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                   "generation_config.json", "special_tokens_map.json")


def checkpoint_dir(path):
    """A local directory as it is. A hub name, as Qwen/Qwen2.5-7B-Instruct, is downloaded once."""
    if os.path.isdir(path):
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        raise UserError(f"no model directory at '{path}' (a hub name has the form owner/name)")
    import huggingface_hub  # only here: a local directory must not need it

    try:
        return huggingface_hub.snapshot_download(
            path, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
    except Exception as error:  # the hub client raises many kinds, and all mean the same here
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"'{path}' is no local directory and could not be downloaded ({reason}); "
                        "copy the checkpoint here and give its directory") from None


def read_weights(path, model, device, dtype):
    """{name: tensor} of all weight files, each checked against the model's shapes."""
    shapes = {name: list(p.shape) for name, p in model.state_dict().items()}
    embedding = "model.embed_tokens.weight"
    shapes.setdefault("lm_head.weight", shapes[embedding])  # tied files may hold a second copy
    tensors = {}
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():
                    if not name.endswith("rotary_emb.inv_freq"):  # old Llama 2 files store it
                        tensor = check_tensor(file, name, f.get_tensor(name), shapes)
                        tensors[name] = tensor.to(device, dtype)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is missing, damaged or a git-lfs pointer ({error}); download "
                            "it again (a .bin file is a pickle and never read)") from None
    if model.config.tie_word_embeddings and "lm_head.weight" in tensors:
        copy = tensors.pop("lm_head.weight")
        if not torch.equal(copy, tensors.get(embedding, copy)):
            raise UserError(f"{path}: config.json ties the embeddings, but lm_head.weight is not a "
                            f"copy of {embedding}")
    if missing := [name for name in model.state_dict() if name not in tensors]:
        raise UserError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}; "
                        "download it again, or use the config.json that belongs to these weights")
    return tensors


def weight_files(path):
    """model.safetensors, or the files in the index. They lie in the directory, whatever it says."""
    index = os.path.join(path, INDEX)
    names = {"model.safetensors"}
    if os.path.exists(index):
        with foreign_file(index):
            names = set(map(os.path.basename, read_json(index)["weight_map"].values()))
    return [os.path.join(path, name) for name in sorted(names)]


def check_tensor(file, name, tensor, shapes):
    wanted = shapes.get(name, "no such tensor")
    if list(tensor.shape) != wanted:
        raise UserError(f"{file}: {name} has shape {list(tensor.shape)}, and config.json asks for "
                        f"{wanted}; use the config.json that belongs to these weights")
    if tensor.dtype not in DTYPES.values():
        raise UserError(f"{file}: {name} is {tensor.dtype}; only {', '.join(DTYPES)} can be read")
    # The sum is quick and finite if all numbers are; it may also overflow.
    if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise UserError(f"{file}: {name} holds NaN or infinity; download it again")
    return tensor


def save_model(model, path, tokenizer_from=None):
    """Write a directory that transformers loads: config.json and model.safetensors.

    tokenizer_from: a checkpoint directory or hub name whose tokenizer files are copied along.
    If the weights are spread over processes, all of them must call this; one of them writes.
    """
    tensors = {name: full_tensor(p) for name, p in model.state_dict(keep_vars=True).items()}
    if not is_chief():
        return
    os.makedirs(path, exist_ok=True)
    with whole_file(os.path.join(path, "model.safetensors")) as aside:
        save_file(tensors, aside, {"format": "pt"})
    raw = model.config.raw
    key = "dtype" if "dtype" in raw else "torch_dtype"  # as older files and libraries call it
    with whole_file(os.path.join(path, "config.json")) as aside, open(aside, "w") as f:
        json.dump(raw | {key: str(model.dtype)[6:]}, f, indent=2)
    for name in glob("model*-of-*.safetensors", root_dir=path) + glob(INDEX, root_dir=path):
        os.remove(os.path.join(path, name))  # of an earlier checkpoint: it would be read instead
    source = checkpoint_dir(tokenizer_from) if tokenizer_from else path
    for name in TOKENIZER_FILES:
        file = os.path.join(source, name)
        if os.path.exists(file) and os.path.abspath(source) != os.path.abspath(path):
            shutil.copy(file, path)
