"""Maths problems: answer extraction and checking (this half imports the standard library alone).

The rules follow the conventions that published numbers rest on: the last `\\boxed{}` of hendrycks/math, the `####` of
GSM8K, the "final answer is" of lm-eval's minerva_math. The comparison is stricter than most. Nothing of an answer is ever
executed, numbers are exact, and whatever cannot be decided within fixed bounds counts as wrong.
"""
import cmath
import math
import re
import zlib
from fractions import Fraction
from functools import lru_cache

# ----------------------------------------------------------------------------------------------------------------------
# Extraction: which part of a completion is the answer?

MAX_ANSWER = 1000        # characters; a longer answer is compared as a string only
MAX_RESPONSE = 100_000   # characters read, from the end: bounds the time that a runaway completion can take
END_MARKERS = ('<|im_end|>', '<|endoftext|>', '<|eot_id|>', '<|end_of_text|>', '<|im_start|>user', '</s>')
PHRASE = re.compile(r'[Aa][Nn][Ss][Ww][Ee][Rr](?:[\s*]*:|\s+[Ii][Ss]\b)[\s*]*:?')
NUMBER = re.compile(r'-?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:\.?[0-9]+)')


def extract_answer(response: str, fmt: str = 'any') -> str | None:
    r"""The final answer that a completion states, or None. Strict: text outside a statement is never read.

    A statement is the last `\boxed{...}` or `\fbox{...}`, the line after the last `####`, or the sentence after the last
    "answer is" or "answer:". The one that ends latest wins, so "the answer is \boxed{5}" is the box. A last box that is
    open (cut off) or empty is no answer, and nothing earlier replaces it. Text after the first end marker is ignored, and
    so is a think block. `fmt` ('any', 'boxed', 'hash', 'phrase') admits one kind of statement only. Grade completions
    alone: a prompt may contain `\boxed{}`. The rules are those of hendrycks/math, GSM8K and lm-eval's minerva_math.
    """
    return _last_statement(_completion(response), fmt)[1]


def last_number(response: str) -> str | None:
    """The last number of the text: the lenient reading that some GSM8K scores use. Never use it as a reward."""
    numbers = NUMBER.findall(_completion(response)[-MAX_ANSWER:])
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
    """(is there a statement, its answer or None)."""
    found = []   # (where it ends, answer)
    if fmt in ('any', 'boxed'):
        found += _last_box(text)
    at = text.rfind('####')
    if fmt in ('any', 'hash') and at >= 0:
        found.append((at, text[at + 4:].partition('\n')[0]))
    phrases = list(PHRASE.finditer(text)) if fmt in ('any', 'phrase') else []
    if phrases:
        found.append((phrases[-1].end(), _sentence(text[phrases[-1].end():])))
    if not found:
        return False, None
    return True, _strip_delimiters(max(found)[1]) or None


def _last_box(text: str) -> list[tuple[int, str]]:
    r"""[(end, content)] of the last \boxed or \fbox; an open box has no content and reaches to the end of the text."""
    start = max(text.rfind(r'\boxed'), text.rfind(r'\fbox'))
    if start < 0:
        return []
    start = text.index('box', start) + (5 if text[start + 1] == 'b' else 3)
    body = text[start:start + 10 * MAX_ANSWER]
    inner = body.lstrip()
    start += len(body) - len(inner)
    if not inner.startswith('{'):   # \boxed 7 is TeX for \boxed{7}
        token = re.match(r'[\w.,-]*', inner)[0]
        return [(start + len(token), token)]
    depth = 0
    for brace in re.finditer(r'\\.|[{}]', inner, re.S):   # a backslash takes the next character with it: \{
        depth += (brace[0] == '{') - (brace[0] == '}')
        if depth == 0 and brace[0] == '}':
            return [(start + brace.end(), inner[1:brace.start()])]
    return [(len(text), '')]


def _sentence(text: str) -> str:
    """Up to the end of the line or sentence. A dot ends it before white space, so not in 3.5 nor within braces or $ $."""
    line = text.lstrip(' \n\t*')[:2 * MAX_ANSWER].partition('\n')[0]
    for dot in re.finditer(r'\.(?=\s|$)', line):
        before = line[:dot.start()]
        if before.count('{') == before.count('}') and before.count('$') % 2 == before.count(r'\$') % 2:
            return before
    return line


