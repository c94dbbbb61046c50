"""fsm.py: the hard rule against the published outputs, the relaxations against loops, the ensemble piece by piece."""

import itertools
import json
import pathlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import GOLDEN, MODALITIES, golden_images, golden_weights

from engine import checkpoint
from engine.subsets import load_fsm, selected_logits, switch_logits
from fsm import FSM, feature_distance
from model import build_model
from segformer import Output

WIDTHS, K = (6, 8, 10, 12), 5


def with_random_weights(model):
    """Weights, biases and statistics far from their trivial start values, so that predictions vary; eval mode."""
    shapes = {name: list(v.shape) for name, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    model.load_state_dict(golden_weights(json.dumps(shapes).encode()), strict=False)
    return model.eval()


def random_fsm(rule="score", conditioned=True, temperature=0.2):
    fsm = with_random_weights(FSM(WIDTHS, K, 4, rule=rule, conditioned=conditioned, temperature=temperature))
    fsm.modality_bias.data.copy_(torch.randn(fsm.modality_bias.shape, generator=torch.Generator().manual_seed(2)))
    return fsm


def random_outputs(seed=0, sources=2, samples=3):
    g = torch.Generator().manual_seed(seed)
    return [
        Output(
            torch.randn(samples, K, 32, 40, generator=g),
            tuple(torch.randn(samples, c, 8 >> i, 10 >> i, generator=g) for i, c in enumerate(WIDTHS)),
            (),
        )
        for _ in range(sources)
    ]


PRESENT = torch.tensor([[True, True, True, True], [True, False, False, True], [False, False, True, False]])


def levels(outputs):
    """The five pairs of maps that are selected from: stages 1..4, logits."""
    return [*zip(*(out.fused for out in outputs), strict=True), [out.logits for out in outputs]]


def slow_score(fsm, level, source, f, present):
    """sigmoid(conv1x1(depthwise3x3(f)) + its modalities' biases), one convolution after the other -> (B, 1, h, w)."""
    bias, c = fsm.modality_bias[level, source], f.shape[1]
    wide = F.conv2d(f, fsm.depthwise[level][source][:, None], fsm.depthwise_bias[level][source], padding=1, groups=c)
    raw = F.conv2d(wide, fsm.pointwise[level][source][None, :, None, None], fsm.pointwise_bias[level][source, None])
    for b, row in enumerate(present.tolist()):
        raw[b] += sum(bias[m] for m, there in enumerate(row) if there) + (bias[-2] if all(row) else bias[-1])
    return torch.sigmoid(raw)


def test_the_hard_rule_reproduces_the_published_selection():
    golden = np.load(GOLDEN / "fsm_b0.npz")
    widths = (32, 64, 160, 256)
    fsm = FSM(widths, 25, 4, rule="hard")
    for name, value in golden_weights(golden["keys"]).items():
        stage, _, _, source, layer, kind = name.removeprefix("tokenselect").split(".")
        weights = f"{('depthwise', 'pointwise')[int(layer)]}{'_bias' * (kind == 'bias')}"
        own = getattr(fsm, weights)[int(stage) - 1][int(source)]
        own.data.copy_(value.reshape(own.shape))
    g = torch.Generator().manual_seed(7)
    golden_images(g)
    sizes = [(2, c, 64 // stride, 96 // stride) for c, stride in zip(widths, (4, 8, 16, 32), strict=True)]
    fused = [tuple(torch.randn(size, generator=g) for size in sizes) for _ in range(2)]
    present = torch.tensor([[True] * 4, [False, True, True, False]])
    selected = fsm([Output(torch.randn(2, 25, 64, 96, generator=g), f, ()) for f in fused], present)
    for i in range(4):
        assert torch.equal(selected.fused[i][:, ::8], torch.from_numpy(golden[f"selected{i + 1}"])), i
    first = [(chosen == f).double().mean() for chosen, f in zip(selected.fused, fused[0], strict=True)]
    assert float(sum(first)) / 4 == pytest.approx(float(golden["share_of_source_0"]), abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["hard", "candidate", "score"])
def test_each_rule_equals_its_definition_at_every_level(rule):
    fsm, outputs = random_fsm(rule, temperature=0.3), random_outputs()
    selected = fsm(outputs, PRESENT)
    ours = [*selected.fused, selected.logits]
    for i, sources in enumerate(levels(outputs)):
        scores = torch.stack([slow_score(fsm, i, j, f, PRESENT).expand_as(f) for j, f in enumerate(sources)])
        assert scores.std() > 0.02
        candidates = (1 + scores) * torch.stack(sources)
        if rule == "hard":
            first = candidates[0] >= candidates[1]
            weights = torch.stack((first, ~first)).float()
        else:
            weights = ((candidates if rule == "candidate" else scores) / 0.3).exp()
            weights = weights / weights.sum(0)
        expected = weights[0] * sources[0] + weights[1] * sources[1]
        torch.testing.assert_close(ours[i], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_candidate_rule_approaches_the_hard_one_as_its_temperature_falls():
    outputs = random_outputs(1)
    hard = random_fsm("hard")(outputs, PRESENT)
    away = []
    for temperature in (1.0, 0.1, 0.01, 1e-3, 1e-5):
        soft = random_fsm("candidate", temperature=temperature)(outputs, PRESENT)
        pairs = zip([*soft.fused, soft.logits], [*hard.fused, hard.logits], strict=True)
        away.append(max(float((a - b).abs().mean()) for a, b in pairs))
    assert away == sorted(away, reverse=True) and away[0] > 0.1 and away[-1] < 1e-4, away


@torch.no_grad()
def test_a_rule_can_be_replaced_at_inference():
    fsm, outputs = random_fsm("score"), random_outputs(2)
    for a, b in zip(fsm(outputs, PRESENT, "hard").fused, random_fsm("hard")(outputs, PRESENT).fused, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="'soft': give one of hard, candidate, score"):
        fsm(outputs, PRESENT, "soft")


@torch.no_grad()
def test_unconditioned_or_published_scores_start_without_knowing_the_modalities():
    torch.manual_seed(0)
    outputs = random_outputs(3)
    for fsm in (FSM(WIDTHS, K, 4, conditioned=False), FSM(WIDTHS, K, 4, rule="candidate")):
        results = [fsm(outputs, present) for present in (PRESENT, PRESENT.flip(0), torch.ones_like(PRESENT))]
        for a, b in itertools.combinations(results, 2):
            assert torch.equal(a.logits, b.logits) and all(map(torch.equal, a.fused, b.fused))
    assert not FSM(WIDTHS, K, 4, conditioned=False).modality_bias.requires_grad
    assert FSM(WIDTHS, K, 4).modality_bias.requires_grad


@torch.no_grad()
def test_conditioned_scores_start_near_the_switch():
    fsm, outputs = FSM(WIDTHS, K, 4), random_outputs(3)
    for name, weights in fsm.named_parameters():
        if name != "modality_bias":
            weights.zero_()
    result = fsm(outputs, PRESENT)
    for b, complete in enumerate(PRESENT.all(1).tolist()):
        right, wrong = (outputs[0], outputs[1]) if complete else (outputs[1], outputs[0])
        for i in range(4):
            distance = (result.fused[i][b] - right.fused[i][b]).abs().max()
            assert distance < 0.03 * (wrong.fused[i][b] - right.fused[i][b]).abs().max()


@torch.no_grad()
def test_the_bias_of_a_modality_moves_only_samples_that_have_it():
    outputs = random_outputs(4)
    for m in range(6):  # after the modalities: all are there, some are missing
        fsm = random_fsm()
        before = fsm(outputs, PRESENT)
        fsm.modality_bias[2, 1, m] += 1.0  # stage 3, source 1
        after = fsm(outputs, PRESENT)
        moved = (after.fused[2] != before.fused[2]).flatten(1).any(1)
        complete = PRESENT.all(1)
        assert torch.equal(moved, PRESENT[:, m] if m < 4 else complete if m == 4 else ~complete), m
        assert all(torch.equal(after.fused[i], before.fused[i]) for i in (0, 1, 3))
        assert torch.equal(after.logits, before.logits)


@pytest.mark.parametrize("rule", ["candidate", "score"])
def test_the_relaxed_rules_reach_every_score_weight(rule):
    fsm = random_fsm(rule)
    selected = fsm(random_outputs(5), PRESENT)
    torch.manual_seed(0)
    sum((x * torch.randn_like(x)).mean() for x in (*selected.fused, selected.logits)).backward()
    for name, p in fsm.named_parameters():
        assert torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name


def test_the_hard_rule_gives_the_scores_no_gradient():
    fsm, outputs = random_fsm("hard"), random_outputs(6)
    selected = fsm(outputs, PRESENT)
    assert not selected.logits.requires_grad and not any(f.requires_grad for f in selected.fused)
    for chosen, (first, second) in zip((*selected.fused, selected.logits), levels(outputs), strict=True):
        assert ((chosen == first) | (chosen == second)).all()


def test_feature_distance_is_the_mean_squared_difference_in_units_of_the_channels_deviation():
    student, target = (random_outputs(seed)[0].fused for seed in (7, 8))
    target = tuple(t * torch.rand(t.shape[1])[:, None, None].add(0.1) for t in target)
    expected = 0.0
    for s, t in zip(student, target, strict=True):
        pairs = [(s[:, c], t[:, c]) for c in range(s.shape[1])]
        per_channel = [((a - b) ** 2).mean() / (b.std(correction=0) + 0.01) ** 2 for a, b in pairs]
        expected += sum(per_channel) / len(per_channel)
    torch.testing.assert_close(feature_distance(student, target), expected, rtol=1e-3, atol=0)


# ---- the ensemble and the switch ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    """Teacher and robust model that disagree, and an FSM that fits them."""
    teacher, robust = (build_model("segformer_tiny", K, MODALITIES) for _ in range(2))
    teacher, robust = with_random_weights(teacher), with_random_weights(robust)
    for p in robust.parameters():
        p.data += 0.3 * p.data.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    fsm = with_random_weights(FSM(robust.widths, K, 4, rule="candidate"))
    fsm.modality_bias.data.copy_(torch.randn(fsm.modality_bias.shape, generator=torch.Generator().manual_seed(3)))
    return teacher, robust, fsm


SUBSETS = [(3,), (0, 1, 2, 3), (1, 2), (0, 1, 2, 3), (0, 2, 3)]


def inputs():
    g = torch.Generator().manual_seed(9)
    return torch.randn(2, 4, 3, 45, 64, generator=g), torch.randn(1, 4, 3, 45, 64, generator=g)


def seen(images, degraded, subset):
    """What a model is given: the images and `present`, or composed images, of which all are there."""
    present = torch.tensor([[m in subset for m in range(4)]] * 2)
    if degraded is None:
        return (images, present), present
    degraded = degraded.expand_as(images)
    return (torch.stack([(images if m in subset else degraded)[:, m] for m in range(4)], 1),), present


@torch.no_grad()
@pytest.mark.parametrize("level", ["logits", "features", "both"])
@pytest.mark.parametrize("filled", [False, True])
def test_the_ensemble_equals_its_parts_run_by_hand(models, level, filled):
    teacher, robust, fsm = models
    images, degraded = inputs()
    degraded = degraded if filled else None
    answers = list(selected_logits(fsm, teacher, robust, images, SUBSETS, degraded, level))
    assert len(answers) == len(SUBSETS)
    for subset, answer in zip(SUBSETS, answers, strict=True):
        given, present = seen(images, degraded, subset)
        selected = fsm([teacher(*given), robust(*given)], present)
        decoder = teacher.decoder if present.all() else robust.decoder
        decoded = decoder(selected.fused, (45, 64))
        expected = {
            "logits": selected.logits,
            "features": decoded,
            "both": ((selected.logits.softmax(1) + decoded.softmax(1)) / 2).log(),
        }[level]
        torch.testing.assert_close(answer.softmax(1), expected.softmax(1), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(answer.softmax(1), teacher(*given).logits.softmax(1), atol=1e-3)
        assert not torch.allclose(answer.softmax(1), robust(*given).logits.softmax(1), atol=1e-3)


def test_an_unknown_level_is_refused(models):
    teacher, robust, fsm = models
    with pytest.raises(ValueError, match="level 'feature' is unknown; choose logits, features or both"):
        next(selected_logits(fsm, teacher, robust, inputs()[0], SUBSETS, level="feature"))


@torch.no_grad()
@pytest.mark.parametrize("filled", [False, True])
def test_the_switch_is_the_teacher_on_complete_inputs_and_else_the_robust_model(models, filled):
    teacher, robust, _ = models
    images, degraded = inputs()
    degraded = degraded if filled else None
    answers = list(switch_logits(teacher, robust, images, SUBSETS, degraded))
    for subset, answer in zip(SUBSETS, answers, strict=True):
        given, _ = seen(images, degraded, subset)
        chosen, other = (teacher, robust) if len(subset) == 4 else (robust, teacher)
        torch.testing.assert_close(answer, chosen(*given).logits, rtol=1e-4, atol=1e-4)
        assert (answer - other(*given).logits).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("conditioned", [True, False])
def test_a_selection_comes_back_from_its_file_as_it_was(tmp_path: pathlib.Path, conditioned):
    fsm, outputs = random_fsm("candidate", conditioned, temperature=0.4), random_outputs(10)
    meta = {
        "widths": list(WIDTHS),
        "classes": [str(c) for c in range(K)],
        "modalities": MODALITIES,
        "rule": "candidate",
        "temperature": 0.4,
        "conditioned": conditioned,
    }
    checkpoint.save_model(tmp_path / "fsm.pt", fsm, meta)
    loaded = load_fsm(tmp_path / "fsm.pt", torch.device("cpu"))
    assert loaded.modality_bias.requires_grad == conditioned and not loaded.training
    assert torch.equal(loaded(outputs, PRESENT).logits, fsm(outputs, PRESENT).logits)
