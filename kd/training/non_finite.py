"""Runs a batch again whose loss was not finite.

    python -m kd.training.non_finite runs/mn10/non_finite/step-00001234-process-0

prints its losses and names the first input, layer or loss that is not finite (``kd.training.batch_dump``).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from audio_datasets.system.command import parse, run_command
from audio_datasets.system.files import read_json
from kd.training.batch_dump import DUMP_FILE, run_dump


@dataclass(frozen=True)
class NonFiniteConfig:
    """Run a batch of kd pretrain or kd finetune again whose loss was not finite."""

    dump: tyro.conf.Positional[Path]
    """Folder of the batch, inside the run's non_finite/."""
    trust: tuple[str, ...] = ()
    """Your own students and objectives, each MODULE:CLASS, that the dump may load."""


def report(config: NonFiniteConfig) -> None:
    findings = run_dump(config.dump, config.trust)
    card = read_json(config.dump / DUMP_FILE)
    print(f"epoch {card['epoch']}, step {card['step']}. {card['clips']}")
    for name, value in findings.losses.items():
        print(f"{name}: {value} (in the run: {card['losses'].get(name)})")
    print(f"first that is not finite: {findings.first or 'nothing: this time the step was finite'}")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    return run_command(lambda: report(parse(NonFiniteConfig, arguments, "python -m kd.training.non_finite")))


if __name__ == "__main__":
    raise SystemExit(main())
