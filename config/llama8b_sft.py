# Supervised training on GSM8K's solutions with Llama-3.1-8B-Instruct and 13 numbers: what the
# paper compares RL with.
# python sft.py config/llama8b_sft.py
# Larger: --method=lora --rank=8 --lr=0, or --method=full --lr=0
model = "meta-llama/Llama-3.1-8B-Instruct"
dataset = "gsm8k"
eval_dataset = "gsm8k"
prompt_template = '{question} Let\'s think step by step and output the final answer after "####".'
answer_format = "hash"
out_dir = "out/llama8b_sft"
rank = 2
u = 13
n_tie = 0
lr = 2e-4  # the highest of the paper's sweep; it gives no batch size, epochs or prompt
max_steps = 350  # 3 epochs of 7,473 solutions
batch_size = 64
max_new_tokens = 1024  # of a completion in the evaluation
micro_batch_tokens = 8192
eval_interval = 50
save_interval = 50
