"""Rebuild the embedded toy from nothing: its problems, its tokenizer, and a base model that sft.py
pre-trains.

    python toy/make.py    # about 15 minutes on 2 cores; replaces toy/base, toy/human, toy/*.jsonl

The base model knows how to work problems out, but mostly does not. Most of its pre-training
documents answer a problem at once (#### 34, which it can only guess), and a minority works the
answer out first (10-2=8. 8+26=34. #### 34).
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

SEED = 1337

# ------------------------------------------------------------------------------------- the problems

NUM_TRAIN = 2000  # problems to train on
NUM_TEST = 500  # held out: none of them is a training problem or a pre-training document
NUM_DOCUMENTS = 166_000  # for pre-training
MIN_STEPS, MAX_STEPS = 3, 6  # calculations that a problem needs
WORKED_SHARE = 0.4  # of the documents that work the answer out, if nothing says what is wanted
SYSTEM_SHARE = 0.5  # of the documents with a system message, half of which want the working

NAMES = "Tom Ann Sam Mia Ben Eva Leo Zoe Max Ida Jon Amy".split()
THINGS = "apples coins books cards shells stamps pens eggs keys nuts".split()
PLUS = ["{n} finds {b} more.", "{n} buys {b} more.", "A friend brings {b} more.",
        "{n} wins {b} more."]
MINUS = ["{n} loses {b} of them.", "{n} gives away {b} of them.", "{n} sells {b} of them.",
         "Then {b} of them break."]
TIMES = {2: "Then the number doubles.", 3: "Then the number triples."}
HALVE = "{n} gives half of them away."
SYSTEMS = {True: "Think step by step.", False: "Answer at once."}


def make_problem(rng):
    """A word problem: the question, the final answer, and the worked solution. All values are
    between 1 and 99."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    x = rng.randint(2, 40)
    text, work = [f"{name} has {x} {thing}."], []
    for _ in range(rng.randint(MIN_STEPS, MAX_STEPS)):
        possible = {"+": x < 98, "-": x > 2, "*": x < 49, "/": x % 2 == 0}
        move = rng.choice([move for move in "+-*/" if possible[move]])
        if move == "+":
            b = rng.randint(1, min(9, 99 - x))
            y, line = x + b, rng.choice(PLUS)
        elif move == "-":
            b = rng.randint(1, min(9, x - 1))
            y, line = x - b, rng.choice(MINUS)
        elif move == "*":
            b = 3 if x <= 33 and rng.random() < 0.4 else 2
            y, line = x * b, TIMES[b]
        else:
            b, y, line = 2, x // 2, HALVE
        text.append(line.format(n=name, b=b))
        work.append(f"{x}{move}{b}={y}.")
        x = y
    text.append(f"How many {thing} are there now?")
    solution = " ".join([*work, f"#### {x}"])
    return {"question": " ".join(text), "answer": str(x), "solution": solution}


def make_problems(rng):
    """The training and the test problems, all of them different."""
    problems = {}  # by question
    while len(problems) < NUM_TRAIN + NUM_TEST:
        problem = make_problem(rng)
        problems[problem["question"]] = problem
    problems = list(problems.values())
    return problems[NUM_TEST:], problems[:NUM_TEST]


# Solutions as people write them, for supervised training: by two writers, and neither of them
# writes as the base model does.
WRITERS = [
    ("{name} has {x}{move}{b}={y} {thing}.", "How many {thing} are there? {y}."),
    ("{x} {thing}, then {x}{move}{b}={y} {thing}.", "Now there are {y}."),
]


def human_solution(problem, rng):
    """The worked solution of a problem in the words of one of the writers."""
    name, _, _, thing = problem["question"].partition(".")[0].split()
    line, end = rng.choice(WRITERS)
    steps = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", problem["solution"])
    lines = [line.format(name=name, thing=thing, x=x, move=move, b=b, y=y)
             for x, move, b, y in steps]
    answer = problem["answer"]
    return " ".join([*lines, end.format(y=answer, thing=thing), f"#### {answer}"])


def make_document(rng, worked_share=WORKED_SHARE):
    """A pre-training document: a problem that is answered at once or worked out."""
    problem = make_problem(rng)
    worked = rng.random() < worked_share
    row = {"question": problem["question"]}
    if rng.random() < SYSTEM_SHARE:
        worked = rng.random() < 0.5
        row["system"] = SYSTEMS[worked]
    row["solution"] = problem["solution"] if worked else f"#### {problem['answer']}"
    return row


