"""eval_math.py below the checker: problems from files, prompts, scores and the script."""

import json
import math
import re
from types import SimpleNamespace

import pytest
from conftest import SHARED, assert_refused, run_script

import eval_math
import sample
from configurator import UserError
from sample import Completion


def write(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_problems_come_from_files_and_folders_in_the_usual_columns(tmp_path):
    rows = [{"question": "1+1?", "answer": "2"}, {"problem": "2+2?", "answer": 4}, "\r\n",
            {"question": "3+3?", "answer": "Well, 3+3=<<3+3=6>>6.\n#### 6"},
            {"problem": "4+4?", "solution": "It is $\\boxed{8}$."}]
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
        ("#### 2", True, "hash", False, False),  # cut off: had not finished
        ("so it is 2", False, "hash", False, True),
        (r"\boxed{2}", False, "hash", False, True),  # right, but not as asked
        (r"\boxed{2}", False, "boxed", True, True),
        ("2 + 2 is 4", False, "any", False, False),
        ("#### 5. The answer is 2", False, "hash", False, True),  # the line after #### says something else
        ("", False, "any", False, False),
    ],
)
def test_scores(response, truncated, answer_format, strict, lenient):
    assert eval_math.score(response, truncated, "2", answer_format) == {"strict": strict, "lenient": lenient}


def test_braces_of_a_template_stay_text(tokenizer):
    template = "{question}\nPut your answer within \\boxed{}."
    [ids] = eval_math.encode_problems(tokenizer, [{"question": "{0} {x}?"}], "Be brief.", template)
    assert "{0} {x}?\nPut your answer within \\boxed{}.<|im_end|>" in tokenizer.decode(ids)
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    with pytest.raises(UserError, match="must contain"):
        eval_math.encode_problems(tokenizer, [{"question": "x"}], "", "no question")


def test_accuracy_and_its_standard_error_by_hand(tokenizer, monkeypatch):
    """Three problems, two answers each: 2, 1 and 0 right."""
    texts = [["#### 1", "#### 1"], ["#### 1", "#### 2"], ["3", "#### 2"]]

    def fake(*_, **__):
        return [[Completion([5] * 4, [0.0] * 4, text, False) for text in group] for group in texts]

    monkeypatch.setattr(sample, "generate", fake)
    cfg = SimpleNamespace(system_prompt="", prompt_template="{question}", answer_format="hash", max_new_tokens=9,
                          seed=0)
    result = eval_math.evaluate(None, tokenizer, [{"question": "?", "answer": "1"}] * 3, cfg, num_samples=2)
    assert result["strict"] == 0.5 and result["length"] == 4 and result["truncated"] == 0
    assert result["stderr"] == pytest.approx(math.sqrt(0.25 / 3))  # per-problem scores 1, 0.5, 0


def test_the_script_prints_accuracy_and_writes_responses(checkpoint, problems, tmp_path):
    out = tmp_path / "responses.jsonl"
    done = run_script("eval_math.py", f"--model={checkpoint}", f"--dataset={problems}", "--num_problems=6",
                      "--num_samples=2", "--temperature=1", "--max_new_tokens=4", f"--out_file={out}")
    assert re.search(r"accuracy \d\.\d{3} \+- \d\.\d{3} \(standard error\)", done.stdout), done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 12 and {"question", "answer", "response", "strict", "lenient", "truncated"} <= rows[0].keys()
    assert_refused(run_script("eval_math.py", f"--model={checkpoint}", "--dataset=nowhere.jsonl"), "nowhere.jsonl")
