"""Interventions in a DyMN's dynamic parts: each against the same thing done by hand, and none leaves a trace."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from audio_datasets.system.randomness import generator
from students import create_student
from students.families.dymn import Context, ContextGeneration, DynamicConv, DynamicReLU, SequenceConv
from students.interface import Student
from students.interventions import (
    DETERMINISTIC,
    IDENTITY,
    METHODS,
    ReLUPlace,
    dynamic_relus,
    intervention,
    methods_for,
    other_clips,
    watched_relus,
)

ALL = [(part, method) for part, methods in METHODS.items() for method in methods]


def rng() -> np.random.Generator:
    return generator(3, "test interventions")


def small(**options: object) -> Student:
    torch.manual_seed(0)
    return create_student("dymn04", num_classes=5, width=0.2, **options)


def knowing(student: Student, mel: Tensor) -> Student:
    """In evaluation mode, with batch norms that know the clips and parts that answer to them.

    A fresh student's maps fade, and its coefficients hardly differ from clip to clip.
    """
    for module in student.modules():
        if isinstance(module, DynamicConv):
            nn.init.normal_(module.residuals[0].weight, std=1.0)
        elif isinstance(module, DynamicReLU):
            nn.init.normal_(module.coef_net[0].weight, std=0.5)
        elif isinstance(module, SequenceConv):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        student.train()(mel)
    return student.eval()


@pytest.fixture(scope="module")
def mel() -> Tensor:
    """Clips with spectra and envelopes of their own."""
    draws = torch.Generator().manual_seed(1)
    return sum(torch.randn(4, 1, *shape, generator=draws) for shape in ((128, 1), (1, 64), (128, 64)))


@pytest.fixture(scope="module")
def student(mel: Tensor) -> Student:
    """The proposed DyMN."""
    return knowing(small(), mel)


@torch.inference_mode()
def disturbed(student: Student, mel: Tensor, part: str, method: str) -> Tensor:
    with intervention(student, part, method, rng()):
        return student(mel).logits


@pytest.mark.parametrize(("part", "method"), ALL)
def test_an_intervention_changes_every_clip_and_leaves_no_trace(
    student: Student, mel: Tensor, part: str, method: str
) -> None:
    with torch.inference_mode():
        untouched = student(mel).logits
        changed = disturbed(student, mel, part, method)
        assert ((changed - untouched).abs().amax(1) > 1e-3 * untouched.abs().max()).all()
        assert torch.equal(disturbed(student, mel, part, method), changed)  # the draws are the generator's alone
        assert torch.equal(student(mel).logits, untouched)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in student.modules())


@pytest.mark.parametrize("part", METHODS)
def test_the_identity_changes_nothing(student: Student, mel: Tensor, part: str) -> None:
    with torch.inference_mode():
        assert torch.equal(disturbed(student, mel, part, IDENTITY), student(mel).logits)


@pytest.mark.parametrize("part", METHODS)
def test_shuffled_contexts_among_equal_clips_change_nothing(student: Student, mel: Tensor, part: str) -> None:
    equal = mel[:1].expand(4, -1, -1, -1)
    with torch.inference_mode():
        torch.testing.assert_close(disturbed(student, equal, part, "context shuffle"), student(equal).logits)


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_methods_that_draw_nothing_leave_the_generator_alone(student: Student, mel: Tensor, method: str) -> None:
    unused = rng()
    with torch.inference_mode(), intervention(student, "Dy-Conv", method, unused):
        student(mel)
    assert unused.random() == rng().random()


@pytest.mark.parametrize("batch", [2, 3, 10])
def test_no_clip_gets_its_own_context(batch: int) -> None:
    for position in range(20):
        partners = other_clips(generator(0, "test", 0, position), batch)
        assert sorted(partners) == list(range(batch))
        assert (partners != np.arange(batch)).all()


def test_a_single_clip_has_no_other(student: Student, mel: Tensor) -> None:
    with pytest.raises(ValueError, match="another clip"):
        disturbed(student, mel[:1], "CA", "context shuffle")


def by_hand(
    student: Student,
    mel: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    kind: type,
    name: str,
    changed: Callable[..., object],
) -> Tensor:
    """Logits with a method of the model's classes replaced by one that is given the original's result."""
    original = getattr(kind, name)
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(kind, name, lambda self, *inputs: changed(original(self, *inputs)))
        return student(mel).logits


def test_context_shuffle_is_that_of_the_coefficients(
    student: Student, mel: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    partners = torch.from_numpy(other_clips(rng(), len(mel)))

    def swapped_weights(context: Context) -> Context:
        return Context(context.vector, context.frequency[partners], context.time[partners])

    def check(part: str, kind: type, name: str, changed: Callable[..., object]) -> None:
        expected = by_hand(student, mel, monkeypatch, kind, name, changed)
        torch.testing.assert_close(disturbed(student, mel, part, "context shuffle"), expected, atol=1e-4, rtol=1e-4)

    check("CA", ContextGeneration, "forward", swapped_weights)
    check("Dy-Conv", DynamicConv, "attention", lambda weights: weights[partners])
    check("Dy-ReLU", DynamicReLU, "coefficients", lambda coefficients: coefficients[:, :, partners])


def test_uniform_and_maximal_attention_are_what_they_say(
    student: Student, mel: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(method: str, changed: Callable[[Tensor], Tensor]) -> None:
        expected = by_hand(student, mel, monkeypatch, DynamicConv, "attention", changed)
        torch.testing.assert_close(disturbed(student, mel, "Dy-Conv", method), expected, atol=1e-4, rtol=1e-4)

    check("uniform attention", lambda weights: torch.full_like(weights, 1 / weights.shape[1]))
    check("max attention", lambda weights: (weights == weights.amax(1, keepdim=True)).float())


def seen_by(student: Student, mel: Tensor, part: str, method: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the first block's parts compute, untouched and disturbed; its input is the same in both."""
    block = student.layers[0]

    def record() -> tuple[dict[str, Tensor], list]:
        found: dict[str, Tensor] = {}
        weights = block.recalibration.register_forward_pre_hook(
            lambda module, inputs: found.update(frequency=inputs[1].clone(), time=inputs[2].clone())
        )
        logits = block.depth_conv.residuals[0].register_forward_hook(
            lambda module, inputs, output: found.update(logits=output.clone())
        )
        maps = block.depth_act.coef_net.register_forward_hook(
            lambda module, inputs, output: found.update(maps=output.clone())
        )
        return found, [weights, logits, maps]

    results = []
    with torch.inference_mode():
        for chosen in (IDENTITY, method):
            with intervention(student, part, chosen, rng()):
                found, handles = record()
                student(mel)
                for handle in handles:
                    handle.remove()
            results.append(found)
    return results[0], results[1]


