# SPDX-License-Identifier: Apache-2.0
# Sets FOURFOLD_HAS_CUDA, and enables the language CUDA where an nvcc is found that knows our
# architectures and takes this compiler as its host.
set(FOURFOLD_HAS_CUDA OFF)
if(NOT FOURFOLD_CUDA)
  return()
endif()

include(CheckLanguage)
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(FOURFOLD_NVCC nvcc PATHS /usr/local/cuda/bin ENV CUDA_PATH PATH_SUFFIXES bin)
  mark_as_advanced(FOURFOLD_NVCC)
  if(FOURFOLD_NVCC)
    set(ENV{CUDACXX} "${FOURFOLD_NVCC}")  # not CMAKE_CUDA_COMPILER: it would keep the check from running
  endif()
endif()
# Real code for each, and PTX of the newest for what comes after it.
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100-real 120)
endif()
check_language(CUDA)

set(reason "")
if(NOT CMAKE_CUDA_COMPILER)
  set(reason "no nvcc that works with this compiler was found")
else()
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE nvcc_says ERROR_QUIET)
  string(REGEX MATCH "release ([0-9.]+)" release "${nvcc_says}")
  if(release AND CMAKE_MATCH_1 VERSION_LESS 12.8)
    set(reason "nvcc ${CMAKE_MATCH_1} does not know architectures 100 and 120, 12.8 or later does")
  endif()
endif()
if(NOT reason)
  enable_language(CUDA)
  set(FOURFOLD_HAS_CUDA ON)
elseif(FOURFOLD_CUDA STREQUAL "AUTO")
  message(STATUS "fourfold: kernels/ are not built: ${reason}")
else()
  message(FATAL_ERROR "fourfold: FOURFOLD_CUDA is ${FOURFOLD_CUDA}, but ${reason}. Name one by "
    "-DCMAKE_CUDA_COMPILER=/path/to/nvcc, or leave FOURFOLD_CUDA at AUTO.")
endif()
