"""The scripts as a user runs them: two gloo ranks, a toy model, files on disk; and what they say when something is wrong."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from ranks import run_script
from toys import add_bytes_tokenizer, make_hf

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A random LLaMA for the bytes tokenizer, with problems short enough for it."""
    folder = tmp_path_factory.mktemp("toy")
    make_hf(folder / "hf", "llama-9-3", vocab_size=263, max_position_embeddings=96)
    add_bytes_tokenizer(folder / "hf")
    records = [{"instruction": f"{a}+{b}?", "output": f"{a}+{b}={a + b}\n#### {a + b}"} for a in range(4) for b in range(5)]
    (folder / "train.json").write_text(json.dumps(records))
    (folder / "test.json").write_text(json.dumps(records[:7]))
    return folder


@pytest.fixture(scope="module")
def split(toy):
    (code, out, err), = run_script(1, "checkpoint_split.py", ckpt_file=toy / "hf", save_path=toy / "split", n=2)
    assert code == 0, err
    assert sorted(os.listdir(toy / "split"))[:2] == ["consolidated.00.pth", "consolidated.01.pth"]
    return toy / "split"


def first_line(result, n=2):
    """The first line of the error, which must be the sentence; every rank must have failed."""
    assert [code for code, *_ in result] == [1] * n, result
    lines = {err.strip().splitlines()[0] for _, _, err in result}
    return next((line for line in sorted(lines) if "failed while" not in line), sorted(lines)[0])


