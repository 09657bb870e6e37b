"""What a process may use inside containers and batch jobs: control groups written by hand, as Linux shows them."""

import os

import pytest
import torch

from llama_rlhf.parallel import machine


def system(root, cgroup: str, files: dict[str, str]) -> str:
    for name, text in {"proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable:   48000000 kB\n", "proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


V1, V2 = "7:memory:/job/step\n4:cpu,cpuacct:/job/step\n1:cpuset:/\n0::/\n", "0::/job/step\n"
MEMORY_V1, CPU_V1, UNBOUNDED_V1 = "sys/fs/cgroup/memory", "sys/fs/cgroup/cpu", "9223372036854771712\n"


@pytest.mark.parametrize("cgroup, files, expected", [
    (V2, {}, 48_000_000 * 1024),                                                                                    # no bound anywhere
    (V2, {"sys/fs/cgroup/job/step/memory.max": "max\n", "sys/fs/cgroup/job/step/memory.current": "5\n"}, 48_000_000 * 1024),
    (V2, {"sys/fs/cgroup/job/step/memory.max": "4000\n", "sys/fs/cgroup/job/step/memory.current": "3000\n"}, 1000),
    (V2, {"sys/fs/cgroup/job/step/memory.max": "4000\n", "sys/fs/cgroup/job/step/memory.current": "3000\n",
          "sys/fs/cgroup/job/step/memory.stat": "anon 900\ninactive_file 700\nactive_file 50\n"}, 1700),            # the system drops cached files when it must
    (V2, {"sys/fs/cgroup/job/step/memory.max": "max\n", "sys/fs/cgroup/job/step/memory.current": "3000\n",
          "sys/fs/cgroup/job/memory.max": "9000\n", "sys/fs/cgroup/job/memory.current": "9500\n"}, 0),              # the group above is what bounds
    (V2, {"sys/fs/cgroup/memory.max": "4000\n", "sys/fs/cgroup/memory.current": "1000\n"}, 3000),                   # a container: the path is the host's
    (V1, {f"{MEMORY_V1}/job/step/memory.limit_in_bytes": UNBOUNDED_V1, f"{MEMORY_V1}/job/step/memory.usage_in_bytes": "3000\n",
          f"{MEMORY_V1}/job/memory.limit_in_bytes": "8000\n", f"{MEMORY_V1}/job/memory.usage_in_bytes": "3000\n",
          f"{MEMORY_V1}/job/memory.stat": "inactive_file 1\ntotal_inactive_file 200\n"}, 5200),
    ("nonsense::\n", {}, 48_000_000 * 1024),
    ("no colons\n\n1:memory\n" + V2, {"sys/fs/cgroup/job/memory.max": "4000\n", "sys/fs/cgroup/job/memory.current": "1000\n"}, 3000),   # a line of another shape
])
def test_memory_is_what_the_tightest_group_leaves(tmp_path, cgroup, files, expected):
    assert machine.available_memory(system(tmp_path, cgroup, files)) == expected


@pytest.mark.parametrize("cgroup, files, expected", [
    (V2, {"sys/fs/cgroup/job/step/cpu.max": "max 100000\n"}, None),
    (V2, {"sys/fs/cgroup/job/step/cpu.max": "max 100000\n", "sys/fs/cgroup/job/cpu.max": "50000 100000\n"}, 1),
    (V2, {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
    (V1, {f"{CPU_V1},cpuacct/job/step/cpu.cfs_quota_us": "-1\n", f"{CPU_V1}/job/step/cpu.cfs_quota_us": "-1\n", f"{CPU_V1}/job/step/cpu.cfs_period_us": "100000\n"}, None),
    (V1, {f"{CPU_V1}/job/step/cpu.cfs_quota_us": "100000\n", f"{CPU_V1}/job/step/cpu.cfs_period_us": "100000\n"}, 1),
])
def test_cores_are_what_the_tightest_quota_gives(tmp_path, monkeypatch, cgroup, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert machine.cores(system(tmp_path, cgroup, files)) == (64 if expected is None else expected)


@pytest.mark.parametrize("told, expected", [({}, 1), ({"LOCAL_WORLD_SIZE": "8", "SLURM_STEP_TASKS_PER_NODE": "1"}, 8), ({"OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, 3),
                                            ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, 4), ({"SLURM_STEP_TASKS_PER_NODE": "2,1"}, 2)])
def test_cores_and_memory_are_divided_among_a_host_s_processes_whatever_started_them(monkeypatch, told, expected):
    """Under srun and mpirun each of them took all cores, and all free memory for its own."""
    from llama_rlhf.parallel import groups
    for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "available_memory", lambda: 2400)
    monkeypatch.setattr(groups, "_state", {"device": torch.device("cpu")})
    assert groups.free_memory() == 2400 // expected


def test_a_system_that_says_nothing_bounds_nothing(tmp_path):
    assert machine.available_memory(str(tmp_path)) == 1 << 62
    assert machine.cores(str(tmp_path)) >= 1


def test_the_name_of_a_group_may_be_any_bytes(tmp_path):
    system(tmp_path, "", {})
    (tmp_path / "proc/self/cgroup").write_bytes(b"0::/caf\xe9\n")
    folder = os.fsencode(tmp_path) + b"/sys/fs/cgroup/caf\xe9"
    os.makedirs(folder)
    for name, text in ((b"memory.max", b"4000"), (b"memory.current", b"1000")):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(text)
    assert machine.available_memory(str(tmp_path)) == 3000
