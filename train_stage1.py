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
from torch import Tensor, nn

import anyseg
import hpdm
from data import draw_present, normalise, open_dataset
from engine import loop, runs
from engine.checkpoint import describe, load_model, save_model
from model import MSegFormer, Output, build_model, condition_on_sensors, load_pretrained


def main(o) -> None:
    run = runs.Run(o, "train_stage1.py")
    kwargs = dict(root=o.root, modalities=o.modalities, seed=o.seed, limit=o.limit, depth=o.depth,
                  label_map=o.label_map, skip_broken=o.skip_broken)  # fmt: skip
    if o.data == "nyuv2":
        kwargs |= {"classes": o.classes, "hold_out": o.hold_out}
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
        teacher = start_model(run, train, o.backbone)
        train_teacher(run, teacher, train, val, meta, state)
        teacher, _ = load_model(run.folder / "teacher.pt", run.device)  # the best one, not the last
    if o.teacher and run.rank == 0 and not state:
        save_model(run.folder / "teacher.pt", teacher, meta)

    if o.distill_epochs:
        # The paper: teacher and student have the same initialisation; the published script: the teacher's own start.
        robust = copy.deepcopy(teacher) if o.robust_from == "teacher" else start_model(run, train, meta["backbone"])
        train_robust(run, teacher, robust, train, val, meta, state if state and state["phase"] == "robust" else None)
    then = f"train_stage2.py --stage1 {run.folder}"
    if not o.distill_epochs:
        then = f"train_stage1.py --teacher {run.folder}/teacher.pt --out DIR"
    run.say(f"stage 1 is complete, its models are in {run.folder}.\nNext: python {then}")


def start_model(run, train, backbone: str) -> nn.Module:
    """The weights that training starts from: --pretrained, or chance; the same for each call and process."""
    o = run.o
    torch.manual_seed(o.seed)
    model = build_model(backbone, len(train.classes), train.modalities, o.drop_path, o.dropout).to(run.device)
    if o.pretrained:
        report = load_pretrained(model, o.pretrained)
        run.say(f"{o.pretrained} ({report.source}): {len(report.loaded)} tensors loaded, "
                f"{len(report.missing)} start fresh, {len(report.unexpected)} unused")
    return model


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
        losses = {"ce": hpdm.ohem_cross_entropy(logits, labels)}

        scaler.scale(losses["ce"]).backward()
        progress.check(losses["ce"], losses, names)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if progress.validation_due():
            full = loop.validate(loop.predictor(teacher), val, [tuple(range(len(val.modalities)))], run)[0]
            progress.validated(full["miou_published"], miou=full["miou_published"])


