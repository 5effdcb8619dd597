"""Maths problems: data sets and prompts by name, scores, and as a script the benchmarks. The answer checker is
support/answers.py."""
import hashlib
import json
import math
import os
import re
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

from configurator import configure, save_settings
from support import UserError, whole_file
from support.answers import extract_answer, extract_lenient, is_correct, last_number, same_answer  # noqa: F401
from support.run import claim


@dataclass
class Settings:
    model: str = "toy/base"  # checkpoint directory or hub name
    adapter: str = ""  # adapter file, the out_dir of a run, or text (hex:...); none if empty
    dataset: str = "toy/test.jsonl"  # what to ask, separated by commas: .jsonl files, folders, names in DATASETS, hub data sets
    split: str = "test"  # of a folder or hub data set
    num_problems: int = 0  # how many to ask of each; 0: all
    prompt_template: str = "auto"  # a name in PROMPTS, or a text with {question}; auto: as the data set's row in DATASETS says
    system_prompt: str = "auto"  # system message; empty: what the chat template puts there, if anything; auto: as in PROMPTS
    answer_format: Literal["auto", "any", "boxed", "hash", "phrase", "tags"] = "auto"  # strict scoring reads hash (#### 42), boxed (\boxed{42}), phrase or any; auto: as in PROMPTS
    n: int = 1  # answers a problem
    max_new_tokens: int = 2048  # an answer is cut off after so many, and is wrong
    temperature: float = -1.0  # 0: greedy; -1: 0 for n = 1, else 1
    seed: int = 1337  # of the sampling
    out_dir: str = "out/eval"  # every response with its verdict, a .jsonl file a data set; an earlier one is moved aside
    init_from: Literal["scratch", "resume"] = "scratch"  # or resume: go on with the answers that out_dir holds already
    regrade: str = ""  # a .jsonl file of responses: grade them anew, without a model
    shard: int = 1  # processes of torchrun that hold one copy of the weights between them: for models beyond one GPU
    compile: bool = False  # torch.compile for the decode step: for small models on a CPU; on a GPU not measured
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16, float16
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...

# ----------------------------------------------------------------------------------------------------------------------
# Problems and evaluation. What needs torch is imported inside, so that the checker stays importable without it.

PROMPTS = {  # name: (system message, user message, what strict scoring reads); system message None: no chat at all
    "plain": ("", "{question}", "any"),
    "gsm8k": ("", '{question} Let\'s think step by step and output the final answer after "####".', "hash"),  # VERL
    "boxed": ("You are a helpful assistant.",  # the paper's on MATH; from SimpleRL, whose name for it is qwen-boxed
              "{question}\nPlease reason step by step, and put your final answer within \\boxed{}.", "boxed"),
    "qwen_math": ("Please reason step by step, and put your final answer within \\boxed{}.", "{question}", "boxed"),
    "base": (None, "Question:\n{question}\nAnswer:\nLet's think step by step.\n", "any"),  # SimpleRL, for weak bases
}
DATASETS = {  # name: (hub path, configuration, {split: what the hub calls it}, question, answer columns, prompt)
    "gsm8k": ("openai/gsm8k", "main", {"train": "train", "test": "test"}, "question", "answer", "gsm8k"),
    "math": ("DigitalLearningGmbH/MATH-lighteval@3-5", None, {"train": "train", "test": "test"}, "problem", "solution",
             "boxed"),
    "deepmath": ("zwhe99/DeepMath-103K", None, {"train": "train"}, "question", "final_answer", "boxed"),
    "math500": ("HuggingFaceH4/MATH-500", None, {"test": "test"}, "problem", "answer", "boxed"),
    "aime24": ("HuggingFaceH4/aime_2024", None, {"test": "train"}, "problem", "answer", "boxed"),
    "aime25": ("math-ai/aime25", None, {"test": "test"}, "problem", "answer", "boxed"),
    "amc23": ("math-ai/amc23", None, {"test": "test"}, "question", "answer", "boxed"),
    "minerva": ("math-ai/minervamath", None, {"test": "test"}, "question", "answer", "boxed"),
    "olympiad": ("math-ai/olympiadbench", None, {"test": "test"}, "question", "final_answer", "boxed"),
    "gaokao2023en": ("MARIO-Math-Reasoning/Gaokao2023-Math-En", None, {"test": "train"}, "question", "answer", "boxed"),
    "svamp": ("ChilleD/SVAMP", None, {"train": "train", "test": "train+test"}, "Body Question", "Answer", "boxed"),
}
ANSWER_FORMATS = ("any", "boxed", "hash", "phrase")
QUESTION_KEYS, ANSWER_KEYS = ("question", "problem", "prompt"), ("answer", "final_answer", "solution")


