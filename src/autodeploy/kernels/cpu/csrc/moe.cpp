// A mixture of experts: each weight of a chosen expert is read from memory once, for all its tokens. An expert's products
// with few tokens go row by row, with many by blocks.
//
// Choices are sorted by expert. First all up products, one work item per expert and block of its rows; then gates; then
// the down products, one work item per block of outputs, which adds the experts of a token in their order.

#include "amx_rows.h"
#include "experts.h"
#include "few_rows.h"
#include "gemm.h"
#include "team.h"

namespace autodeploy {
namespace {

constexpr int64_t FEW_ROWS = 16;  // of an expert that go by weight rows, not by blocks
constexpr int64_t STREAM = 4;     // rows up to which a weight is best read as one unbroken stream

template <class T>
struct Mixture : Choices, Gate {
    using Operand = typename Product<T>::Operand;
    const T* x;
    const float* weights;
    const T *gate_up, *down, *gate_up_bias, *down_bias;
    T* out;
    int64_t size, width;
    float* hidden;  // `[choices, rows of gate_up]`
    Operand* inner;  // `[choices, width]`
    float* totals;   // `[num_tokens, size]`

    int64_t rows() const { return gated ? 2 * width : width; }
};

// Whether `count` rows of `length` go by blocks; pairs of inputs have no half.
template <class T>
inline bool is_many(int64_t count, int64_t length) {
    return count > FEW_ROWS && length % Lane<T>::STEP == 0;
}

// Whether `count` rows go on tiles, where the weight is not laid out: beyond as many rows as a block has outputs that costs
// less than to lay out the rows.
template <class T>
inline bool is_for_tiles([[maybe_unused]] int64_t count) {
#if defined(AUTODEPLOY_AMX)
    if constexpr (std::is_same_v<T, bf16>) return has_tiles && count > STREAM && count <= OUTPUTS;
#endif
    return false;
}

// x: the rows from `begin` to `end`. emit(position, o, sums, lanes) as of blocks.
template <class T, class X, class Emit>
void multiply_on_tiles([[maybe_unused]] const T* weight, int64_t count, int64_t length, const X* x, int64_t begin,
                       int64_t end, const Emit& emit) {
#if defined(AUTODEPLOY_AMX)
    if constexpr (std::is_same_v<T, bf16>) {
        const PackedRows rows(x, end - begin, length);
        const TilesInUse tiles;
        multiply_packed_rows(weight, count, rows, [&](int64_t row, int64_t o, Floats sums, int64_t lanes) {
            emit(begin + row, o, sums, lanes);
        });
    }
#endif
}

// x as operands of the experts with few tokens; converted ones stand where `totals` will.
template <class T>
const typename Product<T>::Operand* operands(const Mixture<T>& m) {
    if constexpr (std::is_same_v<typename Product<T>::Operand, T>) {
        return m.x;
    } else {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < m.num_tokens; ++t) to_operands(m.x + t * m.size, m.size, m.totals + t * m.size);
        return m.totals;
    }
}

// The tokens of positions `[begin, end)` one after the other: a single one where it is, more in memory of this thread.
template <class T, class X>
const X* gathered(const Mixture<T>& m, const X* x, int64_t begin, int64_t end) {
    if (end - begin == 1) return x + m.token(begin) * m.size;
    X* own = own_memory<X>((end - begin) * m.size);
    for (int64_t position = begin; position < end; ++position)
        std::memcpy(own + (position - begin) * m.size, x + m.token(position) * m.size,
                    static_cast<size_t>(m.size) * sizeof(X));
    return own;
}

// emit(row, o, product) for the products of weight rows 0 .. count with a few rows of x, `length` apart.
template <class T, int M, class X, class Emit>
void multiply_expert_rows(const T* weight, int64_t count, int64_t length, const X* x, int64_t num_rows, Emit emit) {
    if (num_rows > STREAM) {
        for (int64_t at = 0; at < count; at += BLOCK)
            multiply_few_rows(weight + at * length, std::min(BLOCK, count - at), length, x, num_rows,
                              [&](int64_t row, int64_t o, float product) { emit(row, at + o, product); });
    } else if (num_rows == M) {
        const X* rows[M];
        for (int m = 0; m < M; ++m) rows[m] = x + m * length;
        for (int64_t o = 0; o < count; ++o) {
            float products[M];
            dot_products<T, M>(weight + o * length, rows, length, products);
            for (int m = 0; m < M; ++m) emit(m, o, products[m]);
        }
    } else if constexpr (M > 1) {
        multiply_expert_rows<T, M - 1>(weight, count, length, x, num_rows, emit);
    }
}

template <class T>
void multiply_up(const Mixture<T>& m, int64_t num_groups) {
    const auto* x = operands(m);
    const int64_t rows = m.rows(), blocks_each = (rows + OUTPUTS - 1) / OUTPUTS;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < num_groups * blocks_each; ++item) {
        const int64_t group = item / blocks_each, first = item % blocks_each * OUTPUTS;
        const int64_t begin = m.groups[group], end = m.groups[group + 1];
        const int64_t count = std::min(OUTPUTS, rows - first), expert = m.expert(begin);
        const T* weight = m.gate_up + (expert * rows + first) * m.size;
        const T* bias = m.gate_up_bias == nullptr ? nullptr : m.gate_up_bias + expert * rows + first;
        const auto emit = [&](int64_t position, int64_t o, Floats sums, int64_t lanes) {
            const Floats shift = bias == nullptr ? Floats{} : load(bias + o, lanes);
            store(m.hidden + position * rows + first + o, sums + shift, lanes);
        };
        if (is_many<T>(end - begin, m.size) && !is_for_tiles<T>(end - begin)) {
            const Gathered<T> tokens = {m.x, m.size, m.order, m.num_choices};
            for (int64_t slab = begin; slab < end; slab += SLAB)
                multiply_block<T>(tokens, slab, std::min(slab + SLAB, end), weight, count, m.size, emit);
            continue;
        }
        const typename Product<T>::Operand* tokens = gathered(m, x, begin, end);
        if (is_for_tiles<T>(end - begin)) {
            multiply_on_tiles(weight, count, m.size, tokens, begin, end, emit);
            continue;
        }
        multiply_expert_rows<T, STREAM>(weight, count, m.size, tokens, end - begin,
                                        [&](int64_t row, int64_t o, float product) {
                                            m.hidden[(begin + row) * rows + first + o] =
                                                product + (bias == nullptr ? 0.0f : to_float(bias[o]));
                                        });
    }
}

