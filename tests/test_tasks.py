"""Tasks besides GSM8K, a task of one's own, evaluations side by side, and --validate: as functions and through the scripts."""

import functools
import json
import os
import re
import subprocess
import sys
import time
from unittest import mock

import pytest
from ranks import run_script
from test_scripts import ROOT, first_line, lines_of, toy  # noqa: F401  fixture

from llama_rlhf.comparison import compare_runs
from llama_rlhf.records import read_records
from llama_rlhf.scoring import mcnemar_exact, wilson_interval
from llama_rlhf.tasks import Problem, answers, get_task
from llama_rlhf.validation import histogram

# ---- any questions and answers


@pytest.mark.parametrize("text, answer", [
    ("It is Rome.\n<answer> The\nHague </answer> for sure", "the hague"), ("<answer>Rome</answer> no, <answer>Paris</answer>", "paris"),
    ("so\n#### Paris.\nQuestion: #### Rome", "paris"), ("thus \\boxed{\\text{a}}, \\boxed{Paris}", "paris"), ("The answer is: **Paris**.", "paris"),
    ("Rome?\n\n  “Paris” \n", "“paris”"), ("<think>the answer is Rome</think>\nPARIS", "paris"), ("", None), ("<answer></answer>", None), (" (B) ", "b"),
    ("so \\boxed{\\text{Paris}}", "paris"), ("<answer>\\boxed{Paris}</answer>", "paris"), ("**Answer**: B", "b"), ("\\boxed{\\textbf{(B)}}", "b"),
    ("The answer is \\(x+1\\).", "x+1"), ("The answer is $\\mathrm{x}$.", "x"), ("<answer>**\\text{ New  York}**.</answer>", "new york"),
    ("\\text{a} or \\text{b}", "\\text{a} or \\text{b}"), ("$a$ or $b$", "$a$ or $b$"), ("\\(a\\) or \\(b\\)", "\\(a\\) or \\(b\\"), ("\\text{a", "\\text{a"),
    ("pages 3\u20135", "pages 3-5"), ("\\text{}", None), ("$$", "$$"),
])  # fmt: skip
def test_what_a_text_answers(text, answer):
    problem = Problem(1, "?", "", "x", frozenset({"x"}))
    assert answers.score(problem, text, True)["answer"] == answer


def test_a_text_cut_off_answers_only_where_it_said_so():
    problem = Problem(1, "?", "", "Paris", frozenset({"paris"}))
    judge = lambda text: answers.score(problem, text, False, reward=True)["score"]  # noqa: E731
    assert [judge(text) for text in ("Paris", "the answer is Paris", "#### Paris", "#### Paris\nand", "<answer>Paris</answer> and")] == [0, 0, 0, 1, 1]
    assert answers.score(problem, "Paris", False)["score"] == 1, "shown, not trained on"


@pytest.mark.parametrize("label, text, right", [
    (1450, "so it costs $1,450.00", True), ("0.50", "<answer>about .5 of it</answer>", True), ("18", "The answer is 17 or 18", False),
    (-3, "it is \u22123", True), ("NYC", "nyc.", True), ("NYC", "I say NYC", False), (["NYC", "New York"], "**new  york**", True), (".5", "5", False),
    ("x\n#### 7", "7.0", True), ("3/4", "3/4", True), ("3/4", "4", False), ("18", "<think>18</think>", False),
    (4, "<answer>3/4</answer>", False), (3, "The answer is 3/4.", False), (.75, "<answer>0.5 or \\frac{3}{4}</answer>", True), (24, "<answer>48/2 = 24</answer>", True),
    (4, "<answer>12/3</answer>", True), (12, "<answer>x = 3\\cdot 4 = 12</answer>", True), (12, "<answer>12 = x</answer>", True), ("$5$", "5", True),
    (2, "<answer>3\\sqrt{2}</answer>", False), (6, "<answer>10^6</answer>", False), (3, "the answer is \\boxed{3, -1}", False),
    ("\\text{Paris}", "Paris", True), ("\\(x+1\\)", "<answer>$x+1$</answer>", True), ("\u20135", "it is -5", True),
])  # fmt: skip
def test_answers_equal_by_value_or_by_stated_spelling(tmp_path, label, text, right):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "q", "answer": label}) + "\n" + json.dumps({"question": "q", "answer": "it", "label": label}))
    given, labelled = answers.load(tmp_path / "a.jsonl")
    assert answers.score(given, text, True)["correct"] == {"match": right} == answers.score(labelled, text, True)["correct"]
    assert labelled.solution == "it"


