"""Targets of tests/robustness/fuzz.py: the layouts of data sets, names of files, AudioSet's lists, and joined stores."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from fuzz_damage import ODD_TEXTS, change_content
from fuzz_stores import CLASSES, RATE
from fuzz_targets import TREE, Target, in_its_place, need, noise

from audio_datasets.audio.codec import AUDIO_SUFFIXES, to_pcm16
from audio_datasets.corpora.audioset import index_audio
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from audio_datasets.stores.joined import JoinedClips
from audio_datasets.stores.names import problem_of
from audio_datasets.system.randomness import generator
from audio_datasets.tasks.catalog import get_task, read_listing
from audio_datasets.tasks.listing import Listing
from audio_datasets.tasks.task import TaskClips, read_task
from teacher_logits.store import write_logit_store
from teacher_logits.stores.ensemble import LogitEnsemble
from teacher_logits.verify import VerifyConfig, verify

NAMES_FILE = "names.txt"

# -- Layouts -----------------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def sounds(folder: Path, *names: str) -> None:
    """Files that look like audio; what a list says of them matters here, not what they hold."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, noise(0, 8), RATE, format="WAV")


def esc50_files(folder: Path) -> list[Path]:
    root = folder / TREE
    names = [f"{fold}-{100 + target}-A-{target}.wav" for fold in (1, 2) for target in range(3)]
    sounds(root / "audio", *names[1:], names[0].replace(".wav", ".ogg"))
    rows = [f"{name},{name[0]},{name[-5]},{('dog', 'rain', 'hen')[int(name[-5])]},True,{name[2:5]},A" for name in names]
    return [
        write(
            root / "meta" / "esc50.csv",
            "\n".join(["filename,fold,target,category,esc10,src_file,take", *rows]) + "\n",
        )
    ]


def fsd50k_files(folder: Path) -> list[Path]:
    root, truth = folder / TREE, folder / TREE / "FSD50K.ground_truth"
    sounds(root / "FSD50K.dev_audio", "64760.wav", "16399.wav", "345111.wav")
    sounds(root / "FSD50K.eval_audio", "37199.wav", "175151.wav")
    dev = '64760,"Bark",/m/0,train\n16399,"Bark,Rain","/m/0,/m/1",train\n345111,Rain,/m/1,val\n'
    return [
        write(truth / "vocabulary.csv", "0,Accordion,/m/00\n1,Bark,/m/01\n2,Rain,/m/02\n"),
        write(truth / "dev.csv", f"fname,labels,mids,split\n{dev}"),
        write(truth / "eval.csv", 'fname,labels,mids\n37199,"Accordion,Rain",/m/0\n175151,Bark,/m/1\n'),
    ]


def openmic_files(folder: Path) -> list[Path]:
    """The archive twice: its keys as plain text, and as Python objects, as in the official file."""
    root = folder / TREE
    keys = ["000046_3840", "000135_483840", "001000_0", "001001_0", "999_left_out"]
    sounds(root / "audio", *(f"{key[:3]}/{key}.ogg" for key in keys))
    draws = generator(5, "fuzz openmic")
    arrays = {"Y_true": draws.random((5, 3)), "Y_mask": draws.random((5, 3)) < 0.6}
    others = folder / "plain" / TREE
    sounds(others / "audio", *(f"{key[:3]}/{key}.ogg" for key in keys))
    files = []
    for place, kind in ((root, object), (others, None)):
        np.savez(place / "openmic-2018.npz", **arrays, sample_key=np.array(keys, dtype=kind))
        classes = write(place / "class-map.json", json.dumps({"accordion": 0, "banjo": 1, "bass": 2}))
        train = write(place / "partitions" / "split01_train.csv", "\n".join(keys[:2]) + "\n")
        write(place / "partitions" / "split01_test.csv", "\n".join(keys[2:4]) + "\n")
        files += [place / "openmic-2018.npz", classes, train]
    return files


