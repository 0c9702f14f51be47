// The probes' products of tiles: of 16 rows x 64 bytes by 16 columns x 64 bytes, into 16 x 16 sums of 32 bits.
#pragma once

#include "../gemm/amx.h"
#include "table.h"

namespace pynlp {
namespace {

constexpr int PRODUCTS = 4;  // a round: each takes 16 cycles, and its sums are there after 52

void clear_tiles() {
  configure_tiles(2 * SIDE);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
}

double bf16_tile_rounds(int64_t rounds) {
  clear_tiles();
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 2.0 * 16 * 16 * 32 * PRODUCTS * static_cast<double>(rounds);
}

double int8_tile_rounds(int64_t rounds) {
  clear_tiles();
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
  return 2.0 * 16 * 16 * 64 * PRODUCTS * static_cast<double>(rounds);
}

}  // namespace
}  // namespace pynlp
