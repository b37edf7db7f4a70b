// The elementwise middle of a gated MLP: activation(gate) · up, in float32.

#include "activation.h"
#include "team.h"

namespace autodeploy {
namespace {

template <class T, Activation A>
void gate_rows(const T* gate_up, T* out, int64_t num_rows, int64_t width) {
    const int64_t block = 256, blocks_each = (width + block - 1) / block;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < num_rows * blocks_each; ++item) {
        const int64_t row = item / blocks_each, begin = item % blocks_each * block;
        const int64_t end = begin + block < width ? begin + block : width;
        const T *gate = gate_up + row * 2 * width, *up = gate + width;
        for (int64_t i = begin; i < end; i += LANES)
            store(out + row * width + i, activate<A>(load(gate + i, end - i)) * load(up + i, end - i), end - i);
    }
}

template <class T>
void gated_activation(const T* gate_up, T* out, int64_t num_rows, int64_t width, int activation) {
    switch (activation) {
        case SILU: return gate_rows<T, SILU>(gate_up, out, num_rows, width);
        case GELU: return gate_rows<T, GELU>(gate_up, out, num_rows, width);
        case GELU_TANH: return gate_rows<T, GELU_TANH>(gate_up, out, num_rows, width);
        case RELU: return gate_rows<T, RELU>(gate_up, out, num_rows, width);
        case SIGMOID: return gate_rows<T, SIGMOID>(gate_up, out, num_rows, width);
        case RELU2: return gate_rows<T, RELU2>(gate_up, out, num_rows, width);
        case QUICK_GELU: return gate_rows<T, QUICK_GELU>(gate_up, out, num_rows, width);
    }
}

}  // namespace
}  // namespace autodeploy

// gate_up: `[num_rows, 2 · width]`, gate first. out: `[num_rows, width]`. Both contiguous.
#define DEFINE_GATED_ACTIVATION(NAME, T)                                                                             \
    extern "C" void NAME(const T* gate_up, T* out, int64_t num_rows, int64_t width, int activation, int threads) {   \
        autodeploy::with_team(                                                                                       \
            threads, [&] { autodeploy::gated_activation<T>(gate_up, out, num_rows, width, activation); });           \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_GATED_ACTIVATION(gated_activation_float32, float)
DEFINE_GATED_ACTIVATION(gated_activation_bfloat16, autodeploy::bf16)
