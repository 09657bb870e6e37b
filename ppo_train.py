"""Reinforcement learning of a policy: rollouts, then updates of actor and critic (PPO), or of the actor alone."""

from llama_rlhf.cli import run


def main(
    *,
    actor_ckpt_dir: str,
    actor_save_dir: str,
    critic_ckpt_dir: str = "",
    critic_save_dir: str = "",
    reward_model_ckpt_dir: str = "",
    train_file: str = "",
    task: str = "GSM8K",
    label_file: str = "",
    log_dir: str = "",
    model_type: str = "",
    algorithm: str = "ppo",
    max_batch_size: int = 6,
    max_batch_tokens: int = -1,
    max_buffer_size: int = 96,
    minibatch_size: int = -1,
    num_samples_per_prompt: int = -1,
    inner_epochs: int = 2,
    epochs: int = 1,
    max_iterations: int = -1,
    lora_rank: int = -1,
    lora_alpha: float = 32.0,
    actor_lr: float = -1.0,
    critic_lr: float = -1.0,
    lr_schedule: str = "linear",
    warmup_ratio: float = 0.0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    critic_warmup: int = -1,
    rule_weight: float = -1.0,
    rule: str = "auto",
    reward_model_weight: float = 1.0,
    reward_function: str = "",
    normalize_scores: bool = False,
    bad_score: float = -1.0,
    min_response_tokens: int = 1,
    bootstrap_truncated: bool = False,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    max_seq_len: int = -1,
    rollout_batch_size: int = 64,
    max_cache_gb: float = -1.0,
    cuda_graphs: str = "auto",
    use_chat_template: bool = False,
    system_prompt: str | None = None,
    kl_coef: float = -1.0,
    kl_target: float = -1.0,
    kl_horizon: float = 10000.0,
    gamma: float = 1.0,
    lam: float = 0.95,
    clip: float = 0.2,
    clip_high: float = -1.0,
    dual_clip: float = -1.0,
    value_clip: float = 0.2,
    entropy_coef: float = 0.0,
    whiten_rewards: bool = False,
    target_kl: float = -1.0,
    eval_steps: int = -1,
    eval_batch_size: int = 64,
    skip_grad_norm_above: float = -1.0,
    check_steps: int = 10,
    doctor: bool = False,
    save_steps: int = -1,
    keep_last: int = 2,
    resume: str = "auto",
    save_rollouts: bool = False,
    replay: str = "",
    keep_resident: str = "auto",
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
    """Train a policy on rewards for its own answers.

    Each iteration fills a buffer with answers, scores them, and updates actor and critic from it. The reward is a trained
    verifier (--reward_model_ckpt_dir), the task's exact rule, a function of yours, or a weighted sum of them.
    Saves actor_save_dir/step-N and critic_save_dir/step-N (N iterations), each a complete model with its optimizer.

    Args:
        actor_ckpt_dir: the policy to train, and the reference that the KL is measured against
        actor_save_dir: where step-N folders of the actor go
        critic_ckpt_dir: what the critic starts from; default: the reward model if there is one, else the policy
        critic_save_dir: default: actor_save_dir/critic
        reward_model_ckpt_dir: a verifier from verifier_train.py whose score is the reward
        train_file: prompts: json, jsonl or parquet; answers in it are used only as labels of the rule; default: the task's own,
            dataset/GSM8K/train.json for GSM8K
        task: whose rule says right or wrong: GSM8K, answers, reasoning_gym:NAME, FILE.py (docs/TASKS.md)
        label_file: problems to evaluate on every --eval_steps iterations and at the end; default: none
        log_dir: default: actor_save_dir/log
        model_type: a preset such as llama-2-7b, needed only when a checkpoint has no config of its own
        algorithm: ppo, grpo, dr_grpo, rloo or reinforce++; only ppo has a critic
        max_batch_size: rows per micro-batch and replica in the updates
        max_batch_tokens: tokens per micro-batch at most; -1: no limit
        max_buffer_size: responses per iteration, all replicas together
        minibatch_size: responses per optimizer step, all replicas together; -1: a quarter of the buffer
        num_samples_per_prompt: responses to each prompt; -1: 1, or 4 for the algorithms that compare them
        inner_epochs: passes over each buffer
        epochs: passes over the prompts
        max_iterations: stop after so many iterations; -1: when the epochs are done
        lora_rank: -1 trains all weights; 16 trains adapters of that rank, all roles sharing one base where theirs are equal
        lora_alpha: adapters are scaled by lora_alpha / lora_rank
        actor_lr: -1: 1e-6 for all weights, 2e-5 for adapters
        critic_lr: -1: 5e-6 for all weights, 1e-4 for adapters
        lr_schedule: cosine, linear or constant, after the warm-up
        warmup_ratio: share of the steps over which the rates rise
        weight_decay: AdamW's, on matrices other than the embedding and the head
        max_grad_norm: gradients of actor and critic are scaled down to this norm each; 0: never
        critic_warmup: first iterations in which only the critic learns; -1: 0 from a reward model, 2 with a new head
        rule_weight: of the task's rule in the score (1 right, 0 wrong, or what the task gives in between); -1: 1 unless there is a reward model or function
        rule: the task's rule: for GSM8K A, B, C or D; auto: D there, the only one of most tasks
        reward_model_weight: of the reward model in the score
        reward_function: FILE.py:NAME of a function (prompt, response, label) -> number, added to the score
        normalize_scores: divide scores by their running standard deviation after subtracting their running mean
        bad_score: score of a response without end token, or shorter than --min_response_tokens, or not finite
        min_response_tokens: shorter ones get bad_score
        bootstrap_truncated: for responses without end token: the critic's value in place of bad_score
        temperature: of sampling; log-probabilities of all roles are taken at it
        max_new_tokens: longest response
        max_seq_len: prompt and response together; longer prompts are dropped, and counted; -1: the model's own length
        rollout_batch_size: responses generated together, per replica; fewer where memory does not allow it
        max_cache_gb: most memory for their keys and values on a rank, 10^9 bytes; -1: what there is
        cuda_graphs: auto, always or never: record decode steps on CUDA and replay them, one launch a step; auto: where one rank holds the model
        use_chat_template: render prompts as the model's chat format does
        system_prompt: put before every prompt
        kl_coef: weight of the KL to the reference; -1: 0.05 in the reward, 0.04 in grpo's loss, 0 for dr_grpo; 0: no reference
        kl_target: steer the coefficient towards this KL in nats per response; -1: fixed
        kl_horizon: responses over which it is steered
        gamma: discount per token
        lam: lambda of generalised advantage estimation
        clip: the ratio's range below 1, and above unless --clip_high
        clip_high: the ratio's range above 1; -1: as --clip
        dual_clip: cap of the loss of negative advantages; -1: none
        value_clip: range of the critic's change; -1: none
        entropy_coef: weight of the entropy in the actor's loss
        whiten_rewards: scale the shaped rewards of a buffer to unit variance
        target_kl: no more actor steps on a buffer once its approx_kl exceeds 1.5 times this; -1: never
        eval_steps: iterations between evaluations on --label_file; -1: only before and after
        eval_batch_size: rows decoded together in them
        skip_grad_norm_above: skip steps whose gradient norm, before clipping, is larger, on all ranks and counted; -1: none
        check_steps: iterations between checks that ranks hold the same weights and counters; -1: only at the start
        doctor: check what must hold, print a table with likely causes, and stop
        save_steps: iterations between saves; -1: only at the end
        keep_last: saves to keep, besides the one best in evaluation; -1: all
        resume: auto continues the run that actor_save_dir holds, exactly, if the settings are the same; never refuses such a folder
        save_rollouts: write every buffer to log_dir/rollout-N.pt
        replay: a rollout-N.pt: one update from it instead of new responses, then save and stop; its scores are as they were
        keep_resident: auto, always or never: on CUDA, whether idle models stay on the device
        activation_checkpointing: what backward recomputes instead of keeping it: none, all blocks (about a third more time), mlp, or a number k: every k-th block
        sequence_parallel: divide the tokens among the tensor-parallel ranks outside attention and feed-forward: less memory, the same numbers
        compile: on CUDA, train through torch.compile where it makes one kernel of several (rotary positions, gates); the first step takes seconds longer
        optimizer_precision: where the updates of bf16 weights go that bf16 cannot hold: master, an fp32 copy; kahan, 16 bits more, 2 bytes less
        zero: 1 shares the optimizer state among the data-parallel replicas
        tracker: none, tensorboard (files in log_dir) or wandb (offline unless WANDB_MODE says otherwise); metrics.jsonl is written always
        write_report: at the end write log_dir/report.html and report.png, if matplotlib is installed
        seed: of samples, order, new heads and adapters
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
        needs_rule = rule_weight > 0 or rule_weight == -1 and not (reward_model_ckpt_dir or reward_function)
        Validation(actor_ckpt_dir, tokenizer_file=tokenizer_file, chat_format=chat_format, model_type=model_type, max_seq_len=max_seq_len,
                   use_chat_template=use_chat_template, system_prompt=system_prompt).prompts(train_file, label_file, task, max_new_tokens, needs_rule)
    import inspect
    import math
    import os
    import random

    from llama_rlhf import cli, invariants
    from llama_rlhf.advantages import ALGORITHMS, Ema, KLController, RunningMoments, Settings, check_algorithm, make_advantages
    from llama_rlhf.checkpoint import store
    from llama_rlhf.checkpoint.export import companions_folder
    from llama_rlhf.checkpoint.shards import check_space, load_training_state, save_model
    from llama_rlhf.data import encode_prompt
    from llama_rlhf.evaluation import encode_problems, evaluate, show
    from llama_rlhf.interrupt import Interrupt
    from llama_rlhf.losses import kl_estimate
    from llama_rlhf.parallel import groups
    from llama_rlhf.parallel.layers import lora_of
    from llama_rlhf.plan import plan_ppo, report_memory
    from llama_rlhf.ppo import UpdateSettings, rollout_statistics, update_actor, update_critic, warnings
    from llama_rlhf.records import located, naming, prompt_of, read_records
    from llama_rlhf.roles import check_same_tokenizer, load_roles
    from llama_rlhf.rollout import Prompt, Reward, Rollout, RolloutSettings, collect, load_reward_function
    from llama_rlhf.runlog import Clock, PeakMemory, RunLog, check_tracker, peak_memory_gb
    from llama_rlhf.sampling import LEAST_TEMPERATURE
    from llama_rlhf.tasks import choose_rule, get_task, source_of
    from llama_rlhf.tokenizer import check_vocabulary, load_tokenizer
    from llama_rlhf.trainer import Trainer, check_options

    def chosen(value):
        return None if value == -1 else value

    if plan:
        plan_ppo(cli.resolved).show()
        return
    groups.initialize(model_parallel_size, timeout_seconds=timeout_seconds, device=device)
    critic_given = critic_ckpt_dir
    with groups.together("checking the arguments and the data"):
        actor_ckpt_dir, reward_model_ckpt_dir = store.find(actor_ckpt_dir), reward_model_ckpt_dir and store.find(reward_model_ckpt_dir)
        if num_samples_per_prompt == -1:
            num_samples_per_prompt = 4 if algorithm in ALGORITHMS and ALGORITHMS[algorithm].needs_group else 1
        if rule_weight == -1:
            rule_weight = 0.0 if reward_model_ckpt_dir or reward_function else 1.0
        if kl_coef == -1 and algorithm in ALGORITHMS:
            kl_coef = ALGORITHMS[algorithm].kl_coef
        row = check_algorithm(algorithm, n_samples_per_prompt=num_samples_per_prompt, has_critic_ckpt=bool(critic_given), gamma=gamma, lam=lam,
                              kl_coef=kl_coef, kl_target=chosen(kl_target), kl_horizon=kl_horizon, clip_low=clip,
                              clip_high=clip if clip_high == -1 else clip_high, dual_clip=chosen(dual_clip), value_clip=chosen(value_clip),
                              whiten_rewards=whiten_rewards, bootstrap_truncated=bootstrap_truncated)
        if unused := [f"--{name}" for name in row.unused if cli.resolved[name] != inspect.signature(main).parameters[name].default]:
            groups.log(f"note: {algorithm} does not use {', '.join(unused)}")
        lora = lora_of(lora_rank, lora_alpha)
        cli.check_range(1, max_batch_size=max_batch_size, max_buffer_size=max_buffer_size, inner_epochs=inner_epochs, epochs=epochs, max_new_tokens=max_new_tokens,
                        rollout_batch_size=rollout_batch_size, eval_batch_size=eval_batch_size, max_iterations=chosen(max_iterations))
        cli.check_range(0, weight_decay=weight_decay, max_grad_norm=max_grad_norm, critic_warmup=chosen(critic_warmup))
        cli.check_range(0, 1, warmup_ratio=warmup_ratio)
        if max_buffer_size % num_samples_per_prompt:
            raise ValueError(f"--max_buffer_size {max_buffer_size} is not a multiple of --num_samples_per_prompt {num_samples_per_prompt}")
        if not LEAST_TEMPERATURE <= temperature < math.inf:
            raise ValueError(f"--temperature {temperature} must be a finite number of at least {LEAST_TEMPERATURE}: a policy that never varies finds nothing")
        for name, lr in (("actor_lr", actor_lr), ("critic_lr", critic_lr)):
            if lr != -1 and lr <= 0:
                raise ValueError(f"--{name} {lr} must be positive, or -1 for the default")
        cli.check_range(-1 << 31, (1 << 31) - 1, seed=seed)        # shifted, to be keys of 64 bits
        check_options(optimizer_precision, zero, {groups.default_dtype(dtype)}, activation_checkpointing, compile)
        if not (rule_weight or reward_function or reward_model_ckpt_dir and reward_model_weight):
            raise ValueError("no reward: give --reward_model_ckpt_dir, --reward_function or a --rule_weight")
        if keep_last == 0 or keep_last < -1:
            raise ValueError(f"--keep_last {keep_last}: use -1 to keep all saves, or at least 1")
        replayed = Rollout.load(replay) if replay else None
        buffer_size = len(replayed) if replayed else max_buffer_size
        minibatch_size = max(1, buffer_size // 4) if minibatch_size == -1 else minibatch_size
        if not 1 <= minibatch_size <= buffer_size:
            raise ValueError(f"--minibatch_size {minibatch_size} must be between 1 and " + (f"the {buffer_size} responses of {replay}" if replayed else f"--max_buffer_size {buffer_size}"))
        critic_ckpt_dir = store.find(critic_given) if critic_given else (reward_model_ckpt_dir or actor_ckpt_dir) if row.uses_critic else ""
        if critic_save_dir and not row.uses_critic:
            raise ValueError(f"{algorithm} has no critic: leave --critic_save_dir out, or use --algorithm ppo")
        critic_save_dir = critic_save_dir or os.path.join(actor_save_dir, "critic")
        if os.path.abspath(critic_save_dir) == os.path.abspath(actor_save_dir):
            raise ValueError(f"--critic_save_dir and --actor_save_dir are both {actor_save_dir}: their saves have the same names, so give two folders")
        check_tracker(tracker)
        companions = companions_folder(tokenizer_file) or actor_ckpt_dir
        tokenizer = load_tokenizer(tokenizer_file or actor_ckpt_dir, chat_format=chat_format)
        role_dirs = {"reward model": reward_model_ckpt_dir, "critic": critic_ckpt_dir}
        own = {}
        for role, path in role_dirs.items():
            try:
                own |= {role: load_tokenizer(path)} if path else {}
            except (FileNotFoundError, ValueError):
                if not tokenizer_file:
                    raise               # a folder without one, and no other named: nobody knows what its ids mean
        check_same_tokenizer(tokenizer, own, role_dirs)
        kind = get_task(task)
        rule, train_file = choose_rule(kind, rule), source_of(kind, "train_file", train_file, "TRAIN")
        lacking: list[str] = []
        problems = kind.load(train_file, None if rule_weight or not os.path.isfile(train_file) else lacking)
        if lacking and problems and reward_function:
            raise ValueError(f"{lacking[0]}. {len(problems)} other records have a label: a reward function gets the labels of all, or, where there are none, None")
        if lacking:     # the reward model or the function judges alone
            if problems:
                groups.log(f"note: {lacking[0]}. So no label is used, and there is no accuracy")
            problems, records = [], read_records(train_file)
        test_problems = kind.load(label_file) if label_file else []
        texts = [(f"{train_file}, record {p.id}", p.prompt) for p in problems] or [(where, prompt_of(record, where)) for _, where, record in located(records)]
        prompts = []
        for n, ((where, text), problem) in enumerate(zip(texts, problems or [None] * len(texts)), 1):
            with naming(where):
                tokens = encode_prompt(tokenizer, text, use_chat_template=use_chat_template, system_prompt=system_prompt)
            prompts.append(Prompt(n, text if isinstance(text, str) else str(text), tokens, problem))
        function = load_reward_function(reward_function) if reward_function else None
        if replayed and replayed.temperature != temperature:
            raise ValueError(f"--replay {replay}: it was drawn at temperature {replayed.temperature}, not {temperature}")
        if replayed and replayed.bootstrapped != bootstrap_truncated:
            raise ValueError(f"--replay {replay}: it was drawn with{'' if replayed.bootstrapped else 'out'} --bootstrap_truncated, which its scores and values "
                             f"follow: {'leave that flag out' if not replayed.bootstrapped else 'give that flag' if row.uses_critic else 'use --algorithm ppo, with that flag'}")
        if replayed and (row.uses_critic and replayed.values is None or kl_coef > 0 and replayed.ref_logprobs is None):
            raise ValueError(f"--replay {replay} lacks the {'critic' if row.uses_critic and replayed.values is None else 'reference'} that {algorithm} "
                             "needs here: it comes from a run without one. Use another --algorithm, or --kl_coef 0.")
    log_dir = log_dir or os.path.join(actor_save_dir, "log")
    save_dirs = [actor_save_dir, *((critic_save_dir,) if row.uses_critic else ())]
    for folder in [*save_dirs, log_dir]:
        store.check_writable(folder)
    store.claim(*save_dirs, log_dir)
    run = store.identity(cli.resolved, groups.default_dtype(dtype), invariants.fingerprint(prompts), actor=actor_ckpt_dir, critic=critic_ckpt_dir, reward=reward_model_ckpt_dir)
    starts, earlier = store.find_start(save_dirs, run, resume)
    start, state = earlier.get("step", 0), earlier.get("run", {})
    actor_start, critic_start = starts[0] or actor_ckpt_dir, starts[-1] or critic_ckpt_dir

    memory = PeakMemory()
    train_dtype = groups.default_dtype(dtype)
    roles = load_roles(actor_dir=actor_ckpt_dir, start_dir=actor_start, critic_dir=critic_ckpt_dir, critic_start_dir=critic_start,
                       reward_dir=reward_model_ckpt_dir if reward_model_weight else "", reward_weight=reward_model_weight,
                       needs_reference=kl_coef > 0, lora=lora, dtype=train_dtype, model_type=model_type,
                       seed=seed, keep_resident=keep_resident)
    actor, critic = roles.actor, roles.critic
    longest = min(m.config.max_seq_len for m in roles.all().values())
    with groups.together("checking the data against the models"):
        for name, model in roles.all().items():
            check_vocabulary(tokenizer, model, name)
        if replayed:
            known, last, most = min(m.config.vocab_size for m in roles.all().values()), max(map(max, replayed.tokens)), max(map(len, replayed.tokens))
            if last >= known or most > longest:
                raise ValueError(f"--replay {replay} was drawn by another model: it has {most} tokens in a row, of at most {longest} here, "
                                 f"and token {last}, of 0 to {known - 1} here. Give the model that drew it.")
        if max_seq_len > longest:
            raise ValueError(f"--max_seq_len {max_seq_len} is more than the models' {longest}")
        longest = longest if max_seq_len == -1 else max_seq_len
        fitting = [p for p in prompts if len(p.tokens) + max_new_tokens <= longest]
        n_prompts = max_buffer_size // num_samples_per_prompt
        if len(fitting) < n_prompts:
            raise ValueError(f"{train_file}: {len(fitting)} of {len(prompts)} prompts fit --max_seq_len {longest} with --max_new_tokens {max_new_tokens}; "
                             f"one buffer needs {n_prompts}. Lower --max_new_tokens or --max_buffer_size.")
        test_prompts = encode_problems(tokenizer, test_problems, label_file, longest, use_chat_template=use_chat_template, system_prompt=system_prompt)
    for trained in (actor, critic):
        if trained is not None:
            trained.recompute(activation_checkpointing)
            trained.sequence_parallel(sequence_parallel)
            if compile:
                trained.compile_elementwise()

    per_epoch = len(fitting) // n_prompts
    iterations = per_epoch * epochs if max_iterations == -1 else min(per_epoch * epochs, max_iterations)
    iterations = 1 if replay else iterations
    warmup = critic_warmup if critic_warmup != -1 else 2 if roles.critic_is_new else 0
    warmup = 0 if critic is None or replay else min(warmup, iterations - 1)
    steps_each = inner_epochs * math.ceil(buffer_size / minibatch_size)
    options: dict = dict(schedule=lr_schedule, weight_decay=weight_decay, max_grad_norm=max_grad_norm, eps=1e-5, precision=optimizer_precision, zero=zero,
                         skip_grad_norm_above=skip_grad_norm_above)

    def trainer_of(model, lr, default, n_iterations):
        steps = n_iterations * steps_each
        return Trainer(model, lr=lr if lr > 0 else default, total_steps=steps, warmup_steps=math.ceil(warmup_ratio * steps), **options)

    actor_trainer = trainer_of(actor, actor_lr, 1e-6 if lora is None else 2e-5, iterations - warmup)
    critic_trainer = trainer_of(critic, critic_lr, 5e-6 if lora is None else 1e-4, iterations) if critic is not None else None
    if start < iterations:      # else nothing is saved any more
        check_space({actor_save_dir: (actor, actor_trainer)} | ({critic_save_dir: (critic, critic_trainer)} if critic else {}))
    kl = KLController(kl_coef, chosen(kl_target), kl_horizon)
    moments, ema = RunningMoments(), Ema()
    best: dict = {"accuracy": -1.0, "step": -1}
    if start:
        load_training_state(actor_trainer, actor_start)
        if critic_trainer is not None:
            load_training_state(critic_trainer, critic_start)
        kl.load(state["kl"])
        moments.load(state["moments"])
        ema.load(state["ema"])
        best = state["best"]
    reward = Reward(roles.reward, reward_model_weight, kind, rule, rule_weight, function)
    drawing = RolloutSettings(num_samples_per_prompt, temperature, max_new_tokens, min_response_tokens, bad_score, bootstrap_truncated,
                              rollout_batch_size, max_cache_gb, cuda_graphs, seed)
    updating = UpdateSettings(inner_epochs, minibatch_size, max_batch_size, chosen(max_batch_tokens), temperature,
                              max_new_tokens, clip, clip if clip_high == -1 else clip_high, chosen(dual_clip),
                              chosen(value_clip), entropy_coef, kl_coef, chosen(target_kl), seed)

    run_log = RunLog(log_dir, total=iterations, unit="iteration", tracker=tracker)
    if start:
        run_log.resumed(start)
    run_log.write(f"{len(fitting)} prompts of {train_file}" + (f" ({len(prompts) - len(fitting)} too long, dropped)" if len(fitting) < len(prompts) else "")
                  + f"; {iterations} iterations" + (f" (--epochs {epochs} has no more)" if max_iterations > iterations and not replay else "")
                  + f" of {n_prompts} prompts x {num_samples_per_prompt} responses, {steps_each} optimizer steps each"
                  + (f", the actor's from iteration {warmup + 1} on (--critic_warmup)" if warmup else "") + f"; {algorithm}; "
                  f"{groups.tp_size()} tensor-parallel x {groups.dp_size()} data-parallel ranks, {train_dtype}\n"
                  f"actor: {actor_trainer.describe()}" + (f"\ncritic: {critic_trainer.describe()}" if critic_trainer else "")
                  + f"\nweights of {', '.join(roles.all())}: {roles.n_bytes() / 1e9:.2f} GB on this rank" + (f"\nresumed after iteration {start}" if start else ""))

    def evaluate_actor(step):
        with roles.using(actor):
            metrics = evaluate(actor, tokenizer, kind, test_problems, test_prompts, rule=rule, max_batch_size=eval_batch_size,
                               max_new_tokens=max_new_tokens, max_seq_len=longest, progress=False,
                               samples_file=os.path.join(run_log.log_dir, f"samples-{step}.jsonl"))
        run_log.write(f"after iteration {step}: {show(metrics)}")
        run_log.record("evaluation", step=step, **metrics)
        return metrics["accuracy"]

    def save(step):
        folders = list(map(os.path.abspath, save_dirs))
        run_state = {"kl": kl.state(), "moments": moments.state(), "ema": ema.state(), "best": best, "identity": run, "folders": folders}
        if critic is not None:
            with roles.using(critic, trainer=critic_trainer):
                save_model(critic, os.path.join(critic_save_dir, f"step-{step}"), companions=companions, trainer=critic_trainer, step=step,
                           run={"identity": run, "folders": folders})
        with roles.using(actor, trainer=actor_trainer):
            save_model(actor, os.path.join(actor_save_dir, f"step-{step}"), companions=companions, trainer=actor_trainer, step=step, run=run_state)
        remove_old()
        run_log.write(f"saved {os.path.join(actor_save_dir, f'step-{step}')}")

    def remove_old():
        for folder in save_dirs:
            store.keep_newest(folder, keep_last, {best["step"]})

    def evaluate_if_due(step):
        """After the save: a run that is killed here has lost nothing, and comes back to it. Whether one was due."""
        if not test_problems or step < iterations and (eval_steps < 1 or step % eval_steps):
            return False
        earlier = run_log.find("evaluation", step) if step == start else None
        accuracy = earlier["accuracy"] if earlier else evaluate_actor(step)
        if accuracy > best["accuracy"] and (step in (start, iterations) or save_steps > 0 and step % save_steps == 0):      # it was saved
            best.update(accuracy=accuracy, step=step)
            remove_old()
        return True

    trainers = {"actor": actor_trainer, **({"critic": critic_trainer} if critic_trainer else {})}
    invariants.start(roles.all(), trainers, tokenizer, fitting, step=start, max_seq_len=longest, chat=use_chat_template, temperature=temperature, doctor=doctor,
                     using=roles.using)
    interrupt = Interrupt()
    memory.start()
    if start:
        evaluated = evaluate_if_due(start)
    elif evaluated := bool(test_problems):
        evaluate_actor(0)
    if evaluated and start < iterations and interrupt.asked():
        interrupt.leave(run_log, saved=bool(start))
    for iteration in range(start, iterations):
        clock, step = Clock(), iteration + 1
        order = list(range(len(fitting)))
        random.Random(f"{seed}/prompts/{iteration // per_epoch}").shuffle(order)
        first = iteration % per_epoch * n_prompts
        if replayed is not None:
            rollout, generated = replayed, None
        else:
            rollout, generated = collect(roles, [fitting[i] for i in order[first:first + n_prompts]], tokenizer, reward, drawing,
                                         iteration=iteration, clock=clock)
        if save_rollouts and groups.is_main():
            rollout.save(os.path.join(log_dir, f"rollout-{step}.pt"))
        if normalize_scores:
            moments.update(rollout.scores[~rollout.bad])
            rollout.scores = ((rollout.scores - moments.mean) / moments.std).where(~rollout.bad, rollout.scores)
        k1 = None if rollout.ref_logprobs is None else kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1")
        made = make_advantages(algorithm, rollout.scores, rollout.logprobs * 0 if k1 is None else k1, rollout.mask,
                               settings=Settings(gamma, lam, kl.coefficient, whiten_rewards), values=rollout.values,
                               bootstrap=rollout.value_after if bootstrap_truncated else None, group_ids=rollout.group_ids)
        statistics = rollout_statistics(rollout, made, k1)
        if critic is not None and critic_trainer is not None:
            with clock("critic"), roles.using(critic, trainer=critic_trainer):
                statistics |= update_critic(critic_trainer, rollout, made, updating, iteration)
        if iteration >= warmup:
            with clock("actor"), roles.using(actor, trainer=actor_trainer):
                statistics |= update_actor(actor_trainer, rollout, made, row, updating, iteration)
        statistics |= {"kl_coef": kl.coefficient, "score_ema": ema.update(statistics["score"])}
        if k1 is not None and row.kl_in == "reward":
            kl.update(statistics["kl_sequence"], len(rollout))
        seconds = sum(clock.seconds.values())
        n_tokens = sum(rollout.response_lengths)
        run_log.record("iteration", step=step, **statistics, seconds=seconds, phases=clock.seconds, response_tokens=n_tokens,
                       prompt_tokens=sum(rollout.prompt_lengths), peak_memory_gb=peak_memory_gb(),
                       generated_per_second=generated.tokens_per_second if generated else None)
        run_log.advance(score=f"{statistics['score']:.3f}", tok_s=f"{n_tokens / seconds:.0f}")
        run_log.write(describe(step, iterations, statistics, clock.seconds, peak_memory_gb()))
        for warning in warnings(statistics, actor.dtype.itemsize == 4):
            run_log.write(f"warning: {warning}")
        examples = [{"prompt": tokenizer.decode(rollout.tokens[i][:rollout.prompt_lengths[i]]), "response": rollout.texts[i],
                     "score": float(rollout.scores[i]), "correct": rollout.correct[i]} for i in range(min(3, len(rollout)))]
        run_log.record("samples", step=step, samples=examples)
        if iteration == start:
            for example in examples:
                run_log.write(f"  score {example['score']:.3f}: {example['prompt']!r} -> {example['response']!r}")
        last = step == iterations
        if check_steps > 0 and step % check_steps == 0:
            invariants.running(roles.all(), trainers, step=step, grad_norm=statistics.get("actor_grad_norm"), texts=rollout.tokens)
        asked = not last and interrupt.asked()
        if saved := last or asked or save_steps > 0 and step % save_steps == 0:
            save(step)
        if asked:
            interrupt.leave(run_log)
        if evaluate_if_due(step) and not last and interrupt.asked():
            if not saved:
                save(step)
            interrupt.leave(run_log)
    if start < iterations:      # else nothing was done
        report_memory(run_log, memory, lambda: plan_ppo(cli.resolved, models=roles.all(), prompts=[len(p.tokens) for p in fitting],
                                                        tested=[len(prompt) for prompt in test_prompts]))
    run_log.close(report=write_report)
    groups.shutdown()


def describe(step, iterations, s, seconds, memory_gb):
    """One iteration in one line."""
    parts = [f"iteration {step}/{iterations}", f"score {s['score']:.3f}"]
    if "accuracy" in s:
        parts.append(f"accuracy {s['accuracy']:.1%}")
    if "kl_sequence" in s:
        parts.append(f"KL {s['kl_sequence']:.2f}")
    parts += [f"entropy {s['entropy']:.3f}", f"length {s['response_length']:.0f} ({s['finished_share']:.0%} finished)"]
    if "clipfrac" in s:
        parts.append(f"clipped {s['clipfrac']:.1%}")
    if "explained_variance" in s:
        parts.append(f"explained variance {s['explained_variance']:.2f}")
    phases = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    return "  ".join(parts) + f"  {sum(seconds.values()):.1f} s ({phases})  {memory_gb:.2f} GB"


if __name__ == "__main__":
    run(main)
