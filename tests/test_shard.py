"""One copy of the weights on several ranks, against the same model on one. As a script, the ranks' part of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_refused, make_checkpoint, run_script
from forks import fork_ranks, fork_script
from safetensors.torch import load_file

import eval_math
import grpo
import model
import sample
import sft
import tinylora
from configurator import UserError, configure

METHODS = {"tinylora": dict(rank=2, u=3, n_tie=4), "lora_xs": dict(rank=2), "lora": dict(rank=3), "full": {}}
IDS = torch.randint(5, 200, (3, 11), generator=torch.Generator().manual_seed(0))
PROMPTS = [[7, 8, 9], [20, 21, 22, 23, 24, 25], [40]]


def torchrun(processes, *args, **env):
    return run_script("-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", *args, **env)


def count_threads(folder):
    """An environment in which a rank says at its end how many threads of gloo are left: one that is may abort it."""
    (folder / "sitecustomize.py").write_text("""
import atexit, os
def names():
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/comm") as file:
                yield file.read()
        except OSError:
            pass  # it ended just now
def count():
    os.write(2, b"gloo threads: %d\\n" % sum("gloo" in name for name in names()))
if "RANK" in os.environ and os.path.isdir("/proc/self/task"):
    atexit.register(count)
""")
    return {"PYTHONPATH": str(folder)}


def settings(checkpoint, method, shard, **changes):
    options = dict(method=method, model=checkpoint, shard=shard, kl_coef=0.1 if method != "full" else 0.0,
                   micro_batch_tokens=60, **METHODS[method]) | changes
    return SimpleNamespace(**{key: value for key, value in vars(grpo).items() if key.islower()} | options)


def rows():
    """Nine rows of odd lengths, the same everywhere."""
    rng = torch.Generator().manual_seed(3)

    def ids(length):
        return torch.randint(5, 200, (length,), generator=rng).tolist()

    return [grpo.Row(ids(3 + i % 4), ids(1 + i), [-1.0] * (1 + i), 0.5 - i % 3) for i in range(9)]


def experiment(checkpoint, method, directory, shard=1, data_rank=0, data_world=1):
    """What a trainer does with a model, from the checkpoint `start` on: two updates, samples, files. Returns it all."""
    cfg = settings(checkpoint, method, shard)
    net, tokenizer = model.load_model(checkpoint, "float32", "cpu", shard), model.load_tokenizer(checkpoint)
    parameters, identity = grpo.trained_parameters(net, cfg)
    optimizer = torch.optim.Adam(parameters.values(), lr=0.01, eps=0.01)  # eps: no update of the size of noise
    file = str(directory / method / "start.safetensors")
    step, history, _ = grpo.load_checkpoint(file, parameters, optimizer, identity)
    out = {"logits": net(IDS).detach(), "block_bytes": sum(p.nbytes for p in net.model.layers.parameters()),
           "cache_shape": tuple(sample.KVCache(net.config, 5, 7, net.head).entries[0].shape),
           "kept_bytes": sum(p.untyped_storage().nbytes() for p in net.model.layers.parameters())}
    everything = rows()
    tokens = sum(len(row.ids) for row in everything)
    for i in range(2):
        optimizer.zero_grad(set_to_none=False)
        sums = grpo.accumulate_gradient(net, tokenizer, everything[data_rank::data_world], cfg, 9, tokens)
        norm = grpo.update(optimizer, parameters.values(), 0.5)
        [loss] = grpo.all_reduce([sums["loss"]], net)
        out |= {f"norm{i}": torch.tensor(norm), f"loss{i}": torch.tensor(loss)}
        out |= {f"gradient{i}.{name}": model.whole(p, p.grad.clone()) for name, p in parameters.items()}
    for temperature in (0.0, 1.0):
        groups = sample.generate(net, tokenizer, PROMPTS, 3, 9, temperature, seed=5)
        out[f"tokens{temperature}"] = [[c.ids for c in group] for group in groups]
        out[f"logprobs{temperature}"] = torch.tensor([x for group in groups for c in group for x in c.logprobs])
    here = SimpleNamespace(out_dir=str(directory / method / f"of_{shard}"), method=method, model=checkpoint,
                           save_dtype="float32")
    os.makedirs(here.out_dir, exist_ok=True)
    grpo.save_checkpoint(here.out_dir + "/checkpoint.safetensors", parameters, optimizer, 2, history, identity)
    grpo.save_trained(net, here)
    return out


def write_start(checkpoint, method, directory):
    """A checkpoint of one process whose adapter is not 0, or whose weights have moved, with Adam's moments."""
    net = model.load_model(checkpoint, "float32", "cpu")
    parameters, identity = grpo.trained_parameters(net, settings(checkpoint, method, 1))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters.values():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    optimizer = torch.optim.Adam(parameters.values(), lr=0.01, eps=0.01)
    for p in parameters.values():
        p.grad = 0.1 * torch.randn(p.shape, generator=generator)
    optimizer.step()
    (directory / method).mkdir()
    history = {"seconds": 0.0, "base": 0.0, "accuracy": None, "evaluated": None, "best": 0.0}
    grpo.save_checkpoint(str(directory / method / "start.safetensors"), parameters, optimizer, 0, history, identity)


