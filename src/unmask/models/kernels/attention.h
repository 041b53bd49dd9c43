/* Rotary embedding, the K/V store, and attention over it. */

typedef struct {
    long width, heads, kv_heads, head, half, ff, positions, threads; /* half: half of a head's rotated dimensions */
    float eps;
    const float *cos, *sin; /* [positions, half] */
} Shape;

typedef struct {
    const float *attn_norm, *mlp_norm, *q_norm, *k_norm; /* the last two may be null */
    Packed qkv, out, gate_up, down;
} Layer;

typedef struct {
    long rows, tokens;
    const int64_t *start;    /* [rows + 1]: the first token of each row */
    const int64_t *position; /* [tokens] */
    const int64_t *place;    /* [tokens]: where a token's key and value go, in cells of the row's head */
    const int64_t *base;     /* [rows]: offset of the row's first key, in numbers */
    const int64_t *length;   /* [rows]: keys that may be seen */
    const int64_t *group_at; /* [rows]: where the groups of the row's keys begin */
    long head_stride, cell_stride;
    long numbers, cells; /* of a layer's keys, and of a row of them */
    const int32_t *query_group, *key_group; /* null: every query sees every key */
} Pass;

/* Is every position, place and row where there is something? */
static int fits(const Shape *s, const Pass *p) {
    for (long t = 0; t < p->tokens; t++)
        if (p->position[t] < 0 || p->position[t] >= s->positions || p->place[t] < 0 || p->place[t] >= p->cells) return 0;
    for (long r = 0; r < p->rows; r++)
        if (p->base[r] < 0 || p->base[r] >= p->numbers || p->length[r] > p->cells) return 0;
    return 1;
}

/* Norm, rotation: a head in place. */
INLINE void turn(const Shape *s, float *x, const float *weight, long position) {
    if (weight) {
        float by = root(x, s->head, s->eps);
        for (long j = 0; j < s->head; j++) x[j] *= by * weight[j];
    }
    const float *restrict c = s->cos + position * s->half, *restrict d = s->sin + position * s->half;
    float *restrict y = x + s->half;
    for (long j = 0; j < s->half; j++) {
        float a = x[j], b = y[j];
        x[j] = a * c[j] - b * d[j], y[j] = b * c[j] + a * d[j];
    }
}

static void store(const Shape *s, const Layer *w, const Pass *p, float *qkv, cell *keys, cell *values) {
    long all = s->heads + 2 * s->kv_heads;
    for (long r = 0; r < p->rows; r++)
        for (long t = p->start[r]; t < p->start[r + 1]; t++) {
            float *x = qkv + t * all * s->head;
            for (long h = 0; h < s->heads; h++) turn(s, x + h * s->head, w->q_norm, p->position[t]);
            for (long h = 0; h < s->kv_heads; h++) {
                float *k = x + (s->heads + h) * s->head, *v = k + s->kv_heads * s->head;
                long to = p->base[r] + h * p->head_stride + p->place[t] * p->cell_stride;
                turn(s, k, w->k_norm, p->position[t]);
                for (long j = 0; j < s->head; j++) keys[to + j] = keep(k[j]), values[to + j] = keep(v[j]);
            }
        }
}

/* Scores of one query [keys] to weights that are not yet divided by their sum, which is returned. */
INLINE float softmax(float *x, long n, float by, const int32_t *key, int32_t query) {
    long padded = (n + 15) / 16 * 16;
    if (key)
        for (long j = 0; j < n; j++) x[j] = key[j] > query ? -INFINITY : x[j];
    for (long j = n; j < padded; j++) x[j] = -INFINITY;
    float most = largest(x, padded);
    if (most == -INFINITY) {
        memset(x, 0, padded * sizeof *x);
        return 1.f;
    }
    vf sums = {0};
    for (long j = 0; j < padded; j += 16) {
        vf e = exp16((*(vf *)(x + j) - most) * by);
        *(vf *)(x + j) = e, sums += e;
    }
    return sum16(sums);
}

/* A few queries over their keys as they lie in the cache. */
static int direct(const Shape *s, const float *q, const cell *keys, const cell *values, long stride, long n,
                   const int32_t *key, int32_t query, float *out) {
    long head = s->head;
    float *x = buffer(WEIGHTS, (n + 16) * sizeof *x);
    if (!x) return -1;
    for (long j = 0; j < n; j++) {
        x[j] = dot_cells(q, keys + j * stride, head);
    }
    float by = 1.f / softmax(x, n, 1.f / sqrtf(head), key, query);
    memset(out, 0, head * sizeof *out);
    for (long j = 0; j < n; j++) {
        const cell *v = values + j * stride;
        for (long i = 0; i < head; i++) out[i] += x[j] * value(v[i]);
    }
    for (long i = 0; i < head; i++) out[i] *= by;
    return 0;
}

