// Attention for a sequence that brings many new tokens at once: keys and values are read from their pages once, laid
// out for a matrix product, and multiplied with tiles of query rows (arXiv 2307.08691).
//
// A query row is one head of one new token; the heads that share a key-value head are rows of one product. Scores, sums
// and results are float32; on machines with AMX or AVX512-BF16, products of bfloat16 take the instructions made for them.

#pragma once

#include <algorithm>
#include <cstdlib>

#include "attention.h"
#include "gemm.h"

namespace autodeploy {
namespace {

constexpr int KEYS = 128;  // positions in a block
#if defined(AUTODEPLOY_AMX)
constexpr int ROWS = SIDE;  // rows of a tile
#else
constexpr int ROWS = TILE_ROWS;
#endif
constexpr int64_t TOKENS = 48;             // new tokens in a work item: whole tiles, however many heads share keys
constexpr int PANEL_LANES = COLUMNS * LANES;  // columns of a tile: keys, or values of a head
constexpr float LOG2_E = 1.44269504f;

// One sequence's work: sizes, and where its packed keys and values are, per key-value head and block.
template <class T>
struct Blocks {
    using E = typename Lane<T>::Element;
    static constexpr int STEP = Lane<T>::STEP;
    const Call<T>& c;
    int64_t sequence, first_token, count, length, first_seen, first_block, num_blocks;
    int64_t depth, width;  // head_dim and value_dim, rounded up to whole vectors
    E *keys, *values;

