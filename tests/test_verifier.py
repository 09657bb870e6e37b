"""Reward models: what judged data means, the losses against sums by hand and at any number of ranks, scores, and the two commands."""

import json
import math
import os
import random
import shutil
from collections import Counter

import pytest
import torch
from ranks import run_ranks, run_script
from test_scripts import first_line, lines_of, split, toy  # noqa: F401  fixtures
from toys import make_hf

from llama_rlhf.data import (
    Judged, JudgedReport, corrupt_numbers, encode_prompt, judged_problems, show_judged, split_problems, verifier_examples,
)
from llama_rlhf.evaluation import read_samples
from llama_rlhf.records import Records, read_records
from llama_rlhf.scoring import calibration, compare_paired, pair_accuracy, score_by_length, selection, wilson_interval
from llama_rlhf.tasks import gsm8k
from llama_rlhf.tokenizer import load_tokenizer

BOS, EOS = 256, 257


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "tokenizer.bytes.json").write_text('{"kind": "bytes"}')
    return load_tokenizer(tmp_path)


def judged(*records):
    return judged_problems(Records(records, "train.json"))


# ---- what the data say


def test_chosen_and_rejected_are_pairs_strings_or_lists_the_same_prompt_together():
    kind, problems = judged({"instruction": "a", "chosen": "x", "rejected": "y"}, {"prompt": "b", "chosen": ["p", "q"], "rejected": ["r", "s", "p"]},
                            {"instruction": "a", "chosen": "z", "rejected": ["x", "y"], "margin": 2})
    assert kind == "pairs" and [problem.prompt for problem in problems] == ["a", "b"]
    first, second = problems
    assert [text for text, _ in first.responses] == ["x", "y", "z"], "each response once"
    assert first.all_pairs() == [(0, 1, None), (2, 0, 2), (2, 1, 2)]
    assert [text for text, _ in second.responses] == ["p", "q", "r", "s"]
    # "p" against itself says nothing; q is better than r, s and p
    assert sorted(second.all_pairs()) == [(0, 2, None), (0, 3, None), (1, 0, None), (1, 2, None), (1, 3, None)]


def test_rankings_and_scores_give_all_pairs_and_equal_scores_none():
    kind, (ranked, scored) = judged({"instruction": "a", "responses": ["x", "y", "z"]},
                                    {"instruction": "b", "outputs": ["x", "y", "z"], "scores": [1, 2.5, 1]})
    assert kind == "ranking"
    assert ranked.all_pairs() == [(0, 1, None), (0, 2, None), (1, 2, None)]
    assert scored.all_pairs() == [(1, 0, None), (1, 2, None)]


def test_labels_are_judged_one_by_one_and_duplicates_dropped():
    rows = [{"instruction": "a", "output": "x", "label": True}, {"instruction": "a", "output": "y", "label": 0},
            {"instruction": "b", "output": "x", "label": 1}, {"instruction": "a", "output": "x", "label": 1}]
    kind, (a, b) = judged(*rows)
    assert kind == "labels" and a.labels == [1, 0] and a.duplicates == 1 and b.labels == [1]
    assert a.all_pairs() == [(0, 1, None)] and b.all_pairs() == []
    assert judged(rows[0], rows[0] | {"label": 0})[1][0].labels == [1, 0], "judges who disagree are both heard"


def test_samples_of_an_evaluation_are_labelled_by_correct_not_by_the_reference_answer():
    sample = {"id": 1, "sample": 0, "prompt": "2+3?", "response": "5", "answer": "5", "label": "5", "correct": True, "finished": True}
    kind, (problem,) = judged(sample, sample | {"sample": 1, "response": "6", "correct": False}, sample | {"sample": 2, "finished": False},
                              sample | {"sample": 3, "response": "", "correct": False, "finished": False})
    assert kind == "labels" and problem.labels == [1, 0, 1]
    assert problem.responses == [("5", True), ("6", True), ("5", False)], "without a token there is nothing to judge"


def test_solutions_alone_get_wrong_twins():
    records = [{"instruction": "2+3?", "output": "2+3=5\n#### 5"}, {"question": "x?", "answer": "no number"}]
    kind, (first, second) = judged(*records)
    assert kind == "solutions" and first.labels == [1, 0] and second.labels == [1]
    assert first.responses[1][0] != first.responses[0][0] and second.all_pairs() == []
    assert judged_problems(records, seed=0)[1] == [*judged_problems(records, seed=0)[1]]
    wrong = {judged_problems(records, seed=seed)[1][0].responses[1] for seed in range(9)}
    assert len(wrong) > 1, "the seed must change them"
    alike = judged(*({"instruction": f"{n}?", "output": "#### 50"} for n in range(9)))[1]
    assert len({problem.responses[1] for problem in alike}) > 1, "each problem has a draw of its own"


@pytest.mark.parametrize("record, message", [
    ({"instruction": "a", "chosen": "x"}, r'record 2: missing "rejected" \(keys: instruction, chosen\)'),
    ({"instruction": "a", "chosen": [], "rejected": "x"}, 'record 2: "chosen" must be a string or a list of strings'),
    ({"instruction": "a", "chosen": "x", "rejected": 3}, 'record 2: "rejected" must be a string, found a number'),
    ({"instruction": "a", "chosen": "x", "rejected": "y", "margin": "big"}, 'record 2: "margin" must hold finite numbers, found "big"'),
    ({"chosen": "x", "rejected": "y"}, r"record 2: no prompt \(keys: chosen, rejected\)"),
    ({"instruction": "a", "output": "x"}, r'record 2: expected {"instruction", "chosen", "rejected"} as in record 1 \(keys: instruction, output\)'),
    ({"instruction": "a"}, r'record 2: no judged response \(keys: instruction\). Expected {"instruction", "chosen", "rejected"}; .*"label"'),
])
def test_wrong_records_name_file_number_and_field(record, message):
    with pytest.raises(ValueError, match="train.json, " + message):
        judged({"instruction": "a", "chosen": "x", "rejected": "y"}, record)


