# Supervised LoRA on 10,000 rows of OpenThoughts3 with Llama-3.1-8B, as in LoRA Without Regret. Its
# authors sweep --rank, --lr, --batch_size and --targets. Which rows they took, and where they cut
# them off, is not known; theirs is the loss on held-out rows, this has that of training.
# python sft.py config/llama8b_openthoughts_lora.py
# All weights: --method=full
model = "meta-llama/Llama-3.1-8B-Instruct"  # has a chat template; the authors took the base model
dataset = "openthoughts3"  # downloaded once from the hub
eval_dataset = ""
out_dir = "out/llama8b_openthoughts_lora"
method = "lora"
rank = 128
alpha = 32.0
lr = 0.0  # learning_rate_rule in tinylora.py, which has the authors' constants
max_steps = 312  # 10,000 rows, once
batch_size = 32
max_length = 16384
recompute = True
micro_batch_tokens = 16384
save_interval = 100
