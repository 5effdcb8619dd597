"""sft.py: it trains what the model should say and nothing else, as a plain loop would, and runs resume to the bit."""

import json
import math
import os
import signal
from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_refused, make_checkpoint
from forks import fork_ranks, fork_script
from safetensors.torch import load_file
from test_tokenizer import real_tokenizer

import eval_math
import grpo
import model
import sft
from configurator import configure
from support import UserError

transformers = pytest.importorskip("transformers", reason="transformers is the oracle here (requirements-dev.txt)")


def args(checkpoint, data, out_dir, **changes):
    options = dict(model=checkpoint, dataset=data, eval_dataset=data, out_dir=out_dir, max_steps=2, batch_size=6,
                   max_new_tokens=2, eval_size=4, n_tie=1, device="cpu") | changes
    return [f"--{key}={value}" for key, value in options.items()]


def settings(*arguments, **changes):
    return configure(sft.Settings, grpo.reward, argv=[*arguments, *(f"--{key}={v}" for key, v in changes.items())])


def run(*arguments, **changes):
    """Train. Returns the lines of the log without what is measured, those of steps and those of evaluations."""
    sft.train(settings(*args(*arguments, **changes)))
    return log_of(arguments[2])


def log_of(out_dir):
    lines = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    return [line for line in lines if "eval" not in line], [line for line in lines if "eval" in line]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ------------------------------------------------------------------------------------------------- what is trained

CHATS = [[("user", "How many?"), ("assistant", "Tom has 3.")],
         [("system", "Be brief."), ("user", "Tom has 3 apples."), ("assistant", "Yes."), ("user", "Now?"),
          ("assistant", "\n 4 apples\n"), ("user", "Thanks.")],
         [("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "It ends with <|im_end|> or so."),
          ("user", "d"), ("assistant", "")],
         [("user", "How many?"), ("assistant", "3 + 4 = 7\n#### 7")]]


def as_messages(chat):
    return {"messages": [{"role": role, "content": content} for role, content in chat]}


def as_conversations(chat):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"conversations": [{"from": names[role], "value": content} for role, content in chat]}


ROWS = [as_messages(CHATS[0]), as_conversations(CHATS[1]), as_messages(CHATS[2]),
        {"question": "How many?", "solution": "3 + 4 = 7\n#### 7"}]  # all ways to write a chat


def by_hand(tokenizer, chat):
    """Ids and loss mask of a chat in the test checkpoint's template, put together turn by turn."""
    ids, mask = [], []
    for role, content in chat:
        head = tokenizer.encode(f"<|im_start|>{role}\n", special=True)
        said = [*tokenizer.encode(content), tokenizer.eos_id]
        tail = tokenizer.encode("\n")
        ids += head + said + tail
        mask += [False] * len(head) + [role == "assistant"] * len(said) + [False] * len(tail)
    last = max(i for i, trained in enumerate(mask) if trained)
    return ids[: last + 1], mask[: last + 1]


