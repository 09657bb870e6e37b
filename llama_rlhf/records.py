"""Records out of json, jsonl and parquet files, and what their fields mean: the only reader of data files.

    for n, record in enumerate(records := read_records("train.jsonl"), 1):
        where = records.where(n)                # "train.jsonl, line 17, record 17": every message about a record begins so
        for prompt, answer in turns_of(record, where):
            ...

A prompt is text, or a list of chat messages {"role", "content"}. Plain Python: nothing here needs torch.
"""

import io
import json
import re
from contextlib import contextmanager
from pathlib import Path

from llama_rlhf.untrusted import refuse_stand_in

SCHEMAS = (("instruction", "output"), ("query", "response"), ("question", "answer"), ("prompt", "completion"))

# ----------------------------------------------------------------------------------------------------------------
# Files


class Records(list):
    """A list of dicts that remembers its file and the line each one starts in (parquet has none), for messages about one of them."""

    def __init__(self, rows, file, lines=()):
        super().__init__(rows)
        self.file, self.lines = str(file), lines

    def where(self, n):
        """The place of record n, counted from 1."""
        return self.file + (f", line {self.lines[n - 1]}" if self.lines else "") + f", record {n}"


def located(records):
    """(number from 1, where, record) of each; records may be a plain list."""
    where = records.where if isinstance(records, Records) else "records, record {}".format
    return ((n, where(n), record) for n, record in enumerate(records, 1))


def read_records(file, faults=None):
    """The records of a json list, of json lines (one object a line), or of a parquet file; which of them, its content says.

    One is read after the other, so that a file need not fit in memory twice. ValueError says what is wrong, in which line.
    faults: a list to append that to instead, as far as reading can go on.
    """
    if not Path(file).is_file():
        fault = "is a folder: name a file in it" if Path(file).is_dir() else "does not exist"
        raise FileNotFoundError(f"data file {str(file)!r} {fault}" + ("" if Path(file).is_absolute() else f" (relative paths are taken from {Path.cwd()})"))
    with open(file, "rb") as stream:
        parquet = (head := stream.read(400)).startswith(b"PAR1")
    refuse_stand_in(file, head)
    records = Records([], file, None if parquet else [])
    for line, row in _stream_parquet(file, faults) if parquet else stream_json(file, faults):
        if isinstance(row, dict):
            records.append(row)
            if line:
                records.lines.append(line)
        else:
            _fault(faults, f"{file}" + (f", line {line}" if line else "") + f", record {len(records) + 1}: expected an object {{...}}, found {type_name(row)}")
    if not records and not faults:
        _fault(faults, f"{file} holds no records")
    return records


@contextmanager
def naming(where, faults=None):
    """Puts `where` before the message of a ValueError; with a list of faults, the message goes there instead."""
    try:
        yield
    except ValueError as e:
        message = str(e) if str(e).startswith(where) else f"{where}: {e}"
        if faults is None:
            raise ValueError(message) from e
        faults.append(message)


def _fault(faults, error):
    if faults is None:
        raise error if isinstance(error, ValueError) else ValueError(error)
    faults.append(str(error))


_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
_BLOCK = 1 << 16  # characters


def stream_json(file, faults=None):
    """(line, value) of each record of a json list, or of a file with one json value per line, one by one.

    ValueError names line and column of a fault; or `faults` gets it, and reading goes on with the next line (a list ends there).
    """
    with open(file, "rb") as stream:
        if stream.read(3) != b"\xef\xbb\xbf":
            stream.seek(0)
        line, head = 1, stream.read(1)
        while head and head in b" \t\r\n":
            line, head = line + (head == b"\n"), stream.read(1)
        if not head:
            _fault(faults, f"{file} is empty: no records")
        if head == b"[":
            try:
                yield from _stream_list(file, io.TextIOWrapper(stream, "utf-8", newline=""), line)
            except ValueError as e:
                _fault(faults, e)
            return
        stream.seek(-len(head), io.SEEK_CUR)
        for number, data in enumerate(stream, line):  # cuts at \n only: a record may hold U+2028
            try:
                text = data.decode("utf-8").rstrip("\r\n")
                if text.strip(" \t\r"):
                    yield number, json.loads(text)
            except UnicodeDecodeError as e:
                _fault(faults, f"{file}, line {number} is not UTF-8 text ({e.reason}). Re-encode it as UTF-8")
            except json.JSONDecodeError as e:
                _fault(faults, f"{file}, line {number}, column {e.colno}: not valid json ({e.msg}). Expected a json list, or one object per line")
            except (ValueError, RecursionError) as e:  # a number of more digits, or brackets deeper, than Python takes
                _fault(faults, f"{file}, line {number}: {e}")


