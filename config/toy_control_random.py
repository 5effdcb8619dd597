# A control for `python grpo.py`: the toy is rewarded by a coin, which knows nothing of the answer.
# python grpo.py config/toy_control_random.py
from hashlib import sha256

out_dir = "out/toy_control_random"
max_steps = 30
eval_interval = 0
save_interval = 0


def reward(problem, completion):
    """0 or 1 by a coin of this text, which falls the same way whenever the run is repeated."""
    text = problem["question"] + completion.text
    return float(sha256(text.encode()).digest()[0] % 2)
