/* The Lion rule over flat arrays on a CPU: plain loops that the compiler vectorises, block by block.
 *
 * A block of 256 elements is decoded to float, updated and encoded in first-level cache while the next block is fetched.
 * (One loop that loads, updates and stores was tried: mixed element widths made it half as fast.) Compile with
 * -ffp-contract=off, as a fused multiply-add would differ from the other engines in the last bit, and -fopenmp-simd,
 * which lets sums of telemetry be added up in any order. What is computed is written down in rule.py, how it is stored in
 * bits.py.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(NO_CLONES)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

enum { BLOCK = 256, CHUNK = 65536, CACHE_LINE_BYTES = 64 };
enum { FLOAT32, FLOAT64, BFLOAT16, INT8 };
enum { CAUTIOUS = 1, SKIP_NONFINITE = 2 };
enum { UNMOVED, ZERO, AGREE, MOMENTUM_SQUARED, WEIGHT_SQUARED, NEAR_BOUND, DECAY, NONFINITE, FLIPPED, STATISTICS };

#define BFLOAT16_MAX_PATTERN 0x7F7F0000u
#define INFINITY_PATTERN 0x7F800000u
#define NAN_PATTERN 0x7FC00000u
#define CAUTIOUS_LIMIT 2
#define LEVELS 127
#define BOUND_SHARE 0.9

/* One tensor: must match _TASK in cpu.py field for field. */
typedef struct {
    char *param, *exp_avg;
    const char *grad;
    float *scale;
    char *remainder;
    double *statistics; /* a row of STATISTICS numbers for each chunk, or NULL */
    int8_t *signs;
    int64_t sign_stride;
    int64_t count, first_chunk, offset;
    int64_t param_type, grad_type, exp_avg_type, weight_bits, flags;
    int64_t key1, key2;
    double lr, beta1, rest1, beta2, rest2, weight_decay, grad_scale;
} Task;

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

INLINE uint32_t random_word(uint32_t element, uint32_t key1, uint32_t key2) {
    uint32_t word = element ^ key1;
    word ^= word >> 16;
    word *= 0x7FEB352Du;
    word ^= word >> 15;
    word = (word + key2) * 0x846CA68Bu;
    return word ^ (word >> 16);
}

/* Nearest bf16, ties to even, as torch casts. */
INLINE uint16_t nearest_bfloat16(float value) {
    uint32_t word = pattern(value);
    uint32_t rounded = (word + 0x7FFFu + ((word >> 16) & 1u)) >> 16;
    return (uint16_t)(value == value ? rounded : NAN_PATTERN >> 16);
}

/* The rule of rule.py on one block; u stays a NaN where the gradient is one. */
#define DEFINE_RULE(real, name)                                                                                      \
    INLINE void name(const Task *task, int count, const real *weight, const real *grad, const real *momentum,        \
                     real *new_weight, real *new_momentum, real *update) {                                           \
        const real lr = (real)task->lr, decay = (real)task->weight_decay;                                            \
        const real beta1 = (real)task->beta1, rest1 = (real)task->rest1;                                             \
        const real beta2 = (real)task->beta2, rest2 = (real)task->rest2;                                             \
        for (int i = 0; i < count; i++) {                                                                            \
            real mixed = beta1 * momentum[i] + rest1 * grad[i];                                                      \
            update[i] = mixed > 0 ? 1 : mixed < 0 ? -1 : mixed == 0 ? 0 : mixed;                                     \
        }                                                                                                            \
        if (task->flags & CAUTIOUS) {                                                                                \
            int shared = 0;                                                                                          \
            for (int i = 0; i < count; i++) shared += update[i] * grad[i] > 0;                                       \
            real factor = (real)count / (real)shared;                                                                \
            factor = factor > CAUTIOUS_LIMIT ? CAUTIOUS_LIMIT : factor;                                              \
            for (int i = 0; i < count; i++) update[i] *= update[i] * grad[i] > 0 ? factor : 0;                       \
        }                                                                                                            \
        for (int i = 0; i < count; i++) {                                                                            \
            new_weight[i] = weight[i] - lr * (decay * weight[i] + update[i]);                                        \
            new_momentum[i] = beta2 * momentum[i] + rest2 * grad[i];                                                 \
        }                                                                                                            \
    }

DEFINE_RULE(float, rule_float)
DEFINE_RULE(double, rule_double)

