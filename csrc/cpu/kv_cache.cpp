// prune_kv_ and prune_paged_kv_ on the CPU: every row's moves as runs of consecutive slots, then
// one parallel loop over tensors, rows and heads.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/prune_index.h"
#include "common/slot_tensor.h"
#include "cpu/element_type.h"
#include "cpu/rotate_keys.h"
#include "cpu/simd.h"
#include "cpu/slot_runs.h"
#include "ops.h"
#include "prune_args.h"

namespace mem1 {
namespace {

constexpr int kRotatedSlots = 64;  // slots per rotation task

// The keep bits of one row, in memory of their own.
class RowBits {
 public:
  RowBits(const bool* keep, int length)
      : words_(prune_groups(length) * kGroupWords), group_rank_(prune_groups(length)) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(keep);
    int slot = 0;
    for (; slot + 4 <= length; slot += 4) {
      uint32_t four;
      std::memcpy(&four, bytes + slot, 4);
      words_[slot / kWordSlots] |= pack_keep(four) << (slot % kWordSlots);
    }
    for (; slot < length; ++slot) {
      words_[slot / kWordSlots] |= static_cast<uint32_t>(bytes[slot] != 0) << (slot % kWordSlots);
    }
    for (size_t group = 0; group < group_rank_.size(); ++group) {
      group_rank_[group] = survivors_;
      for (int w = 0; w < kGroupWords; ++w)
        survivors_ += count_bits(words_[group * kGroupWords + w]);
    }
  }

  Survivors view() const { return {words_.data(), group_rank_.data()}; }
  int survivors() const { return survivors_; }
  int words() const { return static_cast<int>(words_.size()); }

 private:
  std::vector<uint32_t> words_;
  std::vector<int32_t> group_rank_;
  int survivors_ = 0;
};

struct Moves {
  std::vector<int> sources, destinations;
};

// All moves of a row, in ascending order.
Moves list_moves(const RowBits& bits, const RowMoves& row, bool ordered) {
  const Survivors kept = bits.view();
  Moves moves;
  moves.sources.resize(row.count);
  moves.destinations.resize(row.count);
  for (int word = row.source_from / kWordSlots; word < bits.words(); ++word) {
    emit_sources(kept, row, word, 0, row.count,
                 [&](int move, int slot) { moves.sources[move] = slot; });
  }
  if (ordered) {
    for (int move = 0; move < row.count; ++move) moves.destinations[move] = row.stay_end + move;
  } else {
    for (int word = 0; word * kWordSlots < row.survivors; ++word) {
      emit_holes(kept, row, word, 0, row.count,
                 [&](int move, int slot) { moves.destinations[move] = slot; });
    }
  }
  return moves;
}

// What a row's slots 0 .. n - 1 hold after the prune: the slot that each survivor comes from, and
// by how many positions its key is rotated.
struct TurnedRow {
  std::vector<int> sources;
  std::vector<int> deltas;
};

using RotateKeys = void (*)(const cpu::RotatedSlot&);

RotateKeys rotate_keys() {
  switch (cpu::simd_level()) {
    case cpu::SimdLevel::kAmx:
    case cpu::SimdLevel::kAvx512Bf16:
    case cpu::SimdLevel::kAvx512:
#ifdef MEM1_SIMD_AVX512
      return cpu::rotate_keys_avx512;
#endif
    case cpu::SimdLevel::kAvx2:
#ifdef MEM1_SIMD_AVX2
      return cpu::rotate_keys_avx2;
#endif
    case cpu::SimdLevel::kDefault:
      break;
  }
  return cpu::rotate_keys_default;
}

void turn_slots(const SlotTensor& tensor, cpu::ElementType type, bool interleaved,
                RotateKeys rotate, int page, const TurnedRow& row, int begin, int end,
                std::vector<float>& scratch) {
  scratch.resize(2 * tensor.pairs);
  for (int slot = begin; slot < end; ++slot) {
    const char* source = address(tensor, page, 0, row.sources[slot]);
    char* destination = address(tensor, page, 0, slot);
    if (row.deltas[slot] != 0) {
      rotate({type, source, destination, tensor.head_stride, tensor.heads, tensor.pairs,
              interleaved, tensor.steps, row.deltas[slot], scratch.data()});
    } else if (row.sources[slot] != slot) {
      for (int head = 0; head < tensor.heads; ++head) {
        std::memcpy(destination + head * tensor.head_stride, source + head * tensor.head_stride,
                    tensor.row_bytes);
      }
    }
  }
}

// Rows of one tensor in chunks of slots; a row that keeps order is one chunk, done in ascending
// order.
void turn_all(const std::vector<SlotTensor>& tensors, cpu::ElementType type, bool interleaved,
              bool ordered, const std::vector<TurnedRow>& rows) {
  struct Task {
    int tensor, row, begin, end;
  };
  std::vector<Task> tasks;
  for (int t = 0; t < static_cast<int>(tensors.size()); ++t) {
    for (int row = 0; row < static_cast<int>(rows.size()); ++row) {
      const int slots = static_cast<int>(rows[row].sources.size());
      const int chunk = ordered ? std::max(slots, 1) : kRotatedSlots;
      for (int begin = 0; begin < slots; begin += chunk) {
        tasks.push_back({t, row, begin, std::min(begin + chunk, slots)});
      }
    }
  }
  const RotateKeys rotate = rotate_keys();
  at::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch;
    for (int64_t i = begin; i < end; ++i) {
      const Task& task = tasks[i];
      turn_slots(tensors[task.tensor], type, interleaved, rotate, task.row, rows[task.row],
                 task.begin, task.end, scratch);
    }
  });
}

