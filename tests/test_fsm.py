"""fsm.py: the hard rule against the published outputs, the relaxations against loops, the ensemble piece by piece."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import GOLDEN, MODALITIES, golden_images, golden_weights, with_random_weights

from engine import checkpoint
from engine.subsets import load_fsm, selected_logits, switch_logits
from fsm import FSM, feature_distance
from model import build_model
from segformer import Output

WIDTHS, K = (6, 8, 10, 12), 5
PRESENT = torch.tensor([[True, True, True, True], [True, False, False, True], [False, False, True, False]])


def random_fsm(rule="score", widths=WIDTHS, **options):
    fsm = with_random_weights(FSM(widths, K, 4, rule=rule, **options))
    fsm.modality_bias.data.copy_(torch.randn(fsm.modality_bias.shape, generator=torch.Generator().manual_seed(2)))
    return fsm


def random_outputs(seed=0):
    """Of two models, for the three samples of PRESENT."""
    g, outputs = torch.Generator().manual_seed(seed), []
    for _ in range(2):
        fused = tuple(torch.randn(3, c, 8 >> i, 10 >> i, generator=g) for i, c in enumerate(WIDTHS))
        outputs.append(Output(torch.randn(3, K, 32, 40, generator=g), fused, ()))
    return outputs


def maps(output):
    """The five that are selected: stages 1..4, logits."""
    return [*output.fused, output.logits]


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
    first = [(chosen == f).double().mean().item() for chosen, f in zip(selected.fused, fused[0], strict=True)]
    assert sum(first) / 4 == pytest.approx(float(golden["share_of_source_0"]), abs=1e-6)


@pytest.mark.parametrize("rule", ["hard", "candidate", "score"])
def test_each_rule_equals_its_definition_at_every_level(rule):
    fsm, outputs = random_fsm(rule, temperature=0.3), random_outputs()
    for i, (found, *sources) in enumerate(zip(*map(maps, [fsm(outputs, PRESENT), *outputs]), strict=True)):
        scores = torch.stack([slow_score(fsm, i, j, f, PRESENT).expand_as(f) for j, f in enumerate(sources)])
        assert scores.std() > 0.02 and found.requires_grad == (rule != "hard")
        candidates = (1 + scores) * torch.stack(sources)
        expected = torch.where(candidates[0] >= candidates[1], *sources)
        if rule != "hard":
            weights = ((candidates if rule == "candidate" else scores) / 0.3).exp()
            expected = (weights * torch.stack(sources)).sum(0) / weights.sum(0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_candidate_rule_approaches_the_hard_one_as_its_temperature_falls():
    outputs = random_outputs(1)
    hard, away = maps(random_fsm("hard")(outputs, PRESENT)), []
    for temperature in (1.0, 0.1, 0.01, 1e-3, 1e-5):
        soft = maps(random_fsm("candidate", temperature=temperature)(outputs, PRESENT))
        away.append(max(float((a - b).abs().mean()) for a, b in zip(soft, hard, strict=True)))
    assert away == sorted(away, reverse=True) and away[0] > 0.1 and away[-1] < 1e-4, away


@torch.no_grad()
def test_a_rule_can_be_replaced_at_inference():
    fsm, outputs = random_fsm("score"), random_outputs(2)
    assert all(map(torch.equal, maps(fsm(outputs, PRESENT, "hard")), maps(random_fsm("hard")(outputs, PRESENT))))
    with pytest.raises(ValueError, match="'soft': give one of hard, candidate, score"):
        fsm(outputs, PRESENT, "soft")


@torch.no_grad()
@pytest.mark.parametrize("options", [{"conditioned": False}, {"rule": "candidate"}])
def test_unconditioned_or_published_scores_start_without_knowing_the_modalities(options):
    fsm, outputs = FSM(WIDTHS, K, 4, **options), random_outputs(3)
    first, *others = [maps(fsm(outputs, p)) for p in (PRESENT, PRESENT.flip(0), torch.ones_like(PRESENT))]
    assert all(map(torch.equal, first * 2, itertools.chain(*others)))
    assert fsm.modality_bias.requires_grad == options.get("conditioned", True)


@torch.no_grad()
def test_conditioned_scores_start_near_the_switch():
    fsm, outputs = FSM(WIDTHS, K, 4), random_outputs(3)
    for name, weights in fsm.named_parameters():
        if name != "modality_bias":
            weights.zero_()
    result = fsm(outputs, PRESENT)
    for b, complete in enumerate(PRESENT.all(1).tolist()):
        right, wrong = outputs if complete else outputs[::-1]
        for found, ours, other in zip(result.fused, right.fused, wrong.fused, strict=True):
            assert (found - ours)[b].abs().max() < 0.03 * (other - ours)[b].abs().max()


@torch.no_grad()
@pytest.mark.parametrize("m", range(6))  # after the modalities: all are there, some are missing
def test_the_bias_of_a_modality_moves_only_samples_that_have_it(m):
    fsm, outputs = random_fsm(), random_outputs(4)
    before = maps(fsm(outputs, PRESENT))
    fsm.modality_bias[2, 1, m] += 1.0  # stage 3, source 1
    moved = [(a != b).flatten(1).any(1) for a, b in zip(maps(fsm(outputs, PRESENT)), before, strict=True)]
    complete = PRESENT.all(1)
    assert torch.equal(moved.pop(2), PRESENT[:, m] if m < 4 else complete if m == 4 else ~complete)
    assert not torch.stack(moved).any()


@pytest.mark.parametrize("rule", ["candidate", "score"])
def test_the_relaxed_rules_reach_every_score_weight(rule):
    fsm = random_fsm(rule)
    torch.manual_seed(0)
    sum((x * torch.randn_like(x)).mean() for x in maps(fsm(random_outputs(5), PRESENT))).backward()
    for name, p in fsm.named_parameters():
        assert torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name


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
SUBSETS = [(3,), (0, 1, 2, 3), (1, 2), (0, 1, 2, 3), (0, 2, 3)]
IMAGES = torch.randn(2, 4, 3, 45, 64, generator=torch.Generator().manual_seed(9))
DEGRADED = torch.randn(1, 4, 3, 45, 64, generator=torch.Generator().manual_seed(10))


@pytest.fixture(scope="module")
def models():
    """Teacher and robust model that disagree, and an FSM that fits them."""
    teacher, robust = (with_random_weights(build_model("segformer_tiny", K, MODALITIES)) for _ in range(2))
    for p in robust.parameters():
        p.data += 0.3 * p.data.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return teacher, robust, random_fsm("candidate", robust.widths)


def run_by_hand(models, degraded):
    """For each subset `present`, and what the models answer to it or to composed images, of which all are there."""
    for subset in SUBSETS:
        present = torch.tensor([[m in subset for m in range(4)]] * 2)
        composed = None if degraded is None else torch.where(present[:, :, None, None, None], IMAGES, degraded)
        yield present, [model(IMAGES, present) if degraded is None else model(composed) for model in models]


@torch.no_grad()
@pytest.mark.parametrize("degraded", [None, DEGRADED], ids=["left out", "degraded"])
def test_the_ensemble_equals_its_parts_run_by_hand(models, degraded):
    teacher, robust, fsm = models
    answers = selected_logits(fsm, teacher, robust, IMAGES, SUBSETS, degraded)
    for (present, sources), answer in zip(run_by_hand([teacher, robust], degraded), answers, strict=True):
        selected = fsm(sources, present)
        decoded = (teacher if present.all() else robust).decoder(selected.fused, (45, 64)).softmax(1)
        expected = (selected.logits.softmax(1) + decoded) / 2
        torch.testing.assert_close(answer.softmax(1), expected, rtol=1e-4, atol=1e-6)
        for source in sources:
            assert not torch.allclose(answer.softmax(1), source.logits.softmax(1), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("degraded", [None, DEGRADED], ids=["left out", "degraded"])
def test_the_switch_is_the_teacher_on_complete_inputs_and_else_the_robust_model(models, degraded):
    answers = switch_logits(*models[:2], IMAGES, SUBSETS, degraded)
    for (present, sources), answer in zip(run_by_hand(models[:2], degraded), answers, strict=True):
        chosen, other = sources if present.all() else sources[::-1]
        torch.testing.assert_close(answer, chosen.logits, rtol=1e-4, atol=1e-4)
        assert (answer - other.logits).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("conditioned", [True, False])
def test_a_selection_comes_back_from_its_file_as_it_was(tmp_path, conditioned):
    fsm, outputs = random_fsm("candidate", conditioned=conditioned, temperature=0.4), random_outputs(10)
    meta = {"widths": list(WIDTHS), "classes": [*"abcde"], "modalities": MODALITIES}
    meta |= {"rule": "candidate", "temperature": 0.4, "conditioned": conditioned, "sources": [0, 0]}
    checkpoint.save_model(tmp_path / "fsm.pt", fsm, meta)
    loaded = load_fsm(tmp_path / "fsm.pt", torch.device("cpu"))
    assert loaded.modality_bias.requires_grad == conditioned and not loaded.training
    assert torch.equal(loaded(outputs, PRESENT).logits, fsm(outputs, PRESENT).logits)
