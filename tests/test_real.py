"""Real models, and a random one of a real shape. TINYLORA_REAL names a folder of checkpoint directories."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SHARED, run_script
from safetensors.torch import load_file

import export
import model
import sample
import tinylora
from support.packing import Rollout, completion_logprobs

transformers = pytest.importorskip("transformers", reason="transformers is the oracle here (requirements-dev.txt)")
pytestmark = pytest.mark.slow

REAL = os.environ.get("TINYLORA_REAL", "")
MESSAGES = [
    [{"role": "user", "content": "Natalia sold 48 clips in April, and half as many in May. How many in all?"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "¿Es 3,5 + 2²?\n\n\tSí…"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey 😀"}, {"role": "user", "content": "2+2"}],
]


# The first test, since a process inherits the peak memory of the one that starts it.

@pytest.fixture(scope="module")
def qwen_half_billion(tmp_path_factory):
    source, path = SHARED / "tokenizers" / "qwen2.5", tmp_path_factory.mktemp("qwen")
    if not source.exists() or not (SHARED / "data" / "gsm8k").exists():
        pytest.skip("needs the real vocabulary and data in ../shared")
    config = transformers.Qwen2Config(**json.loads((source / "config.0.5B-Instruct.json").read_text()))
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).bfloat16().save_pretrained(path)
    (path / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    for name in ("tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, path)
    return path


def test_three_steps_of_gsm8k_run_in_bounded_memory(qwen_half_billion, tmp_path):
    gsm8k = SHARED / "data" / "gsm8k"
    done = run_script("grpo.py", f"--model={qwen_half_billion}", f"--dataset={gsm8k}/train.jsonl",
                      f"--eval_dataset={gsm8k}/test.jsonl", "--eval_size=2", f"--out_dir={tmp_path}/run", "--rank=2",
                      "--max_steps=3", "--batch_size=2", "--group_size=2", "--max_new_tokens=16",
                      "--micro_batch_tokens=512", "--kl_coef=0.001", "--device=cpu", OMP_NUM_THREADS="2",
                      TINYLORA_CACHE=f"{tmp_path}/cache")
    assert done.returncode == 0, done.stderr
    assert f"tinylora trains 13 numbers of {qwen_half_billion} on 7,473 problems" in done.stdout
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in steps if "reward" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(0 <= line["reward"] <= 1 and 0 < line["length"] <= 16 for line in steps)
    assert all(line["max_diff"] <= 1e-4 and line["entropy"] > 1 for line in steps)  # KL: all rows are scored
    assert load_file(tmp_path / "run" / "adapter.safetensors")["v"].shape == (1, 13)
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()
    assert steps[-1]["seconds"]["peak_gb"] < 6  # 2 GB of fp32 weights, read from a mapped 1 GB file


@pytest.fixture(scope="module", params=sorted(Path(REAL).glob("*/config.json")) if REAL else [None],
                ids=lambda file: file.parent.name if file else "none")
def real(request):
    """A checkpoint directory, our float32 model and tokenizer of it, and transformers'."""
    if request.param is None:
        pytest.skip("TINYLORA_REAL names no folder of real checkpoints")
    path = str(request.param.parent)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return (path, model.load_model(path, "float32", "cpu"), model.load_tokenizer(path), theirs,
            transformers.PreTrainedTokenizerFast.from_pretrained(path))


@torch.no_grad()
def test_ids_logits_and_greedy_tokens_equal_those_of_transformers(real):
    _, net, tokenizer, theirs, their_tokenizer = real
    for messages in MESSAGES:
        prompt = tokenizer.encode_chat(messages)
        assert prompt == their_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        ids = torch.tensor([prompt])
        assert (net(ids) - theirs(ids).logits).abs().max() <= 1e-3
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False,
                              repetition_penalty=1.0, pad_token_id=tokenizer.pad_id)
        [[ours]] = sample.generate(net, tokenizer, [prompt], max_new_tokens=64, temperature=0)
        assert ours.ids == out[0, len(prompt):].tolist()
        assert ours.text == their_tokenizer.decode(ours.ids, skip_special_tokens=True)


@torch.no_grad()
def test_logprobs_in_bfloat16_are_as_near_those_in_float32_as_those_of_transformers(real):
    path, net, tokenizer, _, _ = real
    in_16_bits = model.load_model(path, "bfloat16", "cpu")
    prompts = [tokenizer.encode_chat(messages) for messages in MESSAGES]
    groups = sample.generate(in_16_bits, tokenizer, prompts, n=2, max_new_tokens=48)
    rollouts = [Rollout(prompt, c.ids) for prompt, group in zip(prompts, groups) for c in group]
    sampled = torch.tensor([logprob for group in groups for c in group for logprob in c.logprobs])
    exact, trained = (logprobs[loss_mask] for logprobs, _, loss_mask in (
        completion_logprobs(each, rollouts) for each in (net, in_16_bits)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    parts = []
    for rollout in rollouts:
        logits = theirs(torch.tensor([rollout.prompt + rollout.ids])).logits[0, len(rollout.prompt) - 1 : -1]
        parts.append(logits.float().log_softmax(-1)[range(len(rollout.ids)), rollout.ids])
    their_error = (torch.cat(parts) - exact).abs().mean()
    assert (trained - exact).abs().mean() <= 1.25 * their_error
    assert (sampled - exact).abs().mean() <= 1.25 * their_error


@pytest.mark.filterwarnings("ignore")  # theirs
def test_thirteen_trained_numbers_mean_the_same_in_peft_and_merged(real, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is the oracle here (requirements-dev.txt)")
    path, _, tokenizer, _, _ = real
    done = run_script("sft.py", f"--model={path}", f"--out_dir={tmp_path}/run", "--rank=2", "--lr=0.02",
                      "--max_steps=2", "--batch_size=4", "--eval_dataset=", "--dtype=float32", "--device=cpu",
                      OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    assert load_file(tmp_path / "run" / "adapter.safetensors")["v"].abs().min() > 1e-3
    net = tinylora.load_adapted(path, f"{tmp_path}/run", "float32", "cpu")
    export.export_peft(net, tmp_path / "peft", path)
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = tokenizer.encode_chat(MESSAGES[0])
    ids = torch.tensor([prompt])
    [[ours]] = sample.generate(net, tokenizer, [prompt], max_new_tokens=32, temperature=0)
    with torch.no_grad():
        before, after = base(ids).logits, net(ids)
        in_peft = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
        assert (in_peft(ids).logits - after).abs().max() <= 1e-3 < (before - after).abs().max()
        tinylora.merge(net)
        assert (net(ids) - after).abs().max() <= 1e-3
    [[merged]] = sample.generate(net, tokenizer, [prompt], max_new_tokens=32, temperature=0)
    assert merged.ids == ours.ids
