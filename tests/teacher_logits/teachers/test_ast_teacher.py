"""AST through transformers, where it is installed."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from teacher_logits.teachers.base import Teacher
from teacher_logits.teachers.loaders import knows_its_classes, load_teacher

CLASSES = ("hiss", "hum, low", "click")


@pytest.fixture(scope="module")
def ast_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random AST for clips of one second."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models") / "ast-small"
    torch.manual_seed(0)
    config = transformers.ASTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        max_length=128,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )
    network = transformers.ASTForAudioClassification(config)
    torch.nn.init.normal_(network.classifier.dense.weight)
    network.save_pretrained(folder)
    transformers.ASTFeatureExtractor(max_length=128).save_pretrained(folder)
    return folder


def test_an_ast_is_a_teacher_with_the_numbers_of_transformers(ast_folder: Path) -> None:
    import transformers

    spec = f"ast:{ast_folder}"
    teacher = load_teacher(spec)
    assert isinstance(teacher, Teacher)
    assert (teacher.name, teacher.class_names) == ("ast-small", CLASSES)
    assert (teacher.sample_rate_hz, teacher.clip_seconds) == (16000, 1.0)
    assert knows_its_classes(spec)
    waveform = 0.1 * torch.randn(3, 16000, generator=torch.Generator().manual_seed(0))
    features = transformers.ASTFeatureExtractor.from_pretrained(ast_folder)(
        [np.asarray(clip) for clip in waveform], sampling_rate=16000, return_tensors="pt"
    )["input_values"]
    torch.testing.assert_close(teacher.filter_banks(waveform), features, atol=1e-5, rtol=1e-5)
    network = transformers.ASTForAudioClassification.from_pretrained(ast_folder).eval()
    with torch.inference_mode():
        torch.testing.assert_close(teacher(waveform), network(features).logits, atol=1e-5, rtol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(teacher.filter_banks(waveform), features, atol=1e-5, rtol=1e-5)
    assert load_teacher(spec).fingerprint == teacher.fingerprint


def test_folders_without_a_trained_ast(ast_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no AST with safetensors at"):
        load_teacher(f"ast:{tmp_path}")
    import transformers

    headless = transformers.ASTModel.from_pretrained(ast_folder)
    headless.save_pretrained(tmp_path)
    transformers.ASTFeatureExtractor(max_length=128).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not an AST with a trained classifier; missing: .*classifier"):
        load_teacher(f"ast:{tmp_path}")


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install 'audio-kd\\[ast\\]'"):
        load_teacher("ast:anything")
