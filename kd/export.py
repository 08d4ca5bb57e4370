"""Exports a trained student as a folder with an ONNX model that needs neither PyTorch nor this package."""

from collections.abc import Sequence

from audio_datasets.system.command import parse, run_command
from kd.deploy.exporting.export_student import ExportConfig, export_student


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: export_student(parse(ExportConfig, arguments, "kd export")) and 0)


if __name__ == "__main__":
    raise SystemExit(main())
