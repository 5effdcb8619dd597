r"""The answer checker: which answer does a completion state, and does it equal the reference?

The rules follow the conventions behind published numbers: the last \boxed{} of hendrycks/math,
the "####" of GSM8K, the "final answer is" of lm-eval's minerva_math, and the <answer> tags of
R1-style prompts. The comparison is stricter than most. Numbers are exact, nothing in an answer is
ever executed, and what cannot be decided within fixed bounds of time and size counts as wrong.
Only the standard library is imported.
"""

import cmath
import math
import re
import unicodedata
import zlib
from collections import deque
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, takewhile

# --- extraction: which part of a completion is the answer? --------------------------------------

ANSWER_FORMATS = ("any", "boxed", "hash", "phrase", "tags")
MAX_ANSWER = 1000  # characters; a longer answer is compared as a string only
MAX_RESPONSE = 100_000  # characters, counted from the end: bounds the cost of a runaway completion
END_MARKER = re.compile(r"<(?:\|(?:im_end|endoftext|eot_id|end_of_text)\|>|\|im_start\|>user|/s>)")

GAP = r"[\s*_]*+"  # white space, and the * and _ of markdown's emphasis
FILLER = "therefore|thus|then|now|simply|equal to|actually|indeed|in fact|instead|just|still"
VALUE_FOLLOWS = rf"{GAP}:?+{GAP}(?:(?:{FILLER})\b[\s*_:]*+)?+(?:(?:\$\$|\\\[)\s*+)?+"
PHRASE = rf"(?i:answers?(?:{GAP}:|[\s*_]++(?:is|are)(?![a-z])){VALUE_FOLLOWS})"
REWORDED = (r"(?i:answers?(?: to (?:the|this) (?:question|problem))?"
            rf"{GAP}(?:=|[-–—→]\s|is(?![a-z])|equals|(?:should|would|must|will) be){VALUE_FOLLOWS})")
HEADING = (r"(?im:^[#*_ \t]*+(?:(?:the|my|our|final|correct)[ \t]++){0,3}answer[*_ \t]*+\n"
           rf"{VALUE_FOLLOWS})")
REMARK = (r"(?:correct|consistent|reasonable|valid|unique|verified|confirmed|an integer"
          r"|in [a-z ]{0,30}(?:form|terms))\b")
STATEMENTS = {
    "boxed": re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*"),
    "hash": re.compile(r"(?<!#)#{4,}(?!#)(?![ *_]*[A-Z][a-z]{2})"),
    "phrase": re.compile(rf"{PHRASE}(?!{REMARK})|{HEADING}(?=[^\n]*[0-9\\])"),
    "tags": re.compile("<answer>"),
}
WEAK_STATEMENTS = {  # read only where nothing else is stated: "#### Conclusion", "is correct"
    "hash": re.compile(r"(?<!#)#{4,}(?=[ *_]*[A-Z][a-z]{2})"),
    "phrase": re.compile(f"{PHRASE}|{REWORDED}|{HEADING}"),
}
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)")


def extract_answer(response: str, fmt: str = "any") -> str | None:
    r"""The final answer that a completion states, or None. Nothing outside a statement is read.

    A statement is the content of the last `\boxed{...}` or `\fbox{...}`, the rest of the line
    after the last `####`, the rest of the sentence after the last "answer is" or "answer:" or of
    the line below a heading "Final Answer", or the content of the last `<answer>...</answer>`.
    The statement that ends latest wins, so "the answer is \boxed{5}" is the box. `fmt`, one of
    ANSWER_FORMATS, can admit one kind of statement only.

    A last box that is empty or cut off is no answer, and nothing earlier replaces it. The phrase
    "the answer is correct" and a heading such as "#### Conclusion" are read only where nothing
    else is stated. Text after the first end marker and a think block are ignored. Of a statement
    in words the value alone is returned where exactly one is stated (see _value_alone).

    Pass the completion alone: a prompt may contain `\boxed{}` itself.
    """
    return _last_statement(_completion(response), fmt)[1]


def last_number(response: str) -> str | None:
    """The last number of the text, as VERL and lm-eval read it leniently. Not for rewards."""
    numbers = NUMBER.findall(_completion(response))
    return numbers[-1].replace(",", "") if numbers else None


def extract_lenient(response: str) -> str | None:
    """The stated answer, else the last number."""
    return extract_answer(response) or last_number(response)


def lenient_correct(response: str, reference: str) -> bool:
    """Is the stated answer right, or else the last number? So no lower than "last number" alone."""
    readings = (extract_answer(response), last_number(response))
    return any(reading and same_answer(reading, reference) for reading in readings)


def _completion(response: str) -> str:
    """The part of a completion that can hold the answer."""
    ended = END_MARKER.split(response, maxsplit=1)[0]
    thinking, _, rest = ended.rpartition("</think>")
    return (rest if rest.strip() else thinking)[-MAX_RESPONSE:]


def _last_statement(text: str, fmt: str = "any") -> tuple[bool, str | None]:
    """(is anything stated, the answer or None)."""
    for patterns in (STATEMENTS, WEAK_STATEMENTS):
        found = []  # (where the statement ends, its content)
        for kind, pattern in patterns.items():
            if fmt in ("any", kind):
                last = deque(pattern.finditer(text), maxlen=1)
                found += [_content(kind, text, match.end()) for match in last]
        if found:
            return True, _undecorated(_value_alone(max(found)[1])) or None
    return False, None


def _content(kind: str, text: str, start: int) -> tuple[int, str]:
    """(end, content) of the statement whose content begins at `start`."""
    if kind == "boxed":
        return _box(text, start)
    if kind == "tags":
        content, closing, _ = text[start:].partition("</answer>")
        stated, answer = _last_statement(content)
        if not closing:
            return start, ""
        return start + len(content), (answer or "") if stated else content
    line = text[start:start + 2 * MAX_ANSWER].partition("\n")[0].partition("</answer>")[0]
    return start, _sentence(line) if kind == "phrase" else line


def _box(text: str, start: int) -> tuple[int, str]:
    r"""(end, content) of a box; one that is cut off has no content and ends with the text."""
    if not text.startswith("{", start):  # \boxed 7 is TeX for \boxed{7}
        token = re.compile(r"[\w.,-]{0,50}").match(text, start)
        return token.end(), token[0]
    depth = 0
    braces = re.compile(r"\\.|[{}]", re.S)  # \{ is no brace
    for brace in braces.finditer(text, start, start + 10 * MAX_ANSWER):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0 and brace[0] == "}":
            return brace.end(), text[start + 1:brace.start()]
    return len(text), ""


