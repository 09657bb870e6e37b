"""Command lines of scripts: each test runs a small script in its own process, as a user would."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_rlhf import cli

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = '''
from llama_rlhf.cli import run

def main(*, ckpt_dir: str, save_dir: str, lr: float = 1e-5, lora_rank: int = -1, use_chat_template: bool = False,
         shuffle: bool = True, log_dir: str | None = None, eos: str = "", tasks: list[str] = (), fail: str = ""):
    """Fine-tune a model.

    The longer text.

    Args:
        ckpt_dir: checkpoint folder
        lr: peak learning rate, which is explained in a sentence that goes on
            over a second line
        tasks: which tasks: several

    Returns:
        nothing
    """
    import json, os
    given = dict(locals()); given.pop("json"); given.pop("os")
    from llama_rlhf import cli
    if fail == "value":
        raise ValueError("record 17: missing output\\nmore detail")
    if fail == "file":
        open("/nonexistent/file")
    if fail == "disk":
        import errno
        raise OSError(errno.ENOSPC, "No space left on device")
    if fail == "bug":
        raise RuntimeError("a bug")
    if fail == "stop":
        raise KeyboardInterrupt
    if fail == "bar":
        from tqdm import tqdm
        tqdm(total=9, unit="step")
        raise ValueError("in the middle")
    if fail == "exit":
        raise SystemExit("stopped by hand")
    if fail == "group":
        import torch.distributed as dist
        dist.init_process_group("gloo", init_method="file://" + save_dir, rank=0, world_size=1)
        class Stuck:
            def __del__(self, sleep=__import__("time").sleep):
                sleep(60)
        import builtins; builtins.stuck = Stuck()
        import atexit, time; atexit.register(time.sleep, 60)
        raise ValueError("one rank alone")
    import torch
    os.mkdir(save_dir)
    with open(save_dir + "/run.json", "w") as f:
        json.dump({"given": given, "resolved": cli.resolved}, f)
    return given

if __name__ == "__main__":
    run(main)
'''


@pytest.fixture
def script(tmp_path):
    """Runs the script with `arguments`; its `torch` is a stub that leaves the file torch-imported behind."""
    (tmp_path / "solver.py").write_text(SCRIPT)
    (tmp_path / "stubs").mkdir()
    (tmp_path / "stubs" / "torch.py").write_text(f"open({str(tmp_path / 'torch-imported')!r}, 'w').close()\n")

    def call(*arguments, real_torch=False, **environment):
        path = [str(ROOT)] if real_torch else [str(tmp_path / "stubs"), str(ROOT)]
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "PYTHONPATH", "COLUMNS")}
        return subprocess.run(
            [sys.executable, "solver.py", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=50,
            env={**clean, "PYTHONPATH": os.pathsep.join(path), **environment},
        )  # fmt: skip

    call.folder = tmp_path
    return call


def run_json(script, *arguments):
    result = script("--ckpt_dir", "ckpt", "--save_dir", "out", *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""  # fire prints what a function returns; here it must not
    saved = json.loads((script.folder / "out" / "run.json").read_text())
    assert saved["given"] == saved["resolved"]
    return saved["given"]


def test_defaults_reach_main_and_run_json(script):
    given = run_json(script)
    assert given == {
        "ckpt_dir": "ckpt", "save_dir": "out", "lr": 1e-5, "lora_rank": -1, "use_chat_template": False,
        "shuffle": True, "log_dir": None, "eos": "", "tasks": [], "fail": "",
    }  # fmt: skip
    assert (script.folder / "torch-imported").exists()  # the stub works, so its absence below means something


def test_every_spelling_of_a_flag(script):
    given = run_json(script, "--lr=3e-4", "--lora-rank", "-1", "--use_chat_template", "--noshuffle", "--tasks", "a,b", "c",
                     "--log_dir", "none")  # fmt: skip
    assert given["lr"] == 3e-4 and given["lora_rank"] == -1 and given["log_dir"] is None
    assert given["use_chat_template"] is True and given["shuffle"] is False and given["tasks"] == ["a", "b", "c"]


def test_switches_take_values_and_no_prefix(script):
    given = run_json(script, "--use_chat_template", "True", "--no-shuffle", "--lr", "-2", "--log_dir=runs/x")
    assert given["use_chat_template"] is True and given["shuffle"] is False
    assert given["lr"] == -2.0 and isinstance(given["lr"], float) and given["log_dir"] == "runs/x"


def test_strings_are_never_reinterpreted(script):
    """fire alone turns these into an int, a tuple, a dict, None and loses the rest."""
    for n, text in enumerate(["2024", "a,b", "{1: 2}", "None", "a=b", "'quoted'", "[1]", "1e5", "x y\nz", "é", "-"]):
        result = script("--ckpt_dir", text, "--save_dir", f"out{n}", f"--eos={text}")
        assert result.returncode == 0, result.stderr
        given = json.loads((script.folder / f"out{n}" / "run.json").read_text())["given"]
        assert given["ckpt_dir"] == text and given["eos"] == text


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--learning_rat", "1e-5"], "unknown flag --learning_rat"),
        (["--lora_rnk", "16"], "unknown flag --lora_rnk: did you mean --lora_rank?"),
        (["--use-chat-templat"], "unknown flag --use-chat-templat: did you mean --use_chat_template?"),
        (["--lr", "1e5x"], "--lr expects a number, not '1e5x'"),
        (["--lr", "nan"], "--lr expects a number, not 'nan'"),
        (["--lora_rank", "2.5"], "--lora_rank expects a whole number, not '2.5'"),
        (["--use_chat_template", "maybe"], "--use_chat_template expects true or false, not 'maybe'"),
        (["--lr"], "--lr needs a value (float)"),
        (["--lr", "--noshuffle"], "--lr needs a value (float)"),
        (["--lr", "1", "--lr=2"], "--lr is given more than once"),
        (["--shuffle", "--noshuffle"], "--shuffle is given more than once"),
        (["--noshuffle=True"], "--noshuffle takes no value"),
        (["--noeos"], "unknown flag --noeos"),
        (["--noshuffle", "extra"], "'extra' stands alone"),
        (["-lr=3"], "'-lr=3' stands alone"),
    ],
)
def test_wrong_command_line_exits_2_with_one_sentence(script, arguments, sentence):
    start = time.monotonic()
    result = script("--ckpt_dir", "ckpt", "--save_dir", "out", *arguments)
    assert time.monotonic() - start < 3
    assert result.returncode == 2
    assert result.stderr.splitlines()[0].startswith(f"error: {sentence}")
    assert len(result.stderr.splitlines()) == 2  # the sentence, and where to find help
    assert "Traceback" not in result.stderr
    assert not (script.folder / "out").exists() and not (script.folder / "torch-imported").exists()


def test_missing_required_flags_are_all_named(script):
    result = script("--lr", "1e-5")
    assert result.returncode == 2
    assert result.stderr.splitlines()[0] == "error: missing --ckpt_dir, --save_dir"


def test_only_rank_0_prints_usage_errors(script):
    texts = {rank: script("--bad", "1", RANK=rank, WORLD_SIZE="2") for rank in ("0", "1")}
    assert [texts[r].returncode for r in "01"] == [2, 2]
    assert "unknown flag --bad" in texts["0"].stderr and texts["1"].stderr == ""


def test_help_lists_flags_types_defaults_and_text(script):
    start = time.monotonic()
    result = script("--help", "--bad", COLUMNS="120")
    assert time.monotonic() - start < 1
    assert result.returncode == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == "usage: torchrun solver.py --ckpt_dir STR --save_dir STR [flags]"
    assert "Fine-tune a model." in lines and "The longer text." in lines
    row = {line.split()[0]: line for line in lines if line.startswith("  --")}
    assert row["--lr"].split()[1:5] == ["float", "1e-05", "peak", "learning"]
    assert row["--ckpt_dir"].split()[1:] == ["str", "required", "checkpoint", "folder"]
    at = [lines.index(line) for line in ("What it reads and writes", row["--save_dir"], "The model", row["--use_chat_template"], "The optimizer", row["--lr"], "Other", row["--eos"])]
    assert at == sorted(at), "by purpose, as in docs/scripts"
    assert row["--log_dir"].split()[1:] == ["str|none", "none"]
    assert row["--use_chat_template"].split()[1:] == ["true|false", "false"]
    assert "over a second line" in " ".join(result.stdout.split())
    assert row["--tasks"].endswith("which tasks: several") and "nothing" not in result.stdout
    assert row["--lr"].index("peak") == row["--ckpt_dir"].index("checkpoint")  # aligned
    assert not (script.folder / "torch-imported").exists()


def test_help_needs_neither_torch_nor_fire(script):
    for name in ("torch", "fire"):
        (script.folder / "stubs" / f"{name}.py").write_text("raise ImportError('not installed')")
    assert script("-h").returncode == 0


def test_a_package_that_is_not_installed_is_named_with_what_to_do(script):
    """A shell without the virtual environment got a traceback that ended in fire."""
    for name in ("torch", "fire"):
        (script.folder / "stubs" / f"{name}.py").write_text(f'raise ModuleNotFoundError("No module named {name}", name="{name}")')
        result = script("--ckpt_dir=c", "--save_dir=s")
        assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
        assert result.stderr.startswith(f"error: {name} is not installed for {sys.executable}. Activate the environment")


def test_importing_the_package_imports_no_torch():
    code = "import sys, llama_rlhf, llama_rlhf.cli; print(llama_rlhf.__version__, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "0.1.0 False\n", result.stderr


@pytest.mark.parametrize(
    "fail, message",
    [("value", "record 17: missing output"), ("file", "/nonexistent/file: No such file or directory"), ("disk", "No space left on device")],
)
def test_user_errors_print_a_sentence_without_traceback(script, fail, message):
    result = script("--ckpt_dir=c", "--save_dir=s", "--fail", fail)
    first = result.stderr.splitlines()[0]
    assert result.returncode == 1 and first.startswith("error: ") and message in first
    assert "Traceback" not in result.stderr


def test_bugs_keep_their_traceback(script):
    result = script("--ckpt_dir=c", "--save_dir=s", "--fail=bug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and result.stderr.rstrip().endswith("RuntimeError: a bug")


def test_an_error_does_not_stand_at_the_end_of_a_progress_line(script):
    result = script("--ckpt_dir=c", "--save_dir=s", "--fail=bar")
    assert result.returncode == 1 and result.stderr.splitlines()[-1] == "error: in the middle", result.stderr


def test_ctrl_c_is_no_traceback(script):
    result = script("--ckpt_dir=c", "--save_dir=s", "--fail=stop")
    assert result.returncode == 130 and result.stderr.startswith("stopped by Ctrl-C. Complete saves are untouched"), result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_hint_names_the_command_that_was_given(script):
    assert "`python solver.py --help`" in script("--bad").stderr
    installed = {"LLAMA_RLHF_COMMAND": "llama-rlhf solver"}         # what console.py leaves
    assert "`llama-rlhf solver --help`" in script("--bad", **installed).stderr
    assert script("--help", **installed).stdout.startswith("usage: llama-rlhf solver --ckpt_dir STR")


def test_exit_with_a_message_prints_it(script):
    result = script("--ckpt_dir=c", "--save_dir=s", "--fail=exit")
    assert result.returncode == 1 and result.stderr == "stopped by hand\n"


def test_rank_is_named_when_there_are_several(script):
    result = script("--ckpt_dir=c", "--save_dir=s", "--fail=value", RANK="3", WORLD_SIZE="8")
    assert result.stderr.startswith("[rank 3] error: record 17: missing output\n")


def test_failing_rank_leaves_without_clean_up(script):
    """With a process group open, destructors and exit handlers may wait for the other ranks for ever."""
    pytest.importorskip("torch.distributed")
    start = time.monotonic()
    result = script("--ckpt_dir=c", f"--save_dir={script.folder}/store", "--fail=group", real_torch=True)
    assert result.returncode == 1 and "error: one rank alone" in result.stderr
    assert time.monotonic() - start < 40  # the exit handler alone would take 60 s


def test_config_file_gives_flags_and_the_command_line_wins(tmp_path):
    def main(*, ckpt_dir: str, lr: float = 1.0, epochs: int = 2, chat: bool = False, names: list[str] | None = None, prompt: str | None = "x"):
        pass
    file = tmp_path / "run.yaml"
    file.write_text("ckpt_dir: 2024\nlr: 1e-5\nepochs: 3\nchat: yes\nnames: [a, b]\nprompt: null\n")
    expected = {"ckpt_dir": "2024", "lr": 1e-5, "epochs": 3, "chat": True, "names": ["a", "b"], "prompt": None}
    assert cli.parse(main, ["--config", str(file)]) == expected
    assert cli.parse(main, ["--epochs=7", f"--config={file}"]) == {**expected, "epochs": 7}
    file.write_text("ckpt_dir: x\nnames: ['Hello, world', 1e-5, true]\n")
    assert cli.parse(main, ["--config", str(file)])["names"] == ["Hello, world", "1e-5", "true"], "an item may hold a comma"
    (tmp_path / "run.json").write_text(json.dumps({"script": "x.py", "arguments": expected, "environment": {}}))
    assert cli.parse(main, ["--config", str(tmp_path / "run.json")]) == expected      # an earlier run, again
    for text, said in (("epoch: 3\n", "unknown flag epoch: did you mean --epochs?"), ("epochs: many\n", "epochs expects a whole number"),
                       ("- a\n", "expected lines of"), ("a: [\n", "is not YAML")):
        file.write_text(text)
        with pytest.raises(cli.UsageError, match=re.escape(said)):
            cli.parse(main, ["--config", str(file), "--ckpt_dir", "x"])
    (tmp_path / "run.json").write_text(json.dumps({"script": "solver_train.py", "arguments": {"ckpt_dir": "x", "lora_rank": 4, "zero": 1}}))
    with pytest.raises(cli.UsageError, match="the flags of solver_train.py, of which .* does not have lora_rank, zero$"):      # one line, not one per flag
        cli.parse(main, ["--config", str(tmp_path / "run.json")])
    cli.parse(main, ["--lr=2", "--ckpt_dir", "x"])
    assert cli.given == ["ckpt_dir", "lr"]
    with pytest.raises(cli.UsageError, match="No such file"):
        cli.parse(main, ["--config", "none.yaml", "--ckpt_dir", "x"])


def test_a_range_names_the_flags_outside_it_and_no_others():
    cli.check_range(1, a=1, b=5, c=None)
    with pytest.raises(ValueError, match="^--b 0, --d -2: must be at least 1$"):
        cli.check_range(1, a=1, b=0, c=None, d=-2)
    with pytest.raises(ValueError, match="^--held_out 2.0: must be at least 0 and at most 1$"):
        cli.check_range(0, 1, held_out=2.0)


def test_what_must_be_installed_is_what_pyproject_installs():
    listed = re.search(r"^dependencies = \[(.*?)^\]", (Path(__file__).parent.parent / "pyproject.toml").read_text(), re.M | re.S)[1]
    names = [re.match(r"[\w-]+", name)[0] for name in re.findall(r'"(.*?)"', listed)]
    assert sorted(cli.REQUIRED) == sorted({"pyyaml": "yaml"}.get(name, name) for name in names)