def main(checkpoint, directory, shard):
    """Of every rank: run the experiments, and keep what came out."""
    tinylora.CACHE_FROM, os.environ["TINYLORA_CACHE"] = 0, str(directory / "cache")
    data_rank, data_world, _ = grpo.start_ranks(settings(checkpoint, "full", shard, device="cpu"))
    out = {method: experiment(checkpoint, method, directory, shard, data_rank, data_world) for method in METHODS}
    torch.save(out, directory / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(checkpoint, tmp_path_factory):
    """{method: (what one process found, what each of four ranks in two shards found, the directory)}."""
    directory = tmp_path_factory.mktemp("shard")
    for method in METHODS:
        write_start(checkpoint, method, directory)
    for done in fork_ranks(4, "tests/test_shard.py", checkpoint, directory, 2):
        assert done.returncode == 0, done.stderr
    ranks = [torch.load(directory / f"rank{i}.pt") for i in range(4)]
    return {method: (experiment(checkpoint, method, directory), [rank[method] for rank in ranks], directory / method)
            for method in METHODS}


def close(a, b, tol=1e-5):
    return (a.double() - b.double()).norm() <= tol * b.double().norm()


@pytest.mark.parametrize("method", METHODS)
def test_every_rank_computes_the_same_logits(both, method):
    one, ranks, _ = both[method]
    for rank in ranks:
        assert close(rank["logits"], one["logits"]) and one["logits"].norm() > 1


@pytest.mark.parametrize("method", METHODS)
def test_gradient_norm_and_loss_are_those_of_one_process(both, method):
    """Of every trained parameter, whole, after rows were divided between two shards: nothing counts twice."""
    one, ranks, _ = both[method]
    names = [name for name in one if name.startswith("gradient")]
    assert names and all(one[name].norm() > 0 for name in names if "0." in name)
    for name in names:
        assert close(ranks[0][name], one[name]), name
    for rank in ranks:
        for name in ("norm0", "norm1", "loss0", "loss1"):
            assert close(rank[name], one[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_tokens_are_those_of_one_process(both, method):
    one, ranks, _ = both[method]
    for rank in ranks:
        for temperature in (0.0, 1.0):
            assert rank[f"tokens{temperature}"] == one[f"tokens{temperature}"]
            assert close(rank[f"logprobs{temperature}"], one[f"logprobs{temperature}"])
    for shard in (ranks[:2], ranks[2:]):  # to the bit
        assert torch.equal(shard[0]["logprobs1.0"], shard[1]["logprobs1.0"])


@pytest.mark.parametrize("method", METHODS)
def test_files_are_those_of_one_process(both, method):
    """The ranks began with a checkpoint of one process, and leave the same files as it: names, shapes, numbers."""
    directory = both[method][2]
    assert sorted(os.listdir(directory / "of_1")) == sorted(os.listdir(directory / "of_2"))
    trained = "model/model.safetensors" if method == "full" else "adapter.safetensors"
    for file in ("checkpoint.safetensors", trained):
        one, two = (load_file(directory / of / file) for of in ("of_1", "of_2"))
        assert list(one) == list(two)
        assert all(one[name].shape == two[name].shape and close(two[name], one[name]) for name in one)
    if method == "full":
        assert model.load_model(str(directory / "of_2" / "model"), device="cpu").config.num_key_value_heads == 2
    tensors, info = grpo.read_checkpoint(str(directory / "of_2" / "checkpoint.safetensors"))
    assert info["step"] == 2 and tensors


def test_a_rank_holds_half_of_the_blocks(both):
    """All but the norms, and not as a view of the whole."""
    one, ranks, _ = both["tinylora"]
    norms = 2 * 2 * 32 * 4  # two a block, two blocks, float32
    for rank in ranks:
        assert rank["block_bytes"] == rank["kept_bytes"] == (one["block_bytes"] - norms) // 2 + norms
        assert rank["cache_shape"] == (2, 5, 1, 7, 8) and one["cache_shape"] == (2, 5, 2, 7, 8)  # half of the key heads


def test_as_many_rows_are_sampled_as_fit_the_rank_with_the_least_memory(net):
    a_row = 100 * 2 * 2 * 2 * 8 * 4 + 16 * net.config.vocab_size  # tokens; k, v; layers, key heads, size, bytes; logits
    assert sample.fitting_rows(net, 100, 400) == 400
    net.shard = SimpleNamespace(device=torch.device("cpu"), least=lambda budget: min(budget, 10.5 * a_row))
    assert sample.fitting_rows(net, 100, 400) == 10


def test_the_ranks_share_one_cached_svd(both, net):
    """Divided among them, and the same file that one process would look for."""
    directory = both["tinylora"][2].parent
    weights = {name: linear.weight for name, linear in tinylora.adapted_linears(net).items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYLORA_CACHE", str(directory / "cache"))
        [file] = os.listdir(directory / "cache")
        path = tinylora.cache_path(weights, 2)
        assert os.path.basename(path) == file
        cached = tinylora.read_cache(path)
    for (name, W), (US, Vt) in zip(weights.items(), tinylora.svd_factors(weights, 2)):
        assert close(cached[f"{name}.US"], US) and close(cached[f"{name}.Vt"], Vt) and len(US) == len(W)


# ------------------------------------------------------------------------------------------------------- whole runs


def args(module, checkpoint, problems, out_dir, **changes):
    options = dict(model=checkpoint, dataset=problems, eval_dataset=problems, out_dir=out_dir, max_steps=2,
                   batch_size=4, max_new_tokens=9, eval_size=5, device="cpu", seed=1337) | changes
    if module is grpo:
        options = dict(group_size=4, kl_coef=0.5) | options
    return [f"--{key}={value}" for key, value in options.items()]


def log_of(out_dir):
    lines = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_grpo_on_two_ranks_learns_what_it_does_on_one(checkpoint, problems, tmp_path, net):
    """From a v with a KL gradient, so that there is something to learn; then one process goes on with the result."""
    adapter = tinylora.add_adapter(net, rank=2, u=2, n_tie=2, seed=1337)
    torch.nn.init.normal_(adapter.v, std=0.2, generator=torch.Generator().manual_seed(0))
    history = {"seconds": 0.0, "base": 0.0, "accuracy": None, "evaluated": None, "best": 0.0}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        grpo.save_checkpoint(str(tmp_path / name / "checkpoint.safetensors"), dict(adapter.named_parameters()),
                             torch.optim.Adam(adapter.parameters()), 0, history, adapter.meta)
    options = dict(init_from="resume", rank=2, u=2, n_tie=2, batch_size=2)
    grpo.train(configure(vars(grpo), args(grpo, checkpoint, problems, tmp_path / "one", **options)))
    done = torchrun(2, "grpo.py", *args(grpo, checkpoint, problems, tmp_path / "two", shard=2, **options),
                    **count_threads(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("gloo threads: 0") == 2 or not os.path.isdir("/proc/self"), done.stderr
    assert "with 14 numbers" in done.stdout.splitlines()[-1] and "2 process(es)" in done.stdout
    one, two = (load_file(tmp_path / d / "adapter.safetensors")["v"] for d in ("one", "two"))
    assert torch.allclose(one, two, rtol=1e-4, atol=1e-5) and not torch.equal(one, adapter.v.detach())
    for here, there in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        for key in ("reward", "length", "equal_groups", "eval"):
            assert here.get(key) == there.get(key)
        if "grad_norm" in here:
            assert there["grad_norm"] == pytest.approx(here["grad_norm"], rel=1e-4) and here["grad_norm"] > 0
    grpo.train(configure(vars(grpo), args(grpo, checkpoint, problems, tmp_path / "two", **options | {"max_steps": 3})))
    assert log_of(tmp_path / "two")[-1]["step"] == 3


def test_pretraining_on_two_ranks_learns_what_it_does_on_one(checkpoint, problems, tmp_path):
    options = dict(method="full", random_init=True, lr=3e-3, max_steps=3, eval_dataset="")
    sft.train(configure(vars(sft), args(sft, checkpoint, problems, tmp_path / "one", **options)))
    for done in fork_ranks(2, "sft.py", *args(sft, checkpoint, problems, tmp_path / "two", shard=2, **options)):
        assert done.returncode == 0, done.stderr
    one, two = (log_of(tmp_path / d) for d in ("one", "two"))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    one, two = (model.load_model(str(tmp_path / d / "model"), device="cpu")(IDS) for d in ("one", "two"))
    assert close(two, one, 1e-2)  # Adam makes steps of full size of gradients that are next to 0


@pytest.mark.parametrize("shard", [1, 2])
def test_benchmarks_and_samples_on_two_ranks_are_those_of_one(checkpoint, problems, tmp_path, net, shard):
    """Shares of the problems, or of the weights; with an adapter that is cut; begun by one process, resumed by two."""
    adapter = tinylora.add_adapter(net, "lora", rank=2)
    for p in adapter.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(0))
    tinylora.save_adapter(adapter, str(tmp_path / "adapter.safetensors"))
    common = [f"--model={checkpoint}", f"--adapter={tmp_path}", "--max_new_tokens=5", "--seed=3", "--device=cpu"]
    asked = ["eval_math.py", *common, f"--dataset={problems}", "--num_problems=7", "--n=3", f"--out_dir={tmp_path}/run"]
    done = fork_script(*asked)
    assert done.returncode == 0, done.stderr
    [path] = (tmp_path / "run").glob("*.jsonl")
    settings, groups = eval_math.read_responses(str(path))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:8]))  # two problems and a third of one
    first, second = fork_ranks(2, *asked, "--init_from=resume", f"--shard={shard}")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "2 of them answered already" in first.stdout and not second.stdout
    assert eval_math.read_responses(str(path)) == (settings, groups) and len(groups) == 7
    assert len(path.read_text().splitlines()) == len(lines)  # nothing twice
    said = ["sample.py", *common, "--prompt=Tom has 3 apples."]
    both = fork_ranks(2, *said, f"--shard={shard}")
    if shard == 1:
        assert all("as many processes as shard (1)" in rank.stderr and rank.returncode == 2 for rank in both)
        assert_refused(fork_script(*said[:-1], "--prompt=-", "--shard=2"), "no shard")
        assert_refused(fork_script("sample.py", "--adapter=,a", "--shard=2"), "several adapters")
    else:
        one, first, second = ([line for line in rank.stdout.splitlines() if "; command line)" not in line]
                              for rank in (fork_script(*said), *both))
        assert one[:-1] == first[:-1] != [] and second == []  # but for the speed


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for the ranks' processes in /proc")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_ranks_leave_together(checkpoint, problems, tmp_path, name):
    """One rank of two is told to stop, or dies: both have saved the same step, or the run ends and does not hang."""
    out_dir = tmp_path / "run"
    options = dict(max_steps=10**6, save_interval=0, eval_dataset="", shard=2)
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "grpo.py",
               *args(grpo, checkpoint, problems, out_dir, **options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | count_threads(tmp_path)
    run = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        began = time.time()
        while not (out_dir / "log.jsonl").exists() or len(log_of(out_dir)) < 2:
            assert run.poll() is None and time.time() - began < 120
            time.sleep(0.2)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        [second] = [pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(int(second), getattr(signal, name))
        output, errors = run.communicate(timeout=90)
    finally:
        run.terminate()
    assert run.returncode
    if name == "SIGTERM":
        _, info = grpo.read_checkpoint(str(out_dir / "checkpoint.safetensors"))
        assert info["step"] == log_of(out_dir)[-1]["step"] and f"interrupted: {info['step']} steps" in output
        assert 'grpo.py", line' not in errors and errors.count("gloo threads: 0") == 2
    else:
        assert "SIGKILL" in errors or "Signal 9" in errors


@pytest.mark.slow
def test_compiled_blocks_on_two_ranks(checkpoint, problems, tmp_path):
    options = dict(rank=2, max_steps=2, eval_dataset="")
    sft.train(configure(vars(sft), args(sft, checkpoint, problems, tmp_path / "one", **options)))
    options |= dict(shard=2, compile=True, packing=False)
    done = torchrun(2, "sft.py", *args(sft, checkpoint, problems, tmp_path / "two", **options))
    assert done.returncode == 0, done.stderr
    one, two = (log_of(tmp_path / d) for d in ("one", "two"))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=1e-4)


def test_what_does_not_fit_is_refused_in_one_line(checkpoint, problems, tmp_path):
    options = dict(eval_dataset="", out_dir=tmp_path / "run")
    done = fork_script("grpo.py", *args(grpo, checkpoint, problems, shard=2, **options))
    assert_refused(done, "shard = 2", "torchrun --nproc_per_node=2")
    done = fork_script("sft.py", *args(sft, checkpoint, problems, shard=0, **options))
    assert_refused(done, "shard must be at least")
    done = torchrun(2, "grpo.py", *args(grpo, checkpoint, problems, shard=3, **options))
    assert "error: shard = 3 does not divide the number of processes, 2" in done.stderr and done.returncode == 1
    assert 'grpo.py", line' not in done.stderr
    with pytest.raises(UserError, match="shard = 3 does not cut this model, with 2 key heads and 48 inner units"):
        model.load_model(checkpoint, "float32", "cpu", shard=3)
    with pytest.raises(UserError, match="shard = 2 does not cut this model, with 2 key heads and 49 inner units"):
        model.load_model(make_checkpoint(tmp_path / "odd", intermediate_size=49), "float32", "cpu", shard=2)
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
