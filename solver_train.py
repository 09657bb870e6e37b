"""Fine-tune a policy (the "solver") on instructions and answers."""

from llama_rlhf.cli import run


def main(
    *,
    ckpt_dir: str,
    save_dir: str,
    train_file: str = "",
    log_dir: str = "",
    model_type: str = "",
    max_batch_size: int = 6,
    max_batch_tokens: int = -1,
    accumulation_steps: int = 1,
    lora_rank: int = -1,
    lora_alpha: float = 32.0,
    epochs: int = 2,
    max_steps: int = -1,
    max_seq_len: int = 1024,
    lr: float = -1.0,
    lr_schedule: str = "cosine",
    warmup_ratio: float = 0.03,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    train_on_prompt: bool = False,
    use_chat_template: bool = False,
    system_prompt: str | None = None,
    label_file: str = "",
    task: str = "GSM8K",
    eval_batch_size: int = 64,
    max_new_tokens: int = 256,
    skip_grad_norm_above: float = -1.0,
    check_steps: int = 100,
    doctor: bool = False,
    save_steps: int = -1,
    resume: str = "auto",
    log_steps: int = 10,
    activation_checkpointing: str = "none",
    sequence_parallel: bool = False,
    compile: bool = False,
    optimizer_precision: str = "master",
    zero: int = 0,
    tracker: str = "none",
    write_report: bool = True,
    seed: int = 0,
    dtype: str = "auto",
    model_parallel_size: int = -1,
    tokenizer_file: str = "",
    chat_format: str | None = None,
    plan: bool = False,
    plan_ranks: int = -1,
    device: str = "auto",
    timeout_seconds: float = 600.0,
    validate: bool = False,
):
    """Fine-tune a model on {"instruction", "output"} records; the loss is taken over the answer only.

    Saves save_dir/epoch-N (and step-N), each a complete model; writes metrics.jsonl and run.json to log_dir.

    Args:
        ckpt_dir: the model: a folder of consolidated.NN.pth, a Hugging Face folder, a single weight file, an earlier save
        save_dir: where epoch-N and step-N folders go
        train_file: json, jsonl or parquet of {"instruction", "output"} (or question/answer, query/response, chat messages: docs/DATA.md);
            default: the task's own, dataset/GSM8K/train.json for GSM8K
        log_dir: default: save_dir/log
        model_type: a preset such as llama-2-7b, needed only when the checkpoint has no config of its own
        max_batch_size: rows per micro-batch and replica; -1: as many as --max_batch_tokens allows
        max_batch_tokens: tokens per micro-batch at most; -1: no limit
        accumulation_steps: micro-batches per optimizer step
        lora_rank: -1 trains all weights; 16 trains adapters of that rank on every linear layer
        lora_alpha: adapters are scaled by lora_alpha / lora_rank
        epochs: passes over the data
        max_steps: stop after so many optimizer steps; -1: no limit
        max_seq_len: prompt and answer together; longer answers are cut, and counted
        lr: peak learning rate; -1: 1e-5 for all weights, 2e-4 for adapters
        lr_schedule: cosine, linear or constant, after the warm-up
        warmup_ratio: share of the steps over which the rate rises
        weight_decay: AdamW's, on matrices other than the embedding and the head
        max_grad_norm: gradients are scaled down to this global norm; 0: never
        train_on_prompt: take the loss over the prompt too
        use_chat_template: render prompts as the model's chat format does
        system_prompt: put before every prompt
        label_file: problems to evaluate on before training and after each epoch; default: none
        task: what kind of problems those are: GSM8K, answers, reasoning_gym:NAME, FILE.py (docs/TASKS.md)
        eval_batch_size: rows decoded together in that evaluation
        max_new_tokens: longest answer in that evaluation
        skip_grad_norm_above: skip steps whose gradient norm, before clipping, is larger, on all ranks and counted; -1: none
        check_steps: optimizer steps between checks that ranks hold the same weights and counters; -1: only at the start
        doctor: check what must hold, print a table with likely causes, and stop
        save_steps: also save every so many optimizer steps; -1: only at the end of epochs
        resume: auto continues the run that save_dir holds, exactly, if the settings are the same; never refuses such a folder
        log_steps: optimizer steps between lines of the log
        activation_checkpointing: what backward recomputes instead of keeping it: none, all blocks (about a third more time), mlp, or a number k: every k-th block
        sequence_parallel: divide the tokens among the tensor-parallel ranks outside attention and feed-forward: less memory, the same numbers
        compile: on CUDA, train through torch.compile where it makes one kernel of several (rotary positions, gates); the first step takes seconds longer
        optimizer_precision: where the updates of bf16 weights go that bf16 cannot hold: master, an fp32 copy; kahan, 16 bits more, 2 bytes less
        zero: 1 shares the optimizer state among the data-parallel replicas
        tracker: none, tensorboard (files in log_dir) or wandb (offline unless WANDB_MODE says otherwise); metrics.jsonl is written always
        write_report: at the end write log_dir/report.html and report.png, if matplotlib is installed
        seed: of the order of the data and new adapters
        dtype: auto, bf16, fp32, or fp16 on a GPU, with a scaled loss
        model_parallel_size: tensor-parallel ranks; -1: all processes; the rest are data-parallel replicas
        tokenizer_file: when it is not beside the weights
        chat_format: llama-2, mistral-v1, mistral-v3, chatml or llama-3, for a tokenizer without a template of its own
        plan: only print what a rank needs of memory; needs --model_type or a checkpoint, nothing is read besides or allocated
        plan_ranks: with --plan: the number of processes to plan for; -1: as many as were started, or --model_parallel_size
        device: auto, cpu or cuda
        timeout_seconds: longest wait in a collective before the run ends with an error
        validate: look at the data files only: faults, lengths, what is cut or dropped, an example; exit code 1 if something is wrong
    """
    if validate:
        from llama_rlhf.validation import Validation
        Validation(ckpt_dir, tokenizer_file=tokenizer_file, chat_format=chat_format, model_type=model_type, max_seq_len=max_seq_len,
                   use_chat_template=use_chat_template, system_prompt=system_prompt).answers(train_file, label_file, task)
    import math
    import os
    import time

    from llama_rlhf import cli, invariants
    from llama_rlhf.checkpoint import store
    from llama_rlhf.checkpoint.export import companions_folder
    from llama_rlhf.checkpoint.shards import check_space, load_model, load_training_state, save_model
    from llama_rlhf.data import DataReport, batches, sft_examples, show_example
    from llama_rlhf.evaluation import encode_problems, evaluate, show
    from llama_rlhf.interrupt import Interrupt
    from llama_rlhf.parallel import groups
    from llama_rlhf.parallel.layers import lora_of
    from llama_rlhf.plan import plan_training, report_memory
    from llama_rlhf.records import read_records
    from llama_rlhf.runlog import Average, PeakMemory, RunLog, check_tracker, peak_memory_gb
    from llama_rlhf.tasks import get_task, source_of
    from llama_rlhf.tokenizer import check_vocabulary, load_tokenizer
    from llama_rlhf.trainer import Trainer, check_options, response_logprobs

    if plan:
        plan_training(cli.resolved).show()
        return
    groups.initialize(model_parallel_size, timeout_seconds=timeout_seconds, device=device)
    with groups.together("checking the arguments and the data"):
        ckpt_dir = store.find(ckpt_dir)
        lora = lora_of(lora_rank, lora_alpha)
        if max_batch_size == -1 and max_batch_tokens > 0:
            max_batch_size = max_batch_tokens        # a row has a token at least: only their sum counts
        cli.check_range(1, max_batch_size=max_batch_size, accumulation_steps=accumulation_steps, epochs=epochs, log_steps=log_steps, eval_batch_size=eval_batch_size,
                        max_new_tokens=max_new_tokens)
        cli.check_range(0, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        cli.check_range(0, 1, warmup_ratio=warmup_ratio)
        if max_steps != -1 and max_steps < 1:
            raise ValueError(f"--max_steps {max_steps}: use -1 for no limit, or at least 1")
        if lr != -1 and lr <= 0:
            raise ValueError(f"--lr {lr} must be positive, or -1 for the default")
        cli.check_range(-1 << 31, (1 << 31) - 1, seed=seed)        # shifted, to be keys of 64 bits
        check_options(optimizer_precision, zero, {groups.default_dtype(dtype)}, activation_checkpointing, compile)
        check_tracker(tracker)
        companions = companions_folder(tokenizer_file) or ckpt_dir
        tokenizer = load_tokenizer(tokenizer_file or ckpt_dir, chat_format=chat_format)
        report = DataReport()
        kind = get_task(task)
        train_file = source_of(kind, "train_file", train_file, "TRAIN")
        examples = sft_examples(getattr(kind, "records", read_records)(train_file), tokenizer, max_seq_len=max_seq_len, train_on_prompt=train_on_prompt,
                                use_chat_template=use_chat_template, system_prompt=system_prompt, report=report)
        if not examples:
            raise ValueError(f"{train_file}: no record is left to train on ({report}). Raise --max_seq_len.")
        problems = kind.load(label_file) if label_file else []
    log_dir = log_dir or os.path.join(save_dir, "log")
    store.check_writable(save_dir)
    store.check_writable(log_dir)
    store.claim(save_dir, log_dir)
    run = store.identity(cli.resolved, groups.default_dtype(dtype), invariants.fingerprint(examples), model=ckpt_dir)
    (start,), earlier = store.find_start([save_dir], run, resume)
    memory = PeakMemory()
    model = load_model(start or ckpt_dir, verify=not start, lora=lora, dtype=groups.default_dtype(dtype), model_type=model_type, seed=seed)
    model.recompute(activation_checkpointing)
    model.sequence_parallel(sequence_parallel)
    if compile:
        model.compile_elementwise()
    with groups.together("checking the data against the model"):
        check_vocabulary(tokenizer, model, ckpt_dir)
        if max_seq_len > model.config.max_seq_len:
            raise ValueError(f"--max_seq_len {max_seq_len} is more than the model's {model.config.max_seq_len}")
        prompts = encode_problems(tokenizer, problems, label_file, model.config.max_seq_len, use_chat_template=use_chat_template, system_prompt=system_prompt)

    def epoch_of_micro_batches(epoch):
        micro = batches(examples, max_batch_size=max_batch_size, max_batch_tokens=None if max_batch_tokens == -1 else max_batch_tokens,
                        seed=seed, epoch=epoch, dp_rank=groups.dp_rank(), dp_size=groups.dp_size())
        return [micro[i:i + accumulation_steps] for i in range(0, len(micro), accumulation_steps)]

    steps_planned = sum(len(epoch_of_micro_batches(epoch)) for epoch in range(epochs))
    total_steps = steps_planned if max_steps == -1 else min(steps_planned, max_steps)
    trainer = Trainer(model, lr=lr if lr > 0 else (1e-5 if lora is None else 2e-4), total_steps=total_steps, schedule=lr_schedule,
                      warmup_steps=math.ceil(warmup_ratio * total_steps), weight_decay=weight_decay, max_grad_norm=max_grad_norm,
                      precision=optimizer_precision, zero=zero, skip_grad_norm_above=skip_grad_norm_above)
    if earlier.get("step", 0) < total_steps:        # else nothing is saved any more
        check_space({save_dir: (model, trainer)})
    run_log = RunLog(log_dir, total=total_steps, tracker=tracker)
    run_log.write(f"{train_file}: {report}\n{trainer.describe()}\n{groups.tp_size()} tensor-parallel x {groups.dp_size()} data-parallel "
                  f"ranks, {model.dtype}, {total_steps} steps\nfirst sample, trained part in brackets: {show_example(examples[0], tokenizer)}")

    def loss_sum(indices):
        rows = [examples[i] for i in indices]
        return -response_logprobs(model, [row.tokens for row in rows], [row.prompt_len for row in rows]).sum()

    def count(indices):
        return sum(len(examples[i].tokens) - examples[i].prompt_len for i in indices)

    def save(name, epoch):
        save_model(model, os.path.join(save_dir, name), companions=companions, trainer=trainer, step=step, epoch=epoch,
                   run={"identity": run, "since": since.state(), "of_epoch": of_epoch.state()})
        run_log.write(f"saved {os.path.join(save_dir, name)}")

    def evaluate_policy(epoch):
        metrics = evaluate(model, tokenizer, kind, problems, prompts, rule=kind.RULE, max_batch_size=eval_batch_size, max_new_tokens=max_new_tokens,
                           max_seq_len=model.config.max_seq_len, progress=False, samples_file=os.path.join(run_log.log_dir, f"samples-{step}.jsonl"))
        run_log.write(f"after step {step}: {show(metrics)}")
        run_log.record("evaluation", step=step, epoch=epoch, **metrics)

    interrupt = Interrupt()
    memory.start()
    step, since, of_epoch, seen = 0, Average(), Average(), 0
    if start:
        load_training_state(trainer, start)
        step, since, of_epoch = earlier["step"], Average(**earlier["run"]["since"]), Average(**earlier["run"]["of_epoch"])
        run_log.resumed(step)
        run_log.write(f"continuing {start}, after step {step}")
    invariants.start({"model": model}, {"model": trainer}, tokenizer, examples, step=step, max_seq_len=max_seq_len, chat=use_chat_template, doctor=doctor)
    ended = step == total_steps or os.path.basename(start).startswith("epoch-")
    if problems and (not step or ended and run_log.find("evaluation", step) is None):     # killed in it
        evaluate_policy(earlier.get("epoch", 0) + os.path.basename(start).startswith("step-"))      # --max_steps ended it within an epoch
        if step < total_steps and interrupt.asked():
            interrupt.leave(run_log, saved=bool(start))
    for epoch in range(epochs):
        n_batches = epoch_of_micro_batches(epoch)
        first, seen = seen, seen + len(n_batches)       # step numbers of this epoch
        if step >= min(seen, total_steps):
            continue
        of_epoch = of_epoch if step > first else Average()
        for micro_batches in n_batches[step - first:total_steps - first]:
            started = time.perf_counter()
            result = trainer.step(micro_batches, loss_sum, count)
            seconds, step = time.perf_counter() - started, step + 1
            n_tokens = sum(len(examples[i].tokens) for indices in micro_batches for i in indices) * groups.dp_size()
            for average in (since, of_epoch):
                average.add(result, n_tokens, seconds)
            run_log.advance(loss=f"{since.loss:.3f}", tok_s=f"{since.tokens_per_second:.0f}")
            if step % log_steps == 0 or step == total_steps:
                run_log.record("train", step=step, epoch=epoch + 1, loss=since.loss, perplexity=since.perplexity, lr=result.lr,
                               grad_norm=result.grad_norm, tokens_per_second=since.tokens_per_second, seconds=since.seconds, **trainer.counters(),
                               peak_memory_gb=peak_memory_gb())
                run_log.write(f"step {step}/{total_steps}  loss {since.loss:.4f}  perplexity {since.perplexity:.3f}  lr {result.lr:.2e}  "
                              f"grad_norm {result.grad_norm:.2f}  {since.tokens_per_second:.0f} tok/s  {peak_memory_gb():.2f} GB")
                since = Average()
            if check_steps > 0 and step % check_steps == 0:
                invariants.running({"model": model}, {"model": trainer}, step=step, grad_norm=result.grad_norm,
                                   texts=[examples[i].tokens for indices in micro_batches for i in indices])
            if save_steps > 0 and step % save_steps == 0 and step < min(seen, total_steps):
                save(f"step-{step}", epoch)
            if step < min(seen, total_steps) and interrupt.asked():
                if save_steps < 1 or step % save_steps:      # else it has just been saved
                    save(f"step-{step}", epoch)
                interrupt.leave(run_log)
        finished_epoch = step == seen
        run_log.write(f"epoch {epoch + 1}: average loss {of_epoch.loss:.4f}, perplexity {of_epoch.perplexity:.3f} over {of_epoch.n_loss_tokens} tokens")
        run_log.record("epoch", step=step, epoch=epoch + 1, loss=of_epoch.loss, perplexity=of_epoch.perplexity)
        save(f"epoch-{epoch + 1}" if finished_epoch else f"step-{step}", epoch + 1 if finished_epoch else epoch)
        finished = step == total_steps
        if not finished and interrupt.asked():
            interrupt.leave(run_log)
        if problems:        # after the save: a run that is killed here has lost nothing, and comes back to it
            evaluate_policy(epoch + 1)
            if not finished and interrupt.asked():
                interrupt.leave(run_log)
        if finished:
            break
    micro = [indices for epoch in range(epochs) for step_batches in epoch_of_micro_batches(epoch) for indices in step_batches][:total_steps * accumulation_steps]
    largest = max(micro, key=lambda indices: sum(len(examples[i].tokens) for i in indices))
    if earlier.get("step", 0) < total_steps:        # else nothing was done
        report_memory(run_log, memory, lambda: plan_training(cli.resolved, config=model.config, rows=[(len(examples[i].tokens), examples[i].prompt_len) for i in largest],
                                                             prompts=[len(prompt) for prompt in prompts]))
    run_log.close(report=write_report)
    groups.shutdown()


if __name__ == "__main__":
    run(main)
