// How kernels share work between threads, and how a recorded call is repeated.
//
// A kernel's loops are `omp for`, without a team of their own: whoever calls it brings one. A call from Python starts a
// team for one kernel; a tape (tape.cpp) starts one for a whole step, in which kernels follow each other with a barrier
// between them, ten times cheaper than a new team each. So every thread of a team runs all of a kernel's code outside
// its loops, and what must exist once is allocated in an `omp single`.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace autodeploy {

constexpr int IN_TEAM = 0;  // as a number of threads: the caller's team is running this already

// Threads of the team that runs this.
inline int team_size() {
#if defined(_OPENMP)
    return omp_get_num_threads();
#else
    return 1;
#endif
}

// Memory of a thread, freed when the thread ends.
struct Scratch {
    void* memory = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(memory); }
};

// Memory of this thread, kept from call to call; what was in it is lost.
template <class T>
inline T* own_memory(int64_t count) {
    static thread_local Scratch own;
    const size_t wanted = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    if (wanted > own.size) {
        std::free(own.memory);
        own.memory = std::aligned_alloc(64, wanted);
        own.size = wanted;
    }
    return static_cast<T*>(own.memory);
}

// Runs `body` on every thread of a team of `threads`, or as one of the running team's.
template <class Body>
inline void with_team(int threads, Body body) {
    if (threads == IN_TEAM) return body();
#pragma omp parallel num_threads(threads) if (threads > 1)
    body();
}

// The same for a body that gives 0, or what went wrong; of several threads' faults, one of them.
template <class Body>
inline int status_of(int threads, Body body) {
    int status = 0;
    with_team(threads, [&] {
        const int found = body();
        if (found != 0) {
#pragma omp atomic write
            status = found;
        }
    });
    return status;
}

// One argument of a recorded call, of any type that kernels take.
union Slot {
    int64_t bits;
    template <class A>
    A as() const {
        static_assert(sizeof(A) <= sizeof(bits), "an argument larger than a slot");
        A value;
        std::memcpy(&value, &bits, sizeof(value));
        return value;
    }
};

template <class R, class... A, size_t... I>
inline int call_with(R (*function)(A...), const Slot* slots, std::index_sequence<I...>) {
    if constexpr (std::is_void_v<R>) {
        function(slots[I].as<A>()...);
        return 0;
    } else {
        return function(slots[I].as<A>()...);
    }
}

template <class R, class... A>
inline int call_with(R (*function)(A...), const Slot* slots) {
    return call_with(function, slots, std::index_sequence_for<A...>{});
}

}  // namespace autodeploy

// Lets a tape repeat calls of an exported function.
#define RECORDABLE(NAME)                                                                                             \
    extern "C" int NAME##_recorded(const autodeploy::Slot* slots) { return autodeploy::call_with(NAME, slots); }
