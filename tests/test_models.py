"""Our decoder computes what transformers computes, at any number of ranks. fp32; logits within 1e-4 (sums in another order)."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from toys import MODELS, logits_of, make_hf, make_reference, measure

SIZES = (1, 2, 3, 4)
# max |difference| allowed against transformers, in fp32
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def measured(world_of_one, tmp_path_factory):
    """{(model, number of ranks): what each rank measured}; one start of n processes serves all models."""
    root = tmp_path_factory.mktemp("parity")
    torch.set_num_threads(1)            # tiny operations: a second thread only waits
    for name in MODELS:
        make_reference(str(root / name), name, SIZES)
    torch.set_num_threads(2)
    results = {n: run_ranks(n, measure, [str(root / name) for name in MODELS]) for n in SIZES}
    return {(name, n): [rank[i] for rank in results[n]] for n in SIZES for i, name in enumerate(MODELS)}


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_greedy_text_and_gradients_equal_transformers(name, n, measured):
    for result in measured[name, n]:
        assert result["logits"] < TOLERANCE
        assert result["tokens"], "greedy text differs"
        assert result["logprobs"] < TOLERANCE       # those that come with generated tokens
        assert result["gradients"] < TOLERANCE / 10
        assert result["round trip"], "split into shards and loaded, a weight differs"


def test_no_rank_holds_more_than_its_part(measured):
    """Two ranks of a model whose sizes all divide hold half of every matrix each: replicated norms are all that repeats."""
    (alone,), norms = measured["llama-2-like", 1], 48 * (2 * 2 + 1)
    for rank in measured["llama-2-like", 2]:
        assert rank["weights"] == (alone["weights"] - norms) // 2 + norms


def test_sliding_window_sees_exactly_w_keys(world_of_one, tmp_path):
    """Off by one is invisible in short texts: with W=4, position 4 must not depend on token 0, position 3 must."""
    from llama_rlhf.checkpoint.shards import load_model
    make_hf(tmp_path, "mistral-window", num_hidden_layers=1)
    model = load_model(str(tmp_path))
    with torch.no_grad():
        a, b = logits_of(model, [[1, 2, 3, 4, 5, 6]]), logits_of(model, [[9, 2, 3, 4, 5, 6]])
    assert torch.equal(a[4:], b[4:])
    assert (a[:4] - b[:4]).abs().amax(-1).min() > 1e-3


def test_rows_do_not_see_each_other(world_of_one, tmp_path):
    from llama_rlhf.checkpoint.shards import load_model
    make_hf(tmp_path, "llama")
    model = load_model(str(tmp_path))
    with torch.no_grad():
        a, b = logits_of(model, [[1, 2, 3], [4, 5, 6, 7]]), logits_of(model, [[9, 9, 9], [4, 5, 6, 7]])
    assert torch.equal(a[3:], b[3:])
    assert not torch.equal(a[:3], b[:3])


@pytest.mark.parametrize("dtype, d", [(torch.float32, 4), (torch.bfloat16, 6)])       # 16 bytes a position, and 12
def test_a_cache_keeps_what_its_slots_hold_while_its_room_changes(world_of_one, dtype, d):
    """On a CPU keys stand at the front of their memory with as many positions as the longest row needs: other room, other places, the same memory."""
    from llama_rlhf.models.attention import Rows
    from llama_rlhf.models.kv_cache import KVCache
    torch.manual_seed(0)
    cache, held = KVCache(2, 3, 2, 300, d, dtype=dtype, device="cpu"), {}

    def holds(room, most=300):
        assert cache.k[0].shape[2] == room
        for (slot, layer), (k, v) in held.items():
            for x, kept in ((k, cache.k[layer]), (v, cache.v[layer])):
                assert torch.equal(x.transpose(0, 1)[:, :most], kept[slot, :, :min(len(x), most)])
        assert all(torch.equal(kept, x[:3]) for layer, pair in enumerate(cache._prefix) for kept, x in zip(pair, held[0, layer]))

    for slot, n, room in ((0, 130, 192), (1, 5, 192), (2, 60, 192)):      # a short prompt beside a long row takes nothing from it
        rows = Rows.packed([n])
        cache.begin_prefill([slot], rows)
        for layer in range(2):
            q, *held[slot, layer] = (torch.randn(n, 2, d, dtype=dtype) for _ in range(3))
            cache.prefill(layer, q, *held[slot, layer], rows, None, None)
        holds(room)
        if not slot:
            cache.keep_prefix(3)
    for longest, room in ((200, 256), (130, 256), (60, 64), (131, 192)):
        cache.begin_decode(torch.tensor([min(longest, 130), 5, 60]), longest)
        holds(room, most=60 if longest == 60 or room == 192 else 300)
    assert cache.peak_bytes == 2 * 2 * 3 * 2 * 256 * d * dtype.itemsize      # when it had most room


def test_a_cache_is_filled_to_its_last_position_and_no_further(world_of_one):
    from llama_rlhf.models.attention import Rows
    from llama_rlhf.models.kv_cache import KVCache
    cache = KVCache(1, 2, 1, 70, 4, dtype=torch.float32, device="cpu")
    cache.begin_prefill([0], Rows.packed([70]))
    cache.begin_decode(torch.tensor([69, 3]), 69)
    for begin, said in ((lambda: cache.begin_prefill([0], Rows.packed([2, 71])), "71 tokens does not fit the cache of 70"),
                        (lambda: cache.begin_prefill([0], Rows.packed([1], behind=70)), "71 tokens"),
                        (lambda: cache.begin_decode(torch.tensor([70, 3]), 70), "70 positions is full")):
        with pytest.raises(ValueError, match=said):
            begin()


def test_a_model_is_imported_without_torch_s_compiler():
    """It came along with the attention that GPUs take, and was half of the time to the first token on a CPU."""
    loaded = subprocess.run([sys.executable, "-c", "import sys, llama_rlhf.api; print('torch._dynamo' in sys.modules)"], capture_output=True, text=True,
                            cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    assert loaded.stdout == "False\n", loaded.stderr


def varlen_attn_as_documented(q, k, v, ends_q, ends_k, max_q, max_k, *, window_size, enable_gqa):
    """torch.nn.attention.varlen.varlen_attn, which runs on a GPU only, from its documentation."""
    assert ends_q.dtype == torch.int32 and max_q == max_k == ends_q.diff().max() and enable_gqa
    (left, right), out = window_size, []
    for start, end in itertools.pairwise(ends_q.tolist()):
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= -right) & ((distance <= left) if left >= 0 else True)
        parts = (x[start:end].transpose(0, 1) for x in (q, k, v))
        out.append(F.scaled_dot_product_attention(*parts, attn_mask=seen, enable_gqa=True).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("window,bias", [(None, False), (3, False), (None, True)])     # no family has both
def test_every_form_of_attention_gives_the_same_values_and_gradients(world_of_one, monkeypatch, window, bias):
    """Fused kernel or plain products, rows alone or on one grid, queries in one stretch or several, probabilities kept (rows of 1 x 8 here)
    or computed again: which one runs depends on device, dtype and lengths alone."""
    from llama_rlhf.models import attention, transformer
    torch.manual_seed(0)
    lengths = [9, 8, 9, 4, 1, 2]        # 4: one more than the window
    inputs = [torch.randn(sum(lengths), heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    weight, slopes = torch.randn(sum(lengths), 4, 8), torch.tensor([0.5, 0.25, 0.125, 0.1])
    added = transformer.alibi_bias(slopes, 9, torch.float32) if bias else None
    results = []
    for longest, queries, kept in ((9, 9, 6), (9, 9, 1), (9, 4, 6), (9, 4, 1), (9, 4, 0), (0, 9, 6)):
        for cells in (1 << 20, 1):
            monkeypatch.setattr(attention, "_KEPT_KEYS", kept)
            monkeypatch.setattr(attention, "_PRODUCTS_FP32", longest)
            monkeypatch.setattr(attention, "_QUERIES", queries)
            monkeypatch.setattr(attention, "_GRID_CELLS", cells)
            rows = attention.Rows.packed(lengths)
            assert [grid.n_rows for grid in rows.grids] == ([3, 1, 1, 1] if cells > 1 else [1] * 6)
            out = attention.packed_attention(*inputs, rows, None, window, added)
            results.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    if not bias:
        monkeypatch.setattr(attention, "_takes_any_lengths", lambda q: True)
        monkeypatch.setattr(attention, "_varlen", lambda: (varlen_attn_as_documented, True))
        out = attention.packed_attention(*inputs, attention.Rows.packed(lengths), None, window, None)
        results.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    q, k, v = inputs
    wanted, start = [], 0
    for n in lengths:
        here = slice(start, start + n)
        distance = torch.arange(n)[:, None] - torch.arange(n)
        scores = torch.einsum("ihd,jhd->hij", q[here], k[here].repeat_interleave(2, 1)) / 8 ** 0.5
        if bias:
            scores = scores - slopes[:, None, None] * distance
        scores = scores.masked_fill((distance < 0) | (distance >= (window or n)), -torch.inf)
        wanted.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[here].repeat_interleave(2, 1)))
        start += n
    wanted = torch.cat(wanted)
    wanted = [wanted, *torch.autograd.grad((wanted * weight).sum(), inputs)]
    for result in results:
        for a, b in zip(result, wanted):
            assert (a - b).abs().max() < 1e-5


def test_attention_takes_a_gradient_that_is_one_number_in_memory(world_of_one):
    """That of a plain sum: its strides are 0."""
    from llama_rlhf.models.attention import Rows, packed_attention
    torch.manual_seed(0)
    inputs = [torch.randn(7, heads, 4, requires_grad=True) for heads in (4, 2, 2)]
    out = packed_attention(*inputs, Rows.packed([3, 4]), None, None)
    found, wanted = (torch.autograd.grad(out, inputs, ones, retain_graph=True) for ones in (torch.ones(1).expand_as(out), torch.ones_like(out)))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_the_places_of_rows_are_found_without_a_loop_over_them():
    """By hand; and in as many operations for 300 rows as for 3. (A plan, which runs each on tensors without storage, took half a minute for a loop's.)"""
    from torch.utils._python_dispatch import TorchDispatchMode

    from llama_rlhf.models.attention import Grid

    class Count(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.n += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for times in (1, 100):
        with Count() as count:
            grid = Grid([3, 1, 2] * times, slice(0, 6 * times), torch.device("cpu"))
            there, filled, empty = (x.tolist() for x in grid.routes(2, 5, (0, 2, 3)))
            cells = grid.cells.tolist()
        counts.append(count.n)
    assert counts[0] == counts[1]
    begin, place, tokens, behind = 0, iter(range(2 * 3 * 300)), {}, {}      # [row, head, position of the stretch], stretch by stretch
    for start, stop in ((0, 2), (2, 3)):
        for row, head, at in itertools.product(range(300), range(2), range(start, stop)):
            n, begin = (3, 1, 2)[row % 3], row // 3 * 6 + (0, 3, 4)[row % 3]
            goes = next(place)
            assert there[goes] == (begin + min(at, n - 1)) * 5 + head
            (tokens if at < n else behind)[row, at, head] = goes
    assert filled == [tokens[key] for key in sorted(tokens)] and empty == [behind[key] for key in sorted(behind)]
    assert cells == [row * 3 + at for row, at, head in sorted(tokens) if not head]


def test_presets_have_the_published_parameter_counts():
    """Counts: Hugging Face model pages and index files (total_size / 2 bytes)."""
    from llama_rlhf.models import PRESETS
    published = {"llama-1-7b": 6738415616, "llama-1-13b": 13015864320, "llama-1-33b": 32528943616, "llama-2-7b": 6738415616,
                 "llama-2-13b": 13015864320, "llama-2-70b": 68976648192, "mistral-7b-instruct-v0.2": 7241732096,
                 "qwen-7b": 7721324544, "qwen-14b": 14167290880, "qwen-72b": 72287920128, "tinyllama-1.1b": 1100048384,
                 "llama-3-8b": 8030261248, "llama-3-70b": 70553706496, "mixtral-8x7b": 46702792704, "qwen3-30b-a3b": 30532122624,
                 "qwen3-235b-a22b": 235093634560, "bloom-560m": 559214592, "bloom-1b1": 1065314304, "qwen3-32b": 32762123264, "llama-3.2-1b": 1235814400,
                 "qwen2.5-0.5b": 494032768, "qwen2.5-7b": 7615616512,
                 "qwen3-0.6b": 596049920, "smollm2-135m": 134515008}
    assert {name: PRESETS[name].n_parameters for name in published} == published


@pytest.mark.parametrize("n", range(1, 17))
def test_every_row_belongs_to_exactly_one_rank(n):
    from llama_rlhf.models import PRESETS
    from llama_rlhf.parallel.partition import Partition
    for name, config in PRESETS.items():
        plan = Partition(config, n)
        for kind, ranges in plan.owned.items():
            assert [ranges[0][0], *(stop for _, stop in ranges)] == [*(start for start, _ in ranges), plan.full[kind]], (name, kind)
        for rank in range(n):           # each query finds its own kv head among those its rank holds
            first = plan.kv_heads[rank][0]
            wanted = [h * config.n_kv_heads // config.n_heads for h in range(*plan.heads[rank])]
            assert [first + i for i in plan.kv_of_query(rank)] == wanted, (name, n, rank)
            assert plan.kv_heads[rank] == (min(wanted, default=first), max(wanted, default=first - 1) + 1), (name, n, rank)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_gradients_of_norm_and_rotary_are_those_in_fp64(monkeypatch, dtype, tolerance):
    """By blocks of rows, the last one smaller; errors relative to the mean size, bf16's spacing being 4e-3 to 8e-3 of a number."""
    from llama_rlhf.models import transformer
    monkeypatch.setattr(transformer, "_NORM_CELLS", 300 * 48)
    monkeypatch.setattr(transformer, "_ROTARY_CELLS", 300 * 48)
    torch.manual_seed(0)
    x, grad = (torch.randn(1000, 3, 16).to(dtype) + 0.25 for _ in range(2))
    weight = (1 + 0.3 * torch.randn(16)).to(dtype)
    turn = transformer.rotary_table(torch.arange(1000) % 90, torch.rand(8))
    norm = transformer.RMSNorm(16, 1e-5, dtype)
    norm.weight = torch.nn.Parameter(weight)
    for name, ours, exact in (("norm", norm, lambda x, w: F.rms_norm(x, (16,), w, 1e-5)),
                              ("rotary", lambda x: transformer.apply_rotary(x, turn[:len(x)]),
                               lambda x, w: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn[:len(x)]).flatten(-2))):
        mine, wide, w = x.clone().requires_grad_(), x.double().requires_grad_(), weight.double().requires_grad_()
        y, wanted = ours(mine), exact(wide, w)
        y.backward(grad)
        wanted.backward(grad.double())
        pairs = [(y, wanted), (mine.grad, wide.grad)] + ([(norm.weight.grad, w.grad)] if name == "norm" else [])
        for got, expected in pairs:
            assert got.dtype == dtype and ((got - expected).square().mean().sqrt() / expected.abs().mean()) < tolerance, (name, dtype)
        assert ours(mine[:0]).shape == (0, 3, 16) and ours(mine[:, :0]).shape == (1000, 0, 16)      # no tokens, no heads on this rank
        with torch.no_grad():       # scoring passes, by blocks; decoding, all at once
            assert torch.equal(ours(x), y), (name, dtype)
            assert torch.equal(ours(x[:7]), y[:7]), (name, dtype)
            small = x * 2e-3        # where eps counts
            assert ((ours(small[:7]) - exact(small[:7].double(), w)).square().mean().sqrt() / exact(small[:7].double(), w).abs().mean()) < tolerance, (name, dtype)


def test_rotary_turns_bf16_states_by_fp32_angles():
    """bf16 cannot tell position 257 from 256: the angle must be computed in fp32 and only the turned state rounded."""
    from llama_rlhf.models.transformer import apply_rotary, rotary_table
    turn = rotary_table(torch.tensor([256, 257]), torch.tensor([1.0]))
    turned = apply_rotary(torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]]).bfloat16(), turn)
    angle = torch.tensor([256.0, 257.0])
    assert turned.dtype == torch.bfloat16
    assert (turned[:, 0].float() - torch.stack([angle.cos(), angle.sin()], -1)).abs().max() < 2e-3     # half a bf16 unit at 1


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_states_asked_for_are_those_of_a_full_pass(world_of_one, tmp_path, recompute):
    """The last block leaves the other tokens out: values, and gradients of every weight, must not notice."""
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.models.attention import Rows
    make_hf(tmp_path, "llama")
    model = load_model(str(tmp_path), trainable=True)
    model.recompute(recompute)
    lengths, at = [3, 7, 1, 5], torch.tensor([4, 2, 15, 9])     # rows that are not in order of length, places that are not in order
    tokens, weight = torch.randint(0, 101, (16,)), torch.randn(4, 48)
    results = []
    for states in (model(tokens, Rows.packed(lengths), at=at), model(tokens, Rows.packed(lengths))[at]):
        model.zero_grad()
        (states * weight).sum().backward()
        results.append([states, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) == 1 + 2 * 6 + 2      # the states; six weights a block, the embedding and the last norm
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(*results))