def load_problems(name_or_path: str, split: str = "train", read_row=None) -> list[dict]:
    """Problems as dicts, a row each, as read_row (default: as_problem) makes them.

    name_or_path: a local .jsonl file, a folder with {split}.jsonl, a name in DATASETS, or a hub data set ('owner/name')
        whose columns are called question or problem, and answer or solution. A suffix @3-5 keeps the problems whose
        'level' is 3 to 5; the name 'math' has it by itself, as in SimpleRL and the paper.
    read_row: a function of (place, row), where place says in an error message which file and line it is.
    Raises UserError naming file and line where a row has no question or answer, for an empty file and an unknown name.
    """
    name, at, levels = name_or_path.rpartition("@")
    name, levels = (name, levels) if at and not os.path.exists(name_or_path) else (name_or_path, "")
    if levels and not re.fullmatch("[0-9]+-[0-9]+", levels):
        raise UserError(f"'{name_or_path}': levels are written as @3-5")
    path = os.path.join(name, f"{split}.jsonl") if os.path.isdir(name) else name
    if path.endswith((".jsonl", ".json")) or os.path.exists(path):
        rows = _read_jsonl(path)
    else:
        rows, default_levels = _read_hub(name, split)
        levels = levels or default_levels
    low, _, high = levels.partition("-")
    problems = []
    for place, row in rows:
        problem = (read_row or as_problem)(place, row)
        level = re.search("[0-9]+", str(row.get("level", "")))  # an int, or MATH's "Level 5"
        if not levels or level and int(low) <= int(level[0]) <= int(high):
            problems.append(problem)
    if not problems:
        raise UserError(f"{path} holds no problems" + (f" of level {levels}" if levels else ""))
    return problems


def as_problem(place: str, row: dict) -> dict:
    """The row with the strings 'question', 'answer' (the final one: of a worked answer, as in GSM8K's answer column,
    the box, or else what it states) and 'solution' (the worked answer where there is one, else the answer)."""
    question = next((row[k] for k in QUESTION_KEYS if isinstance(row.get(k), str)), "")
    given = (row[k] for k in ANSWER_KEYS if type(row.get(k)) in (str, int, float, list) and row[k] == row[k])  # no NaN
    answer = next(map(_text, given), "")
    if not question.strip() or not answer.strip():
        raise UserError(f"{place}: needs a question ({', '.join(QUESTION_KEYS)}) and an answer "
                        f"({', '.join(ANSWER_KEYS)}); it has {', '.join(row) or 'nothing'}")
    check_system(place, row)
    solution = row["solution"] if isinstance(row.get("solution"), str) and row["solution"].strip() else answer
    final = extract_answer(answer, "boxed") or extract_answer(answer) or answer.strip()
    return row | {"question": question, "answer": final, "solution": solution}


def check_system(place: str, row: dict):
    """UserError for a row whose own system message is no text: it would be left out in silence."""
    if not isinstance(row.get("system") or "", str):
        raise UserError(f"{place}: system must be a text, not {str(row['system'])[:40]!r}")


def _text(answer):
    """An answer column as text: 8.0 as 8, and a list of answers (OlympiadBench) as one list."""
    if isinstance(answer, list):
        return ", ".join(str(part).strip().strip("$") for part in answer)
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)


