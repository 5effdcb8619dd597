"""What a Hugging Face checkpoint directory holds, and nothing else: config.json + *.safetensors -> Transformer,
tokenizer.json -> Tokenizer. Qwen2.5 and LLaMA-2/3 are one architecture: RMSNorm, rotary positions, grouped-query
attention, SwiGLU; Qwen adds biases to q, k and v. Parameters carry the checkpoint's own names, so loading is a state
dict and there is no renaming table.
"""

import base64
import ctypes
import json
import math
import os
import platform
import re
import shutil
import unicodedata
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial

import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from configurator import UserError, whole_file

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


# ---------------------------------------------------------------------------- one copy of the weights on many ranks


class Shard:
    """The `size` ranks of torch.distributed that hold one copy of the weights between them: tensor parallelism as in
    Megatron-LM (Shoeybi et al. 2019, section 3). Of every block a rank has some of the heads and some of the MLP's
    inner units: rows of q, k, v, gate and up, and columns of o and down, whose outputs are summed over the ranks.
    Embeddings, norms and lm_head are whole on each. All of them work on the same rows.

    Neighbouring ranks make a shard; `peers` are the ranks that hold the same part in other shards, for other rows.
    Raises UserError where size does not divide the heads or the inner units.
    """

    def __init__(self, size, config, device, dtype):
        self.size, self.device, self.dtype = size, device, dtype
        most = math.gcd(config.num_key_value_heads, config.intermediate_size)
        if most % size:
            raise UserError(f"shard = {size} does not cut this model, with {config.num_key_value_heads} key heads and "
                            f"{config.intermediate_size} inner units, into equal parts; use a divisor of {most}")
        ranks = init_device_mesh(device.type, (dist.get_world_size() // size, size), mesh_dim_names=("data", "shard"))
        self.group, self.peers = ranks.get_group("shard"), ranks.get_group("data")
        self.rank = ranks.get_local_rank("shard")

    def part(self, t, dim, dtype=None):
        """This rank's part of t, cut along dim, on its device: a copy, as a view would keep the whole alive."""
        return t.detach().chunk(self.size, dim)[self.rank].to(self.device, dtype or t.dtype, copy=True)

    def join(self, t, dim):
        """The whole of which every rank has the part t."""
        parts = [torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, t.contiguous(), group=self.group)
        return torch.cat(parts, dim)

    def least(self, number):
        """The smallest of the ranks' numbers."""
        t = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.all_reduce(t, dist.ReduceOp.MIN, group=self.group)
        return t.item()

    def follow(self, *tensors):
        """Overwrite the tensors with the first rank's: a last bit that differs must not make the ranks part ways."""
        for t in tensors:
            dist.broadcast(t, group=self.group, group_src=0)


class SumGradient(torch.autograd.Function):
    """What goes into linears cut by rows, on every rank the same: each knows the gradient through its own rows."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class SumOutput(torch.autograd.Function):
    """What comes out of a linear cut by columns: the sum over ranks, whose gradient is each rank's own."""

    @staticmethod
    def forward(ctx, y, group):
        y = y.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


CUT_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # of Shard; o_proj and down_proj by columns


def shard_model(model):
    """Leave this rank its part of the weights that load_model has left on the host, on its own device, and its share
    of the heads in model.config. A parameter that is cut has `cut`: the Shard and the dimension."""
    shard, config = model.shard, model.config

    def cut(linear, name, dim):
        p = nn.Parameter(shard.part(getattr(linear, name), dim, shard.dtype), requires_grad=False)
        p.cut = shard, dim
        setattr(linear, name, p)

    for block in model.model.layers:
        for module in (block.self_attn, block.mlp):
            module.register_forward_pre_hook(lambda _, args: (SumGradient.apply(args[0], shard.group), *args[1:]))
            for name, linear in module.named_children():
                cut(linear, "weight", 0 if name in CUT_BY_ROWS else 1)
                if linear.bias is not None:  # of q, k and v only
                    cut(linear, "bias", 0)
                if name not in CUT_BY_ROWS:
                    linear.register_forward_hook(lambda _, args, y: SumOutput.apply(y, shard.group))
    model.to(shard.device, shard.dtype)  # what is left whole
    model.config = model.model.config = replace(
        config, num_attention_heads=config.num_attention_heads // shard.size,
        num_key_value_heads=config.num_key_value_heads // shard.size,
        intermediate_size=config.intermediate_size // shard.size)


def own_part(p, t):
    """Of t, laid out like the whole of the parameter p, what this rank has of p."""
    return p.cut[0].part(t, p.cut[1]) if hasattr(p, "cut") and t.dim() else t


def whole(p, t=None):
    """The parameter p (or t, laid out like p: a moment of Adam's) as a whole, on the host of the rank that writes
    files; None elsewhere. Where p is cut, all ranks of its shard must call this."""
    t = (p if t is None else t).detach()
    if hasattr(p, "cut") and t.dim():
        t = p.cut[0].join(t, p.cut[1])
    return t.cpu().contiguous() if is_chief() else None


def whole_size(p):
    """Numbers in the whole of the parameter p."""
    return p.numel() * (p.cut[0].size if hasattr(p, "cut") else 1)


def is_chief():
    """Is this the one process that writes and prints?"""
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text):
    """Print it, of several ranks on one."""
    if is_chief():
        print(text)


note = cache(say)  # once, however often it is said


def start_ranks(cfg, one_share=False):
    """Join the processes of torchrun, if that is what started us. Returns which share of the rows this process works
    on, of how many (ranks that share the weights work on the same rows; one_share: all must), and its device."""
    if cfg.shard < 1:
        raise UserError("shard must be at least 1")
    if not dist.is_torchelastic_launched():
        if cfg.shard > 1:
            raise UserError(f"shard = {cfg.shard} needs as many processes; start it with torchrun --nproc_per_node="
                            f"{cfg.shard}")
        return 0, 1, cfg.device
    world = int(os.environ["WORLD_SIZE"])
    if world % cfg.shard:
        raise UserError(f"shard = {cfg.shard} does not divide the number of processes, {world}; give torchrun a "
                        "multiple of it")
    if one_share and world > cfg.shard:
        raise UserError(f"this script has one set of weights at work: give torchrun as many processes as shard "
                        f"({cfg.shard})")
    on_gpu = cfg.device in ("auto", "cuda") and torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=2))  # the others wait for evaluations
    device = f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else cfg.device
    return dist.get_rank() // cfg.shard, world // cfg.shard, device


