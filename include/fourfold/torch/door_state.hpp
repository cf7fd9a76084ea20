// SPDX-License-Identifier: Apache-2.0
#pragma once
/// How a door keeps the state that a process has once, however many translation units and shared
/// libraries include it.
///
///   struct [[gnu::visibility("default")]] MyState {  // not in a versioned namespace
///     static constexpr std::uint32_t kAbi = 1;       // changes with the layout or its meaning
///     static constexpr const char* kName = "my door";
///     ...
///   };
///   MyState& state = door_state<MyState>();   // made by whoever asks first; never destroyed
///
/// The slot is a static of a function with default visibility, so that libraries built with
/// -fvisibility=hidden share it; its own layout never changes. Libraries that the loader keeps
/// apart (RTLD_LOCAL, built by a compiler without unique symbols) get one each: a door then finds
/// its registration taken, and must say so.
#include <c10/util/Exception.h>

#include <concepts>
#include <cstdint>
#include <mutex>

namespace fourfold::door {

template <class State>
concept DoorState = std::default_initializable<State> && requires {
  { State::kAbi } -> std::convertible_to<std::uint32_t>;
  { State::kName } -> std::convertible_to<const char*>;
};

/// Frozen: libraries built with different versions of fourfold meet here.
struct [[gnu::visibility("default")]] DoorSlot {
  std::mutex mutex;
  std::uint32_t abi = 0;
  void* state = nullptr;
};

/// A member of a visible class, since a template function's own statics go by -fvisibility=hidden
/// whatever its attribute says. Its destructor does nothing: graphs outlive static destruction.
template <class State>
struct [[gnu::visibility("default")]] DoorSlotOf {
  static constinit inline DoorSlot slot{};
};
template <class State>
DoorSlot& door_slot() {
  return DoorSlotOf<State>::slot;
}

/// The process's State. Throws where another part of the program made one of another ABI. The ABI
/// is a template argument so that parts of two versions do not share this very check.
template <DoorState State, std::uint32_t Abi = State::kAbi>
State& state_in(DoorSlot& slot) {
  const std::lock_guard lock(slot.mutex);
  if (slot.state == nullptr) {
    slot.state = new State;
    slot.abi = Abi;
  }
  TORCH_CHECK(slot.abi == Abi, "fourfold: the ", State::kName,
              " door of this process was opened by a part of the program with ABI ", slot.abi,
              ", and this part was built with ABI ", Abi,
              "; build all parts with one version of fourfold");
  return *static_cast<State*>(slot.state);
}

template <DoorState State, std::uint32_t Abi = State::kAbi>
State& door_state() {
  static State& state = state_in<State, Abi>(door_slot<State>());
  return state;
}

}  // namespace fourfold::door
