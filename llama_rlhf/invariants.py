"""What must hold in every run. The cheap ones are checked at the start and every --check_steps steps; --doctor runs all and prints a table.

A parallel run that is wrong seldom fails: ranks drift apart, a text lacks its end token, and the loss looks plausible. Each check
compares two things that must agree, says what it saw, and names the usual cause.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
from array import array
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llama_rlhf import cli
from llama_rlhf.generation import generate
from llama_rlhf.models.transformer import CausalLM, Transformer
from llama_rlhf.parallel import groups
from llama_rlhf.parallel.layers import piece_of, walk
from llama_rlhf.sampling import Sampling, keyed_uniform
from llama_rlhf.trainer import response_logprobs

_TEXTS = 200            # of the data, for the checks of single texts
# largest difference of log-probabilities between two ways to compute them: rounding only
_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


@dataclass(frozen=True)
class Check:
    """ok: None when the check does not apply to this run, or is a remark only. cause: the usual one, and where to look."""

    name: str
    ok: bool | None
    seen: str
    cause: str = ""


def _agree(name: str, values: dict, cause: str) -> Check:
    """Collective. Where two ranks know the same key, their values must be the same. Other ranks may know other keys."""
    first, wrong = {}, []
    for rank, table in enumerate(groups.gather_objects(values)):
        for key, value in table.items():
            other, expected = first.setdefault(key, (rank, value))
            if value != expected:
                wrong.append(f"{key}: {expected} on rank {other}, {value} on rank {rank}")
    return Check(name, not wrong, "; ".join(wrong[:2]) + (f"; and {len(wrong) - 2} more" if len(wrong) > 2 else "") if wrong else
                 f"{len(first)} compared" if groups.world_size() > 1 else "one rank", cause)


def _bits(x: torch.Tensor) -> int:
    """Equal for equal bits."""
    x = x.detach()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return int(x.contiguous().view(whole).sum(dtype=torch.int64))


def copies(models: dict[str, Transformer]) -> list[Check]:
    """Collective. Parameters that several ranks hold: replicated ones and shared kv heads by tensor-parallel ranks, all by replicas."""
    within, across = {}, {}
    for role, model in models.items():
        for _, _, _, parameter, pieces in walk(model):
            for native, piece in pieces:
                view = piece_of(parameter, piece)
                if piece.dim is None:
                    within[f"{role} {native}"] = _bits(view)
                elif piece.shared:
                    head = model.config.head_dim
                    for n, part in enumerate(view.split(head, piece.dim) if view.numel() else ()):      # a rank without heads
                        within[f"{role} {native}, head {piece.held[0] // head + n}"] = _bits(part)
                if groups.dp_size() > 1 and piece.dim is not None:
                    across[f"{role} {native} {piece.held}"] = _bits(view)
    return [_agree("replicated parameters are equal on all ranks", within,
                   "their gradient is complete on no rank or summed twice (parallel/layers.py: partial, shared), or ranks read different files"),
            _agree("data-parallel replicas hold equal weights", across,
                   "replicas took different steps, or began from different checkpoints: is --ckpt_dir the same on every node?")]


def _texts_digest(texts) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tokens in texts:
        digest.update(array("i", [len(tokens), *tokens]).tobytes())
    return digest.hexdigest()


def fingerprint(examples) -> str:
    """Of the training data: tokens, labels, pairs of every example."""
    digest = hashlib.blake2b(digest_size=8)
    for example in examples:
        digest.update(repr(example).encode())
    return f"{len(examples)} examples with digest {digest.hexdigest()}"


def counters(trainers: dict, *, step: int, grad_norm: float | None = None, texts=()) -> Check:
    """Collective. Step, optimizer's counters and gradient norm are the same everywhere, this step's texts within a replica."""
    values: dict = {"step": step, "gradient norm": grad_norm} | {f"{role}'s optimizer steps": (t.n_steps, t.skipped_steps) for role, t in trainers.items()}
    values = {key: "not a number" if isinstance(v, float) and math.isnan(v) else v for key, v in values.items()}
    return _agree("step, gradient norm and data are the same on all ranks", values | {f"texts of replica {groups.dp_rank()}": _texts_digest(texts)},
                  "a rank skipped a step alone, resumed from another save, or reads other data")


def _same_start(examples) -> list[Check]:
    seed, places = cli.resolved.get("seed", 0), torch.arange(4, device=groups.device())
    draws = keyed_uniform(seed, places, places, places)        # all random numbers of a run are functions of the seed and a place; torch's generator is not used
    return [_agree("flags, versions and data are the same on all ranks",
                   {**{f"--{key}": str(value) for key, value in cli.resolved.items()}, "torch": torch.__version__,
                    "training data": fingerprint(examples)},
                   "the command or the data file differs between nodes"),
            _agree("random numbers are the same on all ranks", {"samples": draws.tolist(), "order": random.Random(f"{seed}/0").random()},
                   "--seed, the device or the version of Python differs between nodes")]


def _texts(examples, tokenizer, max_seq_len: int, chat: bool) -> list[Check]:
    """Prompts only (rollouts add the rest) have no labels: their end is not looked at."""
    rows = [(row, e) for e in examples[:_TEXTS] for row in getattr(e, "responses", [e.tokens])]
    bos, checks = tokenizer.bos_id, []
    if bos is None:
        checks.append(Check("each text has one beginning token", None, "this tokenizer has none"))
    else:
        wrong = [e.id for row, e in rows if row[0] != bos or (row[1:2] == [bos] if chat else bos in row[1:])]
        checks.append(Check("each text has one beginning token", not wrong, f"not records {', '.join(map(str, wrong[:5]))}" if wrong else f"{len(rows)} texts",
                            "the data hold the token as text, or the chat template writes it a second time"))
    if rows and hasattr(rows[0][1], "prompt_len"):
        wrong = [e.id for row, e in rows if row[-1] not in tokenizer.eos_ids and len(row) < max_seq_len]
        judged = hasattr(rows[0][1], "responses")       # responses that were cut while they were generated have no end
        checks.append(Check("the last label is the end token", (None if judged else False) if wrong else True,
                            f"not records {', '.join(map(str, wrong[:5]))}, {len(wrong)} of {len(rows)}" if wrong else f"{len(rows)} texts",
                            "the tokenizer names no end token, or another than the model's generation_config.json"))
    return checks


@contextlib.contextmanager
def _without_adapters(model):
    held = [(m, m.lora_a) for m in model.modules() if getattr(m, "lora_a", None) is not None]
    for module, _ in held:
        module.lora_a = None
    try:
        yield
    finally:
        for module, lora_a in held:
            module.lora_a = lora_a


@torch.no_grad()
def _forward(role: str, model: CausalLM, tokenizer, examples, temperature: float) -> list[Check]:
    """Collective. The same log-probabilities by generation and by training's forward, alone and packed, with new adapters and without."""
    gap_allowed = _GAP.get(model.dtype, 0.25)
    prompt = list(examples[0].tokens[:getattr(examples[0], "prompt_len", None)])[-model.config.max_seq_len + 8:]
    (completion,), = generate(model, [prompt], eos_ids=tokenizer.eos_ids, max_new_tokens=8, with_logprobs=True, sampling=Sampling(temperature, seed=1))
    rows = [(prompt + completion.tokens, len(prompt))] + [(list(e.tokens)[:model.config.max_seq_len], 1) for e in examples[1:4]]

    def logprobs(some):
        return response_logprobs(model, [row for row, _ in some], [n for _, n in some], temperature=temperature).float().cpu()
    full = logprobs(rows[:1])
    cached = (full - torch.tensor(completion.logprobs)).abs().max().item()
    alone, packed = torch.cat([logprobs([row]) for row in rows]), logprobs(rows)
    ratio = (alone - packed).abs().max().exp().item() - 1
    loss, uniform = -packed[len(full):].mean().item() if len(rows) > 1 else math.nan, math.log(model.config.vocab_size)
    checks = [Check(f"{role}: cached decoding equals the full forward", cached <= gap_allowed, f"log-probabilities differ by at most {cached:.1e} ({gap_allowed:g} allowed)",
                    "positions or the cache are wrong for this model: compare its config.json with models/"),
              Check(f"{role}: the ratio of unchanged weights is 1", ratio <= math.expm1(gap_allowed), f"off 1 by at most {ratio:.1e}",
                    "the forward depends on what else is in the pack, or is not repeatable"),
              Check(f"{role}: knows its language", True if loss < uniform else None, f"loss {loss:.2f} on the data, a uniform guess has {uniform:.2f}",
                    "untrained weights; or weights in another order than the config says, or another tokenizer")]
    new = model.lora and all(groups.gather_objects(all(not p.any() for name, p in model.named_parameters() if name.endswith("lora_b"))))
    if new:
        with _without_adapters(model):
            base = logprobs(rows)
        checks.append(Check(f"{role}: new adapters change nothing", torch.equal(base, packed), f"largest change {(base - packed).abs().max().item():.1e}",
                            "adapters do not start at B = 0, or are added in another precision than the base"))
    return checks


