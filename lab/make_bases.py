"""Base models beside the toy's own: smaller ones, and ones that work fewer of their answers out.

    python -m lab.make_bases worked10 worked20    # out/bases/...; 80 seconds each
    python -m lab.make_bases width80 width96      # replaces lab/bases/...; 15 minutes each

Those of other widths are pre-trained from nothing, as toy/make.py does it. Those that work 10 or 20
of 100 answers out are the toy's base after 100 more steps, on documents with this share of them.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile

from model import load_model, save_model
from support import UserError, one_line_errors, read_json
from support.data import read_file
from toy import make

FINETUNING = ["--model=toy/base", "--random_init=False", "--max_steps=100", "--lr=3e-4"]
BASES = {name: f"lab/bases/{name}" for name in ("width80", "width96")}
BASES |= {name: f"out/bases/{name}" for name in ("worked10", "worked20")}


def make_base(name):
    """Pre-train the base `name`, one of BASES, and write its checkpoint directory."""
    os.makedirs(os.path.dirname(BASES[name]), exist_ok=True)
    kind, number = name[:-2], int(name[-2:])
    with tempfile.TemporaryDirectory() as work:
        documents, start = f"{work}/documents.jsonl", f"{work}/start"
        held_out = {row["question"] for _, row in read_file("toy/test.jsonl")}
        rng = random.Random(number)
        if kind == "worked":
            rows = [make.make_document(rng, number / 100) for _ in range(13_000)]
            settings = FINETUNING
        else:
            rows = [make.make_document(rng) for _ in range(make.NUM_DOCUMENTS)]
            shutil.copytree("toy/base", start)
            changes = {"hidden_size": number, "intermediate_size": 3 * number}
            make.write_json(start, "config.json", read_json(f"{start}/config.json") | changes)
            settings = [f"--model={start}"]
        make.write_jsonl(documents, [row for row in rows if row["question"] not in held_out])
        subprocess.run([sys.executable, "sft.py", "config/toy_pretrain.py", *settings,
                        f"--dataset={documents}", f"--out_dir={work}/run"], check=True)
        net = load_model(f"{work}/run/model", "bfloat16", "cpu")
        save_model(net, BASES[name], "toy/base")


def make_missing(commands):
    """Make those bases that the commands name and that are not there."""
    for name, path in BASES.items():
        if not os.path.exists(path) and any(path in command for command in commands):
            make_base(name)


def main():
    names = sys.argv[1:]
    if not names or not set(names) <= set(BASES):
        raise UserError(f"name the bases to make, of {', '.join(BASES)}")
    for name in names:
        make_base(name)


if __name__ == "__main__":
    one_line_errors()
    main()
