# RL on the toy as the studies in lab/study.py run it: 30 steps, and an evaluation before and after.
# python grpo.py config/toy_rl.py
model = "toy/base"
dataset = "toy/train.jsonl"
eval_dataset = "toy/test.jsonl"
out_dir = "out/toy_rl"
rank = 2  # as in the paper
u = 1
n_tie = 1
max_steps = 30
eval_interval = 0
save_interval = 0