def plain_loss(net, chats):
    """The loss per trained token of [(ids, mask)], a row at a time, and their number."""
    total, count = 0.0, 0
    for ids, mask in chats:
        labels = [i if trained else -100 for i, trained in zip(ids, mask)]
        logits = net(torch.tensor([ids])).logits[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")
        count += sum(mask)
    return total / count, count


@pytest.mark.parametrize("own, rates", [
    ({}, [1, 1, 1]),
    (dict(lr_schedule="cosine", warmup_steps=2, weight_decay=0.2, beta2=0.9, grad_clip=0.0, recompute=True,
          dtype="bfloat16"), [0.5, 0.75, 0.25])], ids=["defaults", "own"])
def test_training_is_that_of_a_plain_loop(checkpoint, tokenizer, tmp_path, monkeypatch, own, rates):
    """Of all weights, with transformers' model and torch's AdamW: every figure of the log, and the model in the end."""
    recomputed = []

    def recomputing(block, *inputs, real=model.checkpoint, **options):
        recomputed.append(block)
        return real(block, *inputs, **options)

    monkeypatch.setattr(model, "checkpoint", recomputing)
    data = write(tmp_path / "rows.jsonl", ROWS)
    steps, evaluations = run(checkpoint, data, tmp_path / "run", method="full", lr=0.001, max_steps=3, batch_size=3,
                             eval_size=0, eval_interval=1, micro_batch_tokens=60, **own)
    assert bool(recomputed) == own.get("recompute", False)
    chats = [by_hand(tokenizer, chat) for chat in CHATS]
    net = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, own.get("beta2", 0.999)),
                                  weight_decay=own.get("weight_decay", 0.0))
    for step, rate in enumerate(rates):
        assert evaluations[step]["eval"]["loss"] == pytest.approx(plain_loss(net, chats)[0].item(), rel=1e-5)
        batch = [chats[index] for _, index in grpo.batch_positions(step, 3, 4, 1337)]
        loss, count = plain_loss(net, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), own.get("grad_clip", 1.0) or 1e9).item()
        assert steps[step] == pytest.approx({"step": step + 1, "loss": loss.item(), "grad_norm": norm,
                                             "lr": 0.001 * rate, "tokens": count}, rel=1e-4)
        optimizer.param_groups[0]["lr"] = 0.001 * rate
        optimizer.step()
    assert all(line["eval"]["problems"] == 1 for line in evaluations)  # the others have no answer
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    for p, expected in zip(trained.parameters(), net.parameters(), strict=True):
        assert (p - expected).norm() < 1e-4 * expected.norm()


BRIEF = {"system_prompt": "Be brief.", "prompt_template": "Q: {question}"}


@pytest.mark.parametrize("row, changes, chat", [
    ({"question": "1+1?", "answer": "2"}, {}, [("user", "1+1?"), ("assistant", "2")]),
    ({"question": "1+1?", "answer": "2", "solution": "It is 2"}, BRIEF,
     [("system", "Be brief."), ("user", "Q: 1+1?"), ("assistant", "It is 2")]),
    ({"question": "1+1?", "answer": "2", "system": "Sing."}, BRIEF,
     [("system", "Sing."), ("user", "Q: 1+1?"), ("assistant", "2")]),
    ({"question": "3+4?", "answer": "It is <<3+4=7>>7.\n#### 7", "messages": None}, {},
     [("user", "3+4?"), ("assistant", "It is <<3+4=7>>7.\n#### 7")]),  # GSM8K's annotations stay
    (as_messages(CHATS[0]), BRIEF, [("system", "Be brief."), *CHATS[0]]),
    (as_messages(CHATS[1]), {"system_prompt": "Sing."}, CHATS[1]),
    (as_conversations(CHATS[0]) | {"system": "Sing."}, BRIEF, [("system", "Sing."), *CHATS[0]]),
    (as_conversations(CHATS[1]) | {"system": "Sing."}, {}, CHATS[1]),
    (as_conversations(CHATS[0]) | {"system": None}, {}, CHATS[0])], ids=str)
def test_a_row_is_asked_as_its_columns_and_the_settings_say(tokenizer, row, changes, chat):
    rollout = sft.encode_example(tokenizer, sft.as_example("here", row), settings(**changes), 512)
    ids, mask = by_hand(tokenizer, chat)
    start = mask.index(True)
    assert (rollout.prompt, rollout.ids, rollout.loss_mask) == (ids[:start], ids[start:], mask[start:])


