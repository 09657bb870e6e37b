"""Reading records, building training examples, and the order of an epoch."""

import itertools
import json
import random

import pytest

from llama_rlhf import data
from llama_rlhf.data import DataReport, Example, batches, deal, encode_prompt, pack, sft_examples, show_example
from llama_rlhf.records import answers_of, preference_of, prompt_of, read_records, turns_of
from llama_rlhf.tokenizer import load_tokenizer

BOS, EOS = 256, 257


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "tokenizer.bytes.json").write_text('{"kind": "bytes"}')
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    return load_tokenizer(tmp_path)


def ids(text):
    return list(text.encode())


# -- records ----------------------------------------------------------------------------------------------------


def test_json_list_and_json_lines_read_alike(tmp_path):
    rows = [{"instruction": "a\u2028b", "output": "é"}, {"instruction": "c", "output": "d"}]
    text = {
        "list.json": json.dumps(rows, indent=2),
        "lines.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n",
        "lines.json": "\r\n".join(map(json.dumps, rows)),
        "bom.json": "\ufeff" + json.dumps(rows, ensure_ascii=False),
    }
    for name, content in text.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert read_records(tmp_path / name) == rows, name


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "data.json is empty"),
        (b" \n", "data.json is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "data.json: a Git LFS pointer, not the data"),
        (b"<!doctype html>\n<html>", "data.json: what a server answered in place of the data"),
        (b"[]", "holds no records"),
        (b'[{"a": 1},\n {"a": }]', "data.json, line 2, column 8: not valid json"),
        (b'{"a": 1}\n\n{"a": \n', "data.json, line 3, column 7: not valid json.*one object per line"),
        (b'[{"a": 1}, 7]', r"data.json, line 1, record 2: expected an object {...}, found a number"),
        (b'"text"', "record 1: expected an object {...}, found a string"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"a": "b"}\n{"a": "\xe9"}\n', "data.json, line 2 is not UTF-8 text"),
        (b'[{"a": "b"},\n{"a": "\xe9"}]\n', "data.json, after line 1, is not UTF-8 text"),
        (b'[{"a": 1},]', "line 1, column 11: not valid json"),
        (b'[{"a": 1}', r"line 1, column 10: not valid json \(expected , or \]"),
        (b'[{"a": 1} {"a": 2}]', "line 1, column 11: not valid json"),
        (b'[{"a": 1}]\n[]', r"line 1: more text after the end of the list"),
        (b"[" * 100000, "line 1, record 1: maximum recursion depth"),
        (b'{"a": ' + b"7" * 5000 + b"}", "line 1: Exceeds the limit"),
        (b'[{"a": 1},\n\n7]', "data.json, line 3, record 2: expected an object"),
    ],
)
def test_unreadable_data_is_located(tmp_path, content, message):
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "data.json")


