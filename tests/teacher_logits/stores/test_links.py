"""Links: what turns a teacher's logits into probabilities, in stores, ensembles and objectives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

from teacher_logits.store import LogitStore, to_float16, write_logit_store
from teacher_logits.stores.ensemble import LogitEnsemble
from teacher_logits.stores.links import TeacherLink, link_of_classes

CLASSES = ("cut", "wash", "open", "click", "hiss")
LOGITS = np.array([[4.0, 1.0, -2.0, 0.5, -3.0], [300.0, -300.0, 2.0, 8.0, 9.0]], np.float32)
GROUPS = TeacherLink.of_runs([("softmax", 3), ("sigmoid", 1), ("sigmoid", 1)])


def write(path: Path, link: object = None, logits: np.ndarray = LOGITS) -> Path:
    write_logit_store(
        path,
        clip_ids=["x", "y"],
        audio_digests=np.zeros((2, 16), np.uint8),
        logit_blocks=[to_float16(logits, ["x", "y"])],
        class_names=CLASSES,
        teacher={"name": path.stem, "fingerprint": path.stem} | ({} if link is None else {"link": link}),
        clip_store_fingerprint="clips",
    )
    return path


def by_scipy(link: TeacherLink, logits: np.ndarray) -> np.ndarray:
    """The same with scipy, in double precision."""
    if link == GROUPS:
        return np.concatenate(
            [softmax(logits[:, :3].astype(float), axis=1), expit(logits[:, 3:].astype(float))], axis=1
        )
    return expit(logits.astype(float)) if link.kinds == ("sigmoid",) else softmax(logits.astype(float), axis=1)


LINKS = {"sigmoid": TeacherLink.whole("sigmoid", 5), "softmax": TeacherLink.whole("softmax", 5), "groups": GROUPS}


@pytest.mark.parametrize("name", LINKS)
def test_probabilities_are_those_of_the_link(name: str) -> None:
    link = LINKS[name]
    found = link.probabilities(torch.from_numpy(LOGITS), 2.0)
    np.testing.assert_allclose(found, by_scipy(link, LOGITS / 2), rtol=1e-5, atol=1e-7)
    yes, no = link.odds(LOGITS)
    np.testing.assert_allclose(yes, by_scipy(link, LOGITS), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(yes + no, 1.0)
    assert (np.minimum(yes, no) > 0).all()
    again = link.probabilities(torch.from_numpy(link.logits_of(yes, no)))
    np.testing.assert_allclose(again, by_scipy(link, LOGITS), rtol=1e-5, atol=1e-7)
    assert TeacherLink.from_json(link.to_json(), 5) == link
    assert {"sigmoid": "sigmoid", "softmax": "softmax", "groups": [["softmax", 3], ["sigmoid", 2]]}[
        name
    ] == link.to_json()


@pytest.mark.parametrize(
    "content", ["relu", 3, [["softmax", 3]], [["softmax", 3], ["tanh", 2]], [["softmax", 0], ["sigmoid", 5]], [[]]]
)
def test_another_link_is_refused(content: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='a teacher\'s link is "sigmoid", "softmax", or a list'):
        TeacherLink.from_json(content, 5)
    with pytest.raises(ValueError, match=r"a\.h5 is a damaged logit store: a teacher's link"):
        LogitStore.open(write(tmp_path / "a.h5", content))


def test_audiosets_classes_are_read_through_a_sigmoid(reference_dir: Path) -> None:
    from audio_datasets.stores.class_lists import read_class_names

    (path,) = (reference_dir / "data" / "labels").glob("*class_labels_indices*.csv")
    assert link_of_classes(read_class_names(path)) == "sigmoid"
    assert link_of_classes(CLASSES) is None


def test_a_store_records_its_link_and_an_older_one_is_told(tmp_path: Path) -> None:
    new, old = write(tmp_path / "new.h5", "softmax"), write(tmp_path / "old.h5")
    assert LogitStore.open(new).link == LINKS["softmax"]
    assert LogitStore.open(old).link is None
    assert LogitEnsemble.open([new]).link == LINKS["softmax"]
    assert LogitEnsemble.open([old]).link is None
    assert LogitEnsemble.open([old]).without_link == [str(old)]
    assert LogitEnsemble.open([old], told="softmax").link == LINKS["softmax"]
    with pytest.raises(ValueError, match="new.h5 records that its teacher's link is softmax, not sigmoid"):
        LogitEnsemble.open([old, new], told="sigmoid")


def test_the_mean_of_softmax_teachers_probabilities(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.h5", "softmax"), write(tmp_path / "b.h5", "softmax", LOGITS[::-1].copy())
    ensemble = LogitEnsemble.open([f"{a}:3", b], "probabilities")
    read, _ = ensemble.read(["x", "y"])
    expected = 0.75 * softmax(LOGITS.astype(float), axis=1) + 0.25 * softmax(LOGITS[::-1].astype(float), axis=1)
    np.testing.assert_allclose(ensemble.link.probabilities(torch.from_numpy(read)), expected, rtol=1e-3, atol=1e-6)


def test_teachers_with_different_links_have_a_mean_of_probabilities_alone(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.h5", "softmax"), write(tmp_path / "b.h5", "sigmoid")
    with pytest.raises(
        ValueError, match=r"different links cannot be averaged: .*a\.h5 has softmax, .*b\.h5 has sigmoid"
    ):
        LogitEnsemble.open([a, b]).link  # noqa: B018
    ensemble = LogitEnsemble.open([a, b], "probabilities")
    read, _ = ensemble.read(["x", "y"])
    assert ensemble.link == LINKS["sigmoid"]
    expected = (softmax(LOGITS.astype(float), axis=1) + expit(LOGITS.astype(float))) / 2
    np.testing.assert_allclose(expit(read.astype(float)), expected, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match=r"c\.h5' does not record whether .* Say so with --teacher-link"):
        LogitEnsemble.open([a, write(tmp_path / "c.h5")], "probabilities").read(["x"])