def _read_jsonl(path, unfinished=False):
    """[(place, row)] of a .jsonl file; blank lines are skipped, and with `unfinished` a last line that breaks off."""
    try:
        with open(path, "rb") as f:
            lines = [(f"{path}, line {i}", line) for i, line in enumerate(f, 1) if line.strip()]
    except OSError as error:
        raise UserError(f"no problems can be read from '{path}': {error}") from None
    rows = []
    for place, line in lines:
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            if unfinished and not line.endswith(b"\n"):  # a run was killed here, perhaps inside a character
                break
            raise UserError(f"{place}: no JSON: {error}; every line must be an object, as in .jsonl files") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: a row must be a JSON object")
        rows.append((place, row))
    return rows


def load_hub(name, path, configuration, split, **options):
    """datasets.load_dataset, with one line for what can go wrong. `name` is what the user wrote."""
    try:
        import datasets  # only here: local files need the standard library alone
    except ImportError:
        raise UserError(f"'{name}' is on the hub, which needs `pip install datasets`; or give a .jsonl file") from None
    try:
        return datasets.load_dataset(path, configuration, split=split, **options)
    except Exception as error:  # the hub client raises many kinds; all mean that the data is not to be had
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"data set '{name}' ({path}, {split}) could not be loaded ({reason}); give a "
                        ".jsonl file or a folder instead") from None


def _read_hub(name, split):
    """([(place, row)], levels) of a data set on the hub."""
    if name not in DATASETS and "/" not in name:
        raise UserError(f"no file and no data set is called '{name}'; known names: {', '.join(DATASETS)}; "
                        "or give a .jsonl file or a hub name owner/name")
    plain = (name, None, {split: split}, "question", "answer", "plain")
    path, configuration, splits, question, answer, _ = DATASETS.get(name, plain)
    path, _, levels = path.partition("@")
    if split not in splits:
        raise UserError(f"data set '{name}' has no split '{split}', only {' and '.join(splits)}")
    rows = load_hub(name, path, configuration, splits[split])
    columns = question.split()
    if name in DATASETS and not {*columns, answer} <= set(rows.column_names):
        raise UserError(f"data set '{name}' ({path}) has changed: its columns {question}, {answer} are now "
                        f"{', '.join(rows.column_names)}; give a .jsonl file")
    if name in DATASETS:
        rows = ({"question": " ".join(row[c] for c in columns), "answer": row[answer]}
                | {k: v for k, v in row.items() if k not in (*columns, answer)} for row in rows)
    return [(f"{path}, row {i}", row) for i, row in enumerate(rows)], levels


def choose_prompt(cfg, name):
    """Settings with 'auto' replaced by the conventions of data set `name`. A folder, a file in it (the current folder
    too) or owner/name has those of the data set that its name begins with: data/math500/test.jsonl is asked as math500.
    """
    path = re.sub("@[0-9]+-[0-9]+$", "", name)
    is_file = path.endswith((".jsonl", ".json"))
    folder = os.path.basename(os.path.dirname(os.path.abspath(path)) if is_file else path.rstrip("/\\"))
    known = max((key for key in DATASETS if folder.startswith(key)), key=len, default=None)
    template = (DATASETS[known][-1] if known else "plain") if cfg.prompt_template == "auto" else cfg.prompt_template
    if template not in PROMPTS and "{question}" not in template:
        raise UserError(f"prompt_template '{template}' must contain {{question}}, or be one of {', '.join(PROMPTS)}")
    system, text, answer_format = PROMPTS.get(template, ("", template, "any"))
    chosen = {"prompt_template": text, "system_prompt": system if cfg.system_prompt == "auto" else cfg.system_prompt,
              "answer_format": answer_format if cfg.answer_format == "auto" else cfg.answer_format}
    return SimpleNamespace(**vars(cfg) | chosen)


