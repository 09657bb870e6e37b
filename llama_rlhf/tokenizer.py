"""Text to token ids and back, one interface for every tokenizer file of the supported families.

    tokenizer = load_tokenizer(ckpt_dir)
    prompt = tokenizer.encode("What is 2 + 3?\\n", bos=True)
    answer = tokenizer.encode("#### 5", eos=True)

Three rules hold for every kind:

* Text is data. `<s>` or `<|im_end|>` written by a user is encoded as the characters it consists of; only
  `special=True`, or the chat template itself, makes control tokens. (An ordinary character that is named as pad or end
  token, "!" or "?", stays an ordinary character.)
* `bos_id` is the token that *every* sequence of this model starts with, or None where sequences start without
  one (Qwen, SmolLM2, BLOOM), even if some file names a BOS token.
* `eos_ids` are all tokens that end generation; the first is the one appended to answers in training.

Nothing here runs code from a checkpoint folder; chat templates, programs too, are rendered in a sandbox of their own.
"""

import base64
import itertools
import json
import os
import re
import secrets
import tempfile
from pathlib import Path

from llama_rlhf import chat_templates
from llama_rlhf.untrusted import read_json, reading, refuse_stand_in

FOLDER_FILES = (
    "tokenizer.bytes.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer.model.v1",
    "qwen.tiktoken",
)
MAX_TEMPLATE = 1 << 17  # characters
MAX_NAME, MAX_RANKED_BYTES = 200, 1000  # of a control token's name; of a token in a tiktoken file: all its parts are looked up
CONTROL_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
MAX_FILE_BYTES = 64 << 20  # the largest real one, a tokenizer.json of 256k tokens, has about 35 MB


