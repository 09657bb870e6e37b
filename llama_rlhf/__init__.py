"""Train, align and evaluate LLaMA-family language models with tensor parallelism, in readable PyTorch.

    from llama_rlhf import load, generate, stream       # see api.py

Importing the package is cheap: it loads no torch before such a name is used. Everything else: from its modules, for example
`from llama_rlhf.tokenizer import load_tokenizer`.
"""

import importlib

__version__ = "0.1.0"

# Names offered at package level, and the module each one lives in; the module is imported on first use.
_LAZY: dict[str, str] = {name: "llama_rlhf.api" for name in ("load", "generate", "stream", "LanguageModel", "Response")}


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_LAZY})
