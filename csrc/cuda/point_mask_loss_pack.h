// The masks of point_mask_loss as bits, which a call packs once for all predictions and for both
// directions. A word is a tile of 4 rows of 8 pixels: most points find their four pixels in one.
#pragma once

#include "device.h"

namespace segkern {
namespace {

constexpr uint32_t kTileRows = 4, kTileColumns = 8;

// The tiles of a mask [H, W]
struct Tiles {
  uint32_t rows, columns;

  SEGKERN_DEVICE uint32_t size() const { return rows * columns; }
};

inline Tiles tiles_of(int64_t H, int64_t W) {
  return {static_cast<uint32_t>((H + kTileRows - 1) / kTileRows),
          static_cast<uint32_t>((W + kTileColumns - 1) / kTileColumns)};
}

// The bits of four bytes, 1 for those that are not 0
__device__ __forceinline__ uint32_t bits_of(uint32_t bytes) {
  bytes |= bytes >> 4;
  bytes |= bytes >> 2;
  bytes |= bytes >> 1;
  return (bytes & 0x01010101u) * 0x01020408u >> 24;
}

constexpr unsigned kPackers = 256;  // threads, each with a word

// Targets without an active slot are left out: nobody reads their words.
__global__ void __launch_bounds__(kPackers)
    pack_masks_kernel(const uint8_t* masks /*[B, T, H, W]*/, const uint8_t* active /*[B, R, T]*/,
                      uint32_t R, uint32_t T, int32_t H, int32_t W, Tiles tiles,
                      bool whole /*rows of tiles, aligned*/, uint32_t* words /*[B, T, tiles]*/) {
  const uint32_t size = tiles.size(), blocks = (size + kPackers - 1) / kPackers;
  const uint32_t target = blockIdx.x / blocks, b = target / T, t = target % T;
  const uint32_t i = blockIdx.x % blocks * kPackers + threadIdx.x;
  bool used = false;
  for (uint32_t r = 0; r < R; ++r) used |= active[(uint64_t(b) * R + r) * T + t] != 0;
  if (!used || i >= size) return;
  const int32_t y = static_cast<int32_t>(i / tiles.columns * kTileRows);
  const int32_t x = static_cast<int32_t>(i % tiles.columns * kTileColumns);
  const uint8_t* from = masks + (uint64_t(target) * H + y) * W + x;
  uint32_t word = 0;
#pragma unroll
  for (int32_t j = 0; j < int32_t(kTileRows); ++j, from += W) {
    if (y + j >= H) continue;
    uint32_t row = 0;
    if (whole) {
      const uint2 bytes = *reinterpret_cast<const uint2*>(from);
      row = bits_of(bytes.x) | bits_of(bytes.y) << 4;
    } else {
      for (int32_t k = 0; k < min(int32_t(kTileColumns), W - x); ++k)
        row |= static_cast<uint32_t>(from[k] != 0) << k;
    }
    word |= row << kTileColumns * j;
  }
  words[uint64_t(target) * size + i] = word;
}

// Masks [B, T, H, W] of bytes as int32 [B, T, tile rows, tile columns]
inline Tensor pack_masks(const Tensor& masks, const Tensor& active /*[B, R, T]*/) {
  const Tensor dense = torch::stable::contiguous(masks), slots = torch::stable::contiguous(active);
  const int64_t B = dense.size(0), T = dense.size(1), H = dense.size(2), W = dense.size(3);
  const Tiles tiles = tiles_of(H, W);
  Tensor words = empty<int32_t>(dense, {B, T, int64_t(tiles.rows), int64_t(tiles.columns)});
  const int64_t blocks = (int64_t(tiles.size()) + kPackers - 1) / kPackers;
  const uint8_t* from = data<uint8_t>(dense);
  const bool whole = W % kTileColumns == 0 && reinterpret_cast<uintptr_t>(from) % 8 == 0;
  SEGKERN_LAUNCH(dense, pack_masks_kernel, static_cast<unsigned>(B * T * blocks), kPackers, 0,
                 from, data<uint8_t>(slots), static_cast<uint32_t>(active.size(1)),
                 static_cast<uint32_t>(T), static_cast<int32_t>(H), static_cast<int32_t>(W), tiles,
                 whole, mutable_data<uint32_t>(words));
  return words;
}

}  // namespace
}  // namespace segkern
