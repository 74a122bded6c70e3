"""Functions of test modules, run as several processes of one group."""

import multiprocessing
import os
import pickle
import socket
import traceback

import torch

from adamerge.commands.run.processes import join


def run_ranks(function, count, *arguments, timeout=60):
    """Call ``function(*arguments)`` as each of ``count`` ranks on gloo; return the results in the ranks' order."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    # Forked from a fresh process that has imported what takes long: this one may have threads, which forks lack.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "adamerge.commands.run.run",
            "adamerge.commands.run.processes",
            "adamerge.callbacks",
            "torchvision",
            "open_clip",
        ]
    )
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=_rank, args=(rank, count, port, function, arguments, pipes[rank][1]), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    try:
        results = []
        for rank, (end, _) in enumerate(pipes):
            assert end.poll(timeout), f"rank {rank} has not answered within {timeout} seconds"
            found = end.recv()
            results.append(found if isinstance(found, str) else pickle.loads(found))
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    errors = [result for result in results if isinstance(result, str) and result.startswith("Traceback")]
    assert not errors, "\n".join(errors)
    return results


def _rank(rank, count, port, function, arguments, pipe):
    os.environ |= {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"},
        **{"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)},
    }
    torch.set_num_threads(1)
    try:
        join()
        torch.manual_seed(0)
        pipe.send(pickle.dumps(function(*arguments)))  # plain bytes: tensors would be shared with a process that ends
    except BaseException:
        pipe.send(traceback.format_exc())
