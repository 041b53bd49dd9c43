/* Vectors of 16 floats, bfloat16, sums, and e^x: what all kernels count with. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define PANEL 32
#define TILE 8
#define QUERIES 64 /* rows of attention weights held at once */
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint16_t bf16;

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE float wide(bf16 x) { union { uint32_t u; float f; } v = {(uint32_t)x << 16}; return v.f; }
INLINE bf16 narrow(float x) {
    union { float f; uint32_t u; } v = {x};
    return (bf16)((v.u + 0x7fff + ((v.u >> 16) & 1)) >> 16);
}
INLINE vf wide16(const bf16 *x) { return (vf)(__builtin_convertvector(*(const vh *)x, vu) << 16); }

/* gcc 12 divides a vf number by number. */
INLINE vf over(vf x, vf y) {
#if defined(__AVX512F__)
    return (vf)_mm512_div_ps((__m512)x, (__m512)y);
#else
    return x / y;
#endif
}
INLINE float sum16(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sum = 0;
    for (int j = 0; j < 16; j++) sum += x[j];
    return sum;
#endif
}
INLINE float most16(vf x) {
    float most = x[0];
    for (int j = 1; j < 16; j++) most = x[j] > most ? x[j] : most;
    return most;
}
INLINE vf larger(vf x, vf y) {
    vi first = x > y;
    return (vf)(((vi)x & first) | ((vi)y & ~first));
}
INLINE float largest(const float *x, long n) {
    vf most = splat(-INFINITY);
    long whole = n / 16 * 16;
    for (long j = 0; j < whole; j += 16) most = larger(*(const vf *)(x + j), most);
    float found = most16(most);
    for (long j = whole; j < n; j++) found = x[j] > found ? x[j] : found;
    return found;
}

/* e^x within 2 units in the last place; 0 below -87, and no more than e^88. */
INLINE vf exp16(vf x) {
    vi low = x < splat(-87.f), high = x > splat(88.f);
    x = (vf)(((vi)x & ~(low | high)) | ((vi)splat(-87.f) & low) | ((vi)splat(88.f) & high));
    vf half = (vf)(((vi)x & INT32_MIN) | (vi)splat(.5f));
    vi whole = __builtin_convertvector(x * 1.44269504f + half, vi);
    vf n = __builtin_convertvector(whole, vf), f = x - n * 0.693145752f - n * 1.42860677e-6f;
    vf p = splat(1.f / 5040);
    p = p * f + 1.f / 720, p = p * f + 1.f / 120, p = p * f + 1.f / 24, p = p * f + 1.f / 6, p = p * f + .5f;
    p = (p * f + 1.f) * f + 1.f;
    vf scale = (vf)((whole + 127) << 23);
    return (vf)((vi)(p * scale) & ~low);
}

/* A buffer of the calling thread, that only grows and goes when the thread ends. */
enum { NORMED, WIDE, HIDDEN, QUERY, KEYS, VALUES, WEIGHTS, MIXED, SCALE, BUFFERS };
typedef struct { void *held[BUFFERS]; size_t size[BUFFERS]; } Buffers;
static pthread_key_t ending;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static void release(void *own) {
    for (int i = 0; i < BUFFERS; i++) free(((Buffers *)own)->held[i]);
    free(own);
}
static void begin(void) { pthread_key_create(&ending, release); }
static void *buffer(int which, size_t bytes) {
    static _Thread_local Buffers *own;
    if (!own) {
        pthread_once(&once, begin);
        if (!(own = calloc(1, sizeof *own))) return 0;
        pthread_setspecific(ending, own);
    }
    if (own->size[which] < bytes || !own->held[which]) {
        free(own->held[which]);
        own->size[which] = (bytes + 4096) / 4096 * 4096;
        own->held[which] = aligned_alloc(64, own->size[which]);
        if (!own->held[which]) own->size[which] = 0;
    }
    return own->held[which];
}
