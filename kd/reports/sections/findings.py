"""Everything that was measured, as sections."""

from kd.reports.document import Section, Text
from kd.reports.run_reader import RunFolder
from kd.reports.sections.devices import device_sections
from kd.reports.sections.multi_label import multi_label_sections
from kd.reports.sections.single_label import single_label_sections
from kd.reports.sections.training import training_sections


def finding_sections(run: RunFolder) -> list[Section]:
    """All sections on measurements. A section without content is left out."""
    sections = [Section("Warnings", tuple(Text(text) for text in run.warnings))] if run.warnings else []
    sections += training_sections(run)
    if not run.predictions:
        text = "There are no predictions of test clips, so results for single classes and clips are not available."
        return [*sections, Section("Classes", (Text(text),))]
    describe = single_label_sections if run.one_label else multi_label_sections
    return [*sections, *describe(run), *device_sections(run)]
