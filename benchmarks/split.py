"""Time of checkpoint_split.py beside a plain copy of the same bytes, and its memory.

    python benchmarks/split.py --gb 4

Both end with fsync; the two are interleaved and the best of --repeat counts, because other users of the disk disturb
either. Memory is the largest RssAnon of the process (pages of mapped files, which the system can drop, not included).
"""

import json
import os
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from llama_rlhf.cli import run  # noqa: E402

SCRIPT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "checkpoint_split.py")


def main(*, gb: float = 4.0, n: int = 8, repeat: int = 2, container: str = "safetensors", dtype: str = "keep",
         folder: str = "/tmp"):
    """Split a random LLaMA-shaped bf16 checkpoint and print seconds, the ratio to a plain copy, and memory.

    Args:
        gb: size of the checkpoint, 10^9 bytes
        n: shards
        repeat: runs of each; the best counts
        container: safetensors or bin
        dtype: of the shards, as in checkpoint_split.py
        folder: on the disk to be measured; a folder made in it, of three times the size, is removed at the end
    """
    os.makedirs(folder, exist_ok=True)
    copies, splits = [], []
    with tempfile.TemporaryDirectory(prefix="split-benchmark-", dir=folder) as work:
        source = os.path.join(work, "source")
        size, largest = make_checkpoint(source, gb, container)
        print(f"checkpoint: {size / 1e9:.2f} GB ({container}), largest tensor {largest / 1e6:.0f} MB, load {os.getloadavg()[0]:.1f}")
        for i in range(repeat):
            copies.append(copy(source, os.path.join(work, "copy")))
            splits.append(split(source, os.path.join(work, "shards"), n, dtype))
            seconds, anon, tail = splits[-1]
            print(f"run {i + 1}: copy {copies[-1]:.1f} s, split {seconds:.1f} s, RssAnon {anon / 1e6:.0f} MB, load "
                  f"{os.getloadavg()[0]:.1f}; {tail}", flush=True)
    best, anon = min(s[0] for s in splits), max(s[1] for s in splits)
    print(f"best of {repeat}: copy {min(copies):.1f} s, split to {n} {best:.1f} s, ratio {best / min(copies):.2f}; "
          f"RssAnon at most {anon / 1e6:.0f} MB = largest tensor + {(anon - largest) / 1e6:.0f} MB")


def make_checkpoint(folder, gb, container):
    """A LLaMA-2-shaped Hugging Face folder of about `gb`; returns its bytes and those of its largest tensor."""
    import torch

    from llama_rlhf.checkpoint.formats import TensorInfo
    from llama_rlhf.checkpoint.writer import PthWriter, SafetensorsWriter
    dim, ffn, heads, vocab = 4096, 11008, 32, 32000
    layer = 4 * dim * dim + 3 * dim * ffn + 2 * dim
    n_layers = max(1, round((gb * 1e9 / 2 - 2 * vocab * dim) / layer))
    block = {"input_layernorm": (dim,), "self_attn.q_proj": (dim, dim), "self_attn.k_proj": (dim, dim), "self_attn.v_proj": (dim, dim),
             "self_attn.o_proj": (dim, dim), "post_attention_layernorm": (dim,), "mlp.gate_proj": (ffn, dim), "mlp.up_proj": (ffn, dim),
             "mlp.down_proj": (dim, ffn)}
    shapes = {"model.embed_tokens.weight": (vocab, dim), "model.norm.weight": (dim,), "lm_head.weight": (vocab, dim),
              **{f"model.layers.{i}.{name}.weight": shape for i in range(n_layers) for name, shape in block.items()}}
    infos = {name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes.items()}
    os.makedirs(folder)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump({"model_type": "llama", "hidden_size": dim, "num_hidden_layers": n_layers, "num_attention_heads": heads,
                   "intermediate_size": ffn, "vocab_size": vocab, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}, file)
    noise = torch.randint(-2**15, 2**15, (vocab * dim + len(infos),), dtype=torch.int16).view(torch.bfloat16)
    path = os.path.join(folder, "model.safetensors" if container == "safetensors" else "pytorch_model.bin")
    with (SafetensorsWriter(path, infos) if container == "safetensors" else PthWriter(path)) as writer:
        for i, (name, info) in enumerate(infos.items()):
            writer.write(name, noise[i:i + torch.Size(info.shape).numel()].view(info.shape))
        return writer.close()["size"], vocab * dim * 2


def copy(source, target):
    """Seconds to copy and fsync every file of a folder."""
    import shutil
    remove(target)
    os.sync()
    start = time.perf_counter()
    os.makedirs(target)
    for name in os.listdir(source):
        shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
        with open(os.path.join(target, name), "rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    remove(target)
    return seconds


def split(source, target, n, dtype):
    """Seconds of the work itself (the start of Python and torch not included), largest RssAnon, the script's last line."""
    remove(target)
    os.sync()
    process = subprocess.Popen([sys.executable, SCRIPT, "--ckpt_file", source, "--save_path", target, "--n", str(n), "--dtype", dtype],
                               stdout=subprocess.PIPE, text=True)
    anon = 0
    while process.poll() is None:
        try:
            with open(f"/proc/{process.pid}/status") as file:
                anon = max([anon, *(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))])
        except OSError:
            pass
        time.sleep(0.01)
    lines = process.stdout.read().strip().splitlines()
    remove(target)
    if process.returncode:
        raise ValueError("checkpoint_split.py failed")
    return float(lines[-1].split(" s,")[0].split()[-1]), anon, lines[-1]


def remove(folder):
    import shutil
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    run(main)
