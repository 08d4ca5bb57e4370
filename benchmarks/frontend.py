"""Log-mel front end: clips per second against a plain implementation that rebuilds its mel bank on every call.

    python benchmarks/frontend.py

Ten-second clips of noise at 32 kHz, batches of 1 and 8, one and two threads; evaluation mode (fixed mel bands) and training
mode (other bands for every clip in ours, for every batch in the plain one, which cannot do more). Both run in turns, so
that a busy machine slows both; the ratio is that of the medians. The rows with two threads mean something only where two
cores are idle: threads that wait for one that is not running stop both, and ours meet more often.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torchaudio
from machine import processor_name
from torch import Tensor

from students.frontend import LogMel, LogMelConfig, draw_band_edges

CLIP_SECONDS = 10
TURNS = 15
BATCH_SIZES = (1, 8)
THREADS = (1, 2)


def plain_log_mel(waveform: Tensor, config: LogMelConfig, fmin_hz: float, fmax_hz: float) -> Tensor:
    """(batch, samples) -> (batch, 1, n_mels, frames) with torch.stft and torchaudio's mel bank, as it is usually written."""
    kernel = torch.tensor([[[-config.preemphasis, 1.0]]])
    emphasised = torch.nn.functional.conv1d(waveform[:, None], kernel)[:, 0]
    spectrum = torch.stft(
        emphasised,
        config.n_fft,
        config.hop_samples,
        config.window_samples,
        torch.hann_window(config.window_samples, periodic=False),
        center=True,
        return_complex=True,
    )
    power = torch.view_as_real(spectrum).square().sum(-1)
    bank, _ = torchaudio.compliance.kaldi.get_mel_banks(
        config.n_mels, config.n_fft, config.sample_rate_hz, fmin_hz, fmax_hz, 100.0, -500.0, 1.0
    )
    mel = torch.matmul(torch.nn.functional.pad(bank, (0, 1)), power)
    return ((mel + config.log_offset).log() + config.shift)[:, None] / config.scale


def seconds(function: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(ours: Callable[[], Tensor], plain: Callable[[], Tensor]) -> tuple[float, float]:
    """Median seconds of each, measured in turns after two calls that do not count."""
    times: list[tuple[float, float]] = [(seconds(ours), seconds(plain)) for _ in range(TURNS + 2)][2:]
    return statistics.median(ours for ours, _ in times), statistics.median(plain for _, plain in times)


def main(arguments: Sequence[str] | None = None) -> int:
    torch.set_flush_denormal(True)
    config = LogMelConfig()
    front_end = LogMel(config)
    rng = np.random.default_rng(0)
    print(f"{processor_name()}, torch {torch.__version__}; clips of {CLIP_SECONDS} s, median of {TURNS} turns")
    print("| mode | threads | batch | plain, clips/s | ours, clips/s | ratio |")
    print("|---|---|---|---|---|---|")
    with torch.inference_mode():
        for threads in THREADS:
            torch.set_num_threads(threads)
            for batch_size in BATCH_SIZES:
                samples = CLIP_SECONDS * config.sample_rate_hz
                waveform = torch.from_numpy(rng.normal(0.0, 0.1, (batch_size, samples)).astype(np.float32))
                edges = torch.tensor([draw_band_edges(config, rng) for _ in range(batch_size)])
                modes = {
                    "evaluation": (None, (config.fmin_hz, config.fmax_hz)),
                    "training": (edges, tuple(edges[0].tolist())),
                }
                for mode, (band_edges, plain_edges) in modes.items():
                    ours, plain = compare(
                        lambda waveform=waveform, band_edges=band_edges: front_end(waveform, band_edges),
                        lambda waveform=waveform, edges=plain_edges: plain_log_mel(waveform, config, *edges),
                    )
                    print(
                        f"| {mode} | {threads} | {batch_size} | {batch_size / plain:.0f} | {batch_size / ours:.0f}"
                        f" | {plain / ours:.1f}× |"
                    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
