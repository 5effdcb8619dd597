# RL on MATH with Qwen2.5-3B-Instruct and 16 numbers: one (u = 1) for 16 neighbouring linears, so
# ceil(252 / 16) = 16 groups. SimpleRL's recipe, which the paper follows (section 5.1).
# python grpo.py config/qwen3b_math.py
# Other sizes: --n_tie=4, --n_tie=1, --n_tie=1 --u=2 ... (lab/study.py)
model = "Qwen/Qwen2.5-3B-Instruct"
dataset = "math12k"  # 8,888 problems of levels 3 to 5; the paper's are 8,523
eval_dataset = "math500"
system_prompt = "You are a helpful assistant."
prompt_template = ("{question}\n"
                   "Please reason step by step, and put your final answer within \\boxed{}.")
answer_format = "boxed"
out_dir = "out/qwen3b_math"
rank = 2
u = 1
n_tie = 16
tie = "tiled"
lr = 2e-4  # the highest of the paper's sweep; it does not say which rate won
kl_coef = 0.001
max_steps = 104  # 3 epochs, as in Table 2; Figure 5 shows some 500 steps
batch_size = 256
group_size = 8
max_new_tokens = 3072
micro_batch_tokens = 8192
eval_interval = 25
save_interval = 5