def test_new_adapters_and_heads_are_drawn_by_the_seed_as_published(world_of_one, tmp_path):
    """A uniform within 1 / sqrt(fan in), each its own; B zero; a value head N(0, 1 / (d + 1)), without bias."""
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.models.transformer import ValueModel
    from llama_rlhf.parallel.layers import Lora
    make_hf(tmp_path, "llama")
    first, again, other = ({name: p.detach() for name, p in load_model(str(tmp_path), ValueModel, lora=Lora(16, 16.0), seed=seed).named_parameters() if p.requires_grad}
                           for seed in (1, 1, 2))
    drawn = [name for name in first if name.endswith(("lora_a", "value_head.weight"))]
    assert len(drawn) == 2 * 4 + 1 and all(not x.any() for name, x in first.items() if name not in drawn)
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in drawn)
    values = torch.cat([first[name].flatten() * first[name].shape[1] ** 0.5 for name in drawn if "lora" in name])
    assert values.abs().max() < 1 and abs(values.std() - 3 ** -0.5) < 0.01 and abs(values.mean()) < 0.03
    assert len({x[0, 0].item() for name in drawn for x in first[name].split(16)}) == 2 * 7 + 1, "no two are the same draw"
    heads = torch.cat([load_model(str(tmp_path), ValueModel, seed=seed).value_head.weight.detach().flatten() for seed in range(20)])
    assert abs(heads.std() * 49 ** 0.5 - 1) < 0.1       # 960 numbers: 4 standard errors