@pytest.mark.parametrize("record, message", [
    ({"instruction": "a", "output": "x", "label": "18"}, 'record 1: "label" must be 0, 1, true or false, found "18". If it is the right answer'),
    ({"instruction": "a", "output": "x", "label": 2}, '"label" must be 0, 1, true or false, found 2'),
    ({"instruction": "a", "label": 1}, r'record 1: missing "output" \(keys: instruction, label\). Expected {"instruction", "output", "label"'),
    ({"instruction": "a", "output": "x", "label": 1, "finished": 1}, '"finished" must be true or false, found a number'),
    ({"instruction": "a", "responses": ["x"]}, "needs at least 2 entries"),
    ({"instruction": "a", "responses": ["x", "y"], "scores": [1]}, '"responses" needs at least 2 entries.*2 responses, 1 scores'),
    ({"instruction": "a", "responses": ["x", "y"], "scores": [1, float("nan")]}, '"scores" must hold finite numbers, found NaN'),
    ({"instruction": "a", "responses": ["x", "y"], "scores": 1}, "2 responses, a number"),
])
def test_wrong_judgements_are_refused(record, message):
    with pytest.raises(ValueError, match="train.json, .*" + message):
        judged(record)


def test_corrupted_solutions_have_another_answer_under_every_rule():
    """All shipped training solutions, and numbers with commas, decimals and signs."""
    texts = [record["output"] for record in read_records("dataset/GSM8K/train.json")]
    texts += ["So 1,449,999+1 = 1,450,000.\n#### 1,450,000", "It is 12.50.\n#### 12.50", "#### 0", "#### -7", "The answer is 72, altogether."]
    generator = random.Random(0)
    for text in texts:
        wrong = corrupt_numbers(text, generator)
        assert gsm8k.extract_tolerant(wrong) not in (None, gsm8k.extract_tolerant(text)), (text, wrong)
        # only numbers differ
        assert [part for part in map(str.strip, _without_numbers(text))] == [part for part in map(str.strip, _without_numbers(wrong))]
    assert corrupt_numbers("none", generator) is None
    assert corrupt_numbers(f"1 and {'9' * 4300}\n#### 1", generator) is None and corrupt_numbers("1" * 5000, generator) is None       # Python converts 4300 digits


def test_corrupted_answers_lie_on_both_sides_and_one_number_on_the_way_changes_on_average():
    """Else a verifier learns that a larger answer, or a solution with more slips, is the wrong one. Of "5 of 12" the answer is 5."""
    generator, above, others = random.Random(2), 0, 0
    for _ in range(400):
        *way, answer = corrupt_numbers("2+30+400+5000=5432\n#### 5432", generator).replace("=", "+").replace("\n#### ", "+").split("+")
        above += int(answer) > 5432
        others += sum(a != b for a, b in zip(way, ("2", "30", "400", "5000")))
        assert "#### 5 of" not in corrupt_numbers("1\n#### 5 of 12", generator) and "#### 9" not in corrupt_numbers("1\n#### 3, or:\n#### 9", generator)
    assert 160 < above < 240 and 320 < others < 480


def _without_numbers(text):
    import re
    return re.split(r"[0-9][0-9,.]*", text)


def test_a_corrupted_result_is_the_same_number_at_every_place():
    """"= 25 ... #### 26" would be found by comparing two spellings, without any arithmetic."""
    generator = random.Random(1)
    for _ in range(200):
        wrong = corrupt_numbers("48/2 = <<48/2=24>>24.\n#### 24", generator)
        results = wrong.replace("<<", " ").replace(">>", " ").replace("=", " ").replace(".", " ").split()
        assert results[-1] == results[2] == results[3] != "24"


def test_examples_end_with_eos_only_when_finished_and_the_prompt_is_that_of_generation(tokenizer):
    _, problems = judged({"prompt": "2?", "response": "ab", "correct": True}, {"prompt": "2?", "response": "ab", "correct": False, "finished": False})
    finished, cut = verifier_examples(problems, tokenizer, loss="mse", max_seq_len=99)
    prompt = encode_prompt(tokenizer, "2?")
    assert finished == Judged([[*prompt, *b"ab", EOS]], len(prompt), "1", label=1)
    assert cut.responses == [[*prompt, *b"ab"]] and cut.label == 0


def test_problems_weigh_the_same_and_the_mean_weight_is_one(tokenizer):
    _, problems = judged(*({"instruction": p, "output": o, "label": 1} for p, o in ("ax", "ay", "az", "bx")))
    weights = [example.weight for example in verifier_examples(problems, tokenizer, loss="mse", max_seq_len=99)]
    assert weights == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2.0]) and sum(weights) == pytest.approx(4)
    assert {example.weight for example in verifier_examples(problems, tokenizer, loss="mse", max_seq_len=99, equal_problems=False)} == {1.0}


def test_long_and_unpaired_problems_are_left_out_and_counted(tokenizer):
    _, problems = judged({"instruction": "a", "responses": ["xxxxxxxx", "y"]}, {"instruction": "long" * 9, "responses": ["x", "y"]},
                         {"instruction": "b", "responses": ["x", "y"], "scores": [1, 1]})
    report = JudgedReport()
    example, = verifier_examples(problems, tokenizer, loss="pairwise", max_seq_len=8, report=report)
    assert [len(response) for response in example.responses] == [8, 5] and example.pairs == [(0, 1, None)]
    assert (report.problems, report.pairs, report.truncated, report.unpaired, report.long_prompts) == (1, 1, 1, 1, ["2"])
    assert "1 because the prompt alone fills max_seq_len (records 2)" in str(report)
    assert show_judged(example, tokenizer).startswith("better: record 1 (8 tokens, 5 trained on):\n<bos>a\n⟦xxxxx⟧\nworse:")


