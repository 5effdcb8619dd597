r"""Maths problems: data sets and prompts by name, scores, and as a script the benchmarks.

    python eval_math.py                                                 # the toy, before training
    python eval_math.py --model=DIR --dataset=gsm8k,math500 --n=8       # pass@k and majority vote
    python eval_math.py --model=DIR --adapter=out/toy --dataset=my.csv  # problems of your own
    python eval_math.py --model=DIR --init_from=resume                  # after an interruption
    python eval_math.py --regrade=out/eval/gsm8k.jsonl                  # grade responses again
    torchrun --nproc_per_node=8 -- eval_math.py --model=DIR --dataset=gsm8k --n=8
"""

import hashlib
import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import Literal

from configurator import at_least, configure, save_settings
from model import load_tokenizer
from sample import encode_prompt, generate
from support import UserError, whole_file
from support.answers import extract_answer, lenient_correct, same_answer
from support.answers import is_correct as is_correct  # for eval_math.is_correct
from support.data import is_local, load_hub, read_file, read_responses, write_responses, write_rows
from support.parallel import Ranks, all_gather, is_chief, print0
from support.run import changes, claim
from tinylora import load_adapted


@dataclass
class Settings:
    model: str = "toy/base"  # checkpoint directory or hub name
    adapter: str = ""  # adapter file, out_dir of a run, or text (hex:...); none if empty
    dataset: str = "toy/test.jsonl"  # files, directories and names in DATASETS, with commas between
    split: str = "test"  # of a directory or a hub data set
    num_problems: int = 0  # how many to ask of each data set; 0: all
    prompt_template: str = "auto"  # a name in PROMPTS or a text with {question}; auto: by DATASETS
    system_prompt: str = "auto"  # system message; empty: the chat template's own; auto: by PROMPTS
    # what strict scoring reads: any, \boxed{42}, #### 42, the answer is 42, or <answer>42</answer>
    answer_format: Literal["auto", "any", "boxed", "hash", "phrase", "tags"] = "auto"  # by PROMPTS
    n: int = 1  # answers to each problem
    max_new_tokens: int = 2048  # a longer answer is cut off and counts as wrong
    temperature: float = -1.0  # 0: greedy; -1: 0 if n is 1, else 1
    seed: int = 1337  # of the sampling
    out_dir: str = "out/eval"  # all responses with their verdicts; an earlier one is moved aside
    init_from: Literal["scratch", "resume"] = "scratch"  # resume: keep the answers in out_dir
    regrade: str = ""  # a .jsonl file of responses to grade again, without a model
    shard: int = 1  # processes that hold one copy of the weights between them
    compile: bool = False  # torch.compile for the decode step
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...


