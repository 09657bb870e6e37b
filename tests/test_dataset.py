"""The problems under dataset/GSM8K, checked without the code that made them, and the two scripts beside them."""

import json
import re
import subprocess
import sys
import types
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from llama_rlhf.tasks import gsm8k

FOLDER = Path(__file__).parents[1] / "dataset" / "GSM8K"
TRAIN = json.loads((FOLDER / "train.json").read_text(encoding="utf-8"))
TEST = json.loads((FOLDER / "test.json").read_text(encoding="utf-8"))
TEST_ONLY = {record["family"] for record in TEST} - {record["family"] for record in TRAIN}


def annotations(record):
    """[(expression, result)] of a solution"""
    return [tuple(inner.split("=")) for inner in re.findall(r"<<(.*?)>>", record["output"])]


def value(expression):
    """Evaluate + - * / of non-negative whole numbers from left to right, products before sums."""
    total = Fraction(0)
    for sign, term in re.findall(r"(^|[+-])([0-9*/]+)", expression):
        product = Fraction(1)
        for operator, number in re.findall(r"(^|[*/])([0-9]+)", term):
            product = product / int(number) if operator == "/" else product * int(number)
        total = total - product if sign == "-" else total + product
    return total


def test_the_evaluator_of_this_file_computes():
    assert [value(e) for e in ("2+3*4", "90*20/100", "10-4-3", "7/2")] == [14, 18, 3, Fraction(7, 2)]


def test_sizes_and_fields():
    assert (len(TRAIN), len(TEST)) == (2000, 200)
    assert all(list(record) == ["instruction", "output", "family"] for record in TRAIN + TEST)
    assert all((FOLDER / name).stat().st_size < 2_000_000 for name in ("train.json", "test.json"))


def test_every_annotation_is_true_and_followed_by_its_result():
    n = 0
    for record in TRAIN + TEST:
        found = annotations(record)
        assert 1 <= len(found) <= 5, record
        for expression, result in found:
            assert re.fullmatch(r"[0-9]+([-+*/][0-9]+)+", expression), record
            assert value(expression) == int(result), record
            assert f"{expression} = " in record["output"], record
            assert re.search(rf"<<{re.escape(expression)}={result}>>{result}(?![0-9])", record["output"]), record
        n += len(found)
    assert n > 4000


def test_every_number_in_a_solution_comes_from_the_question_or_an_earlier_step():
    """Besides them only what the words say: twice, half, five weekdays, legs, a dozen, per cent, three rounds."""
    from_words = {2, 3, 4, 5, 12, 100}
    for record in TRAIN + TEST:
        known = from_words | set(map(int, re.findall(r"[0-9]+", record["instruction"])))
        for expression, result in annotations(record):
            assert set(map(int, re.findall(r"[0-9]+", expression))) <= known, record
            known.add(int(result))


def test_every_number_of_a_question_is_used_in_its_solution():
    for record in TRAIN + TEST:
        used = {number for expression, _ in annotations(record) for number in re.findall(r"[0-9]+", expression)}
        given = set(re.findall(r"[0-9]+", record["instruction"]))
        assert given <= used, record


def test_label_is_the_last_result_and_all_four_rules_read_it():
    for record in TRAIN + TEST:
        *_, label_line = record["output"].split("\n")
        label = annotations(record)[-1][1]
        assert label_line == f"#### {label}", record
        assert {extract(record["output"]) for extract in gsm8k.RULES.values()} == {label}, record


def test_all_values_are_whole_and_at_least_two():
    for record in TRAIN + TEST:
        assert all(int(n) >= 2 for n in re.findall(r"[0-9]+", record["instruction"] + record["output"])), record
        assert not re.search(r"[0-9]\.[0-9]", record["instruction"] + record["output"]), record


def test_no_question_twice_within_or_across_the_files():
    counts = Counter(record["instruction"] for record in TRAIN + TEST)
    assert [question for question, n in counts.items() if n > 1] == []


def test_no_test_problem_is_a_train_problem_in_other_words():
    train = {(record["family"], frozenset(annotations(record))) for record in TRAIN}
    assert [r for r in TEST if (r["family"], frozenset(annotations(r))) in train] == []


def test_some_families_stand_only_in_the_test_file():
    assert len(TEST_ONLY) == 6
    assert sum(record["family"] in TEST_ONLY for record in TEST) == 50
    train_counts = Counter(record["family"] for record in TRAIN)
    assert len(train_counts) == 32
    assert max(train_counts.values()) - min(train_counts.values()) <= 1


def test_difficulty_is_mixed_and_solutions_are_short():
    steps = Counter(len(annotations(record)) for record in TRAIN)
    assert steps[1] + steps[2] > 900 and sum(steps[n] for n in (3, 4, 5)) > 700 and steps[5] > 50
    assert max(record["output"].count("\n") for record in TRAIN + TEST) <= 4
    assert sum(len(record["output"].split()) for record in TRAIN) / len(TRAIN) < 70


def test_english_has_no_obvious_slips():
    for record in TRAIN + TEST:
        text = record["instruction"] + " " + record["output"]
        assert "  " not in text and "{" not in text and "None" not in text, record
        assert record["instruction"].endswith("?"), record
        assert not re.search(r"\b[Aa] [aeiou]", record["instruction"]), record
        assert not re.search(r"\b(\w+) \1\b", text), record


