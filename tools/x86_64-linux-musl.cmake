# CMake's toolchain file for musl on x86-64. Debian has musl, but no C++ library for it; what its
# compiler and static libstdc++ for glibc call here, musl has as well, with the same types
# (native/static_runtime.cpp has the rest). So the same objects are linked with musl in the end.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR x86_64)
set(CMAKE_CXX_COMPILER x86_64-linux-gnu-g++)
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
add_compile_definitions(SDPA_FOR_MUSL)
add_link_options(-nodefaultlibs -L/usr/lib/x86_64-linux-musl)
set(CMAKE_CXX_STANDARD_LIBRARIES "-Wl,-Bstatic -lstdc++ -lgcc -lgcc_eh -Wl,-Bdynamic -l:libc.so")
