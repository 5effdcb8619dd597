"""sft.py: the loss is that of what the model is to say alone, and whole runs learn, save and resume."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import ROOT, SHARED, assert_refused, run_script
from forks import fork_ranks, fork_script
from jinja2 import Template
from safetensors.torch import load_file

import eval_math
import grpo
import model
import sft
from configurator import UserError, configure


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


def test_the_learning_rate_warms_up_and_falls_as_half_a_cosine():
    cfg = SimpleNamespace(lr=2.0, warmup_steps=4, max_steps=8, lr_schedule="constant")
    assert [sft.learning_rate(step, cfg) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    cfg.warmup_steps, cfg.lr_schedule = 0, "cosine"
    expected = [2.0, 1 + math.cos(math.pi / 8), 1 + 0.5**0.5]
    assert [sft.learning_rate(step, cfg) for step in (0, 1, 2, 4, 8)] == pytest.approx([*expected, 1.0, 0.0])


@pytest.mark.parametrize("changes", [{}, dict(lr_schedule="cosine", warmup_steps=2, weight_decay=0.2, beta2=0.95,
                                              grad_clip=0.3)], ids=["defaults", "own"])
def test_the_optimiser_has_what_the_settings_say(checkpoint, problems, tmp_path, monkeypatch, changes):
    seen, real = [], grpo.update

    def updating(optimizer, parameters, grad_clip):
        [group] = optimizer.param_groups
        seen.append((type(optimizer), group["lr"], group["betas"], group["weight_decay"], grad_clip))
        return real(optimizer, parameters, grad_clip)

    monkeypatch.setattr(grpo, "update", updating)
    arguments = args(checkpoint, problems, tmp_path / "run", eval_dataset="", max_steps=3, **changes)
    run(*arguments)
    cfg = configure(vars(sft), arguments)
    assert seen == [(torch.optim.AdamW, sft.learning_rate(step, cfg), (0.9, cfg.beta2), cfg.weight_decay, cfg.grad_clip)
                    for step in range(3)]
    rates = [json.loads(line)["lr"] for line in open_lines(tmp_path / "run" / "log.jsonl")]
    assert rates == [line[1] for line in seen]


def test_a_problem_is_asked_with_the_system_message_and_the_template(tokenizer):
    cfg = SimpleNamespace(system_prompt="Be brief.", prompt_template="Q: {question}")
    ids, trained = sft.encode_example(tokenizer, {"question": "1+1?", "answer": "2", "solution": "It is 2"}, cfg)
    prompt = tokenizer.encode_chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q: 1+1?"}])
    assert ids == [*prompt, *tokenizer.encode("It is 2"), tokenizer.eos_id]
    assert trained == [i >= len(prompt) for i in range(len(ids))]


def test_a_solution_ends_with_the_token_that_ends_a_turn(checkpoint):
    tokenizer = model.load_tokenizer(checkpoint)
    tokenizer.stop_ids = frozenset([0, tokenizer.eos_id])  # another is smaller
    cfg = SimpleNamespace(system_prompt="", prompt_template="{question}")
    ids, _ = sft.encode_example(tokenizer, {"question": "?", "answer": "2", "solution": "2"}, cfg)
    assert ids[-1] == tokenizer.eos_id != 0


def test_a_row_of_just_the_limit_is_not_cut_off(tokenizer):
    example = sft.as_example("here", as_messages(CHATS[0]))
    ids, trained = by_hand(tokenizer, CHATS[0])
    start = trained.index(True)
    for limit, length, cut in ((len(ids), len(ids), 0), (len(ids) - 1, len(ids) - 1, 1), (start + 1, start + 1, 1),
                               (start, 0, 1)):
        cfg = SimpleNamespace(system_prompt="", max_length=limit)
        rows, count = sft.encode_examples(tokenizer, [example], cfg, 512)
        assert count == cut and [(row.prompt + row.ids, row.trained) for row in rows] == (
            [(ids[:length], trained[start:length])] if length else [])


def test_the_ranks_share_a_batch_of_a_file(problems):
    cfg = SimpleNamespace(dataset=problems, batch_size=5, seed=3)
    (whole, count), *shares = (sft.batches(cfg, rank, world) for rank, world in ((0, 1), (0, 2), (1, 2)))
    for step in range(9):
        one, two = (batch(step) for batch, _ in shares)
        assert [one[0], two[0], one[1], two[1], one[2]] == whole(step) and len(two) == 2
    assert count == 40


def test_fresh_weights_are_those_of_the_seed(checkpoint):
    one, same, other = (model.random_model(checkpoint, seed, "cpu").head for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_all_weights_are_trained_in_float32_whatever_a_device_prefers(checkpoint, problems, tmp_path, monkeypatch):
    def asked(path, dtype, *_):
        raise UserError(dtype)

    monkeypatch.setattr(sft, "load_model", asked)
    for method, dtype in (("full", "float32"), ("lora", "auto")):
        with pytest.raises(UserError, match=dtype):
            run(*args(checkpoint, problems, tmp_path / "run", method=method, dtype="auto"))


# ---------------------------------------------------------------------------------------------------------------- chats

CHATS = [[("user", "How many?"), ("assistant", "Tom has 3.")],
         [("system", "Be brief."), ("user", "Tom has 3 apples."), ("assistant", "Yes."), ("user", "Now?"),
          ("assistant", "\n 4 apples\n"), ("user", "Thanks.")],
         [("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "It ends with <|im_end|> or so."),
          ("user", "d"), ("assistant", "")]]


def as_messages(chat):
    return {"messages": [{"role": role, "content": content} for role, content in chat]}


def as_conversations(chat):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"conversations": [{"from": names[role], "value": content} for role, content in chat]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def by_hand(tokenizer, chat):
    """Ids and mask of a chat in the test checkpoint's template, put together turn by turn."""
    ids, mask, [end] = [], [], tokenizer.stop_ids
    for role, content in chat:
        head, said = tokenizer.encode(f"<|im_start|>{role}\n", special=True), [*tokenizer.encode(content), end]
        tail = tokenizer.encode("\n")
        ids += head + said + tail
        mask += [False] * len(head) + [role == "assistant"] * len(said) + [False] * len(tail)
    last = max(i for i, trained in enumerate(mask) if trained)
    return ids[: last + 1], mask[: last + 1]


