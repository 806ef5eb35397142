# SPDX-License-Identifier: MIT
# The sources of gguf-splitq; ggml/src/CMakeLists.txt includes this behind the target ggml-base.
target_sources(ggml-base PRIVATE
    ../include/ggml-splitq-types.h
    ggml-columns.c
    ggml-columns.h
    ggml-sdr.c
    ggml-sdr.h
    ggml-splitq.c
    ggml-splitq.h
    ggml-splitq-hook.h
    ggml-splitq-solve.c
    ggml-splitq-solve.h
    ggml-windows.c
    ggml-windows.h
    ggml-windows-solve.c
    ggml-windows-solve.h)

if (NOT MSVC)
    # the encoders must give the bytes of their NumPy twins: no fused multiply-add
    set_source_files_properties(ggml-splitq.c ggml-sdr.c ggml-windows.c ggml-windows-solve.c PROPERTIES COMPILE_OPTIONS -ffp-contract=off)
endif()

# for every variant of the CPU back end
set(GGML_SPLITQ_CPU_SOURCES
    ggml-cpu/columns.c
    ggml-cpu/columns.h
    ggml-cpu/columns-mul.c
    ggml-cpu/columns-mul.h
    ggml-cpu/columns-vec.h
    ggml-cpu/sdr.c
    ggml-cpu/sdr.h
    ggml-cpu/sdr-a4.c
    ggml-cpu/sdr-a4.h
    ggml-cpu/splitq.c
    ggml-cpu/splitq.h
    ggml-cpu/splitq-amx.h
    ggml-cpu/splitq-hook.cpp
    ggml-cpu/splitq-hook.h
    ggml-cpu/splitq-ints.h
    ggml-cpu/splitq-mul.c
    ggml-cpu/splitq-mul.h
    ggml-cpu/splitq-vec.h)