def encode_problems(tokenizer, problems, system_prompt, prompt_template):
    """Prompt ids of problems. The template's {question} is replaced as text: other braces stay what they are. A
    problem with a `system` message of its own has that in the place of system_prompt."""
    from sample import encode_prompt

    if "{question}" not in prompt_template:
        raise UserError("prompt_template must contain {question}")
    return [encode_prompt(tokenizer, prompt_template.replace("{question}", p["question"]),
                          p.get("system") or system_prompt, chat=system_prompt is not None) for p in problems]


def checked_prompts(net, tokenizer, problems, cfg, name):
    """encode_problems, and a prompt that is too long for the model is found now rather than after an hour."""
    context = net.config.max_position_embeddings
    prompts = encode_problems(tokenizer, problems, cfg.system_prompt, cfg.prompt_template)
    for i, prompt in enumerate(prompts):
        if len(prompt) >= context:
            raise UserError(f"{name}: problem {i + 1} has a prompt of {len(prompt)} tokens, longer than the model's "
                            f"context of {context}; leave it out")
    return prompts


# --- scores: one response, one problem, one data set ------------------------------------------------------------------

def score(response: str, truncated: bool, reference: str, answer_format: str) -> dict:
    """Verdicts on one response. strict: it ended, and the answer it states in the format the prompt asked for is right.
    lenient: any statement, else the last number, is right, ended or not, as other harnesses count. extracted: what
    strict read, or None."""
    stated = None if truncated else extract_answer(response, answer_format)
    found = extract_lenient(response)
    return {"strict": stated is not None and same_answer(stated, reference),
            "lenient": found is not None and same_answer(found, reference), "extracted": stated}


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that k of n answers, of which `right` are right, hold a right one: unbiased (Chen et al. 2021, eq. 1)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(rows: list[dict]) -> float:
    """Is the answer that most of the rows state right? Where several lead, the share of them that is: a fair draw.
    Equal answers count together, however they are written."""
    parties = []
    for row in rows:
        if row["extracted"] is not None:
            party = next((p for p in parties if same_answer(row["extracted"], p[0]["extracted"])), None)
            parties.append([row]) if party is None else party.append(row)
    leaders = [p for p in parties if len(p) == max(map(len, parties))]
    return sum(p[0]["strict"] for p in leaders) / len(leaders) if leaders else 0.0


def summarise(groups: list[list[dict]]) -> dict:
    """Figures of a data set from its rows, n to a problem: shares in [0, 1], the standard error of strict over
    problems (answers to one problem are not independent), and the mean length in tokens."""
    n = len(groups[0])
    rows = [row for group in groups for row in group]
    right = [sum(row["strict"] for row in group) for group in groups]
    summary = {"problems": len(groups), "n": n}
    summary |= {key: sum(row[key] for row in rows) / len(rows) for key in ("strict", "lenient", "truncated")}
    spread = sum((r / n - summary["strict"]) ** 2 for r in right) / max(1, len(groups) - 1)
    summary |= {"stderr": math.sqrt(spread / len(groups)), "length": sum(row["tokens"] for row in rows) / len(rows)}
    if n > 1:
        for k in sorted({2**i for i in range(1, n.bit_length())} | {n}):
            summary[f"pass@{k}"] = sum(pass_at_k(n, r, k) for r in right) / len(groups)
        summary[f"maj@{n}"] = sum(map(majority, groups)) / len(groups)
    return summary


