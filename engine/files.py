"""Outputs of the scripts: written whole or not at all, and never over a file that this program did not write.

    check_output(path)            # before an hour of work: raises if the file may not be written
    write_output(path, text)      # beside it, then renamed
    write_picture(path, image)    # a PNG
"""

import io
import os
import pathlib

from PIL import Image
from PIL.PngImagePlugin import PngInfo

MARK = "written by RMMSS"  # near the beginning of every output, so that a later run knows what it may replace


def check_output(path: str | pathlib.Path | None, ending: str = "") -> None:
    """Raises ValueError with a sentence if the path may not be written; None stands for no output."""
    if path is None:
        return
    if not str(path).endswith(ending):
        raise ValueError(f"the output '{path}' must end in {ending}.")
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file.")
    if path.exists():
        with open(path, "rb") as file:
            if MARK.encode() not in file.read(200):
                raise ValueError(f"{path} exists and is not marked as {MARK}; choose another name, or remove it.")


def write_output(path: str | pathlib.Path, content: str | bytes) -> None:
    """Writes the whole file or, when the disk is full, leaves the old one as it was.

    content: with `MARK` in its first 200 bytes; else the file is written once and never replaced.
    """
    check_output(path)
    beside = f"{path}.new-{os.getpid()}"
    try:
        with open(beside, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        pathlib.Path(beside).unlink(missing_ok=True)
        reason = error.strerror or error
        raise OSError(f"cannot write {path} ({reason}); what was there before is still there.") from error


def write_picture(path: str | pathlib.Path, image: Image.Image) -> None:
    """An image as PNG, with `MARK` as its comment."""
    about, buffer = PngInfo(), io.BytesIO()
    about.add_text("Comment", MARK)
    image.save(buffer, "PNG", pnginfo=about)
    write_output(path, buffer.getvalue())
