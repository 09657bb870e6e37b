"""The recipes of examples/ from their first line to their last, on tiny random models and two CPU ranks.

Bash runs them as they are. In the place of the interpreter stands a program that hands each script's command line to this process, which runs it on
forked ranks: what a recipe says is what runs, and the seconds that an interpreter takes to import torch are saved, thirty times.
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading

import pytest
from ranks import _script, run_ranks
from toys import add_bytes_tokenizer, make_hf

from llama_rlhf import cli

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EXAMPLES = os.path.join(ROOT, "examples")

# recipes that no test here runs, and why
ELSEWHERE = {
    "gsm8k_official.sh": "needs the official data; its stages are those of quickstart.sh, and test_readme.py reads its flags",
    "arithmetic/run.sh": "ten minutes; docs/RESULTS.md has its numbers",
    "chat.sh": "a conversation; tests/test_api.py holds one",
    "common.sh": "sourced by the others",
}

STANDIN = '''#!{python} -S
import json, os, socket, sys
words = sys.argv[1:]
if not any(word.endswith(".py") and "/" not in word for word in words):
    os.execv("{python}", ["{python}", *words])
with socket.socket(socket.AF_UNIX) as server:
    server.connect("{server}")
    server.sendall(json.dumps(words).encode() + b"\\n")
    code, out, err = json.loads(server.makefile().readline())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
'''


def split_command(words):
    """(node rank, processes in all, script, flags) of `-m torch.distributed.run ... SCRIPT ...` or of `SCRIPT ...`."""
    at = next(n for n, word in enumerate(words) if word.endswith(".py"))
    launcher = dict(zip(words[:at], words[1:at]))
    flags, name = {}, None
    for word in words[at + 1:]:
        if word.startswith("--"):
            name, *value = word[2:].split("=", 1)
            assert name not in flags, f"--{name} is given more than once"
            flags[name] = value
        else:
            flags[name].append(word)
    n = int(launcher.get("--nproc_per_node", 1)) * int(launcher.get("--nnodes", 1))
    return int(launcher.get("--node_rank", 0)), n, words[at], {name: ",".join(values) or "true" for name, values in flags.items()}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The interpreter's stand-in, and the list of (script, flags) that it was given."""
    folder, calls = tmp_path_factory.mktemp("standin"), []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen()

    def answer(connection):
        with connection:
            node_rank, n, script, flags = split_command(json.loads(connection.makefile().readline()))
            result = [0, "", ""]
            if node_rank == 0:          # all processes of all nodes
                calls.append((script, flags))
                try:
                    ranks = run_ranks(n, _script, script, flags, timeout=600)
                    result = [max(code or 0 for code, *_ in ranks), ranks[0][1], ranks[0][2]]
                except BaseException as error:      # noqa: BLE001  for the recipe to fail with
                    result = [1, "", repr(error)]
            connection.sendall(json.dumps(result).encode() + b"\n")

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    standin = folder / "python"
    standin.write_text(STANDIN.format(python=sys.executable, server=folder / "socket"))
    standin.chmod(0o755)
    yield standin, calls
    listener.close()


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    for name, kind, more in (("llama", "llama-9-3", {}), ("small", "llama-2-like", {}), ("bloom", "bloom", {}), ("bloom-small", "bloom", {"n_layer": 1}),
                             ("qwen2", "qwen2", {}), ("mixtral", "mixtral", {})):
        make_hf(folder / name, kind, vocab_size=263, **more if "bloom" in kind else {**more, "max_position_embeddings": 128})
        add_bytes_tokenizer(folder / name)
    sums = [(a, b) for a in range(4) for b in range(5)]
    records = [{"instruction": f"{a}+{b}?", "output": f"{a}+{b}={a + b}\n#### {a + b}"} for a, b in sums]
    (folder / "train.json").write_text(json.dumps(records))
    (folder / "test.json").write_text(json.dumps(records[:3]))
    for name, ask in (("talks", "\n\nHuman: {}\n\nAssistant: {}"), ("pairs", "{}{}")):
        with open(folder / f"{name}.jsonl", "w") as file:
            for a, b in sums:
                good, bad = (ask.format(f"{a}+{b}?" if name == "talks" else "", answer) for answer in (f"{a + b}", f"{a + b + 1}"))
                file.write(json.dumps({"chosen": good, "rejected": bad} | ({"prompt": f"{a}+{b}?"} if name == "pairs" else {})) + "\n")
    return folder


SMALL = dict(NPROC=2, MAX_SEQ_LEN=96, MAX_NEW_TOKENS=8, MAX_STEPS=2, MAX_BUFFER_SIZE=8, PPO_ITERATIONS=1, TEST_LIMIT=2, ANSWER_LIMIT=3,
             EXTRA="--device cpu --dtype fp32 --write_report false")


