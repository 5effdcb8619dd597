"""Supervised fine-tuning on worked solutions and on chats, with the same adapters and the same pieces as grpo.py.

    python sft.py                                          # the toy, on worked solutions
    python sft.py config/qwen7b_sft.py                     # GSM8K's solutions: the supervised arm of the paper
    python sft.py config/tulu3_lora.py                     # a chat data set, read from the hub as it is needed
    python sft.py --method=full --random_init=True ...     # pre-training: toy/make.py does this

A row has a question and a solution (or an answer), and may bring a system message; or it is a chat: `messages` of role
and content, or `conversations` of from and value. The loss is the mean over the tokens that the model is to say, the
solution or every turn of the assistant, each with the token that ends it; nothing else is trained on. Solutions are
taken as they are given, GSM8K's with their calculator annotations <<3+4=7>>, as in the paper.
"""

import itertools
import math
import os
import re
import time
from functools import partial

from configurator import UserError, configure, run  # isort: skip (first: it says what is missing)

import torch

import eval_math
import grpo
from model import compile_model, load_model, load_tokenizer, random_model
from support.parallel import note, say, start_ranks, whole_size

model = "toy/base"  # checkpoint directory or hub name
dataset = "toy/train.jsonl"  # .jsonl file, folder, name in eval_math.py; streamed: tulu3, openthoughts3, hub names
eval_dataset = "toy/test.jsonl"  # held-out rows: their loss, and of problems the greedy accuracy; none if empty
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
max_length = 0  # longer rows (prompt and all) are cut off after so many tokens, and counted; 0: the model's context
shuffle_buffer = 10000  # of a streamed data set, rows are drawn at random from the next so many
micro_batch_tokens = 4096  # tokens, padding too, in one forward and backward pass: bounds memory, not the gradient
packing = True  # rows end to end without padding; False: padded to the longest of a micro-batch
shard = 1  # processes of torchrun that hold one copy of the weights between them: for models beyond one GPU
recompute = False  # keep only the layers' inputs and compute the rest again in the backward pass: less memory, slower
compile = False  # torch.compile for the decode step and, if packing = False, training's blocks; GPU: not measured
# bookkeeping
eval_interval = 20  # steps between evaluations; 0: only before and after
eval_size = 0  # rows in an evaluation; 0: all
max_new_tokens = 64  # of an answer in the evaluation
save_interval = 20  # steps between checkpoints; 0: only after
wandb_log = False  # metrics go to Weights & Biases too, project tinylora, as a run with out_dir's name
tensorboard = False  # and to TensorBoard, in out_dir
dtype = "auto"  # auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16
device = "auto"  # auto, cpu, cuda, cuda:1 ...

STREAMED = {"tulu3": "allenai/tulu-3-sft-mixture", "openthoughts3": "open-thoughts/OpenThoughts3-1.2M"}
ROLES = {"human": "user", "gpt": "assistant"}  # what `conversations` call the roles of `messages`


def check_settings(cfg):
    grpo.refuse([
        *grpo.shared_rules(cfg),
        (cfg.random_init and cfg.method != "full", "random_init goes with method = full"),
        (min(cfg.lr, cfg.weight_decay, cfg.grad_clip, cfg.warmup_steps, cfg.seed, cfg.eval_size, cfg.max_length) < 0
         or not 0 <= cfg.beta2 < 1, "lr, weight_decay, grad_clip, warmup_steps, seed, eval_size and max_length must "
         "not be negative, beta2 in [0, 1)"),
        (cfg.lr_schedule not in ("constant", "cosine"), "lr_schedule must be constant or cosine"),
        (cfg.eval_dataset in STREAMED, f"eval_dataset: {cfg.eval_dataset} has no rows held out; give a .jsonl file"),
        (min(cfg.batch_size, cfg.max_new_tokens, cfg.micro_batch_tokens, cfg.shuffle_buffer) < 1 or cfg.max_steps < 0,
         "batch_size, max_new_tokens, micro_batch_tokens and shuffle_buffer must be at least 1, max_steps at least 0"),
    ])


def learning_rate(step, cfg):
    """Linear warm-up, then constant or half a cosine down to zero at max_steps."""
    rate = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup_steps))
    if cfg.lr_schedule == "cosine":
        rate *= 0.5 + 0.5 * math.cos(math.pi * step / cfg.max_steps)
    return rate


