"""Stage 1 of RMMSS: a teacher on all sensors, then Hybrid Prototype Distillation into a robust model.

    python train_stage1.py                                              # synthetic scenes, on the CPU
    python train_stage1.py --data deliver --root data/DELIVER --pretrained mit_b0.pth --amp bf16
    torchrun --nproc_per_node=4 train_stage1.py --data deliver --amp bf16

Writes into the run folder (--out): config.json, log.jsonl, teacher.pt, robust.pt, and last.pt to continue from
(--resume). Next: python train_stage2.py --stage1 RUN.
"""

from engine.options import stage1_options

if __name__ == "__main__":
    OPTIONS = stage1_options(__doc__)  # before torch is imported, so that --help and typing errors answer at once

import copy
import sys

import torch
from torch import nn

import hpdm
from data import draw_present, normalise, open_dataset
from engine import loop, runs
from engine.checkpoint import describe, load_model, save_model
from model import build_model, load_pretrained


def main(o) -> None:
    run = runs.Run(o, "train_stage1.py")
    kwargs = dict(root=o.root, modalities=o.modalities, seed=o.seed, limit=o.limit, depth=o.depth,
                  label_map=o.label_map, skip_broken=o.skip_broken)  # fmt: skip
    train = open_dataset(o.data, split="train", size=o.size, augment=True, **kwargs)
    val = open_dataset(o.data, split="val", size=o.val_size, **kwargs)
    for problem in (*train.broken, *val.broken):
        run.say(f"left out: {problem}")
    state = run.claim(("teacher", "robust"))
    meta = describe(o, train, o.backbone)

    if o.teacher:
        expect = {k: meta[k] for k in ("classes", "modalities", "normalisation", "backbone") if meta[k]}
        teacher, teacher_meta = load_model(o.teacher, run.device, expect, drop_path=o.drop_path, dropout=o.dropout)
        meta["backbone"] = teacher_meta["backbone"]
    elif state and state["phase"] == "robust":
        teacher, _ = load_model(run.folder / "teacher.pt", run.device)
    else:
        torch.manual_seed(o.seed)  # the same start on every process
        teacher = build_model(o.backbone, len(train.classes), train.modalities, o.drop_path, o.dropout).to(run.device)
        if o.pretrained:
            report = load_pretrained(teacher, o.pretrained)
            run.say(f"{o.pretrained} ({report.source}): {len(report.loaded)} tensors loaded, "
                    f"{len(report.missing)} start fresh, {len(report.unexpected)} unused")
        train_teacher(run, teacher, train, val, meta, state)
        teacher, _ = load_model(run.folder / "teacher.pt", run.device)  # the best one, not the last
    if o.teacher and run.rank == 0:
        save_model(run.folder / "teacher.pt", teacher, meta)

    if o.distill_epochs:
        train_robust(run, teacher, train, val, meta, state if state and state["phase"] == "robust" else None)
    then = f"train_stage2.py --stage1 {run.folder}"
    if not o.distill_epochs:
        then = f"train_stage1.py --teacher {run.folder}/teacher.pt --out DIR"
    run.say(f"stage 1 is complete, its models are in {run.folder}.\nNext: python {then}")


def train_teacher(run, teacher: nn.Module, train, val, meta: dict, state: dict | None) -> None:
    """All sensors, cross entropy only (paper, section 4.1)."""
    o, model = run.o, run.parallel(teacher)
    optimizer, scaler = loop.adamw(teacher, o.lr, o.weight_decay), loop.grad_scaler(run.device, o.amp)
    progress = runs.Progress(run, "teacher", teacher, optimizer, scaler, len(train), o.epochs, meta, state)
    for step, (images, labels, names) in progress.batches(train):
        loop.seed_step(o.seed, "teacher", step, run.rank)
        images = images.to(run.device, non_blocking=True)
        images = normalise(images, train.modalities, train.normalisation)  # (B, M, 3, H, W)
        labels = labels.to(run.device, non_blocking=True).long()  # (B, H, W)

        with loop.autocast(run.device, o.amp):
            logits = model(images).logits
        losses = {"ce": hpdm.ohem_cross_entropy(logits, labels, total=run.total)}

        scaler.scale(losses["ce"]).backward()
        progress.check(losses["ce"], losses, names)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if progress.validation_due():
            full = loop.validate(loop.predictor(teacher), val, [tuple(range(len(val.modalities)))], run)[0]
            progress.validated(full["miou_published"], miou=full["miou_published"])


def train_robust(run, teacher: nn.Module, train, val, meta: dict, state: dict | None) -> None:
    """Sensors dropped at random per sample, the teacher's logits and prototypes as targets (section 4.2)."""
    o, classes = run.o, len(train.classes)
    teacher.requires_grad_(False).eval()
    robust = copy.deepcopy(teacher).requires_grad_(True)  # the student starts from the teacher
    model = run.parallel(robust)
    subsets = loop.all_subsets(len(train.modalities))
    optimizer, scaler = loop.adamw(robust, o.lr, o.weight_decay), loop.grad_scaler(run.device, o.amp)
    progress = runs.Progress(run, "robust", robust, optimizer, scaler, len(train), o.distill_epochs, meta, state)
    for step, (images, labels, names) in progress.batches(train):
        generator = loop.seed_step(o.seed, "robust", step, run.rank)
        images = images.to(run.device, non_blocking=True)
        images = normalise(images, train.modalities, train.normalisation)  # (B, M, 3, H, W)
        labels = labels.to(run.device, non_blocking=True).long()  # (B, H, W)
        # Drawn for the whole batch on every process, so that the draw does not depend on their number.
        present = draw_present(o.batch_size, len(train.modalities), generator)  # (B, M)
        match = hpdm.draw_match(o.batch_size, len(train.modalities), o.match, generator)  # (B, M)
        pairs = present.sum() / run.world
        present, match = present[run.rank :: run.world], match[run.rank :: run.world]
        pair_weight = present.sum() / pairs  # a mean over this process's pairs becomes one over all processes'
        on_device = present.to(run.device, non_blocking=True), match.to(run.device, non_blocking=True)

        with loop.autocast(run.device, o.amp):
            with torch.no_grad():
                target = teacher(images)
            out = model(images, present)
        losses = {"ce": hpdm.ohem_cross_entropy(out.logits, labels, total=run.total)}
        if o.lambda_kl:
            losses["kl"] = o.lambda_kl * hpdm.distill_logits(out.logits, target.logits)
        if o.alpha:
            distance = hpdm.hpdm_loss(out.per_modality, target.per_modality, labels, *on_device, classes)
            losses["hpdm"] = o.alpha * pair_weight * distance
        if o.beta:
            losses["ifv"] = o.beta * hpdm.feature_variation_loss(
                out.per_modality, target.per_modality, target.fused, labels, on_device[0], classes, run.total
            )

        loss = sum(losses.values())
        scaler.scale(loss).backward()
        progress.check(loss, losses, names)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if progress.validation_due():
            scores = loop.summarise(loop.validate(loop.predictor(robust), val, subsets, run))
            progress.validated(scores["miou"], **scores)


if __name__ == "__main__":
    sys.exit(runs.guarded(main, OPTIONS))
