"""What the bytes of an audio file hold, compared with what its header says, without decoding.

Headers lie: of a download that was interrupted, of files joined end to end, of a recorder that was killed before it could fill in
the sizes. Each function here looks at one format and tells whether libsndfile, which believes headers, would hear everything.
"""

import struct
from dataclasses import dataclass
from mmap import mmap

Content = bytes | mmap

STREAMED_BYTES = 0x7FFF_F000
"""Sizes from here on stand for "not known", as programs write that cannot go back to the header."""
STRAY_BYTES = 1024
"""Bytes behind the samples of a WAV file that are no audio, whatever they are: a sector that was filled up, a lost tag."""
TAIL_BYTES = 2**18
"""How far from its end the last frame of a FLAC file is looked for."""
FIRST_PAGE_SAMPLES = 10 * 48_000
"""Samples that the first pages of an Ogg stream can hold at most; more were cut off before."""


@dataclass(frozen=True)
class Findings:
    """Whether a file holds what its header says."""

    believed: bool = True
    """Whether libsndfile hears the whole file; else FFmpeg is to read it."""
    exact: bool = True
    """Whether libsndfile's number of samples is what decodes; else they must be counted."""
    declared_samples: int | None = None
    """Samples by the header, where it is known to differ or may differ from what is there."""
    data_size_at: int | None = None
    """Where a WAV file's wrong data size stands; FFmpeg is shown "not known" there, and reads to the end of the file."""


UNKNOWN = Findings()


def examine(content: Content) -> Findings:
    """The findings for a file of any format.

    Raises:
        ValueError: audio that would be lost, since nothing here can read it: WAV files joined end to end.
    """
    magic = bytes(content[:12])
    if magic[:4] in (b"RIFF", b"RF64") and magic[8:] == b"WAVE":
        return _examine_wav(content)
    if magic[:4] == b"OggS":
        return _examine_ogg(content)
    if magic[:4] == b"fLaC":
        return _examine_flac(content)
    if magic[:4] == b"FORM" and magic[8:11] == b"AIF":
        return _examine_aiff(content)
    if mpeg_start(content) is not None:
        return _examine_mpeg(content)
    return UNKNOWN


