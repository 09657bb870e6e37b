"""The same training at 1, 2 and 3 ranks, however the batch is split; and the losses against plain formulas."""

import pytest
import torch
from ranks import run_ranks
from toys import make_hf

# (tokens, prompt length): responses of unequal length, so that a mean of means would differ from the true mean
ROWS = [([1, 5, 6, 7, 8, 9, 10, 11], 3), ([2, 3, 4], 2), ([12, 13, 14, 15, 16, 17], 1), ([20, 21, 22, 23], 2)]


def train(folder, lora_rank, splits, n_steps, tp=-1, dtype="float32", recompute="none", precision="master", zero=0, sequence_parallel=False, buffer_bytes=None):
    """n_steps of AdamW on ROWS; returns merged gradients of the first step, weights after the last, losses, norms."""
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.parallel import gradients, groups
    from llama_rlhf.parallel.layers import Lora, piece_of, walk
    from llama_rlhf.trainer import Trainer, response_logprobs
    if buffer_bytes:
        gradients.BUCKET_BYTES = gradients._FLUSH_BYTES = buffer_bytes
    groups.initialize(tp, device="cpu")
    model = load_model(folder, lora=Lora(lora_rank, 8.0) if lora_rank > 0 else None, dtype=getattr(torch, dtype), seed=3)
    model.recompute(recompute)
    model.sequence_parallel(sequence_parallel)
    # Adam's first step is the sign of the gradient: where that is rounding noise, so is the step. A large eps damps it
    trainer = Trainer(model, lr=1e-2, eps=1e-3, total_steps=n_steps, weight_decay=0.1, max_grad_norm=0.5, precision=precision, zero=zero)
    mine = [batch[groups.dp_rank()::groups.dp_size()] for batch in splits]
    first = {}

    def keep_gradients(update):
        def wrapped(lr, clip):
            for *_, parameter, pieces in walk(model):
                if parameter.requires_grad:
                    for native, piece in pieces:
                        first.setdefault(native, (piece_of(trainer.gradient_of(parameter), piece, owned=True).tolist(), piece.dim))
            update(lr, clip)
        return wrapped

    trainer._update = keep_gradients(trainer._update)
    results = [trainer.step(mine, lambda batch: -response_logprobs(model, [ROWS[i][0] for i in batch], [ROWS[i][1] for i in batch]).sum(),
                            lambda batch: sum(len(ROWS[i][0]) - ROWS[i][1] for i in batch)) for _ in range(n_steps)]
    weights = {native: (piece_of(parameter.detach().float(), piece, owned=True).tolist(), piece.dim)
               for *_, parameter, pieces in walk(model) for native, piece in pieces}
    replicated = {native: parameter.detach().float().numpy().tobytes() for name, _, _, parameter, pieces in walk(model)
                  for native, piece in pieces if piece.dim is None}
    shared = {native: piece_of(parameter.detach().float(), piece).tolist() for *_, parameter, pieces in walk(model)
              for native, piece in pieces if piece.shared}
    held = {native: piece.held for *_, pieces in walk(model) for native, piece in pieces if piece.shared}
    groups.shutdown()
    return first, weights, [r.loss for r in results], [r.grad_norm for r in results], replicated, shared, held


def merged(outputs, which):
    """{native name: full tensor} from what each rank owns."""
    full = {}
    for native, (_, dim) in outputs[0][which].items():
        parts = [torch.tensor(output[which][native][0]) for output in outputs]
        full[native] = parts[0] if dim is None else torch.cat([p for p in parts if p.numel()], dim)
    return full


@pytest.mark.parametrize("name,lora_rank", [("llama", -1), ("llama", 3), ("llama-9-3", -1), ("llama-9-3", 3), ("llama-tied-scaled", -1),
                                            ("qwen2", -1), ("qwen3", -1), ("qwen3", 3)])
def test_gradients_and_three_steps_are_the_same_at_1_2_3_ranks(name, lora_rank, tmp_path):
    """Uneven heads, shared kv heads, biases, per-head norms, adapters: 1e-5 in fp32. Replicas must agree to the bit."""
    make_hf(tmp_path, name)
    one = run_ranks(1, train, str(tmp_path), lora_rank, [[0, 1, 2, 3]], 3)
    for n in (2, 3, 5):
        many = run_ranks(n, train, str(tmp_path), lora_rank, [[0, 1, 2, 3]], 3)
        for which in (0, 1):
            a, b = merged(one, which), merged(many, which)
            assert a.keys() == b.keys()
            for native in a:
                assert a[native].shape == b[native].shape, native
                assert (a[native] - b[native]).abs().max() < 1e-5, (("gradient", "weight")[which], native, n)
        assert torch.allclose(torch.tensor(one[0][2]), torch.tensor(many[0][2]), atol=1e-5)
        assert torch.allclose(torch.tensor(one[0][3]), torch.tensor(many[0][3]), rtol=1e-4)
        for output in many[1:]:
            assert output[4] == many[0][4], "replicated parameters differ in bits"
            assert output[3] == many[0][3], "the gradient norm differs between ranks"
        for native in many[0][5]:       # a kv head on several ranks stays one head
            rows = {}
            for output in many:
                for row, values in zip(range(*output[6][native]), output[5][native]):
                    assert rows.setdefault(row, values) == values, (native, row)


