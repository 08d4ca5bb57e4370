"""Clips found by their ids in whichever way these are written."""

import unicodedata

import numpy as np
import pytest

from audio_datasets.stores.clip_ids import ClipIds, are_audiosets, audioset_id
from audio_datasets.stores.hdf5_arrays import encode_ids, id_order

YOUTUBE = ("--4gqARaEJE", "_-0Q8LB5DlA", "YbcdefGhijk", "zzzzzzzzzzz")


def lookup(names: list[str]) -> ClipIds:
    encoded = encode_ids(names)
    return ClipIds(encoded, id_order(encoded))


@pytest.mark.parametrize(
    "asked", ["{}", "Y{}", "00/Y{}.mp3", "Y{}.wav", "train/unbalanced_train_segments_part07/Y{}.flac"]
)
@pytest.mark.parametrize("stored", ["{}", "Y{}", "Y{}.mp3", "00/Y{}.mp3"])
def test_every_way_of_writing_an_audioset_id_finds_the_clip(stored: str, asked: str) -> None:
    ids = lookup([stored.format(key) for key in YOUTUBE])
    found = ids.find([asked.format(key) for key in (*YOUTUBE, "notThere--1")])
    assert found.tolist() == [0, 1, 2, 3, -1]


def test_folders_of_other_data_are_part_of_the_name() -> None:
    """Eleven characters by chance: dog/recording01.wav is not cat/recording01.wav, nor are other names alike."""
    ids = lookup(["dog/recording01.wav", "dog/recording02.wav", "a.wav", "b.wav"])
    assert ids.find(["cat/recording01.wav", "recording01", "Yrecording02.wav"]).tolist() == [-1, -1, -1]
    ids = lookup(["recording01", "b", "c", "d"])  # a store of other clips, one id of which looks like AudioSet's
    assert ids.find(["Yrecording01"]).tolist() == [-1]
    assert audioset_id("cat/recording01.wav") is None
    assert not are_audiosets([])


def test_two_spellings_of_one_clip_in_a_store_stay_apart() -> None:
    ids = lookup(["00/YzzzzzzzzzzA.mp3", "01/YzzzzzzzzzzA.mp3", "02/YzzzzzzzzzzB.mp3"])
    assert ids.find(["zzzzzzzzzzA", "zzzzzzzzzzB", "01/YzzzzzzzzzzA.mp3"]).tolist() == [-1, 2, 1]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_both_unicode_forms_find_a_clip(forms: tuple[str, str]) -> None:
    stored, asked = ([unicodedata.normalize(form, name) for name in ("café/1", "Žába", "dog")] for form in forms)
    np.testing.assert_array_equal(lookup(stored).find([*asked, "cafe"]), [0, 1, 2, -1])


def test_an_empty_store_has_no_clip() -> None:
    assert lookup([]).find(["é", "YzzzzzzzzzzA"]).tolist() == [-1, -1]