def evaluate(net, tokenizer, problems, cfg, n=1, temperature=0.0, indices=None, on_rows=None):
    """Ask every problem n times and grade the answers. cfg: settings with system_prompt, prompt_template,
    answer_format, max_new_tokens and seed.

    indices: numbers that name the problems, for their random numbers (default: 0, 1, ...).
    on_rows(index, rows) is called as soon as all answers to a problem are there.
    Returns summarise()'s figures and 'rows': [{index, sample, question, answer, response, strict, ...}].
    """
    from sample import generate

    indices = range(len(problems)) if indices is None else indices
    groups = [[] for _ in problems]

    def grade(i, completions):
        for j, c in enumerate(completions):
            text, truncated = c.text, c.truncated
            if cfg.system_prompt is None and "\nQuestion:" in text:  # a base model runs on into a problem of its own
                text, truncated = text.partition("\nQuestion:")[0], False
            groups[i].append({"index": indices[i], "sample": j, "question": problems[i]["question"],
                              "answer": problems[i]["answer"], "tokens": len(c.ids), "truncated": truncated,
                              **score(text, truncated, problems[i]["answer"], cfg.answer_format), "response": text})
        if on_rows:
            on_rows(indices[i], groups[i])

    prompts = encode_problems(tokenizer, problems, cfg.system_prompt, cfg.prompt_template)
    generate(net, tokenizer, prompts, n, cfg.max_new_tokens, temperature, cfg.seed, prompt_ids=indices,
             progress="evaluating", on_done=grade)
    return (summarise(groups) if groups else {}) | {"rows": [row for group in groups for row in group]}


# --- the script -------------------------------------------------------------------------------------------------------

def table(summaries):
    """Lines of a table: a data set a line."""
    def cells(name, s):
        marks = [f"{s[key]:.3f}" for key in s if "@" in key]
        speed = f"{s['tokens_per_second']:,.0f}" if s.get("tokens_per_second") else "-"
        return [name, f"{s['problems']:,}", f"{s['strict']:.3f} +- {s['stderr']:.3f}", f"{s['lenient']:.3f}", *marks,
                f"{s['truncated']:.1%}", f"{s['length']:.0f}", speed]

    first = next(iter(summaries.values()))
    heads = ["", "problems", "strict (std. error)", "lenient", *(key for key in first if "@" in key), "cut off",
             "tokens", "tokens/s"]
    lines = [heads, *(cells(name, s) for name, s in summaries.items())]
    if len(summaries) > 1:
        mean = {key: sum(s[key] for s in summaries.values()) / len(summaries) for key in ("strict", "lenient")}
        lines.append(["mean of the data sets", "", f"{mean['strict']:.3f}", f"{mean['lenient']:.3f}"]
                     + [""] * (len(heads) - 4))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
            for line in lines]


def read_responses(path):
    """(settings, {index: rows}) of a file of responses: our own, or any .jsonl with response and answer columns. Of a
    run that was killed while it wrote, the last half line is left out."""
    rows = _read_jsonl(path, unfinished=True)
    settings = rows.pop(0)[1]["settings"] if rows and isinstance(rows[0][1].get("settings"), dict) else {}
    groups = {}
    for i, (place, row) in enumerate(rows):
        row = {"tokens": 0, "truncated": False, "index": i} | row
        for key, kind in {"response": str, "answer": str, "tokens": int, "truncated": bool, "index": int}.items():
            if type(row.get(key)) is not kind:
                raise UserError(f"{place}: '{key}' must be {kind.__name__}, not {row.get(key)!r}")
        groups.setdefault(row["index"], []).append(row)
    return settings, groups


