"""The top singular triplets of a matrix, with canonical signs, and their cache on disk."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import safetensors.torch
import torch
from tqdm import tqdm

from support import UserError
from support.parallel import all_gather, is_chief, rank_of, world_size


@torch.no_grad()
def top_svd(W, rank, name="a matrix"):
    """Top singular triplets of W [m, n]: U [m, r], S [r], Vt [r, n] in fp32, with canonical signs.

    Block Lanczos on the smaller of W^T W and W W^T with full reorthogonalisation (Golub, Luk & Overton 1981), until
    residual / gap, a bound on the angle by which a singular vector is off, is below 1e-6 for each of them. A full SVD
    of a 7B model takes half an hour; this takes seconds, and on flat spectra merely more rounds.
    Signs: (u, v) and (-u, -v) are both right but give different updates, so the entry of u that is largest in
    magnitude is made positive (the first, if several are).
    """
    W = W.detach().double()  # squaring spreads the spectrum: too much for fp32 where one value towers
    M = W if W.shape[0] >= W.shape[1] else W.T  # [m, n], n the smaller side
    n = M.shape[1]
    if n <= max(512, 8 * rank):  # small enough for all of M^T M, which is then faster
        V, values = _top_eigen(M.T @ M, rank)
        residual = 1e-15 * values[:1]
    else:
        V, values, residual = _lanczos(M, rank, 1e-6, max(8, rank // 4), name)
    angle = (residual / _gaps(values).clamp(min=1e-300)).max().item()
    if angle > 1e-5:
        print(f"note: {name}: singular values {', '.join(f'{s:.6g}' for s in values.sqrt())} nearly coincide, which "
              "leaves their vectors open: v may mean another update on another machine")
    US = M @ V
    S = US.norm(dim=0)
    U, V = (US / S.clamp(min=1e-300), V) if M is W else (V, US / S.clamp(min=1e-300))
    sign = torch.where(U.gather(0, U.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)  # [1, r]
    return (U * sign).float().contiguous(), S.float(), (V * sign).T.float().contiguous()


def _top_eigen(T, rank):
    """The top eigenvectors of a symmetric T [k, k], descending [k, r], and one eigenvalue more than these (or a 0)."""
    values, vectors = (t.to(T.device) for t in torch.linalg.eigh(T.cpu()))  # a GPU is slower at this size
    values = torch.cat((values.flip(0), values.new_zeros(1)))[: rank + 1].clamp(min=0)
    return vectors.flip(1)[:, :rank], values


def _gaps(values):
    """How far each wanted eigenvalue is from its nearest neighbour: values [r + 1], descending -> [r]."""
    below = values[:-1] - values[1:]
    return torch.minimum(below, torch.cat((below[:1], below[:-1])))


def _lanczos(M, rank, tol, block, name, limit=0):
    """What _top_eigen returns of M^T M [n, n], and the residuals [r]."""
    n = M.shape[1]
    limit = limit or min(n, 1024 + 8 * rank)
    generator = torch.Generator().manual_seed(0)  # the start decides the rounds needed, not the result
    X = torch.linalg.qr(torch.randn(n, block, generator=generator).to(M)).Q
    basis, T = X, M.new_zeros(limit, limit)  # T = basis^T M^T M basis
    rounds, next_check = 0, 4
    while True:
        rounds, k = rounds + 1, basis.shape[1]
        Z = M.T @ (M @ X)
        H = basis.T @ Z
        T[:k, k - block : k], T[k - block : k, :k] = H, H.T
        X, remainder = torch.linalg.qr(Z - basis @ H)
        if (rounds >= next_check or k + block > limit) and k > rank:  # now and then, and before it gives up
            next_check = rounds + max(2, rounds // 4)  # the eigenproblem grows: look less often as it does
            vectors, values = _top_eigen(T[:k, :k], rank)
            residual = (remainder @ vectors[-block:]).norm(dim=0)  # of M^T M v = s^2 v, without another product
            if (residual <= torch.maximum(tol * _gaps(values), 1e-14 * values[0])).all():  # or all float64 can tell
                return basis @ vectors, values, residual
        if k + block > limit:
            raise UserError(f"the SVD of {name} has not converged with {k} vectors; a smaller rank is easier")
        for _ in range(2):  # twice is enough (Kahan), even where Z was in the basis but for rounding errors
            X = torch.linalg.qr(X - basis @ (basis.T @ X)).Q
        basis = torch.cat((basis, X), 1)


CACHE_FROM = 10**7  # numbers in the adapted weights; the SVD of smaller models takes less than a second or two


def svd_factors(weights, rank, device):
    """[(US [m, r], Vt [r, n])] in fp32 of weights {name: W}; of large models from the disk cache, where they are.

    The cache is a file in $TINYLORA_CACHE (default: ~/.cache/tinylora) under a name that depends on every bit of the
    weights. It is renamed into place when whole, and what fails its own checksum is made again. The ranks of a shard
    (model.Shard) divide the matrices among them and move one at a time to their devices.
    """
    path = cache_path(weights, rank, device) if sum(W.numel() for W in weights.values()) >= CACHE_FROM else None
    tensors = read_cache(path) if path else None
    if not all(all_gather(tensors is not None)):  # another run may be writing the file just now
        tensors = {}
        mine = list(weights.items())[rank_of() :: world_size()]
        for name, W in tqdm(mine, desc="SVD", leave=False, disable=None if path and is_chief() else True):
            U, S, Vt = top_svd(W.to(device), rank, name)
            tensors |= {f"{name}.US": (U * S).cpu(), f"{name}.Vt": Vt.cpu()}
        tensors = {name: t for share in all_gather(tensors) for name, t in share.items()}
        if path and is_chief():
            write_cache(path, tensors)
    return [(tensors[f"{name}.US"].to(device), tensors[f"{name}.Vt"].to(device)) for name in weights]


def cache_path(weights, rank, device):
    key = hashlib.sha256(f"svd-1 {rank}".encode())
    with ThreadPoolExecutor(4) as pool:
        checksums = pool.map(lambda W: weight_checksum(W.to(device)), weights.values())
        for (name, W), sums in zip(weights.items(), checksums):
            key.update(f"{name} {W.dtype} {list(W.shape)}".encode() + sums)
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tinylora")
    return os.path.join(os.environ.get("TINYLORA_CACHE") or default, key.hexdigest()[:40] + ".svd")


def weight_checksum(W):
    """Bytes that depend on every bit of W: its rows as 64-bit words times fixed odd numbers, summed modulo 2^64. Any
    one changed word changes its row's sum; no adversary is meant (the cache is the user's own). Integers are exact in
    any order, so this runs where the weights are, at the speed of memory: SHA-256 of 15 GB would take longer than the
    SVD on a GPU."""
    words = W.detach().contiguous().view(torch.int64 if W[0].nbytes % 8 == 0 else torch.int16).long()
    odd = torch.from_numpy(np.random.RandomState(0).randint(-(2**62), 2**62, words.shape[1]) * 2 + 1).to(W.device)
    sums = words @ odd if W.device.type == "cpu" else (words * odd).sum(1)  # CUDA multiplies no integer matrices
    return sums.cpu().numpy().tobytes()


def read_cache(path):
    try:
        with open(path, "rb") as f:
            digest, data = f.read(32), f.read()
    except OSError:
        return None
    if hashlib.sha256(os.path.basename(path).encode() + data).digest() == digest:
        return safetensors.torch.load(data)
    print(f"the cached SVD in {path} is damaged; it is made again")
    return None


def write_cache(path, tensors):
    data = safetensors.torch.save(tensors)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.{os.getpid()}.tmp", "wb") as f:  # the ranks of one run write at the same time
            f.write(hashlib.sha256(os.path.basename(path).encode() + data).digest() + data)
        os.replace(f.name, path)
    except OSError as error:
        print(f"the SVD could not be cached and will be made again next time: {error}")
        with suppress(OSError):
            os.remove(f"{path}.{os.getpid()}.tmp")