def _raise(checks: list[Check], when: str, last_save: str = "") -> None:
    if broken := [c for c in checks if c.ok is False]:
        saved = f" The last save is {last_save}." if last_save else ""
        raise ValueError(f"{when}, what must hold does not: " + "; ".join(f"{c.name}: {c.seen}. Usual cause: {c.cause}" for c in broken) + f".{saved} --doctor checks more.")


def start(models: dict, trainers: dict, tokenizer, examples, *, step: int, max_seq_len: int, chat: bool = False, temperature: float = 1.0, doctor: bool = False,
          using: Callable = lambda model: contextlib.nullcontext()) -> None:
    """Collective. Before the first step. ValueError on every rank when something does not hold.

    models, trainers: by role.  examples: training examples or prompts, with .tokens and .id.
    using(model): inside, its weights are where they compute (see roles.Roles).  doctor: all checks, a table, and the end of the program: exit code 0 when nothing failed.
    """
    checks = _same_start(examples) + copies(models) + [counters(trainers, step=step)] + _texts(examples, tokenizer, max_seq_len, chat)
    if not doctor:
        return _raise(checks, "before the first step")
    for role, model in models.items():
        with using(model):
            if isinstance(model, CausalLM) and examples:
                checks += _forward(role, model, tokenizer, examples, temperature)
            bad = sum(groups.gather_objects(sum(not bool(p.isfinite().all()) for p in model.parameters())))
        checks.append(Check(f"{role}: weights are finite", not bad, f"{bad} parameters hold NaN or infinity", "a damaged checkpoint, or one of a run that diverged"))
    table = groups.gather_objects([c.ok for c in checks])       # a rank that alone sees a failure counts
    checks = [Check(c.name, False if False in column else c.ok, c.seen, c.cause) for c, column in zip(checks, zip(*table))]
    groups.log(show(checks))
    groups.shutdown()
    raise SystemExit(int(any(c.ok is False for c in checks)))


def running(models: dict, trainers: dict, *, step: int, grad_norm: float | None = None, texts=()) -> None:
    """Collective. Every --check_steps steps. ValueError on every rank, naming the last save, when something does not hold."""
    _raise(copies(models) + [counters(trainers, step=step, grad_norm=grad_norm, texts=texts)], f"after step {step}",
           next((t.last_save for t in trainers.values()), ""))


def show(checks: list[Check]) -> str:
    words = {True: "ok", False: "FAILED", None: "-"}
    lines, counts = [], defaultdict(int)
    for c in checks:
        counts[c.ok] += 1
        lines.append(f"{words[c.ok]:7}{c.name}: {c.seen}" + (f"\n       usual cause: {c.cause}" if c.ok is False or c.ok is None and c.cause else ""))
    return "\n".join(lines + [f"{counts[True]} ok, {counts[False]} failed, {counts[None]} not applicable or remarks"])
