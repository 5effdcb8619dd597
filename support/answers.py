"""The answer checker: which answer does a completion state, and does it equal the reference?

The rules follow the conventions that published numbers rest on: the last `\\boxed{}` of hendrycks/math, the `####` of
GSM8K, the "final answer is" of lm-eval's minerva_math. The comparison is stricter than most: numbers are exact, nothing
of an answer is ever executed, and what cannot be decided within fixed bounds of time and size counts as wrong. Only the
standard library is imported.
"""

import cmath
import math
import re
import unicodedata
import zlib
from collections import deque
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

# --- extraction: which part of a completion is the answer? ------------------------------------------------------------

MAX_ANSWER = 1000  # characters; a longer answer is compared as a string only
MAX_RESPONSE = 100_000  # characters read, from the end: bounds the time that a runaway completion can take
END_MARKER = re.compile(r"<(?:\|(?:im_end|endoftext|eot_id|end_of_text)\|>|\|im_start\|>user|/s>)")
PHRASE = (r"[Aa][Nn][Ss][Ww][Ee][Rr](?:[Ss]?[\s*]*+:|\s++[Ii][Ss]\b|[Ss]\s++[Aa][Rr][Ee]\b)[\s*]*+:?+[\s*]*+"
          r"(?:(?:therefore|thus|then|now|simply|exactly|equal to|actually|indeed|in fact|instead|just|still)\b"
          r"[\s*:]*+)?+(?:(?:\$\$|\\\[)\s*+)?+")
REMARK = r"(?:correct|consistent|reasonable|valid|unique|verified|confirmed|an integer|in [a-z ]{0,30}(?:form|terms))\b"
STATEMENTS = {"boxed": re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*"),
              "hash": re.compile(r"(?<!#)#{4,}(?!#)(?![ *]*[A-Z][a-z]{2})"),
              "phrase": re.compile(PHRASE + f"(?!{REMARK})"),
              # Read only where nothing else is stated: "this answer is correct", and a heading of markdown.
              "weak phrase": re.compile(PHRASE),
              "weak hash": re.compile(r"(?<!#)#{4,}(?=[ *]*[A-Z][a-z]{2})")}
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)")


def extract_answer(response: str, fmt: str = "any") -> str | None:
    r"""The final answer that a completion states, or None. Strict: nothing outside a statement is read.

    A statement is the last `\boxed{...}` or `\fbox{...}`, the rest of the line after the last `####`, or the rest of
    the sentence after the last "answer is" or "answer:". The one that ends latest wins, so "the answer is \boxed{5}" is
    the box. A last box that is open (cut off) or empty is no answer, and nothing earlier replaces it. "The answer is
    correct" (REMARK), and `####` before a capitalised word, a markdown heading ("#### Conclusion"), are read only if
    nothing else is stated. Text after the first end marker, and a think block, are ignored. `fmt` ('any',
    'boxed', 'hash', 'phrase') can admit one kind of statement only. Grade completions alone: a prompt may contain
    `\boxed{}`. The rules are those of hendrycks/math, GSM8K and lm-eval.
    """
    return _last_statement(_completion(response), fmt)[1]


def last_number(response: str) -> str | None:
    """The last number of the text: the lenient reading behind some GSM8K scores. Not for rewards."""
    numbers = NUMBER.findall(_completion(response)[-10 * MAX_ANSWER:])
    return numbers[-1].replace(",", "") if numbers else None


def extract_lenient(response: str) -> str | None:
    """The stated answer, else the last number."""
    return extract_answer(response) or last_number(response)


def _completion(response: str) -> str:
    """The part of a completion that can hold the answer."""
    thinking, _, rest = END_MARKER.split(response, maxsplit=1)[0].rpartition("</think>")
    return (rest if rest.strip() else thinking)[-MAX_RESPONSE:]


def _last_statement(text: str, fmt: str = "any") -> tuple[bool, str | None]:
    """(is anything stated, the answer or None)."""
    found = []  # (where the statement ends, its answer)
    for kind, pattern in STATEMENTS.items():
        if fmt not in ("any", kind.removeprefix("weak ")) or kind.startswith("weak") and found:
            continue
        for last in deque(pattern.finditer(text), maxlen=1):
            line = text[last.end():][:2 * MAX_ANSWER].partition("\n")[0]
            if kind == "boxed":
                found.append(_box(text, last.end()))
            else:
                found.append((last.end(), _sentence(line) if kind.endswith("phrase") else line))
    if not found:
        return False, None
    answer = max(found)[1]
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
        answer = answer.strip(" \t\r\n*$`")
        answer = answer if answer.endswith("...") else answer.rstrip(" \t\r\n*$`.")
        answer = answer.removeprefix(opening).removesuffix(closing)
    return True, answer.strip() or None


def _box(text: str, start: int) -> tuple[int, str]:
    r"""(end, content) of the box whose brace is at `start`; an open box has no content and ends with the text."""
    if not text.startswith("{", start):  # \boxed 7 is TeX for \boxed{7}
        token = re.compile(r"[\w.,-]{0,50}").match(text, start)
        return token.end(), token[0]
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.S).finditer(text, start, start + 10 * MAX_ANSWER):  # \{ is no brace
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0 and brace[0] == "}":
            return brace.end(), text[start + 1:brace.start()]
    return len(text), ""


