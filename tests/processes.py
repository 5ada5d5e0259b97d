"""Runs a test's function in several processes that meet at a file: no port is taken, and none outlives the test."""

import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing


def run_ranks(function, ranks, folder):
    """Calls `function()` in so many gloo processes. The first error of one is raised here, and the others are ended."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["fmxnn", "torch._dynamo"])  # imported once for all processes
    arguments = ranks, str(Path(folder) / "meeting"), function
    multiprocessing.start_processes(_enter, arguments, nprocs=ranks, start_method="forkserver")


def _enter(rank, ranks, meeting, function):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    try:
        function()
    finally:
        dist.destroy_process_group()
