// Attention over a paged key-value cache: pages are read in place, and each key and value once for all query heads that
// share it. Here for sequences that bring few new tokens; `attention_blocks.h` has those that bring many.
//
// A query's context is cut at multiples of PIECE positions. Pieces are attended independently, by any thread, and then
// combined by their softmax weights, so that a result depends neither on the number of threads nor on the batch.

#include <cstdlib>

#include "attention.h"
#include "attention_blocks.h"

namespace autodeploy {
namespace {

constexpr int64_t PIECE = 128;  // positions; a multiple of LANES
constexpr int GROUP = 4;        // query heads attended at once
constexpr int64_t FEW = 16;     // new tokens of a sequence up to which its keys are read once per token

// A stretch of one query token's context: positions `[begin, end)`, which do not cross a multiple of PIECE.
struct Piece {
    int64_t token;
    const int32_t* pages;
    int64_t begin, end;
};

// What is kept of a piece for one query head: the greatest score, the sum of weights, and (behind it) weighted values.
struct Partial {
    float greatest, total;
};

template <class T>
Status write_cache(const Call<T>& c) {
    const int64_t capacity = c.num_pages * c.page_size;
    for (int64_t token = 0; token < c.num_tokens; ++token)
        if (c.slot_mapping[token] < 0 || c.slot_mapping[token] >= capacity) return BAD_SLOT;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < c.num_tokens; ++token) {
        for (int64_t head = 0; head < c.num_kv_heads; ++head) {
            const int64_t entry = c.slot_mapping[token] * c.num_kv_heads + head;
            std::memcpy(c.key_cache + entry * c.head_dim,
                        c.key + token * c.key_token_stride + head * c.key_head_stride,
                        static_cast<size_t>(c.head_dim) * sizeof(T));
            std::memcpy(c.value_cache + entry * c.value_dim,
                        c.value + token * c.value_token_stride + head * c.value_head_stride,
                        static_cast<size_t>(c.value_dim) * sizeof(T));
        }
    }
    return DONE;
}

// Calls `visit(token, pages, begin, end)` for every query token of sequences that bring at most FEW tokens: the
// positions it may see are `[begin, end)`.
template <class T, class Visit>
Status for_each_query(const Call<T>& c, Visit visit) {
    for (int64_t s = 0; s < c.num_sequences; ++s) {
        const int64_t first = c.cu_seqlens[s], count = c.cu_seqlens[s + 1] - first, length = c.seq_lens[s];
        if (count == 0) continue;
        const bool is_inside = first >= 0 && count > 0 && first + count <= c.num_tokens && count <= length;
        if (!is_inside || length > c.page_table_width * c.page_size) return BAD_BORDERS;
        if (count > FEW) continue;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t position = length - count + i;
            const Range range = visible(c, position, length);
            visit(first + i, c.page_table + s * c.page_table_width, range.begin, range.end);
        }
    }
    return DONE;
}

template <class T, int G, int W>
void add_weighted_values(const T* const* values, const float weights[GROUP][PIECE], int64_t count, int64_t at,
                         float* const* out, int64_t lanes) {
    Floats totals[G][W] = {};
    for (int64_t j = 0; j < count; ++j) {
        for (int w = 0; w < W; ++w) {
            const Floats value = W > 1 ? load(values[j] + at + w * LANES) : load(values[j] + at, lanes);
            for (int g = 0; g < G; ++g) totals[g][w] = value * weights[g][j] + totals[g][w];
        }
    }
    for (int g = 0; g < G; ++g)
        for (int w = 0; w < W; ++w) store(out[g] + at + w * LANES, totals[g][w], W > 1 ? LANES : lanes);
}

