"""Bring other GSM8K-like problems into the form of train.json: a JSON list of {"instruction", "output"}.

    # the official files (https://github.com/openai/grade-school-math), the last 200 records put aside
    python dataset/GSM8K/prepare.py --source train.jsonl --save_file official.json \\
        --hold_out 200 --hold_out_file official_held_out.json

    # problems made by the reasoning-gym package (pip install reasoning-gym)
    python dataset/GSM8K/prepare.py --source reasoning_gym:gsm_symbolic --size 500 --seed 1 --save_file symbolic.json

Every output ends in a line `#### number`. Records stay in their order. A question that comes a second time is dropped
and counted, or it could stand on both sides of the split.
"""

import argparse
import json
import os
import re
from pathlib import Path

GENERATED = "reasoning_gym:"
_LAST_LINE = re.compile(r"#### -?[0-9][0-9,.]*")


def read_official(file):
    """[{"instruction", "output"}] from the official jsonl of {"question", "answer"}."""
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(
            f"{file}: no such file. Give the official train.jsonl or test.jsonl, or {GENERATED}gsm_symbolic"
        )
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file}, line {number}: not valid JSON ({error.msg}). Expected one object per line"
            ) from None
        keys = ", ".join(record) if isinstance(record, dict) else f"none, it is a {type(record).__name__}"
        for key in ("question", "answer"):
            if not isinstance(record, dict) or not isinstance(record.get(key), str):
                raise ValueError(
                    f'{file}, record {number}: missing "{key}" (keys: {keys}). '
                    'The official form is {"question": text, "answer": text}'
                )
        records.append(_record(record["question"], record["answer"], f"{file}, record {number}"))
    return records


def generate_symbolic(dataset, size, seed):
    """[{"instruction", "output"}] from reasoning-gym's gsm_symbolic; its worked solution becomes the output."""
    if dataset != "gsm_symbolic":
        raise ValueError(f"--source {GENERATED}{dataset}: only {GENERATED}gsm_symbolic has worked solutions")
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise ValueError(f"--source {GENERATED}{dataset} needs {error.name}: pip install reasoning-gym") from None

    records = []
    for number, entry in enumerate(reasoning_gym.create_dataset(dataset, size=size, seed=seed), 1):
        # The package's solution has its own last line; the answer that it is scored by is the one to trust.
        solution = entry["metadata"]["answer_cot"].partition("####")[0].strip()
        output = f"{solution}\n#### {entry['answer']}"
        records.append(_record(entry["question"], output, f"{GENERATED}{dataset}, record {number}"))
    return records


def _record(question, solution, where):
    solution = solution.strip()
    last_line = solution.rpartition("\n")[2].strip()
    if not _LAST_LINE.fullmatch(last_line):
        raise ValueError(f'{where}: the solution must end in a line "#### number", not in {last_line[-60:]!r}')
    return {"instruction": question.strip(), "output": solution}


def without_repeats(records):
    first = {}
    for record in records:
        first.setdefault(record["instruction"], record)
    return list(first.values())


def write_json(file, records):
    """One record a line. The file appears whole or not at all: written beside its place, then renamed."""
    unfinished = Path(f"{file}.{os.getpid()}.tmp")
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    try:
        unfinished.write_text(f"[\n{lines}\n]\n", encoding="utf-8", newline="\n")
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def prepare(source, save_file, hold_out=0, hold_out_file=None, size=None, seed=None):
    """Convert and write; returns (number of records saved, number held out, number of repeats dropped)."""
    if hold_out < 0:
        raise ValueError(f"--hold_out {hold_out}: cannot be negative")
    if bool(hold_out) != bool(hold_out_file):
        raise ValueError("--hold_out and --hold_out_file go together: give both or neither")
    if hold_out_file and Path(hold_out_file).resolve() == Path(save_file).resolve():
        raise ValueError(f"--save_file and --hold_out_file are both {save_file}: give two different files")
    for file in filter(None, (save_file, hold_out_file)):
        if not Path(file).absolute().parent.is_dir():
            raise FileNotFoundError(f"{file}: its folder does not exist. Create it first")

    if source.startswith(GENERATED):
        if size is not None and size < 1:
            raise ValueError(f"--size {size}: needs at least 1")
        records = generate_symbolic(source.removeprefix(GENERATED), 500 if size is None else size, seed or 0)
    elif size is not None or seed is not None:
        raise ValueError(f"--size and --seed are for {GENERATED}..., but --source is the file {source}")
    else:
        records = read_official(source)

    kept = without_repeats(records)
    if len(kept) <= hold_out:
        raise ValueError(f"{source}: {len(kept)} records, which leaves none with --hold_out {hold_out}")
    split = len(kept) - hold_out
    write_json(save_file, kept[:split])
    if hold_out_file:
        write_json(hold_out_file, kept[split:])
    return split, hold_out, len(records) - len(kept)


def main():
    parser = argparse.ArgumentParser(description="Convert GSM8K-like problems to {instruction, output}.")
    parser.add_argument("--source", required=True, help=f"official .jsonl file, or {GENERATED}gsm_symbolic")
    parser.add_argument("--save_file", required=True, help="json file to write")
    parser.add_argument("--hold_out", type=int, default=0, help="put this many records from the end aside")
    parser.add_argument("--hold_out_file", help="json file for them")
    parser.add_argument("--size", type=int, help=f"{GENERATED}... only: how many problems to make (default 500)")
    parser.add_argument("--seed", type=int, help=f"{GENERATED}... only (default 0)")
    args = parser.parse_args()
    try:
        saved, held_out, repeats = prepare(**vars(args))
    except (ValueError, OSError) as error:
        parser.exit(1, f"prepare.py: {error}\n")
    print(f"{args.save_file}: {saved} records")
    if held_out:
        print(f"{args.hold_out_file}: {held_out} records")
    if repeats:
        print(f"{repeats} repeated questions dropped")


if __name__ == "__main__":
    main()