std::vector<int> read_lengths(const at::Tensor& lengths, int capacity) {
  std::vector<int> result(lengths.size(0));
  const auto accessor = lengths.accessor<int32_t, 1>();
  for (size_t row = 0; row < result.size(); ++row) {
    result[row] = accessor[row];
    TORCH_CHECK_VALUE(result[row] >= 0 && result[row] <= capacity, "lengths: expected 0 to ",
                      capacity, " in row ", row, ", got ", result[row]);
  }
  return result;
}

// A page of a row that is to be packed, see prune_index.h.
struct PackedPage {
  int page;         // its id
  int first_token;  // of the row
};

struct PagedRow {
  std::vector<int> table;  // the row's pages in their new order, those in use first
  int used = 0;
  int survivors = 0;
  bool fits = true;  // whether the row may write enough pages
  std::vector<Run> runs;
};

PagedRow plan_paged_row(const bool* keep, const int32_t* table, int length, int page_size,
                        const int32_t* page_refs) {
  const RowBits bits(keep, length);
  const Survivors kept = bits.view();
  const int pages = (length + page_size - 1) / page_size;
  PagedRow row;
  row.survivors = bits.survivors();
  std::vector<PackedPage> by_kind[kPageKinds];
  for (int q = 0; q < pages; ++q) {
    const int first = q * page_size;
    const int survivors = kept.rank(std::min(first + page_size, length)) - kept.rank(first);
    const bool shared = page_refs != nullptr && page_refs[table[q]] > 1;
    by_kind[page_kind(survivors, page_size, shared)].push_back({table[q], first});
  }
  const int whole = static_cast<int>(by_kind[kWholePage].size());
  const int packed = row.survivors - whole * page_size;
  const int receivers = (packed + page_size - 1) / page_size;
  row.used = whole + receivers;
  row.fits =
      receivers <= static_cast<int>(by_kind[kOwnedPartial].size() + by_kind[kOwnedDead].size());
  for (const auto& kind : by_kind) {
    for (const PackedPage& page : kind) row.table.push_back(page.page);
  }

  std::vector<PackedPage> packing;
  for (int kind = kOwnedPartial; kind < kPageKinds; ++kind) {
    packing.insert(packing.end(), by_kind[kind].begin(), by_kind[kind].end());
  }
  std::vector<std::pair<int, int>> sources, holes;  // page, slot in it
  for (int j = 0; j < static_cast<int>(packing.size()); ++j) {
    for (int i = 0; i < page_size; ++i) {
      const int token = packing[j].first_token + i;
      const bool alive = token < length && kept.at(token);
      const bool behind = j * page_size + i >= packed;
      if (alive && behind) sources.emplace_back(packing[j].page, i);
      if (!alive && !behind) holes.emplace_back(packing[j].page, i);
    }
  }
  for (size_t move = 0; move < holes.size(); ++move) {
    append_move(row.runs, {sources[move].first, sources[move].second, holes[move].first,
                           holes[move].second, 1});
  }
  return row;
}

// Checks that every page in use exists, has page_refs >= 1, and is listed once unless it is shared.
void check_tables(const at::Tensor& block_table, const std::vector<int>& lengths, int page_size,
                  int pages, const int32_t* page_refs) {
  std::vector<char> seen(pages, 0);
  for (size_t row = 0; row < lengths.size(); ++row) {
    const int32_t* table = block_table.const_data_ptr<int32_t>() + row * block_table.stride(0);
    for (int q = 0; q * page_size < lengths[row]; ++q) {
      const int page = table[q];
      TORCH_CHECK_VALUE(page >= 0 && page < pages, "block_table: expected pages 0 to ", pages - 1,
                        " in row ", row, ", got ", page);
      TORCH_CHECK_VALUE(page_refs == nullptr || page_refs[page] >= 1,
                        "page_refs: expected at least 1 for page ", page, ", which row ", row,
                        " uses, got ", page_refs[page]);
      if (page_refs != nullptr && page_refs[page] > 1) continue;
      TORCH_CHECK_VALUE(!seen[page], "block_table: expected page ", page,
                        " once, since nothing says that it is shared, got it again in row ", row);
      seen[page] = 1;
    }
  }
}

}  // namespace

