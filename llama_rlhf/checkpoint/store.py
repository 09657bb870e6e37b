"""Publishing a checkpoint folder: it appears whole and verified under its name, or not at all.

Written into a hidden folder beside the target, every file fsynced and hashed, the manifest last; then renamed into place and
the parent fsynced. Assumes a file system where rename is atomic (local disks, NFS of one server), shared by all ranks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
from collections.abc import Callable

from llama_rlhf.checkpoint.convert import FORMAT, MANIFEST, intact, read_manifest, seal as manifest_seal
from llama_rlhf.checkpoint.formats import TENSOR_SUFFIXES, CheckpointError, not_there, open_checkpoint, open_file, read_json
from llama_rlhf.parallel import groups

_SAVE = re.compile(r"(?:epoch|step)-\d+")
_LEFT = re.compile(rf"\.tmp-(?:removed-)?{_SAVE.pattern}")      # of a save, or a removal, that was cut off


def check_writable(folder: str) -> None:
    """Make the folder, prove that a file can be written in it, and that every rank sees the file: nodes must share the disk.
    CheckpointError or NotADirectoryError with the reason, on every rank, otherwise."""
    probe = None
    with groups.together(f"preparing {folder}"):
        if not folder:
            raise CheckpointError("the path of the folder to write in is empty. Give --save_dir or --log_dir a name")
        if groups.is_main():
            if os.path.exists(folder) and not os.path.isdir(folder):
                raise NotADirectoryError(f"{folder} is a file; a folder is needed to save in")
            try:
                os.makedirs(folder, exist_ok=True)
                probe = os.path.join(folder, f".write-test-{platform.node()}-{os.getpid()}")
                with open(probe, "w"):
                    pass
            except OSError as error:
                raise CheckpointError(f"cannot write in {folder}: {error.strerror}. Choose another folder, or change its permissions.") from error
    name, host = groups.broadcast_object((os.path.basename(probe or ""), platform.node()))
    try:
        with groups.together(f"looking for {folder} from every node"):
            if not os.path.exists(os.path.join(folder, name)):
                raise CheckpointError(f"{folder} on {platform.node()} is not the folder that rank 0 on {host} writes in: a file made there does not appear "
                                      "here. All nodes must see one folder. Choose one on a file system that they share, or run on one node.")
    finally:
        if probe:
            with contextlib.suppress(OSError):
                os.remove(probe)


_locks = {}     # folder -> open file: a lock lasts as long as its process


def claim(*folders: str) -> None:
    """Collective: refuse a folder that another running process on this host writes to. Released when the process ends, however it ends."""
    with groups.together(f"claiming {' and '.join(folders)}"):
        for folder in folders if groups.is_main() else ():
            if (path := os.path.realpath(folder)) in _locks:
                continue
            file = open(os.path.join(folder, ".lock"), "w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"another run is saving to {folder} right now. Wait for it, or choose another folder.") from None
            except OSError:
                pass            # a file system without locks
            _locks[path] = file


def publish(folder: str, write: Callable[[str], dict | None], manifest: dict | None, *, n_bytes: int) -> None:
    """Collective. write(temporary folder) -> {file name: {"size", "sha256"}} runs on every rank; any error ends all ranks.

    n_bytes: what this rank is about to write; the sum is compared with the free space first.
    manifest: what else the manifest says; format and files are added here. None: a folder in somebody else's format, which has
    no manifest; then write need not return anything.
    """
    folder = os.path.realpath(folder)
    parent, name = os.path.split(folder)
    temporary = os.path.join(parent, f".tmp-{name}")
    targets, sizes = zip(*groups.gather_objects((folder, n_bytes)))
    if len(set(targets)) > 1:
        raise CheckpointError(f"the ranks are saving to different folders: {', '.join(sorted(set(targets)))}. Give all of them the same.")
    with groups.together(f"preparing {folder}"), _said(folder):
        if groups.is_main():
            if os.path.isdir(folder) and os.listdir(folder):
                raise CheckpointError(f"{folder} exists and is not empty. Choose another folder, or remove this one.")
            check_free_space(parent, sum(sizes))
            shutil.rmtree(temporary, ignore_errors=True)     # left by a run that died while saving
            os.makedirs(temporary)
    try:
        with groups.together(f"writing {folder}"), _said(folder):
            files = write(temporary)
        gathered = groups.gather_objects(files)
        with groups.together(f"publishing {folder}"), _said(folder):
            if groups.is_main():
                if manifest is not None:
                    entries = {file: entry for part in gathered for file, entry in part.items()}
                    content = {"format": FORMAT, **manifest, "files": dict(sorted(entries.items()))}
                    write_json(os.path.join(temporary, MANIFEST), {**content, "sha256": manifest_seal(content)})
                for path, _, _ in os.walk(temporary):
                    _fsync_folder(path)
                if os.path.isdir(folder):
                    os.rmdir(folder)          # empty: checked above
                os.rename(temporary, folder)
                _fsync_folder(parent)
    except BaseException:
        if groups.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def _said(folder: str):
    """Failures of the file system as one sentence."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{folder} could not be saved: {error.strerror or error}{f' ({error.filename})' if error.filename else ''}. Earlier saves are "
                              "as they were. Free space or change what is in the way; the same command continues from the newest.") from error