def plain_loss(net, ids, mask):
    """Summed loss of the marked tokens through the plain forward pass, and their number."""
    with torch.no_grad():
        logp = torch.log_softmax(net(torch.tensor([ids]))[0, :-1].double(), -1)
    return -sum(logp[i - 1, token].item() for i, token in enumerate(ids) if mask[i]), sum(mask)


@pytest.mark.parametrize("packing", [False, True])
def test_every_turn_of_the_assistant_is_trained_and_nothing_else(checkpoint, tokenizer, net, tmp_path, packing):
    """Both spellings of a chat, and a row with a question among them: the loss of a step, and of the held-out rows."""
    rows = [as_messages(CHATS[0]), as_conversations(CHATS[1]), as_messages(CHATS[2]),
            {"question": "How many?", "solution": "3 + 4 = 7\n#### 7"}]
    data = write(tmp_path / "chats.jsonl", rows)
    run(*args(checkpoint, data, tmp_path / "run", batch_size=4, max_steps=1, lr=1e-9, eval_size=0, packing=packing,
              micro_batch_tokens=60))
    chats = [*CHATS, [("user", "How many?"), ("assistant", "3 + 4 = 7\n#### 7")]]
    totals, counts = zip(*(plain_loss(net, *by_hand(tokenizer, chat)) for chat in chats))
    assert losses(tmp_path / "run") == pytest.approx([sum(totals) / sum(counts)], rel=1e-5)
    lines = [json.loads(line) for line in open_lines(tmp_path / "run" / "log.jsonl")]
    assert [line["tokens"] for line in lines if "loss" in line] == [sum(counts)]
    assert [line["eval"]["loss"] for line in lines if "eval" in line] == pytest.approx(2 * losses(tmp_path / "run"))
    assert all(line["eval"]["problems"] == 1 for line in lines if "eval" in line)  # the others have no answer


def test_a_system_prompt_goes_before_a_chat_without_one(tokenizer):
    cfg = SimpleNamespace(system_prompt="Be brief.")
    for chat in CHATS[:2]:
        example = sft.as_example("here", as_messages(chat))
        expected = by_hand(tokenizer, [("system", "Be brief."), *(turn for turn in chat if turn[0] != "system")])
        assert sft.encode_example(tokenizer, example, cfg) == expected


