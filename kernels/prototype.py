"""Hybrid prototype distance: class-wise pooling, matching, masked softmax and KL, fused for the GPU.

Called in a default run: by `hpdm.hpdm_loss`, for the four stages in every step of `train_robust`, with its gradient.
M-SegFormer's features come channels-last (a permuted (B, M, h, w, C)), CMNeXt's channels-first; both float32, under
autocast too. Either layout is read and written 16 bytes at a time.

Axes: B samples, M modalities, K classes, C channels, P = h*w pixels.

Pooling (paper eq. 4)      p[b,m,k,c] = sum_i [y[b,i] = k] f[b,m,c,i] / n[b,k],   n[b,k] = sum_i [y[b,i] = k]
Distance (eq. 5)           s[b,m,:,c] and t[b,m,:,c]: softmax over the classes with n > 0 of the student's p[b,m,:,c]
                           and of the teacher's p[b,match[b,m],:,c];
                           L = sum_{b,m present} sum_c KL(t[b,m,:,c] || s[b,m,:,c]) / (K * C * B)
Its gradient               dL/df[b,m,c,i] = (s - t)[b,m,y_i,c] / (n[b,y_i] * K * C * B), 0 for ignored pixels

Bytes that must move, with N bytes in one (B, M, C, h, w) tensor: forward 2 N (student and teacher, once each),
backward N (the gradient). B0 on DELIVER (1024 x 1024, batch 2, four modalities): N = 67, 34, 21 and 8 MB at the four
stages; labels (8 bytes a pixel) and prototypes are small beside that. Modalities that the student lacks, and teacher
modalities that none of the student's is matched with, are not read. Fused away: a masked copy of the features for each
class, the matched copy of the teacher, the gradients of the sums.

Pooling is a product with the one-hot labels, (K x P) times (P x C), on tensor cores; plain float32 arithmetic would
take as long as the reading itself. A program is one warp, so that no two warps fetch the same feature from shared
memory; above 64 classes the sums need the registers of more. One-hot entries and 16-bit features are exact in TF32.
float32 features are split into two TF32 parts, 22 of 24 bits. Tensor cores truncate where they accumulate, so a program
sums at most 1024 pixels; the chunks are added by ordinary float32 additions in a fixed order, without atomics: the
result is the same every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_CLASSES = 256  # more would spill registers: the definition takes over


# ------------------------------------------------------------------------------------------------ jit kernels
@triton.jit
def class_of(labels_ptr, offs_p, mask_p, stride_p, K):
    """The labels of some pixels as int32, with -1 for all that belong to no class."""
    label = tl.load(labels_ptr + offs_p.to(tl.int64) * stride_p, mask=mask_p, other=-1)
    return tl.where((label >= 0) & (label < K), label, -1).to(tl.int32)


@triton.jit
def pool_kernel(
    student_ptr,  # (B, M, C, P); read
    teacher_ptr,  # (B, M, C, P), with the student's strides; read
    labels_ptr,  # (B, P) int64; read
    present_ptr,  # (B, M) bool, contiguous; read
    match_ptr,  # (B, M) int64, contiguous; read
    sums_ptr,  # (2, B, M, CHUNKS, K, C + 1) float32, contiguous: student, teacher; column C counts pixels; written
    B,
    M,
    C,
    P,
    K,
    chunk,
    x_strides,
    labels_strides,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums over the pixels of each class, of BLOCK_C channels and a chunk of pixels of one (b, m); 0 if not needed."""
    pid_chunk = tl.program_id(0)
    pid_c = tl.program_id(1)
    pid_tbm = tl.program_id(2)  # which of student and teacher, then the sample, then the modality
    b = (pid_tbm // M % B).to(tl.int64)
    m = pid_tbm % M
    is_teacher = pid_tbm >= B * M

    # Needed by a present student modality: for itself, or as the one that it is matched with.
    offs_m = tl.arange(0, BLOCK_M)
    present = tl.load(present_ptr + b * M + offs_m, mask=offs_m < M, other=0).to(tl.int32)
    matched = tl.load(match_ptr + b * M + offs_m, mask=offs_m < M, other=-1).to(tl.int32)
    asked = tl.where(is_teacher, matched, offs_m)
    needed = tl.sum(tl.where(asked == m, present, 0), axis=0) > 0
    start = pid_chunk * chunk
    stop = tl.where(needed, tl.minimum(start + chunk, P), start)

    x_ptr = teacher_ptr if is_teacher else student_ptr
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_k = tl.arange(0, BLOCK_K)
    x_offs_c = b * x_strides[0] + m.to(tl.int64) * x_strides[1] + offs_c.to(tl.int64) * x_strides[2]
    labels_ptr += b * labels_strides[0]
    acc_sums = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    acc_counts = tl.zeros((BLOCK_K, 16), tl.float32)
    ones = tl.full((BLOCK_P, 16), 1.0, tl.float32)  # a product counts, too, and a sum over its rows is slower
    for p in range(start, stop, BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        label = class_of(labels_ptr, offs_p, offs_p < P, labels_strides[1], K)
        member = (offs_k[:, None] == label[None, :]).to(tl.float32)  # (BLOCK_K, BLOCK_P)
        acc_counts = tl.dot(member, ones, acc_counts, input_precision="tf32")
        offs_x = x_offs_c[None, :] + offs_p.to(tl.int64)[:, None] * x_strides[3]
        mask = (offs_p < P)[:, None] & (offs_c < C)[None, :]
        x_tile = tl.load(x_ptr + offs_x, mask=mask, other=0).to(tl.float32)  # (BLOCK_P, BLOCK_C)
        x_tile = tl.where((label >= 0)[:, None], x_tile, 0.0)  # 0 x NaN is NaN: an ignored pixel's may be anything
        if SPLIT:  # the upper 11 bits of the significand, exact in TF32, then what they leave
            upper = (x_tile.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            acc_sums = tl.dot(member, upper, acc_sums, input_precision="tf32")
            x_tile -= upper
        acc_sums = tl.dot(member, x_tile, acc_sums, input_precision="tf32")

    sums_ptr += (pid_tbm.to(tl.int64) * tl.num_programs(0) + pid_chunk) * K * (C + 1)
    mask_kc = (offs_k < K)[:, None] & (offs_c < C)[None, :]
    tl.store(sums_ptr + offs_k[:, None] * (C + 1) + offs_c[None, :], acc_sums, mask=mask_kc)
    if pid_c == 0:
        tl.store(sums_ptr + offs_k * (C + 1) + C, tl.max(acc_counts, axis=1), mask=offs_k < K)


@triton.jit
def log_softmax(x, seen):
    """(BLOCK_C, BLOCK_K), over the classes seen; without meaning elsewhere, and in a row without any."""
    x = tl.where(seen, x, -1e30)
    x -= tl.max(x, axis=1)[:, None]
    return x - tl.log(tl.sum(tl.exp(x), axis=1))[:, None]


@triton.jit
def distance_kernel(
    sums_ptr, match_ptr, parts_ptr, table_ptr, B, M, C, K, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Prototypes, masked softmax over the classes, KL, and the gradient's table, of one (b, m) and BLOCK_C channels.

    All contiguous, float32 but for the int64 match. Reads sums (2, B, M, K, C + 1): student, teacher; column C counts
    pixels; and match (B, M). Writes parts (B*M, channel blocks), which add up to the sum of the KLs, and table
    (B, M, K, C), that sum's gradient for one pixel of class k.
    """
    pid_bm = tl.program_id(0)
    pid_c = tl.program_id(1)
    b = (pid_bm // M).to(tl.int64)
    offs_c = (pid_c * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    mask = (offs_c < C) & (offs_k < K)  # (BLOCK_C, BLOCK_K)

    student_ptr = sums_ptr + pid_bm.to(tl.int64) * K * (C + 1) + offs_k * (C + 1)
    teacher_ptr = sums_ptr + ((B + b) * M + tl.load(match_ptr + pid_bm)) * K * (C + 1) + offs_k * (C + 1)
    size = tl.load(student_ptr + C, mask=offs_k < K, other=0)  # (1, BLOCK_K), all 0 for an absent modality
    seen = (size > 0) & mask
    size = tl.maximum(size, 1)
    log_s = log_softmax(tl.load(student_ptr + offs_c, mask=seen, other=0) / size, seen)
    log_t = log_softmax(tl.load(teacher_ptr + offs_c, mask=seen, other=0) / size, seen)
    divergence = tl.where(seen, tl.exp(log_t) * (log_t - log_s), 0.0)
    part = tl.sum(tl.sum(divergence, axis=1), axis=0)
    tl.store(parts_ptr + pid_bm * tl.num_programs(1) + pid_c, part)
    table = tl.where(seen, (tl.exp(log_s) - tl.exp(log_t)) / size, 0.0)
    tl.store(table_ptr + pid_bm.to(tl.int64) * K * C + offs_k * C + offs_c, table, mask=mask)


@triton.jit
def spread_kernel(
    table_ptr,  # (B, M, K, C) float32, contiguous; read
    scale_ptr,  # scalar float32, multiplies the table; read
    labels_ptr,  # (B, P) int64; read
    grad_ptr,  # (B, M, C, P): scale * table[b, m, label of the pixel, c], 0 for the ignored; written
    M,
    C,
    P,
    K,
    labels_strides,
    grad_strides,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Backward of the pooling: each pixel gets its class's row of the table, which stays in the L1 cache."""
    pid_p = tl.program_id(0)
    pid_c = tl.program_id(1)
    b = (tl.program_id(2) // M).to(tl.int64)
    m = (tl.program_id(2) % M).to(tl.int64)
    offs_p = pid_p * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = (offs_c < C)[:, None]
    label = class_of(labels_ptr + b * labels_strides[0], offs_p, offs_p < P, labels_strides[1], K)
    entry = table_ptr + (b * M + m) * K * C + label[None, :] * C + offs_c[:, None]
    value = tl.load(entry, mask=mask_c & (label >= 0)[None, :], other=0) * tl.load(scale_ptr)
    grad_rows = grad_ptr + b * grad_strides[0] + m * grad_strides[1] + offs_c.to(tl.int64) * grad_strides[2]
    # the store converts to the gradient's dtype
    tl.store(
        grad_rows[:, None] + offs_p.to(tl.int64)[None, :] * grad_strides[3], value, mask=mask_c & (offs_p < P)[None, :]
    )


# ------------------------------------------------------------------------------------------------ launchers
def chunk_size(P: int, programs: int) -> int:
    """Pixels that a program sums: at most 1024, fewer where P is small, so that the GPU has enough programs."""
    chunk = 1024
    while chunk > 256 and triton.cdiv(P, chunk) * programs < 2048:
        chunk //= 2
    return chunk


def launch_distance(
    student: Tensor, teacher: Tensor, labels: Tensor, present: Tensor, match: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """(B, M, C, P) twice, labels (B, P) -> sum of the KLs, a scalar, and its gradient's table (B, M, K, C)."""
    (B, M, C, P), K = student.shape, num_classes
    like = {"device": student.device, "dtype": torch.float32}
    block_k = max(16, triton.next_power_of_2(K))  # all classes in one tile, for the softmax runs over them
    channel_tiles = triton.cdiv(C, 32)
    chunk = chunk_size(P, channel_tiles * 2 * B * M)
    chunks = triton.cdiv(P, chunk)
    sums = torch.empty((2, B, M, chunks, K, C + 1), **like)
    channel_blocks = triton.cdiv(C, 8)
    parts = torch.empty((B * M, channel_blocks), **like)
    table = torch.empty((B, M, K, C), **like)
    warps = 1 if block_k <= 64 else block_k // 32  # one warp fetches each feature once; more, for their registers
    with torch.cuda.device_of(student):  # Triton launches on the current device, whatever its arguments lie on
        args = student, teacher, labels, present, match, sums, B, M, C, P, K, chunk, student.stride(), labels.stride()
        split, block_m = student.dtype == torch.float32, triton.next_power_of_2(M)
        blocks = {"BLOCK_M": block_m, "BLOCK_C": 32, "BLOCK_P": 32, "BLOCK_K": block_k, "num_warps": warps}
        pool_kernel[(chunks, channel_tiles, 2 * B * M)](*args, SPLIT=split, **blocks, num_stages=3)
        args = sums.sum(3), match, parts, table, B, M, C, K
        distance_kernel[(B * M, channel_blocks)](*args, BLOCK_C=8, BLOCK_K=block_k, num_warps=4)
    return parts.sum(), table


def launch_spread(table: Tensor, scale: Tensor, labels: Tensor, like: Tensor) -> Tensor:
    """Table (B, M, K, C) -> its row at each pixel's class, times the scalar scale; (B, M, C, P) as `like`."""
    B, M, C, P = like.shape
    grad = torch.empty_like(like)
    with torch.cuda.device_of(like):
        args = table, scale, labels, grad, M, C, P, table.shape[2], labels.stride(), grad.stride()
        grid = (triton.cdiv(P, 128), triton.cdiv(C, 32), B * M)
        spread_kernel[grid](*args, BLOCK_C=32, BLOCK_P=128, num_warps=4)
    return grad


class PrototypeDistance(torch.autograd.Function):
    """The sum of the KLs; its gradient goes to the student only."""

    @staticmethod
    def forward(ctx, student, teacher, labels, present, match, num_classes):
        total, table = launch_distance(student, teacher, labels, present, match, num_classes)
        ctx.save_for_backward(table, labels, student)  # student for its shape and strides alone
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        table, labels, student = ctx.saved_tensors
        return launch_spread(table, grad, labels, student), None, None, None, None, None


# ------------------------------------------------------------------------------------------------ public call
def prototype_distance(
    student: Tensor, teacher: Tensor, labels: Tensor, present: Tensor, match: Tensor, num_classes: int
) -> Tensor:
    """Documented and checked in `__init__.py`. flatten is a view of contiguous and channels-last maps."""
    student, teacher, labels = student.flatten(3), teacher.flatten(3), labels.flatten(1)
    if teacher.stride() != student.stride():  # not in training: both models have one structure
        student, teacher = student.contiguous(), teacher.contiguous()
    total = PrototypeDistance.apply(student, teacher, labels, present.contiguous(), match.contiguous(), num_classes)
    return total / (num_classes * student.shape[2] * student.shape[0])
