// Attention over latents: every head's keys and values come from one latent per token, which is all that pages hold. A
// head's key rows of the up-projection move to its query, and its value rows to what it attended to, so that the latents
// themselves are keys and values, the same for all heads (arXiv 2405.04434).

#include "attention_pieces.h"

namespace autodeploy {
namespace {

constexpr int64_t WIDE = 4;                 // vectors of a latent in a work item
constexpr int64_t COLUMNS = WIDE * LANES;
constexpr int64_t ROWS = 8;                 // value rows in a work item
constexpr int64_t TOKENS = 4;               // tokens that a value row is multiplied with at a time

template <class T>
struct Latents {
    const T *query, *latent, *shared_key, *up;
    int64_t query_token_stride, query_head_stride, latent_stride, shared_key_stride;
    int64_t num_tokens, num_heads, own_dim, shared_dim, latent_dim, value_dim;
    T *absorbed, *mixed, *out;

    int64_t key_dim() const { return latent_dim + shared_dim; }
    const T* key_rows(int64_t head) const { return up + head * (own_dim + value_dim) * latent_dim; }
    const T* value_rows(int64_t head) const { return key_rows(head) + own_dim * latent_dim; }
};

template <class T>
Status write_cache(const Latents<T>& m, const Call<T>& c) {
    for (int64_t token = 0; token < m.num_tokens; ++token)
        if (c.slot_mapping[token] < 0 || c.slot_mapping[token] >= c.num_pages * c.page_size) return BAD_SLOT;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < m.num_tokens; ++token) {
        T* entry = c.key_cache + c.slot_mapping[token] * m.key_dim();
        std::memcpy(entry, m.latent + token * m.latent_stride, static_cast<size_t>(m.latent_dim) * sizeof(T));
        std::memcpy(entry + m.latent_dim, m.shared_key + token * m.shared_key_stride,
                    static_cast<size_t>(m.shared_dim) * sizeof(T));
    }
    return DONE;
}

// W vectors of a query's image, from a block of columns of its head's key rows that stays in cache for all tokens.
template <class T, int W>
void absorb_columns(const Latents<T>& m, const T* query, const T* rows, int64_t count, T* to) {
    Floats totals[W] = {};
    for (int64_t p = 0; p < m.own_dim; ++p) {
        const float factor = to_float(query[p]);
        for (int w = 0; w < W; ++w) {
            const T* at = rows + p * m.latent_dim + w * LANES;
            totals[w] = factor * (W > 1 ? load(at) : load(at, count)) + totals[w];
        }
    }
    for (int w = 0; w < W; ++w) store(to + w * LANES, totals[w], W > 1 ? LANES : count);
}

template <class T>
void absorb(const Latents<T>& m) {
    const int64_t blocks = (m.latent_dim + COLUMNS - 1) / COLUMNS;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < m.num_heads * blocks; ++item) {
        const int64_t head = item / blocks, begin = item % blocks * COLUMNS;
        const int64_t end = std::min(begin + COLUMNS, m.latent_dim);
        const T* rows = m.key_rows(head);
        for (int64_t token = 0; token < m.num_tokens; ++token) {
            const T* query = m.query + token * m.query_token_stride + head * m.query_head_stride;
            T* to = m.absorbed + (token * m.num_heads + head) * m.key_dim();
            if (end - begin == COLUMNS)
                absorb_columns<T, WIDE>(m, query, rows + begin, COLUMNS, to + begin);
            else
                for (int64_t at = begin; at < end; at += LANES)
                    absorb_columns<T, 1>(m, query, rows + at, end - at, to + at);
            if (begin == 0)
                std::memcpy(to + m.latent_dim, query + m.own_dim, static_cast<size_t>(m.shared_dim) * sizeof(T));
        }
    }
}

