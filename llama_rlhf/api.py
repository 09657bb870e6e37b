"""Load a checkpoint and generate text with it, from Python:

    from llama_rlhf import load, generate, stream
    model = load("runs/solver")
    print(generate(model, "What is 17 + 25?").text)
    for piece in stream(model, [{"role": "user", "content": "Tell me a story."}], max_new_tokens=200):
        print(piece, end="", flush=True)

What the scripts do is made of the same functions. Under torchrun every process makes the same calls, and gets the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llama_rlhf import generation
from llama_rlhf.checkpoint import store
from llama_rlhf.checkpoint.shards import load_model
from llama_rlhf.data import encode_prompt
from llama_rlhf.models.transformer import CausalLM
from llama_rlhf.parallel import groups
from llama_rlhf.sampling import Sampling
from llama_rlhf.tokenizer import GrowingText, Tokenizer, check_vocabulary, load_tokenizer


@dataclass
class LanguageModel:
    """A policy and the tokenizer that belongs to it."""

    model: CausalLM
    tokenizer: Tokenizer
    path: str = ""


@dataclass
class Response:
    """Generated text. tokens: its ids, the end token and what a stop string cut off included; finished: it ended by itself, not by its length."""

    text: str
    tokens: list[int]
    finished: bool
    sample: int = 0
    logprobs: list[float] | None = None


def load(ckpt_dir: str, *, dtype: str = "auto", device: str = "auto", model_type: str = "", tokenizer_file: str = "", chat_format: str | None = None,
         model_parallel_size: int = -1, tokenizer=None) -> LanguageModel:
    """Collective. A policy from any checkpoint that the scripts read, adapters merged; starts the process groups if nobody has. All models of a process share those.

    dtype: auto (bf16 where the machine multiplies it fast, else fp32), fp32, bf16 or fp16.  device: auto, cpu or cuda.
    tokenizer_file: a folder or file, where it is not beside the weights.  tokenizer: one that is already there.
    ValueError when the tokenizer has ids that the model lacks, or the checkpoint is damaged or unknown.
    """
    if not groups.started():
        groups.initialize(model_parallel_size, device=device)
    elif device not in ("auto", groups.device().type) or model_parallel_size not in (-1, groups.tp_size()):
        raise ValueError(f"device={device!r}, model_parallel_size={model_parallel_size}: this process has started on {groups.device().type} with {groups.tp_size()} "
                         "tensor-parallel ranks, which hold for all its models. Leave the two out, or begin a new process.")
    with groups.together(f"looking for {ckpt_dir}"):
        path = store.find(ckpt_dir)
    tokenizer = tokenizer or load_tokenizer(tokenizer_file or path, chat_format=chat_format)
    model = load_model(path, dtype=groups.default_dtype(dtype), model_type=model_type)
    check_vocabulary(tokenizer, model, path)
    return LanguageModel(model, tokenizer, path)


def generate(model: LanguageModel, prompts, **options):
    """Collective. The response to a prompt, or the list of responses to a list of prompts.

    prompts: text, a conversation [{"role": "user", "content": ...}, ...], or token ids (a list, an array, a tensor); or a list of such.
    options:
      max_new_tokens=256, min_new_tokens=0 (no end token before; a stop string ends a response all the same), max_seq_len: lengths
      max_batch_size=64: rows at once; max_cache_gb, cuda_graphs="auto": see generation.steps
      temperature=0.0 (greedy), top_k=0, top_p=1.0, min_p=0.0, seed=0: see sampling.Sampling
      stop=(): strings that end a response; they are not part of its text
      n_samples=1: responses to each prompt
      use_chat_template: default for conversations, not for text; system_prompt=None
      with_logprobs=False: of the chosen tokens in what they were drawn from, temperature and filters applied
      statistics, on_step, request_ids: see generation.generate
    Returns a Response where one prompt is given and n_samples is 1, else a list in place of each of the two.
    """
    single = _is_one(prompts)
    answers: list = respond(model, [prompts] if single else prompts, **options)
    if options.get("n_samples", 1) == 1:
        answers = [samples[0] for samples in answers]
    return answers[0] if single else answers


def respond(model: LanguageModel, prompts: Sequence, **options) -> list[list[Response]]:
    """Collective. `generate` in its plain form: a list of prompts -> [prompt][sample]."""
    rows, options, ends = _prepare(model, prompts, **options)
    return [[Response(_before(model.tokenizer.decode(c.tokens), ends), c.tokens, c.finished, c.sample, c.logprobs) for c in samples]
            for samples in generation.generate(model.model, rows, **options)]


def stream(model: LanguageModel, prompt, **options) -> Iterator[str]:
    """Collective. The text of the response to one prompt, in pieces as they come. options: as of `generate`, but for n_samples and on_step."""
    if options.get("n_samples", 1) != 1:
        raise ValueError(f"n_samples={options['n_samples']}: a stream is the text of one response; `generate` gives several")
    if not _is_one(prompt) and len(prompt) > 0:
        raise ValueError("a stream is the response to one prompt; `generate` takes several")
    (row,), options, ends = _prepare(model, [prompt], **options)
    shown, text, growing = "", "", GrowingText(model.tokenizer)
    for new, completed in generation.steps(model.model, [row], **options):
        for *_, token in new:
            text = growing.add(token)
        ready = _before(text, ends) if completed else _settled(_before(text, ends), ends)
        if len(ready) > len(shown):
            yield ready[len(shown):]
            shown = ready


def _is_one(prompts) -> bool:
    """Whether this is a prompt, not a list of them."""
    if isinstance(prompts, dict):
        raise ValueError("a conversation is a list of messages: [{\"role\": \"user\", \"content\": ...}], also where there is one")
    return isinstance(prompts, str) or len(prompts) > 0 and isinstance(_plain(prompts[0]), (int, dict))


def _prepare(model: LanguageModel, prompts: Sequence, *, stop: Sequence[str] | str | None = (), temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
             min_p: float = 0.0, seed: int = 0, use_chat_template: bool | None = None, system_prompt: str | None = None,
             **options) -> tuple[list[list[int]], dict, tuple[str, ...]]:
    """Token ids of the prompts, options of generation.steps, stop strings."""
    ends = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if "" in ends:
        raise ValueError("an empty stop string would end every response before it begins")
    rows = []
    for number, prompt in enumerate(map(_plain, prompts), 1):
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], int):
            if wrong := [token for token in prompt if not 0 <= token < model.model.config.vocab_size]:
                raise ValueError(f"prompt {number}: token {wrong[0]} is none of this model's, 0 to {model.model.config.vocab_size - 1}")
            rows.append(list(prompt))
        else:
            chat = not isinstance(prompt, str) if use_chat_template is None else use_chat_template
            rows.append(encode_prompt(model.tokenizer, prompt, use_chat_template=chat, system_prompt=system_prompt))
    options |= {"eos_ids": model.tokenizer.eos_ids, "sampling": Sampling(temperature, top_k, top_p, min_p, seed), "stop": stop_at(model.tokenizer, ends)}
    return rows, options, ends


def _plain(value):
    """Arrays, tensors, and numbers out of them, as Python's own."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def stop_at(tokenizer, ends: Sequence[str]) -> Callable[[list[int]], bool] | None:
    """Whether one of the strings has just been completed by the last of these tokens."""
    if not ends:
        return None
    longest = max(len(end.encode()) for end in ends) + 4        # a token is at least a byte, but for the first few of a text

    def stops(tokens: list[int]) -> bool:
        tail = tokenizer.decode(tokens[-longest:])
        return any(end in tail for end in ends)

    return stops


def _before(text: str, ends: Sequence[str]) -> str:
    """The text up to the first stop string."""
    return text[:min((at for end in ends if (at := text.find(end)) >= 0), default=len(text))]


def _settled(text: str, ends: Sequence[str]) -> str:
    """The part that more tokens cannot change: no half character at its end, nothing that may become a stop string."""
    text = text.rstrip("\ufffd")
    held = max((n for end in ends for n in range(1, len(end)) if text.endswith(end[:n])), default=0)
    return text[:len(text) - held]
