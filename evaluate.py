"""Evaluates models on every protocol of the paper: which modalities are missing, how they fail, in which weather.

    python evaluate.py runs/deliver/student.pt --data deliver
    python evaluate.py runs/demo                                    # all models of a run, with switch and FSM ensemble
    python evaluate.py a.pt b.pt --protocol any,emm,rmm,nm,condition,case --json out.json --markdown table.md

Under emm and rmm the failure is not announced: every modality is declared present to the models. The switch and the
ensemble's selection do know which modalities work, an advantage in those rows.
Writes nothing but what --json and --markdown name. Seeded per frame: no batch size, worker or process count changes
a number. torchrun --nproc_per_node=N evaluate.py ... shares the frames out.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

import kernels
import metrics
from data import FrameDataset, normalise, random_missing, sensor_noise
from engine import loop, runs
from engine.files import MARK, check_output, write_output
from engine.options import COUNT, COUNT_OR_0, DEVICES, RECIPES, Parser, names
from engine.subsets import all_subsets, ensemble_predictor, predictor, switch_predictor
from engine.trained import caption, load_models, open_data

PROTOCOLS = {  # section 5
    "any": "any-modality: every subset, the other modalities left out",
    "emm": "EMM: every subset, the others zero-filled; E(p): expectation when each fails with probability p",
    "rmm": "RMM: every subset, the others lose each value with probability r; means, and E(p) as in EMM",
    "nm": "NM: all modalities, with salt and pepper and Gaussian noise",
    "condition": "all modalities, by weather",
    "case": "all modalities, by sensor failure",
}
RMM_RATES = (0.25, 0.5, 0.75)
NM_LEVELS = ("low", "mid", "high")
FAILURE_RATES = (0.2, 0.1, 0.05)
GROUPED = ("condition", "case")  # answered with all modalities, counted by what each frame is of


def options(argv: list[str] | None = None) -> argparse.Namespace:
    listed = "\n".join(f"    {name:<9}  {what}" for name, what in PROTOCOLS.items())
    parser = Parser("evaluate.py", f"{__doc__}\nprotocols:\n{listed}")
    parser.add_argument("checkpoint", nargs="+", help="model files, or run folders: all that they hold")
    parser.add_argument("--only", type=names, help="of all the rows that run folders give, these, by comma")
    parser.add_argument("--protocol", type=names, default=["any"], help=f"by comma, of {', '.join(PROTOCOLS)}, or all")
    add = parser.add_argument_group("data", "by default what the first checkpoint was trained on").add_argument
    add("--data", choices=RECIPES)
    add("--root", help="folder of the data set")
    add("--split", default="val", choices=("train", "val", "test"), help="papers report val")
    add("--size", type=COUNT, help="shorter side in pixels, then both go up to multiples of 32. None: --val-size")
    add("--label-map", help="folder data: label ids to classes, as in training")
    add("--skip-broken", type=COUNT_OR_0, default=0, metavar="N", help="leave out at most N broken frames, listed")
    add("--limit", type=COUNT, help="only N frames, spread evenly")
    add("--batch-size", type=COUNT, default=8, help="frames; changes memory and speed only")
    add("--workers", type=COUNT_OR_0, default=0, help="loader processes")
    add("--device", choices=DEVICES, default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision")
    add("--seed", type=COUNT_OR_0, default=0, help="of the rmm and nm corruptions")
    add = parser.add_argument_group("models and output").add_argument
    add("--fsm-rule", choices=kernels.RULES, help="of the FSM ensemble. None: the one it was trained with")
    add("--fsm-level", choices=("both", "features", "logits"), default="both", help="what it selects")
    add("--json", metavar="FILE", help="every score of every column")
    add("--markdown", metavar="FILE", help="the printed tables, for a paper or README")
    args = parser.parse_args(argv)
    args.protocol = list(PROTOCOLS) if args.protocol == ["all"] else args.protocol
    if unknown := sorted(set(args.protocol) - set(PROTOCOLS)):
        parser.error(f"--protocol {unknown[0]} is unknown; choose of {', '.join(PROTOCOLS)}, or all.")
    return args


def load_rows(
    paths: list[str], device: torch.device, same: list[str], level: str = "both", rule: str | None = None
) -> tuple[dict[str, Callable], dict]:
    """Row name -> predict(images, subsets, degraded), and the first model's meta.

    A folder gives a row per model, the switch and the ensemble. same: what all models must have been trained with,
    since all are evaluated on the same images.
    """
    rows, first = {}, None
    for path in map(pathlib.Path, paths):
        models, selection, first = load_models(path, device, same, first)
        found = {name: predictor(model) for name, model in models.items()}
        if {"teacher", "robust"} <= set(models):
            sources = models["teacher"], models["robust"]
            found["switch"] = switch_predictor(*sources)
            if selection:
                found["FSM ensemble"] = ensemble_predictor(selection, *sources, level, rule)
        elif selection:
            print(f"{path}: no row for the FSM ensemble, its teacher.pt and robust.pt lie elsewhere", file=sys.stderr)
        for name, predict in found.items():
            row = f"{path}/{name}" if path.is_dir() and len(paths) > 1 else name
            rows[str(path) if row in rows else row] = predict  # two files of one name keep a row each
    return rows, first


def subset_name(subset: tuple[int, ...], modalities: list[str]) -> str:
    """Initials in order, 'RDEL'; whole names where two modalities share an initial."""
    initials = [name[0].upper() for name in modalities]
    if len(set(initials)) < len(initials):
        return "+".join(modalities[m] for m in subset)
    return "".join(initials[m] for m in subset)


def columns(protocol: str, dataset: FrameDataset) -> list[str]:
    """The names of a protocol's results on this data set."""
    if protocol in GROUPED:
        return sorted({getattr(frame, protocol) for frame in dataset.frames})
    subsets = [subset_name(subset, dataset.modalities) for subset in all_subsets(len(dataset.modalities))]
    rates = [f"{name} {r}" for r in RMM_RATES for name in subsets]
    return {"rmm": rates, "nm": list(NM_LEVELS)}.get(protocol, subsets)