// Turns scores into weights, e^(score - greatest). When all are -inf the weights are 0, and NaN once divided.
inline Partial to_weights(float* scores, int64_t count, float scale, float softcap) {
    float greatest = -__builtin_inff();
    for (int64_t j = 0; j < count; j += LANES) {
        Floats score = load(scores + j) * scale;
        if (softcap > 0.0f) score = tanh(score / softcap) * softcap;
        store(scores + j, score);
    }
    for (int64_t j = count; j % LANES != 0; ++j) scores[j] = -__builtin_inff();
    for (int64_t j = 0; j < count; j += LANES) greatest = max(load(scores + j), greatest);
    const float shift = greatest == -__builtin_inff() ? 0.0f : greatest;
    Floats total = {};
    for (int64_t j = 0; j < count; j += LANES) {
        const Floats weight = exp(load(scores + j) - shift);
        store(scores + j, weight);
        total = total + weight;
    }
    return {greatest, sum(total)};
}

template <class T, int G, class X>
void multiply_keys(const T* const* keys, int64_t count, const X* const* queries, int64_t head_dim,
                   float weights[GROUP][PIECE]) {
    for (int64_t j = 0; j < count; ++j) {
        float products[G];
        dot_products<T, G>(keys[j], queries, head_dim, products);
        for (int g = 0; g < G; ++g) weights[g][j] = products[g];
    }
}

// G query heads over one piece. `partials` and the values behind them are the heads' places in the scratch memory.
template <class T, int G>
void attend(const Call<T>& c, const T* query, const T* const* keys, const T* const* values, int64_t count,
            float* partials, int64_t partial_size) {
    using X = typename Product<T>::Operand;
    const X* queries[G];
    float weights[GROUP][PIECE];
    float* out[G];
    if constexpr (!std::is_same_v<X, T>) {
        X* own = own_memory<X>(G * c.head_dim);
        for (int g = 0; g < G; ++g, own += c.head_dim) {
            to_operands(query + g * c.query_head_stride, c.head_dim, own);
            queries[g] = own;
        }
    } else {
        for (int g = 0; g < G; ++g) queries[g] = query + g * c.query_head_stride;
    }
    multiply_keys<T, G>(keys, count, queries, c.head_dim, weights);
    for (int g = 0; g < G; ++g) {
        for (int64_t tail = count; tail % LANES != 0; ++tail) weights[g][tail] = 0.0f;
        const Partial partial = to_weights(weights[g], count, c.scale, c.softcap);
        partials[g * partial_size] = partial.greatest;
        partials[g * partial_size + 1] = partial.total;
        out[g] = partials + g * partial_size + 2;
    }
    int64_t at = 0;
    for (; at + 4 * LANES <= c.value_dim; at += 4 * LANES)
        add_weighted_values<T, G, 4>(values, weights, count, at, out, LANES);
    for (; at < c.value_dim; at += LANES)
        add_weighted_values<T, G, 1>(values, weights, count, at, out, c.value_dim - at);
}

// All query heads of one key-value head over one piece.
template <class T>
Status attend_piece(const Call<T>& c, const Piece& piece, int64_t kv_head, float* partials, int64_t partial_size) {
    const T *keys[PIECE], *values[PIECE];
    const int64_t count = piece.end - piece.begin, heads_each = c.num_heads / c.num_kv_heads;
    const int32_t* page = piece.pages + piece.begin / c.page_size;
    int64_t offset = piece.begin % c.page_size;
    for (int64_t j = 0; j < count; ++page, offset = 0) {
        if (*page < 0 || *page >= c.num_pages) return BAD_PAGE;
        for (; j < count && offset < c.page_size; ++j, ++offset) {
            const int64_t entry = (*page * c.page_size + offset) * c.num_kv_heads + kv_head;
            keys[j] = c.key_cache + entry * c.head_dim;
            values[j] = c.value_cache + entry * c.value_dim;
        }
    }
    for (int64_t head = kv_head * heads_each; head < (kv_head + 1) * heads_each;) {
        const int64_t left = (kv_head + 1) * heads_each - head;
        const T* query = c.query + piece.token * c.query_token_stride + head * c.query_head_stride;
        float* place = partials + head * partial_size;
        switch (left < GROUP ? left : GROUP) {
            case 1: attend<T, 1>(c, query, keys, values, count, place, partial_size); break;
            case 2: attend<T, 2>(c, query, keys, values, count, place, partial_size); break;
            case 3: attend<T, 3>(c, query, keys, values, count, place, partial_size); break;
            default: attend<T, 4>(c, query, keys, values, count, place, partial_size);
        }
        head += left < GROUP ? left : GROUP;
    }
    return DONE;
}

