"""Files made to do harm: each entry of CORPUS builds one in an empty folder and opens it as the scripts would.

    name, build(folder, canary) -> function that opens it, bait(folder) or None

The harm of a file that carries a program is to make the folder `canary`. bait opens it the careless way, to prove that the
program works: without that, "not executed" would mean nothing.
"""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile

import torch

CORPUS = []
HF = None       # a folder with a small model that loads


def entry(name, bait=None):
    def add(build):
        CORPUS.append((name, build, bait))
        return build
    return add


# -- ways to open ----------------------------------------------------------------------------------------------------


def open_file(path):
    from llama_rlhf.checkpoint import formats
    with formats.open_file(path) as file:
        file.check()
        for name in file.infos:
            file.read(name)


def open_folder(folder):
    """Tokenizer, config and weights, as the scripts do."""
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.parallel import groups
    groups.initialize(device="cpu")
    load_model(str(folder))


def chat(folder):
    from llama_rlhf.tokenizer import load_tokenizer
    load_tokenizer(folder).chat([{"role": "user", "content": "x" * 1000}])


def encode(folder):
    from llama_rlhf.tokenizer import load_tokenizer
    load_tokenizer(folder).encode("a" * 5000 + "!")


def main(*, ckpt_dir: str = "", lr: float = 1e-5, seeds: list[int] = []):   # noqa: B006
    """Of a script, for the command line."""


def config(path):
    from llama_rlhf import cli
    try:
        cli.parse(main, ["--config", str(path)])
    except cli.UsageError as error:
        raise ValueError(str(error)) from None


def records(path):
    from llama_rlhf.records import read_records
    read_records(path)


# -- containers ------------------------------------------------------------------------------------------------------


def zipped(path, pickled, records=(b"\0" * 16,), root="archive", **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr(f"{root}/data.pkl", pickled)
        archive.writestr(f"{root}/byteorder", "little")
        for i, data in enumerate(records):
            archive.writestr(f"{root}/data/{i}", data)
        archive.writestr(f"{root}/version", "3\n")
    return path


def weights(folder, name="pytorch_model.bin", **more):
    torch.save({"a": torch.ones(2), **more}, folder / name)
    return folder / name


def safetensors(path, header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def f32(shape, start, stop):
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


def gguf_text(value):
    return struct.pack("<Q", len(value)) + value


def gguf(path, n_tensors, n_fields, body):
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_fields) + body)
    return path


