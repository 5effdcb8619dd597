"""What a Hugging Face checkpoint directory holds, and nothing else: config.json + *.safetensors -> Transformer,
tokenizer.json -> Tokenizer. Qwen2.5 and LLaMA-2/3 are one architecture: RMSNorm, rotary positions, grouped-query
attention, SwiGLU; Qwen adds biases to q, k and v. Parameters carry the checkpoint's own names, so loading is a state
dict and there is no renaming table.
"""

import ctypes
import json
import math
import os
import platform
import re
import shutil
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from support import UserError, foreign_file, read_json, whole_file
from support.parallel import Shard, is_chief, whole, whole_size
from support.tokenizer import Tokenizer, read_optional

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
    raise UserError(f"torch 2.11 or newer is needed, this is {torch.__version__}: pip install -r requirements.txt")

# MKL settles which code a function runs in its first call. Where two threads make that call together, one of them may
# get code that is good to 4 digits (pytorch issue 188792), and a run's first step is not the same every time.
for function in (torch.cos, torch.sin, torch.exp, torch.log, torch.sqrt):
    function(torch.ones(1))

# ------------------------------------------------------------------------------------------------ the architecture


@dataclass
class Config:
    """The part of config.json that the forward pass reads. `raw` is the file, kept for save_model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: dict | None  # Llama-3's frequency bands, or None
    tie_word_embeddings: bool
    qkv_bias: bool
    raw: dict


class Linear(nn.Linear):
    def reset_parameters(self):
        pass  # the numbers come from files, or from init_weights; to draw them here takes seconds, on meta too


class Embedding(nn.Embedding):
    def reset_parameters(self):
        pass


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # computes in fp32 inside


def rotate(x, cos, sin):
    """Rotary position embedding in the checkpoints' half-split layout. x [B, T, H, hd]; cos, sin [B, T, 1, hd], the
    first half of sin negated."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((x2, x1), dim=-1), sin)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        dim, q_dim, kv_dim = (config.hidden_size, config.num_attention_heads * config.head_dim,
                              config.num_key_value_heads * config.head_dim)
        self.q_proj = Linear(dim, q_dim, bias=config.qkv_bias)
        self.k_proj = Linear(dim, kv_dim, bias=config.qkv_bias)
        self.v_proj = Linear(dim, kv_dim, bias=config.qkv_bias)
        self.o_proj = Linear(q_dim, dim, bias=False)

    def project(self, x):  # apart, so that a sampler can put one product in the place of three
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x, cos, sin, cache):
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in self.project(x))
        q = rotate(q, cos, sin).transpose(1, 2)  # [B, heads, T, hd]
        k = rotate(k, cos, sin).transpose(1, 2)  # [B, kv_heads, T, hd]
        v = v.transpose(1, 2)
        if cache is None:
            y = attention(q, k, v)
        else:
            y = cache.attend(self.layer, q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def attention(q, k, v, mask=None):
    """q [B, heads, T, hd], k and v [B, kv_heads, S, hd] -> [B, heads, T, hd]; causal without a mask [T, S] or [B, 1, T,
    S]. On a GPU in 32 bits the one kernel that does not keep all scores [T, S] wants every query head's own keys."""
    gqa = not (q.is_cuda and q.dtype == torch.float32)
    if not gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=gqa)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def project(self, x):
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x):
        gate, up = self.project(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Everything below the lm_head: ids [B, T] -> hidden states [B, T, D].

    Without a cache, attention is causal over right-padded rows: what stands to the right of a token never reaches it,
    so padding needs no mask. With a cache (see sample.py), cache.attend(layer, q, k, v) does the attention and
    `positions` [B, T] says where the tokens stand.
    """

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.config = config
        self.inv_freq = None  # fp32, made on first use: a model built on the meta device has no numbers yet
        self.recompute = False  # in training keep a block's input only, and run the block again in the backward pass
        self.compiled = None  # training's way to run a block, of compile_model

    def forward(self, ids, positions=None, cache=None):
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]  # [1, T]
        if self.inv_freq is None or self.inv_freq.device != ids.device:
            self.inv_freq = rope_frequencies(self.config).to(ids.device)
        angles = positions[:, :, None, None] * self.inv_freq  # [B, T, 1, hd/2], in fp32
        x = self.embed_tokens(ids)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # as rotate() wants them
        for block in self.layers:
            run = partial(self.compiled, block) if self.compiled and cache is None else block
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(run, x, cos, sin, cache, use_reentrant=False)
            else:
                x = run(x, cos, sin, cache)
        return self.norm(x)


class Transformer(nn.Module):
    """A causal language model whose state dict has exactly the names of the checkpoint files."""

    shard = None  # a Shard, where several ranks hold the weights between them
    compile_function = None  # function -> the same compiled, of compile_model

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self):
        """The output matrix [vocab, D]: the embedding itself where the checkpoint ties them."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, ids):
        """ids [B, T] -> logits [B, T, vocab]. For training and sampling use .model and .head: all logits are large."""
        return F.linear(self.model(ids), self.head)

    @property
    def device(self):  # where it computes: before shard_model the weights of a Shard are not there yet
        return self.shard.device if self.shard else self.model.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.shard.dtype if self.shard else self.head.dtype


def compile_model(model, backend="inductor"):
    """Have torch.compile fuse small operations: those of a decode step (sample.Sampler), and those of a block in
    training, unless something stands where a cache stands (grpo.Packed).

    Both serve every number and length of rows: these sizes are symbols in them, which wastes nothing on padding to a
    few. They are compiled anew for a single row, and the block, which serves all layers, also for the first of them
    (whose input wants no gradient where embeddings are frozen) and without gradients: at most six times.
    """
    @cache
    def compiled(function):
        fused = torch.compile(function, backend=backend)

        def run(*inputs):
            try:
                return fused(*inputs)
            except torch._dynamo.exc.ShortenTraceback as error:  # no C++ compiler, or no Triton
                cause = getattr(error, "inner_exception", error)
                reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
                raise UserError(f"torch.compile failed ({reason}); use --compile=False") from None

        return run

    fused_block = compiled(lambda block, *inputs: block(*inputs))

    def run_block(block, x, cos, sin, cache):
        for t, sizes in ((x, (0, 1)), (cos, (1,)), (sin, (1,))):
            torch._dynamo.maybe_mark_dynamic(t, sizes)
        return fused_block(block, x, cos, sin, cache)

    model.compile_function, model.model.compiled = compiled, run_block


def rope_frequencies(config):
    """Inverse frequencies [head_dim / 2]; with Llama-3.1's scaling, long wavelengths are stretched by `factor`."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    inv_freq = 1.0 / config.rope_theta**exponent
    if config.rope_scaling is None:
        return inv_freq
    scaling = config.rope_scaling
    low, high, old_len = (scaling["low_freq_factor"], scaling["high_freq_factor"],
                          scaling["original_max_position_embeddings"])
    wavelen = 2 * math.pi / inv_freq
    smooth = ((old_len / wavelen - low) / (high - low)).clamp(0, 1)  # 0: stretched, 1: left alone, between: blended
    return (1 - smooth) * inv_freq / scaling["factor"] + smooth * inv_freq


def init_weights(model, seed):
    """Fresh random weights: N(0, 0.02), residual projections scaled down by depth as in GPT-2, for pre-training."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(p)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * model.config.num_hidden_layers) if residual else 0.02
            nn.init.normal_(p, 0.0, std, generator=generator)


# --------------------------------------------------------------------------------------- checkpoint directories


LIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def pick_device(device="auto"):
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.empty(1, device=torch.device(device))
        probe.item()  # there is nothing to read on meta
        device = probe.device  # with the number that plain "cuda" lacks, and that set_device wants
        if device.type == "cuda":
            torch.cuda.set_device(device)  # CUDA graphs are recorded on the current device
            # Torch's first choice on Hopper and Blackwell from 2.11 on. It was seen to be wrong with fewer than 8 key
            # heads, to give NaN with masks (pytorch issues 193893, 196678), and to plan anew, 0.4 s, for every shape.
            torch.backends.cuda.enable_cudnn_sdp(False)
        if LIBC and device.type == "cpu":
            # glibc hands freed memory back to the system, and takes it again page by page: a twentieth of the toy's
            # updates. It is to keep it, but for blocks above 32 MB, which would leave holes; free_memory knows.
            LIBC.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
            LIBC.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
    except (RuntimeError, AssertionError):  # NotImplementedError, of meta, is a RuntimeError
        raise UserError(f"device '{device}' is not available here; use --device=auto, cpu or cuda") from None
    return device


def free_memory(device):
    """Bytes that can still be allocated on the GPU, or on the host (where the system does not say: 4 GB)."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    try:
        free, total = host_memory()
        if LIBC and free < total / 2:
            LIBC.malloc_trim(0)  # what it keeps goes back, which costs time: only where memory is short
            free, total = host_memory()
        return free
    except (OSError, KeyError):
        return 4 * 10**9


def host_memory():
    """Bytes of the host's memory that can be had, and all."""
    with open("/proc/meminfo") as f:
        lines = dict(line.split(":") for line in f)
    return [int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal")]


def checkpoint_dir(path):
    """A local directory as it is; a hub name such as Qwen/Qwen2.5-7B-Instruct downloaded once and then read offline."""
    if os.path.isdir(path):
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise UserError(f"no model directory at '{path}' (a hub name has the form owner/name)")
    import huggingface_hub  # only here: a local directory must not need it

    wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]
    try:
        return huggingface_hub.snapshot_download(path, allow_patterns=wanted)
    except Exception as error:  # the hub client raises many kinds; all mean that the model is not to be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"'{path}' is no local directory and could not be downloaded from the hub ({reason}); "
                        "copy the checkpoint here and give its directory") from None