def test_a_frozen_base_is_shared_only_where_it_is_the_same_to_the_bit(world_of_one, tmp_path):
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.parallel.layers import Lora
    make_hf(tmp_path / "one", "llama")
    make_hf(tmp_path / "other", "llama", change=lambda model: model.model.layers[1].mlp.down_proj.weight.data[3, 4].add_(1e-3))
    first, alone = (load_model(str(tmp_path / name), lora=Lora(2, 2.0)) for name in ("one", "other"))
    beside, donor = load_model(str(tmp_path / "other"), lora=Lora(2, 2.0), share=[first]), dict(first.named_parameters())
    own = {name for name, p in beside.named_parameters() if p is not donor[name]}
    assert own == {name for name, p in donor.items() if p.requires_grad} | {"layers.1.feed_forward.w2.weight"}
    assert all(torch.equal(p, q) for p, q in zip(beside.parameters(), alone.parameters()))


def test_ranges_follow_each_other_and_differ_by_one_at_most():
    from llama_rlhf.parallel.partition import even_ranges
    for size, n in itertools.product((1, 7, 10, 11, 100), (1, 3, 4, 16)):
        ranges = even_ranges(size, n)
        lengths = [stop - start for start, stop in ranges]
        assert [i for start, stop in ranges for i in range(start, stop)] == list(range(size)) and len(ranges) == n and max(lengths) - min(lengths) <= 1
