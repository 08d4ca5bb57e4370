"""What a student says of whole clips: the mean over the windows that cover each."""

from collections.abc import Callable

import numpy as np
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from audio_datasets.audio.bad_clips import ClipList
from audio_datasets.system.stop_signals import outlive_stop_signals
from audio_datasets.tasks.task import TaskClips
from kd.data.finetune_data import EvaluationWindows, Hearing
from kd.evaluation.predict import predict_logits, skipped_clips
from students.frontend import LogMel
from students.interface import StudentOutput


class ClipEvaluator:
    """Applies students to chosen clips of a task, with any number of processes; may be called again and again."""

    def __init__(
        self,
        accelerator: Accelerator,
        clips: TaskClips,
        rows: np.ndarray,
        hearing: Hearing,
        frontend: LogMel,
        *,
        batch_size: int,
        workers: int,
        description: str,
        skipped: ClipList | None = None,
    ) -> None:
        """
        Args:
            skipped: where clips that cannot be used are listed, which then get NaN; without it they are a ``BadClipError``.
        """
        self.accelerator = accelerator
        self.frontend = frontend
        self.description = description
        self.skipped = skipped
        self.windows = EvaluationWindows(clips, rows, hearing, "refuse" if skipped is None else "skip")
        self.loader = accelerator.prepare(
            DataLoader(
                self.windows,
                batch_size,
                num_workers=workers,
                worker_init_fn=outlive_stop_signals,
                pin_memory=accelerator.device.type == "cuda",
            )
        )

    def predict(
        self,
        student: nn.Module,
        choose: Callable[[StudentOutput], Tensor] = lambda output: output.logits,
        *,
        before_batch: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        """Logits (or what else ``choose`` takes from the output) of each clip, (rows, columns) float32.

        ``before_batch`` is called by every process before each batch; it may raise, on all of them alike.
        """
        student = student.to(self.accelerator.device).eval()
        values = predict_logits(
            self.accelerator,
            lambda waveform: choose(student(self.frontend(waveform))),
            self.loader,
            len(self.windows),
            self.description,
            before_batch,
        )
        if self.skipped is not None and self.accelerator.is_main_process:
            for clip_id, reason in skipped_clips(self.loader, values).items():
                self.skipped.add(clip_id, reason)
        return self.windows.mean_of_clips(values)