def load_config(path):
    """Read config.json, in the style of published checkpoints or as transformers 5 writes it."""
    file = os.path.join(path, "config.json")
    with foreign_file(file):
        return _parse_config(file)


def _parse_config(file):
    raw = read_json(file)

    def need(condition, message):
        if not condition:
            raise UserError(f"{file}: {message}")

    def positive(value):
        return type(value) in (int, float) and 0 < value < 1e18

    need(isinstance(raw, dict), "is not a JSON object")
    kind = raw.get("model_type")
    need(kind in ("qwen2", "llama"),
         f"model_type {kind!r} is not supported; use a Qwen2.5 or Llama model (qwen2, llama)")
    need(raw.get("hidden_act", "silu") == "silu", f"hidden_act {raw.get('hidden_act')!r} is not supported (silu is)")
    for key in ("use_sliding_window", "mlp_bias", "quantization_config"):
        need(not raw.get(key), f"{key} is not supported; use a checkpoint without it, not quantised")
    need(kind == "qwen2" or not raw.get("attention_bias"), "attention_bias is not supported for llama")
    layer_types = set(raw.get("layer_types") or [])
    need(layer_types <= {"full_attention"}, f"layer_types {sorted(layer_types)} are not supported (full_attention is)")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    need(isinstance(rope, dict), "its rope settings are not a JSON object")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    need(rope_type in ("default", "llama3"),
         f"rope type {rope_type!r} is not supported; use a checkpoint with default or llama3")
    for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        need(rope_type == "default" or positive(rope.get(key)), f"its llama3 rope settings lack {key}")
    need(rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) == 1.0,
         "partial_rotary_factor is not supported")
    for key in ("rms_norm_eps", "rope_theta"):
        value = rope.get(key, raw.get(key, 1.0))
        need(positive(value), f"{key} must be a number above 0, not {value!r}")
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "max_position_embeddings"):
        most = {"num_hidden_layers": 1000, "max_position_embeddings": 2**31}.get(key, 2**20)
        need(raw.get(key) is None or type(raw[key]) is int and 0 < raw[key] <= most,
             f"{key} must be a whole number from 1 to {most}, not {raw.get(key)!r}")
    given = {key: value for key, value in raw.items() if value is not None}
    try:
        kv_heads = given.get("num_key_value_heads", heads := given["num_attention_heads"])
        head_dim = given.get("head_dim", given["hidden_size"] // heads)
        need(heads % kv_heads == head_dim % 2 == 0, "num_key_value_heads must divide the heads, and head_dim be even")
        return Config(
            vocab_size=given["vocab_size"],
            hidden_size=given["hidden_size"],
            intermediate_size=given["intermediate_size"],
            num_hidden_layers=given["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            max_position_embeddings=given.get("max_position_embeddings", 2048 if kind == "llama" else 32768),
            rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
            rope_scaling=rope if rope_type == "llama3" else None,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2",
            raw=raw,
        )
    except KeyError as error:
        raise UserError(f"{file}: key {error} is missing") from None


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(path, dtype=None, device=None, shard=1):
    """Load a checkpoint directory or hub name.

    dtype: torch dtype, its name, or None / 'auto': bfloat16 on a GPU, float32 on a CPU.
    device: torch device, its name, or None / 'auto': the GPU if there is one.
    shard: processes that are to hold one copy of the weights between them. Above 1 all weights stay on the host as
        they are in the files, memory-mapped, which costs nothing, and one after another can be looked at whole (the
        adapters' SVD does) until shard_model cuts them.
    Returns a frozen Transformer. Raises UserError, naming the file and the tensor, for anything that does not fit.
    """
    device = pick_device(device or "auto")  # before anything is downloaded for it
    if dtype in (None, "auto"):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    elif isinstance(dtype, str):
        dtype = DTYPES.get(dtype)
        if dtype is None:
            raise UserError("dtype must be auto, float32, bfloat16 or float16")
    path = checkpoint_dir(path)
    config = load_config(path)
    with torch.device("meta"):  # shapes only: the numbers come from the files, straight to the device
        model = Transformer(config)
    free = free_memory(device)
    if shard > 1:
        model.shard = Shard(shard, config, device, dtype)
        free = model.shard.least(free)
    need = sum(p.numel() / (shard if ".layers." in n else 1) for n, p in model.named_parameters()) * dtype.itemsize
    if need > free:
        raise UserError(f"{path}: the weights take {need / 1e9:.1f} GB in {str(dtype)[6:]}, {free / 1e9:.1f} GB are "
                        f"free on {device}; use a smaller model" + " or --dtype=bfloat16" * (dtype == torch.float32))
    if shard > 1:
        device, dtype = "cpu", None
    tensors = _read_weights(path, model, device, dtype)
    missing = [name for name in model.state_dict() if name not in tensors]
    if missing:
        raise UserError(f"{path}: {len(missing)} tensor(s) missing, the first is {missing[0]}; download it again, or "
                        "use the config.json that belongs to these weights")
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def random_model(path, seed, device=None, shard=1):
    """A model in the shape that the config.json of a directory or hub name says, with fresh weights in float32."""
    model, device = Transformer(load_config(checkpoint_dir(path))), pick_device(device or "auto")
    init_weights(model, seed)
    if shard > 1:
        model.shard = Shard(shard, model.config, device, torch.float32)
    return model if shard > 1 else model.to(device)


def _read_weights(path, model, device, dtype):
    """{name: tensor} of all weight files, each checked against the model's shapes."""
    shapes = {name: p.shape for name, p in model.state_dict().items()}
    embedding = "model.embed_tokens.weight"
    shapes.setdefault("lm_head.weight", shapes[embedding])  # some tied files hold a second copy of the embedding
    tensors = {}
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():
                    if not name.endswith("rotary_emb.inv_freq"):  # old LLaMA-2 files store it
                        tensors[name] = _checked(file, name, f.get_tensor(name), shapes).to(device, dtype)
        except (SafetensorError, OSError) as error:
            hint = "; a 130-byte file is a git-lfs pointer" if os.path.getsize(file) < 1000 else ""
            raise UserError(f"{file} is damaged or no safetensors file ({error}{hint}); download it again") from None
    if model.config.tie_word_embeddings and "lm_head.weight" in tensors:
        copy = tensors.pop("lm_head.weight")
        if not torch.equal(copy, tensors.get(embedding, copy)):
            raise UserError(f"{path}: config.json ties the embeddings, but lm_head.weight is not a copy of {embedding}")
    return tensors


def _weight_files(path):
    index = os.path.join(path, "model.safetensors.index.json")
    if os.path.exists(index):
        weight_map = read_optional(index).get("weight_map")
        with foreign_file(index):
            names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
            outside = any(os.path.basename(name) != name for name in names)
        if not names or outside:
            raise UserError(f"{index}: weight_map is empty or names a file outside the directory; download it again")
    else:
        names = ["model.safetensors"]
    files = [os.path.join(path, name) for name in names]
    for file in files:
        if not os.path.isfile(file):
            pickled = [n for n in os.listdir(path) if n.endswith((".bin", ".pt", ".pth"))]
            hint = f" ({pickled[0]} is a pickle and is never read; convert it to safetensors)" if pickled else ""
            raise UserError(f"{file} is missing{hint or '; download it again'}")
    return files


def _checked(file, name, tensor, shapes):
    if name not in shapes:
        raise UserError(f"{file}: unexpected tensor {name}; use the config.json that belongs to these weights")
    if tensor.shape != shapes[name]:
        raise UserError(f"{file}: {name} has shape {list(tensor.shape)}, config.json says {list(shapes[name])}; use "
                        "the config.json that belongs to these weights")
    if tensor.dtype not in DTYPES.values():
        raise UserError(f"{file}: {name} is {tensor.dtype}; use the checkpoint in float32, bfloat16 or float16")
    if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():  # the sum alone may overflow
        raise UserError(f"{file}: {name} holds NaN or infinity; the file is damaged, download it again")
    return tensor


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
                   "vocab.json", "merges.txt", "tokenizer.model", "special_tokens_map.json")


def save_model(model, path, tokenizer_from=None, max_shard_bytes=5 * 10**9):
    """Write a directory that transformers loads: config.json and model.safetensors, in shards above max_shard_bytes.

    tokenizer_from: a checkpoint directory or hub name whose tokenizer files are copied along.
    Where the ranks of a Shard hold the weights, all of them must call this; one writes.
    """
    os.makedirs(path, exist_ok=True)
    dtype = str(model.head.dtype).removeprefix("torch.")
    raw = model.config.raw | {("dtype" if "dtype" in model.config.raw else "torch_dtype"): dtype}
    shards, size = [{}], 0
    for name, p in model.state_dict(keep_vars=True).items():
        nbytes = whole_size(p) * p.element_size()
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards, size = [*shards, {}], 0
        shards[-1][name] = p
        size += nbytes
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for file, shard in zip(names, shards):  # written aside and renamed: a run killed here leaves every file whole
        tensors = {name: whole(p) for name, p in shard.items()}
        if is_chief():
            with whole_file(os.path.join(path, file)) as aside:
                save_file(tensors, aside, {"format": "pt"})
    if not is_chief():
        return
    files = {"config.json": raw}
    if len(shards) > 1:
        total = sum(whole_size(p) * p.element_size() for shard in shards for p in shard.values())
        files["model.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": {
            name: file for file, shard in zip(names, shards) for name in shard}}
    for name, data in files.items():
        with whole_file(os.path.join(path, name)) as aside, open(aside, "w", encoding="utf-8") as f:
            json.dump(data, f, indent=2)
    for name in sorted(os.listdir(path), reverse=True):  # an earlier save's weights would be read in place of these
        earlier = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", name)
        if earlier and name not in {*names, *files}:
            os.remove(os.path.join(path, name))  # the index first: it names the others
    source = checkpoint_dir(tokenizer_from) if tokenizer_from else path
    for name in TOKENIZER_FILES if os.path.abspath(source) != os.path.abspath(path) else ():
        if os.path.exists(os.path.join(source, name)):
            shutil.copy(os.path.join(source, name), path)


def load_tokenizer(path):
    """The Tokenizer of a checkpoint directory or hub name."""
    path = checkpoint_dir(path)
    with foreign_file(path):
        return Tokenizer(path)
