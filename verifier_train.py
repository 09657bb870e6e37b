"""Train a reward model (the "verifier") on responses that somebody or something judged."""

from llama_rlhf.cli import run


def main(
    *,
    ckpt_dir: str,
    save_dir: str,
    train_file: str = "dataset/GSM8K/train.json",
    log_dir: str = "",
    model_type: str = "",
    max_batch_size: int = 6,
    max_batch_tokens: int = -1,
    accumulation_steps: int = 1,
    lora_rank: int = -1,
    lora_alpha: float = 32.0,
    epochs: int = 1,
    max_steps: int = -1,
    max_seq_len: int = 1024,
    loss: str = "auto",
    margin: float = 0.0,
    centre: float = 0.0,
    lm_loss_weight: float = 0.0,
    equal_problems: bool = True,
    lr: float = -1.0,
    lr_schedule: str = "cosine",
    warmup_ratio: float = 0.03,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    use_chat_template: bool = False,
    system_prompt: str | None = None,
    label_file: str = "",
    held_out: float = 0.05,
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
    """Train a model with a scalar head to tell good responses from bad ones.

    The data's fields say how: {"instruction", "chosen", "rejected"} are compared; {"instruction", "responses"} (best first, or with
    "scores") are compared each with each; {"instruction", "output", "label": 0 or 1}, or samples.jsonl of solver_evaluate.py, are
    right or wrong at every token; of {"instruction", "output"} wrong twins are made by changing numbers, and compared.
    Saves save_dir/epoch-N (and step-N), each a complete reward model; writes metrics.jsonl and run.json to log_dir.

    Args:
        ckpt_dir: what to start from: a fine-tuned or base model (the head is new then), or an earlier verifier
        save_dir: where epoch-N and step-N folders go; must not hold those of another run
        train_file: json, jsonl or parquet of judged responses, see above and docs/DATA.md
        log_dir: default: save_dir/log
        model_type: a preset such as llama-2-7b, needed only when the checkpoint has no config of its own
        max_batch_size: per micro-batch and replica: labelled responses, or problems with all their compared responses; -1: as --max_batch_tokens allows
        max_batch_tokens: tokens per micro-batch at most; -1: no limit
        accumulation_steps: micro-batches per optimizer step
        lora_rank: -1 trains all weights; 16 trains adapters of that rank on every linear layer, and the head
        lora_alpha: adapters are scaled by lora_alpha / lora_rank
        epochs: passes over the data; more than one soon learns the solutions by heart
        max_steps: stop after so many optimizer steps; -1: no limit
        max_seq_len: prompt and response together; longer responses are cut, and counted
        loss: auto, pairwise, mse or bce; auto: mse for labels, else pairwise; labels can be compared, comparisons have no labels
        margin: by how much a better response should lead, for pairs without a "margin" of their own
        centre: weight of the squared sum of a pair's scores, which keeps scores around 0; 0.01 is usual
        lm_loss_weight: adds the language-model loss on right solutions, times this, to mse or bce; Cobbe et al. take 1. Saves then have
            both heads; used as a reward model, or split anew, only the verifier's counts
        equal_problems: labels: every problem weighs the same, however many different responses it has
        lr: peak learning rate; -1: 1e-5 for all weights, 2e-4 for adapters
        lr_schedule: cosine, linear or constant, after the warm-up
        warmup_ratio: share of the steps over which the rate rises
        weight_decay: AdamW's, on matrices other than the embedding and the heads
        max_grad_norm: gradients are scaled down to this global norm; 0: never
        use_chat_template: render prompts as the model's chat format does
        system_prompt: put before every prompt
        label_file: judged responses to evaluate on after each epoch
        held_out: without label_file: share of train_file's problems to keep for that
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
        seed: of the order of the data, the new head and adapters, and the numbers that are changed
        dtype: auto, bf16, fp32, or fp16 on a GPU, with a scaled loss; the head is fp32
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
                   use_chat_template=use_chat_template, system_prompt=system_prompt).judged(train_file, label_file, loss, seed)
    import math
    import os
    import time

    from llama_rlhf import cli, invariants
    from llama_rlhf.checkpoint import store
    from llama_rlhf.checkpoint.export import companions_folder
    from llama_rlhf.checkpoint.shards import check_space, load_model, load_training_state, save_model
    from llama_rlhf.data import JudgedReport, batches, judged_problems, show_judged, split_problems, verifier_examples
    from llama_rlhf.models.transformer import ValueModel
    from llama_rlhf.interrupt import Interrupt
    from llama_rlhf.parallel import groups
    from llama_rlhf.parallel.layers import lora_of
    from llama_rlhf.records import read_records
    from llama_rlhf.reward import JointModel, choose_loss, count, count_judgements, evaluate_verifier, measure_score, objective, scored_responses, show_verifier
    from llama_rlhf.plan import plan_training, report_memory
    from llama_rlhf.runlog import Average, PeakMemory, RunLog, check_tracker, peak_memory_gb
    from llama_rlhf.tasks import at_home
    from llama_rlhf.tokenizer import check_vocabulary, load_tokenizer
    from llama_rlhf.trainer import Trainer, check_options

    if plan:
        plan_training(cli.resolved).show()
        return
    groups.initialize(model_parallel_size, timeout_seconds=timeout_seconds, device=device)
    with groups.together("checking the arguments and the data"):
        ckpt_dir = store.find(ckpt_dir)
        lora = lora_of(lora_rank, lora_alpha)
        if max_batch_size == -1 and max_batch_tokens > 0:
            max_batch_size = max_batch_tokens        # a row has a token at least: only their sum counts
        cli.check_range(1, max_batch_size=max_batch_size, accumulation_steps=accumulation_steps, epochs=epochs, log_steps=log_steps)
        if max_steps != -1 and max_steps < 1:
            raise ValueError(f"--max_steps {max_steps}: use -1 for no limit, or at least 1")
        if lr != -1 and lr <= 0:
            raise ValueError(f"--lr {lr} must be positive, or -1 for the default")
        cli.check_range(0, 1, warmup_ratio=warmup_ratio)
        cli.check_range(0, 0.99, held_out=held_out)
        cli.check_range(0, margin=margin, centre=centre, lm_loss_weight=lm_loss_weight, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        cli.check_range(-1 << 31, (1 << 31) - 1, seed=seed)        # shifted, to be keys of 64 bits
        check_options(optimizer_precision, zero, {groups.default_dtype(dtype)}, activation_checkpointing, compile)
        check_tracker(tracker)
        companions = companions_folder(tokenizer_file) or ckpt_dir
        tokenizer = load_tokenizer(tokenizer_file or ckpt_dir, chat_format=chat_format)
        train_file, label_file = at_home(train_file), at_home(label_file)
        kind, problems = judged_problems(read_records(train_file), seed=seed)
        loss = choose_loss(loss, kind, train_file, margin=margin, centre=centre, lm_loss_weight=lm_loss_weight)
        problems, held = split_problems(problems, 0.0 if label_file else held_out, seed)
        if label_file:
            held_kind, held = judged_problems(read_records(label_file), seed=seed)
            choose_loss(loss, held_kind, label_file)
        report, held_report = JudgedReport(), JudgedReport()
        options = dict(loss=loss, max_seq_len=max_seq_len, use_chat_template=use_chat_template, system_prompt=system_prompt)
        examples = verifier_examples(problems, tokenizer, equal_problems=equal_problems, report=report, **options)
        held = verifier_examples(held, tokenizer, report=held_report, **options)
        for file, rows, counts in ((train_file, examples, report), (label_file, held, held_report)):
            if file and not rows:
                raise ValueError(f"{file}: nothing is left to learn from ({counts})")
    log_dir = log_dir or os.path.join(save_dir, "log")
    store.check_writable(save_dir)
    store.check_writable(log_dir)
    store.claim(save_dir, log_dir)
    run = store.identity(cli.resolved, groups.default_dtype(dtype), invariants.fingerprint(examples), model=ckpt_dir)
    (start,), earlier = store.find_start([save_dir], run, resume)
    memory = PeakMemory()
    model: ValueModel = load_model(start or ckpt_dir, verify=not start, model_class=JointModel if lm_loss_weight else ValueModel, lora=lora,
                                   dtype=groups.default_dtype(dtype), model_type=model_type, seed=seed)
    model.recompute(activation_checkpointing)
    model.sequence_parallel(sequence_parallel)
    if compile:
        model.compile_elementwise()
    with groups.together("checking the data against the model"):
        check_vocabulary(tokenizer, model, ckpt_dir)
        if max_seq_len > model.config.max_seq_len:
            raise ValueError(f"--max_seq_len {max_seq_len} is more than the model's {model.config.max_seq_len}")

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
    if kind == "solutions":
        run_log.write(f"{train_file} holds right solutions only. Wrong ones were made by changing the answer and other numbers: a verifier can "
                      "learn from them to check arithmetic. For a policy's own mistakes, give the samples.jsonl of solver_evaluate.py.")
    if report.correct in (0, report.responses):
        run_log.write(f"warning: {train_file} holds {'only right' if report.correct else 'no right'} responses, from which a verifier learns nothing but that. "
                      "Sample answers from a model that is sometimes right and sometimes wrong")
    run_log.write(f"{train_file}, {kind}, loss {loss}: {report}\nheld out, {label_file or train_file}: {held_report}\n{trainer.describe()}\n"
                  f"{groups.tp_size()} tensor-parallel x {groups.dp_size()} data-parallel ranks, {model.dtype}, {total_steps} steps\n"
                  f"first example, judged part in brackets: {show_judged(examples[0], tokenizer)}")
    since, step = Average(), 0
    judged: list = [0.0, 0]     # rightly, in all, by this replica since the last line: its first rank counts, however many it has when the run goes on

    def loss_sum(indices):
        rows = [examples[i] for i in indices]
        value, right = objective(model, rows, loss=loss, margin=margin, centre=centre, lm_loss_weight=lm_loss_weight)
        if groups.tp_rank() == 0:
            judged[0], judged[1] = judged[0] + right, judged[1] + count_judgements(rows, loss)
        return value

    def save(name, epoch):
        totals = [sum(column) for column in zip(*groups.gather_objects((float(judged[0]), judged[1])))]
        save_model(model, os.path.join(save_dir, name), companions=companions, trainer=trainer, step=step, epoch=epoch, score=model.score,
                   run={"identity": run, "since": since.state(), "of_epoch": of_epoch.state(), "judged": totals})
        run_log.write(f"saved {os.path.join(save_dir, name)}")

    def evaluate_held(epoch):
        assert model.score is not None
        started = time.perf_counter()
        metrics = evaluate_verifier(model, held, model.score)
        run_log.write(show_verifier(metrics))
        run_log.record("evaluation", step=step, epoch=epoch, **metrics, seconds=time.perf_counter() - started)
        run_log.record("scored", step=step, responses=scored_responses(model, tokenizer, held, model.score))

    of_epoch, seen, interrupt = Average(), 0, Interrupt()
    memory.start()
    if start:
        load_training_state(trainer, start)
        step, since, of_epoch = earlier["step"], Average(**earlier["run"]["since"]), Average(**earlier["run"]["of_epoch"])
        judged[:] = earlier["run"]["judged"] if groups.is_main() else (0.0, 0)
        run_log.resumed(step)
        run_log.write(f"continuing {start}, after step {step}")
    invariants.start({"model": model}, {"model": trainer}, tokenizer, examples, step=step, max_seq_len=max_seq_len, chat=use_chat_template, doctor=doctor)
    ended = step == total_steps or os.path.basename(start).startswith("epoch-")
    if held and ended and run_log.find("scored", step) is None:      # killed in it
        evaluate_held(earlier["epoch"] + os.path.basename(start).startswith("step-"))      # --max_steps ended it within an epoch
        if step < total_steps and interrupt.asked():
            interrupt.leave(run_log)
    for epoch in range(epochs):
        steps = epoch_of_micro_batches(epoch)
        first, seen = seen, seen + len(steps)       # step numbers of this epoch
        if step >= min(seen, total_steps):
            continue
        of_epoch = of_epoch if step > first else Average()
        for micro_batches in steps[step - first:total_steps - first]:
            started = time.perf_counter()
            result = trainer.step(micro_batches, loss_sum, lambda indices: count([examples[i] for i in indices], loss))
            seconds, step = time.perf_counter() - started, step + 1
            n_tokens = sum(len(examples[i].tokens) for indices in micro_batches for i in indices) * groups.dp_size()
            for average in (since, of_epoch):
                average.add(result, n_tokens, seconds)
            run_log.advance(loss=f"{since.loss:.3f}", tok_s=f"{since.tokens_per_second:.0f}")
            if step % log_steps == 0 or step == total_steps:
                right, n_judged = map(sum, zip(*groups.gather_objects((float(judged[0]), judged[1]))))
                accuracy, judged[:] = right / max(1, n_judged), (0.0, 0)
                run_log.record("train", step=step, epoch=epoch + 1, loss=since.loss, accuracy=accuracy, lr=result.lr, grad_norm=result.grad_norm,
                               tokens_per_second=since.tokens_per_second, seconds=since.seconds, **trainer.counters(), peak_memory_gb=peak_memory_gb())
                run_log.write(f"step {step}/{total_steps}  loss {since.loss:.4f}  accuracy {accuracy:.1%}  lr {result.lr:.2e}  "
                              f"grad_norm {result.grad_norm:.2f}  {since.tokens_per_second:.0f} tok/s  {peak_memory_gb():.2f} GB")
                since = Average()
            if check_steps > 0 and step % check_steps == 0:
                invariants.running({"model": model}, {"model": trainer}, step=step, grad_norm=result.grad_norm,
                                   texts=[examples[i].tokens for indices in micro_batches for i in indices])
            if save_steps > 0 and step % save_steps == 0 and step < min(seen, total_steps):
                model.score = measure_score(model, examples, loss)
                save(f"step-{step}", epoch)
            if step < min(seen, total_steps) and interrupt.asked():
                if save_steps < 1 or step % save_steps:      # else it has just been saved
                    model.score = measure_score(model, examples, loss)
                    save(f"step-{step}", epoch)
                interrupt.leave(run_log)
        finished_epoch = step == seen
        run_log.write(f"epoch {epoch + 1}: average loss {of_epoch.loss:.4f}")
        run_log.record("epoch", step=step, epoch=epoch + 1, loss=of_epoch.loss)
        model.score = measure_score(model, examples, loss)
        save(f"epoch-{epoch + 1}" if finished_epoch else f"step-{step}", epoch + 1 if finished_epoch else epoch)
        finished = step == total_steps
        if not finished and interrupt.asked():
            interrupt.leave(run_log)
        if held:            # after the save: a run that is killed here has lost nothing, and comes back to it
            evaluate_held(epoch + 1)
            if not finished and interrupt.asked():
                interrupt.leave(run_log)
        if finished:
            break
    micro = [indices for epoch in range(epochs) for step_batches in epoch_of_micro_batches(epoch) for indices in step_batches][:total_steps * accumulation_steps]
    largest = max(micro, key=lambda indices: sum(len(examples[i].tokens) for i in indices))
    rows_of = lambda indices: [(len(row), examples[i].prompt_len) for i in indices for row in examples[i].responses]  # noqa: E731
    if earlier.get("step", 0) < total_steps:        # else nothing was done
        report_memory(run_log, memory, lambda: plan_training(cli.resolved, config=model.config, rows=rows_of(largest), scored=rows_of(range(len(examples)))))
    run_log.close(report=write_report)
    groups.shutdown()


if __name__ == "__main__":
    run(main)