class Tokenizer:
    """What all kinds share. A kind supplies `_encode_parts`, `_decode_text` and `_piece_text`.

    special_ids: control tokens by name. vocab_size counts ids the tokenizer knows; a model's embedding may have
    more rows. pad_id fills batches and may equal an eos id: masks must come from lengths, never from ids.
    """

    def __init__(self, kind, plain_size, special_ids, settings, *, starts_with_bos, eos_names=(), text_ids=None):
        """text_ids: tokens by name which are text all the same. plain_size: ids from here on stand for something only
        where special_ids or text_ids name them."""
        named = {**(text_ids or {}), **special_ids}
        longest = max(named, key=len, default="")
        if len(longest) > MAX_NAME:
            raise ValueError(f"the name of an added token has {len(longest)} characters, more than {MAX_NAME}: {longest[:40]!r}...")
        self.kind = kind
        self.vocab_size = max(plain_size, *(id + 1 for id in named.values()), 0)
        self._plain_size = plain_size
        self.special_ids = special_ids
        self._special_names = {id: name for name, id in special_ids.items()}
        self._text_names = {id: name for name, id in (text_ids or {}).items()}
        self._written: dict = {}  # {id: text} of ordinary ids which `_decode_text` would not give back as they were written
        self._special_pattern = _any_of(special_ids)
        self._special_heads = {name[:n] for name in special_ids for n in range(1, len(name))}
        self._special_tails = {name[n:] for name in special_ids for n in range(1, len(name))}
        self._special_lengths = range(1, max(map(len, special_ids), default=0))
        self._ids: dict[int, int] = {}
        self._settings = settings
        self.chat_template, self.templates = settings.chat_template, settings.templates

        add_bos = starts_with_bos if settings.add_bos is None else settings.add_bos
        self.bos_id = named.get(settings.names.get("bos_token")) if add_bos else None
        own = [named[name] for name in (settings.names.get("eos_token"), *eos_names) if name in named]
        self.eos_ids = _merge_eos(list(dict.fromkeys(own)), settings.generation_eos)
        pad = named.get(settings.names.get("pad_token"))
        self.pad_id = pad if pad is not None else (self.eos_ids or (0,))[0]

    def _encode_parts(self, parts) -> list[int]:
        raise NotImplementedError

    def _decode_text(self, ids) -> str:
        raise NotImplementedError

    def _piece_text(self, id) -> str:
        raise NotImplementedError

    # -- text to ids --

    def encode(self, text, *, bos=False, eos=False, special=False):
        """Token ids of `text`. bos and eos add that token where the tokenizer has one; special=True reads the
        names of control tokens in `text` as those tokens, which is not for text that comes from users."""
        return self._framed(self._shared(self._encode_parts(self._split(text) if special else [text])), bos, eos)

    def encode_batch(self, texts, *, bos=False, eos=False):
        return [self.encode(text, bos=bos, eos=eos) for text in texts]

    def _shared(self, ids):
        """The same numbers, each a single object however often it comes: of a million texts, 8 bytes a token instead of 40."""
        return list(map(self._ids.setdefault, ids, ids))

    def _framed(self, ids, bos, eos):
        head = [self.bos_id] if bos and self.bos_id is not None else []
        if eos and not self.eos_ids:
            raise ValueError("this tokenizer has no end token: name one as eos_token in tokenizer_config.json")
        return head + ids + ([self.eos_ids[0]] if eos else [])

    def _split(self, text):
        """Alternating runs of plain text (str) and control tokens (int)."""
        return _split(text, self._special_pattern, self.special_ids)

    # -- ids to text --

    def decode(self, ids, *, skip_special=True):
        """Text of `ids`; control tokens are left out, or written by name. An id the tokenizer does not know (a
        padding row of the embedding, sampled by an untrained model) becomes the replacement character."""
        runs: list = [[]]  # each run of ordinary ids is decoded as one, characters may span tokens
        for id in ids:
            if id in self._special_names:
                runs += [] if skip_special else [self._special_names[id], []]
            elif id in self._written:
                runs += [self._written[id], []]
            elif 0 <= id < self._plain_size:
                runs[-1].append(id)
            else:
                runs += [self._text_names.get(id, "\ufffd"), []]
        return "".join(run if isinstance(run, str) else self._decode_text(run) for run in runs if run)

    def token_text(self, id):
        """One token as shown to a person: its leading space kept, a part of a character as \ufffd."""
        if id in self._special_names:
            return self._special_names[id]
        if id in self._written:
            return self._written[id]
        return self._piece_text(id) if 0 <= id < self._plain_size else self._text_names.get(id, "\ufffd")

    def _stands_alone(self, id):
        """Whether this token has the same text beside any other: it is no part of a character, no blank that a beginning may lose, and none that is left out."""
        text = self.token_text(id)
        return id not in self._special_names and "\ufffd" not in text and text.strip() != ""

    # -- chat --

    def chat(self, messages, *, add_generation_prompt=True):
        """Token ids of a conversation, messages = [{"role": ..., "content": ...}, ...], by the chat template.

        Control tokens that the template writes become ids. Whatever looks like one inside a message stays text:
        such spots are split by a private character before rendering, which is removed again afterwards. So the
        template may strip or cut the text as it likes, and ordinary text is rendered untouched.
        """
        if self.chat_template is None:
            raise ValueError(
                "this tokenizer has no chat template: add chat_template.jinja to its folder, or choose one by "
                f"--chat_format ({', '.join(CHAT_FORMATS)})"
            )
        everything = json.dumps(messages, ensure_ascii=False) + self.chat_template
        guard = next((c for c in map(chr, range(0xE000, 0xF900)) if c not in everything), None)  # a private-use character
        if guard is None:
            raise ValueError("messages and chat template use every one of Unicode's private characters; one is needed here")
        rendered = self._render(self._guarded(messages, guard), add_generation_prompt)
        parts = [part if isinstance(part, int) else part.replace(guard, "") for part in self._split(rendered)]
        ids = self._shared(self._encode_parts([part for part in parts if part != ""]))
        if self.bos_id is None:
            return ids
        while ids[:1] == [self.bos_id]:  # the template may write it or not, some write it twice
            ids = ids[1:]
        return [self.bos_id, *ids]

    def _guarded(self, value, guard):
        if isinstance(value, dict):
            return {key: self._guarded(item, guard) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._guarded(item, guard) for item in value]
        if not isinstance(value, str):
            return value
        value = self._special_pattern.sub(lambda match: match[0][0] + guard + match[0][1:], value)
        # A name could also come about across the edge: "<|im_" here and "end|>" in the next message.
        start = len(value) - len(value.lstrip())
        end = max(start, len(value.rstrip()))  # of blanks alone the two would cross
        core = value[start:end]
        head = guard if any(core[:n] in self._special_tails for n in self._special_lengths) else ""
        tail = guard if any(core[-n:] in self._special_heads for n in self._special_lengths) else ""
        return value[:start] + head + core + tail + value[end:]

    def _render(self, messages, add_generation_prompt):
        names = {"bos_token": "", "eos_token": "", **self._settings.names}
        return chat_templates.render(self.chat_template, messages=messages, add_generation_prompt=add_generation_prompt,
                                     tools=None, documents=None, **names)  # fmt: skip


