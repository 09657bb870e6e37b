"""GSM8K: grade-school word problems whose reference solution ends in `#### N` (Cobbe et al. 2021, arXiv:2110.14168).

What counts as a right answer changes a published accuracy by several points, so four rules stand side by side:

  A  original    the regular expression of the GSM8K release; compares strings
  B  strict      lm-evaluation-harness "strict-match": A plus its clean-up
  C  flexible    lm-evaluation-harness "flexible-extract": the last thing that looks like a number, same clean-up
  D  tolerant    ours: reads `####`, \\boxed{}, "the answer is" or the last number; compares exact decimals

Each `extract_*` returns the answer as its rule compares it, or None. All take time linear in the text: a model
under reinforcement learning will sooner or later write the string that makes a careless pattern hang.
"""

import re
from fractions import Fraction

from llama_rlhf.records import answers_of, is_empty, prompt_of, type_name
from llama_rlhf.tasks import Problem, load_file, scored

TRAIN, TEST = "dataset/GSM8K/train.json", "dataset/GSM8K/test.json"

# ----------------------------------------------------------------------------------------------------------------
# Rules A, B and C: as published, quirks included

_HASH_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def extract_original(text):
    """Rule A, from the GSM8K release: the first `#### number` (exactly one space), commas removed."""
    match = _HASH_ANSWER.search(text)
    return match.group(1).replace(",", "") if match else None


def extract_strict(text):
    """Rule B, lm-evaluation-harness "strict-match": A, then also without one trailing full stop."""
    match = _HASH_ANSWER.search(text)
    return _harness_clean(match.group(1)) if match else None


def extract_flexible(text):
    """Rule C, lm-evaluation-harness "flexible-extract": the last run of digits, `$`, `.` and `,`, cleaned as in B.

    It reads "5-3" as -3, and does not itself stop at a new "Question:" (the harness stops generating there).
    """
    last = None
    for last in _FLEXIBLE.finditer(text):
        pass
    return _harness_clean(last.group()) if last else None


def _harness_clean(answer):
    # The harness also ignores letter case and everything up to "#### "; the two patterns above capture neither.
    return answer.replace(",", "").replace("$", "").removesuffix(".")


# ----------------------------------------------------------------------------------------------------------------
# Rule D

