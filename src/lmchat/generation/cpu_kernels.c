// Kernels of a decode step in fp32: sums of the residual stream, and attention of one new token per row.
//
// A row's result does not depend on other rows, on the number of threads, or on whether its prompt is shared: each row
// is computed by one thread, in the order of its tokens.

#include <math.h>
#include <stdint.h>
#include <string.h>

#define TOGETHER 4  // tokens that are read together

// exp(x) for x <= 0 with a relative error of 2.4e-7, down to -87: 2^n · exp(r) with |r| <= ln(2) / 2.
static inline float exp_negative(float x) {
    const float shift = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
    x = x < -87.0f ? -87.0f : x;
    const float n = (x * 1.44269504f + shift) - shift, r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = r * 1.38888889e-3f + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    union {
        float value;
        int32_t bits;
    } power = {.bits = ((int32_t)n + 127) << 23};
    return p * power.value;
}

static inline float inverse_rms(const float *x, int64_t width, float eps) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; i++) squares += x[i] * x[i];
    return 1 / sqrtf(squares / width + eps);
}

// total = factor · x + added_factor · added, and its norm; (rows, width) each.
void add_and_norm(int64_t rows, int64_t width, float eps, const float *x, const float *added, float factor,
                  float added_factor, float *total, float *normed, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > 16384)
    for (int64_t at = 0; at < rows * width; at += width) {
        for (int64_t i = at; i < at + width; i++) total[i] = factor * x[i] + added_factor * added[i];
        const float scale = inverse_rms(total + at, width, eps);
        for (int64_t i = at; i < at + width; i++) normed[i] = total[i] * scale;
    }
}

// Keys and values of consecutive tokens.
typedef struct {
    const float *keys, *values;
    int64_t count;
} Segment;

// Slots of a layer, (slots, kv heads, columns, head_dim); token i of a slot is in column i mod columns.
typedef struct {
    float *keys, *values;
    int64_t columns;
} Slots;

typedef struct {
    int64_t rows, heads, kv_heads, head_dim, window;
    int64_t stride;                // floats per row of projected
    float eps;                     // of the norm of queries and keys
    const float *projected;        // queries, keys, values and, with value embeddings, gates
    const float *value_embedding;  // (rows, kv heads · head_dim) or NULL
    const float *cos, *sin;        // (rows, head_dim / 2)
    const int64_t *positions;      // (rows,)
    const int64_t *bases;          // (rows,) tokens of the shared prompt
    const int64_t *prompt_slots;   // (rows,) slot of the shared prompt, or NULL
    const int64_t *order;          // (rows,) rows that share a prompt together, or NULL
    Slots own, prompts;
    float *out;                    // (rows, heads, head_dim)
} Step;

// The norm of x after rotation, see `lmchat.model.gpt.rotate`, times scale.
static void rotate_and_norm(const Step *step, int64_t row, const float *x, float scale, float *out) {
    const int64_t half = step->head_dim / 2;
    const float *cos = step->cos + row * half, *sin = step->sin + row * half;
    for (int64_t i = 0; i < half; i++) {
        out[i] = x[i] * cos[i] + x[half + i] * sin[i];
        out[half + i] = x[half + i] * cos[i] - x[i] * sin[i];
    }
    scale *= inverse_rms(out, 2 * half, step->eps);
    for (int64_t i = 0; i < 2 * half; i++) out[i] *= scale;
}

// Stores the key and value of the new token of a row and kv head.
static void append(const Step *step, int64_t row, int64_t kv_head) {
    const int64_t dim = step->head_dim, kv_width = step->kv_heads * dim;
    const int64_t own = step->positions[row] - step->bases[row];
    const int64_t at = ((row * step->kv_heads + kv_head) * step->own.columns + own % step->own.columns) * dim;
    const float *projected = step->projected + row * step->stride + step->heads * dim;
    rotate_and_norm(step, row, projected + kv_head * dim, 1, step->own.keys + at);
    const float *value = projected + kv_width + kv_head * dim;
    memcpy(step->own.values + at, value, dim * sizeof(float));
    if (step->value_embedding) {
        const float gate = 2 / (1 + expf(-projected[2 * kv_width + kv_head]));
        const float *embedding = step->value_embedding + row * kv_width + kv_head * dim;
        for (int64_t i = 0; i < dim; i++) step->own.values[at + i] += gate * embedding[i];
    }
}

