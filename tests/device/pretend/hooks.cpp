// What torch asks of CUDA outside of its device guard: that there is one device, and that no memory is pinned.
//
// Loaded after libtorch_cpu, whose registry it enters, and before `import torch`.
#include <cstdio>

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {

struct PretendHooks : public CUDAHooksInterface {
  PretendHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  bool isPinnedPtr(const void*) const override { return false; }
};

C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, PretendHooks)

}  // namespace at
