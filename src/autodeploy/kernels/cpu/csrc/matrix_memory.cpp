// Matrices that remember values under keys, one per head: they fade, are added to and read, token by token. The delta
// rule, linear attention, and the delta rule with keys of their own for reading and writing. States are float32.
//
// A column of such a matrix has nothing to do with the others, so a work item is a block of columns of one head, small
// enough to stay in the first cache from a token's first pass over it to the next token's.

#include <cmath>
#include <vector>

#include "sequences.h"

namespace autodeploy {
namespace {

constexpr int VECTORS = 2;
constexpr int64_t COLUMNS = VECTORS * LANES;  // of a block; two vectors of sums fit beside two of a row everywhere

struct Vectors {
    Floats at[VECTORS];
};

template <class T>
Vectors load_block(const T* from, int64_t count) {
    Vectors result = {};
    for (int v = 0; v < VECTORS && v * LANES < count; ++v)
        result.at[v] = load(from + v * LANES, count - v * LANES);
    return result;
}

template <class T>
void store_block(T* to, const Vectors& x, int64_t count) {
    for (int v = 0; v < VECTORS && v * LANES < count; ++v) store(to + v * LANES, x.at[v], count - v * LANES);
}

// A block of a matrix `[depth, width]`, whose rows are whole vectors: where it is if its columns fill them, else a copy
// that is put back.
class Block {
   public:
    Block(float* state, int64_t depth, int64_t width, int64_t count)
        : state(state), depth(depth), width(width), count(count), rows(state), stride(width) {
        if (count == COLUMNS) return;
        copy.resize(static_cast<size_t>(depth * COLUMNS));
        rows = copy.data(), stride = COLUMNS;
        for (int64_t d = 0; d < depth; ++d) store_block(rows + d * COLUMNS, load_block(state + d * width, count), COLUMNS);
    }
    Block(const Block&) = delete;
    ~Block() {
        if (rows == state) return;
        for (int64_t d = 0; d < depth; ++d) store_block(state + d * width, load_block(rows + d * COLUMNS, COLUMNS), count);
    }
    float* row(int64_t d) const { return rows + d * stride; }

   private:
    float* const state;
    const int64_t depth, width, count;
    float* rows;
    int64_t stride;
    std::vector<float> copy;
};

// from · factor, or from / sqrt(sum of squares + eps) · factor when eps is not negative.
template <class T>
void normalised(const T* from, float* to, int64_t count, float eps, float factor) {
    Floats squares = {};
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats x = load(from + i, count - i);
        squares = x * x + squares;
    }
    if (eps >= 0.0f) factor /= std::sqrt(sum(squares) + eps);
    for (int64_t i = 0; i < count; i += LANES) store(to + i, load(from + i, count - i) * factor, count - i);
}

// What a head's state is multiplied by at each token: e to one logarithm per head (`each` 1) or per row (`each` is
// `depth`); 1 when there are none.
struct Decay {
    Numbers logarithms;
    int64_t token_stride, each;

