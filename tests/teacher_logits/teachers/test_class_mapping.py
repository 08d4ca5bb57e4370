"""Teachers with other class names: the map's file, what it does to logits, and who refuses what."""

import csv
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from audio_datasets.stores.clip_store import ClipStore
from kd.evaluate import main as evaluate
from students.frontend import LogMel, LogMelConfig
from teacher_logits.precompute import main as teach
from teacher_logits.store import LogitStore
from teacher_logits.teachers.base import Teacher
from teacher_logits.teachers.class_mapping import MappedTeacher, read_class_map, with_classes_of_clips
from teacher_logits.verify import main as verify

CLASSES = ("hiss", "hum, low", "click")
OTHER = ("Static", "Hum", "Mains hum", "Click", "Music")
MAP = {"hiss": ("Static",), "hum, low": ("Hum", "Mains hum"), "click": ("Click",)}


class FiveClasses(Teacher):
    """Logits that differ from class to class and follow the loudness of the mel bands."""

    def __init__(self, classes: tuple[str, ...] = OTHER) -> None:
        super().__init__("five", classes, sample_rate_hz=32000, clip_seconds=0.5)
        weights = torch.randn(128, 5, generator=torch.Generator().manual_seed(0))
        weights[:, 2] = -weights[:, 1]  # so that each of the two is sometimes the larger
        self.register_buffer("weights", weights)
        self.log_mel = LogMel(LogMelConfig())

    def forward(self, waveform: Tensor) -> Tensor:
        return self.logits_of_mel(self.log_mel(waveform))

    def logits_of_mel(self, mel: Tensor) -> Tensor:
        return mel.mean(3)[:, 0] @ self.weights


def written_map(path: Path, pairs: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("teacher_class", "class"), *pairs])
    return path


def pairs_of(class_map: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(source, name) for name, sources in class_map.items() for source in sources]


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8) | st.sampled_from(
    ["a, b", 'say "a"', "ä"]
)


