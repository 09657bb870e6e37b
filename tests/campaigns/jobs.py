"""Run the training scripts on forked ranks and do them harm at a chosen place: what kills.py is made of.

A rank is a process of the real script, forked from a server that has imported torch once. A plant is a tuple (name, rank or -1 for
all, arguments) that changes a function before the script starts, so that the process dies, stops, or errs there.
"""

import functools
import hashlib
import importlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests/campaigns"), *filter(None, [os.environ.get("PYTHONPATH")])])
_context = multiprocessing.get_context("forkserver")
PRELOAD = ["torch", "torch._dynamo", "fire", "tqdm", "llama_rlhf.ppo", "llama_rlhf.roles", "llama_rlhf.evaluation", "llama_rlhf.runlog", "jobs"]       # the optimizer imports torch._dynamo: a second


# ---- what a rank does ----------------------------------------------------------------------------------------------


def die(delay: float = 0.0, how: int = signal.SIGKILL) -> None:
    """End this process now, or `delay` seconds from now, whatever it does then."""
    if delay:
        threading.Thread(target=lambda: (time.sleep(delay), os.kill(os.getpid(), how)), daemon=True).start()
    else:
        os.kill(os.getpid(), how)


def change(target: str, wrap) -> None:
    """Replace module:function or module:Class.method by wrap(function)."""
    module, _, path = target.partition(":")
    *outer, name = path.split(".")
    owner = functools.reduce(getattr, outer, importlib.import_module(module))
    setattr(owner, name, functools.wraps(getattr(owner, name))(wrap(getattr(owner, name))))


def at_call(target: str, nth: int, do) -> None:
    """do() before the nth call of the target."""
    calls = itertools.count(1)

    def wrap(function):
        def wrapped(*args, **kwargs):
            if next(calls) == nth:
                do()
            return function(*args, **kwargs)
        return wrapped
    change(target, wrap)


def kill(target, nth=1, delay=0.0, how=signal.SIGKILL):
    at_call(target, nth, lambda: die(delay, how))


def fail(target, nth=1):
    def error():
        raise ValueError("a planted error")
    at_call(target, nth, error)


def kill_at_event(save, event, seen):
    """Die before the event-th thing that touches the disk or another rank during the save-th save; event 0: write their names to `seen`."""
    names, state = [], {"saves": 0, "inside": False}

    def wrap_event(name):
        def wrap(function):
            def wrapped(*args, **kwargs):
                if state["inside"]:
                    names.append(f"{name} {os.path.basename(str(args[0]))[:28]}" if name in ("open", "makedirs", "rename", "rmtree") else name)
                    if len(names) == event:
                        die()
                return function(*args, **kwargs)
            return wrapped
        return wrap

    def wrap_save(counts):
        def wrap(function):
            def wrapped(*args, **kwargs):
                state["saves"] += counts
                state["inside"] = state["saves"] == save
                result = function(*args, **kwargs)
                state["inside"] = False
                if not event and state["saves"] == save:
                    Path(seen).write_text(json.dumps(names))
                return result
            return wrapped
        return wrap
    for target, name in (("builtins:open", "open"), ("os:makedirs", "makedirs"), ("os:rename", "rename"), ("os:rmdir", "rmdir"), ("os:fsync", "fsync"),
                         ("shutil:rmtree", "rmtree"), ("llama_rlhf.checkpoint.writer:PthWriter.write", "tensor"),
                         ("llama_rlhf.parallel.groups:gather_objects", "meet the other ranks")):
        change(target, wrap_event(name))
    change("llama_rlhf.checkpoint.store:publish", wrap_save(1))
    change("llama_rlhf.checkpoint.store:keep_newest", wrap_save(0))


def kill_in_save(nth, delay):
    """Die `delay` seconds after the nth save of this process began."""
    kill("llama_rlhf.checkpoint.store:publish", nth, delay or 1e-6)


def time_saves(path):
    seconds = []

    def wrap(function):
        def wrapped(*args, **kwargs):
            began = time.monotonic()
            function(*args, **kwargs)
            seconds.append(time.monotonic() - began)
            Path(path).write_text(json.dumps(seconds))
        return wrapped
    change("llama_rlhf.checkpoint.store:publish", wrap)


def put_in_the_way(path):
    """A file, once the run has started and is about to save."""
    at_call("llama_rlhf.checkpoint.store:publish", 1, lambda: Path(path).write_text(""))


