"""Augmentation of a batch's log-mel spectrograms. The objective applies it, with random values drawn for each clip before.

Shapes: B clips, M mel bands, T frames.
"""

from torch import Tensor, std_mean

from audio_datasets.audio.augment import mix_with_partner


def freq_mixstyle(mel: Tensor, weight: Tensor) -> Tensor:
    """Mixes each mel band's mean and deviation over time with those of the clip's partner, (B, 1, M, T) -> same shape.

    MixStyle (Zhou et al., 2021) over frequency instead of channels, used to generalise over recording devices (Kim et al., 2022;
    Schmid et al., 2022), because a device shapes the average spectrum.

    Args:
        weight: (B,), the weight of the clip's own statistics. Partners are those of ``mix_with_partner``.
    """
    deviation, mean = std_mean(mel, dim=(1, 3), correction=0, keepdim=True)  # (B, 1, M, 1)
    deviation = deviation.clamp(min=1e-3)
    return (mel - mean) / deviation * mix_with_partner(deviation, weight) + mix_with_partner(mean, weight)
