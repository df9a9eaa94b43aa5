/* Integers in the order of floats, and back. */

#pragma once

#include <stdint.h>
#include <string.h>

static inline int32_t key_of(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits ^ ((bits >> 31) & INT32_MAX);
}

static inline float value_of(int32_t key) {
  int32_t bits = key ^ ((key >> 31) & INT32_MAX);
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