def _sentence(line: str) -> str:
    """Up to the first dot before white space (so not in 3.5) and outside braces and $ $."""
    for dot in re.finditer(r"\.(?=\s|$)", line):
        before = line[:dot.start()]
        in_math = before.count("$") % 2 != before.count(r"\$") % 2
        in_math &= "$" in line[dot.end():] and not re.match(r"\s+[A-Z][a-z]", line[dot.end():])  # $18. She has $5 left
        if before.count("{") == before.count("}") and not in_math:
            return before
    return line


# --- comparison: does an answer equal the reference? ------------------------------------------------------------------

def is_correct(response: str, reference: str) -> bool:
    r"""Does the answer in `response` equal `reference`? A bool for any two strings, never an exception.

    `response` is a completion, read with extract_answer, or, if it states nothing, a bare answer that is compared as a
    whole: a number somewhere in a long text is never picked out.

    Integers and decimals are exact at any size; a/b, mixed numbers, 4.5e33 and 4.5 \times 10^{33} go by value. A unit,
    percent or degree sign on one side only is ignored; different units differ; nothing is scaled by 100. `x = 5` is 5.
    Bare lists and sets are multisets ("5 or 7" is two answers), tuples are ordered, intervals need their brackets;
    `x \ge 2` is [2, \infty). Matrices go entry by entry, equations up to a factor. Expressions are equal if they agree
    at two fixed points: rational ones exactly, others to 12 digits. Text goes without case, the rest as strings.
    """
    text = _completion(response)
    stated, answer = _last_statement(text)
    return same_answer(answer or "" if stated else text, reference)


def same_answer(answer: str, reference: str) -> bool:
    """is_correct for an answer that has been extracted already."""
    answer = answer.strip()
    if not answer or max(len(answer), len(reference)) > MAX_ANSWER:
        return bool(answer) and answer == reference.strip()
    return _equal(normalise(answer), normalise(reference))


FUNCTIONS = {name: getattr(cmath, name.replace("arc", "a")) for name in
             ("sin", "cos", "tan", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "exp")}
FUNCTIONS |= {"ln": cmath.log, "log": cmath.log10, "lg": cmath.log10, "sec": lambda x: 1 / cmath.cos(x),
              "csc": lambda x: 1 / cmath.sin(x), "cot": lambda x: 1 / cmath.tan(x)}
# What LaTeX and unicode spell in several ways: after normalise() one symbol stands for one meaning.
COMMANDS = {name: symbol for symbol, names in {
    "": "! left right big Big bigg Bigg bigl bigr Bigl Bigr middle displaystyle textstyle limits hline phantom rm bf "
        "it boldsymbol bm large Large ( ) [ ]", " ": ", ; : quad qquad", "∧": "land wedge", "∨": "lor vee",
    r"\frac": "dfrac tfrac cfrac nicefrac sfrac", r"\binom": "dbinom tbinom",
    r"\phi": "varphi", r"\epsilon": "varepsilon", r"\setminus": "backslash",
    "*": "times cdot ast", "/": "div", "≤": "le leq leqslant",
    "≥": "ge geq geqslant", "<": "lt", ">": "gt", "≠": "ne neq", "∈": "in", "∪": "cup bigcup", "∞": "infty", "±": "pm",
    "∓": "mp", "≈": "approx", "π": "pi", "°": "circ degree", "'": "prime", "|": "mid vert lvert rvert", "=": "equiv",
    "(": "langle", ")": "rangle rfloor rceil", "⦃": "lbrace {", "⦄": "rbrace }", "%": "%", "floor(": "lfloor",
    "ceil(": "lceil", "⦃⦄": "emptyset varnothing"}.items() for name in names.split()} | {" ": " "}
UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "÷": "/", "⁄": "/", "⩽": "≤", "⩾": "≥",
    "′": "'", "’": "'", "，": ",", "：": ":", "（": "(", "）": ")", "º": "°", "~": " ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∅": r"\emptyset ",
    "…": r"\ldots ", **dict(zip("αβγδεθλμνρστφχψωΔΩ", (rf"\{name} " for name in (
        "alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi chi psi omega Delta Omega").split()))),
    **dict.fromkeys('"⦃⦄\u00ad\u200b\u200e\u200f\ufeff')})
TEXT_MACRO = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|[mh]box|math(?:rm|bf|it|sf|bb|cal)|operatorname)\*?"
                        r" ?\{((?:[^{}]|\^\{-?[0-9]\})*)\}")
ACCENT = re.compile(r"\\(d?dot|bar|hat|tilde|vec|overline|overrightarrow) ?(?:\{ ?([A-Za-z]+) ?\}|([a-z])(?![a-z]))")
RECURRING = re.compile(r"(?<![0-9])([0-9]*)\.([0-9]*)\\(?:overline|bar|dot) ?\{ ?([0-9]+) ?\}")


