"""Draws a panel: pictures in a grid, a title over every column, a legend of classes below. NumPy and Pillow only."""

import textwrap
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, NARROWEST, WIDEST = 2300, 128, 420  # pixels: of all columns, about; of a column, at least and at most
GAP, INK, PALE = 6, (30, 30, 30), (130, 130, 130)


class Cell(NamedTuple):
    image: Image.Image
    caption: str = ""  # a few characters, shown in the lower left corner
    smooth: bool = False  # a photograph; label maps keep their exact colours when they shrink


def photograph(image: np.ndarray) -> Image.Image:
    """A modality's image (H, W, 1 or 3), uint8 or float 0..1, for display. Grey is stretched: depth may look black."""
    values = image / 255 if image.dtype == np.uint8 else image
    grey = (values == values[..., :1]).all()
    low, high = np.percentile(values, (0, 98)) if grey else (0, 1 if image.dtype == np.uint8 else values.max())
    values = (values - low) / max(high - low, 1e-6)
    return Image.fromarray(np.rint(255 * values.clip(0, 1)).astype(np.uint8).repeat(3 // image.shape[2], 2))


def label_map(ids: np.ndarray, palette: list) -> Image.Image:
    """Class ids (H, W) uint8 in the colours of a palette (K, 3); 255, ignored, is black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    return Image.fromarray(table[ids])


def fit(cell: Cell, width: int) -> Image.Image:
    """Enlarged by a whole factor, so that every pixel is a square of the same size; else shrunk to `width`."""
    w, h = cell.image.size
    scale = width // w or width / w
    method = Image.Resampling.BOX if cell.smooth and scale < 1 else Image.Resampling.NEAREST
    return cell.image.convert("RGB").resize((round(w * scale), max(1, round(h * scale))), method)


def draw(grid: list[list[Cell]], titles: list[str], sides=(), key=(), note: str = "") -> Image.Image:
    """The panel as an RGB image. grid: rows of cells, a cell for each title; rows may differ in size. sides: a name
    for each row, above it; key: names and colours, shown below; note: a last line of text."""
    width = min(max(WIDTH // len(titles) - GAP, NARROWEST), WIDEST)
    rows = [[fit(cell, width) for cell in row] for row in grid]
    width = max(image.width for row in rows for image in row)
    font = ImageFont.load_default(min(max(width // 7, 15), 26))
    line, letter, total = round(1.3 * font.size), font.getlength("n"), len(titles) * (width + GAP) + GAP
    headings = [textwrap.fill(title, int(width / letter)) for title in titles]
    y = GAP + line * max(text.count("\n") + 1 for text in headings)
    tall = sum(max(image.height for image in row) + line + GAP for row in rows) + line * (len(key) + 20)
    panel = Image.new("RGB", (total, y + tall), "white")  # cut below to what was drawn
    pen = ImageDraw.Draw(panel)
    for i, text in enumerate(headings):
        pen.text((GAP + i * (width + GAP) + width / 2, y), text, INK, font, "md", align="center")
    y += GAP
    for row, cells, side in zip(rows, grid, sides or [""] * len(grid), strict=True):
        pen.text((GAP, y), side, INK, font)
        y += line * bool(sides)
        for i, (image, cell) in enumerate(zip(row, cells, strict=True)):
            corner = 2 * GAP + i * (width + GAP), y + image.height - GAP
            panel.paste(image, (corner[0] - GAP, y))
            pen.text(corner, cell.caption, INK, font, "ld", stroke_width=4, stroke_fill="white")
        y += max(image.height for image in row) + GAP
    column = line + 3 * GAP + round(max((font.getlength(name) for name, _ in key), default=0))  # of the key
    columns = max(1, total // column)
    for i, (name, colour) in enumerate(key):
        left, top = GAP + i % columns * column, y + i // columns * line
        pen.rectangle((left, top + 3, left + line - 8, top + line - 5), tuple(colour), PALE)
        pen.text((left + line, top), name, INK, font)
    y += -(-len(key) // columns) * line
    lines = textwrap.wrap(note, int(total / letter))
    pen.text((GAP, y), "\n".join(lines), PALE, font)
    return panel.crop((0, 0, total, y + line * len(lines) + GAP))
