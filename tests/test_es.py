"""lab/es.py: the step against a computation by hand, resuming, several processes, refusals."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_refused, refusal
from forks import fork_ranks, fork_script
from safetensors.torch import load_file
from test_packing import one_thread  # noqa: F401
from test_run import EVEN_LENGTH

import grpo
import sample
import tinylora
from configurator import configure
from lab import es


@pytest.fixture
def arguments(checkpoint, problems, tmp_path):
    def command_line(name, **changes):
        (tmp_path / "config.py").write_text(EVEN_LENGTH)
        settings = dict(model=checkpoint, dataset=problems, eval_dataset=problems, max_steps=3, batch_size=3,
                        population=6, max_new_tokens=8, eval_size=5, answer_format="any", device="cpu", rank=2,
                        out_dir=tmp_path / name, sigma=0.5, temperature=1.0, save_interval=1) | changes
        return [f"{tmp_path}/config.py", *(f"--{key}={value}" for key, value in settings.items())]

    return command_line


def configured(arguments):
    return configure(es.Settings, grpo.reward, grpo.problems, argv=arguments)


def results(place):
    lines = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    return lines, load_file(place / "adapter.safetensors")["v"].tolist()


# ------------------------------------------------------------------------------------- a vector for each row

def test_vectors_as_adapters_answer_as_their_texts_and_as_each_alone(net, tokenizer):
    adapter = tinylora.add_adapter(net, n_tie=3, u=2, seed=3)
    torch.manual_seed(0)
    vectors = 0.5 * torch.randn(3, *adapter.v.shape)
    prompts = ["Tom has 3 apples.", "How many", "Tom has 3 apples.", "x", "a b c", "x"]
    options = dict(max_new_tokens=12, seed=5, prompt_ids=[0, 1, 0, 1, 2, 3])
    grouped = sample.generate(net, tokenizer, prompts, adapters=vectors, **options)
    each = sample.generate(net, tokenizer, prompts, adapters=[vectors[i // 2] for i in range(6)], **options)
    assert adapter.v.abs().max() == 0
    texts = []
    for vector in vectors:
        adapter.v.data.copy_(vector)
        texts += [tinylora.adapter_text(adapter)] * 2
    by_text = sample.generate(net, tokenizer, prompts, adapters=texts, **options)
    alone = []
    for k, vector in enumerate(vectors):
        adapter.v.data.copy_(vector)
        own = slice(2 * k, 2 * k + 2)
        ids = {"prompt_ids": options["prompt_ids"][own]}
        alone += sample.generate(net, tokenizer, prompts[own], **(options | ids))
    found = [[completion.ids for [completion] in groups] for groups in (grouped, each, by_text, alone)]
    assert found[0] == found[1] == found[2] == found[3]
    assert found[0][0] != found[0][2]  # the first two vectors differ, their prompts and numbers do not


def test_R_of_a_population_is_that_of_each_vector(net):
    adapter = tinylora.add_adapter(net, "lora_xs", rank=3)
    vectors = torch.randn(4, *adapter.v.shape)
    R = tinylora.mix_vectors(net, vectors)
    for k, vector in enumerate(vectors):
        torch.testing.assert_close(R[:, k], tinylora.mix(vector, adapter.groups, adapter.P))


def test_vectors_that_do_not_fit_are_refused(net, tokenizer):
    ask = dict(max_new_tokens=2, adapters=torch.zeros(2, 1, 13))
    assert "need a model with a tinylora" in refusal(sample.generate, net, tokenizer, ["x", "y"], **ask)
    tinylora.add_adapter(net, u=4)
    assert "(1, 13)" in refusal(sample.generate, net, tokenizer, ["x", "y"], **ask)
    ragged = [torch.zeros(1, 4), torch.zeros(4)]
    assert "(4,)" in refusal(sample.generate, net, tokenizer, ["x", "y"], adapters=ragged)
    ask["adapters"] = torch.zeros(2, 1, 4)
    assert "one per prompt" in refusal(sample.generate, net, tokenizer, ["x"] * 3, **ask)
    assert "one per prompt" in refusal(sample.generate, net, tokenizer, ["x"], **ask)
    tinylora.detach(net)
    tinylora.add_adapter(net, "lora")
    assert "need a model with a tinylora" in refusal(sample.generate, net, tokenizer, ["x", "y"], **ask)


# ------------------------------------------------------------------------------------------------- the steps

def test_the_first_step_is_adams_along_the_estimate_by_hand(arguments, tmp_path, monkeypatch):
    seen = []

    def ask(net, tokenizer, members, asked, cfg, ranks):
        seen.append(members.clone())
        return [(float(member[0, 0] + member[0, 1] ** 2), 1.0, 0.0) for member in members]

    monkeypatch.setattr(es, "ask", ask)
    cfg = configured(arguments("out", max_steps=1, u=2, eval_dataset=""))
    es.train(cfg)
    members = seen[0].double().numpy()[:, 0]  # [6, 2]
    assert np.allclose(members[:3], -members[3:])  # antithetic around v = 0
    rewards = members[:, 0] + members[:, 1] ** 2
    shaped = (rewards - rewards.mean()) / rewards.std(ddof=1)
    # E[reward e] / sigma over N(v, sigma^2), with e = member / sigma
    estimate = (shaped[:, None] * members / 0.5).mean(0) / 0.5
    [line], [v] = results(tmp_path / "out")
    assert line["grad_norm"] == pytest.approx(np.linalg.norm(estimate), rel=1e-4)
    assert v == pytest.approx((0.01 * np.sign(estimate)).tolist(), rel=1e-3)  # Adam's first step is lr


def test_it_climbs_to_the_top_of_a_hill(arguments, tmp_path, monkeypatch):
    top = torch.linspace(-0.3, 0.3, 13)

    def ask(net, tokenizer, members, asked, cfg, ranks):
        return [(-float((member[0] - top).norm()), 1.0, 0.0) for member in members]

    monkeypatch.setattr(es, "ask", ask)
    es.train(configured(arguments("out", max_steps=60, population=32, sigma=0.03, eval_dataset="")))
    _, [v] = results(tmp_path / "out")
    assert (torch.tensor(v) - top).norm() < 0.1 * top.norm()


def test_members_are_asked_the_same_with_the_same_random_numbers(net, tokenizer, arguments):
    cfg = configured(arguments("out"))
    tinylora.add_adapter(net)
    rows = [{"question": text, "answer": "1"} for text in ("x", "Tom has 3", "How many")]
    grpo.prepare(net, tokenizer, rows, cfg)
    asked = list(enumerate(rows))
    ranks = SimpleNamespace(mine=lambda rows: rows, gather=lambda rows: rows)
    same = es.ask(net, tokenizer, torch.zeros(4, 1, 13), asked, cfg, ranks)
    assert same == [same[0]] * 4
    assert len(set(es.ask(net, tokenizer, torch.randn(4, 1, 13), asked, cfg, ranks))) > 1


@pytest.mark.parametrize("stop", ["Sampler.step", "Run.log", "save_file"])
def test_a_killed_run_resumes_to_the_same_numbers_and_two_processes_equal_one(arguments, tmp_path, stop):
    whole = fork_script("-m", "lab.es", *arguments("whole"))
    assert whole.returncode == 0 and "whole: greedy reward" in whole.stdout, whole.stderr
    if stop == "Run.log":
        ranks = fork_ranks(2, "-m", "lab.es", *arguments("two"))
        assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr
        assert results(tmp_path / "two") == results(tmp_path / "whole")
    module = "sample" if stop == "Sampler.step" else "support.run"
    kill = (f"import {module}\nreal, calls = {module}.{stop}, []\ndef dying(*a, **k):\n    calls.append(1)\n"
            f"    if len(calls) == {20 if stop == 'Sampler.step' else 3}:\n        os.kill(os.getpid(), 9)\n"
            f"    return real(*a, **k)\n{module}.{stop} = dying\n")
    assert fork_script("-m", "lab.es", *arguments("parts"), setup=kill).returncode == -9
    again = fork_script("-m", "lab.es", *arguments("parts", init_from="resume"))
    assert again.returncode == 0, again.stderr
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    saved = fork_script("-m", "lab.es", tmp_path / "whole" / "settings.py", f"--out_dir={tmp_path}/repeated")
    assert saved.returncode == 0 and results(tmp_path / "repeated") == results(tmp_path / "whole")


# -------------------------------------------------------------------------------------------------- settings

@pytest.mark.parametrize("wrong, words", [
    (dict(population=5), "population must be even"), (dict(population=0), "population must be even"),
    (dict(sigma=0.0), "sigma must be above 0"), (dict(method="lora"), "method"), (dict(shard=2), "shard"),
    (dict(lr=0), "lr must be above 0"), (dict(temperature=-1), "temperature"), (dict(batch_size=0), "batch_size"),
    (dict(answer_format="roman"), "answer_format"), (dict(seed=-1), "seed"), (dict(seed=2**32), "seed"),
])
def test_settings_that_cannot_work_are_refused(arguments, tmp_path, wrong, words):
    assert_refused(fork_script("-m", "lab.es", *arguments("out", **wrong)), words)
    assert not (tmp_path / "out").exists()


def test_a_config_of_grpo_is_one_of_es_and_what_it_ignores_is_named(capsys):
    cfg = configured([str(ROOT / "config" / "qwen0.5b_laptop.py"), "--kl_coef=0.1"])
    es.check(cfg)
    assert "ignore group_size, kl_coef" in capsys.readouterr().out and cfg.batch_size == 16
    assert set(es.GRPO_ONLY) < set(vars(grpo.Settings()))
