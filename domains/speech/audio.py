"""Decode recordings of any sample rate to mono float32; say what is wrong with those that cannot be used.

libsndfile decodes. What it passes over in silence is looked for here: a data chunk that is shorter than its header
says, an MP3 whose length is a guess, values that are no numbers.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from vertebra.errors import DataError

AUDIO_ENDINGS = frozenset(
    (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".sph", ".nist", ".aiff", ".aif", ".au", ".snd", ".w64", ".caf")
)
"""Endings, in lower case, of the files that are taken for recordings when a folder is read."""

_COPY = "copy or export it again"
_BLOCK = 1 << 24  # samples decoded at a time; headers that claim too much cost no memory
_RATES = 1000, 768_000  # Hz that are believed
_UNKNOWN = 1 << 50  # libsndfile gives 2**63 - 1 frames where a stream does not say
_BEYOND = 0.05  # s by which a segment may pass the end of its file
_MATRIX, _AT_ONCE = 1 << 18, 1 << 22  # values of a resampling filter as a matrix, and of what it is applied to
_ZEROS, _ROLLOFF = 6, 0.99  # of the resampling filter, as in torchaudio
_MP3_HEAD = 1 << 16  # bytes in which the first frame is looked for
_MP3_SLACK = 2 * 1152  # frames that encoder delay may take from the length of an MP3


class AudioError(DataError):
    """A recording that cannot be used.

    Args:
        file: Name of the file.
        rule: What is wrong.
        advice: What to do.
    """

    def __init__(self, file: str, rule: str, advice: str) -> None:
        super().__init__(f"{file}: {rule}; {advice}.")
        self.file, self.rule, self.advice = file, rule, advice

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.file, self.rule, self.advice)


@dataclass(frozen=True)
class AudioInfo:
    """What the header of a recording says.

    Args:
        sample_rate: Frames a second.
        frames: Samples of each channel.
        channels: How many there are.
        duration: Seconds.
        format: Container as libsndfile calls it, such as ``WAV``.
        subtype: Coding of the samples, such as ``PCM_16``.
    """

    sample_rate: int
    frames: int
    channels: int
    duration: float
    format: str
    subtype: str


def audio_info(source: str | Path) -> AudioInfo:
    """Read the header of a recording; samples are decoded only where it does not tell how many there are.

    Raises:
        AudioError: Nothing there, no audio, no frames, or truncated.
    """
    with _open(source, str(source)) as (stream, frames):
        if frames is None:
            frames = sum(len(block) for block in _blocks(stream, None))
        rate = stream.samplerate
        if not frames:
            raise _no_frames(str(source))
        return AudioInfo(rate, frames, stream.channels, frames / rate, stream.format, stream.subtype)


def read_audio(
    source: str | Path | bytes,
    sample_rate: int,
    *,
    start: float = 0.0,
    duration: float | None = None,
    channel: int | None = None,
    name: str | None = None,
) -> NDArray[np.float32]:
    """Decode a recording, or a part of one, to mono.

    An Ogg file that was cut between pages is read up to there: nothing in it tells.

    Args:
        source: File, or the bytes of one.
        sample_rate: Samples a second of the result; any other rate is resampled.
        start: Seconds into the recording.
        duration: Seconds; None for up to the end. Up to 50 ms beyond the end are forgiven.
        channel: Channel to take, from 0; None for the mean of all.
        name: What messages call the recording; the path, or ``audio`` for bytes.

    Returns:
        float32 (N,); integers are scaled to -1 to 1.

    Raises:
        AudioError: Nothing there, no audio, truncated or damaged, NaN or infinite samples, no frames, a part outside of
            the recording, or a channel it does not have.
    """
    label = name or ("audio" if isinstance(source, bytes) else str(source))
    if not 0 <= start < math.inf or (duration is not None and not 0 < duration < math.inf):
        raise AudioError(
            label, f"start must be 0 or more and duration above 0, got {start} and {duration}", "correct the segment"
        )
    with _open(source, label) as (stream, frames):
        rate = stream.samplerate
        _check_channel(stream, channel, label)
        begin = round(start * rate)
        count = None if duration is None else round(duration * rate)
        if frames is not None:
            if not frames:
                raise _no_frames(label)
            if begin >= frames:
                raise AudioError(
                    label, f"start must be before the end at {frames / rate:.3f} s, got {start}", "correct the segment"
                )
            count = frames - begin if count is None else count
            if begin + count > frames + _BEYOND * rate:
                raise _beyond(label, frames / rate, (begin + count) / rate)
            count = min(count, frames - begin)
        if count == 0:
            raise AudioError(label, f"a segment of {duration} s at {rate} Hz has no frames", "make it longer")
        if begin:
            stream.seek(begin)
        parts = [_mono(block, channel, label) for block in _blocks(stream, count)]
        wave = np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
        _check_count(stream, len(wave), count if frames is not None else None, label)
        if frames is None and count is not None and len(wave) < count - _BEYOND * rate:
            raise _beyond(label, start + len(wave) / rate, start + count / rate)
    return resample(wave, rate, sample_rate)


def stream_audio(
    source: str | Path | bytes,
    sample_rate: int,
    *,
    block_seconds: float = 30.0,
    channel: int | None = None,
    name: str | None = None,
) -> Iterator[NDArray[np.float32]]:
    """Decode a recording in blocks, in memory that does not grow with its length.

    Only an MP3 that does not say its length is held, compressed.

    Args:
        source: File, or the bytes of one.
        sample_rate: Samples a second of the result.
        block_seconds: Length of a block; the first and last differ a little.
        channel: Channel to take, from 0; None for the mean of all.
        name: What messages call the recording.

    Yields:
        float32 (N,). Joined, they are what ``read_audio`` gives.

    Raises:
        AudioError: As in ``read_audio``, when the faulty part is reached.
    """
    label = name or ("audio" if isinstance(source, bytes) else str(source))
    if not 0 < block_seconds < math.inf:
        raise AudioError(label, f"block_seconds must be above 0, got {block_seconds}", "take 30")
    with _open(source, label) as (stream, frames):
        _check_channel(stream, channel, label)
        if frames == 0:
            raise _no_frames(label)
        rate = stream.samplerate
        filters = _filters(rate, sample_rate)
        held, at = np.zeros(0, dtype=np.float32), 0  # samples not used up yet, and where they begin
        done, total = 0, 0
        for block in _blocks(stream, frames, max(1, round(block_seconds * rate))):
            wave = _mono(block, channel, label)
            total += len(wave)
            if filters is None:
                yield wave
                continue
            held = np.concatenate((held, wave))
            ready = max(done, (total - filters.width - 2) * filters.new // filters.old)
            if ready > done:
                yield filters.apply(held, at, done, ready)
                done = ready
                keep = max(0, done * filters.old // filters.new - filters.width - 1)
                held, at = held[keep - at :], keep
        _check_count(stream, total, frames, label)
        if filters is not None and (end := filters.length(total)) > done:
            yield filters.apply(held, at, done, end)


def resample(wave: NDArray[np.float32], old: int, new: int) -> NDArray[np.float32]:
    """Change the sample rate by a windowed sinc.

    The same filter as ``torchaudio.functional.resample`` with its defaults: Hann window over 6 zero crossings, roll-off
    0.99. Only taps that are not 0 are kept, so that rates without a common divisor cost little.

    Args:
        wave: (N,).
        old: Samples a second of ``wave``.
        new: Samples a second of the result.

    Returns:
        float32 (ceil(N * new / old),).
    """
    filters = _filters(old, new)
    wave = np.asarray(wave, dtype=np.float32)
    return wave if filters is None else filters.apply(wave, 0, 0, filters.length(len(wave)))


# ---------------------------------------------------------------- resampling


class _Filters:
    """One filter for each of the ``new`` phases that a sample of the result may have."""

    def __init__(self, old: int, new: int) -> None:
        self.old, self.new = old, new
        base = min(old, new) * _ROLLOFF
        self.width = math.ceil(_ZEROS * old / base)
        phases = np.arange(new)
        self.first = phases * old // new - self.width  # first tap of each phase
        taps = self.first[:, None] + np.arange(2 * self.width + 2)  # (new, taps)
        t = np.clip((taps / old - phases[:, None] / new) * base, -_ZEROS, _ZEROS)
        window = np.cos(t * math.pi / _ZEROS / 2) ** 2
        self.kernel = (np.sinc(t) * window * base / old).astype(np.float32)
        self.matrix: NDArray[np.float32] | None = None  # of a whole block, ten times as fast where it is small
        if new * (span := old + 2 * self.width + 2) <= _MATRIX:
            self.matrix = np.zeros((span, new), dtype=np.float32)
            self.matrix[(taps + self.width).T, phases] = self.kernel.T

    def length(self, samples: int) -> int:
        """Samples of the result."""
        return -(-samples * self.new // self.old)

    def apply(self, wave: NDArray[np.float32], at: int, start: int, end: int) -> NDArray[np.float32]:
        """Samples ``start`` to ``end`` of the result; ``wave`` begins at sample ``at``, with silence around it."""
        if end <= start:
            return np.zeros(0, dtype=np.float32)
        taps = self.kernel.shape[1]
        left = start // self.new * self.old - self.width - at  # first sample that a filter may touch
        right = ((end - 1) // self.new + 1) * self.old + self.width + 2 - at
        padded = np.pad(wave[max(left, 0) :], (max(-left, 0), max(right - len(wave), 0)))
        if self.matrix is not None:
            span, first = len(self.matrix), start // self.new
            blocks = np.lib.stride_tricks.sliding_window_view(padded, span)[:: self.old]
            step = max(1, _AT_ONCE // span)
            parts = [
                np.ascontiguousarray(blocks[i : i + step]) @ self.matrix  # (blocks, new)
                for i in range(0, (end - 1) // self.new + 1 - first, step)
            ]
            return np.concatenate(parts).reshape(-1)[start - first * self.new : end - first * self.new]
        out = np.empty(end - start, dtype=np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(padded, taps)
        for phase in range(self.new):
            offset = (phase - start) % self.new
            if offset >= len(out):
                continue
            count = -(-(len(out) - offset) // self.new)
            first = (start + offset) // self.new * self.old + int(self.first[phase]) - at - left
            rows = windows[first : first + (count - 1) * self.old + 1 : self.old]
            out[offset :: self.new] = rows @ self.kernel[phase]
        return out


@lru_cache(maxsize=64)  # speed perturbation has 41 factors from 0.8 to 1.2
def _filters(old: int, new: int) -> _Filters | None:
    if old <= 0 or new <= 0:
        raise DataError(f"resample: sample rates must be above 0, got {old} and {new}; correct them.")
    divisor = math.gcd(old, new)
    return None if old == new else _Filters(old // divisor, new // divisor)


# ---------------------------------------------------------------- decoding


class _Unsized(sf.SoundFile):  # type: ignore[misc]
    """A stream of unknown length; soundfile would seek after each read, and fail at its end."""

    def seekable(self) -> bool:
        return False

    def seek(self, frames: int, whence: int = 0) -> int:
        """Decode and drop ``frames``; only from the beginning."""
        left = frames
        while left and (got := len(self.read(min(left, _BLOCK), dtype="float32", always_2d=True))):
            left -= got
        return frames - left


@contextmanager
def _open(source: str | Path | bytes, name: str) -> Iterator[tuple[sf.SoundFile, int | None]]:
    """Open a recording; with it comes the number of its frames, None where only decoding tells."""
    if isinstance(source, bytes):
        size, head = len(source), source[:1024]
        file: str | BytesIO = BytesIO(source)
    else:
        file = str(source)
        size, head = _look(Path(source), name)
    if not size:
        raise AudioError(name, "the file is empty", "copy it again")
    if head.startswith(b"NIST_1A") and b"shorten" in head:
        raise AudioError(name, "SPHERE compressed with shorten cannot be read", "convert it, as with sph2pipe -f wav")
    if isinstance(file, str) and file.lower().endswith(".raw"):
        raise AudioError(name, "samples without a header tell no sample rate", "convert it to WAV")
    try:
        with sf.SoundFile(file) as stream:
            low, high = _RATES
            if not low <= stream.samplerate <= high:
                raise AudioError(
                    name, f"sample rate must be from {low:,} to {high:,} Hz, got {stream.samplerate:,}", _COPY
                )
            if stream.format == "MP3" and not _says_length(source):
                with sf.SoundFile(BytesIO(_with_length(source))) as counted:
                    yield counted, counted.frames
                return
            if stream.frames >= _UNKNOWN:
                with _Unsized(BytesIO(source) if isinstance(source, bytes) else file) as unsized:
                    yield unsized, None
                return
            _check_chunks(stream, head, name)
            yield stream, stream.frames
    except sf.LibsndfileError as e:
        reason = e.error_string.strip().rstrip(".") or f"libsndfile error {e.code}"
        if "not recognised" in reason or "unknown format" in reason:
            raise AudioError(
                name, "this is not audio of a format that libsndfile reads", "check what it is, or convert it to WAV"
            ) from None
        raise AudioError(name, f"the audio is truncated or damaged ({reason})", _COPY) from None
    except sf.SoundFileError as e:
        raise AudioError(name, f"the audio cannot be read ({e})", _COPY) from None


def _look(path: Path, name: str) -> tuple[int, bytes]:
    try:
        if path.is_dir():
            raise AudioError(name, "this is a folder", "name the files in it")
        with path.open("rb") as stream:
            head = stream.read(1024)
        return path.stat().st_size, head
    except FileNotFoundError:
        raise AudioError(name, "there is no such file", "correct the path") from None
    except (OSError, ValueError) as e:  # ValueError: a null character in the path
        reason = getattr(e, "strerror", None) or e
        raise AudioError(
            name, f"the file cannot be opened ({reason})", "check what it is and who may read it"
        ) from None


def _blocks(stream: sf.SoundFile, count: int | None, size: int = _BLOCK) -> Iterator[NDArray[np.float32]]:
    """Decode ``count`` frames (None: all that there are) in blocks (frames, channels)."""
    left = count
    size = max(1, min(size, _BLOCK // stream.channels))
    while left is None or left > 0:
        want = size if left is None else min(size, left)
        block = stream.read(want, dtype="float32", always_2d=True)
        if len(block):
            yield block
        if len(block) < want:
            return
        left = None if left is None else left - len(block)


def _mono(block: NDArray[np.float32], channel: int | None, name: str) -> NDArray[np.float32]:
    if channel is not None:
        wave = block[:, channel].copy()
    else:
        wave = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)
    if not np.isfinite(wave).all():
        raise AudioError(
            name, f"samples must be numbers, got NaN or infinite in {(~np.isfinite(wave)).sum()}", "export it again"
        )
    return wave


def _check_channel(stream: sf.SoundFile, channel: int | None, name: str) -> None:
    if channel is not None and not 0 <= channel < stream.channels:
        raise AudioError(
            name, f"channel must be from 0 to {stream.channels - 1}, got {channel}", "leave it out for the mean of all"
        )


def _check_count(stream: sf.SoundFile, got: int, want: int | None, name: str) -> None:
    slack = _MP3_SLACK if stream.format == "MP3" else 0
    if want is not None and got < want - slack:
        raise _truncated(name, got / stream.samplerate, want / stream.samplerate)
    if not got:
        raise _no_frames(name)


def _no_frames(name: str) -> AudioError:
    return AudioError(name, "the recording has no frames", "leave it out, or export it again")


def _truncated(name: str, got: float, want: float) -> AudioError:
    return AudioError(
        name, f"the audio is truncated: the header says {want:.3f} s and {got:.3f} s are there", "copy it again"
    )


def _beyond(name: str, end: float, got: float) -> AudioError:
    return AudioError(
        name, f"start + duration must not pass the end at {end:.3f} s, got {got:.3f}", "correct the segment"
    )


# ---------------------------------------------------------------- what headers say


_CHUNK = re.compile(r"^ *(?:data|SSND|riff) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
_LONG_WAVE = re.compile(r"Calculated frame count (\d+) does not match value from 'ds64' chunk of (\d+)")
_SUN = re.compile(r"Data Offset : (\d+)\s+Data Size +: (\d+)")
_SPHERE = re.compile(rb"sample_count -i (\d+)")


def _check_chunks(stream: sf.SoundFile, head: bytes, name: str) -> None:
    """Compare the length that the header declares with what libsndfile found."""
    info = stream.extra_info
    if stream.format == "NIST":
        found = _SPHERE.search(head)
        if found and int(found[1]) > stream.frames:
            raise _truncated(name, stream.frames / stream.samplerate, int(found[1]) / stream.samplerate)
    elif stream.format == "RF64":
        found_text = _LONG_WAVE.search(info)
        if found_text and int(found_text[2]) > int(found_text[1]):
            raise _truncated(name, stream.frames / stream.samplerate, int(found_text[2]) / stream.samplerate)
    elif stream.format == "AU":
        found_text = _SUN.search(info)
        size = re.search(r"^Length : (\d+)", info, re.MULTILINE)
        if found_text and size:
            _check_bytes(int(found_text[2]), int(size[1]) - int(found_text[1]), name)
    elif found_text := _CHUNK.search(info):
        _check_bytes(int(found_text[1]), int(found_text[2]), name)


def _check_bytes(want: int, got: int, name: str) -> None:
    # Writers to a pipe leave the largest number there is; some count a byte of padding.
    if want < 0x7FFFF000 and got < want - 1:
        raise AudioError(
            name, f"the audio is truncated: the header says {want:,} bytes and {got:,} are there", "copy it again"
        )


_MP3_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
_MP3_KBITS = {
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def _mp3_frame(data: bytes, at: int) -> tuple[int, int] | None:
    """Bytes of the layer III frame at ``at``, and where a Xing header would lie in it (ISO 11172-3, 2.4.1)."""
    if at + 4 > len(data) or data[at] != 0xFF or data[at + 1] & 0xE6 != 0xE2:
        return None
    version, kbits, rate = data[at + 1] >> 3 & 3, data[at + 2] >> 4, data[at + 2] >> 2 & 3
    if version == 1 or kbits in (0, 15) or rate == 3:
        return None
    first = version == 3
    size = (144 if first else 72) * 1000 * _MP3_KBITS[first][kbits] // _MP3_RATES[version][rate] + (
        data[at + 2] >> 1 & 1
    )
    is_mono = data[at + 3] >> 6 == 3
    return size, 4 + (17 if is_mono else 32) if first else 4 + (9 if is_mono else 17)


def _mp3_start(data: bytes, at: int) -> int:
    """Where the next frame begins; -1 where two in a row are not found."""
    while (at := data.find(b"\xff", at)) >= 0:
        frame = _mp3_frame(data, at)
        if frame and _mp3_frame(data, at + frame[0]):
            return at
        at += 1
    return -1


def _tag_size(data: bytes) -> int:
    """Bytes of the ID3v2 tag that an MP3 may begin with."""
    if data[:3] != b"ID3" or len(data) < 10:
        return 0
    return 10 + (data[6] << 21 | data[7] << 14 | data[8] << 7 | data[9])


def _says_length(source: str | Path | bytes) -> bool:
    """Whether the first frame of an MP3 tells how many there are, or none is found to count."""
    if isinstance(source, bytes):
        data = source[_tag_size(source) :][:_MP3_HEAD]
    else:
        with open(source, "rb") as file:
            file.seek(_tag_size(file.read(10)))
            data = file.read(_MP3_HEAD)
    at = _mp3_start(data, 0)
    frame = _mp3_frame(data, at) if at >= 0 else None
    if frame is None:
        return True
    return data[at + frame[1] :][:4] in (b"Xing", b"Info") or data[at + 36 :][:4] == b"VBRI"


def _with_length(source: str | Path | bytes) -> bytes:
    """Put a frame with the number of frames before an MP3 that has none: libsndfile would guess from the bit rate."""
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    start = at = _mp3_start(data, _tag_size(data))
    count = 0
    while at >= 0:
        if frame := _mp3_frame(data, at):
            count += 1
            at += frame[0]
        else:
            at = _mp3_start(data, at)
    header = bytearray(data[start : start + 4])
    header[1] |= 1  # no checksum
    header[2] = header[2] & 0x0F | 0x90  # enough bytes for what follows
    size, offset = _mp3_frame(bytes(header), 0) or (0, 0)
    first = bytearray(size)
    first[:4] = header
    first[offset : offset + 12] = b"Xing" + struct.pack(">II", 1, count)
    return bytes(first) + data[start:]
