"""Early stopping: keeps the weights with the best validation metric, and decides when to stop.

The history is read from the run's log, so that a killed and resumed run decides the same as an uninterrupted one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from audio_datasets.system.files import written_aside
from kd.evaluation.label_metrics import smaller_is_better
from kd.run_folder.metrics_log import read_metrics
from students.weight_files import save_tensors
from students.weights import weights_fingerprint

BEST_FILE = "best.safetensors"


class EarlyStopping:
    """Watches one validation metric of a run. Does nothing if ``metric`` is None."""

    def __init__(self, metric: str | None, patience: int, folder: Path, accelerator: Accelerator) -> None:
        self.metric = metric
        self.patience = patience
        self.path = folder / BEST_FILE
        self.accelerator = accelerator
        self.sign = -1.0 if metric is not None and smaller_is_better(metric) else 1.0

    def _history(self, log: Path) -> list[float]:
        """The metric of each validation so far, with its sign changed if necessary so that larger is better."""
        records = read_metrics(log, "validation") if log.exists() else []
        return [self.sign * record[self.metric] for record in records]

    def keep_if_best(self, metrics: Mapping[str, Any], student: nn.Module, log: Path) -> None:
        """Saves the weights if their metric is the best so far. Called with a validation's metrics before they are logged.

        Raises:
            ValueError: the metric is not defined on these clips.
        """
        if self.metric is None:
            return
        if metrics[self.metric] is None:
            raise ValueError(
                f"{self.metric} is not defined on the validation clips; choose another metric for early stopping"
            )
        if self.accelerator.is_main_process and all(
            self.sign * metrics[self.metric] > value for value in self._history(log)
        ):
            state = {name: value.detach().cpu().contiguous() for name, value in student.state_dict().items()}
            with written_aside(self.path) as aside:
                save_tensors(state, aside, metadata={"weights_fingerprint": weights_fingerprint(student)})

    def should_stop(self, log: Path) -> bool:
        """Whether the last ``patience`` validations brought no improvement."""
        if self.metric is None:
            return False
        self.accelerator.wait_for_everyone()
        history = self._history(log)
        return bool(history) and len(history) - 1 - history.index(max(history)) >= self.patience

    def load_best(self, student: nn.Module) -> None:
        """Loads the best weights into the student. ValueError if the file has changed."""
        if self.metric is None:
            return
        self.accelerator.wait_for_everyone()
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata()  # absent in runs begun with version 0.1
            student.load_state_dict(load_file(self.path))
            if metadata is not None and weights_fingerprint(student) != metadata.get("weights_fingerprint"):
                raise ValueError("other weights")
        except (ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{self.path} is damaged ({error}), so the best weights are lost; start over with --restart"
            ) from error
