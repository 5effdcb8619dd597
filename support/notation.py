r"""The notation in which support/answers.py compares answers: one spelling for what LaTeX, unicode
and prose spell in several ways, and the parts of such a text: brackets, a condition, a unit. Only
the standard library is imported."""

import re
from itertools import accumulate

RELATIONS = "=<>≤≥≠∈"
FUNCTION_NAMES = set(
    "sin cos tan arcsin arccos arctan sinh cosh tanh exp ln log lg sec csc cot".split())

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
    "|": "mid vert lvert rvert |", "(": "langle", ")": "rangle rfloor rceil", "floor(": "lfloor",
    "ceil(": "lceil", "⦃": "lbrace {", "⦄": "rbrace }", "⦃⦄": "emptyset varnothing",
}.items() for name in names.split()}
DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻₀₁₂₃₄₅₆₇₈₉", "0123456789-0123456789")
GREEK = zip("αβγδεθλμνρστφχψωΔΩ", "alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau"
            " phi chi psi omega Delta Omega".split())
FRACTIONS = zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑", "12 13 23 14 34 15 25 35 45 16 56 17 18 38 58 78 19".split())
UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "÷": "/", "⁄": "/", "⩽": "≤",
    "⩾": "≥", "′": "'", "’": "'", "，": ",", "：": ":", "（": "(", "）": ")", "º": "°", "~": " ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∅": r"\emptyset ",
    "…": r"\ldots ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
    **{letter: rf"\{name} " for letter, name in GREEK},
    **{letter: rf"\frac{digits}" for letter, digits in FRACTIONS},
    **dict.fromkeys('"⦃⦄\u00ad\u200b\u200e\u200f\ufeff')})
TEXT_MACRO = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|[mh]box|math(?:rm|bf|it|sf|bb|cal)|operatorname)\*?"
    r" ?\{((?:[^{}]|\^\{-?[0-9]\})*)\}")
ACCENT = re.compile(r"\\(d?dot|bar|hat|tilde|vec|overline|overrightarrow) ?"
                    r"(?:\{ ?([A-Za-z]+) ?\}|([a-z])(?![a-z]))")
RECURRING = re.compile(r"(?<![0-9])([0-9]*)\.([0-9]*)\\(?:overline|bar|dot) ?\{ ?([0-9]+) ?\}")


def normalise(text: str) -> str:
    r"""One spelling for what LaTeX, unicode and prose spell in several ways.

    Braces stay: 2^{n+1} is not 2^n+1. \text{cm} becomes "cm" in quotes, the braces of a set become
    ⦃ and ⦄, `and` a comma, `or` a semicolon.
    """
    text = text.translate(UNICODE)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    if not set(RELATIONS).isdisjoint(text):
        text = text.replace("∧", ",").replace("∨", ";")
    return text


def _quoted(macro: re.Match) -> str:
    """The content of a text macro: words in quotes, but not the number in 4:30 pm."""
    content = macro[1].replace('"', "").strip(" \\~")
    is_time = content == "sec" and not macro.string[macro.end():].strip(" .$")  # 5\text{ sec}
    if content in FUNCTION_NAMES and not is_time:
        return f"\\{content} "
    if (content.strip(" ,") in ("and", "or") or "=" in content or not re.search("[A-Za-z]", content)
            or macro[0] in (r"\mathrm{e}", r"\mathrm{i}")):
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


