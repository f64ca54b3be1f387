/* The Lion rule over flat arrays on a CPU: plain loops that the compiler vectorises, block by block.
 *
 * A block of 256 elements is decoded to float, updated and encoded in first-level cache while a later one is fetched.
 * Numbers of 16 bits are decoded and encoded in pairs, by shifts and masks of 32-bit words, in half the time that it
 * takes to convert them one by one. If any array of a tensor has less than 32 bits per element, a decoded block
 * therefore holds its even elements first, then its odd ones ("paired"). A block with a number that is not finite, or
 * beyond the largest bf16 number, is computed a second time by a slower, careful path.
 *
 * Compile with -ffp-contract=off: a fused multiply-add would differ from the other engines in the last bit. rule.py
 * specifies the arithmetic, storage_formats.py the storage.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifndef _WIN32
#include <pthread.h>
#include <signal.h>
#endif

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(NO_CLONES)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words are taken apart as a little-endian machine stores them"
#endif
#define INLINE static inline __attribute__((always_inline))

enum { BLOCK = 256, HALF = BLOCK / 2, CHUNK = 262144, AHEAD = 2, CACHE_LINE_BYTES = 64 };
enum { FLOAT32, FLOAT64, BFLOAT16, INT8 };
enum { CAUTIOUS = 1, SKIP_NONFINITE = 2 };

#define BFLOAT16_MAX_PATTERN 0x7F7F0000u
#define INFINITY_PATTERN 0x7F800000u
#define ONE_PATTERN 0x3F800000u
#define SIGN_BIT 0x80000000u
#define UPPER 0xFFFF0000u
#define NAN_PATTERN 0x7FC00000u
#define CAUTIOUS_LIMIT 2
#define LARGEST_LEVEL 247

/* One tensor and its settings; the fields are those of TASK in cpu.py, in order. */
typedef struct {
    char *param, *exp_avg;
    const char *grad;
    float *scale;
    char *remainder;
    int64_t count, first_chunk, offset;
    int64_t param_type, grad_type, exp_avg_type, weight_bits, flags;
    int64_t key1, key2;
    double lr, beta1, rest1, beta2, rest2, weight_decay, decay_threshold, grad_scale;
} Task;

/* The upper half of the bit pattern of 1.0f, and the position of an int8 level in such a half. */
enum { ONE_HALF = ONE_PATTERN >> 16, LEVEL_SHIFT = 3 };

/* Addresses of the arrays of a block, or of a copy of the last, shorter block that is padded with zeros. */
typedef struct {
    char *param, *grad, *exp_avg, *remainder;
    float *scale;
} Block;

/* Types that may be read at any address. */
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

/* The random word of storage_formats.py without its last step, which changes the lower half only (see `lower_half`). */
INLINE uint32_t random_word(uint32_t element, uint32_t key1, uint32_t key2) {
    uint32_t word = element ^ key1;
    word ^= word >> 16;
    word *= 0x7FEB352Du;
    word ^= word >> 15;
    return (word + key2) * 0x846CA68Bu;
}

/* The lower half of a random word, after the last step, shifted to the bits below an int8 level. */
INLINE uint32_t lower_half(uint32_t word) {
    return (word << LEVEL_SHIFT ^ word >> (16 - LEVEL_SHIFT)) & 0xFFFFu << LEVEL_SHIFT;
}

/* The decoders fill and return `value`, or return the stored array where it can be read as it is. */
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

/* Rounds to the nearest bf16 number, ties to even, like a cast in torch. */
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

/* A weight set to zero outside the optimizer, beside a negative remainder, joins to one of these NaNs: it is zero. */
INLINE uint32_t mended(uint32_t word) { return (word & 0x7FFF8000u) == 0x7FFF8000u ? ~word & SIGN_BIT : word; }

/* Saturates finite numbers at the largest bf16 number, keeps infinities, and makes every NaN the canonical one. */
INLINE uint32_t ordinary(uint32_t word) {
    uint32_t magnitude = word & ~SIGN_BIT, sign = word & SIGN_BIT;
    if (magnitude > INFINITY_PATTERN) return NAN_PATTERN;
    if (magnitude == INFINITY_PATTERN) return word;
    return sign | (magnitude > BFLOAT16_MAX_PATTERN ? BFLOAT16_MAX_PATTERN : magnitude);
}

