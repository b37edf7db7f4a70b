// A mixture of experts with weights of 8 or 4 bits: each tile of a chosen expert is read once, for all its tokens.
//
// Choices are sorted by expert, and the rows of each expert's tokens laid out in panels of their own. First all up
// products, one work item per expert and tile; then gates; then the down products, one work item per tile of outputs,
// which adds the experts of a token in their order.

#include "experts.h"
#include "quantized.h"
#include "team.h"

namespace autodeploy {
namespace {

// The tiles of all experts' weights.
struct Stack {
    const uint8_t* weight;
    const fp16 *scales, *offsets;
    int64_t bits, tiles, blocks, num_groups;  // tiles of one expert

    Tile at(int64_t expert, int64_t tile) const {
        const int64_t index = expert * tiles + tile, first = index * num_groups * TILE;
        return {weight + index * blocks * bits * VECTOR, scales + first, offsets == nullptr ? nullptr : offsets + first,
                num_groups, blocks / num_groups};
    }
};

template <class T>
struct QuantizedMixture : Choices, Gate {
    const T* x;
    const float* weights;
    Stack up, down;
    const T *up_bias, *down_bias;
    T* out;
    int64_t size, width;
    int64_t* places;             // `[choices]`, the row in its panels of each position
    RoundedRows inputs, inners;  // by place
    float* hidden;               // `[choices, rows of up]`
    float* totals;               // `[num_tokens, size]`

    int64_t rows() const { return gated ? 2 * width : width; }
};

// emit(position, products) for 16 outputs of each of the positions begin .. end of one expert, M at a time.
template <int BITS, bool OFFSETS, int M, class Emit>
void group_products(const Tile& tile, const RoundedRows& x, const int64_t* places, int64_t begin, int64_t end,
                    const Emit& emit) {
    for (; begin + M <= end; begin += M) {
        Floats products[M];
        tile_products<BITS, OFFSETS, M>(tile, x.at<BITS>(places[begin]), x.width, products);
        for (int m = 0; m < M; ++m) emit(begin + m, products[m]);
    }
    if constexpr (M > 1) {
        if (begin < end) group_products<BITS, OFFSETS, M / 2>(tile, x, places, begin, end, emit);
    }
}

template <class Emit>
void group_products(const Stack& stack, const Tile& tile, const RoundedRows& x, const int64_t* places, int64_t begin,
                    int64_t end, const Emit& emit) {
    if (stack.bits == 8 && tile.offsets == nullptr)
        group_products<8, false, PANEL>(tile, x, places, begin, end, emit);
    else if (stack.bits == 8)
        group_products<8, true, PANEL>(tile, x, places, begin, end, emit);
    else if (tile.offsets == nullptr)
        group_products<4, false, PANEL>(tile, x, places, begin, end, emit);
    else
        group_products<4, true, PANEL>(tile, x, places, begin, end, emit);
}

template <class T>
void round_row(const Stack& stack, const RoundedRows& rows, int64_t place, const T* x, int64_t num_inputs) {
    const int32_t middle = stack.offsets == nullptr ? 1 << (stack.bits - 1) : 0;
    if (stack.bits == 8)
        rows.round_row<8>(place, x, num_inputs, middle);
    else
        rows.round_row<4>(place, x, num_inputs, middle);
}

// Each expert's positions begin a panel.
template <class T>
void place(const QuantizedMixture<T>& m, int64_t num_groups) {
    int64_t next = 0;
    for (int64_t group = 0; group < num_groups; ++group) {
        next = (next + PANEL - 1) / PANEL * PANEL;
        for (int64_t position = m.groups[group]; position < m.groups[group + 1]; ++position) m.places[position] = next++;
    }
}

template <class T>
void multiply_up(const QuantizedMixture<T>& m, int64_t num_groups) {
    const int64_t count = m.groups[num_groups], rows = m.rows();
#pragma omp for schedule(static)
    for (int64_t position = 0; position < count; ++position)
        round_row(m.up, m.inputs, m.places[position], m.x + m.token(position) * m.size, m.size);
#pragma omp for schedule(static)
    for (int64_t item = 0; item < num_groups * m.up.tiles; ++item) {
        const int64_t begin = m.groups[item / m.up.tiles], end = m.groups[item / m.up.tiles + 1];
        const int64_t tile = item % m.up.tiles, expert = m.expert(begin);
        const T* bias = m.up_bias == nullptr ? nullptr : m.up_bias + expert * rows + tile * TILE;
        const Floats shift = bias == nullptr ? Floats{} : load(bias);
        group_products(m.up, m.up.at(expert, tile), m.inputs, m.places, begin, end,
                       [&](int64_t position, Floats products) {
                           store(m.hidden + position * rows + tile * TILE, products + shift);
                       });
    }
#pragma omp for schedule(static)
    for (int64_t position = 0; position < count; ++position) {
        float* hidden = m.hidden + position * rows;
        m.apply(hidden, m.width, hidden);  // in place: what is overwritten has been read
        round_row(m.down, m.inners, m.places[position], hidden, m.width);
    }
}

template <class T>
void multiply_down(const QuantizedMixture<T>& m, int64_t num_groups) {
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < m.down.tiles; ++tile) {
        const int64_t first = tile * TILE;
        for (int64_t t = 0; t < m.num_tokens; ++t) store(m.totals + t * m.size + first, Floats{});
        for (int64_t group = 0; group < num_groups; ++group) {
            const int64_t begin = m.groups[group], expert = m.expert(begin);
            const T* bias = m.down_bias == nullptr ? nullptr : m.down_bias + expert * m.size + first;
            const Floats shift = bias == nullptr ? Floats{} : load(bias);
            group_products(m.down, m.down.at(expert, tile), m.inners, m.places, begin, m.groups[group + 1],
                           [&](int64_t position, Floats products) {
                               float* to = m.totals + m.token(position) * m.size + first;
                               store(to, load(to) + m.weights[m.order[position]] * (products + shift));
                           });
        }
        for (int64_t t = 0; t < m.num_tokens; ++t)
            store(m.out + t * m.size + first, load(m.totals + t * m.size + first));
    }
}

template <class T>
void quantized_moe(const QuantizedMixture<T>& m) {
    int64_t num_groups;
#pragma omp single copyprivate(num_groups)
    {
        num_groups = m.sort();
        place(m, num_groups);
    }
    multiply_up(m, num_groups);
    multiply_down(m, num_groups);
}

}  // namespace
}  // namespace autodeploy