def test_pairs_that_are_the_same_tokens_once_cut_are_left_out_and_counted(tokenizer):
    """Their scores are equal but for rounding: such a pair counted as half right, or as right or wrong by how rows were packed, and where a step had no other,
    Adam made whole steps of its rounding."""
    _, problems = judged({"instruction": "a", "responses": ["xxxxxy", "xxxxxz", "w"]}, {"instruction": "b", "responses": ["xxxxxy", "xxxxxz"]})
    report = JudgedReport()
    example, = verifier_examples(problems, tokenizer, loss="pairwise", max_seq_len=8, report=report)
    assert example.pairs == [(0, 2, None), (1, 2, None)] and (report.pairs, report.alike, report.unpaired) == (2, 2, 1)
    assert "1 problems without a pair left out, 2 pairs whose responses are the same tokens up to max_seq_len" in str(report)
    # a tokenizer may drop what two texts differ in: nothing was cut
    tokenizer._encode_parts = lambda parts: [ord(c) for text in parts for c in " ".join(text.split())]
    _, problems = judged({"instruction": "a", "chosen": "x  y", "rejected": "x y"})
    report = JudgedReport()
    assert not verifier_examples(problems, tokenizer, loss="pairwise", max_seq_len=80, report=report) and "once cut" not in str(report) and (report.alike, report.truncated) == (1, 0)


def test_held_out_problems_are_a_seeded_share_and_never_all():
    problems = list(range(100))
    rest, held = split_problems(problems, 0.1, seed=3)
    assert len(held) == 10 and sorted(rest + held) == problems and (rest, held) == split_problems(problems, 0.1, seed=3)
    assert split_problems(problems, 0.1, seed=4)[1] != held and split_problems(problems, 0.0) == (problems, [])
    assert len(split_problems(problems[:19], 0.1)[1]) == 2
    assert [len(part) for part in split_problems([1, 2], 0.01)] == [1, 1] and split_problems([1], 0.5) == ([1], [])


# ---- the loss


PAIRED = [Judged([[1, 5, 6, 7], [1, 5, 8], [1, 5, 9, 10, 11, 12]], 2, "1", [(0, 1, None), (0, 2, 0.5), (1, 2, None)]),
          Judged([[2, 3, 4], [2, 20, 21, 22, 23]], 1, "2", [(1, 0, None)])]
LABELLED = [Judged([[1, 5, 6, 7, 8]], 2, "1", label=1, weight=0.5), Judged([[1, 5, 9]], 2, "1", label=0, weight=0.5),
            Judged([[2, 3, 4, 12, 13, 14]], 1, "2", label=1, weight=2.0)]


def test_a_problems_pairs_share_one_weight(world_of_one, tmp_path):
    """Three pairs of one problem count as much as the single pair of the other: against scores of rows computed alone."""
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.models.transformer import ValueModel
    from llama_rlhf.reward import count, objective
    from llama_rlhf.trainer import final_scores
    make_hf(tmp_path, "llama")
    model = load_model(str(tmp_path), ValueModel)
    loss, right = objective(model, PAIRED, loss="pairwise", margin=0.1, centre=0.01)
    with torch.no_grad():
        scores = [[final_scores(model, [response]).item() for response in example.responses] for example in PAIRED]
    term = lambda c, r, m: math.log1p(math.exp(-(c - r - m))) + 0.01 * (c + r) ** 2  # noqa: E731
    a, b = scores
    expected = (term(a[0], a[1], 0.1) + term(a[0], a[2], 0.5) + term(a[1], a[2], 0.1)) / 3 + term(b[1], b[0], 0.1)
    assert loss.item() == pytest.approx(expected, abs=1e-5) and count(PAIRED, "pairwise") == 2
    assert right.item() == (a[0] > a[1]) + (a[0] > a[2]) + (a[1] > a[2]) + (b[1] > b[0])


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_every_response_token_predicts_the_label(loss, world_of_one, tmp_path):
    """Against transformers' hidden states: the head after each response token, and log p of the tokens of right solutions."""
    import transformers

    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.reward import JointModel, count, objective
    make_hf(tmp_path, "llama")
    model = load_model(str(tmp_path), JointModel)
    value, right = objective(model, LABELLED, loss=loss, lm_loss_weight=0.3)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected, n_right = 0.0, 0
    with torch.no_grad():
        for example in LABELLED:
            ids, n = torch.tensor(example.responses[0]), example.prompt_len
            hidden = reference.model(ids[None]).last_hidden_state[0]
            u = hidden[n:].float() @ model.value_head.weight[0] + model.value_head.bias
            terms = (u - example.label) ** 2 if loss == "mse" else torch.log1p(torch.exp(-u if example.label else u))
            if example.label:
                logprobs = reference.lm_head(hidden).log_softmax(-1)
                terms = terms - 0.3 * logprobs[n - 1:-1].gather(1, ids[n:, None])[:, 0]
            expected += example.weight * terms.sum().item()
            n_right += (u[-1].item() > (0.5 if loss == "mse" else 0)) == example.label
    assert value.item() == pytest.approx(expected, abs=1e-4) and right.item() == n_right
    assert count(LABELLED, loss) == 3 + 1 + 5
    only_wrong, _ = objective(model, LABELLED[1:2], loss=loss, lm_loss_weight=0.3)      # no token to predict
    assert only_wrong.isfinite()


KINDS = [("pairwise", -1), ("pairwise", 3), ("mse", -1), ("bce+lm", -1), ("bce+lm", 3)]


