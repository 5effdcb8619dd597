# Supervised LoRA on OpenThoughts3 with Llama-3.1-8B, as in LoRA Without Regret. Its authors sweep
# ranks from 1 to 512, learning rates, batch sizes from 32 to 256, and --targets.
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
max_steps = 1000
batch_size = 32
max_length = 4096
micro_batch_tokens = 8192
save_interval = 100
