// Operators of torch that give one number per element of up to three operands of any of the usual dtypes, anywhere in
// memory: what stands between the kernels of a step, for tapes.
//
// A block of each operand is widened to float32 (to int64 where all are integers), computed with, and rounded once.

#include <cmath>

#include "activation.h"
#include "team.h"

namespace autodeploy {
namespace {

constexpr int DIMS = 4;
constexpr int64_t BLOCK = 256;  // elements in a work item, a multiple of LANES

enum Kind { FLOAT32, BFLOAT16, INT64, INT32, BOOL };  // the order that torch_calls.py numbers them in

// The order that torch_calls.py numbers them in.
enum Operation {
    COPY, NEGATE, ABSOLUTE, SQUARE, SQUARE_ROOT, RECIPROCAL_ROOT, RECIPROCAL, EXP, LOG, LOG1P, COS, SIN, TANH, FLOOR,
    SIGMOID_OF, SILU_OF, RELU_OF, GELU_OF, GELU_TANH_OF, SOFTPLUS, NOT, ADD, MULTIPLY, DIVIDE, POWER, MAXIMUM, MINIMUM,
    EQUAL, NOT_EQUAL, LESS, LESS_OR_EQUAL, GREATER, GREATER_OR_EQUAL, WHERE
};

// A tensor, or one number where `data` is null.
struct Operand {
    void* data;
    float value;
    int kind;
    int64_t strides[DIMS];

    int64_t offset(const int64_t* index) const {
        int64_t result = 0;
        for (int d = 0; d < DIMS; ++d) result += index[d] * strides[d];
        return result;
    }
};

inline float number(float x) { return x; }
inline float number(bf16 x) { return to_float(x); }
inline int64_t number(int64_t x) { return x; }
inline int64_t number(int32_t x) { return x; }
inline int64_t number(bool x) { return x; }

template <class From, class C>
void spread(const void* data, int64_t offset, int64_t stride, int64_t count, C* to) {
    const From* from = static_cast<const From*>(data) + offset;
    if (stride == 1) {  // what a compiler turns into vectors
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<C>(number(from[i]));
    } else {
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<C>(number(from[i * stride]));
    }
}

template <class C>
void fetch(const Operand& x, const int64_t* index, int64_t count, C* to) {
    if (x.data == nullptr) {
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<C>(x.value);
        return;
    }
    const int64_t offset = x.offset(index), stride = x.strides[DIMS - 1];
    switch (x.kind) {
        case FLOAT32: return spread<float>(x.data, offset, stride, count, to);
        case BFLOAT16: return spread<bf16>(x.data, offset, stride, count, to);
        case INT64: return spread<int64_t>(x.data, offset, stride, count, to);
        case INT32: return spread<int32_t>(x.data, offset, stride, count, to);
        default: return spread<bool>(x.data, offset, stride, count, to);
    }
}

inline void put_number(bf16& to, float x) { assign(to, x); }
template <class To, class C>
void put_number(To& to, C x) {
    to = static_cast<To>(x);
}

template <class To, class C>
void gather_into(void* data, int64_t offset, int64_t stride, int64_t count, const C* from) {
    To* to = static_cast<To*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) put_number(to[i * stride], from[i]);
}

void put(const Operand& x, const int64_t* index, int64_t count, const float* from) {
    const int64_t offset = x.offset(index), stride = x.strides[DIMS - 1];
    if (x.kind == BFLOAT16 && stride == 1) {
        for (int64_t i = 0; i < count; i += LANES)
            store(static_cast<bf16*>(x.data) + offset + i, load(from + i), count - i);
        return;
    }
    switch (x.kind) {
        case FLOAT32: return gather_into<float>(x.data, offset, stride, count, from);
        case BFLOAT16: return gather_into<bf16>(x.data, offset, stride, count, from);
        default: return gather_into<bool>(x.data, offset, stride, count, from);
    }
}

void put(const Operand& x, const int64_t* index, int64_t count, const int64_t* from) {
    const int64_t offset = x.offset(index), stride = x.strides[DIMS - 1];
    switch (x.kind) {
        case INT64: return gather_into<int64_t>(x.data, offset, stride, count, from);
        case INT32: return gather_into<int32_t>(x.data, offset, stride, count, from);
        default: return gather_into<bool>(x.data, offset, stride, count, from);
    }
}

template <class Function>
Floats by_lane(Floats x, Function function) {
    float lanes[LANES];
    store(lanes, x);
    for (int i = 0; i < LANES; ++i) lanes[i] = function(lanes[i]);
    return load(lanes);
}

template <class Mask>
Floats flag(Mask mask) {
    return select(mask, splat(1.0f), splat(0.0f));
}

// `a` where the mask says so, else `b`; NaN if either is.
template <class Mask>
Floats extreme(Floats a, Floats b, Mask mask) {
    return select(a == a, select(b == b, select(mask, a, b), b), a);
}

Floats result_of(int operation, float alpha, Floats a, Floats b, Floats c) {
    switch (operation) {
        case COPY: return a;
        case NEGATE: return -a;
        case ABSOLUTE: return by_lane(a, [](float x) { return std::fabs(x); });
        case SQUARE: return a * a;
        case SQUARE_ROOT: return by_lane(a, [](float x) { return std::sqrt(x); });
        case RECIPROCAL_ROOT: return 1.0f / by_lane(a, [](float x) { return std::sqrt(x); });
        case RECIPROCAL: return 1.0f / a;
        case EXP: return exp(a);
        case LOG: return by_lane(a, [](float x) { return std::log(x); });
        case LOG1P: return by_lane(a, [](float x) { return std::log1p(x); });
        case COS: return by_lane(a, [](float x) { return std::cos(x); });
        case SIN: return by_lane(a, [](float x) { return std::sin(x); });
        case TANH: return by_lane(a, [](float x) { return std::tanh(x); });
        case FLOOR: return by_lane(a, [](float x) { return std::floor(x); });
        case SIGMOID_OF: return sigmoid(a);
        case SILU_OF: return activate<SILU>(a);
        case RELU_OF: return activate<RELU>(a);
        case GELU_OF: return activate<GELU>(a);
        case GELU_TANH_OF: return activate<GELU_TANH>(a);
        case SOFTPLUS: return by_lane(a, [](float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); });
        case NOT: return flag(a == 0.0f);
        case ADD: return a + alpha * b;
        case MULTIPLY: return a * b;
        case DIVIDE: return a / b;
        case POWER: return by_lane(a, [&](float x) { return std::pow(x, alpha); });
        case MAXIMUM: return extreme(a, b, a > b);
        case MINIMUM: return extreme(a, b, a < b);
        case EQUAL: return flag(a == b);
        case NOT_EQUAL: return 1.0f - flag(a == b);
        case LESS: return flag(a < b);
        case LESS_OR_EQUAL: return flag((a < b) | (a == b));
        case GREATER: return flag(a > b);
        case GREATER_OR_EQUAL: return flag((a > b) | (a == b));
        default: return select(a == 0.0f, c, b);  // WHERE
    }
}

