"""GRPO whose numbers have 16 bits while they are trained, and not only in the file: Figure 4 of
Learning to Reason in 13 Parameters, whose authors do not say which of the two it shows.

    python -m lab.precision config/qwen3b_u13.py --save_dtype=bfloat16

It is grpo.py with all its settings. After each step the numbers are rounded to save_dtype, so that
a step much smaller than a number is lost. The moments of Adam stay in float32.
"""

from torch.optim.optimizer import register_optimizer_step_post_hook

import grpo
from configurator import configure
from grpo import Settings
from grpo import check as check  # for lab.study, which takes this for a script
from support.checkpoint import DTYPES


def train(cfg):
    def round_numbers(optimizer, *_):
        for p in optimizer.param_groups[0]["params"]:
            p.data.copy_(p.data.to(DTYPES[cfg.save_dtype]))

    hook = register_optimizer_step_post_hook(round_numbers)
    try:
        grpo.train(cfg)
    finally:
        hook.remove()


if __name__ == "__main__":
    train(configure(Settings, grpo.reward, grpo.problems))