@pytest.mark.parametrize("name,lora_rank,recompute", [("llama", -1, "none"), ("llama-9-3", 3, "all"), ("qwen3", -1, "mlp"), ("bloom", -1, "none"), ("bloom", 3, "none"),
                                                      ("mixtral", -1, "none")])
def test_sequence_parallel_gives_the_same_gradients_and_steps(name, lora_rank, recompute, tmp_path):
    """21 tokens on 2 and 5 ranks divide into neither; biases, LayerNorm, experts; and to the bit the same on all ranks."""
    make_hf(tmp_path, name)
    one = run_ranks(1, train, str(tmp_path), lora_rank, [[0, 1, 2, 3]], 3)
    for n in (2, 5):
        many = run_ranks(n, train, str(tmp_path), lora_rank, [[0, 1, 2, 3]], 3, -1, "float32", recompute, "master", 0, True)
        for which in (0, 1):
            a, b = merged(one, which), merged(many, which)
            for native in a:
                assert (a[native] - b[native]).abs().max() < 1e-5, (("gradient", "weight")[which], native, n)
        assert torch.allclose(torch.tensor(one[0][3]), torch.tensor(many[0][3]), rtol=1e-4)
        assert all(output[4] == many[0][4] for output in many), "replicated parameters differ in bits"


@pytest.mark.parametrize("limit", [0.05, 1e6, 0.0])
def test_a_step_is_adamw_with_clipping_and_decay_of_matrices_only(limit, world_of_one, tmp_path):
    """AdamW written down (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2). Layouts are compared with each other elsewhere: clipping, decay or the
    averages' rates could be wrong in all of them."""
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.trainer import Trainer, response_logprobs
    make_hf(tmp_path, "qwen2")
    model = load_model(str(tmp_path))
    tokens, prompts = [row for row, _ in ROWS], [n for _, n in ROWS]
    n_tokens = sum(map(len, tokens)) - sum(prompts)
    loss = lambda _: -response_logprobs(model, tokens, prompts).sum()  # noqa: E731
    trainer = Trainer(model, lr=1e-2, eps=1e-3, total_steps=9, schedule="constant", weight_decay=0.1, max_grad_norm=limit)
    named = dict(model.named_parameters())
    weights = {name: p.detach().clone() for name, p in named.items()}
    decayed = {name for name in named if name.startswith("layers") and name.endswith("weight") and "norm" not in name}
    assert len(decayed) == 4 * model.config.n_layers and any(name.endswith("bias") for name in named)
    m, v = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    for t in (1, 2, 3):
        gradients = torch.autograd.grad(loss(0) / n_tokens, list(named.values()))
        norm = sum(g.double().square().sum() for g in gradients).sqrt().item()
        for name, g in zip(named, gradients):
            g = g * min(1.0, limit / norm) if limit else g
            m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.95 * v[name] + 0.05 * g ** 2
            weights[name] *= 1 - 1e-2 * 0.1 * (name in decayed)
            weights[name] -= 1e-2 * m[name] / (1 - 0.9 ** t) / ((v[name] / (1 - 0.95 ** t)).sqrt() + 1e-3)
        assert trainer.step([0], loss, lambda _: n_tokens).grad_norm == pytest.approx(norm, rel=1e-5)
    for name, p in named.items():
        assert (p - weights[name]).abs().max() < 2e-5, name        # fp32; steps of 1e-2


def test_gradients_of_adapters_are_those_of_the_merged_weights_by_the_chain_rule(world_of_one, tmp_path):
    """W + s B A: dA = s B^T dW, dB = s dW A^T. Layouts are compared with each other elsewhere, and could all be wrong."""
    from llama_rlhf.checkpoint.shards import load_model, save_model
    from llama_rlhf.parallel.layers import Lora, piece_of, walk
    from llama_rlhf.trainer import response_logprobs
    make_hf(tmp_path / "hf", "llama-9-3")
    model = load_model(str(tmp_path / "hf"), lora=Lora(3, 7.5))
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_b" in name:
            p.data.normal_(std=0.1)
    save_model(model, str(tmp_path / "lora"), companions=str(tmp_path / "hf"))
    gradients = []
    for trained in (model, load_model(str(tmp_path / "lora"))):
        response_logprobs(trained, [row for row, _ in ROWS], [n for _, n in ROWS]).sum().backward()
        gradients.append({native: piece_of(p.grad, piece) for *_, p, pieces in walk(trained) if p.grad is not None for native, piece in pieces})
    values = {native: piece_of(p.detach(), piece) for *_, p, pieces in walk(model) for native, piece in pieces}
    assert len(gradients[0]) == 2 * 2 * 7
    for native, found in gradients[0].items():
        module, half = native.rsplit(".", 1)
        whole = gradients[1][f"{module}.weight"]
        expected = 2.5 * (values[f"{module}.lora_b"].t() @ whole if half == "lora_a" else whole @ values[f"{module}.lora_a"].t())
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()), native


