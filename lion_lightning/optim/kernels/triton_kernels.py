"""The Triton kernels: one program updates one tile of one tensor.

They compute what rule.py defines and store what storage_formats.py defines, in the same order of operations, with bf16
numbers handled as integers. A launch must disable the fusion of multiplication and addition, and division is correctly
rounded, so that a GPU agrees with the other engines bit for bit. A tile is TILE_ROWS rows of 256 elements, the blocks
that share an int8 scale.
"""

# mypy: disallow-untyped-defs=False
# ruff: noqa: SIM300 - upper-case names here are parameters
import triton
import triton.language as tl

from lion_lightning.optim.kernels import rule, storage_formats
from lion_lightning.optim.kernels.triton import GROUP_ROW, TENSOR_ROW

TILE_ROWS = 4
TILE_ELEMENTS = TILE_ROWS * storage_formats.BLOCK_ELEMENTS
"""Elements of one program. With 128 threads, one takes 8 elements: 16 bytes of bf16."""

ROWS, BLOCK, TILE = (tl.constexpr(n) for n in (TILE_ROWS, storage_formats.BLOCK_ELEMENTS, TILE_ELEMENTS))
CAUTIOUS_LIMIT = tl.constexpr(rule.CAUTIOUS_LIMIT)
LEVELS, LARGEST_LEVEL, LEVEL_BITS_DROPPED, ONE_PATTERN, GOLDEN, MULTIPLIER_1, MULTIPLIER_2 = (
    tl.constexpr(getattr(storage_formats, name))
    for name in (
        "LEVELS", "LARGEST_LEVEL", "LEVEL_BITS_DROPPED", "ONE_PATTERN", "GOLDEN", "MULTIPLIER_1", "MULTIPLIER_2",
    )
)  # fmt: skip
BFLOAT16_MAX_PATTERN = tl.constexpr(0x7F7F0000)
INFINITY_PATTERN = tl.constexpr(0x7F800000)
NAN_PATTERN = tl.constexpr(0x7FC00000)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)

