"""Helpers for messages."""

from audio_datasets.system.messages import by_kind


def test_names_are_counted_by_kind() -> None:
    assert by_kind(["a.m4a", "b/c.txt", "d.M4A", "e.m4a", "README"]) == "3 .m4a, 1 .txt, 1 without a suffix"
    assert by_kind([]) == ""
