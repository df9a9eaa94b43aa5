/* The k smallest of each row, ties to the lowest index; NaN counts as the largest.

   A bound comes first: a value that at least k of the row do not exceed, and few more, by bisection.
   In a long row it is sought among the minima of interleaved groups, so that the row is read once.
   What does not exceed the bound is listed, and each listed value's rank is the number of those
   before it. There is hardly a branch that depends on the data, and the loops over blocks of fixed
   size vectorise. */

#include "keys.h"
#include "select.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum { WIDE = 16, BLOCK = 32, LIST = 512, SPARE = 2 };

typedef struct {
  float value[LIST];
  int64_t index[LIST];
  int count;
} List;

static inline int count_up_to(const int32_t *keys, int groups, int32_t limit) {
  int count = 0;
  for (int j = 0; j < groups; j++) count += keys[j] <= limit;
  return count;
}

/* Groups are a constant wherever this is called, so that its loops vectorise. */
static inline float bound_by(int groups, const float *row, int64_t m, int k) {
  float minimum[GROUPS];
  for (int j = 0; j < groups; j++) minimum[j] = INFINITY;
  int64_t start = 0;
  for (; start + groups <= m; start += groups)
    for (int j = 0; j < groups; j++)
      minimum[j] = row[start + j] < minimum[j] ? row[start + j] : minimum[j];
  for (int64_t j = 0; j < m - start; j++)
    minimum[j] = row[start + j] < minimum[j] ? row[start + j] : minimum[j];
  int32_t key[GROUPS], least = INT32_MAX, most = INT32_MIN, infinity = key_of(INFINITY);
  for (int j = 0; j < groups; j++) key[j] = key_of(minimum[j]);
  for (int j = 0; j < groups; j++) least = key[j] < least ? key[j] : least;
  int32_t finite[GROUPS]; /* apart, or neither loop vectorises */
  for (int j = 0; j < groups; j++) finite[j] = key[j] < infinity ? key[j] : INT32_MIN;
  for (int j = 0; j < groups; j++) most = finite[j] > most ? finite[j] : most;
  if (count_up_to(key, groups, most) < k) return INFINITY; /* to bisect up to it would take long */
  int64_t low = (int64_t)least - 1, high = most;
  while (high - low > 1) {
    int64_t middle = low + (high - low) / 2;
    int count = count_up_to(key, groups, (int32_t)middle);
    if (count < k) {
      low = middle;
    } else {
      high = middle;
      if (count <= k + SPARE) break;
    }
  }
  return value_of((int32_t)high);
}

/* Two groups or more for each of the k, as far as there are so many. */
float bound(const float *row, int64_t m, int k) {
  if (4 * k <= GROUPS / 4) return bound_by(GROUPS / 4, row, m, k);
  return 4 * k <= GROUPS ? bound_by(GROUPS / 2, row, m, k) : bound_by(GROUPS, row, m, k);
}

float bound_among(const float *values, int64_t count, int k) {
  float first = INFINITY, last = -INFINITY;
  for (int64_t j = 0; j < count; j++) first = values[j] < first ? values[j] : first;
  for (int64_t j = 0; j < count; j++) last = values[j] > last ? values[j] : last;
  int64_t low = (int64_t)key_of(first) - 1, high = key_of(last);
  while (high - low > 1) {
    int64_t middle = low + (high - low) / 2;
    float limit = value_of((int32_t)middle);
    int32_t found = 0;
    for (int64_t j = 0; j < count; j++) found += values[j] <= limit;
    if (found < k) {
      low = middle;
    } else {
      high = middle;
      if (found <= k + SPARE) break;
    }
  }
  return value_of((int32_t)high);
}

/* Sort the list, keep k. A value's rank is the number of those before it. */
static void sort(List *list, int k) {
  List sorted;
  for (int start = 0; start < list->count; start += WIDE) {
    const float *value = list->value + start;
    int32_t rank[WIDE] = {0};
    for (int j = 0; j < list->count; j++) {
      float other = list->value[j];
      for (int i = 0; i < WIDE; i++)
        rank[i] += (other < value[i]) | ((other == value[i]) & (j - start < i));
    }
    for (int i = 0; i < WIDE && start + i < list->count; i++)
      if (rank[i] < k) {
        sorted.value[rank[i]] = value[i];
        sorted.index[rank[i]] = list->index[start + i];
      }
  }
  if (list->count > k) list->count = k;
  memcpy(list->value, sorted.value, (size_t)list->count * sizeof *sorted.value);
  memcpy(list->index, sorted.index, (size_t)list->count * sizeof *sorted.index);
}

void smallest_of_row(const float *row, int64_t m, int k, float *best, int64_t *index) {
  List list;
  list.count = 0;
  int equal = 0; /* of many equal to the bound, the first k are all that can be among the nearest */
  float most = bound(row, m, k), limit = most; /* what is under it is listed: just above the bound */
  limit = fabsf(limit) <= FLT_MIN ? 2 * FLT_MIN : nextafterf(limit, INFINITY); /* never denormal */
  for (int64_t start = 0; start < m; start += BLOCK) {
    int width = BLOCK;
    if (m - start < BLOCK) {
      width = (int)(m - start);
    } else {
      int any = 0;
      for (int j = 0; j < BLOCK; j++) any |= row[start + j] < limit;
      if (!any) continue;
    }
    int count = list.count;
    for (int j = 0; j < width; j++) { /* whether it counts decides what the next overwrites */
      list.value[count] = row[start + j];
      list.index[count] = start + j;
      int same = row[start + j] == most;
      count += (row[start + j] < limit) & (!same | (equal < k));
      equal += same;
    }
    list.count = count;
    if (list.count > LIST - 2 * BLOCK) {
      sort(&list, k);
      if (list.count == k) limit = list.value[k - 1]; /* of equal ones, those before it stay */
    }
  }
  sort(&list, k);
  int count = list.count;
  memcpy(best, list.value, (size_t)count * sizeof *best);
  memcpy(index, list.index, (size_t)count * sizeof *index);
  for (int64_t j = 0; j < m && count < k; j++) /* infinity, then NaN, where little else is */
    if (row[j] == INFINITY) best[count] = row[j], index[count++] = j;
  for (int64_t j = 0; j < m && count < k; j++)
    if (isnan(row[j])) best[count] = row[j], index[count++] = j;
}

/* values (rows, m); best and index (rows, k); k at most m and GROUPS. */
void k_smallest(const float *values, int64_t rows, int64_t m, int k, int threads, float *best,
                int64_t *index) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; i++)
    smallest_of_row(values + i * m, m, k, best + i * k, index + i * k);
}
