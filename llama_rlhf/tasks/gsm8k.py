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
_ANSWER_WORDS = re.compile(r"answer\s*(?:is|:)", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])(?P<sign>[-+]))?"  # after a digit, letter or closing bracket ("5-3") it is no sign
    r"\$?(?:"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.(?P<decimals>[0-9]+))?"
    r"|\.(?P<only_decimals>[0-9]+))"
)


def strip_calculator(text):
    """Delete the calculator annotations: `48/2 = <<48/2=24>>24` becomes `48/2 = 24`."""
    return _ANNOTATION.sub("", text)


def extract_tolerant(text, *, truncated=False):
    """Rule D, ours: the number a reader would take as the answer, in canonical form (`18.00` -> `18`, `.5` -> `0.5`).

    Everything from the first "Question:" on is dropped: few-shot models go on to invent the next problem.
    Then the first of these places that holds a number decides: the line of the first `####`; the last `\\boxed{}`;
    what follows the last "answer is" or "answer:"; the whole text. From the last place the last number is
    taken, from the others the first.

    truncated: set it when a length limit cut the text off and the result becomes a *reward*. Then the whole text
    does not count (its last number is an intermediate result, and rewarding that teaches the policy to ramble),
    nor does a number at the very end, some digits of which may be missing.
    """
    text = text.partition("Question:")[0]
    text = strip_calculator(text).replace("{,}", ",").replace("\\$", "$").replace("\u2212", "-")
    if truncated:
        text = text.rstrip("0123456789.,$+-")

    hash_line = text.partition("####")[2].partition("\n")[0]
    for place in (hash_line, last_boxed(text), after_answer_words(text)):
        number = _NUMBER.search(place)
        if number:
            return _canonical(number)
    if truncated:
        return None
    number = None
    for number in _NUMBER.finditer(text):
        pass
    return _canonical(number) if number else None


def last_boxed(text):
    """What stands in the last \\boxed{...}, nested braces included; "" when there is none or it is not closed."""
    _, found, rest = text.rpartition("\\boxed{")
    depth = 1 if found else 0
    for i, character in enumerate(rest if found else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:i]
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


# ----------------------------------------------------------------------------------------------------------------
# Comparing with the label

RULES = {"A": extract_original, "B": extract_strict, "C": extract_flexible, "D": extract_tolerant}
RULE = "D"


def read_label(label):
    """The label in canonical form, from a bare number ("18", "1,450,000") or a solution ending in `#### N`."""
    text = str(label).strip()
    if "####" in text:
        number = _NUMBER.search(text.partition("####")[2].partition("\n")[0])
    else:
        number = _NUMBER.fullmatch(text)
    if number is None:
        raise ValueError(f'label {_shortened(text)} is neither a number nor a solution with a line "#### number"')
    return _canonical(number)


def correct(rule, text, label):
    """Whether `text` answers `label` under rule "A", "B", "C" or "D". An output without an answer is wrong.

    A, B and C compare strings, so 18.00 is not 18 there. The label is brought to canonical form first; every label
    of the official data is an integer, for which that changes nothing but the commas all rules remove.
    """
    return _extractor(rule)(text) == read_label(label)


def score(problem, text, finished, *, rule=RULE, reward=False):
    """Mark one model output under all four rules; `rule` names the one that `answer` and `score` report.

    finished: the model ended the text itself (end token or stop string) rather than running into the length limit.
    reward: the score is trained on. Then rule D treats unfinished text as `extract_tolerant(truncated=True)` does.

    Returns what `scored` says.
    """
    answers = {name: extract(text) for name, extract in RULES.items()}
    if reward and not finished:
        answers["D"] = extract_tolerant(text, truncated=True)
    label = read_label(problem.label)
    return scored(rule, finished, {name: (answer, answer == label) for name, answer in answers.items()})


def _extractor(rule):
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}. Known rules: {', '.join(RULES)}")
    return RULES[rule]


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