def answers(
    protocol: str, predict: Callable, images: Tensor, frames: list[str], modalities: list[str], seed: int
) -> Iterator[Tensor]:
    """Logits (B, K, H, W) of normalised images (B, M, 3, H, W) for each of `columns`; frames: their B names."""
    subsets, damaged = all_subsets(len(modalities)), torch.zeros(images.shape[:2], dtype=torch.bool)
    if protocol == "any":
        yield from predict(images, subsets)
    if protocol == "emm":
        yield from predict(images, subsets, torch.zeros_like(images[:1]))
    for r in RMM_RATES if protocol == "rmm" else ():
        # a modality's damage does not depend on which others are missing, so all subsets share it
        yield from predict(images, subsets, random_missing(images, damaged, r, frames, seed))
    for level in NM_LEVELS if protocol == "nm" else ():
        yield from predict(sensor_noise(images, level, frames, modalities, seed), subsets[-1:])


@torch.inference_mode()
def evaluate(predict: Callable, dataset: FrameDataset, args: argparse.Namespace, run: runs.Run) -> dict[str, dict]:
    """protocol -> column -> metrics.scores, over this data set."""
    k, full = len(dataset.classes), all_subsets(len(dataset.modalities))[-1:]
    counts = {protocol: {column: torch.zeros(k, k, dtype=torch.int64, device=run.device)
                         for column in columns(protocol, dataset)} for protocol in args.protocol}  # fmt: skip
    grouped = [protocol for protocol in args.protocol if protocol in GROUPED]
    batches = [part.tolist() for part in torch.arange(len(dataset)).split(args.batch_size)][run.rank :: run.world]
    source = loop.loader(dataset, batches, args.workers, run.device)
    for indices, (images, labels, frames) in zip(batches, source, strict=True):
        images = normalise(images.to(run.device, non_blocking=True), dataset.modalities, dataset.normalisation)
        labels = labels.to(run.device, non_blocking=True).long()  # (B, H, W)
        with loop.autocast(run.device, args.amp):
            for protocol in [protocol for protocol in args.protocol if protocol not in GROUPED]:
                found = answers(protocol, predict, images, frames, dataset.modalities, args.seed)
                for matrix, logits in zip(counts[protocol].values(), found, strict=True):
                    matrix += metrics.confusion(metrics.class_ids(logits, frames), labels, k)
            ids = metrics.class_ids(next(iter(predict(images, full))), frames) if grouped else None
        for protocol in grouped:
            for b, index in enumerate(indices):
                counts[protocol][getattr(dataset.frames[index], protocol)] += metrics.confusion(ids[b], labels[b], k)
    totals = [run.total(torch.stack(list(matrices.values()))) for matrices in counts.values()]
    if not any(matrices.any() for matrices in totals):
        raise ValueError(f"not one pixel of the {len(dataset)} frames has a label; choose another --split or --root.")
    return {protocol: dict(zip(counts[protocol], map(metrics.scores, matrices), strict=True))
            for protocol, matrices in zip(counts, totals, strict=True)}  # fmt: skip


