"""Supervised fine-tuning on worked solutions, with the same adapters and the same pieces as grpo.py.

    python sft.py                                          # the toy, on worked solutions
    python sft.py --model=Qwen/Qwen2.5-7B-Instruct --dataset=gsm8k --eval_dataset=gsm8k ...
    python sft.py --method=full --random_init=True ...     # pre-training: toy/make.py does this

A row needs a question and a solution (or an answer), and may bring a system message. The loss is the mean over the
solution's tokens, the stop token included; the prompt is not trained on.
"""

import math
import time

import torch

import eval_math
from configurator import UserError, configure, run
from grpo import (
    Row,
    all_reduce,
    bad_method,
    batch_positions,
    completion_logprobs,
    micro_batches,
    peak_gb,
    start_ranks,
    trained_parameters,
    training_loop,
    update,
)
from model import (
    Shard,
    Transformer,
    checkpoint_dir,
    compile_blocks,
    init_weights,
    is_chief,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    whole_size,
)

model = "toy/base"  # checkpoint directory or hub name
dataset = "toy/train.jsonl"  # rows with question and solution: a .jsonl file, a folder, or a name (eval_math.py)
eval_dataset = "toy/test.jsonl"  # held-out problems, greedy accuracy; none if empty
system_prompt = ""  # system message where a row brings none; empty: what the chat template puts there
prompt_template = "{question}"  # the user's message
answer_format = "hash"  # what strict scoring reads: hash (#### 42), boxed (\boxed{42}) or any
out_dir = "out/toy_sft"  # log, checkpoints, result
init_from = "scratch"  # scratch, or resume: go on from the checkpoint in out_dir
random_init = False  # start from random weights in the shape of the model's config.json (with method = full)
# what is trained (tinylora.py)
method = "tinylora"  # tinylora, lora_xs, lora, or full: all weights, which leaves rank to save_dtype unread
rank = 1  # r of the frozen SVD, paper: 2; or of LoRA
u = 13  # tinylora: trained numbers per group
n_tie = 0  # tinylora: linears that share a group; 0: all
tie = "tiled"  # tinylora: tiled or structured
targets = "all"  # all, attention, mlp, or linears such as q_proj,v_proj; attention/mlp: a vector for each
alpha = 32.0  # lora: its update is scaled by alpha / rank
save_dtype = "float32"  # of the numbers in adapter.safetensors: float32, bfloat16, float16; trained in float32
seed = 1337  # of the random projections, the data order and fresh weights
# optimisation
lr = 0.005  # AdamW. 0 with lora or full: the rule of LoRA Without Regret (learning_rate_rule in tinylora.py)
lr_schedule = "constant"  # constant, or cosine down to zero
warmup_steps = 0  # steps over which lr rises linearly
weight_decay = 0.0
beta2 = 0.999  # AdamW's decay of the second moment
max_steps = 60  # optimiser steps
batch_size = 64  # rows a step, over all ranks
grad_clip = 1.0  # bound on the gradient's norm; 0: none
micro_batch_tokens = 4096  # padded tokens in one forward and backward pass: bounds memory, not the gradient
shard = 1  # processes of torchrun that hold one copy of the weights between them: for models beyond one GPU
compile = False  # run training's blocks through torch.compile: the first step takes minutes; not measured on a GPU
# bookkeeping
eval_interval = 20  # steps between evaluations; 0: only before and after
eval_size = 0  # problems in an evaluation; 0: all
max_new_tokens = 64  # of an answer in the evaluation
save_interval = 20  # steps between checkpoints
dtype = "auto"  # auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16, float16
device = "auto"  # auto, cpu, cuda, cuda:1 ...


def check_settings(cfg):
    bad = [
        *bad_method(cfg),
        (cfg.random_init and cfg.method != "full", "random_init goes with method = full"),
        (min(cfg.lr, cfg.weight_decay, cfg.grad_clip, cfg.warmup_steps, cfg.seed, cfg.eval_size) < 0
         or not 0 <= cfg.beta2 < 1, "lr, weight_decay, grad_clip, warmup_steps, seed and eval_size must not be "
         "negative, beta2 in [0, 1)"),
        (cfg.lr_schedule not in ("constant", "cosine"), "lr_schedule must be constant or cosine"),
        (cfg.init_from not in ("scratch", "resume"), "init_from must be scratch or resume"),
        (cfg.answer_format not in ("hash", "boxed", "any"), "answer_format must be hash, boxed or any"),
        (min(cfg.batch_size, cfg.max_new_tokens, cfg.micro_batch_tokens) < 1 or cfg.max_steps < 0,
         "batch_size, max_new_tokens and micro_batch_tokens must be at least 1, max_steps at least 0"),
    ]
    for is_bad, message in bad:
        if is_bad:
            raise UserError(message)


