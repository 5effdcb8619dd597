"""Several processes against one: rows divided among them, and one copy of the weights spread over 2 or 4 of them.

As a script, this file is what each of the processes runs.
"""

import gc
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import assert_refused, make_checkpoint
from forks import fork_ranks, fork_script, start_ranks
from safetensors import safe_open
from safetensors.torch import load_file

import grpo
import model
import sft
import tinylora
from configurator import configure
from support import parallel, svd
from support.data import read_responses

INNER = 50  # so that no number of processes divides all matrices evenly
MESHES = {"one": (1, 1), "2x2": (2, 2), "4x2": (4, 2), "4x4": (4, 4)}  # processes, and how many hold one copy
TINYLORA, LORA_XS = dict(method="tinylora", rank=2, u=3, n_tie=4), dict(method="lora_xs", rank=2)
LORA, FULL = dict(method="lora", rank=3), dict(method="full", lr=0.001)
RUNS = {  # three rows a step and three or five in an evaluation: one process of four has none, or fewer than others
    "grpo tinylora": (grpo, TINYLORA | dict(kl_coef=0.5, num_passes=2)),
    "grpo lora_xs": (grpo, LORA_XS | dict(kl_coef=0.5, recompute=True, objective="gspo")),
    "grpo lora": (grpo, LORA | dict(num_passes=2, recompute=True)),
    "grpo full": (grpo, FULL | dict(num_passes=2)),
    "sft tinylora": (sft, TINYLORA | dict(recompute=True)),
    "sft lora_xs": (sft, LORA_XS | dict(eval_size=3)),
    "sft lora": (sft, LORA | dict(weight_decay=0.1)),
    "sft full": (sft, FULL | dict(recompute=True, grad_clip=0.1, targets="o_proj,mlp")),
}
TASK = """
def reward(problem, completion):  # in some groups all earn the same
    return float(completion.ids[0] % 2)
"""


def arguments(folder, name, out_dir, **changes):
    """The command line of a run. The folder holds the checkpoint, the problems and the task."""
    script, settings = RUNS[name]
    options = dict(model=folder / "model", dataset=folder / "rows.jsonl", eval_dataset=folder / "rows.jsonl",
                   out_dir=out_dir, batch_size=3, lr=0.02, max_steps=3, max_new_tokens=4, eval_size=5, eval_interval=0,
                   device="cpu", seed=3, micro_batch_tokens=40)
    if script is grpo:
        options |= dict(group_size=4)
    options |= settings | changes
    return [str(folder / "task.py"), *(f"--{key}={value}" for key, value in options.items())]


def run(folder, name, out_dir, patch, **changes):
    """A run in this process, and what was seen of it: the gradient of each update, whole, after clipping; the matrices
    whose SVD was made here; how many passes were empty; in the end what of the blocks is held here."""
    script, _ = RUNS[name]
    seen = {"gradients": [], "matrices": [], "empty": 0, "left": 0}

    def reducing(parameters, grad_clip, real=script.reduce_gradients):
        norm = real(parameters, grad_clip)
        gradients = [parallel.full_tensor(p.grad) for p in parameters]
        seen["gradients"].append([g.flatten().clone() for g in gradients if g is not None])
        return norm

    def decomposing(W, rank, name, real=svd.top_svd):
        seen["matrices"].append((name, tuple(W.shape)))
        return real(W, rank, name)

    def passing(trunk, arguments):
        seen["empty"] += arguments[0].tolist() == [[0]]

    def sharding(net, shard, real=tinylora.shard_model):
        seen["net"] = net
        net.model.register_forward_pre_hook(passing)
        real(net, shard)

    def leaving(real=parallel.dist.destroy_process_group):
        seen["left"] += 1

    patch.setattr(script, "reduce_gradients", reducing)
    patch.setattr(svd, "top_svd", decomposing)
    patch.setattr(tinylora, "shard_model", sharding)
    patch.setattr(parallel.dist, "destroy_process_group", leaving)
    functions = [getattr(script, key) for key in ("reward", "problems") if hasattr(script, key)]
    script.train(configure(script.Settings, *functions, argv=arguments(folder, name, out_dir, **changes)))
    if net := seen.pop("net", None):
        parts = [p.to_local() for p in net.model.layers.parameters()]
        seen["held"] = sum(part.untyped_storage().nbytes() for part in parts)
        seen["all"] = sum(p.nbytes for p in net.model.layers.parameters())
        deadline = time.monotonic() + 10  # gloo's threads let go of what they gathered a moment after it is there
        while (whole := whole_matrices()) and time.monotonic() < deadline:
            time.sleep(0.1)
        seen["whole"] = whole
    return seen


