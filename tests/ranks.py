"""Run a function on n processes joined by gloo, as torchrun would. World sizes stand in the tests, never read from hardware."""

import multiprocessing
import os
import socket
import traceback

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch._dynamo", "transformers", "llama_rlhf.checkpoint.shards", "ranks"])


def _child(rank, n, port, function, args, gpus, queue):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})}
    try:
        import torch
        torch.set_num_threads(1)
        result = function(*args)
        queue.put((rank, "ok", result))
    except BaseException as error:      # noqa: BLE001  reported to the parent
        queue.put((rank, "error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    queue.close()
    queue.join_thread()
    os._exit(0)                         # no destructors: a peer that died must not hang us


def run_ranks(n, function, *args, timeout=180, gpus=False):
    """[function(*args) on rank 0, ..., on rank n-1]. Results must be picklable (tensors as lists or numpy).

    An exception on any rank fails the test with that rank's traceback; so does a rank that does not answer in time. gpus: they see the GPUs.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = _context.Queue()
    processes = [_context.Process(target=_child, args=(rank, n, port, function, args, gpus, queue), daemon=True) for rank in range(n)]
    for process in processes:
        process.start()
    results, errors = {}, []
    try:
        for _ in range(n):
            rank, status, value = queue.get(timeout=timeout)
            if status == "ok":
                results[rank] = value
            else:
                errors.append(f"rank {rank}: {value}")
                break
    finally:
        for process in processes:
            process.join(0.1 if errors else 5)
            if process.is_alive():
                process.kill()
    assert not errors, "\n".join(errors)
    return [results[rank] for rank in range(n)]


def _script(name, flags, plans=False):
    """Run a top-level script's main in this process as `python name --flags` would, through the command-line checks.

    plans: at its end it lays a plan beside the memory it took, which takes two seconds.
    """
    import io
    import runpy
    import sys
    from contextlib import redirect_stderr, redirect_stdout
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    os.chdir(root)
    sys.argv = [name, *(f"--{key}={value}" for key, value in flags.items())]
    sys.path.insert(0, root)
    out, err = io.StringIO(), io.StringIO()
    code = 0
    from llama_rlhf import cli, plan
    cli._exit = sys.exit                # keep the process, to report
    if not plans:
        plan.report_memory = lambda *_: None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(os.path.join(root, name), run_name="__main__")
        except SystemExit as error:
            code = error.code
    return code, out.getvalue(), err.getvalue()


def run_script(n, name, /, *, wait=180, plans=False, **flags):
    """[(exit code, stdout, stderr) of each rank] of a script on n gloo ranks, without paying for n interpreter starts."""
    flags = {"device": "cpu", "write_report": False, **flags} if name != "checkpoint_split.py" else flags      # drawing takes seconds
    return run_ranks(n, _script, name, flags, plans, timeout=wait, gpus=flags.get("device") == "cuda")
