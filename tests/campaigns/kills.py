"""Kill, starve and cut runs of the training scripts, and count how many recover.

    python tests/campaigns/kills.py save --count 100     # SIGKILL of one rank or both at random moments of saving
    python tests/campaigns/kills.py protocol             # and before every single step of the save protocol
    python tests/campaigns/kills.py disk                 # full, read-only, something in the way (mounts a small tmpfs: root)
    python tests/campaigns/kills.py phases               # one of two ranks in each phase: seconds until the other has ended
    python tests/campaigns/kills.py resume               # killed and continued against undisturbed, and with planted mistakes
    python tests/campaigns/kills.py soak                 # 300 steps under torchrun --max-restarts with a fault in 1 % of them
    python tests/campaigns/kills.py hosts                # two hosts made of network namespaces (root): shared disk, own disks, link cut

CPU only, models of 0.06 M weights, files in a temporary folder. Each prints a table and exits with 1 when anything is lost.
A measurement during which this machine stood still is repeated.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import jobs  # noqa: E402
from jobs import flags_of, make_toy, metrics_of, run, saves_of  # noqa: E402

STEP, BACKWARD = "llama_rlhf.trainer:Trainer.step", "torch:Tensor.backward"
LIMIT = 10.0            # seconds that a clear exit may take


def steady(*args, **kwargs):
    """A job, again when the machine stood still meanwhile. prepare(): puts the files back first."""
    prepare = kwargs.pop("prepare", lambda: None)
    for _ in range(5):
        prepare()
        ended = run(*args, **kwargs)
        if not ended.disturbed:
            break
        print("  (the machine stood still: once more)", file=sys.stderr, flush=True)
    return ended


# ---- killed while saving -------------------------------------------------------------------------------------------


def complain(found: dict, reference: dict) -> list[str]:
    """The saves that are not, bit for bit, what an undisturbed run saved under that name."""
    return [name for name, files in found.items() if files != reference.get(name)]


def save(folder, toy, args):
    """One run of many saves, killed again and again; each start is the proof that the kill before it lost nothing."""
    flags = dict(accumulation_steps=1, save_steps=1, epochs=2 + args.count // 6)
    script, whole = flags_of("SFT", toy, folder / "whole", **flags)
    times = folder / "times"
    assert steady(script, whole, 2, [("time_saves", 0, times)], folder=folder, timeout=600, prepare=lambda: shutil.rmtree(folder / "whole", True)).ok
    reference, length = saves_of(folder / "whole"), statistics.median(json.loads(times.read_text()))
    generator, flags = random.Random(args.seed), flags_of("SFT", toy, folder / "cut", **flags)[1]
    counts, n_before, bad, failed = {"appeared": 0, "did not": 0}, 0, [], []
    for n in range(args.count):
        victim = (0, 1, -1)[n % 3]
        ended = run(script, flags, 2, [("kill_in_save", victim, 1 + generator.randrange(2), generator.uniform(0, 1.5) * length)], folder=folder)
        if ended.codes[max(0, victim)] != -9 or None in ended.codes:
            failed.append((n, ended.codes, ended.error(0)))
        found = saves_of(folder / "cut")
        bad += complain(found, reference)
        counts["appeared" if len(found) > n_before else "did not"] += 1
        n_before = len(found)
    ended = run(script, flags, 2, folder=folder, timeout=600)
    equal = ended.ok and saves_of(folder / "cut") == reference and metrics_of(folder / "cut") == metrics_of(folder / "whole")
    left = [p.name for p in (folder / "cut").iterdir() if p.name.startswith(".tmp-")]
    print(f"{args.count} SIGKILLs (rank 0, rank 1, both in turn), 0 to 1.5 times the length of a save ({length * 1000:.0f} ms) after it began: afterwards a new save "
          f"had appeared in {counts['appeared']} cases, in {counts['did not']} not\nstarts that did not go on: {len(failed)} {failed[:3]}\nsaves that differ from the "
          f"undisturbed run's: {len(bad)} of {n_before} {bad[:3]}\nleft over: {left}\nin the end all saves and metrics equal the undisturbed run's: {equal}")
    return equal and not bad and not failed and not left


def protocol(folder, toy, args):
    """Every step of a save that touches the disk or another rank; for PPO that is two saves and the removal of an old one."""
    all_good = True
    for kind, more, last in (("SFT", dict(epochs=1), "epoch-1"), ("PPO", dict(keep_last=1, max_iterations=3), "step-3")):
        if args.only not in kind:
            continue

        def end_of(name):
            return {save: files for save, files in saves_of(folder / name).items() if save.endswith(last)}
        script, flags = flags_of(kind, toy, folder / f"{kind}-whole", **more)
        assert steady(script, flags, 2, folder=folder, prepare=lambda: shutil.rmtree(folder / f"{kind}-whole", True)).ok      # noqa: B023
        begun = folder / f"{kind}-begun"        # killed after its first saves
        n_saves, nth = (1, 4) if kind == "SFT" else (2, 6)
        run(script, flags_of(kind, toy, begun, **more)[1], 2, [("kill", -1, STEP, nth)], folder=folder)
        flags = flags_of(kind, toy, folder / "cut", **more)[1]

        def copy():
            shutil.rmtree(folder / "cut", ignore_errors=True)
            shutil.copytree(begun, folder / "cut")      # noqa: B023
        rows, wrong = [], []
        for rank in range(2):
            copy()
            listed = run(script, flags, 2, [("kill_at_event", rank, n_saves, 0, folder / "seen")], folder=folder)
            assert listed.ok, listed.texts[rank][-3000:]
            names = json.loads((folder / "seen").read_text())
            chosen = [k for k, name in enumerate(names, 1) if name != "tensor" or (k % 8 == 0 if not args.quick else k % 30 == 0)]
            for k in chosen[:: 6 if args.quick else 1]:
                copy()
                before = saves_of(folder / "cut")
                cut = run(script, flags, 2, [("kill_at_event", rank, n_saves, k, "")], folder=folder)
                between = saves_of(folder / "cut")
                again = run(script, flags, 2, folder=folder)
                good = cut.codes[rank] == -9 and None not in cut.codes and again.ok and end_of("cut") == end_of(f"{kind}-whole") \
                    and all(between.get(name, files) == files for name, files in before.items()) and not list((folder / "cut").glob(".tmp-*"))
                rows.append(f"  rank {rank} before {k:3} {names[k - 1]:40} {'recovered' if good else f'LOST {cut.codes} {again.codes} {again.error(0)}'}")
                print(rows[-1], flush=True)
                wrong += [] if good else [k]
        print(f"{kind}: {len(rows)} SIGKILLs, one before each step of saving, {len(rows) - len(wrong)} recovered to the undisturbed bits")
        all_good &= not wrong
    return all_good


# ---- disks ---------------------------------------------------------------------------------------------------------


def disk(folder, toy, args):
    mount = folder / "small"
    mount.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", mount], capture_output=True).returncode == 0
    if not mounted:
        print("SKIPPED: full and read-only disks (mounting a tmpfs needs root)")
    script, whole = flags_of("SFT", toy, folder / "whole")
    assert steady(script, whole, 2, folder=folder, prepare=lambda: shutil.rmtree(folder / "whole", True)).ok
    reference, table = saves_of(folder / "whole"), []

    def case(name, place, spoil, mend, expect, plants=(), log_dir=None):
        """A run with one save; then the disk is spoilt and the run goes on; then mended, and it goes on again."""
        if args.only not in name:
            return
        target = place / "run"
        flags = flags_of("SFT", toy, target, **({"log_dir": log_dir} if log_dir else {}))[1]

        def prepare():
            for path in (target, log_dir):
                shutil.rmtree(path or "/nonexistent", ignore_errors=True)
            run(script, flags, 2, [("kill", -1, STEP, 4)], folder=folder)       # leaves step-2
            spoil(target)
        ended = steady(script, flags, 2, plants, folder=folder, prepare=lambda: (mend(target), prepare()))
        intact = saves_of(target) == {"step-2": reference["step-2"]}
        mend(target)
        again = run(script, flags, 2, folder=folder)
        lines = [ended.error(0), ended.error(1)]
        good = ended.codes == [1, 1] and any(expect in line for line in lines) and ended.lag < LIMIT and intact and again.ok and saves_of(target) == reference
        table.append(good)
        print(f"{'ok' if good else 'FAILED':7}{name}: all ranks ended within {ended.lag:.1f} s of the first, older save intact: {intact}, next run completes: {again.ok}\n"
              f"         {next((line for line in lines if expect in line), lines)}", flush=True)

    def leave(kilobytes, place=mount):
        def spoil(_):
            free = shutil.disk_usage(place).free
            with open(place / "filler", "wb") as file:
                file.write(bytes(max(0, free - kilobytes * 1024)))
        return spoil

    def remove(name):
        def mend(target):
            path = (target if name.startswith((".", "step")) else mount) / name
            if path.is_file():
                path.unlink()
        return mend
    if mounted:
        try:
            case("full, seen before writing", mount, leave(900), remove("filler"), "no space to save")
            for kilobytes in (600, 300, 150, 40):
                case(f"full after {kilobytes} kB of the save", mount, leave(kilobytes), remove("filler"), "No space left", [("no_space_check", -1)])
            (folder / "elsewhere").mkdir()
            case("full where the log is", folder / "elsewhere", lambda target: (shutil.rmtree(mount / "log"), leave(0)(target)), remove("filler"), "No space left",
                 log_dir=mount / "log")
            shutil.rmtree(mount / "log", ignore_errors=True)
            case("read-only", mount, lambda _: subprocess.run(["mount", "-o", "remount,ro", mount], check=True),
                 lambda _: subprocess.run(["mount", "-o", "remount,rw", mount], check=True), "Read-only")
        finally:
            subprocess.run(["umount", "-l", mount], check=False)
    here = folder / "here"
    here.mkdir()
    for name in ("step-4", ".tmp-step-4"):
        case(f"a file named {name} in the way", here, lambda target: None, remove(name), name, [("put_in_the_way", 0, here / "run" / name)])
    os.chmod(folder, 0o755)
    case("a folder of another user's", here, lambda target: None, lambda target: None, "annot write", [("become_nobody", -1)]) if os.geteuid() == 0 else \
        print("SKIPPED: a folder of another user's (needs root)")
    return all(table)


# ---- one rank of two -----------------------------------------------------------------------------------------------

PHASES = {
    "SFT": {"load": ("llama_rlhf.checkpoint.shards:_fill", 1), "forward": ("llama_rlhf.trainer:token_logprobs", 5), "backward": (BACKWARD, 5),
            "update": ("torch.optim:AdamW.step", 2), "save": ("llama_rlhf.checkpoint.store:_said", 2), "evaluate": ("llama_rlhf.generation:choose", 5)},
    "PPO": {"load": ("llama_rlhf.checkpoint.shards:_fill", 2), "generate": ("llama_rlhf.generation:choose", 5), "score": ("llama_rlhf.rollout:Response", 2),
            "forward": ("llama_rlhf.rollout:response_logprobs", 1), "critic": ("llama_rlhf.ppo:value_loss", 2), "actor": ("llama_rlhf.ppo:policy_loss", 2),
            "save": ("llama_rlhf.checkpoint.store:_said", 2)},
}


def phases(folder, toy, args):
    """No launcher: the survivor has to notice by itself. (torchrun would end it too, within 30 s.)"""
    generator, lags, good = random.Random(args.seed), [], True
    print(f"{'':18}{'tensor parallel: rank 0, 1':>30}{'data parallel: rank 0, 1':>30}   seconds until the other had ended")
    for kind, places in PHASES.items():
        for phase, (target, nth) in places.items():
            if args.only not in f"{kind}/{phase}":
                continue
            row = []
            for size, victim in itertools.product((2, 1), (0, 1)):
                target_dir = folder / "run"
                script, flags = flags_of(kind, toy, target_dir, model_parallel_size=size, **({"label_file": toy / "train.json", "max_new_tokens": 8} if kind == "SFT" else {}))
                ended = steady(script, flags, 2, [("kill", victim, target, nth, generator.uniform(0, 0.02) if not args.quick else 0.0)], folder=folder,
                               prepare=lambda: shutil.rmtree(target_dir, True))     # noqa: B023
                clear = ended.codes[victim] == -9 and ended.codes[1 - victim] == 1 and "lost another rank" in ended.texts[1 - victim]
                row.append(ended.lag if clear else None)
                good &= clear and ended.lag < LIMIT
                if not clear:
                    print(f"  {kind} {phase}: {ended.codes}, {ended.error(1 - victim)}")
            lags += [lag for lag in row if lag is not None]
            print(f"  {kind:4}{phase:12}" + "".join(f"{'FAILED' if lag is None else f'{lag:.2f}':>{20 if n % 2 == 0 else 10}}" for n, lag in enumerate(row)), flush=True)
    print(f"{len(lags)} kills with a clear exit: median {statistics.median(lags):.2f} s, max {max(lags):.2f} s")
    return good


# ---- killed and continued ------------------------------------------------------------------------------------------

# where to kill: the call that is not reached. SFT and verifier: 5 steps (3 with two replicas) of 2 micro-batches; PPO: 8 steps per iteration, 2 iterations an epoch
POINTS = {"mid-epoch": {"SFT": (STEP, 4), "verifier": (STEP, 4), "PPO": (STEP, 10)},
          "epoch boundary": {"SFT": (STEP, 6), "verifier": (STEP, 6), "PPO": (STEP, 17)},
          "mid-accumulation": {"SFT": (BACKWARD, 8), "verifier": (BACKWARD, 8), "PPO": (BACKWARD, 28)}}
DP_POINTS = {"mid-epoch": (STEP, 3), "epoch boundary": (STEP, 4), "mid-accumulation": (BACKWARD, 2)}
LAYOUTS = {"1 rank": (1, {}), "2 tensor-parallel": (2, {}), "2 data-parallel": (2, {"model_parallel_size": 1})}


def differences(a, b) -> list[str]:
    """Between two finished runs: metrics and, in their last save, weights and optimizer states."""
    one, other = saves_of(a), saves_of(b)
    last = [name for name in one if Path(name).name in ("epoch-2", "step-4")]
    found = [f"weights of {name}" for name in last if one[name] != other.get(name)] if last else ["no last save"]
    x, y = metrics_of(a), metrics_of(b)
    return found + [f"metrics {key}" for key in x if x[key] != y.get(key)]


def killed_and_continued(kind, layout, lora_rank, point, folder, toy, reference, traps=()):
    n, more = LAYOUTS[layout]
    target, nth = POINTS[point][kind] if layout != "2 data-parallel" or kind == "PPO" else DP_POINTS[point]
    script, flags = flags_of(kind, toy, folder / "cut", lora_rank=lora_rank, **more)
    shutil.rmtree(folder / "cut", ignore_errors=True)
    cut = run(script, flags, n, [("kill", -1, target, nth)], folder=folder)
    again = run(script, flags, n, [("trap", -1, trap) for trap in traps], folder=folder)
    if -9 not in cut.codes or not again.ok:
        return [f"codes {cut.codes}, {again.codes}: {again.error(0)}"]
    return differences(reference, folder / "cut")


def resume(folder, toy, args):
    good = True
    print(f"{'':34}" + "".join(f"{point:>20}" for point in POINTS))
    for kind, lora_rank, layout in itertools.product(("SFT", "verifier", "PPO"), (-1, 2), LAYOUTS if not args.quick else ["2 tensor-parallel"]):
        if args.only not in f"{kind}/{'LoRA' if lora_rank > 0 else 'full'}/{layout}":
            continue
        reference = folder / f"{kind}-{lora_rank}-{layout[:8]}"
        n, more = LAYOUTS[layout]
        script, flags = flags_of(kind, toy, reference, lora_rank=lora_rank, **more)
        assert run(script, flags, n, folder=folder).ok
        cells = [killed_and_continued(kind, layout, lora_rank, point, folder, toy, reference) for point in POINTS]
        print(f"  {kind:9}{'LoRA' if lora_rank > 0 else 'full':6}{layout:19}" + "".join(f"{'bitwise equal' if not cell else 'DIFFERS':>18}  " for cell in cells), flush=True)
        for cell in cells:
            if cell:
                print("    ", cell[:4])
                good = False
        if layout == "2 tensor-parallel" and lora_rank == -1:
            for trap in ("random numbers not restored", "data position off by one", "moments not restored"):
                found = killed_and_continued(kind, layout, lora_rank, "mid-epoch", folder, toy, reference, [trap])
                print(f"     planted: {trap}: {'noticed (' + found[0] + ')' if found else 'NOT NOTICED'}", flush=True)
                good &= bool(found)
    return good


# ---- soak ----------------------------------------------------------------------------------------------------------


def inner(arguments):
    """What torchrun starts: a script with faults planted by a seed, the same plan on all ranks, carried out by the victim."""
    import runpy
    plan = json.loads(arguments[0])
    rank, attempt, calls = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"], itertools.count()
    log = open(f"{plan['log']}-{rank}.jsonl", "a")

    def wrap(function):
        def wrapped(self, *args, **kwargs):
            step = self.n_steps
            draw = random.Random(f"{plan['seed']}/{attempt}/{step}")
            fault = draw.choice(("SIGKILL", "SIGKILL in 30 ms", "error", "SIGTERM")) if draw.random() < plan["rate"] else None
            status = dict(line.split(":", 1) for line in open("/proc/self/status"))
            log.write(json.dumps({"attempt": int(attempt), "step": step, "n": next(calls), "fault": fault, "kB": int(status["RssAnon"].split()[0]),
                                  "files": len(os.listdir("/proc/self/fd")), "threads": int(status["Threads"])}) + "\n")
            log.flush()
            if fault and draw.randrange(2) == rank:
                if fault == "error":
                    raise ValueError("a planted error")
                jobs.die(0.03 if "30 ms" in fault else 0.0, signal.SIGTERM if fault == "SIGTERM" else signal.SIGKILL)
            return function(self, *args, **kwargs)
        return wrapped
    jobs.change(STEP, wrap)
    sys.argv = arguments[1:]
    sys.path.insert(0, str(jobs.ROOT))
    runpy.run_path(str(jobs.ROOT / sys.argv[0]), run_name="__main__")


def torchrun(*arguments, environment=(), **options):
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    return subprocess.Popen(command, cwd=jobs.ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **dict(environment)},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def words(flags):
    return [word for key, value in {"device": "cpu", "dtype": "fp32", **flags}.items() for word in (f"--{key}", str(value))]


def _shared_files() -> set[str]:
    """This toolkit's in /dev/shm; other programs make theirs meanwhile."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("llama_rlhf-")}