def test_readme_counts_are_those_of_the_files():
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| ([\d-]+) \|$", (FOLDER / "README.md").read_text(), re.M)
    train, test = (Counter(record["family"] for record in records) for records in (TRAIN, TEST))
    steps = {}
    for record in TRAIN + TEST:
        steps.setdefault(record["family"], set()).add(str(len(annotations(record))))
    assert {row[0] for row in rows} == set(test)
    for family, n_train, n_test, n_steps in rows:
        assert (int(n_train), int(n_test), {n_steps}) == (train[family], test[family], steps[family]), family


# --- generate.py ------------------------------------------------------------------------------------------------


def run(script, *arguments):
    command = [sys.executable, str(FOLDER / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_generate_reproduces_the_committed_files_byte_for_byte(tmp_path):
    done = run("generate.py", "--out_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("train.json", "test.json"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name


# --- prepare.py -------------------------------------------------------------------------------------------------


@pytest.fixture
def official(tmp_path):
    """A file of ten records in the official form."""
    file = tmp_path / "official.jsonl"
    with open(file, "w", encoding="utf-8") as lines:
        for i in range(1, 11):
            record = {"question": f"What is {i} + {i}?", "answer": f"<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}
            lines.write(json.dumps(record) + "\n")
    return file


def test_prepare_converts_every_record_and_holds_out_the_last(official, tmp_path):
    saved, held = tmp_path / "saved.json", tmp_path / "held.json"
    done = run("prepare.py", "--source", official, "--save_file", saved, "--hold_out", 3, "--hold_out_file", held)
    assert done.returncode == 0, done.stderr
    original = [json.loads(line) for line in official.read_text().splitlines()]
    records = [*json.loads(saved.read_text()), *json.loads(held.read_text())]
    assert [(r["instruction"], r["output"]) for r in records] == [(r["question"], r["answer"]) for r in original]
    assert (len(gsm8k.load(saved)), len(gsm8k.load(held))) == (7, 3)
    assert "7 records" in done.stdout and "3 records" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held.json", "official.jsonl", "saved.json"]


def test_prepare_drops_and_counts_repeated_questions(official, tmp_path):
    official.write_text(official.read_text() * 2)
    done = run("prepare.py", "--source", official, "--save_file", tmp_path / "saved.json")
    assert "10 repeated questions dropped" in done.stdout
    assert len(gsm8k.load(tmp_path / "saved.json")) == 10


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question": "a"}', 'record 11: missing "answer" (keys: question)'),
        ('{"question": "a", "answer": 5}', 'record 11: missing "answer"'),
        ("[1]", 'record 11: missing "question" (keys: none, it is a list)'),
        ("{oops", "line 11: not valid JSON"),
        ('{"question": "a", "answer": "it is 5"}', "record 11: the solution must end in a line"),
    ],
)
def test_prepare_names_the_bad_record_and_keeps_the_old_file(official, tmp_path, line, message):
    saved = tmp_path / "saved.json"
    saved.write_text("old")
    official.write_text(official.read_text() + line)
    done = run("prepare.py", "--source", official, "--save_file", saved)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert saved.read_text() == "old"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--hold_out", "2"], "--hold_out and --hold_out_file go together"),
        (["--hold_out", "10", "--hold_out_file", "h.json"], "10 records, which leaves none with --hold_out 10"),
        (["--hold_out", "-1"], "cannot be negative"),
        (["--size", "5"], "--size and --seed are for reasoning_gym:"),
        (["--source", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--source", "reasoning_gym:sudoku"], "only reasoning_gym:gsm_symbolic has worked solutions"),
        (["--save_file", "no/such/folder/x.json"], "its folder does not exist"),
    ],
)
def test_prepare_explains_wrong_arguments(official, tmp_path, arguments, message):
    done = run("prepare.py", "--source", official, "--save_file", tmp_path / "x.json", *arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "x.json").exists()


def import_prepare(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import prepare

    return prepare


def test_symbolic_problems_end_in_the_answer_they_are_scored_by(monkeypatch, tmp_path):
    """The package may close its solution with `36.0` where its answer is 36. A stand-in plays the package here."""
    entries = [
        {"question": "How much?", "answer": "36", "metadata": {"answer_cot": "6 * 6 = 36 oz\n#### 36.0"}},
        {"question": "How many?", "answer": "7", "metadata": {"answer_cot": "3 + 4 = 7\n#### 7"}},
    ]
    asked = []

    def create_dataset(name, size, seed):
        asked.append((name, size, seed))
        return entries

    monkeypatch.setitem(sys.modules, "reasoning_gym", types.SimpleNamespace(create_dataset=create_dataset))
    prepare = import_prepare(monkeypatch)
    prepare.prepare("reasoning_gym:gsm_symbolic", tmp_path / "x.json", size=2, seed=1)
    assert asked == [("gsm_symbolic", 2, 1)]
    assert [p.solution for p in gsm8k.load(tmp_path / "x.json")] == ["6 * 6 = 36 oz\n#### 36", "3 + 4 = 7\n#### 7"]


def test_absent_reasoning_gym_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # makes the import fail
    prepare = import_prepare(monkeypatch)
    with pytest.raises(ValueError, match="needs reasoning_gym: pip install reasoning-gym"):
        prepare.prepare("reasoning_gym:gsm_symbolic", tmp_path / "x.json")


def test_real_reasoning_gym_gives_loadable_problems(tmp_path):
    pytest.importorskip("reasoning_gym", reason="pip install reasoning-gym to run this")
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        arguments = ["--source", "reasoning_gym:gsm_symbolic", "--size", 50, "--seed", 1]
        done = run("prepare.py", *arguments, "--save_file", file)
        assert done.returncode == 0, done.stderr
    assert files[0].read_bytes() == files[1].read_bytes()
    assert 40 <= len(gsm8k.load(files[0])) <= 50
