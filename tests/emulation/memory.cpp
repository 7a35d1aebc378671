// Which memory a kernel may touch, and who touched it: bounds, uninitialised reads, races, asynchronous copies.
//
// Kernels are compiled with -fsanitize=thread, so that every access calls __tsan_read* or __tsan_write* first; those
// are ours, and nothing of the sanitizer's own library is linked.
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>

#include "interface.h"

extern "C" void* __tls_get_addr(void*);

namespace emulation {

void Shadow::reserve(size_t wanted) {
  if (wanted <= bytes) return;
  release();
  void* pages =
      mmap(nullptr, wanted * sizeof(Entry), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) std::abort();
  entries = static_cast<Entry*>(pages);
  bytes = wanted;
}

void Shadow::release() {
  if (entries) munmap(entries, bytes * sizeof(Entry));
  entries = nullptr;
  bytes = 0;
}

namespace {

// ---- what there is ----

enum class Contents : int { read_only = 0, initialised = 1, uninitialised = 2 };

// Global memory that the test has handed to the kernel.
struct Region {
  uintptr_t begin, end;
  Contents contents;
  std::string name;
  const uint8_t* belongs;  // per byte, for views with gaps: is it an element of the view? null: all are
  Shadow shadow;
};

std::vector<Region> regions;  // ascending
size_t latest_region = 0;
std::vector<uintptr_t> made;             // by the host code of the op that runs
std::map<uintptr_t, Library> libraries;  // by base

// Where an address lies.
struct Location {
  enum class Kind { local, shared, dynamic_shared, global, constant, nowhere } kind;
  size_t offset;
  Block* block;
  Region* region;
  Shadow* shadow;
};

Region* region_of(uintptr_t address) {
  if (latest_region < regions.size() && address >= regions[latest_region].begin && address < regions[latest_region].end)
    return &regions[latest_region];
  const auto next = std::upper_bound(regions.begin(), regions.end(), address,
                                     [](uintptr_t a, const Region& r) { return a < r.begin; });
  if (next == regions.begin()) return nullptr;
  Region& region = *(next - 1);
  if (address >= region.end) return nullptr;
  latest_region = static_cast<size_t>(&region - regions.data());
  return &region;
}

// Unsigned differences: an address before the start wraps round and is not below the size.
bool within(uintptr_t address, const void* start, size_t bytes, size_t& offset) {
  offset = address - reinterpret_cast<uintptr_t>(start);
  return offset < bytes;
}

Location locate(uintptr_t address) {
  using Kind = Location::Kind;
  Block& mine = *current->block;
  size_t offset;
  if (within(address, machine.window, machine.library->static_bytes, offset))
    return {Kind::shared, offset, &mine, nullptr, &mine.static_shadow};
  for (unsigned b = 0; b < machine.num_blocks; ++b) {
    Block& block = *machine.blocks[b];
    if (within(address, block.dynamic_shared, block.dynamic_bytes, offset))
      return {Kind::dynamic_shared, offset, &block, nullptr, &block.dynamic_shadow};
    if (machine.num_blocks > 1 && within(address, block.saved_static.data(), block.saved_static.size(), offset))
      return {Kind::shared, offset, &block, nullptr, &block.static_shadow};
  }
  if (Region* region = region_of(address))
    return {Kind::global, address - region->begin, nullptr, region, &region->shadow};
  if (within(address, machine.stacks, stack_bytes * max_block_threads * max_cluster_blocks, offset))
    return {Kind::local, offset, nullptr, nullptr, nullptr};
  if (address >= machine.library->base && address < machine.library->end)
    return {Kind::constant, address - machine.library->base, nullptr, nullptr, nullptr};
  return {Kind::nowhere, 0, nullptr, nullptr, nullptr};
}

// ---- words for reports ----

const char* verb(Access access) {
  return access == Access::read ? "reads" : access == Access::write ? "writes" : "atomically updates";
}

std::string describe(const Location& location, uintptr_t address) {
  using Kind = Location::Kind;
  const std::string offset = std::to_string(location.offset);
  switch (location.kind) {
    case Kind::shared: return "shared memory [shared " + offset + "]";
    case Kind::dynamic_shared: return "dynamic shared memory + " + offset;
    case Kind::global: return location.region->name + " + " + offset + " bytes";
    case Kind::local: return "another thread's local memory";
    case Kind::constant: return "constant memory";
    case Kind::nowhere: break;
  }
  // The nearest thing tells more than an address.
  std::string text = "memory that belongs to nothing";
  uintptr_t nearest = 1 << 24;
  for (const Region& region : regions) {
    if (address >= region.end && address - region.end < nearest) {
      nearest = address - region.end;
      text = region.name + ", " + std::to_string(nearest) + " bytes behind its end";
    } else if (address < region.begin && region.begin - address < nearest) {
      nearest = region.begin - address;
      text = region.name + ", " + std::to_string(nearest) + " bytes before its start";
    }
  }
  for (unsigned b = 0; b < machine.num_blocks; ++b) {
    const Block& block = *machine.blocks[b];
    const uintptr_t end = reinterpret_cast<uintptr_t>(block.dynamic_shared) + block.dynamic_bytes;
    if (address >= end && address - end < nearest) {
      nearest = address - end;
      text = "dynamic shared memory, " + std::to_string(nearest) + " bytes behind its " +
             std::to_string(block.dynamic_bytes);
    }
  }
  return text;
}

std::string who(Stamp stamp) {
  if (stamp.epoch() < machine.cluster_epoch) return "another block";
  return name_of(*machine.blocks[stamp.slot() / max_block_threads]->threads[stamp.slot() % max_block_threads]);
}

[[noreturn]] void fail_access(const char* kind, const Location& location, uintptr_t address, size_t bytes,
                              Access access, const std::string& why, const void* pc) {
  fail(kind, std::string(verb(access)) + " " + std::to_string(bytes) + " bytes of " + describe(location, address) + why,
       pc);
}

[[noreturn]] void fail_race(const Location& location, uintptr_t address, size_t bytes, Access access, Stamp other,
                            bool other_wrote, uint32_t other_pc, const void* pc) {
  const char* did = other.is_atomic() ? " atomically updated" : other_wrote ? " wrote" : " read";
  const void* other_place = reinterpret_cast<const void*>(machine.library->base + other_pc);
  fail_access("race", location, address, bytes, access,
              ", which " + who(other) + did + place(other_place) + " with no barrier between; it " + verb(access), pc);
}

// ---- the checks ----

// One access of several bytes, on its way through their histories.
struct Visit {
  const Location& location;
  uintptr_t address;
  size_t bytes;
  Access access;
  Stamp now;
  uint32_t oldest_epoch;  // what is older is of no concern: another block's shared memory, another launch
  bool written_before;
  uint32_t pc_offset;
  const void* pc;