def wait_for_ranks():
    if dist.is_initialized():
        dist.barrier()


def leave_ranks(net):
    """End the threads of torch.distributed, the last thing a process does: gloo joins its own only when nobody holds a
    group any more, and one still busy dropping a tensor while Python shuts down aborts the process."""
    if dist.is_initialized():
        if net.shard:
            if net.model.compiled:
                dist.barrier()  # compiled code holds its group for good: give the thread time to drop all else
            net.shard.group = net.shard.peers = None
        dist.destroy_process_group()


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


def read_json(path):
    try:
        with open(path, encoding="utf-8-sig") as f:
            return json.load(f)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: not a whole checkpoint directory; download it again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); download it again") from None


@contextmanager
def made_by_others(path):
    """Files come from strangers: whatever a malformed one leads to in here becomes one line."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        raise UserError(f"{path} is malformed ({type(error).__name__}: {error}); download it again") from None


def load_config(path):
    """Read config.json, in the style of published checkpoints or as transformers 5 writes it."""
    file = os.path.join(path, "config.json")
    with made_by_others(file):
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
        weight_map = _read_optional(index).get("weight_map")
        with made_by_others(index):
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


# ------------------------------------------------------------------------------------------------- the tokenizer


def _byte_alphabet():
    """GPT-2's map from printable characters to bytes, in which vocab files spell their tokens."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")  # how Qwen2 and Llama 3 cut text into words; they differ in how many digits stay together