def normalise(text: str) -> str:
    r"""One spelling for what LaTeX, unicode and prose spell in several ways. Braces stay: 2^{n+1} is not 2^n+1.

    \text{cm} becomes "cm" in quotes, the braces of a set ⦃ ⦄, `and` a comma, `or` a semicolon.
    """
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: "^{" + unicodedata.normalize("NFKC", m[0]) + "}", text)
    text = re.sub("[₀-₉]+", lambda m: "_{" + unicodedata.normalize("NFKC", m[0]) + "}", text)
    text = re.sub("[¼½¾⅐-⅞]", lambda m: r"\frac{" + unicodedata.normalize("NFKC", m[0]).replace("⁄", "}{") + "}", text)
    text = re.sub(r"\s+", " ", text.translate(UNICODE))
    text = re.sub(r"\\mathbb ?(?:\{ ?R ?\}|R\b)|\\R\b|ℝ", r"(-\\infty,\\infty)", text)
    text = text.replace(r"\left.", "").replace(r"\right.", "").replace("...", r"\ldots ").replace("{:}", ":")
    text = re.sub(r"(?<=[0-9])(?: ?\{ ?, ?\}|, ?\\!) ?(?=[0-9]{3})", "", text)                     # 10{,}000
    text = re.sub(r"√ ?([0-9]+)", r"\\sqrt{\1}", text).replace("√", r"\sqrt ").replace("∛", r"\sqrt[3]")
    text = RECURRING.sub(_recurring, ACCENT.sub(r"\\\1\2\3 ", text))                               # 0.1\overline{6}
    for _ in range(2):                                                                             # macros in macros
        text = TEXT_MACRO.sub(_quote, text)
    text = re.sub(r"\\([A-Za-z]+|.)", lambda m: COMMANDS.get(m[1], m[0]), text)
    text = re.sub(r"(?<!\\)\$", "", text.replace("$,$", ", "))
    text = re.sub(r"(?<![\w)}])\*\*|\*\*(?![\w({\\+-])", "", text).replace("**", "^")              # **18** but 2**3
    text = re.sub(r"(?<!^[0-9])(?<!^[0-9]{2})!=", "≠", text.replace("<=", "≤").replace(">=", "≥"))   # but 3!=6
    text = re.sub(r"(?<![A-Za-z])(?:np|math)\.", "", text)                                         # program notation
    text = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", "π", text)
    text = re.sub(r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}", text)
    text = re.sub(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(?<=°) ?([CF])$", r'"\1"', re.sub(r"\(([0-9]+)\)_", r"\1_", text))               # 5°C, (101)_2
    if not set(RELATIONS).isdisjoint(text):
        text = text.replace("∧", ",").replace("∨", ";")
    text = re.sub(r"(?<=[\])⦄]) ?U ?(?=[\[(⦃])", "∪", text)
    text = re.sub(r"(?<=[0-9]) ?x ?(?=10\^)", "*", text)                                           # 4.5 x 10^33
    text = re.sub(r"(?<![A-Za-z])and(?![A-Za-z])", ",", text)
    text = re.sub(r"(?<![A-Za-z])or(?![A-Za-z])", ";", text)
    text = re.sub(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])", _ungroup, text)         # 1,234,567
    text = re.sub(r" +", " ", text).rstrip(" .,;:\\").lstrip(" ,;:")
    text = re.sub(r"^(?:\\\$ ?)?[-+]?[0-9]{1,3}(?: [0-9]{3})+(?! ?[0-9/\\(])",
                  lambda m: m[0].replace(" ", ""), text)                                           # 1 000
    text = re.sub(r"(?<![\w.}^])([0-9]+) ?\\frac ?(?:([0-9])([0-9])|\{ ?([0-9]+) ?\} ?\{ ?([0-9]+) ?\})",
                  r"(\1+\2\4/\3\5)", text)                                                         # 1\frac12
    text = re.sub(r"(?<![\w.}^])([0-9]+) ([0-9]+/[0-9]+)", r"(\1+\2)", text)                       # 1 1/2
    text = re.sub(r' ?([^\w\s"\\)}\]⦄°%]|_) ?| ([)}\]⦄°%])', r"\1\2", text)  # a space before a plain unit stays: √3 cm
    text = re.sub(r"\^\{(°|'+)\}|\^(°|')", r"\1\2", text)
    return re.sub(r"\^(\w|\{[^{}]*\})_(\w|\{[^{}]*\})", r"_\2^\1", text)                           # v^2_0


def _quote(macro: re.Match) -> str:
    """The content of a text macro: words in quotes, and what is not a word, as the number in 4:30 pm, without."""
    content = macro[1].replace('"', "").strip(" \\~")
    if content.strip(" ,") in ("and", "or") or not re.search("[A-Za-z]", content):
        return f" {content} "
    is_time = content == "sec" and not macro.string[macro.end():].strip(" .$")  # 5\text{ sec}
    if content in FUNCTIONS and not is_time:
        return f"\\{content} "
    if macro[0] in (r"\mathrm{e}", r"\mathrm{i}"):
        return f" {content} "
    number, words = re.fullmatch("([0-9][0-9.,:]*(?![A-Za-z0-9]))?(.*)", content).groups()
    return f'{number or ""}"{words}"'


def _recurring(decimal: re.Match) -> str:
    """0.1666... as a fraction."""
    integer, first, period = decimal.groups()
    scale = 10 ** len(first)
    return f"({int((integer or '0') + first)}/{scale}+{period}/{scale * (10 ** len(period) - 1)})"