def _sentence(line: str) -> str:
    """The line up to the first dot before white space that is outside braces and $...$."""
    for dot in re.finditer(r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)\.(?=\s|$)", line):
        before, after = line[:dot.start()], line[dot.end():]
        in_math = before.count("$") % 2 != before.count(r"\$") % 2
        if not re.match(r"\s+[A-Z][a-z]", after):  # "$18. She has $5 left" is no formula
            in_math &= "$" in after
        else:
            in_math = False
        if before.count("{") == before.count("}") and not in_math:
            return before
    return line


def _undecorated(answer: str) -> str:
    """Without dollar signs, emphasis and the final dot around it."""
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
        answer = answer.strip(" \t\r\n*$`")
        if not answer.endswith("..."):
            answer = answer.rstrip(" \t\r\n*$`.")
        if answer.endswith("_"):
            answer = answer.strip("_ ")
        answer = answer.removeprefix(opening).removesuffix(closing)
    return answer.strip()


# --- statements in words: "Tom has 7 apples, because 3 + 4 = 7" states 7 ------------------------

TEXT = re.compile(r"\\(?:text[a-z]*|[mh]box|mathrm)\*? ?\{([^{}]*)\}")
EMPHASIS = re.compile(r"(?<![\w\\}*])(\*\*|__?)(?=[^\s*_{])([^*_\n]{1,200})(?<=\S)\1(?![\w{*])")
WORD = re.compile(r"(?<![\\A-Za-z{])(?!(?:(?:arc)?(?:sin|cos|tan|cot|sec|csc|exp|ln|log|sqrt|pi)|[A-Z]{2,4})\b)"
                  r"(?:[A-Za-z]{2,}|[AaI](?= [A-Za-z]))[A-Za-z'’-]*")
RESTATED = re.compile(rf"[\s*_$#]*(?i:(?:so|thus|hence|therefore|the|my|our|final|correct)\b"
                      rf"[\s,*_]*){{0,4}}(?:{PHRASE}|{REWORDED})")
OPENING = re.compile(  # "exactly", "for sure", "In 5 days, "
    rf"(?i)(?:(?:{FILLER}|exactly|precisely|approximately|only|clearly|definitely|certainly|of course"
    r"|for sure|finally|so|hence|that|given by|found to be|going to be)\b[,:]? ?"
    r"|(?:in|on|after|for|with|by|since|when|because|given|over|during|within)\b[^,;]*, (?=[A-Za-z]))+")
ASIDE = re.compile(r" [(\[]([^()\[\]]*)[)\]](?=[ .,;!]|$)")
REASON = "because|since|given that|due to|rather than|instead of|not counting"
REMARK_BEGINS = re.compile(  # what follows the value, with a reason or only with more words
    rf"(?i)[,;:]? \(?(?P<reason>(?:{REASON}|(?<=[,;] )(?:as|where|not))\b)"
    r"|(?<!\\)[,;] (?!(?:or|and|but|nor|if|unless|else|otherwise|then|plus|minus|to|less|more)\b)"
    r"(?=[A-Za-z]{2}|I )| [-–—]+ (?=[A-Za-z]{2})| (?=(?:so|which|that is|i\.e\.) )")
COPULA = re.compile(r"(?i)(?:\b(?:is|are|was|were|be|equals?|becomes?|totals?)"
                    rf"(?: (?:{FILLER}|exactly|precisely|approximately|only|to|by|given|found|a|an|the|option|"
                    r"choice|total|sum|number|value|of))*|[=:])[ :]*$")
DENIED = (r"\b(?:not|no|none|never|neither|nor|false|doubt|if|whether|unless|either|wrong"
                    r"|incorrect|cannot)\b|n['’]t\b|\?")
DENIAL = re.compile(f"(?i){DENIED}")
VETO = re.compile(
    rf"(?i)\b(?:or|and|between|except|without|but|less|fewer|greater|under|over|above|below|beyond|least"
    r"|most|than|plus|minus|negative|times|divided|multiplied|half|third|quarter|twice|double|triple"
    r"|dozen|hundred|thousand|[mb]illion|trillion|lakh|crore|squared|cubed|root|power|factorial"
    r"|remainder|mod|modulo|base|maybe|perhaps|possibly|probably|might|may|could|would|should|almost"
    r"|nearly|about|around|roughly|too|impossible|invalid|out|up)\b|{DENIED}")
LABEL = re.compile(r"(?i)\b(?:of|after|before|by|to|at|on|from|past|until|near|against|step|part|case|section"
                   r"|question|problem|exercise|example|method|figure|table|equation|page|day|option|line"
                   r"|number|version|grade|year|room|level|stage|phase|round|type|class|row|column) $")
FINITE = re.compile(r"(?i)(?:is|are|was|were|isn|does|did|has|had|will|fails|works)\b")
DOUBT = re.compile(r"(?i)\b(?:wrong|incorrect|actually|wait|should|could|might|may|maybe|perhaps|possibly"
                   r"|probably|but|however|either|if|unless|otherwise|correction|mistake|sorry|else|ignore)\b")


def _value_alone(content: str) -> str:
    r"""The value of a statement that holds more, else the statement as it is.

    Read are a statement in the statement ("Answer: 18", \boxed{\text{The answer is } 18}), what
    stands before a remark ("7, because 3+4=7", "18 (9 * 2)"), and the only value in a sentence
    ("The volume of the box is 120"). Where more than one number could be meant, or the words deny
    it or make another number of it ("7 or 8", "not 7", "7 less than 20"), nothing is taken out.
    """
    if len(content) > MAX_ANSWER:
        return content
    content = EMPHASIS.sub(r"\2", content)
    while restated := RESTATED.match(_unwrapped(content)):
        content = _unwrapped(content)[restated.end():]
    if box := STATEMENTS["boxed"].search(content):
        end, inside = _box(content, box.end())
        outside = content[:box.start()] + content[end:]
        return content if re.search("[0-9]", outside) or VETO.search(outside) else inside
    sentence = _sentence(content)
    return _read(_unwrapped(sentence), content[len(sentence):].strip(" .")) or content