/* Keys [n, head] and values as the panels of two products: [keys / 32][head / STEP][32][STEP] and its transpose. */
static void pack_keys(const cell *keys, long stride, long n, long head, cell *k) {
    for (long p = 0; p < n; p += PANEL)
        for (long o = 0; o < PANEL; o++) {
            cell *to = k + p * head + o * STEP;
            if (p + o < n)
                for (long j = 0; j < head; j += STEP) memcpy(to + j * PANEL, keys + (p + o) * stride + j, STEP * sizeof *to);
            else
                for (long j = 0; j < head; j += STEP) memset(to + j * PANEL, 0, STEP * sizeof *to);
        }
}

static void pack_values(const cell *values, long stride, long n, long head, cell *v) {
    static const cell none[4096];
    long rows = (n + 1) / 2 * 2;
    for (long p = 0; p < head; p += PANEL, v += PANEL * rows) {
        long width = head - p < PANEL ? head - p : PANEL;
        if (width < PANEL) memset(v, 0, PANEL * rows * sizeof *v);
        for (long j = 0; j < rows; j += STEP) {
#if STEP == 2
            const cell *even = values + j * stride + p, *odd = j + 1 < n ? even + stride : none;
            uint32_t *to = (uint32_t *)(v + j * PANEL);
            for (long o = 0; o < width; o++) to[o] = even[o] | (uint32_t)odd[o] << 16;
#else
            memcpy(v + j * PANEL, j < n ? values + j * stride + p : none, width * sizeof *v);
#endif
        }
    }
}

/* Many queries over one head's keys: two products with the softmax between them, QUERIES rows at a time. */
static int packed(const Shape *s, const Pass *p, long row, const float *qkv, const cell *keys, const cell *values,
                   long h, float *out) {
    long n = p->length[row], head = s->head, group = s->heads / s->kv_heads, all = s->heads + 2 * s->kv_heads;
    long from = p->start[row], count = (p->start[row + 1] - from) * group, even = (n + 1) / 2 * 2, ld = (n + 31) / 32 * 32;
    cell *k = buffer(KEYS, ld * head * sizeof *k), *v = buffer(VALUES, even * (head + PANEL) * sizeof *v);
    cell *q = buffer(QUERY, QUERIES * (ld + head) * sizeof *q), *w = q + QUERIES * head;
    float *x = buffer(WEIGHTS, QUERIES * (ld + head) * sizeof *x), *y = x + QUERIES * ld, sum[QUERIES];
    if (!k || !v || !q || !x) return -1;
    const int32_t *key = p->key_group ? p->key_group + p->group_at[row] : 0;
    pack_keys(keys, p->cell_stride, n, head, k);
    pack_values(values, p->cell_stride, n, head, v);
    for (long first = 0; first < count; first += QUERIES) {
        long m = count - first < QUERIES ? count - first : QUERIES;
        for (long i = 0; i < m; i++) {
            long t = from + (first + i) / group, own = h * group + (first + i) % group;
            for (long j = 0; j < head; j++) q[i * head + j] = keep(qkv[(t * all + own) * head + j]);
        }
        product_cell(q, head, m, k, head, x, ld, n, 0);
        for (long i = 0; i < m; i++) {
            sum[i] = softmax(x + i * ld, n, 1.f / sqrtf(head), key, key ? p->query_group[from + (first + i) / group] : 0);
            for (long j = 0; j < n; j++) w[i * ld + j] = keep(x[i * ld + j]);
            if (n < even) w[i * ld + n] = 0;
        }
        product_cell(w, ld, m, v, even, y, head, head, 0);
        for (long i = 0; i < m; i++) {
            long t = from + (first + i) / group, own = h * group + (first + i) % group;
            for (long j = 0; j < head; j++) out[(t * s->heads + own) * head + j] = y[i * head + j] / sum[i];
        }
    }
    return 0;
}

static int attend(const Shape *s, const Pass *p, const float *qkv, const cell *keys, const cell *values, float *out) {
    long group = s->heads / s->kv_heads, all = s->heads + 2 * s->kv_heads;
    int failed = 0;
#pragma omp parallel for num_threads(s->threads) if (s->threads > 1) schedule(dynamic) reduction(| : failed)
    for (long job = 0; job < p->rows * s->kv_heads; job++) {
        long row = job / s->kv_heads, h = job % s->kv_heads, from = p->start[row], to = p->start[row + 1];
        const cell *k = keys + p->base[row] + h * p->head_stride, *v = values + p->base[row] + h * p->head_stride;
        if ((to - from) * group >= 4 && s->head % 2 == 0) {
            failed |= packed(s, p, row, qkv, k, v, h, out);
            continue;
        }
        const int32_t *key = p->key_group ? p->key_group + p->group_at[row] : 0;
        for (long t = from; t < to; t++)
            for (long g = h * group; g < (h + 1) * group; g++)
                failed |= direct(s, qkv + (t * all + g) * s->head, k, v, p->cell_stride, p->length[row], key,
                       key ? p->query_group[t] : 0, out + (t * s->heads + g) * s->head);
    }
    return failed;
}