@pytest.mark.parametrize("text", ["\\text{" * 16_000 + "}" * 16_000, "$" * 100_000, "\\(" * 50_000, "\\(" + "\\" * 100_000, "answer" + "*" * 100_000])
def test_hostile_answers_take_under_a_second(text):
    start = time.perf_counter()
    for inside in (text, f"<answer>{text}</answer>", f"\\boxed{{{text}}}"):
        answers.score(Problem(1, "?", "", "x", frozenset({"x"})), inside, True)
    assert time.perf_counter() - start < 1


def test_answers_without_an_answer_are_refused_by_record(tmp_path):
    for record, message in (({"question": "q"}, 'line 2, record 2: missing "answer"'), ({"question": "q", "answer": " ."}, "record 2: the answer is empty"),
                            ({"question": " ", "answer": "a"}, "the question is empty"), ({"question": "q", "label": None}, "empty, or no text")):
        (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a"}\n' + json.dumps(record))
        with pytest.raises(ValueError, match=message):
            answers.load(tmp_path / "a.jsonl")


# ---- a task is one file

MY_TASK = '''
from llama_rlhf.records import prompt_of
from llama_rlhf.tasks import Problem, load_file, scored

RULES, RULE = ("whole", "start"), "whole"
TRAIN = TEST = ""


def load(file, faults=None):
    return load_file(file, lambda number, where, record: Problem(number, prompt_of(record, where), "", prompt_of(record, where)[::-1]), faults)


def score(problem, text, finished, *, rule=RULE, reward=False):
    text = text.strip()
    return scored(rule, finished, {"whole": (text, text == problem.label), "start": (text[:1], text[:1] == problem.label[:1])})
'''


def test_the_guide_shows_that_task():
    with open(os.path.join(ROOT, "docs/TASKS.md")) as file:
        assert MY_TASK.strip() in file.read()


def test_a_task_of_ones_own_is_one_file(toy, tmp_path):  # noqa: F811
    """Evaluated and trained on through the scripts; its second rule is right for every word that begins with an end."""
    (tmp_path / "backwards.py").write_text(MY_TASK)
    (tmp_path / "words.json").write_text(json.dumps([{"prompt": word} for word in ("ab", "cd", "ef", "gh")]))
    flags = dict(task=tmp_path / "backwards.py", dtype="fp32", max_new_tokens=4)
    (code, out, err), = run_script(1, "solver_evaluate.py", ckpt_dir=toy / "hf", log_dir=tmp_path / "log", label_file=tmp_path / "words.json", **flags)
    assert code == 0, err
    metrics = json.loads((tmp_path / "log/metrics.json").read_text())
    assert list(metrics["rules"]) == ["whole", "start"] and metrics["rule"] == "whole" and "by rule: whole" in out
    samples = lines_of(tmp_path / "log/samples.jsonl")
    assert [s["label"] for s in samples] == ["ba", "dc", "fe", "hg"]
    assert [s["correct_by_rule"]["start"] for s in samples] == [s["response"].strip()[:1] == s["label"][:1] for s in samples]
    (code, out, err), = run_script(1, "ppo_train.py", actor_ckpt_dir=toy / "hf", actor_save_dir=tmp_path / "ppo", train_file=tmp_path / "words.json",
                                   algorithm="rloo", num_samples_per_prompt=2, max_buffer_size=4, max_iterations=1, rule="start", **flags)
    assert code == 0 and "accuracy" in out, err
    assert "--rule 'D': use auto, or one of whole, start" in first_line(run_script(1, "solver_evaluate.py", ckpt_dir=toy / "hf", log_dir=tmp_path / "x",
                                                                                 label_file=tmp_path / "words.json", rule="D", **flags), 1)
    assert "give a file with --label_file" in first_line(run_script(1, "solver_evaluate.py", ckpt_dir=toy / "hf", log_dir=tmp_path / "x", **flags), 1)
    (tmp_path / "half.py").write_text("RULES, RULE = ('a',), 'a'")
    with pytest.raises(ValueError, match="missing: TRAIN, TEST, load, score"):
        get_task(str(tmp_path / "half.py"))
    with pytest.raises(FileNotFoundError, match="nowhere.py: no such file"):
        get_task("nowhere.py")
    (tmp_path / "typo.py").write_text("RULES = (1,\n")
    with pytest.raises(ValueError, match=r"typo.py, line 1: '\(' was never closed. Python cannot read this file."):
        get_task(str(tmp_path / "typo.py"))


def test_a_reward_function_stands_in_a_python_file(tmp_path):
    """Python has no loader for other names: one ended in an AttributeError."""
    from llama_rlhf.rollout import load_reward_function
    (tmp_path / "reward.txt").write_text("def length(prompt, response, label): return len(response)")
    with pytest.raises(ValueError, match="reward.txt: not a Python file: its name must end in .py"):
        load_reward_function(f"{tmp_path / 'reward.txt'}:length")


# ---- reasoning-gym


@pytest.fixture(scope="module")
def gym():
    """get_task, each task's process started once."""
    pytest.importorskip("reasoning_gym", reason="pip install reasoning-gym to run this")
    return functools.cache(get_task)


def test_generated_splits_are_reproducible_and_never_overlap(gym):
    task = gym("reasoning_gym:chain_sum,min_terms=2,max_terms=2,min_digits=1,max_digits=1,seed=3")       # few questions: repeats are sure
    train, test = task.load("train:150"), task.load("test:40")
    texts = [{p.prompt for p in part} for part in (train, test, gym("reasoning_gym:chain_sum,min_terms=2,max_terms=2,min_digits=1,max_digits=1").load("test:40"))]
    assert (len(texts[0]), len(texts[1])) == (150, 40), "a question comes once"
    assert not texts[0] & texts[1] and not texts[0] & texts[2], "at no seed"
    assert [p.id for p in test] == list(range(1, 41)) and test[:10] == task.load("test:10")
    with pytest.raises(ValueError, match=r"gives \d+ different questions for test in \d+ tries, not 300"):
        task.load("test:300")
    for source in ("dev", "test:0", "dataset/GSM8K/train.json"):
        with pytest.raises(ValueError, match="write train:2000 or test:200"):
            task.load(source)
    # ransom_note's questions depend on Python's hash seed, which differs between processes
    code = "from llama_rlhf.tasks import get_task; print(get_task('reasoning_gym:ransom_note').load('test:5'))"
    seen = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": seed}).stdout
            for seed in ("1", "2")}
    assert len(seen) == 1 and seen != {""}


