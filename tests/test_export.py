"""export.py: what PEFT and transformers load gives our logits, and what cannot be expressed is refused."""

import json
import re
import shutil
import sys

import pytest
import torch
from conftest import assert_refused, run_script
from safetensors.torch import load_file, save_file
from test_tinylora import IDS, METHODS, filled, logits

import export
import model
import tinylora
from support import UserError


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # configure sets it
    export.main()


# ---------------------------------------------------------------------------------------------- to PEFT

IN_PARTS = [dict(n_tie=1, targets="mlp/attention"), dict(method="lora_xs", targets="q_proj/v_proj,gate_proj")]


@pytest.mark.parametrize("settings", [*METHODS, *IN_PARTS], ids=str)  # groups in parts are not in modules' order
@pytest.mark.filterwarnings("ignore")  # theirs
def test_peft_loads_our_export_with_equal_logits(net, checkpoint, tmp_path, settings):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    filled(tinylora.add_adapter(net, seed=5, **settings))
    path = str(tmp_path / "peft")
    export.export_peft(net, path, checkpoint)
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        before = base(IDS).logits
        theirs = peft.PeftModel.from_pretrained(base, path)(IDS).logits
    assert (theirs - logits(net)).abs().max() <= 1e-4 and (theirs - before).abs().max() > 0.1


