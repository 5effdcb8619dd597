"""Checkpoint directories (model.py) against transformers: weights, tokenizer, chat template, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SHARED, assert_refused, make_checkpoint, run_script
from forks import fork_script
from safetensors.torch import load_file, save_file

import model
import sample
import tinylora
from configurator import UserError

transformers = pytest.importorskip("transformers", reason="transformers is the oracle here (requirements-dev.txt)")

QWEN = dict(vocab_size=160, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=256)
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64)


def oracle(path, family, **changes):
    """A random checkpoint made by transformers, with large biases and norms so that none can be forgotten."""
    config_class, model_class = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }[family]
    torch.manual_seed(0)
    net = model_class(config_class(**QWEN | changes)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (0.15 if p.dim() == 2 else 0.7))
    net.save_pretrained(path)
    return net


VARIETIES = {
    "qwen2.5, untied": ("qwen2", dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen2.5, tied": ("qwen2", dict(tie_word_embeddings=True)),
    "llama-3.1, scaled rope": ("llama", dict(rope_parameters=LLAMA3_ROPE)),
    "llama-3.2, tied, own head_dim": (
        "llama", dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True, head_dim=16)),
    "llama-3, plain rope": ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=500000.0))),
    "llama-2, no grouped queries": ("llama", dict(num_key_value_heads=6)),
    "odd head_dim": ("qwen2", dict(hidden_size=40, num_attention_heads=4, num_key_value_heads=1, head_dim=24)),
}


@pytest.mark.parametrize("variety", VARIETIES)
def test_logits_equal_those_of_transformers(tmp_path, variety):
    family, changes = VARIETIES[variety]
    reference = oracle(tmp_path, family, **changes)
    net = model.load_model(str(tmp_path), device="cpu")
    ids = torch.randint(0, 160, (2, 200))  # past the original length of the scaled rope
    with torch.no_grad():
        ours, theirs = net(ids), reference(ids).logits
    assert theirs.std() > 0.5  # loud enough to tell
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("variety", VARIETIES)
def test_greedy_continuations_and_logprobs_of_a_ragged_batch_equal_those_of_transformers(tmp_path, variety):
    family, changes = VARIETIES[variety]
    reference = oracle(tmp_path, family, **changes)
    net = model.load_model(str(tmp_path), device="cpu")
    ids_only = SimpleNamespace(stop_ids={999}, pad_id=0, bos_ids=[], decode=lambda ids, skip_special: "")  # never stops
    prompts = [torch.randint(0, 160, (n,)).tolist() for n in (3, 70, 1, 12)]
    for prompt, [ours] in zip(prompts, sample.generate(net, ids_only, prompts, max_new_tokens=64, temperature=0)):
        ids = torch.tensor([prompt])
        theirs = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False,
                                    eos_token_id=None, pad_token_id=0)
        assert ours.ids == theirs[0, len(prompt) :].tolist()
        with torch.no_grad():
            logits = reference(theirs).logits[0, len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits, -1)[range(64), ours.ids]
        assert (torch.tensor(ours.logprobs) - logprobs).abs().max() <= 1e-4


def test_published_configs_are_read_as_the_new_style_ones(tmp_path):
    """torch_dtype, rope_theta and rope_scaling at top level, as the hub's files have them."""
    reference = oracle(tmp_path, "llama", rope_parameters=LLAMA3_ROPE)
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": raw.pop("dtype")}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ids = torch.randint(0, 160, (1, 200))
    with torch.no_grad():
        assert (model.load_model(str(tmp_path), device="cpu")(ids) - reference(ids).logits).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "file, numbers",
    [
        ("qwen2.5/config.0.5B-Instruct.json", (24, 896, 14, 2, 64, 151936, True, True, 1e6, None)),
        ("qwen2.5/config.1.5B.json", (28, 1536, 12, 2, 128, 151936, True, True, 1e6, None)),
        ("qwen2.5/config.7B-Instruct.json", (28, 3584, 28, 4, 128, 152064, False, True, 1e6, None)),
        ("llama3/config.3.1-8B-Instruct.json", (32, 4096, 32, 8, 128, 128256, False, False, 5e5, 8.0)),
        ("llama3/config.3.2-1B-Instruct.json", (16, 2048, 32, 8, 64, 128256, True, False, 5e5, 32.0)),
    ],
)
def test_published_configs_give_the_published_shapes(tmp_path, file, numbers):
    source = SHARED / "tokenizers" / file
    if not source.exists():
        pytest.skip("needs the published configs in ../shared/tokenizers")
    shutil.copy(source, tmp_path / "config.json")
    c = model.load_config(str(tmp_path))
    assert numbers == (c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim,
                       c.vocab_size, c.tie_word_embeddings, c.qkv_bias, c.rope_theta,
                       c.rope_scaling and c.rope_scaling["factor"])


