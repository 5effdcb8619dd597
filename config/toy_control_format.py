# A control for `python grpo.py`: the toy is rewarded for a worked answer, be it right or wrong.
# python grpo.py config/toy_control_format.py
out_dir = "out/toy_control_format"
max_steps = 30
eval_interval = 0
save_interval = 0


def reward(problem, completion):
    """1 if the completion has a calculation and ends, else 0."""
    return float("=" in completion.text and not completion.truncated)