def train_all(folder, tp, order, micro_batch):
    """What `train` returns for all of KINDS, on the examples in this order."""
    from llama_rlhf.parallel import groups
    groups.initialize(tp, device="cpu")
    results = []
    for kind, lora_rank in KINDS:
        places = list(range(len(PAIRED if kind == "pairwise" else LABELLED)))[::order]
        results.append(train(folder, kind, [places[i:i + micro_batch] for i in range(0, len(places), micro_batch)], lora_rank))
    groups.shutdown()
    return results


def train(folder, kind, splits, lora_rank):
    """3 steps of AdamW: {native: (owned part, cut dimension)} of first gradients and last weights, losses, norms, score."""
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.models.transformer import ValueModel
    from llama_rlhf.parallel import groups
    from llama_rlhf.parallel.layers import Lora, piece_of, walk
    from llama_rlhf.reward import JointModel, count, measure_score, objective
    from llama_rlhf.trainer import Trainer
    examples, loss = (PAIRED, "pairwise") if kind == "pairwise" else (LABELLED, kind.split("+")[0])
    options = dict(loss=loss, lm_loss_weight=0.5 if "+" in kind else 0.0, margin=0.1, centre=0.02)
    model = load_model(folder, JointModel if "+" in kind else ValueModel, lora=Lora(lora_rank, 8.0) if lora_rank > 0 else None, seed=3)
    trainer = Trainer(model, lr=1e-2, eps=1e-3, total_steps=3, weight_decay=0.1, max_grad_norm=0.5)
    first = {}
    parts = lambda value_of: {native: (piece_of(value_of(p), piece, owned=True).tolist(), piece.dim) for *_, p, pieces in walk(model)  # noqa: E731
                              if p.requires_grad for native, piece in pieces}
    update = trainer._update
    trainer._update = lambda lr, clip: (first or first.update(parts(trainer.gradient_of)), update(lr, clip))
    mine = [batch[groups.dp_rank()::groups.dp_size()] for batch in splits]
    results = [trainer.step(mine, lambda batch: objective(model, [examples[i] for i in batch], **options)[0],
                            lambda batch: count([examples[i] for i in batch], loss)) for _ in range(3)]
    weights = parts(lambda p: p.detach())
    return first, weights, [r.loss for r in results], [r.grad_norm for r in results], measure_score(model, examples, loss)


def test_loss_gradients_and_three_steps_are_the_same_at_any_layout(tmp_path):
    """2 tensor-parallel ranks, 2 replicas with unequal shares, other micro-batches in another order: 1e-5 in fp32."""
    from test_training import merged
    make_hf(tmp_path, "llama")
    single = run_ranks(1, train_all, str(tmp_path), 1, 1, 9)
    for n_ranks, tp, order, micro_batch in ((2, 2, 1, 9), (2, 1, 1, 9), (1, 1, -1, 1)):
        ranks = run_ranks(n_ranks, train_all, str(tmp_path), tp, order, micro_batch)
        for which_kind, kind in enumerate(KINDS):
            one, many = single[0][which_kind], [rank[which_kind] for rank in ranks]
            for which in (0, 1):
                a, b = merged([one], which), merged(many[:tp], which)
                assert {"value_head.weight", "value_head.bias"} <= a.keys() and a.keys() == b.keys()
                for native in a:
                    assert (a[native] - b[native]).abs().max() < 1e-5, (kind, native, n_ranks, tp)
            assert torch.allclose(torch.tensor(one[2]), torch.tensor(many[0][2]), atol=1e-5), kind
            assert torch.allclose(torch.tensor(one[3]), torch.tensor(many[0][3]), rtol=1e-4), kind
            assert all(output[4] == many[0][4] for output in many), "the ranks store different scales"
            assert abs(one[4]["offset"] - many[0][4]["offset"]) < 1e-4 and abs(one[4]["scale"] - many[0][4]["scale"]) < 1e-4


# ---- scores


def reward_model(folder, score):
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.models.transformer import ValueModel
    if not (folder / "config.json").exists():
        make_hf(folder, "llama")
    model = load_model(str(folder), ValueModel)
    model.score = score
    with torch.no_grad():
        model.value_head.bias.fill_(0.3)
    return model


def test_scores_do_not_depend_on_packs_or_order(world_of_one, tmp_path):
    from llama_rlhf.reward import score_responses
    model = reward_model(tmp_path, None)
    rows = [response for example in PAIRED for response in example.responses]
    alone = torch.cat([score_responses(model, [row], [1]) for row in rows])
    for max_tokens in (1, 7, 9999):
        assert (score_responses(model, rows, [1] * len(rows), max_tokens=max_tokens) - alone).abs().max() < 1e-5
    assert alone.dtype == torch.float32 and not alone.requires_grad and model.training
    with pytest.raises(ValueError, match="response 2 has no tokens"):
        score_responses(model, [[1, 2], [1, 2]], [1, 2])


def test_folding_makes_the_critic_predict_the_normalised_score(world_of_one, tmp_path):
    """Exact for linear scores; for probabilities to first order: the error is that of 1/2 + u/4 for sigmoid(u)."""
    from llama_rlhf.reward import fold_head, normalise, score_responses
    rows = [response for example in PAIRED for response in example.responses]
    for form in ("linear", "sigmoid"):
        score = {"loss": "pairwise", "form": form, "offset": 0.7, "scale": 2.5}
        model = reward_model(tmp_path, score)
        raw = score_responses(model, rows, [1] * len(rows))
        fold_head(model)
        folded = score_responses(model, rows, [1] * len(rows))
        wanted = normalise(score, raw) if form == "linear" else (0.5 + raw / 4 - 0.7) / 2.5
        assert (folded - wanted).abs().max() < 1e-5 and model.score is None
    assert torch.allclose(normalise(score, torch.tensor([0.0, 2.0])), torch.tensor([(0.5 - 0.7) / 2.5, (1 / (1 + math.exp(-2)) - 0.7) / 2.5]))
    assert torch.equal(normalise(None, raw), raw)
    fold_head(model)        # nothing left to fold
    assert torch.equal(score_responses(model, rows, [1] * len(rows)), folded)