def as_example(place, row):
    """A row of data as one of the two kinds that are trained on: with 'messages' [{role, content}], or with the
    'question', 'answer' and 'solution' of eval_math.as_problem. place: file and line, for UserError."""
    turns = row.get("messages") or row.get("conversations")
    if not turns:  # merged data sets have null where a row is of another kind
        return eval_math.as_problem(place, {key: value for key, value in row.items() if key != "messages"})
    turns = turns if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns) else []
    messages = [{"role": turn.get("role", turn.get("from")), "content": turn.get("content", turn.get("value"))}
                for turn in turns]
    for m in messages:
        m["role"] = ROLES.get(str(m["role"]), m["role"])
        if m["role"] not in ("system", "user", "assistant") or not isinstance(m["content"], str):
            raise UserError(f"{place}: a message needs the role system, user or assistant and a text as its content; "
                            f"one has {m['role']!r} and {str(m['content'])[:40]!r}")
    eval_math.check_system(place, row)
    if row.get("system") and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    roles = [m["role"] for m in messages]
    if "assistant" not in roles or "user" not in roles[: roles.index("assistant")]:
        raise UserError(f"{place}: a chat needs a list of messages in which an assistant answers a user; its roles are "
                        f"{', '.join(roles) or 'none'}")
    return row | {"messages": messages}


def encode_example(tokenizer, example, cfg):
    """The example's token ids up to the last that is trained, and of each whether it is."""
    if "messages" not in example:
        [prompt] = eval_math.encode_problems(tokenizer, [example], cfg.system_prompt, cfg.prompt_template)
        said = tokenizer.encode(example["solution"]) + [tokenizer.eos_id]
        return prompt + said, [False] * len(prompt) + [True] * len(said)
    messages = example["messages"]
    if cfg.system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": cfg.system_prompt}, *messages]
    ids, trained = tokenizer.encode_turns(messages)
    if ids[-1] not in tokenizer.stop_ids:
        note(f"warning: the chat template ends a turn with {tokenizer.decode(ids[-1:])!r}, where sampling does not "
             f"stop: add its id, {ids[-1]}, to eos_token_id in generation_config.json")
    return ids, trained


def encode_examples(tokenizer, examples, cfg, context):
    """Rows of at most max_length tokens, and how many examples were cut off. One that is cut off before the first
    token to train makes no row."""
    limit, rows, cut = min(cfg.max_length or context, context), [], 0
    for example in examples:
        ids, trained = encode_example(tokenizer, example, cfg)
        start = trained.index(True)
        cut += len(ids) > limit
        if start < limit:
            rows.append(grpo.Row(ids[:start], ids[start:limit], sampler_logprobs=[], advantage=1.0,
                                 trained=trained[start:limit]))
    return rows, cut


def is_streamed(name):
    """Is this a data set on the hub, but none of the small ones in eval_math.DATASETS, which are read as a whole?"""
    is_local = os.path.exists(name) or name.endswith((".jsonl", ".json"))
    return name in STREAMED or bool(not is_local and re.fullmatch(r"[\w.-]+/[\w.-]+", name))


def open_stream(name, split):
    return eval_math.load_hub(name, STREAMED.get(name, name), None, split, streaming=True)


def read(name, rows):
    """The rows of a stream, over the network as they are asked for; UserError where it breaks off."""
    count = 0
    try:
        for row in rows:
            yield row
            count += 1
    except Exception as error:  # of many kinds: the network, the hub, a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"data set '{name}' broke off after {count} rows: {reason}; go on with "
                        "--init_from=resume") from None
    if not count:
        raise UserError(f"data set '{name}' holds no rows")


def shuffled(name, rows, cfg):
    """The rows without end, epoch after epoch, in an order that depends on seed and shuffle_buffer alone."""
    rows = rows.shuffle(seed=cfg.seed, buffer_size=cfg.shuffle_buffer)
    for epoch in itertools.count():
        rows.set_epoch(epoch)  # another order
        yield from read(name, rows)


def batches(cfg, share, shares):
    """A function of step that gives this rank's share of the step's examples, and how many there are to train on (None
    of a stream). A resumed run takes the rows that it would have taken uninterrupted; a stream it reads from the start
    again, past those it has had. Every rank reads all of a stream: so its order is the same for any number of ranks."""
    if is_streamed(cfg.dataset):
        rows = enumerate(shuffled(cfg.dataset, open_stream(cfg.dataset, "train"), cfg))

        def batch(step):
            later = (item for item in rows if item[0] >= step * cfg.batch_size)
            mine = list(itertools.islice(later, cfg.batch_size))[share::shares]
            return [as_example(f"{cfg.dataset}, row {position} as shuffled", row) for position, row in mine]

        return batch, None
    examples = eval_math.load_problems(cfg.dataset, "train", as_example)

    def batch(step):
        positions = grpo.batch_positions(step, cfg.batch_size, len(examples), cfg.seed)
        return [examples[index] for _, index in positions[share::shares]]

    return batch, len(examples)


