// Fibers, the order in which they run, and the life of a launch.
#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "interface.h"

namespace emulation {

Machine machine;
Thread* current = nullptr;

namespace {

constexpr unsigned max_grid_x = 0x7fffffff, max_grid_yz = 65535;
constexpr size_t page_bytes = 4096;
constexpr size_t stack_stagger = 17 * 64;  // stacks that began at the same place in a page would share few lines of cache
constexpr size_t max_shared_bytes = 227 * 1024;  // of sm_90; the gates of the build hold kernels to their own
constexpr int success = 0, invalid_configuration = 9, launch_failure = 719;

uint64_t random_state = 0;

uint64_t next_random() {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

template <typename Items>
void shuffle_order(Items& items) {
  if (machine.seed == 0) return;
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[next_random() % i]);
}

void yield() {
  if (_setjmp(current->context) == 0) _longjmp(machine.scheduler, 1);
}

void finish(Thread& thread);

// A fiber runs one thread after another: it is entered once and its stack is used again.
void fiber() {
  for (;;) {
    machine.launch.invoke(machine.launch.kernel, machine.launch.params);
    finish(*current);
    yield();
  }
}

constexpr int given_up = 2;

// Runs a thread until it waits or ends. False when the launch was given up.
bool resume(Thread& thread) {
  current = &thread;
  const int returned = _setjmp(machine.scheduler);
  if (returned == 0) {
    if (thread.started) _longjmp(thread.context, 1);
    thread.started = true;
    getcontext(&thread.entry);
    thread.entry.uc_stack.ss_sp = thread.stack;
    thread.entry.uc_stack.ss_size = stack_bytes - thread.slot * stack_stagger % (stack_bytes / 4);
    thread.entry.uc_link = nullptr;
    makecontext(&thread.entry, fiber, 0);
    setcontext(&thread.entry);
  }
  current = nullptr;
  return returned != given_up;
}

void finish(Thread& thread) {
  thread.state = Thread::State::finished;
  thread.groups.clear();
  thread.copies.clear();
  --thread.block->alive;
  thread.block->running[thread.warp] &= ~(1u << thread.lane);
  thread_exited(*thread.block);
}

Thread& thread_of(unsigned slot) {
  if (machine.threads.size() <= slot) machine.threads.resize(slot + 1);
  auto& thread = machine.threads[slot];
  if (!thread) {
    if (!machine.stacks) {
      const size_t bytes = stack_bytes * max_block_threads * max_cluster_blocks;
      void* stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stacks == MAP_FAILED) std::abort();
      machine.stacks = static_cast<std::byte*>(stacks);
    }
    thread = std::make_unique<Thread>();
    thread->slot = slot;
    thread->stack = machine.stacks + slot * stack_bytes;
    mprotect(thread->stack, page_bytes, PROT_NONE);  // a frame too large is a crash here and not a neighbour's riddle
  }
  return *thread;
}

void start(Block& block, unsigned rank, uint3 index) {
  const dim3 size = machine.launch.block;
  const unsigned count = size.x * size.y * size.z;
  block.rank = rank;
  block.index = index;
  block.epoch = block.cluster_epoch = ++machine.epoch;
  block.alive = count;
  block.threads.clear();
  block.ready.clear();
  block.cluster_waiting.clear();
  for (auto& barrier : block.barriers) barrier = {};
  const unsigned num_warps = (count + warp_size - 1) / warp_size;
  block.gatherings.assign(num_warps, {});
  block.running.assign(num_warps, 0);
  block.dynamic_bytes = machine.launch.shared_bytes;
  if (block.dynamic_storage.size() < block.dynamic_bytes + 1024)
    block.dynamic_storage.resize(block.dynamic_bytes + 1024);
  const auto start = reinterpret_cast<uintptr_t>(block.dynamic_storage.data());
  block.dynamic_shared = reinterpret_cast<std::byte*>((start + 1023) / 1024 * 1024);
  block.dynamic_shadow.reserve(block.dynamic_bytes);
  block.static_shadow.reserve(machine.library->static_bytes);
  block.saved_static.resize(machine.library->static_bytes);
  for (unsigned number = 0; number < count; ++number) {
    Thread& thread = thread_of(rank * max_block_threads + number);
    thread.number = number;
    thread.lane = number % warp_size;
    thread.warp = number / warp_size;
    thread.index = {number % size.x, number / size.x % size.y, number / (size.x * size.y)};
    thread.block = &block;
    thread.state = Thread::State::ready;
    thread.clock = 1;
    thread.copies.clear();
    thread.groups.clear();
    block.threads.push_back(&thread);
    block.running[thread.warp] |= 1u << thread.lane;
  }
  block.ready.assign(block.threads.begin(), block.threads.end());
  shuffle_order(block.ready);
}

// Blocks of a cluster run at the same time and each has its own static shared memory; the window holds one at a time.
void make_resident(Block& block) {
  if (machine.resident == &block) return;
  if (machine.resident && machine.num_blocks > 1) {
    auto& saved = machine.resident->saved_static;
    std::memcpy(saved.data(), machine.window, saved.size());
    std::memcpy(machine.window, block.saved_static.data(), block.saved_static.size());
  }
  machine.resident = &block;
}

void report_deadlock() {
  std::string text = "no thread can go on:";
  for (unsigned b = 0; b < machine.num_blocks; ++b) {
    std::vector<const Thread*> waiting;
    for (const Thread* thread : machine.blocks[b]->threads)
      if (thread->state == Thread::State::waiting) waiting.push_back(thread);
    // One line for all that wait at the same place.
    while (!waiting.empty()) {
      const Thread* first = waiting.front();
      const auto same = [&](const Thread* t) { return t->pc == first->pc && t->waits_for == first->waits_for; };
      const auto count = std::count_if(waiting.begin(), waiting.end(), same);
      text += "\n  " + name_of(*first) + (count > 1 ? " and " + std::to_string(count - 1) + " more wait" : " waits") +
              " at " + first->waits_for + place(first->pc);
      waiting.erase(std::remove_if(waiting.begin(), waiting.end(), same), waiting.end());
    }
    text +=
        "\n  " + std::to_string(machine.blocks[b]->threads.size() - machine.blocks[b]->alive) + " threads have exited";
  }
  machine.report = "deadlock: " + text + "\nkernel: [function " +
                   std::to_string(reinterpret_cast<uintptr_t>(machine.launch.kernel)) + "]";
}

bool run_cluster() {
  machine.resident = nullptr;
  for (;;) {
    bool progress = false;
    for (unsigned b = 0; b < machine.num_blocks; ++b) {
      Block& block = *machine.blocks[b];
      while (!block.ready.empty()) {
        progress = true;
        make_resident(block);
        Thread& thread = *block.ready.front();
        block.ready.pop_front();
        if (!resume(thread)) return false;
      }
    }
    if (!progress) break;
  }
  for (unsigned b = 0; b < machine.num_blocks; ++b)
    if (machine.blocks[b]->alive > 0) {
      report_deadlock();
      return false;
    }
  return true;
}

bool is_valid(const Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > max_grid_x || grid.y > max_grid_yz || grid.z > max_grid_yz)
    return false;
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > max_block_threads || launch.shared_bytes > max_shared_bytes) return false;
  return launch.cluster >= 1 && launch.cluster <= max_cluster_blocks && grid.x % launch.cluster == 0;
}

}  // namespace

