"""Draws every PNG of the docs but the panels, which predict.py draws.

python -m benchmarks.figures prototypes runs/demo --out docs/prototypes.png    # do the modalities agree on a class?
python -m benchmarks.figures selection runs/demo --out docs/selection.png      # where the FSM takes the teacher
python -m benchmarks.figures lost runs/demo/results.json --out docs/lost.png   # mIoU over lost modalities
python -m benchmarks.figures curves runs/demo/log.jsonl --out docs/curves.png  # losses and mIoU while training
python -m benchmarks.figures scatter benchmarks/results/*.json --out docs/scatter.png    # all modalities, some missing
"""

import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data import normalise, say
from engine.checkpoint import fitting
from engine.inference import load_models, open_data
from engine.options import Parser
from engine.output import check_output, write_picture
from engine.pictures import Cell, draw, photograph
from engine.runs import guarded
from engine.subsets import present_of, subset_outputs
from hpdm import labels_at
from kernels import reference

INK, PALE, GRID = (40, 40, 40), (110, 110, 110), (225, 225, 225)
COLOURS = {"teacher": (40, 90, 190), "robust": (200, 60, 40), "fsm": (150, 120, 40), "student": (40, 140, 70)}
COLOURS["single"] = (130, 60, 150)


def axis(values: list[float], first: int, last: int) -> tuple[Callable, list[tuple[str, float]]]:
    """An axis from pixel `first` to `last` -> a function from value to pixel; at most seven ticks (text, pixel)."""
    step = next(m * 10**e for e in range(-3, 9) for m in (1, 2, 5) if max(values) - min(values) <= 6 * m * 10**e)
    low = math.floor(min(values) / step)
    high = max(math.ceil(max(values) / step), low + 1)

    def at(value: float) -> float:
        return first + (value / step - low) / (high - low) * (last - first)

    return at, [(f"{n * step:g}", at(n * step)) for n in range(low, high + 1)]


