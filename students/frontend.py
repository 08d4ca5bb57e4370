"""The log-mel front end of all students.

Numerically the same as that of PaSST and EfficientAT (Koutini et al. 2022, Schmid et al. 2023): pre-emphasis, centred STFT,
power, Kaldi's mel bands, logarithm, shift and scale. Other settings give other front ends, such as MergeNet's
(``students.families.mergenet``). Comments in the code explain optimisations, most of which are for the CPU.

Shapes: B batch, N samples, M mel bands, T frames, K frequency bins below the Nyquist frequency.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn

Logarithm = Literal["ln", "db"]

WHOLE = ("sample_rate_hz", "n_fft", "window_samples", "hop_samples", "n_mels")
LARGEST = {
    **dict(zip(WHOLE, (1_000_000, 2**20, 2**20, 2**20, 4_096), strict=True)),
    **dict.fromkeys(("fmin_hz", "fmax_hz", "fmin_jitter_hz", "fmax_jitter_hz"), 1_000_000),
    "preemphasis": 1_000,
    "tile_seconds": 3_600,
    **dict.fromkeys(("log_offset", "shift", "scale"), 10**9),
}
"""The largest value of each setting. Beyond it nothing is heard, and a damaged file asks for any amount of memory."""
SMALLEST = 1e-30
"""The smallest offset and scale: float32 takes less for 0."""

DECIBELS_PER_LN = 10.0 / math.log(10.0)

MINIMUM_DEVIATION = 1e-3
"""Below this, a clip's log-mel spectrogram counts as constant and its deviation as rounding, so that silence stays 0."""


