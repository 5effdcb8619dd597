# RL on GSM8K with Qwen2.5-0.5B-Instruct and 13 numbers, on the two cores of a laptop: some
# minutes a step. Steps are saved one by one, so a run that was cut off goes on with
# python grpo.py config/qwen0.5b_laptop.py --init_from=resume
# Offline, with a checkpoint directory and the data as files, add
#     --model=DIR --dataset=DIR2 --eval_dataset=DIR2
model = "Qwen/Qwen2.5-0.5B-Instruct"
dataset = "gsm8k"
eval_dataset = "gsm8k"
system_prompt = "You are a helpful assistant."
prompt_template = (
    "{question}\nPlease reason step by step, and put your final answer within \\boxed{}.")
answer_format = "boxed"
out_dir = "out/qwen0.5b_laptop"
rank = 2
u = 13
n_tie = 0
lr = 3e-3
max_steps = 60
batch_size = 16
group_size = 4
max_new_tokens = 400  # before training a fifth of the sampled answers are longer
micro_batch_tokens = 4096
dtype = "bfloat16"
eval_interval = 0
eval_size = 256
save_interval = 1
