"""The ``kd`` command: one subcommand per stage, each loaded only when it is called."""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from audio_datasets.system.stop_signals import interrupt_once

COMMANDS = {
    "demo": ("kd.demo", "run the whole pipeline on synthetic sound scenes, in a few minutes"),
    "pack": ("audio_datasets.pack", "pack a folder or a manifest of audio files into a clip store"),
    "teach": ("teacher_logits.precompute", "run teachers over a clip store and store their logits"),
    "import-logits": ("teacher_logits.import_logits", "import published predictions into a logit store"),
    "compact-logits": ("teacher_logits.compact", "keep only the largest logits of each clip in a logit store"),
    "verify": ("teacher_logits.verify", "check logit stores against a clip store"),
    "pretrain": ("kd.pretrain", "train a student on labels and teacher logits"),
    "finetune": ("kd.finetune", "fine-tune a student on ESC-50, FSD50K, OpenMIC, DCASE20 or your own sounds"),
    "distill": ("kd.distill", "train a small student from a folder of sounds of which some are labelled"),
    "evaluate": ("kd.evaluate", "evaluate a run, a checkpoint or a teacher on a clip store"),
    "tag": ("kd.tag", "tag audio files with a trained student or an export"),
    "export": ("kd.export", "export a student as a folder that runs without PyTorch"),
    "inspect": ("kd.inspect_student", "measure what the dynamic parts of a trained DyMN contribute"),
    "report": ("kd.report", "write the report of a run, as a web page and as text"),
    "compare": ("kd.compare", "compare runs side by side"),
    "doctor": ("kd.doctor", "check this machine and your data, and predict the bottleneck of training"),
    "profile": ("kd.profile_students", "measure what students cost: parameters, MACs, memory, file sizes, latency"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: kd COMMAND [OPTIONS]", ""]
    lines += [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    lines += ["", "kd COMMAND --help      a command's main options", "kd COMMAND --help-all  all of its options"]
    return "\n".join([*lines, "kd --version           the version of this package"])


def installed_version() -> str:
    """The version of this package; "unknown" for a source folder that is not installed."""
    try:
        return version("audio-kd")
    except PackageNotFoundError:
        return "unknown (not installed)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit code, which is 2 for a command that does not exist."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments and arguments[0] in ("-V", "--version"):
        print(f"kd {installed_version()}")
        return 0
    if not arguments:
        print(usage(), file=sys.stderr)
        return 2
    if arguments[0] not in COMMANDS:
        nearest = get_close_matches(arguments[0].replace("_", "-"), COMMANDS, n=1)
        hint = f"; did you mean kd {nearest[0]}?" if nearest else ""
        print(f"error: no such command: {arguments[0]}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    interrupt_once()
    try:  # importing PyTorch takes seconds
        command = import_module(COMMANDS[arguments[0]][0])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return command.main(arguments[1:])


if __name__ == "__main__":
    raise SystemExit(main())
