// Recurrences over slot states, token by token with the state in cache: causal convolutions, selective and structured
// state-space scans, and the delta rule. States are float32, except a convolution's window, which is what its input is.

#include <cmath>
#include <vector>

#include "sequences.h"

namespace autodeploy {
namespace {

inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }
inline Floats silu(Floats x) { return x / (1.0f + exp(-x)); }

template <class T>
void convolve(const Sequences& q, Rows<T> x, const float* weight, const float* bias, bool has_silu, T* window, T* out,
              int64_t channels, int64_t taps, int threads) {
    const int64_t blocks = (channels + CHANNELS - 1) / CHANNELS, kept = taps - 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < q.count * blocks; ++item) {
        const int64_t s = item / blocks, first = q.borders[s], length = q.borders[s + 1] - first;
        if (length == 0) continue;
        T* state = window + q.slots[s] * kept * channels;
        const int64_t begin = item % blocks * CHANNELS;
        const int64_t end = begin + CHANNELS < channels ? begin + CHANNELS : channels;
        for (int64_t c = begin; c < end; c += LANES) {
            const int64_t count = end - c;
            for (int64_t t = 0; t < length; ++t) {
                Floats total = bias != nullptr ? load(bias + c, count) : Floats{};
                for (int64_t w = 0; w < taps; ++w) {
                    const int64_t at = t - kept + w;
                    const T* seen = at < 0 ? state + (kept + at) * channels : x[first + at];
                    total = load(weight + w * channels + c, count) * load(seen + c, count) + total;
                }
                store(out + (first + t) * channels + c, has_silu ? silu(total) : total, count);
            }
            for (int64_t w = 0; w < kept; ++w) {  // the last `kept` of the tokens before and now, oldest first
                const int64_t at = length - kept + w;
                const T* seen = at < 0 ? state + (kept + at) * channels : x[first + at];
                store(state + w * channels + c, load(seen + c, count), count);
            }
        }
    }
}

// What turns a raw step size into the one that is used.
struct Step {
    const float* bias;
    bool has_softplus;
    float least, most;
    float operator()(float dt, int64_t index) const {
        if (bias != nullptr) dt += bias[index];
        if (has_softplus) dt = softplus(dt);
        return dt < least ? least : dt > most ? most : dt;
    }
};

template <class T>
void structured_scan(const Sequences& q, Rows<T> x, Rows<float> dt, const float* A, Rows<T> B, Rows<T> C,
                     const float* D, Step step, float* states, T* out, int64_t heads, int64_t width, int64_t groups,
                     int64_t entries, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < q.count * heads; ++item) {
        const int64_t s = item / heads, head = item % heads, group = head / (heads / groups);
        std::vector<float> scratch(static_cast<size_t>(2 * entries));
        float *b = scratch.data(), *c = b + entries;
        float* state = states + (q.slots[s] * heads + head) * width * entries;
        for (int64_t t = q.borders[s]; t < q.borders[s + 1]; ++t) {
            widen(B[t] + group * entries, b, entries);
            widen(C[t] + group * entries, c, entries);
            const float delta = step(dt[t][head], head), decay = std::exp(delta * A[head]);
            for (int64_t p = 0; p < width; ++p) {
                const float value = to_float(x[t][head * width + p]);
                const Floats added = splat(value * delta), kept = splat(decay);
                float* row = state + p * entries;
                Floats total = {};
                for (int64_t n = 0; n < entries; n += LANES) {
                    const Floats h = load(row + n, entries - n) * kept + added * load(b + n, entries - n);
                    store(row + n, h, entries - n);
                    total = h * load(c + n, entries - n) + total;
                }
                assign(out[(t * heads + head) * width + p], sum(total) + (D != nullptr ? D[head] * value : 0.0f));
            }
        }
    }
}

