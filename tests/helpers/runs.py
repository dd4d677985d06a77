"""What a run leaves in its workdir: its checkpoints' arrays, its metrics and its events."""

import json

from tensorboardX.proto import event_pb2

from helpers import tiny
from srpo_jax import checkpoint, metrics


def arrays(workdir, step):
    """Every array of a checkpoint by item and path, and its JSON part."""
    folder = workdir / "checkpoints" / str(step)
    found = {}
    for item in [item for item in checkpoint.ARRAYS if (folder / item).exists()]:
        found |= {item + path: array for path, array in tiny.read_arrays(folder / item).items()}
    return found, json.loads((folder / "run" / "metadata").read_text())


def assert_same(first, second, configs=True):
    """Asserts that two checkpoints are equal bit for bit, and their configurations too unless told otherwise."""
    (mine, run), (other, other_run) = first, second
    if not configs:
        run, other_run = ({key: value for key, value in r.items() if key != "config"} for r in (run, other_run))
    assert mine.keys() == other.keys() and run == other_run
    different = [name for name in mine if mine[name].tobytes() != other[name].tobytes()]
    assert not different


def numbers(workdir):
    """The metrics of a run without its clock."""
    clock = {"step_seconds", "images_per_second", "data_seconds", "goodput"}
    return [{name: value for name, value in record.items() if name not in clock} for record in metrics.read(workdir)]


def scalars(folder):
    """{(tag, step): value} of the event files of a folder: records of length (8 bytes), crc (4), data, crc (4)."""
    found = {}
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            data = data[16 + size :]
    return found
