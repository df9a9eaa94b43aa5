/* The nearest so far, in order of (value, index). */

#pragma once

#include <stdint.h>

typedef struct {
  float *value;
  int64_t *index;
  int count, k;
} Nearest;

static inline void insert(Nearest *found, float value, int64_t index) {
  int slot = found->count < found->k ? found->count++ : found->k - 1;
  for (; slot > 0; slot--) {
    float other = found->value[slot - 1];
    if (value > other || (value == other && index > found->index[slot - 1])) break;
    found->value[slot] = other;
    found->index[slot] = found->index[slot - 1];
  }
  found->value[slot] = value;
  found->index[slot] = index;
}

/* Insert what is nearer than the last, or as near and comes before it. */
static inline void offer(Nearest *found, float value, int64_t index) {
  if (found->count == found->k) {
    float worst = found->value[found->k - 1];
    if (value > worst || (value == worst && index > found->index[found->k - 1])) return;
  }
  insert(found, value, index);
}
