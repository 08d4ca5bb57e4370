"""AudioSet's official files: lists of segments, the class list, and audio named by YouTube id."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_datasets.audio.codec import encode
from audio_datasets.corpora.audioset import Segment, index_audio, read_segments, segment_lists
from audio_datasets.pack import PackConfig, main, pack
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.manifest import select_rows
from audio_datasets.system.randomness import generator
from audio_datasets.tasks.catalog import read_listing
from audio_datasets.tasks.listing import describe

CLASSES = (("/m/09x0r", "Speech"), ("/m/05zppz", "Male speech, man speaking"), ("/m/0bt9lr", "Dog"))

BALANCED = """\
# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=22160, num_segs=22160, num_unique_labels=527, num_positive_labels=52882
# YTID, start_seconds, end_seconds, positive_labels
--4gqARaEJE, 0.000, 10.000, "/m/09x0r,/m/0bt9lr"
_-0Q8LB5DlA, 30.000, 40.000, "/m/05zppz"
YbcdefGhijk, 20.000, 25.500, "/m/0bt9lr"
zzzzzzzzzzz, 10.000, 20.000, "/m/09x0r"
"""
EVAL = """\
# Segments csv created Sun Mar  5 10:54:25 2017
# num_ytids=20371, num_segs=20371, num_unique_labels=527, num_positive_labels=51804
# YTID, start_seconds, end_seconds, positive_labels
-abcdefghi_, 30.000, 40.000, "/m/09x0r"
"""


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    """A folder with the official files, three classes long."""
    folder = tmp_path / "metadata"
    folder.mkdir()
    (folder / "balanced_train_segments.csv").write_text(BALANCED)
    (folder / "eval_segments.csv").write_text(EVAL)
    rows = "".join(f'{index},{mid},"{name}"\n' for index, (mid, name) in enumerate(CLASSES))
    (folder / "class_labels_indices.csv").write_text(f"index,mid,display_name\n{rows}")
    return folder


def sound(index: int, seconds: float = 0.2) -> bytes:
    wave = 0.1 * generator(3, "audioset test", 0, index).standard_normal(round(8000 * seconds))
    return encode(wave.astype(np.float32), 8000, "flac")


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    """Audio of four of the five segments, each file named in another way that is in use."""
    root = tmp_path / "audio"
    names = ["a/Y--4gqARaEJE.flac", "b/c/_-0Q8LB5DlA_30.000.FLAC", "YbcdefGhijk_20000_25500.flac", "Y-abcdefghi_.flac"]
    for index, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sound(index))
    return root


def test_the_official_lists_and_every_way_of_naming_files(lists: Path, audio: Path) -> None:
    (audio / "notes.txt").write_text("x")
    (audio / ".hidden.flac").write_text("x")
    source = read_listing(lists, audio_root=audio)
    assert source.layout == "audioset"
    assert source.class_names == ("Speech", "Male speech, man speaking", "Dog")  # the official order, used or not
    assert [(clip.clip_id, clip.labels, clip.split) for clip in source.clips] == [
        ("Y--4gqARaEJE", ("Speech", "Dog"), "balanced_train"),
        ("Y_-0Q8LB5DlA", ("Male speech, man speaking",), "balanced_train"),
        ("YYbcdefGhijk", ("Dog",), "balanced_train"),
        ("Y-abcdefghi_", ("Speech",), "eval"),
    ]
    assert all(clip.path.exists() for clip in source.clips)
    assert source.clips[2].seconds == 5.5
    assert source.missing == ("Yzzzzzzzzzzz",)
    assert source.ignored == ("notes.txt",)
    assert source.notes == ("passed over, since they are hidden: '.hidden.flac'",)
    assert "no audio for 1 more (20.0 % of those listed): 'Yzzzzzzzzzzz'" in describe(source)
    assert [clip.clip_id for clip in read_listing(lists, audio_root=audio, segments=["eval"]).clips] == ["Y-abcdefghi_"]
    one_list = read_listing(lists / "eval_segments.csv", audio_root=audio)
    assert [clip.clip_id for clip in one_list.clips] == ["Y-abcdefghi_"]


def test_packing_says_what_is_missing_and_refuses_what_was_not_cut(
    lists: Path, audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (audio / "Y-abcdefghi_.flac").write_bytes(sound(9, seconds=12.5))
    out = tmp_path / "clips.h5"
    arguments = [str(lists), "--audio-root", str(audio), "--out", str(out), "--workers", "1", "--layout", "audioset"]
    for run in ("packed", "already packed"):
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert "skipped Y-abcdefghi_.flac: 12.5 s long, listed as 10.0 s: it was not cut to its segment" in printed
        assert f"\n{run}" in printed
        assert "no audio for 1 listed clips (20.0 %)" in printed
    assert (tmp_path / "clips.missing.txt").read_text() == "Yzzzzzzzzzzz\n"
    store = ClipStore.open(out)
    assert store.clip_ids == ["Y--4gqARaEJE", "Y_-0Q8LB5DlA", "YYbcdefGhijk"]
    assert store.class_names == ("Speech", "Male speech, man speaking", "Dog")
    np.testing.assert_array_equal(store.targets([0, 1, 2]), [[1, 0, 1], [0, 1, 0], [0, 0, 1]])
    assert len(select_rows(store, split="balanced_train")) == 3
    with pytest.raises(ValueError, match="1 clips .* have no audio: 'Yzzzzzzzzzzz'"):
        pack(PackConfig(lists, out, audio_root=audio, on_bad_clip="refuse"), show_progress=False)


def test_a_file_of_another_segment_of_the_video_is_not_taken(lists: Path, tmp_path: Path) -> None:
    audio = tmp_path / "audio"
    audio.mkdir()
    for name in ("_-0Q8LB5DlA_50.000.flac", "--4gqARaEJE_0.flac", "Y--4gqARaEJE.flac"):
        (audio / name).write_bytes(sound(0))
    source = read_listing(lists, audio_root=audio)
    assert [(clip.clip_id, clip.source) for clip in source.clips] == [("Y--4gqARaEJE", "--4gqARaEJE_0.flac")]
    assert "Y_-0Q8LB5DlA" in source.missing


def test_folders_that_are_links_are_looked_into_once(audio: Path) -> None:
    (audio / "a" / "loop").symlink_to(audio)
    assert sorted(index_audio(audio, {".flac"}).files) == ["--4gqARaEJE", "-abcdefghi_", "YbcdefGhijk", "_-0Q8LB5DlA"]


def test_what_is_wrong_with_the_lists_is_said(lists: Path, audio: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no list 'unbalanced_train'; it has 'balanced_train', 'eval'"):
        read_listing(lists, audio_root=audio, segments=["unbalanced_train"])
    with pytest.raises(ValueError, match=r"no audio in .*empty for any of the 5 clips .*'Y--4gqARaEJE'"):
        (tmp_path / "empty").mkdir()
        read_listing(lists, audio_root=tmp_path / "empty")
    with pytest.raises(ValueError, match="no folder with audio"):
        read_listing(lists, audio_root=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no lists of segments"):
        segment_lists(audio)
    table = lists / "eval_segments.csv"
    table.write_text(EVAL + '-abcdefgh, 30.000, 40.000, "/m/09x0r"\n')
    with pytest.raises(ValueError, match="eval_segments.csv, line 5: expected a YouTube id"):
        list(read_segments(table))
    table.write_text(EVAL.replace("/m/09x0r", "/m/unknown"))
    with pytest.raises(ValueError, match="segment -abcdefghi_ has classes of no class list: '/m/unknown'"):
        read_listing(lists, audio_root=audio)
    (lists / "class_labels_indices.csv").unlink()
    with pytest.raises(ValueError, match="has no class_labels_indices.csv"):
        read_listing(lists, audio_root=audio)


def test_audio_root_is_refused_where_it_has_no_effect(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "a.wav").write_bytes(b"x")
    with pytest.raises(ValueError, match="are for the layout audioset; .* has the layout folder"):
        read_listing(tmp_path, audio_root=tmp_path)


youtube_ids = st.text("ABYZabyz019-_", min_size=11, max_size=11)


times = st.sampled_from(["", "_{s}", "_{ms}", "_{f}", "_{s}_{e}", "_{ms}_{me}"])


@settings(max_examples=50)
@given(youtube_ids, st.integers(0, 500), st.sampled_from(["{id}", "Y{id}"]), times)
def test_any_id_is_found_under_any_name(
    tmp_path_factory: pytest.TempPathFactory, youtube_id: str, start: int, name: str, times: str
) -> None:
    folder = tmp_path_factory.mktemp("names")
    stem = (name + times).format(
        id=youtube_id, s=start, e=start + 10, ms=1000 * start, me=1000 * start + 10_000, f=f"{start}.000"
    )
    (folder / f"{stem}.mp3").touch()
    index = index_audio(folder, {".mp3"})
    assert index.find(Segment(youtube_id, float(start), start + 10.0, ())) == f"{stem}.mp3"


class_ids = st.lists(st.sampled_from([class_id for class_id, _ in CLASSES]), min_size=1)


@settings(max_examples=50)
@given(st.lists(st.tuples(youtube_ids, st.integers(0, 900), class_ids)))
def test_lists_are_read_as_they_are_written(tmp_path_factory: pytest.TempPathFactory, segments: list) -> None:
    lines = [f'{i}, {start:.3f}, {start + 10:.3f}, "{",".join(ids)}"\n' for i, start, ids in segments]
    path = tmp_path_factory.mktemp("lists") / "balanced_train_segments.csv"
    path.write_text('# a comment with "one quote\n' + "".join(lines))
    assert list(read_segments(path)) == [Segment(i, float(s), s + 10.0, tuple(ids)) for i, s, ids in segments]