SYMBOLS = {r"\left.": "", r"\right.": "", "...": r"\ldots ", "{:}": ":", "<=": "≤", ">=": "≥",
           "√": r"\sqrt ", "∛": r"\sqrt[3]", "$,$": ", "}
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (
    ("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda digits: f"^{{{digits[0].translate(DIGITS)}}}"),
    ("[₀-₉]+", lambda digits: f"_{{{digits[0].translate(DIGITS)}}}"),
    (r"\s+", " "),
    (r"\\mathbb ?(?:\{ ?R ?\}|R\b)|\\R\b", r"(-\\infty,\\infty)"),
    (r"\\mathbb ([A-Z])", r"\\mathbb{\1}"),
    (r"(?i)\b(?:negative|minus) (?=infinity\b)", "-"),
    (r"(?i)(?<!\\)\b(?:(?:positive|plus) )?infinity\b", "∞"),
    (r"(?i)(?<=[(\[,+-])( ?)(?:inf|oo)(?= ?[,)\]])", r"\1∞"),
    (r"(?<=\b[a-z]) in (?=[(\[])", "∈"),
    (r"√ ?([0-9]+)", r"\\sqrt{\1}"),
    (r"\\left\.|\\right\.|\.\.\.|\{:\}|<=|>=|√|∛|\$,\$", lambda symbol: SYMBOLS[symbol[0]]),
    (r"(?<=[0-9])(?: ?\{ ?, ?\}|, ?\\!) ?(?=[0-9]{3})", ""),  # 10{,}000
    (ACCENT, r"\\\1\2\3 "),
    (RECURRING, _recurring),  # 0.1\overline{6}
    (TEXT_MACRO, _quoted),
    (TEXT_MACRO, _quoted),  # a macro in a macro
    (r"\\([A-Za-z]+|.)", lambda command: COMMANDS.get(command[1], command[0])),
    (r"(?<!\\)\$", ""),
    (r"(?<![\w)}])\*\*|\*\*(?![\w({\\+-])", ""),  # **18** is 18,
    (r"\*\*", "^"),  # but 2**3 is a power
    (r"(?<!^[0-9])(?<!^[0-9]{2})!=", "≠"),  # but 3!=6
    (r"(?<![A-Za-z])(?:np|math)\.", ""),  # notation of programs
    (r"(?<![A-Za-z\\])pi(?![A-Za-z])", "π"),
    (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\(([0-9]+)\)_", r"\1_"),  # (101)_2
    (r"(?<=°) ?([CF])$", r'"\1"'),
    (r"(?<=[\])⦄]) ?U ?(?=[\[(⦃])", "∪"),
    (r"(?<=[0-9])(?: ?x ?(?=10\^)| x (?=[0-9]))", "*"),  # 4.5 x 10^33
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


# --- parts of an answer -------------------------------------------------------------------------

def depths(text: str) -> list[int]:
    """How many brackets are open at each character. Kinds may mix: (0,1] is an interval."""
    return list(accumulate((c in "([{⦃") - (c in ")]}⦄") for c in text))


def split(text: str, separators: str) -> list[str]:
    """Split at the separators that stand outside all brackets."""
    cuts = [i for i, depth in enumerate(depths(text)) if depth == 0 and text[i] in separators]
    return [text[i + 1:j] for i, j in zip([-1, *cuts], [*cuts, len(text)])]


def wrapped(text: str, opening: str, closing: str) -> bool:
    """Does one pair of brackets hold the whole text?"""
    matching = len(text) > 1 and text[0] in opening and text[-1] in closing
    return matching and min(depths(text)[:-1]) > 0


ONLY = re.compile(  # "exactly"5
    '^"?(?:exactly|precisely|only|just|approximately)(?![A-Za-z])"? ?')
QUALIFIER = re.compile(  # 2^n"for"n≥1, 5"when"x=2, but not two cases: x"for"x>0,-x"for"x<0
    r'(?<![A-Za-z])(?:(?:attained|achieved|with equality) )?(?:where(?!.*(?:where|when))'
    r'|(?=[^,;]*$|.*\\ldots$|.*\(-∞,∞\)$)(?:for|where|when|at|as|on|given|provided'
    r'|with(?="? ?[a-z]∈)|\\forall))(?![A-Za-z])"? ?'
    r'(?!.*\b(?:otherwise|else|if|but|unless|except|not|most|least|more|less|best|worst|bound)\b)'
    r'(?=["A-Za-z\\])(.*)$')
CONDITION = re.compile(  # nπ,n∈"Z" and nπ(n=1)
    r"(?:,\(?|\()(([A-Za-z])(?:[∈≠<>≤≥]|(?<=\(.)=)[^,()]*(?:\([^()]*\))?)\)?$")


def split_condition(text: str) -> tuple[str, str]:
    """(answer, the condition under which it holds). A condition in words counts as none."""
    text = ONLY.sub("", text)
    match = QUALIFIER.search(text)
    if match and (main := text[:match.start()].rstrip(' ,;"(')):
        in_brackets = "(" in text[len(main):match.start()]
        condition = match[1].removesuffix(")") if in_brackets else match[1]
        condition = re.sub('^(?:all|any|every|each|some)\\b|"', "", condition).strip()
        return main, "" if re.search("[A-Za-z]{3}", condition) else condition
    match = CONDITION.search(text)
    if match and match[2] in (main := text[:match.start()]) and not set(main) & set("<>≤≥≠∈"):
        return main, match[1]
    return text, ""


UNITS = {name: names.split()[0] for names in (
    "° degree deg", "% percent percentage pct", "$ dollar usd", "€ euro", "£", "cent",
    "m meter metre", "mm millimeter", "cm centimeter centimetre", "km kilometer kilometre",
    "/ per", "in inch inche", "ft foot feet", "mi mile", "yd yard", "s second sec",
    "min minute", "h hour hr", "am", "pm", "g gram gm", "kg kilogram", "mg milligram",
    "lb pound", "oz ounce", "l liter litre", "ml milliliter millilitre", "day", "week",
    "month", "year", "2 square sq", "3 cubic cu") for name in names.split()}
DENIED = "not no none nobody never neither nor cannot whether doubt false"
DOUBTED = ("wrong incorrect if unless either actually wait maybe perhaps possibly probably but"
           " however otherwise correction mistake sorry ignore")
MULTIPLE = "twice half double triple thrice plus minus negative"
ALTERED = (  # what makes another number of a number: "7 less than 20"
    "or and else between except without less fewer greater under over above below beyond least most"
    " than times dozen hundred thousand million billion trillion lakh crore squared cubed factorial"
    " mod divided third quarter root power remainder modulo base about around roughly almost nearly"
    " thirds halves tenths hundredths thousandths best worst bound up too works impossible"
    " undefined could might may")
NOT_UNITS = FUNCTION_NAMES | set(
    f"{DENIED} {DOUBTED} {MULTIPLE} {ALTERED} is are was be so because since then the this it which"
    " more sqrt pi".split()) - {"times"}  # "5 times" is 5
QUOTED_UNIT = re.compile(
    r'(?:"(?:\^\{-?[0-9]\}|[^"0-9]|(?<=[a-z])[0-9])*"(?:\^\{?-?[0-9]\}?)?[ /*]?)+')


def singular(word: str) -> str:
    return word.removesuffix("s") if len(word) > 2 else word


def split_unit(text: str) -> tuple[str, str]:
    r"""(value, unit) of 5"cm"^2, 5 square cm, \$5, 5°, 5%. In plain text a unit is a known one, or
    words after a space."""
    if money := re.match(r"(-?)(\\\$|€|£)", text):
        amount = text[money.end():]
        value, unit = split_unit(amount)  # \$18 per day
        if unit == "k":
            value, unit = amount, ""
        return money[1] + value, " ".join(sorted({money[2][-1], *unit.split()}))
    power, quote = re.search(r"\^\{?[23]\}?$", text), text.find('"')
    head = re.sub(r"[A-Za-z/. €£]{0,40}$", "", text[:power.start()] if power else text)
    head = text[:quote] if quote > 0 else head
    tail = re.sub(r"\.(?=[A-Za-z]{2})", " ", text[len(head):])
    tail = tail.replace(".", "").replace("mph", "mi/h")
    as_written = re.findall("[a-z€£]+|/", tail.lower())
    words = [singular(word) for word in as_written]
    known = UNITS.keys() >= set(words)  # sec is a time by itself
    if quote > 0:
        is_unit = QUOTED_UNIT.fullmatch(tail)
    elif words and known:  # one letter may be a variable: only m^2 and m^3 are taken for units
        is_square = power and words == ["m"]
        is_rate = "/" in tail and (tail[0] == " " or max(map(len, words)) > 2)
        is_unit = len(words[0]) > 1 or words[0] in "€£" or is_square or is_rate
    else:
        is_unit = tail.startswith(" ") and max(map(len, words), default=0) > 2
    head = head.rstrip(" *")
    if not is_unit or not 0 < len(words) <= 4 or NOT_UNITS & set(as_written) and not known or not head:
        return text, text[-1] if text.endswith(("°", "%")) else ""
    powers = re.findall("-?[0-9]", tail)
    return head, " ".join(sorted(UNITS.get(word, word) for word in words + powers))
