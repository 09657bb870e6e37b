"""PPO iterations of TRL 0.24 on the CPU: the other side of the PPO benchmark. Does not import llama_rlhf.

    python3.11 -m venv trl-venv && trl-venv/bin/pip install torch==2.13.0 trl==0.24.0 transformers==4.57.1 peft==0.21.2
    python checkpoint_split.py --ckpt_file SmolLM2-135M-Instruct.Q4_1.gguf --save_path smollm2-hf --format hf
    trl-venv/bin/python benchmarks/ppo_peer.py --model smollm2-hf --prompts prompts.json --dtype fp32

Four models of the folder's architecture: policy, reference (with --lora_rank the policy without its adapters), reward model
and value model; the heads of the last two are random. Iteration i takes prompts [i n_rows, (i + 1) n_rows), from the start
again after the last, in this order. Every response has --new_tokens tokens: no stop token, the end-of-text token is sampled
like any other. One optimizer step per epoch (TRL accumulates gradients over the whole batch, whatever num_mini_batches says).

One line of json with the settings, then one per iteration: seconds = generate + score (reference, value and reward
forwards, advantages) + update (epochs of forward, backward, optimizer) + rest; `parts` are the calls seen inside them.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections import defaultdict

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder with weights and tokenizer")
    parser.add_argument("--prompts", required=True, help="json file, a list of lists of token ids")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights of all models")
    parser.add_argument("--autocast", type=int, choices=[0, 1], default=0,
                        help="bf16 autocast in the training forward; with --dtype fp32 this is TRL's default")
    parser.add_argument("--lora_rank", type=int, default=-1, help="-1 trains all weights of the policy")
    parser.add_argument("--value_lora", type=int, choices=[0, 1], default=0,
                        help="adapters on the value model too; TRL itself trains all its weights")
    parser.add_argument("--adapter_dtype", choices=["fp32", "same"], default="fp32", help="same: as the weights; peft's default is fp32")
    parser.add_argument("--n_rows", type=int, default=16, help="prompts in an iteration")
    parser.add_argument("--new_tokens", type=int, default=64, help="length of every response")
    parser.add_argument("--epochs", type=int, default=2, help="PPO epochs in an iteration")
    parser.add_argument("--iterations", type=int, default=3, help="the first is slower: drop it")
    parser.add_argument("--micro_batch", type=int, default=4, help="rows of one training forward and backward")
    parser.add_argument("--rollout_batch", type=int, default=0, help="rows of one generation and scoring forward, 0: all")
    parser.add_argument("--gradient_checkpointing", type=int, choices=[0, 1], default=0)
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa", help="eager is faster with bf16")
    parser.add_argument("--cache", choices=["dynamic", "static"], default="dynamic", help="key-value cache of generation")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wait_for_stdin", type=int, choices=[0, 1], default=0,
                        help="an iteration starts when a line arrives on standard input, so that two sides can take turns")
    parser.add_argument("--dump", default="", help="json file for tokens and log-probabilities of the first iteration, to compare")
    options = parser.parse_args()
    if options.n_rows % options.micro_batch:
        parser.error(f"--micro_batch {options.micro_batch} must divide --n_rows {options.n_rows}")

    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1",
                   "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    import warnings

    import torch
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    trainer = build(options)
    trainer.accelerator.print = lambda *_: None         # only json on stdout
    clock = Clock(trainer, options)
    print(json.dumps({"settings": vars(options), "versions": versions(), "load": os.getloadavg()[0],
                      "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
                      "optimizer": type(trainer.optimizer.optimizer).__name__ + (" fused" if trainer.optimizer.defaults.get("fused") else "")}),
          flush=True)
    trainer.add_callback(clock.callback())
    trainer.train()


def build(options):
    """TRL's trainer with the settings that make it fast here: see the comments."""
    import tempfile

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl import PPOConfig, PPOTrainer

    with open(options.prompts) as file:
        prompts = json.load(file)
    rows = [prompts[i % len(prompts)] for i in range(options.iterations * options.n_rows)]
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    # TRL takes every pad id for padding, also inside a response; the model's own pad id is its end-of-text id. As in TRL's
    # example: an id beyond the vocabulary, which can't be sampled; TRL puts 0 in its place before a forward.
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})

    torch.manual_seed(options.seed)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    load = dict(dtype=dtype, attn_implementation=options.attention)
    policy = AutoModelForCausalLM.from_pretrained(options.model, **load)
    reward, value = (AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1, **load) for _ in range(2))
    reference = None if options.lora_rank > 0 else AutoModelForCausalLM.from_pretrained(options.model, **load)
    if options.cache == "static":
        policy.generation_config.cache_implementation = "static"
    for model in filter(None, (policy, reference, reward, value)):
        model.config.use_cache = False          # no cache built in training and scoring forwards; generate still has its own
        model.requires_grad_(model in (policy, value))
    policy, peft_config = add_adapters(policy, value, options)

    config = PPOConfig(
        output_dir=os.path.join(tempfile.gettempdir(), "ppo_peer"),        # stays empty
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.n_rows // options.micro_batch,    # times micro_batch: rows in an iteration
        num_mini_batches=1,
        local_rollout_forward_batch_size=options.rollout_batch or options.n_rows,
        num_ppo_epochs=options.epochs,
        total_episodes=len(rows),
        response_length=options.new_tokens,
        stop_token=None, stop_token_id=None,    # TRL then sets the policy's end-of-text id to None: no early stop
        temperature=1.0,
        num_sample_generations=0, report_to="none", save_strategy="no", eval_strategy="no", disable_tqdm=True,
        gradient_checkpointing=bool(options.gradient_checkpointing),
        bf16=bool(options.autocast), use_cpu=True,
        learning_rate=options.lr, lr_scheduler_type="constant", seed=options.seed)
    data = Dataset.from_dict({"input_ids": rows})
    trainer = PPOTrainer(args=config, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
                         value_model=value, train_dataset=data, eval_dataset=data, peft_config=peft_config)
    # TRL shuffles; the other side needs to know which rows an iteration has
    trainer.dataloader = trainer.accelerator.prepare(torch.utils.data.DataLoader(
        data, batch_size=options.n_rows, shuffle=False, drop_last=True, collate_fn=trainer.data_collator))
    # otherwise accelerate takes an optimizer step per micro-batch in an iteration that exhausts the data
    trainer.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    if options.gradient_checkpointing:
        enable_checkpointing(trainer)
    return trainer


