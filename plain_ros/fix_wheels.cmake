# Passed to every CMake project that is built against the ROS wheels (-DCMAKE_PROJECT_INCLUDE=<this file>).
#
# The message wheels export targets whose include directories are those of the machine that built the
# wheel (its own CPython). CMake refuses an imported target with an include directory that does not exist,
# so at the end of the configure step every such directory is dropped. Nothing is lost: the generator adds
# the Python and NumPy headers of this machine itself.
function(_picopose_drop_missing_include_directories)
  get_property(imported DIRECTORY "${CMAKE_SOURCE_DIR}" PROPERTY IMPORTED_TARGETS)
  foreach(target IN LISTS imported)
    get_target_property(directories ${target} INTERFACE_INCLUDE_DIRECTORIES)
    if(NOT directories)
      continue()
    endif()
    set(existing "")
    foreach(directory IN LISTS directories)
      # A generator expression is no absolute path and stays as it is.
      if(NOT IS_ABSOLUTE "${directory}" OR EXISTS "${directory}")
        list(APPEND existing "${directory}")
      endif()
    endforeach()
    set_target_properties(${target} PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${existing}")
  endforeach()
endfunction()
cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL _picopose_drop_missing_include_directories)

# The generated sources of a message each read the same headers, which takes most of the compiler's time: one
# unit per library halves it. The two libraries that are left out define the same name in each of their files.
function(_picopose_compile_in_one)
  get_property(targets DIRECTORY "${CMAKE_SOURCE_DIR}" PROPERTY BUILDSYSTEM_TARGETS)
  foreach(target IN LISTS targets)
    if(target MATCHES "__rosidl_(generator_py|typesupport_(c|cpp|fastrtps_c|fastrtps_cpp|introspection_c))$")
      set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 0)
    endif()
  endforeach()
endfunction()
cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL _picopose_compile_in_one)