def held_out_examples(cfg):
    """The first eval_size examples of eval_dataset; of a stream nothing more is read."""
    name, size = cfg.eval_dataset, cfg.eval_size or None
    if not name:
        return []
    if not is_streamed(name):
        return eval_math.load_problems(name, "test", as_example)[:size]
    rows = itertools.islice(read(name, open_stream(name, "test")), size)
    return [as_example(f"{name}, row {i}", row) for i, row in enumerate(rows)]


def train(cfg):
    check_settings(cfg)
    share, shares, device = start_ranks(cfg)
    batch, num_examples = batches(cfg, share, shares)
    held_out = held_out_examples(cfg)
    tokenizer = load_tokenizer(cfg.model)
    net = (random_model(cfg.model, cfg.seed, device, cfg.shard) if cfg.random_init else
           load_model(cfg.model, "float32" if cfg.method == "full" else cfg.dtype, device, cfg.shard))
    net.model.recompute = cfg.recompute
    context = net.config.max_position_embeddings
    if cfg.max_length > context:
        raise UserError(f"max_length must be at most the model's context of {context}, or 0")
    if cfg.compile:
        compile_model(net)
    parameters, identity = grpo.trained_parameters(net, cfg)
    optimizer = torch.optim.AdamW(parameters.values(), lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay)
    say(f"{cfg.model}: training {sum(map(whole_size, parameters.values()))} numbers ({cfg.method}) on "
        f"{num_examples or 'a stream of'} rows; {net.head.dtype} on {net.device}, {shares * cfg.shard} process(es)")

    def take_step(step, interrupt):
        t0 = time.time()
        rows, cut = encode_examples(tokenizer, batch(step), cfg, context)
        interrupt.hold()
        num_tokens, cut = grpo.all_reduce([sum(sum(row.trained) for row in rows), cut], net)
        if not num_tokens:
            raise UserError(f"step {step + 1} has no token to train on: all its rows are cut off before the first; "
                            "raise max_length")
        optimizer.param_groups[0]["lr"] = rate = learning_rate(step, cfg)
        optimizer.zero_grad(set_to_none=False)
        loss_sum = 0.0
        for part in grpo.micro_batches(rows, cfg.micro_batch_tokens, cfg.packing):
            logp, _, _ = grpo.completion_logprobs(net, tokenizer, part, 1.0, cfg.packing)
            loss = -logp.sum() / num_tokens  # logp is 0 where nothing is trained; num_tokens is the global batch's
            loss.backward()
            loss_sum += loss.item()
        grad_norm = grpo.update(optimizer, parameters.values(), cfg.grad_clip)
        [loss_sum] = grpo.all_reduce([loss_sum], net)
        seconds = time.time() - t0
        record = {"loss": loss_sum, "grad_norm": grad_norm, "lr": rate, "tokens": num_tokens,
                  "cut_off": cut, "seconds": {"step": seconds, "peak_gb": grpo.peak_gb(net.device)}}
        line = f"loss {loss_sum:.4f} | grad {grad_norm:.3f} | lr {rate:.2e} | {seconds:.2f} s"
        return record, line + (f" | {cut:.0f} rows cut off" if cut else "")

    asked = [e for e in held_out if "messages" not in e]
    eval_math.checked_prompts(net, tokenizer, asked, cfg, cfg.eval_dataset)
    scored = [e for e in held_out if "messages" in e or e["solution"] != e["answer"]]
    rows, cut = encode_examples(tokenizer, scored[share::shares], cfg, context)
    [cut] = grpo.all_reduce([cut], net)
    if cut:
        say(f"{cut:.0f} of {len(scored)} held-out rows are longer than {cfg.max_length or context} tokens, and count "
            "up to there")
    measure = partial(held_out_loss, net, tokenizer, rows, cfg) if scored else None
    grpo.training_loop(cfg, net, tokenizer, parameters, optimizer, identity | {"script": "sft.py"}, share, shares,
                       take_step, asked, measure)


@torch.no_grad()
def held_out_loss(net, tokenizer, rows, cfg):
    """Mean loss per trained token over the rows of all ranks, of which `rows` are this one's."""
    total, count = 0.0, 0
    for part in grpo.micro_batches(rows, cfg.micro_batch_tokens, cfg.packing):
        logp, _, mask = grpo.completion_logprobs(net, tokenizer, part, 1.0, cfg.packing)
        total -= logp.double().sum().item()
        count += int(mask.sum())
    total, count = grpo.all_reduce([total, count], net)
    if not count:
        raise UserError(f"{cfg.eval_dataset}: all rows are cut off before the first token to score; raise max_length")
    return total / count


def main():
    train(configure(globals()))


if __name__ == "__main__":
    run(main)