    int64_t group() const { return c.num_heads / c.num_kv_heads; }
    E* block_keys(int64_t head, int64_t block) const { return keys + (head * num_blocks + block) * depth * KEYS; }
    E* block_values(int64_t head, int64_t block) const { return values + (head * num_blocks + block) * KEYS * width; }
};

// Keys as [KEYS / PANEL_LANES][depth / STEP][PANEL_LANES][STEP], values as [width / PANEL_LANES][KEYS / STEP][PANEL_LANES]
// [STEP], whose last panel may have fewer lanes; what does not exist is zero.
template <class T>
Status pack_block(const Blocks<T>& b, int64_t head, int64_t block) {
    using L = Lane<T>;
    const Call<T>& c = b.c;
    typename L::Element *keys = b.block_keys(head, block), *values = b.block_values(head, block);
    T* gathered = own_memory<T>(LANES * b.depth);
    std::memset(static_cast<void*>(values), 0, sizeof(*values) * static_cast<size_t>(KEYS * b.width));
    const int32_t* pages = c.page_table + b.sequence * c.page_table_width;
    const int64_t begin = (b.first_block + block) * KEYS;
    for (int64_t first = 0; first < KEYS; first += LANES) {
        std::memset(static_cast<void*>(gathered), 0, sizeof(T) * static_cast<size_t>(LANES * b.depth));
        // Before the first position that any query sees, pages may be gone already.
        const int64_t end = std::min<int64_t>(first + LANES, b.length - begin);
        for (int64_t j = std::max(first, b.first_seen - begin); j < end; ++j) {
            const int64_t page = pages[(begin + j) / c.page_size];
            if (page < 0 || page >= c.num_pages) return BAD_PAGE;
            const int64_t entry = (page * c.page_size + (begin + j) % c.page_size) * c.num_kv_heads + head;
            std::memcpy(gathered + (j - first) * b.depth, c.key_cache + entry * c.head_dim,
                        static_cast<size_t>(c.head_dim) * sizeof(T));
            const T* value = c.value_cache + entry * c.value_dim;
            for (int64_t at = 0; at < c.value_dim; at += PANEL_LANES) {
                const int64_t lanes = std::min<int64_t>(b.width - at, PANEL_LANES);
                const int64_t count = std::min<int64_t>(c.value_dim - at, PANEL_LANES);
                typename L::Element* row = values + at * KEYS + j / L::STEP * lanes * L::STEP + j % L::STEP;
                if constexpr (L::STEP == 1)
                    to_operands(value + at, count, row);
                else
                    for (int64_t d = 0; d < count; ++d) L::set(row + d * L::STEP, value[at + d]);
            }
        }
        pack_outputs<T>(gathered, b.depth, LANES, b.depth,
                        keys + first / PANEL_LANES * PANEL_LANES * b.depth + first % PANEL_LANES * L::STEP,
                        PANEL_LANES * L::STEP);
    }
    return DONE;
}

// What is kept of a query row between blocks. Scores are logarithms to the base 2.
struct Row {
    int64_t begin, end;  // positions it sees
    float greatest, total;
};

// Scores of a tile's rows become weights, for the positions `[from, to)` of a block, which are whole vectors. `factors`
// become those for what each row has gathered so far.
template <class T>
inline void update_rows(const Call<T>& c, Row* rows, float* scores, int64_t block_begin, int64_t from, int64_t to,
                        typename Lane<T>::Element* weights, float factors[LANES]) {
    float shifts[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        Row& row = rows[r];
        float* own = scores + r * KEYS;
        for (int64_t j = from; j < to && block_begin + j < row.begin; ++j) own[j] = -__builtin_inff();
        for (int64_t j = std::max(from, row.end - block_begin); j < to; ++j) own[j] = -__builtin_inff();
        Floats highest = splat(-__builtin_inff());
        for (int64_t j = from; j < to; j += LANES) {
            Floats score = load(own + j);
            if (c.softcap > 0.0f) {
                const Floats capped = tanh(score * c.scale / c.softcap) * (c.softcap * LOG2_E);
                score = select(score == -__builtin_inff(), score, capped);
            } else {
                score = score * (c.scale * LOG2_E);
            }
            store(own + j, score);
            highest = select(score > highest, score, highest);
        }
        const float found = greatest_lane(highest), greatest = found > row.greatest ? found : row.greatest;
        shifts[r] = greatest == -__builtin_inff() ? 0.0f : greatest;
        factors[r] = row.greatest - shifts[r];
        row.greatest = greatest;
    }
    store(factors, exp2_below_one(load(factors)));
    for (int r = 0; r < ROWS; ++r) {
        using V = Register<float>::Sums;  // larger vectors would need more registers than there are
        V total = {};
        for (int64_t j = r * KEYS + from; j < r * KEYS + to; j += SIZE<V>) {
            const V weight = exp2_below_one(load_vector<V>(scores + j) - shifts[r]);
            Lane<T>::set(weights + j, weight);
            total = total + weight;
        }
        rows[r].total = rows[r].total * factors[r] + sum(total);
    }
}

// Memory of one thread: a work item's query rows, what they have gathered, and one tile's scores and weights.
template <class T>
struct Scratch {
    using E = typename Lane<T>::Element;
    Row* rows;
    E *queries, *weights;
    float *gathered, *scores;
    void* memory;

