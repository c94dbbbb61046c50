"""Draws the figures of the docs.

    python -m benchmarks.figures derived --root data/NYUDepthv2 --out docs/derived.png
    python -m benchmarks.figures sweep benchmarks/results/synthetic-segformer_tiny.json --out docs/sweep.png
"""
import argparse
import json
import math
import statistics
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datasets.derived import derive_event, derive_lidar
from engine.pictures import Cell, draw


def derived(root: Path, names: list[str]) -> Image.Image:
    """Frames of NYU Depth v2 (RGB/NAME.jpg; Depth/NAME.png, 8 bit, 25.5 a metre), each with its derived modalities."""
    grid = []
    for name in names:
        rgb = Image.open(root / "RGB" / f"{name}.jpg").convert("RGB")
        depth = np.asarray(Image.open(root / "Depth" / f"{name}.png"))      # (H, W)
        if depth.dtype != np.uint8:
            raise ValueError(f"{root}/Depth/{name}.png has more than 8 bits; give the copy with 25.5 levels a metre")
        metres = depth.astype(np.float32) / 25.5
        event, lidar = derive_event(np.asarray(rgb), metres, name), derive_lidar(metres, name)
        lidar = np.maximum(lidar, np.roll(lidar, 1, axis=0))                # for the eye
        depth = (255 - 80 * np.log(metres.clip(0.5) / 0.5)).clip(1, 255).astype(np.uint8)       # coded as the lidar
        grid.append([Cell(rgb, name), *(Cell(Image.fromarray(image)) for image in (depth, event, lidar))])
    return draw(grid, ["rgb", "depth", "derived event", "derived lidar"], note=(
        "Real frames of NYU Depth v2. Event and lidar are derived: computed from rgb and depth, not measured. "
        "Events: red is brighter, green is darker than before a small motion of the camera. Depth and lidar: near is "
        "bright; a lidar point is drawn two pixels high."))


SCALE = 3  # everything is drawn so much larger, then shrunk, for smooth lines
INK, PALE, GRID = (30, 30, 30), (130, 130, 130), (225, 225, 225)
CURVES = [("random matching (the paper's)", (200, 60, 40), ["kl", "random_0.1", "random_1", "random_5", "hpdm"]),
          ("same-modality matching", (40, 90, 190), ["kl", "same_0.1", "same_1", "same_5", "same"])]
LEVELS = [("modalities dropped, CE only", (60, 60, 60), "dropped"), ("AnySeg's losses", (150, 110, 40), "anyseg")]