@pytest.mark.parametrize("splits", [[[0], [1], [2], [3]], [[3, 1], [0, 2]], [[0, 1, 2], [3]], [[0, 1, 2, 3], []]])
def test_any_split_into_micro_batches_gives_the_same_gradient(splits, tmp_path):
    make_hf(tmp_path, "llama")
    whole, = run_ranks(1, train, str(tmp_path), -1, [[0, 1, 2, 3]], 1)
    split, = run_ranks(1, train, str(tmp_path), -1, splits, 1)
    assert abs(whole[2][0] - split[2][0]) < 1e-5
    for native in whole[0]:
        assert (torch.tensor(whole[0][native][0]) - torch.tensor(split[0][native][0])).abs().max() < 1e-6, native


def test_data_parallel_equals_one_replica(tmp_path):
    """2 replicas x 1 rank and 2 replicas x 2 ranks, with a batch that gives the replicas unequal token counts."""
    make_hf(tmp_path, "llama")
    one = run_ranks(1, train, str(tmp_path), -1, [[0, 1, 2, 3]], 3, 1)
    for n, tp in ((2, 1), (4, 2)):
        many = run_ranks(n, train, str(tmp_path), -1, [[0, 1, 2, 3]], 3, tp)
        for which in (0, 1):            # gradients too: clipping and Adam would forgive a wrong factor
            a, b = merged(one, which), merged(many[:tp], which)
            for native in a:
                assert (a[native] - b[native]).abs().max() < 1e-5, (which, native)
        assert many[0][1] == many[tp][1], "replicas drifted apart"
        assert many[0][2] == pytest.approx(one[0][2]) and many[0][3] == pytest.approx(one[0][3], rel=1e-4)


@pytest.mark.parametrize("what, lora_rank", [("all", -1), ("mlp", -1), ("2", -1), ("all", 4), ("mlp", 4)])
def test_what_is_recomputed_gives_the_same_gradients(what, lora_rank, tmp_path):
    """With adapters too: the first block's input then has no gradient."""
    make_hf(tmp_path, "llama-9-3", num_hidden_layers=3)
    for n in (1, 2):
        kept, again = (run_ranks(n, train, str(tmp_path), lora_rank, [[0, 1, 2, 3]], 1, -1, "float32", recompute) for recompute in ("none", what))
        for a, b in zip(kept, again):
            for native, (value, _) in a[0].items():
                assert (torch.tensor(value) - torch.tensor(b[0][native][0])).abs().max() < 1e-6, (native, n)


def gradients(folder, lora, recompute, compiled):
    """Of two batches of different lengths, and how many programs torch.compile made."""
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.parallel import groups
    from llama_rlhf.parallel.layers import Lora
    from llama_rlhf.trainer import response_logprobs
    groups.initialize(device="cpu")
    model = load_model(folder, lora=lora and Lora(*lora), seed=3)
    for name, p in model.named_parameters():
        if "lora_b" in name:
            p.data = torch.linspace(-0.1, 0.1, p.numel()).view(p.shape)
    model.recompute(recompute)
    if compiled:
        model.compile_elementwise(backend="aot_eager")
    for batch in ([0, 1], [2, 3], [0, 1, 2, 3]):
        response_logprobs(model, [ROWS[i][0] for i in batch], [ROWS[i][1] for i in batch]).sum().backward()
    return [p.grad.numpy() for p in model.parameters() if p.requires_grad], torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("name,lora,recompute", [("llama", None, "none"), ("llama", (4, 8.0), "all"), ("qwen3", (4, 8.0), "mlp"), ("mixtral", None, "none")])
def test_compiled_elementwise_parts_give_the_same_gradients(name, lora, recompute, n, tmp_path):
    """Traced and differentiated by torch.compile, run without its code generator (which wants a C++ compiler)."""
    make_hf(tmp_path, name)
    plain, compiled = (run_ranks(n, gradients, str(tmp_path), lora, recompute, on) for on in (False, True))
    for (a, none), (b, programs) in zip(plain, compiled):
        assert not none and 0 < programs <= 6
        assert all(abs(x - y).max() < max(1e-5, 2e-6 * abs(x).max()) for x, y in zip(a, b))


def test_what_is_recomputed_is_not_kept(world_of_one):
    """Bytes that backward keeps: all blocks < every second < none, and the feed-forward's share in between."""
    from llama_rlhf.config import ModelConfig
    from llama_rlhf.models.transformer import CausalLM
    from llama_rlhf.trainer import response_logprobs
    config = ModelConfig(family="llama", dim=32, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=8, ffn_dim=96, vocab_size=50)
    model = CausalLM(config).to_empty(device="cpu")
    kept = {}
    for what in ("none", "mlp", "2", "all"):
        storages = {}
        model.recompute(what)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: storages.update({x.untyped_storage()._cdata: x}) or x, lambda x: x):
            response_logprobs(model, [[1] * 40], [1]).sum()
        kept[what] = sum(x.untyped_storage().nbytes() for x in storages.values())
    assert kept["all"] < kept["2"] < 0.75 * kept["none"] and kept["all"] < kept["mlp"] < 0.75 * kept["none"], kept
    with pytest.raises(ValueError, match="--activation_checkpointing 'some'"):
        model.recompute("some")


