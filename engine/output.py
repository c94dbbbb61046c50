"""Files written whole or not at all, and outputs that never replace a file that this program did not write."""

import io
import os
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

MARK = "written by RMMSS"  # near the beginning of every output, so that a later run knows what it may replace


def check_output(path: str | Path | None, ending: str = "") -> None:
    """Raises ValueError with a sentence if the path may not be written; None stands for no output."""
    if path is None:
        return
    if not str(path).endswith(ending):
        raise ValueError(f"the output '{path}' must end in {ending}.")
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist.")
    if path.exists() and not (path.is_file() and MARK.encode() in path.open("rb").read(200)):
        what = "is a folder" if path.is_dir() else f"exists and is not marked as {MARK}"
        raise ValueError(f"{path} {what}; choose the name of another file.")


def write_output(path: str | Path, content: str | bytes) -> None:
    """content: with `MARK` in its first 200 bytes; else the file is written once and never replaced."""
    check_output(path)
    replace(Path(path), content.encode() if isinstance(content, str) else content)


def write_picture(path: str | Path, image: Image.Image) -> None:
    """An image as PNG, with `MARK` as its comment."""
    about, buffer = PngInfo(), io.BytesIO()
    about.add_text("Comment", MARK)
    image.save(buffer, "PNG", pnginfo=about)
    write_output(path, buffer.getvalue())


def replace(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Writes beside, flushes, reads back and renames: an OSError leaves the old file, which else goes to `previous`."""
    beside = path.with_name(f"{path.name}.new")
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
        beside.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {path} ({error.strerror or error}); what was there before is still there. "
            f"{len(content) / 2**20:.1f} MB of free space are needed."
        ) from error
