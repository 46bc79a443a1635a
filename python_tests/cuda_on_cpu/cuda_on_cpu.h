// Runs CUDA device code on the CPU: one fiber a thread, all blocks of a grid alive at once, and the
// next fiber to run drawn at random at every barrier, some blocks far ahead of others. So the tests
// see the device code's logic, and many orders of threads and blocks, without a GPU.
//
// What is here is what the kernels under test use: barriers, warp shuffles (by whole warps),
// atomicAdd,
// __trap and dynamic shared memory. A barrier that part of a block never reaches is an error.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(8) uint2 {
  unsigned x, y;
};

namespace cuda_on_cpu {

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned char kPoison =
    0xa5;  // what shared memory holds at first, as a GPU's holds anything

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Block;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block;
  unsigned thread;
  State state = State::kReady;
};

struct Block {
  dim3 index;
  unsigned threads;
  unsigned slowness;  // it runs in one of so many rounds
  std::vector<unsigned char> shared;
  std::vector<int> warp_values;
  std::vector<Fiber> fibers;
};

struct Machine {
  std::mt19937 random;
  ucontext_t scheduler;
  Fiber* running = nullptr;
  dim3 grid;
  std::function<void()> kernel;
  bool trapped = false;
};

inline Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

inline void wait_as(State state) {
  Fiber* fiber = machine().running;
  fiber->state = state;
  swapcontext(&fiber->context, &machine().scheduler);
}

inline void enter() {
  machine().kernel();
  machine().running->state = State::kDone;
  swapcontext(&machine().running->context, &machine().scheduler);
}

// Lets waiting fibers go on where all of their block, or of their warp, wait alike.
inline void release(Block& block) {
  unsigned waiting = 0, done = 0;
  for (const Fiber& fiber : block.fibers) {
    waiting += fiber.state == State::kAtBlockBarrier;
    done += fiber.state == State::kDone;
  }
  if (waiting == block.threads) {
    for (Fiber& fiber : block.fibers) fiber.state = State::kReady;
  } else if (waiting > 0 && waiting + done == block.threads) {
    throw std::runtime_error("part of a block left before a barrier");
  }
  for (unsigned first = 0; first < block.threads; first += 32) {
    bool all = true;
    for (unsigned t = first; t < first + 32; ++t) {
      all = all && block.fibers[t].state == State::kAtWarpBarrier;
    }
    for (unsigned t = first; all && t < first + 32; ++t) block.fibers[t].state = State::kReady;
  }
}

// Runs `kernel` over the grid; threads is a multiple of 32. Returns false if a thread trapped.
inline bool launch(dim3 grid, unsigned threads, size_t shared_bytes, unsigned seed,
                   std::function<void()> kernel) {
  Machine& m = machine();
  m.random.seed(seed);
  m.grid = grid;
  m.kernel = std::move(kernel);
  m.trapped = false;
  std::vector<std::unique_ptr<Block>> blocks;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      auto block = std::make_unique<Block>();
      block->index = {x, y, 1};
      block->threads = threads;
      block->slowness = 1u << (3 * (m.random() % 3));
      block->shared.assign(shared_bytes + 16, kPoison);
      block->warp_values.assign(threads, 0);
      block->fibers.resize(threads);
      for (unsigned t = 0; t < threads; ++t) {
        Fiber& fiber = block->fibers[t];
        fiber.block = block.get();
        fiber.thread = t;
        fiber.stack.reset(new char[kStackBytes]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
      }
      blocks.push_back(std::move(block));
    }
  }
  while (!m.trapped) {
    std::vector<Fiber*> ready;
    bool all_done = true, stuck = true;
    for (auto& block : blocks) {
      release(*block);
      const bool runs = m.random() % block->slowness == 0;
      for (Fiber& fiber : block->fibers) {
        if (runs && fiber.state == State::kReady) ready.push_back(&fiber);
        stuck = stuck && fiber.state != State::kReady;
        all_done = all_done && fiber.state == State::kDone;
      }
    }
    if (all_done) return true;
    if (stuck) throw std::runtime_error("all threads wait: barriers do not match");
    if (ready.empty()) continue;
    // A random part of those that can run, in random order.
    std::shuffle(ready.begin(), ready.end(), m.random);
    const size_t count = 1 + m.random() % ready.size();
    for (size_t i = 0; i < count && !m.trapped; ++i) {
      m.running = ready[i];
      swapcontext(&m.scheduler, &ready[i]->context);
    }
  }
  return false;
}

inline unsigned char* shared_memory() {
  auto& bytes = machine().running->block->shared;
  const auto address = reinterpret_cast<uintptr_t>(bytes.data());
  return bytes.data() + (16 - address % 16) % 16;
}

}  // namespace cuda_on_cpu

#define threadIdx (dim3{cuda_on_cpu::machine().running->thread, 0, 0})
#define blockIdx (cuda_on_cpu::machine().running->block->index)
#define gridDim (cuda_on_cpu::machine().grid)
#define MEM1_DYNAMIC_SHARED(name) \
  uint4* name = reinterpret_cast<uint4*>(cuda_on_cpu::shared_memory())

inline void __syncthreads() { cuda_on_cpu::wait_as(cuda_on_cpu::State::kAtBlockBarrier); }

inline int __shfl_up_sync(unsigned, int value, unsigned step) {
  cuda_on_cpu::Fiber* fiber = cuda_on_cpu::machine().running;
  auto& values = fiber->block->warp_values;
  const unsigned thread = fiber->thread;
  values[thread] = value;
  cuda_on_cpu::wait_as(cuda_on_cpu::State::kAtWarpBarrier);
  const int result = thread % 32 >= step ? values[thread - step] : value;
  cuda_on_cpu::wait_as(cuda_on_cpu::State::kAtWarpBarrier);
  return result;
}

inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  const uint32_t old = *address;
  *address += value;
  return old;
}

inline void __trap() {
  cuda_on_cpu::machine().trapped = true;
  cuda_on_cpu::wait_as(cuda_on_cpu::State::kDone);
}
