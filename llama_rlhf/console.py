"""The command `llama-rlhf`, for where the package is installed and its folder is not at hand: the five scripts, and the chat, by name.

    llama-rlhf solver_train --help
    llama-rlhf --nproc_per_node 8 solver_train --ckpt_dir ...       torchrun's flags before the script's name, the script's after it
"""

import difflib
import os
import runpy
import sys

# name -> module
SCRIPTS = {**{name: name for name in ("checkpoint_split", "solver_train", "solver_evaluate", "verifier_train", "ppo_train")}, "chat": "llama_rlhf.chat"}


def main() -> None:
    words = sys.argv[1:]
    at = next((n for n, word in enumerate(words) if word.removesuffix(".py").replace("-", "_") in SCRIPTS), None)
    if at is None:
        asked = not words or words[0] in ("-h", "--help")
        near = [match for word in words for match in difflib.get_close_matches(word.removesuffix(".py").replace("-", "_"), SCRIPTS, n=1, cutoff=0.7)]
        print((f"error: no script is named here; did you mean {near[0]}?\n" if near else "")
              + f"usage: llama-rlhf [torchrun's flags] SCRIPT [its flags]\nSCRIPT is one of {', '.join(SCRIPTS)}; each answers --help.",
              file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    script, flags = words[at].removesuffix(".py").replace("-", "_"), words[at + 1:]
    os.environ["LLAMA_RLHF_COMMAND"] = f"llama-rlhf {script}"       # for cli.py, in the processes that torchrun starts too
    if at:
        sys.exit(_torchrun([*words[:at], "-m", SCRIPTS[script], *flags]))
    sys.argv = [script, *flags]
    runpy.run_module(SCRIPTS[script], run_name="__main__", alter_sys=True)


def _torchrun(words: list[str]) -> int:
    """The exit code; of ranks that failed, that of the first, which has said why: torchrun's own traceback would bury it."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun
    try:
        torchrun(words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"rank {rank} ended first, with exit code {failure.exitcode}: its message stands above", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as error:        # Ctrl-C, or SIGTERM: the ranks have had it too
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    main()
