"""Files from strangers: any fault in one becomes one sentence, and json has bounds. Plain Python: nothing here needs torch."""

import json
import os
import re
from contextlib import contextmanager

MAX_JSON_BYTES = 16 << 20       # the largest real index, of 91,000 tensors, has 9 MB
MAX_CONTAINERS = 1_500_000      # "{" and "[": a tokenizer of 262,000 tokens has 515,000 pairs to merge
MAX_ITEMS = 8_000_000           # ","


@contextmanager
def reading(path, what="cannot be read", error_class=ValueError):
    """Turn whatever a parser raises on bad input into an error_class of one sentence that names the file."""
    try:
        yield
    except BaseException as error:      # parsers raise nearly anything on crafted input, those in Rust even outside of Exception
        explained = isinstance(error, error_class) and (error_class is not ValueError or str(path) in str(error))
        if explained or isinstance(error, (FileNotFoundError, KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise error_class(f"{path}: {what} ({type(error).__name__}: {reason})") from error


def refuse_stand_in(path, head, error_class=ValueError):
    """error_class if a file that begins so (a few hundred bytes) is what a download left in its place."""
    if head.startswith(b"version https://git-lfs"):
        raise error_class(f"{path}: a Git LFS pointer, not the data; run 'git lfs pull' in its folder")
    if re.match(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|head|!--|\?xml)", head, re.IGNORECASE) or head.startswith(_ANSWERS):
        raise error_class(f"{path}: what a server answered in place of the data ({head[:40].decode('utf-8', 'replace').strip()!r}...). Download it again: is the address "
                          "that of the file itself, and has your account been given access?")


_ANSWERS = b"Entry not found", b"Repository not found", b"Access to model", b"Invalid username or password", b"Unauthorized", b"404: Not Found"


def read_json(path, max_bytes=MAX_JSON_BYTES, error_class=ValueError) -> dict:
    """The json object in a file. error_class for anything else: too large, too deep, too many parts, damaged."""
    with reading(path, "not valid json", error_class):
        if not os.path.isfile(path):
            raise error_class(f"{path}: not a file")        # a pipe or a device would never end
        size = os.path.getsize(path)
        if size > max_bytes:
            raise error_class(f"{path}: {size} bytes of json, more than {max_bytes}; this is not the file it should be")
        with open(path, "rb") as stream:
            data = stream.read(max_bytes + 1)
        refuse_stand_in(path, data[:400], error_class)
        # 16 MB of "[]," would be a gigabyte of lists
        if data.count(b"{") + data.count(b"[") > MAX_CONTAINERS or data.count(b",") > MAX_ITEMS:
            raise error_class(f"{path}: json of more than {MAX_CONTAINERS} lists and objects, or {MAX_ITEMS} items; this is not the file it should be")
        value = json.loads(data.decode("utf-8"))
    if not isinstance(value, dict):
        raise error_class(f"{path}: holds a json {type(value).__name__}, expected an object {{...}}")
    return value
