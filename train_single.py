"""One model for complete and incomplete inputs, without distillation. Not in the paper: docs/results.md compares it.

    python train_single.py                                              # synthetic scenes, on the CPU
    python train_single.py --data deliver --root data/DELIVER --pretrained mit_b0.pth --amp bf16

Each batch is predicted twice: from all modalities, and from a random subset of each sample's. The loss is
CE(complete) + w CE(subset), w = --subset-weight, 0.4. OHEM chooses the hard pixels of each separately: of both
together, most would be the subsets'. An MSegFormer encodes a batch once for both; a CMNeXt runs twice, since its
modalities mix in the encoder.

Writes into the run folder (--out): config.json, log.jsonl, single.pt, and last.pt to continue from (--resume).
Next: python evaluate.py RUN, python predict.py RUN.
"""

import sys
from functools import partial

from torch import Tensor, nn

import hpdm
from data import draw_present
from engine.checkpoint import describe
from engine.options import single_options
from engine.pretrained import start_model
from engine.runs import Phase, Run, guarded
from engine.subsets import all_subsets, subset_logits
from segformer import MSegFormer


class TwoAnswers(nn.Module):
    """A model's logits (B, K, H, W) for a batch: from all modalities, and from those `present`, (B, M) bool."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.single = model

    def forward(self, images: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:  # images (B, M, 3, H, W)
        if isinstance(self.single, MSegFormer):
            features, size = self.single.encode(images), images.shape[-2:]  # 4 x (B, M, C_i, h_i, w_i)
            return tuple(self.single.answer(features, p, size).logits for p in (None, present))
        return self.single(images).logits, self.single(images, present).logits


def main(argv: list[str] | None = None) -> None:
    args = single_options(__doc__, argv)
    run = Run(args, "train_single.py")
    train, val = run.open_splits()
    state = run.claim(("single",))
    meta = describe(args, train, args.backbone, state)
    model = start_model(run, meta)
    modalities, subsets = len(train.modalities), all_subsets(len(train.modalities))
    phase = Phase(run, "single", model, args.epochs, meta, state, calls=TwoAnswers(model))

    for images, labels in phase.batches(train):  # (B, M, 3, H, W), (B, H, W)
        present = draw_present(args.batch_size, modalities, phase.generator)[run.share]  # (B, M)
        with run.autocast():
            complete, subset = phase.model(images, present)  # (B, K, H, W) each
        losses = {"ce_complete": hpdm.ohem_cross_entropy(complete, labels)}
        losses["ce_subset"] = args.subset_weight * hpdm.ohem_cross_entropy(subset, labels)
        phase.learn(losses)
        phase.keep(partial(subset_logits, model), val, subsets)
    run.say(f"the model is in {run.folder}.\nNext: python evaluate.py {run.folder}")


if __name__ == "__main__":
    sys.exit(guarded(main))
