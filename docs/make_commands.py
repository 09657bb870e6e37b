"""Write docs/scripts/*.md from the signatures and docstrings of the scripts: the text of --help, by purpose. tests/test_commands.py compares.

    python docs/make_commands.py
"""

import importlib.util
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from llama_rlhf import cli  # noqa: E402

PAGES = {
    "checkpoint_split.py": {
        "example": "python checkpoint_split.py --ckpt_file /models/Llama-2-7b-hf --save_path ckpt/llama-2-7b --n 8",
        "writes": [("`save_path/consolidated.NN.pth`", "`--format native`: one file per tensor-parallel rank, in Meta's names and order"),
                   ("`save_path/params.json`, `manifest.json`", "sizes; name, length and SHA-256 of every file"),
                   ("`save_path/config.json`, `*.safetensors`", "`--format hf`: what transformers loads"),
                   ("`save_path/adapter_config.json`, `adapter_model.safetensors`", "`--format peft`: the adapters alone"),
                   ("tokenizer files", "those found beside the weights, or in `--tokenizer_file`")],
        "more": "Formats: [ARCHITECTURE.md](../ARCHITECTURE.md). A Hugging Face folder of a run, served and evaluated: `examples/export_and_serve.sh`.",
    },
    "solver_train.py": {
        "example": "torchrun --nproc_per_node 8 solver_train.py --ckpt_dir ckpt/llama-2-7b --save_dir runs/solver \\\n"
                   "    --train_file dataset/GSM8K/train.json --model_type llama-2-7b --max_batch_size 6 --lora_rank -1",
        "writes": [("`save_dir/epoch-N`, `step-N`", "complete models, with adapters if there are any, and the state of the optimizer"),
                   ("`log_dir/metrics.jsonl`", "a line per interval (`train`), epoch, evaluation and for the memory"),
                   ("`log_dir/run.json`", "the flags and the environment; `--config` reads it"),
                   ("`log_dir/samples-N.jsonl`", "answers of the evaluations, with `--label_file`"),
                   ("`log_dir/report.html`, `report.png`", "[REPORT.md](../REPORT.md)")],
        "more": "Precision and memory: [TRAINING.md](../TRAINING.md). Data: [DATA.md](../DATA.md).",
    },
    "solver_evaluate.py": {
        "example": "torchrun --nproc_per_node 8 solver_evaluate.py --task GSM8K --ckpt_dir runs/solver --log_dir runs/solver-eval \\\n"
                   "    --label_file dataset/GSM8K/test.json --model_type llama-2-7b --max_batch_size 384",
        "writes": [("`log_dir/samples.jsonl`", "a line per answer: prompt, response, what was read from it, right or wrong, the verifier's score"),
                   ("`log_dir/metrics.json`", "accuracy with its interval under every rule, pass@k, best of n, votes, speed, flags, environment"),
                   ("`log_dir/report.html`", "[REPORT.md](../REPORT.md)"),
                   ("nothing, with `--compare`", "the table is printed")],
        "more": "Problems and rules: [TASKS.md](../TASKS.md).",
    },
    "verifier_train.py": {
        "example": "torchrun --nproc_per_node 8 verifier_train.py --ckpt_dir runs/solver --save_dir runs/verifier \\\n"
                   "    --train_file runs/answers/samples.jsonl --max_batch_size 6 --lora_rank -1",
        "writes": [("`save_dir/epoch-N`, `step-N`", "complete reward models: a value head, offset and scale of the score, the state of the optimizer"),
                   ("`log_dir/metrics.jsonl`", "a line per interval (`train`), epoch, evaluation (pair accuracy, calibration) and for the memory"),
                   ("`log_dir/run.json`", "the flags and the environment; `--config` reads it"),
                   ("`log_dir/report.html`, `report.png`", "[REPORT.md](../REPORT.md)")],
        "more": "Judged responses in their forms: [DATA.md](../DATA.md).",
    },
    "ppo_train.py": {
        "example": "torchrun --nproc_per_node 8 ppo_train.py --actor_ckpt_dir runs/solver --actor_save_dir runs/actor --critic_ckpt_dir runs/verifier \\\n"
                   "    --critic_save_dir runs/critic --reward_model_ckpt_dir runs/verifier --max_batch_size 6 --max_buffer_size 96",
        "writes": [("`actor_save_dir/step-N`, `critic_save_dir/step-N`", "complete models after N iterations, with the state of their optimizers"),
                   ("`log_dir/metrics.jsonl`", "a line per iteration ([PPO.md](../PPO.md) names its numbers), evaluation and for the memory"),
                   ("`log_dir/run.json`", "the flags and the environment; `--config` reads it"),
                   ("`log_dir/samples-N.jsonl`", "answers of the evaluations, with `--label_file`"),
                   ("`log_dir/rollout-N.pt`", "the buffer of an iteration, with `--save_rollouts`"),
                   ("`log_dir/report.html`, `report.png`", "[REPORT.md](../REPORT.md)")],
        "more": "What an iteration does, and what each number means: [PPO.md](../PPO.md).",
    },
    "llama_rlhf/chat.py": {
        "example": "python -m llama_rlhf.chat --ckpt_dir runs/solver",
        "writes": [("nothing", "the conversation is on the screen")],
        "more": "From Python: `from llama_rlhf import load, generate, stream` (`llama_rlhf/api.py`).",
    },
}


def name_of(script):
    return os.path.basename(script)[:-3]


def main_of(script):
    spec = importlib.util.spec_from_file_location(name_of(script), os.path.join(ROOT, script))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def page(script: str) -> str:
    """The page of a script, as markdown."""
    main, more = main_of(script), PAGES[script]
    parameters, (summary, descriptions) = cli._parameters(main), cli._read_docstring(main)
    lines = [f"# {script}", "", *(line.replace("|", "\\|") for line in summary.splitlines()), "", "```", more["example"], "```", "", more["more"], "",
             "| it writes | |", "|---|---|", *(f"| {where} | {what} |" for where, what in more["writes"])]
    for purpose, flags in cli.by_purpose(parameters):
        lines += ["", f"## {purpose}", "", "| flag | value | default | |", "|---|---|---|---|"]
        for p in flags:
            default = "required" if p.default is p.empty else f"`{cli._show_default(p)}`"
            kind = cli.type_name(p.annotation).replace("|", " or ")
            lines.append(f"| `--{p.name}` | {kind} | {default} | {descriptions[p.name]} |".replace("||", "\\|\\|"))
    lines += ["", "Write `--name value` or `--name=value`; switches also as `--name` and `--noname`. `--config FILE` reads flags from a YAML file, or from the "
              "`run.json` of an earlier run; flags beside it win. Written by `python docs/make_commands.py` from the script."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for script in PAGES:
        path = os.path.join(ROOT, "docs", "scripts", name_of(script) + ".md")
        with open(path, "w", encoding="utf-8") as file:
            file.write(page(script))
        print(f"written: {os.path.relpath(path)}")
