# RL on GSM8K with Qwen2.5-7B-Instruct and 13 numbers: one (u = 1) for 16 neighbouring linears, so
# ceil(196 / 16) = 13 groups. This is the 13 of the paper's Figure 1.
# The paper does not give its prompt: this is VERL's.
# python grpo.py config/qwen7b_n16.py
# torchrun --nproc_per_node=8 grpo.py config/qwen7b_n16.py
model = "Qwen/Qwen2.5-7B-Instruct"
dataset = "gsm8k"
eval_dataset = "gsm8k"
prompt_template = '{question} Let\'s think step by step and output the final answer after "####".'
answer_format = "hash"
out_dir = "out/qwen7b_n16"
rank = 2
u = 1
n_tie = 16
tie = "tiled"
lr = 2e-4  # the highest of the paper's sweep; it does not say which rate won at 13 numbers
max_steps = 350  # 3 epochs of 7,473 problems
batch_size = 64  # problems; the paper's 64 may be problems or completions
group_size = 4
max_new_tokens = 1024  # the paper allows 4,096; completions have about 250 on average
micro_batch_tokens = 8192  # activations take about 4.4 MB a token
eval_interval = 50
save_interval = 10
