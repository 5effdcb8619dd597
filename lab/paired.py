"""Two evaluations of the same problems: what was gained, what was lost, and can it be chance?

    python eval_math.py --dataset=gsm8k --out_dir=out/before
    python eval_math.py --dataset=gsm8k --adapter=out/run --out_dir=out/after
    python -m lab.paired --before=out/before/gsm8k.jsonl --after=out/after/gsm8k.jsonl

Most problems are answered right by both or by none. So the difference of two accuracies is far more
certain than each of them, and its standard error is that of the problems' own differences. The
exact test of McNemar (1947) looks at the problems that changed: p is how often coins would split
them at least as unevenly into gained and lost.
"""

import math
from dataclasses import dataclass
from statistics import fmean, pstdev

from configurator import configure
from support import UserError
from support.data import read_responses


@dataclass
class Settings:
    before: str = ""  # a file of responses of eval_math.py, one to a problem
    after: str = ""  # another one


def verdicts_of(path):
    """{(place of the problem, its text): the row of its response}."""
    _, groups = read_responses(path)
    if not groups or any(len(rows) > 1 or "strict" not in rows[0] for rows in groups.values()):
        raise UserError(f"{path} must hold one graded response to each problem, as eval_math.py "
                        "writes them with n=1")
    return {(index, row["question"]): row for index, [row] in groups.items()}


def paired(before, after):
    """Compare two lists of 0 and 1 -> accuracies, their difference with its standard error, the
    numbers of gained and lost problems, and p."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    gained, lost = differences.count(1), differences.count(-1)
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1)) / 2**changed
    return {"before": fmean(before), "after": fmean(after), "difference": fmean(differences),
            "stderr": pstdev(differences) / math.sqrt(len(differences)),
            "gained": gained, "lost": lost, "p": min(1.0, 2 * tail)}


def main():
    cfg = configure(Settings)
    before, after = verdicts_of(cfg.before), verdicts_of(cfg.after)
    both = [key for key in before if key in after]
    if not both:
        raise UserError(f"{cfg.before} and {cfg.after} have no problem in common")
    print(f"{len(both)} problems that both files answer ({len(before)} and {len(after)})")
    for kind in ("strict", "lenient"):
        f = paired(*([int(rows[key][kind]) for key in both] for rows in (before, after)))
        print(f"{kind}: {f['before']:.3f} -> {f['after']:.3f}, {f['difference']:+.3f} +- "
              f"{f['stderr']:.3f}; {f['gained']} gained, {f['lost']} lost, p = {f['p']:.3g}")


if __name__ == "__main__":
    main()