@given(st.dictionaries(NAMES, st.lists(NAMES, min_size=1, max_size=3, unique=True).map(tuple), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_written_map_is_read_as_it_is(tmp_path: Path, class_map: dict[str, tuple[str, ...]]) -> None:
    assert read_class_map(written_map(tmp_path / "map.csv", pairs_of(class_map))) == class_map


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "columns teacher_class, class; found None"),
        ("a,b\nx,y\n", "found ['a', 'b']"),
        ("teacher_class,class\n", "is empty"),
        ("teacher_class,class\nx\n", "line 2: expected a teacher class and a class"),
        ("teacher_class,class\nx,\n", "line 2: expected a teacher class and a class"),
        ("teacher_class,class\nx,y,z\n", "line 2: expected a teacher class and a class"),
        ("teacher_class,class\nx,y\nx,y\n", "line 3: 'x' -> 'y' occurs twice"),
        ('teacher_class,class\n"x,y\n', "map.csv, line"),
    ],
)
def test_files_that_are_no_map(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "map.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="map") as raised:
        read_class_map(path)
    assert message in str(raised.value)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_class_map(path)
    with pytest.raises(ValueError, match="no such class map"):
        read_class_map(tmp_path / "absent.csv")


def test_a_class_is_the_maximum_over_its_teacher_classes() -> None:
    teacher = FiveClasses()
    mapped = MappedTeacher(teacher, CLASSES, MAP)
    loudness = torch.tensor([[0.0], [1e-4], [0.1], [1.0]])  # log-mels below and above zero
    waveform = loudness * torch.randn(4, 16000, generator=torch.Generator().manual_seed(1))
    static, hum, mains, click, _ = teacher(waveform).unbind(1)
    expected = torch.stack([static, torch.maximum(hum, mains), click], dim=1)
    torch.testing.assert_close(mapped(waveform), expected, atol=0, rtol=0)
    assert {bool(one) for one in hum > mains} == {True, False}, "either class should win for some clip"
    # Views reach the teacher's own front end.
    edges = torch.tensor([[5.0, 14000.0]] * 4)
    heard = mapped.hear_view(waveform, edges)
    torch.testing.assert_close(heard[:, 0], teacher.hear_view(waveform, edges)[:, 0], atol=0, rtol=0)
    assert not torch.allclose(heard, expected)


def test_the_map_is_part_of_the_fingerprint() -> None:
    teacher = FiveClasses()
    first = MappedTeacher(teacher, CLASSES, MAP)
    assert MappedTeacher(FiveClasses(), CLASSES, dict(reversed(MAP.items()))).fingerprint == first.fingerprint
    others = [
        teacher,
        MappedTeacher(teacher, CLASSES, {**MAP, "click": ("Static",)}),
        # The same columns under other names.
        MappedTeacher(FiveClasses((*OTHER[:4], "Speech")), CLASSES, MAP),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 4
    json.dumps(first.describe())


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        ({key: MAP[key] for key in ("hiss", "click")}, "has no teacher class for 'hum, low'"),
        ({**MAP, "bang": ("Click",)}, "names classes that the clips do not have: 'bang'"),
        ({**MAP, "click": ("Click", "Klick")}, "names classes that teacher 'five' does not have: 'Klick'"),
    ],
)
def test_maps_that_do_not_fit(class_map: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MappedTeacher(FiveClasses(), CLASSES, class_map)


def test_without_a_map_other_classes_are_refused(tiny_store: Path) -> None:
    clips = ClipStore.open(tiny_store)
    with pytest.raises(ValueError, match=r"class 0 is 'hiss' in .* and 'Static' in teacher five; .* --class-map FILE"):
        with_classes_of_clips(FiveClasses(), "five", clips, None)
    assert isinstance(with_classes_of_clips(FiveClasses(), "five", clips, MAP), MappedTeacher)


def test_the_commands(own_teachers: str, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def ends_with(code: int, command, *arguments: object) -> str:
        assert command([*map(str, arguments)]) == code
        return capsys.readouterr().err

    map_file = written_map(tmp_path / "map.csv", [("hum", "hum, low"), ("hiss", "hiss"), ("click", "click")])
    other, same = f"{own_teachers}:other_classes", f"{own_teachers}:good"
    common = ("--clips", tiny_store, "--workers", 0)
    assert "'hum' in teacher" in ends_with(2, teach, *common, "--out", tmp_path, "--teacher", other)
    ends_with(0, teach, *common, "--out", tmp_path, "--teacher", other, same, "--class-map", map_file)
    mapped, plain = LogitStore.open(tmp_path / "statistics.h5"), LogitStore.open(tmp_path / "statistics-2.h5")
    assert mapped.class_names == plain.class_names == CLASSES
    assert (mapped.read(mapped.clip_ids) == plain.read(plain.clip_ids)).all()
    stores = ("--clips", tiny_store, "--logits", tmp_path / "statistics.h5")
    ends_with(0, verify, *stores, "--teacher", other)
    assert ends_with(2, verify, *stores, "--teacher", same)
    ends_with(0, evaluate, *common, "--tagger", other, "--class-map", map_file)

    for command, arguments, option in (
        (teach, ("--out", tmp_path, "--teacher", same, "--class-map", map_file), "--class-map"),
        (evaluate, ("--tagger", same, "--class-map", map_file), "--class-map"),
    ):
        assert f"{option} has no effect" in ends_with(2, command, *common, *arguments)
    names = tmp_path / "names.txt"
    names.write_text("hiss\nhum\nclick\n")
    for command, arguments, option in (
        (teach, ("--out", tmp_path, "--teacher", same, "--teacher-class-names", names), "--teacher-class-names"),
        (evaluate, ("--tagger", same, "--tagger-class-names", names), "--tagger-class-names"),
    ):
        assert f"{option} has no effect" in ends_with(2, command, *common, *arguments)


def test_bare_weights_with_a_class_list_of_their_own(run_folder: Path, tiny_store: Path, tmp_path: Path) -> None:
    from students import create_student

    weights = tmp_path / "weights.pt"
    torch.manual_seed(0)
    torch.save(create_student("mn01", 5).state_dict(), weights)
    (tmp_path / "names.txt").write_text("\n".join(OTHER))
    map_file = written_map(tmp_path / "map.csv", pairs_of(MAP))
    names = ("--class-map", str(map_file), "--teacher-class-names", str(tmp_path / "names.txt"))
    clips = ("--clips", str(tiny_store), "--clip-seconds", "0.5", "--workers", "0", "--out", str(tmp_path))
    assert teach(["--teacher", f"mn01@{weights}", *clips, *names]) == 0
    stored = LogitStore.open(tmp_path / "weights.h5")
    assert stored.class_names == CLASSES
    # The store tells the class list and the map, so verify needs neither.
    assert verify(["--clips", str(tiny_store), "--logits", str(stored.path), "--teacher", f"mn01@{weights}"]) == 0


def test_classes_that_exclude_each_other_are_mapped_by_sums_of_probabilities() -> None:
    whole = {**MAP, "click": ("Click", "Music")}
    for class_map, link in ((MAP, "sigmoid"), (whole, "softmax")):
        teacher = FiveClasses()
        teacher.tell_link("softmax")
        mapped, waveform = MappedTeacher(teacher, CLASSES, class_map), 0.1 * torch.randn(4, 16000)
        p = torch.softmax(teacher(waveform), 1)
        expected = torch.stack([sum(p[:, OTHER.index(source)] for source in class_map[name]) for name in CLASSES], 1)
        assert mapped.describe()["link"] == link
        torch.testing.assert_close(mapped.link.probabilities(mapped(waveform)), expected, rtol=1e-4, atol=1e-5)
        stored = mapped.describe()
        assert stored["architecture"]["mapped"] == "sums of probabilities"
        assert stored["fingerprint"] != MappedTeacher(FiveClasses(), CLASSES, class_map).fingerprint