def test_a_score_that_is_not_a_number_is_an_error(world_of_one, tmp_path):
    from llama_rlhf.reward import score_together
    model = reward_model(tmp_path, None)
    with torch.no_grad():
        model.value_head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="the score of response 1 is nan.*2 of 2 scores"):
        score_together(model, [[1, 2], [1, 3]], [1, 1])


# ---- what scores are worth


def test_pair_accuracy_counts_ties_half_and_is_the_area_under_the_curve():
    right, wrong = [0.9, 0.5, 0.2], [0.5, 0.1]
    # 0.9 beats both; 0.5 ties and beats; 0.2 loses and beats: (2 + 1.5 + 1) / 6
    assert pair_accuracy([(a, b) for a in right for b in wrong]) == pytest.approx(4.5 / 6)
    assert pair_accuracy([]) is None


def test_calibration_by_hand():
    error, table = calibration([0.05, 0.0, 0.15, 0.95, 1.0, 0.1], [0, 1, 0, 1, 1, 0])
    assert [(row["low"], row["n"]) for row in table] == [(0.0, 3), (0.1, 1), (0.9, 2)]
    assert error == pytest.approx(3 / 6 * abs(0.05 - 1 / 3) + 1 / 6 * 0.15 + 2 / 6 * (1 - 0.975))
    with pytest.raises(ValueError, match="1.5 is no probability"):
        calibration([1.5], [1])


def test_score_by_length_by_hand():
    result = score_by_length([1.0, 2.0, 3.0, 6.0], [10, 20, 30, 40])
    # deviations: lengths -15 -5 5 15, scores -2 -1 0 3: 80 / sqrt(500 * 14)
    assert result["correlation"] == pytest.approx(80 / math.sqrt(500 * 14))
    assert [(q["longest"], q["n"], q["score"]) for q in result["quarters"]] == [(10, 1, 1.0), (20, 1, 2.0), (30, 1, 3.0), (40, 1, 6.0)]
    assert score_by_length([1.0, 2.0], [5, 5]) == {"correlation": None, "quarters": [{"longest": 5, "n": 2, "score": 1.5}]}
    assert score_by_length([1.0], [5])["correlation"] is None
    assert [q["n"] for q in score_by_length([1.0] * 5, [10, 12, 20, 30, 40])["quarters"]] == [2, 1, 1, 1], "a quarter ends with its bound"


def test_metrics_weigh_pairs_and_problems(world_of_one):
    from llama_rlhf.reward import pairs_by_label, show_verifier, verifier_metrics
    problems, labels, raw = ["a"] * 4 + ["b"] * 2 + ["c"], [1, 1, 1, 0, 1, 0, 1], [0.9, 0.8, 0.7, 0.1, 0.2, 0.4, 1.3]
    pairs = pairs_by_label(problems, labels)
    assert pairs == [(0, 3), (1, 3), (2, 3), (4, 5)]
    metrics = verifier_metrics(raw, [3, 3, 4, 5, 6, 7, 8], problems, {"loss": "mse", "form": "linear", "offset": 0, "scale": 1}, pairs, labels)
    assert metrics["pair_accuracy"] == 3 / 4 and metrics["auc_within_problem"] == 1 / 2, "problem c has no wrong answer"
    assert (metrics["n_pairs"], metrics["n_problems_with_pairs"], metrics["n_problems"]) == (4, 2, 3)
    p = [0.9, 0.8, 0.7, 0.1, 0.2, 0.4, 1.0]      # a prediction above 1 is held there
    assert metrics["brier"] == pytest.approx(sum((a - b) ** 2 for a, b in zip(p, labels)) / 7, abs=1e-6)
    assert "pair accuracy 75.0% over 4 pairs; within a problem 50.0%" in show_verifier(metrics)
    collapsed = verifier_metrics([0.5] * 7, [1] * 7, problems, {"loss": "pairwise", "form": "linear", "offset": 0, "scale": 1}, pairs, None)
    assert (collapsed["score_std"], collapsed["pair_accuracy"], collapsed["calibration_error"]) == (0, 0.5, 0) and collapsed["by_length"]["correlation"] is None
    compared = verifier_metrics(raw, [1] * 7, problems, {"loss": "pairwise", "form": "linear", "offset": 0, "scale": 1}, pairs, None)
    gaps = [0.8, 0.7, 0.6, -0.2]
    assert compared["loss"] == pytest.approx(sum(math.log1p(math.exp(-gap)) for gap in gaps) / 4, abs=1e-6)
    confidence = [1 / (1 + math.exp(-abs(gap))) for gap in gaps]        # 0.69, 0.67, 0.65: one bin, all right; 0.55: wrong
    assert compared["calibration_error"] == pytest.approx((3 - sum(confidence[:3]) + confidence[3]) / 4, abs=1e-6)


SAMPLES = [dict(answer=a, correct=a == "8", score=s - 0.9, weight=s) for a, s in zip(("8", "8", "7", "7", "7", "12"), (.9, .8, .2, .3, .1, .95))]


