"""Supervised fine-tuning on worked solutions and on chats, with the adapters of grpo.py.

    python sft.py                                       # the toy, on worked solutions
    python sft.py config/qwen7b_sft.py                  # GSM8K's solutions: the paper's other arm
    python sft.py config/tulu3_lora.py                  # a chat data set from the hub
    python sft.py --method=full --random_init=True ...  # pre-training, as toy/make.py does it

A row has a question and a solution (or an answer), and may have a system message. Or it is a chat:
`messages` of role and content, or `conversations` of from and value. The loss is the mean over the
tokens that the model should say: the solution, or every turn of the assistant, each with the token
that ends it. Solutions are taken as they are, GSM8K's with their annotations <<3+4=7>>. A data set
on the hub is downloaded once, and its rows are read from the disk when a step needs them.
"""

import math
import time
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch

import tinylora
from configurator import at_least, configure, save_settings
from eval_math import as_problem, encode_problems, load_rows
from grpo import batch_positions, evaluate, prepare, reward
from model import load_model, load_tokenizer, random_model
from support import UserError
from support.data import is_local
from support.device import peak_gb
from support.packing import Rollout, completion_logprobs, micro_batches
from support.parallel import Ranks, is_chief, keep_pace, print0, reduce_gradients
from support.run import Run


@dataclass
class Settings:
    # what to train
    model: str = "toy/base"  # checkpoint directory or hub name
    dataset: str = "toy/train.jsonl"  # a file, a folder with train.jsonl, or a name in eval_math.py
    eval_dataset: str = "toy/test.jsonl"  # held-out rows: their loss, and accuracy on problems
    system_prompt: str = ""  # for rows that bring none; empty: the chat template's own
    prompt_template: str = "{question}"  # the user's message
    answer_format: Literal["hash", "boxed", "tags", "any"] = "hash"  # that an evaluation reads
    out_dir: str = "out/toy_sft"  # log, checkpoint, adapter
    init_from: Literal["scratch", "resume"] = "scratch"  # resume: from the checkpoint in out_dir
    random_init: bool = False  # random weights in the shape of config.json (with method = full)
    # what is trained (tinylora.py)
    method: Literal["tinylora", "lora_xs", "lora", "full"] = "tinylora"  # full: the weights
    rank: int = 1  # r of the frozen SVD (paper: 2), or of LoRA
    u: int = 13  # tinylora: trained numbers per group of linears
    n_tie: int = 0  # tinylora: linears that share a group; 0: all of them
    tie: Literal["tiled", "structured"] = "tiled"  # share with neighbours, or with the same type
    # full: "all" is every weight, embedding and norms too; other targets are these linears' weights
    targets: str = "all"  # all, attention, mlp, or q_proj,v_proj ...; attention/mlp: a vector each
    alpha: float = 32.0  # lora: the update is scaled by alpha / rank
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of adapter.safetensors
    seed: int = 1337  # of the random projections, the data order and fresh weights
    # one step
    lr: float = 0.005  # AdamW. 0 with lora or full: learning_rate_rule in tinylora.py
    lr_schedule: Literal["constant", "cosine"] = "constant"  # cosine: down to zero at max_steps
    warmup_steps: int = 0  # steps over which lr rises linearly
    weight_decay: float = 0.0  # AdamW's
    beta2: float = 0.999  # AdamW's decay of the second moment
    max_steps: int = 60  # optimiser steps
    batch_size: int = 64  # rows per step, over all processes
    grad_clip: float = 1.0  # bound on the gradient's norm; 0: none
    max_length: int = 0  # longer rows are cut off after so many tokens; 0: the model's context
    # the machine
    micro_batch_tokens: int = 4096  # in one forward and backward pass; changes memory, not results
    shard: int = 1  # processes that hold one copy of the weights between them (support/parallel.py)
    recompute: bool = False  # store only the layers' inputs for the backward pass: slower, smaller
    compile: bool = False  # torch.compile for the decode step of evaluations
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    # the run
    eval_interval: int = 20  # steps between evaluations; 0: only before and after
    eval_size: int = 0  # rows in an evaluation; 0: all
    max_new_tokens: int = 64  # of an answer in an evaluation
    save_interval: int = 20  # steps between checkpoints; 0: only after
    wandb_log: bool = False  # log to Weights & Biases, too, project tinylora