template <class T, int M>
void multiply_row(const Latents<T>& m, const T* row, int64_t token, int64_t head, int64_t v) {
    const T* mixed[M];
    float products[M];
    for (int i = 0; i < M; ++i) mixed[i] = m.mixed + ((token + i) * m.num_heads + head) * m.latent_dim;
    dot_products<T, M>(row, mixed, m.latent_dim, products);
    for (int i = 0; i < M; ++i) assign(m.out[((token + i) * m.num_heads + head) * m.value_dim + v], products[i]);
}

template <class T>
void multiply_values(const Latents<T>& m) {
    const int64_t blocks = (m.value_dim + ROWS - 1) / ROWS;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < m.num_heads * blocks; ++item) {
        const int64_t head = item / blocks, begin = item % blocks * ROWS, end = std::min(begin + ROWS, m.value_dim);
        int64_t token = 0;
        for (; token + TOKENS <= m.num_tokens; token += TOKENS)
            for (int64_t v = begin; v < end; ++v)
                multiply_row<T, TOKENS>(m, m.value_rows(head) + v * m.latent_dim, token, head, v);
        for (; token < m.num_tokens; ++token)
            for (int64_t v = begin; v < end; ++v)
                multiply_row<T, 1>(m, m.value_rows(head) + v * m.latent_dim, token, head, v);
    }
}

template <class T>
Status cached_mla(const Latents<T>& m, const Call<T>& c) {
    Status status = write_cache(m, c);
    if (status != DONE) return status;
    absorb(m);
    status = attend_all(c);
    if (status == DONE) multiply_values(m);
    return status;
}

}  // namespace
}  // namespace autodeploy

// Shapes as in the op. query: strides in elements for tokens and heads, latent and shared_key for tokens, the last 1;
// everything else is contiguous. absorbed: `[num_tokens, num_heads, latent_dim + shared_dim]` and mixed: `[num_tokens,
// num_heads, latent_dim]`, scratch. Returns 0, or what was wrong by its number in `Status`.
#define DEFINE_CACHED_MLA(NAME, T)                                                                                   \
    extern "C" int NAME(                                                                                             \
        const T* query, int64_t query_token_stride, int64_t query_head_stride, const T* latent,                      \
        int64_t latent_stride, const T* shared_key, int64_t shared_key_stride, const T* up,                          \
        const int32_t* cu_seqlens, const int32_t* seq_lens, int64_t num_sequences, const int32_t* page_table,        \
        int64_t page_table_width, const int64_t* slot_mapping, T* latent_cache, int64_t num_pages,                   \
        int64_t page_size, int64_t num_tokens, int64_t num_heads, int64_t own_dim, int64_t shared_dim,               \
        int64_t latent_dim, int64_t value_dim, float scale, T* absorbed, T* mixed, T* out, int threads) {            \
        const autodeploy::Latents<T> latents = {                                                                     \
            query, latent, shared_key, up, query_token_stride, query_head_stride, latent_stride, shared_key_stride,  \
            num_tokens, num_heads, own_dim, shared_dim, latent_dim, value_dim, absorbed, mixed, out};                \
        const int64_t key_dim = latents.key_dim();                                                                   \
        const autodeploy::Call<T> call = {                                                                           \
            absorbed, nullptr, nullptr, num_heads * key_dim, key_dim, 0, 0, 0, 0, cu_seqlens, seq_lens, page_table,  \
            page_table_width, slot_mapping, latent_cache, latent_cache, num_pages, page_size, num_sequences,         \
            num_tokens, num_heads, 1, key_dim, latent_dim, nullptr, scale, true, 0, 0, 0.0f, mixed, INT64_MAX,       \
            key_dim, 0, nullptr, nullptr, 0};                                                                        \
        return autodeploy::status_of(threads, [&] { return autodeploy::cached_mla(latents, call); });                \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_CACHED_MLA(cached_mla_float32, float)
DEFINE_CACHED_MLA(cached_mla_bfloat16, autodeploy::bf16)
