"""The top singular triplets of a matrix, with canonical signs, and their cache on disk."""

import hashlib
import os
from contextlib import suppress

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from support import UserError, whole_file
from support.parallel import all_gather, is_chief, rank_and_size

TOLERANCE = 1e-5  # angle in radians by which a singular vector may be off
GRAM_COLUMNS = 2048  # up to this many, W^T W costs less than the thin products it replaces
CACHE_FROM = 10**7  # numbers in all weights; the SVD of smaller models takes a second or two


@torch.no_grad()
def top_svd(W, rank, name="a matrix"):
    """The top singular triplets of W [m, n]: U [m, r], S [r] and Vt [r, n] in float32.

    They come from the top eigenvectors of W^T W or W W^T, whichever is smaller, in float64, because
    squaring spreads the spectrum too far for float32. (u, v) and (-u, -v) are both right but lead
    to different updates, so the entry of u that is largest in magnitude, the first of several, is
    made positive.
    """
    tall = W.shape[0] >= W.shape[1]
    M = (W if tall else W.T).detach().double().contiguous()  # [longer side, n]
    n = M.shape[1]
    if n <= max(512, 8 * rank):
        V, values = top_eigen(M.T @ M, rank)
        residuals = 1e-15 * values[:1]  # float64's rounding
    else:
        V, values, residuals = block_lanczos(M, rank, min(n, 1024 + 8 * rank), name)
    angle = (residuals / gaps(values).clamp(min=1e-300)).max().item()
    if angle > 10 * TOLERANCE:
        close = ", ".join(f"{value:.6g}" for value in values.sqrt().tolist())
        print(f"note: the singular values {close} of {name} nearly coincide, so an adapter may "
              "mean another update on another machine")
    scaled_U = M @ V
    S = scaled_U.norm(dim=0)
    U = scaled_U / S.clamp(min=1e-300)
    if not tall:
        U, V = V, U
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))  # [1, r]
    sign = torch.where(largest < 0, -1.0, 1.0)
    return (U * sign).float().contiguous(), S.float(), (V * sign).T.float().contiguous()


def top_eigen(T, rank):
    """The top eigenvectors [k, r] of a symmetric T [k, k], and the top r + 1 eigenvalues in
    descending order (the last is 0 if there are only r)."""
    values, vectors = torch.linalg.eigh(T.cpu())  # at this size a CPU is faster than a GPU
    values = torch.cat((values.flip(0), values.new_zeros(1)))[: rank + 1].clamp(min=0)
    return vectors.flip(1)[:, :rank].to(T.device), values.to(T.device)


def gaps(values):
    """Distance of each eigenvalue from its nearest neighbour: values [r + 1] -> [r]."""
    below = values[:-1] - values[1:]
    above = torch.cat((below[:1], below[:-1]))
    return torch.minimum(below, above)


def block_lanczos(M, rank, limit, name):
    """The top eigenvectors [n, r], r + 1 eigenvalues and r residuals of M^T M [n, n], from a basis
    of at most `limit` vectors (Golub, Luk & Overton 1981, with full reorthogonalisation). residual
    / gap bounds the angle by which an eigenvector is off."""
    n = M.shape[1]
    gram = M.T @ M if n <= GRAM_COLUMNS else None  # [n, n]
    block = max(8, rank // 4)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, block, generator=generator, dtype=torch.float64)
    basis = X = torch.linalg.qr(start.to(M.device)).Q
    T = M.new_zeros(limit, limit)  # M^T M in this basis
    while True:
        k = basis.shape[1]
        Z = M.T @ (M @ X) if gram is None else gram @ X
        H = basis.T @ Z
        T[:k, k - block : k] = H
        T[k - block : k, :k] = H.T
        X, remainder = torch.linalg.qr(Z - basis @ H)
        is_full = k + block > limit
        if is_full or k > rank and k % (4 * block) == 0:  # a check takes the time of some rounds
            vectors, values = top_eigen(T[:k, :k], rank)
            residuals = (remainder @ vectors[-block:]).norm(dim=0)
            rounding = 1e-14 * values[0]
            if (residuals <= torch.maximum(TOLERANCE * gaps(values), rounding)).all():
                return basis @ vectors, values, residuals
        if is_full:
            raise UserError(f"the SVD of {name} has not converged with {k} vectors; lower the rank")
        for _ in range(2):  # twice is enough, even where Z lay nearly in the basis (Kahan)
            X = torch.linalg.qr(X - basis @ (basis.T @ X)).Q
        basis = torch.cat((basis, X), dim=1)


def svd_factors(weights, rank, device):
    """[(U S [m, r], Vt [r, n])] of weights {name: W}, in float32 on `device`. W may lie elsewhere.

    Those of a large model are kept on disk, in $TINYLORA_CACHE or else in ~/.cache/tinylora. The
    processes of torchrun divide the matrices among them.
    """
    path = cache_path(weights, rank)
    tensors = None
    with suppress(OSError, SafetensorError):  # missing or damaged: the SVD is made again
        tensors = load_file(path)
    if not all(all_gather(tensors is not None)):  # another run may be writing the file just now
        process, count = rank_and_size()
        mine = list(weights)[process::count]
        tensors = {}
        for name in tqdm(mine, desc="SVD", leave=False, disable=None if is_chief() else True):
            U, S, Vt = top_svd(weights[name].to(device), rank, name)
            tensors |= {f"{name}.US": (U * S).cpu(), f"{name}.Vt": Vt.cpu()}
        tensors = {name: t for part in all_gather(tensors) for name, t in part.items()}
        if sum(W.numel() for W in weights.values()) >= CACHE_FROM and is_chief():
            try:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with whole_file(path) as aside:
                    save_file(tensors, aside)
            except (OSError, UserError) as error:
                print(f"note: the SVD is not cached and will be made again next time: {error}")
    return [(tensors[f"{name}.US"].to(device), tensors[f"{name}.Vt"].to(device))
            for name in weights]


def cache_path(weights, rank):
    """The cache file of these weights, named by a sum of all their bits that depends on places."""
    key = hashlib.sha256(f"svd-3 {rank}".encode())
    for name, W in weights.items():
        bits = W.detach().flatten()[: W.numel() // 4 * 4].view(torch.int64)
        total = (bits * torch.arange(1, len(bits) + 1, device=W.device)).sum().item()  # mod 2^64
        key.update(f"{name} {W.dtype} {list(W.shape)} {total}".encode())
    folder = os.environ.get("TINYLORA_CACHE") or os.path.expanduser("~/.cache/tinylora")
    return os.path.join(folder, key.hexdigest()[:40] + ".safetensors")