class Line(torch.nn.Module):
    """One weight matrix of numbers that bf16 and fp16 hold exactly."""

    def __init__(self, dtype):
        super().__init__()
        self.w = torch.nn.Parameter((torch.arange(1, 65, dtype=torch.float32) / 64).to(dtype))


@pytest.mark.parametrize("dtype,precision", [(torch.bfloat16, "master"), (torch.bfloat16, "kahan"), (torch.float16, "master")])
def test_low_precision_training_follows_fp32(dtype, precision, world_of_one):
    """1000 steps at lr 1e-6: plain bf16 weights would not move (an update is far below their spacing); these do, as fp32's."""
    from llama_rlhf.trainer import Trainer
    weights = {}
    for kind, how in ((torch.float32, "master"), (dtype, precision)):
        line = Line(kind)
        start = line.w.detach().float().clone()
        trainer = Trainer(line, lr=1e-6, total_steps=1000, schedule="constant", weight_decay=0.0, precision=how)
        for _ in range(1000):
            trainer.step([0], lambda _: (line.w.float() * torch.arange(1, 65)).sum() / 1000, lambda _: 1)
        (_, _, master), = trainer.own
        rest = trainer.state_tensors().get("w.rest")
        exact = master.detach() if rest is None else ((line.w.detach().view(torch.int16).int() << 16) + rest).view(torch.float32)
        weights[kind] = exact
        assert abs((exact - start).mean().item() + 1e-3) < 1e-5
        assert torch.equal(line.w.detach(), exact.to(kind)), "the weight is the rounded value"
    assert (weights[dtype] - weights[torch.float32]).abs().max() < 1e-6


def test_an_fp32_head_beside_compensated_weights_takes_one_step_per_step(world_of_one, tmp_path, monkeypatch):
    """The weights of a large model are updated part by part; the head, which needs no compensation, with the last of them only."""
    from llama_rlhf import trainer as module
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.models.transformer import ValueModel
    make_hf(tmp_path, "llama-9-3")
    monkeypatch.setattr(module, "_BUCKET", 5000)
    moved = []
    for precision in ("master", "kahan"):
        model = load_model(str(tmp_path), ValueModel, dtype=torch.bfloat16)
        head, trainer = model.value_head.weight, module.Trainer(model, lr=1e-3, total_steps=9, schedule="constant", precision=precision)
        before = head.detach().clone()
        for _ in range(2):
            trainer.step([0], lambda _: module.final_scores(model, [[3, 4, 5], [6, 7]]).sum(), lambda _: 1)
        assert precision == "master" or len(trainer._buckets()) > 3
        assert {key: value.item() for key, value in trainer.state_tensors().items() if key.endswith("step")} == \
            {f"{name}.step": 2.0 for name, _, _ in trainer.own} and head.grad is None
        moved.append(head.detach() - before)
    assert torch.allclose(*moved, atol=2e-5) and moved[0].abs().max() > 1e-3


@pytest.mark.parametrize("n,tp", [(1, 1), (2, 2), (3, 3)])
def test_compensated_weights_are_those_of_master_copies(n, tp, tmp_path):
    """bf16, kv heads on several ranks at 2 and 3: equal but for fp32's last place in exact ties."""
    make_hf(tmp_path, "llama-9-3")
    master, kahan = (run_ranks(n, train, str(tmp_path), -1, [[0, 1, 2, 3]], 4, tp, "bfloat16", "none", p) for p in ("master", "kahan"))
    a, b = merged(master, 1), merged(kahan, 1)
    different = sum((a[native] != b[native]).sum().item() for native in a)
    assert different <= 2 and all((a[native] - b[native]).abs().max() < 0.01 for native in a), different
    for output in kahan[1:]:
        assert output[4] == kahan[0][4], "replicated parameters differ in bits"


@pytest.mark.parametrize("lora_rank,dtype,precision,n,tp", [(-1, "float32", "master", 4, 2), (3, "bfloat16", "master", 2, 1), (-1, "bfloat16", "kahan", 2, 1)])
def test_shared_optimizer_state_gives_the_same_bits(lora_rank, dtype, precision, n, tp, tmp_path):
    """And buffers that hold a parameter or two travel to the same sums as one that holds all."""
    make_hf(tmp_path, "llama-9-3")
    whole, shared = (run_ranks(n, train, str(tmp_path), lora_rank, [[0, 1, 2, 3]], 3, tp, dtype, "none", precision, zero, False, buffer_bytes)
                     for zero, buffer_bytes in ((0, None), (1, 5000)))
    for a, b in zip(whole, shared):
        assert a[1] == b[1] and a[2] == b[2], "weights or losses differ"


