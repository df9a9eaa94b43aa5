/* Of one row of values: what k_smallest.c gives to others. */

#pragma once

#include <stdint.h>

/* The most neighbours that bound() can bound. */
enum { GROUPS = 256 };

/* A value that at least k of the row's m do not exceed, and few more; k at most m and GROUPS. */
float bound(const float *row, int64_t m, int k);

/* The same of few values, all of which are looked at: hardly more do not exceed it. None is NaN. */
float bound_among(const float *values, int64_t count, int k);

/* The k smallest in order of (value, index), NaN last. */
void smallest_of_row(const float *row, int64_t m, int k, float *best, int64_t *index);
