// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <c10/util/Exception.h>

#include <string>

/// What fn() throws, in its own words; "no error" where it throws nothing.
template <class Error = c10::Error, class Fn>
std::string message_of(Fn&& fn) {
  try {
    fn();
  } catch (const Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}
