"""load, generate, stream: what they promise to people who call them from Python; memory that runs out; the chat."""

import gc
import math
import os
import signal
import subprocess
import sys
import weakref

import pytest
import torch
from ranks import run_ranks
from toys import add_bytes_tokenizer, make_hf

from llama_rlhf import generate, generation, load, stream
from llama_rlhf.api import _settled
from llama_rlhf.models import attention
from llama_rlhf.models.kv_cache import KVCache
from llama_rlhf.parallel import groups

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api") / "hf"
    make_hf(folder, "llama", vocab_size=260, max_position_embeddings=256)
    add_bytes_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder, world_of_one):
    return load(str(folder), dtype="fp32")


PROMPTS = ["What is 2 + 3?", "Name a colour.", "?"]


def test_one_prompt_one_response_and_lists_in_place_of_each(model):
    one = generate(model, PROMPTS[0], max_new_tokens=12)
    assert one.text == model.tokenizer.decode(one.tokens) and 0 < len(one.tokens) <= 12
    many = generate(model, PROMPTS, max_new_tokens=12)
    assert many[0] == one and len(many) == 3
    drawn = generate(model, PROMPTS, max_new_tokens=12, n_samples=2, temperature=1.0, with_logprobs=True)
    assert [[r.sample for r in row] for row in drawn] == [[0, 1]] * 3 and all(len(r.logprobs) == len(r.tokens) for row in drawn for r in row)
    assert [r.tokens for r in generate(model, PROMPTS[0], max_new_tokens=12, n_samples=2, temperature=1.0)] == [r.tokens for r in drawn[0]]
    ids = model.tokenizer.encode(PROMPTS[0] + "\n", bos=True)
    assert generate(model, ids, max_new_tokens=12) == one and generate(model, [ids], max_new_tokens=12) == [one]
    assert generate(model, [], max_new_tokens=12) == []


def test_ids_may_be_arrays_and_must_be_of_the_model(model):
    ids = model.tokenizer.encode(PROMPTS[0] + "\n", bos=True)
    one, tensor = generate(model, ids, max_new_tokens=5), torch.tensor(ids)
    assert generate(model, tensor, max_new_tokens=5) == generate(model, tensor.numpy(), max_new_tokens=5) == generate(model, list(tensor.numpy()), max_new_tokens=5) == one
    assert generate(model, tensor[None], max_new_tokens=5) == generate(model, [tensor], max_new_tokens=5) == [one]
    assert "".join(stream(model, tensor, max_new_tokens=5)) == one.text
    for token in (-1, 260):
        with pytest.raises(ValueError, match=f"prompt 2: token {token} is none of this model's, 0 to 259"):
            generate(model, [ids, [5, token]])


def test_what_a_process_has_started_with_holds_for_later_models(folder, model):
    """Asked for another device or number of ranks, a second load went on with the first's and said nothing."""
    assert generate(load(str(folder), dtype="fp32", device="cpu", model_parallel_size=1), "?", max_new_tokens=5) == generate(model, "?", max_new_tokens=5)
    for options in ({"device": "cuda"}, {"model_parallel_size": 2}):
        with pytest.raises(ValueError, match="this process has started on cpu with 1 tensor-parallel ranks"):
            load(str(folder), **options)


def _load_in_groups_of_the_caller(folder):
    import torch.distributed as dist
    dist.init_process_group("gloo")
    return generate(load(str(folder), dtype="fp32", device="cpu"), PROMPTS[0], max_new_tokens=5).tokens


def test_a_model_loads_where_the_caller_has_started_torch_distributed(folder, model):
    assert run_ranks(2, _load_in_groups_of_the_caller, folder) == [generate(model, PROMPTS[0], max_new_tokens=5).tokens] * 2


