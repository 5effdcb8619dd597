# Supervised LoRA of rank 16 on the 939,000 chats of Tulu-3 with Llama-3.1-8B, as in LoRA Without
# Regret. Its authors sweep --rank and --lr; their batch size and length are not known. There is no
# held-out split: to follow the loss on rows of your own, give a .jsonl file with `messages` as
# eval_dataset.
# python sft.py config/tulu3_lora.py
# torchrun --nproc_per_node=8 sft.py config/tulu3_lora.py
model = "meta-llama/Llama-3.1-8B-Instruct"  # has a chat template; the authors took the base model
dataset = "tulu3"  # downloaded once from the hub
eval_dataset = ""
out_dir = "out/tulu3_lora"
method = "lora"
rank = 16
lr = 0.0  # learning_rate_rule in tinylora.py
max_steps = 29344  # one epoch
batch_size = 32  # LoRA keeps up with full fine-tuning there, and falls behind in large batches
max_length = 4096
recompute = True
micro_batch_tokens = 16384
save_interval = 100
