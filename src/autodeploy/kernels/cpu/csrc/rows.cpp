// Operators of torch on rows, for tapes: sums, means, softmax, the largest elements, and elements or rows by number.

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"
#include "team.h"

namespace autodeploy {
namespace {

enum Status { DONE, BAD_INDEX };
enum Reduction { SUM, MEAN, SOFTMAX };  // the order that torch_calls.py numbers them in

inline float total_of(const float* row, int64_t width) {
    Floats total = {};
    for (int64_t i = 0; i < width; i += LANES) total = total + load(row + i, width - i);
    return sum(total);
}

inline void softmax(float* row, int64_t width) {
    float greatest = -__builtin_inff();
    for (int64_t i = 0; i < width; ++i) greatest = row[i] > greatest ? row[i] : greatest;
    for (int64_t i = 0; i < width; i += LANES) store(row + i, exp(load(row + i, width - i) - greatest), width - i);
    const float all = total_of(row, width);
    for (int64_t i = 0; i < width; i += LANES) store(row + i, load(row + i, width - i) / all, width - i);
}

template <class From, class To>
void reduce(int reduction, const From* x, To* out, int64_t num_rows, int64_t width) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < num_rows; ++r) {
        std::vector<float> row(static_cast<size_t>(width));
        for (int64_t i = 0; i < width; ++i) row[i] = to_float(x[r * width + i]);
        if (reduction == SOFTMAX) {
            softmax(row.data(), width);
            for (int64_t i = 0; i < width; ++i) assign(out[r * width + i], row[i]);
        } else {
            const float total = total_of(row.data(), width);
            assign(out[r], reduction == MEAN ? total / static_cast<float>(width) : total);
        }
    }
}

// The `k` largest of each row, NaN first, in falling order if they are to be sorted. Of equal ones, those that torch
// chooses: its algorithm and its condition for each.
template <class T>
void largest(const T* x, T* values, int64_t* indices, int64_t num_rows, int64_t width, int64_t k, bool is_sorted) {
    using Element = std::pair<float, int64_t>;
    const auto before = [](const Element& a, const Element& b) {
        return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
    };
#pragma omp for schedule(static)
    for (int64_t r = 0; r < num_rows; ++r) {
        std::vector<Element> row(static_cast<size_t>(width));
        for (int64_t i = 0; i < width; ++i) row[i] = {to_float(x[r * width + i]), i};
        if (k * 64 <= width) {
            std::partial_sort(row.begin(), row.begin() + k, row.end(), before);
        } else {
            std::nth_element(row.begin(), row.begin() + k - 1, row.end(), before);
            if (is_sorted) std::sort(row.begin(), row.begin() + k - 1, before);
        }
        for (int64_t i = 0; i < k; ++i) {
            values[r * k + i] = x[r * width + row[i].second];
            indices[r * k + i] = row[i].second;
        }
    }
}

template <class T>
Status scatter(const T* x, const int64_t* indices, const T* values, float value, T* out, int64_t num_rows,
               int64_t width, int64_t count) {
    T same;
    assign(same, value);
    Status status = DONE;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < num_rows; ++r) {
        std::copy(x + r * width, x + (r + 1) * width, out + r * width);
        for (int64_t i = r * count; i < (r + 1) * count; ++i) {
            if (indices[i] < 0 || indices[i] >= width)
                status = BAD_INDEX;
            else
                out[r * width + indices[i]] = values == nullptr ? same : values[i];
        }
    }
    return status;
}

// A piece is `size` bytes.
Status take(const char* x, const void* indices, bool is_int64, bool from_end, int64_t index_stride, char* out,
            int64_t num_outer, int64_t num_pieces, int64_t num_indices, int64_t size) {
    Status status = DONE;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < num_outer * num_indices; ++item) {
        const int64_t outer = item / num_indices, at = outer * index_stride + item % num_indices;
        int64_t piece = is_int64 ? static_cast<const int64_t*>(indices)[at] : static_cast<const int32_t*>(indices)[at];
        if (from_end && piece < 0) piece += num_pieces;
        if (piece < 0 || piece >= num_pieces)
            status = BAD_INDEX;
        else
            std::memcpy(out + item * size, x + (outer * num_pieces + piece) * size, static_cast<size_t>(size));
    }
    return status;
}

}  // namespace
}  // namespace autodeploy

// x: `[num_rows, width]`. out: one number per row, or a row for softmax. All contiguous.
#define DEFINE_REDUCE(NAME, FROM, TO)                                                                                \
    extern "C" void NAME(int reduction, const FROM* x, TO* out, int64_t num_rows, int64_t width, int threads) {      \
        autodeploy::with_team(threads, [&] { autodeploy::reduce(reduction, x, out, num_rows, width); });             \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_REDUCE(reduce_float32, float, float)
DEFINE_REDUCE(reduce_bfloat16, autodeploy::bf16, autodeploy::bf16)
DEFINE_REDUCE(widening_reduce_bfloat16, autodeploy::bf16, float)

// x: `[num_rows, width]`. values, indices: `[num_rows, k]`, 0 < k <= width. All contiguous.
#define DEFINE_LARGEST(NAME, T)                                                                                      \
    extern "C" void NAME(const T* x, T* values, int64_t* indices, int64_t num_rows, int64_t width, int64_t k,        \
                         int is_sorted, int threads) {                                                               \
        autodeploy::with_team(                                                                                       \
            threads, [&] { autodeploy::largest(x, values, indices, num_rows, width, k, is_sorted != 0); });          \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_LARGEST(largest_float32, float)
DEFINE_LARGEST(largest_bfloat16, autodeploy::bf16)

// out[o, i] = x[o, indices[o · index_stride + i]], pieces of `size` bytes: x `[num_outer, num_pieces]` of them, out
// `[num_outer, num_indices]`. An index_stride of 0 is one set of indices for all. With from_end, negative numbers count
// from the end. Returns BAD_INDEX for a number that is not in 0 .. num_pieces; nothing is read there.
extern "C" int take(const char* x, const void* indices, int is_int64, int from_end, int64_t index_stride, char* out,
                    int64_t num_outer, int64_t num_pieces, int64_t num_indices, int64_t size, int threads) {
    return autodeploy::status_of(threads, [&] {
        return autodeploy::take(x, indices, is_int64 != 0, from_end != 0, index_stride, out, num_outer, num_pieces,
                                num_indices, size);
    });
}
RECORDABLE(take)

// out = x with out[r, indices[r, i]] = values[r, i], or `value` where values is null: x, out `[num_rows, width]` and
// indices, values `[num_rows, count]`, contiguous. Of places named twice the last counts. Returns BAD_INDEX as `take`.
#define DEFINE_SCATTER(NAME, T)                                                                                      \
    extern "C" int NAME(const T* x, const int64_t* indices, const T* values, float value, T* out, int64_t num_rows,  \
                        int64_t width, int64_t count, int threads) {                                                 \
        return autodeploy::status_of(threads, [&] {                                                                  \
            return autodeploy::scatter(x, indices, values, value, out, num_rows, width, count);                      \
        });                                                                                                          \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_SCATTER(scatter_float32, float)
DEFINE_SCATTER(scatter_bfloat16, autodeploy::bf16)