def gguf_tensor(name, dims, offset=0, kind=0):
    return gguf_text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def hf_folder(folder, **changes):
    """A checkpoint that loads, but for `changes` of its config.json."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(HF / name, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tokenizer_folder(folder, regex=None, template=None, **config):
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex is None}
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    vocab = {c: i for i, c in enumerate(map(chr, range(33, 127)))}
    spec = {"version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None, "decoder": byte_level,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": ([split] if regex else []) + [byte_level]},
            "model": {"type": "BPE", "vocab": vocab, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **config}))
    return folder


# -- programs in pickles ---------------------------------------------------------------------------------------------


def loads(folder):
    """torch.load as many projects call it; numbers and text also by plain pickle."""
    for path in sorted(folder.iterdir()):
        try:
            torch.load(path, weights_only=False)
        except Exception:       # noqa: BLE001  the program has run before that
            with open(path, "rb") as file:
                pickle.load(file)


def calls(function, *arguments, protocol=2):
    class Bait:
        def __reduce__(self):
            return function, arguments
    return Bait()


def program(canary):
    return f"__import__('os').mkdir({str(canary)!r})"


@entry("os.mkdir in a .pth (GLOBAL, REDUCE)", loads)
def _(folder, canary):
    path = weights(folder, "consolidated.00.pth", b=calls(os.mkdir, str(canary)))
    return lambda: open_file(path)


@entry("os.system in a .bin", loads)
def _(folder, canary):
    path = weights(folder, b=calls(os.system, f"mkdir {canary}"))
    return lambda: open_file(path)


@entry("eval", loads)
def _(folder, canary):
    path = weights(folder, b=calls(eval, program(canary)))
    return lambda: open_file(path)


@entry("exec, protocol 4 (STACK_GLOBAL)", loads)
def _(folder, canary):
    path = zipped(folder / "x.pth", pickle.dumps({"a": calls(exec, program(canary))}, protocol=4))
    return lambda: open_file(path)


@entry("INST, protocol 0", loads)
def _(folder, canary):
    path = zipped(folder / "x.pth", f"(S'mkdir {canary}'\nios\nsystem\n.".encode())
    return lambda: open_file(path)


@entry("OBJ", loads)
def _(folder, canary):
    path = zipped(folder / "x.pth", f"(cos\nsystem\nS'mkdir {canary}'\no.".encode())
    return lambda: open_file(path)


@entry("getattr(os, 'system')", loads)
def _(folder, canary):
    path = zipped(folder / "x.pth", f"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'mkdir {canary}'\ntR.".encode())
    return lambda: open_file(path)


@entry("BUILD with a __setstate__ of its own", loads)
def _(folder, canary):
    # an object whose __dict__ names os.system as its __setstate__, which the second BUILD calls
    data = f"\x80\x02cargparse\nNamespace\n)\x81}}U\x0c__setstate__cos\nsystem\nsbU{chr(len(f'mkdir {canary}'))}mkdir {canary}b.".encode("latin-1")
    path = zipped(folder / "x.pth", data)
    return lambda: open_file(path)


@entry("torch.storage._load_from_bytes of another pickle", loads)
def _(folder, canary):
    inner = io.BytesIO()
    torch.save(calls(os.mkdir, str(canary)), inner, _use_new_zipfile_serialization=False)
    path = weights(folder, b=calls(torch.storage._load_from_bytes, inner.getvalue()))
    return lambda: open_file(path)


@entry("nested in the optimizer's entry of a training file", loads)
def _(folder, canary):
    torch.save({"model": {"a": torch.ones(2)}, "optimizer": {"state": [{"x": calls(os.mkdir, str(canary))}]}}, folder / "x.pt")
    return lambda: open_file(folder / "x.pt")


@entry("legacy file of torch < 1.6", loads)
def _(folder, canary):
    torch.save({"a": calls(os.mkdir, str(canary))}, folder / "x.pth", _use_new_zipfile_serialization=False)
    return lambda: open_file(folder / "x.pth")


@entry("legacy tar file of torch < 0.2")
def _(folder, canary):
    import tarfile
    with tarfile.open(folder / "x.bin", "w") as archive:
        for name, value in (("storages", 0), ("tensors", 0), ("pickle", calls(os.mkdir, str(canary)))):
            data = pickle.dumps(value, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return lambda: open_file(folder / "x.bin")


@entry("a bare pickle named .pt", loads)
def _(folder, canary):
    (folder / "x.pt").write_bytes(pickle.dumps(calls(os.mkdir, str(canary))))
    return lambda: open_file(folder / "x.pt")


@entry("training.00.pth of a save", loads)
def _(folder, canary):
    path = weights(folder, "training.00.pth", counters=calls(os.mkdir, str(canary)))
    return lambda: open_file(path)


@entry("rollout-1.pt", loads)
def _(folder, canary):
    from llama_rlhf.rollout import Rollout
    path = weights(folder, "rollout-1.pt", prompts=calls(os.mkdir, str(canary)))
    return lambda: Rollout.load(str(path))


@entry("adapter_model.bin of a PEFT folder")
def _(folder, canary):
    from llama_rlhf.checkpoint.adapters import PeftAdapter
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    weights(folder, "adapter_model.bin", b=calls(os.mkdir, str(canary)))
    return lambda: PeftAdapter(str(folder), None)


@entry("second program in a second archive root")
def _(folder, canary):
    path = weights(folder)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("decoy/data.pkl", pickle.dumps(calls(os.mkdir, str(canary))))
    return lambda: open_file(path)


@entry("polyglot: shell script before the archive")
def _(folder, canary):
    path = weights(folder)
    path.write_bytes(f"#!/bin/sh\nmkdir {canary}\n".encode() + path.read_bytes())
    return lambda: open_file(path)


# -- bombs in zip files ----------------------------------------------------------------------------------------------


@entry("quantised tensor with unchecked strides")
def _(folder, canary):
    q = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    path = weights(folder, b=q)
    return lambda: open_file(path)


@entry("tuples in tuples as a key: 2^60 hashes")
def _(folder, canary):
    value = ()
    for _ in range(60):
        value = value, value
    path = zipped(folder / "x.pth", b"\x80\x02}" + pickle.dumps(value, protocol=2)[2:-1] + b"K\x01s.")
    return lambda: open_file(path)


@entry("a million lists in lists")
def _(folder, canary):
    path = zipped(folder / "x.pth", b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b".")
    return lambda: open_file(path)


@entry("data.pkl of 20 MB")
def _(folder, canary):
    path = zipped(folder / "x.pth", b"\x80\x02](" + b"]" * (20 << 20) + b"e.")
    return lambda: open_file(path)


@entry("bytearray of a terabyte")
def _(folder, canary):
    path = zipped(folder / "x.pth", b"\x80\x02}U\x01acbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85Rs.")
    return lambda: open_file(path)


@entry("zip bomb: 256 kB that inflate to 256 MB")
def _(folder, canary):
    with zipfile.ZipFile(folder / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data.pkl", "w") as member:
            for _ in range(256):
                member.write(bytes(1 << 20))
    return lambda: open_file(folder / "x.pth")


@entry("members that overlap")
def _(folder, canary):
    path = weights(folder)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    while at >= 0:
        (offset,) = struct.unpack_from("<I", data, at + 42)
        struct.pack_into("<II", data, at + 20, len(data) - offset, len(data) - offset)
        at = data.find(b"PK\x01\x02", at + 1)
    path.write_bytes(data)
    return lambda: open_file(path)


@entry("stride 0: 4 bytes pose as 4 TB")
def _(folder, canary):
    torch.save({"a": torch.ones(1).expand(1 << 20, 1 << 20)}, folder / "x.pth")
    return lambda: open_file(folder / "x.pth")


@entry("storage larger than its record")
def _(folder, canary):
    from llama_rlhf.checkpoint import writer
    path = zipped(folder / "x.pth", writer._pickled({"a": writer._Entry(writer._Storage("0", torch.float32, 1 << 40), (1 << 40,))}))
    return lambda: open_file(path)


# -- headers ---------------------------------------------------------------------------------------------------------

for name, content in {
    "header of 2^63 bytes": dict(header=b"{}", length=1 << 63),
    "header of 2^40 bytes": dict(header=b"{}", length=1 << 40),
    "header of 17 MB": dict(header=b"{" + b" " * (17 << 20) + b"}"),
    "a name twice": dict(header=b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
                         data=bytes(4)),
    "overlapping tensors": dict(header={"a": f32([2], 0, 8), "b": f32([2], 4, 12)}, data=bytes(12)),
    "negative offset": dict(header={"a": f32([1], -4, 0)}, data=bytes(4)),
    "offsets beyond the end": dict(header={"a": f32([1 << 30], 0, 4 << 30)}, data=bytes(4)),
    "shape NaN": dict(header=b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', data=bytes(4)),
    "shape 2^32 x 2^32": dict(header={"a": f32([1 << 32, 1 << 32], 0, 4)}, data=bytes(4)),
    "a million brackets": dict(header=b"[" * 1_000_000),
    "control characters in a name": dict(header={"a\x1b]0;owned\x07": f32([1], 0, 4)}, data=bytes(4)),
}.items():
    @entry(f"safetensors: {name}")
    def _(folder, canary, content=content):
        path = safetensors(folder / "x.safetensors", **content)
        return lambda: open_file(path)

for name, content in {
    "2^60 tensors": (1 << 60, 0, b""),
    "2^60 fields": (0, 1 << 60, b""),
    "a key of 2^63 bytes": (0, 1, struct.pack("<Q", 1 << 63)),
    "an array of 2^60 numbers": (0, 1, gguf_text(b"k") + struct.pack("<IIQ", 9, 5, 1 << 60)),
    "an array of 2^60 texts": (0, 1, gguf_text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 60)),
    "60 million bytes as numbers": (0, 1, gguf_text(b"k") + struct.pack("<IIQ", 9, 0, 60_000_000) + bytes(60_000_000)),
    "arrays in arrays": (0, 1, gguf_text(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000),
    "alignment 0": (1, 1, gguf_text(b"general.alignment") + struct.pack("<II", 4, 0) + gguf_tensor(b"t", [4]) + bytes(64)),
    "alignment -32": (1, 1, gguf_text(b"general.alignment") + struct.pack("<Ii", 5, -32) + gguf_tensor(b"t", [4]) + bytes(64)),
    "alignment 'x'": (1, 1, gguf_text(b"general.alignment") + struct.pack("<I", 8) + gguf_text(b"x") + gguf_tensor(b"t", [4]) + bytes(64)),
    "an offset past the end": (1, 0, gguf_tensor(b"t", [4], 1 << 62)),
    "a shape beyond the file": (1, 0, gguf_tensor(b"t", [1 << 40, 1 << 40])),
    "4 billion dimensions": (1, 0, gguf_text(b"t") + struct.pack("<I", 0xFFFFFFFF) + bytes(1 << 20)),
    "overlapping tensors": (2, 0, gguf_tensor(b"t", [8]) + gguf_tensor(b"u", [8], 0) + bytes(96)),
    "a tensor twice": (2, 0, gguf_tensor(b"t", [8]) * 2 + bytes(96)),
}.items():
    @entry(f"gguf: {name}")
    def _(folder, canary, content=content):
        path = gguf(folder / "x.gguf", *content)
        return lambda: open_file(path)


@entry("gguf: a token of 10 million characters in its tokenizer")
def _(folder, canary):
    token = gguf_text(b"a" * 10_000_000)
    fields = [gguf_text(b"tokenizer.ggml.model") + struct.pack("<I", 8) + gguf_text(b"llama"),
              gguf_text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 1) + token]
    path = gguf(folder / "x.gguf", 0, 2, b"".join(fields))
    return lambda: chat(path)


# -- paths -----------------------------------------------------------------------------------------------------------

for name, target in {"../": "../outside.safetensors", "an absolute path": "/etc/passwd", "a backslash": "..\\outside.safetensors",
                     "NUL": "outside.safetensors\0"}.items():
    @entry(f"index that leaves its folder by {name}")
    def _(folder, canary, target=target):
        from safetensors.torch import save_file
        save_file({"a": torch.ones(1)}, folder / "outside.safetensors")
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": target}}))
        return lambda: open_folder(folder / "model")


@entry("index to a link out of the folder")
def _(folder, canary):
    from safetensors.torch import save_file
    save_file({"a": torch.ones(1)}, folder / "outside.safetensors")
    (folder / "model").mkdir()
    (folder / "model" / "x.safetensors").symlink_to(folder / "outside.safetensors")
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    return lambda: open_folder(folder / "model")


@entry("manifest that names ../../etc/passwd")
def _(folder, canary):
    weights(folder, "consolidated.00.pth")
    (folder / "manifest.json").write_text(json.dumps({"format": "llama_rlhf/1", "config": {}, "files": {"../../etc/passwd": {"size": 1}}}))
    return lambda: open_folder(folder)


@entry("config.json is a pipe that never ends")
def _(folder, canary):
    hf_folder(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    return lambda: open_folder(folder)


@entry("config.json is a link to /dev/zero")
def _(folder, canary):
    hf_folder(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")
    return lambda: open_folder(folder)


# -- json and configs ------------------------------------------------------------------------------------------------

for file in ("config.json", "model.safetensors.index.json", "generation_config.json"):
    for name, content in {"10 MB of [": b"[" * (10 << 20), "15 MB of lists": b'{"a":[' + b"[]," * (5 << 20) + b"0]}",
                          "objects 100,000 deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "a number of 5000 digits": b'{"a":' + b"9" * 5000 + b"}"}.items():
        @entry(f"{file}: {name}")
        def _(folder, canary, file=file, content=content):
            hf_folder(folder)
            (folder / file).write_bytes(content)
            return lambda: open_folder(folder)

    @entry(f"{file}: 8 GB")
    def _(folder, canary, file=file):
        hf_folder(folder)
        with open(folder / file, "wb") as stream:
            stream.truncate(8 << 30)
        return lambda: open_folder(folder)

for name, changes in {
    "a billion layers": {"num_hidden_layers": 10**9},
    "10^10 layers, each with its window": {"model_type": "qwen2", "num_hidden_layers": 10**10, "use_sliding_window": True, "sliding_window": 4},
    "1000 layers": {"num_hidden_layers": 1000},
    "hidden size 10^12": {"hidden_size": 10**12},
    "head_dim 10^12": {"head_dim": 10**12},
    "a billion heads": {"num_attention_heads": 10**9, "num_key_value_heads": 10**9},
    "a billion experts": {"model_type": "mixtral", "num_local_experts": 10**9, "num_experts_per_tok": 2},
    "vocabulary of 10^15": {"vocab_size": 10**15},
    "NaN": {"rms_norm_eps": float("nan")},
    "no head at all": {"num_attention_heads": 0},
    "lists for numbers": {"hidden_size": [48], "num_attention_heads": {}},
    "unknown model with code of its own": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
}.items():
    @entry(f"config.json: {name}")
    def _(folder, canary, changes=changes):
        hf_folder(folder, **changes)
        (folder / "evil.py").write_text(program(canary))
        return lambda: open_folder(folder)


def runs_python(folder):
    exec((folder / "evil.py").read_text())


@entry("config.json and tokenizer_config.json that ask for code of a known model", runs_python)
def _(folder, canary):
    hf_folder(folder, auto_map={"AutoModelForCausalLM": "evil.Model"}, custom_code=True, trust_remote_code=True)
    tokenizer_folder(folder, auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="T", trust_remote_code=True)
    (folder / "evil.py").write_text(program(canary))
    return lambda: (encode(folder), open_folder(folder))


# -- tokenizers and chat templates -----------------------------------------------------------------------------------


@entry("tokenizer.json: splitting rule (a+)+$")
def _(folder, canary):
    tokenizer_folder(folder, regex="(a+)+$")
    return lambda: encode(folder)


@entry("tokenizer.json: control token with a name of a megabyte")
def _(folder, canary):
    tokenizer_folder(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"] = [{"id": 94, "content": "x" * (1 << 20), "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                             "special": True}]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return lambda: encode(folder)


@entry("tokenizer.json: 8 GB")
def _(folder, canary):
    with open(folder / "tokenizer.json", "wb") as stream:
        stream.write(b"{")
        stream.truncate(8 << 30)
    return lambda: encode(folder)


@entry("tokenizer.json: objects 100,000 deep")
def _(folder, canary):
    (folder / "tokenizer.json").write_bytes(b'{"a":' * 100_000)
    return lambda: encode(folder)


@entry("tokenizer.model: 10 MB of noise")
def _(folder, canary):
    (folder / "tokenizer.model").write_bytes(bytes(torch.randint(256, (10 << 20,), generator=torch.Generator().manual_seed(0)).tolist()))
    return lambda: encode(folder)


@entry("qwen.tiktoken: a token of 10 MB")
def _(folder, canary):
    (folder / "qwen.tiktoken").write_bytes(b"YQ== 0\n" + b"YWFh" * (3 << 20) + b" 1\n")
    return lambda: encode(folder)


def renders(folder):
    import jinja2
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    jinja2.Environment().from_string(template).render(messages=[{"role": "user", "content": "x"}])


CALL = "os.system('mkdir ' ~ 'CANARY')"
for name, template, bait in (
    ("cycler's globals", "{{ cycler.__init__.__globals__." + CALL + " }}", renders),
    ("globals by |attr", "{{ ((cycler|attr('__init__'))|attr('__globals__'))['os'].system('mkdir CANARY') }}", renders),
    ("subclasses of object", "{% for c in ().__class__.__base__.__subclasses__() %}{% if c.__name__ == '_wrap_close' %}"
     "{{ c.__init__.__globals__['system']('mkdir CANARY') }}{% endif %}{% endfor %}", renders),
    ("internals by str.format", "{{ '{0.__class__.__base__}'.format(messages) }}", None),
    ("lipsum's globals", "{{ lipsum.__globals__." + CALL + " }}", renders),
    ("another file", "{% include '/etc/passwd' %}", None),
    ("10^10 turns of a loop", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", None),
    ("2^60 calls of a macro", "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", None),
    ("a text of 10^11 characters", "{{ 'a' * 10**11 }}", None),
    ("a text doubled 60 times", "{% set a = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set a.x = a.x ~ a.x %}{% endfor %}", None),
    ("padding of 10^11", "{{ 'a'|center(10**11) }}", None),
    ("a number of 10^9 digits", "{{ (10 ** (10 ** 9)) % 7 }}", None),
    ("300 MB of output", "{% for i in range(30000) %}{{ 'x' * 10000 }}{% endfor %}", None),
    ("a million nested brackets", "{{ " + "(" * 100_000 + " }}", None),
    ("200 KB of template", "x" * 200_000, None),
):
    @entry(f"chat template: {name}", bait)
    def _(folder, canary, template=template):
        tokenizer_folder(folder, template=template.replace("CANARY", str(canary)))
        return lambda: chat(folder)


# -- --config and data -----------------------------------------------------------------------------------------------


def unsafe_yaml(folder):
    import yaml
    yaml.unsafe_load((folder / "run.yaml").read_text())


for name, text, bait in (
    ("python/object/apply", "lr: !!python/object/apply:os.mkdir [CANARY]", unsafe_yaml),
    ("python/object/new", "!!python/object/apply:subprocess.check_call [[mkdir, CANARY]]", unsafe_yaml),
    ("10^30 texts by anchors", "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [" + ",".join([f"*{chr(97 + i)}"] * 10) + "]\n" for i in range(24)) + "lr: *y", None),
    ("100,000 brackets", "[" * 60_000, None),
    ("a day that does not exist", "lr: 2024-99-99", None),
    ("1 MB", "lr: 1\n#" + "x" * (1 << 20), None),
):
    @entry(f"--config: {name}", bait)
    def _(folder, canary, text=text):
        (folder / "run.yaml").write_text(text.replace("CANARY", str(canary)))
        return lambda: config(folder / "run.yaml")

for name, text in (("10 MB of [", "[" * (10 << 20)), ("objects 100,000 deep in a line", '{"a":' * 100_000), ("a number of 5000 digits", '[{"a": ' + "9" * 5000 + "}]"),
                   ("an unclosed text of 20 MB", '[{"a": "' + "x" * (20 << 20))):
    @entry(f"train.json: {name}")
    def _(folder, canary, text=text):
        (folder / "train.json").write_text(text)
        return lambda: records(folder / "train.json")
