# SPDX-License-Identifier: Apache-2.0
# cmake -DSOURCE=<repository> -DWORK=<folder> -P torch_choice.cmake: which LibTorch is taken, told by
# empty stand-ins that have a version and nothing else.
cmake_minimum_required(VERSION 3.25)

function(stand_in folder version)
  string(REGEX MATCH "([0-9]+)\\.([0-9]+)\\.([0-9]+)" _ "${version}")
  file(WRITE "${WORK}/${folder}/include/torch/headeronly/version.h"
    "#define TORCH_VERSION_MAJOR ${CMAKE_MATCH_1}\n#define TORCH_VERSION_MINOR ${CMAKE_MATCH_2}\n"
    "#define TORCH_VERSION_PATCH ${CMAKE_MATCH_3}\n")
endfunction()

# expect(<text> <environment and options of cmake>...): stdout and stderr together must hold the text.
function(expect text)
  execute_process(COMMAND "${CMAKE_COMMAND}" -E env --unset=CMAKE_PREFIX_PATH --unset=Torch_DIR
                          "PYTHONPATH=${WORK}/python" ${ARGN} -P "${SOURCE}/cmake/find_torch.cmake"
                  OUTPUT_VARIABLE says ERROR_VARIABLE says)
  string(REGEX REPLACE "[ \n]+" " " words "${says}")
  string(FIND "${words}" "${text}" at)
  if(at EQUAL -1)
    message(FATAL_ERROR "with ${ARGN}: wanted\n  ${text}\ngot\n  ${says}")
  endif()
endfunction()

foreach(version 2.10.1 2.11.0 2.15.3 2.16.0)
  stand_in(torch-${version} ${version})
endforeach()
stand_in(python/torch 2.12.0)
file(WRITE "${WORK}/python/torch/__init__.py" "")
set(cmake "${CMAKE_COMMAND}")

expect("${WORK}/python/torch" "${cmake}")
expect("${WORK}/torch-2.11.0" "${cmake}" "-DCMAKE_PREFIX_PATH=${WORK}/torch-2.11.0")
expect("${WORK}/torch-2.15.3" "${cmake}" "-DCMAKE_PREFIX_PATH=${WORK}/torch-2.15.3/share/cmake")
expect("${WORK}/torch-2.11.0" "CMAKE_PREFIX_PATH=/nowhere:${WORK}/torch-2.11.0" "${cmake}")
expect("${WORK}/torch-2.11.0" "${cmake}" "-DTorch_DIR=${WORK}/torch-2.11.0/share/cmake/Torch"
       "-DCMAKE_PREFIX_PATH=${WORK}/torch-2.15.3")
expect("from 2.11 to 2.15, but the one in ${WORK}/torch-2.10.1, which CMAKE_PREFIX_PATH names, is 2.10.1."
       "${cmake}" "-DCMAKE_PREFIX_PATH=${WORK}/torch-2.10.1")
expect("from 2.11 to 2.15, but the one in ${WORK}/torch-2.16.0, which Torch_DIR names, is 2.16.0."
       "Torch_DIR=${WORK}/torch-2.16.0/share/cmake/Torch" "${cmake}")
expect("FOURFOLD_TORCH_ROOT names ${WORK}/nothing, where there is no LibTorch"
       "${cmake}" "-DFOURFOLD_TORCH_ROOT=${WORK}/nothing")