def _unwrapped(text: str) -> str:
    r"""The text without its \text macros and with single spaces."""
    return " ".join(TEXT.sub(r" \1", text).split())


def _read(sentence: str, rest: str) -> str | None:
    """The only value that a sentence states, or None where that is not certain."""
    opening = OPENING.match(sentence)
    main = sentence[opening.end():] if opening else sentence
    remarks = [(rest, True)]  # (what else is said, may it be a calculation?)
    for aside in reversed(list(ASIDE.finditer(main))):
        before, inside = main[:aside.start()], aside[1]
        computed = re.search("[-+*/×=]", inside) and same_answer(before, inside)
        if WORD.search(inside) or computed:
            main = before + main[aside.end():]
            remarks.append((inside, True))
    depths = _depths(main)
    cuts = (cut for cut in REMARK_BEGINS.finditer(main) if depths[cut.start()] == 0)
    cut, reason = next(cuts, None), False
    if cut:
        reason, remark = cut["reason"], main[cut.end():]
        main = main[:cut.start()]
        if not reason:
            remarks.append((remark, remark.startswith(("which", "that is", "i.e."))))
            if not re.search(r"[0-9\\]", main) and not remark[0].islower():
                return None  # a list of words
    value = main
    if words := list(WORD.finditer(main)):
        value = _only_value(main.rstrip("!"), words, bool(rest) or main != sentence)
        if not value and reason and not re.search("[0-9]", main):
            value = main
    elif opening:
        value = main.rstrip("!")
    elif main == sentence and not rest:
        return None
    if not value or any(_undermines(remark, value, may_compute) for remark, may_compute in remarks):
        return None
    return value


def _undermines(remark: str, value: str, may_compute: bool) -> bool:
    """Could it be another answer that the remark states?"""
    numbers = NUMBER.findall(remark)
    if DOUBT.search(remark) or STATEMENTS["phrase"].search(remark):
        return True
    if numbers and re.search(r"\bor\b", remark):
        return True
    if not numbers or numbers[-1] in NUMBER.findall(value)[-1:]:
        return False
    return len(numbers) == 1 or not may_compute


def _only_value(main: str, words: list[re.Match], shortened: bool) -> str | None:
    """The one number, formula or letter between the words of a sentence, with its unit."""
    if len(words) > 60:
        return None
    starts = [0, *(word.end() for word in words)]
    ends = [*(word.start() for word in words), len(main)]
    gaps = [gap for gap in zip(starts, ends) if re.search(r"[\w\\∞π√]", main[slice(*gap)])]
    numeric = [gap for gap in gaps if re.search(r"[0-9∞π√]|\\[a-z]", main[slice(*gap)])]
    named = [gap for gap in gaps if COPULA.search(main[:gap[0]]) or main[slice(*gap)].lstrip()[0] in "=:"]
    stated = named or numeric
    if len({main[slice(*gap)].strip(" =:") for gap in stated}) != 1:
        return None
    start, end = stated[-1]
    before, value, after = main[:start], main[start:end], main[end:]
    if any(gap[0] > start for gap in numeric) or VETO.search(after) or FINITE.match(after):
        return None
    if DENIAL.search(before) or not named and before and (
            VETO.search(before) or LABEL.search(before + " ") or len(before.split()) < 2):
        return None
    if before and value[0] not in " =:(" or after and value[-1] != " ":
        return None
    if not shortened and not before and len(after.split()) <= 4:
        return None  # a number with its unit
    unit = takewhile(lambda word: _singular(word.strip(".,").lower()) in UNITS, after.split())
    return f"{value.strip(' ,;:=')} {' '.join(unit)}".strip()


# --- comparison: does an answer equal the reference? --------------------------------------------

def is_correct(response: str, reference: str) -> bool:
    r"""Does the answer in `response` equal `reference`? A bool for any two strings, never an error.

    `response` is a completion, read with extract_answer. One that states nothing is compared as a
    bare answer, as a whole: a number somewhere in a long text is never picked out.

    Integers and decimals are exact at any size; a/b, mixed numbers, 4.5e33 and 4.5 \times 10^{33}
    go by value. A unit, percent or degree sign that only one side has is ignored, different units
    differ, and nothing is scaled by 100. `x = 5`, `|z| = 5` and `\frac{AM}{MB} = 5` are 5, and
    `2x \text{ for all real } x` is 2x. Bare lists and sets are multisets ("5 or 7" is two answers),
    tuples are ordered, intervals need their brackets, and `x \ge 2` is [2, \infty). Matrices go
    entry by entry, equations up to a factor. Expressions are equal if they agree at two fixed
    points: rational ones exactly, others to 12 digits. Text goes without case, all else as strings.
    """
    text = _completion(response)
    stated, answer = _last_statement(text)
    return same_answer((answer or "") if stated else text, reference)


def same_answer(answer: str, reference: str) -> bool:
    """is_correct for an answer that has been extracted already."""
    answer, reference = answer.strip(), reference.strip()
    if answer == reference:
        return bool(answer)
    if not answer or max(len(answer), len(reference)) > MAX_ANSWER:
        return False
    return _equal(normalise(answer), normalise(reference))