def test_an_export_touches_no_directory_but_its_own(checkpoint, tmp_path, monkeypatch):
    def write(path):
        main(monkeypatch, f"--model={checkpoint}", "--adapter=hex:3c23d70a", f"--out_dir={path}", "--device=cpu")

    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "precious").write_text("x")
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    for name in ("out", "link"):
        write(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link", "out", "out.tmp"]
    assert (tmp_path / "disk/adapter_model.safetensors").is_file() and (tmp_path / "link").is_symlink()
    assert (tmp_path / "out.tmp" / "precious").exists()
    for name in ("out", "out/adapter_config.json", ""):
        with pytest.raises(UserError, match="out_dir must name a new or empty directory"):
            write(tmp_path / name if name else "")


# -------------------------------------------------------------------------------------- to transformers


@pytest.mark.parametrize("name, dtype", [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
@pytest.mark.filterwarnings("ignore")  # theirs
def test_a_merged_export_loads_in_transformers_and_is_rounded_once(net, checkpoint, tmp_path, monkeypatch, name, dtype):
    transformers = pytest.importorskip("transformers")
    text = tinylora.adapter_text(filled(tinylora.add_adapter(net, u=2, n_tie=4)))
    source, out = tmp_path / "source", tmp_path / "out"
    model.save_model(model.load_model(checkpoint, dtype, "cpu"), str(source), tokenizer_from=checkpoint)
    main(monkeypatch, f"--model={source}", f"--adapter={text}", "--to=hf", "--device=cpu", f"--out_dir={out}")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert theirs.dtype == dtype
    exact = model.load_model(str(source), "float32", "cpu")
    tinylora.load_adapter(exact, text)
    if name == "float32":
        with torch.no_grad():
            assert (theirs(IDS).logits - logits(exact)).abs().max() <= 1e-4
    for key, W in tinylora.merge(exact).state_dict().items():
        assert (theirs.state_dict()[key] == W.to(dtype)).float().mean() > 0.999  # ties of rounding may differ
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.encode("Tom") == model.load_tokenizer(checkpoint).encode("Tom")


@pytest.mark.parametrize("size, least, most", [(0.3, 99.9, 100.1), (0.003, 40, 95), (0.0003, 0, 30), (0, 100, 100)])
def test_a_merged_export_says_what_is_left_of_the_update(checkpoint, tmp_path, monkeypatch, capsys, size, least, most):
    source = str(tmp_path / "bf16")
    model.save_model(model.load_model(checkpoint, "bfloat16", "cpu"), source, tokenizer_from=checkpoint)
    net = model.load_model(source, "float32", "cpu")
    torch.nn.init.constant_(tinylora.add_adapter(net).v, size / 13**0.5)  # |v| = size
    text = tinylora.adapter_text(net.adapter)
    before = {name: linear.weight.clone() for name, linear in tinylora.all_linears(net).items()}
    wanted = {name: linear.weight - before[name] for name, linear in tinylora.all_linears(tinylora.merge(net)).items()}
    main(monkeypatch, f"--model={source}", f"--adapter={text}", "--to=hf", "--device=cpu", f"--out_dir={tmp_path}/out")
    out = capsys.readouterr().out
    share = float(re.search(r"([\d.]+)% of the update is left after rounding the merged weights to bfloat16", out)[1])
    written = load_file(tmp_path / "out/model.safetensors")
    left = sum(((written[f"{name}.weight"].float() - before[name]) * D).sum() for name, D in wanted.items())
    total = sum(D.square().sum() for D in wanted.values())
    assert size == 0 or share == pytest.approx(100 * (left / total).item(), abs=0.1)
    assert least <= share <= most and ("warning" in out) == (share < 95)


# -------------------------------------------------------------------------------------------- from PEFT


@pytest.mark.parametrize("options", [{}, dict(use_rslora=True), dict(target_modules=["v_proj", "up_proj"])], ids=str)
@pytest.mark.filterwarnings("ignore")  # theirs
def test_a_peft_lora_is_imported_with_equal_logits(checkpoint, tmp_path, monkeypatch, options):
    """PEFT writes all its settings, most of them with values that do no harm."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = peft.LoraConfig(**dict(r=3, lora_alpha=5, target_modules=list(tinylora.LINEARS),
                                    init_lora_weights=False) | options)
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path / "theirs")
    main(monkeypatch, f"--source={tmp_path}/theirs", f"--model={checkpoint}", f"--out_dir={tmp_path}/ours",
         "--device=cpu")
    net = model.load_model(checkpoint, device="cpu")
    before = logits(net)
    tinylora.load_adapter(net, str(tmp_path / "ours"))
    with torch.no_grad():
        assert (theirs(IDS).logits - logits(net)).abs().max() <= 1e-4
    assert (before - logits(net)).abs().max() > 0.1


@pytest.fixture
def peft_lora(net, tmp_path):
    """Write a PEFT LoRA of the model with changes, for import: its directory."""
    filled(tinylora.add_adapter(net, "lora", rank=2))
    path = tmp_path / "lora"
    export.export_peft(net, str(path))
    tinylora.detach(net)
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = load_file(path / "adapter_model.safetensors")

    def write(keys=None, change=None):
        changed = config | keys if isinstance(keys, dict) else keys
        (path / "adapter_config.json").write_text(json.dumps(changed))
        save_file((change or dict)(tensors), path / "adapter_model.safetensors")
        return str(path)

    return write


KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize("keys, change, words", [
    *(({name: value}, None, f": {name} is not supported") for name, value in dict(
        use_dora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 4}, modules_to_save=["lm_head"],
        lora_bias=True, layer_replication=[[0, 1]], trainable_token_indices=[1], target_parameters=["x"],
        alora_invocation_tokens=[3, 4], layers_to_transform=[0], use_qalora=True).items()),
    *(({"init_lora_weights": name}, None, "changes the base model and is not supported")
      for name in ("pissa_niter_4", "corda", "olora", "loftq", "lora_ga")),
    ({"peft_type": "LOHA"}, None, "only a PEFT adapter of type LORA"),
    ({"r": 0}, None, "rank must be 1 to"), ({"r": None}, None, "is malformed"), ([], None, "is malformed"),
    ({"r": 3}, None, r"A.0 has shape \(2, 32\), but its settings and this model need \(3, 32\)"),
    ({"lora_alpha": -1}, None, "alpha must be above 0"), ({"lora_alpha": "x"}, None, "is malformed"),
    ({}, lambda ts: {k: t for k, t in ts.items() if k != KEY}, "A.12 has shape None"),
    ({}, lambda ts: {}, "targets must name"),
    ({}, lambda ts: ts | {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 2)}, "A.lm_head has shape"),
    ({}, lambda ts: ts | {KEY.replace("rs.1", "rs.7"): ts[KEY].clone()}, "A.model.layers.7.mlp.up_proj has shape"),
    ({}, lambda ts: ts | {KEY: ts[KEY] * float("inf")}, "numbers that are not finite"),
], ids=lambda value: "change" if callable(value) else str(value))  # a function's address is another in every process
def test_what_import_cannot_express_is_refused(net, peft_lora, keys, change, words):
    path = peft_lora(keys, change)
    with pytest.raises(UserError, match=words) as error:
        export.import_peft(net, path)
    assert "\n" not in str(error.value) and net.adapter is None


def test_settings_of_peft_that_do_no_harm_are_passed_over(net, peft_lora):
    keys = dict(use_dora=False, rank_pattern={}, alpha_pattern=None, layers_to_transform=None, modules_to_save=[],
                lora_dropout=0.1, fan_in_fan_out=True, qalora_group_size=16, init_lora_weights="gaussian", unheard_of=1)
    assert len(export.import_peft(net, peft_lora(keys)).A) == 14


def test_a_pickle_is_never_read(net, peft_lora, tmp_path):
    path = peft_lora({})
    shutil.move(f"{path}/adapter_model.safetensors", f"{path}/adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.safetensors is missing; an adapter_model.bin is a pickle"):
        export.import_peft(net, path)
    with pytest.raises(UserError, match="adapter_config.json cannot be read"):
        export.import_peft(net, str(tmp_path))


# --------------------------------------------------------------------------------------- the command line


def test_the_command_line_refuses_in_one_line(checkpoint, tmp_path, monkeypatch):
    base = [f"--model={checkpoint}", f"--out_dir={tmp_path}/x", "--device=cpu"]
    shutil.copytree(checkpoint, tmp_path / "full" / "model")  # as a run of grpo.py with method = full leaves it
    for arguments, words in [
        ([], "give --adapter=... to export"),
        ([*base, "--adapter=hex:3c23d70a", "--source=x"], "give --adapter=... to export"),
        ([*base, "--adapter=hex:3c23d70a", "--to=gguf"], "to in command line must be one of peft"),
        ([*base, "--source=somewhere", "--to=hf"], "without --to to import"),
        ([*base, f"--source={tmp_path}"], "adapter_config.json cannot be read"),
        ([f"--model={checkpoint}", "--adapter=hex:3c23d70a"], "out_dir must name a new or empty"),
        ([*base, f"--adapter={tmp_path}/full", "--to=hf"], "trained all weights: use --model=.*full/model"),
        ([*base, "--adapter=nowhere"], "nowhere cannot be read"),
    ]:
        with pytest.raises(UserError, match=words):
            main(monkeypatch, *arguments)
    assert_refused(run_script("export.py", *arguments), words)
    assert list(tmp_path.iterdir()) == [tmp_path / "full"]