class GrowingText:
    """The text of ids that come one by one: each costs a short piece to decode, not all that came before."""

    def __init__(self, tokenizer, *, skip_special=True):
        self._tokenizer, self._skip_special, self._settled, self._recent, self._known = tokenizer, skip_special, "", [], 0

    def add(self, id):
        """The whole text, as `decode` of all ids gives it."""
        self._recent.append(id)
        text = self._settled + self._decode(self._recent)[self._known :]
        if len(self._recent) > 64 and self._tokenizer._stands_alone(id):
            self._settled, self._recent, self._known = text, [id], len(self._decode([id]))  # the next is decoded behind this one, for the blank between them
        return text

    def _decode(self, ids):
        return self._tokenizer.decode(ids, skip_special=self._skip_special)


def _any_of(names):
    """A pattern of these names; the longest wins where two begin alike. Written as a tree: one after the other, 6,000 unused tokens took a second a text."""
    return re.compile(_tree(sorted(filter(None, names))) or r"(?!)")


def _tree(names):
    head = os.path.commonprefix(names)
    rest = [name[len(head):] for name in names]
    ways = "|".join(_tree(list(those)) for _, those in itertools.groupby(filter(None, rest), lambda name: name[0]))
    return re.escape(head) + (f"(?:{ways}){'?' if '' in rest else ''}" if ways else "")


def _split(text, pattern, ids):
    """Alternating runs of plain text (str) and the ids of what the pattern found (int)."""
    parts, position = [], 0
    for match in pattern.finditer(text):
        parts += [text[position : match.start()], ids[match[0]]]
        position = match.end()
    return [part for part in [*parts, text[position:]] if part != ""]


def _merge_eos(own, generation):
    """The ids that end generation: a list in generation_config.json (or config.json) wins, a single id is added to our own.
    The tokenizer's eos stays first where it is among them: Llama 3 chat models list three, and train one."""
    if isinstance(generation, list):
        first = [id for id in own if id in generation][:1]
        return tuple(dict.fromkeys(first + generation))
    return tuple(dict.fromkeys(own + ([] if generation is None else [generation])))


# -- kinds ------------------------------------------------------------------------------------------------------


