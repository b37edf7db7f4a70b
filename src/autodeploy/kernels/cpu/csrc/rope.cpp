// Rotary position embedding of queries and keys, half-split layout, in float32.

#include "simd.h"
#include "team.h"

namespace autodeploy {
namespace {

template <class T>
void rotate(const T* x, const T* cos, const T* sin, T* out, int64_t width, int64_t rotary) {
    const int64_t half = rotary / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        const int64_t count = half - i;
        const Floats first = load(x + i, count), second = load(x + half + i, count);
        store(out + i, first * load(cos + i, count) - second * load(sin + i, count), count);
        store(out + half + i, second * load(cos + half + i, count) + first * load(sin + half + i, count), count);
    }
    std::memcpy(out + rotary, x + rotary, static_cast<size_t>(width - rotary) * sizeof(T));
}

template <class T>
void rope(const T* query, int64_t query_token_stride, int64_t query_head_stride, T* query_out, int64_t num_heads,
          const T* key, int64_t key_token_stride, int64_t key_head_stride, T* key_out, int64_t num_kv_heads,
          const T* cos, const T* sin, int64_t num_tokens, int64_t width, int64_t rotary) {
#pragma omp for schedule(static)
    for (int64_t token = 0; token < num_tokens; ++token) {
        const T *c = cos + token * rotary, *s = sin + token * rotary;
        for (int64_t head = 0; head < num_heads; ++head)
            rotate(query + token * query_token_stride + head * query_head_stride, c, s,
                   query_out + (token * num_heads + head) * width, width, rotary);
        for (int64_t head = 0; head < num_kv_heads; ++head)
            rotate(key + token * key_token_stride + head * key_head_stride, c, s,
                   key_out + (token * num_kv_heads + head) * width, width, rotary);
    }
}

}  // namespace
}  // namespace autodeploy

// query, key: `[num_tokens, heads, width]` with strides in elements, the last 1. cos, sin: `[num_tokens, rotary]`,
// contiguous, rotary even and at most width. query_out, key_out: contiguous.
#define DEFINE_ROPE(NAME, T)                                                                                         \
    extern "C" void NAME(const T* query, int64_t query_token_stride, int64_t query_head_stride, T* query_out,        \
                         int64_t num_heads, const T* key, int64_t key_token_stride, int64_t key_head_stride,         \
                         T* key_out, int64_t num_kv_heads, const T* cos, const T* sin, int64_t num_tokens,           \
                         int64_t width, int64_t rotary, int threads) {                                               \
        autodeploy::with_team(threads, [&] {                                                                         \
            autodeploy::rope<T>(query, query_token_stride, query_head_stride, query_out, num_heads, key,             \
                                key_token_stride, key_head_stride, key_out, num_kv_heads, cos, sin, num_tokens,      \
                                width, rotary);                                                                      \
        });                                                                                                          \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_ROPE(rope_float32, float)
DEFINE_ROPE(rope_bfloat16, autodeploy::bf16)