// Adds tokens first..end - 1 of a slot and head to the segments, which are two where the ring begins anew.
static Segment *add_tokens(Segment *next, const Slots *slots, int64_t place, int64_t dim, int64_t first, int64_t end) {
    while (first < end) {
        const int64_t column = first % slots->columns, left = slots->columns - column;
        const int64_t count = end - first < left ? end - first : left;
        const int64_t at = (place * slots->columns + column) * dim;
        *next++ = (Segment){slots->keys + at, slots->values + at, count};
        first += count;
    }
    return next;
}

static inline int64_t token(const Segment *segment, int64_t t) { return t < segment->count ? t : segment->count - 1; }

static void dot_products(const float *query, const Segment *segment, int64_t dim, float *out) {
    for (int64_t t = 0; t < segment->count; t += TOGETHER) {
        const float *k[TOGETHER];
        for (int i = 0; i < TOGETHER; i++) k[i] = segment->keys + token(segment, t + i) * dim;
        float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
        for (int64_t i = 0; i < dim; i++) {
            a += query[i] * k[0][i];
            b += query[i] * k[1][i];
            c += query[i] * k[2][i];
            d += query[i] * k[3][i];
        }
        out[t] = a, out[t + 1] = b, out[t + 2] = c, out[t + 3] = d;
    }
}

// Replaces scores by weights that are not divided by their sum, which is returned.
static float softmax(float *scores, int64_t count) {
    float largest = scores[0], total = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t t = 0; t < count; t++) largest = scores[t] > largest ? scores[t] : largest;
#pragma omp simd reduction(+ : total)
    for (int64_t t = 0; t < count; t++) total += scores[t] = exp_negative(scores[t] - largest);
    return total;
}

static void add_values(const float *weights, const Segment *segment, int64_t dim, float *out) {
    for (int64_t t = 0; t < segment->count; t += TOGETHER) {
        const float *v[TOGETHER];
        float w[TOGETHER];
        for (int i = 0; i < TOGETHER; i++) {
            v[i] = segment->values + token(segment, t + i) * dim;
            w[i] = t + i < segment->count ? weights[t + i] : 0;
        }
        for (int64_t i = 0; i < dim; i++)
            out[i] = out[i] + w[0] * v[0][i] + w[1] * v[1][i] + w[2] * v[2][i] + w[3] * v[3][i];
    }
}

static void attend_row(const Step *step, int64_t row, int64_t kv_head) {
    const int64_t dim = step->head_dim, per_head = step->heads / step->kv_heads;
    const int64_t position = step->positions[row], base = step->bases[row];
    const int64_t first = position > step->window ? position - step->window : 0;
    Segment segments[4], *end = segments;
    if (first < base)
        end = add_tokens(end, &step->prompts, step->prompt_slots[row] * step->kv_heads + kv_head, dim, first, base);
    end = add_tokens(end, &step->own, row * step->kv_heads + kv_head, dim, first > base ? first - base : 0,
                     position - base + 1);
    float query[dim], sums[dim], weights[position - first + 1 + TOGETHER];
    for (int64_t head = kv_head * per_head; head < (kv_head + 1) * per_head; head++) {
        rotate_and_norm(step, row, step->projected + row * step->stride + head * dim, 1 / sqrtf(dim), query);
        int64_t count = 0;
        for (const Segment *segment = segments; segment < end; count += segment++->count)
            dot_products(query, segment, dim, weights + count);
        const float scale = 1 / softmax(weights, count);
        memset(sums, 0, sizeof sums);
        count = 0;
        for (const Segment *segment = segments; segment < end; count += segment++->count)
            add_values(weights + count, segment, dim, sums);
        float *out = step->out + (row * step->heads + head) * dim;
        for (int64_t i = 0; i < dim; i++) out[i] = sums[i] * scale;
    }
}

// Stores keys and values of one new token per row, and attends to all tokens that it sees.
void attend(const Step *step, int threads) {
    const int64_t rows = step->rows;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < rows * step->kv_heads; task++) {
        const int64_t row = step->order ? step->order[task % rows] : task % rows;
        append(step, row, task / rows);
        attend_row(step, row, task / rows);
    }
}