    void factors(int64_t token, int64_t head, float* to, int64_t depth) const {
        const int64_t first = token * token_stride + head * each;
        const Floats shared = logarithms.exist() && each == 1 ? exp(splat(logarithms[first])) : splat(1.0f);
        for (int64_t d = 0; d < depth; d += LANES) {
            const bool own = logarithms.exist() && each != 1;
            store(to + d, own ? exp(logarithms.load(first + d, depth - d)) : shared, depth - d);
        }
    }
};

template <class T>
Status delta_rule(const Sequences& q, Rows<T> query, Rows<T> key, Rows<T> value, Numbers beta, int64_t beta_stride,
                  Decay decay, float scale, float norm_eps, float* states, T* out, int64_t key_heads, int64_t heads,
                  int64_t depth, int64_t width) {
    return for_each_block(q, heads, width, COLUMNS, [&](int64_t s, int64_t head, int64_t begin, int64_t end) {
        const int64_t key_head = head / (heads / key_heads), count = end - begin;
        std::vector<float> scratch(static_cast<size_t>(3 * depth));
        float *qs = scratch.data(), *ks = qs + depth, *kept = ks + depth;
        const Block state(states + (q.slots[s] * heads + head) * depth * width + begin, depth, width, count);
        for (int64_t t = q.borders[s]; t < q.borders[s + 1]; ++t) {
            normalised(query[t] + key_head * depth, qs, depth, norm_eps, scale);
            normalised(key[t] + key_head * depth, ks, depth, norm_eps, 1.0f);
            decay.factors(t, head, kept, depth);
            Vectors found = {}, result = {};
            for (int64_t d = 0; d < depth; ++d) {
                const float factor = kept[d] * ks[d];
                for (int v = 0; v < VECTORS; ++v) found.at[v] = load(state.row(d) + v * LANES) * factor + found.at[v];
            }
            const float rate = beta[t * beta_stride + head];
            Vectors update = load_block(value[t] + head * width + begin, count);
            for (int v = 0; v < VECTORS; ++v) update.at[v] = rate * (update.at[v] - found.at[v]);
            for (int64_t d = 0; d < depth; ++d) {
                float* row = state.row(d);
                for (int v = 0; v < VECTORS; ++v) {
                    const Floats after = load(row + v * LANES) * kept[d] + update.at[v] * ks[d];
                    store(row + v * LANES, after);
                    result.at[v] = after * qs[d] + result.at[v];
                }
            }
            store_block(out + (t * heads + head) * width + begin, result, count);
        }
    });
}

// bonus: `[heads, depth]`, what a token's own value counts for in its result, or none: as much as an earlier one.
template <class T>
Status linear_attention(const Sequences& q, Rows<T> query, Rows<T> key, Rows<T> value, Decay decay, Numbers bonus,
                        float* states, T* out, int64_t heads, int64_t depth, int64_t width) {
    return for_each_block(q, heads, width, COLUMNS, [&](int64_t s, int64_t head, int64_t begin, int64_t end) {
        const int64_t count = end - begin;
        std::vector<float> scratch(static_cast<size_t>(3 * depth));
        float *qs = scratch.data(), *ks = qs + depth, *kept = ks + depth;
        const Block state(states + (q.slots[s] * heads + head) * depth * width + begin, depth, width, count);
        for (int64_t t = q.borders[s]; t < q.borders[s + 1]; ++t) {
            widen(query[t] + head * depth, qs, depth);
            widen(key[t] + head * depth, ks, depth);
            decay.factors(t, head, kept, depth);
            const Vectors added = load_block(value[t] + head * width + begin, count);
            Vectors result = {};
            for (int64_t d = 0; d < depth; ++d) {
                float* row = state.row(d);
                const float own = bonus.exist() ? bonus[head * depth + d] * ks[d] : 0.0f;
                for (int v = 0; v < VECTORS; ++v) {
                    const Floats before = load(row + v * LANES);
                    const Floats after = before * kept[d] + added.at[v] * ks[d];
                    const Floats seen = bonus.exist() ? before + added.at[v] * own : after;
                    store(row + v * LANES, after);
                    result.at[v] = seen * qs[d] + result.at[v];
                }
            }
            store_block(out + (t * heads + head) * width + begin, result, count);
        }
    });
}

// What the state holds under `read` is added under `write`, after the state has faded.
template <class T>
Status generalized_delta_rule(const Sequences& q, Rows<T> query, Rows<T> key, Rows<T> value, Rows<T> read,
                              Rows<T> write, Decay decay, float* states, T* out, int64_t heads, int64_t depth,
                              int64_t width) {
    return for_each_block(q, heads, width, COLUMNS, [&](int64_t s, int64_t head, int64_t begin, int64_t end) {
        const int64_t count = end - begin;
        std::vector<float> scratch(static_cast<size_t>(5 * depth));
        float *qs = scratch.data(), *ks = qs + depth, *rs = ks + depth, *ws = rs + depth, *kept = ws + depth;
        const Block state(states + (q.slots[s] * heads + head) * depth * width + begin, depth, width, count);
        for (int64_t t = q.borders[s]; t < q.borders[s + 1]; ++t) {
            widen(query[t] + head * depth, qs, depth);
            widen(key[t] + head * depth, ks, depth);
            widen(read[t] + head * depth, rs, depth);
            widen(write[t] + head * depth, ws, depth);
            decay.factors(t, head, kept, depth);
            const Vectors added = load_block(value[t] + head * width + begin, count);
            Vectors found = {}, result = {};
            for (int64_t d = 0; d < depth; ++d)
                for (int v = 0; v < VECTORS; ++v) found.at[v] = load(state.row(d) + v * LANES) * rs[d] + found.at[v];
            for (int64_t d = 0; d < depth; ++d) {
                float* row = state.row(d);
                for (int v = 0; v < VECTORS; ++v) {
                    const Floats fresh = added.at[v] * ks[d] + found.at[v] * ws[d];
                    const Floats after = load(row + v * LANES) * kept[d] + fresh;
                    store(row + v * LANES, after);
                    result.at[v] = after * qs[d] + result.at[v];
                }
            }
            store_block(out + (t * heads + head) * width + begin, result, count);
        }
    });
}

}  // namespace
}  // namespace autodeploy

