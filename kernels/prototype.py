"""Prototype pooling and hybrid prototype distance, fused for the GPU.

Axes: B samples, M modalities, K classes, C channels, P = h*w pixels, R = M*C rows of features of one sample.

Pooling (paper eq. 4)      p[b,m,k,c] = sum_i [y[b,i] = k] f[b,m,c,i] / n[b,k],   n[b,k] = sum_i [y[b,i] = k]
Distance (eq. 5)           S[b,m,:,c] and T[b,m,:,c]: softmax over the classes with n > 0 of the student's p[b,m,:,c]
                           and of the teacher's p[b,match[b,m],:,c];
                           L = sum_{b,m present} sum_c KL(T[b,m,:,c] || S[b,m,:,c]) / (C * number of present pairs)
Its gradient               dL/df[b,m,c,i] = (S - T)[b,m,y_i,c] / (n[b,y_i] * C * pairs), 0 for ignored pixels

Bytes that must move, with N bytes in one (B, M, C, h, w) tensor: forward 2 N (student and teacher, once each),
backward N (the gradient). Labels (8 bytes a pixel, shared by all R rows) and prototypes are small beside it.

Fused away: the masked copy of the features per class (K N read, K N written), the matched copy of the teacher, the
gradients of the pooled sums. Features of absent student modalities, and teacher ones that nobody answers to, are not
read: `present` and `match` predicate the loads on the device, so the host never waits to learn them.

Pooling is a product with the one-hot labels, (R x P) times (P x K), and runs on tensor cores: plain float32
FMAs would be 32 per element read (1.1 GFLOP for 67 MB at B0, 1024 pixels), about as long as the reading itself.
One-hot entries are exact in TF32, and so are bfloat16 and float16 features: one TF32 product loses nothing. float32
features are split in two TF32 parts ("tf32x3"), 22 of 24 bits, accumulated in float32. As tensor cores truncate
where they accumulate, a program sums at most CHUNK pixels; the chunks are added by ordinary float32 additions, in a
fixed order, so that the result is the same every time (no atomics).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1024  # pixels summed by one program of pool_kernel


# ------------------------------------------------------------------------------------------------ jit kernels


@triton.jit
def class_of(labels_ptr, offs_p, mask_p, stride_p, K):
    """The labels of some pixels as int32, with -1 for all that belong to no class."""
    label = tl.load(labels_ptr + offs_p * stride_p, mask=mask_p, other=-1)
    return tl.where((label >= 0) & (label < K), label, -1).to(tl.int32)


@triton.jit
def row_offsets(offs_r, C, stride_m, stride_c):
    """Rows run over (m, c); int64, for a sample of many modalities may exceed 2^31 elements."""
    return (offs_r // C).to(tl.int64) * stride_m + (offs_r % C).to(tl.int64) * stride_c


@triton.jit
def pool_kernel(
    x_ptr,  # (B, M, C, P) features, of the student where there is a teacher; read
    y_ptr,  # (B, M, C, P) features of the teacher, or None; read
    factor_ptr,  # (B, M, P) float32, contiguous, multiplies x, or None; read
    labels_ptr,  # (B, P) int64; read
    present_ptr,  # (B, M) bool, contiguous, or None without a teacher; read
    match_ptr,  # (B, M) int64, contiguous, or None without a teacher; read
    sums_ptr,  # (1 or 2, B, CHUNKS, M*C, K) float32, contiguous; written
    counts_ptr,  # (B, CHUNKS, K) int32, contiguous; written
    B, M, C, P, K, x_stride_b, x_stride_m, x_stride_c, x_stride_p, y_stride_b, y_stride_m, y_stride_c, y_stride_p,
    labels_stride_b, labels_stride_p,
    SPLIT: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums over the pixels of each class, of BLOCK_R rows and one chunk of pixels of one sample."""
    pid_chunk = tl.program_id(0)
    pid_r = tl.program_id(1)
    class_blocks = tl.cdiv(K, BLOCK_K)
    pid_k = tl.program_id(2) % class_blocks
    pid_tb = tl.program_id(2) // class_blocks  # which of student and teacher, then the sample
    b = (pid_tb % B).to(tl.int64)
    is_teacher = pid_tb >= B

    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_r = offs_r < M * C
    start = pid_chunk * CHUNK
    stop = tl.minimum(start + CHUNK, P)
    stop_reading = stop
    if y_ptr is not None:
        # A row is read if a present student modality asks for it: for itself, or for the one it answers to.
        offs_m = tl.arange(0, BLOCK_M)
        present = tl.load(present_ptr + b * M + offs_m, mask=offs_m < M, other=0).to(tl.int32)
        answers_to = tl.load(match_ptr + b * M + offs_m, mask=offs_m < M, other=-1)
        asked = tl.where(present > 0, tl.where(is_teacher, answers_to, offs_m.to(tl.int64)), -1)
        needed = tl.max((asked[None, :] == (offs_r // C)[:, None]).to(tl.int32), axis=1) > 0
        mask_r = mask_r & needed
        stop_reading = tl.where(tl.max(mask_r.to(tl.int32), axis=0) > 0, stop, start)
        if is_teacher:
            x_rows = y_ptr + b * y_stride_b + row_offsets(offs_r, C, y_stride_m, y_stride_c)
            stride_p = y_stride_p
        else:
            x_rows = x_ptr + b * x_stride_b + row_offsets(offs_r, C, x_stride_m, x_stride_c)
            stride_p = x_stride_p
    else:
        x_rows = x_ptr + b * x_stride_b + row_offsets(offs_r, C, x_stride_m, x_stride_c)
        stride_p = x_stride_p

    labels_ptr += b * labels_stride_b
    acc_sums = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for p in range(start, stop_reading, BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        mask_p = offs_p < P
        label = class_of(labels_ptr, offs_p, mask_p, labels_stride_p, K)
        member = (label[:, None] == offs_k[None, :]).to(tl.float32)  # (BLOCK_P, BLOCK_K)
        mask = mask_r[:, None] & mask_p[None, :]
        x_tile = tl.load(x_rows[:, None] + offs_p[None, :] * stride_p, mask=mask, other=0).to(tl.float32)
        if factor_ptr is not None:
            factor = factor_ptr + (b * M + offs_r // C)[:, None] * P + offs_p[None, :]
            x_tile *= tl.load(factor, mask=mask, other=0)
        if SPLIT:  # the upper 11 bits of the significand, exact in TF32, then what they leave
            upper = (x_tile.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            acc_sums = tl.dot(upper, member, acc_sums, input_precision="tf32")
            x_tile -= upper
        acc_sums = tl.dot(x_tile, member, acc_sums, input_precision="tf32")

    chunks = tl.num_programs(0)
    sums_ptr += (pid_tb.to(tl.int64) * chunks + pid_chunk) * M * C * K
    mask_rk = (offs_r < M * C)[:, None] & (offs_k < K)[None, :]
    tl.store(sums_ptr + offs_r[:, None] * K + offs_k[None, :], acc_sums, mask=mask_rk)

    if (pid_r == 0) & (pid_tb < B):
        acc_counts = tl.zeros((BLOCK_K,), tl.int32)
        for p in range(start, stop, BLOCK_P):
            offs_p = p + tl.arange(0, BLOCK_P)
            label = class_of(labels_ptr, offs_p, offs_p < P, labels_stride_p, K)
            acc_counts += tl.sum((label[:, None] == offs_k[None, :]).to(tl.int32), axis=0)
        tl.store(counts_ptr + (b * chunks + pid_chunk) * K + offs_k, acc_counts, mask=offs_k < K)


@triton.jit
def sum_chunks(x_ptr, offs, mask, chunks, stride, BLOCK_S: tl.constexpr):
    """Adds up x_ptr[chunk * stride + offs] over the chunks; offs and mask are (rows, columns) tiles."""
    acc = tl.zeros(offs.shape, x_ptr.dtype.element_ty)
    for s in range(0, chunks, BLOCK_S):
        offs_s = s + tl.arange(0, BLOCK_S)
        mask_s = (offs_s < chunks)[:, None, None] & mask[None, :, :]
        tile = tl.load(x_ptr + offs_s.to(tl.int64)[:, None, None] * stride + offs[None, :, :], mask=mask_s, other=0)
        acc += tl.sum(tile, axis=0)
    return acc


@triton.jit
def finish_kernel(
    sums_ptr,  # (B, CHUNKS, M*C, K) float32, contiguous; read
    counts_ptr,  # (B, CHUNKS, K) int32, contiguous; read
    out_ptr,  # (B, M, K, C) float32, contiguous: prototypes, or plain sums unless DIVIDE; written
    total_ptr,  # (B, K) int32, contiguous; written
    M, C, K, chunks,
    DIVIDE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds the chunks of BLOCK_C channels of one (sample, modality), and divides by the class's pixels."""
    pid_bm = tl.program_id(0)
    pid_c = tl.program_id(1)
    pid_k = tl.program_id(2)
    b = (pid_bm // M).to(tl.int64)
    m = pid_bm % M
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (offs_c < C)[:, None] & (offs_k < K)[None, :]
    counts_ptr += b * chunks * K
    count = sum_chunks(counts_ptr, offs_k[None, :], (offs_k < K)[None, :], chunks, K, BLOCK_S)  # (1, BLOCK_K)
    sums_ptr += b * chunks * M * C * K
    total = sum_chunks(sums_ptr, (m * C + offs_c)[:, None] * K + offs_k[None, :], mask, chunks, M * C * K, BLOCK_S)
    if DIVIDE:
        total = total / tl.maximum(count, 1).to(tl.float32)
    out_ptr += pid_bm.to(tl.int64) * K * C
    tl.store(out_ptr + offs_k[None, :] * C + offs_c[:, None], total, mask=mask)
    if (m == 0) & (pid_c == 0):
        tl.store(total_ptr + b * K + offs_k[None, :], count, mask=(offs_k < K)[None, :])


@triton.jit
def distance_kernel(
    sums_ptr,  # (2, B, CHUNKS, M*C, K) float32, contiguous: student, teacher; read
    counts_ptr,  # (B, CHUNKS, K) int32, contiguous; read
    present_ptr,  # (B, M) bool, contiguous; read
    match_ptr,  # (B, M) int64, contiguous; read
    loss_ptr,  # (B*M, channel blocks) float32, contiguous: parts that add up to the distance; written
    table_ptr,  # (B, M, C, K) float32, contiguous: its gradient for one pixel of class k; written
    B, M, C, K, chunks,
    BLOCK_S: tl.constexpr, BLOCK_BM: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Prototypes, masked softmax over the classes, KL, and the gradient's table, of one (b, m) and BLOCK_C channels."""
    pid_bm = tl.program_id(0)
    pid_c = tl.program_id(1)
    b = (pid_bm // M).to(tl.int64)
    m = pid_bm % M
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = (offs_k < K)[None, :]
    mask = (offs_c < C)[:, None] & mask_k

    offs_bm = tl.arange(0, BLOCK_BM)
    pairs = tl.sum(tl.load(present_ptr + offs_bm, mask=offs_bm < B * M, other=0).to(tl.int32), axis=0)
    present = tl.load(present_ptr + pid_bm).to(tl.int32) > 0
    answers_to = tl.load(match_ptr + pid_bm).to(tl.int32)

    count = sum_chunks(counts_ptr + b * chunks * K, offs_k[None, :], mask_k, chunks, K, BLOCK_S)  # (1, BLOCK_K)
    seen = (count > 0) & mask  # (BLOCK_C, BLOCK_K)
    stride = M * C * K
    read = tl.where(present, seen, False)
    student_ptr = sums_ptr + b * chunks * stride
    teacher_ptr = sums_ptr + (B + b) * chunks * stride
    offs_s = (m * C + offs_c)[:, None] * K + offs_k[None, :]
    offs_t = (answers_to * C + offs_c)[:, None] * K + offs_k[None, :]
    size = tl.maximum(count, 1).to(tl.float32)
    student = sum_chunks(student_ptr, offs_s, read, chunks, stride, BLOCK_S) / size
    teacher = sum_chunks(teacher_ptr, offs_t, read, chunks, stride, BLOCK_S) / size

    # Masked softmax; without any class a row is all -1e30, its shares are meaningless and `read` drops them.
    student = tl.where(read, student, -1e30)
    teacher = tl.where(read, teacher, -1e30)
    student -= tl.max(student, axis=1)[:, None]
    teacher -= tl.max(teacher, axis=1)[:, None]
    share_s = tl.exp(student)
    share_t = tl.exp(teacher)
    sum_s = tl.sum(share_s, axis=1)[:, None]
    sum_t = tl.sum(share_t, axis=1)[:, None]
    share_s /= sum_s
    share_t /= sum_t
    divergence = share_t * ((teacher - tl.log(sum_t)) - (student - tl.log(sum_s)))
    scale = 1.0 / (C * tl.maximum(pairs, 1)).to(tl.float32)
    loss = tl.sum(tl.sum(tl.where(read, divergence, 0.0), axis=1), axis=0) * scale
    tl.store(loss_ptr + pid_bm * tl.num_programs(1) + pid_c, loss)
    table = tl.where(read, (share_s - share_t) * scale / size, 0.0)
    table_ptr += pid_bm.to(tl.int64) * C * K
    tl.store(table_ptr + offs_c[:, None] * K + offs_k[None, :], table, mask=mask)


@triton.jit
def spread_kernel(
    table_ptr,  # (B, M, C, K) float32, any strides; read
    scale_ptr,  # scalar, multiplies the table, or None; read
    labels_ptr,  # (B, P) int64; read
    grad_ptr,  # (B, M, C, P): table[b, m, c, label of the pixel], 0 for the ignored; written
    M, C, P, K, table_stride_b, table_stride_m, table_stride_c, table_stride_k,
    labels_stride_b, labels_stride_p, grad_stride_b, grad_stride_m, grad_stride_c, grad_stride_p,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Backward of the pooling: each pixel gets its class's entry; the table stays in the L1 cache."""
    pid_p = tl.program_id(0)
    pid_r = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    offs_p = pid_p * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_p = offs_p < P
    mask = (offs_r < M * C)[:, None] & mask_p[None, :]
    label = class_of(labels_ptr + b * labels_stride_b, offs_p, mask_p, labels_stride_p, K)
    table_rows = table_ptr + b * table_stride_b + row_offsets(offs_r, C, table_stride_m, table_stride_c)
    entry = table_rows[:, None] + (label * table_stride_k)[None, :]
    value = tl.load(entry, mask=mask & (label >= 0)[None, :], other=0)
    if scale_ptr is not None:
        value *= tl.load(scale_ptr).to(tl.float32)
    grad_rows = grad_ptr + b * grad_stride_b + row_offsets(offs_r, C, grad_stride_m, grad_stride_c)
    # the store converts to the gradient's dtype
    tl.store(grad_rows[:, None] + offs_p[None, :] * grad_stride_p, value, mask=mask)


# -------------------------------------------------------------------------------------------------- launchers


def pool_blocks(rows: int, num_classes: int, dtype: torch.dtype, factor: bool) -> dict:
    """Tile of pool_kernel. 64 rows share one one-hot tile; more than 64 classes take several programs."""
    block_k = min(64, max(16, triton.next_power_of_2(num_classes)))
    split = factor or dtype == torch.float32
    return {
        "BLOCK_R": 64 if rows > 32 else 32,
        "BLOCK_P": 32 if factor or (split and block_k == 64) else 64,  # the registers' limit
        "BLOCK_K": block_k,
        "SPLIT": split,
        "CHUNK": CHUNK,
        "num_warps": 4,
        "num_stages": 3,
    }


def distance_blocks(num_classes: int) -> dict:
    """Tile of distance_kernel: all classes of a channel in one tile, for the softmax runs over them."""
    block_k = max(16, triton.next_power_of_2(num_classes))
    return {"BLOCK_S": 16, "BLOCK_C": max(1, min(4, 128 // block_k)), "BLOCK_K": block_k, "num_warps": 4}


FINISH_BLOCKS = {"BLOCK_S": 16, "BLOCK_C": 4, "BLOCK_K": 32, "num_warps": 4}
SPREAD_BLOCKS = {"BLOCK_R": 32, "BLOCK_P": 256, "num_warps": 8}


def launch_pool(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    teacher: Tensor | None = None,
    present: Tensor | None = None,
    match: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(B, M, C, P) features, and a teacher's with present and match or not; x times factor (B, M, P) or not.

    Returns sums (1 or 2, B, CHUNKS, M*C, K) float32 and counts (B, CHUNKS, K) int32, the chunks not yet added.
    """
    B, M, C, P = x.shape
    K = num_classes
    tensors = 1 if teacher is None else 2
    blocks = pool_blocks(M * C, K, x.dtype, factor is not None)
    chunks = triton.cdiv(P, CHUNK)
    sums = torch.empty((tensors, B, chunks, M * C, K), device=x.device, dtype=torch.float32)
    counts = torch.empty((B, chunks, K), device=x.device, dtype=torch.int32)
    grid = (chunks, triton.cdiv(M * C, blocks["BLOCK_R"]), tensors * B * triton.cdiv(K, blocks["BLOCK_K"]))
    pool_kernel[grid](
        x, teacher, factor, labels, present, match, sums, counts, B, M, C, P, K,
        *x.stride(), *(x if teacher is None else teacher).stride(), *labels.stride(),
        BLOCK_M=triton.next_power_of_2(M), **blocks,
    )  # fmt: skip
    return sums, counts


def launch_class_sums(
    x: Tensor, labels: Tensor, num_classes: int, factor: Tensor | None = None, divide: bool = False
) -> tuple[Tensor, Tensor]:
    """(B, M, C, P), times factor (B, M, P) or not -> sums or means (B, M, K, C) float32, counts (B, K) int32."""
    B, M, C, _ = x.shape
    sums, counts = launch_pool(x, labels, num_classes, factor=factor)
    out = torch.empty((B, M, num_classes, C), device=x.device, dtype=torch.float32)
    total = torch.empty((B, num_classes), device=x.device, dtype=torch.int32)
    blocks = FINISH_BLOCKS
    grid = (B * M, triton.cdiv(C, blocks["BLOCK_C"]), triton.cdiv(num_classes, blocks["BLOCK_K"]))
    finish_kernel[grid](sums, counts, out, total, M, C, num_classes, counts.shape[1], DIVIDE=divide, **blocks)
    return out, total


def launch_distance(
    student: Tensor, teacher: Tensor, labels: Tensor, present: Tensor, match: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """(B, M, C, P) twice -> the distance's parts (B*M, channel blocks), and its gradient's table (B, M, C, K)."""
    B, M, C, _ = student.shape
    present, match = present.contiguous(), match.contiguous()
    sums, counts = launch_pool(student, labels, num_classes, teacher, present, match)
    blocks = distance_blocks(num_classes)
    channel_blocks = triton.cdiv(C, blocks["BLOCK_C"])
    parts = torch.empty((B * M, channel_blocks), device=student.device, dtype=torch.float32)
    table = torch.empty((B, M, C, num_classes), device=student.device, dtype=torch.float32)
    distance_kernel[(B * M, channel_blocks)](
        sums, counts, present, match, parts, table, B, M, C, num_classes, counts.shape[1],
        BLOCK_BM=triton.next_power_of_2(B * M), **blocks,
    )  # fmt: skip
    return parts, table


def launch_spread(table: Tensor, scale: Tensor | None, labels: Tensor, like: Tensor) -> Tensor:
    """Table (B, M, C, K), any strides -> its entry at each pixel's class, times scale; (B, M, C, P) as `like`."""
    grad = torch.empty_like(like)
    B, M, C, P = like.shape
    blocks = SPREAD_BLOCKS
    grid = (triton.cdiv(P, blocks["BLOCK_P"]), triton.cdiv(M * C, blocks["BLOCK_R"]), B)
    spread_kernel[grid](
        table, scale, labels, grad, M, C, P, table.shape[3], *table.stride(), *labels.stride(), *grad.stride(), **blocks
    )
    return grad


# --------------------------------------------------------------------------------------------------- autograd


class PrototypePool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, labels, num_classes):
        prototypes, counts = launch_class_sums(x, labels, num_classes, divide=True)
        ctx.save_for_backward(x, labels, counts)  # x for its shape and strides alone
        ctx.mark_non_differentiable(counts)
        return prototypes, counts

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_prototypes, _):
        x, labels, counts = ctx.saved_tensors
        table = grad_prototypes / counts.clamp(min=1)[:, None, :, None]  # (B, M, K, C)
        return launch_spread(table.transpose(2, 3), None, labels, x), None, None


class PrototypeDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, labels, present, match, num_classes):
        parts, table = launch_distance(student, teacher, labels, present, match, num_classes)
        ctx.save_for_backward(student, labels, table)  # student for its shape and strides alone
        return parts.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_distance):
        student, labels, table = ctx.saved_tensors
        return launch_spread(table, grad_distance, labels, student), None, None, None, None, None


# ----------------------------------------------------------------------------------------------- public calls
# Documented and checked in __init__.py. flatten is a view of contiguous and channels-last maps, and copies others.


def prototype_pool(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    return PrototypePool.apply(features.flatten(3), labels.flatten(1), num_classes)  # (B, M, C, P), (B, P)


def prototype_distance(
    student: Tensor, teacher: Tensor, labels: Tensor, present: Tensor, match: Tensor, num_classes: int
) -> Tensor:
    maps = student.flatten(3), teacher.flatten(3), labels.flatten(1)  # (B, M, C, P) twice, (B, P)
    return PrototypeDistance.apply(*maps, present, match, num_classes)