def test_columns_count_from_the_start_of_the_line_in_a_long_list(tmp_path):
    """A list is read in windows; the fault's place must not depend on them."""
    text = "[" + ", ".join(json.dumps({"a": "x" * n}) for n in range(900)) + ",\n {}, {oops}]"
    for content in (text, text.replace("\n", "")):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(json.JSONDecodeError) as whole:
            json.loads(content)
        with pytest.raises(ValueError, match=rf"line {whole.value.lineno}, column {whole.value.colno}: not valid json"):
            read_records(tmp_path / "x.json")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="data file .*none.json.* does not exist"):
        read_records(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="is a folder: name a file in it"):
        read_records(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'none.json' does not exist \(relative paths are taken from /"):
        read_records("none.json")


@pytest.mark.parametrize(
    "record, message",
    [
        ({"instruction": "a", "answer": "b"}, r'record 2: missing "output" \(keys: instruction, answer\). Expected "'),
        ({"text": "a"}, r'record 2: no prompt \(keys: text\). Expected "instruction" and "output" or'),
        ({}, r"record 2: no prompt \(keys: none\)"),
        ({"instruction": 3, "output": "b"}, 'record 2: "instruction" must be a string, found a number'),
        ({"instruction": "a", "output": None}, 'record 2: "output" must be a string, found null'),
        ({"instruction": "a", "output": []}, 'record 2: "output" must be a string or a list of strings'),
        ({"instruction": "a", "output": ["b", 1]}, 'record 2: "output" must be a string or a list of strings'),
        ({"instruction": "a", "input": ["x"], "output": "b"}, 'record 2: "input" must be a string, found a list'),
        ({"messages": "hi"}, 'record 2: "messages" must be a list'),
        ({"messages": [{"role": "user"}]}, r'record 2, "messages" 1: missing "content" \(keys: role\)'),
        ({"messages": []}, 'record 2: "messages" must be a list'),
        ({"conversations": [{"from": "human", "value": 3}]}, 'record 2, "conversations" 1: "content" must be a string'),
        ({"instruction": "a", "output": "half \ud800"}, 'record 2: "output" holds half a character'),
        ({"prompt": [{"role": "user"}], "completion": "x"}, r'record 2, "prompt" 1: missing "content"'),
        ({"messages": [{"role": "user", "content": "x"}]}, 'record 2: "messages" needs an "assistant" turn'),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * 2},
            "record 2: a conversation of several turns can only be encoded .*use_chat_template",
        ),
    ],
)
def test_wrong_record_names_file_number_field_and_keys(tmp_path, tokenizer, record, message):
    (tmp_path / "train.json").write_text(json.dumps([{"instruction": "a", "output": "b"}, record]))
    with pytest.raises(ValueError, match="train.json, line 1, " + message):
        sft_examples(read_records(tmp_path / "train.json"), tokenizer, max_seq_len=99)


# -- examples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt, answer", [("instruction", "output"), ("query", "response"), ("question", "answer"),
                                            ("prompt", "completion")])  # fmt: skip
def test_every_schema_gives_prompt_newline_answer_eos(tokenizer, prompt, answer):
    (example,) = sft_examples([{prompt: "2+3?", answer: "5"}], tokenizer, max_seq_len=99)
    assert example == Example([BOS, *ids("2+3?\n5"), EOS], 6, "1")


def test_input_follows_the_instruction(tokenizer):
    rows = [{"instruction": "Add.", "input": "2 3", "output": "5"}, {"instruction": "Add.", "input": "", "output": "5"}]
    one, two = sft_examples(rows, tokenizer, max_seq_len=99)
    assert one.tokens == [BOS, *ids("Add.\n2 3\n5"), EOS] and two.tokens == [BOS, *ids("Add.\n5"), EOS]


def test_several_outputs_give_a_row_each(tokenizer):
    rows = [{"instruction": "a", "output": ["b", "cc"]}, {"instruction": "d", "output": "e"}]
    examples = sft_examples(rows, tokenizer, max_seq_len=99)
    assert [(e.id, e.tokens[e.prompt_len :]) for e in examples] == [
        ("1.1", [*ids("b"), EOS]), ("1.2", [*ids("cc"), EOS]), ("2", [*ids("e"), EOS]),
    ]  # fmt: skip


def test_training_prompt_equals_generation_prompt(tokenizer):
    record = {"instruction": "a <bos> b", "output": "c"}
    for options in ({}, {"system_prompt": "S"}, {"use_chat_template": True},
                    {"use_chat_template": True, "system_prompt": "S"}):  # fmt: skip
        (example,) = sft_examples([record], tokenizer, max_seq_len=99, **options)
        prompt = encode_prompt(tokenizer, prompt_of(record, ""), **options)
        assert example.tokens == prompt + [*ids("c"), EOS] and example.prompt_len == len(prompt)
        assert example.tokens.count(BOS) == 1 and prompt[0] == BOS


def test_chat_and_system_prompts_by_hand(tokenizer):
    assert encode_prompt(tokenizer, "x", system_prompt="S") == [BOS, *ids("S\nx\n")]
    assert encode_prompt(tokenizer, "x", use_chat_template=True) == [BOS, *ids("u:x;a:")]
    assert encode_prompt(tokenizer, "x", use_chat_template=True, system_prompt="S") == [BOS, *ids("s:S;u:x;a:")]


