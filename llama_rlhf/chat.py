"""Talk to a checkpoint:  python -m llama_rlhf.chat --ckpt_dir runs/solver     (torchrun -m llama_rlhf.chat for more ranks)"""

from llama_rlhf.cli import check_range, run


def main(
    *,
    ckpt_dir: str,
    system_prompt: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 0.95,
    min_p: float = 0.0,
    stop: list[str] | None = None,
    seed: int = 0,
    model_type: str = "",
    tokenizer_file: str = "",
    chat_format: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    timeout_seconds: float = 86400.0,
):
    """Read a line, answer it, with the conversation so far in the model's chat format. /new forgets it, /quit or the end of input leaves; Ctrl-C cuts an answer short.

    A tokenizer without a chat template (a base model) gets each line alone, as training and evaluation give it.

    Args:
        ckpt_dir: the model: a folder of consolidated.NN.pth, a Hugging Face folder, a single weight file, a save_dir of a training script
        system_prompt: what the conversation begins with
        max_new_tokens: longest answer, in tokens
        temperature: 0 is greedy
        top_k: keep only the k most likely tokens; 0: all
        top_p: keep the most likely tokens up to this probability
        min_p: keep tokens at least so likely relative to the best
        stop: strings that end an answer, besides the end tokens; not part of its text
        seed: of the samples
        model_type: a preset such as llama-2-7b, needed only when the checkpoint has no config of its own
        tokenizer_file: when it is not beside the weights
        chat_format: llama-2, mistral-v1, mistral-v3, chatml or llama-3, for a tokenizer without a template of its own
        dtype: auto, bf16, fp16 or fp32
        device: auto, cpu or cuda
        timeout_seconds: how long the other ranks wait for a line
    """
    from llama_rlhf.api import load, stream
    from llama_rlhf.generation import Statistics
    from llama_rlhf.parallel import groups
    from llama_rlhf.sampling import Sampling

    check_range(1, max_new_tokens=max_new_tokens)
    Sampling(temperature, top_k, top_p, min_p, seed)        # refuses what cannot be sampled from
    groups.initialize(timeout_seconds=timeout_seconds, device=device)
    model = load(ckpt_dir, dtype=dtype, model_type=model_type, tokenizer_file=tokenizer_file, chat_format=chat_format)
    chats = model.tokenizer.chat_template is not None
    groups.log(f"{model.path}: {model.model.config.n_parameters / 1e6:.1f} M weights, {model.model.dtype}, {groups.tp_size()} ranks. /new begins anew, /quit leaves."
               + ("" if chats else "\nNo chat template here: each line is answered alone; --chat_format names one."))
    messages, n_turns = [], 0
    while (line := groups.broadcast_object(_line() if groups.is_main() else None)) is not None:
        if line == "/new":
            messages = []
        if not line or line == "/new":
            continue
        messages = [*messages, {"role": "user", "content": line}] if chats else [{"role": "user", "content": line}]
        answer, statistics = "", Statistics()
        try:
            for piece in stream(model, messages, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, stop=stop or (),
                                seed=seed, request_ids=[n_turns], use_chat_template=chats, system_prompt=system_prompt, statistics=statistics):
                answer += piece
                groups.log(piece, end="")
        except ValueError as error:         # the conversation has become too long, or the template wants another order
            groups.log(f"{error}\n(/new begins anew)")
            messages = messages[:-1]
            continue
        except KeyboardInterrupt:
            if groups.world_size() > 1:     # the ranks would part ways
                raise
        groups.log(f"\n[{statistics.new_tokens} tokens, {statistics.tokens_per_second:.1f} tokens/s]")
        messages, n_turns = [*messages, {"role": "assistant", "content": answer}], n_turns + 1
    groups.shutdown()


def _line() -> str | None:
    """What the user says; None when there is no more."""
    try:
        line = input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    return None if line == "/quit" else line


if __name__ == "__main__":
    run(main)
