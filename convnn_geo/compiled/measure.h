/* The distance of one pair that decides who is nearer: in double precision, or axis by axis in
   single where there are few; rounded to single at the end. */

#pragma once

#include "differences.h"
#include "products.h"
#include "vectors.h"

static const float TINY = 1.1e-19f; /* what is less has no square in single precision */

static inline double product(const float *q, const float *key, int64_t d) {
  double sum[DOUBLES] = {0}, total = 0;
  int64_t axis = 0;
  for (; axis + DOUBLES <= d; axis += DOUBLES)
    for (int lane = 0; lane < DOUBLES; lane++)
      sum[lane] += (double)q[axis + lane] * key[axis + lane];
  for (; axis < d; axis++) total += (double)q[axis] * key[axis];
  return d < DOUBLES ? total : total + across_doubles(sum);
}

/* Before it is rounded. zero: whether the target is zero, of ANGLES; add: the source's bias. */
static inline double distance_of(const Problem *p, const float *q, int zero, const float *key,
                                 float add) {
  if (p->kind != PRODUCTS) {
    int few = p->d <= FEW_AXES;
    if (p->kind == ANGLES && (zero || is_zero(key, p->d))) return 1;
    float half = p->kind == ANGLES ? 0.5f : 1;
    return few ? squared_difference_of_few(q, key, p->d) * half
               : squared_difference(q, key, p->d) * half;
  }
  return -p->scale * product(q, key, p->d) + add;
}