def sweep(files: list[Path]) -> Image.Image:
    """HPDM's weight: mIoU (full, mean of the missing) over alpha, the mean of the seeds as a line and their range as a
    band; one row of two plots for each results file of reproduce.py."""
    width, height = 560, 330
    figure = Image.new("RGB", (2 * width * SCALE, (height * len(files) + 34) * SCALE), "white")
    draw = ImageDraw.Draw(figure, "RGBA")
    for i, file in enumerate(files):
        results = json.loads(file.read_text())
        name = file.stem.replace("-", ", ")
        for j, (column, title) in enumerate((("full", "all modalities"), ("missing", "modalities missing"))):
            box = (j * width + 62, i * height + 44, (j + 1) * width - 16, (i + 1) * height - 46)
            plot(draw, box, f"{name}: {title}", results["scores"], column, f"{results['values']['alpha']:.3g}")
    x = 62.0
    for label, colour, _ in CURVES + LEVELS:
        middle = height * len(files) + 12
        line(draw, [(x, middle), (x + 22, middle)], colour, 2, dashed=(label, colour, _) in LEVELS)
        x = text(draw, (x + 28, middle), label, INK, "lm") + 24
    text(draw, (x, middle), "band: range of the seeds", PALE, "lm")
    return figure.resize((figure.width // SCALE * 2, figure.height // SCALE * 2), Image.Resampling.LANCZOS)


def plot(draw: ImageDraw.ImageDraw, box: tuple, title: str, scores: dict, column: str, published: str) -> None:
    """One plot inside box (left, top, right, bottom)."""
    left, top, right, bottom = box
    values = {row: [s[column] for s in seeds.values()] for row, seeds in scores.items() if seeds}
    shown = [v for _, _, rows in CURVES for row in rows for v in values.get(row, [])]
    shown += [v for _, _, row in LEVELS for v in values.get(row, [])]
    if not shown:
        raise ValueError("no row of the sweep is finished; run python -m benchmarks.reproduce --rows main,sweep")
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if (max(shown) - min(shown)) / s <= 6)
    low, high = math.floor(min(shown) / step) * step, math.ceil(max(shown) / step + 1e-9) * step

    def place(i: float, value: float) -> tuple[float, float]:
        return left + 30 + i * (right - left - 60) / 4, bottom - (value - low) / (high - low) * (bottom - top)

    for n in range(round((high - low) / step) + 1):
        y = place(0, low + n * step)[1]
        line(draw, [(left, y), (right, y)], GRID)
        text(draw, (left - 6, y), f"{low + n * step:g}", PALE, "rm")
    for i, label in enumerate(("0", "0.1", "1", "5", published)):
        text(draw, (place(i, low)[0], bottom + 12), label, PALE, "mm")
    text(draw, (place(0, low)[0], bottom + 27), "KL alone", PALE, "mm")
    text(draw, (place(4, low)[0], bottom + 27), "published", PALE, "mm")
    text(draw, (place(2, low)[0], bottom + 27), "alpha, the weight of HPDM", INK, "mm")
    text(draw, (left, top - 28), title, INK, "lm")
    text(draw, (left, top - 12), "mIoU, per cent", PALE, "lm")
    for _, colour, row in LEVELS:
        if row in values:
            y = place(0, statistics.mean(values[row]))[1]
            line(draw, [(left, y), (right, y)], colour, dashed=True)
    for _, colour, rows in CURVES:
        there = [(i, values[row]) for i, row in enumerate(rows) if row in values]
        band = [place(i, max(v)) for i, v in there] + [place(i, min(v)) for i, v in reversed(there)]
        if len(there) > 1:
            draw.polygon([(x * SCALE, y * SCALE) for x, y in band], fill=(*colour, 40))
        points = [place(i, statistics.mean(v)) for i, v in there]
        line(draw, points, colour, 2)
        for x, y in points:
            draw.ellipse([SCALE * v for v in (x - 3, y - 3, x + 3, y + 3)], fill=colour)


def line(draw: ImageDraw.ImageDraw, points: list, colour: tuple, width: float = 1, dashed: bool = False) -> None:
    if dashed:
        (x, y), (end, _) = points
        while x < end:
            line(draw, [(x, y), (min(x + 6, end), y)], colour, 1.5)
            x += 10
    else:
        draw.line([(x * SCALE, y * SCALE) for x, y in points], fill=colour, width=round(width * SCALE), joint="curve")


def text(draw: ImageDraw.ImageDraw, at: tuple[float, float], words: str, colour: tuple, anchor: str) -> float:
    """Writes and returns where the words end."""
    font = ImageFont.load_default(12 * SCALE)
    draw.text((at[0] * SCALE, at[1] * SCALE), words, colour, font, anchor=anchor)
    return at[0] + font.getlength(words) / SCALE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="figure", required=True)
    command = commands.add_parser("derived", help="four real frames with their derived modalities")
    command.add_argument("--root", type=Path, required=True, help="the folder NYUDepthv2")
    command.add_argument("--frames", default="0015,0411,1347,1383", help="comma-separated names")
    command.add_argument("--out", type=Path, required=True, help="the PNG to write, in 160 colours")
    command = commands.add_parser("sweep", help="mIoU over the weight of HPDM, both matchings")
    command.add_argument("results", type=Path, nargs="+", help="JSON files of reproduce, a row of plots each")
    command.add_argument("--out", type=Path, required=True, help="the PNG to write")
    args = parser.parse_args()
    try:
        figure = sweep(args.results) if args.figure == "sweep" else derived(args.root, args.frames.split(","))
        figure.quantize(160, dither=Image.Dither.NONE).save(args.out, optimize=True)
    except (ValueError, OSError) as error:
        print(f"figures.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