def demuxer_of(content: Content) -> str | None:
    """The name of FFmpeg's reader for a file, by its first bytes; None for what is not read.

    FFmpeg is never left to guess: some of its formats are playlists that open other files and addresses.
    """
    magic = bytes(content[:16])
    if magic[:4] == b"RIFF":
        return {b"WAVE": "wav", b"AVI ": "avi"}.get(magic[8:12])
    if magic[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"
    for start, name in _DEMUXERS.items():
        if magic.startswith(start):
            return name
    if mpeg_start(content) is not None:
        return "mp3"
    after_tags = _after_id3(content, 0)
    adts = bytes(content[after_tags : after_tags + 2])
    return "aac" if len(adts) == 2 and adts[0] == 0xFF and adts[1] & 0xF6 == 0xF0 else None


_DEMUXERS = {
    b"\x1a\x45\xdf\xa3": "matroska",  # and WebM
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "asf",  # WMA
    b"#!AMR": "amr",
    b"OggS": "ogg",
    b"fLaC": "flac",
    b"caff": "caf",
    b"FORM": "aiff",
    b".snd": "au",
    b"FLV\x01": "flv",
    b"wvpk": "wv",
    b"TTA1": "tta",
    b"MAC ": "ape",
    b"MPCK": "mpc8",
    b"MP+": "mpc",
    b"\x0b\x77": "ac3",
}


# -- WAV and AIFF: chunks ----------------------------------------------------------------------------------------------


def _examine_wav(content: Content) -> Findings:
    position, end = 12, len(content)
    byte_rate = block = samples_per_block = 0
    while position + 8 <= end:
        name, size = struct.unpack("<4sI", content[position : position + 8])
        start = position + 8
        if name == b"fmt " and size >= 16 and start + 16 <= end:
            byte_rate, block = struct.unpack("<8xIH", content[start : start + 14])
            rate = int.from_bytes(content[start + 4 : start + 8], "little")
            samples_per_block = rate * block / byte_rate if byte_rate else 0
        if name == b"data":
            return _examine_wav_data(content, start, size, block, samples_per_block)
        position = start + size + size % 2
    return UNKNOWN


def _examine_wav_data(content: Content, start: int, size: int, block: int, samples_per_block: float) -> Findings:
    there = len(content) - start
    if bytes(content[:4]) == b"RF64" or size >= STREAMED_BYTES or not block:
        return UNKNOWN
    declared = round(size / block * samples_per_block)
    if size > there:
        return Findings(declared_samples=declared)  # libsndfile hears what is there
    behind = start + size + size % 2
    if there - size < (STRAY_BYTES if size else block) or _are_chunks(content, behind):
        return UNKNOWN
    if content[behind : behind + 4] in (b"RIFF", b"RF64"):
        raise ValueError("holds several WAV files joined end to end, of which only the first could be read; split them")
    return Findings(believed=False, exact=False, declared_samples=declared, data_size_at=start - 4)


def _are_chunks(content: Content, position: int) -> bool:
    """Whether chunks (cue points, names and the like) or tags follow, up to the end of the file. The last may be cut off."""
    while position + 8 <= len(content):
        name, size = struct.unpack("<4sI", content[position : position + 8])
        if name[:3] in (b"ID3", b"TAG"):
            return True
        if name in (b"RIFF", b"RF64") or not all(32 <= letter < 127 for letter in name):
            return False
        position += 8 + size + size % 2
    return True


def _examine_aiff(content: Content) -> Findings:
    position = 12
    declared = None
    while position + 8 <= len(content):
        name, size = struct.unpack(">4sI", content[position : position + 8])
        if name == b"COMM":
            declared = int.from_bytes(content[position + 10 : position + 14], "big")
        if name == b"SSND":
            is_cut = position + 8 + size > len(content)
            return Findings(declared_samples=declared if is_cut else None)
        position += 8 + size + size % 2
    return UNKNOWN


# -- Ogg: pages --------------------------------------------------------------------------------------------------------


def _examine_ogg(content: Content) -> Findings:
    """Whether all pages of one stream are there, and no other stream follows it."""
    position, numbers, granules = 0, {}, []
    is_chained, is_whole = False, True
    while position + 27 <= len(content):
        magic, kind, granule, serial, number, segments = struct.unpack("<4sxBqII4xB", content[position : position + 27])
        if magic != b"OggS":
            is_whole = False
            position = content.find(b"OggS", position)
            if position < 0:
                break
            continue
        begins_stream = bool(kind & 2)
        is_chained |= begins_stream and bool(granules)
        is_whole &= begins_stream or number == numbers.get(serial, -1) + 1
        numbers[serial] = number
        if granule > 0:
            granules = [granules[0] if granules else granule, granule]
        position += 27 + segments + sum(content[position + 27 : position + 27 + segments])
    if is_chained:
        return Findings(believed=False, exact=False)
    if not is_whole or (granules and granules[0] > FIRST_PAGE_SAMPLES):
        return Findings(believed=False, exact=False, declared_samples=granules[-1] if granules else None)
    return UNKNOWN


# -- FLAC: the last frame ----------------------------------------------------------------------------------------------


def _examine_flac(content: Content) -> Findings:
    """Whether the last frame ends where the header says."""
    info = bytes(content[8:42])
    if len(info) < 34:
        return UNKNOWN
    block_size = int.from_bytes(info[2:4], "big")
    declared = int.from_bytes(info[10:18], "big") & (2**36 - 1)
    if declared == 0:  # streamed; libsndfile reads to the end
        return Findings(exact=False)
    begin = max(42, len(content) - TAIL_BYTES)
    tail = bytes(content[begin:])
    position = len(tail)
    while (position := max(tail.rfind(b"\xff\xf8", 0, position), tail.rfind(b"\xff\xf9", 0, position))) >= 0:
        last = _end_of_flac_frame(tail[position : position + 16], block_size)
        if last is not None:
            # A frame that is cut off looks like a whole one here; decoding tells.
            return UNKNOWN if last == declared else Findings(believed=False, exact=False, declared_samples=declared)
    return Findings(believed=False, exact=False, declared_samples=declared)


def _end_of_flac_frame(header: bytes, block_size: int) -> int | None:
    """The number of samples up to the end of a frame (RFC 9639, section 9.1); None if this is no frame header."""
    if len(header) < 6 or header[2] >> 4 == 0 or header[3] & 1:
        return None
    ones = 8 - (header[4] ^ 0xFF).bit_length()
    if ones == 1 or ones > 7:
        return None
    further = max(0, ones - 1)
    number = header[4] & (0x7F >> ones)
    for byte in header[5 : 5 + further]:
        number = number << 6 | byte & 0x3F
    position, code = 5 + further, header[2] >> 4
    samples = {1: 192}.get(code) or (576 << (code - 2) if code < 6 else 256 << (code - 8) if code > 7 else 0)
    if code in (6, 7):
        samples = int.from_bytes(header[position : position + code - 5], "big") + 1
        position += code - 5
    position += {12: 1, 13: 2, 14: 2}.get(header[2] & 15, 0)
    if position >= len(header) or _crc8(header[:position]) != header[position]:
        return None
    return samples + (number if header[1] & 1 else number * block_size)


def _crc8(data: bytes) -> int:
    value = 0
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value << 1 ^ 0x07 if value & 0x80 else value << 1) & 0xFF
    return value


