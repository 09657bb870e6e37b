"""Every command in the README parses as written, and every file it names exists."""

import importlib.util
import os
import re
import shlex

import pytest

from llama_rlhf import cli

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DOCUMENTS = [os.path.join(folder, name) for folder in (ROOT, *(os.path.join(ROOT, *f.split("/")) for f in ("docs", "docs/scripts", "examples", "examples/arithmetic")))
             for name in sorted(os.listdir(folder)) if name.endswith((".md", ".sh", ".sbatch"))]


def commands():
    """(document, words from the script's name on) of every line that starts one of our scripts."""
    for document in DOCUMENTS:
        with open(document) as file:
            text = file.read().replace("\\\n", " ")
        for line in text.splitlines():
            if "..." in line:               # prose about a command, not one
                continue
            line = re.sub(r'"\$\{chat\[@\]\}"', "--use_chat_template", line)
            line = line.replace('"${small[@]}"', "--dtype fp32").replace('"$@"', "").replace('"$PYTHON"', "python").rstrip("} ;")
            line = re.sub(r'"\$\{(?!torchrun)\w+\[@\]\}"', "", line)      # arrays of flags: the recipes' tests run them
            line = re.sub(r"^( *plan .*)", r"\1 --plan", line).split(" || ")[0]
            line = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", line)
            line = re.sub(r"\$\w+", "1", line.replace('"${torchrun[@]}"', "torchrun"))      # shell variables: any value will do
            if match := re.search(r"(?:torchrun|python3?|^ *launch|^ *plan|[{] launch) .*?(\w+(?:/\w+)*\.py)( .*)?$", line.strip("` ")):
                yield pytest.param(match[1], shlex.split((match[2] or "").split("  #")[0].split("`")[0]), id=f"{os.path.basename(document)}-{match[1]}")


def main_of(script):
    spec = importlib.util.spec_from_file_location(os.path.basename(script)[:-3], os.path.join(ROOT, script))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize("script,words", list(commands()))
def test_documented_commands_parse(script, words):
    with open(os.path.join(ROOT, script)) as file:
        source = file.read()
    if "from llama_rlhf.cli import run" not in source:      # argparse: its flags stand there by name
        assert all(f'"{word.split("=")[0]}"' in source for word in words if word.startswith("--")), words
        return
    main = main_of(script)
    values = cli.parse(main, words)
    for flag, value in zip(words[::2], words[1::2]):
        if flag.startswith("--") and not value.startswith("--"):
            assert flag[2:].split("=")[0] in values


CONTRACT = """
checkpoint_split.py --ckpt_file X --save_path Y --n 8
solver_train.py --ckpt_dir A --save_dir B --train_file dataset/GSM8K/train.json --model_type llama-1-7b --max_batch_size 6 --lora_rank -1
solver_evaluate.py --task GSM8K --ckpt_dir A --log_dir B --label_file dataset/GSM8K/test.json --model_type llama-1-7b --max_batch_size 384
verifier_train.py --ckpt_dir A --save_dir B --train_file dataset/GSM8K/train.json --model_type llama-1-7b --max_batch_size 6 --lora_rank -1
ppo_train.py --actor_ckpt_dir A --actor_save_dir B --critic_ckpt_dir C --critic_save_dir D --reward_model_ckpt_dir E --max_batch_size 6 --max_buffer_size 96
"""


@pytest.mark.parametrize("line", CONTRACT.strip().splitlines())
def test_the_commands_people_know_parse(line):
    script, *words = line.split()
    values = cli.parse(main_of(script), words)
    assert values["max_batch_size" if "--max_batch_size" in words else "n"] in (6, 384, 8)


def test_files_named_in_the_readme_exist():
    with open(os.path.join(ROOT, "README.md")) as file:
        text = file.read()
    known = {name for folder, _, names in os.walk(ROOT) if ".venv" not in folder and "/.git" not in folder for name in names}
    missing = {name for name in re.findall(r"[\w/]+\.(?:py|sh|md|json|txt)\b", text) if os.path.basename(name) not in known}
    produced = {"params.json", "manifest.json", "run.json", "metrics.json", "config.json", "tokenizer.json"}
    assert not {name for name in missing if os.path.basename(name) not in produced}


def test_every_script_answers_help_without_torch(tmp_path):
    """--help in under a second, and even where torch cannot be imported."""
    import subprocess
    import sys
    import time
    (tmp_path / "torch.py").write_text("raise ImportError('torch must not be imported for --help')")
    for script in ("checkpoint_split.py", "solver_train.py", "solver_evaluate.py", "verifier_train.py", "ppo_train.py"):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
        seconds = time.perf_counter() - started
        assert done.returncode == 0, done.stderr
        parameters = cli.parse.__globals__["_parameters"](main_of(script))
        assert all(f"--{name}" in done.stdout for name in parameters)
        assert seconds < 3, "a second on an idle machine"
