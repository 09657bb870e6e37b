"""Tokenised examples out of records, and the order in which training sees them.

    records = read_records("dataset/GSM8K/train.json")
    report = DataReport()
    examples = sft_examples(records, tokenizer, max_seq_len=512, report=report)
    for indices in batches(examples, max_batch_size=8, seed=0, epoch=0):
        rows = [examples[i] for i in indices]

For a verifier, responses that somebody judged:

    kind, problems = judged_problems(records)
    train, held_out = split_problems(problems, 0.05)
    examples = verifier_examples(train, tokenizer, loss="pairwise", max_seq_len=512)

Plain Python: nothing here needs torch.
"""

import json
import math
import random
import re
from dataclasses import dataclass, field

from llama_rlhf.records import SCHEMAS, answers_of, keys_of, located, naming, preference_of, prompt_of, text_field, texts_field, turns_of, type_name
from llama_rlhf.tokenizer import GrowingText

# -- examples ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """tokens[prompt_len:] are trained on; prompt_len is at least 1, so each of them has something before it."""

    tokens: list[int]
    prompt_len: int
    id: str  # record number from 1, as "17", or "17.2" for the second of its answers or turns


@dataclass
class DataReport:
    rows: int = 0  # examples kept
    truncated: int = 0  # kept, with the end of the answer cut off
    dropped: int = 0  # no room for any answer token
    long_prompts: list[str] = field(default_factory=list)  # the ids of the dropped ones
    tokens: int = 0
    response_tokens: int = 0  # those the loss is taken over

    def __str__(self):
        text = f"{self.rows} rows, {self.tokens} tokens, {self.response_tokens} trained on; {self.truncated} truncated"
        if not self.dropped:
            return text + ", 0 dropped"
        shown = ", ".join(self.long_prompts[:5]) + (", ..." if self.dropped > 5 else "")
        return f"{text}, {self.dropped} dropped because the prompt alone fills max_seq_len (records {shown})"


