"""docs/scripts/*.md say what the scripts' own --help says, every flag with its default; no page is out of date."""

import importlib.util
import os

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
spec = importlib.util.spec_from_file_location("make_commands", os.path.join(ROOT, "docs", "make_commands.py"))
make_commands = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_commands)


@pytest.mark.parametrize("script", make_commands.PAGES)
def test_every_flag_stands_on_its_page_with_its_default_and_meaning(script):
    from llama_rlhf import cli
    with open(os.path.join(ROOT, "docs", "scripts", make_commands.name_of(script) + ".md"), encoding="utf-8") as file:
        text = file.read()
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `--")}
    parameters = cli._parameters(make_commands.main_of(script))
    assert rows.keys() == {f"--{name}" for name in parameters}, "run python docs/make_commands.py"
    for name, p in parameters.items():
        cells = rows[f"--{name}"].strip("| ").split(" | ")
        assert cells[2] == ("required" if p.default is p.empty else f"`{cli._show_default(p)}`"), "run python docs/make_commands.py"
        assert len(cells) == 4 and cells[3], f"--{name} has no description in the docstring"
    assert text == make_commands.page(script), "out of date: run python docs/make_commands.py"


def test_every_script_has_a_page():
    scripts = {name for name in os.listdir(ROOT) if name.endswith(".py") and "from llama_rlhf.cli import run" in open(os.path.join(ROOT, name)).read()}
    assert scripts | {"llama_rlhf/chat.py"} == set(make_commands.PAGES)


def test_the_installed_command_knows_the_five_scripts(monkeypatch, capsys):
    """`llama-rlhf SCRIPT` answers like the script; the packaging takes along what it starts."""
    from llama_rlhf import console
    with open(os.path.join(ROOT, "pyproject.toml")) as file:
        modules = next(line for line in file if line.startswith("py-modules"))
    assert set(console.SCRIPTS) == {make_commands.name_of(page) for page in make_commands.PAGES}
    assert all(f'"{module}"' in modules for module in console.SCRIPTS.values() if "." not in module)
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv("LLAMA_RLHF_COMMAND", "")
    for words, code, said in ((["ppo-train", "--help"], 0, "--actor_ckpt_dir"), (["solver_train.py", "--ckpt_di", "x"], 2, "did you mean --ckpt_dir?"),
                              (["chat", "--help"], 0, "--system_prompt"), (["nonsense"], 2, "checkpoint_split, solver_train"), ([], 0, "usage: llama-rlhf"),
                              (["ppo_train", "--bad"], 2, "Run `llama-rlhf ppo_train --help`"), (["--nproc_per_node", "2", "solver_trian"], 2, "did you mean solver_train?")):
        monkeypatch.setattr("sys.argv", ["llama-rlhf", *words])
        with pytest.raises(SystemExit) as end:
            console.main()
        assert end.value.code == code and said in "".join(capsys.readouterr())


def test_ranks_that_fail_end_the_installed_command_with_their_code_and_no_traceback(tmp_path):
    """torchrun raises for a failed rank; its traceback of thirty lines stood below the one that mattered."""
    import subprocess
    import sys
    done = subprocess.run([sys.executable, "-m", "llama_rlhf.console", "--nproc_per_node", "2", "solver_train", "--ckpt_di", "x"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": ROOT})
    assert done.returncode == 2 and "did you mean --ckpt_dir?" in done.stderr and "ended first, with exit code 2" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "Run `llama-rlhf solver_train --help`" in done.stderr
