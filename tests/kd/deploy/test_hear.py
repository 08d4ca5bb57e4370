"""The three functions of the HEAR challenge."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kd.deploy import hear
from kd.deploy.tagging.tagger import Tagger


@pytest.fixture(scope="module")
def audio() -> torch.Tensor:
    """Two sounds of 2.6 s, the second with silence in its second half."""
    audio = 0.2 * torch.randn(2, 41600, generator=torch.Generator().manual_seed(0))
    audio[1, 20800:] = 0
    return audio


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> hear.HearModel:
    return hear.load_model(str(tiny_run))


def test_the_model_says_what_it_is(model: hear.HearModel) -> None:
    assert isinstance(model, torch.nn.Module)
    assert model.sample_rate == 16000
    assert model.scene_embedding_size == model.timestamp_embedding_size == model.tagger.model.embedding_dim


def test_scene_embeddings_are_those_of_the_tagger(model: hear.HearModel, tiny_run: Path, audio: torch.Tensor) -> None:
    found = hear.get_scene_embeddings(audio, model)
    assert found.dtype == torch.float32
    wanted = np.stack([tags.embedding for tags in Tagger.load(tiny_run)(audio, 16000)])
    assert np.array_equal(found.numpy(), wanted)
    assert torch.equal(model(audio), found)


def test_timestamp_embeddings_are_of_windows_around_the_timestamps(model: hear.HearModel, audio: torch.Tensor) -> None:
    embeddings, timestamps = hear.get_timestamp_embeddings(audio, model)
    assert embeddings.shape == (2, 53, model.timestamp_embedding_size)
    assert np.allclose(timestamps.numpy(), np.arange(53) * 50.0)
    centre = 16000 * 3 // 10  # of the timestamp of 300 ms
    window = audio[1:, centre - 1280 : centre + 1280].numpy()
    wanted = model.tagger.model.run(window)[1][0]
    assert np.abs(embeddings[1, 6].numpy() - wanted).max() < 1e-3
    at_the_start = np.concatenate([np.zeros(1280, np.float32), audio[0, :1280].numpy()])
    assert np.abs(embeddings[0, 0].numpy() - model.tagger.model.run(at_the_start[None])[1][0]).max() < 1e-3
    silent = embeddings[1, 30:]
    assert (silent - silent[0]).abs().max() < 1e-3
    assert (embeddings[1, 6] - silent[0]).abs().max() > 0.01


def test_what_cannot_be_is_refused(model: hear.HearModel, tiny_run: Path) -> None:
    with pytest.raises(ValueError, match=r"shape \(sounds, samples\), with samples; found \(3,\)"):
        hear.get_scene_embeddings(torch.zeros(3), model)
    with pytest.raises(ValueError, match="give a run folder"):
        hear.load_model()
    with pytest.raises(ValueError, match="one sample to 3600 s apart; found 0 s"):
        hear.load_model(str(tiny_run), timestamp_hop_seconds=0.0)
