# RL on DeepMath-103K with Qwen3-8B (base) and LoRA of rank 1, as in LoRA Without Regret. Its
# authors allowed 8,192 tokens, and swept --lr and --rank. Their other settings are not known.
# The base model, too, is asked through Qwen's chat template. Sampling stops where the template ends
# a turn (<|im_end|>), as well as at <|endoftext|>.
# python grpo.py config/qwen3-8b_deepmath_lora.py
model = "Qwen/Qwen3-8B-Base"
dataset = "deepmath"
eval_dataset = "aime24"  # or aime25: they took both
prompt_template = ("{question}\n"
                   "Please reason step by step, and put your final answer within \\boxed{}.")
answer_format = "boxed"
out_dir = "out/qwen3-8b_deepmath_lora"
method = "lora"
rank = 1
lr = 1e-4  # about ten times the best rate of full fine-tuning
objective = "dr_grpo"  # advantages without the std, as theirs
max_steps = 500
batch_size = 64
group_size = 16
max_new_tokens = 8192
micro_batch_tokens = 16384
eval_interval = 50
save_interval = 10