def whole_matrices():
    """How many tensors of this process hold a whole gate_proj."""
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    return sum(t.shape == (INNER, 32) and t.untyped_storage().nbytes() > 0 for t in tensors)


def main(folder, mesh):
    """Of every process: make the first step of all runs, or go on with them in one process group."""
    torch.set_num_threads(1)
    join = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda *a, **k: torch.distributed.is_initialized() or join(*a, **k)
    sys.modules["torch.optim.adam"]._default_to_fused_or_foreach = lambda *_, **__: (False, True)  # as on a GPU
    svd.CACHE_FROM, os.environ["TINYLORA_CACHE"] = 0, str(folder / mesh / "cache")
    changes = dict(max_steps=1) if mesh == "first" else dict(init_from="resume", shard=MESHES[mesh][1])
    seen = {}
    for name in RUNS:
        with pytest.MonkeyPatch.context() as patch:
            seen[name] = run(folder, name, folder / mesh / name, patch, **changes)
    torch.save(seen, folder / mesh / f"rank{parallel.rank_and_size()[0]}.pt")


def start(folder, mesh):
    """What each process of a mesh has seen."""
    processes, _ = MESHES.get(mesh, (1, 1))
    for done in fork_ranks(processes, __file__, folder, mesh):
        assert done.returncode == 0, done.stderr
    return [torch.load(folder / mesh / f"rank{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def folder(problems, tmp_path_factory):
    """A folder for all runs. In "first" each has made one step by one process."""
    folder = tmp_path_factory.mktemp("shard")
    make_checkpoint(folder / "model", intermediate_size=INNER)
    shutil.copy(problems, folder / "rows.jsonl")
    (folder / "task.py").write_text(TASK)
    start(folder, "first")
    for mesh in MESHES:
        shutil.copytree(folder / "first", folder / mesh, ignore=shutil.ignore_patterns("cache", "*.pt"))
    return folder


@pytest.fixture(scope="module")
def one(folder):
    """{name: what was seen of a run that one process went on with}."""
    [seen] = start(folder, "one")
    return seen


@pytest.fixture(scope="module", params=[mesh for mesh in MESHES if mesh != "one"])
def mesh(folder, request):
    """(name of the mesh, [what each process saw])."""
    return request.param, start(folder, request.param)


def log_of(out_dir):
    """The lines of a log, without what is measured (seconds) and without what is rounding alone (sampler - trainer)."""
    lines = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "diff", "max_diff")} for line in lines]


def assert_same_log(there, here):
    for got, expected in zip(log_of(there), log_of(here), strict=True):
        assert got.pop("eval", {}) == pytest.approx(expected.pop("eval", {}), rel=1e-5)
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)


def close(a, b, tolerance=1e-5):
    return (a.double() - b.double()).norm() <= tolerance * b.double().norm()


@pytest.mark.parametrize("name", RUNS)
def test_several_processes_do_what_one_does(folder, one, mesh, name):
    """From the checkpoint of one process on: gradients, logs and files."""
    mesh, ranks = mesh
    gradients, expected = ranks[0][name]["gradients"], one[name]["gradients"]
    assert len(gradients) == len(expected) == 2 * RUNS[name][1].get("num_passes", 1)
    assert all(gradient.norm() > 0 for gradient in expected[0])
    for got, wanted in zip(gradients[0], expected[0], strict=True):
        assert close(got, wanted)
    here, there = folder / "one" / name, folder / mesh / name
    assert_same_log(there, here)
    files = [path.relative_to(here) for path in here.rglob("*.safetensors")]
    assert sorted(files) == sorted(path.relative_to(there) for path in there.rglob("*.safetensors")) and len(files) > 1
    for file in files:
        got, expected = load_file(there / file), load_file(here / file)
        assert list(got) == list(expected)
        for key, t in expected.items():
            assert got[key].shape == t.shape and close(got[key], t, 1e-4), key
    assert all(rank[name]["left"] == 1 for rank in ranks)