def _after_space(text, at):
    found = _SPACE.match(text, at)
    assert found is not None  # the pattern also matches nothing
    return found.end()


def _stream_list(file, stream, line):
    """What follows the "[": records are decoded from a window of the text, which grows while it ends inside one."""
    text, at, block, number, ended = "", 0, _BLOCK, 0, False
    before = 1  # characters of its line that stand before the window: the bracket
    while True:
        start, fault = _after_space(text, at), "expected , or ]"
        if text[start : start + 1] == "]":
            if rest := (text[start + 1 :] + stream.read()).strip(" \t\r\n"):
                raise ValueError(f"{file}, line {line + text.count(chr(10), at, start)}: more text after the end of the list: {rest[:20]!r}")
            return
        if number == 0 or text[start : start + 1] == ",":
            start = _after_space(text, start + (number > 0))
            try:
                value, stop = _DECODER.raw_decode(text, start)
                after = _after_space(text, stop)
                if text[after : after + 1] in (",", "]"):  # else it may go on: "1" is the begin of "1.5"
                    line, number = line + text.count("\n", at, start), number + 1
                    yield line, value
                    line, at, block = line + text.count("\n", start, stop), stop, _BLOCK
                    continue
                start = after
            except json.JSONDecodeError as e:
                start, fault = e.pos, e.msg
            except (ValueError, RecursionError) as e:
                raise ValueError(f"{file}, line {line + text.count(chr(10), at, start)}, record {number + 1}: {e}") from e
        if ended:
            line, newline = line + text.count("\n", at, start), text.rfind("\n", 0, start)
            column = start - newline if newline >= 0 else before + start + 1
            raise ValueError(f"{file}, line {line}, column {column}: not valid json ({fault})")
        try:
            more = stream.read(block)
        except UnicodeDecodeError as e:
            raise ValueError(f"{file}, after line {line}, is not UTF-8 text ({e.reason}). Re-encode it as UTF-8") from e
        newline = text.rfind("\n", 0, at)
        before = at - newline - 1 if newline >= 0 else before + at
        text, at, block, ended = text[at:] + more, 0, 2 * block, not more


def _stream_parquet(file, faults):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file} is a parquet file: to read it, pip install pyarrow") from None
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                yield None, {name: value for name, value in row.items() if value is not None}  # a column has a place in every row
    except (pyarrow.ArrowException, OSError) as e:
        _fault(faults, f"{file} is no readable parquet file ({str(e).splitlines()[0]})")


# ----------------------------------------------------------------------------------------------------------------
# Fields


def text_field(record, name, where, *, expected=None):
    """record[name], which must be a string. where: "train.json, record 17"."""
    if name not in record:
        needs = f". Expected {expected}" if expected else ""
        raise ValueError(f'{where}: missing "{name}" (keys: {keys_of(record)}){needs}')
    return _text(record[name], name, where)


def _text(value, name, where):
    if not isinstance(value, str):
        raise ValueError(f'{where}: "{name}" must be a string, found {type_name(value)}')
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise ValueError(f'{where}: "{name}" holds half a character (an unpaired \\ud8.. escape), which no tokenizer can read')
    return value


def texts_field(record, name, where, *, expected=None):
    """record[name] as a list: of one string, or the list of strings that it is."""
    if isinstance(record.get(name), list):
        if not record[name] or not all(isinstance(text, str) for text in record[name]):
            raise ValueError(f'{where}: "{name}" must be a string or a list of strings, with at least one')
        return [_text(text, name, where) for text in record[name]]
    return [text_field(record, name, where, expected=expected)]


def prompt_of(record, where, *, own=False):
    """The prompt of a record: text, or the messages before the answer. Used also where no answer is needed.

    own: not one that only stands in "chosen" and "rejected". A field "system" (or "system_prompt") makes text two messages, so that it comes before the prompt however that is encoded.
    """
    messages = messages_of(record, where)
    if messages is not None:
        return messages[:-1] if len(messages) > 1 and messages[-1]["role"] == "assistant" else messages
    name = next((prompt for prompt, _ in SCHEMAS if prompt in record), None)
    if name is None and "chosen" in record and not own:
        return preference_of(record, where)[0]
    if name is None:
        raise ValueError(f"{where}: no prompt (keys: {keys_of(record)}). Expected {expected()}")
    if isinstance(record[name], list):
        return _with_system(_checked(record[name], name, where), record, where)
    text = text_field(record, name, where)
    if name == "instruction" and record.get("input"):
        text = f"{text}\n{text_field(record, 'input', where)}"
    messages = _with_system([{"role": "user", "content": text}], record, where)
    return messages if len(messages) > 1 else text