def dcase20_files(folder: Path) -> list[Path]:
    root = folder / TREE
    meta = ["filename\tscene_label\tidentifier\tsource_label"]
    lists = {"train": ["filename\tscene_label"], "evaluate": ["filename\tscene_label"]}
    for scene in ("airport", "bus"):
        for place, device, split in ((0, "a", "train"), (1, "s1", "train"), (2, "s4", "evaluate")):
            name = f"audio/{scene}-lyon-{place}-{place}-{device}.wav"
            sounds(root, name)
            meta.append(f"{name}\t{scene}\tlyon-{place}\t{device}")
            lists[split].append(f"{name}\t{scene}")
    setup = root / "evaluation_setup"
    return [
        write(root / "meta.csv", "\n".join(meta) + "\n"),
        *(write(setup / f"fold1_{name}.csv", "\n".join(lines) + "\n") for name, lines in lists.items()),
    ]


def listed_files(folder: Path) -> list[Path]:
    root = folder / TREE
    sounds(root, "x/a.wav", "b, c.wav", 'd "e".wav')
    rows = 'a,x/a.wav,dog,train,1,g\nb,"b, c.wav",cat,valid,2,g\nü,"d ""e"".wav",ключ;dog,test,1,h\n'
    return [write(root / "list.csv", f"clip_id,path,labels,split,fold,group\n{rows}")]


def read_layout(name: str) -> Callable[[Path, Path], None]:
    def read(path: Path, good: Path) -> None:
        missing = ("refuse", "leave-out")[len(path.read_bytes()) % 2]
        tree = in_its_place(path, good)
        clips, _ = read_task(get_task(name), tree / "list.csv" if name == "manifest" else tree, missing)
        check_clips(clips, tree)

    return read


def check_clips(clips: TaskClips, tree: Path) -> None:
    """A list has no checksum: what is accepted is unique, printable, inside its folder and of known classes."""
    ids = clips.clip_ids
    need(len(set(ids)) == len(ids) > 0 and all(problem_of(clip_id) is None for clip_id in ids), "ids unfit for use")
    need(all(name.strip() and name.encode() for name in clips.class_names), "classes without a name")
    targets, mask = clips.targets(range(len(clips))), clips.mask(range(len(clips)))
    need(targets.shape == mask.shape == (len(ids), len(clips.class_names)), "targets of another shape")
    need(not targets[~mask].any(), "a label that is not known")
    for clip in clips.clips:
        inside = os.path.normpath(clip.path)
        need(inside.startswith(f"{tree}{os.sep}"), f"a path that leads out: {clip.path}")
        need(clip.path.is_file(), "a file that is not there")
        need(clip.split in (None, "train", "valid", "test"), "a split of another name")
        need(clip.fold is None or type(clip.fold) is int, "a fold that is no number")
        json.dumps([clip.group, clip.device, *clip.labels], ensure_ascii=False).encode()
    _ = clips.fingerprint


# -- Names of files ----------------------------------------------------------------------------------------------------


def names_files(folder: Path) -> list[Path]:
    """A file a line; read into a folder."""
    names = "dog/a.wav\ndog/deep/b c.flac\ncat/ü.mp3\ncat/d.WAV\nhen/e.ogg\nhen/notes.txt\nYabcdefghijk_30.000.wav\n"
    names += "Yabcdefghijk.wav\n-bcdefghijk_1_2.wav\nhen/.hidden.wav\n"
    return [write(folder / NAMES_FILE, names)]


def change_names(path: Path, draws: np.random.Generator) -> None:
    """Some names get bytes, letters or parts that hardly anybody expects."""
    lines = path.read_bytes().split(b"\n")
    odd = [text.encode() for text in ODD_TEXTS] + [
        b"\xff",
        b"\xc3\x28",
        b"y" * 240,
        b"\x7f",
        b"\xed\xa0\x80",
        b"-rf",
        b"~",
    ]
    for _ in range(int(draws.integers(1, 5))):
        line = int(draws.integers(len(lines)))
        place = int(draws.integers(len(lines[line]) + 1))
        lines[line] = lines[line][:place] + odd[int(draws.integers(len(odd)))] + lines[line][place:]
    path.write_bytes(b"\n".join(lines))


