// Threads of the ops: torch's own pool, and none in a forked child.
//
// The OpenMP runtime does not survive fork(): a child whose parent has used its threads would wait for ones that do not
// exist. Such a child (a DataLoader worker, a preforking server) computes on its own thread; the bits are the same.
#pragma once

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace transfuse {

inline bool forked_child = false;
// At load: a fork before it leaves nothing behind that could hang.
inline const int forked_child_is_told = pthread_atfork(nullptr, nullptr, [] { forked_child = true; });

inline int64_t num_threads() { return forked_child ? 1 : static_cast<int64_t>(torch::stable::get_num_threads()); }

template <class Run>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Run& run) {
  if (begin >= end) return;
  if (num_threads() == 1 || end - begin <= grain) return run(begin, end);
  torch::stable::parallel_for(begin, end, grain, run);
}

}  // namespace transfuse
