// point_mask_loss on the GPU: one block of threads a slot (one image, prediction and target). The
// same points, choice and sums as on the CPU (csrc/cpu/point_mask_loss.cpp). Letters there and in
// point_mask_loss.h. S stores the logits, T computes.
//
// forward:  the masks are packed into bits, which the result holds for backward, too.
//           The logit map is copied into shared memory where it fits. All candidates are sampled
//           once; the upper half of each |logit| is kept, 2 bytes a candidate; radix select on
//           them, where only those that share the border's half are sampled anew; marks, sums.
// backward: the points are sorted by the row of their cell; bands of rows are added up in shared
//           memory, from the top. The sums are integers, so that their order does not matter:
//           bit-identical from run to run. What a band puts on the row below it is carried over.
//
// Chosen by arithmetic, not yet measured: one block an SM with all of its shared memory. For
// 256x256 logits of 2 bytes and 37632 candidates 131 + 75 KB: the random reads then cost 3 to 4
// cycles a warp, an eighth of what they cost in L1. An A100 (163 KB) and float maps read through
// L1 and L2.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>

#include "point_mask_loss_backward.h"
#include "point_mask_loss_forward.h"

namespace segkern {
namespace {

using c10::BFloat16;
using c10::Half;

// What lies outside would be read or written outside the tensors
void check(const Tensor& logits, const Tensor& masks, const Tensor& active, const Tensor& ids,
           const Tensor& seed, int64_t candidates, int64_t important, int64_t random,
           const std::optional<Tensor>& cells) {
  const char* op = "point_mask_loss: ";
  STD_TORCH_CHECK(logits.dim() == 5 && masks.dim() == 4 && active.dim() == 3 && ids.dim() == 1, op,
                  "wrong number of dimensions");
  const int64_t B = logits.size(0), R = logits.size(1), T = logits.size(2);
  STD_TORCH_CHECK(masks.size(0) == B && masks.size(1) == T && ids.size(0) == B, op, "wrong sizes");
  STD_TORCH_CHECK(active.numel() == B * R * T && seed.numel() == 1, op, "wrong sizes");
  STD_TORCH_CHECK(masks.element_size() == 1 && active.element_size() == 1, op, "wrong dtype");
  STD_TORCH_CHECK(ids.element_size() == 8 && seed.element_size() == 8, op, "wrong dtype");
  STD_TORCH_CHECK(B * R * T <= INT32_MAX, op, "too many slots");
  STD_TORCH_CHECK(logits.size(3) * logits.size(4) <= INT32_MAX, op, "logit map too large");
  STD_TORCH_CHECK(masks.size(2) * masks.size(3) <= INT32_MAX, op, "mask too large");
  STD_TORCH_CHECK(0 <= important && important <= candidates && 0 <= random, op,
                  "more important points than candidates");
  STD_TORCH_CHECK(candidates + random <= INT32_MAX, op, "too many points");
  for (const Tensor* t : {&masks, &active, &ids, &seed})
    STD_TORCH_CHECK(
        t->is_cuda() == logits.is_cuda() && t->get_device_index() == logits.get_device_index(), op,
        "tensors on different devices");
  if (!cells) return;
  STD_TORCH_CHECK(cells->element_size() == 4 && cells->numel() <= UINT32_MAX &&
                      cells->numel() == B * (masks.size(2) + 1) * ((masks.size(3) + 32) / 32) &&
                      cells->is_cuda() == logits.is_cuda() &&
                      cells->get_device_index() == logits.get_device_index(),
                  op, "wrong cells");
}

// The arguments of both directions, dense
struct Arguments {
  Arguments(const Tensor& mask_logits, const Tensor& masks, const Tensor& active,
            const Tensor& sample_ids, const Tensor& seed, int64_t candidates, int64_t important,
            int64_t random, const std::optional<Tensor>& cells, const Tensor& packed)
      : logits(torch::stable::contiguous(mask_logits)),
        packed(torch::stable::contiguous(packed)),
        active(torch::stable::contiguous(active)),
        ids(torch::stable::contiguous(sample_ids)),
        seed(seed),
        cells(cells ? torch::stable::contiguous(*cells) : Tensor()),
        slots(active.numel()),
        area(logits.size(3) * logits.size(4)),
        limit(static_cast<int64_t>(shared_limit(logits))) {
    const auto small = [](int64_t size) { return static_cast<int32_t>(size); };
    problem = {data<uint32_t>(this->packed),
               tiles_of(masks.size(2), masks.size(3)),
               data<uint8_t>(this->active),
               data<int64_t>(ids),
               data<int64_t>(seed),
               cells ? data<uint32_t>(this->cells) : nullptr,
               static_cast<uint32_t>(logits.size(1)),
               static_cast<uint32_t>(logits.size(2)),
               small(logits.size(3)),
               small(logits.size(4)),
               small(masks.size(2)),
               small(masks.size(3)),
               static_cast<uint32_t>(candidates),
               static_cast<uint32_t>(important),
               static_cast<uint32_t>(random)};
  }
  IntList shape(std::initializer_list<int64_t> more = {}) const {
    IntList sizes = {logits.size(0), logits.size(1), logits.size(2)};
    sizes.insert(sizes.end(), more);
    return sizes;
  }

