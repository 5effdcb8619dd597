"""Rebuild the embedded toy from nothing: problems, tokenizer, and a base model pre-trained with sft.py.

    python toy/make.py            # some 15 minutes on 2 cores; writes toy/base, toy/human, train.jsonl, test.jsonl

The base model knows how to reason but mostly does not: in its pre-training documents a problem is mostly answered at
once (`#### 47`, which it can only guess) and in a minority worked out first (`10-2=8. 8+26=34. #### 34`).
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter

import regex

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

from model import load_model, save_model  # noqa: E402
from support import UserError, one_line_errors  # noqa: E402
from support.tokenizer import WORDS  # noqa: E402

SEED = 1337

# the problems
num_train = 2000  # problems for GRPO
num_test = 500  # held out: none of them occurs in train.jsonl or in the pre-training documents
num_documents = 166_000  # pre-training documents
min_steps, max_steps = 3, 6  # calculations a problem needs
worked_share = 0.4  # share of the documents that work the answer out; the others state it at once
system_share = 0.5  # share of the documents with a system message that says which of the two is wanted, half and half

# the model: Qwen2's architecture, a ten-thousandth of the size of the 7B
hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size, vocab_size = 128, 3, 4, 2, 384, 512

NAMES = "Tom Ann Sam Mia Ben Eva Leo Zoe Max Ida Jon Amy".split()
THINGS = "apples coins books cards shells stamps pens eggs keys nuts".split()
PLUS = ["{n} finds {b} more.", "{n} buys {b} more.", "A friend brings {b} more.", "{n} wins {b} more."]
MINUS = ["{n} loses {b} of them.", "{n} gives away {b} of them.", "{n} sells {b} of them.", "Then {b} of them break."]
TIMES = {2: "Then the number doubles.", 3: "Then the number triples."}
HALVE = "{n} gives half of them away."
SYSTEMS = {True: "Think step by step.", False: "Answer at once."}


def make_problem(rng):
    """One word problem: question, final answer, and the worked solution. All values stay between 1 and 99."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    x = rng.randint(2, 40)
    text, work = [f"{name} has {x} {thing}."], []
    for _ in range(rng.randint(min_steps, max_steps)):
        moves = [m for m in "+-*/" if (m != "+" or x < 98) and (m != "-" or x > 2) and (m != "/" or x % 2 == 0)
                 and (m != "*" or x < 49)]
        move = rng.choice(moves)
        if move == "+":
            b = rng.randint(1, min(9, 99 - x))
            y, line, step = x + b, rng.choice(PLUS), f"{x}+{b}"
        elif move == "-":
            b = rng.randint(1, min(9, x - 1))
            y, line, step = x - b, rng.choice(MINUS), f"{x}-{b}"
        elif move == "*":
            b = 3 if x <= 33 and rng.random() < 0.4 else 2
            y, line, step = x * b, TIMES[b], f"{x}*{b}"
        else:
            b, y, line, step = 2, x // 2, HALVE, f"{x}/2"
        text.append(line.format(n=name, b=b))
        work.append(f"{step}={y}.")
        x = y
    text.append(f"How many {thing} are there now?")
    return {"question": " ".join(text), "answer": str(x), "solution": " ".join(work) + f" #### {x}"}


def make_problems(rng):
    """The training and the test problems, all different."""
    problems = {}  # by question
    while len(problems) < num_train + num_test:
        problem = make_problem(rng)
        problems[problem["question"]] = problem
    problems = list(problems.values())
    return problems[num_test:], problems[:num_test]


# Solutions as people write them, for supervised training: two writers, neither of whom writes as the base model does.
WRITERS = [
    ("{name} has {x}{move}{b}={y} {thing}.", "How many {thing} are there? {y}."),
    ("{x} {thing}, then {x}{move}{b}={y} {thing}.", "Now there are {y}."),
]


def human_solution(problem, rng):
    """The worked solution of a problem in one of the writers' words."""
    name, _, _, thing = problem["question"].partition(".")[0].split()
    line, end = rng.choice(WRITERS)
    steps = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", problem["solution"])
    lines = [line.format(name=name, thing=thing, x=x, move=move, b=b, y=y) for x, move, b, y in steps]
    return " ".join([*lines, end.format(y=problem["answer"], thing=thing), f"#### {problem['answer']}"])


