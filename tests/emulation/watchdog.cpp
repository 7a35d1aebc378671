// Gives up a launch whose threads do not end: a block, or a cluster, has so much of the host thread's CPU time.
//
// A timer of that thread ticks. A thread that is late is stopped where it next touches memory or waits; one that does
// neither, by the tick that finds it among the kernel's own instructions: those hold no lock of the host.
#include <csignal>
#include <cstdlib>
#include <ctime>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "interface.h"

namespace emulation {

namespace {

constexpr long tick_ns = 20'000'000;
constexpr int ticks_per_second = 50, grace_ticks = 5;  // within which memory is touched, if it is at all

uintptr_t program_counter(const void* context) {
  const auto& machine_context = static_cast<const ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  return static_cast<uintptr_t>(machine_context.gregs[REG_RIP]);
#elif defined(__aarch64__)
  return machine_context.pc;
#else
#error "where does this processor keep its program counter?"
#endif
}

void tick(int, siginfo_t*, void* context) {
  if (!current) return;
  const int late = ++machine.ticks - static_cast<int>(machine.patience * ticks_per_second);
  if (late < 0) return;
  machine.late = true;
  const uintptr_t pc = program_counter(context);
  if (late > grace_ticks && pc >= machine.library->base && pc < machine.library->end)
    stop_late_thread(reinterpret_cast<const void*>(pc + 1));
}

}  // namespace

void stop_late_thread(const void* pc) {
  fail("endless loop", "still runs after " + std::to_string(machine.patience) + " s of its block", pc);
}

void start_over() {
  machine.late = false;
  machine.ticks = 0;
}

Watchdog::Watchdog() {
  start_over();
  struct sigaction action {};
  action.sa_sigaction = tick;
  action.sa_flags = SA_SIGINFO | SA_RESTART | SA_NODEFER;  // left by a jump: the signal must not stay blocked
  sigaction(SIGVTALRM, &action, &previous_);
  sigevent event{};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = SIGVTALRM;
  event._sigev_un._tid = static_cast<pid_t>(syscall(SYS_gettid));
  if (timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer_) != 0) std::abort();
  const itimerspec period = {{0, tick_ns}, {0, tick_ns}};
  timer_settime(timer_, 0, &period, nullptr);
}

Watchdog::~Watchdog() {
  timer_delete(timer_);
  sigaction(SIGVTALRM, &previous_, nullptr);
}

}  // namespace emulation

// Seconds of CPU time for every block, or cluster, of the launches that follow.
extern "C" void emulation_set_patience(double seconds) { emulation::machine.patience = seconds; }
