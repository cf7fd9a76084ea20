# SPDX-License-Identifier: Apache-2.0
# cmake -DHOW=... -DWORK=<folder> -DSOURCE=<repository> -DLIBTORCH=<root> -DCXX=<compiler>
#       -DLAUNCHER=<ccache and so on> -P consume.cmake
# HOW install makes the copies that the others use: WORK/prefix, installed, and WORK/source, what a
# release archive holds. The others build consumer.cpp against one of them, and run it.
cmake_minimum_required(VERSION 3.25)

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE says ERROR_VARIABLE says)
  message("${says}")
  if(NOT result EQUAL 0)
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "failed (${result}): ${command}")
  endif()
endfunction()

if(HOW STREQUAL "install")
  # --install and copying leave a file that has not changed alone, so consumers stay built.
  run("${CMAKE_COMMAND}" --install "${BUILD}" --prefix "${WORK}/prefix")
  file(COPY "${SOURCE}/CMakeLists.txt" "${SOURCE}/LICENSE" "${SOURCE}/cmake" "${SOURCE}/include"
            "${SOURCE}/kernels" DESTINATION "${WORK}/source")
  return()
endif()

set(here "${CMAKE_CURRENT_LIST_DIR}")
if(HOW STREQUAL "bare_include")
  file(MAKE_DIRECTORY "${WORK}/bare_include")
  run(${LAUNCHER} "${CXX}" -std=c++20 -c "${here}/consumer.cpp" -o "${WORK}/bare_include/consumer.o"
      -I "${WORK}/prefix/include" -isystem "${LIBTORCH}/include"
      -isystem "${LIBTORCH}/include/torch/csrc/api/include")
  run("${CXX}" "${WORK}/bare_include/consumer.o" -o "${WORK}/bare_include/consumer"
      "-L${LIBTORCH}/lib" -ltorch_cpu -lc10 "-Wl,-rpath,${LIBTORCH}/lib")
else()
  # By the environment, since semicolons would fall apart on the way through run().
  set(ENV{CMAKE_CXX_COMPILER_LAUNCHER} "${LAUNCHER}")
  set(ENV{CMAKE_PREFIX_PATH} "${LIBTORCH}")
  set(options -DFOURFOLD_CUDA=OFF "-DFOURFOLD_SOURCE=${WORK}/source")
  if(HOW STREQUAL "find_package")
    set(ENV{CMAKE_PREFIX_PATH} "${WORK}/prefix:${LIBTORCH}")
    set(options "")
  elseif(HOW STREQUAL "fetch_content")
    set(ENV{CMAKE_PREFIX_PATH} "")
    set(options "-DFETCHCONTENT_SOURCE_DIR_FOURFOLD=${WORK}/source" "-DLIBTORCH=${LIBTORCH}"
                -DFOURFOLD_CUDA=OFF)
  endif()
  run("${CMAKE_COMMAND}" -S "${here}/${HOW}" -B "${WORK}/${HOW}" -G Ninja -DCMAKE_BUILD_TYPE=Release
      "-DCMAKE_CXX_COMPILER=${CXX}" ${options})
  run("${CMAKE_COMMAND}" --build "${WORK}/${HOW}")
endif()
run("${WORK}/${HOW}/consumer")
