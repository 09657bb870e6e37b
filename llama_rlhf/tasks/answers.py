"""Any file of questions and short answers: an answer is right when it equals one of the reference answers, numbers by their value.

A record is {"question", "answer"}, or any other form of docs/DATA.md; several answers in a list are all right. A field "label"
(text, a number, or a list of them) replaces the answer, which is then only the reference solution; so does what stands after `####`.

What a text answers (`final_answer`), from the first place that is there: the last <answer>...</answer>; the line after the first
"####"; the last \\boxed{}; the rest of the line after the last "answer is" or "answer:"; the last line with something in it.
Where the reference is a number, rule D of GSM8K reads the number out of it (1,450.00 = $1450).
Otherwise both sides are compared without regard to case, Unicode form, repeated spaces, the kind of dash, quotes, asterisks, brackets
and full stops around them, and a \\boxed{}, \\text{}, \\textbf{}, \\mathrm{}, $...$ or \\(...\\) around the whole.
"""

import re
import unicodedata

from llama_rlhf.records import answers_of, is_empty, prompt_of
from llama_rlhf.tasks import Problem, gsm8k, load_file, scored

RULES, RULE = ("match",), "match"
TRAIN = TEST = ""

_COMMAND = re.compile(r"\\(?:boxed|text|textbf|mathrm)\{")
_MATHS = re.compile(r"\$([^$]+)\$|\\\(((?:(?!\\\)).)+)\\\)")


def load(file, faults=None):
    return load_file(file, _problem, faults)


def _problem(number, where, record):
    record = {name: str(value) if type(value) in (int, float) else value for name, value in record.items()}
    prompt, solutions = prompt_of(record, where), answers_of(record, where, optional="label" in record)
    labels = record.get("label", solutions)
    labels = [str(label) if type(label) in (int, float) else label for label in (labels if isinstance(labels, list) else [labels])]
    if is_empty(prompt) or not labels or not all(isinstance(label, str) and normalise(_after_hashes(label)[0] or label) for label in labels):
        raise ValueError(f"{where}: the {'question' if is_empty(prompt) else 'answer'} is empty, or no text")
    labels = [_after_hashes(label)[0].strip() or label.strip() for label in labels]
    return Problem(number, prompt, next(iter(solutions), ""), " | ".join(labels), frozenset(map(normalise, labels)))


def score(problem, text, finished, *, rule=RULE, reward=False):
    whole = finished or not reward
    if all(gsm8k.canonical_number(label) for label in problem.more):
        text = text.rpartition("</think>")[2]
        tagged = in_tags(text)
        answer = gsm8k.extract_tolerant(text, truncated=not whole) if tagged is None else gsm8k.extract_tolerant(tagged, tagged=True)
    else:
        answer = normalise(final_answer(text, whole=whole) or "") or None
    return scored(rule, finished, {"match": (answer, answer in problem.more)})


def final_answer(text, *, whole=True):
    """The part of the text that answers, or None. whole: False for a text cut off, whose last words are no answer."""
    text = text.rpartition("</think>")[2]
    tagged = in_tags(text)
    if tagged is not None:
        return tagged
    hash_line, ended = _after_hashes(text)
    places = [hash_line if whole or ended else "", gsm8k.last_boxed(text)]
    if whole:
        places += [gsm8k.after_answer_words(text), text.rstrip().rpartition("\n")[2]]
    lines = (place.strip().partition("\n")[0].lstrip(" *`:").rstrip(" *`.") for place in places)
    return next(filter(None, lines), None)


def in_tags(text):
    """What stands in the last <answer>...</answer>, or None."""
    before, closed, _ = text.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    return inside.strip() if opened and closed else None


def _after_hashes(text):
    """(the line after the first "####", whether it is ended by another)"""
    line, newline, _ = text.partition("####")[2].partition("\n")
    return line, bool(newline)


def normalise(text):
    """One spelling per meaning: see above."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").replace("\u2013", "-").casefold()
    for _ in range(4):  # not "while": every layer costs a walk through the text
        text = _unwrapped(" ".join(text.split()).lstrip(" \"'`*_").rstrip(" \"'`*_."))
    text = " ".join(text.split()).lstrip(" \"'`*_([").rstrip(" \"'`*_.)]")
    return gsm8k.canonical_number(text) or text


def _unwrapped(text):
    """What a LaTeX command or maths signs around the whole text hold, or else the text."""
    command = _COMMAND.match(text)
    if command:
        inside = gsm8k.until_brace(text[command.end() :])
        return inside if command.group() + inside + "}" == text else text
    maths = _MATHS.fullmatch(text)
    return maths[1] or maths[2] if maths else text
