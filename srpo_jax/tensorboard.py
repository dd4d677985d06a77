"""TensorBoard's event files: records of length (8 bytes), its checksum (4), an event, its checksum (4)."""

import struct
import time
from typing import TYPE_CHECKING

import google_crc32c

if TYPE_CHECKING:
    from tensorboardX.proto import event_pb2

MASK = 0xA282EAD8  # by which TensorFlow changes a checksum that is stored beside what it was made of


def head(done: int) -> bytes:
    """The beginning of a file: events of earlier files after step ``done`` do not count any more."""
    from tensorboardX.proto import event_pb2  # with PyTorch where that is installed: more than a second

    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    events = (
        event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"),
        event_pb2.Event(wall_time=time.time(), step=done + 1, session_log=start),
    )
    return b"".join(map(_record, events))


def scalars(step: int, values: dict[str, float]) -> bytes:
    """The metrics of a step."""
    from tensorboardX.proto import event_pb2, summary_pb2

    found = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    return _record(event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=found)))


def _record(event: "event_pb2.Event") -> bytes:
    content = event.SerializeToString()
    size = struct.pack("<Q", len(content))
    return size + _checksum(size) + content + _checksum(content)


def _checksum(content: bytes) -> bytes:
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF)
