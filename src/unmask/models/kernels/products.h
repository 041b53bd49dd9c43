/* Products with weights in panels, for each kind of weights. */

/* What the kinds differ in: a key or value, a row of activations as a product takes it, and the products themselves. */
#if HALF
#define STEP 2
#define product_cell product_bf16
typedef bf16 cell;
INLINE float value(cell x) { return wide(x); }
INLINE cell keep(float x) { return narrow(x); }
INLINE vf load16(const cell *x) { return wide16(x); }
#else
#define STEP 1
#define product_cell product_f32
typedef float cell;
INLINE float value(cell x) { return x; }
INLINE cell keep(float x) { return x; }
INLINE vf load16(const cell *x) { return *(const vf *)x; }
#endif
#if KIND == 0
#define product_input product_f32
typedef float input;
#elif KIND == 1
#define product_input product_bf16
typedef bf16 input;
#else
typedef uint8_t input;
#endif

/* ---- products: c [m, n] = or += a [m, k] b, b in panels ---- */

typedef struct {
    const void *data;
    const float *scale; /* int8: a factor for each output */
    const float *offset; /* int8: 128 times the sum of each output's weights */
    const float *bias;
    long n, k;
} Packed;

INLINE void leave(float *c, vf low, vf high, long columns, int add) {
    if (columns >= PANEL) {
        vf *to = (vf *)c;
        if (add) low += to[0], high += to[1];
        to[0] = low, to[1] = high;
        return;
    }
    float both[PANEL];
    ((vf *)both)[0] = low, ((vf *)both)[1] = high;
    for (long j = 0; j < columns; j++) c[j] = add ? c[j] + both[j] : both[j];
}

INLINE void tile_f32(const int m, const float *a, long lda, const float *b, long k, float *c, long ldc, long n, int add) {
    vf s[TILE][2] = {0};
    for (long j = 0; j < k; j++, b += PANEL) {
        vf low = ((const vf *)b)[0], high = ((const vf *)b)[1];
        for (int i = 0; i < m; i++) {
            vf x = splat(a[i * lda + j]);
            s[i][0] += x * low, s[i][1] += x * high;
        }
    }
    for (int i = 0; i < m; i++) leave(c + i * ldc, s[i][0], s[i][1], n, add);
}

INLINE void tile_bf16(const int m, const bf16 *a, long lda, const bf16 *b, long k, float *c, long ldc, long n, int add) {
#if defined(__AVX512BF16__)
    __m512 s[TILE][2];
    for (int i = 0; i < m; i++) s[i][0] = s[i][1] = _mm512_setzero_ps();
    for (long j = 0; j < k; j += 2, b += 2 * PANEL) {
        __m512bh low = (__m512bh)_mm512_loadu_si512(b), high = (__m512bh)_mm512_loadu_si512(b + PANEL);
        for (int i = 0; i < m; i++) {
            int32_t pair;
            memcpy(&pair, a + i * lda + j, 4);
            __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
            s[i][0] = _mm512_dpbf16_ps(s[i][0], x, low), s[i][1] = _mm512_dpbf16_ps(s[i][1], x, high);
        }
    }
#else
    vf s[TILE][2] = {0};
    for (long j = 0; j < k; j += 2, b += 2 * PANEL) {
        vu low = ((const vu *)b)[0], high = ((const vu *)b)[1];
        vf even0 = (vf)(low << 16), odd0 = (vf)(low & 0xffff0000u);
        vf even1 = (vf)(high << 16), odd1 = (vf)(high & 0xffff0000u);
        for (int i = 0; i < m; i++) {
            vf even = splat(wide(a[i * lda + j])), odd = splat(wide(a[i * lda + j + 1]));
            s[i][0] += even * even0 + odd * odd0, s[i][1] += even * even1 + odd * odd1;
        }
    }
#endif
    for (int i = 0; i < m; i++) leave(c + i * ldc, (vf)s[i][0], (vf)s[i][1], n, add);
}

#define EACH(m, call) \
    switch (m) { \
    case 1: { enum { M = 1 }; call; break; } case 2: { enum { M = 2 }; call; break; } \
    case 3: { enum { M = 3 }; call; break; } case 4: { enum { M = 4 }; call; break; } \
    case 5: { enum { M = 5 }; call; break; } case 6: { enum { M = 6 }; call; break; } \
    case 7: { enum { M = 7 }; call; break; } default: { enum { M = 8 }; call; } }