def turns_of(record, where, *, weighted=True):
    """[(prompt, answer)] to learn from: one for each of several answers; of a conversation one for each assistant turn, after all before it.

    weighted: without the turns whose "weight" is 0.
    """
    messages = messages_of(record, where)
    if messages is None:
        prompt = prompt_of(record, where)
        name = next((answer for prompt, answer in SCHEMAS if prompt in record), "output")
        return [(prompt, answer) for answer in texts_field(record, name, where, expected=expected())]
    given = record["messages" if "messages" in record else "conversations"]
    first = len(messages) - len(given)  # 1 behind the record's own system prompt
    turns = [(messages[:n], message["content"]) for n, message in enumerate(messages)
             if message["role"] == "assistant" and n and not (weighted and given[n - first].get("weight") == 0)]  # fmt: skip
    if not turns:
        raise ValueError(f'{where}: "messages" needs an "assistant" turn, after another one and not of "weight" 0, to learn from')
    return turns


def answers_of(record, where, *, optional=False):
    """The answers to `prompt_of`: of a conversation the last turn, if it is the assistant's. optional: none is no error, where the record has no place for it."""
    if optional and not record.keys() & {"messages", "conversations", *(answer for prompt, answer in SCHEMAS if prompt in record)}:
        return []
    messages = messages_of(record, where)
    if messages is not None and messages[-1]["role"] != "assistant":
        if optional:
            return []
        raise ValueError(f'{where}: the last message is from {messages[-1]["role"]!r}, so there is no answer to it. End with an "assistant" turn')
    turns = turns_of(record, where, weighted=False)
    return [answer for prompt, answer in turns if prompt == turns[-1][0]]


def as_text(prompt):
    """A prompt for people to read: of messages, one after the other behind their roles."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def is_empty(prompt):
    return not (prompt if isinstance(prompt, str) else prompt[-1]["content"]).strip()


def messages_of(record, where):
    """The chat messages of a record, {"role", "content"} each, or None. "conversations" of {"from", "value"} are understood too."""
    if "messages" in record:
        return _with_system(_checked(record["messages"], "messages", where), record, where)
    if "conversations" in record:
        turns, roles = record["conversations"], {"human": "user", "gpt": "assistant"}
        if isinstance(turns, list) and all(isinstance(turn, dict) and "from" in turn for turn in turns):
            turns = [{"role": roles.get(str(turn["from"]), turn["from"]), "content": turn.get("value")} for turn in turns]
        return _with_system(_checked(turns, "conversations", where), record, where)
    return None


def _with_system(messages, record, where):
    """The messages behind the record's own system prompt, where it has one and they do not begin with another."""
    system = next((name for name in ("system", "system_prompt") if record.get(name)), None)
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": text_field(record, system, where)}, *messages]


def _checked(messages, name, where):
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f'{where}: "{name}" must be a list of {{"role": ..., "content": ...}}')
    return [{key: text_field(message, key, f'{where}, "{name}" {n}') for key in ("role", "content")} for n, message in enumerate(messages, 1)]


def preference_of(record, where):
    """(prompt, chosen texts, rejected texts). "chosen" and "rejected" are text, several texts, or whole conversations that
    differ in the last turn, as messages or written "\\n\\nHuman: ...\\n\\nAssistant: ..."; those hold the prompt themselves."""
    sides = [_side(record, name, where) for name in ("chosen", "rejected")]
    if sides[0][0] != sides[1][0]:
        raise ValueError(f'{where}: "chosen" and "rejected" must be conversations that differ in the last turn only, or both be answers')
    prompt = _with_system(sides[0][0], record, where) if sides[0][0] else prompt_of(record, where, own=True)
    return prompt, sides[0][1], sides[1][1]


def _side(record, name, where):
    """(messages before the answer, or None, the answers)"""
    value = record.get(name)
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        parts = re.split(r"\n\n(Human|Assistant):", value)[1:]
        value = [{"role": {"Human": "user", "Assistant": "assistant"}[role], "content": text.strip()} for role, text in zip(parts[::2], parts[1::2])]
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return None, texts_field(record, name, where)
    messages = _checked(value, name, where)
    if messages[-1]["role"] != "assistant":
        raise ValueError(f'{where}: "{name}" must end with an assistant turn, not {messages[-1]["role"]!r}')
    return messages[:-1] or None, [messages[-1]["content"]]


def expected():
    return " or ".join(f'"{prompt}" and "{answer}"' for prompt, answer in SCHEMAS) + ' or "messages" (docs/DATA.md)'


def keys_of(record):
    return ", ".join(map(str, record)) or "none"


def type_name(value):
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
