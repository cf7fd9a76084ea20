// SPDX-License-Identifier: Apache-2.0
/// How values wait on the host (detail/host_offloader.hpp), on a CPU, whose copies are done at once: which
/// are copied, given back and brought back. tests/gpu/activations_test.cpp does it on a GPU's streams.
#include <fourfold/activations/offload.hpp>
#include <tests/support/message_of.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace {

using fourfold::detail::HostOffloader, fourfold::detail::HostPiece;
using testing::HasSubstr;

constexpr std::int64_t kValues = 1024, kBytes = 4 * kValues;

struct Put {
  std::vector<at::Tensor> values;
  std::vector<std::shared_ptr<HostPiece>> pieces;
};
Put put(HostOffloader& offloader, int n) {
  torch::manual_seed(0);
  Put out;
  for (int i = 0; i < n; ++i) {
    out.values.push_back(torch::randn({kValues}));
    out.pieces.push_back(offloader.put(out.values.back().clone()));
  }
  return out;
}

TEST(HostOffload, WhatIsPutLastStaysAndTheRestIsCopied) {
  HostOffloader offloader(8 * kBytes);
  const Put all = put(offloader, 20);
  const auto counts = offloader.counts();
  EXPECT_EQ(counts.written, 16);  // four, half of what may be in flight, wait
  EXPECT_LE(counts.waiting_bytes, 8 * kBytes);
  for (int i = 19; i >= 16; --i) EXPECT_TRUE(all.pieces[i]->get().equal(all.values[i]));
  EXPECT_EQ(offloader.counts().written, 16);
}

TEST(HostOffload, BackwardGetsTheSameValuesAheadOfItself) {
  HostOffloader offloader(8 * kBytes);
  Put all = put(offloader, 20);
  for (int i = 19; i >= 0; --i) {
    EXPECT_TRUE(all.pieces[i]->get().equal(all.values[i])) << i;
    all.pieces[i].reset();
  }
  const auto counts = offloader.counts();
  EXPECT_EQ(counts.read, 12);  // four waited, four were being copied still
  EXPECT_EQ(counts.read_ahead, 12);
  EXPECT_EQ(counts.waiting_bytes, 0);
}

TEST(HostOffload, AnyOrderAnyNumberOfTimes) {
  HostOffloader offloader(4 * kBytes);
  const Put all = put(offloader, 12);
  for (const int i : {3, 3, 0, 11, 7, 0, 3}) EXPECT_TRUE(all.pieces[i]->get().equal(all.values[i]));
}

TEST(HostOffload, NothingInFlightCopiesAndGivesBackAtOnce) {
  HostOffloader offloader(0);
  const Put all = put(offloader, 3);
  EXPECT_EQ(offloader.counts().written, 3);
  EXPECT_EQ(offloader.counts().waiting_bytes, 0);
  for (int i = 2; i >= 0; --i) EXPECT_TRUE(all.pieces[i]->get().equal(all.values[i]));
  EXPECT_EQ(offloader.counts().read_ahead, 0);
}

TEST(HostOffload, SettledNothingIsBeingCopied) {
  HostOffloader offloader(8 * kBytes);
  const Put all = put(offloader, 20);
  offloader.settle();
  EXPECT_EQ(offloader.counts().waiting_bytes, 4 * kBytes);  // what waits is not read by anybody
  EXPECT_TRUE(all.pieces[13]->get().equal(all.values[13]));
}

TEST(HostOffload, AWriteIsToldOrIsAnError) {
  HostOffloader offloader(8 * kBytes);
  for (const int later : {0, 3, 20}) {  // it waits, is being copied, is on the host
    SCOPED_TRACE(later);
    const auto mine = torch::randn({kValues}), before = mine.clone();
    const auto piece = offloader.put(mine, mine);
    const Put others = put(offloader, later);
    piece->before_write();
    mine.add_(1);
    EXPECT_TRUE(piece->get().equal(before));
  }
  const auto mine = torch::randn({kValues});
  const auto piece = offloader.put(mine, mine);
  mine.add_(1);
  EXPECT_THAT(message_of([&] { piece->get(); }), HasSubstr("modified by an inplace operation"));
}

TEST(HostOffload, PiecesOutliveWhoPutThem) {
  Put all;
  {
    HostOffloader offloader(4 * kBytes);
    all = put(offloader, 10);
  }
  for (int i = 9; i >= 0; --i) EXPECT_TRUE(all.pieces[i]->get().equal(all.values[i]));
}

/// Of a step that failed: pieces go in any order, and the next step finds all room free.
TEST(HostOffload, PiecesThatAreNeverTakenFreeTheirRoom) {
  HostOffloader offloader(8 * kBytes);
  {
    Put all = put(offloader, 20);
    all.pieces[15]->get();
    for (int i = 0; i < 20; i += 2) all.pieces[i].reset();
  }
  EXPECT_EQ(offloader.counts().waiting_bytes, 0);
  const Put all = put(offloader, 20);
  for (int i = 19; i >= 0; --i) EXPECT_TRUE(all.pieces[i]->get().equal(all.values[i]));
}

}  // namespace