def _read_vocabulary(path, extra):
    """The vocabulary of a directory, from tokenizer.json, vocab.json + merges.txt, or Llama-3's tokenizer.model.

    Returns ranks {bytes: id}, the word pattern, whether text is normalised to NFC, the added tokens
    [{content, id, special}] and whether raw text begins with a BOS.
    """
    file, vocab, model_file = (os.path.join(path, n) for n in ("tokenizer.json", "vocab.json", "tokenizer.model"))
    added = [t | {"id": int(i)} for i, t in extra.get("added_tokens_decoder", {}).items()]
    if os.path.exists(file) or not (os.path.exists(vocab) or os.path.exists(model_file)):
        data = read_json(file)
        bpe = data.get("model", {}) if isinstance(data, dict) else {}
        if bpe.get("type") != "BPE" or bpe.get("byte_fallback"):
            raise UserError(f"{file}: only byte-level BPE tokenizers are supported")
        ranks = _byte_level_ranks(file, bpe.get("vocab"), bpe.get("merges"), bpe.get("ignore_merges"))
        normalizer = data.get("normalizer") or {"normalizers": []}
        steps = normalizer.get("normalizers", [normalizer])
        if any(step != {"type": "NFC"} for step in steps):
            raise UserError(f"{file}: its normalizer is not supported; NFC is")
        adds_bos = "TemplateProcessing" in json.dumps(data.get("post_processor"))  # Llama 3's
        return ranks, _split_pattern(file, data), bool(steps), data.get("added_tokens", []), adds_bos
    if os.path.exists(vocab):  # Qwen2
        with open(os.path.join(path, "merges.txt"), encoding="utf-8") as f:
            merges = f.read().split("\n")
        merges = [m.rstrip("\r") for m in merges[merges[0].startswith("#version") :] if m.strip()]
        return _byte_level_ranks(vocab, read_json(vocab), merges, False), WORDS % "", True, added, False
    try:  # Llama 3: a line of base64 and rank per token, as tiktoken has it
        with open(model_file, "rb") as f:
            ranks = {base64.b64decode(token): int(i) for token, i in map(bytes.split, f.read().splitlines())}
    except ValueError:
        raise UserError(f"{model_file} is no tiktoken file; Llama 2's sentencepiece is not supported") from None
    return ranks, WORDS % "{1,3}", False, added, True


def _byte_level_ranks(file, vocab, merges, ignore_merges):
    """{bytes: id} of a vocabulary spelled in GPT-2's characters. tiktoken merges by id, so the merges must come in the
    order of the ids they make (Llama 3 lists several merges a token, but looks whole words up first)."""
    alphabet = _byte_alphabet()
    try:
        ranks = {bytes(map(alphabet.__getitem__, token)): i for token, i in vocab.items()}
        order = [vocab[m.replace(" ", "") if isinstance(m, str) else m[0] + m[1]] for m in merges]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a byte-level BPE vocabulary with its merges ({error!r})") from None
    if not ignore_merges and any(a > b for a, b in zip(order, order[1:])):
        raise UserError(f"{file}: merges are not in the order of their ids, which tiktoken needs")
    return ranks