def test_shares_of_the_optimizer_are_even_and_the_same_for_all_ranks_of_a_replica():
    """9 heads on 4 ranks: the ranks hold unequal parts. The largest first, each to the replica that has least: without its last it had no more than any other ends with."""
    from dataclasses import replace

    from llama_rlhf.models import preset
    from llama_rlhf.models.transformer import CausalLM
    from llama_rlhf.parallel import groups
    from llama_rlhf.trainer import _shares
    config, found = replace(preset("smollm2-135m"), n_layers=5, vocab_size=1000), []
    for rank in range(4):
        with groups.pretend(4, rank, 3):
            model = CausalLM(config, dtype=torch.float32)
            found.append(_shares(model, [name for name, _ in model.named_parameters()]))
    assert found[1:] == found[:1] * 3
    with groups.pretend(1):
        owned = [[p.numel() for p, owner in zip(CausalLM(config, dtype=torch.float32).parameters(), found[0]) if owner == replica] for replica in range(3)]
    assert all(sum(mine) - min(mine) <= min(map(sum, owned)) for mine in owned) and sum(map(sum, owned)) == config.n_parameters


def test_buckets_leave_in_one_order_whatever_order_backward_takes(monkeypatch):
    """Ranks that sent them in different orders would add different parameters; three travel at a time at most; the sums are those of all."""
    from llama_rlhf.parallel import gradients
    sent, away = [], []

    class Work:
        def wait(self):
            away.pop()

    def reduce(flat, group, async_op):
        sent.append(flat.numel())
        flat.mul_(2)
        away.append(1)
        most.append(len(away))
        return Work()

    monkeypatch.setattr(gradients.dist, "all_reduce", reduce)
    monkeypatch.setattr(gradients.groups, "dp_group", lambda: None)
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 28)
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 5, 2, 9, 1, 4)]
    for order in ([5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5], [3, 0, 5], []):
        grads, most = {p: torch.zeros_like(p) for p in parameters}, []
        replicas = gradients.ReplicaSum(parameters, grads.get)
        for step in (1, 2):
            sent.clear()
            for i in order:
                grads[parameters[i]].fill_(i + step)
                replicas.ready(parameters[i])
            for i in {0, 1, 2, 3, 4, 5}.difference(order):
                grads[parameters[i]].fill_(i + step)
            replicas.finish()
            assert sent == [4 + 1, 9, 2 + 5, 3] and not away and max(most) == 3
            assert all((grads[p] == 2 * (i + step)).all() for i, p in enumerate(parameters))


def sharded_sizes(folder, zero):
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.parallel import groups
    from llama_rlhf.trainer import Trainer, response_logprobs
    groups.initialize(1, device="cpu")
    model = load_model(folder, dtype=torch.bfloat16)
    trainer = Trainer(model, lr=1e-2, total_steps=2, zero=zero)
    trainer.step([0], lambda _: -response_logprobs(model, [ROWS[0][0]], [ROWS[0][1]]).sum(), lambda _: 1)
    state = sum(x.nbytes for key, x in trainer.state_tensors().items() if not key.endswith(("step", "counters", "loss_scale")))
    groups.shutdown()
    return state, trainer.state_bytes


def one_weight(zero):
    from llama_rlhf.parallel import groups
    from llama_rlhf.trainer import Trainer
    groups.initialize(1, device="cpu")
    line = Line(torch.float32)
    trainer = Trainer(line, lr=1e-2, total_steps=2, max_grad_norm=0.1, zero=zero)
    trainer.step([0], lambda _: (line.w * line.w).sum(), lambda _: 1)
    groups.shutdown()
    return line.w.tolist()


def test_a_replica_that_owns_no_parameter_takes_part_in_a_clipped_step():
    """More replicas than trained parameters: torch's product of no tensors is an error."""
    whole, shared = run_ranks(2, one_weight, 0), run_ranks(2, one_weight, 1)
    assert whole == shared and whole[0] == whole[1]


def test_shared_optimizer_state_is_a_share(tmp_path):
    make_hf(tmp_path, "llama-9-3")
    (whole, stated), _ = run_ranks(2, sharded_sizes, str(tmp_path), 0)
    shares = run_ranks(2, sharded_sizes, str(tmp_path), 1)
    assert whole == stated and all(state == stated for state, stated in shares)
    assert sum(state for state, _ in shares) == whole and max(state for state, _ in shares) < 0.6 * whole


def overflowing(folder):
    """fp16 on two replicas, of which one alone overflows in the second step."""
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.parallel import groups
    from llama_rlhf.trainer import Trainer, response_logprobs
    groups.initialize(1, device="cpu")
    model, results = load_model(folder, dtype=torch.float16), []
    trainer = Trainer(model, lr=1e-2, total_steps=9, max_skipped_steps=1)

    def step(factor):
        before = [p.detach().clone() for p in model.parameters()]
        result = trainer.step([0], lambda _: -response_logprobs(model, [ROWS[0][0]], [ROWS[0][1]]).sum() * factor, lambda _: 5)
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
        results.append((result.skipped, moved, trainer.counters()["loss_scale"], result.grad_norm))

    step(1.0)
    step(1e8 if groups.dp_rank() == 1 else 1.0)
    step(1.0)
    state = trainer.state_tensors()
    again = Trainer(model, lr=1e-2, total_steps=9)
    again.load_state_tensors(state)
    groups.shutdown()
    return results, again.counters() == trainer.counters(), again.n_steps


