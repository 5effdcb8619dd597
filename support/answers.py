r"""The answer checker: which answer does a completion state, and does it equal the reference?

The rules follow the conventions behind published numbers: the last \boxed{} of hendrycks/math, the
"####" of GSM8K, the "final answer is" of lm-eval's minerva_math, the <answer> tags of R1-style
prompts. The comparison is stricter than most: numbers are exact, nothing in an answer is ever
executed, and what cannot be decided within fixed bounds of time and size counts as wrong. Only the
standard library is imported. support/notation.py brings both sides into one spelling.
"""

import cmath
import math
import re
import zlib
from fractions import Fraction
from functools import lru_cache
from itertools import takewhile

from support import notation
from support.notation import ALTERED, DENIED, DOUBTED, MULTIPLE, NOT_UNITS, normalise

# --- extraction: which part of a completion is the answer? --------------------------------------

ANSWER_FORMATS = ("any", "boxed", "hash", "phrase", "tags")
MAX_ANSWER = 1000  # characters; a longer answer is compared as a string only
MAX_RESPONSE = 100_000  # characters, counted from the end: bounds the cost of a runaway completion
END_MARKER = re.compile(r"<(?:\|(?:im_end|endoftext|eot_id|end_of_text)\|>|\|im_start\|>user|/s>)")
FILLER = "therefore|thus|then|now|simply|equal to|actually|indeed|in fact|instead|just|still"
GAP = r"[\s*_]*+"  # white space, and the * and _ of markdown's emphasis
TO_VALUE = rf"{GAP}:?+{GAP}(?:(?:{FILLER})\b[\s*_:,]*+)?+(?:(?:\$\$|\\\[)\s*+)?+"
PHRASE = rf"(?i:answers?(?:{GAP}:|[\s*_]++(?:is|are)(?![a-z])){TO_VALUE})"
REWORDED = (r"(?i:answers?(?: to (?:the|this) (?:question|problem))?"
            rf"{GAP}(?:=|[-–—→]\s|is(?![a-z])|equals|(?:should|would|must|will) be){TO_VALUE})")