def _ungroup(number: re.Match) -> str:
    """1,234 without its comma, but not inside brackets, where (20,100) is a pair."""
    before = number.string[:number.start()]
    inside = sum(map(before.count, "([⦃")) > sum(map(before.count, ")]⦄"))
    return number[0] if inside else number[0].replace(",", "")


# --- structure: lists, relations, unions, tuples, matrices ------------------------------------------------------------

RELATIONS = "=<>≤≥≠∈"
TURNED = str.maketrans(">≥", "<≤")
CHOICE = re.compile(r'"?(?:(?:[Oo]ption|[Cc]hoice)(?: |(?=\()))?["(]*([A-Za-z])[")]*')
LABELLED_CHOICE = re.compile(r'"?(?:(?:[Oo]ption|[Cc]hoice) )?["(]*([A-J])(?:"?[.:]|"?\) |\)"(?=[0-9\\ ]))'
                             r'(?!.*\([A-J]\))')


def _equal(a: str, b: str, depth: int = 0) -> bool:
    """Are two normalised answers the same? Takes them apart one layer at a time, the outermost first."""
    if a == b:
        return True
    if depth > 5:
        return False
    depth += 1
    list_a, list_b = (_members(_conditions_to_union(_bare_set(x))) for x in (a, b))
    if len(list_a) != 1 or len(list_b) != 1:
        return _same_multiset(list_a, list_b, depth)
    (a,), (b,) = list_a, list_b
    choice_a, choice_b = (CHOICE.fullmatch(x) or LABELLED_CHOICE.match(x) for x in (a, b))
    if choice_a and choice_b and (CHOICE.fullmatch(a) or CHOICE.fullmatch(b)):
        return choice_a[1] == choice_b[1] or "(" in a + b and choice_a[1].upper() == choice_b[1].upper()
    (sides_a, signs_a), (sides_b, signs_b) = _relation(a), _relation(b)
    if signs_a or signs_b:
        return _same_relation(sides_a, signs_a, sides_b, signs_b, depth)
    if "∪" in a + b:
        return _same_multiset(_split(a, "∪"), _split(b, "∪"), depth)
    if r"\begin" in a + b:
        return _same_sequence(_matrix(a), _matrix(b), depth)
    items_a, items_b = (_split(x[1:-1], ",;") if _wrapped(x, "([", ")]") else [x] for x in (a, b))
    if len(items_a) > 1 or len(items_b) > 1:
        return a[0] + a[-1] == b[0] + b[-1] and _same_sequence(items_a, items_b, depth)
    if ":" in a and ":" in b:
        return _same_sequence(_split(a, ":"), _split(b, ":"), depth)
    return _same_atom(a, b)


def _same_sequence(xs: list[str], ys: list[str], depth: int) -> bool:
    return len(xs) == len(ys) > 0 and all(_equal(x, y, depth) for x, y in zip(xs, ys))


