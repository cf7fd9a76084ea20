# SPDX-License-Identifier: Apache-2.0
# cmake -P find_torch.cmake: prints the folder of the LibTorch that a configuration would take, or
# nothing; ends with an error where its version does not fit. For cmake/setup.sh.
cmake_minimum_required(VERSION 3.25)
set(FOURFOLD_TORCH_FUNCTIONS_ONLY ON)
include("${CMAKE_CURRENT_LIST_DIR}/Torch.cmake")
fourfold_find_torch(root where)
if(root)
  fourfold_torch_version("${root}" version)
  fourfold_check_torch_version("${version}" "${where}")
  execute_process(COMMAND "${CMAKE_COMMAND}" -E echo "${root}")
endif()
