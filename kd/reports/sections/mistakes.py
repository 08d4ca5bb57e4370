"""The section on the most confident mistakes."""

from collections.abc import Mapping, Sequence

from kd.reports.analysis.mistakes import Mistake, false_alarms, misses, single_label_mistakes
from kd.reports.document import Block, Cell, Section, Sound, Table, Text, number
from kd.reports.run_reader import RunFolder


def mistake_lists(run: RunFolder) -> list[tuple[str, list[Mistake]]]:
    """Lists of mistakes with their titles. Empty lists are left out."""
    if not run.predictions:
        return []
    if run.one_label:
        lists = [
            ("Wrong predictions, the most confident first", single_label_mistakes(run.predictions, run.class_names))
        ]
    else:
        lists = [
            ("Predicted, but not a label of the clip", false_alarms(run.predictions, run.class_names)),
            ("A label of the clip, but not predicted", misses(run.predictions, run.class_names)),
        ]
    return [(title, found) for title, found in lists if found]


def mistake_section(
    lists: Sequence[tuple[str, Sequence[Mistake]]], sounds: Mapping[str, bytes], player_note: str
) -> Section:
    """A table for each list. Where ``sounds`` (MP3 data by clip id) has a preview of the clip, its row has a player.

    ``player_note``: what is to be said of the players, and of clips without.
    """
    blocks: list[Block] = []
    for title, mistakes in lists:
        one_label = mistakes[0].truth_probability is not None
        columns: dict[str, list[Cell]] = {
            "listen": [Sound(sounds.get(mistake.clip_id)) for mistake in mistakes],
            "clip": [mistake.clip_id for mistake in mistakes],
            "labelled": [mistake.truth or "nothing" for mistake in mistakes],
            "chosen" if one_label else "class": [mistake.said for mistake in mistakes],
            "probability": [number(mistake.probability) for mistake in mistakes],
            "of the label": [number(mistake.truth_probability) for mistake in mistakes],
            "device": [mistake.device or "" for mistake in mistakes],
            "part": [mistake.part for mistake in mistakes],
        }
        if not sounds:
            del columns["listen"]
        if not one_label:
            del columns["of the label"]
        columns = {name: cells for name, cells in columns.items() if any(cell != "" for cell in cells)}
        blocks.append(Table(tuple(columns), tuple(zip(*columns.values(), strict=True)), title))
    text = "The most confident predictions that disagree with the labels. Sometimes it is the label that is wrong."
    if player_note:
        text += f" {player_note}"
    return Section("Most confident mistakes", (Text(text), *blocks))