def test_in_every_run_a_process_has_less_to_do_than_another(mesh):
    _, ranks = mesh
    assert all(sum(rank[name]["empty"] for rank in ranks) > 2 for name in RUNS)


def test_a_process_holds_its_part_of_the_blocks_alone(mesh):
    mesh, ranks = mesh
    _, shard = MESHES[mesh]
    for name in RUNS:
        for rank in (rank[name] for rank in ranks):
            assert rank["held"] == pytest.approx(rank["all"] / shard, rel=0.04)
            assert rank["whole"] == 0


def test_the_svd_is_divided_and_takes_whole_matrices(folder, one, mesh):
    """One process makes the next. Then all find it in the cache, under the name that one process gives it."""
    mesh, ranks = mesh
    first, *others = RUNS
    done = [rank[first]["matrices"] for rank in ranks]
    assert sorted(sum(done, [])) == sorted(one[first]["matrices"]) and len(one[first]["matrices"]) == 14
    assert max(map(len, done)) - min(map(len, done)) <= 1
    assert not any(rank[name]["matrices"] for rank in ranks for name in others)
    [here], [there] = ([*(folder / name / "cache").iterdir()] for name in ("one", mesh))
    assert here.name == there.name
    for (name, t), (_, other) in zip(load_file(here).items(), load_file(there).items(), strict=True):
        assert close(other, t), name


@pytest.mark.parametrize("name", ["grpo full", "sft lora"])
def test_one_process_goes_on_with_what_several_saved(folder, one, mesh, name):
    mesh, _ = mesh
    outs = []
    for source in ("one", mesh):
        outs.append(folder / f"{name} after {source} for {mesh}")
        shutil.copytree(folder / source / name, outs[-1])
        script = f"{RUNS[name][0].__name__}.py"
        done = fork_script(script, *arguments(folder, name, outs[-1], max_steps=4, init_from="resume"))
        assert done.returncode == 0, done.stderr
    assert_same_log(outs[1], outs[0])
    assert log_of(outs[1])[-1]["step"] == 4


def test_groups_are_replaced_alike_with_one_copy_of_the_weights_and_with_two(folder, tmp_path):
    """Which groups replace others depends on the number of processes, so here it is the same."""
    for shard in (1, 2):
        options = dict(shard=shard, resample=2, group_size=2)
        for done in fork_ranks(2, "grpo.py", *arguments(folder, "grpo tinylora", tmp_path / str(shard), **options)):
            assert done.returncode == 0 and not done.stderr, done.stderr
    assert_same_log(tmp_path / "2", tmp_path / "1")
    assert max(line.get("groups", 0) for line in log_of(tmp_path / "1")) > 3


# ------------------------------------------------------------------------------------------------- the other scripts

LEAVING = """
import torch.distributed as dist
leave = dist.destroy_process_group
dist.destroy_process_group = lambda: (leave(), print("left"))
"""


@pytest.fixture(scope="module")
def adapted(checkpoint, tmp_path_factory):
    """The directory of an adapter that is not 0."""
    net = model.load_model(checkpoint, device="cpu")
    adapter = tinylora.add_adapter(net, "lora", rank=2)
    for p in adapter.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(0))
    directory = tmp_path_factory.mktemp("adapter")
    tinylora.save_adapter(adapter, str(directory / "adapter.safetensors"))
    return directory


