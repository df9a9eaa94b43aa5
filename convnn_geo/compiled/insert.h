/* The nearest so far, in order of (value, index). A pair is one integer, the value's key above the
   index, so that one comparison tells; no value is NaN, and indices are below 2^31. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "keys.h"

enum { ABREAST = 8 }; /* pairs that are compared at once */
static const int64_t ABOVE = (int64_t)1 << 32;

typedef struct {
  int64_t *pair;    /* the nearest, behind one that comes before all others; in order once full */
  int64_t *scratch; /* likewise */
  int64_t k, wide, count;
} Nearest;

/* Room for k; 0 where memory does not suffice. */
static inline int nearest_new(Nearest *found, int64_t k) {
  found->k = k, found->wide = (k + ABREAST - 1) / ABREAST * ABREAST;
  size_t size = (size_t)(found->wide + 1) * sizeof *found->pair;
  found->pair = malloc(size), found->scratch = malloc(size);
  return found->pair && found->scratch;
}

static inline void nearest_free(Nearest *found) { free(found->pair), free(found->scratch); }

/* Nobody yet. */
static inline void nearest_clear(Nearest *found) {
  found->count = 0;
  found->pair[0] = INT64_MIN;
  for (int64_t j = 1; j <= found->wide; j++) found->pair[j] = INT64_MAX;
}

/* What is farther than this is not among the nearest. */
static inline float nearest_limit(const Nearest *found) {
  return found->count < found->k ? INFINITY : value_of((int32_t)(found->pair[found->k] >> 32));
}

/* A pair's place is the number of those before it. */
static inline void nearest_sort(Nearest *found) {
  int64_t *pair = found->pair, *sorted = found->scratch;
  for (int64_t j = 1; j <= found->count; j++) {
    int64_t before = 0;
    for (int64_t i = 0; i < found->wide; i++) before += pair[i + 1] < pair[j];
    sorted[1 + before] = pair[j];
  }
  memcpy(pair + 1, sorted + 1, (size_t)found->count * sizeof *pair);
}

/* Of three pairs the middle one goes where it belongs: there is no branch that depends on them but
   the last, and many are compared at once. */
static inline void nearest_insert(Nearest *found, int64_t pair) {
  for (int64_t start = found->wide - ABREAST;; start -= ABREAST) {
    int64_t *at = found->pair + start, before[ABREAST], here[ABREAST];
    memcpy(before, at, sizeof before), memcpy(here, at + 1, sizeof here);
    for (int j = 0; j < ABREAST; j++) {
      int64_t least = pair < here[j] ? pair : here[j];
      here[j] = least > before[j] ? least : before[j];
    }
    memcpy(at + 1, here, sizeof here);
    if (at[0] <= pair) return;
  }
}

static inline void offer(Nearest *found, float value, int64_t index) {
  int64_t pair = key_of(value) * ABOVE + index;
  if (found->count < found->k) {
    found->pair[++found->count] = pair;
    if (found->count == found->k) nearest_sort(found);
  } else if (pair < found->pair[found->k]) {
    nearest_insert(found, pair);
  }
}

/* Values and indices (k), as many as were found. */
static inline void nearest_tell(Nearest *found, float *value, int64_t *index) {
  if (found->count < found->k) nearest_sort(found);
  for (int64_t j = 0; j < found->count; j++) {
    int64_t pair = found->pair[j + 1];
    value[j] = value_of((int32_t)(pair >> 32));
    index[j] = pair & (ABOVE - 1);
  }
}
