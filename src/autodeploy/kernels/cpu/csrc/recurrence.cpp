// Recurrences of channels over slot states, token by token with the state in cache: causal convolutions, selective and
// structured state-space scans, linear recurrences, and means that fade. States are float32, except a convolution's
// window, which is what its input is.

#include <cmath>
#include <vector>

#include "sequences.h"

namespace autodeploy {
namespace {

constexpr float NOTHING = -1e38f;  // logarithm of the weight of an empty memory

inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }
inline Floats silu(Floats x) { return x / (1.0f + exp(-x)); }
inline Floats larger(Floats a, Floats b) { return select(a > b, a, b); }

// weight: `[channels, taps]`.
template <class T>
Status convolve(const Sequences& q, Rows<T> x, Numbers weight, Numbers bias, bool has_silu, T* window, T* out,
                int64_t channels, int64_t taps) {
    const int64_t kept = taps - 1;
    return for_each_channel_block(q, channels, [&](int64_t s, int64_t begin, int64_t end) {
        const int64_t first = q.borders[s], length = q.borders[s + 1] - first;
        T* state = window + q.slots[s] * kept * channels;
        std::vector<float> by_tap(static_cast<size_t>(taps * LANES));
        for (int64_t c = begin; c < end; c += LANES) {
            const int64_t count = end - c < LANES ? end - c : LANES;
            for (int64_t i = 0; i < count; ++i)
                for (int64_t w = 0; w < taps; ++w) by_tap[w * LANES + i] = weight[(c + i) * taps + w];
            const Floats offset = bias.exist() ? bias.load(c, count) : Floats{};
            for (int64_t t = 0; t < length; ++t) {
                Floats total = offset;
                for (int64_t w = 0; w < taps; ++w) {
                    const int64_t at = t - kept + w;
                    const T* seen = at < 0 ? state + (kept + at) * channels : x[first + at];
                    total = load(by_tap.data() + w * LANES) * load(seen + c, count) + total;
                }
                store(out + (first + t) * channels + c, has_silu ? silu(total) : total, count);
            }
            for (int64_t w = 0; w < kept; ++w) {  // the last `kept` of the tokens before and now, oldest first
                const int64_t at = length - kept + w;
                const T* seen = at < 0 ? state + (kept + at) * channels : x[first + at];
                store(state + w * channels + c, load(seen + c, count), count);
            }
        }
    });
}

// What turns a raw step size into the one that is used.
struct Step {
    Numbers bias;
    bool has_softplus;
    float least, most;
    float operator()(float dt, int64_t index) const {
        if (bias.exist()) dt += bias[index];
        if (has_softplus) dt = softplus(dt);
        return dt < least ? least : dt > most ? most : dt;
    }
};

constexpr int64_t STATE_ROWS = 16;  // rows of a head's state in one work item

// dt: one per token and head, `dt_stride` apart from token to token.
template <class T>
Status structured_scan(const Sequences& q, Rows<T> x, Numbers dt, int64_t dt_stride, Numbers A, Rows<T> B, Rows<T> C,
                       Numbers D, Step step, float* states, T* out, int64_t heads, int64_t width, int64_t groups,
                       int64_t entries) {
    return for_each_block(q, heads, width, STATE_ROWS, [&](int64_t s, int64_t head, int64_t begin, int64_t end) {
        const int64_t group = head / (heads / groups);
        std::vector<float> scratch(static_cast<size_t>(2 * entries));
        float *b = scratch.data(), *c = b + entries;
        float* state = states + (q.slots[s] * heads + head) * width * entries;
        const float rate = A[head], skip = D.exist() ? D[head] : 0.0f;
        for (int64_t t = q.borders[s]; t < q.borders[s + 1]; ++t) {
            widen(B[t] + group * entries, b, entries);
            widen(C[t] + group * entries, c, entries);
            const float delta = step(dt[t * dt_stride + head], head);
            const Floats kept = splat(std::exp(delta * rate));
            for (int64_t p = begin; p < end; ++p) {
                const float value = to_float(x[t][head * width + p]);
                const Floats added = splat(value * delta);
                float* row = state + p * entries;
                Floats total = {};
                for (int64_t n = 0; n < entries; n += LANES) {
                    const Floats h = load(row + n, entries - n) * kept + added * load(b + n, entries - n);
                    store(row + n, h, entries - n);
                    total = h * load(c + n, entries - n) + total;
                }
                assign(out[(t * heads + head) * width + p], sum(total) + skip * value);
            }
        }
    });
}

template <class T>
Status selective_scan(const Sequences& q, Rows<T> x, Rows<T> dt, Numbers A, Rows<T> B, Rows<T> C, Numbers D, Rows<T> z,
                      Step step, float* states, T* out, int64_t channels, int64_t entries) {
    return for_each_channel_block(q, channels, [&](int64_t s, int64_t begin, int64_t end) {
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
                    const Floats decay = exp(delta * A.load(i * entries + n, entries - n));
                    const Floats h = load(row + n, entries - n) * decay + value * delta * load(b + n, entries - n);
                    store(row + n, h, entries - n);
                    total = h * load(c + n, entries - n) + total;
                }
                float y = sum(total) + (D.exist() ? D[i] * value : 0.0f);
                if (z.data != nullptr) {
                    const float gate = to_float(z[t][i]);
                    y *= gate / (1.0f + std::exp(-gate));
                }
                assign(out[t * channels + i], y);
            }
        }
    });
}

