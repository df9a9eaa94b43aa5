/* Size of the tile of sums that stays in registers: TARGETS rows, PANEL columns. */

#pragma once

#if defined(__AVX512F__)
enum { LANES = 16, TARGETS = 8 };
#elif defined(__AVX__)
enum { LANES = 8, TARGETS = 6 };
#else
enum { LANES = 4, TARGETS = 8 };
#endif
enum { PANEL = 2 * LANES };

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));