ROLES = {"human": "user", "gpt": "assistant"}  # names of roles in `conversations` and `messages`

# ----------------------------------------------------------------------------------------- the rows

def as_example(place, row):
    """A row of data as one of two kinds: with "messages", or with "question" and "solution".
    place: file and line, for error messages. Raises UserError for a row that is neither."""
    turns = row.get("messages") or row.get("conversations")
    if not turns:  # merged data sets have null in the columns of the other kind
        return as_problem(place, {key: value for key, value in row.items() if key != "messages"})
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{place}: messages must be a list of objects with role and content")
    messages = []
    for turn in turns:
        role = str(turn.get("role", turn.get("from")))
        content = turn.get("content", turn.get("value"))
        messages.append({"role": ROLES.get(role, role), "content": content})
    if row.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    roles = [message["role"] for message in messages]
    has_texts = all(isinstance(message["content"], str) for message in messages)
    has_known_roles = set(roles) <= {"system", "user", "assistant"}
    has_answer = "user" in roles and "assistant" in roles[roles.index("user"):]
    if not (has_texts and has_known_roles and has_answer):
        raise UserError(f"{place}: in a chat every content must be a text, and an assistant must "
                        f"answer a user; the roles here are {', '.join(roles)}")
    return row | {"messages": messages}


def encode_example(tokenizer, example, cfg, limit):
    """The example as a Rollout of at most `limit` tokens; None if nothing to train is left. What is
    said between two turns of the assistant belongs to the completion, with a loss mask of False."""
    if "messages" in example:
        messages = example["messages"]
        if cfg.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": cfg.system_prompt}, *messages]
        ids, loss_mask = tokenizer.encode_turns(messages)
    else:
        [prompt] = encode_problems(tokenizer, [example], cfg.system_prompt, cfg.prompt_template)
        said = tokenizer.encode(example["solution"]) + [tokenizer.eos_id]
        ids = prompt + said
        loss_mask = [False] * len(prompt) + [True] * len(said)
    start = loss_mask.index(True)
    if start < limit:
        return Rollout(ids[:start], ids[start:limit], loss_mask=loss_mask[start:limit])


def training_rows(cfg):
    """(place, row) of the data set, by index. The rows of a file are checked now; those of the hub,
    of which there may be a million, when a step takes them."""
    rows = load_rows(cfg.dataset, "train")
    if is_local(cfg.dataset):
        for place, row in rows:
            as_example(place, row)
    return rows


def held_out(cfg):
    """The first eval_size examples of eval_dataset."""
    if not cfg.eval_dataset:
        return []
    rows = load_rows(cfg.eval_dataset, "test")
    return [as_example(place, row) for place, row in islice(rows, cfg.eval_size or None)]


# ------------------------------------------------------------------------------------------ the run

def check(cfg):
    """Refuse settings that cannot work before anything is loaded."""
    at_least(cfg, 1, "batch_size", "max_new_tokens", "micro_batch_tokens")
    at_least(cfg, 0, "max_steps", "lr", "weight_decay", "beta2", "grad_clip", "warmup_steps",
             "max_length", "eval_size", "eval_interval", "save_interval", "seed")
    if cfg.beta2 >= 1:
        raise UserError("beta2 must be below 1")
    if cfg.random_init and cfg.method != "full":
        raise UserError("random_init goes with method = full")


def trained_tokens(rollouts, ranks):
    """How many tokens of all processes' rollouts are trained."""
    return ranks.sum({"tokens": sum(sum(r.loss_mask) for r in rollouts)})["tokens"]


@torch.no_grad()
def mean_loss(net, rollouts, cfg, ranks):
    """The mean loss per token over the rollouts of all processes. Prints it."""
    batches = keep_pace(net, micro_batches(rollouts, cfg.micro_batch_tokens))
    losses = [-completion_logprobs(net, batch)[0].double().sum().item() for batch in batches]
    loss = ranks.sum({"loss": sum(losses)})["loss"] / trained_tokens(rollouts, ranks)
    print0(f"--- held-out loss {loss:.4f}")
    return loss


