/* One transformer block for the CPU: prepacked products, norms, rotary embedding, K/V store, attention, SwiGLU.

   Compiled by `native.py` for the machine at hand, once for each kind of weights, KIND 0 float, 1 bfloat16, 2 int8, and of
   keys and values, HALF 0 float, 1 bfloat16.
   The residual stream is float; products take bfloat16 or int8 rows where the weights are such, and sum in float or
   int32. Weights are stored in panels of 32 outputs, [outputs / 32][inputs / STEP][32][STEP], so that a tile of 8 rows
   and one panel lives in registers. */

#include "numbers.h"
#include "products.h"

INLINE float dot(const float *x, const float *y, long n) {
    vf sums = {0};
    long whole = n / 16 * 16;
    for (long j = 0; j < whole; j += 16) sums += *(const vf *)(x + j) * *(const vf *)(y + j);
    float sum = sum16(sums);
    for (long j = whole; j < n; j++) sum += x[j] * y[j];
    return sum;
}

INLINE float dot_cells(const float *x, const cell *y, long n) {
    vf sums = {0};
    long whole = n / 16 * 16;
    for (long j = 0; j < whole; j += 16) sums += *(const vf *)(x + j) * load16(y + j);
    float sum = sum16(sums);
    for (long j = whole; j < n; j++) sum += x[j] * value(y[j]);
    return sum;
}

INLINE float root(const float *x, long n, float eps) {
    return 1.f / sqrtf(dot(x, x, n) / n + eps);
}

static void norm_rows(const float *x, const float *weight, float eps, long m, long n, input *y, float *scale) {
    float *restrict row = buffer(MIXED, n * sizeof *row);
    for (long i = 0; i < m; i++, x += n) {
        float by = root(x, n, eps);
        for (long j = 0; j < n; j++) row[j] = x[j] * by * weight[j];
        enter(row, n, y + i * n, scale + i);
    }
}

static void gated_rows(const float *x, long m, long n, input *y, float *scale) {
    float *row = buffer(MIXED, (n + 16) * sizeof *row);
    for (long i = 0; i < m; i++, x += 2 * n) {
        for (long j = 0; j + 16 <= n; j += 16) {
            vf gate = *(const vf *)(x + j), up = *(const vf *)(x + n + j);
            *(vf *)(row + j) = over(gate * up, 1.f + exp16(-gate));
        }
        for (long j = n / 16 * 16; j < n; j++) row[j] = x[j] * x[n + j] / (1.f + expf(-x[j]));
        enter(row, n, y + i * n, scale + i);
    }
}

#include "attention.h"

/* ---- what is called from outside; 0, or -1 where memory is short, -2 for a position that is none ---- */

static int block(const Shape *s, const Layer *w, const Pass *p, float *x, cell *keys, cell *values) {
    long m = p->tokens, d = s->width, all = (s->heads + 2 * s->kv_heads) * s->head, inner = s->heads * s->head;
    long most = all > 2 * s->ff ? all : 2 * s->ff, in = d > s->ff ? d : s->ff;
    in = in > inner ? in : inner;
    float *scale = buffer(SCALE, m * sizeof *scale), *y = buffer(WIDE, m * most * sizeof *y);
    float *mixed = buffer(HIDDEN, m * inner * sizeof *mixed);
    input *a = buffer(NORMED, m * in * sizeof *a);
    float *row = buffer(MIXED, ((d > s->ff ? d : s->ff) + 16) * sizeof *row); /* of norms and gates, who find it there */
    if (!scale || !y || !a || !mixed || !row) return -1;
    norm_rows(x, w->attn_norm, s->eps, m, d, a, scale);
    apply(&w->qkv, a, scale, m, y, 0, s->threads);
    store(s, w, p, y, keys, values);
    if (attend(s, p, y, keys, values, mixed)) return -1;
    for (long i = 0; i < m; i++) enter(mixed + i * inner, inner, a + i * inner, scale + i);
    apply(&w->out, a, scale, m, x, 1, s->threads);
    norm_rows(x, w->mlp_norm, s->eps, m, d, a, scale);
    apply(&w->gate_up, a, scale, m, y, 0, s->threads);
    gated_rows(y, m, s->ff, a, scale);
    apply(&w->down, a, scale, m, x, 1, s->threads);
    return 0;
}

/* x [tokens, width] through all blocks; keys and values of a layer lie `stride` numbers behind those of the one before. */
int blocks(const Shape *s, const Layer *w, long layers, const Pass *p, float *x, cell *keys, cell *values, long stride) {
    if (!fits(s, p)) return -2;
    for (long i = 0; i < layers; i++)
        if (block(s, w + i, p, x, keys + i * stride, values + i * stride)) return -1;
    return 0;
}

/* y [m, n] = x [m, k] w + bias. */
int linear(const Packed *w, const float *x, long m, float *y, int threads) {
    float *scale = buffer(SCALE, m * sizeof *scale);
    input *a = buffer(NORMED, m * w->k * sizeof *a);
    if (!scale || !a) return -1;
    for (long i = 0; i < m; i++) enter(x + i * w->k, w->k, a + i * w->k, scale + i);
    apply(w, a, scale, m, y, 0, threads);
    return 0;
}

void norm(const float *x, const float *weight, float eps, long m, long n, float *y) {
    for (long i = 0; i < m; i++, x += n, y += n) {
        float by = root(x, n, eps);
        for (long j = 0; j < n; j++) y[j] = x[j] * by * weight[j];
    }
}

/* The likeliest token of each row of logits [m, n] and its probability, in one pass over memory and one over cache. */
void top(const float *x, long m, long n, int64_t *token, float *probability) {
    for (long i = 0; i < m; i++, x += n) {
        float most = largest(x, n), sum;
        long at = 0;
        while (at < n - 1 && x[at] != most) at++;
        vf sums = {0};
        for (long j = 0; j + 16 <= n; j += 16) sums += exp16(*(const vf *)(x + j) - most);
        sum = sum16(sums);
        for (long j = n / 16 * 16; j < n; j++) sum += expf(x[j] - most);
        token[i] = at, probability[i] = 1.f / sum;
    }
}
