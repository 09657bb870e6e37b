"""GSM8K: the four rules of what counts as the answer, labels, scoring and reading of files."""

import json
import os
import random
import re
import subprocess
import sys
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from llama_rlhf.tasks import Problem, get_task, gsm8k, source_of

# (text, rule A, rule B, rule C, rule D). Columns A to C were made by running the published regular expressions.
EXPECTED = [
    ("#### 8", "8", "8", "8", "8"),
    ("#### 1,450,000", "1450000", "1450000", "1450000", "1450000"),
    ("#### 1,450,000.", "1450000.", "1450000", "1450000", "1450000"),
    ("The answer is $1,234.00.", None, None, "1234.00", "1234"),
    ("The answer is 72, altogether", None, None, "72", "72"),
    ("The answer is -3", None, None, "-3", "-3"),
    ("That is 50%.", None, None, "50", "50"),
    ("#### $18", None, None, "18", "18"),
    ("#### 18.00", "18.00", "18.00", "18.00", "18"),
    ("#### 5\n#### 7", "5", "5", "7", "5"),
    ("#### 5\nQuestion: How many?\n#### 7", "5", "5", "7", "5"),
    ("#### 12 dollars", "12", "12", "12", "12"),
    ("5-3", None, None, "-3", "3"),
    ("####8", None, None, "8", "8"),
    ("The answer is 1,000, and 2,", None, None, "2", "1000"),
    ("\\boxed{$9{,}500}", None, None, "500", "9500"),
    ("48/2=<<48/2=24>>24 clips", None, None, "24", "24"),
    ("#### .5", ".5", ".5", ".5", "0.5"),
    ("No digits here", None, None, None, None),
    ("#### -10", "-10", "-10", "-10", "-10"),
]


@pytest.mark.parametrize("text, a, b, c, d", EXPECTED)
def test_each_rule_extracts_what_the_table_says(text, a, b, c, d):
    assert {rule: extract(text) for rule, extract in gsm8k.RULES.items()} == {"A": a, "B": b, "C": c, "D": d}


def test_b_and_c_equal_the_harness_patterns_applied_literally():
    """The slow but literal form: every pattern of the harness's clean-up through re.sub, one after the other."""

    def clean(text):
        for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
            text = re.sub(pattern, "", text)
        return text.lower()

    r = random.Random(0)
    found = 0
    for _ in range(3000):
        text = "".join(r.choices(["#### ", "####", "1", "20", ",", ".", "$", "-", " ", "\n", "x"], k=r.randint(1, 12)))
        strict = re.findall(r"#### (\-?[0-9\.\,]+)", text)
        flexible = [one or two for one, two in re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)]
        assert gsm8k.extract_strict(text) == (clean(strict[0]) if strict else None), text
        assert gsm8k.extract_flexible(text) == (clean(flexible[-1]) if flexible else None), text
        found += bool(strict)
    assert found > 300


def correct(rule, text, label):
    return gsm8k.score(Problem(1, "?", "", label), text, True, rule=rule)["correct"][rule]


def test_a_b_and_c_compare_strings_and_d_compares_values():
    text = "so it is 18\n#### 18.00"
    assert [correct(rule, text, "18") for rule in "ABCD"] == [False, False, False, True]
    text = "#### 1,450,000."
    assert [correct(rule, text, "1450000") for rule in "ABCD"] == [False, True, True, True]


def test_d_calls_two_numbers_equal_exactly_when_they_are():
    r = random.Random(1)

    def spell(value):
        sign, text = ("-" if value < 0 else ""), str(abs(value))
        whole, _, decimals = text.partition(".")
        if r.random() < 0.5:
            whole = f"{int(whole):,}"
        if r.random() < 0.5:
            decimals += "0" * r.randint(1, 3)
        return sign + r.choice(["", "$"]) + whole + ("." + decimals if decimals else "")

    equal = 0
    for _ in range(2000):
        x, y = (Decimal(r.randint(-3000, 3000)) / r.choice([1, 1, 1000, 500]) for _ in range(2))
        y = x if r.random() < 0.5 else y
        text = f"The answer is {spell(x)}."
        assert correct("D", text, spell(y)) == (x == y), (text, y)
        equal += x == y
    assert 800 < equal < 1200


def test_d_is_exact_beyond_float_precision():
    assert not correct("D", "#### 9007199254740993", "9007199254740992")
    assert not correct("D", "#### 0." + "0" * 40 + "1", "0")