void fail(const char* kind, const std::string& text, const void* pc) {
  machine.report = std::string(kind) + ": " + name_of(*current) + " " + text + place(pc) + "\nkernel: [function " +
                   std::to_string(reinterpret_cast<uintptr_t>(machine.launch.kernel)) + "]";
  _longjmp(machine.scheduler, given_up);
}

std::string name_of(const Thread& thread) {
  char text[120];
  const uint3 t = thread.index, b = thread.block->index;
  std::snprintf(text, sizeof(text), "thread (%u, %u, %u) of block (%u, %u, %u)", t.x, t.y, t.z, b.x, b.y, b.z);
  return text;
}

// Return addresses point behind the call: one back is inside it. emulator.py turns the brackets into source lines.
std::string place(const void* pc) {
  return pc ? " [line " + std::to_string(reinterpret_cast<uintptr_t>(pc) - 1) + "]" : "";
}

void wait(const char* what, const Site& site, const void* pc) {
  if (machine.late) stop_late_thread(pc);
  Thread& thread = *current;
  thread.state = Thread::State::waiting;
  thread.waits_for = what;
  thread.site = site;
  thread.pc = pc;
  yield();
}

void make_ready(Thread& thread) {
  thread.state = Thread::State::ready;
  auto& ready = thread.block->ready;
  ready.push_back(&thread);
  if (machine.seed != 0) std::swap(ready.back(), ready[next_random() % ready.size()]);
}