STEPWISE = "Please reason step by step, and put your final answer within \\boxed{}."
PROMPTS = {  # name: (system message, or None for no chat; user message; what strict reads)
    "plain": ("", "{question}", "any"),
    "gsm8k": ("", '{question} Let\'s think step by step and output the final answer after "####".',
              "hash"),  # VERL's
    "boxed": ("You are a helpful assistant.", "{question}\n" + STEPWISE, "boxed"),  # the paper's
    "qwen_math": (STEPWISE, "{question}", "boxed"),
    # SimpleRL's, for base models that cannot follow an instruction
    "base": (None, "Question:\n{question}\nAnswer:\nLet's think step by step.\n", "any"),
}
BOTH, TEST, TRAIN = {"train": "train", "test": "test"}, {"test": "test"}, {"train": "train"}
DATASETS = {  # name: (hub path, configuration, prompt, {split: what the hub calls it})
    "gsm8k": ("openai/gsm8k", "main", "gsm8k", BOTH),
    "math": ("DigitalLearningGmbH/MATH-lighteval", None, "boxed", BOTH),
    "math12k": ("rasbt/math_full_minus_math500", None, "boxed", TRAIN),  # both, without MATH500
    "deepmath": ("zwhe99/DeepMath-103K", None, "boxed", TRAIN),
    "math500": ("HuggingFaceH4/MATH-500", None, "boxed", TEST),
    "aime24": ("HuggingFaceH4/aime_2024", None, "boxed", {"test": "train"}),
    "aime25": ("math-ai/aime25", None, "boxed", TEST),
    "amc23": ("math-ai/amc23", None, "boxed", TEST),
    "minerva": ("math-ai/minervamath", None, "boxed", TEST),
    "olympiad": ("math-ai/olympiadbench", None, "boxed", TEST),
    "gaokao2023en": ("MARIO-Math-Reasoning/Gaokao2023-Math-En", None, "boxed", {"test": "train"}),
    "svamp": ("ChilleD/SVAMP", None, "boxed", {"train": "train", "test": "train+test"}),
    "tulu3": ("allenai/tulu-3-sft-mixture", None, "plain", TRAIN),  # chats, for sft.py alone
    "openthoughts3": ("open-thoughts/OpenThoughts3-1.2M", None, "plain", TRAIN),  # likewise
}
QUESTION_COLUMNS = ("question", "problem", "prompt")
ANSWER_COLUMNS = ("answer", "final_answer", "solution", "Answer")  # the last is SVAMP's

# --------------------------------------------------------------------------- problems and prompts

def load_problems(name_or_path, split="train", read_row=None):
    """What read_row makes of each (place, row) of the data: by default a problem, see as_problem.
    The names are those of load_rows."""
    read_row = read_row or as_problem
    return [read_row(place, row) for place, row in load_rows(name_or_path, split)]


def load_rows(name_or_path, split):
    """A sequence of (place, row). Rows of the hub stay on the disk until they are asked for.

    name_or_path: a file that read_file reads; a directory with one that is named after the split;
        a name in DATASETS; or owner/name on the hub. A suffix @1-2 selects levels 1 and 2.
    """
    name, levels = re.fullmatch("(?s)(.*?)(?:@([0-9]+-[0-9]+))?", name_or_path).groups()
    if is_local(name):
        rows = read_file(name, split)
    elif name in DATASETS or "/" in name:
        path, configuration, _, splits = DATASETS.get(name, (name, None, "plain", {split: split}))
        if name in ("math", "math12k"):
            levels = levels or "3-5"  # the paper's
        if split not in splits:
            raise UserError(f"data set '{name}' has no split '{split}', only {', '.join(splits)}")
        rows = load_hub(name, path, configuration, splits[split])
    else:
        raise UserError(f"'{name}' is neither a file, nor a hub name owner/name, nor one of "
                        f"{', '.join(DATASETS)}")
    if levels:
        low, high = map(int, levels.split("-"))
        chosen = [f"{word}{level}" for word in ("", "Level ") for level in range(low, high + 1)]
        rows = [(place, row) for place, row in rows if str(row.get("level")) in chosen]
    if not rows:
        raise UserError(f"{name_or_path} holds no problems")
    return rows


def as_problem(place, row):
    """The row with three texts: 'question', the final 'answer', and the 'solution', which is the
    worked answer if the data has one."""
    if "Body" in row:  # SVAMP
        row = row | {"question": f"{row['Body']} {row['Question']}"}
    questions = [row[c] for c in QUESTION_COLUMNS if isinstance(row.get(c), str) and row[c].strip()]
    answers = {c: as_text(row[c]) for c in ANSWER_COLUMNS if as_text(row.get(c)).strip()}
    if not questions or not answers:
        found = {key: str(value)[:30] for key, value in row.items()}
        raise UserError(f"{place}: needs a question, a text named {', '.join(QUESTION_COLUMNS)}, "
                        "and an answer, a text, number or list named "
                        f"{', '.join(ANSWER_COLUMNS)}; it has {found}")
    answer = next(iter(answers.values()))
    return row | {"question": questions[0], "answer": final_answer(answer),
                  "solution": answers.get("solution", answer)}