class BytesTokenizer(Tokenizer):
    """One token per UTF-8 byte, for toy models and tests. File: {"kind": "bytes"}, optionally "vocab_size"."""

    def __init__(self, spec, settings):
        special_ids = {"<bos>": 256, "<eos>": 257, "<pad>": 258}
        vocab_size = spec.get("vocab_size", 260)
        if not isinstance(vocab_size, int) or vocab_size < 259:
            raise ValueError(f"a bytes tokenizer needs vocab_size of at least 259, not {vocab_size!r}")
        settings.names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", **settings.names}
        super().__init__("bytes", 256, special_ids, settings, starts_with_bos=True)
        self.vocab_size = vocab_size

    def _encode_parts(self, parts):
        return [id for part in parts for id in ([part] if isinstance(part, int) else part.encode())]

    def _decode_text(self, ids):
        return bytes(ids).decode(errors="replace")

    def _piece_text(self, id):
        return self._decode_text([id])


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model` protobuf (LLaMA 1 and 2, Mistral). The ids in the model are the truth: several early
    LLaMA conversions carry wrong ids in their json files."""

    def __init__(self, file, settings):
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(file.read_bytes())
        except Exception as e:
            raise ValueError(f"{file} is neither a sentencepiece model nor a tiktoken file: {e}") from e
        size = self._model.vocab_size()
        control = [id for id in range(size) if self._model.IsControl(id) or self._model.IsUnknown(id)]
        special_ids = {self._model.IdToPiece(id): id for id in control}
        names = {kind: name for kind, name in settings.names.items() if name in special_ids or name in settings.added}
        for kind, id in {"bos": self._model.bos_id(), "eos": self._model.eos_id(), "pad": self._model.pad_id()}.items():
            if id >= 0:
                names.setdefault(f"{kind}_token", self._model.IdToPiece(id))
        settings.names = names
        extra = {name: token for name, token in settings.added.items() if token["id"] >= size}
        special_ids.update({name: token["id"] for name, token in extra.items() if settings.is_control(token)})
        self._text_ids = {name: token["id"] for name, token in extra.items() if name not in special_ids}
        if settings.chat_template is None and "[INST]" in special_ids:
            settings.chat_template = _MISTRAL_V7 if "[SYSTEM_PROMPT]" in special_ids else _MISTRAL_V3
        super().__init__("sentencepiece", size, special_ids, settings, starts_with_bos=True, text_ids=self._text_ids)
        self._text_pattern = _any_of(self._text_ids)

    def pieces(self):
        """(text, score, type) of every id, types as in tokenizer.ggml.token_type: 1 normal, 2 unknown, 3 control, 4 added text, 5 unused, 6 byte."""
        model, of = self._model, self._model.vocab_size()
        kinds = [2 if model.IsUnknown(id) else 3 if model.IsControl(id) else 6 if model.IsByte(id) else 1 for id in range(of)]
        own = [(model.IdToPiece(id), model.GetScore(id), kind) for id, kind in enumerate(kinds)]
        names = {**self._text_names, **self._special_names}
        kinds = [3 if id in self._special_names else 4 if id in names else 5 for id in range(of, self.vocab_size)]
        return own + [(names.get(id, f"<unused {id}>"), 0.0, kind) for id, kind in enumerate(kinds, of)]

    def _encode_parts(self, parts):
        ids = []
        for n, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            else:
                # Every piece of text gets sentencepiece's own leading space. Templates that write this space after
                # a control token ("[INST] {text}") would otherwise have it twice.
                with reading("tokenizer.model", "cannot encode this text with it"):  # half of a surrogate pair, from json
                    for piece in _split(part[1:] if n and part[0] == " " else part, self._text_pattern, self._text_ids):
                        ids += [piece] if isinstance(piece, int) else self._model.EncodeAsIds(piece)
        return ids

    def _decode_text(self, ids):
        return self._model.DecodeIds(ids)

    def _piece_text(self, id):
        return _piece_text(self._model.IdToPiece(id))

    def _stands_alone(self, id):
        return super()._stands_alone(id) and not (id < self._plain_size and self._model.IsByte(id))  # bytes in a row are decoded as one


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` (also built from tiktoken ranks), run by the `tokenizers` library.

    That library matches control tokens inside any text. So each of them is renamed, inside it, to a random word
    made anew at every load: only we can write it, and a look-alike is plain text. A single character that is a piece
    of the vocabulary, such as "!" named as pad_token, keeps its name: texts need it.
    """

    def __init__(self, spec, settings, *, kind="json", eos_names=()):
        import tokenizers

        secret = secrets.token_hex(8)
        vocab = spec["model"]["vocab"]  # {piece: id}, or [[piece, score], ...] in unigram models
        ids = dict(vocab) if isinstance(vocab, dict) else {piece: id for id, (piece, _) in enumerate(vocab)}
        added = {token["content"]: token for token in spec.setdefault("added_tokens", [])}
        for name, token in added.items():  # of both files tokenizer_config.json has the last word, as in transformers
            if (told := settings.told.get(name)) and told["id"] == token["id"]:
                token.update(told, special=bool(told.get("special") or token.get("special")))
        taken = {*ids.values(), *(token["id"] for token in added.values())}
        declared = {name: {"content": name, **CONTROL_FLAGS, "id": ids[name]} for name in settings.names.values() if name in ids}
        for name, token in sorted(settings.added.items(), key=lambda item: item[1]["id"]):
            if name in ids or token["id"] not in taken:  # where the files disagree, this one counts
                declared[name] = {**token, "id": ids.get(name, token["id"])}
        declared = {name: token for name, token in declared.items() if name not in added}
        added |= declared
        spec["added_tokens"] += declared.values()
        self._byte_level = '"ByteLevel"' in json.dumps(spec.get("decoder"))
        adds_blanks = not self._byte_level or '"add_prefix_space": true' in json.dumps(spec.get("pre_tokenizer"))
        special_ids, text_ids = {}, {}
        for name, token in added.items():
            if not settings.is_control(token):
                continue
            if len(name) == 1 and name in ids:
                text_ids[name] = token["id"]
                if adds_blanks:  # behind every token that the library cuts out of a text: "hell o" with "l" as pad_token
                    spec["added_tokens"].remove(token)
                continue
            special_ids[name] = token["id"]
            token.update(content=f"{secret}.{token['id']}.", special=True, normalized=False, single_word=False)
            if name in ids and isinstance(vocab, dict):
                vocab[token["content"]] = vocab.pop(name)
            elif name in ids:
                vocab[ids[name]] = [token["content"], vocab[ids[name]][1]]
            if spec["model"].get("unk_token") == name:
                spec["model"]["unk_token"] = token["content"]
        if special_ids.keys() & ids.keys() and spec["model"].get("merges"):  # text is not merged into a control token either
            pairs = [(merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in spec["model"]["merges"]]
            spec["model"]["merges"] = [merge for merge, pair in pairs if special_ids.keys().isdisjoint([*pair, "".join(pair)])]
        starts_with_bos = _first_token(spec.get("post_processor"))
        if starts_with_bos in special_ids:
            settings.names.setdefault("bos_token", starts_with_bos)
        # Some files were saved with truncation to 512 tokens or padding switched on.
        spec.update(post_processor=None, truncation=None, padding=None)
        self._rust = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._secret = secret
        for name, token in added.items():
            if (name in special_ids or name in declared) and self._rust.token_to_id(token["content"]) != token["id"]:
                raise ValueError(f"the added token {name!r} has id {token['id']}, but loads as another one: the ids of added tokens must leave no gap")
        size = max(self._rust.get_vocab(with_added_tokens=True).values()) + 1
        super().__init__(kind, size, special_ids, settings, eos_names=eos_names, text_ids=text_ids,
                         starts_with_bos=starts_with_bos is not None)
        if self._byte_level:  # the library takes the letters of an added "für" for stand-ins of bytes
            self._written = {token["id"]: name for name, token in added.items()
                             if name not in special_ids and (len(name) > 1 or name not in ids)}  # fmt: skip

    def spec(self):
        """The tokenizer.json, control tokens under their own names."""
        names = self._special_names
        text = re.sub(rf"{self._secret}\.(\d+)\.", lambda m: json.dumps(names[int(m[1])])[1:-1], self._rust.to_str())
        return json.loads(text)

    def _text_of(self, parts):
        return "".join(part if isinstance(part, str) else f"{self._secret}.{part}." for part in parts)

    def _encode_parts(self, parts):
        with reading("tokenizer.json", "cannot encode this text with it"):  # a splitting rule that never ends is given up
            return self._rust.encode(self._text_of(parts), add_special_tokens=False).ids

    def encode_batch(self, texts, *, bos=False, eos=False):
        with reading("tokenizer.json", "cannot encode these texts with it"):
            encoded = self._rust.encode_batch(texts, add_special_tokens=False)
        return [self._framed(self._shared(item.ids), bos, eos) for item in encoded]

    def _decode_text(self, ids):
        return self._rust.decode(ids, skip_special_tokens=False)

    def _piece_text(self, id):
        piece = self._rust.id_to_token(id) or "\ufffd"
        if not self._byte_level:
            return _piece_text(piece)
        try:
            return bytes(_BYTE_OF_CHARACTER[c] for c in piece).decode(errors="replace")
        except KeyError:  # an added token, kept as written
            return piece

    def _stands_alone(self, id):
        return super()._stands_alone(id) and not (self._rust.id_to_token(id) or "").startswith("<0x")  # bytes in a row are decoded as one


def _first_token(processor):
    """The control token that a tokenizer.json's post-processor puts in front, or None."""
    if not processor:
        return None
    if processor["type"] == "Sequence":
        return next(filter(None, map(_first_token, processor["processors"])), None)
    first = (processor.get("single") or [{}])[0]
    return first.get("SpecialToken", {}).get("id")