# The columns of both launch tables, 8 bytes each, in the order in which triton.py packs them. The column of an array
# holds its address. Settings are float64 up to FACTOR, and int64 after it. Absent arrays and scalars have address 0.
TENSOR_WIDTH, GROUP_WIDTH = tl.constexpr(TENSOR_ROW.size // 8), tl.constexpr(GROUP_ROW.size // 8)
(
    PARAM_ARRAY, GRAD_ARRAY, EXP_AVG_ARRAY, SCALE_ARRAY, REMAINDER_ARRAY, COUNT, OFFSET, INDEX, GROUP, FIRST_TILE,
) = (tl.constexpr(column) for column in range(TENSOR_ROW.size // 8))  # fmt: skip
(
    LR, BETA1, REST1, BETA2, REST2, DECAY, DECAY_THRESHOLD, FACTOR, LR_ADDRESS, GRAD_SCALE_ADDRESS, FOUND_INF_ADDRESS,
    STEP_ADDRESS, STEP, SEED, SKIP,
) = (tl.constexpr(column) for column in range(GROUP_ROW.size // 8))  # fmt: skip


@triton.jit
def array_at(tensor, COLUMN: tl.constexpr, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element `start` of the array whose address a column holds."""
    pointer = tl.load(tensor + COLUMN).to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def setting(group, COLUMN: tl.constexpr, COMPUTE: tl.constexpr):
    """A number of the table of settings."""
    return tl.load(group + COLUMN).to(tl.float64, bitcast=True).to(COMPUTE)


@triton.jit
def device_scalar(group, COLUMN: tl.constexpr, otherwise, DTYPE: tl.constexpr):
    """The number at the address that a column holds, or `otherwise` where it holds 0."""
    address = tl.load(group + COLUMN)
    return tl.load(address.to(tl.pointer_type(DTYPE)), mask=address != 0, other=otherwise)


@triton.jit
def divide(numerator, denominator, COMPUTE: tl.constexpr):
    """Correctly rounded division, which `/` is not in float32."""
    if COMPUTE == tl.float64:
        return numerator / denominator
    else:
        return tl.div_rn(numerator, denominator)


@triton.jit
def mix(word):
    """`storage_formats.mix` on uint32."""
    word = word ^ (word >> 16)
    word = word * MULTIPLIER_1
    word = word ^ (word >> 15)
    word = word * MULTIPLIER_2
    return word ^ (word >> 16)


@triton.jit
def random_words(tensor, group, start, local):
    """`storage_formats.random_keys` and `storage_formats.random_bits` for the elements of a tile; uint32."""
    step = device_scalar(group, STEP_ADDRESS, tl.load(group + STEP), tl.int64).to(tl.uint32)
    index = tl.load(tensor + INDEX).to(tl.uint32)
    first = mix(mix(step + tl.load(group + SEED).to(tl.uint32)) + index * GOLDEN)
    second = mix(first + GOLDEN)
    word = (tl.load(tensor + OFFSET) + start).to(tl.uint32) + local.to(tl.uint32)
    word = word ^ first
    word = (word ^ (word >> 16)) * MULTIPLIER_1
    word = ((word ^ (word >> 15)) + second) * MULTIPLIER_2
    return word ^ (word >> 16)


@triton.jit
def load_numbers(
    tensor, COLUMN: tl.constexpr, start, local, inside, DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Floating numbers of any dtype in the precision of the arithmetic; 0 outside."""
    if DTYPE == tl.bfloat16:
        source = array_at(tensor, COLUMN, start, tl.int16, ALIGNED)
        words = tl.load(source + local, mask=inside, other=0).to(tl.int32) << 16
        return words.to(tl.float32, bitcast=True).to(COMPUTE)
    else:
        source = array_at(tensor, COLUMN, start, DTYPE, ALIGNED)
        return tl.load(source + local, mask=inside, other=0.0).to(COMPUTE)


@triton.jit
def load_weight(
    tensor, start, local, inside, DTYPE: tl.constexpr, WEIGHT_BITS: tl.constexpr, COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """`storage_formats.join_weight`."""
    if DTYPE != tl.bfloat16 or WEIGHT_BITS == 16:
        return load_numbers(tensor, PARAM_ARRAY, start, local, inside, DTYPE, COMPUTE, ALIGNED)
    else:
        source = array_at(tensor, PARAM_ARRAY, start, tl.int16, ALIGNED)
        high = tl.load(source + local, mask=inside, other=0).to(tl.int32)
        if WEIGHT_BITS == 32:
            low = array_at(tensor, REMAINDER_ARRAY, start, tl.int16, ALIGNED)
            rest = tl.load(low + local, mask=inside, other=0).to(tl.int32)
        else:
            low = array_at(tensor, REMAINDER_ARRAY, start, tl.int8, ALIGNED)
            rest = tl.load(low + local, mask=inside, other=0).to(tl.int32) * 256
        zeroed = ((high & 0x7FFF) == 0) & (rest < 0)
        return ((high << 16) + tl.where(zeroed, 0, rest)).to(tl.float32, bitcast=True)


@triton.jit
def load_momentum(
    tensor, start, local, inside, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Momentum as stored, int8 through `storage_formats.dequantize`."""
    if DTYPE == tl.int8:
        source = array_at(tensor, EXP_AVG_ARRAY, start, tl.int8, ALIGNED)
        level = tl.load(source + local, mask=inside, other=0).to(tl.int32)
        scale = array_at(tensor, SCALE_ARRAY, start // BLOCK, tl.float32, False)
        row = tl.arange(0, ROWS)[:, None]
        scales = tl.load(scale + row, mask=tl.sum(inside.to(tl.int32), 1, keep_dims=True) > 0, other=0.0)
        words = (tl.abs(level) << LEVEL_BITS_DROPPED) + ONE_PATTERN
        value = (words.to(tl.float32, bitcast=True) - 1.0) * scales
        return tl.where(level < 0, -value, value).to(COMPUTE)
    else:
        return load_numbers(tensor, EXP_AVG_ARRAY, start, local, inside, DTYPE, COMPUTE, ALIGNED)


@triton.jit
def store_weight(
    tensor, start, local, stored, value, random, DTYPE: tl.constexpr, WEIGHT_BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """`storage_formats.store_words` where `stored` is true."""
    if DTYPE != tl.bfloat16:
        target = array_at(tensor, PARAM_ARRAY, start, DTYPE, ALIGNED)
        tl.store(target + local, value, mask=stored)
    else:
        words = value.to(tl.int32, bitcast=True)
        magnitude = words & 0x7FFFFFFF
        saturated = (words ^ magnitude) | tl.minimum(magnitude, BFLOAT16_MAX_PATTERN)
        extreme = tl.where(magnitude == INFINITY_PATTERN, words, NAN_PATTERN)
        words = tl.where(magnitude < INFINITY_PATTERN, saturated, extreme)
        if WEIGHT_BITS != 32:
            words = (words + (random >> WEIGHT_BITS).to(tl.int32)) & (-(1 << (32 - WEIGHT_BITS)))
        high = array_at(tensor, PARAM_ARRAY, start, tl.int16, ALIGNED)
        tl.store(high + local, ((words + 0x8000) >> 16).to(tl.int16), mask=stored)
        if WEIGHT_BITS == 32:
            low = array_at(tensor, REMAINDER_ARRAY, start, tl.int16, ALIGNED)
            tl.store(low + local, words.to(tl.int16), mask=stored)
        elif WEIGHT_BITS == 24:
            low = array_at(tensor, REMAINDER_ARRAY, start, tl.int8, ALIGNED)
            tl.store(low + local, (words >> 8).to(tl.int8), mask=stored)


@triton.jit
def quantize(momentum, random):
    """`storage_formats.quantize` of float32 rows: levels, and a column of scales."""
    magnitude = momentum.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(magnitude, 1, keep_dims=True).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, tl.full(largest.shape, LARGEST_LEVEL, tl.float32))
    broken = ~(scale < float("inf"))
    tiny = scale < SMALLEST_NORMAL
    usable = ~(tiny | broken)
    inverse = tl.where(usable, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(usable, scale, 1.0)), 0.0)
    # The scale of a block that is not finite is NaN.
    ratio = tl.where(usable, magnitude.to(tl.float32, bitcast=True) * inverse, 0.0)
    words = (ratio + 1.0).to(tl.int32, bitcast=True) - ONE_PATTERN + (random & 0xFFFF).to(tl.int32) * 8 + 4
    level = tl.minimum(words >> LEVEL_BITS_DROPPED, LEVELS)
    level = tl.where(momentum < 0, -level, level)
    return level.to(tl.int8), tl.where(broken, float("nan"), tl.where(tiny, 0.0, scale))


@triton.jit
def store_momentum(
    tensor, start, local, stored, value, random, DTYPE: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Stores momentum where `stored` says so, bf16 rounded to nearest even as torch casts."""
    if DTYPE == tl.int8:
        level, scale = quantize(value.to(tl.float32), random)
        target = array_at(tensor, EXP_AVG_ARRAY, start, tl.int8, ALIGNED)
        tl.store(target + local, level, mask=stored)
        scales = array_at(tensor, SCALE_ARRAY, start // BLOCK, tl.float32, False)
        row = tl.arange(0, ROWS)[:, None]
        tl.store(scales + row, scale, mask=tl.sum(stored.to(tl.int32), 1, keep_dims=True) > 0)
    elif DTYPE == tl.bfloat16:
        words = value.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = words + 0x7FFF + ((words >> 16) & 1)
        rounded = tl.where((words & 0x7FFFFFFF) > INFINITY_PATTERN, NAN_PATTERN, rounded)
        target = array_at(tensor, EXP_AVG_ARRAY, start, tl.int16, ALIGNED)
        tl.store(target + local, (rounded >> 16).to(tl.int16), mask=stored)
    else:
        target = array_at(tensor, EXP_AVG_ARRAY, start, DTYPE, ALIGNED)
        tl.store(target + local, value.to(DTYPE), mask=stored)


@triton.jit
def caution(update, grad, inside, COMPUTE: tl.constexpr):
    """`rule.caution` of rows."""
    shared = update * grad > 0
    agreeing = tl.sum(shared.to(tl.int32), 1, keep_dims=True)
    elements = tl.sum(inside.to(tl.int32), 1, keep_dims=True)
    ratio = divide(elements.to(COMPUTE), tl.maximum(agreeing, 1).to(COMPUTE), COMPUTE)
    return update * tl.where(shared, tl.minimum(ratio, CAUTIOUS_LIMIT), 0.0)


@triton.jit
def everywhere(condition):
    """Broadcasts a scalar condition over a tile; by way of int32, as the interpreter confuses scalar booleans."""
    return tl.broadcast_to(condition.to(tl.int32), (ROWS, BLOCK)) != 0


@triton.jit
def update_tile(
    tensor, group, start, remaining, nonfinite,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENTUM: tl.constexpr, WEIGHT_BITS: tl.constexpr,
    CAUTIOUS: tl.constexpr, ALIGNED: tl.constexpr,
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
    contrary = update * weight < setting(group, DECAY_THRESHOLD, COMPUTE)
    change = (tl.where(contrary, 0.0, weight * setting(group, DECAY, COMPUTE)) + update) * lr
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
    store_weight(tensor, start, local, written, new_weight, random, PARAM, WEIGHT_BITS, ALIGNED)
    store_momentum(tensor, start, local, written, new_momentum, random, MOMENTUM, ALIGNED)


@triton.jit
def lion_kernel(
    tensors, groups, tensor_of_tile, nonfinite,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENTUM: tl.constexpr, WEIGHT_BITS: tl.constexpr,
    CAUTIOUS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One step of the tensors of a table, which agree in the constants; one program for each tile.

    Args:
        tensors: int64 rows, a tensor each: see the columns above.
        groups: int64 rows, the settings of a parameter group each.
        tensor_of_tile: int32, the row of the tensor that each tile belongs to.
        nonfinite: int64, the count of non-finite gradients that is added to.
        PARAM, GRAD, MOMENTUM: stored dtypes.
        WEIGHT_BITS: of a bf16 parameter: 32, 24 or 16.
        CAUTIOUS: whether updates that the gradient contradicts are masked.
        ALIGNED: whether all arrays but the scales begin at multiples of 16 bytes.
    """
    tile = tl.program_id(0)
    row = tl.load(tensor_of_tile + tile).to(tl.int64)
    tensor = tensors + row * TENSOR_WIDTH
    group = groups + tl.load(tensor + GROUP) * GROUP_WIDTH
    start = (tile - tl.load(tensor + FIRST_TILE)) * TILE
    remaining = tl.load(tensor + COUNT) - start
    # The compiler makes loads and stores of 16 bytes only where it knows the mask, hence the constant of a whole tile.
    if remaining >= TILE:
        update_tile(
            tensor, group, start, TILE, nonfinite,
            PARAM, GRAD, MOMENTUM, WEIGHT_BITS, CAUTIOUS, ALIGNED,
        )  # fmt: skip
    else:
        update_tile(
            tensor, group, start, remaining.to(tl.int32), nonfinite,
            PARAM, GRAD, MOMENTUM, WEIGHT_BITS, CAUTIOUS, ALIGNED,
        )  # fmt: skip


@triton.jit
def probe_kernel(target):
    """Writes one number, to find out whether kernels can be compiled and run."""
    tl.store(target, 1.0)


INTERPRETED = not isinstance(probe_kernel, triton.runtime.JITFunction)
"""Whether TRITON_INTERPRET=1 was set when this was imported: kernels then run in Python on the CPU."""