def test_a_stream_is_the_text_in_pieces(model):
    with pytest.raises(ValueError, match="n_samples=2: a stream is the text of one response"):
        next(stream(model, PROMPTS[1], n_samples=2))
    for several in (PROMPTS, [[1, 2], [3]]):
        with pytest.raises(ValueError, match="a stream is the response to one prompt; `generate` takes several"):
            next(stream(model, several))
    for seed in range(4):
        options = dict(max_new_tokens=60, temperature=1.0, seed=seed)
        pieces, whole = list(stream(model, PROMPTS[1], **options)), generate(model, PROMPTS[1], **options).text
        assert "".join(pieces) == whole and len(pieces) > 3 and all(pieces)
        stop = whole[len(whole) // 2:][:2]
        assert "".join(stream(model, PROMPTS[1], stop=stop, **options)) == whole[:whole.index(stop)]


def test_what_may_still_change_is_not_shown():
    assert _settled("one tw", ["two", "three"]) == "one " and _settled("one th", ["two", "three"]) == "one " and _settled("one", ["two"]) == "one"
    assert _settled("caf\ufffd", []) == "caf"


def test_stop_strings_end_a_response_and_are_no_part_of_it(model):
    plain = generate(model, PROMPTS, max_new_tokens=40, n_samples=3, temperature=1.0)
    n_cut = 0
    for row, cut_row in zip(plain, generate(model, PROMPTS, max_new_tokens=40, n_samples=3, temperature=1.0, stop=["a", "e9"])):
        for whole, cut in zip(row, cut_row):
            at = min((i for end in ("a", "e9") if (i := whole.text.find(end)) >= 0), default=None)
            if at is None:
                assert cut == whole
            else:
                n_cut += 1
                assert cut.text == whole.text[:at] and cut.finished and cut.tokens == whole.tokens[:len(cut.tokens)] and len(cut.tokens) <= len(whole.tokens)
                assert "a" not in model.tokenizer.decode(cut.tokens[:-1])
    assert n_cut
    with pytest.raises(ValueError, match="empty stop string"):
        generate(model, "?", stop="")


def test_a_message_alone_is_refused_and_no_stop_string_is_none(model):
    with pytest.raises(ValueError, match=r"a message of a conversation is .*, not {'role': 'user', 'text': 'x'}"):
        generate(model, [{"role": "user", "text": "x"}], use_chat_template=False)
    with pytest.raises(ValueError, match="a conversation is a list of messages"):
        generate(model, {"role": "user", "content": "What?"})
    with pytest.raises(ValueError, match="a conversation is a list of messages"):
        next(stream(model, {"role": "user", "content": "What?"}))
    assert generate(model, "What?", max_new_tokens=4, stop=None).tokens == generate(model, "What?", max_new_tokens=4).tokens


def test_conversations_need_a_chat_template_and_say_so(model):
    with pytest.raises(ValueError, match="chat"):
        generate(model, [{"role": "user", "content": "?"}])


def test_fewer_rows_at_once_change_nothing(model, capsys):
    options = dict(max_new_tokens=20, n_samples=4, temperature=1.0)
    expected = generate(model, PROMPTS, **options)
    config, statistics = model.model.config, generation.Statistics()
    per_token = 2 * config.n_layers * config.n_kv_heads * config.head_dim * 4
    longest = max(len(model.tokenizer.encode(p + "\n", bos=True)) for p in PROMPTS) + 20
    assert generate(model, PROMPTS, max_cache_gb=3.5 * per_token * longest / 1e9, statistics=statistics, **options) == expected
    assert statistics.slots == 3 and statistics.cache_bytes <= 4 * per_token * 64 and "3 rows at once instead of 12" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--max_cache_gb .*one row of .* tokens needs"):
        generate(model, PROMPTS, max_cache_gb=1e-9, **options)


def test_keys_and_values_take_what_free_memory_leaves_beside_a_prefill(model, monkeypatch):
    """A cache of nine tenths of what was free left a prefill no room: the run was killed where a container bounds memory."""
    lengths, statistics = [len(model.tokenizer.encode(p + "\n", bos=True)) for p in PROMPTS], generation.Statistics()
    longest, config = max(lengths) + 20, model.model.config
    slot = 2 * config.n_layers * config.n_kv_heads * config.head_dim * 4 * longest
    # at least what stands in a layer's feed-forward at once: its input, gate and up, their product
    least = 12 * longest * (config.dim + 3 * config.ffn_dim) * 4
    monkeypatch.setattr(generation.groups, "free_memory", lambda: least + 5 * slot)
    generate(model, PROMPTS, max_new_tokens=20, n_samples=4, temperature=1.0, statistics=statistics)
    assert 1 <= statistics.slots <= 5
    monkeypatch.setattr(generation.groups, "free_memory", lambda: 1 << 33)
    statistics = generation.Statistics()
    generate(model, PROMPTS, max_new_tokens=20, n_samples=4, temperature=1.0, statistics=statistics)
    assert statistics.slots == 12


def test_out_of_memory_while_generating_halves_the_batch(model, monkeypatch, capsys):
    options = dict(max_new_tokens=20, n_samples=4, temperature=1.0, with_logprobs=True)
    expected = [[(r.text, r.tokens) for r in row] for row in generate(model, PROMPTS, **options)]
    decode, failures = generation._Batch.decode, [3, 9, 30]     # which decode steps fail

    def failing(self):
        failing.n += 1
        if failing.n in failures:
            raise torch.OutOfMemoryError("CUDA out of memory.") if failing.n != 9 else RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
        return decode(self)

    failing.n = 0
    monkeypatch.setattr(generation._Batch, "decode", failing)
    statistics = generation.Statistics()
    assert [[(r.text, r.tokens) for r in row] for row in generate(model, PROMPTS, statistics=statistics, **options)] == expected
    assert statistics.slots == 1 and capsys.readouterr().out.count("out of memory") == 3
    monkeypatch.setattr(generation._Batch, "decode", lambda self: (_ for _ in ()).throw(RuntimeError("another fault")))
    with pytest.raises(RuntimeError, match="another fault"):
        generate(model, PROMPTS, **options)

    def among_others(self):     # whose ranks wait: one that goes back alone would leave them waiting
        assert monkeypatch.setattr(groups, "tp_size", lambda: 2) is None
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for decode, n in ((lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.")), 3), (among_others, 0)):      # 12, 6, 3 rows, and one
        monkeypatch.setattr(generation._Batch, "decode", decode)
        with pytest.raises(torch.OutOfMemoryError):
            generate(model, PROMPTS, **options)
        assert capsys.readouterr().out.count("out of memory") == n


@pytest.mark.parametrize("said", ["CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'", "CUDA driver error: out of memory",
                                  "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"])
def test_memory_that_cuda_lacks_is_made_by_the_batch_that_failed(model, monkeypatch, said):
    """Kernels, graphs and cuBLAS take theirs beside torch's, which must give back what the failed batch held: nobody may hold that any more."""
    prefill, free, caches, held = generation._Batch.prefill, generation._free, [], []

    def failing(self, waiting):
        caches.append(weakref.ref(self.cache))
        if len(caches) == 1:
            raise RuntimeError(said)
        return prefill(self, waiting)

    monkeypatch.setattr(generation._Batch, "prefill", failing)
    monkeypatch.setattr(generation, "_free", lambda: held.append(caches[0]()) or free())
    statistics = generation.Statistics()
    generate(model, PROMPTS, max_new_tokens=5, n_samples=4, statistics=statistics)
    assert statistics.slots == 6 and held == [None]


def test_the_cache_is_gone_when_generation_ends(model, monkeypatch):
    """At once, not when garbage is collected: the memory is the next phase's."""
    caches, make = [], generation._Batch.__init__

    def watched(self, *args, **kwargs):
        make(self, *args, **kwargs)
        caches.append(weakref.ref(self.cache))

    monkeypatch.setattr(generation._Batch, "__init__", watched)
    gc.disable()
    try:
        generate(model, PROMPTS, max_new_tokens=5)
    finally:
        gc.enable()
    assert [cache() for cache in caches] == [None]


def test_recorded_decode_steps_give_the_same_tokens(model, monkeypatch):
    """Without a GPU the recording is played by computing the step again with its rounded-up rows and positions: surplus rows must harm nobody."""
    from llama_rlhf import decode_graphs
    lone = dict(max_new_tokens=60, n_samples=7, temperature=1.0, max_batch_size=13)
    expected = generate(model, PROMPTS, **lone)
    recordings = []

    class Recorder:
        def __call__(self, step):
            recordings.append(states := step())
            return (lambda: states.copy_(step())), states

    with pytest.raises(ValueError, match="--cuda_graphs always is for CUDA"):
        generate(model, PROMPTS, cuda_graphs="always")
    with pytest.raises(ValueError, match="use auto, always or never"):
        generate(model, PROMPTS, cuda_graphs="yes")
    monkeypatch.setattr(decode_graphs, "Recorder", Recorder)
    monkeypatch.setattr(decode_graphs, "_FEWEST_POSITIONS", 32)
    monkeypatch.setattr(generation, "records_steps", lambda *_: True)
    generated = generate(model, PROMPTS, **lone)
    assert [[r.tokens for r in row] for row in generated] == [[r.tokens for r in row] for row in expected]
    shapes = [len(states) for states in recordings]
    assert set(shapes) >= {2, 4, 8, 13} and 16 not in shapes and len(shapes) < 15


def test_steps_are_recorded_where_one_gpu_holds_a_model_without_experts():
    from llama_rlhf.decode_graphs import records_steps
    from llama_rlhf.models import PRESETS
    dense, experts = PRESETS["smollm2-135m"], PRESETS["mixtral-8x7b"]
    for device, tp, config, found in (("cuda", 1, dense, [True, True]), ("cuda", 2, dense, [False, True]), ("cuda", 1, experts, [False, "cannot be recorded"]),
                                      ("cpu", 1, dense, [False, "is for CUDA"])):
        with groups.pretend(tp, device=device):
            assert records_steps("auto", config) is found[0] and not records_steps("never", config)
            if found[1] is True:
                assert records_steps("always", config)
            else:
                with pytest.raises(ValueError, match=found[1]):
                    records_steps("always", config)


def test_on_a_gpu_all_rows_are_tried_when_no_bound_is_given(model):
    """On a CPU free memory bounds them; there the allocation itself tells."""
    from llama_rlhf.parallel import groups
    with groups.pretend(1, device="cuda"):
        assert generation._slots_in(model.model, 7, 100, -1.0) == 7
        assert generation._slots_in(model.model, 7, 100, 2.5 * model.model.cache_bytes(1, 100) / 1e9) == 2


def _short_of_memory(folder, limit):
    """A cache of more than `limit` slots cannot be had on rank 1."""
    make = KVCache.__init__

    def bounded(self, n_layers, n_slots, *args, **options):
        if groups.rank() == 1 and n_slots > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        make(self, n_layers, n_slots, *args, **options)

    model, statistics = load(str(folder), dtype="fp32", device="cpu"), generation.Statistics()
    options = dict(max_new_tokens=10, n_samples=4, temperature=1.0)
    expected = generate(model, PROMPTS, **options)
    KVCache.__init__ = bounded
    try:
        same = generate(model, PROMPTS, statistics=statistics, **options) == expected
    except torch.OutOfMemoryError as error:
        return str(error)
    return same, statistics.slots


def test_all_ranks_halve_the_batch_together(folder):
    assert run_ranks(2, _short_of_memory, folder, 5) == [(True, 3)] * 2
    assert all("no memory for a single row" in said for said in run_ranks(2, _short_of_memory, folder, 0))


def test_the_chat(folder, tmp_path):
    """Two questions of a base model, one too long for it; a conversation with a template is rendered from all its turns (test_tokenizer)."""
    lines = ["What is 2 + 3?", "x" * 300, "/new", "", "Name a colour."]
    command = [sys.executable, "-m", "llama_rlhf.chat", "--ckpt_dir", str(folder), "--device", "cpu", "--dtype", "fp32", "--max_new_tokens", "16", "--temperature", "0"]
    done = subprocess.run(command, input="\n".join(lines) + "\n", cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "No chat template here" in done.stdout and done.stdout.count("tokens/s]") == 2 and "fit max_seq_len=256" in done.stdout, done.stdout


def test_ctrl_c_ends_an_answer_and_not_the_chat(folder):
    command = [sys.executable, "-u", "-m", "llama_rlhf.chat", "--ckpt_dir", str(folder), "--device", "cpu", "--max_new_tokens", "240", "--temperature", "2"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as chat:
        chat.stdin.write(b"Why?\n")
        chat.stdin.flush()
        said = b""
        while len(said.rpartition(b"\n> ")[2]) < 5 or b"\n> " not in said:      # the first letters of the answer are there
            said += chat.stdout.read(1)
        chat.send_signal(signal.SIGINT)
        said, error = chat.communicate(b"And now?\n", timeout=300)
    assert chat.returncode == 0 and said.count(b"tokens/s]") == 2 and b"[240 tokens" not in said.partition(b"tokens/s]")[0], (said, error)


def test_what_the_chat_cannot_sample_with_is_refused_before_a_model_is_read(tmp_path):
    for flag, said in (("--temperature=-1", "temperature -1.0"), ("--max_new_tokens=0", "--max_new_tokens 0: must be at least 1")):
        done = subprocess.run([sys.executable, "-m", "llama_rlhf.chat", f"--ckpt_dir={tmp_path}/nothing", flag], input="Hello\n", cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and said in done.stderr


def test_the_lines_of_the_readme_run(folder, model, capsys):
    with open(os.path.join(ROOT, "README.md")) as file:
        code = file.read().split("```python\n")[1].split("```")[0]
    code = code.replace('"runs/solver")', f'{str(folder)!r}, dtype="fp32")').replace('"Tell me a story."', '"Tell me a story.", max_new_tokens=30')
    names = {"questions": PROMPTS}
    exec(code, names)
    said = capsys.readouterr().out
    assert said.startswith(generate(model, "What is 17 + 25?").text + "\n") and said.endswith(generate(model, "Tell me a story.", max_new_tokens=30).text)
    assert [len(row) for row in names["answers"]] == [8] * 3 and all("\n\n" not in r.text for row in names["answers"] for r in row)


@pytest.mark.parametrize("name", ["llama-9-3", "mistral-window", "mixtral", "bloom", "qwen1"])
def test_what_all_prompts_begin_with_is_computed_once(name, world_of_one, tmp_path, monkeypatch):
    """Rotary and ALiBi positions, sliding windows shorter than the common part, experts; first-generation Qwen's keys depend on the row and are left alone."""
    from llama_rlhf.checkpoint.shards import load_model
    make_hf(tmp_path, name)
    model = load_model(str(tmp_path))
    common = [5, 9, 11, 7, 3, 8, 20, 21, 30]
    prompts = [common + [40 + i] * (1 + i % 4) for i in range(7)] + [common + [41]]
    found = []
    for saves, queries in ((1 << 40, 128), (1, 128), (1, 2)):       # in one piece, and a few queries and rows at a time
        monkeypatch.setattr(generation, "_PREFIX_SAVES", saves)
        monkeypatch.setattr(attention, "_QUERIES", queries)
        monkeypatch.setattr(attention, "_BEHIND_TOKENS", 15 * queries)
        facts = generation.Statistics()
        rows = generation.generate(model, prompts, eos_ids=(2,), max_new_tokens=9, n_samples=2, max_batch_size=5, with_logprobs=True, sampling=generation.Sampling(1.0, seed=3), statistics=facts)
        found.append((facts.prompt_tokens, [c for row in rows for c in row]))
    (all_tokens, plain), (fewer, shared), (again, in_pieces) = found
    assert again == fewer
    if model.config.ntk_beyond:
        assert all_tokens == fewer
    else:       # two samples of a prompt that start apart prefill it twice
        assert all_tokens - fewer >= 7 * len(common) and (all_tokens - fewer) % len(common) == 0
    for a, b in [*zip(plain, shared), *zip(plain, in_pieces)]:
        assert a.tokens == b.tokens and a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert generation._prefix(model, [common, common]) == (0 if model.config.ntk_beyond else len(common) - 1)


def test_a_long_common_beginning_is_not_multiplied_by_the_rows(world_of_one, tmp_path, monkeypatch):
    """Of 64 rows of 520 tokens, 500 in common, no layer attends with more keys or queries together than one pack of prompts has."""
    from llama_rlhf.checkpoint.shards import load_model
    make_hf(tmp_path, "llama-9-3", max_position_embeddings=600)
    model = load_model(str(tmp_path))
    common, seen = [3 + n % 50 for n in range(500)], []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, **options):
        seen.append((q.shape[0] * k.shape[2], q.shape[0] * q.shape[2]))
        return attend(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    generation.generate(model, [common + [20 + n] * 20 for n in range(64)], eos_ids=(), max_new_tokens=1, max_batch_size=64)
    keys, queries = map(max, zip(*seen))
    assert len(seen) == 5 * model.config.n_layers and keys <= attention._BEHIND_TOKENS and queries <= 15 * 20 * 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_in_a_sentence(value, folder, world_of_one):
    broken = load(str(folder), dtype="fp32")
    with torch.no_grad():
        broken.model.norm.weight[0] = value
    for options in ({}, {"with_logprobs": True}, {"temperature": 1.0}, {"temperature": 1.0, "with_logprobs": True}, {"temperature": 1.0, "top_p": 0.9},
                    {"temperature": 1.0, "top_k": 3}, {"temperature": 1.0, "min_p": 0.1}):
        with pytest.raises(FloatingPointError, match=r"logits are not finite numbers \(prompt [123], response token 1\).*--dtype bf16 or fp32"):
            generate(broken, PROMPTS, max_new_tokens=4, **options)


def _choose_where_one_rank_has_no_number(value):
    from llama_rlhf.sampling import Sampling, choose
    groups.initialize(device="cpu")
    hidden, weight, found = torch.ones(3, 2), torch.eye(2)[[0, 1, 0, 1, 0]] + groups.tp_rank(), []
    hidden[1] = torch.tensor([value if groups.tp_rank() == 1 else 1.0, 1.0])
    for shared in (True, False):        # gloo's maximum may leave out what is not a number
        if not shared:
            groups._state["shared_memory"] = None
        for temperature, with_logprobs in ((0.0, False), (0.0, True), (1.0, False), (1.0, True)):
            token, logprobs = choose(hidden, weight, [(0, 5), (5, 10)], Sampling(temperature), (torch.arange(3),) * 3, with_logprobs=with_logprobs)
            found.append((token.tolist(), with_logprobs and logprobs[[0, 2]].tolist()))
    groups.shutdown()
    return found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_both_ranks_say_that_one_has_no_number(value):
    a, b = run_ranks(2, _choose_where_one_rank_has_no_number, value)
    assert a == b and len(a) == 8 and all(tokens[1] == -1 and tokens[0] >= 0 and tokens[2] >= 0 for tokens, _ in a)


def _many_ties(size):
    return torch.randint(0, 3, (200, size), generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize("size", [64, 50])        # the first is searched by parts
def test_greedy_takes_the_first_of_the_largest(world_of_one, size):
    from llama_rlhf.sampling import Sampling, choose
    logits = _many_ties(size)
    logits[0, 40] = torch.nan
    token, logprobs = choose(logits, torch.eye(size).bfloat16(), [(0, size)], Sampling(), (torch.zeros(200, dtype=torch.long),) * 3)
    assert logprobs is None and token.tolist() == [-1, *(row.index(max(row)) for row in logits[1:].tolist())]


def _first_of_the_largest():
    from llama_rlhf.parallel.partition import even_ranges
    from llama_rlhf.sampling import Sampling, choose
    groups.initialize(device="cpu")
    ranges = even_ranges(50, groups.tp_size())
    token, _ = choose(_many_ties(50), torch.eye(50)[slice(*ranges[groups.tp_rank()])].bfloat16(), ranges, Sampling(), (torch.zeros(200, dtype=torch.long),) * 3)
    groups.shutdown()
    return token.tolist()


def test_greedy_takes_the_first_of_the_largest_of_all_ranks():
    assert run_ranks(3, _first_of_the_largest) == [[row.index(max(row)) for row in _many_ties(50).tolist()]] * 3


def test_no_number_draws_a_token_without_mass(monkeypatch):
    """At the ends of the ranks' parts, whose boundaries in fp64 may lie apart by a rounding: 1.5 / 2^53 and 1 add up to 1 + 2 / 2^53."""
    from llama_rlhf import sampling
    little = 1.5 / 2 ** 53
    gap = 1.7 / 2 ** 53         # behind the little mass, before the next one as it was rounded
    monkeypatch.setattr(sampling, "all_reduce_", lambda x: x)
    for parts, u, token in (([[1, 1], [1, 1]], 0.5, 2), ([[0, 1], [1, 1]], 0.0, 1), ([[0, 0], [0, 1]], 0.0, 3), ([[1, 0], [0, 0]], 1 - 2 ** -53, 0), ([[1, 2 ** -25], [0, 0]], 1 - 2 ** -53, 1),
                            ([[little, 0], [1, 0]], gap, 0), ([[0, little], [0, 0], [0, 0], [1, 0]], gap, 1)):
        p, found = torch.tensor(parts), torch.zeros(1, dtype=torch.long)
        monkeypatch.setattr(sampling, "all_gather", lambda _, p=p: p.sum(-1, keepdim=True, dtype=torch.float64))
        for rank in range(len(parts)):
            with groups.pretend(len(parts), rank):
                found += sampling._invert(p[rank, None].float(), torch.tensor([u], dtype=torch.float64), 2 * rank)
        assert found == token, (parts, u)


def test_the_smallest_set_that_reaches_top_p_and_the_most_likely_alone(world_of_one):
    """Probabilities of 1/2, 1/4, 1/4: one half is reached by the first; min_p 1 keeps the first as well."""
    from llama_rlhf.sampling import Sampling, choose
    logits, keys = torch.tensor([[2.0, 1.0, 1.0]]).mul(math.log(2)).expand(50, -1), (torch.arange(50),) * 3
    for options, kept in (({"top_p": 0.5}, [0]), ({"min_p": 1.0}, [0]), ({"top_p": 0.51}, [0, 1, 2]), ({"min_p": 0.5}, [0, 1, 2])):
        token, _ = choose(logits, torch.eye(3), [(0, 3)], Sampling(1.0, **options), keys)
        assert token.unique().tolist() == kept, options


def _choices(options, banned, candidates):
    """Next tokens of 300 rows at any number of ranks; in the first hundred the middle ids are all but impossible: a rank may have none to choose."""
    from llama_rlhf.parallel.partition import even_ranges
    from llama_rlhf import sampling
    from llama_rlhf.sampling import Sampling, choose
    sampling._CANDIDATES = candidates
    groups.initialize(device="cpu")
    ranges = even_ranges(11, groups.tp_size())
    start, stop = ranges[groups.tp_rank()]
    logits, keys = _rows_of_logits()
    forbidden = (torch.arange(300) % 2 == 0, banned) if banned else None
    token, logprobs = choose(logits, torch.eye(11)[start:stop], ranges, Sampling(**options), keys, banned=forbidden, with_logprobs=True)
    groups.shutdown()
    return token.tolist(), logprobs.tolist()


def _rows_of_logits():
    logits = torch.randn(300, 11, generator=torch.Generator().manual_seed(0)) * 2
    logits[:100, 3:7] -= 60
    return logits, (torch.arange(300), torch.arange(300) % 4, torch.arange(300) * 7)


@pytest.mark.parametrize("n,candidates", [(1, 2), (1, 9), (3, 2), (3, 256)])        # too few for some rows, enough, all
@pytest.mark.parametrize("options,banned", [({}, []), ({"top_k": 10}, []), ({"top_p": 0.7}, []), ({"top_k": 4, "top_p": 0.8}, []), ({"min_p": 0.2}, [0, 3, 8]),
                                            ({"top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 3}, [])])
def test_a_token_is_the_inverse_of_the_filtered_distribution_at_its_number(n, candidates, options, banned):
    """Against sorting and adding up probabilities in fp64, over the whole vocabulary: top-k, of what is left top-p, of that min-p."""
    from llama_rlhf.sampling import keyed_uniform
    results = run_ranks(n, _choices, {"temperature": 0.7, **options}, banned, candidates)
    assert all(result == results[0] for result in results)
    logits, keys = _rows_of_logits()
    logits[::2, banned] = -torch.inf
    p = (logits.double() / 0.7).softmax(-1)
    for row, u, token, logprob in zip(p, keyed_uniform(options.get("seed", 0), *keys), *results[0]):
        order = row.argsort(descending=True).tolist()[:options.get("top_k", 11)]
        kept, total, among = [], 0.0, sum(row[i] for i in order)
        for i in order:
            if total < options.get("top_p", 1.0) * among and row[i] >= options.get("min_p", 0.0) * row[order[0]]:
                kept.append(i)
            total += row[i]
        q = torch.zeros(11, dtype=torch.float64)
        q[kept] = row[kept] / row[kept].sum()
        assert token == int((q.cumsum(0) <= u).sum()) and abs(logprob - q[token].log()) < 1e-5


def test_random_numbers_are_splitmix64_of_their_keys():
    """Published outputs of splitmix64 for the seed 1234567; and 9 x 8000 keys have so many numbers, evenly spread."""
    from llama_rlhf.sampling import _mix, keyed_uniform
    golden, states = 0x9e3779b97f4a7c15, []
    for n in range(3):
        states.append((1234567 + n * golden + (1 << 63)) % (1 << 64) - (1 << 63))
    assert [x % (1 << 64) for x in _mix(torch.tensor(states)).tolist()] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    keys = torch.cartesian_prod(*[torch.arange(20)] * 3).unbind(1)
    numbers = torch.cat([keyed_uniform(seed, *keys) for seed in range(-4, 5)])
    assert len(numbers.unique()) == 72000 and numbers.min() >= 0 and numbers.max() < 1
    assert (torch.histc(numbers, 10, 0, 1) - 7200).abs().max() < 5 * 7200 ** 0.5


def test_no_end_token_comes_before_min_new_tokens(model):
    ids = model.tokenizer.encode("What?", bos=True)
    ends = set(generation.generate(model.model, [ids], eos_ids=(), max_new_tokens=12)[0][0].tokens)
    (short,), = generation.generate(model.model, [ids], eos_ids=tuple(ends), max_new_tokens=12)
    (long,), = generation.generate(model.model, [ids], eos_ids=tuple(ends), max_new_tokens=12, min_new_tokens=6)
    assert len(short.tokens) == 1 and short.finished and len(long.tokens) >= 6 and ends.isdisjoint(long.tokens[:6])
    (next_one,), = generation.generate(model.model, [ids], eos_ids=tuple(range(2, 260)), max_new_tokens=12, min_new_tokens=6)
    assert len(next_one.tokens) == 7 and next_one.finished and set(next_one.tokens[:6]) <= {0, 1}       # the seventh may be an end again


def test_prompts_prefill_in_packs_and_rows_end_where_there_is_no_more_room(model, monkeypatch):
    """What is computed, in which packs, by hand; where rows end; and that a prompt draws the same numbers in another list."""
    prompts, passes, forward = [[5, 9, 11, 7, 3, 8] + [40 + i] * 3 for i in range(5)], [], generation._Batch._forward
    monkeypatch.setattr(generation._Batch, "_forward", lambda self, slots, tokens, behind: passes.append((slots, [len(row) for row in tokens], behind)) or forward(self, slots, tokens, behind))
    options = dict(eos_ids=(), max_new_tokens=4, n_samples=2, max_batch_size=8, sampling=generation.Sampling(1.0))
    found = {}
    for saves, limit, wanted, computed in ((256, 18, [([0, 2], [9, 9], 0), ([4, 6], [9, 9], 0), ([0], [9], 0)], 45),
                                           (1, 7, [([0], [6], 0), ([0, 2], [3, 3], 6), ([4, 6], [3, 3], 6), ([0], [3], 6)], 21)):
        monkeypatch.setattr(generation, "_PREFIX_SAVES", saves)
        monkeypatch.setattr(generation, "_PREFILL_TOKENS", limit)
        passes.clear()
        facts = generation.Statistics()
        found[saves] = [[row.tokens for row in rows] for rows in generation.generate(model.model, prompts, statistics=facts, **options)]
        assert passes == wanted and facts.prompt_tokens == computed
        assert (facts.new_tokens, facts.decode_rows, facts.slot_steps) == (40, 30, 8 * 6) and all(len(tokens) == 4 for rows in found[saves] for tokens in rows)
    assert found[1] == found[256] and all(first != second for first, second in found[1])
    rest = generation.generate(model.model, prompts[3:], request_ids=[3, 4], **options)
    assert [[row.tokens for row in rows] for rows in rest] == found[1][3:]
    monkeypatch.setattr(generation, "_PREFIX_SAVES", 12)
    assert [generation._prefix(model.model, prompts[:n]) for n in (1, 2, 3)] == [0, 0, 6]
    for most, lengths, ends in ((12, (9, 11), (3, 1)), (9999, (250, 252), (6, 4))):
        rows = generation.generate(model.model, [[5] * n for n in lengths], eos_ids=(), max_new_tokens=20, max_seq_len=most)
        assert [(len(row.tokens), row.finished) for row, in rows] == [(n, False) for n in ends]
    assert [[(row.sample, row.tokens, row.finished) for row in rows] for rows in generation.generate(model.model, prompts[:2], eos_ids=(), max_new_tokens=0, n_samples=2)] == \
        [[(0, [], False), (1, [], False)]] * 2


def test_numbers_out_of_range_are_refused(model):
    for options, said in (({"max_batch_size": 0}, "max_batch_size 0 must be at least 1"), ({"n_samples": 0}, "n_samples 0"), ({"max_seq_len": -5}, "max_seq_len -5"),
                          ({"max_new_tokens": -3}, "max_new_tokens -3 must be at least 0"),
                          ({"temperature": float("nan")}, "temperature nan"), ({"top_k": -1}, "top_k -1"), ({"top_p": 0.0}, "top_p 0.0"), ({"top_p": 1.1}, "top_p 1.1"),
                          ({"min_p": -0.1}, "min_p -0.1"), ({"min_p": 1.1}, "min_p 1.1"), ({"temperature": 1.0, "seed": 1 << 63}, "--seed 9223372036854775808 must be a number of 64 bits")):
        with pytest.raises(ValueError, match=said):
            generate(model, PROMPTS, **options)
    with pytest.raises(ValueError, match="--timeout_seconds inf"):
        groups.initialize(timeout_seconds=float("inf"))
