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


# ------------------------------------------------------------------------------------------------- helpers


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def labelled(B, h, w, K, ignored=0.2):
    """Labels in 0..K-1 with some 255, (B, h, w)."""
    labels = torch.randint(0, K, (B, h, w), device=DEVICE)
    return labels.masked_fill(torch.rand(B, h, w, device=DEVICE) < ignored, 255)


def modalities(B, M):
    """present (B, M) with at least one modality a sample, match (B, M): a permutation a sample."""
    present = torch.rand(B, M, device=DEVICE) < 0.6
    present[torch.arange(B), torch.randint(0, M, (B,))] = True
    return present, torch.rand(B, M, device=DEVICE).argsort(1)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def nan_filled(make):
    """torch.empty or empty_like whose result is filled with what no kernel writes by chance."""

    def filled(*args, **kwargs):
        out = make(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else -(2**20))

    return filled


def evaluate(path, call, inputs, monkeypatch):
    """Outputs of call(*inputs) on the given path, then the gradients of all inputs for random upstream gradients."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    with monkeypatch.context() as patch:
        patch.setenv("RMMSS_KERNELS", path)
        if path == "triton":
            patch.setattr(torch, "empty", nan_filled(torch.empty))
            patch.setattr(torch, "empty_like", nan_filled(torch.empty_like))
        outputs = call(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        taught = [out for out in outputs if out.requires_grad]
        random_state = torch.Generator().manual_seed(1)
        upstream = [torch.randn(out.shape, generator=random_state).to(out) for out in taught]
        wanted = [x for x in inputs if x.requires_grad]
        grads = torch.autograd.grad(taught, wanted, upstream, allow_unused=True) if taught else []
    return [*(out.detach() for out in outputs), *(g for g in grads if g is not None)]


def assert_close(found, expected, floor=0.0):
    """Each tensor's largest error is at most 1e-5 of the largest value expected, or of floor, if that is larger."""
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, f"tensor {i}: {a.shape} {a.dtype}, not {b.shape} {b.dtype}"
        error = (a.double() - b.double()).abs()
        assert not error.isnan().any(), f"tensor {i} has {int(error.isnan().sum())} NaN: elements left unwritten?"
        if error.max() > 1e-5 * max(b.double().abs().max().item(), floor):
            at = tuple(int(j) for j in (error == error.max()).nonzero()[0])
            raise AssertionError(f"tensor {i} at {at}: expected {b[at].item()}, found {a[at].item()}")


def assert_triton_agrees(call, inputs, monkeypatch, floor=0.0):
    found = evaluate("triton", call, inputs, monkeypatch)
    assert_close(found, evaluate("reference", call, inputs, monkeypatch), floor)


# ------------------------------------------------------- the definitions against loops and plain PyTorch


def plain_select(features, weight, bias, rule, temperature):
    """Depth-wise convolution, sum over channels, sigmoid, choice; in the features' dtype."""
    C = features[0].shape[1]
    maps = [F.conv2d(f, w[:, None].to(f.dtype), padding=1, groups=C) for f, w in zip(features, weight, strict=True)]
    bias = bias.to(maps[0].dtype).expand(len(maps[0]), len(maps))  # (B, S)
    scores = [torch.sigmoid(m.sum(1, keepdim=True) + bias[:, j, None, None, None]) for j, m in enumerate(maps)]
    candidates = torch.stack([(1 + s) * f for s, f in zip(scores, features, strict=True)])
    sources = torch.stack(list(features))
    if rule == "hard":
        selected, best = features[0], candidates[0]
        for f, candidate in zip(features[1:], candidates[1:], strict=True):
            selected = torch.where(candidate > best, f, selected)
            best = torch.maximum(best, candidate)
        return selected
    weights = ((torch.stack(scores) if rule == "score" else candidates) / temperature).softmax(0)
    return (weights * sources).sum(0)


def test_the_definition_of_pooling_is_the_mean_over_each_class(monkeypatch):
    features, labels = random(2, 3, 5, 7, 6), labelled(2, 7, 6, 9)
    prototypes, counts = reference.prototype_pool(features, labels, 9)
    assert counts.dtype == torch.int32 and prototypes.dtype == torch.float32
    for b, k in itertools.product(range(2), range(9)):
        pixels = features[b, :, :, labels[b] == k]  # (M, C, n)
        assert counts[b, k] == pixels.shape[2]
        assert_close([prototypes[b, :, k]], [pixels.mean(2) if pixels.shape[2] else torch.zeros(3, 5).to(pixels)])