def become_nobody():
    at_call("llama_rlhf.checkpoint.store:check_writable", 1, lambda: os.setuid(65534))


def no_space_check():
    """As if another program filled the disk after the space was checked."""
    change("llama_rlhf.checkpoint.store:check_free_space", lambda function: lambda *args: None)


def trap(kind):
    """A mistake in resuming, which a comparison of runs must notice."""
    resumed = {"step": 0}

    def find_start(function):
        def wrapped(*args):
            starts, manifest = function(*args)
            resumed["step"] = manifest.get("step", 0)
            if kind == "data position off by one" and starts[0]:
                manifest["step"] += 1
            return starts, manifest
        return wrapped
    change("llama_rlhf.checkpoint.store:find_start", find_start)
    if kind == "random numbers not restored":       # a generator that starts over when the run is resumed
        change("llama_rlhf.data:batches", lambda f: lambda *a, **o: f(*a, **{**o, "seed": o["seed"] + resumed["step"]}))
        change("llama_rlhf.rollout:collect", lambda f: lambda *a, **o: f(*a, **{**o, "iteration": o["iteration"] - resumed["step"]}))
    if kind == "moments not restored":
        change("llama_rlhf.trainer:Trainer.load_state_tensors", lambda f: lambda self, state: setattr(self, "n_steps", int(state["counters"][0])))


PLANTS = {f.__name__: f for f in (kill, fail, kill_at_event, kill_in_save, time_saves, put_in_the_way, become_nobody, no_space_check, trap)}


def _rank(script, flags, rank, n, port, out, plants, environment):
    # two local processes at least: then groups.initialize gives each of them one thread on a machine of two cores
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(max(2, n)), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "", **environment}
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = [script, *(f"--{key}={value}" for key, value in flags.items())]
    code = 0
    try:
        for name, whom, *args in plants:
            if whom in (-1, rank):
                PLANTS[name](*args)
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as error:
        code = error.code or 0
    except BaseException:       # noqa: BLE001  the text goes to the file
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


# ---- what the parent sees ------------------------------------------------------------------------------------------


@dataclass
class Ended:
    """codes: exit code of each rank, -9 when killed; None: had to be killed by us.  lag: seconds from the first end to the last.
    disturbed: this machine stood still in between (a laptop asleep, processes stopped by somebody): the seconds mean nothing."""

    codes: list
    texts: list[str]
    lag: float
    seconds: float
    disturbed: bool = False

    @property
    def ok(self):
        return all(code == 0 for code in self.codes)

    def error(self, rank) -> str:
        """The line that a person would read first."""
        lines = [line[line.find("[rank "):] if "[rank " in line else line for line in self.texts[rank].splitlines() if "error: " in line]
        last = [line for line in self.texts[rank].splitlines() if line.strip()]
        return lines[0] if lines else last[-1] if last else ""