def soak(folder, toy, args):
    steps = 60 if args.quick else 300
    script, flags = flags_of("SFT", toy, folder / "whole", accumulation_steps=1, epochs=steps // 10, save_steps=5)
    assert run(script, flags, 2, folder=folder, timeout=900).ok
    mark, shared = f"soak-{os.getpid()}", _shared_files()
    plan = json.dumps({"seed": args.seed, "rate": args.rate, "log": str(folder / "soak")})
    process = torchrun("--nproc_per_node", 2, "--max-restarts", 50, "--master_port", 29507, __file__, "inner", plan, script,
                       *words({**flags, "save_dir": folder / "cut"}), environment={"KILLS_MARK": mark})
    output, _ = process.communicate()
    if process.returncode:
        print(*(line for line in output.splitlines() if "rror" in line), sep="\n")
        return False
    rows = [[json.loads(line) for line in open(folder / f"soak-{rank}.jsonl")] for rank in range(2)]
    faults = [(row["step"], row["fault"]) for row in rows[0] if row["fault"]]
    equal = process.returncode == 0 and not differences_of_saves(folder / "whole", folder / "cut")
    alive = [pid for pid in filter(str.isdigit, os.listdir("/proc")) if mark in _environment(pid)]
    left = sorted(_shared_files() - shared) + [p.name for p in (folder / "cut").iterdir() if p.name.startswith(".tmp")]
    longest = max((list(group) for r in rows for _, group in itertools.groupby(r, key=lambda row: row["attempt"])), key=len)
    half = longest[len(longest) // 4:]
    slope = (half[-1]["kB"] - half[0]["kB"]) / 1000 / max(1, len(half) - 1)
    attempts = rows[0][-1]["attempt"]
    print(f"{steps} steps, {len(faults)} faults in {len(rows[0])} steps begun: {faults}\nrestarts by torchrun: {attempts}\nfinal save equals the undisturbed run's: {equal}\n"
          f"processes left: {alive}, files left in /dev/shm and save_dir: {left}\nwithin one attempt of {len(longest)} steps, after its first quarter: memory "
          f"{slope:+.4f} MB per step, open files {half[0]['files']} -> {half[-1]['files']}, threads {half[0]['threads']} -> {half[-1]['threads']}")
    return equal and not alive and not left and slope < 0.1 and half[-1]["files"] <= half[0]["files"] + 1 and attempts > 0


def differences_of_saves(a, b):
    one, other = saves_of(a), saves_of(b)
    last = max(one, key=lambda name: json.loads((Path(a) / name / "manifest.json").read_text())["step"])
    return [] if one[last] == other.get(last) else [last]


def _environment(pid) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return ""


# ---- two hosts -----------------------------------------------------------------------------------------------------


def hosts(folder, toy, args):
    """Each host is a network namespace with an own host name; tensor parallel inside, data parallel across."""
    sh = lambda text: subprocess.run(text, shell=True, check=True, capture_output=True)      # noqa: E731
    a, b = f"ka{os.getpid()}", f"kb{os.getpid()}"
    try:
        sh(f"ip netns add {a} && ip netns add {b} && ip link add v{a} netns {a} type veth peer name v{b} netns {b}")
    except subprocess.CalledProcessError as error:
        print(f"SKIPPED: network namespaces need root and ip ({error.stderr.decode().strip()})")
        subprocess.run(f"ip netns del {a}; ip netns del {b}", shell=True, capture_output=True)
        return True
    try:
        for n, name in ((1, a), (2, b)):
            sh(f"ip -n {name} addr add 10.77.0.{n}/24 dev v{name} && ip -n {name} link set v{name} up && ip -n {name} link set lo up")
        return _hosts(folder, toy, args, a, b, sh)
    finally:
        subprocess.run(f"ip netns del {a}; ip netns del {b}", shell=True, capture_output=True)


def _hosts(folder, toy, args, a, b, sh):
    port = itertools.count(29600)

    def start(flags, own_disk=None):
        """Both nodes' torchruns. own_disk: a folder that is another one on the second host."""
        here, result = next(port), []
        for node, name in enumerate((a, b)):
            private = f"mount -t tmpfs tmpfs {own_disk} && " if own_disk and node else ""
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2", "--node_rank", str(node), "--master_addr", "10.77.0.1",
                       "--master_port", str(here), "solver_train.py", *words(flags)]
            result.append(subprocess.Popen(["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "sh", "-c", f'hostname {name} && {private}exec "$@"', "sh", *command],
                                           cwd=jobs.ROOT, stdout=open(folder / f"{name}.txt", "w"), stderr=subprocess.STDOUT, start_new_session=True,
                                           env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": f"v{name}"}))
        return result

    def text(name):
        return (folder / f"{name}.txt").read_text(errors="replace")

    def finish(processes, timeout=180.0):
        """Exit codes and seconds until each has ended; None: had to be killed."""
        began, seconds = time.monotonic(), []
        for process in processes:
            try:
                process.wait(max(0.1, timeout - (time.monotonic() - began)))
                seconds.append(time.monotonic() - began)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                seconds.append(None)
        return [p.returncode for p in processes], seconds
    more = dict(model_parallel_size=2, timeout_seconds=15, epochs=20 if not args.quick else 6)
    script, flags = flags_of("SFT", toy, folder / "one", **more)
    assert run(script, flags, 4, folder=folder, timeout=600).ok
    codes, _ = finish(start({**flags, "save_dir": folder / "two"}), 400)
    equal = codes == [0, 0] and not differences_of_saves(folder / "one", folder / "two")
    print(f"two hosts, one disk: exit codes {codes}, the last save equals that of four ranks on one host: {equal}", flush=True)
    if not equal:
        print(*(line for name in (a, b) for line in text(name).splitlines() if "rror" in line), sep="\n")
    (folder / "own").mkdir()
    codes, seconds = finish(start({**flags, "save_dir": folder / "own/run"}, own_disk=folder / "own"))
    said = next((line for line in (text(a) + text(b)).splitlines() if "is not the folder that rank 0" in line), "")
    print(f"own disks: exit codes {codes}, {max(s or 999 for s in seconds):.1f} s after the start: {said}", flush=True)
    separate = 0 not in codes and bool(said)
    processes = start({**flags, "save_dir": folder / "cut"})
    while not (folder / "cut/step-4/manifest.json").exists() and all(p.poll() is None for p in processes):
        time.sleep(0.05)
    sh(f"ip -n {a} link set v{a} down")
    codes, seconds = finish(processes)
    said = [next((line for line in text(name).splitlines() if "lost another rank" in line), "") for name in (a, b)]
    print(f"link cut: exit codes {codes}, seconds until both had ended {[s and round(s, 1) for s in seconds]} with --timeout_seconds 15\n  " + "\n  ".join(said))
    sh(f"ip -n {a} link set v{a} up")
    cut = 0 not in codes and None not in seconds and all(said)
    codes, _ = finish(start({**flags, "save_dir": folder / "cut"}), 400)
    again = codes == [0, 0] and not differences_of_saves(folder / "one", folder / "cut")
    print(f"link mended, the same commands again: exit codes {codes}, the last save equals the undisturbed one: {again}")
    if not again:
        print(*(line for name in (a, b) for line in text(name).splitlines() if "rror" in line), sep="\n")
    return equal and separate and cut and again


CAMPAIGNS = {f.__name__: f for f in (save, protocol, disk, phases, resume, soak, hosts)}


def main():
    if sys.argv[1:2] == ["inner"]:
        return inner(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", nargs="+", choices=CAMPAIGNS)
    parser.add_argument("--count", type=int, default=100, help="kills of `save`")
    parser.add_argument("--rate", type=float, default=0.01, help="share of steps with a fault in `soak`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only rows that hold this text, such as PPO or 'PPO/tensor'")
    parser.add_argument("--quick", action="store_true", help="a sample of each")
    args = parser.parse_args()
    jobs._context.set_forkserver_preload(jobs.PRELOAD)
    good = True
    for name in args.campaign:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="kills-") as folder:
            fine = CAMPAIGNS[name](Path(folder), make_toy(Path(folder) / "toy"), args)
        print(f"{name}: {'passed' if fine else 'FAILED'} in {time.monotonic() - started:.0f} s\n", flush=True)
        good &= fine
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
