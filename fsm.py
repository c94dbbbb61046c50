"""Feature Selection Module (RMMSS, arXiv 2505.12861 v2, section 4.3): the best of two frozen models, stage 2.

Teacher T and robust model R see the same, possibly incomplete, input. At each stage i, on the fused features
f_T, f_R (B, C_i, h_i, w_i), and once more on the logits with K channels:

    score       s_j = sigmoid(conv1x1(depthwise3x3(f_j)))     (B, 1, h, w), own weights for each source j
    candidate   (1 + s_j) f_j                                  per element the largest wins,
    selected    f_winner                                       and its unscaled feature is passed on

That hard rule is all that is published, and it cannot train: an arg-max over frozen features gives the scores no
gradient. Here it stands as rule="hard"; two relaxations can be trained (neither is in the paper):

    "candidate" softmax over the sources of candidate / temperature, per element: the hard rule, softened.
    "score"     softmax over the sources of s_j / temperature, per position: the scores alone decide. A candidate's
                order flips with the feature's sign (for negative values the *smaller* score wins), a score's does not.

Conditioned on the sensors (not in the paper): a score looks at 3x3 pixels and cannot tell a teacher's feature of a
complete input from one of an incomplete input, but which sensors work is known at inference. `conditioned` adds a bias
per source and sensor to the score. For "candidate" it starts at zero, where the published form is; for "score" it
starts as the switch (the teacher when all sensors are there, else the robust model), to be improved on per position.

Axes: B samples, S sources (T, R), C channels, K classes, h w stage.
"""

import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import kernels
from engine.checkpoint import read
from model import Output, ScorePredictor, present_of, subset_logits, subset_outputs
from segformer import sensor_indicators

RULES = ("hard", "candidate", "score")
LEVELS = ("both", "features", "logits")


class Selected(NamedTuple):
    logits: Tensor  # (B, K, H, W)
    fused: tuple[Tensor, ...]  # 4 x (B, C_i, h_i, w_i)
    share: Tensor  # (5, S): mean weight of each source at the stages 1..4 and at the logits


class FSM(nn.Module):
    """Selects features and logits among the outputs of several models with the same widths and classes.

    widths: C_1..C_4; num_classes: K; modalities: M; sources: S, in the paper 2; rule: one of RULES;
    temperature: of the softmax, > 0 (0.2 worked best in first trials; towards 0 it becomes the hard rule);
    conditioned: whether the scores know which sensors are present.
    """

    def __init__(
        self, widths: tuple[int, ...], num_classes: int, modalities: int, sources: int = 2,
        rule: str = "score", temperature: float = 0.2, conditioned: bool = True,
    ):  # fmt: skip
        super().__init__()
        if rule not in RULES:
            raise ValueError(f"FSM rule '{rule}' is unknown; choose one of {', '.join(RULES)}.")
        self.rule, self.temperature = rule, temperature
        channels = (*widths, num_classes)
        self.scores = nn.ModuleList(ScorePredictor(c, sources) for c in channels)
        biases = torch.zeros(len(channels), sources, modalities + 2)
        self.sensor_bias = nn.Parameter(biases, requires_grad=conditioned)
        if conditioned and rule == "score" and sources == 2:
            with torch.no_grad():  # the switch: sigmoid(2) = 0.88 for the one, sigmoid(-2) = 0.12 for the other
                self.sensor_bias[:, :, -2:] = torch.tensor([[2.0, -2.0], [-2.0, 2.0]])

    def sensor_bias_of(self, level: int, present: Tensor) -> Tensor:
        """What the scores of a level know of the sensors -> (B, S): which are there, all are, or some are missing."""
        with torch.autocast(present.device.type, enabled=False):  # it would round the biases
            return sensor_indicators(present).to(self.sensor_bias.dtype) @ self.sensor_bias[level].t()

    def select(self, sources: list[Tensor], level: int, present: Tensor, rule: str) -> tuple[Tensor, Tensor]:
        """S x (B, C, h, w) -> selected (B, C, h, w), share (S,)."""
        weight, bias = self.scores[level].folded()
        bias = bias + self.sensor_bias_of(level, present)  # (B, S)
        if rule != "score":
            return kernels.feature_score_select(sources, weight, bias, None if rule == "hard" else self.temperature)
        scores = kernels.feature_score(sources, weight, bias)  # (S, B, 1, h, w)
        weights = (scores.float() / self.temperature).softmax(0)
        selected = sum(w.to(x.dtype) * x for w, x in zip(weights, sources, strict=True))
        return selected, weights.detach().mean((1, 2, 3, 4))

    def forward(self, outputs: list[Output], present: Tensor, rule: str | None = None) -> Selected:
        """outputs: of the sources for one input, on (B, M) `present` sensors; rule: another one than trained with."""
        rule = rule or self.rule
        fused, shares = [], []
        for i, sources in enumerate(zip(*(out.fused for out in outputs), strict=True)):
            selected, share = self.select(list(sources), i, present, rule)
            fused.append(selected)
            shares.append(share)
        logits, share = self.select([out.logits for out in outputs], 4, present, rule)
        return Selected(logits, tuple(fused), torch.stack([*shares, share]))


