"""The number of threads for computations on a CPU, chosen so that they do not compete with data-loading workers."""

import os

import torch
from accelerate import Accelerator


def leave_a_core_to_the_workers(accelerator: Accelerator) -> None:
    """On a CPU, uses one thread fewer than this process's share of the cores. ``OMP_NUM_THREADS`` overrides this.

    The threads of an operation wait for the slowest one. With as many threads as cores, all of them stall whenever a worker (or
    anything else) takes a core for a moment: on two busy cores `kd teach` processed 4 to 5 clips per second with two threads, and
    30 to 58 with one. The number of threads does not depend on the number of workers, so workers do not affect rounding.
    """
    if accelerator.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // accelerator.num_processes - 1))
