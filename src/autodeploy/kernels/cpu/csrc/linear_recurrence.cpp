// Recurrences that are linear in their states, token by token with the state in cache: values per channel, weighed means
// per channel, and matrices that fade, are added to, and are read and written under keys. States are float32.

#include <cmath>
#include <vector>

#include "sequences.h"

namespace autodeploy {
namespace {

constexpr float NOTHING = -1e38f;  // logarithm of the weight of an empty memory

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

template <class T>
void linear_recurrence(const Sequences& q, Rows<T> x, Rows<T> gate, float* states, T* out, int64_t channels,
                       int threads) {
    const int64_t blocks = (channels + CHANNELS - 1) / CHANNELS;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < q.count * blocks; ++item) {
        const int64_t s = item / blocks, begin = item % blocks * CHANNELS;
        const int64_t end = begin + CHANNELS < channels ? begin + CHANNELS : channels;
        for (int64_t c = begin; c < end; c += LANES) {
            const int64_t count = end - c;
            float* state = states + q.slots[s] * channels + c;
            Floats h = load(state, count);
            for (int64_t t = q.borders[s]; t < q.borders[s + 1]; ++t) {
                h = load(gate[t] + c, count) * h + load(x[t] + c, count);
                store(out + t * channels + c, h, count);
            }
            store(state, h, count);
        }
    }
}

// A slot holds, for all channels: a weighed sum of values, the sum of the weights, the logarithm both are relative to.
template <class T>
void wkv(const Sequences& q, Rows<T> key, Rows<T> value, const float* decay, const float* bonus, float* states, T* out,
         int64_t channels, int threads) {
    const int64_t blocks = (channels + CHANNELS - 1) / CHANNELS;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < q.count * blocks; ++item) {
        const int64_t s = item / blocks, begin = item % blocks * CHANNELS;
        const int64_t end = begin + CHANNELS < channels ? begin + CHANNELS : channels;
        for (int64_t c = begin; c < end; c += LANES) {
            const int64_t count = end - c;
            float* state = states + q.slots[s] * 3 * channels + c;
            const Floats fading = load(decay + c, count), own = load(bonus + c, count);
            Floats sums = load(state, count), weights = load(state + channels, count);
            Floats level = weights > 0.0f ? load(state + 2 * channels, count) : splat(NOTHING);
            for (int64_t t = q.borders[s]; t < q.borders[s + 1]; ++t) {
                const Floats k = load(key[t] + c, count), v = load(value[t] + c, count);
                Floats most = larger(level, k + own);
                Floats kept = exp(level - most), fresh = exp(k + own - most);
                store(out + t * channels + c, (kept * sums + fresh * v) / (kept * weights + fresh), count);
                most = larger(level + fading, k);
                kept = exp(level + fading - most), fresh = exp(k - most);
                sums = kept * sums + fresh * v, weights = kept * weights + fresh, level = most;
            }
            store(state, sums, count);
            store(state + channels, weights, count);
            store(state + 2 * channels, level, count);
        }
    }
}

// decay: one logarithm per head (`decays` 1) or per channel of the key (`decays` is `depth`). bonus: `[heads, depth]`
// or null.
template <class T>
void linear_attention(const Sequences& q, Rows<T> query, Rows<T> key, Rows<T> value, Rows<float> decay, int64_t decays,
                      const float* bonus, float* states, T* out, int64_t heads, int64_t depth, int64_t width,
                      int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < q.count * heads; ++item) {
        const int64_t s = item / heads, head = item % heads;
        std::vector<float> scratch(static_cast<size_t>(2 * depth + 2 * width));
        float *qs = scratch.data(), *ks = qs + depth, *added = ks + depth, *result = added + width;
        float* state = states + (q.slots[s] * heads + head) * depth * width;
        for (int64_t t = q.borders[s]; t < q.borders[s + 1]; ++t) {
            widen(query[t] + head * depth, qs, depth);
            widen(key[t] + head * depth, ks, depth);
            widen(value[t] + head * width, added, width);
            const float* logarithms = decay[t] + head * decays;
            const float shared = std::exp(logarithms[0]);
            for (int64_t v = 0; v < width; ++v) result[v] = 0.0f;
            for (int64_t d = 0; d < depth; ++d) {
                const float kept = decays == 1 ? shared : std::exp(logarithms[d]);
                const float own = bonus != nullptr ? bonus[head * depth + d] * ks[d] : 0.0f;
                float* row = state + d * width;
                for (int64_t v = 0; v < width; v += LANES) {
                    const Floats before = load(row + v, width - v), fresh = load(added + v, width - v);
                    const Floats after = before * kept + fresh * ks[d];
                    const Floats seen = bonus != nullptr ? before + fresh * own : after;
                    store(row + v, after, width - v);
                    store(result + v, load(result + v, width - v) + seen * qs[d], width - v);
                }
            }
            T* to = out + (t * heads + head) * width;
            for (int64_t v = 0; v < width; v += LANES) store(to + v, load(result + v, width - v), width - v);
        }
    }
}

