"""The main job on real input: GSM8K's questions through Qwen2.5's vocabulary and a random model of the 0.5B shape."""

import gzip
import json
import shutil

import pytest
import torch
from conftest import SHARED, run_script
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers", reason="transformers makes the checkpoint (requirements-dev.txt)")
pytestmark = pytest.mark.slow


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