def _piece_text(piece):
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes([int(byte[1], 16)]).decode(errors="replace") if byte else piece.replace("\u2581", " ")


def _byte_characters():
    """GPT-2's printable stand-in for each byte: itself where printable, the next free code point from 256 on
    otherwise."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


_CHARACTER_OF_BYTE = _byte_characters()
_BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(_CHARACTER_OF_BYTE)}


# -- tiktoken files: lines of base64(token) and rank; the regex and the control tokens are known by family ---------

# the published splitting rules: Qwen's (one digit at a time) and Llama 3's (up to three)
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_NAMES = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
]  # fmt: skip
_LLAMA3_NAMES += [f"<|reserved_special_token_{n}|>" for n in range(3, 3 + 256 - len(_LLAMA3_NAMES))]
_QWEN_NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + [f"<|extra_{n}|>" for n in range(205)]
TIKTOKEN_FAMILIES: dict[int, dict] = {  # by number of ranks
    151643: dict(
        pattern=SPLIT.replace("DIGITS", ""), special_names=_QWEN_NAMES, nfc=True, chat_format="chatml",
        names={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}, eos_names=("<|im_end|>",),
    ),
    128000: dict(
        pattern=SPLIT.replace("DIGITS", "{1,3}"), special_names=_LLAMA3_NAMES, nfc=False, chat_format="llama-3",
        names={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>",
               "pad_token": "<|finetune_right_pad_id|>"}, eos_names=("<|eom_id|>", "<|eot_id|>"),
    ),
}  # fmt: skip


def _read_ranks(file):
    ranks = {}
    for n, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
            if len(token) > MAX_RANKED_BYTES:
                raise ValueError
        except ValueError as e:
            raise ValueError(f"{file}, line {n}: expected a base64 token and its rank") from e
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{file}: the ranks are not 0..{len(ranks) - 1}, the file is incomplete or damaged")
    return ranks


def tokenizer_json_from_ranks(ranks, *, pattern, special_names, nfc):
    """A tokenizer.json (as a dict) that encodes like tiktoken with these ranks.

    tiktoken has no list of merges: it joins any two neighbours whose concatenation has a rank, the lowest first.
    Listing every way to cut every token in two, in order of rank, gives a merge list which does the same.
    """

    def spell(token):
        return "".join(_CHARACTER_OF_BYTE[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.get):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [(ranks[a], ranks[b], a, b) for a, b in halves if a in ranks and b in ranks]
        merges += [[spell(a), spell(b)] for _, _, a, b in sorted(pairs)]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": len(ranks) + n, "content": name, **CONTROL_FLAGS} for n, name in enumerate(special_names)],
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]},
        "decoder": to_bytes,
        # ignore_merges: a word that is a token as a whole is that token, as in tiktoken
        "model": {"type": "BPE", "vocab": {spell(token): rank for token, rank in ranks.items()}, "merges": merges,
                  "ignore_merges": True},
    }  # fmt: skip


def _load_tiktoken(file, settings):
    ranks = _read_ranks(file)
    if len(ranks) not in TIKTOKEN_FAMILIES:
        raise ValueError(
            f"{file} holds {len(ranks)} tiktoken ranks; known are 151643 (first Qwen) and 128000 (Llama 3). The "
            "splitting rule is not in the file, so use this model's tokenizer.json instead"
        )
    family = TIKTOKEN_FAMILIES[len(ranks)]
    settings.names = {**family["names"], **settings.names}
    if settings.chat_template is None:
        settings.chat_template = CHAT_FORMATS[family["chat_format"]]["template"]
    if settings.add_bos is None:
        settings.add_bos = "bos_token" in family["names"]
    spec = tokenizer_json_from_ranks(
        ranks, pattern=family["pattern"], special_names=family["special_names"], nfc=family["nfc"]
    )
    return JsonTokenizer(spec, settings, kind="tiktoken", eos_names=family["eos_names"])


# -- chat formats for checkpoints that bring no template ----------------------------------------------------------

_LLAMA2 = (
    "{% set system = namespace(text='') %}"
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{% set system.text = '<<SYS>>\\n' + m.content + '\\n<</SYS>>\\n\\n' %}"
    "{% elif m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system.text + m.content) | trim + ' [/INST]' }}{% set system.text = '' %}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
_MISTRAL = (  # no system role: its text goes into the first user turn (v1) or the last (v3)
    "{% set system = namespace(text='', turn=-1) %}"
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{% set system.text = m.content + '\\n\\n' %}"
    "{% elif m.role == 'user' and (LAST or system.turn < 0) %}{% set system.turn = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system.text if loop.index0 == system.turn else '') + m.content + CLOSE }}"
    "{% elif m.role != 'system' %}{{ ' ' + m.contentTRIM + eos_token }}{% endif %}"
    "{% endfor %}"
)
_MISTRAL_V1 = _MISTRAL.replace("LAST", "false").replace("CLOSE", "' [/INST]'").replace("TRIM", "")
_MISTRAL_V3 = _MISTRAL.replace("LAST", "true").replace("CLOSE", "'[/INST]'").replace("TRIM", ".rstrip(' ')")
_MISTRAL_V7 = (  # a system prompt has a place and control tokens of its own
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT] ' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content.rstrip(' ') + eos_token }}{% endif %}{% endfor %}"
)
_CHATML = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
CHAT_FORMATS: dict[str, dict] = {  # needs: control tokens it writes; ends: the token after an answer, if not eos_token
    "llama-2": dict(template=_LLAMA2, needs=(), ends=None),
    "mistral-v1": dict(template=_MISTRAL_V1, needs=(), ends=None),
    "mistral-v3": dict(template=_MISTRAL_V3, needs=("[INST]", "[/INST]"), ends=None),
    "chatml": dict(template=_CHATML, needs=("<|im_start|>", "<|im_end|>"), ends="<|im_end|>"),
    "llama-3": dict(template=_LLAMA3, needs=("<|start_header_id|>", "<|eot_id|>"), ends="<|eot_id|>"),
}


# -- loading ----------------------------------------------------------------------------------------------------


class _Settings:
    """What the json files beside a tokenizer say about it.

    names: {"bos_token": "<s>", ...}; added: extra tokens by name, each as tokenizer.json has them; generation_eos: int, list or None;
    told: what tokenizer_config.json says of each; needs: names that are control tokens whatever the files say
    """

    def __init__(self, folder):
        config = _read_json(folder / "tokenizer_config.json")
        named = {**_read_json(folder / "special_tokens_map.json"), **config}
        self.names = {}
        for kind in ("bos_token", "eos_token", "pad_token", "unk_token"):
            name = named.get(kind)
            name = name.get("content") if isinstance(name, dict) else name
            if name:  # some early LLaMA conversions have empty strings here
                self.names[kind] = _expected(kind, name, str)
        self.add_bos = _expected("add_bos_token", config.get("add_bos_token"), bool, type(None))
        self.needs = ()
        self.added, self.told = {}, {}
        for id, token in config.get("added_tokens_decoder", {}).items():
            flags = {flag: _expected(flag, token.get(flag, default), bool) for flag, default in CONTROL_FLAGS.items()}
            self.added[_expected("content", token["content"], str)] = {"id": int(id), "content": token["content"], **flags}
            self.told[token["content"]] = {"id": int(id), **{flag: flags[flag] for flag in CONTROL_FLAGS if flag in token}}
        for name, id in _read_json(folder / "added_tokens.json").items():
            self.added[name] = {"content": name, **CONTROL_FLAGS, **self.added.get(name, {}), "id": _expected(name, id, int)}
        generation = folder / "generation_config.json"
        eos = _read_json(generation if generation.is_file() else folder / "config.json").get("eos_token_id")
        self.generation_eos = [_expected("eos_token_id", id, int) for id in eos] if isinstance(eos, list) else \
            _expected("eos_token_id", eos, int, type(None))  # fmt: skip
        template = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
        if (folder / "chat_template.jinja").is_file():
            template = _read_template(folder / "chat_template.jinja")
        if isinstance(template, list):  # [{"name": ..., "template": ...}, ...]
            template = {item["name"]: item["template"] for item in template}
        self.templates = template if isinstance(template, dict) else {"default": template} if template else {}
        for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):  # as transformers 5 saves named ones
            self.templates[file.stem] = _read_template(file)
        for template in self.templates.values():
            if len(_expected("chat_template", template, str)) > MAX_TEMPLATE:
                raise ValueError(f"a chat template of more than {MAX_TEMPLATE} characters")
        self.chat_template = self.templates.get("default")

    def is_control(self, token):
        """Other added tokens, such as Qwen's <think>, are part of the vocabulary as far as text goes."""
        return token.get("special") or token["content"] in self.names.values() or token["content"] in self.needs


