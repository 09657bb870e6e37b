import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(scope="session")
def world_of_one():
    """Process groups of a single process, for tests that call the library in this process."""
    import torch

    from llama_rlhf.parallel import groups
    torch.set_num_threads(2)
    groups.initialize(device="cpu")
    yield
    groups.shutdown()
