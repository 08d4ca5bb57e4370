"""Events of streams by window, hop and threshold: how many are found, how many are false, how late and how long they are.

Mixtures of 30 s: five sounds of ESC-10, each cut to where it is heard, 1.5 to 3.5 s apart, over soft noise. A
category's score is the highest of the tagger's classes that it is mapped to (esc50_to_audioset).

- found: sounds of which an event of their category overlaps some part
- F1: an event counts if it begins within 1 s of its sound and ends within 1 s or half the sound's length, one to one (as
  sed_eval's event-based metric, whose package does not run on today's Python)
- false: events of a category that is not heard anywhere in their time, per minute of audio
- overhang: by how much an event of a found sound is longer than the sound, outside it
- latency: from the end of a found sound until its event is printed

    python benchmarks/events.py --tagger mn04@mn04_as_mAP_432.pt --esc10 ESC-10
"""

import argparse
import csv
import dataclasses
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

from audio_datasets.audio.codec import decode
from audio_datasets.stores.class_lists import read_label_map
from audio_datasets.system.command import progress
from audio_datasets.system.randomness import generator
from audio_datasets.system.text_tables import markdown_table
from audio_datasets.tasks.label_space import LabelSpace
from kd.deploy.streaming.event_stream import EventStream, StreamSettings
from kd.deploy.streaming.events import Event
from kd.deploy.tagging.model import TaggingModel, load_model, with_threshold

SECONDS, SOUNDS = 30.0, 5
COLLAR_SECONDS = 1.0
PIECE_SECONDS = 0.1
Sound = tuple[float, float, str]
"""Start, end, category."""


def heard_part(wave: np.ndarray, rate: int) -> np.ndarray:
    """A clip from where it is first within 30 dB of its loudest 20 ms to where it is last, at most 4 s."""
    frame = rate // 50
    level = np.square(wave[: len(wave) // frame * frame]).reshape(-1, frame).mean(1)
    loud = np.flatnonzero(level > 1e-3 * level.max())
    return wave[loud[0] * frame : (loud[-1] + 1) * frame][: 4 * rate]


def mixture(number: int, clips: list[tuple[str, Path]], rate: int) -> tuple[np.ndarray, list[Sound]]:
    rng = generator(0, "event mixture", 0, number)
    wave = 10 ** (-50 / 20) * rng.standard_normal(round(SECONDS * rate)).astype(np.float32)
    sounds, place = [], rate
    for index in rng.permutation(len(clips))[:SOUNDS]:
        category, path = clips[index]
        part = heard_part(decode(path, rate), rate)
        if place + len(part) > len(wave) - 2 * rate:
            break
        wave[place : place + len(part)] += part * (0.5 * 10 ** -rng.uniform(0, 0.7) / np.abs(part).max())
        sounds.append((place / rate, (place + len(part)) / rate, category))
        place += len(part) + round(rng.uniform(1.5, 3.5) * rate)
    return wave, sounds


def of_categories(model: TaggingModel, categories: list[str]) -> TaggingModel:
    """The tagger with the categories as its classes. What it was once given is remembered, for the next threshold."""
    label_map, names = read_label_map("esc50_to_audioset"), list(model.class_names)
    columns = [[names.index(name) for name in label_map[category]] for category in categories]
    known: dict[bytes, np.ndarray] = {}

    def run(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        key = windows.tobytes()
        if hash(key) not in known:
            logits, _ = model.run(windows)
            known[hash(key)] = np.stack([logits[:, group].max(1) for group in columns], axis=1)
        return known[hash(key)], np.zeros((len(windows), 1), np.float32)

    space = LabelSpace.single(categories, exclusive=False)
    return dataclasses.replace(model, label_space=space, thresholds=np.full(len(categories), 0.5), run=run)


def printed(model: TaggingModel, wave: np.ndarray, rate: int, settings: StreamSettings) -> list[tuple[Event, float]]:
    """Each event and when it was printed, in seconds of the stream."""
    stream, piece, found = EventStream(model, rate, settings), round(PIECE_SECONDS * rate), []
    for start in range(0, len(wave), piece):
        events = stream.feed(wave[start : start + piece])
        found += [(event, min(start + piece, len(wave)) / rate) for event in events]
    return found + [(event, len(wave) / rate) for event in stream.finish()]


def outside(event: Event, sound: Sound) -> float:
    return max(0.0, sound[0] - event.start_seconds) + max(0.0, event.end_seconds - sound[1])


def fits(event: Event, sound: Sound) -> bool:
    ends = max(COLLAR_SECONDS, 0.5 * (sound[1] - sound[0]))
    near = abs(event.start_seconds - sound[0]) <= COLLAR_SECONDS and abs(event.end_seconds - sound[1]) <= ends
    return near and event.class_name == sound[2]


def judge(model: TaggingModel, mixtures: list, rate: int, settings: StreamSettings) -> list[str]:
    found = matched = false = events = 0
    overhang, latency = [], []
    for wave, sounds in mixtures:
        given = printed(model, wave, rate, settings)
        events += len(given)

        def overlapping(event: Event, sound: Sound) -> bool:
            return event.class_name == sound[2] and event.start_seconds < sound[1] and event.end_seconds > sound[0]

        for sound in sounds:
            mine = [(event, when) for event, when in given if overlapping(event, sound)]
            if mine:
                found += 1
                overhang.append(sum(outside(event, sound) for event, _ in mine))
                latency.append(max(when for _, when in mine) - sound[1])
        false += sum(not any(overlapping(event, sound) for sound in sounds) for event, _ in given)
        pairs = csr_matrix([[fits(event, sound) for sound in sounds] for event, _ in given] or (1, len(sounds)))
        matched += int((maximum_bipartite_matching(pairs, perm_type="column") >= 0).sum())
    total = sum(len(sounds) for _, sounds in mixtures)
    minutes = sum(len(wave) for wave, _ in mixtures) / rate / 60
    means = [f"{np.mean(values):.1f} s" if values else "–" for values in (overhang, latency)]
    return [f"{found / total:.2f}", f"{2 * matched / (total + events):.2f}", f"{false / minutes:.1f}", *means]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tagger", required=True)
    parser.add_argument("--esc10", type=Path, required=True, help="folder with audio/ and meta/esc50.csv")
    parser.add_argument("--mixtures", type=int, default=20)
    arguments = parser.parse_args()
    with open(arguments.esc10 / "meta" / "esc50.csv", encoding="utf-8") as file:
        clips = [(row["category"], arguments.esc10 / "audio" / row["filename"]) for row in csv.DictReader(file)]
    model = of_categories(load_model(arguments.tagger), sorted({category for category, _ in clips}))
    rate = model.window.sample_rate_hz
    mixtures = [mixture(number, clips, rate) for number in range(arguments.mixtures)]
    print(f"{sum(len(sounds) for _, sounds in mixtures)} sounds in {len(mixtures)} mixtures of {SECONDS:g} s")
    rows = [["window", "hop", "threshold", "found", "F1", "false a minute", "overhang", "latency"]]
    choices = [(1.0, 0.5), (2.0, 0.25), (2.0, 0.5), (2.0, 1.0), (5.0, 0.5), (10.0, 0.5)]
    for window, hop in progress(choices, desc="windows"):
        for threshold in (0.1, 0.2, 0.3, 0.5):
            settings = StreamSettings(window_seconds=window, hop_seconds=hop)
            scores = judge(with_threshold(model, threshold), mixtures, rate, settings)
            rows.append([f"{window:g} s", f"{hop:g} s", f"{threshold:g}", *scores])
    print(markdown_table(rows, align=">"))


if __name__ == "__main__":
    main()
