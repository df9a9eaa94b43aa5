/* Of one pair of points: what differences.c gives to others. */

#pragma once

#include <stdint.h>

enum { DOUBLES = 16 }; /* sums in double precision that are added up side by side */

/* Half to half, so that few additions wait for one another. */
static inline double across_doubles(double sum[DOUBLES]) {
  for (int half = DOUBLES / 2; half; half /= 2)
    for (int lane = 0; lane < half; lane++) sum[lane] += sum[lane + half];
  return sum[0];
}

/* Squared Euclidean distance, summed in double precision. */
double squared_difference(const float *q, const float *key, int64_t d);

/* Up to so many axes the distance that decides is this one, in single precision. */
enum { FEW_AXES = 8 };
float squared_difference_of_few(const float *q, const float *key, int64_t d);