def read_names(path: Path, good: Path) -> None:
    """A folder with such files, as `kd finetune --task folder`, `kd pack` and the search for AudioSet's files read it."""
    root = os.fsencode(path.parent / TREE)
    made = set()
    for name in path.read_bytes().split(b"\n"):
        parts = [part for part in name.split(b"/") if part]
        if not parts or b"\0" in name or {b".", b".."} & set(parts):
            continue
        file = os.path.join(root, *parts)
        try:
            os.makedirs(os.path.dirname(file), exist_ok=True)
            with open(file, "wb") as opened:
                opened.write(b"x")
        except OSError:  # no name of a file
            continue
        made.add(os.fsdecode(b"/".join(parts)))
    tree = path.parent / TREE
    tree.mkdir(exist_ok=True)
    found = index_audio(tree, AUDIO_SUFFIXES)
    listed = [name for names in found.files.values() for name in names]
    need(len(set(listed)) == len(listed) and set(listed) | set(found.ignored) <= made, "files that are not there")
    refusals = []
    for read in (lambda: check_source(read_listing(tree, "folders"), tree, made), lambda: check_folder(tree, made)):
        try:
            read()
        except ValueError as error:
            need(str(tree) in str(error), f"refused without a name: {error}")
            refusals.append(error)
    if refusals:
        raise refusals[0]


def sounding(made: set[str]) -> set[str]:
    """Those that are audio in a class's folder, and not hidden."""
    parts_of = {name: name.split("/") for name in made}
    return {
        name
        for name, parts in parts_of.items()
        if len(parts) > 1
        and Path(name).suffix.lower() in AUDIO_SUFFIXES
        and not any(part.startswith(".") for part in parts)
    }


def check_folder(tree: Path, made: set[str]) -> None:
    clips, _ = read_task(get_task("folder"), tree)
    check_clips(clips, tree)
    need({clip.source for clip in clips.clips} == sounding(made), "clips are lost")


def check_source(source: Listing, tree: Path, made: set[str] | None = None) -> None:
    ids = [clip.clip_id for clip in source.clips]
    need(len(set(ids)) == len(ids) > 0 and all(problem_of(clip_id) is None for clip_id in ids), "ids unfit for use")
    found = {clip.source for clip in source.clips} | {name for name, _ in source.unusable}
    need(made is None or found == sounding(made), "clips are lost")
    for clip in source.clips:
        need(os.path.normpath(clip.path).startswith(f"{tree}{os.sep}"), "a path that leads out")
        need(set(clip.labels) <= set(source.class_names), "labels of no class")
        json.dumps([clip.split, clip.group, *clip.labels], ensure_ascii=False).encode()
        need(clip.seconds is None or 0 < clip.seconds < float("inf"), f"a clip of {clip.seconds} s")


# -- AudioSet ----------------------------------------------------------------------------------------------------------


def audioset_files(folder: Path) -> list[Path]:
    root = folder / TREE
    ids = ["--aaaaaaaaa", "abcdefghijk", "_9-_9-_9-_9", "zzzzzzzzzzz"]
    sounds(root / "audio", f"Y{ids[0]}.wav", f"{ids[1]}_30.000.wav", f"Y{ids[2]}_0_10000.flac")
    comments = (
        "# Segments csv created Sun Mar  5 10:54:25 2017\n# num_ytids=4\n# YTID, start_seconds, end_seconds, labels\n"
    )
    labels = ['"/m/09x0r"', '"/m/09x0r,/m/05zppz"', '"/t/dd00003"', '"/m/05zppz"']
    rows = [f"{clip}, {30 * (n == 1)}.000, {30 * (n == 1) + 10}.000, {labels[n]}" for n, clip in enumerate(ids)]
    classes = '0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n2,/t/dd00003,"ключ"\n'
    return [
        write(root / "balanced_train_segments.csv", comments + "\n".join(rows[:3]) + "\n"),
        write(root / "eval_segments.csv", comments + rows[3] + "\n"),
        write(root / "class_labels_indices.csv", f"index,mid,display_name\n{classes}"),
    ]


