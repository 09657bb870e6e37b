"""The live models of a PPO run: actor, reference, critic, reward model; which weights they share, and where the idle ones wait.

With adapters one frozen base serves all four: each role is a module of its own whose frozen parameters are the same tensors
(see checkpoint.shards.load_model, `share`), so "the reference" is the base with the adapters it had at the start, and nothing
is switched on or off. With full weights the roles differ everywhere; on CUDA an idle one can wait in pinned host memory.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch

from llama_rlhf.checkpoint.shards import load_model, look_inside
from llama_rlhf.models.transformer import CausalLM, Transformer, ValueModel
from llama_rlhf.parallel import groups
from llama_rlhf.parallel.layers import Lora
from llama_rlhf.reward import fold_head
from llama_rlhf.tokenizer import Tokenizer

_RESIDENT_SHARE = 0.6       # "auto": everything stays if weights, masters, moments and gradients take at most this share of the device


@dataclass
class Roles:
    """The models, and the host copies of those that wait (see `using`). None: this run has no such role."""

    actor: CausalLM
    reference: CausalLM | None = None
    critic: ValueModel | None = None
    reward: ValueModel | None = None
    critic_is_new: bool = False      # the run began with a critic whose head was drawn, not trained
    moves: bool = False
    waiting: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)      # id of a model -> its frozen host copies

    def all(self) -> dict[str, Transformer]:
        named = {"actor": self.actor, "reference": self.reference, "critic": self.critic, "reward": self.reward}
        return {name: model for name, model in named.items() if model is not None}

    def n_bytes(self, training: bool = False) -> int:
        """Of all weights on this rank, shared ones once; training: with fp32 masters, moments and gradients of the trained ones."""
        parameters = {id(p): p for model in self.all().values() for p in model.parameters()}.values()
        state = sum((16 if p.dtype != torch.float32 else 12) * p.numel() for p in parameters if p.requires_grad) if training else 0
        return sum(p.nbytes for p in parameters) + state

    @contextlib.contextmanager
    def using(self, *models: Transformer, trainer=None):
        """The models are on the device inside, and wait in host memory afterwards. trainer: its masters and moments come and go too.
        On a CPU, where roles share one base, what a role's work leaves in malloc's holes goes back to the system: the next one's blocks have other sizes, and
        took a quarter more memory. Fetching all pages anew takes a twentieth of an iteration: with full weights, for next to nothing."""
        if not self.moves:
            models, trainer = (), None
        for model in models:
            self._fetch(model)
        if trainer is not None:
            trainer.move_state(groups.device())
        try:
            yield
        finally:
            if trainer is not None:
                trainer.move_state(torch.device("cpu"))
            for model in models:
                self.send_away(model)
            groups.release_freed_memory(always=self.actor.lora is not None)

    def _fetch(self, model: Transformer) -> None:
        for p in self._own(model):
            p.data = p.data.to(groups.device(), non_blocking=True)

    def send_away(self, model: Transformer) -> None:
        """Frozen weights keep one host copy, which is never written again; trained ones are copied each time."""
        kept = self.waiting.setdefault(id(model), {})
        for i, p in enumerate(self._own(model)):
            if str(i) not in kept:
                host = torch.empty(p.shape, dtype=p.dtype, pin_memory=groups.device().type == "cuda")
                kept[str(i)] = host.copy_(p.data)
            elif p.requires_grad:
                kept[str(i)].copy_(p.data)
            p.data = kept[str(i)]

    def _own(self, model: Transformer) -> list[torch.nn.Parameter]:
        """The parameters that no other role shares: only these move."""
        others = {id(p) for other in self.all().values() if other is not model for p in other.parameters()}
        return [p for p in model.parameters() if id(p) not in others]


def _adapters(path: str, lora: Lora | None) -> Lora | None:
    """The adapters to train: those that the checkpoint holds, whatever their rank, else new ones as asked; None: all weights."""
    stored = look_inside(path).lora if lora else None
    if stored and stored != lora:
        groups.log(f"note: {path} holds adapters of rank {stored.rank}, alpha {stored.alpha:g}; it continues with those")
    return stored or lora


def load_roles(*, actor_dir: str, start_dir: str, critic_dir: str, critic_start_dir: str, reward_dir: str, reward_weight: float, needs_reference: bool,
               lora: Lora | None, dtype: torch.dtype, model_type: str = "", seed: int = 0, keep_resident: str = "auto") -> Roles:
    """Collective. Load what a run needs; critic_dir or reward_dir "" leaves that role out.

    actor_dir: the policy to train from, and the reference.  start_dir: where the actor's weights come from; differs from
    actor_dir when a run is resumed. The same for the critic. Where a reward model pays, reward_weight times its normalised score,
    a critic that starts from a reward model has that scale folded into its head; one from a policy gets a new head.
    keep_resident: auto, always or never: whether idle models stay on the device (on a CPU they always do).
    """
    if keep_resident not in ("auto", "always", "never"):
        raise ValueError(f"--keep_resident {keep_resident!r}: use auto, always or never")
    # hashed once: what several roles read, and the saves of a resumed run, which store.find_start has compared already
    hashed = {start for start, given in ((start_dir, actor_dir), (critic_start_dir, critic_dir)) if start != given}

    def load(path: str, *args, **options):
        model = load_model(path, *args, verify=path not in hashed, **options)
        hashed.add(path)
        return model

    actor = load(start_dir, lora=_adapters(start_dir, lora), dtype=dtype, model_type=model_type, seed=seed)
    roles = Roles(actor)
    frozen = dict(dtype=dtype, model_type=model_type, trainable=False)
    if needs_reference:
        roles.reference = load(actor_dir, lora="stored" if lora else None, share=[actor], **frozen)
    if reward_dir:
        roles.reward = load(reward_dir, ValueModel, lora="stored" if lora else None, need_head=True,
                            share=list(roles.all().values()), **frozen)
    if critic_dir:
        critic = roles.critic = load(critic_start_dir, ValueModel, lora=_adapters(critic_start_dir, lora), dtype=dtype, model_type=model_type,
                                     seed=seed + 1, share=list(roles.all().values()))
        roles.critic_is_new = not look_inside(critic_dir).has_value_head
        if reward_dir:
            fold_head(critic, reward_weight)
    if groups.device().type == "cuda":
        total = torch.cuda.get_device_properties(groups.device()).total_memory
        roles.moves = keep_resident == "never" or keep_resident == "auto" and roles.n_bytes(training=True) > _RESIDENT_SHARE * total
        if roles.moves:
            for model in roles.all().values():
                roles.send_away(model)
    return roles


def check_same_tokenizer(tokenizer: Tokenizer, others: dict[str, Tokenizer], model_dirs: dict[str, str]) -> None:
    """Every role reads the actor's ids, so all tokenizers must give every id the same meaning. ValueError names the first difference.

    others: role -> its tokenizer.  model_dirs: role -> folder, for the message.
    """
    for role, other in others.items():
        if other.vocab_size != tokenizer.vocab_size:
            raise ValueError(f"the tokenizer of the {role} ({model_dirs[role]}) has {other.vocab_size} ids, the actor's {tokenizer.vocab_size}. "
                             "Actor, critic and reward model must share one tokenizer.")
        for i in range(tokenizer.vocab_size):
            if tokenizer.token_text(i) != other.token_text(i):
                raise ValueError(f"the tokenizer of the {role} ({model_dirs[role]}) reads id {i} as {other.token_text(i)!r}, the actor's as "
                                 f"{tokenizer.token_text(i)!r}. Actor, critic and reward model must share one tokenizer.")
