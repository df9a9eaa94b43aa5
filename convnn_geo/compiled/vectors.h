/* Sums over the axes of one or two vectors, in single precision. */

#pragma once

#include <stdint.h>
#include <string.h>

#include "tile.h"

/* Half to half, so that few additions wait for one another. */
static inline float across(Vector sum) {
  float part[LANES];
  memcpy(part, &sum, sizeof sum);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; lane++) part[lane] += part[lane + width];
  return part[0];
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
