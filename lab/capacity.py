"""How many bits a trained number can hold: a model learns random digits by heart.

    python -m lab.capacity --batch_size=2 --lr=0.1 --max_steps=1000   # 13 numbers, seconds
    python -m lab.study capacity                                      # all runs of the study

There are batch_size questions, and the answer to each is 8 digits, drawn with the seed. Each step
is a pass over all of them, and the learning rate falls linearly to zero. Only the ten digits
compete for a place. So a model that only guesses has a loss of ln 10 nats a digit, and what the
loss is below that has been memorised. Settings are those of sft.py.
"""

import math
import re

import torch
import torch.nn.functional as F

import grpo
import tinylora
from configurator import configure
from model import load_model, load_tokenizer
from sft import Settings
from sft import check as check  # for lab.study, which takes this for a script
from support.parallel import Ranks
from support.run import Run

DIGITS = 8  # of an answer


def bits(row):
    """The memorised bits a trained number, by a line of lab.study's table. They are negative if a
    guess would do better."""
    answers = int(re.search("--batch_size=([0-9]+)", row["command"])[1])
    memorised = answers * DIGITS * (math.log(10) - float(row["loss"])) / math.log(2)
    return memorised / int(row["numbers"])


def train(cfg):
    ranks = Ranks(cfg.device)
    tokenizer = load_tokenizer(cfg.model)
    digits = torch.tensor([tokenizer.encode(digit)[0] for digit in "0123456789"])
    questions = [tokenizer.encode(f"{100 + i}? #### ") for i in range(cfg.batch_size)]
    generator = torch.Generator().manual_seed(cfg.seed)
    answers = torch.randint(10, (cfg.batch_size, DIGITS), generator=generator)
    ids = torch.cat((torch.tensor(questions), digits[answers]), dim=1)
    net = load_model(cfg.model, cfg.dtype, ranks.device)
    parameters, identity = tinylora.attach(net, cfg)
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.0, foreach=False)
    run = Run(cfg, ranks, parameters, optimizer, identity | {"script": "lab.capacity"})
    numbers = sum(p.numel() for p in parameters.values())
    print(f"{cfg.method} trains {numbers:,} numbers of {cfg.model}")

    def loss_per_digit():
        logits = net(ids.to(net.device))[:, -DIGITS - 1 : -1].cpu()  # [B, 8, vocab]
        return F.cross_entropy(logits[..., digits].flatten(0, 1), answers.flatten())

    for step in range(run.step, cfg.max_steps):
        optimizer.param_groups[0]["lr"] = cfg.lr * (1 - step / cfg.max_steps)
        loss = loss_per_digit()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(step + 1, {"loss": loss.item()})
    loss = loss_per_digit().item()
    run.log_evaluation(cfg.max_steps, {"loss": loss}, -loss)
    run.save(cfg.max_steps)
    run.close("nats per digit", f"{numbers:,} numbers")


if __name__ == "__main__":
    train(configure(Settings, grpo.reward))
