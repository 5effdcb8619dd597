# Supervised LoRA of rank 16 on the 939,000 chats of Tulu-3 with Qwen2.5-7B-Instruct, as in LoRA
# Without Regret. There is no held-out split: to follow the loss on rows of your own, give a .jsonl
# file with `messages` as eval_dataset.
# python sft.py config/tulu3_lora.py
# torchrun --nproc_per_node=8 sft.py config/tulu3_lora.py
model = "Qwen/Qwen2.5-7B-Instruct"
dataset = "tulu3"  # downloaded once from the hub; or openthoughts3, with max_length = 16384
eval_dataset = ""
out_dir = "out/tulu3_lora"
method = "lora"
rank = 16
lr = 0.0  # learning_rate_rule in tinylora.py
max_steps = 2000
batch_size = 32  # LoRA keeps up with full fine-tuning there, and falls behind in large batches
max_length = 4096
recompute = True
micro_batch_tokens = 16384
save_interval = 100
