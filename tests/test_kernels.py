"""The definitions against loops and plain PyTorch, Triton against the definitions, on a GPU or in the interpreter."""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False  # on a GPU the reference's convolutions would round their inputs

RUNS_TRITON = kernels.prototype is not None and (DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
PATHS = ["reference", "triton"] if RUNS_TRITON else ["reference"]
needs_triton = pytest.mark.skipif(not RUNS_TRITON, reason="needs triton, and without a GPU TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=PATHS)
def each_path(request, monkeypatch):
    monkeypatch.setenv("RMMSS_KERNELS", request.param)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def distance_inputs(B, M, C, h, w, K, dtype=torch.float32):
    """Student, teacher, labels with some 255, at least one modality a sample, a permutation a sample, and K."""
    labels = torch.randint(0, K, (B, h, w), device=DEVICE)
    labels[torch.rand(B, h, w, device=DEVICE) < 0.2] = 255
    present = torch.rand(B, M, device=DEVICE) < 0.6
    present[torch.arange(B), torch.randint(0, M, (B,))] = True
    match = torch.rand(B, M, device=DEVICE).argsort(1)
    return random(B, M, C, h, w, dtype=dtype), random(B, M, C, h, w, dtype=dtype), labels, present, match, K


def selection_inputs(B, C, h, w, dtype=torch.float32):
    """Two sources, and what makes scores of them: weight and bias."""
    return [random(B, C, h, w, dtype=dtype) for _ in range(2)], random(2, C, 3, 3), random(2)


def distance_to(*others):
    """The call as a function of the student, which alone has a gradient."""
    return lambda student: kernels.prototype_distance(student, *others)


def selection_of(features, rule, temperature):
    """The call as a function of weight and bias, which alone have gradients."""
    return lambda weight, bias: kernels.feature_select(features, weight, bias, rule, temperature)


def nan_filled(make):
    """torch.empty or empty_like whose result is filled with what no kernel writes by chance."""

    def filled(*args, **kwargs):
        out = make(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else -(2**20))

    return filled


def evaluate(path, call, inputs):
    """The output of call(*inputs) on the given path, then the inputs' gradients for a random upstream gradient."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RMMSS_KERNELS", path)
        if path == "triton":
            patch.setattr(torch, "empty", nan_filled(torch.empty))
            patch.setattr(torch, "empty_like", nan_filled(torch.empty_like))
        output = call(*inputs)
        if not output.requires_grad:
            return [output]
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
        grads = torch.autograd.grad(output, inputs, upstream, allow_unused=True)
    return [output.detach(), *(g for g in grads if g is not None)]


def assert_close(found, expected):
    """Each tensor's largest error is at most 1e-5 of the largest value expected."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


def assert_triton_agrees(call, inputs):
    assert_close(evaluate("triton", call, inputs), evaluate("reference", call, inputs))


def assert_as_exact_as_pytorch(found, pytorch, truth, floor):
    """Each tensor errs at most twice as much as PyTorch, or by `floor` of the largest true value, if that is more."""
    for i, (a, b, t) in enumerate(zip(found, pytorch, truth, strict=True)):
        error, other = ((x.double() - t).abs().max().item() for x in (a, b))
        assert error <= max(2 * other, floor * t.abs().max().item()), f"tensor {i}: {error}, that of PyTorch {other}"


# ------------------------------------------------------- the definitions against loops and plain PyTorch
def plain_select(features, weight, bias, rule, temperature):
    """Depth-wise convolution, sum over channels, sigmoid, choice; in the features' dtype."""
    C = features[0].shape[1]
    maps = [F.conv2d(f, w[:, None].to(f.dtype), padding=1, groups=C) for f, w in zip(features, weight, strict=True)]
    bias = bias.to(maps[0].dtype).expand(len(maps[0]), len(maps))  # (B, S)
    scores = [torch.sigmoid(m.sum(1, keepdim=True) + bias[:, j, None, None, None]) for j, m in enumerate(maps)]
    candidates = torch.stack([(1 + s) * f for s, f in zip(scores, features, strict=True)])
    if rule == "hard":
        selected, best = features[0], candidates[0]
        for f, candidate in zip(features[1:], candidates[1:], strict=True):
            selected = torch.where(candidate > best, f, selected)
            best = torch.maximum(best, candidate)
        return selected
    weights = ((torch.stack(scores) if rule == "score" else candidates) / temperature).softmax(0)
    return (weights * torch.stack(list(features))).sum(0)


def test_the_definition_of_pooling_is_the_mean_over_each_class():
    features, _, labels, *_ = distance_inputs(2, 3, 5, 9, 8, 40)
    labels[1] = 255
    prototypes, counts = reference.prototype_pool(features, labels, 40)
    assert counts.dtype == torch.int32 and not counts.all(1)[0]  # so some class does not occur
    for b, k in itertools.product(range(2), range(40)):
        pixels = features[b, :, :, labels[b] == k]  # (M, C, n)
        assert counts[b, k] == pixels.shape[2]
        assert_close([prototypes[b, :, k]], [pixels.sum(2) / max(pixels.shape[2], 1)])


def test_the_distance_is_divided_by_classes_channels_and_samples_and_summed_over_modalities(each_path):
    """Two classes of one pixel each, so that the prototypes are the pixels; a third class that does not occur."""
    student, teacher, _, present, match, _ = distance_inputs(2, 3, 4, 1, 2, 3)
    labels = torch.tensor([0, 1], device=DEVICE).expand(2, 1, 2)
    pairs = [(student[b, m], teacher[b, match[b, m]]) for b, m in present.nonzero().tolist()]
    divergences = [F.kl_div(s.log_softmax(2), t.softmax(2), reduction="sum") for s, t in pairs]
    found = kernels.prototype_distance(student, teacher, labels, present, match, 3)
    assert_close([found], [sum(divergences) / (3 * 4 * 2)])


def test_the_definition_of_the_cosine_is_the_one_to_the_pixels_own_class():
    features, _, labels, *_ = distance_inputs(2, 2, 5, 4, 6, 3)
    features[1, 1] = 0  # as of an absent modality: no direction, so 0

    def plain(features, prototypes):
        own = torch.stack([each[:, y.clamp(max=2)] for each, y in zip(prototypes, labels, strict=True)])
        cosine = F.cosine_similarity(features.movedim(2, 4), own, dim=4)  # of (B, M, h, w, C)
        return cosine.where((labels < 3)[:, None] & features.any(2), 0)

    inputs = [features, random(2, 2, 3, 5)]
    found = evaluate("reference", lambda f, p: reference.pixel_prototype_cosine(f, labels, p), inputs)
    assert_close(found, evaluate("reference", plain, inputs))


@pytest.mark.parametrize("rule", kernels.RULES)
@pytest.mark.parametrize("temperature", [0.2, 3.0])
def test_the_definition_of_the_selection_is_the_convolution_and_the_choice(rule, temperature):
    features = [random(2, 6, 5, 7, dtype=torch.float64) for _ in range(3)]
    inputs = [random(3, 6, 3, 3, dtype=torch.float64), random(2, 3, dtype=torch.float64)]
    expected = evaluate("reference", lambda w, b: plain_select(features, w, b, rule, temperature), inputs)
    assert_close(evaluate("reference", selection_of(features, rule, temperature), inputs), expected)


def test_equal_candidates_select_the_first_source(each_path):
    """Scores of 1 and 0 make (1 + 1) f and (1 + 0) 2 f of f and 2 f."""
    f, weight, bias = random(1, 3, 4, 5), torch.zeros(2, 3, 3, 3).to(DEVICE), torch.tensor([80.0, -80.0]).to(DEVICE)
    for sources, scores in (([f, 2 * f], bias), ([2 * f, f], -bias)):
        assert torch.equal(kernels.feature_select(sources, weight, scores, "hard", 0.2), sources[0])


def test_an_ignored_pixel_that_is_not_a_number_poisons_nothing():
    student, teacher, labels, *others = distance_inputs(2, 2, 5, 6, 7, 4)
    prototypes, broken = random(2, 2, 4, 5), (student.clone(), teacher.clone())
    labels[0, 0, :3] = 255
    for x in broken:
        x[0, :, :, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    calls = [
        lambda s, t, _: kernels.prototype_distance(s, t, labels, *others),
        lambda s, *_: reference.prototype_pool(s, labels, 4)[0],
        lambda s, _, p: reference.pixel_prototype_cosine(s, labels, p),
    ]
    for path, call in itertools.product(PATHS, calls):
        expected = evaluate(path, call, [student, teacher, prototypes])
        assert_close(evaluate(path, call, [*broken, prototypes]), expected)


@pytest.mark.parametrize("rule", kernels.RULES)
@pytest.mark.parametrize("source", [0, 1])
def test_a_feature_that_is_not_a_number_is_passed_on_and_spoils_its_neighbours_alone(rule, source, each_path):
    """The 3 x 3 pixels whose scores see it; by the hard rule, which takes its source there, none but itself."""
    features, weight, bias = selection_inputs(1, 5, 9, 11)
    features[source][0, 2, 4, 6] = float("nan")
    expected = features[source].isnan()
    if rule != "hard":
        expected[:, :, 3:6, 5:8] = True
    assert torch.equal(kernels.feature_select(features, weight, bias, rule, 0.5).isnan(), expected)


# ------------------------------------------------------------------------- Triton against the definitions
# B, M, C, h, w, K; the last but one has more pixels than one program of the pooling sums
MAPS = [(1, 1, 1, 1, 1, 1), (2, 3, 5, 7, 11, 4), (1, 6, 3, 2, 3, 40), (2, 2, 33, 13, 17, 19), (1, 1, 512, 3, 5, 7)]
MAPS += [(1, 2, 20, 37, 31, 25), (1, 2, 4, 5, 5, 200)]
# B, C, h, w; the third has several tiles, and a C that is no multiple of any block
SOURCES = [(1, 1, 1, 1), (2, 5, 7, 11), (1, 17, 7, 31), (1, 70, 3, 33), (2, 5, 13, 2)]


@needs_triton
@pytest.mark.parametrize("sizes", MAPS)
def test_triton_distance_equals_the_definition(sizes):
    student, teacher, *others = distance_inputs(*sizes)
    assert_triton_agrees(distance_to(3 * teacher, *others), [3 * student])


@needs_triton
@pytest.mark.parametrize("sizes", SOURCES)
@pytest.mark.parametrize("rule", kernels.RULES)
def test_triton_selection_equals_the_definition(rule, sizes):
    features, weight, bias = selection_inputs(*sizes)
    weight /= 3 * sizes[1] ** 0.5
    for each in (bias, random(sizes[0], 2)):
        assert_triton_agrees(selection_of(features, rule, 1.0), [weight, each])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_distance_in_half_precision_errs_at_most_twice_as_much_as_pytorch(dtype):
    student, teacher, *others = distance_inputs(2, 3, 6, 9, 8, 5, dtype=dtype)
    found = evaluate("triton", distance_to(teacher, *others), [student])
    pytorch = evaluate("reference", lambda f: reference.prototype_distance_loop(f, teacher, *others), [student])
    truth = evaluate("reference", distance_to(teacher.float(), *others), [student.float()])
    assert found[0].dtype == torch.float32
    assert_as_exact_as_pytorch(found, pytorch, truth, 1e-6)


@needs_triton
@pytest.mark.parametrize("rule", kernels.RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_selection_errs_at_most_twice_as_much_as_pytorch(rule, dtype):
    """At the low temperature the scores' gradients are differences of large numbers. The truth is in float64."""
    temperature, scale, floor = (0.2, 1, 1e-5) if dtype == torch.float32 else (0.5, 5, 1e-6)
    sources, weight, _ = selection_inputs(2, 6, 9, 8, dtype=dtype)
    inputs = [weight / scale, random(2, 2)]
    double = selection_of([f.double() for f in sources], rule, temperature)
    truth = evaluate("reference", double, [x.double() for x in inputs])
    pytorch = evaluate("reference", lambda w, b: plain_select(sources, w, b, rule, temperature), inputs)
    found = evaluate("triton", selection_of(sources, rule, temperature), inputs)
    assert found[0].dtype == dtype
    assert_as_exact_as_pytorch(found, pytorch, truth, floor)


def test_sums_and_weights_are_float32_whatever_the_features_are(each_path):
    student, teacher, *others = distance_inputs(1, 2, 5, 24, 24, 3, dtype=torch.bfloat16)
    found = kernels.prototype_distance(student, teacher, *others)
    expected = reference.prototype_distance(student.float(), teacher.float(), *others)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    sources, weight, bias = selection_inputs(1, 5, 24, 24)
    weight = weight.bfloat16()  # of 16 bits are the weights alone
    expected = reference.feature_select(sources, weight.float(), bias, "score", 0.2)
    assert_close([kernels.feature_select(sources, weight, bias, "score", 0.2)], [expected])


@needs_triton
@pytest.mark.parametrize(
    "pattern",  # repeated over two samples of 42 pixels
    [[255], [2], 30 * [1] + [3] + 11 * [1], [-1, -100, 4, 2**40, 0, 1, 2, 3, 255], 42 * [255] + 8 * [0, 1, 2, 3, 255]],
    ids=["all ignored", "one class", "one pixel", "strange values", "one sample ignored"],
)
def test_triton_takes_every_kind_of_labels(pattern):
    student, teacher, _, *others = distance_inputs(2, 2, 5, 6, 7, 4)
    labels = torch.tensor((84 * pattern)[:84], device=DEVICE).view(2, 6, 7)
    assert_triton_agrees(distance_to(teacher, labels, *others), [student])


@needs_triton
def test_triton_takes_any_strides():
    B, M, C, h, w, K = 2, 3, 5, 6, 8, 4
    _, _, labels, present, match, _ = distance_inputs(B, M, C, w, h, K)
    match[0, :2] = match[0, 2]  # no permutation
    others = labels.transpose(1, 2), present.t().contiguous().t(), match.t().contiguous().t(), K

    def views():  # twins have equal strides
        yield random(B, M, h, w, C).permute(0, 1, 4, 2, 3)  # channels last
        yield random(B, M, 2 * C, h, w)[:, :, ::2]
        yield random(B, M, C, h + 2, w + 3)[..., 1:-1, 2:-1]  # cropped
        yield random(B, M, C, w, h).transpose(3, 4)
        yield random(1, M, C, h, w).expand(B, M, C, h, w)

    weight, bias, students = random(C, 2, 3, 3).transpose(0, 1), random(2, B).t(), [*views()]
    for student, twin, teacher in zip(students, views(), students[1:] + students[:1], strict=True):
        assert_triton_agrees(distance_to(teacher, *others), [student])
        assert_triton_agrees(distance_to(student.clone(), *others), [student])
        assert_triton_agrees(distance_to(twin, *others), [student])
        dense, last = student[:, 0].contiguous(), teacher[:, 0].contiguous(memory_format=torch.channels_last)
        for sources in ([student[:, 0], student[:, 1]], [student[:, 0], teacher[:, 0]], [dense, last], [last, dense]):
            assert_triton_agrees(selection_of(sources, "candidate", 1.0), [weight, bias])


# ------------------------------------------------------------------------- gradcheck, dispatch, errors
def test_gradients_of_the_definitions_are_those_of_finite_differences():
    student, *others = distance_inputs(2, 2, 3, 4, 5, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda x: reference.prototype_distance(x, *others), student.requires_grad_())
    features, weight, bias = selection_inputs(1, 3, 4, 5)
    sources, learning = [x.double() for x in features], [x.double().requires_grad_() for x in (weight, bias)]
    for rule in ("candidate", "score"):
        assert torch.autograd.gradcheck(lambda w, b, r=rule: reference.feature_select(sources, w, b, r, 0.5), learning)


def test_autocast_does_not_lower_the_precision(monkeypatch):
    monkeypatch.setenv("RMMSS_KERNELS", "reference")
    distance, selection = distance_inputs(1, 2, 8, 9, 9, 4), selection_inputs(1, 8, 9, 9)
    for call, *given in (kernels.prototype_distance, *distance), (kernels.feature_select, *selection, "score", 0.2):
        expected = call(*given)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert torch.equal(call(*given), expected)


def test_the_variable_chooses_the_path(monkeypatch):
    given = [x.cpu() if isinstance(x, torch.Tensor) else x for x in distance_inputs(1, 1, 2, 3, 3, 2)]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for choice, sentence in ("cuda", "'cuda'"), ("triton", "TRITON_INTERPRET=1; found torch.float32 on cpu"):
        monkeypatch.setenv("RMMSS_KERNELS", choice)
        with pytest.raises(ValueError, match=f"RMMSS_KERNELS.*{sentence}"):
            kernels.prototype_distance(*given)
    monkeypatch.delenv("RMMSS_KERNELS")
    kernels.prototype_distance(*given)


def test_the_hard_rule_has_no_gradient_and_the_sources_never(each_path):
    sources, weight, bias = selection_inputs(1, 4, 5, 6)
    weight.requires_grad_()
    assert not kernels.feature_select(sources, weight, bias, "hard", 0.2).requires_grad
    sources[1].requires_grad_()
    with pytest.raises(ValueError, match="features.1. requires a gradient"):
        kernels.feature_select(sources, weight, bias, "score", 0.2)
    with torch.no_grad():  # nobody asks for one here
        kernels.feature_select(sources, weight, bias, "score", 0.2)


X, LABELS = torch.zeros(2, 3, 4, 5, 6), torch.zeros(2, 5, 6, dtype=torch.int64)
PRESENT, MATCH = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.int64)
SOURCES_OF_X, WEIGHT, BIAS = [X[:, 0], X[:, 1]], torch.zeros(2, 4, 3, 3), torch.zeros(2)


@pytest.mark.parametrize(
    "sentence, given",
    [
        ("student is .*not empty", (X[:0], X[:0], LABELS, PRESENT, MATCH, 3)),
        ("labels is .*int32", (X, X, LABELS.int(), PRESENT, MATCH, 3)),
        ("labels is .2, 4, 6.", (X, X, LABELS[:, :4], PRESENT, MATCH, 3)),
        ("give floating .B, M, C, h, w.", (X[0], X[0], LABELS, PRESENT, MATCH, 3)),
        ("teacher is .*float16", (X, X.half(), LABELS, PRESENT, MATCH, 3)),
        ("present is .*give .B, M.", (X, X, LABELS, PRESENT.float(), MATCH, 3)),
        ("match is", (X, X, LABELS, PRESENT, MATCH[:, :2], 3)),
        ("num_classes", (X, X, LABELS, PRESENT, MATCH, 0)),
        ("features.0. is .*not empty", ([X[:0, 0], X[:0, 1]], WEIGHT, BIAS, "score", 0.2)),
        ("features is empty", ([], WEIGHT, BIAS, "score", 0.2)),
        ("temperature is 0.0", (SOURCES_OF_X, WEIGHT, BIAS, "score", 0.0)),
        ("features.1. is", ([X[:, 0], X[:, 0, :3]], WEIGHT, BIAS, "score", 0.2)),
        ("weight is", (SOURCES_OF_X, WEIGHT[:1], BIAS, "score", 0.2)),
        ("bias is", (SOURCES_OF_X, WEIGHT, BIAS[:1], "score", 0.2)),
        ("rule is 'soft'", (SOURCES_OF_X, WEIGHT, BIAS, "soft", 0.2)),
        ("meta", (SOURCES_OF_X, WEIGHT.to("meta"), BIAS, "score", 0.2)),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(sentence, given):
    call = kernels.prototype_distance if len(given) == 6 else kernels.feature_select
    with pytest.raises(ValueError, match=sentence):
        call(*given)
