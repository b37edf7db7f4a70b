// A step of a model as one call: kernels that were called one by one from Python are called again with the same
// arguments, by one team of threads.

#include "team.h"

namespace autodeploy {
namespace {

struct Entry {
    int (*function)(const Slot*);
    const Slot* arguments;  // the number of threads among them is IN_TEAM
};

}  // namespace
}  // namespace autodeploy

// Returns 0, or 256 · (1 + the entry that failed first) + what it returned. Later entries run all the same: threads of a
// team must stay together.
extern "C" int64_t run_tape(const autodeploy::Entry* entries, int64_t count, int threads) {
    int64_t failure = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; ++i) {
        const int found = entries[i].function(entries[i].arguments);
        if (found != 0) {
#pragma omp critical
            if (failure == 0) failure = 256 * (i + 1) + found;
        }
    }
    return failure;
}
