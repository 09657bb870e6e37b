"""The tokenizer files that transformers loads, from the metadata of a GGUF file, or from a sentencepiece or tiktoken file.

    write_tokenizer_files("SmolLM2-135M-Instruct.Q4_1.gguf", "runs/smollm2")
    write_fast_tokenizer("runs/llama-2-hf")      # which holds tokenizer.model

A GGUF file carries vocabulary, merges or scores, special ids and the chat template, but only the *name* of the rule
that splits text into words before BPE (tokenizer.ggml.pre). The rule decides which tokens a number or a run of blanks
becomes, so a name this module does not know is refused rather than replaced by a similar rule.
"""

import contextlib
import json
import os
import shutil

from llama_rlhf.tokenizer import SPLIT, load_tokenizer
from llama_rlhf.untrusted import reading

from .convert import NAMED_TEMPLATES
from .formats import CheckpointError, read_gguf_header

MAX_TOKEN = 1000  # characters; each of a token's cuts in two may be a merge
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ONLY = BYTE_LEVEL | {"use_regex": False}


def _split(digits):
    pattern = {"Regex": SPLIT.replace("DIGITS", digits)}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def _sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


PRE_TOKENIZERS = {
    "gpt-2": BYTE_LEVEL,
    "smollm": _sequence({"type": "Digits", "individual_digits": True}, BYTE_LEVEL),
    "qwen2": _sequence(_split(""), BYTES_ONLY),
    "llama-bpe": _sequence(_split("{1,3}"), BYTES_ONLY),
}


def write_tokenizer_files(gguf_path, folder) -> list[str]:
    """Write tokenizer.json and tokenizer_config.json into `folder`, and generation_config.json if it has none.

    Returns the paths written. Existing tokenizer files are replaced. Raises CheckpointError if the file has no
    tokenizer, or one that cannot be reproduced exactly.
    """
    path = os.fspath(gguf_path)
    metadata = read_gguf_header(path).metadata
    with reading(path, "its tokenizer is damaged; take tokenizer.json from the original model", CheckpointError):
        vocabulary = _Vocabulary(path, metadata)
        if vocabulary.model == "gpt2":
            tokenizer = _byte_level_tokenizer(vocabulary)
        elif vocabulary.model == "llama":
            tokenizer = _sentencepiece_tokenizer(vocabulary)
        else:
            raise CheckpointError(f"{path}: tokenizer.ggml.model is {vocabulary.model!r:.80}; supported: gpt2, llama")

        files = {"tokenizer.json": tokenizer, "tokenizer_config.json": _tokenizer_config(vocabulary)}
        if not os.path.exists(os.path.join(folder, "generation_config.json")):
            files["generation_config.json"] = _generation_config(vocabulary)
    written = []
    try:
        os.makedirs(folder, exist_ok=True)
        for name, content in files.items():
            written.append(os.path.join(folder, name))
            with open(written[-1], "w", encoding="utf-8") as stream:
                json.dump(content, stream, ensure_ascii=False, indent=1)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be written: {error.strerror}") from error
    return written


