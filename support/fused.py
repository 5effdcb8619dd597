"""Linears fused for sampling."""

from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F


class Product:
    """Linears of one input as a single product, for sampling, while weights and adapter stand still: the weights side
    by side, and of the update the two thin factors V^T and U S R, multiplied out unless every row of a batch has its R
    (per_row): y = x W^T + b + ((x down^T) R) up^T. Where the weights are copied anyway (joined), in float32, the copy
    takes in the update."""

    def take(self, linears, adapter, per_row, joined):
        self.parts = [len(linear.weight) for linear in linears] if len(linears) > 1 else None
        self.weight, self.bias, self.down = linears[0].weight, linears[0].bias, None
        if self.parts and self.bias is not None:
            self.bias = torch.cat([linear.bias for linear in linears])
        adapted = [linear for linear in linears if hasattr(linear, "US")]
        self.adapter = adapter if per_row else None
        if joined and not per_row and self.weight.dtype == torch.float32:
            # Lies in memory as [n, m]: few rows are multiplied up to 1.7 times faster so.
            weights = [linear.merged() if linear in adapted else linear.weight for linear in linears]
            self.weight, adapted = torch.cat(weights).T.contiguous().T, []
        elif self.parts:
            self.weight = torch.cat([linear.weight for linear in linears])
        if adapted:
            self.index = torch.tensor([linear.index for linear in adapted], device=self.weight.device)
            self.down = torch.cat([linear.Vt for linear in adapted]).to(self.weight.dtype)  # [k r, n]
            ups = [torch.zeros(len(linear.weight), 0, device=self.weight.device) if linear not in adapted  # rows of 0
                   else linear.US.float() if per_row else linear.US.float() @ linear.R for linear in linears]
            self.up = torch.block_diag(*ups).to(self.weight.dtype)  # [m, k r]

    def __call__(self, x):
        if self.down is None:
            y = few_rows_linear(x, self.weight, self.bias)
        else:
            h = F.linear(x, self.down)  # [B, T, k r]
            if self.adapter:
                R = self.adapter.R[self.index].transpose(0, 1)[:, None]  # [B, 1, k, r, r]
                h = (R * h.unflatten(-1, (R.shape[2], 1, -1))).sum(-1).flatten(2).to(x.dtype)  # R h of every linear
            y = sum_of_products(x, self.weight, h, self.up)
            y = y if self.bias is None else y + self.bias
        return y.split(self.parts, dim=-1) if self.parts else y


def sum_of_products(x, W, h, U):
    """x W^T + h U^T: x [..., n], W [m, n], and thin h [..., r], U [m, r]. In 16 bits the sum is rounded once: added to
    an output that is rounded already, an update below half a unit in its last place would be lost for every token."""
    flat, h = x.flatten(0, -2), h.flatten(0, -2)
    y = (h @ U.T).addmm_(flat, W.T) if x.dtype.itemsize == 2 else few_rows_linear(flat, W).addmm_(h, U.T)
    return y.view(*x.shape[:-1], -1)


def thin_product(x, V):
    """x V^T: x [..., n], V [r, n] with few rows -> [..., r]. On a CPU (V x^T)^T is up to six times faster."""
    return (V.contiguous() @ x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])


LARGE = 500_000  # numbers in a weight, see below


def few_rows_linear(x, W, bias=None):
    """F.linear. On a CPU in float32 the product of 8 to 32 rows with a large W is up to a third faster the other way
    round, (W x^T)^T; not in compiled code, which serves all sizes."""
    flat, on_cpu = x.flatten(0, -2), x.device.type == "cpu" and x.dtype == torch.float32
    if on_cpu and W.numel() > LARGE and not torch.compiler.is_compiling() and 8 <= len(flat) <= 32:
        y = W @ flat.T if bias is None else torch.addmm(bias[:, None], W, flat.T)
        return y.T.reshape(*x.shape[:-1], len(W))
    return F.linear(x, W, bias)


# The Product of a linear or of a method: one for good, as compiled code knows it by its identity. Empty if not in use.
PRODUCTS = WeakKeyDictionary()


@contextmanager
def sampling_form(model, per_row=False, join_below=50_000_000):
    """While weights and adapter stand still, every linear is a Product. q, k, v and gate, up are joined in a model of
    fewer weights than join_below: where a step's time goes into calls, and a second copy of the weights is small.
    per_row: every row of a batch has its own R, which stands in adapter.rows at each forward pass."""
    if model.is_sharded:
        yield
        return
    adapter = getattr(model, "adapter", None)
    joined = sum(p.numel() for p in model.model.layers.parameters()) < join_below
    changed = []  # (object, name of the method that its attribute hides, the Product)

    def hide(thing, name, linears):
        product = PRODUCTS.setdefault(thing, Product())
        changed.append((thing, name, product))
        product.take(linears, adapter, per_row, joined)
        setattr(thing, name, product)

    try:
        if adapter:
            adapter.refresh()
            adapter.frozen = not per_row
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            inputs = [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]
            if joined:
                hide(attention, "project", inputs[0])
                hide(mlp, "project", inputs[1])
            for linear in [attention.o_proj, mlp.down_proj, *([] if joined else inputs[0] + inputs[1])]:
                hide(linear, "forward", [linear])
        yield
    finally:
        for thing, name, product in changed:
            thing.__dict__.pop(name, None)
            vars(product).clear()
        if adapter:
            adapter.frozen, adapter.rows = False, None
