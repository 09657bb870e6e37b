"""Generated inputs for everything that reads text: flags, --config, json, index and config files, data, answers.

Each target takes one generated value. An error that a user could cause (see cli._is_user_error) is a good end; anything else fails.
"""

import json
import os
import struct
import tempfile
from pathlib import Path

try:
    from hypothesis import HealthCheck, given, seed, settings
    from hypothesis import strategies as st
except ImportError:
    TARGETS = {}
else:
    TARGETS = {}

    def target(name, strategy):
        def add(function):
            TARGETS[name] = function, strategy
            return function
        return add

    def run(name, n, start):
        """("passed", "") after n inputs; raises at the first bad one, made as small as possible."""
        function, strategy = TARGETS[name]
        with tempfile.TemporaryDirectory() as folder:
            @seed(start)
            @settings(max_examples=n, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(strategy)
            def fuzz(value):
                user_errors(function, Path(folder), value)
            fuzz()
        return "passed", ""

    def user_errors(function, *arguments):
        from llama_rlhf import cli
        try:
            function(*arguments)
        except (cli.UsageError, cli.HelpRequested):
            pass
        except Exception as error:
            if not cli._is_user_error(error):
                raise

    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4), max_leaves=12)

    def objects(*keys):
        """Dictionaries with some of these keys, and others, with values of any type."""
        return st.dictionaries(st.sampled_from(keys) | st.text(max_size=8), values, max_size=8)

    def text_of(strategy):
        """As json; now and then with a character changed, or as any text."""
        written = strategy.map(lambda value: json.dumps(value))
        spoilt = st.tuples(written, st.integers(0, 500), st.text(max_size=2)).map(lambda t: t[0][: t[1]] + t[2] + t[0][t[1] + 1:])
        return written | spoilt | st.text(max_size=60)

    # -- flags and --config ------------------------------------------------------------------------------------------

    def main(*, ckpt_dir: str, lr: float = 1e-5, epochs: int = 1, seeds: list[int] = [1], layers: int | None = None,     # noqa: B006
             names: list[str] = [], use_chat_template: bool = False):       # noqa: B006
        """A script.

        Args:
            ckpt_dir: checkpoint folder
        """

    FLAGS = ("ckpt_dir", "lr", "epochs", "seeds", "layers", "names", "use_chat_template", "nouse_chat_template", "no_use_chat_template", "config", "lrr")
    words = st.text(max_size=12) | st.sampled_from(FLAGS).map("--{}".format) | st.tuples(st.sampled_from(FLAGS), st.text(max_size=8)).map("--{0[0]}={0[1]}".format) \
        | st.sampled_from(["-h", "--", "-1", "1e-5", "none", "true", "1,2,3", "nan", "inf", "--lr=-1", "1_0", "１"])

    @target("flags", st.lists(words, max_size=8))
    def _(folder, argv):
        from llama_rlhf import cli
        result = cli.parse(main, argv)
        assert isinstance(result["lr"], float) and isinstance(result["epochs"], int) and isinstance(result["use_chat_template"], bool)
        assert all(isinstance(n, int) for n in result["seeds"])

    @target("--config yaml", text_of(objects(*FLAGS, "arguments")) | st.dictionaries(st.sampled_from(FLAGS), st.text(max_size=20)).map(
        lambda d: "\n".join(f"{k}: {v}" for k, v in d.items())))
    def _(folder, text):
        from llama_rlhf import cli
        (folder / "run.yaml").write_text(text, encoding="utf-8", errors="replace")
        cli.parse(main, ["--ckpt_dir", "x", "--config", str(folder / "run.yaml")])

    # -- configs, index and manifest of checkpoints ------------------------------------------------------------------

    def checkpoint(folder):
        """Two tensors of a llama, so that only the json files decide."""
        import torch
        from safetensors.torch import save_file
        if not (folder / "model.safetensors").exists():
            save_file({"model.embed_tokens.weight": torch.ones(8, 4), "lm_head.weight": torch.ones(8, 4)}, folder / "model.safetensors")
        return folder

    def load_config(folder):
        from llama_rlhf.checkpoint import convert, formats
        with formats.open_checkpoint(folder) as opened:
            convert.load_config(opened)

    HF = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size", "head_dim",
          "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "rms_norm_eps",
          "max_position_embeddings", "tie_word_embeddings", "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size",
          "n_layer", "n_head", "n_inner", "kv_channels", "seq_length", "rotary_emb_base", "attention_bias", "mlp_only_layers", "auto_map")
    TYPES = ("llama", "mistral", "mixtral", "qwen", "qwen2", "qwen3", "qwen3_moe", "bloom", "gemma", 7, None)
    sizes = st.fixed_dictionaries({key: st.integers(-1, 9) | values for key in HF[:6]})
    configs = st.tuples(st.sampled_from(TYPES), sizes | st.just({}), objects(*HF)).map(lambda t: {"model_type": t[0], **t[1], **t[2]})

    @target("config.json", text_of(configs))
    def _(folder, text):
        checkpoint(folder)
        (folder / "config.json").write_text(text, encoding="utf-8", errors="replace")
        load_config(folder)

    PARAMS = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "multiple_of", "ffn_dim_multiplier", "norm_eps", "rope_theta",
              "rope_scaling", "use_scaled_rope", "sliding_window", "moe", "num_local_experts", "vocab_size")
    params = st.tuples(st.fixed_dictionaries({key: st.integers(-1, 9) | values for key in PARAMS[:3]}), objects(*PARAMS)).map(lambda t: {**t[0], **t[1]})

    @target("params.json", text_of(params))
    def _(folder, text):
        import torch
        torch.save({"tok_embeddings.weight": torch.ones(8, 4)}, folder / "consolidated.00.pth")
        (folder / "params.json").write_text(text, encoding="utf-8", errors="replace")
        load_config(folder)

    MANIFEST = ("format", "kind", "config", "files", "lora", "plan", "score", "step", "sha256", "n_shards")
    native = st.fixed_dictionaries({"family": st.sampled_from(["llama", "x"]), **{key: st.integers(0, 9) | values for key in (
        "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size")}})
    manifests = st.tuples(st.fixed_dictionaries({"format": st.just("llama_rlhf/1"), "config": native | values, "files": st.just({}) | values}),
                          objects(*MANIFEST[4:])).map(lambda t: {**t[1], **t[0]})

    @target("manifest.json", text_of(manifests))
    def _(folder, text):
        import torch
        from llama_rlhf.checkpoint import formats, shards, store
        save = folder / "step-1"
        save.mkdir(exist_ok=True)
        torch.save({"tok_embeddings.weight": torch.ones(8, 4), "layers.0.attention.wq.lora_a": torch.ones(1, 4)}, save / "consolidated.00.pth")
        (save / "manifest.json").write_text(text, encoding="utf-8", errors="replace")
        store.complete_saves(str(folder))
        with formats.open_checkpoint(save) as opened:
            shards.inspect(opened)

    names = st.text(max_size=12) | st.sampled_from(["model.safetensors", "../model.safetensors", "/etc/passwd", ".", "..", "a/b", "\0", "config.json"])
    maps = st.dictionaries(st.sampled_from(["model.embed_tokens.weight", "lm_head.weight"]) | st.text(max_size=5), names | values, max_size=4)

    @target("index.json", text_of(st.fixed_dictionaries({"weight_map": maps | values}) | objects("weight_map", "metadata")))
    def _(folder, text):
        from llama_rlhf.checkpoint import formats
        checkpoint(folder)
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8", errors="replace")
        with formats.open_checkpoint(folder) as opened:
            assert all(os.path.dirname(os.path.realpath(file.path)) == os.path.realpath(folder) for file in opened.files)

    @target("tokenizer_config.json and generation_config.json", st.tuples(
        text_of(objects("bos_token", "eos_token", "pad_token", "add_bos_token", "added_tokens_decoder", "chat_template", "auto_map")),
        text_of(objects("eos_token_id", "bos_token_id"))))
    def _(folder, texts):
        from llama_rlhf.tokenizer import load_tokenizer
        (folder / "tokenizer.bytes.json").write_text('{"kind": "bytes"}')
        for name, text in zip(("tokenizer_config.json", "generation_config.json"), texts):
            (folder / name).write_text(text, encoding="utf-8", errors="replace")
        tokenizer = load_tokenizer(folder)
        assert tokenizer.decode(tokenizer.encode("añ")) == "añ"
        tokenizer.encode("x", bos=True, eos=True)

    pieces = st.text(max_size=4)
    specs = st.fixed_dictionaries({
        "model": st.fixed_dictionaries({"type": st.sampled_from(["BPE", "Unigram", "WordPiece"]), "vocab": st.dictionaries(pieces, st.integers(0, 20)) | values,
                                        "merges": st.lists(st.lists(pieces, min_size=2, max_size=2)) | values}),
        "added_tokens": st.lists(st.fixed_dictionaries({"id": st.integers(0, 30) | values, "content": pieces | values, "special": st.booleans(),
            "single_word": st.just(False), "lstrip": st.just(False), "rstrip": st.just(False), "normalized": st.just(False)}), max_size=3) | values})

    @target("tokenizer.json", text_of(st.tuples(specs, objects("normalizer", "pre_tokenizer", "decoder", "post_processor")).map(lambda t: {**t[1], **t[0]})))
    def _(folder, text):
        from llama_rlhf.tokenizer import load_tokenizer
        (folder / "tokenizer.json").write_text(text, encoding="utf-8", errors="replace")
        load_tokenizer(folder).encode("ab c")

    @target("chat templates and messages", st.tuples(
        st.text(max_size=20) | st.sampled_from(["{{ messages[0].content }}", "{% for m in messages %}{{ m.content|upper }}{% endfor %}", "{{ 1/0 }}", "{{ x.y.z }}"]),
        st.lists(st.dictionaries(st.sampled_from(["role", "content"]), values, max_size=2), max_size=3)))
    def _(folder, value):
        from llama_rlhf.tokenizer import load_tokenizer
        (folder / "tokenizer.bytes.json").write_text('{"kind": "bytes"}')
        (folder / "chat_template.jinja").write_text(value[0], encoding="utf-8", errors="replace")
        load_tokenizer(folder).chat(value[1])

    # -- headers -----------------------------------------------------------------------------------------------------

    tensor_entries = st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "F16", "I8", "F4", "x"]) | values,
                                            "shape": st.lists(st.integers(-1, 9), max_size=3) | values, "data_offsets": st.lists(st.integers(-4, 40), max_size=3) | values})

    @target("safetensors headers", st.tuples(text_of(st.dictionaries(st.text(max_size=4), tensor_entries | values, max_size=3)), st.binary(max_size=40)))
    def _(folder, value):
        from llama_rlhf.checkpoint import formats
        header = value[0].encode(errors="replace")
        (folder / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + value[1])
        with formats.open_file(folder / "x.safetensors") as file:
            assert sum(file.read(name).nbytes for name in file.infos) <= len(value[1])

    parts = st.binary(max_size=6) | st.sampled_from([b"general.alignment", b"token_embd.weight", b"split.count"]).map(lambda b: struct.pack("<Q", len(b)) + b) \
        | st.integers(0, 2**64 - 1).map(lambda n: struct.pack("<Q", n)) | st.integers(0, 13).map(lambda n: struct.pack("<I", n)) | st.integers(0, 9).map(lambda n: struct.pack("<Q", n))

    @target("GGUF headers", st.tuples(st.integers(0, 3), st.integers(0, 3), st.lists(parts, max_size=12).map(b"".join)))
    def _(folder, value):
        from llama_rlhf.checkpoint import formats
        content = b"GGUF" + struct.pack("<IQQ", 3, *value[:2]) + value[2]
        (folder / "x.gguf").write_bytes(content)
        with formats.open_file(folder / "x.gguf") as file:
            for name in file.infos:
                file.read(name)

    # -- data and answers --------------------------------------------------------------------------------------------

    rows = st.lists(objects("instruction", "output", "query", "response", "messages", "chosen", "rejected", "responses", "scores", "label", "correct", "finished",
                            "input", "margin", "question", "answer") | values, max_size=4)

    @target("json lists, compared with json.loads", text_of(rows) | st.tuples(rows, st.sampled_from([None, 0, 2])).map(lambda t: json.dumps(t[0], indent=t[1])))
    def _(folder, text):
        from llama_rlhf import records
        (folder / "x.json").write_text(text, encoding="utf-8", errors="replace", newline="")
        text = (folder / "x.json").read_text(encoding="utf-8")
        try:
            expected = json.loads(text) if text.lstrip(" \t\r\n").startswith("[") else None
        except ValueError:
            expected = ValueError
        for records._BLOCK in (1, 7, 1 << 16):
            try:
                found = [value for _, value in records.stream_json(folder / "x.json")]
            except ValueError:
                found = ValueError
            assert expected is None or repr(found) == repr(expected), (text, found, expected)

    @target("records of every kind", text_of(rows) | rows.map(lambda rs: "\n".join(map(json.dumps, rs))))
    def _(folder, text):
        from llama_rlhf import data
        from llama_rlhf.records import read_records
        from llama_rlhf.tasks import answers as plain, gsm8k
        from llama_rlhf.tokenizer import load_tokenizer
        (folder / "tokenizer.bytes.json").write_text('{"kind": "bytes"}')
        (folder / "x.json").write_text(text, encoding="utf-8", errors="replace")
        tokenizer = load_tokenizer(folder)
        for use in (lambda: data.sft_examples(read_records(folder / "x.json"), tokenizer, max_seq_len=30),
                    lambda: [data.verifier_examples(problems, tokenizer, loss=loss, max_seq_len=30)
                             for kind, problems in [data.judged_problems(read_records(folder / "x.json"))]
                             for loss in (["pairwise"] if kind in ("pairs", "ranking") else ["pairwise", "mse"])],
                    lambda: gsm8k.load(folder / "x.json"), lambda: plain.load(folder / "x.json")):
            user_errors(use)

    answers = st.text(max_size=60) | st.lists(st.sampled_from(["#### ", "####", "\\boxed{", "}", "answer is ", "$", ",", ".", "-", "1", "23", "1,000",
                                                                  "\n", "Question:", " ", "{,}", "<<", ">>", "٣", "½"]), max_size=20).map("".join)

    @target("answer extraction", st.tuples(answers, answers, st.booleans()))
    def _(folder, value):
        from llama_rlhf.tasks import gsm8k
        text, label, finished = value
        for extract in gsm8k.RULES.values():
            assert extract(text) is None or isinstance(extract(text), str)
        assert gsm8k.extract_tolerant(text) is None or gsm8k.read_label(gsm8k.extract_tolerant(text)) == gsm8k.extract_tolerant(text)
        gsm8k.score(gsm8k.Problem(1, "", "", label), text, finished, reward=True)
        gsm8k.strip_calculator(text)
