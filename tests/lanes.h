// The lanes of one thread group, as fibers that take turns at every barrier.
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

// Memory of a thread group with nothing behind it: who goes there is stopped, and the process with it.
class VqGuarded {
 public:
  explicit VqGuarded(size_t bytes) : bytes_(bytes), whole_((bytes + PAGE - 1) / PAGE * PAGE) {
    start_ = (char*)mmap(nullptr, whole_ + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start_ == MAP_FAILED || mprotect(start_ + whole_, PAGE, PROT_NONE)) abort();
  }
  ~VqGuarded() { munmap(start_, whole_ + PAGE); }
  float* data() { return (float*)(start_ + whole_ - bytes_); }
  // Poison, so that reading what was never written shows.
  void fill(uint32_t x) { std::fill_n((uint32_t*)data(), bytes_ / 4, x); }

 private:
  static const size_t PAGE = 4096;
  size_t bytes_, whole_;
  char* start_;
};

class VqFibers {
 public:
  static inline VqFibers* current = nullptr;

  VqFibers(int threads, std::function<void(int)> run) : run_(run), fibers_(threads) {
    current = this;
    if (stacks.size() < fibers_.size() * STACK) stacks.resize(fibers_.size() * STACK);
    // By turns the first warp is ahead, the last one, or all are in step: warps that do not wait for each other where they
    // must are wrong in one of these orders, and those that write each other's memory in the last.
    static unsigned groups = 0;
    const unsigned order = groups % 3;
    descending_ = groups++ / 3 % 2;  // so do lanes of a warp
    const int warps = (threads + 31) / 32;
    for (bool left = true; left;) {
      left = false;
      bool went_on = false;
      for (int w = 0; w < warps; ++w) {
        const size_t first = 32 * (order == 1 ? warps - 1 - w : w);
        bool some = resume_warp(first);
        if (order == 2) {
          went_on |= free_warp(first);
        } else {
          while (free_warp(first)) some = resume_warp(first);
        }
        left |= some;
      }
      if (!went_on && !release() && left) fprintf(stderr, "lanes wait for each other\n"), abort();
    }
  }

  void wait(bool warp) {
    Fiber& f = fibers_[lane_];
    f.waits = warp ? 1 : 2;
    if (!_setjmp(f.here)) _longjmp(home_, 1);
  }

  float shuffle_xor(float x, unsigned bit) {
    const float* all = exchange(x, 0.0f, 0.0f, 0.0f);
    return all[4 * (lane_ % 32 ^ bit)];
  }

  // What each lane of the warp gives, [32, 4]; until the next call but one.
  const float* exchange(float a, float b, float c, float d) {
    Fiber& f = fibers_[lane_];
    float* all = given_[f.turn] + lane_ / 32 * 128;
    const float own[4] = {a, b, c, d};
    memcpy(all + lane_ % 32 * 4, own, 16);
    f.turn ^= 1;
    wait(true);
    return all;
  }

  int lane() const { return lane_; }

 private:
  enum : size_t { STACK = 1 << 17 };
  static inline std::vector<char> stacks;
  struct Fiber {
    jmp_buf here;
    int waits = 0;  // for its warp: 1, for the group: 2
    int turn = 0;
    bool started = false, done = false;
  };

  __attribute__((noinline)) void resume(int i) {
    Fiber& f = fibers_[i];
    lane_ = i;
    if (_setjmp(home_)) return;
    if (f.started) _longjmp(f.here, 1);
    f.started = true;
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks.data() + i * STACK;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, (void (*)())enter, 0);
    setcontext(&context);
  }
  static void enter() {
    VqFibers* all = current;
    all->run_(all->lane_);
    all->fibers_[all->lane_].done = true;
    _longjmp(all->home_, 1);
  }
  bool all_wait(size_t from, size_t until, int kind) {
    bool some = false;
    for (size_t i = from; i < until && i < fibers_.size(); ++i) {
      if (fibers_[i].waits != kind && !(kind == 2 && fibers_[i].done)) return false;
      some |= fibers_[i].waits == kind;
    }
    return some;
  }
  size_t end_of(size_t first) const { return std::min(first + 32, fibers_.size()); }
  // Its lanes to their next barriers; whether any of them is left.
  bool resume_warp(size_t first) {
    bool left = false;
    for (size_t n = first; n < end_of(first); ++n) {
      const size_t i = descending_ ? first + end_of(first) - 1 - n : n;
      if (!fibers_[i].done && !fibers_[i].waits) resume(i);
      left |= !fibers_[i].done;
    }
    return left;
  }
  bool free_warp(size_t first) { return all_wait(first, end_of(first), 1) && free(first, end_of(first)); }
  bool release() { return all_wait(0, fibers_.size(), 2) && free(0, fibers_.size()); }
  bool free(size_t from, size_t until) {
    for (size_t i = from; i < until; ++i) fibers_[i].waits = 0;
    return true;
  }

  std::function<void(int)> run_;
  std::vector<Fiber> fibers_;
  float given_[2][1024 * 4];
  jmp_buf home_;
  int lane_ = 0;
  bool descending_ = false;
};
