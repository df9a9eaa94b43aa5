/* The k nearest of points in up to three dimensions, exactly, through a grid of cells.

   Sources are sorted by cell. A target looks at its own cell, then at shell after shell around it,
   until no cell outside can hold a nearer source. Squared distances are summed in the order of
   axes, without fused operations, as everywhere else in this package: the same numbers, and so the
   same order and the same ties, to the lowest index. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "insert.h"

enum { AXES = 3, LANES = 32 };

typedef struct {
  float low[AXES], edge[AXES];
  int64_t count[AXES];
  int64_t *start, *index; /* where each cell starts, and the sources in order of cells */
  float *place[AXES];     /* their coordinates in that order, one axis after another */
} Grid;

static int64_t along(const Grid *grid, int axis, float coordinate) {
  float cell = (coordinate - grid->low[axis]) / grid->edge[axis];
  if (!(cell > 0)) return 0;
  int64_t last = grid->count[axis] - 1;
  return cell < (float)last ? (int64_t)cell : last;
}

/* A point's coordinates on the last d of three axes, 0 on those before. */
static void widen(const float *point, int d, float q[AXES]) {
  for (int axis = 0; axis < AXES; axis++) q[axis] = axis < AXES - d ? 0 : point[axis - (AXES - d)];
}

static int64_t cell_of(const Grid *grid, const float *point, int d) {
  float q[AXES];
  widen(point, d, q);
  int64_t cell = 0;
  for (int axis = 0; axis < AXES; axis++)
    cell = cell * grid->count[axis] + along(grid, axis, q[axis]);
  return cell;
}

/* Edges such that a cell holds about `wanted` sources; an axis shorter than an edge has one cell. */
static void choose_edges(Grid *grid, const float *keys, int64_t m, int d, double wanted) {
  double extent[AXES];
  for (int axis = 0; axis < AXES; axis++) {
    float low = INFINITY, high = -INFINITY;
    for (int64_t j = 0; j < m; j++) {
      float q[AXES];
      widen(keys + j * d, d, q);
      low = q[axis] < low ? q[axis] : low;
      high = q[axis] > high ? q[axis] : high;
    }
    grid->low[axis] = low;
    extent[axis] = (double)high - low;
    grid->count[axis] = 1;
    grid->edge[axis] = INFINITY;
  }
  double cells = m / wanted;
  for (int left = AXES; left > 0; left--) { /* the shortest axis that is left comes first */
    int shortest = -1;
    double volume = 1;
    for (int axis = 0; axis < AXES; axis++)
      if (grid->edge[axis] == INFINITY) {
        volume *= extent[axis];
        if (shortest < 0 || extent[axis] < extent[shortest]) shortest = axis;
      }
    double edge = pow(volume / cells, 1.0 / left);
    double count = edge > 0 ? floor(extent[shortest] / edge) : 1;
    count = count < 1 ? 1 : count > 1024 ? 1024 : count;
    grid->count[shortest] = (int64_t)count;
    grid->edge[shortest] = (float)(extent[shortest] / count);
    if (!(grid->edge[shortest] > 0)) grid->edge[shortest] = 1;
    cells = cells / count < 1 ? 1 : cells / count;
  }
}

/* Look at the sources of a run of cells. */
static void look(const Grid *grid, const float *q, int64_t first, int64_t last, int64_t own,
                 Nearest *found) {
  int64_t stop = grid->start[last + 1];
  for (int64_t at = grid->start[first]; at < stop; at += LANES) {
    float value[LANES];
    int width = stop - at < LANES ? (int)(stop - at) : LANES;
    const float *x = grid->place[0] + at, *y = grid->place[1] + at, *z = grid->place[2] + at;
    for (int j = 0; j < LANES; j++) { /* what lies past the end is there, and is not looked at */
      float dx = q[0] - x[j], dy = q[1] - y[j], dz = q[2] - z[j];
      value[j] = dx * dx + dy * dy + dz * dz;
    }
    float limit = nearest_limit(found);
    int any = 0;
    for (int j = 0; j < LANES; j++) any |= value[j] <= limit;
    if (!any) continue;
    for (int j = 0; j < width; j++) {
      int64_t index = grid->index[at + j];
      if (index != own) offer(found, value[j], index);
    }
  }
}

/* A distance that everything outside the box of cells around `at` exceeds. */
static float reach(const Grid *grid, const float *q, const int64_t *at, int64_t radius) {
  float nearest = INFINITY;
  for (int axis = 0; axis < AXES; axis++) {
    float edge = grid->edge[axis], spare = 1e-3f * edge; /* rounding moves a source by less */
    if (at[axis] - radius > 0) {
      float gap = q[axis] - (grid->low[axis] + (float)(at[axis] - radius) * edge) - spare;
      nearest = gap < nearest ? gap : nearest;
    }
    if (at[axis] + radius + 1 < grid->count[axis]) {
      float gap = grid->low[axis] + (float)(at[axis] + radius + 1) * edge - q[axis] - spare;
      nearest = gap < nearest ? gap : nearest;
    }
  }
  return nearest;
}

