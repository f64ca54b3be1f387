/* Included by cpu.c: how a block is decoded to float and encoded again; the formats are those of bits.py. */

/* The upper half of the pattern of 1, and the place of an int8 level in the upper half of such a pattern. */
enum { ONE_HALF = ONE_PATTERN >> 16, LEVEL_SHIFT = 3 };

/* Where a block lies, or a copy of the last, shorter one, filled up with zeros. */
typedef struct {
    char *param, *grad, *exp_avg, *remainder;
    float *scale;
} Block;

/* Words and floats at any address. */
typedef uint32_t __attribute__((aligned(1), may_alias)) Word;
typedef float __attribute__((aligned(1), may_alias)) Float;
typedef uint16_t __attribute__((aligned(1), may_alias)) Half;

INLINE uint32_t pattern(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    return word;
}

INLINE float number(uint32_t word) {
    float value;
    memcpy(&value, &word, 4);
    return value;
}

/* The random word of bits.py but for its last step, which leaves the upper half as it is: `lower_half` takes that step. */
INLINE uint32_t random_word(uint32_t element, uint32_t key1, uint32_t key2) {
    uint32_t word = element ^ key1;
    word ^= word >> 16;
    word *= 0x7FEB352Du;
    word ^= word >> 15;
    return (word + key2) * 0x846CA68Bu;
}

/* The lower half of a random word, moved up to where a level ends. */
INLINE uint32_t lower_half(uint32_t word) {
    return (word << LEVEL_SHIFT ^ word >> (16 - LEVEL_SHIFT)) & 0xFFFFu << LEVEL_SHIFT;
}

/* The decoders fill `value`, or return where the block lies as it is. */
INLINE float *decode_float32(char *source, int paired, float *value) {
    if (!paired) return (float *)source;
    const Float *stored = (const Float *)source;
    for (int i = 0; i < HALF; i++) value[i] = stored[2 * i], value[HALF + i] = stored[2 * i + 1];
    return value;
}

INLINE void encode_float32(char *target, int paired, const float *value) {
    Float *stored = (Float *)target;
    if (paired)
        for (int i = 0; i < HALF; i++) stored[2 * i] = value[i], stored[2 * i + 1] = value[HALF + i];
    else
        for (int i = 0; i < BLOCK; i++) stored[i] = value[i];
}

INLINE float *decode_bfloat16(const char *source, float *value) {
    const Word *stored = (const Word *)source;
    for (int i = 0; i < HALF; i++) {
        value[i] = number(stored[i] << 16);
        value[HALF + i] = number(stored[i] & UPPER);
    }
    return value;
}

/* Nearest bf16, ties to even, as torch casts. */
INLINE uint32_t nearest_bfloat16(float value) {
    uint32_t word = pattern(value);
    return word + 0x7FFFu + ((word >> 16) & 1u);
}

INLINE void encode_bfloat16(char *target, const float *value, int careful) {
    Word *stored = (Word *)target;
    for (int i = 0; i < HALF; i++)
        stored[i] = (nearest_bfloat16(value[i]) >> 16) | (nearest_bfloat16(value[HALF + i]) & UPPER);
    if (careful)
        for (int i = 0; i < BLOCK; i++)
            if (value[i] != value[i]) ((uint16_t *)target)[i < HALF ? 2 * i : 2 * (i - HALF) + 1] = NAN_PATTERN >> 16;
}

INLINE float *decode_weight(const Task *task, const Block *block, int paired, float *weight) {
    if (task->param_type == FLOAT32) return decode_float32(block->param, paired, weight);
    if (task->weight_bits == 16) return decode_bfloat16(block->param, weight);
    const Word *high = (const Word *)block->param, *low = (const Word *)block->remainder;
    const Half *bytes = (const Half *)block->remainder;
    if (task->weight_bits == 24)
        for (int i = 0; i < HALF; i++) {
            uint32_t pair = (uint32_t)(int16_t)bytes[i];
            weight[i] = number((high[i] << 16) + (uint32_t)((int32_t)(pair << 24) >> 16));
            weight[HALF + i] = number((high[i] & UPPER) + (pair & ~0xFFu));
        }
    else
        for (int i = 0; i < HALF; i++) {
            weight[i] = number((high[i] << 16) + (uint32_t)((int32_t)(low[i] << 16) >> 16));
            weight[HALF + i] = number((high[i] & UPPER) + (uint32_t)((int32_t)low[i] >> 16));
        }
    return weight;
}

