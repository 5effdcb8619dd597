"""The embedded toy: its files are what toy/make.py makes, its problems are sound, and the main job learns on it."""

import json
import random
import re

import make
import pytest
from conftest import ROOT
from forks import fork_script

import model

TOY = ROOT / "toy"


def rows(name):
    return [json.loads(line) for line in (TOY / name).read_text(encoding="utf-8").splitlines()]


def test_problems_and_tokenizer_are_those_that_make_makes(tmp_path):
    train, test = make.make_problems(random.Random(make.SEED))
    assert rows("train.jsonl") == train and rows("test.jsonl") == test
    writing = random.Random(make.SEED)
    for name, problems in (("human/train.jsonl", train), ("human/test.jsonl", test)):
        assert rows(name) == [p | {"solution": make.human_solution(p, writing)} for p in problems]
    make.write_config(str(tmp_path), make.write_tokenizer(str(tmp_path), make.tokenizer_texts(train)))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / name).read_text() == (TOY / "base" / name).read_text()


def test_no_test_problem_is_in_the_training_set():
    train, test = ({row["question"] for row in rows(name)} for name in ("train.jsonl", "test.jsonl"))
    assert len(train) == 2000 and len(test) == 500 and not train & test


def test_solutions_in_other_words_hold_the_same_calculations():
    for row, plain in zip(rows("human/test.jsonl"), rows("test.jsonl")):
        assert re.findall(r"\d+[-+*/]\d+=\d+", row["solution"]) == re.findall(r"\d+[-+*/]\d+=\d+", plain["solution"])
        assert row["solution"].endswith(f" #### {row['answer']}") and row["solution"] != plain["solution"]


def test_worked_solutions_are_right():
    for row in rows("test.jsonl"):
        *steps, final = row["solution"].split(". ")
        value = int(re.search(r"has (\d+) ", row["question"])[1])
        for step in steps:
            a, sign, b, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups()
            assert int(a) == value
            value = {"+": value + int(b), "-": value - int(b), "*": value * int(b), "/": value / int(b)}[sign]
            assert value == int(result)
        assert final == f"#### {row['answer']}" and value == int(row["answer"])


def test_the_toy_is_small():
    assert sum(f.stat().st_size for f in TOY.rglob("*") if f.is_file() and "__pycache__" not in str(f)) < 3e6
    assert sum(p.numel() for p in model.load_model(str(TOY / "base"), device="cpu").parameters()) == 657024


def test_twenty_steps_with_thirteen_numbers_teach_the_base_to_work_answers_out(tmp_path):
    done = fork_script("grpo.py", "--max_steps=20", "--eval_size=100", f"--out_dir={tmp_path}/toy", "--device=cpu")
    assert done.returncode == 0, done.stderr
    base, trained = map(float, re.search(r"toy: greedy accuracy (\S+) -> (\S+) with 13 numbers", done.stdout).groups())
    assert base < 0.4 and trained > 0.8
    assert re.search(r"-> (\d+[-+*/]\d+=\d+\. )+#### \d+\n", done.stdout)  # an answer that is worked out


@pytest.mark.parametrize("wanted, sign", [("Think step by step.", "="), ("Answer at once.", "####")])
def test_the_base_model_follows_its_system_message(wanted, sign):
    done = fork_script("sample.py", f"--system_prompt={wanted}", "--n=1", "--temperature=0", "--device=cpu")
    assert sign in done.stdout.splitlines()[-3].split(" ")[0], done.stdout
