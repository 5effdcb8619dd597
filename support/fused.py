"""Products of a frozen weight and of a low-rank update: with a gradient by hand for training, and
several linears fused into one for sampling."""

from contextlib import contextmanager
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.device import free_memory


class LowRankLinear(torch.autograd.Function):
    """x (W + US R V^T)^T: x [..., n], W [m, n], US [m, r], Vt [r, n], R [r, r] -> [..., m].

    W is frozen. The gradient of the others is written by hand to save passes over the tokens, and
    only V^T x [..., r] is kept of x, unless LoRA trains V^T.
    """

    @staticmethod
    def forward(ctx, x, W, US, Vt, R):
        h = thin_product(x, Vt.to(x.dtype))  # [..., r]
        ctx.save_for_backward(W, US, Vt, R, h, x if ctx.needs_input_grad[3] else None)  # [3]: Vt
        return sum_of_products(x, W, h, (US.to(R.dtype) @ R).to(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        W, US, Vt, R, h, x = ctx.saved_tensors
        shape = dy.shape[:-1]
        dy = dy.flatten(0, -2)  # [tokens, m]
        h = h.flatten(0, -2).to(R.dtype)  # [tokens, r]
        d_Rh = thin_product(dy, US.T.to(dy.dtype)).to(R.dtype)  # [tokens, r]
        d_h = (d_Rh @ R).to(dy.dtype)  # [tokens, r]
        dx = dUS = dVt = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ W).addmm_(d_h, Vt.to(dy.dtype)).view(*shape, -1)
        if x is not None:
            Rh = (h @ R.T).to(dy.dtype)
            dUS = (Rh.T @ dy).T.to(US.dtype)
            dVt = (d_h.T @ x.flatten(0, -2)).to(Vt.dtype)
        return dx, None, dUS, dVt, d_Rh.T @ h


def sum_of_products(x, W, h, U):
    """x W^T + h U^T: x [..., n], W [m, n], and thin h [..., r], U [m, r]. In 16 bits the sum is
    rounded once: a small update would be lost if it were added to a rounded output."""
    if W.is_mkldnn:
        return packed_linear(x, W, plus=F.linear(h, U))
    flat, h = x.flatten(0, -2), h.flatten(0, -2)
    if x.dtype.itemsize == 2:
        y = (h @ U.T).addmm_(flat, W.T)
    else:
        y = F.linear(flat, W).addmm_(h, U.T)
    return y.view(*x.shape[:-1], -1)


def thin_product(x, V):
    """x V^T: x [..., n], V [r, n] with few rows -> [..., r]. On a CPU (V x^T)^T is up to six times
    as fast."""
    y = V.contiguous() @ x.flatten(0, -2).T
    return y.T.unflatten(0, x.shape[:-1])


# ------------------------------------------------------------------------------ fused for sampling

def can_pack(model):
    """Is this a model on a CPU that oneDNN has products for, and is there memory for a copy of it?"""
    if model.device.type != "cpu" or model.compile_decode:
        return False
    has_products = torch.backends.mkldnn.is_available() and (
        model.dtype == torch.float32
        or model.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    size = sum(p.nbytes for p in model.parameters())
    return has_products and size < free_memory(model.device) / 3


def pack(weight):
    """The weight in the order in which oneDNN reads it. Otherwise every product brings it into such
    an order first, which takes as long as 15 rows in bfloat16, or 30 in float32."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def packed_linear(x, weight, bias=None, plus=None):
    """x weight^T + bias + plus, with a weight from pack(). In 16 bits the sum is rounded once."""
    if plus is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, plus, weight, bias, "add")


class FusedLinear:
    """Linears of the same input as one product, while weights and adapter stand still:

        y = x weight^T + bias + ((x down^T) R) up^T

    weight [m, n] and down [k r, n] stack the linears' W and V^T, and up [m, k r] is block diagonal
    with their U S R. If every row of a batch has an R of its own (per_row), up holds their U S. On
    a GPU, weight is [W, up]: one product adds up both parts and the bias, and rounds once.
    """

    def fill(self, linears, adapter, per_row, joined, packed):
        self.sizes = [linear.out_features for linear in linears]
        # Of q, k and v the model takes q and k in one piece.
        self.parts = self.sizes if len(linears) < 3 else [sum(self.sizes[:2]), self.sizes[2]]
        self.adapter = adapter if per_row else None
        weight, bias = linears[0].weight, linears[0].bias
        if bias is not None:
            bias = torch.cat([linear.bias for linear in linears])
        index = down = up = None
        adapted = [linear for linear in linears if hasattr(linear, "US")]
        if adapted:
            index = torch.tensor([linear.index for linear in adapted], device=weight.device)
            down = torch.cat([linear.Vt for linear in adapted]).to(weight.dtype)
            ups = []
            for linear in linears:
                US = getattr(linear, "US", linear.weight[:, :0]).float()  # [m, 0] if not adapted
                ups.append(US @ linear.R if linear in adapted and not per_row else US)
            up = torch.block_diag(*ups).to(weight.dtype)
        if weight.is_cuda:
            weight = self.with_room_for(up, linears)
            if adapted:
                self.padding = weight.shape[1] - sum(down.shape)
                if not per_row:
                    down = F.pad(down, (0, 0, 0, self.padding))  # rows of zeros
        elif len(linears) > 1:
            weight = torch.cat([linear.weight for linear in linears])
        if joined and not per_row and weight.dtype == torch.float32 and not weight.is_cuda:
            if adapted:
                weight = weight + up @ down  # it is a copy anyway
                down = None
            if not packed:
                weight = weight.T.contiguous().T  # makes few rows up to 1.7 times as fast
        if packed:
            weight = pack(weight)
        for name, t in dict(weight=weight, bias=bias, index=index, down=down, up=up).items():
            old = vars(self).get(name)
            if old is None or t is None or old.shape != t.shape:
                setattr(self, name, t)
            elif old is not t:
                old.copy_(t)  # where the CUDA graphs of earlier steps read it

    def with_room_for(self, up, linears):
        """[W, up] on a GPU. It takes no memory, because the linears' weights become views of it."""
        n = linears[0].in_features
        rank = 0 if up is None else up.shape[1]
        shape = sum(self.sizes), n + rank + -rank % 16  # rows are read in units of 32 bytes
        weight = vars(self).get("weight")
        with torch.inference_mode(False), torch.no_grad():  # training reads the views, too
            if weight is None or weight.shape != shape:
                weight = linears[0].weight.new_zeros(shape)
            for linear, rows in zip(linears, weight[:, :n].split(self.sizes)):
                if linear.weight.data_ptr() != rows.data_ptr():
                    linear.weight.data = rows.copy_(linear.weight)
        if up is not None:
            weight[:, n : n + rank] = up
        return weight

    def __call__(self, x):
        linear = packed_linear if self.weight.is_mkldnn else F.linear
        if self.down is None:
            y = linear(x, self.weight, self.bias)  # in 16 bits, one rounding with the bias
        else:
            h = F.linear(x, self.down)  # [B, T, k r]
            if self.adapter:
                R = self.adapter.R[self.index].transpose(0, 1)[:, None]  # [B, 1, k, r, r]
                h = h.unflatten(-1, (len(self.index), 1, -1))  # [B, T, k, 1, r]
                h = (R * h).sum(-1).flatten(2).to(x.dtype)  # [B, T, k r]
                h = F.pad(h, (0, self.padding)) if x.is_cuda else h
            if x.is_cuda:
                y = F.linear(torch.cat((x, h), dim=-1), self.weight, self.bias)
            else:
                y = sum_of_products(x, self.weight, h, self.up)
                y = y if self.bias is None else y + self.bias
        return y.split(self.parts, dim=-1) if len(self.parts) > 1 else y


@contextmanager
def sampling_form(model, per_row=False, join_below=50_000_000):
    """While this is open, weights and adapter must stand still, and FusedLinears do the products.

    q, k, v and gate, up are joined on a GPU, and on a CPU in a model of fewer block weights than
    join_below, where a step spends its time in calls. In a larger model on a CPU they are joined
    and packed if can_pack() allows it, and else stay as they are, because memory is short.
    per_row: every row of a batch has an R of its own, which adapter.rows holds in each forward
    pass. Yields the FusedLinears.
    """
    adapter = model.adapter
    on_gpu = model.device.type == "cuda"
    numbers = sum(p.numel() for p in model.model.layers.parameters())
    packed = numbers >= join_below and can_pack(model)
    joined = on_gpu or numbers < join_below or packed
    places = []  # an object, the name of its method, and the linears that the method applies
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            *inputs, output = [m for m in part.children() if isinstance(m, nn.Linear)]
            if joined:
                places += [(part, "project", inputs), (output, "forward", [output])]
            else:
                places += [(linear, "forward", [linear]) for linear in (*inputs, output)]
    for owner, _, _ in places:  # kept, though empty: torch.compile guards on its identity
        owner.fused = getattr(owner, "fused", FusedLinear())
    try:
        if adapter:
            adapter.refresh()
            adapter.frozen = not per_row
        for owner, method, linears in places:
            owner.fused.fill(linears, adapter, per_row, joined, packed)
            setattr(owner, method, owner.fused)  # hides the method of the class
        if packed:
            model.logits = partial(packed_linear, weight=pack(model.head))
        yield [owner.fused for owner, _, _ in places]
    finally:
        for owner, method, _ in places:
            vars(owner).pop(method, None)
            if not on_gpu:
                vars(owner.fused).clear()
        vars(model).pop("logits", None)
        if adapter:
            adapter.frozen, adapter.rows = False, None
