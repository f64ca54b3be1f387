"""The Triton kernels of the triton engine: one program updates one tile of one tensor.

What is computed is written down in rule.py and telemetry.py, how it is stored in bits.py. A launch must not let the
compiler fuse multiplication and addition, and division and square root are the correctly rounded ones, so that a GPU
and the other engines agree bit for bit.
"""

# mypy: disallow-untyped-defs=False
# ruff: noqa: SIM300 - upper-case names here are parameters
import triton
import triton.language as tl

from lion_lightning.optim import telemetry
from lion_lightning.optim.kernels import rule, tables, tiles
from lion_lightning.optim.kernels.tiles import (
    BLOCK,
    GOLDEN,
    GRAD_ARRAY,
    ROWS,
    TILE,
    device_scalar,
    divide,
    load_momentum,
    load_numbers,
    load_weight,
    random_words,
    setting,
    store_momentum,
    store_weight,
)

TILE_ELEMENTS = tiles.TILE_ELEMENTS
LANES = 64
"""Sums of one tensor that are kept apart, so that programs do not queue for the same address."""

LANE_COLUMNS = 16
"""Columns of a row of sums, filled up to a power of two."""

LANE_COUNT = tl.constexpr(LANES)
LANE_WIDTH = tl.constexpr(LANE_COLUMNS)
STATISTICS_COUNT = tl.constexpr(telemetry.STATISTICS)
CAUTIOUS_LIMIT = tl.constexpr(rule.CAUTIOUS_LIMIT)

# Columns of the tables.
SUMS, SIGNS, SIGN_STRIDE, OBSERVED_BELOW = (
    tl.constexpr(tables.TENSOR.index(name)) for name in ("statistics", "signs", "sign_stride", "observed_below")
)
COUNT, GROUP, FIRST_TILE = (tl.constexpr(tables.TENSOR.index(name)) for name in ("count", "group", "first_tile"))
LR, BETA1, REST1, BETA2, REST2, DECAY, FACTOR, BOUND = (tl.constexpr(c) for c in range(len(tables.NUMBERS)))
LR_ADDRESS, GRAD_SCALE_ADDRESS, FOUND_INF_ADDRESS, SKIP = (
    tl.constexpr(tables.GROUP.index(name)) for name in ("lr_address", "grad_scale_address", "found_inf_address", "skip")
)
TENSOR_COLUMNS, GROUP_COLUMNS = tl.constexpr(len(tables.TENSOR)), tl.constexpr(len(tables.GROUP))

# Columns of a row of sums.
UNMOVED, ZERO, AGREE = (tl.constexpr(c) for c in (telemetry.UNMOVED, telemetry.ZERO, telemetry.AGREE))
MOMENTUM_SQUARED, WEIGHT_SQUARED = (tl.constexpr(c) for c in (telemetry.MOMENTUM_SQUARED, telemetry.WEIGHT_SQUARED))
NEAR_BOUND, DECAYED = (tl.constexpr(c) for c in (telemetry.NEAR_BOUND, telemetry.DECAY))
NONFINITE, FLIPPED = (tl.constexpr(c) for c in (telemetry.NONFINITE, telemetry.FLIPPED))


@triton.jit
def caution(update, grad, inside, COMPUTE: tl.constexpr):
    """`rule.caution` of rows."""
    shared = update * grad > 0
    agreeing = tl.sum(shared.to(tl.int32), 1, keep_dims=True)
    elements = tl.sum(inside.to(tl.int32), 1, keep_dims=True)
    ratio = divide(elements.to(COMPUTE), tl.maximum(agreeing, 1).to(COMPUTE), COMPUTE)
    return update * tl.where(shared, tl.minimum(ratio, CAUTIOUS_LIMIT), 0.0)


@triton.jit
def count_in(lane, COLUMN: tl.constexpr, found):
    """Adds the number of true elements to a sum."""
    tl.atomic_add(lane + COLUMN, tl.sum(tl.sum(found.to(tl.int32), 1), 0).to(tl.float64), sem="relaxed")


@triton.jit
def add_in(lane, COLUMN: tl.constexpr, values):
    """Adds all elements to a sum."""
    tl.atomic_add(lane + COLUMN, tl.sum(tl.sum(values, 1), 0).to(tl.float64), sem="relaxed")


