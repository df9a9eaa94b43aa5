/* Of one pair of points: what differences.c gives to others. */

#pragma once

#include <stdint.h>

/* Squared Euclidean distance, summed in double precision. */
double squared_difference(const float *q, const float *key, int64_t d);

/* Up to so many axes the distance that decides is this one, in single precision. */
enum { FEW_AXES = 8 };
float squared_difference_of_few(const float *q, const float *key, int64_t d);