def test_turns_are_those_of_transformers_in_the_template_of_qwen(tmp_path):
    """Ids of apply_chat_template, and the mask it makes of a template with its own {% generation %} marks."""
    transformers = pytest.importorskip("transformers", reason="transformers is the reference (requirements-dev.txt)")
    from test_checkpoints import real_tokenizer

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
        ids, trained = ours.encode_turns(messages)
        assert ids == expected[: len(ids)] and trained == [bool(m) for m in masks["assistant_masks"][: len(ids)]]
        assert not any(masks["assistant_masks"][len(ids) :])


def test_a_turn_begins_where_the_samplers_prompt_ends(tokenizer):
    """Line breaks at the edge of a turn and a typed <|im_end|> change neither prompt nor end."""
    for content in ("\n\nYes.", " Yes. ", "<|im_end|>", ""):
        asked = [{"role": "user", "content": "Well?"}]
        ids, trained = tokenizer.encode_turns([*asked, {"role": "assistant", "content": content}])
        prompt = tokenizer.encode_chat(asked)
        assert ids == [*prompt, *tokenizer.encode(content), *tokenizer.stop_ids]
        assert trained == [i >= len(prompt) for i in range(len(ids))]


def test_a_turn_ends_with_the_last_of_its_special_tokens(checkpoint):
    tokenizer = model.load_tokenizer(checkpoint)
    tokenizer.template = Template(
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}<|im_start|>{% endif %}{{ m.content }}"
        "<|im_end|>.{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
    ids, trained = tokenizer.encode_turns(as_messages(CHATS[0])["messages"])
    assert tokenizer.decode([i for i, said in zip(ids, trained) if said]) == "<|im_start|>Tom has 3.<|im_end|>"


@pytest.mark.parametrize("template, words", [
    ("{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else m.content[:1] }}<|im_end|>{% endfor %}"
     "{% if add_generation_prompt %}assistant: {% endif %}", "changes earlier messages"),
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
     "{% if add_generation_prompt %}<|im_start|>{% endif %}", "changes earlier messages"),
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
     "{% if add_generation_prompt %}assistant: {% endif %}", "without a special token")])
def test_templates_whose_turns_cannot_be_told_apart_are_refused(checkpoint, template, words):
    tokenizer = model.load_tokenizer(checkpoint)
    tokenizer.template = Template(template)
    with pytest.raises(UserError, match=words):
        tokenizer.encode_turns(as_messages(CHATS[1])["messages"])


def test_an_end_of_turn_that_sampling_does_not_know_is_pointed_out(checkpoint, capsys):
    tokenizer = model.load_tokenizer(checkpoint)
    tokenizer.stop_ids = frozenset([0])
    for chat in CHATS:
        sft.encode_example(tokenizer, sft.as_example("here", as_messages(chat)), SimpleNamespace(system_prompt=""))
    assert capsys.readouterr().out.count("eos_token_id") == 1


def test_a_system_message_beside_the_chat_is_its_first():
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    messages = sft.as_example("here", {"conversations": turns, "system": "Be brief."})["messages"]
    assert messages[0] == {"role": "system", "content": "Be brief."} and len(messages) == 3
    own = [{"from": "system", "value": "Sing."}, *turns]
    assert sft.as_example("here", {"conversations": own, "system": "Be brief."})["messages"][0]["content"] == "Sing."
    assert len(sft.as_example("here", {"conversations": turns, "system": None})["messages"]) == 2


