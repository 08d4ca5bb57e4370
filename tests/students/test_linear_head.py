"""A linear classifier in place of a trained student's head."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from students import create_student
from students.card import load_student, save_student
from students.catalog import _variants, register
from students.frontend import LogMelConfig
from students.interface import Student, StudentConfig, StudentOutput
from students.linear_head import with_linear_head

SMALL = {
    "mn01": {},
    "mn01 with attention pooling": {"head": "attention_pooling"},
    "dymn04": {"width": 0.1},
    "mergenet16": {},
    "efficientnet_b2": {},
    "passt_tiny": {"width": 64, "depth": 1, "heads": 1},
}


def linear_map(student: Student, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(classes, student.embedding_dim), torch.randn(classes)


@pytest.mark.parametrize("case", SMALL)
def test_the_copy_is_the_linear_map_of_the_embedding_also_from_disk(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = create_student(case.split()[0], 7, **SMALL[case]).eval()
    weight, bias = linear_map(student, 3)
    n_mels = student.config.options.get("n_mels", 128)
    copy = with_linear_head(student, weight, bias, n_mels)
    mel = torch.randn(2, 1, n_mels, 120)
    with torch.no_grad():
        embedding = student(mel).embedding
        torch.testing.assert_close(copy(mel).embedding, embedding)
        torch.testing.assert_close(copy(mel).logits, embedding @ weight.T + bias, rtol=1e-4, atol=1e-4)
        save_student(tmp_path, copy, ("a", "b", "c"), LogMelConfig(n_mels=n_mels))
        torch.testing.assert_close(load_student(tmp_path)(mel).logits, copy(mel).logits)


def test_a_head_that_is_not_linear_is_refused() -> None:
    """Even if its last layer is linear and has the right size."""

    class Bent(Student):
        def __init__(self, num_classes: int, options: object) -> None:
            super().__init__(num_classes, embedding_dim=4)
            self.features = nn.Conv2d(1, 4, 3)
            self.classifier = nn.Sequential(nn.Tanh(), nn.Linear(4, num_classes))

        def forward(self, mel: Tensor) -> StudentOutput:
            embedding = self.features(mel).mean((2, 3))
            return StudentOutput(self.classifier(embedding), embedding)

    register(Bent, {"bent": Bent.Options()})
    try:
        student = create_student("bent", 2)
        assert student.config == StudentConfig("bent", 2, {})
        with pytest.raises(ValueError, match="the head of bent cannot be replaced"):
            with_linear_head(student, *linear_map(student, 2), n_mels=16)
    finally:
        del _variants["bent"]


def test_passt_without_the_option_is_what_it_was() -> None:
    """An option that came later is not in the configuration at its default, so fingerprints of older teachers stay."""
    assert "head" not in create_student("passt_tiny", 2, depth=1).config.options
    assert create_student("passt_tiny", 2, depth=1, head="linear").config.options["head"] == "linear"
