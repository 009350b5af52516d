"""The choice of tokens in C++ (`sample.cpp`): all rows of a step in one call, on the thread that asks."""
