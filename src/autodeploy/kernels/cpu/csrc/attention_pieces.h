// Attention of single query tokens to a paged cache: pages are read in place, and each key and value once for all query
// heads that share it.
//
// A query's context is cut at multiples of PIECE positions. Pieces are attended independently, by any thread, and then
// combined by their softmax weights, so that a result depends neither on the number of threads nor on the batch.

#pragma once

#include <algorithm>
#include <cstdlib>

#include "attention.h"

namespace autodeploy {
namespace {

constexpr int64_t PIECE = 64;              // positions; a multiple of LANES
constexpr int GROUP = 4;                   // query heads attended at once
constexpr int64_t KEYS_AHEAD = 16;         // keys that are fetched before they are used
constexpr int64_t HEADS = 16;              // query heads in a work item, a multiple of GROUP
constexpr int64_t RUNS_PER_THREAD = 4;     // runs of work items, so that threads end together
constexpr int64_t PARTIALS = 16 << 20;     // floats of partial results that are kept at a time, if one query allows it

// A stretch of one query token's context: positions `[begin, end)`, which do not cross a multiple of PIECE.
struct Piece {
    int64_t token, position;
    const int32_t* pages;
    int64_t begin, end;
};

// What is kept of a piece for one query head: the greatest score, the sum of weights, and (behind it) weighted values.
struct Partial {
    float greatest, total;
};

// Calls `visit(token, position, pages, range)` for every query token of sequences that bring few tokens: its position in
// its sequence, and those that it may see.
template <class T, class Visit>
Status for_each_query(const Call<T>& c, Visit visit) {
    for (int64_t s = 0; s < c.num_sequences; ++s) {
        const int64_t first = c.cu_seqlens[s], count = c.cu_seqlens[s + 1] - first, length = c.seq_lens[s];
        if (count == 0) continue;
        const bool is_inside = first >= 0 && count > 0 && first + count <= c.num_tokens && count <= length;
        if (!is_inside || length > c.page_table_width * c.page_size) return BAD_BORDERS;
        if (count > c.few) continue;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t position = length - count + i;
            visit(first + i, position, c.page_table + s * c.page_table_width, visible(c, position, length));
        }
    }
    return DONE;
}

// Where a piece's keys and values are, for one key-value head.
template <class T>
struct Places {
    const T *keys[PIECE], *values[PIECE];
    int64_t count = 0;
};

template <class T>
Status locate(const Call<T>& c, const Piece& piece, int64_t kv_head, Places<T>& places) {
    places.count = piece.end - piece.begin;
    const int32_t* page = piece.pages + piece.begin / c.page_size;
    int64_t offset = piece.begin % c.page_size;
    for (int64_t j = 0; j < places.count; ++page, offset = 0) {
        if (*page < 0 || *page >= c.num_pages) return BAD_PAGE;
        for (; j < places.count && offset < c.page_size; ++j, ++offset) {
            const int64_t entry = (*page * c.page_size + offset) * c.num_kv_heads + kv_head;
            places.keys[j] = c.key_cache + entry * c.head_dim;
            places.values[j] = c.value_cache + entry * c.value_stride;
        }
    }
    return DONE;
}

// out[g][at + i] = the sum of weights[g][j] · values[j][at + i], for W registers of values. By itself, so that sums stay
// in registers. Meanwhile the same part of what is `next` comes into the second cache: the hardware does not see pages
// coming, and here fewer requests are on their way than while keys are multiplied.
template <class T, int G, int W>
__attribute__((noinline)) void add_weighted_values(const Places<T>& places, const Places<T>& next,
                                                   const float weights[GROUP][PIECE], int64_t at, float* const* out) {
    using R = Register<float>;
    R::Sums totals[G][W];
    EACH(g, G) EACH(w, W) totals[g][w] = R::Sums{};
    for (int64_t j = 0; j < places.count; ++j) {
        if (j < next.count) {
            prefetch<2>(next.keys[j] + at, W * R::WIDTH);
            prefetch<2>(next.values[j] + at, W * R::WIDTH);
        }
        EACH(w, W) {
            R::Sums value = R::pack(places.values[j] + at + w * R::WIDTH);
            keep_in_register(value);
            EACH(g, G) totals[g][w] = value * weights[g][j] + totals[g][w];
        }
    }
    EACH(g, G) EACH(w, W) store_vector(out[g] + at + w * R::WIDTH, totals[g][w]);
}

// The last `lanes` values of rows.
template <class T, int G>
void add_last_values(const T* const* values, const float weights[GROUP][PIECE], int64_t count, int64_t at,
                     float* const* out, int64_t lanes) {
    Floats totals[G] = {};
    for (int64_t j = 0; j < count; ++j) {
        const Floats value = load(values[j] + at, lanes);
        for (int g = 0; g < G; ++g) totals[g] = value * weights[g][j] + totals[g];
    }
    for (int g = 0; g < G; ++g) store(out[g] + at, totals[g], lanes);
}

// Adds to a head's scores of one piece, scaled and capped, what the distance of keys from their query adds.
template <class T>
void add_bias(const Call<T>& c, const Piece& piece, int64_t head, float* scores) {
    const int64_t count = piece.end - piece.begin, farthest = piece.position - piece.begin;
    if (c.slopes != nullptr)
        for (int64_t j = 0; j < count; ++j) scores[j] -= c.slopes[head] * static_cast<float>(farthest - j);
    if (c.distance_logits != nullptr) {
        const T* logits = c.distance_logits + (piece.token * c.num_heads + head) * c.num_distances;
        for (int64_t j = 0; j < count; ++j)
            scores[j] += to_float(logits[std::clamp<int64_t>(farthest - j, 0, c.num_distances - 1)]);
    }
}

inline void scale_and_cap(float* scores, int64_t count, float scale, float softcap) {
    for (int64_t j = 0; j < count; j += LANES) {
        Floats score = load(scores + j) * scale;
        if (softcap > 0.0f) score = tanh(score / softcap) * softcap;
        store(scores + j, score);
    }
}

// Turns scores into weights, e^(score - greatest). When all are -inf the weights are 0, and NaN once divided.
inline Partial to_weights(float* scores, int64_t count) {
    Floats highest = splat(-__builtin_inff());
    for (int64_t j = count; j % LANES != 0; ++j) scores[j] = -__builtin_inff();
    for (int64_t j = 0; j < count; j += LANES) {
        const Floats score = load(scores + j);
        highest = select(score > highest, score, highest);  // a NaN counts for nothing
    }
    const float greatest = greatest_lane(highest);
    const float shift = greatest == -__builtin_inff() ? 0.0f : greatest;
    Floats total = {};
    for (int64_t j = 0; j < count; j += LANES) {
        const Floats weight = exp_below_one(load(scores + j) - shift);
        store(scores + j, weight);
        total = total + weight;
    }
    return {greatest, sum(total)};
}

// weights[g][j + k] = the product of key j + k with query g, for N keys, four or two. By itself, so that sums stay in
// registers; `head_dim` is a multiple of what a register holds.
template <class T, int G, int N, class X>
__attribute__((noinline)) void multiply_some_keys(const T* const* keys, int64_t j, const X* const* queries,
                                                  int64_t head_dim, float weights[GROUP][PIECE]) {
    using R = Register<T>;
    typename R::Sums sums[G][N];
    EACH(g, G) EACH(k, N) sums[g][k] = typename R::Sums{};
    for (int64_t i = 0; i < head_dim; i += R::WIDTH) {
        typename R::Packed query[G];
        EACH(g, G) {
            query[g] = R::pack(queries[g] + i);
            keep_in_register(query[g]);
        }
        EACH(k, N) {
            typename R::Packed key = R::pack(keys[j + k] + i);
            keep_in_register(key);
            EACH(g, G) sums[g][k] = R::multiply_add(sums[g][k], query[g], key);
        }
    }
    if constexpr (N == 4) {
        EACH(g, G) store_sums(sums[g][0], sums[g][1], sums[g][2], sums[g][3], weights[g] + j);
    } else {
        EACH(pair, G / 2) {
            const int g = 2 * pair;
            float four[4];
            store_sums(sums[g][0], sums[g][1], sums[g + 1][0], sums[g + 1][1], four);
            std::memcpy(weights[g] + j, four, 2 * sizeof(float));
            std::memcpy(weights[g + 1] + j, four + 2, 2 * sizeof(float));
        }
    }
}

// Meanwhile values come into the first cache, and keys that are further on.
template <class T, int G, class X>
void multiply_keys(const Places<T>& places, const X* const* queries, int64_t head_dim, int64_t value_dim,
                   float weights[GROUP][PIECE]) {
    const T *const* keys = places.keys, *const* values = places.values;
    const int64_t count = places.count;
    const auto fetch = [&](int64_t j) {
        if (j + KEYS_AHEAD < count) prefetch<3>(keys[j + KEYS_AHEAD], head_dim);
        prefetch<3>(values[j], value_dim);
    };
    int64_t j = 0;
    constexpr int N = G < 4 || REGISTER_BYTES == 64 ? 4 : 2;  // four keys of four queries would want more registers
    for (; j + N <= count && head_dim % Register<T>::WIDTH == 0; j += N) {
        for (int k = 0; k < N; ++k) fetch(j + k);
        multiply_some_keys<T, G, N>(keys, j, queries, head_dim, weights);
    }
    for (; j < count; ++j) {
        fetch(j);
        float products[G];
        dot_products<T, G>(keys[j], queries, head_dim, products);
        for (int g = 0; g < G; ++g) weights[g][j] = products[g];
    }
}

// G query heads over one piece. `partials` and the values behind them are the heads' places in the scratch memory.
template <class T, int G>
void attend(const Call<T>& c, const Piece& piece, int64_t head, const Places<T>& places, const Places<T>& next,
            float* partials, int64_t partial_size) {
    using X = typename Product<T>::Operand;
    const T* query = c.query + piece.token * c.query_token_stride + head * c.query_head_stride;
    const int64_t count = places.count;
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
    multiply_keys<T, G>(places, queries, c.head_dim, c.value_dim, weights);
    for (int g = 0; g < G; ++g) {
        for (int64_t tail = count; tail % LANES != 0; ++tail) weights[g][tail] = 0.0f;
        scale_and_cap(weights[g], count, c.scale, c.softcap);
        add_bias(c, piece, head + g, weights[g]);
        const Partial partial = to_weights(weights[g], count);
        partials[g * partial_size] = partial.greatest;
        partials[g * partial_size + 1] = partial.total;
        out[g] = partials + g * partial_size + 2;
    }
    // Registers of values at a time, so that there are as many for sums as the processor has.
    constexpr int W = REGISTER_BYTES == 64 ? 4 : G == 1 ? 8 : G < 4 ? 4 : 2, WIDTH = W * Register<float>::WIDTH;
    int64_t at = 0;
    for (; at + WIDTH <= c.value_dim; at += WIDTH)
        add_weighted_values<T, G, W>(places, next, weights, at, out);
    for (; at < c.value_dim; at += LANES)
        add_last_values<T, G>(places.values, weights, count, at, out, c.value_dim - at);
}

// Query heads `[head, last)`, which share a key-value head, over one piece.
template <class T>
void attend_piece(const Call<T>& c, const Piece& piece, int64_t head, int64_t last, const Places<T>& places,
                  const Places<T>& next, float* partials, int64_t partial_size) {
    for (; head < last; head += GROUP) {
        float* place = partials + head * partial_size;
        switch (last - head) {
            case 1: attend<T, 1>(c, piece, head, places, next, place, partial_size); break;
            case 2: attend<T, 2>(c, piece, head, places, next, place, partial_size); break;
            case 3: attend<T, 3>(c, piece, head, places, next, place, partial_size); break;
            default: attend<T, 4>(c, piece, head, places, next, place, partial_size);
        }
    }
}

// One query head's result from its pieces' partial ones, whose greatest scores become the factors they are scaled by.
template <class T>
void combine(const Call<T>& c, int64_t token, int64_t head, float* partials, int64_t num_pieces, int64_t piece_size) {
    const float* sink = c.sinks == nullptr ? nullptr : c.sinks + token * c.sinks_stride + head;
    float greatest = sink == nullptr ? -__builtin_inff() : *sink;
    for (int64_t p = 0; p < num_pieces; ++p) {
        const float other = partials[p * piece_size];
        greatest = other > greatest ? other : greatest;
    }
    const float shift = greatest == -__builtin_inff() ? 0.0f : greatest;
    float total = sink == nullptr ? 0.0f : exp(splat(*sink - shift))[0];
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

// What a team shares while it attends: the pieces of all query tokens, and partial results of some.
struct Shared {
    Piece* pieces;
    int64_t* starts;  // where each query token's pieces begin
    float* partials;
    Status* fault;
    void* memory;

    static Shared allocate(int64_t num_pieces, int64_t num_queries, int64_t num_partials) {
        const size_t piece_bytes = static_cast<size_t>(num_pieces) * sizeof(Piece);
        const size_t start_bytes = static_cast<size_t>(num_queries + 1) * sizeof(int64_t);
        const size_t partial_bytes = static_cast<size_t>(num_partials) * sizeof(float);
        char* memory = static_cast<char*>(std::malloc(piece_bytes + start_bytes + partial_bytes + sizeof(Status)));
        return {reinterpret_cast<Piece*>(memory), reinterpret_cast<int64_t*>(memory + piece_bytes),
                reinterpret_cast<float*>(memory + piece_bytes + start_bytes),
                reinterpret_cast<Status*>(memory + piece_bytes + start_bytes + partial_bytes), memory};
    }
};

template <class T>
void fill(const Call<T>& c, const Shared& shared) {
    int64_t piece = 0, query = 0;
    for_each_query(c, [&](int64_t token, int64_t position, const int32_t* pages, Range range) {
        shared.starts[query++] = piece;
        for (int64_t at = range.begin; at < range.end; at = (at / PIECE + 1) * PIECE) {
            const int64_t border = at / PIECE * PIECE + PIECE;
            shared.pieces[piece++] = {token, position, pages, at, border < range.end ? border : range.end};
        }
    });
    shared.starts[query] = piece;
    *shared.fault = DONE;
}

// Query tokens `[first, last)`, of those that are attended one by one.
template <class T>
void attend_queries(const Call<T>& c, const Shared& shared, int64_t first, int64_t last, int64_t partial_size) {
    const int64_t piece_size = partial_size * c.num_heads, heads_each = c.num_heads / c.num_kv_heads;
    const int64_t parts_each = (heads_each + HEADS - 1) / HEADS, parts = c.num_kv_heads * parts_each;
    const int64_t begin = shared.starts[first], end = shared.starts[last];
    const int64_t items = (end - begin) * parts, wanted = RUNS_PER_THREAD * team_size();
    const int64_t run = std::max<int64_t>(1, (items + wanted - 1) / wanted);
    // Within a run of items it is known what comes next, and can be fetched in time.
#pragma omp for schedule(dynamic)
    for (int64_t from = 0; from < items; from += run) {
        const int64_t to = std::min(from + run, items);
        const auto locate_item = [&](int64_t item, Places<T>& places) {
            places.count = 0;
            return item == to ? DONE : locate(c, shared.pieces[begin + item / parts], item % parts / parts_each, places);
        };
        Places<T> both[2];
        Status found = locate_item(from, both[from % 2]);
        for (int64_t item = from; item < to && found == DONE; ++item) {
            found = locate_item(item + 1, both[(item + 1) % 2]);
            if (found != DONE) break;
            const int64_t p = item / parts, part = item % parts, kv_head = part / parts_each;
            const int64_t head = kv_head * heads_each + part % parts_each * HEADS;
            attend_piece(c, shared.pieces[begin + p], head, std::min(head + HEADS, (kv_head + 1) * heads_each),
                         both[item % 2], both[(item + 1) % 2], shared.partials + p * piece_size, partial_size);
        }
        if (found != DONE) {
#pragma omp atomic write
            *shared.fault = found;
        }
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < (last - first) * c.num_heads; ++item) {
        const int64_t q = first + item / c.num_heads, head = item % c.num_heads, start = shared.starts[q];
        combine(c, shared.pieces[start].token, head,
                shared.partials + (start - begin) * piece_size + head * partial_size, shared.starts[q + 1] - start,
                piece_size);
    }
}

template <class T>
Status attend_all(const Call<T>& c) {
    int64_t num_pieces = 0, num_queries = 0, most = 0;
    const Status checked = for_each_query(c, [&](int64_t, int64_t, const int32_t*, Range range) {
        const int64_t pieces = (range.end - 1) / PIECE - range.begin / PIECE + 1;
        ++num_queries;
        num_pieces += pieces;
        most = std::max(most, pieces);
    });
    if (checked != DONE || num_queries == 0) return checked;
    const int64_t partial_size = (2 + c.value_dim + LANES - 1) / LANES * LANES;
    const int64_t limit = std::min(num_pieces, std::max(most, PARTIALS / (partial_size * c.num_heads)));
    Shared shared;
#pragma omp single copyprivate(shared)
    {
        shared = Shared::allocate(num_pieces, num_queries, limit * partial_size * c.num_heads);
        if (shared.memory != nullptr) fill(c, shared);
    }
    if (shared.memory == nullptr) return OUT_OF_MEMORY;
    for (int64_t first = 0, last; first < num_queries; first = last) {
        for (last = first + 1; last < num_queries && shared.starts[last + 1] - shared.starts[first] <= limit;) ++last;
        attend_queries(c, shared, first, last, partial_size);
    }
    const Status status = *shared.fault;
#pragma omp barrier
#pragma omp single nowait
    std::free(shared.memory);
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