def train(cfg):
    check(cfg)
    ranks = Ranks(cfg.device, cfg.shard)
    test_set, train_rows = held_out(cfg), training_rows(cfg)
    tokenizer = load_tokenizer(cfg.model)
    if cfg.random_init:
        net = random_model(cfg.model, cfg.seed, ranks.device, cfg.shard)
    else:
        dtype = "float32" if cfg.method == "full" else cfg.dtype  # 16 bits round small steps away
        net = load_model(cfg.model, dtype, ranks.device, cfg.shard)
    net.model.recompute = cfg.recompute
    net.compile_decode = cfg.compile
    limit = min(cfg.max_length or math.inf, net.config.max_position_embeddings)

    def encode(examples):
        mine = ranks.mine(examples)
        rollouts = [encode_example(tokenizer, example, cfg, limit) for example in mine]
        return [rollout for rollout in rollouts if rollout]

    problems = [row for row in test_set if "messages" not in row]
    prepare(net, tokenizer, problems, cfg)
    solved = [row for row in test_set if "messages" in row or row["solution"] != row["answer"]]
    test_rollouts = encode(solved)
    if solved and not trained_tokens(test_rollouts, ranks):
        raise UserError(f"all rows of {cfg.eval_dataset} are cut off before the solution; raise "
                        "max_length")
    parameters, identity = tinylora.attach(net, cfg, cfg.shard)
    optimizer = torch.optim.AdamW(parameters.values(), lr=cfg.lr, betas=(0.9, cfg.beta2),
                                  weight_decay=cfg.weight_decay, foreach=False)
    run = Run(cfg, ranks, parameters, optimizer, identity | {"script": "sft.py"})
    if is_chief():
        save_settings(cfg, f"{cfg.out_dir}/settings.py")
    numbers = sum(p.numel() for p in parameters.values())
    print0(f"{cfg.method} trains {numbers:,} numbers of {cfg.model}; {net.dtype} on {net.device}, "
           f"{ranks.dp_size} process(es)")

    step = run.step
    while True:
        # Between two steps: evaluate, save, and stop if that was asked for.
        stop = run.stop_asked()
        if test_set and run.evaluation_due(step) and not stop:
            figures = evaluate(net, tokenizer, problems, cfg, ranks) if problems else {}
            if solved:
                figures["loss"] = mean_loss(net, test_rollouts, cfg, ranks)
            score = figures["reward"] if problems else -figures["loss"]
            if run.log_evaluation(step, figures, score):
                tinylora.save(net, cfg, best=True)
        if run.save_due(step) or stop:
            run.save(step)
            tinylora.save(net, cfg)
        if step >= cfg.max_steps or stop:
            break

        # The loss is a mean over the trained tokens of the whole batch, of all processes.
        began = time.time()
        positions = batch_positions(step, cfg.batch_size, len(train_rows), cfg.seed)
        rollouts = encode([as_example(*train_rows[index]) for _, index in positions])
        tokens = trained_tokens(rollouts, ranks)
        if not tokens:
            raise UserError(f"all rows of step {step + 1} are cut off before the first token to "
                            "train; raise max_length")
        # A linear warm-up, then a constant or half a cosine down to zero at max_steps.
        rate = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup_steps))
        if cfg.lr_schedule == "cosine":
            rate *= 0.5 + 0.5 * math.cos(math.pi * step / cfg.max_steps)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        total = 0.0
        for batch in keep_pace(net, micro_batches(rollouts, cfg.micro_batch_tokens)):
            logprobs, _, _ = completion_logprobs(net, batch)
            loss = -logprobs.sum() / tokens
            loss.backward()
            total += loss.item()
        grad_norm = reduce_gradients(parameters.values(), cfg.grad_clip)
        optimizer.step()
        step += 1

        loss = ranks.sum({"loss": total})["loss"]
        seconds = time.time() - began
        run.log(step, {"loss": loss, "grad_norm": grad_norm, "lr": rate, "tokens": tokens,
                       "seconds": {"step": seconds, "peak_gb": peak_gb(net.device)}})
        print0(f"step {step:4d} | loss {loss:.4f} | grad {grad_norm:.3f} | lr {rate:.2e} | "
               f"{seconds:.2f} s")
    if "v" in parameters and numbers <= 1000:
        text = tinylora.adapter_text(net.adapter, cfg.save_dtype)
        print0(f"the adapter as text: --adapter={text}")
    run.close("greedy accuracy" if problems else "held-out loss", f"{numbers:,} numbers")


if __name__ == "__main__":
    train(configure(Settings, reward))
