"""Files written whole or not at all, and outputs that never replace a file that this program did not write."""

import contextlib
import io
import os
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

MARK = "written by RMMSS"  # near an end of every output, so that a later run knows what it may replace


def ours(path: Path) -> bool:
    """Whether this program wrote the file: `MARK` is in its first or last 200 bytes."""
    with path.open("rb") as file:
        head = file.read(200)
        file.seek(max(0, file.seek(0, os.SEEK_END) - 200))
        return MARK.encode() in head + file.read()


def check_output(path: str | Path | None, ending: str = "") -> None:
    """Raises ValueError with a sentence if the path may not be written; None stands for no output."""
    if path is None:
        return
    if not str(path).endswith(ending):
        raise ValueError(f"the output '{path}' must end in {ending}.")
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist.")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path}: its folder cannot be written to.")
    if path.exists() and not (path.is_file() and ours(path)):
        what = "is a folder" if path.is_dir() else f"exists and is not marked as {MARK}"
        raise ValueError(f"{path} {what}; choose the name of another file.")


def write_output(path: str | Path, content: str | bytes) -> None:
    """content: with `MARK` where `ours` looks; else the file is written once and never replaced."""
    check_output(path)
    content = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    replace(Path(path), content, beside=f".{os.getpid()}.new")  # two processes may write it at the same time


def write_picture(path: str | Path, image: Image.Image) -> None:
    """An image as PNG, with `MARK` as its comment."""
    about, buffer = PngInfo(), io.BytesIO()
    about.add_text("Comment", MARK)
    image.save(buffer, "PNG", pnginfo=about)
    write_output(path, buffer.getvalue())


def replace(path: Path, content: bytes, previous: Path | None = None, beside: str = ".new") -> None:
    """Writes beside, flushes, reads back and renames: an OSError leaves the old file, which else goes to `previous`."""
    beside = path.with_name(path.name + beside)
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if beside.read_bytes() != content:
            raise OSError("the disk gives back something else")
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # of a read-only disk
            beside.unlink(missing_ok=True)
        what, space = f"cannot write {path} ({error.strerror or error})", f"{len(content) / 2**20:.1f} MB"
        raise OSError(f"{what}; what was there before is still there. {space} of free space are needed.") from error
