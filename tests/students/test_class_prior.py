import pytest
import torch
from torch import nn

from students import create_student


@pytest.mark.parametrize("head", ["mlp", "fully_convolutional", "attention_pooling", "linear"])
def test_a_student_that_hears_nothing_predicts_the_class_frequencies(head: str) -> None:
    student = create_student("mn01", 3, head=head).eval()
    frequencies = torch.tensor([0.5, 0.02, 0.0])
    student.set_class_prior(frequencies)
    last = [layer for layer in student.classifier.modules() if isinstance(layer, nn.Linear | nn.BatchNorm2d)][-1]
    nn.init.zeros_(last.weight)  # whatever comes in, the layer that gives the classes gives its biases
    predicted = student(torch.randn(2, 1, 128, 64)).logits.sigmoid()
    expected = torch.tensor([0.5, 0.02, 0.001]).expand(2, 3)
    torch.testing.assert_close(predicted, expected, rtol=1e-3, atol=1e-6)
    assert last.bias.requires_grad
