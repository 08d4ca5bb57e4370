"""Starts a command, such as ``kd pretrain``, again and again from a process that has imported everything: 0.1 s each in place of 5.

    with Preloaded() as starter:
        run = starter.start(["--clips", …], {"RANK": "0", …})
        run.send(signal.SIGKILL)
        run.wait()

The process forks for each start; what runs then is the command's own ``main`` with these arguments and environment.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """A command that was started."""

    pid: int
    starter: "Preloaded"

    def send(self, number: signal.Signals) -> bool:
        """Sends a signal; False if the command has ended."""
        if not self.running():
            return False
        os.kill(self.pid, number)
        return True

    def running(self) -> bool:
        return self.starter.ask("running", pid=self.pid)

    def wait(self) -> int:
        """The exit code, or minus the number of the signal that ended it."""
        return self.starter.ask("wait", pid=self.pid)


class Preloaded:
    """The process that forks, with these variables in its environment besides our own; ended with the context."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = {**os.environ, **environment}

    def __enter__(self) -> "Preloaded":
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, __file__], env=self.environment, text=True, **pipes)
        assert self.process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def start(
        self,
        arguments: list[str],
        environment: dict[str, str],
        output: Path | None = None,
        module: str = "kd.pretrain",
    ) -> Run:
        """``output``: a file that gets what the command writes; ``module``: what holds its ``main``."""
        request = {"arguments": arguments, "environment": environment, "output": str(output or os.devnull)}
        request["module"] = module
        return Run(self.ask("start", **request), self)

    def import_modules(self, names: list[str]) -> None:
        """Imports modules, as far as there are any of these names, so that what is forked later need not."""
        self.ask("import", names=names)

    def ask(self, what: str, **values: object) -> int:
        self.process.stdin.write(json.dumps({"what": what, **values}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def serve() -> int:
    """The forking process: one request a line, one answer a line."""
    codes: dict[int, int] = {}

    def ended(pid: int, flags: int) -> bool:
        if pid not in codes:
            found, status = os.waitpid(pid, flags)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        return pid in codes

    print("ready", flush=True)
    while line := sys.stdin.readline():
        request = json.loads(line)
        if request["what"] == "import":
            for name in request["names"]:
                with suppress(Exception):  # some belong to a program that is not this one
                    importlib.import_module(name)
            answer: object = None
        elif request["what"] == "start":
            main = importlib.import_module(request["module"]).main
            pid = os.fork()
            if pid == 0:
                os.environ.update(request["environment"])
                output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                for stream in (1, 2):
                    os.dup2(output, stream)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                code = main(request["arguments"])
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(code)  # taking the interpreter down touches, and so copies, all of the memory it shares
            answer = pid
        elif request["what"] == "running":
            answer = not ended(request["pid"], os.WNOHANG)
        else:
            ended(request["pid"], 0)
            answer = codes[request["pid"]]
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(serve())
