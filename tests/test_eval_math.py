"""eval_math.py and support/data.py: problems from files and the hub, prompts, scores and the script."""

import csv
import gzip
import itertools
import json
import math
import re
from pathlib import Path

import datasets
import pytest
from conftest import SHARED, assert_refused
from forks import fork_script

import eval_math
import tinylora
from eval_math import Settings, load_problems
from sample import Completion
from support import UserError
from support.data import read_responses, write_responses


def write(path, *rows):
    """A .jsonl file of rows, which are dicts or lines."""
    lines = [row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


# -------------------------------------------------------------------------------------- problems from files

@pytest.mark.parametrize("row, answer, solution", [
    ({"question": "q", "answer": "2"}, "2", "2"),
    ({"problem": "q", "answer": 4}, "4", "4"),
    ({"prompt": "q", "final_answer": 8.0}, "8", "8"),
    ({"question": "q", "final_answer": ["$1$", "$-1$"]}, "1, -1", "1, -1"),
    ({"question": "q", "answer": None, "solution": "7"}, "7", "7"),
    ({"question": None, "problem": "q", "answer": math.nan, "final_answer": "5"}, "5", "5"),
    ({"question": "q", "answer": "3+3=<<3+3=6>>6.\n#### 6\n"}, "6", "3+3=<<3+3=6>>6.\n#### 6\n"),
    ({"problem": "q", "solution": r"It is $\boxed{8}$. Check: the answer: 9 - 1."}, "8", None),
    ({"problem": "q", "answer": "18", "solution": "So 18.\n#### 19"}, "18", "So 18.\n#### 19"),
    # What the data did not mean is not read into the reference.
    ({"question": "q", "answer": "x = 1\n# answer: x\nprint(x)"}, "x = 1\n# answer: x\nprint(x)", None),
    ({"question": "q", "solution": "print(x)\n# answer: x"}, "print(x)\n# answer: x", None),
    ({"question": "q", "answer": "#### Steps\nfirst this\nthen that"}, "#### Steps\nfirst this\nthen that", None),
    ({"question": "q", "answer": r"Write \boxed{} around it."}, r"Write \boxed{} around it.", None),
])
def test_the_final_answer_and_the_solution_of_a_row(row, answer, solution):
    problem = eval_math.as_problem("here", row | {"level": 3})
    assert (problem["question"], problem["answer"], problem["level"]) == ("q", answer, 3)
    assert problem["solution"] == (solution or row.get("solution") or row["answer"])


ROWS = [{"question": "1,000 + 1?\nSay it.", "answer": "1001"}, {"question": 'A "NA"?', "answer": "007"},
        {"question": "None?", "answer": "None"}, {"question": "é?", "answer": "123456789012345678901.50"}]


@pytest.mark.parametrize("ending", [".jsonl", ".json", "lines.json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_problems(tmp_path, ending):
    path = tmp_path / f"test{ending}"
    if ending == ".json":
        path.write_text("\ufeff\n" + json.dumps(ROWS, indent=1), encoding="utf-8")
    elif ending == ".csv":
        with open(path, "w", encoding="utf-8-sig", newline="") as f:
            writer = csv.DictWriter(f, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    elif ending == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    else:
        write(path, "\ufeff", ROWS[0], "\r\n", *ROWS[1:])
    problems = load_problems(str(path))
    assert [(p["question"], p["answer"]) for p in problems] == [(r["question"], r["answer"]) for r in ROWS]
    assert ending == "lines.json" or load_problems(str(tmp_path), "test") == problems


GOOD = {"question": "x", "answer": "1"}


@pytest.mark.parametrize("name, content, words", [
    ("x.jsonl", [], "holds no problems"),
    ("x.jsonl", ["{}\n"], "line 1: needs a question"),
    ("x.jsonl", ["1\n"], "line 1 is no JSON object"),
    ("x.jsonl", ["\n", GOOD, {"question": "y", "reply": "1"}], "line 3: needs a question"),
    ("x.jsonl", [GOOD, "{nonsense\n"], "line 2 is malformed (JSONDecodeError"),
    ("x.jsonl", ["[" * 100_000], "is malformed (RecursionError"),
    ("x.jsonl", [GOOD | {"answer": "  "}], "it has {'question': 'x', 'answer': '  '}"),
    ("x.jsonl", [GOOD | {"question": " "}], "line 1: needs a question"),
    ("x.jsonl", [GOOD | {"answer": True}], "it has {'question': 'x', 'answer': 'True'}"),
    ("x.jsonl", [GOOD | {"answer": math.nan}], "'answer': 'nan'"),
    ("x.jsonl", [{"prompt": [{"role": "user", "content": "?"}], "solution": "7"}], "needs a question, a text named"),
    ("x.jsonl.gz", gzip.compress(b"{}", mtime=0), "convert or unpack it"),
    ("x.txt", b"1+1=2", "does not end in .jsonl, .json, .csv, .parquet"),
    ("x.json", b'[{"question": "x", "answer": "1"},', "x.json is malformed (JSONDecodeError"),
    ("x.json", b"[1]", "row 1 is no JSON object"),
    ("x.csv", b"question,answer\nHow many, then?,3\n", "or has more fields than the header: put quotes"),
    ("x.csv", b"question;answer\n1+1?;2\n", "it has {'question;answer': '1+1?;2'}"),
    ("x.csv", b"question,answer\n\xff,2\n", "x.csv is malformed (UnicodeDecodeError"),
    ("x.parquet", b"PAR1", "x.parquet is malformed"),
    ("nowhere.jsonl", None, "nowhere.jsonl cannot be read: "),
    ("directory", None, "directory/train.jsonl"),
    ("gsm9k", None, "nor one of gsm8k, math"),
    ("x.jsonl@hard", b"", "'x.jsonl@hard' is neither a file"),
])
def test_data_that_cannot_be_used_is_refused_by_file_and_row_with_the_reason(
        tmp_path, monkeypatch, name, content, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    if isinstance(content, list):
        write(tmp_path / name, *content)
    elif content is not None:
        (tmp_path / name.partition("@")[0]).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(words)):
        load_problems(name)


def test_levels_choose_problems(tmp_path):
    levels = [1, 3, "Level 4", "Level 5", "Level ?", None, 35]
    path = write(tmp_path / "a.jsonl", *({"question": "?", "answer": i, "level": x} for i, x in enumerate(levels)))
    assert [p["answer"] for p in load_problems(path + "@3-5")] == ["1", "2", "3"] and len(load_problems(path)) == 7
    with pytest.raises(UserError, match="@7-8 holds no problems"):
        load_problems(path + "@7-8")


SIZES = {"gsm8k/train": 7473, "gsm8k/test": 1319, "math/train": 7500, "math/test": 5000, "math500/test": 500,
         "aime24/test": 30, "aime25/test": 30, "amc23/test": 40, "minerva_math/test": 272,
         "olympiadbench/test": 675, "gaokao2023en/test": 385, "svamp/test": 1000}


@pytest.mark.parametrize("name", SIZES)
def test_the_benchmarks_load_with_the_references_that_they_have(name):
    directory, split = name.split("/")
    if not (SHARED / "data" / directory).exists():
        pytest.skip("needs the benchmarks in ../shared/data")
    problems = load_problems(str(SHARED / "data" / directory), split)
    lines = (SHARED / "data" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    assert [p["answer"] for p in problems] == [r["answer"].strip() for r in rows] and len(rows) == SIZES[name]
    if directory in ("gsm8k", "math500"):  # worked solutions alone give the same references
        alone = [eval_math.as_problem("here", {"question": "?", "answer": r["solution"]}) for r in rows]
        assert all(eval_math.is_correct(p["answer"], r["answer"]) for p, r in zip(alone, rows))


# --------------------------------------------------------------------------------- problems from the hub

PUBLISHED = {  # the first row of each data set, in the columns it has on the hub
    "gsm8k": {"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
    "math": {"problem": "2+2?", "level": "Level 3", "type": "Algebra", "solution": "So $\\boxed{4}$."},
    "math12k": {"problem": "2+2?", "level": "Level 3", "type": "Algebra", "solution": "...", "answer": "4"},
    "deepmath": {"question": "2+2?", "final_answer": "4", "difficulty": 5.0, "topic": "Algebra"},
    "math500": {"problem": "2+2?", "solution": "...", "answer": "4", "subject": "Algebra", "level": 1},
    "aime24": {"id": 60, "problem": "2+2?", "solution": "...", "answer": "4", "year": "2024"},
    "aime25": {"problem": "2+2?", "answer": "4", "id": "0"},
    "amc23": {"id": 0, "question": "2+2?", "answer": "4.0", "url": "..."},
    "minerva": {"question": "2+2?", "answer": "4"},
    "olympiad": {"question": "2+2?", "final_answer": ["$4$"], "subject": "Algebra"},
    "gaokao2023en": {"question": "2+2?", "answer": "4"},
    "svamp": {"ID": "chal-1", "Body": "2+2", "Question": "?", "Answer": "4.0"},
}


def hub_of(monkeypatch, *rows):
    """A hub that holds these rows. Returns the list of what it is asked for."""
    asked = []

    def load_dataset(*arguments, split):
        asked.append((*arguments, split))
        return datasets.Dataset.from_list(list(rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_data_set_loads_by_name_from_its_published_columns(name, monkeypatch):
    asked = hub_of(monkeypatch, PUBLISHED[name])
    assert PUBLISHED.keys() | {"tulu3", "openthoughts3"} == eval_math.DATASETS.keys()  # these are in test_sft.py
    [problem] = load_problems(name, "train" if name in ("math", "math12k", "deepmath") else "test")
    assert problem["question"].replace(" ", "") == "2+2?"
    assert eval_math.is_correct(problem["answer"], "4")
    assert "@" not in asked[0][0] and asked[0][2] in ("train", "test", "train+test")
    with pytest.raises(UserError, match="has no split 'dev'"):
        load_problems(name, "dev")


def test_other_data_sets_other_columns_and_levels(monkeypatch):
    asked = hub_of(monkeypatch, {"problem": "x", "solution": "1"})
    assert load_problems("owner/name", "dev")[0]["answer"] == "1" and asked == [("owner/name", None, "dev")]
    hub_of(monkeypatch, {"q": "x", "a": "1"})
    for name in ("gsm8k", "owner/name"):
        with pytest.raises(UserError, match="row 0: needs a question"):
            load_problems(name, "test")
    hub_of(monkeypatch, *({"problem": "?", "level": f"Level {i}", "solution": str(i)} for i in range(1, 6)))
    for name, levels in (("math", "345"), ("math@1-2", "12"), ("math@5-5", "5"), ("math12k", "345")):
        assert "".join(p["answer"] for p in load_problems(name, "train")) == levels


# ----------------------------------------------------------------------------------------------- prompts

@pytest.mark.parametrize("dataset, template", [
    ("gsm8k", "gsm8k"), ("data/gsm8k", "gsm8k"), ("data/gsm8k_final", "gsm8k"), ("gsm8k.csv", "gsm8k"),
    ("data/math500/test.jsonl", "boxed"), ("data/olympiadbench/", "boxed"), ("math@1-5", "boxed"),
    ("data/math/test.jsonl@3-5", "boxed"), ("toy/test.jsonl", "plain"), ("owner/name", "plain"),
    ("gsm8k/mine/test.jsonl", "plain")])
def test_auto_means_the_conventions_of_the_data_set(dataset, template):
    chosen = eval_math.choose_prompt(Settings(), dataset)
    assert (chosen.system_prompt, chosen.prompt_template, chosen.answer_format) == eval_math.PROMPTS[template]
    own = Settings(prompt_template="Q: {question}", system_prompt="Be brief.", answer_format="boxed")
    assert eval_math.choose_prompt(own, dataset) == own
    named = eval_math.choose_prompt(Settings(prompt_template="base", answer_format="hash"), dataset)
    assert (named.system_prompt, named.answer_format) == (None, "hash")


def test_prompts_are_the_template_with_the_question_as_text(tokenizer):
    def texts(problem, system, template):
        [ids] = eval_math.encode_problems(tokenizer, [problem], system, template)
        return tokenizer.decode(ids)

    text = texts({"question": "{0} {x}?"}, "Be brief.", "{question}\nPut your answer within \\boxed{}.")
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert "{0} {x}?\nPut your answer within \\boxed{}.<|im_end|>" in text
    own = texts({"question": "x", "system": "Think."}, "Be brief.", "{question}")
    assert own.startswith("<|im_start|>system\nThink.<|im_end|>")
    [ids] = eval_math.encode_problems(tokenizer, [{"question": "1+1?"}], None, "Question:\n{question}\nAnswer:\n")
    assert ids == tokenizer.encode("Question:\n1+1?\nAnswer:\n")  # no chat template
    with pytest.raises(UserError, match="must contain {question}, or .* boxed, .*; got 'boxd'"):
        eval_math.encode_problems(tokenizer, [{"question": "x"}], "", "boxd")


def test_a_prompt_that_fills_the_context_is_refused(tokenizer):
    arguments = tokenizer, [{"question": "1+1?"}], "", "{question}"
    [ids] = eval_math.encode_problems(*arguments)
    assert eval_math.encode_problems(*arguments, context=len(ids) + 1) == [ids]
    with pytest.raises(UserError, match=re.escape(f"a prompt of {len(ids)} tokens fills") + ".*'1[+]1[?]"):
        eval_math.encode_problems(*arguments, context=len(ids))


# ------------------------------------------------------------------------------------------------ scores

@pytest.mark.parametrize("response, truncated, answer_format, strict, lenient", [
    ("1+1=2. #### 2", False, "hash", True, True),
    ("#### 2", True, "hash", False, True),  # cut off: had not finished, though others would count it
    ("so it is 2", False, "hash", False, True),
    (r"\boxed{2}", False, "hash", False, True),  # right, but not as asked
    (r"\boxed{2}", False, "boxed", True, True),
    ("2 + 2 is 4", False, "any", False, False),
    ("#### 5. The answer is 2", False, "hash", False, True),  # the line after #### says something else
    (r"\boxed{x} and 2", False, "boxed", False, True),  # the last number, beside a statement
    ("", False, "any", False, False),
])
def test_scores(response, truncated, answer_format, strict, lenient):
    verdict = eval_math.score(response, truncated, "2", answer_format)
    assert (verdict["strict"], verdict["lenient"]) == (strict, lenient)
    assert verdict["extracted"] is None or not truncated


@pytest.mark.parametrize("n, right, k", [(8, 0, 4), (8, 1, 1), (8, 3, 2), (8, 5, 4), (8, 8, 8), (5, 4, 3)])
def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_answer(n, right, k):
    draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
    assert eval_math.pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("answers, share", [
    (["5", "5", "7"], 1.0),
    (["1/2", "0.5", "7", "7", "\\frac12"], 0.0),  # three spellings of one wrong answer outvote 7
    (["5", "5.0", "7", "7", "\\frac{10}2"], 1.0),  # and of the right one
    (["7", "7", "5", "5.0"], 0.5),  # a draw
    (["7", "8", "5"], pytest.approx(1 / 3)),
    (["7", None, None, None], 0.0),  # no answer is no vote
    ([None, None], 0.0),
])
def test_the_majority_counts_equal_answers_together(answers, share):
    rows = [{"extracted": a, "strict": a is not None and eval_math.same_answer(a, "5")} for a in answers]
    assert eval_math.majority(rows) == share


def row_of(index, **changes):
    return {"index": index, "question": str(index), "answer": "1", "tokens": 10, "truncated": False, "strict": True,
            "lenient": True, "extracted": "1", "response": "#### 1"} | changes


def test_figures_by_hand():
    """Three problems, two answers each: 2, 1 and 0 right."""
    wrong = dict(strict=False, extracted="2", tokens=4)
    groups = [[row_of(0), row_of(0)], [row_of(1), row_of(1, **wrong)], [row_of(2, **wrong), row_of(2, **wrong)]]
    figures = eval_math.summarise(groups)
    assert figures["strict"] == 0.5 and figures["lenient"] == 1 and figures["length"] == 7
    assert figures["stderr"] == pytest.approx(math.sqrt(0.25 / 3))  # of 1, 0.5 and 0
    assert figures["pass@2"] == pytest.approx(2 / 3) and figures["maj@2"] == pytest.approx((1 + 0.5 + 0) / 3)
    for n, marks in ((1, []), (2, [2]), (3, [2, 3]), (4, [2, 4]), (6, [2, 4, 6]), (8, [2, 4, 8])):
        found = [key for key in eval_math.summarise([[row_of(0)] * n]) if "@" in key]
        assert found == [f"pass@{k}" for k in marks] + [f"maj@{n}"] * (n > 1)


def test_the_table_by_hand():
    one = eval_math.summarise([[row_of(0)], [row_of(1, strict=False, truncated=True)], [row_of(2, strict=False)]])
    two = eval_math.summarise([[row_of(0, strict=False, lenient=False, tokens=30)]])
    assert [line.split() for line in eval_math.table({"one": one, "two": two})] == [
        ["problems", "n", "strict", "stderr", "lenient", "truncated", "length"],
        ["one", "3", "1", "0.333", "0.333", "1.000", "33.3%", "10"],
        ["two", "1", "1", "0.000", "0.000", "0.000", "0.0%", "30"]]


@pytest.mark.parametrize("system, strict", [(None, True), ("", False)])
def test_a_base_model_that_runs_on_is_judged_by_its_own_problem(system, strict):
    run_on = "It is 4.\n#### 4\n\nQuestion:\nAnd 3+3?\nAnswer:\n#### 6"
    cfg = Settings(answer_format="hash", system_prompt=system)
    completions = [Completion([5, 6], [0.0, 0.0], text, True) for text in ("#### 5", run_on)]
    first, second = eval_math.grade({"question": "2+2?", "answer": "4"}, 7, completions, cfg)
    keys = ("index", "sample", "question", "answer", "tokens", "truncated", "extracted", "strict", "response")
    assert tuple(first[key] for key in keys) == (7, 0, "2+2?", "4", 2, True, None, False, "#### 5")
    assert (second["sample"], second["strict"], second["truncated"]) == (1, strict, not strict)
    assert ("3+3" in second["response"]) != strict


# -------------------------------------------------------------------------------------------- the script

STOP = """
import signal, support.data
real, calls = support.data.write_rows, []
def write_rows(path, rows, mode="ab"):
    real(path, rows, mode)
    calls.append(path)
    if len(calls) == 3:  # after the settings and two problems
        os.kill(os.getpid(), signal.SIGINT)
support.data.write_rows = write_rows
"""


@pytest.fixture
def evaluation(checkpoint, problems, tmp_path):
    """Arguments for two data sets of 6 problems, and the second one's file."""
    copy = tmp_path / "other.jsonl"
    copy.write_text(Path(problems).read_text())
    return ["eval_math.py", f"--model={checkpoint}", f"--dataset={problems},{copy}", "--num_problems=6", "--n=4",
            "--max_new_tokens=4", "--device=cpu"], copy


def test_a_run_that_is_stopped_or_killed_goes_on_to_the_same_answers(evaluation, tmp_path):
    arguments, copy = evaluation
    out = tmp_path / "out"
    done = fork_script(*arguments, f"--out_dir={out}")
    assert re.search(r"strict +stderr +lenient +pass@2 +pass@4 +maj@4 +truncated", done.stdout), done.stderr
    results = json.loads((out / "results.json").read_text())
    assert results[str(copy)]["problems"] == 6 and results[str(copy)]["n"] == 4
    first, second = sorted(out.glob("*.jsonl"))
    whole = {path: read_responses(str(path)) for path in (first, second)}
    lines = second.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 24 and {"question", "extracted", "lenient"} <= json.loads(lines[1]).keys()

    def resume(kept, *changes):
        done = fork_script(*arguments, f"--out_dir={out}", "--init_from=resume", *changes)
        assert f"problems, {kept} of them answered already" in done.stdout, done.stderr + done.stdout
        assert {path: read_responses(str(path)) for path in whole} == whole

    second.write_text("".join(lines[:12]) + lines[12][:40])  # killed while it wrote
    resume(2)
    resume(2, "--num_problems=2")  # answers that are not asked for now are kept
    resume(6)
    refused = fork_script(*arguments, f"--out_dir={out}", "--init_from=resume", "--seed=5")
    assert_refused(refused, "was made with another seed")
    copy.write_text(copy.read_text().replace("?", "??", 1))
    refused = fork_script(*arguments, f"--out_dir={out}", "--init_from=resume")
    assert_refused(refused, "was made with another adapter or problems")
    before = first.read_bytes()
    done = fork_script(*arguments, f"--out_dir={out}")
    assert "moved the earlier run" in done.stdout and (tmp_path / "out.1" / first.name).read_bytes() == before


def test_ctrl_c_says_how_to_go_on_and_keeps_the_answers(evaluation, tmp_path):
    arguments, _ = evaluation
    arguments = [*arguments, f"--out_dir={tmp_path}/out"]
    done = fork_script(*arguments, setup=STOP)
    assert done.returncode == 130 and f"--out_dir={tmp_path}/out --init_from=resume" in done.stdout, done.stderr
    done = fork_script(*arguments, "--init_from=resume")
    assert "6 problems, 2 of them answered already" in done.stdout and done.returncode == 0


@pytest.mark.parametrize("arguments, words", [
    (["--dataset=DATA,DATA"], "each once"),
    (["--dataset= ,"], "must name data sets"),
    (["--n=4", "--temperature=0"], "all the same at temperature 0"),
    (["--n=0"], "n must be at least 1"),
    (["--temperature=-0.5"], "temperature must be at least 0"),
    (["--answer_format=latex"], "must be one of auto, any, boxed"),
    (["--dataset=nowhere.jsonl"], "nowhere.jsonl cannot be read: "),
    (["--dataset=DATA", "--prompt_template=" + "{question}" * 40], "fills the model's context"),
    (["--dataset=DATA", "--prompt_template=boxd"], "must contain {question}"),
    (["--out_dir=RUN"], "holds a training run"),
    (["--regrade=RUN/log.jsonl"], "has no responses"),
    (["--regrade=RUN/nowhere.jsonl"], "nowhere.jsonl cannot be read"),
])
def test_mistakes_get_one_line(checkpoint, problems, tmp_path, arguments, words):
    (tmp_path / "log.jsonl").touch()
    given = [a.replace("DATA", problems).replace("RUN", str(tmp_path)) for a in arguments]
    out_dir = [] if "--out_dir=RUN" in arguments else [f"--out_dir={tmp_path}/out"]
    assert_refused(fork_script("eval_math.py", f"--model={checkpoint}", *given, *out_dir), words)
    assert not (tmp_path / "out").exists()


def test_answers_depend_on_the_numbers_of_the_adapter_and_on_their_meaning(checkpoint):
    problems, cfg = [{"question": "?", "answer": "1"}], Settings()

    def identity(adapter, dtype="float32", problems=problems, seed=None):
        net = tinylora.load_adapted(checkpoint, adapter, dtype, "cpu")
        if seed:
            net.adapter.meta["seed"] = seed
        return tuple(eval_math.identity(net, problems, cfg).values())

    same = identity("hex:3c23d70a")
    assert same == identity("hex:3c23d70a")
    others = [identity(""), identity("hex:3c23d70b"), identity("hex:3c23d70a3c23d70a"),
              identity("hex:3c23d70a", seed=9), identity("hex:3c23d70a", "bfloat16"),
              identity("hex:3c23d70a", problems=problems * 2)]
    assert len({same, *others}) == 7


# ------------------------------------------------------------------------------------------------ regrade

def test_regrading_needs_no_model_and_reads_files_of_others(tmp_path):
    rows = [{"response": r"\boxed{4}", "answer": "4", "strict": False}, {"response": "#### 5\ud800", "answer": "5"}]
    path = Path(write(tmp_path / "theirs.jsonl", *rows))
    done = fork_script("eval_math.py", f"--regrade={path}", "--answer_format=boxed", "--model=nowhere")
    assert "2 verdicts changed" in done.stdout and re.search(r"2 +1 +0.500 +0.500 +1.000", done.stdout), done.stderr
    settings, groups = read_responses(str(tmp_path / "theirs.regraded.jsonl"))
    assert [row["strict"] for [row] in groups.values()] == [True, False] and settings == {"answer_format": "boxed"}
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows  # the original stays


def test_regrading_counts_changed_verdicts_and_leaves_out_what_is_not_complete(tmp_path, capsys):
    groups = [[row_of(0), row_of(0, lenient=False)], [row_of(1, strict=False), row_of(1)], [row_of(2)]]
    write_responses(tmp_path / "a.jsonl", {"answer_format": "hash"}, groups)
    eval_math.grade_again(str(tmp_path / "a.jsonl"), "auto")
    out = capsys.readouterr().out
    assert "strict reads 'hash'; 2 verdicts changed" in out and "left out: 1 problems with fewer than 2" in out
    assert re.search(r"^a.jsonl +2 +2 +1.000", out, re.M)


@pytest.mark.parametrize("line, words", [
    ('{"reply": "4"}', "line 1: needs a response and an answer, which are texts"),
    ('{"response": "4", "answer": 4}', "line 1: needs a response and an answer"),
    ('{"response": "4", "ans', "line 1 is malformed"),
])
def test_responses_that_cannot_be_read_are_named_by_file_and_line(tmp_path, line, words):
    with pytest.raises(UserError, match=re.escape(words)):
        eval_math.grade_again(write(tmp_path / "a.jsonl", line + "\n"), "auto")
