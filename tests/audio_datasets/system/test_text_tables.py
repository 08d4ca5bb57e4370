"""Tables as text and as Markdown."""

import pytest

from audio_datasets.system.text_tables import markdown_table, text_table

ROWS = [("class", "clips", "AP"), ("rain", "7", "0.5"), ("dog, far", "1,200", "")]


def test_columns_are_as_wide_as_their_longest_cell() -> None:
    assert text_table(ROWS) == "class     clips   AP\nrain          7  0.5\ndog, far  1,200"
    assert text_table(ROWS, "<").splitlines()[1] == "rain      7      0.5"
    assert text_table(ROWS, "><").splitlines()[1] == "    rain  7      0.5"
    assert text_table([("", "a")]) == "  a"


def test_the_same_as_markdown() -> None:
    assert markdown_table(ROWS, "<<>").splitlines() == [
        "| class    | clips |  AP |",
        "| -------- | ----- | --: |",
        "| rain     | 7     | 0.5 |",
        "| dog, far | 1,200 |     |",
    ]
    assert markdown_table([("", "n")], ">").splitlines() == ["|    |  n |", "| -: | -: |"]


def test_rows_of_other_lengths_are_no_table() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        text_table([("a", "b"), ("c",)])