def test_each_assistant_turn_is_trained_after_all_before_it(tokenizer):
    turns = [("system", "S"), ("user", "x"), ("assistant", "y"), ("user", "z"), ("assistant", "w"), ("user", "bye")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    for given in (record, {"conversations": [{"from": {"user": "human", "assistant": "gpt"}.get(r, r), "value": c} for r, c in turns]}):
        examples = sft_examples([given], tokenizer, max_seq_len=99, use_chat_template=True, system_prompt="not this")
        assert [e.id for e in examples] == ["1.1", "1.2"]
        assert [e.tokens[: e.prompt_len] for e in examples] == [[BOS, *ids("s:S;u:x;a:")], [BOS, *ids("s:S;u:x;a:y;u:z;a:")]]
        assert [e.tokens[e.prompt_len :] for e in examples] == [[*ids("y"), EOS], [*ids("w"), EOS]]
        assert prompt_of(given, "") == record["messages"], "the last turn waits for its answer"
        assert answers_of({**given, "label": "w"}, "", optional=True) == []
        with pytest.raises(ValueError, match="record 3: the last message is from 'user', so there is no answer to it"):
            answers_of(given, "record 3")
    answered = {"messages": record["messages"][:5]}
    assert prompt_of(answered, "") == record["messages"][:4] and answers_of(answered, "") == ["w"]
    assert prompt_of({"messages": record["messages"][:2]}, "") == record["messages"][:2]


@pytest.mark.parametrize("system", [{}, {"system": "S"}])
def test_a_turn_of_weight_0_is_read_but_not_trained_on(tokenizer, system):
    """As in the files of hosted fine-tuning: a poor answer is part of the conversation, not to be learned. It was."""
    turns = [("user", "x", {}), ("assistant", "bad", {"weight": 0}), ("user", "z", {}), ("assistant", "w", {"weight": 1})]
    record = {"messages": [{"role": role, "content": content, **more} for role, content, more in turns], **system}
    (example,) = sft_examples([record], tokenizer, max_seq_len=99, use_chat_template=True)
    assert example.tokens == [BOS, *ids(("s:S;" if system else "") + "u:x;a:bad;u:z;a:w"), EOS] and example.prompt_len == len(example.tokens) - 2
    assert answers_of({"messages": record["messages"][:2]}, "") == ["bad"], "whether it is learned is not whether it is an answer"
    with pytest.raises(ValueError, match='record 1: "messages" needs an "assistant" turn, after another one and not of "weight" 0'):
        sft_examples([{"messages": record["messages"][:2]}], tokenizer, max_seq_len=99, use_chat_template=True)


def test_a_system_field_comes_before_the_prompt_with_and_without_template(tokenizer):
    record = {"query": "x", "response": "y", "system": "S"}
    for options, text in (({}, "S\nx\n"), ({"use_chat_template": True, "system_prompt": "not this"}, "s:S;u:x;a:")):
        (example,) = sft_examples([record], tokenizer, max_seq_len=99, **options)
        assert example.tokens[: example.prompt_len] == [BOS, *ids(text)]
    user, answer, system = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "system", "content": "S"}
    for given in ({"messages": [user, answer]}, {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}, {"prompt": [user], "completion": "y"}):
        for name in ("system", "system_prompt"):
            assert prompt_of({**given, name: "S"}, "") == [system, user] and turns_of({**given, name: "S"}, "") == [([system, user], "y")]
    assert prompt_of({"messages": [{**system, "content": "own"}, user, answer], "system": "S"}, "")[0]["content"] == "own"
    assert preference_of({"chosen": [user, answer], "rejected": [user, user | answer | {"content": "z"}], "system": "S"}, "")[0] == [system, user]
    one_turn = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    assert sft_examples([one_turn], tokenizer, max_seq_len=99) == sft_examples([{"query": "x", "response": "y"}], tokenizer, max_seq_len=99)