#define PRODUCT(name, type, tile) \
    __attribute__((unused)) static void name(const type *a, long lda, long m, const type *b, long k, float *c, long ldc, long n, int add) { \
        for (long p = 0; p < n; p += PANEL, b += PANEL * k) \
            for (long i = 0; i < m; i += TILE) \
                EACH(m - i, tile(M, a + i * lda, lda, b, k, c + i * ldc + p, ldc, n - p, add)) \
    }
PRODUCT(product_f32, float, tile_f32)
PRODUCT(product_bf16, bf16, tile_bf16)

#if KIND == 2
INLINE void tile_int8(const int m, const uint8_t *a, long lda, const int8_t *b, long k, vi s[TILE][2]) {
#if defined(__AVX512VNNI__)
    __m512i t[TILE][2];
    for (int i = 0; i < m; i++) t[i][0] = t[i][1] = _mm512_setzero_si512();
    for (long j = 0; j < k; j += 4, b += 4 * PANEL) {
        __m512i low = _mm512_loadu_si512(b), high = _mm512_loadu_si512(b + 2 * PANEL);
        for (int i = 0; i < m; i++) {
            int32_t four;
            memcpy(&four, a + i * lda + j, 4);
            __m512i x = _mm512_set1_epi32(four);
            t[i][0] = _mm512_dpbusd_epi32(t[i][0], x, low), t[i][1] = _mm512_dpbusd_epi32(t[i][1], x, high);
        }
    }
    for (int i = 0; i < m; i++) s[i][0] = (vi)t[i][0], s[i][1] = (vi)t[i][1];
#else
    int32_t t[TILE][PANEL] = {{0}};
    for (long j = 0; j < k; j += 4, b += 4 * PANEL)
        for (int i = 0; i < m; i++)
            for (int o = 0; o < PANEL; o++)
                for (int q = 0; q < 4; q++) t[i][o] += a[i * lda + j + q] * b[o * 4 + q];
    memcpy(s, t, m * sizeof t[0]);
#endif
}

INLINE void panel_int8(const int m, const uint8_t *a, const float *scale, const Packed *w, long p, float *c, int add) {
    vi s[TILE][2];
    tile_int8(m, a, w->k, (const int8_t *)w->data + p * w->k, w->k, s);
    vf f0 = *(const vf *)(w->scale + p), f1 = *(const vf *)(w->scale + p + 16);
    vf o0 = *(const vf *)(w->offset + p), o1 = *(const vf *)(w->offset + p + 16);
    for (int i = 0; i < m; i++) {
        vf low = (__builtin_convertvector(s[i][0], vf) - o0) * f0 * scale[i];
        vf high = (__builtin_convertvector(s[i][1], vf) - o1) * f1 * scale[i];
        leave(c + i * w->n, low, high, w->n - p, add);
    }
}
#endif

/* c [m, n] = or += a w + bias, over the panels of the weights in parallel. */
static void apply(const Packed *w, const input *a, const float *scale, long m, float *c, int add, int threads) {
    (void)scale;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long p = 0; p < w->n; p += PANEL) {
        for (long i = 0; i < m; i += TILE) {
#if KIND == 2
            EACH(m - i, panel_int8(M, a + i * w->k, scale + i, w, p, c + i * w->n + p, add))
#else
            long rows = m - i < TILE ? m - i : TILE, left = w->n - p < PANEL ? w->n - p : PANEL;
            product_input(a + i * w->k, w->k, rows, (const input *)w->data + p * w->k, w->k, c + i * w->n + p, w->n, left, add);
#endif
        }
        long left = w->n - p < PANEL ? w->n - p : PANEL;
        if (w->bias)
            for (long i = 0; i < m; i++)
                for (long j = p; j < p + left; j++) c[i * w->n + j] += w->bias[j];
    }
}

/* A row of floats as a product takes it. */
INLINE void enter(const float *x, long n, input *y, float *scale) {
    (void)scale;
#if KIND == 0
    memcpy(y, x, n * sizeof *y);
#elif KIND == 1
    for (long j = 0; j < n; j++) y[j] = narrow(x[j]);
#else
    vf top = splat(1e-30f);
    long whole = n / 16 * 16;
    for (long j = 0; j < whole; j += 16) top = larger((vf)(*(const vi *)(x + j) & INT32_MAX), top);
    float most = most16(top);
    for (long j = whole; j < n; j++) most = fabsf(x[j]) > most ? fabsf(x[j]) : most;
    *scale = most / 127.f;
    float by = 127.f / most;
    for (long j = 0; j < n; j++) y[j] = (uint8_t)((int)(x[j] * by + 128.5f));
#endif
}
