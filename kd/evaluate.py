"""Evaluates a run folder, a checkpoint or any teacher on a clip store: mAP, ROC AUC, d′ and a table of classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from audio_datasets.audio.bad_clips import OnBadClip, summary
from audio_datasets.command_line.help_pages import HelpGroups
from audio_datasets.stores.class_lists import read_class_names, read_label_map
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.manifest import select_rows
from audio_datasets.system.command import parse, run_command
from audio_datasets.system.files import write_json
from audio_datasets.system.paths.outputs import Output, check_outputs, json_with
from kd.data.sampling import labelled_rows
from kd.data.windows import EvaluationWindows, Window
from kd.evaluation.baselines import beside, category_baseline
from kd.evaluation.metrics import TaggingMetrics, category_accuracy, category_columns, tagging_metrics
from kd.evaluation.predict import ClipEvaluator, class_table, listed_absent
from kd.training.threads import leave_a_core_to_the_workers
from teacher_logits.processes import start_accelerator
from teacher_logits.teachers.base import Teacher
from teacher_logits.teachers.class_mapping import MappedTeacher, read_class_map, with_classes_of_clips
from teacher_logits.teachers.loaders import knows_its_classes, load_teacher
from teacher_logits.teachers.run_ensemble import trained_on_by_any


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a tagger on a clip store."""

    help_groups: ClassVar[HelpGroups] = {
        "Tagger and clips": ("tagger", "clips", "split", "folds"),
        "Classes": ("class_names", "tagger_class_names", "class_map", "label_map"),
    }

    tagger: str
    """A run folder, NAME@WEIGHTS (such as mn04@mn04_as_mAP_432.pt), FILE.onnx, ast:FOLDER_OR_NAME or module:function."""
    clips: Path
    """Clip store to evaluate on."""
    split: str | None = None
    """Only the clips of this split of the store's manifest."""
    folds: tuple[int, ...] = ()
    """Only the clips of these folds."""
    class_names: Path | None = None
    """Class list for weights or clip stores without one (AudioSet's class_labels_indices.csv, or one name per line)."""
    tagger_class_names: Path | None = None
    """Class list of a tagger that has none of its own, if it differs from the clips' (see --class-map)."""
    class_map: Path | None = None
    """CSV file (columns teacher_class, class) that maps the tagger's classes to those of the clips. A class of the clips gets the
    maximum over the tagger's classes that are mapped to it."""
    label_map: str | None = None
    """Also report category accuracy: choose the manifest's category whose class names score highest. A map's file or name
    (esc50_to_audioset)."""
    clip_seconds: float | None = None
    """Only hear the first seconds of each clip, in one window. Default: the whole clip, in windows of the tagger's length, whose
    logits are averaged."""
    batch_size: int = 32
    """Windows in a batch of one process."""
    workers: int = 2
    """Data-loading processes for each process."""
    on_bad_clip: OnBadClip = "refuse"
    """A clip that cannot be decoded: refuse stops and names it; skip leaves it out and lists it."""
    out: Path | None = None
    """Write the results as JSON to this file."""
    overwrite: bool = False
    """Let --out replace a file that holds something else than results of kd evaluate."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0:
            raise ValueError(
                f"batch_size must be at least 1 and workers at least 0; found {self.batch_size}, {self.workers}"
            )


def evaluate(config: EvaluateConfig) -> dict:
    """Runs the evaluation, prints the results on the main process, and returns them.

    Raises:
        ValueError: files that are missing or of another kind, class lists that differ, clips without labels.
    """
    if config.out is not None:
        check_outputs(config, [results_file(config)], config.overwrite)
    torch.set_flush_denormal(True)
    accelerator = start_accelerator()
    leave_a_core_to_the_workers(accelerator)
    clips, tagger = open_inputs(config)
    rows, without = labelled_rows(clips, select_rows(clips, split=config.split, folds=config.folds or None))
    if without:
        accelerator.print(f"{without} of {len(rows) + without} clips have no labels and are not evaluated")
    seen = clips.find(sorted(trained_on_by_any(config.tagger)))
    if trained_on := int(np.isin(rows, seen).sum()):
        accelerator.print(
            f"warning: {config.tagger} was trained on {trained_on} of these {len(rows)} clips, so the metrics are too good"
        )
    categories, columns = [], {}
    if config.label_map is not None:
        categories = manifest_categories(clips, rows)
        columns = category_columns(clips.class_names, categories, read_label_map(config.label_map))

    tagger = tagger.to(accelerator.device).eval()
    evaluator = ClipEvaluator(
        accelerator,
        clips,
        rows,
        Window(tagger.sample_rate_hz, config.clip_seconds or tagger.clip_seconds, tagger.short_clips),
        batch_size=config.batch_size,
        workers=config.workers,
        description="evaluate",
        on_bad_clip=config.on_bad_clip,
        whole_clips=config.clip_seconds is None,
    )
    logits = evaluator.predict(tagger)
    skipped = evaluator.skipped
    if skipped:
        heard = ~np.isnan(logits).any(axis=1)
        if not heard.any():
            raise ValueError(f"{summary(skipped, len(rows), 'cannot be used')}; no clip is left")
        rows, logits = rows[heard], logits[heard]
        categories = [category for category, kept in zip(categories, heard, strict=False) if kept]
    metrics = tagging_metrics(clips.targets(rows), logits, clips.class_names, clips.mask(rows))
    results = as_results(config, clips, len(rows), metrics, skipped)
    results["num_windows"] = len(evaluator.windows)
    results["unheard_seconds"] = evaluator.windows.heard.unheard_seconds
    results["clips_trained_on"] = trained_on
    if config.label_map is not None:
        results["category_accuracy"] = category_accuracy(logits, categories, columns)
        results["category_baseline"] = category_baseline(categories, len(columns))
    if accelerator.is_main_process:
        print(what_is_heard(evaluator.windows, is_restricted=config.clip_seconds is not None))
        print_results(config, clips, metrics, results)
        if config.out is not None:
            write_json(config.out, results)
    return results


def results_file(config: EvaluateConfig) -> Output:
    """The file of ``--out``."""
    return Output(config.out, json_with("tagger", "clips", "num_clips", "mAP"), "the results of kd evaluate")


def what_is_heard(windows: EvaluationWindows, is_restricted: bool) -> str:
    """One line on how much of the clips was heard."""
    heard, seconds = windows.heard, f"{windows.window.seconds:g} s"
    if is_restricted:
        return f"heard: the first {seconds} of each clip; {str(heard) or 'no clip is longer'}"
    return f"heard: {heard.clips} whole clips, {heard.seconds:,.1f} s, in {len(windows)} windows of {seconds}"


def open_inputs(config: EvaluateConfig) -> tuple[ClipStore, Teacher]:
    """The clip store, and the tagger with the classes of the clips. ValueError for an option that has no effect."""
    class_names = read_class_names(config.class_names) if config.class_names else None
    clips = ClipStore.open(config.clips, class_names=class_names)
    names = read_class_names(config.tagger_class_names) if config.tagger_class_names else clips.class_names
    class_map = read_class_map(config.class_map) if config.class_map else None
    tagger = with_classes_of_clips(load_teacher(config.tagger, names), config.tagger, clips, class_map)
    if config.class_map is not None and not isinstance(tagger, MappedTeacher):
        raise ValueError("--class-map has no effect: the tagger has the classes of the clips; leave it out")
    if config.tagger_class_names is not None and knows_its_classes(config.tagger):
        raise ValueError("--tagger-class-names has no effect: the tagger knows its own classes; leave it out")
    return clips, tagger


def as_results(
    config: EvaluateConfig, clips: ClipStore, num_clips: int, metrics: TaggingMetrics, skipped: dict[str, str]
) -> dict:
    """The results as ``--out`` holds them; classes without a clip are left out."""
    return {
        "tagger": config.tagger,
        "clips": str(config.clips),
        "clips_fingerprint": clips.fingerprint,
        "split": config.split,
        "folds": list(config.folds),
        "clip_seconds": config.clip_seconds,
        "num_clips": num_clips,
        "skipped_clips": skipped,
        **metrics.summary(),
        "classes": {
            name: {"clips": int(count), "average_precision": float(precision), "roc_auc": float(auc)}
            for name, count, precision, auc in zip(
                clips.class_names, metrics.positives, metrics.average_precision, metrics.class_roc_auc, strict=True
            )
            if count
        },
    }


def print_results(config: EvaluateConfig, clips: ClipStore, metrics: TaggingMetrics, results: dict) -> None:
    """Prints the table of classes, the metrics, and how many clips were skipped."""
    num_clips, skipped = results["num_clips"], results["skipped_clips"]
    print(class_table(metrics, clips.class_names))
    print(listed_absent(metrics))
    print(" ".join(f"{name} {value:.4f}" for name, value in metrics.summary().items()), f"({num_clips} clips)")
    if "category_accuracy" in results:
        level = beside(results["category_baseline"])
        print(f"category accuracy {results['category_accuracy']:.4f} ({level}; map: {config.label_map})")
    if skipped:
        print(summary(skipped, num_clips + len(skipped), "skipped"))


def manifest_categories(clips: ClipStore, rows) -> list[str]:
    """The one label that each clip had before a label map was applied, from the manifest.

    Raises:
        ValueError: no manifest, or a clip with more or fewer than one such label.
    """
    manifest = clips.manifest(["source_labels"])
    if manifest is None:
        raise ValueError(f"{clips.path} has no manifest beside it, so its clips' categories are not known")
    labels = manifest.column("source_labels").to_pylist()
    for row in rows:
        if labels[row] is None or len(labels[row]) != 1:
            raise ValueError(
                f"--label-map needs clips with exactly one category; clip {clips.clip_id(int(row))!r} has {labels[row]}"
            )
    return [labels[row][0] for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: evaluate(parse(EvaluateConfig, arguments, "kd evaluate")))


if __name__ == "__main__":
    raise SystemExit(main())