# ------------------------------- the tokenizer: byte-level BPE in the format of Qwen2's tokenizer

VOCAB_SIZE = 512
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_bpe(texts, num_merges):
    """The merges of byte-pair encoding (Sennrich et al. 2016): the most frequent pair first, and of
    several the one that was seen first."""
    counts = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    letters = byte_characters()
    words = {tuple(letters[b] for b in word.encode()): n for word, n in counts.items()}
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
    merged = []
    for token in word:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return tuple(merged)


def byte_characters():
    """GPT-2's printable character for every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def write_tokenizer(path, texts):
    """Train a tokenizer on the texts and write its files. Returns the ids of its special tokens."""
    merges = train_bpe(texts, VOCAB_SIZE - 256 - len(SPECIALS))
    letters = byte_characters()
    vocab = {letters[b]: b for b in range(256)}
    for a, b in merges:
        vocab.setdefault(a + b, len(vocab))
    special_ids = {text: len(vocab) + i for i, text in enumerate(SPECIALS)}
    added = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for text, i in special_ids.items()]
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated",
             "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                  "use_regex": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
             "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": False, "vocab": vocab, "merges": [f"{a} {b}" for a, b in merges]}
    write_json(path, "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None, "decoder": byte_level, "model": model})
    write_json(path, "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False})
    return special_ids


def tokenizer_texts(problems):
    others = f"user assistant system {' '.join(SYSTEMS.values())}"
    return [f"{problem['question']} {problem['solution']} {others}" for problem in problems]


# ----------------------------------------------------------------------------------------- the rest

def write_config(path, special_ids):
    """The files of a model with Qwen2's architecture, a ten-thousandth of the size of the 7B."""
    stop = special_ids["<|im_end|>"]
    write_json(path, "config.json", {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": VOCAB_SIZE,
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "use_sliding_window": False, "attention_dropout": 0.0,
        "initializer_range": 0.02, "torch_dtype": "bfloat16", "bos_token_id": None,
        "eos_token_id": stop})
    write_json(path, "generation_config.json", {
        "eos_token_id": stop, "pad_token_id": special_ids["<|endoftext|>"]})


def write_json(path, name, data):
    with open(os.path.join(path, name), "w", encoding="utf-8", newline="\n") as f:
        json.dump(data, f, indent=1)
        f.write("\n")


def write_jsonl(path, rows):
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def write_data(toy, rng):
    """The problems, also with human solutions, and the tokenizer and the config of the base model.
    Returns the test problems."""
    train, test = make_problems(rng)
    writing = random.Random(SEED)
    for split, problems in (("train", train), ("test", test)):
        write_jsonl(f"{toy}/{split}.jsonl", problems)
        rows = [problem | {"solution": human_solution(problem, writing)} for problem in problems]
        write_jsonl(f"{toy}/human/{split}.jsonl", rows)
    write_config(f"{toy}/base", write_tokenizer(f"{toy}/base", tokenizer_texts(train)))
    return test


def main():
    if sys.argv[1:] in (["--help"], ["-h"]):
        return print(__doc__.strip())
    if sys.argv[1:]:
        raise UserError("toy/make.py takes no arguments: edit the numbers in it")
    with tempfile.TemporaryDirectory() as work:
        toy, documents = f"{work}/toy", f"{work}/documents.jsonl"
        os.makedirs(f"{toy}/base")
        os.makedirs(f"{toy}/human")
        rng = random.Random(SEED)
        held_out = {problem["question"] for problem in write_data(toy, rng)}
        rows = [make_document(rng) for _ in range(NUM_DOCUMENTS)]
        write_jsonl(documents, [row for row in rows if row["question"] not in held_out])
        subprocess.run([sys.executable, "sft.py", "config/toy_pretrain.py",
                        f"--dataset={documents}", f"--out_dir={work}/run"], cwd=ROOT, check=True)
        save_model(load_model(f"{work}/run/model", "bfloat16", "cpu"), f"{toy}/base")
        shutil.copytree(toy, HERE, dirs_exist_ok=True)  # only now, so that nothing is half-made


if __name__ == "__main__":
    one_line_errors()
    main()
