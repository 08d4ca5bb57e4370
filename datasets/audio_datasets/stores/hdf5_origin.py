"""An HDF5 file may name other files of the disk as the source of its data. Nothing is read from such a file."""

from pathlib import Path

import h5py


def require_own_content(path: Path, file: h5py.File) -> None:
    """Checks that every dataset directly in an HDF5 file lies in that file, without opening any other.

    HDF5 would follow an external link, external storage or the sources of a virtual dataset: with the file of a stranger, bytes
    from anywhere on the disk would become clips or ids, and a pipe would be waited for.

    Raises:
        ValueError: a link that leads out of the file or to a place inside it, external storage, or a virtual dataset.
    """
    for name in file:
        try:
            link = file.get(name, getlink=True)
        except TypeError:
            raise ValueError(f"{path}: {name!r} is a link of an unknown kind") from None
        if isinstance(link, h5py.ExternalLink):
            raise ValueError(f"{path}: {name!r} is a link to another file ({link.filename!r}), which is not followed")
        if not isinstance(link, h5py.HardLink):
            raise ValueError(
                f"{path}: {name!r} is a symbolic link, which is not followed; store the dataset under this name"
            )
        found = h5py.h5o.open(file.id, name.encode())
        if isinstance(found, h5py.h5d.DatasetID):
            _require_own_storage(path, name, found.get_create_plist())


def _require_own_storage(path: Path, name: str, properties: h5py.h5p.PropDCID) -> None:
    if properties.get_layout() == h5py.h5d.VIRTUAL:
        raise ValueError(
            f"{path}: {name!r} is a virtual dataset, whose data lie in other files; only a file's own data are read"
        )
    if properties.get_external_count():
        source = properties.get_external(0)[0].decode("utf-8", errors="backslashreplace")
        raise ValueError(f"{path}: the data of {name!r} lie in another file ({source!r}), which is not read")