FUNCTIONS = {
    name: getattr(cmath, name.replace("arc", "a"))
    for name in "sin cos tan arcsin arccos arctan sinh cosh tanh exp".split()
} | {
    "ln": cmath.log, "log": cmath.log10, "lg": cmath.log10, "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x), "cot": lambda x: 1 / cmath.tan(x),
}
# What LaTeX and unicode spell in several ways; after normalise() one symbol has one meaning.
COMMANDS = {" ": " "} | {name: symbol for symbol, names in {
    "": "! left right big Big bigg Bigg bigl bigr Bigl Bigr middle displaystyle textstyle limits"
        " hline phantom rm bf it boldsymbol bm large Large ( ) [ ]",
    " ": ", ; : quad qquad", r"\frac": "dfrac tfrac cfrac nicefrac sfrac",
    r"\binom": "dbinom tbinom", r"\phi": "varphi", r"\epsilon": "varepsilon",
    r"\setminus": "backslash", "∧": "land wedge", "∨": "lor vee", "*": "times cdot ast",
    "/": "div", "≤": "le leq leqslant", "≥": "ge geq geqslant", "<": "lt", ">": "gt",
    "≠": "ne neq", "≈": "approx", "=": "equiv", "∈": "in", "∪": "cup bigcup", "∞": "infty",
    "±": "pm", "∓": "mp", "π": "pi", "°": "circ degree", "'": "prime", "%": "%",
    "|": "mid vert lvert rvert", "(": "langle", ")": "rangle rfloor rceil", "floor(": "lfloor",
    "ceil(": "lceil", "⦃": "lbrace {", "⦄": "rbrace }", "⦃⦄": "emptyset varnothing",
}.items() for name in names.split()}
GREEK = dict(zip("αβγδεθλμνρστφχψωΔΩ", (
    "alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi chi psi omega Delta Omega"
).split()))
UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "÷": "/", "⁄": "/", "⩽": "≤",
    "⩾": "≥", "′": "'", "’": "'", "，": ",", "：": ":", "（": "(", "）": ")", "º": "°", "~": " ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∅": r"\emptyset ",
    "…": r"\ldots ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
    **{letter: rf"\{name} " for letter, name in GREEK.items()},
    **dict.fromkeys('"⦃⦄\u00ad\u200b\u200e\u200f\ufeff'),
})
COMPOSED = re.compile(r"([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+)|([₀-₉]+)|[¼½¾⅐-⅞]")
TEXT_MACRO = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|[mh]box|math(?:rm|bf|it|sf|bb|cal)|operatorname)\*?"
    r" ?\{((?:[^{}]|\^\{-?[0-9]\})*)\}")
ACCENT = re.compile(r"\\(d?dot|bar|hat|tilde|vec|overline|overrightarrow) ?"
                    r"(?:\{ ?([A-Za-z]+) ?\}|([a-z])(?![a-z]))")
RECURRING = re.compile(
    r"(?<![0-9])([0-9]*)\.([0-9]*)\\(?:overline|bar|dot) ?\{ ?([0-9]+) ?\}")


def normalise(text: str) -> str:
    r"""One spelling for what LaTeX, unicode and prose spell in several ways.

    Braces stay: 2^{n+1} is not 2^n+1. \text{cm} becomes "cm" in quotes, the braces of a set become
    ⦃ and ⦄, `and` a comma, `or` a semicolon.
    """
    text = COMPOSED.sub(_decomposed, text).translate(UNICODE)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    if not set(RELATIONS).isdisjoint(text):
        text = text.replace("∧", ",").replace("∨", ";")
    return text


def _decomposed(composed: re.Match) -> str:
    """LaTeX for superscripts, subscripts and fractions of unicode. Alone NFKC makes 52 of 5²."""
    plain = unicodedata.normalize("NFKC", composed[0])
    if composed[1]:
        return f"^{{{plain}}}"
    if composed[2]:
        return f"_{{{plain}}}"
    numerator, _, denominator = plain.partition("⁄")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _quoted(macro: re.Match) -> str:
    """The content of a text macro: words in quotes, but not the number in 4:30 pm."""
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
    nines = 10 ** len(period) - 1
    return f"({int((integer or '0') + first)}/{scale}+{period}/{scale * nines})"


def _ungrouped(number: re.Match) -> str:
    """1,234 without its comma, but not inside brackets, where (20,100) is a pair."""
    before = number.string[:number.start()]
    inside = sum(map(before.count, "([⦃")) > sum(map(before.count, ")]⦄"))
    return number[0] if inside else number[0].replace(",", "")


RELATIONS = "=<>≤≥≠∈"
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\s+", " "),
    (r"\\mathbb ?(?:\{ ?R ?\}|R\b)|\\R\b", r"(-\\infty,\\infty)"),
    (r"\\mathbb ([A-Z])", r"\\mathbb{\1}"),
    (r"(?i)\b(?:negative|minus) (?=infinity\b)", "-"),
    (r"(?i)(?<!\\)\b(?:(?:positive|plus) )?infinity\b", "∞"),
    (r"(?i)(?<=[(\[,+-])( ?)(?:inf|oo)(?= ?[,)\]])", r"\1∞"),
    (r"\\(?:left|right)\.", ""),
    (r"\.\.\.", r"\\ldots "),
    (r"\{:\}", ":"),
    (r"(?<=[0-9])(?: ?\{ ?, ?\}|, ?\\!) ?(?=[0-9]{3})", ""),  # 10{,}000
    (r"√ ?([0-9]+)", r"\\sqrt{\1}"),
    ("√", r"\\sqrt "),
    ("∛", r"\\sqrt[3]"),
    (ACCENT, r"\\\1\2\3 "),
    (RECURRING, _recurring),  # 0.1\overline{6}
    (TEXT_MACRO, _quoted),
    (TEXT_MACRO, _quoted),  # a macro in a macro
    (r"\\([A-Za-z]+|.)", lambda command: COMMANDS.get(command[1], command[0])),
    (r"\$,\$", ", "),
    (r"(?<!\\)\$", ""),
    (r"(?<![\w)}])\*\*|\*\*(?![\w({\\+-])", ""),  # **18** is 18,
    (r"\*\*", "^"),  # but 2**3 is a power
    ("<=", "≤"),
    (">=", "≥"),
    (r"(?<!^[0-9])(?<!^[0-9]{2})!=", "≠"),  # but 3!=6
    (r"(?<![A-Za-z])(?:np|math)\.", ""),  # notation of programs
    (r"(?<![A-Za-z\\])pi(?![A-Za-z])", "π"),
    (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\(([0-9]+)\)_", r"\1_"),  # (101)_2
    (r"(?<=°) ?([CF])$", r'"\1"'),
    (r"(?<=[\])⦄]) ?U ?(?=[\[(⦃])", "∪"),
    (r"(?<=[0-9]) ?x ?(?=10\^)", "*"),  # 4.5 x 10^33
    (r"(?<![A-Za-z])and(?![A-Za-z])", ","),
    (r"(?<![A-Za-z])or(?![A-Za-z])", ";"),
    (r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])", _ungrouped),  # 1,234,567
    (" +", " "),
    (r"^[ ,;:]+|(?<![ .,;:\\])[ .,;:\\]++$", ""),
    (r"^(?:\\\$ ?)?[-+]?[0-9]{1,3}(?: [0-9]{3})+(?! ?[0-9/\\(])",
     lambda number: number[0].replace(" ", "")),  # 1 000
    (r"(?<![\w.}^])([0-9]+) ?\\frac ?(?:([0-9])([0-9])|\{ ?([0-9]+) ?\} ?\{ ?([0-9]+) ?\})",
     r"(\1+\2\4/\3\5)"),  # 1\frac12
    (r"(?<![\w.}^])([0-9]+) ([0-9]+/[0-9]+)", r"(\1+\2)"),  # 1 1/2
    (r' ?([^\w\s"\\)}\]⦄°%]|_) ?| ([)}\]⦄°%])', r"\1\2"),  # the space in "3 cm" stays
    (r"\^\{(°|'+)\}|\^(°|')", r"\1\2"),
    (r"\^(\w|\{[^{}]*\})_(\w|\{[^{}]*\})", r"_\2^\1"),  # v^2_0
)]


