"""What the tests of losses share: features of student and teacher, and labels of every kind."""

import torch
import torch.nn.functional as F

from hpdm import draw_match

K = 6
STAGES = ((5, 8, 9), (7, 4, 5), (3, 2, 3), (4, 1, 2))  # C, h, w for images of 32 x 36
SCENES = ["any", "one modality", "one present modality", "classes that never occur", "a sample without labels"]
SCENES += ["no label at all"]


def scene(case="any", modalities=3):
    """Random features of student and teacher (float64), labels of which some are 255, present and match."""
    g, samples, modalities = torch.Generator().manual_seed(0), 3, 1 if case == "one modality" else modalities
    shapes = [(samples, modalities, *stage) for stage in STAGES]
    student, teacher = ([torch.randn(s, generator=g).double().requires_grad_() for s in shapes] for _ in range(2))
    blocks = torch.randint(0, K + 1, (samples, 8, 9), generator=g)  # blocks of 4 x 4, so that coarse stages see classes
    labels = blocks.where(blocks < K, 255).repeat_interleave(4, 1).repeat_interleave(4, 2)
    flips = torch.rand(labels.shape, generator=g) < 0.2
    labels = torch.where(flips, torch.randint(0, K, labels.shape, generator=g), labels)
    present = torch.rand(samples, modalities, generator=g) < 0.5
    present[torch.arange(samples), torch.randint(0, modalities, (samples,), generator=g)] = True
    if case == "classes that never occur":
        labels[(labels == 1) | (labels == 4)] = 3
    elif case == "a sample without labels":
        labels[1] = 255
    elif case == "no label at all":
        labels[:] = 255
    elif case == "channels last":
        student, teacher = ([x.movedim(2, -1).contiguous().movedim(-1, 2) for x in xs] for xs in (student, teacher))
    elif case == "one present modality":
        present = torch.eye(3, dtype=torch.bool)[[1, 2, 0]]
    match = draw_match(samples, modalities, "random", g)
    return student, teacher, labels, present, match


def slow_labels(labels, h, w):
    return F.interpolate(labels[:, None].double(), size=(h, w), mode="nearest")[:, 0].long()