template <class T>
void selective_scan(const Sequences& q, Rows<T> x, Rows<T> dt, const float* A, Rows<T> B, Rows<T> C, const float* D,
                    Rows<T> z, Step step, float* states, T* out, int64_t channels, int64_t entries, int threads) {
    const int64_t blocks = (channels + CHANNELS - 1) / CHANNELS;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < q.count * blocks; ++item) {
        const int64_t s = item / blocks, begin = item % blocks * CHANNELS;
        const int64_t end = begin + CHANNELS < channels ? begin + CHANNELS : channels;
        std::vector<float> scratch(static_cast<size_t>(2 * entries));
        float *b = scratch.data(), *c = b + entries;
        float* state = states + q.slots[s] * channels * entries;
        for (int64_t t = q.borders[s]; t < q.borders[s + 1]; ++t) {
            widen(B[t], b, entries);
            widen(C[t], c, entries);
            for (int64_t i = begin; i < end; ++i) {
                const float value = to_float(x[t][i]), delta = step(to_float(dt[t][i]), i);
                float* row = state + i * entries;
                Floats total = {};
                for (int64_t n = 0; n < entries; n += LANES) {
                    const Floats decay = exp(delta * load(A + i * entries + n, entries - n));
                    const Floats h = load(row + n, entries - n) * decay + value * delta * load(b + n, entries - n);
                    store(row + n, h, entries - n);
                    total = h * load(c + n, entries - n) + total;
                }
                float y = sum(total) + (D != nullptr ? D[i] * value : 0.0f);
                if (z.data != nullptr) {
                    const float gate = to_float(z[t][i]);
                    y *= gate / (1.0f + std::exp(-gate));
                }
                assign(out[t * channels + i], y);
            }
        }
    }
}

// from · factor, or from / sqrt(sum of squares + eps) · factor when eps is not negative.
template <class T>
void normalised(const T* from, float* to, int64_t count, float eps, float factor) {
    widen(from, to, count);
    if (eps >= 0.0f) {
        float total = 0.0f;
        for (int64_t i = 0; i < count; ++i) total += to[i] * to[i];
        factor /= std::sqrt(total + eps);
    }
    for (int64_t i = 0; i < count; ++i) to[i] *= factor;
}

// decay: one logarithm per head (`decays` 1) or per channel of the key (`decays` is `depth`), or null.
template <class T>
void delta_rule(const Sequences& q, Rows<T> query, Rows<T> key, Rows<T> value, Rows<float> beta, Rows<float> decay,
                int64_t decays, float scale, float norm_eps, float* states, T* out, int64_t key_heads, int64_t heads,
                int64_t depth, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < q.count * heads; ++item) {
        const int64_t s = item / heads, head = item % heads, key_head = head / (heads / key_heads);
        std::vector<float> scratch(static_cast<size_t>(2 * depth + 2 * width));
        float *qs = scratch.data(), *ks = qs + depth, *update = ks + depth, *result = update + width;
        float* state = states + (q.slots[s] * heads + head) * depth * width;
        for (int64_t t = q.borders[s]; t < q.borders[s + 1]; ++t) {
            normalised(query[t] + key_head * depth, qs, depth, norm_eps, scale);
            normalised(key[t] + key_head * depth, ks, depth, norm_eps, 1.0f);
            const float* logarithms = decay.data != nullptr ? decay[t] + head * decays : nullptr;
            const float shared = decays == 1 && logarithms != nullptr ? std::exp(logarithms[0]) : 1.0f;
            for (int64_t v = 0; v < width; ++v) update[v] = result[v] = 0.0f;
            for (int64_t d = 0; d < depth; ++d) {
                const float kept = decays == 1 || logarithms == nullptr ? shared : std::exp(logarithms[d]);
                float* row = state + d * width;
                for (int64_t v = 0; v < width; v += LANES) {
                    const Floats h = load(row + v, width - v) * kept;
                    store(row + v, h, width - v);
                    store(update + v, load(update + v, width - v) + h * ks[d], width - v);
                }
            }
            const float rate = beta[t][head];
            const T* values = value[t] + head * width;
            for (int64_t v = 0; v < width; v += LANES)
                store(update + v, rate * (load(values + v, width - v) - load(update + v, width - v)), width - v);
            for (int64_t d = 0; d < depth; ++d) {
                float* row = state + d * width;
                for (int64_t v = 0; v < width; v += LANES) {
                    const Floats h = load(row + v, width - v) + load(update + v, width - v) * ks[d];
                    store(row + v, h, width - v);
                    store(result + v, load(result + v, width - v) + h * qs[d], width - v);
                }
            }
            T* to = out + (t * heads + head) * width;
            for (int64_t v = 0; v < width; v += LANES) store(to + v, load(result + v, width - v), width - v);
        }
    }
}

}  // namespace
}  // namespace autodeploy

