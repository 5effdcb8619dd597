# GSM8K by supervised training on its solutions, Llama-3.1-8B-Instruct, 13 numbers: the paper's comparison with RL.
# python sft.py config/llama8b_sft.py         Larger: --method=lora --rank=8 --lr=0, --method=full --lr=0
model = "meta-llama/Llama-3.1-8B-Instruct"
dataset = "gsm8k"
eval_dataset = "gsm8k"
prompt_template = '{question} Let\'s think step by step and output the final answer after "####".'  # VERL's
answer_format = "hash"
out_dir = "out/llama8b_sft"
rank = 2
u = 13
n_tie = 0
lr = 2e-4  # top of the paper's sweep; its batch size and number of epochs are not published
max_steps = 350  # 3 epochs of 7,473 solutions
batch_size = 64
max_new_tokens = 1024  # of an answer in the evaluation
micro_batch_tokens = 8192
eval_interval = 50
save_interval = 50