# --- structure: lists, relations, unions, tuples, matrices --------------------------------------

TURNED = str.maketrans(">≥", "<≤")
CHOICE = re.compile(r'"?(?:(?:[Oo]ption|[Cc]hoice)(?: |(?=\()))?["(]*([A-Za-z])[")]*')
LABELLED_CHOICE = re.compile(r'"?(?:(?:[Oo]ption|[Cc]hoice) )?["(]*([A-J])'
                             r'(?:"?[.:]|"?\) |\)"(?=[0-9\\ ]))(?!.*\([A-J]\))')


def _equal(a: str, b: str, depth: int = 0) -> bool:
    """Are two normalised answers the same? They are taken apart layer by layer, from outside."""
    if a == b:
        return True
    if depth > 5:
        return False
    depth += 1
    list_a, list_b = _members(a), _members(b)
    if len(list_a) != 1 or len(list_b) != 1:
        return _same_multiset(list_a, list_b, depth)
    (a,), (b,) = list_a, list_b
    choice_a = CHOICE.fullmatch(a) or LABELLED_CHOICE.match(a)
    choice_b = CHOICE.fullmatch(b) or LABELLED_CHOICE.match(b)
    if choice_a and choice_b and (CHOICE.fullmatch(a) or CHOICE.fullmatch(b)):
        letter_a, letter_b = choice_a[1], choice_b[1]
        return letter_a == letter_b or "(" in a + b and letter_a.upper() == letter_b.upper()
    (sides_a, signs_a), (sides_b, signs_b) = _relation(a), _relation(b)
    if signs_a or signs_b:
        return _same_relation(sides_a, signs_a, sides_b, signs_b, depth)
    if "∪" in a + b:
        return _same_multiset(_split(a, "∪"), _split(b, "∪"), depth)
    if r"\begin" in a + b:
        return _same_sequence(_matrix(a), _matrix(b), depth)
    items_a = _split(a[1:-1], ",;") if _wrapped(a, "([", ")]") else [a]
    items_b = _split(b[1:-1], ",;") if _wrapped(b, "([", ")]") else [b]
    if len(items_a) > 1 or len(items_b) > 1:
        same_brackets = (a[0], a[-1]) == (b[0], b[-1])
        return same_brackets and _same_sequence(items_a, items_b, depth)
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
    """How many brackets are open at each character. Kinds may mix: (0,1] is an interval."""
    return list(accumulate((c in "([{⦃") - (c in ")]}⦄") for c in text))


def _split(text: str, separators: str) -> list[str]:
    """Split at the separators that stand outside all brackets."""
    cuts = [i for i, depth in enumerate(_depths(text)) if depth == 0 and text[i] in separators]
    return [text[i + 1:j] for i, j in zip([-1, *cuts], [*cuts, len(text)])]


def _wrapped(text: str, opening: str, closing: str) -> bool:
    """Does one pair of brackets hold the whole text?"""
    if len(text) < 2 or text[0] not in opening or text[-1] not in closing:
        return False
    return min(_depths(text)[:-1]) > 0


def _members(text: str) -> list[str]:
    r"""The answers that a bare list, a set or a \pm holds; one for anything else."""
    text = _conditions_to_union(_bare_set(text))
    if _wrapped(text, "⦃{", "⦄}"):
        text = text[1:-1]
    members = []
    for item in filter(None, _split(text, ",;")):
        exact, _, rounded = item.partition("≈")
        item = exact if exact and not _is_name(exact) else rounded or item
        if item.count("±") == 1:
            members.append(item.replace("±", "+").replace("∓", "-"))
            members.append(item.replace("±", "-").replace("∓", "+"))
        else:
            members.append(item)
    return members


def _bare_set(text: str) -> str:
    r"""The set alone of A∪B=⦃1,2⦄ and x∈⦃1,2⦄, and of ⦃x|-2<x<1⦄ the condition."""
    name, *rest = re.split("[∈=]", text, maxsplit=1)
    if rest and _wrapped(rest[0], "⦃{", "⦄}") and _is_name(re.sub(r"∪|\\cap", "", name)):
        text = rest[0]
    if _wrapped(text, "⦃", "⦄"):
        return re.sub(r"^⦃[A-Za-z](?:∈\(-∞,∞\))? ?[|:](.*)⦄$", r"\1", text)
    return text


def _conditions_to_union(text: str) -> str:
    r"""Conditions on one name as a set: x<1 or x>3, x≥1 and x<3, x≠2,5, the reals without ⦃2,5⦄."""
    holes = re.fullmatch(r"([A-Za-z])≠(.+)|\(-∞,∞\) ?(?:\\setminus|-)⦃(.+)⦄", text)
    if holes:
        points = _split((holes[2] or holes[3]).replace(f"{holes[1]}≠", ""), ",")
        if all(map(_value, points)):
            ends = ["-∞", *sorted(points, key=lambda point: _value(point)[0].real), "∞"]
            return "∪".join(f"({left},{right})" for left, right in zip(ends, ends[1:]))
    separator = ";" if ";" in text else ","
    parts = [_relation(part) for part in _split(text, separator)]
    if len(parts) < 2 or not all(signs for _, signs in parts):
        return text
    if all(signs == "=" for _, signs in parts):
        return text
    names, values = zip(*(_meaning(*part) for part in parts))
    if len(set(names)) > 1 or not all(len(value) == 1 for value in values):
        return text
    sets = [f"⦃{value}⦄" if signs == "=" else value
            for (value,), (_, signs) in zip(values, parts)]
    if separator == ";":
        return "∪".join(sets)
    low, high = sorted(sets, key=lambda ray: ray.startswith("(-∞"))[:2]
    if len(sets) == 2 and low.endswith(",∞)") and high.startswith("(-∞,"):
        return low[:-2] + high[4:]  # [1,∞) and (-∞,3) are [1,3)
    return text