def _strip_delimiters(text: str) -> str:
    """Without the math delimiters, bold stars and final dot around an answer."""
    previous = None
    while text != previous:
        previous = text
        text = text.strip().strip('*').rstrip('.').strip()
        for opening, closing in (('$', '$'), (r'\(', r'\)'), (r'\[', r'\]')):
            if text.startswith(opening):
                text = text[len(opening):]
            if text.endswith(closing) and not text.endswith('\\' + closing):
                text = text[:-len(closing)]
    return text


# ----------------------------------------------------------------------------------------------------------------------
# Comparison: does an answer equal the reference?

def is_correct(response: str, reference: str) -> bool:
    r"""True if the answer in `response` equals `reference`; a bool for any two strings, never an exception.

    `response` is a completion, read with extract_answer, or, if it makes no statement, a bare answer that is compared as
    a whole: a number somewhere in a long text is never picked out.

    Integers and decimals are exact at any size; a/b, mixed numbers, 4.5e33 and 4.5 \times 10^{33} go by value. A unit,
    percent or degree sign on one side only is ignored; different units differ; nothing is scaled by 100. `x = 5` is 5.
    Bare lists and sets are multisets ("5 or 7" is two answers), tuples are ordered, intervals need their brackets;
    `x \ge 2` is [2, \infty). Matrices go entry by entry, equations up to a factor. Expressions are equal if they agree
    at fixed points: rational ones exactly, others to 11 digits. Text goes without case. The rest is compared as strings.
    """
    text = _completion(response)
    stated, answer = _last_statement(text)
    answer = answer if stated else text.strip()
    if not answer or not reference.strip():
        return False
    if max(len(answer), len(reference)) > MAX_ANSWER:
        return answer.strip() == reference.strip()
    return _equal(normalise(answer), normalise(reference))


# LaTeX commands and their plain spelling. After normalise() there is one symbol for one meaning.
COMMANDS = {name: symbol for symbol, names in {
    '': 'left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle limits hline phantom rm bf it',
    ' ': 'quad qquad space', r'\frac': 'dfrac tfrac cfrac', '*': 'times cdot ast', '/': 'div', '≤': 'le leq leqslant',
    '≥': 'ge geq geqslant', '<': 'lt', '>': 'gt', '≠': 'ne neq', '∈': 'in', '∪': 'cup', '∞': 'infty', '±': 'pm',
    '∓': 'mp', '≈': 'approx', 'π': 'pi', '°': 'circ degree', "'": 'prime', '|': 'mid vert lvert rvert', '=': 'equiv', '⦃⦄': 'emptyset varnothing',
    '(': 'langle lparen', ')': 'rangle rparen', '⦃': 'lbrace {', '⦄': 'rbrace }', '%': '%',
    '  ': ', ; : ! >',   # thin spaces; made one space below
}.items() for name in names.split()}
COMMANDS[' '] = ' '
UNICODE = str.maketrans({
    '−': '-', '–': '-', '×': '*', '·': '*', '⋅': '*', '∙': '*', '÷': '/', '⁄': '/', '²': '^2', '³': '^3', '½': r'\frac12 ',
    '¼': r'\frac14 ', '¾': r'\frac34 ', '⩽': '≤', '⩾': '≥', '′': "'", '’': "'", '，': ',', '：': ':', '（': '(', '）': ')',
    'θ': r'\theta ', 'α': r'\alpha ', 'β': r'\beta ', 'ω': r'\omega ', 'λ': r'\lambda ', '∅': r'\emptyset ',
    '"': None, '\u200b': None, '\u200e': None, '\u200f': None, '\ufeff': None, '\u00ad': None, '⦃': None, '⦄': None})
TEXT_MACRO = re.compile(r'\\(?:text(?:bf|it|rm|sf|tt|normal)?|[mh]box|math(?:rm|bf|it|sf|bb|cal)|operatorname|textnormal)'
                        r'\*?\s*\{([^{}]*)\}')
FUNCTIONS = {name: getattr(cmath, name.replace('arc', 'a')) for name in
             'sin cos tan arcsin arccos arctan sinh cosh tanh exp'.split()}
