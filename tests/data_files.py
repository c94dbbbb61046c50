"""What the tests of data sets share: small data sets to write, scenes to compare with, errors to expect."""

import contextlib
import struct
import zlib

import numpy as np
import pytest
import torch

from datasets import synthetic
from datasets.export import write_file

SIZE = 64  # of the scenes of the fixture `exported`


def painted(split, index, size=SIZE):
    condition, case = synthetic.CONDITIONS[index % 5], ("none", *synthetic.CASES)[index % 6]
    return synthetic.paint(3, split, index, size, condition, case)


def chw(image, scale=1):
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))) * scale


def png(path, array, filters=None):
    """A PNG writer of the test's own; `filters` chooses None (0), Sub (1) or Up (2) for each row."""
    height, _, channels = array.shape
    rows = array.astype(">u2" if array.dtype == np.uint16 else "u1").reshape(height, -1).view(np.uint8).astype(int)
    pixel, lines = array.dtype.itemsize * channels, b""
    for y in range(height):
        kind = filters[y] if filters is not None else 0
        before = {0: 0, 1: np.concatenate([np.zeros(pixel, int), rows[y, :-pixel]]), 2: rows[y - 1] if y else 0}[kind]
        lines += bytes([kind]) + ((rows[y] - before) % 256).astype(np.uint8).tobytes()
    put_together(path, array, 8 * array.dtype.itemsize, {1: 0, 3: 2, 4: 6}[channels], lines)


def few_bits(path, ids, bits, palette=None):
    """A PNG of 1, 2, 4 or 8 bits a pixel, grey, or with a palette."""
    packed = np.packbits(np.unpackbits(ids[..., None], axis=2)[..., 8 - bits :].reshape(len(ids), -1), axis=1)
    colours = [] if palette is None else [b"PLTE" + np.array(palette, np.uint8).tobytes()]
    put_together(path, ids, bits, 0 if palette is None else 3, np.pad(packed, ((0, 0), (1, 0))).tobytes(), *colours)


def put_together(path, array, bits, colour, rows, *more):
    """Writes the chunks of a PNG; a row begins with its filter."""
    head = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], bits, colour, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for chunk in (b"IHDR" + head, *more, b"IDAT" + zlib.compress(rows), b"IEND"):
            file.write(struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)))


def folder_dataset(root, count=4, shape=(40, 60), classes=5, **sensors):
    """A folder data set of noise; sensor -> from, to below, kind. Always of rgb, and if no sensor is given, of events
    that repeat the label, so that both must move together."""
    rng = np.random.default_rng(0)
    write_file(root / "classes.txt", "".join(f"class {k}\n" for k in range(classes)))
    for split in synthetic.SPLITS:
        for i in range(count):
            label = rng.integers(0, classes, shape, np.uint8)
            for sensor, (low, high, kind) in ({"rgb": (0, 256, "u1")} | sensors).items():
                values = rng.uniform(low, high, (*shape, 3) if sensor == "rgb" else shape).astype(kind)
                write_file(root / f"{sensor}/{split}/{i}.{'npy' if kind == 'f4' else 'png'}", values)
            if not sensors:
                write_file(root / f"event/{split}/{i}.png", np.dstack([label + 1] * 3))
            write_file(root / f"labels/{split}/{i}.png", label)
    return root


@contextlib.contextmanager
def fails(kind, *parts):
    """Expect an error of one line that has all these parts."""
    with pytest.raises(kind) as error:
        yield
    text = str(error.value)
    assert "\n" not in text and all(str(part) in text for part in parts), text
