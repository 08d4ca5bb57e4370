"""`kd tag --stream` and `--microphone`: JSON lines, the same from a file and from a pipe; how it ends."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile

from audio_datasets.system.command import INTERRUPTED, STOPPED
from kd.deploy.streaming import tag_stream as streaming
from kd.deploy.streaming.event_stream import StreamSettings
from kd.deploy.tagging.tagger import Tagger
from kd.tag import main

SHORT = ["--window-seconds", "0.5", "--hop-seconds", "0.1", "--min-event-seconds", "0", "--max-gap-seconds", "0"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "sound.wav"
    rng = np.random.default_rng(1)
    loud = np.repeat([0.3, 0.0, 0.02, 0.2], 6000)
    soundfile.write(path, loud[:, None] * rng.standard_normal((24000, 2)).clip(-3, 3), 11025, "PCM_16")
    return path


@pytest.fixture(scope="module")
def command(tiny_run: Path, sound: Path) -> list[str]:
    """With a threshold in the middle of the scores."""
    scores = np.stack([window.scores for window in Tagger.load(tiny_run, window_seconds=0.5)(sound).windows])
    return ["--tagger", str(tiny_run), "--threshold", f"{np.median(scores):.4f}", *SHORT]


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], None]]:
    """Makes bytes the standard input, written into a pipe by a thread."""
    threads = []

    def send(data: bytes) -> None:
        read_end, write_end = os.pipe()

        def write() -> None:
            with os.fdopen(write_end, "wb") as file:
                file.write(data)

        threads.append(threading.Thread(target=write))
        threads[-1].start()
        monkeypatch.setattr(sys, "stdin", os.fdopen(read_end, "r"))

    yield send
    for thread in threads:
        thread.join()


def test_a_pipe_and_a_file_give_the_same_events(
    command: list[str], sound: Path, pipe: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--stream", str(sound), *command]) == 0
    wanted = capsys.readouterr()
    events = [json.loads(line) for line in wanted.out.splitlines()]
    assert len(events) > 2
    assert all(list(event) == ["start", "end", "class", "peak"] for event in events)
    assert f"{len(events)} events in 2.2 s of audio" in wanted.err
    pipe(sound.read_bytes())
    assert main(["--stream", "-", *command]) == 0
    assert capsys.readouterr().out == wanted.out
    pipe(sound.read_bytes()[44:-1])
    assert main(["--stream", "-", "--sample-rate-hz", "11025", "--channels", "2", *command]) == 0
    cut = capsys.readouterr()
    assert "the stream ends in the middle of a sample: 3 of 4 bytes are left out" in cut.err
    assert cut.out.splitlines()[:-3] == wanted.out.splitlines()[:-3]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, STOPPED), (signal.SIGINT, INTERRUPTED)])
def test_a_signal_ends_a_stream_with_the_events_so_far(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    """The source never ends by itself."""

    class Endless:
        sample_rate_hz = 16000

        def chunks(self) -> Iterator[np.ndarray]:
            yield 0.3 * np.random.default_rng(0).standard_normal(16000).astype(np.float32)
            signal.raise_signal(number)
            raise AssertionError("the signal was lost")

        def remarks(self) -> list[str]:
            return []

    monkeypatch.setattr("kd.deploy.streaming.options.FileSource", lambda path: Endless())
    low = [*command[:3], "0.0", *SHORT]
    assert main(["--stream", "endless", *low]) == code
    said = capsys.readouterr()
    assert [json.loads(line)["end"] for line in said.out.splitlines()] == [1.0] * 3
    assert "3 events in 1.0 s of audio" in said.err


def test_computing_that_is_too_slow_is_told_once(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a clock that is wound by hand: the first 20 of 60 seconds take twice as long."""
    hands = iter(range(10**6))
    seconds = {"now": 0.0}

    def clock() -> float:
        tick = next(hands)
        if tick % 2:
            seconds["now"] += 2.0 if tick < 40 else 0.5
        return seconds["now"]

    source = SimpleNamespace(
        sample_rate_hz=1000,
        chunks=lambda: (np.zeros(1000, np.float32) for _ in range(60)),
        remarks=list,
    )
    model = Tagger.load(tiny_run).model
    assert streaming.tag_stream(model, source, StreamSettings(window_seconds=1.0, hop_seconds=1.0), clock) == 0
    told = capsys.readouterr().err
    assert told.count("at 10 s: computing takes 2.0 times as long as the audio lasts") == 1
    assert "60.0 s of audio; computing took 1 times as long, too slow in 2 stretches of 10 s" in told