# -- MPEG layers II and III: frames ------------------------------------------------------------------------------------

_KBITS = {  # by (MPEG 1?, layer)
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_SAME_MASK = 0xFFFE0C00
"""The bits of a frame header that all frames of a file share: sync, version, layer, sample rate."""
LEADING_BYTES = 2**16
"""How far the first frame is looked for behind tags."""


def mpeg_start(content: Content) -> int | None:
    """Where the first frame of an MP3 (or layer II) file begins; None for another format."""
    start = _after_id3(content, 0)
    if start == 0 and content[:1] not in (b"\0", b"\xff"):
        return None
    head = bytes(content[start : start + LEADING_BYTES])
    if start == 0:  # without a tag before it, the first frame comes at once, or behind zeros
        start = len(head) - len(head.lstrip(b"\0"))
        head = head[start : start + 4]
    position = -1
    while (position := head.find(b"\xff", position + 1)) >= 0:
        length = _frame_bytes(head[position : position + 4])
        if not length:
            continue
        behind = start + position + length
        if behind + 4 > len(content) or _is_same(head[position : position + 4], bytes(content[behind : behind + 4])):
            return start + position
    return None


def _examine_mpeg(content: Content) -> Findings:
    """Whether the header counts the frames that are there."""
    position = mpeg_start(content)
    first = bytes(content[position : position + 4])
    declared = _declared_frames(bytes(content[position : position + 200]))
    lengths: dict[bytes, int] = {}
    frames, length, end = 0, 0, len(content)
    while position < end:
        header = content[position : position + 4]
        length = lengths.get(header)
        if length is None:
            length = lengths[header] = _frame_bytes(header) if _is_same(first, header) else 0
        if not length or position + length > end:
            break  # tags or junk, or a frame that is cut off
        frames += 1
        position += length
    is_regular = position + length > end if length else _after_tags(content, position) >= end
    samples = 1152 if first[1] >> 3 & 3 == 3 or first[1] >> 1 & 3 == 2 else 576
    if declared is None:
        return Findings(believed=False, exact=False)
    if is_regular and declared == frames - 1:  # the frame that gives the number is not counted, and is silent
        return Findings(declared_samples=declared * samples)
    return Findings(believed=False, exact=False, declared_samples=declared * samples)


def _frame_bytes(header: bytes) -> int:
    """The length of a frame of layer II or III by its header; 0 if this is none, or one of free format."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return 0
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
    kbits, rate = header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or layer not in (2, 3) or kbits in (0, 15) or rate == 3:
        return 0
    per_byte = 144 if version == 3 or layer == 2 else 72
    return per_byte * 1000 * _KBITS[version == 3, layer][kbits] // _RATES[version][rate] + (header[2] >> 1 & 1)


def _is_same(one: bytes, other: bytes) -> bool:
    """Whether two frame headers can be of one file."""
    return len(other) == 4 and not (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")) & _SAME_MASK


def _declared_frames(frame: bytes) -> int | None:
    """The number of frames that a first frame of Xing's, LAME's or Fraunhofer's kind gives."""
    is_mpeg1, is_mono = frame[1] >> 3 & 3 == 3, frame[3] >> 6 == 3
    at = 4 + (17 if is_mono else 32) if is_mpeg1 else 4 + (9 if is_mono else 17)
    if frame[at : at + 4] in (b"Xing", b"Info") and frame[at + 7 : at + 8] and frame[at + 7] & 1:
        return int.from_bytes(frame[at + 8 : at + 12], "big")
    if frame[36:40] == b"VBRI":
        return int.from_bytes(frame[50:54], "big")
    return None


def _after_id3(content: Content, position: int) -> int:
    """Behind the ID3v2 tags that begin here."""
    while content[position : position + 3] == b"ID3" and position + 10 <= len(content):
        size = 0
        for byte in content[position + 6 : position + 10]:
            size = size << 7 | byte & 0x7F
        position += 10 + size + (10 if content[position + 5] & 0x10 else 0)
    return position


def _after_tags(content: Content, position: int) -> int:
    """Behind the tags or the padding that follow a file's frames."""
    start = -1
    while start < position < len(content):
        start = position
        position = _after_id3(content, position)
        if content[position : position + 3] == b"TAG":
            position += 128
        if content[position : position + 8] == b"APETAGEX":
            position += 32 + int.from_bytes(content[position + 12 : position + 16], "little")
        if content[position : position + 11] == b"LYRICSBEGIN":
            position = content.find(b"LYRICS200", position) + 9 if content.find(b"LYRICS200", position) > 0 else start
    if position < len(content) and not bytes(content[position:]).strip(b"\0"):
        return len(content)
    return position
