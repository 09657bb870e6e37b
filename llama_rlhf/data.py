"""Records from json files, tokenised examples, and the order in which training sees them.

    records = read_records("dataset/GSM8K/train.json")
    report = DataReport()
    examples = sft_examples(records, tokenizer, max_seq_len=512, report=report)
    for indices in batches(examples, max_batch_size=8, seed=0, epoch=0):
        rows = [examples[i] for i in indices]

Plain Python: nothing here needs torch.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

SCHEMAS = (("instruction", "output"), ("query", "response"), ("question", "answer"), ("prompt", "completion"))


# -- records ----------------------------------------------------------------------------------------------------


class Records(list):
    """A list of dicts that remembers its file, for messages about one of them."""

    def __init__(self, rows, file):
        super().__init__(rows)
        self.file = str(file)


def read_records(file):
    """The records of a json list, or of a file with one json object per line. ValueError says which one is wrong."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"data file {str(file)!r} does not exist") from None
    except UnicodeDecodeError as e:
        raise ValueError(f"{file} is not UTF-8 text: {e}") from e
    if not text.strip():
        raise ValueError(f"{file} is empty")
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as e:
            raise ValueError(f"{file}, line {e.lineno}, column {e.colno}: not valid json ({e.msg})") from e
    else:
        rows = _read_lines(file, text)
    if not rows:
        raise ValueError(f"{file} holds no records")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{file}, record {number}: expected an object {{...}}, found {_type_name(row)}")
    return Records(rows, file)


def _read_lines(file, text):
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): it also cuts at U+2028 inside strings
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as e:
            message = f"{file}, line {number}, column {e.colno}: not valid json ({e.msg})."
            raise ValueError(f"{message} Expected a json list, or one object per line") from e
    return rows


def text_field(record, name, where, *, expected=None):
    """record[name], which must be a string. where: "train.json, record 17"."""
    if name not in record:
        needs = f". Expected {expected}" if expected else ""
        raise ValueError(f'{where}: missing "{name}" (keys: {", ".join(map(str, record)) or "none"}){needs}')
    if not isinstance(record[name], str):
        raise ValueError(f'{where}: "{name}" must be a string, found {_type_name(record[name])}')
    return record[name]


def prompt_of(record, where):
    """The prompt of a record: a string, or the messages before the answer. Used also where no answer is needed."""
    if "messages" in record:
        return _messages(record, where)[0]
    for prompt_name, _ in SCHEMAS:
        if prompt_name in record:
            text = text_field(record, prompt_name, where)
            if prompt_name == "instruction" and record.get("input"):
                text = f"{text}\n{text_field(record, 'input', where)}"
            return text
    raise ValueError(f"{where}: no prompt (keys: {', '.join(map(str, record)) or 'none'}). Expected {_expected()}")


def answers_of(record, where):
    """The answers of a record; a list of several is allowed."""
    if "messages" in record:
        return [_messages(record, where)[1]]
    prompt_of(record, where)
    name = next(answer for prompt, answer in SCHEMAS if prompt in record)
    answers = record.get(name)
    if not isinstance(answers, list):
        return [text_field(record, name, where, expected=_expected())]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f'{where}: "{name}" must be a string or a list of strings, with at least one')
    return answers


