// The pybind11 module transfuse._C: build facts and the ISA level. Importing it registers the ops of csrc/<op>.cpp.
#include <pybind11/pybind11.h>

#include <string>

#include "allocate.h"
#include "cpu/isa.h"

namespace py = pybind11;
using transfuse::cpu::Isa;

namespace {

py::tuple levels_where(bool (*holds)(Isa)) {
  py::list levels;
  for (int i = 0; i < transfuse::cpu::num_isa_levels; ++i)
    if (holds(static_cast<Isa>(i))) levels.append(transfuse::cpu::isa_name(static_cast<Isa>(i)));
  return levels;
}

void set_cpu_isa(const std::string& name) {
  for (int i = 0; i < transfuse::cpu::num_isa_levels; ++i)
    if (name == transfuse::cpu::isa_name(static_cast<Isa>(i))) return transfuse::cpu::set_isa(static_cast<Isa>(i));
  throw py::value_error("set_cpu_isa: level is '" + name + "', expected baseline, avx2, avx512 or avx512_bf16");
}

py::dict build_info() {
  py::dict info;
  info["version"] = TRANSFUSE_VERSION;
  info["compiler"] = __VERSION__;
  info["torch_target"] = "2.10";
  info["cuda"] = TRANSFUSE_CUDA_BUILD;  // of _C_cuda: what it was built for, or why it was not
  info["isa_levels"] = levels_where(transfuse::cpu::isa_built);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of transfuse; importing registers torch.ops.transfuse.*";
  m.def("build_info", &build_info, "What this binary was built with.");
  m.def("cpu_isa", [] { return transfuse::cpu::isa_name(transfuse::cpu::isa()); }, "The ISA level in force.");
  m.def("cpu_isa_levels", [] { return levels_where(transfuse::cpu::isa_available); },
        "The levels that are built and this CPU can run, narrowest first.");
  m.def("set_nan_filled_empty", [](bool fill) { transfuse::nan_filled_empty = fill; }, py::arg("fill"),
        "Fills the memory of new results with NaN (tests).");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("level"), "Forces an ISA level (tests); ValueError where the CPU lacks it.");
}
