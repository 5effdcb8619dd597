# Another task than right answers: show your working. A completion earns 1 if it has one calculation
# for each change in the story, and then the result: 39+8=47. 47+5=52. 52-7=45. #### 45
# Only this form counts. Nothing checks the numbers, and there are no reference answers.
# python grpo.py config/toy_format.py
#
# It takes about half a minute on two CPU cores. 13 numbers raise the greedy reward on 200 stories
# from 0.010 to 0.995 in 10 steps and 0.980 in 20 (with --seed=1 and 2 to 1.000 and 0.935), and that
# of samples at temperature 1, which is in the line of each step, from 0.29 to 0.63.
import random
import re

out_dir = "out/toy_format"
max_steps = 20
eval_interval = 10

_NAMES = ["Tom", "Ann", "Sam", "Mia"]
_THINGS = ["apples", "books", "shells", "keys"]
_CHANGES = ["{name} finds {b} more.", "{name} buys {b} more.", "{name} loses {b} of them.",
            "{name} sells {b} of them.", "Then {b} of them break."]
_CALCULATION = re.compile("[0-9]+[-+*/][0-9]+=[0-9]+")
_RESULT = re.compile("#### [0-9]+")


def problems(cfg, split):
    """Stories with 3 to 5 changes: 1,000 to train on, and 200 to evaluate on."""
    rng = random.Random(split)
    rows = []
    for _ in range(1000 if split == "train" else 200):
        name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
        count = rng.randint(3, 5)
        changes = [rng.choice(_CHANGES).format(name=name, b=rng.randint(2, 9))
                   for _ in range(count)]
        story = " ".join([f"{name} has {rng.randint(20, 40)} {thing}.", *changes])
        rows.append({"question": f"{story} How many {thing} are there now?", "changes": count})
    return rows


def reward(problem, completion):
    """1 if the completion is a calculation for each change and then the result, else 0."""
    *working, result = completion.text.split(". ")
    has_form = _RESULT.fullmatch(result) and all(map(_CALCULATION.fullmatch, working))
    return float(bool(has_form) and len(working) == problem["changes"])
