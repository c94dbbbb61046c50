"""Stage 1 of RMMSS: a teacher, then Hybrid Prototype Distillation into a robust model.

    python train_stage1.py                                              # synthetic scenes, on the CPU
    python train_stage1.py --data deliver --root data/DELIVER --pretrained mit_b0.pth --amp bf16
    torchrun --nproc_per_node=4 train_stage1.py --data deliver --amp bf16

Writes into the run folder (--out): config.json, log.jsonl, teacher.pt, robust.pt, and last.pt to continue from
(--resume). Next: python train_stage2.py --stage1 RUN.
"""

import copy
import sys
from functools import partial

import torch
from torch import Tensor, nn

import anyseg
import hpdm
from data import draw_present
from engine import loop
from engine.checkpoint import SAME, describe, load_model
from engine.options import stage1_options
from engine.pretrained import load_pretrained
from engine.runs import Phase, Run, guarded
from engine.subsets import all_subsets, subset_logits
from model import MSegFormer, Output, build_model, condition_on_modalities


def main(argv: list[str] | None = None) -> None:
    args = stage1_options(__doc__, argv)
    run = Run(args, "train_stage1.py")
    train, val = run.open_splits()
    state = run.claim(("teacher", "robust"))
    meta = describe(args, train, args.backbone)

    if args.teacher:
        expect = {name: meta[name] for name in SAME} | ({"backbone": args.backbone} if args.backbone else {})
        drops = {"drop_path": args.drop_path, "dropout": args.dropout}
        teacher, found = load_model(args.teacher, run.device, expect, **drops)
        meta["backbone"] = found["backbone"]
    else:
        if not (state and state["phase"] == "robust"):  # a resumed run may be past this phase
            train_teacher(run, start_model(run, meta), train, val, meta, state)
            state = None
        teacher, found = load_model(run.folder / "teacher.pt", run.device)  # the best one, not the last
    if args.distill_epochs:
        # The paper: from the teacher's weights. The published script: from what the teacher itself started from.
        robust = copy.deepcopy(teacher) if args.robust_from == "teacher" else start_model(run, meta)
        train_robust(run, teacher, found, robust, train, val, meta, state)
    then = f"train_stage2.py --stage1 {run.folder}" if args.distill_epochs else f"evaluate.py {run.folder}"
    run.say(f"stage 1 is complete, its models are in {run.folder}.\nNext: python {then}")


def start_model(run: Run, meta: dict) -> nn.Module:
    """What training starts from: --pretrained, or chance; the same at each call and on each process."""
    torch.manual_seed(run.args.seed)
    drops = run.args.drop_path, run.args.dropout
    model = build_model(meta["backbone"], len(meta["classes"]), meta["modalities"], *drops).to(run.device)
    if run.args.pretrained:
        report = load_pretrained(model, run.args.pretrained)
        run.say(
            f"{run.args.pretrained} ({report.source}): {len(report.loaded)} tensors loaded, "
            f"{len(report.missing)} start fresh, {len(report.unexpected)} unused"
        )
    return model


def train_teacher(run: Run, teacher: nn.Module, train, val, meta: dict, state: dict | None) -> None:
    """All modalities, cross entropy only (paper, section 4.1: --teacher-subsets 0). By default, and not in the paper,
    also a random subset of each sample's modalities, in an MSegFormer from the same pass of the encoder."""
    args, modalities = run.args, len(train.modalities)
    weight = args.teacher_subsets if modalities > 1 else 0.0
    model = run.parallel(teacher)
    optimizer, scaler = loop.adamw(teacher, args.lr, args.weight_decay), loop.grad_scaler(run.device, args.amp)
    phase = Phase(run, "teacher", args.epochs, meta, state, model=teacher, optimizer=optimizer, scaler=scaler)
    subsets = all_subsets(modalities) if weight else [tuple(range(modalities))]

    for images, labels, names in phase.batches(train):  # (B, M, 3, H, W), (B, H, W)
        lr = loop.set_learning_rate(optimizer, phase.step, phase.steps, phase.warmup, args.lr)
        generator = loop.seed_step(args.seed, "teacher", phase.step, run.rank)
        model.train()
        present = None
        if weight:
            subset = draw_present(args.batch_size, modalities, generator)[run.share]  # (B, M)
            present = torch.cat((torch.ones_like(subset), subset))  # (2 B, M): two answers to each image

        with loop.autocast(run.device, args.amp):
            complete, *some = model(images, present).logits.split(len(images))
        losses = {"ce": hpdm.ohem_cross_entropy(complete, labels)}
        if weight:  # apart: subsets have more hard pixels, and would crowd out complete inputs
            losses["ce_subsets"] = weight * hpdm.ohem_cross_entropy(some[0], labels)

        scaler.scale(sum(losses.values())).backward()
        phase.check(losses, names, teacher)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        phase.step += 1

        if phase.due(50) or run.stopping:
            phase.report(lr)
        if phase.due(phase.eval_steps):
            scores = loop.validate(partial(subset_logits, teacher), val, subsets, run)
            phase.log(**scores)
            if scores["miou"] > phase.best:
                phase.best = scores["miou"]
                run.save_model("teacher", teacher, meta)
        if phase.due(args.save_every) or run.stopping:
            phase.save()  # and end here, if a signal or the clock asked for it