/* A weight zeroed from outside is zero: a remainder below zero beside it would make it one of these NaNs. */
INLINE uint32_t mended(uint32_t word) { return (word & 0x7FFF8000u) == 0x7FFF8000u ? ~word & SIGN_BIT : word; }

/* Saturates finite numbers at the largest bf16 number, keeps infinities, makes every NaN the same. */
INLINE uint32_t ordinary(uint32_t word) {
    uint32_t magnitude = word & ~SIGN_BIT, sign = word & SIGN_BIT;
    if (magnitude > INFINITY_PATTERN) return NAN_PATTERN;
    if (magnitude == INFINITY_PATTERN) return word;
    return sign | (magnitude > BFLOAT16_MAX_PATTERN ? BFLOAT16_MAX_PATTERN : magnitude);
}

/* Stores new weights; leaves in them what was stored. */
INLINE void encode_weight(const Task *task, const Block *block, int paired, float *weight, const uint32_t *random) {
    if (task->param_type == FLOAT32) {
        encode_float32(block->param, paired, weight);
        return;
    }
    Word *high = (Word *)block->param, *low = (Word *)block->remainder;
    Half *bytes = (Half *)block->remainder;
    if (task->weight_bits == 32)
        for (int i = 0; i < HALF; i++) {
            uint32_t even = pattern(weight[i]), odd = pattern(weight[HALF + i]);
            high[i] = ((even + 0x8000u) >> 16) | ((odd + 0x8000u) & UPPER);
            low[i] = (even & ~UPPER) | (odd << 16);
        }
    else if (task->weight_bits == 24)
        for (int i = 0; i < HALF; i++) {
            uint32_t even = pattern(weight[i]) + (random[i] >> 24);
            uint32_t odd = pattern(weight[HALF + i]) + (random[HALF + i] >> 24);
            weight[i] = number(even & ~0xFFu), weight[HALF + i] = number(odd & ~0xFFu);
            high[i] = ((even + 0x8000u) >> 16) | ((odd + 0x8000u) & UPPER);
            bytes[i] = (uint16_t)((even >> 8 & 0xFFu) | (odd & 0xFF00u));
        }
    else
        for (int i = 0; i < HALF; i++) {
            uint32_t even = pattern(weight[i]) + (random[i] >> 16);
            uint32_t odd = pattern(weight[HALF + i]) + (random[HALF + i] >> 16);
            weight[i] = number(even & UPPER), weight[HALF + i] = number(odd & UPPER);
            high[i] = (even >> 16) | (odd & UPPER);
        }
}

/* |x| - 1 with the sign of x. */
INLINE float less_one(uint32_t word) { return number(word) - number((word & SIGN_BIT) | ONE_PATTERN); }

INLINE float *decode_momentum(const Task *task, const Block *block, int paired, float *momentum) {
    if (task->exp_avg_type == FLOAT32) return decode_float32(block->exp_avg, paired, momentum);
    if (task->exp_avg_type == BFLOAT16) return decode_bfloat16(block->exp_avg, momentum);
    uint16_t bfloat[BLOCK]; /* 1 + |m| / scale with the sign of m */
    for (int i = 0; i < BLOCK; i++) {
        int16_t level = ((const int8_t *)block->exp_avg)[i];
        int16_t sign = (int16_t)(level >> 15);
        bfloat[i] = (uint16_t)((level << LEVEL_SHIFT ^ sign) + ((sign & 0x8001) ^ ONE_HALF));
    }
    const Word *pair = (const Word *)bfloat;
    const float scale = *block->scale;
    for (int i = 0; i < HALF; i++) {
        momentum[i] = less_one(pair[i] << 16) * scale;
        momentum[HALF + i] = less_one(pair[i] & UPPER) * scale;
    }
    return momentum;
}

