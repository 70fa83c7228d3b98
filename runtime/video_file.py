"""Frames of a video file, decoded by PyAV one at a time.

FFmpeg reads the bytes through an object of ours and may open nothing else: a play list inside a file could name any
other file or address, so only containers that hold their own frames are let in, and no protocol at all.
"""

import io
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np
from PIL import Image

from .errors import CapacityError, InputError, MissingDependencyError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream

__all__ = ["MAX_SOURCE_FRAMES", "VideoFile", "open_video"]

MAX_SOURCE_FRAMES = 200_000  # two hours at 25 a second; the sampled ones alone are kept
_CONTAINERS = "mov,mp4,matroska,webm,avi,mpeg,mpegts,flv,ogg,asf,gif,ivf"
_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}


@dataclass(frozen=True)
class VideoFile:
    """An open video: how many frames its packets hold and how fast they go."""

    container: "InputContainer"
    stream: "VideoStream"
    num_frames: int
    fps: float
    label: str

    def frames(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """The frames of these indices (rising, may repeat), RGB. Raises InputError where the file ends before."""
        from av.error import FFmpegError

        self.container.seek(0, stream=self.stream)
        wanted = list(indices)
        done = number = 0
        try:
            for number, frame in enumerate(self.container.decode(self.stream), start=1):
                if wanted[done] < number:
                    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
                    while done < len(wanted) and wanted[done] < number:
                        yield image
                        done += 1
                    if done == len(wanted):
                        return
        except FFmpegError as error:
            raise InputError(
                f"{self.label}: frame {number} is damaged ({error.strerror}); convert the video again"
            ) from error
        raise InputError(
            f"{self.label}: only {number} of {self.num_frames} frames can be decoded; convert the video again"
        )


@contextmanager
def open_video(source: str | Path | bytes, label: str, max_source_pixels: int) -> Generator[VideoFile]:
    """Opens a video and counts its frames without decoding them.

    Raises MissingDependencyError without PyAV, CapacityError for frames over `max_source_pixels` or more than
    MAX_SOURCE_FRAMES of them, InputError for what is no video.
    """
    try:
        import av
        from av.error import FFmpegError
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{label}: reading video files needs PyAV; add it with `pip install 'vlmport[video]'`"
        ) from error
    try:
        with _stream(source) as data, av.open(data, "r", options=_OPTIONS, metadata_errors="replace") as container:
            yield _examine(container, label, max_source_pixels)
    except (FFmpegError, OSError) as error:
        raise InputError(f"{label}: is not a video of a known format ({error.strerror}); convert it to mp4") from error


def _stream(source: str | Path | bytes) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb")


def _examine(container: "InputContainer", label: str, max_source_pixels: int) -> VideoFile:
    if not container.streams.video:
        raise InputError(f"{label}: has no video stream; give a video with pictures")
    stream = container.streams.video[0]
    codec = cast("VideoCodecContext | None", stream.codec_context)  # PyAV's types forget codecs that it does not know
    if codec is None:
        raise InputError(f"{label}: its video stream has an unknown codec; convert it to mp4 with H.264")
    stream.thread_type = "AUTO"
    width, height = codec.width, codec.height
    if width * height > max_source_pixels:
        raise CapacityError(
            f"{label}: frames of {width}x{height} are over the limit of {max_source_pixels} pixels; shrink the video"
        )
    num_frames = 0
    for packet in container.demux(stream):
        num_frames += bool(packet.size) and not packet.is_discard
        if num_frames > MAX_SOURCE_FRAMES:
            raise CapacityError(f"{label}: has more than {MAX_SOURCE_FRAMES} frames; cut the video")
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    if num_frames and not (fps > 0 and np.isfinite(fps)):
        raise InputError(f"{label}: does not tell its frames a second; convert it to mp4")
    return VideoFile(container, stream, num_frames, fps, label)
