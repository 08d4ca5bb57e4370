"""onnxruntime-web, the runtime of the exported page: from a folder or archive of the user's, or through npm."""

import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from audio_datasets.system.messages import brief

PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"
"""What is fetched through npm, and what the page was tested with."""
_MEMBERS = {
    "script": "dist/ort.wasm.min.js",
    "loader": "dist/ort-wasm-simd-threaded.mjs",
    "binary": "dist/ort-wasm-simd-threaded.wasm",
}
_LARGEST_MEMBER = 100_000_000
_HINT = f"the page needs {PACKAGE}: fetch it on any machine with `npm pack {PACKAGE}@{VERSION}`, and name the archive with --onnxruntime-web"


@dataclass(frozen=True)
class OnnxRuntimeWeb:
    """The files of the runtime that a page needs: computing on the processor, in one thread."""

    version: str
    script: str
    """The library, a classic script that defines ``ort``."""
    loader: str
    """The module that starts the binary."""
    binary: bytes
    """WebAssembly."""


def find_onnxruntime_web(given: Path | None) -> OnnxRuntimeWeb:
    """From ``given``, a folder or an archive that `npm pack` wrote; if it is None, through npm.

    Raises ValueError if it is something else, or cannot be fetched.
    """
    if given is None:
        return _through_npm()
    if given.is_dir():
        for folder in (given, given / PACKAGE, given / "node_modules" / PACKAGE, given / "package"):
            if (folder / "package.json").is_file() and (folder / _MEMBERS["binary"]).is_file():
                return _read(lambda name, folder=folder: (folder / name).read_bytes(), given)
        raise ValueError(
            f"{given} does not hold {PACKAGE}: there is no package.json with {_MEMBERS['binary']} beside it"
        )
    if not given.is_file():
        raise ValueError(f"no such folder or archive: {given}; {_HINT}")
    return _from_archive(given)


def _from_archive(path: Path) -> OnnxRuntimeWeb:
    try:
        with tarfile.open(path) as archive:

            def member(name: str) -> bytes:
                found = archive.getmember(f"package/{name}")
                if not found.isfile() or found.size > _LARGEST_MEMBER:
                    raise ValueError(f"{path} does not hold {PACKAGE}: {name} is no file, or far too large")
                return archive.extractfile(found).read()

            return _read(member, path)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} is no archive of npm's that can be read: {brief(str(error))}") from error


def _read(member: Callable[[str], bytes], source: Path) -> OnnxRuntimeWeb:
    try:
        package = json.loads(member("package.json"))
        name, version = (package.get("name"), package.get("version")) if isinstance(package, dict) else (None, None)
        if name != PACKAGE or not isinstance(version, str):
            raise ValueError(f"{source} holds the package {brief(name)}; expected {PACKAGE}")
        script, loader, binary = (member(_MEMBERS[part]) for part in ("script", "loader", "binary"))
        return OnnxRuntimeWeb(version, script.decode(), loader.decode(), binary)
    except (KeyError, FileNotFoundError) as error:
        raise ValueError(f"{source} is not a {PACKAGE} that can be used: {brief(str(error))}; {_HINT}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{source} is damaged: {brief(str(error))}") from error


def _through_npm() -> OnnxRuntimeWeb:
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"{_HINT} (npm is not installed here)")
    print(f"fetching {PACKAGE} {VERSION} through npm (33 MB; npm keeps a copy for the next time)")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--silent", "--prefer-offline", f"{PACKAGE}@{VERSION}", "--pack-destination", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"npm did not fetch {PACKAGE} within ten minutes; {_HINT}") from error
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            raise ValueError(f"npm cannot fetch {PACKAGE} ({brief(done.stderr.strip(), 200)}); {_HINT}")
        return _from_archive(archives[0])
