# LoRA Without Regret, supervised: Llama-3.1-8B on OpenThoughts3, LoRA on all linears. The authors sweep ranks 1 to
# 512, learning rates, batch sizes of 32 to 256, and --targets=attention, mlp, all. Full: --method=full
# python sft.py config/llama8b_openthoughts_lora.py
model = "meta-llama/Llama-3.1-8B-Instruct"  # for its chat template; theirs is the base model
dataset = "openthoughts3"  # streamed from the hub
eval_dataset = ""
out_dir = "out/llama8b_openthoughts_lora"
method = "lora"
rank = 128
alpha = 32.0
lr = 0.0  # learning_rate_rule in tinylora.py, from the same authors
max_steps = 1000
batch_size = 32
max_length = 4096
micro_batch_tokens = 8192
save_interval = 100
