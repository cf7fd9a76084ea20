// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A forward whose saved tensors are a store's.
#include <fourfold/activations/store.hpp>

#include <memory>

template <class Fn>
auto within(const std::shared_ptr<fourfold::ActivationStore>& store, Fn&& fn) {
  const fourfold::door::SavedTensorsScope scope(store);
  const std::shared_ptr<void> active = store->activate();
  return fn();
}