def summary(protocol: str, scores: dict[str, dict], modalities: list[str], rule: str = "miou_published") -> dict:
    """The summary columns of a protocol's table -> value in per cent. Apart from its data columns: those are named by
    the data set, and a weather may be called "mean"."""
    values, table = [s[rule] for s in scores.values()], {}
    if protocol == "any":
        *missing, table["full"] = values
        table |= {"missing": fmean(missing)} if missing else {}
    there = np.array([len(subset) for subset in all_subsets(len(modalities))])
    for i, rate in enumerate({"emm": [""], "rmm": [f"r={r}" for r in RMM_RATES]}.get(protocol, [])):
        part = values[i * len(there) : (i + 1) * len(there)]  # of all subsets, at this rate
        table |= {rate: fmean(part)} if rate else {}
        for p in FAILURE_RATES:
            odds = p ** (len(modalities) - there) * (1 - p) ** there
            table[f"{rate} E({p})".strip()] = float(np.average(part, weights=odds))
    return {**table, "mean": fmean(values)}


def tables(results: dict, modalities: list[str], protocols: list[str]) -> str:
    """One aligned Markdown table per protocol; with several rows, differences to the first in the summary columns."""
    out = []
    for protocol in protocols:
        first, cells = {}, []
        for name, scores in results.items():
            shown = {} if protocol == "rmm" else scores[protocol]
            means = summary(protocol, scores[protocol], modalities)
            texts = [f"{s['miou_published']:.2f}" for s in shown.values()]
            texts += [f"{v:.2f}" + (f" ({v - first[c]:+.2f})" if first else "") for c, v in means.items()]
            occurring = summary(protocol, scores[protocol], modalities, "miou_occurring")["mean"]
            cells.append([name, *texts, f"{occurring:.2f}"])  # last: the other rule for absent classes
            first = first or means
        cells.insert(0, ["", *shown, *means, "mean, occurring"])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
        out.append(f"**{PROTOCOLS[protocol]}**\n")
        for name, *texts in cells:
            texts = [name.ljust(widths[0]), *map(str.rjust, texts, widths[1:])]
            out.append(f"| {' | '.join(texts)} |")
        out.append("")
    return "\n".join(out[:-1])


def main(args: argparse.Namespace) -> None:
    check_output(args.json, ".json")  # now, not after an hour of evaluation
    check_output(args.markdown, ".md")
    run = runs.Run(args, "evaluate.py")
    same = ["classes", "modalities", "depth", "normalisation"]
    same += [name for name, given in (("label_map", args.label_map), ("val_size", args.size)) if not given]
    rows, meta = load_rows(args.checkpoint, run.device, same, args.fsm_level, args.fsm_rule)
    if unknown := sorted(set(args.only or ()) - set(rows)):
        raise ValueError(f"--only {unknown[0]}: {args.checkpoint[0]} gives no such row, but {', '.join(rows)}.")
    size = args.size or meta["val_size"]
    dataset = open_data(meta, args.data, args.root, args.split, size, limit=args.limit, label_map=args.label_map,
                        skip_broken=args.skip_broken)  # fmt: skip
    for problem in dataset.broken:
        run.say(f"left out: {problem}")
    results = {name: evaluate(rows[name], dataset, args, run) for name in rows if name in (args.only or rows)}
    if run.rank:
        return
    about = (f"{caption(dataset, args.split, meta)}, size {size}; mIoU in per cent, absent classes count as 0 "
             "(published rule); last column: mean over the classes that occur")
    text = f"{about}\n\n{tables(results, dataset.modalities, args.protocol)}\n"
    report = {"file": MARK, "about": about, "options": vars(args), "versions": loop.versions(),
              "classes": meta["classes"], "results": results}  # fmt: skip
    try:  # save first, for printing may fail on a closed terminal; print in any case, for the disk may be full
        if args.markdown:
            write_output(args.markdown, f"<!-- {MARK} -->\n{text}")
        if args.json:
            write_output(args.json, json.dumps(report, indent=1) + "\n")
    finally:
        run.say(text)


if __name__ == "__main__":
    sys.exit(runs.guarded(main, options()))
