"""The log-mel front end made of convolutions and matrix products, for runtimes that have no Fourier transform.

Gives the numbers of ``students.frontend.LogMel`` within rounding. A frame of N = p · q samples is x[q a + b], and a frequency
is k = k₁ + p k₂. Its transform is

    X[k] = Σ_b exp(-2πi b k / N) · Σ_a exp(-2πi a k₁ / p) x[q a + b].

The inner sum is a convolution along time with q groups, since q divides the hop; the outer one is a matrix product for each
k₁. For real input |X[N - k]| = |X[k]|, so k₁ up to p / 2 is enough. For N = 1024 = 32 · 32 this takes a twelfth of the
multiplications of a full DFT.

All matrices are computed in the graph from a few vectors. A runtime does so once, when it loads the file, and the file is half a
megabyte smaller.

Shapes: B batch, N samples, R rows of q samples, T frames, M mel bands, J = p / 2 + 1 values of k₁, P values of k₂.
"""

import math

import torch
from torch import Tensor, nn

from students.frontend import DECIBELS_PER_LN, MINIMUM_DEVIATION, LogMelConfig, mel_of_hz

_TURN = 2.0 * math.pi
_BANDS = 16
"""Bands that are computed together: nine tenths of the mel matrix are zeros, and this leaves out most of them."""


