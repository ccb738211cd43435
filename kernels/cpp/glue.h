// What printed loops between kernels use.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "vec.h"