def _relation(text: str) -> tuple[list[str], str]:
    """The sides and the signs between them. A chain of > and ≥ is turned round."""
    sides = _split(text, RELATIONS)
    ends = accumulate(len(side) + 1 for side in sides[:-1])
    signs = "".join(text[end - 1] for end in ends)
    if signs and set(signs) <= set(">≥"):
        return sides[::-1], signs[::-1].translate(TURNED)
    return sides, signs


ARGUMENTS = re.compile(  # P(X>2) is a name, but f(x+1) is another function
    r"([fghpqE-HPQ]'*(?:\^\{-1\})?|\\(?:sin|cos|tan|log|ln))\((?![a-z][-+])[^()]*\)")
SUBSCRIPT = re.compile(r"_(?:\{[^{}]*\}|\w)")
RATIO = re.compile(r"\\frac\{[^{}0-9^]+\}\{[^{}0-9^]+\}")  # of names: \frac{AM}{MB}


def _is_name(text: str, compound: bool = False) -> bool:
    r"""Can this stand before "=" as what was asked for? x, f(3), (x,y), \angle ABC, "Total cost",
    \frac{AM}{MB}, |z|, but not 2x. With `compound` also m+n and AB*BC, but not 2x+z."""
    if len(text) > 80 or not re.search('[A-Za-z"]', text) or text.strip(' "') in NOT_UNITS:
        return False
    text = SUBSCRIPT.sub("", ARGUMENTS.sub(r"\1", text))
    text = RATIO.sub("R", re.sub(r'"[^"]*" ?', "Q", text))
    text = re.sub(r"\|([^|0-9=<>^]+)\|", "A", text)
    if compound:
        text = re.sub(r"(?<=\w)[-+*](?=[\w\\])", "", text) 
    if text[:1] in "QfghABCM":
        text = re.sub(r"\^\{?-1\}?(?=\(|$)", "", text)  # f^{-1}(x), A^{-1}
    return not re.search(r"^[0-9.]|\\frac|\\sqrt|\\\$|[-+*/^|!%=<>≤≥∪π]|(?<![\\A-Za-z])[A-Za-z]{2,} ", text)


def _meaning(sides: list[str], signs: str, compound: bool = False) -> tuple[str, list[str]]:
    """(name, values): ('x', ['5']) for x = 5 and ('x', ['[2,∞)']) for x ≥ 2; a chain of equal
    sides has no name."""
    opening = "[" if signs[0] == "≤" else "("
    closing = "]" if signs[-1] == "≤" else ")"
    if set(signs) <= set("<≤") and len(signs) == 2 and _is_name(sides[1]):
        return sides[1], [f"{opening}{sides[0]},{sides[2]}{closing}"]
    if signs in ("<", "≤") and _is_name(sides[0]):
        return sides[0], [f"(-∞,{sides[1]}{closing}"]
    if signs in ("<", "≤") and _is_name(sides[1]):
        return sides[1], [f"{opening}{sides[0]},∞)"]
    if signs == "∈" and _is_name(sides[0]):
        return sides[0], [sides[1]]
    if set(signs) == {"="} and not all(map(_words, sides)):  # LRAC = SRMC is no value of LRAC
        if _is_name(sides[0], compound):
            return sides[0], sides[1:]
        return (sides[-1], sides[:-1]) if _is_name(sides[-1]) else ("", sides)
    return "", []


def _same_relation(sides_a: list[str], signs_a: str, sides_b: list[str], signs_b: str,
                   depth: int) -> bool:
    """Equations, inequalities and memberships against one another or a bare value or set."""
    if not signs_b:
        _, values = _meaning(sides_a, signs_a, compound=True)
        return bool(values) and all(_equal(value, sides_b[0], depth) for value in values)
    if not signs_a:
        _, values = _meaning(sides_b, signs_b)
        return bool(values) and all(_equal(value, sides_a[0], depth) for value in values)
    (name_a, values_a), (name_b, values_b) = _meaning(sides_a, signs_a), _meaning(sides_b, signs_b)
    y_is_f = r"y[a-z]\([a-z]\)|[a-z]\([a-z]\)y"  # y = 2x is f(x) = 2x
    if name_a == name_b or re.fullmatch(y_is_f, name_a + name_b):
        pairs = [(x, y) for x in values_a for y in values_b]
        if pairs and all(_equal(x, y, depth) for x, y in pairs):
            return True
    if signs_a == signs_b == "=" and all(map(_words, sides_a + sides_b)):
        return _same_multiset(sides_a, sides_b, depth)
    if signs_a != signs_b:
        return False
    if _same_sequence(sides_a, sides_b, depth):
        return True
    if len(signs_a) > 1:
        return False
    difference = _value("({})-({})".format(*sides_a))
    ratio = _value("(({})-({}))/(({})-({}))".format(*sides_a, *sides_b))  # constant: 2x=4, x-2=0
    if not difference or not ratio or _same_number(*difference) or not _same_number(*ratio):
        return False
    return signs_a == "=" or signs_a in "<≤" and ratio[0].real > 0


def _matrix(text: str) -> list[str]:
    r"""The rows of a matrix (not of a determinant) as tuples, each entry times a factor before."""
    factor, _, rest = text.partition(r"\begin{")
    kind, _, rest = rest.partition("}")
    body, _, end = rest.rpartition(r"\end{" + kind)
    if not re.fullmatch("[pbB]?matrix|array", kind) or not re.fullmatch(r"\}[])]?", end):
        return []
    if r"\begin" in body:
        return []
    if kind == "array":
        body = re.sub(r"^\{[^{}]*\}", "", body)
    factor = factor.rstrip("[(*").replace("-", "-1") if factor.rstrip("[(*") == "-" else factor.rstrip("[(*")
    rows = []
    for row in re.split(r"\\\\(?:\[[0-9.]+[a-z]{2}\])?", body):
        if row.strip():
            cells = [f"({factor or 1})*({cell})" for cell in row.strip().split("&")]
            rows.append(f"({','.join(cells)})")
    return rows


