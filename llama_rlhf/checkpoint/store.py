"""Publishing a checkpoint folder: it appears whole and verified under its name, or not at all.

Written into a hidden folder beside the target, every file fsynced and hashed, the manifest last; then renamed into place and
the parent fsynced. Assumes a file system where rename is atomic (local disks, NFS of one server), shared by all ranks.
"""

from __future__ import annotations

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