def train_robust(
    run: Run, teacher: nn.Module, teacher_meta: dict, robust: nn.Module, train, val, meta: dict, state: dict | None
) -> None:
    """Modalities dropped at random per sample, the teacher's logits and prototypes as targets (section 4.2).

    By option also the baseline (--losses anyseg), feature variation (--beta) and a teacher that learns (--feedback).
    """
    args, classes, modalities = run.args, len(train.classes), len(train.modalities)
    teacher.requires_grad_(False).eval()
    robust.requires_grad_(True)
    if args.conditioned:
        condition_on_modalities(robust)
    model, subsets = run.parallel(robust), all_subsets(modalities)
    optimizer, scaler = loop.adamw(robust, args.lr, args.weight_decay), loop.grad_scaler(run.device, args.amp)
    parts = {"model": robust, "optimizer": optimizer, "scaler": scaler}
    if args.feedback:
        if not isinstance(teacher, MSegFormer) or modalities == 1:
            raise ValueError(
                "--feedback needs several modalities and one encoder for all of them, a segformer_*; "
                f"here are {modalities} and {meta['backbone']}."
            )
        parts["teacher"] = teacher
        teacher.stages.requires_grad_(True)  # not the decoder: the paper freezes the fusion
        for group in loop.adamw(teacher, args.lr, args.weight_decay).param_groups:
            optimizer.add_param_group({**group, "scale": 0.1})
    phase = Phase(run, "robust", args.distill_epochs, meta, state, **parts)
    if phase.step == 0 and args.teacher:
        run.save_model("teacher", teacher, teacher_meta)  # --teacher's file once more, for stage 2
    distilled = args.losses == "anyseg" or args.lambda_kl or args.alpha or args.beta or args.feedback

    for images, labels, names in phase.batches(train):  # (B, M, 3, H, W), (B, H, W)
        lr = loop.set_learning_rate(optimizer, phase.step, phase.steps, phase.warmup, args.lr)
        generator = loop.seed_step(args.seed, "robust", phase.step, run.rank)
        model.train()
        present = draw_present(args.batch_size, modalities, generator, args.complete)[run.share]  # (B, M)
        match = hpdm.draw_match(args.batch_size, modalities, args.match, generator)[run.share]  # (B, M)
        # for the losses; the models take `present` from the CPU
        there, match = present.to(run.device, non_blocking=True), match.to(run.device, non_blocking=True)

        with loop.autocast(run.device, args.amp):
            with torch.no_grad():
                target = teacher(images) if distilled else None
            out = model(images, present)
        losses = {"ce": hpdm.ohem_cross_entropy(out.logits, labels)}
        if args.losses == "anyseg":
            losses["mad"] = 50 / classes * hpdm.distill_logits(out.logits, target.logits)
            losses["umd"] = 5 * anyseg.umd_loss(out.per_modality, target.per_modality, there)
            losses["cmd"] = 10 * anyseg.cmd_loss(out.per_modality, target.per_modality, there)
        else:
            if args.lambda_kl:
                losses["kl"] = args.lambda_kl * hpdm.distill_logits(out.logits, target.logits)
            if args.alpha:
                losses["hpdm"] = args.alpha * hpdm.hpdm_loss(
                    out.per_modality, target.per_modality, labels, there, match, classes, args.prototypes
                )
            if args.beta:
                dominant = hpdm.dominant_modalities(target.per_modality, target.fused)  # (B, M)
                counted = there & dominant if args.variation == "dominant" else there
                losses["variation"] = args.beta * hpdm.feature_variation_loss(
                    out.per_modality, target.per_modality, labels, counted, classes
                )
        if args.feedback:
            losses |= feedback_losses(teacher, target, out, images, labels, there, args)

        scaler.scale(sum(losses.values())).backward()
        for p in teacher.parameters() if args.feedback and run.world > 1 else ():  # DDP does it for `model` alone
            p.grad = None if p.grad is None else run.reduce(p.grad) / run.world
        phase.check(losses, names, robust, teacher)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        phase.step += 1

        if phase.due(50) or run.stopping:
            phase.report(lr)
        if phase.due(phase.eval_steps):
            scores = loop.validate(partial(subset_logits, robust), val, subsets, run)
            phase.log(**scores)
            if scores["miou"] > phase.best:
                phase.best = scores["miou"]
                run.save_model("robust", robust, meta)
                if args.feedback:
                    run.save_model("teacher", teacher, meta)
        if phase.due(args.save_every) or run.stopping:
            phase.save()  # and end here, if a signal or the clock asked for it


def feedback_losses(
    teacher: MSegFormer, target: Output, out: Output, images: Tensor, labels: Tensor, present: Tensor, args
) -> dict[str, Tensor]:
    """The teacher learns, too (CVPR 2026 version, eq. 9; its code was never released): CE, and feature variation
    towards the student, through the features of its modalities that are not dominant (half, rounded down) alone.

    target, out: of teacher and student; present (B, M) bool, the student's modalities.
    """
    learning = ~hpdm.dominant_modalities(target.per_modality, target.fused)  # (B, M)
    complete = torch.ones_like(learning)
    with loop.autocast(images.device, args.amp):
        again = teacher.encode(images, learning.cpu())  # as in `target`, but with a gradient
        features = [
            torch.where(learning[:, :, None, None, None], a, t) for a, t in zip(again, target.per_modality, strict=True)
        ]
        weights = teacher.fusion_weights(complete)[:, :, None, None, None]  # (B, M, 1, 1, 1)
        fused = tuple((weights * f).sum(1) for f in features)  # 4 x (B, C_i, h_i, w_i)
        logits = teacher.decoder(fused, images.shape[-2:], complete)
    variation = hpdm.feature_variation_loss(features, out.per_modality, labels, present & learning, logits.shape[1])
    return {"teacher_ce": hpdm.ohem_cross_entropy(logits, labels), "teacher_variation": args.feedback * variation}


if __name__ == "__main__":
    sys.exit(guarded(main))
