"""The tasks that can be trained on and evaluated: name -> module. No torch here.

A task module offers `load(file)` -> list of problems and `score(problem, text, finished)` -> dict.
"""

import difflib

from llama_rlhf.tasks import gsm8k

TASKS = {
    "GSM8K": gsm8k,
}


def get_task(name):
    """The task module called `name`, exactly as spelled in TASKS."""
    if name in TASKS:
        return TASKS[name]
    by_lower = {known.lower(): known for known in TASKS}
    nearest = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0)[0]
    raise ValueError(f"unknown task {name!r}. Known tasks: {', '.join(TASKS)}. Did you mean {by_lower[nearest]!r}?")
