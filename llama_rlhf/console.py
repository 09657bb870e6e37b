"""The command `llama-rlhf`, for where the package is installed and its folder is not at hand: the five scripts, and the chat, by name.

    llama-rlhf solver_train --help
    llama-rlhf --nproc_per_node 8 solver_train --ckpt_dir ...       torchrun's flags before the script's name, the script's after it
"""

import runpy
import sys

# name -> module
SCRIPTS = {**{name: name for name in ("checkpoint_split", "solver_train", "solver_evaluate", "verifier_train", "ppo_train")}, "chat": "llama_rlhf.chat"}


def main() -> None:
    words = sys.argv[1:]
    at = next((n for n, word in enumerate(words) if word.removesuffix(".py").replace("-", "_") in SCRIPTS), None)
    if at is None:
        asked = not words or words[0] in ("-h", "--help")
        print(f"usage: llama-rlhf [torchrun's flags] SCRIPT [its flags]\nSCRIPT is one of {', '.join(SCRIPTS)}; each answers --help.",
              file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    script, flags = words[at].removesuffix(".py").replace("-", "_"), words[at + 1:]
    if at:
        from torch.distributed.run import main as torchrun
        torchrun([*words[:at], "-m", SCRIPTS[script], *flags])
    else:
        sys.argv = [script, *flags]
        runpy.run_module(SCRIPTS[script], run_name="__main__", alter_sys=True)
