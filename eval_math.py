"""Maths problems: answer extraction and checking (the checker imports the standard library alone).

The rules follow the conventions that published numbers rest on: the last `\\boxed{}` of hendrycks/math, the `####` of
GSM8K, the "final answer is" of lm-eval's minerva_math. The comparison is stricter than most: nothing of an answer is ever
executed, numbers are exact, and what cannot be decided within fixed bounds of time and size counts as wrong.
"""
import cmath
import math
import re
import zlib
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

# --- extraction: which part of a completion is the answer? ------------------------------------------------------------

MAX_ANSWER = 1000        # characters; a longer answer is compared as a string only
MAX_RESPONSE = 100_000   # characters read, from the end: bounds the time that a runaway completion can take
END_MARKERS = ('<|im_end|>', '<|endoftext|>', '<|eot_id|>', '<|end_of_text|>', '<|im_start|>user', '</s>')
PHRASE = re.compile(r'[Aa][Nn][Ss][Ww][Ee][Rr](?:[\s*]*:|\s+[Ii][Ss]\b)[\s*]*:?')
NUMBER = re.compile(r'(?:(?<![\w)])-)?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)')


def extract_answer(response: str, fmt: str = 'any') -> str | None:
    r"""The final answer that a completion states, or None. Strict: nothing outside a statement is read.

    A statement is the last `\boxed{...}` or `\fbox{...}`, the line after the last `####`, or the sentence after the last
    "answer is" or "answer:". The one that ends latest wins, so "the answer is \boxed{5}" is the box. A last box that is
    open (cut off) or empty is no answer, and nothing earlier replaces it. Text after the first end marker and before the
    end of a think block is ignored. `fmt` ('any', 'boxed', 'hash', 'phrase') admits one kind of statement only. Grade
    completions alone: a prompt may contain `\boxed{}`. The rules are those of hendrycks/math, GSM8K and lm-eval.
    """
    return _last_statement(_completion(response), fmt)[1]


def last_number(response: str) -> str | None:
    """The last number of the text: the lenient reading behind some GSM8K scores. Not for rewards."""
    numbers = NUMBER.findall(_completion(response)[-10 * MAX_ANSWER:])
    return numbers[-1].replace(',', '') if numbers else None


def extract_lenient(response: str) -> str | None:
    """The stated answer, else the last number."""
    return extract_answer(response) or last_number(response)


def _completion(response: str) -> str:
    """The part of a completion that can hold the answer."""
    for marker in END_MARKERS:
        response = response.partition(marker)[0]
    after_thinking = response.rpartition('</think>')[2]
    return (after_thinking if after_thinking.strip() else response)[-MAX_RESPONSE:]


def _last_statement(text: str, fmt: str = 'any') -> tuple[bool, str | None]:
    """(is anything stated, the answer or None)."""
    found = []   # (where the statement ends, its answer)
    if fmt in ('any', 'boxed'):
        found += _last_box(text)
    if fmt in ('any', 'hash') and '####' in text:
        found.append((text.rindex('####'), text[text.rindex('####') + 4:].partition('\n')[0]))
    if fmt in ('any', 'phrase'):
        found += [(phrase.end(), _sentence(text[phrase.end():])) for phrase in list(PHRASE.finditer(text))[-1:]]
    return bool(found), _strip_delimiters(max(found)[1]) or None if found else None


def _last_box(text: str) -> list[tuple[int, str]]:
    r"""[(end, content)] of the last \boxed or \fbox; an open box has no content and ends with the text."""
    _, _, inner = text.rpartition('\\boxed') if text.rfind('\\boxed') > text.rfind('\\fbox') else text.rpartition('\\fbox')
    if len(inner) == len(text):
        return []
    inner = inner.lstrip()
    start = len(text) - len(inner)
    if not inner.startswith('{'):   # \boxed 7 is TeX for \boxed{7}
        token = re.match(r'[\w.,-]{0,50}', inner)[0]
        return [(start + len(token), token)]
    depth = 0
    for brace in re.finditer(r'\\.|[{}]', inner[:10 * MAX_ANSWER], re.S):   # a backslash takes a brace with it: \{
        depth += (brace[0] == '{') - (brace[0] == '}')
        if depth == 0 and brace[0] == '}':
            return [(start + brace.end(), inner[1:brace.start()])]
    return [(len(text), '')]


