// SPDX-License-Identifier: Apache-2.0
// Stands before CUDA's own header of this name on the include path.
#pragma once

#include "runtime.h"