static void one_target(const Grid *grid, const float *point, int d, int64_t own, Nearest *found) {
  float q[AXES];
  int64_t at[AXES];
  widen(point, d, q);
  for (int axis = 0; axis < AXES; axis++) at[axis] = along(grid, axis, q[axis]);
  const int64_t *count = grid->count;
  for (int64_t radius = 0;; radius++) {
    for (int64_t i = at[0] - radius; i <= at[0] + radius; i++) {
      if (i < 0 || i >= count[0]) continue;
      for (int64_t j = at[1] - radius; j <= at[1] + radius; j++) {
        if (j < 0 || j >= count[1]) continue;
        int64_t row = (i * count[1] + j) * count[2];
        int64_t left = at[2] - radius, right = at[2] + radius;
        if (llabs(i - at[0]) == radius || llabs(j - at[1]) == radius) {
          int64_t first = left < 0 ? 0 : left, last = right < count[2] ? right : count[2] - 1;
          look(grid, q, row + first, row + last, own, found);
        } else {
          if (left >= 0) look(grid, q, row + left, row + left, own, found);
          if (right < count[2]) look(grid, q, row + right, row + right, own, found);
        }
      }
    }
    float safe = reach(grid, q, at, radius);
    if (safe == INFINITY) return;
    if (safe > 0 && nearest_limit(found) < safe * safe * (1 - 1e-5f)) return;
  }
}

static int64_t *sort_by_cell(const Grid *grid, const float *points, int64_t n, int d,
                             int64_t *start, int64_t cells) {
  int64_t *cell = malloc((size_t)n * sizeof *cell), *order = malloc((size_t)n * sizeof *order);
  if (cell && order) {
    for (int64_t i = 0; i < n; i++) start[(cell[i] = cell_of(grid, points + i * d, d)) + 1]++;
    for (int64_t c = 0; c < cells; c++) start[c + 1] += start[c];
    for (int64_t i = 0; i < n; i++) order[start[cell[i]]++] = i;
    for (int64_t c = cells; c > 0; c--) start[c] = start[c - 1];
    start[0] = 0;
  } else {
    free(order);
    order = NULL;
  }
  free(cell);
  return order;
}

/* keys (m, d) and q (n, d) of finite values, d up to 3; own (n) or NULL: a source that each target
   is not to find; value (n, k) of squared distances and index (n, k), in order.
   Returns 0; 1 where the sources lie so unevenly that cells are of little use; 2 out of memory. */
int cells_nearest(const float *keys, int64_t m, const float *q, int64_t n, int d, int k,
                  const int64_t *own, int threads, float *value, int64_t *index) {
  Grid grid;
  double wanted = 0.6 * k < 2 ? 2 : 0.6 * k;
  choose_edges(&grid, keys, m, d, wanted);
  int64_t cells = grid.count[0] * grid.count[1] * grid.count[2];
  int status = 2;
  int64_t *starts = calloc((size_t)cells + 2, sizeof *starts);
  int64_t *targets = calloc((size_t)cells + 2, sizeof *targets), *order = NULL;
  float *places = calloc((size_t)AXES * ((size_t)m + LANES), sizeof *places);
  grid.start = starts;
  grid.index = starts ? sort_by_cell(&grid, keys, m, d, starts, cells) : NULL;
  if (targets) order = sort_by_cell(&grid, q, n, d, targets, cells);
  if (places && grid.index && order) {
    double pairs = 0;
    for (int64_t c = 0; c < cells; c++) {
      double held = (double)(starts[c + 1] - starts[c]);
      pairs += held * held;
    }
    status = pairs > 150.0 * wanted * (double)m; /* from there on a tree is faster */
  }
  if (status == 0) {
    for (int axis = 0; axis < AXES; axis++)
      grid.place[axis] = places + (size_t)axis * ((size_t)m + LANES);
    for (int64_t j = 0; j < m; j++) {
      float q[AXES];
      widen(keys + grid.index[j] * d, d, q);
      for (int axis = 0; axis < AXES; axis++) grid.place[axis][j] = q[axis];
    }
    int enough = 1;
#pragma omp parallel num_threads(threads) reduction(&& : enough)
    {
      Nearest found;
      enough = nearest_new(&found, k);
#pragma omp for schedule(dynamic, 256)
      for (int64_t i = 0; i < n; i++) {
        int64_t target = order[i];
        if (!enough) continue;
        nearest_clear(&found);
        one_target(&grid, q + target * d, d, own ? own[target] : -1, &found);
        nearest_tell(&found, value + target * k, index + target * k);
      }
      nearest_free(&found);
    }
    if (!enough) status = 2;
  }
  free(starts);
  free(targets);
  free(order);
  free(grid.index);
  free(places);
  return status;
}
