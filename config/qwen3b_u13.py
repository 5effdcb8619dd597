# RL on GSM8K with Qwen2.5-3B-Instruct and 13 numbers: one vector, u = 13, for all 252 linears.
# python grpo.py config/qwen3b_u13.py
# The paper's 13 (7B) is --u=1 --n_tie=16, here 16 numbers. Its other sizes: lab/study.py.
# It does not give its prompt: this is VERL's.
model = "Qwen/Qwen2.5-3B-Instruct"
dataset = "gsm8k"
eval_dataset = "gsm8k"
prompt_template = '{question} Let\'s think step by step and output the final answer after "####".'
answer_format = "hash"
out_dir = "out/qwen3b_u13"
rank = 2
u = 13
n_tie = 0
lr = 2e-4  # the highest of the paper's sweep; it does not say which rate won at 13 numbers
max_steps = 350  # 3 epochs of 7,473 problems
batch_size = 64  # problems; the paper's 64 may be problems or completions
group_size = 4
max_new_tokens = 1024  # the paper allows 4,096; completions have about 250 on average
micro_batch_tokens = 16384
eval_interval = 50
save_interval = 10
