/* The k nearest of every target: values and places (examples, n, k). */

#include <stddef.h>

#include "products.h"

int products_nearest(const Problem *problem, int threads, float *values, int64_t *places) {
  int64_t blocks = (problem->n + TARGETS - 1) / TARGETS, size = (int64_t)TARGETS * problem->k;
  int served = 1;
#pragma omp parallel num_threads(threads) reduction(&& : served)
  {
    Workspace *workspace = workspace_new(problem);
    served = workspace != NULL;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < problem->examples * blocks; item++) {
      int64_t example = item / blocks, block = item % blocks;
      int64_t at = example * problem->n * problem->k + block * size;
      if (served)
        served = nearest_of_block(workspace, example, block * TARGETS, values + at, places + at);
    }
    workspace_free(workspace);
  }
  return served;
}
