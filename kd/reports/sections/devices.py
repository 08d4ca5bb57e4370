"""The section on recording devices."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from kd.reports.analysis.devices import DeviceRow, device_rows
from kd.reports.document import Block, Section, Table, Text, number
from kd.reports.run_reader import RunFolder
from kd.reports.sections.wording import metric_cell, metric_name


def device_sections(run: RunFolder) -> list[Section]:
    """One section, or none if no part recorded the devices of its clips."""
    devices = device_rows(run.predictions, run.one_label)
    return [Section("Devices", tuple(device_blocks(devices)))] if devices else []


def device_blocks(devices: Sequence[DeviceRow]) -> Iterator[Block]:
    """The table of devices, and notes on how to read it."""
    metrics = list(dict.fromkeys(metric for row in devices for metric in row.scores))
    several = any(len(values) > 1 for row in devices for values in row.scores.values())
    rows = []
    for row in devices:
        seen = {True: "yes", False: "no", None: "–"}[row.seen]
        cells = [metric_cell(metric, float(np.mean(row.scores.get(metric, math.nan)))) for metric in metrics]
        rows.append((row.name, seen, number(row.clips, "{:,.0f}"), *cells))
    yield Table(("device", "seen in training", "clips", *map(metric_name, metrics)), tuple(rows))
    if several:
        yield Text("Each number is the mean over the parts of the run that have clips of the device.")
    if any(row.seen is None for row in devices[:-1]):
        yield Text("A dash means that a device was seen in training in some parts only, or that this was not recorded.")
