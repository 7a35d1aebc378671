// Barriers, warp-wide operations, and what they order.
#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>

#include "interface.h"

namespace emulation {

// ---- what threads that have met know of each other ----

void join(const std::vector<Arrival>& arrivals) {
  const Block& block = *arrivals.front().thread->block;
  std::vector<uint32_t> known(block.threads.size(), 0);
  for (const Arrival& arrival : arrivals)
    for (size_t t = 0; t < arrival.known.size(); ++t) known[t] = std::max(known[t], arrival.known[t]);
  for (const Arrival& arrival : arrivals)
    known[arrival.thread->number] = std::max(known[arrival.thread->number], arrival.clock);
  for (const Arrival& arrival : arrivals) {
    if (!arrival.waits) continue;
    arrival.thread->known = known;
    arrival.thread->known_epoch = block.epoch;
  }
}

Arrival arrive(Thread& thread, bool waits) {
  const bool knows = thread.known_epoch == thread.block->epoch;
  Arrival arrival{&thread, thread.clock, waits, knows ? thread.known : std::vector<uint32_t>()};
  // What it does from here on is not ordered by this arrival: a new clock keeps the two apart.
  if (++thread.clock > Stamp::max_clock)
    fail("emulator", "synchronises more often between two block barriers than a stamp can count", nullptr);
  return arrival;
}

namespace {

void raise_epoch(Block& block) {
  block.epoch = ++machine.epoch;
  for (Thread* thread : block.threads) thread->clock = 1;
}

bool same_place(const Site& a, const Site& b) {
  return a.line() == b.line() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

// Everyone a barrier waits for has come: hands out the votes, orders memory, lets the waiting go on.
void complete(Block& block, BarrierState& barrier) {
  const int arrived = static_cast<int>(barrier.arrived.size());
  const Votes votes{barrier.votes, barrier.votes > 0, barrier.votes == arrived};
  const auto num_waiting =
      std::count_if(barrier.arrived.begin(), barrier.arrived.end(), [](const Arrival& a) { return a.waits; });
  if (barrier.expected == all_threads || static_cast<size_t>(num_waiting) == block.threads.size())
    raise_epoch(block);
  else
    join(barrier.arrived);
  for (const Arrival& arrival : barrier.arrived) {
    if (!arrival.waits) continue;
    arrival.thread->votes = votes;
    if (arrival.thread != current) make_ready(*arrival.thread);
  }
  barrier = {};
}

bool complete_cluster_barrier() {
  unsigned alive = 0, arrived = 0;
  for (unsigned b = 0; b < machine.num_blocks; ++b) {
    alive += machine.blocks[b]->alive;
    arrived += static_cast<unsigned>(machine.blocks[b]->cluster_waiting.size());
  }
  if (arrived == 0 || arrived < alive) return false;
  for (unsigned b = 0; b < machine.num_blocks; ++b) {
    Block& block = *machine.blocks[b];
    raise_epoch(block);
    block.cluster_epoch = block.epoch;
    for (Thread* thread : block.cluster_waiting)
      if (thread != current) make_ready(*thread);
    block.cluster_waiting.clear();
  }
  return true;
}

}  // namespace

void thread_exited(Block& block) {
  BarrierState& barrier = block.barriers[0];
  if (!barrier.arrived.empty() && barrier.expected == all_threads && barrier.arrived.size() == block.alive)
    complete(block, barrier);
  if (machine.launch.cluster > 1) complete_cluster_barrier();
}

Votes block_barrier(int number, int threads, bool waits, int predicate, const Site& site) {
  const void* pc = __builtin_return_address(0);
  Thread& thread = *current;
  Block& block = *thread.block;
  BarrierState& barrier = block.barriers[number];
  const bool whole = threads == all_threads;
  if (!whole && (threads <= 0 || threads % warp_size != 0))
    fail("barrier", "names a count of threads that is no multiple of 32", pc);
  if (!barrier.arrived.empty()) {
    const Thread& first = *barrier.arrived.front().thread;
    if (barrier.expected != threads)
      fail("divergent barrier",
           "expects " + std::to_string(threads) + " threads at barrier " + std::to_string(number) + ", " +
               name_of(first) + " expected " + std::to_string(barrier.expected),
           pc);
    if (whole && !same_place(first.site, site))
      fail("divergent barrier",
           "is at one __syncthreads() while " + name_of(first) + " waits at another" + place(first.pc) + "; it is", pc);
  }
  barrier.expected = threads;
  barrier.votes += predicate != 0;
  barrier.arrived.push_back(arrive(thread, waits));
  thread.site = site;
  thread.pc = pc;
  const size_t expected = whole ? block.alive : static_cast<size_t>(threads);
  if (barrier.arrived.size() == expected) {
    complete(block, barrier);
  } else if (waits) {
    wait(whole ? "__syncthreads()" : "a named barrier", site, pc);
  }
  return thread.votes;
}

void cluster_barrier(const Site& site) {
  current->block->cluster_waiting.push_back(current);
  if (!complete_cluster_barrier()) wait("a barrier of the cluster", site, __builtin_return_address(0));
}

// ---- the warp ----

void gather(const char* name, unsigned mask, void* argument, Apply apply, const Site& site, const void* pc) {
  Thread& thread = *current;
  const unsigned mine = 1u << thread.lane;
  const unsigned first_number = thread.warp * warp_size;
  Thread* const* lanes = thread.block->threads.data() + first_number;
  const auto num_lanes =
      static_cast<unsigned>(std::min<size_t>(warp_size, thread.block->threads.size() - first_number));
  const auto lanes_of = [](unsigned bits) {
    char text[16];
    std::snprintf(text, sizeof(text), "0x%08x", bits);
    return std::string(text);
  };
  if (!(mask & mine))
    fail("wrong lane mask",
         std::string("calls ") + name + " with mask " + lanes_of(mask) + ", which leaves out its own lane", pc);
  if (const unsigned missing = mask & ~thread.block->running[thread.warp]) {
    const auto lane = static_cast<unsigned>(std::countr_zero(missing));
    fail("wrong lane mask",
         std::string("calls ") + name + " with mask " + lanes_of(mask) + ", but lane " + std::to_string(lane) +
             (lane >= num_lanes ? " does not exist" : " has exited"),
         pc);
  }

  auto& gatherings = thread.block->gatherings[thread.warp];
  Gathering* joined = nullptr;
  for (Gathering& gathering : gatherings) {
    if (!((gathering.mask | gathering.arrived) & mask)) continue;  // other lanes, on a way of their own
    const Thread& other = *lanes[std::countr_zero(gathering.arrived)];
    if (gathering.mask != mask)
      fail("wrong lane mask",
           std::string("calls ") + name + " with mask " + lanes_of(mask) + " while " + name_of(other) + " waits at " +
               gathering.name + " with mask " + lanes_of(gathering.mask) + place(other.pc) + "; it calls",
           pc);
    if (gathering.name != name || !same_place(other.site, site))
      fail("divergent warp",
           std::string("calls ") + name + " while " + name_of(other) + " waits at " + gathering.name + place(other.pc) +
               " for the same lanes; it calls",
           pc);
    joined = &gathering;
  }
  if (!joined) joined = &gatherings.emplace_back(Gathering{name, mask, 0, {}});
  joined->arguments[thread.lane] = argument;
  joined->arrived |= mine;
  if (joined->arrived != mask) {
    wait(name, site, pc);
    return;
  }
  const Gathering complete = *joined;
  gatherings.erase(gatherings.begin() + (joined - gatherings.data()));
  thread.pc = pc;
  apply(complete.arguments, mask, *lanes[0]);
  for (unsigned lane = 0; lane < num_lanes; ++lane)
    if (mask >> lane & 1 && lanes[lane] != &thread) make_ready(*lanes[lane]);
}

namespace {

struct ShuffleLane {
  Shuffle kind;
  uint64_t bits;
  int operand, width;
  uint64_t result;
};

// The lane that PTX's shfl reads; out of range, a lane keeps its own value.
int source_lane(const ShuffleLane& lane, int number) {
  const int segment_first = number & ~(lane.width - 1), segment_last = number | (lane.width - 1);
  int source = number;
  switch (lane.kind) {
    case Shuffle::index: return segment_first | (lane.operand & (lane.width - 1));
    case Shuffle::up: source = number - lane.operand; return source >= segment_first ? source : number;
    case Shuffle::down: source = number + lane.operand; break;
    case Shuffle::exclusive_or: source = number ^ lane.operand; break;
  }
  return source <= segment_last ? source : number;
}

void apply_shuffle(void* const* lanes, unsigned mask, Thread& first) {
  for (unsigned number = 0; number < warp_size; ++number) {
    if (!(mask >> number & 1)) continue;
    auto& lane = *static_cast<ShuffleLane*>(lanes[number]);
    const int source = source_lane(lane, static_cast<int>(number));
    if (!(mask >> source & 1)) {
      Thread& reader = *first.block->threads[first.number + number];
      const void* pc = current->pc;
      current = &reader;
      fail("wrong lane mask", "shuffles from lane " + std::to_string(source) + ", which takes no part", pc);
    }
    lane.result = static_cast<ShuffleLane*>(lanes[source])->bits;
  }
}

struct BallotLane {
  bool predicate;
  unsigned result;
};

void apply_ballot(void* const* lanes, unsigned mask, Thread&) {
  unsigned votes = 0;
  for (unsigned number = 0; number < warp_size; ++number)
    if (mask >> number & 1 && static_cast<BallotLane*>(lanes[number])->predicate) votes |= 1u << number;
  for (unsigned number = 0; number < warp_size; ++number)
    if (mask >> number & 1) static_cast<BallotLane*>(lanes[number])->result = votes;
}

struct ReduceLane {
  Reduce kind;
  int64_t value;
};

void apply_reduce(void* const* lanes, unsigned mask, Thread&) {
  auto* first = static_cast<ReduceLane*>(lanes[std::countr_zero(mask)]);
  int64_t result = first->value;
  for (unsigned number = std::countr_zero(mask) + 1; number < warp_size; ++number) {
    if (!(mask >> number & 1)) continue;
    const int64_t value = static_cast<ReduceLane*>(lanes[number])->value;
    switch (first->kind) {
      case Reduce::add: result += value; break;
      case Reduce::minimum: result = std::min(result, value); break;
      case Reduce::maximum: result = std::max(result, value); break;
      case Reduce::bit_and: result &= value; break;
      case Reduce::bit_or: result |= value; break;
      case Reduce::bit_xor: result ^= value; break;
    }
  }
  for (unsigned number = 0; number < warp_size; ++number)
    if (mask >> number & 1) static_cast<ReduceLane*>(lanes[number])->value = result;
}

// __syncwarp() orders memory among its lanes; shuffles and votes promise no such thing.
void apply_warp_barrier(void* const*, unsigned mask, Thread& first) {
  std::vector<Arrival> arrivals;
  for (unsigned number = 0; number < warp_size; ++number)
    if (mask >> number & 1) arrivals.push_back(arrive(*first.block->threads[first.number + number], true));
  join(arrivals);
}

}  // namespace

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, int operand, int width, const Site& site) {
  const void* pc = __builtin_return_address(0);
  if (width < 1 || width > 32 || !std::has_single_bit(static_cast<unsigned>(width)))
    fail("shuffle", "has a width that is no power of two up to 32", pc);
  ShuffleLane lane{kind, bits, operand, width, 0};
  gather("a shuffle", mask, &lane, apply_shuffle, site, pc);
  return lane.result;
}

unsigned ballot(unsigned mask, bool predicate, const Site& site) {
  BallotLane lane{predicate, 0};
  gather("a vote", mask, &lane, apply_ballot, site, __builtin_return_address(0));
  return lane.result;
}

int64_t warp_reduce(Reduce kind, unsigned mask, int64_t value, const Site& site) {
  ReduceLane lane{kind, value};
  gather("a reduction of integers", mask, &lane, apply_reduce, site, __builtin_return_address(0));
  return lane.value;
}

void warp_barrier(unsigned mask, const Site& site) {
  gather("__syncwarp()", mask, nullptr, apply_warp_barrier, site, __builtin_return_address(0));
}

}  // namespace emulation