  bool concerns(Stamp stamp) const { return stamp.epoch() >= oldest_epoch; }

  [[noreturn]] void race(Stamp other, bool other_wrote, uint32_t other_pc) const {
    fail_race(location, address, bytes, access, other, other_wrote, other_pc, pc);
  }

  // One byte's history: is this access allowed after it, and if so, what is the history now?
  void look_at(Shadow::Entry& entry) const {
    const Stamp writer = entry.writer;
    if (writer.bits != now.bits) {
      if (writer.is_pending() && writer.epoch() >= machine.cluster_epoch)
        fail_access("pending copy", location, address, bytes, access,
                    ", the target of a copy that " + who(writer) + " started" +
                        place(reinterpret_cast<const void*>(machine.library->base + entry.writer_pc)) +
                        " and has not waited for; it " + verb(access),
                    pc);
      // Where not all blocks run, what the others would have written is not there.
      const bool is_written =
          location.region ? written_before || writer || machine.blocks_at_ends > 0 : concerns(writer);
      if (access == Access::read && !is_written)
        fail_access("uninitialised read", location, address, bytes, access, ", which nothing has written yet", pc);
      if (concerns(writer) && !(access == Access::atomic && writer.is_atomic()) && !happened_before(writer))
        race(writer, true, entry.writer_pc);
    }
    if (access == Access::read) {
      if (entry.reader.bits == now.bits) return;
      // A reader that happened before this one adds nothing: who writes after this one writes after that one.
      if (!concerns(entry.reader) || entry.reader.slot() == now.slot() || happened_before(entry.reader)) {
        entry.reader = now;
        entry.reader_pc = pc_offset;
      } else if (!concerns(entry.other_reader) || entry.other_reader.slot() == now.slot() ||
                 happened_before(entry.other_reader)) {
        entry.other_reader = now;
        entry.other_reader_pc = pc_offset;
      }
      return;
    }
    if (concerns(entry.reader) && !happened_before(entry.reader)) race(entry.reader, false, entry.reader_pc);
    if (concerns(entry.other_reader) && !happened_before(entry.other_reader))
      race(entry.other_reader, false, entry.other_reader_pc);
    entry = {access == Access::atomic ? Stamp{now.bits | Stamp::atomic_flag} : now, {}, {}, pc_offset, 0, 0, 0};
  }
};

Stamp stamp_now() { return Stamp::make(current->block->epoch, current->slot, current->clock); }

void check(uintptr_t address, size_t bytes, Access access, const void* pc) {
  using Kind = Location::Kind;
  const Location location = locate(address);
  bool written_before = false;
  switch (location.kind) {
    case Kind::nowhere: fail_access("out of bounds", location, address, bytes, access, "", pc);
    case Kind::local: fail_access("out of bounds", location, address, bytes, access, "", pc);
    case Kind::constant:
      if (access != Access::read) fail_access("out of bounds", location, address, bytes, access, "", pc);
      return;
    case Kind::shared: {
      const auto& known = machine.library->is_shared_variable;
      for (size_t i = location.offset; i < location.offset + bytes; ++i)
        if (i >= known.size() || !known[i])
          fail_access("out of bounds", location, address, bytes, access, ", beyond its variable", pc);
      break;
    }
    case Kind::dynamic_shared:
      if (location.offset + bytes > location.block->dynamic_bytes)
        fail_access("out of bounds", location, address, bytes, access,
                    ", beyond the launch's " + std::to_string(location.block->dynamic_bytes), pc);
      break;
    case Kind::global: {
      const Region& region = *location.region;
      if (address + bytes > region.end)
        fail_access("out of bounds", location, address, bytes, access,
                    ", of which " + std::to_string(region.end - address) + " are its own", pc);
      for (size_t i = 0; region.belongs && i < bytes; ++i)
        if (!region.belongs[location.offset + i])
          fail_access("out of bounds", location, address, bytes, access, ", between the rows of a strided view", pc);
      if (region.contents == Contents::read_only) {
        if (access != Access::read)
          fail_access("written input", location, address, bytes, access, ", which is read-only", pc);
        return;
      }
      written_before = region.contents == Contents::initialised;
      break;
    }
  }
  if (location.block && location.block != current->block && location.block->alive == 0)
    fail_access("out of bounds", location, address, bytes, access, ", whose block has exited", pc);
  const auto pc_offset = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pc) - machine.library->base);
  const uint32_t oldest = location.region ? machine.launch_epoch : machine.cluster_epoch;
  const Visit visit{location, address, bytes, access, stamp_now(), oldest, written_before, pc_offset, pc};
  // Bytes that were written and read together have one history: it is judged once.
  Shadow::Entry* const entries = location.shadow->entries + location.offset;
  Shadow::Entry before = entries[0];
  visit.look_at(entries[0]);
  for (size_t i = 1; i < bytes; ++i) {
    if (entries[i] == before) {
      entries[i] = entries[i - 1];
    } else {
      before = entries[i];
      visit.look_at(entries[i]);
    }
  }
}