def test_the_distance_is_divided_by_classes_channels_and_samples_and_summed_over_modalities(monkeypatch):
    """Two classes of one pixel each, so that the prototypes are the pixels; a third class that does not occur."""
    student, teacher = random(2, 3, 4, 1, 2), random(2, 3, 4, 1, 2)
    labels, present = torch.tensor([0, 1], device=DEVICE).expand(2, 1, 2), torch.ones(2, 3, device=DEVICE).bool()
    match = torch.arange(3, device=DEVICE).expand(2, 3)
    expected = F.kl_div(student.log_softmax(4), teacher.softmax(4), reduction="sum") / (3 * 4 * 2)
    for path in PATHS:
        monkeypatch.setenv("RMMSS_KERNELS", path)
        assert_close([kernels.prototype_distance(student, teacher, labels, present, match, 3)], [expected])


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_the_definition_of_the_distance_is_the_loop_over_samples_modalities_and_classes(layout, monkeypatch):
    monkeypatch.setenv("RMMSS_KERNELS", "reference")
    student, teacher, labels = 3 * random(3, 4, 5, 6, 7), 3 * random(3, 4, 5, 6, 7), labelled(3, 6, 7, 12)
    if layout == "channels last":
        student, teacher = (x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) for x in (student, teacher))
    labels[1] = 255  # a sample without a labelled pixel adds 0
    present, match = modalities(3, 4)
    found = kernels.prototype_distance(student, teacher, labels, present, match, 12)
    assert_close([found], [reference.prototype_distance_loop(student, teacher, labels, present, match, 12)])


def test_the_definition_of_the_cosine_is_the_one_to_the_pixels_own_class():
    features, labels, prototypes = random(2, 2, 5, 4, 6), labelled(2, 4, 6, 3), random(2, 2, 3, 5)
    features[1, 1] = 0  # as of an absent modality: no direction, so 0
    features.requires_grad_()
    found = reference.pixel_prototype_cosine(features, labels, prototypes)
    for b, m, y, x in itertools.product(range(2), range(2), range(4), range(6)):
        expected = torch.zeros((), device=DEVICE)
        if labels[b, y, x] < 3:
            expected = F.cosine_similarity(features[b, m, :, y, x], prototypes[b, m, labels[b, y, x]], dim=0)
        assert found[b, m, y, x].item() == pytest.approx(expected.item(), abs=1e-6)
    grad = torch.autograd.grad(found.sum(), features)[0]
    assert not grad[1, 1].any() and not grad[0, :, :, labels[0] == 255].any() and grad[0].any()


@pytest.mark.parametrize("rule", kernels.RULES)
@pytest.mark.parametrize("temperature", [0.2, 3.0])
def test_the_definition_of_the_selection_is_the_convolution_and_the_choice(rule, temperature, monkeypatch):
    monkeypatch.setenv("RMMSS_KERNELS", "reference")
    features, weight, bias = [random(2, 6, 5, 7) for _ in range(3)], random(3, 6, 3, 3), random(2, 3)
    found = kernels.feature_select(features, weight, bias, rule, temperature)
    assert_close([found], [plain_select(features, weight, bias, rule, temperature)])


def test_equal_candidates_select_the_first_source(monkeypatch):
    """Scores of 1 and 0 make (1 + 1) f and (1 + 0) 2 f of f and 2 f."""
    f, weight, bias = random(1, 3, 4, 5), torch.zeros(2, 3, 3, 3, device=DEVICE), torch.tensor([80.0, -80.0])
    for path, (sources, scores) in itertools.product(PATHS, [([f, 2 * f], bias), ([2 * f, f], -bias)]):
        monkeypatch.setenv("RMMSS_KERNELS", path)
        assert torch.equal(kernels.feature_select(sources, weight, scores.to(DEVICE), "hard", 0.2), sources[0])


