"""The tensor-parallel collectives: shared memory and gloo give the same sums; timeouts reach every group; a late rank is named."""

import os
import time

import pytest
import torch
from ranks import run_ranks


SUMMED = [("float32", (5, 7)), ("bfloat16", (64, 576)), ("float64", (2, 3)), ("int64", (4, 4)), ("float32", (0, 3)), ("float32", (3, 700_003))]      # the last is larger than one slot


def sums():
    """{(shared memory?, dtype, shape): (sum, largest, parts, sum of a strided one)} on this rank, and mapped files that still have a name."""
    from llama_rlhf.parallel import groups
    from llama_rlhf.parallel.regions import all_gather, all_reduce_
    groups.initialize(device="cpu")
    assert groups.shared_memory() is not None
    found = {}
    for shared in (True, False):
        if not shared:
            groups._state["shared_memory"] = None
        for dtype, shape in SUMMED:
            torch.manual_seed(groups.rank())
            x = torch.randn(shape).mul(3).to(getattr(torch, dtype))
            own = x.clone()
            total, most, parts = all_reduce_(x.clone()), all_reduce_(x.clone(), "max"), all_gather(x)
            strided = all_reduce_(x.t().contiguous().t())        # (a clone keeps strides)
            assert torch.equal(own, x)
            found[shared, dtype, shape] = [t.double().numpy() for t in (total, most, parts, strided)]
    with open("/proc/self/maps") as file:
        left = [line for line in file if "/llama_rlhf-" in line and "(deleted)" not in line]
    groups.shutdown()
    return found, left


@pytest.mark.parametrize("n", [2, 3])
def test_shared_memory_equals_gloo_and_ranks_agree(n):
    """And leaves no file behind; half-precision sums are rounded once."""
    ranks, left = zip(*run_ranks(n, sums))
    assert not any(left)
    for dtype, shape in SUMMED:
        a, *others = (rank[True, dtype, shape] for rank in ranks)
        for b in others:
            assert all((x == y).all() for x, y in zip(a, b)), "ranks hold different bits"
        total, most, parts, strided = a
        tolerance = {"float32": 1e-6, "bfloat16": 2e-2, "float64": 1e-12, "int64": 0.25}[dtype] * 12     # another order of the sum
        for x, y in zip(a, ranks[0][False, dtype, shape]):
            assert x.shape == y.shape and abs(x - y).max(initial=0) <= tolerance
        exact = torch.from_numpy(parts).sum(0)
        if dtype == "bfloat16":
            assert torch.equal(torch.from_numpy(total), exact.to(torch.bfloat16).double())      # sums of three in fp32 are exact here
        assert (most == parts.max(0, initial=-99)).all() and (strided == total).all()


def scattered():
    """Rows of the sum and all rows again, by the collectives that GPUs take, and by those of one host."""
    import warnings

    from llama_rlhf.parallel import groups
    from llama_rlhf.parallel.regions import all_gather_tokens, own_tokens, reduce_scatter_tokens
    groups.initialize(device="cpu")
    found = []
    for takes_them in (False, True):
        if takes_them:
            groups._state["shared_memory"] = None
            torch.Tensor.is_cuda = property(lambda x: True)
        x = torch.arange(14).view(7, 2).float() + groups.rank()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append([t.tolist() for t in (reduce_scatter_tokens(x), all_gather_tokens(own_tokens(x), 7))])
    return found


def test_tokens_divided_by_the_collectives_of_gpus_are_those_of_one_host():
    """gloo has them too; torch 2.13 gave them other names, and warns of those that older ones have."""
    for here, there in run_ranks(3, scattered):
        assert here == there and len(here[0]) == 3 and len(here[1]) == 7


def test_a_full_dev_shm_is_an_error_that_leaves_no_file(world_of_one, monkeypatch):
    import tempfile

    from llama_rlhf.parallel import groups, shared_memory
    make, made = tempfile.mkstemp, []

    def full(descriptor, start, n_bytes):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", lambda **options: made.append(make(**options)) or made[-1])
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MemoryError, match="/dev/shm has no room for 16 MiB"):
        shared_memory.SharedMemoryGroup(groups.tp_group(), 5)
    (descriptor, path), = made
    assert path.startswith("/dev/shm/") and not os.path.exists(path)
    with pytest.raises(OSError):
        os.fstat(descriptor)


def late():
    from llama_rlhf.parallel import groups
    from llama_rlhf.parallel.regions import all_reduce_
    groups.initialize(device="cpu", timeout_seconds=2)
    timeouts = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in (groups.tp_group(), groups.dp_group())]
    if groups.rank() == 1:
        time.sleep(6)
        return timeouts
    started = time.monotonic()
    try:
        all_reduce_(torch.ones(3))
    except RuntimeError as error:
        return timeouts, str(error), time.monotonic() - started
    return timeouts, "no error", 0.0


def test_a_rank_that_does_not_arrive_is_named_in_time_and_the_timeout_reaches_sub_groups():
    (timeouts, message, seconds), others = run_ranks(2, late)
    assert "tensor-parallel rank 1 did not arrive" in message and 1.5 < seconds < 5
    assert timeouts == others == [2.0, 2.0]


def grid():
    from llama_rlhf.parallel import groups
    groups.initialize(2, device="cpu")
    place = groups.rank(), groups.tp_rank(), groups.dp_rank(), groups.tp_size(), groups.dp_size()
    groups.shutdown()
    return place


def test_tensor_parallel_ranks_are_adjacent():
    assert run_ranks(4, grid) == [(0, 0, 0, 2, 2), (1, 1, 0, 2, 2), (2, 0, 1, 2, 2), (3, 1, 1, 2, 2)]


def fails_on_rank_1():
    from llama_rlhf.parallel import groups
    groups.initialize(device="cpu")
    try:
        with groups.together("reading"):
            if groups.rank() == 1:
                raise ValueError("boom-17")
    except ValueError as error:
        return str(error)
    return "no error"


def test_an_error_on_one_rank_ends_all_with_its_message():
    here, there = run_ranks(2, fails_on_rank_1)
    assert there == "boom-17"
    assert here == "rank 1 failed while reading: ValueError: boom-17"


def test_model_parallel_size_must_divide_the_world():
    with pytest.raises(AssertionError, match="does not divide the 3 processes"):
        run_ranks(3, grid)


def _leave_early():
    from llama_rlhf.parallel import groups
    from llama_rlhf.parallel.regions import all_reduce_
    groups.initialize(device="cpu", timeout_seconds=60)
    assert groups.shared_memory() is not None
    all_reduce_(torch.ones(3))
    if groups.tp_rank() == 1:
        return None                 # and the process ends
    started = time.perf_counter()
    with pytest.raises(RuntimeError) as caught:
        all_reduce_(torch.ones(3))
    return str(caught.value), time.perf_counter() - started


def test_a_rank_that_has_ended_is_noticed_within_seconds():
    """Not after --timeout_seconds: the others would wait, and hold their memory, for ten minutes."""
    (message, seconds), _ = run_ranks(2, _leave_early)
    assert "rank 1 (process" in message and "has ended" in message and seconds < 8
