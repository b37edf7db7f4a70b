// Activation functions of MLPs, in float32.

#pragma once

#include "simd.h"

namespace autodeploy {
namespace {

enum Activation { SILU, GELU, GELU_TANH, RELU, SIGMOID, RELU2, QUICK_GELU };  // the order that mlp.py numbers them in

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp(-x)); }

// 1 + erf(x) to an absolute error of 2e-7 (Abramowitz and Stegun 7.1.26).
inline Floats one_plus_erf(Floats x) {
    const Floats magnitude = select(x < 0.0f, -x, x);
    const Floats t = 1.0f / (1.0f + 0.3275911f * magnitude);
    Floats p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const Floats tail = p * t * exp(-x * x);
    return select(x < 0.0f, tail, 2.0f - tail);
}

template <Activation A>
inline Floats activate(Floats x) {
    if constexpr (A == SILU) return x * sigmoid(x);
    if constexpr (A == GELU) return 0.5f * x * one_plus_erf(x * 0.70710678f);
    if constexpr (A == GELU_TANH) return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
    if constexpr (A == RELU) return select(x < 0.0f, splat(0.0f), x);
    if constexpr (A == SIGMOID) return sigmoid(x);
    if constexpr (A == RELU2) return select(x < 0.0f, splat(0.0f), x * x);
    if constexpr (A == QUICK_GELU) return x * sigmoid(1.702f * x);
}

// One activation, known when the program runs.
inline Floats activate(int activation, Floats x) {
    switch (activation) {
        case SILU: return activate<SILU>(x);
        case GELU: return activate<GELU>(x);
        case GELU_TANH: return activate<GELU_TANH>(x);
        case RELU: return activate<RELU>(x);
        case SIGMOID: return activate<SIGMOID>(x);
        case RELU2: return activate<RELU2>(x);
        default: return activate<QUICK_GELU>(x);
    }
}

}  // namespace
}  // namespace autodeploy
