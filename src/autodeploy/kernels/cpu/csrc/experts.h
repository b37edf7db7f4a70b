// What mixtures of experts have in common, whatever their weights: choices sorted by expert, and gates.

#pragma once

#include <algorithm>

#include "activation.h"

namespace autodeploy {
namespace {

struct Choices {
    const int64_t* indices;  // `[num_tokens, num_choices]`
    int64_t num_tokens, num_choices, num_experts;
    int64_t *order, *groups;  // choices by expert; where each expert's begin

    int64_t expert(int64_t position) const { return indices[order[position]]; }
    int64_t token(int64_t position) const { return order[position] / num_choices; }

    // Sorts the choices that are experts; groups[g] .. groups[g + 1] are those of one. Returns the number of groups.
    int64_t sort() const {
        int64_t count = 0, num_groups = 0;
        for (int64_t c = 0; c < num_tokens * num_choices; ++c)
            if (indices[c] >= 0 && indices[c] < num_experts) order[count++] = c;
        std::sort(order, order + count, [&](int64_t a, int64_t b) {
            return indices[a] != indices[b] ? indices[a] < indices[b] : a < b;
        });
        for (int64_t p = 0; p < count; ++p)
            if (p == 0 || expert(p) != expert(p - 1)) groups[num_groups++] = p;
        groups[num_groups] = count;
        return num_groups;
    }
};

struct Gate {
    int activation;
    bool gated;
    float limit, up_offset;

    // `width` values from as many gates and, behind them, ups; or from what stands for both.
    template <class T>
    void apply(const float* gates, int64_t width, T* to) const {
        for (int64_t i = 0; i < width; i += LANES) {
            const int64_t left = width - i;
            Floats result = load(gates + i, left);
            if (gated) {
                Floats up = load(gates + width + i, left);
                result = select(result > limit, splat(limit), result);
                up = select(up > limit, splat(limit), up);
                up = select(up < -limit, splat(-limit), up);
                result = activate(activation, result) * (up + up_offset);
            } else {
                result = activate(activation, result);
            }
            store(to + i, result, left);
        }
    }
};

}  // namespace
}  // namespace autodeploy