class Tokenizer:
    """Byte-level BPE on tiktoken.

    Text -> ids never recognises special tokens unless asked (special=True), so a question that spells <|im_end|>
    stays text. The order is the reference's: added tokens are cut out first, then NFC where the file asks for it.
    """

    def __init__(self, path):
        extra = _read_optional(os.path.join(path, "tokenizer_config.json"))
        ranks, pattern, self.nfc, added, adds_bos = _read_vocabulary(path, extra)
        if len(set(ranks.values())) < len(ranks) or not all(bytes([b]) in ranks for b in range(256)) or not all(
                type(i) is int and 0 <= i < 2**31 for i in [*ranks.values(), *(t["id"] for t in added)]):
            raise UserError(f"{path}: its vocabulary lacks bytes, or its ids are no whole numbers, each used once")
        self.bpe = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.added = {t["content"]: t["id"] for t in added if t["content"]}
        self.special_ids = {t["id"] for t in added if t.get("special")}
        self.pieces = {i: token for token, i in ranks.items()} | {i: t.encode() for t, i in self.added.items()}
        rows = _read_optional(os.path.join(path, "config.json")).get("vocab_size", math.inf)
        if max(self.pieces) >= rows:
            raise UserError(f"{path}: the tokenizer has ids up to {max(self.pieces)}, but config.json says "
                            f"vocab_size = {rows}; use the tokenizer that belongs to this model")
        self.cut = re.compile("|".join(re.escape(t) for t in sorted(self.added, key=len, reverse=True)) or r"(?!)")
        self.bos_ids = [self.added[_token_text(extra["bos_token"])]] if adds_bos and extra.get("bos_token") else []
        self.special_texts = {k: _token_text(extra.get(k)) or "" for k in ("bos_token", "eos_token")}
        self._eos = self.added.get(_token_text(extra.get("eos_token")))
        self.stop_ids = self._stop_ids(path)
        self.eos_id = self._eos if self._eos in self.stop_ids else min(self.stop_ids)  # what ends a turn in training
        self.pad_id = self._pad_id(extra)
        self.template = _chat_template(path, extra)

    def _stop_ids(self, path):
        """eos_token_id of generation_config.json, else of config.json, else the tokenizer's eos_token: a set of ids.

        Nothing else is read there: its temperature, top_p and repetition_penalty would change the sampled policy.
        """
        for name in ("generation_config.json", "config.json"):
            stop = _read_optional(os.path.join(path, name)).get("eos_token_id")
            if stop is not None:
                stop = stop if isinstance(stop, list) else [stop]
                if not stop or not all(type(i) is int and 0 <= i < 2**31 for i in stop):
                    raise UserError(f"{os.path.join(path, name)}: eos_token_id must be a token id or a list of them")
                return frozenset(stop)
        if self._eos is None:
            raise UserError(f"{path}: no stop token is named (eos_token_id in generation_config.json or config.json)")
        return frozenset([self._eos])

    def _pad_id(self, extra):
        """The file's pad token if it is no stop id, else any id that is none. Padding is masked: its value is inert."""
        pad = self.added.get(_token_text(extra.get("pad_token")))
        return pad if pad is not None and pad not in self.stop_ids else next(
            i for i in range(len(self.pieces)) if i not in self.stop_ids)

    def encode(self, text, special=False):
        """Text -> list of ids. special=True recognises added tokens such as <|im_start|>; no BOS is put in front."""
        return self._encode_cut(text) if special else self._encode_plain(text)

    def _encode_cut(self, text, guard=None):
        ids, last = [], 0
        for match in self.cut.finditer(text):
            ids += self._encode_plain(text[last : match.start()], guard)
            ids.append(self.added[match.group()])
            last = match.end()
        return ids + self._encode_plain(text[last:], guard)

    def _encode_plain(self, text, guard=None):
        if guard:
            text = text.replace(guard, "")
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        return self.bpe.encode_ordinary(text)

    def decode(self, ids, skip_special=False):
        """Ids -> text. Ids past the vocabulary (padded embedding rows) are skipped; broken UTF-8 becomes U+FFFD."""
        skip = self.special_ids if skip_special else ()
        return b"".join(self.pieces.get(i, b"") for i in ids if i not in skip).decode("utf-8", errors="replace")

    def chat(self, messages, generation_prompt=True, **variables):
        """Render messages [{'role': ..., 'content': ...}] with the checkpoint's own template (a jinja2 sandbox).

        variables: what else the template reads, e.g. date_string (Llama 3; a fixed date unless given).
        """
        if self.template is None:
            raise UserError("this checkpoint has no chat template")
        with made_by_others("the chat template"):
            return self.template.render(messages=messages, add_generation_prompt=generation_prompt,
                                        **{"tools": None, "documents": None} | self.special_texts | variables)

    def encode_chat(self, messages, generation_prompt=True, **variables):
        """Ids of the rendered chat, where the special tokens are the template's: those a user typed stay text."""
        return self._encode_cut(self.chat(self._guarded(messages), generation_prompt, **variables), GUARD)

    def encode_turns(self, messages):
        """Ids of a whole conversation up to the end of its last assistant turn, and for each of them whether the
        assistant is to say it: the content of all its turns, and the token that ends a turn.

        Every turn is cut off before BPE where a sampler's prompt would end, so what is trained is what is sampled: a
        content that begins with a line break is not merged with the template's. UserError where the template renders
        the messages so far differently once more follow, or ends a turn without a special token.
        """
        guarded, ids, trained, done = self._guarded(messages), [], [], ""
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt, turn = self.chat(guarded[:i]), self.chat(guarded[: i + 1], generation_prompt=False)
                if not (prompt.startswith(done) and turn.startswith(prompt)):
                    raise UserError("the chat template changes earlier messages when later ones follow, so that turns "
                                    f"cannot be told apart (at message {i + 1}); use another checkpoint's template")
                said = self._encode_cut(turn[len(prompt) :], GUARD)
                end = next((n for n in range(len(said), 0, -1) if said[n - 1] in self.added.values()), None)
                if end is None:
                    raise UserError("the chat template ends an assistant's turn without a special token: nothing would "
                                    "teach the model to stop; use another checkpoint's template")
                asked = self._encode_cut(prompt[len(done) :], GUARD)
                ids += asked + said
                trained += [False] * len(asked) + [True] * end + [False] * (len(said) - end)
                done = turn
        last = len(trained) - trained[::-1].index(True)
        return ids[:last], trained[:last]

    def _guarded(self, messages):
        return [m | {"content": self.cut.sub(lambda match: GUARD.join(match[0]) + GUARD, m["content"])}
                for m in messages]