INLINE void encode_weight(const Task *task, const Block *block, int paired, const float *weight,
                          const uint32_t *random) {
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
            high[i] = ((even + 0x8000u) >> 16) | ((odd + 0x8000u) & UPPER);
            bytes[i] = (uint16_t)((even >> 8 & 0xFFu) | (odd & 0xFF00u));
        }
    else
        for (int i = 0; i < HALF; i++) {
            uint32_t even = pattern(weight[i]) + (random[i] >> 16);
            uint32_t odd = pattern(weight[HALF + i]) + (random[HALF + i] >> 16);
            high[i] = (even >> 16) | (odd & UPPER);
        }
}

/* |x| - 1 with the sign of x, for a number x given by its pattern. */
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

/* The pattern of 1 + |m| / scale minus that of 1, with the sign of m, plus 19 random bits below the bits kept. */
INLINE uint32_t noisy_ratio(float momentum, float inverse, uint32_t random) {
    float ratio = momentum * inverse + number((pattern(momentum) & SIGN_BIT) | ONE_PATTERN);
    return pattern(ratio) + (lower_half(random) | (4u - ONE_PATTERN));
}

/* The largest magnitude of a block, as a pattern. */
INLINE uint32_t largest_magnitude(const float *value) {
    uint32_t largest = 0;
    for (int i = 0; i < BLOCK; i++) {
        uint32_t magnitude = pattern(value[i]) & ~SIGN_BIT;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

/* `quantize` of storage_formats.py. No level exceeds 127: the largest ratio
   is 248 and at most three units in the last place, and the random bits are at most 2^19 - 4. */
INLINE void quantize(const Block *block, int count, const float *momentum, const uint32_t *random) {
    int8_t *level = (int8_t *)block->exp_avg;
    float scale = number(largest_magnitude(momentum)) / LARGEST_LEVEL;
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

/* Copies the first `count` elements of a block of the tensor to another address. */
INLINE void copy_block(const Task *task, int count, Block *target, const Block *source, int with_grad) {
    memcpy(target->param, source->param, (size_t)(BYTES[task->param_type] * count));
    if (with_grad) memcpy(target->grad, source->grad, (size_t)(BYTES[task->grad_type] * count));
    memcpy(target->exp_avg, source->exp_avg, (size_t)(BYTES[task->exp_avg_type] * count));
    if (task->remainder) memcpy(target->remainder, source->remainder, (size_t)(remainder_bytes(task) * count));
}

/* `ruled` of rule.py for one block of `count` elements, padded with zeros; u is NaN where c is. */
#define DEFINE_RULE(real, name)                                                                                      \
    INLINE void name(const Task *task, int count, const real *weight, const real *grad, const real *momentum,        \
                     real *new_weight, real *new_momentum) {                                                         \
        const real lr = (real)task->lr, decay = (real)task->weight_decay, least = (real)task->decay_threshold;       \
        const real beta1 = (real)task->beta1, rest1 = (real)task->rest1;                                             \
        const real beta2 = (real)task->beta2, rest2 = (real)task->rest2;                                             \
        real update[BLOCK];                                                                                          \
        for (int i = 0; i < BLOCK; i++) {                                                                            \
            real mixed = beta1 * momentum[i] + rest1 * grad[i];                                                      \
            update[i] = mixed > 0 ? 1 : mixed < 0 ? -1 : mixed == 0 ? 0 : mixed;                                     \
        }                                                                                                            \
        if (task->flags & CAUTIOUS) {                                                                                \
            int shared = 0;                                                                                          \
            for (int i = 0; i < BLOCK; i++) shared += update[i] * grad[i] > 0;                                       \
            real factor = (real)count / (real)shared;                                                                \
            factor = factor > CAUTIOUS_LIMIT ? CAUTIOUS_LIMIT : factor;                                              \
            for (int i = 0; i < BLOCK; i++) update[i] *= update[i] * grad[i] > 0 ? factor : 0;                       \
        }                                                                                                            \
        for (int i = 0; i < BLOCK; i++) {                                                                            \
            real shrink = update[i] * weight[i] < least ? 0 : decay * weight[i];                                     \
            new_weight[i] = weight[i] - lr * (shrink + update[i]);                                                   \
            new_momentum[i] = beta2 * momentum[i] + rest2 * grad[i];                                                 \
        }                                                                                                            \
    }

DEFINE_RULE(float, rule_float)
DEFINE_RULE(double, rule_double)

/* The rule for finite numbers and without caution. Returns an upper bound of all magnitudes, as a pattern. */
INLINE uint32_t rule_plain(const Task *task, const float *weight, const float *grad, const float *momentum,
                           float *new_weight, float *new_momentum) {
    const float lr = (float)task->lr, decay = (float)task->weight_decay, least = (float)task->decay_threshold;
    const float beta1 = (float)task->beta1, rest1 = (float)task->rest1;
    const float beta2 = (float)task->beta2, rest2 = (float)task->rest2;
    const int always_decays = least == -INFINITY; /* known before the loop, which then has no comparison */
    uint32_t largest = 0;
    for (int i = 0; i < BLOCK; i++) {
        float mixed = beta1 * momentum[i] + rest1 * grad[i];
        float update = mixed == 0 ? 0 : number((pattern(mixed) & SIGN_BIT) | ONE_PATTERN);
        float shrink = !always_decays && update * weight[i] < least ? 0 : decay * weight[i];
        new_weight[i] = weight[i] - lr * (shrink + update);
        new_momentum[i] = beta2 * momentum[i] + rest2 * grad[i];
        uint32_t magnitude = (pattern(mixed) | pattern(new_weight[i])) & ~SIGN_BIT; /* not below either */
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

/* Computes a block with caution or with numbers that are not finite. Returns the number of gradients not finite. */
INLINE int step_carefully(const Task *task, int count, float *weight, const float *grad, const float *momentum,
                          float *new_weight, float *new_momentum) {
    const int joined = task->param_type == BFLOAT16 && task->weight_bits != 16;
    int nonfinite = 0;
    for (int i = 0; i < BLOCK; i++) {
        if (joined) weight[i] = number(mended(pattern(weight[i])));
        nonfinite += (pattern(grad[i]) & INFINITY_PATTERN) == INFINITY_PATTERN;
    }
    rule_float(task, count, weight, grad, momentum, new_weight, new_momentum);
    if (nonfinite && task->flags & SKIP_NONFINITE)
        for (int i = 0; i < BLOCK; i++)
            if ((pattern(grad[i]) & INFINITY_PATTERN) == INFINITY_PATTERN)
                new_weight[i] = weight[i], new_momentum[i] = momentum[i];
    if (task->param_type == BFLOAT16)
        for (int i = 0; i < BLOCK; i++) new_weight[i] = number(ordinary(pattern(new_weight[i])));
    return nonfinite;
}

/* Updates a block; returns the number of gradients that are not finite. The arrays of `next` are prefetched one by one
   in between, as a core fetches only a few cache lines at a time. */
INLINE int block_float(const Task *task, const Block *block, const Block *next, int64_t start, int count) {
    const int paired = task->param_type != FLOAT32 || task->grad_type != FLOAT32 || task->exp_avg_type != FLOAT32;
    float weights[BLOCK], grads[BLOCK], momenta[BLOCK], new_weight[BLOCK], new_momentum[BLOCK];
    uint32_t random[BLOCK];
    prefetch(next->param, BYTES[task->param_type] * BLOCK);
    float *weight = decode_weight(task, block, paired, weights);
    const float *momentum = decode_momentum(task, block, paired, momenta);
    prefetch(next->grad, BYTES[task->grad_type] * BLOCK);
    const float *grad = task->grad_type == FLOAT32 ? decode_float32(block->grad, paired, grads)
                                                   : decode_bfloat16(block->grad, grads);
    if (task->grad_scale != 1) {
        for (int i = 0; i < BLOCK; i++) grads[i] = grad[i] * (float)task->grad_scale;
        grad = grads;
    }
    int nonfinite = 0;
    uint32_t largest = rule_plain(task, weight, grad, momentum, new_weight, new_momentum);
    int careful = largest > BFLOAT16_MAX_PATTERN || task->flags & CAUTIOUS;
    if (careful)
        nonfinite = step_carefully(task, count, weight, grad, momentum, new_weight, new_momentum);
    if ((task->param_type == BFLOAT16 && task->weight_bits != 32) || task->exp_avg_type == INT8)
        draw(task, start, random);
    prefetch(next->exp_avg, BYTES[task->exp_avg_type] * BLOCK);
    encode_weight(task, block, paired, new_weight, random);
    if (next->remainder) prefetch(next->remainder, remainder_bytes(task) * BLOCK);
    if (task->exp_avg_type == FLOAT32)
        encode_float32(block->exp_avg, paired, new_momentum);
    else if (task->exp_avg_type == BFLOAT16)
        encode_bfloat16(block->exp_avg, new_momentum, careful);
    else
        quantize(block, count, new_momentum, random);
    return nonfinite;
}

/* Updates a block of a float64 parameter, whose gradient and momentum are float64 too. */
INLINE int block_double(const Task *task, int64_t start, int count) {
    double *param = (double *)task->param + start, *exp_avg = (double *)task->exp_avg + start;
    double weight[BLOCK] = {0}, grad[BLOCK] = {0}, momentum[BLOCK] = {0};
    double new_weight[BLOCK], new_momentum[BLOCK];
    int nonfinite = 0;
    memcpy(weight, param, 8 * (size_t)count);
    memcpy(momentum, exp_avg, 8 * (size_t)count);
    for (int i = 0; i < count; i++) {
        grad[i] = ((const double *)task->grad)[start + i] * task->grad_scale;
        nonfinite += !isfinite(grad[i]);
    }
    rule_double(task, count, weight, grad, momentum, new_weight, new_momentum);
    if (nonfinite && task->flags & SKIP_NONFINITE)
        for (int i = 0; i < count; i++)
            if (!isfinite(grad[i])) new_weight[i] = weight[i], new_momentum[i] = momentum[i];
    memcpy(param, new_weight, 8 * (size_t)count);
    memcpy(exp_avg, new_momentum, 8 * (size_t)count);
    return nonfinite;
}

CLONES static int64_t run_float(const Task *task, int64_t start, int64_t stop) {
    int64_t nonfinite = 0;
    char copies[4][4 * BLOCK];
    for (; start < stop; start += BLOCK) {
        int count = (int)(stop - start < BLOCK ? stop - start : BLOCK);
        Block block = block_at(task, start), place = block;
        int64_t ahead = start + AHEAD * BLOCK;
        Block next = block_at(task, ahead + BLOCK < task->count ? ahead : start);
        if (count < BLOCK) { /* a copy padded with zeros, which stay zeros */
            memset(copies, 0, sizeof copies);
            block = (Block){copies[0], copies[1], copies[2], copies[3], place.scale};
            copy_block(task, count, &block, &place, 1);
        }
        nonfinite += block_float(task, &block, &next, start, count);
        if (count < BLOCK) copy_block(task, count, &place, &block, 0);
    }
    return nonfinite;
}

CLONES static int64_t run_double(const Task *task, int64_t start, int64_t stop) {
    int64_t nonfinite = 0;
    for (; start < stop; start += BLOCK)
        nonfinite += block_double(task, start, (int)(stop - start < BLOCK ? stop - start : BLOCK));
    return nonfinite;
}

/* What the threads of one step share. */
typedef struct {
    const Task *tasks;
    int64_t task_count, chunk_count, next_chunk;
    int64_t *nonfinite;
} Step;

/* Updates chunks, taken from the shared counter, until none is left; counts gradients that are not finite. */
static void *run_chunks(void *argument) {
    Step *step = argument;
    int64_t chunk, task = 0;
    while ((chunk = __atomic_fetch_add(&step->next_chunk, 1, __ATOMIC_RELAXED)) < step->chunk_count) {
        while (task + 1 < step->task_count && step->tasks[task + 1].first_chunk <= chunk) task++;
        const Task *current = step->tasks + task;
        int64_t start = (chunk - current->first_chunk) * CHUNK;
        int64_t stop = start + CHUNK < current->count ? start + CHUNK : current->count;
        int64_t found = (current->param_type == FLOAT64 ? run_double : run_float)(current, start, stop);
        if (found) __atomic_fetch_add(step->nonfinite, found, __ATOMIC_RELAXED);
    }
    return 0;
}

/* Runs a step on up to `threads` threads, the calling one included, and returns when all have ended, so that no thread
 * exists at an interrupt, an exit or a fork. If the system refuses a thread, the others do its work. Threads block all
 * signals, which remain for the threads of the caller. */
void lion_step(const Task *tasks, int64_t task_count, int64_t chunk_count, int64_t threads, int64_t *nonfinite) {
    Step step = {tasks, task_count, chunk_count, 0, nonfinite};
#ifndef _WIN32
    enum { LARGEST = 256 };
    pthread_t others[LARGEST];
    int64_t started = 0;
    sigset_t all, before;
    sigfillset(&all);
    if (threads > 1 && pthread_sigmask(SIG_SETMASK, &all, &before) == 0) {
        while (started < threads - 1 && started < LARGEST &&
               pthread_create(others + started, 0, run_chunks, &step) == 0)
            started++;
        pthread_sigmask(SIG_SETMASK, &before, 0);
    }
    run_chunks(&step);
    while (started) pthread_join(others[--started], 0);
#else
    (void)threads;
    run_chunks(&step);
#endif
}

int64_t lion_task_bytes(void) { return sizeof(Task); }
