#include "kernels.h"

#include "../error.h"
#include "ops.h"

namespace pliant {

namespace {

Kernels make_plain() {
    Kernels kernels{};
    plain::fill_ops(kernels);
    kernels.name = "plain";
    kernels.coded_product = plain::coded_product;
    kernels.coded_row = plain::coded_row;
    return kernels;
}

#if defined(__x86_64__)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}
#endif

}  // namespace

const Kernels& plain_kernels() {
    static const Kernels kernels = make_plain();
    return kernels;
}

const Kernels* avx2_kernels() {
#if defined(__x86_64__)
    static const Kernels kernels = [] {
        Kernels k = make_plain();
        avx2::fill_ops(k);
        k.name = "avx2";
        k.coded_product = avx2::coded_product;
        return k;
    }();
    return has_avx2() ? &kernels : nullptr;
#else
    return nullptr;
#endif
}

const Kernels* avx512_kernels() {
#if defined(__x86_64__)
    static const Kernels kernels = [] {
        Kernels k = make_plain();
        avx512::fill_ops(k);
        k.name = "avx512";
        k.coded_product = avx512::coded_product;
        return k;
    }();
    return has_avx512() ? &kernels : nullptr;
#else
    return nullptr;
#endif
}

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const Kernels* kernels : {avx512_kernels(), avx2_kernels(), &plain_kernels()})
        if (kernels != nullptr) names.emplace_back(kernels->name);
    return names;
}

const Kernels& select_kernels(const std::string& name) {
    for (const Kernels* kernels : {avx512_kernels(), avx2_kernels(), &plain_kernels()})
        if (kernels != nullptr && (name == "auto" || name == kernels->name)) return *kernels;
    std::string known;
    for (const std::string& isa : usable_isas()) known += (known.empty() ? "" : ", ") + isa;
    throw UsageError("no kernels for the instruction set '" + name +
                     "' on this machine; it has: " + known);
}

}  // namespace pliant