GUARD = "\ufdd0"  # a code point that Unicode keeps out of text: put into a typed <|im_end|>, it hides it from `cut`


def load_tokenizer(path):
    """The Tokenizer of a checkpoint directory or hub name."""
    path = checkpoint_dir(path)
    with made_by_others(path):
        return Tokenizer(path)


def _read_optional(file):
    data = read_json(file) if os.path.exists(file) else {}
    if not isinstance(data, dict):
        raise UserError(f"{file} is not a JSON object")
    return data


def _token_text(token):
    return token["content"] if isinstance(token, dict) else token


def _split_pattern(file, data):
    """The regex that cuts text into words before BPE, from tokenizer.json's pre_tokenizer."""
    match (data.get("pre_tokenizer") or {}).get("pretokenizers"):
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            return pattern
    raise UserError(f"{file}: its pre_tokenizer is not one split pattern and ByteLevel: no Qwen2 or Llama-3 tokenizer")


def _chat_template(path, extra):
    text = extra.get("chat_template")
    if isinstance(text, list):  # several, by name
        text = next((t.get("template") for t in text if t.get("name") == "default"), None)
    file = os.path.join(path, "chat_template.jinja")
    if os.path.exists(file):
        with open(file, encoding="utf-8") as f:
            text = f.read()
    if not isinstance(text, str):
        return None

    def raise_exception(message):
        raise UserError(f"the chat template refuses these messages: {message}")

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.globals["raise_exception"] = raise_exception
    env.filters["tojson"] = lambda x, **options: json.dumps(x, **{"ensure_ascii": False} | options)
    with made_by_others(f"{path}: the chat template"):
        return env.from_string(text)