def lines_of(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("lora_rank", [-1, 4])
def test_train_then_evaluate_then_train_on(lora_rank, toy, split, tmp_path):
    ranks = run_script(2, "solver_train.py", ckpt_dir=split, save_dir=tmp_path / "run", train_file=toy / "train.json", model_type="",
                       max_batch_size=3, accumulation_steps=2, lora_rank=lora_rank, epochs=2, log_steps=2, lr=1e-2, dtype="fp32",
                       max_seq_len=96, label_file=toy / "test.json", max_new_tokens=12, save_steps=3)
    assert [code for code, *_ in ranks] == [0, 0], ranks
    out = ranks[0][1]
    assert "first sample" in out and "⟦0+0=0\n#### 0" in out and ranks[1][1] == ""
    assert sorted(name for name in os.listdir(tmp_path / "run") if name != ".lock") == ["epoch-1", "epoch-2", "log", "step-3", "step-6"]
    metrics = lines_of(tmp_path / "run/log/metrics.jsonl")
    train = [m for m in metrics if m["kind"] == "train"]
    # 20 records, micro-batches of 3, 2 per step: 4 steps an epoch
    assert [m["step"] for m in train] == [2, 4, 6, 8] and train[-1]["loss"] < train[0]["loss"] - 0.5
    assert abs(train[0]["perplexity"] - 2.718281828 ** train[0]["loss"]) < 1e-6
    epochs = [m for m in metrics if m["kind"] == "epoch"]
    assert len(epochs) == 2 and [m["step"] for m in metrics if m["kind"] == "evaluation"] == [0, 4, 8]
    run = json.loads((tmp_path / "run/log/run.json").read_text())
    assert run["arguments"]["lora_rank"] == lora_rank and run["arguments"]["warmup_ratio"] == 0.03
    names = torch.load(tmp_path / "run/epoch-2/consolidated.01.pth", weights_only=True).keys()
    assert ("layers.0.attention.wq.lora_a" in names) == (lora_rank > 0)

    ranks = run_script(2, "solver_evaluate.py", task="GSM8K", ckpt_dir=tmp_path / "run", log_dir=tmp_path / "eval", max_batch_size=3,
                       label_file=toy / "test.json", dtype="fp32", max_new_tokens=12)
    assert [code for code, *_ in ranks] == [0, 0], ranks
    samples, result = lines_of(tmp_path / "eval/samples.jsonl"), json.loads((tmp_path / "eval/metrics.json").read_text())
    assert [s["id"] for s in samples] == [1, 2, 3, 4, 5, 6, 7]
    assert {"prompt", "response", "answer", "label", "correct", "finished"} <= samples[0].keys()
    assert result["n"] == 7 and result["correct"] == sum(s["correct"] for s in samples)
    assert result["accuracy"] == result["correct"] / 7 and set(result["rules"]) == set("ABCD")
    # the evaluation inside the training saw the same model: the adapters apart there, merged here
    inside = [m for m in metrics if m["kind"] == "evaluation"][-1]
    assert inside["mean_tokens"] == result["mean_tokens"]

    # one rank, another cut, from the save of two: the same answers
    (code, _, err), = run_script(1, "solver_evaluate.py", ckpt_dir=tmp_path / "run/epoch-2", log_dir=tmp_path / "one", max_batch_size=64,
                                 label_file=toy / "test.json", dtype="fp32", max_new_tokens=12)
    assert code == 0, err
    assert [s["response"] for s in lines_of(tmp_path / "one/samples.jsonl")] == [s["response"] for s in samples]
    (code, out, err), = run_script(1, "solver_evaluate.py", compare=f"{tmp_path / 'eval'},{tmp_path / 'one'}")
    # --compare starts no process groups and takes no device
    assert code == 0 and "0 became right, 0 became wrong, McNemar p = 1" in out, err
    result = run_script(1, "solver_evaluate.py", ckpt_dir=tmp_path / "run", log_dir=tmp_path / "run/log", label_file=toy / "test.json")
    assert "run/log holds the log of a training run" in first_line(result, 1)


def test_reference_perplexity_equals_transformers(toy, split, tmp_path):
    import transformers
    ranks = run_script(2, "solver_evaluate.py", ckpt_dir=split, log_dir=tmp_path, label_file=toy / "test.json", dtype="fp32",
                       max_new_tokens=4, perplexity=True)
    assert [code for code, *_ in ranks] == [0, 0], ranks
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(toy / "hf").eval()
    losses = []
    for record in json.loads((toy / "test.json").read_text()):
        prompt = [256, *(record["instruction"] + "\n").encode()]          # the bytes tokenizer: bos 256, eos 257
        ids = torch.tensor([[*prompt, *record["output"].encode(), 257]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        losses.append(-logprobs[len(prompt) - 1:])
    losses = torch.cat(losses)
    assert metrics["reference_tokens"] == len(losses)
    assert abs(metrics["reference_loss"] - losses.mean().item()) < 1e-5
    assert abs(metrics["reference_perplexity"] / losses.mean().exp().item() - 1) < 1e-5
    (tmp_path / "labels.json").write_text(json.dumps([{"instruction": "1+1?", "label": "2"}]))
    (code, out, err), = run_script(1, "solver_evaluate.py", ckpt_dir=split, log_dir=tmp_path / "none", label_file=tmp_path / "labels.json", dtype="fp32", max_new_tokens=4, perplexity=True)
    assert code == 0 and "no problem has a reference solution" in out and "reference_loss" not in json.loads((tmp_path / "none/metrics.json").read_text()), err


def test_data_parallel_ranks_share_the_problems(toy, split, tmp_path):
    for name, n, size in (("tp", 2, 2), ("dp", 2, 1), ("one", 1, 1)):
        ranks = run_script(n, "solver_evaluate.py", ckpt_dir=split, log_dir=tmp_path / name, label_file=toy / "test.json", dtype="fp32",
                           max_new_tokens=8, model_parallel_size=size, num_samples_per_prompt=3, temperature=0.8, max_batch_size=4)
        assert [code for code, *_ in ranks] == [0] * n, ranks
    tp, dp = (lines_of(tmp_path / name / "samples.jsonl") for name in ("tp", "dp"))
    assert [(s["id"], s["sample"]) for s in dp] == [(i, k) for i in range(1, 8) for k in range(3)]
    one = lines_of(tmp_path / "one/samples.jsonl")
    assert [s["response"] for s in one] == [s["response"] for s in tp] == [s["response"] for s in dp], "a sample depends on the layout"
    assert len({s["response"] for s in tp if s["id"] == 1}) == 3, "three samples of a prompt must differ"
    metrics = json.loads((tmp_path / "dp/metrics.json").read_text())
    assert set(metrics["pass_at_k"]) == {"1", "2", "3"} and (metrics["n"], metrics["n_problems"]) == (21, 7)
    from llama_rlhf.scoring import wilson_interval
    # three answers to a problem are not three independent trials
    assert metrics["interval"] == list(wilson_interval(metrics["correct"] / 3, 7))


def test_errors_are_one_sentence_on_every_rank(toy, split, tmp_path):
    train = lambda **flags: run_script(2, "solver_train.py", **{  # noqa: E731
        "ckpt_dir": split, "save_dir": tmp_path / "never", "train_file": toy / "train.json", "max_seq_len": 96, **flags})
    assert "no-such: no such file or folder (looked for a checkpoint)" in first_line(train(ckpt_dir=tmp_path / "no-such"))
    assert "no-such.json" in first_line(train(train_file=tmp_path / "no-such.json"))
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([{"instruction": "a", "output": "b"}, {"instruction": "a", "answer": "b"}]))
    line = first_line(train(train_file=bad))
    assert "record 2" in line and "output" in line and "answer" in line
    bad.write_text("[]")
    assert "bad.json" in first_line(train(train_file=bad))
    assert "llama-2-7b" in first_line(train(model_type="lama-2-7b"))
    assert "--max_seq_len 9999 is more than the model's 96" in first_line(train(max_seq_len=9999))
    for flags in (dict(max_steps=0), dict(max_steps=-5), dict(lr=0), dict(warmup_ratio=2), dict(eval_batch_size=0), dict(dtype="fp16"), dict(weight_decay=-1),
                  dict(timeout_seconds=-5), dict(device="tpu")):
        name, = flags
        assert f"--{name}" in first_line(train(**flags))
    (tmp_path / "file").write_text("")
    assert "is a file; a folder is needed" in first_line(train(save_dir=tmp_path / "file"))
    assert "--model_parallel_size 3" in first_line(train(model_parallel_size=3))
    evaluate = lambda **flags: run_script(2, "solver_evaluate.py", **{  # noqa: E731
        "ckpt_dir": split, "log_dir": tmp_path / "never", "label_file": toy / "test.json", **flags})
    assert "this model allows 2 to 96" in first_line(evaluate(max_seq_len=97))
    assert "--limit 0" in first_line(evaluate(limit=0))
    assert "path of the folder to write in is empty" in first_line(train(save_dir=""))
    assert "gives 2 equal answers to a problem" in first_line(evaluate(num_samples_per_prompt=2, temperature=0))
    for flags, said in ((dict(top_p=3), "top_p 3.0 in (0, 1]"), (dict(temperature=-3), "temperature -3.0"), (dict(temperature=1e-40), "temperature 1e-40: logits")):      # before the model is loaded
        assert said in first_line(evaluate(**flags))
    line = first_line(evaluate(max_seq_len=5))
    assert "record 1" in line and "max_seq_len is 5" in line
    assert "gsm8k" in first_line(evaluate(task="GSM9K"))
    assert not (tmp_path / "never" / "epoch-1").exists()


def test_a_damaged_checkpoint_is_refused_by_name(toy, split, tmp_path):
    evaluate = lambda folder: run_script(2, "solver_evaluate.py", ckpt_dir=folder, log_dir=tmp_path / "e", label_file=toy / "test.json")  # noqa: E731
    truncated = tmp_path / "truncated"
    shutil.copytree(split, truncated)
    with open(truncated / "consolidated.01.pth", "r+b") as file:
        file.truncate(os.path.getsize(truncated / "consolidated.01.pth") // 2)
    assert "consolidated.01.pth" in first_line(evaluate(truncated))
    flipped = tmp_path / "flipped"
    shutil.copytree(split, flipped)
    with open(flipped / "consolidated.00.pth", "r+b") as file:
        file.seek(os.path.getsize(flipped / "consolidated.00.pth") // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    line = first_line(evaluate(flipped))
    assert "consolidated.00.pth is corrupt" in line and "SHA-256" in line
    missing = tmp_path / "missing"
    shutil.copytree(split, missing)
    os.remove(missing / "consolidated.00.pth")
    assert "consolidated.00.pth" in first_line(evaluate(missing))


def test_a_save_dir_that_holds_another_run_is_refused(toy, split, tmp_path):
    os.makedirs(tmp_path / "run/epoch-1")
    line = first_line(run_script(2, "solver_train.py", ckpt_dir=split, save_dir=tmp_path / "run", train_file=toy / "train.json", max_seq_len=96))
    assert "already holds epoch-1, but no complete save" in line


@pytest.mark.parametrize("script,lora_rank,n", [("solver_train.py", -1, 2), ("solver_train.py", 2, 1), ("verifier_train.py", 2, 2)])
def test_a_killed_run_continues_to_the_same_bits(script, lora_rank, n, toy, tmp_path):
    """Killed after a save in mid-epoch, with a later save that is corrupt: metrics and files end as those of an undisturbed run."""
    flags = dict(ckpt_dir=toy / "hf", train_file=toy / "train.json", max_seq_len=96, max_batch_size=3, epochs=2, save_steps=3, log_steps=2, lr=1e-2,
                 dtype="fp32", lora_rank=lora_rank)
    for name in ("whole", "cut"):
        assert all(code == 0 for code, *_ in run_script(n, script, save_dir=tmp_path / name, **flags))
    saves = sorted(tmp_path.glob("cut/*-*"), key=lambda p: json.loads((p / "manifest.json").read_text())["step"])
    for path in saves[3:]:
        shutil.rmtree(path)
    with open(saves[2] / "training.00.pth", "r+b") as file:
        file.seek(600)
        byte = file.read(1)
        file.seek(600)
        file.write(bytes([byte[0] ^ 1]))
    assert "--lr 0.1 (was 0.01)" in first_line(run_script(n, script, save_dir=tmp_path / "cut", **{**flags, "lr": 0.1}), n)
    ranks = run_script(n, script, save_dir=tmp_path / "cut", **flags)
    assert all(code == 0 for code, *_ in ranks), ranks
    assert "moved aside" in ranks[0][1] and f"continuing {saves[1]}" in ranks[0][1]
    last = saves[-1].name
    for path in sorted((tmp_path / "whole" / last).glob("*.pth")):
        a, b = (torch.load(p, weights_only=True) for p in (path, tmp_path / "cut" / last / path.name))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), path
    whole, cut = ([{k: v for k, v in m.items() if k in ("step", "loss", "accuracy", "lr", "grad_norm")} for m in lines_of(tmp_path / name / "log/metrics.jsonl")
                   if m["kind"] == "train"] for name in ("whole", "cut"))
    assert cut[-1] == whole[-1] and [m for m in cut if m["step"] == 4][-1] == [m for m in whole if m["step"] == 4][-1]
    ranks = run_script(n, script, save_dir=tmp_path / "cut", **flags)       # nothing is left to do
    assert all(code == 0 for code, *_ in ranks), ranks


def test_what_does_not_fit_a_run_is_named_and_damage_is_stepped_over(toy, tmp_path):
    flags = dict(ckpt_dir=toy / "hf", train_file=toy / "train.json", max_seq_len=96, max_batch_size=3, epochs=2, save_steps=2, dtype="fp32",
                 save_dir=tmp_path / "run", model_parallel_size=1)
    assert all(code == 0 for code, *_ in run_script(2, "solver_train.py", **flags))
    assert "data_parallel 1 (was 2)" in first_line(run_script(1, "solver_train.py", **flags), 1)
    saves = sorted((tmp_path / "run").glob("*-*"), key=lambda p: json.loads((p / "manifest.json").read_text())["step"])
    (saves[-1] / "training.00.pth").unlink()            # a missing file, a truncated file: the save before them counts
    with open(saves[-2] / "consolidated.00.pth", "r+b") as file:
        file.truncate(1000)
    ranks = run_script(2, "solver_train.py", **flags)
    assert all(code == 0 for code, *_ in ranks), ranks
    assert ranks[0][1].count("moved aside") == 2 and f"continuing {saves[-3]}" in ranks[0][1]


def test_sigterm_saves_and_the_same_command_continues(toy, tmp_path):
    import signal
    flags = [f"--{k}={v}" for k, v in dict(ckpt_dir=toy / "hf", train_file=toy / "train.json", max_seq_len=96, max_batch_size=1, epochs=40, log_steps=1,
                                           write_report="false", dtype="fp32", device="cpu", save_dir=tmp_path / "run").items()]
    command = [sys.executable, "-u", "solver_train.py", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if "step 2/" in line:
            other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert other.returncode == 1 and "another run is saving" in other.stderr.splitlines()[0]
            other = subprocess.run([*command[:-1], f"--save_dir={tmp_path / 'other'}", f"--log_dir={tmp_path / 'run/log'}"], cwd=ROOT, capture_output=True, text=True)
            assert other.returncode == 1 and f"another run is saving to {tmp_path / 'run/log'}" in other.stderr.splitlines()[0]        # two runs' numbers in one file
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 143 and "SIGTERM: saved and left" in rest, rest
    assert any(name.startswith(("step-", "epoch-")) for name in os.listdir(tmp_path / "run"))
    done = subprocess.run([*command, "--max_steps=-1"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "continuing" in done.stdout and "step 800/800" in done.stdout, done.stderr


def test_a_single_weight_file_is_a_model_too(toy, tmp_path):
    """Its config and tokenizer stand beside it."""
    (code, out, err), = run_script(1, "solver_evaluate.py", ckpt_dir=toy / "hf/model.safetensors", log_dir=tmp_path, label_file=toy / "test.json",
                                   max_new_tokens=4, limit=2)
    assert code == 0, err
    assert len(lines_of(tmp_path / "samples.jsonl")) == 2


def test_compare_judges_all_runs_by_one_rule(toy, split, tmp_path):
    for name, rule in (("a", "A"), ("d", "D")):
        (code, _, err), = run_script(1, "solver_evaluate.py", ckpt_dir=split, log_dir=tmp_path / name, label_file=toy / "test.json", rule=rule,
                                     max_new_tokens=12)
        assert code == 0, err
    from llama_rlhf.comparison import compare_runs
    table = compare_runs([str(tmp_path / "a"), str(tmp_path / "d")])
    assert "rule A: 0 became right, 0 became wrong" in table     # the same model: only the rules differ


def test_torchrun_itself(toy, split, tmp_path):
    """The contract's form of the command, through torchrun, and its exit codes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, "solver_evaluate.py", "--task", "GSM8K", "--ckpt_dir", str(split), "--log_dir", str(tmp_path / "log"),
                           "--label_file", str(toy / "test.json"), "--max_batch_size", "384", "--max_new_tokens", "4", "--device", "cpu"],
                          cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout and (tmp_path / "log/metrics.json").exists()
    failed = subprocess.run([*torchrun, "solver_train.py", "--ckpt_dir", str(split), "--save_dir", str(tmp_path / "x"), "--train_file",
                             str(tmp_path / "none.json"), "--device", "cpu"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert failed.returncode != 0 and "error: " in failed.stderr and "none.json" in failed.stderr
    ours = [line for line in failed.stderr.splitlines() if line.startswith(("[rank", "Traceback"))]     # torchrun adds its own later
    assert ours[0].startswith("[rank") and "error: " in ours[0] and "none.json" in ours[0]


def test_the_contract_under_torchrun(toy, split, tmp_path):
    """Fine-tune, verify, reinforce: the commands as people type them, each on the result of the one before, two gloo ranks."""
    def torchrun(script, **flags):
        words = [word for key, value in {**flags, "device": "cpu", "dtype": "fp32", "write_report": "false"}.items() for word in (f"--{key}", str(value))]
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", script, *words], cwd=ROOT, capture_output=True,
                              text=True, timeout=180)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    torchrun("solver_train.py", ckpt_dir=split, save_dir=tmp_path / "solver", train_file=toy / "train.json", max_batch_size=6, lora_rank=-1,
             max_seq_len=96, max_steps=3)
    torchrun("verifier_train.py", ckpt_dir=tmp_path / "solver", save_dir=tmp_path / "verifier", train_file=toy / "train.json", max_batch_size=6,
             lora_rank=-1, max_seq_len=96, max_steps=3)
    out = torchrun("ppo_train.py", actor_ckpt_dir=tmp_path / "solver", actor_save_dir=tmp_path / "actor", critic_ckpt_dir=tmp_path / "verifier",
                   critic_save_dir=tmp_path / "critic", reward_model_ckpt_dir=tmp_path / "verifier", max_batch_size=6, max_buffer_size=12,
                   train_file=toy / "train.json", max_iterations=1, max_new_tokens=8)
    assert "iteration 1/1" in out and "explained variance" in out
    assert sorted(os.listdir(tmp_path / "critic")) == [".lock", "step-1"] or os.listdir(tmp_path / "critic") == ["step-1"]
    assert "accuracy" in torchrun("solver_evaluate.py", ckpt_dir=tmp_path / "actor", log_dir=tmp_path / "log", label_file=toy / "test.json", max_new_tokens=4)


def test_a_run_with_shared_optimizer_state_continues_to_the_same_bits(toy, tmp_path):
    """Two replicas, each with its share in a file of its own, bf16 with compensation; the last save is lost."""
    flags = dict(ckpt_dir=toy / "hf", train_file=toy / "train.json", save_dir=tmp_path / "run", max_seq_len=96, max_batch_size=3, epochs=1, save_steps=2, lr=1e-2,
                 dtype="bf16", zero=1, optimizer_precision="kahan", model_parallel_size=1)
    assert all(code == 0 for code, *_ in run_script(2, "solver_train.py", **flags))
    assert {"training.00.00.pth", "training.00.01.pth"} <= set(os.listdir(tmp_path / "run/epoch-1"))
    os.rename(tmp_path / "run/epoch-1", tmp_path / "first")
    ranks = run_script(2, "solver_train.py", **flags)
    assert all(code == 0 for code, *_ in ranks) and "continuing" in ranks[0][1], ranks
    for path in sorted((tmp_path / "first").glob("*.pth")):
        a, b = (torch.load(p, weights_only=True) for p in (path, tmp_path / "run/epoch-1" / path.name))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), path


def test_an_evaluation_does_not_take_the_place_of_another(toy, split, tmp_path):
    """Other answers asked for in the same folder: what was there is kept. Killed before its answers: it still stands there. Beside a save, which may be removed."""
    flags = dict(ckpt_dir=split, log_dir=tmp_path / "log", label_file=toy / "test.json", max_new_tokens=4, dtype="fp32", write_report="false")
    evaluate = lambda **more: run_script(1, "solver_evaluate.py", **{**flags, **more})[0]  # noqa: E731
    assert evaluate()[0] == 0 and evaluate()[0] == 0
    assert not list(tmp_path.glob("log/earlier-*")), "the same again"
    (code, out, err) = evaluate(limit=2)
    assert code == 0 and "held another evaluation (--limit -1); it is in" in out, err
    assert len(lines_of(tmp_path / "log/samples.jsonl")) == 2 and len(lines_of(tmp_path / "log/earlier-1/samples.jsonl")) == 7
    assert (tmp_path / "log/earlier-1/metrics.json").exists()
    assert "prompt has" in evaluate(max_seq_len=3)[2] and (tmp_path / "log/metrics.json").exists(), "it failed before it had answers"
    (tmp_path / "log/metrics.json").write_text('{"arguments": ')
    assert evaluate(limit=2)[0] == 0 and (tmp_path / "log/earlier-2/samples.jsonl").exists(), "damaged: aside"
    shutil.copytree(split, tmp_path / "run/step-3")
    assert evaluate(ckpt_dir=tmp_path / "run/step-3", log_dir="")[0] == 0
    assert (tmp_path / "run/evaluate-GSM8K-step-3/metrics.json").exists() and not list(tmp_path.glob("run/step-3/evaluate*"))
    code, _, err = evaluate(ckpt_dir="", samples_file=tmp_path / "log/samples.jsonl", verifier_ckpt_dir=split)
    assert code == 1 and "leave --label_file out" in err


@pytest.mark.parametrize("max_steps,saves", [(-1, ("epoch-1", "epoch-2")), (2, ("step-2", "step-2"))])
@pytest.mark.parametrize("script", ["solver_train.py", "verifier_train.py"])
def test_a_run_killed_in_the_evaluation_after_an_epoch_has_lost_nothing_and_evaluates(script, max_steps, saves, toy, tmp_path):
    """kill -9, where the evaluation of the first epoch, or of --max_steps within it, begins: that is saved, and the next start makes up for the evaluation, once.
    Of --max_steps it was recorded under the epoch before."""
    function = "llama_rlhf.evaluation.evaluate" if script == "solver_train.py" else "llama_rlhf.reward.evaluate_verifier"
    flags = dict(ckpt_dir=toy / "hf", train_file=toy / "train.json", label_file=toy / ("test.json" if script == "solver_train.py" else "train.json"), max_seq_len=96,
                 max_batch_size=8, epochs=2, max_steps=max_steps, save_dir=tmp_path / "run", device="cpu", dtype="fp32", write_report="false") \
        | ({"max_new_tokens": 4} if "solver" in script else {})
    module, _, name = function.rpartition(".")
    program = f"""import os, sys, runpy, {module} as module
real, calls = module.{name}, []
def dies(*args, **kwargs):
    calls.append(1)
    return os.kill(os.getpid(), 9) if len(calls) == {2 if "solver" in script else 1} else real(*args, **kwargs)
module.{name} = dies
sys.argv = ["{script}", *{[f"--{key}={value}" for key, value in flags.items()]!r}]
runpy.run_path("{script}", run_name="__main__")"""
    cut = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert cut.returncode == -9 and (tmp_path / f"run/{saves[0]}/manifest.json").exists(), cut.stderr
    for continues in saves:
        (code, out, err), = run_script(1, script, **flags)
        assert code == 0 and f"continuing {tmp_path / 'run' / continues}" in out, err
    seen = [(line["step"], line["epoch"]) for line in lines_of(tmp_path / "run/log/metrics.jsonl") if line["kind"] == "evaluation"]
    assert seen == [(0, 0)] * ("solver" in script) + ([(3, 1), (6, 2)] if max_steps == -1 else [(2, 1)]), seen


@pytest.mark.parametrize("script,call", [("solver_train.py", 1), ("solver_train.py", 2), ("verifier_train.py", 1), ("ppo_train.py", 1), ("ppo_train.py", 2)])
def test_sigterm_in_an_evaluation_ends_the_run_behind_it_without_another_step(script, call, toy, tmp_path):
    """It was honoured after one more step, or a whole iteration of PPO, and schedulers wait half a minute."""
    flags = dict(train_file=toy / "train.json", label_file=toy / ("train.json" if script == "verifier_train.py" else "test.json"), device="cpu", dtype="fp32", epochs=3,
                 write_report="false") | ({} if script == "verifier_train.py" else {"max_new_tokens": 4})
    if script == "ppo_train.py":
        flags |= dict(actor_ckpt_dir=toy / "hf", actor_save_dir=tmp_path / "run", algorithm="rloo", num_samples_per_prompt=2, max_buffer_size=8, max_iterations=3, eval_steps=1)
    else:
        flags |= dict(ckpt_dir=toy / "hf", save_dir=tmp_path / "run", max_seq_len=96, max_batch_size=8)
    module, name = ("llama_rlhf.reward", "evaluate_verifier") if script == "verifier_train.py" else ("llama_rlhf.evaluation", "evaluate")
    program = f"""import os, sys, runpy, {module} as module
real, calls = module.{name}, []
def asked(*args, **kwargs):
    calls.append(1)
    if len(calls) == {call}:
        os.kill(os.getpid(), 15)
    return real(*args, **kwargs)
module.{name} = asked
sys.argv = ["{script}", *{[f"--{key}={value}" for key, value in flags.items()]!r}]
runpy.run_path("{script}", run_name="__main__")"""
    cut = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    lines = lines_of(tmp_path / "run/log/metrics.jsonl")
    trained = [line["step"] for line in lines if line["kind"] in ("epoch", "iteration")]
    assert cut.returncode == 143 and [line["kind"] for line in lines].count("evaluation") == call, cut.stderr
    if call == 1 and script != "verifier_train.py":         # which does not evaluate before the first step
        assert "left before the first step" in cut.stdout and not trained
    else:
        first = 1 if script == "ppo_train.py" else 3
        saves = [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(("step-", "epoch-"))]
        assert "saved and left" in cut.stdout and trained == [first] and saves == ["step-1" if script == "ppo_train.py" else "epoch-1"]
    (code, out, err), = run_script(1, script, **flags)
    assert code == 0 and ("continuing" in out or "resumed after iteration 1" in out) == ("saved and left" in cut.stdout), err