class FakeSound(ModuleType):
    """Stands for sounddevice, whose library and hardware are missing here. Sends blocks faster than they are fetched."""

    PortAudioError = type("PortAudioError", (Exception,), {})

    def __init__(self, blocks: int) -> None:
        super().__init__("sounddevice")
        self.blocks = blocks

    def query_devices(self, device: object, kind: str) -> dict:
        if device is not None:
            raise ValueError(f"No input device matching {device!r}")
        return {"default_samplerate": 16000.0}

    def InputStream(self, *, callback, blocksize: int, samplerate: int, **_):
        @staticmethod
        def enter(*_):
            rng = np.random.default_rng(0)
            for number in range(self.blocks):
                block = (0.3 * rng.standard_normal((blocksize, 1))).astype(np.float32)
                callback(block, blocksize, None, SimpleNamespace(input_overflow=number == 3))
                block[:] = 0  # as PortAudio, which uses its buffers again

        return type("Stream", (), {"active": False, "__enter__": enter, "__exit__": lambda *_: None})()


def test_a_microphone_is_heard_and_lost_samples_are_counted_and_keep_their_time(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    low = [*command[:3], "0.0", *SHORT]
    monkeypatch.setitem(sys.modules, "sounddevice", FakeSound(20))
    assert main(["--microphone", *low]) == 0
    said = capsys.readouterr()
    assert [json.loads(line)["end"] for line in said.out.splitlines()] == [2.0] * 3
    assert "the sound card lost samples 1 times" in said.err
    assert "computing was too slow" not in said.err
    monkeypatch.setattr("kd.deploy.streaming.microphone.QUEUE_SECONDS", 1.0)
    assert main(["--microphone", *low]) == 0
    told = capsys.readouterr().err
    assert "3 events in 1.0 s of audio" in told
    assert "lost 16,000 samples (1.0 s), since computing was too slow" in told
    assert main(["--microphone", "--microphone-device", "kazoo", *low]) == 2
    assert "no microphone can be used: No input device matching 'kazoo'" in capsys.readouterr().err


def test_lost_blocks_are_silence_before_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from kd.deploy.streaming.microphone import Microphone

    monkeypatch.setitem(sys.modules, "sounddevice", FakeSound(0))
    monkeypatch.setattr("kd.deploy.streaming.microphone.QUEUE_SECONDS", 0.2)
    microphone, quiet = Microphone(), SimpleNamespace(input_overflow=False)
    chunks = microphone.chunks()
    for level in (1.0, 2.0, 3.0, 4.0):  # two fit
        microphone._arrive(np.full((1600, 1), level, np.float32), 1600, None, quiet)
    assert next(chunks)[0] == 1.0
    microphone._arrive(np.full((1600, 1), 5.0, np.float32), 1600, None, quiet)
    found = [*chunks]
    assert [(len(chunk), float(chunk[0])) for chunk in found] == [(1600, 2.0), (3200, 0.0), (1600, 5.0)]
    assert microphone.remarks() == [
        "lost 3,200 samples (0.2 s), since computing was too slow; silence took the place of those before the end"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stream", "-", "--microphone"], "--stream and --microphone exclude each other"),
        (["--stream", "-", "--json"], "--json would not be used: of a stream, events are printed"),
        (["a.wav", "--stream", "-"], "files would not be used"),
        (["a.wav", "--hop-seconds", "1"], "--hop-seconds would not be used without --stream or --microphone"),
        (["--stream", "a.wav", "--channels", "1"], "--channels would not be used with this source"),
        (["--stream", "-", "--channels", "2"], "also needs --sample-rate-hz"),
        (["--stream", "-", "--sample-rate-hz", "5"], "a sample rate lies between 1000 and 1000000 Hz; found 5"),
        (["--stream", "-", "--release", "2"], "--release must lie above 0 and be at most 1; found 2"),
        (["--stream", "nowhere.wav"], "nowhere.wav: No such file or directory"),
        (["--stream", "nowhere.wav", "--hop-seconds", "0"], "--hop-seconds must lie between 0.01 and 3600; found 0"),
    ],
)
def test_a_wrong_command_ends_with_one_message(
    tiny_run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    try:
        code = main([*arguments, "--tagger", str(tiny_run)])
    except SystemExit as ended:  # of tyro, for values that the configuration refuses
        code = ended.code
    assert code == 2
    said = capsys.readouterr()
    assert message in " ".join(said.err.replace("│", " ").split())
    assert not said.out


def test_missing_libraries_are_named(tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert main(["--microphone", "--tagger", str(tiny_run)]) == 2
    assert "recording needs sounddevice: pip install 'audio-kd[microphone]'" in capsys.readouterr().err
