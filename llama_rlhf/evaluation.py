"""Answer a task's problems with a policy, score the answers, and choose among them with a verifier: what is behind solver_evaluate.py."""

from __future__ import annotations

import itertools
import json
import math
import os
import time

import torch

from llama_rlhf.api import LanguageModel, respond
from llama_rlhf.checkpoint.formats import CheckpointError, read_json
from llama_rlhf.data import encode_prompt, encode_response, pack
from llama_rlhf.generation import Statistics
from llama_rlhf.models.transformer import CausalLM, ValueModel
from llama_rlhf.parallel import groups
from llama_rlhf.records import naming, read_records
from llama_rlhf.reward import pairs_by_label, probability, score_together, show_verifier, verifier_metrics
from llama_rlhf.runlog import progress_line
from llama_rlhf.scoring import pass_at_k, selection, wilson_interval
from llama_rlhf.tasks import running
from llama_rlhf.trainer import response_logprobs


def encode_problems(tokenizer, problems, label_file: str, max_seq_len: int, **prompt_options) -> list[list[int]]:
    """Prompt ids of every problem; ValueError naming the record whose prompt leaves no room for an answer."""
    prompts = []
    for problem in problems:
        with naming(f"{label_file}, record {problem.id}"):
            ids = encode_prompt(tokenizer, problem.prompt, **prompt_options)
        if len(ids) >= max_seq_len:
            raise ValueError(f"{label_file}, record {problem.id}: the prompt has {len(ids)} tokens, max_seq_len is {max_seq_len}. "
                             "Raise --max_seq_len (the model allows up to its own length), or shorten or remove the record.")
        prompts.append(ids)
    return prompts


def evaluate(model: CausalLM, tokenizer, task, problems, prompts: list[list[int]], *, rule: str, samples_file: str, **generation) -> dict:
    """Collective. Answer every problem, write one json line per answer, return the metrics: see `answer` and `summarize`."""
    rows, speed = answer(model, tokenizer, task, problems, prompts, rule=rule, **generation)
    write_samples(samples_file, rows)
    return {**summarize(rows, rule), **speed}