def bash(recipe, scripts, more_path="", **variables):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "EXTRA", "NPROC", "NNODES", "RANK", "WORLD_SIZE")}
    environment |= {"PYTHON": str(scripts[0]), "PATH": more_path + os.environ["PATH"], **{name: str(value) for name, value in variables.items()}}
    return subprocess.Popen(["bash", os.path.join(EXAMPLES, recipe)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(recipe, scripts, **variables):
    """What a recipe prints."""
    process = bash(recipe, scripts, **variables)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, f"{out[-2000:]}\n{err[-3000:]}"
    return out


def files(folder):
    return {name for name in os.listdir(folder) if not name.startswith(".")}


def test_every_recipe_is_run_here_or_said_where():
    recipes = {os.path.relpath(os.path.join(folder, name), EXAMPLES) for folder, _, names in os.walk(EXAMPLES) for name in names
               if name.endswith((".sh", ".sbatch"))}
    with open(__file__) as file:
        text = file.read()
    assert recipes - ELSEWHERE.keys() == {name for name in recipes - ELSEWHERE.keys() if f'("{name}"' in text}
    assert ELSEWHERE.keys() <= recipes


@pytest.mark.parametrize("recipe", sorted(name for name in os.listdir(EXAMPLES) if name.endswith((".sh", ".sbatch"))))
def test_recipes_say_what_they_need_and_print(recipe):
    with open(os.path.join(EXAMPLES, recipe)) as file:
        text = file.read()
    assert subprocess.run(["bash", "-n", os.path.join(EXAMPLES, recipe)]).returncode == 0
    assert recipe in ("common.sh", "gsm8k_official.sh") or "# Needs: " in text and "rints at the end: " in text


def test_llama2_in_three_stages_with_a_verifier(toys, scripts, tmp_path):
    out = run("llama2.sh", scripts, **SMALL, LOAD_PATH=toys / "llama", DATASET_PATH=toys / "train.json", TEST_PATH=toys / "test.json",
              SAVE_PATH=tmp_path / "run", BEFORE=1)
    assert files(tmp_path / "run") == {"before", "solver", "solver-test", "answers", "verifier", "actor", "critic", "actor-test"}
    assert "McNemar" in out.splitlines()[-1] and "actor-test" in out.splitlines()[-1]


def test_llama2_from_given_models_and_by_the_rule(toys, scripts, tmp_path):
    """POLICY_LOAD leaves stage 1 out, REWARD=rule stage 2; flags of EXTRA take the place of the recipe's; a tokenizer from elsewhere."""
    calls = scripts[1]
    del calls[:]
    run("llama2.sh", scripts, **{**SMALL, "EXTRA": SMALL["EXTRA"] + " --max_new_tokens=5"}, POLICY_LOAD=toys / "llama", REWARD="rule",
        DATASET_PATH=toys / "train.json", TEST_PATH=toys / "test.json", SAVE_PATH=tmp_path / "run", TOKENIZER_MODEL=toys / "small")
    assert [script for script, _ in calls] == ["solver_evaluate.py", "ppo_train.py", "solver_evaluate.py", "solver_evaluate.py"]
    assert calls[1][1]["max_new_tokens"] == "5" and calls[1][1]["tokenizer_file"] == str(toys / "small")


def test_small_critics(toys, scripts, tmp_path):
    run("tinyllama_critic.sh", scripts, **SMALL, LOAD_PATH=toys / "llama", REWARD_BASE=toys / "small", DATASET_PATH=toys / "train.json",
        TEST_PATH=toys / "test.json", SAVE_PATH=tmp_path / "tiny")
    out = run("bloom.sh", scripts, **SMALL, LOAD_PATH=toys / "bloom", REWARD_BASE=toys / "bloom-small", DATASET_PATH=toys / "pairs.jsonl",
              TEST_PATH=toys / "pairs.jsonl", SAVE_PATH=tmp_path / "bloom")
    for run_dir in (tmp_path / "tiny", tmp_path / "bloom"):
        layers = [json.loads((run_dir / role / "step-1/manifest.json").read_text())["config"] for role in ("actor", "critic")]
        assert layers[0] != layers[1], "the critic is the other model"
    assert "pair accuracy" in out and "iteration 1  score" in out.splitlines()[-1]


def test_helpful_and_harmless_conversations(toys, scripts, tmp_path):
    run("helpful_harmless.sh", scripts, **SMALL, LOAD_PATH=toys / "llama", DATASET_PATH=toys / "talks.jsonl", SAVE_PATH=tmp_path / "run")
    chosen = [json.loads(line) for line in open(tmp_path / "run/chosen.jsonl")]
    assert len(chosen) == 20 and chosen[6] == {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}


@pytest.mark.parametrize("recipe", ["qwen_lora.sh", "mixtral_lora.sh"])
def test_lora(recipe, toys, scripts, tmp_path):
    # run("qwen_lora.sh"  run("mixtral_lora.sh"
    out = run(recipe, scripts, **SMALL, LOAD_PATH=toys / recipe.split("_")[0].replace("qwen", "qwen2"), CHAT_FORMAT="llama-2",
              DATASET_PATH=toys / "train.json", TEST_PATH=toys / "test.json", SAVE_PATH=tmp_path / "run")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files(tmp_path / "run/peft")
    assert {"config.json", "model.safetensors"} <= files(tmp_path / "run/hf") and "McNemar" in out


def test_two_nodes_by_torchrun_and_by_slurm(toys, scripts, tmp_path):
    """bash("two_nodes.sh", on each of two nodes; then the job file with stand-ins for Slurm's commands, which call two_nodes.sh on each."""
    given = dict(SMALL, NPROC=1, POLICY_LOAD=toys / "llama", REWARD="rule", DATASET_PATH=toys / "train.json", TEST_PATH=toys / "test.json")
    nodes = [bash("two_nodes.sh", scripts, **given, SAVE_PATH=tmp_path / "run", MASTER_ADDR="localhost", NODE_RANK=rank) for rank in range(2)]
    texts = [node.communicate(timeout=900) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    assert "McNemar" in texts[0][0] and "McNemar" not in texts[1][0]
    assert "2 tensor-parallel x 1 data-parallel ranks" in texts[0][0]

    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "scontrol").write_text("#!/bin/sh\necho node-a\necho node-b\n")
    (bin_dir / "srun").write_text(f'#!/bin/bash\nwhile [[ $1 == --* ]]; do echo $1; shift; done > {bin_dir}/flags\n' 'SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@"; wait $!\n')
    for name in ("scontrol", "srun"):
        (bin_dir / name).chmod(0o755)
    job = bash("two_nodes.sbatch", scripts, f"{bin_dir}:", **given, SAVE_PATH=tmp_path / "job", SLURM_SUBMIT_DIR=ROOT, SLURM_JOB_NODELIST="node-[a-b]",
               SLURM_JOB_ID=7, SLURM_JOB_NUM_NODES=2, SLURM_CPUS_PER_TASK=32, RECIPE="examples/llama2.sh")
    out, err = job.communicate(timeout=900)
    assert job.returncode == 0 and "McNemar" in out, err
    assert "--cpus-per-task=32" in (bin_dir / "flags").read_text()


def test_srun_asks_for_the_cores_of_a_task_only_where_the_job_did(tmp_path):
    """A job of --cpus-per-gpu, or of whole nodes, got --cpus-per-task=1: the first is refused beside it, and of the second all processes of a node shared one core."""
    for name, line in (("scontrol", "echo node-a"), ("srun", 'echo "$NPROC processes: $*"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    for variables, start in (({}, "8 processes: --kill-on-bad-exit=1 bash -c"), ({"SLURM_GPUS_ON_NODE": 4}, "4 processes: --kill-on-bad-exit=1 bash -c"),
                             ({"SLURM_CPUS_PER_TASK": 32, "SLURM_GPUS_ON_NODE": 4, "NPROC": 2}, "2 processes: --kill-on-bad-exit=1 --cpus-per-task=32 bash -c")):
        job = bash("two_nodes.sbatch", [sys.executable], f"{tmp_path}:", **variables, SLURM_SUBMIT_DIR=ROOT, SLURM_JOB_NODELIST="node-a", SLURM_JOB_ID=7, SLURM_JOB_NUM_NODES=2)
        out, err = job.communicate(timeout=60)
        assert job.returncode == 0 and out.startswith(start), out + err


def test_export_for_transformers(toys, scripts, tmp_path):
    """Of a model without adapters, too, whose folder has them in its name: it was to be merged, and that was refused."""
    (tmp_path / "no-adapters").symlink_to(toys / "llama")
    out = run("export_and_serve.sh", scripts, POLICY_LOAD=tmp_path / "no-adapters", SAVE_PATH=tmp_path / "hf", DTYPE="fp32")
    assert {"config.json", "model.safetensors"} <= files(tmp_path / "hf") and "M weights, torch.float32" in out and "vllm serve" in out


def test_a_missing_variable_is_named(scripts):
    process = bash("llama2.sh", scripts)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "error: set LOAD_PATH: the pretrained LLaMA-2." in err


def plan_line(script, **flags):
    """The GB that `--plan --device cpu --dtype bf16` prints, from this process."""
    from test_readme import main_of

    from llama_rlhf import plan
    words = [f"--{name}={value}" for name, value in {"plan": "true", "device": "cpu", "dtype": "bf16", "activation_checkpointing": "all", **flags}.items()]
    values = cli.parse(main_of(script), words)
    return f"{(plan.plan_ppo if script == 'ppo_train.py' else plan.plan_training)(values).total / 1e9:.3f} GB"


def test_plans_quoted_in_the_recipes_are_what_the_scripts_print():
    with open(os.path.join(EXAMPLES, "llama2.sh")) as file:
        quoted = re.search(r"#   7B, all weights +(\S+ GB) +(\S+ GB) +(\S+ GB)", file.read()).groups()
    seven = dict(model_type="llama-2-7b", plan_ranks=8)
    assert quoted == (plan_line("solver_train.py", **seven, max_seq_len=512), plan_line("verifier_train.py", **seven, max_seq_len=512, loss="mse"),
                      plan_line("ppo_train.py", **seven, reward_model_ckpt_dir="verifier"))
    with open(os.path.join(EXAMPLES, "tinyllama_critic.sh")) as file:
        assert plan_line("verifier_train.py", model_type="tinyllama-1.1b", plan_ranks=8, max_seq_len=512, loss="mse") in file.read()
