// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <c10/util/Exception.h>

#include <string>

/// What fn() throws, in its own words and without LibTorch's stack trace; "no error" where it throws
/// nothing.
template <class Error = c10::Error, class Fn>
std::string message_of(Fn&& fn) {
  try {
    fn();
  } catch (const Error& error) {
    if constexpr (requires { error.what_without_backtrace(); })
      return error.what_without_backtrace();
    else
      return error.what();
  }
  return "no error";
}