/* What telemetry.py counts; `stored` is the new weight after rounding to its storage. */
#define DEFINE_OBSERVE(real, name)                                                                                   \
    INLINE void name(const Task *task, int64_t start, int count, double *row, const real *weight, const real *grad,  \
                     const real *momentum, const real *stored, const real *new_momentum, const real *update) {       \
        const real lr = (real)task->lr, bound = (real)(BOUND_SHARE / task->weight_decay);                            \
        int unmoved = 0, zero = 0, agree = 0, near_bound = 0;                                                        \
        real momentum_squared = 0, weight_squared = 0, decay = 0;                                                    \
        _Pragma("omp simd reduction(+ : unmoved, zero, agree, near_bound, momentum_squared, weight_squared, decay)") \
        for (int i = 0; i < count; i++) {                                                                            \
            unmoved += stored[i] == weight[i];                                                                       \
            zero += update[i] == 0;                                                                                  \
            agree += momentum[i] * grad[i] > 0;                                                                      \
            near_bound += (weight[i] < 0 ? -weight[i] : weight[i]) > bound;                                          \
            momentum_squared += new_momentum[i] * new_momentum[i];                                                   \
            weight_squared += weight[i] * weight[i];                                                                 \
            decay += (weight[i] - stored[i] - lr * update[i]) * weight[i];                                           \
        }                                                                                                            \
        row[UNMOVED] += unmoved, row[ZERO] += zero, row[AGREE] += agree, row[NEAR_BOUND] += near_bound;              \
        row[MOMENTUM_SQUARED] += momentum_squared, row[WEIGHT_SQUARED] += weight_squared, row[DECAY] += decay;       \
        int64_t sample = (start + task->sign_stride - 1) / task->sign_stride;                                        \
        for (int64_t i = sample * task->sign_stride - start; i < count; i += task->sign_stride, sample++) {          \
            int8_t sign = (int8_t)((update[i] > 0) - (update[i] < 0));                                               \
            row[FLIPPED] += sign * task->signs[sample] < 0;                                                          \
            task->signs[sample] = sign;                                                                              \
        }                                                                                                            \
    }

DEFINE_OBSERVE(float, observe_float)
DEFINE_OBSERVE(double, observe_double)

INLINE void decode_weight(const Task *task, int64_t start, int count, float *weight) {
    if (task->param_type == FLOAT32) {
        memcpy(weight, task->param + 4 * start, 4 * (size_t)count);
        return;
    }
    const uint16_t *high = (const uint16_t *)task->param + start;
    if (task->weight_bits == 32) {
        const int16_t *low = (const int16_t *)task->remainder + start;
        for (int i = 0; i < count; i++) {
            int32_t rest = low[i];
            rest = (high[i] & 0x7FFF) == 0 && rest < 0 ? 0 : rest; /* a weight zeroed from outside is zero */
            weight[i] = number(((uint32_t)high[i] << 16) + (uint32_t)rest);
        }
    } else if (task->weight_bits == 24) {
        const int8_t *low = (const int8_t *)task->remainder + start;
        for (int i = 0; i < count; i++) {
            int32_t rest = low[i] * 256;
            rest = (high[i] & 0x7FFF) == 0 && rest < 0 ? 0 : rest;
            weight[i] = number(((uint32_t)high[i] << 16) + (uint32_t)rest);
        }
    } else {
        for (int i = 0; i < count; i++) weight[i] = number((uint32_t)high[i] << 16);
    }
}

/* Saturates finite numbers at the largest bf16 number, keeps infinities, makes every NaN the same. */
INLINE uint32_t ordinary(uint32_t word) {
    uint32_t magnitude = word & 0x7FFFFFFFu, sign = word & 0x80000000u;
    if (magnitude > INFINITY_PATTERN) return NAN_PATTERN;
    if (magnitude == INFINITY_PATTERN) return word;
    return sign | (magnitude > BFLOAT16_MAX_PATTERN ? BFLOAT16_MAX_PATTERN : magnitude);
}

/* Stores new weights; leaves in them what was stored. */
INLINE void encode_weight(const Task *task, int64_t start, int count, float *weight, const uint32_t *random) {
    if (task->param_type == FLOAT32) {
        memcpy(task->param + 4 * start, weight, 4 * (size_t)count);
        return;
    }
    uint16_t *high = (uint16_t *)task->param + start;
    uint32_t words[BLOCK];
    int extreme = 0;
    for (int i = 0; i < count; i++) {
        words[i] = pattern(weight[i]);
        extreme |= (words[i] & 0x7FFFFFFFu) > BFLOAT16_MAX_PATTERN;
    }
    if (extreme)
        for (int i = 0; i < count; i++) words[i] = ordinary(words[i]);
    if (task->weight_bits == 32) {
        int16_t *low = (int16_t *)task->remainder + start;
        for (int i = 0; i < count; i++) {
            high[i] = (uint16_t)((words[i] + 0x8000u) >> 16);
            low[i] = (int16_t)words[i];
        }
    } else if (task->weight_bits == 24) {
        int8_t *low = (int8_t *)task->remainder + start;
        for (int i = 0; i < count; i++) {
            words[i] = (words[i] + (random[i] >> 24)) & ~0xFFu;
            high[i] = (uint16_t)((words[i] + 0x8000u) >> 16);
            low[i] = (int8_t)(words[i] >> 8);
        }
    } else {
        for (int i = 0; i < count; i++) {
            words[i] = (words[i] + (random[i] >> 16)) & ~0xFFFFu;
            high[i] = (uint16_t)(words[i] >> 16);
        }
    }
    if (task->statistics)
        for (int i = 0; i < count; i++) weight[i] = number(words[i]);
}

