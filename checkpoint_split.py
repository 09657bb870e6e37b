"""Rewrite a checkpoint: any format in, any number of shards out; export to Hugging Face; put PEFT adapters on, or take them off.
Or look into one, or compare two.

    python checkpoint_split.py --ckpt_file /models/Llama-2-7b-hf --save_path /models/7b-8 --n 8
    python checkpoint_split.py --ckpt_file runs/sft --save_path /models/sft-hf --format hf --merge_lora --dtype bf16
    python checkpoint_split.py --inspect /models/7b-8
    python checkpoint_split.py --diff /models/Llama-2-7b-hf runs/sft

torchrun works too; before Python 3.12.8 and 3.13.1 its own parser stumbles over --n: put -- before the script's name.
"""

from llama_rlhf.cli import run


def main(
    *,
    ckpt_file: str = "",
    save_path: str = "",
    n: int = 1,
    format: str = "native",
    dtype: str = "keep",
    merge_lora: bool = False,
    adapter: str = "",
    model_type: str = "",
    tokenizer_file: str = "",
    max_shard_gb: float = 5.0,
    inspect: str = "",
    diff: list[str] = [],
):
    """Split, merge or convert a checkpoint. No GPU needed; memory for one tensor, whatever the size of the model.

    One process works; others that torchrun may have started leave at once.

    Args:
        ckpt_file: a .safetensors, .bin, .pth or .gguf file, a Hugging Face folder, Meta's shards, or what our scripts saved
        save_path: new folder; it appears complete or not at all
        n: shards to write, one per tensor-parallel rank; nothing needs to divide; 1 merges
        format: native (consolidated.NN.pth), hf (a folder for transformers), peft (only the adapters, for the peft package)
        dtype: of the weights: keep, bf16, fp16 or fp32; adapters and value heads stay fp32
        merge_lora: add the adapters into the weights
        adapter: a PEFT adapter folder to put on the model
        model_type: a preset such as llama-2-7b, needed only when the checkpoint has no config of its own
        tokenizer_file: tokenizer file or its folder, when it is not beside the weights
        max_shard_gb: with --format hf, largest size of one file
        inspect: only print what this checkpoint holds: parameters, dtype, layout, the plan for its shards (or --n), norms
        diff: only print what differs between two checkpoints, A B; exit code 1 if anything does
    """
    import os
    import signal
    import sys
    import time

    if os.environ.get("RANK", "0") != "0":
        return
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):      # a world of one, also under torchrun
        os.environ.pop(name, None)

    import torch

    from llama_rlhf.checkpoint import report
    from llama_rlhf.checkpoint.export import companions_folder, export_hf, export_peft
    from llama_rlhf.checkpoint.shards import split_checkpoint
    from llama_rlhf.parallel import groups

    dtypes = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"--dtype {dtype!r}: use one of {', '.join(dtypes)}")
    if bool(inspect) + bool(diff) + bool(ckpt_file and save_path) != 1 or len(diff) not in (0, 2):
        raise ValueError("give --ckpt_file and --save_path, or --inspect X, or --diff A B")
    if format not in ("native", "hf", "peft"):
        raise ValueError(f"--format {format!r}: use native, hf or peft")
    if format != "native" and n != 1:
        raise ValueError(f"--n {n} with --format {format}: only native shards are cut for ranks. Leave out --n.")
    if format == "peft" and (merge_lora or adapter):
        raise ValueError("--format peft writes the adapters of a checkpoint; it takes neither --merge_lora nor --adapter")
    if max_shard_gb <= 0:
        raise ValueError(f"--max_shard_gb {max_shard_gb} must be positive")
    if inspect or diff:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `| head` ends it without a word
    start = last = time.perf_counter()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if (now := time.perf_counter()) - last > 5:
            last = now
            groups.log(f"{done / 1e9:.1f} of {total / 1e9:.1f} GB, {done / 1e6 / (now - start):.0f} MB/s")

    options: dict = dict(model_type=model_type, progress=progress)
    groups.initialize(device="cpu")
    try:
        if inspect:
            report.print_contents(inspect, n if n > 1 else 0, model_type)
            return
        if diff:
            sys.exit(report.print_differences(diff[0], diff[1], model_type))
        if format == "peft":
            export_peft(ckpt_file, save_path, **options)
        else:
            options |= dict(dtype=dtypes[dtype], merge_lora=merge_lora, adapter=adapter, tokenizer=companions_folder(tokenizer_file))
            if format == "hf":
                export_hf(ckpt_file, save_path, max_shard_bytes=int(max_shard_gb * 1e9), **options)
            else:
                split_checkpoint(ckpt_file, save_path, n, **options)
    finally:
        groups.shutdown()
    seconds = time.perf_counter() - start
    names = sorted(os.listdir(save_path))
    n_bytes = sum(os.path.getsize(os.path.join(save_path, name)) for name in names)
    if format != "peft" and not any("tokenizer" in name or "tiktoken" in name for name in names):
        print(f"note: no tokenizer found beside {ckpt_file}; pass --tokenizer_file to take one along")
    print(f"written to {save_path}: {', '.join(names)}")
    print(f"{n_bytes / 1e9:.2f} GB in {seconds:.1f} s, {n_bytes / 1e6 / seconds:.0f} MB/s")


if __name__ == "__main__":
    run(main)