def train_robust(run, teacher: nn.Module, robust: nn.Module, train, val, meta: dict, state: dict | None) -> None:
    """Modalities dropped at random per sample, the teacher's logits and prototypes as targets (section 4.2)."""
    o, classes, modalities = run.o, len(train.classes), len(train.modalities)
    teacher.requires_grad_(False).eval()
    robust.requires_grad_(True)
    if o.conditioned:
        condition_on_sensors(robust)
    if o.feedback and not isinstance(teacher, MSegFormer):
        raise ValueError(f"--feedback needs one encoder for all modalities: a segformer_*, not {meta['backbone']}.")
    model = run.parallel(robust)
    subsets = loop.all_subsets(modalities)
    optimizer, scaler = loop.adamw(robust, o.lr, o.weight_decay), loop.grad_scaler(run.device, o.amp)
    beside = {"average": loop.Average(robust)} if o.average else {}
    if o.feedback:  # of the shared encoder alone: the decoder serves the dominant modalities, too
        teacher.stages.requires_grad_(True)
        feedback = loop.adamw(teacher, o.lr / 10, o.weight_decay)
        beside |= {"teacher": teacher, "feedback": feedback}
    frames = len(train)
    progress = runs.Progress(run, "robust", robust, optimizer, scaler, frames, o.distill_epochs, meta, state, beside)
    distilled = o.losses == "anyseg" or o.lambda_kl or o.alpha or o.beta or o.feedback
    for step, (images, labels, names) in progress.batches(train):
        generator = loop.seed_step(o.seed, "robust", step, run.rank)
        images = images.to(run.device, non_blocking=True)
        images = normalise(images, train.modalities, train.normalisation)  # (B, M, 3, H, W)
        labels = labels.to(run.device, non_blocking=True).long()  # (B, H, W)
        # Drawn for the whole batch on every process, so that the draw does not depend on their number.
        present = draw_present(o.batch_size, modalities, generator, o.complete)[run.rank :: run.world]  # (B, M)
        match = hpdm.draw_match(o.batch_size, modalities, o.match, generator)[run.rank :: run.world]  # (B, M)
        there, match = present.to(run.device, non_blocking=True), match.to(run.device, non_blocking=True)

        with loop.autocast(run.device, o.amp):
            with torch.no_grad():
                target = teacher(images) if distilled else None
                told = teacher(images, present) if distilled and o.kl_teacher == "subset" else target
            out = model(images, present)
        losses = {"ce": hpdm.ohem_cross_entropy(out.logits, labels)}
        if o.losses == "anyseg":
            losses["mad"] = 50 / classes * hpdm.distill_logits(out.logits, told.logits)
            losses["umd"] = 5 * anyseg.umd_loss(out.per_modality, target.per_modality, there)
            losses["cmd"] = 10 * anyseg.cmd_loss(out.per_modality, target.per_modality, there)
        else:
            if o.lambda_kl:
                losses["kl"] = o.lambda_kl * hpdm.distill_logits(out.logits, told.logits)
            if o.alpha and o.fused_prototypes:  # not in the paper: prototypes of the fused features, as of one modality
                pair = [f[:, None] for f in out.fused], [f[:, None] for f in target.fused]  # 4 x (B, 1, C_i, h_i, w_i)
                one = there[:, :1] | True, match[:, :1] * 0
                losses["hpdm"] = o.alpha * hpdm.hpdm_loss(*pair, labels, *one, classes, o.prototypes)
            elif o.alpha:
                pair = out.per_modality, target.per_modality
                losses["hpdm"] = o.alpha * hpdm.hpdm_loss(*pair, labels, there, match, classes, o.prototypes)
            if o.beta or o.feedback:
                dominant = hpdm.dominant_modalities(target.per_modality, target.fused)  # (B, M)
            if o.beta:
                counted = there & dominant if o.variation == "dominant" else there
                losses["variation"] = o.beta * hpdm.feature_variation_loss(
                    out.per_modality, target.per_modality, labels, counted, classes)

        loss = sum(losses.values())
        scaler.scale(loss).backward()
        if o.feedback:
            with loop.autocast(run.device, o.amp):
                features, logits = teacher_again(teacher, images, target, ~dominant)
            losses["teacher_ce"] = hpdm.ohem_cross_entropy(logits, labels)
            losses["teacher_variation"] = o.feedback * hpdm.feature_variation_loss(
                features, out.per_modality, labels, there & ~dominant, classes)
            scaler.scale(losses["teacher_ce"] + losses["teacher_variation"]).backward()
            run.average_gradients(teacher)
            for group in feedback.param_groups:
                group["lr"] = optimizer.param_groups[0]["lr"] / 10
        progress.check(loss, losses, names)
        scaler.step(optimizer)
        if o.feedback:
            scaler.step(feedback)
            feedback.zero_grad()
        scaler.update()
        optimizer.zero_grad()
        if o.average and step >= progress.steps - o.average * progress.per_epoch:
            beside["average"].update(robust)
        if progress.validation_due():
            shown = beside["average"].model if o.average and beside["average"].count else robust
            scores = loop.summarise(loop.validate(loop.predictor(shown), val, subsets, run))
            if progress.validated(scores["miou"], shown, **scores) and o.feedback and run.rank == 0:
                save_model(run.folder / "teacher.pt", teacher, {**meta, "frames": len(train)})


def teacher_again(teacher: MSegFormer, images: Tensor, target: Output, learning: Tensor) -> tuple[list[Tensor], Tensor]:
    """Features 4 x (B, M, C_i, h_i, w_i) and logits of the teacher once more, now with a gradient, but through the
    features of the `learning` (B, M) pairs alone (CVPR 2026 version, eq. 9; its code was never released)."""
    again = teacher.encode(images, learning.cpu())
    features = [torch.where(learning[:, :, None, None, None], a, t)
                for a, t in zip(again, target.per_modality, strict=True)]  # fmt: skip
    complete = torch.ones_like(learning)
    weights = teacher.fusion_weights(complete)[:, :, None, None, None]
    fused = tuple((weights * f).sum(1) for f in features)  # (B, C_i, h_i, w_i)
    return features, teacher.decoder(fused, images.shape[-2:], complete)


if __name__ == "__main__":
    sys.exit(runs.guarded(main, OPTIONS))