// Rows are one per token, strides in elements; out and states are contiguous. weight: `[taps, channels]`, float32.
#define DEFINE_RECURRENCES(SUFFIX, T)                                                                                \
    extern "C" int causal_conv_##SUFFIX(SEQUENCES, const T* x, int64_t x_stride, const float* weight,                \
                                        const float* bias, int has_silu, T* window, T* out, int64_t channels,        \
                                        int64_t taps, int threads) {                                                 \
        CHECKED_SEQUENCES;                                                                                           \
        autodeploy::convolve<T>(sequences, {x, x_stride}, weight, bias, has_silu != 0, window, out, channels, taps,  \
                                threads);                                                                            \
        return 0;                                                                                                    \
    }                                                                                                                \
    extern "C" int ssd_##SUFFIX(SEQUENCES, const T* x, int64_t x_stride, const float* dt, const float* A,            \
                                const T* B, int64_t B_stride, const T* C, int64_t C_stride, const float* D,          \
                                const float* dt_bias, int has_softplus, float least, float most, float* states,      \
                                T* out, int64_t heads, int64_t width, int64_t groups, int64_t entries,               \
                                int threads) {                                                                       \
        CHECKED_SEQUENCES;                                                                                           \
        autodeploy::structured_scan<T>(sequences, {x, x_stride}, {dt, heads}, A, {B, B_stride}, {C, C_stride}, D,    \
                                       {dt_bias, has_softplus != 0, least, most}, states, out, heads, width, groups, \
                                       entries, threads);                                                            \
        return 0;                                                                                                    \
    }                                                                                                                \
    extern "C" int selective_scan_##SUFFIX(SEQUENCES, const T* x, int64_t x_stride, const T* dt, int64_t dt_stride,  \
                                           const float* A, const T* B, int64_t B_stride, const T* C,                 \
                                           int64_t C_stride, const float* D, const T* z, int64_t z_stride,           \
                                           const float* dt_bias, int has_softplus, float* states, T* out,            \
                                           int64_t channels, int64_t entries, int threads) {                         \
        CHECKED_SEQUENCES;                                                                                           \
        const float all = __builtin_inff();                                                                          \
        autodeploy::selective_scan<T>(sequences, {x, x_stride}, {dt, dt_stride}, A, {B, B_stride}, {C, C_stride}, D, \
                                      {z, z_stride}, {dt_bias, has_softplus != 0, -all, all}, states, out, channels, \
                                      entries, threads);                                                             \
        return 0;                                                                                                    \
    }                                                                                                                \
    extern "C" int delta_rule_##SUFFIX(SEQUENCES, const T* query, int64_t query_stride, const T* key,                \
                                       int64_t key_stride, const T* value, int64_t value_stride, const float* beta,  \
                                       const float* decay, int64_t decays, float scale, float norm_eps,              \
                                       float* states, T* out, int64_t key_heads, int64_t heads, int64_t depth,       \
                                       int64_t width, int threads) {                                                 \
        CHECKED_SEQUENCES;                                                                                           \
        autodeploy::delta_rule<T>(sequences, {query, query_stride}, {key, key_stride}, {value, value_stride},        \
                                  {beta, heads}, {decay, heads * decays}, decays, scale, norm_eps, states, out,      \
                                  key_heads, heads, depth, width, threads);                                          \
        return 0;                                                                                                    \
    }

DEFINE_RECURRENCES(float32, float)
DEFINE_RECURRENCES(bfloat16, autodeploy::bf16)
