"""What every further format is made from, and what comes out.

Shapes: B batch, N samples, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kd.deploy.exporting.clips import ClipSet
from kd.deploy.exporting.parity import Network
from kd.deploy.exporting.subject import Subject
from kd.deploy.graph.network import ExportedNetwork
from teacher_logits.teachers.export_folder import ExportCard


class _PlainTuple(nn.Module):
    """Converters take no named tuples."""

    def __init__(self, network: ExportedNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, waveform: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, N) -> scores (B, C), logits (B, C), embedding (B, E)"""
        return tuple(self.network(waveform))


@dataclass(frozen=True)
class Source:
    """What is converted."""

    subject: Subject
    card: ExportCard
    folder: Path
    """The export folder, which has its ``model.onnx`` already."""
    clips: ClipSet
    """On which the result is compared."""

    def network(self) -> nn.Module:
        """The student with its front end, for one clip at a time: what phones take. Returns a plain tuple of ``Outputs``."""
        network = ExportedNetwork(self.subject.student, self.subject.frontend, self.subject.label_space, one_clip=True)
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        return _PlainTuple(network).eval()

    def example(self, clips: int = 1) -> torch.Tensor:
        """Noise, (clips, N): windows of the length that the student was evaluated with."""
        draws = torch.Generator().manual_seed(0)
        return 0.1 * torch.randn(clips, self.subject.window.samples, generator=draws)


@dataclass(frozen=True)
class Converted:
    """A model in another format."""

    path: Path
    network: Network | None
    """Runs it in its own runtime: windows (B, N) -> logits (B, C). None if this machine cannot."""
    note: str = ""


@dataclass(frozen=True)
class Format:
    """A further form of an export."""

    name: str
    convert: Callable[[Source], Converted]
    """Writes it into the export folder. Raises ValueError for a student that it cannot take."""
    modules: tuple[str, ...] = ()
    """Packages that must be installed."""
    install: str = ""
    """How to install them."""
    refusal: Callable[[Subject], str] = lambda subject: ""
    """Why a student cannot have this format; "" if it can."""