def _same_multiset(xs: list[str], ys: list[str], depth: int) -> bool:
    if len(xs) != len(ys) or len(xs) > 32:
        return sorted(xs) == sorted(ys)
    left = list(ys)
    for x in xs:
        match = next((y for y in left if _equal(x, y, depth)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _depths(text: str) -> list[int]:
    """How many brackets are open at each character. Kinds of brackets may mix: (0,1] is an interval."""
    return list(accumulate((c in "([{⦃") - (c in ")]}⦄") for c in text))


def _split(text: str, separators: str) -> list[str]:
    """Split at the separators that stand outside all brackets."""
    cuts = [i for i, depth in enumerate(_depths(text)) if depth == 0 and text[i] in separators]
    return [text[i + 1:j] for i, j in zip([-1, *cuts], [*cuts, len(text)])]


def _wrapped(text: str, opening: str, closing: str) -> bool:
    """Does one pair of brackets hold the whole text?"""
    return len(text) > 1 and text[0] in opening and text[-1] in closing and min(_depths(text)[:-1]) > 0


def _bare_set(text: str) -> str:
    r"""The set alone of A∪B=⦃1,2⦄ and x∈⦃1,2⦄, and of ⦃x|-2<x<1⦄ the condition."""
    name, *rest = re.split("[∈=]", text, maxsplit=1)
    if rest and _wrapped(rest[0], "⦃{", "⦄}") and _is_name(re.sub(r"∪|\\cap", "", name)):
        text = rest[0]
    return re.sub(r"^⦃[A-Za-z](?:∈\(-∞,∞\))? ?[|:](.*)⦄$", r"\1", text) if _wrapped(text, "⦃", "⦄") else text


def _members(text: str) -> list[str]:
    r"""The answers that a bare list, a set or a \pm holds; one for anything else."""
    text = text[1:-1] if _wrapped(text, "⦃{", "⦄}") else text
    members = []
    for item in filter(None, _split(text, ",;")):
        exact, _, rounded = item.partition("≈")
        item = exact if exact and not _is_name(exact) else rounded or item
        if item.count("±") == 1:
            members += [item.replace("±", "+").replace("∓", "-"), item.replace("±", "-").replace("∓", "+")]
        else:
            members.append(item)
    return members


def _relation(text: str) -> tuple[list[str], str]:
    """Sides and the signs between them, with > and ≥ turned round."""
    sides = _split(text, RELATIONS)
    ends = accumulate(len(side) + 1 for side in sides[:-1])
    signs = "".join(text[end - 1] for end in ends)
    return (sides[::-1], signs[::-1].translate(TURNED)) if signs and set(signs) <= set(">≥") else (sides, signs)


def _is_name(text: str, of_sum: bool = False) -> bool:
    r"""Can this stand before "=" as what was asked for? x, f(3), (x,y), \angle ABC; not 2x + z; m + n if `of_sum`."""
    if len(text) > 30 or not re.search('[A-Za-z"]', text) or text.strip(' "') in NOT_UNITS:
        return False
    arguments = r"([fghpqE-HPQ]'*(?:\^\{-1\})?|\\(?:sin|cos|tan|log|ln))\((?![a-z][-+])[^()]*\)|(?<=_)\{[^{}]*\}"
    text = re.sub(arguments, r"\1", text)  # P(X>2) is a name, and a_{n+1}, but f(x+1) another function
    if "+" in text and not (of_sum and text.replace("+", "").isalpha()):
        return False
    text = re.sub(r"\|([A-Z]+)\|", r"\1", text)
    text = re.sub(r"\^\{?-1\}?(?=\(|$)", "", text) if text[0] in '"fghABCM' else text  # f^{-1}(x), A^{-1}
    return not re.search(r"^[0-9.]|\\frac|\\sqrt|\\\$|[-*/^|!%=<>≤≥∪π]|(?<![\\A-Za-z])[A-Za-z]{2,} ", text)


def _meaning(sides: list[str], signs: str, of_sum: bool = False) -> tuple[str, list[str]]:
    """(name, values): ('x', ['5']) for x = 5, ('x', ['[2,∞)']) for x ≥ 2, an unnamed chain's sides for the rest."""
    opening, closing = "[" if signs[0] == "≤" else "(", "]" if signs[-1] == "≤" else ")"
    if set(signs) <= set("<≤") and len(signs) == 2 and _is_name(sides[1]):
        return sides[1], [f"{opening}{sides[0]},{sides[2]}{closing}"]
    if signs in ("<", "≤") and any(map(_is_name, sides)):
        return (sides[0], [f"(-∞,{sides[1]}{closing}"]) if _is_name(sides[0]) else (
            sides[1], [f"{opening}{sides[0]},∞)"])
    if signs == "∈" and _is_name(sides[0]):
        return sides[0], [sides[1]]
    if set(signs) == {"="} and not all(map(_words, sides)):  # LRAC = SRMC is no value of LRAC
        if _is_name(sides[0], of_sum):
            return sides[0], sides[1:]
        return (sides[-1], sides[:-1]) if _is_name(sides[-1]) else ("", sides)
    return "", []


def _conditions_to_union(text: str) -> str:
    r"""Conditions on one name as a set: x < 1 or x > 3; x ≥ 1 and x < 3; x ≠ 2, 5; the reals without ⦃2,5⦄."""
    if holes := re.fullmatch(r"([A-Za-z])≠(.+)|\(-∞,∞\) ?(?:\\setminus|-)⦃(.+)⦄", text):
        points = _split((holes[2] or holes[3]).replace(f"{holes[1]}≠", ""), ",")
        if all(map(_value, points)):
            ends = ["-∞", *sorted(points, key=lambda point: _value(point)[0].real), "∞"]
            return "∪".join(f"({left},{right})" for left, right in zip(ends, ends[1:]))
    separator = ";" if ";" in text else ","
    parts = [_relation(part) for part in _split(text, separator)]
    if len(parts) < 2 or not all(signs for _, signs in parts) or all(signs == "=" for _, signs in parts):
        return text
    names, values = zip(*(_meaning(*part) for part in parts))
    if len(set(names)) > 1 or not all(len(value) == 1 for value in values):
        return text
    sets = [f"⦃{value}⦄" if signs == "=" else value for (value,), (_, signs) in zip(values, parts)]
    if separator == ";":
        return "∪".join(sets)
    low, high = sorted(sets, key=lambda ray: ray.startswith("(-∞"))[:2]  # [1,∞) and (-∞,3) are [1,3)
    return low[:-2] + high[4:] if len(sets) == 2 and low.endswith(",∞)") and high.startswith("(-∞,") else text


def _same_relation(sides_a: list[str], signs_a: str, sides_b: list[str], signs_b: str, depth: int) -> bool:
    """Equations, inequalities and memberships, of one another or of a bare value or set."""
    if not signs_a or not signs_b:
        _, values = _meaning(sides_a, signs_a, of_sum=True) if signs_a else _meaning(sides_b, signs_b)
        return bool(values) and all(_equal(value, sides_b[0] if signs_a else sides_a[0], depth) for value in values)
    (name_a, values_a), (name_b, values_b) = _meaning(sides_a, signs_a), _meaning(sides_b, signs_b)
    same_name = name_a == name_b or re.fullmatch(r"y[a-z]\([a-z]\)|[a-z]\([a-z]\)y", name_a + name_b)  # y is f(x)
    if same_name and values_a and values_b and all(_equal(x, y, depth) for x in values_a for y in values_b):
        return True
    if signs_a == signs_b == "=" and all(map(_words, sides_a + sides_b)):
        return _same_multiset(sides_a, sides_b, depth)
    if signs_a != signs_b:
        return False
    same = _same_sequence(sides_a, sides_b, depth)
    if same or len(signs_a) > 1:
        return same
    difference = _value("({})-({})".format(*sides_a))
    ratio = _value("(({})-({}))/(({})-({}))".format(*sides_a, *sides_b))  # constant for 2x = 4 and x - 2 = 0
    return bool(difference and ratio) and not _same_number(*difference) and _same_number(*ratio) and (
        signs_a == "=" or signs_a in "<≤" and ratio[0].real > 0)


def _matrix(text: str) -> list[str]:
    r"""The rows of a matrix (no determinant) as tuples; a factor before it goes into the entries."""
    factor, _, rest = text.partition(r"\begin{")
    kind, _, rest = rest.partition("}")
    body, _, end = rest.rpartition(r"\end{" + kind)
    if not re.fullmatch("[pbB]?matrix|array", kind) or r"\begin" in body or not re.fullmatch(r"\}[])]?", end):
        return []
    if kind == "array":
        body = re.sub(r"^\{[^{}]*\}", "", body)
    factor = factor.rstrip("[(*")
    scale = f"({factor}1)*" if factor == "-" else f"({factor})*" if factor else ""
    rows = [row.strip() for row in re.split(r"\\\\(?:\[[0-9.]+[a-z]{2}\])?", body)]
    return ["(" + ",".join(f"{scale}({cell})" for cell in row.split("&")) + ")" for row in rows if row]


# --- atoms: words, or expressions with or without a unit --------------------------------------------------------------

UNITS = {name: names.split()[0] for names in (
    "° degree deg", "% percent percentage pct", "$ dollar usd", "€ euro", "£", "cent", "m meter metre", "mm millimeter",
    "cm centimeter centimetre", "km kilometer kilometre", "/ per", "in inch inche", "ft foot feet", "mi mile",
    "yd yard", "s second sec", "min minute", "h hour hr", "am", "pm", "g gram gm", "kg kilogram", "mg milligram",
    "lb pound", "oz ounce", "l liter litre", "ml milliliter millilitre", "day", "week", "month", "year",
    "2 square sq", "3 cubic cu") for name in names.split()}
NOT_UNITS = FUNCTIONS.keys() | set(
    "is are was be not no if but so because since then the this it either neither sqrt pi mod squared cubed factorial "
    "half times more less dozen hundred thousand million billion trillion lakh crore".split())


def _same_atom(a: str, b: str) -> bool:
    words_a, words_b = _words(a), _words(b)
    if words_a == words_b != "" or max(len(words_a), len(words_b)) > 3 or words_a and words_b and (a + b).isupper():
        return words_a == words_b
    (a, unit_a), (b, unit_b) = _split_unit(a), _split_unit(b)
    if unit_a and unit_b and unit_a != unit_b:
        return False
    value_a, value_b = _value(a), _value(b)
    return all(map(_same_number, value_a, value_b)) if value_a and value_b else _plain(a) == _plain(b)


def _words(text: str) -> str:
    """The letters of a text answer, without case; empty for anything but words."""
    letters = re.sub(r'[ ".,\']', "", text).strip("()")
    return letters.casefold() if letters.isalpha() and len(letters) > 1 else ""


def _plain(text: str) -> str:
    """What is left to compare as a string: no spaces, no quotes, no braces around one character."""
    return re.sub(r'(?<![0-9]) | (?![0-9])|"', "", re.sub(r"\{(\w)\}", r"\1", text))


def _split_unit(text: str) -> tuple[str, str]:
    r"""(value, unit) of 5"cm"^2, 5 square cm, \$5, 5°, 5%. In plain text a unit is known, or words after a space."""
    if money := re.match(r"(-?)(\\\$|€|£)", text):
        value, unit = _split_unit(text[money.end():])  # \$18 per day
        value, unit = (text[money.end():], "") if unit == "k" else (value, unit)
        return money[1] + value, " ".join(sorted({money[2][-1], *unit.split()}))
    power = re.search(r"\^\{?[23]\}?$", text)
    quote = text.find('"')
    head = text[:quote] if quote > 0 else re.sub(r"[A-Za-z/. €£]{0,40}$", "", text[:power.start()] if power else text)
    tail = re.sub(r"\.(?=[A-Za-z]{2})", " ", text[len(head):]).replace(".", "").replace("mph", "mi/h")
    words = [w.removesuffix("s") if len(w) > 2 else w for w in re.findall("[a-z€£]+|/", tail.lower())]
    if quote > 0:
        is_unit = re.fullmatch(r'(?:"[^"]*"(?:\^\{?-?[0-9]\}?)?[ /*]?)+', tail)
    elif words and UNITS.keys() >= set(words):  # one letter may be a variable: only m^2 and m^3 are taken for units
        is_unit = len(words[0]) > 1 or words[0] in "€£" or power and words == ["m"] or tail[0] == " " and "/" in tail
    else:
        is_unit = tail.startswith(" ") and max(map(len, words), default=0) > 2
    known = UNITS.keys() >= set(words)  # sec is a time by itself
    if not is_unit or not 0 < len(words) <= 4 or NOT_UNITS & set(words) and not known or not head.rstrip(" *"):
        return text, text[-1] if text.endswith(("°", "%")) else ""
    return head.rstrip(" *"), " ".join(sorted(UNITS.get(w, w) for w in words + re.findall("-?[0-9]", tail)))


# --- expressions: read and computed at once, exactly as long as possible ----------------------------------------------

MAX_BITS = 16_384  # of one exact number: 2^{5000} and 10^{3000} are in reach
MAX_WORK = 300_000  # bits of all the numbers of one expression
MAX_NESTING = 30
CONSTANTS = {"e": complex(math.e), "i": 1j, "π": complex(math.pi)}
KNOWN = "|".join(sorted([*FUNCTIONS, "sqrt", "floor", "ceil"], reverse=True))
TOKEN = re.compile(r"(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)(?P<base>_(?:\{[^{}]*\}|[0-9]+))?"
                   rf'|(?P<word>\\[A-Za-z]+|{KNOWN}|"[^"]*"|(?![ei])[A-Za-z]\([0-9]+\)|[^\W0-9_]|∞)'
                   r"(?P<index>(?:'|_(?:\{[^{}]*\}|\w))*)|[^ ]")
PROSE = re.compile(rf"(?<![\\A-Za-z])(?!(?:{KNOWN}|pi)\b)(?:(?:[A-Za-z]{{3,}}|no) |not|(?<= )[A-Za-z]{{3,}})")
LEVEL = {"+": 1, "-": 1, "*": 2, "/": 2, "^": 4, "!": 5, "°": 5, "%": 5}  # a factor without a sign is at 2 too
CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|"}
OPAQUE = {r"\prod", r"\int", r"\lim", r"\cdots", r"\ldots", r"\dots", r"\cap", r"\setminus", r"\pmod"}
Number = Fraction | complex


def _same_number(x: Number, y: Number) -> bool:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    try:
        return abs(complex(x) - complex(y)) <= 1e-12 * abs(complex(x))
    except OverflowError:
        return False


@lru_cache(maxsize=1024)
def _value(text: str) -> tuple[Number, ...]:
    """The expression at two fixed points, () if it is none or too large. What agrees at both is taken as equal."""
    if PROSE.search(text):
        return ()
    try:
        first = _Expression(text, "1")
        value = first.whole()
        return value, _Expression(text, "2").whole() if first.names else value
    except (ValueError, ArithmeticError):
        return ()


def _power(base: Number, exponent: Number) -> Number:
    """base ** exponent, exact if it is rational, and with the real root of a negative number where there is one."""
    if not isinstance(base, Fraction) or not isinstance(exponent, Fraction):
        return complex(base) ** complex(exponent)
    p, n = exponent.as_integer_ratio()
    if abs(p) * (base.numerator.bit_length() + base.denominator.bit_length()) > MAX_BITS or n > 1000:
        if n == 1 or base < 0:
            raise ValueError("too large")
        return complex(base) ** float(exponent)  # names are fractions: a^{mn}
    if n == 1:
        return base ** p
    if base < 0:
        return (Fraction((-1) ** p) if n % 2 else complex(-1) ** float(exponent)) * _power(-base, exponent)
    root = Fraction(*(math.isqrt(k) if n == 2 else round(float(k) ** (1 / n)) for k in base.as_integer_ratio()))
    if root.numerator.bit_length() * n <= MAX_BITS and root ** n == base:
        return root ** p
    return complex(base) ** float(exponent)


class _Expression:
    """A precedence-climbing reader whose methods return values. Names stand for fixed rational numbers."""

    def __init__(self, text: str, point: str):
        self.tokens, self.at, self.point = list(TOKEN.finditer(text)), 0, point
        self.nesting, self.work, self.bars, self.names, self.degree = 0, 0, 0, 0, Fraction(1)

    def whole(self) -> Number:
        value = self.read()
        if self.next():
            raise ValueError("not an expression")
        return value

    def next(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def take(self, expected: str = "") -> re.Match:
        if not self.next() or expected and self.next() != expected:
            raise ValueError("not an expression")
        self.at += 1
        return self.tokens[self.at - 1]

    def bounded(self, value: Number) -> Number:
        if isinstance(value, Fraction):
            bits = value.numerator.bit_length() + value.denominator.bit_length()
            self.work += bits
            if bits > MAX_BITS or self.work > MAX_WORK:
                raise ValueError("too large")
        elif not 1e-200 < abs(value) < 1e200:  # near underflow all numbers look alike
            raise ValueError("out of range")
        return value

    def read(self, level: int = 0) -> Number:
        """A value, with all the signs after it that bind more tightly than `level`."""
        value = self.primary()
        while LEVEL.get(sign := self.next(), 2 * self.starts_factor()) > level:
            if sign in LEVEL:
                self.take()
            if LEVEL.get(sign) == 5:
                value = self.marked(value, sign)
            elif sign == "^":
                value = _power(value, self.read(3))
            elif sign in ("+", "-"):
                term = self.read(1) if sign == "+" else -self.read(1)
                value, before = value + term, value
                if isinstance(value, complex) and before and term and not 1e-9 < abs(before) / abs(term) < 1e9:
                    raise ValueError("a term is lost in rounding")
            else:
                value = value / self.read(2) if sign == "/" else value * self.read(2)
            value = self.bounded(value)
        return value

    def starts_factor(self) -> bool:
        """Does a factor without a sign follow? A number has to be a power for that: 2^6 3^5, but not 1 2 or x2."""
        if not self.next() or not self.at:
            return False
        token, after = self.tokens[self.at], self.tokens[self.at + 1:self.at + 2]
        return bool(token["word"] or token["number"] and after and after[0][0] == "^" or token[0] in "([{"
                    or token[0] == "|" and not self.bars)

    def marked(self, value: Number, mark: str) -> Number:
        if mark == "!" and isinstance(value, Fraction) and value.denominator == 1 and 0 <= value <= 170:
            return Fraction(math.factorial(int(value)))
        if mark == "!" and isinstance(value, Fraction) and value.denominator > 1 and abs(value) < 100:
            return complex(math.gamma(value + 1))  # so that n! = n (n - 1)!
        return self.name(f"{value}!") if mark == "!" else value * self.degree if mark == "°" else value

    def primary(self) -> Number:
        """A number, a name, a function with its arguments, a group in brackets, or one of these with a sign."""
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            raise ValueError("too deep")
        token, names = self.take(), self.names
        word = (token["word"] or "").strip("\\")
        if token[0] in ("+", "-"):
            value = self.read(3) if token[0] == "+" else -self.read(3)
        elif token["number"]:
            value = self.number(token)
        elif token[0] in CLOSING:
            self.bars += token[0] == "|"
            value = self.read()
            self.take(CLOSING[token[0]])
            if token[0] == "|":
                self.bars -= 1
                value = self.absolute(value, self.names > names)
        elif word == "frac":
            value = self.argument() / self.argument()
        elif word == "sqrt":
            degree = self.primary() if self.next() == "[" else Fraction(2)
            value = _power(self.argument(), 1 / degree)
        elif word in FUNCTIONS:
            value = self.function(word, token["index"])
        elif word in ("floor", "ceil"):  # names for their arguments: no rules of theirs are known here
            value = self.name(f"{word} {self.argument()}")
        elif word == "binom":
            n, k = self.argument(), self.argument()
            value = self.marked(n, "!") / (self.marked(k, "!") * self.marked(n - k, "!"))
        elif word and token["word"] not in OPAQUE and not NOT_UNITS & set(re.findall("[a-z]+", token[0].lower())):
            value = CONSTANTS.get(token[0]) or self.name(re.sub('["{}]', "", token[0]))
        else:
            raise ValueError("not an expression")
        self.nesting -= 1
        return self.bounded(value)

    def absolute(self, value: Number, has_names: bool) -> Number:
        """With names in it |x| is a name for its square: the points are positive, and would make |x| equal to x."""
        if has_names:
            return self.name(f"|{value * value}|")
        return abs(value) if isinstance(value, Fraction) else complex(abs(value))

    def argument(self) -> Number:
        r"""What follows \frac or \sqrt: a group or one token, of a number one digit: \frac12 is 1/2."""
        if self.next() in ("", "+", "-"):
            raise ValueError("not an expression")
        token = self.tokens[self.at]
        if len(token[0]) > 1 and token[0].isdigit():
            self.tokens[self.at:self.at + 1] = map(TOKEN.match, (token[0][0], token[0][1:]))
        return self.primary()

    def number(self, token: re.Match) -> Number:
        mantissa, _, exponent = token["number"].lower().partition("e")
        integer, _, decimals = mantissa.partition(".")
        if len(exponent) > 5 or abs(int(exponent or 0)) > 2000:
            raise ValueError("too large")
        if (token["base"] or "").strip("_{}") not in ("", "10"):  # 204_5 is a name: bases are not converted
            return self.name(re.sub("^0+|[{}]", "", token[0]))
        return Fraction(int(integer + decimals), 10 ** len(decimals)) * Fraction(10) ** int(exponent or 0)

    def name(self, name: str) -> Fraction:
        """A fixed value for a name, another one at the other point."""
        self.names += 1
        return Fraction(100 + zlib.crc32((name + self.point).encode("utf-8", "replace")) % 899, 331)

    def function(self, word: str, index: str) -> Number:
        r"""\sin^2 x, \log_2 8, \cos 2t: an argument without brackets reaches to the next sign or function."""
        power = self.take() and self.primary() if self.next() == "^" else Fraction(1)
        outer, self.degree = self.degree, Fraction(math.pi / 180)
        bracket = self.next() in CLOSING
        value = self.primary() if bracket else self.read(3)
        while not bracket and self.starts_factor() and self.next().strip("\\") not in FUNCTIONS:
            value = self.bounded(value * self.read(3))
        self.degree = outer
        if power == -1 and "arc" + word in FUNCTIONS:  # \sin^{-1} is the inverse function
            return FUNCTIONS["arc" + word](complex(value))
        value = FUNCTIONS[word](complex(value))
        if index:
            value /= FUNCTIONS[word](complex(_Expression(index.strip("_{}"), self.point).whole()))
        return _power(value, power) if value else Fraction(0)