/* The pattern of 1 + |m| / scale less that of 1, with the sign of m, and noise of 19 bits below what is kept of it. */
INLINE uint32_t noisy_ratio(float momentum, float inverse, uint32_t random) {
    float ratio = momentum * inverse + number((pattern(momentum) & SIGN_BIT) | ONE_PATTERN);
    return pattern(ratio) + (lower_half(random) | (4u - ONE_PATTERN));
}

/* int8: rounded stochastically to the top of the pattern of 1 + |m| / scale; see bits.py. `peak` is the largest |m|. No
   level passes 127: the largest ratio is 248 and at most three units of its last place, the noise at most 2^19 - 4. */
INLINE void quantize(const Block *block, int count, const float *momentum, uint32_t peak, const uint32_t *random) {
    int8_t *level = (int8_t *)block->exp_avg;
    float scale = number(peak) / LARGEST_LEVEL;
    if (!(scale < INFINITY)) {
        *block->scale = NAN;
        memset(level, 0, (size_t)count);
        return;
    }
    float inverse = scale < 1.17549435e-38f ? 0.0f : 1.0f / scale;
    *block->scale = inverse == 0.0f ? 0.0f : scale;
    uint16_t bfloat[BLOCK];
    for (int i = 0; i < HALF; i++)
        ((Word *)bfloat)[i] = noisy_ratio(momentum[i], inverse, random[i]) >> 16 |
                              (noisy_ratio(momentum[HALF + i], inverse, random[HALF + i]) & UPPER);
    for (int i = 0; i < BLOCK; i++) {
        uint16_t magnitude = (uint16_t)((bfloat[i] & 0x7FFF) >> LEVEL_SHIFT);
        level[i] = (int8_t)(bfloat[i] & 0x8000 ? -magnitude : magnitude);
    }
}

INLINE void prefetch(const char *address, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += CACHE_LINE_BYTES) __builtin_prefetch(address + i);
}

static const int BYTES[] = {4, 8, 2, 1};

INLINE int remainder_bytes(const Task *task) { return (int)(task->weight_bits - 16) / 8; }

INLINE Block block_at(const Task *task, int64_t start) {
    Block block;
    block.param = task->param + BYTES[task->param_type] * start;
    block.grad = (char *)task->grad + BYTES[task->grad_type] * start;
    block.exp_avg = task->exp_avg + BYTES[task->exp_avg_type] * start;
    block.remainder = task->remainder ? task->remainder + remainder_bytes(task) * start : 0;
    block.scale = task->scale ? task->scale + start / BLOCK : 0;
    return block;
}

INLINE void draw(const Task *task, int64_t start, uint32_t *random) {
    uint32_t first = (uint32_t)(task->offset + start), key1 = (uint32_t)task->key1, key2 = (uint32_t)task->key2;
    for (int i = 0; i < HALF; i++) {
        random[i] = random_word(first + 2 * (uint32_t)i, key1, key2);
        random[HALF + i] = random_word(first + 2 * (uint32_t)i + 1, key1, key2);
    }
}

/* Copies between a block and another of the same tensor. */
INLINE void copy_block(const Task *task, int count, Block *target, const Block *source, int with_grad) {
    memcpy(target->param, source->param, (size_t)(BYTES[task->param_type] * count));
    if (with_grad) memcpy(target->grad, source->grad, (size_t)(BYTES[task->grad_type] * count));
    memcpy(target->exp_avg, source->exp_avg, (size_t)(BYTES[task->exp_avg_type] * count));
    if (task->remainder) memcpy(target->remainder, source->remainder, (size_t)(remainder_bytes(task) * count));
}