  Tensor logits, packed, active, ids, seed, cells;
  int64_t slots, area, limit;  // limit: bytes of shared memory that a block may have
  Problem problem;
};

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class S, class T>
Results forward(const Arguments& in) {
  const Problem& p = in.problem;
  Tensor bce = empty<T>(in.logits, in.shape()), dice = empty<T>(in.logits, in.shape());
  Tensor sums = empty<T>(in.logits, in.shape({3}));
  Tensor marks = empty<int32_t>(in.logits, in.shape({p.words()}));
  // the list is no longer than the halves; without these, as many points at a time as it can hold
  const int64_t fixed = sizeof(Shared), halves = 64 * int64_t(p.words());
  const bool halved = fixed + halves <= in.limit;
  const int64_t most = (in.limit - fixed) / 64 * 32;
  const int64_t chunk = halved ? kChunk : std::min<int64_t>(kChunk, most);
  const int64_t list = halved ? halves : 2 * std::min(chunk, round_up(p.important, 8));
  const int64_t map = in.area * sizeof(S);
  const auto run = [&](auto kernel, int64_t bytes) {
    SEGKERN_LAUNCH(in.logits, kernel, in.slots, kThreads<T>, bytes, p, data<S>(in.logits), halved,
                   list, chunk, mutable_data<T>(bce), mutable_data<T>(dice), mutable_data<T>(sums),
                   mutable_data<uint32_t>(marks));
  };
  if (fixed + list + map <= in.limit)
    run(point_mask_loss_kernel<S, T, true>, fixed + list + map);
  else
    run(point_mask_loss_kernel<S, T, false>, fixed + list);
  return {bce, dice, sums, marks, in.packed};
}

template <class T>
Cut cut_slot(const Problem& p, int64_t limit) {
  constexpr int64_t kPixel = 2 * sizeof(T);  // bytes of its sums
  const int64_t N = int64_t(p.candidates) + p.random;
  Cut cut;
  int64_t chunk = std::min<int64_t>(kChunk, round_up(N, 32)), room, left;
  while (true) {  // at least an eighth of the memory is for the sums
    room = round_up(std::min<int64_t>(chunk, p.points()), 8);
    left = limit - sizeof(Shared) - room * (2 + sizeof(T));
    if (8 * left >= limit) break;
    chunk = round_up(chunk / 2, 32);
  }
  const int64_t pixels = left / kPixel, columns = std::min<int64_t>(p.w, pixels / 2);
  const int64_t rows = std::min<int64_t>(p.h, pixels / columns - 1);
  cut.chunk = chunk;
  cut.room = room;
  cut.columns = columns;
  cut.strips = (p.w + columns - 1) / columns;
  cut.bands = (p.h + rows - 1) / rows;
  cut.rows = (p.h + cut.bands - 1) / cut.bands;  // of like height
  cut.sums = (cut.rows + 1) * columns;
  cut.row_shift = 0;
  while (p.h >> cut.row_shift >= int32_t(kBins)) ++cut.row_shift;
  return cut;
}

template <class S, class T>
Tensor backward(const Arguments& in, const Tensor& grad_bce, const Tensor& grad_dice,
                const Tensor& sums, const Tensor& marks) {
  const Tensor gb = dense<T>(grad_bce), gd = dense<T>(grad_dice), kept = dense<T>(sums);
  const Tensor chosen = torch::stable::contiguous(marks);
  Tensor out = torch::stable::new_empty(in.logits, in.shape({in.problem.h, in.problem.w}));
  if (out.numel() == 0) return out;
  if (out.is_cpu()) poison_fill(out.mutable_data_ptr(), out.numel() * sizeof(S));
  const Cut cut = cut_slot<T>(in.problem, in.limit);
  const int64_t bytes =
      sizeof(Shared) + cut.room * (2 + sizeof(T)) + int64_t(cut.sums) * 2 * sizeof(T);
  SEGKERN_LAUNCH(in.logits, (point_mask_loss_backward_kernel<S, T>), in.slots, kThreads<T>, bytes,
                 in.problem, cut, data<T>(gb), data<T>(gd), data<T>(kept), data<uint32_t>(chosen),
                 data<S>(in.logits), mutable_data<S>(out));
  return out;
}

template <class F>
void dispatch_stored(const Tensor& logits, const F& f) {
  switch (logits.scalar_type()) {
    case ScalarType::Double:
      return f(double{}, double{});
    case ScalarType::Float:
      return f(float{}, float{});
    case ScalarType::Half:
      return f(Half{}, float{});
    case ScalarType::BFloat16:
      return f(BFloat16{}, float{});
    default:
      STD_TORCH_CHECK(false, "point_mask_loss: floating point logits expected");
  }
}

Results point_mask_loss(Tensor mask_logits, Tensor masks, Tensor active, Tensor sample_ids,
                        Tensor seed, int64_t candidates, int64_t important, int64_t random,
                        std::optional<Tensor> cells) {
  check(mask_logits, masks, active, sample_ids, seed, candidates, important, random, cells);
  const DeviceScope scope(mask_logits);
  const Arguments in(mask_logits, masks, active, sample_ids, seed, candidates, important, random,
                     cells, pack_masks(masks, active));
  Results out;
  dispatch_stored(mask_logits, [&]<class S, class T>(S, T) { out = forward<S, T>(in); });
  return out;
}

Tensor point_mask_loss_backward(Tensor grad_bce, Tensor grad_dice, Tensor sums, Tensor marks,
                                Tensor packed, Tensor mask_logits, Tensor masks, Tensor active,
                                Tensor sample_ids, Tensor seed, int64_t candidates,
                                int64_t important, int64_t random, std::optional<Tensor> cells) {
  check(mask_logits, masks, active, sample_ids, seed, candidates, important, random, cells);
  const DeviceScope scope(mask_logits);
  const Arguments in(mask_logits, masks, active, sample_ids, seed, candidates, important, random,
                     cells, packed);
  const int64_t words = masks.size(0) * masks.size(1) * int64_t(in.problem.tiles.size());
  STD_TORCH_CHECK(
      grad_bce.numel() == in.slots && grad_dice.numel() == in.slots &&
          sums.numel() == 3 * in.slots && marks.numel() == in.slots * in.problem.words() &&
          marks.element_size() == 4 && packed.numel() == words && packed.element_size() == 4,
      "point_mask_loss_backward: wrong sizes");
  Tensor out;
  dispatch_stored(mask_logits, [&]<class S, class T>(S, T) {
    out = backward<S, T>(in, grad_bce, grad_dice, sums, marks);
  });
  return out;
}

}  // namespace
}  // namespace segkern

STABLE_TORCH_LIBRARY_IMPL(segkern, SEGKERN_CUDA_KEY, m) {
  m.impl("point_mask_loss", TORCH_BOX(&segkern::point_mask_loss));
  m.impl("point_mask_loss_backward", TORCH_BOX(&segkern::point_mask_loss_backward));
}
