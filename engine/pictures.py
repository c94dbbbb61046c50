"""Draws a panel: pictures in a grid, a title over every column, a legend of classes below. NumPy and Pillow only.

    draw([[Cell(photo, smooth=True), Cell(labels, "87 %")]], ["rgb", "prediction"], key=[("Road", (128, 64, 128))])

Used by predict.py for its pictures, and so for the one that `make demo` ends with.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH = 2300  # pixels that the columns share, about
NARROWEST, WIDEST = 128, 420  # of a column
GAP, INK, PALE = 6, (30, 30, 30), (130, 130, 130)


class Cell(NamedTuple):
    image: Image.Image
    caption: str = ""  # a few characters, shown in the lower left corner
    smooth: bool = False  # a photograph; label maps and sparse points keep their exact colours when they shrink


def photograph(image: np.ndarray) -> Image.Image:
    """A sensor's (3, H, W) in 0..1 for the eye. Grey ones fill the range: 16-bit depth in millimetres looks black."""
    values = image.transpose(1, 2, 0)  # (H, W, 3)
    if (values == values[..., :1]).all():
        low, high = np.percentile(values, (0, 98))
        values = (values - low) / max(high - low, 1e-6)
    return Image.fromarray(np.rint(255 * values.clip(0, 1)).astype(np.uint8))


def label_map(ids: np.ndarray, palette: list) -> Image.Image:
    """Class ids (H, W) uint8 in the colours of a palette (K, 3); 255, ignored, is black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    return Image.fromarray(table[ids])


def legend(maps: list[np.ndarray], classes: list[str], palette: list) -> list[tuple[str, tuple[int, int, int]]]:
    """Names and colours of the classes that occur in any of the maps of ids."""
    occurring = sorted(set().union(*(np.unique(ids).tolist() for ids in maps)))
    return [(classes[i], tuple(palette[i])) if i < len(classes) else ("ignored", (0, 0, 0)) for i in occurring]


def fit(cell: Cell, width: int) -> Image.Image:
    """Enlarged by a whole factor, so that every pixel is a square of the same size; else shrunk to `width`."""
    w, h = cell.image.size
    if w <= width:
        return cell.image.convert("RGB").resize((w * (width // w), h * (width // w)), Image.Resampling.NEAREST)
    method = Image.Resampling.BOX if cell.smooth else Image.Resampling.NEAREST
    return cell.image.convert("RGB").resize((width, max(1, round(h * width / w))), method)


def wrap(text: str, font, width: int) -> list[str]:
    """Lines no wider than `width`, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def draw(grid: list[list[Cell]], titles: list[str], groups: list[tuple[str, int]] = (), sides: list[str] = (),
         key: list[tuple[str, tuple[int, int, int]]] = (), note: str = "") -> Image.Image:  # fmt: skip
    """The panel as an RGB image.

    grid: rows of cells, one per title; the rows may differ in size.
    groups: (text, number of columns) from left to right, a second heading over the titles; "" leaves a gap.
    sides: a name for every row, written upwards at its left.
    key: names and colours, in a flow of lines; note: a last line of text.
    """
    width = min(max(WIDTH // len(titles) - GAP, NARROWEST), WIDEST)
    rows = [[fit(cell, width) for cell in row] for row in grid]
    width = max(image.width for row in rows for image in row)
    font = ImageFont.load_default(min(max(width // 7, 15), 26))
    line = round(1.3 * font.size)
    words = [[0, *(round(font.getlength(word)) for word in text.split())] for text in sides or [""] * len(rows)]
    heights = [max(*lengths, *(image.height for image in row)) for lengths, row in zip(words, rows, strict=True)]
    names = [wrap(text, font, height) for text, height in zip(sides, heights, strict=False)]
    left = GAP + (line * max(map(len, names)) + GAP if names else 0)
    x = [left + i * (width + GAP) + GAP * sum(i >= end for end in ends(groups)) for i in range(len(titles))]
    total = x[-1] + width + GAP

    headings = [wrap(text, font, width) for text in titles]
    top = GAP + (line + 2 * GAP) * bool(groups) + line * max(map(len, headings)) + GAP
    keys = flow(key, font, total - 2 * GAP - left)
    notes = wrap(note, font, total - 2 * GAP - left) if note else []
    bottom = top + sum(heights) + GAP * len(rows) + GAP
    panel = Image.new("RGB", (total, bottom + line * (len(keys) + len(notes)) + 2 * GAP), "white")
    pen = ImageDraw.Draw(panel)

    first = 0
    for text, count in groups:
        if text:
            span = x[first], x[first + count - 1] + width
            pen.text((sum(span) / 2, GAP), text, INK, font, "ma")
            pen.line((span[0], GAP + line + 2, span[1], GAP + line + 2), PALE, 2)
        first += count
    for column, lines in zip(x, headings, strict=True):
        for i, text in enumerate(reversed(lines)):
            pen.text((column + width / 2, top - GAP - i * line), text, INK, font, "md")

    y = top
    for r, (row, height) in enumerate(zip(rows, heights, strict=True)):
        if names:
            side = Image.new("RGB", (height, left - 2 * GAP), "white")
            for i, text in enumerate(reversed(names[r])):
                ImageDraw.Draw(side).text((height / 2, side.height - i * line), text, INK, font, "md")
            panel.paste(side.rotate(90, expand=True), (GAP, y))
        for column, image, cell in zip(x, row, grid[r], strict=True):
            panel.paste(image, (column, y))
            if cell.caption:
                box = pen.textbbox((column + GAP, y + image.height - GAP), cell.caption, font, "ld")
                pen.rectangle((column, box[1] - 4, box[2] + GAP, y + image.height - 1), "white")
                pen.text((column + GAP, y + image.height - GAP), cell.caption, INK, font, "ld")
        y += height + GAP

    y = bottom
    for entries in keys:
        for offset, (name, colour) in entries:
            pen.rectangle((left + offset, y + 3, left + offset + line - 8, y + line - 5), tuple(colour), PALE)
            pen.text((left + offset + line, y), name, INK, font)
        y += line
    for text in notes:
        pen.text((left, y), text, PALE, font)
        y += line
    return panel


def ends(groups: list[tuple[str, int]]) -> list[int]:
    """The columns before which a group ends."""
    return [sum(count for _, count in groups[: i + 1]) for i in range(len(groups))]


def flow(key: list, font, width: int) -> list[list[tuple[int, tuple]]]:
    """The key's entries in lines no wider than `width`, each with its offset from the left."""
    lines, offset = [], width + 1
    for name, colour in key:
        needed = round(1.3 * font.size + font.getlength(name) + font.size)
        if offset + needed > width:
            lines.append([])
            offset = 0
        lines[-1].append((offset, (name, colour)))
        offset += needed
    return lines
