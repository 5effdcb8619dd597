# RL on MATH with Llama-3.1-8B (base) and LoRA of rank 1, as in LoRA Without Regret.
# python grpo.py config/llama8b_math_lora.py
# Its authors sampled 32 answers to each of about 10,000 problems, and swept --lr and --rank. Their
# other settings are not known. All weights: --method=full
# The model has no chat template. It may go on after its answer, and is then cut off without reward.
model = "meta-llama/Llama-3.1-8B"
dataset = "math12k@1-5"  # all levels
eval_dataset = "math500"
prompt_template = ("{question}\n"
                   "Please reason step by step, and put your final answer within \\boxed{}.")
answer_format = "boxed"
out_dir = "out/llama8b_math_lora"
method = "lora"
rank = 1
lr = 1e-4  # about ten times the best rate of full fine-tuning
objective = "dr_grpo"  # advantages without the std, as theirs
max_steps = 157  # 10,048 problems, once
batch_size = 64
group_size = 32
max_new_tokens = 1024
micro_batch_tokens = 8192
eval_interval = 40
save_interval = 10
