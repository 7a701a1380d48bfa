#include "kernels.h"

#include "../error.h"
#include "ops.h"

#if defined(PLIANT_AMX) || defined(PLIANT_AVX_VNNI)
#include <cpuid.h>
#endif
#if defined(PLIANT_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pliant {

namespace {

Kernels make(const char* name, void (*fill_ops)(Kernels&),
             void (*coded_product)(const CodedProduct&), void (*page_product)(const PlyProduct&)) {
    Kernels kernels{};
    fill_ops(kernels);
    kernels.name = name;
    kernels.coded_product = coded_product;
    kernels.page_product = page_product;
    kernels.coded_row = plain::coded_row;
    return kernels;
}

#if defined(__x86_64__)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}
bool has_avx512bw() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512vnni() { return has_avx512bw() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512() { return has_avx512vnni() && __builtin_cpu_supports("avx512vbmi"); }
#endif

#if defined(PLIANT_AVX_VNNI)
bool has_avx_vnni() {
    constexpr unsigned kAvxVnni = 1u << 4;
    unsigned a, b, c, d;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvxVnni) != 0;
}
#endif

#if defined(PLIANT_AMX)
// The processor has tiles of int8, and the kernel lets this process use their registers.
bool has_amx() {
    constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
    constexpr long kRequestState = 0x1023, kTileData = 18;  // arch_prctl(2), ARCH_REQ_XCOMP_PERM
    unsigned a, b, c, d;
    return has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) != 0 &&
           (d & kInt8) != 0 && syscall(SYS_arch_prctl, kRequestState, kTileData) == 0;
}
#endif

// The kernels that this machine can run, best first.
std::vector<Kernels> usable() {
    std::vector<Kernels> all;
    const auto add = [&](bool can, auto... parts) {
        if (can) all.push_back(make(parts...));
    };
#if defined(PLIANT_AMX)
    add(has_amx(), "amx", avx512::fill_ops, amx::coded_product, avx512::page_product);
#endif
#if defined(__x86_64__)
    add(has_avx512(), "avx512", avx512::fill_ops, avx512::coded_product, avx512::page_product);
    add(has_avx512vnni(), "avx512vnni", avx512::fill_ops, avx512vnni::coded_product,
        avx512vnni::page_product);
    add(has_avx512bw(), "avx512bw", avx512::fill_ops, avx512bw::coded_product,
        avx512bw::page_product);
#endif
#if defined(PLIANT_AVX_VNNI)
    add(has_avx_vnni(), "avxvnni", avx2::fill_ops, avxvnni::coded_product, avxvnni::page_product);
#endif
#if defined(__x86_64__)
    add(has_avx2(), "avx2", avx2::fill_ops, avx2::coded_product, avx2::page_product);
#endif
    add(true, "plain", plain::fill_ops, plain::coded_product, plain::page_product);
    return all;
}

const std::vector<Kernels>& all_kernels() {
    static const std::vector<Kernels> kernels = usable();
    return kernels;
}

}  // namespace

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const Kernels& kernels : all_kernels()) names.emplace_back(kernels.name);
    return names;
}

const Kernels& select_kernels(const std::string& name) {
    for (const Kernels& kernels : all_kernels())
        if (name == "auto" || name == kernels.name) return kernels;
    std::string known;
    for (const std::string& isa : usable_isas()) known += (known.empty() ? "" : ", ") + isa;
    throw UsageError("no kernels for the instruction set '" + name +
                     "' on this machine; it has: " + known);
}

}  // namespace pliant