def chart(title: str, x_label: str, ticks: dict, series: dict, colours: dict = COLOURS) -> Image.Image:
    """Lines over x, at most eight, their legend below. ticks: x -> text. series: name -> {x: y}."""
    shown = [y for points in series.values() for y in points.values()]
    if not shown:
        raise ValueError(f"nothing to draw for {title}: the file does not hold these numbers.")
    image = Image.new("RGB", (1520, 1040), "white")  # as many rows for the legend as may be needed
    pen, font, small = ImageDraw.Draw(image), ImageFont.load_default(36), ImageFont.load_default(32)
    pen.text((120, 48), title, INK, ImageFont.load_default(44), "lm")
    pen.text((800, 784), x_label, INK, font, "mm")
    up, heights = axis(shown, 700, 120)
    for text, y in heights:
        pen.line((120, y, 1480, y), GRID, 2)
        pen.text((104, y), text, PALE, small, "rm")
    left, width = min(ticks), max(ticks) - min(ticks) or 1  # in units of x
    for x, text in ticks.items():
        pen.text((170 + (x - left) / width * 1260, 736), text, PALE, small, "mm")
    for i, (name, points) in enumerate(series.items()):
        colour, line = colours[name], [(170 + (x - left) / width * 1260, up(y)) for x, y in points.items()]
        pen.line(line, colour, 6, "curve")
        for point in line if len(line) < 30 else ():
            pen.circle(point, 9, colour)
        x, y = 120 + 690 * (i % 2), 850 + 50 * (i // 2)
        pen.line((x, y, x + 60, y), colour, 8)
        pen.text((x + 80, y), name, INK, font, "lm")
    return image


def per_cent(values: list[float]) -> list[float]:
    if not all(0 <= value <= 100 for value in values):
        raise ValueError("a score is not in 0..100")
    return values


def scatter(*files: Path) -> Image.Image:
    """A point for each row that has a label and is not far below the others: mIoU with all modalities, mean over the
    subsets with some missing. Its cross is the range over seeds. A panel for each file of benchmarks.reproduce."""
    panels = []
    for file in files:
        results, rows = json.loads(file.read_text()), {}
        with fitting(f"{file} holds no results of benchmarks.reproduce"):
            for row, label in results["labels"].items():
                if label and (seeds := results["scores"].get(row)):
                    rows[label] = [per_cent([s[column] for s in seeds.values()]) for column in ("full", "missing")]
            if not rows:
                raise ValueError("none of its rows has both a label and scores")
        panels.append(scatter_panel(results.get("title", file.stem), rows))
    return Image.fromarray(np.hstack(panels))


def scatter_panel(title: str, rows: dict[str, list[list[float]]]) -> Image.Image:
    """rows: label -> [x values, y values], a value for each seed. Those whose y is 5 points below the median are named
    instead, lest they press the others together."""
    bottom = median(fmean(y) for _, y in rows.values()) - 5
    below = [f"{label} {fmean(x):.1f} / {fmean(y):.1f}" for label, (x, y) in rows.items() if fmean(y) < bottom]
    rows = {label: points for label, points in rows.items() if fmean(points[1]) >= bottom}
    image = Image.new("RGB", (1520, 1120), "white")
    pen, font, small = ImageDraw.Draw(image), ImageFont.load_default(34), ImageFont.load_default(32)
    across, columns = axis([v for x, _ in rows.values() for v in x], 150, 1470)
    up, heights = axis([v for _, y in rows.values() for v in y], 970, 180)
    pen.text((120, 48), title, INK, ImageFont.load_default(44), "lm")
    pen.text((120, 92), "mean mIoU with modalities missing, over mIoU with all, in per cent", PALE, small, "lm")
    pen.text((120, 132), f"below this picture: {'; '.join(below)}" if below else "", PALE, small, "lm")
    for text, x in columns:
        pen.line((x, 970, x, 180), GRID, 2)
        pen.text((x, 1000), text, PALE, small, "mm")
    for text, y in heights:
        pen.line((150, y, 1470, y), GRID, 2)
        pen.text((134, y), text, PALE, small, "rm")
    points, taken = {}, []  # label -> pixel; boxes: left, top, right, bottom
    for label, (xs, ys) in rows.items():
        x, y = points[label] = across(fmean(xs)), up(fmean(ys))
        for line in (across(min(xs)), y, across(max(xs)), y), (x, up(max(ys)), x, up(min(ys))):
            pen.line(line, COLOURS["teacher"], 4)
            taken.append(line)
        pen.circle((x, y), 10, COLOURS["teacher"])
    for label, (x, y) in points.items():  # each where it covers least, and then near its point
        width, places = font.getlength(label) / 2, []
        for radius, turn in itertools.product(range(24, 300, 24), range(16)):
            cx = x + math.cos(turn * math.pi / 8) * (radius + width)
            cy = y + math.sin(turn * math.pi / 8) * (radius + 17)
            box = cx - width, cy - 17, cx + width, cy + 17
            sides = [[min(box[i + 2], t[i + 2]) - max(box[i], t[i]) + 16 for i in (0, 1)] for t in taken]
            covered = sum(max(0, w) * max(0, h) for w, h in sides)
            outside = max(0, 140 - box[0]) + max(0, box[2] - 1510) + max(0, 170 - box[1]) + max(0, box[3] - 970)
            way = [(x + i * (cx - x) / 8, y + i * (cy - y) / 8) for i in range(8)]  # the line to its point
            crossed = sum(b[0] <= px <= b[2] and b[1] <= py <= b[3] for px, py in way for b in taken[2 * len(rows) :])
            places.append((covered + 1000 * (outside + crossed), radius, turn, (cx, cy), box))
        _, radius, _, middle, box = min(places)
        if radius > 24:
            end = (min(max(v, low), high) for v, low, high in zip((x, y), box[:2], box[2:], strict=True))
            pen.line((x, y, *end), PALE, 2)
        pen.text(middle, label, INK, font, "mm")
        taken.append(box)
    return image


def lost(file: Path) -> Image.Image:
    """Mean mIoU over the subsets in which 0, 1, 2 ... modalities are lost; a JSON file of evaluate.py."""
    report, series, ticks = json.loads(file.read_text()), defaultdict(dict), {}
    if others := report["results"].keys() - COLOURS.keys():
        say(f"not drawn: {', '.join(sorted(others))}")
    for model in [name for name in COLOURS if name in report["results"]]:
        scores = {name: s[f"miou_{report['rule']}"] for name, s in report["results"][model].get("any", {}).items()}
        joined = any("+" in name for name in scores)  # "rgb+depth", else initials
        size = {name: name.count("+") + 1 if joined else len(name) for name in scores}
        m = max(size.values(), default=0)
        if len(scores) != 2**m - 1:
            raise ValueError(f"its row {model} has {len(scores)} of the {2**m - 1} subsets of {m} modalities")
        for n in range(m):
            series[model][n] = fmean(per_cent([scores[name] for name in scores if size[name] == m - n]))
            ticks[n] = f"{n} of {m}"
    title = f"mIoU in per cent ({report['rule']} rule), mean over the subsets"
    return chart(title, "modalities lost", ticks, series)


def curves(file: Path) -> Image.Image:
    """Losses and validation mIoU of all phases of a run, one after the other; its log.jsonl."""
    losses, scores, begun, now = defaultdict(dict), defaultdict(dict), {}, 0
    for text in [line for line in file.read_text().splitlines() if line.endswith("}")]:  # a crash tears lines
        line = json.loads(text)
        phase = line["phase"]
        before, now = now, begun.setdefault(phase, now) + line["step"]  # steps since the run began
        if now < before:
            raise ValueError("its steps go back: it is of two runs")
        if "lr" in line:  # a report, its losses stand before the learning rate
            losses[phase][now] = sum(list(line.values())[3 : list(line).index("lr")])
        else:  # the paper's teacher is validated on all modalities alone
            scores[f"{phase}, all"][now] = line.get("miou_full", line["miou"])
            if "miou_missing" in line:
                scores[f"{phase}, some missing"][now] = line["miou_missing"]
    colours = {f"{phase}, all": colour for phase, colour in COLOURS.items()}
    colours |= {f"{phase}, some missing": tuple((255 + c) // 2 for c in colour) for phase, colour in COLOURS.items()}
    ticks, x_label = {0: "0", now: str(now)}, "steps, all phases one after the other"
    left = chart("Loss, sum of its terms", x_label, ticks, losses)
    return Image.fromarray(np.hstack((left, chart("Validation mIoU in per cent", x_label, ticks, scores, colours))))


@torch.inference_mode()
def prototypes(run: Path) -> Image.Image:
    """Cosine between two modalities' class prototypes (eq. 4, each the mean over 64 frames), mean over the classes.
    Their mean over the classes is subtracted first: the softmax of the loss does not see it either."""
    models, _, meta = load_models(run, torch.device("cpu"))
    dataset = open_data(meta, None, None, "val", meta["val_size"], limit=64)
    names = dataset.modalities
    if len(names) < 2:
        raise ValueError(f"it has one modality, {names[0]}, and a cosine needs two")
    pairs = list(itertools.combinations(range(len(names)), 2))
    by_stage, by_pair = defaultdict(dict), {}
    for model_name, model in models.items():
        sums, counts = [0.0] * 4, [0.0] * 4
        for image, label, _ in dataset:
            features = model(normalise(image[None], *dataset.normalisation)).per_modality  # 4 x (1, M, C, h, w)
            for i, f in enumerate(features):
                y = labels_at(label[None].long(), f.shape[-2:])
                mean, count = reference.prototype_pool(f, y, len(dataset.classes))  # (1, M, K, C), (1, K)
                sums[i] += mean[0] * count[0, :, None]
                counts[i] += count[0]
        for stage, (total, count) in enumerate(zip(sums, counts, strict=True), 1):
            p = (total / count[:, None])[:, count > 0]  # (M, K', C): of the classes that occur
            p -= p.mean(1, keepdim=True)
            cosines = [float(F.cosine_similarity(p[m], p[n]).mean()) for m, n in pairs]
            by_stage[model_name][stage] = fmean(cosines)
        by_pair[model_name] = dict(enumerate(cosines))
    ticks, title = {i: str(i) for i in range(1, 5)}, "Cosine between two modalities' prototypes"
    left = chart(title, "stage, mean over the pairs", ticks, by_stage)
    ticks = {i: f"{names[m]}-{names[n]}" for i, (m, n) in enumerate(pairs)}
    return Image.fromarray(np.hstack((left, chart("The same at stage 4", "pair of modalities", ticks, by_pair))))


@torch.inference_mode()
def selection(run: Path) -> Image.Image:
    """Where the FSM takes the teacher: by its own rule and the published one, with and without the first modality."""
    models, fsm, meta = load_models(run, torch.device("cpu"))
    if not fsm or not {"teacher", "robust"} <= set(models):
        raise ValueError(f"{run} must hold teacher.pt, robust.pt and fsm.pt: give a run that has finished both stages.")
    dataset = open_data(meta, None, None, "val", meta["val_size"], limit=1)
    names, (image, _, frame), grid, sides = dataset.modalities, dataset[0], [], []
    scene = photograph(image[0].permute(1, 2, 0).numpy())
    images, every = normalise(image[None], *dataset.normalisation), tuple(range(len(names)))
    for rule, subset in itertools.product(dict.fromkeys((fsm.rule, "hard")), (every, every[1:])):
        sources = [next(subset_outputs(models[name], images, [subset])) for name in ("teacher", "robust")]
        selected = fsm(sources, present_of(subset, images.shape[:2]), rule)
        grid.append([Cell(scene)])
        for x, teacher, robust in zip(*((*out.fused, out.logits) for out in (selected, *sources)), strict=True):
            apart = teacher - robust  # (1, C, h, w); x = robust + share * apart
            share = ((x - robust) * apart).sum(1)[0] / apart.square().sum(1)[0].clamp(min=1e-12)  # (h, w)
            grey = Image.fromarray((255 * share.clamp(0, 1)).byte().numpy())
            picture = ImageOps.colorize(grey, COLOURS["robust"], COLOURS["teacher"]).resize(scene.size, 0)  # nearest
            grid[-1].append(Cell(picture, f"{100 * share.mean():.0f} %"))
        sides.append(f"rule {rule}: {', '.join(names[m] for m in subset)}")
    columns = [f"{names[0]} of {frame}", *(f"stage {i}" for i in range(1, 5)), "logits"]
    key = [("the teacher's feature", COLOURS["teacher"]), ("the robust model's", COLOURS["robust"])]
    return draw(grid, columns, sides, key, "In the corners: mean weight of the teacher. Rule hard: the published one.")


def main(argv: list[str] | None = None) -> None:
    figures = {f.__name__: f for f in (prototypes, selection, lost, curves, scatter)}
    parser = Parser("figures.py", __doc__)
    parser.add_argument("figure", choices=figures)
    parser.add_argument("source", type=Path, nargs="+", help="the file or folder to draw it from; of scatter several")
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    args = parser.parse_args(argv)
    check_output(args.out, ".png")
    if len(args.source) > 1 and args.figure != "scatter":
        parser.error(f"{args.figure} is drawn from one source, not from {args.source[1]} as well.")
    with fitting(f"{args.figure} cannot be drawn from {', '.join(map(str, args.source))}"):
        figure = figures[args.figure](*args.source)
    figure = ImageOps.expand(figure.crop(ImageOps.invert(figure).getbbox()), 20, "white")  # the same margin all round
    write_picture(args.out, figure.quantize(160, dither=Image.Dither.NONE))


if __name__ == "__main__":
    sys.exit(guarded(main))
