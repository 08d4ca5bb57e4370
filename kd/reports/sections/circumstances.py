"""Sections on how the run was made: the student, the command, the versions and the settings."""

from kd.reports.document import Block, Code, Facts, Section, Table, Text
from kd.reports.run_reader import RunFolder, flat_settings, is_number
from kd.reports.sections.cost import Cost, student_cost
from kd.reports.sections.wording import beginning


def circumstance_sections(run: RunFolder) -> list[Section]:
    """The student if one is saved, the command and library versions, and the settings."""
    sections = []
    cost = student_cost(run)
    if cost is not None:
        sections.append(Section("Student", (student_facts(run, cost),)))
    blocks: list[Block] = [Code(run.command) if run.command else Text("The command of this run was not recorded.")]
    if run.versions:
        blocks.append(Facts(tuple(run.versions.items())))
    sections.append(Section("Command and versions", tuple(blocks)))
    settings = Table(
        ("setting", "value"), tuple(flat_settings(run.config).items()), "Every setting of the run", folded=True
    )
    return [*sections, Section("Configuration", (settings,))]


def training_clips(run: RunFolder) -> list[tuple[str, str]]:
    """How many clips each part was trained on, with labels and without; nothing where the run did not record it."""
    counts = []
    for part in run.parts:
        found = part.card.provenance.get("training_clips") if part.card is not None else None
        if isinstance(found, dict) and all(is_number(found.get(kind)) for kind in ("labelled", "unlabelled")):
            counts.append((found["labelled"], found["unlabelled"]))
    if not counts:
        return []
    spans = [
        f"{min(kind):,}" if min(kind) == max(kind) else f"{min(kind):,} to {max(kind):,}"
        for kind in zip(*counts, strict=True)
    ]
    return [("training clips", f"{spans[0]} with labels, {spans[1]} without")]


def student_facts(run: RunFolder, cost: Cost) -> Facts:
    """The student's name, options, initial weights and cost."""
    config = run.card.config
    options = ", ".join(f"{name}={value}" for name, value in config.options.items()) or "none"
    macs = f"{cost.macs:,} for {cost.n_mels} mels × {cost.frames} frames ({cost.clip_seconds:g} s)"
    return Facts(
        (
            ("student", config.name),
            ("options", options),
            ("initial weights", beginning(run)),
            *training_clips(run),
            ("parameters", f"{cost.parameters:,}"),
            ("multiply-accumulates", macs),
            ("peak memory of feature maps", f"{cost.activation_bytes / 1e6:.1f} MB (float32, one clip at a time)"),
            ("weights on disk", f"{cost.file_bytes / 1e6:.2f} MB"),
        )
    )
