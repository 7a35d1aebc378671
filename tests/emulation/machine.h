// The emulator's insides: threads, blocks, the order in which they ran, and how a launch is given up.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <ucontext.h>
#include <vector>

#include "emulator.h"

namespace emulation {

constexpr unsigned warp_size = 32;
constexpr unsigned max_block_threads = 1024;
constexpr unsigned max_cluster_blocks = 16;
constexpr int num_barriers = 16;

// When an access happened. Epochs number the stretches between two barriers of a whole block, over all launches, so
// that an epoch also tells block and launch; the clock counts the smaller synchronisations of one thread within one.
struct Stamp {
  uint64_t bits = 0;

  static constexpr uint64_t atomic_flag = 1, pending_flag = 2;
  static constexpr uint32_t max_clock = 0xffff;

  static Stamp make(uint32_t epoch, uint32_t slot, uint32_t clock) {
    return {static_cast<uint64_t>(epoch) << 32 | slot << 18 | clock << 2};
  }
  uint32_t epoch() const { return static_cast<uint32_t>(bits >> 32); }
  uint32_t slot() const { return static_cast<uint32_t>(bits >> 18) & 0x3fff; }  // rank in cluster * 1024 + thread
  uint32_t clock() const { return static_cast<uint32_t>(bits >> 2) & max_clock; }
  bool is_atomic() const { return bits & atomic_flag; }
  bool is_pending() const { return bits & pending_flag; }  // the target of an asynchronous copy nobody has waited for
  explicit operator bool() const { return bits != 0; }
};

// Who accessed each byte last: its writer, and two readers of different threads, since a writer is one of them at most.
struct Shadow {
  struct Entry {
    Stamp writer, reader, other_reader;
    uint32_t writer_pc, reader_pc, other_reader_pc, unused;
    bool operator==(const Entry& other) const { return std::memcmp(this, &other, sizeof(Entry)) == 0; }
  };
  Entry* entries = nullptr;
  size_t bytes = 0;

  void reserve(size_t bytes);  // address space alone: pages come with their first use
  void release();
};

struct Block;

struct AsyncCopy {
  std::byte* shared;
  const std::byte* global;
  int bytes, source_bytes;
};

struct Thread {
  enum class State { ready, waiting, finished };

  unsigned slot = 0;  // rank of its block in the cluster * 1024 + number
  unsigned number = 0, lane = 0, warp = 0;
  uint3 index{};
  Block* block = nullptr;
  State state = State::finished;
  const char* waits_for = "";
  Site site;
  const void* pc = nullptr;

  bool started = false;  // its stack holds a frame to return to
  jmp_buf context{};
  ucontext_t entry{};
  std::byte* stack = nullptr;

  uint32_t clock = 1;
  uint32_t known_epoch = 0;     // epoch that `known` belongs to
  std::vector<uint32_t> known;  // per thread of the block: the latest clock that happened before this thread

  std::vector<AsyncCopy> copies;  // issued, not committed
  std::deque<std::vector<AsyncCopy>> groups;

  Votes votes{};
};

// A thread at a barrier, and what it had seen by then; after bar.arrive it goes on without waiting.
struct Arrival {
  Thread* thread;
  uint32_t clock;
  bool waits;
  std::vector<uint32_t> known;
};

struct BarrierState {
  std::vector<Arrival> arrived;
  int expected = 0;
  int votes = 0;
};

// Lanes gathering for one warp-wide operation.
struct Gathering {
  const char* name;
  unsigned mask, arrived = 0;
  void* arguments[warp_size];
};

struct Block {
  unsigned rank = 0;  // in its cluster
  uint3 index{};
  uint32_t epoch = 0;          // now
  uint32_t cluster_epoch = 0;  // at the latest barrier of the cluster
  std::vector<Thread*> threads;
  unsigned alive = 0;
  std::deque<Thread*> ready;
  BarrierState barriers[num_barriers];
  std::vector<Thread*> cluster_waiting;
  std::vector<std::vector<Gathering>> gatherings;  // per warp
  std::vector<unsigned> running;                   // per warp: the lanes that exist and have not exited

  std::vector<std::byte> dynamic_storage;
  std::byte* dynamic_shared = nullptr;
  size_t dynamic_bytes = 0;
  Shadow dynamic_shadow;
  std::vector<std::byte> saved_static;  // static shared memory while another block of the cluster has the window
  Shadow static_shadow;
};

// What of a loaded kernel library the emulator must know.
struct Library {
  uintptr_t base = 0, end = 0;
  size_t tls_module = 0, static_bytes = 0;
  std::vector<bool> is_shared_variable;  // per byte of the window
};

struct Machine {
  Launch launch;
  const Library* library = nullptr;
  jmp_buf scheduler{};
  std::vector<std::unique_ptr<Thread>> threads;  // by slot; a thread's fiber serves one block after another
  std::vector<std::unique_ptr<Block>> blocks;    // of the cluster that runs
  unsigned num_blocks = 0;
  Block* resident = nullptr;  // whose static shared memory is in the window
  std::byte* window = nullptr;
  std::byte* stacks = nullptr;
  uint32_t epoch = 0, launch_epoch = 0, cluster_epoch = 0;
  uint64_t seed = 0;
  uint64_t blocks_at_ends = 0;  // run only so many clusters at either end of a grid; 0: all
  double patience = 60;         // seconds of CPU time for a block, or a cluster
  volatile bool late = false;   // its time is over
  volatile int ticks = 0;
  std::string report;
};

extern Machine machine;
extern Thread* current;  // the thread that runs; null in host code

constexpr size_t stack_bytes = 256 * 1024;

// Ends the launch with a report; the fibers are abandoned where they stand.
[[noreturn]] void fail(const char* kind, const std::string& text, const void* pc);
std::string name_of(const Thread& thread);
std::string place(const void* pc);

// Gives up the processor until someone makes the thread ready.
void wait(const char* what, const Site& site, const void* pc);
void make_ready(Thread& thread);

// Did what the stamp stands for happen before the current thread's next access? Full barriers raise the block's epoch,
// smaller ones join what the threads know.
inline bool happened_before(Stamp stamp) {
  if (stamp.epoch() < machine.launch_epoch) return true;    // an earlier launch
  if (stamp.epoch() < machine.cluster_epoch) return false;  // another block: nothing orders blocks of one launch
  const Block& block = *current->block;
  const unsigned rank = stamp.slot() / max_block_threads, number = stamp.slot() % max_block_threads;
  if (rank != block.rank) return stamp.epoch() < machine.blocks[rank]->cluster_epoch;
  if (stamp.epoch() < block.epoch || number == current->number) return true;
  return current->known_epoch == block.epoch && current->known[number] >= stamp.clock();
}
// These threads have met: what each had done and seen, those that waited have seen.
Arrival arrive(Thread& thread, bool waits);
void join(const std::vector<Arrival>& arrivals);

enum class Access { read, write, atomic };
void check_access(const void* address, size_t bytes, Access access, const void* pc);

// Runs apply(lanes, mask) once, on the last lane to arrive, when every lane of the mask has come with its argument.
using Apply = void (*)(void* const* lanes, unsigned mask, Thread& first_lane);
void gather(const char* name, unsigned mask, void* argument, Apply apply, const Site& site, const void* pc);

}  // namespace emulation
