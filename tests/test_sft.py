"""sft.py: the loss is the solution's alone, and whole runs learn, save and resume."""

import json
import math

import pytest
import torch
from conftest import assert_refused, run_script
from safetensors.torch import load_file

import grpo
import model
import sft
from configurator import configure


def args(checkpoint, problems, out_dir, **changes):
    options = dict(model=checkpoint, dataset=problems, eval_dataset=problems, out_dir=out_dir, max_steps=2,
                   batch_size=6, max_new_tokens=4, eval_size=4, device="cpu", n_tie=1) | changes
    return [f"--{key}={value}" for key, value in options.items()]


def run(*arguments):
    sft.train(configure(vars(sft), list(arguments)))


def losses(out_dir):
    lines = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_loss_is_the_mean_over_the_solutions_tokens(checkpoint, problems, tmp_path):
    """Against one row at a time through the plain forward pass."""
    run(*args(checkpoint, problems, tmp_path / "run", max_steps=1, micro_batch_tokens=100))
    net, tokenizer = model.load_model(checkpoint, device="cpu"), model.load_tokenizer(checkpoint)
    rows = [json.loads(line) for line in open_lines(problems)]
    total, count = 0.0, 0
    for _, index in grpo.batch_positions(0, 6, len(rows), 1337):
        prompt = tokenizer.encode_chat([{"role": "user", "content": rows[index]["question"]}])
        solution = tokenizer.encode(rows[index]["solution"]) + [*tokenizer.stop_ids]
        with torch.no_grad():
            logp = torch.log_softmax(net(torch.tensor([prompt + solution]))[0, len(prompt) - 1 : -1], -1)
        total -= logp[range(len(solution)), solution].sum().item()
        count += len(solution)
    assert losses(tmp_path / "run")[0] == pytest.approx(total / count, rel=1e-5)


def open_lines(path):
    with open(path) as f:
        return f.read().splitlines()


def test_pretraining_from_random_weights_learns_saves_a_checkpoint_and_resumes(checkpoint, problems, tmp_path):
    options = dict(method="full", random_init=True, lr=3e-3, lr_schedule="cosine", warmup_steps=2, beta2=0.95,
                   max_steps=8)
    run(*args(checkpoint, problems, tmp_path / "whole", **options, save_interval=4))
    first, *_, last = losses(tmp_path / "whole")
    assert abs(first - math.log(512)) < 0.5 and last < first - 0.5
    saved = model.load_model(str(tmp_path / "whole" / "model"), device="cpu")
    assert model.load_tokenizer(str(tmp_path / "whole" / "model")).stop_ids
    parts = args(checkpoint, problems, tmp_path / "parts", **options, save_interval=4)
    with pytest.MonkeyPatch.context() as patch:  # a run that ends after 4 of 8 steps, as if killed
        patch.setattr(sft.torch.nn.utils, "clip_grads_with_norm_", stop_after(4))
        with pytest.raises(RuntimeError, match="killed"):
            run(*parts)
    run(*parts, "--init_from=resume")
    again = model.load_model(str(tmp_path / "parts" / "model"), device="cpu").state_dict()
    assert all(torch.equal(again[name], p) for name, p in saved.state_dict().items())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def stop_after(steps):
    clip, calls = torch.nn.utils.clip_grads_with_norm_, []

    def killing(*arguments):
        calls.append(1)
        if len(calls) > steps:
            raise RuntimeError("killed")
        return clip(*arguments)

    return killing


def test_an_adapter_learns_and_is_saved(checkpoint, problems, tmp_path):
    run(*args(checkpoint, problems, tmp_path / "run", max_steps=12, batch_size=40, lr=0.1, u=4))
    first, *_, last = losses(tmp_path / "run")
    assert last < first and load_file(tmp_path / "run" / "adapter.safetensors")["v"].shape == (14, 4)


@pytest.mark.parametrize("changes, words", [(dict(method="lora_xxs"), "is unknown"),
                                            (dict(random_init=True), "random_init goes with"),
                                            (dict(lr_schedule="steps"), "lr_schedule must be")])
def test_wrong_settings_are_refused(checkpoint, problems, tmp_path, changes, words):
    assert_refused(run_script("sft.py", *args(checkpoint, problems, tmp_path / "run", **changes)), words)