def make_document(rng):
    """A pre-training document: a problem, mostly answered at once, in a minority worked out."""
    problem = make_problem(rng)
    worked = rng.random() < worked_share
    row = {"question": problem["question"]}
    if rng.random() < system_share:
        worked = rng.random() < 0.5
        row["system"] = SYSTEMS[worked]
    row["solution"] = problem["solution"] if worked else f"#### {problem['answer']}"
    return row


def write_jsonl(path, rows):
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


# the tokenizer: byte-level BPE in the format of Qwen2's tokenizer.json
PATTERN = WORDS % ""
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_bpe(texts, num_merges):
    """The merges of byte-pair encoding (Sennrich et al. 2016), most frequent pair first, first seen wins ties."""
    words = Counter(w for text in texts for w in regex.findall(PATTERN, text))
    words = {tuple(byte_characters()[b] for b in w.encode()): n for w, n in words.items()}
    merges = []
    while len(merges) < num_merges:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = max(pairs, key=pairs.get)
        merges.append(best)
        words = {merge_pair(word, best): n for word, n in words.items()}
    return merges


def merge_pair(word, pair):
    out = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return tuple(out)


def byte_characters():
    """GPT-2's printable character for every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def write_tokenizer(path, texts):
    merges = train_bpe(texts, vocab_size - 256 - len(SPECIALS))
    vocab = {c: i for i, c in enumerate(byte_characters()[b] for b in range(256))}
    for a, b in merges:
        vocab.setdefault(a + b, len(vocab))
    added = [{"id": len(vocab) + i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i, t in enumerate(SPECIALS)]
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
             "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": vocab, "merges": [f"{a} {b}" for a, b in merges]}
    write_json(path, "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}, "post_processor": None,
        "decoder": byte_level, "model": model})
    write_json(path, "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "chat_template": TEMPLATE, "clean_up_tokenization_spaces": False})
    return {t["content"]: t["id"] for t in added}


def tokenizer_texts(problems):
    return [f"{p['question']} {p['solution']} user assistant system {' '.join(SYSTEMS.values())}" for p in problems]


def write_config(path, special_ids):
    stop = special_ids["<|im_end|>"]
    write_json(path, "config.json", {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": vocab_size,
        "hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "hidden_act": "silu",
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "use_sliding_window": False, "attention_dropout": 0.0, "initializer_range": 0.02, "torch_dtype": "bfloat16",
        "bos_token_id": None, "eos_token_id": stop})
    write_json(path, "generation_config.json", {"eos_token_id": stop, "pad_token_id": special_ids["<|endoftext|>"]})


def write_json(path, name, data):
    with open(os.path.join(path, name), "w", encoding="utf-8", newline="\n") as f:
        json.dump(data, f, indent=1)
        f.write("\n")


def main():
    if sys.argv[1:] in (["--help"], ["-h"]):
        return print(__doc__.strip())
    if sys.argv[1:]:
        raise UserError("toy/make.py takes no arguments: edit the numbers on top of it")
    with tempfile.TemporaryDirectory() as work:
        base, human = (os.path.join(work, "toy", name) for name in ("base", "human"))
        os.makedirs(base)
        os.makedirs(human)
        rng, writing = random.Random(SEED), random.Random(SEED)
        train, test = make_problems(rng)
        for split, problems in (("train", train), ("test", test)):
            write_jsonl(os.path.join(work, "toy", f"{split}.jsonl"), problems)
            rows = [problem | {"solution": human_solution(problem, writing)} for problem in problems]
            write_jsonl(os.path.join(human, f"{split}.jsonl"), rows)
        write_config(base, write_tokenizer(base, tokenizer_texts(train)))
        held_out = {p["question"] for p in test}
        documents = [d for d in (make_document(rng) for _ in range(num_documents)) if d["question"] not in held_out]
        write_jsonl(os.path.join(work, "documents.jsonl"), documents)
        out_dir = os.path.join(work, "toy_pretrain")
        subprocess.run([sys.executable, "sft.py", "config/toy_pretrain.py", f"--dataset={work}/documents.jsonl",
                        f"--out_dir={out_dir}"], cwd=ROOT, check=True)
        save_model(load_model(os.path.join(out_dir, "model"), dtype="bfloat16", device="cpu"), base)
        shutil.copytree(os.path.join(work, "toy"), HERE, dirs_exist_ok=True)  # at the end: nothing is left half-made


if __name__ == "__main__":
    one_line_errors()
    main()
