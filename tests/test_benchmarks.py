"""The benchmarks: the same work on both sides, and nothing lost by running them."""

import os
import sys
from dataclasses import replace

import pytest

sys.path.append(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "benchmarks"))


@pytest.mark.parametrize("name", ["split", "large_model"])
def test_a_benchmark_leaves_the_folder_it_is_given_as_it_was(name, tmp_path, monkeypatch, world_of_one):
    """--folder was where a disk is; split.py removed a folder `source` there, even after it had refused to write to it, large_model.py all there was."""
    import large_model
    import split

    from llama_rlhf import models
    from llama_rlhf.parallel import groups
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "weights").write_text("mine")
    monkeypatch.setattr(split, "make_checkpoint", lambda folder, *_: os.makedirs(folder) or (10, 5))
    monkeypatch.setattr(split, "split", lambda *_: (1.0, 5, ""))
    small = replace(models.preset("tinyllama-1.1b"), dim=8, n_heads=2, n_kv_heads=1, head_dim=4, ffn_dim=8, vocab_size=16)
    monkeypatch.setattr(models, "preset", lambda _: small)
    monkeypatch.setattr(groups, "initialize", lambda **_: None)
    monkeypatch.setattr(large_model.subprocess, "run", lambda *_, **__: None)       # the ranks
    {"split": split, "large_model": large_model}[name].main(folder=str(tmp_path), n=1)
    assert os.listdir(tmp_path) == ["source"] and (tmp_path / "source" / "weights").read_text() == "mine"