// x, out: `[num_tokens, size]`. indices, weights: `[num_tokens, num_choices]`. up, down: the tiles of all experts, with
// up_groups and down_groups scales and offsets (or null) per row. Biases: one per row of each expert, or null. `size` and
// the rows of up (2 · width, or width without a gate) are multiples of 16. The last seven are scratch: choices,
// choices + 1, choices; Blocks of size and of width for 8 · experts chosen + choices rows; choices · rows; and
// num_tokens · size. All contiguous.
#define DEFINE_QUANTIZED_MOE(NAME, T)                                                                                \
    extern "C" void NAME(const T* x, const int64_t* indices, const float* weights, const uint8_t* up,                \
                         const autodeploy::fp16* up_scales, const autodeploy::fp16* up_offsets,                      \
                         const uint8_t* down, const autodeploy::fp16* down_scales,                                   \
                         const autodeploy::fp16* down_offsets, const T* up_bias, const T* down_bias, T* out,         \
                         int64_t num_tokens, int64_t num_choices, int64_t num_experts, int64_t size, int64_t width,  \
                         int64_t up_bits, int64_t up_groups, int64_t down_bits, int64_t down_groups, int activation, \
                         int gated, float limit, float up_offset, int threads, int64_t* order, int64_t* groups,      \
                         int64_t* places, void* inputs, void* inners, float* hidden,                                 \
                         float* totals) {                                                                            \
        using namespace autodeploy;                                                                                  \
        const int64_t size_blocks = (size + STEP - 1) / STEP, width_blocks = (width + STEP - 1) / STEP;              \
        const QuantizedMixture<T> mixture = {{indices, num_tokens, num_choices, num_experts, order, groups},                            \
                          {activation, gated != 0, limit, up_offset}, x, weights,                                    \
                          {up, up_scales, up_offsets, up_bits, (gated ? 2 * width : width) / TILE, size_blocks,      \
                           up_groups},                                                                               \
                          {down, down_scales, down_offsets, down_bits, size / TILE, width_blocks, down_groups},      \
                          up_bias, down_bias, out, size, width, places, {inputs, size_blocks, PANEL},       \
                          {inners, width_blocks, PANEL}, hidden, totals};                                            \
        with_team(threads, [&] { quantized_moe(mixture); });                                                         \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_QUANTIZED_MOE(quantized_moe_float32, float)
DEFINE_QUANTIZED_MOE(quantized_moe_bfloat16, autodeploy::bf16)