def test_an_fp16_overflow_skips_the_step_on_all_ranks_and_halves_the_scale(tmp_path, world_of_one):
    from llama_rlhf.trainer import Trainer
    make_hf(tmp_path, "llama-9-3")
    for results, same, n_steps in run_ranks(2, overflowing, str(tmp_path)):
        assert [row[:3] for row in results] == [(False, True, 65536.0), (True, False, 32768.0), (False, True, 32768.0)], results
        assert same and n_steps == 2
        assert 0 < results[2][3] < 1e3, "the norm is that of the unscaled gradient"
    with pytest.raises(ValueError, match="kahan extends bf16"):
        Trainer(Line(torch.float16), lr=1.0, total_steps=1, precision="kahan")


def test_the_loss_scale_grows_again_and_bad_data_ends_the_run(world_of_one, monkeypatch):
    from llama_rlhf import trainer as module
    monkeypatch.setattr(module, "_SCALE_GROWS_AFTER", 2)
    line = Line(torch.float16)
    trainer = module.Trainer(line, lr=1e-3, total_steps=9, max_skipped_steps=3)
    for _ in range(4):
        trainer.step([0], lambda _: line.w.float().sum() / 1e6, lambda _: 1)
    assert trainer.loss_scale == 2.0 ** 18
    with pytest.raises(FloatingPointError, match="not finite"):       # 18 halvings, then the steps count
        for _ in range(30):
            trainer.step([0], lambda _: line.w.float().sum() * float("nan"), lambda _: 1)
    assert trainer.loss_scale == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_several_micro_batches_are_summed_in_fp32(dtype, world_of_one):
    """1 + 3/256, of which bf16 would keep the 1."""
    from llama_rlhf.trainer import Trainer
    line = Line(dtype)
    result = Trainer(line, lr=1e-3, total_steps=9).step([1.0, 2.0 ** -8, 2.0 ** -8, 2.0 ** -8], lambda factor: line.w.float().sum() * factor, lambda _: 1)
    assert result.n_tokens == 4 and result.grad_norm == pytest.approx(8 * (1 + 3 / 256) / 4, rel=1e-6)
    assert result.loss == pytest.approx(32.5 * (1 + 3 / 256) / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_optimizer_sees_gradients_without_the_loss_scale(dtype, world_of_one):
    """AdamW's first step is lr g / (|g| + eps): with a large eps the size of g shows."""
    from llama_rlhf.trainer import Trainer
    line = Line(dtype)
    trainer = Trainer(line, lr=0.01, eps=1.0, total_steps=2, schedule="linear", final_lr_ratio=0.5, weight_decay=0.0, max_grad_norm=0.0)
    before, master = line.w.detach().float().clone(), trainer.own[0][2].detach()
    trainer.step([0], lambda _: line.w.float().sum() / 2, lambda _: 1)
    assert torch.allclose(before - master, torch.full_like(before, 0.01 * 0.5 / 1.5), atol=1e-6)
    assert trainer.step([0], lambda _: line.w.float().sum() / 2, lambda _: 1).lr == pytest.approx(0.0075)


def test_the_optimizer_state_of_other_parameters_is_refused(world_of_one):
    from llama_rlhf.trainer import Trainer
    trainer = Trainer(torch.nn.Linear(2, 1), lr=0.1, total_steps=9)
    trainer.step([0], lambda _: trainer.model(torch.ones(1, 2)).sum(), lambda _: 1)
    for other in (torch.nn.Linear(3, 1), torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1).bfloat16()):
        with pytest.raises(ValueError, match="the saved optimizer state belongs to other parameters"):
            Trainer(other, lr=0.1, total_steps=9).load_state_tensors(trainer.state_tensors())


def test_decay_alone_moves_the_matrices_of_the_layers_only(world_of_one, tmp_path):
    """Not embeddings, heads, norms or biases. (Where no gradient is, AdamW's step is the decay.)"""
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.models.transformer import ValueModel
    from llama_rlhf.trainer import Trainer, final_scores
    make_hf(tmp_path, "qwen2")
    model = load_model(str(tmp_path), ValueModel)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Trainer(model, lr=0.1, total_steps=9, weight_decay=0.1).step([0], lambda _: final_scores(model, [[3, 4]]).sum() * 0, lambda _: 1)
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * (0.99 if name.startswith("layers") and p.dim() == 2 else 1.0)), name


