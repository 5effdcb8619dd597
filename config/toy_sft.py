# Supervised training on solutions to the toy's problems in other words than the model's own, as people's are.
model = "toy/base"
dataset = "toy/human"
eval_dataset = "toy/human"
out_dir = "out/toy_human"
rank = 2
u = 1
n_tie = 1
max_steps = 200  # an epoch and a half of 2,000 solutions
batch_size = 16
max_new_tokens = 128
eval_interval = 0
save_interval = 0
