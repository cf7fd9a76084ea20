// SPDX-License-Identifier: Apache-2.0
#include <fourfold/activations/offloader.hpp>

#include "../support/files.hpp"
#include "../support/message_of.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace {

using fourfold::Offloader;
using fourfold::OffloadOptions;
using ::testing::HasSubstr;
using Piece = std::shared_ptr<fourfold::detail::OffloadPiece>;

constexpr std::int64_t kPiece = 1 << 16;  // bytes

torch::Tensor numbered(int i) { return torch::full({kPiece / 4}, i, torch::kInt); }

std::vector<Piece> put(Offloader& offloader, int count) {
  std::vector<Piece> pieces;
  for (int i = 0; i < count; ++i) pieces.push_back(offloader.put(numbered(i)));
  return pieces;
}

/// All room is free, as soon as no piece is being read ahead.
void expect_empty(const Offloader& offloader) {
  for (int i = 0; i < 1000 && offloader.counts().file_bytes > 0; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  EXPECT_EQ(offloader.counts().file_bytes, 0);
}

TEST(Offloader, ADirectoryThatCannotBeWrittenToIsRefused) {
  EXPECT_THAT(
      message_of([] { const Offloader offloader({.directory = "/no/such/place"}); }),
      HasSubstr("fourfold::Offload: cannot make a file in '/no/such/place': No such file or "
                "directory; name a directory that this process may write to, on a disk, in "
                "OffloadOptions::directory"));
}

TEST(Offloader, PiecesComeBackInAnyOrderAndMoreThanOnce) {
  Offloader offloader({.bytes_in_flight = 4 * kPiece});
  const std::vector<Piece> pieces = put(offloader, 40);
  for (int round = 0; round < 2; ++round)
    for (int i = 0; i < 40; ++i) {
      const int k = round == 0 ? 39 - i : (i * 7) % 40;
      EXPECT_TRUE(torch::equal(pieces[k]->get(), numbered(k))) << k;
    }
}

TEST(Offloader, WhatComesLastIsNotWritten) {
  Offloader offloader({.bytes_in_flight = 8 * kPiece});
  const std::vector<Piece> pieces = put(offloader, 20);
  offloader.settle();
  EXPECT_EQ(offloader.counts().written, 16);
  EXPECT_EQ(offloader.counts().waiting_bytes, 4 * kPiece);
  for (int i = 19; i >= 16; --i) EXPECT_TRUE(torch::equal(pieces[i]->get(), numbered(i)));
  EXPECT_EQ(offloader.counts().written, 16);
}

TEST(Offloader, WhatFitsInFlightIsNeverWritten) {
  Offloader offloader({.bytes_in_flight = 8 * kPiece});
  for (int step = 0; step < 5; ++step) {
    const std::vector<Piece> pieces = put(offloader, 4);
    EXPECT_TRUE(torch::equal(pieces[2]->get(), numbered(2)));
  }
  offloader.settle();
  EXPECT_EQ(offloader.counts().written, 0);
  EXPECT_EQ(offloader.counts().waiting_bytes, 0);
}

TEST(Offloader, NoMoreThanTheBytesInFlightWait) {
  Offloader offloader({.bytes_in_flight = 3 * kPiece});
  std::vector<Piece> pieces;
  std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> storages;
  for (int i = 0; i < 50; ++i) {
    const auto values = numbered(i);
    storages.push_back(values.storage().getWeakStorageImpl());
    pieces.push_back(offloader.put(values));
    EXPECT_LE(offloader.counts().waiting_bytes, 3 * kPiece);
  }
  offloader.settle();
  int alive = 0;
  for (const auto& one : storages) alive += one.expired() ? 0 : 1;
  EXPECT_LE(alive, 1);  // the newest: half of three pieces
}

TEST(Offloader, ReadsAheadInTheReverseOrder) {
  Offloader offloader({.bytes_in_flight = 4 * kPiece});
  std::vector<Piece> pieces = put(offloader, 30);
  offloader.settle();
  for (int i = 29; i >= 0; --i) {
    EXPECT_TRUE(torch::equal(pieces[i]->get(), numbered(i)));
    pieces.pop_back();
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // a layer's backward
  }
  const fourfold::OffloadCounts counts = offloader.counts();
  EXPECT_EQ(counts.read, 28);
  EXPECT_GE(counts.read_ahead, 20);
  expect_empty(offloader);  // all room is free again
}

TEST(Offloader, TheFileGrowsNoFurtherStepByStep) {
  Offloader offloader({.bytes_in_flight = 2 * kPiece});
  for (int step = 0; step < 4; ++step) {
    std::vector<Piece> pieces = put(offloader, 10);
    while (!pieces.empty()) {
      EXPECT_TRUE(
          torch::equal(pieces.back()->get(), numbered(static_cast<int>(pieces.size()) - 1)));
      pieces.pop_back();
    }
    EXPECT_LE(offloader.counts().file_bytes, 10 * kPiece);
  }
  expect_empty(offloader);
}

TEST(Offloader, PiecesThatGoUnreadFreeTheirRoom) {
  Offloader offloader({.bytes_in_flight = 2 * kPiece});
  {
    const std::vector<Piece> pieces = put(offloader, 10);
    EXPECT_TRUE(torch::equal(pieces[9]->get(), numbered(9)));  // those before it are on their way
  }
  std::vector<Piece> pieces = put(offloader, 10);
  for (int i = 9; i >= 0; --i) EXPECT_TRUE(torch::equal(pieces[i]->get(), numbered(i)));
  pieces.clear();
  offloader.settle();
  expect_empty(offloader);
  EXPECT_EQ(offloader.counts().waiting_bytes, 0);
}

TEST(Offloader, AFullDiskLosesNothing) {
  c10::WarningHandler* const before = c10::WarningUtils::get_warning_handler();
  struct Handler final : c10::WarningHandler {
    void process(const c10::Warning& warning) override { said.push_back(warning.msg()); }
    std::vector<std::string> said;
  } handler;
  c10::WarningUtils::set_warning_handler(&handler);
  {
    Offloader offloader({.bytes_in_flight = 2 * kPiece});
    std::vector<Piece> pieces;
    {
      const FileLimit limit(5 * kPiece + kPiece / 2);  // the sixth is written in part
      pieces = put(offloader, 20);
      offloader.settle();
    }
    const fourfold::OffloadCounts counts = offloader.counts();
    EXPECT_EQ(counts.written, 5);
    EXPECT_EQ(counts.failed, 14);
    ASSERT_EQ(handler.said.size(), 1u);  // once
    EXPECT_THAT(handler.said[0], HasSubstr("File too large; saved tensors stay in memory until"));
    for (int i = 19; i >= 0; --i) EXPECT_TRUE(torch::equal(pieces[i]->get(), numbered(i))) << i;
    pieces.clear();
    pieces = put(offloader, 10);  // and there is room again
    offloader.settle();
    EXPECT_EQ(offloader.counts().written, 5 + 9);
    for (int i = 9; i >= 0; --i) EXPECT_TRUE(torch::equal(pieces[i]->get(), numbered(i))) << i;
  }
  c10::WarningUtils::set_warning_handler(before);
  ::sigset_t pending;
  ::sigpending(&pending);
  EXPECT_EQ(::sigismember(&pending, SIGXFSZ), 0);
}

TEST(Offloader, PiecesOutliveIt) {
  std::optional<Offloader> offloader(OffloadOptions{.bytes_in_flight = 4 * kPiece});
  const std::vector<Piece> pieces = put(*offloader, 20);
  EXPECT_TRUE(torch::equal(pieces[12]->get(), numbered(12)));  // some are being read ahead
  offloader.reset();
  for (int i = 0; i < 20; ++i) EXPECT_TRUE(torch::equal(pieces[i]->get(), numbered(i)));
}

TEST(Offloader, ManyThreadsTake) {
  Offloader offloader({.bytes_in_flight = 3 * kPiece});
  const std::vector<Piece> pieces = put(offloader, 30);
  std::vector<std::thread> threads;
  std::vector<int> wrong(4, 0);
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < 60; ++i) {
        const int k = (i * (t + 7) + t) % 30;
        wrong[t] += torch::equal(pieces[k]->get(), numbered(k)) ? 0 : 1;
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(4, 0));
}

