# RL on GSM8K with Llama-3.1-8B (base) and LoRA of rank 1, as in LoRA Without Regret.
# python grpo.py config/llama8b_gsm8k_lora.py
# Its authors swept --lr and --rank, and say no more. All weights: --method=full
# The model has no chat template. It may go on after its answer, and is then cut off without reward.
model = "meta-llama/Llama-3.1-8B"
dataset = "gsm8k"
eval_dataset = "gsm8k"
prompt_template = '{question} Let\'s think step by step and output the final answer after "####".'
answer_format = "hash"
out_dir = "out/llama8b_gsm8k_lora"
method = "lora"
rank = 1
lr = 1e-4  # about ten times the best rate of full fine-tuning
objective = "dr_grpo"  # advantages without the std, as theirs
max_steps = 240
batch_size = 32
group_size = 32
max_new_tokens = 512
micro_batch_tokens = 8192
eval_interval = 40
save_interval = 10