class ConvolutionalLogMel(nn.Module):
    """Waveform (B, N) -> log-mel spectrogram (B, 1, M, T), for export; see ``LogMel`` for what it computes."""

    def __init__(self, config: LogMelConfig) -> None:
        super().__init__()
        self.config = config
        self.q = _factor(config)
        self.p = config.n_fft // self.q
        left = (config.n_fft - config.window_samples) // 2
        window = nn.functional.pad(torch.hann_window(config.window_samples, periodic=False), (left, config.n_fft))
        # Rows of a frame in which the window is not all zeros.
        self.first, self.end = left // self.q, -(-(left + config.window_samples) // self.q)
        rows = window[: config.n_fft].view(self.p, self.q)[self.first : self.end]
        k1 = torch.arange(self.p // 2 + 1)[:, None]
        # Rows of k₂ = 0, q - 1, 1, q - 2, … hold frequencies in ascending order, so that a few mel bands need a few of them.
        k2 = [order for number in range(-(-self.q // 2)) for order in (number, self.q - 1 - number)][: self.q]
        self.register_buffer("k2", torch.tensor(k2), persistent=False)
        k = k1 + self.p * self.k2  # (J, P)
        # N - k has the power of k. For k₁ = 0 and k₁ = p / 2 both are in the same row, and one of them is left out.
        both = (k1 == 0) | (2 * k1 == self.p)
        k = torch.where(both, k, torch.minimum(k, config.n_fft - k))
        k = torch.where(k < config.n_fft // 2, k, -1)  # LogMel has no band at the Nyquist frequency
        mel = mel_of_hz(k.clamp(min=0) * (config.sample_rate_hz / config.n_fft))
        low, high = mel_of_hz(torch.tensor([config.fmin_hz, config.fmax_hz]))
        position = torch.where(k < 0, -10.0, (mel - low) * ((config.n_mels + 1) / (high - low)))
        self.register_buffer("window", rows.t()[:, None].contiguous(), persistent=False)  # (q, 1, rows)
        self.register_buffer("position", position, persistent=False)  # (J, P): of each frequency, in units of bands
        self.groups = [
            _group(position, first, min(first + _BANDS, config.n_mels)) for first in range(0, config.n_mels, _BANDS)
        ]

    def forward(self, waveform: Tensor) -> Tensor:
        """(B, N) at ``config.sample_rate_hz``, in [-1, 1] -> (B, 1, M, T)"""
        config, q = self.config, self.q
        samples = waveform.shape[1]
        if config.remove_mean:
            waveform = waveform - waveform.mean(1, keepdim=True)
        needed = torch.sym_max(samples, config.minimum_samples)
        waveform = torch.cat(
            [waveform, waveform.new_zeros(1, config.minimum_samples).expand(waveform.shape[0], -1)], dim=1
        )
        waveform = waveform[:, :needed]
        if config.preemphasis:
            waveform = waveform[:, 1:] - config.preemphasis * waveform[:, :-1]
        half = config.n_fft // 2
        start, end = half - self.first * q, half - (config.n_fft - self.end * q)
        waveform = nn.functional.pad(waveform[:, None], (start, end), mode="reflect")[:, 0]
        rows = waveform.shape[1] // q
        rows_first = waveform[:, : rows * q].unflatten(1, (rows, q)).transpose(1, 2)  # (B, q, R)
        power = self._power(rows_first)  # (B, J, P, T)
        bands = torch.cat([self._bands(power, *group) for group in self.groups], dim=1)
        # ln(x + offset) as ln(x / offset + 1) + ln(offset): the exporter's optimizer takes an offset of 1e-10 for 0.
        unit = DECIBELS_PER_LN if config.logarithm == "db" else 1.0
        log_mel = (bands / config.log_offset + 1.0).log() * (unit / config.scale)
        log_mel = log_mel + (math.log(config.log_offset) * unit + config.shift) / config.scale
        if config.standardize:
            mean = log_mel.mean((1, 2), keepdim=True)
            deviation = (log_mel - mean).square().mean((1, 2), keepdim=True).sqrt()
            log_mel = (log_mel - mean) / deviation.clamp(min=MINIMUM_DEVIATION)
        if config.tile_seconds:
            tiled = round(config.tile_seconds * config.sample_rate_hz)
            lost = 1 if config.preemphasis else 0
            frames = 1 + (torch.sym_max(needed, tiled) - lost) // config.hop_samples
            times = (frames + log_mel.shape[2] - 1) // log_mel.shape[2]  # of positive numbers: ONNX divides towards 0
            log_mel = log_mel[:, :, None].expand(-1, -1, times, -1).flatten(2)[:, :, :frames]
        return log_mel[:, None]

    def _power(self, rows: Tensor) -> Tensor:
        """(B, q, R) -> (B, J, P, T)"""
        q, columns = self.q, self.p // 2 + 1
        device = rows.device
        quarter = torch.tensor([0.0, 0.25 * _TURN], device=device)  # real part, minus the imaginary part
        a = torch.arange(self.first, self.end, device=device)
        k1 = torch.arange(columns, device=device)
        angle = (a * k1[:, None] % self.p) * (_TURN / self.p)  # (J, rows)
        inner = torch.cos(angle[:, None] + quarter[:, None])  # (J, 2, rows): real and imaginary part
        kernels = self.window * inner.flatten(0, 1)  # (q, 2 J, rows)
        sums = nn.functional.conv1d(
            rows, kernels.flatten(0, 1)[:, None], stride=self.config.hop_samples // q, groups=q
        )  # (B, q * 2 J, T)
        sums = sums.unflatten(1, (q, columns, 2)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, J, 2 q, T)

        b = torch.arange(q, device=device)
        k = k1[:, None] + self.p * self.k2  # (J, P)
        angle = (k[:, :, None] * b % self.config.n_fft) * (_TURN / self.config.n_fft)  # (J, P, q)
        # exp(-iθ) (x + iy) = (x cos θ + y sin θ) + i (y cos θ - x sin θ)
        shift = torch.tensor([[0.0, -0.25 * _TURN], [0.25 * _TURN, 0.0]], device=device)
        outer = torch.cos(angle[:, None, :, None, :] + shift[:, None, :, None])  # (J, 2, P, 2, q)
        spectrum = torch.matmul(outer.flatten(1, 2).flatten(2, 3), sums)  # (B, J, 2 P, T)
        squares = spectrum * spectrum  # exported as a product, which runtimes have faster code for than for a power
        return squares[:, :, :q] + squares[:, :, q:]

    def _bands(self, power: Tensor, bands: range, k2: slice) -> Tensor:
        """(B, J, P, T) -> the given mel bands (B, bands, T), of the rows of k₂ in which they are not zero"""
        centre = torch.arange(bands.start + 1, bands.stop + 1, device=power.device, dtype=torch.float32)
        position = self.position[:, k2].flatten()
        bank = (1.0 - (position - centre[:, None]).abs()).clamp(min=0.0)
        return torch.matmul(bank, power[:, :, k2].flatten(1, 2))


def _group(position: Tensor, first: int, end: int) -> tuple[range, slice]:
    """Neighbouring bands, and the rows of k₂ that they need."""
    needed = ((position > first) & (position < end + 1)).any(0).nonzero().flatten().tolist()
    return range(first, end), slice(needed[0], needed[-1] + 1) if needed else slice(0, 1)


def _factor(config: LogMelConfig) -> int:
    """q: the divisor of both hop and transform that needs the fewest multiplications per frame."""
    common = math.gcd(config.n_fft, config.hop_samples)

    def cost(q: int) -> int:
        return config.n_fft * (config.n_fft // q + 2) + (config.n_fft // q // 2 + 1) * (2 * q) ** 2

    return min((q for q in range(1, common + 1) if common % q == 0), key=cost)