void prune_kv_cpu(at::TensorList keys, at::TensorList values, const at::Tensor& lengths,
                  const at::Tensor& keep, at::TensorList slots, bool ordered,
                  const std::optional<at::Tensor>& position_delta, at::TensorList rope_steps,
                  bool interleaved) {
  const PruneArgs args = prune_args(keys, values, lengths, keep, slots, position_delta, rope_steps);
  const std::vector<int> old_lengths = read_lengths(lengths, args.capacity);
  std::vector<SlotTensor> copied, turned;
  for (const SlotTensor& tensor : args.tensors) {
    (tensor.pairs > 0 ? turned : copied).push_back(merge_heads(tensor));
  }

  std::vector<std::vector<Run>> runs(args.batch);
  std::vector<TurnedRow> turned_rows(turned.empty() ? 0 : args.batch);
  auto new_lengths = lengths.accessor<int32_t, 1>();
  const int64_t rows_to_task = std::max<int64_t>(1, kTaskBytes / std::max(args.capacity, 1));
  at::parallel_for(0, args.batch, rows_to_task, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int page = static_cast<int>(b);
      const RowBits bits(keep.const_data_ptr<bool>() + b * keep.stride(0), old_lengths[b]);
      const RowMoves row = plan_row(bits.view(), bits.survivors(), ordered);
      const Moves moves = list_moves(bits, row, ordered);
      for (int i = 0; i < row.count; ++i) {
        append_move(runs[b], {page, moves.sources[i], page, moves.destinations[i], 1});
      }
      if (!turned.empty()) {
        TurnedRow& turn = turned_rows[b];
        const int32_t* delta =
            position_delta->const_data_ptr<int32_t>() + b * position_delta->stride(0);
        for (int slot = 0; slot < row.survivors; ++slot) turn.sources.push_back(slot);
        for (int i = 0; i < row.count; ++i) turn.sources[moves.destinations[i]] = moves.sources[i];
        for (const int source : turn.sources) turn.deltas.push_back(delta[source]);
      }
      new_lengths[b] = row.survivors;
    }
  });
  copy_all(copied, runs);
  if (!turned.empty()) {
    turn_all(turned, cpu::element_type(args.key_type), interleaved, ordered, turned_rows);
  }
}

void prune_paged_kv_cpu(at::TensorList keys, at::TensorList values, const at::Tensor& block_table,
                        const at::Tensor& lengths, const at::Tensor& keep,
                        const std::optional<at::Tensor>& page_refs, at::TensorList slots,
                        const at::Tensor& freed, const at::Tensor& freed_counts) {
  const PagedPruneArgs args = paged_prune_args(keys, values, block_table, lengths, keep, page_refs,
                                               slots, freed, freed_counts);
  const std::vector<int> old_lengths = read_lengths(lengths, args.capacity);
  const int32_t* refs = page_refs ? page_refs->const_data_ptr<int32_t>() : nullptr;
  check_tables(block_table, old_lengths, args.page_size, args.pages, refs);
  std::vector<SlotTensor> tensors;
  for (const SlotTensor& tensor : args.tensors) tensors.push_back(merge_heads(tensor));

  std::vector<std::vector<Run>> runs(args.batch);
  auto new_lengths = lengths.accessor<int32_t, 1>();
  auto counts = freed_counts.accessor<int32_t, 1>();
  at::parallel_for(0, args.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      int32_t* table = block_table.data_ptr<int32_t>() + b * block_table.stride(0);
      int32_t* row_freed = freed.data_ptr<int32_t>() + b * freed.stride(0);
      std::fill(row_freed, row_freed + args.max_pages, -1);
      PagedRow row = plan_paged_row(keep.const_data_ptr<bool>() + b * keep.stride(0), table,
                                    old_lengths[b], args.page_size, refs);
      counts[b] = 0;
      if (row.survivors == old_lengths[b]) continue;
      if (!row.fits) {
        counts[b] = -1;
        continue;
      }
      std::copy(row.table.begin(), row.table.end(), table);
      std::copy(row.table.begin() + row.used, row.table.end(), row_freed);
      counts[b] = static_cast<int>(row.table.size()) - row.used;
      new_lengths[b] = row.survivors;
      runs[b] = std::move(row.runs);
    }
  });
  copy_all(tensors, runs);
}

}  // namespace mem1