HEADING = (r"(?im:^[^\w\n]*+_*+(?:(?:step )?[0-9]+[.:)] *+)?[*_]*+"
           rf"(?:(?:the|my|our|final|correct) ++){{0,3}}answer[*_ \t]*+\n{TO_VALUE})")
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

    A statement is the content of the last `\boxed{...}` or `\fbox{...}`; the rest of the line after
    the last `####`; the rest of the sentence after the last "answer is" or "answer:", or the line
    below a heading "Final Answer"; or the content of the last `<answer>...</answer>`. The one that
    ends latest wins, so "the answer is \boxed{5}" is the box. `fmt`, one of ANSWER_FORMATS, can
    admit one kind only. A last box that is empty or cut off is no answer, and nothing earlier
    replaces it. "The answer is correct" and headings such as "#### Conclusion" are read only where
    nothing else is stated. Text after the first end marker and a think block are ignored. Of a
    statement in words that holds one value only the value is returned (see _value_alone).

    Pass the completion alone: a prompt may contain `\boxed{}` itself.
    """
    return _last_statement(_completion(response), fmt) or None


def last_number(response: str) -> str | None:
    """The last number of the text, the lenient reading of VERL and lm-eval. Not for rewards."""
    numbers = NUMBER.findall(_completion(response))
    return numbers[-1].replace(",", "") if numbers else None


def lenient_correct(response: str, reference: str) -> bool:
    """Is the stated answer right, or the last number? Never below the last number alone."""
    readings = (extract_answer(response), last_number(response))
    return any(reading and same_answer(reading, reference) for reading in readings)


def _completion(response: str) -> str:
    """The part of a completion that can hold the answer."""
    thinking, _, rest = END_MARKER.split(response, maxsplit=1)[0].rpartition("</think>")
    return (rest if rest.strip() else thinking)[-MAX_RESPONSE:]


def _last_statement(text: str, fmt: str = "any") -> str | None:
    """The answer: None where nothing is stated, "" where the last statement is empty or cut off."""
    for patterns in (STATEMENTS, WEAK_STATEMENTS):
        found = []  # (where the statement ends, its content)
        for kind, pattern in patterns.items():
            if fmt in ("any", kind):
                last = list(pattern.finditer(text))[-1:]
                found += [_content(kind, text, match.end()) for match in last]
        if found:
            return _bare(_value_alone(max(found)[1]))
    return None


def _content(kind: str, text: str, start: int) -> tuple[int, str]:
    """(end, content) of the statement whose content begins at `start`."""
    if kind == "boxed":
        return _box(text, start)
    if kind == "tags":
        content, closing, _ = text[start:].partition("</answer>")
        answer = _last_statement(content) if closing else ""
        return start + len(content), content if answer is None else answer
    line = text[start:start + 2 * MAX_ANSWER].partition("\n")[0].partition("</answer>")[0]
    return start, _sentence(line) if kind == "phrase" else line


def _box(text: str, start: int) -> tuple[int, str]:
    r"""(end, content) of a box; one that is cut off has no content and ends with the text."""
    if not text.startswith("{", start):  # \boxed 7 is TeX for \boxed{7}
        token = re.compile(r"[\w.,-]{0,50}").match(text, start)
        return token.end(), token[0]
    depth, braces = 0, re.compile(r"\\.|[{}]", re.S)  # \{ is no brace
    for brace in braces.finditer(text, start, start + 10 * MAX_ANSWER):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0 and brace[0] == "}":
            return brace.end(), text[start + 1:brace.start()]
    return len(text), ""


def _sentence(line: str) -> str:
    """The line up to the first dot before white space that is outside braces and $...$."""
    for dot in re.finditer(r"(?<!\bM[rs])(?<!\bDr)(?<!\bsq)(?<!\b[ie]\.[eg])\.(?=\s|$)", line):
        before, after = line[:dot.start()], line[dot.end():]
        in_math = before.count("$") % 2 != before.count(r"\$") % 2 and "$" in after
        if re.match(r"\s+[A-Z][a-z]", after):  # "$18. She has $5 left" is no formula
            in_math = False
        if before.count("{") == before.count("}") and not in_math:
            return before
    return line


def _bare(answer: str) -> str:
    """The answer without the dollar signs, emphasis and final dot around it."""
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
        answer = answer.strip(" \t\r\n*$`").lstrip("=")
        answer = answer if answer.endswith("...") else answer.rstrip(" \t\r\n*$`.")
        answer = answer.removeprefix(opening).removesuffix(closing)
    return answer.strip()


# --- statements in words: "Tom has 7 apples, because 3 + 4 = 7" states 7 ------------------------

RELATED = (  # words before a number that is not the value: "the number after 7", "step 7"
    "and of after before by to at on from past until near against step part case section question"
    " problem exercise example method solution figure table equation page day option line number"
    " version grade year room level stage phase round type class row column")


def _any_of(words: str, after: str = r"\b|n['’]t\b|\?") -> re.Pattern:
    words = f"{words} {words.title()}"  # not in capitals, where NO may be a line
    return re.compile(rf"\b(?:{words.replace(' ', '|')}){after}")


DOUBT = _any_of(f"{DOUBTED} could might may", r"\b|\?")
NO_NAME = _any_of(f"{DENIED} {DOUBTED} {MULTIPLE}")
VETO = _any_of(f"{DENIED} {DOUBTED} {MULTIPLE} {ALTERED}")
LABEL = _any_of(RELATED, " *$")
TEXT = re.compile(r"\\(?:text[a-z]*|[mh]box|math(?:rm|bf|it))\*? ?\{([^{}]*)\}")
EMPHASIS = re.compile(
    r"(?<![\w)\]}])(?:_+(?=[^\s{_])|\*\*)|(?<=\S)_+(?![\w{\\])|\*\*(?![\w({\\+-])")
WORD = (  # of prose, not of a formula
    r"(?-i:(?<![\\A-Za-z{])(?!(?:(?:arc)?(?:sin|cos|tan|cot|sec|csc|exp|ln|log|sqrt|pi|infinity)"
    r"|[A-Z]{2,4})\b)(?:[A-Za-z]{2,}|[AaI](?= [A-Za-z]))[A-Za-z'’-]*)")
NUMERIC = re.compile(r"(?<!\^)(?<!\^\{)[0-9]|[∞π√]|\\(?:d?frac|sqrt|pi|infty)|infinity")
RESTATED = re.compile(rf"\s*(?:\\?#){{4,}}|[\s*_$#]*(?i:(?:so|thus|hence|therefore|the|my|our|final"
                      rf"|correct)\b[\s,*_]*){{0,4}}(?:{PHRASE}|{REWORDED})")
EXACTLY = f"{FILLER}|exactly|precisely|approximately|only"
OPENING = re.compile(  # "of course", "In 5 days, "
    rf"(?i)^(?:(?:{EXACTLY}|clearly|definitely|certainly|of course|for sure|finally|so|hence|that"
    r"|given by|found to be|going to be|the number|the integer)\b(?!['’])[,:]? ?|yes, (?=it )"
    r"|(?:in|on|after|for|with|by|since|when|because|given|over|during|within|at|each|every|per)\b"
    r"[^,;]*, (?=[A-Za-z]))+")
ASIDE = re.compile(  # "(dollars)"
    rf" [(\[](?=[^()\[\]0-9]*+[)\]])(?=[^()\[\]]*?(?:{WORD}|[A-Z]{{3}}))"
    rf"(?!(?:or|not|base|mod|{DOUBTED.replace(' ', '|')})\b)[^()\[\]]*[)\]]")
REMARK_BEGINS = re.compile(  # what follows the value; after a reason any number may stand
    r"(?i)(?:[,;:]| [-–—]+)? \(?(?P<reason>(?:because|since|given that|due to|rather than"
    r"|instead of|not counting|(?<=[,;] )(?:as|where|not|obtained|found|using|from)"
    r"|as(?= [$\\(]*[0-9]))\b)"
    r"|(?<!\\)[,;] (?!(?:or|and|but|nor|if|unless|else|otherwise|then|plus|minus|to|less|more)\b)"
    r"(?=[A-Za-z]{2}|I |i\.e)|[:;] (?=[0-9$(][^,;:]*[-+*×/=])"
    r"| [-–—]+ (?=[A-Za-z]{2})| (?=(?:so|which|that is|i\.e\.|and (?:we|this|that|it)) )"
    rf"| (?=[(\[](?:[^()\[\]]*(?:=|{WORD})"
    r"|(?-i:[0-9][^][(),A-Za-wyz]*[-+*×/x][^][(),A-Za-wyz]*[)\]]$)))")
COPULA = re.compile(
    r"(?i)(?:\b(?:is|are|was|were|equals?|becomes?|makes?|(?<!could )(?<!might )(?<!may )be"
    r"|an? (?:total|volume|area|cost|profit|length) of)|\b(?:it|that|there)['’]s)"
    rf"(?: (?:{EXACTLY}|to|by|given|found|an?|the|option|choice|total|sum|number|value|of))* *$")
FINITE = re.compile(r"(?i)(?:(?:is|are|was|were)(?! (?:the|what|left)\b)|does|did|has|had|fails)\b")


def _value_alone(content: str) -> str:
    r"""The value of a statement that holds more, else the statement as it is.

    Read are a statement in the statement ("Answer: 18", \boxed{\text{The answer is } 18}), what
    stands before a remark ("7, because 3+4=7", "18 (9 * 2)"), and the only value in a sentence
    ("The volume of the box is 120"). Where more than one number could be meant, or the words deny
    it or make another number of it ("7 or 8", "not 7", "7 less than 20"), nothing is taken out.
    """
    if len(content) > MAX_ANSWER:
        return content
    content = EMPHASIS.sub("", content)
    while restated := RESTATED.match(_unwrapped(content)):
        content = _unwrapped(content)[restated.end():]
    if box := STATEMENTS["boxed"].search(content):
        end, inside = _box(content, box.end())
        outside = content[:box.start()] + content[end:]
        return content if re.search("[0-9]", outside) or VETO.search(outside) else inside
    sentence = _sentence(content)
    rest = content[len(sentence):].strip(" .")
    if re.fullmatch(" *[0-9]", sentence) and sentence.strip() not in NUMBER.findall(rest):
        return content  # "1. Find the total"
    return _read(_unwrapped(sentence), rest) or content


def _unwrapped(text: str) -> str:
    r"""The text without its \text macros and with single spaces."""
    return " ".join(TEXT.sub(r" \1", text).split())


def _read(sentence: str, remark: str) -> str | None:
    """The only value that a sentence states, or None where that is not certain. `remark` follows
    the sentence."""
    opened = OPENING.sub("", sentence)
    main, reason = ASIDE.sub("", opened), None
    depths = notation.depths(main)
    if cut := next((c for c in REMARK_BEGINS.finditer(main) if depths[c.start()] == 0), None):
        main, remark, reason = main[:cut.start()], main[cut.end():], cut["reason"]
        if not reason and not NUMERIC.search(main) and not remark[:1].islower():
            return None  # a list of words
    in_words = re.search(WORD, main)
    if opened != sentence or in_words:
        main = main.rstrip("!")
    changed = bool(remark) or main != sentence
    value = _only_value(main, changed) if in_words else main if changed else None
    if reason:
        return value or (None if re.search("[0-9]", main) else main)  # "yes, because"
    doubt = NO_NAME if remark.startswith(("(", "[")) else DOUBT
    if not value or doubt.search(remark) or STATEMENTS["phrase"].search(remark):
        return None
    numbers = NUMBER.findall(remark)
    explains = cut is None or re.match(rf"which|that is|i\.e\.|[(\[].*{WORD}", remark)
    if not numbers or explains and len(numbers) > 1 and " or " not in remark:
        return value
    restated = same_answer(numbers[-1], value) or same_answer(remark.strip("i.e,=[]() "), value)
    return value if restated else None


def _only_value(sentence: str, changed: bool) -> str | None:
    """The one number or formula between the words of a sentence, with its unit."""
    parts = re.split(f"({WORD})", sentence)  # every second part is a word
    gaps = [i for i in range(0, len(parts), 2) if re.search(r"[\w∞√]", parts[i])]
    numeric = [i for i in gaps if NUMERIC.search(parts[i])]
    named = [i for i in gaps if parts[i].lstrip()[0] in "=:" or COPULA.search("".join(parts[:i]))]
    if named and set(parts[named[0] + 1::2]) <= {"and", "or"}:  # "the roots are 2 and 3"
        i, end = named[0], len(parts)
    elif len({parts[i].strip(" =:") for i in named or numeric}) == 1 and len(parts) < 120:
        i = (named or numeric)[-1]
        end = i + 1
    else:
        return None
    before, value, after = "".join(parts[:i]), "".join(parts[i:end]), "".join(parts[end:])
    if numeric and numeric[-1] >= end or VETO.search(after) or FINITE.match(after):
        return None
    if named:
        compared = " than " in before and NUMERIC.search(before)
        computed = i == 2 and re.search(r"[-+*/^0-9]|\\frac", parts[0])  # "2x is 8"
        doubtful = compared or computed or re.match(r"\W*[0-9]", before) or NO_NAME.search(before)
    else:
        alone = i == 2 and value.lstrip()[0] not in "=:("  # one word before it: "June 20"
        doubtful = alone or LABEL.search(before) or VETO.search(before.replace(" and ", " "))
    touching = before and value[0] not in " =:" or after and value[-1] != " "
    words = [word.partition("^")[0].strip(".,").lower() for word in after.split()]
    plain = not changed and not before and len(words) <= 4 and not NOT_UNITS & set(words)
    if doubtful or touching or plain:  # plain: a number with its unit, as it should be
        return None
    known = len(list(takewhile(lambda word: notation.singular(word) in notation.UNITS, words)))
    return " ".join([value.strip(" ,;:="), *after.split()[:known]])


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
    stated = _last_statement(text)
    return same_answer(text if stated is None else stated, reference)


def same_answer(answer: str, reference: str) -> bool:
    """is_correct for an answer that has been extracted already."""
    answer, reference = answer.strip(), reference.strip()
    if answer == reference or not answer or max(len(answer), len(reference)) > MAX_ANSWER:
        return answer == reference != ""
    a, b = normalise(answer), normalise(reference)
    if _equal(a, b):
        return True
    (main_a, condition_a), (main_b, condition_b) = map(notation.split_condition, (a, b))
    agree = not condition_a or not condition_b or _equal(condition_a, condition_b)
    return agree and (main_a, main_b) != (a, b) and _equal(main_a, main_b)


# --- structure: lists, relations, unions, tuples, matrices --------------------------------------

TURNED = str.maketrans(">≥", "<≤")
CHOICE = re.compile(r'"?(?:(?:[Oo]ption|[Cc]hoice)(?: |(?=\()))?["(]*([A-Za-z])[")]*')
LABELLED_CHOICE = re.compile(r'"?(?:(?:[Oo]ption|[Cc]hoice) )?["(]*([A-J])'
                             r'(?:"?[.:]|"?\) |\)"(?=[0-9\\ ]))(?!.*\([A-J]\))')


def _equal(a: str, b: str, depth: int = 0) -> bool:
    """Are two normalised answers the same? They are taken apart layer by layer, from outside."""
    if a == b or depth > 5:
        return a == b
    depth += 1
    list_a, list_b = _members(a), _members(b)
    if len(list_a) != 1 or len(list_b) != 1:
        return _same_multiset(list_a, list_b, depth)
    (a,), (b,) = list_a, list_b
    choices = [CHOICE.fullmatch(x) or LABELLED_CHOICE.match(x) for x in (a, b)]
    if all(choices) and (CHOICE.fullmatch(a) or CHOICE.fullmatch(b)):
        letter_a, letter_b = choices[0][1], choices[1][1]
        return letter_a == letter_b or "(" in a + b and letter_a.upper() == letter_b.upper()
    relation_a, relation_b = _relation(a), _relation(b)
    if relation_a[1] or relation_b[1]:
        return _same_relation(*relation_a, *relation_b, depth)
    if "∪" in a + b:
        return _same_multiset(notation.split(a, "∪"), notation.split(b, "∪"), depth)
    if r"\begin" in a + b:
        return _same_sequence(_matrix(a), _matrix(b), depth)
    items = [notation.split(x[1:-1], ",;") if notation.wrapped(x, "([", ")]") else [x]
             for x in (a, b)]
    if max(map(len, items)) > 1:
        return a[0] + a[-1] == b[0] + b[-1] and _same_sequence(*items, depth)
    if ":" in a and ":" in b:
        return _same_sequence(notation.split(a, ":"), notation.split(b, ":"), depth)
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


def _members(text: str) -> list[str]:
    r"""The answers that a bare list, a set or a \pm holds; one for anything else."""
    name, *rest = re.split("[∈=]", text, maxsplit=1)
    if rest and notation.wrapped(rest[0], "⦃{", "⦄}") and _is_name(re.sub(r"∪|\\cap", "", name)):
        text = rest[0]  # A∪B=⦃1,2⦄, x∈⦃1,2⦄
    if notation.wrapped(text, "⦃", "⦄"):
        text = re.sub(r"^⦃[A-Za-z](?:∈\(-∞,∞\))? ?[|:](.*)⦄$", r"\1", text)  # ⦃x|-2<x<1⦄
    text = _conditions_to_union(text)
    if notation.wrapped(text, "⦃{", "⦄}"):
        text = text[1:-1]
    members = []
    for item in filter(None, notation.split(text, ",;")):
        exact, _, rounded = item.partition("≈")
        item = exact if exact and not _is_name(exact) else rounded or item
        if item.count("±") == 1:
            members.append(item.replace("±", "+").replace("∓", "-"))
            item = item.replace("±", "-").replace("∓", "+")
        members.append(item)
    return members


def _conditions_to_union(text: str) -> str:
    r"""Conditions on one name as a set: x<1 or x>3, x≥1 and x<3, x≠2,5, the reals without ⦃2,5⦄."""
    if holes := re.fullmatch(r"([A-Za-z])≠(.+)|\(-∞,∞\) ?(?:\\setminus|-)⦃(.+)⦄", text):
        points = notation.split((holes[2] or holes[3]).replace(f"{holes[1]}≠", ""), ",")
        if all(map(_value, points)):
            ends = ["-∞", *sorted(points, key=lambda point: _value(point)[0].real), "∞"]
            return "∪".join(f"({left},{right})" for left, right in zip(ends, ends[1:]))
    parts = [_relation(part) for part in notation.split(text, ";" if ";" in text else ",")]
    all_signs = [signs for _, signs in parts]
    if len(parts) < 2 or not all(all_signs) or set(all_signs) == {"="}:
        return text
    names, values = zip(*(_meaning(*part) for part in parts))
    if len(set(names)) > 1 or any(len(value) != 1 for value in values):
        return text
    sets = [f"⦃{value}⦄" if sign == "=" else value for (value,), sign in zip(values, all_signs)]
    if ";" in text:
        return "∪".join(sets)
    low, high = sorted(sets, key=lambda ray: ray.startswith("(-∞"))[:2]
    if len(sets) == 2 and low.endswith(",∞)") and high.startswith("(-∞,"):
        return low[:-2] + high[4:]  # [1,∞) and (-∞,3) are [1,3)
    return text


def _relation(text: str) -> tuple[list[str], str]:
    """The sides and the signs between them. A chain of > and ≥ is turned round."""
    sides = notation.split(text, notation.RELATIONS)
    outside = [c for c, depth in zip(text, notation.depths(text)) if depth == 0]
    signs = "".join(c for c in outside if c in notation.RELATIONS)
    if signs and set(signs) <= set(">≥"):
        return sides[::-1], signs[::-1].translate(TURNED)
    return sides, signs


NAMES = [(re.compile(pattern), replacement) for pattern, replacement in (
    # Arguments: P(X>2) is a name, but f(x+1) is another function.
    (r"([fghpqE-HPQ]'*(?:\^\{-1\})?|\\(?:sin|cos|tan|log|ln))\((?![a-z][-+])[^()]*\)", r"\1"),
    (r"_(?:\{[^{}]*\}|\w)", ""),
    (r'"[^"]*" ?', "Q"),
    (r"\\frac\{[^{}0-9^]+\}\{[^{}0-9^]+\}", "R"),  # \frac{AM}{MB}
    (r"\|[^|0-9=<>^]+\|", "A"),  # |z|
)]
NO_NAME_SIGNS = re.compile(
    r"^[0-9.]|\\(?:frac|sqrt|binom|\$)|[-+*/^|!%=<>≤≥∪π]|(?<![\\A-Za-z])[A-Za-z]{2,} ")


def _is_name(text: str, compound: bool = False) -> bool:
    r"""Can this stand before "=" as what was asked for? x, f(3), (x,y), \angle ABC, "Total cost",
    \frac{AM}{MB}, |z|, not 2x. With `compound` also m+n, AB*BC and \int f, not x+1."""
    if (len(text) > 80 or not re.search('[A-Za-z"]', text)
            or NO_NAME.search(text) or text.strip(' "') in NOT_UNITS):
        return False
    if compound and text.startswith((r"\lim", r"\int", r"\sum")):
        return True
    for pattern, replacement in NAMES:
        text = pattern.sub(replacement, text)
    if compound:
        text = re.sub(r"(?<=[A-Za-z)\]}])[-+*](?=[A-Za-z\\\[])", "", text)
    if text[:1] in "QfghABCM":
        text = re.sub(r"\^\{?-1\}?(?=\(|$)", "", text)  # f^{-1}(x), A^{-1}
    return not NO_NAME_SIGNS.search(text)


def _meaning(sides: list[str], signs: str, compound: bool = False) -> tuple[str, list[str]]:
    """(name, values): ('x', ['5']) for x = 5, ('x', ['[2,∞)']) for x ≥ 2; equal sides without a
    name have the name ''."""
    opening = "[" if signs[:1] == "≤" else "("
    closing = "]" if signs[-1:] == "≤" else ")"
    if len(signs) == 2 and set(signs) <= set("<≤") and _is_name(sides[1]):
        return sides[1], [f"{opening}{sides[0]},{sides[2]}{closing}"]
    if signs in ("<", "≤", "∈") and _is_name(sides[0]):
        return sides[0], [sides[1] if signs == "∈" else f"(-∞,{sides[1]}{closing}"]
    if signs in ("<", "≤") and _is_name(sides[1]):
        return sides[1], [f"{opening}{sides[0]},∞)"]
    if set(signs) - {"="} or signs and all(map(_words, sides)):  # LRAC = SRMC is no value of LRAC
        return "", []
    if signs and _is_name(sides[0], compound):
        return sides[0], sides[1:]
    return (sides[-1], sides[:-1]) if signs and _is_name(sides[-1]) else ("", sides)


def _same_relation(sides_a: list[str], signs_a: str, sides_b: list[str], signs_b: str,
                   depth: int) -> bool:
    """Equations, inequalities and memberships against one another or a bare value or set."""
    name_a, values_a = _meaning(sides_a, signs_a, compound=True)
    name_b, values_b = _meaning(sides_b, signs_b)
    y_is_f = r"y[a-z]\([a-z]\)|[a-z]\([a-z]\)y"  # y = 2x is f(x) = 2x
    if not signs_a or not signs_b or name_a == name_b or re.fullmatch(y_is_f, name_a + name_b):
        pairs = [(x, y) for x in values_a for y in values_b]
        if pairs and all(_equal(x, y, depth) for x, y in pairs):
            return True
    if signs_a == signs_b == "=" and all(map(_words, sides_a + sides_b)):
        return _same_multiset(sides_a, sides_b, depth)
    in_order = signs_a == signs_b and _same_sequence(sides_a, sides_b, depth)
    if in_order or signs_a != signs_b or len(signs_a) > 1:
        return in_order
    difference = _value("({})-({})".format(*sides_a))
    ratio = _value("(({})-({}))/(({})-({}))".format(*sides_a, *sides_b))  # constant: 2x=4, x-2=0
    if not difference or not ratio or _same_number(*difference) or not _same_number(*ratio):
        return False
    return signs_a == "=" or signs_a in "<≤" and ratio[0].real > 0


def _matrix(text: str) -> list[str]:
    r"""The rows of a matrix (not of a determinant) as tuples, each entry times a factor before."""
    matrix = re.fullmatch(r"(.*?)\[?\\begin\{([pbB]?matrix|array)\}(.*)\\end\{\2\}[])]?", text)
    if not matrix or r"\begin" in matrix[3]:
        return []
    factor = matrix[1].rstrip("[(*")
    factor = {"": "1", "-": "-1"}.get(factor, factor)
    body = re.sub(r"^\{[^{}]*\}", "", matrix[3]) if matrix[2] == "array" else matrix[3]
    rows = []
    for row in re.split(r"\\\\(?:\[[0-9.]+[a-z]{2}\])?", body):
        if row.strip():
            cells = [f"({factor})*({cell})" for cell in row.strip().split("&")]
            rows.append(f"({','.join(cells)})")
    return rows


# --- atoms: words, or expressions with or without a unit ----------------------------------------

def _same_atom(a: str, b: str) -> bool:
    words_a, words_b = _words(a), _words(b)
    in_capitals = words_a and words_b and (a + b).isupper()
    if words_a == words_b != "" or max(len(words_a), len(words_b)) > 3 or in_capitals:
        return words_a == words_b
    (a, unit_a), (b, unit_b) = notation.split_unit(a), notation.split_unit(b)
    if unit_a and unit_b and unit_a != unit_b:
        return False
    value_a, value_b = _value(a), _value(b)
    if value_a and value_b:
        return all(map(_same_number, value_a, value_b))
    plain_a, plain_b = (re.sub(r"\{(\w)\}", r"\1", x) for x in (a, b))
    spaces = r'(?<![0-9]) | (?![0-9])|"'
    return re.sub(spaces, "", plain_a) == re.sub(spaces, "", plain_b)


def _words(text: str) -> str:
    """The letters of a text answer, without case; empty for anything but words."""
    letters = re.sub(r'[ ".,\']', "", text).strip("()")
    return letters.casefold() if letters.isalpha() and len(letters) > 1 else ""


# --- expressions: read and computed at once, exactly as long as possible ------------------------

MAX_BITS = 16_384  # of one exact number: 2^{5000} and 10^{3000} are in reach
MAX_WORK = 300_000  # bits of all the numbers of one expression
MAX_NESTING = 30
FUNCTIONS = {name: getattr(cmath, name.replace("arc", "a")) for name in
             "sin cos tan arcsin arccos arctan sinh cosh tanh exp".split()}
FUNCTIONS |= {"ln": cmath.log, "log": cmath.log10, "lg": cmath.log10,
              "sec": lambda x: 1 / cmath.cos(x), "csc": lambda x: 1 / cmath.sin(x),
              "cot": lambda x: 1 / cmath.tan(x)}
CONSTANTS = {"e": complex(math.e), "i": 1j, "π": complex(math.pi)}
KNOWN = "|".join(sorted([*FUNCTIONS, "sqrt", "floor", "ceil"], reverse=True))
TOKEN = re.compile(
    r"(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4})?)(?P<base>_(?:\{[^{}]*\}|[0-9]+))?"
    rf'|(?P<word>\\[A-Za-z]+|{KNOWN}|"[^"]*"|(?![ei])[A-Za-z]\([0-9]+\)|[^\W0-9_]|∞)'
    r"(?P<index>(?:'|_(?:\{[^{}]*\}|\w))*)|[^ ]")
PROSE = re.compile(rf"(?<![\\A-Za-z])(?!(?:{KNOWN}|pi)\b)"
                   r"(?:(?:[A-Za-z]{3,}|no) |not|(?<= )[A-Za-z]{3,})")
LEVEL = {"+": 1, "-": 1, "*": 2, "/": 2, "^": 4, "!": 5, "°": 5, "%": 5}  # 2x: level 2 too
CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|"}
OPAQUE = set("prod int lim cdots ldots dots cap setminus pmod".split())
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
    small = abs(p) * bits <= MAX_BITS and n <= 1000  # names are fractions: a^{mn} is not
    if not small and (n == 1 or base < 0):
        raise ValueError("too large")
    if n == 1:
        return base ** p
    if base < 0:
        root_of_sign = Fraction((-1) ** p) if n % 2 else complex(-1) ** float(exponent)
        return root_of_sign * _power(-base, exponent)
    if small:
        root = Fraction(*(math.isqrt(k) if n == 2 else round(float(k) ** (1 / n))
                          for k in base.as_integer_ratio()))
        if root.numerator.bit_length() * n <= MAX_BITS and root ** n == base:
            return root ** p
    return complex(base) ** float(exponent)


class _Expression:
    """A reader by precedence climbing whose methods return values. Names stand for fixed rational
    numbers."""

    def __init__(self, text: str, point: str):
        self.tokens, self.at = list(TOKEN.finditer(text)), 0
        self.point = point  # which of its two values a name takes
        self.names = self.nesting = self.bars = self.work = 0  # names so far, open | and bits
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
                before, term = value, self.read(1) if sign == "+" else -self.read(1)
                value = before + term
                if isinstance(value, complex) and before and term:
                    if not 1e-9 < abs(before) / abs(term) < 1e9:
                        raise ValueError("a term is lost in rounding")
            else:
                value = value / self.read(2) if sign == "/" else value * self.read(2)
            value = self.bounded(value)
        return value

    def starts_factor(self) -> bool:
        """Does a factor without a sign follow? A number must be a power: 2^6 3^5, not 1 2 or x2."""
        if not self.next() or not self.at:
            return False
        token, after = self.tokens[self.at], self.tokens[self.at + 1:self.at + 2]
        if token["number"]:
            return bool(after) and after[0][0] == "^"
        return bool(token["word"] or token[0] in "([{" or token[0] == "|" and not self.bars)

    def marked(self, value: Number, mark: str) -> Number:
        if mark != "!":
            return value * self.degree if mark == "°" else value
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
        if token[0] in ("+", "-"):
            value = self.read(3) if token[0] == "+" else -self.read(3)
        elif token["number"]:
            value = self.number(token)
        elif token[0] in CLOSING:
            self.bars += token[0] == "|"
            value = self.read()
            self.take(CLOSING[token[0]])
            if token[0] == "|":  # with names, a name for the square: |x| is x at positive points
                self.bars -= 1
                value = self.name(f"|{value * value}|") if self.names > names else abs(value)
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
        elif not word or word in OPAQUE or NOT_UNITS & {*re.findall("[a-z]+", word.lower())}:
            raise ValueError("not an expression")
        else:
            value = CONSTANTS.get(token[0]) or self.name(re.sub('["{}]', "", token[0]))
        self.nesting -= 1
        return self.bounded(value)

    def argument(self) -> Number:
        r"""What follows \frac or \sqrt: a group or one token; of a number one digit: \frac12."""
        if self.next() in ("", "+", "-"):
            raise ValueError("not an expression")
        text = self.next()
        if len(text) > 1 and text.isdigit():
            self.tokens[self.at:self.at + 1] = TOKEN.match(text[0]), TOKEN.match(text[1:])
        return self.primary()

    def number(self, token: re.Match) -> Number:
        mantissa, _, exponent = token["number"].lower().partition("e")
        integer, _, decimals = mantissa.partition(".")
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
        r"""\sin^2 x, \log_2 8, \cos 2t. An argument without brackets ends at a sign or function."""
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
