# Three steps of GSM8K with Qwen2.5-0.5B-Instruct: does the whole path work on this machine? Minutes on a CPU.
# Offline, with any checkpoint directory and problems:
#     python grpo.py config/gsm8k_smoke.py --model=DIR --dataset=FILE.jsonl --eval_dataset=FILE.jsonl
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
