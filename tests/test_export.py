"""Export is the exact inverse of reading: Hugging Face -> shards -> Hugging Face bit for bit; PEFT adapters out and in with equal logits."""

import hashlib
import json
import math
import os
import shutil

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toys import MODELS, logits_of, make_hf, same, weights

from llama_rlhf.checkpoint.export import export_hf, export_peft
from llama_rlhf.checkpoint.formats import CheckpointError, TensorInfo
from llama_rlhf.checkpoint.shards import load_model, save_model, split_checkpoint
from llama_rlhf.checkpoint.writer import SafetensorsWriter
from llama_rlhf.parallel.layers import Lora
from llama_rlhf.tokenizer import load_tokenizer

ROW = [5, 17, 90, 3, 3, 64, 20, 1, 2, 77]


def transformers_model(folder, **more):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", **more).eval()


@torch.no_grad()
def logits(model, row=ROW):
    return model(torch.tensor([row])).logits[0]


# ---- the container -------------------------------------------------------------------------------------------------


def test_written_files_are_read_back_by_the_official_reader(tmp_path):
    torch.manual_seed(0)
    tensors = {"double": torch.randn(3, dtype=torch.float64), "größe": torch.randn(5, 7), "view": torch.randn(8, 6)[:, 1:4], "int": torch.arange(3),
               "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "b": torch.randn(3, 3).bfloat16(), "h": torch.randn(2).half(),
               "f8": torch.randn(5).to(torch.float8_e4m3fn), "bool": torch.tensor([True, False, True])}
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, {name: TensorInfo(tuple(x.shape), x.dtype) for name, x in tensors.items()}) as writer:
        for name, x in tensors.items():
            writer.write(name, x)
        result = writer.close()
    data = path.read_bytes()
    assert result == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert int.from_bytes(data[:8], "little") % 8 == 0
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"} and set(file.keys()) == set(tensors)
        for name, x in tensors.items():
            got = file.get_tensor(name)
            assert got.dtype == x.dtype and got.shape == x.shape and torch.equal(got.float(), x.float()), name


def test_tensors_that_differ_from_the_header_leave_no_file(tmp_path):
    path, infos = tmp_path / "x.safetensors", {"a": TensorInfo((2,), torch.float32), "b": TensorInfo((3,), torch.float32)}
    last = "b", torch.ones(3)
    for written in ([("a", torch.ones(3)), last], [last], [("a", torch.ones(2).half()), last], [("a", torch.ones(2))], [("a", torch.ones(2)), last, ("c", torch.ones(1))]):
        with pytest.raises(CheckpointError, match="header"):
            with SafetensorsWriter(path, infos) as writer:
                for name, x in written:
                    writer.write(name, x)
        assert not path.exists()
    with pytest.raises(CheckpointError, match="cannot store __metadata__"):        # the header's own entry has that name
        SafetensorsWriter(path, {"__metadata__": TensorInfo((1,), torch.float32)})
    with pytest.raises(CheckpointError, match="larger element types first"):
        SafetensorsWriter(path, {"a": TensorInfo((1,), torch.bfloat16), "b": TensorInfo((1,), torch.float32)})
    assert not path.exists()


# ---- Hugging Face --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_hugging_face_to_shards_and_back_is_bit_identical(name, world_of_one, tmp_path):
    reference = make_hf(tmp_path / "hf", name)
    expected = weights(tmp_path / "hf")
    if name == "qwen1":         # transformers cannot run it: written as the Qwen2 model that the toy was made from
        reference.save_pretrained(tmp_path / "as-qwen2")
        expected = weights(tmp_path / "as-qwen2")
        export_hf(str(tmp_path / "hf"), str(tmp_path / "config"))
        assert json.loads((tmp_path / "config/config.json").read_text())["max_position_embeddings"] == 128, "the length it was trained for; beyond, it is no Qwen2"
    for n in (1, 2, 3):
        split_checkpoint(str(tmp_path / "hf"), str(tmp_path / f"n{n}"), n)
        export_hf(str(tmp_path / f"n{n}"), str(tmp_path / f"back{n}"))
        assert same(weights(tmp_path / f"back{n}"), expected), n
    assert sorted(os.listdir(tmp_path / "back3")) == sorted(["config.json", "model.safetensors"] +
                                                            ["generation_config.json"] * (tmp_path / "back3" / "generation_config.json").exists())
    assert torch.equal(logits(transformers_model(tmp_path / "back3")), logits(reference))