@pytest.mark.parametrize(
    ("part", "method", "axes"),
    [
        ("CA", "channel shuffle", {"frequency": 1, "time": 1}),
        ("CA", "spatial shuffle", {"frequency": 2, "time": 3}),
        ("CA", "time shuffle", {"time": 3}),
        ("CA", "frequency shuffle", {"frequency": 2}),
        ("Dy-Conv", "attention shuffle", {"logits": 1}),
    ],
)
def test_a_shuffle_reorders_its_axis_and_leaves_all_others(
    student: Student, mel: Tensor, part: str, method: str, axes: dict[str, int]
) -> None:
    before, after = seen_by(student, mel, part, method)
    for name in ("frequency", "time", "logits", "maps"):
        if name not in axes:
            if part == "CA" or name == "logits":  # what is computed before the disturbed part
                assert torch.equal(before[name], after[name]), name
            continue
        axis = axes[name]
        assert not torch.equal(before[name], after[name])
        assert torch.equal(before[name].sort(axis).values, after[name].sort(axis).values)
        for clip in range(len(mel)):  # whole slices move
            old, new = (list(values[name][clip].unbind(axis - 1)) for values in (before, after))
            assert all(any(torch.equal(one, other) for other in old) for one in new)


def test_channels_shuffle_together(student: Student, mel: Tensor) -> None:
    before, after = seen_by(student, mel, "CA", "channel shuffle")
    for clip in range(len(mel)):
        old = torch.cat((before["frequency"][clip, :, :, 0], before["time"][clip, :, 0]), 1)
        new = torch.cat((after["frequency"][clip, :, :, 0], after["time"][clip, :, 0]), 1)
        assert {tuple(row) for row in new.tolist()} == {tuple(row) for row in old.tolist()}
    before, after = seen_by(student, mel, "Dy-ReLU", "channel shuffle")
    for old, new in zip(before["maps"], after["maps"], strict=True):
        maps = 2 * student.options.dyrelu_maps
        assert {tuple(row) for row in new.view(-1, maps).tolist()} == {
            tuple(row) for row in old.view(-1, maps).tolist()
        }
        assert not torch.equal(old, new)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ALL),
        ({"coord_attention": False, "dyrelu": False}, [pair for pair in ALL if pair[0] == "Dy-Conv"]),
        ({"dyconv": False, "dyrelu": False, "coord_axes": "f"},
         [("CA", "context shuffle"), ("CA", "channel shuffle"), ("CA", "frequency shuffle")]),
        ({"dyconv": False, "dyrelu": False, "coord_axes": "t"},
         [("CA", "context shuffle"), ("CA", "channel shuffle"), ("CA", "time shuffle")]),
    ],
)  # fmt: skip
def test_only_what_a_variant_has_is_disturbed(options: dict, expected: list, mel: Tensor) -> None:
    student = small(**options).eval()
    assert methods_for(student) == expected
    for part, method in expected:
        disturbed(student, mel, part, method)


