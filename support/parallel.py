"""The processes of torchrun: which rows each of them works on, and one copy of the weights spread
over several GPUs. Without torchrun there is one process, and nothing here does anything.

Every process works on its own rows; gradients and figures are summed. With shard > 1, `shard`
neighbouring processes hold one copy of the blocks between them, by torch's fully_shard (FSDP2): a
block's weights are gathered just before it runs, in every decode step too, so a model that fits on
one GPU should use shard = 1. All else is whole on every process. Since gathering is collective, all
must run the blocks equally often: a process without work makes empty passes (in_step, keep_pace).

Qwen2.5-72B in bfloat16 on 8 GPUs, by arithmetic (it was not run), in GB on each: blocks 70.2e9 *
2 bytes / 8 = 17.6; a gathered block and the next one 3.5; embedding and lm_head 5.0; keys and
values 80 layers * 2 * 1,024 * 2 bytes = 0.33 MB a token; training with recompute 80 * 8,192 * 2
bytes = 1.3 MB a token. Training all weights takes 16 bytes a number, so 140 GB for the blocks: it
does not fit.
"""

import math
import os
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from support import UserError
from support.device import pick_device
from support.packing import Rollout

PATIENCE = timedelta(hours=2)  # how long a process waits for the slowest one


def rank_and_size():
    """Which process this is, and of how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_chief():
    """Is this the one process that writes files and prints?"""
    return rank_and_size()[0] == 0


def print0(text):
    if is_chief():
        print(text)


print0_once = cache(print0)  # prints each text only the first time


class Ranks:
    """This process is dp_rank of dp_size: it works on every dp_size-th row."""

    def __init__(self, device="auto", shard=1):
        launched = dist.is_torchelastic_launched()
        world = int(os.environ["WORLD_SIZE"]) if launched else 1
        if shard < 1 or world % shard:
            raise UserError(f"shard = {shard} must divide the number of processes, {world}; start "
                            f"with torchrun --nproc_per_node={max(1, shard)}")
        if launched and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device = pick_device(device)  # refuses a wrong one before anything is downloaded
        if launched:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
            all_gather(None)  # so that nobody refuses something and leaves while others connect
        self.dp_rank, self.dp_size = rank_and_size()

    def mine(self, rows):
        return rows[self.dp_rank :: self.dp_size]

    def gather(self, rows):
        """The rows of all processes as one list, in the order from which mine() took them."""
        parts = all_gather(rows)
        longest = max(len(part) for part in parts)
        return [part[i] for i in range(longest) for part in parts if i < len(part)]

    def sum(self, numbers):
        """Add up the processes' {name: number}. A name that a process lacks counts as 0 there."""
        total = Counter()
        for part in all_gather(dict(numbers)):
            total.update(part)  # not `+`, which drops numbers below 0
        return total

    def max(self, number):
        return max(all_gather(number))

    def leave(self):
        """Call this last: gloo may abort a process that exits while its threads are running."""
        if dist.is_initialized():
            dist.destroy_process_group()


def all_gather(thing):
    """A list of what every process has, in their order."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


# ------------------------------------------------- gradients, and tensors of which each has a part

def reduce_gradients(parameters, grad_clip):
    """Sum the gradients over processes and clip their norm (0: do not clip). Returns the norm."""
    for p in parameters:
        if p.grad is None:  # in a process none of whose rows has a gradient
            p.grad = torch.zeros_like(p)
        if dist.is_initialized() and not isinstance(p.grad, DTensor):  # FSDP has summed its own
            dist.all_reduce(p.grad)
    norm = norm_of([p.grad for p in parameters])
    if not math.isfinite(norm):
        raise UserError("the gradient is not finite, so this step changes nothing; lower lr, or "
                        "use --dtype=float32")
    if grad_clip and norm > grad_clip:
        for p in parameters:
            p.grad.mul_(grad_clip / (norm + 1e-6))
    return norm


def norm_of(tensors):
    """The norm of all tensors together, of those that are spread over processes all parts."""
    norms = [torch.linalg.vector_norm(t) for t in tensors]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.stack(norms).norm().item()


def full_tensor(t):
    """The whole of t on the host of the chief; None elsewhere. All processes must call this."""
    t = t.detach()
    if isinstance(t, DTensor):
        t = t.full_tensor()
    return t.cpu().contiguous() if is_chief() else None


def spread_like(p, t):
    """The tensor t, which every process has in full, spread over devices as the parameter p is."""
    if isinstance(p, DTensor) and t.dim():
        return distribute_tensor(t.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return t.to(p.device) if t.dim() else t


# ---------------------------------------------------------- one copy of the weights over processes

def shard_model(model, shard):
    """Spread the blocks, which load_model has left on the host, over `shard` neighbouring
    processes. Rows of processes with the same part are independent replicas."""
    device, dtype = model.device, model.dtype
    ranks = torch.arange(dist.get_world_size()).view(-1, shard)
    groups = [dist.new_subgroups_by_enumeration(table.tolist(), timeout=PATIENCE)[0]
              for table in (ranks.T, ranks)]
    mesh = DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=("replicate", "shard"))
    for block in model.model.layers:
        fully_shard(block.to(dtype), mesh=mesh)
        # Sum the gradients, since the loss is already divided by the rollouts of all processes.
        block.set_gradient_divide_factor(1.0)
        block.set_force_sum_reduction_for_comms(True)
    model.to(device, dtype)  # all that is not in a block
    # With a common root, the next block is gathered while one computes.
    fully_shard(model.model, mesh=mesh, ignored_params=set(model.parameters()))
    model.is_sharded = True


@contextmanager
def in_step(model):
    """While this is open, processes may make different numbers of forward passes. At its end, those
    that have made fewer make empty ones until all are done."""
    if not model.is_sharded:
        yield
        return
    hook = model.model.register_forward_pre_hook(lambda *_: all_gather(True) and None)
    yield
    hook.remove()
    while any(all_gather(False)):
        model.model(torch.zeros(1, 1, dtype=torch.long, device=model.device))


def keep_pace(model, batches):
    """The batches, and as many without a trained token as the busiest process has batches more."""
    batches = list(batches)
    missing = max(all_gather(len(batches))) - len(batches) if model.is_sharded else 0
    empty = Rollout(prompt=[0], ids=[0], logprobs=[0.0], loss_mask=[False])
    return batches + [[empty]] * missing