def test_an_ignored_pixel_that_is_not_a_number_poisons_nothing(monkeypatch):
    B, M, C, h, w, K = 2, 2, 5, 6, 7, 4
    labels, (present, match) = labelled(B, h, w, K), modalities(B, M)
    labels[0, 0, :3] = 255
    student, teacher, prototypes = random(B, M, C, h, w), random(B, M, C, h, w), random(B, M, K, C)
    broken = student.clone(), teacher.clone()
    for x in broken:
        x[0, :, :, 0, 0] = float("nan")
        x[0, :, :, 0, 1] = float("inf")
        x[0, :, :, 0, 2] = -float("inf")
    calls = {
        "distance": lambda s, t, _: kernels.prototype_distance(s, t.detach(), labels, present, match, K),
        "pool": lambda s, *_: reference.prototype_pool(s, labels, K)[0],
        "cosine": lambda s, _, p: reference.pixel_prototype_cosine(s, labels, p),
    }
    for path, call in itertools.product(PATHS, calls.values()):
        found = evaluate(path, call, [*broken, prototypes], monkeypatch)
        assert_close(found, evaluate(path, call, [student, teacher, prototypes], monkeypatch))


@pytest.mark.parametrize("rule", kernels.RULES)
@pytest.mark.parametrize("source", [0, 1])
def test_a_feature_that_is_not_a_number_is_passed_on_and_spoils_its_neighbours_alone(rule, source, monkeypatch):
    """The 3 x 3 pixels whose scores see it; by the hard rule, which takes its source there, none but itself."""
    weight, bias, features = random(2, 5, 3, 3), random(2), [random(1, 5, 9, 11) for _ in range(2)]
    features[source][0, 2, 4, 6] = float("nan")
    expected = features[source].isnan()
    if rule != "hard":
        expected[:, :, 3:6, 5:8] = True
    for path in PATHS:
        monkeypatch.setenv("RMMSS_KERNELS", path)
        selected = kernels.feature_select(features, weight, bias, rule, 0.5)
        assert torch.equal(selected.isnan(), expected)


def test_gradients_of_the_definitions_pass_gradcheck(monkeypatch):
    monkeypatch.setenv("RMMSS_KERNELS", "reference")
    double = {"dtype": torch.float64, "device": DEVICE, "requires_grad": True}
    x, labels, (present, match) = torch.randn(2, 2, 3, 4, 3, **double), labelled(2, 4, 3, 4), modalities(2, 2)
    last = torch.randn(2, 2, 4, 3, 3, **double)
    teacher, prototypes = torch.randn(2, 2, 3, 4, 3, **double).detach(), torch.randn(2, 2, 4, 3, **double)
    features = [torch.randn(1, 2, 3, 4, **double).detach() for _ in range(2)]
    weight, bias = torch.randn(2, 2, 3, 3, **double), torch.randn(1, 2, **double)
    check = torch.autograd.gradcheck
    assert check(lambda f: reference.prototype_pool(f, labels, 4)[0], x)
    assert check(lambda f: kernels.prototype_distance(f, teacher, labels, present, match, 4), x)
    assert check(lambda f: reference.prototype_pool(f.permute(0, 1, 4, 2, 3), labels, 4)[0], last)
    assert check(lambda f, p: reference.pixel_prototype_cosine(f, labels, p), (x, prototypes))
    for rule in ("score", "candidate"):
        assert check(lambda w, b, rule=rule: kernels.feature_select(features, w, b, rule, 0.7), (weight, bias))


# ------------------------------------------------------------------------- Triton against the definitions

MAPS = [  # B, M, C, h, w, K
    (1, 1, 1, 1, 1, 1),
    (2, 3, 5, 7, 11, 4),
    (1, 6, 3, 2, 3, 40),
    (2, 2, 33, 13, 17, 19),
    (1, 1, 512, 3, 5, 7),
    (1, 2, 20, 37, 31, 25),  # more pixels than one program of the pooling sums
    (1, 2, 4, 5, 5, 200),
]
SOURCES = [  # B, C, h, w
    (1, 1, 1, 1),
    (2, 5, 7, 11),
    (1, 17, 7, 31),  # several tiles, and a C that is no multiple of any block
    (1, 70, 3, 33),
    (2, 5, 13, 2),
]


def distance_to(teacher, labels, present, match, K):
    return lambda student: kernels.prototype_distance(student, teacher, labels, present, match, K)


def selection_of(features, rule, temperature):
    """The call as a function of weight and bias, which alone have gradients."""
    return lambda weight, bias: kernels.feature_select(features, weight, bias, rule, temperature)


@needs_triton
@pytest.mark.parametrize("B, M, C, h, w, K", MAPS)
def test_triton_distance_equals_the_definition(B, M, C, h, w, K, monkeypatch):
    labels, (present, match) = labelled(B, h, w, K), modalities(B, M)
    student, teacher = 3 * random(B, M, C, h, w), 3 * random(B, M, C, h, w)
    assert_triton_agrees(distance_to(teacher, labels, present, match, K), [student], monkeypatch)