FUNCTIONS |= {'ln': cmath.log, 'log': cmath.log10, 'lg': cmath.log10, 'sec': lambda x: 1 / cmath.cos(x),
              'csc': lambda x: 1 / cmath.sin(x), 'cot': lambda x: 1 / cmath.tan(x)}


def normalise(text: str) -> str:
    r"""One spelling for what LaTeX, unicode and prose spell in several ways. Braces stay: 2^{n+1} is not 2^n+1.

    The result is for the functions below: \text{cm} is "cm" in quotes, \{ \} are ⦃ ⦄, `and` is a comma, `or` a semicolon.
    """
    text = re.sub(r'\s+', ' ', text.translate(UNICODE))
    text = text.replace(r'\mathbb{R}', r'(-\infty,\infty)').replace(r'\left.', '').replace(r'\right.', '')
    text = re.sub(r'(?<=[0-9])(?:\{,\}|,\\!) ?(?=[0-9]{3})', '', text)                  # 10{,}000
    text = re.sub(r'√ ?([0-9]+)', r'\\sqrt{\1}', text).replace('√', r'\sqrt ')
    for _ in range(2):                                                                  # a macro in a macro
        text = TEXT_MACRO.sub(_quote, text)
    text = re.sub(r'\\([A-Za-z]+|.)', lambda m: COMMANDS.get(m[1], m[0]), text)
    text = re.sub(r'(?<!\\)\$', '', text).replace('**', '^').replace('<=', '≤').replace('>=', '≥').replace('!=', '≠')
    text = re.sub(r'(?<![A-Za-z])(?:np|math)\.', '', text)                              # program notation
    text = re.sub(r'(?<![A-Za-z])and(?![A-Za-z])', ',', text)
    text = re.sub(r'(?<![A-Za-z])or(?![A-Za-z])', ';', text)
    text = re.sub(r'(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])', _ungroup, text)  # 1,234,567
    text = re.sub(r'(?<![0-9a-z.] )(?<![0-9.,])([0-9]+) ([0-9]+)/([0-9]+)', r'\1\\frac{\2}{\3}', text)  # 1 1/2
    text = re.sub(r' +', ' ', text).strip(' .,;:').removesuffix('\\').strip()
    if re.fullmatch(r'[-+]?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?', text):
        text = text.replace(' ', '')                                                    # 1 000
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



# --- structure: lists, relations, unions, brackets, matrices ----------------------------------------------------------

RELATION = re.compile('[=<>≤≥≠∈]')
FLIP = str.maketrans('>≥<≤', '<≤>≥')
MAX_MEMBERS = 32


def _equal(a: str, b: str, depth: int = 0) -> bool:
    """Are two normalised answers the same? Takes them apart one layer at a time, the outermost first."""
    if a == b:
        return True
    if depth > 5:
        return False
    depth += 1
    list_a, list_b = _members(_inequalities_to_union(a)), _members(_inequalities_to_union(b))
    if len(list_a) != 1 or len(list_b) != 1:
        return _same_multiset(list_a, list_b, depth)
    a, b = list_a[0], list_b[0]
    if _choice(a) and _choice(b) and (CHOICE.fullmatch(a) or CHOICE.fullmatch(b)):
        return _choice(a) == _choice(b) or '(' in a + b and _choice(a).upper() == _choice(b).upper()
    (sides_a, ops_a), (sides_b, ops_b) = _relation(a), _relation(b)
    if ops_a and ops_b:
        return _same_relation(sides_a, ops_a, sides_b, ops_b, depth)
    if ops_a or ops_b:
        (sides, ops, value) = (sides_a, ops_a, b) if ops_a else (sides_b, ops_b, a)
        return all(_equal(side, value, depth) for side in _values_of(sides, ops))
    if '∪' in a + b:
        return _same_multiset(_split(a, '∪'), _split(b, '∪'), depth)
    brackets_a, items_a = _bracketed(a)
    brackets_b, items_b = _bracketed(b)
    if len(items_a) > 1 or len(items_b) > 1:
        return brackets_a == brackets_b and _same_sequence(items_a, items_b, depth)
    if r'\begin' in a + b:
        return _same_sequence(_matrix(a), _matrix(b), depth)
    if ':' in a and ':' in b:
        return _same_sequence(_split(a, ':'), _split(b, ':'), depth)
    return _same_atom(a, b)


