/* Sums over the axes of one or two vectors, in single precision. */

#pragma once

#include <stdint.h>
#ifdef __AVX__
#include <immintrin.h>
#endif
#include <string.h>

#include "tile.h"

/* Half to half, so that few additions wait for one another. */
static inline float across(Vector sum) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)sum);
#elif defined(__AVX__)
  __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)sum), _mm256_extractf128_ps((__m256)sum, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(half) + _mm_cvtss_f32(_mm_movehdup_ps(half));
#else
  return sum[0] + sum[2] + (sum[1] + sum[3]);
#endif
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
