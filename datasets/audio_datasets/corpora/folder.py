"""The user's own sounds in a folder with one sub-folder per class, or with a folder per split and classes in each."""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from audio_datasets.stores.names import normal
from audio_datasets.system.messages import listed
from audio_datasets.tasks.audio_files import FolderWalk, is_audio, passed_over_by_kind
from audio_datasets.tasks.listing import Clip, Listing
from audio_datasets.tasks.own_sounds import (
    NONE_OF_THEM,
    UNKNOWN_LABELS,
    for_training,
    is_split,
    note_on_unlabelled,
    splits_among,
)
from audio_datasets.tasks.task import Task

_ISO_639_1 = (
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo es et eu"
    " fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka kg ki kj kk kl km"
    " kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om"
    " or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta te tg th ti tk tl tn to tr"
    " ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu"
)
LANGUAGES = frozenset(_ISO_639_1.split())
_LANGUAGE = re.compile(r"([a-z]{2})([-_][A-Za-z]{2,4})?")
UNLABELLED_FOLDERS = ("unlabelled", "unlabeled", UNKNOWN_LABELS)
"""Sub-folders with clips whose labels are unknown."""
EXAMPLE = "dog/one.wav, dog/two.wav, rain/three.wav"


@dataclass(frozen=True)
class ClassFolder:
    """A class folder and its files."""

    path: str
    """Relative to the corpus, as ``dog`` or ``train/dog``."""
    files: tuple[str, ...]
    split: str | None

    @property
    def class_name(self) -> str | None:
        """The class of its clips; None if the folder says that they have none, or that it is unknown."""
        name = normal(self.path.rpartition("/")[2])
        return None if name == NONE_OF_THEM or name in UNLABELLED_FOLDERS else name

    def clips(self, root: Path) -> list[Clip]:
        is_unlabelled = self.path.rpartition("/")[2] in UNLABELLED_FOLDERS
        says = {
            "labels": () if self.class_name is None else (self.class_name,),
            "known": () if is_unlabelled else None,
            "split": self.split,
        }
        return [Clip(clip_id=name, path=root / name, source=name, **says) for name in self.audio]

    @property
    def audio(self) -> list[str]:
        return [name for name in self.files if is_audio(name)]


