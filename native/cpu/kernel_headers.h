// Everything that the kernels use: included before a target region, never inside it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "core/backend.h"
#include "core/dropout.h"
#include "core/half.h"
#include "core/mask_rules.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"