def test_sharded_checkpoints_load(tmp_path):
    reference = oracle(tmp_path / "one", "qwen2")
    reference.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one, many = (model.load_model(str(tmp_path / d), device="cpu").state_dict() for d in ("one", "many"))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[k], many[k]) for k in one)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_saved_model_loads_in_transformers_with_equal_logits(tmp_path, family):
    reference = oracle(tmp_path / "a", family, tie_word_embeddings=family == "qwen2")
    model.save_model(model.load_model(str(tmp_path / "a"), device="cpu"), str(tmp_path / "b"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    ids = torch.randint(0, 160, (2, 30))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, reference(ids).logits)


def test_padding_on_the_right_changes_nothing(net):
    ids = torch.randint(0, 200, (1, 20))
    padded = torch.cat((ids, torch.full((1, 9), 3)), dim=1)
    assert (net(padded)[:, :20] - net(ids)).abs().max() < 1e-5


@pytest.mark.parametrize("variety", VARIETIES)
def test_bfloat16_is_no_further_from_float64_than_transformers(tmp_path, variety):
    """No larger mean square error, and the same first choice wherever its lead exceeds the error."""
    family, changes = VARIETIES[variety]
    reference = oracle(tmp_path, family, **changes)
    ids = torch.randint(0, 160, (4, 64))
    with torch.no_grad():
        exact = reference.double()(ids).logits
        theirs = reference.bfloat16()(ids).logits.double()
        ours = model.load_model(str(tmp_path), dtype="bfloat16", device="cpu")(ids).double()
    assert (ours - exact).square().mean() <= 1.1 * (theirs - exact).square().mean()
    best, second = exact.topk(2).values.unbind(-1)
    clear = best - second > 2 * (ours - exact).abs().amax(-1)
    assert clear.float().mean() > 0.3
    assert torch.equal(ours.argmax(-1)[clear], exact.argmax(-1)[clear])


# ------------------------------------------------------------------------------------------- what is refused, and how


def broken(name, tmp_path):
    path = make_checkpoint(tmp_path / "ok") and tmp_path / "ok"
    file = path / "model.safetensors"
    tensors = load_file(file)
    config = json.loads((path / "config.json").read_text())
    if name == "tensor missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    elif name == "tensor too many":
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
    elif name == "wrong shape":
        tensors["model.norm.weight"] = torch.ones(5)
    elif name == "NaN":
        tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    elif name == "int8":
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    elif name == "architecture":
        config["model_type"] = "gpt2"
    elif name == "rope":
        config["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0}
    elif name == "old rope":
        config["rope_scaling"] = {"type": "linear", "factor": 4.0}
    elif name == "quantised":
        config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    save_file(tensors, file)
    (path / "config.json").write_text(json.dumps(config))
    if name == "git-lfs pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif name == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    elif name == "no weights":
        file.unlink()
    elif name == "pickle":
        file.rename(path / "pytorch_model.bin")
    elif name == "config is no JSON":
        (path / "config.json").write_text("{")
    elif name in ("missing shard", "shard outside"):
        other = "model-00002-of-00002.safetensors" if name == "missing shard" else "../elsewhere.safetensors"
        index = {"weight_map": {"model.norm.weight": "model.safetensors", "lm_head.weight": other}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(path)


REFUSED = {
    "tensor missing": "model.layers.1.mlp.up_proj.weight",
    "tensor too many": "unexpected tensor model.layers.7",
    "wrong shape": "model.norm.weight has shape [5]",
    "NaN": "model.layers.0.mlp.up_proj.weight holds NaN",
    "int8": "model.norm.weight is torch.int8",
    "architecture": "model_type 'gpt2' is not supported",
    "rope": "rope type 'yarn' is not supported",
    "old rope": "rope type 'linear' is not supported",
    "quantised": "quantization_config is not supported",
    "missing shard": "model-00002-of-00002.safetensors is missing",
    "shard outside": "names a file outside the directory",
    "git-lfs pointer": "git-lfs pointer",
    "cut off": "damaged",
    "no weights": "model.safetensors is missing",
    "pickle": "is a pickle and is never read",
    "config is no JSON": "config.json cannot be read as JSON",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_broken_directory_is_refused_in_one_line(tmp_path, name):
    with pytest.raises(UserError) as error:
        model.load_model(broken(name, tmp_path), device="cpu")
    assert REFUSED[name] in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_the_line_and_the_exit_code_a_user_sees(tmp_path):
    assert_refused(fork_script("sample.py", f"--model={broken('tensor missing', tmp_path)}"), "tensor(s) missing")


@pytest.mark.parametrize(
    "file, text, words",
    [
        ("config.json", '{"model_type": "llama", "hidden_size": "8"}', "hidden_size must be a whole number"),
        ("config.json", '{"model_type": "llama"}', "key 'num_attention_heads' is missing"),
        ("config.json", '{"model_type": "llama", "num_attention_heads": 2, "hidden_size": 14}', "and head_dim be"),
        ("config.json", '{"model_type": "qwen2", "layer_types": ["sliding_attention"]}', "layer_types"),
        ("config.json", '{"model_type": "llama", "partial_rotary_factor": 0.5}', "partial_rotary_factor"),
        ("config.json", '{"model_type": "llama", "rope_theta": "1e4"}', "rope_theta must be a number"),
        ("model.safetensors.index.json", '["model.safetensors"]', "is not a JSON object"),
        ("model.safetensors.index.json", '{"weight_map": []}', "weight_map is empty"),
        ("config.json", '{"model_type": "llama", "rope_scaling": {"type": "llama3"}}', "rope settings lack factor"),
    ],
)
def test_malformed_files_are_refused_in_one_line(checkpoint, tmp_path, file, text, words):
    shutil.copytree(checkpoint, tmp_path / "broken")
    (tmp_path / "broken" / file).write_text(text) if text else (tmp_path / "broken" / file).unlink()
    with pytest.raises(UserError, match=words) as error:
        model.load_model(str(tmp_path / "broken"), device="cpu")
        model.load_tokenizer(str(tmp_path / "broken"))
    assert "\n" not in str(error.value)


def test_large_models_are_saved_in_shards_that_transformers_loads(tmp_path):
    reference = oracle(tmp_path / "a", "qwen2", tie_word_embeddings=True)
    net = model.load_model(str(tmp_path / "a"), device="cpu")
    model.save_model(net, str(tmp_path / "b"), max_shard_bytes=100_000)
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    ids = torch.randint(0, 160, (2, 30))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, reference(ids).logits)
        assert torch.equal(model.load_model(str(tmp_path / "b"), device="cpu")(ids), net(ids))


def test_a_directory_that_is_saved_to_again_holds_the_last_weights_alone(tmp_path):
    for seed, max_shard_bytes in enumerate((10**9, 20_000, 60_000, 10**9)):  # in one file, in shards, in fewer, in one
        net = model.load_model(make_checkpoint(tmp_path / f"base{seed}", seed=seed), dtype="float32", device="cpu")
        model.save_model(net, str(tmp_path / "saved"), max_shard_bytes=max_shard_bytes)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
        for loaded in (model.load_model(str(tmp_path / "saved"), dtype="float32", device="cpu"), theirs):
            assert all(torch.equal(loaded.state_dict()[name], p) for name, p in net.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]


def test_a_tied_file_may_hold_an_equal_copy_of_the_embedding_but_no_other(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    model.load_model(str(tmp_path / "copy"), device="cpu")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(UserError, match="lm_head.weight is not a copy"):
        model.load_model(str(tmp_path / "copy"), device="cpu")


def test_a_merged_model_loads_in_transformers_with_equal_logits(tmp_path):
    oracle(tmp_path / "a", "qwen2", tie_word_embeddings=True)
    net = model.load_model(str(tmp_path / "a"), device="cpu")
    torch.nn.init.normal_(tinylora.add_adapter(net, u=5, n_tie=0).v, std=0.3)
    ids = torch.randint(0, 160, (2, 30))
    with torch.no_grad():
        unmerged = net(ids)
        model.save_model(tinylora.merge(net), str(tmp_path / "b"))
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
        assert (again(ids).logits - unmerged).abs().max() <= 1e-4


def test_a_hub_name_works_offline_once_it_is_downloaded(checkpoint, tmp_path):
    """A cache as huggingface_hub lays it out, and no network."""
    repository = tmp_path / "models--owner--name"
    shutil.copytree(checkpoint, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    options = dict(HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="1")
    done = run_script("sample.py", "--model=owner/name", "--n=1", "--max_new_tokens=3", **options)
    assert done.returncode == 0 and "---" in done.stdout, done.stderr
    assert_refused(run_script("sample.py", "--model=owner/other", **options), "'owner/other' is no local directory")


FIRST_CALLS = """
import torch

class Calls(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if args and torch.is_tensor(args[0]):
            seen.setdefault(function.__name__, args[0].numel())
        return function(*args, **kwargs or {})

seen = {}
with Calls():
    import model
print(*(name for name, size in seen.items() if size == 1))
"""


def test_the_first_call_of_what_mkl_computes_is_made_by_one_thread():
    """In 5 to 30 of 100 processes, by what ran before, a first cos of 64,000 numbers on two threads was off by 1e-4 in
    one thread's half. A race cannot be had at will, so this looks for the calls that end it."""
    called = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True, check=True, cwd=ROOT)
    assert {"cos", "sin", "exp", "log", "sqrt"} <= set(called.stdout.split())


NEW_PAGES = """
import resource
import torch
import model

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.zeros(2**22).add_(1) for _ in range(4)]  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

device = model.pick_device("cpu")
counts = [new_pages() for _ in range(4)]
model.host_memory = lambda: (2**30, 2**33)
model.free_memory(device)
print(counts[0], counts[-1], new_pages())
"""


@pytest.mark.skipif(not model.LIBC, reason="looks at what glibc does")
def test_freed_memory_is_used_again_and_given_back_where_memory_is_short():
    done = subprocess.run([sys.executable, "-c", NEW_PAGES], capture_output=True, text=True, check=True, cwd=ROOT)
    first, kept, given_back = map(int, done.stdout.split())
    assert first > 900 and kept < first / 10 and given_back > first / 2


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch):
    """torch.cuda.set_device wants the number that torch.device("cuda") lacks."""
    chosen, probe = [], SimpleNamespace(device=torch.device("cuda", 3), item=lambda: 0.0)
    monkeypatch.setattr(torch, "empty", lambda *_, device: probe)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(torch.device(device).index))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("auto", "cuda"):
        assert model.pick_device(name) == torch.device("cuda", 3)
    assert chosen == [3, 3]


def test_fresh_weights_spread_as_in_gpt2(checkpoint):
    net = model.Transformer(model.load_config(checkpoint))
    model.init_weights(net, 3)
    for name, p in net.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.full_like(p, float("norm" in name))), name
        else:
            wanted = 0.01 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02  # 0.02 / sqrt(2 * 2)
            assert p.std().item() == pytest.approx(wanted, rel=0.1) and abs(p.mean()) < 0.1 * wanted, name
    first = net.head.clone()
    torch.manual_seed(9)
    model.init_weights(net, 3)
    assert torch.equal(net.head, first)


def test_a_model_is_loaded_where_its_weights_just_fit(checkpoint, net, monkeypatch):
    need = sum(p.numel() for p in net.parameters()) * 4
    monkeypatch.setattr(model, "free_memory", lambda _: need - 1)
    with pytest.raises(UserError, match="or --dtype=bfloat16"):
        model.load_model(checkpoint, "float32", "cpu")
    model.load_model(checkpoint, "bfloat16", "cpu")
    monkeypatch.setattr(model, "free_memory", lambda _: need)
    model.load_model(checkpoint, "float32", "cpu")


def test_the_hosts_memory_is_what_the_system_says(monkeypatch):
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/meminfo")
    free, total = model.host_memory()
    assert total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with open("/proc/meminfo") as f:
        [available] = [int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable:")]
    assert abs(free - available) < 0.05 * total

    def silent():
        raise OSError

    monkeypatch.setattr(model, "host_memory", silent)
    assert model.free_memory(torch.device("cpu")) == 4 * 10**9


@pytest.mark.parametrize("path", ["./nowhere", "../nowhere", "nowhere", "a/b/c"])
def test_a_path_is_no_hub_name(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # an import would fail
    with pytest.raises(UserError, match="no model directory at"):
        model.checkpoint_dir(path)


def test_all_that_is_read_is_downloaded_and_no_more(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda path, allow_patterns: asked.append((path, allow_patterns)))
    model.checkpoint_dir("owner/name")
    [(path, patterns)] = asked
    names = [*model.TOKENIZER_FILES, "config.json", "model.safetensors", "model-00001-of-00002.safetensors",
             "model.safetensors.index.json"]
    assert path == "owner/name" and all(any(fnmatch(name, p) for p in patterns) for name in names)
    assert not any(fnmatch(name, p) for name in ("pytorch_model.bin", "model.py", "model.gguf") for p in patterns)


def test_frequencies_that_old_files_hold_are_passed_over(checkpoint, net, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "old")
    file = tmp_path / "old" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file)
    old = model.load_model(str(tmp_path / "old"), device="cpu").state_dict()
    assert all(torch.equal(old[name], p) for name, p in net.state_dict().items()) and len(old) == len(net.state_dict())


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_what_is_saved_names_its_dtype_its_size_and_its_tokenizer(checkpoint, tmp_path, key):
    shutil.copytree(checkpoint, tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config.pop("torch_dtype")
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {key: "float32"}))
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "vocab.json",
             "merges.txt", "tokenizer.model", "special_tokens_map.json"}
    net = model.load_model(str(tmp_path / "source"), "bfloat16", "cpu")
    for name in names:
        (tmp_path / "source" / name).write_text(name)
    model.save_model(net, str(tmp_path / "saved"), tokenizer_from=str(tmp_path / "source"), max_shard_bytes=20_000)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved == config | {key: "bfloat16"}
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(p.nbytes for p in net.parameters())}
    assert {name for name in names if (tmp_path / "saved" / name).read_text() == name} == names
