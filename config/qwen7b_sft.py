# Supervised training on GSM8K's solutions with Qwen2.5-7B-Instruct and 13 numbers: the arm that the paper holds against
# reinforcement learning. Its batch, epochs and prompt are not published: these are those of qwen7b_u13.py.
# One GPU: python sft.py config/qwen7b_sft.py        Eight: torchrun --nproc_per_node=8 sft.py config/qwen7b_sft.py
model = "Qwen/Qwen2.5-7B-Instruct"
dataset = "gsm8k"
eval_dataset = "gsm8k"
prompt_template = '{question} Let\'s think step by step and output the final answer after "####".'  # VERL's
answer_format = "hash"
out_dir = "out/qwen7b_sft"
rank = 2
u = 13
n_tie = 0
lr = 2e-4  # top of the paper's sweep; which rate won at 13 numbers is not published
max_steps = 350  # 3 epochs of 7,473 problems
batch_size = 64
max_new_tokens = 1024
packing = True
micro_batch_tokens = 8192  # some 4.4 MB of activations a token at 7B
eval_interval = 50
save_interval = 10