# --- atoms: words, or expressions with or without a unit ----------------------------------------

UNITS = {name: names.split()[0] for names in (
    "° degree deg", "% percent percentage pct", "$ dollar usd", "€ euro", "£", "cent",
    "m meter metre", "mm millimeter", "cm centimeter centimetre", "km kilometer kilometre",
    "/ per", "in inch inche", "ft foot feet", "mi mile", "yd yard", "s second sec",
    "min minute", "h hour hr", "am", "pm", "g gram gm", "kg kilogram", "mg milligram",
    "lb pound", "oz ounce", "l liter litre", "ml milliliter millilitre", "day", "week",
    "month", "year", "2 square sq", "3 cubic cu") for name in names.split()}
NOT_UNITS = FUNCTIONS.keys() | set(
    "is are was be not no if but so because since then the this it either neither sqrt pi mod"
    " squared cubed factorial half times more less dozen hundred thousand million billion"
    " trillion lakh crore".split())


def _same_atom(a: str, b: str) -> bool:
    words_a, words_b = _words(a), _words(b)
    if words_a == words_b != "" or max(len(words_a), len(words_b)) > 3:
        return words_a == words_b
    if words_a and words_b and (a + b).isupper():
        return words_a == words_b
    (a, unit_a), (b, unit_b) = _split_unit(a), _split_unit(b)
    if unit_a and unit_b and unit_a != unit_b:
        return False
    value_a, value_b = _value(a), _value(b)
    if value_a and value_b:
        return all(map(_same_number, value_a, value_b))
    return _plain(a) == _plain(b)


def _words(text: str) -> str:
    """The letters of a text answer, without case; empty for anything but words."""
    letters = re.sub(r'[ ".,\']', "", text).strip("()")
    return letters.casefold() if letters.isalpha() and len(letters) > 1 else ""


def _plain(text: str) -> str:
    """What is left to compare as a string: no spaces, quotes or braces around one character."""
    return re.sub(r'(?<![0-9]) | (?![0-9])|"', "", re.sub(r"\{(\w)\}", r"\1", text))


def _split_unit(text: str) -> tuple[str, str]:
    r"""(value, unit) of 5"cm"^2, 5 square cm, \$5, 5°, 5%.

    In plain text a unit is a known one, or words after a space.
    """
    if money := re.match(r"(-?)(\\\$|€|£)", text):
        amount = text[money.end():]
        value, unit = _split_unit(amount)  # \$18 per day
        if unit == "k":
            value, unit = amount, ""
        return money[1] + value, " ".join(sorted({money[2][-1], *unit.split()}))
    power = re.search(r"\^\{?[23]\}?$", text)
    quote = text.find('"')
    if quote > 0:
        head = text[:quote]
    else:
        head = re.sub(r"[A-Za-z/. €£]{0,40}$", "", text[:power.start()] if power else text)
    tail = re.sub(r"\.(?=[A-Za-z]{2})", " ", text[len(head):])
    tail = tail.replace(".", "").replace("mph", "mi/h")
    words = [_singular(word) for word in re.findall("[a-z€£]+|/", tail.lower())]
    known = UNITS.keys() >= set(words)  # sec is a time by itself
    if quote > 0:
        is_unit = re.fullmatch(r'(?:"[^"]*"(?:\^\{?-?[0-9]\}?)?[ /*]?)+', tail)
    elif words and known:  # one letter may be a variable: only m^2 and m^3 are taken for units
        is_square = power and words == ["m"]
        is_rate = tail[0] == " " and "/" in tail
        is_unit = len(words[0]) > 1 or words[0] in "€£" or is_square or is_rate
    else:
        is_unit = tail.startswith(" ") and max(map(len, words), default=0) > 2
    head = head.rstrip(" *")
    if not is_unit or not 0 < len(words) <= 4 or NOT_UNITS & set(words) and not known or not head:
        return text, text[-1] if text.endswith(("°", "%")) else ""
    powers = re.findall("-?[0-9]", tail)
    return head, " ".join(sorted(UNITS.get(word, word) for word in words + powers))


def _singular(word: str) -> str:
    return word.removesuffix("s") if len(word) > 2 else word


# --- expressions: read and computed at once, exactly as long as possible ------------------------

MAX_BITS = 16_384  # of one exact number: 2^{5000} and 10^{3000} are in reach
MAX_WORK = 300_000  # bits of all the numbers of one expression
MAX_NESTING = 30
CONSTANTS = {"e": complex(math.e), "i": 1j, "π": complex(math.pi)}
KNOWN = "|".join(sorted([*FUNCTIONS, "sqrt", "floor", "ceil"], reverse=True))
TOKEN = re.compile(
    r"(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)(?P<base>_(?:\{[^{}]*\}|[0-9]+))?"
    rf'|(?P<word>\\[A-Za-z]+|{KNOWN}|"[^"]*"|(?![ei])[A-Za-z]\([0-9]+\)|[^\W0-9_]|∞)'
    r"(?P<index>(?:'|_(?:\{[^{}]*\}|\w))*)|[^ ]")
PROSE = re.compile(rf"(?<![\\A-Za-z])(?!(?:{KNOWN}|pi)\b)"
                   r"(?:(?:[A-Za-z]{3,}|no) |not|(?<= )[A-Za-z]{3,})")
LEVEL = {"+": 1, "-": 1, "*": 2, "/": 2, "^": 4, "!": 5, "°": 5, "%": 5}  # 2x: level 2 too
CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|"}
OPAQUE = {r"\prod", r"\int", r"\lim", r"\cdots", r"\ldots", r"\dots", r"\cap", r"\setminus",
          r"\pmod"}
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
    """The expression at two fixed points; () if it is none, or too large to compute."""
    if PROSE.search(text):
        return ()
    try:
        first = _Expression(text, "1")
        value = first.whole()
        return value, _Expression(text, "2").whole() if first.names else value
    except (ValueError, ArithmeticError):
        return ()