def write_fast_tokenizer(folder) -> list[str]:
    """Give a folder whose tokenizer is a sentencepiece or tiktoken file the tokenizer.json and tokenizer_config.json that transformers
    loads. (It makes one itself only with further packages, and for some families without control tokens, bos or chat format.)

    PROBES, a conversation and every piece of sentencepiece are encoded with both. Returns what came out otherwise: user-defined
    pieces, which sentencepiece cuts out of a text first, are spelled out by the new file. If one of PROBES did, no tokenizer.json is left.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer.kind not in ("sentencepiece", "tiktoken"):
        return []
    ids = {"bos": tokenizer.bos_id, "eos": next(iter(tokenizer.eos_ids), None), "padding": tokenizer.pad_id,
           "unknown": tokenizer.special_ids.get("<unk>")}
    if tokenizer.kind == "tiktoken":
        spec = tokenizer.spec()
        told: dict = {"model": "gpt2", "tokens": sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get) + [t["content"] for t in spec["added_tokens"]]}
    else:
        told = {"model": "llama", **dict(zip(("tokens", "scores", "token_type"), map(list, zip(*tokenizer.pieces()))))}
    told |= {f"{name}_token_id": -1 if id is None else id for name, id in ids.items()} | {"add_bos_token": tokenizer.bos_id is not None}
    vocabulary = _Vocabulary(folder, {f"tokenizer.ggml.{key}": value for key, value in told.items()})
    spec = spec | {"post_processor": _post_processor(vocabulary)} if tokenizer.kind == "tiktoken" else _sentencepiece_tokenizer(vocabulary)
    scores = [score for score, kind in zip(told.get("scores", ()), vocabulary.types) if kind == NORMAL]
    if 2 * sum(score % 1 > 0 for score in scores) > len(scores):    # of BPE they are ranks (and where vocabularies were joined, anything for some)
        spec |= _unigram(vocabulary)

    def write(name, content):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as stream:
            stream.write(json.dumps(content, ensure_ascii=False))      # (json.dump, or an indent, takes seconds for 150,000 words)

    config = _tokenizer_config(vocabulary)
    write("tokenizer.json", spec)
    write("tokenizer_config.json", config)
    new = load_tokenizer(folder)
    probes = [*PROBES, *(map(tokenizer.token_text, range(tokenizer.vocab_size)) if tokenizer.kind == "sentencepiece" else ())]
    wrong = [text for text, a, b in zip(probes, tokenizer.encode_batch(probes, bos=True), new.encode_batch(probes, bos=True)) if a != b]
    if wrong and wrong[0] in PROBES:
        os.remove(os.path.join(folder, "tokenizer.json"))
        return wrong
    templates = tokenizer.templates | ({"default": tokenizer.chat_template} if tokenizer.chat_template else {})
    if templates:
        for name, template in templates.items():
            # sentencepiece puts a blank before each text of its own, and so does tokenizer.json: after a control token the template must not
            tokenizer.chat_template, expected = template, None
            with contextlib.suppress(ValueError):       # it wants tools, or documents
                expected = tokenizer.chat(CONVERSATION)
            for new.chat_template in (template, template.replace("] ' +", "]' +").replace("{{ ' ' + m.content", "{{ m.content")):
                if expected is None or new.chat(CONVERSATION) == expected:
                    break
            else:
                wrong.append("conversations" if name == "default" else f"conversations by {name}")
            templates[name] = new.chat_template
        named = [{"name": name, "template": template} for name, template in templates.items()]
        write("tokenizer_config.json", config | {"chat_template": templates["default"] if templates.keys() == {"default"} else named})
        for name in ("chat_template.jinja", "chat_template.json"):      # would be read in its place
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, name))
        shutil.rmtree(os.path.join(folder, NAMED_TEMPLATES), ignore_errors=True)
    return wrong


# what normalisers, prefixes and splitting rules treat differently
PROBES = ("Hello world", " a  b   c \n\n d\t\r\n", "12345 6.78e-9 ½ ² ﬁ Å", "e\u0301 \u3000 \u200b 日本語 🙂 \u0130", "", "\u2581x", "I'LL we've <s> </s> <unk> <0x0A>",
          "<|im_end|> [INST] [/INST] <|eot_id|>")
CONVERSATION = [{"role": "user", "content": " one\n"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three "}]


class _Vocabulary:
    """The tokenizer.ggml.* keys, checked."""

    def __init__(self, path, metadata):
        self.path, self.metadata = path, metadata
        self.model, self.pre = self.get("model"), self.get("pre")
        self.tokens = self.get("tokens")
        if self.model is None or not self.tokens:
            raise CheckpointError(f"{path}: holds no tokenizer; take tokenizer.json from the original model")
        if not isinstance(self.tokens, list) or not all(isinstance(token, str) and len(token) <= MAX_TOKEN for token in self.tokens):
            raise CheckpointError(f"{path}: tokenizer.ggml.tokens is not a list of texts of at most {MAX_TOKEN} characters")
        self.types = self.get("token_type") or [NORMAL] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise CheckpointError(f"{path}: {len(self.tokens)} tokens but {len(self.types)} token types")
        self.id_of = {token: i for i, token in enumerate(self.tokens)}
        if len(self.id_of) != len(self.tokens):
            seen = next(token for i, token in enumerate(self.tokens) if self.id_of[token] != i)
            raise CheckpointError(f"{path}: the token {seen!r} appears twice in the vocabulary")

    def get(self, key, default=None):
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def special_id(self, name):
        """An id such as "bos", or None. Exporters write -1 (as 2**32 - 1) for "none"."""
        token_id = self.get(f"{name}_token_id")
        if token_id is None or token_id in (-1, 2**32 - 1):
            return None
        if not 0 <= token_id < len(self.tokens):
            raise CheckpointError(f"{self.path}: {name}_token_id is {token_id}, the vocabulary has {len(self.tokens)}")
        return token_id

    def special_token(self, name):
        token_id = self.special_id(name)
        return None if token_id is None else self.tokens[token_id]

    @property
    def adds_bos(self):
        return bool(self.get("add_bos_token", self.model == "llama" or self.pre == "llama-bpe"))

    @property
    def adds_eos(self):
        return bool(self.get("add_eos_token", False))


def _byte_level_tokenizer(vocabulary):
    if vocabulary.pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{vocabulary.path}: tokenizer.ggml.pre is {vocabulary.pre!r}, whose rule for splitting text is unknown here "
            f"(known: {', '.join(PRE_TOKENIZERS)}); take tokenizer.json from the original model"
        )
    merges = vocabulary.get("merges")
    if not merges:
        raise CheckpointError(f"{vocabulary.path}: the tokenizer has no merges; take tokenizer.json from the original")
    pairs = [merge.split(" ") for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or any(token not in vocabulary.id_of for token in (*pair, "".join(pair))):
            raise CheckpointError(f"{vocabulary.path}: the merge {' '.join(pair)!r} is not made of known tokens")
    # UNUSED tokens are fillers ("[PAD123]") for rows that no token of the original vocabulary has
    vocab = {token: i for token, i in vocabulary.id_of.items() if vocabulary.types[i] != UNUSED}
    return _tokenizer(
        vocabulary,
        vocab,
        pairs,
        # a word that is a token itself is that token, whatever the merges would make of it
        bpe={"ignore_merges": vocabulary.pre == "llama-bpe"},
        normalizer={"type": "NFC"} if vocabulary.pre == "qwen2" else None,
        pre_tokenizer=PRE_TOKENIZERS[vocabulary.pre],
        decoder=BYTE_LEVEL,
    )


def _sentencepiece_tokenizer(vocabulary):
    """SentencePiece BPE (of unigram models `_unigram` replaces a part): the score of a piece says when it is merged, which byte tokens stand in for unknown text."""
    architecture = str(vocabulary.metadata.get("general.architecture"))
    rewrites_text = vocabulary.get("precompiled_charsmap") or vocabulary.get("remove_extra_whitespaces")
    if architecture.startswith("gemma") or rewrites_text:
        raise CheckpointError(
            f"{vocabulary.path}: the {architecture} tokenizer treats text in ways not reproduced here; take "
            "tokenizer.json from the original model"
        )
    scores = vocabulary.get("scores")
    if not scores or len(scores) != len(vocabulary.tokens):
        raise CheckpointError(f"{vocabulary.path}: {len(vocabulary.tokens)} tokens but {len(scores or [])} scores")
    missing = [name for name in (f"<0x{byte:02X}>" for byte in range(256)) if name not in vocabulary.id_of]
    if missing:
        raise CheckpointError(f"{vocabulary.path}: the vocabulary lacks {len(missing)} byte tokens, e.g. {missing[0]}")
    adds_space = bool(vocabulary.get("add_space_prefix", True))
    unknown = vocabulary.special_token("unknown")
    if unknown is None and UNKNOWN in vocabulary.types:
        unknown = vocabulary.tokens[vocabulary.types.index(UNKNOWN)]
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    undo_blanks = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return _tokenizer(
        vocabulary,
        vocabulary.id_of,
        _merges_from_scores(vocabulary, scores),
        bpe={"unk_token": unknown, "fuse_unk": True, "byte_fallback": True},
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}] * adds_space + [blanks]},
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [undo_blanks, {"type": "ByteFallback"}, {"type": "Fuse"}]
            + [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * adds_space,
        },
    )


def _unigram(vocabulary):
    """Of a sentencepiece unigram model: a score is the logarithm of a probability, and the pieces of a text are those with the largest sum.

    tokenizers would find the name of a byte, such as <0x0A>, in a text as well: texts are parted before the last sign of such a name.
    """
    model = {"type": "Unigram", "unk_id": vocabulary.types.index(UNKNOWN), "byte_fallback": True,
             "vocab": [[token, score] for token, score in zip(vocabulary.tokens, vocabulary.get("scores"))]}
    parted = {"type": "Split", "pattern": {"Regex": "(?<=<0x[0-9A-F]{2})(?=>)"}, "behavior": "Isolated", "invert": False}
    return {"model": model, "pre_tokenizer": parted}


def _merges_from_scores(vocabulary, scores):
    """Every way to put a piece together from two pieces, best score first.

    Only NORMAL pieces are ever merged: SentencePiece never builds a control or byte token out of text.
    """
    mergeable = {token for token, kind in zip(vocabulary.tokens, vocabulary.types) if kind == NORMAL}
    found = []
    for token in mergeable:
        i = vocabulary.id_of[token]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                found.append((-scores[i], i, vocabulary.id_of[left], vocabulary.id_of[right]))
    return [[vocabulary.tokens[left], vocabulary.tokens[right]] for _, _, left, right in sorted(found)]


def _tokenizer(vocabulary, vocab, merges, *, bpe, normalizer, pre_tokenizer, decoder):
    """The content of tokenizer.json."""
    special = {CONTROL, UNKNOWN} if vocabulary.model == "llama" else {CONTROL}
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind in special}
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types))
        if kind in special | {USER_DEFINED}
    ]  # fmt: skip
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
    }  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _post_processor(vocabulary),
        "decoder": decoder,
        "model": model | bpe | {"vocab": vocab, "merges": merges},
    }


def _post_processor(vocabulary):
    """Puts bos before and eos after the text, where the file says so."""
    before = ["bos"] if vocabulary.adds_bos and vocabulary.special_id("bos") is not None else []
    after = ["eos"] if vocabulary.adds_eos and vocabulary.special_id("eos") is not None else []
    if not before + after:
        return None

    def template(text, type_id):
        def piece(name):
            return {"SpecialToken": {"id": vocabulary.special_token(name), "type_id": type_id}}

        return [piece(n) for n in before] + [{"Sequence": {"id": text, "type_id": type_id}}] + [piece(n) for n in after]

    used = {vocabulary.special_token(n): vocabulary.special_id(n) for n in before + after}
    return {
        "type": "TemplateProcessing",
        "single": template("A", 0),
        "pair": template("A", 0) + template("B", 1),
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in used.items()},
    }


def _tokenizer_config(vocabulary):
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "clean_up_tokenization_spaces": False,
        "add_bos_token": vocabulary.adds_bos,
        "add_eos_token": vocabulary.adds_eos,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        config[f"{name}_token"] = vocabulary.special_token(key)
    architecture = vocabulary.metadata.get("general.architecture")
    if length := vocabulary.metadata.get(f"{architecture}.context_length"):
        config["model_max_length"] = length
    if template := vocabulary.metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config


def _generation_config(vocabulary):
    """bos, eos and pad ids; a list of eos ids where a chat turn ends with another token than a text."""
    ends = dict.fromkeys(i for name in ("eos", "eot", "eom") if (i := vocabulary.special_id(name)) is not None)
    ids = {"bos_token_id": vocabulary.special_id("bos"), "pad_token_id": vocabulary.special_id("padding")}
    ids["eos_token_id"] = list(ends) if len(ends) > 1 else next(iter(ends), None)
    return {key: value for key, value in ids.items() if value is not None}
