# Supervised training on the toy's problems, with solutions in other words than the model's own, as
# people's are.
# python sft.py config/toy_sft.py
model = "toy/base"
dataset = "toy/human"
eval_dataset = "toy/human"
out_dir = "out/toy_human"
rank = 2
u = 1
n_tie = 1
max_steps = 200  # one and a half epochs of 2,000 solutions
batch_size = 16
max_new_tokens = 128
eval_interval = 0
save_interval = 0