def add_adapters(policy, value, options):
    """(policy, peft_config) for TRL."""
    if options.lora_rank <= 0:
        return policy, None
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model
    config = LoraConfig(r=options.lora_rank, lora_alpha=options.lora_rank, lora_dropout=0.0, bias="none", target_modules=LINEARS)
    if options.value_lora:
        value.requires_grad_(False)
        inject_adapter_in_model(config, value)
        if options.adapter_dtype == "fp32":
            for name, parameter in value.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.float()
        value.score.requires_grad_(True)
    if options.adapter_dtype == "same":
        return get_peft_model(policy, config, autocast_adapter_dtype=False), None
    return policy, config


def enable_checkpointing(trainer):
    """PPOConfig's gradient_checkpointing alone does nothing in TRL 0.24: the trainer never passes it to the models."""
    wrapper, models = trainer.model, [trainer.model.policy, trainer.model.value_model]

    def enable():
        for model in models:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def disable():
        for model in models:
            model.gradient_checkpointing_disable()

    enable()
    # TRL turns it off around generate (which has no cache otherwise), by methods that its wrapper lacks
    wrapper.is_gradient_checkpointing, wrapper.gradient_checkpointing_enable, wrapper.gradient_checkpointing_disable = True, enable, disable


class Clock:
    """Times TRL's calls from outside and prints a line at the end of each iteration."""

    def __init__(self, trainer, options):
        import trl.trainer.ppo_trainer as module
        self.trainer, self.options, self.iteration, self.log = trainer, options, 0, {}
        self.dumped = []
        self.reset()
        value_model = trainer.model.value_model
        module.batch_generation = self.timed(module.batch_generation, lambda *_: "generate", self.count_generated)
        module.forward = self.timed(module.forward, lambda *_: "train_forward" if module.torch.is_grad_enabled() else "reference_forward",
                                    self.count)
        module.get_reward = self.timed(module.get_reward, lambda model, *_: "value_forward" if model is value_model else "reward_forward",
                                       self.count)
        trainer.accelerator.backward = self.timed(trainer.accelerator.backward, lambda *_: "backward")
        trainer.optimizer.step = self.timed(trainer.optimizer.step, lambda *_: "optimizer")
        trainer.log = self.on_log
        if options.dump:
            self.log_softmax, module.selective_log_softmax = module.selective_log_softmax, self.dump

    def reset(self):
        self.start, self.cpu, self.marks = time.perf_counter(), time.process_time(), {}
        self.parts, self.calls, self.tokens = defaultdict(float), defaultdict(int), defaultdict(int)

    def timed(self, function, name_of, after=None):
        def wrapper(*args, **kwargs):
            name, start = name_of(*args), time.perf_counter()
            self.marks.setdefault(name, start)
            result = function(*args, **kwargs)
            self.parts[name] += time.perf_counter() - start
            if name != "optimizer" or self.trainer.accelerator.sync_gradients:      # else accelerate skips the step
                self.calls[name] += 1
            if after:
                after(name, result, *args)
            return result
        return wrapper

    def count(self, name, result, model, sequences, pad, *_):
        self.tokens[name] += sequences.numel()

    def count_generated(self, name, result, model, prompts, rollout_batch, pad, config):
        sequences = result[0]
        self.tokens["prompt"] = int((prompts != pad).sum())
        self.tokens["response"] = int((sequences[:, prompts.shape[1]:] != pad).sum())
        self.tokens["padded"] = sequences.numel()
        self.generated = time.perf_counter()
        if self.options.dump and not self.iteration:
            self.dumped.append([[token for token in row if token != pad] for row in sequences.tolist()])

    def dump(self, logits, index):
        result = self.log_softmax(logits, index)
        if not self.iteration and len(self.dumped) < 3:       # of the sampled logits, of the reference
            self.dumped.append(result.float().tolist())
            if len(self.dumped) == 3:
                with open(self.options.dump, "w") as file:
                    json.dump(dict(zip(["sequences", "logprobs", "reference_logprobs"], self.dumped)), file)
        return result

    def on_log(self, metrics, *_):
        self.log, self.logged = metrics, time.perf_counter()

    def callback(self):
        from transformers import TrainerCallback
        clock = self

        class Callback(TrainerCallback):
            def on_train_begin(self, *_, **__):
                clock.begin_iteration()

            def on_step_end(self, *_, **__):
                clock.end_iteration()
        return Callback()

    def begin_iteration(self):
        if self.options.wait_for_stdin and self.iteration < self.options.iterations and not sys.stdin.readline():
            sys.exit("standard input ended")
        self.reset()

    def end_iteration(self):
        now = time.perf_counter()
        seconds, generate = now - self.start, self.parts.pop("generate")
        score, update = self.marks["train_forward"] - self.generated, self.logged - self.marks["train_forward"]
        expected = self.options.n_rows * self.options.new_tokens
        if self.tokens["response"] != expected:
            sys.exit(f"responses have {self.tokens['response']} tokens, expected {expected}: the two sides would not do equal work")
        self.iteration += 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({
            "peer": "trl", "iteration": self.iteration, "seconds": round(seconds, 3), "generate": round(generate, 3),
            "score": round(score, 3), "update": round(update, 3), "rest": round(seconds - generate - score - update, 3),
            "cpu_seconds": round(time.process_time() - self.cpu, 3),
            "parts": {name: round(value, 3) for name, value in self.parts.items()},
            "calls": dict(self.calls), "tokens": dict(self.tokens), "peak_rss_gb": round(peak / 1e9, 3),
            "prompt_tokens": self.tokens["prompt"], "response_tokens": self.tokens["response"],
            "load": round(os.getloadavg()[0], 2), "stats": {key: float(f"{value:.6g}") for key, value in self.log.items()}}), flush=True)
        self.begin_iteration()


def versions():
    from importlib.metadata import version
    return {name: version(name) for name in ("torch", "trl", "transformers", "peft", "accelerate")}


if __name__ == "__main__":
    main()
