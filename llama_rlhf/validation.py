"""What a training run would see in its data files, and what is wrong with them: behind --validate of the training scripts.

Reads files, task and tokenizer through the functions that training uses, and no weights. Ends the process: exit code 1 if something
is wrong, 0 if not. Notes (truncated answers, duplicates within a file) are no faults.
"""

import itertools
import os
import sys

from llama_rlhf.data import DataReport, JudgedReport, encode_prompt, judged_problems, sft_examples, show_example, show_judged, verifier_examples
from llama_rlhf.records import is_empty, located, naming, prompt_of, read_records, turns_of
from llama_rlhf.reward import choose_loss
from llama_rlhf.tasks import at_home, get_task, gsm8k, source_of

SHOWN = 20      # faults printed
ANY_LENGTH = 1 << 62


class Validation:
    """Collects faults and notes; `finish` prints them.  ckpt_dir: for the tokenizer and the model's length."""

    def __init__(self, ckpt_dir, *, tokenizer_file="", chat_format=None, model_type="", max_seq_len=-1, **prompt_options):
        from llama_rlhf.checkpoint.formats import open_checkpoint
        from llama_rlhf.checkpoint.shards import inspect
        from llama_rlhf.checkpoint.store import find
        from llama_rlhf.tokenizer import load_tokenizer

        self.faults, self.notes, self.text = [], [], []
        ckpt_dir = find(ckpt_dir)
        self.tokenizer, self.options = load_tokenizer(tokenizer_file or ckpt_dir, chat_format=chat_format), prompt_options
        with open_checkpoint(ckpt_dir) as checkpoint:
            longest = inspect(checkpoint, model_type).config.max_seq_len
        if max_seq_len > longest:
            self.faults.append(f"--max_seq_len {max_seq_len} is more than the model's {longest}")
        self.max_seq_len = longest if max_seq_len == -1 else max_seq_len

    def answers(self, train_file, label_file, task):
        """Of solver_train.py."""
        kind = get_task(task)
        train_file = source_of(kind, "train_file", train_file, "TRAIN")
        records = kind.records(train_file) if hasattr(kind, "records") else read_records(train_file, self.faults)
        report = DataReport()
        examples = sft_examples(records, self.tokenizer, max_seq_len=ANY_LENGTH, report=report, faults=self.faults, **self.options)
        self._lengths(train_file, "prompt and answer", [(e.id, len(e.tokens), e.prompt_len) for e in examples])
        prompts = self._answers(records, kind)
        self._against(prompts, kind, train_file, label_file)
        if examples:
            self.text.append(f"the first example, the trained part in brackets: {show_example(examples[0], self.tokenizer)}")
        self.finish(f"{len(records)} records, {len(examples)} examples")

    def judged(self, train_file, label_file, loss, seed):
        """Of verifier_train.py."""
        prompts, chosen = [], loss
        for file in map(at_home, filter(None, (train_file, label_file))):
            records = read_records(file, self.faults)
            try:
                kind, problems = judged_problems(records, seed=seed, faults=self.faults) if records else ("none", [])
            except ValueError as error:         # of the first record: it decides how the others are read
                self.faults.append(str(error))
                continue
            if chosen == "auto":        # the training data decide
                chosen = choose_loss(loss, kind, file)
            for problem in problems:
                if is_empty(problem.prompt):
                    self.faults.append(f"{problem.where}: the prompt is empty")
                if any(finished and not text.strip() for text, finished in problem.responses):
                    self.faults.append(f"{problem.where}: a response is empty")
            if chosen != "pairwise" and kind in ("pairs", "ranking"):
                self.faults.append(f"{file}: --loss {chosen} needs responses labelled right or wrong, these are compared ({kind})")
                continue
            report = JudgedReport()
            examples = verifier_examples(problems, self.tokenizer, loss=chosen, max_seq_len=ANY_LENGTH, report=report, **self.options)
            self._lengths(file, "prompt and response", [(e.id, len(row), e.prompt_len) for e in examples for row in e.responses])
            self.notes.append(f"{file}: {kind}, loss {chosen}: {report}")
            if not prompts and examples:
                self.text.append(f"the first example, the judged part in brackets:\n{show_judged(examples[0], self.tokenizer)}")
            if prompts:
                self._overlap({key: where for key, where in prompts}, [(p.where, p.prompt) for p in problems], train_file, file)
            prompts += [(_key(p.prompt), p.where) for p in problems]
        self.finish(f"{len(prompts)} problems")

    def prompts(self, train_file, label_file, task, max_new_tokens, needs_rule):
        """Of ppo_train.py."""
        kind = get_task(task)
        train_file = source_of(kind, "train_file", train_file, "TRAIN")
        if needs_rule or not os.path.isfile(train_file):
            problems = self._problems(kind, train_file)
        else:
            problems = []
            for _, where, record in located(read_records(train_file, self.faults)):
                with naming(where, self.faults):
                    problems.append((where, prompt_of(record, where)))
        rows = []
        for n, (where, prompt) in enumerate(problems, 1):
            with naming(where, self.faults):
                length = len(encode_prompt(self.tokenizer, prompt, **self.options))
                rows.append((str(n), length, length))
            if is_empty(prompt):
                self.faults.append(f"{where}: the prompt is empty")
        self._lengths(train_file, "prompt", rows, max_new_tokens)
        self._against({_key(prompt): where for where, prompt in problems}, kind, train_file, label_file)
        if rows and not self.faults:
            first = encode_prompt(self.tokenizer, problems[0][1], **self.options)
            self.text.append(f"the first prompt:\n{self.tokenizer.decode(first, skip_special=False)}")
        self.finish(f"{len(problems)} prompts")

    def _problems(self, kind, source):
        """[(where, prompt)]; faults are collected."""
        try:
            problems = kind.load(source, self.faults)
        except ValueError as error:
            self.faults.append(str(error))
            return []
        return [(f"{source}, record {problem.id}", problem.prompt) for problem in problems]

    def _answers(self, records, kind):
        """Empty fields, missing `####`, duplicates; returns {key of a prompt: where it stands}."""
        prompts, seen, repeated, bare, hashed = {}, {}, 0, [], 0
        for _, where, record in located(records):
            try:
                turns = turns_of(record, where)
            except ValueError:      # sft_examples has said so
                continue
            prompts.setdefault(_key(turns[0][0]), where)
            for prompt, answer in turns:
                if is_empty(prompt) or not answer.strip():
                    self.faults.append(f"{where}: the {'prompt' if is_empty(prompt) else 'answer'} is empty")
                elif "####" in answer:
                    hashed += 1
                    if kind is gsm8k:
                        with naming(where, self.faults):
                            gsm8k.read_label(answer)
                else:
                    bare.append(f'{where}: the answer has no line "#### number", which {hashed} others have')
                repeated += seen.setdefault((repr(prompt), answer), where) != where
        if kind is gsm8k and hashed:
            self.faults += bare
        elif kind is gsm8k and bare:
            self.notes.append('no answer has a line "#### number": these are no GSM8K solutions, and were not checked as such')
        if repeated:
            self.notes.append(f"{repeated} examples stand there more than once, prompt and answer alike")
        return prompts

    def _against(self, prompts, kind, train_file, label_file):
        """prompts: of the training data, {key: where}, compared with the test problems if there are any."""
        if label_file:
            self._overlap(prompts, self._problems(kind, label_file), train_file, label_file)
        else:
            self.notes.append("no --label_file: not compared with test problems")

    def _overlap(self, prompts, others, train_file, label_file):
        self.faults += [f"{where}: the prompt is also in the training data, {prompts[_key(prompt)]}" for where, prompt in others if _key(prompt) in prompts]
        self.notes.append(f"{label_file}: {len(others)} problems, compared with the prompts of {train_file}")

    def _lengths(self, file, what, rows, max_new_tokens=0):
        """rows: (id, tokens in all, tokens of the prompt).  max_new_tokens: for which prompts must leave room; 0: for one at least."""
        if not rows:
            self.faults.append(f"{file}: no usable record")
            return
        room = self.max_seq_len - max(1, max_new_tokens)
        dropped = [id for id, _, prompt in rows if prompt > room]
        cut = [id for id, n, prompt in rows if n > self.max_seq_len and prompt <= room]
        lengths = sorted(n for _, n, _ in rows)
        at = lambda share: lengths[min(len(lengths) - 1, int(share * len(lengths)))]  # noqa: E731
        self.text += [f"{file}: tokens of {what}: median {at(.5)}, 95 % up to {at(.95)}, longest {lengths[-1]}, {sum(lengths)} in all", *histogram(lengths)]
        limit = f"--max_seq_len {self.max_seq_len}" + (f" less --max_new_tokens {max_new_tokens}" if max_new_tokens else "")
        self.text.append(f"with {limit}: " + ("" if max_new_tokens else f"{len(cut)} cut at the end of the answer{_some(cut)}; ")
                         + f"{len(dropped)} dropped, their prompts are too long{_some(dropped)}")
        if len(dropped) == len(rows):
            self.faults.append(f"{file}: no record fits {limit}")

    def finish(self, counts):
        """Print and leave."""
        from llama_rlhf.cli import _rank

        if _rank() == 0:
            for line in [*self.text, *(f"note: {note}" for note in self.notes), *(f"wrong: {fault}" for fault in self.faults[:SHOWN])]:
                print(line)
            if len(self.faults) > SHOWN:
                print(f"... and {len(self.faults) - SHOWN} more")
            print(f"{counts}: {len(self.faults)} faults")
        sys.exit(1 if self.faults else 0)


def histogram(lengths, n_bars=10):
    """Lines of a histogram of sorted whole numbers."""
    step = max(1, -(-(lengths[-1] + 1 - lengths[0]) // n_bars))
    groups = {place: len(list(members)) for place, members in itertools.groupby(lengths, lambda n: (n - lengths[0]) // step)}
    most, width = max(groups.values()), len(str(lengths[-1]))
    bars = [(lengths[0] + place * step, groups.get(place, 0)) for place in range(max(groups) + 1)]
    return [f"  {low:{width}} to {low + step - 1:{width}}  {count:7}  {'#' * -(-40 * count // most)}" for low, count in bars]


def _key(prompt):
    """Equal for prompts that differ in case and spaces, or in what a system turn says before them, only."""
    turns = [] if isinstance(prompt, str) else [turn for turn in prompt if turn["role"] != "system"]
    text = prompt if isinstance(prompt, str) else turns[0]["content"] if len(turns) == 1 else repr(turns)
    return " ".join(text.casefold().split())


def _some(ids):
    return f" (records {', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''})" if ids else ""
