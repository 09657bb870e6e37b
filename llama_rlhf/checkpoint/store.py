"""Publishing a checkpoint folder: it appears whole and verified under its name, or not at all.

Written into a hidden folder beside the target, every file fsynced and hashed, the manifest last; then renamed into place and
the parent fsynced. Assumes a file system where rename is atomic (local disks, NFS of one server), shared by all ranks.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable

from llama_rlhf.checkpoint.convert import FORMAT, MANIFEST, read_manifest
from llama_rlhf.checkpoint.formats import CheckpointError
from llama_rlhf.parallel import groups

_SAVE = re.compile(r"(?:epoch|step)-\d+")


def check_writable(folder: str) -> None:
    """Make the folder and prove that a file can be written in it; OSError with the reason, on every rank, otherwise."""
    with groups.together(f"preparing {folder}"):
        if groups.is_main():
            if os.path.exists(folder) and not os.path.isdir(folder):
                raise NotADirectoryError(f"{folder} is a file; a folder is needed to save in")
            try:
                os.makedirs(folder, exist_ok=True)
                probe = os.path.join(folder, ".write-test")
                with open(probe, "w"):
                    pass
                os.remove(probe)
            except OSError as error:
                raise type(error)(f"cannot write in {folder}: {error.strerror}. Choose another folder, or change its permissions.") from error


_locks = []     # open files: a lock lasts as long as its process


def claim(folder: str) -> None:
    """Collective: refuse a folder that another running process on this host saves to. Released when the process ends, however it ends."""
    with groups.together(f"claiming {folder}"):
        if groups.is_main():
            file = open(os.path.join(folder, ".lock"), "w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"another run is saving to {folder} right now. Wait for it, or choose another folder.") from None
            except OSError:
                pass            # a file system without locks
            _locks.append(file)


def publish(folder: str, write: Callable[[str], dict | None], manifest: dict | None, *, n_bytes: int) -> None:
    """Collective. write(temporary folder) -> {file name: {"size", "sha256"}} runs on every rank; any error ends all ranks.

    n_bytes: what this rank is about to write; the sum is compared with the free space first.
    manifest: what else the manifest says; format and files are added here. None: a folder in somebody else's format, which has
    no manifest; then write need not return anything.
    """
    folder = os.path.abspath(folder)
    parent, name = os.path.split(folder)
    temporary = os.path.join(parent, f".tmp-{name}")
    needed = sum(groups.gather_objects(n_bytes))
    with groups.together(f"preparing {folder}"):
        if groups.is_main():
            if os.path.isdir(folder) and os.listdir(folder):
                raise CheckpointError(f"{folder} exists and is not empty. Choose another folder, or remove this one.")
            check_free_space(parent, needed)
            shutil.rmtree(temporary, ignore_errors=True)     # left by a run that died while saving
            os.makedirs(temporary)
    try:
        with groups.together(f"writing {folder}"):
            files = write(temporary)
        gathered = groups.gather_objects(files)
        with groups.together(f"publishing {folder}"):
            if groups.is_main():
                if manifest is not None:
                    entries = {file: entry for part in gathered for file, entry in part.items()}
                    write_json(os.path.join(temporary, MANIFEST), {"format": FORMAT, **manifest, "files": dict(sorted(entries.items()))})
                _fsync_folder(temporary)
                if os.path.isdir(folder):
                    os.rmdir(folder)          # empty: checked above
                os.rename(temporary, folder)
                _fsync_folder(parent)
    except BaseException:
        if groups.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_free_space(folder: str, needed: int) -> None:
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free
    if needed * 1.01 + (1 << 20) > free:
        raise CheckpointError(f"no space to save in {folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free. "
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
                with open(os.path.join(folder, name), "rb") as file:
                    digest = _sha256(file)
                if digest != entry.get("sha256"):
                    raise CheckpointError(f"{os.path.join(folder, name)} is corrupt: its SHA-256 is {digest[:12]}..., the manifest "
                                          f"says {str(entry.get('sha256'))[:12]}.... Copy the checkpoint again, or use another.")


def resolve(path: str) -> str:
    """A checkpoint folder, or a save_dir of a training run: then the newest complete save in it (epoch-N, step-N)."""
    if not os.path.isdir(path) or os.path.exists(os.path.join(path, MANIFEST)):
        return path
    saves = [os.path.join(path, name) for name in os.listdir(path) if _SAVE.fullmatch(name)]
    complete = [(read_manifest(save).get("step", 0), save) for save in saves if os.path.exists(os.path.join(save, MANIFEST))]
    return max(complete)[1] if complete else path


def existing_saves(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if _SAVE.fullmatch(name)) if os.path.isdir(folder) else []


# flags that may differ between a run and its continuation: they do not change its numbers
_HARMLESS = {"resume", "log_dir", "timeout_seconds", "save_steps", "keep_last", "save_rollouts", "log_steps", "eval_steps", "eval_batch_size",
             "keep_resident"}


def find_start(save_dirs: list[str], arguments: dict, resume: str) -> tuple[list[str], dict]:
    """Collective. The newest saves to continue from, one in each of the folders and of the same step, and the first one's manifest;
    ([""] for each, {}) for a new run.

    arguments: this run's flags, to be those in the manifest ("run": {"arguments": ...}) but for harmless ones.
    resume: "auto" continues a run of the same settings; "never" refuses folders that hold saves.
    A save that does not match its checksums is moved aside, and the one before it is taken. ValueError on every rank.
    """
    if resume not in ("auto", "never"):
        raise ValueError(f"--resume {resume!r}: use auto or never")
    while True:
        with groups.together("looking for earlier saves"):
            saves = [complete_saves(folder) for folder in save_dirs]
            common = set.intersection(*map(set, saves))
            held = [name for folder in save_dirs for name in existing_saves(folder)]
            if held and (resume == "never" or not common):
                raise ValueError(f"{save_dirs[0]} already holds {', '.join(held[:3])}, " + ("and --resume is never. " if common else
                                 "but no complete save to continue from. ") + "Choose another folder, or remove them.")
            if not common:
                return [""] * len(save_dirs), {}
            paths = [found[max(common)] for found in saves]
            manifest = read_manifest(paths[0])
            before = manifest.get("run", {}).get("arguments")
            changed = [f"--{key} {arguments[key]} (was {before.get(key)})" for key in arguments
                       if key not in _HARMLESS and arguments[key] != before.get(key)] if before is not None else ["what it was is not recorded"]
            if changed:
                raise ValueError(f"{save_dirs[0]} already holds {os.path.basename(paths[0])} of a run with other settings: {', '.join(changed)}. "
                                 "Give the same settings to continue it, or choose another folder.")
        try:
            for path in paths:
                verify(path)
            with groups.together("removing what will be computed again"):
                if groups.is_main():        # saved for one role when the run died, not yet for the other
                    for later in (found[step] for found in saves for step in found if step > max(common)):
                        shutil.rmtree(later)
            return paths, manifest
        except ValueError as error:
            groups.log(f"warning: {error}\nmoved aside as {paths[0]}.corrupt; continuing from the save before it")
            with groups.together("moving a corrupt save aside"):
                if groups.is_main():
                    for path in paths:
                        os.rename(path, path + ".corrupt")


def complete_saves(folder: str) -> dict[int, str]:
    """step -> path of the saves in a save_dir that have a manifest."""
    paths = [os.path.join(folder, name) for name in existing_saves(folder)]
    return {read_manifest(path).get("step", 0): path for path in paths if os.path.exists(os.path.join(path, MANIFEST))}


def keep_newest(folder: str, n: int, spare: set[int]) -> None:
    """Rank 0 removes all complete saves but the n newest (n at least 1; -1: all) and those of the steps in `spare`."""
    if n == -1 or not groups.is_main():
        return
    saves = complete_saves(folder)
    for step in sorted(saves)[:-n]:
        if step not in spare:
            # first the manifest: half-removed folders must not look complete
            os.remove(os.path.join(saves[step], MANIFEST))
            shutil.rmtree(saves[step], ignore_errors=True)


def _fsync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
