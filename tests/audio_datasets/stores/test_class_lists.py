"""Class lists and label maps."""

import csv
import io
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio_datasets.stores.class_lists import (
    check_class_names,
    check_same_classes,
    class_list_difference,
    read_class_names,
    read_label_map,
)

ESC50_CATEGORIES = """
    dog rooster pig cow frog cat hen insects sheep crow
    rain sea_waves crackling_fire crickets chirping_birds water_drops wind pouring_water toilet_flush thunderstorm
    crying_baby sneezing clapping breathing coughing footsteps laughing brushing_teeth snoring drinking_sipping
    door_wood_knock mouse_click keyboard_typing door_wood_creaks can_opening washing_machine vacuum_cleaner clock_alarm clock_tick glass_breaking
    helicopter chainsaw siren car_horn engine train church_bells airplane fireworks hand_saw
"""

# Printable characters on one line, with commas, quotes and any script.
name = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12)
names = st.lists(name, min_size=1, max_size=20, unique_by=lambda text: unicodedata.normalize("NFC", text))


def audioset_csv(class_names: list[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(["index", "mid", "display_name"])
    writer.writerows([index, f"/m/{index}", class_name] for index, class_name in enumerate(class_names))
    return text.getvalue()


@given(names)
def test_each_kind_of_file_gives_the_names_back(
    tmp_path_factory: pytest.TempPathFactory, class_names: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("classes")
    contents = {
        "classes.csv": audioset_csv(class_names),
        "list.json": json.dumps(class_names),
        "map.json": json.dumps({name: index for index, name in reversed(list(enumerate(class_names)))}),
        "classes.txt": "\n".join(class_names) + "\n",
    }
    normal_names = tuple(unicodedata.normalize("NFC", class_name) for class_name in class_names)
    for file_name, content in contents.items():
        (folder / file_name).write_text(content, encoding="utf-8")
        assert read_class_names(folder / file_name) == normal_names, file_name


@pytest.mark.parametrize("file_name", ["class_labels_indices.csv", "classes.txt", "classes"])
def test_audiosets_list_is_recognised_by_its_header(tmp_path: Path, file_name: str) -> None:
    (tmp_path / file_name).write_text(audioset_csv(["Speech", "Male speech, man speaking", "Dog"]))
    assert read_class_names(tmp_path / file_name) == ("Speech", "Male speech, man speaking", "Dog")


@pytest.mark.parametrize("suffix", ["csv", "txt", "json"])
def test_both_unicode_forms_give_one_class_list(tmp_path: Path, suffix: str) -> None:
    lists = []
    for number, form in enumerate(("NFC", "NFD")):
        words = [unicodedata.normalize(form, word) for word in ("café", "Žába", "dog\u00a0house")]
        content = {"csv": audioset_csv(words), "txt": "\n".join(words), "json": json.dumps(words)}[suffix]
        (tmp_path / f"{number}.{suffix}").write_text(content, encoding="utf-8")
        lists.append(read_class_names(tmp_path / f"{number}.{suffix}"))
        assert class_list_difference(words, lists[0]) is None
    assert lists[0] == lists[1] == ("café", "Žába", "dog\u00a0house")


@given(st.binary(max_size=200), st.sampled_from([".csv", ".json", ".txt"]))
def test_any_other_content_is_a_class_list_or_a_value_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("classes") / f"classes{suffix}"
    path.write_bytes(content)
    message = ""
    try:
        assert all(isinstance(name, str) for name in read_class_names(path))
    except ValueError as error:
        message = str(error)
    assert not message or str(path) in message


@pytest.mark.parametrize(
    ("file_name", "content", "message"),
    [
        ("a.txt", "dog\ncat\ndog\n", "'dog'"),
        ("a.txt", "", "empty"),
        ("a.json", '["dog", 3]', "3"),
        ("a.json", '{"dog": 0, "cat": 2}', "0 to 1"),
        ("a.json", '{"dog": "0"}', "name -> index"),
        ("a.csv", "index,mid,display_name\n0,/m/1,Dog\n0,/m/2,Cat\n", "each once"),
        ("a.csv", "number,name\n0,Dog\n", "display_name"),
        ("a.csv", "index,mid,display_name\n0\n", "line 2 .*too few columns"),
        (
            "a.csv",
            "index,mid,display_name\n0,/m/1,Speech\n1,/m/2,Male speech, man speaking\n",
            'line 3 has 4 fields, the header has 3: a name with a comma must be in quotes, as in "Male speech, man speaking"',
        ),
        ("a.csv", "index,mid,display_name\nx,/m/1,Dog\n", "line 2: an index must be a whole number; found 'x'"),
        ("a.txt", "index,mid,display_name\n0,/m/1,Male speech, man speaking\n", "line 2 has 4 fields"),
        ("a.txt", "caf\u00e9\ncafe\u0301\n", "more than once"),
    ],
)
def test_wrong_class_lists_are_refused(tmp_path: Path, file_name: str, content: str, message: str) -> None:
    (tmp_path / file_name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as raised:
        read_class_names(tmp_path / file_name)
    assert str(tmp_path / file_name) in str(raised.value)


def test_a_missing_class_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file: .*absent\.csv"):
        read_class_names(tmp_path / "absent.csv")


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("dog\ncat\n", encoding="utf-8-sig")
    assert read_class_names(tmp_path / "classes.txt") == ("dog", "cat")


def test_the_difference_of_two_class_lists_names_the_first() -> None:
    assert class_list_difference(["a", "b"], ["a", "b"]) is None
    assert class_list_difference(["a", "b", "c"], ["a", "x", "y"]) == "class 1 is 'b' in one and 'x' in the other"
    assert class_list_difference(["a", "b"], ["a"]) == "2 classes in one and 1 in the other"


def test_blank_names_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        check_class_names(["dog", " "])


def test_the_esc50_map_covers_all_categories() -> None:
    assert sorted(read_label_map("esc50_to_audioset")) == sorted(ESC50_CATEGORIES.split())


def test_the_esc50_map_uses_audioset_names(reference_dir: Path) -> None:
    class_names = read_class_names(reference_dir / "data" / "labels" / "audioset_class_labels_indices.csv")
    assert len(class_names) == 527
    mapped = {name for names in read_label_map("esc50_to_audioset").values() for name in names}
    assert mapped <= set(class_names)


def test_the_openmic_class_map_is_read(reference_dir: Path) -> None:
    class_names = read_class_names(reference_dir / "data" / "labels" / "openmic_class-map.json")
    assert (len(class_names), class_names[:2]) == (20, ("accordion", "banjo"))


def test_a_label_may_have_several_classes(tmp_path: Path) -> None:
    path = tmp_path / "map.csv"
    path.write_text('label,class\ndog,Dog\nhen,"Chicken, rooster"\ndog,Bark\n', encoding="utf-8")
    assert read_label_map(path) == {"dog": ("Dog", "Bark"), "hen": ("Chicken, rooster",)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("label,class\ndog\n", "line 2"),
        ("label,class\ndog,Dog\ndog,Dog\n", "twice"),
        ("label,class\n", "empty"),
        ("label,class\ndog, \n", "line 2"),
    ],
)
def test_wrong_label_maps_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "map.csv").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_label_map(tmp_path / "map.csv")


def test_an_unknown_label_map_lists_the_built_in_ones() -> None:
    with pytest.raises(ValueError, match="esc50_to_audioset"):
        read_label_map("esc10_to_audioset")


def test_class_lists_of_another_length_are_refused():
    check_same_classes(["a", "b"], ("a", "b"), "clips", "logits")
    with pytest.raises(ValueError, match="2 classes in clips and 1 in logits"):
        check_same_classes(["a", "b"], ["a"], "clips", "logits")