@pytest.mark.parametrize("shard", [1, 2])
def test_two_processes_go_on_with_an_evaluation_of_one(checkpoint, problems, adapted, tmp_path, shard):
    asked = ["eval_math.py", f"--model={checkpoint}", f"--adapter={adapted}", "--max_new_tokens=5", "--device=cpu",
             f"--dataset={problems}", "--num_problems=5", "--n=3", f"--out_dir={tmp_path}"]
    done = fork_script(*asked)
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("*.jsonl")
    expected = read_responses(str(path))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]))  # the settings, one problem and a third of another
    first, second = fork_ranks(2, *asked, "--init_from=resume", f"--shard={shard}", setup=LEAVING)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "1 of them answered already" in first.stdout and second.stdout == "left\n" in first.stdout
    assert read_responses(str(path)) == expected and len(expected[1]) == 5
    assert len(path.read_text().splitlines()) == len(lines)  # nothing twice


def test_two_processes_with_one_copy_say_what_one_says(checkpoint, adapted, tmp_path):
    (tmp_path / "prompts.txt").write_text("Tom has 3 apples.\nHow many?\nIda has 2 coins.\n")
    asked = ["sample.py", f"--model={checkpoint}", f"--adapter={adapted}", f"--prompt_file={tmp_path}/prompts.txt",
             "--n=2", "--max_new_tokens=5", "--device=cpu"]
    one, first, second = fork_script(*asked), *fork_ranks(2, *asked, "--shard=2", setup=LEAVING)
    assert one.returncode == first.returncode == second.returncode == 0, first.stderr + second.stderr
    said, got = (process.stdout[process.stdout.index("###") :].rpartition("30 tokens")[0] for process in (one, first))
    assert said == got != "" and second.stdout == "left\n" in first.stdout
    for refused in fork_ranks(2, *asked, f"--adapter={adapted},", "--shard=2"):
        assert_refused(refused, "several adapters take a single process")


# ------------------------------------------------------------------------------------------------------- how runs end

ENDLESS = dict(max_steps=10**6, save_interval=0, eval_dataset="", shard=2)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_one_process_ends_all(folder, tmp_path, sent):
    """Told to stop, all have saved the same step. If one dies, the other ends and does not hang."""
    out_dir = tmp_path / "run"
    ranks = start_ranks(2, "grpo.py", *arguments(folder, "grpo tinylora", out_dir, **ENDLESS))
    while not (out_dir / "log.jsonl").exists() or len(log_of(out_dir)) < 2:
        time.sleep(0.1)  # a process of forks.py ends after two minutes in any case
    os.kill(ranks[1].pid, sent)
    first, second = (rank.wait() for rank in ranks)
    if sent == signal.SIGTERM:
        assert (first.returncode, second.returncode) == (130, 143), first.stderr + second.stderr
        assert "stopped: go on with" in first.stdout
        with safe_open(out_dir / "checkpoint.safetensors", "pt") as f:
            assert json.loads(f.metadata()["step"]) == log_of(out_dir)[-1]["step"]
    else:
        assert (first.returncode, second.returncode) == (1, -9)


def test_a_mistake_that_one_process_meets_ends_the_run(folder, tmp_path):
    """Under torchrun itself."""
    task = tmp_path / "task.py"
    task.write_text("""
import os
from support import UserError
def reward(problem, completion):
    if os.environ["RANK"] == "1":
        raise UserError("this row has no answer")
    return 0.0
""")
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "grpo.py", task]
    done = fork_script(*command, *arguments(folder, "grpo lora", tmp_path / "run", **ENDLESS)[1:])
    assert done.returncode == 1 and done.stderr.count("error: this row has no answer\n") == 1
    assert len(log_of(tmp_path / "run")) == 0


@pytest.mark.parametrize("processes, shard", [(1, 2), (1, 0), (2, 3)])
def test_a_shard_that_does_not_divide_the_processes_is_refused(folder, tmp_path, processes, shard):
    command = ["sft.py", *arguments(folder, "sft lora", tmp_path / "run", shard=shard)]
    for done in fork_ranks(processes, *command) if processes > 1 else [fork_script(*command)]:
        assert_refused(done, f"shard = {shard} must divide the number of processes, {processes}",
                       f"torchrun --nproc_per_node={max(1, shard)}")
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