@pytest.mark.parametrize("row, words", [
    ({"messages": "Hello"}, "its roles are none"),
    ({"messages": [{"role": "user", "content": "?"}]}, "an assistant answers a user"),
    ({"messages": [{"role": "assistant", "content": "!"}]}, "an assistant answers a user"),
    ({"messages": [{"role": "user", "content": "?"}, {"role": "tool", "content": "!"}]}, "'tool'"),
    ({"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "!"}]}, "'None'"),
    ({"conversations": [{"from": ["human"], "value": "?"}]}, "['human']"),
    ({"text": "Hello"}, "needs a question")])
def test_rows_of_another_shape_are_refused_by_file_and_line(row, words, tmp_path):
    data = write(tmp_path / "chats.jsonl", [as_messages(CHATS[0]), row])
    with pytest.raises(UserError) as refused:
        eval_math.load_problems(data, "train", sft.as_example)
    assert f"{data}, line 2: " in str(refused.value) and words in str(refused.value)


def test_longer_rows_are_cut_off_and_counted(checkpoint, tokenizer, net, tmp_path, capsys):
    data = write(tmp_path / "chats.jsonl", map(as_messages, CHATS))
    rows = [by_hand(tokenizer, chat) for chat in CHATS]
    limit = len(rows[0][0]) - 2  # cuts into the first row's only turn, and beyond a turn of the others
    run(*args(checkpoint, data, tmp_path / "run", batch_size=3, max_steps=1, max_length=limit, eval_size=0, lr=1e-9))
    totals, counts = zip(*(plain_loss(net, ids[:limit], mask[:limit]) for ids, mask in rows))
    cut = sum(len(ids) > limit for ids, _ in rows)
    lines = [json.loads(line) for line in open_lines(tmp_path / "run" / "log.jsonl")]
    assert [(line["cut_off"], line["tokens"]) for line in lines if "loss" in line] == [(cut, sum(counts))]
    assert losses(tmp_path / "run") == pytest.approx([sum(totals) / sum(counts)], rel=1e-5) and cut == 3
    assert lines[0]["eval"] == pytest.approx({"loss": sum(totals) / sum(counts)}, rel=1e-5)
    out = capsys.readouterr().out
    assert "| 3 rows cut off" in out and "3 of 3 held-out rows are longer" in out
    assert "run: held-out loss" in out.splitlines()[-1]
    with pytest.raises(UserError, match="step 1 has no token to train on.*max_length"):
        run(*args(checkpoint, data, tmp_path / "run", max_length=1, eval_dataset=""))
    with pytest.raises(UserError, match="cut off before the first token to score"):
        run(*args(checkpoint, data, tmp_path / "run", max_length=1))
    with pytest.raises(UserError, match="at most the model's context of 512"):
        run(*args(checkpoint, data, tmp_path / "run", max_length=513))


def test_the_best_adapter_by_held_out_loss_is_kept(checkpoint, tmp_path):
    data = write(tmp_path / "chats.jsonl", map(as_messages, CHATS))
    run(*args(checkpoint, data, tmp_path / "run", batch_size=3, max_steps=8, lr=0.1, eval_interval=1))
    lines = [json.loads(line) for line in open_lines(tmp_path / "run" / "log.jsonl")]
    evaluated = {line["step"]: line["eval"]["loss"] for line in lines if "eval" in line}
    best = min(evaluated, key=evaluated.get)
    assert best > 0
    run(*args(checkpoint, data, tmp_path / "part", batch_size=3, max_steps=best, lr=0.1, eval_interval=1))
    files = tmp_path / "run" / "best.safetensors", tmp_path / "part" / "adapter.safetensors"
    assert torch.equal(*(load_file(file)["v"] for file in files))


@pytest.mark.parametrize("split", ["train", "test"])
def test_solutions_of_gsm8k_are_trained_as_they_are_given(split, tmp_path, monkeypatch):
    """The published columns (one worked answer) and local rows with a solution: the same ids, of exactly that text."""
    from test_checkpoints import real_tokenizer

    if not (SHARED / "data" / "gsm8k").exists():
        pytest.skip("needs GSM8K in ../shared/data/gsm8k")
    tokenizer = real_tokenizer("qwen2.5", tmp_path)
    cfg = SimpleNamespace(system_prompt="", prompt_template="{question}")
    local = eval_math.load_problems(str(SHARED / "data" / "gsm8k"), split, sft.as_example)
    published = [{"question": e["question"], "answer": e["solution"]} for e in local]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(published))
    hub = eval_math.load_problems("gsm8k", split, sft.as_example)
    assert all(eval_math.is_correct(e["answer"], f["answer"]) for e, f in zip(hub, local))
    assert sum("<<" in e["solution"] for e in local) > 0.9 * len(local)
    for example, other in list(zip(hub, local))[::50]:
        ids, trained = sft.encode_example(tokenizer, example, cfg)
        assert (ids, trained) == sft.encode_example(tokenizer, other, cfg)
        said = tokenizer.decode([i for i, is_trained in zip(ids, trained) if is_trained])
        assert said == example["solution"] + "<|im_end|>" and f"#### {example['answer']}" in said
        assert tokenizer.decode(ids[: trained.index(True)]).endswith(
            f"<|im_start|>user\n{example['question']}<|im_end|>\n<|im_start|>assistant\n")


# ------------------------------------------------------------------------------------------------------------- streams


def numbered_chats(count):
    return [as_messages([("user", f"How many apples has number {i}?"), ("assistant", f"{i} + 1 = {i + 1}")])
            for i in range(count)]


@pytest.fixture
def hub(monkeypatch):
    """Data sets of a hub: {path: rows}; what is asked for is noted."""
    rows, asked = {}, []

    def load_dataset(path, configuration, split, streaming):
        asked.append((path, configuration, split, streaming))
        return datasets.Dataset.from_list(rows[path]).to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return SimpleNamespace(rows=rows, asked=asked)


def streamed(name, rank=0, world=1, steps=range(6), **changes):
    cfg = SimpleNamespace(dataset=name, seed=1, shuffle_buffer=7, batch_size=5)
    batch, count = sft.batches(SimpleNamespace(**vars(cfg) | changes), rank, world)
    assert count is None
    return [[e["messages"][-1]["content"] for e in batch(step)] for step in steps]


@pytest.mark.parametrize("name, path, shape", [("tulu3", "allenai/tulu-3-sft-mixture", as_messages),
                                               ("openthoughts3", "open-thoughts/OpenThoughts3-1.2M", as_conversations),
                                               ("owner/chats", "owner/chats", as_messages)])
def test_hub_data_sets_are_streamed_in_their_published_columns(hub, name, path, shape):
    hub.rows[path] = [shape([("user", "?"), ("assistant", str(i))]) | {"source": "x", "id": str(i)} for i in range(12)]
    seen = list(itertools.chain(*streamed(name, steps=range(5))))
    assert hub.asked == [(path, None, "train", True)]
    assert sorted(seen[:12], key=int) == sorted(seen[12:24], key=int) == [str(i) for i in range(12)]  # two epochs
    assert seen[:12] != seen[12:24] and seen[:12] != [str(i) for i in range(12)]


def test_a_stream_depends_on_the_seed_alone_and_goes_on_at_any_step(hub):
    hub.rows["owner/chats"] = numbered_chats(17)
    whole = streamed("owner/chats")
    assert streamed("owner/chats") == whole != streamed("owner/chats", seed=2)
    assert streamed("owner/chats", steps=[4, 5]) == whole[4:]  # in the second epoch
    shares = [streamed("owner/chats", rank, 2) for rank in (0, 1)]
    assert [sorted(one + two) for one, two in zip(*shares)] == [sorted(batch) for batch in whole]
    hub.rows["owner/chats"][3] = {"messages": []} | {"text": "?"}
    with pytest.raises(UserError, match="owner/chats, row .* as shuffled: "):
        streamed("owner/chats")


def test_held_out_rows_of_the_hub_are_read_no_further_than_needed(monkeypatch):
    read = []

    def rows():
        for row in numbered_chats(9):
            read.append(row)
            yield row

    data = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split, streaming: {"test": data}[split])
    examples = sft.held_out_examples(SimpleNamespace(eval_dataset="owner/chats", eval_size=3))
    assert [e["messages"] for e in examples] == [row["messages"] for row in numbered_chats(3)] and len(read) <= 4
    assert len(sft.held_out_examples(SimpleNamespace(eval_dataset="owner/chats", eval_size=0))) == 9