TEST(Offloader, ASourceThatChangesIsCopiedBefore) {
  for (const std::int64_t room : {2, 100}) {  // on its way, or still waiting
    Offloader offloader({.bytes_in_flight = room * kPiece});
    std::vector<torch::Tensor> sources;
    std::vector<Piece> pieces;
    for (int i = 0; i < 10; ++i) {
      sources.push_back(numbered(i));
      pieces.push_back(offloader.put(sources[i], sources[i]));
      pieces[i]->before_write();
      sources[i].add_(100);
    }
    for (int i = 0; i < 10; ++i) EXPECT_TRUE(torch::equal(pieces[i]->get(), numbered(i)));
  }
}

TEST(Offloader, ASourceThatChangedUnseenIsAnError) {
  Offloader offloader({.bytes_in_flight = 4 * kPiece});
  auto source = numbered(3);
  const Piece piece = offloader.put(source, source);
  EXPECT_TRUE(torch::equal(piece->get(), source));
  source.add_(1);
  EXPECT_THAT(
      message_of([&] { static_cast<void>(piece->get()); }),
      HasSubstr("modified by an inplace operation after the forward: fourfold had yet to "
                "offload a tensor of 16384 values; it is at version 1; expected version 0"));
}

TEST(Offloader, RefusesWhatItCannotWrite) {
  EXPECT_THAT(message_of([] { const Offloader offloader({.bytes_in_flight = -1}); }),
              HasSubstr("got bytes_in_flight = -1 and min_bytes = 1048576; give 0 or more"));
  Offloader offloader;
  const auto refused = [&](const torch::Tensor& values) {
    return message_of([&] { static_cast<void>(offloader.put(values)); });
  };
  EXPECT_THAT(refused({}), HasSubstr("give tensor.cpu().contiguous()"));
  EXPECT_THAT(refused(torch::ones({3, 4}).t()), HasSubstr("wanted is a contiguous CPU tensor"));
  EXPECT_THAT(refused(torch::ones({0})), HasSubstr("of at least one value"));
}

TEST(Offloader, NothingInFlightIsWrittenAtOnce) {
  Offloader offloader({.bytes_in_flight = 0});
  const std::vector<Piece> pieces = put(offloader, 3);
  EXPECT_EQ(offloader.counts().written, 3);
  for (int i = 2; i >= 0; --i) EXPECT_TRUE(torch::equal(pieces[i]->get(), numbered(i)));
}

}  // namespace
