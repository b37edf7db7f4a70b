// Normalisation of rows in float32: by their root mean square, alone or after a residual sum, with the op's order of
// rounding; by mean and variance; and with a gate.

#include <cmath>

#include "simd.h"
#include "team.h"

namespace autodeploy {
namespace {

template <class T>
void normalise(const T* x, const T* weight, T* out, int64_t width, float scale, float offset, bool scale_in_float32) {
    const T* const type = nullptr;
    for (int64_t i = 0; i < width; i += LANES) {
        const int64_t count = width - i;
        Floats y = load(x + i, count) * scale;
        if (weight != nullptr) {
            Floats w = load(weight + i, count);
            if (scale_in_float32) {
                y = y * (w + offset);
            } else {
                if (offset != 0.0f) w = round_to(w + offset, type);
                y = round_to(y, type) * w;
            }
        }
        store(out + i, y, count);
    }
}

template <class T>
float sum_of_squares(const T* x, int64_t width) {
    Floats total = {};
    for (int64_t i = 0; i < width; i += LANES) {
        const Floats y = load(x + i, width - i);
        total = y * y + total;
    }
    return sum(total);
}

template <class T>
void add(const T* x, const T* residual, T* total, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES)
        store(total + i, load(x + i, width - i) + load(residual + i, width - i), width - i);
}

template <class T>
void rms_norm(const T* x, int64_t outer_stride, int64_t inner_stride, const T* residual, T* total, const T* weight,
              T* out, int64_t num_outer, int64_t num_inner, int64_t width, float eps, float offset,
              bool scale_in_float32) {
    const int64_t num_rows = num_outer * num_inner;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < num_rows; ++row) {
        const T* input = x + row / num_inner * outer_stride + row % num_inner * inner_stride;
        if (residual != nullptr) {
            add(input, residual + row * width, total + row * width, width);
            input = total + row * width;
        }
        const float mean = sum_of_squares(input, width) / static_cast<float>(width);
        normalise(input, weight, out + row * width, width, 1.0f / std::sqrt(mean + eps), offset, scale_in_float32);
    }
}

template <class T>
void layer_norm(const T* x, const T* weight, const T* bias, T* out, int64_t num_rows, int64_t width, float eps) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < num_rows; ++row) {
        const T* input = x + row * width;
        Floats total = {}, squares = {};
        for (int64_t i = 0; i < width; i += LANES) total = total + load(input + i, width - i);
        const float mean = sum(total) / static_cast<float>(width);
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) {
            const Floats y = load(input + i) - mean;
            squares = y * y + squares;
        }
        float variance = sum(squares);
        for (; i < width; ++i) variance += (to_float(input[i]) - mean) * (to_float(input[i]) - mean);
        const float scale = 1.0f / std::sqrt(variance / static_cast<float>(width) + eps);
        for (i = 0; i < width; i += LANES) {
            const int64_t count = width - i;
            Floats y = (load(input + i, count) - mean) * scale;
            if (weight != nullptr) y = y * load(weight + i, count);
            if (bias != nullptr) y = y + load(bias + i, count);
            store(out + row * width + i, y, count);
        }
    }
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp(-x)); }

// X: what is normalised, and the result. T: the gate and the weight.
template <class X, class T>
void gated_rms_norm(const X* x, const T* gate, int64_t gate_stride, const T* weight, X* out, int64_t num_rows,
                    int64_t groups, int64_t width, float eps, bool is_silu, bool gate_first, bool scale_in_float32) {
    const X* const type = nullptr;
    const auto gating = [&](const T* at, int64_t count) {
        const Floats g = load(at, count);
        return is_silu ? g * sigmoid(g) : sigmoid(g);
    };
#pragma omp for schedule(static)
    for (int64_t item = 0; item < num_rows * groups; ++item) {
        const X* values = x + item * width;
        const T* gates = gate + item / groups * gate_stride + item % groups * width;
        const T* scales = weight + item % groups * width;
        Floats total = {};
        for (int64_t i = 0; i < width; i += LANES) {
            Floats y = load(values + i, width - i);
            if (gate_first) y = y * gating(gates + i, width - i);
            total = y * y + total;
        }
        const float scale = 1.0f / std::sqrt(sum(total) / static_cast<float>(width) + eps);
        for (int64_t i = 0; i < width; i += LANES) {
            const int64_t count = width - i;
            Floats y = load(values + i, count) * scale;
            if (gate_first) y = y * gating(gates + i, count);
            const Floats w = load(scales + i, count);
            y = scale_in_float32 ? y * w : round_to(round_to(y, type) * w, type);
            if (!gate_first) y = y * gating(gates + i, count);
            store(out + item * width + i, y, count);
        }
    }
}

}  // namespace
}  // namespace autodeploy

// x: `[num_outer, num_inner, width]` with strides in elements, the last 1. residual, total: contiguous, or both null;
// total becomes x + residual and is what is normalised. weight: `[width]` or null. out: contiguous.
#define DEFINE_RMS_NORM(NAME, T)                                                                                     \
    extern "C" void NAME(const T* x, int64_t outer_stride, int64_t inner_stride, const T* residual, T* total,        \
                         const T* weight, T* out, int64_t num_outer, int64_t num_inner, int64_t width, float eps,    \
                         float offset, int scale_in_float32, int threads) {                                          \
        autodeploy::with_team(threads, [&] {                                                                         \
            autodeploy::rms_norm<T>(x, outer_stride, inner_stride, residual, total, weight, out, num_outer,          \
                                    num_inner, width, eps, offset, scale_in_float32 != 0);                           \
        });                                                                                                          \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_RMS_NORM(rms_norm_float32, float)
DEFINE_RMS_NORM(rms_norm_bfloat16, autodeploy::bf16)

// x, gate, out: `[num_rows, groups · width]`, contiguous but for the gate's rows, which are `gate_stride` apart. weight:
// `[groups · width]`.
#define DEFINE_GATED_RMS_NORM(NAME, X, T)                                                                            \
    extern "C" void NAME(const X* x, const T* gate, int64_t gate_stride, const T* weight, X* out, int64_t num_rows,  \
                         int64_t groups, int64_t width, float eps, int is_silu, int gate_first,                      \
                         int scale_in_float32, int threads) {                                                        \
        autodeploy::with_team(threads, [&] {                                                                         \
            autodeploy::gated_rms_norm(x, gate, gate_stride, weight, out, num_rows, groups, width, eps,              \
                                       is_silu != 0, gate_first != 0, scale_in_float32 != 0);                        \
        });                                                                                                          \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_GATED_RMS_NORM(gated_rms_norm_float32, float, float)
DEFINE_GATED_RMS_NORM(gated_rms_norm_bfloat16, autodeploy::bf16, autodeploy::bf16)
DEFINE_GATED_RMS_NORM(gated_rms_norm_of_float32_bfloat16, float, autodeploy::bf16)

// x, out: `[num_rows, width]`, contiguous. weight, bias: `[width]` or null.
#define DEFINE_LAYER_NORM(NAME, T)                                                                                   \
    extern "C" void NAME(const T* x, const T* weight, const T* bias, T* out, int64_t num_rows, int64_t width,        \
                         float eps, int threads) {                                                                   \
        autodeploy::with_team(                                                                                       \
            threads, [&] { autodeploy::layer_norm<T>(x, weight, bias, out, num_rows, width, eps); });                \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_LAYER_NORM(layer_norm_float32, float)
DEFINE_LAYER_NORM(layer_norm_bfloat16, autodeploy::bf16)