_ANNOTATION = re.compile(r"<<[^<>\n]*>>")
# "**Answer**:" too, but not "The answer is not 5" and "The answer is correct, as 3 + 5 ..."
_ANSWER_WORDS = re.compile(r"answer(?:\s*(?:is(?!n['\u2019]t|\s+(?:not|correct|right|wrong|incorrect)\b)|:)|\W{0,3}:)", re.IGNORECASE)
_DIGITS = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+"
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}%°])(?P<sign>[-+]))?"  # after a digit, letter, unit or closing bracket ("5-3", "50%-60%") it is no sign
    rf"\$?(?:(?P<whole>{_DIGITS})(?:\.(?P<decimals>[0-9]+))?"
    r"|(?<![\w.])\.(?P<only_decimals>[0-9]+))"  # not "Rs.18", "so ...18"
)
_VALUE = re.compile(  # a number, a fraction (3/4) or both (2 3/4)
    rf"{_NUMBER.pattern}(?:(?: (?P<above>[0-9]+))? ?/ ?(?P<below>-?\$?(?:(?:{_DIGITS})(?:\.[0-9]+)?|\.[0-9]+)))?"
)
# what follows the number in "#### 1. Find the total", "#### 2 - Add", "#### 1st step"
_HEADING = re.compile(r"(?:\\?[.):]|\s-\s)[*_\s\"'$\\(]*[^\W\d_]|(?:st|nd|rd|th)\b")
_SUM = re.compile(  # `3 + 15 =`; `1/3 =` is none: the fraction is exact, 0.333 is not
    r"[-+]?\$?(?![0-9.,]+\s*/\s*\$?[0-9.,]+\s*=)(?:[0-9.,]+%?\)?\s*(?:[-+*/^x\u00d7\u00f7]|\\times|\\cdot|\\div)\s*\(*\$?)+[0-9.,]+%?\)?\s*="
)
# what stands before and behind a number that is only a part of a value: 3\sqrt{2}, 10^6, 3\pi, 3,5, 1.234.567, 1e6; and, in a box, of several: 1, -2
_INSIDE = re.compile(r"(?:\\sqrt\W*|\^\W*|[0-9][.,])\Z")
_PART = re.compile(r"\s*(?:\^(?!\{?\s*(?:\\circ|\\text|\\mathrm|[a-z]))|\\(?:sqrt|pi|times|cdot)(?![a-z])|[\u03c0\u221a])|[.,][0-9]|[eE][-+]?[0-9]")
_LIST = re.compile(r"\s*(?:[,;:]\s*(?:\\[,;!: ]\s*)*[-+$\\]*[0-9]|\\text\s*\{\s*(?:or|and)\b)")
_BLANKS = re.compile(r"(?<=[0-9]) +(?=[0-9]{3}(?![0-9/]))|(?<=-)\s+(?=[0-9.$])")  # which LaTeX does not print: 12 000, - 5
_LATEX_GROUP = re.compile(r"(?<=[0-9])(,?)(?:\\[,!; ]|['\u2019\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
# 12 000 is one number, as nobody counts 000 of anything; 3 500 in "3 500 ml" may be two, and is one as all that "#### 3 500" says
_SPACED = re.compile(r"(?<![0-9.,])(?<![0-9] )[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9])")
_SAYS, _NO_MORE = re.compile(r"(?:####|[=:]|\bis)[ $\u20ac\u00a3*(\\]*\Z"), re.compile(r"[^\w\n]*(?:\n|\Z)")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac ?(?:\{ ?([-+]?\$?[0-9.,]+) ?\}|([0-9])) ?(?:\{ ?([-+]?\$?[0-9.,]+) ?\}|([0-9]))")
_NUMBER_PARTS = "0123456789.,$+-'\u2019\u00a0\u2009\u202f"
_GOES_ON = re.compile(r"(?:/ ?|\{|\\[dt]?frac ?(?:\{[^{}]*\}? ?\{?)?|\\(?:[!; ]|[a-z]*))\Z")


def strip_calculator(text):
    """Delete the calculator annotations: `48/2 = <<48/2=24>>24` becomes `48/2 = 24`."""
    return _ANNOTATION.sub("", text)


def extract_tolerant(text, *, truncated=False, tagged=False):
    """Rule D, ours: the number a reader would take as the answer, in canonical form (`18.00` -> `18`, `.5` -> `0.5`).

    Everything up to the last "</think>" is dropped, and then everything from the first "Question:" on: few-shot models go
    on to invent the next problem. Then the first of these places that holds a number decides: the first `####` line that
    begins with one (`#### Step 1` and `#### 1. Add` are headings); the last `\\boxed{}`, and in it what follows the last "=";
    what follows the last "answer is" or "answer:" ("is not" and "is correct" are none); the first `####` line with a number in it; the whole text.
    From the last place the last number is taken, from the others the first: `3/4`, `2 3/4` and `\\frac{3}{4}` are one value
    there, and `3 + 15 = 18` is 18. What is a part of something else, as in `3\\sqrt{2}`, `10^6` or a box of several, is no number.
    Nor is `3,5`, whose comma is a decimal point to some and a list to others, or `1.234.567`: a point begins decimals, and a comma groups of three.
    Words for a scale are units: "1.5 million" is 1.5, as in the solutions of GSM8K, whose questions ask for millions then.

    truncated: set it when a length limit cut the text off and the result becomes a *reward*. Then the whole text
    does not count (its last number is an intermediate result, and rewarding that teaches the policy to ramble),
    nor does a number at the very end, some digits of which may be missing.

    tagged: the text is what stands between answer tags: its last number may be a fraction too.
    """
    text = _plain(text.rpartition("</think>")[2].partition("Question:")[0])
    if truncated:
        text = _without_open_number(text)

    leading, any_in_hash_line = _hash_numbers(text)
    box = _BLANKS.sub("", last_boxed(text))
    in_box = _VALUE.search(box.rpartition("=")[2]) or _VALUE.search(box)
    number = leading or in_box or _stated(after_answer_words(text)) or any_in_hash_line
    if not number and not truncated:
        for number in (_VALUE if tagged else _NUMBER).finditer(text):
            pass
    return (_part(number, several=number is in_box) or _value(number)) if number else None


def _plain(text):
    """The text without calculator annotations, and with numbers as outside LaTeX: `1{,}200`, `18\\,000`, `\\frac{3}{4}`."""
    text = strip_calculator(text)
    for latex, plain in (("\\text{,}", ","), ("{,}", ","), ("\\$", "$"), ("\u2212", "-"), ("\u2013", "-")):
        text = text.replace(latex, plain)
    text = _SPACED.sub(_joined, _LATEX_GROUP.sub(r"\1", text))
    text = re.sub(r"(?<=[0-9])(?=\\[dt]?frac)", " ", text)
    return _LATEX_FRACTION.sub(r"\1\2/\3\4", text)


def _joined(spaced):
    text, start = spaced.string, spaced.start()
    whole = spaced[0].endswith("000") or _SAYS.search(text, max(0, start - 12), start) and _NO_MORE.match(text, spaced.end())
    return spaced[0].replace(" ", "") if whole else spaced[0]


def _without_open_number(text):
    """The text less a number at its very end that may go on: `12`, `3/`, `12 0`, `18\\,0`, `2\\frac{1}{`."""
    whole, text = text, text.rstrip(_NUMBER_PARTS)
    if text != whole and text[-1:] == " " and text[-2:-1].isdigit():
        text = text.rstrip(_NUMBER_PARTS + " ")
    more = _GOES_ON.search(text)
    return text[: more.start()].rstrip(_NUMBER_PARTS + "/\\!;{ ") if more else text


def _hash_numbers(text):
    """The first number that begins a line after `####`, and the first that such a line holds at all; None without."""
    lines = [line for part in text.split("####")[1:] if (line := part.partition("\n")[0])]
    leading = (number for line in lines if (number := _stated(line)) and _begins_line(_VALUE.search(line)))
    return next(leading, None), next(filter(None, map(_stated, lines)), None)


def _begins_line(number):
    line = number.string
    return not re.search(r"[^\W_]", line[: number.start()]) and not _HEADING.match(line, number.end())


def _stated(text):
    """The first number of a text; where it begins an equation such as `3 + 15 = 18`, the first behind that."""
    number = _VALUE.search(text)
    while number and (left := _SUM.match(text, number.start())):
        number = _VALUE.search(text, left.end())
    return number


def _part(number, several):
    """How a number goes on that is only a part of a value, or, if `several`, of several: the spelling of no number. None where it stands alone."""
    text = number.string
    before = _INSIDE.search(text, max(0, number.start() - 20), number.start())
    behind = _PART.match(text, number.end()) or (_LIST.match(text, number.end()) if several else None)
    return f"{before[0] if before else ''}{number[0]}{behind[0] if behind else ''}" if before or behind else None


def last_boxed(text):
    """What stands in the last \\boxed{...}, nested braces included; "" when there is none or it is not closed."""
    _, found, rest = text.rpartition("\\boxed{")
    return until_brace(rest) if found else ""


def until_brace(text):
    """What stands before the first "}" that closes a brace opened before the text; "" without one."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:i]
    return ""


def after_answer_words(text):
    """The text after the last "answer is" or "answer:"; "" without."""
    end = len(text)
    for words in _ANSWER_WORDS.finditer(text):
        end = words.end()
    return text[end:]


def canonical_number(text):
    """The one spelling of a text that is a number and nothing else, or None."""
    number = _NUMBER.fullmatch(text)
    return _canonical(number) if number else None


def _canonical(number):
    """One spelling per value, so that comparing strings compares exact decimals of any length."""
    whole = (number["whole"] or "").replace(",", "").lstrip("0") or "0"
    decimals = (number["decimals"] or number["only_decimals"] or "").rstrip("0")
    value = f"{whole}.{decimals}" if decimals else whole
    return f"-{value}" if number["sign"] == "-" and value != "0" else value


def _value(match):
    """The one spelling of a match of _NUMBER or _VALUE. A fraction without an exact decimal is n/d in lowest terms."""
    number, groups = _canonical(match), match.groupdict()
    if not groups.get("below"):
        return number
    try:
        value = Fraction(groups["above"] or number) / Fraction(canonical_number(groups["below"]))
        if groups["above"]:
            value = Fraction(number) + (-value if number.startswith("-") else value)
        places = value.denominator.bit_length()
        if pow(10, places, value.denominator):  # a factor besides 2 and 5
            return str(value)
        whole, rest = divmod(abs(value) * 10**places, 10**places)
        return canonical_number(f"{'-' if value < 0 else ''}{whole}.{int(rest):0{places}}")
    except (ZeroDivisionError, ValueError):  # more digits than Python converts
        return match.group()  # with its "/" the spelling of no number


# ----------------------------------------------------------------------------------------------------------------
# Comparing with the label

RULES = {"A": extract_original, "B": extract_strict, "C": extract_flexible, "D": extract_tolerant}
RULE = "D"


def read_label(label):
    """The label in canonical form, from a bare number ("18", "1,450,000") or a solution ending in `#### N`."""
    text = _plain(str(label)).strip()
    leading, any_in_hash_line = _hash_numbers(text)
    number = leading or any_in_hash_line or _VALUE.fullmatch(text)
    if number is None:
        raise ValueError(f'label {_shortened(text)} is neither a number nor a solution with a line "#### number"')
    return _value(number)


def score(problem, text, finished, *, rule=RULE, reward=False):
    """Mark one model output under all four rules; `rule` names the one that `answer` and `score` report. A, B and C compare strings: 18.00 is not 18 there.

    finished: the model ended the text itself (end token or stop string) rather than running into the length limit.
    reward: the score is trained on. Then rule D treats unfinished text as `extract_tolerant(truncated=True)` does.

    Returns what `scored` says.
    """
    answers = {name: extract(text) for name, extract in RULES.items()}
    if reward and not finished:
        answers["D"] = extract_tolerant(text, truncated=True)
    label = read_label(problem.label)
    return scored(rule, finished, {name: (answer, answer == label) for name, answer in answers.items()})


# ----------------------------------------------------------------------------------------------------------------
# Reading the data


def load(file, faults=None):
    """Problems out of a file in any of the forms of docs/DATA.md. The label is the number after `####` in the solution; a
    field "label" may state it instead."""
    return load_file(file, _problem, faults)


def _problem(number, where, record):
    prompt = prompt_of(record, where)
    solution = next(iter(answers_of(record, where, optional="label" in record)), "")
    if is_empty(prompt):
        raise ValueError(f"{where}: the question is empty")
    if "label" not in record and "####" not in solution:
        raise ValueError(f'{where}: the solution has no line "#### number", and there is no "label"')
    if isinstance(record.get("label", ""), (bool, list, dict)):
        raise ValueError(f'{where}: "label" must be a number, found {type_name(record["label"])}')
    try:
        label = read_label(record.get("label", solution))
        if "####" in solution and read_label(solution) != label:
            raise ValueError(f'"label" says {label} but the solution ends in #### {read_label(solution)}')
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Problem(number, prompt, solution, label)


def _shortened(text, limit=60):
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")
