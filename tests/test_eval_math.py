"""eval_math.py below the checker: problems from files, prompts, scores and the script."""

import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import SHARED, assert_refused
from forks import fork_script

import eval_math
import sample
import tinylora
from configurator import UserError
from eval_math import is_correct
from sample import Completion


def write(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_problems_come_from_files_and_folders_in_the_usual_columns(tmp_path):
    rows = [{"question": "1+1?", "answer": "2"}, {"problem": "2+2?", "answer": 4}, "\r\n",
            {"question": "3+3?", "answer": "Well, 3+3=<<3+3=6>>6.\n#### 6"},
            {"problem": "4+4?", "solution": "It is $\\boxed{8}$. Check: the answer: 9 - 1."}]
    path = write(tmp_path, *rows)
    problems = eval_math.load_problems(path)
    pairs = [(p["question"], p["answer"]) for p in problems]
    assert pairs == [("1+1?", "2"), ("2+2?", "4"), ("3+3?", "6"), ("4+4?", "8")]
    assert problems[2]["solution"] == "Well, 3+3=<<3+3=6>>6.\n#### 6" and problems[0]["solution"] == "2"
    (tmp_path / "data.jsonl").rename(tmp_path / "test.jsonl")
    assert eval_math.load_problems(str(tmp_path), "test") == problems


@pytest.mark.parametrize(
    "rows, words",
    [
        ([], "holds no problems"),
        (["{}\n"], "line 1: needs a question"),
        ([{"question": "x", "answer": "1"}, {"question": "y", "reply": "1"}], "line 2: needs a question"),
        ([{"question": "x", "answer": "1"}, "{nonsense\n"], "line 2: no JSON"),
        (["[1]\n"], "line 1: a row must be a JSON object"),
        ([{"question": "x", "answer": "  "}], "line 1: needs a question"),
        ([{"question": " ", "answer": "1"}], "line 1: needs a question"),
        ([{"question": "x", "answer": True}], "line 1: needs a question"),
        (['{"question": "x", "answer": NaN}\n'], "line 1: needs a question"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_file_and_line(tmp_path, rows, words):
    with pytest.raises(UserError, match=re.escape(words)):
        eval_math.load_problems(write(tmp_path, *rows))


def test_unknown_names_and_missing_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="known names: gsm8k"):
        eval_math.load_problems("gsm9k")
    with pytest.raises(UserError, match="no problems can be read"):
        eval_math.load_problems(str(tmp_path / "nowhere.jsonl"))


def test_gsm8k_as_published_loads():
    path = SHARED / "data" / "gsm8k"
    if not path.exists():
        pytest.skip("needs ../shared/data")
    assert len(eval_math.load_problems(str(path), "test")) == 1319


@pytest.mark.parametrize(
    "response, truncated, answer_format, strict, lenient",
    [
        ("1+1=2. #### 2", False, "hash", True, True),
        ("#### 2", True, "hash", False, True),  # cut off: had not finished, though others would count it
        ("so it is 2", False, "hash", False, True),
        (r"\boxed{2}", False, "hash", False, True),  # right, but not as asked
        (r"\boxed{2}", False, "boxed", True, True),
        ("2 + 2 is 4", False, "any", False, False),
        ("#### 5. The answer is 2", False, "hash", False, True),  # the line after #### says something else
        ("", False, "any", False, False),
    ],
)
def test_scores(response, truncated, answer_format, strict, lenient):
    verdict = eval_math.score(response, truncated, "2", answer_format)
    assert (verdict["strict"], verdict["lenient"]) == (strict, lenient)


def test_braces_of_a_template_stay_text(tokenizer):
    template = "{question}\nPut your answer within \\boxed{}."
    [ids] = eval_math.encode_problems(tokenizer, [{"question": "{0} {x}?"}], "Be brief.", template)
    assert "{0} {x}?\nPut your answer within \\boxed{}.<|im_end|>" in tokenizer.decode(ids)
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    [own] = eval_math.encode_problems(tokenizer, [{"question": "x", "system": "Think."}], "Be brief.", template)
    assert tokenizer.decode(own).startswith("<|im_start|>system\nThink.<|im_end|>")
    with pytest.raises(UserError, match="file, line 3: system must be a text, not '7'"):
        eval_math.as_problem("file, line 3", {"question": "x", "answer": "1", "system": 7})
    with pytest.raises(UserError, match="must contain"):
        eval_math.encode_problems(tokenizer, [{"question": "x"}], "", "no question")


class FakeNet:
    """Answers by the script of a test: texts[problem][sample]."""

    head = torch.zeros(1)


def answer_with(monkeypatch, texts, truncated=()):
    def fake(net, tokenizer, prompts, n, *_, prompt_ids, on_done, **__):
        for i, index in enumerate(prompt_ids):
            on_done(i, [Completion([5] * 4, [0.0] * 4, text, text in truncated) for text in texts[index]])

    monkeypatch.setattr(sample, "generate", fake)


CFG = SimpleNamespace(system_prompt="", prompt_template="{question}", answer_format="hash", max_new_tokens=9, seed=0)


def test_accuracy_and_its_standard_error_by_hand(tokenizer, monkeypatch):
    """Three problems, two answers each: 2, 1 and 0 right."""
    answer_with(monkeypatch, [["#### 1", "#### 1"], ["#### 1", "#### 2"], ["3", "#### 2"]])
    result = eval_math.evaluate(FakeNet, tokenizer, [{"question": "?", "answer": "1"}] * 3, CFG, n=2)
    assert result["strict"] == 0.5 and result["length"] == 4 and result["truncated"] == 0
    assert result["stderr"] == pytest.approx(math.sqrt(0.25 / 3))  # per-problem scores 1, 0.5, 0
    assert result["pass@2"] == pytest.approx(2 / 3) and result["maj@2"] == pytest.approx((1 + 0.5 + 0) / 3)


@pytest.mark.parametrize("n, right, k", [(8, 0, 4), (8, 1, 1), (8, 3, 2), (8, 5, 4), (8, 8, 8), (5, 4, 3)])
def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_answer(n, right, k):
    draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
    assert eval_math.pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(
    "answers, share",
    [
        (["5", "5", "7"], 1.0),
        (["1/2", "0.5", "7", "7", "\\frac12"], 0.0),  # three spellings of one wrong answer outvote 7
        (["5", "5.0", "7", "7", "\\frac{10}2"], 1.0),  # and of the right one
        (["7", "7", "5", "5"], 0.5),  # a draw
        (["7", None, None, None], 0.0),  # no answer is no vote
        ([None, None], 0.0),
    ],
)
def test_the_majority_counts_equal_answers_together(answers, share):
    rows = [{"extracted": a, "strict": a is not None and eval_math.same_answer(a, "5")} for a in answers]
    assert eval_math.majority(rows) == share


def test_a_base_model_that_runs_on_is_judged_by_its_own_problem(tokenizer, monkeypatch):
    run_on = "It is 4.\n#### 4\n\nQuestion:\nAnd 3+3?\nAnswer:\n#### 6"
    answer_with(monkeypatch, [[run_on]], truncated=[run_on])
    base = SimpleNamespace(**vars(CFG) | {"system_prompt": None})
    result = eval_math.evaluate(FakeNet, tokenizer, [{"question": "2+2?", "answer": "4"}], base)
    assert result["strict"] == 1 and result["truncated"] == 0
    assert eval_math.evaluate(FakeNet, tokenizer, [{"question": "2+2?", "answer": "4"}], CFG)["strict"] == 0


@pytest.mark.parametrize("n, marks", [(1, []), (2, [2]), (3, [2, 3]), (4, [2, 4]), (6, [2, 4, 6]), (8, [2, 4, 8])])
def test_pass_is_told_for_powers_of_two_and_for_all_answers(n, marks):
    group = [{"strict": False, "lenient": False, "truncated": False, "tokens": 1, "extracted": None}] * n
    found = [key for key in eval_math.summarise([group]) if "@" in key]
    assert found == [f"pass@{k}" for k in marks] + [f"maj@{n}"] * (n > 1)


def test_problems_keep_their_numbers_and_the_random_numbers_that_go_with_them(tokenizer, monkeypatch):
    """A share of the problems, numbers 7 and 3: the rows, the calls, and what generate is asked."""
    asked, told = [], []

    def fake(net, tokenizer, prompts, *arguments, prompt_ids, progress, on_done):
        asked.append((*arguments, list(prompt_ids)))
        for i in reversed(range(len(prompts))):
            on_done(i, [Completion([5], [0.0], f"#### {i + j}", False) for j in range(2)])

    monkeypatch.setattr(sample, "generate", fake)
    cfg = SimpleNamespace(**vars(CFG) | {"seed": 11})
    problems = [{"question": "a", "answer": "0"}, {"question": "b", "answer": "2"}]
    result = eval_math.evaluate(FakeNet, tokenizer, problems, cfg, 2, 0.7, [7, 3], lambda *pair: told.append(pair))
    assert asked == [(2, 9, 0.7, 11, [7, 3])]
    rows = [(row["index"], row["sample"], row["question"], row["extracted"], row["strict"]) for row in result["rows"]]
    assert rows == [(7, 0, "a", "0", True), (7, 1, "a", "1", False), (3, 0, "b", "1", False), (3, 1, "b", "2", True)]
    assert told == [(3, result["rows"][2:]), (7, result["rows"][:2])]


def test_a_base_model_is_asked_without_a_chat_template(tokenizer):
    [ids] = eval_math.encode_problems(tokenizer, [{"question": "1+1?"}], None, "Question:\n{question}\nAnswer:\n")
    assert ids == tokenizer.encode("Question:\n1+1?\nAnswer:\n")


def test_a_prompt_that_fills_the_context_is_refused(tokenizer):
    [ids] = eval_math.encode_problems(tokenizer, [{"question": "1+1?"}], "", "{question}")
    for context in (len(ids), len(ids) + 1):
        net = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=context))
        if context > len(ids):
            assert eval_math.checked_prompts(net, tokenizer, [{"question": "1+1?"}], CFG, "data") == [ids]
        else:
            with pytest.raises(UserError, match=f"data: problem 1 has a prompt of {len(ids)} tokens"):
                eval_math.checked_prompts(net, tokenizer, [{"question": "1+1?"}], CFG, "data")


# --- benchmarks by name -----------------------------------------------------------------------------------------------

PUBLISHED = {  # the first row of each data set, in the columns it has on the hub
    "gsm8k": {"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
    "math": {"problem": "2+2?", "level": "Level 3", "type": "Algebra", "solution": "So $\\boxed{4}$."},
    "deepmath": {"question": "2+2?", "final_answer": "4", "difficulty": 5.0, "topic": "Algebra"},
    "math500": {"problem": "2+2?", "solution": "...", "answer": "4", "subject": "Algebra", "level": 1},
    "aime24": {"id": 60, "problem": "2+2?", "solution": "...", "answer": "4", "year": "2024"},
    "aime25": {"problem": "2+2?", "answer": "4", "id": "0"},
    "amc23": {"id": 0, "question": "2+2?", "answer": "4.0", "url": "..."},
    "minerva": {"question": "2+2?", "answer": "4"},
    "olympiad": {"question": "2+2?", "final_answer": ["$4$"], "subject": "Algebra"},
    "gaokao2023en": {"question": "2+2?", "answer": "4"},
    "svamp": {"ID": "chal-1", "Body": "Two and two.", "Question": "How many?", "Answer": "4.0"},
}


@pytest.mark.parametrize("name", eval_math.DATASETS)
def test_every_data_set_loads_by_name_from_its_published_columns(name, monkeypatch):
    asked = []

    def load_dataset(path, configuration, split):
        asked.append((path, configuration, split))
        return datasets.Dataset.from_list([PUBLISHED[name]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    split = "train" if name in ("math", "deepmath") else "test"
    [problem] = eval_math.load_problems(name, split)
    assert problem["question"] in ("2+2?", "Two and two. How many?") and is_correct(problem["answer"], "4")
    assert "@" not in asked[0][0] and asked[0][2] in ("train", "test", "train+test")
    with pytest.raises(UserError, match="has no split 'dev'"):
        eval_math.load_problems(name, "dev")


def test_a_data_set_with_other_columns_than_published_is_refused(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([{"q": "x", "a": "1"}]))
    with pytest.raises(UserError, match="gsm8k.*has changed"):
        eval_math.load_problems("gsm8k", "test")
    with pytest.raises(UserError, match="row 0: needs a question"):
        eval_math.load_problems("owner/name", "test")


def test_levels_choose_problems(tmp_path):
    rows = [{"question": "?", "answer": str(i), "level": level} for i, level in
            enumerate([1, 3, "Level 4", "Level 5", "Level ?"])]
    path = write(tmp_path, *rows, {"question": "?", "answer": "9"})
    assert [p["answer"] for p in eval_math.load_problems(path + "@3-5")] == ["1", "2", "3"]
    assert len(eval_math.load_problems(path)) == 6
    for suffix, words in (("@hard", "levels are written as @3-5"), ("@7-8", "no problems of level 7-8")):
        with pytest.raises(UserError, match=words):
            eval_math.load_problems(path + suffix)


def test_math_is_its_levels_3_to_5_unless_others_are_asked_for(monkeypatch):
    rows = [PUBLISHED["math"] | {"level": f"Level {i}", "solution": f"$\\boxed{{{i}}}$"} for i in range(1, 6)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    for name, levels in (("math", "345"), ("math@1-2", "12"), ("math@5-5", "5")):
        assert "".join(p["answer"] for p in eval_math.load_problems(name, "train")) == levels


@pytest.mark.parametrize(
    "dataset, template, answer_format",
    [
        ("gsm8k", "gsm8k", "hash"),
        ("data/gsm8k", "gsm8k", "hash"),
        ("data/math500/test.jsonl", "boxed", "boxed"),
        ("data/olympiadbench/", "boxed", "boxed"),
        ("math@1-5", "boxed", "boxed"),
        ("data/math/test.jsonl@3-5", "boxed", "boxed"),
        ("data/gsm8k_final", "gsm8k", "hash"),
        ("toy/test.jsonl", "plain", "any"),
        ("owner/name", "plain", "any"),
    ],
)
def test_auto_means_the_conventions_of_the_data_set(dataset, template, answer_format):
    auto = SimpleNamespace(prompt_template="auto", system_prompt="auto", answer_format="auto")
    chosen = eval_math.choose_prompt(auto, dataset)
    assert (chosen.system_prompt, chosen.prompt_template) == eval_math.PROMPTS[template][:2]
    assert chosen.answer_format == answer_format
    own = SimpleNamespace(prompt_template="Q: {question}", system_prompt="Be brief.", answer_format="boxed")
    assert eval_math.choose_prompt(own, dataset) == own
    with pytest.raises(UserError, match="must contain {question}"):
        eval_math.choose_prompt(SimpleNamespace(**vars(auto) | {"prompt_template": "boxd"}), dataset)


# --- the script -------------------------------------------------------------------------------------------------------

def test_the_script_prints_a_table_and_writes_responses(checkpoint, problems, tmp_path):
    """Two data sets, interrupted in the second, and resumed: the same rows as in one go."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    copy = tmp_path / "other.jsonl"
    copy.write_text(Path(problems).read_text())
    arguments = [f"--model={checkpoint}", f"--dataset={problems},{copy}", "--num_problems=6", "--n=4",
                 "--max_new_tokens=4", "--device=cpu"]
    done = fork_script("eval_math.py", *arguments, f"--out_dir={whole}")
    assert re.search(r"pass@2 +pass@4 +maj@4 +cut off", done.stdout), done.stderr
    results = json.loads((whole / "results.json").read_text())
    assert set(results) == {str(problems), str(copy)} and results[str(copy)]["problems"] == 6
    files = sorted(p.name for p in whole.glob("*.jsonl"))
    lines = {name: (whole / name).read_text().splitlines() for name in files}
    assert [len(v) for v in lines.values()] == [1 + 24] * 2
    row = json.loads(lines[files[0]][1])
    assert {"question", "answer", "response", "extracted", "strict", "lenient", "truncated"} <= row.keys()

    broken.mkdir()
    (broken / files[0]).write_text("\n".join(lines[files[0]]) + "\n")
    (broken / files[1]).write_text("\n".join(lines[files[1]][:12]) + "\n" + lines[files[1]][12][:40])  # killed here
    done = fork_script("eval_math.py", *arguments, f"--out_dir={broken}", "--init_from=resume")
    assert "6 of them answered already" in done.stdout and "2 of them answered already" in done.stdout, done.stderr
    again = eval_math.read_responses(str(broken / files[1]))[1]
    assert again == eval_math.read_responses(str(whole / files[1]))[1]
    changed = copy.read_text().splitlines()
    copy.write_text("\n".join([changed[0].replace('"question": "', '"question": "Now: '), *changed[1:]]) + "\n")
    done = fork_script("eval_math.py", *arguments, f"--out_dir={broken}", "--init_from=resume")
    assert "5 of them answered already" in done.stdout, done.stderr  # the changed problem is asked anew
    assert_refused(fork_script("eval_math.py", *arguments, f"--out_dir={broken}", "--init_from=resume", "--seed=5"),
                   "made with another seed (1337, now 5)")

    answers = sorted((broken / files[0]).read_text().splitlines())
    done = fork_script("eval_math.py", *arguments, f"--out_dir={broken}", "--init_from=resume", "--num_problems=2")
    assert "2 of them answered already" in done.stdout, done.stderr
    assert sorted((broken / files[0]).read_text().splitlines()) == answers  # what is not asked now is kept
    (broken / "log.jsonl").touch()
    assert_refused(fork_script("eval_math.py", *arguments, f"--out_dir={broken}"), "holds a training run")
    assert_refused(fork_script("eval_math.py", f"--model={checkpoint}", f"--dataset={problems}",
                               "--prompt_template=" + "{question}" * 40), "problems.jsonl: problem 1 has a prompt of")

    first = (whole / files[0]).read_bytes()
    done = fork_script("eval_math.py", *arguments, f"--out_dir={whole}")
    assert "moved the earlier run" in done.stdout and (tmp_path / "whole.1" / files[0]).read_bytes() == first
    assert_refused(fork_script("eval_math.py", f"--model={checkpoint}", "--dataset=nowhere.jsonl"), "nowhere.jsonl")
    assert_refused(fork_script("eval_math.py", f"--dataset={problems},{problems}"), "each once")
    assert_refused(fork_script("eval_math.py", "--n=4", "--temperature=0"), "all the same at temperature 0")


def row_of(index, **changes):
    return {"index": index, "question": str(index), "answer": "1", "response": "#### 1", "tokens": 10, "strict": True,
            "lenient": True, "truncated": False, "extracted": "1"} | changes


def test_the_table_by_hand():
    summary = eval_math.summarise([[row_of(0)], [row_of(1, strict=False, truncated=True)], [row_of(2, strict=False)]])
    other = eval_math.summarise([[row_of(0, strict=False, lenient=False, tokens=30)]]) | {"tokens_per_second": 1234.5}
    lines = [line.split() for line in eval_math.table({"one": summary, "two": other})]
    assert lines[1:] == [["one", "3", "0.333", "+-", "0.333", "1.000", "33.3%", "10", "-"],
                         ["two", "1", "0.000", "+-", "0.000", "0.000", "0.0%", "30", "1,234"],
                         ["mean", "of", "the", "data", "sets", "0.167", "0.500"]]


def test_speed_is_that_of_the_answers_of_this_run_and_a_cut_is_warned_of(tmp_path, monkeypatch, capsys):
    path, clock = tmp_path / "data.jsonl", iter([100.0, 104.0])
    eval_math.write_responses(str(path), {"seed": 1}, {0: [row_of(0, tokens=1000)]})
    monkeypatch.setattr(eval_math, "time", SimpleNamespace(time=lambda: next(clock)))
    monkeypatch.setattr(eval_math, "evaluate", lambda *a: a[-1](1, [row_of(1, truncated=True, tokens=20)]))
    cfg, net = SimpleNamespace(n=1, temperature=0.0, max_new_tokens=20), SimpleNamespace(shard=None)
    problems = [{"question": "0", "answer": "1"}, {"question": "1", "answer": "1"}]
    summary = eval_math.ask(net, None, "data", problems, cfg, [1], str(path), 0, 1)
    assert summary["tokens_per_second"] == 5.0 and summary["length"] == 510 and summary["problems"] == 2
    assert "warning: 50% of the answers to data were cut off" in capsys.readouterr().out


def test_answers_are_gone_on_with_where_all_that_made_them_is_the_same(checkpoint, tmp_path):
    """Another adapter, by its numbers or by what they mean, is another run; the same from a file is the same."""
    cfg = SimpleNamespace(**dict.fromkeys(("model", "split", "prompt_template", "system_prompt", "answer_format", "n",
                                           "max_new_tokens", "temperature", "seed"), 1))
    digests = []
    for text in ("", "hex:3c23d70a", "hex:3c23d70b", "hex:3c23d70a3c23d70a", "hex:3c23d70a"):
        net = tinylora.load_adapted(checkpoint, text, "float32", "cpu")
        digests.append(eval_math.identity(net, "data", cfg))
    assert digests[1] == digests[4] and len({d["adapter"] for d in digests}) == 4
    net.adapter.meta["seed"] += 1
    assert eval_math.identity(net, "data", cfg)["adapter"] not in {d["adapter"] for d in digests}
    other = eval_math.identity(tinylora.load_adapted(checkpoint, "", "bfloat16", "cpu"), "data", cfg)
    assert other != digests[0] and set(vars(cfg)) < set(other)

    path, problems = str(tmp_path / "data.jsonl"), [{"question": str(i), "answer": "1"} for i in range(4)]
    unjudged = {k: v for k, v in row_of(2).items() if k != "strict"}
    eval_math.write_responses(path, {"n": 2}, {0: [row_of(0)] * 2, 1: [row_of(1)], 2: [unjudged] * 2,
                                               3: [row_of(3, answer="2")] * 2, 9: [row_of(9)] * 2})
    assert set(eval_math.earlier_answers(path, {"n": 2}, problems)) == {0, 9}


def test_regrading_counts_every_verdict_that_changes_and_leaves_out_what_is_not_whole(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    rows = [row_of(0), row_of(0, lenient=False), row_of(1, strict=False), row_of(1), row_of(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    eval_math.grade_again(str(path), "auto")
    out = capsys.readouterr().out
    assert "left out of the table: 1 problems with fewer than 2 responses" in out and "; 2 verdicts changed" in out
    assert re.search(r"^a.jsonl +2 +1.000", out, re.M)


def test_a_broken_line_before_the_last_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"response": "4", "answer": "4"}\n{"response": "4", "ans\n{"response": "4", "answer": "4"}\n')
    with pytest.raises(UserError, match="line 2: no JSON"):
        eval_math.read_responses(str(path))


def test_regrading_needs_no_model_and_reads_files_of_others(tmp_path):
    path = tmp_path / "theirs.jsonl"
    rows = [{"response": r"\boxed{4}", "answer": "4", "strict": False}, {"response": "#### 5\ud800", "answer": "5"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = fork_script("eval_math.py", f"--regrade={path}", "--answer_format=boxed")
    assert "2 verdicts changed" in done.stdout and "0.500 +- 0.500" in done.stdout, done.stderr
    settings, groups = eval_math.read_responses(str(tmp_path / "theirs.regraded.jsonl"))
    assert [row["strict"] for [row] in groups.values()] == [True, False] and settings == {"answer_format": "boxed"}
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows  # the original stays as it was
    path.write_text('{"response": "4", "answer": "4"}')  # whole, if without an end
    assert len(eval_math.read_responses(str(path))[1]) == 1
    path.write_bytes('{"response": "4", "answer": "4"}\n{"response": "é'.encode()[:-1])  # cut inside a character
    assert len(eval_math.read_responses(str(path))[1]) == 1
    path.write_text('{"reply": "4"}\n')
    assert_refused(fork_script("eval_math.py", f"--regrade={path}"), "line 1: 'response' must be str")
    for wrong in ('"truncated": "False"', '"index": [1]', '"tokens": null'):
        path.write_text('{"response": "4", "answer": "4", ' + wrong + "}\n")
        assert_refused(fork_script("eval_math.py", f"--regrade={path}"), "line 1: '")
    path.write_text('{"settings": {"answer_format": "xyz"}}\n{"response": "4", "answer": "4"}\n')
    assert_refused(fork_script("eval_math.py", f"--regrade={path}"), "'xyz' is unknown")
