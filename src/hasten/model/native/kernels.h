// All that runs in one instruction set, in the namespace NAME.
#include "lanes.h"
#include "amx.h"
#include "blocks.h"
#include "linear.h"
#include "attention.h"
#include "forward.h"
#include "grouped.h"
#include "draft.h"
#undef NAME
#undef LEVEL
#undef NEON
#undef MOST