def test_selection_of_the_published_vector():
    """T19 of the specification: majority 7, weighted 8, best of n 12, vote of the best three 8; and pass@k, best-of-k by hand."""
    metrics, right = selection([SAMPLES])
    assert {way: hits[0] for way, hits in right.items()} == {
        "first sample": True, "majority vote": False, "weighted vote": True, "top-3 vote": True, "best of n": False}
    assert metrics["ways"]["first sample"] == {"accuracy": 1.0, "correct": 1, "interval": list(wilson_interval(1, 1))}
    assert list(metrics["by_k"]) == ["1", "2", "4", "6"] and metrics["by_k"]["2"]["pass"]["accuracy"] == pytest.approx(1 - 6 / 15)
    # of the 15 pairs of samples the right ones win where 12 is not drawn: {8, 8} and twice {8, 7}
    assert metrics["by_k"]["2"]["best"]["accuracy"] == pytest.approx(7 / 15) and metrics["by_k"]["6"]["best"]["accuracy"] == 0
    assert metrics["paired"]["best of n against first sample"] == {"n": 1, "gained": 0, "lost": 1, "p": 1.0}
    assert metrics["by_k"]["1"]["pass"]["accuracy"] == pytest.approx(2 / 6), "of all samples, not of the first"
    nobody = [dict(answer=None, correct=False, score=0.0, weight=0.0)] * 6
    assert all(not hits[1] for hits in selection([SAMPLES, nobody])[1].values())


def test_pass_at_k_of_an_evaluation_is_over_all_answers_to_a_problem(world_of_one):
    from llama_rlhf.evaluation import summarize
    rows = [dict(id=i, correct=c, correct_by_rule={"D": c}, finished=True, n_tokens=3) for i, group in enumerate(((False, False, True, True), (False, False, False, True)))
            for c in group]
    assert summarize(rows, "D")["pass_at_k"] == {"1": pytest.approx((2 / 4 + 1 / 4) / 2), "2": pytest.approx((1 - 1 / 6 + 1 - 3 / 6) / 2), "4": 1.0}


def test_what_a_raw_score_says_of_being_right(world_of_one):
    from llama_rlhf.reward import probability
    raw, told = torch.tensor([-1.0, 1.5, 2.5]), {"offset": 1.5, "scale": 2.0}
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    assert probability({"loss": "pairwise", "form": "linear", **told}, raw).tolist() == pytest.approx([sigmoid(-2.5), 0.5, sigmoid(1.0)]), "against the average response"
    assert probability({"loss": "bce", "form": "sigmoid", **told}, raw).tolist() == pytest.approx([sigmoid(x) for x in raw.tolist()])
    assert probability({"loss": "mse", "form": "linear", **told}, raw).tolist() == [0, 1, 1]


def test_samples_of_two_files_of_problems_are_not_taken_for_one(tmp_path):
    """Joined with `cat`, both have a problem 1: the answers to either were scored behind the first one's prompt, and voted together."""
    row = {"id": 1, "sample": 0, "prompt": "1+1?", "response": "2", "finished": True, "n_tokens": 2, "answers": {"D": "2"}, "correct_by_rule": {"D": True}}
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps(row | more) + "\n" for more in ({}, {"sample": 1}, {"id": 2, "prompt": "1+2?"})))
    assert len(read_samples(str(file), "D")) == 3
    with open(file, "a") as lines:
        lines.write(json.dumps(row | {"prompt": "3+1?"}))
    with pytest.raises(ValueError, match="record 4: problem 1 has another prompt than above"):
        read_samples(str(file), "D")


def test_paired_comparison():
    assert compare_paired([1] * 5 + [0] * 15, [0] * 5 + [1] * 15) == {"n": 20, "gained": 15, "lost": 5, "p": pytest.approx(0.04138947, abs=1e-8)}


# ---- the commands


def verifier(n=2, **flags):
    return run_script(n, "verifier_train.py", **{"dtype": "fp32", "max_seq_len": 96, "log_steps": 2, "lr": 1e-2, **flags})


