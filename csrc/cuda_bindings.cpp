// The pybind11 module transfuse._C_cuda. Importing it registers the CUDA implementations of the raw ops, whose schemas
// are _C's, and touches no GPU: it also imports on a machine without one.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "allocate.h"

namespace py = pybind11;

namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

py::dict build_info() {
  py::dict info;
  info["version"] = TRANSFUSE_VERSION;
  info["runtime"] = version_text(CUDART_VERSION);
  py::list architectures;  // in torch's words: "8.0", "9.0a", "12.0+PTX"
  std::istringstream names(TRANSFUSE_CUDA_ARCHITECTURES);
  for (std::string name; names >> name;) architectures.append(name);
  info["architectures"] = py::tuple(architectures);
  return info;
}

// Why the driver of this machine cannot run this module; empty where it can. The driver itself is asked, for its version
// alone: the runtime's cudaDriverGetVersion initialises it, and a process that forks later has then lost CUDA.
std::string driver_unusable() {
  using VersionGetter = int (*)(int*);
  void* library = dlopen("libcuda.so.1", RTLD_LAZY);
  const auto version_of = library ? reinterpret_cast<VersionGetter>(dlsym(library, "cuDriverGetVersion")) : nullptr;
  if (!version_of) return "no NVIDIA driver is installed";
  int driver = 0;
  if (version_of(&driver)) return "the NVIDIA driver does not tell its version";
  if (driver / 1000 >= CUDART_VERSION / 1000) return "";
  return "the NVIDIA driver serves CUDA " + version_text(driver) + ", the module needs " + version_text(CUDART_VERSION);
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of transfuse; importing registers them for torch.ops.transfuse.*";
  m.def("build_info", &build_info, "What this binary was built with.");
  m.def("driver_unusable", &driver_unusable, "Why this machine's driver cannot run it; empty where it can.");
  m.def(
      "set_nan_filled_empty", [](bool fill) { transfuse::nan_filled_empty = fill; }, py::arg("fill"),
      "Fills the memory of new results with NaN (tests).");
}
