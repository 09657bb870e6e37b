"""Generate answers for a task, score them, and choose among several with a verifier."""

from llama_rlhf.cli import run


def main(
    *,
    ckpt_dir: str = "",
    task: str = "GSM8K",
    label_file: str = "",
    log_dir: str = "",
    model_type: str = "",
    max_batch_size: int = 64,
    max_cache_gb: float = -1.0,
    cuda_graphs: str = "auto",
    max_new_tokens: int = 256,
    max_seq_len: int = -1,
    limit: int = -1,
    rule: str = "auto",
    perplexity: bool = False,
    use_chat_template: bool = False,
    system_prompt: str | None = None,
    verifier_ckpt_dir: str = "",
    samples_file: str = "",
    num_samples_per_prompt: int = 1,
    temperature: float = -1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: list[str] | None = None,
    seed: int = 0,
    write_report: bool = True,
    dtype: str = "auto",
    model_parallel_size: int = -1,
    tokenizer_file: str = "",
    chat_format: str | None = None,
    plan: bool = False,
    plan_ranks: int = -1,
    device: str = "auto",
    timeout_seconds: float = 600.0,
    compare: list[str] | None = None,
):
    """Answer every problem of a file with a model and count the right answers.

    Writes samples.jsonl (one answer a line) and metrics.json (accuracy with its interval, under every rule) to log_dir. With a
    verifier also its score of every answer, and the accuracy of best-of-n, of votes and of pass@k on the same samples.

    Args:
        ckpt_dir: the model: a folder of consolidated.NN.pth, a Hugging Face folder, a single weight file, a save_dir of solver_train
        task: what kind of problems: GSM8K, answers (any questions and short answers), reasoning_gym:NAME, or FILE.py: docs/TASKS.md
        label_file: problems with labels, json, jsonl or parquet; default: the task's own, dataset/GSM8K/test.json for GSM8K
        log_dir: where to write; default: evaluate-TASK inside ckpt_dir's folder (evaluate-TASK-SAVE beside the save of a run), or the verifier's with --samples_file
        model_type: a preset such as llama-2-7b, needed only when the checkpoint has no config of its own
        max_batch_size: rows decoded together; fewer where memory does not allow it
        max_cache_gb: most memory for keys and values on a rank, 10^9 bytes, which bounds the rows decoded together; -1: what there is
        cuda_graphs: auto, always or never: record decode steps on CUDA and replay them, one launch a step; auto: where one rank holds the model
        max_new_tokens: longest answer, in tokens
        max_seq_len: prompt and answer together; -1: the model's own length
        limit: only the first so many problems; -1: all; with --compare: changed problems to show, -1: 10
        rule: headline rule; auto: the task's; for GSM8K A original, B strict, C flexible, D tolerant (auto); all four are reported
        perplexity: also report the loss and perplexity of the reference solutions
        use_chat_template: render prompts as the model's chat format does
        system_prompt: put before every prompt
        verifier_ckpt_dir: a reward model from verifier_train.py, to choose among several answers to a problem
        samples_file: instead of generating: a samples.jsonl written earlier, for the verifier to choose from
        num_samples_per_prompt: answers per problem; more than 1 also reports pass@k
        temperature: 0 is greedy; -1: 0 for one answer per problem, 0.7 for several
        top_k: keep only the k most likely tokens; 0: all
        top_p: keep the most likely tokens up to this probability
        min_p: keep tokens at least so likely relative to the best
        stop: strings that end an answer, besides the end tokens; not part of its text
        seed: of the samples
        write_report: also write log_dir/report.html, if matplotlib is installed
        dtype: auto, bf16, fp16 or fp32
        model_parallel_size: tensor-parallel ranks; -1: all processes; the rest are replicas that share the problems
        tokenizer_file: when it is not beside the weights
        chat_format: llama-2, mistral-v1, mistral-v3, chatml or llama-3, for a tokenizer without a template of its own
        plan: only print what a rank needs of memory; needs --model_type or a checkpoint, nothing is read besides or allocated
        plan_ranks: with --plan: the number of processes to plan for; -1: as many as were started, or --model_parallel_size
        device: auto, cpu or cuda
        timeout_seconds: longest wait in a collective before the run ends with an error
        compare: instead of evaluating: log_dirs of earlier evaluations on the same problems, to set side by side; each is tested against the first
    """
    from llama_rlhf import cli

    if compare:
        from llama_rlhf.comparison import compare_runs

        print(compare_runs(compare, 10 if limit == -1 else limit))
        return
    if samples_file and not verifier_ckpt_dir and (plan or not ckpt_dir):
        raise ValueError("--samples_file needs --verifier_ckpt_dir: a reward model to choose among the answers")
    if plan:
        from llama_rlhf.plan import plan_evaluation

        plan_evaluation(cli.resolved).show()
        return
    if bool(ckpt_dir) == bool(samples_file):
        raise ValueError("give either --ckpt_dir, the model to evaluate, or --samples_file with answers it gave "
                         "(or --compare A B with two log_dirs)")
    if samples_file and "label_file" in cli.given:
        raise ValueError("--samples_file holds the problems with their labels: leave --label_file out")
    if samples_file and perplexity:
        raise ValueError("--perplexity needs the model itself, --ckpt_dir, not --samples_file")
    if verifier_ckpt_dir and not samples_file and num_samples_per_prompt < 2:
        raise ValueError("--verifier_ckpt_dir chooses among several answers: add --num_samples_per_prompt 8")
    import os
    import re
    from collections import Counter

    from llama_rlhf.checkpoint import store
    from llama_rlhf.api import load
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.evaluation import (answer, encode_problems, make_way, read_samples, reference_loss, same_number, score_samples, select,
                                       show, show_selection, summarize, write_samples)
    from llama_rlhf.models.transformer import ValueModel
    from llama_rlhf.parallel import groups
    from llama_rlhf.reward import check_reward_model
    from llama_rlhf.plan import plan_evaluation
    from llama_rlhf.runlog import PeakMemory, environment
    from llama_rlhf.sampling import Sampling
    from llama_rlhf.tasks import choose_rule, get_task, source_of
    from llama_rlhf.tokenizer import check_vocabulary, load_tokenizer

    groups.initialize(model_parallel_size, timeout_seconds=timeout_seconds, device=device)
    prompt_options = dict(use_chat_template=use_chat_template, system_prompt=system_prompt)
    if temperature == -1:
        temperature = 0.0 if num_samples_per_prompt == 1 else 0.7
    with groups.together("reading the problems"):
        ckpt_dir, verifier_ckpt_dir = (path and store.find(path) for path in (ckpt_dir, verifier_ckpt_dir))
        kind = get_task(task)
        rule = choose_rule(kind, rule)
        if limit == 0 or limit < -1:
            raise ValueError(f"--limit {limit}: use -1 for all problems, or at least 1")
        cli.check_range(1, max_batch_size=max_batch_size, max_new_tokens=max_new_tokens, num_samples_per_prompt=num_samples_per_prompt)
        if samples_file:
            rows = read_samples(samples_file, rule)
            kept = set(sorted({row["id"] for row in rows})[:limit if limit >= 0 else None])
            rows = [row for row in rows if row["id"] in kept]
            numbers = Counter(row["id"] for row in rows)
            if single := [problem for problem, n in numbers.items() if n == 1]:
                raise ValueError(f"{samples_file} holds one answer to {len(single)} of {len(kept)} problems (the first: {single[0]}): nothing to choose from. "
                                 "Generate with --num_samples_per_prompt 8, or leave those problems out.")
            if (least := min(numbers.values())) < (most := max(numbers.values())):
                groups.log(f"note: {samples_file} holds {least} to {most} answers to a problem: the first {least} of each count")
        else:
            label_file = source_of(kind, "label_file", label_file, "TEST")
            problems = kind.load(label_file)[:limit if limit >= 0 else None]
            tokenizer = load_tokenizer(tokenizer_file or ckpt_dir, chat_format=chat_format)
            if num_samples_per_prompt > 1 and temperature == 0:
                raise ValueError(f"--temperature 0 gives {num_samples_per_prompt} equal answers to a problem: leave out --num_samples_per_prompt, or give --temperature 0.7")
        sampling: dict = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
        Sampling(**sampling)        # refuses what cannot be sampled from
        if verifier_ckpt_dir:
            check_reward_model(verifier_ckpt_dir)
            verifier_tokenizer = load_tokenizer(verifier_ckpt_dir, chat_format=chat_format)
    home = ckpt_dir or verifier_ckpt_dir
    log_dir = log_dir or store.beside(home, "evaluate-" + re.sub(r"[^\w.-]+", "-", task))
    store.check_writable(log_dir)
    if os.path.exists(os.path.join(log_dir, "metrics.jsonl")):
        raise ValueError(f"--log_dir {log_dir} holds the log of a training run, whose report would be written in place of this evaluation's. Choose another folder.")
    written = [os.path.join(log_dir, name) for name in ("samples.jsonl", "metrics.json")]
    if samples_file and limit >= 0 and os.path.exists(written[0]) and os.path.samefile(samples_file, written[0]):
        raise ValueError(f"--limit {limit} with --log_dir {log_dir} would leave {limit} problems of {samples_file}, which is written there anew with scores. "
                         "Choose another --log_dir, or leave out --limit.")
    memory, config, prompts = PeakMemory(trains=False), None, []
    if not samples_file:
        model = load(ckpt_dir, dtype=dtype, model_type=model_type, tokenizer=tokenizer).model
        longest = model.config.max_seq_len if max_seq_len == -1 else max_seq_len
        with groups.together("encoding the problems"):
            if not 2 <= longest <= model.config.max_seq_len:
                raise ValueError(f"--max_seq_len {max_seq_len}: this model allows 2 to {model.config.max_seq_len}")
            prompts = encode_problems(tokenizer, problems, label_file, longest, **prompt_options)
        groups.log(f"{len(problems)} problems of {label_file}, model {ckpt_dir}: {model.config.n_parameters / 1e6:.1f} M weights, "
                   f"{groups.tp_size()} tensor-parallel x {groups.dp_size()} data-parallel ranks, {model.dtype}")
        config = model.config
        memory.start()
        rows, speed = answer(model, tokenizer, kind, problems, prompts, rule=rule, max_batch_size=max_batch_size, max_cache_gb=max_cache_gb, cuda_graphs=cuda_graphs,
                             max_new_tokens=max_new_tokens, max_seq_len=longest, n_samples=num_samples_per_prompt, stop=stop or (), **sampling)
        make_way(log_dir, cli.resolved, ckpt_dir)
        write_samples(written[0], rows)
    counted = same_number(rows)
    metrics = summarize(counted, rule)
    if not samples_file:
        metrics |= speed
        if perplexity:
            metrics |= reference_loss(model, tokenizer, problems, prompts, longest)
        del model       # its memory is the verifier's
        memory.stop()
    groups.log(show(metrics))
    if verifier_ckpt_dir:
        verifier = load_model(verifier_ckpt_dir, ValueModel, dtype=groups.default_dtype(dtype), trainable=False, need_head=True)
        check_vocabulary(verifier_tokenizer, verifier, verifier_ckpt_dir)
        memory.start()
        score_samples(verifier, verifier_tokenizer, rows, **prompt_options)
        make_way(log_dir, cli.resolved, ckpt_dir)
        write_samples(written[0], rows)
        metrics["selection"] = select(counted, verifier.score)
        groups.log(show_selection(metrics["selection"]))
    if groups.is_main():
        peak = memory.n_bytes       # first: planning takes some itself
        planned = plan_evaluation(cli.resolved, config=config or verifier.config, prompts=[len(prompt) for prompt in prompts])
        metrics["memory"] = planned.beside(peak)
        groups.log(planned.line(peak))
        store.write_json(written[1], {**metrics, "checkpoint": ckpt_dir, "arguments": cli.resolved, "given": cli.given, "environment": environment()})
    groups.log(f"written: {log_dir}/samples.jsonl and metrics.json")
    if write_report and groups.is_main():
        from llama_rlhf.report import at_the_end
        at_the_end(log_dir)
    groups.shutdown()


if __name__ == "__main__":
    run(main)