def read_audioset_lists(path: Path, good: Path) -> None:
    tree = in_its_place(path, good)
    source = read_listing(tree, audio_root=tree / "audio")
    check_source(source, tree)
    need(len(set(source.class_names)) == len(source.class_names), "classes that are not unique")


# -- Joined stores -----------------------------------------------------------------------------------------------------


def joined_files(folder: Path) -> list[Path]:
    """Two clip stores with other clips, and a teacher's logits for each."""
    root = folder / TREE
    root.mkdir()
    for number, name in enumerate(("one", "two")):
        records = [
            ClipRecord(f"{name} {i}", to_pcm16(noise(i + 10 * number)), CLASSES[i % 3 : i % 3 + 1]) for i in range(3)
        ]
        write_clip_store(root / f"{name}.h5", records, CLASSES, audio_kind="pcm16", sample_rate_hz=RATE)
        clips = ClipStore.open(root / f"{name}.h5")
        write_logit_store(
            root / f"{name}-logits.h5",
            clip_ids=clips.clip_ids,
            audio_digests=clips.audio_digests(np.arange(3)),
            logit_blocks=[generator(5, "fuzz joined", 0, number).standard_normal((3, 3)).astype(np.float16)],
            class_names=CLASSES,
            teacher={"name": "t", "fingerprint": "0" * 32, "link": "sigmoid"},
            clip_store_fingerprint=clips.fingerprint,
        )
    return [root / "two.h5", root / "two-logits.h5", root / "one.h5"]


def read_joined(path: Path, good: Path) -> None:
    """All that is accepted equals what was written, apart from audio that is told to have changed."""
    tree, original = in_its_place(path, good), good.parent
    clips, expected = (JoinedClips.open([root / "one.h5", root / "two.h5"]) for root in (tree, original))
    rows = np.arange(len(expected))
    need(clips.class_names == expected.class_names and clips.clip_ids == expected.clip_ids, "other clips or classes")
    need(np.array_equal(clips.targets(rows), expected.targets(rows)), "other targets")
    need(np.array_equal(clips.rows(expected.clip_ids[::-1]), rows[::-1]), "ids lead to other rows")
    ensemble = LogitEnsemble.open([f"{tree / 'one-logits.h5'}+{tree / 'two-logits.h5'}"])
    verify(VerifyConfig(logits=(ensemble.stores[0].path,), clips=(tree / "one.h5", tree / "two.h5")))
    ensemble.check_against(clips)
    reference = LogitEnsemble.open([f"{original / 'one-logits.h5'}+{original / 'two-logits.h5'}"])
    need(np.array_equal(ensemble.read(clips.clip_ids)[0], reference.read(clips.clip_ids)[0]), "other logits")


TARGETS = {
    "esc50": Target(esc50_files, read_layout("esc50"), 4, change=change_content),
    "fsd50k": Target(fsd50k_files, read_layout("fsd50k"), 6, change=change_content),
    "openmic": Target(openmic_files, read_layout("openmic"), 6, change=change_content),
    "dcase20": Target(dcase20_files, read_layout("dcase20"), 5, change=change_content),
    "own list": Target(listed_files, read_layout("manifest"), 4, change=change_content),
    "names of files": Target(names_files, read_names, 4, change=change_names),
    "audioset": Target(audioset_files, read_audioset_lists, 5, change=change_content),
    "joined stores": Target(joined_files, read_joined, 4, change=change_content),
}