def _sentence(text: str) -> str:
    """Up to the end of the line or sentence: a dot before white space, so not in 3.5, and not within braces or $ $."""
    line = text.lstrip(' \n\t*')[:2 * MAX_ANSWER].partition('\n')[0]
    for dot in re.finditer(r'\.(?=\s|$)', line):
        before = line[:dot.start()]
        if before.count('{') == before.count('}') and before.count('$') % 2 == before.count(r'\$') % 2:
            return before
    return line


def _strip_delimiters(text: str) -> str:
    """Without the math delimiters, bold stars and final dot around an answer."""
    text = re.sub(r'^(?:\s|\*\*|\$|\\[(\[])+', '', text[:10 * MAX_ANSWER])
    while (shorter := re.sub(r'(?:\*\*|(?<!\\)[\s.$]|\\[)\]])$', '', text)) != text:
        text = shorter
    return text


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
    answer = (answer or '' if stated else text).strip()
    if not answer or max(len(answer), len(reference)) > MAX_ANSWER:
        return bool(answer) and answer == reference.strip()
    return _equal(normalise(answer), normalise(reference))


# LaTeX commands and unicode, and their plain spelling: after normalise() one symbol stands for one meaning.
COMMANDS = {name: symbol for symbol, names in {
    '': '! left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle limits hline phantom rm bf it',
    ' ': ', ; : quad qquad', r'\frac': 'dfrac tfrac cfrac', '*': 'times cdot ast', '/': 'div', '≤': 'le leq leqslant',
    '≥': 'ge geq geqslant', '<': 'lt', '>': 'gt', '≠': 'ne neq', '∈': 'in', '∪': 'cup', '∞': 'infty', '±': 'pm',
    '∓': 'mp', '≈': 'approx', 'π': 'pi', '°': 'circ degree', "'": 'prime', '|': 'mid vert lvert rvert', '=': 'equiv',
    '(': 'langle', ')': 'rangle rfloor rceil', '⦃': 'lbrace {', '⦄': 'rbrace }', '%': '%', 'floor(': 'lfloor',
    'ceil(': 'lceil', '⦃⦄': 'emptyset varnothing'}.items() for name in names.split()} | {' ': ' '}
UNICODE = str.maketrans({
    '−': '-', '–': '-', '×': '*', '·': '*', '⋅': '*', '∙': '*', '÷': '/', '⁄': '/', '²': '^2', '³': '^3', '½': r'\frac12 ',
    '¼': r'\frac14 ', '¾': r'\frac34 ', '⩽': '≤', '⩾': '≥', '′': "'", '’': "'", '，': ',', '：': ':', '（': '(', '）': ')',
    'θ': r'\theta ', 'α': r'\alpha ', 'β': r'\beta ', 'ω': r'\omega ', 'λ': r'\lambda ', '∅': r'\emptyset ',
    **dict.fromkeys('"⦃⦄\u00ad\u200b\u200e\u200f\ufeff')})
TEXT_MACRO = re.compile(r'\\(?:text(?:bf|it|rm|sf|tt|normal)?|[mh]box|math(?:rm|bf|it|sf|bb|cal)|operatorname)\*?'
                        r' ?\{([^{}]*)\}')