@needs_triton
@pytest.mark.parametrize("B, C, h, w", SOURCES)
@pytest.mark.parametrize("rule", kernels.RULES)
def test_triton_selection_equals_the_definition(rule, B, C, h, w, monkeypatch):
    weight, features = random(2, C, 3, 3) / (3 * C**0.5), [random(B, C, h, w) for _ in range(2)]
    for bias in (random(2), random(B, 2)):
        assert_triton_agrees(selection_of(features, rule, 1.0), [weight, bias], monkeypatch)


@needs_triton
def test_triton_selection_at_a_low_temperature_is_as_exact_as_pytorch(monkeypatch):
    """The scores' gradients are differences of large numbers there, for both; the truth is the float64 definition."""
    features, inputs = [random(2, 5, 7, 6) for _ in range(2)], [random(2, 5, 3, 3), random(2, 2)]
    for rule in ("score", "candidate"):
        double = selection_of([f.double() for f in features], rule, 0.2)
        truth = evaluate("reference", double, [x.double() for x in inputs], monkeypatch)
        pytorch = evaluate("reference", selection_of(features, rule, 0.2), inputs, monkeypatch)
        triton = evaluate("triton", selection_of(features, rule, 0.2), inputs, monkeypatch)
        for a, b, t in zip(triton, pytorch, truth, strict=True):
            allowed = max(2 * (b.double() - t).abs().max().item(), 1e-5 * t.abs().max().item())
            assert (a.double() - t).abs().max() <= allowed


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_at_most_twice_as_much_as_pytorch(dtype, monkeypatch):
    B, M, C, h, w, K = 2, 3, 6, 9, 8, 5
    labels, (present, match) = labelled(B, h, w, K), modalities(B, M)
    student, teacher = random(B, M, C, h, w, dtype=dtype), random(B, M, C, h, w, dtype=dtype)
    sources, weight, bias = [random(B, C, h, w, dtype=dtype) for _ in range(2)], random(2, C, 3, 3) / 5, random(2)
    wide = [f.float() for f in sources]
    cases = {  # name: kernel, the same in plain PyTorch in the same precision, the definition in float32; inputs
        "distance": (
            distance_to(teacher, labels, present, match, K),
            lambda f: reference.prototype_distance_loop(f, teacher, labels, present, match, K),
            distance_to(teacher.float(), labels, present, match, K),
            [student],
        )
    }
    for rule in kernels.RULES:
        cases[rule] = (
            lambda w, b, rule=rule: kernels.feature_select(sources, w, b, rule, 0.5),
            lambda w, b, rule=rule: plain_select(sources, w, b, rule, 0.5),
            lambda w, b, rule=rule: kernels.feature_select(wide, w, b, rule, 0.5),
            [weight, bias],
        )
    for name, (kernel, plain, definition, inputs) in cases.items():
        truth = evaluate("reference", definition, [x.float() for x in inputs], monkeypatch)
        found = evaluate("triton", kernel, inputs, monkeypatch)
        pytorch = evaluate("reference", plain, inputs, monkeypatch)
        assert found[0].dtype == (torch.float32 if name == "distance" else dtype)
        for i, (a, b, t) in enumerate(zip(found, pytorch, truth, strict=True)):
            error, allowed = (a.float() - t).abs().max().item(), 2 * (b.float() - t).abs().max().item()
            assert error <= allowed + 1e-6 * t.abs().max().item(), f"{name}, tensor {i}: {error} > {allowed}"


@pytest.mark.parametrize("path", PATHS)
def test_sums_and_weights_are_float32_whatever_the_features_are(path, monkeypatch):
    B, M, C, h, w, K = 1, 2, 5, 24, 24, 3
    labels, (present, match), bias = labelled(B, h, w, K), modalities(B, M), random(2)
    student, teacher = (random(B, M, C, h, w, dtype=torch.bfloat16) for _ in range(2))
    sources, weight = [student[:, 0], student[:, 1]], random(2, C, 3, 3, dtype=torch.bfloat16)
    monkeypatch.setenv("RMMSS_KERNELS", path)
    found = kernels.prototype_distance(student, teacher, labels, present, match, K)
    expected = reference.prototype_distance(student.float(), teacher.float(), labels, present, match, K)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    sources = [source.float() for source in sources]  # of 16 bits are the weights alone
    expected = reference.feature_select(sources, weight.float(), bias, "score", 0.2)
    assert_close([kernels.feature_select(sources, weight, bias, "score", 0.2)], [expected])


