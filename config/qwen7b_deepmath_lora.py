# LoRA Without Regret, RL: DeepMath-103K, LoRA of rank 1. The authors took Qwen3-8B-Base, which model.py does not know.
# python grpo.py config/qwen7b_deepmath_lora.py
model = "Qwen/Qwen2.5-7B"
dataset = "deepmath"
eval_dataset = "aime24"
prompt_template = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
answer_format = "boxed"
out_dir = "out/qwen7b_deepmath_lora"
method = "lora"
rank = 1
lr = 1e-4  # about ten times full fine-tuning's best; the authors sweep it
objective = "dr_grpo"  # advantages without the std, as theirs
max_steps = 500
batch_size = 64
group_size = 16
max_new_tokens = 8192
micro_batch_tokens = 16384
eval_interval = 50
save_interval = 10