def encode_prompt(tokenizer, prompt, *, use_chat_template=False, system_prompt=None):
    """Token ids of a prompt, exactly as training, evaluation and rollout all have to see it.

    prompt: text, or a list of chat messages. Without the chat template the text and a newline follow the BOS token (where the
    tokenizer has one), and a system prompt stands on a line before them; messages' own system turn goes before system_prompt.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not messages:
        raise ValueError("a chat prompt needs at least one message")
    if wrong := [message for message in messages if not isinstance(message, dict) or "role" not in message or "content" not in message and not use_chat_template]:
        raise ValueError(f"a message of a conversation is {{\"role\": ..., \"content\": ...}}, not {wrong[0]!r:.100}")
    if system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    if use_chat_template:
        return tokenizer.chat(messages)
    if [message["role"] for message in messages] not in (["user"], ["system", "user"]):
        raise ValueError("a conversation of several turns can only be encoded with the chat template: add --use_chat_template")
    return tokenizer.encode("".join(f"{message['content']}\n" for message in messages), bos=True)


def encode_response(tokenizer, prompt_ids, text, finished, max_seq_len):
    """(token ids of prompt and response, whether the end was cut off). Only a finished response ends with the eos."""
    tokens = prompt_ids + tokenizer.encode(text, eos=finished)
    return tokens[:max_seq_len], len(tokens) > max_seq_len


def sft_examples(
    records, tokenizer, *, max_seq_len, use_chat_template=False, train_on_prompt=False, system_prompt=None, report=None, faults=None
):  # fmt: skip
    """One Example per answer of each record, and per assistant turn of a conversation; `report`, a DataReport, is filled in.

    Prompt and answer are tokenised apart, so no token spans their boundary: at generation the prompt ends there
    too. Too long rows lose the end of the answer (and with it the eos), never a part of the prompt.
    faults: a list for what is wrong with records, which are then left out, instead of a ValueError.
    """
    report = DataReport() if report is None else report
    options = dict(use_chat_template=use_chat_template, system_prompt=system_prompt)
    examples = []
    for number, where, record in located(records):
        turns = []
        with naming(where, faults):
            turns = [(encode_prompt(tokenizer, prompt, **options), answer) for prompt, answer in turns_of(record, where)]
        for n, (prompt_ids, answer) in enumerate(turns, 1):
            id = f"{number}.{n}" if len(turns) > 1 else str(number)
            if len(prompt_ids) >= max_seq_len:
                report.dropped += 1
                report.long_prompts.append(id)
                continue
            tokens, cut = encode_response(tokenizer, prompt_ids, answer, True, max_seq_len)
            report.truncated += cut
            # The first token of all has nothing to be predicted from, so it is never trained on.
            example = Example(tokens, 1 if train_on_prompt else len(prompt_ids), id)
            examples.append(example)
            report.rows += 1
            report.tokens += len(tokens)
            report.response_tokens += len(tokens) - example.prompt_len
    return examples


def show_example(example, tokenizer):
    """The example as text with its control tokens, the trained part between ⟦ and ⟧."""
    prompt = tokenizer.decode(example.tokens[: example.prompt_len], skip_special=False)
    trained = tokenizer.decode(example.tokens[example.prompt_len :], skip_special=False)
    counts = f"{len(example.tokens)} tokens, {len(example.tokens) - example.prompt_len} trained on"
    return f"record {example.id} ({counts}):\n{prompt}⟦{trained}⟧"


# -- judged responses, for verifiers ----------------------------------------------------------------------------

JUDGED = {  # kind -> what its records hold
    "pairs": '{"instruction", "chosen", "rejected"}',
    "ranking": '{"instruction", "responses": [best first]} or {"instruction", "responses": [...], "scores": [...]}',
    "labels": '{"instruction", "output", "label": 0 or 1} or samples.jsonl of solver_evaluate.py, with its "correct"',
    "solutions": '{"instruction", "output"}',
}


@dataclass
class JudgedProblem:
    """Responses to one prompt, each once, and what is known of them.

    responses: (text, finished); only a finished one is followed by the end token
    labels: 1 right, 0 wrong, None where only comparisons are known
    pairs: (better, worse) -> margin or None, by places in `responses`
    """

    prompt: str | list
    where: str  # "train.json, record 17": the first with this prompt
    id: str
    responses: list[tuple[str, bool]] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    pairs: dict[tuple[int, int], float | None] = field(default_factory=dict)
    duplicates: int = 0  # labelled responses that were there already
    places: dict = field(default_factory=dict, repr=False)

    def place(self, text, finished=True, label=None):
        """Where this response stands among the others; it is appended if it is new."""
        key = text, finished, label
        if key not in self.places:
            self.places[key] = len(self.responses)
            self.responses.append((text, finished))
            self.labels.append(label)
        return self.places[key]

    def compare(self, better, worse, margin=None):
        if better != worse:
            self.pairs[better, worse] = margin

    def all_pairs(self):
        """The pairs that were given, or each right response against each wrong one."""
        right, wrong = ([i for i, label in enumerate(self.labels) if label == value] for value in (1, 0))
        return [(*pair, margin) for pair, margin in self.pairs.items()] or [(i, j, None) for i in right for j in wrong]


def judged_problems(records, *, seed=0, faults=None):
    """(kind, problems): what the records say about responses, those to the same prompt together.

    The kind is a key of JUDGED. The first record's fields tell it and the others must follow. Of "solutions", which are
    all right, one wrong twin each is made by `corrupt_numbers`; a solution without a number in it gets none.
    faults: a list for what is wrong with records, which are then left out, instead of a ValueError.
    """
    kind = _judged_kind(records[0], next(located(records))[1])
    add = {"pairs": _add_pairs, "ranking": _add_ranking, "labels": _add_labelled, "solutions": _add_solutions}[kind]
    problems = {}
    for number, where, record in located(records):
        with naming(where, faults):
            if _judged_kind(record, where) != kind:
                raise ValueError(f"{where}: expected {JUDGED[kind]} as in record 1 (keys: {keys_of(record)})")
            prompt = preference_of(record, where)[0] if kind == "pairs" else prompt_of(record, where)
            add(problems.setdefault(repr(prompt), JudgedProblem(prompt, where, str(number))), record, where)
    if kind == "solutions":
        for problem in problems.values():
            generator = random.Random(f"{seed}/{problem.id}")
            wrong = [corrupt_numbers(text, generator) for text, _ in problem.responses]
            for text in filter(None, wrong):
                problem.place(text, label=0)
    return kind, list(problems.values())


def _judged_kind(record, where):
    if "chosen" in record or "rejected" in record:
        return "pairs"
    if "responses" in record or "outputs" in record:
        return "ranking"
    if "correct" in record or "label" in record:
        return "labels"
    if "messages" in record or "conversations" in record or any(answer in record for _, answer in SCHEMAS):
        return "solutions"
    expected = "; ".join(JUDGED.values())
    raise ValueError(f"{where}: no judged response (keys: {keys_of(record)}). Expected {expected} (docs/DATA.md)")


def _add_pairs(problem, record, where):
    sides = [[problem.place(text) for text in texts] for texts in preference_of(record, where)[1:]]
    margin = _number(record["margin"], "margin", where) if record.get("margin") is not None else None
    for better in sides[0]:
        for worse in sides[1]:
            problem.compare(better, worse, margin)


def _add_ranking(problem, record, where):
    name = "responses" if "responses" in record else "outputs"
    texts = texts_field(record, name, where)
    scores = record.get("scores", list(range(len(texts), 0, -1)))
    if not isinstance(scores, list) or len(scores) != len(texts) or len(texts) < 2:
        found = f"{len(scores)} scores" if isinstance(scores, list) else type_name(scores)
        raise ValueError(f'{where}: "{name}" needs at least 2 entries and "scores" as many: {len(texts)} {name}, {found}')
    scores = [_number(score, "scores", where) for score in scores]
    places = [problem.place(text) for text in texts]
    for i in range(len(texts)):
        for j in range(len(texts)):
            if scores[i] > scores[j]:
                problem.compare(places[i], places[j])


def _add_labelled(problem, record, where):
    name = next((name for name in ("output", "response", "completion", "answer") if name in record), "output")
    text = text_field(record, name, where, expected=JUDGED["labels"])
    label_name = "correct" if "correct" in record else "label"  # in samples.jsonl the label is the reference answer
    label, finished = record[label_name], record.get("finished", True)
    if not isinstance(label, (bool, int, float)) or label not in (0, 1):
        raise ValueError(
            f'{where}: "{label_name}" must be 0, 1, true or false, found {json.dumps(label)[:40]}. '
            'If it is the right answer to the problem, leave it out, or say in "correct" whether the output is right'
        )
    if not isinstance(finished, bool):
        raise ValueError(f'{where}: "finished" must be true or false, found {type_name(finished)}')
    if text or finished:  # else there is no token to judge
        n = len(problem.responses)
        problem.duplicates += problem.place(text, finished, int(label)) < n


def _add_solutions(problem, record, where):
    for text in answers_of(record, where):
        problem.place(text, label=1)


def _number(value, name, where):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f'{where}: "{name}" must hold finite numbers, found {json.dumps(value)[:40]}')
    return value


# The whole parts of numbers, as in 1,450,000 and 12.50: decimals stay as they are.
_WHOLE_NUMBER = re.compile(r"(?<![0-9.])(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)")


def corrupt_numbers(text, generator):
    """A wrong solution that looks like `text`: its answer is another number wherever it stands, and so is, on average,
    one number on the way there. None if there is no number, or one of thousands of digits.

    The answer is what follows the last "####", or else the last number. A number is replaced by a near one, the same at
    every place, so that only the arithmetic or the problem gives the error away, never two spellings of one result.
    """
    found = _WHOLE_NUMBER.findall(text)
    if not found or max(map(len, found)) > 4000:  # Python converts no more than 4300 digits
        return None
    values = [int(number.replace(",", "")) for number in found]
    before_answer = _WHOLE_NUMBER.findall(text[: text.rfind("####")]) if "####" in text else values[:-1]
    answer = values[min(len(before_answer), len(values) - 1)]
    others = sorted(set(values) - {answer})
    new = {}
    for value in [answer] + [other for other in others if generator.random() < 1 / len(others)]:
        above = max(3, value // 5)
        step = generator.randint(1, above + min(above, value))  # never below 0: there may be no room for a sign
        new[value] = value + step if step <= above else value - (step - above)

    def replacement(match):
        value = int(match.group().replace(",", ""))
        return format(new[value], "," if "," in match.group() else "") if value in new else match.group()

    return _WHOLE_NUMBER.sub(replacement, text)


def split_problems(problems, share, seed=0):
    """(the rest, a random share of the problems); at least one of the latter if the share is not 0 and there are two."""
    n = min(len(problems) - 1, max(1, round(share * len(problems)))) if share > 0 else 0
    taken = set(random.Random(f"{seed}/held out").sample(range(len(problems)), n))
    return [p for i, p in enumerate(problems) if i not in taken], [p for i, p in enumerate(problems) if i in taken]


@dataclass(frozen=True)
class Judged:
    """What a verifier learns from at once: all compared responses to a prompt, or a single labelled one.

    responses: token ids, the prompt's first prompt_len included
    pairs: (better, worse, margin or None) by places in `responses`; empty for a labelled response
    weight: of a labelled response
    """

    responses: list[list[int]]
    prompt_len: int
    id: str
    pairs: list[tuple[int, int, float | None]] = field(default_factory=list)
    label: int | None = None
    weight: float = 1.0

    @property
    def tokens(self):
        return [token for response in self.responses for token in response]


@dataclass
class JudgedReport:
    problems: int = 0
    responses: int = 0
    correct: int | None = None  # of labelled ones
    pairs: int = 0
    tokens: int = 0
    duplicates: int = 0
    truncated: int = 0
    unpaired: int = 0  # problems in which nothing is better than anything else
    alike: int = 0  # pairs left out: nothing of their difference is left
    long_prompts: list[str] = field(default_factory=list)  # the ids of problems left out

    def __str__(self):
        judged = f"{self.pairs} pairs" if self.correct is None else f"{self.correct} of them right"
        text = f"{self.problems} problems, {self.responses} responses, {judged}, {self.tokens} tokens; "
        text += f"{self.truncated} truncated, {self.duplicates} duplicates and {self.unpaired} problems without a pair left out"
        if self.alike:
            text += f", {self.alike} pairs whose responses are the same tokens up to max_seq_len"
        if not self.long_prompts:
            return text
        shown = ", ".join(self.long_prompts[:5]) + (", ..." if len(self.long_prompts) > 5 else "")
        return f"{text}, {len(self.long_prompts)} because the prompt alone fills max_seq_len (records {shown})"


def verifier_examples(
    problems, tokenizer, *, loss, max_seq_len, equal_problems=True, use_chat_template=False, system_prompt=None, report=None
):
    """Judged examples; `report`, a JudgedReport, is filled in.

    loss "pairwise": one example per problem, with all its pairs. Otherwise ("mse", "bce") one per labelled response.
    equal_problems: labelled responses weigh so that each problem has the same total; the mean weight is 1.
    """
    report = JudgedReport() if report is None else report
    options = dict(use_chat_template=use_chat_template, system_prompt=system_prompt)
    kept = []
    for problem in problems:
        with naming(problem.where):
            prompt_ids = encode_prompt(tokenizer, problem.prompt, **options)
        report.duplicates += problem.duplicates
        if len(prompt_ids) >= max_seq_len:
            report.long_prompts.append(problem.id)
            continue
        rows = [encode_response(tokenizer, prompt_ids, text, finished, max_seq_len) for text, finished in problem.responses]
        every = problem.all_pairs() if loss == "pairwise" else []
        pairs = [pair for pair in every if rows[pair[0]][0] != rows[pair[1]][0]]
        report.alike += len(every) - len(pairs)
        if loss == "pairwise" and not pairs:
            report.unpaired += 1
        elif rows:
            kept.append((problem, len(prompt_ids), pairs, rows))
    report.problems, report.responses = len(kept), sum(len(problem.responses) for problem, *_ in kept)
    report.correct = None if loss == "pairwise" else sum(sum(problem.labels) for problem, *_ in kept)
    examples = []
    for problem, prompt_len, pairs, rows in kept:
        report.truncated += sum(cut for _, cut in rows)
        rows = [tokens for tokens, _ in rows]
        report.pairs += len(pairs)
        report.tokens += sum(map(len, rows))
        if loss == "pairwise":
            examples.append(Judged(rows, prompt_len, problem.id, pairs))
        else:
            weight = report.responses / (report.problems * len(rows)) if equal_problems else 1.0
            examples += [Judged([row], prompt_len, problem.id, label=label, weight=weight)
                         for row, label in zip(rows, problem.labels)]  # fmt: skip
    return examples


def show_judged(example, tokenizer):
    """A judged example as text: its one response and label, or the two of its first pair."""
    shown = [(example.responses[0], f"label {example.label}")]
    if example.pairs:
        shown = [(example.responses[place], side) for place, side in zip(example.pairs[0], ("better", "worse"))]
    return "\n".join(f"{side}: {show_example(Example(tokens, example.prompt_len, example.id), tokenizer)}" for tokens, side in shown)


def token_pieces(tokenizer, ids):
    """The text of `ids`, control tokens by name, as one piece per token; a character of several tokens stands at its last."""
    pieces, before, growing = [], "", GrowingText(tokenizer, skip_special=False)
    for n, id in enumerate(ids, 1):
        text = growing.add(id)
        if text.endswith("\ufffd") and n < len(ids):
            text = before
        pieces.append(text[len(before):])
        before = text
    return pieces


# -- order ------------------------------------------------------------------------------------------------------


def batches(
    examples, *, max_batch_size, max_batch_tokens=None, seed=0, epoch=0, shuffle=True, dp_rank=0, dp_size=1
):  # fmt: skip
    """The micro-batches of one epoch for one data-parallel rank: lists of indices into `examples`.

    Each index comes once in an epoch over all ranks, and every rank gets equally many micro-batches, an empty list
    where nothing is left, so that all take part in the same collectives. The order depends on nothing but the
    arguments; n ranks of batch size b see the same rows together as one rank of batch size n * b.

    Rows are not sorted by length: they are packed, so nothing is gained, and a step of short rows alone would give
    each of their tokens more weight than a token of long rows gets. Only the ranks' shares of a step are balanced.

    max_batch_tokens: limit on the tokens of a micro-batch; rows are packed, so padding does not exist
    shuffle: False keeps the order of the file
    """
    if max_batch_size < 1 or not 0 <= dp_rank < dp_size:
        raise ValueError(f"cannot batch with max_batch_size={max_batch_size}, dp_rank={dp_rank}, dp_size={dp_size}")
    lengths = [len(example.tokens) for example in examples]
    longest = max(range(len(lengths)), key=lengths.__getitem__, default=None)
    if max_batch_tokens is not None and longest is not None and lengths[longest] > max_batch_tokens:
        raise ValueError(
            f"max_batch_tokens={max_batch_tokens} has no room for record {examples[longest].id}, which has "
            f"{lengths[longest]} tokens: raise it, or lower max_seq_len"
        )
    order = list(range(len(examples)))
    if shuffle:
        random.Random(f"{seed}/{epoch}").shuffle(order)  # a string seeds alike in every process and Python build
    steps, rows, n_tokens, most = [], [], 0, 0
    for i in order:
        n_tokens, most = n_tokens + lengths[i], max(most, lengths[i])
        rows.append(i)
        if len(rows) > max_batch_size * dp_size or max_batch_tokens is not None and not _fits(rows, lengths, n_tokens, most, max_batch_tokens, dp_size):
            steps.append(rows[:-1])
            rows, n_tokens, most = [i], lengths[i], lengths[i]
    steps += [rows] if rows else []
    return [deal(rows, lengths, dp_size)[dp_rank] for rows in steps]


def deal(rows, lengths, n_hands):
    """n_hands lists of the rows with about equally many tokens: the longest left goes to the hand with the fewest.

    Hands differ by at most one row. One hand keeps the order given.
    """
    if n_hands == 1:
        return [list(rows)]
    hands, loads = [[] for _ in range(n_hands)], [0] * n_hands
    longest_first = sorted(rows, key=lambda i: (-lengths[i], i))
    for start in range(0, len(rows), n_hands):  # a round gives each hand one row at most
        for hand, i in zip(sorted(range(n_hands), key=loads.__getitem__), longest_first[start : start + n_hands]):
            hands[hand].append(i)
            loads[hand] += lengths[i]
    return hands


def pack(rows, lengths, *, max_tokens=None, max_rows=None):
    """The rows in order, cut into lists of at most max_rows rows and max_tokens tokens; a row longer than that is a list of its own."""
    packs, filled = [], 0
    for i in rows:
        full = max_tokens is not None and filled + lengths[i] > max_tokens
        if not packs or len(packs[-1]) == max_rows or full:
            packs.append([])
            filled = 0
        packs[-1].append(i)
        filled += lengths[i]
    return packs


def _fits(rows, lengths, n_tokens, most, max_batch_tokens, dp_size):
    """Whether each hand of these rows, of n_tokens in all and the longest of `most`, has room.

    Dealt by the longest first, hands differ by at most the longest row: mostly the sum tells, and nothing need be dealt.
    """
    room = max_batch_tokens * dp_size - n_tokens
    if room < 0 or dp_size == 1 or room >= most * (dp_size - 1):
        return room >= 0
    return all(sum(lengths[i] for i in hand) <= max_batch_tokens for hand in deal(rows, lengths, dp_size))
