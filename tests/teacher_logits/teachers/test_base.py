"""Settings that no teacher can have."""

import pytest

from teacher_logits.teachers.base import Teacher

CLASSES = ("hiss", "hum, low", "click")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_names": ()}, "empty"),
        ({"class_names": ("a", "a")}, "unique"),
        ({"sample_rate_hz": 0}, "sample_rate_hz"),
        ({"clip_seconds": -1.0}, "clip_seconds"),
    ],
)
def test_teachers_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Teacher(**{"name": "t", "class_names": ("a",), "sample_rate_hz": 32000, **arguments})