def _same_sequence(xs: list[str], ys: list[str], depth: int) -> bool:
    return len(xs) == len(ys) > 0 and all(_equal(x, y, depth) for x, y in zip(xs, ys))


def _same_multiset(xs: list[str], ys: list[str], depth: int) -> bool:
    if len(xs) != len(ys) or len(xs) > MAX_MEMBERS:
        return sorted(xs) == sorted(ys)
    left = list(ys)
    for x in xs:
        match = next((y for y in left if _equal(x, y, depth)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _split(text: str, separators: str) -> list[str]:
    """Split at separators that stand outside all brackets. Kinds of brackets may mix: (0,1] is one interval."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in '([{⦃':
            depth += 1
        elif c in ')]}⦄':
            depth -= 1
        elif depth == 0 and c in separators:
            parts.append(text[start:i])
            start = i + 1
    return parts + [text[start:]]


def _bracketed(text: str, opening: str = '([', closing: str = ')]') -> tuple[str, list[str]]:
    """('(]', ['0', '1']) for (0,1]; ('', [text]) where no pair of brackets holds the whole."""
    inner = text[1:-1]
    if text[:1] and text[0] in opening and text[-1] in closing and _split(inner.replace(' ', '_') + ' ', ' ')[-1] == '':
        return text[0] + text[-1], _split(inner, ',;')
    return '', [text]


def _members(text: str) -> list[str]:
    r"""The answers that a bare list, a set or a \pm holds; one for anything else."""
    brackets, items = _bracketed(text, '⦃', '⦄')
    if brackets and (builder := re.match('[A-Za-z][|:]', text[1:])):   # {x | -2 < x < 1}
        items = [text[1 + builder.end():-1]]
    if not brackets:
        items = _split(text, ',;')
    members = []
    for item in filter(None, items):
        head, approximately, tail = item.partition('≈')
        item = tail if approximately and (not head or _is_name(head)) else head
        if item.count('±') == 1:
            members += [item.replace('±', '+').replace('∓', '-'), item.replace('±', '-').replace('∓', '+')]
        else:
            members.append(item)
    return members


def _relation(text: str) -> tuple[list[str], str]:
    """(sides, relation signs between them); > and ≥ are turned round, and simple conditions become sets: x ∈ S."""
    sides = _split(text, '=<>≤≥≠∈')
    if len(sides) == 1:
        return sides, ''
    positions, at = [], 0
    for side in sides[:-1]:
        at += len(side)
        positions.append(text[at])
        at += 1
    ops = ''.join(positions)
    if set(ops) <= set('>≥'):
        sides, ops = sides[::-1], ops[::-1].translate(FLIP)
    left, right = '[' if ops[0] == '≤' else '(', ']' if ops[-1] == '≤' else ')'
    if set(ops) <= set('<≤') and len(ops) == 2 and _is_name(sides[1]):
        return [sides[1], f'{left}{sides[0]},{sides[2]}{right}'], '∈'
    if ops in '<≤' and _is_name(sides[0]):
        return [sides[0], f'(-∞,{sides[1]}{right}'], '∈'
    if ops in '<≤' and _is_name(sides[1]):
        return [sides[1], f'{left}{sides[0]},∞)'], '∈'
    if ops == '≠' and _is_name(sides[0]):
        return [sides[0], f'(-∞,{sides[1]})∪({sides[1]},∞)'], '∈'
    return sides, ops


def _inequalities_to_union(text: str) -> str:
    """x < 1 or x > 3 as the union of two intervals."""
    parts = [_relation(part) for part in text.split(';')] if ';' in text else []
    if parts and all(ops == '∈' for _, ops in parts):
        return '∪'.join(sides[1] for sides, _ in parts)
    return text


def _is_name(text: str) -> bool:
    """Can this stand before "=" as the name of what was asked for? x, AB, f(3), (x,y), \\angle ABC, but not 2x + z."""
    return (len(text) <= 30 and bool(re.search('[A-Za-z"]', text)) and not re.search(r'[-+*/^|!%=<>≤≥∪π]', text)
            and not re.match(r'[0-9.]|\\frac|\\sqrt', text) and not re.search(r'(?<![\\A-Za-z])[A-Za-z]{2,} ', text))


def _values_of(sides: list[str], ops: str) -> list[str]:
    """What a relation gives as an answer: S of x ∈ S, 5 of x = 5, and of longer chains every side but the name."""
    if set(ops) == {'='} or ops == '∈':
        if _is_name(sides[0]):
            return sides[1:]
        return sides[:-1] if _is_name(sides[-1]) else sides
    return ['']


def _same_relation(sides_a: list[str], ops_a: str, sides_b: list[str], ops_b: str, depth: int) -> bool:
    """Equal side by side, or, for = and for inequalities, a constant multiple of one another: 2x = 4 is x - 2 = 0."""
    if ops_a != ops_b:
        return False
    if _same_sequence(sides_a, sides_b, depth) or set(ops_a) <= {'=', '≠'} and _same_sequence(sides_a, sides_b[::-1], depth):
        return True
    if len(ops_a) > 1 or ops_a == '∈':
        return False
    a, b = (_value(f'({left})-({right})') for left, right in (sides_a, sides_b))
    if not a or not b or 0 in a + b:
        return False
    factor = a[0] / b[0]
    return _same_number(factor, a[1] / b[1]) and (ops_a in '=≠' or factor.real > 0)


def _matrix(text: str) -> list[str]:
    r"""The rows of a matrix as tuples, under any kind of bracket; a factor before it goes into the entries."""
    factor, _, rest = text.partition(r'\begin{')
    kind, _, rest = rest.partition('}')
    body, _, end = rest.rpartition(r'\end{' + kind)
    if not re.fullmatch('[A-Za-z]*matrix|array', kind) or r'\begin' in body or not re.fullmatch(r'\}[])|]?', end):
        return []
    body = re.sub(r'^\{[^{}]*\}', '', body) if kind == 'array' else body
    factor = factor.rstrip('[(|').rstrip('*')
    scale = (lambda x: f'({factor}1)({x})' if factor == '-' else f'({factor})({x})') if factor else (lambda x: x)
    rows = [row.strip() for row in body.split(r'\\')]
    return [f'({",".join(scale(cell) for cell in row.split("&"))})' for row in rows if row] if len(body) else []


# --- atoms: text, choices, units --------------------------------------------------------------------------------------

CHOICE = re.compile(r'["(]*([A-Ja-j])[")]*')
LABELLED = re.compile(r'["(]*([A-J])[").:]+(?!.*\([A-J]\))')
NOT_UNITS = frozenset('is are was be not no or and but if so because since then the this it either neither possibly'.split())
UNITS = {name: unit for unit, names in {
    '°': 'degree deg', '%': 'percent percentage pct', '$': 'dollar usd', 'm': 'meter metre', 'cm': 'centimeter centimetre',
    'mm': 'millimeter millimetre', 'km': 'kilometer kilometre', 'in': 'inch inche', 'ft': 'foot feet', 'mi': 'mile',
    'yd': 'yard', 's': 'second sec', 'min': 'minute', 'h': 'hour hr', 'g': 'gram', 'kg': 'kilogram', 'mg': 'milligram',
    'lb': 'pound', 'oz': 'ounce', 'l': 'liter litre', 'ml': 'milliliter', '2': 'square sq', '3': 'cubic cu',
    'mph': '', 'am': '', 'pm': '', 'cent': ''}.items() for name in [unit, *names.split()]}
LETTERS = 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'


def _same_atom(a: str, b: str) -> bool:
    """Two answers without structure: words, or expressions with or without a unit."""
    words_a, words_b = _words(a), _words(b)
    if words_a or words_b:
        if words_a == words_b or max(len(words_a), len(words_b)) > 3:
            return words_a == words_b
    (a, unit_a), (b, unit_b) = _split_unit(a), _split_unit(b)
    if unit_a and unit_b and unit_a != unit_b:
        return False
    a_value, b_value = _value(a), _value(b)
    if a_value and b_value:
        return all(map(_same_number, a_value, b_value))
    return _plain(a) == _plain(b)


def _choice(text: str) -> str:
    """C for C, (C), "C" and C. x = 42."""
    match = CHOICE.fullmatch(text) or LABELLED.match(text)
    return match[1] if match else ''


def _words(text: str) -> str:
    """The letters of a text answer, without case; empty for anything but words."""
    letters = re.sub(r'[ ".,\']', '', text).strip('()')
    return letters.casefold() if letters.isalpha() and len(letters) > 1 else ''


def _plain(text: str) -> str:
    """The last resort: a string without spaces, quotes, and braces around one character."""
    return re.sub(r'(?<![0-9]) | (?![0-9])|"', '', re.sub(r'\{(\w)\}', r'\1', text))


def _split_unit(text: str) -> tuple[str, str]:
    """(value, unit): 5 "cm"^2, 5 square cm, \\$5, 5°, 5%. In plain text a unit is known, or a word after a space."""
    money = re.match(r'(-?)(\\\$|€|£)', text)
    if money:
        return money[1] + text[money.end():], money[2].strip('\\')
    quote = text.find('"')
    power = re.search(r'\^\{?[23]\}?$', text)
    body = text[:power.start()] if power else text
    head = text[:quote] if quote > 0 else body.rstrip(LETTERS + ' /.')
    tail = text[len(head):]
    words = re.findall('[A-Za-z]+', tail)
    if quote > 0:
        is_unit = bool(re.fullmatch(r'(?:"[^"]*"(?:\^\{?-?[0-9]\}?)?[ /*]?)+', tail))
    else:
        known = all(_singular(w) in UNITS and len(w) > 1 for w in words)
        is_unit = known or tail.startswith(' ') and any(len(w) > 2 for w in words)
    if not words or len(words) > 4 or not is_unit or NOT_UNITS & set(map(str.lower, words)) or not head.rstrip(' *'):
        return text, text[-1] if text[-1:] in ('°', '%') else ''
    parts = sorted(UNITS.get(_singular(w), _singular(w)) for w in re.findall('[A-Za-z]+|[0-9]+', tail))
    return head.rstrip(' *'), ' '.join(parts)


def _singular(word: str) -> str:
    return word.lower().removesuffix('s') if len(word) > 2 else word.lower()


# --- numbers and expressions ------------------------------------------------------------------------------------------

MAX_BITS = 8192      # of one exact number; 2^{4181} and 10^{1000} are in reach
MAX_WORK = 300_000   # bits of all numbers of one expression
MAX_NESTING = 30
TOKEN = re.compile(r'\\[A-Za-z]+|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|"[^"]*"|[A-Za-z]+|[^ ]')
OPAQUE = frozenset(r'\sum \prod \int \lim \cdots \ldots \dots \begin \end \cap \setminus \pmod \bmod \mod'.split())
PAIRS = {'(': ')', '[': ']', '{': '}', '|': '|', r'\lfloor': r'\rfloor', r'\lceil': r'\rceil'}


def _same_number(x: Fraction | complex, y: Fraction | complex) -> bool:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    try:
        x, y = complex(x), complex(y)
    except OverflowError:
        return False
    return abs(x - y) <= 1e-11 * max(abs(x), abs(y))


@lru_cache(maxsize=1024)
def _value(text: str) -> tuple[Fraction | complex, ...]:
    """The expression at two fixed points, () if it is none or too large. Equal values at both mean equal expressions."""
    try:
        return tuple(_Expression(text, point).parse() for point in ('1', '2'))
    except (ValueError, ArithmeticError):
        return ()


class _Expression:
    """A recursive-descent reader that computes as it reads: exactly (Fraction) as long as possible, else in complex.

    sum: product {+- product};  product: signed {[*/] signed};  signed: {-} power;  power: primary {!} [^ argument]
    """

    def __init__(self, text: str, point: str):
        self.tokens = []
        for token in TOKEN.findall(text):
            if token.isalpha() and token.isascii() and token not in FUNCTIONS and token not in ('sqrt', 'pi'):
                self.tokens += token   # xy is x times y
            else:
                self.tokens.append('\\' + token if token in FUNCTIONS or token == 'sqrt' else token)
        self.at, self.nesting, self.work, self.bars, self.symbols = 0, 0, 0, 0, 0
        self.point, self.degree = point, Fraction(1)

    def parse(self) -> Fraction | complex:
        value = self.sum()
        if self.peek():
            raise ValueError('not an expression')
        return value

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ''

    def take(self, token: str = '') -> str:
        taken = self.peek()
        if not taken or token and token != taken:
            raise ValueError('not an expression')
        self.at += 1
        return taken

    def bounded(self, value: Fraction | complex) -> Fraction | complex:
        if isinstance(value, Fraction):
            bits = value.numerator.bit_length() + value.denominator.bit_length()
            self.work += bits
            if bits > MAX_BITS or self.work > MAX_WORK:
                raise ValueError('too large')
        elif not 1e-200 < abs(value) < 1e200:   # near underflow all numbers look alike
            raise ValueError('out of range')
        return value

    def sum(self) -> Fraction | complex:
        value = self.product()
        while self.peek() in ('+', '-'):
            sign = 1 if self.take() == '+' else -1
            value = value + sign * self.product()
            value = self.bounded(value) if value else Fraction(0)
        return value

    def product(self) -> Fraction | complex:
        value = self.signed()
        while True:
            if self.peek() == '*':
                self.take()
                value = self.bounded(value * self.signed())
            elif self.peek() == '/':
                self.take()
                value = self.bounded(value / self.signed())
            elif self.starts_factor():
                value = self.bounded(value * self.power())
            else:
                return value

    def starts_factor(self) -> bool:
        """Is a factor next, without a sign? Two numbers in a row are no product."""
        token, before = self.peek(), self.tokens[self.at - 1]
        return bool(token) and (token[0] in r'\"([{π∞' or token.isalpha() or token == '|' and not self.bars
                                or token[0] in '0123456789.' and before[-1] not in '0123456789.'
                                ) and token not in (r'\rfloor', r'\rceil')

    def signed(self) -> Fraction | complex:
        sign = 1
        while self.peek() in ('+', '-'):
            sign = sign if self.take() == '+' else -sign
        return sign * self.power()

    def power(self) -> Fraction | complex:
        base = self.primary()
        while self.peek() in ('!', '°', '%'):
            mark = self.take()
            if mark == '!':
                base = self.factorial(base)
            elif mark == '°':
                base = base * self.degree
        if self.peek() != '^':
            return base
        self.take()
        exponent = self.argument(whole_number=True)
        return self.raised(base, exponent)

    def raised(self, base: Fraction | complex, exponent: Fraction | complex) -> Fraction | complex:
        if isinstance(base, Fraction) and isinstance(exponent, Fraction):
            if abs(exponent.numerator) * (base.numerator.bit_length() + base.denominator.bit_length()) > MAX_BITS:
                raise ValueError('too large')
            if exponent.denominator == 1:
                return self.bounded(base ** exponent.numerator)
            root = _root(base, exponent.denominator) if exponent.denominator < 100 else None
            if isinstance(root, Fraction):
                return self.bounded(root ** exponent.numerator)
        return self.bounded(complex(base) ** complex(exponent))

    def factorial(self, value: Fraction | complex) -> Fraction | complex:
        if isinstance(value, Fraction) and value.denominator == 1 and 0 <= value <= 170:
            return self.bounded(Fraction(math.factorial(value.numerator)))
        return self.symbol(f'{value}!')

    def primary(self) -> Fraction | complex:
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            raise ValueError('too deep')
        token = self.take()
        if token in PAIRS:
            value = self.group(token)
        elif token[0] in '0123456789.':
            value = self.number(token)
        elif token == r'\frac':
            value = self.argument()
            value = self.bounded(value / self.argument())
        elif token == r'\sqrt':
            degree = self.group(self.take()) if self.peek() == '[' else Fraction(2)
            value = self.bounded(_root(self.argument(), degree))
        elif token == r'\binom':
            n, k = self.argument(), self.argument()
            exact = isinstance(n, Fraction) and n.denominator == 1 == k.denominator and 0 <= k <= n <= 500
            value = Fraction(math.comb(int(n), int(k))) if exact else self.symbol(f'{n} over {k}')
        elif token[1:] in FUNCTIONS:
            value = self.function(token[1:])
        elif token in ('π', 'pi', 'e', 'i'):
            value = {'e': complex(math.e), 'i': 1j}.get(token, complex(math.pi))
        elif token[0].isalpha() or token[0] in '\\"∞' and token not in OPAQUE:
            value = self.symbol(token.strip('"') + self.suffix())
        else:
            raise ValueError('not an expression')
        self.nesting -= 1
        return value

    def group(self, opening: str) -> Fraction | complex:
        self.bars += opening == '|'
        value = self.sum()
        self.take(PAIRS[opening])
        self.bars -= opening == '|'
        if opening == '|':
            return abs(value) if isinstance(value, Fraction) else complex(abs(value))
        if opening.startswith('\\'):   # floor and ceiling
            if isinstance(value, Fraction) and not self.symbols:
                return Fraction(math.floor(value) if 'floor' in opening else math.ceil(value))
            return self.symbol(f'{opening}{value}')
        return value

    def argument(self, whole_number: bool = False) -> Fraction | complex:
        r"""What follows \frac, \sqrt or ^: a group or one token. \frac12 is 1/2, though 2^10 is taken as 2^{10}."""
        token = self.peek()
        if whole_number and token in ('-', '+'):
            return self.signed()
        if not whole_number and token.isdigit() and len(token) > 1:
            self.tokens[self.at:self.at + 1] = [token[0], token[1:]]
        return self.primary()

    def number(self, token: str) -> Fraction | complex:
        mantissa, _, exponent = token.lower().partition('e')
        whole, _, decimals = mantissa.partition('.')
        if len(exponent) > 5 or abs(int(exponent or 0)) > 2000:
            raise ValueError('too large')
        value = Fraction(int(whole + decimals), 10 ** len(decimals)) * Fraction(10) ** int(exponent or 0)
        if self.peek() == '_':   # 204_5 is opaque: bases are not converted
            base = self.suffix()
            return value if base == '_10' else self.symbol(token.lstrip('0') + base)
        if self.peek() == r'\frac' and token.isdigit():   # 1\frac12
            at, symbols = self.at, self.symbols
            fraction = self.primary()
            if isinstance(fraction, Fraction) and 0 < fraction < 1 and self.symbols == symbols:
                return value + fraction
            self.at = at
        return value

    def suffix(self) -> str:
        """Primes and a subscript, as text: they belong to the name."""
        name = ''
        while self.peek() == "'":
            name += self.take()
        if self.peek() == '_':
            self.take()
            token = self.take()
            while token == '{' and self.peek() and self.peek() != '}':
                name += self.take().strip('"')
            name = '_' + (name if token == '{' else token)
            if token == '{':
                self.take('}')
        return name

    def symbol(self, name: str) -> Fraction:
        """A fixed rational value for a name; another one at the other point."""
        self.symbols += 1
        return Fraction(100 + zlib.crc32((name + self.point).encode('utf-8', 'replace')) % 899, 331)

    def function(self, name: str) -> Fraction | complex:
        power, base = Fraction(1), None
        while self.peek() in ('^', '_'):
            if self.take() == '^':
                power = self.argument(whole_number=True)
            else:
                base = self.argument()
        degree, self.degree = self.degree, Fraction(math.pi) / 180 if name[-1] not in 'gnp' else self.degree
        if self.peek() in PAIRS:
            value = self.primary()
        else:
            value = self.power() if self.peek() not in ('+', '-') else self.signed()
            while self.starts_factor() and self.peek()[1:] not in FUNCTIONS:
                value = self.bounded(value * self.power())
        self.degree = degree
        value = FUNCTIONS[name](complex(value))
        if base is not None:
            value = value / FUNCTIONS[name](complex(base))
        return self.raised(value, power) if value else Fraction(0)


def _root(value: Fraction | complex, degree: Fraction | complex) -> Fraction | complex:
    """The real root where there is one, exact if it is rational."""
    if not isinstance(value, Fraction) or not isinstance(degree, Fraction) or degree.denominator > 1 or degree < 2:
        return complex(value) ** (1 / complex(degree))
    if value < 0:
        return -_root(-value, degree) if degree % 2 else 1j * complex(_root(-value, degree)) if degree == 2 else complex(
            value) ** (1 / complex(degree))
    n = degree.numerator
    roots = [math.isqrt(k) if n == 2 else round(float(k) ** (1 / n)) for k in (value.numerator, value.denominator)]
    if n < 100 and Fraction(*roots) ** n == value:
        return Fraction(*roots)
    return complex(value) ** (1 / n)