@needs_triton
@pytest.mark.parametrize("case", ["all ignored", "one class", "one pixel", "strange values", "one sample ignored"])
def test_triton_takes_every_kind_of_labels(case, monkeypatch):
    B, M, C, h, w, K = 2, 2, 5, 6, 7, 4
    labels = torch.full((B, h, w), 255, device=DEVICE)
    if case == "one class":
        labels[:] = 2
    elif case == "one pixel":
        labels[:] = 1
        labels[:, 3, 4] = 3
    elif case == "strange values":
        labels = labelled(B, h, w, K)
        labels[0, 0, :4] = torch.tensor([-1, -100, K, 2**40], device=DEVICE)
    elif case == "one sample ignored":
        labels[1] = labelled(1, h, w, K)[0]
    student, teacher, (present, match) = random(B, M, C, h, w), random(B, M, C, h, w), modalities(B, M)
    assert_triton_agrees(distance_to(teacher, labels, present, match, K), [student], monkeypatch)


@needs_triton
def test_triton_takes_any_strides(monkeypatch):
    B, M, C, h, w, K = 2, 3, 5, 6, 8, 4
    labels, (present, match) = labelled(B, w, h, K).transpose(1, 2), modalities(B, M)
    match[0, :2] = match[0, 2]  # no permutation
    present, match = present.t().contiguous().t(), match.t().contiguous().t()
    views, twins = (
        {
            "channels last": random(B, M, h, w, C).permute(0, 1, 4, 2, 3),
            "every other channel": random(B, M, 2 * C, h, w)[:, :, ::2],
            "cropped": random(B, M, C, h + 2, w + 3)[..., 1:-1, 2:-1],
            "transposed": random(B, M, C, w, h).transpose(3, 4),
            "expanded": random(1, M, C, h, w).expand(B, M, C, h, w),
        }
        for _ in range(2)
    )  # twins have equal strides
    weight, bias = random(C, 2, 3, 3).transpose(0, 1), random(2, B).t()
    others = [*views.values()][1:] + [views["channels last"]]
    for student, twin, teacher in zip(views.values(), twins.values(), others, strict=True):
        assert_triton_agrees(distance_to(teacher, labels, present, match, K), [student], monkeypatch)
        assert_triton_agrees(distance_to(student.clone(), labels, present, match, K), [student], monkeypatch)
        assert_triton_agrees(distance_to(twin, labels, present, match, K), [student], monkeypatch)
        dense, last = student[:, 0].contiguous(), teacher[:, 0].contiguous(memory_format=torch.channels_last)
        for sources in ([student[:, 0], student[:, 1]], [student[:, 0], teacher[:, 0]], [dense, last], [last, dense]):
            assert_triton_agrees(selection_of(sources, "candidate", 1.0), [weight, bias], monkeypatch)


@needs_triton
def test_triton_reads_neither_absent_modalities_nor_unanswered_teachers(monkeypatch):
    student, teacher, labels = random(2, 3, 4, 5, 6), random(2, 3, 4, 5, 6), labelled(2, 5, 6, 3)
    present = torch.tensor([[True, False, False], [False, True, True]], device=DEVICE)
    match = torch.tensor([[2, 0, 1], [1, 2, 0]], device=DEVICE)
    expected = evaluate("reference", distance_to(teacher, labels, present, match, 3), [student], monkeypatch)
    student[~present] = float("nan")
    teacher[0, :2] = float("nan")
    teacher[1, 1] = float("nan")
    found = evaluate("triton", distance_to(teacher, labels, present, match, 3), [student], monkeypatch)
    assert_close(found, expected)
    assert (found[1][~present] == 0).all()


