# SPDX-License-Identifier: Apache-2.0
# fourfold::libtorch: the consumer's own target `torch` if there is one, else imported targets of ours
# made from a LibTorch folder. find_package(Torch) is never called here: on a machine without a CUDA
# toolkit it fails on a CUDA build of LibTorch, though libtorch_cpu.so itself needs no toolkit.
#
# Where a LibTorch is looked for, the first one wins:
#   FOURFOLD_TORCH_ROOT   a folder with include/ and lib/
#   Torch_DIR             as find_package(Torch) knows it: <root>/share/cmake/Torch
#   CMAKE_PREFIX_PATH     <root>, or <root>/share/cmake (torch.utils.cmake_prefix_path)
#   python                the package torch that `python3` would import
#   build/torch-2.11.0/   where cmake/setup.sh unpacks the pinned wheel, in fourfold's own tree alone
include_guard(GLOBAL)

set(FOURFOLD_TORCH_MIN 2.11.0)
set(FOURFOLD_TORCH_BELOW 2.16)

# The version of the LibTorch in `root`, empty if there is none.
function(fourfold_torch_version root out)
  set(${out} "" PARENT_SCOPE)
  foreach(header include/torch/headeronly/version.h include/torch/csrc/api/include/torch/version.h)
    if(EXISTS "${root}/${header}")
      file(STRINGS "${root}/${header}" lines REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
      if(lines MATCHES "MAJOR ([0-9]+).*MINOR ([0-9]+).*PATCH ([0-9]+)")
        set(${out} "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}.${CMAKE_MATCH_3}" PARENT_SCOPE)
        return()
      endif()
    endif()
  endforeach()
  if(EXISTS "${root}/build-version")  # in the archives of LibTorch
    file(STRINGS "${root}/build-version" line LIMIT_COUNT 1)
    string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" version "${line}")
    set(${out} "${version}" PARENT_SCOPE)
  endif()
endfunction()

function(fourfold_check_torch_version version where)
  if(version VERSION_LESS FOURFOLD_TORCH_MIN OR version VERSION_GREATER_EQUAL FOURFOLD_TORCH_BELOW)
    message(FATAL_ERROR
      "fourfold needs a LibTorch from 2.11 to 2.15, but ${where} is ${version}. Let CMAKE_PREFIX_PATH or "
      "Torch_DIR name another one, or set FOURFOLD_TORCH_VERSION=2.11.0 in the environment of "
      "cmake/test.sh or cmake/demo.sh, which then takes the pinned wheel.")
  endif()
endfunction()

# The folder of the first LibTorch found, and in words where it came from; both empty if there is none.
function(fourfold_find_torch out_root out_where)
  set(candidates "")
  if(FOURFOLD_TORCH_ROOT)
    list(APPEND candidates "${FOURFOLD_TORCH_ROOT}|FOURFOLD_TORCH_ROOT")
  endif()
  if(Torch_DIR)
    list(APPEND candidates "${Torch_DIR}/../../..|Torch_DIR" "${Torch_DIR}|Torch_DIR")
  endif()
  if(DEFINED ENV{Torch_DIR})
    list(APPEND candidates "$ENV{Torch_DIR}/../../..|Torch_DIR" "$ENV{Torch_DIR}|Torch_DIR")
  endif()
  string(REPLACE ":" ";" from_environment "$ENV{CMAKE_PREFIX_PATH}")
  foreach(prefix IN LISTS CMAKE_PREFIX_PATH from_environment)
    list(APPEND candidates "${prefix}|CMAKE_PREFIX_PATH" "${prefix}/../..|CMAKE_PREFIX_PATH")
  endforeach()
  foreach(candidate IN LISTS candidates)
    string(REPLACE "|" ";" candidate "${candidate}")
    list(GET candidate 0 root)
    list(GET candidate 1 where)
    get_filename_component(root "${root}" ABSOLUTE)
    fourfold_torch_version("${root}" version)
    if(version)
      set(${out_root} "${root}" PARENT_SCOPE)
      set(${out_where} "the one in ${root}, which ${where} names," PARENT_SCOPE)
      return()
    endif()
    if(where STREQUAL "FOURFOLD_TORCH_ROOT")
      message(FATAL_ERROR "fourfold: FOURFOLD_TORCH_ROOT names ${root}, where there is no LibTorch "
        "(include/torch/headeronly/version.h is missing).")
    endif()
  endforeach()

  find_program(FOURFOLD_PYTHON NAMES python3 python)
  mark_as_advanced(FOURFOLD_PYTHON)
  if(FOURFOLD_PYTHON)
    execute_process(
      COMMAND "${FOURFOLD_PYTHON}" -c
        "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
      OUTPUT_VARIABLE origin OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    get_filename_component(root "${origin}" DIRECTORY)
    fourfold_torch_version("${root}" version)
    if(version)
      set(${out_root} "${root}" PARENT_SCOPE)
      set(${out_where} "the one in ${root}, which ${FOURFOLD_PYTHON} imports," PARENT_SCOPE)
      return()
    endif()
  endif()

  # In an installed copy this file lies elsewhere, and no such folder is found.
  get_filename_component(root "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../build/torch-2.11.0/torch" ABSOLUTE)
  fourfold_torch_version("${root}" version)
  if(version)
    set(${out_root} "${root}" PARENT_SCOPE)
    set(${out_where} "the one in ${root}" PARENT_SCOPE)
  endif()
endfunction()

function(fourfold_import_torch root)
  foreach(library c10 torch_cpu)
    if(NOT EXISTS "${root}/lib/lib${library}.so")
      message(FATAL_ERROR "fourfold: the LibTorch in ${root} has no lib/lib${library}.so.")
    endif()
    add_library(fourfold::${library} SHARED IMPORTED GLOBAL)
    set_target_properties(fourfold::${library} PROPERTIES
      IMPORTED_LOCATION "${root}/lib/lib${library}.so"
      INTERFACE_INCLUDE_DIRECTORIES "${root}/include;${root}/include/torch/csrc/api/include")
  endforeach()
  set_property(TARGET fourfold::torch_cpu PROPERTY INTERFACE_LINK_LIBRARIES fourfold::c10)
  add_library(fourfold::libtorch INTERFACE IMPORTED GLOBAL)
  set_property(TARGET fourfold::libtorch PROPERTY INTERFACE_LINK_LIBRARIES fourfold::torch_cpu)

  # A program links this one to run LibTorch's own CUDA operators. It registers them when it is loaded
  # and is named by no symbol, so the linker must be kept from dropping it.
  if(EXISTS "${root}/lib/libtorch_cuda.so" AND NOT TARGET fourfold::libtorch_cuda)
    add_library(fourfold::libtorch_cuda INTERFACE IMPORTED GLOBAL)
    set_target_properties(fourfold::libtorch_cuda PROPERTIES
      INTERFACE_LINK_LIBRARIES "fourfold::libtorch;${root}/lib/libc10_cuda.so"
      INTERFACE_LINK_OPTIONS "LINKER:--no-as-needed,${root}/lib/libtorch_cuda.so,--as-needed")
  endif()
endfunction()

if(NOT FOURFOLD_TORCH_FUNCTIONS_ONLY AND NOT TARGET fourfold::libtorch)
  if(TARGET torch)
    set(_fourfold_version "${Torch_VERSION}")
    if(NOT _fourfold_version)
      get_target_property(_fourfold_dirs torch INTERFACE_INCLUDE_DIRECTORIES)
      foreach(_fourfold_dir IN LISTS _fourfold_dirs)
        if(NOT _fourfold_version)
          fourfold_torch_version("${_fourfold_dir}/.." _fourfold_version)
        endif()
      endforeach()
    endif()
    if(_fourfold_version)
      fourfold_check_torch_version("${_fourfold_version}" "the one behind your target torch")
    endif()
    set(FOURFOLD_TORCH_FOUND_VERSION "${_fourfold_version}")
    message(STATUS "fourfold: LibTorch ${_fourfold_version}, your target torch")
    add_library(fourfold::libtorch INTERFACE IMPORTED GLOBAL)
    set_property(TARGET fourfold::libtorch PROPERTY INTERFACE_LINK_LIBRARIES torch)
  else()
    fourfold_find_torch(_fourfold_root _fourfold_where)
    if(NOT _fourfold_root)
      message(FATAL_ERROR
        "fourfold found no LibTorch. It looked at the target torch, FOURFOLD_TORCH_ROOT, Torch_DIR, "
        "CMAKE_PREFIX_PATH and the torch that python3 imports. Name one from 2.11 to 2.15 by "
        "-DCMAKE_PREFIX_PATH=/path/to/libtorch; in fourfold's own tree `sh cmake/setup.sh` fetches one.")
    endif()
    fourfold_torch_version("${_fourfold_root}" _fourfold_version)
    fourfold_check_torch_version("${_fourfold_version}" "${_fourfold_where}")
    set(FOURFOLD_TORCH_FOUND_VERSION "${_fourfold_version}")
    set(FOURFOLD_TORCH_FOUND_ROOT "${_fourfold_root}")
    message(STATUS "fourfold: LibTorch ${_fourfold_version} in ${_fourfold_root}")
    fourfold_import_torch("${_fourfold_root}")
  endif()
endif()
