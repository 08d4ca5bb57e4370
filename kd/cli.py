"""The ``kd`` command: one subcommand per stage, each loaded only when it is called."""

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "demo": ("kd.demo", "the whole pipeline on synthetic sound scenes, in a few minutes"),
    "pack": ("audio_datasets.pack", "put a folder or a manifest of audio files into a clip store"),
    "teach": ("teacher_logits.precompute", "run teachers over a clip store and keep their logits"),
    "import-logits": ("teacher_logits.import_logits", "put published predictions into a logit store"),
    "compact-logits": ("teacher_logits.compact", "keep only the largest logits of each clip in a logit store"),
    "verify": ("teacher_logits.verify", "check logit stores against a clip store"),
    "pretrain": ("kd.pretrain", "train a student on labels and teacher logits"),
    "finetune": ("kd.finetune", "carry a student over to ESC-50, FSD50K, OpenMIC, DCASE20 or your own sounds"),
    "evaluate": ("kd.evaluate", "metrics of a run, a checkpoint or a teacher on a clip store"),
    "inspect": ("kd.inspect_student", "what the dynamic parts of a trained DyMN are worth, as a table and charts"),
    "report": ("kd.report", "the report of a run, as a page and as text"),
    "compare": ("kd.compare", "runs side by side"),
    "doctor": ("kd.doctor", "whether this machine and these data are fit for training, and what it will wait for"),
    "profile": ("kd.profile_students", "what students cost: parameters, MACs, memory, file sizes, latency"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: kd COMMAND [OPTIONS]   (kd COMMAND --help lists a command's options)", ""]
    return "\n".join(lines + [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit code; 2 for a command that does not exist."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        if arguments:
            print(f"error: no such command: {arguments[0]}\n", file=sys.stderr)
        print(usage(), file=sys.stderr)
        return 2
    return import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])


if __name__ == "__main__":
    raise SystemExit(main())
