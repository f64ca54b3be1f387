/* Included by cpu.c: what is asked about gradients before a step; see measures.py.
 *
 * Sums are taken in float over short runs of elements, and added up in double. */

enum { RUN = 512, FETCHED = 1024, SURVEYED = 1 << 20, FLIPS = 0, SIGNS, PROJECTION, UPDATE_SQUARES, GRAD_SQUARES, DEAD, MEASURES };

/* A stretch of one tensor's elements: must match _STRETCH in measures.py field for field. */
typedef struct {
    const char *grad, *exp_avg; /* NULL where there is none: it has no sign */
    int64_t count, grad_type, exp_avg_type;
    double beta1, rest1, direction;
} Stretch;

INLINE int shorter(int64_t left) { return (int)(left < RUN ? left : RUN); }

INLINE const float *decoded(const char *source, int64_t type, int64_t start, int length, float *value) {
    if (type == FLOAT32) return (const float *)source + start;
    for (int i = 0; i < length; i++) value[i] = number((uint32_t)((const uint16_t *)source)[start + i] << 16);
    return value;
}

/* Into the second-level cache, past the limit on misses of the first: gradients are cold when backward ends. */
INLINE void prefetch_second_level(const float *source, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += CACHE_LINE_BYTES) __builtin_prefetch((const char *)source + i, 0, 2);
}

INLINE float sign_of(float value) { return (float)((value > 0) - (value < 0)); }

static double exact_squares(const float *source, int count) {
    double total = 0;
    for (int i = 0; i < count; i++) total += (double)source[i] * source[i];
    return total;
}

CLONES static double squares(const float *source, int64_t count) {
    double total = 0;
    for (int64_t start = 0; start < count; start += RUN) {
        const float *run = source + start;
        int length = shorter(count - start);
        float sum = 0;
        if (start + FETCHED < count) prefetch_second_level(run + FETCHED, sizeof(float) * RUN);
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < length; i++) sum += run[i] * run[i];
        /* Squares that leave float's range, or lose themselves at its lower end. */
        total += sum > 1e-30f && sum < 1e30f ? sum : exact_squares(run, length);
    }
    return total;
}

/* Sum of squares of float32 arrays. */
double lion_square_sum(const float *const *arrays, const int64_t *counts, int64_t count) {
    double total = 0;
    for (int64_t i = 0; i < count; i++) total += squares(arrays[i], counts[i]);
    return total;
}

INLINE void measure_run(const Stretch *at, int64_t start, float *restrict signs, double *sums) {
    float beta1 = (float)at->beta1, rest1 = (float)at->rest1, direction = (float)at->direction, values[2][RUN];
    float agree = 0, both = 0, projection = 0, moved = 0, grad_squares = 0, alive = 0;
    int length = shorter(at->count - start);
    const float *restrict grads = decoded(at->grad, at->grad_type, start, length, values[0]);
    const float *restrict momenta = decoded(at->exp_avg, at->exp_avg_type, start, length, values[1]);
#pragma omp simd reduction(+ : agree, both, projection, moved, grad_squares, alive)
    for (int i = 0; i < length; i++) {
        float grad = direction * grads[i], sign = sign_of(momenta[i] * beta1 + grad * rest1);
        float square = sign * sign, product = sign * signs[i], gradient_sign = sign_of(grad);
        signs[i] = sign;
        agree += product;
        both += product * product;
        projection += sign * grad;
        moved += square;
        grad_squares += grad * grad;
        alive += square * gradient_sign * gradient_sign;
    }
    sums[FLIPS] += (both - agree) / 2, sums[SIGNS] += both, sums[PROJECTION] += projection;
    sums[UPDATE_SQUARES] += moved, sums[GRAD_SQUARES] += grad_squares, sums[DEAD] += moved - alive;
}

CLONES static void measure(const Stretch *at, float *signs, double *sums) {
    for (int64_t start = 0; start < at->count; start += RUN) measure_run(at, start, signs + start, sums);
}

/* Adds to `sums`, and puts the signs of the coming update in the place of those of the one before: those of one stretch
   after those of another. */
void lion_measure(const Stretch *stretches, int64_t count, float *signs, double *sums) {
    for (const Stretch *at = stretches; at < stretches + count; signs += at->count, at++) {
        if (!at->grad) memset(signs, 0, sizeof(float) * (size_t)at->count);
        else measure(at, signs, sums);
    }
}

/* A stretch of one task's elements: must match Survey in measures.py field for field. */
typedef struct {
    int64_t task, start, count;
} Place;

INLINE int64_t bytes_of(int64_t type) { return type == FLOAT32 ? 4 : 2; }

INLINE Stretch stretch_at(const Task *task, const Place *place) {
    return (Stretch){
        .grad = task->grad + place->start * bytes_of(task->grad_type),
        .exp_avg = task->exp_avg + place->start * bytes_of(task->exp_avg_type),
        .count = place->count,
        .grad_type = task->grad_type,
        .exp_avg_type = task->exp_avg_type,
        .beta1 = task->beta1,
        .rest1 = task->rest1,
        .direction = task->grad_scale < 0 ? -1 : 1,
    };
}

static int is_surveyable(const Task *tasks, int64_t count, const Place *places, int64_t place_count) {
    int64_t elements = 0;
    for (const Place *at = places; at < places + place_count; at++)
        if (at->task >= count || at->start + at->count > tasks[at->task].count) return 0;
    for (const Task *task = tasks; task < tasks + count; task++) {
        int momentum = task->exp_avg_type == FLOAT32 || task->exp_avg_type == BFLOAT16;
        elements += task->count;
        if (task->grad_type != FLOAT32 || !momentum || elements > SURVEYED) return 0;
    }
    return 1;
}

/* Before the tasks are done: the sum of squares of their gradients, then what lion_measure sums up over the places.
   Returns 0, and has done nothing, where they are more than one thread should read, not of these types, or shorter. */
int64_t lion_survey(const Task *tasks, int64_t count, const Place *places, int64_t place_count, float *signs,
                    double *sums) {
    if (!is_surveyable(tasks, count, places, place_count)) return 0;
    memset(sums, 0, sizeof(double) * (1 + MEASURES));
    for (int64_t i = 0; i < count; i++) sums[0] += squares((const float *)tasks[i].grad, tasks[i].count);
    for (const Place *place = places; place < places + place_count; signs += place->count, place++) {
        Stretch stretch = stretch_at(tasks + place->task, place);
        measure(&stretch, signs, sums + 1);
    }
    return 1;
}
