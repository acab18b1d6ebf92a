option(BUILD_TESTING "Configure the tests that run inside Slicer" ON)

macro(ctkMacroCompilePythonScript)
  cmake_parse_arguments(PY "NO_INSTALL_SUBDIR;GLOBAL_TARGET" "TARGET_NAME;SOURCE_DIR;DESTINATION_DIR;INSTALL_DIR" "SCRIPTS;RESOURCES" ${ARGN})
  foreach(name TARGET_NAME SCRIPTS DESTINATION_DIR INSTALL_DIR)
    if(NOT PY_${name})
      message(FATAL_ERROR "ctkMacroCompilePythonScript: ${name} is not given")
    endif()
  endforeach()
  add_custom_target(${PY_TARGET_NAME} ALL)
  foreach(file ${PY_SCRIPTS} ${PY_RESOURCES})
    if(NOT EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/${file}")
      message(FATAL_ERROR "${PY_TARGET_NAME}: missing file ${file}")
    endif()
    get_filename_component(folder "${file}" DIRECTORY)
    file(COPY "${CMAKE_CURRENT_SOURCE_DIR}/${file}" DESTINATION "${PY_DESTINATION_DIR}/${folder}")
    install(FILES "${CMAKE_CURRENT_SOURCE_DIR}/${file}" DESTINATION "${PY_INSTALL_DIR}/${folder}")
  endforeach()
endmacro()

macro(slicerMacroBuildScriptedModule)
  cmake_parse_arguments(MODULE "WITH_GENERIC_TESTS;WITH_SUBDIR;VERBOSE" "NAME" "SCRIPTS;RESOURCES" ${ARGN})
  if(MODULE_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "slicerMacroBuildScriptedModule: unknown arguments ${MODULE_UNPARSED_ARGUMENTS}")
  endif()
  if(NOT MODULE_NAME OR NOT MODULE_SCRIPTS OR NOT MODULE_RESOURCES OR NOT MODULE_WITH_GENERIC_TESTS)
    message(FATAL_ERROR "slicerMacroBuildScriptedModule: NAME, SCRIPTS, RESOURCES and WITH_GENERIC_TESTS are needed")
  endif()
  file(GLOB_RECURSE present RELATIVE "${CMAKE_CURRENT_SOURCE_DIR}" "*.py" "Resources/*")
  list(FILTER present EXCLUDE REGEX "^Testing/|__pycache__|\\.gitkeep$")
  foreach(file ${present})
    if(NOT file IN_LIST MODULE_SCRIPTS AND NOT file IN_LIST MODULE_RESOURCES)
      message(FATAL_ERROR "${MODULE_NAME}: unlisted file ${file}")
    endif()
  endforeach()
  set_property(GLOBAL APPEND PROPERTY EXTENSION_MODULES ${MODULE_NAME})
  ctkMacroCompilePythonScript(
    TARGET_NAME ${MODULE_NAME}
    SCRIPTS ${MODULE_SCRIPTS}
    RESOURCES ${MODULE_RESOURCES}
    DESTINATION_DIR ${CMAKE_BINARY_DIR}/${Slicer_QTSCRIPTEDMODULES_LIB_DIR}
    INSTALL_DIR ${Slicer_INSTALL_QTSCRIPTEDMODULES_LIB_DIR}
    NO_INSTALL_SUBDIR
    )
endmacro()

function(_check_test_script kind)
  cmake_parse_arguments(TEST "" "SCRIPT;TESTNAME_PREFIX" "SLICER_ARGS;SCRIPT_ARGS" ${ARGN})
  if(NOT TEST_SCRIPT OR NOT EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/${TEST_SCRIPT}")
    message(FATAL_ERROR "${kind}: missing file ${TEST_SCRIPT}")
  endif()
  set_property(GLOBAL APPEND PROPERTY EXTENSION_TESTS ${TEST_SCRIPT})
endfunction()

macro(slicer_add_python_unittest)
  _check_test_script(slicer_add_python_unittest ${ARGN})
endmacro()

macro(slicer_add_python_test)
  _check_test_script(slicer_add_python_test ${ARGN})
endmacro()