def answer(model: CausalLM, tokenizer, task, problems, prompts: list[list[int]], *, rule: str, max_batch_size: int, max_new_tokens: int,
           max_seq_len: int, n_samples: int = 1, progress: bool = True, **options) -> tuple[list[dict], dict]:
    """Collective. Generate for every problem and score by the task's rules: one row per answer, and what it took.

    task: see llama_rlhf/tasks. A row's "points" are what a reward would be made of, "correct" is whether the answer is right.
    options: of sampling, stop strings, bounds: see api.generate.

    Data-parallel replicas share the problems. Every rank returns the same.
    """
    bar = None
    if progress and groups.is_main():
        bar = progress_line(len(problems) * n_samples // groups.dp_size(), "answer")

    statistics = Statistics()

    def on_step(done, total):
        if bar is not None and done != bar.n:
            bar.total = total
            bar.set_postfix(tok_s=f"{statistics.new_tokens / (time.perf_counter() - started):.0f}", refresh=False)
            bar.update(done - bar.n)

    mine = range(groups.dp_rank(), len(problems), groups.dp_size())
    started = time.perf_counter()
    responses = respond(LanguageModel(model, tokenizer), [prompts[i] for i in mine], max_new_tokens=max_new_tokens, max_batch_size=max_batch_size,
                        max_seq_len=max_seq_len, n_samples=n_samples, on_step=on_step, statistics=statistics, request_ids=list(mine), **options)
    rows = []
    for i, samples in zip(mine, responses):
        for response in samples:
            with running(f"the task's score failed for problem {problems[i].id}"):
                score = task.score(problems[i], response.text, response.finished, rule=rule)
            rows.append({"id": problems[i].id, "sample": response.sample, "prompt": problems[i].prompt, "response": response.text,
                         "answer": score["answer"], "label": problems[i].label, "correct": score["correct"][rule], "points": score["score"],
                         "finished": response.finished, "n_tokens": len(response.tokens), "answers": score["answers"],
                         "correct_by_rule": score["correct"]})
    gathered = groups.gather_objects((rows if groups.tp_rank() == 0 else [], statistics if groups.tp_rank() == 0 else None))
    seconds = time.perf_counter() - started
    if bar is not None:
        bar.close()
    rows = sorted((row for part, _ in gathered for row in part), key=lambda row: (row["id"], row["sample"]))
    per_replica = [s for _, s in gathered if s is not None]
    return rows, {"new_tokens": sum(s.new_tokens for s in per_replica),
                  "prompt_tokens": sum(s.prompt_tokens for s in per_replica), "seconds": round(seconds, 2),
                  "tokens_per_second": round(sum(s.new_tokens for s in per_replica) / seconds, 1),
                  "rows_at_once": per_replica[0].slots, "cache_mb": round(per_replica[0].cache_bytes / 1e6, 1)}


def write_samples(path: str, rows: list[dict]) -> None:
    """Collective. One json line per answer."""
    with groups.together(f"writing {path}"):
        if groups.is_main():
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            with open(path + ".part", "w") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            os.replace(path + ".part", path)


# what answers depend on
_ASKED = ("task", "label_file", "limit", "num_samples_per_prompt", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "max_new_tokens", "max_seq_len", "dtype",
          "use_chat_template", "system_prompt", "chat_format", "tokenizer_file", "samples_file")


def make_way(log_dir: str, arguments: dict, checkpoint: str) -> None:
    """Collective. The evaluation in log_dir goes, or, if it asked for other answers, aside: to a folder earlier-N in it."""
    with groups.together(f"making way in {log_dir}"):
        paths = [path for name in ("metrics.json", "samples.jsonl", "report.html") if os.path.exists(path := os.path.join(log_dir, name))]
        if not groups.is_main() or not os.path.exists(os.path.join(log_dir, "metrics.json")):
            return
        try:
            before = read_json(os.path.join(log_dir, "metrics.json"))
        except CheckpointError:         # damaged: no reason to lose answers that are there now
            before = {}
        asked = before.get("arguments", {})
        changed = [f"--{key} {asked.get(key)}" for key in _ASKED if asked.get(key) != arguments.get(key)]
        if before.get("checkpoint", checkpoint) != checkpoint:
            changed.append(f"checkpoint {before['checkpoint']}")
        samples, given = os.path.join(log_dir, "samples.jsonl"), arguments["samples_file"]
        if not changed or given and os.path.exists(samples) and os.path.samefile(samples, given):      # these are what gets scores now
            os.remove(os.path.join(log_dir, "metrics.json"))        # never beside the samples of another run
            return
        folder = next(path for n in itertools.count(1) if not os.path.exists(path := os.path.join(log_dir, f"earlier-{n}")))
        os.makedirs(folder)
        for path in paths:
            os.rename(path, os.path.join(folder, os.path.basename(path)))
        groups.log(f"note: {log_dir} held another evaluation ({', '.join(changed)}); it is in {folder} now")


def read_samples(path: str, rule: str) -> list[dict]:
    """The rows of a samples.jsonl, with answers as `rule` reads them. ValueError if it is something else."""
    rows = read_records(path)
    needed, prompts = ("id", "sample", "prompt", "response", "finished", "n_tokens", "answers", "correct_by_rule"), {}
    for number, row in enumerate(rows, 1):
        if missing := [name for name in needed if name not in row]:
            raise ValueError(f'{rows.where(number)}: missing "{missing[0]}" (keys: {", ".join(row)}). '
                             "Give a samples.jsonl that solver_evaluate.py has written.")
        if rule not in row["answers"]:
            raise ValueError(f"--rule {rule!r}: {path} has the answers by {', '.join(row['answers'])}; give the --task and --rule they were made with")
        if prompts.setdefault(row["id"], row["prompt"]) != row["prompt"]:
            raise ValueError(f"{rows.where(number)}: problem {row['id']} has another prompt than above: these are answers to two files of problems. "
                             "Give those to one at a time.")
        row |= {"answer": row["answers"][rule], "correct": row["correct_by_rule"][rule]}
    return sorted(rows, key=lambda row: (row["id"], row["sample"]))


def same_number(rows: list[dict]) -> list[dict]:
    """The first k answers to each problem, k the fewest that one has: files that were cut or joined hold more to some, and votes and best-of-k are of k."""
    of: dict = {}
    for row in rows:
        of.setdefault(row["id"], []).append(row)
    k = min(map(len, of.values()))
    return [row for answers in of.values() for row in answers[:k]]


def score_samples(model: ValueModel, tokenizer, rows: list[dict], **prompt_options) -> None:
    """Collective. Put a verifier's raw score into every row, and "weight", the probability that it gives the answer."""
    sequences, prompt_lengths, prompts = [], [], {}
    with groups.together("encoding the samples for the verifier"):
        for row in rows:
            if row["id"] not in prompts:
                prompts[row["id"]] = encode_prompt(tokenizer, row["prompt"], **prompt_options)
            ids = prompts[row["id"]]
            if len(ids) >= model.config.max_seq_len:
                raise ValueError(f"problem {row['id']}: the prompt has {len(ids)} tokens, the verifier takes up to {model.config.max_seq_len} in all")
            sequences.append(encode_response(tokenizer, ids, row["response"], row["finished"], model.config.max_seq_len)[0])
            prompt_lengths.append(len(ids))
    assert model.score is not None      # see reward.check_reward_model
    # an unfinished answer without text is no answer: below all others
    some = [i for i, ids in enumerate(sequences) if len(ids) > prompt_lengths[i]]
    raw = score_together(model, [sequences[i] for i in some], [prompt_lengths[i] for i in some])
    floor = min(raw, default=0.0) - 1.0
    for row in rows:
        row |= {"score": floor, "weight": 0.0}
    for i, score, weight in zip(some, raw, probability(model.score, torch.tensor(raw, dtype=torch.float64)).tolist()):
        rows[i] |= {"score": score, "weight": weight}


def select(rows: list[dict], score: dict) -> dict:
    """What a verifier's scores are worth in choosing among the answers to a problem: scoring.selection and reward.verifier_metrics.

    score: of the verifier's manifest.
    """
    problems = {}
    for row in rows:
        problems.setdefault(row["id"], []).append(row)
    metrics, _ = selection(list(problems.values()))
    ids, labels = [row["id"] for row in rows], [int(row["correct"]) for row in rows]
    pairs = pairs_by_label(ids, labels)
    return metrics | {"verifier": verifier_metrics([row["score"] for row in rows], [row["n_tokens"] for row in rows], ids, score, pairs, labels)}


def show_selection(metrics: dict) -> str:
    """The metrics of `select` in a few lines for people."""
    rate = lambda value: f"{value['accuracy']:6.1%}  {value['interval'][0]:.1%} to {value['interval'][1]:.1%}"  # noqa: E731
    lines = [f"choosing among {metrics['n_samples']} answers to each of {metrics['n_problems']} problems (95 % intervals)"]
    lines += [f"  {way.replace('best of n', 'best of ' + str(metrics['n_samples'])):14}{rate(value)}" for way, value in metrics["ways"].items()]
    lines += ["     k  best of k                 pass@k"]
    lines += [f"{k:>6}  {rate(value['best']):26}{rate(value['pass'])}" for k, value in metrics["by_k"].items()]
    lines += [f"{name}: {pair['gained']} became right, {pair['lost']} became wrong of {pair['n']}, McNemar p = {pair['p']:.2g}"
              for name, pair in metrics["paired"].items()]
    lines.append(f"the verifier on these answers: {show_verifier(metrics['verifier'])}")
    return "\n".join(lines)


@torch.no_grad()
def reference_loss(model: CausalLM, tokenizer, problems, prompts: list[list[int]], max_seq_len: int, *, max_tokens: int = 4096) -> dict:
    """Collective. Mean loss (nats per token, end token included) and perplexity of the reference solutions given their prompts.

    exp(total loss / total tokens) over all problems and replicas; solutions are cut at max_seq_len, problems without one left out. {} where none has one.
    """
    mine = [i for i in range(groups.dp_rank(), len(problems), groups.dp_size()) if problems[i].solution]
    rows = [encode_response(tokenizer, prompts[i], problems[i].solution, True, max_seq_len)[0] for i in mine]
    loss, n_tokens = 0.0, 0
    for places in pack(range(len(rows)), [len(row) for row in rows], max_tokens=max_tokens):
        logprobs = response_logprobs(model, [rows[n] for n in places], [len(prompts[mine[n]]) for n in places])
        loss, n_tokens = loss - float(logprobs.sum(dtype=torch.float64)), n_tokens + len(logprobs)
    parts = [part for part, tp_rank in groups.gather_objects(((loss, n_tokens), groups.tp_rank())) if tp_rank == 0]
    loss, n_tokens = sum(part[0] for part in parts), sum(part[1] for part in parts)
    if not n_tokens:
        groups.log("note: --perplexity: no problem has a reference solution, so there is nothing to measure")
        return {}
    mean = loss / n_tokens
    return {"reference_loss": mean, "reference_perplexity": math.exp(min(mean, 700.0)), "reference_tokens": n_tokens}


def summarize(rows: list[dict], rule: str) -> dict:
    """Accuracy = correct / all answers, with its Wilson interval, under every rule; shares and lengths. At least one row.

    Several answers to one problem are not independent: the interval is that of as many trials as there are problems.
    """
    n, right = len(rows), sum(row["correct"] for row in rows)
    n_problems = len({row["id"] for row in rows})
    interval = lambda hits: list(wilson_interval(hits * n_problems / n, n_problems))  # noqa: E731
    rules = {}
    for name in rows[0]["correct_by_rule"]:
        hits = sum(row["correct_by_rule"][name] for row in rows)
        rules[name] = {"accuracy": hits / n, "correct": hits, "interval": interval(hits)}
    groups_of = {}
    for row in rows:
        groups_of.setdefault(row["id"], []).append(row["correct"])
    sizes = {len(group) for group in groups_of.values()}
    passes = {}
    if len(sizes) == 1 and (k_max := sizes.pop()) > 1:
        for k in sorted({1, *(2 ** i for i in range(1, 12) if 2 ** i <= k_max), k_max}):
            passes[str(k)] = sum(pass_at_k(k_max, sum(group), k) for group in groups_of.values()) / len(groups_of)
    return {"rule": rule, "accuracy": right / n, "interval": interval(right), "correct": right, "n": n, "n_problems": n_problems, "rules": rules,
            "finished_share": sum(row["finished"] for row in rows) / n,
            "mean_tokens": sum(row["n_tokens"] for row in rows) / n, **({"pass_at_k": passes} if passes else {}),
            **({"mean_points": sum(points) / n} if (points := [row.get("points", row["correct"]) for row in rows]) != [row["correct"] for row in rows] else {})}


def show(metrics: dict) -> str:
    """The metrics in a few lines for people."""
    low, high = metrics["interval"]
    lines = [f"accuracy {metrics['accuracy']:.1%} ({metrics['correct']}/{metrics['n']}), 95 % interval {low:.1%} to {high:.1%}, "
             f"rule {metrics['rule']}",
             "by rule: " + ", ".join(f"{name} {value['accuracy']:.1%}" for name, value in metrics["rules"].items()),
             f"finished {metrics['finished_share']:.1%}, {metrics['mean_tokens']:.0f} tokens per answer"
             + (f", {metrics['tokens_per_second']} tokens/s, {metrics['seconds']} s" if "seconds" in metrics else "")]
    if "mean_points" in metrics:
        lines.append(f"points {metrics['mean_points']:.3f} on average: the task gives parts of one for answers that are nearly right")
    if "reference_loss" in metrics:
        lines.append(f"reference solutions: loss {metrics['reference_loss']:.4f}, perplexity {metrics['reference_perplexity']:.3f} "
                     f"over {metrics['reference_tokens']} tokens")
    if "pass_at_k" in metrics:
        lines.append("pass@k: " + ", ".join(f"{k}: {value:.1%}" for k, value in metrics["pass_at_k"].items()))
    return "\n".join(lines)
