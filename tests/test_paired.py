"""lab.paired: the difference of two evaluations, by hand."""

import pytest
from conftest import assert_refused
from forks import fork_script

from lab.paired import paired
from support.data import write_responses


def test_a_difference_by_hand():
    """Eight problems: five are gained, one is lost, two stay. Coins split six 1 to 5 or worse in 2 * 7 of 64 cases."""
    figures = paired([0, 0, 0, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 0, 1, 0])
    assert figures["gained"] == 5 and figures["lost"] == 1 and figures["p"] == pytest.approx(14 / 64)
    assert (figures["before"], figures["after"], figures["difference"]) == (2 / 8, 6 / 8, 4 / 8)
    assert figures["stderr"] == pytest.approx(((6 / 8 - (4 / 8) ** 2) / 8) ** 0.5)
    assert paired([1, 0], [0, 1])["p"] == paired([1, 0], [1, 0])["p"] == 1


def responses(path, strict, questions, n=1):
    rows = [[{"index": i, "question": question, "strict": right, "lenient": True,
              "response": "", "answer": ""}] * n
            for i, (right, question) in enumerate(zip(strict, questions))]
    write_responses(str(path), {}, rows)
    return path


def test_the_problems_of_two_files_are_matched(tmp_path):
    before = responses(tmp_path / "a.jsonl", [True, False, False], ["p", "q", "r"])
    after = responses(tmp_path / "b.jsonl", [True, True, True], ["p", "q", "other"])
    done = fork_script("-m", "lab.paired", f"--before={before}", f"--after={after}")
    assert done.returncode == 0 and "2 problems that both files answer (3 and 3)" in done.stdout
    assert "strict: 0.500 -> 1.000, +0.500 +- 0.354; 1 gained, 0 lost, p = 1" in done.stdout
    assert "lenient: 1.000 -> 1.000, +0.000 +- 0.000; 0 gained, 0 lost, p = 1" in done.stdout


def test_what_cannot_be_compared_is_refused(tmp_path):
    one, other = responses(tmp_path / "a.jsonl", [True], ["p"]), responses(tmp_path / "b.jsonl", [True], ["q"])
    many = responses(tmp_path / "c.jsonl", [True], ["p"], n=2)
    for after, words in ((other, "no problem in common"), (many, "one graded response to each problem")):
        assert_refused(fork_script("-m", "lab.paired", f"--before={one}", f"--after={after}"), words)
