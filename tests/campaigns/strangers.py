"""Files from strangers: damage every kind of file we read, open files made to do harm, and fuzz the readers of text.

    python tests/campaigns/strangers.py --flips 200 --fuzz 20000

Each case runs in a process of its own with a limit on time and memory. Three tables are printed; the exit code is 1 if
any case ended in a way that it must not: a difference unnoticed although the file has checksums, a program executed, a signal, a
hang, an exception that is not an error message, a message that does not name its file, an attack that took over 2 s of processor
time or 100 MB more than torch and the others hold. --kinds and --only TEXT keep the kinds of damaged files, and the attacks and fuzz targets, that contain TEXT.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from campaigns import strangers_corpus, strangers_fuzz  # noqa: E402
from campaigns.isolation import held_mb, run_cases, work_seconds  # noqa: E402
from llama_rlhf import chat_templates, cli  # noqa: E402

LIMIT_SECONDS, LIMIT_MB = 2.0, 100      # for an attack to be refused in; the memory is what it takes beside the packages


# -- what is opened, and what a reader gets of it ----------------------------------------------------------------------


def digest(*values):
    """A text that changes with any bit of the values: tensors, or what json can write."""
    total = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            total.update(f"{value.dtype}{list(value.shape)}".encode() + value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            total.update(json.dumps(value, sort_keys=True, default=str).encode())
    return total.hexdigest()


def world():
    """Process groups of one, once for each process."""
    from llama_rlhf.parallel import groups
    if not torch.distributed.is_initialized():
        groups.initialize(device="cpu")
        torch.set_num_threads(1)


def of_model(folder, trainer=False):
    from llama_rlhf.checkpoint.shards import load_model, load_training_state
    from llama_rlhf.trainer import Trainer
    world()
    model = load_model(str(folder))
    values = [model.config.to_dict(), *(part for item in model.named_parameters() for part in item)]
    if trainer:
        state = Trainer(model, lr=1e-2, total_steps=3)
        load_training_state(state, str(folder))
        values += [part for item in state.state_tensors().items() for part in item]
    return digest(*values)


def of_tokenizer(path, chat=False):
    from llama_rlhf.tokenizer import load_tokenizer
    tokenizer = load_tokenizer(path)
    text = "Hello world, what is 12 + 30?\n\n the answer is 42 é"
    return digest(tokenizer.encode(text, bos=True), tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id, tokenizer.special_ids, tokenizer.vocab_size,
                  tokenizer.chat_template, tokenizer.chat([{"role": "user", "content": "Hello"}]) if chat else None)


def of_save(folder):
    """As the scripts: which save is newest, its step, its tokenizer, weights and optimizer state."""
    from llama_rlhf.checkpoint import store
    path = store.resolve(str(folder.parent))
    if path != str(folder):
        raise ValueError(f"{folder}: not taken for a complete save")
    return digest(sorted(store.complete_saves(str(folder.parent))), of_tokenizer(folder), of_model(folder, trainer=True))


def of_adapter(folder):
    from llama_rlhf.checkpoint.shards import Rewrite
    world()
    with Rewrite(str(folder.parent / "hf"), adapter=str(folder)) as rewrite:
        return digest(str(rewrite.lora), *(part for name in rewrite.pieces if "lora" in name for part in (name, rewrite.read(name))))


def of_rollout(folder):
    from llama_rlhf.rollout import Rollout
    return digest(*(part for item in vars(Rollout.load(str(folder / "rollout-1.pt"))).items() for part in item))


def of_gguf(folder):
    return digest(of_tokenizer(folder / "model.gguf"), of_model(folder))


def of_records(name):
    def read(folder):
        from llama_rlhf.data import judged_problems
        from llama_rlhf.records import answers_of, prompt_of, read_records
        records = read_records(folder / name)
        if name == "samples.jsonl":
            return digest([(p.prompt, p.responses, p.labels, repr(p.pairs)) for p in judged_problems(records)[1]])
        return digest([(prompt_of(r, f"{folder / name}, record {i}"), answers_of(r, f"{folder / name}, record {i}")) for i, r in enumerate(records, 1)])
    return read


def of_problems(folder):
    from llama_rlhf.tasks import gsm8k
    return digest([vars(problem) for problem in gsm8k.load(folder / "test.json")])


def of_flags(folder):
    def main(*, ckpt_dir: str, lr: float = 1e-5, seeds: list[int] = [1], use_chat_template: bool = False):      # noqa: B006
        pass
    try:
        return digest(cli.parse(main, ["--config", str(folder / "run.yaml")]))
    except cli.UsageError as error:
        raise ValueError(str(error)) from None


# name -> (folder under the root, file, reader, what must notice a change: "manifest", "crc" or "" when the format has no checksum)
KINDS = {
    "own save: manifest.json": ("run/step-3", "manifest.json", of_save, "manifest"),
    "own save: consolidated.00.pth": ("run/step-3", "consolidated.00.pth", of_save, "manifest"),
    "own save: training.00.pth": ("run/step-3", "training.00.pth", of_save, "manifest"),
    "own save: params.json": ("run/step-3", "params.json", of_save, "manifest"),
    "own save: tokenizer.json": ("run/step-3", "tokenizer.json", of_save, "manifest"),
    "rollout-1.pt": ("rollout", "rollout-1.pt", of_rollout, "crc"),
    "Meta: consolidated.00.pth": ("meta", "consolidated.00.pth", of_model, "crc"),
    "HF: pytorch_model.bin": ("bin", "pytorch_model.bin", of_model, "crc"),
    "HF: model-1.safetensors": ("hf-index", "model-1.safetensors", of_model, ""),
    "HF: model.safetensors.index.json": ("hf-index", "model.safetensors.index.json", of_model, ""),
    "HF: config.json": ("hf", "config.json", of_model, ""),
    "Meta: params.json": ("meta", "params.json", of_model, ""),
    "model.gguf": ("gguf", "model.gguf", of_gguf, ""),
    "PEFT: adapter_model.safetensors": ("peft", "adapter_model.safetensors", of_adapter, ""),
    "PEFT: adapter_config.json": ("peft", "adapter_config.json", of_adapter, ""),
    "tokenizer.json": ("tokenizer", "tokenizer.json", of_tokenizer, ""),
    "tokenizer_config.json": ("tokenizer", "tokenizer_config.json", lambda folder: of_tokenizer(folder, chat=True), ""),
    "generation_config.json": ("tokenizer", "generation_config.json", of_tokenizer, ""),
    "tokenizer.model": ("sentencepiece", "tokenizer.model", of_tokenizer, ""),
    "qwen.tiktoken": ("tiktoken", "qwen.tiktoken", of_tokenizer, ""),
    "train.json": ("data", "train.json", of_records("train.json"), ""),
    "train.jsonl": ("data", "train.jsonl", of_records("train.jsonl"), ""),
    "samples.jsonl": ("data", "samples.jsonl", of_records("samples.jsonl"), ""),
    "test.json (GSM8K)": ("data", "test.json", of_problems, ""),
    "run.yaml (--config)": ("data", "run.yaml", of_flags, ""),
}


def build(root):
    """One small valid file of every kind, written by the libraries and scripts that users have them from."""
    import gguf
    import sentencepiece
    import tokenizers
    import toys
    from safetensors.torch import save_file

    from llama_rlhf.checkpoint.export import export_peft
    from llama_rlhf.checkpoint.formats import open_file
    from llama_rlhf.checkpoint.shards import load_model, save_model, split_checkpoint
    from llama_rlhf.models import FAMILIES
    from llama_rlhf.models.family import lookup
    from llama_rlhf.parallel.layers import Lora
    from llama_rlhf.rollout import Rollout
    from llama_rlhf.trainer import Trainer, response_logprobs
    world()
    for name in ("hf", "bin", "hf-index", "gguf", "peft", "tokenizer", "sentencepiece", "tiktoken", "data", "rollout", "run"):
        (root / name).mkdir()

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    corpus = ["Hello world, what is 12 + 30?", "the answer is 42\n", "spaces   and  tabs\t", "system user assistant"] * 5
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus, tokenizers.trainers.BpeTrainer(
        vocab_size=330, show_progress=False, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], initial_alphabet=alphabet))
    tokenizer.save(str(root / "tokenizer/tokenizer.json"))
    (root / "tokenizer/tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}, "add_bos_token": False,
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"}))
    (root / "tokenizer/generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "bos_token_id": 1}))
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus * 20), model_prefix=str(root / "sentencepiece/tokenizer"), vocab_size=300,
                                             model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=9)
    (root / "sentencepiece/tokenizer.vocab").unlink()
    import base64
    ranks = [bytes([b]) for b in range(256)] + [b"he", b"ll", b"hell", b"the", b" the"]
    (root / "tiktoken/qwen.tiktoken").write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranks)))

    model = toys.make_hf(str(root / "hf"), "llama")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shutil.copy(root / "hf/config.json", root / "bin")
    torch.save(tensors, root / "bin/pytorch_model.bin")
    shutil.copy(root / "hf/config.json", root / "hf-index")
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[: len(names) // 2], "model-2.safetensors": names[len(names) // 2:]}
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, root / "hf-index" / file)
    (root / "hf-index/model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: file for file, half in halves.items() for name in half}}))
    split_checkpoint(str(root / "hf"), str(root / "meta"), 1)
    (root / "meta/manifest.json").unlink()

    writer = gguf.GGUFWriter(str(root / "gguf/model.gguf"), "llama")
    c = model.config
    for add, value in ((writer.add_embedding_length, c.hidden_size), (writer.add_block_count, c.num_hidden_layers), (writer.add_context_length, 128),
                       (writer.add_head_count, c.num_attention_heads), (writer.add_head_count_kv, c.num_key_value_heads), (writer.add_key_length, c.head_dim),
                       (writer.add_feed_forward_length, c.intermediate_size), (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_freq_base, 1e4)):
        add(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    spec = json.loads(tokenizer.to_str())
    writer.add_token_list(sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
    writer.add_token_types([3] * 3 + [1] * (len(spec["model"]["vocab"]) - 3))
    writer.add_eos_token_id(2)
    with open_file(root / "meta/consolidated.00.pth") as native:
        for name in native.infos:
            writer.add_tensor(lookup(FAMILIES["llama"].gguf, name).name, native.read(name).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def train_and_save(folder, **options):
        model = load_model(str(root / "hf"), **options)
        trainer = Trainer(model, lr=1e-2, total_steps=3)
        for _ in range(3):
            trainer.step([([[5, 6, 7, 8, 9]], [2])], lambda batch: -response_logprobs(model, *batch).sum(), lambda batch: 3)
        save_model(model, str(folder), companions=str(root / "tokenizer"), trainer=trainer, step=3, epoch=0)

    train_and_save(root / "run/step-3")
    train_and_save(root / "lora", lora=Lora(2, 4.0))
    (root / "peft").rmdir()
    export_peft(str(root / "lora"), str(root / "peft"))
    mask = torch.ones(2, 3, dtype=torch.bool)
    Rollout([0, 0], [0, 1], [[1, 2, 3, 4]] * 2, [1, 1], [True, False], ["ab", "cd"], [True, None], [{"rule": 1.0}] * 2, torch.ones(2), ~mask[:, 0], mask,
            torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3), None, None, torch.zeros(2), 1.0, {"truncated": 1}).save(str(root / "rollout/rollout-1.pt"))

    rows = [{"instruction": f"What is {i} + {i}?", "output": f"It is {2 * i}.\n#### {2 * i}"} for i in range(30)]
    for name in ("train.json", "test.json"):
        (root / "data" / name).write_text(json.dumps(rows, indent=1))
    (root / "data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "data/samples.jsonl").write_text("".join(json.dumps({
        "id": i, "sample": 0, "prompt": row["instruction"], "output": row["output"], "finished": True, "correct": i % 2 == 0}) + "\n" for i, row in enumerate(rows)))
    (root / "data/run.yaml").write_text("ckpt_dir: runs/llama\nlr: 1e-5\nseeds: [1, 2, 3]\nuse_chat_template: true\n")


# -- damage ------------------------------------------------------------------------------------------------------------


def damages(data, flips, seed):
    """(name, damaged bytes): random bit flips, every class of truncation, appended and blanked bytes."""
    return [(name, damaged) for name, damaged in _damages(data, flips, seed) if damaged != data]    # a blank block may have been blank


def _damages(data, flips, seed):
    rng = random.Random(seed)
    for _ in range(flips):
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        yield f"bit {bit} of byte {at}", data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:]
    cuts = {0, 1, 7, 8, len(data) // 2, len(data) - 1, *range(4096, len(data), 4096)}
    for size in sorted(cut for cut in cuts if cut < len(data)):
        yield f"cut to {size}", data[:size]
    for name, more in {"a zero": b"\0", "a character": b"x", "4 KiB of zeros": bytes(4096), "itself": data}.items():
        yield f"{name} appended", data + more
    half = len(data) // 2
    yield "second half blank", data[:half] + bytes(len(data) - half)        # a file system that lost what it had not flushed
    if len(data) > 8192:
        yield "a block blank", data[:4096] + bytes(4096) + data[8192:]


def judge(read, folder, file, before):
    """(kind, detail): what became of reading a damaged file."""
    try:
        after = read(folder)
    except (Exception, SystemExit) as error:        # noqa: BLE001
        if not cli._is_user_error(error):
            return "traceback", f"{type(error).__name__}: {error}"
        names = file in str(error) or folder.name in str(error) or "the chat template of this tokenizer" in str(error)
        return "refused" if names else "unnamed", str(error)
    return ("same" if after == before else "different"), ""


def damaged(root, only, flips, seed):
    """Counter of endings for each kind, and the cases that must not be."""
    from llama_rlhf import tokenizer
    tokenizer.TIKTOKEN_FAMILIES[261] = tokenizer.TIKTOKEN_FAMILIES[151643]      # of 261 ranks: the real ones take seconds to load
    kinds = {name: kind for name, kind in KINDS.items() if only in name}
    before = {}
    for name, ending in run_cases(lambda name: ("same", kinds[name][2](root / kinds[name][0])), kinds):
        if ending.kind != "same":
            raise SystemExit(f"the undamaged {name} does not load: {ending.detail}")
        before[name] = ending.detail

    def cases():
        for name, (folder, file, *_) in kinds.items():
            for what, data in damages((root / folder / file).read_bytes(), flips, f"{seed}/{name}"):
                yield name, what, data

    def run(case):
        name, what, data = case
        folder, file, read, _ = kinds[name]
        with tempfile.TemporaryDirectory(dir=root) as copy:     # the whole folder: its name is part of what is read
            parent = Path(copy, *Path(folder).parent.parts)
            shutil.copytree(root / folder, parent / Path(folder).name)
            if folder == "peft":
                (parent / "hf").symlink_to(root / "hf")
            (parent / Path(folder).name / file).write_bytes(data)
            return judge(read, parent / Path(folder).name, file, before[name])

    endings, faults = {name: Counter() for name in kinds}, []
    for (name, what, data), ending in run_cases(run, cases(), batch=20):
        kind = ending.kind
        endings[name][kind] += 1
        unnoticed = kind == "different" and kinds[name][3]
        if unnoticed or kind not in ("refused", "same", "different"):
            faults.append(f"{name}, {what}: {kind} {ending.detail}")
    return endings, faults


# -- attacks -----------------------------------------------------------------------------------------------------------


def attacked(root, only):
    """(name, ending, seconds by the clock, whether its program ran when opened the careless way, fault or "") of each attack."""
    strangers_corpus.HF = root / "hf"
    corpus = {name: (build, bait) for name, build, bait in strangers_corpus.CORPUS if only in name}

    def attack(name):
        folder = Path(tempfile.mkdtemp(dir=root))
        canary = folder / "canary"
        (folder / "files").mkdir()
        opens = corpus[name][0](folder / "files", canary)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")             # the peak is of opening, not of building
        start, work, held = time.monotonic(), work_seconds(), held_mb()
        try:
            opens()
            kind, detail = "loaded", ""
        except (Exception, SystemExit) as error:        # noqa: BLE001
            kind = "refused" if cli._is_user_error(error) else "traceback"
            detail = f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - start
        if chat_templates._worker:
            chat_templates._worker[1].kill()
            chat_templates._worker[1].wait()            # its work counts
        return ("EXECUTED" if canary.exists() else kind), json.dumps([seconds, work_seconds() - work, held, detail[:300]])

    def lure(name):
        folder = Path(tempfile.mkdtemp(dir=root))
        (folder / "files").mkdir()
        corpus[name][0](folder / "files", folder / "canary")
        try:
            corpus[name][1](folder / "files")
        except BaseException:       # noqa: BLE001
            pass
        return ("works" if (folder / "canary").exists() else "dead"), ""

    baits = {name: ending.kind for name, ending in run_cases(lure, [name for name in corpus if corpus[name][1]])}
    results = []
    for name, ending in run_cases(attack, corpus):
        waited, held = ending.seconds, 0
        if ending.kind in ("refused", "loaded", "traceback", "EXECUTED"):
            waited, ending.seconds, held, ending.detail = json.loads(ending.detail)
        harmless = ending.kind == "loaded" and baits.get(name) == "works"      # a program that was there, and ignored
        fault = "" if ending.kind == "refused" or harmless else ending.kind
        if ending.seconds > LIMIT_SECONDS or ending.peak_mb > held + LIMIT_MB:
            fault = fault or "too slow" if ending.seconds > LIMIT_SECONDS else "too much memory"
        if baits.get(name) == "dead":
            fault = "its program does not work: the attack shows nothing"
        results.append((name, ending, waited, baits.get(name, ""), fault))
    return results


# -- main --------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=200, help="random bit flips in each kind of file; -1: no damage at all")
    parser.add_argument("--fuzz", type=int, default=20000, help="inputs over all fuzz targets; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="", help="part of the name of the kinds of file to damage")
    parser.add_argument("--only", default="", help="part of the name of attacks and fuzz targets")
    parser.add_argument("--no-attacks", action="store_true")
    options = parser.parse_args()
    # everything a case may need, imported once
    import safetensors.torch  # noqa: F401
    import yaml  # noqa: F401
    import gguf  # noqa: F401
    import sentencepiece  # noqa: F401
    import tokenizers  # noqa: F401
    import llama_rlhf.checkpoint.export, llama_rlhf.rollout, llama_rlhf.tasks.gsm8k, llama_rlhf.tokenizer, llama_rlhf.trainer  # noqa: E401, F401
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        ((_, ending),) = run_cases(lambda _: (build(Path(folder)), ("same", ""))[1], [0], seconds=300)
        if ending.kind != "same":
            raise SystemExit(f"could not build the files: {ending.detail}")
        if options.flips >= 0:
            start = time.monotonic()
            endings, found = damaged(Path(folder), options.kinds, options.flips, options.seed)
            faults += found
            columns = ("refused", "same", "different", "unnamed", "traceback", "signal", "hang")
            print(f"{'damaged file':34}{'cases':>7}" + "".join(f"{c:>11}" for c in columns) + "  a change is noticed by")
            for name, counts in endings.items():
                guard = {"manifest": "SHA-256 in the manifest", "crc": "CRC-32 in the archive", "": "nothing, if it is still valid"}[KINDS[name][3]]
                print(f"{name:34}{sum(counts.values()):7}" + "".join(f"{counts[c]:11}" for c in columns) + f"  {guard}")
            total = sum(endings.values(), Counter())
            silent = sum(counts["different"] for name, counts in endings.items() if KINDS[name][3])
            print(f"{'all':34}{sum(total.values()):7}" + "".join(f"{total[c]:11}" for c in columns))
            print(f"{silent} silent differences in files with checksums; {time.monotonic() - start:.0f} s\n")
        if not options.no_attacks:
            results = attacked(Path(folder), options.only)
            print(f"{'attack':78}{'program':>9}{'ending':>10}{'work s':>8}{'clock s':>9}{'peak MB':>9}")
            for name, ending, waited, bait, fault in results:
                print(f"{name[:77]:78}{bait:>9}{ending.kind:>10}{ending.seconds:8.2f}{waited:9.2f}{ending.peak_mb:9.0f}{'  <-- ' + fault if fault else ''}")
                if fault:
                    faults.append(f"{name}: {fault}: {ending.detail}")
            if results:
                print(f"{len(results)} attacks: {sum(e.kind == 'EXECUTED' for _, e, *_ in results)} executed, {sum(e.kind == 'refused' for _, e, *_ in results)} "
                      f"refused, {sum(e.kind == 'loaded' for _, e, *_ in results)} loaded with their program ignored; at most "
                      f"{max(e.seconds for _, e, *_ in results):.2f} s and {max(e.peak_mb for _, e, *_ in results):.0f} MB\n")
        targets = [name for name in strangers_fuzz.TARGETS if options.only in name] if options.fuzz else []
        if options.fuzz and not strangers_fuzz.TARGETS:
            print("no fuzzing: pip install hypothesis")
        if targets:
            start, each = time.monotonic(), max(1, options.fuzz // len(targets))
            for name, ending in run_cases(lambda name: strangers_fuzz.run(name, each, options.seed), targets, seconds=3600):
                print(f"fuzz {name:40}{each:7} inputs  {ending.kind}")
                if ending.kind != "passed":
                    faults.append(f"fuzz {name}: {ending.kind}: {ending.detail}")
            print(f"{each * len(targets)} inputs; {time.monotonic() - start:.0f} s\n")
    for fault in faults[:40]:
        print("FAULT", fault)
    print(f"{len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
