"""MergeNet against the published sizes, its blocks against an implementation that computes one branch after the other."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from students import create_student
from students.families.mergenet import STAGES, ChannelShuffle, MergeBlock, MergeNetOptions, Stage
from students.profile import profile_student

# Parameters and millions of multiply-accumulates for 200 classes and 128 mels × 1000 frames.
SIZES = {
    "mergenet_baseline": (11_465_136, 3_814),
    "mergenet64": (9_451_824, 3_053),
    "mergenet32": (8_730_928, 2_511),
    "mergenet16": (8_364_752, 2_158),
}

REFUSED = [
    ({"split": 0}, "split must be None or one of 2, 4, 8"),
    ({"split": 24}, "found 24"),
    ({"split": 1024}, "found 1024"),
    ({"split": True}, "found True"),
    ({"split": "32"}, "found '32'"),
    ({"global_se": "False"}, "global_se must be true or false; found 'False'"),
    ({"channel_shuffle": 1}, "channel_shuffle must be true or false; found 1"),
    ({"split": None, "local_se": False}, "have no effect without branches"),
    ({"split": None, "channel_shuffle": True}, "have no effect without branches"),
    ({"split": None, "separate_init": True}, "have no effect without branches"),
]


@pytest.mark.parametrize("student", SIZES)
def test_has_the_published_size(student: str) -> None:
    with torch.device("meta"):
        profile = profile_student(create_student(student, num_classes=200))
    assert (profile.parameters, round(profile.macs / 1e6)) == SIZES[student]


def test_without_global_squeeze_excitation_it_has_the_five_million_parameters_of_table_5() -> None:
    with torch.device("meta"):
        student = create_student("mergenet32", num_classes=200, global_se=False)
    assert round(profile_student(student).parameters / 1e6) == 5


# --- One branch after the other ----------------------------------------------------------------------------------------


class BranchByBranch:
    """A block's function written as in Figs. 3a and 4a: every branch is a tensor and has kernels of its own.

    Nothing here is grouped but the depthwise convolution. Kernels and statistics are cut out of a ``MergeBlock``.
    """

    def __init__(self, block: MergeBlock, stage: Stage, options: MergeNetOptions) -> None:
        self.convolutions = [layer for layer in block.modules() if isinstance(layer, nn.Conv2d)]
        self.norms = [layer for layer in block.modules() if isinstance(layer, nn.BatchNorm2d)]
        self.stage, self.options = stage, options
        self.count = max(1, stage.in_channels // options.split) if options.split else 1

    def __call__(self, x: Tensor) -> Tensor:
        self.next_convolution, self.next_norm = iter(self.convolutions), iter(self.norms)
        stage, options = self.stage, self.options
        branches = list(x.chunk(self.count, dim=1))
        if stage.fused:
            branches = self.conv_norm(branches, stride=stage.stride, padding=1, activate=True)
        else:
            branches = self.conv_norm(branches, activate=True)
            width = branches[0].shape[1]
            branches = self.conv_norm(branches, stride=stage.stride, padding=1, groups=width, activate=True)
        if self.count > 1:
            if options.local_se:
                branches = self.squeeze_excitation(branches)
            branches = self.conv_norm(branches)
        merged = [torch.cat(branches, dim=1)]
        if options.global_se:
            merged = self.squeeze_excitation(merged)
        (out,) = self.conv_norm(merged)
        assert next(self.next_convolution, None) is None
        assert next(self.next_norm, None) is None
        return x + out if out.shape == x.shape else out

    def shuffled(self, branches: list[Tensor]) -> list[Tensor]:
        """Channel c of the shuffled whole comes from branch c mod n."""
        if not self.options.channel_shuffle:
            return branches
        whole = torch.cat(branches, dim=1)
        each = whole.shape[1] // self.count
        order = [channel % self.count * each + channel // self.count for channel in range(whole.shape[1])]
        return list(whole[:, order].chunk(len(branches), dim=1))

    def convolved(self, branches: list[Tensor], **settings) -> list[Tensor]:
        layer = next(self.next_convolution)
        kernels = layer.weight.chunk(len(branches))
        biases = [None] * len(branches) if layer.bias is None else layer.bias.chunk(len(branches))
        return [
            functional.conv2d(branch, kernel, bias, **settings)
            for branch, kernel, bias in zip(self.shuffled(branches), kernels, biases, strict=True)
        ]

    def conv_norm(self, branches: list[Tensor], activate: bool = False, **settings) -> list[Tensor]:
        norm = next(self.next_norm)
        parts = zip(
            self.convolved(branches, **settings),
            *(value.chunk(len(branches)) for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)),
            strict=True,
        )
        normed = [functional.batch_norm(*part, eps=norm.eps) for part in parts]
        return [branch * branch.sigmoid() for branch in normed] if activate else normed

    def squeeze_excitation(self, branches: list[Tensor]) -> list[Tensor]:
        squeezed = self.convolved([functional.adaptive_avg_pool2d(branch, 1) for branch in branches])
        excited = self.convolved([value * value.sigmoid() for value in squeezed])
        return [branch * value.sigmoid() for branch, value in zip(branches, excited, strict=True)]


def random_block(stage: Stage, options: MergeNetOptions) -> MergeBlock:
    """A block in evaluation mode whose biases and batch norms are not those of a fresh one."""
    generator = torch.Generator().manual_seed(1)
    block = MergeBlock(stage, options).eval()
    for name, value in block.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0, generator=generator)
        elif value.ndim == 1:
            value.normal_(generator=generator)
    return block


@pytest.mark.parametrize("stage", STAGES[:5], ids=lambda stage: f"{stage.in_channels} to {stage.out_channels}")
@pytest.mark.parametrize(
    "options",
    [
        MergeNetOptions(split=16),
        MergeNetOptions(split=32),
        MergeNetOptions(split=None),
        MergeNetOptions(split=16, local_se=False),
        MergeNetOptions(split=16, global_se=False),
        MergeNetOptions(split=16, channel_shuffle=True),
        MergeNetOptions(split=16, separate_init=True),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_block_is_its_branches_one_after_the_other(stage: Stage, options: MergeNetOptions) -> None:
    torch.manual_seed(0)
    block = random_block(stage, options)
    x = torch.randn(2, stage.in_channels, 9, 14)
    out = block(x)
    assert out.shape == (2, stage.out_channels, *((5, 7) if stage.stride == 2 else (9, 14)))
    torch.testing.assert_close(out, BranchByBranch(block, stage, options)(x), atol=1e-4, rtol=1e-4)


def test_shuffling_deals_every_branch_out_to_all() -> None:
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert ChannelShuffle(2)(x).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert ChannelShuffle(3)(x).flatten().tolist() == [0, 2, 4, 1, 3, 5]


# --- Options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"split": 16}, {"split": 64}, {"split": None}, {"local_se": False}, {"global_se": False}],
    ids=str,
)
def test_an_option_that_changes_the_layers_changes_the_parameters(change: dict) -> None:
    with torch.device("meta"):
        base, changed = create_student("mergenet32", 5), create_student("mergenet32", 5, **change)
    shapes = [{name: value.shape for name, value in student.state_dict().items()} for student in (base, changed)]
    assert shapes[0] != shapes[1]


def test_channel_shuffle_changes_the_computation_and_not_the_weights(as_if_trained) -> None:
    base = as_if_trained(create_student("mergenet32", 5))
    shuffled = create_student("mergenet32", 5, channel_shuffle=True).eval()
    shuffled.load_state_dict(base.state_dict())
    mel = torch.randn(1, 1, 128, 32)
    with torch.inference_mode():
        assert not torch.allclose(base(mel).embedding, shuffled(mel).embedding, rtol=1e-2)


def test_branches_initialised_separately_have_larger_kernels() -> None:
    together, separate = create_student("mergenet32", 5), create_student("mergenet32", 5, separate_init=True)
    for block_together, block_separate in zip(together.features, separate.features, strict=True):
        for (name, kernels), (_, apart) in zip(
            block_together.named_parameters(), block_separate.named_parameters(), strict=True
        ):
            if kernels.ndim == 4:
                factor = block_together.num_branches**0.5 if name.startswith("branches.") else 1.0
                torch.testing.assert_close(apart.std() / kernels.std(), torch.tensor(factor), rtol=0.2, atol=0)


def test_branches_initialised_separately_have_the_same_function(as_if_trained) -> None:
    together = as_if_trained(create_student("mergenet32", 5))
    separate = create_student("mergenet32", 5, separate_init=True).eval()
    separate.load_state_dict(together.state_dict())
    mel = torch.randn(1, 1, 128, 32)
    with torch.inference_mode():
        assert torch.equal(separate(mel).embedding, together(mel).embedding)


def test_a_separate_branch_is_drawn_as_a_layer_of_its_own() -> None:
    block = MergeBlock(STAGES[2], MergeNetOptions(split=32))
    torch.manual_seed(3)
    block.draw_branches_separately()
    expansions = [nn.Conv2d(32, 64, 1, bias=False) for _ in range(4)]
    torch.manual_seed(3)
    for expansion in expansions:
        nn.init.kaiming_normal_(expansion.weight, mode="fan_out")
    assert torch.equal(block.branches.expansion[0].weight, torch.cat([expansion.weight for expansion in expansions]))


@pytest.mark.parametrize(
    "options",
    [
        {"local_se": False},
        {"global_se": False},
        {"local_se": False, "global_se": False},
        {"channel_shuffle": True},
        {"separate_init": True},
        {"split": 2},
        {"split": 512},
    ],
    ids=str,
)
def test_every_option_trains_a_step(options: dict) -> None:
    student = create_student("mergenet32", 2, **options)
    student(torch.randn(2, 1, 64, 32)).logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_a_value_that_is_not_allowed_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_student("mergenet32", 2, **options)


@pytest.mark.parametrize("shape", [(2, 128, 100), (2, 2, 128, 100), (128, 100)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes \(batch, 1, n_mels, frames\); found"):
        create_student("mergenet16", 2)(torch.randn(shape))


def test_mixed_precision_and_channels_last_stay_close(as_if_trained) -> None:
    student = as_if_trained(create_student("mergenet32", 4))
    mel = torch.randn(2, 1, 128, 50)
    with torch.inference_mode():
        exact = student(mel)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = student(mel)
        student.to(memory_format=torch.channels_last)
        last = student(mel.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last.logits, exact.logits, atol=1e-4, rtol=1e-4)
    similarity = functional.cosine_similarity(rough.embedding.float(), exact.embedding)
    assert similarity.min() > 0.99


def test_a_student_that_hears_nothing_predicts_the_class_frequencies() -> None:
    student = create_student("mergenet32", 3).eval()
    student.set_class_prior(torch.tensor([0.5, 0.02, 0.0]))
    nn.init.zeros_(student.classifier[-1].weight)
    predicted = student(torch.randn(1, 1, 128, 32)).logits.sigmoid()
    torch.testing.assert_close(predicted, torch.tensor([[0.5, 0.02, 0.001]]), rtol=1e-3, atol=1e-6)


def test_frame_logits_average_to_the_clips(as_if_trained) -> None:
    student = as_if_trained(create_student("mergenet32", 4))
    mel = torch.randn(2, 1, 128, 128)
    with torch.inference_mode():
        torch.testing.assert_close(student.frame_logits(mel).mean(2), student(mel).logits, atol=1e-4, rtol=1e-4)


def test_compiles_for_inference() -> None:
    block = random_block(STAGES[2], MergeNetOptions(split=32, channel_shuffle=True))
    x = torch.randn(1, 128, 4, 6)
    with torch.inference_mode():
        compiled = torch.compile(block, fullgraph=True)
        torch.testing.assert_close(compiled(x), block(x), atol=1e-4, rtol=1e-4)