INLINE void decode_bfloat16(const char *source, int64_t start, int count, float *value) {
    const uint16_t *stored = (const uint16_t *)source + start;
    for (int i = 0; i < count; i++) value[i] = number((uint32_t)stored[i] << 16);
}

INLINE void decode_momentum(const Task *task, int64_t start, int count, float *momentum) {
    if (task->exp_avg_type == FLOAT32) {
        memcpy(momentum, task->exp_avg + 4 * start, 4 * (size_t)count);
    } else if (task->exp_avg_type == BFLOAT16) {
        decode_bfloat16(task->exp_avg, start, count, momentum);
    } else {
        const int8_t *level = (const int8_t *)task->exp_avg + start;
        const float scale = task->scale[start / BLOCK];
        for (int i = 0; i < count; i++) {
            int32_t wide = level[i];
            momentum[i] = (float)(wide * (wide < 0 ? -wide : wide)) * scale;
        }
    }
}

/* int8: sign * level^2 * scale, rounded stochastically between neighbouring squares; see bits.py. */
INLINE void quantize(const Task *task, int64_t start, int count, const float *momentum, const uint32_t *random) {
    int8_t *level = (int8_t *)task->exp_avg + start;
    uint32_t largest = 0;
    for (int i = 0; i < count; i++) {
        uint32_t magnitude = pattern(momentum[i]) & 0x7FFFFFFFu;
        largest = magnitude > largest ? magnitude : largest;
    }
    float scale = number(largest) / (LEVELS * LEVELS);
    if (!(scale < INFINITY)) {
        task->scale[start / BLOCK] = NAN;
        memset(level, 1, (size_t)count);
        return;
    }
    float inverse = scale < 1.17549435e-38f ? 0.0f : 1.0f / scale;
    task->scale[start / BLOCK] = inverse == 0.0f ? 0.0f : scale;
    for (int i = 0; i < count; i++) {
        float square = number(pattern(momentum[i]) & 0x7FFFFFFFu) * inverse;
        int32_t root = (int32_t)sqrtf(square);
        float rest = square - (float)(root * root);
        float threshold = ((float)(int32_t)(random[i] & 0xFFFFu) + 0.5f) * (1.0f / 65536) * (float)(2 * root + 1);
        root += rest > threshold;
        root = root > LEVELS ? LEVELS : root;
        level[i] = (int8_t)(momentum[i] < 0 ? -root : root);
    }
}

INLINE void encode_momentum(const Task *task, int64_t start, int count, const float *momentum, const uint32_t *random) {
    if (task->exp_avg_type == FLOAT32) {
        memcpy(task->exp_avg + 4 * start, momentum, 4 * (size_t)count);
    } else if (task->exp_avg_type == BFLOAT16) {
        uint16_t *stored = (uint16_t *)task->exp_avg + start;
        for (int i = 0; i < count; i++) stored[i] = nearest_bfloat16(momentum[i]);
    } else {
        quantize(task, start, count, momentum, random);
    }
}

INLINE void prefetch(const char *address, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += CACHE_LINE_BYTES) __builtin_prefetch(address + i);
}

static const int BYTES[] = {4, 8, 2, 1};

INLINE void prefetch_block(const Task *task, int64_t start) {
    prefetch(task->param + BYTES[task->param_type] * start, BYTES[task->param_type] * BLOCK);
    prefetch(task->grad + BYTES[task->grad_type] * start, BYTES[task->grad_type] * BLOCK);
    prefetch(task->exp_avg + BYTES[task->exp_avg_type] * start, BYTES[task->exp_avg_type] * BLOCK);
    if (task->remainder) {
        int64_t bytes = (task->weight_bits - 16) / 8;
        prefetch(task->remainder + bytes * start, bytes * BLOCK);
    }
}

