# RL on DeepMath-103K with Qwen2.5-7B (base) and LoRA of rank 1, as in LoRA Without Regret. Its
# authors took Qwen3-8B-Base: --model=Qwen/Qwen3-8B-Base.
# The base model, too, is asked through Qwen's chat template. Sampling stops where the template ends
# a turn (<|im_end|>), as well as at <|endoftext|>.
# python grpo.py config/qwen7b_deepmath_lora.py
model = "Qwen/Qwen2.5-7B"
dataset = "deepmath"
eval_dataset = "aime24"
prompt_template = ("{question}\n"
                   "Please reason step by step, and put your final answer within \\boxed{}.")
answer_format = "boxed"
out_dir = "out/qwen7b_deepmath_lora"
method = "lora"
rank = 1
lr = 1e-4  # about ten times the best rate of full fine-tuning; the authors sweep it
objective = "dr_grpo"  # advantages without the std, as theirs
max_steps = 500
batch_size = 64
group_size = 16
max_new_tokens = 8192
micro_batch_tokens = 16384
eval_interval = 50
save_interval = 10