def normalise(text: str) -> str:
    r"""One spelling for what LaTeX, unicode and prose spell in several ways. Braces stay: 2^{n+1} is not 2^n+1.

    \text{cm} becomes "cm" in quotes, the braces of a set ⦃ ⦄, `and` a comma, `or` a semicolon.
    """
    text = re.sub(r'\s+', ' ', text.translate(UNICODE))
    text = text.replace(r'\mathbb{R}', r'(-\infty,\infty)').replace(r'\left.', '').replace(r'\right.', '')
    text = re.sub(r'(?<=[0-9])(?:\{,\}|,\\!) ?(?=[0-9]{3})', '', text)                             # 10{,}000
    text = re.sub(r'√ ?([0-9]+)', r'\\sqrt{\1}', text).replace('√', r'\sqrt ')
    for _ in range(2):                                                                             # macros in macros
        text = TEXT_MACRO.sub(_quote, text)
    text = re.sub(r'\\([A-Za-z]+|.)', lambda m: COMMANDS.get(m[1], m[0]), text)
    text = re.sub(r'(?<!\\)\$', '', text).replace('**', '^').replace('<=', '≤').replace('>=', '≥').replace('!=', '≠')
    text = re.sub(r'(?<![A-Za-z])(?:np|math)\.', '', text)                                         # program notation
    text = re.sub(r'(?<![A-Za-z])and(?![A-Za-z])', ',', text)
    text = re.sub(r'(?<![A-Za-z])or(?![A-Za-z])', ';', text)
    text = re.sub(r'(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])', _ungroup, text)         # 1,234,567
    text = re.sub(r' +', ' ', text).rstrip(' .,;:\\').lstrip(' ,;:')
    if re.fullmatch(r'[-+]?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?', text):
        text = text.replace(' ', '')                                                               # 1 000
    text = re.sub(r'(?<![\w.}^])([0-9]+) ?\\frac ?(?:([0-9])([0-9])|\{ ?([0-9]+) ?\} ?\{ ?([0-9]+) ?\})',
                  r'(\1+\2\4/\3\5)', text)                                                         # 1\frac12
    text = re.sub(r'(?<![\w.}^])([0-9]+) ([0-9]+/[0-9]+)', r'(\1+\2)', text)                       # 1 1/2
    text = re.sub(r' ?([^\w\s"\\]) ?', r'\1', text)
    return re.sub(r'\^\{?°\}?', '°', text)


def _quote(macro: re.Match) -> str:
    """The content of a text macro: words in quotes, and what is not a word without."""
    content = macro[1].replace('"', '').strip()
    if content.strip(' ,') in ('and', 'or') or not re.search('[A-Za-z]', content):
        return f' {content} '
    return f'\\{content} ' if content in FUNCTIONS else f'"{content}"'


def _ungroup(number: re.Match) -> str:
    """1,234 without its comma, but not inside brackets, where (20,100) is a pair."""
    before = number.string[:number.start()]
    inside = sum(map(before.count, '([⦃')) > sum(map(before.count, ')]⦄'))
    return number[0] if inside else number[0].replace(',', '')


# --- structure: lists, relations, unions, tuples, matrices ------------------------------------------------------------

RELATIONS = '=<>≤≥≠∈'
TURNED = str.maketrans('>≥', '<≤')
CHOICE = re.compile(r'["(]*([A-Ja-j])[")]*')
LABELLED_CHOICE = re.compile(r'["(]*([A-J])"?[.:)](?!.*\([A-J]\))')