// What the state holds under `read` is added under `write`, after the state has faded; decay per channel of the key.
template <class T>
void generalized_delta_rule(const Sequences& q, Rows<T> query, Rows<T> key, Rows<T> value, Rows<T> read, Rows<T> write,
                            Rows<float> decay, float* states, T* out, int64_t heads, int64_t depth, int64_t width,
                            int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < q.count * heads; ++item) {
        const int64_t s = item / heads, head = item % heads;
        std::vector<float> scratch(static_cast<size_t>(4 * depth + 3 * width));
        float *qs = scratch.data(), *ks = qs + depth, *rs = ks + depth, *ws = rs + depth;
        float *added = ws + depth, *found = added + width, *result = found + width;
        float* state = states + (q.slots[s] * heads + head) * depth * width;
        for (int64_t t = q.borders[s]; t < q.borders[s + 1]; ++t) {
            widen(query[t] + head * depth, qs, depth);
            widen(key[t] + head * depth, ks, depth);
            widen(read[t] + head * depth, rs, depth);
            widen(write[t] + head * depth, ws, depth);
            widen(value[t] + head * width, added, width);
            for (int64_t v = 0; v < width; ++v) found[v] = result[v] = 0.0f;
            for (int64_t d = 0; d < depth; ++d)
                for (int64_t v = 0; v < width; v += LANES)
                    store(found + v, load(found + v, width - v) + load(state + d * width + v, width - v) * rs[d],
                          width - v);
            for (int64_t d = 0; d < depth; ++d) {
                const float kept = std::exp(decay[t][head * depth + d]);
                float* row = state + d * width;
                for (int64_t v = 0; v < width; v += LANES) {
                    const Floats fresh = load(added + v, width - v) * ks[d] + load(found + v, width - v) * ws[d];
                    const Floats after = load(row + v, width - v) * kept + fresh;
                    store(row + v, after, width - v);
                    store(result + v, load(result + v, width - v) + after * qs[d], width - v);
                }
            }
            T* to = out + (t * heads + head) * width;
            for (int64_t v = 0; v < width; v += LANES) store(to + v, load(result + v, width - v), width - v);
        }
    }
}

}  // namespace
}  // namespace autodeploy

// Rows are one per token, strides in elements; out and states are contiguous.
#define DEFINE_LINEAR_RECURRENCES(SUFFIX, T)                                                                         \
    extern "C" int linear_recurrence_##SUFFIX(SEQUENCES, const T* x, int64_t x_stride, const T* gate,                \
                                              int64_t gate_stride, float* states, T* out, int64_t channels,          \
                                              int threads) {                                                         \
        CHECKED_SEQUENCES;                                                                                           \
        autodeploy::linear_recurrence<T>(sequences, {x, x_stride}, {gate, gate_stride}, states, out, channels,       \
                                         threads);                                                                   \
        return 0;                                                                                                    \
    }                                                                                                                \
    extern "C" int wkv_##SUFFIX(SEQUENCES, const T* key, int64_t key_stride, const T* value, int64_t value_stride,   \
                                const float* decay, const float* bonus, float* states, T* out, int64_t channels,     \
                                int threads) {                                                                       \
        CHECKED_SEQUENCES;                                                                                           \
        autodeploy::wkv<T>(sequences, {key, key_stride}, {value, value_stride}, decay, bonus, states, out, channels, \
                           threads);                                                                                 \
        return 0;                                                                                                    \
    }                                                                                                                \
    extern "C" int linear_attention_##SUFFIX(SEQUENCES, const T* query, int64_t query_stride, const T* key,          \
                                             int64_t key_stride, const T* value, int64_t value_stride,               \
                                             const float* decay, int64_t decays, const float* bonus, float* states,  \
                                             T* out, int64_t heads, int64_t depth, int64_t width, int threads) {     \
        CHECKED_SEQUENCES;                                                                                           \
        autodeploy::linear_attention<T>(sequences, {query, query_stride}, {key, key_stride}, {value, value_stride},  \
                                        {decay, heads * decays}, decays, bonus, states, out, heads, depth, width,    \
                                        threads);                                                                    \
        return 0;                                                                                                    \
    }                                                                                                                \
    extern "C" int generalized_delta_rule_##SUFFIX(                                                                  \
        SEQUENCES, const T* query, int64_t query_stride, const T* key, int64_t key_stride, const T* value,           \
        int64_t value_stride, const T* read, int64_t read_stride, const T* write, int64_t write_stride,              \
        const float* decay, float* states, T* out, int64_t heads, int64_t depth, int64_t width, int threads) {       \
        CHECKED_SEQUENCES;                                                                                           \
        autodeploy::generalized_delta_rule<T>(sequences, {query, query_stride}, {key, key_stride},                   \
                                              {value, value_stride}, {read, read_stride}, {write, write_stride},     \
                                              {decay, heads * depth}, states, out, heads, depth, width, threads);    \
        return 0;                                                                                                    \
    }

DEFINE_LINEAR_RECURRENCES(float32, float)
DEFINE_LINEAR_RECURRENCES(bfloat16, autodeploy::bf16)