def test_preferences_are_texts_conversations_or_written_dialogues():
    user, good, bad = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "assistant", "content": "z"}
    assert preference_of({"prompt": "x", "chosen": "y", "rejected": ["z", "w"]}, "") == ("x", ["y"], ["z", "w"])
    assert preference_of({"prompt": "x", "chosen": [user, good], "rejected": [user, bad]}, "") == ([user], ["y"], ["z"])
    assert preference_of({"prompt": [user], "chosen": [good], "rejected": [bad]}, "") == ([user], ["y"], ["z"])
    written = {"chosen": "\n\nHuman: x\n\nAssistant: y", "rejected": "\n\nHuman: x\n\nAssistant: z"}
    assert preference_of(written, "") == ([user], ["y"], ["z"]) and prompt_of(written, "") == [user]
    for record, message in (
        ({"chosen": [user, good], "rejected": [good, user, bad]}, "differ in the last turn only"),
        ({"prompt": "x", "chosen": [user], "rejected": [user]}, "must end with an assistant turn, not 'user'"),
        ({"prompt": "x", "chosen": "y"}, 'missing "rejected"'), ({"chosen": "y", "rejected": "z"}, r"no prompt \(keys: chosen, rejected\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            preference_of(record, "f, record 1")


def test_faults_can_be_collected_and_the_good_records_kept(tmp_path, tokenizer):
    (tmp_path / "x.jsonl").write_text('{"query": "a", "response": "b"}\n{oops\n\n{"query": "a"}\n[]\n{"query": "c", "response": "d"}\n')
    faults = []
    records = read_records(tmp_path / "x.jsonl", faults)
    examples = sft_examples(records, tokenizer, max_seq_len=99, faults=faults)
    assert [e.id for e in examples] == ["1", "3"] and records.where(3).endswith("x.jsonl, line 6, record 3")
    assert [fault.split("x.jsonl, ")[1][:17] for fault in faults] == ["line 2, column 2:", "line 5, record 3:", "line 4, record 2:"]


def test_no_record_and_no_file_makes_anything_but_a_value_error(tmp_path):
    """Random records out of every known field, and a good file with random damage; seeded."""
    from llama_rlhf.data import judged_problems
    from llama_rlhf.tasks import answers, gsm8k
    draw = random.Random(0)
    turn = {"role": "user", "content": "x"}
    values = ["a", "", None, 1, 1.5, float("nan"), True, [], ["a"], [1], {}, turn, [turn, {"role": "assistant", "content": "y"}], [{"role": 3}], [None], "#### 3",
              [{"from": "human", "value": "a"}, {"from": ["x"], "value": 3}], "\ud800", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman:"]
    keys = ("instruction input output query response question answer prompt completion messages conversations chosen rejected margin responses outputs scores "
            "label correct finished system").split()
    readers = [prompt_of, turns_of, answers_of, preference_of, lambda r, _: judged_problems([r]), lambda r, w: gsm8k._problem(1, w, r),
               lambda r, w: answers._problem(1, w, r)]
    outcomes = []
    for _ in range(500):
        record = {key: draw.choice(values) for key in draw.sample(keys, draw.randint(0, 6))}
        for reader in readers:
            outcomes.append(succeeds(reader, record, "w"))
    good = json.dumps([{"instruction": "a\n", "output": "é"}, {"x": [1, 2, {"y": None}]}], ensure_ascii=False).encode()
    for i in range(500):
        data = bytearray(good if i % 2 else good.replace(b", {", b"\n{")[1:-1])
        at = draw.randrange(len(data))
        data[at : at + draw.choice([0, 0, 1, 9])] = bytes(draw.choices(b'[]{}",:0e\\ \n\xff\xc3', k=draw.randint(0, 3)))
        (tmp_path / "x").write_bytes(data)
        outcomes += [succeeds(read_records, tmp_path / "x", faults) for faults in (None, [])]
    assert len(outcomes) == 4500 and 300 < sum(outcomes) < 4200


def succeeds(function, *arguments):
    try:
        function(*arguments)
        return True
    except ValueError:
        return False


def test_parquet_gives_the_same_records(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pip install pyarrow to run this")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"instruction": "é", "output": ["b", "c"]}, {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}]
    names = ("instruction", "output", "messages")
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    parquet.write_table(table, tmp_path / "x.data")         # what it is shows in the content, not in the name
    records = read_records(tmp_path / "x.data")
    assert records == rows and records.where(2) == f"{tmp_path}/x.data, record 2"
    assert [answer for n in (0, 1) for _, answer in turns_of(records[n], "")] == ["b", "c", "y"]
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "x.data").read_bytes()[:-20])
    with pytest.raises(ValueError, match="cut.parquet is no readable parquet file"):
        read_records(tmp_path / "cut.parquet")


def test_parquet_without_pyarrow_names_the_remedy(tmp_path, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1....")
    with pytest.raises(ValueError, match="pip install pyarrow"):
        read_records(tmp_path / "x.parquet")


def test_answers_are_cut_never_prompts(tokenizer):
    """A cut answer has no eos: the model must not learn to stop there."""
    prompt, whole = [BOS, *ids("abc\n")], [BOS, *ids("abc\nwxyz"), EOS]
    for max_seq_len in range(1, 14):
        report = DataReport()
        rows = [{"instruction": "abc", "output": "wxyz"}]
        examples = sft_examples(rows, tokenizer, max_seq_len=max_seq_len, report=report)
        if max_seq_len <= len(prompt):
            assert examples == [] and report == DataReport(dropped=1, long_prompts=["1"])
        else:
            (example,) = examples
            assert example.tokens == whole[:max_seq_len] and example.prompt_len == len(prompt)
            n = min(max_seq_len, len(whole))
            assert report == DataReport(1, int(max_seq_len < len(whole)), 0, [], n, n - len(prompt))
    assert "1 dropped because the prompt alone fills max_seq_len (records 7)" in str(
        DataReport(rows=2, dropped=1, long_prompts=["7"])
    )


def test_train_on_prompt_trains_all_but_the_first_token(tokenizer):
    report = DataReport()
    rows = [{"instruction": "abc", "output": "d"}]
    (example,) = sft_examples(rows, tokenizer, max_seq_len=99, train_on_prompt=True, report=report)
    assert example.prompt_len == 1 and report.response_tokens == len(example.tokens) - 1 == 6


def test_shown_example_marks_what_is_trained(tokenizer):
    (example,) = sft_examples([{"instruction": "2+3?", "output": "5"}], tokenizer, max_seq_len=99)
    assert show_example(example, tokenizer) == "record 1 (8 tokens, 2 trained on):\n<bos>2+3?\n⟦5<eos>⟧"


# -- order ------------------------------------------------------------------------------------------------------


def examples_of(lengths):
    return [Example([0] * n, 1, str(i + 1)) for i, n in enumerate(lengths)]


LENGTHS = [(7 * i * i + 3 * i) % 50 + 2 for i in range(101)]


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 5, 8, 101])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_is_every_example_once_in_equal_steps(dp_size, count, shuffle):
    options = dict(max_batch_size=4, max_batch_tokens=120, seed=1, epoch=2, shuffle=shuffle, dp_size=dp_size)
    examples = examples_of(LENGTHS[:count])
    ranks = [batches(examples, dp_rank=rank, **options) for rank in range(dp_size)]
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(i for rank in ranks for batch in rank for i in batch) == list(range(count))
    for batch in (batch for rank in ranks for batch in rank):
        assert len(batch) <= 4
        assert sum(LENGTHS[i] for i in batch) <= 120
    assert ranks == [batches(examples, dp_rank=rank, **options) for rank in range(dp_size)]


def test_too_few_examples_leave_empty_batches():
    ranks = [batches(examples_of([3, 4, 5]), max_batch_size=2, dp_rank=rank, dp_size=4) for rank in range(4)]
    assert [len(rank) for rank in ranks] == [1] * 4 and [len(rank[0]) for rank in ranks] == [1, 1, 1, 0]


def test_epoch_and_seed_change_the_order():
    examples = examples_of(LENGTHS)
    orders = [batches(examples, max_batch_size=4, seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))


def test_file_order_without_shuffling():
    flat = [i for batch in batches(examples_of(LENGTHS), max_batch_size=3, shuffle=False) for i in batch]
    assert flat == list(range(101))


def test_token_limit_counts_real_tokens_of_the_rows_at_hand():
    got = batches(examples_of([100, 2, 95, 3, 2]), max_batch_size=4, max_batch_tokens=100, shuffle=False)
    assert got == [[0], [1, 2, 3], [4]]  # 2 + 95 + 3 fill it exactly; as a padded grid it would be 285


@pytest.mark.parametrize("dp_size", [1, 2])
def test_a_token_budget_is_filled(dp_size):
    """No row limit: every step but the last has no room for the next row, on some replica; the same batches each time."""
    options = dict(max_batch_size=120, max_batch_tokens=120, dp_size=dp_size)
    ranks = [batches(examples_of(LENGTHS), dp_rank=rank, **options) for rank in range(dp_size)]
    filled = [max(sum(LENGTHS[i] for i in batch) for batch in step) for step in zip(*ranks)]
    assert max(filled) <= 120 and min(filled[:-1]) > 120 - max(LENGTHS) and sum(filled[:-1]) / len(filled[:-1]) > 0.8 * 120
    assert ranks == [batches(examples_of(LENGTHS), dp_rank=rank, **options) for rank in range(dp_size)]


def test_ranks_share_the_rows_of_the_larger_batch_evenly():
    lengths = [37 * i % 96 + 2 for i in range(96)]
    one = batches(examples_of(lengths), max_batch_size=8)
    ranks = [batches(examples_of(lengths), max_batch_size=4, dp_rank=rank, dp_size=2) for rank in (0, 1)]
    for whole, *shares in zip(one, *ranks):
        assert sorted(whole) == sorted(i for share in shares for i in share) and [len(share) for share in shares] == [4, 4]
        tokens = [sum(lengths[i] for i in share) for share in shares]
        assert abs(tokens[0] - tokens[1]) <= max(lengths[i] for i in whole) / 2


def test_steps_are_full_and_their_rows_dealt_a_few_times_not_for_every_row(monkeypatch):
    """A limit of tokens on several replicas took minutes of every epoch of a million records."""
    lengths, deals = [10 + 37 * i % 41 for i in range(2000)], []
    monkeypatch.setattr(data, "deal", lambda *args: deals.append(1) or deal(*args))
    ranks = [batches(examples_of(lengths), max_batch_size=1000, max_batch_tokens=1500, shuffle=False, dp_rank=rank, dp_size=4) for rank in range(4)]
    assert len(deals) < 4 * 20 * len(ranks[0])
    steps = [sorted(itertools.chain(*hands)) for hands in zip(*ranks)]
    assert list(itertools.chain(*steps)) == list(range(2000))
    for step, following in itertools.pairwise(steps):
        heaviest = lambda rows: max(sum(lengths[i] for i in hand) for hand in deal(rows, lengths, 4))  # noqa: E731
        assert heaviest(step) <= 1500 < heaviest([*step, following[0]])


def test_batches_mix_lengths():
    """Sorted by length, a batch of short answers gave each of their tokens several times the weight of a long answer's."""
    lengths = [7] * 200 + [35] * 100
    shares = [sum(lengths[i] == 35 for i in batch) / len(batch) for batch in batches(examples_of(lengths), max_batch_size=30)]
    assert all(0.1 < share < 0.6 for share in shares)


def test_packs_are_full_in_order_and_a_row_beyond_the_limit_stands_alone():
    lengths = [3, 2, 6, 1, 1]
    assert pack([0, 1, 2, 3, 4], lengths, max_tokens=5) == [[0, 1], [2], [3, 4]]
    assert pack([4, 3, 2, 1, 0], lengths, max_rows=2) == [[4, 3], [2, 1], [0]]
    assert pack([0, 1, 2, 3, 4], lengths, max_tokens=8, max_rows=2) == [[0, 1], [2, 3], [4]] and pack([], lengths) == []


def test_example_larger_than_the_token_limit_is_named():
    with pytest.raises(ValueError, match="max_batch_tokens=10 has no room for record 2, which has 11 tokens"):
        batches(examples_of([3, 11, 5]), max_batch_size=2, max_batch_tokens=10)


def test_impossible_batching_is_refused():
    with pytest.raises(ValueError, match="max_batch_size=0"):
        batches(examples_of([3]), max_batch_size=0)
    with pytest.raises(ValueError, match="dp_rank=2, dp_size=2"):
        batches(examples_of([3]), max_batch_size=1, dp_rank=2, dp_size=2)