def _equal(a: str, b: str, depth: int = 0) -> bool:
    """Are two normalised answers the same? Takes them apart one layer at a time, the outermost first."""
    if a == b:
        return True
    if depth > 5:
        return False
    depth += 1
    list_a, list_b = _members(_conditions_to_union(a)), _members(_conditions_to_union(b))
    if len(list_a) != 1 or len(list_b) != 1:
        return _same_multiset(list_a, list_b, depth)
    (a,), (b,) = list_a, list_b
    choices = [CHOICE.fullmatch(x) or LABELLED_CHOICE.match(x) for x in (a, b)]
    if all(choices) and any(map(CHOICE.fullmatch, (a, b))):
        a, b = (choice[1].upper() if '(' in a + b else choice[1] for choice in choices)
        return a == b
    if any(c in RELATIONS for c in a + b):
        verdict = _same_relation(a, b, depth)
        if verdict is not None:
            return verdict
    if '∪' in a + b:
        return _same_multiset(_split(a, '∪'), _split(b, '∪'), depth)
    if r'\begin' in a + b:
        return _same_sequence(_matrix(a), _matrix(b), depth)
    items_a, items_b = (_split(x[1:-1], ',;') if _wrapped(x, '([', ')]') else [x] for x in (a, b))
    if len(items_a) > 1 or len(items_b) > 1:
        return a[0] + a[-1] == b[0] + b[-1] and _same_sequence(items_a, items_b, depth)
    if ':' in a and ':' in b:
        return _same_sequence(_split(a, ':'), _split(b, ':'), depth)
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
    return list(accumulate((c in '([{⦃') - (c in ')]}⦄') for c in text))


def _split(text: str, separators: str) -> list[str]:
    """Split at the separators that stand outside all brackets."""
    cuts = [i for i, depth in enumerate(_depths(text)) if depth == 0 and text[i] in separators]
    return [text[i + 1:j] for i, j in zip([-1, *cuts], [*cuts, len(text)])]


def _wrapped(text: str, opening: str, closing: str) -> bool:
    """Does one pair of brackets hold the whole text?"""
    return len(text) > 1 and text[0] in opening and text[-1] in closing and min(_depths(text)[:-1]) > 0


def _members(text: str) -> list[str]:
    r"""The answers that a bare list, a set or a \pm holds; one for anything else."""
    if _wrapped(text, '⦃', '⦄'):
        text = re.sub(r'^[A-Za-z](\||:)', '', text[1:-1])   # ⦃x|-2<x<1⦄
    members = []
    for item in filter(None, _split(text, ',;')):
        exact, _, rounded = item.partition('≈')
        item = exact if exact and not _is_name(exact) else rounded or item
        if item.count('±') == 1:
            members += [item.replace('±', '+').replace('∓', '-'), item.replace('±', '-').replace('∓', '+')]
        else:
            members.append(item)
    return members


def _relation(text: str) -> tuple[list[str], str]:
    """Sides and the signs between them, with > and ≥ turned round."""
    sides = _split(text, RELATIONS)
    ends = accumulate(len(side) + 1 for side in sides[:-1])
    signs = ''.join(text[end - 1] for end in ends)
    return (sides[::-1], signs[::-1].translate(TURNED)) if signs and set(signs) <= set('>≥') else (sides, signs)


def _is_name(text: str, of_sum: bool = False) -> bool:
    r"""Can this stand before "=" as what was asked for? x, AB, f(3), (x,y), \angle ABC; not 2x + z. m + n if `of_sum`."""
    return (len(text) <= 30 and bool(re.search('[A-Za-z"]', text)) and not re.search(r'[-*/^|!%=<>≤≥∪π]', text)
            and not re.match(r'[0-9.]|\\frac|\\sqrt', text) and not re.search(r'(?<![\\A-Za-z])[A-Za-z]{2,} ', text)
            and ('+' not in text or of_sum and not re.search('[0-9]', text)))


def _meaning(sides: list[str], signs: str, of_sum: bool = False) -> tuple[str, list[str]]:
    """(name, values): ('x', ['5']) for x = 5, ('x', ['[2,∞)']) for x ≥ 2, an unnamed chain's sides for the rest."""
    left, right = '[' if signs[0] == '≤' else '(', ']' if signs[-1] == '≤' else ')'
    if set(signs) <= set('<≤') and len(signs) == 2 and _is_name(sides[1]):
        return sides[1], [f'{left}{sides[0]},{sides[2]}{right}']
    if signs in '<≤' and any(map(_is_name, sides)):
        return (sides[0], [f'(-∞,{sides[1]}{right}']) if _is_name(sides[0]) else (sides[1], [f'{left}{sides[0]},∞)'])
    if signs in '∈≠' and _is_name(sides[0]):
        return sides[0], [sides[1] if signs == '∈' else f'(-∞,{sides[1]})∪({sides[1]},∞)']
    if set(signs) == {'='}:
        if _is_name(sides[0], of_sum):
            return sides[0], sides[1:]
        return (sides[-1], sides[:-1]) if _is_name(sides[-1]) else ('', sides)
    return '', []