def run(script, flags, n=1, plants=(), *, folder, timeout=120.0, environment=()) -> Ended:
    """A script on n ranks without a launcher: nobody but the ranks themselves notices that one has ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = {"device": "cpu", "dtype": "fp32", **flags}
    outs = [str(Path(folder) / f"rank-{rank}.txt") for rank in range(n)]
    processes = [_context.Process(target=_rank, args=(script, flags, rank, n, port, outs[rank], tuple(plants), {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "jobs", **dict(environment)}),
                                  daemon=True) for rank in range(n)]
    for process in processes:       # the first start of all imports torch
        process.start()
    started = time.monotonic()
    ended, still, alive = {}, 0.0, {process.sentinel: rank for rank, process in enumerate(processes)}
    now = started
    while alive and now - started - still < timeout:
        for sentinel in wait(list(alive), timeout=0.5):
            ended[alive.pop(sentinel)] = time.monotonic()
        now, before = time.monotonic(), now
        still += now - before if now - before > 5.0 else 0.0
    late = set(alive.values())
    for rank in late:
        processes[rank].kill()
        ended[rank] = time.monotonic()
    for process in processes:
        process.join()
    codes = [None if rank in late else process.exitcode for rank, process in enumerate(processes)]
    texts = [Path(out).read_text(errors="replace") if os.path.exists(out) else "" for out in outs]
    return Ended(codes, texts, max(ended.values()) - min(ended.values()), max(ended.values()) - started, still > 0)


def make_toy(folder) -> Path:
    """A model of 0.06 M weights with 9 query and 3 kv heads (on 2 ranks a kv head lives on both), bytes for tokens, problems, a reward."""
    import torch
    from safetensors.torch import save_file
    spec = importlib.util.spec_from_file_location("make", ROOT / "examples/arithmetic/make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    folder = Path(folder)
    (folder / "hf").mkdir(parents=True)
    config, tensors = make.make_model(0, dim=72, ffn_dim=50, n_layers=1, n_heads=9, max_seq_len=64, std=0.2)
    tensors = {name: x[:24].clone() if "k_proj" in name or "v_proj" in name else x for name, x in tensors.items()}
    (folder / "hf/config.json").write_text(json.dumps({**config, "num_key_value_heads": 3}))
    (folder / "hf/tokenizer.bytes.json").write_text(json.dumps({"kind": "bytes", "vocab_size": make.VOCAB_SIZE}))
    # a random model seldom draws the one end token: with 60 of them about a fifth of the tokens end a response
    (folder / "hf/generation_config.json").write_text(json.dumps({"eos_token_id": [257, *range(130, 190)]}))
    save_file({name: x.to(torch.float32) for name, x in tensors.items()}, folder / "hf/model.safetensors", metadata={"format": "pt"})
    records = [{"instruction": f"{a}+{b}?", "output": f"{a}+{b}={a + b}\n#### {a + b}"} for a in range(4) for b in range(5)]
    (folder / "train.json").write_text(json.dumps(records))
    (folder / "rewards.py").write_text("def evens(prompt, response, label):\n    return sum(ord(c) % 2 == 0 for c in response) / 8\n")
    return folder


def flags_of(kind, toy, save_dir, **more) -> tuple[str, dict]:
    """(script, flags) of a short run with every source of randomness and state that the script has: two epochs, accumulation of two."""
    if kind == "PPO":
        return "ppo_train.py", dict(actor_ckpt_dir=toy / "hf", actor_save_dir=save_dir, train_file=toy / "train.json", max_buffer_size=8, minibatch_size=4,
                                    max_batch_size=2, max_new_tokens=8, max_iterations=4, epochs=2, actor_lr=1e-3, critic_lr=1e-3, save_steps=1,
                                    keep_last=-1, reward_function=f"{toy / 'rewards.py'}:evens", kl_target=1.0, normalize_scores=True, critic_warmup=0,
                                    max_seq_len=32) | more
    script = {"SFT": "solver_train.py", "verifier": "verifier_train.py"}[kind]
    return script, dict(ckpt_dir=toy / "hf", save_dir=save_dir, train_file=toy / "train.json", max_seq_len=64, max_batch_size=2, accumulation_steps=2,
                        epochs=2, save_steps=2, log_steps=1, lr=1e-2, **({"held_out": 0} if kind == "verifier" else {})) | more


def saves_of(save_dir) -> dict[str, dict[str, str]]:
    """save -> {file: SHA-256 of what is on the disk} of its weights and optimizer states. ValueError when a manifest says otherwise."""
    found = {}
    for manifest in sorted(Path(save_dir).glob("**/manifest.json")):
        if ".tmp-" not in str(manifest) and ".corrupt" not in str(manifest):
            said = json.loads(manifest.read_text())["files"]
            have = {name: hashlib.sha256((manifest.parent / name).read_bytes()).hexdigest() for name in said}
            if wrong := [name for name in said if said[name]["sha256"] != have[name]]:
                raise ValueError(f"{manifest.parent}: {wrong} differ from the manifest")
            found[str(manifest.parent.relative_to(save_dir))] = {name: digest for name, digest in have.items() if name.endswith(".pth")}
    return found


_TIMING = {"time", "run", "seconds", "phases", "peak_memory_gb", "generated_per_second", "tokens_per_second"}


def metrics_of(save_dir) -> dict:
    """(kind, step) -> what the run logged, without times. A step that was computed again counts once, with its last line."""
    found = {}
    for line in (Path(save_dir) / "log/metrics.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue            # cut by the kill
        if record["kind"] not in ("memory", "resumed"):     # a killed run has another peak, and says that it came back
            found[record["kind"], record.get("step")] = {key: value for key, value in record.items() if key not in _TIMING}
    return found