@dataclass(frozen=True)
class LogMelConfig:
    """Settings of LogMel; the defaults are those of the public checkpoints. Raises ValueError for impossible values."""

    help_title: ClassVar[str] = "Front end (log-mel spectrogram)"

    sample_rate_hz: int = 32000
    """Sample rate of the waveform."""
    n_fft: int = 1024
    """Length of the Fourier transform in samples; must be even."""
    window_samples: int = 800
    """Length of the (symmetric) Hann window in samples; at most n_fft."""
    hop_samples: int = 320
    """Distance between frames in samples."""
    n_mels: int = 128
    """Number of mel bands."""
    fmin_hz: float = 0.0
    """Lower edge of the lowest band."""
    fmax_hz: float = 15000.0
    """Upper edge of the highest band; at most half the sample rate."""
    preemphasis: float = 0.97
    """Pre-emphasis: y[n] = x[n] - preemphasis * x[n - 1], one sample shorter than x. 0 turns it off."""
    log_offset: float = 1e-5
    """Added to the power of each band before the logarithm."""
    shift: float = 4.5
    """Added to the logarithm."""
    scale: float = 5.0
    """The shifted logarithm is divided by this."""
    logarithm: Logarithm = "ln"
    """Natural logarithm of the power (ln), or decibels (db: 10 log10)."""
    remove_mean: bool = False
    """Subtract the mean of each waveform first."""
    standardize: bool = False
    """Standardize the log-mel spectrogram of each clip to mean 0 and standard deviation 1."""
    tile_seconds: float = 0.0
    """Repeat the frames of a shorter clip until it has this length. 0 turns it off."""
    fmin_jitter_hz: float = 10.0
    """Mel jitter in training: the lower edge is drawn from fmin_hz to this much above it."""
    fmax_jitter_hz: float = 2000.0
    """Mel jitter in training: the upper edge is drawn from a range of this width around fmax_hz."""

    def __post_init__(self) -> None:
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            whole = name in WHOLE
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise ValueError(
                    f"{name} must be a {'whole ' * whole}number{' above 0' * whole}; found {str(value)[:60]!r}"
                )
            if whole and value < 1:
                raise ValueError(f"{name} must be a whole number above 0; found {value!r}")
            if abs(value) > largest:
                raise ValueError(f"{name} must be at most {largest:,}; found {value if value < 1e300 else 'more'}")
        for name in ("fmin_hz", "preemphasis", "fmin_jitter_hz", "fmax_jitter_hz", "tile_seconds"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative; found {getattr(self, name)}")
        for name in ("log_offset", "scale"):
            if not SMALLEST <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0; found {getattr(self, name)}")
        if not math.isfinite(self.shift):
            raise ValueError(f"shift must be a finite number; found {self.shift}")
        if self.logarithm not in get_args(Logarithm):
            raise ValueError(f"unknown logarithm {self.logarithm!r}; choices: {', '.join(get_args(Logarithm))}")
        if self.n_fft % 2:
            raise ValueError(f"n_fft must be even; found {self.n_fft}")
        if self.window_samples > self.n_fft:
            raise ValueError(f"window_samples must be at most n_fft ({self.n_fft}); found {self.window_samples}")
        if not self.fmin_hz < self.fmax_hz <= self.nyquist_hz:
            raise ValueError(
                f"mel bands need fmin_hz < fmax_hz <= {self.nyquist_hz:g} Hz (half the sample rate);"
                f" found fmin_hz={self.fmin_hz:g}, fmax_hz={self.fmax_hz:g}"
            )
        if self.fmin_hz + self.fmin_jitter_hz >= self.fmax_hz - self.fmax_jitter_hz / 2:
            raise ValueError(
                f"jitter of {self.fmin_jitter_hz:g} and {self.fmax_jitter_hz:g} Hz is too large for mel bands between"
                f" {self.fmin_hz:g} and {self.fmax_hz:g} Hz: the lower edge could exceed the upper one"
            )

    @property
    def nyquist_hz(self) -> float:
        return self.sample_rate_hz / 2

    @property
    def minimum_samples(self) -> int:
        """The shortest waveform that can be reflected at its ends; LogMel pads shorter ones with zeros at the end."""
        return self.n_fft // 2 + 1 + self._lost_samples

    def frames(self, samples: int) -> int:
        """The number of frames that LogMel makes from a waveform."""
        samples = max(samples, self.minimum_samples, round(self.tile_seconds * self.sample_rate_hz))
        return 1 + (samples - self._lost_samples) // self.hop_samples

    def to_dict(self) -> dict[str, Any]:
        """All settings, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Self:
        """The reverse of ``to_dict``; missing settings get their defaults. ValueError for an unknown one."""
        known = [known.name for known in dataclasses.fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(f"unknown front-end setting {', '.join(unknown)}; choices: {', '.join(known)}")
        return cls(**settings)

    @property
    def _lost_samples(self) -> int:
        return 1 if self.preemphasis else 0


def draw_band_edges(config: LogMelConfig, rng: np.random.Generator) -> tuple[float, float]:
    """One clip's jittered (fmin_hz, fmax_hz) for training.

    fmin_hz is drawn from [fmin, fmin + jitter), fmax_hz from fmax ± half its jitter, but not above the Nyquist frequency.
    """
    fmin_hz = config.fmin_hz + config.fmin_jitter_hz * rng.random()
    fmax_hz = config.fmax_hz + config.fmax_jitter_hz * (rng.random() - 0.5)
    return fmin_hz, min(fmax_hz, config.nyquist_hz)


def mask_spectrogram(mel: Tensor, time_masks: Tensor | None, band_masks: Tensor | None) -> Tensor:
    """SpecAugment's masks (Park et al., 2019): mel (B, 1, M, T) with masked values set to the clip's mean.

    Args:
        time_masks: (B, masks, 2) on any device: start and end as fractions of the frames; None for no masks.
        band_masks: the same for the mel bands.
    """
    if time_masks is None and band_masks is None:
        return mel
    masked = torch.zeros((), dtype=torch.bool, device=mel.device)
    for masks, axis in ((band_masks, 2), (time_masks, 3)):
        if masks is not None:
            size = mel.shape[axis]
            place = torch.arange(size, device=mel.device) / size
            edges = masks.to(mel.device)[..., None]  # (B, masks, 2, 1)
            hidden = ((place >= edges[:, :, 0]) & (place < edges[:, :, 1])).any(1)  # (B, size)
            masked = masked | (hidden[:, None, :, None] if axis == 2 else hidden[:, None, None, :])
    return torch.where(masked, mel.mean((2, 3), keepdim=True), mel)


def mask_stripes(mel: Tensor, stripes: Tensor) -> Tensor:
    """Applies the masks of a stored view, one for each axis: ``stripes`` (B, 4), first bands, then time."""
    return mask_spectrogram(mel, time_masks=stripes[:, None, 2:], band_masks=stripes[:, None, :2])


def mel_banks(config: LogMelConfig, band_edges: Tensor) -> Tensor:
    """Kaldi's triangular mel bands between given edges, for any number of clips at once and on their device.

    ``band_edges`` (B, 2): fmin_hz and fmax_hz of each clip -> (B, M, K). The triangles are linear on the mel scale,
    1127 ln(1 + f / 700), have height 1 and end at their neighbours' centres.
    """
    bin_hz = torch.arange(config.n_fft // 2, device=band_edges.device) * (config.sample_rate_hz / config.n_fft)
    low, high = mel_of_hz(band_edges.float()).unsqueeze(-1).unbind(1)  # (B, 1) each
    # Position of each bin in units of bands: band m is centred at m + 1 and ends at m and m + 2.
    position = (mel_of_hz(bin_hz) - low) * ((config.n_mels + 1) / (high - low))  # (B, K)
    centre = torch.arange(1, config.n_mels + 1, device=band_edges.device, dtype=position.dtype)
    return (position[:, None, :] - centre[:, None]).abs_().neg_().add_(1.0).clamp_(min=0.0)


def mel_of_hz(frequency_hz: Tensor) -> Tensor:
    return 1127.0 * torch.log1p(frequency_hz / 700.0)


class _BandGroup(NamedTuple):
    """Neighbouring mel bands, and the frequency bins in which any of them is nonzero."""

    bands: slice
    bins: slice


def _band_groups(config: LogMelConfig, edges: Sequence[Sequence[float]]) -> list[_BandGroup]:
    """Groups of 16 bands with the bins that they cover, for clips with the given edges.

    Nine tenths of a mel bank are zeros. Eight small products that skip most of them take a quarter of the time of one
    large product (measured on CPU for 128 bands). More groups bring no further gain.
    """
    lows = [1127.0 * math.log1p(fmin_hz / 700.0) for fmin_hz, _ in edges]
    highs = [1127.0 * math.log1p(fmax_hz / 700.0) for _, fmax_hz in edges]
    bin_hz = config.sample_rate_hz / config.n_fft

    def edge_hz(low: float, high: float, band: int) -> float:
        return 700.0 * math.expm1((low + band * (high - low) / (config.n_mels + 1)) / 1127.0)

    groups = []
    for first in range(0, config.n_mels, 16):
        last = min(first + 16, config.n_mels) - 1
        # A band's edges increase with both fmin and fmax, so the extreme clips give the extreme edges.
        first_bin = max(0, math.floor(edge_hz(min(lows), min(highs), first) / bin_hz) - 1)
        end_bin = min(config.n_fft // 2, math.ceil(edge_hz(max(lows), max(highs), last + 2) / bin_hz) + 1)
        groups.append(_BandGroup(slice(first, last + 1), slice(first_bin, end_bin)))
    return groups


class LogMel(nn.Module):
    """Waveform (B, N) -> log-mel spectrogram (B, 1, M, T), always computed in float32, even under autocast.

    Frames are centred: frame t is centred at sample t * hop, and the waveform is reflected at its ends. A waveform too short for that is
    padded with zeros at the end. Digital silence gives a finite constant, which is 0 if clips are standardised.
    """

    def __init__(self, config: LogMelConfig = LogMelConfig()) -> None:
        super().__init__()
        self.config = config
        edges = (config.fmin_hz, config.fmax_hz)
        self._groups = _band_groups(config, [edges])
        # Not persistent: they follow from the configuration and do not belong in weights files.
        window = torch.hann_window(config.window_samples, periodic=False)
        left = (config.n_fft - config.window_samples) // 2
        window = nn.functional.pad(window, (left, config.n_fft - config.window_samples - left))
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("mel_bank", mel_banks(config, torch.tensor([edges])), persistent=False)

    def forward(self, waveform: Tensor, band_edges: Tensor | None = None) -> Tensor:
        """(B, N) at ``config.sample_rate_hz``, in [-1, 1] -> (B, 1, M, T)

        ``band_edges`` (B, 2), on any device: fmin_hz and fmax_hz of each clip, which replace the configured ones. The caller
        draws them (``draw_band_edges``).
        """
        if waveform.ndim != 2 or waveform.shape[1] == 0:
            raise ValueError(f"a batch of waveforms must have shape (batch, samples); found {tuple(waveform.shape)}")
        if band_edges is not None and band_edges.shape != (len(waveform), 2):
            raise ValueError(
                f"band edges must have shape (batch, 2), here ({len(waveform)}, 2); found {tuple(band_edges.shape)}"
            )
        with torch.autocast(waveform.device.type, enabled=False):
            if waveform.device.type != "cpu":
                return self._log_mel(waveform.float(), band_edges)
            # One clip at a time: its spectrum stays in the cache, and memory is reused instead of requested from the
            # system for every batch. This is three times faster (measured with a batch of 8), and a clip's values do not
            # depend on the batch that it is in.
            clips = waveform.float().split(1)
            edges = [None] * len(clips) if band_edges is None else band_edges.cpu().split(1)
            return torch.cat([self._log_mel(clip, edge) for clip, edge in zip(clips, edges, strict=True)])

    def _log_mel(self, waveform: Tensor, band_edges: Tensor | None) -> Tensor:
        """(B, N), (B, 2) -> (B, 1, M, T)"""
        config = self.config
        power = self._power_spectrum(waveform)
        banks = self.mel_bank if band_edges is None else mel_banks(config, band_edges.to(waveform.device))
        if waveform.device.type == "cpu":
            groups = self._groups if band_edges is None else _band_groups(config, band_edges.tolist())
            parts = [torch.matmul(banks[:, bands, bins], power[:, :, bins].transpose(1, 2)) for bands, bins in groups]
            bands = torch.cat(parts, dim=1)
        else:
            # Grouping the bands would make the host wait for the edges; on a GPU it is faster to multiply the zeros.
            bands = torch.matmul(banks, power.transpose(1, 2))
        logarithms = bands.add_(config.log_offset).log_()
        if config.logarithm == "db":
            logarithms.mul_(DECIBELS_PER_LN)
        log_mel = logarithms.add_(config.shift).div_(config.scale)
        if config.standardize:
            deviation, mean = torch.std_mean(log_mel, dim=(1, 2), correction=0, keepdim=True)
            log_mel = (log_mel - mean) / deviation.clamp(min=MINIMUM_DEVIATION)
        if config.tile_seconds:
            frames = config.frames(waveform.shape[1])
            log_mel = log_mel.repeat(1, 1, -(-frames // log_mel.shape[2]))[:, :, :frames]
        return log_mel[:, None]

    def _power_spectrum(self, waveform: Tensor) -> Tensor:
        """(B, N) -> (B, T, K)"""
        config = self.config
        if config.remove_mean:
            waveform = waveform - waveform.mean(1, keepdim=True)
        missing = config.minimum_samples - waveform.shape[1]
        if missing > 0:
            waveform = nn.functional.pad(waveform, (0, missing))
        if config.preemphasis:
            waveform = torch.sub(waveform[:, 1:], waveform[:, :-1], alpha=config.preemphasis)
        # Reflected by hand because functional.pad takes ten times as long. The window is zero-padded to n_fft because rfft
        # takes longer to pad short frames than to read long ones.
        half = config.n_fft // 2
        mirrored_start = waveform[:, 1 : half + 1].flip(1)
        mirrored_end = waveform[:, -half - 1 : -1].flip(1)
        padded = torch.cat([mirrored_start, waveform, mirrored_end], dim=1)
        frames = padded.unfold(1, config.n_fft, config.hop_samples) * self.window
        spectrum = torch.view_as_real(torch.fft.rfft(frames))[:, :, :half]
        real, imaginary = spectrum.square_().unbind(-1)
        return real + imaginary