// Rows are one per token, strides in elements; out and states are contiguous. A flag behind a pointer to numbers of
// either dtype says whether they are bfloat16.
#define DEFINE_DELTA_RULE(NAME, T)                                                                                   \
    extern "C" int NAME(SEQUENCES, const T* query, int64_t query_stride, const T* key, int64_t key_stride,           \
                        const T* value, int64_t value_stride, const void* beta, int beta_is_bfloat16,                \
                        int64_t beta_stride, const void* decay, int decay_is_bfloat16, int64_t decay_stride,         \
                        int64_t decays, float scale, float norm_eps, float* states, T* out, int64_t key_heads,       \
                        int64_t heads, int64_t depth, int64_t width, int threads) {                                  \
        return autodeploy::status_of(threads, [&] {                                                                  \
            return autodeploy::delta_rule<T>(                                                                        \
                GIVEN_SEQUENCES, {query, query_stride}, {key, key_stride}, {value, value_stride},                    \
                {beta, beta_is_bfloat16 != 0}, beta_stride, {{decay, decay_is_bfloat16 != 0}, decay_stride, decays}, \
                scale, norm_eps, states, out, key_heads, heads, depth, width);                                       \
        });                                                                                                          \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_DELTA_RULE(delta_rule_float32, float)
DEFINE_DELTA_RULE(delta_rule_bfloat16, autodeploy::bf16)

#define DEFINE_LINEAR_ATTENTION(NAME, T)                                                                             \
    extern "C" int NAME(SEQUENCES, const T* query, int64_t query_stride, const T* key, int64_t key_stride,           \
                        const T* value, int64_t value_stride, const void* decay, int decay_is_bfloat16,              \
                        int64_t decay_stride, int64_t decays, const void* bonus, int bonus_is_bfloat16,              \
                        float* states, T* out, int64_t heads, int64_t depth, int64_t width, int threads) {           \
        return autodeploy::status_of(threads, [&] {                                                                  \
            return autodeploy::linear_attention<T>(                                                                  \
                GIVEN_SEQUENCES, {query, query_stride}, {key, key_stride}, {value, value_stride},                    \
                {{decay, decay_is_bfloat16 != 0}, decay_stride, decays}, {bonus, bonus_is_bfloat16 != 0}, states,    \
                out, heads, depth, width);                                                                           \
        });                                                                                                          \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_LINEAR_ATTENTION(linear_attention_float32, float)
DEFINE_LINEAR_ATTENTION(linear_attention_bfloat16, autodeploy::bf16)

#define DEFINE_GENERALIZED_DELTA_RULE(NAME, T)                                                                       \
    extern "C" int NAME(SEQUENCES, const T* query, int64_t query_stride, const T* key, int64_t key_stride,           \
                        const T* value, int64_t value_stride, const T* read, int64_t read_stride, const T* write,    \
                        int64_t write_stride, const void* decay, int decay_is_bfloat16, int64_t decay_stride,        \
                        int64_t decays, float* states, T* out, int64_t heads, int64_t depth, int64_t width,          \
                        int threads) {                                                                               \
        return autodeploy::status_of(threads, [&] {                                                                  \
            return autodeploy::generalized_delta_rule<T>(                                                            \
                GIVEN_SEQUENCES, {query, query_stride}, {key, key_stride}, {value, value_stride},                    \
                {read, read_stride}, {write, write_stride},                                                          \
                {{decay, decay_is_bfloat16 != 0}, decay_stride, decays}, states, out, heads, depth, width);          \
        });                                                                                                          \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_GENERALIZED_DELTA_RULE(generalized_delta_rule_float32, float)
DEFINE_GENERALIZED_DELTA_RULE(generalized_delta_rule_bfloat16, autodeploy::bf16)