def test_a_stream_that_breaks_off_or_is_empty_says_so(monkeypatch):
    def rows():
        yield from numbered_chats(8)
        raise ConnectionError("the hub is gone")

    for generator, words in ((rows, "'owner/chats' broke off after . rows: .*go on with --init_from=resume"),
                             (lambda: iter(()), "'owner/chats' holds no rows")):
        data = datasets.IterableDataset.from_generator(generator)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, data=data, **__: data)
        with pytest.raises(UserError, match=words):
            streamed("owner/chats")


def test_a_run_whose_stream_breaks_off_has_saved_its_steps(checkpoint, tmp_path, monkeypatch):
    broken = [True]

    def rows():
        yield from numbered_chats(8)
        if broken:
            raise ConnectionError("the hub is gone")
        yield from numbered_chats(20)[8:]

    data = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    options = dict(max_steps=6, batch_size=2, shuffle_buffer=1, save_interval=0, eval_dataset="")
    with pytest.raises(UserError, match="broke off after [78] rows"):
        run(*args(checkpoint, "owner/chats", tmp_path / "run", **options))
    _, info = grpo.read_checkpoint(str(tmp_path / "run" / "checkpoint.safetensors"))
    assert 3 <= info["step"] == log_of(tmp_path / "run")[-1]["step"] <= 4
    broken.clear()
    run(*args(checkpoint, "owner/chats", tmp_path / "run", **options, init_from="resume"))
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


