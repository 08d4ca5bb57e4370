"""How many threads arithmetic on a CPU gets, so that it and the data-loading workers do not wait for each other."""

import os

import torch
from accelerate import Accelerator


def leave_a_core_to_the_workers(accelerator: Accelerator) -> None:
    """On a CPU: a thread for each core of this process's share but one. ``OMP_NUM_THREADS`` in the environment overrules.

    Threads of one operation wait for the slowest. With as many threads as cores, each time a worker (or anything else)
    takes a core for a moment, all of them stop: on two busy cores `kd teach` made 4 to 5 clips a second with two threads, and
    30 to 58 with one. The number does not depend on the number of workers, so that this does not change the rounding of sums either.
    """
    if accelerator.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // accelerator.num_processes - 1))
