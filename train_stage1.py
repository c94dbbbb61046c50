"""Stage 1 of RMMSS: a teacher, then Hybrid Prototype Distillation into a robust model.

    python train_stage1.py                                              # synthetic scenes, on the CPU
    python train_stage1.py --data deliver --root data/DELIVER --pretrained mit_b0.pth --amp bf16
    torchrun --nproc_per_node=4 train_stage1.py --data deliver --pretrained mit_b0.pth --amp bf16

Writes into the run folder (--out): config.json, log.jsonl, teacher.pt, robust.pt, and last.pt to continue from
(--resume). Next: python train_stage2.py --stage1 RUN.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import hpdm
from data import draw_present, incomplete
from engine import loop
from engine.checkpoint import SAME, checksum, describe, load_model
from engine.options import stage1_options
from engine.pretrained import start_model
from engine.runs import Phase, Run, guarded
from engine.subsets import all_subsets, subset_logits
from segformer import Output


def paper_losses(
    robust: Output, teacher: Output, labels: Tensor, present: Tensor, match: Tensor, args: argparse.Namespace
) -> dict[str, Tensor]:
    """L = CE + lambda KL(teacher || robust) + alpha L_hpdm (section 4.2). present, match (B, M), labels (B, H, W)."""
    losses = {"ce": hpdm.ohem_cross_entropy(robust.logits, labels)}
    if args.lambda_kl:
        losses["kl"] = args.lambda_kl * hpdm.distill_logits(robust.logits, teacher.logits)
    if args.alpha:  # eqs. 4 and 5
        r, t, classes = robust.per_modality, teacher.per_modality, robust.logits.shape[1]
        losses["hpdm"] = args.alpha * hpdm.hpdm_loss(r, t, labels, present, match, classes)
    return losses


def train_teacher(run: Run, teacher: nn.Module, train, val, meta: dict, state: dict | None) -> None:
    """Section 4.1: all modalities, cross entropy."""
    phase = Phase(run, "teacher", teacher, run.args.epochs, meta, state)
    complete = all_subsets(len(train.modalities))[-1:]

    for images, labels in phase.batches(train):  # (B, M, 3, H, W), (B, H, W)
        with run.autocast():
            logits = phase.model(images).logits  # (B, K, H, W)
        phase.learn({"ce": hpdm.ohem_cross_entropy(logits, labels)})
        phase.keep(partial(subset_logits, teacher), val, complete)


def train_robust(
    run: Run, teacher: nn.Module, robust: nn.Module, train, val, meta: dict, state: dict | None, losses_of: Callable
) -> None:
    """Section 4.2: modalities dropped at random per sample; the teacher's logits and prototypes are the targets."""
    args, modalities = run.args, len(train.modalities)
    teacher.requires_grad_(False).eval()
    phase = Phase(run, "robust", robust, args.distill_epochs, meta, state)

    for images, labels in phase.batches(train):  # (B, M, 3, H, W), (B, H, W)
        present = draw_present(args.batch_size, modalities, phase.generator)[run.share]  # (B, M)
        match = hpdm.draw_match(args.batch_size, modalities, args.match, phase.generator)[run.share]  # (B, M), eq. 5
        seen, present = incomplete(images, present, args.absent)
        with run.autocast():
            with torch.no_grad():
                target = teacher(images)  # all modalities
            out = phase.model(seen, present)
        phase.learn(losses_of(out, target, labels, present, match, args))
        phase.keep(partial(subset_logits, robust), val, all_subsets(modalities))
    best = loop.validate(partial(subset_logits, teacher), val, all_subsets(modalities), run)["miou"]
    if phase.best < best:
        run.say(f"note: over all subsets the robust model reaches {phase.best:.2f} mIoU, its teacher {best:.2f}")


def main(argv: list[str] | None = None, losses_of: Callable = paper_losses) -> None:
    args = stage1_options(__doc__, argv, losses_of.__name__)
    run = Run(args, "train_stage1.py")
    train, val = run.open_splits()
    state = run.claim(("teacher", "robust"))
    meta = describe(args, train, args.backbone, state)

    if args.teacher:
        expect = {name: meta[name] for name in SAME} | ({"backbone": args.backbone} if args.backbone else {})
        source = run.folder / "teacher.pt" if state else args.teacher  # which may have moved since
        teacher, found = load_model(source, run.device, expect)
        meta["backbone"] = found["backbone"]
        if not state:
            found |= {"absent": args.absent, "phase": "teacher"}
            run.save_model("teacher", teacher, found)  # a copy, for stage 2
    else:
        if not (state and state["phase"] == "robust"):  # a resumed run may be past this phase
            train_teacher(run, start_model(run, meta), train, val, meta, state)
            state = None
        teacher, found = load_model(run.folder / "teacher.pt", run.device)  # the best one, not the last
    if args.distill_epochs:
        meta["teacher"] = checksum(found)
        # The paper: from the teacher's weights. The published script: from what the teacher itself started from.
        robust = copy.deepcopy(teacher) if args.robust_from == "teacher" else start_model(run, meta)
        train_robust(run, teacher, robust, train, val, meta, state, losses_of)
    then = f"train_stage2.py --stage1 {run.folder}" if args.distill_epochs else f"evaluate.py {run.folder}"
    run.say(f"stage 1 is complete, its models are in {run.folder}.\nNext: python {then}")


if __name__ == "__main__":
    sys.exit(guarded(main))
