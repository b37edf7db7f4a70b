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
// x / (1 + e^-x), of which e^-|x| is the cheaper part.
inline Floats silu(Floats x) {
    const auto is_negative = x < 0.0f;
    const Floats e = exp2_below_one(1.44269504f * select(is_negative, x, -x));
    return x * select(is_negative, e, splat(1.0f)) / (1.0f + e);
}
inline Floats larger(Floats a, Floats b) { return select(a > b, a, b); }

constexpr int64_t TOKENS = 32;  // of a block of channels that are in the first cache while they are read `taps` times

// weight: `[channels, taps]`.
template <class T>
Status convolve(const Sequences& q, Rows<T> x, Numbers weight, Numbers bias, bool has_silu, T* window, T* out,
                int64_t channels, int64_t taps) {
    const int64_t kept = taps - 1;
    return for_each_channel_block(q, channels, [&](int64_t s, int64_t begin, int64_t end) {
        const int64_t first = q.borders[s], length = q.borders[s + 1] - first, count = end - begin;
        const int64_t step = length < TOKENS ? length : TOKENS;
        T* state = window + q.slots[s] * kept * channels + begin;
        std::vector<float> scratch(static_cast<size_t>((taps + kept + step) * CHANNELS));
        float *by_tap = scratch.data(), *seen = by_tap + taps * CHANNELS;  // the tokens before, then new ones
        for (int64_t i = 0; i < count; ++i)
            for (int64_t w = 0; w < taps; ++w) by_tap[w * CHANNELS + i] = weight[(begin + i) * taps + w];
        for (int64_t w = 0; w < kept; ++w) widen(state + w * channels, seen + w * CHANNELS, count);
        for (int64_t start = 0; start < length; start += step) {
            const int64_t tokens = length - start < step ? length - start : step;
            for (int64_t t = 0; t < tokens; ++t)
                widen(x[first + start + t] + begin, seen + (kept + t) * CHANNELS, count);
            for (int64_t c = 0; c < count; c += LANES) {
                const Floats offset = bias.exist() ? bias.load(begin + c, count - c) : Floats{};
                for (int64_t t = 0; t < tokens; ++t) {
                    Floats total = offset;
                    for (int64_t w = 0; w < taps; ++w)
                        total = load(by_tap + w * CHANNELS + c) * load(seen + (t + w) * CHANNELS + c) + total;
                    store(out + (first + start + t) * channels + begin + c, has_silu ? silu(total) : total, count - c);
                }
            }
            std::memmove(seen, seen + tokens * CHANNELS, static_cast<size_t>(kept * CHANNELS) * sizeof(float));
        }
        for (int64_t w = 0; w < kept; ++w)
            for (int64_t c = 0; c < count; c += LANES)
                store(state + w * channels + c, load(seen + w * CHANNELS + c), count - c);
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

constexpr int64_t STATE_ROWS = 32;  // rows of a head's state in one work item, which the first cache holds
constexpr int TOGETHER = 4;         // rows that share what is loaded; their sums stay in registers
constexpr float LEAST_FACTOR = 1e-12f, MOST_FACTOR = 1e12f;  // that rows are kept without

// R rows of a state go on by one token: row = row + added · b, first multiplied with `factor` if FADES; sums = row · c.
template <int R, bool FADES>
__attribute__((noinline)) void advance_rows(float* rows, int64_t entries, float factor, const float* added,
                                            const float* b, const float* c, float* sums) {
    constexpr int WIDTH = Register<float>::WIDTH;
    using Part = Register<float>::Sums;
    Part totals[R] = {}, shares[R];
    for (int r = 0; r < R; ++r) shares[r] = added[r] - Part{};
    const int64_t whole = entries / WIDTH * WIDTH;
    for (int64_t n = 0; n < whole; n += WIDTH) {
        const Part to_add = load_vector<Part>(b + n), to_read = load_vector<Part>(c + n);
        for (int r = 0; r < R; ++r) {
            Part h = load_vector<Part>(rows + r * entries + n);
            if (FADES) h = h * factor;
            h = shares[r] * to_add + h;
            store_vector(rows + r * entries + n, h);
            totals[r] = h * to_read + totals[r];
        }
    }
    if constexpr (R == 4)
        store_sums(totals[0], totals[1], totals[2], totals[3], sums);
    else
        for (int r = 0; r < R; ++r) sums[r] = sum(totals[r]);
    for (int r = 0; r < R; ++r) {
        for (int64_t n = whole; n < entries; ++n) {
            float& h = rows[r * entries + n];
            h = (FADES ? h * factor : h) + added[r] * b[n];
            sums[r] += h * c[n];
        }
    }
}

// dt: one per token and head, `dt_stride` apart from token to token.
//
// A head's state fades by one factor per token. It is kept without the factors of the last tokens, whose product `scale`
// what is added is divided by and what is read multiplied with: two multiply-adds for an entry instead of three operations.
template <class T>
Status structured_scan(const Sequences& q, Rows<T> x, Numbers dt, int64_t dt_stride, Numbers A, Rows<T> B, Rows<T> C,
                       Numbers D, Step step, float* states, T* out, int64_t heads, int64_t width, int64_t groups,
                       int64_t entries) {
    return for_each_block(q, heads, width, STATE_ROWS, [&](int64_t s, int64_t head, int64_t begin, int64_t end) {
        const int64_t group = head / (heads / groups), count = end - begin;
        const int64_t first = q.borders[s], last = q.borders[s + 1] - 1;
        std::vector<float> scratch(static_cast<size_t>(2 * entries));
        float *b = scratch.data(), *c = b + entries;
        float* state = states + ((q.slots[s] * heads + head) * width + begin) * entries;
        const float rate = A[head], skip = D.exist() ? D[head] : 0.0f;
        float scale = 1.0f;
        for (int64_t t = first; t <= last; ++t) {
            widen(B[t] + group * entries, b, entries);
            widen(C[t] + group * entries, c, entries);
            const float delta = step(dt[t * dt_stride + head], head);
            const float factor = scale * std::exp(delta * rate);
            const bool fades = t == last || !(factor > LEAST_FACTOR && factor < MOST_FACTOR);
            scale = fades ? 1.0f : factor;
            const T* from = x[t] + head * width + begin;
            T* to = out + (t * heads + head) * width + begin;
            float added[STATE_ROWS], sums[STATE_ROWS] = {};
            for (int64_t p = 0; p < count; p += LANES)
                store(added + p, load(from + p, count - p) * (delta / scale));
            const auto advance_some = fades ? advance_rows<TOGETHER, true> : advance_rows<TOGETHER, false>;
            const auto advance_one = fades ? advance_rows<1, true> : advance_rows<1, false>;
            int64_t p = 0;
            for (; p + TOGETHER <= count; p += TOGETHER) {
                // Rows side by side are read from memory in too short runs for the processor to look ahead by itself.
                if (t == first) prefetch<3>(state + (p + 2 * TOGETHER) * entries, TOGETHER * entries);
                advance_some(state + p * entries, entries, factor, added + p, b, c, sums + p);
            }
            for (; p < count; ++p) advance_one(state + p * entries, entries, factor, added + p, b, c, sums + p);
            for (p = 0; p < count; p += LANES)
                store(to + p, load(sums + p) * scale + skip * load(from + p, count - p), count - p);
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
