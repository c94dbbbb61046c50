"""The kernels against definitions written out here, Triton against the reference, on the GPU or in the interpreter."""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False  # on a GPU the reference's convolutions would round their inputs

needs_triton = pytest.mark.skipif(
    kernels._prototype is None or (DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"),
    reason="needs triton, and without a GPU TRITON_INTERPRET=1",
)


# ------------------------------------------------------------------------------------------------- helpers


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def labelled(B, h, w, K, ignored=0.2):
    """Labels in 0..K-1 with some 255, (B, h, w)."""
    labels = torch.randint(0, K, (B, h, w), device=DEVICE)
    return labels.masked_fill(torch.rand(B, h, w, device=DEVICE) < ignored, 255)


def sensors(B, M):
    """present (B, M) with at least one sensor a sample, match (B, M): a permutation a sample."""
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


# -------------------------------------------------------------- the reference against loops written out


def loop_pool(features, labels, K):
    """One sample, one modality, one class at a time; works in the features' own dtype."""
    B, M, C = features.shape[:3]
    rows = []
    for b, m, k in itertools.product(range(B), range(M), range(K)):
        pixels = features[b, m][:, labels[b] == k]  # (C, n)
        rows.append(pixels.mean(1) if pixels.shape[1] else features.new_zeros(C))
    return torch.stack(rows).reshape(B, M, K, C)


def loop_distance(student, teacher, labels, present, match, K):
    B, M, C = student.shape[:3]
    s, t = loop_pool(student, labels, K), loop_pool(teacher, labels, K)
    total = 0
    for b, m in itertools.product(range(B), range(M)):
        seen = [k for k in range(K) if (labels[b] == k).any()]
        if present[b, m] and seen:
            q_s = s[b, m, seen].softmax(0)  # (classes seen, C)
            q_t = t[b, match[b, m], seen].softmax(0)
            total = total + (q_t * (q_t / q_s).log()).sum() / C
    return total / present.sum()


def loop_cosine(features, labels, prototypes):
    B, M, C, h, w = features.shape
    out = torch.zeros(B, M, h, w, dtype=features.dtype, device=features.device)
    for b, m, y, x in itertools.product(range(B), range(M), range(h), range(w)):
        k = labels[b, y, x]
        if k < prototypes.shape[2]:
            f, p = features[b, m, :, y, x], prototypes[b, m, k].to(features.dtype)
            out[b, m, y, x] = (f * p).sum() / (f.square().sum() * p.square().sum()).sqrt()
    return out


def plain_scores(features, weight, bias):
    """Depth-wise 3x3 convolution, then the sum over channels, in the features' dtype."""
    C = features[0].shape[1]
    maps = []
    for j, f in enumerate(features):
        depthwise = F.conv2d(f, weight[j][:, None].to(f.dtype), padding=1, groups=C)
        maps.append(torch.sigmoid(depthwise.sum(1, keepdim=True) + bias[..., j].to(f.dtype).reshape(-1, 1, 1, 1)))
    return torch.stack(maps)


def plain_select(features, weight, bias, temperature):
    candidates = (1 + plain_scores(features, weight, bias)) * torch.stack(list(features))
    if temperature is not None:
        return ((candidates / temperature).softmax(0) * torch.stack(list(features))).sum(0)
    selected, best = features[0], candidates[0]
    for f, candidate in zip(features[1:], candidates[1:], strict=True):
        selected = torch.where(candidate > best, f, selected)
        best = torch.maximum(best, candidate)
    return selected


def test_reference_pooling_is_the_mean_over_each_class(monkeypatch):
    monkeypatch.setenv("RMMSS_KERNELS", "reference")
    features, labels = random(2, 3, 5, 7, 6), labelled(2, 7, 6, 9)
    prototypes, counts = kernels.prototype_pool(features, labels, 9)
    assert_close([prototypes], [loop_pool(features, labels, 9)])
    assert counts.dtype == torch.int32
    assert counts.tolist() == [[int((labels[b] == k).sum()) for k in range(9)] for b in range(2)]


def test_reference_distance_is_the_loop_over_samples_modalities_and_classes(monkeypatch):
    monkeypatch.setenv("RMMSS_KERNELS", "reference")
    student, teacher, labels = 3 * random(3, 4, 5, 6, 7), 3 * random(3, 4, 5, 6, 7), labelled(3, 6, 7, 12)
    labels[1] = 255  # a sample without a labelled pixel adds 0
    present, match = sensors(3, 4)
    found = kernels.prototype_distance(student, teacher, labels, present, match, 12)
    assert_close([found], [loop_distance(student, teacher, labels, present, match, 12)])


def test_reference_cosine_is_the_one_to_the_pixels_own_class(monkeypatch):
    monkeypatch.setenv("RMMSS_KERNELS", "reference")
    features, labels, prototypes = random(2, 2, 5, 4, 6), labelled(2, 4, 6, 3), random(2, 2, 3, 5)
    found = kernels.pixel_prototype_cosine(features, labels, prototypes)
    assert_close([found], [loop_cosine(features, labels, prototypes)])


@pytest.mark.parametrize("temperature", [None, 0.2, 3.0])
def test_reference_selection_is_the_folded_convolution_and_the_choice(temperature, monkeypatch):
    monkeypatch.setenv("RMMSS_KERNELS", "reference")
    features, weight, bias = [random(2, 6, 5, 7) for _ in range(3)], random(3, 6, 3, 3), random(2, 3)
    assert_close([kernels.feature_score(features, weight, bias)], [plain_scores(features, weight, bias)])
    found, share = kernels.feature_score_select(features, weight, bias, temperature)
    assert_close([found], [plain_select(features, weight, bias, temperature)])
    assert share.shape == (3,) and share.sum().item() == pytest.approx(1, abs=1e-5) and not share.requires_grad


def test_a_cosine_without_a_direction_is_zero_with_zero_gradient(monkeypatch):
    for path in ("reference", "triton") if kernels._prototype else ("reference",):
        features, labels = random(1, 2, 3, 4, 5), labelled(1, 4, 5, 2, ignored=0)
        features[:, 1] = 0  # as of an absent modality
        call = lambda f, p, y=labels: kernels.pixel_prototype_cosine(f, y, p)  # noqa: E731
        cosine, grad, _ = evaluate(path, call, [features, random(1, 2, 2, 3)], monkeypatch)
        assert (cosine[:, 1] == 0).all() and (grad[:, 1] == 0).all() and grad[:, 0].abs().min() > 0


def test_equal_candidates_select_the_first_source(monkeypatch):
    for path in ("reference", "triton") if kernels._prototype else ("reference",):
        f = random(1, 3, 4, 5)
        weight, bias = random(1, 3, 3, 3).expand(3, 3, 3, 3), torch.zeros(3, device=DEVICE)
        call = lambda *x, w=weight, b=bias: kernels.feature_score_select(x, w, b, None)  # noqa: E731
        selected, share, *grads = evaluate(path, call, [f, f, f], monkeypatch)
        assert torch.equal(selected, f) and share.tolist() == [1, 0, 0]
        assert grads[0].abs().min() > 0 and not grads[1].any() and not grads[2].any()


def test_gradients_of_the_reference_pass_gradcheck(monkeypatch):
    monkeypatch.setenv("RMMSS_KERNELS", "reference")
    double = {"dtype": torch.float64, "device": DEVICE, "requires_grad": True}
    x, labels, (present, match) = torch.randn(2, 2, 3, 4, 3, **double), labelled(2, 4, 3, 4), sensors(2, 2)
    teacher, prototypes = torch.randn(2, 2, 3, 4, 3, **double).detach(), torch.randn(2, 2, 4, 3, **double)
    features = [torch.randn(1, 2, 3, 4, **double) for _ in range(2)]
    weight, bias = torch.randn(2, 2, 3, 3, **double), torch.randn(1, 2, **double)
    check = torch.autograd.gradcheck
    assert check(lambda f: kernels.prototype_pool(f, labels, 4)[0], x)
    assert check(lambda f: kernels.prototype_distance(f, teacher, labels, present, match, 4), x)
    assert check(lambda f, p: kernels.pixel_prototype_cosine(f, labels, p), (x, prototypes))
    assert check(lambda w, b, *f: kernels.feature_score(f, w, b), (weight, bias, *features))
    assert check(lambda w, b, *f: kernels.feature_score_select(f, w, b, 0.7)[0], (weight, bias, *features))
    assert check(lambda *f: kernels.feature_score_select(f, weight.detach(), bias.detach(), None)[0], features)


# ------------------------------------------------------------------------- Triton against the reference

MAPS = [  # B, M, C, h, w, K
    (1, 1, 1, 1, 1, 1),
    (2, 3, 5, 7, 11, 4),
    (1, 6, 3, 2, 3, 40),
    (2, 2, 33, 13, 17, 19),
    (1, 1, 512, 3, 5, 7),
    (1, 2, 20, 37, 31, 25),  # more pixels than one program of the pooling sums
    (1, 2, 4, 5, 5, 70),  # more classes than one
]
SOURCES = [  # S, B, C, h, w
    (2, 1, 1, 1, 1),
    (2, 2, 5, 7, 11),
    (2, 1, 17, 7, 31),  # several tiles, and a C that is no multiple of any block
    (1, 1, 512, 2, 3),
    (3, 2, 5, 3, 2),
    (8, 1, 3, 5, 5),
]


@needs_triton
@pytest.mark.parametrize("B, M, C, h, w, K", MAPS)
def test_triton_prototypes_and_distance_equal_the_reference(B, M, C, h, w, K, monkeypatch):
    labels, (present, match) = labelled(B, h, w, K), sensors(B, M)
    student, teacher = 3 * random(B, M, C, h, w), 3 * random(B, M, C, h, w)
    assert_triton_agrees(lambda f: kernels.prototype_pool(f, labels, K), [student], monkeypatch)
    distance = lambda f: kernels.prototype_distance(f, teacher, labels, present, match, K)  # noqa: E731
    assert_triton_agrees(distance, [student], monkeypatch)


@needs_triton
@pytest.mark.parametrize("B, M, C, h, w, K", MAPS)
def test_triton_cosine_equals_the_reference(B, M, C, h, w, K, monkeypatch):
    labels = labelled(B, h, w, K)
    cosine = lambda f, p: kernels.pixel_prototype_cosine(f, labels, p)  # noqa: E731
    floor = 0.1 if C == 1 else 0.0  # one channel: the cosine is 1 or -1, and its gradient nothing but rounding
    assert_triton_agrees(cosine, [random(B, M, C, h, w), random(B, M, K, C)], monkeypatch, floor)


@needs_triton
@pytest.mark.parametrize("S, B, C, h, w", SOURCES)
def test_triton_scores_and_selection_equal_the_reference(S, B, C, h, w, monkeypatch):
    weight, features = random(S, C, 3, 3) / (3 * C**0.5), [random(B, C, h, w) for _ in range(S)]
    score = lambda w, b, *f: kernels.feature_score(f, w, b)  # noqa: E731
    assert_triton_agrees(score, [weight, random(S), *features], monkeypatch)
    for rule in (None, 1.0) if C < 512 else (1.0,):
        select = lambda w, b, *f, rule=rule: kernels.feature_score_select(f, w, b, rule)  # noqa: E731
        assert_triton_agrees(select, [weight, random(B, S), *features], monkeypatch)


@needs_triton
def test_triton_selection_at_a_low_temperature_is_as_exact_as_pytorch(monkeypatch):
    """The scores' gradients are differences of large numbers there, for both; the truth is the float64 definition."""
    inputs = [random(2, 5, 3, 3), random(2, 2), random(2, 5, 7, 6), random(2, 5, 7, 6)]
    select = lambda w, b, *f: kernels.feature_score_select(f, w, b, 0.2)[0]  # noqa: E731
    truth = evaluate("reference", select, [x.double() for x in inputs], monkeypatch)
    pytorch = evaluate("reference", select, inputs, monkeypatch)
    triton = evaluate("triton", select, inputs, monkeypatch)
    for a, b, t in zip(triton, pytorch, truth, strict=True):
        allowed = max(2 * (b.double() - t).abs().max().item(), 1e-5 * t.abs().max().item())
        assert (a.double() - t).abs().max() <= allowed


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_at_most_twice_as_much_as_pytorch(dtype, monkeypatch):
    B, M, C, h, w, K = 2, 3, 6, 9, 8, 5
    labels, (present, match) = labelled(B, h, w, K), sensors(B, M)
    student, teacher = random(B, M, C, h, w, dtype=dtype), random(B, M, C, h, w, dtype=dtype)
    sources, weight, bias = [random(B, C, h, w, dtype=dtype) for _ in range(2)], random(2, C, 3, 3) / 5, random(2)
    cases = {  # kernel, the same written out in plain PyTorch, inputs
        "pool": (lambda f: kernels.prototype_pool(f, labels, K)[0], lambda f: loop_pool(f, labels, K), [student]),
        "distance": (
            lambda f: kernels.prototype_distance(f, teacher.to(f.dtype), labels, present, match, K),
            lambda f: loop_distance(f, teacher.to(f.dtype), labels, present, match, K),
            [student],
        ),
        "cosine": (
            lambda f, p: kernels.pixel_prototype_cosine(f, labels, p),
            lambda f, p: loop_cosine(f, labels, p),
            [student, random(B, M, K, C, dtype=dtype).float()],
        ),
        "score": (
            lambda w, b, *f: kernels.feature_score(f, w, b),
            lambda w, b, *f: plain_scores(f, w, b),
            [weight, bias, *sources],
        ),
        "select": (
            lambda w, b, *f: kernels.feature_score_select(f, w, b, 0.5)[0],
            lambda w, b, *f: plain_select(f, w, b, 0.5),
            [weight, bias, *sources],
        ),
        "hard": (lambda *f: kernels.feature_score_select(f, weight, bias, None)[0], None, sources),
    }
    for name, (kernel, plain, inputs) in cases.items():
        truth = evaluate("reference", kernel, [x.float() for x in inputs], monkeypatch)
        found = evaluate("triton", kernel, inputs, monkeypatch)
        pytorch = evaluate("reference", plain or kernel, inputs, monkeypatch)
        for i, (a, b, t) in enumerate(zip(found, pytorch, truth, strict=True)):
            error, allowed = (a.float() - t).abs().max().item(), 2 * (b.float() - t).abs().max().item()
            assert error <= allowed + 1e-6 * t.abs().max().item(), f"{name}, tensor {i}: {error} > {allowed}"


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
    student, teacher, (present, match) = random(B, M, C, h, w), random(B, M, C, h, w), sensors(B, M)
    assert_triton_agrees(lambda f: kernels.prototype_pool(f, labels, K), [student], monkeypatch)
    distance = lambda f: kernels.prototype_distance(f, teacher, labels, present, match, K)  # noqa: E731
    assert_triton_agrees(distance, [student], monkeypatch)
    cosine = lambda f, p: kernels.pixel_prototype_cosine(f, labels, p)  # noqa: E731
    assert_triton_agrees(cosine, [student, random(B, M, K, C)], monkeypatch)


@needs_triton
def test_triton_takes_any_strides(monkeypatch):
    B, M, C, h, w, K = 2, 3, 5, 6, 8, 4
    labels, (present, match) = labelled(B, w, h, K).transpose(1, 2), sensors(B, M)
    present, match = present.t().contiguous().t(), match.t().contiguous().t()
    views = {
        "channels last": random(B, M, h, w, C).permute(0, 1, 4, 2, 3),
        "every other channel": random(B, M, 2 * C, h, w)[:, :, ::2],
        "cropped": random(B, M, C, h + 2, w + 3)[..., 1:-1, 2:-1],
        "transposed": random(B, M, C, w, h).transpose(3, 4),
        "expanded": random(1, M, C, h, w).expand(B, M, C, h, w),
    }
    prototypes = random(B, K, C, M).permute(0, 3, 1, 2)
    for student, teacher in zip(views.values(), [*views.values()][1:], strict=False):
        distance = lambda f, t=teacher: kernels.prototype_distance(f, t, labels, present, match, K)  # noqa: E731
        assert_triton_agrees(distance, [student], monkeypatch)
    for view in views.values():
        assert_triton_agrees(lambda f: kernels.prototype_pool(f, labels, K), [view], monkeypatch)
        cosine = lambda f, p: kernels.pixel_prototype_cosine(f, labels, p)  # noqa: E731
        assert_triton_agrees(cosine, [view, prototypes], monkeypatch)
        weight, bias = random(C, 2, 3, 3).transpose(0, 1), random(2, B).t()
        select = lambda w, b, *f: kernels.feature_score_select(f, w, b, 1.0)  # noqa: E731
        assert_triton_agrees(select, [weight, bias, view[:, 0], view[:, 1]], monkeypatch)
    assert_triton_agrees(select, [weight, bias, view[:, 0], random(B, C, h, w)], monkeypatch)  # two kinds of strides


@needs_triton
def test_triton_reads_neither_absent_modalities_nor_unanswered_teachers(monkeypatch):
    student, teacher, labels = random(2, 3, 4, 5, 6), random(2, 3, 4, 5, 6), labelled(2, 5, 6, 3)
    present = torch.tensor([[True, False, False], [False, True, True]], device=DEVICE)
    match = torch.tensor([[2, 0, 1], [1, 2, 0]], device=DEVICE)
    call = lambda s, t: kernels.prototype_distance(s, t.detach(), labels, present, match, 3)  # noqa: E731
    expected = evaluate("reference", call, [student, teacher], monkeypatch)
    student[~present] = float("nan")
    teacher[0, :2] = float("nan")
    teacher[1, 1] = float("nan")
    found = evaluate("triton", call, [student, teacher], monkeypatch)
    assert_close(found, expected)
    assert (found[1][~present] == 0).all()


@needs_triton
def test_triton_gives_identical_bits_twice(monkeypatch):
    labels, (present, match) = labelled(1, 33, 35, 6), sensors(1, 3)
    student, teacher, prototypes = random(1, 3, 5, 33, 35), random(1, 3, 5, 33, 35), random(1, 3, 6, 5)
    sources, weight, bias = [random(1, 3, 9, 35) for _ in range(2)], random(2, 3, 3, 3), random(1, 2)
    for call, inputs in (
        (lambda f: kernels.prototype_distance(f, teacher, labels, present, match, 6), [student]),
        (lambda f, p: kernels.pixel_prototype_cosine(f, labels, p), [student, prototypes]),
        (lambda w, b, *f: kernels.feature_score_select(f, w, b, 0.2), [weight, bias, *sources]),
    ):
        first, second = (evaluate("triton", call, inputs, monkeypatch) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_triton
def test_gradients_that_nobody_needs_are_not_computed(monkeypatch):
    """In stage 2 the features come from frozen models."""
    monkeypatch.setenv("RMMSS_KERNELS", "triton")
    features, bias = [random(1, 4, 5, 6) for _ in range(2)], torch.zeros(2, device=DEVICE)
    weight = random(2, 4, 3, 3).requires_grad_()
    monkeypatch.setattr("kernels._feature_score.launch_features_backward", None)
    kernels.feature_score_select(features, weight, bias, 0.2)[0].sum().backward()
    assert weight.grad.abs().min() > 0


# ------------------------------------------------------------------------------------ dispatch and errors


def test_autocast_does_not_lower_the_precision(monkeypatch):
    monkeypatch.setenv("RMMSS_KERNELS", "reference")
    student, teacher, labels = random(1, 2, 8, 9, 9), random(1, 2, 8, 9, 9), labelled(1, 9, 9, 4)
    present, match = sensors(1, 2)
    expected = kernels.prototype_distance(student, teacher, labels, present, match, 4)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(kernels.prototype_distance(student, teacher, labels, present, match, 4), expected)


def test_the_variable_chooses_the_path(monkeypatch):
    x, labels = torch.randn(1, 1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.int64)
    monkeypatch.setenv("RMMSS_KERNELS", "cuda")
    with pytest.raises(ValueError, match="RMMSS_KERNELS is 'cuda'"):
        kernels.prototype_pool(x, labels, 2)
    monkeypatch.setenv("RMMSS_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1" if kernels._prototype else "not installed"):
        kernels.prototype_pool(x, labels, 2)
    monkeypatch.delenv("RMMSS_KERNELS")
    kernels.prototype_pool(x, labels, 2)


def test_bad_arguments_are_refused_in_one_sentence():
    x, labels = torch.randn(2, 3, 4, 5, 6), torch.zeros(2, 5, 6, dtype=torch.int64)
    present, match = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.int64)
    sources, weight, bias = [x[:, 0], x[:, 1]], torch.randn(2, 4, 3, 3), torch.zeros(2)
    for sentence, call in (
        ("empty batch", lambda: kernels.prototype_pool(x[:0], labels[:0], 3)),
        ("empty batch", lambda: kernels.prototype_distance(x[:0], x[:0], labels[:0], present[:0], match[:0], 3)),
        ("empty batch", lambda: kernels.pixel_prototype_cosine(x[:0], labels[:0], torch.randn(0, 3, 2, 4))),
        ("empty batch", lambda: kernels.feature_score_select([s[:0] for s in sources], weight, bias, 0.2)),
        ("labels are torch.int32", lambda: kernels.prototype_pool(x, labels.int(), 3)),
        ("labels are", lambda: kernels.prototype_pool(x, labels[:, :4], 3)),
        ("num_classes", lambda: kernels.prototype_pool(x, labels, 0)),
        ("features is", lambda: kernels.prototype_pool(x[0], labels, 3)),
        ("one shape and one dtype", lambda: kernels.prototype_distance(x, x.half(), labels, present, match, 3)),
        ("present is", lambda: kernels.prototype_distance(x, x, labels, present.float(), match, 3)),
        ("match is", lambda: kernels.prototype_distance(x, x, labels, present, match[:, :2], 3)),
        ("prototypes are", lambda: kernels.pixel_prototype_cosine(x, labels, torch.randn(2, 3, 4, 5))),
        ("0 sources", lambda: kernels.feature_score([], weight, bias)),
        ("features.1. is", lambda: kernels.feature_score([x[:, 0], x[:, 0, :3]], weight, bias)),
        ("weight is", lambda: kernels.feature_score(sources, weight[:1], bias)),
        ("bias is", lambda: kernels.feature_score(sources, weight, bias[:1])),
        ("temperature is", lambda: kernels.feature_score_select(sources, weight, bias, 0.0)),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