@pytest.mark.parametrize(
    "text, answer",
    [
        ("1 + 1 = 2\n#### 7 apples, not 8\n#### 9", "7"),  # the first #### line, its first number
        ("####\nThe answer is 4", "4"),  # a line without a number decides nothing
        ("\\boxed{3} or rather \\boxed{\\frac{12}{5}}", "2.4"),
        ("\\boxed{} so the answer is 6. That took 2 steps", "6"),
        ("the answer is 1. No, the Answer: 5 of 9", "5"),
        ("He has 3, then 4, then 11 left", "11"),
        ("It falls to \u22127 degrees", "-7"),
        ("(-5)", "-5"),
        ("x-5", "5"),
        ("(2)-3", "3"),
        ("-0.0", "0"),
        ("costs -$2.50", "-2.5"),
        ("007", "7"),
        ("The answer is 1,0000", "1,0"),  # not a thousands group: no number
        ("24 <<48/2=>> <<12*2=25>> clips", "24"),
        ("\\boxed{-\\$18}", "-18"),
        ("\\boxed{18", "18"),
        ("Question: how many? 5", None),
        ("", None),
        # what is thought does not count
        ("<think>The answer is 5? Let me check. 2*3 = 6.</think>\n\nShe has 6 apples.", "6"),
        ("<think>Question: how many? #### 5</think>\\boxed{6}", "6"),
        ("<think>#### 5</think> <think>\\boxed{7}</think> none", None),
        # a fraction is one value where the answer is stated
        ("The answer is 3/4.", "0.75"),
        ("#### -1/2 cup", "-0.5"),
        ("\\boxed{-\\dfrac{3}{4}}", "-0.75"),
        ("\\boxed{\\tfrac{ 1,200 }{\\$3}}", "400"),
        ("\\boxed{\\frac12}", "0.5"),
        ("Answer: $12/3", "4"),
        ("Answer: 4 / 6", "2/3"),
        ("\\boxed{-\\frac{4}{6}}", "-2/3"),
        ("\\boxed{\\frac{0.5}{.25}}", "2"),
        ("\\boxed{2\\frac{1}{2}}", "2.5"),
        ("#### -2 1/2", "-2.5"),
        ("#### 3/0", "3/0"),
        ("#### 3/0.0", "3/0.0"),
        ("#### 3/1" + "0" * 5000, "3/1" + "0" * 5000),  # beyond the digits Python converts: as it stands
        ("#### 1/" + str(2**14000), "1/" + str(2**14000)),
        ("48/2 = 24", "24"),  # not so in the whole text
        ("24 = 48/2", "2"),
        ("That is 5/hour, the answer is 40/week", "40"),
        # LaTeX within numbers, dashes for minus
        ("\\boxed{1,\\!200}", "1200"),
        ("\\boxed{18\\,000\\;000}", "18000000"),
        ("\\boxed{18\\ 000\\text{ m}}", "18000"),
        ("\\boxed{18\\text{,}000}", "18000"),
        ("\\boxed{3\\ 5}", "3"),  # no thousands
        ("The answer is \u20135", "-5"),
        ("from 3\u20135", "5"),
        ("from 3%\u20135%", "5"),
        # headings are no answers, unless there is nothing else
        ("#### Step 1: Find the total\n3 + 4 = 7\n#### Step 2: Double it\n7 * 2 = 14\n\nThe final answer is \\boxed{14}.", "14"),
        ("#### 1. Find the total\n3 + 4 = 7\n#### 2) **Double it**\n7 * 2 = 14\n\nAnswer: 14", "14"),
        ("#### Step 1: add\n3 + 4\n#### **$7** each", "7"),
        ("#### Total: 7\n8", "7"),
        ("#### Total: 7\n\\boxed{8}", "8"),
        ("#### 18. \n\\boxed{8}", "18"),
        ("#### \u20ac18 \\boxed{8}", "18"),
        # in a box, the last side of an equation
        ("\\boxed{3\\cdot 4 = 12}", "12"),
        ("\\boxed{12 = x}", "12"),
        ("The answer is 3 (2 + 2 = 4)", "3"),
        # so too elsewhere, where the equation comes first
        ("The answer is 20 - 2 = 18 dollars. 4 steps", "18"),
        ("#### $3 + $15 = $18", "18"),
        ("#### (3 + 15) \\times 2 = 36 = 6^2", "36"),
        ("The answer is 2^3 = 10 - 2 = 8.", "8"),
        ("Answer: 3 - 5 = -2", "-2"),
        ("Answer: 12 = 3x", "12"),
        ("The answer is 1/3 = 0.333", "1/3"),
        ("The answer is 36 / 2 / 3 = 6", "6"),
        # what is denied
        ("First 20. The answer is not 20 but 18.", "18"),
        ("The answer is 18. The answer isn't 20, which took 3 steps", "18"),
        ("The answer is 18. The answer is correct because 16 - 7 = 9", "18"),
        # a point after a letter or a point begins no decimals
        ("The answer is Rs.18", "18"),
        ("The answer is ...18.", "18"),
        # groups of thousands, and signs, with blanks that are not ambiguous
        ("The answer is 12\u00a0000 or 12\u202f001", "12000"),
        ("\\boxed{- 1 234 567}", "-1234567"),
        ("#### 3 500 ml bottles", "3"),
        ("#### 12'000 dollars", "12000"),
        ("He pays 1\u2019234\u2019567 dollars", "1234567"),
        ("She earns 12 000 dollars.", "12000"),  # was 0, the last number
        ("#### $1 500 000 in all", "1500000"),
        ("17 000/5 = 3 400.", "3400"),
        ("#### 3 500", "3500"),
        ("Week 3 500", "500"),
        ("in 2019 200 people", "200"),
        ("He is 5'10\" tall", "10"),
        # a comma or a point that may mean this or that: 3 was counted as right
        ("#### 3,5", "3,5"),
        ("The answer is 12,50 euros", "12,5"),
        ("It costs 3,5", "3,5"),
        ("Answer: 1.234,50", "1.234,5"),
        ("#### 1.234.567", "1.234.5"),
        ("It costs 1.234.567", "4.567"),
        ("#### 1,23,456", "1,2"),
        ("The answer is 1e6", "1e6"),
        ("#### 3, 5", "3"),
        ("The answer is 18.", "18"),
        ("#### $1.5 million", "1.5"),  # GSM8K's own labels are so
        # more headings
        ("#### 1st step\n3\n#### 2nd step\n\\boxed{7}", "7"),
        ("#### 1 - Find it\n#### 2 \u2013 **Add**\n#### 3\\. $x$ is:\n#### 4.Then\nAnswer: 7", "7"),
        ("#### 5th", "5"),
        # part of another value, or of several: 3 would be counted as right
        ("\\boxed{3\\sqrt{2}}", "3\\sqrt"),
        ("\\boxed{\\sqrt[3]{5}}", "\\sqrt[3"),
        ("The answer is $3\\pi$.", "$3\\pi"),
        ("#### 3^2", "3^"),
        ("\\boxed{x^{3}}", "^{3"),
        ("\\boxed{3 \\times 10^4}", "3 \\times"),
        ("\\boxed{3, -1}", "3, -1"),
        ("\\boxed{3\\text{ or }4}", "3\\text{ or"),
        ("\\boxed{3:4}", "3:4"),
        ("\\boxed{3^\\circ}", "3"),
        ("\\boxed{3^{\\text{rd}}}", "3"),
        ("\\boxed{3\\,\\text{m}^2}", "3"),
        ("\\boxed{3, \\text{ as said}}", "3"),
        ("It covers 9\\pi", "9\\pi"),
        ("It covers 3 m^2", "^2"),
    ],
)
def test_d_reads_the_answer_a_reader_would(text, answer):
    assert gsm8k.extract_tolerant(text) == answer


