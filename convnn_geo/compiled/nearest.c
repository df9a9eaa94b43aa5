/* The k nearest of every target: values and places (examples, n, k), or (n, k) of the rows of
   examples of unequal size. */

#include <stddef.h>
#include <stdlib.h>

#include "products.h"

/* Where each example's blocks start among those of all; NULL where memory does not suffice. */
static int64_t *block_starts(const Problem *problem) {
  int64_t *start = malloc((size_t)(problem->examples + 1) * sizeof *start);
  if (!start) return NULL;
  start[0] = 0;
  for (int64_t e = 0; e < problem->examples; e++)
    start[e + 1] = start[e] + (targets_of(problem, e) + TARGETS - 1) / TARGETS;
  return start;
}

/* The example that a block belongs to. */
static int64_t example_of(const int64_t *start, int64_t examples, int64_t block) {
  int64_t low = 0, high = examples;
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    if (start[middle] <= block) low = middle;
    else high = middle;
  }
  return low;
}

int products_nearest(const Problem *problem, int threads, float *values, int64_t *places) {
  int64_t *start = block_starts(problem), examples = problem->examples;
  int served = start != NULL;
  if (!served) return 0;
#pragma omp parallel num_threads(threads) reduction(&& : served)
  {
    Workspace *workspace = workspace_new(problem);
    served = workspace != NULL;
#pragma omp for schedule(guided)
    for (int64_t block = 0; block < start[examples]; block++) {
      int64_t example = example_of(start, examples, block);
      int64_t first = (block - start[example]) * TARGETS;
      int64_t row = problem->target_start ? problem->target_start[example] : example * problem->n;
      int64_t at = (row + first) * problem->k;
      if (served) served = nearest_of_block(workspace, example, first, values + at, places + at);
    }
    workspace_free(workspace);
  }
  free(start);
  return served;
}