def check_free_space(folder: str, needed: int) -> None:
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free
    if needed * 1.01 + (1 << 20) > free:
        raise CheckpointError(f"no space to save in {folder}: {needed / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free. "
                              "Free some, or save elsewhere.")


def write_json(path: str, value) -> dict:
    """Write and fsync; returns the file's manifest entry."""
    data = (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def copy_file(source: str, target: str) -> dict:
    """Copy and fsync; returns the file's manifest entry."""
    shutil.copyfile(source, target)
    return seal(target)


def seal(path: str) -> dict:
    """fsync a finished file; returns its manifest entry."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return {"size": os.path.getsize(path), "sha256": _sha256(file)}


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(4 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def verify(folder: str) -> None:
    """Collective: compare every file of a folder of ours with its SHA-256, the ranks sharing the work."""
    with groups.together(f"verifying {folder}"):
        manifest = read_manifest(folder) or {"files": {}}
        for i, (name, entry) in enumerate(sorted(manifest["files"].items())):
            if i % groups.world_size() == groups.rank():
                try:
                    with open(os.path.join(folder, name), "rb") as file:
                        digest = _sha256(file)
                except OSError as error:
                    raise CheckpointError(f"{os.path.join(folder, name)} cannot be read: {error.strerror}") from error
                if digest != entry.get("sha256"):
                    raise CheckpointError(f"{os.path.join(folder, name)} is corrupt: its SHA-256 is {digest[:12]}..., the manifest "
                                          f"says {str(entry.get('sha256'))[:12]}.... Copy the checkpoint again, or use another.")


def resolve(path: str) -> str:
    """A checkpoint folder, or a save_dir of a training run: then the newest complete save in it (epoch-N, step-N)."""
    if not os.path.isdir(path) or os.path.exists(os.path.join(path, MANIFEST)):
        return path
    saves = complete_saves(path)
    return saves[max(saves)] if saves else path


def find(path: str) -> str:
    """`resolve` for a path that a user gave. FileNotFoundError or CheckpointError where there is no model: a tokenizer, which is read first, is not
    what they miss."""
    if not os.path.exists(path):
        raise FileNotFoundError(not_there(path))
    path = resolve(path)
    if os.path.isdir(path) and not any(name.endswith((*TENSOR_SUFFIXES, ".index.json")) for name in os.listdir(path)):
        open_checkpoint(path).close()       # says what it looked for
    elif os.path.isfile(path) and not path.endswith((*TENSOR_SUFFIXES, ".index.json")):
        open_file(path).close()
    return path


def beside(checkpoint: str, name: str) -> str:
    """Where to write something about a checkpoint: in its folder; beside the save of a run, which --keep_last may remove."""
    folder = checkpoint if os.path.isdir(checkpoint) else os.path.dirname(checkpoint)
    parent, save = os.path.split(os.path.abspath(folder))
    return os.path.join(os.path.relpath(parent) if not os.path.isabs(folder) else parent, f"{name}-{save}") if _SAVE.fullmatch(save) else os.path.join(folder, name)


def existing_saves(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if _SAVE.fullmatch(name)) if os.path.isdir(folder) else []


# flags that may differ between a run and its continuation: they do not change its numbers. (A run's folder may have been moved; where the
# checkpoints it began from are is compared by what the paths led to, not by how they were written.)
_HARMLESS = {"resume", "log_dir", "timeout_seconds", "save_steps", "keep_last", "save_rollouts", "log_steps", "eval_steps", "eval_batch_size",
             "keep_resident", "plan", "plan_ranks", "model_parallel_size", "check_steps", "doctor", "validate", "tracker", "write_report",
             "save_dir", "actor_save_dir", "critic_save_dir", "ckpt_dir", "actor_ckpt_dir", "critic_ckpt_dir", "reward_model_ckpt_dir"}


def identity(arguments: dict, dtype, data: str, **started_from: str) -> dict:
    """What must be the same for a run to be continued: flags, ranks, dtype, training data (`invariants.fingerprint`), and the checkpoints that paths
    led to at the start, of ours with their manifests' seals. And the files of the user's own code, of which a change is told only: a mended reward may go on."""
    code = {key: str(arguments.get(key) or "").rpartition(":")[0] if key == "reward_function" else str(arguments.get(key) or "") for key in ("reward_function", "task")}
    return {"arguments": dict(arguments), "tensor_parallel": groups.tp_size(), "data_parallel": groups.dp_size(), "dtype": str(dtype), "training data": data,
            "started_from": {role: os.path.abspath(path) if path else "" for role, path in started_from.items()},
            "what the checkpoints held": {role: _brief(path).get("sha256", "")[:12] if path else "" for role, path in started_from.items()},
            "code": {key: seal(path)["sha256"] for key, path in code.items() if path.endswith(".py") and os.path.isfile(path)}}


_COMPARED_APART = ("arguments", "tensor_parallel", "code")


def _differences(now: dict, before: dict | None) -> list[str]:
    if not isinstance(before, dict) or "arguments" not in before:
        return ["what it was is not recorded"]
    shown = lambda value: '""' if value == "" else value        # noqa: E731
    changed = [f"--{key} {shown(value)} (was {shown(before['arguments'].get(key))})" for key, value in now["arguments"].items()
               if key not in _HARMLESS and value != before["arguments"].get(key)]
    return changed or [f"{key} {now[key]} (was {before[key]})" for key in now if key not in _COMPARED_APART and now[key] != before.get(key, now[key])]


def find_start(save_dirs: list[str], run: dict, resume: str) -> tuple[list[str], dict]:
    """Collective. The newest saves to continue from, one in each of the folders and of the same step, and the first one's manifest;
    ([""] for each, {}) for a new run.

    run: `identity` of this run, to be that in the saves' manifests but for harmless flags.
    resume: "auto" continues a run of the same settings; "never" refuses folders that hold saves.
    A damaged save is moved aside, and the one before it is taken. The folders are given in the reverse order of saving: what the last one alone has of the
    step in which the run died is removed, it will be computed again; where folders differ otherwise they are not one run's, which is a ValueError on
    every rank. What a killed run left half written is removed. Nothing else is.
    Another number of tensor-parallel ranks is no other run: weights and optimizer state are cut anew, and a note says what that costs.
    """
    if resume not in ("auto", "never"):
        raise ValueError(f"--resume {resume!r}: use auto or never")
    while True:
        with groups.together("looking for earlier saves"):
            for folder in save_dirs:
                if os.path.realpath(folder) in map(os.path.realpath, filter(None, run.get("started_from", {}).values())):
                    raise ValueError(f"{folder} holds the model to start from: with saves in it nobody could tell which of them is meant. Save in another folder, such as "
                                     f"{os.path.join(folder, 'trained')}.")
            saves = [complete_saves(folder) for folder in save_dirs]
            names = [name for folder in save_dirs for name in existing_saves(folder)]
            if names and resume == "never":
                raise ValueError(f"{save_dirs[0]} already holds {', '.join(names[:3])}, and --resume is never. Choose another folder, or remove them.")
            if names and not any(saves):
                raise ValueError(f"{save_dirs[0]} already holds {', '.join(names[:3])}, but no complete save to continue from. "
                                 "Choose another folder, or remove them.")
            for folder, found in zip(save_dirs, saves):
                if found and (changed := _differences(run, _brief(found[max(found)]).get("run", {}).get("identity"))):
                    raise ValueError(f"{folder} already holds {os.path.basename(found[max(found)])} of a run with other settings: {', '.join(changed)}. "
                                     "Give the same settings to continue it, or choose another folder.")
            step = max(set.intersection(*map(set, saves)), default=-1)
            paths = [found[step] for found in saves] if step >= 0 else []
            damaged = [path for folder, found in zip(save_dirs, saves) for path in (os.path.join(folder, name) for name in existing_saves(folder))
                       if path not in found.values()]
        for path in damaged:
            groups.log(f"warning: {path} has no intact {MANIFEST}")
        for path in paths if not damaged else ():
            try:
                verify(path)
            except ValueError as error:
                if any(groups.gather_objects(_may_pass(error))):
                    raise CheckpointError(f"{path} is the save to continue from, but {error}. Nothing was changed. Try again, or move it away to continue from the one "
                                          "before.") from error
                groups.log(f"warning: {error}")
                damaged = [path]
                break
        with groups.together("comparing the folders"):
            leaves = {path: ".corrupt" for path in damaged} if damaged else _without_partner(save_dirs, saves, step)
        for path, suffix in leaves.items():
            if suffix == ".corrupt":
                groups.log(f"{path} is moved aside as {_aside(path, suffix)}; going on from what is whole, or from the start")
            elif suffix:
                groups.log(f"{path} is moved aside as {_aside(path, suffix)}; what it was saved with is damaged, or the folders were moved")
        with groups.together("clearing what will be computed again"):
            if groups.is_main():
                for path, suffix in leaves.items():
                    os.rename(path, _aside(path, suffix)) if suffix else _remove(path)
                for folder in save_dirs if not damaged else ():
                    for name in os.listdir(folder):
                        if _LEFT.fullmatch(name):
                            _delete(os.path.join(folder, name))
        if not damaged:
            before = _brief(paths[0]).get("run", {}).get("identity", {}) if paths else {}
            if before.get("tensor_parallel") not in (None, run["tensor_parallel"]):
                groups.log(f"note: {paths[0]} was saved by {before['tensor_parallel']} tensor-parallel ranks, here are {run['tensor_parallel']}. The run continues from the same "
                           "weights and optimizer state, but its sums are rounded in another order: not to the bits of an undisturbed run.")
            for flag, digest in before.get("code", {}).items():
                if run.get("code", {}).get(flag) != digest:
                    groups.log(f"note: the file of --{flag} has changed since {paths[0]} was saved. The run continues with what it says now.")
            return (paths, _brief(paths[0])) if paths else ([""] * len(save_dirs), {})


def _without_partner(save_dirs: list[str], saves: list[dict[int, str]], step: int) -> dict[str, str]:
    """The saves behind `step`, the last that all folders have: path -> what its name gets when it is moved aside; "": it may go. ValueError where they
    tell that the folders are not one run's."""
    found = {}
    for folder, held in zip(save_dirs, saves):
        later = sorted(s for s in held if s > step)
        for path in (held[s] for s in later):
            name, folders = os.path.basename(path), _brief(path).get("run", {}).get("folders", [])
            if any(os.path.lexists(os.path.join(other, f"{name}.corrupt")) for other in save_dirs):
                found[path] = ".alone"
                continue
            died_here, moved = folder == save_dirs[-1] and len(later) == 1, folders != list(map(os.path.abspath, save_dirs))
            if not died_here or moved and step < 0:
                lacks = next(other for other, those in zip(save_dirs, saves) if later[-1] not in those)
                belongs = f" It belongs to a run that saved to {' and '.join(folders)}." if folders and moved else ""
                raise ValueError(f"{folder} holds {name}, but {lacks} does not. Give the folders of one run to continue it, or choose new ones.{belongs}")
            found[path] = ".alone" if moved else ""
    return found


def _aside(path: str, suffix: str) -> str:
    """A free name for a save that is not used any more."""
    names = itertools.chain([path + suffix], (f"{path}{suffix}-{n}" for n in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def _brief(path: str) -> dict:
    """The manifest of a save, its files unseen; {} when there is none or it is corrupt."""
    try:
        os.stat(os.path.join(path, MANIFEST))       # to isfile() a folder that must not be entered is an empty one
        manifest = read_json(os.path.join(path, MANIFEST))
        return manifest if intact(manifest) else {}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be looked into: {error.strerror}. Change what is in the way, such as its permissions, or move it away.") from error
    except CheckpointError as error:
        if _may_pass(error):
            raise
        return {}


def _may_pass(error: ValueError) -> bool:
    """Whether a file could not be read, which says nothing against what is in it: a server that is away, a right that is missing."""
    return isinstance(error.__cause__, (OSError, MemoryError)) and not isinstance(error.__cause__, FileNotFoundError)


def complete_saves(folder: str) -> dict[int, str]:
    """step -> path of the saves in a save_dir that have a manifest."""
    paths = [os.path.join(folder, name) for name in existing_saves(folder)]
    return {manifest["step"]: path for path in paths if isinstance((manifest := _brief(path)).get("step"), int)}


def keep_newest(folder: str, n: int, spare: set[int]) -> None:
    """Collective: remove all complete saves but the n newest (n at least 1; -1: all) and those of the steps in `spare`."""
    with groups.together(f"removing old saves in {folder}"):
        if n != -1 and groups.is_main():
            saves = complete_saves(folder)
            for step in sorted(saves)[:-n]:
                if step not in spare:
                    _remove(saves[step])


def _remove(path: str) -> None:
    """Under another name first: what is half removed must not look like a save."""
    hidden = os.path.join(os.path.dirname(path), f".tmp-removed-{os.path.basename(path)}")
    _delete(hidden)
    os.rename(path, hidden)
    _delete(hidden)


def _delete(path: str) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path) and (os.path.islink(path) or not os.path.isdir(path)):
        os.remove(path)


def _fsync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS):      # some network file systems flush files only
            raise
    finally:
        os.close(descriptor)
