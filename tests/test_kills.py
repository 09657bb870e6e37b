"""A small part of tests/campaigns/kills.py, and what stands behind it: invariants, a stuck rank, steps that are skipped together."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from ranks import run_ranks

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "campaigns"))
import jobs  # noqa: E402
from jobs import flags_of, make_toy, metrics_of, run, saves_of  # noqa: E402

STEP = "llama_rlhf.trainer:Trainer.step"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("kills") / "toy")


@pytest.fixture(scope="module")
def undisturbed(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    script, flags = flags_of("SFT", toy, folder / "run")
    ended = run(script, flags, 2, folder=folder)
    assert ended.ok, ended.texts
    return folder / "run"


@pytest.mark.parametrize("rank,target,nth", [(1, "llama_rlhf.checkpoint.writer:PthWriter.write", 22), (0, "llama_rlhf.checkpoint.store:write_json", 4),
                                             (0, "llama_rlhf.checkpoint.store:_fsync_folder", 4)],
                         ids=["half a file written", "before the manifest", "after the renaming"])
def test_killed_while_saving(rank, target, nth, toy, undisturbed, tmp_path):
    script, flags = flags_of("SFT", toy, tmp_path / "run")
    cut = run(script, flags, 2, [("kill", rank, target, nth)], folder=tmp_path)
    assert cut.codes[rank] == -signal.SIGKILL and cut.codes[1 - rank] == 1 and "lost another rank" in cut.texts[1 - rank], cut.texts
    expected = saves_of(undisturbed)
    assert all(expected[name] == files for name, files in saves_of(tmp_path / "run").items())
    again = run(script, flags, 2, folder=tmp_path)
    assert again.ok, again.texts
    assert saves_of(tmp_path / "run") == expected and metrics_of(tmp_path / "run") == metrics_of(undisturbed)
    assert not list((tmp_path / "run").glob(".tmp-*"))


def test_the_comparison_of_runs_notices_a_wrong_resumption(toy, undisturbed, tmp_path):
    """The traps of the campaign: what test_killed_while_saving asserts must fail under each of them."""
    script, flags = flags_of("SFT", toy, tmp_path / "begun")
    run(script, flags, 2, [("kill", -1, STEP, 4)], folder=tmp_path)
    for trap in ("random numbers not restored", "data position off by one", "moments not restored"):
        shutil.copytree(tmp_path / "begun", tmp_path / "run")
        assert run(script, {**flags, "save_dir": tmp_path / "run"}, 2, [("trap", -1, trap)], folder=tmp_path).ok
        assert saves_of(tmp_path / "run") != saves_of(undisturbed), trap
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("kind,size,target,nth", [("SFT", 1, "torch:Tensor.backward", 3), ("PPO", 2, "llama_rlhf.generation:choose", 5)])
def test_the_other_rank_ends_within_seconds(kind, size, target, nth, toy, tmp_path):
    script, flags = flags_of(kind, toy, tmp_path / "run", model_parallel_size=size)
    ended = run(script, flags, 2, [("kill", 1, target, nth)], folder=tmp_path)
    assert ended.codes == [1, -signal.SIGKILL] and "lost another rank" in ended.texts[0], ended.texts
    assert ended.lag < 10 or ended.disturbed


def test_a_rank_that_waits_in_shared_memory_stands_in_one_place():
    """The loop it waits in was looked at on another of its lines now and then, so half of --timeout_seconds never passed in one place."""
    import threading
    import time

    import numpy

    from llama_rlhf.parallel.shared_memory import SharedMemoryGroup
    from llama_rlhf.parallel.watch import place_of
    group, seen = object.__new__(SharedMemoryGroup), []
    group.rank, group.size, group.timeout_seconds, group._others, group._round, group._pids = 0, 2, 60.0, [1], 0, [os.getpid()] * 2
    group._data, group._counters = torch.zeros(2, 2, 64, dtype=torch.uint8), numpy.zeros(2, dtype=numpy.int64)
    waits = threading.Thread(target=lambda: group.all_reduce_(torch.zeros(4), "sum"))
    waits.start()
    for _ in range(300):
        time.sleep(0.005)
        seen.append(place_of(waits.ident))
    group._counters[1] = 1
    waits.join()
    assert len(set(seen[20:])) == 1 and seen[-1][1] == "_exchange", set(seen)


@pytest.mark.parametrize("size,collective", [(1, "all_reduce"), (2, "_exchange")])
def test_a_stuck_rank_is_named_before_the_timeout(size, collective, toy, tmp_path):
    """Tensor-parallel ranks wait in a loop of their own: as they stood on another line of it whenever they were looked at, they seemed to go on."""
    script, flags = flags_of("SFT", toy, tmp_path / "run", timeout_seconds=6, model_parallel_size=size)
    ended = run(script, flags, 2, [("kill", 1, STEP, 3, 0.0, signal.SIGSTOP)], folder=tmp_path, timeout=12)
    text = ended.texts[0]
    assert ended.codes == [1, None], ended
    assert "rank 0 has waited" in text and f"in {collective} (solver_train.py:" in text and "rank 1 (process" in text and "no sign of life" in text, text
    assert text.index("rank 0 has waited") < text.index("lost another rank")


def test_resumed_at_other_numbers_of_ranks(toy, undisturbed, tmp_path):
    """1, then 3, then 2 ranks (kv heads on one, on all, on both of them): the numbers of the undisturbed run, up to rounding, and a note."""
    script, flags = flags_of("SFT", toy, tmp_path / "run")
    for n, nth, note in ((1, 4, False), (3, 3, True)):
        ended = run(script, flags, n, [("kill", -1, STEP, nth)], folder=tmp_path)
        assert ended.codes == [-signal.SIGKILL] * n and ("not to the bits" in ended.texts[0]) == note, ended.texts
    ended = run(script, flags, 2, folder=tmp_path)
    assert ended.ok and "was saved by 3 tensor-parallel ranks, here are 2" in ended.texts[0], ended.texts
    mine, expected = metrics_of(tmp_path / "run"), metrics_of(undisturbed)
    for key in expected:
        assert mine[key]["loss"] == pytest.approx(expected[key]["loss"], abs=1e-5), key


def test_a_verifier_resumed_at_another_number_of_ranks_counts_every_judgement_once(toy, tmp_path):
    """The accuracy of a line of the log: what was judged before the kill had counted once for each of the ranks that were there."""
    for name, n in (("whole", 1), ("run", 2)):
        script, flags = flags_of("verifier", toy, tmp_path / name, log_steps=4, max_steps=4, save_steps=1)
        ended = run(script, flags, n, [("kill", -1, STEP, 2)] if n == 2 else (), folder=tmp_path)
        assert ended.ok == (n == 1), ended.texts
    ended = run(script, flags, 1, folder=tmp_path)
    assert ended.ok and "was saved by 2 tensor-parallel ranks" in ended.texts[0], ended.texts
    assert metrics_of(tmp_path / "run")["train", 4]["accuracy"] == metrics_of(tmp_path / "whole")["train", 4]["accuracy"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_fills_up_while_saving(toy, undisturbed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        script, flags = flags_of("SFT", toy, disk / "run", log_dir=tmp_path / "log")
        ended = run(script, flags, 2, [("no_space_check", -1)], folder=tmp_path)        # the third save or so does not fit
        assert ended.codes == [1, 1] and any("No space left on device" in text for text in ended.texts), ended.texts
        kept, expected = saves_of(disk / "run"), saves_of(undisturbed)
        assert kept and all(expected[name] == files for name, files in kept.items())
        assert not list((disk / "run").glob(".tmp-*"))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


# ---- invariants ----------------------------------------------------------------------------------------------------


def _model(toy, lora=None):
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.parallel import groups
    from llama_rlhf.parallel.layers import Lora
    groups.initialize(int(os.environ["TP"]), device="cpu", timeout_seconds=60)
    return groups, load_model(str(toy / "hf"), lora=lora and Lora(*lora))


def _drift(toy, tp, name):
    """What the checks say before and after one number of one rank is changed."""
    os.environ["TP"] = str(tp)
    groups, model = _model(toy)
    from llama_rlhf import invariants
    from llama_rlhf.trainer import Trainer
    trainers = {"model": Trainer(model, lr=1e-3, total_steps=3)}

    def row(name):      # of wqkv the first of this rank's first kv head, which with 9 and 3 heads on 2 ranks rank 0 holds too
        return dict(model.named_parameters())[name].data.flatten(0, -2)[model.layers[0].attention.wqkv.sizes[0]] if "wqkv" in name else \
            dict(model.named_parameters())[name].data.view(-1)

    invariants.running({"model": model}, trainers, step=1, grad_norm=1.0)
    said = []
    for change in ("weight", "norm", "step"):
        if groups.rank() == 1:
            if change == "weight":
                row(name)[-1] += 1e-3
            if change == "step":
                trainers["model"].n_steps += 1
        try:
            invariants.running({"model": model}, trainers, step=1, grad_norm=1.0 + (change == "norm") * groups.rank())
        except ValueError as error:
            said.append(str(error))
        if groups.rank() == 1 and change == "weight":
            row(name)[-1] -= 1e-3
    return said


@pytest.mark.parametrize("tp,name", [(2, "layers.0.attention_norm.weight"), (2, "layers.0.attention.wqkv.weight"), (1, "layers.0.feed_forward.w2.weight")])
def test_ranks_that_drift_apart_are_noticed_on_all(tp, name, toy):
    """A norm; a kv head that both ranks hold; any weight of a replica."""
    results = run_ranks(2, _drift, toy, tp, name)
    for said in results:
        weight, norm, step = said if len(said) == 3 else (said, None, None)
        assert name.split(".")[2] in weight and "on rank 0" in weight and "on rank 1" in weight, said
        assert "gradient norm: 1.0 on rank 0, 2.0 on rank 1" in norm and "optimizer steps: (0, 0) on rank 0, (1, 0) on rank 1" in step


def _doctor(toy, mistake):
    os.environ["TP"] = "2"
    groups, model = _model(toy, (2, 4.0))
    from llama_rlhf import invariants
    from llama_rlhf.data import Example
    from llama_rlhf.parallel import layers
    from llama_rlhf.tokenizer import load_tokenizer
    tokenizer = load_tokenizer(str(toy / "hf"))
    rows = [Example(tokenizer.encode(f"{n}+1?\n", bos=True) + tokenizer.encode(f"{n + 1}", eos=True), 6, str(n)) for n in range(3)]
    if mistake == "two beginnings":
        rows[1].tokens.insert(1, tokenizer.bos_id)
    elif mistake == "no end":
        rows[2].tokens.pop()
    elif mistake == "cache":
        forward = type(model).forward
        model.forward = lambda tokens, rows, cache=None, at=None: forward(model, tokens, rows, cache, at) * (1.0 if cache is None else 1.1)
    elif mistake == "adapters":
        factors = layers._factors
        layers._factors = lambda module, dtype: (factors(module, dtype)[0], factors(module, dtype)[1] + 1e-4)
    elif mistake == "not a number" and groups.rank() == 1:
        next(model.parameters()).data[0, 0] = float("nan")
    lines = []
    groups.log = lambda text: lines.append(text)
    with pytest.raises(SystemExit) as left:
        invariants.start({"model": model}, {}, tokenizer, rows, step=0, max_seq_len=64, doctor=True)
    return left.value.code, [line for line in lines[0].splitlines() if line.startswith("FAILED")]


@pytest.mark.parametrize("mistake,said", [("", None), ("two beginnings", "one beginning token: not records 1"), ("no end", "last label is the end token: not records 2"),
                                          ("cache", "cached decoding equals"), ("adapters", "new adapters change nothing"), ("not a number", "weights are finite: 1 par")])
def test_the_doctor_finds_each_planted_mistake(mistake, said, toy):
    for code, failed in run_ranks(2, _doctor, toy, mistake):
        assert code == (1 if said else 0) and bool(failed) == bool(said) and any(said in line for line in failed) == bool(said) if said else not failed, failed


def test_the_doctor_of_each_script(toy, tmp_path):
    for kind in ("SFT", "verifier", "PPO"):
        script, flags = flags_of(kind, toy, tmp_path / kind, doctor=True)
        ended = run(script, flags, 2, folder=tmp_path)
        assert ended.ok and " 0 failed" in ended.texts[0] and "step 1/" not in ended.texts[0], ended.texts
        assert saves_of(tmp_path / kind) == {}


# ---- steps that are skipped ----------------------------------------------------------------------------------------


def _bad_gradient(toy, tp, spike):
    """A gradient that is not a number, or large, on one rank only."""
    os.environ["TP"] = str(tp)
    groups, model = _model(toy)
    from llama_rlhf.trainer import Trainer, response_logprobs
    trainer = Trainer(model, lr=1e-2, total_steps=9, max_skipped_steps=2, skip_grad_norm_above=spike)
    weight = model.layers[0].feed_forward.w2.weight
    loss = lambda _: -response_logprobs(model, [[5, 6, 7, 8]], [1]).sum()  # noqa: E731
    before = weight.detach().clone()
    wrong = weight.register_hook(lambda g: g + (groups.rank() == 1) * (1e6 if spike > 0 else float("nan")))
    trainer.last_save = "runs/x/step-7"
    first = trainer.step([0], loss, lambda _: 3)
    same = torch.equal(before, weight)
    with pytest.raises(FloatingPointError, match="2 steps in a row.*last good checkpoint is runs/x/step-7"):
        trainer.step([0], loss, lambda _: 3)
    wrong.remove()
    good = trainer.step([0], loss, lambda _: 3)
    return first.skipped, same, good.skipped, trainer.skipped_steps, torch.equal(before, weight)


@pytest.mark.parametrize("spike", [-1.0, 1e4])
@pytest.mark.parametrize("tp", [2, 1])
def test_all_ranks_skip_a_step_that_is_bad_on_one(tp, spike, toy):
    assert run_ranks(2, _bad_gradient, toy, tp, spike) == [(True, True, False, 2, False)] * 2


def _own_folder(folder):
    from llama_rlhf.checkpoint import store
    from llama_rlhf.parallel import groups
    groups.initialize(device="cpu")
    store.check_writable(str(folder / "shared"))
    own = folder / f"node-{groups.rank()}"
    own.mkdir()
    with pytest.raises(ValueError, match="is not the folder that rank 0"):
        store.check_writable(str(own))
    return os.listdir(folder / "shared") + os.listdir(own)


def test_nodes_that_do_not_share_the_save_dir_are_told(tmp_path):
    """Each rank's path leads to a folder of its own, as on two nodes with a disk each; no probe is left behind."""
    assert run_ranks(2, _own_folder, tmp_path) == [[], []]