def _conditions_to_union(text: str) -> str:
    """x < 1 or x > 3 as the union of two intervals."""
    parts = [_relation(part) for part in text.split(';')] if ';' in text else []
    values = [_meaning(*part)[1] if part[1] and part[1] != '=' else [] for part in parts]
    return '∪'.join(value for value, in values) if values and all(map(len, values)) else text


def _same_relation(a: str, b: str, depth: int) -> bool | None:
    """Equations, inequalities and memberships, also against the bare value or set. None: no relation after all."""
    (sides_a, signs_a), (sides_b, signs_b) = _relation(a), _relation(b)
    if not signs_a and not signs_b:
        return None
    if not signs_a or not signs_b:
        _, values = _meaning(sides_a, signs_a, of_sum=True) if signs_a else _meaning(sides_b, signs_b)
        return bool(values) and all(_equal(value, b if signs_a else a, depth) for value in values)
    (name_a, values_a), (name_b, values_b) = _meaning(sides_a, signs_a), _meaning(sides_b, signs_b)
    if name_a == name_b and values_a and values_b and all(_equal(x, y, depth) for x in values_a for y in values_b):
        return True
    if signs_a != signs_b:
        return False
    if _same_sequence(sides_a, sides_b, depth) or len(signs_a) > 1:
        return _same_sequence(sides_a, sides_b, depth)
    x, y = (_value(f'({left})-({right})') for left, right in (sides_a, sides_b))
    if not x or not y or 0 in x + y:
        return False
    factor = x[0] / y[0]   # 2x = 4 and x - 2 = 0 differ by a factor; for inequalities it must be positive
    return _same_number(factor, x[1] / y[1]) and (signs_a == '=' or signs_a in '<≤' and factor.real > 0)


def _matrix(text: str) -> list[str]:
    r"""The rows of a matrix as tuples, under any kind of bracket; a factor before it goes into the entries."""
    factor, _, rest = text.partition(r'\begin{')
    kind, _, rest = rest.partition('}')
    body, _, end = rest.rpartition(r'\end{' + kind)
    if not re.fullmatch('[A-Za-z]*matrix|array', kind) or r'\begin' in body or not re.fullmatch(r'\}[])|]?', end):
        return []
    if kind == 'array':
        body = re.sub(r'^\{[^{}]*\}', '', body)
    factor = factor.rstrip('[(|*')
    scale = f'({factor}1)*' if factor == '-' else f'({factor})*' if factor else ''
    rows = [row.strip() for row in body.split(r'\\')]
    return ['(' + ','.join(f'{scale}({cell})' for cell in row.split('&')) + ')' for row in rows if row]


# --- atoms: words, or expressions with or without a unit --------------------------------------------------------------

UNITS = {name: names.split()[0] for names in (
    '° degree deg', '% percent percentage pct', '$ dollar usd', '€ euro', '£', 'cent', 'm meter metre', 'mm millimeter',
    'cm centimeter centimetre', 'km kilometer kilometre', 'in inch inche', 'ft foot feet', 'mi mile', 'yd yard', 'mph',
    's second sec', 'min minute', 'h hour hr', 'am', 'pm', 'g gram', 'kg kilogram', 'mg', 'lb pound', 'oz ounce',
    'l liter litre', 'ml', '2 square sq', '3 cubic cu') for name in names.split()}
NOT_UNITS = frozenset('is are was be not no if but so because since then the this it either neither'.split())