template <class T>
void gate(const Mixture<T>& m, int64_t count) {
#pragma omp for schedule(static)
    for (int64_t position = 0; position < count; ++position)
        m.apply(m.hidden + position * m.rows(), m.width, m.inner + position * m.width);
}

template <class T>
void multiply_down(const Mixture<T>& m, int64_t num_groups) {
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < m.size; first += OUTPUTS) {
        const int64_t outputs = std::min(OUTPUTS, m.size - first);
        for (int64_t t = 0; t < m.num_tokens; ++t)
            for (int64_t o = 0; o < outputs; ++o) m.totals[t * m.size + first + o] = 0.0f;
        for (int64_t group = 0; group < num_groups; ++group) {
            const int64_t begin = m.groups[group], end = m.groups[group + 1], expert = m.expert(begin);
            const T* weight = m.down + (expert * m.size + first) * m.width;
            const T* bias = m.down_bias == nullptr ? nullptr : m.down_bias + expert * m.size + first;
            const auto emit = [&](int64_t position, int64_t o, Floats sums, int64_t lanes) {
                const Floats shift = bias == nullptr ? Floats{} : load(bias + o, lanes);
                float* to = m.totals + m.token(position) * m.size + first + o;
                const float share = m.weights[m.order[position]];
                store(to, load(to, lanes) + (sums + shift) * share, lanes);
            };
            if (is_for_tiles<T>(end - begin)) {
                multiply_on_tiles(weight, outputs, m.width, m.inner + begin * m.width, begin, end, emit);
                continue;
            }
            if (is_many<T>(end - begin, m.width)) {
                const Consecutive<T> inner = {m.inner, m.width};
                for (int64_t slab = begin; slab < end; slab += SLAB)
                    multiply_block<T>(inner, slab, std::min(slab + SLAB, end), weight, outputs, m.width, emit);
                continue;
            }
            multiply_expert_rows<T, STREAM>(weight, outputs, m.width, m.inner + begin * m.width, end - begin,
                                            [&](int64_t row, int64_t o, float product) {
                                                const float shift = bias == nullptr ? 0.0f : to_float(bias[o]);
                                                m.totals[m.token(begin + row) * m.size + first + o] +=
                                                    m.weights[m.order[begin + row]] * (product + shift);
                                            });
        }
        for (int64_t t = 0; t < m.num_tokens; ++t)
            for (int64_t o = 0; o < outputs; ++o) {
                const int64_t at = t * m.size + first + o;
                assign(m.out[at], m.totals[at]);
            }
    }
}

template <class T>
void moe(const Mixture<T>& m) {
    int64_t num_groups;
#pragma omp single copyprivate(num_groups)
    num_groups = m.sort();
    multiply_up(m, num_groups);
    gate(m, m.groups[num_groups]);
    multiply_down(m, num_groups);
}

}  // namespace
}  // namespace autodeploy

// x, out: `[num_tokens, size]`. indices, weights: `[num_tokens, num_choices]`. gate_up: `[num_experts, rows, size]` with
// 2 · width rows, or width without a gate. down: `[num_experts, size, width]`. Biases: one per row, or null. The last
// five are scratch: choices, choices + 1, choices · rows, choices · width and num_tokens · size. All contiguous.
#define DEFINE_MOE(NAME, T)                                                                                          \
    extern "C" void NAME(const T* x, const int64_t* indices, const float* weights, const T* gate_up, const T* down,  \
                         const T* gate_up_bias, const T* down_bias, T* out, int64_t num_tokens, int64_t num_choices, \
                         int64_t num_experts, int64_t size, int64_t width, int activation, int gated, float limit,   \
                         float up_offset, int threads, int64_t* order, int64_t* groups, float* hidden,               \
                         autodeploy::Product<T>::Operand* inner, float* totals) {                                    \
        const autodeploy::Mixture<T> mixture = {                                                                     \
            {indices, num_tokens, num_choices, num_experts, order, groups},                                          \
            {activation, gated != 0, limit, up_offset},                                                              \
            x, weights, gate_up, down, gate_up_bias, down_bias, out, size, width, hidden, inner, totals};            \
        autodeploy::with_team(threads, [&] { autodeploy::moe(mixture); });                                           \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_MOE(moe_float32, float)
DEFINE_MOE(moe_bfloat16, autodeploy::bf16)