def test_sample_label_verifier_choose(world_of_one, toy, split, tmp_path):  # noqa: F811
    """The whole loop on two tensor-parallel ranks; then the cached samples again at other layouts: the same choices."""
    ranks = run_script(2, "solver_evaluate.py", ckpt_dir=split, log_dir=tmp_path / "samples", label_file=toy / "train.json", dtype="fp32",
                       num_samples_per_prompt=4, max_new_tokens=8)
    assert [code for code, *_ in ranks] == [0, 0], ranks
    samples = lines_of(tmp_path / "samples/samples.jsonl")
    for i, sample in enumerate(samples):            # a random model is never right: make some so
        sample["correct"] = bool(i % 3)
        sample["correct_by_rule"]["D"], sample["answers"]["D"] = sample["correct"], str(i % 3)
    untouched = lines_of(tmp_path / "samples/samples.jsonl")
    for sample in untouched:                            # the run to compare with: as good as never right, now surely
        sample["correct"] = sample["correct_by_rule"]["D"] = False
    (tmp_path / "samples/samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in untouched))
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))

    ranks = verifier(ckpt_dir=split, save_dir=tmp_path / "run", train_file=tmp_path / "samples.jsonl", held_out=0.2, epochs=2, lm_loss_weight=0.5,
                     max_batch_size=5, accumulation_steps=2, save_steps=5)
    assert [code for code, *_ in ranks] == [0, 0], ranks
    assert "labels, loss mse" in ranks[0][1] and "label " in ranks[0][1] and ranks[1][1] == ""
    assert {"epoch-1", "epoch-2", "log", "step-5"} <= set(os.listdir(tmp_path / "run"))
    metrics = lines_of(tmp_path / "run/log/metrics.jsonl")
    evaluations = [m for m in metrics if m["kind"] == "evaluation"]
    assert len(evaluations) == 2 and evaluations[0]["n_problems"] == 4 and 0 <= evaluations[0]["pair_accuracy"] <= 1
    trains = [m for m in metrics if m["kind"] == "train"]
    assert all(0 <= m["accuracy"] <= 1 for m in trains) and trains[-1]["loss"] < trains[0]["loss"]
    manifest = json.loads((tmp_path / "run/epoch-2/manifest.json").read_text())
    assert manifest["kind"] == "value_model" and manifest["score"]["form"] == "linear" and manifest["score"]["scale"] > 0
    weights = torch.load(tmp_path / "run/epoch-2/consolidated.00.pth", weights_only=True)
    assert "value_head.weight" in weights and "output.weight" in weights, "both heads, or the run could not be continued"
    # the same command from its first save: the same bits
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for name in ("epoch-1", "epoch-2"):
        shutil.rmtree(tmp_path / "again" / name)
    ranks = verifier(ckpt_dir=split, save_dir=tmp_path / "again", train_file=tmp_path / "samples.jsonl", held_out=0.2, epochs=2, lm_loss_weight=0.5,
                     max_batch_size=5, accumulation_steps=2, save_steps=5)
    assert [code for code, *_ in ranks] == [0, 0] and "continuing" in ranks[0][1], ranks
    again = torch.load(tmp_path / "again/epoch-2/consolidated.00.pth", weights_only=True)
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())
    from llama_rlhf.checkpoint.shards import split_checkpoint
    split_checkpoint(str(tmp_path / "run/epoch-2"), str(tmp_path / "whole"), 1)         # a reward model has one head
    whole = torch.load(tmp_path / "whole/consolidated.00.pth", weights_only=True)
    assert "value_head.weight" in whole and "output.weight" not in whole

    for name, n, tp in (("tp", 2, 2), ("dp", 2, 1), ("one", 1, 1)):
        ranks = run_script(n, "solver_evaluate.py", samples_file=tmp_path / "samples.jsonl", verifier_ckpt_dir=tmp_path / "run", dtype="fp32",
                           log_dir=tmp_path / name, model_parallel_size=tp)
        assert [code for code, *_ in ranks] == [0] * n, ranks
    assert "best of 4" in ranks[0][1] and "pair accuracy" in ranks[0][1]
    results = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("tp", "dp", "one")]
    assert results[0]["selection"]["ways"] == results[1]["selection"]["ways"] == results[2]["selection"]["ways"]
    assert results[0]["n"] == 80 and results[0]["selection"]["n_samples"] == 4 and len(results[0]["selection"]["by_k"]) == 3
    assert list(results[2]["selection"]["paired"]) == ["best of n against first sample", "best of n against majority vote"]
    scored = [lines_of(tmp_path / name / "samples.jsonl") for name in ("tp", "dp", "one")]
    for a, b in zip(scored[0], scored[1]):
        assert a["response"] == b["response"] and abs(a["score"] - b["score"]) < 1e-4
    # answers that took hours are not overwritten by a few of them
    (code, _, err), = run_script(1, "solver_evaluate.py", samples_file=tmp_path / "one/samples.jsonl", verifier_ckpt_dir=tmp_path / "run", log_dir=tmp_path / "one", limit=2)
    assert code == 1 and "would leave 2 problems of" in err and len(lines_of(tmp_path / "one/samples.jsonl")) == 80
    # cut or joined files hold different numbers of answers: of each problem count as many as the least has ("best of 1" stood beside votes of 4)
    unequal = [s for s in samples if s["id"] % 2 or s["sample"] != 0][:-1]
    (tmp_path / "unequal.jsonl").write_text("".join(json.dumps(s) + "\n" for s in unequal))
    (code, out, err), = run_script(1, "solver_evaluate.py", samples_file=tmp_path / "unequal.jsonl", verifier_ckpt_dir=tmp_path / "run", dtype="fp32", log_dir=tmp_path / "unequal")
    k = min(Counter(s["id"] for s in unequal).values())
    assert code == 0 and k == 2 and "holds 2 to 4 answers to a problem: the first 2 of each count" in out and "choosing among 2 answers to each of 20" in out, err
    found, written = json.loads((tmp_path / "unequal/metrics.json").read_text()), lines_of(tmp_path / "unequal/samples.jsonl")
    kept = [[s for s in written if s["id"] == i][:k] for i in range(1, 21)]
    assert len(written) == len(unequal) and all("score" in s for s in written)
    assert found["n"] == 40 and found["correct"] == sum(s["correct"] for several in kept for s in several)
    assert found["selection"]["ways"]["best of n"]["correct"] == sum(max(several, key=lambda s: s["score"])["correct"] for several in kept)
    (tmp_path / "unequal.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples[:-3]))
    (code, _, err), = run_script(1, "solver_evaluate.py", samples_file=tmp_path / "unequal.jsonl", verifier_ckpt_dir=tmp_path / "run", log_dir=tmp_path / "unequal")
    assert code == 1 and "holds one answer to 1 of 20 problems (the first: 20): nothing to choose from" in err
    # what the script says is what its file of scores says
    best = [max((s for s in scored[2] if s["id"] == i), key=lambda s: s["score"])["correct"] for i in sorted({s["id"] for s in scored[2]})]
    assert results[2]["selection"]["ways"]["best of n"]["correct"] == sum(best)

    # generating and choosing in one command gives the same samples as before, now with scores
    ranks = run_script(2, "solver_evaluate.py", ckpt_dir=split, verifier_ckpt_dir=tmp_path / "run", log_dir=tmp_path / "both", dtype="fp32",
                       label_file=toy / "train.json", num_samples_per_prompt=4, max_new_tokens=8, limit=5)
    assert [code for code, *_ in ranks] == [0, 0], ranks
    both = lines_of(tmp_path / "both/samples.jsonl")
    assert [s["response"] for s in both] == [s["response"] for s in samples if s["id"] <= 5]
    for a, b in zip(both, scored[0]):
        assert abs(a["score"] - b["score"]) < 1e-4


def test_solutions_alone_train_adapters_and_a_head_that_loading_needs(toy, split, tmp_path):  # noqa: F811
    ranks = verifier(ckpt_dir=split, save_dir=tmp_path / "run", train_file=toy / "train.json", lora_rank=4, label_file=toy / "test.json", max_steps=4,
                     epochs=4)
    assert [code for code, *_ in ranks] == [0, 0], ranks
    assert "holds right solutions only. Wrong ones were made" in ranks[0][1] and "solutions, loss pairwise" in ranks[0][1]
    folder = tmp_path / "run/epoch-1"
    weights = torch.load(folder / "consolidated.01.pth", weights_only=True)
    assert {"layers.0.attention.wq.lora_a", "value_head.weight", "value_head.bias"} <= weights.keys()
    base = torch.load(split / "consolidated.01.pth", weights_only=True)
    assert torch.equal(base["layers.0.attention.wq.weight"], weights["layers.0.attention.wq.weight"]), "the base must not move"

    # the head and its scale come back, with the adapters beside the weights or merged into them; training goes on from there
    (scores, manifest), (_, _) = run_ranks(2, load_reward_model, str(folder))
    assert manifest["loss"] == "pairwise" and abs(scores[0] - scores[1]) < 1e-4 and scores[2] != scores[0]
    ranks = verifier(ckpt_dir=tmp_path / "run", save_dir=tmp_path / "more", train_file=toy / "train.json", lora_rank=4, max_steps=1)
    assert [code for code, *_ in ranks] == [0, 0] and "new, not in" not in ranks[0][1], ranks
    # a solver is no reward model, nor is a folder whose head is lost
    choose = lambda folder: run_script(1, "solver_evaluate.py", ckpt_dir=split, verifier_ckpt_dir=folder, num_samples_per_prompt=2,  # noqa: E731
                                       log_dir=tmp_path / "log", label_file=toy / "test.json")
    assert "has no value head: it is not a reward model" in first_line(choose(split), 1)
    assert run_ranks(1, load_without_head, str(split)) == ["refused"]


def load_reward_model(folder):
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.models.transformer import ValueModel
    from llama_rlhf.parallel import groups
    from llama_rlhf.reward import score_responses
    groups.initialize(device="cpu")
    scores = []
    for lora in ("stored", None):
        model = load_model(folder, ValueModel, lora=lora, trainable=False, need_head=True)
        scores.append(score_responses(model, [[256, 65, 66, 257]], [1]).item())
    with torch.no_grad():
        model.value_head.weight.zero_()
    scores.append(score_responses(model, [[256, 65, 66, 257]], [1]).item())
    groups.shutdown()
    return scores, model.score


def load_without_head(folder):
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.models.transformer import ValueModel
    from llama_rlhf.parallel import groups
    groups.initialize(device="cpu")
    try:
        load_model(folder, ValueModel, need_head=True)
    except ValueError as error:
        assert "has no value head" in str(error)
        return "refused"


def test_wrong_inputs_are_one_sentence(toy, split, tmp_path):  # noqa: F811
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps([{"instruction": "a", "chosen": "b", "rejected": "c"}] * 3))
    train = lambda **flags: first_line(verifier(1, **{"ckpt_dir": split, "save_dir": tmp_path / "never", "train_file": pairs, **flags}), 1)  # noqa
    assert "--loss mse needs responses labelled right or wrong" in train(loss="mse")
    assert "--loss 'bt': use auto, pairwise, mse, bce" in train(loss="bt")
    assert "--lm_loss_weight goes with --loss mse or bce" in train(lm_loss_weight=1.0)
    assert "--margin and --centre are for pairs" in train(train_file=toy / "train.json", loss="mse", margin=1.0)
    assert "--held_out 1.0" in train(held_out=1.0)
    assert "--centre -1.0: must be at least 0" in train(centre=-1.0)
    assert "labelled right or wrong" in train(train_file=toy / "train.json", loss="bce", label_file=pairs)
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([{"instruction": "a", "chosen": "b", "rejected": "c"}, {"instruction": "a", "chosen": "b"}]))
    line = train(train_file=bad)
    assert "bad.json, line 1, record 2" in line and '"rejected"' in line
    bad.write_text(json.dumps([{"instruction": "a", "chosen": "b", "rejected": "b"}]))
    assert "nothing is left to learn from" in train(train_file=bad)
    assert "--max_seq_len 97 is more than the model's 96" in train(max_seq_len=97)
    assert not (tmp_path / "never/epoch-1").exists()

    choose = lambda **flags: first_line(run_script(1, "solver_evaluate.py", log_dir=tmp_path / "log", **flags), 1)  # noqa: E731
    assert "give either --ckpt_dir" in choose() and "give either --ckpt_dir" in choose(ckpt_dir=split, samples_file=bad)
    assert "--samples_file needs --verifier_ckpt_dir" in choose(samples_file=bad) and "--samples_file needs" in choose(samples_file=bad, plan=True, model_type="llama-2-7b")
    assert "--perplexity needs" in choose(samples_file=bad, verifier_ckpt_dir=split, perplexity=True)
    assert "add --num_samples_per_prompt" in choose(ckpt_dir=split, verifier_ckpt_dir=split)
    assert 'bad.json, line 1, record 1: missing "id"' in choose(samples_file=bad, verifier_ckpt_dir=split)


def test_answers_that_are_all_wrong_are_warned_about(toy, split, tmp_path):  # noqa: F811
    """Answers sampled from a model that cannot do it yet trained a verifier without a word."""
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps({"instruction": f"{n}+1?", "output": f"#### {n}", "label": 0}) + "\n" for n in range(9)))
    (code, out, err), = verifier(1, ckpt_dir=split, save_dir=tmp_path / "v", train_file=tmp_path / "answers.jsonl", max_seq_len=96, max_steps=1, dtype="fp32")
    assert code == 0 and "answers.jsonl holds no right responses, from which a verifier learns nothing but that" in out, err