def learning_rate(step, cfg):
    """Linear warm-up, then constant or half a cosine down to zero at max_steps."""
    rate = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup_steps))
    if cfg.lr_schedule == "cosine":
        rate *= 0.5 + 0.5 * math.cos(math.pi * step / cfg.max_steps)
    return rate


def supervised_row(tokenizer, problem, cfg, context):
    """A row of the data as tokens: the chat prompt, then the solution and a stop token."""
    [prompt] = eval_math.encode_problems(
        tokenizer, [problem], problem.get("system", cfg.system_prompt), cfg.prompt_template
    )
    ids = tokenizer.encode(problem["solution"]) + [tokenizer.eos_id]
    if len(prompt) + len(ids) > context:
        raise UserError(f"{cfg.dataset}: a row of {len(prompt) + len(ids)} tokens is longer than the model's context "
                        f"of {context}; it begins: {problem['question'][:60]!r}")
    return Row(prompt, ids, sampler_logprobs=[], advantage=1.0)


def build(cfg, device):
    """The model: loaded, or with fresh weights."""
    if not cfg.random_init:
        return load_model(cfg.model, "float32" if cfg.method == "full" else cfg.dtype, device, cfg.shard)
    net = Transformer(load_config(checkpoint_dir(cfg.model)))
    init_weights(net, cfg.seed)
    if cfg.shard == 1:
        return net.to(pick_device(device))
    net.shard = Shard(cfg.shard, net.config, pick_device(device), torch.float32)
    return net


def train(cfg):
    check_settings(cfg)
    rank, world, device = start_ranks(cfg)
    problems = eval_math.load_problems(cfg.dataset, "train")
    tokenizer = load_tokenizer(cfg.model)
    net = build(cfg, device)
    if cfg.compile:
        compile_blocks(net)
    parameters, identity = trained_parameters(net, cfg)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay
    )
    if is_chief():
        print(f"{cfg.model}: training {sum(map(whole_size, parameters.values()))} numbers ({cfg.method}) on "
              f"{len(problems)} rows; {net.head.dtype} on {net.device}, {world * cfg.shard} process(es)")

    def take_step(step, interrupt):
        interrupt.hold()
        t0 = time.time()
        mine = batch_positions(step, cfg.batch_size, len(problems), cfg.seed)[rank::world]
        context = net.config.max_position_embeddings
        rows = [supervised_row(tokenizer, problems[index], cfg, context) for _, index in mine]
        [num_tokens] = all_reduce([sum(len(row.ids) for row in rows)], net)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        optimizer.zero_grad(set_to_none=False)
        loss_sum = 0.0
        for batch in micro_batches(rows, cfg.micro_batch_tokens):
            logp, _, _ = completion_logprobs(net, tokenizer, batch, temperature=1.0)
            loss = -logp.sum() / num_tokens  # logp is 0 outside the solution; num_tokens is the global batch's
            loss.backward()
            loss_sum += loss.item()
        grad_norm = update(optimizer, parameters.values(), cfg.grad_clip)
        [loss_sum] = all_reduce([loss_sum], net)
        seconds = time.time() - t0
        record = {"loss": loss_sum, "grad_norm": grad_norm, "lr": learning_rate(step, cfg), "tokens": num_tokens,
                  "seconds": {"step": seconds, "peak_gb": peak_gb(net.device)}}
        return record, f"loss {loss_sum:.4f} | grad {grad_norm:.3f} | lr {record['lr']:.2e} | {seconds:.2f} s"

    training_loop(cfg, net, tokenizer, parameters, optimizer, identity, take_step)


def main():
    train(configure(globals()))


if __name__ == "__main__":
    run(main)
