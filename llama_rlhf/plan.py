"""--plan: what a run needs of memory on a rank, from its flags, before anything is allocated; and beside the measured peak when a run ends.

The numbers are footprint.py's. In a run they are those of rank 0, with the sizes of its model and its data; with --plan the largest rank's,
with the longest rows that the flags allow.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch

from llama_rlhf import cli
from llama_rlhf.advantages import named
from llama_rlhf.checkpoint import store
from llama_rlhf.checkpoint.convert import load_config
from llama_rlhf.checkpoint.formats import open_checkpoint
from llama_rlhf.config import ModelConfig
from llama_rlhf.footprint import KINDS, generating, passes
from llama_rlhf.models import preset
from llama_rlhf.models.transformer import CausalLM, Transformer, ValueModel
from llama_rlhf.parallel import groups
from llama_rlhf.parallel.layers import lora_of
from llama_rlhf.parallel.shared_memory import _SLOT_BYTES
from llama_rlhf.reward import _PACK_TOKENS, JointModel
from llama_rlhf.rollout import _PASS_TOKENS


# what a CPU process holds besides, measured on SmolLM2-135M (docs/TRAINING.md): workspaces of the libraries and what malloc keeps between other blocks,
# a part that does not grow and a share of what comes and goes
_LIBRARIES = {"nothing trained": 15_000_000, "adapters": 75_000_000, "all weights": 130_000_000}
_RECOMPUTING = 45_000_000
_TILES = 60_000_000         # where something is trained on a CPU with matrix tiles (Intel's AMX): the library prepares more for each shape
_KEPT_SHARE = {"nothing trained": 0.10, "adapters": 0.14, "all weights": 0.14}


class Plan:
    """total: bytes on the rank at once, passing: of them those that come and go. roles: role -> kind -> bytes; shared: the base that all roles have in common, counted once."""

    def __init__(self, title: str, roles: dict[str, list[Counter]], *, share: bool = False, in_turn: bool = False, adapts: bool = False, recomputes: bool = False):
        """roles: role -> what it does, one after the other. share: all bases are one memory. in_turn: no two roles are there together.
        adapts: only adapters are trained. recomputes: activations are."""
        self.title, self.adapts, self.recomputes = title, adapts, recomputes
        self.shared = max(several[0]["weights"] - several[0]["adapters"] for several in roles.values()) if share else 0
        self.roles = {role: {kind: max(use[kind] for use in several) for kind in KINDS} for role, several in roles.items()}
        for role, several in roles.items():
            self.roles[role]["weights"] = several[0]["adapters" if share else "weights"]
        stays = [kinds["weights"] + kinds["optimizer"] for kinds in self.roles.values()]
        peaks = [max(use["peak"] for use in several) for several in roles.values()]
        self.total = max(map(sum, zip(stays, peaks))) if in_turn else self.shared + sum(stays) + max(peaks)
        self.passing = max(peaks)

    def __str__(self) -> str:
        rows = {**({"base of all roles": {"weights": self.shared}} if self.shared else {}), **self.roles}
        return "\n".join([self.title, "GB (1e9 bytes)".ljust(20) + "".join(kind.rjust(15) for kind in KINDS),
                          *(role.ljust(20) + "".join(f"{kinds.get(kind, 0) / 1e9:15.3f}" for kind in KINDS) for role, kinds in rows.items()),
                          f"at once at most {self.total / 1e9:.3f} GB on a rank: weights and optimizer state stay, the others come and go"])

    def show(self) -> None:
        """Print, in the first of the processes."""
        if os.environ.get("RANK", "0") == "0":
            print(self)

    def beside(self, peak: int) -> dict:
        """Planned and measured, for the log."""
        return {"planned_bytes": self.total, "besides_bytes": self.besides, "peak_bytes": peak, "planned": {**self.roles, **({"shared": self.shared} if self.shared else {})}}

    @property
    def besides(self) -> int:
        """Bytes that a CPU process takes beyond its tensors, by experience; 0 on a GPU, whose allocator counts tensors."""
        if groups.device().type == "cuda":
            return 0
        trains = any(kinds["optimizer"] for kinds in self.roles.values())
        sums = groups.tp_size() * 2 * _SLOT_BYTES if groups.tp_size() > 1 and trains else 0     # decoding sums little at a time
        what = "nothing trained" if not trains else "adapters" if self.adapts else "all weights"
        tiles = trains and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        return _LIBRARIES[what] + _RECOMPUTING * self.recomputes + _TILES * tiles + int(_KEPT_SHARE[what] * self.passing) + sums

    def line(self, peak: int) -> str:
        """Of models smaller than 0.1 GB no ratio: beside them the workspaces of libraries are most of the peak."""
        if self.total < 1e8:
            return f"memory of this rank: planned {self.total / 1e6:.1f} MB, peak {peak / 1e6:.1f} MB"
        besides = f" and {self.besides / 1e9:.3f} GB for libraries and malloc" if self.besides else ""
        return f"memory of this rank: planned {self.total / 1e9:.3f} GB{besides}, peak {peak / 1e9:.3f} GB ({peak / (self.total + self.besides) - 1:+.1%})"


def report_memory(run_log, memory, make: Callable[[], Plan]) -> None:
    """Rank 0's peak beside the plan, in the log of a run."""
    peak = memory.n_bytes       # first: planning takes some itself
    if groups.is_main():
        plan = make()
        run_log.record("memory", **plan.beside(peak))
        run_log.write(plan.line(peak))


