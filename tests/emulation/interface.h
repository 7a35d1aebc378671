// Between machine.cpp, synchronization.cpp and memory.cpp.
#pragma once

#include "machine.h"

namespace emulation {

// A thread of the block has ended: barriers that wait for every living thread may now be complete.
void thread_exited(Block& block);

const Library* library_of(const void* kernel);
// The thread_local segment of the library on this thread of the host: its static shared memory.
std::byte* window_of(const Library& library);

}  // namespace emulation
