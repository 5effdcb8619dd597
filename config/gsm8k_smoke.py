# Three steps of RL on GSM8K with Qwen2.5-0.5B-Instruct and 13 numbers: does everything work on this
# machine? They take minutes on a CPU.
# python grpo.py config/gsm8k_smoke.py
# Offline, with any checkpoint directory and problems, add
#     --model=DIR --dataset=FILE.jsonl --eval_dataset=FILE.jsonl
model = "Qwen/Qwen2.5-0.5B-Instruct"
dataset = "gsm8k"
eval_dataset = "gsm8k"
prompt_template = '{question} Let\'s think step by step and output the final answer after "####".'
answer_format = "hash"
out_dir = "out/gsm8k_smoke"
rank = 2
u = 13
n_tie = 0
lr = 1e-4
max_steps = 3
batch_size = 2
group_size = 4
max_new_tokens = 256
micro_batch_tokens = 2048
eval_interval = 0
eval_size = 4