    Scratch(const Blocks<T>& b, int64_t num_rows) {
        const size_t sizes[] = {sizeof(Row) * static_cast<size_t>(num_rows),
                                sizeof(E) * static_cast<size_t>(num_rows * b.depth), sizeof(E) * ROWS * KEYS,
                                sizeof(float) * static_cast<size_t>(num_rows * b.width), sizeof(float) * ROWS * KEYS};
        size_t at[5], end = 0;
        for (int i = 0; i < 5; ++i) {
            at[i] = end;
            end += (sizes[i] + 63) / 64 * 64;
        }
        memory = std::aligned_alloc(64, end);
        char* base = static_cast<char*>(memory);
        rows = reinterpret_cast<Row*>(base + at[0]);
        queries = reinterpret_cast<E*>(base + at[1]);
        weights = reinterpret_cast<E*>(base + at[2]);
        gathered = reinterpret_cast<float*>(base + at[3]);
        scores = reinterpret_cast<float*>(base + at[4]);
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(memory); }
};

// `multiply_tile` of a tile of rows.
template <class T, int V, bool ADD>
inline void multiply_rows_with(const typename Lane<T>::Element* rows, int64_t row_stride,
                               const typename Lane<T>::Element* packed, int64_t step_stride, int64_t depth,
                               float* totals, int64_t total_stride) {
#if defined(AUTODEPLOY_AMX)
    if constexpr (std::is_same_v<T, bf16>)
        if (has_tiles)
            return multiply_by_tiles<ADD>(rows, row_stride, ROWS, packed, step_stride, V * LANES, depth, totals,
                                          total_stride, 0);
#endif
    constexpr int LAST = ROWS / TILE_ROWS * TILE_ROWS;
    for (int r = 0; r < LAST; r += TILE_ROWS)
        multiply_tile<T, TILE_ROWS, V, ADD>(rows + r * row_stride, row_stride, packed, step_stride, depth,
                                            totals + r * total_stride, total_stride);
    if constexpr (LAST < ROWS)
        multiply_tile<T, ROWS - LAST, V, ADD>(rows + LAST * row_stride, row_stride, packed, step_stride, depth,
                                              totals + LAST * total_stride, total_stride);
}

// One tile of rows over one block.
template <class T>
void attend_tile(const Blocks<T>& b, const Scratch<T>& s, int64_t first_row, int64_t head, int64_t block) {
    using L = Lane<T>;
    const int64_t block_begin = (b.first_block + block) * KEYS;
    int64_t from = KEYS, to = 0;
    for (int r = 0; r < ROWS; ++r) {
        const Row& row = s.rows[first_row + r];
        if (row.begin >= std::min(row.end, block_begin + KEYS) || row.end <= block_begin) continue;
        from = std::min(from, std::max<int64_t>(row.begin - block_begin, 0));
        to = std::max(to, std::min<int64_t>(row.end - block_begin, KEYS));
    }
    if (from >= to) return;
    from = from / PANEL_LANES * PANEL_LANES;
    to = (to + PANEL_LANES - 1) / PANEL_LANES * PANEL_LANES;
    for (int64_t j = from; j < to; j += PANEL_LANES)
        multiply_rows_with<T, COLUMNS, false>(s.queries + first_row * b.depth, b.depth,
                                              b.block_keys(head, block) + j * b.depth, PANEL_LANES * L::STEP, b.depth,
                                              s.scores + j, KEYS);
    alignas(64) float factors[LANES] = {};
    update_rows(b.c, s.rows + first_row, s.scores, block_begin, from, to, s.weights, factors);
    float* gathered = s.gathered + first_row * b.width;
    for (int r = 0; r < ROWS; ++r) {
        if (factors[r] == 1.0f) continue;
        for (int64_t d = r * b.width; d < (r + 1) * b.width; d += LANES)
            store(gathered + d, load(gathered + d) * factors[r]);
    }
    for (int64_t d = 0; d < b.width; d += PANEL_LANES) {
        const int64_t lanes = std::min<int64_t>(b.width - d, PANEL_LANES);
        const auto* values = b.block_values(head, block) + d * KEYS + from * lanes;
        if (lanes == PANEL_LANES) {
            multiply_rows_with<T, COLUMNS, true>(s.weights + from, KEYS, values, lanes * L::STEP, to - from,
                                                 gathered + d, b.width);
            continue;
        }
        for (int64_t v = 0; v < lanes; v += LANES)
            multiply_rows_with<T, 1, true>(s.weights + from, KEYS, values + v * L::STEP, lanes * L::STEP, to - from,
                                           gathered + d + v, b.width);
    }
}

// TOKENS new tokens from `first` on, for the query heads of one key-value head.
template <class T>
void attend_item(const Blocks<T>& b, const Scratch<T>& s, int64_t first, int64_t head) {
    const Call<T>& c = b.c;
    const int64_t group = b.group(), tokens = b.count - first < TOKENS ? b.count - first : TOKENS;
    const int64_t num_rows = tokens * group, padded = (num_rows + ROWS - 1) / ROWS * ROWS;
    std::memset(static_cast<void*>(s.queries), 0, sizeof(*s.queries) * static_cast<size_t>(padded * b.depth));
    std::memset(s.gathered, 0, sizeof(float) * static_cast<size_t>(padded * b.width));
    for (int64_t r = 0; r < padded; ++r) {
        Range range = {0, 0};
        if (r < num_rows) {
            range = visible(c, b.length - b.count + first + r / group, b.length);
            const T* query = c.query + (b.first_token + first + r / group) * c.query_token_stride +
                             (head * group + r % group) * c.query_head_stride;
            to_operands(query, c.head_dim, s.queries + r * b.depth);
        }
        s.rows[r] = {range.begin, range.end, -__builtin_inff(), 0.0f};
    }
#if defined(AUTODEPLOY_AMX)
    const TilesInUse tiles(std::is_same_v<T, bf16>);
#endif
    for (int64_t block = 0; block < b.num_blocks; ++block)
        for (int64_t row = 0; row < padded; row += ROWS) attend_tile(b, s, row, head, block);
    for (int64_t r = 0; r < num_rows; ++r) {
        const int64_t query_head = head * group + r % group;
        const Row& row = s.rows[r];
        float factor = 1.0f, total = row.total;
        if (c.sinks != nullptr) {
            const float sink = c.sinks[query_head] * LOG2_E, greatest = row.greatest > sink ? row.greatest : sink;
            factor = exp2_below_one(splat(row.greatest - greatest))[0];
            total = total * factor + exp2_below_one(splat(sink - greatest))[0];
        }
        T* out = c.out + ((b.first_token + first + r / group) * c.num_heads + query_head) * c.value_dim;
        const float* gathered = s.gathered + r * b.width;
        for (int64_t d = 0; d < c.value_dim; d += LANES)
            store(out + d, load(gathered + d) * factor / total, c.value_dim - d);
    }
}

// All new tokens of one sequence. Every thread of the team comes here.
template <class T>
Status attend_blocks(const Call<T>& c, int64_t sequence) {
    using E = typename Lane<T>::Element;
    const int64_t first_token = c.cu_seqlens[sequence], count = c.cu_seqlens[sequence + 1] - first_token;
    const int64_t length = c.seq_lens[sequence];
    const int64_t first_seen = visible(c, length - count, length).begin, first_block = first_seen / KEYS;
    const int64_t num_blocks = (length + KEYS - 1) / KEYS - first_block;
    constexpr int64_t UNIT = LANES * Lane<T>::STEP;
    const int64_t depth = (c.head_dim + UNIT - 1) / UNIT * UNIT, width = (c.value_dim + LANES - 1) / LANES * LANES;
    const size_t size = static_cast<size_t>(c.num_kv_heads * num_blocks * KEYS * (depth + width)) * sizeof(E);
    E* packed;      // behind it, in a cache line of its own, what went wrong
    Status* fault;
#pragma omp single copyprivate(packed, fault)
    {
        const size_t end = (size + 63) / 64 * 64;
        packed = static_cast<E*>(std::aligned_alloc(64, end + 64));
        fault = reinterpret_cast<Status*>(reinterpret_cast<char*>(packed) + end);
        if (packed != nullptr) *fault = DONE;
    }
    if (packed == nullptr) return OUT_OF_MEMORY;
    E* packed_values = packed + c.num_kv_heads * num_blocks * KEYS * depth;
    const Blocks<T> b = {c,          sequence,    first_token,   count, length, first_seen,
                         first_block, num_blocks, depth, width, packed, packed_values};
    const int64_t num_items = (count + TOKENS - 1) / TOKENS * c.num_kv_heads;
    const Scratch<T> scratch(b, (TOKENS * b.group() + ROWS - 1) / ROWS * ROWS);
    Status found = scratch.memory == nullptr ? OUT_OF_MEMORY : DONE;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < c.num_kv_heads * num_blocks; ++item) {
        const Status wrong = pack_block(b, item / num_blocks, item % num_blocks);
        if (wrong != DONE) found = wrong;
    }
    if (found != DONE) {
#pragma omp atomic write
        *fault = found;
    }
#pragma omp barrier
    const Status agreed = *fault;
    if (agreed == DONE) {
        // The last tokens see most: they go first, so that threads end together.
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < num_items; ++item) {
            const int64_t tile = (num_items - 1 - item) / c.num_kv_heads;
            attend_item(b, scratch, tile * TOKENS, item % c.num_kv_heads);
        }
    }
#pragma omp barrier
#pragma omp single nowait
    std::free(packed);
    return agreed;
}

}  // namespace
}  // namespace autodeploy
