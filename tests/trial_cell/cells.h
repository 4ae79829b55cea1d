// Cells that the package does not have: csrc/cells/all.h includes this file after its own.
#pragma once
#include "coupled_lstm.h"
#include "decay.h"
#include "leaky.h"
