/* The few of a row who may be among its nearest: listed, told apart, put in order. */

#pragma once

#include <stdint.h>

enum { FEW_MORE = 8 }; /* than k */

/* Listed values and their places in the row, in its order. */
typedef struct {
  float *value;
  int32_t *place;
  int64_t count;
} Near;

/* Room for a row's values, wide a multiple of PANEL; 0 where memory does not suffice. */
int near_new(Near *near, int64_t wide);
void near_free(Near *near);

/* List a row's values up to a limit. */
void near_list(Near *near, const float *row, int64_t wide, float limit);

/* Drop those who are farther than the k-th by more than a margin, if many are listed. */
void near_tighten(Near *near, int k, float margin);

/* Whether so few are listed, k of them wanted, that they may be apart; of more, many are tied. */
int near_few(const Near *near, int k);

/* The first k in order, ties as they stand in the row; values and places have room for GROUPS. */
void near_sort(Near *near, int k, float *values, int64_t *places);

/* Whether the k smallest can be told from the others by more than a margin; they are listed first
   then, in any order. No more than k + FEW_MORE may be listed. */
int near_divide(Near *near, int k, float margin);

/* Whether each of the first k values lies farther before the next than a margin. */
static inline int apart(const float *values, int64_t k, float margin) {
  int close = 0;
  for (int64_t j = 1; j < k; j++) close |= !(values[j] - values[j - 1] > margin);
  return !close;
}