def _read_template(file):
    if not file.is_file():
        raise ValueError(f"{file}: not a file")  # a pipe would never end
    with open(file, encoding="utf-8") as f:
        return f.read(MAX_TEMPLATE + 1)


def _expected(name, value, *kinds):
    if type(value) not in kinds:
        raise ValueError(f"{name} is {value!r:.80}")
    return value


def check_vocabulary(tokenizer, model, where):
    """A tokenizer with more ids than the model has rows would look up rows that do not exist."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{where}: the tokenizer knows {tokenizer.vocab_size} ids, the model has {model.config.vocab_size} rows. "
                         "They belong to different models; check the tokenizer files beside the checkpoint.")


def load_tokenizer(path, *, chat_format=None):
    """The tokenizer in `path`: a folder, a tokenizer file, a GGUF file, or a weight file it stands beside.

    The json files beside it are read too.

    chat_format: one of CHAT_FORMATS, or a named template of the folder; by default the folder's own template.
    Raises FileNotFoundError when there is no tokenizer, ValueError when a file is damaged or of unknown kind.
    """
    if (gguf := _gguf(Path(path))) is not None:
        from llama_rlhf.checkpoint.gguf_tokenizer import write_tokenizer_files

        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer_files(str(gguf), folder)
            return load_tokenizer(folder, chat_format=chat_format)
    file = _find(Path(path))
    if file.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size >> 20} MB: too large for a tokenizer")
    with reading(file.parent, "its tokenizer_config.json, or another json file there, is not what it should be"):
        settings = _Settings(file.parent)
    builtin = None
    if chat_format in settings.templates:
        settings.chat_template = settings.templates[chat_format]
    elif chat_format in CHAT_FORMATS:
        builtin = CHAT_FORMATS[chat_format]
        settings.chat_template, settings.needs = builtin["template"], builtin["needs"]
    elif chat_format is not None:
        known = ", ".join([*CHAT_FORMATS, *settings.templates])
        raise ValueError(f"unknown chat_format={chat_format!r}; known here: {known}")
    with reading(file, "damaged or not supported"):
        tokenizer = _load_file(file, settings)
    if builtin:
        lacking = [name for name in builtin["needs"] if name not in tokenizer.special_ids]
        if lacking:
            raise ValueError(f"chat_format={chat_format!r} needs {', '.join(lacking)}, not in the tokenizer {file}")
        if builtin["ends"]:
            end = tokenizer.special_ids[builtin["ends"]]
            tokenizer.eos_ids = tuple(dict.fromkeys([end, *tokenizer.eos_ids]))
    return tokenizer


def _gguf(path):
    """The GGUF file whose own tokenizer is meant: the path itself, or the only one of a folder without tokenizer files."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if not path.is_dir() or any((path / name).is_file() for name in FOLDER_FILES):
        return None
    files = list(path.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def _find(path):
    if path.is_file():
        if path.suffix not in (".safetensors", ".bin", ".pth", ".pt") and not path.name.endswith(".index.json"):
            return path
        path = path.parent
    if not path.exists():
        raise FileNotFoundError(f"tokenizer path {str(path)!r} does not exist")
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return path / name
    message = f"no tokenizer in {str(path)!r}: looked for {', '.join(FOLDER_FILES)}."
    above = [name for name in FOLDER_FILES if (path.resolve().parent / name).is_file()]
    if above:  # LLaMA downloads keep it beside the model folders
        raise FileNotFoundError(f"{message} There is {path.resolve().parent / above[0]}: give that path")
    if (path / "vocab.json").is_file():
        message += " vocab.json with merges.txt alone does not say how text is split into words."
    raise FileNotFoundError(f"{message} Copy the file from the model's release, or give its path")


def _load_file(file, settings):
    with open(file, "rb") as f:
        head = f.read(1024)
    refuse_stand_in(file, head)
    if re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n", head):
        return _load_tiktoken(file, settings)
    if not head.lstrip().startswith(b"{"):
        return SentencePieceTokenizer(file, settings)
    spec = _read_json(file)
    if spec.get("kind") == "bytes":
        return BytesTokenizer(spec, settings)
    if not isinstance(spec.get("model"), dict) or "vocab" not in spec["model"]:
        raise ValueError(f"{file}: expected a tokenizer.json (with model.vocab) or {{\"kind\": \"bytes\"}}")
    return JsonTokenizer(spec, settings)


def _read_json(file):
    """The object in a json file; {} if there is no such file."""
    return read_json(file, MAX_FILE_BYTES) if file.is_file() else {}
