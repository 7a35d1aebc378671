// Between machine.cpp, synchronization.cpp, memory.cpp and watchdog.cpp.
#pragma once

#include <csignal>
#include <ctime>

#include "machine.h"

namespace emulation {

// A thread of the block has ended: barriers that wait for every living thread may now be complete.
void thread_exited(Block& block);

const Library* library_of(const void* kernel);
// The thread_local segment of the library on this thread of the host: its static shared memory.
std::byte* window_of(const Library& library);

// While there is one, threads that never end are stopped (watchdog.cpp). start_over() with every block, or cluster.
class Watchdog {
 public:
  Watchdog();
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;

 private:
  timer_t timer_;
  struct sigaction previous_;
};
void start_over();
[[noreturn]] void stop_late_thread(const void* pc);

}  // namespace emulation