@triton.jit
def observe(
    tensor, lane, group, start, inside, weight, grad, momentum, stored, new_momentum, update, lr, COMPUTE: tl.constexpr
):
    """`telemetry.observe`, but for the sampled signs."""
    block = (start // BLOCK).to(tl.uint32) + tl.arange(0, ROWS)[:, None].to(tl.uint32)
    seen = inside & (block * GOLDEN < tl.load(tensor + OBSERVED_BELOW).to(tl.uint32))
    count_in(lane, UNMOVED, seen & (stored == weight))
    count_in(lane, ZERO, seen & (update == 0))
    count_in(lane, AGREE, seen & (momentum * grad > 0))
    count_in(lane, NEAR_BOUND, seen & (tl.abs(weight) > setting(group, BOUND, COMPUTE)))
    add_in(lane, MOMENTUM_SQUARED, tl.where(seen, new_momentum * new_momentum, 0.0))
    add_in(lane, WEIGHT_SQUARED, tl.where(seen, weight * weight, 0.0))
    add_in(lane, DECAYED, tl.where(seen, (weight - stored - update * lr) * weight, 0.0))


@triton.jit
def sample_signs(tensor, lane, start, local, inside, update):
    """Compares the sampled signs of u with those of the last sample and keeps the new ones."""
    stride, address = tl.load(tensor + SIGN_STRIDE), tl.load(tensor + SIGNS)
    phase = (start % stride).to(tl.int32) + local
    sampled = inside & (phase % stride.to(tl.int32) == 0) & everywhere(address != 0)
    signs = address.to(tl.pointer_type(tl.int8)) + (start // stride + phase // stride.to(tl.int32))
    sign = (update > 0).to(tl.int32) - (update < 0).to(tl.int32)
    count_in(lane, FLIPPED, sampled & (sign * tl.load(signs, mask=sampled, other=0).to(tl.int32) < 0))
    tl.store(signs, sign.to(tl.int8), mask=sampled)


@triton.jit
def everywhere(condition):
    """A condition for each element of a tile; goes through int32, as the interpreter mixes up scalar booleans."""
    return tl.broadcast_to(condition.to(tl.int32), (ROWS, BLOCK)) != 0


@triton.jit
def update_tile(
    tensor, group, start, remaining, nonfinite, lane,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENTUM: tl.constexpr, WEIGHT_BITS: tl.constexpr,
    CAUTIOUS: tl.constexpr, STATISTICS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The rule on the `remaining` elements of a tile that begins at element `start`."""
    COMPUTE: tl.constexpr = tl.float64 if PARAM == tl.float64 else tl.float32
    RANDOM: tl.constexpr = MOMENTUM == tl.int8 or (PARAM == tl.bfloat16 and WEIGHT_BITS != 32)
    local = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = local < remaining

    weight = load_weight(tensor, start, local, inside, PARAM, WEIGHT_BITS, COMPUTE, ALIGNED)
    momentum = load_momentum(tensor, start, local, inside, MOMENTUM, COMPUTE, ALIGNED)
    grad = load_numbers(tensor, GRAD_ARRAY, start, local, inside, GRAD, COMPUTE, ALIGNED)

    one = tl.full((), 1.0, COMPUTE)
    unscale = divide(one, device_scalar(group, GRAD_SCALE_ADDRESS, one, COMPUTE), COMPUTE)
    grad = grad * (unscale * setting(group, FACTOR, COMPUTE))
    lr = device_scalar(group, LR_ADDRESS, setting(group, LR, COMPUTE), COMPUTE)
    found_inf = device_scalar(group, FOUND_INF_ADDRESS, tl.full((), 0.0, tl.float32), tl.float32)

    broken = ~(tl.abs(grad) < float("inf"))
    broken_count = tl.sum(tl.sum(broken.to(tl.int32), 1), 0)
    tl.atomic_add(nonfinite, broken_count.to(tl.int64), mask=broken_count > 0, sem="relaxed")

    mixed = momentum * setting(group, BETA1, COMPUTE) + grad * setting(group, REST1, COMPUTE)
    update = tl.where(mixed > 0, 1.0, tl.where(mixed < 0, -1.0, tl.where(mixed == 0, 0.0, mixed))).to(COMPUTE)
    if CAUTIOUS:
        update = caution(update, grad, inside, COMPUTE)
    change = (weight * setting(group, DECAY, COMPUTE) + update) * lr
    new_weight = weight - change
    new_momentum = momentum * setting(group, BETA2, COMPUTE) + grad * setting(group, REST2, COMPUTE)

    live = everywhere(found_inf == 0)
    frozen = (broken & everywhere(tl.load(group + SKIP) != 0)) | ~live
    new_weight = tl.where(frozen, weight, new_weight)
    new_momentum = tl.where(frozen, momentum, new_momentum)

    random = local
    if RANDOM:
        random = random_words(tensor, group, start, local)
    written = inside & live
    stored = store_weight(tensor, start, local, written, new_weight, random, PARAM, WEIGHT_BITS, ALIGNED)
    store_momentum(tensor, start, local, written, new_momentum, random, MOMENTUM, ALIGNED)
    if STATISTICS:
        update = tl.where(frozen, 0.0, update)
        stored = tl.where(live, stored, weight)
        observe(tensor, lane, group, start, inside, weight, grad, momentum, stored, new_momentum, update, lr, COMPUTE)
        sample_signs(tensor, lane, start, local, inside, update)
        tl.atomic_add(lane + NONFINITE, broken_count.to(tl.float64), sem="relaxed")


@triton.jit
def lion_kernel(
    tensors, groups, tensor_of_tile, nonfinite, lanes,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENTUM: tl.constexpr, WEIGHT_BITS: tl.constexpr,
    CAUTIOUS: tl.constexpr, STATISTICS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One step of the tensors of a table, which agree in the constants; one program for each tile.

    Args:
        tensors: int64 rows, a tensor each: see the columns above.
        groups: int64 rows, the settings of a parameter group each.
        tensor_of_tile: int32, the row of the tensor that each tile belongs to.
        nonfinite: int64, the count of non-finite gradients that is added to.
        lanes: float64 zeros of shape (tensors, LANES, LANE_COLUMNS) to be added to, if STATISTICS.
        PARAM, GRAD, MOMENTUM: stored dtypes.
        WEIGHT_BITS: of a bf16 parameter: 32, 24 or 16.
        CAUTIOUS, STATISTICS: whether to do these.
        ALIGNED: whether all arrays but the scales begin at multiples of 16 bytes.
    """
    tile = tl.program_id(0)
    row = tl.load(tensor_of_tile + tile).to(tl.int64)
    tensor = tensors + row * TENSOR_COLUMNS
    group = groups + tl.load(tensor + GROUP) * GROUP_COLUMNS
    start = (tile - tl.load(tensor + FIRST_TILE)) * TILE
    lane = lanes + (row * LANE_COUNT + tile % LANE_COUNT) * LANE_WIDTH
    remaining = tl.load(tensor + COUNT) - start
    # Loads and stores are as wide as they can be only where the compiler knows the mask.
    if remaining >= TILE:
        update_tile(
            tensor, group, start, TILE, nonfinite, lane,
            PARAM, GRAD, MOMENTUM, WEIGHT_BITS, CAUTIOUS, STATISTICS, ALIGNED,
        )  # fmt: skip
    else:
        update_tile(
            tensor, group, start, remaining.to(tl.int32), nonfinite, lane,
            PARAM, GRAD, MOMENTUM, WEIGHT_BITS, CAUTIOUS, STATISTICS, ALIGNED,
        )  # fmt: skip


@triton.jit
def statistics_kernel(tensors, lanes):
    """Adds the lanes of each tensor to its row of sums; one program for each tensor."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, LANE_WIDTH)
    places = tl.arange(0, LANE_COUNT)[:, None] * LANE_WIDTH + column[None, :]
    sums = tl.sum(tl.load(lanes + row * LANE_COUNT * LANE_WIDTH + places), 0)
    target = tl.load(tensors + row * TENSOR_COLUMNS + SUMS).to(tl.pointer_type(tl.float64)) + column
    known = column < STATISTICS_COUNT
    tl.store(target, tl.load(target, mask=known, other=0.0) + sums, mask=known)


@triton.jit
def probe_kernel(target):
    """Writes one number: shows whether kernels can be compiled and run."""
    tl.store(target, 1.0)


INTERPRETED = not isinstance(probe_kernel, triton.runtime.JITFunction)
"""Whether TRITON_INTERPRET=1 was set when this was imported: kernels then run in Python on the CPU."""