def feature_distance(
    student: tuple[Tensor, ...], selected: tuple[Tensor, ...], total: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """What pulls the final student to the selected features: mean squared difference, summed over stages -> scalar.

    Not in the paper, which does not say how the selection reaches the student. Each channel is scaled by the
    selected features' deviation, so that stages and channels of different size weigh the same. `total` sums a tensor
    over the processes of a run, so that N of them take the deviation over the same batch as one would.
    """
    distance = torch.zeros((), device=student[0].device)
    for s, t in zip(student, selected, strict=True):
        t = t.detach().float()
        n = total(t.new_tensor(t[:, 0].numel()))
        mean = total(t.sum((0, 2, 3), keepdim=True)) / n  # (1, C, 1, 1)
        scale = (total((t - mean).square().sum((0, 2, 3), keepdim=True)) / n).sqrt() + 0.01  # one pixel has none
        distance = distance + ((s.float() - t) / scale).square().mean()
    return distance


# ---- the ensemble: T + R + FSM, at the cost of both models ------------------------------------------------------


def decode(
    selected: Selected, teacher: nn.Module, robust: nn.Module, present: Tensor, declared: Tensor | None = None
) -> Tensor:
    """Logits of the selected features (B, K, H, W), by the decoder that has learned to read them: the teacher's for
    complete inputs, the robust model's for incomplete ones. present (B, M) bool, on the CPU; declared: the sensors that
    the two models were said to have, where that differs (zero-filled ones)."""
    declared = present if declared is None else declared
    complete, size = present.all(1), selected.logits.shape[-2:]
    if complete.all() or not complete.any():
        return (teacher if complete.all() else robust).decoder(selected.fused, size, declared)
    complete = complete.to(selected.logits.device)[:, None, None, None]
    by_teacher, by_robust = (model.decoder(selected.fused, size, declared) for model in (teacher, robust))
    return torch.where(complete, by_teacher, by_robust)


def ensemble_logits(
    selected: Selected, teacher: nn.Module, robust: nn.Module, present: Tensor, level: str = "both",
    declared: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The ensemble's answer -> (B, K, H, W).

    level: "logits" as selected; "features": the selected features, decoded; "both": the mean of the two
    distributions, as logits. present, declared: as for `decode`.
    """
    if level == "logits":
        return selected.logits
    decoded = decode(selected, teacher, robust, present, declared)
    if level == "features":
        return decoded
    return (selected.logits.float().softmax(1) + decoded.float().softmax(1)).clamp(min=1e-12).log()


def ensemble_predictor(
    fsm: FSM, teacher: nn.Module, robust: nn.Module, level: str = "both", rule: str | None = None
) -> Callable:
    """predict(images, subsets, degraded) -> iterator of logits, as `model.subset_logits` gives for one model.

    Both models see what the protocol leaves of the input; the selection knows which sensors work.
    """

    def predict(images: Tensor, subsets: list[tuple[int, ...]], degraded: Tensor | None = None) -> Iterator[Tensor]:
        outputs = (subset_outputs(model.eval(), images, subsets, degraded) for model in (teacher, robust))
        for subset, sources in zip(subsets, zip(*outputs, strict=True), strict=True):
            present = present_of(subset, images.shape[:2])
            selected = fsm(list(sources), present.to(images.device), rule)
            declared = present if degraded is None else torch.ones_like(present)
            yield ensemble_logits(selected, teacher, robust, present, level, declared)

    return predict


def switch_predictor(teacher: nn.Module, robust: nn.Module) -> Callable:
    """The honest baseline: the teacher when all sensors are there, else the robust model."""

    def predict(images: Tensor, subsets: list[tuple[int, ...]], degraded: Tensor | None = None) -> Iterator[Tensor]:
        answers = subset_logits(robust, images, [s for s in subsets if len(s) < images.shape[1]], degraded)
        for subset in subsets:
            complete = len(subset) == images.shape[1]
            yield next(subset_logits(teacher, images, [subset]) if complete else answers)

    return predict


def load_fsm(path, device: torch.device) -> FSM:
    """Rebuilds the FSM of a `fsm.pt`, in eval mode."""
    state = read(pathlib.Path(path))
    meta = state["meta"]
    fsm = FSM(meta["widths"], len(meta["classes"]), len(meta["modalities"]), rule=meta["rule"],
              temperature=meta["temperature"], conditioned=meta["conditioned"])  # fmt: skip
    fsm.load_state_dict(state["model"])
    return fsm.to(device).eval()
