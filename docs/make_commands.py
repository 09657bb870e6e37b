"""Write docs/scripts/*.md from the signatures and docstrings of the scripts: the text of --help, by purpose. tests/test_commands.py compares.

    python docs/make_commands.py
"""

import importlib.util
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from llama_rlhf import cli  # noqa: E402

# purpose -> flags, in the order of the pages; a flag that stands nowhere here comes last, under "Other"
PURPOSES = {
    "What it reads and writes": "ckpt_file save_path ckpt_dir actor_ckpt_dir critic_ckpt_dir reward_model_ckpt_dir verifier_ckpt_dir save_dir actor_save_dir "
                                "critic_save_dir train_file label_file held_out samples_file log_dir task inspect diff compare",
    "The model": "model_type tokenizer_file chat_format use_chat_template system_prompt dtype",
    "Shards and formats": "n format adapter merge_lora max_shard_gb",
    "Batches and length": "max_batch_size max_batch_tokens accumulation_steps max_buffer_size minibatch_size rollout_batch_size max_seq_len epochs "
                          "inner_epochs max_steps max_iterations limit",
    "What is trained": "lora_rank lora_alpha train_on_prompt loss margin centre lm_loss_weight equal_problems",
    "The optimizer": "lr actor_lr critic_lr lr_schedule warmup_ratio critic_warmup weight_decay max_grad_norm skip_grad_norm_above optimizer_precision zero",
    "The algorithm": "algorithm num_samples_per_prompt kl_coef kl_target kl_horizon gamma lam clip clip_high dual_clip value_clip entropy_coef "
                     "whiten_rewards target_kl",
    "The reward": "rule_weight rule reward_model_weight reward_function normalize_scores bad_score min_response_tokens bootstrap_truncated",
    "Sampling": "temperature top_k top_p min_p max_new_tokens stop",
    "Evaluation": "eval_steps eval_batch_size perplexity",
    "Saving and continuing": "save_steps keep_last resume save_rollouts replay seed",
    "Memory": "activation_checkpointing sequence_parallel keep_resident max_cache_gb plan plan_ranks",
    "Processes and devices": "model_parallel_size device compile cuda_graphs timeout_seconds",
    "Seeing and checking": "log_steps tracker write_report check_steps doctor validate",
}

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
                   ("`log_dir/report.html`, `report.png`", "[REPORT.md](../REPORT.md)"),
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
    left = dict(parameters)
    for purpose, names in [*PURPOSES.items(), ("Other", "")]:
        flags = [left.pop(name) for name in names.split() if name in left] if names else list(left.values())
        if not flags:
            continue
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