def test_another_seed_gives_other_problems(gym):
    """The package's seed is a place in one sequence: with seed=1 all 200 test problems were those of seed=0, one place further."""
    zero, one = ({p.prompt for p in gym(f"reasoning_gym:chain_sum,seed={seed}").load("test:50")} for seed in (0, 1))
    assert len(zero & one) < 5


def test_the_datasets_own_score_counts(gym):
    task = gym("reasoning_gym:chain_sum")
    problem = task.load("test:1")[0]
    whole, padded = (task.score(problem, text, True) for text in (f"I think\nThe answer is {problem.label}.", f"<answer>{problem.label} apples</answer>"))
    assert whole["score"] == 1 and whole["correct"] == {"own": True} and whole["answer"] == problem.label
    assert padded["score"] == pytest.approx(len(problem.label) / (len(problem.label) + 7)) and padded["correct"] == {"own": False}
    from llama_rlhf.rollout import Prompt, Reward
    reward = Reward(task=task, rule="own", rule_weight=2.0).judge_text(Prompt(1, "", [], problem), f"<answer>{problem.label} apples</answer>", True)
    assert reward == (False, {"rule": 2 * padded["score"]}), "the reward is the score, in parts too"
    assert task.score(problem, problem.label, False, reward=True)["score"] == 0, "cut off"
    assert task.score(problem, "", True)["answer"] is None
    assert task.score(gym("reasoning_gym:prime_factorization").load("test:1")[0], "no number", True)["score"] == 0


