// SPDX-License-Identifier: MIT
// Products as a model makes them, through ggml's allocator and every kind of buffer that the CPU back end has for weights.
//
//   test-splitq                        each type's products against the reference path: what a build must pass to be used
//   test-splitq errors [FOLDER]        the same, and prints the largest error of each type as a share of its products' square;
//                                      FOLDER: where the libraries are of a build that loads its CPU back end when it runs
//   test-splitq fused RUNS [REPACK]    gate, up and SwiGLU in one pass, as often as told, with 1 to 8 threads: always the
//                                      bits that one thread gives; REPACK 0: weights as they are in a file
//
// Prints a line for each failure and exits with 1, with 0 when there is none.
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

static std::mt19937 rng(1);

static std::vector<float> normal(size_t n) {
    std::normal_distribution<float> value(0, 1);
    std::vector<float> x(n);
    for (float & v : x) { v = value(rng); }
    return x;
}

static void append(std::vector<char> & data, const void * x, size_t n, size_t alignment) {
    data.insert(data.end(), (const char *) x, (const char *) x + n);
    data.resize((data.size() + alignment - 1)/alignment*alignment);
}

// The side tensor of a matrix whose columns all have the same scale and, if any, codebook; bytes as in docs/format.md.
static std::vector<char> side_tensor(ggml_type type, uint32_t rows, uint32_t columns) {
    const size_t bits = type == GGML_TYPE_SPLITQ_CQ4 ? 4 : type == GGML_TYPE_SPLITQ_CQ3 ? 3 : type == GGML_TYPE_SPLITQ_CQ2 ? 2 : 0;
    const bool open = type == GGML_TYPE_SPLITQ_SQ3WO || type == GGML_TYPE_SPLITQ_SQ2WO;
    const uint32_t header[8] = { 0x51414c43, rows, columns, 0, 0, open ? 70u : 0u, open ? 1u : 0u };
    const std::vector<ggml_fp16_t> row(rows, ggml_fp32_to_fp16(0.5f)), scale(columns, ggml_fp32_to_fp16(0.01f));
    std::vector<char> data;
    append(data, header, sizeof(header), 1);
    if (bits) { append(data, row.data(), 2*rows, 32); }
    append(data, scale.data(), 2*columns, 32);
    if (bits) {
        std::vector<int8_t> levels(columns << bits);
        for (size_t i = 0; i < levels.size(); ++i) { levels[i] = (int8_t) (i % (1 << bits)*240/((1 << bits) - 1) - 120); }
        append(data, levels.data(), levels.size(), 32);
    }
    const char * wrong = ggml_splitq_check_columns(type, columns, rows, data.data(), data.size());
    if (wrong) {
        fprintf(stderr, "side tensor: %s\n", wrong);
        exit(1);
    }
    return data;
}

// Random rows as they are stored.
static std::vector<char> stored(ggml_type type, int64_t rows, int64_t columns) {
    std::vector<char> data(rows*ggml_row_size(type, columns));
    if (ggml_splitq_has_columns(type)) { // no encoder in C
        for (size_t i = 0; i < data.size(); ++i) { data[i] = (char) rng(); }
        const size_t block = ggml_type_size(type);
        for (size_t i = block - 1; block % 4 && i < data.size(); i += block) { data[i] = 100; } // scales, else very unlike
        return data;
    }
    // Encoding takes long where the processor is emulated. Of a prime number of rows, no two that are alike are in one panel.
    const int64_t different = std::min<int64_t>(rows, 61);
    const std::vector<float> x = normal(different*columns), importance(columns, 1.0f);
    const size_t size = ggml_quantize_chunk(type, x.data(), data.data(), 0, different, columns, importance.data());
    for (size_t i = size; i < data.size(); ++i) { data[i] = data[i - size]; }
    return data;
}

struct matrix {
    std::vector<char> data, side;
    matrix(ggml_type type, int64_t rows, int64_t columns) : data(stored(type, rows, columns)) {
        if (ggml_splitq_has_columns(type)) { side = side_tensor(type, rows, columns); }
    }
};

// The CPU back end and, by their names, those of its functions that are its own: it may be loaded when the program runs.
static ggml_backend_dev_t cpu() { return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU); }

template <typename F> static F of_cpu(const char * name) {
    return (F) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu()), name);
}

static std::vector<ggml_backend_buffer_type_t> buffer_types() {
    std::vector<ggml_backend_buffer_type_t> all = { ggml_backend_cpu_buffer_type() };
    auto extra = of_cpu<ggml_backend_dev_get_extra_bufts_t>("ggml_backend_dev_get_extra_bufts");
    for (auto buft = extra ? extra(cpu()) : nullptr; buft && *buft; ++buft) { all.push_back(*buft); }
    return all;
}