template <class T>
Status linear_recurrence(const Sequences& q, Rows<T> x, Rows<T> gate, float* states, T* out, int64_t channels) {
    return for_each_channel_block(q, channels, [&](int64_t s, int64_t begin, int64_t end) {
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
    });
}

// A slot holds, for all channels: a weighed sum of values, the sum of the weights, the logarithm both are relative to.
template <class T>
Status wkv(const Sequences& q, Rows<T> key, Rows<T> value, Numbers decay, Numbers bonus, float* states, T* out,
           int64_t channels) {
    return for_each_channel_block(q, channels, [&](int64_t s, int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; c += LANES) {
            const int64_t count = end - c;
            float* state = states + q.slots[s] * 3 * channels + c;
            const Floats fading = decay.load(c, count), own = bonus.load(c, count);
            Floats sums = load(state, count), weights = load(state + channels, count);
            Floats level = select(weights > 0.0f, load(state + 2 * channels, count), splat(NOTHING));
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
    });
}

}  // namespace
}  // namespace autodeploy

// Rows are one per token, strides in elements; out and states are contiguous. A flag behind a pointer to numbers of
// either dtype says whether they are bfloat16.
#define DEFINE_CAUSAL_CONV(NAME, T)                                                                                  \
    extern "C" int NAME(SEQUENCES, const T* x, int64_t x_stride, const void* weight, int weight_is_bfloat16,         \
                        const void* bias, int bias_is_bfloat16, int has_silu, T* window, T* out, int64_t channels,   \
                        int64_t taps, int threads) {                                                                 \
        return autodeploy::status_of(threads, [&] {                                                                  \
            return autodeploy::convolve<T>(GIVEN_SEQUENCES, {x, x_stride}, {weight, weight_is_bfloat16 != 0},        \
                                           {bias, bias_is_bfloat16 != 0}, has_silu != 0, window, out, channels,      \
                                           taps);                                                                    \
        });                                                                                                          \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_CAUSAL_CONV(causal_conv_float32, float)
DEFINE_CAUSAL_CONV(causal_conv_bfloat16, autodeploy::bf16)

#define DEFINE_SSD(NAME, T)                                                                                          \
    extern "C" int NAME(SEQUENCES, const T* x, int64_t x_stride, const void* dt, int dt_is_bfloat16,                 \
                        int64_t dt_stride, const void* A, int A_is_bfloat16, const T* B, int64_t B_stride,           \
                        const T* C, int64_t C_stride, const void* D, int D_is_bfloat16, const void* dt_bias,         \
                        int dt_bias_is_bfloat16, int has_softplus, float least, float most, float* states, T* out,   \
                        int64_t heads, int64_t width, int64_t groups, int64_t entries, int threads) {                \
        return autodeploy::status_of(threads, [&] {                                                                  \
            return autodeploy::structured_scan<T>(                                                                   \
                GIVEN_SEQUENCES, {x, x_stride}, {dt, dt_is_bfloat16 != 0}, dt_stride, {A, A_is_bfloat16 != 0},       \
                {B, B_stride}, {C, C_stride}, {D, D_is_bfloat16 != 0},                                               \
                {{dt_bias, dt_bias_is_bfloat16 != 0}, has_softplus != 0, least, most}, states, out, heads, width,    \
                groups, entries);                                                                                    \
        });                                                                                                          \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_SSD(ssd_float32, float)
DEFINE_SSD(ssd_bfloat16, autodeploy::bf16)

#define DEFINE_SELECTIVE_SCAN(NAME, T)                                                                               \
    extern "C" int NAME(SEQUENCES, const T* x, int64_t x_stride, const T* dt, int64_t dt_stride, const void* A,      \
                        int A_is_bfloat16, const T* B, int64_t B_stride, const T* C, int64_t C_stride,               \
                        const void* D, int D_is_bfloat16, const T* z, int64_t z_stride, const void* dt_bias,         \
                        int dt_bias_is_bfloat16, int has_softplus, float* states, T* out, int64_t channels,          \
                        int64_t entries, int threads) {                                                              \
        const float all = __builtin_inff();                                                                          \
        return autodeploy::status_of(threads, [&] {                                                                  \
            return autodeploy::selective_scan<T>(                                                                    \
                GIVEN_SEQUENCES, {x, x_stride}, {dt, dt_stride}, {A, A_is_bfloat16 != 0}, {B, B_stride},             \
                {C, C_stride}, {D, D_is_bfloat16 != 0}, {z, z_stride},                                               \
                {{dt_bias, dt_bias_is_bfloat16 != 0}, has_softplus != 0, -all, all}, states, out, channels,          \
                entries);                                                                                            \
        });                                                                                                          \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_SELECTIVE_SCAN(selective_scan_float32, float)
DEFINE_SELECTIVE_SCAN(selective_scan_bfloat16, autodeploy::bf16)

#define DEFINE_LINEAR_RECURRENCE(NAME, T)                                                                            \
    extern "C" int NAME(SEQUENCES, const T* x, int64_t x_stride, const T* gate, int64_t gate_stride, float* states,  \
                        T* out, int64_t channels, int threads) {                                                     \
        return autodeploy::status_of(threads, [&] {                                                                  \
            return autodeploy::linear_recurrence<T>(GIVEN_SEQUENCES, {x, x_stride}, {gate, gate_stride}, states,     \
                                                    out, channels);                                                  \
        });                                                                                                          \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_LINEAR_RECURRENCE(linear_recurrence_float32, float)
DEFINE_LINEAR_RECURRENCE(linear_recurrence_bfloat16, autodeploy::bf16)

#define DEFINE_WKV(NAME, T)                                                                                          \
    extern "C" int NAME(SEQUENCES, const T* key, int64_t key_stride, const T* value, int64_t value_stride,           \
                        const void* decay, int decay_is_bfloat16, const void* bonus, int bonus_is_bfloat16,          \
                        float* states, T* out, int64_t channels, int threads) {                                      \
        return autodeploy::status_of(threads, [&] {                                                                  \
            return autodeploy::wkv<T>(GIVEN_SEQUENCES, {key, key_stride}, {value, value_stride},                     \
                                      {decay, decay_is_bfloat16 != 0}, {bonus, bonus_is_bfloat16 != 0}, states, out, \
                                      channels);                                                                     \
        });                                                                                                          \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_WKV(wkv_float32, float)
DEFINE_WKV(wkv_bfloat16, autodeploy::bf16)
