"""support/svd.py: the top singular triplets are those of the full SVD, with signs that do not depend
on the machine, and the cache never gives those of other weights."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

from support import UserError, svd


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "svd-cache"))
    return tmp_path / "svd-cache"


def random_matrix(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------- the decomposition

i = torch.arange(1, 1001).double()
spikes = 1 + 3 / i.sqrt() * (i < 40)
SPECTRA = {"flat": None, "decaying": 1 / i, "spikes": spikes, "one value towers": 1 / i + 1e4 * (i == 1),
           "one value towers over spikes": spikes + 1e4 * (i == 1)}


@pytest.mark.parametrize("shape, gram", [((40, 30), 0), ((150, 400), 0), ((560, 1000), 2048), ((900, 600), 0)])
@pytest.mark.parametrize("kind", SPECTRA)
def test_the_top_triplets_are_those_of_the_full_svd(shape, gram, kind, monkeypatch, capsys):
    """Singular values to 1e-5; vectors, and their subspace, to an angle of 1e-4."""
    W = random_matrix(*shape)  # flat: neighbours are one per cent apart
    if kind != "flat":
        U, _, Vt = torch.linalg.svd(W, full_matrices=False)
        W = U * SPECTRA[kind][: min(shape)] @ Vt
    W = W.float()
    exact = torch.linalg.svd(W.double(), full_matrices=False)
    eigh, sizes = torch.linalg.eigh, []
    monkeypatch.setattr(svd, "GRAM_COLUMNS", gram)
    monkeypatch.setattr(torch.linalg, "svd", None)
    monkeypatch.setattr(torch.linalg, "eigh", lambda T: sizes.append(len(T)) or eigh(T))
    U, S, Vt = svd.top_svd(W, 2)
    assert max(sizes) < 500  # of 600 and 560: the Krylov space did not fill everything
    assert torch.allclose(S.double(), exact[1][:2], rtol=1e-5)
    for ours, theirs in ((U.double(), exact[0][:, :2]), (Vt.T.double(), exact[2][:2].T)):
        assert (ours - theirs @ (theirs.T @ ours)).norm(dim=0).max() <= 1e-4
        assert (ours - theirs * (ours * theirs).sum(0).sign()).norm(dim=0).max() <= 1e-4
    largest = U.abs().argmax(0)
    assert (U[largest, torch.arange(2)] > 0).all()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("W, rank", [(torch.eye(60), 2), (torch.eye(600), 2), (torch.eye(600), 20)])
def test_vectors_that_are_not_unique_are_reported(W, rank, capsys):
    U, S, Vt = svd.top_svd(W, rank, "model.x")
    assert torch.allclose(S, torch.ones(rank)) and torch.allclose(U.T @ U, torch.eye(rank), atol=1e-5)
    assert "note: the singular values 1, 1, 1" in (out := capsys.readouterr().out)
    assert "of model.x nearly coincide" in out


def test_what_does_not_converge_is_refused_and_a_slow_matrix_is_not():
    with pytest.raises(UserError, match="of model.y has not converged with 32 vectors"):
        svd.block_lanczos(random_matrix(600, 600), 2, 32, "model.y")
    slow = torch.diag((1 - (torch.arange(600) / 600) ** 3).sqrt())  # takes all of the space
    assert torch.allclose(svd.top_svd(slow, 2)[1], slow.diag()[:2])


def test_a_matrix_of_zeros_has_factors_of_zeros():
    [(US, Vt)] = svd.svd_factors({"zero": torch.zeros(30, 20)}, 2, "cpu")
    assert not US.any() and torch.isfinite(Vt).all()


@pytest.mark.parametrize("shape", [(20, 30), (600, 700)])
def test_signs_inside_the_svd_change_nothing(monkeypatch, shape):
    W, eigh, qr = random_matrix(*shape), torch.linalg.eigh, torch.linalg.qr
    expected = svd.top_svd(W, 2)

    class Flipped(SimpleNamespace):
        def __iter__(self):
            return iter((self.Q, self.R))

    def flipped_qr(Z):
        Q, R = qr(Z)
        return Flipped(Q=-Q, R=-R)

    monkeypatch.setattr(torch.linalg, "eigh", lambda T: (eigh(T)[0], -eigh(T)[1]))
    monkeypatch.setattr(torch.linalg, "qr", flipped_qr)
    for a, b in zip(expected, svd.top_svd(W, 2)):
        assert torch.allclose(a, b, atol=1e-6)


def test_factors_are_the_same_for_any_thread_count():
    code = ("import sys, torch; sys.path.insert(0, '.'); from support import svd; torch.set_num_threads({});"
            "W = torch.randn(700, 600, generator=torch.Generator().manual_seed(0));"
            "print([t.tolist() for t in svd.top_svd(W, 2)])")
    one, four = (json.loads(subprocess.check_output([sys.executable, "-c", code.format(n)], cwd=ROOT)) for n in (1, 4))
    for a, b in zip(one, four):
        assert np.abs(np.array(a) - np.array(b)).max() <= 1e-6 * np.abs(np.array(a)).max()


# --------------------------------------------------------------------------------------- the cache

WEIGHTS = {"a": random_matrix(40, 30).float(), "b": torch.eye(7) + 0.1}


@pytest.fixture
def factors(monkeypatch):
    """svd_factors with the cache on, as a flat list of tensors; factors.made: the matrices it took apart."""
    top_svd, made = svd.top_svd, []
    monkeypatch.setattr(svd, "CACHE_FROM", 0)
    monkeypatch.setattr(svd, "top_svd", lambda W, rank, name: made.append(name) or top_svd(W, rank, name))

    def factors(weights=WEIGHTS, rank=1):
        made.clear()
        return [t for pair in svd.svd_factors(weights, rank, "cpu") for t in pair]

    factors.made = made
    return factors


def test_factors_are_cached_and_a_file_that_cannot_be_read_is_made_again(factors, cache_dir):
    first = factors()
    assert factors.made == ["a", "b"]
    assert all(map(torch.equal, first, factors())) and factors.made == []
    [file] = cache_dir.iterdir()
    content = file.read_bytes()
    for damaged in (content[:-1], content + b"x", b"", b"?" + content[1:]):
        file.write_bytes(damaged)
        assert all(map(torch.equal, first, factors())) and factors.made == ["a", "b"]
        assert file.read_bytes() == content


@pytest.mark.parametrize("change", [
    {"a": WEIGHTS["a"].index_put((torch.tensor([39]), torch.tensor([29])), torch.tensor(0.5))},
    {"a": WEIGHTS["a"].flip(0)}, {"b": WEIGHTS["b"].roll(1, 1)}, {"a": WEIGHTS["a"].bfloat16()},
    {"c": WEIGHTS["b"]}, {"a": WEIGHTS["a"].T.contiguous()}, {"a": WEIGHTS["a"] * 1.0001}])
def test_the_cache_holds_nothing_of_other_weights(factors, change):
    factors()
    assert not any(map(torch.equal, factors(rank=2), factors())) and factors.made == []
    factors(WEIGHTS | change)
    assert factors.made == list(WEIGHTS | change)


def test_the_cache_of_a_large_matrix_sees_a_fine_tuning_of_every_part(cache_dir):
    W = random_matrix(3000, 700).bfloat16()
    paths = {svd.cache_path({"W": W}, 2)}
    for rows, columns in ((slice(0, 1), slice(0, 1)), (slice(7, 9), slice(3, 5)), (slice(2999, 3000), slice(0, 700))):
        changed = W.clone()
        changed[rows, columns] *= 1.01
        paths.add(svd.cache_path({"W": changed}, 2))
    assert len(paths) == 4


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.delenv("TINYLORA_CACHE")
    for name, value, folder in (("HOME", "/h", "/h/.cache/tinylora/"), ("TINYLORA_CACHE", "/t", "/t/")):
        monkeypatch.setenv(name, value)
        path = svd.cache_path(WEIGHTS, 1)
        assert path.startswith(folder) and "/" not in path[len(folder):]


def test_a_cache_that_cannot_be_written_stops_nothing(factors, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "file"))
    assert len(factors()) == 4 and "note: the SVD is not cached" in capsys.readouterr().out
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "full"))

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(svd, "save_file", full)
    assert len(factors()) == 4 and "No space left" in capsys.readouterr().out
    assert not list((tmp_path / "full").iterdir())


def test_small_models_leave_no_cache(cache_dir):
    svd.svd_factors(WEIGHTS, 2, "cpu")
    assert not cache_dir.exists()