def read(folder: Path) -> Listing:
    """One sub-folder per class, named like it, with audio files at any depth. Clip ids are paths relative to ``folder``.

    If all folders are named like splits (train, valid, test and the like) and contain folders, they are splits, and the
    folders inside are the classes. A folder called ``unlabelled`` holds clips whose labels are unknown, one called ``(none)`` clips that
    have none of the classes. Symbolic links are followed.

    Raises:
        ValueError: no folder, or no audio in folders of classes.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    walk = FolderWalk(folder)
    top, beside = walk.entries()
    split_of = _splits(walk, top)
    class_folders = []
    for name in top:
        inside = [name]
        if split_of and name not in UNLABELLED_FOLDERS:
            inside, stray = walk.entries(name)
            beside += stray
        class_folders += [ClassFolder(path, tuple(walk.files(path)), split_of.get(name)) for path in inside]
    clips = [clip for found in class_folders for clip in found.clips(folder)]
    clips.sort(key=lambda clip: clip.source.split("/"))
    ignored = [*beside, *(name for found in class_folders for name in found.files if not is_audio(name))]
    if not clips and not walk.unusable:
        raise ValueError(_no_clips(folder, beside, ignored))
    notes = [*_about_splits(split_of, class_folders), *_about_folders(class_folders, walk)]
    listing = Listing(
        tuple(sorted({label for clip in clips for label in clip.labels})),
        tuple(clips),
        layout="split folders" if split_of else "folders",
        notes=tuple(notes if split_of else [*notes, *_about_class_names(class_folders)]),
        ignored=tuple(sorted(ignored)),
        unusable=tuple(_matters(walk)),
    )
    return replace(listing, notes=(*listing.notes, *note_on_unlabelled(listing)))


def _splits(walk: FolderWalk, top: list[str]) -> dict[str, str]:
    """The split of each folder at the top; none if they are not all called like splits, or hold most of their audio themselves.

    Clips without labels, in a folder of their own, can only be trained on.
    """
    unlabelled = [name for name in top if name in UNLABELLED_FOLDERS]
    named = [name for name in top if name not in unlabelled]
    if not named or not all(map(is_split, named)):
        return {}
    inside = [walk.entries(name) for name in named]
    direct = sum(is_audio(name) for _, files in inside for name in files)
    deeper = sum(
        is_audio(name) for folders, _ in inside for folder in folders for name in FolderWalk(walk.root).files(folder)
    )
    return splits_among(named) | dict.fromkeys(unlabelled, "train") if deeper > direct else {}


def _matters(walk: FolderWalk) -> list[tuple[str, str]]:
    """What cannot be reached and may have held clips: not a link called like some other kind of file inside a class."""
    return [
        (name, reason)
        for name, reason in sorted(walk.unusable.items())
        if is_audio(name) or "/" not in name or not Path(name).suffix
    ]


def _no_clips(folder: Path, beside: list[str], ignored: list[str]) -> str:
    audio = [name for name in beside if is_audio(name)]
    if not audio:
        found = f"; found {passed_over_by_kind(ignored)}" if ignored else ""
        return f"{folder} has no audio files in folders named like classes (as {EXAMPLE}){found}"
    text = (
        f"{folder} holds {len(audio):,} audio files side by side, and no folders that say which class they have; put each class's "
        f"files in a folder named like the class (as {EXAMPLE})"
    )
    lists = [name for name in beside if name.lower().endswith((".csv", ".parquet"))]
    if lists:
        return f"{text}, or give the list itself if it has the columns clip_id, path, labels: {folder / lists[0]}"
    return f"{text}, or give a CSV file with the columns clip_id, path, labels"


def _about_splits(split_of: dict[str, str], class_folders: list[ClassFolder]) -> list[str]:
    """What was taken for splits, and classes that only some of them have."""
    if not split_of:
        return []
    clips = Counter(found.split for found in class_folders for _ in found.audio)
    told = [
        "the folders at the top are splits, and the folders inside are classes: "
        + ", ".join(f"{name!r} is {split}" for name, split in split_of.items())
        + f" ({', '.join(f'{clips[split]:,} clips in {split}' for split in dict.fromkeys(split_of.values()))})"
    ]
    classes = {
        split: {f.class_name for f in class_folders if f.split == split and f.audio} - {None}
        for split in split_of.values()
    }
    every = set().union(*classes.values())
    for split, names in classes.items():
        if absent := sorted(every - names):
            told.append(f"no clips in {split} of {len(absent)} of {len(every)} classes: {listed(absent, limit=5)}")
    return told


def _about_folders(class_folders: list[ClassFolder], walk: FolderWalk) -> list[str]:
    told = []
    if empty := [found.path for found in class_folders if not found.audio]:
        told.append(f"{len(empty)} folder{'s' * (len(empty) > 1)} without audio: {listed(empty)}")
    return told + walk.notes()


def _about_class_names(class_folders: list[ClassFolder]) -> list[str]:
    """Warnings that the folders at the top may be something other than classes."""
    folders = [found for found in class_folders if found.audio and found.class_name is not None]
    names = [found.path for found in folders]
    told = []
    if len(splits := [name for name in names if is_split(name)]) > 1:
        told.append(
            f"warning: {listed(splits)} are taken as classes, and look like splits; splits hold a folder per class"
        )
    languages = [match and match[1] in LANGUAGES for match in map(_LANGUAGE.fullmatch, names)]
    if len(names) > 1 and all(languages):
        told.append(f"warning: {listed(names)} are taken as classes, and look like languages")
    holders = Counter(
        inner for found in folders for inner in {name.split("/")[1] for name in found.audio if name.count("/") > 1}
    )
    shared = sorted(inner for inner, count in holders.items() if count > 1)
    if shared and all(name.count("/") > 1 for found in folders for name in found.audio):
        told.append(
            f"warning: {listed(names, limit=5)} are taken as classes, and hold folders of the same names ({listed(shared, limit=5)}); if "
            "those are the classes, put them at the top, or list the files in a CSV file with the columns clip_id, path, labels"
        )
    return told


def _may_hold_classes(path: Path) -> bool:
    if not path.is_dir():
        return False
    folders, files = FolderWalk(path).entries()
    return bool(folders) or any(map(is_audio, files))


FOLDER = Task(
    name="folder",
    title="own sounds, a folder per class",
    source="your own recordings",
    licence="yours",
    layout="a folder with one sub-folder per class, and audio files of any rate and length in each (a sub-folder called "
    "unlabelled: clips with unknown labels); or folders called train, valid and test that hold such sub-folders",
    read=read,
    recognises=_may_hold_classes,
    is_fallback=True,
    for_training=for_training,
)