def test_an_overflow_begins_the_count_of_steps_anew_and_a_spike_is_none(world_of_one, monkeypatch):
    from llama_rlhf import trainer as module
    monkeypatch.setattr(module, "_SCALE_GROWS_AFTER", 3)

    def step(trainer, factor):
        trainer.step([0], lambda _: trainer.model.w.float().sum() * factor, lambda _: 1)
        return trainer.loss_scale

    first, again = (module.Trainer(Line(torch.float16), lr=1e-3, total_steps=9, max_skipped_steps=2, skip_grad_norm_above=1e-2) for _ in range(2))
    assert [step(first, factor) for factor in (1e-6, 1e3, 1e-6, 1e-6)] == [2.0 ** 16] + [2.0 ** 15] * 3         # the second overflows
    again.load_state_tensors(first.state_tensors())
    assert step(again, 1e-1) == 2.0 ** 16 and (again.n_steps, again.skipped_steps) == (3, 2)        # the third without overflow
    with pytest.raises(FloatingPointError, match="its norm above 0.01"):        # at any scale spikes end the run
        step(again, 1e-1)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(world_of_one):
    from llama_rlhf.trainer import Trainer
    line = torch.nn.Linear(2, 1)
    before = [p.detach().clone() for p in line.parameters()]
    trainer = Trainer(line, lr=0.1, total_steps=5, max_skipped_steps=2)
    bad = lambda _: line(torch.tensor([[float("nan"), 1.0]])).sum()  # noqa: E731
    assert trainer.step([0], bad, lambda _: 1).skipped
    assert all(torch.equal(a, b) for a, b in zip(before, line.parameters()))
    good = trainer.step([0], lambda _: line(torch.ones(1, 2)).sum(), lambda _: 1)
    assert not good.skipped and (good.lr, trainer.n_steps, trainer.counters()) == (0.1, 1, {"skipped": 1})      # the rate of the first step
    assert trainer.step([0], bad, lambda _: 1).skipped, "not the second in a row"
    with pytest.raises(FloatingPointError, match="2 steps in a row.*Nothing has been saved"):
        trainer.step([0], bad, lambda _: 1)


@pytest.mark.parametrize("kept, chunk, block", [(0, 500, 300), (1 << 20, 0, 300), (1 << 20, 0, 1 << 20)])
def test_chunked_logprobs_and_entropy_equal_the_dense_formula(world_of_one, monkeypatch, kept, chunk, block):
    """Several chunks, of 3 rows and then of 11 columns; all kept for backward, in blocks of 2 rows; all at once."""
    from llama_rlhf import losses
    monkeypatch.setattr(losses, "_KEPT_BYTES", kept)
    monkeypatch.setattr(losses, "_CHUNK_BYTES", chunk)
    monkeypatch.setattr(losses, "_BLOCK_BYTES", block)
    torch.manual_seed(0)
    hidden, weight = torch.randn(11, 8, requires_grad=True), torch.randn(37, 8, requires_grad=True)
    targets, a, b = torch.randint(0, 37, (11,)), torch.randn(11), torch.randn(11)
    logprobs, entropy = losses.token_logprobs(hidden, weight, targets, temperature=0.7, with_entropy=True)
    got = torch.autograd.grad((logprobs * a + entropy * b).sum(), (hidden, weight))
    dense = (hidden @ weight.t() / 0.7).log_softmax(-1)
    expected = dense.gather(1, targets[:, None])[:, 0], -(dense.exp() * dense).sum(-1)
    for x, y in zip((logprobs, entropy), expected):
        assert (x - y).abs().max() < 1e-5
    for x, y in zip(got, torch.autograd.grad((expected[0] * a + expected[1] * b).sum(), (hidden, weight))):
        assert (x - y).abs().max() < 1e-4


def test_published_vectors(world_of_one):
    """Logits [2,1,0]: log-probabilities and entropy at T 1 and 0.7, computed by hand in float64."""
    from llama_rlhf.losses import token_logprobs
    weight, hidden = torch.tensor([[2.0], [1.0], [0.0]]), torch.ones(3, 1)
    for t, logp, h in ((1.0, [-.40760596, -1.40760596, -2.40760596], .83239558), (0.7, [-.2601184, -1.68868983, -3.11726126], .65057265)):
        got, entropy = token_logprobs(hidden, weight, torch.arange(3), temperature=t, with_entropy=True)
        assert (got - torch.tensor(logp)).abs().max() < 1e-6
        assert (entropy - h).abs().max() < 1e-6


def test_prediction_rows_shift_by_one():
    from llama_rlhf.losses import prediction_rows
    states, tokens = prediction_rows([4, 3], [2, 1])
    assert tokens.tolist() == [2, 3, 5, 6] and states.tolist() == [1, 2, 4, 5]
    with pytest.raises(ValueError, match="at least one prompt token"):
        prediction_rows([3], [0])


def test_a_bf16_weight_and_its_16_bits_are_the_fp32_value():
    """Every low half of fp32 beside an even and an odd bf16, of both signs; only a tie that rounds down is given back as its neighbour."""
    from llama_rlhf.trainer import _joined, _split
    bits = torch.cat([torch.arange(1 << 16, dtype=torch.int32) + (high << 16) - (1 << 32) * (high >> 15) for high in (0x3f80, 0x3f81, 0xbf80, 0xbf81)]).int()
    value, p, rest = bits.view(torch.float32), torch.empty(len(bits), dtype=torch.bfloat16), torch.empty(len(bits), dtype=torch.int16)
    _split(value, p, rest)
    off = (_joined(p, rest).view(torch.int32) - bits).abs()
    assert torch.equal(p, value.bfloat16()) and off.max() == 1 and off.nonzero()[:, 0].tolist() == [0x8000, (2 << 16) + 0x8000]