def _same_atom(a: str, b: str) -> bool:
    words_a, words_b = _words(a), _words(b)
    if words_a == words_b != '' or max(len(words_a), len(words_b)) > 3:
        return words_a == words_b
    (a, unit_a), (b, unit_b) = _split_unit(a), _split_unit(b)
    if unit_a and unit_b and unit_a != unit_b:
        return False
    value_a, value_b = _value(a), _value(b)
    return all(map(_same_number, value_a, value_b)) if value_a and value_b else _plain(a) == _plain(b)


def _words(text: str) -> str:
    """The letters of a text answer, without case; empty for anything but words."""
    letters = re.sub(r'[ ".,\']', '', text).strip('()')
    return letters.casefold() if letters.isalpha() and len(letters) > 1 else ''


def _plain(text: str) -> str:
    """What is left to compare as a string: no spaces, no quotes, no braces around one character."""
    return re.sub(r'(?<![0-9]) | (?![0-9])|"', '', re.sub(r'\{(\w)\}', r'\1', text))


def _split_unit(text: str) -> tuple[str, str]:
    r"""(value, unit) of 5"cm"^2, 5 square cm, \$5, 5°, 5%. In plain text a unit is known, or words after a space."""
    if money := re.match(r'(-?)(\\\$|€|£)', text):
        return money[1] + text[money.end():], money[2][-1]
    power = re.search(r'\^\{?[23]\}?$', text)
    quote = text.find('"')
    head = text[:quote] if quote > 0 else re.sub(r'[A-Za-z/. €£]{0,40}$', '', text[:power.start()] if power else text)
    tail = text[len(head):]
    words = [word.lower().removesuffix('s') if len(word) > 2 else word.lower() for word in re.findall('[A-Za-z€£]+', tail)]
    if quote > 0:
        is_unit = re.fullmatch(r'(?:"[^"]*"(?:\^\{?-?[0-9]\}?)?[ /*]?)+', tail)
    else:
        known = all(word in UNITS for word in words) and (power or len(''.join(words)) > 1 or tail in '€£')
        is_unit = known or tail[:1] == ' ' and max(map(len, words), default=0) > 2
    if not is_unit or not 0 < len(words) <= 4 or NOT_UNITS & set(words) or not head.rstrip(' *'):
        return text, text[-1] if text.endswith(('°', '%')) else ''
    return head.rstrip(' *'), ' '.join(sorted(UNITS.get(word, word) for word in words + re.findall('[0-9]', tail)))


# --- expressions: read and computed at once, exactly as long as possible ----------------------------------------------

MAX_BITS = 8192      # of one exact number: 2^{4181} and 10^{1000} are in reach
MAX_WORK = 300_000   # bits of all the numbers of one expression
MAX_NESTING = 30
FUNCTIONS = {name: getattr(cmath, name.replace('arc', 'a')) for name in
             'sin cos tan arcsin arccos arctan sinh cosh tanh exp'.split()}
FUNCTIONS |= {'ln': cmath.log, 'log': cmath.log10, 'lg': cmath.log10, 'sec': lambda x: 1 / cmath.cos(x),
              'csc': lambda x: 1 / cmath.sin(x), 'cot': lambda x: 1 / cmath.tan(x)}
NAME = rf"""(?:\\[A-Za-z]+|sqrt|floor|ceil|{'|'.join(sorted(FUNCTIONS, reverse=True))}|"[^"]*"|[^\W0-9_]|∞)"""
TOKEN = re.compile(r'(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)(?P<base>_(?:\{[^{}]*\}|[0-9]+))?'
                   rf"|(?P<name>{NAME})(?P<index>(?:'|_(?:\{{[^{{}}]*\}}|\w))*)|[^ ]")
OPAQUE = frozenset(r'\sum \prod \int \lim \cdots \ldots \dots \begin \end \cap \setminus \pmod \bmod'.split())
CLOSING = {'(': ')', '[': ']', '{': '}', '|': '|'}
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
    """The expression at two fixed points; () if it is none, or too large. Those that agree at both are taken as equal."""
    try:
        return tuple(_Expression(text, point).parse() for point in '12')
    except (ValueError, ArithmeticError):
        return ()