def as_text(value):
    """An answer as text; empty if it is no text, number or list."""
    if isinstance(value, list):  # OlympiadBench: several answers to one problem
        return ", ".join(str(part).strip(" $") for part in value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if type(value) in (str, int, float) and value == value else ""  # not of NaN


def final_answer(text):
    r"""The reference in an answer or solution: what MATH puts into \boxed{}, or GSM8K behind ####
    in the last line, or else all of it: words like "answer: 4" may be part of a program."""
    last_line = text.rstrip().rpartition("\n")[2]
    return extract_answer(text, "boxed") or extract_answer(last_line, "hash") or text.strip()


def choose_prompt(cfg, name):
    """cfg with every "auto" replaced by what data set `name` is usually asked with. So are files
    and directories named like it: data/math500/test.jsonl is asked as math500."""
    template = cfg.prompt_template
    if template == "auto":
        known = [key for key in DATASETS for part in name.split("/")[-2:] if part.startswith(key)]
        template = DATASETS[max(known, key=len)][2] if known else "plain"
    system, user, answer_format = PROMPTS.get(template, ("", template, "any"))
    system = system if cfg.system_prompt == "auto" else cfg.system_prompt
    answer_format = answer_format if cfg.answer_format == "auto" else cfg.answer_format
    return replace(cfg, system_prompt=system, prompt_template=user, answer_format=answer_format)


def encode_problems(tokenizer, problems, system_prompt, prompt_template, context=math.inf):
    """Prompts as lists of token ids. A problem's own `system` message replaces system_prompt;
    system_prompt = None means no chat. UserError for a prompt that fills the context (tokens)."""
    if "{question}" not in prompt_template:
        raise UserError(f"prompt_template must contain {{question}}, or in eval_math.py be one of "
                        f"{', '.join(PROMPTS)}; got '{prompt_template}'")
    prompts = []
    for problem in problems:
        text = prompt_template.replace("{question}", problem["question"])
        system = problem.get("system") or system_prompt
        prompt = encode_prompt(tokenizer, text, system, chat=system_prompt is not None)
        if len(prompt) >= context:
            raise UserError(f"a prompt of {len(prompt)} tokens fills the model's context of "
                            f"{context}; leave out '{problem['question'][:50]}...'")
        prompts.append(prompt)
    return prompts


# ----------------------------------------------------------------------------------------- scores

def score(response, truncated, reference, answer_format):
    """Verdicts on a response. strict: it has ended, and what it states in the format asked for
    (extracted) is right. lenient: what it states in any format is right, or its last number is,
    even if it was cut off."""
    stated = None if truncated else extract_answer(response, answer_format)
    strict = stated is not None and same_answer(stated, reference)
    lenient = strict or lenient_correct(response, reference)
    return {"strict": strict, "lenient": lenient, "extracted": stated}


def pass_at_k(n, right, k):
    """Chance that one of k answers is right where `right` of n are (Chen et al. 2021, eq. 1)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(rows):
    """1 if the answer that most rows state is right; if several lead, the share of right ones.
    Equal answers count together, however they are written."""
    stated = [row for row in rows if row["extracted"] is not None]
    counts = Counter(row["extracted"] for row in stated)
    votes = {a: sum(counts[b] for b in counts if same_answer(a, b)) for a in counts}
    leaders = [row["strict"] for row in stated if votes[row["extracted"]] == max(votes.values())]
    return fmean(leaders) if leaders else 0.0


def summarise(groups):
    """Figures of a data set. groups: n rows for each problem. Shares are from 0 to 1, length is in
    tokens. stderr is that of strict over problems: answers to one problem are not independent."""
    n = len(groups[0])
    rows = [row for group in groups for row in group]
    right = [sum(row["strict"] for row in group) for group in groups]
    summary = {"problems": len(groups), "n": n, "strict": sum(right) / len(rows),
               "stderr": pstdev(right) / n / math.sqrt(max(1, len(groups) - 1)),
               "lenient": fmean(row["lenient"] for row in rows)}
    if n > 1:
        for k in sorted({2**i for i in range(1, n.bit_length())} | {n}):
            summary[f"pass@{k}"] = fmean(pass_at_k(n, r, k) for r in right)
        summary[f"maj@{n}"] = fmean(majority(group) for group in groups)
    return summary | {"truncated": fmean(row["truncated"] for row in rows),
                      "length": fmean(row["tokens"] for row in rows)}


def table(summaries):
    """Lines of a table of {name: summary}."""
    formats = {"problems": ",", "n": "", "truncated": ".1%", "length": ",.0f"}
    lines = [["", *next(iter(summaries.values()))]]
    for name, summary in summaries.items():
        cells = [format(value, formats.get(key, ".3f")) for key, value in summary.items()]
        lines.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(map(str.rjust, line, widths)) for line in lines]


def grade_again(path, answer_format):
    """Grade a file of responses by today's rules. The new verdicts go to a file beside it."""
    settings, groups = read_responses(path)
    if not groups:
        raise UserError(f"{path} has no responses")
    if answer_format == "auto":
        answer_format = settings.get("answer_format", "any")
    changed = 0
    for rows in groups.values():
        for row in rows:
            verdict = score(row["response"], row["truncated"], row["answer"], answer_format)
            changed += any(row.get(key) != verdict[key] for key in ("strict", "lenient"))
            row |= verdict
    new = f"{path.removesuffix('.jsonl')}.regraded.jsonl"
    write_responses(new, settings | {"answer_format": answer_format}, groups.values())
    n = max(map(len, groups.values()))
    complete = [rows for rows in groups.values() if len(rows) == n]
    print(*table({os.path.basename(path): summarise(complete)}), sep="\n")
    print(f"strict reads '{answer_format}'; {changed} verdicts changed (see {new}); left out: "
          f"{len(groups) - len(complete)} problems with fewer than {n} responses")


# -------------------------------------------------------------------------------------- the script

def grade(problem, index, completions, cfg):
    """Yield a row with its verdicts for each of the completions of problem number `index`."""
    for j, completion in enumerate(completions):
        text, truncated = completion.text, completion.truncated
        if cfg.system_prompt is None and "\nQuestion:" in text:
            # A base model goes on with a question of its own, so its answer has ended there.
            text, truncated = text.partition("\nQuestion:")[0], False
        verdict = score(text, truncated, problem["answer"], cfg.answer_format)
        yield {"index": index, "sample": j, "question": problem["question"],
               "answer": problem["answer"], "tokens": len(completion.ids), "truncated": truncated,
               **verdict, "response": text}


def identity(net, problems, cfg):
    """What a response depends on. Answers made with other settings are not mixed with these."""
    texts = [[problem["question"], problem["answer"]] for problem in problems]
    meta = net.adapter and net.adapter.meta
    digest = hashlib.sha256(json.dumps([texts, meta], sort_keys=True).encode())
    for p in net.adapter.parameters() if net.adapter else ():
        digest.update(p.detach().cpu().numpy())
    keys = ("model", "split", "prompt_template", "system_prompt", "answer_format", "n",
            "max_new_tokens", "temperature", "seed")
    settings = {key: getattr(cfg, key) for key in keys}
    return settings | {"dtype": str(net.dtype), "adapter or problems": digest.hexdigest()}


def ask(net, tokenizer, problems, prompts, cfg, path, ranks):
    """Ask the problems that `path` does not answer yet, each process its part of them, and append
    the answers as they come. Returns the figures of all answers. What is sampled depends on the
    problem's place in the data, and not on what is asked besides."""
    settings, done, left = identity(net, problems, cfg), {}, None
    asked = list(range(len(problems)))[: cfg.num_problems or None]
    if is_chief():
        if cfg.init_from == "resume" and os.path.exists(path):
            with open(path, "rb+") as f:
                f.truncate(f.read().rfind(b"\n") + 1)  # a killed run may have left half a line
            before, done = read_responses(path)
            if different := changes(before, settings):
                raise UserError(f"cannot resume: {path} was made with another {different}")
            done = {i: rows for i, rows in done.items() if len(rows) == cfg.n}
        write_responses(path, settings, done.values())
        left = [i for i in asked if i not in done]
        print(f"{path}: {len(asked)} problems, {len(asked) - len(left)} of them answered already; "
              f"system {cfg.system_prompt!r}, user {cfg.prompt_template!r}, {cfg.answer_format}")
    mine = ranks.mine(all_gather(left)[0])

    def on_done(i, completions):
        write_rows(path, grade(problems[mine[i]], mine[i], completions, cfg))

    generate(net, tokenizer, [prompts[i] for i in mine], cfg.n, cfg.max_new_tokens, cfg.temperature,
             cfg.seed, prompt_ids=mine, progress="evaluating", on_done=on_done)
    all_gather(None)  # wait for the answers of the other processes
    groups = read_responses(path)[1]
    summary = summarise([groups[i] for i in asked])
    if summary["truncated"] > 0.05:
        print0(f"warning: {summary['truncated']:.0%} of the answers were cut off, and are wrong by "
               f"strict; raise max_new_tokens (now {cfg.max_new_tokens})")
    return summary


def main():
    cfg = configure(Settings)
    if cfg.temperature == -1:
        cfg.temperature = 0.0 if cfg.n == 1 else 1.0
    at_least(cfg, 1, "n", "max_new_tokens")
    at_least(cfg, 0, "num_problems", "seed", "temperature")
    if cfg.n > 1 and cfg.temperature == 0:
        raise UserError(f"n={cfg.n} answers are all the same at temperature 0; set --temperature=1")
    if cfg.regrade:
        return grade_again(cfg.regrade, cfg.answer_format)
    names = [name.strip() for name in cfg.dataset.split(",") if name.strip()]
    stems = [re.sub(r"[^\w.@-]+", "_", name).strip("._").removesuffix(".jsonl") for name in names]
    if not names or len(set(stems)) < len(stems):
        raise UserError(f"dataset must name data sets, each once; got '{cfg.dataset}'")
    if os.path.exists(os.path.join(cfg.out_dir, "log.jsonl")):
        raise UserError(f"out_dir {cfg.out_dir} holds a training run; choose another")
    problems = [load_problems(name, cfg.split) for name in names]
    settings = [choose_prompt(cfg, name) for name in names]
    ranks = Ranks(cfg.device, cfg.shard)
    net = load_adapted(cfg.model, cfg.adapter, cfg.dtype, ranks.device, cfg.shard)
    net.compile_decode = cfg.compile
    tokenizer = load_tokenizer(cfg.model)
    context = net.config.max_position_embeddings
    prompts = [encode_problems(tokenizer, rows, s.system_prompt, s.prompt_template, context)
               for rows, s in zip(problems, settings)]
    if is_chief():
        claim(cfg.out_dir, "settings.py", fresh=cfg.init_from == "scratch")
        save_settings(cfg, os.path.join(cfg.out_dir, "settings.py"))
        print(f"to go on after an interruption: --out_dir={cfg.out_dir} --init_from=resume")
    summaries = {}
    for i, name in enumerate(names):
        path = os.path.join(cfg.out_dir, f"{stems[i]}.jsonl")
        summaries[name] = ask(net, tokenizer, problems[i], prompts[i], settings[i], path, ranks)
    if is_chief():
        path = os.path.join(cfg.out_dir, "results.json")
        with whole_file(path) as aside, open(aside, "w", encoding="utf-8") as f:
            json.dump(summaries, f, indent=1)
        print(*table(summaries), sep="\n")
    ranks.leave()


if __name__ == "__main__":
    main()
