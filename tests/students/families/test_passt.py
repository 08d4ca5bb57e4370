"""PaSST: the reference numbers, attention by the formula, clips of any length, patchout, weights and folders."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from audio_datasets.tasks.label_space import LabelSpace
from kd.objectives.base import ObjectiveSettings
from kd.objectives.distillation import DistillationObjective
from kd.objectives.settings import DistillationConfig
from kd.training.learner import Learner
from students import create_student, load_weights
from students.card import load_student, save_student
from students.families.passt import PATCH, STRIDES, Passt, PasstOptions, Patchout, patch_window_starts
from students.frontend import LogMel, LogMelConfig
from students.layers.keyed import set_sample_keys
from students.profile import profile_student
from students.weights import student_from_weights
from teacher_logits.teachers.loaders import load_teacher
from teacher_logits.teachers.network import StudentTeacher

CLASSES = ("hiss", "hum, low", "click")
SMALL = {"width": 64, "depth": 2, "heads": 1, "stride": 16, "time_positions": 6}  # 96 frames in one window


def small_passt(**options) -> Passt:
    """A PaSST whose tokens, positions and head are far from zero, so that whatever is left out shows in the logits."""
    torch.manual_seed(0)
    network = create_student("passt_s", len(CLASSES), **{**SMALL, **options})
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("_token", "pos_embed", "weight")) and "norm" not in name and name != "head.0.weight":
                parameter.normal_(std=0.3 if "embed" in name or "token" in name else 0.1)
    return network.eval()


def mels(count: int, frames: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 1, 128, frames, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def reference(reference_dir: Path) -> dict:
    return torch.load(reference_dir / "reference" / "passt_tiny_random.pt", weights_only=True)


@pytest.fixture(scope="module")
def reference_network(reference: dict, tmp_path_factory: pytest.TempPathFactory) -> Passt:
    path = tmp_path_factory.mktemp("weights") / "passt.pt"
    torch.save(reference["state_dict"], path)
    network = create_student("passt_s", 527, width=96, depth=3, heads=3)
    load_weights(network, path)
    return network.eval()


# --- Numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", ["10s", "5s"])
def test_the_reference_logits(reference: dict, reference_network: Passt, length: str) -> None:
    with torch.inference_mode():
        output = reference_network(reference[f"input_{length}"])
    torch.testing.assert_close(output.logits, reference[f"logits_{length}"], atol=1e-5, rtol=0)
    if length == "10s":
        torch.testing.assert_close(output.embedding, reference["embedding_10s"], atol=1e-5, rtol=0)


def test_names_are_those_of_the_public_checkpoints(reference: dict, reference_network: Passt) -> None:
    assert reference_network.state_dict().keys() == reference["state_dict"].keys()


def test_fused_attention_is_the_plain_formula(reference: dict, reference_network: Passt) -> None:
    attention = reference_network.blocks[1].attn
    assert attention.fused_attn
    tokens = torch.randn(2, 50, 96, generator=torch.Generator().manual_seed(0))
    query, key, value = attention.qkv(tokens).view(2, 50, 3, 3, 32).permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(2, 3) / 32**0.5).softmax(dim=3)
    plain = attention.proj((weights @ value).transpose(1, 2).reshape(2, 50, 96))
    torch.testing.assert_close(attention(tokens), plain, atol=1e-5, rtol=1e-5)
    # An attention that hardly looks anywhere would agree with anything.
    assert not torch.allclose(weights, torch.full_like(weights, 1 / 50), atol=1e-3)


def test_sizes_of_passt_s() -> None:
    with torch.device("meta"):
        network = create_student("passt_s", 527)
    profile = profile_student(network)
    tokens, width = 12 * 99 + 2, 768
    assert profile.parameters == 85_748_495
    assert sum(value.numel() for value in network.state_dict().values()) == 86_153_758
    linear_maps = 12 * tokens * 12 * width**2  # qkv, projection and the two of the MLP: 3 + 1 + 4 + 4
    products = 12 * 2 * tokens**2 * width
    patches = 12 * 99 * width * PATCH**2
    assert profile.macs == linear_maps + products + patches + width * 527 == 127_407_770_880


def test_half_precision_stays_near(reference: dict, reference_network: Passt) -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits = reference_network(reference["input_5s"]).logits
    torch.testing.assert_close(logits.float(), reference["logits_5s"], atol=0.05, rtol=0)


# --- What every network does -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["passt_s", "passt_tiny"])
def test_every_name_can_be_built(name: str) -> None:
    with torch.device("meta"):
        network = create_student(name, 5)
        assert network(torch.empty(2, 1, 128, 998)).logits.shape == (2, 5)
    assert network.config.name == name


@pytest.mark.parametrize("patchout", [{}, {"patchout_rows": 2, "patchout_columns": 1, "patchout_patches": 5}])
def test_every_parameter_is_trained(patchout: dict) -> None:
    network = small_passt(**patchout).train()
    output = network(mels(2, 96))
    (output.logits.square().sum() + output.embedding.sum()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("frames", [1, 15, 16, 17, 95, 111, 112, 333])
def test_clips_of_any_length_and_each_by_itself(frames: int) -> None:
    network, mel = small_passt(), mels(3, frames)
    with torch.inference_mode():
        output = network(mel)
        alone = torch.cat([network(clip).logits for clip in mel.split(1)])
    assert output.embedding.shape == (3, 64)
    torch.testing.assert_close(output.logits, alone, atol=1e-5, rtol=1e-5)
    assert (output.logits[0] - output.logits[1]).abs().max() > 1e-3


def test_one_class_and_a_class_prior() -> None:
    network = create_student("passt_s", 1, **SMALL).eval()
    assert network(mels(1, 96)).logits.shape == (1, 1)
    network.set_class_prior(torch.tensor([0.25]))
    assert network.classifier[-1].bias.sigmoid().item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 100, "heads": 3}, "multiple of heads"),
        ({"stride": 11}, "unknown stride 11; choices: 10, 12, 14, 16"),
        ({"n_mels": 8}, "n_mels must be at least the 16"),
        ({"depth": 0}, "depth must be a whole number above 0"),
        ({"patchout_rows": -1}, "patchout_rows must be a whole number, at least 0"),
        ({"patchout_patches": 0.5}, "patchout_patches must be a whole number"),
        ({"dropout": 0.1}, "unknown option 'dropout' for passt_s"),
    ],
)
def test_options_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_student("passt_s", 3, **options)


def test_inputs_that_cannot_be() -> None:
    network = small_passt()
    with pytest.raises(ValueError, match=r"takes \(batch, 1, 128, frames\); found \(1, 1, 64, 96\)"):
        network(torch.zeros(1, 1, 64, 96))
    with pytest.raises(ValueError, match=r"found \(1, 128, 96\)"):
        network(torch.zeros(1, 128, 96))
    with pytest.raises(ValueError, match="unknown student 'passt_xl'; choices: mn01, .*passt_s, passt_tiny"):
        create_student("passt_xl", 3)
    with pytest.raises(ValueError, match="logits of single frames are not available"):
        network.frame_logits(mels(1, 96))


# --- Windows -----------------------------------------------------------------------------------------------------------


def test_windows_are_the_clips_that_a_cut_would_give() -> None:
    assert [patch_window_starts(frames, PasstOptions()) for frames in (1, 998, 1005)] == [[0]] * 3
    assert patch_window_starts(2000, PasstOptions()) == [0, 1004]
    assert patch_window_starts(3000, PasstOptions(stride=16, time_positions=62)) == [0, 1004, 2008]
    assert patch_window_starts(1500, PasstOptions()) == [0, 504]
    assert patch_window_starts(3000, PasstOptions(time_positions=299)) == [0]


@given(st.integers(1, 10_000), st.sampled_from(STRIDES), st.integers(1, 300))
@settings(max_examples=100, deadline=None)
def test_windows_cover_a_clip(frames: int, stride: int, positions: int) -> None:
    config = PasstOptions(stride=stride, time_positions=positions)
    starts = patch_window_starts(frames, config)
    if len(starts) == 1:
        assert starts == [0]
        assert (max(frames, PATCH) - PATCH) // stride + 1 <= positions
        return
    assert starts[0] == 0
    assert starts[-1] + config.window_frames == frames
    gaps = [after - before - config.window_frames for before, after in pairwise(starts)]
    assert max(gaps) <= stride
    fewer = len(starts) - 1
    assert fewer * config.window_frames + (fewer - 1) * stride < frames, "fewer windows would do"


def test_a_long_clip_is_the_mean_of_its_windows() -> None:
    network, mel = small_passt(), mels(2, 250)
    starts = patch_window_starts(250, network.options)
    assert len(starts) == 3
    with torch.inference_mode():
        windows = [network(mel[..., start : start + 96]) for start in starts]
        output = network(mel)
    torch.testing.assert_close(output.logits, sum(window.logits for window in windows) / 3)
    torch.testing.assert_close(output.embedding, sum(window.embedding for window in windows) / 3)


def test_a_short_clip_uses_the_first_time_positions() -> None:
    network, mel = small_passt(), mels(1, 48)
    with torch.inference_mode():
        before = network(mel).logits
        network.time_new_pos_embed[..., 3:].normal_()
        torch.testing.assert_close(network(mel).logits, before, atol=0, rtol=0)
        network.time_new_pos_embed[..., 2].normal_()
        assert not torch.allclose(network(mel).logits, before, atol=1e-3)


# --- Patchout ----------------------------------------------------------------------------------------------------------


def keyed_patchout(keys: list[int], rows: int = 0, columns: int = 0, patches: int = 0) -> Patchout:
    layer = Patchout(rows, columns, patches).train()
    set_sample_keys(layer, torch.tensor(keys))
    return layer


def test_structured_patchout_leaves_out_whole_rows_and_columns() -> None:
    kept = keyed_patchout([5, 6, 7], rows=4, columns=40).kept_positions(3, 12, 99, torch.device("cpu"))
    assert kept.shape == (3, 8 * 59)
    for clip in kept:
        assert len(set((clip // 99).tolist())) == 8
        assert len(set((clip % 99).tolist())) == 59
        assert clip.tolist() == sorted(set(clip.tolist()))
    assert kept.unique(dim=0).shape == (3, 8 * 59)


def test_unstructured_patchout_leaves_out_single_patches_evenly() -> None:
    clips = 400
    kept = keyed_patchout(list(range(clips)), patches=30).kept_positions(clips, 5, 10, torch.device("cpu"))
    assert kept.shape == (clips, 20)
    counts = kept.flatten().bincount(minlength=50)
    # Binomial with 400 draws at 0.4: five deviations are 49.
    assert (counts - 160).abs().max() < 49
    mixed = keyed_patchout([1, 2], rows=1, columns=2, patches=7).kept_positions(2, 5, 10, torch.device("cpu"))
    assert mixed.shape == (2, 4 * 8 - 7)


def test_patchout_keeps_each_patch_at_its_place() -> None:
    grid = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    layer = keyed_patchout([3, 4], rows=1, columns=2, patches=2)
    kept = layer.kept_positions(2, 4, 5, grid.device)
    tokens = layer(grid)
    for clip in range(2):
        for place, position in enumerate(kept[clip].tolist()):
            assert torch.equal(tokens[clip, place], grid[clip, :, position // 5, position % 5])
    assert torch.equal(layer.eval()(grid), grid.flatten(2).transpose(1, 2))


def test_patchout_depends_on_the_clips_key_and_not_on_the_batch() -> None:
    network, mel = small_passt(patchout_rows=3, patchout_columns=2).train(), mels(3, 96)

    def logits(clips: list[int], keys: list[int]) -> Tensor:
        set_sample_keys(network, torch.tensor(keys))
        with torch.inference_mode():
            return network(mel[clips]).logits

    together = logits([0, 1, 2], [10, 11, 12])
    torch.testing.assert_close(logits([2, 0], [12, 10]), together[[2, 0]], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits([0], [13]), together[:1], atol=1e-3)
    set_sample_keys(network, None)
    torch.manual_seed(0)
    first = network(mel).logits
    assert not torch.allclose(first, network(mel).logits, atol=1e-3)


def test_patchout_that_leaves_nothing_is_refused() -> None:
    network = small_passt(patchout_columns=4).train()
    with pytest.raises(ValueError, match="leaves nothing of a clip with 8 rows and 3 columns"):
        network(mels(1, 48))
    assert network.eval()(mels(1, 48)).logits.isfinite().all()


def test_the_objective_of_the_training_loop_trains_it() -> None:
    network = small_passt(patchout_rows=1, patchout_columns=1).train()
    settings = ObjectiveSettings(
        LogMelConfig(),
        LabelSpace.single(CLASSES, exclusive=False),
        1,
        distillation=DistillationConfig(label_weight=0.5),
    )
    learner = Learner(network, DistillationObjective(settings)).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    torch.manual_seed(0)
    batch = {
        "waveform": torch.linspace(0.01, 0.5, 4)[:, None] * torch.randn(4, 16000),
        "targets": torch.eye(4, 3),
        "teacher_logits": 8.0 * torch.eye(4, 3) - 4.0,
        "has_teacher": torch.ones(4, dtype=torch.bool),
    }
    losses = []
    for step in range(8):
        loss = learner({**batch, "sample_key": torch.arange(4) + 4 * step})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# --- Weights and folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "positions"), [(10, 99), (12, 83), (14, 71), (16, 62), (10, 199), (10, 299)])
def test_weights_tell_their_architecture(stride: int, positions: int, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    original = small_passt(width=128, heads=2, depth=1, stride=stride, time_positions=positions)
    torch.save(original.state_dict(), path)
    found = student_from_weights("passt", path)
    assert found.options == original.options
    assert found.num_classes == len(CLASSES)
    assert found.options.clip_seconds == {199: 20.0, 299: 30.0}.get(positions, 10.0)
    assert not found.training


def test_training_checkpoints_are_unwrapped(tmp_path: Path) -> None:
    network, mel = small_passt(), mels(1, 96)
    inside = {f"net.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": {**inside, "mel.window": torch.ones(3)}, "epoch": 4}, tmp_path / "last.ckpt")
    with torch.inference_mode():
        found = student_from_weights("passt", tmp_path / "last.ckpt")(mel).logits
        torch.testing.assert_close(found, network(mel).logits, atol=0, rtol=0)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "weights.pt"
    state = small_passt().state_dict()
    torch.save(state, path)
    with pytest.raises(ValueError, match="has 3 classes, the student 4"):
        load_weights(create_student("passt_s", 4, **SMALL), path)
    with pytest.raises(ValueError, match="of another shape: time_new_pos_embed"):
        load_weights(create_student("passt_s", 3, **{**SMALL, "time_positions": 9}), path)
    fresh = create_student("passt_s", 4, **SMALL)
    load_weights(fresh, path, new_classes=True)
    assert "head.1.weight" in caplog.text
    assert torch.equal(fresh.get_parameter("head.0.weight"), state["head.0.weight"])

    def refused(changes: dict, message: str) -> None:
        torch.save({**state, **changes}, path)
        with pytest.raises(ValueError, match=message):
            student_from_weights("passt", path)

    refused({"cls_token": torch.zeros(1, 1, 96)}, "number of attention heads cannot be inferred")
    refused(
        {"freq_new_pos_embed": torch.zeros(1, 64, 11, 1)}, "11 frequency positions; expected with 128 mel bands: 12"
    )
    refused({"head.1.bias": torch.zeros(())}, "no head.1.bias with 1 axes")
    refused({"norm.bias": torch.zeros(5)}, "of another shape: norm.bias")
    torch.save({"fc.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="contains no PaSST: there is no cls_token"):
        student_from_weights("passt", path)


def test_a_run_folder_holds_a_passt_as_it_holds_a_student(tmp_path: Path) -> None:
    network, frontend = small_passt(patchout_rows=2), LogMelConfig(hop_samples=400)
    save_student(tmp_path / "run", network, CLASSES, frontend, {"clip_seconds": 0.5})
    loaded = load_student(tmp_path / "run")
    card = loaded.card
    assert (loaded.config, card.class_names, card.frontend) == (network.config, CLASSES, frontend)
    assert isinstance(loaded, Passt)
    teacher = load_teacher(tmp_path / "run")
    assert (teacher.name, teacher.clip_seconds, teacher.class_names) == ("run", 0.5, CLASSES)
    waveform = 0.1 * torch.randn(2, 16000)
    with torch.inference_mode():
        expected = network(LogMel(frontend)(waveform)).logits
        torch.testing.assert_close(teacher(waveform), expected, atol=0, rtol=0)


@pytest.mark.parametrize("spelling", ["passt", "passt_tiny"])
def test_bare_weights_are_a_teacher(tmp_path: Path, spelling: str) -> None:
    path = tmp_path / "passt-ti.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = create_student("passt_tiny", 3).eval()
    torch.save(network.state_dict(), path)
    teacher = load_teacher(f"{spelling}@{path}", class_names=CLASSES)
    assert isinstance(teacher, StudentTeacher)
    assert (teacher.name, teacher.clip_seconds, teacher.sample_rate_hz) == ("passt-ti", 10.0, 32000)
    waveform = 0.1 * torch.randn(1, 16000)
    with torch.inference_mode():
        expected = network(LogMel(LogMelConfig())(waveform)).logits
        torch.testing.assert_close(teacher(waveform), expected, atol=0, rtol=0)
    with pytest.raises(ValueError, match="3 classes"):
        load_teacher(f"{spelling}@{path}", class_names=CLASSES[:2])
    with pytest.raises(ValueError, match="have no class names"):
        load_teacher(f"{spelling}@{path}")


def test_the_positions_are_added_patch_by_patch() -> None:
    """The whole pass once more, written out with a loop over patches."""
    network, mel = small_passt(), mels(1, 96)
    tokens = [
        network.cls_token[0, 0] + network.new_pos_embed[0, 0],
        network.dist_token[0, 0] + network.new_pos_embed[0, 1],
    ]
    kernel = network.patch_embed.proj
    for row in range(8):
        for column in range(6):
            patch = mel[0, 0, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            token = (kernel.weight[:, 0] * patch).sum((1, 2)) + kernel.bias
            tokens.append(
                token + network.freq_new_pos_embed[0, :, row, 0] + network.time_new_pos_embed[0, :, 0, column]
            )
    x = torch.stack(tokens)[None]
    for block in network.blocks:
        x = x + block.attn(functional.layer_norm(x, (64,), block.norm1.weight, block.norm1.bias, 1e-6))
        y = functional.layer_norm(x, (64,), block.norm2.weight, block.norm2.bias, 1e-6)
        x = x + block.mlp.fc2(functional.gelu(block.mlp.fc1(y)))
    x = functional.layer_norm(x, (64,), network.norm.weight, network.norm.bias, 1e-6)
    embedding = (x[:, 0] + x[:, 1]) / 2
    assert isinstance(network.head[0], nn.LayerNorm)
    output = network(mel)
    torch.testing.assert_close(output.embedding, embedding, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.logits, network.head(embedding), atol=1e-4, rtol=1e-4)
