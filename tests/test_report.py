"""The report: which records count, what it shows, that nothing in the data becomes part of the page, and what a browser makes of it."""

import functools
import html.parser
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from ranks import run_script
from test_scripts import lines_of, split, toy  # noqa: F401

from llama_rlhf import curves, report
from llama_rlhf.curves import series, thin
from llama_rlhf.runlog import RunLog, check_tracker

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & $x_1$ </style></svg>"


def write_run(folder, script="ppo_train.py", records=(), **arguments):
    os.makedirs(folder, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"script": script, "arguments": arguments, "environment": {"torch": "2"}, "started": "2026-01-01T10:00:00+00:00"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"time": 1767261600.0 + n, "run": "2026-01-01T10:00:00+00:00", **r}) + "\n" for n, r in enumerate(records)))
    return folder


def iteration(step, **more):
    return {"kind": "iteration", "step": step, "score": step / 10, "accuracy": 0.05 * step, "entropy": 1.0, "seconds": 3.0, "phases": {"generate": 1.0, "actor": 2.0}, **more}


def samples(folder, step, correct):
    rows = [dict(id=n, sample=0, prompt=f"{n}+1? {HOSTILE}", response=f"is {HOSTILE}" + "unbroken" * 100, label="2", correct=right, finished=True)
            for n, right in enumerate(correct)]
    (folder / f"samples-{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The report of a PPO run and a verifier with markup wherever data can put it, folder names included."""
    tmp_path = tmp_path_factory.mktemp("hostile")
    ppo = write_run(tmp_path / "<b>ppo" / "log", records=[*(iteration(step) for step in range(1, 5)), {"kind": "memory", "planned_bytes": 2e9, "besides_bytes": 5e8, "peak_bytes": 1e9,
                    "planned": {"actor": {"weights": 1.5e9, "optimizer": 5e8, "peak": 0}, "shared": 1e8}},
                    *({"kind": "samples", "step": s, "samples": [{"prompt": HOSTILE, "response": HOSTILE, "score": 1.0, "correct": None}]} for s in (1, 4)),
                    *({"kind": "evaluation", "step": s, "rule": "D"} for s in (0, 4))],
                    system_prompt=HOSTILE, lr=1e-5)
    samples(ppo, 0, [False, True, False, True])
    samples(ppo, 4, [True, False, True, True])
    scored = [{"id": str(n // 2), "prompt": HOSTILE, "judged": "right", "pieces": ["a", HOSTILE, "", "\nb"], "probabilities": [0.1, 0.2, 0.3, 0.9]} for n in range(3)]
    verifier = write_run(tmp_path / "verifier&", "verifier_train.py", [{"kind": "train", "step": 1, "loss": 2.0, "lr": 0.1, "grad_norm": None, "seconds": 1.5},
                                                                       {"kind": "train", "step": 2, "loss": 500.0},
                         {"kind": "scored", "step": 1, "responses": scored}], lr=2e-5)
    return report.write([str(tmp_path / "<b>ppo"), str(verifier)], str(tmp_path / "out" / "report.html"))


class Page(html.parser.HTMLParser):
    """Elements and attributes of a page, and its text without style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self._in_style = set(), set(), "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self._in_style = tag == "style"

    def handle_data(self, data):
        self.text += "" if self._in_style else data


def test_the_page_has_the_data_and_none_of_it_as_markup(hostile):
    text = open(hostile, encoding="utf-8").read()
    page = Page(text)
    assert not page.tags & {"script", "img", "iframe", "object"} and not {name for name in page.attributes if name.startswith("on")}
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", text), "the page must not fetch anything"
    assert page.text.count(HOSTILE) == 3 * 4 + 2 * 2 + 1 + 2 + 3      # prompt and two responses, drawn samples, setting, prompts and pieces of the verifier
    assert "2 became right" in page.text and "1 became wrong" in page.text
    assert "2 runs compared" not in page.text and "<b>ppo and verifier& compared" in page.text
    assert re.search(r"score\s+0.1 → 0.4\s*what is optimised", page.text) and "planned 2 GB and 500 MB for libraries and malloc, peak 1 GB (40 % of that)" in page.text
    assert "The plan, by role, in GB" in page.text and "base of all roles0.1" in page.text
    assert "generate 4.0 s" in page.text and "actor 8.0 s" in page.text and "training steps 1.5 s" in page.text
    for title in ("Score: what is optimised", "Exact accuracy against score", "Entropy, nats per token", "Loss", "Learning rate"):
        assert f'<svg role="img" aria-label="{title}"' in text
    assert "Explained variance" not in text, "a curve that nobody recorded"
    colours = re.findall(r'rgba\((\d+),[\d,]+,([\d.]+)\)" title="([\d.]+)"', text)
    assert ("234", "0.75", "0.100") in colours and ("59", "0.75", "0.900") in colours, "the extremes in full colours"
    assert open(hostile.replace(".html", ".png"), "rb").read(8) == b"\x89PNG\r\n\x1a\n"
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:href="#|url\(#)(\w+)', text)) <= set(ids)
    differing = re.search(r'<tr class="differs"><td>lr</td><td>([^<]*)</td><td>([^<]*)</td>', text)
    assert differing.groups() == ("1e-05", "2e-05")


def browser():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(browser() is None, reason="no chromium on PATH")
def test_a_browser_opens_it(hostile, tmp_path):
    """At the width of a phone and of a desk: nothing in the console, nothing wider than the page, no script run, the drawings there."""
    shutil.copy(hostile, tmp_path)
    (tmp_path / "frames.html").write_text("""<link rel="icon" href="data:,"><iframe width="390" height="800" src="report.html"></iframe>
        <iframe width="1280" height="800" src="report.html"></iframe><pre></pre><script>onload = () => {
            document.querySelector("pre").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(({contentDocument: page}) => { return {
                scripts: page.scripts.length, title: page.title, width: page.documentElement.scrollWidth, hostile: page.body.innerText.split("<script>").length,
                drawn: [...page.querySelectorAll("figure svg")].map((svg) => svg.getBBox().width) }; })); };</script>""")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = subprocess.run([browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--enable-logging=stderr",
                               "--window-size=1400,1000", "--dump-dom", f"http://127.0.0.1:{server.server_address[1]}/frames.html"], capture_output=True, text=True, timeout=300)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r"<pre>(.*)</pre>", done.stdout, re.DOTALL)
    phone, desk = json.loads(html.unescape(found[1]))
    assert phone["width"] <= 390 and desk["width"] <= 1280, (phone["width"], desk["width"])
    assert phone["scripts"] == desk["scripts"] == 0 and phone["hostile"] > 10 and phone["title"] == "<b>ppo, verifier&"
    assert len(desk["drawn"]) == 7 and all(width > 100 for width in desk["drawn"])


def test_what_a_continued_run_has_superseded_does_not_count(tmp_path, world_of_one):
    run = tmp_path / "run"
    log = RunLog(str(run), total=9)
    log.started = "2026-01-01T10:00:00+00:00"
    for step in range(1, 6):
        log.record("train", step=step, loss=float(step))
    log.close()
    log = RunLog(str(run), total=9)
    log.started = "2026-01-01T11:00:00+00:00"
    log.resumed(3)
    log.record("train", step=4, loss=40.0)
    log.close()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')         # the process was killed in the middle of a line
    assert series(report.read_run(str(run), ""), "train", "loss") == ((1, 2, 3, 4), (1.0, 2.0, 3.0, 40.0))
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 8 is not JSON.*Remove the line"):
        report.read_run(str(run), "")
    lines = (run / "metrics.jsonl").read_text().splitlines()[:-1]
    again = [{"kind": "train", "step": 1, "run": "2026-01-01T12:00:00+00:00", "time": 0, "loss": 7.0}]
    (run / "metrics.jsonl").write_text("\n".join([*lines, *map(json.dumps, again)]) + "\n")
    assert series(report.read_run(str(run), ""), "train", "loss") == ((1,), (7.0,)), "started anew: nothing of the earlier runs"
    with pytest.raises(FileNotFoundError, match="neither metrics.jsonl nor metrics.json"):
        report.read_run(str(tmp_path), "")
    with pytest.raises(FileNotFoundError, match=f"such as {tmp_path}/run; this folder holds run$"):
        report.read_run(str(tmp_path), "")


def test_curves_of_the_arithmetic_example_are_of_the_records_that_count(tmp_path):
    """curves.py printed an iteration twice when a run was continued, and fell over a run without labels and over a line cut off by a kill."""
    more = {"response_length": 9.0, "seconds": 1.0}
    records = [iteration(1, **more), iteration(2, **more), {"kind": "evaluation", "step": 2, "accuracy": 0.25},
               {"kind": "resumed", "step": 1, "run": "2026-01-01T11:00:00+00:00"},
               iteration(2, **more, run="2026-01-01T11:00:00+00:00") | {"score": 7.5, "accuracy": None, "kl_sequence": None}]
    with open(write_run(tmp_path / "run" / "log", records=records) / "metrics.jsonl", "a") as file:
        file.write('{"kind": "iter')
    curves = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "examples", "arithmetic", "curves.py")
    done = subprocess.run([sys.executable, curves, tmp_path / "run"], capture_output=True, text=True, cwd=tmp_path)
    rows = [line.split() for line in done.stdout.splitlines()[3:]]
    assert rows == [["1", "0.100", "5.0%", "-", "1.000", "9.0", "1.0"], ["2", "7.500", "-", "-", "1.000", "9.0", "1.0"]], done.stderr


def test_samples_of_an_evaluation_that_does_not_count_are_not_shown(tmp_path):
    """A run started anew in the folder of a longer one shows its own last evaluation, not the file that the other left."""
    run = write_run(tmp_path / "run", "solver_train.py", [{"kind": "evaluation", "step": 9, "run": "2026-01-01T09:00:00+00:00", "rule": "D"},
                                                          *({"kind": "evaluation", "step": step, "rule": "D"} for step in (0, 3))])
    for step, correct in ((0, [False, False]), (3, [False, True]), (9, [True, True])):
        samples(run, step, correct)
    compared, = report.before_and_after([report.read_run(str(run), "run")])
    assert compared["names"] == ["step 0", "step 3"] and compared["paired"]["gained"] == 1


def test_of_many_evaluations_the_answers_of_first_and_last_are_read_and_a_curve_is_made_once(tmp_path, monkeypatch):
    """All samples-N.jsonl of a long run were held at once, gigabytes of them, and each curve was computed from all records six times."""
    evaluations = [dict(kind="evaluation", step=step, accuracy=step / 10, interval=[0.0, 1.0], n_problems=1, rule="D") for step in (0, 2, 4, 6)]
    folder = write_run(tmp_path / "run", records=[*map(iteration, range(1, 7)), *evaluations])
    for evaluation in evaluations:
        samples(folder, evaluation["step"], [True])
    read, read_lines, made, thinned = [], report._read_lines, [], thin
    monkeypatch.setattr(report, "_read_lines", lambda path: read.append(os.path.basename(path)) or read_lines(path))
    monkeypatch.setattr(curves, "thin", lambda points, most: made.append((tuple(points), most)) or thinned(points, most))
    report.write([str(folder)], str(tmp_path / "report.html"))
    assert read == ["metrics.jsonl", "samples-0.jsonl", "samples-6.jsonl"]
    assert len([points for points, _ in made if points]) <= 3 * len({points for points, _ in made})


def test_evaluations_beside_each_other_are_judged_by_one_rule(tmp_path):
    """The same answers under two headline rules are no difference; prompts of messages are shown and compared as well."""
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": HOSTILE}]
    for rule in "AD":
        os.makedirs(tmp_path / rule)
        rows = [{"id": str(n), "sample": 0, "prompt": prompt, "response": "The answer is 2", "label": "2", "finished": True, "correct": rule == "D",
                 "correct_by_rule": {"A": False, "D": True}} for n in range(9)]
        (tmp_path / rule / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / rule / "metrics.json").write_text(json.dumps({"rule": rule, "arguments": {}, "environment": {}}))
    for names, right in (("AD", "✗ wrong"), ("DA", "✓ right")):
        page = Page(open(report.write([str(tmp_path / name) for name in names], str(tmp_path / "page.html")), encoding="utf-8").read()).text
        assert "0 became right" in page and "0 became wrong" in page and page.count(right) == 2 * report.N_ITEMS
        assert page.count("system: Be brief.\nuser: " + HOSTILE) == report.N_ITEMS


def test_a_line_that_was_cut_off_is_not_written_on(tmp_path, world_of_one):
    """A full disk, a power cut: what remains of the line goes, the records before it still count."""
    for step in (10, 20):
        RunLog(str(tmp_path), total=30).record("train", step=step, loss=1.0)
    os.truncate(tmp_path / "metrics.jsonl", (tmp_path / "metrics.jsonl").stat().st_size - 30)
    log = RunLog(str(tmp_path), total=30)
    log.resumed(10)
    log.record("train", step=20, loss=2.0)
    assert [(r["step"], r["loss"]) for r in report.read_run(str(tmp_path), "run").of("train")] == [(10, 1.0), (20, 2.0)]


def test_a_file_that_ends_within_a_letter_is_read_up_to_its_last_line(tmp_path, world_of_one):
    """Samples hold letters of several bytes; a run that is killed may have written some of them."""
    log = RunLog(str(tmp_path), total=1)
    log.record("evaluation", step=1, accuracy=0.5)
    log.close()
    (tmp_path / "samples-1.jsonl").write_bytes('{"prompt": "é"}\n{"prompt": "é'.encode()[:-1])
    assert report.read_run(str(tmp_path), "run").answers == [("step 1", [{"prompt": "é"}])]


def test_a_run_that_has_recorded_nothing_yet_has_a_page(tmp_path):
    for records in ([], [{"kind": "resumed", "step": 3}]):
        out = report.write([str(write_run(tmp_path / str(len(records)), "solver_train.py", records))], str(tmp_path / "page.html"))
        with open(out) as file:
            assert "solver_train.py" in file.read()


def test_a_run_given_twice_is_shown_once_and_files_of_others_are_named(tmp_path):
    run = write_run(tmp_path / "run" / "log", "solver_train.py", [{"kind": "train", "step": 1, "loss": 2.0}])
    with open(report.write([str(run.parent), str(run)], str(tmp_path / "page.html"))) as file:
        assert "<h1>Fine-tuning: run</h1>" in file.read()
    (tmp_path / "metrics.json").write_text('{"eval_loss": 1.0}')
    with pytest.raises(ValueError, match=f"{tmp_path}: its files are not what the scripts write .KeyError: 'arguments'"):
        report.read_run(str(tmp_path), "")


def test_small_things():
    assert thin([(n, 2.0 * n) for n in range(10)], 4) == ((1, 4, 7, 9), (2.0, 8.0, 14.0, 18.0)) and thin([], 4) == ((), ())
    assert report.names_of(["/runs/a/ppo/log", "/runs/a/grpo"]) == ["ppo", "grpo"] and report.names_of(["/runs/x/log", "/runs/b/x"]) == ["x", "b/x"]
    assert [report.number(value) for value in (0.0123456, 3, 12345678)] == ["0.01235", "3", "12345678"]
    runs = [report.Run(name, "", "", {"lr": 1.23456e-5, "compare": ["a", "b"], "limit": limit, "chat": None}, {}) for name, limit in (("a", 1), ("b", 2))]
    assert report.table(runs, "settings") == [("lr", ["1.23456e-05"] * 2, False, True), ("compare", ["a, b"] * 2, False, True), ("limit", ["1", "2"], True, True),
                                               ("chat", ["none"] * 2, False, True)], "runs that did not record what was given: all of it stands open"
    runs[0].given, runs[1].given = ["lr"], []
    assert [row[3] for row in report.table(runs, "settings")] == [True, False, False, False]
    assert report.headline(runs) == "a and b compared" and report.headline([report.Run("x", "", "ppo_train.py", {"algorithm": "grpo"}, {})]) == "GRPO: x"
    assert report.headline(runs * 2) == "4 runs compared" and [report.as_flag(value) for value in (True, None, "", 0.5)] == ["true", "none", '""', "0.5"]
    evaluated = report.Run("x", "", "", {}, {}, records=[{"kind": "evaluation", "memory": {"planned_bytes": 3e6, "peak_bytes": 4e6, "planned": {"a": {"w": 2e6, "peak": 9, "g": 0}, "shared": 1e6}}}])
    assert report.planned(report.memory(evaluated)) == ("MB", ["w", "weights"], [("a", ["2", ""]), ("base of all roles", ["", "1"])])
    assert [report.size(n) for n in (2_050_000, 2.5e9)] == ["2.05 MB", "2.5 GB"]


def test_the_progress_line_shows_time_left_and_throughput_of_this_session(tmp_path, capsys, world_of_one):
    import time
    log = RunLog(str(tmp_path), total=1000)
    log.resumed(900)
    for _ in range(3):
        time.sleep(0.05)
        log.advance(loss="1.0", tok_s="123")
    line = str(log._bar)
    log.close()
    rate = float(re.search(r"([\d.]+)step/s", line)[1])
    assert "903/1000" in line and "loss=1.0, tok_s=123" in line and re.search(r"\[00:0\d<\d\d:\d\d,", line), line
    assert 5 < rate < 20, "steps of an earlier session must not count as done in this one"


def test_in_a_file_the_progress_line_is_drawn_on_lines_of_its_own(tmp_path, capsys, world_of_one):
    """A log read "  0%|    | 0/3 [00:00<?]      step 1/3 loss ...", and had the progress line again before every line."""
    log = RunLog(str(tmp_path), total=3)
    for step in range(1, 4):
        log.advance(loss="1.0")
        log.write(f"step {step}/3")
    log.close()
    out, err = capsys.readouterr()
    assert out == "step 1/3\nstep 2/3\nstep 3/3\n"
    assert "\r" not in err and [line.split("|")[0] for line in err.splitlines()] == ["0%", "100%"], err


def test_trackers(tmp_path, world_of_one):
    with pytest.raises(ValueError, match="--tracker 'mlflow': use none, tensorboard or wandb"):
        check_tracker("mlflow")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = RunLog(str(tmp_path), total=2, tracker="tensorboard")
    for step in (1, 2):
        log.record("iteration", step=step, score=0.5 * step, phases={"generate": 1.0}, note="text", gap=None)
    log.record("remark", score=1.0)         # no step: nothing to plot it against
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["iteration/phases/generate", "iteration/score"]
    assert [(event.step, event.value) for event in events.Scalars("iteration/score")] == [(1, 0.5), (2, 1.0)]


def test_wandb_stays_offline(tmp_path, monkeypatch, world_of_one):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    log = RunLog(str(tmp_path), total=1, tracker="wandb")
    log.record("train", step=1, loss=0.5)
    log.close()
    assert [name for name in os.listdir(tmp_path / "wandb") if name.startswith("offline-run-")]


def test_a_package_that_is_missing_is_named_before_the_models_are_loaded(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Run `pip install wandb`"):
        check_tracker("wandb")
    report.at_the_end(str(tmp_path / "my run"))
    assert capsys.readouterr().out == f"for a report with curves: pip install matplotlib && python -m llama_rlhf.report '{tmp_path}/my run'\n"
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        report.main([str(tmp_path)])


def test_a_report_that_cannot_be_written_does_not_fail_the_run(capsys, tmp_path):
    report.at_the_end(str(tmp_path))
    assert "no report: FileNotFoundError" in capsys.readouterr().err


def test_scores_after_every_token_are_those_of_the_text_so_far(toy, world_of_one):  # noqa: F811
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.data import Judged
    from llama_rlhf.models.transformer import ValueModel
    from llama_rlhf.reward import probability, score_responses, scored_responses
    from llama_rlhf.tokenizer import load_tokenizer
    model, tokenizer = load_model(str(toy / "hf"), ValueModel, seed=0), load_tokenizer(str(toy / "hf"))
    texts = ["2é 3\n", "<script>", "7", "8"]
    rows = [tokenizer.encode(f"{prompt}", bos=True) + tokenizer.encode(text, eos=True) for prompt, text in zip("aabc", texts)]
    examples = [Judged([row], 2, id, label=label) for row, id, label in zip(rows, "xxyz", (1, 0, 0, 1))]
    score = {"loss": "bce", "form": "sigmoid", "offset": 0.5, "scale": 1.0}
    responses = scored_responses(model, tokenizer, examples, score, n_problems=2)
    assert [(r["id"], r["judged"]) for r in responses] == [("x", "right"), ("x", "wrong"), ("y", "wrong")], "problems with both come first"
    for response, row, text in zip(responses, rows, texts):
        prefixes = [row[:n] for n in range(3, len(row) + 1)]
        wanted = probability(score, score_responses(model, prefixes, [2] * len(prefixes)))
        assert torch.allclose(torch.tensor(response["probabilities"]), wanted.float(), atol=2e-4)
        assert "".join(response["pieces"]) == text + "<eos>" and len(response["pieces"]) == len(response["probabilities"])
    assert responses[0]["pieces"][:3] == ["2", "", "é"], "a character stands at the last of its tokens"


def test_the_scripts_leave_reports(toy, split, tmp_path):  # noqa: F811
    """Fine-tune on two ranks, verify, reinforce, evaluate; then all of them in one report."""
    train = dict(dtype="fp32", train_file=toy / "train.json", max_seq_len=96, max_batch_size=6, max_steps=2, log_steps=1)
    for script, flags in {
            "solver_train.py": dict(**train, write_report=True, ckpt_dir=split, save_dir=tmp_path / "sft", label_file=toy / "test.json", max_new_tokens=6),
            "verifier_train.py": dict(**train, ckpt_dir=split, save_dir=tmp_path / "verifier"),
            "ppo_train.py": dict(dtype="fp32", actor_ckpt_dir=split, actor_save_dir=tmp_path / "ppo", reward_model_ckpt_dir=tmp_path / "verifier", max_new_tokens=6,
                                 train_file=toy / "train.json", label_file=toy / "test.json", max_buffer_size=4, max_iterations=2),
            "solver_evaluate.py": dict(dtype="fp32", write_report=True, ckpt_dir=split, log_dir=tmp_path / "test", label_file=toy / "test.json", max_new_tokens=6)}.items():
        ranks = run_script(2 if script == "solver_train.py" else 1, script, **flags)
        assert all(code == 0 for code, *_ in ranks), ranks
        assert ("report: " in ranks[0][1]) == ("write_report" in flags) and all(out == "" for _, out, _ in ranks[1:]), ranks
    assert [m["step"] for m in lines_of(tmp_path / "sft/log/metrics.jsonl") if m["kind"] == "evaluation"] == [0, 2], "before and after"
    assert all((tmp_path / name).exists() for name in ("sft/log/report.html", "sft/log/report.png", "test/report.html"))
    report.main([*(str(tmp_path / name) for name in ("sft", "verifier", "ppo", "test")), "--out", str(tmp_path / "all.html")])
    page = Page((tmp_path / "all.html").read_text())
    for words in ("sft step 0 beside sft step 2", "Perplexity", "Explained variance", "What the verifier thinks after every token", "generate", "7 common problems"):
        assert words in page.text, words
