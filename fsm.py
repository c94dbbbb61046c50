"""Feature Selection Module (RMMSS, arXiv 2505.12861 v2, section 4.3): stage 2 selects between two frozen models.

Teacher T and robust model R see the same, possibly incomplete, input. At each stage i, on the fused features
f_T, f_R (B, C_i, h_i, w_i), and once more on the logits with K channels:

    score       s_j = sigmoid(conv1x1(depthwise3x3(f_j)))     (B, 1, h, w), own weights for each source j
    candidate   (1 + s_j) f_j                                 per element the largest wins
    selected    f_winner                                      the winner's feature, not scaled

That is rule "hard", as published. An arg-max over frozen features gives the scores no gradient; sum_j v_j f_j does:

    "candidate" v_j = softmax_j(candidate_j / temperature), per element (not in the paper)
    "score"     v_j = softmax_j(s_j / temperature), per position (commented out in the published FSM)

Not in the paper: conditioning. 3x3 pixels do not show which modalities the input had, but that is known. So each score
has a learned bias for each present modality, one for complete and one for incomplete input.

Axes: B samples, S = 2 sources (T, R), C channels, K classes, M modalities, h w stage; 5 levels: four stages, logits.
"""

import torch
from torch import Tensor, nn

import kernels
from segformer import Output


class FSM(nn.Module):
    """Selects features and logits among the outputs of two models with the same widths C_1..C_4 and classes.

    rule: one of kernels.RULES; temperature: > 0 (published: 0.2); conditioned: scores know the present modalities.
    """

    def __init__(
        self, widths: tuple[int, ...], classes: int, modalities: int, rule="score", temperature=0.2, conditioned=True
    ):
        super().__init__()
        self.rule, self.temperature = rule, temperature
        levels = (*widths, classes)  # channels; all weights start as those of nn.Conv2d, by fan-in
        self.depthwise = nn.ParameterList(torch.empty(2, c, 3, 3).uniform_(-1 / 3, 1 / 3) for c in levels)
        self.depthwise_bias = nn.ParameterList(torch.empty(2, c).uniform_(-1 / 3, 1 / 3) for c in levels)
        self.pointwise = nn.ParameterList(torch.empty(2, c).uniform_(-(c**-0.5), c**-0.5) for c in levels)
        self.pointwise_bias = nn.ParameterList(torch.empty(2).uniform_(-(c**-0.5), c**-0.5) for c in levels)
        self.modality_bias = nn.Parameter(torch.zeros(5, 2, modalities + 2), requires_grad=conditioned)  # (5, S, M + 2)
        if conditioned and rule == "score":  # starts as the switch: T has weight 0.98 if all are present, else 0.02
            self.modality_bias.data[:, :, -2:] = torch.tensor([[2.0, -2.0], [-2.0, 2.0]])

    def select(self, sources: list[Tensor], i: int, present: Tensor, rule: str) -> Tensor:
        """S x (B, C, h, w), of stage i or the logits -> selected (B, C, h, w)."""
        # nothing non-linear stands between the two convolutions, so they are one: 3x3, C -> 1
        weight = self.pointwise[i][:, :, None, None] * self.depthwise[i]  # (S, C, 3, 3)
        bias = self.pointwise_bias[i] + (self.pointwise[i] * self.depthwise_bias[i]).sum(1)  # (S,)
        complete = present.all(1, keepdim=True)  # (B, 1)
        indicators = torch.cat((present, complete, ~complete), 1).to(bias, non_blocking=True)  # (B, M + 2) of 0 and 1
        bias = bias + (indicators[:, None] * self.modality_bias[i]).sum(2)  # (B, S)
        return kernels.feature_select(sources, weight, bias, rule, self.temperature)

    def forward(self, outputs: list[Output], present: Tensor, rule: str | None = None) -> Output:
        """outputs: of teacher and robust model; present (B, M) bool: of their input; rule: in place of self.rule."""
        levels = [*zip(*(out.fused for out in outputs), strict=True), [out.logits for out in outputs]]
        *fused, logits = (self.select(list(x), i, present, rule or self.rule) for i, x in enumerate(levels))
        return Output(logits, tuple(fused), ())


def feature_distance(student: tuple[Tensor, ...], selected: tuple[Tensor, ...]) -> Tensor:
    """What pulls the final student to the selected features: mean squared difference, summed over stages -> scalar.

    student, selected: 4 x (B, C_i, h_i, w_i), gradient to the student only. Not in the paper. Differences are divided
    by the deviation of each selected channel, so that all channels weigh the same.
    """
    distance = 0.0
    for s, t in zip(student, selected, strict=True):
        t = t.detach().float()
        scale = t.std((0, 2, 3), correction=0, keepdim=True) + 0.01  # (1, C, 1, 1); a single pixel deviates by 0
        distance = distance + ((s.float() - t) / scale).square().mean()
    return distance


def decode(selected: Output, teacher: nn.Module, robust: nn.Module, present: Tensor) -> Tensor:
    """Logits of the selected features (B, K, H, W): by the teacher's decoder where the input is complete, else by the
    robust model's. Not in the paper. present (B, M) bool, on the CPU."""
    complete, size = present.all(1), selected.logits.shape[-2:]
    if complete.all() or not complete.any():
        return (teacher if complete.all() else robust).decoder(selected.fused, size)
    by_teacher, by_robust = (model.decoder(selected.fused, size) for model in (teacher, robust))
    return torch.where(complete.to(by_teacher.device)[:, None, None, None], by_teacher, by_robust)


def ensemble_logits(selected: Output, teacher: nn.Module, robust: nn.Module, present: Tensor) -> Tensor:
    """The ensemble's logits (B, K, H, W): log(softmax(selected logits) + softmax(decoded features)). See `decode`."""
    decoded = decode(selected, teacher, robust, present)
    return (selected.logits.float().softmax(1) + decoded.float().softmax(1)).clamp(min=1e-12).log()
