"""Training steps of transformers, peft and TRL: the other sides of benchmarks/training.py. Does not import llama_rlhf.

    python3.11 -m venv trl-venv && trl-venv/bin/pip install torch==2.13.0 trl==0.24.0 transformers==4.57.1 peft==0.21.2

--side transformers  a plain loop: rows padded to the longest, model(labels=...).loss, clipping, fused AdamW; with --lora_rank by peft
--side sft           TRL's SFTTrainer, rows sorted by length into micro-batches, so that little is padded
--side sft_defaults  the same as its defaults have it: rows as they come, 8 in a micro-batch whatever --micro_batch says, activations computed again
--side reward        TRL's RewardTrainer

The steps' rows stand in a json file: [[{"tokens": [...], "prompt_len": n} or {"chosen": [...], "rejected": [...]}, ...], ...].
A step starts when a line arrives on standard input, and ends with one line of json: seconds, loss, peak memory.
"""

import argparse
import json
import os
import sys
import time

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=["transformers", "sft", "sft_defaults", "reward"], required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", required=True, help="json file")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="of the weights; the optimizer works in the same")
    parser.add_argument("--lora_rank", type=int, default=-1)
    parser.add_argument("--micro_batch", type=int, default=4)
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import warnings

    import torch
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with open(options.steps) as file:
        steps = json.load(file)
    if options.side == "sft_defaults":
        options.micro_batch = 8
    if options.side != "transformers" and len(steps[0]) % options.micro_batch:
        sys.exit(f"a step has {len(steps[0])} rows, --micro_batch {options.micro_batch} does not divide them: TRL would leave the rest out")
    model = load(options)
    if options.side == "transformers":
        loop(model, steps, options)
    else:
        trl(model, steps, options)


def load(options):
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    kind = dict(dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype], attn_implementation=options.attention)
    if options.side == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1, **kind)
        model.config.pad_token_id = 0
        with torch.no_grad():       # the checkpoint has no such head: training.py takes the same one
            model.score.weight.copy_(torch.linspace(-0.1, 0.1, model.config.hidden_size)[None])
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, **kind)
    model.config.use_cache = False
    if options.lora_rank > 0:
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules=LINEARS,
                                                 task_type="SEQ_CLS" if options.side == "reward" else "CAUSAL_LM"))
    return model.train()


def start():
    """Wait for the other side; then time and peak memory count."""
    if not sys.stdin.readline():
        sys.exit("standard input ended")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return time.perf_counter()


def report(began, loss):
    seconds = time.perf_counter() - began
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "loss": loss, "peak_bytes": peak}), flush=True)


def loop(model, steps, options):
    import torch
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    for rows in steps:
        began = start()
        report(began, optimizer_step(model, trained, optimizer, rows, options.micro_batch))


def optimizer_step(model, trained, optimizer, rows, micro_batch, device="cpu"):
    """The loss of rows padded to the longest of their micro-batch, without a mask where nothing is padded; gpu.py makes it too."""
    import torch
    loss_sum, n_tokens = 0.0, sum(len(row["tokens"]) - row["prompt_len"] for row in rows)
    for i in range(0, len(rows), micro_batch):
        part = rows[i:i + micro_batch]
        longest = max(len(row["tokens"]) for row in part)
        fill = [longest - len(row["tokens"]) for row in part]
        ids = torch.tensor([row["tokens"] + [0] * n for row, n in zip(part, fill)], device=device)
        mask = torch.tensor([[1] * len(row["tokens"]) + [0] * n for row, n in zip(part, fill)], device=device) if any(fill) else None
        labels = torch.tensor([[-100] * row["prompt_len"] + row["tokens"][row["prompt_len"]:] + [-100] * n for row, n in zip(part, fill)], device=device)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=n_tokens).loss
        loss.backward()
        loss_sum += loss.detach()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss_sum)


def trl(model, steps, options):
    import tempfile

    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
    reward, defaults = options.side == "reward", options.side == "sft_defaults"
    length = (lambda row: max(len(row["chosen"]), len(row["rejected"]))) if reward else (lambda row: len(row["tokens"]))
    rows = [row for step in steps for row in (step if defaults else sorted(step, key=length, reverse=True))]
    n_rows = len(steps[0])
    common = dict(output_dir=os.path.join(tempfile.gettempdir(), "training_peer"), per_device_train_batch_size=options.micro_batch,
                  gradient_accumulation_steps=n_rows // options.micro_batch, max_steps=len(steps), learning_rate=options.lr, lr_scheduler_type="constant",
                  max_length=None, gradient_checkpointing=defaults, bf16=False, use_cpu=True, report_to="none", save_strategy="no", logging_steps=1,
                  disable_tqdm=True, weight_decay=0.01, adam_beta2=0.95, optim="adamw_torch_fused", dataloader_pin_memory=False)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    # TRL tells the model its pad id, and a reward is read at the last token that is not that one: with the end token for padding, a token too early
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    if reward:
        data = Dataset.from_list([{"chosen_input_ids": row["chosen"], "rejected_input_ids": row["rejected"]} for row in rows])
        config, kind = RewardConfig(**common), RewardTrainer
    else:
        data = Dataset.from_list([{"input_ids": row["tokens"], "completion_mask": [0] * row["prompt_len"] + [1] * (len(row["tokens"]) - row["prompt_len"])}
                                  for row in rows])
        config, kind = SFTConfig(**common, completion_only_loss=True), SFTTrainer

    class InOrder(kind):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = start()

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in (logs or {}):
                report(self.began, logs["loss"])

    trainer = InOrder(model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()])
    from transformers import PrinterCallback
    trainer.remove_callback(PrinterCallback)
    trainer.train()


if __name__ == "__main__":
    main()