def test_large_exports_come_in_files_of_limited_size_with_an_index(world_of_one, tmp_path):
    reference = make_hf(tmp_path / "hf", "llama")
    limit = 30_000
    export_hf(str(tmp_path / "hf"), str(tmp_path / "out"), max_shard_bytes=limit)
    files = sorted(name for name in os.listdir(tmp_path / "out") if name.endswith(".safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)] and len(files) > 3
    sizes = {file: [x.nbytes for x in load_file(tmp_path / "out" / file).values()] for file in files}
    assert all(sum(s) <= limit or len(s) == 1 for s in sizes.values())
    index = json.load(open(tmp_path / "out" / "model.safetensors.index.json"))
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    assert {name for file in files for name in load_file(tmp_path / "out" / file)} == index["weight_map"].keys()
    assert torch.equal(logits(transformers_model(tmp_path / "out")), logits(reference))
    split_checkpoint(str(tmp_path / "out"), str(tmp_path / "n2"), 2)        # and we read our own files
    export_hf(str(tmp_path / "n2"), str(tmp_path / "back"))
    assert same(weights(tmp_path / "back"), weights(tmp_path / "hf"))


def test_metas_shards_export_with_tokenizer_and_dtype(world_of_one, tmp_path):
    """The user's way from Meta's files to transformers: no manifest, a sentencepiece tokenizer one folder up, --dtype bf16."""
    sentencepiece = pytest.importorskip("sentencepiece")
    reference = make_hf(tmp_path / "hf", "llama-2-like")
    split_checkpoint(str(tmp_path / "hf"), str(tmp_path / "models" / "meta"), 2)
    for name in ("manifest.json", "generation_config.json"):
        if (tmp_path / "models" / "meta" / name).exists():
            os.remove(tmp_path / "models" / "meta" / name)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["how many apples and how many pears are 12 + 30?"] * 50), model_prefix=str(tmp_path / "models" / "tokenizer"),
        vocab_size=290, model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    export_hf(str(tmp_path / "models" / "meta"), str(tmp_path / "out"), dtype=torch.bfloat16)
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "models" / "tokenizer.model"))
    text = " how  many\n 🙂"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == [1, *original.encode(text)]
    assert json.load(open(tmp_path / "out" / "generation_config.json"))["eos_token_id"] == 2
    model = transformers_model(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == 2
    assert same({name: x for name, x in model.state_dict().items()}, {name: x.bfloat16() for name, x in reference.state_dict().items()})
    # and in the bits of its config that change results
    for key in ("rms_norm_eps", "hidden_size", "num_key_value_heads", "intermediate_size", "head_dim"):
        assert getattr(model.config, key) == pytest.approx(getattr(reference.config, key)), key


def test_a_template_in_a_json_file_of_its_own_goes_along(world_of_one, tmp_path):
    """chat_template.json was read, but not copied: a split or trained model had lost its template."""
    make_hf(tmp_path / "hf", "llama", vocab_size=260)
    (tmp_path / "hf" / "tokenizer.bytes.json").write_text('{"kind": "bytes"}')
    (tmp_path / "hf" / "chat_template.json").write_text('{"chat_template": "hi"}')
    split_checkpoint(str(tmp_path / "hf"), str(tmp_path / "n2"), 2)
    assert load_tokenizer(tmp_path / "n2").chat_template == "hi"


def test_named_templates_go_along_into_saves_and_exports(world_of_one, tmp_path):
    """transformers 5 keeps them in a folder, which a split, a trained model and an export had lost."""
    make_hf(tmp_path / "hf", "llama", vocab_size=260)
    (tmp_path / "hf" / "tokenizer.bytes.json").write_text('{"kind": "bytes"}')
    (tmp_path / "hf" / "chat_template.jinja").write_text("hi")
    os.mkdir(tmp_path / "hf" / "additional_chat_templates")
    for name in ("tool.jinja", "rag.jinja", "notes.txt"):
        (tmp_path / "hf" / "additional_chat_templates" / name).write_text(name)
    split_checkpoint(str(tmp_path / "hf"), str(tmp_path / "n2"), 2)
    trained(tmp_path / "n2", tmp_path / "lora")
    export_hf(str(tmp_path / "lora"), str(tmp_path / "out"), merge_lora=True)
    for folder in ("n2", "lora", "out"):
        assert sorted(os.listdir(tmp_path / folder / "additional_chat_templates")) == ["rag.jinja", "tool.jinja"], folder
        assert load_tokenizer(tmp_path / folder, chat_format="tool").chat_template == "tool.jinja"
    (tmp_path / "n2/additional_chat_templates/tool.jinja").write_text("tool.jinjA")
    with pytest.raises(CheckpointError, match="additional_chat_templates/tool.jinja is corrupt"):
        load_model(str(tmp_path / "n2"))


def test_every_file_of_a_tokenizer_goes_along_and_no_other(tmp_path):
    from llama_rlhf.checkpoint.shards import copy_companions
    names = ["tokenizer.model", "tokenizer.model.v1", "tokenizer.model.v3", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
             "vocab.json", "merges.txt", "qwen.tiktoken", "tokenizer.bytes.json", "chat_template.jinja", "chat_template.json", "generation_config.json"]
    for name in ("from", "to"):
        (tmp_path / name).mkdir()
    for name in (*names, "README.md", "config.json", "pytorch_model.bin"):
        (tmp_path / "from" / name).write_text(name)
    assert copy_companions(str(tmp_path / "from"), str(tmp_path / "to")) == \
        {name: {"size": len(name), "sha256": hashlib.sha256(name.encode()).hexdigest()} for name in names}
    assert {path.name: path.read_text() for path in (tmp_path / "to").iterdir()} == {name: name for name in names}


@pytest.mark.parametrize("generation", [None, {"do_sample": True}])
def test_end_tokens_that_only_the_config_names_go_along(generation, world_of_one, tmp_path):
    """Without a generation_config.json transformers takes config.json's; a split left them behind, an export lost them with one that lacks them."""
    make_hf(tmp_path / "hf", "llama", vocab_size=260, bos_token_id=3, eos_token_id=[5, 9])
    (tmp_path / "hf" / "tokenizer.bytes.json").write_text('{"kind": "bytes"}')
    os.remove(tmp_path / "hf" / "generation_config.json")
    if generation:
        (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(generation))
    else:
        assert transformers_model(tmp_path / "hf").generation_config.eos_token_id == [5, 9]
        split_checkpoint(str(tmp_path / "hf"), str(tmp_path / "n2"), 2)
        assert load_tokenizer(tmp_path / "n2").eos_ids == load_tokenizer(tmp_path / "hf").eos_ids == (5, 9)
    export_hf(str(tmp_path / "hf"), str(tmp_path / "out"))
    model = transformers_model(tmp_path / "out")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == [5, 9] and model.config.bos_token_id == 3
    if generation:
        assert model.generation_config.do_sample


def test_the_end_token_of_training_ends_generation_after_an_export(world_of_one, tmp_path):
    """The tokenizer named <eos>, 257, which training puts behind answers; generation_config.json one other: transformers got that one
    alone and never stopped. And a pad token without a row, as beside the first LLaMA-2 files, made a folder that cannot be loaded."""
    make_hf(tmp_path / "hf", "llama", vocab_size=258, eos_token_id=5)
    (tmp_path / "hf" / "tokenizer.bytes.json").write_text('{"kind": "bytes"}')
    assert load_tokenizer(tmp_path / "hf").eos_ids == (257, 5) and load_tokenizer(tmp_path / "hf").pad_id == 258
    split_checkpoint(str(tmp_path / "hf"), str(tmp_path / "n2"), 2)
    export_hf(str(tmp_path / "n2"), str(tmp_path / "out"))
    model = transformers_model(tmp_path / "out")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == [257, 5] and model.config.pad_token_id is None


def test_what_a_foreign_folder_cannot_hold_is_refused(world_of_one, tmp_path):
    from llama_rlhf.models.transformer import ValueModel
    make_hf(tmp_path / "hf", "llama")
    save_model(load_model(str(tmp_path / "hf"), ValueModel), str(tmp_path / "value"), companions=str(tmp_path / "hf"))
    save_model(load_model(str(tmp_path / "hf"), lora=Lora(2, 2.0)), str(tmp_path / "lora"), companions=str(tmp_path / "hf"))
    before = sorted(os.listdir(tmp_path))
    for export in (export_hf, export_peft):
        with pytest.raises(CheckpointError, match="reward or value model"):
            export(str(tmp_path / "value"), str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="--merge_lora"):
        export_hf(str(tmp_path / "lora"), str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="holds no adapters"):
        export_peft(str(tmp_path / "hf"), str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == before


# ---- PEFT ----------------------------------------------------------------------------------------------------------


def trained(hf, folder, lora=Lora(3, 7.5)):
    """A LoRA checkpoint of ours whose B is not zero; returns the model."""
    model = load_model(str(hf), lora=lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * 0.1)
    save_model(model, str(folder), companions=str(hf))
    return model


@pytest.mark.parametrize("name", ["llama", "qwen1", "qwen2", "qwen3", "mistral-window", "mixtral"])
def test_our_adapters_give_peft_the_same_logits_and_come_back_bit_identical(name, world_of_one, tmp_path):
    peft = pytest.importorskip("peft")
    base = make_hf(tmp_path / "hf", name)
    plain = logits(base)
    model = trained(tmp_path / "hf", tmp_path / "lora")
    with torch.no_grad():
        expected = logits_of(model, [ROW])
    split_checkpoint(str(tmp_path / "lora"), str(tmp_path / "lora2"), 2)
    export_peft(str(tmp_path / "lora2"), str(tmp_path / "peft"))
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    assert adapted.peft_config["default"].target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"} | \
        (set() if name == "mixtral" else {"gate_proj", "up_proj", "down_proj"})
    got = logits(adapted)
    assert (got - expected).abs().max() < 1e-4                  # fp32, sums in another order
    assert (plain - expected).abs().max() > 0.1                 # the adapters matter
    # merged export: the same model without peft
    export_hf(str(tmp_path / "lora2"), str(tmp_path / "merged"), merge_lora=True)
    assert (logits(transformers_model(tmp_path / "merged")) - expected).abs().max() < 1e-4
    # and back: base + PEFT folder is the checkpoint we came from
    split_checkpoint(str(tmp_path / "hf"), str(tmp_path / "again"), 1, adapter=str(tmp_path / "peft"))
    a, b = (torch.load(tmp_path / f / "consolidated.00.pth", weights_only=True) for f in ("lora", "again"))
    assert same(a, b)
    assert json.load(open(tmp_path / "again" / "manifest.json"))["lora"] == {"rank": 3, "alpha": 7.5}


@pytest.mark.parametrize("options", [dict(target_modules=["q_proj", "v_proj"]), dict(target_modules="all-linear", use_rslora=True),
                                     dict(target_modules=["k_proj", "down_proj"], layers_to_transform=[1])], ids=str)
def test_peft_adapters_are_read_onto_their_base(options, world_of_one, tmp_path):
    """Including those that target a few modules: the others get adapters that add nothing."""
    peft = pytest.importorskip("peft")
    base = make_hf(tmp_path / "hf", "llama-9-3")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", lora_dropout=0.1, **options)).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn_like(p) * 0.1)
    adapted.save_pretrained(tmp_path / "peft")
    expected = logits(adapted)
    split_checkpoint(str(tmp_path / "hf"), str(tmp_path / "n2"), 2, adapter=str(tmp_path / "peft"))
    assert json.load(open(tmp_path / "n2" / "manifest.json"))["lora"] == {"rank": 4, "alpha": 6 * (math.sqrt(4) if "use_rslora" in options else 1)}
    split_checkpoint(str(tmp_path / "hf"), str(tmp_path / "merged"), 2, adapter=str(tmp_path / "peft"), merge_lora=True)
    assert json.load(open(tmp_path / "merged" / "manifest.json"))["lora"] is None
    stored = torch.load(tmp_path / "merged" / "consolidated.01.pth", weights_only=True)
    assert not any("lora" in name for name in stored)
    for folder, lora in (("n2", Lora(4, json.load(open(tmp_path / "n2" / "manifest.json"))["lora"]["alpha"])), ("n2", None), ("merged", None)):
        with torch.no_grad():
            got = logits_of(load_model(str(tmp_path / folder), lora=lora), [ROW])
        assert (got - expected).abs().max() < 1e-4, (folder, lora)


def test_fused_modules_share_their_a_and_part_their_b(world_of_one, tmp_path):
    """BLOOM's query_key_value alternates q, k, v head by head."""
    peft = pytest.importorskip("peft")
    base = make_hf(tmp_path / "hf", "bloom")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", target_modules=["query_key_value"])).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn_like(p) * 0.1)
    adapted.save_pretrained(tmp_path / "peft")
    expected = logits(adapted)
    split_checkpoint(str(tmp_path / "hf"), str(tmp_path / "n2"), 2, adapter=str(tmp_path / "peft"))
    for lora in (Lora(4, 6), None):
        with torch.no_grad():
            assert (logits_of(load_model(str(tmp_path / "n2"), lora=lora), [ROW]) - expected).abs().max() < 1e-4


def test_an_adapter_of_a_first_generation_qwen_is_parted_into_q_k_and_v(world_of_one, tmp_path):
    """Its c_attn has q, k and v one below the other; q and k stand in rotary order."""
    from llama_rlhf.checkpoint.convert import half_to_interleaved
    make_hf(tmp_path / "hf", "qwen1")
    prefix, b = "base_model.model.transformer.h.1.attn.c_attn", torch.arange(3 * 48 * 2.0).view(144, 2)
    os.makedirs(tmp_path / "peft")
    save_file({f"{prefix}.lora_A.weight": torch.ones(2, 48), f"{prefix}.lora_B.weight": b}, tmp_path / "peft/adapter_model.safetensors")
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c_attn"]}))
    split_checkpoint(str(tmp_path / "hf"), str(tmp_path / "n1"), 1, adapter=str(tmp_path / "peft"))
    stored = torch.load(tmp_path / "n1/consolidated.00.pth", weights_only=True)
    for name, rows in (("wq", half_to_interleaved(b[:48], 12)), ("wk", half_to_interleaved(b[48:96], 12)), ("wv", b[96:])):
        assert torch.equal(stored[f"layers.1.attention.{name}.lora_b"], rows) and not stored[f"layers.0.attention.{name}.lora_b"].any()
        assert torch.equal(stored[f"layers.1.attention.{name}.lora_a"], torch.ones(2, 48))


def test_adapters_of_fused_layers_of_their_own_become_one_of_three_times_the_rank(world_of_one, tmp_path):
    peft = pytest.importorskip("peft")
    base = make_hf(tmp_path / "hf", "bloom")
    plain, model = logits(base), trained(tmp_path / "hf", tmp_path / "lora")
    with torch.no_grad():
        expected = logits_of(model, [ROW])
    split_checkpoint(str(tmp_path / "lora"), str(tmp_path / "lora2"), 2)
    export_peft(str(tmp_path / "lora2"), str(tmp_path / "peft"))
    assert (logits(peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()) - expected).abs().max() < 1e-4
    assert (plain - expected).abs().max() > 0.1
    with pytest.raises(CheckpointError, match="rank_pattern"):          # ours have one rank throughout
        split_checkpoint(str(tmp_path / "hf"), str(tmp_path / "again"), 1, adapter=str(tmp_path / "peft"))


def test_peft_options_that_would_be_lost_are_named_and_refused(world_of_one, tmp_path):
    make_hf(tmp_path / "hf", "llama")
    trained(tmp_path / "hf", tmp_path / "lora")
    export_peft(str(tmp_path / "lora"), str(tmp_path / "peft"))
    options = json.load(open(tmp_path / "peft" / "adapter_config.json"))
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")

    def attempt(folder="peft", base="hf"):
        split_checkpoint(str(tmp_path / base), str(tmp_path / "out"), 2, adapter=str(tmp_path / folder))

    shutil.copytree(tmp_path / "peft", tmp_path / "bad")
    changes_base = [("init_lora_weights", name) for name in ("pissa", "olora", "corda", "loftq", "lora_ga")]
    for key, value in changes_base + list(dict(use_dora=True, rank_pattern={"q_proj": 8}, alpha_pattern={"q_proj": 8}, modules_to_save=["lm_head"], bias="all",
                           fan_in_fan_out=True, init_lora_weights="pissa_niter_4", lora_bias=True, trainable_token_indices=[1],
                           something_new_in_2030=True, peft_type="IA3", r=0).items()):
        with open(tmp_path / "bad" / "adapter_config.json", "w") as file:
            json.dump({**options, key: value}, file)
        with pytest.raises(CheckpointError, match=f"{key}|{value}" if key != "r" else "r=0"):
            attempt("bad")
    shutil.copy(tmp_path / "peft" / "adapter_config.json", tmp_path / "bad")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for damage, sentence in (({"base_model.model.lm_head.lora_A.weight": torch.ones(3, 48)}, "lm_head"), ({name: torch.ones(3, 40)}, "another model"),
                             ({name: None}, "only one of lora_A and lora_B")):
        changed = {key: x for key, x in {**tensors, **damage}.items() if x is not None}
        save_file(changed, tmp_path / "bad" / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=sentence):
            attempt("bad")
    with pytest.raises(CheckpointError, match="adapters of its own"):
        attempt(base="lora")
    assert not (tmp_path / "out").exists()
    attempt()                   # the undamaged one is fine