uint3 thread_index() { return current->index; }
uint3 block_index() { return current->block->index; }
dim3 block_size() { return machine.launch.block; }
dim3 grid_size() { return machine.launch.grid; }
unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(current->block->dynamic_shared); }
unsigned cluster_rank() { return current->block->rank; }
unsigned cluster_size() { return machine.launch.cluster; }

void trap(const Site& site) {
  fail("trap", std::string("stopped itself at ") + site.file_name() + ":" + std::to_string(site.line()), nullptr);
}

int launch(const Launch& launch) {
  if (!machine.report.empty()) return launch_failure;  // as a device: after a fault nothing runs
  if (!is_valid(launch)) return invalid_configuration;
  machine.launch = launch;
  machine.library = library_of(launch.kernel);
  machine.window = window_of(*machine.library);
  random_state = machine.seed;
  machine.launch_epoch = machine.epoch + 1;

  const uint64_t num_clusters = static_cast<uint64_t>(launch.grid.x) / launch.cluster * launch.grid.y * launch.grid.z;
  machine.num_blocks = launch.cluster;
  while (machine.blocks.size() < launch.cluster) machine.blocks.push_back(std::make_unique<Block>());
  const uint64_t ends = machine.blocks_at_ends;
  std::vector<uint32_t> order(ends > 0 ? std::min(num_clusters, 2 * ends) : num_clusters);
  std::iota(order.begin(), order.end(), 0u);
  if (order.size() < num_clusters)
    std::iota(order.begin() + ends, order.end(), static_cast<uint32_t>(num_clusters - ends));
  shuffle_order(order);
  const Watchdog watchdog;
  for (const uint64_t cluster : order) {
    start_over();
    machine.cluster_epoch = machine.epoch + 1;
    const unsigned per_row = launch.grid.x / launch.cluster;
    const uint3 first = {static_cast<unsigned>(cluster % per_row) * launch.cluster,
                         static_cast<unsigned>(cluster / per_row % launch.grid.y),
                         static_cast<unsigned>(cluster / per_row / launch.grid.y)};
    for (unsigned rank = 0; rank < launch.cluster; ++rank)
      start(*machine.blocks[rank], rank, {first.x + rank, first.y, first.z});
    if (!run_cluster()) {
      for (auto& thread : machine.threads)
        if (thread) thread->started = false;  // whatever their stacks hold is abandoned
      current = nullptr;
      return launch_failure;
    }
  }
  return success;
}

}  // namespace emulation

// ---- what emulator.py calls ----

extern "C" {

const char* emulation_report() { return emulation::machine.report.c_str(); }
void emulation_clear_report() { emulation::machine.report.clear(); }
// n > 0: of every grid only the first and the last n clusters run, for sizes that no CPU goes through.
void emulation_set_blocks_at_ends(uint64_t n) { emulation::machine.blocks_at_ends = n; }
// 0: blocks and threads in ascending order; else in an order drawn from the seed.
void emulation_set_order(uint64_t seed) { emulation::machine.seed = seed; }
}