// The thread's own stack, and everything in host code, is nobody's business.
inline void look(const void* address, size_t bytes, Access access, const void* pc) {
  if (!current) return;
  if (machine.late) stop_late_thread(pc);
  const uintptr_t where = reinterpret_cast<uintptr_t>(address);
  if (where - reinterpret_cast<uintptr_t>(current->stack) < stack_bytes) return;
  check(where, bytes, access, pc);
}

// The bytes are the copy's until the wait, and hold what no kernel should compute with.
void mark_pending(std::byte* shared, int bytes) {
  const Location location = locate(reinterpret_cast<uintptr_t>(shared));
  for (int i = 0; i < bytes; ++i) location.shadow->entries[location.offset + i].writer.bits |= Stamp::pending_flag;
  std::memset(shared, 0xff, bytes);
}

void land(const AsyncCopy& copy, const void* pc) {
  const Location location = locate(reinterpret_cast<uintptr_t>(copy.shared));
  for (int i = 0; i < copy.bytes; ++i)
    location.shadow->entries[location.offset + i].writer.bits &= ~Stamp::pending_flag;
  if (copy.source_bytes > 0) look(copy.global, copy.source_bytes, Access::read, pc);
  look(copy.shared, copy.bytes, Access::write, pc);
  std::memcpy(copy.shared, copy.global, copy.source_bytes);
  std::memset(copy.shared + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

}  // namespace

void check_access(const void* address, size_t bytes, Access access, const void* pc) {
  look(address, bytes, access, pc);
}

void check_atomic(void* address, size_t bytes) { look(address, bytes, Access::atomic, __builtin_return_address(0)); }

// ---- asynchronous copies: the data is there at the wait and not a moment earlier ----

void copy_async(void* shared, const void* global, int bytes, int source_bytes) {
  const void* pc = __builtin_return_address(0);
  const auto misaligned = [bytes](const void* address) { return reinterpret_cast<uintptr_t>(address) % bytes != 0; };
  if (misaligned(shared) || misaligned(global))
    fail("misaligned access",
         "copies " + std::to_string(bytes) + " bytes asynchronously between addresses not aligned to them", pc);
  const Location::Kind kind = locate(reinterpret_cast<uintptr_t>(shared)).kind;
  if (kind != Location::Kind::shared && kind != Location::Kind::dynamic_shared)
    fail("out of bounds", "copies asynchronously to what is not shared memory", pc);
  if (source_bytes > 0) look(global, source_bytes, Access::read, pc);
  look(shared, bytes, Access::write, pc);
  mark_pending(static_cast<std::byte*>(shared), bytes);
  current->copies.push_back(
      {static_cast<std::byte*>(shared), static_cast<const std::byte*>(global), bytes, source_bytes});
}

void copy_async_commit() {
  current->groups.push_back(std::move(current->copies));
  current->copies.clear();
}

void copy_async_wait(int groups_left) {
  const void* pc = __builtin_return_address(0);
  auto& groups = current->groups;
  while (groups.size() > static_cast<size_t>(groups_left)) {
    for (const AsyncCopy& copy : groups.front()) land(copy, pc);
    groups.pop_front();
  }
}

void* cluster_shared(const void* address, unsigned rank) {
  const void* pc = __builtin_return_address(0);
  if (rank >= machine.num_blocks)
    fail("out of bounds", "asks for the shared memory of a block that its cluster does not have", pc);
  const Location location = locate(reinterpret_cast<uintptr_t>(address));
  Block& other = *machine.blocks[rank];
  if (&other == current->block) return const_cast<void*>(address);
  if (location.kind == Location::Kind::shared) return other.saved_static.data() + location.offset;
  if (location.kind == Location::Kind::dynamic_shared) return other.dynamic_shared + location.offset;
  fail("out of bounds", "maps what is not shared memory to another block", pc);
}

// ---- libraries ----

namespace {

Library& library_at(uintptr_t base) {
  Library& library = libraries[base];
  if (library.end != 0) return library;
  library.base = base;
  const auto look_at = [](dl_phdr_info* object, size_t, void* found) {
    Library& library = *static_cast<Library*>(found);
    if (object->dlpi_addr != library.base) return 0;
    library.tls_module = object->dlpi_tls_modid;
    for (int i = 0; i < object->dlpi_phnum; ++i) {
      const auto& header = object->dlpi_phdr[i];
      if (header.p_type == PT_LOAD) library.end = std::max(library.end, library.base + header.p_vaddr + header.p_memsz);
      if (header.p_type == PT_TLS) library.static_bytes = header.p_memsz;
    }
    return 1;
  };
  dl_iterate_phdr(look_at, &library);
  if (library.end == 0) std::abort();
  library.is_shared_variable.resize(library.static_bytes);
  return library;
}

}  // namespace

const Library* library_of(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0) std::abort();
  return &library_at(reinterpret_cast<uintptr_t>(info.dli_fbase));
}