// A graph of matrices, all of one type and in one kind of buffer, and the memory it needs.
struct model {
    ggml_backend_t backend = ggml_backend_dev_init(cpu(), nullptr);
    ggml_context * weights = ggml_init({ 64*ggml_tensor_overhead(), nullptr, true });
    ggml_context * sides   = ggml_init({ 64*ggml_tensor_overhead(), nullptr, true });
    ggml_context * rest    = ggml_init({ 64*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true });
    ggml_gallocr_t memory  = ggml_gallocr_new(ggml_backend_cpu_buffer_type());
    ggml_backend_buffer_t in_weights = nullptr, in_sides = nullptr;
    std::vector<ggml_tensor *> w;
    ggml_tensor * input = nullptr, * output = nullptr;

    model(ggml_backend_buffer_type_t buft, ggml_type type, const std::vector<const matrix *> & matrices, const std::vector<int64_t> & rows, const std::vector<int64_t> & columns) {
        for (size_t i = 0; i < matrices.size(); ++i) {
            w.push_back(ggml_new_tensor_2d(weights, type, columns[i], rows[i]));
            if (!matrices[i]->side.empty()) { w[i]->src[0] = ggml_new_tensor_1d(sides, GGML_TYPE_I8, matrices[i]->side.size()); }
        }
        in_weights = ggml_backend_alloc_ctx_tensors_from_buft(weights, buft);
        in_sides   = ggml_backend_alloc_ctx_tensors_from_buft(sides, ggml_backend_cpu_buffer_type());
    }

    ~model() {
        ggml_gallocr_free(memory);
        ggml_backend_buffer_free(in_weights);
        ggml_backend_buffer_free(in_sides);
        for (ggml_context * c : { weights, sides, rest }) { ggml_free(c); }
        ggml_backend_free(backend);
    }

    // whether this kind of buffer is for these products, as llama.cpp asks
    bool takes(const ggml_tensor * op) const { return ggml_backend_dev_supports_op(ggml_backend_get_device(backend), op); }

    void fill(const std::vector<const matrix *> & matrices) {
        for (size_t i = 0; i < w.size(); ++i) {
            ggml_backend_tensor_set(w[i], matrices[i]->data.data(), 0, matrices[i]->data.size());
            if (w[i]->src[0]) { ggml_backend_tensor_set(w[i]->src[0], matrices[i]->side.data(), 0, matrices[i]->side.size()); }
        }
    }

    ggml_cgraph * graph() {
        ggml_cgraph * g = ggml_new_graph(rest);
        ggml_set_input(input);
        ggml_set_output(output);
        ggml_build_forward_expand(g, output);
        if (!ggml_gallocr_alloc_graph(memory, g)) { exit(1); }
        return g;
    }

    std::vector<float> run(ggml_cgraph * g, const std::vector<float> & x, int threads) {
        of_cpu<ggml_backend_set_n_threads_t>("ggml_backend_set_n_threads")(backend, threads);
        ggml_backend_tensor_set(input, x.data(), 0, x.size()*sizeof(float));
        ggml_backend_graph_compute(backend, g);
        std::vector<float> y(ggml_nelements(output));
        ggml_backend_tensor_get(output, y.data(), 0, y.size()*sizeof(float));
        return y;
    }
};

static std::vector<float> product(const matrix & m, ggml_type type, int64_t rows, int64_t columns, int64_t tokens,
        const std::vector<float> & x, ggml_backend_buffer_type_t buft, bool reference) {
    model net(buft, type, { &m }, { rows }, { columns });
    if (net.in_weights == nullptr) { return {}; }
    net.input  = ggml_new_tensor_2d(net.rest, GGML_TYPE_F32, columns, tokens);
    net.output = ggml_mul_mat(net.rest, net.w[0], net.input);
    if (!net.takes(net.output)) { return {}; }
    net.fill({ &m });
    of_cpu<void (*)(ggml_backend_t, bool)>("ggml_backend_cpu_set_use_ref")(net.backend, reference);
    return net.run(net.graph(), x, 2);
}