@pytest.mark.parametrize("text", ["__import__('os').system('touch {}')", "S('o'+'p'+'e'+'n'+'(\"{}\",\"w\")')", "open(chr(47))", "().__class__"])
def test_an_answer_is_never_run(gym, tmp_path, text):
    """countdown and puzzle24 give the answer to sympy, whose parser is eval."""
    task = gym("reasoning_gym:countdown")
    problem = task.load("test:1")[0]
    assert task.score(problem, f"<answer>{text.replace('{}', str(tmp_path / 'run'))}</answer>", True)["score"] == 0
    assert not (tmp_path / "run").exists() and task.score(problem, problem.label, True)["score"] == 1


def test_a_score_that_takes_for_ever_ends(gym, monkeypatch):
    from llama_rlhf.tasks import reasoning_gym
    monkeypatch.setattr(reasoning_gym, "SCORE_SECONDS", 1)
    task = gym("reasoning_gym:countdown")
    problem = task.load("test:1")[0]
    assert task.score(problem, "<answer>9**9**9**9</answer>", True)["score"] == 0
    assert task.score(problem, problem.label, True)["score"] == 1, "the process is there again"


def test_an_interrupted_score_is_not_the_answer_to_the_next(gym, monkeypatch):
    """As with chat templates: after Ctrl-C in a notebook every answer was that to the request before."""
    from llama_rlhf.tasks import reasoning_gym
    task = gym("reasoning_gym:countdown")
    problem = task.load("test:1")[0]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(reasoning_gym.pickle, "load", mock.Mock(side_effect=KeyboardInterrupt))
        task.score(problem, problem.label, True)
    assert task.score(problem, "<answer>1</answer>", True)["score"] < 1
    assert task.score(problem, problem.label, True)["score"] == 1


def test_a_mixture_of_datasets_is_the_file_of_the_docs_each_scored_by_its_own_function(gym, tmp_path):
    """"composite" takes a list of objects, which no flag can hold. And its score is another's: what runs text must be seen behind it."""
    docs = open(os.path.join(ROOT, "docs", "TASKS.md")).read()
    listed = re.search(r"```yaml\n(datasets:\n.*?)```", docs, re.DOTALL)[1]
    (tmp_path / "mix.yaml").write_text(listed + "- {name: countdown, weight: 2}\n")
    task = gym(f"reasoning_gym:composite,datasets={tmp_path}/mix.yaml,seed=1")
    of = {}
    for problem in task.load("test:40"):
        of.setdefault(problem.more["metadata"]["source_dataset"], []).append(problem)
    assert of.keys() == {"chain_sum", "leg_counting", "countdown"} and len(of["chain_sum"]) > len(of["leg_counting"])
    assert all(problem.prompt.count(" + ") + problem.prompt.count(" - ") in (1, 2) for problem in of["chain_sum"]), "of two or three terms"
    for problems in of.values():
        assert task.score(problems[0], f"<answer>{problems[0].label}</answer>", True)["score"] == 1 > task.score(problems[0], "<answer>-1</answer>", True)["score"]
    task.score(of["countdown"][0], f"<answer>open('{tmp_path}/run', 'w')</answer>", True)
    assert not (tmp_path / "run").exists()
    for text, message in (("datasets: [{name: chain_summ}]", "chain_summ"), ("datasets: [{nam: chain_sum}]", "'nam'"), ("datasets: 3", "takes a file"), ("{", "takes a file")):
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            gym(f"reasoning_gym:composite,datasets={tmp_path}/wrong.yaml")


@pytest.mark.parametrize("name, message", [
    ("reasoning_gym:composite", "takes a file, as in composite,datasets=mix.yaml"), ("reasoning_gym:composite,datasets=none.yaml", "No such file"),
    ("reasoning_gym:chain_summ", "Did you mean chain_sum"), ("reasoning_gym:chain_sum,min_term=2", "Its settings are min_terms, max_terms"),
    ("reasoning_gym:chain_sum,min_terms=-1", "must be positive"), ("reasoning_gym:chain_sum,seed=x", "seed must be a whole number"),
    ("reasoning_gym:chain_sum,size=3", "the size goes with the file flags"), ("reasoning_gym", "no dataset of that name"),
])  # fmt: skip
def test_wrong_names_and_settings_are_one_sentence(gym, name, message):
    with pytest.raises(ValueError, match=message):
        gym(name)


