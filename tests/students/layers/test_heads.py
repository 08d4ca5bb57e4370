"""Heads against their formulas."""

import pytest
import torch
from torch import nn

from students.layers.heads import AttentionPoolingHead, fully_convolutional_head, mlp_head


def test_fully_convolutional_head_is_the_mean_of_frame_scores() -> None:
    head = fully_convolutional_head(6, 3).eval()
    nn.init.normal_(head[1].running_mean)
    nn.init.uniform_(head[1].running_var, 0.5, 2.0)
    x = torch.randn(2, 6, 4, 5)
    positions = x.flatten(2).mean(2)  # linear up to the mean, so the mean may come first
    scores = positions @ head[0].weight.detach()[:, :, 0, 0].T
    expected = (scores - head[1].running_mean) / torch.sqrt(head[1].running_var + 1e-3)
    torch.testing.assert_close(head(x), expected)


def test_mlp_head_is_its_formula() -> None:
    head = mlp_head(6, 8, 3, dropout=0.2).eval()
    x = torch.randn(2, 6, 4, 5)
    hidden = x.mean((2, 3)) @ head[2].weight.T + head[2].bias
    hidden = hidden * (hidden + 3).clamp(0, 6) / 6
    torch.testing.assert_close(head(x), hidden @ head[5].weight.T + head[5].bias)


def test_attention_pooling_is_its_formula() -> None:
    torch.manual_seed(0)
    batch, channels, frequencies, frames, heads, classes = 2, 6, 3, 7, 4, 5
    head = AttentionPoolingHead(channels, classes, heads)
    nn.init.normal_(head.subspace_proj.weight)
    nn.init.normal_(head.head_weight)
    x = torch.randn(batch, channels, frequencies, frames)
    expected = torch.zeros(batch, classes)
    weight, bias = head.subspace_proj.weight, head.subspace_proj.bias
    for b in range(batch):
        for h in range(heads):
            for k in range(classes):
                attention_row, value_row = h * classes + k, (heads + h) * classes + k
                frame_vectors = x[b].mean(1).T  # (frames, channels)
                attention = torch.sigmoid(frame_vectors @ weight[attention_row] + bias[attention_row])
                attention = attention.clamp(1e-7, 1 - 1e-7)
                value = frame_vectors @ weight[value_row] + bias[value_row]
                expected[b, k] += head.head_weight[0, h, 0] * (attention / attention.sum() * value).sum()
    torch.testing.assert_close(head(x), expected, atol=1e-5, rtol=1e-4)


def test_attention_that_vanishes_everywhere_becomes_a_mean() -> None:
    head = AttentionPoolingHead(2, 1, heads=1)
    nn.init.zeros_(head.subspace_proj.weight)
    with torch.no_grad():
        head.subspace_proj.bias.copy_(torch.tensor([-1e4, 3.0]))
    assert head(torch.randn(1, 2, 2, 9)).item() == pytest.approx(3.0)