def _messages(record, where):
    """The turns before the last assistant turn, and the text of that turn."""
    messages = record["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f'{where}: "messages" must be a list of {{"role": ..., "content": ...}}')
    for n, message in enumerate(messages, 1):
        for name in ("role", "content"):
            text_field(message, name, f"{where}, message {n}")
    last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    if last == 0:
        raise ValueError(f'{where}: "messages" needs an "assistant" turn, after another one, to learn from')
    return messages[:last], messages[last]["content"]


def _expected():
    return " or ".join(f'"{prompt}" and "{answer}"' for prompt, answer in SCHEMAS) + ' or "messages"'


def _type_name(value):
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# -- examples ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """tokens[prompt_len:] are trained on; prompt_len is at least 1, so each of them has something before it."""

    tokens: list[int]
    prompt_len: int
    id: str  # record number from 1, as "17", or "17.2" for the second of its answers


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

    prompt: text, or a list of chat messages. Without the chat template the text and a newline follow the BOS token
    (where the tokenizer has one), and a system prompt stands on a line before them.
    """
    if not use_chat_template:
        if not isinstance(prompt, str):
            raise ValueError("chat messages can only be encoded with the chat template: add --use_chat_template")
        lines = [prompt] if system_prompt is None else [system_prompt, prompt]
        return tokenizer.encode("".join(f"{line}\n" for line in lines), bos=True)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not messages:
        raise ValueError("a chat prompt needs at least one message")
    if system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return tokenizer.chat(messages)


def sft_examples(
    records, tokenizer, *, max_seq_len, use_chat_template=False, train_on_prompt=False, system_prompt=None, report=None
):
    """One Example per answer of each record; `report`, a DataReport, is filled in.

    Prompt and answer are tokenised apart, so no token spans their boundary: at generation the prompt ends there
    too. Too long rows lose the end of the answer (and with it the eos), never a part of the prompt.
    """
    report = DataReport() if report is None else report
    file = getattr(records, "file", "records")
    examples = []
    for number, record in enumerate(records, 1):
        where = f"{file}, record {number}"
        prompt, answers = prompt_of(record, where), answers_of(record, where)
        try:
            prompt_ids = encode_prompt(
                tokenizer, prompt, use_chat_template=use_chat_template, system_prompt=system_prompt
            )
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from e
        for n, answer in enumerate(answers, 1):
            id = f"{number}.{n}" if len(answers) > 1 else str(number)
            if len(prompt_ids) >= max_seq_len:
                report.dropped += 1
                report.long_prompts.append(id)
                continue
            tokens = prompt_ids + tokenizer.encode(answer, eos=True)
            report.truncated += len(tokens) > max_seq_len
            tokens = tokens[:max_seq_len]
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


# -- order ------------------------------------------------------------------------------------------------------


def batches(
    examples, *, max_batch_size, max_batch_tokens=None, seed=0, epoch=0, shuffle=True, sort_window=None, dp_rank=0,
    dp_size=1,
):  # fmt: skip
    """The micro-batches of one epoch for one data-parallel rank: lists of indices into `examples`.

    Each index comes once in an epoch over all ranks, and every rank gets equally many micro-batches, an empty list
    where nothing is left, so that all take part in the same collectives. The order depends on nothing but the
    arguments.

    max_batch_tokens: limit on the tokens of a micro-batch; rows are packed, so padding does not exist
    shuffle: False keeps the order of the file
    sort_window: rows sorted by length together, by default 64 micro-batches for each rank; larger windows balance
    the ranks' work better and mix lengths less
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
    generator = random.Random(f"{seed}/{epoch}")  # a string seeds alike in every process and Python build
    if shuffle:
        generator.shuffle(order)
        window = sort_window or 64 * max_batch_size * dp_size
        windows = [order[n : n + window] for n in range(0, len(order), window)]
        order = [i for members in windows for i in sorted(members, key=lengths.__getitem__)]
    micro_batches, n_tokens = [], 0
    for i in order:
        full = max_batch_tokens is not None and n_tokens + lengths[i] > max_batch_tokens
        if not micro_batches or len(micro_batches[-1]) == max_batch_size or full:
            micro_batches.append([])
            n_tokens = 0
        micro_batches[-1].append(i)
        n_tokens += lengths[i]
    # Neighbours have similar lengths: the ranks take them side by side, and none waits long for another.
    steps = [micro_batches[n : n + dp_size] for n in range(0, len(micro_batches), dp_size)]
    if shuffle:
        generator.shuffle(steps)
    return [step[dp_rank] if dp_rank < len(step) else [] for step in steps]
