// The pybind11 module transfuse._C: build facts and the ISA level. Importing it registers the ops of csrc/<op>.cpp.
#include <pybind11/pybind11.h>

#include <string>

#include "allocate.h"
#include "cpu/isa.h"

namespace py = pybind11;
using transfuse::cpu::Isa;

namespace {

py::list cpu_isa_levels() {
  py::list levels;
  for (int i = 1; i <= static_cast<int>(transfuse::cpu::best_isa()); ++i) levels.append(transfuse::cpu::isa_name(static_cast<Isa>(i)));
  return levels;
}

void set_cpu_isa(const std::string& name) {
  for (Isa level : {Isa::avx2, Isa::avx512, Isa::avx512_bf16})
    if (name == transfuse::cpu::isa_name(level)) return transfuse::cpu::set_isa(level);
  throw py::value_error("set_cpu_isa: level is '" + name + "', expected avx2, avx512 or avx512_bf16");
}

py::dict build_info() {
  py::dict info;
  info["version"] = TRANSFUSE_VERSION;
  info["compiler"] = __VERSION__;
  info["torch_target"] = "2.10";
  info["isa_levels"] = py::make_tuple("avx2", "avx512", "avx512_bf16");
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of transfuse; importing registers torch.ops.transfuse.*";
  m.def("build_info", &build_info, "What this binary was built with.");
  m.def("cpu_isa", [] { return transfuse::cpu::isa_name(transfuse::cpu::isa()); }, "The ISA level in force.");
  m.def("cpu_isa_levels", &cpu_isa_levels, "The levels this CPU can run, narrowest first; empty below AVX2 + FMA.");
  m.def("set_nan_filled_empty", [](bool fill) { transfuse::nan_filled_empty = fill; }, py::arg("fill"),
        "Fills the memory of new results with NaN (tests).");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("level"), "Forces an ISA level (tests); ValueError where the CPU lacks it.");
}
