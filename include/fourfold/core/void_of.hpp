// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A template that is written for void alone is compiled once it is named. By this name, within
/// another template, it is compiled once that one is: not for whoever includes the two.
///   BasicStore<typename VoidOf<Policies...>::Type> store;
namespace fourfold::inline v0 {

/// std::void_t, which GCC knows to be void too early.
template <class...>
struct VoidOf {
  using Type = void;
};

}  // namespace fourfold::inline v0