def test_d_equals_fractions_exactly_when_their_values_are_equal():
    r = random.Random(2)
    for _ in range(2000):
        a, b, c, d = (r.choice([1, -1]) * r.randint(1, 40) for _ in range(4))
        one, other = gsm8k.extract_tolerant(f"#### {a}/{b}"), gsm8k.extract_tolerant(f"so \\boxed{{\\frac{{{c}}}{{{d}}}}}")
        assert (one == other) == (a * d == b * c)
        assert Fraction(one) == Fraction(a, b) and ("/" in one) == (10**6 * a % b != 0)
    assert gsm8k.read_label("x\n#### 3/4") == gsm8k.read_label("\\frac{3}{4}") == "0.75"

@pytest.mark.parametrize("rule", "ABCD")
def test_label_may_be_a_number_or_a_whole_solution(rule):
    text = "#### 1,450,000"
    for label in ("1450000", "1,450,000", "$1,450,000", 1450000, "5 * 290000 = <<5*290000=1450000>>1\n#### 1,450,000"):
        assert correct(rule, text, label), label
        assert not correct(rule, "#### 5", label), label


@pytest.mark.parametrize("label", ["", "eighteen", "18 dollars", "#### none", "1,45"])
def test_label_that_is_no_number_is_refused(label):
    with pytest.raises(ValueError, match="neither a number nor a solution"):
        correct("D", "#### 18", label)