// One query head's result from its pieces' partial ones, whose greatest scores become the factors they are scaled by.
template <class T>
void combine(const Call<T>& c, int64_t token, int64_t head, float* partials, int64_t num_pieces, int64_t piece_size) {
    float greatest = c.sinks == nullptr ? -__builtin_inff() : c.sinks[head];
    for (int64_t p = 0; p < num_pieces; ++p) {
        const float other = partials[p * piece_size];
        greatest = other > greatest ? other : greatest;
    }
    const float shift = greatest == -__builtin_inff() ? 0.0f : greatest;
    float total = c.sinks == nullptr ? 0.0f : exp(splat(c.sinks[head] - shift))[0];
    for (int64_t p = 0; p < num_pieces; ++p) {
        float* partial = partials + p * piece_size;
        partial[0] = exp(splat(partial[0] - shift))[0];
        total += partial[1] * partial[0];
    }
    T* out = c.out + (token * c.num_heads + head) * c.value_dim;
    for (int64_t at = 0; at < c.value_dim; at += LANES) {
        Floats result = {};
        for (int64_t p = 0; p < num_pieces; ++p)
            result = load(partials + p * piece_size + 2 + at, c.value_dim - at) * partials[p * piece_size] + result;
        store(out + at, result / total, c.value_dim - at);
    }
}

// What a team shares while it attends: the pieces of all query tokens, and their partial results.
struct Shared {
    Piece* pieces;
    int64_t* starts;  // where each query token's pieces begin
    float* partials;
    Status* fault;
    void* memory;

    static Shared allocate(int64_t num_pieces, int64_t num_queries, int64_t piece_size) {
        const size_t piece_bytes = static_cast<size_t>(num_pieces) * sizeof(Piece);
        const size_t start_bytes = static_cast<size_t>(num_queries + 1) * sizeof(int64_t);
        const size_t partial_bytes = static_cast<size_t>(num_pieces * piece_size) * sizeof(float);
        char* memory = static_cast<char*>(std::malloc(piece_bytes + start_bytes + partial_bytes + sizeof(Status)));
        return {reinterpret_cast<Piece*>(memory), reinterpret_cast<int64_t*>(memory + piece_bytes),
                reinterpret_cast<float*>(memory + piece_bytes + start_bytes),
                reinterpret_cast<Status*>(memory + piece_bytes + start_bytes + partial_bytes), memory};
    }
};

template <class T>
void fill(const Call<T>& c, const Shared& shared) {
    int64_t piece = 0, query = 0;
    for_each_query(c, [&](int64_t token, const int32_t* pages, int64_t begin, int64_t end) {
        shared.starts[query++] = piece;
        for (int64_t at = begin; at < end; at = (at / PIECE + 1) * PIECE) {
            const int64_t border = at / PIECE * PIECE + PIECE;
            shared.pieces[piece++] = {token, pages, at, border < end ? border : end};
        }
    });
    shared.starts[query] = piece;
    *shared.fault = DONE;
}