STREAMING_SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import datasets
load_dataset = datasets.load_dataset  # files in the place of the hub, through the same reader
datasets.load_dataset = lambda path, *_, **options: load_dataset("json", data_files={files!r}, **options)
import configurator, sft
configurator.run(sft.main)
"""


@pytest.fixture
def streaming(checkpoint, tmp_path):
    """A script that runs sft.py on a data set streamed from two files, and its arguments."""
    rows = numbered_chats(20)
    files = [write(tmp_path / "a.jsonl", rows[:9]), write(tmp_path / "b.jsonl", rows[9:])]
    script = tmp_path / "streaming.py"
    script.write_text(STREAMING_SCRIPT.format(root=str(ROOT), files=files))

    def arguments(name, **changes):
        held_out = write(tmp_path / "held_out.jsonl", map(as_messages, CHATS))
        return [str(script), *args(checkpoint, "owner/chats", tmp_path / name, eval_dataset=held_out, batch_size=5,
                                   shuffle_buffer=6, **dict(max_steps=6, save_interval=2, lr=0.05) | changes)]

    return arguments


def log_of(out_dir):
    lines = [json.loads(line) for line in open_lines(out_dir / "log.jsonl")]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.slow
def test_a_killed_run_on_a_stream_resumes_to_the_same_numbers(streaming, tmp_path):
    done = run_script(*streaming("whole"))
    assert done.returncode == 0 and not done.stderr, done.stderr
    process = subprocess.Popen([sys.executable, *streaming("parts")], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    log, deadline = tmp_path / "parts" / "log.jsonl", time.time() + 120
    while not (log.exists() and '"step": 3,' in log.read_text()) and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run_script(*streaming("parts", init_from="resume"))
    assert done.returncode == 0, done.stderr
    assert torch.equal(*(load_file(tmp_path / d / "adapter.safetensors")["v"] for d in ("whole", "parts")))
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


@pytest.mark.parametrize("packing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_processes_on_a_stream_learn_what_one_does(streaming, tmp_path, packing):
    """2 ranks over gloo: the same moments of the gradient, and the same held-out loss."""
    for done in (fork_script(*streaming("one", max_steps=2)),
                 *fork_ranks(2, *streaming("two", max_steps=2, packing=packing))):
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / d / "checkpoint.safetensors") for d in ("one", "two"))
    moment = one["optimizer.0.exp_avg"]
    assert (two["optimizer.0.exp_avg"] - moment).norm() < 1e-4 * moment.norm() and moment.norm() > 0
    one, two = (log_of(tmp_path / d) for d in ("one", "two"))
    assert [line.get("tokens") for line in one] == [line.get("tokens") for line in two]
    one, two = ([line["eval"]["loss"] if "eval" in line else line["loss"] for line in log] for log in (one, two))
    assert len(one) == 4 and one == pytest.approx(two, rel=1e-5)  # two evaluations, two steps


# ---------------------------------------------------------------------------------------------------------- whole runs


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


def test_a_run_that_resumes_with_another_kind_of_evaluation_ends_well(checkpoint, problems, tmp_path, capsys):
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "1+1?"},
                                              {"role": "assistant", "content": "2"}]}) + "\n")
    run(*args(checkpoint, problems, tmp_path / "run", max_steps=1))
    run(*args(checkpoint, problems, tmp_path / "run", max_steps=2, init_from="resume", eval_dataset=chats))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("run: held-out loss") and "->" not in last  # it began with the loss on other problems


def test_a_system_that_is_no_text_is_refused():
    with pytest.raises(UserError, match="here: system must be a text, not '5'"):
        sft.as_example("here", as_messages(CHATS[0]) | {"system": 5})


@pytest.mark.parametrize("extra", [{"messages": None}, {"messages": [], "solution": " "}], ids=str)
def test_a_column_that_is_empty_is_no_column(extra):
    row = {"question": "1+1?", "answer": "#### 2"}
    assert sft.as_example("here", row | extra) == sft.as_example("here", row)


def test_ctrl_c_during_an_update_neither_loses_nor_repeats_it(checkpoint, problems, tmp_path, monkeypatch):
    options = dict(eval_dataset="", max_steps=4)
    run(*args(checkpoint, problems, tmp_path / "whole", **options))
    step, calls = torch.optim.AdamW.step, []

    def interrupted(optimizer, *arguments, **changes):
        result = step(optimizer, *arguments, **changes)
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        run(*args(checkpoint, problems, tmp_path / "parts", **options))
    assert stopped.value.code == 130 and len(calls) == 2
    run(*args(checkpoint, problems, tmp_path / "parts", init_from="resume", **options))
    assert torch.equal(*(load_file(tmp_path / d / "adapter.safetensors")["v"] for d in ("whole", "parts")))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


def test_problems_without_a_worked_solution_have_no_held_out_loss(checkpoint, problems, tmp_path):
    data = write(tmp_path / "plain.jsonl", [{"question": "1+1?", "answer": "2"}] * 3)
    run(*args(checkpoint, problems, tmp_path / "run", eval_dataset=data, max_steps=1))
    evaluations = [line["eval"] for line in log_of(tmp_path / "run") if "eval" in line]
    assert len(evaluations) == 2 and all(e["problems"] == 3 and "loss" not in e for e in evaluations)


def test_held_out_rows_are_the_first_of_the_test_split(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [{"question": f"{split} {i}", "answer": "1"} for i in range(5)])
    for size, count in ((0, 5), (2, 2)):
        examples = sft.held_out_examples(SimpleNamespace(eval_dataset=str(tmp_path), eval_size=size))
        assert [e["question"] for e in examples] == [f"test {i}" for i in range(count)]


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputation_is_as_the_settings_say(checkpoint, problems, tmp_path, monkeypatch, recompute):
    seen = []
    monkeypatch.setattr(grpo, "training_loop", lambda cfg, net, *_: seen.append(net.model.recompute))
    run(*args(checkpoint, problems, tmp_path / "run", recompute=recompute))
    assert seen == [recompute]


@pytest.mark.parametrize("changes", [dict(beta2=1.0), dict(beta2=-0.1), dict(weight_decay=-1.0), dict(batch_size=0),
                                     dict(micro_batch_tokens=0), dict(shuffle_buffer=0), dict(max_steps=-1),
                                     dict(max_length=-1), dict(warmup_steps=-1), dict(grad_clip=-1.0)], ids=str)
def test_numbers_out_of_range_are_refused(changes):
    with pytest.raises(UserError, match="|".join(changes)):
        sft.check_settings(configure(vars(sft), [f"--{key}={value}" for key, value in changes.items()]))


def test_an_adapter_learns_and_is_saved(checkpoint, problems, tmp_path):
    run(*args(checkpoint, problems, tmp_path / "run", max_steps=12, batch_size=40, lr=0.1, u=4))
    first, *_, last = losses(tmp_path / "run")
    assert last < first and load_file(tmp_path / "run" / "adapter.safetensors")["v"].shape == (14, 4)


@pytest.mark.parametrize("name", ["qwen7b_sft", "tulu3_lora", "toy_pretrain"])
def test_the_configs_are_settings_that_hold_together(name):
    sft.check_settings(configure(vars(sft), [str(ROOT / "config" / f"{name}.py")]))


@pytest.mark.parametrize("changes, words", [(dict(method="lora_xxs"), "is unknown"),
                                            (dict(random_init=True), "random_init goes with"),
                                            (dict(lr_schedule="steps"), "lr_schedule must be"),
                                            (dict(eval_dataset="tulu3"), "tulu3 has no rows held out"),
                                            (dict(dataset="tulu3"), "'tulu3' (allenai/tulu-3-sft-mixture, train)")])
def test_wrong_settings_are_refused(checkpoint, problems, tmp_path, changes, words):
    assert_refused(fork_script("sft.py", *args(checkpoint, problems, tmp_path / "run", **changes)), words)