def test_torchrun_restarts_what_died_and_it_ends_as_if_nothing_had_been(tmp_path):
    """Under --max-restarts, faults planted in 5 % of 60 steps; the store of torchrun outlives the ranks, with the addresses of the dead."""
    done = subprocess.run([sys.executable, os.path.join(os.path.dirname(jobs.__file__), "kills.py"), "soak", "--quick", "--rate", "0.05"],
                          capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 and "final save equals the undisturbed run's: True" in done.stdout, done.stdout[-3000:]


def _save(folder, step, saved_with):
    """A save of a run that saved to the folders `saved_with`, as far as `find_start` looks: one file and its manifest."""
    from llama_rlhf.checkpoint import store
    from llama_rlhf.checkpoint.convert import FORMAT, seal
    os.makedirs(path := os.path.join(folder, f"step-{step}"))
    content = {"format": FORMAT, "config": {}, "step": step, "run": {"identity": RUN, "folders": [str(f) for f in saved_with]},
               "files": {"a.json": store.write_json(os.path.join(path, "a.json"), step)}}
    store.write_json(os.path.join(path, "manifest.json"), {**content, "sha256": seal(content)})
    return path


RUN = {"arguments": {}, "tensor_parallel": 1}


def _flip(path):
    data = bytearray(open(path, "rb").read())
    data[len(data) // 2] ^= 1
    open(path, "wb").write(data)


def _start(*folders):
    """What `find_start` begins with (the steps), or its refusal; and what the folders hold then."""
    from llama_rlhf.checkpoint import store
    try:
        paths, _ = store.find_start([str(folder) for folder in folders], RUN, "auto")
        start = [os.path.basename(path) for path in paths]
    except ValueError as error:
        start = str(error)
    return start, *(sorted(os.listdir(folder)) for folder in folders)


def test_no_save_is_removed_that_is_not_computed_again(world_of_one, tmp_path, capsys):
    """Roles that do not go together are refused; what is damaged, or has lost its partner, keeps its files under another name."""
    def run(name, actor, critic, elsewhere=None):
        folders = [tmp_path / name / role for role in ("actor", "critic")]
        for folder, steps in zip(folders, (actor, critic)):
            folder.mkdir(parents=True)
            for step in steps:
                _save(folder, step, [tmp_path / elsewhere / role for role in ("actor", "critic")] if elsewhere else folders)
        return folders

    (whole := run("whole", (1, 2), (1, 2)))[0].joinpath(".tmp-step-3").mkdir()         # left half written
    assert _start(*whole) == (["step-2", "step-2"], ["step-1", "step-2"], ["step-1", "step-2"])
    assert _start(*run("died", (1,), (1, 2))) == (["step-1", "step-1"], ["step-1"], ["step-1"])
    assert _start(*run("died-at-first", (), (1,))) == (["", ""], [], [])
    # another folder was given for the critic, or for the actor
    for name, actor, critic, holder, lacks in (("typo", (1, 2), (), "actor", "critic"), ("other", (), (1, 2), "critic", "actor"), ("half", (1, 2, 3), (1,), "actor", "critic")):
        refusal, *held = _start(*run(name, actor, critic))
        assert f"{tmp_path / name / holder} holds step-" in refusal and f"{tmp_path / name / lacks} does not" in refusal
        assert held == [[f"step-{n}" for n in steps] for steps in (actor, critic)]
    refusal, *held = _start(*run("mixed", (), (1,), elsewhere="old"))
    assert f"a run that saved to {tmp_path / 'old/actor'} and {tmp_path / 'old/critic'}." in refusal and held == [[], ["step-1"]]
    assert _start(*run("moved", (1,), (1, 2), elsewhere="old")) == (["step-1", "step-1"], ["step-1"], ["step-1", "step-2.alone"])
    # damaged: weights, and the manifest
    for file in ("a.json", "manifest.json"):
        folders = run(f"damaged-{file}", (1, 2), (1, 2))
        _flip(folders[1] / "step-2" / file)
        assert _start(*folders) == (["step-1", "step-1"], ["step-1", "step-2.alone"], ["step-1", "step-2.corrupt"])
        for folder in folders:
            _save(folder, 2, folders)
        _flip(folders[1] / "step-2" / file)
        assert _start(*folders) == (["step-1", "step-1"], ["step-1", "step-2.alone", "step-2.alone-2"], ["step-1", "step-2.corrupt", "step-2.corrupt-2"])
        folders = run(f"only-{file}", (2,), (2,))
        _flip(folders[1] / "step-2" / file)
        assert _start(*folders) == (["", ""], ["step-2.alone"], ["step-2.corrupt"])
    assert "is moved aside as" in capsys.readouterr().out


def test_a_save_that_cannot_be_entered_is_named_and_left_where_it_is(world_of_one, tmp_path, monkeypatch):
    """It read as one without a manifest, was moved aside as damaged, and the run went back to the save before."""
    from llama_rlhf.checkpoint import store
    for step in (1, 2):
        _save(tmp_path, step, [tmp_path])
    stat = os.stat

    def closed(path, **more):
        if os.path.dirname(str(path)) == str(tmp_path / "step-2"):
            raise PermissionError(13, "Permission denied", path)
        return stat(path, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", closed)
        refusal, held = _start(tmp_path)
        with pytest.raises(ValueError, match="step-2 cannot be looked into: Permission denied"):
            store.find(str(tmp_path))
    assert "step-2 cannot be looked into: Permission denied. Change what is in the way" in refusal and held == ["step-1", "step-2"]
    assert _start(tmp_path) == (["step-2"], ["step-1", "step-2"])


def test_only_what_a_cut_off_save_or_removal_left_is_cleared(world_of_one, tmp_path):
    """An export that is being written beside the saves is not the run's."""
    _save(tmp_path, 1, [tmp_path])
    for name in (".tmp-step-2", ".tmp-epoch-1", ".tmp-removed-step-1", ".tmp-merged"):
        (tmp_path / name).mkdir()
    assert _start(tmp_path) == (["step-1"], [".tmp-merged", "step-1"])


def test_the_folder_of_the_model_is_no_place_for_saves(world_of_one, tmp_path):
    """The same path would then stand for the model, when the run begins, and for its newest save, when it is continued."""
    from llama_rlhf.checkpoint import store
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "sft").mkdir()
    for folder in (tmp_path, tmp_path / "link"):
        with pytest.raises(ValueError, match="holds the model to start from.*Save in another folder"):
            store.find_start([str(folder)], {**RUN, "started_from": {"model": str(tmp_path), "critic": ""}}, "auto")
    assert store.find_start([str(tmp_path / "sft")], {**RUN, "started_from": {"model": str(tmp_path), "critic": ""}}, "auto") == ([""], {})


@pytest.mark.parametrize("code,ok", [("EINVAL", True), ("ENOTSUP", True), ("EIO", False)])
def test_a_file_system_that_flushes_no_folders_can_be_saved_to(code, ok, world_of_one, tmp_path, monkeypatch):
    """fsync of a folder is refused by some network file systems; a disk that fails in it is another matter."""
    import errno
    import stat

    from llama_rlhf.checkpoint import store
    flush = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
        flush(descriptor)
    monkeypatch.setattr(os, "fsync", fsync)
    save = lambda: store.publish(str(tmp_path / "step-1"), lambda folder: {"a.json": store.write_json(os.path.join(folder, "a.json"), 1)}, {"step": 1}, n_bytes=9)  # noqa: E731
    if ok:
        save()
    else:
        with pytest.raises(ValueError, match="could not be saved: Input/output error"):
            save()
    assert os.listdir(tmp_path) == ["step-1"] * ok


def test_any_edited_record_makes_other_training_data():
    """Of data of the size of GSM8K too; beside the flags nothing else tells a continued run that a file was edited."""
    from llama_rlhf import invariants
    from llama_rlhf.data import Example
    fingerprints = {invariants.fingerprint([Example([1, 2, 3 + (n == edited)], 1, n) for n in range(7473)]) for edited in (-1, 0, 1, 2, 3, 5000, 7472)}
    assert len(fingerprints) == 7


@pytest.mark.parametrize("file", ["manifest.json", "a.json"])
def test_a_save_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(file, world_of_one, tmp_path, monkeypatch):
    """A file server that is away for a moment: the run ends, with everything in its place, and the next start continues from the newest save."""
    import builtins
    import errno
    for step in (1, 2):
        _save(tmp_path, step, [tmp_path])
    real = open

    def stale(path, *args, **kwargs):
        if str(path).endswith(f"step-2/{file}"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(path, *args, **kwargs)
    with monkeypatch.context() as patched:
        patched.setattr(builtins, "open", stale)
        refusal, held = _start(tmp_path)
    assert "Stale file handle" in refusal and file in refusal and held == ["step-1", "step-2"], (refusal, held)
    assert _start(tmp_path) == (["step-2"], ["step-1", "step-2"])


def _stale_on_one(folder):
    """Rank 1 alone cannot read its share of the files."""
    from llama_rlhf.checkpoint import store
    from llama_rlhf.parallel import groups
    groups.initialize(device="cpu")
    sha256 = store._sha256

    def fails(file):
        if groups.rank() == 1:
            raise OSError(5, "Input/output error")
        return sha256(file)
    store._sha256 = fails
    return _start(folder)


def test_all_ranks_end_where_one_cannot_read_the_save(tmp_path):
    from llama_rlhf.checkpoint import store
    from llama_rlhf.checkpoint.convert import FORMAT, seal
    path = _save(tmp_path, 1, [tmp_path])
    content = {"format": FORMAT, "config": {}, "step": 1, "run": {"identity": RUN, "folders": [str(tmp_path)]},
               "files": {name: store.write_json(os.path.join(path, name), 1) for name in ("a.json", "b.json")}}
    store.write_json(os.path.join(path, "manifest.json"), {**content, "sha256": seal(content)})
    for refusal, held in run_ranks(2, _stale_on_one, tmp_path):
        assert "is the save to continue from" in refusal and "Input/output error" in refusal and held == ["step-1"], refusal


def test_a_save_that_was_moved_and_linked_to_is_left_where_it_is(world_of_one, tmp_path):
    from llama_rlhf.checkpoint import store
    _save(tmp_path / "archive", 1, [])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/step-1").symlink_to(tmp_path / "archive/step-1")
    _save(tmp_path / "run", 2, [])
    store.keep_newest(str(tmp_path / "run"), 1, set())
    assert os.listdir(tmp_path / "run") == ["step-2"] and os.path.exists(tmp_path / "archive/step-1/manifest.json")


def test_a_save_is_on_the_disk_before_it_has_its_name(world_of_one, tmp_path, monkeypatch):
    """A machine that loses power keeps what was synchronised, in whatever order the rest was written: every file whole, then the folder, then its name."""
    from toys import add_bytes_tokenizer, make_hf

    from llama_rlhf.checkpoint.shards import load_model, save_model
    from llama_rlhf.trainer import Trainer
    make_hf(tmp_path / "hf", "llama-9-3")
    add_bytes_tokenizer(tmp_path / "hf")
    model = load_model(str(tmp_path / "hf"))
    events, fsync, rename = [], os.fsync, os.rename

    def seen(descriptor):
        status = os.fstat(descriptor)
        events.append((status.st_ino, status.st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    monkeypatch.setattr(os, "rename", lambda *args: (events.append("renamed"), rename(*args)))
    save_model(model, str(tmp_path / "run/save"), companions=str(tmp_path / "hf"), trainer=Trainer(model, lr=1.0, total_steps=1))
    monkeypatch.undo()
    at, files = events.index("renamed"), [path.stat() for path in (tmp_path / "run/save").iterdir()]
    assert len(files) >= 5 and {(file.st_ino, file.st_size) for file in files} <= set(events[:at - 1])
    assert [event[0] for event in (events[at - 1], events[at + 1])] == [(tmp_path / name).stat().st_ino for name in ("run/save", "run")]


def test_a_save_whose_tokenizer_is_gone_says_so_and_takes_no_other(world_of_one, tmp_path, capsys):
    """The folder that a run began from was removed while it ran: its saves had no tokenizer, without a word, or that of a folder above."""
    from toys import add_bytes_tokenizer, make_hf

    from llama_rlhf.checkpoint.shards import load_model, save_model
    make_hf(tmp_path / "hf", "llama-9-3")
    for folder in (tmp_path, tmp_path / "hf"):
        add_bytes_tokenizer(folder)
    model = load_model(str(tmp_path / "hf"))
    save_model(model, str(tmp_path / "run/step-1"), companions=str(tmp_path / "hf"))
    assert "note" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "hf")
    save_model(model, str(tmp_path / "run/step-2"), companions=str(tmp_path / "hf"))
    assert f"{tmp_path / 'hf'} has no tokenizer's files, so {tmp_path / 'run/step-2'} is saved without" in capsys.readouterr().out
    assert [(tmp_path / f"run/step-{n}/tokenizer.bytes.json").exists() for n in (1, 2)] == [True, False]


def test_old_saves_go_the_newest_and_the_spared_stay(world_of_one, tmp_path, monkeypatch):
    """What is half removed has lost its name before its files; a folder of saves stands for the newest of them."""
    from llama_rlhf.checkpoint import store
    for step in (1, 2, 9, 10):
        _save(tmp_path, step, [tmp_path])
    os.makedirs(tmp_path / "step-11")                       # no manifest: not a save
    store.keep_newest(str(tmp_path), -1, set())
    assert store.complete_saves(str(tmp_path)).keys() == {1, 2, 9, 10} and store.resolve(str(tmp_path)) == str(tmp_path / "step-10")
    removed = []
    monkeypatch.setattr(store.shutil, "rmtree", lambda path, **_: removed.append(os.path.basename(path)))
    store.keep_newest(str(tmp_path), 2, {1})
    assert sorted(name for name in os.listdir(tmp_path) if name[0] != ".") == ["step-1", "step-10", "step-11", "step-9"]
    assert set(removed) == {".tmp-removed-step-2"}
    store.keep_newest(str(tmp_path), 1, set())
    assert store.complete_saves(str(tmp_path)).keys() == {10}


def test_a_manifest_that_does_not_fit_its_folder_is_refused(tmp_path):
    import json

    from llama_rlhf.checkpoint.convert import FORMAT, read_manifest, seal
    folder = _save(tmp_path, 7, [tmp_path])
    manifest, good = os.path.join(folder, "manifest.json"), read_manifest(folder)
    assert good["step"] == 7 and read_manifest(str(tmp_path)) is None
    for change, said in (({"step": 8}, "corrupt: it does not have the SHA-256"), ({"format": "llama_rlhf/0"}, f"this version reads '{FORMAT}'"),
                         ({"files": {"../a.json": {}}}, "illegal entry '../a.json'"), ({"files": {"a.json": 3}}, "illegal entry"), ({"config": None}, "lacks 'files' or 'config'")):
        changed = good | change
        with open(manifest, "w") as file:
            json.dump(changed if "step" in change else changed | {"sha256": seal(changed)}, file)
        with pytest.raises(ValueError, match=said):
            read_manifest(folder)
    with open(manifest, "w") as file:
        json.dump(good, file)
    with open(os.path.join(folder, "a.json"), "a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match="3 bytes, the manifest says 2 bytes: truncated or replaced"):
        read_manifest(folder)
    os.remove(os.path.join(folder, "a.json"))
    with pytest.raises(ValueError, match="a.json: is missing"):
        read_manifest(folder)
