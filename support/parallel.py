"""The processes of torchrun: who works on which rows, and one copy of the weights over several of them."""

import math
import os
from dataclasses import replace
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh

from support import UserError


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