int64_t result_of(int operation, int64_t alpha, int64_t a, int64_t b, int64_t c) {
    switch (operation) {
        case COPY: return a;
        case NOT: return a == 0;
        case ADD: return a + alpha * b;
        case MULTIPLY: return a * b;
        case MAXIMUM: return a > b ? a : b;
        case MINIMUM: return a < b ? a : b;
        case EQUAL: return a == b;
        case NOT_EQUAL: return a != b;
        case LESS: return a < b;
        case LESS_OR_EQUAL: return a <= b;
        case GREATER: return a > b;
        case GREATER_OR_EQUAL: return a >= b;
        default: return a != 0 ? b : c;  // WHERE
    }
}

void compute(int operation, float alpha, const float* const* operands, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES)
        store(out + i, result_of(operation, alpha, load(operands[0] + i), load(operands[1] + i), load(operands[2] + i)));
}

void compute(int operation, float alpha, const int64_t* const* operands, int64_t* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        out[i] = result_of(operation, static_cast<int64_t>(alpha), operands[0][i], operands[1][i], operands[2][i]);
}

template <class C>
void elementwise(int operation, float alpha, const int64_t* sizes, const Operand& out, const Operand* operands,
                 int count) {
    const int64_t width = sizes[DIMS - 1], blocks = (width + BLOCK - 1) / BLOCK;
    const int64_t num_rows = sizes[0] * sizes[1] * sizes[2];
#pragma omp for schedule(static)
    for (int64_t item = 0; item < num_rows * blocks; ++item) {
        const int64_t row = item / blocks, begin = item % blocks * BLOCK;
        const int64_t index[DIMS] = {row / (sizes[1] * sizes[2]), row / sizes[2] % sizes[1], row % sizes[2], begin};
        const int64_t length = begin + BLOCK < width ? BLOCK : width - begin;
        C fetched[3][BLOCK] = {}, result[BLOCK];
        const C* const pointers[3] = {fetched[0], fetched[1], fetched[2]};
        for (int i = 0; i < count; ++i) fetch(operands[i], index, length, fetched[i]);
        compute(operation, alpha, pointers, result, length);
        put(out, index, length, result);
    }
}

}  // namespace
}  // namespace autodeploy

#define OPERAND(NAME)                                                                                                \
    void *NAME, float NAME##_value, int NAME##_kind, int64_t NAME##_0, int64_t NAME##_1, int64_t NAME##_2,           \
        int64_t NAME##_3
#define GIVEN_OPERAND(NAME)                                                                                          \
    { NAME, NAME##_value, NAME##_kind, {NAME##_0, NAME##_1, NAME##_2, NAME##_3} }

// Sizes of the result, and of every tensor its strides in elements: 0 along a dimension that it is repeated in.
// `integers`: all tensors are integers or bool. `count`: how many operands there are.
extern "C" void elementwise(int operation, int integers, float alpha, int64_t size_0, int64_t size_1, int64_t size_2,
                            int64_t size_3, OPERAND(out), int count, OPERAND(a), OPERAND(b), OPERAND(c),
                            int threads) {
    const int64_t sizes[] = {size_0, size_1, size_2, size_3};
    const autodeploy::Operand result = GIVEN_OPERAND(out);
    const autodeploy::Operand operands[] = {GIVEN_OPERAND(a), GIVEN_OPERAND(b), GIVEN_OPERAND(c)};
    autodeploy::with_team(threads, [&] {
        if (integers)
            autodeploy::elementwise<int64_t>(operation, alpha, sizes, result, operands, count);
        else
            autodeploy::elementwise<float>(operation, alpha, sizes, result, operands, count);
    });
}
RECORDABLE(elementwise)