def test_unknown_rule_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown rule 'E'. Known rules: A, B, C, D"):
        correct("E", "#### 1", "1")


N = 100_000
ADVERSARIAL = {
    "digits": "1" * N,
    "digits then a letter": "1" * N + "x",
    "thousands groups": "1,111" * (N // 5),
    "groups that end wrong": "1" + ",111" * (N // 4) + "1",
    "commas": "," * N,
    "dots": "." * N,
    "signs": "-+" * (N // 2),
    "dollars": "$" * N,
    "hashes": "#### " * (N // 5),
    "hashes without a space": "#" * N,
    "boxes": "\\boxed{" * (N // 7),
    "open braces": "\\boxed" + "{" * N,
    "annotations never closed": "<<" * (N // 2),
    "annotations closed too often": "<<1" * (N // 6) + ">>" * (N // 4),
    "answer and blanks": "answer" + " " * N,
    "many answers": "answer is " * (N // 10),
    "newlines": "\n" * N,
    "questions": "Question:" * (N // 9),
    "fractions": "#### 1/" * (N // 7),
    "a fraction of fractions": "#### " + "1/" * (N // 2),
    "a long fraction": "#### " + "7" * (N // 2) + "/" + "3" * (N // 2),
    "numbers and blanks": "1 " * (N // 2) + "/",
    "slashes": "#### 1" + "/ " * (N // 2),
    "fractions never closed": "\\frac{1" * (N // 7),
    "fractions without a bar": "1\\frac" * (N // 6),
    "half a fraction": "\\frac{" + "1" * N,
    "backslashes": "1\\" * (N // 2),
    "groups in LaTeX": "\\boxed{1" + "\\,111" * (N // 6),
    "numbered headings": "#### 1. x " * (N // 10),
    "a heading of stars": "#### 1." + "*" * (N // 2) + " " * (N // 2),
    "answer and stars": "answer" + "*" * N,
    "a long sum": "#### 1" + "+1" * (N // 2),
    "many equations": "answer is " + "1+1=" * (N // 4),
    "a sum of brackets": "#### 1+" + "(" * (N // 2) + " " * (N // 2),
    "a sum and blanks": "#### 1+1" + " " * N,
    "roots": "\\boxed{" + "\\sqrt" * (N // 5) + "3}",
    "a list": "\\boxed{1," + "\\," * (N // 2) + "}",
    "groups and blanks": "#### 1" + " 111" * (N // 4) + "x",
    "many groups and blanks": "= 1 111 " * (N // 8),
    "a group and signs": "= 1 111" + "!" * N + "x",
    "thoughts": "<think>1</think>" * (N // 16),
}


@pytest.mark.parametrize("text", ADVERSARIAL.values(), ids=ADVERSARIAL.keys())
def test_scoring_100k_adversarial_characters_takes_under_a_second(text):
    problem = gsm8k.Problem(id=1, prompt="?", solution="", label="5")
    start = time.process_time()
    gsm8k.score(problem, text, finished=True)
    gsm8k.score(problem, text, finished=False, reward=True)
    gsm8k.strip_calculator(text)
    assert time.process_time() - start < 1


PROBLEM = gsm8k.Problem(id=1, prompt="How many?", solution="#### 24", label="24")


def test_score_reports_all_rules_and_the_headline_one():
    text = "That makes <<48/2=24>>24.\n#### $24.00"
    result = gsm8k.score(PROBLEM, text, finished=True)
    assert result["answers"] == {"A": None, "B": None, "C": "24.00", "D": "24"}
    assert result["correct"] == {"A": False, "B": False, "C": False, "D": True}
    assert (result["rule"], result["answer"], result["score"], result["finished"]) == ("D", "24", 1.0, True)
    assert gsm8k.score(PROBLEM, text, True, rule="A")["score"] == 0.0
    with pytest.raises(ValueError, match="unknown rule"):
        gsm8k.score(PROBLEM, text, True, rule="tolerant")


def test_last_number_of_an_unfinished_text_earns_no_reward():
    rambling = "First 48/2 = 24 and then we take"
    assert gsm8k.score(PROBLEM, rambling, finished=True, reward=True)["score"] == 1.0
    assert gsm8k.score(PROBLEM, rambling, finished=False, reward=True)["answer"] is None
    assert gsm8k.score(PROBLEM, rambling, finished=False)["score"] == 1.0  # shown, not trained on


def test_number_cut_at_the_end_of_an_unfinished_text_earns_no_reward():
    assert gsm8k.score(PROBLEM, "#### 24", finished=False, reward=True)["score"] == 0.0  # could have become 240
    assert gsm8k.score(PROBLEM, "#### 24\nAnd", finished=False, reward=True)["score"] == 1.0
    assert gsm8k.score(PROBLEM, "The answer is 24 in", finished=False, reward=True)["score"] == 1.0
    for whole in ("24/5", "24 / 5", "24 000", "1 234 000", "24'000", "24\u202f000", "24\\,000", "24{,}000", "24\\frac{1}{2", "\\frac{24}{5", "\\dfrac{24} {5"):
        for end in range(len(whole) + 1):
            if whole[:end] not in ("24 ", "1 ", "1 234 "):  # the blank ends it
                assert gsm8k.extract_tolerant(f"The answer is {whole[:end]}", truncated=True) is None, whole[:end]
    assert gsm8k.extract_tolerant("\\boxed{\\frac{48}{2}}", truncated=True) == "24"


def test_strip_calculator_leaves_the_text_that_people_read():
    assert gsm8k.strip_calculator("48/2 = $<<48/2=24>>24, 24+1 = <<24+1=25>>25") == "48/2 = $24, 24+1 = 25"
    assert gsm8k.strip_calculator("a << b, 2 >> 1") == "a  1"
    assert gsm8k.strip_calculator("open <<1+1\n>> x") == "open <<1+1\n>> x"


# --- reading files ----------------------------------------------------------------------------------------------


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_list_and_lines_and_official_field_names_load_alike(tmp_path):
    ours = [{"instruction": f"How many, {i}?", "output": f"{i}+1 = {i + 1}\n#### {i + 1}"} for i in range(3)]
    official = [{"question": record["instruction"], "answer": record["output"]} for record in ours]
    as_list = write(tmp_path / "a.json", json.dumps(ours, indent=2))
    as_lines = write(tmp_path / "b.json", "\n".join(map(json.dumps, official)) + "\n")
    problems = gsm8k.load(as_list)
    assert problems == gsm8k.load(as_lines)
    assert problems[2] == gsm8k.Problem(3, "How many, 2?", "2+1 = 3\n#### 3", "3")
    with pytest.raises(AttributeError):
        problems[0].label = "4"


def test_line_separators_inside_a_record_do_not_split_it(tmp_path):
    """str.splitlines() also splits at U+2028, which JSON allows unescaped inside text."""
    lines = ['{"question": "How\u2028many?", "answer": "#### 1"}\r', "", '{"question": "b", "answer": "#### 2"}']
    file = write(tmp_path / "a.jsonl", "\n".join(lines))
    assert [(p.id, p.prompt) for p in gsm8k.load(file)] == [(1, "How\u2028many?"), (2, "b")]


def test_label_field_may_replace_the_last_line_but_not_contradict_it(tmp_path):
    records = [{"instruction": "a", "label": "1,200"}, {"instruction": "b", "output": "is 3", "label": 3}]
    file = write(tmp_path / "a.json", json.dumps(records))
    assert [(p.solution, p.label) for p in gsm8k.load(file)] == [("", "1200"), ("is 3", "3")]
    file = write(tmp_path / "b.json", '[{"instruction": "a", "output": "#### 4", "label": "5"}]')
    with pytest.raises(ValueError, match='record 1: "label" says 5 but the solution ends in #### 4'):
        gsm8k.load(file)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty"),
        ("[]", "no records"),
        ('[{"instruction": "a", "output": 3, "label": 3}]', '"output" must be a string, found a number'),
        ('[{"instruction": "a", "label": [3]}]', '"label" must be a number, found a list'),
        (
            '[{"instruction": "a", "output": "#### 1"}, {"instruction": "b", "answer": "2"}]',
            'record 2: missing "output" (keys: instruction, answer)',
        ),
        (
            '{"question": "a", "answer": "#### 1"}\n{"answer": "#### 1"}',
            'line 2, record 2: no prompt (keys: answer). Expected "instruction" and "output"',
        ),
        ('{"question": "a"}', 'record 1: missing "answer" (keys: question)'),
        ('[\n{"instruction": "a",\n "output" "#### 1"}]', "line 3, column 11: not valid json"),
        ('{"question": "a", "answer": "#### 1"}\n{oops}', "line 2, column 2: not valid json"),
        ('["a"]', "record 1: expected an object"),
        ('[{"instruction": 5, "output": "#### 1"}]', 'record 1: "instruction" must be a string, found a number'),
        ('[{"instruction": " ", "output": "#### 1"}]', "record 1: the question is empty"),
        ('[{"instruction": "a", "output": "it is 1"}]', 'record 1: the solution has no line "#### number"'),
        ('[{"instruction": "a", "output": "#### one"}]', "record 1: label '#### one' is neither a number"),
    ],
)
def test_bad_file_is_reported_with_its_place(tmp_path, text, message):
    file = write(tmp_path / "bad.json", text)
    with pytest.raises(ValueError) as caught:
        gsm8k.load(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.json' does not exist"):
        gsm8k.load(tmp_path / "nowhere.json")


def test_byte_order_mark_is_no_part_of_the_text(tmp_path):
    file = write(tmp_path / "a.json", '\ufeff[{"instruction": "a", "output": "#### 1"}]')
    assert gsm8k.load(file)[0].label == "1"


def test_file_in_another_encoding_is_refused_by_name(tmp_path):
    file = tmp_path / "latin.json"
    file.write_bytes('[{"instruction": "caf\xe9", "output": "#### 1"}]'.encode("latin-1"))
    with pytest.raises(ValueError, match="latin.json, after line 1, is not UTF-8"):
        gsm8k.load(file)


def test_rule_a_equals_rule_d_on_every_official_reference_solution():
    file = os.environ.get("GSM8K_TRAIN")
    if not file:
        pytest.skip("set GSM8K_TRAIN to the official train.jsonl (https://github.com/openai/grade-school-math)")
    problems = gsm8k.load(file)
    assert len(problems) == 7473
    for problem in problems:
        assert gsm8k.extract_original(problem.solution) == gsm8k.extract_tolerant(problem.solution) == problem.label
        assert all(gsm8k.score(problem, problem.solution, finished=True)["correct"].values()), problem
        assert "<<" not in gsm8k.strip_calculator(problem.solution)


# --- the table of tasks -----------------------------------------------------------------------------------------


def test_get_task_finds_gsm8k_and_suggests_the_nearest_name():
    assert get_task("GSM8K") is get_task("gsm8k") is gsm8k
    with pytest.raises(ValueError, match="unknown task 'gsm8'. Known tasks: answers, gsm8k, reasoning_gym, or FILE.py .* Did you mean 'gsm8k'?"):
        get_task("gsm8")
    with pytest.raises(ValueError, match="or FILE.py of your own.$"):       # nothing is near: no suggestion
        get_task("foo")


def test_our_own_problems_are_found_from_any_folder(tmp_path, monkeypatch):
    """The default of --train_file is a path in the repository: `llama-rlhf solver_train` in an empty folder did not find it."""
    monkeypatch.chdir(tmp_path)
    assert len(gsm8k.load(source_of(gsm8k, "label_file", "", "TEST"))) == 200
    assert source_of(gsm8k, "label_file", "mine.json", "TEST") == "mine.json"
    (tmp_path / "dataset/GSM8K").mkdir(parents=True)
    (tmp_path / "dataset/GSM8K/test.json").touch()
    assert source_of(gsm8k, "label_file", "", "TEST") == "dataset/GSM8K/test.json", "what the user has there comes first"


def test_importing_the_task_loads_no_torch():
    code = "import sys, llama_rlhf.tasks.reasoning_gym, llama_rlhf.comparison, llama_rlhf.data; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_the_task_for_lm_eval_marks_as_rule_c():
    """By the filter's own documentation: findall, the last match, its first group that holds something; then the patterns that are ignored are cut out."""
    import os

    import yaml
    with open(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "examples", "lm_eval", "math_word_problems.yaml")) as file:
        task = yaml.safe_load(file)
    (options,), (metric,) = [step for step in task["filter_list"][0]["filter"] if step["function"] == "regex"], task["metric_list"]
    for text in ("so 18...", "costs $1,200.", "5-3", "1.5", "18 , then", "a .5", "#### 7", "none", "$ 3", "-$4.00", "2 and 3."):
        found = re.findall(options["regex_pattern"], text)
        answer = None
        if found:
            answer = next(part for part in (found[options["group_select"]] if isinstance(found[0], tuple) else found[-1:]) if part)
            for pattern in metric["regexes_to_ignore"]:
                answer = re.sub(pattern, "", answer)
        assert answer == gsm8k.extract_flexible(text), text