std::byte* window_of(const Library& library) {
  if (library.static_bytes == 0) return nullptr;
  size_t index[2] = {library.tls_module, 0};
  return static_cast<std::byte*>(__tls_get_addr(index));
}

}  // namespace emulation

// ---- what emulator.py calls ----

using namespace emulation;

extern "C" {

// contents: 0 read-only, 1 initialised, 2 uninitialised.
void emulation_register(uintptr_t begin, size_t bytes, int contents, const char* name, const uint8_t* belongs) {
  Region region{begin, begin + bytes, static_cast<Contents>(contents), name, belongs, {}};
  if (region.contents != Contents::read_only) region.shadow.reserve(bytes);
  const auto next =
      std::upper_bound(regions.begin(), regions.end(), begin, [](uintptr_t a, const Region& r) { return a < r.begin; });
  regions.insert(next, std::move(region));
}

void emulation_forget(uintptr_t begin);

// A tensor that the host code of an op has made (host.h); registered again, its contents change.
void emulation_register_made(uintptr_t begin, size_t bytes, int contents) {
  // A tensor that was freed since may have left its memory to this one.
  const auto replaced = [&](uintptr_t other) {
    const Region* region = region_of(other);
    return other == begin || (region && other < begin + bytes && begin < region->end);
  };
  for (const uintptr_t other : made)
    if (replaced(other)) emulation_forget(other);
  made.erase(std::remove_if(made.begin(), made.end(), [](uintptr_t other) { return !region_of(other); }), made.end());
  if (bytes == 0) return;
  const std::string name = "tensor " + std::to_string(made.size()) + " of the host code";
  emulation_register(begin, bytes, contents, name.c_str(), nullptr);
  made.push_back(begin);
}

void emulation_forget_made() {
  for (const uintptr_t begin : made) emulation_forget(begin);
  made.clear();
}

void emulation_forget(uintptr_t begin) {
  const auto found =
      std::find_if(regions.begin(), regions.end(), [begin](const Region& r) { return r.begin == begin; });
  if (found == regions.end()) return;
  found->shadow.release();
  regions.erase(found);
}

// A shared variable of the library loaded at base, from its symbol table.
void emulation_shared_variable(uintptr_t base, size_t offset, size_t bytes) {
  std::fill_n(library_at(base).is_shared_variable.begin() + static_cast<ptrdiff_t>(offset), bytes, true);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define TRANSFUSE_ACCESS(bytes)                                                                               \
  void __tsan_read##bytes(void* p) { look(p, bytes, Access::read, __builtin_return_address(0)); }             \
  void __tsan_write##bytes(void* p) { look(p, bytes, Access::write, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##bytes(void* p) { look(p, bytes, Access::read, __builtin_return_address(0)); }   \
  void __tsan_unaligned_write##bytes(void* p) { look(p, bytes, Access::write, __builtin_return_address(0)); } \
  void __tsan_volatile_read##bytes(void* p) { look(p, bytes, Access::read, __builtin_return_address(0)); }    \
  void __tsan_volatile_write##bytes(void* p) { look(p, bytes, Access::write, __builtin_return_address(0)); }
TRANSFUSE_ACCESS(1)
TRANSFUSE_ACCESS(2)
TRANSFUSE_ACCESS(4)
TRANSFUSE_ACCESS(8)
TRANSFUSE_ACCESS(16)
#undef TRANSFUSE_ACCESS
void __tsan_read_range(void* p, size_t bytes) { look(p, bytes, Access::read, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { look(p, bytes, Access::write, __builtin_return_address(0)); }
// Kernel libraries are linked with --wrap: the sanitizer leaves these calls alone.
void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  look(from, bytes, Access::read, __builtin_return_address(0));
  look(to, bytes, Access::write, __builtin_return_address(0));
  return std::memcpy(to, from, bytes);
}
void* __wrap_memmove(void* to, const void* from, size_t bytes) {
  look(from, bytes, Access::read, __builtin_return_address(0));
  look(to, bytes, Access::write, __builtin_return_address(0));
  return std::memmove(to, from, bytes);
}
void* __wrap_memset(void* to, int value, size_t bytes) {
  look(to, bytes, Access::write, __builtin_return_address(0));
  return std::memset(to, value, bytes);
}
// Guards of function statics in launchers.
char __tsan_atomic8_load(const volatile char* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_load(const volatile int* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }

// -fsanitize=alignment,bounds,signed-integer-overflow,shift,integer-divide-by-zero: each handler's data begins with
// where.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

static void fail_undefined(const char* kind, const char* what, const SourceLocation* where, const void* pc) {
  if (current) fail(kind, what, pc);
  std::fprintf(stderr, "%s:%u: %s: %s\n", where->file, where->line, kind, what);
  std::abort();
}

#define TRANSFUSE_UNDEFINED(handler, kind, what)                       \
  void __ubsan_handle_##handler(SourceLocation* where, void*, void*) { \
    fail_undefined(kind, what, where, __builtin_return_address(0));    \
  }
TRANSFUSE_UNDEFINED(type_mismatch_v1, "misaligned access", "accesses an address that is not aligned to the type's size")
TRANSFUSE_UNDEFINED(out_of_bounds, "out of bounds", "indexes an array beyond its end")
TRANSFUSE_UNDEFINED(add_overflow, "integer overflow", "adds past the type's range")
TRANSFUSE_UNDEFINED(sub_overflow, "integer overflow", "subtracts past the type's range")
TRANSFUSE_UNDEFINED(mul_overflow, "integer overflow", "multiplies past the type's range")
TRANSFUSE_UNDEFINED(negate_overflow, "integer overflow", "negates the smallest integer")
TRANSFUSE_UNDEFINED(shift_out_of_bounds, "integer overflow", "shifts past the type's width")
TRANSFUSE_UNDEFINED(divrem_overflow, "integer overflow", "divides by zero or past the type's range")
#undef TRANSFUSE_UNDEFINED
}
