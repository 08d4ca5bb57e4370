"""AST, the audio spectrogram transformer in the ``transformers`` package, as a teacher.

Gong, Chung and Glass, "AST: Audio Spectrogram Transformer", 2021. ``ast:FOLDER`` or ``ast:NAME`` names a model that
``ASTForAudioClassification.from_pretrained`` finds, with weights as safetensors and class names in its configuration.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from audio_datasets.audio.readers import FASTEST_HZ, SLOWEST_HZ
from audio_datasets.system.messages import brief, listed
from teacher_logits.stores.links import LinkKind
from teacher_logits.teachers.base import Teacher

LINK_OF_PROBLEM: dict[str | None, LinkKind] = {
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
}
"""What transformers calls the loss that a model was trained with; None where the configuration does not tell."""
SHIFT_MS = 10.0  # Kaldi's frames


@dataclass(frozen=True)
class AstFrontend:
    """Settings of AST's front end: Kaldi's filter banks, cut or padded to one length, standardised by constants."""

    sample_rate_hz: int
    n_mels: int
    frames: int
    """Frames of the input; shorter clips are padded with zeros."""
    mean: float
    """Mean of the filter banks over the training data."""
    deviation: float
    """Standard deviation of the filter banks over the training data; AST divides by twice this value."""
    standardizes: bool

    def __post_init__(self) -> None:
        """Raises ValueError for settings out of the usual range, which may come from a damaged file."""
        ranges = {"sample_rate_hz": (SLOWEST_HZ, FASTEST_HZ), "n_mels": (4, 4096), "frames": (1, 360_000)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} must be a whole number from {low} to {high}; found {brief(value)}")
        for name in ("mean", "deviation"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not abs(value) < 1e6:
                raise ValueError(f"{name} must be a number between -1,000,000 and 1,000,000; found {brief(value)}")
        if not self.deviation > 0 or not isinstance(self.standardizes, bool):
            raise ValueError(
                f"the deviation must be above 0, and standardizes true or false; found {brief(self.deviation)}, "
                f"{brief(self.standardizes)}"
            )

    def __call__(self, waveform: Tensor) -> Tensor:
        """(batch, samples) in [-1, 1] -> (batch, frames, n_mels), the same values as transformers' ASTFeatureExtractor."""
        from torchaudio.compliance import kaldi

        # float32 even under autocast: half precision is too coarse for filter banks
        with torch.autocast(waveform.device.type, enabled=False):
            banks = [
                kaldi.fbank(
                    clip[None],
                    sample_frequency=self.sample_rate_hz,
                    window_type="hanning",
                    num_mel_bins=self.n_mels,
                    frame_shift=SHIFT_MS,
                )[: self.frames]
                for clip in waveform.float()
            ]
        features = torch.stack([nn.functional.pad(bank, (0, 0, 0, self.frames - len(bank))) for bank in banks])
        return (features - self.mean) / (2.0 * self.deviation) if self.standardizes else features


class AstTeacher(Teacher):
    """An ``ASTForAudioClassification`` with the front end that it was trained with."""

    def __init__(self, name: str, network: nn.Module, frontend: AstFrontend) -> None:
        config = network.config
        # The input is a little longer than a whole number of seconds, and the rest is silence: 1024 frames are for 10 s.
        seconds = frontend.frames * SHIFT_MS / 1000.0
        super().__init__(
            name,
            [config.id2label[index] for index in range(config.num_labels)],
            sample_rate_hz=frontend.sample_rate_hz,
            clip_seconds=float(int(seconds)) if seconds >= 1.0 else seconds,
            frontend=asdict(frontend),
            architecture={
                "class": type(network).__name__,
                "heads": config.num_attention_heads,
                "frequency_stride": config.frequency_stride,
                "time_stride": config.time_stride,
                "activation": config.hidden_act,
                "norm_epsilon": config.layer_norm_eps,
            },
            link=LINK_OF_PROBLEM.get(config.problem_type),
        )
        self.network = network
        self.filter_banks = frontend
        self.eval()

    def forward(self, waveform: Tensor) -> Tensor:
        """(batch, samples) -> (batch, classes)"""
        return self.network(self.filter_banks(waveform)).logits


def load_ast_teacher(source: str) -> AstTeacher:
    """The AST in a folder or with a public name, on the CPU in evaluation mode.

    Raises ValueError if transformers is not installed, if there is no such model, or if its weights are not safetensors
    (a pickle is never loaded).
    """
    try:
        from transformers import ASTFeatureExtractor, ASTForAudioClassification
    except ModuleNotFoundError as error:
        raise ValueError(f"AST needs transformers: pip install 'audio-kd[ast]' ({error})") from error
    try:
        network, found = ASTForAudioClassification.from_pretrained(
            source, use_safetensors=True, output_loading_info=True
        )
        settings: Any = ASTFeatureExtractor.from_pretrained(source)
    except Exception as error:  # transformers and its file readers have no common error for damaged files
        raise ValueError(f"there is no AST with safetensors at {source!r}: {brief(str(error), 1000)}") from error
    if found["missing_keys"]:
        raise ValueError(
            f"{source} is not an AST with a trained classifier; missing: {listed(sorted(found['missing_keys']))}"
        )
    found = (settings.num_mel_bins, settings.max_length)
    if found != (network.config.num_mel_bins, network.config.max_length):
        raise ValueError(
            f"{source}: its feature extractor makes {brief(found[1])} frames of {brief(found[0])} bands, but the network takes "
            f"{network.config.max_length} of {network.config.num_mel_bins}"
        )
    try:
        frontend = AstFrontend(
            sample_rate_hz=settings.sampling_rate,
            n_mels=settings.num_mel_bins,
            frames=settings.max_length,
            mean=settings.mean,
            deviation=settings.std,
            standardizes=settings.do_normalize,
        )
        return AstTeacher(source.rstrip("/").rpartition("/")[2], network.float(), frontend)
    except (ValueError, KeyError) as error:  # for example, for classes without names
        raise ValueError(f"{source}: {type(error).__name__}: {error}") from error