static int products(bool say) {
    const ggml_type types[] = {
        GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_K, GGML_SPLITQ_TYPES(GGML_SPLITQ_ITEM)
    };
    const int64_t rows = 128, columns = 512;
    int failures = 0;
    for (ggml_type type : types) {
        const matrix m(type, rows, columns);
        double largest = 0;
        for (int64_t tokens : { 1, 5, 33, 70 }) { // 33, 70: by tiles, where the processor has them
            const std::vector<float> x = normal(tokens*columns);
            const std::vector<float> wanted = product(m, type, rows, columns, tokens, x, ggml_backend_cpu_buffer_type(), true);
            for (ggml_backend_buffer_type_t buft : buffer_types()) {
                const std::vector<float> found = product(m, type, rows, columns, tokens, x, buft, false);
                double error = 0, all = 0;
                for (size_t i = 0; i < found.size(); ++i) {
                    error += ((double) found[i] - wanted[i])*((double) found[i] - wanted[i]);
                    all   += (double) wanted[i]*wanted[i];
                }
                if (!found.empty()) { largest = std::max(largest, error/all); }
                if (!found.empty() && !(error < 5e-4*all)) { // the limit of test-backend-ops
                    printf("%s times %d tokens in %s: error %g of the result\n", ggml_type_name(type), (int) tokens,
                        ggml_backend_buft_name(buft), error/all);
                    ++failures;
                }
            }
        }
        if (say) { printf("%s %.2g\n", ggml_type_name(type), largest); }
    }
    return failures;
}

// A feed-forward network of one token, its activations made and used as in a model, so that memory is assigned as there.
static int fused(int runs, bool repack) {
    const ggml_type types[] = {
        GGML_TYPE_SPLITQ_SQ4, GGML_TYPE_SPLITQ_SQ3, GGML_TYPE_SPLITQ_SQ2, GGML_TYPE_SPLITQ_SDR4, GGML_TYPE_SPLITQ_CQ4,
        GGML_TYPE_SPLITQ_CQ3, GGML_TYPE_SPLITQ_CQ2, GGML_TYPE_SPLITQ_SQ3C, GGML_TYPE_SPLITQ_SQ2C,
        GGML_TYPE_SPLITQ_SQ6W, GGML_TYPE_SPLITQ_SQ5W, GGML_TYPE_SPLITQ_SQ4W, GGML_TYPE_SPLITQ_SQ3W, GGML_TYPE_SPLITQ_SQ2W, GGML_TYPE_SPLITQ_SQ2WC,
        GGML_TYPE_SPLITQ_SQ3WO, GGML_TYPE_SPLITQ_SQ2WO,
    };
    const int64_t shapes[][2] = { { 2048, 512 }, { 512, 512 }, { 1024, 96 }, { 256, 768 }, { 96, 1024 } }; // n_embd, n_ff
    int failures = 0;
    for (ggml_type type : types) {
        for (const auto & shape : shapes) {
            const int64_t n_embd = shape[0], n_ff = shape[1];
            const matrix gate(type, n_ff, n_embd), up(type, n_ff, n_embd), down(type, n_embd, n_ff);
            const std::vector<const matrix *> all = { &gate, &up, &down };
            for (ggml_backend_buffer_type_t buft : buffer_types()) {
                if (repack == (buft == ggml_backend_cpu_buffer_type())) { continue; }
                model net(buft, type, all, { n_ff, n_ff, n_embd }, { n_embd, n_embd, n_ff });
                if (net.in_weights == nullptr) { continue; }
                net.input = ggml_new_tensor_2d(net.rest, GGML_TYPE_F32, n_embd, 1);
                ggml_tensor * x = ggml_rms_norm(net.rest, net.input, 1e-5f);
                ggml_tensor * y = ggml_mul_mat(net.rest, net.w[0], x);
                if (!net.takes(y)) { continue; }
                y = ggml_swiglu_split(net.rest, y, ggml_mul_mat(net.rest, net.w[1], x));
                net.output = ggml_add(net.rest, ggml_mul_mat(net.rest, net.w[2], y), net.input);
                net.fill(all);
                ggml_cgraph * g = net.graph();
                const std::vector<float> values = normal(n_embd);
                const std::vector<float> wanted = net.run(g, values, 1);
                for (int threads = 2; threads <= 8; ++threads) {
                    int wrong = 0;
                    for (int i = 0; i < runs; ++i) {
                        const std::vector<float> found = net.run(g, values, threads);
                        wrong += memcmp(found.data(), wanted.data(), wanted.size()*sizeof(float)) != 0;
                    }
                    if (wrong) {
                        printf("%s, n_embd %d, n_ff %d, %s, %d threads: %d of %d runs wrong\n", ggml_type_name(type),
                            (int) n_embd, (int) n_ff, ggml_backend_buft_name(buft), threads, wrong, runs);
                        ++failures;
                    }
                }
            }
        }
    }
    return failures;
}

int main(int argc, char ** argv) {
    const bool say = argc > 1 && strcmp(argv[1], "errors") == 0;
    if (say && argc > 2) { ggml_backend_load_all_from_path(argv[2]); }
    if (cpu() == nullptr) {
        printf("no CPU back end for this processor\n");
        return 1;
    }
    if (argc > 2 && strcmp(argv[1], "fused") == 0) {
        return fused(atoi(argv[2]), argc < 4 || atoi(argv[3])) > 0;
    }
    return argc > 1 && !say ? 2 : products(say) > 0;
}