def _power(base: Number, exponent: Number) -> Number:
    """base ** exponent, exact if it is rational, and with the real root of a negative number where there is one."""
    if not isinstance(base, Fraction) or not isinstance(exponent, Fraction):
        return complex(base) ** complex(exponent)
    n = exponent.denominator
    if abs(exponent.numerator) * (base.numerator.bit_length() + base.denominator.bit_length()) > MAX_BITS or n > 1000:
        raise ValueError('too large')
    if n == 1:
        return base ** exponent.numerator
    if base < 0:
        sign = complex(-1) ** float(exponent) if n % 2 == 0 else Fraction((-1) ** exponent.numerator)
        return sign * _power(-base, exponent)
    root = Fraction(*(math.isqrt(k) if n == 2 else round(float(k) ** (1 / n)) for k in base.as_integer_ratio()))
    if root.numerator.bit_length() * n <= MAX_BITS and root ** n == base:
        return root ** exponent.numerator
    return complex(base) ** float(exponent)


class _Expression:
    """A recursive-descent reader of

    sum: product {+- product};  product: signed {[*/] signed};  signed: {+-} power;  power: primary {!°%} [^ argument]

    whose methods return values. Names stand for fixed rational numbers, so most expressions stay exact.
    """

    def __init__(self, text: str, point: str):
        self.tokens, self.at, self.point = list(TOKEN.finditer(text)), 0, point
        self.names, self.nesting, self.work, self.bars, self.degree = 0, 0, 0, 0, Fraction(1)

    def parse(self) -> Number:
        value = self.sum()
        if self.next():
            raise ValueError('not an expression')
        return value

    def next(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ''

    def take(self, expected: str = '') -> re.Match:
        if not self.next() or expected and self.next() != expected:
            raise ValueError('not an expression')
        self.at += 1
        return self.tokens[self.at - 1]

    def bounded(self, value: Number) -> Number:
        if isinstance(value, Fraction):
            bits = value.numerator.bit_length() + value.denominator.bit_length()
            self.work += bits
            if bits > MAX_BITS or self.work > MAX_WORK:
                raise ValueError('too large')
        elif not 1e-200 < abs(value) < 1e200:   # near underflow all numbers look alike
            raise ValueError('out of range')
        return value

    def sum(self) -> Number:
        value = self.product()
        while self.next() in ('+', '-'):
            term = self.product() if self.take()[0] == '+' else -self.product()
            value, before = value + term, value
            if isinstance(value, complex) and not 1e-9 < abs(before) / abs(term) < 1e9:
                raise ValueError('a term is lost in rounding')
            value = self.bounded(value)
        return value

    def product(self) -> Number:
        value = self.signed()
        while True:
            if self.next() in ('*', '/'):
                value = value * self.signed() if self.take()[0] == '*' else value / self.signed()
            elif self.starts_factor():
                value = value * self.power()
            else:
                return value
            value = self.bounded(value)

    def starts_factor(self) -> bool:
        """Does a factor without a sign follow? Two numbers in a row are no product."""
        if not self.next():
            return False
        token, before = self.tokens[self.at], self.tokens[self.at - 1]
        return bool(token['name'] or token['number'] and not before['number'] or token[0] in '([{'
                    or token[0] == '|' and not self.bars)

    def signed(self) -> Number:
        sign = 1
        while self.next() in ('+', '-'):
            sign = sign if self.take()[0] == '+' else -sign
        return sign * self.power()

    def power(self) -> Number:
        base = self.primary()
        while self.next() in ('!', '°', '%'):
            mark = self.take()[0]
            if mark == '!' and isinstance(base, Fraction) and base.denominator == 1 and 0 <= base <= 170:
                base = Fraction(math.factorial(int(base)))
            else:
                base = self.name(f'{base}!') if mark == '!' else base * self.degree if mark == '°' else base
        if self.next() != '^':
            return base
        self.take()
        return self.bounded(_power(base, self.signed() if self.next() in ('+', '-') else self.primary()))

    def primary(self) -> Number:
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            raise ValueError('too deep')
        token = self.take()
        word = (token['name'] or '').strip('\\')
        if token['number']:
            value = self.number(token)
        elif token[0] in CLOSING:
            self.bars += token[0] == '|'
            value = self.sum()
            self.take(CLOSING[token[0]])
            if token[0] == '|':
                self.bars -= 1
                value = abs(value) if isinstance(value, Fraction) else complex(abs(value))
        elif word == 'frac':
            value = self.argument() / self.argument()
        elif word == 'sqrt':
            degree = self.primary() if self.next() == '[' else Fraction(2)
            value = _power(self.argument(), 1 / degree)
        elif word in FUNCTIONS:
            value = self.function(word, token['index'])
        elif word in ('floor', 'ceil', 'binom'):
            names = self.names
            arguments = [self.argument() for _ in range(1 + (word == 'binom'))]
            value = self.whole(word, arguments) if self.names == names else self.name(f'{word}{arguments}')
        elif word and token[0] not in OPAQUE:
            constants = {'e': complex(math.e), 'i': 1j, 'π': complex(math.pi)}
            value = constants.get(token[0]) or self.name(token[0].replace('"', ''))
        else:
            raise ValueError('not an expression')
        self.nesting -= 1
        return self.bounded(value)

    def whole(self, word: str, arguments: list[Number]) -> Fraction:
        """Floor, ceiling, binomial coefficient of numbers."""
        if not all(isinstance(x, Fraction) for x in arguments):
            raise ValueError('inexact')
        if word != 'binom':
            return Fraction(getattr(math, word)(arguments[0]))
        if any(x.denominator > 1 or not 0 <= x <= 500 for x in arguments):
            raise ValueError('too large')
        return Fraction(math.comb(*map(int, arguments)))

    def argument(self) -> Number:
        r"""What follows \frac or \sqrt: a group or one token, of a number one digit: \frac12 is 1/2."""
        token = self.tokens[self.at] if self.next() else self.take()
        if len(token[0]) > 1 and token[0].isdigit():
            self.tokens[self.at:self.at + 1] = map(TOKEN.match, (token[0][0], token[0][1:]))
        return self.primary()

    def number(self, token: re.Match) -> Number:
        mantissa, _, exponent = token['number'].lower().partition('e')
        whole, _, decimals = mantissa.partition('.')
        if len(exponent) > 5 or abs(int(exponent or 0)) > 2000:
            raise ValueError('too large')
        if (token['base'] or '').strip('_{}') not in ('', '10'):   # 204_5 is a name: bases are not converted
            return self.name(token[0].lstrip('0').replace('{', '').replace('}', ''))
        return Fraction(int(whole + decimals), 10 ** len(decimals)) * Fraction(10) ** int(exponent or 0)

    def name(self, name: str) -> Fraction:
        """A fixed value for a name, another one at the other point."""
        self.names += 1
        return Fraction(100 + zlib.crc32((name + self.point).encode('utf-8', 'replace')) % 899, 331)

    def function(self, word: str, index: str) -> Number:
        r"""\sin^2 x, \log_2 8, \cos 2t: an argument without brackets reaches to the next sign or function."""
        power = self.take() and self.primary() if self.next() == '^' else Fraction(1)
        outer, self.degree = self.degree, Fraction(math.pi / 180)
        if self.next() in CLOSING:
            value = self.primary()
        else:
            value = self.signed()
            while self.starts_factor() and self.next().strip('\\') not in FUNCTIONS:
                value = self.bounded(value * self.power())
        self.degree = outer
        value = FUNCTIONS[word](complex(value))
        if index:
            value /= FUNCTIONS[word](complex(_Expression(index.strip('_{}'), self.point).parse()))
        return _power(value, power) if value else Fraction(0)