def _power(base: Number, exponent: Number) -> Number:
    """base ** exponent: exact where it is rational, and real where a real root exists."""
    if not isinstance(base, Fraction) or not isinstance(exponent, Fraction):
        return complex(base) ** complex(exponent)
    p, n = exponent.as_integer_ratio()
    bits = base.numerator.bit_length() + base.denominator.bit_length()
    if abs(p) * bits > MAX_BITS or n > 1000:
        if n == 1 or base < 0:
            raise ValueError("too large")
        return complex(base) ** float(exponent)  # names are fractions: a^{mn}
    if n == 1:
        return base ** p
    if base < 0:
        root_of_sign = Fraction((-1) ** p) if n % 2 else complex(-1) ** float(exponent)
        return root_of_sign * _power(-base, exponent)
    root = Fraction(*(math.isqrt(k) if n == 2 else round(float(k) ** (1 / n))
                      for k in base.as_integer_ratio()))
    if root.numerator.bit_length() * n <= MAX_BITS and root ** n == base:
        return root ** p
    return complex(base) ** float(exponent)


class _Expression:
    """A reader by precedence climbing whose methods return values. Names stand for fixed rational
    numbers."""

    def __init__(self, text: str, point: str):
        self.tokens = list(TOKEN.finditer(text))
        self.at = 0  # the next token
        self.point = point  # which of the two values the names take
        self.names = 0  # read so far
        self.nesting = 0
        self.bars = 0  # open |
        self.work = 0  # bits so far
        self.degree = Fraction(1)

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
                value = self.sum(value, self.read(1) if sign == "+" else -self.read(1))
            elif sign == "/":
                value = value / self.read(2)
            else:
                value = value * self.read(2)
            value = self.bounded(value)
        return value

    def sum(self, value: Number, term: Number) -> Number:
        total = value + term
        if isinstance(total, complex) and value and term:
            if not 1e-9 < abs(value) / abs(term) < 1e9:
                raise ValueError("a term is lost in rounding")
        return total

    def starts_factor(self) -> bool:
        """Does a factor without a sign follow? A number must be a power: 2^6 3^5, not 1 2 or x2."""
        if not self.next() or not self.at:
            return False
        token, after = self.tokens[self.at], self.tokens[self.at + 1:self.at + 2]
        if token["number"]:
            return bool(after) and after[0][0] == "^"
        return bool(token["word"] or token[0] in "([{" or token[0] == "|" and not self.bars)

    def marked(self, value: Number, mark: str) -> Number:
        if mark == "°":
            return value * self.degree
        if mark == "%":
            return value
        if isinstance(value, Fraction) and value.denominator == 1 and 0 <= value <= 170:
            return Fraction(math.factorial(int(value)))
        if isinstance(value, Fraction) and value.denominator > 1 and abs(value) < 100:
            return complex(math.gamma(value + 1))  # so that n! = n (n - 1)!
        return self.name(f"{value}!")

    def primary(self) -> Number:
        """A number, a name, a function with its arguments, a group, or one of them with a sign."""
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            raise ValueError("too deep")
        token, names = self.take(), self.names
        word = (token["word"] or "").strip("\\")
        if token[0] == "+":
            value = self.read(3)
        elif token[0] == "-":
            value = -self.read(3)
        elif token["number"]:
            value = self.number(token)
        elif token[0] == "|":
            self.bars += 1
            value = self.read()
            self.take("|")
            self.bars -= 1
            value = self.absolute(value, self.names > names)
        elif token[0] in CLOSING:
            value = self.read()
            self.take(CLOSING[token[0]])
        elif word == "frac":
            value = self.argument() / self.argument()
        elif word == "sqrt":
            degree = self.primary() if self.next() == "[" else Fraction(2)
            value = _power(self.argument(), 1 / degree)
        elif word in FUNCTIONS:
            value = self.function(word, token["index"])
        elif word in ("floor", "ceil"):  # a name for each argument: no rule of theirs is known here
            value = self.name(f"{word} {self.argument()}")
        elif word == "binom":
            n, k = self.argument(), self.argument()
            value = self.marked(n, "!") / (self.marked(k, "!") * self.marked(n - k, "!"))
        elif not word or token["word"] in OPAQUE:
            raise ValueError("not an expression")
        elif NOT_UNITS & set(re.findall("[a-z]+", token[0].lower())):
            raise ValueError("prose")
        else:
            value = CONSTANTS.get(token[0]) or self.name(re.sub('["{}]', "", token[0]))
        self.nesting -= 1
        return self.bounded(value)

    def absolute(self, value: Number, has_names: bool) -> Number:
        """With names in it |x| is a name for its square: at the positive points it would be x."""
        if has_names:
            return self.name(f"|{value * value}|")
        return abs(value) if isinstance(value, Fraction) else complex(abs(value))

    def argument(self) -> Number:
        r"""What follows \frac or \sqrt: a group or one token; of a number one digit: \frac12."""
        if self.next() in ("", "+", "-"):
            raise ValueError("not an expression")
        token = self.tokens[self.at]
        if len(token[0]) > 1 and token[0].isdigit():
            digit, rest = TOKEN.match(token[0][0]), TOKEN.match(token[0][1:])
            self.tokens[self.at:self.at + 1] = [digit, rest]
        return self.primary()

    def number(self, token: re.Match) -> Number:
        mantissa, _, exponent = token["number"].lower().partition("e")
        integer, _, decimals = mantissa.partition(".")
        if len(exponent) > 5 or abs(int(exponent or 0)) > 2000:
            raise ValueError("too large")
        if (token["base"] or "").strip("_{}") not in ("", "10"):
            return self.name(re.sub("^0+|[{}]", "", token[0]))  # 204_5: bases are not converted
        scale = Fraction(10) ** int(exponent or 0)
        return Fraction(int(integer + decimals), 10 ** len(decimals)) * scale

    def name(self, name: str) -> Fraction:
        """A fixed value for a name, another one at the other point."""
        self.names += 1
        digest = zlib.crc32((name + self.point).encode("utf-8", "replace"))
        return Fraction(100 + digest % 899, 331)

    def function(self, word: str, index: str) -> Number:
        r"""\sin^2 x, \log_2 8, \cos 2t: without brackets the argument ends at a sign or function."""
        power = Fraction(1)
        if self.next() == "^":
            self.take()
            power = self.primary()
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
            base = _Expression(index.strip("_{}"), self.point).whole()
            value /= FUNCTIONS[word](complex(base))
        return _power(value, power) if value else Fraction(0)