@contextlib.contextmanager
def _layout(flags: dict, config: ModelConfig | None):
    """Flags as attributes, config, dtype and adapters, and a title, while this process pretends to be a rank of the layout they ask for."""
    f = SimpleNamespace(**flags)
    path = store.resolve(getattr(f, "actor_ckpt_dir", "") or getattr(f, "ckpt_dir", ""))
    if config is None and path:
        with open_checkpoint(path) as checkpoint:
            config = load_config(checkpoint, f.model_type)[0]
    elif config is None:
        if not f.model_type:
            raise ValueError("--plan needs --model_type, such as llama-2-7b, or a checkpoint folder to read the sizes from")
        config = preset(f.model_type)
    counts = ("max_seq_len", "max_new_tokens", "eval_batch_size", "accumulation_steps", "num_samples_per_prompt", "max_buffer_size", "rollout_batch_size")
    cli.check_range(1, **{name: flags[name] for name in counts if flags.get(name, -1) != -1})
    if getattr(f, "max_seq_len", -1) > config.max_seq_len:
        raise ValueError(f"--max_seq_len {f.max_seq_len} is more than the model's {config.max_seq_len}")
    ranks = f.plan_ranks if f.plan and f.plan_ranks != -1 else max(int(os.environ.get("WORLD_SIZE", 1)), f.model_parallel_size)
    tp = ranks if f.model_parallel_size == -1 else f.model_parallel_size
    if tp < 1 or ranks < 1 or ranks % tp:
        raise ValueError(f"--model_parallel_size {f.model_parallel_size} does not divide the {ranks} ranks that are planned for")
    if f.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device and cannot plan for one. Leave --device out: activations are then a CPU's.")
    device = "cuda" if f.device == "cuda" or f.device == "auto" and torch.cuda.is_available() else "cpu"
    with groups.pretend(tp, getattr(f, "of_rank", tp - 1) if f.plan else groups.tp_rank(), ranks // tp, device):
        dtype, lora = groups.default_dtype(f.dtype), lora_of(f.lora_rank, f.lora_alpha) if hasattr(f, "lora_rank") else None
        yield f, config, dict(dtype=dtype, lora=lora), (f"{config.n_parameters / 1e9:.3f} billion weights, {tp} tensor-parallel x {ranks // tp} "
                                                        f"data-parallel ranks, {str(dtype).removeprefix('torch.')}, {device}")


def _of_largest_rank(plan: Callable[..., Plan]) -> Callable[..., Plan]:
    """With --plan, the plan of the rank that needs most. Ranks differ by a head, by the keys and values that its heads read, and by a row of other weights."""
    @functools.wraps(plan)
    def planned(flags: dict, **given) -> Plan:
        if not flags["plan"]:
            return plan(flags, **given)
        ranks = {}
        with _layout(flags, None) as (_, config, options, _):
            for rank in range(tp := groups.tp_size()):
                with groups.pretend(tp, rank):
                    attention = CausalLM(replace(config, n_layers=1), dtype=options["dtype"]).blocks[0].attention
                ranks[attention.n_heads, attention.n_kv_heads, attention.n_cache_heads] = rank     # the last: its ranges are never the shorter ones
        return max((plan({**flags, "of_rank": rank}, **given) for rank in ranks.values()), key=lambda plan: plan.total)
    return planned


def _full(f, length: int, max_tokens: int) -> list[tuple[int, int]]:
    """The largest micro-batch of rows of this length that the flags allow."""
    limits = [n for n in (f.max_batch_size, max(1, max_tokens // length) if max_tokens != -1 else -1) if n != -1]
    if not limits or min(limits) < 1:
        raise ValueError(f"--max_batch_size {f.max_batch_size}: give the rows of a micro-batch, or -1 together with --max_batch_tokens")
    return [(length, 1)] * min(limits)


def _packed(length: int, tokens: int) -> list[tuple[int, int]]:
    return [(length, 1)] * max(1, tokens // length)


def _slots(f, config: ModelConfig, dtype: torch.dtype, asked: int, longest: int) -> int:
    """Rows decoded at once: those asked for, or as many as --max_cache_gb allows."""
    each = CausalLM(replace(config, n_layers=1), dtype=dtype).cache_bytes(1, longest) * config.n_layers
    return asked if f.max_cache_gb <= 0 else max(1, min(asked, int(f.max_cache_gb * 1e9 / max(1, each))))


def _shown(rows: list[tuple[int, int]]) -> str:
    return f"micro-batches of {len(rows)} rows, {sum(length for length, _ in rows)} tokens"


def _trained(f) -> dict:
    return dict(recompute=f.activation_checkpointing, sequence_parallel=f.sequence_parallel, precision=f.optimizer_precision, zero=f.zero)


def _ways(f, options: dict) -> dict:
    return dict(adapts=options["lora"] is not None, recomputes=f.activation_checkpointing != "none")


@_of_largest_rank
def plan_training(flags: dict, *, config: ModelConfig | None = None, rows: list[tuple[int, int]] | None = None, prompts: Sequence[int] = (),
                  scored: Sequence[tuple[int, int]] = ()) -> Plan:
    """Of solver_train and verifier_train. rows: (length, prompt length) in the largest micro-batch; prompts: lengths in the evaluation;
    scored: the rows that a verifier scores in the end."""
    with _layout(flags, config) as (f, config, options, title):
        verifier = hasattr(f, "lm_loss_weight")
        model_class = CausalLM if not verifier else JointModel if f.lm_loss_weight else ValueModel
        rows = rows or _full(f, f.max_seq_len, f.max_batch_tokens) * (2 if verifier and f.loss in ("auto", "pairwise") else 1)
        uses = [passes(config, rows, model_class=model_class, accumulates=f.accumulation_steps > 1, **_trained(f), **options)]
        if verifier:
            longest, tokens = max(rows if not scored else scored)[0], sum(length for length, _ in scored) or _PACK_TOKENS
            uses.append(passes(config, _packed(longest, min(tokens, _PACK_TOKENS)), model_class=model_class, trains=False, **options))
        elif f.label_file:
            longest = max(prompts, default=max(1, f.max_seq_len - f.max_new_tokens))
            slots = min(f.eval_batch_size, -(-len(prompts) // groups.dp_size()) or f.eval_batch_size)
            uses.append(generating(config, longest, min(longest + f.max_new_tokens, config.max_seq_len), slots, **options))
        return Plan(f"{title}, {_shown(rows)}", {"verifier" if verifier else "solver": uses}, **_ways(f, options))


@_of_largest_rank
def plan_evaluation(flags: dict, *, config: ModelConfig | None = None, prompts: Sequence[int] = ()) -> Plan:
    """Of solver_evaluate: the solver, then a verifier of the same size. prompts: their lengths."""
    with _layout(flags, config) as (f, config, options, title):
        cli.check_range(1, max_batch_size=f.max_batch_size)
        whole = min(config.max_seq_len, f.max_seq_len if f.max_seq_len != -1 else max(prompts, default=f.max_new_tokens) + f.max_new_tokens)
        prompt = max(prompts, default=max(1, whole - f.max_new_tokens))
        longest = min(whole, prompt + f.max_new_tokens)
        slots = _slots(f, config, options["dtype"], min(f.max_batch_size, -(-len(prompts) * f.num_samples_per_prompt // groups.dp_size()) or f.max_batch_size), longest)
        roles = {} if f.samples_file else {"solver": [generating(config, prompt, longest, slots, **options)]}
        if f.verifier_ckpt_dir:
            roles["verifier"] = [passes(config, _packed(whole, _PACK_TOKENS), model_class=ValueModel, trains=False, **options)]
        return Plan(f"{title}, {slots} rows of up to {whole} tokens decoded together", roles, in_turn=True)


@_of_largest_rank
def plan_ppo(flags: dict, *, models: dict[str, Transformer] | None = None, prompts: Sequence[int] = (), tested: Sequence[int] = ()) -> Plan:
    """Of ppo_train, with the longest responses. models: role -> the loaded one; without, those that the flags ask for, alike in size.
    prompts, tested: lengths of what is trained on, and of the problems of the evaluations."""
    with _layout(flags, models["actor"].config if models else None) as (f, config, options, title):
        algorithm = named(f.algorithm)
        if models is None:
            there = {"actor": True, "reference": f.kl_coef if f.kl_coef != -1 else algorithm.kl_coef, "critic": algorithm.uses_critic,
                     "reward": f.reward_model_ckpt_dir and f.reward_model_weight}
            sizes = {role: (config, options["lora"] if role != "reference" else None) for role, needed in there.items() if needed}
        else:
            sizes = {role: (model.config, model.lora) for role, model in models.items()}
        dtype, prompt = options["dtype"], max(prompts, default=max(1, (f.max_seq_len if f.max_seq_len != -1 else 2 * f.max_new_tokens) - f.max_new_tokens))
        length = prompt + f.max_new_tokens
        rows, roles = _full(f, length, f.max_batch_tokens), {}
        for role, (config, lora) in sizes.items():
            model_class = CausalLM if role in ("actor", "reference") else ValueModel
            looks = passes(config, _packed(length, _PACK_TOKENS if role == "reward" else _PASS_TOKENS), model_class=model_class, lora=lora, dtype=dtype, trains=False)
            roles[role] = [looks]
            if role in ("actor", "critic"):
                roles[role] = [passes(config, rows, model_class=model_class, lora=lora, dtype=dtype, accumulates=True, **_trained(f)), looks]
            if role == "actor":
                slots = _slots(f, config, dtype, min(f.rollout_batch_size, -(-f.max_buffer_size // groups.dp_size())), length)
                roles[role].append(generating(config, prompt, length, slots, lora=lora, dtype=dtype))
                if f.label_file:
                    longest, whole = max(tested, default=prompt), f.max_seq_len if f.max_seq_len != -1 else config.max_seq_len
                    slots = min(f.eval_batch_size, -(-len(tested) // groups.dp_size()) or f.eval_batch_size)
                    roles[role].append(generating(config, longest, min(longest + f.max_new_tokens, whole), slots, lora=lora, dtype=dtype))
        return Plan(f"{title}, prompts of {prompt} and responses of {f.max_new_tokens} tokens, {_shown(rows)}", roles, share=options["lora"] is not None, **_ways(f, options))