@pytest.mark.parametrize("options", [{"context": "own"}, {"dyrelu_positions": [2, 3]}, {"dynamic_blocks": "last5"}])
def test_other_variants_can_be_disturbed_too(options: dict, mel: Tensor) -> None:
    student = knowing(small(**options), mel)
    with torch.inference_mode():
        untouched = student(mel).logits
    for part, method in methods_for(student):
        assert not torch.equal(disturbed(student, mel, part, method), untouched), (part, method)


def test_a_fused_student_can_be_disturbed_too(student: Student, mel: Tensor) -> None:
    fused = student.fuse()
    for part, method in (("CA", "time shuffle"), ("Dy-Conv", "max attention"), ("Dy-ReLU", "channel shuffle")):
        expected = disturbed(student, mel, part, method)
        difference = (disturbed(fused, mel, part, method) - expected).abs().max()
        assert difference < 1e-3 * expected.abs().max()


def test_wrong_input(student: Student) -> None:
    with pytest.raises(ValueError, match="found MN"), intervention(create_student("mn01", 2), "CA", IDENTITY, rng()):
        pass
    with pytest.raises(ValueError, match="CA, Dy-Conv, Dy-ReLU"), intervention(student, "SE", IDENTITY, rng()):
        pass
    with pytest.raises(ValueError, match="uniform attention"), intervention(student, "Dy-Conv", "time shuffle", rng()):
        pass
    static = small(dyconv=False, dyrelu=False, coord_attention=False)
    with pytest.raises(ValueError, match="no CA"), intervention(static, "CA", IDENTITY, rng()):
        pass
    with pytest.raises(ValueError, match="no dynamic part"):
        methods_for(static)
    with pytest.raises(ValueError, match="found MN"):
        methods_for(create_student("mn01", 2))


def test_dynamic_relus_are_watched_where_they_stand(student: Student, mel: Tensor) -> None:
    assert list(dynamic_relus(student)) == [ReLUPlace(block, 2) for block in range(1, 16)]
    assert list(dynamic_relus(small(dynamic_blocks="first5", dyrelu_positions=[1, 3])))[:3] == [
        (1, 3),  # the first block has no expansion
        (2, 1),
        (2, 3),
    ]
    seen = {}
    places = [ReLUPlace(3, 2), ReLUPlace(15, 2)]
    with torch.inference_mode():
        untouched = student(mel).logits
        with watched_relus(student, places, lambda place, x, y: seen.update({place: (x.clone(), y.clone())})):
            assert torch.equal(student(mel).logits, untouched)
        x, y = seen[places[1]]
        slopes, intercepts = student.layers[14].depth_act.coefficients(_context_of_last_block(student, mel))
        expected = (x * slopes[..., None, None] + intercepts[..., None, None]).amax(0)
    torch.testing.assert_close(y, expected)
    assert list(seen) == places
    assert not student.layers[14].depth_act._forward_hooks


def _context_of_last_block(student: Student, mel: Tensor) -> Tensor:
    return student.layers[14].context_gen(student.feature_maps(mel)[14]).vector