@needs_triton
def test_triton_gives_identical_bits_twice(monkeypatch):
    labels, (present, match) = labelled(1, 33, 35, 6), modalities(1, 3)
    student, teacher = random(1, 3, 5, 33, 35), random(1, 3, 5, 33, 35)
    sources, weight, bias = [random(1, 3, 9, 35) for _ in range(2)], random(2, 3, 3, 3), random(1, 2)
    cases = [(distance_to(teacher, labels, present, match, 6), [student])]
    cases += [(selection_of(sources, rule, 0.2), [weight, bias]) for rule in kernels.RULES]
    for call, inputs in cases:
        first, second = (evaluate("triton", call, inputs, monkeypatch) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ------------------------------------------------------------------------- dispatch, errors


def test_autocast_does_not_lower_the_precision(monkeypatch):
    monkeypatch.setenv("RMMSS_KERNELS", "reference")
    student, teacher, labels = random(1, 2, 8, 9, 9), random(1, 2, 8, 9, 9), labelled(1, 9, 9, 4)
    present, match = modalities(1, 2)
    sources, weight, bias = [student[:, 0], student[:, 1]], random(2, 8, 3, 3), random(2)
    for call in (
        lambda: kernels.prototype_distance(student, teacher, labels, present, match, 4),
        lambda: kernels.feature_select(sources, weight, bias, "score", 0.2),
    ):
        expected = call()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert torch.equal(call(), expected)


def test_the_variable_chooses_the_path(monkeypatch):
    x, labels = torch.randn(1, 1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.int64)
    present, match = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int64)
    monkeypatch.setenv("RMMSS_KERNELS", "cuda")
    with pytest.raises(ValueError, match="RMMSS_KERNELS is 'cuda'"):
        kernels.prototype_distance(x, x, labels, present, match, 2)
    monkeypatch.setenv("RMMSS_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1; found torch.float32 on cpu"):
        kernels.prototype_distance(x, x, labels, present, match, 2)
    monkeypatch.delenv("RMMSS_KERNELS")
    kernels.prototype_distance(x, x, labels, present, match, 2)


def test_the_hard_rule_has_no_gradient_and_the_sources_never(monkeypatch):
    weight = random(2, 4, 3, 3).requires_grad_()
    sources, bias = [random(1, 4, 5, 6) for _ in range(2)], torch.zeros(2, device=DEVICE)
    for path in PATHS:
        monkeypatch.setenv("RMMSS_KERNELS", path)
        assert not kernels.feature_select(sources, weight, bias, "hard", 0.2).requires_grad
        learns = [sources[0], sources[1].clone().requires_grad_()]
        with pytest.raises(ValueError, match="features.1. requires a gradient"):
            kernels.feature_select(learns, weight, bias, "score", 0.2)
        with torch.no_grad():  # nobody asks for one here
            kernels.feature_select(learns, weight, bias, "score", 0.2)


def test_bad_arguments_are_refused_in_one_sentence():
    x, labels = torch.randn(2, 3, 4, 5, 6), torch.zeros(2, 5, 6, dtype=torch.int64)
    present, match = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.int64)
    sources, weight, bias = [x[:, 0], x[:, 1]], torch.randn(2, 4, 3, 3), torch.zeros(2)
    select, distance = kernels.feature_select, kernels.prototype_distance
    for sentence, call in (
        ("student is .*not empty", lambda: distance(x[:0], x[:0], labels, present, match, 3)),
        ("features.0. is .*not empty", lambda: select([s[:0] for s in sources], weight, bias, "score", 0.2)),
        ("labels is .*int32", lambda: distance(x, x, labels.int(), present, match, 3)),
        ("labels is .2, 4, 6.", lambda: distance(x, x, labels[:, :4], present, match, 3)),
        ("give floating .B, M, C, h, w.", lambda: distance(x[0], x[0], labels, present, match, 3)),
        ("teacher is .*float16", lambda: distance(x, x.half(), labels, present, match, 3)),
        ("present is .*give .B, M.", lambda: distance(x, x, labels, present.float(), match, 3)),
        ("match is", lambda: distance(x, x, labels, present, match[:, :2], 3)),
        ("num_classes", lambda: distance(x, x, labels, present, match, 0)),
        ("features is empty", lambda: select([], weight, bias, "score", 0.2)),
        ("temperature is 0.0", lambda: select(sources, weight, bias, "score", 0.0)),
        ("features.1. is", lambda: select([x[:, 0], x[:, 0, :3]], weight, bias, "score", 0.2)),
        ("weight is", lambda: select(sources, weight[:1], bias, "score", 0.2)),
        ("bias is", lambda: select(sources, weight, bias[:1], "score", 0.2)),
        ("rule is 'soft'", lambda: select(sources, weight, bias, "soft", 0.2)),
        ("meta", lambda: select(sources, weight.to("meta"), bias, "score", 0.2)),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
