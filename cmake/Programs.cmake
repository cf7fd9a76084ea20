# SPDX-License-Identifier: Apache-2.0
# How fourfold's own programs (tests, benches, examples) are compiled. Nothing of this reaches a user.

if(PROJECT_IS_TOP_LEVEL)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 12)
    message(FATAL_ERROR "fourfold needs g++ 12 or later, ${CMAKE_CXX_COMPILER} is "
      "${CMAKE_CXX_COMPILER_VERSION}. Name another one by CXX=... in an empty build folder.")
  elseif(CMAKE_CXX_COMPILER_ID STREQUAL "Clang" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 16)
    message(FATAL_ERROR "fourfold needs clang 16 or later, ${CMAKE_CXX_COMPILER} is "
      "${CMAKE_CXX_COMPILER_VERSION}. Name another one by CXX=... in an empty build folder.")
  endif()

  find_program(FOURFOLD_CCACHE ccache)
  mark_as_advanced(FOURFOLD_CCACHE)
  if(FOURFOLD_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
    # Without the sloppiness ccache takes nothing that uses a precompiled header; with the base
    # directory a second clone finds what the first has compiled.
    set(CMAKE_CXX_COMPILER_LAUNCHER "${CMAKE_COMMAND}" -E env
        CCACHE_SLOPPINESS=pch_defines,time_macros "CCACHE_BASEDIR=${PROJECT_SOURCE_DIR}"
        CCACHE_NOHASHDIR=1 "${FOURFOLD_CCACHE}")
    set(CMAKE_CUDA_COMPILER_LAUNCHER "${FOURFOLD_CCACHE}")
  endif()
endif()

# Warnings and sanitizers, for everything of ours; `fourfold_program` adds the library itself.
add_library(fourfold_strict INTERFACE)
target_compile_options(fourfold_strict INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Werror;-Wno-unknown-pragmas>)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # g++ 12 finds fault with its own avx512fintrin.h and basic_string.h (its bugs 105593, 105329).
  target_compile_options(fourfold_strict INTERFACE 
    $<$<COMPILE_LANGUAGE:CXX>:-Wno-uninitialized;-Wno-maybe-uninitialized;-Wno-array-bounds>
    $<$<COMPILE_LANGUAGE:CXX>:-Wno-stringop-overflow;-Wno-stringop-overread;-Wno-restrict>)
endif()
target_include_directories(fourfold_strict INTERFACE "${PROJECT_SOURCE_DIR}")
target_compile_features(fourfold_strict INTERFACE cxx_std_20)
if(FOURFOLD_SANITIZE)
  target_compile_options(fourfold_strict INTERFACE
    -fsanitize=${FOURFOLD_SANITIZE} -fno-sanitize-recover=all)
  target_link_options(fourfold_strict INTERFACE -fsanitize=${FOURFOLD_SANITIZE})
endif()

add_library(fourfold_program INTERFACE)
target_link_libraries(fourfold_program INTERFACE
  fourfold_strict fourfold $<TARGET_NAME_IF_EXISTS:fourfold::cuda>)
if(FOURFOLD_TORCH_CUDA)
  target_link_libraries(fourfold_program INTERFACE fourfold::libtorch_cuda)
endif()

# Text to train on that is always there: the headers of the LibTorch in use.
if(FOURFOLD_TORCH_FOUND_ROOT)
  set(FOURFOLD_CORPUS "${FOURFOLD_TORCH_FOUND_ROOT}/include")
elseif(TARGET torch)
  get_target_property(FOURFOLD_CORPUS torch INTERFACE_INCLUDE_DIRECTORIES)
  list(GET FOURFOLD_CORPUS 0 FOURFOLD_CORPUS)
endif()