/* Returns the number of elements whose gradient is not finite. */
INLINE int block_float(const Task *task, int64_t start, int count, double *row) {
    float weight[BLOCK], grad[BLOCK], momentum[BLOCK], new_weight[BLOCK], new_momentum[BLOCK], update[BLOCK];
    uint32_t random[BLOCK];
    decode_weight(task, start, count, weight);
    decode_momentum(task, start, count, momentum);
    if (task->grad_type == FLOAT32)
        memcpy(grad, task->grad + 4 * start, 4 * (size_t)count);
    else
        decode_bfloat16(task->grad, start, count, grad);
    if (task->grad_scale != 1)
        for (int i = 0; i < count; i++) grad[i] *= (float)task->grad_scale;
    int nonfinite = 0;
    for (int i = 0; i < count; i++) nonfinite += (pattern(grad[i]) & INFINITY_PATTERN) == INFINITY_PATTERN;
    rule_float(task, count, weight, grad, momentum, new_weight, new_momentum, update);
    if (nonfinite && task->flags & SKIP_NONFINITE)
        for (int i = 0; i < count; i++)
            if ((pattern(grad[i]) & INFINITY_PATTERN) == INFINITY_PATTERN)
                new_weight[i] = weight[i], new_momentum[i] = momentum[i], update[i] = 0;
    if ((task->param_type == BFLOAT16 && task->weight_bits != 32) || task->exp_avg_type == INT8)
        for (int i = 0; i < count; i++)
            random[i] = random_word((uint32_t)(task->offset + start + i), (uint32_t)task->key1, (uint32_t)task->key2);
    encode_weight(task, start, count, new_weight, random);
    encode_momentum(task, start, count, new_momentum, random);
    if (row) observe_float(task, start, count, row, weight, grad, momentum, new_weight, new_momentum, update);
    return nonfinite;
}

/* float64 parameters, whose gradient and momentum are float64 too. */
INLINE int block_double(const Task *task, int64_t start, int count, double *row) {
    double *weight = (double *)task->param + start, *momentum = (double *)task->exp_avg + start;
    double grad[BLOCK], new_weight[BLOCK], new_momentum[BLOCK], update[BLOCK];
    int nonfinite = 0;
    for (int i = 0; i < count; i++) {
        grad[i] = ((const double *)task->grad)[start + i] * task->grad_scale;
        nonfinite += !isfinite(grad[i]);
    }
    rule_double(task, count, weight, grad, momentum, new_weight, new_momentum, update);
    if (nonfinite && task->flags & SKIP_NONFINITE)
        for (int i = 0; i < count; i++)
            if (!isfinite(grad[i])) new_weight[i] = weight[i], new_momentum[i] = momentum[i], update[i] = 0;
    if (row) observe_double(task, start, count, row, weight, grad, momentum, new_weight, new_momentum, update);
    memcpy(weight, new_weight, 8 * (size_t)count);
    memcpy(momentum, new_momentum, 8 * (size_t)count);
    return nonfinite;
}

CLONES static int64_t run_chunk(const Task *task, int64_t start, int64_t stop, double *row) {
    int64_t nonfinite = 0;
    for (; start < stop; start += BLOCK) {
        int count = (int)(stop - start < BLOCK ? stop - start : BLOCK);
        if (start + 2 * BLOCK < task->count) prefetch_block(task, start + BLOCK);
        if (task->param_type == FLOAT64)
            nonfinite += block_double(task, start, count, row);
        else if (count == BLOCK) /* a constant that the compiler can unroll */
            nonfinite += block_float(task, start, BLOCK, row);
        else
            nonfinite += block_float(task, start, count, row);
    }
    if (row) row[NONFINITE] = (double)nonfinite;
    return nonfinite;
}

/* Takes chunks from a counter shared between threads until none is left; adds to the count of non-finite gradients. */
void lion_step(const Task *tasks, int64_t task_count, int64_t chunk_count, int64_t *next_chunk, int64_t *nonfinite) {
    int64_t chunk, task = 0;
    while ((chunk = __atomic_fetch_add(next_chunk, 1, __ATOMIC_RELAXED)) < chunk_count) {
        while (task + 1 < task_count && tasks[task + 1].first_chunk <= chunk) task++;
        const Task *current = tasks + task;
        int64_t start = (chunk - current->first_chunk) * CHUNK;
        int64_t stop = start + CHUNK < current->count ? start + CHUNK : current->count;
        double *row = current->statistics ? current->statistics + STATISTICS * (chunk - current->first_chunk) : 0;
        int64_t found = run_chunk(current, start, stop, row);
        if (found) __atomic_fetch_add(nonfinite, found, __ATOMIC_RELAXED);
    }
}

int64_t lion_task_bytes(void) { return sizeof(Task); }
