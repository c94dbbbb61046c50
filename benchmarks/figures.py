"""Draws the figures of the docs.

    python -m benchmarks.figures derived --root data/NYUDepthv2 --out docs/derived.png
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="figure", required=True)
    command = commands.add_parser("derived", help="four real frames with their derived modalities")
    command.add_argument("--root", type=Path, required=True, help="the folder NYUDepthv2")
    command.add_argument("--frames", default="0015,0411,1347,1383", help="comma-separated names")
    command.add_argument("--out", type=Path, required=True, help="the PNG to write, in 160 colours")
    args = parser.parse_args()
    try:
        figure = derived(args.root, args.frames.split(","))
        figure.quantize(160, dither=Image.Dither.NONE).save(args.out, optimize=True)
    except (ValueError, OSError) as error:
        print(f"figures.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