def test_schedule_values():
    """Warm-up 5, total 20, cosine: by hand from the formula."""
    from llama_rlhf.trainer import learning_rate
    rate = lambda step, **more: learning_rate(step, peak=1.0, total_steps=20, warmup_steps=5, **more)  # noqa: E731
    assert [round(rate(s), 6) for s in (0, 4, 5, 10, 15, 20)] == [0.2, 1.0, 1.0, 0.75, 0.25, 0.0]
    assert rate(12.5, schedule="linear") == 0.5 and rate(20, final_ratio=0.1) == 0.1
    assert rate(15, final_ratio=0.1) == pytest.approx(0.1 + 0.9 * 0.25) and rate(25) == 0.0       # between the two; and it does not rise again


def collectives(folder, lora_rank, sequence_parallel=False):
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.parallel import groups
    from llama_rlhf.parallel.layers import Lora
    from llama_rlhf.parallel.regions import traffic
    from llama_rlhf.trainer import response_logprobs
    groups.initialize(device="cpu")
    model = load_model(folder, lora=Lora(lora_rank, 8.0) if lora_rank > 0 else None)
    model.sequence_parallel(sequence_parallel)
    traffic.clear()
    loss = -response_logprobs(model, [ROWS[0][0]], [ROWS[0][1]]).sum()
    forward = traffic.copy()
    loss.backward()
    groups.shutdown()
    if sequence_parallel:
        return [(forward[kind], traffic[kind] - forward[kind]) for kind in ("all_gather", "reduce_scatter", "all_reduce")]
    return forward["all_reduce"], traffic["all_reduce"] - forward["all_reduce"]


def test_two_all_reduces_per_layer_each_way(tmp_path):
    """Forward: 2 per layer, 1 for the embedding, 2 small ones in the loss. Backward, all weights: 2 per layer, 1 for the head's
    input. With adapters the first layer's input needs no gradient: its q,k,v entry reduces nothing."""
    make_hf(tmp_path, "llama")          # 2 layers
    assert run_ranks(2, collectives, str(tmp_path), -1) == [(2 * 2 + 1 + 2, 2 * 2 + 1)] * 2
    assert run_ranks(2, collectives, str(tmp_path), 4) == [(2 * 2 + 1 + 2, 2 * 2 + 1 - 1)] * 2


def test_sequence_parallel_gathers_and_scatters_twice_per_layer_each_way(tmp_path):
    """In the place of each all-reduce a gather and a scatter; backward gathers the inputs of wqkv and w13 a second time instead of keeping them."""
    make_hf(tmp_path, "llama")          # 2 layers
    gathers, scatters, sums = run_ranks(2, collectives, str(tmp_path), -1, True)[0]
    assert gathers == (2 * 2 + 1, 2 * 2 + 2 * 2 + 1)        # + the final one, whose gradient is alike everywhere; + the embedding's
    assert scatters == (2 * 2 + 1, 2 * 2)                   # + the embedding's
    assert sums == (2, 1)                                   # the loss's, and the head's input


def generation_leaves_weights_alone(folder):
    """On every rank: are the weights the same after generating, and the tokens those of the unmerged, unpacked program?"""
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.generation import generate
    from llama_rlhf.parallel import groups, layers
    from llama_rlhf.parallel.layers import Lora
    groups.initialize(device="cpu")
    model = load_model(folder, lora=Lora(3, 8.0), seed=3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_b"):
                p.normal_(generator=torch.Generator().manual_seed(5))
    before = [p.detach().clone() for p in model.parameters()]
    options = dict(eos_ids=(), max_new_tokens=12, max_batch_size=3)
    held = generate(model, [row for row, _ in ROWS], **options)
    free, layers.groups.free_memory = layers.groups.free_memory, lambda: 0       # nothing may be copied now
    plain = generate(model, [row for row, _ in ROWS], **options)
    layers.groups.free_memory = free
    groups.shutdown()
    return all(torch.equal(a, b) for a, b in zip(before, model.parameters())), [row[0].tokens for row in held], [row[0].tokens for row in plain]


def test_weights_prepared_for_generation_are_dropped_after_it(world_of_one, tmp_path):
    """Else a policy would be trained by what it was before its last step: logits after a change are those of the changed weights, even where generation failed."""
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.parallel.layers import Lora, weights_held
    from llama_rlhf.trainer import response_logprobs
    make_hf(tmp_path, "llama")
    model, other = (load_model(str(tmp_path), lora=Lora(2, 4.0), seed=1) for _ in range(2))
    see = lambda model: response_logprobs(model, [ROWS[0][0]], [ROWS[0][1]])  # noqa: E731
    with torch.no_grad():
        with pytest.raises(KeyError):
            with weights_held(model, 4):
                assert torch.allclose(see(model), see(other), atol=1e-5)
                raise KeyError
        for name, p in [*model.named_parameters(), *other.named_parameters()]:
            if "lora_b" in name:
                p.fill_(0.3)
        assert torch.equal(see(model), see(other))


def test_generation_with_prepared_weights_gives_the_same_tokens_and_changes_no_weight(tmp_path):
    make_hf(tmp_path, "llama")
    for n in (1, 2):
        for same, held, plain in run_ranks(n, generation_leaves_weights_alone, str(tmp_path)):
            assert same and held == plain
