# LoRA on Tulu-3's chats (939,000 rows, streamed), as in LoRA Without Regret. There is no held-out split: name a .jsonl
# file of rows with `messages` as eval_dataset to follow the loss on them.
# One GPU: python sft.py config/tulu3_lora.py        Eight: torchrun --nproc_per_node=8 sft.py config/tulu3_lora.py
model = "Qwen/Qwen2.5-7B-Instruct"
dataset = "tulu3"  # or openthoughts3, with max_length = 16384
eval_dataset = ""
out_dir = "out/tulu3_lora"
method = "lora"
rank = 16
lr = 0.0  # the rule of LoRA Without Regret
max_steps = 2000
batch_size = 32  # there LoRA keeps up with full fine-tuning; it falls behind in large batches
max_length = 4096
recompute = True
micro_batch_tokens = 16384
save_interval = 100
