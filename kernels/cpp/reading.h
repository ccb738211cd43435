// How weights and caches are read from memory.
#pragma once

namespace dspark {

constexpr int AHEAD = 2048;  // bytes from a row's element to the one that is prefetched with it

// Whether sequential readers are best left to the CPU's own prefetch, and blocks read in order: see
// `reading` in codegen/cpp/isa.py.
#if defined(DSPARK_SEQUENCE)
constexpr bool SEQUENCE = true;
#else
constexpr bool SEQUENCE = false;
#endif

}  // namespace dspark
