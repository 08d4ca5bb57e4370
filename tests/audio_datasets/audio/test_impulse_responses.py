from pathlib import Path

import numpy as np
import pytest

from audio_datasets.audio.codec import fit_length
from audio_datasets.audio.impulse_responses import convolve, load_impulse_responses


def test_convolution_is_numpys(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    wave, response = rng.standard_normal(700).astype(np.float32), rng.standard_normal(90).astype(np.float32)
    np.testing.assert_allclose(convolve(wave, response), np.convolve(wave, response)[:700], atol=1e-4)
    np.testing.assert_allclose(convolve(wave, np.array([1.0])), wave, atol=1e-6)
    assert fit_length(convolve(wave, response), 700).dtype == np.float32
    with pytest.raises(ValueError, match="no impulse responses"):
        load_impulse_responses(tmp_path, 32000)