def test_without_the_package_the_remedy_is_named(monkeypatch, tmp_path):
    (tmp_path / "reasoning_gym.py").write_text("raise ModuleNotFoundError('gone', name='reasoning_gym')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    with pytest.raises(ValueError, match="needs reasoning_gym: pip install reasoning-gym"):
        get_task("reasoning_gym:chain_sum")


def test_generated_problems_in_every_script(gym, toy, tmp_path):  # noqa: F811
    """Fine-tune on the form, answer several times (on two ranks: the same problems on both), and PPO, with no file at all."""
    task = "reasoning_gym:chain_sum,min_terms=2,max_terms=2,min_digits=1,max_digits=1"
    flags = dict(task=task, dtype="fp32", max_new_tokens=4)
    (code, out, err), = run_script(1, "solver_train.py", ckpt_dir=toy / "hf", save_dir=tmp_path / "sft", train_file="train:12", label_file="test:3",
                                   max_seq_len=96, epochs=1, **flags)
    assert code == 0 and "<answer>" in out, err
    ranks = run_script(2, "solver_evaluate.py", ckpt_dir=tmp_path / "sft", label_file="test:5", num_samples_per_prompt=2, **flags)
    assert [code for code, *_ in ranks] == [0, 0], ranks
    log_dir, = (tmp_path / "sft").glob("evaluate-*-epoch-1")
    assert re.fullmatch(r"[\w.-]+", log_dir.name)
    samples, metrics = lines_of(log_dir / "samples.jsonl"), json.loads((log_dir / "metrics.json").read_text())
    assert len(samples) == 10 and {s["prompt"] for s in samples} == {p.prompt for p in get_task(task).load("test:5")}
    assert metrics["rule"] == "own" and all(0 <= s["points"] <= 1 for s in samples)
    (code, out, err), = run_script(1, "ppo_train.py", actor_ckpt_dir=tmp_path / "sft", actor_save_dir=tmp_path / "ppo", train_file="train:20",
                                   algorithm="rloo", num_samples_per_prompt=2, max_buffer_size=8, max_iterations=1, **flags)
    assert code == 0 and "20 prompts of train:20" in out, err


# ---- side by side


def write_run(folder, right, *, samples=1, scores=None, prompts="p{}"):
    """An evaluation in which problem i's sample k is right if right[i][k]; in the reader's form, written by the evaluator's own functions."""
    from llama_rlhf.evaluation import summarize
    rows = [{"id": i, "sample": k, "prompt": prompts.format(i), "response": f"I say\n{hit}", "answer": str(hit), "label": "1", "correct": bool(hit),
             "finished": True, "n_tokens": 3, "answers": {"match": str(hit)}, "correct_by_rule": {"match": bool(hit)}, **({"score": scores[i - 1][k]} if scores else {})}
            for i, hits in enumerate(right, 1) for k, hit in enumerate(hits)]
    folder.mkdir()
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metrics.json").write_text(json.dumps(summarize(rows, "match")))
    return str(folder)


def test_compare_tests_pairs_and_shows_what_changed(tmp_path):
    a = write_run(tmp_path / "a", [[0]] * 6 + [[1]] * 4)
    b = write_run(tmp_path / "b", [[1]] * 5 + [[0]] + [[1]] * 3 + [[0]])
    text = compare_runs([a, b], show=2)
    low, high = wilson_interval(4, 10)
    assert re.search(rf"{re.escape(a)} +40.0% +{low:.1%} to +{high:.1%} +40.0% +100.0% +3", text)
    assert f"5 became right, 1 became wrong, McNemar p = {mcnemar_exact(5, 1):.2g}" in text
    assert "the first 2 (--limit shows more)" in text and text.count("-- problem") == 2
    assert "-- problem 1, became right; label 1\np1\nwrong, answer 0" in text
    assert re.search(r"^I say +\| I say\n0 +\| 1$", text, re.MULTILINE)
    assert compare_runs([a, b], show=-1).count("-- problem") == 6 and "problem 10, became wrong" in compare_runs([a, b], show=-1)
    assert "-- problem" not in compare_runs([a, b], show=0) and "problem 1," not in compare_runs([a, a])


def test_compare_takes_the_answer_a_verifier_prefers_too(tmp_path):
    a = write_run(tmp_path / "a", [[0], [0], [1]])
    b = write_run(tmp_path / "b", [[0, 1], [0, 1], [1, 0]], scores=[[0.1, 0.2], [0.1, 0.2], [0.1, 0.2]])
    text = compare_runs([a, b])
    assert "0 became right, 0 became wrong" in text
    assert f"{b}, best of 2, against {a}, 3 common problems, rule match: 2 became right, 1 became wrong" in text


def test_compare_refuses_what_cannot_be_compared(tmp_path):
    a, b = write_run(tmp_path / "a", [[0]]), write_run(tmp_path / "b", [[0]], prompts="q{}")
    with pytest.raises(ValueError, match=r"answered different problems \(first: id 1\)"):
        compare_runs([a, b])
    with pytest.raises(FileNotFoundError, match="metrics.json: not there"):
        compare_runs([a, str(tmp_path)])
    (tmp_path / "b/metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="is not what solver_evaluate.py writes"):
        compare_runs([a, b])


def test_compare_needs_no_torch(tmp_path):
    """`--compare A B` as people type it, where torch cannot be imported."""
    a, b = write_run(tmp_path / "a", [[0]]), write_run(tmp_path / "b", [[1]])
    (tmp_path / "torch.py").write_text("raise ImportError('torch must not be imported to compare')")
    done = subprocess.run([sys.executable, "solver_evaluate.py", "--compare", a, b, "--limit", "1"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and "1 became right" in done.stdout and "became right; label 1" in done.stdout, done.stderr


# ---- --validate


def validate(script, toy, **flags):  # noqa: F811
    ckpt, save = ("actor_ckpt_dir", "actor_save_dir") if script == "ppo_train.py" else ("ckpt_dir", "save_dir")
    (code, out, err), = run_script(1, script, **{ckpt: toy / "hf", save: toy / "never", "validate": True, **flags})
    assert not (toy / "never").exists() and not err, err
    return code, out


@pytest.mark.parametrize("script", ["solver_train.py", "verifier_train.py", "ppo_train.py"])
def test_good_data_is_described_and_nothing_is_loaded(script, toy, tmp_path):  # noqa: F811
    (tmp_path / "test.json").write_text(json.dumps([{"instruction": "9+9?", "output": "#### 18"}]))
    length = dict(max_new_tokens=80) if script == "ppo_train.py" else dict(max_seq_len=20)
    code, out = validate(script, toy, train_file=toy / "train.json", label_file=tmp_path / "test.json", **length)
    assert code == 0 and out.rstrip().endswith(": 0 faults") and "0+0?" in out and "####" in out, out
    rows = read_records(toy / "train.json")
    if script == "solver_train.py":         # bos, the prompt, its newline, the answer, eos
        lengths = [len(row["instruction"] + row["output"]) + 3 for row in rows]
        assert f"longest {max(lengths)}, {sum(lengths)} in all" in out and f"{sum(n > 20 for n in lengths)} cut at the end" in out
        assert sum(int(line.split()[3]) for line in out.splitlines() if re.match(r" +\d+ to", line)) == 20
        assert "(16 tokens, 10 trained on)" not in out and "⟦0+0=0\n#### 0<eos>⟧" in out


def test_all_faults_are_found_at_once(toy, tmp_path):  # noqa: F811
    (tmp_path / "bad.jsonl").write_text("\n".join([
        '{"question": "a  B", "answer": "x\\n#### 3"}', '{"question": "b", "answer": " "}', '{"question": "c", "answer": "4"}', "{oops", "[1]",
        '{"question": "d", "answers": "x"}', '{"question": "e", "answer": "#### one"}', '{"question": "a  B", "answer": "x\\n#### 3"}']))
    (tmp_path / "test.json").write_text(json.dumps([{"instruction": "A b", "output": "#### 2"}, {"instruction": "z", "output": "7"}]))
    code, out = validate("solver_train.py", toy, train_file=tmp_path / "bad.jsonl", label_file=tmp_path / "test.json", max_seq_len=97)
    assert code == 1 and out.rstrip().endswith("6 records, 5 examples: 9 faults"), out
    for fault in ("--max_seq_len 97 is more than the model's 96", "line 4, column 2: not valid json", "line 5, record 4: expected an object",
                  'line 6, record 4: missing "answer" (keys: question, answers)', "line 2, record 2: the answer is empty",
                  "line 7, record 5: label '#### one'", "line 3, record 3: the answer has no line", "test.json, line 1, record 2: the solution has no line",
                  "test.json, record 1: the prompt is also in the training data"):
        assert len(re.findall(f"^wrong: .*{re.escape(fault)}", out, re.MULTILINE)) == 1, fault
    assert "note: 1 examples stand there more than once" in out
    (tmp_path / "half.json").write_text(json.dumps([{"instruction": "a", "output": ["good", "good \ud83d"]}, {"prompt": "b", "chosen": ["\ud83d"], "rejected": "c"}]))
    for script, n, name in (("solver_train.py", 1, "output"), ("verifier_train.py", 1, "output")):
        code, out = validate(script, toy, train_file=tmp_path / "half.json", max_seq_len=96)
        assert code == 1 and f'half.json, line 1, record {n}: "{name}" holds half a character' in out, out
    code, out = validate("ppo_train.py", toy, train_file=tmp_path / "bad.jsonl", max_new_tokens=95)
    assert code == 1 and "no record fits --max_seq_len 96 less --max_new_tokens 95" in out and "line 3, record 3: the solution has no line" in out, out


def test_a_test_problem_behind_a_system_turn_is_found_in_the_training_data(toy, tmp_path):  # noqa: F811
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is  1+1?"}, {"role": "assistant", "content": "#### 2"}]
    (tmp_path / "train.json").write_text(json.dumps([{"messages": turns}, {"system": "Be", "question": "2+2?", "answer": "#### 4"}]))
    (tmp_path / "test.json").write_text(json.dumps([{"question": q, "answer": "#### 4"} for q in ("what is 1+1?", "What is 2+2?", "2+2?")]))
    for script in ("solver_train.py", "ppo_train.py"):
        code, out = validate(script, toy, train_file=tmp_path / "train.json", label_file=tmp_path / "test.json", max_new_tokens=4)
        found = re.findall(r"test.json, record (\d): the prompt is also in the training data, \S*train.json, (?:line 1, )?record (\d)", out)
        assert code == 1 and found == [("1", "1"), ("3", "2")], out


def test_judged_data_are_validated_as_the_verifier_reads_them(toy, tmp_path):  # noqa: F811
    rows = [{"prompt": "a", "chosen": "x", "rejected": "y"}, {"prompt": "b", "chosen": "", "rejected": "y"}, {"prompt": "c", "chosen": "x"}]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    code, out = validate("verifier_train.py", toy, train_file=tmp_path / "pairs.json", label_file=toy / "train.json", max_seq_len=96)
    assert code == 1 and "record 2: a response is empty" in out and 'record 3: missing "rejected"' in out and ": 2 faults" in out, out
    code, out = validate("verifier_train.py", toy, train_file=tmp_path / "pairs.json", loss="mse", max_seq_len=96)
    assert code == 1 and "--loss mse needs responses labelled right or wrong" in out
    (tmp_path / "labels.json").write_text(json.dumps([{"instruction": "a", "output": "b", "label": 1}, {"instruction": "a", "output": "c", "label": 0}]))
    code, out = validate("verifier_train.py", toy, train_file=tmp_path / "labels.json", label_file=tmp_path / "pairs.json", max_seq_len=96)
    assert code == 1 and "pairs.json: --loss mse needs responses labelled right or wrong" in out, "the training data choose the loss"
    code, out = validate("verifier_train.py", toy, train_file=toy / "train.json", label_file=toy / "test.json", max_seq_len=96)
    assert code == 1 and out.count("is also in the training data") == 7, out


def test_a_histogram_counts_everything():
    lines = histogram([3, 3, 4, 50, 101, 102])
    assert [int(line.split()[3]) for line in lines] == [3, 0, 0, 0, 1, 0, 0, 0, 0, 2] and lines[0].split()[4] == "#" * 40
    assert histogram([7]) == ["  7 to 7        1  " + "#" * 40]
