"""Segmentation metrics from one int64 confusion matrix, with the rule for absent classes in the name.

    matrix += confusion(class_ids(logits, names), labels, num_classes)      # (K, K): labels x predictions
    scores(matrix)["miou_published"], scores(matrix)["miou_occurring"]

Two rules are in use for a class that occurs in neither labels nor predictions, so that its IoU is 0 / 0:
published (the papers' tables): it counts as 0; occurring: the mean runs over the classes that occur.
"""

import torch
from torch import Tensor


def rule_for(data: str) -> str:
    """The rule of validation and of the tables: in a data set of your own some classes may never occur."""
    return "occurring" if data == "folder" else "published"


def class_ids(logits: Tensor, names: list[str]) -> Tensor:
    """The predicted classes of B frames: logits (B, K, H, W) -> (B, H, W) int64. Raises ValueError with the frame's
    name if a logit is NaN or infinite: the arg-max would still name a class."""
    finite = logits.sum((1, 2, 3), dtype=torch.float32).isfinite()  # (B,): one pass; a sum keeps what is not finite
    if not finite.all():
        what = f"the model's answer to frame {names[finite.tolist().index(False)]} is not finite (NaN or infinite)"
        raise ValueError(f"{what}; look at the values of its files, and whether the model's weights are sound.")
    return logits.argmax(1)


def confusion(prediction: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts of (label, prediction) pairs -> (K, K) int64; float32 would stop counting at 16.7 million pixels. Labels
    outside 0..K-1 (255 = ignore) are left out. prediction, labels: integers of one shape, on one device."""
    prediction, labels = prediction.long(), labels.long()  # uint8 would wrap around in the product below
    valid = (labels >= 0) & (labels < num_classes)
    pairs = torch.where(valid, labels * num_classes + prediction, num_classes**2).flatten()
    return torch.bincount(pairs, minlength=num_classes**2 + 1)[:-1].view(num_classes, num_classes)


def scores(matrix: Tensor) -> dict:
    """(K, K) int64 -> percentages: mIoU by both rules, per-class IoU (None where absent), accuracy, F1; and the matrix.
    accuracy: pixels right of all labelled ones; mean_accuracy: mean recall of the classes that are labelled; f1: mean
    over the classes that occur."""
    counts = matrix.double().cpu()
    right, labelled, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    union = labelled + predicted - right
    occurs = union > 0
    iou = right / union.clamp(min=1)
    f1 = 2 * right / (labelled + predicted).clamp(min=1)

    def mean(values: Tensor, where: Tensor) -> float:
        return 100 * float(values[where].mean()) if where.any() else 0.0

    return {
        "miou_published": 100 * float(iou.mean()),
        "miou_occurring": mean(iou, occurs),
        "accuracy": 100 * float(right.sum() / counts.sum().clamp(min=1)),
        "mean_accuracy": mean(right / labelled.clamp(min=1), labelled > 0),
        "f1": mean(f1, occurs),
        "iou": [100 * float(v) if o else None for v, o in zip(iou, occurs, strict=True)],
        "confusion": matrix.tolist(),
    }
