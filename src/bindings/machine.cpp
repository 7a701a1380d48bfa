#include "../core/machine.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "../core/kernels/kernels.h"
#include "../core/reading.h"
#include "bindings.h"

namespace nb = nanobind;

namespace pliant {

void init_machine(nb::module_& module) {
    module.def("cpu_isa", &usable_isas,
               "Names of the instruction sets that have kernels here, best first.");
    module.def("usable_cpus", &usable_cpus,
               "Processors that this process may use: affinity and cgroup quota.");
    module.def(
        "resident_bytes",
        [] {
            const Resident r = resident();
            return std::make_tuple(r.now, r.peak);
        },
        "Resident set of this process and its peak (VmRSS, VmHWM) in bytes.");
    module.def("is_cached", &is_cached, nb::arg("fd"), nb::arg("offset"), nb::arg("size"),
               nb::call_guard<nb::gil_scoped_release>(),
               "Whether most of this range of an open file is in the kernel's cache; true where "
               "the kernel cannot tell.");
    module.def("read_bandwidth", &read_bandwidth, nb::arg("mebibytes"), nb::arg("threads"),
               nb::arg("repeats"), nb::call_guard<nb::gil_scoped_release>(),
               "Bytes per second of plain reading, the best of some repeats.");
}

}  // namespace pliant
