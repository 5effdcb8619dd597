"""A Hugging Face checkpoint directory as plain PyTorch: config.json + *.safetensors -> Transformer.

Qwen2.5, Qwen3, Llama 2 and 3 and SmolLM2 are one architecture: RMSNorm, rotary positions, grouped-
query attention and SwiGLU. Qwen2.5 adds biases to q, k and v, and Qwen3 norms of q and k. Parameters
have the names of the checkpoint files, so loading is a state dict without a table of renamings.
"""

import math
import os
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn import RMSNorm
from torch.utils.checkpoint import checkpoint

from support import UserError, foreign_file, read_json
from support.checkpoint import DTYPES, checkpoint_dir, read_weights
from support.checkpoint import save_model as save_model  # model.save_model
from support.device import free_memory, pick_device
from support.packing import attention, logits_of
from support.tokenizer import Tokenizer

# ------------------------------------------------------------------------------- the architecture

@dataclass
class Config:
    """The part of config.json that the forward pass reads. `raw` is the file, for save_model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    qkv_bias: bool
    rope_scaling: dict | None  # Llama-3.1's frequency bands, or None
    raw: dict
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qk_norm: bool = False


class Linear(nn.Linear):
    def reset_parameters(self):
        pass  # skip the default initialisation, which is slow even on the meta device


def rotate(x, cos, sin):
    """Rotary position embedding in the checkpoints' half-split layout. x [B, T, H, hd]; cos and sin
    [B, T, 1, hd], with the first half of sin negated."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((x2, x1), dim=-1), sin)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        dim = config.hidden_size
        q_dim = config.num_attention_heads * config.head_dim
        kv_dim = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(dim, q_dim, bias=config.qkv_bias)
        self.k_proj = Linear(dim, kv_dim, bias=config.qkv_bias)
        self.v_proj = Linear(dim, kv_dim, bias=config.qkv_bias)
        self.o_proj = Linear(q_dim, dim, bias=False)
        self.has_norm = config.qk_norm
        if self.has_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def project(self, x):  # in sampling support/fused.py makes the three products one
        return torch.cat((self.q_proj(x), self.k_proj(x)), dim=-1), self.v_proj(x)

    def forward(self, x, cos, sin, cache):
        B, T, _ = x.shape
        qk, v = (y.view(B, T, -1, self.head_dim) for y in self.project(x))
        heads = qk.shape[2] - v.shape[2], v.shape[2]  # of q, and of k
        if self.has_norm:
            q, k = qk.split(heads, dim=2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        # Rotating q and k in one go takes three operations less, which matters in decoding.
        q, k = rotate(qk, cos, sin).transpose(1, 2).split(heads, dim=1)  # [B, heads, T, hd]
        v = v.transpose(1, 2)  # [B, kv_heads, T, hd]
        y = attention(q, k, v) if cache is None else cache.attend(self.layer, q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


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

    Without a cache, attention is causal over right-padded rows. A token never sees what stands to
    its right, so padding needs no mask. With a cache (sample.KVCache, packing.Packed),
    cache.attend(layer, q, k, v) does the attention, and `positions` [B, T] are the tokens' places.
    """

    def __init__(self, config):
        super().__init__()
        weight = torch.empty(config.vocab_size, config.hidden_size)  # not initialised, either
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.config = config
        self.inv_freq = None  # made on first use, since the meta device holds no numbers
        self.recompute = False  # keep only the blocks' inputs for the backward pass

    def forward(self, ids, positions=None, cache=None):
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]  # [1, T]
        if self.inv_freq is None or self.inv_freq.device != ids.device:
            self.inv_freq = rope_frequencies(self.config).to(ids.device)
        angles = positions[:, :, None, None] * self.inv_freq  # [B, T, 1, hd/2], in float32
        x = self.embed_tokens(ids)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        cos = torch.cat((cos, cos), dim=-1)
        sin = torch.cat((-sin, sin), dim=-1)  # as rotate() expects it
        for block in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, cache, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache)
        return self.norm(x)


class Transformer(nn.Module):
    """A causal language model whose state dict has exactly the names of the checkpoint files."""

    adapter = None  # set by tinylora.add_adapter
    compile_decode = False  # torch.compile for the decode step of sample.py
    sampler = None  # on a GPU: the Sampler of the last call of sample.generate, with its CUDA graphs
    longest = 0  # tokens of a run's longest row, if known: then all graphs are recorded at once
    is_sharded = False  # do several processes hold the blocks between them (support/parallel.py)?
    target = None  # (device, dtype) that weights still on the host are meant for, before sharding

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self):
        """The output matrix [vocab, D]; the embedding itself where the checkpoint ties them."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def logits(self, hidden):  # in sampling support/fused.py may replace this
        return logits_of(hidden, self.head)

    def forward(self, ids):
        """ids [B, T] -> logits [B, T, vocab]. Sampling and training use .model and .head, because
        the logits of a whole batch take much memory."""
        return F.linear(self.model(ids), self.head)

    @property
    def device(self):
        return self.target[0] if self.target else self.head.device

    @property
    def dtype(self):
        return self.target[1] if self.target else self.head.dtype


def rope_frequencies(config):
    """Inverse frequencies [head_dim / 2]. Llama-3.1's scaling divides those of long wavelengths by
    `factor`, leaves short wavelengths alone, and blends between the two."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    inv_freq = 1.0 / config.rope_theta**exponent
    if config.rope_scaling is None:
        return inv_freq
    scaling = config.rope_scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: divided by factor, 1: left alone
    return (1 - smooth) * inv_freq / scaling["factor"] + smooth * inv_freq


def random_model(path, seed, device="auto", shard=1):
    """A model of the shape that a directory's config.json gives, with fresh weights in float32:
    N(0, 0.02), and residual projections scaled down by depth as in GPT-2. For pre-training. With
    shard > 1 it stays on the host, as in load_model."""
    model = Transformer(load_config(checkpoint_dir(path)))
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif not name.endswith("norm.weight"):  # norms begin as 1
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * model.config.num_hidden_layers) if residual else 0.02
            nn.init.normal_(p, 0.0, std, generator=generator)
    if shard > 1:
        model.target = pick_device(device), torch.float32
        return model
    return model.to(pick_device(device))


# ------------------------------------------------------------------------- checkpoint directories

FAMILIES = {  # model_type in config.json: what differs between families
    "qwen2": {"qkv_bias": True, "max_position_embeddings": 32768},
    "qwen3": {"qkv_bias": False, "qk_norm": True, "head_dim": 128, "max_position_embeddings": 32768},
    "llama": {"qkv_bias": False, "max_position_embeddings": 2048},
}


def load_config(path):
    """Read config.json, as published checkpoints have it or as transformers 5 writes it."""
    file = os.path.join(path, "config.json")
    raw = read_json(file)
    with foreign_file(file):
        raw = {key: value for key, value in raw.items() if value is not None}
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        for supported, message in config_rules(raw, rope):
            if not supported:
                raise UserError(f"{file}: {message}")
        heads = raw["num_attention_heads"]
        derived = {"num_key_value_heads": heads, "head_dim": raw["hidden_size"] // heads}
        values = derived | FAMILIES[raw["model_type"]] | raw | rope
        values |= {"rope_scaling": rope if "low_freq_factor" in rope else None, "raw": raw}
        config = Config(**{f.name: values[f.name] for f in fields(Config) if f.name in values})
        for field in fields(config):
            value, is_number = getattr(config, field.name), field.type in (int, float)
            if is_number and not (type(value) in (int, field.type) and 0 < value < 2**31):
                raise UserError(f"{file}: {field.name} must be a number above 0, not {value!r}")
        if heads % config.num_key_value_heads or config.head_dim % 2:
            raise UserError(f"{file}: num_key_value_heads must divide num_attention_heads, and "
                            "head_dim must be even")
    return config


def config_rules(raw, rope):
    """(is supported, message if not) of what a config.json says."""
    kind = raw.get("model_type")
    architectures = raw.get("architectures") or ["ForCausalLM"]
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    layer_types = set(raw.get("layer_types", []))
    yield kind in FAMILIES, (f"model_type {kind!r} is not supported; use a Qwen or Llama model "
                             f"({', '.join(FAMILIES)})")
    yield str(architectures[0]).endswith("ForCausalLM"), (
        f"{architectures[0]} is not a language model; use a checkpoint that ends in ForCausalLM")
    yield raw.get("hidden_act", "silu") == "silu", (
        f"hidden_act {raw.get('hidden_act')!r} is not supported")
    yield not raw.get("use_sliding_window", raw.get("sliding_window")), (
        "sliding_window is not supported; use a checkpoint without it")
    for key in ("mlp_bias", "quantization_config"):
        yield not raw.get(key), (
            f"{key} is not supported; use a checkpoint without it, not quantised")
    yield kind == "qwen2" or not raw.get("attention_bias"), (
        f"attention_bias is not supported for {kind}")
    yield layer_types <= {"full_attention"}, f"layer_types {sorted(layer_types)} are not supported"
    yield rope_type in ("default", "llama3"), f"rope type {rope_type!r} is not supported"
    for key in ("factor", "low_freq_factor", "high_freq_factor",
                "original_max_position_embeddings"):
        yield rope_type == "default" or rope.get(key, 0) > 0, f"its llama3 rope settings lack {key}"
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    yield partial == 1.0, "partial_rotary_factor is not supported"


def load_model(path, dtype=None, device=None, shard=1):
    """Load a checkpoint directory or hub name as a frozen Transformer.

    dtype: torch dtype, its name, or None or 'auto': bfloat16 on a GPU, float32 on a CPU.
    device: torch device, its name, or None or 'auto': the GPU if there is one.
    shard: above 1, the weights stay on the host, memory-mapped as they are in the files, so that
        adapters can look at one whole matrix at a time. parallel.shard_model spreads them.
    Raises UserError, naming the file and the tensor, for anything that does not fit.
    """
    device = pick_device(device or "auto")
    if dtype in (None, "auto"):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in DTYPES.values():
        raise UserError(f"dtype must be auto, {', '.join(DTYPES)}, not {dtype}")
    path = checkpoint_dir(path)
    config = load_config(path)
    with foreign_file(path), torch.device("meta"):  # shapes only, the numbers come from the files
        model = Transformer(config)
    numbers = sum(p.numel() for p in model.parameters())
    need, free = numbers * dtype.itemsize / shard, free_memory(device)
    if need > free:
        raise UserError(f"{path}: the weights take {need / 1e9:.1f} GB in {str(dtype)[6:]}, and "
                        f"{free / 1e9:.1f} GB are free on {device}; use a smaller model, "
                        "--dtype=bfloat16, or several GPUs with --shard")
    if shard > 1:
        model.target = device, dtype
        device, dtype = torch.device("cpu"), None
    tensors = read_weights(path, model, device, dtype)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def load_tokenizer(path):
    """The Tokenizer of a checkpoint directory or hub name."""
    path = checkpoint_dir(path)
    with foreign_file(path):
        return Tokenizer(path)