def write_rows(file, rows):
    """Append to a binary file, in one piece: processes that write to it at the same time do not cut into each other."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write(lines.encode("utf-8", errors="backslashreplace"))  # \ud800
    file.flush()


def write_responses(path, settings, groups):
    """The file that read_responses reads: a line of settings, then a line a response. Whole or not at all."""
    with whole_file(path) as aside, open(aside, "wb") as f:
        write_rows(f, [{"settings": settings}, *(row for rows in groups.values() for row in rows)])


def grade_again(path, answer_format):
    """Grade a file of responses by the rules of today, without a model. The new verdicts go to a file beside it."""
    settings, groups = read_responses(path)
    if not groups:
        raise UserError(f"{path} holds no responses")
    answer_format = settings.get("answer_format", "any") if answer_format == "auto" else answer_format
    if answer_format not in ANSWER_FORMATS:
        raise UserError(f"{path}: its answer_format {answer_format!r} is unknown; give --answer_format=")
    changed, n = 0, max(map(len, groups.values()))
    complete = [rows for rows in groups.values() if len(rows) == n]
    if len(complete) < len(groups):
        print(f"left out of the table: {len(groups) - len(complete)} problems with fewer than {n} responses")
    for row in (row for rows in groups.values() for row in rows):
        before = row.get("strict"), row.get("lenient")
        row |= score(row["response"], row["truncated"], row["answer"], answer_format)
        changed += before != (row["strict"], row["lenient"])
    new = f"{path.removesuffix('.jsonl')}.regraded.jsonl"
    write_responses(new, settings | {"answer_format": answer_format}, groups)
    print(*table({os.path.basename(path): summarise(complete)}), sep="\n")
    print(f"strict reads '{answer_format}'; {changed} verdicts changed; the rows are in {new}")


def identity(net, name, cfg):
    """Settings without which a response would be another. Of the ranks of a Shard all call this."""
    from support.parallel import full_tensor, is_chief

    keys = ("model", "split", "prompt_template", "system_prompt", "answer_format", "n", "max_new_tokens", "temperature",
            "seed")
    digest = hashlib.sha256()  # of what the adapter says: the same for its file, its folder and its string
    if net.adapter:
        digest.update(json.dumps(net.adapter.meta, sort_keys=True).encode())
        numbers = [full_tensor(p) for p in net.adapter.parameters()]
        for p in numbers if is_chief() else ():
            digest.update(p.float().numpy().tobytes())
    return {"dataset": name, "adapter": digest.hexdigest()[:16], "dtype": str(net.dtype)} | {
        key: getattr(cfg, key) for key in keys}


def earlier_answers(path, settings, problems):
    """{index: rows} that an interrupted run with the same settings left in `path`: of the problems that are still the
    same, or not asked now, and have all their answers."""
    if not os.path.exists(path):
        return {}
    before, groups = read_responses(path)
    different = [f"{k} ({before.get(k)!r}, now {v!r})" for k, v in settings.items() if before.get(k) != v]
    if different:
        raise UserError(f"cannot resume: {path} was made with another {', '.join(different)}")

    def stands(index, rows):
        asked = {(row.get("question"), row["answer"]) for row in rows}
        same = index >= len(problems) or asked == {(problems[index]["question"], problems[index]["answer"])}
        return same and len(rows) == settings["n"] and all("strict" in row for row in rows)

    return {index: rows for index, rows in groups.items() if stands(index, rows)}


def announce(name, problems, cfg, tokenizer, done):
    kept = len(done.keys() & range(len(problems)))
    already = f", {kept or 'none'} of them answered already" if cfg.init_from == "resume" else ""
    system = "none, as there is no chat template" if tokenizer.template is None else repr(cfg.system_prompt)
    print(f"{name}: {len(problems)} problems{already}; strict reads '{cfg.answer_format}'; system message {system}; "
          f"user message {cfg.prompt_template!r}")


def ask(net, tokenizer, name, problems, cfg, left, path, ranks):
    """Put the problems whose indices are in `left`, this process its share, and write the answers to `path` as they
    come. Returns the summary of all that is in `path` then."""
    from support.parallel import all_gather, print0

    began = time.time()
    with open(path, "ab") as f:

        def keep(_, rows):
            write_rows(f, rows)

        mine = ranks.mine(left)
        if mine or net.is_sharded:
            evaluate(net, tokenizer, [problems[i] for i in mine], cfg, cfg.n, cfg.temperature, mine, keep)
    all_gather(None)  # wait for the others
    seconds, (_, groups) = time.time() - began, read_responses(path)
    summary = summarise([groups[i] for i in range(len(problems))])
    summary["tokens_per_second"] = sum(row["tokens"] for i in left for row in groups[i]) / seconds if left else None
    example = groups[0][0]
    print0(f"--- {name}, for example: {example['question']}\n-> {example['response']}\n"
        f"({'right' if example['strict'] else 'wrong'}; the answer is {example['answer']})")
    if summary["truncated"] > 0.05:
        print0(f"warning: {summary['truncated']:.0%} of the answers to {name} were cut off, and are wrong by strict; "
            f"raise max_new_tokens (now {cfg.max_new_tokens})")
    return summary


def main():
    cfg = configure(Settings)
    if cfg.answer_format not in ("auto", *ANSWER_FORMATS):
        raise UserError(f"answer_format must be auto, {', '.join(ANSWER_FORMATS)}")
    if cfg.init_from not in ("scratch", "resume"):
        raise UserError("init_from must be scratch or resume")
    if cfg.temperature == -1:
        cfg.temperature = 0.0 if cfg.n == 1 else 1.0
    if cfg.n < 1 or cfg.max_new_tokens < 1 or min(cfg.num_problems, cfg.seed, cfg.temperature) < 0:
        raise UserError("n and max_new_tokens must be at least 1; num_problems, seed and temperature at least 0")
    if cfg.n > 1 and cfg.temperature == 0:
        raise UserError(f"n={cfg.n} answers are all the same at temperature 0; set --temperature=1, say")
    if cfg.regrade:
        return grade_again(cfg.regrade, cfg.answer_format)
    from model import load_tokenizer
    from support.parallel import Ranks, all_gather, is_chief, print0
    from tinylora import load_adapted

    names = [name.strip() for name in cfg.dataset.split(",") if name.strip()]
    stems = [re.sub(r"[^\w.@-]+", "_", name).strip("._").removesuffix(".jsonl") for name in names]
    if not names or len(set(stems)) < len(stems):
        raise UserError(f"dataset must name data sets, each once; got '{cfg.dataset}'")
    paths = {name: os.path.join(cfg.out_dir, stem + ".jsonl") for name, stem in zip(names, stems)}
    settings = {name: choose_prompt(cfg, name) for name in names}
    problems = {name: load_problems(name, cfg.split)[: cfg.num_problems or None] for name in names}
    if os.path.exists(os.path.join(cfg.out_dir, "log.jsonl")):
        raise UserError(f"out_dir {cfg.out_dir} holds a training run; choose another")
    ranks = Ranks(cfg.device, cfg.shard)
    net = load_adapted(cfg.model, cfg.adapter, cfg.dtype, ranks.device, cfg.shard)
    net.compile_decode = cfg.compile
    tokenizer = load_tokenizer(cfg.model)
    for name in names:
        checked_prompts(net, tokenizer, problems[name], settings[name], name)
    identities = {name: identity(net, name, settings[name]) for name in names}
    if is_chief():
        done = {name: earlier_answers(paths[name], identities[name], problems[name])
                if cfg.init_from == "resume" else {} for name in names}
        lock = claim(cfg.out_dir, "settings.py", cfg.init_from == "scratch")  # noqa: F841
        save_settings(cfg, os.path.join(cfg.out_dir, "settings.py"))
        for name in names:
            write_responses(paths[name], identities[name], done[name])
            announce(name, problems[name], settings[name], tokenizer, done[name])
    all_gather(None)  # the files are there
    summaries = {}
    try:
        for name in names:
            left = sorted({*range(len(problems[name]))} - {*read_responses(paths[name])[1]})
            all_gather(None)  # before any of them writes
            summaries[name] = ask(net, tokenizer, name, problems[name], settings[name], left, paths[name], ranks)
    except KeyboardInterrupt:
        print0(f"\ninterrupted; the answers so far are in {cfg.out_dir}: go on with --init_from=resume")
        raise SystemExit(130) from None
    if is_chief():
        with whole_file(os.path.join(cfg.out_dir, "results.json")) as aside, open(aside, "w", encoding="utf-8") as f:
            json.dump(summaries, f, indent=1)
        print(*table(summaries), sep="\n")
    ranks.leave()


if __name__ == "__main__":
    main()
