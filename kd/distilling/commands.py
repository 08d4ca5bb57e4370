"""Runs our own commands from within another one, each printed first so that it can be copied."""

import shlex

from audio_datasets.system.command import INTERRUPTED, STOPPED
from audio_datasets.system.stop_signals import Stopped
from kd import cli


def run(command: str, *arguments: object) -> None:
    """Prints and runs ``kd COMMAND ARGUMENTS``.

    Raises:
        ValueError: the command failed (it has said why).
        Stopped: the command was asked to stop and has saved its work.
        KeyboardInterrupt: the user interrupted it.
    """
    words = [command, *map(str, arguments)]
    print(f"\n$ kd {shlex.join(words)}", flush=True)
    code = cli.main(words)
    if code == STOPPED:
        raise Stopped(f"kd {command} was stopped; the same command continues")
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code != 0:
        raise ValueError(f"kd {command} ended with exit code {code}")
