# Pre-training of the toy's base model: toy/make.py runs sft.py with this and a file of documents.
model = "toy/base"  # its config.json and tokenizer; the weights begin at random
random_init = True
method = "full"
dtype = "float32"
lr = 2e-3
lr_schedule = "cosine"
warmup_steps = 50
weight_decay = 0.01
beta2 = 0.95
max_steps = 1300
batch_size = 128
micro_batch_tokens = 16384
eval_interval = 250
eval_size = 200
save_interval = 650