def test_turns_are_those_of_transformers_in_the_template_of_qwen(tmp_path):
    """Ids of apply_chat_template, and the mask it makes of a template with its own {% generation %} marks."""
    ours = real_tokenizer("qwen2.5", tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    assert theirs.chat_template.count(plain) == 1
    marked = theirs.chat_template.replace(plain, (
        "{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.role == 'assistant' %}{%- generation %}"
        "{{- message.content + '<|im_end|>' }}{%- endgeneration %}{%- else %}{{- message.content + '<|im_end|>' }}"
        "{%- endif %}{{- '\\n' }}"))
    chats = [*CHATS[:2], [("user", "Größe? 🙂"), ("assistant", " 12 cm\t"), ("user", "\n?"), ("assistant", "e\u0301")]]
    chats[1] = [(role, content.strip()) for role, content in chats[1]]
    for chat in chats:
        messages = as_messages(chat)["messages"]
        expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        masks = theirs.apply_chat_template(messages, chat_template=marked, tokenize=True, return_dict=True,
                                           return_assistant_tokens_mask=True)
        assert masks["input_ids"] == expected
        ids, mask = ours.encode_turns(messages)
        assert ids == expected[: len(ids)] and mask == [bool(m) for m in masks["assistant_masks"][: len(ids)]]
        assert not any(masks["assistant_masks"][len(ids) :])


def test_longer_rows_are_cut_off(tokenizer, tmp_path):
    """At max_length or at the model's context, whichever is less. Nothing is left of a row without a token to train."""
    ids, mask = by_hand(tokenizer, CHATS[1])
    start, example = mask.index(True), sft.as_example("here", as_messages(CHATS[1]))
    for limit in (len(ids) + 1, len(ids), len(ids) - 1, start + 1):
        rollout = sft.encode_example(tokenizer, example, settings(), limit)
        assert (rollout.prompt, rollout.ids, rollout.loss_mask) == (ids[:start], ids[start:limit], mask[start:limit])
    assert sft.encode_example(tokenizer, example, settings(), start) is None
    data = write(tmp_path / "rows.jsonl", ROWS)
    counts = [sum(by_hand(tokenizer, chat)[1][:26]) for chat in CHATS]
    assert 0 in counts and sum(counts) > 4
    for context, max_length in ((26, 0), (26, 99), (512, 26)):
        checkpoint = make_checkpoint(tmp_path / str(context), max_position_embeddings=context)
        out_dir = tmp_path / f"{context} {max_length}"
        steps, _ = run(checkpoint, data, out_dir, batch_size=4, max_length=max_length, eval_dataset="")
        assert [line["tokens"] for line in steps] == [sum(counts)] * 2
    for changes, words in ((dict(eval_dataset=""), "all rows of step 1 are cut off.*raise max_length"),
                           ({}, "all rows of .*rows.jsonl are cut off before the solution; raise max_length")):
        with pytest.raises(UserError, match=words):
            run(checkpoint, data, tmp_path / "run", max_length=1, **changes)


@pytest.mark.parametrize("row, words", [
    ({"messages": "Hello"}, "must be a list of objects"),
    ({"messages": ["Hello"]}, "must be a list of objects"),
    ({"messages": [{"role": "user", "content": "?"}]}, "an assistant must answer a user; the roles here are user"),
    ({"messages": [{"role": "assistant", "content": "!"}, {"role": "user", "content": "?"}]}, "must answer a user"),
    ({"messages": [{"role": "user", "content": "?"}, {"role": "tool", "content": "!"}]}, "user, tool"),
    ({"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "!"}]}, "must be a text"),
    (as_messages(CHATS[0]) | {"system": 5}, "must be a text"),
    ({"conversations": [{"from": ["human"], "value": "?"}]}, "['human']"),
    ({"messages": [], "solution": " "}, "needs a question"), ({"text": "Hello"}, "needs a question")], ids=str)
def test_rows_of_another_shape_are_refused_by_file_and_line(row, words, tmp_path):
    data = write(tmp_path / "rows.jsonl", [ROWS[0], row])
    with pytest.raises(UserError) as refused:
        eval_math.load_problems(data, "train", sft.as_example)
    assert f"{data}, line 2: " in str(refused.value) and words in str(refused.value)


# -------------------------------------------------------------------------------------------------------- the rows

def numbered_chats(count):
    return [as_messages([("user", f"How many apples has number {i}?"), ("assistant", f"{i} + 1 = {i + 1}")])
            for i in range(count)]


@pytest.fixture
def hub(monkeypatch):
    """Data sets of a hub, {path: rows}."""
    hub = SimpleNamespace(rows={}, asked=[])

    def load_dataset(path, configuration, split):
        hub.asked.append((path, configuration, split))
        return datasets.Dataset.from_list(hub.rows[path])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return hub


@pytest.mark.parametrize("name, path, shape", [("tulu3", "allenai/tulu-3-sft-mixture", as_messages),
                                               ("openthoughts3", "open-thoughts/OpenThoughts3-1.2M", as_conversations),
                                               ("owner/chats", "owner/chats", as_messages)])
def test_hub_data_sets_are_read_in_their_published_columns_when_a_step_needs_them(hub, name, path, shape):
    hub.rows[path] = [shape([("user", "?"), ("assistant", str(i))]) | {"source": "x", "id": str(i)} for i in range(12)]
    hub.rows[path].append({"source": "a row that no step takes"})
    rows = sft.training_rows(settings(dataset=name))
    assert hub.asked == [(path, None, "train")] and len(rows) == 13
    assert [sft.as_example(*rows[i])["messages"][-1]["content"] for i in (7, 0)] == ["7", "0"]
    with pytest.raises(UserError, match=f"{path}, row 12: needs a question"):
        sft.as_example(*rows[12])


@pytest.mark.parametrize("name", ["tulu3", "openthoughts3"])
def test_a_data_set_without_a_test_split_is_not_evaluated(name):
    with pytest.raises(UserError, match=f"'{name}' has no split 'test', only train"):
        sft.held_out(settings(eval_dataset=name))


def test_a_faulty_row_of_a_file_is_refused_before_the_run(tmp_path):
    data = write(tmp_path / "rows.jsonl", [*ROWS, {"text": "?"}])
    with pytest.raises(UserError, match="rows.jsonl, line 5: needs a question"):
        sft.training_rows(settings(dataset=data))


def test_held_out_rows_are_the_first_of_the_test_split(hub, tmp_path):
    hub.rows["owner/chats"] = numbered_chats(9)
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [{"question": f"{split} {i}", "answer": "1"} for i in range(9)])
    for size, count in ((3, 3), (0, 9)):
        examples = sft.held_out(settings(eval_dataset="owner/chats", eval_size=size))
        assert [e["messages"] for e in examples] == [row["messages"] for row in numbered_chats(count)]
        assert hub.asked[-1] == ("owner/chats", None, "test")
        examples = sft.held_out(settings(eval_dataset=str(tmp_path), eval_size=size))
        assert [e["question"] for e in examples] == [f"test {i}" for i in range(count)]


def test_two_processes_on_a_hub_data_set_learn_what_one_does(checkpoint, tmp_path):
    file = write(tmp_path / "rows.jsonl", numbered_chats(20))
    setup = ("import datasets\ndatasets.disable_progress_bars()\n"
             "load = datasets.load_dataset  # a file in place of the hub, through the same reader\n"
             f"datasets.load_dataset = lambda path, *_, split: load('json', data_files={file!r}, split=split,\n"
             f"    cache_dir={str(tmp_path / 'cache')!r})")
    held_out = write(tmp_path / "held_out.jsonl", ROWS[:3])
    for name, processes in (("one", 1), ("two", 2)):
        asked = ["sft.py", *args(checkpoint, "owner/chats", tmp_path / name, eval_dataset=held_out, batch_size=5)]
        for done in fork_ranks(processes, *asked, setup=setup):
            assert done.returncode == 0 and not done.stderr, done.stderr
    (one, held_one), (two, held_two) = (log_of(tmp_path / name) for name in ("one", "two"))
    assert len(two) == 2 and two == [pytest.approx(line, rel=1e-5) for line in one]
    assert [line["eval"] for line in held_two] == [pytest.approx(line["eval"], rel=1e-5) for line in held_one]
    one, two = (load_file(tmp_path / name / "checkpoint.safetensors")["exp_avg/v"] for name in ("one", "two"))
    assert (two - one).norm() < 1e-5 * one.norm()


# ------------------------------------------------------------------------------------------------------ whole runs

@pytest.mark.parametrize("source", ["file", "hub", "pretraining"])
def test_an_interrupted_run_goes_on_to_the_same_numbers(checkpoint, problems, tmp_path, hub, monkeypatch, source):
    """Ctrl-C in the middle of an update neither loses nor repeats it."""
    hub.rows["owner/chats"] = numbered_chats(20)
    data = "owner/chats" if source == "hub" else problems
    options = dict(max_steps=5, lr_schedule="cosine", save_interval=0, eval_dataset=problems)
    if source == "pretraining":
        options |= dict(method="full", random_init=True, lr=5e-3, beta2=0.95)
    calls = []

    def interrupted(optimizer, real=torch.optim.AdamW.step):
        real(optimizer)
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    steps, _ = whole = run(checkpoint, data, tmp_path / "whole", **options)
    if source == "pretraining":  # it begins with a loss of chance, learns, and leaves a checkpoint directory
        assert abs(steps[0]["loss"] - math.log(512)) < 0.5 and steps[-1]["loss"] < steps[0]["loss"] - 0.2
        assert model.load_model(str(tmp_path / "whole" / "model"), device="cpu").dtype == torch.float32
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        run(checkpoint, data, tmp_path / "parts", **options)
    assert stopped.value.code == 130 and len(calls) == 3
    assert run(checkpoint, data, tmp_path / "parts", **options, init_from="resume") == whole
    for file in (tmp_path / "whole").rglob("*.safetensors"):
        one, other = load_file(file), load_file(tmp_path / "parts" / file.relative_to(tmp_path / "whole"))
        assert one and all(torch.equal(t, other[name]) for name, t in one.items())


def test_the_best_adapter_by_held_out_loss_is_kept(checkpoint, tmp_path, capsys):
    data = write(tmp_path / "chats.jsonl", ROWS[:3])
    options = dict(batch_size=3, lr=0.1, eval_interval=1)
    steps, evaluations = run(checkpoint, data, tmp_path / "run", max_steps=8, **options)
    assert steps[-1]["loss"] < steps[0]["loss"] and set(evaluations[0]["eval"]) == {"loss"}  # there are no problems
    assert "run: held-out loss" in capsys.readouterr().out.splitlines()[-1]
    best = min(evaluations, key=lambda line: line["eval"]["loss"])["step"]
    run(checkpoint, data, tmp_path / "part", max_steps=best, **options)
    kept, made = (load_file(tmp_path / file)["v"] for file in ("run/best.safetensors", "part/adapter.safetensors"))
    assert best > 0 and torch.equal(kept, made)


def test_the_evaluation_is_of_what_the_rows_have(checkpoint, problems, tmp_path, capsys):
    """Problems without a worked solution have no held-out loss. A resumed run may have another kind of evaluation."""
    plain = write(tmp_path / "plain.jsonl", [{"question": "1+1?", "answer": "2"}] * 3)
    _, evaluations = run(checkpoint, problems, tmp_path / "run", eval_dataset=plain, max_steps=1)
    assert [line["eval"]["problems"] for line in evaluations] == [3, 3] and "loss" not in evaluations[0]["eval"]
    chats = write(tmp_path / "chats.jsonl", ROWS[:2])
    run(checkpoint, problems, tmp_path / "run", max_steps=2, init_from="resume", eval_dataset=chats)
    assert "run: held-out loss" in (last := capsys.readouterr().out.splitlines()[-1]) and "->" not in last
    run(checkpoint, problems, tmp_path / "run", max_steps=1, init_from="resume", eval_dataset="")  # nothing is left


@pytest.mark.parametrize("name", ["qwen7b_sft", "tulu3_lora", "toy_pretrain", "toy_sft"])
def test_the_configs_are_settings_that_hold_together(name):
    sft.check(settings(str(ROOT / "config" / f"{name}.py")))


@pytest.mark.parametrize("changes", [dict(beta2=1.0), dict(beta2=-0.1), dict(weight_decay=-1.0), dict(batch_size=0),
                                     dict(micro_batch_tokens=0), dict(max_steps=-1),
                                     dict(max_length=-1), dict(warmup_steps=-1), dict(grad_clip=-1.0),
                                     dict(random_init=True)], ids=str)
def test_settings_that_cannot_work_are_refused(changes):
    with pytest.raises(UserError, match="|".join(changes)):
        sft.check(settings(**changes))


def test_a_data_set_that_cannot_be_loaded_is_refused_in_one_line(checkpoint, tmp_path):
    done = fork_script("sft.py", *args(checkpoint, "tulu3", tmp_path / "run", eval_dataset=""))
    assert_refused(done, "'tulu3' (allenai/tulu-3-sft-mixture, train)")
    assert not (tmp_path / "run").exists()
