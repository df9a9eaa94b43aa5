/* Sums over the axes of one or two vectors, in single precision. */

#include <stdint.h>

#include "tile.h"

static inline float across(Vector sum) {
  float total = 0;
  for (int lane = 0; lane < LANES; lane++) total += sum[lane];
  return total;
}

static inline float dot(const float *x, const float *y, int64_t d) {
  Vector sum = {0};
  float rest = 0;
  int64_t axis = 0;
  for (; axis + LANES <= d; axis += LANES)
    sum += *(const Vector *)(x + axis) * *(const Vector *)(y + axis);
  for (; axis < d; axis++) rest += x[axis] * y[axis];
  return across(sum) + rest;
}

static inline float squared_distance(const float *x, const float *y, int64_t d) {
  Vector sum = {0};
  float rest = 0;
  int64_t axis = 0;
  for (; axis + LANES <= d; axis += LANES) {
    Vector difference = *(const Vector *)(x + axis) - *(const Vector *)(y + axis);
    sum += difference * difference;
  }
  for (; axis < d; axis++) rest += (x[axis] - y[axis]) * (x[axis] - y[axis]);
  return across(sum) + rest;
}

/* Whether a vector of length one or zero is zero. */
static inline int is_zero(const float *vector, int64_t d) { return dot(vector, vector, d) < 0.25f; }