template <class T>
Status attend_all(const Call<T>& c) {
    int64_t num_pieces = 0, num_queries = 0;
    const Status checked = for_each_query(c, [&](int64_t, const int32_t*, int64_t begin, int64_t end) {
        ++num_queries;
        num_pieces += (end - 1) / PIECE - begin / PIECE + 1;
    });
    if (checked != DONE || num_queries == 0) return checked;
    const int64_t partial_size = (2 + c.value_dim + LANES - 1) / LANES * LANES;
    const int64_t piece_size = partial_size * c.num_heads;
    Shared shared;
#pragma omp single copyprivate(shared)
    {
        shared = Shared::allocate(num_pieces, num_queries, piece_size);
        if (shared.memory != nullptr) fill(c, shared);
    }
    if (shared.memory == nullptr) return OUT_OF_MEMORY;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < num_pieces * c.num_kv_heads; ++item) {
        const int64_t p = item / c.num_kv_heads;
        const Status found = attend_piece(c, shared.pieces[p], item % c.num_kv_heads, shared.partials + p * piece_size,
                                          partial_size);
        if (found != DONE) {
#pragma omp atomic write
            *shared.fault = found;
        }
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < num_queries * c.num_heads; ++item) {
        const int64_t q = item / c.num_heads, head = item % c.num_heads, start = shared.starts[q];
        combine(c, shared.pieces[start].token, head, shared.partials + start * piece_size + head * partial_size,
                shared.starts[q + 1] - start, piece_size);
    }
    const Status status = *shared.fault;
#pragma omp barrier
#pragma omp single nowait
    std::free(shared.memory);
    return status;
}

template <class T>
Status cached_attention(const Call<T>& call) {
    Status status = write_cache(call);
    if (status == DONE) status = attend_all(call);
    for (int64_t s = 0; s < call.num_sequences && status == DONE; ++s)
        if (call.cu_seqlens[s + 1] - call.cu_seqlens[s] > FEW) status = attend_blocks(call, s);
    return status;
}

// Whether a team is worth starting.
template <class T>
bool is_large(const Call<T>& c) {
    int64_t num_keys = 0;
    for (int64_t s = 0; s < c.num_sequences; ++s) num_keys += c.seq_lens[s];
    return c.num_tokens > 64 || num_keys * c.num_heads * (c.head_dim + c.value_dim) > 32768;
}

}  // namespace
}  // namespace autodeploy

// Writes every new token's key and value to its slot, then attends. Shapes as in the op; query, key and value have
// strides in elements for tokens and heads, the last 1; everything else is contiguous. sinks: `[num_heads]` or null. window, chunk and softcap
// are 0 when there is none. Returns 0, or what was wrong by its number in `Status`.
#define DEFINE_CACHED_ATTENTION(NAME, T)                                                                             \
    extern "C" int NAME(                                                                                             \
        const T* query, int64_t query_token_stride, int64_t query_head_stride, const T* key,                         \
        int64_t key_token_stride, int64_t key_head_stride, const T* value, int64_t value_token_stride,               \
        int64_t value_head_stride, const int32_t* cu_seqlens, const int32_t* seq_lens, int64_t num_sequences,        \
        const int32_t* page_table, int64_t page_table_width, const int64_t* slot_mapping, T* key_cache,              \
        T* value_cache, int64_t num_pages, int64_t page_size, int64_t num_tokens, int64_t num_heads,                 \
        int64_t num_kv_heads, int64_t head_dim, int64_t value_dim, const float* sinks, float scale, int causal,      \
        int64_t window, int64_t chunk, float softcap, T* out, int threads) {                        \
        const autodeploy::Call<T> call = {                                                                           \
            query, key, value, query_token_stride, query_head_stride, key_token_stride, key_head_stride,             \
            value_token_stride, value_head_stride, cu_seqlens, seq_lens, page_table, page_table_width, slot_mapping, \
            key_cache, value_cache, num_pages, page_size, num_sequences, num_tokens, num_heads, num_kv_heads,        \
            head_dim, value_dim, sinks, scale, causal != 0, window, chunk, softcap, out};                            \
        if (threads > 1 && !autodeploy::is_large(call)) threads = 1;                                                 \
        int status = 0;                                                                                              \
        autodeploy::with_team(threads, [&] {                                                                         \
            const int found = autodeploy::cached_attention(call);                                                    \
            if (found != 0) {                                                                                        \
                _Pragma("omp atomic write") status = found;                                                          \
            }                                                                                                        \
        });                                                                                                          \
        return status;                                                                                               \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_CACHED_ATTENTION(cached_attention_float32, float)
DEFINE_CACHED_ATTENTION(cached_attention_bfloat16, autodeploy::bf16)
